// Losses from two rows of logits on the CPU; formulas in ../kdkernels.h, one class of each
// divergence in ../divergence.h.
//
//   sweep 1  maxima, exponentials and their sums of both sides, in blocks, online (with
//            standardize, first the spread of each side)
//   sweep 2  loss and gradient; of a divergence whose gradient needs a mean over the row, or with
//            standardize, the gradient without that and its moments
//   sweep 3  then what is to be added to it
//
// The plain KL without standardize takes the one sweep of kl_row.h where it can.
//
// With many rows the exponentials stay where sweep 1 left them, in rows of each thread; with few,
// when such rows would be much beside the gradient, they are made again block by block.
//
// The gradient is made in its own row where that has the statistics' type and is not the input's
// row, which is still to be read; else in a row or block of the thread's, and stored block by
// block.
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
#include <vector>

#include "../divergence.h"
#include "../kdkernels.h"
#include "kl_row.h"
#include "logit_rows.h"
#include "parallel.h"

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
  S natural_factor, natural_offset = 0;
  bool same;
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
    same = t_exact == s_exact;
    natural_factor = static_cast<S>(kLn2 * s_factor);
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
    if (alike && far((static_cast<double>(t_max) - s_max) * s_factor)) {
      alike = same = false;
      together = 0, t_apart = t_factor, s_apart = s_factor;
    }
    const double exact =
        alike ? (static_cast<double>(t_max) - s_max) * s_factor + difference : difference;
    offset = static_cast<S>(exact);
    // In the factor's own rounding: what is common to all t - s drops out exactly.
    natural_offset =
        static_cast<S>((static_cast<double>(t_max) - s_max) * natural_factor + kLn2 * difference);
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

  // D where both factors are the same, with the logarithm's base in the factors.
  KDK_INLINE S delta_of_same(S s, S t) const {
    constexpr S kInfinity = static_cast<S>(INFINITY);
    return select(t == -kInfinity, -kInfinity, (t - s) * natural_factor - natural_offset);
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

  // One class, of logits s and t and D = log P - log Q: its part of the loss, and of the gradient,
  // which for a divergence with slopes a_j is Q_j a_j, still without the mean. (Two functions: a
  // struct of both keeps the compiler from vectorising.)
  template <Divergence kD, bool kEven>
  KDK_INLINE S loss_of(S s, S t, S p, S q, S d) const {
    if constexpr (kD == Divergence::kReverseKl) {
      return reverse_kl_loss(p, q, d);
    } else if constexpr (kD == Divergence::kMixture) {
      return mixture_loss<kEven>(p, q, d, mix, first, second);
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

  template <Divergence kD, bool kEven>
  KDK_INLINE S weight_of(S t, S p, S q, S d) const {
    if constexpr (kD == Divergence::kReverseKl) {
      return slope_gradient(q, reverse_kl_slope(d), S(0));
    } else if constexpr (kD == Divergence::kMixture) {
      return slope_gradient(q, mixture_slope<kEven>(d, mix, first, second), S(0));
    } else if constexpr (kD == Divergence::kTotalVariation) {
      return total_variation_weight(p, q, d);
    } else if constexpr (kD == Divergence::kReverseDecoupled) {
      return slope_gradient(q, second * reverse_kl_slope(d), S(0));
    } else if constexpr (kD == Divergence::kReverseNormalized) {
      return slope_gradient(q, -second * pair.log_p(t), S(0));
    } else if constexpr (kD == Divergence::kDecoupled) {
      return second * kl_difference(p, q, d) - label_slope * q;
    } else if constexpr (kD == Divergence::kNormalized) {
      return second * kl_difference(p, q, d);
    } else {
      return kl_difference(p, q, d);
    }
  }
};

// A block of a row: its logits, their exponentials, and what these are to be multiplied with.
template <typename S>
struct Block {
  const S *s, *t;
  const S *s_exp, *t_exp;
  S q_scale, p_scale;
  int64_t n;
};

// Sums over blocks: of the loss; of the weights w, of w_j y_j with y from the maximum, and of w
// over the logits of -inf, which the other two leave out and do not; of Q_j y_j and Q_j.
struct Found {
  double loss = 0, weights = 0, moment = 0, dead = 0, center = 0, mass = 0;
};

// g = factor w, and the sums; those from `moment` on only with kMoments.
template <Divergence kD, bool kMoments, bool kSame, bool kEven, typename S>
KDK_INLINE void visit_loop(const Terms<S>& terms, const Block<S>& block, S factor, S* g,
                           Found* found) {
  const Terms<S> row = terms;
  const S *s = block.s, *t = block.t, *s_exp = block.s_exp, *t_exp = block.t_exp;
  const S q_scale = block.q_scale, p_scale = block.p_scale;
  S loss = 0, weights = 0, moment = 0, dead = 0, center = 0, mass = 0;
#pragma omp simd reduction(+ : loss, weights, moment, dead, center, mass)
  for (int64_t j = 0; j < block.n; ++j) {
    const S p = t_exp[j] * p_scale, q = s_exp[j] * q_scale;
    const S d = kSame ? row.pair.delta_of_same(s[j], t[j]) : row.pair.delta(s[j], t[j]);
    const S w = row.template weight_of<kD, kEven>(t[j], p, q, d);
    loss += row.template loss_of<kD, kEven>(s[j], t[j], p, q, d);
    weights += w;
    if (kMoments) {
      const bool masked = s[j] == -static_cast<S>(INFINITY);
      const S y = below(s[j], row.pair.s_max);
      moment += select(masked, S(0), w * y);
      dead += select(masked, w, S(0));
      center += q * y;
      mass += q;
    }
    g[j] = factor * w;
  }
  found->loss += loss, found->weights += weights;
  found->moment += moment, found->dead += dead, found->center += center, found->mass += mass;
}

template <Divergence kD, bool kMoments, typename S>
KDK_INLINE void visit_block(const Terms<S>& terms, const Block<S>& block, S factor, S* g,
                            Found* found) {
  // Half and half is worth a loop of its own: it takes one logarithm less.
  constexpr bool kMixed = kD == Divergence::kMixture;
  const bool even = kMixed && terms.mix == S(0.5);
  if (terms.pair.same && even) {
    visit_loop<kD, kMoments, true, kMixed>(terms, block, factor, g, found);
  } else if (terms.pair.same) {
    visit_loop<kD, kMoments, true, false>(terms, block, factor, g, found);
  } else {
    visit_loop<kD, kMoments, false, false>(terms, block, factor, g, found);
  }
}

// Clones are made of plain functions only: two for each divergence and type of statistics.
template <typename S>
using Visit = void (*)(const Terms<S>&, const Block<S>&, S, S*, Found*);

template <Divergence kD, typename S>
Visit<S> visit_of(bool moments);

#define KDK_BLOCKS(name, S)                                                                        \
  KDK_CLONES void visit_##name##_##S(const Terms<S>& terms, const Block<S>& block, S factor, S* g, \
                                     Found* found) {                                               \
    visit_block<Divergence::k##name, false>(terms, block, factor, g, found);                       \
  }                                                                                                \
  KDK_CLONES void moments_##name##_##S(const Terms<S>& terms, const Block<S>& block, S factor,     \
                                       S* g, Found* found) {                                       \
    visit_block<Divergence::k##name, true>(terms, block, factor, g, found);                        \
  }                                                                                                \
  template <>                                                                                      \
  Visit<S> visit_of<Divergence::k##name, S>(bool moments) {                                        \
    return moments ? moments_##name##_##S : visit_##name##_##S;                                    \
  }
