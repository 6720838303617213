// Rungs 6 and 7: TMA brings the tiles and warpgroups of 128 threads multiply them by wgmma; neither passes a register.
// The tiles wait in a ring of stages, each with an mbarrier that tells when it is full. In rung 7 one thread does
// nothing but fill the ring, and a second mbarrier a stage tells it when that is empty. For compute capability 9.0
// alone. Left out: clusters and multicast, stores by TMA.
#pragma once

#include "matmul/ring.cuh"

namespace wgmma {
constexpr int kSide = 128, kStages = 3;  // 96 KiB: two blocks a multiprocessor, one multiplies while the other waits
using Stage = ring::Stage<kSide, kSide>;
constexpr int kShared = kStages * Stage::kBytes + ring::kSlack;
}  // namespace wgmma

// Two warpgroups make 128 x 128, 64 rows each; thread 0 asks for the tiles two steps ahead.
template <class T>
__global__ void __launch_bounds__(256, 2)
    matmul_wgmma(const __grid_constant__ hopper::TensorMap a, const __grid_constant__ hopper::TensorMap b, T* c,
                 Sizes size) {
#ifdef ON_HOPPER
  using Stage = wgmma::Stage;
  constexpr int kSide = wgmma::kSide, kStages = wgmma::kStages;
  DYNAMIC_SHARED(unsigned char, tiles);
  SHARED(uint64_t, full, kStages);
  const uint32_t first = ring::aligned_address(tiles), filled = hopper::shared_address(full);
  const int row = blockIdx.x * kSide, column = blockIdx.y * kSide, rows_from = ring::warpgroup() * 64;
  const int steps = static_cast<int>((size.k + ring::kDeep - 1) / ring::kDeep);
  const auto fill = [&](int step) {
    const int stage = step % kStages;
    Stage::fill<T>(first + stage * Stage::kBytes, filled + stage * 8, a, b, row, column, step * ring::kDeep);
  };
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; stage++) hopper::mbarrier_init(filled + stage * 8, 1);
    hopper::mbarrier_fence();
    for (int step = 0; step < kStages - 1 && step < steps; step++) fill(step);
  }
  __syncthreads();
  float sums[kSide / 2] = {};
  ring::Place<kStages> now;
  for (int step = 0; step < steps; step++, now.next()) {
    hopper::mbarrier_wait(filled + now.stage * 8, now.turn);
    Stage::multiply<T>(first + now.stage * Stage::kBytes, rows_from, sums);
    hopper::wgmma_wait<1>();  // the step before is done by this warp,
    __syncthreads();          // by all of them: its stage is free. This step's products go on meanwhile.
    if (threadIdx.x == 0 && step + kStages - 1 < steps) fill(step + kStages - 1);
  }
  hopper::wgmma_wait_all(sums);
  ring::write(sums, c, size, row + rows_from, column);
#endif
}

namespace specialised {
constexpr int kRows = 128, kColumns = 256, kStages = 4, kGroups = kRows / 64, kThreads = (1 + kGroups) * 128;
constexpr int kBand = 16;  // tiles of c above each other that are made together: they share columns of `b`
using Stage = ring::Stage<kRows, kColumns>;
constexpr int kShared = kStages * Stage::kBytes + ring::kSlack;

// The tiles that a block makes, down a band of 16, then the next column of it: what 132 blocks work on at one time are
// 2,048 rows by about 2,112 columns, and of all shapes a square reads least.
struct Tiles {
  int64_t rows, columns;  // of c, in tiles
  int row = 0, column = 0;

  __host__ __device__ explicit Tiles(const Sizes& size)
      : rows((size.m + kRows - 1) / kRows), columns((size.n + kColumns - 1) / kColumns) {}

  __host__ __device__ int64_t count() const { return rows * columns; }

  __device__ bool at(int64_t number) {
    if (number >= count()) return false;
    const int64_t band = number / (kBand * columns), above = band * kBand, within = number - above * columns;
    const int64_t height = rows - above < kBand ? rows - above : kBand;
    row = static_cast<int>(above + within % height) * kRows;
    column = static_cast<int>(within / height) * kColumns;
    return true;
  }
};
}  // namespace specialised

// One thread of warpgroup 0 fills the ring; warpgroups 1 and 2 empty it, 64 rows by 256 columns each. The blocks stay
// and make tile after tile, so that the ring is filled for the next one while this one is written.
template <class T>
__global__ void __launch_bounds__(specialised::kThreads, 1)
    matmul_specialised(const __grid_constant__ hopper::TensorMap a, const __grid_constant__ hopper::TensorMap b, T* c,
                       Sizes size) {
#ifdef ON_HOPPER
  using namespace specialised;
  DYNAMIC_SHARED(unsigned char, tiles_bytes);
  SHARED(uint64_t, full, kStages);
  SHARED(uint64_t, empty, kStages);
  const uint32_t first = ring::aligned_address(tiles_bytes);
  const uint32_t filled = hopper::shared_address(full), emptied = hopper::shared_address(empty);
  const int steps = static_cast<int>((size.k + ring::kDeep - 1) / ring::kDeep), group = ring::warpgroup();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; stage++) {
      hopper::mbarrier_init(filled + stage * 8, 1);
      hopper::mbarrier_init(emptied + stage * 8, kGroups * 4);  // one lane a warp that multiplies
    }
    hopper::mbarrier_fence();
  }
  __syncthreads();
  Tiles tiles(size);
  ring::Place<kStages> now;
  if (group == 0) {
    hopper::give_registers<40>();
    if (threadIdx.x == 0)
      for (int64_t number = blockIdx.x; tiles.at(number); number += gridDim.x)
        for (int step = 0; step < steps; step++, now.next()) {
          hopper::mbarrier_wait(emptied + now.stage * 8, now.turn ^ 1);  // in the first turn all are
          Stage::fill<T>(first + now.stage * Stage::kBytes, filled + now.stage * 8, a, b, tiles.row, tiles.column,
                         step * ring::kDeep);
        }
  } else {
    hopper::take_registers<232>();
    const int rows_from = (group - 1) * 64;
    const auto done_with = [&](int stage) {
      if (threadIdx.x % 32 == 0) hopper::mbarrier_arrive(emptied + stage * 8);
    };
    for (int64_t number = blockIdx.x; tiles.at(number); number += gridDim.x) {
      float sums[kColumns / 2] = {};
      int before = -1;
      for (int step = 0; step < steps; step++, now.next()) {
        hopper::mbarrier_wait(filled + now.stage * 8, now.turn);
        Stage::multiply<T>(first + now.stage * Stage::kBytes, rows_from, sums);
        hopper::wgmma_wait<1>();
        if (before >= 0) done_with(before);
        before = now.stage;
      }
      hopper::wgmma_wait_all(sums);
      done_with(before);
      ring::write(sums, c, size, tiles.row + rows_from, tiles.column);
    }
  }
#endif
}
