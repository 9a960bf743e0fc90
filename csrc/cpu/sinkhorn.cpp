// Sinkhorn iterations on the CPU; csrc/kdkernels.h has the formulas, kdkernels/ops/sinkhorn.py the
// iteration.
//
// In scaling form around absorbed potentials F, G (which the iteration moves seldom):
//
//   K_ij = e^((F_i + G_j - C_ij) / eps),  f = F + eps log u,  g = G + eps log v
//   s_i = sum_j K_ij b_j v_j,  u = 1 / s or sqrt(u / s);  the same of columns for v
//
// so that an iteration is one pass over K: a group of rows meets b v, and while it is in the cache
// its products with a u are added to the columns' sums. u and v are absorbed, and K made anew, when
// eps changes and where one of them leaves [1e-8, 1e8].
//
// K is kept where it has no more than kMaxStored elements. Otherwise each pass makes it again, a
// tile of rows at a time, from the points: that costs the distances and one exponential an element,
// and memory for a tile.
//
// Many problems go to a thread each; the rows of few are shared out. Blocks of rows and the order
// of their sums do not depend on that.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <new>
#include <vector>

#include "../kdkernels.h"
#include "parallel.h"
#include "simd.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are arguments of inlined functions only
#endif

namespace kdkernels::cpu {
namespace {

constexpr int64_t kMaxStored = int64_t{1} << 20;
constexpr int64_t kBlock = 128;  // rows whose columns' sums are one term
constexpr int64_t kTile = 32;    // rows made at a time; divides kBlock
constexpr int64_t kGroup = 8;    // rows in registers; divides kTile
constexpr int64_t kLineBytes = 64;
constexpr int kAveraged = 16;  // as kdkernels/ops/sinkhorn.py
constexpr int kCheck = 4;

// Elements of a panel: columns side by side, feature after feature.
template <typename T>
constexpr int64_t kLanes = kLineBytes / sizeof(T);

int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

template <typename T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  // What it held is lost.
  T* resize(int64_t size) {
    if (size > capacity_) {
      release();
      data_ = static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t{kLineBytes}));
      capacity_ = size;
    }
    return data_;
  }
  T* data() const { return data_; }

 private:
  void release() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t{kLineBytes});
  }
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

// ---------------------------------------------------------------- kernels on W lanes at a time

template <typename T, int W>
struct Lanes {
  typedef T Type __attribute__((vector_size(W * sizeof(T))));

  static KDK_INLINE Type load(const T* p) {
    Type v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static KDK_INLINE void store(T* p, Type v) { std::memcpy(p, &v, sizeof(v)); }
};

template <typename T, int W>
KDK_INLINE T sum_lanes(typename Lanes<T, W>::Type v) {
  if constexpr (W == 2) {
    return v[0] + v[1];
  } else {
    typename Lanes<T, W / 2>::Type low, high;
    std::memcpy(&low, &v, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return sum_lanes<T, W / 2>(low + high);
  }
}

// out[r][j] = sum_k (x_rk - y_jk)^2, or the products' sums, for `rows` rows and all panels.
template <typename T, int W, bool kProduct>
KDK_INLINE void pair_tile(const T* x, int64_t rows, int64_t d, const T* panels, int64_t ld,
                          T* out) {
  using V = Lanes<T, W>;
  constexpr int64_t kPanel = kLanes<T>;
  for (int64_t j = 0; j < ld; j += kPanel) {
    const T* panel = panels + j * d;
    for (int64_t i = 0; i < rows; i += kGroup) {
      const T* row[kGroup];
      for (int r = 0; r < kGroup; ++r) row[r] = x + std::min(i + r, rows - 1) * d;
      for (int64_t lane = 0; lane < kPanel; lane += W) {
        typename V::Type sum[kGroup] = {};
        for (int64_t k = 0; k < d; ++k) {
          const typename V::Type y = V::load(panel + k * kPanel + lane);
#pragma GCC unroll 8
          for (int r = 0; r < kGroup; ++r) {
            if (kProduct) {
              sum[r] += row[r][k] * y;
            } else {
              const typename V::Type difference = row[r][k] - y;
              sum[r] += difference * difference;
            }
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kGroup; ++r) V::store(out + (i + r) * ld + j + lane, sum[r]);
      }
    }
  }
}

// s_r = sum_j K_rj w_j of one group.
template <typename T, int W>
KDK_INLINE void row_sums(const T* K, int64_t ld, const T* w, T* s) {
  using V = Lanes<T, W>;
  typename V::Type sum[kGroup] = {};
  for (int64_t j = 0; j < ld; j += W) {
    const typename V::Type weight = V::load(w + j);
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; ++r) sum[r] += V::load(K + r * ld + j) * weight;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kGroup; ++r) s[r] = sum_lanes<T, W>(sum[r]);
}

// c_j += sum_r t_r K_rj of one group.
template <typename T, int W>
KDK_INLINE void add_columns(const T* K, int64_t ld, const T* t, T* c) {
  using V = Lanes<T, W>;
  for (int64_t j = 0; j < ld; j += W) {
    typename V::Type even = V::load(c + j), odd = V::load(K + ld + j) * t[1];
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; r += 2) {
      even += V::load(K + r * ld + j) * t[r];
      if (r > 0) odd += V::load(K + (r + 1) * ld + j) * t[r + 1];
    }
    V::store(c + j, even + odd);
  }
}

// out[r][k] = sum_j A_rj B_jk for one group and W columns k, B's rows `stride` apart.
template <typename T, int W>
KDK_INLINE void multiply_group(const T* A, int64_t ld, int64_t count, const T* B, int64_t stride,
                               T (*out)[W]) {
  using V = Lanes<T, W>;
  typename V::Type sum[kGroup] = {};
  for (int64_t j = 0; j < count; ++j) {
    const typename V::Type b = V::load(B + j * stride);
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; ++r) sum[r] += A[r * ld + j] * b;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kGroup; ++r) V::store(out[r], sum[r]);
}

