// Rows of a loss from logits on CUDA devices: a soft term against the target, hard cross-entropy,
// z-loss, logit MSE; formulas in ../kdkernels.h and ../divergence.h.
//
//   standardize  two sweeps more: mean and extremes; squares about the mean
//   sweep 1      maxima and sums of exponentials, at every temperature that is asked for
//   sweep 2      the loss and, where the gradient needs no sum over it, the gradient
//   sweep 3      the gradient elsewhere: where it holds a mean of slopes under Q, or the standard
//                deviation's part
//
// How a row is held, and what is read again: rows.cuh. A divergence and its reverse share a kernel.
#pragma once

#include "../divergence.h"
#include "rows.cuh"

namespace kdkernels::cuda {

constexpr int kNoLabel = INT32_MIN;  // no class has this number, nor any lane before a row
constexpr double kSpreadEps = 1e-7;

// Visits `row` as if the class `label` were -inf.
template <typename Row>
struct WithoutLabel {
  static constexpr bool kPair = Row::kPair;
  static constexpr bool kInRegisters = Row::kInRegisters;
  static constexpr int kLanes = Row::kLanes;

  const Row& row;
  typename Row::Team team;
  int label;

  template <typename F>
  KDK_DEVICE void visit(F f) const {
    row.visit([&](int packet, const float (&s)[kLanes], const float (&t)[kLanes]) {
      const int lane = label - row.layout.first_class(packet);
      float others[kLanes], target_others[kLanes];
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        others[i] = i == lane ? -INFINITY : s[i];
        target_others[i] = i == lane ? -INFINITY : t[i];
      }
      f(packet, others, target_others);
    });
  }
};

// Of the logits of a row that are not -inf.
struct Spread {
  double mean = 0;
  double deviation = 0;
  float count = 0;
  bool flat = true;  // without spread: standardized logits are 0

  // What z - mean is multiplied by; any number will do where that is 0.
  KDK_DEVICE double inverse() const { return flat ? 1 : 1 / (kSpreadEps + deviation); }
};

template <typename Row>
KDK_DEVICE void find_spreads(const Row& row, Spread (&spreads)[2]) {
  constexpr int V = Row::kLanes;
  float extremes[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  float totals[4] = {};
  row.visit([&](int, const float (&s)[V], const float (&t)[V]) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float x = k == 0 ? s[i] : t[i];
        if (x > -INFINITY) {
          extremes[2 * k] = fmaxf(extremes[2 * k], x);
          extremes[2 * k + 1] = fmaxf(extremes[2 * k + 1], -x);
          totals[2 * k] += x;
          totals[2 * k + 1] += 1;
        }
      }
    }
  });
  double sums[4] = {totals[0], totals[1], totals[2], totals[3]};
  row.team.reduce(extremes, -INFINITY, Maximum());
  row.team.reduce(sums, 0.0, Sum());
  float centers[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    spreads[k].count = static_cast<float>(sums[2 * k + 1]);
    spreads[k].flat = spreads[k].count < 2 || extremes[2 * k] == -extremes[2 * k + 1];
    centers[k] = spreads[k].count > 0 ? static_cast<float>(sums[2 * k] / sums[2 * k + 1]) : 0.0f;
  }
  // Near convergence the two deviations must be good to 1e-8, hence double beyond a packet, and the
  // exact mean taken off afterwards.
  double squares[4] = {};
  row.visit([&](int, const float (&s)[V], const float (&t)[V]) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float square = 0, first = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float x = k == 0 ? s[i] : t[i];
        const float centered = x > -INFINITY ? x - centers[k] : 0.0f;
        square += centered * centered;
        first += centered;
      }
      squares[2 * k] += square;
      squares[2 * k + 1] += first;
    }
  });
  row.team.reduce(squares, 0.0, Sum());
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (spreads[k].flat) continue;
    const double shift = squares[2 * k + 1] / spreads[k].count;
    spreads[k].mean = centers[k] + shift;
    spreads[k].deviation =
        sqrt((squares[2 * k] - shift * squares[2 * k + 1]) / (spreads[k].count - 1));
  }
}

