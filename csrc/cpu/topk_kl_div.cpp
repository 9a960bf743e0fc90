// Rows of KL(P||Q) of a teacher known by its top k on the CPU; formulas in ../kdkernels.h.
//
// A row's classes outside I are one softmax of their own, R_j = Q_j / Q_r, made in one sweep with
// one exponential a class: the blocks that a bit set knows to hold some of I are swept as copies in
// which those are -inf. Into the gradient row go the exponentials, later to be multiplied with
// (W Q_r - P_r) / (T sum): a row of float32 or float64 into its own, a half row as float32 into its
// own and the next one, which is still to come; the last one of a thread makes them again instead.
// What belongs to the k classes, and the mass of all the others, is in double.
//
// Threads take contiguous runs of rows, and each row is summed in one fixed order, so that results
// do not depend on their number.
#include <atomic>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kdkernels.h"
#include "parallel.h"
#include "softmax.h"

namespace kdkernels::cpu {
namespace {

constexpr int64_t kWordBits = 64;
constexpr int64_t kBlockWords = kBlock / kWordBits;

// The classes of I, a bit each.
class Chosen {
 public:
  explicit Chosen(int64_t classes) : words_((classes + kBlock - 1) / kBlock * kBlockWords) {}

  // False where the class was in already.
  bool add(int64_t j) {
    uint64_t& word = words_[j / kWordBits];
    const uint64_t bit = uint64_t{1} << (j % kWordBits);
    const bool fresh = (word & bit) == 0;
    word |= bit;
    return fresh;
  }

  void remove(int64_t j) { words_[j / kWordBits] = 0; }

  // The 64 from this class on; 0 is the first.
  KDK_INLINE uint64_t word(int64_t begin) const { return words_[begin / kWordBits]; }

