// Kernels that walk over rows of one or two tensors: how a team of threads holds a row, what they
// share per row, and which kernel a launch picks.
//
// A team keeps a short row in registers, so that memory is read once; a block shares a long row,
// and later visits read it again, mostly from L2. Elements move in 16-byte packets where all
// tensors' rows sit alike with respect to 16-byte boundaries, one by one otherwise.
#pragma once

#include <algorithm>

#include "reduce.cuh"

namespace kdkernels::cuda {

// A row of one tensor, or of two (kPair), held in the team's registers: `visit(f)` calls f(packet,
// inputs, targets). Without a pair the targets are the inputs.
template <typename T, int V, bool kIsPair, typename TeamOf, int kCapacity>
struct RegisterRow {
  using Team = TeamOf;
  static constexpr bool kPair = kIsPair;
  static constexpr int kLanes = V;
  static constexpr bool kInRegisters = true;
  static constexpr int kMaxThreads = 128;
  static constexpr int kMaxClasses = kCapacity;
  static constexpr int kTeamSize = Team::size_in(kMaxThreads);
  static constexpr int kPackets = kMaxClasses / (kTeamSize * V);

  const PacketLayout<T, V>& layout;
  Team team;
  Packet<T, V> input[kPackets];
  Packet<T, V> target[kPair ? kPackets : 1];

  KDK_DEVICE RegisterRow(const PacketLayout<T, V>& layout, const T* input_row, const T* target_row,
                         Team team)
      : layout(layout), team(team) {
#pragma unroll
    for (int n = 0; n < kPackets; ++n) {
      input[n] = layout.load(input_row, packet(n));
      if constexpr (kPair) target[n] = layout.load(target_row, packet(n));
    }
  }

  KDK_DEVICE void load_target(const T* target_row) {
#pragma unroll
    for (int n = 0; n < kPackets; ++n) target[n] = layout.load(target_row, packet(n));
  }

  // This thread's packet n.
  KDK_DEVICE int packet(int n) const { return n * kTeamSize + team.rank(); }

  template <typename F>
  KDK_DEVICE void visit(F f) const {
    visit_as([](const Packet<T, V>& x) { return x; },
             [&](int n, const auto& s, const auto& t) { f(packet(n), s, t); });
  }

  // For an f that computes much: nothing is kept in registers from an earlier visit.
  template <typename F>
  KDK_DEVICE void visit_anew(F f) const {
    visit_as([](const Packet<T, V>& x) { return anew(x); },
             [&](int n, const auto& s, const auto& t) { f(packet(n), s, t); });
  }

  // Calls f(n, inputs, targets): n, a constant, numbers this thread's packets.
  template <typename F>
  KDK_DEVICE void visit_numbered(F f) const {
    visit_as([](const Packet<T, V>& x) { return anew(x); }, f);
  }

 private:
  template <typename Get, typename F>
  KDK_DEVICE void visit_as(Get get, F f) const {
#pragma unroll
    for (int n = 0; n < kPackets; ++n) {
      // The same for the whole team: a short row skips the packets it does not reach.
      if (n * kTeamSize < layout.count) {
        float s[V], t[V];
        const Packet<T, V> x = get(input[n]);
        to_floats(x, s);
        to_floats(kPair ? get(target[n]) : x, t);
        f(n, s, t);
      }
    }
  }
};

// The same, read from memory by a block at each visit.
template <typename T, int V, bool kIsPair>
struct MemoryRow {
  using Team = BlockTeam;
  static constexpr bool kPair = kIsPair;
  static constexpr int kLanes = V;
  static constexpr bool kInRegisters = false;
  static constexpr int kMaxThreads = 512;
  // Loads of several packets are issued before the first is used, to cover the latency of memory.
  static constexpr int kInFlight = V == 1 ? 4 : 2;

  // About four packets a thread. `reach` counts the elements before the row, too.
  static int threads(int64_t reach) {
    return static_cast<int>(std::clamp<int64_t>(reach / (4 * V) / kWarp * kWarp, 128, kMaxThreads));
  }

  const PacketLayout<T, V>& layout;
  Team team;
  const T* input_row;
  const T* target_row;

  KDK_DEVICE MemoryRow(const PacketLayout<T, V>& layout, const T* input_row, const T* target_row,
                       Team team)
      : layout(layout), team(team), input_row(input_row), target_row(target_row) {}

