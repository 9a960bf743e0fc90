// One row of KL(P||Q) of tempered softmaxes and its gradients; formulas in ../kdkernels.h.
//
// A float32 or half row is read once. With c0 a guess of c = lse(target / T_P) - lse(input / T_Q)
// and x = (target / T_P - input / T_Q) - c0, one sweep gathers, without any exponential of the
// input's side,
//
//   S = sum e_j,  A = sum e_j (x_j + e^-x_j - 1),  B = sum e_j (e^-x_j - 1)
//
// with e_j = exp(target_j / T_P - max), from which y = c0 - c = log(1 + B / S), KL = A / S - (e^y -
// 1 - y), and Q_j - P_j is e_j / S times (e^-x_j - e^y) e^-y. Nothing cancels: all three are sums
// of what is small where KL is. A row in which some P underflows while Q need not (masked classes,
// logits far apart), and every float64 row, takes the plain way: maximum and sum of both sides,
// then the terms of ../math.h.
#pragma once

#include "softmax.h"

namespace kdkernels::cpu {

// Of log2(e) / T times the maxima's difference.
KDK_INLINE bool far(double difference) { return std::fabs(difference) > kFar * kLog2E; }

template <typename S>
struct Row {
  S input_factor, target_factor;  // log2(e) / T
  S input_shift, target_shift;
  S input_norm, target_norm;  // 1 / sum
  S offset;                   // log2 of the target's sum over the input's
  S ratio = 0;                // the same of the sums without their shifts
  bool is_far = false;

  KDK_INLINE KlTerm<S> term(S s, S t) const { return kl_term(p(t), q(s), delta(s, t)); }

  // Equal temperatures leave (t - s) / T exactly: the other product is 0, or NaN where P = 0.
  KDK_INLINE S delta(S s, S t) const {
    const S near = (t - s) * input_factor + t * (target_factor - input_factor) - offset;
    const S log2_p = t * target_factor - target_shift, log2_q = s * input_factor - input_shift;
    return static_cast<S>(kLn2) * select(is_far, log2_p - log2_q - ratio, near);
  }
  KDK_INLINE S p(S t) const { return probability(t * target_factor - target_shift) * target_norm; }
  KDK_INLINE S q(S s) const { return probability(s * input_factor - input_shift) * input_norm; }

 private:
  static KDK_INLINE S probability(S x) {
    return x < S(-126) && sizeof(S) == 4 ? S(0) : exp2_above(x);
  }
};

// What one sweep over a row finds.
template <typename S>
struct Sweep {
  Row<S> row;
  S input_max, target_max;
  double loss;
};

// The plain way to a row's statistics and loss.
template <typename T, typename S>
KDK_INLINE Sweep<S> plain_sweep(const T* input, const T* target, int64_t classes, S input_factor,
                                S target_factor) {
  Softmax<S> q{input_factor}, p{target_factor};
  for_each_block(input, target, classes,
                 [&](const S* s, const S* t, int64_t n, int64_t) KDK_INLINED {
                   q.add(s, n);
                   p.add(t, n);
                 });
  const double shifts = static_cast<double>(p.shift) - q.shift, ratio = std::log2(p.sum / q.sum);
  Sweep<S> found{{input_factor, target_factor, q.shift, p.shift, static_cast<S>(1 / q.sum),
                  static_cast<S>(1 / p.sum), static_cast<S>(shifts + ratio), static_cast<S>(ratio),
                  far(shifts)},
                 q.max,
                 p.max,
                 0};
  for_each_block(input, target, classes,
                 [&](const S* s, const S* t, int64_t n, int64_t) KDK_INLINED {
                   S loss = 0;
#pragma omp simd reduction(+ : loss)
                   for (int64_t j = 0; j < n; ++j) loss += found.row.term(s[j], t[j]).excess;
                   found.loss += loss;
                 });
  return found;
}

// Where the fast sweep leaves e_j and w_j = e_j (e^-x_j - 1) for the gradient, and the shift of
// each block. A float32 gradient may hold w itself: the fewer lines a row touches, the longer it
// stays in the inner caches.
struct Stash {
  Buffer<float> e, shift;
  float* w = nullptr;
};

// (2^f - 1 - f ln 2) / f^2 for |f| <= 0.5: relative error <= 1.3e-7 (least-maximum fit).
KDK_INLINE float second_order_base2(float f) {
  float h = 1.54172785e-4f;
  h = h * f + 1.33812503e-3f;
  h = h * f + 9.61817220e-3f;
  h = h * f + 5.55038111e-2f;
  return h * f + 2.40226505e-1f;
}

// One element of the file's opening comment, in base 2: with -x / ln 2 = k + f and 2^f = 1 + f ln 2
// + u,
//   e^-x - 1      = 2^k u + (2^k - 1)(1 + f ln 2) + f ln 2
//   e^-x - 1 + x  = 2^k u + (2^k - 1)(1 + f ln 2) - k ln 2
// which for k = 0 (|x| < 0.35) are u + f ln 2 and u: no cancellation, and no branch.
struct FastRow {
  float input_factor, target_factor;  // log2(e) / T
  float apart;                        // the second less the first, to more digits than theirs
  // What `apart` has a target's logits taken from, so that large ones lose nothing.
  float target_from = 0;
  float target_shift = 0, guess = 0;  // guess is c0 / ln 2

