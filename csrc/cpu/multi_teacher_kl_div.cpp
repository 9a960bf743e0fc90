// Rows of a weighted sum of KL(P_k||Q_k) over teachers on the CPU; formulas in ../kdkernels.h, the
// row of one teacher in kl_row.h.
//
// A row's teachers are taken one after the other, while the student's row and its gradient stay in
// the caches. The gradient grows in a float row: its own place where it has that type, else one per
// thread, rounded once at the end.
//
// Where there are rows enough to pay for the memory, the student's exponentials e_j = exp(input_j /
// T - max) are made once for all teachers of one temperature. With z = (target - input) / T - c0,
// c0 a guess of c = lse(target / T) - lse(input / T), one sweep over a teacher gathers
//
//   E = sum e_j (e^z_j - 1),  A = sum e_j (z_j e^z_j - (e^z_j - 1))
//
// from which, with Z = sum e_j, S = Z + E and r = E / Z: c - c0 = log(1 + r), KL = A / S - (log(1 +
// r) - r / (1 + r)), and Q_j - P_j is (r e_j - e_j (e^z_j - 1)) / S. As in kl_row.h nothing cancels
// near P = Q, and a row in which some Q underflows or P / Q overflows takes the plain way.
//
// Threads take contiguous runs of rows, and each row is summed in one fixed order, so that results
// do not depend on their number.
#include "../kdkernels.h"
#include "kl_row.h"
#include "parallel.h"

namespace kdkernels::cpu {
namespace {

template <typename S>
KDK_INLINE double value_of(const void* tensor, const int64_t* strides, int64_t k, int64_t r,
                           const double* values) {
  return tensor == nullptr
             ? values[k]
             : static_cast<double>(static_cast<const S*>(tensor)[k * strides[0] + r * strides[1]]);
}

// The plain way.
template <typename T, typename S>
KDK_INLINE double add_plain(const T* input, const T* target, int64_t classes, S factor,
                            double scale, S* gradient) {
  const Sweep<S> found = plain_sweep(input, target, classes, factor, factor);
  if (gradient != nullptr) {
    const S each = static_cast<S>(scale);
    for_each_block(input, target, classes,
                   [&](const S* s, const S* t, int64_t n, int64_t begin) KDK_INLINED {
                     S* block = gradient + begin;
#pragma omp simd
                     for (int64_t j = 0; j < n; ++j)
                       block[j] += each * found.row.term(s[j], t[j]).difference;
                   });
  }
  return found.loss;
}

// That of kl_row.h, for a few rows.
template <typename T>
KDK_INLINE double add_teacher(const T* input, const T* target, int64_t classes, float factor,
                              double scale, Stash& stash, float* gradient) {
  FastRow fast{factor, factor, 0};
  FastSums sums;
  if (!fast_sweeps<false>(input, target, classes, fast, sums, stash)) {
    return add_plain(input, target, classes, factor, scale, gradient);
  }
  if (gradient != nullptr) {
    fast_gradient<false, true>(input, target, classes, fast, sums, scale, stash, gradient);
  }
  return sums.loss();
}

// The student's side for one temperature.
struct Student {
  Buffer<float> e;
  float factor = NAN;  // log2(e) / T, NaN before the first
  double sum;
  bool underflows;