  template <typename F>
  KDK_DEVICE void visit(F f) const {
    visit_in_flight<kInFlight>(f);
  }

  // For an f that computes much, and so covers that latency by itself.
  template <typename F>
  KDK_DEVICE void visit_anew(F f) const {
    visit_in_flight<1>(f);
  }

 private:
  template <int kInFlight, typename F>
  KDK_DEVICE void visit_in_flight(F f) const {
#pragma unroll 1
    for (int first = team.rank(); first < layout.count; first += kInFlight * team.size()) {
      Packet<T, V> input[kInFlight], target[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        input[k] = layout.load(input_row, first + k * team.size());
        target[k] = kPair ? layout.load(target_row, first + k * team.size()) : input[k];
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

// The row's maxima and this thread's share of its sums: q of the inputs, p of the targets, each at
// the first so many of its factors. One visit of a row in memory; in registers one more finds the
// maxima first.
template <typename Row, typename F, int K, int L>
KDK_DEVICE void visit_sums(const Row& row, OnlineSoftmax<K>& q, const F (&q_factors)[K],
                           int q_active, OnlineSoftmax<L>& p, const F (&p_factors)[L]) {
  if constexpr (Row::kInRegisters) {
    row.visit([&](int, const auto& s, const auto& t) {
      q.look(s);
      if constexpr (Row::kPair) p.look(t);
    });
  } else {
    row.visit([&](int, const auto& s, const auto& t) {
      q.look(s);
      q.add(s, q_factors, q_active);
      if constexpr (Row::kPair) {
        p.look(t);
        p.add(t, p_factors, L);
      }
    });
  }
  float max[Row::kPair ? 2 : 1] = {q.max};
  if constexpr (Row::kPair) max[1] = p.max;
  row.team.reduce(max, -INFINITY, Maximum());
  q.max = max[0];
  if constexpr (Row::kPair) p.max = max[1];
  if constexpr (Row::kInRegisters) {
    q.start_at_max();
    p.start_at_max();
    row.visit([&](int, const auto& s, const auto& t) {
      q.add(s, q_factors, q_active);
      if constexpr (Row::kPair) p.add(t, p_factors, L);
    });
  }
}

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
KDK_DEVICE T* row_of(void* base, int64_t row, int64_t stride) {
  return base != nullptr ? static_cast<T*>(base) + row * stride : nullptr;
}

KDK_DEVICE void write(void* per_row, int64_t row, float value) {
  if (per_row != nullptr) static_cast<float*>(per_row)[row] = value;
}

template <typename T, int V, typename Row, typename Team>
KDK_DEVICE void fill_row(const PacketLayout<T, V>& layout, const Row& row, float value, Team team) {
  if (row == nullptr) return;
  float values[V];
#pragma unroll
  for (int i = 0; i < V; ++i) values[i] = value;
  for (int k = team.rank(); k < layout.count; k += team.size()) layout.store(row, k, values);
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

// Where a tensor's rows start with respect to packet boundaries, in bytes of T: the first, and each
// next one's step.
struct Phase {
  uint64_t first;
  uint64_t step;

  // `size` is that of the tensor's own elements: a packet has as many of them as of T.
  template <typename T>
  static Phase of(const void* tensor, int64_t stride, int64_t rows, size_t size = sizeof(T)) {
    constexpr uint64_t kLanes = kPacketBytes / sizeof(T);
    return {reinterpret_cast<uintptr_t>(tensor) / size % kLanes * sizeof(T),
            rows > 1 ? static_cast<uint64_t>(stride) % kLanes * sizeof(T) : 0};
  }

  // The most elements that may lie between a boundary and the start of a row.
  template <typename T>
  int max_lead() const {
    return first == 0 && step == 0 ? 0 : kPacketBytes / sizeof(T) - 1;
  }

  bool operator==(const Phase& other) const { return first == other.first && step == other.step; }
};

// Launches `kernel` with a team for each row, as far as the grid goes. `shared_bytes` are on top of
// the team's own.
template <typename Row, typename Params>
cudaError_t launch_rows(void (*kernel)(Params), const Params& params, int threads, void* stream,
                        size_t shared_bytes = 0) {
  const int teams = Row::Team::per_block(threads);
  const int64_t blocks = std::min((params.rows + teams - 1) / teams, kMaxBlocks);
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), threads,
                Row::Team::kSharedBytes + shared_bytes, stream, params);
}

}  // namespace kdkernels::cuda