// The log of a sum of exponentials whose largest is 1.
KDK_DEVICE float log_of_sum(double sum) { return log1pf(static_cast<float>(sum - 1)); }

// Softmax over all classes at one factor, from the others' maximum and sum and the label's logit.
struct Softmax {
  float max;
  float inverse;  // 1 / temperature
  float log_sum;
  float norm;
  float rest;  // 1 less the label's share

  KDK_DEVICE Softmax(float others_max, double others_sum, float label_logit, double inverse)
      : max(fmaxf(others_max, label_logit)), inverse(static_cast<float>(inverse)) {
    const auto term = [&](float x) {
      return exp2_approximate((x - max) * (this->inverse * static_cast<float>(kLog2E)));
    };
    const double others = others_sum * term(others_max);
    const double sum = others + static_cast<double>(term(label_logit));
    log_sum = log_of_sum(sum);
    norm = 1 / static_cast<float>(sum);
    rest = static_cast<float>(others) * norm;
  }

  KDK_DEVICE float log_of(float x) const { return (x - max) * inverse - log_sum; }
  KDK_DEVICE float of(float x) const {
    return exp2_approximate((x - max) * (inverse * static_cast<float>(kLog2E))) * norm;
  }
};

// a b with 0 * inf = 0.
KDK_DEVICE float product(float a, float b) { return a == 0 ? 0.0f : a * b; }

// What a row of this divergence is made of. `value` is the class's part of the gradient where that
// is direct, else its slope.
struct ClassTerm {
  float loss;
  float value;
};

