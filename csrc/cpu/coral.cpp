// CORAL on the CPU, of each class of each problem, with its gradients; formulas in
// kdkernels/ops/coral.py and ../kdkernels.h.
//
// With A and B the centred samples, scaled so that A^T A and B^T B are the covariances, and D = A -
// B, E = A + B: one product, D^T E, where there are at least as many samples as features, else
// three of samples with samples.
//
// Threads take contiguous runs of samples, which stay in their caches from one step to the next,
// whatever is summed over samples by parts of a fixed size, and each of these sums is one thread's,
// in one order: results do not depend on the number of threads.
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

// What a thread takes at once: samples that are summed and centred, and rows of a product; and
// columns for which sums are on the stack.
constexpr int64_t kSamples = 128;
constexpr int64_t kRows = 16;
constexpr int64_t kColumns = 256;
// Samples whose products are one part of a sum, at least: no more parts than take the room of the
// samples.
constexpr int64_t kDepth = 512;

// The samples of one side that have weight.
struct Side {
  std::vector<int64_t> rows;   // of the problem
  std::vector<double> scales;  // sqrt(w / (1 - sum w^2)), w adding up to 1
  std::vector<double> weights;
};

template <typename S>
struct Room {
  Side sides[2];
  Buffer<S> difference, sum, cross, grams[2], packed[2], means, origins;
  Buffer<double> totals;
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

// The samples of one side, of any type.
template <typename T>
struct Samples {
  const T* base;
  int64_t stride, features;
  const Side* side;
  int64_t count() const { return static_cast<int64_t>(side->rows.size()); }
  KDK_INLINE const T* row(int64_t i) const { return base + side->rows[i] * stride; }
};

// Sums of some samples times their weights, less the first of all: what is constant is exactly 0.
template <typename T, typename S>
KDK_INLINE void add_up(const Samples<T>& samples, int64_t begin, int64_t end, const S* origin,
                       double* total) {
  S buffer[kColumns];
  for (int64_t f = 0; f < samples.features; f += kColumns) {
    const int64_t n = std::min(kColumns, samples.features - f);
    sum_rows<S, kColumns>(
        std::max<int64_t>(0, end - begin), n,
        [&](int64_t i, S* sum) KDK_INLINED {
          add_values(widen_block(samples.row(begin + i) + f, n, buffer), origin + f,
                     static_cast<S>(samples.side->weights[begin + i]), n, sum);
        },
        total + f);
  }
}

// Some rows of D and E.
template <typename T, typename S>
KDK_INLINE void centre(const Samples<T>* sides, const S* const origins[2], const S* const means[2],
                       int64_t begin, int64_t end, int64_t width, S* difference, S* sum) {
  S buffer[kColumns], centred[2][kColumns];
  const int64_t features = sides[0].features;
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t f = 0; f < features; f += kColumns) {
      const int64_t n = std::min(kColumns, features - f);
      for (int s = 0; s < 2; ++s) {
        if (i >= sides[s].count()) {
          std::fill_n(centred[s], n, S(0));
          continue;
        }
        const S* x = widen_block(sides[s].row(i) + f, n, buffer);
        const S *origin = origins[s] + f, *mean = means[s] + f;
        const S scale = static_cast<S>(sides[s].side->scales[i]);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) centred[s][j] = scale * ((x[j] - origin[j]) - mean[j]);
      }
      S* d = difference + i * width + f;
      S* e = sum + i * width + f;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        d[j] = centred[0][j] - centred[1][j];
        e[j] = centred[0][j] + centred[1][j];
      }
    }
  }
}

#define KDK_SAMPLES(T, S)                                                                         \
  KDK_CLONES void add_up_rows(const Samples<T>& samples, int64_t begin, int64_t end,              \
                              const S* origin, double* total) {                                   \
    add_up(samples, begin, end, origin, total);                                                   \
  }                                                                                               \
  KDK_CLONES void centre_rows(const Samples<T>* sides, const S* const origins[2],                 \
                              const S* const means[2], int64_t begin, int64_t end, int64_t width, \
                              S* difference, S* sum) {                                            \
    centre(sides, origins, means, begin, end, width, difference, sum);                            \
  }
KDK_SAMPLES(float, float)
KDK_SAMPLES(Float16, float)
KDK_SAMPLES(BFloat16, float)
KDK_SAMPLES(double, double)
#undef KDK_SAMPLES

// a and b become a + b and a - b.
template <typename S>
KDK_INLINE void butterfly(int64_t n, S* a, S* b) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const S sum = a[i] + b[i], difference = a[i] - b[i];
    a[i] = sum;
    b[i] = difference;
  }
}

// a = scale (a + b); b may be null.
template <typename S>
KDK_INLINE void add_and_scale(int64_t n, S scale, const S* b, S* a) {
  if (b == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) a[i] *= scale;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) a[i] = scale * (a[i] + b[i]);
  }
}

