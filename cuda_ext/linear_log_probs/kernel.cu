// Log-probabilities, entropy and log-sum-exp of rows of logits in one read of them, and their gradient in their place.
// With z = cap tanh(logit / cap) / temperature, p = softmax(z), H = -sum p log p, t a row's target:
//
//     dz_j = dlog_prob (1[j = t] - p_j) - dentropy p_j (log p_j + H) + dlse p_j
//
// Logits are as a GEMM rounds them; the target's is not: it is a dot product in fp32, and takes the rounded one's place
// in every sum. So log_prob <= 0 exactly, and a ratio of two policies is not made of the rounding of bf16.
//
// A block takes a row, always of kThreads threads: in which order a row is summed depends on its length alone.
// sass linear_log_probs::(read|change|dot)<.*, [48].*>: LDG.E.128
// sass linear_log_probs::change<.*, [48]>: STG.E.128
#include <initializer_list>
#include <type_traits>

#include "device/device.cuh"

namespace linear_log_probs {

constexpr int kThreads = 256, kAhead = 4;  // packs that a thread has under way at once
constexpr float kNegligible = -1000.0f;    // e to this is 0, and times this as well

// From a logit to z, and back with a gradient.
struct Scale {
  float inverse_temperature, cap;

  __device__ float z(float logit) const {
    return (cap > 0.0f ? cap * tanhf(logit / cap) : logit) * inverse_temperature;
  }
  __device__ float back(float dz, float logit) const {
    dz *= inverse_temperature;
    if (cap <= 0.0f) return dz;
    const float tangent = tanhf(logit / cap);
    return dz * (1.0f - tangent * tangent);
  }
};

// Of what was read: the largest z, the sum of e = exp(z - largest), the sum of e (z - largest).
struct Running {
  float largest = -INFINITY, total = 0.0f, moment = 0.0f;

  __device__ void move_to(float larger) {
    const float shift = largest == -INFINITY ? 0.0f : largest - larger, factor = expf(largest - larger);
    moment = factor * (moment + shift * total);
    total *= factor;
    largest = larger;
  }
  __device__ void add(float z) {
    const float below = z - largest;
    if (z == -INFINITY || below < kNegligible) return;  // 0 log 0 = 0
    const float weight = expf(below);
    total += weight;
    moment += weight * below;
  }
};

// The columns of this thread, in packs of N and, at the row's end, one by one; body(pack, column) may change them.
template <int N, class T, class Body>
__device__ inline void of_columns(T* row, int64_t width, Body body) {
  const int64_t packs = width / N;
  for (int64_t first = threadIdx.x; first < packs; first += kAhead * kThreads) {
    Pack<std::remove_const_t<T>, N> ahead[kAhead];
#pragma unroll
    for (int n = 0; n < kAhead; n++)
      if (first + n * kThreads < packs) ahead[n] = load<std::remove_const_t<T>, N>(row + (first + n * kThreads) * N);
#pragma unroll
    for (int n = 0; n < kAhead; n++)
      if (first + n * kThreads < packs) body(ahead[n], (first + n * kThreads) * N);
  }
  const int64_t column = packs * N + threadIdx.x;
  if (column < width) {
    auto last = load<std::remove_const_t<T>, 1>(row + column);
    body(last, column);
  }
}

template <class P>
constexpr int kCount = sizeof(P::at) / sizeof(P::at[0]);

// A block's largest value, in every thread.
__device__ inline float block_largest(float value) {
  SHARED(float, of_warps, kThreads / kWarp);
  value = warp_max(value);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int warp = 0; warp < kThreads / kWarp; warp++) value = fmaxf(value, of_warps[warp]);
  return value;
}

