// Sinkhorn iterations of many small problems on CUDA devices; ../kdkernels.h has the formulas,
// kdkernels/ops/sinkhorn.py the iteration, ../cpu/sinkhorn.cpp the scaling form.
//
// One launch for all problems and iterations: a block has one problem (debiased: one of its three
// transports) with its costs C in shared memory from the first iteration to the gradients. Where
// they fit too, the kernel values K = e^((F + G - C) / eps) lie beside them and are made anew only
// when F and G, the absorbed potentials, or eps change; else each look at one takes an exponential.
// A warp sums a row; the columns' sums are a thread's. Global memory: the points and what is asked
// for, once. A second, small launch adds what the three transports have to say to one result.
#include <algorithm>
#include <cstddef>

#include "reduce.cuh"

namespace kdkernels::cuda {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kChunk = 8;    // of a sum, staged in shared memory at a time
constexpr int kRows = 4;     // of a region, for each warp
constexpr int kColumns = 4;  // of a region, for each lane
constexpr int kRegion = kColumns * kWarp;
constexpr int kAveraged = 16;  // as kdkernels/ops/sinkhorn.py
constexpr int kCheck = 4;
constexpr int kVectors = 9;
constexpr float kLeastSum = 1e-30f;
constexpr int64_t kSharedReserve = BlockTeam::kSharedBytes;
constexpr int64_t kStaging = kChunk * (kMaxThreads / kWarp * kRows + 1 + kRegion) * sizeof(float);

// What the transports of x with x and of y with y leave for the second launch.
struct Parts {
  double* value;  // (3, problems)
  float* grad_x;
  float* grad_y;
  float* grad_a;
  float* grad_b;
};

// A transport's sides and outputs.
struct Side {
  const float* points;
  const float* weights;
  float* potential;
  float* grad;
  float* grad_weights;
  int count;
};

struct Shared {
  float* staging;
  float *F, *G, *u, *v, *a, *b, *w, *sums, *more;
  float* C;
  float* K;
  int ld;
};

KDK_DEVICE int least_of(int a, int b) { return a < b ? a : b; }
KDK_DEVICE int most_of(int a, int b) { return a > b ? a : b; }

KDK_DEVICE float log_of(float x) { return logf(x); }

// e^x for |x| within what float32 holds.
KDK_DEVICE float exp_of(float x) {
  const float y = fminf(fmaxf(x * static_cast<float>(kLog2E), -120.0f), 80.0f);
  return exp2f(y);
}

struct Step {
  bool average;
  bool unbalanced;
  float damping;  // lambda
  float pull;     // 1 / (rho + eps)
};

KDK_DEVICE float stepped(float u, float s, float F, const Step& step) {
  const float sum = fmaxf(s, kLeastSum);
  if (!step.unbalanced) return step.average ? sqrtf(u / sum) : 1.0f / sum;
  const float log_u = -step.damping * log_of(sum) - F * step.pull;
  return exp_of(step.average ? 0.5f * (log_u + log_of(u)) : log_u);
}

KDK_DEVICE double phi(double potential, double rho) {
  return rho == INFINITY ? potential : -rho * expm1(-potential / rho);
}

// acc[r][c] of a region = sum over `depth` of A(row, k) B(k, column), or of their squared
// difference; the block's rows are kRows for each warp, from `row` on, and its columns kRegion.
template <bool kSquares, bool kColumnsFirst, typename A, typename B>
KDK_DEVICE void region(int depth, const A& a, const B& b, float* staging,
                       float (&acc)[kRows][kColumns]) {
  const int rows = static_cast<int>(blockDim.x) / kWarp * kRows, pitch = rows + 1;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float* left = staging;
  float* right = staging + kChunk * pitch;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) acc[r][c] = 0;
  }
  for (int begin = 0; begin < depth; begin += kChunk) {
    __syncthreads();
    for (int i = threadIdx.x; i < kChunk * rows; i += blockDim.x) {
      const int k = i % kChunk, row = i / kChunk;
      left[k * pitch + row] = begin + k < depth ? a(row, begin + k) : 0.0f;
    }
    for (int i = threadIdx.x; i < kChunk * kRegion; i += blockDim.x) {
      const int k = kColumnsFirst ? i / kRegion : i % kChunk;
      const int column = kColumnsFirst ? i % kRegion : i / kChunk;
      right[k * kRegion + column] = begin + k < depth ? b(begin + k, column) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      float x[kRows], y[kColumns];
#pragma unroll
      for (int r = 0; r < kRows; ++r) x[r] = left[k * pitch + warp * kRows + r];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) y[c] = right[k * kRegion + c * kWarp + lane];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (kSquares) {
            const float difference = x[r] - y[c];
            acc[r][c] = fmaf(difference, difference, acc[r][c]);
          } else {
            acc[r][c] = fmaf(x[r], y[c], acc[r][c]);
          }
        }
      }
    }
  }
}

