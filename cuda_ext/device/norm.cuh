// RMSNorm and LayerNorm with a residual sum in front, forward and backward, for rows of any width.
//
// A block takes a row and keeps it in registers, as read, 16 bytes a load: kItems packs of N numbers a thread. Where a
// row is wider than that (kItems = 0) it is read again, from a cache; where 16 bytes cannot be moved at once, N is 1.
// How a row is summed depends on its width alone, so its bits depend on no other row.
//
// Backward, a fixed number of blocks goes through the rows and sums the weight's gradient by column, each block its
// own in fp32; a second kernel adds those up in a fixed order. No atomics: the same bits every time, on every card.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "device/device.cuh"

constexpr int kForwardThreads = 1024, kBackwardThreads = 512;

// Column of pack `item` of this thread.
template <int N>
__device__ inline int64_t column_of(int item) {
  return (static_cast<int64_t>(item) * blockDim.x + threadIdx.x) * N;
}

// Packs of a row that a thread goes through: as many as fit in registers, or as there are.
template <int kItems, int N>
__device__ inline int items_of(int64_t width) {
  if constexpr (kItems > 0) return kItems;
  return static_cast<int>((width + int64_t{N} * blockDim.x - 1) / (int64_t{N} * blockDim.x));
}

template <class T, class W, bool kCentred, int kItems, int N>
__global__ void __launch_bounds__(kForwardThreads)
    norm_forward(const T* x, const T* residual, const W* weight, const W* bias, float eps, int64_t width, T* y,
                 T* total, float* mean, float* inverse) {
  const int64_t row = blockIdx.x, start = row * width;
  Pack<T, N> kept[kItems > 0 ? kItems : 1] = {};
  const T* again = residual ? total : x;
  auto pack_of = [&](int item, int64_t column) {
    if constexpr (kItems > 0) return kept[item];
    return load<T, N>(again + start + column);
  };

  float sum = 0.0f;
#pragma unroll
  for (int item = 0; item < items_of<kItems, N>(width); item++) {
    const int64_t column = column_of<N>(item);
    if (column >= width) break;
    Pack<T, N> pack = load<T, N>(x + start + column);
    if (residual) {
      const Pack<T, N> more = load<T, N>(residual + start + column);
      for (int n = 0; n < N; n++) pack.at[n] = narrow<T>(wide(pack.at[n]) + wide(more.at[n]));
      store(total + start + column, pack);
    }
    for (int n = 0; n < N; n++) sum += kCentred ? wide(pack.at[n]) : wide(pack.at[n]) * wide(pack.at[n]);
    if constexpr (kItems > 0) kept[item] = pack;
  }
  sum = block_sum(sum);

  float centre = 0.0f;
  if constexpr (kCentred) {
    centre = sum / static_cast<float>(width);
    sum = 0.0f;
#pragma unroll
    for (int item = 0; item < items_of<kItems, N>(width); item++) {
      const int64_t column = column_of<N>(item);
      if (column >= width) break;
      const Pack<T, N> pack = pack_of(item, column);
      for (int n = 0; n < N; n++) sum += (wide(pack.at[n]) - centre) * (wide(pack.at[n]) - centre);
    }
    sum = block_sum(sum);
  }
  const float scale = 1.0f / sqrtf(sum / static_cast<float>(width) + eps);

#pragma unroll
  for (int item = 0; item < items_of<kItems, N>(width); item++) {
    const int64_t column = column_of<N>(item);
    if (column >= width) break;
    Pack<T, N> pack = pack_of(item, column);
    for (int n = 0; n < N; n++) {
      float value = (wide(pack.at[n]) - centre) * scale * wide(weight[column + n]);
      if (kCentred && bias) value += wide(bias[column + n]);
      pack.at[n] = narrow<T>(value);
    }
    store(y + start + column, pack);
  }
  if (threadIdx.x == 0) {
    inverse[row] = scale;
    if (kCentred) mean[row] = centre;
  }
}

