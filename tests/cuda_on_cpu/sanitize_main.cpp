// The kernels under AddressSanitizer and UBSan, each tensor in an allocation of exactly its size.
//
// `program kernels` runs kl_div and scale_rows over shapes and alignments and compares with a
// double reference; of the other kernels, which the Python tests compare, it looks whether all they
// should write is finite. `program shared_overflow` and `program global_overflow` must be stopped
// by the sanitizer.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "kdkernels.h"

extern "C" int run_shared_overflow();
extern "C" int run_global_overflow(float* out);

using namespace kdkernels;

namespace {

struct Bits16 {
  uint16_t bits;
};

// bfloat16 keeps the values exact enough to read back with a shift; float16 is covered by the
// Python tests.
float get(float x) { return x; }
float get(Bits16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
void set(float& y, float x) { y = x; }
void set(Bits16& y, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  y.bits = static_cast<uint16_t>(bits >> 16);
}

// A matrix that begins `offset` elements after a 16-byte boundary and ends where its allocation
// does.
template <typename T>
struct Matrix {
  Matrix(int rows, int classes, int stride, int offset)
      : stride(stride),
        storage(offset + (rows - 1) * stride + classes),
        data(storage.data() + offset) {}
  T& at(int r, int j) { return data[r * stride + j]; }
  int stride;
  std::vector<T> storage;
  T* data;
};

int failures = 0;

void expect_close(const char* what, int classes, int j, double got, double want, double tolerance) {
  if (std::abs(got - want) <= tolerance) return;
  std::printf("%s, %d classes, class %d: %.9g, not %.9g\n", what, classes, j, got, want);
  ++failures;
}

template <typename T>
void check_kl_div(DType dtype, int classes, int padding, int input_offset, int other_offset,
                  bool everything) {
  constexpr int kRows = 2;
  const double input_temperature = 2, target_temperature = 3, scale = 0.5;
  Matrix<T> input(kRows, classes, classes + padding, input_offset);
  Matrix<T> target(kRows, classes, classes + padding, other_offset);
  Matrix<T> grad_input(kRows, classes, classes, input_offset);
  Matrix<T> grad_target(kRows, classes, classes, other_offset);
  std::vector<float> loss(kRows);
  uint32_t state = 1;
  const auto next = [&] {
    return static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-21f - 4;
  };
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < classes; ++j) {
      set(input.at(r, j), next());
      set(target.at(r, j), next());
    }
  }
  KlDivParams params{};
  params.input = input.data;
  params.target = target.data;
  params.loss = loss.data();
  params.grad_input = grad_input.data;
  params.grad_target = everything ? grad_target.data : nullptr;
  params.input_temperature_value = input_temperature;
  params.target_temperature_value = target_temperature;
  params.scale = scale;
  params.rows = kRows;
  params.classes = classes;
  params.input_stride = input.stride;
  params.target_stride = target.stride;
  params.dtype = dtype;
  if (const int error = cuda::kl_div(params, nullptr); error != 0) {
    std::printf("kl_div, %d classes: %s\n", classes, cuda::error_string(error));
    ++failures;
    return;
  }
  const double rounding = sizeof(T) == 2 ? 0x1p-8 : 1e-6;
  for (int r = 0; r < kRows; ++r) {
    double input_sum = 0, target_sum = 0, want = 0;
    for (int j = 0; j < classes; ++j) {
      input_sum += std::exp(get(input.at(r, j)) / input_temperature);
      target_sum += std::exp(get(target.at(r, j)) / target_temperature);
    }
    const auto log_q = [&](int j) {
      return get(input.at(r, j)) / input_temperature - std::log(input_sum);
    };
    const auto log_p = [&](int j) {
      return get(target.at(r, j)) / target_temperature - std::log(target_sum);
    };
    for (int j = 0; j < classes; ++j) want += std::exp(log_p(j)) * (log_p(j) - log_q(j));
    expect_close("loss", classes, -1, loss[r], scale * want, 1e-5 * want + 1e-7);
    for (int j = 0; j < classes; ++j) {
      const double p = std::exp(log_p(j)), q = std::exp(log_q(j));
      const double grad_q = scale * (q - p) / input_temperature;
      const double grad_p = scale * p * (log_p(j) - log_q(j) - want) / target_temperature;
      expect_close("grad_input", classes, j, get(grad_input.at(r, j)), grad_q,
                   rounding * std::abs(grad_q) + 1e-5 * (p + q));
      if (everything) {
        expect_close("grad_target", classes, j, get(grad_target.at(r, j)), grad_p,
                     rounding * std::abs(grad_p) + 1e-5 * p);
      }
    }
  }

