// Pooling of two maps and their squared distance on CUDA devices; formulas in ../kdkernels.h.
//
// Forward: 2 reads. A grid's rows are the samples, its columns pieces of them: groups of channels,
// each with all its positions, so that a channel's sum never leaves a block. With the positions
// side by side a team of a quarter of a warp up to a whole one takes a channel, as many threads as
// it has packets; with the channels side by side a team of threads takes every sixteenth position
// of a few packets of channels.
//
// Backward: 2 reads and 1 write a side, in packets along the whole sample, whatever its layout.
#include <algorithm>

#include "reduce.cuh"

namespace kdkernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 2;  // packets of each map
// Channels side by side: packets of channels by positions that a block has under way.
constexpr int kPacketsAcross = 16;
constexpr int kGroups = kThreads / kPacketsAcross;
constexpr int kRun = 32;  // positions that a thread adds before their sum meets a longer one

template <typename T>
KDK_DEVICE const T* of_sample(const void* base, int64_t sample, int64_t size) {
  return base != nullptr ? static_cast<const T*>(base) + sample * size : nullptr;
}

template <typename T>
KDK_DEVICE T* of_sample(void* base, int64_t sample, int64_t size) {
  return base != nullptr ? static_cast<T*>(base) + sample * size : nullptr;
}

// A packet's sums, of what lies in the row: lanes outside it are -inf. They are added up before
// they meet a longer sum, so that this has fewer roundings.
template <int V>
KDK_DEVICE void sum_packet(const float (&s)[V], const float (&t)[V], int first, int classes,
                           float& s_sum, float& t_sum, float& squares) {
  float s_packet = 0, t_packet = 0, packet_squares = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (first + i >= 0 && first + i < classes) {
      const float difference = s[i] - t[i];
      s_packet += s[i];
      t_packet += t[i];
      packet_squares += difference * difference;
    }
  }
  s_sum += s_packet;
  t_sum += t_packet;
  squares += packet_squares;
}

// The block's sum of squares becomes its piece's share of the mean.
KDK_DEVICE void write_piece(const PoolMseParams& params, int64_t sample, float squares) {
  double total[1] = {squares};
  BlockTeam().reduce(total, 0.0, Sum());
  if (threadIdx.x == 0) {
    const double elements = static_cast<double>(params.channels) * params.positions;
    static_cast<float*>(params.mse)[sample * params.pieces + blockIdx.y] =
        static_cast<float>(total[0] / elements);
  }
}

template <typename T>
KDK_DEVICE void write_nothing(const PoolMseParams& params, int64_t sample) {
  const int channels = static_cast<int>(params.channels);
  T* pooled_student = of_sample<T>(params.pooled_student, sample, channels);
  T* pooled_teacher = of_sample<T>(params.pooled_teacher, sample, channels);
  for (int c = blockIdx.y * kThreads + threadIdx.x; c < channels; c += gridDim.y * kThreads) {
    assign(pooled_student[c], 0);
    assign(pooled_teacher[c], 0);
  }
  if (threadIdx.x == 0) static_cast<float*>(params.mse)[sample * params.pieces + blockIdx.y] = 0;
}

// Positions side by side. `team` threads, a power of two up to a warp, share a channel.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) pool_positions_kernel(PoolMseParams params, int team) {
  const int channels = static_cast<int>(params.channels);
  const int positions = static_cast<int>(params.positions);
  const int teams = kThreads / team;
  const int rank = threadIdx.x % team;
  const float inverse = 1.0f / positions;
  for (int64_t sample = blockIdx.x; sample < params.batch; sample += gridDim.x) {
    if (params.mask != nullptr && params.mask[sample] == 0) {
      write_nothing<T>(params, sample);
      continue;
    }
    const int64_t elements = int64_t{channels} * positions;
    const T* student = of_sample<T>(params.student, sample, elements);
    const T* teacher = of_sample<T>(params.teacher, sample, elements);
    float squares = 0;
    // All teams of a warp go round equally often: they shuffle together.
    for (int base = blockIdx.y * teams; base < channels; base += gridDim.y * teams) {
      const int c = base + threadIdx.x / team;
      const bool exists = c < channels;
      const int64_t row = int64_t{exists ? c : 0} * positions;
      const PacketLayout<T, V> layout(student + row, positions);
      float sums[2] = {}, row_squares = 0;
      const int count = exists ? layout.count : 0;
      for (int first = rank; first < count; first += kInFlight * team) {
        Packet<T, V> s_packets[kInFlight], t_packets[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          s_packets[k] = layout.load(student + row, first + k * team);
          t_packets[k] = layout.load(teacher + row, first + k * team);
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          float s[V], t[V];
          to_floats(s_packets[k], s);
          to_floats(t_packets[k], t);
          const int j = layout.first_class(first + k * team);
          sum_packet(s, t, j, positions, sums[0], sums[1], row_squares);
        }
      }
      squares += row_squares;
      for (int distance = team / 2; distance > 0; distance /= 2) {
        sums[0] += __shfl_xor_sync(kAllLanes, sums[0], distance);
        sums[1] += __shfl_xor_sync(kAllLanes, sums[1], distance);
      }
      if (exists && rank == 0) {
        assign(of_sample<T>(params.pooled_student, sample, channels)[c], sums[0] * inverse);
        assign(of_sample<T>(params.pooled_teacher, sample, channels)[c], sums[1] * inverse);
      }
    }
    write_piece(params, sample, squares);
  }
}