  template <typename T>
  KDK_INLINE void make(const T* input, int64_t classes, float new_factor) {
    if (factor == new_factor) return;
    factor = new_factor;
    float max = -INFINITY, least = 1;
    for_each_block(input, classes, [&](const float* s, int64_t n, int64_t) KDK_INLINED {
#pragma omp simd reduction(max : max)
      for (int64_t j = 0; j < n; ++j) max = s[j] > max ? s[j] : max;
    });
    const float shift = max * new_factor;
    sum = 0;
    for_each_block(input, classes, [&](const float* s, int64_t n, int64_t begin) KDK_INLINED {
      float block_sum = 0;
      float* block = e.data() + begin;
#pragma omp simd reduction(+ : block_sum) reduction(min : least)
      for (int64_t j = 0; j < n; ++j) {
        const float x = exp2_above(s[j] * new_factor - shift);
        least = x < least ? x : least;
        block_sum += x;
        block[j] = x;
      }
      sum += block_sum;
    });
    underflows = !(least > kLeastExp2);
  }
};

// e^z - 1 and z e^z - (e^z - 1), for z = x ln 2 as in kl_row.h; the second is z (e^z - 1) - (e^z -
// 1
// - z), whose terms are of second order near 0.
struct Element {
  float minus_1, excess;
};

KDK_INLINE Element element_of(float x) {
  constexpr float kTwo = static_cast<float>(kLn2);
  const float shifted = x + kRound;
  const float k = shifted - kRound;
  const float f = x - k;
  const float power = power_of_two(shifted);
  const float g = f * kTwo;
  const float rest = power * (second_order_base2(f) * f * f) + (power - 1.0f) * (1.0f + g);
  const float minus_1 = rest + g;
  return {minus_1, x * kTwo * minus_1 - (rest - k * kTwo)};
}

struct TeacherSums {
  double E, A;
};

// One sweep with `guess`, c0 / ln 2, or with the first block's maxima for one where that is NaN.
// False where the row must go the plain way.
template <bool kStore, typename T>
KDK_INLINE bool sweep(const T* input, const T* target, int64_t classes, const Student& student,
                      float& guess, TeacherSums& sums, float* v) {
  sums = {0, 0};
  float largest = 0;
  for_each_block(input, target, classes,
                 [&](const float* s, const float* t, int64_t n, int64_t begin) KDK_INLINED {
                   if (begin == 0 && std::isnan(guess)) {
                     float s_max = -INFINITY, t_max = -INFINITY;
#pragma omp simd reduction(max : s_max, t_max)
                     for (int64_t j = 0; j < n; ++j) {
                       s_max = s[j] > s_max ? s[j] : s_max;
                       t_max = t[j] > t_max ? t[j] : t_max;
                     }
                     guess = (t_max - s_max) * student.factor;
                     if (far(guess)) largest = INFINITY;
                   }
                   const float factor = student.factor, shift = guess;
                   const float* e = student.e.data() + begin;
                   float difference = 0, excess = 0;
#pragma omp simd reduction(+ : difference, excess) reduction(max : largest)
                   for (int64_t j = 0; j < n; ++j) {
                     const float raw = (t[j] - s[j]) * factor - shift;
                     largest = raw > largest ? raw : largest;
                     const Element element =
                         element_of(-126.0f > raw ? -126.0f : raw);  // NaN stays
                     const float w = e[j] * element.minus_1;
                     difference += w;
                     excess += e[j] * element.excess;
                     if (kStore) v[begin + j] = w;
                   }
                   sums.E += difference, sums.A += excess;
                 });
  return largest < 100.0f;  // leaves room below the largest float for the sum of a row
}

template <bool kGradient, typename T>
KDK_INLINE double add_teacher(const T* input, const T* target, int64_t classes, float factor,
                              double scale, Student& student, float* v, float* gradient) {
  student.make(input, classes, factor);
  TeacherSums sums;
  float guess = NAN;
  bool good = false;
  // Until S has lost no more than a factor of 5 to the guess; the second guess is good.
  for (int attempt = 0; attempt < 2 && !student.underflows && !good; ++attempt) {
    if (!sweep<kGradient>(input, target, classes, student, guess, sums, v)) break;
    const double ratio = 1 + sums.E / student.sum;
    good = !(ratio < 0.2 || ratio > 50);  // NaN is a result too
    if (!good && !(ratio > 1e-5 && ratio < 1e30)) break;
    guess += static_cast<float>(std::log2(ratio));
  }
  if (!good) return add_plain(input, target, classes, factor, scale, gradient);
  const double r = sums.E / student.sum, S = student.sum + sums.E;
  if (kGradient) {
    const auto of_v = static_cast<float>(scale / S), of_e = static_cast<float>(scale / S * r);
    const float* e = student.e.data();
#pragma omp simd
    for (int64_t j = 0; j < classes; ++j) gradient[j] += of_e * e[j] - of_v * v[j];
  }
  return sums.A / S - (std::log1p(r) - r / (1 + r));
}

template <typename T>
KDK_INLINE void multi_teacher_rows(const MultiTeacherKlDivParams& params, int64_t begin_row,
                                   int64_t end_row) {
  using S = typename Statistics<T>::Type;
  constexpr bool kHalf = sizeof(T) < sizeof(S);
  auto* loss_out = static_cast<S*>(params.loss);
  auto* losses_out = static_cast<S*>(params.losses);
  const int64_t classes = params.classes;
  const bool has_gradient = params.grad_input != nullptr;
  // With this many rows a thread's rows are less than 1/30 of a float32 gradient, 1/10 of a half
  // one. The choice must not depend on the number of threads: the two ways may round differently.
  const bool shared = std::is_same<S, float>::value && params.rows >= 64;
  Stash stash;
  stash.shift.reserve(classes / kBlock + 1);
  Student student;
  student.e.reserve(shared ? classes : 0);
  Buffer<float> v;
  v.reserve(shared && has_gradient ? classes : 0);
  Buffer<S> sum_row;
  sum_row.reserve(kHalf && has_gradient ? classes : 0);

  for (int64_t r = begin_row; r < end_row; ++r) {
    T* grad_input = row_of<T>(params.grad_input, r, classes);
    S* gradient = grad_input == nullptr ? nullptr : block_of(grad_input, sum_row.data());
    if (gradient != nullptr) std::memset(gradient, 0, sizeof(S) * classes);
    const bool counts = params.mask == nullptr || params.mask[r] != 0;
    const T* input = static_cast<const T*>(params.input) + r * params.input_stride;
    student.factor = NAN;
    double total = 0;
    for (int64_t k = 0; k < params.teachers; ++k) {
      const int64_t* strides = params.teacher_mask_strides;
      double loss = 0;
      if (counts && (params.teacher_mask == nullptr ||
                     params.teacher_mask[k * strides[0] + r * strides[1]] != 0)) {
        const T* target = static_cast<const T*>(params.targets[k]) + r * params.target_strides[k];
        const double inverse = 1 / value_of<S>(params.temperature, params.temperature_strides, k, r,
                                               params.temperature_values);
        const double weight =
            value_of<S>(params.weight, params.weight_strides, k, r, params.weight_values);
        const S factor = static_cast<S>(inverse * kLog2E);
        const double scale = weight * inverse;
        if constexpr (std::is_same<S, double>::value) {
          loss = add_plain(input, target, classes, factor, scale, gradient);
        } else if (shared && has_gradient) {
          loss =
              add_teacher<true>(input, target, classes, factor, scale, student, v.data(), gradient);
        } else if (shared) {
          loss =
              add_teacher<false>(input, target, classes, factor, scale, student, nullptr, nullptr);
        } else {
          loss = add_teacher(input, target, classes, factor, scale, stash, gradient);
        }
        total += weight * loss;
      }
      if (losses_out != nullptr) losses_out[k * params.rows + r] = static_cast<S>(loss);
    }
    if (loss_out != nullptr) loss_out[r] = static_cast<S>(total);
    if (kHalf && has_gradient) {
      for (int64_t begin = 0; begin < classes; begin += kBlock) {
        narrow_block(gradient + begin, std::min(kBlock, classes - begin), grad_input + begin);
      }
    }
  }
}

using Params = MultiTeacherKlDivParams;
KDK_CLONES void rows_float32(const Params& p, int64_t b, int64_t e) {
  multi_teacher_rows<float>(p, b, e);
}
KDK_CLONES void rows_float16(const Params& p, int64_t b, int64_t e) {
  multi_teacher_rows<Float16>(p, b, e);
}
KDK_CLONES void rows_bfloat16(const Params& p, int64_t b, int64_t e) {
  multi_teacher_rows<BFloat16>(p, b, e);
}
KDK_CLONES void rows_float64(const Params& p, int64_t b, int64_t e) {
  multi_teacher_rows<double>(p, b, e);
}

}  // namespace

void multi_teacher_kl_div(const MultiTeacherKlDivParams& params, int threads) {
  auto* body = for_dtype(params.dtype, rows_float32, rows_float16, rows_bfloat16, rows_float64);
  for_each_run_of_rows(params.rows, params.classes * params.teachers, threads,
                       [&](int64_t begin, int64_t end) { body(params, begin, end); });
}

}  // namespace kdkernels::cpu