// out (rows, d) = A (rows, count) B (count, d): `tail` has B's last columns, kLanes wide, filled
// up.
template <typename T, int W>
KDK_INLINE void multiply(const T* A, int64_t rows, int64_t ld, int64_t count, const T* B,
                         const T* tail, int64_t d, T* out) {
  const int64_t whole = d / kLanes<T> * kLanes<T>;
  for (int64_t k = 0; k < d; k += W) {
    const T* columns = k < whole ? B + k : tail + (k - whole);
    const int64_t stride = k < whole ? d : kLanes<T>;
    const int64_t width = std::min<int64_t>(W, d - k);
    for (int64_t i = 0; i < rows; i += kGroup) {
      T block[kGroup][W];
      multiply_group<T, W>(A + i * ld, ld, count, columns, stride, block);
      for (int64_t r = 0; r < std::min(kGroup, rows - i); ++r) {
        std::copy_n(block[r], width, out + (i + r) * d + k);
      }
    }
  }
}

// The balanced and the unbalanced step of a group: u from s.
template <typename T>
struct Step {
  bool average;
  bool unbalanced;
  T damping;  // lambda
  T pull;     // 1 / (rho + eps)
};

constexpr double kLeastSum = 1e-30;

KDK_INLINE double log_of(double x) { return std::log(x); }

// Relative error <= 2e-7, for normal numbers.
KDK_INLINE float log_of(float x) {
  const int32_t bits = static_cast<int32_t>(float_to_bits(x));
  const int32_t k = (bits - 0x3f3504f3) >> 23;
  const float f = bits_to_float(static_cast<uint32_t>(bits - k * (1 << 23))) - 1.0f;
  const float h = third_order_of_log(f);
  return static_cast<float>(k) * static_cast<float>(kLn2) + (f + f * f * (f * h - 0.5f));
}

template <typename T>
KDK_INLINE T clamp_exponent(T x) {
  const T y = x < T(80) ? x : T(80);
  return y > T(-120) ? y : T(-120);
}

// u after a step to the sums s, around the absorbed F.
template <typename T>
KDK_INLINE T stepped(T u, T s, T F, const Step<T>& step) {
  const T sum = s > T(kLeastSum) ? s : T(kLeastSum);
  if (!step.unbalanced) return step.average ? std::sqrt(u / sum) : T(1) / sum;
  // lambda (F - eps log s) = F + eps log u
  const T log_u = -step.damping * log_of(sum) - F * step.pull;
  const T exponent = step.average ? T(0.5) * (log_u + log_of(u)) : log_u;
  return exp2_unbiased(clamp_exponent(exponent * T(kLog2E)));
}

enum class Pass { kRowsOnly, kOldRows, kNewRows };

// One pass over a run of groups: u of the rows (in place), and what the rows add to the columns.
template <typename T, int W>
KDK_INLINE void pass_rows(Pass pass, const T* K, int64_t ld, int64_t rows, const T* w, const T* a,
                          const T* F, const Step<T>& step, T* u, T* next, T* c) {
  for (int64_t i = 0; i < rows; i += kGroup) {
    T s[kGroup], t[kGroup];
    row_sums<T, W>(K + i * ld, ld, w, s);
    for (int r = 0; r < kGroup; ++r) t[r] = a[i + r] * u[i + r];
    for (int r = 0; r < kGroup; ++r) next[i + r] = stepped(u[i + r], s[r], F[i + r], step);
    if (pass == Pass::kRowsOnly) continue;
    if (pass == Pass::kNewRows) {
      for (int r = 0; r < kGroup; ++r) t[r] = a[i + r] * next[i + r];
    }
    add_columns<T, W>(K + i * ld, ld, t, c);
  }
}

template <typename T>
struct Kernels {
  void (*squares)(const T* x, int64_t rows, int64_t d, const T* panels, int64_t ld, T* out);
  void (*products)(const T* x, int64_t rows, int64_t d, const T* panels, int64_t ld, T* out);
  void (*pass)(Pass pass, const T* K, int64_t ld, int64_t rows, const T* w, const T* a, const T* F,
               const Step<T>& step, T* u, T* next, T* c);
  void (*sums)(const T* K, int64_t ld, const T* w, T* s);
  void (*multiply)(const T* A, int64_t rows, int64_t ld, int64_t count, const T* B, const T* tail,
                   int64_t d, T* out);
};