 private:
  std::vector<uint64_t> words_;
};

// A block of the input with -inf for the classes of I: x itself where there are none.
template <typename S>
KDK_INLINE const S* without(const Chosen& chosen, const S* x, int64_t n, int64_t begin, S* copy) {
  uint64_t any = 0;
  for (int64_t w = 0; w < kBlock; w += kWordBits) any |= chosen.word(begin + w);
  if (any == 0) return x;
  std::memcpy(copy, x, sizeof(S) * n);
  for (int64_t w = 0; w < kBlock; w += kWordBits) {
    uint64_t word = chosen.word(begin + w);
    for (int64_t j = w; word != 0; ++j, word >>= 1) {
      if (word & 1) copy[j] = -std::numeric_limits<S>::infinity();
    }
  }
  return copy;
}

// log2(e) / T, in two parts: the teacher's log-probabilities know T exactly.
template <typename S>
struct Factor {
  explicit Factor(double x)
      : value(x), high(static_cast<S>(x)), low(static_cast<S>(x - static_cast<double>(high))) {}
  double value;
  S high, low;
};

#if defined(__GNUC__)
#define KDK_LOOSE(bytes) __attribute__((may_alias, aligned(bytes)))
#else
#define KDK_LOOSE(bytes)
#endif

// Statistics in memory that is of another type, or not as aligned as theirs.
template <typename S>
struct LooseOf {
  typedef S Type KDK_LOOSE(8);
};
template <>
struct LooseOf<float> {
  typedef float Type KDK_LOOSE(2);
};
template <typename S>
using Loose = typename LooseOf<S>::Type;

// 2^((x - max) factor) of a block; x = -inf and what underflows give 0. The sum is returned.
template <typename S>
KDK_INLINE S exponentials(const S* x, int64_t n, S max, const Factor<S>& factor, Loose<S>* e) {
  constexpr S kLowest = std::numeric_limits<S>::lowest();
  const S high = factor.high, low = factor.low;
  const S from = max > kLowest ? max : kLowest;  // where all is -inf yet
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const S raw = x[j] - from;
    const S d = kLowest > raw ? kLowest : raw;  // -inf low may be NaN; NaN stays
    const S y = d * high + d * low;
    e[j] = y < S(-126) && sizeof(S) == 4 ? S(0) : exp2_unbiased(y);
    sum += e[j];
  }
  return sum;
}

// What the sweep finds of the classes outside I: the sum of 2^((x - max) factor), and, where the
// temperature's gradient is wanted, that of the same times x - max.
template <typename S>
struct Rest {
  S max = -std::numeric_limits<S>::infinity();
  double sum = 0, moment = 0;
};

// The exponentials of each block go to `kept`, where that is, their max to `maxima`.
template <typename T, typename S>
KDK_INLINE Rest<S> sweep(const T* input, int64_t classes, const Chosen& chosen,
                         const Factor<S>& factor, bool wants_moment, Loose<S>* kept,
                         std::vector<S>& maxima) {
  Rest<S> rest;
  alignas(64) S copy[kBlock], buffer[kBlock];
  for_each_block(input, classes, [&](const S* raw, int64_t n, int64_t begin) KDK_INLINED {
    const S* x = without(chosen, raw, n, begin, copy);
    S max = -std::numeric_limits<S>::infinity();
#pragma omp simd reduction(max : max)
    for (int64_t j = 0; j < n; ++j) max = x[j] > max ? x[j] : max;
    if (max > rest.max) {
      if (rest.sum != 0) {
        const double rescale = std::exp2((static_cast<double>(rest.max) - max) * factor.value);
        rest.moment = rescale * (rest.moment + (static_cast<double>(rest.max) - max) * rest.sum);
        rest.sum *= rescale;
      }
      rest.max = max;
    }
    maxima[begin / kBlock] = rest.max;
    Loose<S>* e = kept == nullptr ? buffer : kept + begin;
    if (kept != nullptr && sizeof(T) < sizeof(S)) prefetch_next(e);
    rest.sum += exponentials(x, n, rest.max, factor, e);
    if (wants_moment) {
      S moment = 0;
#pragma omp simd reduction(+ : moment)
      for (int64_t j = 0; j < n; ++j) moment += e[j] > S(0) ? e[j] * (x[j] - rest.max) : S(0);
      rest.moment += moment;
    }
  });
  return rest;
}

// scale R_j into the gradient of the classes outside I; those of I are the caller's.
template <typename T, typename S>
KDK_INLINE void spread(const T* input, int64_t classes, const Rest<S>& rest,
                       const Factor<S>& factor, double scale, const Loose<S>* kept,
                       const std::vector<S>& maxima, T* gradient) {
  const double each = rest.sum > 0 || rest.sum != rest.sum ? scale / rest.sum : 0;
  alignas(64) S buffer[kBlock];
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t n = std::min(kBlock, classes - begin);
    const S max = maxima[begin / kBlock];
    const double rescale =
        max == rest.max ? 1.0 : std::exp2((static_cast<double>(max) - rest.max) * factor.value);
    const S a = static_cast<S>(each * rescale);
    S* block = block_of(gradient + begin, buffer);
    const Loose<S>* e = kept == nullptr ? buffer : kept + begin;
    if (kept == nullptr) {
      // Those of I may lie above the maximum, and are overwritten; infinities do no harm.
      exponentials<S>(widen_block(input + begin, n, buffer), n, max, factor, buffer);
    }
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) block[j] = e[j] * a;
    narrow_block(block, n, gradient + begin);
  }
}

// One of the k classes.
struct Term {
  double logit;        // over T
  double p, q, delta;  // delta = log p - log q, 0 where p is
};

template <typename S>
KDK_INLINE void store(double value, S& x) {
  x = static_cast<S>(value);
}
KDK_INLINE void store(double value, Float16& x) { narrow(static_cast<float>(value), x); }
KDK_INLINE void store(double value, BFloat16& x) { narrow(static_cast<float>(value), x); }
KDK_INLINE double load(double x) { return x; }
KDK_INLINE double load(float x) { return x; }
KDK_INLINE double load(Float16 x) { return widen(x); }
KDK_INLINE double load(BFloat16 x) { return widen(x); }

inline double delta_of(double p, double log_p, double log_q) { return p == 0 ? 0 : log_p - log_q; }

// P D + Q - P, the term of the Bregman form.
inline double excess(double p, double q, double delta) {
  return (p == 0 ? 0 : p * delta) + (q - p);
}

