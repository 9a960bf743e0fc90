// Maximum mean discrepancies and energy distances on the CPU, with their gradients, without the
// matrix of pairs.
//
// Samples are moved to their common centre and packed in panels. A task is one panel of samples: it
// meets the other panels four at a time in a tile of inner products, which becomes squared
// distances, kernel values, and coefficients of the gradient, all in the cache; the coefficients
// times the samples are added to the task's rows of the gradient. Sums within a side that have no
// gradient take half of the panels.
//
// |a|^2 + |b|^2 - 2 ab says little of a distance that is small beside |a| and |b|: such a pair is
// differenced, and its share of the gradient is made from the difference. Problems of few samples
// have nothing else.
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "../kdkernels.h"
#include "classes.h"
#include "convert.h"
#include "simd.h"
#include "tile_product.h"

namespace kdkernels::cpu {
namespace {

// Panels are three registers of 64 bytes wide, blocks of columns four panels: a float32 tile of 48
// rows and 192 columns is 36 KiB.
template <typename S>
constexpr int64_t kLane = 64 / static_cast<int64_t>(sizeof(S));
template <typename S>
constexpr int64_t kPanel = 3 * kLane<S>;
constexpr int64_t kBlockPanels = 4;
template <typename S>
constexpr int64_t kColumns = kBlockPanels * kPanel<S>;
// Features that a product sums before it adds to a tile.
constexpr int64_t kDepth = 512;
// A pair is differenced where its squared distance is below this share of |a|^2 + |b|^2, whose
// rounding is 64 times as large beside it.
constexpr double kNear = 1.0 / 64;
// But not where |a|^2 + |b|^2 is below so many squared bandwidths of a kernel that is smooth at 0:
// rounding moves its value by 8 eps at most there.
constexpr double kSmooth = 16;
// Problems of so many samples are differenced throughout: a panel would be mostly empty.
constexpr int64_t kFew = 32;
// Samples of a side that the centre is made of; any point near them would do.
constexpr int64_t kOfCentre = 256;
// Multiplications that take about 20 us, and so are worth another thread.
constexpr double kWorkPerThread = 1e6;

// The samples of one side that have weight.
template <typename S>
struct Side {
  std::vector<int64_t> rows;  // of the problem
  int64_t count;
  int64_t panels;
  double within;  // what a pair within the side is multiplied by
  S* z;           // (count, stride), 0 beyond the features
  S* packed;      // (panels, features, kPanel), 0 beyond count
  S* squares;     // (panels kPanel,) |z|^2
  S* weights;     // (panels kPanel,), adding up to 1
};

// The kernel of one problem; kDistance is the mean distance's.
constexpr int kDistance = -1;

template <typename S>
struct Kernel {
  int kind;                    // an MmdKernel, or kDistance
  std::vector<S> rates;        // of each bandwidth: what its exponent, or ratio, is multiplied by
  std::vector<int> squarings;  // of the kernel before it, that give this one; 0: computed
  S smooth;                    // |a|^2 + |b|^2 below which no pair is near
  bool of_products() const { return kind == static_cast<int>(MmdKernel::kPolynomial); }
};

template <typename S>
struct Room {
  Side<S> sides[2];
  Buffer<S> z, packed, squares, weights;
  Buffer<double> sums;
};

// What a task works in.
template <typename S>
struct Scratch {
  Buffer<S> tile, grad;
  S values[kColumns<S>];
  S slopes[kColumns<S>];
  S powers[kColumns<S>];
  S roots[kColumns<S>];
  int64_t near[kColumns<S>];
  S near_slopes[kColumns<S>];
  S slope_sums[kPanel<S>];
};

template <typename S>
struct Task {
  const Side<S>* sides;
  const Kernel<S>* kernel;
  int64_t features;
  int64_t stride;
  int side;
  int64_t panel;
  bool few;
  bool unbiased;
  bool cross;     // the other side's columns, too
  bool gradient;  // slope sums and coefficients; else half of the side's own panels
};

template <typename S>
KDK_INLINE S squared_distance(const S* a, const S* b, int64_t n) {
  S sum = S(0);
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += (a[j] - b[j]) * (a[j] - b[j]);
  return sum;
}

template <typename S>
KDK_INLINE S inner_product(const S* a, const S* b, int64_t n) {
  S sum = S(0);
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += a[j] * b[j];
  return sum;
}

// Below which squared distance a pair is near.
template <typename S>
KDK_INLINE S near_bound(S sum, S smooth) {
  return S(kNear) * (sum - smooth);
}

// Inner products become squared distances; returns how many are near.
template <typename S>
KDK_INLINE int to_squared_distances(S square, const S* squares, S smooth, int64_t n, S* row) {
  int near = 0;
#pragma omp simd reduction(+ : near)
  for (int64_t j = 0; j < n; ++j) {
    const S sum = square + squares[j];
    const S value = sum - 2 * row[j];
    row[j] = value < S(0) ? S(0) : value;
    near += row[j] < near_bound(sum, smooth) ? 1 : 0;
  }
  return near;
}

// Below this a kernel's value is 0: its product with a weight would be a subnormal number.
constexpr float kLeastExponent = -80.0f;

KDK_INLINE float exponential(float x) { return select(x < kLeastExponent, 0.0f, exp2_unbiased(x)); }
KDK_INLINE double exponential(double x) { return std::exp2(x); }

// values = sum_u 2^(rate_u x), slopes = sum_u rate_u 2^(rate_u x), rates <= 0.
template <typename S>
KDK_INLINE void exponentials(const Kernel<S>& kernel, const S* x, int64_t n, S* values, S* slopes,
                             S* powers) {
  for (size_t u = 0; u < kernel.rates.size(); ++u) {
    const S rate = kernel.rates[u];
    if (kernel.squarings[u] == 0) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) powers[j] = exponential(rate * x[j]);
    }
    for (int squaring = 0; squaring < kernel.squarings[u]; ++squaring) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        powers[j] = powers[j] < S(0x1p-40) ? S(0) : powers[j] * powers[j];
      }
    }
    if (u == 0) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        values[j] = powers[j];
        slopes[j] = rate * powers[j];
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        values[j] += powers[j];
        slopes[j] += rate * powers[j];
      }
    }
  }
}

