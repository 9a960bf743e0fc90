// Losses from two rows of logits on the CPU; formulas in ../kdkernels.h, one class of each
// divergence in ../divergence.h.
//
//   sweep 1  maxima and sums of exponentials of both sides, in blocks, online (with standardize,
//            first the spread of each side)
//   sweep 2  loss and gradient; for a divergence whose gradient needs a mean over the row, or with
//            standardize, loss and moments
//   sweep 3  then the gradient
//
// A row comes from memory once and stays in the inner caches for the later sweeps. Threads take
// contiguous runs of rows, and each row is summed in one fixed order, so that results do not depend
// on their number.
//
// The loops over a block of classes are functions of their own: inside the long function that walks
// over a row the compiler leaves some of them scalar.
#include <atomic>
#include <iterator>
#include <stdexcept>
#include <string>

#include "../divergence.h"
#include "../kdkernels.h"
#include "parallel.h"
#include "softmax.h"

namespace kdkernels::cpu {
namespace {

// Logits from their maximum, bounded so that -inf may be multiplied with 0.
template <typename S>
KDK_INLINE S below(S x, S max) {
  const S distance = x - max;
  return select(distance < S(-1e30), S(-1e30), distance);
}

// Both sides of a row as softmaxes, and D = log P - log Q. Where the two factors are near each
// other the logits are differenced first; there the target's factor is made to be to the exact one
// as the input's rounded factor is to its own, so that rounding changes the temperature of both
// alike.
template <typename S>
struct Pair {
  S s_factor, t_factor, t_extra;
  S together, t_apart, s_apart;  // D log2(e) = (t - s) together + t_below t_apart - ...
  S s_max = 0, t_max = 0, s_norm = 0, t_norm = 0, offset = 0;
  double s_log2 = 0, t_log2 = 0;  // of the sums
  bool alike = true;

  // From log2(e) over each side's temperature.
  KDK_INLINE Pair(double s_exact, double t_exact) {
    s_factor = static_cast<S>(s_exact);
    alike = std::fabs(t_exact - s_exact) <= 0.25 * s_exact;
    double t_like = t_exact;
    if (alike) t_like = t_exact == s_exact ? double(s_factor) : t_exact * (s_factor / s_exact);
    t_factor = static_cast<S>(t_like);
    t_extra = static_cast<S>(t_like - t_factor);
    together = alike ? s_factor : S(0);
    t_apart = alike ? static_cast<S>(t_like - s_factor) : t_factor;
    s_apart = alike ? S(0) : s_factor;
  }

  void set(S q_max, double q_sum, S p_max, double p_sum) {
    constexpr S kLowest = -static_cast<S>(INFINITY);
    // A side of nothing but -inf has no mass.
    const bool s_empty = q_max == kLowest, t_empty = p_max == kLowest;
    s_max = s_empty ? S(0) : q_max;
    t_max = t_empty ? S(0) : p_max;
    s_log2 = std::log2(q_sum);
    t_log2 = std::log2(p_sum);
    s_norm = s_empty ? S(0) : static_cast<S>(1 / q_sum);
    t_norm = t_empty ? S(0) : static_cast<S>(1 / p_sum);
    const double difference = t_log2 - s_log2;
    offset = static_cast<S>(alike ? (static_cast<double>(t_max) - s_max) * s_factor + difference
                                  : difference);
  }

  KDK_INLINE S s_power(S s) const { return below(s, s_max) * s_factor; }
  KDK_INLINE S t_power(S t) const {
    const S y = below(t, t_max);
    return y * t_factor + y * t_extra;
  }
  KDK_INLINE S q(S s) const { return exp2_or_zero(s_power(s)) * s_norm; }
  KDK_INLINE S p(S t) const { return exp2_or_zero(t_power(t)) * t_norm; }

  // log Q_j and log P_j, -inf where the logit is.
  KDK_INLINE S log_q(S s) const {
    const S y = s_power(s) - static_cast<S>(s_log2);
    return select(s == -static_cast<S>(INFINITY), s, static_cast<S>(kLn2) * y);
  }
  KDK_INLINE S log_p(S t) const {
    const S y = t_power(t) - static_cast<S>(t_log2);
    return select(t == -static_cast<S>(INFINITY), t, static_cast<S>(kLn2) * y);
  }