// Where kPartial, the row is a shard: outputs are largest, total, moment and z of the target, for others to merge.
// Else they are log_prob, entropy, largest and log(total).
template <class T, int N, bool kPartial>
__global__ void __launch_bounds__(kThreads)
    read(const T* logits, int64_t stride, const float* bias, const int64_t* targets,
                          const float* target_logits, Scale scale, int64_t width, float* first, float* second,
                          float* third, float* fourth) {
  const int64_t row = blockIdx.x, target = targets[row];
  const float of_target = target_logits[row];
  Running running;
  of_columns<N>(logits + row * stride, width, [&](auto& pack, int64_t column) {
    constexpr int count = kCount<std::remove_reference_t<decltype(pack)>>;
    float z[count], top = running.largest;
#pragma unroll
    for (int n = 0; n < count; n++) {
      const float logit = wide(pack.at[n]) + (bias ? bias[column + n] : 0.0f);
      z[n] = scale.z(column + n == target ? of_target : logit);
      top = fmaxf(top, z[n]);
    }
    if (top > running.largest) running.move_to(top);
#pragma unroll
    for (int n = 0; n < count; n++) running.add(z[n]);
  });
  const float largest = block_largest(running.largest);
  if (largest > running.largest) running.move_to(largest);
  const float total = block_sum(running.total), moment = block_sum(running.moment);
  if (threadIdx.x > 0) return;
  const float z = scale.z(of_target), log_total = logf(total);
  first[row] = kPartial ? largest : z - largest - log_total;
  second[row] = kPartial ? total : log_total - moment / total;
  third[row] = kPartial ? moment : largest;
  fourth[row] = kPartial ? z : log_total;
}

// The gradient in the place of the logits; 0 from `vocabulary` on.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    change(T* logits, int64_t stride, const float* bias, const int64_t* targets,
                            const float* target_logits, const float* largest, const float* log_total,
                            const float* entropy, const float* dlog_prob, const float* dentropy, const float* dlse,
                            Scale scale, int64_t vocabulary, int64_t width) {
  const int64_t row = blockIdx.x, target = targets[row];
  const float of_target = target_logits[row], top = largest[row], spread = log_total[row];
  const float g = dlog_prob[row], h = dentropy[row], l = dlse[row], level = entropy[row];
  T* mine = logits + row * stride;
  of_columns<N>(mine, width, [&](auto& pack, int64_t column) {
    constexpr int count = kCount<std::remove_reference_t<decltype(pack)>>;
#pragma unroll
    for (int n = 0; n < count; n++) {
      const int64_t at = column + n;
      float gradient = 0.0f;
      if (at < vocabulary) {
        const float logit = at == target ? of_target : wide(pack.at[n]) + (bias ? bias[at] : 0.0f);
        const float log_p = scale.z(logit) - top - spread, p = expf(log_p);
        const float dz = (at == target ? g : 0.0f) + (p == 0.0f ? 0.0f : p * (l - g - h * (log_p + level)));
        gradient = scale.back(dz, logit);
      }
      pack.at[n] = narrow<T>(gradient);
    }
    store(mine + column, pack);
  });
}

// A warp a row: hidden . weight[target] + bias[target] in fp32; `outside` where the target is none of the vocabulary.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    dot(const T* hidden, const T* weight, const float* bias, const int64_t* targets, float outside,
                         int64_t vocabulary, int64_t rows, int64_t width, float* out) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (row >= rows) return;
  const int64_t target = targets[row];
  const bool inside = target >= 0 && target < vocabulary;
  float sum = 0.0f;
  for (int64_t at = threadIdx.x % kWarp * N; inside && at < width; at += kWarp * N) {
    const Pack<T, N> a = load<T, N>(hidden + row * width + at), b = load<T, N>(weight + target * width + at);
#pragma unroll
    for (int n = 0; n < N; n++) sum += wide(a.at[n]) * wide(b.at[n]);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) out[row] = inside ? sum + (bias ? bias[target] : 0.0f) : outside;
}

struct Rows {  // what a call is about, checked
  int64_t rows, width, stride, vocabulary;
  Scale scale;

