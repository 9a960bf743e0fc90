// The Python module kdkernels._C: tensors, sizes and scalars in, params structs out. No Torch here:
// the callers in kdkernels/backend.py check and allocate, and one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_kernels.h"

namespace py = pybind11;

namespace kdkernels {

// Where a tensor's elements lie. Whatever has a data_ptr() is a tensor; None is no tensor.
struct Address {
  void* value = nullptr;
  template <typename T>
  operator T*() const {
    return static_cast<T*>(value);
  }
};

}  // namespace kdkernels

template <>
struct pybind11::detail::type_caster<kdkernels::Address> {
  PYBIND11_TYPE_CASTER(kdkernels::Address, const_name("Tensor | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    static PyObject* const name = PyUnicode_InternFromString("data_ptr");
    const object address = reinterpret_steal<object>(PyObject_CallMethodNoArgs(source.ptr(), name));
    if (!address) throw error_already_set();
    value.value = PyLong_AsVoidPtr(address.ptr());
    return true;
  }
};

namespace kdkernels {
namespace {

KlDivParams kl_div_params(int dtype, int64_t rows, int64_t classes, int64_t input_stride,
                          int64_t target_stride, Address input, Address target,
                          Address input_temperature, Address target_temperature,
                          double input_temperature_value, double target_temperature_value,
                          Address row_scale, double scale, Address mask, Address loss,
                          Address grad_input, Address grad_target, Address grad_input_temperature,
                          Address grad_target_temperature) {
  KlDivParams params;
  params.input = input;
  params.target = target;
  params.input_temperature = input_temperature;
  params.target_temperature = target_temperature;
  params.row_scale = row_scale;
  params.mask = mask;
  params.loss = loss;
  params.grad_input = grad_input;
  params.grad_target = grad_target;
  params.grad_input_temperature = grad_input_temperature;
  params.grad_target_temperature = grad_target_temperature;
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

LogitLossParams logit_loss_params(
    int dtype, int grad_dtype, int64_t rows, int64_t classes, int64_t input_stride,
    int64_t target_stride, int64_t grad_stride, Address input, Address target, Address labels,
    Address input_temperature, Address target_temperature, double input_temperature_value,
    double target_temperature_value, Address soft_scale, double soft_scale_value, Address row_scale,
    double scale, Address mask, int divergence, double first, double second, double mix,
    bool standardize, double hard_weight, double label_smoothing, double z_loss, double logit_mse,
    Address loss, Address terms, Address grad_input, Address grad_input_temperature) {
  LogitLossParams params;
  params.input = input;
  params.target = target;
  params.labels = labels;
  params.input_temperature = input_temperature;
  params.target_temperature = target_temperature;
  params.soft_scale = soft_scale;
  params.row_scale = row_scale;
  params.mask = mask;
  params.loss = loss;
  params.terms = terms;
  params.grad_input = grad_input;
  params.grad_input_temperature = grad_input_temperature;
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

// Of logit_loss: divergence, first, second, mix, standardize, hard_weight, label_smoothing, z_loss,
// logit_mse.
using LossOptions = std::tuple<int, double, double, double, bool, double, double, double, double>;
// dtype, grad_dtype, features, x_stride, weight_stride, x, weight, bias, grad_x, grad_weight,
// grad_bias.
using LinearSideOptions = std::tuple<int, int, int64_t, int64_t, int64_t, Address, Address, Address,
                                     Address, Address, Address>;

LinearSide linear_side(const LinearSideOptions& options) {
  const auto [dtype, grad_dtype, features, x_stride, weight_stride, x, weight, bias, grad_x,
              grad_weight, grad_bias] = options;
  return {x,
          weight,
          bias,
          grad_x,
          grad_weight,
          grad_bias,
          features,
          x_stride,
          weight_stride,
          static_cast<DType>(dtype),
          static_cast<DType>(grad_dtype)};
}

// Logits, their gradients and strides are the kernel's to set.
LogitLossParams loss_of_logits(const LossOptions& options) {
  const auto [divergence, first, second, mix, standardize, hard_weight, label_smoothing, z_loss,
              logit_mse] = options;
  LogitLossParams params = {};
  params.divergence = static_cast<Divergence>(divergence);
  params.first = first;
  params.second = second;
  params.mix = mix;
  params.standardize = standardize;
  params.hard_weight = hard_weight;
  params.label_smoothing = label_smoothing;
  params.z_loss = z_loss;
  params.logit_mse = logit_mse;
  return params;
}

SmallLinearLossParams small_linear_loss_params(
    int64_t rows, int64_t classes, Address labels, Address input_temperature,
    Address target_temperature, double input_temperature_value, double target_temperature_value,
    Address soft_scale, double soft_scale_value, Address row_scale, double scale,
    const LossOptions& options, const LossOptions& exchanged, Address loss, Address terms,
    Address grad_input_temperature, Address grad_target_temperature, const LinearSideOptions& input,
    const LinearSideOptions& target) {
  SmallLinearLossParams params = {{loss_of_logits(options), loss_of_logits(exchanged)},
                                  {linear_side(input), linear_side(target)}};
  for (LogitLossParams& each : params.losses) {
    each.labels = labels;
    each.soft_scale = soft_scale;
    each.soft_scale_value = soft_scale_value;
    each.row_scale = row_scale;
    each.scale = scale;
    each.rows = rows;
    each.classes = classes;
  }
  const Address temperatures[2] = {input_temperature, target_temperature};
  const double values[2] = {input_temperature_value, target_temperature_value};
  for (int i = 0; i < 2; ++i) {
    params.losses[i].input_temperature = temperatures[i];
    params.losses[i].target_temperature = temperatures[1 - i];
    params.losses[i].input_temperature_value = values[i];
    params.losses[i].target_temperature_value = values[1 - i];
  }
  params.losses[0].loss = loss;
  params.losses[0].terms = terms;
  params.losses[0].grad_input_temperature = grad_input_temperature;
  params.losses[1].grad_input_temperature = grad_target_temperature;
  return params;
}

TopkKlDivParams topk_kl_div_params(int dtype, int64_t rows, int64_t classes, int64_t k,
                                   int64_t input_stride, int64_t grad_stride, Address input,
                                   Address log_probs, Address indices, Address input_temperature,
                                   double input_temperature_value, Address row_scale, double scale,
                                   Address mask, int tail, Address loss, Address grad_input,
                                   Address grad_log_probs, Address grad_input_temperature) {
  TopkKlDivParams params;
  params.input = input;
  params.log_probs = log_probs;
  params.indices = indices;
  params.input_temperature = input_temperature;
  params.row_scale = row_scale;
  params.mask = mask;
  params.loss = loss;
  params.grad_input = grad_input;
  params.grad_log_probs = grad_log_probs;
  params.grad_input_temperature = grad_input_temperature;
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
    int dtype, int64_t rows, int64_t classes, int64_t input_stride, Address input,
    const std::vector<Address>& targets, const std::vector<int64_t>& target_strides,
    Address temperature, Strides temperature_strides, const std::vector<double>& temperature_values,
    Address weight, Strides weight_strides, const std::vector<double>& weight_values,
    Address teacher_mask, Strides teacher_mask_strides, Address mask, Address loss, Address losses,
    Address grad_input) {
  if (targets.size() > kMaxTeachers) throw std::invalid_argument("too many teachers");
  MultiTeacherKlDivParams params = {};
  params.input = input;
  for (size_t k = 0; k < targets.size(); ++k) {
    params.targets[k] = targets[k];
    params.target_strides[k] = target_strides[k];
    params.temperature_values[k] = temperature_values[k];
    params.weight_values[k] = weight_values[k];
  }
  params.temperature = temperature;
  params.weight = weight;
  params.teacher_mask = teacher_mask;
  params.mask = mask;
  params.loss = loss;
  params.losses = losses;
  params.grad_input = grad_input;
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
                              int64_t pieces, bool channels_last, Address student, Address teacher,
                              Address mask, Address grad_pooled_student,
                              Address grad_pooled_teacher, Address grad_mse, Address pooled_student,
                              Address pooled_teacher, Address mse, Address grad_student,
                              Address grad_teacher) {
  PoolMseParams params;
  params.student = student;
  params.teacher = teacher;
  params.mask = mask;
  params.grad_pooled_student = grad_pooled_student;
  params.grad_pooled_teacher = grad_pooled_teacher;
  params.grad_mse = grad_mse;
  params.pooled_student = pooled_student;
  params.pooled_teacher = pooled_teacher;
  params.mse = mse;
  params.grad_student = grad_student;
  params.grad_teacher = grad_teacher;
  params.batch = batch;
  params.channels = channels;
  params.positions = positions;
  params.pieces = pieces;
  params.channels_last = channels_last;
  params.dtype = static_cast<DType>(dtype);
  return params;
}

// dtype, problems, x_samples, y_samples, features, x_problem_stride, x_stride, y_problem_stride,
// y_stride, x, y, labels, x_weights, y_weights.
using Pair = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                        Address, Address, Address, Address, Address>;

PairParams pair_params(const Pair& pair, Address loss, Address grad_x, Address grad_y) {
  const auto [dtype, problems, x_samples, y_samples, features, x_problem_stride, x_stride,
              y_problem_stride, y_stride, x, y, labels, x_weights, y_weights] = pair;
  return {x,
          y,
          labels,
          x_weights,
          y_weights,
          loss,
          grad_x,
          grad_y,
          problems,
          x_samples,
          y_samples,
          features,
          x_problem_stride,
          x_stride,
          y_problem_stride,
          y_stride,
          static_cast<DType>(dtype)};
}

GaussianParams gaussian_params(const Pair& pair, int distance, double eps, int64_t min_samples,
                               Address loss, Address grad_x, Address grad_y) {
  return {pair_params(pair, loss, grad_x, grad_y), eps, min_samples,
          static_cast<GaussianDistance>(distance)};
}

MmdParams mmd_params(const Pair& pair, Address bandwidths, int64_t bandwidth_count, int kernel,
                     bool unbiased, Address loss, Address grad_x, Address grad_y) {
  return {pair_params(pair, loss, grad_x, grad_y), bandwidths, bandwidth_count,
          static_cast<MmdKernel>(kernel), unbiased};
}

MaskedFeatureLossParams masked_feature_loss_params(int dtype, int64_t samples, int64_t channels,
                                                   int64_t positions, Address student,
                                                   Address teacher, Address weight_map,
                                                   Address loss, Address grad_student,
                                                   Address squares) {
  return {student, teacher, weight_map, loss,      grad_student,
          squares, samples, channels,   positions, static_cast<DType>(dtype)};
}

SlicedWassersteinParams sliced_wasserstein_params(int dtype, int64_t rows, int64_t projections,
                                                  int64_t n, int64_t m, Address x, Address y,
                                                  Address x_weights, Address y_weights, double p,
                                                  Address loss, Address grad_x, Address grad_y) {
  SlicedWassersteinParams params;
  params.x = x;
  params.y = y;
  params.x_weights = x_weights;
  params.y_weights = y_weights;
  params.loss = loss;
  params.grad_x = grad_x;
  params.grad_y = grad_y;
  params.p = p;
  params.rows = rows;
  params.projections = projections;
  params.n = n;
  params.m = m;
  params.dtype = static_cast<DType>(dtype);
  return params;
}

ScaleRowsParams scale_rows_params(int dtype, int64_t rows, int64_t classes, Address grad,
                                  Address scale, int64_t scale_stride) {
  return {grad, scale, rows, classes, scale_stride, static_cast<DType>(dtype)};
}

Bf16LinearParams bf16_linear_params(int64_t rows, int64_t classes, int64_t features,
                                    int64_t x_stride, int64_t weight_stride, int64_t out_stride,
                                    Address x, Address weight, Address bias, Address out) {
  return {x, weight, bias, out, rows, classes, features, x_stride, weight_stride, out_stride};
}

// Three addresses each: of x and y, of x and x, of y and y.
using Three = std::array<Address, 3>;

SinkhornParams sinkhorn_params(int dtype, int64_t problems, int64_t n, int64_t m, int64_t d,
                               Address x, Address y, Address a, Address b, Three extra, int cost,
                               double epsilon, double rho, int iterations, double tol, bool debias,
                               Address loss, Address f, Address g, Address f_self, Address g_self,
                               Address grad_x, Address grad_y, Address grad_a, Address grad_b,
                               Three plan, Address scratch) {
  SinkhornParams params;
  params.x = x;
  params.y = y;
  params.a = a;
  params.b = b;
  params.extra = extra[0];
  params.extra_x = extra[1];
  params.extra_y = extra[2];
  params.loss = loss;
  params.f = f;
  params.g = g;
  params.f_self = f_self;
  params.g_self = g_self;
  params.grad_x = grad_x;
  params.grad_y = grad_y;
  params.grad_a = grad_a;
  params.grad_b = grad_b;
  params.plan = plan[0];
  params.plan_x = plan[1];
  params.plan_y = plan[2];
  params.scratch = scratch;
  params.epsilon = epsilon;
  params.rho = rho;
  params.tol = tol;
  params.problems = problems;
  params.n = n;
  params.m = m;
  params.d = d;
  params.iterations = iterations;
  params.cost = static_cast<Cost>(cost);
  params.debias = debias;
  params.dtype = static_cast<DType>(dtype);
  return params;
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
    const int error = run(make(args...), reinterpret_cast<void*>(stream));
    if (error != 0) throw std::runtime_error(std::string(name) + ": " + cuda::error_string(error));
  });
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of kdkernels.";
  bind_cpu(m, "cpu_coral", pair_params, cpu::coral);
  bind_cpu(m, "cpu_gaussian", gaussian_params, cpu::gaussian);
  bind_cpu(m, "cpu_kl_div", kl_div_params, cpu::kl_div);
  bind_cpu(m, "cpu_logit_loss", logit_loss_params, cpu::logit_loss);
  m.def("cpu_has_bf16_linear", cpu::has_bf16_linear);
  m.def("cpu_is_intel", cpu::is_intel);
  bind_cpu(m, "cpu_bf16_linear", bf16_linear_params, cpu::bf16_linear);
  m.def("cpu_count_labels", [](Address labels, int64_t rows, int64_t label) {
    return cpu::count_labels(labels, rows, label);
  });
  bind_cpu(m, "cpu_masked_feature_loss", masked_feature_loss_params, cpu::masked_feature_loss);
  bind_cpu(m, "cpu_mmd", mmd_params, cpu::mmd);
  bind_cpu(m, "cpu_multi_teacher_kl_div", multi_teacher_kl_div_params, cpu::multi_teacher_kl_div);
  bind_cpu(m, "cpu_pool_mse", pool_mse_params, cpu::pool_mse);
  m.def("cpu_prefer_huge_pages",
        [](Address begin, int64_t bytes) { cpu::prefer_huge_pages(begin, bytes); });
  bind_cpu(m, "cpu_topk_kl_div", topk_kl_div_params, cpu::topk_kl_div);
  bind_cpu(m, "cpu_scale_rows", scale_rows_params, cpu::scale_rows);
  bind_cpu(m, "cpu_sinkhorn", sinkhorn_params, cpu::sinkhorn);
  bind_cpu(m, "cpu_sliced_wasserstein", sliced_wasserstein_params, cpu::sliced_wasserstein);
  bind_cpu(m, "cpu_small_linear_loss", small_linear_loss_params, cpu::small_linear_loss);
  m.def("cpu_sum_of_rows", [](int dtype, Address rows, int64_t count, Address out) {
    cpu::sum_of_rows(static_cast<DType>(dtype), rows, count, out);
  });
  static const CpuKernels kernels{cpu::kl_div,
                                  cpu::logit_loss,
                                  cpu::multi_teacher_kl_div,
                                  cpu::topk_kl_div,
                                  cpu::small_linear_loss,
                                  cpu::coral,
                                  cpu::gaussian,
                                  cpu::mmd,
                                  cpu::scale_rows,
                                  cpu::sum_of_rows,
                                  cpu::count_labels,
                                  cpu::prefer_huge_pages};
  m.attr("cpu_kernels") = py::capsule(&kernels, kCpuKernels);
#ifdef KDKERNELS_WITH_CUDA
  bind_cuda(m, "cuda_kl_div", kl_div_params, cuda::kl_div);
  bind_cuda(m, "cuda_logit_loss", logit_loss_params, cuda::logit_loss);
  bind_cuda(m, "cuda_multi_teacher_kl_div", multi_teacher_kl_div_params,
            cuda::multi_teacher_kl_div);
  bind_cuda(m, "cuda_pool_mse", pool_mse_params, cuda::pool_mse);
  bind_cuda(m, "cuda_topk_kl_div", topk_kl_div_params, cuda::topk_kl_div);
  bind_cuda(m, "cuda_scale_rows", scale_rows_params, cuda::scale_rows);
  bind_cuda(m, "cuda_sinkhorn", sinkhorn_params, cuda::sinkhorn);
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}

}  // namespace kdkernels
