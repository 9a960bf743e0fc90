// Reductions over a warp or a block, in one fixed order, and the online softmax statistics of a
// row.
//
//   m = max_j x_j, S = sum_j e^((x_j - m) / T):  (m, S) + (m', S') = (M, S e^((m-M)/T) + S'
//   e^((m'-M)/T))
#pragma once

#include "device.cuh"

namespace kdkernels::cuda {

struct Maximum {
  KDK_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct Sum {
  KDK_DEVICE double operator()(double a, double b) const { return a + b; }
};

// Every lane receives the same bits: a butterfly adds the same pairs on both sides.
template <int K, typename T, typename Op>
KDK_DEVICE void reduce_warp(T (&values)[K], Op op) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      values[k] = op(values[k], __shfl_xor_sync(kAllLanes, values[k], distance));
    }
  }
}

// The threads that share a row: their rank and number, their team's index and number in the grid,
// and how they combine K values at once.
struct WarpTeam {
  static constexpr size_t kSharedBytes = 0;
  static constexpr int per_block(int threads) { return threads / kWarp; }

  KDK_DEVICE int rank() const { return threadIdx.x % kWarp; }
  KDK_DEVICE int size() const { return kWarp; }
  KDK_DEVICE int64_t index() const {
    return int64_t{blockIdx.x} * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  }
  KDK_DEVICE int64_t count() const { return int64_t{gridDim.x} * (blockDim.x / kWarp); }

  template <int K, typename T, typename Op>
  KDK_DEVICE void reduce(T (&values)[K], T, Op op) const {
    reduce_warp(values, op);
  }
};

struct BlockTeam {
  static constexpr int kMaxValues = 4;
  static constexpr size_t kSharedBytes = kMaxValues * kWarp * sizeof(double);
  static constexpr int per_block(int) { return 1; }

  KDK_DEVICE int rank() const { return threadIdx.x; }
  KDK_DEVICE int size() const { return blockDim.x; }
  KDK_DEVICE int64_t index() const { return blockIdx.x; }
  KDK_DEVICE int64_t count() const { return gridDim.x; }

  template <int K, typename T, typename Op>
  KDK_DEVICE void reduce(T (&values)[K], T identity, Op op) const {
    static_assert(K <= kMaxValues && sizeof(T) <= sizeof(double),
                  "the shared memory holds no more");
    T* partial = shared_memory<T>();
    const int lane = threadIdx.x % kWarp;
    reduce_warp(values, op);
    __syncthreads();  // the previous reduction may still be read
    if (lane == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) partial[threadIdx.x / kWarp * K + k] = values[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      values[k] = lane < static_cast<int>(blockDim.x) / kWarp ? partial[lane * K + k] : identity;
    }
    reduce_warp(values, op);
  }
};

// -inf - -inf is NaN: a maximum over nothing but -inf is replaced by 0, which leaves every e^(x -
// 0) at 0.
KDK_DEVICE float finite_shift(float max) { return max == -INFINITY ? 0.0f : max; }

// One thread's share of a row's statistics; `factor` is log2(e) / T.
struct OnlineSoftmax {
  float max = -INFINITY;
  float sum = 0;

  template <int V>
  KDK_DEVICE void add(const float (&x)[V], float factor) {
    float new_max = max;
#pragma unroll
    for (int i = 0; i < V; ++i) new_max = fmaxf(new_max, x[i]);
    const float shift = finite_shift(new_max);
    sum *= exp2_approximate((max - shift) * factor);
    max = new_max;
#pragma unroll
    for (int i = 0; i < V; ++i) sum += exp2_approximate((x[i] - shift) * factor);
  }

  KDK_DEVICE double sum_at(float row_max, float factor) const {
    return static_cast<double>(sum * exp2_approximate((max - finite_shift(row_max)) * factor));
  }
};

}  // namespace kdkernels::cuda