// The kernels for one instruction set, with registers of `bytes`.
#define KDK_KERNELS(name, attribute, bytes)                                                        \
  template <typename T>                                                                            \
  struct name {                                                                                    \
    static constexpr int W = (bytes) / sizeof(T);                                                  \
    attribute static void squares(const T* x, int64_t rows, int64_t d, const T* p, int64_t ld,     \
                                  T* out) {                                                        \
      pair_tile<T, W, false>(x, rows, d, p, ld, out);                                              \
    }                                                                                              \
    attribute static void products(const T* x, int64_t rows, int64_t d, const T* p, int64_t ld,    \
                                   T* out) {                                                       \
      pair_tile<T, W, true>(x, rows, d, p, ld, out);                                               \
    }                                                                                              \
    attribute static void pass(Pass pass, const T* K, int64_t ld, int64_t rows, const T* w,        \
                               const T* a, const T* F, const Step<T>& step, T* u, T* next, T* c) { \
      pass_rows<T, W>(pass, K, ld, rows, w, a, F, step, u, next, c);                               \
    }                                                                                              \
    attribute static void sums(const T* K, int64_t ld, const T* w, T* s) {                         \
      row_sums<T, W>(K, ld, w, s);                                                                 \
    }                                                                                              \
    attribute static void multiply(const T* A, int64_t rows, int64_t ld, int64_t count,            \
                                   const T* B, const T* tail, int64_t d, T* out) {                 \
      cpu::multiply<T, W>(A, rows, ld, count, B, tail, d, out);                                    \
    }                                                                                              \
    static constexpr Kernels<T> table() { return {squares, products, pass, sums, multiply}; }      \
  };

KDK_KERNELS(Baseline, , 16)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
KDK_KERNELS(Avx2, __attribute__((target("arch=x86-64-v3"))), 32)
KDK_KERNELS(Avx512, __attribute__((target("arch=x86-64-v4"))), 64)
#endif

template <typename T>
Kernels<T> kernels_here() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    return Avx512<T>::table();
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Avx2<T>::table();
#endif
  return Baseline<T>::table();
}

// --------------------------------------------------------------------------- loops over one row

// From sums of pairs to costs, in place; the largest |cost| of the first `count`, infinity where
// one is not finite.
template <typename T>
KDK_INLINE T finish_row(Cost cost, const T* extra, int64_t count, int64_t ld, T* row) {
  if (cost == Cost::kEuclidean) {
#pragma omp simd
    for (int64_t j = 0; j < ld; ++j) row[j] = std::sqrt(row[j]);
  } else if (cost == Cost::kCosine) {
#pragma omp simd
    for (int64_t j = 0; j < ld; ++j) row[j] = T(1) - row[j];
  }
  if (extra != nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) row[j] += extra[j];
  }
  T largest = 0, zero = 0;
#pragma omp simd reduction(max : largest) reduction(+ : zero)
  for (int64_t j = 0; j < count; ++j) {
    largest = std::fabs(row[j]) > largest ? std::fabs(row[j]) : largest;
    zero += 0 * row[j];
  }
  return zero == 0 ? largest : std::numeric_limits<T>::infinity();
}

template <typename T>
KDK_INLINE void exponentials_row(const T* C, T F, const T* G, T factor, int64_t ld, T* K) {
#pragma omp simd
  for (int64_t j = 0; j < ld; ++j) {
    const T x = (F + G[j] - C[j]) * factor;
    K[j] = exp2_unbiased(x < T(80) ? x : T(80));
  }
}

// t_j = scale K_j w_j, and its sum.
template <typename T>
KDK_INLINE T scale_row(const T* K, T scale, const T* w, int64_t ld, T* t) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < ld; ++j) {
    t[j] = scale * K[j] * w[j];
    sum += t[j];
  }
  return sum;
}

// t_j /= C_j, and 0 where C_j is; the sum.
template <typename T>
KDK_INLINE T divide_row(const T* C, int64_t ld, T* t) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < ld; ++j) {
    const T inverse = T(1) / (C[j] > T(0) ? C[j] : T(1));
    t[j] = select(C[j] > T(0), t[j] * inverse, T(0));
    sum += t[j];
  }
  return sum;
}

// grad += factor (sum x - product), or of -product alone.
template <typename T>
KDK_INLINE void gradient_row(const T* x, T sum, const T* product, T factor, int64_t d, T* grad) {
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) grad[k] += factor * (sum * x[k] - product[k]);
}

template <typename T>
KDK_INLINE void absorb_all(T* u, T epsilon, int64_t count, T* F) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    F[i] += epsilon * log_of(u[i]);
    u[i] = 1;
  }
}

template <typename T>
KDK_INLINE bool in_range(const T* u, int64_t count) {
  T least = 1, most = 1;
#pragma omp simd reduction(min : least) reduction(max : most)
  for (int64_t i = 0; i < count; ++i) {
    least = u[i] < least ? u[i] : least;
    most = u[i] > most ? u[i] : most;
  }
  return least > T(1e-8) && most < T(1e8);
}

template <typename T>
KDK_INLINE void step_all(const T* s, const T* F, const Step<T>& step, int64_t count, T* u) {
  if (step.unbalanced) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) u[i] = stepped(u[i], s[i], F[i], step);
  } else if (step.average) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      u[i] = std::sqrt(u[i] / (s[i] > T(kLeastSum) ? s[i] : T(kLeastSum)));
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) u[i] = T(1) / (s[i] > T(kLeastSum) ? s[i] : T(kLeastSum));
  }
}

