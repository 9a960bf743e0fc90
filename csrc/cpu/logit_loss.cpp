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
#include <atomic>
#include <stdexcept>
#include <string>

#include "../divergence.h"
#include "../kdkernels.h"
#include "parallel.h"
#include "softmax.h"

namespace kdkernels::cpu {
namespace {

// A row in the statistics type S, whatever its own: block by block, with class `skip` taken for
// -inf (-1: none).
template <typename S>
struct Source {
  const void* data;
  DType dtype;
  int64_t skip;

  KDK_INLINE const S* block(int64_t begin, int64_t n, S* buffer) const {
    const S* x;
    if constexpr (sizeof(S) == sizeof(double)) {
      x = static_cast<const S*>(data) + begin;
    } else if (dtype == DType::kBFloat16) {
      x = widen_block(static_cast<const BFloat16*>(data) + begin, n, buffer);
    } else if (dtype == DType::kFloat16) {
      x = widen_block(static_cast<const Float16*>(data) + begin, n, buffer);
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

  KDK_INLINE S at(int64_t j) const {
    S value = 0;
    const Source whole{data, dtype, -1};
    return *whole.block(j, 1, &value);
  }
};

template <typename S>
KDK_INLINE void store_block(const S* x, int64_t n, int64_t begin, DType dtype, void* row) {
  if constexpr (sizeof(S) == sizeof(float)) {
    if (dtype == DType::kBFloat16) {
      narrow_block(x, n, static_cast<BFloat16*>(row) + begin);
    } else if (dtype == DType::kFloat16) {
      narrow_block(x, n, static_cast<Float16*>(row) + begin);
    }
  }
}

KDK_INLINE int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

template <typename S>
KDK_INLINE S maximum(const S* x, int64_t n) {
  S max = -static_cast<S>(INFINITY);
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < n; ++j) max = x[j] > max ? x[j] : max;
  return max;
}

// Logits from their maximum, bounded so that -inf may be multiplied with 0.
template <typename S>
KDK_INLINE S below(S x, S max) {
  const S distance = x - max;
  return distance < S(-1e30) ? S(-1e30) : distance;
}

// 2^x for x <= 0, and 0 where a float would underflow.
template <typename S>
KDK_INLINE S power_or_zero(S x) {
  return x < S(-126) && sizeof(S) == sizeof(float) ? S(0) : exp2_above(x);
}

// Sum of 2^((x - max) factor) over what has been seen of a row, a block's maximum given with it.
template <typename S>
struct Sum {
  S factor;  // log2(e) over a temperature
  S extra;   // what the rounding of factor took off
  S max = -static_cast<S>(INFINITY);
  double sum = 0;

  KDK_INLINE Sum(S factor, S extra) : factor(factor), extra(extra) {}

  KDK_INLINE void add(const S* x, int64_t n, S block_max) {
    if (block_max > max) {
      if (sum != 0) sum *= std::exp2((static_cast<double>(max) - block_max) * factor);
      max = block_max;
    }
    const S from = max;
    S block_sum = 0;
#pragma omp simd reduction(+ : block_sum)
    for (int64_t j = 0; j < n; ++j) {
      const S y = below(x[j], from);
      block_sum += exp2_above(y * factor + y * extra);
    }
    if (from != -static_cast<S>(INFINITY)) sum += block_sum;
  }