  Rows(const Tensor& logits, const Tensor& bias, const Tensor& targets, double temperature, double cap,
       int64_t vocabulary)
      : rows(0), width(0), stride(0), vocabulary(vocabulary),
        scale{static_cast<float>(1.0 / temperature), static_cast<float>(cap)} {
    check_float("logits", logits);
    if (logits.dim != 2) refuse("logits %s has %d dimensions, not 2", shape_of(logits).c_str(), logits.dim);
    rows = logits.size(0), width = logits.size(1), stride = logits.strides[0];
    if (rows > 2147483647) refuse("logits %s has more rows than 2^31 - 1", shape_of(logits).c_str());
    if (rows > 0 && ((width > 1 && logits.strides[1] != 1) || (rows > 1 && stride < width)))
      refuse("logits %s has strides %lld and %lld: rows must be contiguous and apart", shape_of(logits).c_str(),
             (long long)stride, (long long)logits.strides[1]);
    if (vocabulary < 1 || vocabulary > width)
      refuse("vocab_size is %lld, not 1 to the %lld columns of logits", (long long)vocabulary, (long long)width);
    if (!(temperature > 0)) refuse("temperature is %g: it must be above 0", temperature);
    if (!(cap >= 0)) refuse("soft_cap is %g: it must be above 0, or 0 for none", cap);
    if (bias.given()) check("bias", bias, kFloat, width);
    check("targets", targets, kInt64, rows);
  }

  void check_rows(std::initializer_list<std::pair<const char*, const Tensor*>> tensors) const {
    for (auto [name, tensor] : tensors) check(name, *tensor, kFloat, rows);
  }

  // Calls body(T{}, N) with 16 bytes' worth of numbers, if rows begin on 16 bytes, else with 1.
  template <class Body>
  void of_packs(const Tensor& logits, Body body) const {
    of_dtype(logits.dtype, [&](auto t) {
      using T = decltype(t);
      if (aligned(logits.data) && (rows == 1 || stride % kWide<T> == 0))
        body(t, std::integral_constant<int, kWide<T>>{});
      else
        body(t, std::integral_constant<int, 1>{});
    });
  }
};

template <bool kPartial>
void launch_read(Stream stream, const Rows& of, const Tensor& logits, const Tensor& bias, const Tensor& targets,
                 const Tensor& target_logits, std::initializer_list<const Tensor*> outputs) {
  if (of.rows == 0) return;
  of.of_packs(logits, [&](auto t, auto n) {
    using T = decltype(t);
    const auto kernel = read<T, decltype(n)::value, kPartial>;
    float* out[4];
    int at = 0;
    for (const Tensor* output : outputs) out[at++] = output->as<float>();
    LAUNCH(kernel, static_cast<unsigned>(of.rows), kThreads, 0, stream, logits.as<T>(), of.stride,
           bias.given() ? bias.as<float>() : nullptr, targets.as<int64_t>(), target_logits.as<float>(), of.scale,
           of.vocabulary, out[0], out[1], out[2], out[3]);
  });
}

}  // namespace linear_log_probs

using linear_log_probs::Rows;

void linear_log_probs_rows(Stream stream, Tensor logits, Optional bias, Tensor targets, Tensor target_logits,
                           double temperature, double soft_cap, int64_t vocab_size, Tensor log_probs, Tensor entropy,
                           Tensor largest, Tensor log_total) {
  const Rows of(logits, bias, targets, temperature, soft_cap, vocab_size);
  of.check_rows({{"target_logits", &target_logits}, {"log_probs", &log_probs}, {"entropy", &entropy},
                 {"largest", &largest}, {"log_total", &log_total}});
  linear_log_probs::launch_read<false>(stream, of, logits, bias, targets, target_logits,
                                       {&log_probs, &entropy, &largest, &log_total});
}

void linear_log_probs_shard(Stream stream, Tensor logits, Optional bias, Tensor targets, Tensor target_logits,
                            double temperature, double soft_cap, int64_t vocab_size, Tensor largest, Tensor total,
                            Tensor moment, Tensor target_z) {
  const Rows of(logits, bias, targets, temperature, soft_cap, vocab_size);
  of.check_rows({{"target_logits", &target_logits}, {"largest", &largest}, {"total", &total}, {"moment", &moment},
                 {"target_z", &target_z}});
  linear_log_probs::launch_read<true>(stream, of, logits, bias, targets, target_logits,
                                      {&largest, &total, &moment, &target_z});
}

