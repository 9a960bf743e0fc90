// A small linear loss on the CPU: both sides' logits, the rows' losses of them, and the gradients
// of features and heads; formulas in ../kdkernels.h.
//
//   1. heads are packed, feature by feature with the classes side by side
//   2. runs of rows: their logits, losses, and the gradients of their features
//   3. blocks of classes: the head's gradient, summed over all rows
//
// A matrix whose elements are not of the statistics type, or whose rows do not end with a register,
// is copied first where a product loads registers of it. Threads share out rows and classes, and
// each sum is one thread's, in one order, so that results do not depend on their number.
#include <algorithm>
#include <atomic>

#include "../kdkernels.h"
#include "convert.h"
#include "logit_rows.h"
#include "parallel.h"
#include "product.h"
#include "tile_product.h"

namespace kdkernels::cpu {
namespace {

// Classes that are packed, or whose gradients are summed, at once.
constexpr int64_t kBlock = kProductColumns;

template <typename S>
struct Matrix {
  const S* values = nullptr;
  int64_t stride = 0;
  KDK_INLINE const S* row(int64_t r) const { return values + r * stride; }
};

// One side as the products read it.
template <typename S>
struct Side {
  const LinearSide* given;
  int64_t width;  // features, filled up
  Matrix<S> x, weight;
  S *x_copy, *weight_copy, *bias, *packed, *logits, *grad;  // copies, bias and grad may be null
  Buffer<S> memory[6];
};

template <typename S>
struct Work {
  int64_t rows, classes;
  int64_t width;  // classes, filled up
  Side<S> sides[2];
  int count;
};

template <typename S>
constexpr DType kOwn = sizeof(S) == 4 ? DType::kFloat32 : DType::kFloat64;

void widen_any(DType dtype, const void* from, int64_t begin, int64_t n, float* to) {
  if (dtype == DType::kFloat32) return widen_row(static_cast<const float*>(from) + begin, n, to);
  if (dtype == DType::kFloat16) return widen_row(static_cast<const Float16*>(from) + begin, n, to);
  widen_row(static_cast<const BFloat16*>(from) + begin, n, to);
}

void widen_any(DType, const void* from, int64_t begin, int64_t n, double* to) {
  widen_row(static_cast<const double*>(from) + begin, n, to);
}

void narrow_any(DType dtype, const float* from, int64_t n, void* to, int64_t begin) {
  if (dtype == DType::kFloat32) return narrow_row(from, n, static_cast<float*>(to) + begin);
  if (dtype == DType::kFloat16) return narrow_row(from, n, static_cast<Float16*>(to) + begin);
  narrow_row(from, n, static_cast<BFloat16*>(to) + begin);
}

void narrow_any(DType, const double* from, int64_t n, void* to, int64_t begin) {
  narrow_row(from, n, static_cast<double*>(to) + begin);
}

// A product into a gradient of any type.
template <typename S>
void gradient_rows(const Side<S>& side, void* to, int64_t begin, int64_t end, int64_t depth,
                   const S* a, int64_t a_row, int64_t a_step, const Matrix<S>& b, Buffer<S>& room) {
  const int64_t features = side.given->features, width = side.width;
  if (side.given->grad_dtype == kOwn<S> && width == features) {
    product(end - begin, width, depth, a, a_row, a_step, b.values, b.stride,
            static_cast<S*>(to) + begin * features, features);
    return;
  }
  S* result = room.reserve((end - begin) * width);
  product(end - begin, width, depth, a, a_row, a_step, b.values, b.stride, result, width);
  for (int64_t r = begin; r < end; ++r) {
    narrow_any(side.given->grad_dtype, result + (r - begin) * width, features, to, r * features);
  }
}

template <typename S>
void logits_of_rows(const Work<S>& work, const Side<S>& side, int64_t begin, int64_t end) {
  S* logits = side.logits + begin * work.width;
  product(end - begin, work.width, side.given->features, side.x.row(begin), side.x.stride, 1,
          side.packed, work.width, logits, work.width);
  if (side.bias == nullptr) return;
  for (int64_t r = begin; r < end; ++r, logits += work.width) {
#pragma omp simd
    for (int64_t j = 0; j < work.classes; ++j) logits[j] += side.bias[j];
  }
}

// dbias = the sum of the logits' gradients over the rows.
template <typename S>
void sum_rows(const Work<S>& work, const Side<S>& side, int64_t begin, int64_t end) {
  double sums[kBlock] = {};
  const int64_t n = end - begin;
  for (int64_t r = 0; r < work.rows; ++r) {
    const S* row = side.grad + r * work.width + begin;
    for (int64_t i = 0; i < n; ++i) sums[i] += row[i];
  }
  for (int64_t i = 0; i < n; ++i) {
    static_cast<S*>(side.given->grad_bias)[begin + i] = static_cast<S>(sums[i]);
  }
}

template <typename S>
void prepare(const Work<S>& work, const LinearSide& given, bool graded, Side<S>& side) {
  side.given = &given;
  side.width = product_width(given.features);
  const bool own = given.dtype == kOwn<S>, whole = side.width == given.features;
  const auto reserve = [&](int i, bool wanted, int64_t n) {
    return wanted ? side.memory[i].reserve(n) : nullptr;
  };
  side.x_copy =
      reserve(0, !own || (given.grad_weight != nullptr && !whole), work.rows * side.width);
  side.weight_copy =
      reserve(1, !own || (given.grad_x != nullptr && !whole), work.classes * side.width);
  side.x = side.x_copy != nullptr ? Matrix<S>{side.x_copy, side.width}
                                  : Matrix<S>{static_cast<const S*>(given.x), given.x_stride};
  side.weight = side.weight_copy != nullptr
                    ? Matrix<S>{side.weight_copy, side.width}
                    : Matrix<S>{static_cast<const S*>(given.weight), given.weight_stride};
  side.bias = reserve(5, given.bias != nullptr, work.classes);
  if (side.bias != nullptr) widen_any(given.dtype, given.bias, 0, work.classes, side.bias);
  side.packed = side.memory[2].reserve(given.features * work.width);
  side.logits = side.memory[3].reserve(work.rows * work.width);
  side.grad = reserve(4, graded, work.rows * work.width);
}

template <typename S>
void copy_rows(const LinearSide& given, const void* from, int64_t stride, int64_t begin,
               int64_t end, int64_t width, S* to) {
  for (int64_t r = begin; r < end; ++r) {
    widen_any(given.dtype, from, r * stride, given.features, to + r * width);
    std::fill(to + r * width + given.features, to + (r + 1) * width, S(0));
  }
}

template <typename S>
void run(const SmallLinearLossParams& params, int threads) {
  static thread_local Work<S> kept;
  Work<S>& work = kept;  // the calling thread's in all of them
  work.rows = params.losses[0].rows;
  work.classes = params.losses[0].classes;
  work.width = product_width(work.classes);
  work.count = params.sides[1].x == nullptr ? 1 : 2;
  bool graded[2] = {};
  LogitLossParams losses[2] = {params.losses[0], params.losses[1]};
  int64_t features = 0;
  for (int i = 0; i < work.count; ++i) {
    const LinearSide& given = params.sides[i];
    graded[i] =
        given.grad_x != nullptr || given.grad_weight != nullptr || given.grad_bias != nullptr;
    prepare(work, given, graded[i], work.sides[i]);
    features += given.features;
  }
  bool wanted[2] = {true, false};  // which of the two losses
  for (int i = 0; i < 2; ++i) {
    LogitLossParams& loss = losses[i];
    loss.input = work.sides[i].logits;
    loss.target = work.count == 2 ? work.sides[1 - i].logits : nullptr;
    loss.grad_input = graded[i] ? work.sides[i].grad : nullptr;
    loss.input_stride = loss.target_stride = loss.grad_stride = work.width;
    loss.dtype = loss.grad_dtype = kOwn<S>;
  }
  wanted[1] = graded[1] || losses[1].grad_input_temperature != nullptr;
  const RowsOfLogits bodies[2] = {rows_of_logits(losses[0]),
                                  wanted[1] ? rows_of_logits(losses[1]) : nullptr};

  const int64_t work_of_row = 2 * features * work.classes;
  const int64_t blocks = (work.classes + kBlock - 1) / kBlock;
  // Threads as the products are worth them, in every step.
  const int64_t useful = std::max<int64_t>(1, work.rows * work_of_row / kProductPerThread);
  threads = static_cast<int>(std::min<int64_t>(threads, useful));
  const auto shared_out = [&](int64_t n, const auto& body) {
    for_each_run_of_rows(n, 1, threads, body, 1);
  };

  shared_out(work.count * blocks, [&](int64_t begin, int64_t end) {
    Buffer<S> room;
    for (int64_t i = begin; i < end; ++i) {
      const Side<S>& side = work.sides[i / blocks];
      const LinearSide& given = *side.given;
      const int64_t first = i % blocks * kBlock;
      const int64_t last = std::min(first + kBlock, work.classes);
      if (side.weight_copy != nullptr) {
        copy_rows(given, given.weight, given.weight_stride, first, last, side.width,
                  side.weight_copy);
      }
      transpose(side.weight.row(first), side.weight.stride, last - first, kBlock, given.features,
                side.packed + first, work.width);
    }
  });

  std::atomic<int64_t> wrong{-1};
  shared_out(work.rows, [&](int64_t begin, int64_t end) {
    Buffer<S> room;
    for (int i = 0; i < work.count; ++i) {
      const Side<S>& side = work.sides[i];
      const LinearSide& given = *side.given;
      if (side.x_copy != nullptr) {
        copy_rows(given, given.x, given.x_stride, begin, end, side.width, side.x_copy);
      }
      logits_of_rows(work, side, begin, end);
    }
    for (int i = 0; i < 2; ++i) {
      if (!wanted[i]) continue;
      const int64_t found = bodies[i](losses[i], begin, end);
      if (found >= 0) wrong = found;
    }
    for (int i = 0; i < work.count; ++i) {
      if (params.sides[i].grad_x != nullptr) {
        const Side<S>& side = work.sides[i];
        gradient_rows(side, side.given->grad_x, begin, end, work.classes,
                      side.grad + begin * work.width, work.width, 1, side.weight, room);
      }
    }
  });

  for (int i = 0; i < work.count && wrong < 0; ++i) {
    const Side<S>& side = work.sides[i];
    if (side.given->grad_weight == nullptr && side.given->grad_bias == nullptr) continue;
    shared_out(blocks, [&](int64_t begin, int64_t end) {
      Buffer<S> room;
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kBlock;
        const int64_t last = std::min(first + kBlock, work.classes);
        if (side.given->grad_weight != nullptr) {
          gradient_rows(side, side.given->grad_weight, first, last, work.rows, side.grad + first, 1,
                        work.width, side.x, room);
        }
        if (side.given->grad_bias != nullptr) sum_rows(work, side, first, last);
      }
    });
  }
  for (Side<S>& side : work.sides) {
    for (Buffer<S>& buffer : side.memory) buffer.end_of_call();
  }
  if (wrong >= 0) refuse_label(losses[0], wrong);
}

}  // namespace

void small_linear_loss(const SmallLinearLossParams& params, int threads) {
  if (params.losses[0].rows == 0) return;
  if (params.sides[0].dtype == DType::kFloat64) {
    run<double>(params, threads);
  } else {
    run<float>(params, threads);
  }
}

}  // namespace kdkernels::cpu
