// Not an op: kernels by which the emulator itself is tested, right ones and wrong ones.
#include "device/device.cuh"
#include "matmul/hopper.cuh"

// Each lane's neighbours, and the votes of its warp.
__global__ void lanes(const float* x, float* up, float* down, float* across, int64_t* votes) {
  const int at = threadIdx.x;
  up[at] = __shfl_up_sync(~0u, x[at], 1);
  down[at] = __shfl_down_sync(~0u, x[at], 2);
  across[at] = __shfl_xor_sync(~0u, x[at], 16);
  votes[at] = __ballot_sync(~0u, x[at] > 0);
}

// The block's numbers in reverse order, through shared memory; without the barrier some are read too early.
template <bool kBarrier>
__global__ void reverse(const float* x, float* y) {
  SHARED(float, kept, 1024);
  kept[threadIdx.x] = x[threadIdx.x];
  if (kBarrier) __syncthreads();
  y[threadIdx.x] = kept[blockDim.x - 1 - threadIdx.x];
}

__global__ void hang(float* y) {
  if (threadIdx.x < 40) __syncthreads();
  y[threadIdx.x] = 1;
}

__global__ void no_lane(float* y) { y[threadIdx.x] = __shfl_sync(~0u, 1.0f, 40); }

__global__ void beyond(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }

// Sixteen bytes at once from where a card would refuse to.
__global__ void crooked(const float* x, float* y) {
  if (threadIdx.x == 0) y[0] = load<float, 4>(x + 1).at[0];
}

__global__ void beyond_shared(float* y) {
  SHARED(float, kept, 64);
  kept[threadIdx.x + 1] = 1;
  __syncthreads();
  y[threadIdx.x] = kept[threadIdx.x];
}

// Which blocks ran: each writes its number.
__global__ void blocks(float* y) {
  if (threadIdx.x == 0) y[blockIdx.x] = blockIdx.x;
}

// An mbarrier at which all arrive, one at which one does not, one that nobody has initialised.
template <bool kInitialised, int kArrive>
__global__ void waits(float* y) {
  SHARED(uint64_t, barrier, 1);
  const uint32_t at = hopper::shared_address(barrier);
  if (kInitialised && threadIdx.x == 0) hopper::mbarrier_init(at, 10);
  __syncthreads();
  hopper::mbarrier_wait(at, 1);  // for the phase before the first, which has ended
  __syncthreads();
  if (threadIdx.x < kArrive) hopper::mbarrier_arrive(at);
  hopper::mbarrier_wait(at, 0);
  y[threadIdx.x] = 1;
}

// A box of 8 rows of 32 floats as TMA leaves it in shared memory. Faults: 1 ends without waiting for it, 2 arrives twice.
template <int kFault>
__global__ void box(const __grid_constant__ hopper::TensorMap map, float* y, int column, int row) {
  DYNAMIC_SHARED(unsigned char, bytes);
  SHARED(uint64_t, full, 1);
  const uint32_t first = hopper::shared_address(bytes), start = (first + 1023) / 1024 * 1024;
  const uint32_t barrier = hopper::shared_address(full);
  if (threadIdx.x == 0) {
    hopper::mbarrier_init(barrier, 1);
    hopper::mbarrier_fence();
    hopper::mbarrier_arrive(barrier, 1024);
    hopper::tma_load<float>(start, map, barrier, column, row);
    if (kFault == 2) hopper::mbarrier_arrive(barrier, 1024);
  }
  __syncthreads();
  if (kFault != 1) hopper::mbarrier_wait(barrier, 0);
  std::memcpy(y + threadIdx.x, bytes + (start - first) + 4 * threadIdx.x, 4);
}

void planted_box(Stream stream, int64_t column, int64_t row, int64_t fault, Tensor x, Tensor y) {
  const auto map = hopper::tensor_map(x.as<float>(), x.size(0), x.size(1), 8);
  const auto right = box<0>, ends = box<1>, twice = box<2>;
  float* to = y.as<float>();
  const int from_column = static_cast<int>(column), from_row = static_cast<int>(row);
  if (fault == 0) LAUNCH(right, 1, 256, 2048, stream, map, to, from_column, from_row);
  if (fault == 1) LAUNCH(ends, 1, 256, 2048, stream, map, to, from_column, from_row);
  if (fault == 2) LAUNCH(twice, 1, 256, 2048, stream, map, to, from_column, from_row);
}

void planted_lanes(Stream stream, Tensor x, Tensor up, Tensor down, Tensor across, Tensor votes) {
  LAUNCH(lanes, 1, static_cast<unsigned>(x.numel()), 0, stream, x.as<float>(), up.as<float>(), down.as<float>(),
         across.as<float>(), votes.as<int64_t>());
}

void planted(Stream stream, int64_t which, Tensor x, Tensor y) {
  const unsigned threads = static_cast<unsigned>(x.numel());
  const auto right = reverse<true>, wrong = reverse<false>;
  if (which == 0) LAUNCH(right, 1, threads, 0, stream, x.as<float>(), y.as<float>());
  if (which == 1) LAUNCH(wrong, 1, threads, 0, stream, x.as<float>(), y.as<float>());
  if (which == 2) LAUNCH(hang, 1, threads, 0, stream, y.as<float>());
  if (which == 3) LAUNCH(no_lane, 1, threads, 0, stream, y.as<float>());
  if (which == 4) LAUNCH(beyond, 1, threads, 0, stream, x.as<float>(), y.as<float>());
  if (which == 5) LAUNCH(beyond_shared, 1, threads, 0, stream, y.as<float>());
  if (which == 6) LAUNCH(blocks, threads, 32, 0, stream, y.as<float>());
  const auto too_few = waits<true, 9>, enough = waits<true, 10>, none = waits<false, 10>;
  if (which == 7) LAUNCH(too_few, 1, threads, 0, stream, y.as<float>());
  if (which == 8) LAUNCH(enough, 1, threads, 0, stream, y.as<float>());
  if (which == 10) LAUNCH(crooked, 1, threads, 0, stream, x.as<float>(), y.as<float>());
  if (which >= 70) check_hopper("wgmma", static_cast<int>(which));
  if (which == 9) LAUNCH(none, 1, threads, 0, stream, y.as<float>());
}

OP(planted_lanes,
   "planted_lanes(Tensor x, Tensor(a!) up, Tensor(b!) down, Tensor(c!) across, Tensor(d!) votes) -> ()")
OP(planted_box, "planted_box(int column, int row, int fault, Tensor x, Tensor(a!) y) -> ()")
OP(planted, "planted(int which, Tensor x, Tensor(a!) y) -> ()")