// With n = (x - mean) / deviation and g = w dy: dx = (g - mean(g) - n mean(g n)) / deviation + dtotal, dw = sum(n dy),
// db = sum(dy) over rows; RMSNorm has neither mean.
template <class T, class W, bool kCentred, int kItems, int N>
__global__ void __launch_bounds__(kBackwardThreads)
    norm_backward(const T* dy, const T* dtotal, const T* total, const W* weight, const float* mean,
                  const float* inverse, int64_t rows, int64_t width, T* dx, float* of_weight, float* of_bias) {
  constexpr int kKept = kItems > 0 ? kItems : 1;
  float sums[kKept][N] = {}, bias_sums[kCentred ? kKept : 1][N] = {};
  const int64_t mine = blockIdx.x * width;  // this block's line of partial sums
  bool first = true;

  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, first = false) {
    const int64_t start = row * width;
    const float scale = inverse[row], centre = kCentred ? mean[row] : 0.0f;
    Pack<T, N> xs[kKept], dys[kKept];
    float along = 0.0f, level = 0.0f;
#pragma unroll
    for (int item = 0; item < items_of<kItems, N>(width); item++) {
      const int64_t column = column_of<N>(item);
      if (column >= width) break;
      const int at = kItems > 0 ? item : 0;
      xs[at] = load<T, N>(total + start + column);
      dys[at] = load<T, N>(dy + start + column);
      for (int n = 0; n < N; n++) {
        const float normal = (wide(xs[at].at[n]) - centre) * scale, g = wide(dys[at].at[n]) * wide(weight[column + n]);
        along += g * normal;
        if (kCentred) level += g;
        const float of_w = wide(dys[at].at[n]) * normal, of_b = wide(dys[at].at[n]);
        if constexpr (kItems > 0) {
          sums[item][n] += of_w;
          if (kCentred) bias_sums[item][n] += of_b;
        } else {
          float& sum = of_weight[mine + column + n];
          sum = first ? of_w : sum + of_w;
          if (kCentred && of_bias) of_bias[mine + column + n] = first ? of_b : of_bias[mine + column + n] + of_b;
        }
      }
    }
    along = block_sum(along) / static_cast<float>(width);
    if (kCentred) level = block_sum(level) / static_cast<float>(width);
#pragma unroll
    for (int item = 0; item < items_of<kItems, N>(width); item++) {
      const int64_t column = column_of<N>(item);
      if (column >= width) break;
      const int at = kItems > 0 ? item : 0;
      if constexpr (kItems == 0) {
        xs[at] = load<T, N>(total + start + column);
        dys[at] = load<T, N>(dy + start + column);
      }
      Pack<T, N> result;
      Pack<T, N> more{};
      if (dtotal) more = load<T, N>(dtotal + start + column);
      for (int n = 0; n < N; n++) {
        const float normal = (wide(xs[at].at[n]) - centre) * scale, g = wide(dys[at].at[n]) * wide(weight[column + n]);
        float value = (g - level - normal * along) * scale;
        if (dtotal) value += wide(more.at[n]);
        result.at[n] = narrow<T>(value);
      }
      store(dx + start + column, result);
    }
  }
  if constexpr (kItems > 0) {
#pragma unroll
    for (int item = 0; item < kItems; item++) {
      const int64_t column = column_of<N>(item);
      if (column >= width) break;
      for (int n = 0; n < N; n++) {
        of_weight[mine + column + n] = sums[item][n];
        if (kCentred && of_bias) of_bias[mine + column + n] = bias_sums[item][n];
      }
    }
  }
}

