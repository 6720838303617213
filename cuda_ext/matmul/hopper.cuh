// What a card of compute capability 9.0 adds, a function an instruction: mbarriers, tiles brought by TMA, products of a
// warpgroup (wgmma). Addresses of shared memory are numbers here, as the instructions take them. The emulator has the
// same functions (emulator/hopper.h). Left out: clusters and multicast, stores by TMA, swizzles other than 128 bytes.
#pragma once

#include "device/device.cuh"

#if defined(EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ON_HOPPER  // kernels that need it are empty on other cards, where their host functions refuse
#endif

#ifdef EMULATOR
#include "emulator/hopper.h"
namespace hopper = emulator::hopper;
#else
#include <cuda.h>

namespace hopper {

inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, which, device);
  if (error != cudaSuccess) refuse("the card does not say what it is: %s", cudaGetErrorString(error));
  return value;
}
inline unsigned multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
inline int capability() {  // 10 major + minor
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A phase of an mbarrier ends when so many threads have arrived and all bytes that they announced have landed.
__device__ inline void mbarrier_init(uint32_t barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the inits, by their thread: TMA sees them; other threads do after a barrier.
__device__ inline void mbarrier_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void mbarrier_arrive(uint32_t barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Phases are told apart by their parity: the first is 0, and one of parity 1 counts as ended before it.
__device__ inline void mbarrier_wait(uint32_t barrier, unsigned parity) {
  unsigned ended;
  do {
    asm volatile(
        "{ .reg .pred ended; mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2; selp.u32 %0, 1, 0, ended; }"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!ended);
}

using TensorMap = CUtensorMap;  // a matrix in global memory and the box of it that one instruction brings
constexpr int kBoxBytes = 128;  // a box's row, which is what the swizzle spans

// Boxes of `box_rows` rows of 128 bytes each. The driver's own function makes the map, and is asked for by name: a
// library that needed libcuda could not load where no driver is.
template <class T>
TensorMap tensor_map(const T* data, int64_t rows, int64_t columns, int box_rows) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult how;
    const char* name = "cuTensorMapEncodeTiled";
    cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &how);
    if (error != cudaSuccess || !found) refuse("this driver has no %s", name);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  constexpr bool kHalfType = std::is_same_v<T, __half>;
  const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)}, pitch[] = {columns * sizeof(T)};
  const cuuint32_t box[] = {kBoxBytes / sizeof(T), cuuint32_t(box_rows)}, steps[] = {1, 1};
  TensorMap map;
  const CUresult result = encode(
      &map, kHalfType ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<T*>(data),
      sizes, pitch, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    refuse("no tensor map of [%lld,%lld] at %p: error %d", (long long)rows, (long long)columns, (const void*)data,
           static_cast<int>(result));
  return map;
}

// One thread asks for a box; zeros come for what lies outside the matrix, and count as bytes that landed.
template <class T>
__device__ inline void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      :
      : "r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `pending` of this warp's groups are unfinished.
template <int pending>
__device__ inline void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"); }

// Until all are done: the sums may be read. The compiler must not move a read of them before the wait.
template <int kNumbers>
__device__ inline void wgmma_wait_all(float (&d)[kNumbers]) {
  wgmma_wait<0>();
#pragma unroll
  for (int n = 0; n < kNumbers; n++) asm volatile("" : "+f"(d[n])::"memory");
}

// An instruction names each of its registers, and takes each as an operand.
#define TWO(tens, a, b) "%" #tens #a ", %" #tens #b ", "
#define TEN(tens) TWO(tens, 0, 1) TWO(tens, 2, 3) TWO(tens, 4, 5) TWO(tens, 6, 7) TWO(tens, 8, 9)
#define NAMES_64 TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60, %61, %62, %63"
#define NAMES_120 TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11)
#define NAMES_128 NAMES_120 "%120, %121, %122, %123, %124, %125, %126, %127"
#define D4(d, n) "+f"(d[n]), "+f"(d[n + 1]), "+f"(d[n + 2]), "+f"(d[n + 3])
#define D16(d, n) D4(d, n), D4(d, n + 4), D4(d, n + 8), D4(d, n + 12)
#define D64(d, n) D16(d, n), D16(d, n + 16), D16(d, n + 32), D16(d, n + 48)
#define WGMMA(shape, type, names, at_a, at_b, ...) \
  asm volatile("{ .reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned." shape ".f32." type "." type \
               " {" names "}, " at_a ", " at_b ", add, 1, 1, 0, 1; }" : __VA_ARGS__ : "l"(a), "l"(b))

// d[64, N] += a[64, 16] b[16, N] for N of twice as many columns as a lane holds numbers. `a` lies along k, `b` along n.
template <class T>
__device__ inline void wgmma(float (&d)[64], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, __half>)
    WGMMA("m64n128k16", "f16", NAMES_64, "%64", "%65", D64(d, 0));
  else
    WGMMA("m64n128k16", "bf16", NAMES_64, "%64", "%65", D64(d, 0));
}
template <class T>
__device__ inline void wgmma(float (&d)[128], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, __half>)
    WGMMA("m64n256k16", "f16", NAMES_128, "%128", "%129", D64(d, 0), D64(d, 64));
  else
    WGMMA("m64n256k16", "bf16", NAMES_128, "%128", "%129", D64(d, 0), D64(d, 64));
}

// A warpgroup's share of the registers, by all of its threads.
template <int registers>
__device__ inline void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers)); }
template <int registers>
__device__ inline void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers)); }

#undef TWO
#undef TEN
#undef NAMES_64
#undef NAMES_120
#undef NAMES_128
#undef D4
#undef D16
#undef D64
#undef WGMMA

}  // namespace hopper
#endif

inline void check_hopper(const char* rung, int capability) {
  if (capability != 90)
    refuse("rung %s needs a card of compute capability 9.0, and this one has %d.%d", rung, capability / 10,
           capability % 10);
}
