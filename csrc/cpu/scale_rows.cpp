// grad[r, :] *= scale[r] in place on the CPU; a scale of exactly 1 costs one comparison.
#include "../kdkernels.h"
#include "parallel.h"
#include "simd.h"

namespace kdkernels::cpu {
namespace {

constexpr int64_t kBlock = 256;  // as long a buffer of converted elements as stays in L1

template <typename T>
KDK_INLINE void scale_run(const ScaleRowsParams& params, int64_t begin_row, int64_t end_row) {
  using S = typename Statistics<T>::Type;
  const auto* scales = static_cast<const S*>(params.scale);
  for (int64_t r = begin_row; r < end_row; ++r) {
    const S scale = scales[r * params.scale_stride];
    if (scale == S(1)) continue;
    T* row = static_cast<T*>(params.grad) + r * params.classes;
    S buffer[kBlock];
    for (int64_t begin = 0; begin < params.classes; begin += kBlock) {
      const int64_t n = std::min(kBlock, params.classes - begin);
      const S* source = widen_block(row + begin, n, buffer);
      S* product = block_of(row + begin, buffer);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) product[j] = source[j] * scale;
      narrow_block(product, n, row + begin);
    }
  }
}

using Params = ScaleRowsParams;
KDK_CLONES void run_float32(const Params& p, int64_t b, int64_t e) { scale_run<float>(p, b, e); }
KDK_CLONES void run_float16(const Params& p, int64_t b, int64_t e) { scale_run<Float16>(p, b, e); }
KDK_CLONES void run_bfloat16(const Params& p, int64_t b, int64_t e) {
  scale_run<BFloat16>(p, b, e);
}
KDK_CLONES void run_float64(const Params& p, int64_t b, int64_t e) { scale_run<double>(p, b, e); }

bool scalar_one(const ScaleRowsParams& params) {
  if (params.scale_stride != 0) return false;
  return params.dtype == DType::kFloat64 ? *static_cast<const double*>(params.scale) == 1.0
                                         : *static_cast<const float*>(params.scale) == 1.0f;
}

}  // namespace

void scale_rows(const ScaleRowsParams& params, int threads) {
  if (params.rows == 0 || scalar_one(params)) return;  // before any thread is woken
  auto* body = for_dtype(params.dtype, run_float32, run_float16, run_bfloat16, run_float64);
  for_each_run_of_rows(params.rows, params.classes, threads,
                       [&](int64_t begin, int64_t end) { body(params, begin, end); });
}

}  // namespace kdkernels::cpu
