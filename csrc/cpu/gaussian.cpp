// Distances of diagonal Gaussians on the CPU, of each class of each problem, with their gradients.
//
// A task is some columns of one problem: the rows of a class are gathered three times (mean,
// variance, gradient), which leaves memory once where a class's columns fit in a cache.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../kdkernels.h"
#include "classes.h"
#include "column_sums.h"
#include "parallel.h"
#include "simd.h"

namespace kdkernels::cpu {
namespace {

constexpr int64_t kColumns = 64;

// The samples of one class on one side, and the columns of the task.
template <typename T>
struct Samples {
  using S = typename Statistics<T>::Type;
  const T* base;  // of the problem, from the task's first column on
  T* grad;        // as base, or null
  const S* weights;
  const int64_t* rows;  // or null: 0, 1, ...
  int64_t count;
  int64_t stride;
  int64_t grad_stride;
  KDK_INLINE int64_t row(int64_t i) const { return rows == nullptr ? i : rows[i]; }
  KDK_INLINE S weight(int64_t i) const { return weights == nullptr ? S(1) : weights[row(i)]; }
};

// Of some columns. The mean lies `offset` from a sample: taken off one after the other, they leave
// the differences of nearly equal samples their digits, which the rounded mean would not.
template <typename S>
struct Moments {
  S origin[kColumns], offset[kColumns], variance[kColumns];
  KDK_INLINE S centred(S x, int64_t j) const { return (x - origin[j]) - offset[j]; }
};

template <typename S>
KDK_INLINE void add_squares(const S* x, const Moments<S>& moments, S weight, int64_t n, S* sum) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const S centred = moments.centred(x[j], j);
    sum[j] += weight * (centred * centred);
  }
}

template <typename S>
KDK_INLINE void divide(const double* total, double weight, int64_t n, S* result) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) result[j] = static_cast<S>(total[j] / weight);
}

// Rows of a task's columns lie apart in memory: so many ahead are had on their way.
constexpr int64_t kAhead = 8;

template <typename T>
KDK_INLINE void prefetch_row(const Samples<T>& samples, int64_t i, int64_t n) {
  if (i < samples.count) {
    prefetch(samples.base + samples.row(i) * samples.stride, sizeof(T) * n);
  }
}

template <typename T>
KDK_INLINE void find_moments(const Samples<T>& samples, double weight, int64_t n,
                             Moments<typename Statistics<T>::Type>& found) {
  using S = typename Statistics<T>::Type;
  S buffer[kColumns];
  double total[kColumns];
  const auto row = [&](int64_t i) KDK_INLINED {
    prefetch_row(samples, i + kAhead, n);
    return widen_block(samples.base + samples.row(i) * samples.stride, n, buffer);
  };
  // From the first sample that has weight, so that what is constant has exactly no variance.
  int64_t first = 0;
  while (samples.weight(first) == S(0)) ++first;
  std::copy_n(row(first), n, found.origin);
  sum_rows<S, kColumns>(
      samples.count, n,
      [&](int64_t i, S* sum)
          KDK_INLINED { add_values(row(i), found.origin, samples.weight(i), n, sum); },
      total);
  divide(total, weight, n, found.offset);
  sum_rows<S, kColumns>(
      samples.count, n,
      [&](int64_t i, S* sum) KDK_INLINED { add_squares(row(i), found, samples.weight(i), n, sum); },
      total);
  divide(total, weight, n, found.variance);
}

// t - log(1 + t) with 1 + t = a / b: the series where it cancels (the next term is 1e-9 of it in
// float32, 1e-17 in float64), else the logarithm of the ratio above 1, as 1 + t may round to 0.
template <typename S>
KDK_INLINE S ratio_less_log(S t, S more, S a) {
  constexpr int kTerms = sizeof(S) == 4 ? 8 : 14;
  S series = S(0);
  for (int k = kTerms; k > 1; --k) series = (k % 2 == 0 ? S(1) : S(-1)) / S(k) + t * series;
  const S log_above_1 = log_1_plus(more < S(0) ? -more / a : t);
  const S far = more < S(0) ? t + log_above_1 : t - log_above_1;
  return std::abs(t) <= S(0.0625) ? t * t * series : far;
}