// Row r, by one team of threads. `kDivergence` is the divergence or what it is the reverse of.
template <typename T, int V, typename Row, Divergence kDivergence>
KDK_DEVICE void logit_loss_row(const LogitLossParams& params, int64_t r, typename Row::Team team) {
  constexpr bool kPair = Row::kPair;
  constexpr bool kStatistics = kDivergence == Divergence::kStatistics;
  constexpr bool kDecoupled = kDivergence == Divergence::kDecoupled;
  constexpr bool kNormalized = kDivergence == Divergence::kNormalized;
  constexpr bool kLabelled = kDecoupled || kNormalized;
  constexpr bool kSloped =
      kDivergence == Divergence::kMixture || kDivergence == Divergence::kTotalVariation;
  const bool reverse = params.divergence != kDivergence;
  const bool direct = !kSloped && !reverse;  // the gradient needs no mean of slopes
  const bool standardize = kPair && params.standardize;
  const bool hard = params.hard_weight != 0;
  const bool smoothing = hard && params.label_smoothing != 0;
  const bool raw = hard || params.z_loss != 0;
  const bool mse = kPair && !kStatistics && params.logit_mse != 0;
  const bool leader = team.rank() == 0;

  const T* input_row = static_cast<const T*>(params.input) + r * params.input_stride;
  const T* target_row =
      kPair ? static_cast<const T*>(params.target) + r * params.target_stride : input_row;
  const OutputRow<T> grad_input(params.grad_input, params.grad_dtype, r, params.grad_stride);
  const PacketLayout<T, V> layout(input_row, static_cast<int>(params.classes));

  const bool masked = params.mask != nullptr && params.mask[r] == 0;
  int label = kNoLabel;
  bool wrong = false;
  if (!masked && (hard || kLabelled)) {
    const int64_t y = params.labels[r];
    wrong = y < 0 || y >= params.classes;
    label = static_cast<int>(y);
  }
  if (masked || wrong) {
    const float nothing = masked ? 0.0f : NAN;
    fill_row(layout, grad_input, nothing, team);
    if (leader) {
      write(params.loss, r, nothing);
      for (int k = 0; k < kTerms; ++k) write(params.terms, k * params.rows + r, nothing);
      write(params.grad_input_temperature, r, nothing);
    }
    return;
  }

  const float scale = value_of(params.row_scale, params.scale, r);
  const float soft_scale = value_of(params.soft_scale, params.soft_scale_value, r);
  const float first = static_cast<float>(params.first);
  const float second = static_cast<float>(params.second);
  const float mix = static_cast<float>(params.mix);
  const Row row(layout, input_row, target_row, team);
  float label_input = -INFINITY, label_target = -INFINITY;
  if (label != kNoLabel) {
    label_input = to_float(input_row[label]);
    if (kLabelled) label_target = to_float(target_row[label]);
    // No lane may store in the input's place before all have read this. (A block meets in the
    // sums.)
    __syncwarp();
  }

  Spread spreads[2];  // of input and target
  if constexpr (kPair) {
    if (standardize) find_spreads(row, spreads);
  }
  const double input_one = standardize ? spreads[0].inverse() : 1;
  const double target_one = standardize ? spreads[1].inverse() : 1;
  const float input_temperature =
      kPair ? value_of(params.input_temperature, params.input_temperature_value, r) : 1.0f;
  const float target_temperature =
      kPair ? value_of(params.target_temperature, params.target_temperature_value, r) : 1.0f;
  const double input_inverse = input_one / input_temperature;
  const double target_inverse = target_one / target_temperature;

  // The sums of the input: at its temperature; of the normalized divergences at temperature 1; and
  // of the logits as they are, which come last.
  constexpr int kRaw = !kPair ? 0 : kNormalized ? 2 : 1;
  constexpr int kTargetSums = kNormalized ? 2 : 1;
  Factor q_factors[kRaw + 1], p_factors[kTargetSums];
  if constexpr (kPair) q_factors[0] = Factor(input_inverse * kLog2E);
  if constexpr (kNormalized) q_factors[1] = Factor(input_one * kLog2E);
  q_factors[kRaw] = Factor(kLog2E);
  p_factors[0] = Factor(target_inverse * kLog2E);
  if constexpr (kNormalized) p_factors[1] = Factor(target_one * kLog2E);

  OnlineSoftmax<kRaw + 1> q_sums(q_factors);
  OnlineSoftmax<kTargetSums> p_sums(p_factors);
  const int active = raw ? kRaw + 1 : kRaw;
  if constexpr (kLabelled) {
    visit_sums(WithoutLabel<Row>{row, team, label}, q_sums, q_factors, active, p_sums, p_factors);
  } else {
    visit_sums(row, q_sums, q_factors, active, p_sums, p_factors);
  }
  double sums[kRaw + 1 + (kPair ? kTargetSums : 0)];
#pragma unroll
  for (int k = 0; k <= kRaw; ++k) sums[k] = q_sums.sum(k, q_factors);
  if constexpr (kPair) {
#pragma unroll
    for (int k = 0; k < kTargetSums; ++k) sums[kRaw + 1 + k] = p_sums.sum(k, p_factors);
  }
  team.reduce(sums, 0.0, Sum());

  // Over the classes other than the label, where it is set apart. Without any other, Q' and P' are
  // 0.
  const bool input_alone = kLabelled && q_sums.max == -INFINITY;
  const bool target_alone = kLabelled && p_sums.max == -INFINITY;
  const float input_max = kLabelled ? finite_shift(q_sums.max) : q_sums.max;
  const float target_max = kLabelled ? finite_shift(p_sums.max) : p_sums.max;
  const double input_sum = sums[0];
  const double target_sum = kPair ? sums[kPair ? kRaw + 1 : 0] : 1;
  const float input_factor = static_cast<float>(input_inverse * kLog2E);
  const float target_factor = static_cast<float>(target_inverse * kLog2E);
  const float input_norm = input_alone ? 0 : 1 / static_cast<float>(input_sum);
  const float target_norm = target_alone ? 0 : 1 / static_cast<float>(target_sum);
  const LogRatio<float> log_ratio_of(
      input_max, target_max, input_inverse, target_inverse,
      input_alone || target_alone ? 0.0f : log_ratio(target_sum, input_sum));
  const float inverse = static_cast<float>(input_inverse);
  const float input_log_sum = input_alone ? 0.0f : log_of_sum(input_sum);
  const float target_log_sum = target_alone ? 0.0f : log_of_sum(target_sum);
  const auto minus_log_q = [&](float s) { return input_log_sum - (s - input_max) * inverse; };
  const auto minus_log_p = [&](float t) {
    return target_log_sum - (t - target_max) * static_cast<float>(target_inverse);
  };
  const Softmax raw_q(q_sums.max, sums[kRaw], kLabelled ? label_input : -INFINITY, 1);

  // The label against all others: its divergence, and the derivative with respect to the logit of
  // the Bernoulli or, of the normalized divergences, to the logits at temperature 1 over q_j - [j =
  // y].
  float label_loss = 0, label_slope = 0;
  const Softmax one_q(q_sums.max, sums[kNormalized ? 1 : 0], label_input, input_one);
  if (kDecoupled && first != 0) {
    // No distribution has a logit of +inf.
    const float u_q = label_input == INFINITY ? NAN
                      : input_alone           ? INFINITY
                                              : -minus_log_q(label_input);
    const float u_p = label_target == INFINITY ? NAN
                      : target_alone           ? INFINITY
                                               : -minus_log_p(label_target);
    const float d =
        input_alone || target_alone ? u_p - u_q : log_ratio_of(label_input, label_target);
    const BernoulliTerm<float> term = bernoulli_term(u_p, u_q, d, reverse);
    label_loss = first * term.loss;
    // No logit moves a label that is certain.
    label_slope = fabsf(u_q) == INFINITY ? 0.0f : first * term.gradient;
  }
  if (kNormalized && first != 0) {
    const Softmax one_p(p_sums.max, sums[kRaw + kTargetSums], label_target, target_one);
    if (reverse) {
      label_loss = first * product(one_q.of(label_input), -one_p.log_of(label_target));
      label_slope = -label_loss;
    } else {
      const float p_y = one_p.of(label_target);
      label_loss = first * product(p_y, -one_q.log_of(label_input));
      label_slope = first * p_y;
    }
  }
  // The divergence among the others counts for nothing where its first side has none.
  const bool counts = !kLabelled || (second != 0 && !(reverse ? input_alone : target_alone));

  const auto term_of = [&](float s, float t, float q, float p) -> ClassTerm {
    if constexpr (!kPair) {
      return {0, 0};
    } else if constexpr (kNormalized) {
      const float minus_log = reverse ? minus_log_p(t) : minus_log_q(s);
      return {product(reverse ? q : p, minus_log),
              reverse ? minus_log : kl_term(p, q, log_ratio_of(s, t)).difference};
    } else if constexpr (kDivergence == Divergence::kMixture) {
      const float delta = log_ratio_of(s, t);
      return {mixture_loss(p, q, delta, mix, first, second),
              mixture_slope(delta, mix, first, second)};
    } else if constexpr (kDivergence == Divergence::kTotalVariation) {
      const float delta = log_ratio_of(s, t);
      return {total_variation_loss(p, q, delta), total_variation_slope(p, q, delta)};
    } else {
      // In reverse the two exchange their parts, and the slope is -D.
      const float delta = reverse ? -log_ratio_of(s, t) : log_ratio_of(s, t);
      const KlTerm<float> term = kl_term(reverse ? q : p, reverse ? p : q, delta);
      return {term.excess, reverse ? delta : kStatistics ? 0.0f : term.difference};
    }
  };

  const bool flat = standardize && spreads[0].flat;
  const float soft_gain = flat || kStatistics ? 0.0f : scale * soft_scale * inverse;
  const float others_gain = soft_gain * (kLabelled ? second : 1.0f);
  const bool others = kPair && counts && !input_alone && others_gain != 0;
  const float label_gain =
      flat ? 0.0f : label_slope * (kDecoupled ? soft_gain : scale * static_cast<float>(input_one));
  const float lse = raw_q.max + raw_q.log_sum;
  const float hard_weight = static_cast<float>(params.hard_weight);
  const float z_loss = static_cast<float>(params.z_loss);
  const float smoothed = static_cast<float>(params.label_smoothing);
  const float raw_gain = raw ? scale * (hard_weight + 2 * z_loss * lse) : 0.0f;
  const float hard_gain = scale * hard_weight * (1 - smoothed);
  const float mse_gain = scale * static_cast<float>(2 * params.logit_mse / params.classes);

  // The standard deviation is a temperature too: its part of the gradient is a multiple of z -
  // mean.
  float spread_factor = 0, max_from_mean = 0;
  if (standardize && !flat) {
    const double deviation = spreads[0].deviation;
    spread_factor =
        static_cast<float>(1 / ((spreads[0].count - 1) * deviation * (kSpreadEps + deviation)));
    max_from_mean = static_cast<float>(raw_q.max - spreads[0].mean);
  }

  const bool moments =
      kPair && (params.grad_input_temperature != nullptr || (standardize && grad_input != nullptr));
  // A logit of -inf is not moved by temperature or standard deviation: as if it were 0.
  const float z_of_minus_infinity =
      (standardize ? static_cast<float>(spreads[0].mean) : 0.0f) - input_max;
  // What was written is not read again: a row that may be visited twice is written the second time.
  const bool in_place = !Row::kInRegisters && params.grad_input == params.input;
  const bool writes_at_once =
      grad_input != nullptr && direct && !standardize && !(in_place && smoothing);
  float live = static_cast<float>(params.classes);  // logits that are not -inf: all, until counted
  float mean_slope = 0, spread_gain = 0;
  // Once for the sums, and a second time for a gradient that had to wait for them.
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    const bool sums_now = pass == 0 && (kPair || smoothing);
    const bool writes_now = grad_input != nullptr && (pass == 1 || writes_at_once);
    const float smoothing_gain = smoothing ? scale * hard_weight * smoothed / live : 0.0f;
    float loss_share = 0, logit_share = 0, live_share = 0, one_share = 0, mse_share = 0;
    float entropies[2] = {}, overlap = 0;
    int first_maxima[2] = {INT32_MAX, INT32_MAX};
    Moment moment;
    if (sums_now || writes_now) {
      row.visit_anew([&](int packet, const float (&s)[V], const float (&t)[V]) {
        const int first_class = layout.first_class(packet);
        float gradient[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const bool is_label = first_class + i == label;
          const float own = kLabelled && is_label ? -INFINITY : s[i];
          const float own_target = kLabelled && is_label ? -INFINITY : t[i];
          const float q = exp2_approximate((own - input_max) * input_factor) * input_norm;
          const float p = exp2_approximate((own_target - target_max) * target_factor) * target_norm;
          const ClassTerm term = term_of(own, own_target, q, p);
          loss_share += term.loss;
          const float weight = direct ? term.value : product(q, term.value);
          gradient[i] = direct ? term.value : slope_gradient(q, term.value, mean_slope);
          gradient[i] = others ? others_gain * gradient[i] : 0.0f;
          if constexpr (kDecoupled) {
            gradient[i] += is_label ? label_gain : -product(q, label_gain);
          }
          if (mse) {
            const float gap = s[i] == -INFINITY && t[i] == -INFINITY ? 0.0f : s[i] - t[i];
            const float slope = mse_gain * gap;
            gradient[i] += slope;
            mse_share += slope * gap;
          }
          if (moments) {
            const float z = s[i] - input_max;  // at the label weight and q are 0
            moment.add(weight, q, z > -INFINITY ? z : z_of_minus_infinity);
          } else {
            moment.weights += weight;
          }
          if constexpr (kStatistics) {
            entropies[0] += product(p, minus_log_p(own_target));
            entropies[1] += product(q, minus_log_q(own));
            overlap += fminf(p, q);
            const int j = layout.contains(first_class + i) ? first_class + i : INT32_MAX;
            if (s[i] == input_max) first_maxima[0] = Minimum()(first_maxima[0], j);
            if (t[i] == target_max) first_maxima[1] = Minimum()(first_maxima[1], j);
          }
        }
        if constexpr (kNormalized) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const float one = one_q.of(s[i]);
            gradient[i] += product(first_class + i == label ? -one_q.rest : one, label_gain);
            if (standardize) one_share += product(one, s[i] - input_max);
          }
        }
        if (raw) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            gradient[i] += raw_gain * raw_q.of(s[i]);
            if (hard && first_class + i == label) gradient[i] -= hard_gain;
          }
        }
        if (smoothing || standardize) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            if (s[i] > -INFINITY) {
              const float from_max = s[i] - raw_q.max;
              gradient[i] += spread_gain * (from_max + max_from_mean) - smoothing_gain;
              logit_share += from_max;
              live_share += 1;
            }
          }
        }
        if (writes_now) layout.store(grad_input, packet, gradient);
      });
    }
    if (pass == 1) return;

    double shares[8] = {loss_share,     logit_share, live_share,  one_share,
                        moment.weights, moment.sum,  moment.mean, mse_share};
    if constexpr (kStatistics) {
      shares[3] = entropies[0], shares[4] = entropies[1], shares[5] = overlap;
      team.reduce(first_maxima, INT32_MAX, Minimum());
    }
    if (sums_now) team.reduce(shares, 0.0, Sum());
    const float others_loss = counts ? static_cast<float>(shares[0]) : 0.0f;
    const float counted = smoothing ? static_cast<float>(shares[2]) : live;
    mean_slope = static_cast<float>(shares[4]);
    if (leader) {
      float soft_term = product(soft_scale, others_loss);
      float label_term = kDecoupled ? soft_scale * label_loss : label_loss;
      if constexpr (kLabelled) soft_term = label_term + product(second, soft_term);
      float hard_term = 0;
      if (hard) {
        const float from_max = label_input - raw_q.max;
        hard_term = raw_q.log_sum - product(1 - smoothed, from_max);
        if (smoothing) hard_term -= smoothed * static_cast<float>(shares[1] / shares[2]);
        hard_term *= hard_weight;
      }
      const float z_term = params.z_loss != 0 ? z_loss * lse * lse : 0.0f;
      const float mse_term = 0.5f * static_cast<float>(shares[7]);  // times `scale` already
      write(params.loss, r, scale * (soft_term + hard_term + z_term) + mse_term);
      if (params.terms != nullptr) {
        const float terms[4] = {kStatistics ? static_cast<float>(shares[3]) : soft_term,
                                kStatistics ? static_cast<float>(shares[4]) : hard_term,
                                kStatistics ? static_cast<float>(shares[5]) : z_term,
                                !kStatistics                         ? label_term
                                : first_maxima[0] == first_maxima[1] ? 1.0f
                                                                     : 0.0f};
        for (int k = 0; k < 4; ++k) write(params.terms, k * params.rows + r, scale * terms[k]);
        write(params.terms, 4 * params.rows + r, mse_term);
      }
    }
    if (moments && !kStatistics) {
      // sum_j g_j z_j of the gradients g with respect to the scaled logits.
      double moment_sum = shares[5] - shares[4] * shares[6];
      if constexpr (kLabelled) moment_sum = counts ? second * moment_sum : 0;
      if (kDecoupled && label_slope != 0) {
        const float label_z =
            label_input > -INFINITY ? label_input - input_max : z_of_minus_infinity;
        moment_sum += label_slope * (label_z - shares[6]);
      }
      const float soft_moment = flat ? 0.0f : soft_scale * inverse * static_cast<float>(moment_sum);
      if (leader) {
        write(params.grad_input_temperature, r, -scale * soft_moment / input_temperature);
      }
      float all = soft_moment;
      if (kNormalized && label_slope != 0) {
        all += static_cast<float>(input_one) * label_slope *
               (static_cast<float>(shares[3]) - (label_input - input_max));
      }
      spread_gain = product(spread_factor, -scale * all);
    } else if (leader) {
      write(params.grad_input_temperature, r, 0);
    }
    const bool again = !writes_at_once || counted != live;
    if (grad_input == nullptr || !again) return;
    live = counted;
  }
}

