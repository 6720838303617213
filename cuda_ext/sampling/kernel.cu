// A token of each row by inverse CDF: temperature, top-k, top-p, min-p, one uniform a row; nothing is sorted.
//
// Probabilities are fp64 and become whole multiples of 2^-48, weights, whose sums are exact in any order: what is drawn
// does not depend on how threads share out a row, but for the rounding of one sum of fp64, taken in a fixed order.
// Both cuts, top-k's and top-p's, are "the last token, from the largest logit down, before which there is less than so
// much": of counts, or of weights. It is found by its bits, eight at a time, from a histogram of what the tokens weigh
// that agree with it so far. A block takes a row.
// sass sampling::draw<.*, [48]>: LDG.E.128
#include <type_traits>

#include "device/device.cuh"

namespace sampling {

using Mass = unsigned long long;

constexpr int kThreads = 512, kFewThreads = 128, kFewTokens = 2048;  // a block's, and where fewer do
constexpr int kWarps = kThreads / kWarp, kBins = 256;
constexpr double kOne = 281474976710656.0;  // 2^48, the weight of probability 1

// Bits in the order of the numbers; both zeros are one.
__device__ inline uint32_t ordered(float x) {
  x += 0.0f;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float number(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// The lowest bit that a number of this dtype can have set, of fp32's, in whole eights.
template <class T>
constexpr int kLowest = std::is_same_v<T, float> ? 0 : std::is_same_v<T, __half> ? 8 : 16;

__device__ inline int warps() { return static_cast<int>(blockDim.x) / kWarp; }

template <class V>
__device__ inline V block_total(V value) {
  SHARED(V, of_warps, kWarps);
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warps[0];
  for (int warp = 1; warp < warps(); warp++) value += of_warps[warp];
  __syncthreads();
  return value;
}

template <class V>
__device__ inline V block_largest(V value) {
  SHARED(V, of_warps, kWarps);
  auto larger = [](V a, V b) { return b > a ? b : a; };
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = larger(value, __shfl_xor_sync(~0u, value, distance));
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int warp = 0; warp < warps(); warp++) value = larger(value, of_warps[warp]);
  __syncthreads();
  return value;
}

// Sums of a warp's lanes up to and with each.
__device__ inline Mass warp_running(Mass value) {
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const Mass other = __shfl_up_sync(~0u, value, distance);
    if (static_cast<int>(threadIdx.x % kWarp) >= distance) value += other;
  }
  return value;
}

struct Place {  // among the threads of a block
  Mass before, total;
};

__device__ inline Place block_running(Mass value) {
  SHARED(Mass, of_warps, kWarps);
  const int lane = threadIdx.x % kWarp, mine = threadIdx.x / kWarp;
  const Mass running = warp_running(value);
  if (lane == kWarp - 1) of_warps[mine] = running;
  __syncthreads();
  Place place{running - value, 0};
  for (int warp = 0; warp < warps(); warp++) {
    if (warp < mine) place.before += of_warps[warp];
    place.total += of_warps[warp];
  }
  __syncthreads();
  return place;
}

// body(logit, token) for this thread's tokens.
template <int N, class T, class Body>
__device__ inline void of_tokens(const T* row, int64_t width, Body body) {
  const int64_t packs = width / N;
  for (int64_t pack = threadIdx.x; pack < packs; pack += blockDim.x) {
    const Pack<T, N> read = load<T, N>(row + pack * N);
#pragma unroll
    for (int n = 0; n < N; n++) body(wide(read.at[n]), pack * N + n);
  }
  const int64_t token = packs * N + threadIdx.x;
  if (token < width) body(wide(row[token]), token);
}

// Adds to a shared histogram; what falls into one bin again and again goes there once.
struct Histogram {
  Mass* bins;
  uint32_t bin = 0;
  Mass pending = 0;

