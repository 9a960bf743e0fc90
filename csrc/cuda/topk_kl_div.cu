// Rows of KL(P||Q) of a teacher known by k log-probabilities on CUDA devices; formulas in
// ../kdkernels.h.
//
//   marks    the classes of I as bits in shared memory
//   sweep 1  maximum and sum of exponentials outside I; those inside come from the k entries
//   entries  the loss
//   sweep 2  the gradient outside I, and the temperature's moment; if asked for
//   entries  the gradients inside I
//
// A block takes a row. With D from double, each of the k terms is right near convergence too.
// tail kRenormalize needs no sweep: it does not look outside I.
#include "../divergence.h"
#include "rows.cuh"

namespace kdkernels::cuda {
namespace {

// Marked classes, one bit for each position from the first packet's start on. There are at most
// kBits: in a longer row positions share them, and a set bit is looked up among the indices.
struct Marks {
  static constexpr int kBits = 1 << 18;

  uint32_t* words;
  const int64_t* indices;
  int k;
  int lead;
  int positions;

  static int words_for(int64_t positions) {
    return static_cast<int>((std::min<int64_t>(positions, kBits) + 31) / 32);
  }

  KDK_DEVICE void clear(BlockTeam team) const {
    const int used = positions < kBits ? positions : kBits;
    for (int n = team.rank(); n < (used + 31) / 32; n += team.size()) words[n] = 0;
  }

  KDK_DEVICE void set(int j) const {
    const int bit = (lead + j) % kBits;
    atomicOr(words + bit / 32, 1u << bit % 32);
  }

  // A bit for each lane of a packet.
  template <int V>
  KDK_DEVICE uint32_t of(int packet) const {
    const int position = packet * V;
    if (position >= positions) return 0;
    const int bit = position % kBits;
    uint32_t marks = words[bit / 32] >> bit % 32 & ((1u << V) - 1);
    if (positions > kBits && marks != 0) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if ((marks >> i & 1) != 0 && !is_index(position + i - lead)) marks &= ~(1u << i);
      }
    }
    return marks;
  }

 private:
  KDK_DEVICE bool is_index(int j) const {
    for (int i = 0; i < k; ++i) {
      if (indices[i] == j) return true;
    }
    return false;
  }
};

// Visits `row` as if the marked classes were -inf.
template <typename Row>
struct Outside {
  static constexpr bool kPair = false;
  static constexpr bool kInRegisters = Row::kInRegisters;
  static constexpr int kLanes = Row::kLanes;

  const Row& row;
  BlockTeam team;
  Marks marks;

  template <typename F>
  KDK_DEVICE void visit(F f) const {
    row.visit([&](int packet, const float (&s)[kLanes], const float (&)[kLanes]) {
      const uint32_t inside = marks.of<kLanes>(packet);
      float others[kLanes];
#pragma unroll
      for (int i = 0; i < kLanes; ++i) others[i] = (inside >> i & 1) != 0 ? -INFINITY : s[i];
      f(packet, others, others);
    });
  }
};

// One of the k: its log-probabilities' difference D, and the probabilities.
struct Entry {
  int j;
  float s;
  float delta;
  float p;
  float q;
};