  // -inf where P_j = 0 for a target of -inf, also where Q_j = 0 too.
  template <typename R>
  KDK_INLINE R delta(R s, R t) const {
    constexpr R kInfinity = static_cast<R>(INFINITY);
    // What multiplies 0 must be finite.
    const R difference = t - s;
    const R bounded = select(difference > R(1e30), R(1e30), difference);
    const R s_below = below(s, static_cast<R>(s_max)), t_below = below(t, static_cast<R>(t_max));
    const R d = bounded * together + (t_below * t_apart - (s_below * s_apart + offset));
    const R finite = select(s == -kInfinity, kInfinity, static_cast<R>(kLn2) * d);
    return select(t == -kInfinity, -kInfinity, finite);
  }
};

constexpr bool of_labels(Divergence d) {
  return d == Divergence::kDecoupled || d == Divergence::kReverseDecoupled ||
         d == Divergence::kNormalized || d == Divergence::kReverseNormalized;
}

// The gradient needs the mean of the slopes over the row.
constexpr bool has_slope(Divergence d) {
  return d == Divergence::kReverseKl || d == Divergence::kMixture ||
         d == Divergence::kTotalVariation || d == Divergence::kReverseDecoupled ||
         d == Divergence::kReverseNormalized;
}

// What the classes of a row have in common.
template <typename S>
struct Terms {
  S first, second, mix;
  S label_slope = 0;  // a decoupled divergence's derivative with respect to the label's log-odds
  Pair<S> pair{1, 1};

  // One class, three ways to look at it: what they share is computed once in a loop that wants more
  // than one. (A struct of all three keeps the compiler from vectorising.)
  template <Divergence kD>
  KDK_INLINE S loss_of(S s, S t) const {
    const S p = pair.p(t), q = pair.q(s), d = pair.delta(s, t);
    if constexpr (kD == Divergence::kReverseKl) {
      return reverse_kl_loss(p, q, d);
    } else if constexpr (kD == Divergence::kMixture) {
      return mixture_loss(p, q, d, mix, first, second);
    } else if constexpr (kD == Divergence::kTotalVariation) {
      return total_variation_loss(p, q, d);
    } else if constexpr (kD == Divergence::kDecoupled) {
      return second * kl_excess(p, q, d);
    } else if constexpr (kD == Divergence::kReverseDecoupled) {
      return second * reverse_kl_loss(p, q, d);
    } else if constexpr (kD == Divergence::kNormalized) {
      const S term = -second * p * pair.log_q(s);
      return select(p > S(0), term, S(0));
    } else if constexpr (kD == Divergence::kReverseNormalized) {
      const S term = -second * q * pair.log_p(t);
      return select(q > S(0), term, S(0));
    } else {
      return kl_excess(p, q, d);
    }
  }

  template <Divergence kD>
  KDK_INLINE S slope_of(S s, S t) const {
    const S p = pair.p(t), q = pair.q(s), d = pair.delta(s, t);
    if constexpr (kD == Divergence::kReverseKl) {
      return reverse_kl_slope(d);
    } else if constexpr (kD == Divergence::kMixture) {
      return mixture_slope(d, mix, first, second);
    } else if constexpr (kD == Divergence::kTotalVariation) {
      return total_variation_slope(p, q, d);
    } else if constexpr (kD == Divergence::kReverseDecoupled) {
      return second * reverse_kl_slope(d);
    } else {
      return -second * pair.log_p(t);
    }
  }