  __device__ void add(uint32_t to, Mass mass) {
    if (to != bin) {
      if (pending) atomicAdd(&bins[bin], pending);
      bin = to, pending = 0;
    }
    pending += mass;
  }
  __device__ void finish() {  // most lanes of a warp end with one bin
    const uint32_t common = __shfl_sync(~0u, bin, 0);
    Mass mass = bin == common ? pending : 0;
    for (int distance = kWarp / 2; distance > 0; distance /= 2) mass += __shfl_xor_sync(~0u, mass, distance);
    if (threadIdx.x % kWarp == 0 && mass) atomicAdd(&bins[common], mass);
    if (bin != common && pending) atomicAdd(&bins[bin], pending);
  }
};

struct Cut {
  uint32_t key;  // of the last token that is kept; those above are
  bool any;
};

// The last token, from the largest key down, such that kept(mass of those above it): kept is true up to some mass.
template <int N, class T, class MassOf, class Kept>
__device__ inline Cut last_kept(const T* row, int64_t width, MassOf mass_of, Kept kept) {
  SHARED(Mass, bins, kBins);
  constexpr int kEach = kBins / kWarp;
  const int lane = threadIdx.x % kWarp;
  uint32_t prefix = 0;
  Mass above = 0;
  for (int shift = 24; shift >= kLowest<T>; shift -= 8) {
    for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) bins[bin] = 0;
    __syncthreads();
    Histogram histogram{bins};
    of_tokens<N>(row, width, [&](float logit, int64_t) {
      const uint32_t key = ordered(logit);
      if (shift == 24 || key >> (shift + 8) == prefix) histogram.add(key >> shift & (kBins - 1), mass_of(logit));
    });
    histogram.finish();
    __syncthreads();
    Mass own[kEach], sum = 0;  // lane 0 has the highest bins
    for (int n = 0; n < kEach; n++) sum += own[n] = bins[kBins - 1 - (lane * kEach + n)];
    Mass before = above + warp_running(sum) - sum, before_found = 0;
    int found = -1;
    for (int n = 0; n < kEach; before += own[n++])
      if (own[n] && kept(before)) found = lane * kEach + n, before_found = before;
    const unsigned lanes = __ballot_sync(~0u, found >= 0);
    if (!lanes) return {0, false};
    int last = kWarp - 1;
    while (!(lanes >> last & 1)) last--;
    prefix = prefix << 8 | static_cast<uint32_t>(kBins - 1 - __shfl_sync(~0u, found, last));
    above = __shfl_sync(~0u, before_found, last);
    __syncthreads();  // before the bins are emptied
  }
  const uint32_t ones = (1u << kLowest<T>) - 1;  // below the last bit a negative number's key has ones
  return {prefix << kLowest<T> | (prefix >> (31 - kLowest<T>) ? 0 : ones), true};
}

struct Filters {
  double temperature;
  int64_t top_k;
  double top_p, min_p;
};