#define KDK_DIVERGENCES(of)                                                              \
  of(Kl) of(ReverseKl) of(Mixture) of(TotalVariation) of(Decoupled) of(ReverseDecoupled) \
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

// out_j = 2^((x_j - max) (factor + extra)), and their sum.
template <typename S>
KDK_INLINE double exp_to(const S* x, int64_t n, S max, S factor, S extra, S* out) {
  S sum = 0;
  if (extra == 0) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
      out[j] = exp2_or_zero((x[j] - max) * factor);
      sum += out[j];
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
      const S y = below(x[j], max);
      out[j] = exp2_or_zero(y * factor + y * extra);
      sum += out[j];
    }
  }
  return sum;
}

// x to the power of 2^squarings.
template <typename S>
KDK_INLINE S squared(S x, int squarings) {
  for (int k = 0; k < squarings; ++k) x *= x;
  return x;
}

// Sums of x_j to that power.
template <int kSquarings, typename S>
KDK_INLINE double power_sum_to(const S* x, int64_t n) {
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += squared(x[j], kSquarings);
  return sum;
}

// g_j += weight (x_j scale)^(2^kSquarings).
template <int kSquarings, typename S>
KDK_INLINE void add_power_to(S* g, const S* x, int64_t n, S scale, S weight) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) g[j] += weight * squared(x[j] * scale, kSquarings);
}

// The sum of weight (x_j scale)^(2^kSquarings) (s_j - max).
template <int kSquarings, typename S>
KDK_INLINE double power_moment_of(const S* x, const S* s, int64_t n, S scale, S weight, S max) {
  S moment = 0;
#pragma omp simd reduction(+ : moment)
  for (int64_t j = 0; j < n; ++j) {
    moment += weight * squared(x[j] * scale, kSquarings) * below(s[j], max);
  }
  return moment;
}

// Sum over what is not -inf: of x_j - from, of its square, and of ones.
template <typename S>
KDK_INLINE double live_sum_of(const S* x, int64_t n, S from, double* count) {
  S sum = 0, live = 0;
#pragma omp simd reduction(+ : sum, live)
  for (int64_t j = 0; j < n; ++j) {
    const bool masked = x[j] == -static_cast<S>(INFINITY);
    sum += select(masked, S(0), x[j] - from);
    live += select(masked, S(0), S(1));
  }
  *count += live;
  return sum;
}

template <typename S>
KDK_INLINE double squares_of(const S* x, int64_t n, S from, S rest) {
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const S z = (x[j] - from) - rest;
    sum += select(x[j] == -static_cast<S>(INFINITY), S(0), z * z);
  }
  return sum;
}

// g_j = factor (g_j - mean Q_j) with g = Q_j a_j, where an infinite slope or mean gives its
// one-sided limits.
template <typename S>
KDK_INLINE void center_of(S* g, const S* s_exp, S q_scale, int64_t n, S factor, S mean) {
  constexpr S kInfinity = static_cast<S>(INFINITY);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const S q = s_exp[j] * q_scale;
    const S w = select(g[j] == kInfinity, kInfinity, g[j] - mean * q);
    g[j] = factor * select(q == S(0), g[j], w);
  }
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

// s_j - t_j, 0 where both are -inf.
template <typename S>
KDK_INLINE S gap(S s, S t) {
  constexpr S kLowest = -static_cast<S>(INFINITY);
  return select((s == kLowest) & (t == kLowest), S(0), s - t);
}