// out[c] = sum over lines of partial[line, c]: 32 columns a block, 8 lines at once, then those 8 in order.
template <class W>
__global__ void __launch_bounds__(256)
    sum_lines(const float* partial, int64_t lines, int64_t width, W* out) {
  SHARED(float, sums, 8 * kWarp);
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  float sum = 0.0f;
  if (column < width)
    for (int64_t line = group; line < lines; line += 8) sum += partial[line * width + column];
  sums[group * kWarp + lane] = sum;
  __syncthreads();
  if (group > 0 || column >= width) return;
  for (int other = 1; other < 8; other++) sum += sums[other * kWarp + lane];
  out[column] = narrow<W>(sum);
}

// Threads for so many packs a row, at most `most`: whole warps.
inline unsigned threads_for(int64_t packs, int most) {
  const int64_t whole = (packs + kWarp - 1) / kWarp * kWarp;
  return static_cast<unsigned>(whole < most ? (whole ? whole : kWarp) : most);
}

// Calls body(std::integral_constant<int, items>{}) with the least of 1, 2, 4, .. most that holds the row, or with 0.
template <int most, class Body>
void of_items(int64_t packs, int threads, Body body) {
  if (packs <= threads) return body(std::integral_constant<int, 1>{});
  if (packs <= 2 * threads) return body(std::integral_constant<int, 2>{});
  if constexpr (most >= 4)
    if (packs <= 4 * threads) return body(std::integral_constant<int, 4>{});
  if constexpr (most >= 8)
    if (packs <= 8 * threads) return body(std::integral_constant<int, 8>{});
  body(std::integral_constant<int, 0>{});
}

struct Norm {  // what a call is about, checked
  int64_t rows, width;

  Norm(const Tensor& x, const Tensor& weight) : rows(1), width(x.dim ? x.size(-1) : 0) {
    for (int at = 0; at + 1 < x.dim; at++) rows *= x.size(at);
    if (width < 1 || width > (1 << 30)) refuse("x %s has rows of %lld, not of 1 to 2^30", shape_of(x).c_str(), (long long)width);
    if (rows > 2147483647) refuse("x %s has %lld rows: at most 2^31 - 1 are possible", shape_of(x).c_str(), (long long)rows);
    check_float("x", x);
    check_contiguous("x", x);
    if (weight.dtype != x.dtype && weight.dtype != kFloat)
      refuse("weight is %s beside x of %s: x's dtype or float32 is needed", name_of(weight.dtype), name_of(x.dtype));
    check("weight", weight, weight.dtype, width);
  }

  // Whether rows begin on 16 bytes in all of these, and end there.
  bool moves_packs(int item_size, std::initializer_list<const void*> pointers) const {
    for (const void* pointer : pointers)
      if (pointer && !aligned(pointer)) return false;
    return width * item_size % 16 == 0;
  }
};

// Calls body(T{}, W{}).
template <class Body>
void of_dtypes(const Tensor& x, const Tensor& weight, Body body) {
  of_dtype(x.dtype, [&](auto t) {
    using T = decltype(t);
    if (weight.dtype == x.dtype) return body(T{}, T{});
    if constexpr (!std::is_same_v<T, float>) body(T{}, float{});
  });
}

template <bool kCentred>
void launch_norm_forward(Stream stream, const Tensor& x, const Tensor& residual, const Tensor& weight,
                         const Tensor& bias, double eps, const Tensor& y, const Tensor& total, const Tensor& mean,
                         const Tensor& inverse) {
  const Norm norm(x, weight);
  const int64_t numel = norm.rows * norm.width;
  check("y", y, x.dtype, numel);
  check("inverse", inverse, kFloat, norm.rows);
  if (residual.given()) check("residual", residual, x.dtype, numel), check("total", total, x.dtype, numel);
  if (kCentred) check("mean", mean, kFloat, norm.rows);
  if (bias.given()) check("bias", bias, weight.dtype, norm.width);
  if (numel == 0) return;
  of_dtypes(x, weight, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    auto go = [&](auto items, auto n) {
      constexpr int kItems = decltype(items)::value, N = decltype(n)::value;
      const auto kernel = norm_forward<T, W, kCentred, kItems, N>;
      LAUNCH(kernel, static_cast<unsigned>(norm.rows), threads_for((norm.width + N - 1) / N, kForwardThreads), 0,
             stream, x.as<T>(), residual.given() ? residual.as<T>() : nullptr, weight.as<W>(),
             bias.given() ? bias.as<W>() : nullptr, static_cast<float>(eps), norm.width, y.as<T>(),
             residual.given() ? total.as<T>() : nullptr, kCentred ? mean.as<float>() : nullptr, inverse.as<float>());
    };
    if (norm.moves_packs(sizeof(T), {x.data, y.data, residual.data, total.data}))
      of_items<kWide<T> == 4 ? 8 : 4>(norm.width / kWide<T>, kForwardThreads,
                  [&](auto items) { go(items, std::integral_constant<int, kWide<T>>{}); });
    else
      go(std::integral_constant<int, 0>{}, std::integral_constant<int, 1>{});
  });
}