  // log2 of the sum with one more term, 2^((x - max) factor).
  KDK_INLINE double log2_with(double x) const {
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
  KDK_INLINE void of(const Source<S>& row, int64_t classes) {
    S buffer[kBlock];
    const auto blocks = [&](const auto& body) KDK_INLINED {
      for (int64_t begin = 0; begin < classes; begin += kBlock) {
        const int64_t n = std::min(kBlock, classes - begin);
        body(row.block(begin, n, buffer), n);
      }
    };
    S top = -static_cast<S>(INFINITY);
    blocks([&](const S* x, int64_t n) KDK_INLINED { top = std::max(top, maximum(x, n)); });
    max = top;
    constexpr S kLowest = -static_cast<S>(INFINITY);
    blocks([&](const S* x, int64_t n) KDK_INLINED {
      double sum = 0;
      int64_t live = 0;
#pragma omp simd reduction(+ : sum, live)
      for (int64_t j = 0; j < n; ++j) {
        sum += x[j] == kLowest ? 0.0 : static_cast<double>(x[j] - top);
        live += x[j] == kLowest ? 0 : 1;
      }
      mean += sum, count += static_cast<double>(live);
    });
    mean = count > 0 ? mean / count : 0;
    double squares = 0;
    blocks([&](const S* x, int64_t n) KDK_INLINED {
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < n; ++j) {
        const double z = static_cast<double>(x[j] - top) - mean;
        sum += x[j] == kLowest ? 0.0 : z * z;
      }
      squares += sum;
    });
    deviation = count > 1 ? std::sqrt(squares / (count - 1)) : 0;
  }
};

// Both sides of a row as softmaxes, and D = log P - log Q. Where the two factors are near each
// other the logits are differenced first; there the target's factor is made to be to the exact one
// as the input's rounded factor is to its own, so that rounding changes the temperature of both
// alike.
template <typename S>
struct Pair {
  S s_factor, t_factor, t_extra, step;
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
    step = static_cast<S>(t_like - s_factor);
  }

  KDK_INLINE void set(const Sum<S>& q, const Sum<S>& p) {
    constexpr S kLowest = -static_cast<S>(INFINITY);
    // A side of nothing but -inf has no mass.
    const bool s_empty = q.max == kLowest, t_empty = p.max == kLowest;
    s_max = s_empty ? S(0) : q.max;
    t_max = t_empty ? S(0) : p.max;
    s_log2 = std::log2(q.sum);
    t_log2 = std::log2(p.sum);
    s_norm = s_empty ? S(0) : static_cast<S>(1 / q.sum);
    t_norm = t_empty ? S(0) : static_cast<S>(1 / p.sum);
    const double difference = t_log2 - s_log2;
    offset = static_cast<S>(alike ? (static_cast<double>(t_max) - s_max) * s_factor + difference
                                  : difference);
  }

  KDK_INLINE S s_power(S s) const { return below(s, s_max) * s_factor; }
  KDK_INLINE S t_power(S t) const {
    const S y = below(t, t_max);
    return y * t_factor + y * t_extra;
  }
  KDK_INLINE S q(S s) const { return power_or_zero(s_power(s)) * s_norm; }
  KDK_INLINE S p(S t) const { return power_or_zero(t_power(t)) * t_norm; }

  // log Q_j and log P_j, -inf where the logit is.
  KDK_INLINE S log_q(S s) const {
    const S y = s_power(s) - static_cast<S>(s_log2);
    return s == -static_cast<S>(INFINITY) ? s : static_cast<S>(kLn2) * y;
  }
  KDK_INLINE S log_p(S t) const {
    const S y = t_power(t) - static_cast<S>(t_log2);
    return t == -static_cast<S>(INFINITY) ? t : static_cast<S>(kLn2) * y;
  }

  // -inf where P_j = 0 for a target of -inf, also where Q_j = 0 too.
  template <typename R>
  KDK_INLINE R delta(R s, R t) const {
    constexpr R kLowest = -static_cast<R>(INFINITY);
    const R from_max = t - static_cast<R>(t_max);
    const R together = (t - s) * s_factor + from_max * step;
    const R apart = from_max * t_factor - (s - static_cast<R>(s_max)) * s_factor;
    const R d = static_cast<R>(kLn2) * ((alike ? together : apart) - offset);
    return t == kLowest ? kLowest : d;
  }
};

// The part of one class: of the loss, and of the gradient with respect to the input's scaled logit,
// direct + q (slope - mean).
template <typename S>
struct Part {
  S loss, direct, slope;
};

// A softmax at temperature 1 whose part in the gradient is weight 2^((s - max) factor).
template <typename S>
struct Unit {
  S factor = 0, weight = 0;
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
  S first, second, mix;
  Pair<S> pair{1, 1};
  S label_slope = 0;  // a decoupled divergence's derivative with respect to the label's log-odds