#define KDK_VECTORS(S)                                                        \
  KDK_CLONES void butterfly_of(int64_t n, S* a, S* b) { butterfly(n, a, b); } \
  KDK_CLONES void add_and_scale_of(int64_t n, S scale, const S* b, S* a) {    \
    add_and_scale(n, scale, b, a);                                            \
  }
KDK_VECTORS(float)
KDK_VECTORS(double)
#undef KDK_VECTORS

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
      add_and_scale_of(features, scale, c == nullptr ? nullptr : second + i * width, row);
      narrow_row(row, features, grad + side->rows[begin + i] * features);
    }
  }
};

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

  const Samples<T> sides[2] = {{bases[0], strides[0], d, &room.sides[0]},
                               {bases[1], strides[1], d, &room.sides[1]}};
  const int64_t samples = std::max(sides[0].count(), sides[1].count());
  const int64_t pieces = (samples + kSamples - 1) / kSamples;
  S* difference = room.difference.reserve(samples * width);
  S* sum = room.sum.reserve(samples * width);
  S *origin = room.origins.reserve(2 * d), *mean = room.means.reserve(2 * d);
  S* const origins[2] = {origin, origin + d};
  S* const means[2] = {mean, mean + d};
  double* totals = room.totals.reserve(pieces * 2 * d);
  for (int s = 0; s < 2; ++s) widen_row(sides[s].row(0), d, origins[s]);
  share_out(samples, kSamples, threads, [&](int64_t begin, int64_t end) {
    for (int s = 0; s < 2; ++s) {
      add_up_rows(sides[s], begin, std::min(end, sides[s].count()), origins[s],
                  totals + (begin / kSamples * 2 + s) * d);
    }
  });
  share_out(d, kColumns, threads, [&](int64_t begin, int64_t end) {
    for (int s = 0; s < 2; ++s) {
      for (int64_t j = begin; j < end; ++j) {
        double total = 0;
        for (int64_t k = 0; k < pieces; ++k) total += totals[(k * 2 + s) * d + j];
        means[s][j] = static_cast<S>(total);
      }
    }
  });
  share_out(samples, kSamples, threads, [&](int64_t begin, int64_t end) {
    centre_rows(sides, origins, means, begin, end, width, difference, sum);
  });

  const bool by_features = d <= samples;
  const int64_t size = by_features ? d : samples, stride = product_width(size);
  const int64_t depth = std::max(kDepth, d);
  const int64_t parts = by_features ? (samples + depth - 1) / depth : 1;
  S* cross = room.cross.reserve(parts * size * stride);  // the parts, and then the sum in the first
  S *of_difference = nullptr, *of_sum = nullptr;
  room.losses.assign(size, 0.0);
  if (by_features) {
    const int64_t blocks = (size + kRows - 1) / kRows;
    share_out(parts * blocks, 1, threads, [&](int64_t i, int64_t) {
      const int64_t from = i / blocks * depth, first = i % blocks * kRows;
      product(std::min(kRows, size - first), stride, std::min(depth, samples - from),
              difference + from * width + first, 1, width, sum + from * width, width,
              cross + (i / blocks * size + first) * stride, stride);
    });
    share_out(size, kRows, threads, [&](int64_t begin, int64_t end) {
      for (int64_t k = 1; k < parts; ++k) {
        add_and_scale_of((end - begin) * stride, S(1), cross + (k * size + begin) * stride,
                         cross + begin * stride);
      }
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

  Gradient<T> gradients[2];
  for (int s = 0; s < 2; ++s) {
    const double sign = s == 0 ? 1 : -1;
    gradients[s] = {by_features ? (s == 0 ? sum : difference) : nullptr,
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
  }
  if (grads[0] == nullptr && grads[1] == nullptr) return loss * unit;
  share_out(samples, kRows, threads, [&](int64_t begin, int64_t end) {
    Buffer<S> own, mixed;
    if (by_features) {  // 2 A and 2 B
      butterfly_of((end - begin) * width, sum + begin * width, difference + begin * width);
    }
    for (int s = 0; s < 2; ++s) {
      const int64_t last = std::min(end, sides[s].count());
      if (grads[s] == nullptr || begin >= last) continue;
      Gradient<T> part = gradients[s];
      if (!by_features) {
        // (E + D)(D^T E + E^T D) of x, (E - D)(...) of y, through the samples' products.
        const int64_t n = last - begin;
        S* of_e = mixed.reserve(2 * n * stride);
        S* of_d = of_e + n * stride;
        for (int64_t i = begin; i < last; ++i) {
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
      part.rows(begin, last, own);
    }
  });
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
    for (Buffer<S>* buffer : {&room.difference, &room.sum, &room.cross, &room.means, &room.origins,
                              &room.grams[0], &room.grams[1], &room.packed[0], &room.packed[1]}) {
      buffer->end_of_call();
    }
    room.totals.end_of_call();
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
