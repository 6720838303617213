// SwiGLU, y = silu(gate) * up with silu(g) = g / (1 + exp(-g)), and its gradients from dy, gate and up alone.
//
// A thread takes 16 bytes of each tensor (one number, where they do not begin on 16 bytes), the last one what is left.
// One formula for all elements: the bits of an element depend on that element alone. Left out: strided rows.
// sass swiglu_values<.*, [48]>: LDG.E.128 STG.E.128
// sass swiglu_gradients<.*, [48]>: LDG.E.128 STG.E.128
#include "device/device.cuh"

constexpr int kThreads = 256;

// 1 + exp(-g), the sum apart from the exponential's own last product, in every instance of the kernels.
__device__ inline float swiglu_divisor(float g) { return __fadd_rn(1.0f, expf(-g)); }

template <class T, int N>
__global__ void __launch_bounds__(kThreads) swiglu_values(const T* gate, const T* up, int64_t numel, T* y) {
  my_pack<N>(numel, [&](auto count, int64_t at) {
    constexpr int kCount = decltype(count)::value;
    const Pack<T, kCount> gates = load<T, kCount>(gate + at), ups = load<T, kCount>(up + at);
    Pack<T, kCount> ys;
    for (int n = 0; n < kCount; n++) {
      const float g = wide(gates.at[n]);
      ys.at[n] = narrow<T>(g / swiglu_divisor(g) * wide(ups.at[n]));
    }
    store(y + at, ys);
  });
}

// With s = 1 / (1 + exp(-g)): dgate = dy up s (1 + g (1 - s)), dup = dy g s.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    swiglu_gradients(const T* dy, const T* gate, const T* up, int64_t numel, T* dgate, T* dup) {
  my_pack<N>(numel, [&](auto count, int64_t at) {
    constexpr int kCount = decltype(count)::value;
    const Pack<T, kCount> dys = load<T, kCount>(dy + at), gates = load<T, kCount>(gate + at),
                          ups = load<T, kCount>(up + at);
    Pack<T, kCount> dgates, dups;
    for (int n = 0; n < kCount; n++) {
      const float g = wide(gates.at[n]), s = 1.0f / swiglu_divisor(g), of_silu = wide(dys.at[n]) * wide(ups.at[n]);
      dgates.at[n] = narrow<T>(of_silu * (s * fmaf(g, 1.0f - s, 1.0f)));
      dups.at[n] = narrow<T>(wide(dys.at[n]) * (g * s));
    }
    store(dgate + at, dgates);
    store(dup + at, dups);
  });
}

void swiglu_forward(Stream stream, Tensor gate, Tensor up, Tensor y) {
  check_float("gate", gate);
  for (auto [name, tensor] : {std::pair{"gate", gate}, {"up", up}, {"y", y}})
    check_like(name, tensor, "gate", gate);
  if (gate.numel() == 0) return;
  of_packs(gate.dtype, {gate.data, up.data, y.data}, [&](auto t, auto n) {
    using T = decltype(t);
    const auto kernel = swiglu_values<T, n>;
    LAUNCH(kernel, blocks_of(gate.numel(), n * kThreads), kThreads, 0, stream, gate.as<T>(), up.as<T>(), gate.numel(),
           y.as<T>());
  });
}

void swiglu_backward(Stream stream, Tensor dy, Tensor gate, Tensor up, Tensor dgate, Tensor dup) {
  check_float("gate", gate);
  for (auto [name, tensor] : {std::pair{"dy", dy}, {"gate", gate}, {"up", up}, {"dgate", dgate}, {"dup", dup}})
    check_like(name, tensor, "gate", gate);
  if (gate.numel() == 0) return;
  of_packs(gate.dtype, {dy.data, gate.data, up.data, dgate.data, dup.data}, [&](auto t, auto n) {
    using T = decltype(t);
    const auto kernel = swiglu_gradients<T, n>;
    LAUNCH(kernel, blocks_of(gate.numel(), n * kThreads), kThreads, 0, stream, dy.as<T>(), gate.as<T>(), up.as<T>(),
           gate.numel(), dgate.as<T>(), dup.as<T>());
  });
}

OP(swiglu_forward, "swiglu_forward(Tensor gate, Tensor up, Tensor(a!) y) -> ()")
OP(swiglu_backward,
   "swiglu_backward(Tensor dy, Tensor gate, Tensor up, Tensor(a!) dgate, Tensor(b!) dup) -> ()")
