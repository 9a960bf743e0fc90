// Scalar mathematics that every native kernel shares, on the host and on the device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define KDK_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define KDK_INLINE inline __attribute__((always_inline))
#define KDK_INLINED __attribute__((always_inline))  // after a lambda's parameters
#else
#define KDK_INLINE inline
#define KDK_INLINED
#endif

namespace kdkernels {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// Two sides whose maxima over T are further apart than this, which is a maximum's distance from
// most of its row, are far from each other: more is lost when their logits are differenced than
// when each is first taken from its own maximum.
constexpr float kFar = 44;

KDK_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

KDK_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// condition ? a : b, of bits. Where conditions follow from one another GCC makes a condition of
// conditions out of `?:`, which it cannot vectorise with AVX-512's masks.
KDK_INLINE float select(bool condition, float a, float b) {
#if defined(__CUDA_ARCH__)
  return condition ? a : b;
#else
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return bits_to_float((float_to_bits(a) & mask) | (float_to_bits(b) & ~mask));
#endif
}

KDK_INLINE double select(bool condition, double a, double b) { return condition ? a : b; }

// Adding this to |x| < 2^21 leaves n + 127 in the low bits, n the integer nearest to x: the
// exponent of 2^n.
constexpr float kRound = 12583039.0f;  // 1.5 * 2^23 + 127

KDK_INLINE float power_of_two(float shifted) { return bits_to_float(float_to_bits(shifted) << 23); }

// A result of exp2_above that is not above this may stand for something smaller.
constexpr float kLeastExp2 = 0x1p-125f;

// 2^x for x <= 0 (and a little above); NaN stays NaN; relative error <= 1.4e-7. What would
// underflow is left at about 2^least, with -127 at 0 (and what is within half a power of 2^-126 is
// subnormal).
template <int kLeast>
KDK_INLINE float exp2_from(float x) {
  const float y = static_cast<float>(kLeast) > x ? static_cast<float>(kLeast) : x;
  const float shifted = y + kRound;
  const float f = y - (shifted - kRound);
  float p = 1.32765e-3f;
  p = p * f + 9.67554e-3f;
  p = p * f + 5.550713e-2f;
  p = p * f + 2.402212e-1f;
  p = p * f + 6.9314697e-1f;
  p = p * f + 1.00000007f;
  return p * power_of_two(shifted);
}

// Beside a sum of at least 1 the least result is nothing.
KDK_INLINE float exp2_above(float x) { return exp2_from<-126>(x); }
KDK_INLINE double exp2_above(double x) { return std::exp2(x); }

// The same with an error of <= 8e-8 whose mean over a row is about 1e-9: for a sum that meets
// another than its like.
KDK_INLINE float exp2_unbiased(float x) {
  const float y = -126.0f > x ? -126.0f : x;
  const float shifted = y + kRound;
  const float f = y - (shifted - kRound);
  float p = 1.53533618e-4f;
  p = p * f + 1.33988744e-3f;
  p = p * f + 9.61843736e-3f;
  p = p * f + 5.55033247e-2f;
  p = p * f + 2.40226479e-1f;
  p = p * f + 6.93147203e-1f;
  p = p * f + 1.0f;
  return p * power_of_two(shifted);
}

KDK_INLINE double exp2_unbiased(double x) { return std::exp2(x); }

// 2^x for x <= 0, and 0 where that would underflow.
KDK_INLINE float exp2_or_zero(float x) { return exp2_from<-127>(x); }

KDK_INLINE double exp2_or_zero(double x) { return std::exp2(x); }

// e^-x for x >= 0.
KDK_INLINE float exp_of_minus(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(-x);
#else
  return exp2_above(x * static_cast<float>(-kLog2E));
#endif
}

KDK_INLINE double exp_of_minus(double x) { return std::exp(-x); }

// (log(1 + f) - f + f^2 / 2) / f^3 for 1 + f in [sqrt(1/2), sqrt(2)): relative error <= 1.5e-7
// (least-maximum fit).
KDK_INLINE float third_order_of_log(float f) {
  float h = 7.03758597e-2f;
  h = h * f - 1.15145601e-1f;
  h = h * f + 1.16770118e-1f;
  h = h * f - 1.24201491e-1f;
  h = h * f + 1.42493218e-1f;
  h = h * f - 1.66680574e-1f;
  h = h * f + 2.00007141e-1f;
  h = h * f - 2.49999940e-1f;
  return h * f + 3.33333313e-1f;
}

// log(1 + w) for w > -1 up to 2^126: relative error <= 2e-7, small w included.
KDK_INLINE float log_1_plus(float w) {
#if defined(__CUDA_ARCH__)
  return log1pf(w);
#else
  const float y = 1.0f + w;
  // y = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
  const int32_t bits = static_cast<int32_t>(float_to_bits(y));
  const int32_t k = (bits - 0x3f3504f3) >> 23;
  const float f = bits_to_float(static_cast<uint32_t>(bits - k * (1 << 23))) - 1.0f;
  const float h = third_order_of_log(f);
  // What the addition of 1 rounded away, over y: that shows only near 0, and there 1 / y is near
  // enough to 1 - w + w^2.
  const float near = select(std::fabs(w) < 0.5f, 1.0f - w + w * w, 0.0f);
  const float lost = (w - (y - 1.0f)) * near;
  return static_cast<float>(k) * static_cast<float>(kLn2) + (f + (f * f * (f * h - 0.5f) + lost));
#endif
}

KDK_INLINE double log_1_plus(double w) { return std::log1p(w); }

// (e^-x - 1 + x) / x^2 for |x| <= 0.5: relative error <= 2.5e-8 (least-maximum fit).
KDK_INLINE float second_order_ratio(float x) {
  float h = -1.98756294e-4f;
  h = h * x + 1.39819975e-3f;
  h = h * x - 8.33345217e-3f;
  h = h * x + 4.16657959e-2f;
  h = h * x - 1.66666655e-1f;
  return h * x + 5.00000012e-1f;
}

// The same in double: the Taylor series, relative error <= 2e-17 for |x| <= 0.5.
KDK_INLINE double second_order_ratio(double x) {
  double h = 0;
  for (int k = 16; k >= 2; --k) h = 1 - x / (k + 1) * h;
  return h / 2;
}

// One class of KL(P||Q), D = log P - log Q: its share of the loss, P (D + e^-D - 1) >= 0, and the
// difference Q - P. Near D = 0 both come from the series, so that neither cancels. (Functions of
// their own, not a struct's members only: a loop over structs is not vectorised.)
template <typename T>
KDK_INLINE T kl_excess(T p, T q, T delta) {
  const bool near = std::fabs(delta) < T(0.5);
  const T x = select(near, delta, T(0));  // keeps an infinite delta out of the polynomial
  const T series = p * (x * x * second_order_ratio(x));
  // p = 0 contributes q whatever delta is (0 * inf = 0); a NaN reaches the sum through q - p.
  const T far = p * select(p > T(0), delta, T(0)) + (q - p);
  return select(near, series, far);
}

template <typename T>
KDK_INLINE T kl_difference(T p, T q, T delta) {
  const bool near = std::fabs(delta) < T(0.5);
  const T x = select(near, delta, T(0));
  const T series = p * (x * x * second_order_ratio(x) - x);
  return select(near, series, q - p);
}

template <typename T>
struct KlTerm {
  T excess;
  T difference;
};

template <typename T>
KDK_INLINE KlTerm<T> kl_term(T p, T q, T delta) {
  return {kl_excess(p, q, delta), kl_difference(p, q, delta)};
}

// dKL/d(target_j / T_P) = P (D - loss), where 0 * inf = 0 and an infinite loss gives its one-sided
// limits.
template <typename T>
KDK_INLINE T kl_target_gradient(T p, T delta, T loss) {
  const T infinity = static_cast<T>(INFINITY);
  const T slope = select(delta == infinity, infinity, delta - loss);
  return select(p == T(0), T(0), p * slope);
}

}  // namespace kdkernels