  Matrix<T> before = grad_input;
  const std::vector<float> scales{2, -0.5f};
  ScaleRowsParams scaling{grad_input.data, scales.data(), kRows, classes, 1, dtype};
  if (cuda::scale_rows(scaling, nullptr) != 0) ++failures;
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < classes; ++j) {
      const double want = scales[r] * get(before.storage[input_offset + r * classes + j]);
      expect_close("scale_rows", classes, j, get(grad_input.at(r, j)), want, 0);
    }
  }
}

// Logits in [-4, 4).
struct Random {
  uint32_t state = 1;
  float operator()() {
    return static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-21f - 4;
  }
  template <typename T>
  void fill(Matrix<T>& matrix, int rows, int classes) {
    for (int r = 0; r < rows; ++r) {
      for (int j = 0; j < classes; ++j) set(matrix.at(r, j), (*this)());
    }
  }
};

// Row 1 is masked.
constexpr int kRows = 3;
const uint8_t kMask[kRows] = {1, 0, 1};

void expect_row(const char* what, int classes, int r, double value) {
  const bool right = kMask[r] != 0 ? std::isfinite(value) : value == 0;
  if (right) return;
  std::printf("%s, %d classes, row %d: %g\n", what, classes, r, value);
  ++failures;
}

template <typename T>
void expect_rows(const char* what, int classes, Matrix<T>& matrix) {
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < classes; ++j) expect_row(what, classes, r, get(matrix.at(r, j)));
  }
}

void expect_rows(const char* what, int classes, const std::vector<float>& values) {
  for (size_t n = 0; n < values.size(); ++n) expect_row(what, classes, n % kRows, values[n]);
}

void expect_success(const char* what, int classes, int error) {
  if (error == 0) return;
  std::printf("%s, %d classes: %s\n", what, classes, cuda::error_string(error));
  ++failures;
}

// Where the rows of each tensor start.
struct Layout {
  int padding, input_offset, target_offset, grad_offset;
};

template <typename T>
void check_logit_loss(DType dtype, int classes, Layout layout) {
  Matrix<T> input(kRows, classes, classes + layout.padding, layout.input_offset);
  Matrix<T> target(kRows, classes, classes + layout.padding, layout.target_offset);
  Random random;
  random.fill(input, kRows, classes);
  random.fill(target, kRows, classes);
  const std::vector<int64_t> labels{0, -1, classes - 1};
  for (int divergence = 0; divergence < 10; ++divergence) {
    for (const bool standardize : {false, true}) {
      Matrix<T> grad(kRows, classes, classes + layout.padding, layout.grad_offset);
      std::vector<float> loss(kRows), terms(kTerms * kRows), grad_temperature(kRows);
      LogitLossParams params{};
      params.input = input.data;
      params.target = target.data;
      params.labels = labels.data();
      params.mask = kMask;
      params.loss = loss.data();
      params.terms = terms.data();
      params.grad_input = grad.data;
      params.grad_input_temperature = grad_temperature.data();
      params.input_temperature_value = 2;
      params.target_temperature_value = 3;
      params.soft_scale_value = params.scale = 1;
      params.first = params.second = params.mix = 0.5;
      params.hard_weight = 0.5;
      params.label_smoothing = params.z_loss = 0.1;
      params.logit_mse = divergence == 9 ? 0 : 0.1;
      params.rows = kRows;
      params.classes = classes;
      params.input_stride = input.stride;
      params.target_stride = target.stride;
      params.grad_stride = grad.stride;
      params.divergence = static_cast<Divergence>(divergence);
      params.standardize = standardize;
      params.dtype = params.grad_dtype = dtype;
      expect_success("logit_loss", classes, cuda::logit_loss(params, nullptr));
      expect_rows("logit_loss: loss", classes, loss);
      expect_rows("logit_loss: terms", classes, terms);
      expect_rows("logit_loss: grad_input_temperature", classes, grad_temperature);
      expect_rows("logit_loss: grad_input", classes, grad);
    }
  }
}