  template <Divergence kD>
  KDK_INLINE S gradient_of(S s, S t, S mean) const {
    const S p = pair.p(t), q = pair.q(s), d = pair.delta(s, t);
    if constexpr (kD == Divergence::kDecoupled) {
      return second * kl_difference(p, q, d) - label_slope * q;
    } else if constexpr (kD == Divergence::kReverseDecoupled) {
      return slope_gradient(q, slope_of<kD>(s, t), mean) - label_slope * q;
    } else if constexpr (kD == Divergence::kNormalized) {
      return second * kl_difference(p, q, d);
    } else if constexpr (has_slope(kD)) {
      return slope_gradient(q, slope_of<kD>(s, t), mean);
    } else {
      return kl_difference(p, q, d);
    }
  }
};

// Sums over a block. Of the gradient g: sum_j g_j y_j and sum_j g_j, y from the maximum, without
// and over the logits of -inf; of Q: sum_j Q_j y_j and sum_j Q_j.
struct Moments {
  double moment = 0, weights = 0, dead = 0, center = 0, mass = 0;
};

template <Divergence kD, typename S>
KDK_INLINE void measure_block(const Terms<S>& terms, const S* s, const S* t, int64_t n,
                              double* loss, double* slope) {
  const Terms<S> row = terms;
  S sum = 0, slopes = 0;
#pragma omp simd reduction(+ : sum, slopes)
  for (int64_t j = 0; j < n; ++j) {
    sum += row.template loss_of<kD>(s[j], t[j]);
    if (has_slope(kD)) {
      slopes += slope_gradient(row.pair.q(s[j]), row.template slope_of<kD>(s[j], t[j]), S(0));
    }
  }
  *loss += sum, *slope += slopes;
}

template <Divergence kD, typename S>
KDK_INLINE void moments_block(const Terms<S>& terms, const S* s, const S* t, int64_t n, S mean,
                              Moments* found) {
  const Terms<S> row = terms;
  S sum = 0, weights = 0, dead = 0, of_q = 0, qs = 0;
#pragma omp simd reduction(+ : sum, weights, dead, of_q, qs)
  for (int64_t j = 0; j < n; ++j) {
    const S q = row.pair.q(s[j]), y = below(s[j], row.pair.s_max);
    const S g = row.template gradient_of<kD>(s[j], t[j], mean);
    const bool masked = s[j] == -static_cast<S>(INFINITY);
    sum += select(masked, S(0), g * y);
    weights += g;
    dead += select(masked, g, S(0));
    of_q += q * y;
    qs += q;
  }
  found->moment += sum, found->weights += weights, found->dead += dead;
  found->center += of_q, found->mass += qs;
}

// g = factor times the gradient; the loss where the gradient needs no mean.
template <Divergence kD, typename S>
KDK_INLINE void gradient_block(const Terms<S>& terms, const S* s, const S* t, int64_t n, S factor,
                               S mean, S* g, double* loss) {
  const Terms<S> row = terms;
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    g[j] = factor * row.template gradient_of<kD>(s[j], t[j], mean);
    if (!has_slope(kD)) sum += row.template loss_of<kD>(s[j], t[j]);
  }
  *loss += sum;
}

// Clones are made of plain functions only: one for each divergence and type of statistics.
template <typename S>
struct Blocks {
  void (*measure)(const Terms<S>&, const S*, const S*, int64_t, double*, double*);
  void (*moments)(const Terms<S>&, const S*, const S*, int64_t, S, Moments*);
  void (*gradient)(const Terms<S>&, const S*, const S*, int64_t, S, S, S*, double*);
};

template <Divergence kD, typename S>
Blocks<S> blocks_of();

#define KDK_BLOCKS(name, S)                                                                       \
  KDK_CLONES void measure_##name##_##S(const Terms<S>& terms, const S* s, const S* t, int64_t n,  \
                                       double* loss, double* slope) {                             \
    measure_block<Divergence::k##name>(terms, s, t, n, loss, slope);                              \
  }                                                                                               \
  KDK_CLONES void moments_##name##_##S(const Terms<S>& terms, const S* s, const S* t, int64_t n,  \
                                       S mean, Moments* found) {                                  \
    moments_block<Divergence::k##name>(terms, s, t, n, mean, found);                              \
  }                                                                                               \
  KDK_CLONES void gradient_##name##_##S(const Terms<S>& terms, const S* s, const S* t, int64_t n, \
                                        S factor, S mean, S* g, double* loss) {                   \
    gradient_block<Divergence::k##name>(terms, s, t, n, factor, mean, g, loss);                   \
  }                                                                                               \
  template <>                                                                                     \
  Blocks<S> blocks_of<Divergence::k##name, S>() {                                                 \
    return {measure_##name##_##S, moments_##name##_##S, gradient_##name##_##S};                   \
  }
#define KDK_DIVERGENCES(of)                                                                       \
  of(None) of(Kl) of(ReverseKl) of(Mixture) of(TotalVariation) of(Decoupled) of(ReverseDecoupled) \
      of(Normalized) of(ReverseNormalized) of(Statistics)
#define KDK_BLOCKS_OF(name) KDK_BLOCKS(name, float) KDK_BLOCKS(name, double)
KDK_DIVERGENCES(KDK_BLOCKS_OF)

// The loops that no divergence has a part in, for float and double.
template <typename S>
KDK_INLINE S max_of(const S* x, int64_t n) {
  S max = -static_cast<S>(INFINITY);
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < n; ++j) max = x[j] > max ? x[j] : max;
  return max;
}

template <typename S>
KDK_INLINE double exp_sum_of(const S* x, int64_t n, S max, S factor, S extra) {
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const S y = below(x[j], max);
    sum += exp2_above(y * factor + y * extra);
  }
  return sum;
}

// sum_j (x_j - from)^power and how many there are, of what is not -inf.
template <typename S>
KDK_INLINE double power_sum_of(const S* x, int64_t n, S top, double from, bool square,
                               double* count) {
  double sum = 0, live = 0;
#pragma omp simd reduction(+ : sum, live)
  for (int64_t j = 0; j < n; ++j) {
    const bool masked = x[j] == -static_cast<S>(INFINITY);
    const double z = static_cast<double>(x[j] - top) - from;
    sum += masked ? 0.0 : square ? z * z : z;
    live += masked ? 0.0 : 1.0;
  }
  *count += live;
  return sum;
}

// A softmax at temperature 1 whose part in the gradient is weight 2^((s - max) factor).
template <typename S>
struct Unit {
  S factor = 0, weight = 0, max = 0;
};

