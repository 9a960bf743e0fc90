// Reductions over a warp or a block, in one fixed order, and the online softmax statistics of a
// row.
//
//   m = max_j x_j, S = sum_j e^((x_j - m) / T):  (m, S) + (m', S') = (M, S e^((m-M)/T) + S'
//   e^((m'-M)/T))
#pragma once

#include <cfloat>

#include "device.cuh"

namespace kdkernels::cuda {

struct Maximum {
  KDK_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct Minimum {
  KDK_DEVICE int operator()(int a, int b) const { return a < b ? a : b; }
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
  static constexpr int size_in(int) { return kWarp; }

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
  static constexpr int kMaxValues = 8;
  static constexpr size_t kSharedBytes = kMaxValues * kWarp * sizeof(double);
  static constexpr int per_block(int) { return 1; }
  static constexpr int size_in(int threads) { return threads; }

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

// 2^x for x <= 0 within 1e-9; results below 2^-126 are 0.
KDK_DEVICE double exp2_precise(double x) {
  if (x < -126) return 0;
  const float whole = rintf(static_cast<float>(x));
  const double y = (x - whole) * kLn2;
  double h = 1.0 / 5040;
  h = h * y + 1.0 / 720;
  h = h * y + 1.0 / 120;
  h = h * y + 1.0 / 24;
  h = h * y + 1.0 / 6;
  h = h * y + 0.5;
  h = h * y + 1;
  return ldexp(h * y + 1, static_cast<int>(whole));
}

// log2(e) / T to more digits than a float has. Both parts are > 0, so that -inf stays -inf.
struct Factor {
  float high;
  float low;

  Factor() = default;
  KDK_DEVICE explicit Factor(double value) {
    high = static_cast<float>(value) * (1 - 0x1p-22f);
    low = static_cast<float>(value - high);
  }
};

KDK_DEVICE float scaled(float x, float factor) { return x * factor; }
KDK_DEVICE float scaled(float x, Factor factor) { return fmaf(x, factor.low, x * factor.high); }
KDK_DEVICE float to_float(Factor factor) { return factor.high; }

template <int V>
KDK_DEVICE float max_of(const float (&x)[V]) {
  float max = x[0];
#pragma unroll
  for (int i = 1; i < V; ++i) max = fmaxf(max, x[i]);
  return max;
}

// One thread's share of a row's statistics, at K factors log2(e) / T: the maximum, and the sums of
// 2^(factor (x - reference)).
//
// The reference moves only where an element lies far above it, so that the sums are seldom
// rescaled, and what rounding takes from them is kept: near convergence a row's two sums must be
// good to 1e-8.
template <int K>
struct OnlineSoftmax {
  static constexpr float kRoom = 16;  // sums of terms up to 2^16

  float max = -INFINITY;
  float reference = -FLT_MAX;
  float room;  // kRoom / the largest factor
  float sums[K] = {};
  float lost[K] = {};

  template <typename F>
  KDK_DEVICE explicit OnlineSoftmax(const F (&factors)[K]) {
    float largest = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) largest = fmaxf(largest, to_float(factors[k]));
    room = kRoom / largest;
  }

  template <int V>
  KDK_DEVICE void look(const float (&x)[V]) {
    max = fmaxf(max, max_of(x));
  }

  // `max` is the row's already.
  KDK_DEVICE void start_at_max() { reference = fmaxf(max, -FLT_MAX); }

  // The sums at the first `active` factors.
  template <int V, typename F>
  KDK_DEVICE void add(const float (&x)[V], const F (&factors)[K], int active) {
    const float packet_max = max_of(x);
    if (packet_max > reference + room) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const float change = exp2_approximate(scaled(reference - packet_max, factors[k]));
        sums[k] *= change;
        lost[k] *= change;
      }
      reference = packet_max;
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k >= active) continue;
      float terms = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) terms += exp2_approximate(scaled(x[i] - reference, factors[k]));
      terms -= lost[k];
      const float sum = sums[k] + terms;
      lost[k] = (sum - sums[k]) - terms;
      sums[k] = sum;
    }
  }

  // Relative to `max`, which by now is the row's.
  template <typename F>
  KDK_DEVICE double sum(int k, const F (&factors)[K]) const {
    const double all = static_cast<double>(sums[k]) - lost[k];
    if (reference == max || max == -INFINITY) return all;
    const double distance = static_cast<double>(reference) - max;
    return all * exp2_precise(distance * factor_value(factors[k]));
  }

  static KDK_DEVICE double factor_value(float factor) { return factor; }
  static KDK_DEVICE double factor_value(Factor factor) {
    return static_cast<double>(factor.high) + factor.low;
  }
};

}  // namespace kdkernels::cuda