// Clones of the above for each element type, under one name.
KDK_CLONES float finish(Cost c, const float* e, int64_t n, int64_t ld, float* row) {
  return finish_row(c, e, n, ld, row);
}
KDK_CLONES double finish(Cost c, const double* e, int64_t n, int64_t ld, double* row) {
  return finish_row(c, e, n, ld, row);
}
KDK_CLONES void exponentials(const float* C, float F, const float* G, float c, int64_t ld,
                             float* K) {
  exponentials_row(C, F, G, c, ld, K);
}
KDK_CLONES void exponentials(const double* C, double F, const double* G, double c, int64_t ld,
                             double* K) {
  exponentials_row(C, F, G, c, ld, K);
}
KDK_CLONES float scale_by(const float* K, float scale, const float* w, int64_t ld, float* t) {
  return scale_row(K, scale, w, ld, t);
}
KDK_CLONES double scale_by(const double* K, double scale, const double* w, int64_t ld, double* t) {
  return scale_row(K, scale, w, ld, t);
}
KDK_CLONES float divide_by(const float* C, int64_t ld, float* t) { return divide_row(C, ld, t); }
KDK_CLONES double divide_by(const double* C, int64_t ld, double* t) { return divide_row(C, ld, t); }
KDK_CLONES void add_gradient(const float* x, float sum, const float* p, float c, int64_t d,
                             float* g) {
  gradient_row(x, sum, p, c, d, g);
}
KDK_CLONES void add_gradient(const double* x, double sum, const double* p, double c, int64_t d,
                             double* g) {
  gradient_row(x, sum, p, c, d, g);
}
KDK_CLONES void absorb(float* u, float eps, int64_t n, float* F) { absorb_all(u, eps, n, F); }
KDK_CLONES void absorb(double* u, double eps, int64_t n, double* F) { absorb_all(u, eps, n, F); }
KDK_CLONES bool safe(const float* u, int64_t n) { return in_range(u, n); }
KDK_CLONES bool safe(const double* u, int64_t n) { return in_range(u, n); }
KDK_CLONES void step_to(const float* s, const float* F, const Step<float>& step, int64_t n,
                        float* u) {
  step_all(s, F, step, n, u);
}
KDK_CLONES void step_to(const double* s, const double* F, const Step<double>& step, int64_t n,
                        double* u) {
  step_all(s, F, step, n, u);
}

// ------------------------------------------------------------------------------------ a problem

// Points of one side, as they come and as panels.
template <typename T>
struct Side {
  const T* points;   // (count, d)
  const T* weights;  // (count,)
  int64_t count;
  int64_t d;
  int64_t width;     // count, filled up to whole panels
  Buffer<T> panels;  // (width / lanes, d, lanes)
  Buffer<T> tail;    // (count, lanes): the last d % lanes features
  Buffer<T> padded;  // weights, and 0 beyond
  double mass;

  void set(const T* points_in, const T* weights_in, int64_t count_in, int64_t d_in) {
    constexpr int64_t L = kLanes<T>;
    points = points_in, weights = weights_in, count = count_in, d = d_in;
    width = round_up(round_up(count, L), kGroup);
    T* panel = panels.resize(width * d);
    for (int64_t j = 0; j < width; j += L) {
      for (int64_t lane = 0; lane < L; ++lane) {
        const T* point = points + std::min(j + lane, count - 1) * d;
        for (int64_t k = 0; k < d; ++k) panel[j * d + k * L + lane] = point[k];
      }
    }
    const int64_t whole = d / L * L;
    T* rest = tail.resize(count * L);
    if (whole < d) {
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t k = 0; k < L; ++k)
          rest[j * L + k] = whole + k < d ? points[j * d + whole + k] : T(0);
      }
    }
    T* w = padded.resize(round_up(width, kTile));
    mass = 0;
    for (int64_t j = 0; j < round_up(width, kTile); ++j) w[j] = j < count ? weights[j] : T(0);
    for (int64_t j = 0; j < count; ++j) mass += weights[j];
  }
};

// Runs blocks of rows here, or on a team.
struct Team {
  int threads;

  template <typename Body>
  void run(int64_t blocks, const Body& body) const {
    if (threads <= 1 || blocks <= 1) {
      for (int64_t block = 0; block < blocks; ++block) body(block);
      return;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t block = 0; block < blocks; ++block) body(block);
  }
};

template <typename T>
void fill(T* out, int64_t size, double value) {
  if (out != nullptr) std::fill_n(out, size, static_cast<T>(value));
}

template <typename T>
struct Tiles {
  Buffer<T> K, C, product;
};

template <typename T>
class Transport {
 public:
  Transport(const SinkhornParams& params, const Kernels<T>& kernels, const Team& team)
      : params_(params), kernels_(kernels), team_(team) {}

  // OT(rows, columns), whose value this returns; symmetric where both are the same side.
  double solve(const Side<T>& rows, const Side<T>& columns, const T* extra) {
    rows_ = &rows, columns_ = &columns, extra_ = extra;
    symmetric_ = &rows == &columns;
    ld_ = columns.width;
    height_ = round_up(rows.count, kTile);
    blocks_ = (rows.count + kBlock - 1) / kBlock;
    stored_ = rows.count * columns.count <= kMaxStored;
    T* F = F_.resize(std::max(height_, round_up(rows.width, kTile)));
    T* G = G_.resize(ld_);
    T* u = u_.resize(height_ + ld_);
    T* v = v_.resize(ld_ + height_);
    std::fill_n(F, height_, T(0));
    std::fill_n(G, ld_, T(0));
    std::fill_n(u, height_, T(1));
    std::fill_n(v, ld_, T(1));
    w_.resize(std::max(ld_, height_));
    next_.resize(height_);
    partial_.resize(blocks_ * ld_);
    largest_.resize(blocks_);
    if (stored_) C_.resize(height_ * ld_), K_.resize(height_ * ld_);
    find_costs();
    const double largest = *std::max_element(largest_.data(), largest_.data() + blocks_);
    finite_ = largest < INFINITY;
    if (!finite_) {
      f64_.assign(rows.count, NAN), g64_.assign(columns.count, NAN);
      return NAN;
    }
    if (rows.mass > 0 && columns.mass > 0) {
      iterate(largest);
    } else if (stored_) {  // there is nothing to move
      make_kernel(params_.epsilon);
    }
    return finish_potentials();
  }