// g += the softmax's part; returns the sum of that times s - max.
template <typename S>
KDK_INLINE double add_unit_to(S* g, const S* s, int64_t n, const Unit<S>& unit) {
  const Unit<S> row = unit;
  S moment = 0;
#pragma omp simd reduction(+ : moment)
  for (int64_t j = 0; j < n; ++j) {
    const S y = below(s[j], row.max);
    const S part = row.weight * exp2_or_zero(y * row.factor);
    g[j] += part;
    moment += part * y;
  }
  return moment;
}

// g_j -= slope (s_j - about) + level where s_j is not -inf.
template <typename S>
KDK_INLINE void subtract_line_from(S* g, const S* s, int64_t n, S slope, S about, S level) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const S change = slope * (s[j] - about) + level;
    g[j] -= select(s[j] == -static_cast<S>(INFINITY), S(0), change);
  }
}

template <typename S>
KDK_INLINE void statistics_of(const Terms<S>& terms, const S* s, const S* t, int64_t n,
                              double* sums) {
  const Pair<S> row = terms.pair;
  const S p_log2 = static_cast<S>(row.t_log2), q_log2 = static_cast<S>(row.s_log2);
  S p_sum = 0, q_sum = 0, least = 0;
#pragma omp simd reduction(+ : p_sum, q_sum, least)
  for (int64_t j = 0; j < n; ++j) {
    const S p = row.p(t[j]), q = row.q(s[j]);
    p_sum += p * (p_log2 - row.t_power(t[j]));
    q_sum += q * (q_log2 - row.s_power(s[j]));
    least += p < q ? p : q;
  }
  sums[0] += p_sum, sums[1] += q_sum, sums[2] += least;
}

#define KDK_LOOPS(S)                                                                               \
  KDK_CLONES S maximum(const S* x, int64_t n) { return max_of(x, n); }                             \
  KDK_CLONES double exp_sum(const S* x, int64_t n, S max, S factor, S extra) {                     \
    return exp_sum_of(x, n, max, factor, extra);                                                   \
  }                                                                                                \
  KDK_CLONES double power_sum(const S* x, int64_t n, S top, double from, bool square, double* c) { \
    return power_sum_of(x, n, top, from, square, c);                                               \
  }                                                                                                \
  KDK_CLONES double add_unit(S* g, const S* s, int64_t n, const Unit<S>& unit) {                   \
    return add_unit_to(g, s, n, unit);                                                             \
  }                                                                                                \
  KDK_CLONES void subtract_line(S* g, const S* s, int64_t n, S slope, S about, S level) {          \
    subtract_line_from(g, s, n, slope, about, level);                                              \
  }                                                                                                \
  KDK_CLONES void statistics(const Terms<S>& terms, const S* s, const S* t, int64_t n,             \
                             double* sums) {                                                       \
    statistics_of(terms, s, t, n, sums);                                                           \
  }
KDK_LOOPS(float)
KDK_LOOPS(double)

// Halves to floats, and back.
KDK_CLONES void widen_halves(const Float16* x, int64_t n, float* y) { widen_block(x, n, y); }
KDK_CLONES void widen_halves(const BFloat16* x, int64_t n, float* y) { widen_block(x, n, y); }
KDK_CLONES void narrow_halves(const float* x, int64_t n, Float16* y) { narrow_block(x, n, y); }
KDK_CLONES void narrow_halves(const float* x, int64_t n, BFloat16* y) { narrow_block(x, n, y); }

// A row in the statistics type S, whatever its own: block by block, with class `skip` taken for
// -inf (-1: none).
template <typename S>
struct Source {
  const void* data;
  DType dtype;
  int64_t skip;

  const S* block(int64_t begin, int64_t n, S* buffer) const {
    const S* x;
    if constexpr (sizeof(S) == sizeof(double)) {
      x = static_cast<const S*>(data) + begin;
    } else if (dtype == DType::kBFloat16) {
      widen_halves(static_cast<const BFloat16*>(data) + begin, n, buffer);
      x = buffer;
    } else if (dtype == DType::kFloat16) {
      widen_halves(static_cast<const Float16*>(data) + begin, n, buffer);
      x = buffer;
    } else {
      x = static_cast<const S*>(data) + begin;
    }
    if (skip >= begin && skip < begin + n) {
      if (x != buffer) std::copy_n(x, n, buffer);
      buffer[skip - begin] = -static_cast<S>(INFINITY);
      x = buffer;
    }
    return x;
  }

  S at(int64_t j) const {
    S value = 0;
    const Source whole{data, dtype, -1};
    return *whole.block(j, 1, &value);
  }
};

template <typename S>
void store_block(const S* x, int64_t n, int64_t begin, DType dtype, void* row) {
  if constexpr (sizeof(S) == sizeof(float)) {
    if (dtype == DType::kBFloat16) {
      narrow_halves(x, n, static_cast<BFloat16*>(row) + begin);
    } else if (dtype == DType::kFloat16) {
      narrow_halves(x, n, static_cast<Float16*>(row) + begin);
    }
  }
}