template <typename T>
void check_topk_kl_div(DType dtype, int classes, Layout layout) {
  const int k = std::min(classes, 50);
  Matrix<T> input(kRows, classes, classes + layout.padding, layout.input_offset);
  Random random;
  random.fill(input, kRows, classes);
  std::vector<int64_t> indices(kRows * k);
  const std::vector<float> log_probs(kRows * k, -std::log(k + 1.0f));
  for (int n = 0; n < kRows * k; ++n) indices[n] = n / k == 1 ? -1 : classes - 1 - n % k;
  for (const Tail tail : {Tail::kBucket, Tail::kRenormalize, Tail::kDrop}) {
    Matrix<T> grad(kRows, classes, classes + layout.padding, layout.grad_offset);
    std::vector<float> loss(kRows), grad_temperature(kRows), grad_log_probs(kRows * k);
    TopkKlDivParams params{};
    params.input = input.data;
    params.log_probs = log_probs.data();
    params.indices = indices.data();
    params.mask = kMask;
    params.loss = loss.data();
    params.grad_input = grad.data;
    params.grad_log_probs = grad_log_probs.data();
    params.grad_input_temperature = grad_temperature.data();
    params.input_temperature_value = 2;
    params.scale = 1;
    params.rows = kRows;
    params.classes = classes;
    params.k = k;
    params.input_stride = input.stride;
    params.grad_stride = grad.stride;
    params.tail = tail;
    params.dtype = dtype;
    expect_success("topk_kl_div", classes, cuda::topk_kl_div(params, nullptr));
    expect_rows("topk_kl_div: loss", classes, loss);
    expect_rows("topk_kl_div: grad_input_temperature", classes, grad_temperature);
    expect_rows("topk_kl_div: grad_input", classes, grad);
    for (int n = 0; n < kRows * k; ++n) {
      expect_row("topk_kl_div: grad_log_probs", classes, n / k, grad_log_probs[n]);
    }
  }
}

template <typename T>
void check_multi_teacher_kl_div(DType dtype, int classes, Layout layout) {
  constexpr int kTeachers = 3;
  Matrix<T> input(kRows, classes, classes + layout.padding, layout.input_offset);
  std::vector<Matrix<T>> targets(
      kTeachers, Matrix<T>(kRows, classes, classes + layout.padding, layout.target_offset));
  Matrix<T> grad(kRows, classes, classes, layout.grad_offset);
  std::vector<float> loss(kRows), losses(kTeachers * kRows);
  Random random;
  random.fill(input, kRows, classes);
  MultiTeacherKlDivParams params{};
  params.input = input.data;
  for (int k = 0; k < kTeachers; ++k) {
    targets[k].data = targets[k].storage.data() + layout.target_offset;
    random.fill(targets[k], kRows, classes);
    params.targets[k] = targets[k].data;
    params.target_strides[k] = targets[k].stride;
    params.temperature_values[k] = 2 + k;
    params.weight_values[k] = 0.5;
  }
  const std::vector<uint8_t> teacher_mask{1, 1, 0};
  params.teacher_mask = teacher_mask.data();
  params.teacher_mask_strides[0] = 1;
  params.mask = kMask;
  params.loss = loss.data();
  params.losses = losses.data();
  params.grad_input = grad.data;
  params.rows = kRows;
  params.classes = classes;
  params.teachers = kTeachers;
  params.input_stride = input.stride;
  params.dtype = dtype;
  expect_success("multi_teacher_kl_div", classes, cuda::multi_teacher_kl_div(params, nullptr));
  expect_rows("multi_teacher_kl_div: loss", classes, loss);
  expect_rows("multi_teacher_kl_div: losses", classes, losses);
  expect_rows("multi_teacher_kl_div: grad_input", classes, grad);
}

