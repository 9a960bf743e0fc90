// One class of each divergence between P and Q, in forms that do not cancel as Q nears P, on the
// host and on the device.
//
// With x_j the logits of Q over its temperature, dloss/dx_j is either direct_j, or Q_j (a_j - sum_k
// Q_k a_k): `slope_gradient` of the slope a_j = dloss/dQ_j (up to a constant) and its mean under Q.
#pragma once

#include <cmath>

#include "math.h"

namespace kdkernels {

// D = log P_j - log Q_j of a class from its logits. They are differenced first: near convergence t
// - s is exact, and everything after it is of the size of D. Where the factors of the two sides are
// far apart, or their maxima, that would cancel instead: then each side is taken from its own
// maximum.
template <typename T>
struct LogRatio {
  T input_max;       // of the logits that Q is over; 0 where all are -inf
  T target_max;      // the same of P
  T shift;           // target_max - input_max
  T input_inverse;   // 1 / temperature
  T target_inverse;  // the same of P
  T extra;           // target_inverse - input_inverse
  T offset;          // log sum_j e^((t_j - max) / T_P) - log sum_j e^((s_j - max) / T_Q)
  bool together;

  KDK_INLINE LogRatio(T input_max, T target_max, double input_inverse, double target_inverse,
                      T offset)
      : input_max(input_max),
        target_max(target_max),
        shift(target_max - input_max),
        input_inverse(static_cast<T>(input_inverse)),
        target_inverse(static_cast<T>(target_inverse)),
        extra(static_cast<T>(target_inverse - input_inverse)),
        offset(offset),
        together(target_inverse < 1.25 * input_inverse && input_inverse < 1.25 * target_inverse &&
                 std::fabs(shift) * input_inverse < kFar) {}

  // -inf where P_j = 0, also where Q_j = 0 too.
  KDK_INLINE T operator()(T s, T t) const {
    const T infinity = static_cast<T>(INFINITY);
    const T from_max = t - target_max;
    const T difference = together ? ((t - s) - shift) * input_inverse + from_max * extra
                                  : from_max * target_inverse - (s - input_max) * input_inverse;
    return t == -infinity ? -infinity : difference - offset;
  }
};

// Q_j (slope - mean), where 0 * inf = 0 and an infinite mean gives its one-sided limits.
template <typename T>
KDK_INLINE T slope_gradient(T q, T slope, T mean) {
  return kl_target_gradient(q, slope, mean);
}

// Of each divergence, one class: its share of the loss, and the slope a_j.

// KL(Q||P): the mean of the slopes is the divergence itself.
template <typename T>
KDK_INLINE T reverse_kl_loss(T p, T q, T delta) {
  return kl_excess(q, p, -delta);
}

template <typename T>
KDK_INLINE T reverse_kl_slope(T delta) {
  return -delta;
}

// 1/2 |P - Q|.
template <typename T>
KDK_INLINE T total_variation_loss(T p, T q, T delta) {
  const T difference = kl_difference(p, q, delta);
  return T(0.5) * std::fabs(difference);
}

template <typename T>
KDK_INLINE T total_variation_slope(T p, T q, T delta) {
  const T difference = kl_difference(p, q, delta);
  return select(difference > T(0), T(0.5), select(difference < T(0), T(-0.5), T(0)));
}

// Q times the slope, in fewer steps where no slope by itself is wanted.
template <typename T>
KDK_INLINE T total_variation_weight(T p, T q, T delta) {
  const T difference = kl_difference(p, q, delta);
  return select(difference == T(0), T(0), std::copysign(T(0.5) * q, difference));
}

// first KL(P||M) + second KL(Q||M), M = mix P + (1 - mix) Q. With log P/M = -log(1 + (1 - mix)
// (e^-D - 1)), log Q/M = -log(1 + mix (e^D - 1)) and g = 1 - P/M, the slope is first (1 - mix) g +
// second (log Q/M - mix g).
//
// kEven: mix is 1/2, and the way by D loses no more than a bit.
template <typename T, bool kEven = false>
struct Mixture {
  T log_p, log_q;  // log P/M, log Q/M
  T g;

