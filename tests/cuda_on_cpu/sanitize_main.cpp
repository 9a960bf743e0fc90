// The kernels under AddressSanitizer and UBSan, each tensor in an allocation of exactly its size.
//
// `program kernels` runs kl_div and scale_rows over shapes and alignments and compares with a
// double reference; `program shared_overflow` and `program global_overflow` must be stopped by the
// sanitizer.
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
  std::printf("%d failures\n", failures);
  return failures != 0;
}
