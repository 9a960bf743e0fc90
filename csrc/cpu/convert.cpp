#include "convert.h"

#include <algorithm>

namespace kdkernels::cpu {

void widen_row(const float* from, int64_t n, float* to) { std::copy_n(from, n, to); }
void widen_row(const double* from, int64_t n, double* to) { std::copy_n(from, n, to); }
KDK_CLONES void widen_row(const Float16* from, int64_t n, float* to) { widen_block(from, n, to); }
KDK_CLONES void widen_row(const BFloat16* from, int64_t n, float* to) { widen_block(from, n, to); }
void narrow_row(const float* from, int64_t n, float* to) { std::copy_n(from, n, to); }
void narrow_row(const double* from, int64_t n, double* to) { std::copy_n(from, n, to); }
KDK_CLONES void narrow_row(const float* from, int64_t n, Float16* to) { narrow_block(from, n, to); }
KDK_CLONES void narrow_row(const float* from, int64_t n, BFloat16* to) {
  narrow_block(from, n, to);
}

}  // namespace kdkernels::cpu