  // The rows' (rows_of_columns: the columns') gradient, plus what there is, times `sign`; and r,
  // the rows' sums of e^((f + g - C) / eps) b. Null outputs are left out.
  void gradient(bool of_columns, T sign, T* grad, T* grad_weights, T* plan) {
    const Side<T>& here = of_columns ? *columns_ : *rows_;
    const Side<T>& there = of_columns ? *rows_ : *columns_;
    const T* scale = of_columns ? v_.data() : u_.data();
    const T* potential = of_columns ? g_.data() : f_.data();
    if (!finite_) {
      fill(grad, here.count * here.d, NAN), fill(grad_weights, here.count, NAN);
      fill(plan, here.count * there.count, NAN);
      return;
    }
    T* w = w_.data();
    const T* other = of_columns ? u_.data() : v_.data();
    for (int64_t j = 0; j < there.width; ++j)
      w[j] = there.padded.data()[j] * (j < there.count ? other[j] : T(1));
    const int64_t blocks = (here.count + kBlock - 1) / kBlock;
    team_.run(blocks, [&](int64_t block) {
      Tiles<T> tiles;
      const int64_t end = std::min(here.count, (block + 1) * kBlock);
      for (int64_t i = block * kBlock; i < end; i += kTile) {
        gradient_tile(of_columns, i, std::min(kTile, end - i), here, there, scale, w, potential,
                      sign, grad, grad_weights, plan, tiles);
      }
    });
  }

  const std::vector<double>& f() const { return f64_; }
  const std::vector<double>& g() const { return g64_; }
  double epsilon() const { return params_.epsilon; }

 private:
  // Costs of a tile of rows (of columns), into `out`.
  T cost_tile(bool of_columns, int64_t i, int64_t count, bool with_extra, T* out) {
    const Side<T>& here = of_columns ? *columns_ : *rows_;
    const Side<T>& there = of_columns ? *rows_ : *columns_;
    const int64_t ld = there.width;
    (params_.cost == Cost::kCosine ? kernels_.products : kernels_.squares)(
        here.points + i * here.d, count, here.d, there.panels.data(), ld, out);
    T largest = 0;
    for (int64_t r = 0; r < count; ++r) {
      const T* extra = nullptr;
      Buffer<T> column;
      if (with_extra && extra_ != nullptr) {
        extra = extra_ + (i + r) * columns_->count;
        if (of_columns) {
          T* copy = column.resize(there.count);
          for (int64_t j = 0; j < there.count; ++j) copy[j] = extra_[j * columns_->count + i + r];
          extra = copy;
        }
      }
      largest = std::max(largest, finish(params_.cost, extra, there.count, ld, out + r * ld));
    }
    // Rows that fill a group up.
    for (int64_t r = count; r < round_up(count, kGroup); ++r) std::copy_n(out, ld, out + r * ld);
    return largest;
  }

  void find_costs() {
    team_.run(blocks_, [&](int64_t block) {
      Tiles<T> tiles;
      const int64_t end = std::min(rows_->count, (block + 1) * kBlock);
      T largest = 0;
      for (int64_t i = block * kBlock; i < end; i += kTile) {
        T* out = stored_ ? C_.data() + i * ld_ : tiles.C.resize(kTile * ld_);
        largest = std::max(largest, cost_tile(false, i, std::min(kTile, end - i), true, out));
      }
      largest_.data()[block] = largest;
    });
  }

  void iterate(double largest) {
    const int steps = params_.iterations / 2;
    double ratio = 0.5;
    if (!(largest * std::pow(0.5, steps) <= params_.epsilon)) {
      ratio = std::pow(params_.epsilon / largest, 1.0 / std::max(steps, 1));
    }
    double last = 0;
    bool stale = true;  // K is not that of F, G and eps
    int levels = 0;
    T* u = u_.data();
    T* v = symmetric_ ? u : v_.data();
    const int64_t n = rows_->count, m = columns_->count;
    std::vector<double> before;
    for (int k = 0; k < params_.iterations; ++k) {
      double epsilon = steps > 0 ? largest * std::pow(ratio, k) : 0;
      if (epsilon > params_.epsilon * (1 + 1e-6)) {
        levels = k + 1;
      } else {
        epsilon = params_.epsilon;
      }
      if (epsilon != last) {
        if (last != 0) absorb_scalings(static_cast<T>(last));
        last = epsilon;
        stale = true;
      }
      const bool alternating = !symmetric_ && k >= levels + kAveraged;
      const bool unbalanced = params_.rho != INFINITY;
      const Step<T> step = {!alternating, unbalanced,
                            static_cast<T>(unbalanced ? params_.rho / (params_.rho + epsilon) : 1),
                            static_cast<T>(unbalanced ? 1 / (params_.rho + epsilon) : 0)};
      const bool look = params_.tol >= 0 && (k + 1) % kCheck == 0 && k >= levels;
      if (look) before = potentials(epsilon);
      one_pass(alternating  ? Pass::kNewRows
               : symmetric_ ? Pass::kRowsOnly
                            : Pass::kOldRows,
               step, epsilon, stale);
      stale = false;
      if (!safe(u, n) || (!symmetric_ && !safe(v, m))) {
        absorb_scalings(static_cast<T>(epsilon));
        stale = true;
      }
      if (look) {
        const std::vector<double> after = potentials(epsilon);
        double change = 0;
        for (size_t i = 0; i < after.size(); ++i)
          change = std::max(change, std::fabs(after[i] - before[i]));
        if (change <= params_.tol) break;
      }
    }
    if (stale) {  // the gradients take K
      const double epsilon = params_.epsilon;
      if (stored_) make_kernel(epsilon);
    }
  }