// A token's weight, and whether min-p leaves it.
template <class Probability>
__device__ inline void see(float logit, Probability probability, double floor, Mass& weight, bool& ample) {
  const double p = probability(logit);
  weight = static_cast<Mass>(p * kOne);
  ample = p >= floor;
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads, 1)
    draw(const T* logits, int64_t stride, const double* uniforms, int64_t width, Filters filters, int64_t* tokens,
         float* log_probs, float* kept_log_probs) {
  const T* row = logits + blockIdx.x * stride;
  const bool greedy = filters.temperature == 0.0;
  const double temperature = greedy ? 1.0 : filters.temperature;
  auto scaled = [&](float logit) { return temperature == 1.0 ? static_cast<double>(logit) : logit / temperature; };
  auto tell = [&](int64_t token, double log_prob, double kept) {
    tokens[blockIdx.x] = token;
    log_probs[blockIdx.x] = static_cast<float>(log_prob);
    kept_log_probs[blockIdx.x] = static_cast<float>(kept);
  };

  Mass first = 0;  // the largest logit's key, and of those the lowest token
  of_tokens<N>(row, width, [&](float logit, int64_t token) {
    const Mass rank = static_cast<Mass>(ordered(logit)) << 32 | static_cast<uint32_t>(~token);
    if (logit == logit && rank > first) first = rank;
  });
  first = block_largest(first);
  const int64_t most_likely = static_cast<uint32_t>(~first);
  const double top = first ? scaled(wide(row[most_likely])) : 0.0;
  auto share = [&](float logit) { return exp(scaled(logit) - top); };

  uint32_t lowest = 0;  // of what top-k keeps, with ties
  if (!greedy && filters.top_k > 0 && filters.top_k < width) {
    const Mass count = filters.top_k;
    lowest = last_kept<N>(row, width, [](float) { return Mass{1}; }, [&](Mass before) { return before < count; }).key;
  }
  double whole = 0.0, sum = 0.0;
  of_tokens<N>(row, width, [&](float logit, int64_t) {
    const double e = share(logit);
    whole += e;
    if (ordered(logit) >= lowest) sum += e;
  });
  whole = block_total(whole);
  sum = block_total(sum);
  if (!(whole < INFINITY)) {  // no distribution: NaN, +inf, nothing but -inf
    if (threadIdx.x == 0) tell(width - 1, NAN, NAN);
    return;
  }
  if (greedy) {
    if (threadIdx.x == 0) tell(most_likely, -log(whole), 0.0);
    return;
  }

  auto probability = [&](float logit) { return ordered(logit) < lowest ? 0.0 : share(logit) / sum; };
  auto weight_of = [&](float logit) { return static_cast<Mass>(probability(logit) * kOne); };
  Mass least = 0, ties_kept = 0;  // top-p: weights above `least` are kept, and so many of those that equal it
  bool ranked = false;            // whether it matters which of the equal ones come first
  if (filters.top_p < 1.0) {
    Mass total = 0;
    of_tokens<N>(row, width, [&](float logit, int64_t) { total += weight_of(logit); });
    const float most = static_cast<float>(filters.top_p) * static_cast<float>(block_total(total));
    auto kept = [&](Mass before) { return static_cast<float>(before) < most; };  // in fp32, as torch compares
    const Cut cut = last_kept<N>(row, width, weight_of, kept);
    least = cut.any ? weight_of(number(cut.key)) : ~Mass{0};
    Mass above = 0, ties = 0;
    of_tokens<N>(row, width, [&](float logit, int64_t) {
      const Mass weight = weight_of(logit);
      above += weight > least ? weight : 0;
      ties += weight == least;
    });
    above = block_total(above);
    ties = block_total(ties);
    for (Mass high = ties; ties_kept < high;) {  // the first that is not kept
      const Mass middle = ties_kept + (high - ties_kept) / 2;
      if (kept(above + middle * least)) ties_kept = middle + 1;
      else high = middle;
    }
    ranked = ties_kept < ties;
  }

  // What is kept of this thread's N tokens of a stretch, and its sum. `before`: ties in the stretches before.
  const double floor = filters.min_p * (1.0 / sum);
  auto kept_of = [&](int64_t start, Mass& before, Mass(&weights)[N]) {
    const int64_t token = start + int64_t{N} * threadIdx.x;
    bool ample[N];
    Mass ties = 0, kept_sum = 0;
#pragma unroll
    for (int n = 0; n < N; n++) weights[n] = 0, ample[n] = false;
    if (token + N <= width) {
      const Pack<T, N> read = load<T, N>(row + token);
#pragma unroll
      for (int n = 0; n < N; n++) see(wide(read.at[n]), probability, floor, weights[n], ample[n]);
    } else {
#pragma unroll
      for (int n = 0; n < N; n++)
        if (token + n < width) see(wide(row[token + n]), probability, floor, weights[n], ample[n]);
    }
    if (ranked) {
#pragma unroll
      for (int n = 0; n < N; n++) ties += weights[n] == least;
      const Place place = block_running(ties);
      ties = before + place.before;
      before += place.total;
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
      if (weights[n] < least || (ranked && weights[n] == least && ties++ >= ties_kept) || !ample[n]) weights[n] = 0;
      kept_sum += weights[n];
    }
    return kept_sum;
  };
  const int64_t stretch = int64_t{N} * blockDim.x;
  Mass weights[N], total = 0, ties = 0, running = 0;
  for (int64_t start = 0; start < width; start += stretch) total += kept_of(start, ties, weights);
  total = block_total(total);
  if (total == 0) {  // top_p is 0 in fp32
    if (threadIdx.x == 0) tell(0, scaled(wide(row[0])) - top - log(whole), NAN);
    return;
  }
  const double uniform = uniforms[blockIdx.x];
  Mass target = uniform > 0.0 ? static_cast<Mass>(uniform * static_cast<double>(total)) : 0;
  if (target >= total) target = total - 1;  // a uniform next to 1 may round up
  ties = 0;
  for (int64_t start = 0; start < width; start += stretch) {
    const Mass mine = kept_of(start, ties, weights);
    const Place place = block_running(mine);
    const Mass from = running + place.before;
    running += place.total;
    if (from <= target && target < from + mine) {
      Mass end = from;
      for (int n = 0; n < N; n++) {
        end += weights[n];
        if (target >= end) continue;
        const int64_t token = start + int64_t{N} * threadIdx.x + n;
        const double share_of_kept = static_cast<double>(weights[n]) / static_cast<double>(total);
        tell(token, scaled(wide(row[token])) - top - log(whole), log(share_of_kept));
        break;
      }
    }
    if (running > target) return;
  }
}

}  // namespace sampling