// Blocks of a multiprocessor that a kernel leaves registers for: as many as do without spilling.
template <typename Row, Divergence kDivergence>
constexpr int kMinBlocks =
    !Row::kInRegisters ? 1
    : kDivergence == Divergence::kMixture || kDivergence == Divergence::kDecoupled ||
            kDivergence == Divergence::kNormalized
        ? 3
        : 4;

template <typename T, int V, typename Row, Divergence kDivergence>
__global__ void __launch_bounds__(Row::kMaxThreads, kMinBlocks<Row, kDivergence>)
    logit_loss_kernel(LogitLossParams params) {
  const typename Row::Team team;
  for (int64_t r = team.index(); r < params.rows; r += team.count()) {
    logit_loss_row<T, V, Row, kDivergence>(params, r, team);
  }
}

template <typename T, int V, typename Row, Divergence kDivergence>
cudaError_t launch_row(const LogitLossParams& params, int threads, void* stream) {
  return launch_rows<Row>(logit_loss_kernel<T, V, Row, kDivergence>, params, threads, stream);
}

// `lead` is the most elements that may lie between a boundary and the start of a row.
template <typename T, int V, Divergence kDivergence>
cudaError_t launch_packets(const LogitLossParams& params, int lead, void* stream) {
  constexpr bool kPair = kDivergence != Divergence::kNone;
  const int64_t reach = params.classes + lead;
  if constexpr (V > 1) {
    using ShortRow = RegisterRow<T, V, kPair, WarpTeam, 256>;
    using MediumRow = RegisterRow<T, V, kPair, BlockTeam, 1024>;
    if (reach <= ShortRow::kMaxClasses) {
      return launch_row<T, V, ShortRow, kDivergence>(params, ShortRow::kMaxThreads, stream);
    }
    if (reach <= MediumRow::kMaxClasses) {
      return launch_row<T, V, MediumRow, kDivergence>(params, MediumRow::kMaxThreads, stream);
    }
  }
  using LongRow = MemoryRow<T, V, kPair>;
  return launch_row<T, V, LongRow, kDivergence>(params, LongRow::threads(reach), stream);
}