// Each column's loss, and grad = w (shift + slope (x - mean)) of both sides, whose means are `move`
// apart.
template <typename S>
KDK_INLINE void wasserstein_columns(const S* move, const S* v_x, const S* v_y, int64_t n, S* loss,
                                    S* shift, S* slope_x, S* slope_y) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const S s_x = std::sqrt(v_x[j]), s_y = std::sqrt(v_y[j]);
    const S spread = s_x - s_y;
    loss[j] = move[j] * move[j] + spread * spread;
    shift[j] = 2 * move[j];
    slope_x[j] = s_x > S(0) ? 2 * spread / s_x : S(0);
    slope_y[j] = s_y > S(0) ? -2 * spread / s_y : S(0);
  }
}

template <typename S>
KDK_INLINE void kl_columns(const S* move, const S* variance_x, const S* variance_y, S eps,
                           int64_t n, S* loss, S* shift, S* slope_x, S* slope_y) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const S v_x = variance_x[j] + eps, v_y = variance_y[j] + eps;
    const S more = variance_x[j] - variance_y[j];
    const S scaled = move[j] / v_y;
    const S t = more / v_y;
    loss[j] = S(0.5) * (ratio_less_log(t, more, v_x) + move[j] * scaled);
    loss[j] = v_x > S(0) ? loss[j] : S(INFINITY);
    shift[j] = scaled;
    slope_x[j] = t / v_x;
    slope_y[j] = -t / v_y - scaled * scaled;
  }
}

template <typename T>
KDK_INLINE void write_gradient(const Samples<T>& samples, double weight, int64_t n,
                               typename Statistics<T>::Type sign,
                               const Moments<typename Statistics<T>::Type>& moments,
                               const typename Statistics<T>::Type* shift,
                               const typename Statistics<T>::Type* slope) {
  using S = typename Statistics<T>::Type;
  S buffer[kColumns], result[kColumns];
  for (int64_t i = 0; i < samples.count; ++i) {
    prefetch_row(samples, i + kAhead, n);
    const S* x = widen_block(samples.base + samples.row(i) * samples.stride, n, buffer);
    const S share = static_cast<S>(samples.weight(i) / weight);
    const S signed_share = sign * share;
    T* grad = samples.grad + samples.row(i) * samples.grad_stride;
    S* to = block_of(grad, result);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      to[j] = signed_share * shift[j] + share * (slope[j] * moments.centred(x[j], j));
    }
    narrow_block(to, n, grad);
  }
}

template <typename T>
KDK_INLINE void write_zeros(const Samples<T>& samples, int64_t n) {
  for (int64_t i = 0; i < samples.count; ++i) {
    std::fill_n(samples.grad + samples.row(i) * samples.grad_stride, n, T{});
  }
}

template <typename T>
KDK_INLINE double total_weight(const Samples<T>& samples, int64_t* with_weight) {
  if (samples.weights == nullptr) {
    *with_weight = samples.count;
    return static_cast<double>(samples.count);
  }
  double sum = 0;
  *with_weight = 0;
  for (int64_t i = 0; i < samples.count; ++i) {
    sum += samples.weight(i);
    *with_weight += samples.weight(i) > 0;
  }
  return sum;
}

// One class in the task's columns; returns its loss.
template <typename T>
KDK_INLINE double run_class(const GaussianParams& params, const Samples<T>& x, const Samples<T>& y,
                            int64_t n) {
  using S = typename Statistics<T>::Type;
  int64_t count_x, count_y;
  const double weight_x = total_weight(x, &count_x), weight_y = total_weight(y, &count_y);
  const int64_t least = params.labels != nullptr ? params.min_samples : 1;
  if (!(weight_x > 0) || !(weight_y > 0) || count_x < least || count_y < least) {
    if (x.grad != nullptr) write_zeros(x, n);
    if (y.grad != nullptr) write_zeros(y, n);
    return 0;
  }
  Moments<S> of_x, of_y;
  S move[kColumns], loss[kColumns], shift[kColumns], slope_x[kColumns], slope_y[kColumns];
  find_moments(x, weight_x, n, of_x);
  find_moments(y, weight_y, n, of_y);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    move[j] = (of_x.origin[j] - of_y.origin[j]) + (of_x.offset[j] - of_y.offset[j]);
  }
  if (params.distance == GaussianDistance::kWasserstein) {
    wasserstein_columns(move, of_x.variance, of_y.variance, n, loss, shift, slope_x, slope_y);
  } else {
    kl_columns(move, of_x.variance, of_y.variance, static_cast<S>(params.eps), n, loss, shift,
               slope_x, slope_y);
  }
  if (x.grad != nullptr) write_gradient(x, weight_x, n, S(1), of_x, shift, slope_x);
  if (y.grad != nullptr) write_gradient(y, weight_y, n, S(-1), of_y, shift, slope_y);
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += loss[j];
  return sum;
}

