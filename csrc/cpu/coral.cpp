// CORAL on the CPU, of each class of each problem, with its gradients; formulas in
// kdkernels/ops/coral.py and ../kdkernels.h.
//
// With A and B the centred samples, scaled so that A^T A and B^T B are the covariances, and D = A -
// B, E = A + B: one product, D^T E, where there are at least as many samples as features, else
// three of samples with samples. Each sum is one thread's, in one order, so that results do not
// depend on their number.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../kdkernels.h"
#include "classes.h"
#include "column_sums.h"
#include "convert.h"
#include "parallel.h"
#include "product.h"
#include "tile_product.h"

namespace kdkernels::cpu {
namespace {

// Columns that are centred together, and rows of a product, that a thread takes at once.
constexpr int64_t kColumns = 32;
constexpr int64_t kRows = 16;

// The samples of one side that have weight.
struct Side {
  std::vector<int64_t> rows;   // of the problem
  std::vector<double> scales;  // sqrt(w / (1 - sum w^2)), w adding up to 1
  std::vector<double> weights;
};

template <typename S>
struct Room {
  Side sides[2];
  Buffer<S> difference, sum, cross, grams[2], packed[2];
  std::vector<double> losses;
};

template <typename Body>
void share_out(int64_t n, int64_t piece, int threads, const Body& body) {
  const int64_t pieces = (n + piece - 1) / piece;
  for_each_run_of_rows(
      pieces, 1, threads,
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(i * piece, std::min(n, (i + 1) * piece));
      },
      1);
}

// The samples that have weight, and whether they have a covariance.
template <typename S>
bool find_samples(const S* weights, const Job& job, int64_t count, Side& side) {
  const WeightSums sums = find_weighted(weights, job, count, side.rows);
  if (side.rows.size() < 2) return false;
  side.weights.resize(side.rows.size());
  side.scales.resize(side.rows.size());
  for (size_t i = 0; i < side.rows.size(); ++i) {
    side.weights[i] = weight_of(weights, side.rows[i]) / sums.total;
    side.scales[i] = std::sqrt(side.weights[i] / sums.left());
  }
  return true;
}

// Some columns of D and E, from samples of any type.
template <typename T>
KDK_INLINE void centre(const T* const bases[2], const int64_t strides[2], const Side sides[2],
                       int64_t samples, int64_t begin, int64_t n, int64_t width,
                       typename Statistics<T>::Type* difference,
                       typename Statistics<T>::Type* sum) {
  using S = typename Statistics<T>::Type;
  S mean[2][kColumns], origin[2][kColumns], buffer[2][kColumns];
  const auto row = [&](int s, int64_t i) KDK_INLINED {
    return widen_block(bases[s] + sides[s].rows[i] * strides[s] + begin, n, buffer[s]);
  };
  for (int s = 0; s < 2; ++s) {
    // From the first sample, so that what is constant is exactly 0.
    double total[kColumns];
    std::copy_n(row(s, 0), n, origin[s]);
    sum_rows<S, kColumns>(
        static_cast<int64_t>(sides[s].rows.size()), n,
        [&](int64_t i, S* sum) KDK_INLINED {
          add_values(row(s, i), origin[s], static_cast<S>(sides[s].weights[i]), n, sum);
        },
        total);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) mean[s][j] = static_cast<S>(total[j]);
  }
  const int64_t counts[2] = {static_cast<int64_t>(sides[0].rows.size()),
                             static_cast<int64_t>(sides[1].rows.size())};
  for (int64_t i = 0; i < samples; ++i) {
    S centred[2][kColumns];
    for (int s = 0; s < 2; ++s) {
      if (i >= counts[s]) {
        std::fill_n(centred[s], n, S(0));
        continue;
      }
      const S* x = row(s, i);
      const S scale = static_cast<S>(sides[s].scales[i]);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        centred[s][j] = scale * ((x[j] - origin[s][j]) - mean[s][j]);
      }
    }
    S* d = difference + i * width + begin;
    S* e = sum + i * width + begin;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      d[j] = centred[0][j] - centred[1][j];
      e[j] = centred[0][j] + centred[1][j];
    }
  }
}

#define KDK_CENTRE(name, T, S)                                                                  \
  KDK_CLONES void name(const T* const bases[2], const int64_t strides[2], const Side sides[2],  \
                       int64_t samples, int64_t begin, int64_t n, int64_t width, S* difference, \
                       S* sum) {                                                                \
    centre(bases, strides, sides, samples, begin, n, width, difference, sum);                   \
  }
KDK_CENTRE(centre_of, float, float)
KDK_CENTRE(centre_of, Float16, float)
KDK_CENTRE(centre_of, BFloat16, float)
KDK_CENTRE(centre_of, double, double)
#undef KDK_CENTRE