// Puts the row's classes into `chosen`; false where one is outside, or there already.
inline bool choose(const int64_t* indices, int64_t k, int64_t classes, Chosen& chosen) {
  for (int64_t i = 0; i < k; ++i) {
    if (indices[i] < 0 || indices[i] >= classes || !chosen.add(indices[i])) return false;
  }
  return true;
}

// Returns the first row with a wrong index, or end_row.
template <typename T>
KDK_INLINE int64_t topk_rows(const TopkKlDivParams& params, int64_t begin_row, int64_t end_row) {
  using S = typename Statistics<T>::Type;
  const auto* temperature = static_cast<const S*>(params.input_temperature);
  const auto* row_scale = static_cast<const S*>(params.row_scale);
  auto* loss_out = static_cast<S*>(params.loss);
  auto* temperature_out = static_cast<S*>(params.grad_input_temperature);
  const int64_t classes = params.classes, k = params.k;
  const bool renormalized = params.tail == Tail::kRenormalize;
  Chosen chosen(classes);
  std::vector<S> maxima(classes / kBlock + 1);
  std::vector<Term> terms(k);

  for (int64_t r = begin_row; r < end_row; ++r) {
    T* grad_input = row_of<T>(params.grad_input, r, params.grad_stride);
    S* grad_log_probs = row_of<S>(params.grad_log_probs, r, k);
    if (params.mask != nullptr && params.mask[r] == 0) {
      if (loss_out != nullptr) loss_out[r] = 0;
      if (grad_input != nullptr) std::memset(grad_input, 0, sizeof(T) * classes);
      if (grad_log_probs != nullptr) std::memset(grad_log_probs, 0, sizeof(S) * k);
      if (temperature_out != nullptr) temperature_out[r] = 0;
      continue;
    }
    const int64_t* indices = params.indices + r * k;
    if (!choose(indices, k, classes, chosen)) return r;
    const T* input = static_cast<const T*>(params.input) + r * params.input_stride;
    const S* log_probs = static_cast<const S*>(params.log_probs) + r * k;
    const double inverse =
        1 / (temperature ? double(temperature[r]) : params.input_temperature_value);
    const double scale = row_scale ? double(row_scale[r]) : params.scale;
    const Factor<S> factor(inverse * kLog2E);

    Rest<S> rest;
    // Where the exponentials stay: those of a half row need the next one too.
    const bool has_place =
        std::is_same_v<S, T> || (r + 1 < end_row && params.grad_stride == classes);
    auto* kept = has_place ? reinterpret_cast<Loose<S>*>(grad_input) : nullptr;
    if (!renormalized) {
      rest = sweep(input, classes, chosen, factor, temperature_out != nullptr, kept, maxima);
    } else if (grad_input != nullptr) {
      std::memset(grad_input, 0, sizeof(T) * classes);
    }
    for (int64_t i = 0; i < k; ++i) chosen.remove(indices[i]);

    // The k classes and the rest as one softmax, in natural logarithms.
    const double log_rest = rest.max * inverse + std::log(rest.sum);
    double max = rest.sum > 0 ? log_rest : -INFINITY;
    double p_max = -INFINITY;
    for (int64_t i = 0; i < k; ++i) {
      const double x = load(input[indices[i]]) * inverse;
      terms[i].logit = x;
      max = x > max ? x : max;
      p_max = log_probs[i] > p_max ? log_probs[i] : p_max;
    }
    if (!renormalized) p_max = 0;
    double q_sum = rest.sum > 0 || rest.sum != rest.sum ? std::exp(log_rest - max) : 0;
    double p_sum = 0;
    for (int64_t i = 0; i < k; ++i) {
      terms[i].q = std::exp(terms[i].logit - max);
      terms[i].p = std::exp(log_probs[i] - p_max);
      q_sum += terms[i].q;
      p_sum += terms[i].p;
    }
    const double log_q_sum = max + std::log(q_sum);
    const double log_p_sum = renormalized ? p_max + std::log(p_sum) : 0;
    const double p_norm = renormalized ? 1 / p_sum : 1;

    double loss = 0;
    for (int64_t i = 0; i < k; ++i) {
      Term& term = terms[i];
      term.p *= p_norm;
      term.q /= q_sum;
      term.delta = delta_of(term.p, log_probs[i] - log_p_sum, term.logit - log_q_sum);
      loss += excess(term.p, term.q, term.delta);
    }
    // All of P sums to `whole`; `slope` is what P_i (D_i - slope) = dloss / dlog P_i has.
    double whole = 1, slope = loss, q_rest = 0, p_rest = 0;
    if (!renormalized) {
      const bool bucket = params.tail == Tail::kBucket && k < classes;
      q_rest = rest.sum > 0 || rest.sum != rest.sum ? std::exp(log_rest - log_q_sum) : 0;
      p_rest = bucket && p_sum < 1 ? 1 - p_sum : 0;
      const double delta =
          delta_of(p_rest, std::log(p_rest), rest.sum == 0 ? -INFINITY : log_rest - log_q_sum);
      loss += excess(p_rest, q_rest, delta);
      slope = delta;
      if (!(p_rest > 0)) {
        whole = p_sum;
        loss += p_sum - 1;
        slope = -1;
      }
    }
    if (loss_out != nullptr) loss_out[r] = static_cast<S>(scale * loss);

    const double of_rest = whole * q_rest - p_rest;  // in units of the rest's softmax
    if (grad_input != nullptr) {
      if (!renormalized) {
        spread(input, classes, rest, factor, scale * inverse * of_rest, kept, maxima, grad_input);
      }
      for (int64_t i = 0; i < k; ++i) {
        store(scale * inverse * (whole * terms[i].q - terms[i].p), grad_input[indices[i]]);
      }
    }
    if (grad_log_probs != nullptr) {
      for (int64_t i = 0; i < k; ++i) {
        const Term& term = terms[i];
        const double difference = term.delta == INFINITY ? INFINITY : term.delta - slope;
        grad_log_probs[i] = static_cast<S>(term.p == 0 ? 0 : scale * (term.p * difference));
      }
    }
    if (temperature_out != nullptr) {
      // The weights sum to 0 (but for rounding in P), so the logits are taken from one of them. A
      // weight of 0 counts for nothing, whatever the logit.
      double moment =
          rest.sum > 0 ? of_rest * (rest.moment / rest.sum + (rest.max - max / inverse)) : 0;
      if (rest.sum != rest.sum) moment = rest.sum;
      for (int64_t i = 0; i < k; ++i) {
        const double w = whole * terms[i].q - terms[i].p;
        if (w != 0) moment += w * (terms[i].logit - max) / inverse;
      }
      temperature_out[r] = static_cast<S>(-scale * inverse * inverse * moment);
    }
  }
  return end_row;
}