template <typename S>
KDK_INLINE double squared_gaps_of(const S* s, const S* t, int64_t n) {
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const S x = gap(s[j], t[j]);
    sum += x * x;
  }
  return sum;
}

template <typename S>
KDK_INLINE void add_gaps_of(S* g, const S* s, const S* t, int64_t n, S slope) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) g[j] += slope * gap(s[j], t[j]);
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

// The exponents that a temperature of 1, 2, 4, 8 or 16 leads back to 1.
constexpr int kMostSquarings = 4;
#define KDK_BY_SQUARINGS(call) \
  switch (squarings) {         \
    case 0:                    \
      return call(0);          \
    case 1:                    \
      return call(1);          \
    case 2:                    \
      return call(2);          \
    case 3:                    \
      return call(3);          \
    default:                   \
      return call(4);          \
  }

#define KDK_SUM(k) power_sum_to<k>(x, n)
#define KDK_ADD(k) add_power_to<k>(g, x, n, scale, weight)
#define KDK_MOMENT(k) power_moment_of<k>(x, s, n, scale, weight, max)
#define KDK_LOOPS(S)                                                                               \
  KDK_CLONES S maximum(const S* x, int64_t n) { return max_of(x, n); }                             \
  KDK_CLONES double exponentials(const S* x, int64_t n, S max, S factor, S extra, S* out) {        \
    return exp_to(x, n, max, factor, extra, out);                                                  \
  }                                                                                                \
  KDK_CLONES double power_sum(const S* x, int64_t n, int squarings){KDK_BY_SQUARINGS(              \
      KDK_SUM)} KDK_CLONES void add_power(S* g, const S* x, int64_t n, int squarings, S scale,     \
                                          S weight){KDK_BY_SQUARINGS(                              \
      KDK_ADD)} KDK_CLONES double power_moment(const S* x, const S* s, int64_t n, int squarings,   \
                                               S scale, S weight, S max){KDK_BY_SQUARINGS(         \
      KDK_MOMENT)} KDK_CLONES double live_sum_from(const S* x, int64_t n, S from, double* count) { \
    return live_sum_of(x, n, from, count);                                                         \
  }                                                                                                \
  KDK_CLONES double squares(const S* x, int64_t n, S from, S rest) {                               \
    return squares_of(x, n, from, rest);                                                           \
  }                                                                                                \
  KDK_CLONES void center(S* g, const S* s_exp, S q_scale, int64_t n, S factor, S mean) {           \
    center_of(g, s_exp, q_scale, n, factor, mean);                                                 \
  }                                                                                                \
  KDK_CLONES void subtract_line(S* g, const S* s, int64_t n, S slope, S about, S level) {          \
    subtract_line_from(g, s, n, slope, about, level);                                              \
  }                                                                                                \
  KDK_CLONES double squared_gaps(const S* s, const S* t, int64_t n) {                              \
    return squared_gaps_of(s, t, n);                                                               \
  }                                                                                                \
  KDK_CLONES void add_gaps(S* g, const S* s, const S* t, int64_t n, S slope) {                     \
    add_gaps_of(g, s, t, n, slope);                                                                \
  }                                                                                                \
  KDK_CLONES void statistics(const Terms<S>& terms, const S* s, const S* t, int64_t n,             \
                             double* sums) {                                                       \
    statistics_of(terms, s, t, n, sums);                                                           \
  }
KDK_LOOPS(float)
KDK_LOOPS(double)

// The sweep of kl_row.h, and what it left in the stash as a gradient.
#define KDK_FAST(T)                                                                        \
  KDK_CLONES bool fast_kl(const T* input, const T* target, int64_t classes, FastRow& fast, \
                          FastSums& sums, Stash& stash) {                                  \
    return fast_sweeps<true>(input, target, classes, fast, sums, stash);                   \
  }                                                                                        \
  KDK_CLONES bool fast_kl_with_moment(const T* input, const T* target, int64_t classes,    \
                                      FastRow& fast, FastSums& sums, Stash& stash) {       \
    return fast_sweeps<true, true>(input, target, classes, fast, sums, stash);             \
  }
KDK_FAST(float)
KDK_FAST(Float16)
KDK_FAST(BFloat16)

KDK_CLONES void from_stash(const float* w, const float* e, int64_t n, float of_w, float of_e,
                           float* g) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) g[j] = of_w * w[j] - of_e * e[j];
}

// And with the exponentials of the input at temperature 1.
KDK_CLONES void from_stash(const float* w, const float* e, const float* raw, int64_t n, float of_w,
                           float of_e, float of_raw, float* g) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) g[j] = of_w * w[j] - of_e * e[j] + of_raw * raw[j];
}

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

  // Such a block into `to`, and up to whole vectors classes of -inf, which count for nothing.
  void fill_up(int64_t begin, int64_t n, S* to) const {
    const S* x = block(begin, n, to);
    if (x != to) std::copy_n(x, n, to);
    std::fill(to + n, to + whole_vectors(n), -static_cast<S>(INFINITY));
  }

  // (Inlined, as GCC drops a call to what does nothing but this.)
  KDK_INLINE void prefetch_after(int64_t begin) const {
    if (dtype == DType::kFloat16 || dtype == DType::kBFloat16) {
      prefetch_next(static_cast<const BFloat16*>(data) + begin);
    } else {
      prefetch_next(static_cast<const S*>(data) + begin);
    }
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
      return narrow_halves(x, n, static_cast<BFloat16*>(row) + begin);
    }
    if (dtype == DType::kFloat16) {
      return narrow_halves(x, n, static_cast<Float16*>(row) + begin);
    }
  }
  std::copy_n(x, n, static_cast<S*>(row) + begin);
}