// grad[rows of a side] = factor scale (a b (+ c d)), with a (samples, depth) in rows.
template <typename T>
struct Gradient {
  using S = typename Statistics<T>::Type;
  const S *a, *b, *c, *d;  // c and d may be null
  int64_t depth, a_stride;
  int64_t width, features;
  double factor;
  const Side* side;
  T* grad;

  void rows(int64_t begin, int64_t end, Buffer<S>& room) const {
    const int64_t n = end - begin;
    S* first = room.reserve(2 * n * width);
    S* second = first + n * width;
    product(n, width, depth, a + begin * a_stride, a_stride, 1, b, width, first, width);
    if (c != nullptr) {
      product(n, width, depth, c + begin * a_stride, a_stride, 1, d, width, second, width);
    }
    for (int64_t i = 0; i < n; ++i) {
      const S scale = static_cast<S>(factor * side->scales[begin + i]);
      S* row = first + i * width;
      const S* other = second + i * width;
      for (int64_t j = 0; j < features; ++j) {
        row[j] = scale * (c == nullptr ? row[j] : row[j] + other[j]);
      }
      narrow_row(row, features, grad + side->rows[begin + i] * features);
    }
  }
};

// a and b become a + b and a - b.
template <typename S>
void butterfly(int64_t n, S* a, S* b) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const S sum = a[i] + b[i], difference = a[i] - b[i];
    a[i] = sum;
    b[i] = difference;
  }
}

template <typename T>
double run_job(const PairParams& params, const Job& job, int threads,
               Room<typename Statistics<T>::Type>& room) {
  using S = typename Statistics<T>::Type;
  const int64_t d = params.features, width = product_width(d);
  const int64_t counts[2] = {job.count_x, job.count_y};
  const int64_t samples_of[2] = {params.x_samples, params.y_samples};
  const int64_t strides[2] = {params.x_stride, params.y_stride};
  const T* bases[2] = {static_cast<const T*>(params.x) + job.problem * params.x_problem_stride,
                       static_cast<const T*>(params.y) + job.problem * params.y_problem_stride};
  const S* weights[2] = {static_cast<const S*>(params.x_weights),
                         static_cast<const S*>(params.y_weights)};
  T* grads[2] = {static_cast<T*>(params.grad_x), static_cast<T*>(params.grad_y)};
  bool there = true;
  for (int s = 0; s < 2; ++s) {
    if (weights[s] != nullptr) weights[s] += job.problem * samples_of[s];
    if (grads[s] != nullptr) grads[s] += job.problem * samples_of[s] * d;
    there = find_samples(weights[s], job, counts[s], room.sides[s]) && there;
  }
  for (int s = 0; s < 2; ++s) {
    if (there && static_cast<int64_t>(room.sides[s].rows.size()) == counts[s]) continue;
    zero_gradients(grads[s], job, counts[s], d);
  }
  if (!there) return 0;

  const auto samples =
      static_cast<int64_t>(std::max(room.sides[0].rows.size(), room.sides[1].rows.size()));
  S* difference = room.difference.reserve(samples * width);
  S* sum = room.sum.reserve(samples * width);
  share_out(d, kColumns, threads, [&](int64_t begin, int64_t end) {
    centre_of(bases, strides, room.sides, samples, begin, end - begin, width, difference, sum);
  });

  const bool by_features = d <= samples;
  const int64_t size = by_features ? d : samples, stride = product_width(size);
  S* cross = room.cross.reserve(size * stride);
  S *of_difference = nullptr, *of_sum = nullptr;
  room.losses.assign(size, 0.0);
  if (by_features) {
    share_out(size, kRows, threads, [&](int64_t begin, int64_t end) {
      product(end - begin, stride, samples, difference + begin, 1, width, sum, width,
              cross + begin * stride, stride);
    });
    // Its symmetric half is the difference of the covariances.
    share_out(size, kRows, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double squares = 0;
        for (int64_t j = 0; j <= i; ++j) {
          const S half = S(0.5) * (cross[i * stride + j] + cross[j * stride + i]);
          cross[i * stride + j] = cross[j * stride + i] = half;
          squares += (i == j ? 1.0 : 2.0) * static_cast<double>(half) * half;
        }
        room.losses[i] = squares;
      }
    });
  } else {
    S* packed[2] = {room.packed[0].reserve(d * stride), room.packed[1].reserve(d * stride)};
    of_difference = room.grams[0].reserve(size * stride);
    of_sum = room.grams[1].reserve(size * stride);
    share_out(stride, kRows, threads, [&](int64_t begin, int64_t end) {
      const int64_t rows = std::max<int64_t>(0, std::min(end, size) - begin);
      transpose(difference + begin * width, width, rows, end - begin, d, packed[0] + begin, stride);
      transpose(sum + begin * width, width, rows, end - begin, d, packed[1] + begin, stride);
    });
    share_out(size, kRows, threads, [&](int64_t begin, int64_t end) {
      const int64_t n = end - begin;
      const S* of_d = difference + begin * width;
      const S* of_e = sum + begin * width;
      product(n, stride, d, of_d, width, 1, packed[0], stride, of_difference + begin * stride,
              stride);
      product(n, stride, d, of_e, width, 1, packed[1], stride, of_sum + begin * stride, stride);
      product(n, stride, d, of_e, width, 1, packed[0], stride, cross + begin * stride, stride);
    });
    share_out(size, kRows, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double products = 0;
        for (int64_t j = 0; j < size; ++j) {
          products += static_cast<double>(of_difference[i * stride + j]) * of_sum[i * stride + j] +
                      static_cast<double>(cross[i * stride + j]) * cross[j * stride + i];
        }
        room.losses[i] = 0.5 * products;
      }
    });
  }
  double loss = 0;
  for (const double part : room.losses) loss += part;
  const double unit = 1 / (4.0 * static_cast<double>(d) * static_cast<double>(d));

  if (by_features && (grads[0] != nullptr || grads[1] != nullptr)) {
    share_out(samples, kRows, threads, [&](int64_t begin, int64_t end) {  // 2 A and 2 B
      butterfly((end - begin) * width, sum + begin * width, difference + begin * width);
    });
  }
  for (int s = 0; s < 2; ++s) {
    if (grads[s] == nullptr) continue;
    const double sign = s == 0 ? 1 : -1;
    Gradient<T> gradient = {by_features ? (s == 0 ? sum : difference) : nullptr,
                            by_features ? cross : sum,
                            nullptr,
                            by_features ? nullptr : difference,
                            by_features ? d : samples,
                            by_features ? width : stride,
                            width,
                            d,
                            by_features ? 2 * sign * unit : unit,
                            &room.sides[s],
                            grads[s]};
    share_out(static_cast<int64_t>(room.sides[s].rows.size()), kRows, threads,
              [&](int64_t begin, int64_t end) {
                Buffer<S> own, mixed;
                Gradient<T> part = gradient;
                if (!by_features) {
                  // (E + D)(D^T E + E^T D) of x, (E - D)(...) of y, through the samples' products.
                  const int64_t n = end - begin;
                  S* of_e = mixed.reserve(2 * n * stride);
                  S* of_d = of_e + n * stride;
                  for (int64_t i = begin; i < end; ++i) {
                    for (int64_t j = 0; j < size; ++j) {
                      const S across = cross[i * stride + j], back = cross[j * stride + i];
                      const S e = of_sum[i * stride + j], f = of_difference[i * stride + j];
                      of_e[(i - begin) * stride + j] = s == 0 ? across + f : f - across;
                      of_d[(i - begin) * stride + j] = s == 0 ? e + back : back - e;
                    }
                  }
                  part.a = of_e - begin * stride;
                  part.c = of_d - begin * stride;
                }
                part.rows(begin, end, own);
              });
  }
  return loss * unit;
}

