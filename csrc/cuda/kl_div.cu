// Row-wise KL(P||Q) of tempered softmaxes on CUDA devices; formulas in ../kdkernels.h.
//
//   sweep 1  max and sum of exponentials of both sides, online
//   sweep 2  loss = sum_j P_j (D_j + e^-D_j - 1), grad_input_j, the input temperature's moment
//   sweep 3  grad_target_j and the target temperature's moment, which need the loss; if asked for
//
// A warp keeps a short row in registers, so that memory is read once; a block shares a long row,
// and later sweeps read it again, mostly from L2. Elements move in 16-byte packets where all
// tensors' rows sit alike with respect to 16-byte boundaries, one by one otherwise.
#include <algorithm>

#include "reduce.cuh"

namespace kdkernels::cuda {
namespace {

// What a kernel is compiled for; kEverything looks at run time which outputs are null.
enum class Outputs { kLoss, kGradInput, kEverything };

// A row of both tensors, held in a warp's registers: `visit(f)` calls f(packet, inputs, targets).
template <typename T, int V, int kCapacity>
struct RegisterRow {
  using Team = WarpTeam;
  static constexpr int kMaxThreads = 128;
  static constexpr int kMaxClasses = kCapacity;
  static constexpr int kPackets = kMaxClasses / (kWarp * V);

  const PacketLayout<T, V>& layout;
  Team team;
  Packet<T, V> input[kPackets];
  Packet<T, V> target[kPackets];

  KDK_DEVICE RegisterRow(const PacketLayout<T, V>& layout, const T* input_row, const T* target_row,
                         Team team)
      : layout(layout), team(team) {
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      input[k] = layout.load(input_row, k * kWarp + team.rank());
      target[k] = layout.load(target_row, k * kWarp + team.rank());
    }
  }

  template <typename F>
  KDK_DEVICE void visit(F f) const {
#pragma unroll
    for (int k = 0; k < kPackets; ++k) {
      // The same for all lanes: a short row skips the packets it does not reach.
      if (k * kWarp < layout.count) {
        float s[V], t[V];
        to_floats(input[k], s);
        to_floats(target[k], t);
        f(k * kWarp + team.rank(), s, t);
      }
    }
  }
};

// The same, read from memory by a block at each visit.
template <typename T, int V>
struct MemoryRow {
  using Team = BlockTeam;
  static constexpr int kMaxThreads = 512;
  // Loads of several packets are issued before the first is used, to cover the latency of memory.
  static constexpr int kInFlight = V == 1 ? 4 : 2;

  const PacketLayout<T, V>& layout;
  Team team;
  const T* input_row;
  const T* target_row;

  KDK_DEVICE MemoryRow(const PacketLayout<T, V>& layout, const T* input_row, const T* target_row,
                       Team team)
      : layout(layout), team(team), input_row(input_row), target_row(target_row) {}

  template <typename F>
  KDK_DEVICE void visit(F f) const {
    for (int first = team.rank(); first < layout.count; first += kInFlight * team.size()) {
      Packet<T, V> input[kInFlight], target[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        input[k] = layout.load(input_row, first + k * team.size());
        target[k] = layout.load(target_row, first + k * team.size());
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        float s[V], t[V];
        to_floats(input[k], s);
        to_floats(target[k], t);
        f(first + k * team.size(), s, t);
      }
    }
  }
};

// log(a / b) without cancellation as a approaches b.
KDK_DEVICE float log_ratio(double a, double b) {
  const float excess = static_cast<float>(a - b) / static_cast<float>(b);
  return fabsf(excess) < 0.5f ? log1pf(excess)
                              : logf(static_cast<float>(a) / static_cast<float>(b));
}

KDK_DEVICE float value_of(const void* per_row, double value, int64_t row) {
  return per_row != nullptr ? static_cast<const float*>(per_row)[row] : static_cast<float>(value);
}

template <typename T>
KDK_DEVICE T* row_of(void* base, int64_t row, int64_t classes) {
  return base != nullptr ? static_cast<T*>(base) + row * classes : nullptr;
}

KDK_DEVICE void write(void* per_row, int64_t row, float value) {
  if (per_row != nullptr) static_cast<float*>(per_row)[row] = value;
}

template <typename T, int V, typename Team>
KDK_DEVICE void clear_row(const PacketLayout<T, V>& layout, T* row, Team team) {
  if (row == nullptr) return;
  const float zeros[V] = {};
  for (int k = team.rank(); k < layout.count; k += team.size()) layout.store(row, k, zeros);
}

// sum_j w_j z_j over weights that sum to 0 but for rounding: what they do sum to, w_j being off by
// that much of P_j, is taken off times the mean of z. z is the logit less the row's maximum, -inf
// where P and w are 0.
struct Moment {
  float sum = 0, weights = 0, mean = 0;

