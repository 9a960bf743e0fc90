// Small kernels, right and wrong ones, that show what the executor does.
#include "cuda/device.cuh"

namespace kdkernels::cuda {
namespace {

// out[i] = i-th thread from the end, through shared memory; a race without the barrier.
__global__ void reverse(int barrier, float* out) {
  float* values = shared_memory<float>();
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

__global__ void half_the_block_at_a_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void two_different_barriers() {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void a_lane_missing_from_a_shuffle() {
  if (threadIdx.x != 5) __shfl_xor_sync(kAllLanes, 1, 1);
}

__global__ void a_caller_outside_its_mask() { __syncwarp(0xffu); }

__global__ void lanes_with_different_masks() {
  __ballot_sync(threadIdx.x < 16 ? kAllLanes : 0xffff0000u, 1);
}

__global__ void uninitialized_shared(float* out) {
  out[threadIdx.x] = shared_memory<float>()[threadIdx.x];
}

__global__ void shared_overflow() { shared_memory<float>()[threadIdx.x + 1] = 1; }

__global__ void global_overflow(float* out) { out[threadIdx.x + 1] = 1; }

// out: one row of 64 threads for each operation.
__global__ void warp_operations(int64_t* out) {
  const int i = threadIdx.x;
  const int lane = i % kWarp;
  const int64_t value = (int64_t{1} << 40) + i;
  int row = 0;
  const auto put = [&](int64_t x) { out[row++ * 64 + i] = x; };
  put(__shfl_sync(kAllLanes, value, 3));
  put(__shfl_sync(kAllLanes, value, lane + 9, 8));
  put(__shfl_up_sync(kAllLanes, value, 2));
  put(__shfl_up_sync(kAllLanes, value, 2, 16));
  put(__shfl_down_sync(kAllLanes, value, 5));
  put(__shfl_down_sync(kAllLanes, value, 5, 8));
  put(__shfl_xor_sync(kAllLanes, value, 16));
  put(__shfl_xor_sync(kAllLanes, value, 12, 8));
  put(__ballot_sync(kAllLanes, i % 3 == 0));
  put(__any_sync(kAllLanes, i == 40));
  put(__all_sync(kAllLanes, i < 40));
  // The halves of a warp on their own, in different places.
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  if (lane < 16) {
    put(__ballot_sync(half, lane % 2));
  } else {
    put(__all_sync(half, 1));
  }
}

}  // namespace
}  // namespace kdkernels::cuda

using namespace kdkernels::cuda;

extern "C" {
int run_reverse(int barrier, float* out) {
  return launch(reverse, 1, 64, 64 * sizeof(float), nullptr, barrier, out);
}
int run_half_the_block_at_a_barrier() {
  return launch(half_the_block_at_a_barrier, 1, 64, 0, nullptr);
}
int run_two_different_barriers() { return launch(two_different_barriers, 1, 64, 0, nullptr); }
int run_a_lane_missing_from_a_shuffle() {
  return launch(a_lane_missing_from_a_shuffle, 1, 32, 0, nullptr);
}
int run_a_caller_outside_its_mask() { return launch(a_caller_outside_its_mask, 1, 32, 0, nullptr); }
int run_lanes_with_different_masks() {
  return launch(lanes_with_different_masks, 1, 32, 0, nullptr);
}
int run_too_large_a_block() { return launch(half_the_block_at_a_barrier, 1, 1056, 0, nullptr); }
int run_uninitialized_shared(float* out) {
  return launch(uninitialized_shared, 2, 32, 32 * sizeof(float), nullptr, out);
}
int run_shared_overflow() { return launch(shared_overflow, 1, 32, 32 * sizeof(float), nullptr); }
int run_global_overflow(float* out) { return launch(global_overflow, 1, 32, 0, nullptr, out); }
int run_warp_operations(int64_t* out) { return launch(warp_operations, 1, 64, 0, nullptr, out); }
}
