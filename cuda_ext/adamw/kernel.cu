// AdamW over many tensors a launch, and the norm of them all without asking the host.
//
// Pointers travel as kernel arguments, kMostTensors a launch: nothing is copied to the card, a CUDA graph holds them,
// and no table goes stale when an engine moves its shards. The blocks of tensors follow each other; a block finds its
// own by bisection, so a tensor of any size takes part in one launch.
//
// Every operation rounds once, by name: the bits are the definition's, element by element.
// sass adamw_elements<.*>: LDG.E.128 STG.E.128
// sass adamw_squares<.*>: LDG.E.128 SHFL.BFLY
#include "device/device.cuh"

constexpr int kMostTensors = 64, kThreads = 256, kChunk = 4096;  // of elements a block; the table stays below 4 KiB
constexpr int kMostParts = 1024, kLastThreads = 1024;            // partial sums of a tensor; threads that add all up

template <class Item>
struct AdamWTable {
  Item at[kMostTensors];
  int first[kMostTensors];  // block of each tensor
  int length = 0, blocks = 0;

  // The tensor of a block.
  __device__ int of_block(int block) const {
    int low = 0, high = length;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first[middle] <= block) low = middle;
      else high = middle;
    }
    return low;
  }

  bool takes(int64_t more) const { return length < kMostTensors && blocks + more <= 2147483647; }

  void add(const Item& item, int64_t more) {
    at[length] = item;
    first[length++] = blocks;
    blocks += static_cast<int>(more);
  }
};

struct AdamWItem {
  float* param;
  const void* grad;
  float *average, *square;
  __nv_bfloat16* copy;
  int64_t numel;
};

struct AdamWFactors {  // as in reference.py
  float beta1, rest1, beta2, rest2, root, eps, rate, kept, unscale;
};

static_assert(sizeof(AdamWTable<AdamWItem>) + sizeof(AdamWFactors) + 16 <= 4096, "a kernel's arguments");

template <class G>
__global__ void __launch_bounds__(kThreads)
    adamw_elements(AdamWTable<AdamWItem> table, AdamWFactors by, const float* clip, const float* non_finite) {
  if (non_finite && *non_finite != 0.0f) return;
  const int tensor = table.of_block(blockIdx.x);
  const AdamWItem item = table.at[tensor];
  const G* grads = static_cast<const G*>(item.grad);
  const float clipped = clip ? *clip : 1.0f;
  auto part = [&](auto count, int64_t at) {
    constexpr int N = decltype(count)::value;
    Pack<float, N> p = load<float, N>(item.param + at), m = load<float, N>(item.average + at),
                   v = load<float, N>(item.square + at);
    const Pack<G, N> gs = load<G, N>(grads + at);
    Pack<__nv_bfloat16, N> copies;
    for (int n = 0; n < N; n++) {
      const float g = __fmul_rn(__fmul_rn(wide(gs.at[n]), by.unscale), clipped);
      m.at[n] = __fadd_rn(__fmul_rn(m.at[n], by.beta1), __fmul_rn(g, by.rest1));
      v.at[n] = __fadd_rn(__fmul_rn(v.at[n], by.beta2), __fmul_rn(__fmul_rn(g, g), by.rest2));
      const float divisor = __fadd_rn(__fdiv_rn(__fsqrt_rn(v.at[n]), by.root), by.eps);
      const float update = __fmul_rn(__fdiv_rn(m.at[n], divisor), by.rate);
      p.at[n] = __fsub_rn(__fmul_rn(p.at[n], by.kept), update);
      copies.at[n] = narrow<__nv_bfloat16>(p.at[n]);
    }
    store(item.param + at, p);
    store(item.average + at, m);
    store(item.square + at, v);
    if (item.copy) store(item.copy + at, copies);
  };

  const int64_t start = static_cast<int64_t>(blockIdx.x - table.first[tensor]) * kChunk;
  const int64_t end = start + kChunk < item.numel ? start + kChunk : item.numel;
  bool packs = reinterpret_cast<uintptr_t>(item.grad) % (4 * sizeof(G)) == 0 &&
               reinterpret_cast<uintptr_t>(item.copy) % (4 * sizeof(__nv_bfloat16)) == 0;
  packs = packs && aligned(item.param) && aligned(item.average) && aligned(item.square);
  const int64_t whole = packs ? start + (end - start) / 4 * 4 : start;
  for (int64_t at = start + 4 * threadIdx.x; at < whole; at += 4 * kThreads) part(std::integral_constant<int, 4>{}, at);
  for (int64_t at = whole + threadIdx.x; at < end; at += kThreads) part(std::integral_constant<int, 1>{}, at);
}

