// Rungs 0 to 2: one thread a number of c. What changes is who reads what from where.
#pragma once

#include "device/device.cuh"

struct Sizes {  // c[m,n] = a[m,k] b[k,n], rows one after another
  int64_t m, n, k;
};

// Neighbouring threads take neighbouring rows: each of a warp's 32 loads of `a`, and its store, is a transaction of its own.
template <class T>
__global__ void __launch_bounds__(256) matmul_naive(const T* a, const T* b, T* c, Sizes size) {
  const int64_t row = int64_t{blockIdx.x} * 16 + threadIdx.x % 16, column = int64_t{blockIdx.y} * 16 + threadIdx.x / 16;
  if (row >= size.m || column >= size.n) return;
  float sum = 0.0f;
  for (int64_t at = 0; at < size.k; at++) sum += wide(a[row * size.k + at]) * wide(b[at * size.n + column]);
  c[row * size.n + column] = narrow<T>(sum);
}

// Neighbouring threads take neighbouring columns: a warp reads 32 numbers of `b` at once, and one of `a` for all.
template <class T>
__global__ void __launch_bounds__(256) matmul_coalesced(const T* a, const T* b, T* c, Sizes size) {
  const int64_t row = int64_t{blockIdx.x} * 8 + threadIdx.x / 32, column = int64_t{blockIdx.y} * 32 + threadIdx.x % 32;
  if (row >= size.m || column >= size.n) return;
  float sum = 0.0f;
  for (int64_t at = 0; at < size.k; at++) sum += wide(a[row * size.k + at]) * wide(b[at * size.n + column]);
  c[row * size.n + column] = narrow<T>(sum);
}

// A block reads tiles of 32 x 32 into shared memory, so that each number of global memory serves 32 threads.
template <class T>
__global__ void __launch_bounds__(1024) matmul_tiles(const T* a, const T* b, T* c, Sizes size) {
  constexpr int kTile = 32;
  SHARED(float, as, kTile * kTile);
  SHARED(float, bs, kTile * kTile);
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  const int64_t row = int64_t{blockIdx.x} * kTile + y, column = int64_t{blockIdx.y} * kTile + x;
  float sum = 0.0f;
  for (int64_t from = 0; from < size.k; from += kTile) {
    const bool in_a = row < size.m && from + x < size.k, in_b = column < size.n && from + y < size.k;
    as[y * kTile + x] = in_a ? wide(a[row * size.k + from + x]) : 0.0f;
    bs[y * kTile + x] = in_b ? wide(b[(from + y) * size.n + column]) : 0.0f;
    __syncthreads();
    for (int at = 0; at < kTile; at++) sum += as[y * kTile + at] * bs[at * kTile + x];
    __syncthreads();
  }
  if (row < size.m && column < size.n) c[row * size.n + column] = narrow<T>(sum);
}
