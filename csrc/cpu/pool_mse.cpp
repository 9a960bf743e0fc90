// Pooling of two maps and their squared distance on the CPU; formulas in ../kdkernels.h.
//
// A sample is one line of memory, cut into blocks that stay in L1: whatever else a block is summed
// for, memory is read once. With the positions side by side a block is whole channels, so that a
// short row costs no conversion and no distance of its own, only its sum; with the channels side by
// side it is a few positions, added to one sum a channel.
//
// Threads take contiguous runs of samples, and each is summed in one fixed order, so that results
// do not depend on their number.
#include <vector>

#include "../kdkernels.h"
#include "parallel.h"
#include "simd.h"

namespace kdkernels::cpu {
namespace {

// Elements of each map in a block. Sums in float32 go over no more; beyond, they are doubles.
constexpr int64_t kBlock = 1024;
// Rows that are summed together, and the lanes of their sums.
constexpr int64_t kLanes = 8;
// Channels side by side: positions that are added at once, and before their sum goes to a double.
constexpr int64_t kPositions = 4;
constexpr int64_t kRun = 64;

template <typename S>
KDK_INLINE S sum(const S* x, int64_t n) {
  S total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) total += x[j];
  return total;
}

template <typename S>
KDK_INLINE S sum_of_squares(const S* s, const S* t, int64_t n) {
  S total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) {
    const S difference = s[j] - t[j];
    total += difference * difference;
  }
  return total;
}

// sums[r] = the sum of row r.
template <typename S>
KDK_INLINE void sum_rows(const S* x, int64_t rows, int64_t length, S* sums) {
  for (int64_t r = 0; r < rows; ++r) sums[r] = sum(x + r * length, length);
}

#if defined(__GNUC__)
// Eight rows at once: as many additions as one row takes for the sum of its own lanes give the sums
// of all. The compiler finds no such thing by itself: it sums the lanes of each row.
typedef float Lanes __attribute__((vector_size(sizeof(float) * kLanes)));
typedef int32_t LaneMask __attribute__((vector_size(sizeof(float) * kLanes)));

