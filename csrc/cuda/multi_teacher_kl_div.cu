// Rows of a weighted sum of KL(P_k||Q_k) over teachers on CUDA devices; formulas in ../kdkernels.h.
//
// A row in registers takes the teachers one after the other: the student is read once, and its
// gradient is summed there. A row in memory takes two sweeps:
//
//   sweep 1  maxima and sums of exponentials, teacher by teacher: 2 K reads, the student's mostly
//            from L2
//   sweep 2  packet by packet, every teacher's share of the losses and of the gradient: K + 1 reads
//            and 1 write
#include "../divergence.h"
#include "rows.cuh"

namespace kdkernels::cuda {
namespace {

// What a teacher's classes need of its row and the student's.
struct Pair {
  LogRatio<float> log_ratio_of;
  float factor;  // log2(e) / T
  float input_norm;
  float target_norm;
  float weight;
  float gain;  // weight / T
  int teacher;

  KDK_DEVICE KlTerm<float> term(float s, float t) const {
    const float p = exp2_approximate((t - log_ratio_of.target_max) * factor) * target_norm;
    const float q = exp2_approximate((s - log_ratio_of.input_max) * factor) * input_norm;
    return kl_term(p, q, log_ratio_of(s, t));
  }
};

KDK_DEVICE float of_teacher(const void* values, const int64_t (&strides)[2], double value, int k,
                            int64_t r) {
  return value_of(values, value, k * strides[0] + r * strides[1]);
}

KDK_DEVICE bool counts(const MultiTeacherKlDivParams& params, int k, int64_t r) {
  const int64_t (&strides)[2] = params.teacher_mask_strides;
  return params.teacher_mask == nullptr ||
         params.teacher_mask[k * strides[0] + r * strides[1]] != 0;
}

template <typename T>
KDK_DEVICE const T* target_row_of(const MultiTeacherKlDivParams& params, int k, int64_t r) {
  return static_cast<const T*>(params.targets[k]) + r * params.target_strides[k];
}

// `row` holds the student's row and that of teacher k.
template <typename Row>
KDK_DEVICE Pair pair_of(const MultiTeacherKlDivParams& params, int k, int64_t r, const Row& row) {
  const float inverse = 1 / of_teacher(params.temperature, params.temperature_strides,
                                       params.temperature_values[k], k, r);
  const float weight =
      of_teacher(params.weight, params.weight_strides, params.weight_values[k], k, r);
  const float factor[1] = {inverse * static_cast<float>(kLog2E)};
  OnlineSoftmax<1> q(factor), p(factor);
  visit_sums(row, q, factor, 1, p, factor);
  double sums[2] = {q.sum(0, factor), p.sum(0, factor)};
  row.team.reduce(sums, 0.0, Sum());
  return {LogRatio<float>(q.max, p.max, inverse, inverse, log_ratio(sums[1], sums[0])),
          factor[0],
          1 / static_cast<float>(sums[0]),
          1 / static_cast<float>(sums[1]),
          weight,
          weight * inverse,
          k};
}

KDK_DEVICE float weighted(float weight, float loss) { return weight == 0 ? 0.0f : weight * loss; }

// A row in registers.
template <typename T, int V, typename Row>
KDK_DEVICE void register_row(const MultiTeacherKlDivParams& params, int64_t r, const T* input_row,
                             T* grad_input, const PacketLayout<T, V>& layout,
                             typename Row::Team team) {
  const bool leader = team.rank() == 0;
  Row row(layout, input_row, input_row, team);
  float gradient[Row::kPackets][V] = {};
  float loss = 0;
#pragma unroll 1
  for (int k = 0; k < params.teachers; ++k) {
    float of_this = 0;
    if (counts(params, k, r)) {
      row.load_target(target_row_of<T>(params, k, r));
      const Pair pair = pair_of(params, k, r, row);
      float share = 0;
      row.visit_numbered([&](int n, const float (&s)[V], const float (&t)[V]) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const KlTerm<float> term = pair.term(s[i], t[i]);
          share += term.excess;
          gradient[n][i] += term.difference * pair.gain;
        }
      });
      double sum[1] = {share};
      team.reduce(sum, 0.0, Sum());
      of_this = static_cast<float>(sum[0]);
      loss += weighted(pair.weight, of_this);
    }
    if (leader) write(params.losses, k * params.rows + r, of_this);
  }
  if (leader) write(params.loss, r, loss);
  if (grad_input == nullptr) return;
#pragma unroll
  for (int n = 0; n < Row::kPackets; ++n) layout.store(grad_input, row.packet(n), gradient[n]);
}

// Shared memory of a row in memory: the pairs of the teachers that count, and each thread's share
// of their losses.
struct Shared {
  Pair* pairs;
  float* shares;

  static size_t bytes(int64_t teachers, int threads) {
    return teachers * (sizeof(Pair) + threads * sizeof(float));
  }

  KDK_DEVICE explicit Shared(int64_t teachers)
      : pairs(reinterpret_cast<Pair*>(shared_memory<unsigned char>() + BlockTeam::kSharedBytes)),
        shares(reinterpret_cast<float*>(pairs + teachers)) {}
};