  std::vector<double> potentials(double epsilon) const {
    std::vector<double> all(rows_->count + (symmetric_ ? 0 : columns_->count));
    for (int64_t i = 0; i < rows_->count; ++i)
      all[i] = F_.data()[i] + epsilon * std::log(static_cast<double>(u_.data()[i]));
    for (size_t j = rows_->count; j < all.size(); ++j) {
      const int64_t i = j - rows_->count;
      all[j] = G_.data()[i] + epsilon * std::log(static_cast<double>(v_.data()[i]));
    }
    return all;
  }

  void absorb_scalings(T epsilon) {
    absorb(u_.data(), epsilon, rows_->count, F_.data());
    if (symmetric_) {
      std::copy_n(F_.data(), columns_->count, G_.data());
    } else {
      absorb(v_.data(), epsilon, columns_->count, G_.data());
    }
  }

  void kernel_tile(bool of_columns, const T* costs, int64_t i, int64_t count, double epsilon,
                   T* K) {
    const T* here = of_columns ? G_.data() : F_.data();
    const T* there = of_columns ? F_.data() : G_.data();
    const int64_t ld = (of_columns ? rows_ : columns_)->width;
    const T factor = static_cast<T>(kLog2E / epsilon);
    for (int64_t r = 0; r < round_up(count, kGroup); ++r) {
      exponentials(costs + r * ld, r < count ? here[i + r] : T(0), there, factor, ld, K + r * ld);
    }
  }

  void make_kernel(double epsilon) {
    team_.run(blocks_, [&](int64_t block) {
      const int64_t begin = block * kBlock, end = std::min(rows_->count, begin + kBlock);
      kernel_tile(false, C_.data() + begin * ld_, begin, end - begin, epsilon,
                  K_.data() + begin * ld_);
    });
  }

  void one_pass(Pass pass, const Step<T>& step, double epsilon, bool stale) {
    T* u = u_.data();
    T* v = symmetric_ ? u : v_.data();
    T* w = w_.data();
    const T* b = columns_->padded.data();
    for (int64_t j = 0; j < columns_->count; ++j) w[j] = b[j] * v[j];
    for (int64_t j = columns_->count; j < ld_; ++j) w[j] = 0;
    team_.run(blocks_, [&](int64_t block) {
      const int64_t begin = block * kBlock, end = std::min(rows_->count, begin + kBlock);
      T* c = partial_.data() + block * ld_;
      if (pass != Pass::kRowsOnly) std::fill_n(c, ld_, T(0));
      if (stored_) {
        T* K = K_.data() + begin * ld_;
        if (stale) kernel_tile(false, C_.data() + begin * ld_, begin, end - begin, epsilon, K);
        pass_tile(pass, K, begin, end - begin, step, c);
        return;
      }
      Tiles<T> tiles;
      T* tile = tiles.K.resize(kTile * ld_);
      for (int64_t i = begin; i < end; i += kTile) {
        const int64_t count = std::min(kTile, end - i);
        cost_tile(false, i, count, true, tile);
        kernel_tile(false, tile, i, count, epsilon, tile);
        pass_tile(pass, tile, i, count, step, c);
      }
    });
    std::copy_n(next_.data(), rows_->count, u);
    if (pass == Pass::kRowsOnly) return;
    T* c = partial_.data();
    for (int64_t block = 1; block < blocks_; ++block) {
      const T* more = partial_.data() + block * ld_;
#pragma omp simd
      for (int64_t j = 0; j < ld_; ++j) c[j] += more[j];
    }
    step_to(c, G_.data(), step, columns_->count, v);
  }

  void pass_tile(Pass pass, const T* K, int64_t i, int64_t count, const Step<T>& step, T* c) {
    kernels_.pass(pass, K, ld_, count, w_.data(), rows_->padded.data() + i, F_.data() + i, step,
                  u_.data() + i, next_.data() + i, c);
  }

  // f, g, and the value of the maximum there.
  double finish_potentials() {
    const double epsilon = params_.epsilon;
    const int64_t n = rows_->count, m = columns_->count;
    if (symmetric_) {
      std::copy_n(u_.data(), m, v_.data());
      std::copy_n(F_.data(), m, G_.data());
    }
    f64_.resize(n), g64_.resize(m);
    for (int64_t i = 0; i < n; ++i)
      f64_[i] = F_.data()[i] + epsilon * std::log(static_cast<double>(u_.data()[i]));
    for (int64_t j = 0; j < m; ++j)
      g64_[j] = G_.data()[j] + epsilon * std::log(static_cast<double>(v_.data()[j]));
    if (params_.rho == INFINITY) {
      double difference = 0;
      for (int64_t j = 0; j < m; ++j) difference += columns_->weights[j] * g64_[j];
      for (int64_t i = 0; i < n; ++i) difference -= rows_->weights[i] * f64_[i];
      for (double& f : f64_) f += difference / 2;
      for (double& g : g64_) g -= difference / 2;
    }
    f_.resize(n), g_.resize(m);
    double value = 0;
    for (int64_t i = 0; i < n; ++i) {
      f_.data()[i] = static_cast<T>(mass_of(f64_[i]));
      value += rows_->weights[i] * mass_of(f64_[i]);
    }
    for (int64_t j = 0; j < m; ++j) {
      g_.data()[j] = static_cast<T>(mass_of(g64_[j]));
      value += columns_->weights[j] * mass_of(g64_[j]);
    }
    return value - epsilon * (coupled_mass() - rows_->mass * columns_->mass);
  }