template <bool kCentred>
void launch_norm_backward(Stream stream, const Tensor& dy, const Tensor& dtotal, const Tensor& total,
                          const Tensor& weight, const Tensor& mean, const Tensor& inverse, const Tensor& dx,
                          const Tensor& dweight, const Tensor& dbias, const Tensor& partial,
                          const Tensor& bias_partial) {
  const Norm norm(total, weight);
  const int64_t numel = norm.rows * norm.width, lines = partial.dim == 2 ? partial.size(0) : 0;
  check("dy", dy, total.dtype, numel);
  check("dx", dx, total.dtype, numel);
  check("dweight", dweight, weight.dtype, norm.width);
  check("inverse", inverse, kFloat, norm.rows);
  check("partial", partial, kFloat, lines * norm.width);
  if (dtotal.given()) check("dtotal", dtotal, total.dtype, numel);
  if (kCentred) check("mean", mean, kFloat, norm.rows);
  if (dbias.given()) check("dbias", dbias, weight.dtype, norm.width), check("bias_partial", bias_partial, kFloat, lines * norm.width);
  if (lines > norm.rows || lines > 65535 || (lines == 0 && norm.rows > 0))
    refuse("partial %s has %lld lines for %lld rows", shape_of(partial).c_str(), (long long)lines, (long long)norm.rows);
  of_dtypes(total, weight, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    auto go = [&](auto items, auto n) {
      constexpr int kItems = decltype(items)::value, N = decltype(n)::value;
      const auto kernel = norm_backward<T, W, kCentred, kItems, N>;
      LAUNCH(kernel, static_cast<unsigned>(lines), threads_for((norm.width + N - 1) / N, kBackwardThreads), 0, stream,
             dy.as<T>(), dtotal.given() ? dtotal.as<T>() : nullptr, total.as<T>(), weight.as<W>(),
             kCentred ? mean.as<float>() : nullptr, inverse.as<float>(), norm.rows, norm.width, dx.as<T>(),
             partial.as<float>(), dbias.given() ? bias_partial.as<float>() : nullptr);
    };
    if (lines > 0) {
      if (norm.moves_packs(sizeof(T), {dy.data, dx.data, total.data, dtotal.data}))
        of_items<kCentred ? 2 : 4>(norm.width / kWide<T>, kBackwardThreads,
                    [&](auto items) { go(items, std::integral_constant<int, kWide<T>>{}); });
      else
        go(std::integral_constant<int, 0>{}, std::integral_constant<int, 1>{});
    }
    const unsigned blocks = static_cast<unsigned>((norm.width + kWarp - 1) / kWarp);
    const auto add = sum_lines<W>;
    LAUNCH(add, blocks, 256, 0, stream, partial.as<float>(), lines, norm.width, dweight.as<W>());
    if (dbias.given())
      LAUNCH(add, blocks, 256, 0, stream, bias_partial.as<float>(), lines, norm.width, dbias.as<W>());
  });
}
