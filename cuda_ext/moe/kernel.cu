// Rows to experts and back. A slot n * k + j is the j-th copy of token n; rows[slot] is where it stands among the experts'
// rows, slots[row] is the way back, -1 for a row that only fills up. A block takes a row, so a row's bits depend on no
// other; sums over k go in order of j, in fp32. A row that is not there is read as NaN, for only the card sees it.
// sass moe_gather_kernel<.*, [48]>: LDG.E.128 STG.E.128
// sass moe_combine_kernel<.*, [48]>: LDG.E.128 STG.E.128
// sass moe_dot_kernel<.*, [48]>: LDG.E.128
#include <initializer_list>
#include <type_traits>

#include "device/device.cuh"

constexpr int kMoeThreads = 256;

// y[row] = weight[slot] * x[slot / k], zeros for a row without a slot.
template <class T, int N>
__global__ void __launch_bounds__(kMoeThreads)
    moe_gather_kernel(const T* x, const int64_t* slots, const float* weights, int64_t tokens, int64_t k, int64_t width,
                      T* y) {
  const int64_t row = blockIdx.x, slot = slots[row];
  const bool given = slot >= 0 && slot < tokens * k;
  const float weight = weights && given ? weights[slot] : 1.0f;
  for (int64_t column = int64_t{threadIdx.x} * N; column < width; column += int64_t{blockDim.x} * N) {
    Pack<T, N> pack{};
    if (given) pack = load<T, N>(x + slot / k * width + column);
    if (weights)
      for (int n = 0; n < N; n++) pack.at[n] = narrow<T>(weight * wide(pack.at[n]));
    store(y + row * width + column, pack);
  }
}

// out[n] = sum over j of weight[n, j] * y[rows[n, j]].
template <class T, int N>
__global__ void __launch_bounds__(kMoeThreads)
    moe_combine_kernel(const T* y, const int64_t* rows, const float* weights, int64_t size, int64_t k, int64_t width,
                       T* out) {
  const int64_t token = blockIdx.x;
  for (int64_t column = int64_t{threadIdx.x} * N; column < width; column += int64_t{blockDim.x} * N) {
    float sums[N] = {};
    for (int64_t j = 0; j < k; j++) {
      const int64_t row = rows[token * k + j];
      const bool there = row >= 0 && row < size;
      const Pack<T, N> pack = load<T, N>(y + (there ? row : 0) * width + column);
      const float weight = !there ? NAN : weights ? weights[token * k + j] : 1.0f;
      for (int n = 0; n < N; n++) sums[n] += weight * wide(pack.at[n]);
    }
    Pack<T, N> result;
    for (int n = 0; n < N; n++) result.at[n] = narrow<T>(sums[n]);
    store(out + token * width + column, result);
  }
}

// dweight[slot] = <dout[slot / k], y[rows[slot]]>.
template <class T, int N>
__global__ void __launch_bounds__(kMoeThreads)
    moe_dot_kernel(const T* dout, const T* y, const int64_t* rows, int64_t size, int64_t k, int64_t width,
                   float* dweights) {
  const int64_t slot = blockIdx.x, row = rows[slot], to = slot / k * width;
  const bool there = row >= 0 && row < size;
  const int64_t from = there ? row * width : 0;
  float sum = there ? 0.0f : NAN;
  for (int64_t column = int64_t{threadIdx.x} * N; column < width; column += int64_t{blockDim.x} * N) {
    const Pack<T, N> a = load<T, N>(dout + to + column), b = load<T, N>(y + from + column);
    for (int n = 0; n < N; n++) sum += wide(a.at[n]) * wide(b.at[n]);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) dweights[slot] = sum;
}

// Calls body(T{}, std::integral_constant<int, N>{}): 16 bytes at once where rows begin and end on them.
template <class Body>
void of_moe_packs(const Tensor& x, std::initializer_list<const void*> pointers, Body body) {
  of_dtype(x.dtype, [&](auto t) {
    using T = decltype(t);
    bool whole = x.size(1) % kWide<T> == 0;
    for (const void* pointer : pointers) whole = whole && aligned(pointer);
    if (whole) return body(T{}, std::integral_constant<int, kWide<T>>{});
    body(T{}, std::integral_constant<int, 1>{});
  });
}