// Costs of all pairs into shared memory; the largest |cost|, infinity where one is not finite.
template <bool kSquares>
KDK_DEVICE float find_costs(const SinkhornParams& params, const Side& x, const Side& y,
                            const float* extra, const Shared& shared) {
  const int d = static_cast<int>(params.d);
  const int rows = static_cast<int>(blockDim.x) / kWarp * kRows;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float largest = 0;
  for (int row = 0; row < x.count; row += rows) {
    for (int column = 0; column < y.count; column += kRegion) {
      float acc[kRows][kColumns];
      region<kSquares, false>(
          d,
          [&](int i, int k) {
            return row + i < x.count ? x.points[int64_t{row + i} * d + k] : 0.0f;
          },
          [&](int k, int j) {
            return column + j < y.count ? y.points[int64_t{column + j} * d + k] : 0.0f;
          },
          shared.staging, acc);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int i = row + warp * kRows + r, j = column + c * kWarp + lane;
          if (i >= x.count || j >= y.count) continue;
          float cost = acc[r][c];
          if (params.cost == Cost::kEuclidean) cost = sqrtf(cost);
          if (params.cost == Cost::kCosine) cost = 1.0f - cost;
          if (extra != nullptr) cost += extra[int64_t{i} * y.count + j];
          shared.C[i * shared.ld + j] = cost;
          largest = fabsf(cost) < INFINITY ? fmaxf(largest, fabsf(cost)) : INFINITY;
        }
      }
    }
  }
  return largest;
}

template <bool kKept>
KDK_DEVICE float kernel_value(const Shared& shared, int i, int j, float factor) {
  if (kKept) return shared.K[i * shared.ld + j];
  const float x = (shared.F[i] + shared.G[j] - shared.C[i * shared.ld + j]) * factor;
  return exp2_approximate(fminf(x, 80.0f));
}

// sums[i] = sum_j K_ij w_j, by a warp for kRows rows.
template <bool kKept>
KDK_DEVICE void row_sums(const Shared& shared, int rows, int columns, float factor) {
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int first = warp * kRows; first < rows; first += warps * kRows) {
    float s[kRows] = {};
    for (int j = lane; j < columns; j += kWarp) {
      const float w = shared.w[j];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int i = least_of(first + r, rows - 1);
        s[r] = fmaf(kernel_value<kKept>(shared, i, j, factor), w, s[r]);
      }
    }
    reduce_warp(s, [](float a, float b) { return a + b; });
    if (lane == 0) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (first + r < rows) shared.sums[first + r] = s[r];
      }
    }
  }
}

// more[j] = sum_i K_ij w_i, where w belongs to the rows: runs of rows for each column, added in
// order.
template <bool kKept>
KDK_DEVICE void column_sums(const Shared& shared, int rows, int columns, float factor) {
  const int wide = (columns + kWarp - 1) / kWarp * kWarp;
  const int runs = most_of(1, static_cast<int>(blockDim.x) / wide);
  for (int task = threadIdx.x; task < runs * wide; task += blockDim.x) {
    const int j = task % wide, run = task / wide;
    if (j >= columns) continue;
    float s = 0;
    for (int i = rows * run / runs; i < rows * (run + 1) / runs; ++i) {
      s = fmaf(kernel_value<kKept>(shared, i, j, factor), shared.w[i], s);
    }
    (runs > 1 ? shared.staging[run * columns + j] : shared.more[j]) = s;
  }
  if (runs == 1) return;
  __syncthreads();
  for (int j = threadIdx.x; j < columns; j += blockDim.x) {
    float s = 0;
    for (int run = 0; run < runs; ++run) s += shared.staging[run * columns + j];
    shared.more[j] = s;
  }
}

