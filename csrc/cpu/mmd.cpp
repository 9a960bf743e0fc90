// Maximum mean discrepancies and energy distances on the CPU, with their gradients, without the
// matrix of pairs.
//
// Samples are moved to their common centre and packed in panels. A panel meets up to four others in
// a tile of inner products, which becomes squared distances, kernel values, and coefficients of the
// gradient, all in the cache. Each pair is met once: the coefficients times the samples of either
// side are added to the gradient of the other.
//
// A task is a pair of blocks of panels, and adds to the gradients of both. Tasks are in rounds in
// which every block is in one of them, and a block's come one after the other: threads need no sums
// of their own, and all is added in the same order whatever their number.
//
// |a|^2 + |b|^2 - 2 ab says little of a distance that is small beside |a| and |b|: such a pair is
// differenced, and its share of the gradient is made from the difference. Problems of few samples
// have nothing else.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <thread>
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
  S* slopes;      // (panels kPanel,) sum_j c_ij, with c_ij = w_i w_j dk_ij / d|z_i - z_j|^2
  S* grad;        // (panels kPanel, stride) sum_j c_ij z_j; nullptr where none is wanted
};

// Panels of one side.
struct PanelBlock {
  int side;
  int64_t begin, end;
  bool operator==(const PanelBlock& other) const {
    return side == other.side && begin == other.begin;
  }
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
  Buffer<S> z, packed, squares, weights, slopes, grad;
};

// What a task works in.
template <typename S>
struct Scratch {
  Buffer<S> tile;
  S values[kColumns<S>];
  S slopes[kColumns<S>];
  S powers[kColumns<S>];
  S roots[kColumns<S>];
  int64_t near[kColumns<S>];
};

template <typename S>
struct Problem {
  const Side<S>* sides;
  const Kernel<S>* kernel;
  int64_t features;
  int64_t width;   // the features in whole registers
  int64_t stride;  // of rows: an odd number of lines, which no few sets of a cache have to hold
  bool few;
  bool unbiased;
};

// Samples of one side, a panel of them from `begin` on, against samples of the same or the other
// from `first` on, and whose gradients want their pairs.
template <typename S>
struct Tile {
  const Side<S>* own;
  const Side<S>* other;
  int64_t begin, rows, first, columns;
  S factor;  // of all coefficients
  bool to_rows, to_columns;
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
KDK_INLINE void add_to(const S* x, int64_t n, S* to) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] += x[j];
}

// scale (a - b) is taken off a's sum and added to b's, of those that are there.
template <typename S>
KDK_INLINE void add_scaled_difference(S scale, const S* a, const S* b, int64_t n, S* to_a,
                                      S* to_b) {
  if (to_a != nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to_a[j] -= scale * (a[j] - b[j]);
  }
  if (to_b != nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to_b[j] += scale * (a[j] - b[j]);
  }
}

// Row `local` of a tile of inner products. Returns the weighted sum of kernel values; leaves the
// coefficients in `row`, but those of near pairs, which are done with.
template <typename S>
KDK_INLINE double run_row(const Problem<S>& problem, const Tile<S>& tile, int64_t local, S* row,
                          Scratch<S>& scratch) {
  const bool products = problem.kernel->of_products();
  const Side<S>&own = *tile.own, &other = *tile.other;
  const int64_t i = tile.begin + local, first = tile.first, columns = tile.columns;
  const int64_t stride = problem.stride;
  const S smooth = problem.kernel->smooth;
  const S* z = own.z + i * stride;
  const S* others = other.z + first * stride;
  int64_t near = 0;
  if (products) {
    if (problem.few) {
      for (int64_t j = 0; j < columns; ++j) {
        row[j] = inner_product(z, others + j * stride, stride);
      }
    }
  } else if (problem.few) {
    for (int64_t j = 0; j < columns; ++j) {
      row[j] = squared_distance(z, others + j * stride, stride);
      scratch.near[near++] = j;
    }
  } else if (to_squared_distances(own.squares[i], other.squares + first, smooth, columns, row) >
             0) {
    for (int64_t j = 0; j < columns; ++j) {
      if (row[j] < near_bound(own.squares[i] + other.squares[first + j], smooth)) {
        row[j] = squared_distance(z, others + j * stride, stride);
        scratch.near[near++] = j;
      }
    }
  }
  evaluate(*problem.kernel, row, columns, scratch);
  if (problem.unbiased && &own == &other && i >= first && i < first + columns) {
    scratch.values[i - first] = scratch.slopes[i - first] = S(0);
  }
  const S* weights = other.weights + first;
  const double sum = own.weights[i] * weighted_sum(weights, scratch.values, columns);
  if (!tile.to_rows && !tile.to_columns) return sum;

  const S factor = tile.factor * own.weights[i];
  S* grad = tile.to_rows ? own.grad + i * stride : nullptr;
  S* grads = tile.to_columns ? other.grad + first * stride : nullptr;
  const auto grad_of = [&](int64_t j) { return grads == nullptr ? nullptr : grads + j * stride; };
  if (problem.few && products) {
    coefficients(weights, scratch.slopes, factor, columns, row);
    for (int64_t j = 0; j < columns; ++j) {
      if (grad != nullptr) add_scaled(row[j], others + j * stride, stride, grad);
      if (grads != nullptr) add_scaled(row[j], z, stride, grad_of(j));
    }
    return sum;
  }
  for (int64_t k = 0; k < near; ++k) {
    const int64_t j = scratch.near[k];
    // The gradient is the slopes' sum times z, less `grad`.
    add_scaled_difference(factor * weights[j] * scratch.slopes[j], z, others + j * stride, stride,
                          grad, grad_of(j));
    scratch.slopes[j] = S(0);
  }
  const S slopes = coefficients(weights, scratch.slopes, factor, columns, row);
  if (tile.to_rows) own.slopes[i] += slopes;
  if (tile.to_columns) add_to(row, columns, other.slopes + first);
  return sum;
}

