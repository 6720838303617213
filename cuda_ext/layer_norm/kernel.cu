// LayerNorm on device/norm.cuh: y = (total - mean) / deviation * weight + bias with total = x + residual.
// sass norm_forward<.*, [1248], [48]>: LDG.E.128 STG.E.128
// sass norm_backward<.*, [12], [48]>: LDG.E.128 STG.E.128
#include "device/norm.cuh"

void layer_norm_forward(Stream stream, Tensor x, Optional residual, Tensor weight, Optional bias, double eps, Tensor y,
                        Optional total, Tensor mean, Tensor inverse) {
  launch_norm_forward<true>(stream, x, residual, weight, bias, eps, y, total, mean, inverse);
}

void layer_norm_backward(Stream stream, Tensor dy, Optional dtotal, Tensor total, Tensor weight, Tensor mean,
                         Tensor inverse, Tensor dx, Tensor dweight, Optional dbias, Tensor partial,
                         Optional bias_partial) {
  launch_norm_backward<true>(stream, dy, dtotal, total, weight, mean, inverse, dx, dweight, dbias, partial,
                             bias_partial);
}

OP(layer_norm_forward,
   "layer_norm_forward(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, Tensor(a!) y, "
   "Tensor(b!)? total, Tensor(c!) mean, Tensor(d!) inverse) -> ()")
OP(layer_norm_backward,
   "layer_norm_backward(Tensor dy, Tensor? dtotal, Tensor total, Tensor weight, Tensor mean, Tensor inverse, "
   "Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!)? dbias, Tensor(d!) partial, Tensor(e!)? bias_partial) -> ()")