void sampling_draw(Stream stream, Tensor logits, Tensor uniforms, double temperature, int64_t top_k, double top_p,
                   double min_p, Tensor tokens, Tensor log_probs, Tensor kept_log_probs) {
  check_float("logits", logits);
  if (logits.dim != 2) refuse("logits %s has %d dimensions, not 2", shape_of(logits).c_str(), logits.dim);
  const int64_t rows = logits.size(0), width = logits.size(1), stride = logits.strides[0];
  if (width < 1 || width > 2147483647 || rows > 2147483647)
    refuse("logits %s: rows of 1 to 2^31 - 1 are needed, and no more of them", shape_of(logits).c_str());
  if (rows > 0 && width > 1 && logits.strides[1] != 1)
    refuse("logits %s has stride %lld in dimension 1: rows must be contiguous", shape_of(logits).c_str(),
           (long long)logits.strides[1]);
  if (!(temperature >= 0)) refuse("temperature is %g: it must not be negative", temperature);
  if (top_k < 0) refuse("top_k is %lld: it must not be negative", (long long)top_k);
  if (!(top_p > 0 && top_p <= 1)) refuse("top_p is %g, not in (0, 1]", top_p);
  if (!(min_p >= 0 && min_p <= 1)) refuse("min_p is %g, not in [0, 1]", min_p);
  check("uniforms", uniforms, kDouble, rows);
  check("tokens", tokens, kInt64, rows);
  check("log_probs", log_probs, kFloat, rows);
  check("kept_log_probs", kept_log_probs, kFloat, rows);
  if (rows == 0) return;
  of_dtype(logits.dtype, [&](auto t) {
    using T = decltype(t);
    auto go = [&](auto n) {
      const auto kernel = sampling::draw<T, decltype(n)::value>;
      const int threads = width <= sampling::kFewTokens ? sampling::kFewThreads : sampling::kThreads;
      const sampling::Filters filters{temperature, top_k, top_p, min_p};
      LAUNCH(kernel, static_cast<unsigned>(rows), static_cast<unsigned>(threads), 0, stream, logits.as<T>(), stride,
             uniforms.as<double>(), width, filters, tokens.as<int64_t>(), log_probs.as<float>(),
             kept_log_probs.as<float>());
    };
    if (aligned(logits.data) && (rows == 1 || stride % kWide<T> == 0))
      go(std::integral_constant<int, kWide<T>>{});
    else
      go(std::integral_constant<int, 1>{});
  });
}

OP(sampling_draw,
   "sampling_draw(Tensor logits, Tensor uniforms, float temperature, int top_k, float top_p, float min_p, "
   "Tensor(a!) tokens, Tensor(b!) log_probs, Tensor(c!) kept_log_probs) -> ()")