template <typename S, int kBytes, int kRows>
KDK_INLINE void gram_tile(const Problem<S>& problem, const Tile<S>& tile, S* products) {
  constexpr int64_t kWidth = 3 * Lanes<S, kBytes>::kCount;
  for (int64_t k = 0; k < problem.features; k += kDepth) {
    const int64_t depth = std::min(kDepth, problem.features - k);
    const S* a = tile.own->packed + tile.begin * problem.features + k * kPanel<S>;
    for (int64_t q = 0; q < tile.columns; q += kPanel<S>) {
      const S* b = tile.other->packed + (tile.first + q) * problem.features + k * kPanel<S>;
      for (int64_t c = 0; c < kPanel<S>; c += kWidth) {
        for (int64_t r = 0; r < tile.rows; r += kRows) {
          multiply<S, kBytes, kRows, 3>(a + r, 1, kPanel<S>, b + c, kPanel<S>, depth, k > 0,
                                        products + r * kColumns<S> + q + c, kColumns<S>);
        }
      }
    }
  }
}

// grad_i += sum_j c_ij z_j, with c_ij at c[i row + j step].
template <typename S, int kBytes, int kRows>
KDK_INLINE void add_gradient(const S* c, int64_t row, int64_t step, const S* z, int64_t rows,
                             int64_t depth, int64_t width, int64_t stride, S* grad) {
  constexpr int64_t kCount = Lanes<S, kBytes>::kCount;
  int64_t f = 0;
  for (; f + 3 * kCount <= width; f += 3 * kCount) {
    for (int64_t r = 0; r < rows; r += kRows) {
      multiply<S, kBytes, kRows, 3>(c + r * row, row, step, z + f, stride, depth, true,
                                    grad + r * stride + f, stride);
    }
  }
  for (; f < width; f += kCount) {
    for (int64_t r = 0; r < rows; r += kRows) {
      multiply<S, kBytes, kRows, 1>(c + r * row, row, step, z + f, stride, depth, true,
                                    grad + r * stride + f, stride);
    }
  }
}

// The sum of w_i w_j k_ij over a tile's pairs, and what they add to the gradients.
template <typename S, int kBytes, int kRows>
KDK_INLINE double run_tile(const Problem<S>& problem, const Tile<S>& tile, Scratch<S>& scratch) {
  S* products = scratch.tile.reserve(kPanel<S> * kColumns<S>);
  if (!problem.few) gram_tile<S, kBytes, kRows>(problem, tile, products);
  double sum = 0;
  for (int64_t r = 0; r < tile.rows; ++r) {
    sum += run_row(problem, tile, r, products + r * kColumns<S>, scratch);
  }
  if (problem.few) return sum;
  const int64_t stride = problem.stride;
  if (tile.to_rows) {
    add_gradient<S, kBytes, kRows>(products, kColumns<S>, 1, tile.other->z + tile.first * stride,
                                   tile.rows, tile.columns, problem.width, stride,
                                   tile.own->grad + tile.begin * stride);
  }
  if (tile.to_columns) {
    add_gradient<S, kBytes, kRows>(products, 1, kColumns<S>, tile.own->z + tile.begin * stride,
                                   tile.columns, tile.rows, problem.width, stride,
                                   tile.other->grad + tile.first * stride);
  }
  return sum;
}

