// Sums over rows, of some columns at once.
#pragma once

#include <algorithm>

#include "simd.h"

namespace kdkernels::cpu {

// After so many rows a sum goes on in float64.
constexpr int64_t kRowsOfSum = 32;

template <typename S>
KDK_INLINE void add_values(const S* x, const S* origin, S weight, int64_t n, S* sum) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) sum[j] += weight * (x[j] - origin[j]);
}

// total[j] = the sum over i of what add(i, sum) adds to sum[j], j < n <= kColumns.
template <typename S, int64_t kColumns, typename Add>
KDK_INLINE void sum_rows(int64_t count, int64_t n, const Add& add, double* total) {
  S sum[kColumns] = {};
  std::fill_n(total, n, 0.0);
  for (int64_t i = 0; i < count; ++i) {
    add(i, sum);
    if ((i + 1) % kRowsOfSum != 0 && i + 1 < count) continue;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      total[j] += sum[j];
      sum[j] = S(0);
    }
  }
}

}  // namespace kdkernels::cpu
