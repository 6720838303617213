// What every kernel includes: CUDA's own words where nvcc compiles, the emulator's where a C++ compiler does
// (-DEMULATOR), and on top of either the few things that all kernels share: sixteen bytes at a time, sums over a warp
// and a block, conversions that round once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "device/interface.h"

#ifdef EMULATOR
#include "emulator/emulator.h"
#else
#include <cuda_runtime.h>

#define SHARED(T, name, count) __shared__ T name[count]
#define SHARED_ALIGNED(T, name, count) __shared__ __align__(16) T name[count]
#define DYNAMIC_SHARED(T, name)                          \
  extern __shared__ __align__(16) unsigned char shared_bytes[]; \
  T* name = reinterpret_cast<T*>(shared_bytes)
#define LAUNCH(kernel, grid, block, shared, stream, ...)                                                          \
  do {                                                                                                            \
    if ((shared) > 48 * 1024) /* more must be asked for; a refusal is the launch's error */                       \
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));        \
    kernel<<<(grid), (block), (shared), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);                        \
    cudaError_t error = cudaGetLastError();                                                                       \
    if (error != cudaSuccess) refuse("%s was not launched: %s", #kernel, cudaGetErrorString(error));              \
  } while (0)
#endif

constexpr int kWarp = 32;

__device__ inline float wide(float x) { return x; }
__device__ inline float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float wide(__half x) { return __half2float(x); }

template <class T>
__device__ inline T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }

// N numbers that move as one access where N * sizeof(T) is 16 (or less, a power of two).
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

template <class T, int N>
__device__ inline Pack<T, N> load(const T* from) {
  static_assert(sizeof(Pack<T, N>) <= 16, "one access");
  if constexpr (sizeof(Pack<T, N>) == 16) {
    uint4 raw = *reinterpret_cast<const uint4*>(from);
    Pack<T, N> pack;
    memcpy(&pack, &raw, 16);
    return pack;
  } else {
    return *reinterpret_cast<const Pack<T, N>*>(from);
  }
}

template <class T, int N>
__device__ inline void store(T* to, const Pack<T, N>& pack) {
  if constexpr (sizeof(Pack<T, N>) == 16) {
    uint4 raw;
    memcpy(&raw, &pack, 16);
    *reinterpret_cast<uint4*>(to) = raw;
  } else {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
  }
}

template <class T>
constexpr int kWide = 16 / sizeof(T);  // numbers in sixteen bytes

__host__ __device__ inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Calls part(std::integral_constant<int, N>{}, at) for the N numbers of this thread among `numel`, or with 1 for each of
// the last ones, if they are fewer.
template <int N, class Part>
__device__ inline void my_pack(int64_t numel, Part part) {
  const int64_t start = N * (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x);
  if (start + N <= numel) return part(std::integral_constant<int, N>{}, start);
  for (int64_t at = start; at < numel; at++) part(std::integral_constant<int, 1>{}, at);
}

// How many blocks take `items`, so many a block.
inline unsigned blocks_of(int64_t items, int64_t a_block) {
  const int64_t blocks = (items + a_block - 1) / a_block;
  if (blocks > 2147483647) refuse("%lld blocks of %lld: at most 2^31 - 1", (long long)blocks, (long long)a_block);
  return static_cast<unsigned>(blocks);
}

// Sums of a warp: every lane gets the same bits, for a + b = b + a.
__device__ inline float warp_sum(float value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

__device__ inline float warp_max(float value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = fmaxf(value, __shfl_xor_sync(~0u, value, distance));
  return value;
}

// The sum over a block of whole warps, the same bits in every thread; its order depends on the block's size alone.
__device__ inline float block_sum(float value) {
  SHARED(float, of_warps, kWarp);
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  value = warp_sum(value);
  if (warps == 1) return value;
  if (lane == 0) of_warps[warp] = value;
  __syncthreads();
  value = warp_sum(lane < warps ? of_warps[lane] : 0.0f);
  __syncthreads();  // before the next call writes
  return value;
}

// Calls body(T{}) with the type that a dtype names, which `check_float` has seen.
template <class Body>
void of_dtype(int32_t dtype, Body body) {
  if (dtype == kFloat) return body(float{});
  if (dtype == kBFloat16) return body(__nv_bfloat16{});
  return body(__half{});
}

// Calls body(T{}, std::integral_constant<int, N>{}): 16 bytes at a time where all of these begin on 16, else one number.
template <class Body>
void of_packs(int32_t dtype, std::initializer_list<const void*> pointers, Body body) {
  bool packs = true;
  for (const void* pointer : pointers) packs = packs && aligned(pointer);
  of_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    if (packs) return body(t, std::integral_constant<int, kWide<T>>{});
    body(t, std::integral_constant<int, 1>{});
  });
}