KDK_DEVICE void scaled_weights(const float* weights, const float* scale, int count, float* w) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) w[i] = weights[i] * scale[i];
}

// The gradients of one side and its weights, out of K and the scalings; `transposed`: K's columns
// are this side's rows.
template <bool kKept>
KDK_DEVICE void side_gradients(const SinkhornParams& params, const Side& x, const Side& y,
                               const float* extra, const Shared& shared, float factor,
                               bool transposed, float sign, double mass) {
  const int d = static_cast<int>(params.d);
  const int rows = static_cast<int>(blockDim.x) / kWarp * kRows;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const float* u = transposed ? shared.v : shared.u;
  const float* weights = transposed ? shared.b : shared.a;
  // e^((f_i + g_j - C_ij) / eps) b_j, and of it what dC_ij leaves beside x_i - y_j.
  const auto term = [&](int i, int j) {
    return u[i] * shared.w[j] *
           kernel_value<kKept>(shared, transposed ? j : i, transposed ? i : j, factor);
  };
  const auto share = [&](int i, int j) {
    const float t = term(i, j);
    if (params.cost != Cost::kEuclidean) return t;
    const int row = transposed ? j : i, column = transposed ? i : j;
    float distance = shared.C[row * shared.ld + column];
    if (extra != nullptr) {
      distance -= extra[int64_t{row} * (transposed ? x.count : y.count) + column];
    }
    return distance > 0 ? t / distance : 0.0f;
  };
  // w belongs to the other side.
  __syncthreads();
  scaled_weights(transposed ? shared.a : shared.b, transposed ? shared.u : shared.v, y.count,
                 shared.w);
  __syncthreads();
  const int warps = blockDim.x / kWarp;
  for (int i = warp; i < x.count; i += warps) {
    float s[2] = {0, 0};
    for (int j = lane; j < y.count; j += kWarp) {
      s[0] += term(i, j);
      if (params.cost == Cost::kEuclidean) s[1] += share(i, j);
    }
    reduce_warp(s, [](float a, float b) { return a + b; });
    if (lane == 0) {
      if (x.grad_weights != nullptr) {
        x.grad_weights[i] = sign * static_cast<float>(phi(shared.more[i], params.rho) -
                                                      params.epsilon * (s[0] - mass));
      }
      shared.sums[i] = params.cost == Cost::kEuclidean ? s[1]
                       : params.cost == Cost::kCosine  ? 0.0f
                                                       : s[0];
    }
  }
  if (x.grad == nullptr) return;
  const float scale = sign * (params.cost == Cost::kSquaredEuclidean ? 2.0f : 1.0f);
  for (int row = 0; row < x.count; row += rows) {
    for (int column = 0; column < d; column += kRegion) {
      float acc[kRows][kColumns];
      region<false, true>(
          y.count, [&](int i, int j) { return row + i < x.count ? share(row + i, j) : 0.0f; },
          [&](int j, int k) {
            return column + k < d ? y.points[int64_t{j} * d + column + k] : 0.0f;
          },
          shared.staging, acc);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int i = row + warp * kRows + r, k = column + c * kWarp + lane;
          if (i >= x.count || k >= d) continue;
          const float value = shared.sums[i] * x.points[int64_t{i} * d + k] - acc[r][c];
          x.grad[int64_t{i} * d + k] = scale * weights[i] * value;
        }
      }
    }
  }
}

KDK_DEVICE float* at(float* base, int64_t index, int64_t size) {
  return base == nullptr ? nullptr : base + index * size;
}

KDK_DEVICE float* at(void* base, int64_t index, int64_t size) {
  return at(static_cast<float*>(base), index, size);
}

KDK_DEVICE const float* at(const void* base, int64_t index, int64_t size) {
  return base == nullptr ? nullptr : static_cast<const float*>(base) + index * size;
}

KDK_DEVICE void fill(float* out, int64_t count, float value) {
  if (out == nullptr) return;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) out[i] = value;
}

KDK_DEVICE void fill_gradients(const Side& side, int64_t d, float value) {
  fill(side.grad, side.count * d, value);
  fill(side.grad_weights, side.count, value);
}