inline unsigned moe_threads(int64_t width, int n) {
  const int64_t threads = ((width + n - 1) / n + kWarp - 1) / kWarp * kWarp;
  return static_cast<unsigned>(threads < kMoeThreads ? threads : kMoeThreads);
}

inline void check_matrix(const char* name, const Tensor& x) {
  check_float(name, x);
  check_contiguous(name, x);
  if (x.dim != 2 || x.size(1) < 1) refuse("%s %s is not a matrix", name, shape_of(x).c_str());
}

inline unsigned moe_blocks(const char* name, int64_t count) {
  if (count > 2147483647) refuse("%lld %s: at most 2^31 - 1 are possible", (long long)count, name);
  return static_cast<unsigned>(count);
}

void moe_gather(Stream stream, Tensor x, Tensor slots, Optional weights, int64_t k, Tensor y) {
  check_matrix("x", x);
  const int64_t rows = slots.numel(), width = x.size(1);
  if (k < 1) refuse("k is %lld, not 1 or more", (long long)k);
  check("slots", slots, kInt64, rows);
  check("y", y, x.dtype, rows * width);
  if (weights.given()) check("weights", weights, kFloat, x.size(0) * k);
  if (rows == 0) return;
  of_moe_packs(x, {x.data, y.data}, [&](auto t, auto n) {
    using T = decltype(t);
    constexpr int N = decltype(n)::value;
    const auto kernel = moe_gather_kernel<T, N>;
    LAUNCH(kernel, moe_blocks("rows", rows), moe_threads(width, N), 0, stream, x.as<T>(), slots.as<int64_t>(),
           weights.given() ? weights.as<float>() : nullptr, x.size(0), k, width, y.as<T>());
  });
}

void moe_combine(Stream stream, Tensor y, Tensor rows, Optional weights, Tensor out) {
  check_matrix("y", y);
  if (rows.dim != 2 || rows.size(1) < 1) refuse("rows %s is not [N, k]", shape_of(rows).c_str());
  const int64_t tokens = rows.size(0), k = rows.size(1), width = y.size(1);
  check("rows", rows, kInt64, tokens * k);
  check("out", out, y.dtype, tokens * width);
  if (weights.given()) check("weights", weights, kFloat, tokens * k);
  if (tokens == 0) return;
  if (y.size(0) == 0) refuse("y %s has no rows for %lld tokens", shape_of(y).c_str(), (long long)tokens);
  of_moe_packs(y, {y.data, out.data}, [&](auto t, auto n) {
    using T = decltype(t);
    constexpr int N = decltype(n)::value;
    const auto kernel = moe_combine_kernel<T, N>;
    LAUNCH(kernel, moe_blocks("tokens", tokens), moe_threads(width, N), 0, stream, y.as<T>(), rows.as<int64_t>(),
           weights.given() ? weights.as<float>() : nullptr, y.size(0), k, width, out.as<T>());
  });
}

void moe_dot(Stream stream, Tensor dout, Tensor y, Tensor rows, Tensor dweights) {
  check_matrix("y", y);
  if (rows.dim != 2 || rows.size(1) < 1) refuse("rows %s is not [N, k]", shape_of(rows).c_str());
  const int64_t tokens = rows.size(0), k = rows.size(1), width = y.size(1);
  check("rows", rows, kInt64, tokens * k);
  check("dout", dout, y.dtype, tokens * width);
  check("dweights", dweights, kFloat, tokens * k);
  if (tokens == 0) return;
  if (y.size(0) == 0) refuse("y %s has no rows for %lld tokens", shape_of(y).c_str(), (long long)tokens);
  of_moe_packs(y, {y.data, dout.data}, [&](auto t, auto n) {
    using T = decltype(t);
    constexpr int N = decltype(n)::value;
    const auto kernel = moe_dot_kernel<T, N>;
    LAUNCH(kernel, moe_blocks("slots", tokens * k), moe_threads(width, N), 0, stream, dout.as<T>(), y.as<T>(),
           rows.as<int64_t>(), y.size(0), k, width, dweights.as<float>());
  });
}

OP(moe_gather, "moe_gather(Tensor x, Tensor slots, Tensor? weights, int k, Tensor(a!) y) -> ()")
OP(moe_combine, "moe_combine(Tensor y, Tensor rows, Tensor? weights, Tensor(a!) out) -> ()")
OP(moe_dot, "moe_dot(Tensor dout, Tensor y, Tensor rows, Tensor(a!) dweights) -> ()")