template <typename S>
KDK_INLINE void square_roots(const S* x, int64_t n, S* roots) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) roots[j] = std::sqrt(x[j]);
}

// slopes = factor slopes / roots, and 0 where the root is.
template <typename S>
KDK_INLINE void divide_by_roots(const S* roots, S factor, int64_t n, S* slopes) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    slopes[j] = roots[j] > S(0) ? factor * slopes[j] / roots[j] : S(0);
  }
}

template <typename S>
KDK_INLINE void cubes(S rate, const S* x, int64_t n, S* values, S* slopes) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const S base = rate * x[j] + S(1), square = base * base;
    values[j] += square * base;
    slopes[j] += S(3) * rate * square;
  }
}

template <typename S>
KDK_INLINE void inverse_multiquadrics(S rate, const S* x, int64_t n, S* values, S* slopes) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const S ratio = S(1) / (S(1) + rate * x[j]), root = std::sqrt(ratio);
    values[j] += root;
    slopes[j] -= S(0.5) * rate * (ratio * root);
  }
}

// Kernel values, and their derivatives by x: the squared distance (polynomial: the inner product).
template <typename S>
KDK_INLINE void evaluate(const Kernel<S>& kernel, const S* x, int64_t n, Scratch<S>& scratch) {
  S* values = scratch.values;
  S* slopes = scratch.slopes;
  const auto kind = static_cast<MmdKernel>(kernel.kind);
  if (kind == MmdKernel::kRbf) {
    exponentials(kernel, x, n, values, slopes, scratch.powers);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) slopes[j] *= static_cast<S>(kLn2);
  } else if (kind == MmdKernel::kLaplacian) {
    square_roots(x, n, scratch.roots);
    exponentials(kernel, scratch.roots, n, values, slopes, scratch.powers);
    divide_by_roots(scratch.roots, static_cast<S>(0.5 * kLn2), n, slopes);
  } else if (kind == MmdKernel::kEnergy || kernel.kind == kDistance) {
    const S sign = kernel.kind == kDistance ? S(1) : S(-1);
    square_roots(x, n, scratch.roots);
    for (int64_t j = 0; j < n; ++j) {
      values[j] = sign * scratch.roots[j];
      slopes[j] = sign;
    }
    divide_by_roots(scratch.roots, S(0.5), n, slopes);
  } else {
    std::fill_n(values, n, S(0));
    std::fill_n(slopes, n, S(0));
    for (const S rate : kernel.rates) {
      if (kind == MmdKernel::kPolynomial) cubes(rate, x, n, values, slopes);
      if (kind == MmdKernel::kImq) inverse_multiquadrics(rate, x, n, values, slopes);
    }
  }
}