  template <typename Body>
  KDK_INLINE void blocks(const Body& body) const {
    S s_buffer[kBlock], t_buffer[kBlock];
    for (int64_t begin = 0; begin < params.classes; begin += kBlock) {
      const int64_t n = std::min(kBlock, params.classes - begin);
      const S* s = input.block(begin, n, s_buffer);
      body(s, kSoft ? target.block(begin, n, t_buffer) : s, n, begin);
    }
  }

  KDK_INLINE Part<S> part(S s, S t) const {
    const S p = pair.p(t), q = pair.q(s), d = pair.delta(s, t);
    if constexpr (kD == Divergence::kReverseKl) {
      const SlopeTerm<S> term = reverse_kl_term(p, q, d);
      return {term.loss, 0, term.slope};
    } else if constexpr (kD == Divergence::kMixture) {
      const SlopeTerm<S> term = mixture_term(p, q, d, mix, first, second);
      return {term.loss, 0, term.slope};
    } else if constexpr (kD == Divergence::kTotalVariation) {
      const SlopeTerm<S> term = total_variation_term(p, q, d);
      return {term.loss, 0, term.slope};
    } else if constexpr (kD == Divergence::kDecoupled) {
      const KlTerm<S> term = kl_term(p, q, d);
      return {second * term.excess, second * term.difference - label_slope * q, 0};
    } else if constexpr (kD == Divergence::kReverseDecoupled) {
      const SlopeTerm<S> term = reverse_kl_term(p, q, d);
      return {second * term.loss, -label_slope * q, second * term.slope};
    } else if constexpr (kD == Divergence::kNormalized) {
      return {p > S(0) ? -second * p * pair.log_q(s) : S(0), second * kl_term(p, q, d).difference,
              0};
    } else if constexpr (kD == Divergence::kReverseNormalized) {
      const S log_p = pair.log_p(t);
      return {q > S(0) ? -second * q * log_p : S(0), 0, -second * log_p};
    } else {
      const KlTerm<S> term = kl_term(p, q, d);
      return {term.excess, term.difference, 0};
    }
  }

  KDK_INLINE static S gradient_of(const Part<S>& part, S q, S mean) {
    return kSlope ? part.direct + slope_gradient(q, part.slope, mean) : part.direct;
  }

