// Rotary position embedding, halves for pairs: (a, b) <- (a cos - b sin, b cos + a sin), in any strides of x but its
// last. With sign = -1 it turns back, which is the gradient.
//
// A thread keeps the cosines and sines of 16 bytes of a half in registers and turns all its heads by them. blockDim:
// packs of a half x heads x positions. The multiply-adds are written out, so that both instances round alike.
// sass rotary_turn<.*, [48]>: LDG.E.128 STG.E.128
#include "device/device.cuh"

constexpr int kThreads = 256, kMostPositions = 64;  // the second: what CUDA allows in blockDim.z

struct RotaryStrides {
  int64_t batch, place, head;
};

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    rotary_turn(const T* x, RotaryStrides of_x, const float* cosines, RotaryStrides of_cos, const float* sines, RotaryStrides of_sin,
                float sign, int64_t positions, int64_t length, int64_t heads, int64_t half, T* y) {
  const int64_t position = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  if (position >= positions) return;
  const int64_t batch = position / length, place = position % length;
  const float *cos_row = cosines + batch * of_cos.batch + place * of_cos.place,
              *sin_row = sines + batch * of_sin.batch + place * of_sin.place;
  for (int64_t at = int64_t{N} * threadIdx.x; at < half; at += int64_t{N} * blockDim.x) {
    float cos[N], sin[N];
    constexpr int kFloats = N < 4 ? N : 4;
    for (int n = 0; n < N; n += kFloats) {
      const auto some = load<float, kFloats>(cos_row + at + n), more = load<float, kFloats>(sin_row + at + n);
      for (int m = 0; m < kFloats; m++) cos[n + m] = some.at[m], sin[n + m] = sign * more.at[m];
    }
    for (int64_t head = threadIdx.y; head < heads; head += blockDim.y) {
      const T* from = x + batch * of_x.batch + place * of_x.place + head * of_x.head + at;
      T* to = y + (position * heads + head) * 2 * half + at;
      Pack<T, N> first = load<T, N>(from), second = load<T, N>(from + half);
      for (int n = 0; n < N; n++) {
        const float a = wide(first.at[n]), b = wide(second.at[n]);
        first.at[n] = narrow<T>(fmaf(a, cos[n], -(b * sin[n])));
        second.at[n] = narrow<T>(fmaf(b, cos[n], a * sin[n]));
      }
      store(to, first);
      store(to + half, second);
    }
  }
}

namespace {

// [B|1,T,H] in fp32, rows in order: its strides, that of a batch 0 where one serves all.
RotaryStrides of_table(const char* name, const Tensor& table, const Tensor& x) {
  if (table.dtype != kFloat) refuse("%s is %s, not float32", name, name_of(table.dtype));
  if (table.dim != 3 || (table.size(0) != 1 && table.size(0) != x.size(0)) || table.size(1) != x.size(1) ||
      table.size(2) != x.size(3))
    refuse("%s %s does not fit x %s: [B|1,T,H] is needed", name, shape_of(table).c_str(), shape_of(x).c_str());
  if (table.strides[2] != 1) refuse("%s has stride %lld in its last dimension, not 1", name, (long long)table.strides[2]);
  return {table.size(0) == 1 ? 0 : table.strides[0], table.strides[1], 0};
}

// Whether every row begins on 16 bytes.
bool moves_packs(const void* pointer, const RotaryStrides& strides, int item_size) {
  for (int64_t stride : {strides.batch, strides.place, strides.head})
    if (stride * item_size % 16 != 0) return false;
  return aligned(pointer);
}

}  // namespace

void rotary_forward(Stream stream, Tensor x, Tensor cos, Tensor sin, double sign, Tensor y) {
  check_float("x", x);
  if (x.dim != 4 || x.size(3) % 2 != 0 || x.size(3) == 0)
    refuse("x %s is not [B,T,N,H] with H even", shape_of(x).c_str());
  if (x.strides[3] != 1) refuse("x has stride %lld in its last dimension, not 1", (long long)x.strides[3]);
  const RotaryStrides of_cos = of_table("cos", cos, x), of_sin = of_table("sin", sin, x);
  check_like("y", y, "x", x);
  if (x.numel() == 0) return;

  const RotaryStrides of_x{x.strides[0], x.strides[1], x.strides[2]};
  const int64_t positions = x.size(0) * x.size(1), heads = x.size(2), half = x.size(3) / 2;
  of_dtype(x.dtype, [&](auto t) {
    using T = decltype(t);
    auto go = [&](auto n) {
      constexpr int N = decltype(n)::value;
      const auto of = [](int64_t items, int64_t most) { return static_cast<unsigned>(items < most ? items : most); };
      const unsigned packs = of(half / N, kThreads), most = kThreads / packs;
      const int64_t rounds = (heads + most - 1) / most;
      const unsigned at_once = static_cast<unsigned>((heads + rounds - 1) / rounds),
                     rows = of(kThreads / (packs * at_once), kMostPositions);
      const auto kernel = rotary_turn<T, N>;
      LAUNCH(kernel, blocks_of(positions, rows), dim3(packs, at_once, rows), 0, stream, x.as<T>(), of_x,
             cos.as<float>(), of_cos, sin.as<float>(), of_sin, static_cast<float>(sign), positions, x.size(1), heads,
             half, y.as<T>());
    };
    const bool packs = half % kWide<T> == 0 && aligned(y.data) && moves_packs(x.data, of_x, sizeof(T)) &&
                       moves_packs(cos.data, of_cos, sizeof(float)) && moves_packs(sin.data, of_sin, sizeof(float));
    if (packs) return go(std::integral_constant<int, kWide<T>>{});
    go(std::integral_constant<int, 1>{});
  });
}

OP(rotary_forward, "rotary_forward(Tensor x, Tensor cos, Tensor sin, float sign, Tensor(a!) y) -> ()")