int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Sum of 2^((x - max) factor) over what has been seen of a row.
template <typename S>
struct Sum {
  double factor;  // log2(e) over a temperature
  S max = -static_cast<S>(INFINITY);
  double sum = 0;

  explicit Sum(double factor) : factor(factor) {}

  void rise(S block_max) {
    if (block_max > max) {
      if (sum != 0) sum *= std::exp2((static_cast<double>(max) - block_max) * factor);
      max = block_max;
    }
  }

  // log2 of the sum with one more term, 2^((x - max) factor).
  double log2_with(double x) const {
    const double a = std::log2(sum), b = (x - max) * factor;
    if (sum == 0 || b - a > 1000) return b;  // the -inf of `max` too
    return a + std::log2(1 + std::exp2(b - a));
  }
};

// Mean and standard deviation (over count - 1) of what is not -inf.
struct Spread {
  double mean = 0, deviation = 0, count = 0;

  bool flat() const { return !(deviation > 0); }
  double inverse() const { return flat() ? 1 : 1 / (1e-7 + deviation); }

  // Block by block, each block's own mean and squares joining what was before it.
  template <typename S>
  void of(const Source<S>& row, int64_t classes) {
    alignas(64) S buffer[kBlock];
    // From one of the logits: a constant row is exactly 0.
    S from = -static_cast<S>(INFINITY);
    for (int64_t j = 0; j < classes && from == -static_cast<S>(INFINITY); ++j) from = row.at(j);
    double squares_before = 0;
    for (int64_t begin = 0; begin < classes; begin += kBlock) {
      row.prefetch_after(begin);
      const int64_t n = std::min(kBlock, classes - begin);
      const S* x = row.block(begin, n, buffer);
      double live = 0;
      const double sum = live_sum_from(x, n, from, &live);
      if (live == 0) continue;
      const S middle = static_cast<S>(sum / live);
      const double step = middle - mean, all = count + live;
      squares_before += squares(x, n, from, middle) + step * step * (count * live / all);
      mean += step * (live / all);
      count = all;
    }
    mean += from;
    deviation = count > 1 ? std::sqrt(squares_before / (count - 1)) : 0;
  }
};

// Whether the rows of the gradient may be made where they will be.
bool in_own_row(const LogitLossParams& params) {
  const bool is_half =
      params.grad_dtype == DType::kFloat16 || params.grad_dtype == DType::kBFloat16;
  return !is_half && params.grad_input != params.input;
}

// What a thread keeps of a row: the exponentials of both sides and of the input at temperature 1,
// each block's as seen from the maximum so far, and a gradient that cannot yet be where it will be.
template <typename S>
struct Scratch {
  bool keep;
  Buffer<S> s_exp, t_exp, raw_exp, s_max, t_max, gradient;
  alignas(64) S s_last[kBlock], t_last[kBlock];  // of each side's row, made to be of whole vectors
  Stash stash;

  Scratch(const LogitLossParams& params, bool later_sweep, bool kl) {
    keep = params.rows >= 64;
    if (keep) {
      const int64_t blocks = params.classes / kBlock + 1;
      // From 0: what is not written, as all is -inf so far, is multiplied by 0.
      const int64_t whole = whole_vectors(params.classes);
      for (auto* row : {&s_exp, &t_exp, &raw_exp}) std::fill_n(row->reserve(whole), whole, S(0));
      for (auto* row : {&s_max, &t_max}) row->reserve(blocks);
      if (kl) stash.e.reserve(params.classes), stash.shift.reserve(blocks);
    }
    if (later_sweep && !in_own_row(params)) gradient.reserve(whole_vectors(params.classes));
  }
};