int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Sum of 2^((x - max) factor) over what has been seen of a row, a block's maximum given with it.
template <typename S>
struct Sum {
  S factor;  // log2(e) over a temperature
  S extra;   // what the rounding of factor took off
  S max = -static_cast<S>(INFINITY);
  double sum = 0;

  Sum(S factor, S extra) : factor(factor), extra(extra) {}

  void add(const S* x, int64_t n, S block_max) {
    if (block_max > max) {
      if (sum != 0) sum *= std::exp2((static_cast<double>(max) - block_max) * factor);
      max = block_max;
    }
    const double block_sum = exp_sum(x, n, max, factor, extra);
    if (max != -static_cast<S>(INFINITY)) sum += block_sum;
  }

  // log2 of the sum with one more term, 2^((x - max) factor).
  double log2_with(double x) const {
    const double a = std::log2(sum), b = (x - max) * factor;
    if (sum == 0 || b - a > 1000) return b;  // the -inf of `max` too
    return a + std::log2(1 + std::exp2(b - a));
  }
};

// Mean, taken from the maximum, and standard deviation (over count - 1) of what is not -inf.
struct Spread {
  double max = -INFINITY, mean = 0, deviation = 0, count = 0;

  bool flat() const { return !(deviation > 0); }
  double inverse() const { return flat() ? 1 : 1 / (1e-7 + deviation); }

  template <typename S>
  void of(const Source<S>& row, int64_t classes) {
    S buffer[kBlock];
    const auto blocks = [&](const auto& body) {
      for (int64_t begin = 0; begin < classes; begin += kBlock) {
        const int64_t n = std::min(kBlock, classes - begin);
        body(row.block(begin, n, buffer), n);
      }
    };
    S top = -static_cast<S>(INFINITY);
    blocks([&](const S* x, int64_t n) { top = std::max(top, maximum(x, n)); });
    max = top;
    blocks([&](const S* x, int64_t n) { mean += power_sum(x, n, top, 0, false, &count); });
    mean = count > 0 ? mean / count : 0;
    double squares = 0, again = 0;
    blocks([&](const S* x, int64_t n) { squares += power_sum(x, n, top, mean, true, &again); });
    deviation = count > 1 ? std::sqrt(squares / (count - 1)) : 0;
  }
};

template <Divergence kD, typename S>
struct LogitLossRow {
  static constexpr bool kSoft = kD != Divergence::kNone;
  static constexpr bool kStatistics = kD == Divergence::kStatistics;
  static constexpr bool kLabel = of_labels(kD);
  static constexpr bool kSlope = has_slope(kD);
  static constexpr bool kNormalized =
      kD == Divergence::kNormalized || kD == Divergence::kReverseNormalized;

  const LogitLossParams& params;
  Source<S> input, target;  // with a kLabel divergence, without the label's class
  Terms<S> terms;

  template <typename Body>
  void blocks(const Body& body) const {
    S s_buffer[kBlock], t_buffer[kBlock];
    for (int64_t begin = 0; begin < params.classes; begin += kBlock) {
      const int64_t n = std::min(kBlock, params.classes - begin);
      const S* s = input.block(begin, n, s_buffer);
      body(s, kSoft ? target.block(begin, n, t_buffer) : s, n, begin);
    }
  }

