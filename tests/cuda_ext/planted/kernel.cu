// Not an op: kernels by which the emulator itself is tested, right ones and wrong ones.
#include "device/device.cuh"

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
}

OP(planted_lanes,
   "planted_lanes(Tensor x, Tensor(a!) up, Tensor(b!) down, Tensor(c!) across, Tensor(d!) votes) -> ()")
OP(planted, "planted(int which, Tensor x, Tensor(a!) y) -> ()")
