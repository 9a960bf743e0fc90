// Row-wise KL(P||Q) of tempered softmaxes on the CPU; formulas in ../kdkernels.h, the row in
// kl_row.h.
//
// Threads take contiguous runs of rows, and each row is summed in one fixed order, so that results
// do not depend on their number.
#include "../kdkernels.h"
#include "kl_row.h"
#include "parallel.h"

namespace kdkernels::cpu {
namespace {

template <typename T>
KDK_INLINE void kl_div_rows(const KlDivParams& params, int64_t begin_row, int64_t end_row) {
  using S = typename Statistics<T>::Type;
  const auto* input_temperature = static_cast<const S*>(params.input_temperature);
  const auto* target_temperature = static_cast<const S*>(params.target_temperature);
  const auto* row_scale = static_cast<const S*>(params.row_scale);
  auto* loss_out = static_cast<S*>(params.loss);
  auto* input_temperature_out = static_cast<S*>(params.grad_input_temperature);
  auto* target_temperature_out = static_cast<S*>(params.grad_target_temperature);
  const int64_t classes = params.classes;
  const bool more_outputs = params.grad_target != nullptr || input_temperature_out != nullptr ||
                            target_temperature_out != nullptr;
  // With this many rows a thread's stash is 1/32 of a float32 gradient, 1/16 of a half one. The
  // choice must not depend on the number of threads: the two ways may round differently.
  constexpr int64_t kStashRows = sizeof(T) == sizeof(float) ? 1 : 2;
  const bool stashed = params.grad_input != nullptr && params.rows >= 32 * kStashRows;
  Stash stash;
  stash.shift.reserve(classes / kBlock + 1);
  Buffer<float> w_row;
  if (stashed) {
    stash.e.reserve(classes);
    w_row.reserve(sizeof(T) == sizeof(float) ? 0 : classes);
  }

  const double one_input = 1 / params.input_temperature_value;
  const double one_target = 1 / params.target_temperature_value;
  for (int64_t r = begin_row; r < end_row; ++r) {
    T* grad_input = row_of<T>(params.grad_input, r, classes);
    T* grad_target = row_of<T>(params.grad_target, r, classes);
    if (params.mask != nullptr && params.mask[r] == 0) {
      if (loss_out != nullptr) loss_out[r] = 0;
      if (grad_input != nullptr) std::memset(grad_input, 0, sizeof(T) * classes);
      if (grad_target != nullptr) std::memset(grad_target, 0, sizeof(T) * classes);
      if (input_temperature_out != nullptr) input_temperature_out[r] = 0;
      if (target_temperature_out != nullptr) target_temperature_out[r] = 0;
      continue;
    }
    const double input_inverse = input_temperature ? 1 / double(input_temperature[r]) : one_input;
    const double target_inverse =
        target_temperature ? 1 / double(target_temperature[r]) : one_target;
    const double scale = row_scale ? double(row_scale[r]) : params.scale;
    const T* input = static_cast<const T*>(params.input) + r * params.input_stride;
    const T* target = static_cast<const T*>(params.target) + r * params.target_stride;
    const S input_factor = static_cast<S>(input_inverse * kLog2E);
    const S target_factor = static_cast<S>(target_inverse * kLog2E);

    Sweep<S> found{};
    bool wants_gradient = grad_input != nullptr;
    if constexpr (std::is_same<S, float>::value) {
      FastRow fast{input_factor, target_factor, target_factor - input_factor};
      FastSums sums;
      const auto run = [&](auto with_stash) KDK_INLINED {
        constexpr bool kStash = decltype(with_stash)::value;
        if (kStash) stash.w = block_of(grad_input, w_row.data());
        if (!fast_sweeps<kStash>(input, target, classes, fast, sums, stash)) {
          found = plain_sweep(input, target, classes, input_factor, target_factor);
          return;
        }
        if (wants_gradient) {
          fast_gradient<kStash>(input, target, classes, fast, sums, scale * input_inverse, stash,
                                grad_input);
          wants_gradient = false;
        }
        if (more_outputs) {
          found = sweep_of(fast, sums);
        } else {
          found.loss = sums.loss();
        }
      };
      if (stashed) {
        run(std::true_type{});
      } else {
        run(std::false_type{});
      }
    } else {
      found = plain_sweep(input, target, classes, input_factor, target_factor);
    }
    const Row<S>& row = found.row;
    const S loss = static_cast<S>(found.loss);
    if (loss_out != nullptr) loss_out[r] = static_cast<S>(scale * found.loss);

    alignas(64) S buffer[kBlock];
    if (wants_gradient) {
      const S input_scale = static_cast<S>(scale * input_inverse);
      for_each_block(input, target, classes,
                     [&](const S* s, const S* t, int64_t n, int64_t begin) KDK_INLINED {
                       S* gradient = block_of(grad_input + begin, buffer);
#pragma omp simd
                       for (int64_t j = 0; j < n; ++j)
                         gradient[j] = input_scale * row.term(s[j], t[j]).difference;
                       narrow_block(gradient, n, grad_input + begin);
                     });
    }
    if (grad_target != nullptr) {
      const S target_scale = static_cast<S>(scale * target_inverse);
      for_each_block(input, target, classes,
                     [&](const S* s, const S* t, int64_t n, int64_t begin) KDK_INLINED {
                       S* gradient = block_of(grad_target + begin, buffer);
#pragma omp simd
                       for (int64_t j = 0; j < n; ++j) {
                         gradient[j] = target_scale *
                                       kl_target_gradient(row.p(t[j]), row.delta(s[j], t[j]), loss);
                       }
                       narrow_block(gradient, n, grad_target + begin);
                     });
    }
    // The weights Q - P and P (D - loss) sum to 0 over a row, so the logits are taken from their
    // maximum: that changes the rounding only. A weight of 0 counts for nothing, whatever the
    // logit.
    if (input_temperature_out != nullptr) {
      double moment = 0;
      for_each_block(input, target, classes,
                     [&](const S* s, const S* t, int64_t n, int64_t) KDK_INLINED {
                       S sum = 0;
#pragma omp simd reduction(+ : sum)
                       for (int64_t j = 0; j < n; ++j) {
                         const S w = row.term(s[j], t[j]).difference;
                         sum += w == S(0) ? S(0) : w * (s[j] - found.input_max);
                       }
                       moment += sum;
                     });
      input_temperature_out[r] = static_cast<S>(-scale * input_inverse * input_inverse * moment);
    }
    if (target_temperature_out != nullptr) {
      double moment = 0;
      for_each_block(input, target, classes,
                     [&](const S* s, const S* t, int64_t n, int64_t) KDK_INLINED {
                       S sum = 0;
#pragma omp simd reduction(+ : sum)
                       for (int64_t j = 0; j < n; ++j) {
                         const S w = kl_target_gradient(row.p(t[j]), row.delta(s[j], t[j]), loss);
                         sum += w == S(0) ? S(0) : w * (t[j] - found.target_max);
                       }
                       moment += sum;
                     });
      target_temperature_out[r] = static_cast<S>(-scale * target_inverse * target_inverse * moment);
    }
  }
}

// Clones are made of plain functions only, one for each element type.
KDK_CLONES void rows_float32(const KlDivParams& p, int64_t b, int64_t e) {
  kl_div_rows<float>(p, b, e);
}
KDK_CLONES void rows_float16(const KlDivParams& p, int64_t b, int64_t e) {
  kl_div_rows<Float16>(p, b, e);
}
KDK_CLONES void rows_bfloat16(const KlDivParams& p, int64_t b, int64_t e) {
  kl_div_rows<BFloat16>(p, b, e);
}
KDK_CLONES void rows_float64(const KlDivParams& p, int64_t b, int64_t e) {
  kl_div_rows<double>(p, b, e);
}

}  // namespace

void kl_div(const KlDivParams& params, int threads) {
  auto* body = for_dtype(params.dtype, rows_float32, rows_float16, rows_bfloat16, rows_float64);
  for_each_run_of_rows(params.rows, params.classes, threads,
                       [&](int64_t begin, int64_t end) { body(params, begin, end); });
}

}  // namespace kdkernels::cpu