// Maps of `channels` channels and 7 positions, or one; samples are the rows, one after another.
template <typename T>
void check_pool_mse(DType dtype, int channels, Layout layout) {
  for (const int positions : {1, 7}) {
    for (const bool channels_last : {false, true}) {
      const int elements = channels * positions, pieces = 2;
      Matrix<T> student(kRows, elements, elements, layout.input_offset);
      Matrix<T> teacher(kRows, elements, elements, layout.target_offset);
      Matrix<T> grad_student(kRows, elements, elements, layout.input_offset);
      Matrix<T> grad_teacher(kRows, elements, elements, layout.grad_offset);
      Matrix<T> pooled_student(kRows, channels, channels, 0);
      Matrix<T> pooled_teacher(kRows, channels, channels, 0);
      Random random;
      random.fill(student, kRows, elements);
      random.fill(teacher, kRows, elements);
      std::vector<float> mse(kRows * pieces);
      const std::vector<float> grad_mse(kRows, 1.0f);
      PoolMseParams params{};
      params.student = student.data;
      params.teacher = teacher.data;
      params.mask = kMask;
      params.pooled_student = pooled_student.data;
      params.pooled_teacher = pooled_teacher.data;
      params.mse = mse.data();
      params.batch = kRows;
      params.channels = channels;
      params.positions = positions;
      params.pieces = pieces;
      params.channels_last = channels_last;
      params.dtype = dtype;
      expect_success("pool_mse", channels, cuda::pool_mse(params, nullptr));
      expect_rows("pool_mse: pooled_student", channels, pooled_student);
      expect_rows("pool_mse: pooled_teacher", channels, pooled_teacher);
      for (int n = 0; n < kRows * pieces; ++n) {
        expect_row("pool_mse: mse", channels, n / pieces, mse[n]);
      }
      // Features that are finite serve as gradients of themselves.
      params.grad_pooled_student = pooled_student.data;
      params.grad_pooled_teacher = pooled_teacher.data;
      params.grad_mse = grad_mse.data();
      params.pooled_student = params.pooled_teacher = params.mse = nullptr;
      params.grad_student = grad_student.data;
      params.grad_teacher = grad_teacher.data;
      expect_success("pool_mse", channels, cuda::pool_mse(params, nullptr));
      expect_rows("pool_mse: grad_student", channels, grad_student);
      expect_rows("pool_mse: grad_teacher", channels, grad_teacher);
    }
  }
}