void linear_log_probs_gradient(Stream stream, Tensor logits, Optional bias, Tensor targets, Tensor target_logits,
                               Tensor largest, Tensor log_total, Tensor entropy, Tensor dlog_probs, Tensor dentropy,
                               Tensor dlse, double temperature, double soft_cap, int64_t vocab_size) {
  const Rows of(logits, bias, targets, temperature, soft_cap, vocab_size);
  of.check_rows({{"target_logits", &target_logits}, {"largest", &largest}, {"log_total", &log_total},
                 {"entropy", &entropy}, {"dlog_probs", &dlog_probs}, {"dentropy", &dentropy}, {"dlse", &dlse}});
  if (of.rows == 0) return;
  of.of_packs(logits, [&](auto t, auto n) {
    using T = decltype(t);
    const auto kernel = linear_log_probs::change<T, decltype(n)::value>;
    LAUNCH(kernel, static_cast<unsigned>(of.rows), linear_log_probs::kThreads, 0, stream, logits.as<T>(), of.stride,
           bias.given() ? bias.as<float>() : nullptr, targets.as<int64_t>(), target_logits.as<float>(),
           largest.as<float>(), log_total.as<float>(), entropy.as<float>(), dlog_probs.as<float>(),
           dentropy.as<float>(), dlse.as<float>(), of.scale, of.vocabulary, of.width);
  });
}

void linear_log_probs_target(Stream stream, Tensor hidden, Tensor weight, Optional bias, Tensor targets,
                             double outside, int64_t vocab_size, Tensor target_logits) {
  check_float("hidden", hidden);
  if (hidden.dim != 2 || weight.dim != 2 || hidden.size(1) != weight.size(1))
    refuse("hidden %s and weight %s must be [M,D] and [V,D]", shape_of(hidden).c_str(), shape_of(weight).c_str());
  const int64_t rows = hidden.size(0), width = hidden.size(1);
  if (rows > 2147483647) refuse("hidden %s has more rows than 2^31 - 1", shape_of(hidden).c_str());
  check("hidden", hidden, hidden.dtype, rows * width);
  check("weight", weight, hidden.dtype, weight.size(0) * width);
  if (bias.given()) check("bias", bias, kFloat, weight.size(0));
  check("targets", targets, kInt64, rows);
  check("target_logits", target_logits, kFloat, rows);
  if (vocab_size < 1 || vocab_size > weight.size(0))
    refuse("vocab_size is %lld, not 1 to the %lld rows of weight", (long long)vocab_size, (long long)weight.size(0));
  if (rows == 0) return;
  of_dtype(hidden.dtype, [&](auto t) {
    using T = decltype(t);
    auto go = [&](auto n) {
      const auto kernel = linear_log_probs::dot<T, decltype(n)::value>;
      constexpr int kThreads = linear_log_probs::kThreads, kRows = kThreads / kWarp;
      LAUNCH(kernel, static_cast<unsigned>((rows + kRows - 1) / kRows), kThreads, 0, stream, hidden.as<T>(),
             weight.as<T>(), bias.given() ? bias.as<float>() : nullptr, targets.as<int64_t>(),
             static_cast<float>(outside), vocab_size, rows, width, target_logits.as<float>());
    };
    if (aligned(hidden.data) && aligned(weight.data) && width % kWide<T> == 0)
      go(std::integral_constant<int, kWide<T>>{});
    else
      go(std::integral_constant<int, 1>{});
  });
}

OP(linear_log_probs_rows,
   "linear_log_probs_rows(Tensor logits, Tensor? bias, Tensor targets, Tensor target_logits, float temperature, "
   "float soft_cap, int vocab_size, Tensor(a!) log_probs, Tensor(b!) entropy, Tensor(c!) largest, "
   "Tensor(d!) log_total) -> ()")
OP(linear_log_probs_shard,
   "linear_log_probs_shard(Tensor logits, Tensor? bias, Tensor targets, Tensor target_logits, float temperature, "
   "float soft_cap, int vocab_size, Tensor(a!) largest, Tensor(b!) total, Tensor(c!) moment, "
   "Tensor(d!) target_z) -> ()")
OP(linear_log_probs_gradient,
   "linear_log_probs_gradient(Tensor(a!) logits, Tensor? bias, Tensor targets, Tensor target_logits, Tensor largest, "
   "Tensor log_total, Tensor entropy, Tensor dlog_probs, Tensor dentropy, Tensor dlse, float temperature, "
   "float soft_cap, int vocab_size) -> ()")
OP(linear_log_probs_target,
   "linear_log_probs_target(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float outside, "
   "int vocab_size, Tensor(a!) target_logits) -> ()")
