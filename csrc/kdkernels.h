// Every native kernel on one page: what it computes, its parameters, its declaration.
//
// No kernel knows Torch: the caller checks, allocates and passes addresses, sizes and strides in
// elements. "Statistics" are float32, or float64 when dtype is kFloat64.
#pragma once

#include <cstdint>

namespace kdkernels {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };

// Row-wise KL divergence of tempered softmaxes, P from `target` and Q from `input`:
//
//   P = softmax(target / T_P), Q = softmax(input / T_Q), D = log P - log Q
//   loss           = scale sum_j P_j D_j
//   grad_input_j   = scale (Q_j - P_j) / T_Q
//   grad_target_j  = scale P_j (D_j - KL) / T_P  with KL = sum_j P_j D_j
//   grad_input_temperature  = -scale / T_Q  sum_j (Q_j - P_j) input_j / T_Q
//   grad_target_temperature = -scale / T_P  sum_j P_j (D_j - KL) target_j / T_P
//
// A null output is not computed. A row whose mask is 0 is not read: its outputs are 0.
struct KlDivParams {
  const void* input;               // (rows, classes), row stride input_stride, class stride 1
  const void* target;              // (rows, classes), row stride target_stride, class stride 1
  const void* input_temperature;   // (rows,) statistics, or null: input_temperature_value
  const void* target_temperature;  // (rows,) statistics, or null: target_temperature_value
  const void* row_scale;           // (rows,) statistics, or null: scale
  const uint8_t* mask;             // (rows,), or null: every row counts
  void* loss;                      // (rows,) statistics, or null
  void* grad_input;                // (rows, classes) contiguous, or null
  void* grad_target;               // (rows, classes) contiguous, or null
  void* grad_input_temperature;    // (rows,) statistics, or null
  void* grad_target_temperature;   // (rows,) statistics, or null
  double input_temperature_value;
  double target_temperature_value;
  double scale;
  int64_t rows;
  int64_t classes;
  int64_t input_stride;
  int64_t target_stride;
  DType dtype;
};

// grad[r, :] *= scale[r], in place. A row whose scale is exactly 1 is neither read nor written.
struct ScaleRowsParams {
  void* grad;         // (rows, classes) contiguous
  const void* scale;  // (rows,) statistics, stride scale_stride (0: one scalar for every row)
  int64_t rows;
  int64_t classes;
  int64_t scale_stride;
  DType dtype;
};

namespace cpu {
void kl_div(const KlDivParams& params, int threads);
void scale_rows(const ScaleRowsParams& params, int threads);
}  // namespace cpu

// Each returns a cudaError_t (0 is success); `stream` is a cudaStream_t. float64 is not taken.
namespace cuda {
int kl_div(const KlDivParams& params, void* stream);
int scale_rows(const ScaleRowsParams& params, void* stream);
const char* error_string(int error);
}  // namespace cuda

}  // namespace kdkernels