  KDK_INLINE Mixture(T delta, T mix) {
    const bool above = delta >= T(0);
    const T size = std::fabs(delta);
    const T rest = T(1) - mix;
    const T power = exp_of_minus(size);
    const bool near = size < T(0.5);
    const T x = select(near, size, T(0));
    const T series = x * x * second_order_ratio(x) - x;
    const T e = select(near, series, power - T(1));  // e^-|D| - 1
    const T bounded = select(above, rest, mix) * e;
    const T bounded_log = -log_1_plus(bounded);
    // The two logarithms differ by D; but by way of D a small mix would lose what is left of it.
    T other_log = bounded_log - size;
    if (!kEven) {
      const T direct = -log_1_plus(select(above, mix, rest) * (-e / power));
      other_log = select(size < T(80), direct, other_log);
    }
    log_p = select(above, bounded_log, other_log);
    log_q = select(above, other_log, bounded_log);
    g = select(above, rest, -rest) * e / (T(1) + bounded);
  }
};

template <bool kEven = false, typename T>
KDK_INLINE T mixture_loss(T p, T q, T delta, T mix, T first, T second) {
  const Mixture<T, kEven> mixture(delta, mix);
  const T m = mix * p + (T(1) - mix) * q;
  return first * kl_excess(p, m, mixture.log_p) + second * kl_excess(q, m, mixture.log_q);
}

template <bool kEven = false, typename T>
KDK_INLINE T mixture_slope(T delta, T mix, T first, T second) {
  const Mixture<T, kEven> mixture(delta, mix);
  return first * (T(1) - mix) * mixture.g + second * (mixture.log_q - mix * mixture.g);
}

// (P_y, 1 - P_y) of the logit u = log P_y / (1 - P_y).
template <typename T>
struct Bernoulli {
  T on;
  T off;

  KDK_INLINE explicit Bernoulli(T u) {
    const T e = std::exp(u < T(0) ? u : -u);
    const T large = T(1) / (T(1) + e);
    const T small = e * large;
    on = u < T(0) ? small : large;
    off = u < T(0) ? large : small;
  }
};

template <typename T>
KDK_INLINE T softplus(T x) {
  return (x > T(0) ? x : T(0)) + std::log1p(std::exp(x > T(0) ? -x : x));
}

// A divergence of two Bernoulli variables, and its derivative with respect to the logit of Q.
template <typename T>
struct BernoulliTerm {
  T loss;
  T gradient;
};

// log(P_y / Q_y) or, with the signs of all logits changed, log((1 - P_y) / (1 - Q_y)), from the
// logits u of both and their difference d = u_p - u_q.
template <typename T>
KDK_INLINE T bernoulli_log_ratio(T u_p, T u_q, T q_off, T d) {
  const bool near = d < T(1) && d > T(-1);
  return near ? -std::log1p(q_off * std::expm1(-d)) : softplus(-u_q) - softplus(-u_p);
}

template <typename T>
KDK_INLINE T bernoulli_kl(T u_p, T u_q, T d) {
  const Bernoulli<T> p(u_p), q(u_q);
  return kl_term(p.on, q.on, bernoulli_log_ratio(u_p, u_q, q.off, d)).excess +
         kl_term(p.off, q.off, bernoulli_log_ratio(-u_p, -u_q, q.on, -d)).excess;
}

// KL(b_P||b_Q) or, in reverse, KL(b_Q||b_P), of logits u_p and u_q; d = u_p - u_q comes from the
// caller, who can difference first. Infinite logits are legal.
template <typename T>
KDK_INLINE BernoulliTerm<T> bernoulli_term(T u_p, T u_q, T d, bool reverse) {
  const Bernoulli<T> p(u_p), q(u_q);
  const T loss = bernoulli_kl(reverse ? u_q : u_p, reverse ? u_p : u_q, reverse ? -d : d);
  const T variance = q.on * q.off;
  const T reverse_gradient = variance == T(0) ? T(0) : -variance * d;
  // Q_y - P_y.
  const T change = std::expm1(d > T(0) ? -d : d);
  const T difference = (d > T(0) ? p.on * q.off : -q.on * p.off) * change;
  const bool both_certain = u_p == u_q && u_p - u_q != T(0);  // inf - inf is NaN
  return {loss, reverse ? reverse_gradient : both_certain ? T(0) : difference};
}

}  // namespace kdkernels