template <typename T, int V, typename Row>
KDK_DEVICE void memory_row(const MultiTeacherKlDivParams& params, int64_t r, const T* input_row,
                           T* grad_input, const PacketLayout<T, V>& layout, BlockTeam team) {
  const bool leader = team.rank() == 0;
  const Shared shared(params.teachers);
  float* share = shared.shares + team.rank();
  int pairs = 0;
  __syncthreads();  // the previous row's pairs may still be read
#pragma unroll 1
  for (int k = 0; k < params.teachers; ++k) {
    if (!counts(params, k, r)) {
      if (leader) write(params.losses, k * params.rows + r, 0);
      continue;
    }
    const Row row(layout, input_row, target_row_of<T>(params, k, r), team);
    const Pair pair = pair_of(params, k, r, row);
    if (leader) shared.pairs[pairs] = pair;
    share[pairs * team.size()] = 0;
    ++pairs;
  }
  __syncthreads();
#pragma unroll 1
  for (int packet = team.rank(); packet < layout.count; packet += team.size()) {
    float s[V], gradient[V] = {};
    to_floats(layout.load(input_row, packet), s);
#pragma unroll 1
    for (int n = 0; n < pairs; ++n) {
      const Pair& pair = shared.pairs[n];
      float t[V], excess = 0;
      to_floats(layout.load(target_row_of<T>(params, pair.teacher, r), packet), t);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const KlTerm<float> term = pair.term(s[i], t[i]);
        excess += term.excess;
        gradient[i] += term.difference * pair.gain;
      }
      share[n * team.size()] += excess;
    }
    if (grad_input != nullptr) layout.store(grad_input, packet, gradient);
  }
  float loss = 0;
#pragma unroll 1
  for (int n = 0; n < pairs; ++n) {
    double sum[1] = {share[n * team.size()]};
    team.reduce(sum, 0.0, Sum());
    const float of_this = static_cast<float>(sum[0]);
    loss += weighted(shared.pairs[n].weight, of_this);
    if (leader) write(params.losses, shared.pairs[n].teacher * params.rows + r, of_this);
  }
  if (leader) write(params.loss, r, loss);
}

// Row r, by one team of threads.
template <typename T, int V, typename Row>
KDK_DEVICE void multi_teacher_row(const MultiTeacherKlDivParams& params, int64_t r,
                                  typename Row::Team team) {
  const T* input_row = static_cast<const T*>(params.input) + r * params.input_stride;
  T* grad_input = row_of<T>(params.grad_input, r, params.classes);
  const PacketLayout<T, V> layout(input_row, static_cast<int>(params.classes));
  if (params.mask != nullptr && params.mask[r] == 0) {
    fill_row(layout, grad_input, 0, team);
    if (team.rank() == 0) {
      write(params.loss, r, 0);
      for (int k = 0; k < params.teachers; ++k) write(params.losses, k * params.rows + r, 0);
    }
    return;
  }
  if constexpr (Row::kInRegisters) {
    register_row<T, V, Row>(params, r, input_row, grad_input, layout, team);
  } else {
    memory_row<T, V, Row>(params, r, input_row, grad_input, layout, team);
  }
}

template <typename T, int V, typename Row>
__global__ void __launch_bounds__(Row::kMaxThreads, Row::kInRegisters ? 4 : 1)
    multi_teacher_kl_div_kernel(MultiTeacherKlDivParams params) {
  const typename Row::Team team;
  for (int64_t r = team.index(); r < params.rows; r += team.count()) {
    multi_teacher_row<T, V, Row>(params, r, team);
  }
}

// `lead` is the most elements that may lie between a boundary and the start of a row.
template <typename T, int V>
cudaError_t launch_packets(const MultiTeacherKlDivParams& params, int lead, void* stream) {
  const int64_t reach = params.classes + lead;
  if constexpr (V > 1) {
    using ShortRow = RegisterRow<T, V, true, WarpTeam, 256>;
    using MediumRow = RegisterRow<T, V, true, BlockTeam, 1024>;
    if (reach <= ShortRow::kMaxClasses) {
      return launch_rows<ShortRow>(multi_teacher_kl_div_kernel<T, V, ShortRow>, params,
                                   ShortRow::kMaxThreads, stream);
    }
    if (reach <= MediumRow::kMaxClasses) {
      return launch_rows<MediumRow>(multi_teacher_kl_div_kernel<T, V, MediumRow>, params,
                                    MediumRow::kMaxThreads, stream);
    }
  }
  using LongRow = MemoryRow<T, V, true>;
  const int threads = LongRow::threads(reach);
  return launch_rows<LongRow>(multi_teacher_kl_div_kernel<T, V, LongRow>, params, threads, stream,
                              Shared::bytes(params.teachers, threads));
}

template <typename T>
cudaError_t launch_type(const MultiTeacherKlDivParams& params, void* stream) {
  constexpr int kLanes = kPacketBytes / sizeof(T);
  const Phase phase = Phase::of<T>(params.input, params.input_stride, params.rows);
  const auto agrees = [&](const void* tensor, int64_t stride) {
    return tensor == nullptr || Phase::of<T>(tensor, stride, params.rows) == phase;
  };
  bool packets = agrees(params.grad_input, params.classes);
  for (int k = 0; k < params.teachers; ++k) {
    packets = packets && agrees(params.targets[k], params.target_strides[k]);
  }
  if (!packets) return launch_packets<T, 1>(params, 0, stream);
  return launch_packets<T, kLanes>(params, phase.max_lead<T>(), stream);
}

}  // namespace

int multi_teacher_kl_div(const MultiTeacherKlDivParams& params, void* stream) {
  if (params.classes > kMaxClasses || params.teachers > kMaxTeachers) return cudaErrorInvalidValue;
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