  KDK_INLINE void run(int64_t r, int64_t label) {
    const auto* soft_scales = static_cast<const S*>(params.soft_scale);
    const auto* row_scales = static_cast<const S*>(params.row_scale);
    const auto* input_temperatures = static_cast<const S*>(params.input_temperature);
    const auto* target_temperatures = static_cast<const S*>(params.target_temperature);
    auto* loss_out = static_cast<S*>(params.loss);
    auto* terms = static_cast<S*>(params.terms);
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
    blocks([&](const S* s, const S* t, int64_t n, int64_t begin) KDK_INLINED {
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
      if (smooth) {
        double sum = 0;
        int64_t count = 0;
#pragma omp simd reduction(+ : sum, count)
        for (int64_t j = 0; j < n; ++j) {
          const bool is_live = s[j] > -static_cast<S>(INFINITY);
          sum += is_live ? static_cast<double>(s[j]) : 0.0;
          count += is_live ? 1 : 0;
        }
        live_sum += sum, live += static_cast<double>(count);
      }
    });
    const double s_label = label < 0 ? 0 : double(Source<S>{input.data, input.dtype, -1}.at(label));
    if (kLabel && smooth && s_label > -INFINITY) live_sum += s_label, live += 1;
    if (kSoft) pair.set(q, p);

    // The label's class against all others.
    double first_part = 0;  // of the loss, before `soft_scale`
    double unit_slope = 0;  // of a normalized divergence: d/dinput = unit_slope (q - onehot)
    bool alone = false;
    if constexpr (kLabel) {
      const double t_label = Source<S>{target.data, target.dtype, -1}.at(label);
      const bool s_alone = q.sum == 0, t_alone = p.sum == 0;
      alone = s_alone || t_alone;
      if (alone) second = 0;
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
          return is_alone ? INFINITY : kLn2 * ((x - max) * factor - log2_sum);
        };
        const double u_q = odds(s_label, pair.s_max, pair.s_factor, pair.s_log2, s_alone);
        const double u_p =
            odds(t_label, pair.t_max, double(pair.t_factor) + pair.t_extra, pair.t_log2, t_alone);
        const double d = u_p == u_q ? 0
                         : alone || std::isinf(u_p) || std::isinf(u_q)
                             ? u_p - u_q
                             : pair.delta(s_label, t_label);
        const BernoulliTerm<double> term = kD == Divergence::kDecoupled
                                               ? bernoulli_kl_term(u_p, u_q, d)
                                               : bernoulli_reverse_kl_term(u_p, u_q, d);
        first_part = params.first == 0 ? 0 : params.first * term.loss;
        label_slope = static_cast<S>(params.first * term.gradient);
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
    const S unit_max = q_unit.max == -static_cast<S>(INFINITY) ? S(0) : q_unit.max;
    const S raw_max = raw_sum.max == -static_cast<S>(INFINITY) ? S(0) : raw_sum.max;
    Unit<S> unit_soft, unit_raw;
    if (unit_slope != 0 && q_unit.sum != 0) {
      unit_soft = {q_unit.factor,
                   static_cast<S>(unit_slope * std::exp2(-q_unit.log2_with(s_label)))};
    }
    if (raw && raw_slope != 0) {
      unit_raw = {kLog2EFloat, static_cast<S>(raw_slope * std::exp2(-raw_log2))};
    }

    // Sweep 2, with the gradient where that needs nothing more, and sweep 3.
    const bool wants_moment = temperature_out != nullptr || (spread && gradient != nullptr);
    const bool at_once = !kSlope && !(spread && gradient != nullptr);
    double loss = 0, mean = 0, moment = 0, weights = 0, dead = 0, center = 0, mass = 0,
           unit_moment = 0;
    double p_entropy = 0, q_entropy = 0, overlap = 0;
    // With standardize: g_j is less level + correction (s_j - about), about the mean.
    double correction = 0, level = 0;
    const double about = s_spread.max + s_spread.mean;
    const auto measure = [&](const S* s, const S* t, int64_t n) KDK_INLINED {
      S sum = 0, slopes = 0;
#pragma omp simd reduction(+ : sum, slopes)
      for (int64_t j = 0; j < n; ++j) {
        const Part<S> found = part(s[j], t[j]);
        sum += found.loss;
        if (kSlope) slopes += slope_gradient(pair.q(s[j]), found.slope, S(0));
      }
      loss += sum, mean += slopes;
    };
    // Of sum_j g_j z_j over the logits that are not -inf, z from the maximum. All weights g sum to
    // 0 but for rounding: what they do sum to is taken off times the mean of z under Q.
    const auto moments = [&](const S* s, const S* t, int64_t n) KDK_INLINED {
      const S middle = static_cast<S>(mean);
      S sum = 0, weight = 0, lost = 0, of_q = 0, qs = 0, units = 0;
#pragma omp simd reduction(+ : sum, weight, lost, of_q, qs, units)
      for (int64_t j = 0; j < n; ++j) {
        const S q_j = pair.q(s[j]), y = below(s[j], pair.s_max);
        const S g = gradient_of(part(s[j], t[j]), q_j, middle);
        const bool live = s[j] > -static_cast<S>(INFINITY) || s[j] != s[j];
        sum += live ? g * y : S(0), weight += g, lost += live ? S(0) : g;
        of_q += q_j * y, qs += q_j;
        if (kNormalized) {
          const S z = below(s[j], unit_max);
          units += unit_soft.weight * power_or_zero(z * unit_soft.factor) * z;
        }
      }
      moment += sum, weights += weight, dead += lost, center += of_q, mass += qs,
          unit_moment += units;
    };
    S buffer[kBlock];
    const auto write = [&](const S* s, const S* t, int64_t n, int64_t begin) KDK_INLINED {
      S* g = buffer;
      if (params.dtype == DType::kFloat32 || params.dtype == DType::kFloat64) {
        g = reinterpret_cast<S*>(gradient) + begin;
      }
      const S factor = static_cast<S>(soft_factor), middle = static_cast<S>(mean);
      S sum = 0;
      if (kSoft) {
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; ++j) {
          const Part<S> found = part(s[j], t[j]);
          g[j] = factor * gradient_of(found, pair.q(s[j]), middle);
          sum += found.loss;
        }
        if (at_once) loss += sum;
        if (correction != 0 || level != 0) {
          const S slope = static_cast<S>(correction), middle_logit = static_cast<S>(about);
          const S constant = static_cast<S>(level + correction * (middle_logit - about));
#pragma omp simd
          for (int64_t j = 0; j < n; ++j) {
            const S change = slope * (s[j] - middle_logit) + constant;
            g[j] -= s[j] > -static_cast<S>(INFINITY) ? change : S(0);
          }
        }
      } else {
        std::fill_n(g, n, S(0));
      }
      if (kNormalized && unit_soft.weight != 0) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          g[j] += unit_soft.weight * power_or_zero(below(s[j], unit_max) * unit_soft.factor);
        }
      }
      if (unit_raw.weight != 0) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          g[j] += unit_raw.weight * power_or_zero(below(s[j], raw_max) * unit_raw.factor);
        }
      }
      if (uniform != 0) {
        const S each = static_cast<S>(uniform);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) g[j] -= s[j] > -static_cast<S>(INFINITY) ? each : S(0);
      }
      if (label >= begin && label < begin + n) {
        if constexpr (kLabel) {
          // Skipped so far: all of it here.
          double at_label = soft_factor * label_slope;
          if (kNormalized) {
            const double share =
                q_unit.sum == 0
                    ? 1
                    : std::exp2((s_label - q_unit.max) * q_unit.factor - q_unit.log2_with(s_label));
            at_label += unit_slope * (share - 1);
          }
          if (s_label > -INFINITY && (correction != 0 || level != 0)) {
            at_label -= correction * (s_label - about) + level;
          }
          if (raw_slope != 0) at_label += raw_slope * std::exp(s_label - lse);
          if (s_label > -INFINITY) at_label -= uniform;
          g[label - begin] = static_cast<S>(at_label - onehot);
        } else {
          g[label - begin] -= static_cast<S>(onehot);
        }
      }
      store_block(g, n, begin, params.dtype, gradient);
    };

    if (kSoft && (!at_once || gradient == nullptr || kStatistics)) {
      if (!at_once || gradient == nullptr) {
        blocks([&](const S* s, const S* t, int64_t n, int64_t) KDK_INLINED { measure(s, t, n); });
      }
      // The slopes of these are of the size of the loss, whose terms are all of one sign.
      if (kD == Divergence::kReverseKl || kD == Divergence::kReverseDecoupled) mean = loss;
      if (kD == Divergence::kReverseNormalized) mean = loss;
    }
    if (kSoft && wants_moment) {
      blocks([&](const S* s, const S* t, int64_t n, int64_t) KDK_INLINED { moments(s, t, n); });
      if constexpr (kLabel) {
        weights += label_slope;
        if (s_label > -INFINITY) {
          moment += label_slope * (s_label - pair.s_max);
        } else {
          dead += label_slope;
        }
        if (kNormalized && unit_slope != 0 && q_unit.sum != 0 && s_label > -INFINITY) {
          const double share =
              std::exp2((s_label - q_unit.max) * q_unit.factor - q_unit.log2_with(s_label));
          unit_moment += unit_slope * (share - 1) * (s_label - unit_max);
        }
      }
      if (mass > 0) moment -= weights * center / mass;
      // An infinite loss has weight on logits of -inf, which the others lack.
      moment -= dead * (pair.s_max - (spread ? about : 0));
      if (temperature_out != nullptr) {
        temperature_out[r] = static_cast<S>(moment == 0 ? 0 : -soft_factor * moment / temperature);
      }
      if (spread && !s_spread.flat()) {
        correction = (soft_factor * moment + unit_moment) * s_inverse /
                     ((s_spread.count - 1) * s_spread.deviation);
        level = -soft_factor * dead / s_spread.count;
      }
    } else if (temperature_out != nullptr) {
      temperature_out[r] = 0;
    }
    if (kStatistics) {
      blocks([&](const S* s, const S* t, int64_t n, int64_t) KDK_INLINED {
        S p_sum = 0, q_sum = 0, least = 0;
#pragma omp simd reduction(+ : p_sum, q_sum, least)
        for (int64_t j = 0; j < n; ++j) {
          const S p_j = pair.p(t[j]), q_j = pair.q(s[j]);
          p_sum += p_j * (static_cast<S>(pair.t_log2) - pair.t_power(t[j]));
          q_sum += q_j * (static_cast<S>(pair.s_log2) - pair.s_power(s[j]));
          least += p_j < q_j ? p_j : q_j;
        }
        p_entropy += p_sum, q_entropy += q_sum, overlap += least;
      });
    }
    if (gradient != nullptr) {
      blocks([&](const S* s, const S* t, int64_t n, int64_t begin)
                 KDK_INLINED { write(s, t, n, begin); });
    }

    double soft = 0;
    if constexpr (kNormalized) {
      soft = first_part + soft_scale * loss;
    } else if constexpr (kSoft) {
      soft = soft_scale == 0 ? 0 : soft_scale * (first_part + loss);
    }
    if (loss_out != nullptr) loss_out[r] = static_cast<S>(scale * (soft + hard + z));
    if (terms != nullptr) {
      const double part = kNormalized ? first_part : first_part * soft_scale;
      const double values[4] = {soft, hard, z, part};
      const double statistics[4] = {kLn2 * p_entropy, kLn2 * q_entropy, overlap,
                                    s_top == t_top ? 1.0 : 0.0};
      for (int k = 0; k < 4; ++k) {
        terms[k * params.rows + r] =
            static_cast<S>(scale * (kStatistics ? statistics[k] : values[k]));
      }
    }
  }
};

