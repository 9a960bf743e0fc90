// Row-wise KL(P||Q) of tempered softmaxes on CUDA devices; formulas in ../kdkernels.h.
//
//   sweep 1  max and sum of exponentials of both sides, online
//   sweep 2  loss = sum_j P_j (D_j + e^-D_j - 1), grad_input_j, the input temperature's moment
//   sweep 3  grad_target_j and the target temperature's moment, which need the loss; if asked for
//
// How a row is held, and what is read again: rows.cuh.
#include "rows.cuh"

namespace kdkernels::cuda {
namespace {

// What a kernel is compiled for; kEverything looks at run time which outputs are null.
enum class Outputs { kLoss, kGradInput, kEverything };

// Row r, by one team of threads.
template <typename T, int V, typename Row, Outputs kOutputs>
KDK_DEVICE void kl_div_row(const KlDivParams& params, int64_t r, typename Row::Team team) {
  constexpr bool kEverything = kOutputs == Outputs::kEverything;
  const T* input_row = static_cast<const T*>(params.input) + r * params.input_stride;
  const T* target_row = static_cast<const T*>(params.target) + r * params.target_stride;
  T* grad_input =
      kOutputs != Outputs::kLoss ? row_of<T>(params.grad_input, r, params.classes) : nullptr;
  T* grad_target = kEverything ? row_of<T>(params.grad_target, r, params.classes) : nullptr;
  const PacketLayout<T, V> layout(input_row, static_cast<int>(params.classes));
  const bool leader = team.rank() == 0;

  if (params.mask != nullptr && params.mask[r] == 0) {
    fill_row(layout, grad_input, 0, team);
    fill_row(layout, grad_target, 0, team);
    if (leader) {
      write(params.loss, r, 0);
      write(params.grad_input_temperature, r, 0);
      write(params.grad_target_temperature, r, 0);
    }
    return;
  }

  const float input_inverse =
      1 / value_of(params.input_temperature, params.input_temperature_value, r);
  const float target_inverse =
      1 / value_of(params.target_temperature, params.target_temperature_value, r);
  const float input_factor[1] = {input_inverse * static_cast<float>(kLog2E)};
  const float target_factor[1] = {target_inverse * static_cast<float>(kLog2E)};
  const float scale = value_of(params.row_scale, params.scale, r);
  const Row row(layout, input_row, target_row, team);

  OnlineSoftmax<1> q(input_factor), p(target_factor);
  visit_sums(row, q, input_factor, 1, p, target_factor);
  const float input_max = q.max;
  const float target_max = p.max;
  double sum[2] = {q.sum(0, input_factor), p.sum(0, target_factor)};
  team.reduce(sum, 0.0, Sum());
  const float input_norm = 1 / static_cast<float>(sum[0]);
  const float target_norm = 1 / static_cast<float>(sum[1]);

  // D_j from the logits' difference, which is exact near convergence; where the sides are far from
  // each other, from each side's distance to its own maximum. At equal temperatures the second
  // product is 0, or NaN where P_j = 0 and no term looks at it. (LogRatio does more, and spills.)
  const float extra_inverse = target_inverse - input_inverse;
  const float shift = target_max - input_max;
  const bool far = fabsf(shift) * input_inverse > kFar;
  const float offset = log_ratio(sum[1], sum[0]);
  const auto delta_of = [&](float s, float t) {
    const float from_max = t - target_max;
    const float difference = far ? from_max - (s - input_max) : (t - s) - shift;
    return difference * input_inverse + from_max * extra_inverse - offset;
  };
  const auto p_of = [&](float t) {
    return exp2_approximate((t - target_max) * target_factor[0]) * target_norm;
  };
  const auto q_of = [&](float s) {
    return exp2_approximate((s - input_max) * input_factor[0]) * input_norm;
  };

  float loss_share = 0;
  Moment input_moment;
  row.visit([&](int packet, const float (&s)[V], const float (&t)[V]) {
    float gradient[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const KlTerm<float> term = kl_term(p_of(t[i]), q_of(s[i]), delta_of(s[i], t[i]));
      loss_share += term.excess;
      gradient[i] = term.difference * (scale * input_inverse);
      if (kEverything) input_moment.add(term.difference, p_of(t[i]), s[i] - input_max);
    }
    if (grad_input != nullptr) layout.store(grad_input, packet, gradient);
  });
  double sums[kEverything ? 4 : 1] = {loss_share};
  if constexpr (kEverything) {
    sums[1] = input_moment.sum, sums[2] = input_moment.weights, sums[3] = input_moment.mean;
  }
  team.reduce(sums, 0.0, Sum());
  const float loss = static_cast<float>(sums[0]);
  if (leader) write(params.loss, r, scale * loss);
  if constexpr (kEverything) {
    Moment target_moment;
    row.visit([&](int packet, const float (&s)[V], const float (&t)[V]) {
      float gradient[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float weight = kl_target_gradient(p_of(t[i]), delta_of(s[i], t[i]), loss);
        gradient[i] = weight * (scale * target_inverse);
        target_moment.add(weight, p_of(t[i]), t[i] - target_max);
      }
      if (grad_target != nullptr) layout.store(grad_target, packet, gradient);
    });
    double target_sums[3] = {target_moment.sum, target_moment.weights, target_moment.mean};
    team.reduce(target_sums, 0.0, Sum());
    if (leader) {
      const float input_sum = static_cast<float>(sums[1] - sums[2] * sums[3]);
      const float target_sum = static_cast<float>(target_sums[0] - target_sums[1] * target_sums[2]);
      write(params.grad_input_temperature, r, -scale * input_inverse * input_inverse * input_sum);
      write(params.grad_target_temperature, r,
            -scale * target_inverse * target_inverse * target_sum);
    }
  }
}

template <typename T, int V, typename Row, Outputs kOutputs>
__global__ void __launch_bounds__(Row::kMaxThreads) kl_div_kernel(KlDivParams params) {
  const typename Row::Team team;
  for (int64_t r = team.index(); r < params.rows; r += team.count()) {
    kl_div_row<T, V, Row, kOutputs>(params, r, team);
  }
}

// `lead` is the most elements that may lie between a boundary and the start of a row.
template <typename T, int V, Outputs kOutputs>
cudaError_t launch_outputs(const KlDivParams& params, int lead, void* stream) {
  using ShortRow = RegisterRow<T, V, true, WarpTeam, 256>;
  const int64_t reach = params.classes + lead;
  if (reach <= ShortRow::kMaxClasses) {
    return launch_rows<ShortRow>(kl_div_kernel<T, V, ShortRow, kOutputs>, params,
                                 ShortRow::kMaxThreads, stream);
  }
  // With the third sweep 1024 classes would spill from registers.
  if constexpr (V > 1 && kOutputs != Outputs::kEverything) {
    using MediumRow = RegisterRow<T, V, true, WarpTeam, 1024>;
    if (reach <= MediumRow::kMaxClasses) {
      return launch_rows<MediumRow>(kl_div_kernel<T, V, MediumRow, kOutputs>, params,
                                    MediumRow::kMaxThreads, stream);
    }
  }
  using LongRow = MemoryRow<T, V, true>;
  return launch_rows<LongRow>(kl_div_kernel<T, V, LongRow, kOutputs>, params,
                              LongRow::threads(reach), stream);
}

template <typename T, int V>
cudaError_t launch_packets(const KlDivParams& params, int lead, void* stream) {
  if (params.grad_target != nullptr || params.grad_input_temperature != nullptr ||
      params.grad_target_temperature != nullptr) {
    return launch_outputs<T, V, Outputs::kEverything>(params, lead, stream);
  }
  if (params.grad_input != nullptr) {
    return launch_outputs<T, V, Outputs::kGradInput>(params, lead, stream);
  }
  return launch_outputs<T, V, Outputs::kLoss>(params, lead, stream);
}

template <typename T>
cudaError_t launch_type(const KlDivParams& params, void* stream) {
  constexpr int kLanes = kPacketBytes / sizeof(T);
  const Phase phase = Phase::of<T>(params.input, params.input_stride, params.rows);
  const auto agrees = [&](const void* tensor, int64_t stride) {
    return tensor == nullptr || Phase::of<T>(tensor, stride, params.rows) == phase;
  };
  const bool packets = agrees(params.target, params.target_stride) &&
                       agrees(params.grad_input, params.classes) &&
                       agrees(params.grad_target, params.classes);
  if (!packets) return launch_packets<T, 1>(params, 0, stream);
  return launch_packets<T, kLanes>(params, phase.max_lead<T>(), stream);
}

}  // namespace

int kl_div(const KlDivParams& params, void* stream) {
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
