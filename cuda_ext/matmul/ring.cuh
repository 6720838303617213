// What rungs 6 and 7 share: a ring of stages in shared memory, which TMA fills and wgmma reads, and the way of the sums
// into c. Left out: who fills and who waits when (wgmma.cuh).
#pragma once

#include "matmul/hopper.cuh"
#include "matmul/scalar.cuh"

namespace ring {

using hopper::TensorMap;

constexpr int kDeep = 64, kBox = 64;  // 64 numbers of two bytes: the 128 bytes that the swizzle spans

// What wgmma reads from `start` on: atoms of 8 rows of 128 bytes, swizzled (bit 62). `stride` bytes lie between atoms
// that follow each other across the rows; `leading` bytes, looked at for `b` alone, between those side by side along n.
__device__ inline uint64_t descriptor(uint32_t start, uint32_t leading, uint32_t stride) {
  return uint64_t{start >> 4} | uint64_t{leading >> 4} << 16 | uint64_t{stride >> 4} << 32 | uint64_t{1} << 62;
}

// What TMA cannot take is refused with its values.
template <class T>
TensorMap map_of(const char* name, const T* data, int64_t rows, int64_t columns, int box_rows) {
  if (columns % kWide<T>)
    refuse("%s [%lld,%lld] has rows of %lld bytes: TMA takes multiples of 16", name, (long long)rows,
           (long long)columns, (long long)columns * 2);
  if (!aligned(data)) refuse("%s begins at %p: TMA takes multiples of 16", name, (const void*)data);
  if (rows > INT32_MAX || columns > INT32_MAX)
    refuse("%s [%lld,%lld] is too long: TMA counts to 2,147,483,647", name, (long long)rows, (long long)columns);
  return hopper::tensor_map(data, rows, columns, box_rows);
}

// A stage: kRows x 64 of `a`, rows of 128 bytes along k; behind it 64 x kColumns of `b`, box by box of 64 columns, rows
// of 128 bytes along n.
template <int kRows, int kColumns>
struct Stage {
  static constexpr uint32_t kOfA = kRows * 128, kBoxOfB = kDeep * 128, kBytes = kOfA + kColumns / kBox * kBoxOfB;

  // By one thread; the bytes count for the mbarrier `full`.
  template <class T>
  static __device__ void fill(uint32_t at, uint32_t full, const TensorMap& a, const TensorMap& b, int row, int column,
                              int k) {
    hopper::mbarrier_arrive(full, kBytes);
    hopper::tma_load<T>(at, a, full, k, row);
#pragma unroll
    for (int box = 0; box < kColumns / kBox; box++)
      hopper::tma_load<T>(at + kOfA + box * kBoxOfB, b, full, column + box * kBox, k);
  }

  // By a warpgroup, for its 64 rows and all columns: one group of four products, each 16 deep. Sixteen numbers further
  // along k are 32 bytes in `a`, whose rows lie along k, and 16 rows in `b`.
  template <class T>
  static __device__ void multiply(uint32_t at, int rows_from, float (&sums)[kColumns / 2]) {
    hopper::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDeep / 16; k++)
      hopper::wgmma<T>(sums, descriptor(at + rows_from * 128 + k * 32, 16, 1024),
                       descriptor(at + kOfA + k * 16 * 128, kBoxOfB, 1024));
    hopper::wgmma_commit();
  }
};

// Of a thread, and the same for its warp, which the compiler must see: descriptors stand in registers of the warp.
__device__ inline int warpgroup() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0); }

// A warpgroup's 64 rows: of every 8 columns a lane holds 2 neighbours, in rows lane / 4 and that + 8 of its warp's 16.
template <class T, int kNumbers>
__device__ inline void write(const float (&sums)[kNumbers], T* c, const Sizes& size, int64_t row, int64_t column) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t r = row + warp * 16 + half * 8 + lane / 4;
    if (r >= size.m) return;
#pragma unroll
    for (int n = 0; n < kNumbers / 4; n++) {
      const int64_t at = column + n * 8 + lane % 4 * 2;
      const T two[] = {narrow<T>(sums[n * 4 + half * 2]), narrow<T>(sums[n * 4 + half * 2 + 1])};
      uint32_t both;
      memcpy(&both, two, 4);
      if (at < size.n) *reinterpret_cast<uint32_t*>(c + r * size.n + at) = both;
    }
  }
}

// Where a stage and its mbarrier stand, and which turn of the ring it is, by parity.
template <int kStages>
struct Place {
  int stage = 0;
  unsigned turn = 0;

  __device__ void next() {
    if (++stage < kStages) return;
    stage = 0;
    turn ^= 1;
  }
};

__device__ inline uint32_t aligned_address(const void* bytes) {  // a swizzled atom begins on 1,024 bytes
  return (hopper::shared_address(bytes) + 1023) / 1024 * 1024;
}
constexpr int kSlack = 1024;

}  // namespace ring