struct AdamWPart {
  const void* data;
  int64_t numel, part;  // elements a partial sum
  float* sums;
};

// Sums of squares of a tensor's parts, whose number and bounds its size alone settles.
template <class T>
__global__ void __launch_bounds__(kThreads) adamw_squares(AdamWTable<AdamWPart> table, float unscale) {
  constexpr int N = kWide<T>;
  const int tensor = table.of_block(blockIdx.x), part = blockIdx.x - table.first[tensor];
  const AdamWPart item = table.at[tensor];
  const T* data = static_cast<const T*>(item.data);
  const int64_t start = part * item.part < item.numel ? part * item.part : item.numel;
  const int64_t end = start + item.part < item.numel ? start + item.part : item.numel;
  const int64_t whole = aligned(data) ? start + (end - start) / N * N : start;
  float sum = 0.0f;
  auto add = [&](T value) {
    const float x = wide(value) * unscale;
    sum = fmaf(x, x, sum);
  };
#pragma unroll 4
  for (int64_t at = start + N * threadIdx.x; at < whole; at += N * kThreads) {
    const Pack<T, N> pack = load<T, N>(data + at);
    for (int n = 0; n < N; n++) add(pack.at[n]);
  }
  for (int64_t at = whole + threadIdx.x; at < end; at += kThreads) add(data[at]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) item.sums[part] = sum;
}

__global__ void __launch_bounds__(kLastThreads)
    adamw_total(const float* sums, int64_t count, float* norm, float* non_finite) {
  float sum = 0.0f;
  for (int64_t at = threadIdx.x; at < count; at += kLastThreads) sum += sums[at];
  sum = block_sum(sum);
  if (threadIdx.x > 0) return;
  *norm = __fsqrt_rn(sum);
  *non_finite = sum < INFINITY ? 0.0f : 1.0f;
}

// Refuses a list that does not fit the parameters, tensor by tensor.
static void adamw_check(const char* list, const Tensors& tensors, int32_t dtype, const Tensors& params) {
  if (tensors.length != params.length)
    refuse("%s are %lld tensors beside %lld params", list, (long long)tensors.length, (long long)params.length);
  for (int64_t i = 0; i < params.length; i++) {
    const std::string name = std::string(list) + "[" + std::to_string(i) + "]";
    if (!same_sizes(tensors.at[i], params.at[i]))
      refuse("%s %s is not of its parameter's shape %s", name.c_str(), shape_of(tensors.at[i]).c_str(),
             shape_of(params.at[i]).c_str());
    check(name.c_str(), tensors.at[i], dtype, params.at[i].numel());
  }
}