template <typename S>
KDK_INLINE S weighted_sum(const S* weights, const S* values, int64_t n) {
  S sum = S(0);
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += weights[j] * values[j];
  return sum;
}

// row = factor weights slopes, whose sum is returned.
template <typename S>
KDK_INLINE S coefficients(const S* weights, const S* slopes, S factor, int64_t n, S* row) {
  S sum = S(0);
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    row[j] = factor * weights[j] * slopes[j];
    sum += row[j];
  }
  return sum;
}

template <typename S>
KDK_INLINE void add_scaled(S scale, const S* x, int64_t n, S* to) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] += scale * x[j];
}

template <typename S>
KDK_INLINE void add_scaled_difference(S scale, const S* a, const S* b, int64_t n, S* to) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] += scale * (a[j] - b[j]);
}

// A block of the tile: sample i of the task's side against `columns` samples of the other, from
// `first` on. Returns the weighted sum of kernel values; leaves the coefficients in `row`.
template <typename S>
KDK_INLINE double run_row(const Task<S>& task, const Side<S>& own, const Side<S>& other, int64_t i,
                          int64_t local, int64_t first, int64_t columns, S factor, S* row, S* grad,
                          Scratch<S>& scratch) {
  const bool products = task.kernel->of_products();
  const S* z = own.z + i * task.stride;
  const S* others = other.z + first * task.stride;
  int64_t near = 0;
  if (products) {
    if (task.few) {
      for (int64_t j = 0; j < columns; ++j) {
        row[j] = inner_product(z, others + j * task.stride, task.stride);
      }
    }
  } else if (task.few) {
    for (int64_t j = 0; j < columns; ++j) {
      row[j] = squared_distance(z, others + j * task.stride, task.stride);
      scratch.near[near++] = j;
    }
  } else if (to_squared_distances(own.squares[i], other.squares + first, task.kernel->smooth,
                                  columns, row) > 0) {
    for (int64_t j = 0; j < columns; ++j) {
      if (row[j] < near_bound(own.squares[i] + other.squares[first + j], task.kernel->smooth)) {
        row[j] = squared_distance(z, others + j * task.stride, task.stride);
        scratch.near[near++] = j;
      }
    }
  }
  evaluate(*task.kernel, row, columns, scratch);
  if (task.unbiased && &own == &other && i >= first && i < first + columns) {
    scratch.values[i - first] = scratch.slopes[i - first] = S(0);
  }
  const S* weights = other.weights + first;
  const double sum = weighted_sum(weights, scratch.values, columns);
  if (!task.gradient) return sum;
  if (task.few && products) {
    coefficients(weights, scratch.slopes, factor, columns, row);
    for (int64_t j = 0; j < columns; ++j) {
      add_scaled(row[j], others + j * task.stride, task.stride, grad);
    }
    return sum;
  }
  for (int64_t k = 0; k < near; ++k) {
    const int64_t j = scratch.near[k];
    scratch.near_slopes[k] = factor * weights[j] * scratch.slopes[j];
    scratch.slopes[j] = S(0);
  }
  scratch.slope_sums[local] += coefficients(weights, scratch.slopes, factor, columns, row);
  for (int64_t k = 0; k < near; ++k) {
    // The gradient is the slopes' sum times z, less `grad`.
    add_scaled_difference(-scratch.near_slopes[k], z, others + scratch.near[k] * task.stride,
                          task.stride, grad);
  }
  return sum;
}