// The same over the pairs of two blocks, in either order where they are of one side.
template <typename S, int kBytes, int kRows>
KDK_INLINE double run_task(const Problem<S>& problem, const PanelBlock& a, const PanelBlock& b,
                           Scratch<S>& scratch) {
  const Side<S>&own = problem.sides[a.side], &other = problem.sides[b.side];
  const bool within = a.side == b.side;
  double sum = 0;
  for (int64_t p = a.begin; p < a.end; ++p) {
    int64_t panels;
    for (int64_t q = a == b ? p : b.begin; q < b.end; q += panels) {
      const bool diagonal = within && q == p;  // the panel with itself: has both orders
      panels = diagonal ? 1 : std::min(kBlockPanels, b.end - q);
      Tile<S> tile;
      tile.own = &own;
      tile.other = &other;
      tile.begin = p * kPanel<S>;
      tile.rows = std::min(kPanel<S>, own.count - tile.begin);
      tile.first = q * kPanel<S>;
      tile.columns = std::min(panels * kPanel<S>, other.count - tile.first);
      tile.factor = static_cast<S>(within ? own.within : -1);
      tile.to_rows = own.grad != nullptr;
      tile.to_columns = other.grad != nullptr && !diagonal;
      const double part = run_tile<S, kBytes, kRows>(problem, tile, scratch);
      sum += within && !diagonal ? 2 * part : part;
    }
  }
  return sum;
}

// From the sums of a sample to its gradient, in their place.
template <typename S>
KDK_INLINE void to_gradient(const Problem<S>& problem, const Side<S>& side, int64_t i) {
  const S* z = side.z + i * problem.stride;
  const S sum = side.slopes[i];
  S* grad = side.grad + i * problem.stride;
  if (problem.kernel->of_products()) {
#pragma omp simd
    for (int64_t j = 0; j < problem.stride; ++j) grad[j] = 2 * grad[j];
  } else {
#pragma omp simd
    for (int64_t j = 0; j < problem.stride; ++j) grad[j] = 4 * (sum * z[j] - grad[j]);
  }
}

#ifdef KDK_ISAS
#define KDK_TASK(name, attribute, S, bytes, rows)                                            \
  attribute double name(const Problem<S>& problem, const PanelBlock& a, const PanelBlock& b, \
                        Scratch<S>& scratch) {                                               \
    return run_task<S, bytes, rows>(problem, a, b, scratch);                                 \
  }
KDK_TASK(task_v4, KDK_V4, float, 64, 8)
KDK_TASK(task_v4, KDK_V4, double, 64, 8)
KDK_TASK(task_v3, KDK_V3, float, 32, 4)
KDK_TASK(task_v3, KDK_V3, double, 32, 4)
#undef KDK_TASK
#endif

