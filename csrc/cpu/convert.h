// Rows of elements to the statistics type and back, as functions that may be called from anywhere.
#pragma once

#include "simd.h"

namespace kdkernels::cpu {

void widen_row(const float* from, int64_t n, float* to);
void widen_row(const Float16* from, int64_t n, float* to);
void widen_row(const BFloat16* from, int64_t n, float* to);
void widen_row(const double* from, int64_t n, double* to);
void narrow_row(const float* from, int64_t n, float* to);
void narrow_row(const float* from, int64_t n, Float16* to);
void narrow_row(const float* from, int64_t n, BFloat16* to);
void narrow_row(const double* from, int64_t n, double* to);

}  // namespace kdkernels::cpu