template <typename S, int kBytes, int kRows>
KDK_INLINE void gram_tile(const Task<S>& task, const Side<S>& own, const Side<S>& other,
                          int64_t rows, int64_t first_panel, int64_t panels, S* tile) {
  constexpr int64_t kWidth = 3 * Lanes<S, kBytes>::kCount;
  const int64_t panel_size = task.features * kPanel<S>;
  for (int64_t k = 0; k < task.features; k += kDepth) {
    const int64_t depth = std::min(kDepth, task.features - k);
    const S* a = own.packed + task.panel * panel_size + k * kPanel<S>;
    for (int64_t q = 0; q < panels; ++q) {
      const S* b = other.packed + (first_panel + q) * panel_size + k * kPanel<S>;
      for (int64_t c = 0; c < kPanel<S>; c += kWidth) {
        for (int64_t r = 0; r < rows; r += kRows) {
          multiply<S, kBytes, kRows, 3>(a + r, 1, kPanel<S>, b + c, kPanel<S>, depth, k > 0,
                                        tile + r * kColumns<S> + q * kPanel<S> + c, kColumns<S>);
        }
      }
    }
  }
}

// grad += tile times samples.
template <typename S, int kBytes, int kRows>
KDK_INLINE void add_gradient(const S* tile, const S* z, int64_t rows, int64_t columns,
                             int64_t stride, S* grad) {
  constexpr int64_t kCount = Lanes<S, kBytes>::kCount;
  int64_t f = 0;
  for (; f + 3 * kCount <= stride; f += 3 * kCount) {
    for (int64_t r = 0; r < rows; r += kRows) {
      multiply<S, kBytes, kRows, 3>(tile + r * kColumns<S>, kColumns<S>, 1, z + f, stride, columns,
                                    true, grad + r * stride + f, stride);
    }
  }
  for (; f < stride; f += kCount) {
    for (int64_t r = 0; r < rows; r += kRows) {
      multiply<S, kBytes, kRows, 1>(tile + r * kColumns<S>, kColumns<S>, 1, z + f, stride, columns,
                                    true, grad + r * stride + f, stride);
    }
  }
}

// Sums of w_i w_j k_ij over the task's rows: of pairs within its side, and of pairs across. With a
// gradient, the rows' gradients by z are left in scratch.grad.
template <typename S, int kBytes, int kRows>
KDK_INLINE void run_task(const Task<S>& task, Scratch<S>& scratch, double* within, double* across) {
  const Side<S>& own = task.sides[task.side];
  const int64_t begin = task.panel * kPanel<S>, stride = task.stride;
  const int64_t rows = std::min(kPanel<S>, own.count - begin);
  S* tile = scratch.tile.reserve(kPanel<S> * kColumns<S>);
  S* grad = nullptr;
  if (task.gradient) {
    grad = scratch.grad.reserve(kPanel<S> * stride);
    std::fill_n(grad, kPanel<S> * stride, S(0));
    std::fill_n(scratch.slope_sums, kPanel<S>, S(0));
  }
  *within = *across = 0;
  for (int which = 0; which < (task.cross ? 2 : 1); ++which) {
    const Side<S>& other = task.sides[which == 0 ? task.side : 1 - task.side];
    const bool half = which == 0 && !task.gradient;
    const S factor = static_cast<S>(which == 0 ? own.within : -1);
    int64_t panels;
    for (int64_t q = half ? task.panel : 0; q < other.panels; q += panels) {
      // By halves, the panel's square is whole, and what is beyond it counts twice.
      const bool diagonal = half && q == task.panel;
      panels = diagonal ? 1 : std::min(kBlockPanels, other.panels - q);
      const int64_t first = q * kPanel<S>;
      const int64_t columns = std::min(panels * kPanel<S>, other.count - first);
      if (!task.few) gram_tile<S, kBytes, kRows>(task, own, other, rows, q, panels, tile);
      double sum = 0;
      for (int64_t r = 0; r < rows; ++r) {
        sum += own.weights[begin + r] * run_row(task, own, other, begin + r, r, first, columns,
                                                factor, tile + r * kColumns<S>,
                                                grad == nullptr ? nullptr : grad + r * stride,
                                                scratch);
      }
      (which == 0 ? *within : *across) += half && !diagonal ? 2 * sum : sum;
      if (task.gradient && !task.few) {
        add_gradient<S, kBytes, kRows>(tile, other.z + first * stride, rows, columns, stride, grad);
      }
    }
  }
  if (!task.gradient) return;
  const bool products = task.kernel->of_products();
  for (int64_t r = 0; r < rows; ++r) {
    const S* z = own.z + (begin + r) * stride;
    const S weight = own.weights[begin + r], sum = scratch.slope_sums[r];
    S* to = grad + r * stride;
    if (products) {
#pragma omp simd
      for (int64_t j = 0; j < stride; ++j) to[j] = 2 * weight * to[j];
    } else {
#pragma omp simd
      for (int64_t j = 0; j < stride; ++j) to[j] = 4 * weight * (sum * z[j] - to[j]);
    }
  }
}