void adamw_update(Stream stream, Tensors params, Tensors grads, Tensors averages, Tensors squares, Tensors copies,
                  double beta1, double rest1, double beta2, double rest2, double root, double eps, double rate,
                  double kept, double unscale, Optional clip, Optional non_finite) {
  if (params.length == 0) return;
  if (grads.length == 0) refuse("grads are 0 tensors beside %lld params", (long long)params.length);
  const int32_t dtype = grads.at[0].dtype;
  check_float("grads[0]", grads.at[0]);
  adamw_check("params", params, kFloat, params);
  adamw_check("grads", grads, dtype, params);
  adamw_check("exp_avgs", averages, kFloat, params);
  adamw_check("exp_avg_sqs", squares, kFloat, params);
  if (copies.length) adamw_check("copies", copies, kBFloat16, params);
  if (clip.given()) check("clip", clip, kFloat, 1);
  if (non_finite.given()) check("non_finite", non_finite, kFloat, 1);

  const AdamWFactors by{(float)beta1, (float)rest1, (float)beta2, (float)rest2,  (float)root,
                        (float)eps,   (float)rate,  (float)kept,  (float)unscale};
  of_dtype(dtype, [&](auto g) {
    AdamWTable<AdamWItem> table;
    const auto go = [&] {
      const auto kernel = adamw_elements<decltype(g)>;
      if (table.blocks > 0)
        LAUNCH(kernel, static_cast<unsigned>(table.blocks), kThreads, 0, stream, table, by,
               clip.given() ? clip.as<float>() : nullptr, non_finite.given() ? non_finite.as<float>() : nullptr);
      table.length = table.blocks = 0;
    };
    for (int64_t i = 0; i < params.length; i++) {
      const int64_t numel = params.at[i].numel(), blocks = blocks_of(numel, kChunk);
      if (!table.takes(blocks)) go();
      if (numel > 0)
        table.add({params.at[i].as<float>(), grads.at[i].data, averages.at[i].as<float>(), squares.at[i].as<float>(),
                   copies.length ? copies.at[i].as<__nv_bfloat16>() : nullptr, numel},
                  blocks);
    }
    go();
  });
}

// As many partial sums as a tensor has chunks, at most kMostParts: `parts` in op.py.
static int64_t adamw_parts(int64_t numel) {
  const int64_t chunks = (numel + kChunk - 1) / kChunk;
  return chunks < kMostParts ? chunks : kMostParts;
}

void adamw_norm(Stream stream, Tensors tensors, double unscale, Tensor sums, Tensor norm, Tensor non_finite) {
  int64_t count = 0;
  for (int64_t i = 0; i < tensors.length; i++) {
    const std::string name = "tensors[" + std::to_string(i) + "]";
    check_float(name.c_str(), tensors.at[i]);
    check_contiguous(name.c_str(), tensors.at[i]);
    count += adamw_parts(tensors.at[i].numel());
  }
  check("sums", sums, kFloat, count);
  check("norm", norm, kFloat, 1);
  check("non_finite", non_finite, kFloat, 1);

  for (int32_t dtype : {kFloat, kBFloat16, kHalf})
    of_dtype(dtype, [&](auto t) {
      AdamWTable<AdamWPart> table;
      const auto go = [&] {
        const auto kernel = adamw_squares<decltype(t)>;
        if (table.blocks > 0)
          LAUNCH(kernel, static_cast<unsigned>(table.blocks), kThreads, 0, stream, table, static_cast<float>(unscale));
        table.length = table.blocks = 0;
      };
      float* place = sums.as<float>();
      for (int64_t i = 0; i < tensors.length; place += adamw_parts(tensors.at[i++].numel())) {
        const int64_t numel = tensors.at[i].numel(), parts = adamw_parts(numel);
        if (tensors.at[i].dtype != dtype || numel == 0) continue;
        if (!table.takes(parts)) go();
        const int64_t part = ((numel + parts - 1) / parts + 7) / 8 * 8;  // so that each begins on 16 bytes
        table.add({tensors.at[i].data, numel, part, place}, parts);
      }
      go();
    });
  LAUNCH(adamw_total, 1u, kLastThreads, 0, stream, sums.as<float>(), count, norm.as<float>(), non_finite.as<float>());
}

OP(adamw_update,
   "adamw_update(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
   "Tensor(d!)[] copies, float beta1, float rest1, float beta2, float rest2, float root, float eps, float rate, "
   "float kept, float unscale, Tensor? clip, Tensor? non_finite) -> ()")
OP(adamw_norm,
   "adamw_norm(Tensor[] tensors, float unscale, Tensor(a!) sums, Tensor(b!) norm, Tensor(c!) non_finite) -> ()")