  double mass_of(double potential) const {
    return params_.rho == INFINITY ? potential
                                   : -params_.rho * std::expm1(-potential / params_.rho);
  }

  // sum_ij a_i b_j e^((f_i + g_j - C_ij) / eps)
  double coupled_mass() {
    T* w = w_.data();
    const T* b = columns_->padded.data();
    for (int64_t j = 0; j < ld_; ++j) w[j] = j < columns_->count ? b[j] * v_.data()[j] : T(0);
    T* sums = next_.data();
    team_.run(blocks_, [&](int64_t block) {
      const int64_t begin = block * kBlock, end = std::min(rows_->count, begin + kBlock);
      Tiles<T> tiles;
      for (int64_t i = begin; i < end; i += kTile) {
        const int64_t count = std::min(kTile, end - i);
        const T* K = stored_ ? K_.data() + i * ld_ : made_tile(false, i, count, tiles);
        for (int64_t r = 0; r < count; r += kGroup)
          kernels_.sums(K + r * ld_, ld_, w, sums + i + r);
      }
    });
    double total = 0;
    for (int64_t i = 0; i < rows_->count; ++i) {
      total += static_cast<double>(rows_->weights[i]) * u_.data()[i] * sums[i];
    }
    return total;
  }

  const T* made_tile(bool of_columns, int64_t i, int64_t count, Tiles<T>& tiles) {
    T* tile = tiles.K.resize(kTile * (of_columns ? rows_ : columns_)->width);
    cost_tile(of_columns, i, count, true, tile);
    kernel_tile(of_columns, tile, i, count, params_.epsilon, tile);
    return tile;
  }

  // A tile of K (or of C, which is stored where K is), also of columns.
  const T* stored_tile(const T* matrix, bool of_columns, int64_t i, int64_t count,
                       Buffer<T>& buffer) {
    if (!of_columns) return matrix + i * ld_;
    const int64_t ld = rows_->width;
    T* tile = buffer.resize(kTile * ld);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t j = rows_->count; j < ld; ++j) tile[r * ld + j] = 0;
    }
    for (int64_t j = 0; j < rows_->count; ++j) {
      const T* source = matrix + j * ld_ + i;
      for (int64_t r = 0; r < count; ++r) tile[r * ld + j] = source[r];
    }
    return tile;
  }

  void gradient_tile(bool of_columns, int64_t i, int64_t count, const Side<T>& here,
                     const Side<T>& there, const T* scale, const T* w, const T* potential, T sign,
                     T* grad, T* grad_weights, T* plan, Tiles<T>& tiles) {
    const int64_t ld = there.width, d = here.d;
    const T* K = stored_ ? stored_tile(K_.data(), of_columns, i, count, tiles.K)
                         : made_tile(of_columns, i, count, tiles);
    T* terms = tiles.product.resize(kTile * (ld + d));
    T* products = terms + kTile * ld;
    T sums[kTile];
    for (int64_t r = 0; r < count; ++r)
      sums[r] = scale_by(K + r * ld, scale[i + r], w, ld, terms + r * ld);
    const T* a = here.weights;
    if (grad_weights != nullptr) {
      for (int64_t r = 0; r < count; ++r) {
        const double excess = params_.epsilon * (sums[r] - there.mass);
        grad_weights[i + r] += sign * static_cast<T>(potential[i + r] - excess);
      }
    }
    if (plan != nullptr) {
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t j = 0; j < there.count; ++j)
          plan[(i + r) * there.count + j] = a[i + r] * terms[r * ld + j];
      }
    }
    if (grad == nullptr) return;
    T factor = params_.cost == Cost::kSquaredEuclidean ? T(2) : T(1);
    if (params_.cost == Cost::kEuclidean) {
      const T* C;
      if (stored_ && extra_ == nullptr) {
        C = stored_tile(C_.data(), of_columns, i, count, tiles.C);
      } else {
        T* costs = tiles.C.resize(kTile * ld);
        cost_tile(of_columns, i, count, false, costs);
        C = costs;
      }
      for (int64_t r = 0; r < count; ++r) sums[r] = divide_by(C + r * ld, ld, terms + r * ld);
    } else if (params_.cost == Cost::kCosine) {
      std::fill_n(sums, count, T(0));
    }
    for (int64_t r = count; r < round_up(count, kGroup); ++r) std::fill_n(terms + r * ld, ld, T(0));
    kernels_.multiply(terms, count, ld, there.count, there.points, there.tail.data(), d, products);
    for (int64_t r = 0; r < count; ++r) {
      add_gradient(here.points + (i + r) * d, sums[r], products + r * d, sign * factor * a[i + r],
                   d, grad + (i + r) * d);
    }
  }

  const SinkhornParams& params_;
  const Kernels<T>& kernels_;
  const Team& team_;
  const Side<T>* rows_ = nullptr;
  const Side<T>* columns_ = nullptr;
  const T* extra_ = nullptr;
  bool symmetric_ = false;
  bool stored_ = false;
  bool finite_ = true;
  int64_t ld_ = 0, height_ = 0, blocks_ = 0;
  Buffer<T> C_, K_, F_, G_, u_, v_, w_, next_, partial_, largest_, f_, g_;
  std::vector<double> f64_, g64_;
};