// Rows of no more classes stay in a core's inner cache.
constexpr int64_t kInner = 2048;

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
  Scratch<S>& scratch;

  bool has_s_last = false, has_t_last = false;  // in the scratch

  // body(s, t, n, begin), with a null t unless `both`; of whole vectors. From memory where `fresh`,
  // else from one cache or another.
  template <typename Body>
  void blocks(bool both, const Body& body, bool fresh = false) {
    alignas(64) S s_buffer[kBlock], t_buffer[kBlock];
    const bool ahead = fresh || params.classes > kInner;
    const auto block = [&](const Source<S>& row, int64_t begin, int64_t n, S* buffer, S* last,
                           bool& has_last) -> const S* {
      if (ahead) row.prefetch_after(begin);
      if (n % kLanes == 0) return row.block(begin, n, buffer);
      if (!has_last) row.fill_up(begin, n, last);
      has_last = true;
      return last;
    };
    for (int64_t begin = 0; begin < params.classes; begin += kBlock) {
      const int64_t n = classes_from(begin);
      const S* s = block(input, begin, n, s_buffer, scratch.s_last, has_s_last);
      const S* t = both ? block(target, begin, n, t_buffer, scratch.t_last, has_t_last) : nullptr;
      body(s, t, whole_vectors(n), begin);
    }
  }

  // How many the block there has.
  int64_t classes_from(int64_t begin) const { return std::min(kBlock, params.classes - begin); }

  bool fast_kl_of(FastRow& fast, FastSums& sums, bool moment, char* gradient) {
    const auto sweep = [&](auto element) {
      using T = decltype(element);
      scratch.stash.w = reinterpret_cast<float*>(
          in_own_row(params) ? gradient : reinterpret_cast<char*>(scratch.gradient.data()));
      const T *s = static_cast<const T*>(input.data), *t = static_cast<const T*>(target.data);
      return moment ? fast_kl_with_moment(s, t, params.classes, fast, sums, scratch.stash)
                    : fast_kl(s, t, params.classes, fast, sums, scratch.stash);
    };
    return params.dtype == DType::kFloat32   ? sweep(float{})
           : params.dtype == DType::kFloat16 ? sweep(Float16{})
                                             : sweep(BFloat16{});
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
                               r * params.grad_stride * size_of(params.grad_dtype);
    const double temperature =
        input_temperatures ? double(input_temperatures[r]) : params.input_temperature_value;
    const double target_temperature =
        target_temperatures ? double(target_temperatures[r]) : params.target_temperature_value;
    const double scale = row_scales ? double(row_scales[r]) : params.scale;
    const double soft_scale = soft_scales ? double(soft_scales[r]) : params.soft_scale_value;
    const bool raw = params.hard_weight != 0 || params.z_loss != 0;
    const bool mse = params.logit_mse != 0;

    const bool spread = kSoft && params.standardize;
    Spread s_spread, t_spread;
    if (spread) {
      s_spread.of(Source<S>{input.data, input.dtype, -1}, params.classes);
      t_spread.of(Source<S>{target.data, target.dtype, -1}, params.classes);
    }
    const bool wants_moment = temperature_out != nullptr || (spread && gradient != nullptr);
    const double s_inverse = spread ? s_spread.inverse() : 1;
    const double t_inverse = spread ? t_spread.inverse() : 1;
    pair = Pair<S>(s_inverse / temperature * kLog2E, t_inverse / target_temperature * kLog2E);

    // Sweep 1.
    const double raw_factor = static_cast<S>(kLog2E);
    const double unit_factor = static_cast<S>(kLog2E * s_inverse);
    Sum<S> q(pair.s_factor), p(double(pair.t_factor) + pair.t_extra), raw_sum(raw_factor);
    Sum<S> q_unit(unit_factor), p_unit(static_cast<S>(kLog2E * t_inverse));
    // How a softmax at temperature 1 comes from the exponentials that there are: -1 if it does not.
    const auto squarings_to = [](const Sum<S>& from, double factor) {
      for (int k = 0; k <= kMostSquarings; ++k) {
        if (kSoft && std::ldexp(from.factor, k) == factor) return k;
      }
      return -1;
    };
    int raw_squarings = squarings_to(q, raw_factor);
    const int q_squarings = squarings_to(q, unit_factor);
    const int p_squarings = squarings_to(p, p_unit.factor);
    double live = 0, live_sum = 0, gaps = 0;  // gaps are squared
    int64_t s_top = 0, t_top = 0;
    const bool smooth = params.hard_weight != 0 && params.label_smoothing != 0;
    const auto add = [](Sum<S>& sum, const S* x, const S* exps, int squarings, int64_t n, S max,
                        S* out) {
      sum.rise(max);
      if (sum.max == -static_cast<S>(INFINITY)) return;
      sum.sum += squarings < 0 ? exponentials(x, n, sum.max, static_cast<S>(sum.factor), S(0), out)
                               : power_sum(exps, n, squarings);
    };
    alignas(64) S s_buffer[kBlock], t_buffer[kBlock], buffer[kBlock] = {};
    FastRow fast{};
    FastSums fast_sums{};
    bool is_fast = false;
    if constexpr (kD == Divergence::kKl && sizeof(S) == sizeof(float)) {
      if (scratch.keep && gradient != nullptr) {
        const double apart = static_cast<double>(pair.t_factor) + pair.t_extra - pair.s_factor;
        fast = {pair.s_factor, pair.t_factor, static_cast<float>(apart)};
        is_fast = fast_kl_of(fast, fast_sums, wants_moment, gradient);
        if (is_fast) raw_squarings = -1;
      }
    }
    const auto raw_sweep = [&](const S* s, int64_t n, int64_t begin) {
      raw_sum.rise(fast_sums.input_max);
      add(raw_sum, s, nullptr, -1, n, raw_sum.max, scratch.raw_exp.data() + begin);
      if (smooth) live_sum += live_sum_from(s, n, S(0), &live);
    };
    if (is_fast) {
      if (raw || mse) {
        blocks(mse, [&](const S* s, const S* t, int64_t n, int64_t begin) {
          if (raw) raw_sweep(s, n, begin);
          if (mse) gaps += squared_gaps(s, t, n);
        });
      }
    } else {
      blocks(
          kSoft || mse,
          [&](const S* s, const S* t, int64_t n, int64_t begin) {
            S* s_exp = scratch.keep ? scratch.s_exp.data() + begin : s_buffer;
            S* t_exp = scratch.keep ? scratch.t_exp.data() + begin : t_buffer;
            S* raw_exp = scratch.keep ? scratch.raw_exp.data() + begin : buffer;
            const S s_max = maximum(s, n);
            if (kSoft) {
              const S t_max = maximum(t, n);
              if (kStatistics && s_max > q.max) s_top = begin + (std::find(s, s + n, s_max) - s);
              if (kStatistics && t_max > p.max) t_top = begin + (std::find(t, t + n, t_max) - t);
              q.rise(s_max);
              p.rise(t_max);
              const double of_q = exponentials(s, n, q.max, pair.s_factor, S(0), s_exp);
              const double of_p = exponentials(t, n, p.max, pair.t_factor, pair.t_extra, t_exp);
              // Where all so far is -inf there is nothing to add.
              if (q.max != -static_cast<S>(INFINITY)) q.sum += of_q;
              if (p.max != -static_cast<S>(INFINITY)) p.sum += of_p;
              if (scratch.keep) {
                scratch.s_max[begin / kBlock] = q.max;
                scratch.t_max[begin / kBlock] = p.max;
              }
              if (kNormalized) {
                add(q_unit, s, s_exp, q_squarings, n, s_max, buffer);
                add(p_unit, t, t_exp, p_squarings, n, t_max, buffer);
              }
            } else if (scratch.keep) {
              scratch.s_max[begin / kBlock] = std::max(raw_sum.max, s_max);
            }
            if (raw) add(raw_sum, s, s_exp, raw_squarings, n, s_max, raw_exp);
            if (smooth) live_sum += live_sum_from(s, n, S(0), &live);
            if (mse) gaps += squared_gaps(s, t, n);
          },
          true);
    }
    const double s_label = label < 0 ? 0 : double(Source<S>{input.data, input.dtype, -1}.at(label));
    if (kLabel && smooth && s_label > -INFINITY) live_sum += s_label, live += 1;
    if (kSoft && !is_fast) pair.set(q.max, q.sum, p.max, p.sum);

    // The label's class against all others.
    double first_part = 0;  // of the loss, before `soft_scale`
    double unit_slope = 0;  // of a normalized divergence: d/dinput = unit_slope (q - onehot)
    double label_gap = 0;
    bool alone = false;
    if constexpr (kLabel) {
      const double t_label = Source<S>{target.data, target.dtype, -1}.at(label);
      label_gap = gap(s_label, t_label);
      gaps += label_gap * label_gap;
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
        // All smoothed away, the label counts for nothing, -inf or not.
        hard = lse - (params.label_smoothing == 1 ? 0 : (1 - params.label_smoothing) * s_label);
        if (smooth) hard -= params.label_smoothing * live_sum / live;
        hard *= params.hard_weight;
      }
      z = params.z_loss * lse * lse;
    }
    const double raw_slope = scale * (params.hard_weight + 2 * params.z_loss * lse);
    const double onehot = scale * params.hard_weight * (1 - params.label_smoothing);
    const double mse_slope = scale * 2 * params.logit_mse / params.classes;
    const double uniform = smooth ? scale * params.hard_weight * params.label_smoothing / live : 0;
    double unit_share = 1;  // of the label in the input's softmax at temperature 1
    // Softmaxes at temperature 1: their weight in the gradient over their sum.
    S unit_weight = 0, raw_weight = 0;
    if (kNormalized && unit_slope != 0 && q_unit.sum != 0) {
      const double log2_sum = q_unit.log2_with(s_label);
      unit_share = std::exp2((s_label - q_unit.max) * q_unit.factor - log2_sum);
      unit_weight = static_cast<S>(unit_slope * std::exp2(-log2_sum));
    }
    if (raw_slope != 0 && raw_sum.sum != 0) {
      raw_weight = static_cast<S>(raw_slope * std::exp2(-raw_log2));
    }

    // The exponentials of a block, and their scale: made again from the row's maxima, or as kept.
    const auto block_of = [&](const S* s, const S* t, int64_t n, int64_t begin) {
      if (!scratch.keep) {
        exponentials(s, n, pair.s_max, pair.s_factor, S(0), s_buffer);
        exponentials(t, n, pair.t_max, pair.t_factor, pair.t_extra, t_buffer);
        return Block<S>{s, t, s_buffer, t_buffer, pair.s_norm, pair.t_norm, n};
      }
      const S s_max = scratch.s_max[begin / kBlock], t_max = scratch.t_max[begin / kBlock];
      const auto rescale = [](S of, S then, S now, double factor) {
        return then == now
                   ? of
                   : static_cast<S>(of * std::exp2((static_cast<double>(then) - now) * factor));
      };
      return Block<S>{s,
                      t,
                      scratch.s_exp.data() + begin,
                      scratch.t_exp.data() + begin,
                      rescale(pair.s_norm, s_max, pair.s_max, q.factor),
                      rescale(pair.t_norm, t_max, pair.t_max, p.factor),
                      n};
    };
    // The exponentials at temperature 1, seen from `max`: powers of the tempered ones times a
    // scale, or kept ones, or made here.
    struct Unit {
      const S* exps;
      int squarings;
      S scale;
    };
    const auto unit_of = [&](const Block<S>& block, int64_t begin, double factor, int squarings,
                             S max, bool is_raw) {
      const S* exps = squarings < 0 ? buffer : block.s_exp;
      S scale = 1;
      if (squarings >= 0) {
        const S then = scratch.keep ? scratch.s_max[begin / kBlock] : max;
        if (then != max) scale = static_cast<S>(std::exp2((double(then) - max) * q.factor));
      } else if (is_raw && scratch.keep) {
        exps = scratch.raw_exp.data() + begin;
        const S then = scratch.s_max[begin / kBlock];
        if (then != max) scale = static_cast<S>(std::exp2((double(then) - max) * factor));
      } else {
        exponentials(block.s, block.n, max, static_cast<S>(factor), S(0), buffer);
      }
      return Unit{exps, std::max(squarings, 0), scale};
    };

    // Sweep 2.
    const bool at_once = !kSlope && !spread;
    const bool own_row = in_own_row(params);
    // With standardize: g_j is less level + correction (s_j - about), about the mean.
    double correction = 0, level = 0;
    const double about = spread ? s_spread.mean : 0;
    Found found;
    double unit_moment = 0;
    alignas(64) S work[kBlock];
    // A last block grows to whole vectors: not in its own row.
    const auto is_there = [&](int64_t begin, int64_t n) {
      return own_row && n == classes_from(begin);
    };
    const auto row_at = [&](int64_t begin, int64_t n) {
      return gradient == nullptr  ? work
             : is_there(begin, n) ? reinterpret_cast<S*>(gradient) + begin
             : at_once || own_row ? work
                                  : scratch.gradient.data() + begin;
    };
    // What the gradient has besides the soft term, and out with it.
    const auto finish = [&](S* g, const Block<S>& block, int64_t begin) {
      const int64_t n = block.n;
      if (kNormalized && unit_weight != 0) {
        const Unit unit = unit_of(block, begin, q_unit.factor, q_squarings, q_unit.max, false);
        add_power(g, unit.exps, n, unit.squarings, unit.scale, unit_weight);
      }
      if (raw_weight != 0 && !is_fast) {
        const Unit unit = unit_of(block, begin, raw_factor, raw_squarings, raw_sum.max, true);
        add_power(g, unit.exps, n, unit.squarings, unit.scale, raw_weight);
      }
      if (correction != 0 || level != 0 || uniform != 0) {
        const S middle = static_cast<S>(about);
        subtract_line(g, block.s, n, static_cast<S>(correction), middle,
                      static_cast<S>(level + uniform + correction * (middle - about)));
      }
      if (mse) add_gaps(g, block.s, block.t, n, static_cast<S>(mse_slope));
      if (label >= begin && label < begin + n) {
        if constexpr (kLabel) {
          // Skipped so far: all of it here.
          double at_label = soft_factor * terms.label_slope + unit_slope * (unit_share - 1);
          if (mse) at_label += mse_slope * label_gap;
          if (s_label > -INFINITY) at_label -= correction * (s_label - about) + level + uniform;
          if (raw_slope != 0) at_label += raw_slope * std::exp(s_label - lse);
          g[label - begin] = static_cast<S>(at_label - onehot);
        } else {
          g[label - begin] -= static_cast<S>(onehot);
        }
      }
      if (!is_there(begin, n)) {
        store_block(g, classes_from(begin), begin, params.grad_dtype, gradient);
      }
    };
    double sums[3] = {};  // both entropies, in bits, and the overlap
    if (is_fast) {
      found.loss = fast_sums.loss();
      if (wants_moment) found.moment = fast_sums.moment();
    } else if constexpr (kSoft) {
      const Visit<S> visit = visit_of<kD, S>(wants_moment);
      const S factor = static_cast<S>(kSlope ? 1 : soft_factor);
      blocks(true, [&](const S* s, const S* t, int64_t n, int64_t begin) {
        const Block<S> block = block_of(s, t, n, begin);
        S* g = row_at(begin, n);
        visit(terms, block, factor, g, &found);
        if (at_once && gradient != nullptr) finish(g, block, begin);
        if (wants_moment && unit_weight != 0) {
          const Unit unit = unit_of(block, begin, q_unit.factor, q_squarings, q_unit.max, false);
          unit_moment +=
              power_moment(unit.exps, s, n, unit.squarings, unit.scale, unit_weight, q_unit.max);
        }
        if (kStatistics) statistics(terms, s, t, n, sums);
      });
    }
    const double loss = found.loss;
    // The mean of these slopes is the loss itself, whose terms are all of one sign.
    const bool loss_is_mean = kD == Divergence::kReverseKl || kD == Divergence::kReverseDecoupled ||
                              kD == Divergence::kReverseNormalized;
    // With it goes what else is to be taken off times Q.
    const double mean = !kSlope ? 0
                                : (loss_is_mean ? loss : found.weights) +
                                      (kD == Divergence::kReverseDecoupled ? terms.label_slope : 0);
    if (kSoft && wants_moment) {
      found.moment -= mean * found.center;
      found.weights -= mean * found.mass;
      if constexpr (kLabel) {
        found.weights += terms.label_slope;
        if (s_label > -INFINITY) {
          found.moment += terms.label_slope * (s_label - pair.s_max);
          if (unit_weight != 0) {
            unit_moment += unit_slope * (unit_share - 1) * (s_label - q_unit.max);
          }
        } else {
          found.dead += terms.label_slope;
        }
      }
      // All weights sum to 0 but for rounding: what they do sum to is taken off times the mean of y
      // under Q.
      double moment = found.moment;
      if (found.mass > 0) moment -= found.weights * found.center / found.mass;
      // An infinite loss has weight on logits of -inf, which the others lack.
      moment -= found.dead * (pair.s_max - about);
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
    // Sweep 3.
    if (is_fast) {
      if constexpr (sizeof(S) == sizeof(float)) {
        const double of_w = soft_factor / (fast_sums.S * fast_sums.exp_y());
        const double of_e = of_w * (fast_sums.B / fast_sums.S);
        for (int64_t begin = 0; begin < params.classes; begin += kBlock) {
          const int64_t n = classes_from(begin);
          const S* s = input.block(begin, n, s_buffer);
          const S* t = mse ? target.block(begin, n, t_buffer) : nullptr;
          const float then = scratch.stash.shift[begin / kBlock];
          const double rescale = then == fast.target_shift
                                     ? 1.0
                                     : std::exp2(static_cast<double>(then) - fast.target_shift);
          S* g = own_row ? reinterpret_cast<S*>(gradient) + begin : work;
          const float *w = scratch.stash.w + begin, *e = scratch.stash.e.data() + begin;
          const auto a = static_cast<float>(of_w * rescale), b = static_cast<float>(of_e * rescale);
          if (raw_weight != 0) {
            from_stash(w, e, scratch.raw_exp.data() + begin, n, a, b, raw_weight, g);
          } else {
            from_stash(w, e, n, a, b, g);
          }
          finish(g, Block<S>{s, t, nullptr, nullptr, 0, 0, n}, begin);
        }
      }
    } else if (gradient != nullptr && !(kSoft && at_once)) {
      blocks(kSoft || mse, [&](const S* s, const S* t, int64_t n, int64_t begin) {
        const Block<S> block =
            kSoft ? block_of(s, t, n, begin) : Block<S>{s, t, nullptr, nullptr, 0, 0, n};
        S* g = row_at(begin, n);
        if (kSlope) {
          center(g, block.s_exp, block.q_scale, n, static_cast<S>(soft_factor),
                 static_cast<S>(mean));
        } else if (!kSoft) {
          std::fill_n(g, n, S(0));
        }
        finish(g, block, begin);
      });
    }

    double soft = 0;
    if constexpr (kNormalized) {
      soft = first_part + soft_scale * loss;
    } else if constexpr (kSoft) {
      soft = soft_scale == 0 ? 0 : soft_scale * (first_part + loss);
    }
    const double squares = mse ? params.logit_mse * gaps / params.classes : 0;
    if (loss_out != nullptr) loss_out[r] = static_cast<S>(scale * (soft + hard + z + squares));
    if (terms_out != nullptr) {
      const double part = kNormalized ? first_part : first_part * soft_scale;
      const double values[kTerms] = {soft, hard, z, part, squares};
      const double statistics[kTerms] = {kLn2 * sums[0], kLn2 * sums[1], sums[2],
                                         s_top == t_top ? 1.0 : 0.0};
      for (int k = 0; k < kTerms; ++k) {
        terms_out[k * params.rows + r] =
            static_cast<S>(scale * (kStatistics ? statistics[k] : values[k]));
      }
    }
  }
};