void check_sinkhorn(int n, int m, int d, int iterations, bool debias, Cost cost) {
  constexpr int kProblems = 2;
  Random random;
  const auto values = [&](int count) {
    std::vector<float> all(kProblems * count);
    for (float& value : all) value = 0.125f * (random() + 4);
    return all;
  };
  const std::vector<float> x = values(n * d), y = values(m * d), a = values(n), b = values(m);
  const std::vector<float> extra = values(n * m);
  const std::vector<float> extra_x(kProblems * n * n), extra_y(kProblems * m * m);
  std::vector<float> loss(kProblems), f(kProblems * n), g(kProblems * m), f_self(kProblems * n),
      g_self(kProblems * m), grad_x(kProblems * n * d), grad_y(kProblems * m * d),
      grad_a(kProblems * n), grad_b(kProblems * m), plan(kProblems * n * m),
      plan_x(kProblems * n * n), plan_y(kProblems * m * m);
  std::vector<double> scratch(kProblems * 3 + (kProblems * (n + m) * (d + 1) + 1) / 2);
  SinkhornParams params{};
  params.x = x.data(), params.y = y.data(), params.a = a.data(), params.b = b.data();
  params.extra = extra.data();
  params.loss = loss.data(), params.f = f.data(), params.g = g.data();
  params.grad_x = grad_x.data(), params.grad_y = grad_y.data();
  params.grad_a = grad_a.data(), params.grad_b = grad_b.data();
  params.plan = plan.data();
  if (debias) {
    params.extra_x = extra_x.data(), params.extra_y = extra_y.data();
    params.f_self = f_self.data(), params.g_self = g_self.data();
    params.plan_x = plan_x.data(), params.plan_y = plan_y.data();
    params.scratch = scratch.data();
  }
  params.epsilon = 0.05;
  params.rho = debias ? 0.7 : INFINITY;
  params.tol = -1;
  params.problems = kProblems;
  params.n = n, params.m = m, params.d = d;
  params.iterations = iterations;
  params.cost = cost;
  params.debias = debias;
  params.dtype = DType::kFloat32;
  expect_success("sinkhorn", n, cuda::sinkhorn(params, nullptr));
  for (const auto* out : {&loss, &f, &g, &grad_x, &grad_y, &grad_a, &grad_b, &plan}) {
    for (const float value : *out) {
      if (!std::isfinite(value)) ++failures;
    }
  }
}

template <typename T>
void check_others(DType dtype, int classes, Layout layout) {
  check_logit_loss<T>(dtype, classes, layout);
  check_topk_kl_div<T>(dtype, classes, layout);
  check_multi_teacher_kl_div<T>(dtype, classes, layout);
  check_pool_mse<T>(dtype, classes, layout);
}

}  // namespace

int main(int, char** arguments) {
  const std::string what = arguments[1];
  if (what == "shared_overflow") return run_shared_overflow();
  if (what == "global_overflow") {
    std::vector<float> out(32);
    return run_global_overflow(out.data());
  }
  for (const int classes : {1, 7, 33, 100, 256, 1000, 1024, 1029}) {
    for (const bool everything : {false, true}) {
      check_kl_div<float>(DType::kFloat32, classes, 0, 0, 0, everything);
      check_kl_div<float>(DType::kFloat32, classes, 4, 1, 1, everything);
      check_kl_div<float>(DType::kFloat32, classes, 3, 1, 2, everything);
      check_kl_div<Bits16>(DType::kBFloat16, classes, 0, 0, 0, everything);
      check_kl_div<Bits16>(DType::kBFloat16, classes, 0, 3, 3, everything);
      check_kl_div<Bits16>(DType::kBFloat16, classes, 1, 0, 5, everything);
    }
  }
  for (const int classes : {1, 7, 250, 1000, 1029}) {
    check_others<float>(DType::kFloat32, classes, {0, 0, 0, 0});
    check_others<float>(DType::kFloat32, classes, {4, 1, 1, 1});
    check_others<Bits16>(DType::kBFloat16, classes, {1, 3, 0, 5});
    check_others<Bits16>(DType::kBFloat16, classes, {8, 3, 3, 3});
  }
  for (const bool debias : {false, true}) {
    for (const Cost cost : {Cost::kSquaredEuclidean, Cost::kEuclidean, Cost::kCosine}) {
      check_sinkhorn(5, 9, 3, 24, debias, cost);
      check_sinkhorn(33, 1, 9, 20, debias, cost);
    }
  }
  check_sinkhorn(170, 174, 2, 3, true, Cost::kEuclidean);  // K is not kept
  std::printf("%d failures\n", failures);
  return failures != 0;
}