// The first row that holds a label which is no class, or -1.
template <Divergence kD, typename S>
KDK_INLINE int64_t rows_of(const LogitLossParams& params, int64_t begin_row, int64_t end_row) {
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
    LogitLossRow<kD, S> work{params,
                             input,
                             target,
                             static_cast<S>(params.first),
                             static_cast<S>(params.second),
                             static_cast<S>(params.mix)};
    work.run(r, label);
  }
  return -1;
}

// Clones are made of plain functions only, one for each divergence and type of statistics.
#define KDK_ROWS(name)                                                               \
  KDK_CLONES int64_t name##_float(const LogitLossParams& p, int64_t b, int64_t e) {  \
    return rows_of<Divergence::k##name, float>(p, b, e);                             \
  }                                                                                  \
  KDK_CLONES int64_t name##_double(const LogitLossParams& p, int64_t b, int64_t e) { \
    return rows_of<Divergence::k##name, double>(p, b, e);                            \
  }
KDK_ROWS(None)
KDK_ROWS(Kl)
KDK_ROWS(ReverseKl)
KDK_ROWS(Mixture)
KDK_ROWS(TotalVariation)
KDK_ROWS(Decoupled)
KDK_ROWS(ReverseDecoupled)
KDK_ROWS(Normalized)
KDK_ROWS(ReverseNormalized)
KDK_ROWS(Statistics)
#undef KDK_ROWS

using Rows = int64_t (*)(const LogitLossParams&, int64_t, int64_t);
// In the order of Divergence.
constexpr int kDivergences = 10;

}  // namespace

void logit_loss(const LogitLossParams& params, int threads) {
  const Rows of_float[kDivergences] = {None_float,
                                       Kl_float,
                                       ReverseKl_float,
                                       Mixture_float,
                                       TotalVariation_float,
                                       Decoupled_float,
                                       ReverseDecoupled_float,
                                       Normalized_float,
                                       ReverseNormalized_float,
                                       Statistics_float};
  const Rows of_double[kDivergences] = {None_double,
                                        Kl_double,
                                        ReverseKl_double,
                                        Mixture_double,
                                        TotalVariation_double,
                                        Decoupled_double,
                                        ReverseDecoupled_double,
                                        Normalized_double,
                                        ReverseNormalized_double,
                                        Statistics_double};
  const int which = static_cast<int>(params.divergence);
  if (which < 0 || which >= kDivergences) throw std::invalid_argument("no such divergence");
  const Rows body = (params.dtype == DType::kFloat64 ? of_double : of_float)[which];
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