template <typename T>
void run_jobs(const PairParams& params, int threads) {
  using S = typename Statistics<T>::Type;
  std::vector<Classes> classes;
  const std::vector<Job> jobs =
      jobs_of(params.problems, params.x_samples, params.y_samples, params.labels, classes);
  std::vector<double> losses(jobs.size());
  // Few problems one after the other, each on all threads; many beside one another.
  const auto count = static_cast<int64_t>(jobs.size());
  const bool together = count < 2 * threads;
  const auto run = [&](int64_t begin, int64_t end) {
    static thread_local Room<S> room;
    for (int64_t i = begin; i < end; ++i) {
      const double samples = static_cast<double>(std::max(jobs[i].count_x, jobs[i].count_y));
      const double d = static_cast<double>(params.features);
      const double useful = samples * d * std::min(samples, d) / kProductPerThread;
      const double most = together ? threads : 1;
      losses[i] =
          run_job<T>(params, jobs[i], static_cast<int>(std::clamp(useful, 1.0, most)), room);
    }
    for (Buffer<S>* buffer : {&room.difference, &room.sum, &room.cross, &room.grams[0],
                              &room.grams[1], &room.packed[0], &room.packed[1]}) {
      buffer->end_of_call();
    }
  };
  if (together) {
    run(0, count);
  } else {
    for_each_run_of_rows(count, params.x_samples * params.features * 64 / count, threads, run);
  }
  write_losses(jobs, losses, params.problems, static_cast<S*>(params.loss));
}

}  // namespace

void coral(const PairParams& params, int threads) {
  for_dtype(params.dtype, run_jobs<float>, run_jobs<Float16>, run_jobs<BFloat16>, run_jobs<double>)(
      params, threads);
}

}  // namespace kdkernels::cpu
