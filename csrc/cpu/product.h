// Products of float32 or float64 matrices, for kernels that make them and what is between them in
// one call.
#pragma once

#include <cstdint>

namespace kdkernels::cpu {

// What the columns of a product are a multiple of.
constexpr int64_t kProductColumns = 16;

inline int64_t product_width(int64_t n) {
  return (n + kProductColumns - 1) / kProductColumns * kProductColumns;
}

// c[r][j] = sum_k a[r a_row + k a_step] b[k b_stride + j], on the calling thread.
void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row,
             int64_t a_step, const float* b, int64_t b_stride, float* c, int64_t c_stride);
void product(int64_t rows, int64_t columns, int64_t depth, const double* a, int64_t a_row,
             int64_t a_step, const double* b, int64_t b_stride, double* c, int64_t c_stride);

// Multiplications that take about 20 us, and so are worth another thread.
constexpr int64_t kProductPerThread = 1 << 20;

// to[k][i] = from[i][k] for i < rows, 0 up to `filled` rows; k < columns.
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t filled,
               int64_t columns, float* to, int64_t to_stride);
void transpose(const double* from, int64_t from_stride, int64_t rows, int64_t filled,
               int64_t columns, double* to, int64_t to_stride);

}  // namespace kdkernels::cpu