  struct Element {
    float e, x, minus_1, excess;  // x is -x / ln 2
  };

  KDK_INLINE Element element(float s, float t) const {
    constexpr float kTwo = static_cast<float>(kLn2);
    const float x = (s - t) * input_factor - (t - target_from) * apart + guess;
    const float shifted = x + kRound;
    const float k = shifted - kRound;
    const float f = x - k;
    const float h = second_order_base2(f);
    const float power = power_of_two(shifted);
    const float g = f * kTwo;
    const float rest = power * (h * f * f) + (power - 1.0f) * (1.0f + g);
    return {exp2_above(t * target_factor - target_shift), x, rest + g, rest - k * kTwo};
  }
};

// The sums of the file's opening comment, S without the factor that `shift` takes off; and, where a
// moment is asked for, those of e_j and of w_j times the input's logit from `input_from`.
struct FastSums {
  double S = 0, A = 0, B = 0;
  double e_moment = 0, w_moment = 0;
  float input_max = -INFINITY, target_max = -INFINITY, input_from = 0;

  double exp_y() const { return 1 + B / S; }
  double y() const { return std::log1p(B / S); }
  double loss() const { return A / S - (B / S - y()); }
  // The sum of (Q_j - P_j) input_j, from whatever the input is taken: the weights sum to 0.
  double moment() const { return (w_moment - B / S * e_moment) / (S * exp_y()); }
  void rescale(double by) { S *= by, A *= by, B *= by, e_moment *= by, w_moment *= by; }
};

// From k on: whether each element of a vector is one of its last k.
alignas(64) constexpr float kCounts[2 * kLanes] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                                   1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// One fast sweep with fast.guess, or with the first block's maxima for a guess where that is NaN:
// these are off by no more than the noise near convergence. False where the row must go the plain
// way.
template <bool kStash, bool kMoment, typename T>
KDK_INLINE bool fast_sweep(const T* input, const T* target, int64_t classes, FastRow& fast,
                           FastSums& sums, Stash& stash) {
  sums = {};
  fast.target_shift = 0;
  float least = 1, largest = 0;
  for_each_block(
      input, target, classes,
      [&](const float* s, const float* t, int64_t n, int64_t begin) KDK_INLINED {
        float s_max = -INFINITY, t_max = -INFINITY;
        const auto greatest = [&](int64_t from, int64_t to) KDK_INLINED {
#pragma omp simd reduction(max : s_max, t_max)
          for (int64_t j = from; j < to; ++j) {
            s_max = s[j] > s_max ? s[j] : s_max;
            t_max = t[j] > t_max ? t[j] : t_max;
          }
        };
        // A last vector that is not full would be taken an element at a time: it starts
        // earlier instead, and what it has for the second time counts for nothing.
        const int64_t whole = n < kLanes ? n : n / kLanes * kLanes;
        greatest(0, whole);
        if (whole < n) greatest(n - kLanes, n);
        sums.input_max = s_max > sums.input_max ? s_max : sums.input_max;
        if (t_max > sums.target_max) {
          const float next = t_max * fast.target_factor;
          if (begin != 0) sums.rescale(std::exp2(static_cast<double>(fast.target_shift) - next));
          sums.target_max = t_max;
          fast.target_shift = next;
        }
        if (begin == 0) {
          sums.input_from = s_max;
          fast.target_from = t_max;
          if (std::isnan(fast.guess)) {
            fast.guess = (t_max - s_max) * fast.input_factor;
            if (far(fast.guess)) least = 0;  // the plain way
          }
        }
        float* e_out = kStash ? stash.e.data() + begin : nullptr;
        float* w_out = kStash ? stash.w + begin : nullptr;
        stash.shift[begin / kBlock] = fast.target_shift;
        const FastRow row = fast;
        const float from = sums.input_from;
        float sum = 0, excess = 0, difference = 0, e_moment = 0, w_moment = 0;
        const auto add_up = [&](int64_t begin_j, int64_t end_j, const float* counts) KDK_INLINED {
#pragma omp simd reduction(+ : sum, excess, difference, e_moment, w_moment) reduction(min : least) \
    reduction(max : largest)
          for (int64_t j = begin_j; j < end_j; ++j) {
            const auto element = row.element(s[j], t[j]);
            const float size = std::fabs(element.x);
            least = element.e < least ? element.e : least;
            largest = size > largest ? size : largest;
            const float w = element.e * element.minus_1;
            const float e = counts == nullptr ? element.e : element.e * counts[j - begin_j];
            sum += e;
            excess += e * element.excess;
            difference += e * element.minus_1;
            if (kMoment) {
              const float y = s[j] - from;
              e_moment += e * y;
              w_moment += e * element.minus_1 * y;
            }
            if (kStash) {
              e_out[j] = element.e;
              w_out[j] = w;
            }
          }
        };
        add_up(0, whole, nullptr);
        if (whole < n) add_up(n - kLanes, n, kCounts + (n - whole));
        sums.S += sum, sums.A += excess, sums.B += difference;
        sums.e_moment += e_moment, sums.w_moment += w_moment;
      });
  // 2^100 leaves room below the largest float for the sum of a row.
  return least > kLeastExp2 && largest < 100.0f;
}

// The same until e^y has lost no more than a factor of 50 to the guess; the second guess is good.
template <bool kStash, bool kMoment = false, typename T>
KDK_INLINE bool fast_sweeps(const T* input, const T* target, int64_t classes, FastRow& fast,
                            FastSums& sums, Stash& stash) {
  fast.guess = NAN;
  for (int attempt = 0; attempt < 2; ++attempt) {
    if (!fast_sweep<kStash, kMoment>(input, target, classes, fast, sums, stash)) return false;
    const double exp_y = sums.exp_y();
    if (!(exp_y < 0.02 || exp_y > 50)) return true;  // NaN is a result too
    if (!(exp_y > 1e-5 && exp_y < 1e30)) return false;
    fast.guess -= static_cast<float>(std::log2(exp_y));
  }
  return false;
}

// What the other outputs need of a fast row: the input's sum by way of c, split into a float and
// the rest.
inline Sweep<float> sweep_of(const FastRow& fast, const FastSums& sums) {
  const double guess = fast.guess + static_cast<double>(fast.target_from) * fast.apart;
  const double offset = guess - sums.y() / kLn2;
  const double input_lse = fast.target_shift + std::log2(sums.S) - offset;
  const float input_shift = static_cast<float>(input_lse);
  const Row<float> row{fast.input_factor,
                       fast.target_factor,
                       input_shift,
                       fast.target_shift,
                       static_cast<float>(std::exp2(input_shift - input_lse)),
                       static_cast<float>(1 / sums.S),
                       static_cast<float>(offset)};
  return {row, sums.input_max, sums.target_max, sums.loss()};
}

// scale (Q - P) after a fast sweep: w and e each times one factor, from the stash or made again.
// With kAdd the gradient grows by it.
template <bool kStash, bool kAdd = false, typename T, typename G>
KDK_INLINE void fast_gradient(const T* input, const T* target, int64_t classes, const FastRow& fast,
                              const FastSums& sums, double scale, const Stash& stash, G* gradient) {
  const double of_w = scale / (sums.S * sums.exp_y());
  const double of_e = of_w * (sums.B / sums.S);
  alignas(64) float buffer[kBlock], s_buffer[kBlock], t_buffer[kBlock];
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t n = std::min(kBlock, classes - begin);
    FastRow row = fast;
    row.target_shift = stash.shift[begin / kBlock];
    const double rescale =
        row.target_shift == fast.target_shift
            ? 1.0
            : std::exp2(static_cast<double>(row.target_shift) - fast.target_shift);
    const auto a = static_cast<float>(of_w * rescale);
    const auto b = static_cast<float>(of_e * rescale);
    float* block = block_of(gradient + begin, kStash && !kAdd ? stash.w + begin : buffer);
    const float* e = stash.e.data() + begin;
    const float* w = kStash ? stash.w + begin : nullptr;
    const float* s = kStash ? nullptr : widen_block(input + begin, n, s_buffer);
    const float* t = kStash ? nullptr : widen_block(target + begin, n, t_buffer);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      float value;
      if (kStash) {
        value = a * w[j] - b * e[j];
      } else {
        const auto element = row.element(s[j], t[j]);
        const float w_j = element.e * element.minus_1;
        value = a * w_j - b * element.e;
      }
      block[j] = kAdd ? block[j] + value : value;
    }
    narrow_block(block, n, gradient + begin);
  }
}

}  // namespace kdkernels::cpu