// Row r, by one block.
template <typename T, int V, typename Row>
KDK_DEVICE void topk_kl_div_row(const TopkKlDivParams& params, int64_t r, BlockTeam team) {
  const bool renormalize = params.tail == Tail::kRenormalize;
  const int k = static_cast<int>(params.k);
  const T* input_row = static_cast<const T*>(params.input) + r * params.input_stride;
  const float* log_probs = static_cast<const float*>(params.log_probs) + r * params.k;
  const int64_t* indices = params.indices + r * params.k;
  T* grad_input = row_of<T>(params.grad_input, r, params.grad_stride);
  float* grad_log_probs = row_of<float>(params.grad_log_probs, r, params.k);
  const PacketLayout<T, V> layout(input_row, static_cast<int>(params.classes));
  const bool leader = team.rank() == 0;

  const auto fill = [&](float value) {
    fill_row(layout, grad_input, value, team);
    if (grad_log_probs != nullptr) {
      for (int i = team.rank(); i < k; i += team.size()) grad_log_probs[i] = value;
    }
    if (leader) {
      write(params.loss, r, value);
      write(params.grad_input_temperature, r, value);
    }
  };
  if (params.mask != nullptr && params.mask[r] == 0) return fill(0);

  const float scale = value_of(params.row_scale, params.scale, r);
  const double inverse =
      1.0 / value_of(params.input_temperature, params.input_temperature_value, r);
  const Row row(layout, input_row, input_row, team);
  const Marks marks{
      reinterpret_cast<uint32_t*>(shared_memory<unsigned char>() + BlockTeam::kSharedBytes),
      indices, k, layout.lead, layout.lead + layout.classes};

  // Inside I, with marks set on the way.
  __syncthreads();  // the previous row's marks may still be read
  if (!renormalize) marks.clear(team);
  __syncthreads();
  const Factor factors[1] = {Factor(inverse * kLog2E)};
  OnlineSoftmax<1> inside(factors);
  float max[3] = {-INFINITY, -INFINITY, 0};  // of inputs and log_probs inside; whether one is wrong
  for (int i = team.rank(); i < k; i += team.size()) {
    const int64_t j = indices[i];
    if (j < 0 || j >= params.classes) {
      max[2] = 1;
      continue;
    }
    if (!renormalize) marks.set(static_cast<int>(j));
    const float s[1] = {to_float(input_row[j])};
    inside.look(s);
    inside.add(s, factors, 1);
    max[1] = fmaxf(max[1], log_probs[i]);
  }
  max[0] = inside.max;
  team.reduce(max, -INFINITY, Maximum());  // and the marks are set
  inside.max = max[0];
  if (max[2] != 0) return fill(NAN);

  OnlineSoftmax<1> outside(factors), unused(factors);
  if (!renormalize)
    visit_sums(Outside<Row>{row, team, marks}, outside, factors, 1, unused, factors);

  const float log_prob_max = finite_shift(max[1]);
  double sums[3] = {inside.sum(0, factors), outside.sum(0, factors), 0};
  for (int i = team.rank(); i < k; i += team.size()) {
    sums[2] += exp(static_cast<double>(log_probs[i]) - log_prob_max);
  }
  team.reduce(sums, 0.0, Sum());

  // Q's logarithms are (s - input_max) / T - input_log_sum, P's log_probs - target_log_sum.
  const float input_max = renormalize ? inside.max : fmaxf(inside.max, outside.max);
  const auto share_at_max = [&](double sum, float of_max) {
    return sum * exp2((static_cast<double>(of_max) - input_max) * inverse * kLog2E);
  };
  const double outside_sum = renormalize ? 0 : share_at_max(sums[1], outside.max);
  const double input_sum = share_at_max(sums[0], inside.max) + outside_sum;
  const double input_log_sum = log(input_sum);
  const double target_sum = renormalize ? 1 : sums[2] * exp(static_cast<double>(log_prob_max));
  const double target_log_sum = renormalize ? log_prob_max + log(sums[2]) : 0;
  const auto entry_of = [&](int i) -> Entry {
    const int j = static_cast<int>(indices[i]);
    const float s = to_float(input_row[j]);
    const double log_q = (static_cast<double>(s) - input_max) * inverse - input_log_sum;
    const double log_p = log_probs[i] - target_log_sum;
    return {j, s, static_cast<float>(log_p - log_q), expf(static_cast<float>(log_p)),
            expf(static_cast<float>(log_q))};
  };

  // The rest: P_r and Q_r, and P's whole mass W.
  const bool bucket = params.tail == Tail::kBucket && params.k < params.classes;
  const double p_rest = bucket && target_sum < 1 ? 1 - target_sum : 0;
  const double q_rest = outside_sum / input_sum;
  const double mass_less_1 = p_rest > 0 || renormalize ? 0 : target_sum - 1;
  const double log_q_rest =
      (static_cast<double>(outside.max) - input_max) * inverse + log(sums[1]) - input_log_sum;
  const double delta_rest = p_rest > 0 ? log(p_rest) - log_q_rest : 0;
  KlTerm<double> rest = {0, 0};
  if (p_rest > 0) {
    rest = kl_term(p_rest, q_rest, delta_rest);
  } else if (!renormalize) {
    // Of a sum of P_i D_i alone: what the Bregman form of the entries leaves out.
    rest = {mass_less_1 + q_rest, (1 + mass_less_1) * q_rest};
  }

  float loss_share = 0;
  Moment moment;
  const auto weight_of = [&](const Entry& entry, const KlTerm<float>& term) {
    return term.difference + static_cast<float>(mass_less_1) * entry.q;
  };
  for (int i = team.rank(); i < k; i += team.size()) {
    const Entry entry = entry_of(i);
    const KlTerm<float> term = kl_term(entry.p, entry.q, entry.delta);
    loss_share += term.excess;
    const float z = entry.s > -INFINITY ? entry.s - input_max : -input_max;
    moment.add(weight_of(entry, term), entry.q, z);
  }

  // Outside I a class has its share of what the rest has.
  const float input_inverse = static_cast<float>(inverse);
  const float gain = scale * input_inverse;
  float outside_z = 0;
  if (renormalize) {
    fill_row(layout, grad_input, 0, team);
  } else if (grad_input != nullptr || params.grad_input_temperature != nullptr) {
    const float shift = finite_shift(outside.max);
    const float factor = input_inverse * static_cast<float>(kLog2E);
    const float norm = sums[1] > 0 ? 1 / static_cast<float>(sums[1]) : 0.0f;
    const float outside_gain = gain * static_cast<float>(rest.difference);
    row.visit_anew([&](int packet, const float (&s)[V], const float (&)[V]) {
      const uint32_t inside_marks = marks.of<V>(packet);
      float gradient[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const bool is_outside = (inside_marks >> i & 1) == 0;
        const float share = is_outside ? exp2_approximate((s[i] - shift) * factor) * norm : 0.0f;
        gradient[i] = outside_gain * share;
        if (share > 0) outside_z += share * (s[i] - input_max);
      }
      if (grad_input != nullptr) layout.store(grad_input, packet, gradient);
    });
  }

  double shares[5] = {loss_share, moment.sum, moment.weights, moment.mean, outside_z};
  team.reduce(shares, 0.0, Sum());  // and the gradient outside I is written
  const float loss = static_cast<float>(shares[0] + rest.excess);
  if (leader) {
    write(params.loss, r, scale * loss);
    const double weights = shares[2] + rest.difference;
    const double mean = shares[3] + q_rest * shares[4];
    const double moment_sum = shares[1] + rest.difference * shares[4] - weights * mean;
    write(params.grad_input_temperature, r,
          -scale * input_inverse * input_inverse * static_cast<float>(moment_sum));
  }
  if (grad_input == nullptr && grad_log_probs == nullptr) return;
  const double level = renormalize ? loss : p_rest > 0 ? delta_rest : -1;
  for (int i = team.rank(); i < k; i += team.size()) {
    const Entry entry = entry_of(i);
    if (grad_input != nullptr) {
      const KlTerm<float> term = kl_term(entry.p, entry.q, entry.delta);
      assign(grad_input[entry.j], gain * weight_of(entry, term));
    }
    if (grad_log_probs != nullptr) {
      grad_log_probs[i] =
          scale * kl_target_gradient(entry.p, entry.delta, static_cast<float>(level));
    }
  }
}