// Channels side by side.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) pool_channels_kernel(PoolMseParams params) {
  constexpr int kChannels = kPacketsAcross * V;
  // After what a block's reduction takes.
  float* partial = shared_memory<float>() + BlockTeam::kSharedBytes / sizeof(float);
  const int channels = static_cast<int>(params.channels);
  const int positions = static_cast<int>(params.positions);
  const int group = threadIdx.x / kPacketsAcross, lane = threadIdx.x % kPacketsAcross;
  const float inverse = 1.0f / positions;
  for (int64_t sample = blockIdx.x; sample < params.batch; sample += gridDim.x) {
    if (params.mask != nullptr && params.mask[sample] == 0) {
      write_nothing<T>(params, sample);
      continue;
    }
    const int64_t elements = int64_t{channels} * positions;
    const T* student = of_sample<T>(params.student, sample, elements);
    const T* teacher = of_sample<T>(params.teacher, sample, elements);
    float squares = 0;
    for (int base = blockIdx.y * kChannels; base < channels; base += gridDim.y * kChannels) {
      const int first = base + lane * V;
      float s_sums[V] = {}, t_sums[V] = {}, tile_squares = 0;
      for (int run = group; run < positions; run += kRun * kGroups) {
        float s_run[V] = {}, t_run[V] = {}, run_squares = 0;
        const int end = run + kRun * kGroups < positions ? run + kRun * kGroups : positions;
        for (int p = run; p < end; p += kInFlight * kGroups) {
          Packet<T, V> s_packets[kInFlight] = {}, t_packets[kInFlight] = {};
#pragma unroll
          for (int k = 0; k < kInFlight; ++k) {
            // Rows start on packets: the launcher sees to it.
            if (p + k * kGroups < end && first < channels) {
              const int64_t at = int64_t{p + k * kGroups} * channels + first;
              s_packets[k] = *reinterpret_cast<const Packet<T, V>*>(student + at);
              t_packets[k] = *reinterpret_cast<const Packet<T, V>*>(teacher + at);
            }
          }
#pragma unroll
          for (int k = 0; k < kInFlight; ++k) {
            float s[V], t[V];
            to_floats(s_packets[k], s);
            to_floats(t_packets[k], t);
#pragma unroll
            for (int i = 0; i < V; ++i) {
              const float difference = s[i] - t[i];
              s_run[i] += s[i];
              t_run[i] += t[i];
              run_squares += difference * difference;
            }
          }
        }
#pragma unroll
        for (int i = 0; i < V; ++i) {
          s_sums[i] += s_run[i];
          t_sums[i] += t_run[i];
        }
        tile_squares += run_squares;
      }
      squares += tile_squares;
      __syncthreads();  // the previous sums may still be read
#pragma unroll
      for (int i = 0; i < V; ++i) {
        partial[group * kChannels + lane * V + i] = s_sums[i];
        partial[(kGroups + group) * kChannels + lane * V + i] = t_sums[i];
      }
      __syncthreads();
      for (int i = threadIdx.x; i < 2 * kChannels; i += kThreads) {
        const int side = i / kChannels, c = i % kChannels;
        float sum = 0;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) sum += partial[(side * kGroups + g) * kChannels + c];
        if (base + c < channels) {
          void* pooled = side == 0 ? params.pooled_student : params.pooled_teacher;
          assign(of_sample<T>(pooled, sample, channels)[base + c], sum * inverse);
        }
      }
    }
    write_piece(params, sample, squares);
  }
}