template <typename T>
T* row_of(void* base, int64_t index, int64_t size) {
  return base == nullptr ? nullptr : static_cast<T*>(base) + index * size;
}
template <typename T>
const T* row_of(const void* base, int64_t index, int64_t size) {
  return base == nullptr ? nullptr : static_cast<const T*>(base) + index * size;
}

template <typename T>
void store_potential(const std::vector<double>& values, T* out) {
  if (out == nullptr) return;
  for (size_t i = 0; i < values.size(); ++i) out[i] = static_cast<T>(values[i]);
}

// One problem with all that is asked of it.
template <typename T>
class Worker {
 public:
  Worker(const SinkhornParams& params, const Kernels<T>& kernels, const Team& team)
      : params_(params), transport_(params, kernels, team) {}

  void run(int64_t p) {
    const int64_t n = params_.n, m = params_.m, d = params_.d;
    x_.set(row_of<T>(params_.x, p, n * d), row_of<T>(params_.a, p, n), n, d);
    y_.set(row_of<T>(params_.y, p, m * d), row_of<T>(params_.b, p, m), m, d);
    T* f = row_of<T>(params_.f, p, n);
    T* g = row_of<T>(params_.g, p, m);
    T* grad_x = row_of<T>(params_.grad_x, p, n * d);
    T* grad_y = row_of<T>(params_.grad_y, p, m * d);
    T* grad_a = row_of<T>(params_.grad_a, p, n);
    T* grad_b = row_of<T>(params_.grad_b, p, m);
    T* plan = row_of<T>(params_.plan, p, n * m);
    const T* extra = row_of<T>(params_.extra, p, n * m);
    fill(grad_x, n * d, 0), fill(grad_y, m * d, 0), fill(grad_a, n, 0), fill(grad_b, m, 0);

    double value = 0;
    if (params_.debias) {
      const T* extra_x = row_of<T>(params_.extra_x, p, n * n);
      const T* extra_y = row_of<T>(params_.extra_y, p, m * m);
      // Half of a problem whose two sides are one: a side's gradient.
      value -= transport_.solve(x_, x_, extra_x) / 2;
      store_potential(transport_.f(), row_of<T>(params_.f_self, p, n));
      T* plan_x = row_of<T>(params_.plan_x, p, n * n);
      T* plan_y = row_of<T>(params_.plan_y, p, m * m);
      if (std::isfinite(value) && same(extra, extra_x) &&
          same(extra, extra_y)) {  // the same problem thrice
        store_potential(transport_.f(), f), store_potential(transport_.f(), g);
        store_potential(transport_.f(), row_of<T>(params_.g_self, p, m));
        for (T* out : {plan, plan_x, plan_y}) {
          if (out != nullptr) transport_.gradient(false, 0, nullptr, nullptr, out);
        }
        static_cast<T*>(params_.loss)[p] = 0;
        return;
      }
      if (grad_x || grad_a || plan_x) transport_.gradient(false, -1, grad_x, grad_a, plan_x);
      value -= transport_.solve(y_, y_, extra_y) / 2;
      store_potential(transport_.f(), row_of<T>(params_.g_self, p, m));
      if (grad_y || grad_b || plan_y) transport_.gradient(false, -1, grad_y, grad_b, plan_y);
    }
    value += transport_.solve(x_, y_, extra);
    store_potential(transport_.f(), f), store_potential(transport_.g(), g);
    if (grad_x || grad_a || plan) transport_.gradient(false, 1, grad_x, grad_a, plan);
    if (grad_y || grad_b) transport_.gradient(true, 1, grad_y, grad_b, nullptr);
    static_cast<T*>(params_.loss)[p] = static_cast<T>(value);
  }

 private:
  // x and y, their weights, and what is added to the costs.
  bool same(const T* extra, const T* other) const {
    const int64_t n = x_.count;
    return n == y_.count && std::equal(x_.points, x_.points + n * x_.d, y_.points) &&
           std::equal(x_.weights, x_.weights + n, y_.weights) &&
           (extra == nullptr || std::equal(extra, extra + n * n, other));
  }

  const SinkhornParams& params_;
  Transport<T> transport_;
  Side<T> x_, y_;
};

template <typename T>
void run_type(const SinkhornParams& params, int threads) {
  static const Kernels<T> kernels = kernels_here<T>();
  const int64_t elements = params.n * params.m;
  // Few problems of many rows share their rows out.
  if (threads > 1 && params.problems < threads && params.n > kBlock &&
      elements > 4 * kElementsPerThread) {
    const Team team = {threads};
    Worker<T> worker(params, kernels, team);
    for (int64_t p = 0; p < params.problems; ++p) worker.run(p);
    return;
  }
  const Team alone = {1};
  const int64_t count = std::min<int64_t>(threads, params.problems);
  if (count <= 1) {
    Worker<T> worker(params, kernels, alone);
    for (int64_t p = 0; p < params.problems; ++p) worker.run(p);
    return;
  }
#pragma omp parallel num_threads(static_cast<int>(count))
  {
    Worker<T> worker(params, kernels, alone);
#pragma omp for schedule(dynamic, 1)
    for (int64_t p = 0; p < params.problems; ++p) worker.run(p);
  }
}

}  // namespace

void sinkhorn(const SinkhornParams& params, int threads) {
  if (params.dtype == DType::kFloat64) {
    run_type<double>(params, threads);
  } else {
    run_type<float>(params, threads);
  }
}

}  // namespace kdkernels::cpu