KDK_DEVICE bool differ(const float* x, const float* y, int64_t count) {
  bool found = false;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) found |= !(x[i] == y[i]);
  return found;
}

template <bool kKept>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sinkhorn_kernel(SinkhornParams params, Parts parts, int size) {
  const int64_t p = blockIdx.x % params.problems;
  const int kind = static_cast<int>(blockIdx.x / params.problems);  // x with y, x with x, y with y
  const BlockTeam team;
  const int n = static_cast<int>(params.n), m = static_cast<int>(params.m);
  const int64_t d = params.d;

  Side x = {at(params.x, p, n * d), at(params.a, p, n), nullptr, nullptr, nullptr, n};
  Side y = {at(params.y, p, m * d), at(params.b, p, m), nullptr, nullptr, nullptr, m};
  if (kind == 0) {
    x.potential = at(params.f, p, n), y.potential = at(params.g, p, m);
    x.grad = at(params.grad_x, p, n * d), y.grad = at(params.grad_y, p, m * d);
    x.grad_weights = at(params.grad_a, p, n), y.grad_weights = at(params.grad_b, p, m);
  } else if (kind == 1) {
    x.potential = at(params.f_self, p, n);
    x.grad = at(parts.grad_x, p, n * d), x.grad_weights = at(parts.grad_a, p, n);
  } else {
    y.potential = at(params.g_self, p, m);
    y.grad = at(parts.grad_y, p, m * d), y.grad_weights = at(parts.grad_b, p, m);
  }
  const float* extra = kind == 0   ? at(params.extra, p, int64_t{n} * m)
                       : kind == 1 ? at(params.extra_x, p, int64_t{n} * n)
                                   : at(params.extra_y, p, int64_t{m} * m);
  float* plan = kind == 0   ? at(params.plan, p, int64_t{n} * m)
                : kind == 1 ? at(params.plan_x, p, int64_t{n} * n)
                            : at(params.plan_y, p, int64_t{m} * m);

  // The same problem thrice cancels to the last bit: none of the three says anything.
  bool same = false;
  if (params.debias && n == m) {
    float differences[1] = {0};
    if (differ(x.points, y.points, n * d) || differ(x.weights, y.weights, n)) differences[0] = 1;
    if (params.extra != nullptr) {
      const int64_t pairs = int64_t{n} * n;
      const float* of_both = at(params.extra, p, pairs);
      if (differ(of_both, at(params.extra_x, p, pairs), pairs) ||
          differ(of_both, at(params.extra_y, p, pairs), pairs)) {
        differences[0] = 1;
      }
    }
    team.reduce(differences, 0.0f, Maximum());
    same = differences[0] == 0;
    __syncthreads();
  }
  const bool symmetric = kind != 0 || same;
  const Side left = kind == 2 ? y : x, right = kind == 1 ? x : y;

  Shared shared;
  float* free = reinterpret_cast<float*>(shared_memory<unsigned char>() + kSharedReserve);
  shared.staging = free;
  free += kStaging / sizeof(float);
  float** vectors[kVectors] = {&shared.F, &shared.G, &shared.u,    &shared.v,   &shared.a,
                               &shared.b, &shared.w, &shared.sums, &shared.more};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    *vectors[i] = free;
    free += size;
  }
  shared.ld = right.count | 1;
  shared.C = free;
  shared.K = free + left.count * shared.ld;

  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    shared.F[i] = 0, shared.G[i] = 0, shared.u[i] = 1, shared.v[i] = 1;
    shared.a[i] = i < left.count ? left.weights[i] : 0.0f;
    shared.b[i] = i < right.count ? right.weights[i] : 0.0f;
  }
  float most[1];
  most[0] = params.cost == Cost::kCosine ? find_costs<false>(params, left, right, extra, shared)
                                         : find_costs<true>(params, left, right, extra, shared);
  __syncthreads();
  team.reduce(most, 0.0f, Maximum());
  __syncthreads();

  if (most[0] == INFINITY) {
    fill(left.potential, left.count, NAN);
    if (kind == 0) fill(right.potential, right.count, NAN);
    fill_gradients(left, d, NAN);
    if (kind == 0) fill_gradients(right, d, NAN);
    fill(plan, int64_t{left.count} * right.count, NAN);
    if (threadIdx.x == 0) {
      if (params.debias) {
        parts.value[kind * params.problems + p] = NAN;
      } else {
        static_cast<float*>(params.loss)[p] = NAN;
      }
    }
    return;
  }
  double masses[2] = {0, 0};
  for (int i = threadIdx.x; i < left.count; i += blockDim.x) masses[0] += shared.a[i];
  for (int j = threadIdx.x; j < right.count; j += blockDim.x) masses[1] += shared.b[j];
  team.reduce(masses, 0.0, Sum());
  __syncthreads();
  // Where a side has no mass, nothing moves.
  const int iterations = masses[0] == 0 || masses[1] == 0 ? 0 : params.iterations;

  const double largest = most[0];
  const int steps = params.iterations / 2;
  double ratio = 0.5;
  if (!(largest * ldexp(1.0, -steps) <= params.epsilon)) {
    ratio = exp2(log2(params.epsilon / largest) / most_of(steps, 1));
  }
  double scale = steps > 0 ? largest : 0, last = 0;
  int levels = 0;
  bool stale = true;
  float factor = static_cast<float>(kLog2E / params.epsilon);
  float* const v = symmetric ? shared.u : shared.v;

  // The scalings become part of F and G.
  const auto absorb = [&](float epsilon) {
    __syncthreads();
    for (int i = threadIdx.x; i < left.count; i += blockDim.x) {
      shared.F[i] += epsilon * log_of(shared.u[i]);
      shared.u[i] = 1;
    }
    for (int j = threadIdx.x; j < right.count; j += blockDim.x) {
      if (symmetric) {
        // The same thread has just written F_j: the sides are equally long.
        shared.G[j] = shared.F[j];
      } else {
        shared.G[j] += epsilon * log_of(shared.v[j]);
        shared.v[j] = 1;
      }
    }
    __syncthreads();
  };
  const auto make_kernel = [&] {
    if constexpr (kKept) {
      for (int e = threadIdx.x; e < left.count * right.count; e += blockDim.x) {
        const int i = e / right.count, j = e % right.count;
        shared.K[i * shared.ld + j] = kernel_value<false>(shared, i, j, factor);
      }
      __syncthreads();
    }
  };

  for (int k = 0; k < iterations; ++k) {
    double epsilon = scale;
    scale *= ratio;
    if (epsilon > params.epsilon * (1 + 1e-6)) {
      levels = k + 1;
    } else {
      epsilon = params.epsilon;
    }
    if (epsilon != last) {
      if (last != 0) absorb(static_cast<float>(last));
      last = epsilon;
      stale = true;
    }
    factor = static_cast<float>(kLog2E / epsilon);
    if (stale) make_kernel();
    stale = false;

    const bool alternating = !symmetric && k >= levels + kAveraged;
    const bool unbalanced = params.rho != INFINITY;
    const Step step = {!alternating, unbalanced,
                       static_cast<float>(unbalanced ? params.rho / (params.rho + epsilon) : 1),
                       static_cast<float>(unbalanced ? 1 / (params.rho + epsilon) : 0)};
    const bool look = params.tol >= 0 && (k + 1) % kCheck == 0 && k >= levels;
    float change[1] = {0};
    float outside = 0;
    const auto update = [&](float& u, float s, float F) {
      const float next = stepped(u, s, F, step);
      if (look) change[0] = fmaxf(change[0], fabsf(log_of(next / u)));
      if (!(next > 1e-8f && next < 1e8f)) outside = 1;
      u = next;
    };

    scaled_weights(shared.b, v, right.count, shared.w);
    __syncthreads();
    row_sums<kKept>(shared, left.count, right.count, factor);
    __syncthreads();
    if (!symmetric) {
      if (alternating) {
        for (int i = threadIdx.x; i < left.count; i += blockDim.x) {
          update(shared.u[i], shared.sums[i], shared.F[i]);
          shared.w[i] = shared.a[i] * shared.u[i];
        }
      } else {
        scaled_weights(shared.a, shared.u, left.count, shared.w);
      }
      __syncthreads();
      column_sums<kKept>(shared, left.count, right.count, factor);
      __syncthreads();
      for (int j = threadIdx.x; j < right.count; j += blockDim.x) {
        update(shared.v[j], shared.more[j], shared.G[j]);
      }
    }
    if (!alternating) {
      for (int i = threadIdx.x; i < left.count; i += blockDim.x) {
        update(shared.u[i], shared.sums[i], shared.F[i]);
      }
    }
    float flags[2] = {outside, change[0]};
    team.reduce(flags, 0.0f, Maximum());
    __syncthreads();
    if (flags[0] != 0) {
      absorb(static_cast<float>(epsilon));
      stale = true;
    }
    if (look && flags[1] * epsilon <= params.tol) break;
  }
  if (stale) make_kernel();

  // f and g: absorbed and scaling, in double; the pair with sum a f = sum b g.
  const double epsilon = params.epsilon;
  double sums[2] = {0, 0};
  for (int i = threadIdx.x; i < left.count; i += blockDim.x) {
    sums[0] += shared.a[i] * (shared.F[i] + epsilon * log_of(shared.u[i]));
  }
  for (int j = threadIdx.x; j < right.count; j += blockDim.x) {
    if (symmetric) shared.v[j] = shared.u[j], shared.G[j] = shared.F[j];
    sums[1] += shared.b[j] * (shared.G[j] + epsilon * log_of(shared.v[j]));
  }
  team.reduce(sums, 0.0, Sum());
  __syncthreads();
  const double shift = params.rho == INFINITY ? (sums[1] - sums[0]) / 2 : 0;
  scaled_weights(shared.b, shared.v, right.count, shared.w);
  __syncthreads();
  row_sums<kKept>(shared, left.count, right.count, factor);
  __syncthreads();
  // sum a phi(f), sum b phi(g), the plan's mass
  double totals[3] = {0, 0, 0};
  for (int i = threadIdx.x; i < left.count; i += blockDim.x) {
    const double f = shared.F[i] + epsilon * log_of(shared.u[i]) + shift;
    totals[0] += shared.a[i] * phi(f, params.rho);
    totals[2] += static_cast<double>(shared.a[i]) * shared.u[i] * shared.sums[i];
    if (left.potential != nullptr) left.potential[i] = static_cast<float>(f);
  }
  for (int j = threadIdx.x; j < right.count; j += blockDim.x) {
    const double g = shared.G[j] + epsilon * log_of(shared.v[j]) - shift;
    totals[1] += shared.b[j] * phi(g, params.rho);
    if (kind == 0) right.potential[j] = static_cast<float>(g);
  }
  team.reduce(totals, 0.0, Sum());
  __syncthreads();
  const double value =
      same ? 0 : totals[0] + totals[1] - epsilon * (totals[2] - masses[0] * masses[1]);
  if (threadIdx.x == 0) {
    if (params.debias) {
      parts.value[kind * params.problems + p] = kind == 0 ? value : -0.5 * value;
    } else {
      static_cast<float*>(params.loss)[p] = static_cast<float>(value);
    }
  }
  if (plan != nullptr) {
    for (int e = threadIdx.x; e < left.count * right.count; e += blockDim.x) {
      const int i = e / right.count, j = e % right.count;
      plan[e] = shared.a[i] * shared.u[i] * kernel_value<kKept>(shared, i, j, factor) * shared.w[j];
    }
  }
  if (same) {
    fill_gradients(left, d, 0);
    if (kind == 0) fill_gradients(right, d, 0);
    return;
  }
  const float sign = kind == 0 ? 1.0f : -1.0f;
  if (left.grad != nullptr || left.grad_weights != nullptr) {
    __syncthreads();
    for (int i = threadIdx.x; i < left.count; i += blockDim.x) {
      shared.more[i] = static_cast<float>(shared.F[i] + epsilon * log_of(shared.u[i]) + shift);
    }
    side_gradients<kKept>(params, left, right, extra, shared, factor, false, sign, masses[1]);
  }
  if (kind == 0 && (right.grad != nullptr || right.grad_weights != nullptr)) {
    __syncthreads();
    for (int j = threadIdx.x; j < right.count; j += blockDim.x) {
      shared.more[j] = static_cast<float>(shared.G[j] + epsilon * log_of(shared.v[j]) - shift);
    }
    side_gradients<kKept>(params, right, left, extra, shared, factor, true, 1.0f, masses[0]);
  }
}