#ifdef KDK_ISAS
KDK_V4 void task_v4(const Task<float>& t, Scratch<float>& s, double* within, double* across) {
  run_task<float, 64, 8>(t, s, within, across);
}
KDK_V4 void task_v4(const Task<double>& t, Scratch<double>& s, double* within, double* across) {
  run_task<double, 64, 8>(t, s, within, across);
}
KDK_V3 void task_v3(const Task<float>& t, Scratch<float>& s, double* within, double* across) {
  run_task<float, 32, 4>(t, s, within, across);
}
KDK_V3 void task_v3(const Task<double>& t, Scratch<double>& s, double* within, double* across) {
  run_task<double, 32, 4>(t, s, within, across);
}
#endif

template <typename S>
void any_task(const Task<S>& task, Scratch<S>& scratch, double* within, double* across) {
#ifdef KDK_ISAS
  if (isa() == 4) return task_v4(task, scratch, within, across);
  if (isa() == 3) return task_v3(task, scratch, within, across);
#endif
  run_task<S, 16, 4>(task, scratch, within, across);
}

// The samples' rows of one panel, less the centre, and packed.
template <typename T>
KDK_INLINE void prepare_panel(const MmdParams& params, const T* base, int64_t row_stride,
                              const typename Statistics<T>::Type* centre, int64_t panel,
                              int64_t stride, bool pack, Side<typename Statistics<T>::Type>& side) {
  using S = typename Statistics<T>::Type;
  constexpr int64_t kBlock = 256;
  S buffer[kBlock];
  const int64_t d = params.features, begin = panel * kPanel<S>;
  const int64_t rows = std::min(kPanel<S>, side.count - begin);
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = base + side.rows[begin + r] * row_stride;
    S* z = side.z + (begin + r) * stride;
    for (int64_t f = 0; f < d; f += kBlock) {
      const int64_t n = std::min(kBlock, d - f);
      const S* wide = widen_block(x + f, n, buffer);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) z[f + j] = wide[j] - centre[f + j];
    }
    std::fill(z + d, z + stride, S(0));
    side.squares[begin + r] = inner_product(z, z, stride);
  }
  if (!pack) return;
  S* packed = side.packed + panel * d * kPanel<S>;
  for (int64_t f = 0; f < d; f += kLane<S>) {
    const int64_t n = std::min(kLane<S>, d - f);
    for (int64_t r = 0; r < kPanel<S>; ++r) {
      const S* z = side.z + (begin + r) * stride + f;
      for (int64_t j = 0; j < n; ++j) packed[(f + j) * kPanel<S> + r] = r < rows ? z[j] : S(0);
    }
  }
}

KDK_CLONES void prepare(const MmdParams& p, const float* x, int64_t x_stride, const float* centre,
                        int64_t panel, int64_t stride, bool pack, Side<float>& side) {
  prepare_panel(p, x, x_stride, centre, panel, stride, pack, side);
}
KDK_CLONES void prepare(const MmdParams& p, const Float16* x, int64_t x_stride, const float* centre,
                        int64_t panel, int64_t stride, bool pack, Side<float>& side) {
  prepare_panel(p, x, x_stride, centre, panel, stride, pack, side);
}
KDK_CLONES void prepare(const MmdParams& p, const BFloat16* x, int64_t x_stride,
                        const float* centre, int64_t panel, int64_t stride, bool pack,
                        Side<float>& side) {
  prepare_panel(p, x, x_stride, centre, panel, stride, pack, side);
}
KDK_CLONES void prepare(const MmdParams& p, const double* x, int64_t x_stride, const double* centre,
                        int64_t panel, int64_t stride, bool pack, Side<double>& side) {
  prepare_panel(p, x, x_stride, centre, panel, stride, pack, side);
}