template <typename S>
double any_task(const Problem<S>& problem, const PanelBlock& a, const PanelBlock& b,
                Scratch<S>& scratch) {
#ifdef KDK_ISAS
  if (isa() == 4) return task_v4(problem, a, b, scratch);
  if (isa() == 3) return task_v3(problem, a, b, scratch);
#endif
  return run_task<S, 16, 4>(problem, a, b, scratch);
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

// body(i, scratch) for i in [0, n), taken one after the other as threads come free.
template <typename S, typename Body>
void in_order(int64_t n, int threads, const Body& body) {
  if (threads <= 1 || n <= 1) {
    Scratch<S> scratch;
    for (int64_t i = 0; i < n; ++i) body(i, scratch);
    return;
  }
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(static_cast<int>(std::min<int64_t>(threads, n)))
  {
    Scratch<S> scratch;
    for (int64_t i = next++; i < n; i = next++) body(i, scratch);
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

// Panels in a block: of few, one each, so that all threads have work.
int64_t panels_of_block(int64_t panels) { return panels < 32 ? 1 : panels < 64 ? 2 : kBlockPanels; }

// Sums over all pairs: within x, within y, across. Gradients are left in the sides', and given to
// `store(side, i)`.
template <typename S, typename Store>
void run_pairs(const Problem<S>& problem, int threads, double* sums, const Store& store) {
  const Side<S>* sides = problem.sides;
  const int64_t panels = sides[0].panels + sides[1].panels;
  const int64_t size = panels_of_block(panels);
  std::vector<PanelBlock> blocks;
  for (int side = 0; side < 2; ++side) {
    for (int64_t p = 0; p < sides[side].panels; p += size) {
      blocks.push_back({side, p, std::min(p + size, sides[side].panels)});
    }
  }
  const auto count = static_cast<int64_t>(blocks.size());
  // Blocks i and j meet in round i + j, modulo an odd number of rounds: once, and each meets one in
  // a round, itself included (or none, where there is an even number of blocks).
  const int64_t rounds = count + (count + 1) % 2;
  std::vector<double> within(count), across(count);
  std::vector<std::atomic<int64_t>> done(count);  // rounds
  const auto await = [&](int64_t i, int64_t round) {
    while (done[i].load(std::memory_order_acquire) != round) std::this_thread::yield();
  };
  // Taken in this order, a task waits for none that has not been taken.
  const auto meet = [&](int64_t round, int64_t i, Scratch<S>& scratch) {
    const int64_t j = (round + rounds - i) % rounds;
    if (i > j) return;
    await(i, round);
    if (j < count) {
      await(j, round);
      const double sum = any_task(problem, blocks[i], blocks[j], scratch);
      (blocks[i].side == blocks[j].side ? within : across)[i] += sum;
      done[j].store(round + 1, std::memory_order_release);
    }
    done[i].store(round + 1, std::memory_order_release);
  };
  const auto finish = [&](int64_t k) {
    const PanelBlock& block = blocks[k];
    const Side<S>& side = sides[block.side];
    if (side.grad == nullptr) return;
    const int64_t end = std::min(block.end * kPanel<S>, side.count);
    for (int64_t i = block.begin * kPanel<S>; i < end; ++i) {
      to_gradient(problem, side, i);
      store(block.side, i);
    }
  };
  const int64_t useful = std::max<int64_t>(1, (count + 1) / 2);
  in_order<S>(rounds * count, static_cast<int>(std::min<int64_t>(threads, useful)),
              [&](int64_t k, Scratch<S>& scratch) { meet(k / count, k % count, scratch); });
  in_order<S>(count, threads, [&](int64_t k, Scratch<S>&) { finish(k); });
  sums[0] = sums[1] = sums[2] = 0;
  for (int64_t i = 0; i < count; ++i) {
    sums[blocks[i].side] += within[i];
    sums[2] += across[i];
  }
}

template <typename T>
double run_job(const MmdParams& params, const Job& job, int threads,
               Room<typename Statistics<T>::Type>& room) {
  using S = typename Statistics<T>::Type;
  const int64_t d = params.features, width = (d + kLane<S> - 1) / kLane<S> * kLane<S>;
  const int64_t stride = width / kLane<S> % 2 == 0 ? width + kLane<S> : width;
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
  S* slopes = room.slopes.reserve(panels * kPanel<S>);
  S* centre = z + count * stride;
  for (int s = 0; s < 2; ++s) {
    sides[s].z = at(z, s, sides[0].count * stride);
    sides[s].packed = few ? nullptr : at(packed, s, sides[0].panels * d * kPanel<S>);
    sides[s].squares = at(squares, s, sides[0].panels * kPanel<S>);
    sides[s].weights = at(shares, s, sides[0].panels * kPanel<S>);
    sides[s].slopes = at(slopes, s, sides[0].panels * kPanel<S>);
    sides[s].grad = nullptr;
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
  in_order<S>(panels, threads, [&](int64_t i, Scratch<S>&) {
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
  Problem<S> problem = {sides, nullptr, d, width, stride, few, false};
  if (params.bandwidths == nullptr && !products && params.kernel != MmdKernel::kEnergy) {
    const Kernel<S> distance = {kDistance, {}, {}, S(0)};
    problem.kernel = &distance;
    run_pairs(problem, threads, sums, [](int, int64_t) {});
    mean_distance = (sums[0] + sums[1] + sums[2]) / 3;
  }
  const Kernel<S> kernel = kernel_of<S>(params, mean_distance);
  problem.kernel = &kernel;
  problem.unbiased = params.unbiased;
  if (grads[0] != nullptr || grads[1] != nullptr) {
    // Tiles are whole, pairs are not.
    const int64_t rows = few ? count : panels * kPanel<S>;
    S* grad = room.grad.reserve(rows * stride);
    std::fill_n(slopes, panels * kPanel<S>, S(0));
    std::fill_n(grad, rows * stride, S(0));
    for (int s = 0; s < 2; ++s) {
      const int64_t before = few ? sides[0].count : sides[0].panels * kPanel<S>;
      if (grads[s] != nullptr) sides[s].grad = at(grad, s, before * stride);
    }
  }
  run_pairs(problem, threads, sums, [&](int s, int64_t i) {
    narrow_row(sides[s].grad + i * stride, d, grads[s] + sides[s].rows[i] * d);
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
  in_order<S>(pieces, count, [&](int64_t piece, Scratch<S>&) {
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