// Both sides' gradients, along the sample as it lies in memory.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) pool_mse_gradient_kernel(PoolMseParams params) {
  const int elements = static_cast<int>(params.channels * params.positions);
  // Element j belongs to channel j / positions, or j % channels.
  const int period = static_cast<int>(params.channels_last ? params.channels : params.positions);
  const float inverse = 1.0f / params.positions;
  const int step = gridDim.y * kThreads;
  for (int64_t sample = blockIdx.x; sample < params.batch; sample += gridDim.x) {
    const bool counts = params.mask == nullptr || params.mask[sample] != 0;
    const T* student = of_sample<T>(params.student, sample, elements);
    const T* teacher = of_sample<T>(params.teacher, sample, elements);
    const T* upstream[2] = {of_sample<T>(params.grad_pooled_student, sample, params.channels),
                            of_sample<T>(params.grad_pooled_teacher, sample, params.channels)};
    T* gradients[2] = {of_sample<T>(params.grad_student, sample, elements),
                       of_sample<T>(params.grad_teacher, sample, elements)};
    const bool reads = counts && params.grad_mse != nullptr;
    float scale = 0;
    if (reads) scale = 2 * static_cast<const float*>(params.grad_mse)[sample] / elements;
    const PacketLayout<T, V> layout(student, elements);
    for (int first = blockIdx.y * kThreads + threadIdx.x; first < layout.count;
         first += kInFlight * step) {
      Packet<T, V> s_packets[kInFlight] = {}, t_packets[kInFlight] = {};
      if (reads) {
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          s_packets[k] = layout.load(student, first + k * step);
          t_packets[k] = layout.load(teacher, first + k * step);
        }
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        if (first + k * step >= layout.count) break;
        float s[V], t[V], values[2][V];
        to_floats(s_packets[k], s);
        to_floats(t_packets[k], t);
        const int begin = layout.first_class(first + k * step);
        const int start = begin > 0 ? begin : 0;
        int quotient = start / period, remainder = start - quotient * period;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const bool inside = layout.contains(begin + i);
          const int c = params.channels_last ? remainder : quotient;
          const float slope = reads ? scale * (s[i] - t[i]) : 0.0f;
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            float bias = 0;
            if (counts && inside && upstream[side] != nullptr) {
              bias = to_float(upstream[side][c]) * inverse;
            }
            values[side][i] = side == 0 ? slope + bias : bias - slope;
          }
          if (begin + i >= 0 && ++remainder == period) {
            remainder = 0;
            ++quotient;
          }
        }
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          if (gradients[side] != nullptr) {
            layout.store(gradients[side], first + k * step, values[side]);
          }
        }
      }
    }
  }
}

// Whether all the maps' packets of V lie alike: then one layout serves them all.
template <typename T>
bool lie_alike(const PoolMseParams& params) {
  const auto phase = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % kPacketBytes; };
  const auto as_student = [&](const void* x) {
    return x == nullptr || phase(x) == phase(params.student);
  };
  return as_student(params.teacher) && as_student(params.grad_student) &&
         as_student(params.grad_teacher);
}

template <typename T, int V>
cudaError_t launch_packets(const PoolMseParams& params, void* stream) {
  const unsigned samples = static_cast<unsigned>(std::min(params.batch, kMaxBlocks));
  if (params.mse != nullptr) {
    const dim3 grid(samples, static_cast<unsigned>(params.pieces));
    constexpr size_t kShared = BlockTeam::kSharedBytes;
    cudaError_t error;
    if (params.channels_last) {
      constexpr size_t kSums = 2 * kGroups * kPacketsAcross * V * sizeof(float);
      error = launch(pool_channels_kernel<T, V>, grid, kThreads, kShared + kSums, stream, params);
    } else {
      int team = 4;
      while (team < kWarp && team * V < params.positions) team *= 2;
      error = launch(pool_positions_kernel<T, V>, grid, kThreads, kShared, stream, params, team);
    }
    if (error != cudaSuccess) return error;
  }
  if (params.grad_student == nullptr && params.grad_teacher == nullptr) return cudaSuccess;
  const int64_t packets = params.channels * params.positions / V;
  const int64_t pieces = std::clamp<int64_t>(packets / (kThreads * kInFlight), 1, 1024);
  return launch(pool_mse_gradient_kernel<T, V>, dim3(samples, static_cast<unsigned>(pieces)),
                kThreads, 0, stream, params);
}

template <typename T>
cudaError_t launch_type(const PoolMseParams& params, void* stream) {
  constexpr int kLanes = kPacketBytes / sizeof(T);
  // Channels that lie side by side start each position on a packet, or go one by one.
  const bool starts_on_packets = reinterpret_cast<uintptr_t>(params.student) % kPacketBytes == 0 &&
                                 params.channels % kLanes == 0;
  const bool whole = params.mse == nullptr || !params.channels_last || starts_on_packets;
  return lie_alike<T>(params) && whole ? launch_packets<T, kLanes>(params, stream)
                                       : launch_packets<T, 1>(params, stream);
}

}  // namespace

int pool_mse(const PoolMseParams& params, void* stream) {
  if (params.channels > kMaxClasses || params.channels * params.positions > kMaxClasses) {
    return cudaErrorInvalidValue;
  }
  if (params.batch == 0 || params.channels == 0 || params.positions == 0) return cudaSuccess;
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