// body(i, scratch) for i in [0, n), shared out as threads come free.
template <typename S, typename Body>
void for_each(int64_t n, int threads, const Body& body) {
  if (threads <= 1 || n <= 1) {
    Scratch<S> scratch;
    for (int64_t i = 0; i < n; ++i) body(i, scratch);
    return;
  }
#pragma omp parallel num_threads(static_cast<int>(std::min<int64_t>(threads, n)))
  {
    Scratch<S> scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < n; ++i) body(i, scratch);
  }
}

// What the distances of a problem are multiplied by: from its bandwidths, or their mean distance.
template <typename S>
Kernel<S> kernel_of(const MmdParams& params, double mean_distance) {
  Kernel<S> kernel;
  kernel.kind = static_cast<int>(params.kernel);
  kernel.smooth = S(0);
  if (params.kernel == MmdKernel::kEnergy) return kernel;
  std::vector<double> bandwidths;
  if (params.bandwidths == nullptr) {
    bandwidths.push_back(params.kernel == MmdKernel::kPolynomial
                             ? std::sqrt(static_cast<double>(params.features))
                         : mean_distance == 0 ? 1
                                              : mean_distance);
  } else {
    const S* given = static_cast<const S*>(params.bandwidths);
    bandwidths.assign(given, given + params.bandwidth_count);
  }
  // Widest first: a narrower one may be a power of it.
  std::sort(bandwidths.begin(), bandwidths.end(), [](double a, double b) { return a > b; });
  if (params.kernel == MmdKernel::kRbf || params.kernel == MmdKernel::kImq) {
    kernel.smooth = static_cast<S>(kSmooth * bandwidths.back() * bandwidths.back());
  }
  double computed = 0;  // the rate that powers are taken of
  double previous = 0;
  for (const double bandwidth : bandwidths) {
    const double square = bandwidth * bandwidth;
    const double rate = params.kernel == MmdKernel::kRbf         ? -0.5 * kLog2E / square
                        : params.kernel == MmdKernel::kLaplacian ? -kLog2E / bandwidth
                                                                 : 1 / square;
    // A power of more than 4 would show that exponentials are rounded.
    const bool close = params.kernel != MmdKernel::kImq && rate / computed < 4.5;
    const double ratio = rate / previous;
    const auto is = [ratio](double power) {
      return std::abs(ratio / power - 1) < (sizeof(S) == 4 ? 1e-7 : 1e-15);
    };
    const int squarings = close && is(2) ? 1 : close && is(4) ? 2 : 0;
    if (squarings == 0) computed = rate;
    previous = rate;
    kernel.rates.push_back(static_cast<S>(rate));
    kernel.squarings.push_back(squarings);
  }
  return kernel;
}

// Sums over all pairs: within x, within y, across.
template <typename S, typename Store>
void run_pairs(const Side<S>* sides, const Kernel<S>& kernel, int64_t features, int64_t stride,
               bool few, bool unbiased, const bool* gradient, int threads, Buffer<double>& room,
               double* sums, const Store& store) {
  const int64_t panels = sides[0].panels + sides[1].panels;
  double* each = room.reserve(2 * panels);
  // Pairs across are summed by one side, but visited by all that have a gradient.
  const int summing = gradient[1] && !gradient[0] ? 1 : 0;
  for_each<S>(panels, threads, [&](int64_t i, Scratch<S>& scratch) {
    const int side = i < sides[0].panels ? 0 : 1;
    const int64_t panel = side == 0 ? i : i - sides[0].panels;
    const Task<S> task = {sides,         &kernel,  features,
                          stride,        side,     panel,
                          few,           unbiased, gradient[side] || side == summing,
                          gradient[side]};
    any_task(task, scratch, each + 2 * i, each + 2 * i + 1);
    if (task.gradient) store(side, panel, scratch.grad.reserve(0));
  });
  sums[0] = sums[1] = sums[2] = 0;
  for (int64_t i = 0; i < panels; ++i) {  // in their order, whatever the number of threads
    const int side = i < sides[0].panels ? 0 : 1;
    sums[side] += each[2 * i];
    if (side == summing) sums[2] += each[2 * i + 1];
  }
}