  void run(int64_t r, int64_t label) {
    const auto* soft_scales = static_cast<const S*>(params.soft_scale);
    const auto* row_scales = static_cast<const S*>(params.row_scale);
    const auto* input_temperatures = static_cast<const S*>(params.input_temperature);
    const auto* target_temperatures = static_cast<const S*>(params.target_temperature);
    auto* loss_out = static_cast<S*>(params.loss);
    auto* terms_out = static_cast<S*>(params.terms);
    Pair<S>& pair = terms.pair;
    auto* temperature_out = static_cast<S*>(params.grad_input_temperature);
    char* gradient = params.grad_input == nullptr
                         ? nullptr
                         : static_cast<char*>(params.grad_input) +
                               r * params.grad_stride * size_of(params.dtype);
    const double temperature =
        input_temperatures ? double(input_temperatures[r]) : params.input_temperature_value;
    const double target_temperature =
        target_temperatures ? double(target_temperatures[r]) : params.target_temperature_value;
    const double scale = row_scales ? double(row_scales[r]) : params.scale;
    const double soft_scale = soft_scales ? double(soft_scales[r]) : params.soft_scale_value;
    const bool raw = params.hard_weight != 0 || params.z_loss != 0;

    const bool spread = kSoft && params.standardize;
    Spread s_spread, t_spread;
    if (spread) {
      s_spread.of(Source<S>{input.data, input.dtype, -1}, params.classes);
      t_spread.of(Source<S>{target.data, target.dtype, -1}, params.classes);
    }
    const double s_inverse = spread ? s_spread.inverse() : 1;
    const double t_inverse = spread ? t_spread.inverse() : 1;
    pair = Pair<S>(s_inverse / temperature * kLog2E, t_inverse / target_temperature * kLog2E);

    // Sweep 1.
    constexpr S kLog2EFloat = static_cast<S>(kLog2E);
    Sum<S> q(pair.s_factor, 0), p(pair.t_factor, pair.t_extra), raw_sum(kLog2EFloat, 0);
    Sum<S> q_unit(static_cast<S>(kLog2E * s_inverse), 0),
        p_unit(static_cast<S>(kLog2E * t_inverse), 0);
    double live = 0, live_sum = 0;
    int64_t s_top = 0, t_top = 0;
    const bool smooth = params.hard_weight != 0 && params.label_smoothing != 0;
    blocks([&](const S* s, const S* t, int64_t n, int64_t begin) {
      const S s_max = maximum(s, n);
      if (kStatistics && s_max > q.max) s_top = begin + (std::find(s, s + n, s_max) - s);
      if (kSoft) {
        const S t_max = maximum(t, n);
        if (kStatistics && t_max > p.max) t_top = begin + (std::find(t, t + n, t_max) - t);
        q.add(s, n, s_max);
        p.add(t, n, t_max);
        if (kNormalized) {
          q_unit.add(s, n, s_max);
          p_unit.add(t, n, t_max);
        }
      }
      if (raw) raw_sum.add(s, n, s_max);
      if (smooth) live_sum += power_sum(s, n, S(0), 0, false, &live);
    });
    const double s_label = label < 0 ? 0 : double(Source<S>{input.data, input.dtype, -1}.at(label));
    if (kLabel && smooth && s_label > -INFINITY) live_sum += s_label, live += 1;
    if (kSoft) pair.set(q.max, q.sum, p.max, p.sum);

    // The label's class against all others.
    double first_part = 0;  // of the loss, before `soft_scale`
    double unit_slope = 0;  // of a normalized divergence: d/dinput = unit_slope (q - onehot)
    bool alone = false;
    if constexpr (kLabel) {
      const double t_label = Source<S>{target.data, target.dtype, -1}.at(label);
      const bool s_alone = q.sum == 0, t_alone = p.sum == 0;
      alone = s_alone || t_alone;
      if (alone) terms.second = 0;
      if constexpr (kNormalized) {
        const auto log_of = [](const Sum<S>& sum, double x) {
          const double from = sum.sum == 0 ? 0 : (x - sum.max) * sum.factor - sum.log2_with(x);
          return kLn2 * from;
        };
        const double log_p = log_of(p_unit, t_label), log_q = log_of(q_unit, s_label);
        if (kD == Divergence::kNormalized) {
          unit_slope = params.first * std::exp(log_p);
          first_part = unit_slope == 0 ? 0 : -unit_slope * log_q;
        } else {
          const double weight = std::exp(log_q);
          unit_slope = weight == 0 ? 0 : params.first * weight * log_p;
          first_part = -unit_slope;
        }
      } else {
        const auto odds = [](double x, double max, double factor, double log2_sum, bool is_alone) {
          if (x == INFINITY) return static_cast<double>(NAN);  // no distribution has it
          return is_alone ? INFINITY : kLn2 * ((x - max) * factor - log2_sum);
        };
        const double u_q = odds(s_label, pair.s_max, pair.s_factor, pair.s_log2, s_alone);
        const double u_p =
            odds(t_label, pair.t_max, double(pair.t_factor) + pair.t_extra, pair.t_log2, t_alone);
        const double d = u_p == u_q ? 0
                         : alone || std::isinf(u_p) || std::isinf(u_q)
                             ? u_p - u_q
                             : pair.delta(s_label, t_label);
        const BernoulliTerm<double> term =
            bernoulli_term(u_p, u_q, d, kD == Divergence::kReverseDecoupled);
        first_part = params.first == 0 ? 0 : params.first * term.loss;
        terms.label_slope = static_cast<S>(params.first * term.gradient);
        if (s_alone && !t_alone && params.second != 0) first_part = INFINITY;
      }
    }

    // Factors of the gradient's parts.
    const double flat = spread && s_spread.flat() ? 0 : 1;
    const double soft_factor = flat * scale * soft_scale * s_inverse / temperature;
    unit_slope *= flat * scale * s_inverse;
    double raw_log2 = 0, lse = 0, hard = 0, z = 0;
    if (raw) {
      raw_log2 = kLabel ? raw_sum.log2_with(s_label) : std::log2(raw_sum.sum);
      const double from = raw_sum.max == -static_cast<S>(INFINITY) && kLabel ? 0 : raw_sum.max;
      if (kLabel && raw_sum.sum == 0) raw_log2 = s_label * kLog2E;
      lse = from + kLn2 * raw_log2;
      if (params.hard_weight != 0) {
        hard = lse - (1 - params.label_smoothing) * s_label;
        if (smooth) hard -= params.label_smoothing * live_sum / live;
        hard *= params.hard_weight;
      }
      z = params.z_loss * lse * lse;
    }
    const double raw_slope = scale * (params.hard_weight + 2 * params.z_loss * lse);
    const double onehot = scale * params.hard_weight * (1 - params.label_smoothing);
    const double uniform = smooth ? scale * params.hard_weight * params.label_smoothing / live : 0;
    Unit<S> unit_soft, unit_raw;
    double unit_share = 1;  // of the label in the input's softmax at temperature 1
    if (kNormalized && unit_slope != 0 && q_unit.sum != 0) {
      const double log2_sum = q_unit.log2_with(s_label);
      unit_share = std::exp2((s_label - q_unit.max) * q_unit.factor - log2_sum);
      unit_soft = {q_unit.factor, static_cast<S>(unit_slope * std::exp2(-log2_sum)), q_unit.max};
    }
    if (raw_slope != 0 && raw_sum.sum != 0) {
      unit_raw = {kLog2EFloat, static_cast<S>(raw_slope * std::exp2(-raw_log2)), raw_sum.max};
    }

    const Blocks<S> kernels = blocks_of<kD, S>();

    // Sweep 2, with the gradient where that needs nothing more, and sweep 3.
    const bool wants_moment = temperature_out != nullptr || (spread && gradient != nullptr);
    const bool at_once = !kSlope && !spread;
    double loss = 0, mean = 0;
    // With standardize: g_j is less level + correction (s_j - about), about the mean.
    double correction = 0, level = 0;
    const double about = spread ? s_spread.max + s_spread.mean : 0;
    S buffer[kBlock] = {};
    const auto write = [&](const S* s, const S* t, int64_t n, int64_t begin) {
      S* g = buffer;
      if (params.dtype == DType::kFloat32 || params.dtype == DType::kFloat64) {
        g = reinterpret_cast<S*>(gradient) + begin;
      }
      if constexpr (kSoft) {
        double found = 0;
        kernels.gradient(terms, s, t, n, static_cast<S>(soft_factor), static_cast<S>(mean), g,
                         &found);
        if (at_once) loss += found;
        if (kNormalized && unit_soft.weight != 0) add_unit(g, s, n, unit_soft);
      } else {
        std::fill_n(g, n, S(0));
      }
      if (unit_raw.weight != 0) add_unit(g, s, n, unit_raw);
      if (correction != 0 || level != 0 || uniform != 0) {
        const S middle = static_cast<S>(about);
        subtract_line(g, s, n, static_cast<S>(correction), middle,
                      static_cast<S>(level + uniform + correction * (middle - about)));
      }
      if (label >= begin && label < begin + n) {
        if constexpr (kLabel) {
          // Skipped so far: all of it here.
          double at_label = soft_factor * terms.label_slope + unit_slope * (unit_share - 1);
          if (s_label > -INFINITY) at_label -= correction * (s_label - about) + level + uniform;
          if (raw_slope != 0) at_label += raw_slope * std::exp(s_label - lse);
          g[label - begin] = static_cast<S>(at_label - onehot);
        } else {
          g[label - begin] -= static_cast<S>(onehot);
        }
      }
      store_block(g, n, begin, params.dtype, gradient);
    };

    if (kSoft && (!at_once || gradient == nullptr)) {
      blocks([&](const S* s, const S* t, int64_t n, int64_t) {
        kernels.measure(terms, s, t, n, &loss, &mean);
      });
      // The mean of these slopes is the loss itself, whose terms are all of one sign.
      if (kD == Divergence::kReverseKl || kD == Divergence::kReverseDecoupled ||
          kD == Divergence::kReverseNormalized) {
        mean = loss;
      }
    }
    if (kSoft && wants_moment) {
      Moments found;
      double unit_moment = 0;
      blocks([&](const S* s, const S* t, int64_t n, int64_t) {
        kernels.moments(terms, s, t, n, static_cast<S>(mean), &found);
        if (unit_soft.weight != 0) unit_moment += add_unit(buffer, s, n, unit_soft);
      });
      if constexpr (kLabel) {
        found.weights += terms.label_slope;
        if (s_label > -INFINITY) {
          found.moment += terms.label_slope * (s_label - pair.s_max);
          unit_moment += unit_slope * (unit_share - 1) * (s_label - unit_soft.max);
        } else {
          found.dead += terms.label_slope;
        }
      }
      // All weights sum to 0 but for rounding: what they do sum to is taken off times the mean of y
      // under Q.
      double moment = found.moment;
      if (found.mass > 0) moment -= found.weights * found.center / found.mass;
      // An infinite loss has weight on logits of -inf, which the others lack.
      moment -= found.dead * (pair.s_max - (spread ? about : 0));
      if (temperature_out != nullptr) {
        temperature_out[r] = static_cast<S>(moment == 0 ? 0 : -soft_factor * moment / temperature);
      }
      if (spread && !s_spread.flat()) {
        correction = (soft_factor * moment + unit_moment) * s_inverse /
                     ((s_spread.count - 1) * s_spread.deviation);
        level = -soft_factor * found.dead / s_spread.count;
      }
    } else if (temperature_out != nullptr) {
      temperature_out[r] = 0;
    }
    double sums[3] = {};  // both entropies, in bits, and the overlap
    if constexpr (kStatistics) {
      blocks([&](const S* s, const S* t, int64_t n, int64_t) { statistics(terms, s, t, n, sums); });
    }
    if (gradient != nullptr) blocks(write);

    double soft = 0;
    if constexpr (kNormalized) {
      soft = first_part + soft_scale * loss;
    } else if constexpr (kSoft) {
      soft = soft_scale == 0 ? 0 : soft_scale * (first_part + loss);
    }
    if (loss_out != nullptr) loss_out[r] = static_cast<S>(scale * (soft + hard + z));
    if (terms_out != nullptr) {
      const double part = kNormalized ? first_part : first_part * soft_scale;
      const double values[4] = {soft, hard, z, part};
      const double statistics[4] = {kLn2 * sums[0], kLn2 * sums[1], sums[2],
                                    s_top == t_top ? 1.0 : 0.0};
      for (int k = 0; k < 4; ++k) {
        terms_out[k * params.rows + r] =
            static_cast<S>(scale * (kStatistics ? statistics[k] : values[k]));
      }
    }
  }
};

