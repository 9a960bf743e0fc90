// The sum of a loss's rows.
#include "../kdkernels.h"
#include "simd.h"

namespace kdkernels::cpu {
namespace {

template <typename S>
KDK_INLINE void add_up(const void* rows, int64_t count, void* out) {
  const S* x = static_cast<const S*>(rows);
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += x[i];
  *static_cast<S*>(out) = static_cast<S>(sum);
}

KDK_CLONES void run_float32(const void* x, int64_t n, void* out) { add_up<float>(x, n, out); }
KDK_CLONES void run_float64(const void* x, int64_t n, void* out) { add_up<double>(x, n, out); }

}  // namespace

void sum_of_rows(DType dtype, const void* rows, int64_t count, void* out) {
  (dtype == DType::kFloat64 ? run_float64 : run_float32)(rows, count, out);
}

}  // namespace kdkernels::cpu