template <typename T>
KDK_INLINE double run_task(const GaussianParams& params, int64_t problem, int64_t begin,
                           const Classes& classes) {
  using S = typename Statistics<T>::Type;
  const int64_t n = std::min(kColumns, params.features - begin);
  const auto side = [&](const void* base, int64_t problem_stride, int64_t stride,
                        const void* weights, void* grad, int64_t count) {
    Samples<T> samples;
    samples.base = static_cast<const T*>(base) + problem * problem_stride + begin;
    samples.grad = grad == nullptr
                       ? nullptr
                       : static_cast<T*>(grad) + problem * count * params.features + begin;
    samples.weights =
        weights == nullptr ? nullptr : static_cast<const S*>(weights) + problem * count;
    samples.rows = nullptr;
    samples.count = count;
    samples.stride = stride;
    samples.grad_stride = params.features;
    return samples;
  };
  Samples<T> x = side(params.x, params.x_problem_stride, params.x_stride, params.x_weights,
                      params.grad_x, params.x_samples);
  Samples<T> y = side(params.y, params.y_problem_stride, params.y_stride, params.y_weights,
                      params.grad_y, params.y_samples);
  if (params.labels == nullptr) return run_class(params, x, y, n);
  double sum = 0;
  for (size_t c = 0; c + 1 < classes.starts.size(); ++c) {
    x.rows = y.rows = classes.rows.data() + classes.starts[c];
    x.count = y.count = classes.starts[c + 1] - classes.starts[c];
    sum += run_class(params, x, y, n);
  }
  return sum;
}

KDK_CLONES double run_float32(const GaussianParams& p, int64_t r, int64_t b, const Classes& c) {
  return run_task<float>(p, r, b, c);
}
KDK_CLONES double run_float16(const GaussianParams& p, int64_t r, int64_t b, const Classes& c) {
  return run_task<Float16>(p, r, b, c);
}
KDK_CLONES double run_bfloat16(const GaussianParams& p, int64_t r, int64_t b, const Classes& c) {
  return run_task<BFloat16>(p, r, b, c);
}
KDK_CLONES double run_float64(const GaussianParams& p, int64_t r, int64_t b, const Classes& c) {
  return run_task<double>(p, r, b, c);
}

}  // namespace

void gaussian(const GaussianParams& params, int threads) {
  auto* body = for_dtype(params.dtype, run_float32, run_float16, run_bfloat16, run_float64);
  std::vector<Classes> classes(params.labels == nullptr ? 1 : params.problems);
  if (params.labels != nullptr) {
    for_each_run_of_rows(params.problems, params.x_samples, threads, [&](int64_t b, int64_t e) {
      for (int64_t r = b; r < e; ++r) {
        classes[r] = classes_of(params.labels + r * params.x_samples, params.x_samples);
      }
    });
  }
  const int64_t pieces = (params.features + kColumns - 1) / kColumns;
  std::vector<double> sums(params.problems * pieces);
  for_each_run_of_rows(params.problems * pieces,
                       (params.x_samples + params.y_samples) * std::min(kColumns, params.features),
                       threads, [&](int64_t begin, int64_t end) {
                         for (int64_t task = begin; task < end; ++task) {
                           const int64_t problem = task / pieces;
                           sums[task] = body(params, problem, task % pieces * kColumns,
                                             classes[params.labels == nullptr ? 0 : problem]);
                         }
                       });
  for (int64_t r = 0; r < params.problems; ++r) {
    double sum = 0;  // in the columns' order, whatever the number of threads
    for (int64_t piece = 0; piece < pieces; ++piece) sum += sums[r * pieces + piece];
    if (params.dtype == DType::kFloat64) {
      static_cast<double*>(params.loss)[r] = sum;
    } else {
      static_cast<float*>(params.loss)[r] = static_cast<float>(sum);
    }
  }
}

}  // namespace kdkernels::cpu