template <typename T, Divergence kDivergence>
cudaError_t launch_type(const LogitLossParams& params, void* stream) {
  constexpr int kLanes = kPacketBytes / sizeof(T);
  const Phase phase = Phase::of<T>(params.input, params.input_stride, params.rows);
  const auto agrees = [&](const void* tensor, int64_t stride, size_t size) {
    return tensor == nullptr || Phase::of<T>(tensor, stride, params.rows, size) == phase;
  };
  const size_t grad_size = params.grad_dtype == DType::kFloat32 ? 4 : 2;
  const bool packets = (kDivergence == Divergence::kNone ||
                        agrees(params.target, params.target_stride, sizeof(T))) &&
                       agrees(params.grad_input, params.grad_stride, grad_size);
  if (!packets) return launch_packets<T, 1, kDivergence>(params, 0, stream);
  return launch_packets<T, kLanes, kDivergence>(params, phase.max_lead<T>(), stream);
}

template <Divergence kDivergence>
cudaError_t launch_logit_loss(const LogitLossParams& params, void* stream) {
  switch (params.dtype) {
    case DType::kFloat32:
      return launch_type<float, kDivergence>(params, stream);
    case DType::kFloat16:
      return launch_type<Float16, kDivergence>(params, stream);
    case DType::kBFloat16:
      return launch_type<BFloat16, kDivergence>(params, stream);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

// Compiled in logit_loss_of_labels.cu.
extern template cudaError_t launch_logit_loss<Divergence::kDecoupled>(const LogitLossParams&,
                                                                      void*);
extern template cudaError_t launch_logit_loss<Divergence::kNormalized>(const LogitLossParams&,
                                                                       void*);

}  // namespace kdkernels::cuda
