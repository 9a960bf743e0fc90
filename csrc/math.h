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

// One class of KL(P||Q): with D = log P - log Q, `excess` = its share of the loss, P (D + e^-D - 1)
// >= 0, and `difference` = Q - P. Near D = 0 both come from the series, so that neither cancels.
template <typename T>
struct KlTerm {
  T excess;
  T difference;
};

template <typename T>
KDK_INLINE KlTerm<T> kl_term(T p, T q, T delta) {
  const bool near = delta < T(0.5) && delta > T(-0.5);
  const T x = near ? delta : T(0);  // keeps an infinite delta out of the polynomial
  const T e = x * x * second_order_ratio(x);
  const T far_difference = q - p;
  // p = 0 contributes q whatever delta is (0 * inf = 0); a NaN reaches the sum through
  // far_difference.
  const T far_excess = (p > T(0) ? p * delta : T(0)) + far_difference;
  return {near ? p * e : far_excess, near ? p * (e - x) : far_difference};
}

// dKL/d(target_j / T_P) = P (D - loss), where 0 * inf = 0 and an infinite loss gives its one-sided
// limits.
template <typename T>
KDK_INLINE T kl_target_gradient(T p, T delta, T loss) {
  const T infinity = static_cast<T>(INFINITY);
  const T slope = delta == infinity ? infinity : delta - loss;
  return p > T(0) || p != p ? p * slope : T(0);
}

}  // namespace kdkernels