template <typename T, int V, typename Row>
__global__ void __launch_bounds__(Row::kMaxThreads, 1) topk_kl_div_kernel(TopkKlDivParams params) {
  const BlockTeam team;
  for (int64_t r = team.index(); r < params.rows; r += team.count()) {
    topk_kl_div_row<T, V, Row>(params, r, team);
  }
}

template <typename T, int V, typename Row>
cudaError_t launch_row(const TopkKlDivParams& params, int64_t reach, int threads, void* stream) {
  return launch_rows<Row>(topk_kl_div_kernel<T, V, Row>, params, threads, stream,
                          Marks::words_for(reach) * sizeof(uint32_t));
}

// `lead` is the most elements that may lie between a boundary and the start of a row.
template <typename T, int V>
cudaError_t launch_packets(const TopkKlDivParams& params, int lead, void* stream) {
  const int64_t reach = params.classes + lead;
  if constexpr (V > 1) {
    using MediumRow = RegisterRow<T, V, false, BlockTeam, 1024>;
    if (reach <= MediumRow::kMaxClasses) {
      return launch_row<T, V, MediumRow>(params, reach, MediumRow::kMaxThreads, stream);
    }
  }
  using LongRow = MemoryRow<T, V, false>;
  return launch_row<T, V, LongRow>(params, reach, LongRow::threads(reach), stream);
}

template <typename T>
cudaError_t launch_type(const TopkKlDivParams& params, void* stream) {
  constexpr int kLanes = kPacketBytes / sizeof(T);
  const Phase phase = Phase::of<T>(params.input, params.input_stride, params.rows);
  const bool packets = params.grad_input == nullptr ||
                       Phase::of<T>(params.grad_input, params.grad_stride, params.rows) == phase;
  if (!packets) return launch_packets<T, 1>(params, 0, stream);
  return launch_packets<T, kLanes>(params, phase.max_lead<T>(), stream);
}

}  // namespace

int topk_kl_div(const TopkKlDivParams& params, void* stream) {
  if (params.classes > kMaxClasses) return cudaErrorInvalidValue;
  if (params.rows == 0) return cudaSuccess;
  switch (params.dtype) {
    case DType::kFloat32:
      return launch_type<float>(params, stream);
    case DType::kFloat16:
      return launch_type<Float16>(params, stream);
    case DType::kBFloat16:
      return launch_type<BFloat16>(params, stream);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace kdkernels::cuda