template <typename T>
double run_job(const MmdParams& params, const Job& job, int threads,
               Room<typename Statistics<T>::Type>& room) {
  using S = typename Statistics<T>::Type;
  const int64_t d = params.features, stride = (d + kLane<S> - 1) / kLane<S> * kLane<S>;
  const int64_t counts[2] = {job.count_x, job.count_y};
  const int64_t samples[2] = {params.x_samples, params.y_samples};
  const int64_t row_strides[2] = {params.x_stride, params.y_stride};
  const T* bases[2] = {static_cast<const T*>(params.x) + job.problem * params.x_problem_stride,
                       static_cast<const T*>(params.y) + job.problem * params.y_problem_stride};
  const S* weights[2] = {static_cast<const S*>(params.x_weights),
                         static_cast<const S*>(params.y_weights)};
  T* grads[2] = {static_cast<T*>(params.grad_x), static_cast<T*>(params.grad_y)};
  Side<S>* sides = room.sides;
  double totals[2];
  bool there = true;
  for (int s = 0; s < 2; ++s) {
    if (weights[s] != nullptr) weights[s] += job.problem * samples[s];
    if (grads[s] != nullptr) grads[s] += job.problem * samples[s] * d;
    Side<S>& side = sides[s];
    const WeightSums sums = find_weighted(weights[s], job, counts[s], side.rows);
    totals[s] = sums.total;
    side.count = static_cast<int64_t>(side.rows.size());
    side.panels = (side.count + kPanel<S> - 1) / kPanel<S>;
    side.within = params.unbiased ? 1 / sums.left() : 1;
    there = there && side.count >= (params.unbiased ? 2 : 1);
  }
  for (int s = 0; s < 2; ++s) {
    if (!there || sides[s].count < counts[s]) zero_gradients(grads[s], job, counts[s], d);
  }
  if (!there) return 0;

  const int64_t count = sides[0].count + sides[1].count;
  const int64_t panels = sides[0].panels + sides[1].panels;
  const bool few = count <= kFew;
  const bool products = params.kernel == MmdKernel::kPolynomial;
  const auto at = [](S* whole, int s, int64_t offset) { return s == 0 ? whole : whole + offset; };
  S* z = room.z.reserve((count + 1) * stride);
  S* packed = few ? nullptr : room.packed.reserve(panels * d * kPanel<S>);
  S* squares = room.squares.reserve(panels * kPanel<S>);
  S* shares = room.weights.reserve(panels * kPanel<S>);
  S* centre = z + count * stride;
  for (int s = 0; s < 2; ++s) {
    sides[s].z = at(z, s, sides[0].count * stride);
    sides[s].packed = few ? nullptr : at(packed, s, sides[0].panels * d * kPanel<S>);
    sides[s].squares = at(squares, s, sides[0].panels * kPanel<S>);
    sides[s].weights = at(shares, s, sides[0].panels * kPanel<S>);
    for (int64_t i = 0; i < sides[s].panels * kPanel<S>; ++i) {
      sides[s].weights[i] =
          i < sides[s].count ? static_cast<S>(weight_of(weights[s], sides[s].rows[i]) / totals[s])
                             : S(0);
    }
  }
  std::fill_n(centre, stride, S(0));
  if (!products) {
    int64_t taken = 0;
    for (int s = 0; s < 2; ++s) {
      const int64_t step = (sides[s].count + kOfCentre - 1) / kOfCentre;
      for (int64_t i = 0; i < sides[s].count; i += step, ++taken) {
        const T* row = bases[s] + sides[s].rows[i] * row_strides[s];
        S buffer[256];
        for (int64_t f = 0; f < d; f += 256) {
          const int64_t n = std::min<int64_t>(256, d - f);
          const S* wide = widen_block(row + f, n, buffer);
          for (int64_t j = 0; j < n; ++j) centre[f + j] += wide[j];
        }
      }
    }
    for (int64_t f = 0; f < d; ++f) centre[f] /= static_cast<S>(taken);
  }
  for_each<S>(panels, threads, [&](int64_t i, Scratch<S>&) {
    const int s = i < sides[0].panels ? 0 : 1;
    prepare(params, bases[s], row_strides[s], centre, s == 0 ? i : i - sides[0].panels, stride,
            !few, sides[s]);
  });
  // What is equal has distance 0, and not what rounding leaves.
  if (!params.unbiased && sides[0].count == sides[1].count &&
      std::equal(shares, shares + sides[0].count, sides[1].weights) &&
      std::equal(z, z + sides[0].count * stride, sides[1].z)) {
    for (int s = 0; s < 2; ++s) zero_gradients(grads[s], job, counts[s], d);
    return 0;
  }

  double sums[3];
  double mean_distance = 0;
  const auto nothing = [](int, int64_t, const S*) {};
  if (params.bandwidths == nullptr && !products && params.kernel != MmdKernel::kEnergy) {
    const Kernel<S> distance = {kDistance, {}, {}, S(0)};
    const bool no_gradient[2] = {false, false};
    run_pairs(sides, distance, d, stride, few, false, no_gradient, threads, room.sums, sums,
              nothing);
    mean_distance = (sums[0] + sums[1] + sums[2]) / 3;
  }
  const Kernel<S> kernel = kernel_of<S>(params, mean_distance);
  const bool gradient[2] = {grads[0] != nullptr, grads[1] != nullptr};
  run_pairs(sides, kernel, d, stride, few, params.unbiased, gradient, threads, room.sums, sums,
            [&](int s, int64_t panel, const S* grad) {
              const int64_t begin = panel * kPanel<S>;
              const int64_t rows = std::min(kPanel<S>, sides[s].count - begin);
              for (int64_t r = 0; r < rows; ++r) {
                narrow_row(grad + r * stride, d, grads[s] + sides[s].rows[begin + r] * d);
              }
            });
  const double loss = sides[0].within * sums[0] + sides[1].within * sums[1] - 2 * sums[2];
  return !params.unbiased && loss < 0 ? 0 : loss;
}

