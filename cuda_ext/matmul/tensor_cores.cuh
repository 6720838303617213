// Rung 5: bf16 and fp16 on tensor cores by mma.sync m16n8k16, sums in fp32. A block of 8 warps makes 128 x 128 of c, a
// warp 32 x 64, as 2 x 8 products of 16 x 8. The tiles of shared memory are 32 deep and two, one read ahead.
#pragma once

#include "matmul/scalar.cuh"

namespace tensor {

constexpr int kSide = 128, kDeep = 32, kPadded = kDeep + 8;  // 80 bytes a row: 16-byte accesses, 8 rows in all banks

// d += a b: what a lane holds of each is in `mma_fragments` of the PTX manual, section 9.7.14 (m16n8k16).
template <class T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef EMULATOR
  emulator::publish(*reinterpret_cast<const Pack<uint32_t, 4>*>(a));
  Pack<uint32_t, 4> left[32];
  for (int lane = 0; lane < 32; lane++) left[lane] = emulator::of_lane<Pack<uint32_t, 4>>(lane);
  emulator::publish(*reinterpret_cast<const Pack<uint32_t, 2>*>(b));
  const int lane = threadIdx.x % 32;
  for (int n = 0; n < 4; n++)
    for (int k = 0; k < 16; k++) {
      const int row = lane / 4 + n / 2 * 8, column = lane % 4 * 2 + n % 2;
      const Pack<uint32_t, 2> right = emulator::of_lane<Pack<uint32_t, 2>>(column * 4 + k % 8 / 2);
      T x, y;
      const uint32_t from = left[row % 8 * 4 + k % 8 / 2].at[row / 8 + k / 8 * 2];
      std::memcpy(&x, reinterpret_cast<const char*>(&from) + k % 2 * 2, 2);
      std::memcpy(&y, reinterpret_cast<const char*>(&right.at[k / 8]) + k % 2 * 2, 2);
      d[n] += wide(x) * wide(y);
    }
#else
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Sixteen numbers of a row of `a`, or of a column of `b`, which is kept transposed: both then lie along k.
template <class T>
struct Loader {
  const T *a, *b;
  Sizes size;
  int64_t row, column;
  T mine_a[16], mine_b[16];

  __device__ void read(int64_t from) {
    const int line = threadIdx.x / 2, at = threadIdx.x % 2 * 16;      // of a: a row, half of its 32
    const int deep = threadIdx.x / 8, first = threadIdx.x % 8 * 16;  // of b: a row, an eighth of its 128
    const int64_t k = from + at, r = row + line, bk = from + deep, col = column + first;
    const bool whole_a = r < size.m && k + 16 <= size.k && (size.k % 8 == 0) && aligned_here(a);
    const bool whole_b = bk < size.k && col + 16 <= size.n && (size.n % 8 == 0) && aligned_here(b);
    if (whole_a) {
      copy16(mine_a, a + r * size.k + k);
    } else {
      for (int n = 0; n < 16; n++) mine_a[n] = r < size.m && k + n < size.k ? a[r * size.k + k + n] : narrow<T>(0.0f);
    }
    if (whole_b) {
      copy16(mine_b, b + bk * size.n + col);
    } else {
      for (int n = 0; n < 16; n++)
        mine_b[n] = bk < size.k && col + n < size.n ? b[bk * size.n + col + n] : narrow<T>(0.0f);
    }
  }

  __device__ void keep(T* as, T* bs) const {
    const int line = threadIdx.x / 2, at = threadIdx.x % 2 * 16, deep = threadIdx.x / 8, first = threadIdx.x % 8 * 16;
    for (int n = 0; n < 16; n++) {
      as[line * kPadded + at + n] = mine_a[n];
      bs[(first + n) * kPadded + deep] = mine_b[n];
    }
  }

  __device__ static bool aligned_here(const T* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

  __device__ static void copy16(T* to, const T* from) {
    for (int half = 0; half < 2; half++) {
      const Pack<T, 8> pack = load<T, 8>(from + half * 8);
      for (int n = 0; n < 8; n++) to[half * 8 + n] = pack.at[n];
    }
  }
};

template <class T>
__device__ inline uint32_t pair(const T* at) {
  uint32_t two;
  memcpy(&two, at, 4);
  return two;
}

// A warp's 32 x 64 from tiles that are 32 deep.
template <class T>
__device__ inline void multiply(const T* as, const T* bs, float (&sums)[2][8][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, top = warp % 4 * 32, left = warp / 4 * 64;
  const int group = lane / 4, two = lane % 4 * 2;
#pragma unroll
  for (int k = 0; k < kDeep; k += 16) {
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int n = 0; n < 4; n++)
        a[i][n] = pair(as + (top + i * 16 + group + n % 2 * 8) * kPadded + k + two + n / 2 * 8);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const T* column = bs + (left + j * 8 + group) * kPadded + k + two;
      const uint32_t b[2] = {pair(column), pair(column + 8)};
#pragma unroll
      for (int i = 0; i < 2; i++) mma<T>(sums[i][j], a[i], b);
    }
  }
}

}  // namespace tensor

template <class T>
__global__ void __launch_bounds__(256) matmul_tensor(const T* a, const T* b, T* c, Sizes size) {
  constexpr int kTile = tensor::kSide * tensor::kPadded;
  SHARED_ALIGNED(T, as, 2 * kTile);
  SHARED_ALIGNED(T, bs, 2 * kTile);
  float sums[2][8][4] = {};
  tensor::Loader<T> loader{
      a, b, size, int64_t{blockIdx.x} * tensor::kSide, int64_t{blockIdx.y} * tensor::kSide, {}, {}};
  loader.read(0);
  loader.keep(as, bs);
  __syncthreads();
  int now = 0;
  for (int64_t from = 0; from < size.k; from += tensor::kDeep, now ^= 1) {
    const bool more = from + tensor::kDeep < size.k;
    if (more) loader.read(from + tensor::kDeep);
    tensor::multiply(as + now * kTile, bs + now * kTile, sums);
    if (more) loader.keep(as + (now ^ 1) * kTile, bs + (now ^ 1) * kTile);
    __syncthreads();
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const int64_t row = loader.row + warp % 4 * 32 + i * 16 + lane / 4 + n / 2 * 8;
        const int64_t column = loader.column + warp / 4 * 64 + j * 8 + lane % 4 * 2 + n % 2;
        if (row < size.m && column < size.n) c[row * size.n + column] = narrow<T>(sums[i][j][n]);
      }
}
