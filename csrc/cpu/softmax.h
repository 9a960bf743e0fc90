// A row in blocks, and the statistics of its softmax.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "simd.h"

namespace kdkernels::cpu {

// Short enough that float32 sums inside a block lose nothing that shows after a double takes them
// over: with 32 additions to each of 16 lanes the difference of two rows' log-sum-exps is good to
// 2e-8.
constexpr int64_t kBlock = 512;

// Elements of the widest vector.
constexpr int64_t kLanes = 16;

KDK_INLINE int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// max x, and the sum of 2^(x factor - shift) with shift = max x factor as rounded, over what has
// been seen of a row; log2 of the row's sum of 2^(x factor) is shift + log2(sum). Sums across
// blocks are in double.
template <typename S>
struct Softmax {
  S factor;  // log2(e) / T, as rounded: from here on the temperature is exactly what that makes it
  S max = -static_cast<S>(INFINITY);
  S shift = 0;
  double sum = 0;

  KDK_INLINE void add(const S* x, int64_t n) {
    S block_max = -static_cast<S>(INFINITY);
#pragma omp simd reduction(max : block_max)
    for (int64_t j = 0; j < n; ++j) block_max = x[j] > block_max ? x[j] : block_max;
    if (block_max > max) {
      const S next = block_max * factor;
      if (sum != 0) sum *= std::exp2(static_cast<double>(shift) - next);
      max = block_max;
      shift = next;
    }
    S block_sum = 0;
#pragma omp simd reduction(+ : block_sum)
    for (int64_t j = 0; j < n; ++j) block_sum += exp2_above(x[j] * factor - shift);
    // Where all so far is -inf there is nothing to add, and the least value must not be taken for
    // something.
    if (max != -static_cast<S>(INFINITY)) sum += block_sum;
  }
};

// Has the block after that at x on its way from memory while that is worked on: without, the
// processor's own prefetching waits for the loads of the next block. On a Xeon with two threads up
// to a quarter of topk_kl_div's time in float32, a tenth of kl_div's. (Rows to be written gain
// nothing, and kl_div lost 5 %.)
template <typename T>
KDK_INLINE void prefetch_next(const T* x) {
  prefetch(x + kBlock, sizeof(T) * kBlock);
}

// body(x, n, begin) over the blocks of one row, in the statistics type.
template <typename T, typename Body>
KDK_INLINE void for_each_block(const T* x, int64_t classes, const Body& body) {
  alignas(64) typename Statistics<T>::Type buffer[kBlock];
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t n = std::min(kBlock, classes - begin);
    prefetch_next(x + begin);
    body(widen_block(x + begin, n, buffer), n, begin);
  }
}

// body(s, t, n, begin) over the blocks of two.
template <typename T, typename Body>
KDK_INLINE void for_each_block(const T* input, const T* target, int64_t classes, const Body& body) {
  alignas(64) typename Statistics<T>::Type s_buffer[kBlock], t_buffer[kBlock];
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t n = std::min(kBlock, classes - begin);
    prefetch_next(input + begin);
    prefetch_next(target + begin);
    body(widen_block(input + begin, n, s_buffer), widen_block(target + begin, n, t_buffer), n,
         begin);
  }
}

template <typename T>
KDK_INLINE T* row_of(void* base, int64_t row, int64_t stride) {
  return base == nullptr ? nullptr : static_cast<T*>(base) + row * stride;
}

}  // namespace kdkernels::cpu