template <typename T>
void run_jobs(const MmdParams& params, int threads) {
  using S = typename Statistics<T>::Type;
  std::vector<Classes> classes;
  const std::vector<Job> jobs =
      jobs_of(params.problems, params.x_samples, params.y_samples, params.labels, classes);
  // Large problems one after the other, each on all threads; small ones beside one another.
  const auto work = [&](const Job& job) {
    const double count = static_cast<double>(job.count_x + job.count_y);
    return count * count * static_cast<double>(params.features);
  };
  std::vector<double> losses(jobs.size());
  std::vector<int64_t> small;
  double small_work = 0;
  Room<S> room;
  for (size_t i = 0; i < jobs.size(); ++i) {
    const double useful = work(jobs[i]) / kWorkPerThread;
    if (useful < 8 && jobs.size() > 1) {
      small.push_back(static_cast<int64_t>(i));
      small_work += useful;
    } else {
      const int count = static_cast<int>(std::min<double>(threads, std::max(1.0, useful)));
      losses[i] = run_job<T>(params, jobs[i], count, room);
    }
  }
  const int count = static_cast<int>(std::min<double>(threads, std::max(1.0, small_work)));
  const int64_t pieces = std::min<int64_t>(static_cast<int64_t>(small.size()), 8 * count);
  for_each<S>(pieces, count, [&](int64_t piece, Scratch<S>&) {
    Room<S> own;
    const int64_t n = static_cast<int64_t>(small.size());
    for (int64_t i = n * piece / pieces; i < n * (piece + 1) / pieces; ++i) {
      losses[small[i]] = run_job<T>(params, jobs[small[i]], 1, own);
    }
  });
  write_losses(jobs, losses, params.problems, static_cast<S*>(params.loss));
}

}  // namespace

void mmd(const MmdParams& params, int threads) {
  for_dtype(params.dtype, run_jobs<float>, run_jobs<Float16>, run_jobs<BFloat16>, run_jobs<double>)(
      params, threads);
}

}  // namespace kdkernels::cpu