using Params = TopkKlDivParams;
KDK_CLONES int64_t rows_float32(const Params& p, int64_t b, int64_t e) {
  return topk_rows<float>(p, b, e);
}
KDK_CLONES int64_t rows_float16(const Params& p, int64_t b, int64_t e) {
  return topk_rows<Float16>(p, b, e);
}
KDK_CLONES int64_t rows_bfloat16(const Params& p, int64_t b, int64_t e) {
  return topk_rows<BFloat16>(p, b, e);
}
KDK_CLONES int64_t rows_float64(const Params& p, int64_t b, int64_t e) {
  return topk_rows<double>(p, b, e);
}

}  // namespace

void topk_kl_div(const TopkKlDivParams& params, int threads) {
  auto* body = for_dtype(params.dtype, rows_float32, rows_float16, rows_bfloat16, rows_float64);
  std::atomic<int64_t> wrong{params.rows};  // an exception must not leave a thread
  for_each_run_of_rows(params.rows, params.classes, threads, [&](int64_t begin, int64_t end) {
    const int64_t row = body(params, begin, end);
    int64_t first = wrong;
    while (row < end && row < first && !wrong.compare_exchange_weak(first, row)) {
    }
  });
  if (wrong < params.rows) {
    throw std::invalid_argument("topk_kl_div: an index of row " + std::to_string(wrong) +
                                " is outside [0, " + std::to_string(params.classes) +
                                ") or there twice");
  }
}

}  // namespace kdkernels::cpu
