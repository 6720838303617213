// RMSNorm on device/norm.cuh: y = total / rms(total) * weight with total = x + residual.
// sass norm_forward<.*, [1248], [48]>: LDG.E.128 STG.E.128
// sass norm_backward<.*, [124], [48]>: LDG.E.128 STG.E.128
#include "device/norm.cuh"

void rms_norm_forward(Stream stream, Tensor x, Optional residual, Tensor weight, double eps, Tensor y, Optional total,
                      Tensor inverse) {
  launch_norm_forward<false>(stream, x, residual, weight, kNone, eps, y, total, kNone,
                             inverse);
}

void rms_norm_backward(Stream stream, Tensor dy, Optional dtotal, Tensor total, Tensor weight, Tensor inverse,
                       Tensor dx, Tensor dweight, Tensor partial) {
  launch_norm_backward<false>(stream, dy, dtotal, total, weight, kNone, inverse, dx, dweight, kNone, partial, kNone);
}

OP(rms_norm_forward,
   "rms_norm_forward(Tensor x, Tensor? residual, Tensor weight, float eps, Tensor(a!) y, Tensor(b!)? total, "
   "Tensor(c!) inverse) -> ()")
OP(rms_norm_backward,
   "rms_norm_backward(Tensor dy, Tensor? dtotal, Tensor total, Tensor weight, Tensor inverse, Tensor(a!) dx, "
   "Tensor(b!) dweight, Tensor(c!) partial) -> ()")
