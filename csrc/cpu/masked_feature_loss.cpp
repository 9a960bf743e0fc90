// Squared differences of feature maps under one weight map on the CPU, with their gradient: two
// reads and one write of the features.
#include <algorithm>
#include <vector>

#include "../kdkernels.h"
#include "parallel.h"
#include "simd.h"

namespace kdkernels::cpu {
namespace {

constexpr int64_t kBlock = 256;  // positions whose weights and sums stay in L1 over the channels

template <typename S>
KDK_INLINE void add_squares(const S* student, const S* teacher, int64_t n, S* sum) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    sum[j] += (student[j] - teacher[j]) * (student[j] - teacher[j]);
  }
}

template <typename S>
KDK_INLINE void gradient_of(const S* student, const S* teacher, const S* weights, int64_t n,
                            S* gradient) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) gradient[j] = 2 * weights[j] * (student[j] - teacher[j]);
}

// A block of positions of one sample, all its channels; returns its share of the loss.
template <typename T>
KDK_INLINE double run_block(const MaskedFeatureLossParams& params, int64_t sample, int64_t begin) {
  using S = typename Statistics<T>::Type;
  const int64_t positions = params.positions, n = std::min(kBlock, positions - begin);
  const int64_t first = sample * params.channels * positions + begin;
  const S* weights = static_cast<const S*>(params.weight_map) + sample * positions + begin;
  S of_student[kBlock], of_teacher[kBlock], result[kBlock], sum[kBlock] = {};
  for (int64_t c = 0; c < params.channels; ++c) {
    const int64_t at = first + c * positions;
    const S* s = widen_block(static_cast<const T*>(params.student) + at, n, of_student);
    const S* t = widen_block(static_cast<const T*>(params.teacher) + at, n, of_teacher);
    add_squares(s, t, n, sum);
    if (params.grad_student != nullptr) {
      T* grad = static_cast<T*>(params.grad_student) + at;
      S* to = block_of(grad, result);
      gradient_of(s, t, weights, n, to);
      narrow_block(to, n, grad);
    }
  }
  if (params.squares != nullptr) {
    std::copy_n(sum, n, static_cast<S*>(params.squares) + sample * positions + begin);
  }
  double loss = 0;
  for (int64_t j = 0; j < n; ++j) loss += static_cast<double>(weights[j] * sum[j]);
  return loss;
}

using Params = MaskedFeatureLossParams;
KDK_CLONES double run_float32(const Params& p, int64_t n, int64_t b) {
  return run_block<float>(p, n, b);
}
KDK_CLONES double run_float16(const Params& p, int64_t n, int64_t b) {
  return run_block<Float16>(p, n, b);
}
KDK_CLONES double run_bfloat16(const Params& p, int64_t n, int64_t b) {
  return run_block<BFloat16>(p, n, b);
}
KDK_CLONES double run_float64(const Params& p, int64_t n, int64_t b) {
  return run_block<double>(p, n, b);
}

}  // namespace

void masked_feature_loss(const MaskedFeatureLossParams& params, int threads) {
  auto* body = for_dtype(params.dtype, run_float32, run_float16, run_bfloat16, run_float64);
  const int64_t blocks = (params.positions + kBlock - 1) / kBlock;
  std::vector<double> sums(params.samples * blocks);
  for_each_run_of_rows(static_cast<int64_t>(sums.size()),
                       params.channels * std::min(kBlock, params.positions), threads,
                       [&](int64_t begin, int64_t end) {
                         for (int64_t i = begin; i < end; ++i) {
                           sums[i] = body(params, i / blocks, i % blocks * kBlock);
                         }
                       });
  double loss = 0;  // in the blocks' order, whatever the number of threads
  for (const double sum : sums) loss += sum;
  if (params.dtype == DType::kFloat64) {
    *static_cast<double*>(params.loss) = loss;
  } else {
    *static_cast<float*>(params.loss) = static_cast<float>(loss);
  }
}

}  // namespace kdkernels::cpu
