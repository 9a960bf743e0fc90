// The Python module kdkernels._C: addresses, sizes and scalars in, params structs out. No Torch
// here: the callers in kdkernels/backend.py check and allocate, and one build serves every torch
// version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "../csrc/kdkernels.h"

namespace py = pybind11;

namespace kdkernels {
namespace {

template <typename T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

KlDivParams kl_div_params(int dtype, int64_t rows, int64_t classes, int64_t input_stride,
                          int64_t target_stride, uintptr_t input, uintptr_t target,
                          uintptr_t input_temperature, uintptr_t target_temperature,
                          double input_temperature_value, double target_temperature_value,
                          uintptr_t row_scale, double scale, uintptr_t mask, uintptr_t loss,
                          uintptr_t grad_input, uintptr_t grad_target,
                          uintptr_t grad_input_temperature, uintptr_t grad_target_temperature) {
  KlDivParams params;
  params.input = address<const void>(input);
  params.target = address<const void>(target);
  params.input_temperature = address<const void>(input_temperature);
  params.target_temperature = address<const void>(target_temperature);
  params.row_scale = address<const void>(row_scale);
  params.mask = address<const uint8_t>(mask);
  params.loss = address<void>(loss);
  params.grad_input = address<void>(grad_input);
  params.grad_target = address<void>(grad_target);
  params.grad_input_temperature = address<void>(grad_input_temperature);
  params.grad_target_temperature = address<void>(grad_target_temperature);
  params.input_temperature_value = input_temperature_value;
  params.target_temperature_value = target_temperature_value;
  params.scale = scale;
  params.rows = rows;
  params.classes = classes;
  params.input_stride = input_stride;
  params.target_stride = target_stride;
  params.dtype = static_cast<DType>(dtype);
  return params;
}

LogitLossParams logit_loss_params(int dtype, int grad_dtype, int64_t rows, int64_t classes,
                                  int64_t input_stride, int64_t target_stride, int64_t grad_stride,
                                  uintptr_t input, uintptr_t target, uintptr_t labels,
                                  uintptr_t input_temperature, uintptr_t target_temperature,
                                  double input_temperature_value, double target_temperature_value,
                                  uintptr_t soft_scale, double soft_scale_value,
                                  uintptr_t row_scale, double scale, uintptr_t mask, int divergence,
                                  double first, double second, double mix, bool standardize,
                                  double hard_weight, double label_smoothing, double z_loss,
                                  double logit_mse, uintptr_t loss, uintptr_t terms,
                                  uintptr_t grad_input, uintptr_t grad_input_temperature) {
  LogitLossParams params;
  params.input = address<const void>(input);
  params.target = address<const void>(target);
  params.labels = address<const int64_t>(labels);
  params.input_temperature = address<const void>(input_temperature);
  params.target_temperature = address<const void>(target_temperature);
  params.soft_scale = address<const void>(soft_scale);
  params.row_scale = address<const void>(row_scale);
  params.mask = address<const uint8_t>(mask);
  params.loss = address<void>(loss);
  params.terms = address<void>(terms);
  params.grad_input = address<void>(grad_input);
  params.grad_input_temperature = address<void>(grad_input_temperature);
  params.input_temperature_value = input_temperature_value;
  params.target_temperature_value = target_temperature_value;
  params.soft_scale_value = soft_scale_value;
  params.scale = scale;
  params.first = first;
  params.second = second;
  params.mix = mix;
  params.hard_weight = hard_weight;
  params.label_smoothing = label_smoothing;
  params.z_loss = z_loss;
  params.logit_mse = logit_mse;
  params.rows = rows;
  params.classes = classes;
  params.input_stride = input_stride;
  params.target_stride = target_stride;
  params.grad_stride = grad_stride;
  params.divergence = static_cast<Divergence>(divergence);
  params.standardize = standardize;
  params.dtype = static_cast<DType>(dtype);
  params.grad_dtype = static_cast<DType>(grad_dtype);
  return params;
}

TopkKlDivParams topk_kl_div_params(int dtype, int64_t rows, int64_t classes, int64_t k,
                                   int64_t input_stride, int64_t grad_stride, uintptr_t input,
                                   uintptr_t log_probs, uintptr_t indices,
                                   uintptr_t input_temperature, double input_temperature_value,
                                   uintptr_t row_scale, double scale, uintptr_t mask, int tail,
                                   uintptr_t loss, uintptr_t grad_input, uintptr_t grad_log_probs,
                                   uintptr_t grad_input_temperature) {
  TopkKlDivParams params;
  params.input = address<const void>(input);
  params.log_probs = address<const void>(log_probs);
  params.indices = address<const int64_t>(indices);
  params.input_temperature = address<const void>(input_temperature);
  params.row_scale = address<const void>(row_scale);
  params.mask = address<const uint8_t>(mask);
  params.loss = address<void>(loss);
  params.grad_input = address<void>(grad_input);
  params.grad_log_probs = address<void>(grad_log_probs);
  params.grad_input_temperature = address<void>(grad_input_temperature);
  params.input_temperature_value = input_temperature_value;
  params.scale = scale;
  params.rows = rows;
  params.classes = classes;
  params.k = k;
  params.input_stride = input_stride;
  params.grad_stride = grad_stride;
  params.tail = static_cast<Tail>(tail);
  params.dtype = static_cast<DType>(dtype);
  return params;
}

using Strides = std::array<int64_t, 2>;

// The vectors have an entry for each teacher.
MultiTeacherKlDivParams multi_teacher_kl_div_params(
    int dtype, int64_t rows, int64_t classes, int64_t input_stride, uintptr_t input,
    const std::vector<uintptr_t>& targets, const std::vector<int64_t>& target_strides,
    uintptr_t temperature, Strides temperature_strides,
    const std::vector<double>& temperature_values, uintptr_t weight, Strides weight_strides,
    const std::vector<double>& weight_values, uintptr_t teacher_mask, Strides teacher_mask_strides,
    uintptr_t mask, uintptr_t loss, uintptr_t losses, uintptr_t grad_input) {
  if (targets.size() > kMaxTeachers) throw std::invalid_argument("too many teachers");
  MultiTeacherKlDivParams params = {};
  params.input = address<const void>(input);
  for (size_t k = 0; k < targets.size(); ++k) {
    params.targets[k] = address<const void>(targets[k]);
    params.target_strides[k] = target_strides[k];
    params.temperature_values[k] = temperature_values[k];
    params.weight_values[k] = weight_values[k];
  }
  params.temperature = address<const void>(temperature);
  params.weight = address<const void>(weight);
  params.teacher_mask = address<const uint8_t>(teacher_mask);
  params.mask = address<const uint8_t>(mask);
  params.loss = address<void>(loss);
  params.losses = address<void>(losses);
  params.grad_input = address<void>(grad_input);
  std::copy_n(temperature_strides.begin(), 2, params.temperature_strides);
  std::copy_n(weight_strides.begin(), 2, params.weight_strides);
  std::copy_n(teacher_mask_strides.begin(), 2, params.teacher_mask_strides);
  params.rows = rows;
  params.classes = classes;
  params.teachers = static_cast<int64_t>(targets.size());
  params.input_stride = input_stride;
  params.dtype = static_cast<DType>(dtype);
  return params;
}

PoolMseParams pool_mse_params(int dtype, int64_t batch, int64_t channels, int64_t positions,
                              int64_t pieces, bool channels_last, uintptr_t student,
                              uintptr_t teacher, uintptr_t mask, uintptr_t grad_pooled_student,
                              uintptr_t grad_pooled_teacher, uintptr_t grad_mse,
                              uintptr_t pooled_student, uintptr_t pooled_teacher, uintptr_t mse,
                              uintptr_t grad_student, uintptr_t grad_teacher) {
  PoolMseParams params;
  params.student = address<const void>(student);
  params.teacher = address<const void>(teacher);
  params.mask = address<const uint8_t>(mask);
  params.grad_pooled_student = address<const void>(grad_pooled_student);
  params.grad_pooled_teacher = address<const void>(grad_pooled_teacher);
  params.grad_mse = address<const void>(grad_mse);
  params.pooled_student = address<void>(pooled_student);
  params.pooled_teacher = address<void>(pooled_teacher);
  params.mse = address<void>(mse);
  params.grad_student = address<void>(grad_student);
  params.grad_teacher = address<void>(grad_teacher);
  params.batch = batch;
  params.channels = channels;
  params.positions = positions;
  params.pieces = pieces;
  params.channels_last = channels_last;
  params.dtype = static_cast<DType>(dtype);
  return params;
}

GaussianParams gaussian_params(int dtype, int64_t problems, int64_t x_samples, int64_t y_samples,
                               int64_t features, int64_t x_problem_stride, int64_t x_stride,
                               int64_t y_problem_stride, int64_t y_stride, uintptr_t x, uintptr_t y,
                               uintptr_t labels, uintptr_t x_weights, uintptr_t y_weights,
                               int distance, double eps, int64_t min_samples, uintptr_t loss,
                               uintptr_t grad_x, uintptr_t grad_y) {
  GaussianParams params;
  params.x = address<const void>(x);
  params.y = address<const void>(y);
  params.labels = address<const int64_t>(labels);
  params.x_weights = address<const void>(x_weights);
  params.y_weights = address<const void>(y_weights);
  params.loss = address<void>(loss);
  params.grad_x = address<void>(grad_x);
  params.grad_y = address<void>(grad_y);
  params.eps = eps;
  params.min_samples = min_samples;
  params.problems = problems;
  params.x_samples = x_samples;
  params.y_samples = y_samples;
  params.features = features;
  params.x_problem_stride = x_problem_stride;
  params.x_stride = x_stride;
  params.y_problem_stride = y_problem_stride;
  params.y_stride = y_stride;
  params.distance = static_cast<GaussianDistance>(distance);
  params.dtype = static_cast<DType>(dtype);
  return params;
}

MmdParams mmd_params(int dtype, int64_t problems, int64_t x_samples, int64_t y_samples,
                     int64_t features, int64_t x_problem_stride, int64_t x_stride,
                     int64_t y_problem_stride, int64_t y_stride, uintptr_t x, uintptr_t y,
                     uintptr_t labels, uintptr_t x_weights, uintptr_t y_weights,
                     uintptr_t bandwidths, int64_t bandwidth_count, int kernel, bool unbiased,
                     uintptr_t loss, uintptr_t grad_x, uintptr_t grad_y) {
  MmdParams params;
  params.x = address<const void>(x);
  params.y = address<const void>(y);
  params.labels = address<const int64_t>(labels);
  params.x_weights = address<const void>(x_weights);
  params.y_weights = address<const void>(y_weights);
  params.bandwidths = address<const void>(bandwidths);
  params.loss = address<void>(loss);
  params.grad_x = address<void>(grad_x);
  params.grad_y = address<void>(grad_y);
  params.bandwidth_count = bandwidth_count;
  params.problems = problems;
  params.x_samples = x_samples;
  params.y_samples = y_samples;
  params.features = features;
  params.x_problem_stride = x_problem_stride;
  params.x_stride = x_stride;
  params.y_problem_stride = y_problem_stride;
  params.y_stride = y_stride;
  params.kernel = static_cast<MmdKernel>(kernel);
  params.unbiased = unbiased;
  params.dtype = static_cast<DType>(dtype);
  return params;
}

MaskedFeatureLossParams masked_feature_loss_params(int dtype, int64_t samples, int64_t channels,
                                                   int64_t positions, uintptr_t student,
                                                   uintptr_t teacher, uintptr_t weight_map,
                                                   uintptr_t loss, uintptr_t grad_student,
                                                   uintptr_t squares) {
  return {address<const void>(student),
          address<const void>(teacher),
          address<const void>(weight_map),
          address<void>(loss),
          address<void>(grad_student),
          address<void>(squares),
          samples,
          channels,
          positions,
          static_cast<DType>(dtype)};
}

SlicedWassersteinParams sliced_wasserstein_params(int dtype, int64_t rows, int64_t projections,
                                                  int64_t n, int64_t m, uintptr_t x, uintptr_t y,
                                                  uintptr_t x_weights, uintptr_t y_weights,
                                                  double p, uintptr_t loss, uintptr_t grad_x,
                                                  uintptr_t grad_y) {
  SlicedWassersteinParams params;
  params.x = address<const void>(x);
  params.y = address<const void>(y);
  params.x_weights = address<const void>(x_weights);
  params.y_weights = address<const void>(y_weights);
  params.loss = address<void>(loss);
  params.grad_x = address<void>(grad_x);
  params.grad_y = address<void>(grad_y);
  params.p = p;
  params.rows = rows;
  params.projections = projections;
  params.n = n;
  params.m = m;
  params.dtype = static_cast<DType>(dtype);
  return params;
}

ScaleRowsParams scale_rows_params(int dtype, int64_t rows, int64_t classes, uintptr_t grad,
                                  uintptr_t scale, int64_t scale_stride) {
  return {address<void>(grad), address<const void>(scale), rows, classes,
          scale_stride,        static_cast<DType>(dtype)};
}

Bf16LinearParams bf16_linear_params(int64_t rows, int64_t classes, int64_t features,
                                    int64_t x_stride, int64_t weight_stride, int64_t out_stride,
                                    uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out) {
  return {address<const void>(x),
          address<const void>(weight),
          address<const void>(bias),
          address<void>(out),
          rows,
          classes,
          features,
          x_stride,
          weight_stride,
          out_stride};
}

// Binds a kernel as `name(threads or stream, ...params)`; the interpreter's lock is given up while
// it runs.
template <typename Params, typename... Args>
void bind_cpu(py::module_& m, const char* name, Params (*make)(Args...),
              void (*run)(const Params&, int)) {
  m.def(name, [make, run](int threads, Args... args) {
    const py::gil_scoped_release unlocked;
    run(make(args...), threads);
  });
}

#ifdef KDKERNELS_WITH_CUDA
template <typename Params, typename... Args>
void bind_cuda(py::module_& m, const char* name, Params (*make)(Args...),
               int (*run)(const Params&, void*)) {
  m.def(name, [name, make, run](uintptr_t stream, Args... args) {
    const py::gil_scoped_release unlocked;
    const int error = run(make(args...), address<void>(stream));
    if (error != 0) throw std::runtime_error(std::string(name) + ": " + cuda::error_string(error));
  });
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of kdkernels.";
  bind_cpu(m, "cpu_gaussian", gaussian_params, cpu::gaussian);
  bind_cpu(m, "cpu_kl_div", kl_div_params, cpu::kl_div);
  bind_cpu(m, "cpu_logit_loss", logit_loss_params, cpu::logit_loss);
  m.def("cpu_has_bf16_linear", cpu::has_bf16_linear);
  bind_cpu(m, "cpu_bf16_linear", bf16_linear_params, cpu::bf16_linear);
  m.def("cpu_count_labels", [](uintptr_t labels, int64_t rows, int64_t label) {
    return cpu::count_labels(address<const int64_t>(labels), rows, label);
  });
  bind_cpu(m, "cpu_masked_feature_loss", masked_feature_loss_params, cpu::masked_feature_loss);
  bind_cpu(m, "cpu_mmd", mmd_params, cpu::mmd);
  bind_cpu(m, "cpu_multi_teacher_kl_div", multi_teacher_kl_div_params, cpu::multi_teacher_kl_div);
  bind_cpu(m, "cpu_pool_mse", pool_mse_params, cpu::pool_mse);
  bind_cpu(m, "cpu_topk_kl_div", topk_kl_div_params, cpu::topk_kl_div);
  bind_cpu(m, "cpu_scale_rows", scale_rows_params, cpu::scale_rows);
  bind_cpu(m, "cpu_sliced_wasserstein", sliced_wasserstein_params, cpu::sliced_wasserstein);
#ifdef KDKERNELS_WITH_CUDA
  bind_cuda(m, "cuda_kl_div", kl_div_params, cuda::kl_div);
  bind_cuda(m, "cuda_logit_loss", logit_loss_params, cuda::logit_loss);
  bind_cuda(m, "cuda_multi_teacher_kl_div", multi_teacher_kl_div_params,
            cuda::multi_teacher_kl_div);
  bind_cuda(m, "cuda_pool_mse", pool_mse_params, cuda::pool_mse);
  bind_cuda(m, "cuda_topk_kl_div", topk_kl_div_params, cuda::topk_kl_div);
  bind_cuda(m, "cuda_scale_rows", scale_rows_params, cuda::scale_rows);
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}

}  // namespace kdkernels