// grad += part for each of the four, and the three values' sum.
__global__ void __launch_bounds__(256) sinkhorn_parts_kernel(SinkhornParams params, Parts parts) {
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  const auto add = [&](void* grad, const float* part, int64_t count) {
    if (grad == nullptr) return;
    for (int64_t i = first; i < count; i += step) static_cast<float*>(grad)[i] += part[i];
  };
  add(params.grad_x, parts.grad_x, params.problems * params.n * params.d);
  add(params.grad_y, parts.grad_y, params.problems * params.m * params.d);
  add(params.grad_a, parts.grad_a, params.problems * params.n);
  add(params.grad_b, parts.grad_b, params.problems * params.m);
  for (int64_t p = first; p < params.problems; p += step) {
    const double self = parts.value[params.problems + p] + parts.value[2 * params.problems + p];
    static_cast<float*>(params.loss)[p] = static_cast<float>(parts.value[p] + self);
  }
}

int64_t matrix_bytes(int64_t rows, int64_t columns) { return rows * (columns | 1) * sizeof(float); }

int64_t most_shared_bytes() {
#if defined(__CUDACC__)
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
#else
  return 232448;
#endif
}

template <bool kKept>
cudaError_t launch_problems(const SinkhornParams& params, const Parts& parts, int size, int threads,
                            int64_t bytes, void* stream) {
#if defined(__CUDACC__)
  const cudaError_t error = cudaFuncSetAttribute(
      sinkhorn_kernel<kKept>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
#endif
  const int64_t blocks = params.problems * (params.debias ? 3 : 1);
  return launch(sinkhorn_kernel<kKept>, dim3(static_cast<unsigned>(blocks)), threads,
                static_cast<size_t>(bytes), stream, params, parts, size);
}

}  // namespace

