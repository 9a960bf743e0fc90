// Small products of float32 or float64 matrices in registers, for kernels that take a tile apart
// before it leaves the cache.
#pragma once

#include "buffer.h"
#include "simd.h"

// Functions under these are compiled for one instruction set each; the caller picks (isa()). Unlike
// a kernel under KDK_CLONES, they may be given registers that the others do not have.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__)
#define KDK_ISAS 1
#define KDK_V4 __attribute__((target("arch=x86-64-v4")))
#define KDK_V3 __attribute__((target("arch=x86-64-v3")))
#endif

namespace kdkernels::cpu {

// Which of the instruction sets this CPU has: 4 (AVX-512), 3 (AVX2 and FMA), else 0.
inline int isa() {
#ifdef KDK_ISAS
  static const int level = __builtin_cpu_supports("x86-64-v4")   ? 4
                           : __builtin_cpu_supports("x86-64-v3") ? 3
                                                                 : 0;
  return level;
#else
  return 0;
#endif
}

// kBytes of S side by side: plain loops over kCount values where there are no vector types.
template <typename S, int kBytes>
struct Lanes {
  static constexpr int kCount = kBytes / static_cast<int>(sizeof(S));
#if defined(__GNUC__)
  typedef S Type __attribute__((vector_size(kBytes)));
  Type values;
  KDK_INLINE void clear() { values = Type{}; }
  KDK_INLINE void add_product(S a, const Lanes& b) { values += a * b.values; }
  KDK_INLINE void add(const Lanes& other) { values += other.values; }
#else
  S values[kCount];
  void clear() {
    for (S& value : values) value = S(0);
  }
  void add_product(S a, const Lanes& b) {
    for (int i = 0; i < kCount; ++i) values[i] += a * b.values[i];
  }
  void add(const Lanes& other) {
    for (int i = 0; i < kCount; ++i) values[i] += other.values[i];
  }
#endif
  KDK_INLINE void load(const S* from) { std::memcpy(&values, from, kBytes); }
  KDK_INLINE void store(S* to) const { std::memcpy(to, &values, kBytes); }
};

// c[kRows][kVectors kCount] (+)= sum_k a[r a_row + k a_step] b[k b_stride ...], summed in registers
// and then added: so a sum of many calls is one of partial sums.
template <typename S, int kBytes, int kRows, int kVectors>
KDK_INLINE void multiply(const S* a, int64_t a_row, int64_t a_step, const S* b, int64_t b_stride,
                         int64_t depth, bool add, S* c, int64_t c_stride) {
  using V = Lanes<S, kBytes>;
  V sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sums[r][v].clear();
  }
  for (int64_t k = 0; k < depth; ++k) {
    V row[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) row[v].load(b + k * b_stride + v * V::kCount);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const S value = a[r * a_row + k * a_step];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sums[r][v].add_product(value, row[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      S* to = c + r * c_stride + v * V::kCount;
      if (add) {
        V before;
        before.load(to);
        sums[r][v].add(before);
      }
      sums[r][v].store(to);
    }
  }
}

}  // namespace kdkernels::cpu