  KDK_DEVICE void add(float w, float p, float z) {
    if (w != 0) sum += w * z;
    weights += w;
    if (p > 0 && z > -INFINITY) mean += p * z;
  }
};

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
    clear_row(layout, grad_input, team);
    clear_row(layout, grad_target, team);
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
  const float input_factor = input_inverse * static_cast<float>(kLog2E);
  const float target_factor = target_inverse * static_cast<float>(kLog2E);
  const float scale = value_of(params.row_scale, params.scale, r);
  const Row row(layout, input_row, target_row, team);

  OnlineSoftmax q, p;
  row.visit([&](int, const float (&s)[V], const float (&t)[V]) {
    q.add(s, input_factor);
    p.add(t, target_factor);
  });
  float max[2] = {q.max, p.max};
  team.reduce(max, -INFINITY, Maximum());
  const float input_max = max[0];
  const float target_max = max[1];
  // Each thread has summed few terms. In double their sums lose nothing more: near convergence the
  // offset below must be good to 1e-8.
  double sum[2] = {q.sum_at(input_max, input_factor), p.sum_at(target_max, target_factor)};
  team.reduce(sum, 0.0, Sum());
  const float input_norm = 1 / static_cast<float>(sum[0]);
  const float target_norm = 1 / static_cast<float>(sum[1]);

  // D_j = t_j / T_P - s_j / T_Q - offset. Differencing first leaves exactly (t_j - s_j) / T at
  // equal temperatures: the second product is then 0, or NaN where P_j = 0 and no term looks at it.
  const float extra_inverse = target_inverse - input_inverse;
  const auto scaled_difference = [&](float s, float t) {
    return (t - s) * input_inverse + t * extra_inverse;
  };
  const float offset = scaled_difference(input_max, target_max) + log_ratio(sum[1], sum[0]);
  const auto delta_of = [&](float s, float t) { return scaled_difference(s, t) - offset; };
  const auto p_of = [&](float t) {
    return exp2_approximate((t - target_max) * target_factor) * target_norm;
  };
  const auto q_of = [&](float s) {
    return exp2_approximate((s - input_max) * input_factor) * input_norm;
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

template <typename T, int V, typename Row, Outputs kOutputs>
cudaError_t launch_rows(const KlDivParams& params, int threads, void* stream) {
  const int teams = Row::Team::per_block(threads);
  const int64_t blocks = std::min((params.rows + teams - 1) / teams, kMaxBlocks);
  return launch(kl_div_kernel<T, V, Row, kOutputs>, dim3(static_cast<unsigned>(blocks)), threads,
                Row::Team::kSharedBytes, stream, params);
}

// `lead` is the most elements that may lie between a boundary and the start of a row.
template <typename T, int V, Outputs kOutputs>
cudaError_t launch_outputs(const KlDivParams& params, int lead, void* stream) {
  using ShortRow = RegisterRow<T, V, 256>;
  const int64_t reach = params.classes + lead;
  if (reach <= ShortRow::kMaxClasses) {
    return launch_rows<T, V, ShortRow, kOutputs>(params, ShortRow::kMaxThreads, stream);
  }
  // With the third sweep 1024 classes would spill from registers.
  if constexpr (V > 1 && kOutputs != Outputs::kEverything) {
    using MediumRow = RegisterRow<T, V, 1024>;
    if (reach <= MediumRow::kMaxClasses) {
      return launch_rows<T, V, MediumRow, kOutputs>(params, MediumRow::kMaxThreads, stream);
    }
  }
  using LongRow = MemoryRow<T, V>;
  // About four packets a thread.
  const int64_t threads =
      std::clamp<int64_t>(reach / (4 * V) / kWarp * kWarp, 128, LongRow::kMaxThreads);
  return launch_rows<T, V, LongRow, kOutputs>(params, static_cast<int>(threads), stream);
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

// Where a tensor's rows start with respect to packet boundaries, in bytes: the first, and each next
// one's step.
struct Phase {
  uint64_t first;
  uint64_t step;
  bool operator==(const Phase& other) const { return first == other.first && step == other.step; }
};

template <typename T>
cudaError_t launch_type(const KlDivParams& params, void* stream) {
  constexpr int kLanes = kPacketBytes / sizeof(T);
  const auto phase_of = [&](const void* tensor, int64_t stride) {
    return Phase{reinterpret_cast<uintptr_t>(tensor) % kPacketBytes,
                 params.rows > 1 ? static_cast<uint64_t>(stride) * sizeof(T) % kPacketBytes : 0};
  };
  const Phase phase = phase_of(params.input, params.input_stride);
  const auto agrees = [&](const void* tensor, int64_t stride) {
    return tensor == nullptr || phase_of(tensor, stride) == phase;
  };
  const bool packets = agrees(params.target, params.target_stride) &&
                       agrees(params.grad_input, params.classes) &&
                       agrees(params.grad_target, params.classes);
  if (!packets) return launch_packets<T, 1>(params, 0, stream);
  return launch_packets<T, kLanes>(params, phase == Phase{0, 0} ? 0 : kLanes - 1, stream);
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