int sinkhorn(const SinkhornParams& params, void* stream) {
  if (params.dtype != DType::kFloat32 || params.problems > (int64_t{1} << 28)) {
    return cudaErrorInvalidValue;
  }
  if (params.problems == 0) return cudaSuccess;
  const int64_t n = params.n, m = params.m;
  int64_t matrix = matrix_bytes(n, m);
  if (params.debias) matrix = std::max({matrix, matrix_bytes(n, n), matrix_bytes(m, m)});
  const int64_t size = std::max(n, m);
  const int64_t others = kSharedReserve + kStaging + kVectors * size * int64_t{sizeof(float)};
  const int64_t most = most_shared_bytes();
  if (others + matrix > most) return cudaErrorInvalidValue;
  const bool kept = others + 2 * matrix <= most;

  Parts parts = {};
  if (params.debias) {
    if (params.scratch == nullptr) return cudaErrorInvalidValue;
    parts.value = static_cast<double*>(params.scratch);
    float* free = reinterpret_cast<float*>(parts.value + 3 * params.problems);
    const auto take = [&](const void* wanted, int64_t count) {
      float* const part = free;
      if (wanted == nullptr) return static_cast<float*>(nullptr);
      free += count;
      return part;
    };
    parts.grad_x = take(params.grad_x, params.problems * n * params.d);
    parts.grad_y = take(params.grad_y, params.problems * m * params.d);
    parts.grad_a = take(params.grad_a, params.problems * n);
    parts.grad_b = take(params.grad_b, params.problems * m);
  }
  // A thread for each 16 pairs, so that many small problems share a multiprocessor.
  const int64_t wanted = size * size / 16 / kWarp * kWarp;
  const int threads = static_cast<int>(std::clamp<int64_t>(wanted, 64, kMaxThreads));
  const auto run = kept ? launch_problems<true> : launch_problems<false>;
  const cudaError_t error =
      run(params, parts, static_cast<int>(size), threads, others + (kept ? 2 : 1) * matrix, stream);
  if (error != cudaSuccess || !params.debias) return error;
  const int64_t most_elements = params.problems * size * params.d;
  const int64_t blocks = std::clamp<int64_t>((most_elements + 255) / 256, 1, 4096);
  return launch(sinkhorn_parts_kernel, dim3(static_cast<unsigned>(blocks)), 256, 0, stream, params,
                parts);
}

}  // namespace kdkernels::cuda
