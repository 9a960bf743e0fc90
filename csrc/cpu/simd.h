// What the CPU kernels vectorise with: element types, exponentials, and the attribute that makes
// the compiler emit one clone per instruction set. Everything here is plain scalar code, always
// inlined into
// `#pragma omp simd` loops, so no SIMD library is needed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define KDK_F16C
#endif

#include "../kdkernels.h"
#include "../math.h"

// The dynamic loader picks the best clone once (AVX-512, AVX2 + FMA, baseline).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__)
#define KDK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KDK_CLONES
#endif

namespace kdkernels::cpu {

// Has so many bytes on their way from memory.
KDK_INLINE void prefetch(const void* from, int64_t bytes) {
#if defined(__GNUC__)
#pragma GCC unroll 4
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
#else
  (void)from, (void)bytes;
#endif
}

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

KDK_INLINE float widen(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

KDK_INLINE float widen(Float16 x) {
  const uint32_t h = x.bits;
  const uint32_t magnitude = h & 0x7fffu;
  // Moving the exponent up by 112 is exact for subnormals too; infinity and NaN keep exponent 255.
  const float scaled = bits_to_float(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bits_to_float(float_to_bits(scaled) | special | (h & 0x8000u) << 16);
}

// Both round to nearest, ties to even.
KDK_INLINE void narrow(float value, BFloat16& x) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  x.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

KDK_INLINE void narrow(float value, Float16& x) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Below 2^-14 the spacing is 2^-24, which is that of 0.5: the addition rounds.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  x.bits = static_cast<uint16_t>((magnitude >= 0x47800000u ? infinite : finite) |
                                 (bits >> 16 & 0x8000u));
}

#ifdef KDK_F16C
// The compiler does not vectorise float16 conversions without AVX-512 FP16; these eight-wide ones
// halve the time of a float16 kernel. They give up at the first element they leave to the caller.
__attribute__((target("avx,f16c"))) inline int64_t widen_f16c(const Float16* x, int64_t n,
                                                              float* y) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    _mm256_storeu_ps(y + j,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + j))));
  }
  return j;
}

__attribute__((target("avx,f16c"))) inline int64_t narrow_f16c(const float* x, int64_t n,
                                                               Float16* y) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + j),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + j), _MM_FROUND_TO_NEAREST_INT));
  }
  return j;
}

inline const bool kHasF16c = __builtin_cpu_supports("f16c");
#endif

// The type of statistics for an element type.
template <typename T>
struct Statistics {
  using Type = float;
};
template <>
struct Statistics<double> {
  using Type = double;
};

// x[begin..begin + n) in the statistics type: the row itself where it has that type, else a copy in
// `buffer`.
KDK_INLINE const float* widen_block(const float* x, int64_t, float*) { return x; }
KDK_INLINE const double* widen_block(const double* x, int64_t, double*) { return x; }
template <typename Half>
KDK_INLINE const float* widen_block(const Half* x, int64_t n, float* buffer) {
  int64_t j = 0;
#ifdef KDK_F16C
  if (std::is_same<Half, Float16>::value && kHasF16c) {
    j = widen_f16c(reinterpret_cast<const Float16*>(x), n, buffer);
  }
#endif
#pragma omp simd
  for (int64_t i = j; i < n; ++i) buffer[i] = widen(x[i]);
  return buffer;
}

// Where a block of results is made before narrow_block moves it to `x`.
KDK_INLINE float* block_of(float* x, float*) { return x; }
KDK_INLINE double* block_of(double* x, double*) { return x; }
template <typename Half>
KDK_INLINE float* block_of(Half*, float* buffer) {
  return buffer;
}

KDK_INLINE void narrow_block(const float*, int64_t, float*) {}
KDK_INLINE void narrow_block(const double*, int64_t, double*) {}
template <typename Half>
KDK_INLINE void narrow_block(const float* buffer, int64_t n, Half* x) {
  int64_t j = 0;
#ifdef KDK_F16C
  if (std::is_same<Half, Float16>::value && kHasF16c)
    j = narrow_f16c(buffer, n, reinterpret_cast<Float16*>(x));
#endif
#pragma omp simd
  for (int64_t i = j; i < n; ++i) narrow(buffer[i], x[i]);
}

// Which of a kernel's four instantiations takes elements of `dtype`.
template <typename Function>
Function* for_dtype(DType dtype, Function* float32, Function* float16, Function* bfloat16,
                    Function* float64) {
  return dtype == DType::kFloat32    ? float32
         : dtype == DType::kFloat16  ? float16
         : dtype == DType::kBFloat16 ? bfloat16
                                     : float64;
}

}  // namespace kdkernels::cpu
