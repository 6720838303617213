// Rungs 3 and 4: a block of 256 threads makes 128 x 128 numbers of c, a thread 8 x 8 of them in registers, so that 16
// numbers from shared memory serve 64 multiply-adds. Rung 4 reads the next tile while it computes with this one.
#pragma once

#include "matmul/scalar.cuh"

constexpr int kSide = 128, kDeep = 8, kEach = 8, kPadded = kSide + 4;  // padded: columns begin in different banks

// A thread's four numbers of each tile: `a` is kept transposed, so that both are read along shared memory's rows.
template <class T>
struct Loader {
  const T *a, *b;
  Sizes size;
  int64_t row, column;  // of the block's corner in c
  float mine_a[4], mine_b[4];

  __device__ void read(int64_t from) {
    const int a_row = threadIdx.x / 2, a_at = threadIdx.x % 2 * 4, b_at = threadIdx.x / 32, b_column = threadIdx.x % 32;
    for (int n = 0; n < 4; n++) {
      const int64_t r = row + a_row, k = from + a_at + n, deep = from + b_at, col = column + b_column + 32 * n;
      mine_a[n] = r < size.m && k < size.k ? wide(a[r * size.k + k]) : 0.0f;
      mine_b[n] = deep < size.k && col < size.n ? wide(b[deep * size.n + col]) : 0.0f;
    }
  }

  __device__ void keep(float* as, float* bs) const {
    const int a_row = threadIdx.x / 2, a_at = threadIdx.x % 2 * 4, b_at = threadIdx.x / 32, b_column = threadIdx.x % 32;
    for (int n = 0; n < 4; n++) {
      as[(a_at + n) * kPadded + a_row] = mine_a[n];
      bs[b_at * kPadded + b_column + 32 * n] = mine_b[n];
    }
  }
};

// Thread (x, y) of 16 x 16 makes rows y * 4 .. + 3 and 64 more, columns x * 4 .. + 3 and 64 more: reads of four in a row.
__device__ inline int part_of(int thread, int n) { return thread * 4 + n % 4 + n / 4 * 64; }

__device__ inline void multiply(const float* as, const float* bs, float (&sums)[kEach][kEach]) {
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
  for (int at = 0; at < kDeep; at++) {
    float left[kEach], right[kEach];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Pack<float, 4> l = load<float, 4>(as + at * kPadded + y * 4 + half * 64);
      const Pack<float, 4> r = load<float, 4>(bs + at * kPadded + x * 4 + half * 64);
      for (int n = 0; n < 4; n++) left[half * 4 + n] = l.at[n], right[half * 4 + n] = r.at[n];
    }
#pragma unroll
    for (int i = 0; i < kEach; i++)
#pragma unroll
      for (int j = 0; j < kEach; j++) sums[i][j] += left[i] * right[j];
  }
}

template <class T, bool kAhead>
__global__ void __launch_bounds__(256, kAhead ? 1 : 2) matmul_registers(const T* a, const T* b, T* c, Sizes size) {
  constexpr int kTile = kDeep * kPadded, kBuffers = kAhead ? 2 : 1;
  SHARED_ALIGNED(float, as, kBuffers * kTile);
  SHARED_ALIGNED(float, bs, kBuffers * kTile);
  float sums[kEach][kEach] = {};
  Loader<T> loader{a, b, size, int64_t{blockIdx.x} * kSide, int64_t{blockIdx.y} * kSide, {}, {}};
  loader.read(0);
  loader.keep(as, bs);
  __syncthreads();
  int now = 0;
  for (int64_t from = 0; from < size.k; from += kDeep) {
    const bool more = from + kDeep < size.k;
    if (kAhead && more) loader.read(from + kDeep);
    multiply(as + now * kTile, bs + now * kTile, sums);
    if (!kAhead) {
      if (more) loader.read(from + kDeep);
      __syncthreads();  // all have read the one tile
    }
    if (kAhead) now ^= 1;
    if (more) loader.keep(as + now * kTile, bs + now * kTile);
    __syncthreads();
  }
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const int64_t row = loader.row + part_of(y, i);
#pragma unroll
    for (int j = 0; j < kEach; j++) {
      const int64_t column = loader.column + part_of(x, j);
      if (row < size.m && column < size.n) c[row * size.n + column] = narrow<T>(sums[i][j]);
    }
  }
}
