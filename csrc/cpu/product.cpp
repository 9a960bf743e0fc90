#include "product.h"

#include <algorithm>

#include "tile_product.h"

namespace kdkernels::cpu {
namespace {

// Of a so deep, kRows rows stay in L1, and of b a register's columns in L2.
constexpr int64_t kDepth = 512;

// Some registers' columns, for all rows.
template <typename S, int kBytes, int kRows, int kVectors>
KDK_INLINE void columns_of(int64_t rows, int64_t depth, const S* a, int64_t a_row, int64_t a_step,
                           const S* b, int64_t b_stride, S* c, int64_t c_stride) {
  for (int64_t k = 0; k < std::max<int64_t>(depth, 1); k += kDepth) {
    const int64_t n = std::min(kDepth, depth - k);
    const S* first = a + k * a_step;
    const S* panel = b + k * b_stride;
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) {
      multiply<S, kBytes, kRows, kVectors>(first + r * a_row, a_row, a_step, panel, b_stride, n,
                                           k > 0, c + r * c_stride, c_stride);
    }
    for (; r < rows; ++r) {
      multiply<S, kBytes, 1, kVectors>(first + r * a_row, a_row, a_step, panel, b_stride, n, k > 0,
                                       c + r * c_stride, c_stride);
    }
  }
}

template <typename S, int kBytes, int kRows>
KDK_INLINE void product_of(int64_t rows, int64_t columns, int64_t depth, const S* a, int64_t a_row,
                           int64_t a_step, const S* b, int64_t b_stride, S* c, int64_t c_stride) {
  constexpr int64_t kCount = Lanes<S, kBytes>::kCount;
  for (int64_t j = 0; j < columns;) {
    const int64_t left = (columns - j) / kCount;
    if (left == 1) {
      columns_of<S, kBytes, kRows, 1>(rows, depth, a, a_row, a_step, b + j, b_stride, c + j,
                                      c_stride);
      j += kCount;
    } else if (left == 2 || left == 4) {
      columns_of<S, kBytes, kRows, 2>(rows, depth, a, a_row, a_step, b + j, b_stride, c + j,
                                      c_stride);
      j += 2 * kCount;
    } else {
      columns_of<S, kBytes, kRows, 3>(rows, depth, a, a_row, a_step, b + j, b_stride, c + j,
                                      c_stride);
      j += 3 * kCount;
    }
  }
}

template <typename S>
KDK_INLINE void transpose_of(const S* from, int64_t from_stride, int64_t rows, int64_t filled,
                             int64_t columns, S* to, int64_t to_stride) {
  constexpr int64_t kBlock = 16;
  for (int64_t first = 0; first < filled; first += kBlock) {
    const int64_t n = std::min(kBlock, filled - first);
    const int64_t there = std::clamp<int64_t>(rows - first, 0, n);
    const S* row[kBlock];
    for (int64_t i = 0; i < there; ++i) row[i] = from + (first + i) * from_stride;
    for (int64_t k = 0; k < columns; ++k) {
      S* column = to + k * to_stride + first;
      if (there == kBlock) {
        for (int64_t i = 0; i < kBlock; ++i) column[i] = row[i][k];
        continue;
      }
      for (int64_t i = 0; i < there; ++i) column[i] = row[i][k];
      for (int64_t i = there; i < n; ++i) column[i] = S(0);
    }
  }
}

// A case for each instruction set: bytes of a register, and rows whose sums fit into all of them.
#ifdef KDK_ISAS
#define KDK_PRODUCT(name, attribute, S, bytes, kept)                                              \
  attribute void name(int64_t rows, int64_t columns, int64_t depth, const S* a, int64_t a_row,    \
                      int64_t a_step, const S* b, int64_t b_stride, S* c, int64_t c_stride) {     \
    product_of<S, bytes, kept>(rows, columns, depth, a, a_row, a_step, b, b_stride, c, c_stride); \
  }
KDK_PRODUCT(product_v4, KDK_V4, float, 64, 8)
KDK_PRODUCT(product_v4, KDK_V4, double, 64, 8)
KDK_PRODUCT(product_v3, KDK_V3, float, 32, 4)
KDK_PRODUCT(product_v3, KDK_V3, double, 32, 4)
#undef KDK_PRODUCT
#endif

template <typename S>
void any_product(int64_t rows, int64_t columns, int64_t depth, const S* a, int64_t a_row,
                 int64_t a_step, const S* b, int64_t b_stride, S* c, int64_t c_stride) {
#ifdef KDK_ISAS
  if (isa() == 4) {
    return product_v4(rows, columns, depth, a, a_row, a_step, b, b_stride, c, c_stride);
  }
  if (isa() == 3) {
    return product_v3(rows, columns, depth, a, a_row, a_step, b, b_stride, c, c_stride);
  }
#endif
  product_of<S, 16, 4>(rows, columns, depth, a, a_row, a_step, b, b_stride, c, c_stride);
}

}  // namespace

void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row,
             int64_t a_step, const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  any_product(rows, columns, depth, a, a_row, a_step, b, b_stride, c, c_stride);
}

void product(int64_t rows, int64_t columns, int64_t depth, const double* a, int64_t a_row,
             int64_t a_step, const double* b, int64_t b_stride, double* c, int64_t c_stride) {
  any_product(rows, columns, depth, a, a_row, a_step, b, b_stride, c, c_stride);
}

bool is_intel() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

KDK_CLONES void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t filled,
                          int64_t columns, float* to, int64_t to_stride) {
  transpose_of(from, from_stride, rows, filled, columns, to, to_stride);
}

KDK_CLONES void transpose(const double* from, int64_t from_stride, int64_t rows, int64_t filled,
                          int64_t columns, double* to, int64_t to_stride) {
  transpose_of(from, from_stride, rows, filled, columns, to, to_stride);
}

}  // namespace kdkernels::cpu