KDK_INLINE void sum_rows(const float* x, int64_t rows, int64_t length, float* sums) {
  const int64_t tail = length % kLanes, whole = length - tail;
  // The last elements of a row are read with the whole lanes that end, or in a shorter row begin,
  // with them.
  const int64_t last = length < kLanes ? 0 : length - kLanes;
  LaneMask in_tail;
  for (int64_t i = 0; i < kLanes; ++i) {
    in_tail[i] = (length < kLanes ? i < length : i >= kLanes - tail) ? -1 : 0;
  }
  float copy[kLanes * kLanes];
  int64_t r = 0;
  for (; r + kLanes <= rows; r += kLanes) {
    const float* group = x + r * length;
    if (length < kLanes &&
        r + kLanes == rows) {  // there may be nothing to read beyond the last row
      std::memcpy(copy, group, sizeof(float) * kLanes * length);
      group = copy;
    }
    Lanes v[kLanes];
    for (int64_t k = 0; k < kLanes; ++k) {
      const float* row = group + k * length;
      Lanes total = {}, x;
      for (int64_t j = 0; j < whole; j += kLanes) {
        std::memcpy(&x, row + j, sizeof(x));
        total += x;
      }
      if (tail != 0) {
        std::memcpy(&x, row + last, sizeof(x));
        total += (Lanes)((LaneMask)x & in_tail);
      }
      v[k] = total;
    }
    for (int k = 0; k < 4; ++k) {
      v[k] = __builtin_shufflevector(v[k], v[k + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
             __builtin_shufflevector(v[k], v[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int k = 0; k < 2; ++k) {
      v[k] = __builtin_shufflevector(v[k], v[k + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
             __builtin_shufflevector(v[k], v[k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    v[0] = __builtin_shufflevector(v[0], v[1], 0, 8, 2, 10, 4, 12, 6, 14) +
           __builtin_shufflevector(v[0], v[1], 1, 9, 3, 11, 5, 13, 7, 15);
    std::memcpy(sums + r, &v[0], sizeof(v[0]));
  }
  for (; r < rows; ++r) sums[r] = sum(x + r * length, length);
}
#endif

// Adds a position of each map to the channels' sums; returns its sum of squares.
template <typename S>
KDK_INLINE S add_position(const S* s, const S* t, int64_t n, S* s_sums, S* t_sums) {
  S total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) {
    const S difference = s[j] - t[j];
    s_sums[j] += s[j];
    t_sums[j] += t[j];
    total += difference * difference;
  }
  return total;
}

// The same of kPositions, `stride` apart.
template <typename S>
KDK_INLINE S add_positions(const S* s, const S* t, int64_t stride, int64_t n, S* s_sums,
                           S* t_sums) {
  const S *s1 = s + stride, *s2 = s1 + stride, *s3 = s2 + stride;
  const S *t1 = t + stride, *t2 = t1 + stride, *t3 = t2 + stride;
  S total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) {
    const S a = s[j] - t[j], b = s1[j] - t1[j], c = s2[j] - t2[j], d = s3[j] - t3[j];
    s_sums[j] += (s[j] + s1[j]) + (s2[j] + s3[j]);
    t_sums[j] += (t[j] + t1[j]) + (t2[j] + t3[j]);
    total += (a * a + b * b) + (c * c + d * d);
  }
  return total;
}

template <typename T>
KDK_INLINE void store(double value, T* out) {
  if constexpr (std::is_floating_point<T>::value) {
    *out = static_cast<T>(value);
  } else {
    narrow(static_cast<float>(value), *out);
  }
}

// out = x factor, in the element type.
template <typename T, typename X>
KDK_INLINE void store_scaled(const X* x, int64_t n, X factor, T* out) {
  using S = typename Statistics<T>::Type;
  S buffer[kBlock];
  S* scaled = block_of(out, buffer);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) scaled[j] = static_cast<S>(x[j] * factor);
  narrow_block(scaled, n, out);
}

// Both maps of one sample.
template <typename T>
struct Sample {
  const T* student;
  const T* teacher;
  int64_t channels;
  int64_t positions;
};

// The pooled features, and the sum of squares; positions side by side.
template <typename T>
KDK_INLINE double pool_positions(const Sample<T>& x, T* pooled_student, T* pooled_teacher) {
  using S = typename Statistics<T>::Type;
  const double inverse = 1 / static_cast<double>(x.positions);
  S s_buffer[kBlock], t_buffer[kBlock], sums[kBlock];
  double squares = 0;
  if (x.positions > kBlock) {
    for (int64_t c = 0; c < x.channels; ++c) {
      double s_sum = 0, t_sum = 0;
      for (int64_t begin = 0; begin < x.positions; begin += kBlock) {
        const int64_t n = std::min(kBlock, x.positions - begin);
        const int64_t first = c * x.positions + begin;
        const S* s = widen_block(x.student + first, n, s_buffer);
        const S* t = widen_block(x.teacher + first, n, t_buffer);
        squares += sum_of_squares(s, t, n);
        s_sum += sum(s, n);
        t_sum += sum(t, n);
      }
      store(s_sum * inverse, pooled_student + c);
      store(t_sum * inverse, pooled_teacher + c);
    }
    return squares;
  }
  int64_t together = kBlock / x.positions;
  if (together > kLanes) together -= together % kLanes;
  for (int64_t c = 0; c < x.channels; c += together) {
    const int64_t rows = std::min(together, x.channels - c);
    const int64_t n = rows * x.positions, first = c * x.positions;
    const S* s = widen_block(x.student + first, n, s_buffer);
    const S* t = widen_block(x.teacher + first, n, t_buffer);
    squares += sum_of_squares(s, t, n);
    sum_rows(s, rows, x.positions, sums);
    store_scaled(sums, rows, static_cast<S>(inverse), pooled_student + c);
    sum_rows(t, rows, x.positions, sums);
    store_scaled(sums, rows, static_cast<S>(inverse), pooled_teacher + c);
  }
  return squares;
}

// What a thread keeps for each channel where they lie side by side: both maps' sums, or biases.
template <typename S>
struct Channels {
  std::vector<S> of[2];
  std::vector<double> totals[2];
};

// The same, channels side by side.
template <typename T, typename S>
KDK_INLINE double pool_channels(const Sample<T>& x, Channels<S>& channels, T* pooled_student,
                                T* pooled_teacher) {
  // Elements that have the statistics type are not copied.
  constexpr bool kCopied = !std::is_same<T, S>::value;
  constexpr int64_t kWidth = kBlock / kPositions;
  S buffers[2][kBlock];
  const T* maps[2] = {x.student, x.teacher};
  T* pooled[2] = {pooled_student, pooled_teacher};
  const bool one_run = x.positions <= kRun;
  double squares = 0;
  for (int64_t begin = 0; begin < x.positions; begin += kRun) {
    const int64_t end = std::min(x.positions, begin + kRun);
    for (auto& sums : channels.of) std::fill(sums.begin(), sums.end(), S(0));
    int64_t together = kPositions;
    for (int64_t p = begin; p < end; p += together) {
      if (p + together > end) together = 1;
      for (int64_t c = 0; c < x.channels; c += kWidth) {
        const int64_t n = std::min(kWidth, x.channels - c), first = p * x.channels + c;
        const S* wide[2];
        for (int k = 0; k < 2; ++k) {
          wide[k] = widen_block(maps[k] + first, n, buffers[k]);
          for (int64_t i = 1; kCopied && i < together; ++i) {
            widen_block(maps[k] + first + i * x.channels, n, buffers[k] + i * kWidth);
          }
        }
        S *s_sums = channels.of[0].data() + c, *t_sums = channels.of[1].data() + c;
        squares += together == 1 ? add_position(wide[0], wide[1], n, s_sums, t_sums)
                                 : add_positions(wide[0], wide[1], kCopied ? kWidth : x.channels, n,
                                                 s_sums, t_sums);
      }
    }
    for (int k = 0; k < 2 && !one_run; ++k) {
      for (int64_t c = 0; c < x.channels; ++c) {
        channels.totals[k][c] = (begin == 0 ? 0 : channels.totals[k][c]) + channels.of[k][c];
      }
    }
  }
  const double inverse = 1 / static_cast<double>(x.positions);
  for (int k = 0; k < 2; ++k) {
    for (int64_t c = 0; c < x.channels; c += kBlock) {
      const int64_t n = std::min(kBlock, x.channels - c);
      if (one_run) {
        store_scaled(channels.of[k].data() + c, n, static_cast<S>(inverse), pooled[k] + c);
      } else {
        store_scaled(channels.totals[k].data() + c, n, inverse, pooled[k] + c);
      }
    }
  }
  return squares;
}

// Vectors, which are their own mean.
template <typename T>
KDK_INLINE double pool_vectors(const Sample<T>& x, T* pooled_student, T* pooled_teacher) {
  using S = typename Statistics<T>::Type;
  S s_buffer[kBlock], t_buffer[kBlock];
  double squares = 0;
  for (int64_t c = 0; c < x.channels; c += kBlock) {
    const int64_t n = std::min(kBlock, x.channels - c);
    squares += sum_of_squares(widen_block(x.student + c, n, s_buffer),
                              widen_block(x.teacher + c, n, t_buffer), n);
    std::memcpy(pooled_student + c, x.student + c, sizeof(T) * n);
    std::memcpy(pooled_teacher + c, x.teacher + c, sizeof(T) * n);
  }
  return squares;
}

// One map's side of the gradients.
template <typename T>
struct Side {
  const T* grad_pooled;  // (channels,), or null
  T* gradient;           // or null
};

// grad_pooled / positions of n channels.
template <typename T, typename S>
KDK_INLINE void biases_of(const T* grad_pooled, int64_t n, S inverse, S* biases) {
  const S* wide = widen_block(grad_pooled, n, biases);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) biases[j] = wide[j] * inverse;
}

// biases[r length + j] = of_rows[r]. Writes up to 16 elements more.
template <typename S>
KDK_INLINE void spread(const S* of_rows, int64_t rows, int64_t length, S* biases) {
  for (int64_t r = 0; r < rows; ++r) {
    S* row = biases + r * length;
    for (int64_t j = 0; j < length; j += 16) {
      for (int64_t i = 0; i < 16; ++i) row[j + i] = of_rows[r];
    }
  }
}

// gradient = scale (a - b) + biases. A null a stands for a scale of 0, null biases are 0.
template <typename T, typename S>
KDK_INLINE void store_gradient(const S* a, const S* b, const S* biases, int64_t n, S scale,
                               T* out) {
  S buffer[kBlock];
  S* gradient = block_of(out, buffer);
  if (a == nullptr) {
    if (biases == nullptr) {
      std::memset(gradient, 0, sizeof(S) * n);
    } else {
      std::memcpy(gradient, biases, sizeof(S) * n);
    }
  } else if (biases == nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) gradient[j] = scale * (a[j] - b[j]);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) gradient[j] = scale * (a[j] - b[j]) + biases[j];
  }
  narrow_block(gradient, n, out);
}

// Both sides' gradients of n elements from `first`, with the sides' biases there. Without scale the
// maps are not read.
template <typename T, typename S>
KDK_INLINE void store_gradients(const Sample<T>& x, int64_t first, int64_t n, const S* scale,
                                const Side<T> (&sides)[2], const S* const (&biases)[2]) {
  S s_buffer[kBlock], t_buffer[kBlock];
  const S *s = nullptr, *t = nullptr;
  if (scale != nullptr) {
    s = widen_block(x.student + first, n, s_buffer);
    t = widen_block(x.teacher + first, n, t_buffer);
  }
  const S factor = scale != nullptr ? *scale : S(0);
  if (sides[0].gradient != nullptr) {
    store_gradient(s, t, biases[0], n, factor, sides[0].gradient + first);
  }
  if (sides[1].gradient != nullptr) {
    store_gradient(t, s, biases[1], n, factor, sides[1].gradient + first);
  }
}

// Positions side by side: whole rows where they fit, else pieces of one row.
template <typename T, typename S>
KDK_INLINE void gradients_of_positions(const Sample<T>& x, const S* scale,
                                       const Side<T> (&sides)[2]) {
  S of_rows[kBlock], biases[2][kBlock + 16];
  const S* used[2] = {nullptr, nullptr};
  const int64_t together = std::max<int64_t>(1, kBlock / x.positions);
  for (int64_t c = 0; c < x.channels; c += together) {
    const int64_t rows = std::min(together, x.channels - c);
    for (int k = 0; k < 2; ++k) {
      if (sides[k].grad_pooled == nullptr) continue;
      biases_of(sides[k].grad_pooled + c, rows, S(1) / static_cast<S>(x.positions), of_rows);
      spread(of_rows, rows, std::min(kBlock, x.positions), biases[k]);
      used[k] = biases[k];
    }
    for (int64_t begin = 0; begin < x.positions; begin += kBlock) {
      const int64_t n = rows * std::min(kBlock, x.positions - begin);
      store_gradients(x, c * x.positions + begin, n, scale, sides, used);
    }
  }
}

template <typename T, typename S>
KDK_INLINE void gradients_of_channels(const Sample<T>& x, const S* scale, const Side<T> (&sides)[2],
                                      Channels<S>& channels) {
  const S inverse = S(1) / static_cast<S>(x.positions);
  for (int k = 0; k < 2; ++k) {
    for (int64_t c = 0; c < x.channels && sides[k].grad_pooled != nullptr; c += kBlock) {
      const int64_t n = std::min(kBlock, x.channels - c);
      biases_of(sides[k].grad_pooled + c, n, inverse, channels.of[k].data() + c);
    }
  }
  for (int64_t p = 0; p < x.positions; ++p) {
    for (int64_t c = 0; c < x.channels; c += kBlock) {
      const S* used[2];
      for (int k = 0; k < 2; ++k) {
        used[k] = sides[k].grad_pooled != nullptr ? channels.of[k].data() + c : nullptr;
      }
      const int64_t n = std::min(kBlock, x.channels - c);
      store_gradients(x, p * x.channels + c, n, scale, sides, used);
    }
  }
}

template <typename T>
KDK_INLINE void pool_mse_samples(const PoolMseParams& params, int64_t begin, int64_t end) {
  using S = typename Statistics<T>::Type;
  const int64_t channels = params.channels, positions = params.positions;
  const int64_t elements = channels * positions;
  const auto of_sample = [](auto* base, int64_t b, int64_t size)
                             KDK_INLINED { return base == nullptr ? nullptr : base + b * size; };
  Channels<S> of_channels;
  for (int k = 0; k < 2 && params.channels_last; ++k) {
    of_channels.of[k].resize(channels);
    if (positions > kRun) of_channels.totals[k].resize(channels);
  }
  for (int64_t b = begin; b < end; ++b) {
    T* pooled_student = of_sample(static_cast<T*>(params.pooled_student), b, channels);
    T* pooled_teacher = of_sample(static_cast<T*>(params.pooled_teacher), b, channels);
    S* mse = of_sample(static_cast<S*>(params.mse), b, 1);
    T* grad_student = of_sample(static_cast<T*>(params.grad_student), b, elements);
    T* grad_teacher = of_sample(static_cast<T*>(params.grad_teacher), b, elements);
    if (params.mask != nullptr && params.mask[b] == 0) {
      if (mse != nullptr) {
        std::memset(pooled_student, 0, sizeof(T) * channels);
        std::memset(pooled_teacher, 0, sizeof(T) * channels);
        *mse = 0;
      }
      if (grad_student != nullptr) std::memset(grad_student, 0, sizeof(T) * elements);
      if (grad_teacher != nullptr) std::memset(grad_teacher, 0, sizeof(T) * elements);
      continue;
    }
    const Sample<T> sample{static_cast<const T*>(params.student) + b * elements,
                           static_cast<const T*>(params.teacher) + b * elements, channels,
                           positions};
    if (mse != nullptr) {
      const double squares =
          positions == 1 ? pool_vectors(sample, pooled_student, pooled_teacher)
          : params.channels_last
              ? pool_channels(sample, of_channels, pooled_student, pooled_teacher)
              : pool_positions(sample, pooled_student, pooled_teacher);
      *mse = static_cast<S>(squares / elements);
    }
    if (grad_student == nullptr && grad_teacher == nullptr) continue;
    const Side<T> sides[2] = {
        {of_sample(static_cast<const T*>(params.grad_pooled_student), b, channels), grad_student},
        {of_sample(static_cast<const T*>(params.grad_pooled_teacher), b, channels), grad_teacher}};
    S scale = 0;
    if (params.grad_mse != nullptr) {
      scale = static_cast<S>(2.0 * static_cast<const S*>(params.grad_mse)[b] / elements);
    }
    const S* used = params.grad_mse != nullptr ? &scale : nullptr;
    if (params.channels_last) {
      gradients_of_channels(sample, used, sides, of_channels);
    } else {
      gradients_of_positions(sample, used, sides);
    }
  }
}

using Params = PoolMseParams;
KDK_CLONES void run_float32(const Params& p, int64_t b, int64_t e) {
  pool_mse_samples<float>(p, b, e);
}
KDK_CLONES void run_float16(const Params& p, int64_t b, int64_t e) {
  pool_mse_samples<Float16>(p, b, e);
}
KDK_CLONES void run_bfloat16(const Params& p, int64_t b, int64_t e) {
  pool_mse_samples<BFloat16>(p, b, e);
}
KDK_CLONES void run_float64(const Params& p, int64_t b, int64_t e) {
  pool_mse_samples<double>(p, b, e);
}

}  // namespace

void pool_mse(const PoolMseParams& params, int threads) {
  auto* body = for_dtype(params.dtype, run_float32, run_float16, run_bfloat16, run_float64);
  for_each_run_of_rows(params.batch, params.channels * params.positions, threads,
                       [&](int64_t begin, int64_t end) { body(params, begin, end); });
}

}  // namespace kdkernels::cpu