// The first row that holds a label which is no class, or -1.
template <Divergence kD, typename S>
int64_t rows_of(const LogitLossParams& params, int64_t begin_row, int64_t end_row) {
  const int64_t size = size_of(params.dtype), grad_size = size_of(params.grad_dtype);
  const bool needs_label = of_labels(kD) || params.hard_weight != 0;
  constexpr bool kKl = kD == Divergence::kKl;
  Scratch<S> scratch(params, has_slope(kD) || kKl || params.standardize || kD == Divergence::kNone,
                     kKl);
  for (int64_t r = begin_row; r < end_row; ++r) {
    if (params.mask != nullptr && params.mask[r] == 0) {
      if (params.loss != nullptr) static_cast<S*>(params.loss)[r] = 0;
      for (int k = 0; k < kTerms && params.terms != nullptr; ++k) {
        static_cast<S*>(params.terms)[k * params.rows + r] = 0;
      }
      if (params.grad_input != nullptr) {
        std::memset(static_cast<char*>(params.grad_input) + r * params.grad_stride * grad_size, 0,
                    grad_size * params.classes);
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
        params.target == nullptr ? input : row(params.target, params.target_stride);
    LogitLossRow<kD, S> work{
        params,
        input,
        target,
        {static_cast<S>(params.first), static_cast<S>(params.second), static_cast<S>(params.mix)},
        scratch};
    work.run(r, label);
  }
  return -1;
}

#define KDK_ROWS_OF(name) rows_of<Divergence::k##name, S>,
// In the order of Divergence.
template <typename S>
constexpr RowsOfLogits kRows[] = {rows_of<Divergence::kNone, S>, KDK_DIVERGENCES(KDK_ROWS_OF)};

}  // namespace

RowsOfLogits rows_of_logits(const LogitLossParams& params) {
  const bool same = params.grad_dtype == params.dtype;
  const bool is_narrower = params.dtype == DType::kFloat32 && params.grad_dtype != DType::kFloat64;
  if (!same && !is_narrower) throw std::invalid_argument("no gradient of that type");
  const auto which = static_cast<size_t>(params.divergence);
  if (which >= std::size(kRows<float>)) throw std::invalid_argument("no such divergence");
  return params.dtype == DType::kFloat64 ? kRows<double>[which] : kRows<float>[which];
}

void refuse_label(const LogitLossParams& params, int64_t row) {
  throw std::invalid_argument("labels must be in [0, " + std::to_string(params.classes) +
                              ") where they count, got " + std::to_string(params.labels[row]));
}

void logit_loss(const LogitLossParams& params, int threads) {
  const RowsOfLogits body = rows_of_logits(params);
  std::atomic<int64_t> wrong{-1};
  for_each_run_of_rows(
      params.rows, params.classes, threads,
      [&](int64_t begin, int64_t end) {
        const int64_t found = body(params, begin, end);
        if (found >= 0) wrong = found;
      },
      kElementsPerThread / 4);  // an element takes several times as long as one of kl_div
  if (wrong >= 0) refuse_label(params, wrong);
}

int64_t count_labels(const int64_t* labels, int64_t rows, int64_t label) {
  return std::count(labels, labels + rows, label);
}

}  // namespace kdkernels::cpu