// The first row that holds a label which is no class, or -1.
template <Divergence kD, typename S>
int64_t rows_of(const LogitLossParams& params, int64_t begin_row, int64_t end_row) {
  const int64_t size = size_of(params.dtype);
  const bool needs_label = of_labels(kD) || params.hard_weight != 0;
  for (int64_t r = begin_row; r < end_row; ++r) {
    if (params.mask != nullptr && params.mask[r] == 0) {
      if (params.loss != nullptr) static_cast<S*>(params.loss)[r] = 0;
      for (int k = 0; k < 4 && params.terms != nullptr; ++k) {
        static_cast<S*>(params.terms)[k * params.rows + r] = 0;
      }
      if (params.grad_input != nullptr) {
        std::memset(static_cast<char*>(params.grad_input) + r * params.grad_stride * size, 0,
                    size * params.classes);
      }
      if (params.grad_input_temperature != nullptr) {
        static_cast<S*>(params.grad_input_temperature)[r] = 0;
      }
      continue;
    }
    const int64_t label = needs_label ? params.labels[r] : -1;
    if (needs_label && (label < 0 || label >= params.classes)) return r;
    const int64_t skip = of_labels(kD) ? label : -1;
    const auto row = [&](const void* base, int64_t stride) {
      return Source<S>{static_cast<const char*>(base) + r * stride * size, params.dtype, skip};
    };
    const Source<S> input = row(params.input, params.input_stride);
    const Source<S> target =
        kD == Divergence::kNone ? input : row(params.target, params.target_stride);
    LogitLossRow<kD, S> work{
        params,
        input,
        target,
        {static_cast<S>(params.first), static_cast<S>(params.second), static_cast<S>(params.mix)}};
    work.run(r, label);
  }
  return -1;
}

using Rows = int64_t (*)(const LogitLossParams&, int64_t, int64_t);
#define KDK_ROWS_OF(name) rows_of<Divergence::k##name, S>,
// In the order of Divergence.
template <typename S>
constexpr Rows kRows[] = {KDK_DIVERGENCES(KDK_ROWS_OF)};

}  // namespace

void logit_loss(const LogitLossParams& params, int threads) {
  const auto which = static_cast<size_t>(params.divergence);
  if (which >= std::size(kRows<float>)) throw std::invalid_argument("no such divergence");
  const Rows body = params.dtype == DType::kFloat64 ? kRows<double>[which] : kRows<float>[which];
  std::atomic<int64_t> wrong{-1};
  for_each_run_of_rows(params.rows, params.classes, threads, [&](int64_t begin, int64_t end) {
    const int64_t found = body(params, begin, end);
    if (found >= 0) wrong = found;
  });
  if (wrong >= 0) {
    throw std::invalid_argument("labels must be in [0, " + std::to_string(params.classes) +
                                ") where they count, got " + std::to_string(params.labels[wrong]));
  }
}

}  // namespace kdkernels::cpu
