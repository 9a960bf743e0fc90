// Common calls on a CPU without Python: checks, memory, kernel, and the node of autograd.
//
// A small batch's kernel takes less time than Python takes to reach it. What is here serves plain
// tensors and the usual options; for anything else a function gives None, and the caller goes its
// own way, which also says what is wrong. Built for one version of torch, whose name the module
// has (setup.py).
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu_kernels.h"

namespace kdkernels {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

const CpuKernels* kernels = nullptr;
constexpr int64_t kLarge = int64_t{1} << 25;  // as LARGE in kdkernels/backend.py

// The interpreter's lock, given up or taken while this lives.
struct WithoutLock {
  PyThreadState* state = PyEval_SaveThread();
  WithoutLock() = default;
  WithoutLock(const WithoutLock&) = delete;
  ~WithoutLock() { PyEval_RestoreThread(state); }
};
struct WithLock {
  PyGILState_STATE state = PyGILState_Ensure();
  WithLock() = default;
  WithLock(const WithLock&) = delete;
  ~WithLock() { PyGILState_Release(state); }
};

struct Decref {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Object = std::unique_ptr<PyObject, Decref>;

[[noreturn]] void raise() {
  python_error error;
  error.persist();
  throw error;
}

Object checked(PyObject* object) {
  if (object == nullptr) raise();
  return Object(object);
}

std::optional<DType> dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kDouble:
      return DType::kFloat64;
    default:
      return std::nullopt;
  }
}

at::ScalarType statistics_of(DType dtype) {
  return dtype == DType::kFloat64 ? at::kDouble : at::kFloat;
}

// The tensor behind `object` where it is a plain one on a CPU, and nothing (a mode, a transform,
// autocast, a tracer) is there to see what becomes of it.
const at::Tensor* plain(PyObject* object) {
  const auto type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != THPVariableClass && type != ParameterClass) return nullptr;
  const at::Tensor& x = THPVariable_Unpack(object);
  static const uint64_t known = (c10::DispatchKeySet(c10::DispatchKey::CPU) |
                                 c10::DispatchKeySet(c10::DispatchKey::AutogradCPU) |
                                 c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView) |
                                 c10::DispatchKeySet(c10::DispatchKey::BackendSelect))
                                    .raw_repr();
  const auto local = c10::impl::tls_local_dispatch_key_set();
  auto keys = (x.key_set() | local.included_) - local.excluded_;  // not const: torch 2.6
  return (keys.raw_repr() & ~known) == 0 && !x._fw_grad(0).defined() ? &x : nullptr;
}

struct Matrix {
  int64_t rows, classes, stride;
};

// (..., N) as rows of classes side by side, where that takes no copy.
std::optional<Matrix> matrix_of(const at::Tensor& x) {
  if (x.dim() == 0 || x.numel() == 0) return std::nullopt;
  const int64_t classes = x.size(-1), rows = x.numel() / classes;
  if (x.dim() == 2 && x.stride(1) == 1) return Matrix{rows, classes, x.stride(0)};
  if (x.is_contiguous()) return Matrix{rows, classes, classes};
  return std::nullopt;
}

// The shape without the last dimension.
at::IntArrayRef rows_of(const at::Tensor& x) { return x.sizes().slice(0, x.dim() - 1); }

std::optional<double> number_of(PyObject* object) {
  if (PyFloat_CheckExact(object)) return PyFloat_AS_DOUBLE(object);
  if (!PyLong_Check(object)) return std::nullopt;
  const double value = PyLong_AsDouble(object);
  if (value != -1.0 || PyErr_Occurred() == nullptr) return value;
  PyErr_Clear();
  return std::nullopt;
}

std::optional<double> temperature_of(PyObject* object) {
  const auto value = number_of(object);
  return value && *value > 0 && *value < INFINITY ? value : std::nullopt;
}

enum class Reduction { kNone, kSum, kBatchmean };

std::optional<Reduction> reduction_of(PyObject* object) {
  if (!PyUnicode_Check(object)) return std::nullopt;
  if (PyUnicode_CompareWithASCIIString(object, "batchmean") == 0) return Reduction::kBatchmean;
  if (PyUnicode_CompareWithASCIIString(object, "sum") == 0) return Reduction::kSum;
  if (PyUnicode_CompareWithASCIIString(object, "none") == 0) return Reduction::kNone;
  return std::nullopt;
}

void* address(const at::Tensor& x) { return x.defined() ? x.data_ptr() : nullptr; }

at::Tensor fresh(at::IntArrayRef shape, const at::TensorOptions& options) {
  at::Tensor out = at::empty(shape, options);
  const auto bytes = static_cast<int64_t>(out.nbytes());
  if (bytes >= kLarge) kernels->prefer_huge_pages(out.data_ptr(), bytes);
  return out;
}

void scale_in_place(at::Tensor& gradient, const at::Tensor& upstream) {
  const int64_t rows = upstream.numel();
  kernels->scale_rows({gradient.data_ptr(), upstream.data_ptr(), rows, gradient.numel() / rows,
                       upstream.dim() == 0 ? 0 : upstream.stride(0), *dtype_of(gradient)},
                      at::get_num_threads());
}

// The node of a loss. It keeps the gradients that the forward computed, which the first backward
// hands out where no graph of it is wanted; and how Python computes them otherwise, as
// again(arguments, inputs, needs, grad_output), `needs` and what it gives being of the first
// inputs. (A node of its own: one of torch's custom functions takes longer to set up.)
struct Loss final : torch::autograd::Node {
  variable_list gradients;            // of the first inputs; undefined where none is wanted
  std::vector<int> places;            // among the inputs, of those that autograd knows
  std::vector<SavedVariable> inputs;  // all of them: undefined for None; none when freed
  bool at_hand = true;
  Object again, arguments;

  ~Loss() override {
    if (!Py_IsInitialized()) {
      (void)again.release(), (void)arguments.release();
      return;
    }
    const WithLock lock;
    again.reset(), arguments.reset();
  }

  std::string name() const override { return "KDKernelsLossBackward"; }

  void release_variables() override { inputs.clear(); }

  variable_list apply(variable_list&& grads) override {
    at::Tensor upstream = grads[0].defined() ? grads[0] : input_metadata(0).zeros_like();
    variable_list found(places.size());
    if (at_hand && !at::GradMode::is_enabled()) {
      at_hand = false;
      at::Tensor scale = upstream.resolve_neg();
      if (scale.dim() > 1) scale = scale.reshape({-1});
      for (size_t i = 0; i < places.size(); ++i) {
        at::Tensor& gradient = gradients[places[i]];
        if (!gradient.defined()) continue;
        scale_in_place(gradient, scale);
        found[i] = std::move(gradient);
      }
      return found;
    }
    TORCH_CHECK(!inputs.empty(), torch::autograd::ERR_BACKWARD_TWICE);
    variable_list given;
    for (const SavedVariable& input : inputs) given.push_back(input.unpack());
    const WithLock lock;
    const auto count = static_cast<Py_ssize_t>(given.size());
    const Object all = checked(PyTuple_New(count));
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyTuple_SET_ITEM(all.get(), i, checked(THPVariable_Wrap(given[i])).release());
    }
    const Object needs = checked(PyList_New(static_cast<Py_ssize_t>(gradients.size())));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(needs.get()); ++i) {
      PyList_SET_ITEM(needs.get(), i, PyBool_FromLong(0));
    }
    for (size_t i = 0; i < places.size(); ++i) {
      PyList_SetItem(needs.get(), places[i], PyBool_FromLong(task_should_compute_output(i)));
    }
    const Object grad_output = checked(THPVariable_Wrap(upstream));
    const Object result = checked(PyObject_CallFunctionObjArgs(
        again.get(), arguments.get(), all.get(), needs.get(), grad_output.get(), nullptr));
    for (size_t i = 0; i < places.size(); ++i) {
      const Object gradient = checked(PySequence_GetItem(result.get(), places[i]));
      if (gradient.get() != Py_None) found[i] = THPVariable_Unpack(gradient.get());
    }
    return found;
  }
};

// torch holds nodes by one kind of pointer or the other, as its version has it.
template <typename Of>
auto new_node() {
  using Pointer = decltype(torch::autograd::Edge::function);
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<Of>();
  } else {
    return c10::make_intrusive<Of>();
  }
}

// The loss as Python has it, with its node where there are gradients, which are those of the first
// inputs. Of the call's args again() is given those from first to last.
PyObject* finish(variable_list inputs, variable_list gradients, at::Tensor loss, PyObject* again,
                 PyObject* const* args, Py_ssize_t first, Py_ssize_t last) {
  const auto wanted = [](const at::Tensor& gradient) { return gradient.defined(); };
  if (std::none_of(gradients.begin(), gradients.end(), wanted)) {
    return THPVariable_Wrap(std::move(loss));
  }
  auto node = new_node<Loss>();
  torch::autograd::edge_list edges;
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (!inputs[i].defined()) continue;
    edges.push_back(torch::autograd::impl::gradient_edge(inputs[i]));
    node->places.push_back(static_cast<int>(i));
  }
  node->set_next_edges(std::move(edges));
  node->inputs.reserve(inputs.size());
  for (const at::Tensor& input : inputs) node->inputs.emplace_back(input, false);
  node->gradients = std::move(gradients);
  node->arguments = checked(PyTuple_New(last - first));
  for (Py_ssize_t i = first; i < last; ++i) {
    Py_INCREF(args[i]);
    PyTuple_SET_ITEM(node->arguments.get(), i - first, args[i]);
  }
  Py_INCREF(again);
  node->again.reset(again);
  torch::autograd::set_history(loss, node);
  return THPVariable_Wrap(std::move(loss));
}

// Where a loss over rows goes: the rows' losses themselves, or their sum.
struct Rows {
  DType dtype;
  int64_t count;
  at::Tensor loss, many;
  double few[256];
  void* each = few;

  Rows(const at::Tensor& logits, Reduction reduction, int64_t rows, DType of)
      : dtype(of), count(rows) {
    const auto options = logits.options().dtype(statistics_of(dtype));
    if (reduction == Reduction::kNone) {
      loss = at::empty(rows_of(logits), options);
      each = loss.data_ptr();
      return;
    }
    loss = at::empty({}, options);
    if (rows > static_cast<int64_t>(sizeof(few) / sizeof(few[0]))) {
      many = at::empty({rows}, options);
      each = many.data_ptr();
    }
  }
  Rows(const Rows&) = delete;

  void reduce() const {
    if (each != loss.data_ptr()) kernels->sum_of_rows(dtype, each, count, loss.data_ptr());
  }
};

double scale_of(Reduction reduction, int64_t rows) {
  return reduction == Reduction::kBatchmean ? 1.0 / static_cast<double>(rows) : 1.0;
}

#define NOT_HERE Py_RETURN_NONE

// (student, teacher, temperature, teacher_temperature or None, reverse, reduction, again)
PyObject* kl_div(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const at::Tensor *student = plain(args[0]), *teacher = plain(args[1]);
  if (student == nullptr || teacher == nullptr) NOT_HERE;
  const auto dtype = dtype_of(*student);
  const auto q = matrix_of(*student), p = matrix_of(*teacher);
  const auto q_temperature = temperature_of(args[2]);
  const auto p_temperature = args[3] == Py_None ? q_temperature : temperature_of(args[3]);
  const auto reduction = reduction_of(args[5]);
  if (!dtype || !q || !p || !q_temperature || !p_temperature || !reduction ||
      !PyBool_Check(args[4]) || student->scalar_type() != teacher->scalar_type() ||
      student->sizes() != teacher->sizes()) {
    NOT_HERE;
  }
  const bool graph = at::GradMode::is_enabled();
  const bool needs[2] = {graph && student->requires_grad(), graph && teacher->requires_grad()};
  variable_list gradients(2);
  for (int i = 0; i < 2; ++i) {
    if (needs[i]) gradients[i] = fresh(student->sizes(), student->options());
  }
  Rows rows(*student, *reduction, q->rows, *dtype);
  KlDivParams params{};
  params.rows = q->rows;
  params.classes = q->classes;
  params.scale = scale_of(*reduction, q->rows);
  params.loss = rows.each;
  params.dtype = *dtype;
  params.input = student->data_ptr(), params.target = teacher->data_ptr();
  params.input_stride = q->stride, params.target_stride = p->stride;
  params.input_temperature_value = *q_temperature;
  params.target_temperature_value = *p_temperature;
  params.grad_input = address(gradients[0]), params.grad_target = address(gradients[1]);
  if (args[4] == Py_True) {
    std::swap(params.input, params.target);
    std::swap(params.input_stride, params.target_stride);
    std::swap(params.input_temperature_value, params.target_temperature_value);
    std::swap(params.grad_input, params.grad_target);
  }
  {
    const WithoutLock unlocked;
    kernels->kl_div(params, at::get_num_threads());
    rows.reduce();
  }
  return finish({*student, *teacher}, std::move(gradients), std::move(rows.loss), args[6], args, 2,
                6);
  END_HANDLE_TH_ERRORS
}

// Spec of kdkernels/ops/divergences.py.
struct Spec {
  double values[11];

  static std::optional<Spec> of(PyObject* tuple) {
    Spec spec;
    for (int i = 0; i < 11; ++i) {
      const auto value = number_of(PyTuple_GET_ITEM(tuple, i));
      if (!value) return std::nullopt;
      spec.values[i] = *value;
    }
    return spec;
  }
  Divergence divergence() const { return static_cast<Divergence>(static_cast<int32_t>(values[0])); }
  bool of_labels() const {
    return divergence() >= Divergence::kDecoupled && divergence() <= Divergence::kReverseNormalized;
  }
  bool reads_target() const { return divergence() != Divergence::kNone || values[10] != 0; }

  // What the kernel has of it.
  LogitLossParams params(int64_t classes, double input_temperature,
                         double target_temperature) const {
    LogitLossParams params{};
    const bool soft = divergence() != Divergence::kNone;
    params.input_temperature_value = soft ? input_temperature : 1.0;
    params.target_temperature_value = soft ? target_temperature : 1.0;
    params.divergence = divergence();
    params.first = values[1];
    params.second = of_labels() && classes == 2 ? 0.0 : values[2];
    params.mix = values[3];
    params.standardize = values[4] != 0;
    params.soft_scale_value = values[5];
    if (values[6] != 0) {
      params.soft_scale_value *= params.input_temperature_value * params.input_temperature_value;
    }
    params.hard_weight = values[7];
    params.label_smoothing = values[8];
    params.z_loss = values[9];
    params.logit_mse = values[10];
    return params;
  }
};

// Whether the labels of a call, None or (...) of `student` (..., N or D), are of a kind that is
// done here: int64, side by side, none of them ignored.
bool labels_fit(PyObject* object, PyObject* ignore, const Spec& spec, const at::Tensor& student,
                int64_t rows, const at::Tensor*& labels) {
  if (!PyLong_CheckExact(ignore)) return false;
  if (object == Py_None) {
    return !spec.of_labels() && spec.divergence() != Divergence::kStatistics;
  }
  labels = plain(object);
  const long ignore_index = PyLong_AsLong(ignore);
  if (ignore_index == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    return false;
  }
  return labels != nullptr && labels->scalar_type() == at::kLong && labels->is_contiguous() &&
         labels->sizes() == rows_of(student) &&
         kernels->count_labels(labels->const_data_ptr<int64_t>(), rows, ignore_index) == 0;
}

// (student, teacher, labels or None, spec, temperature, teacher_temperature or None, ignore_index,
// reduction, again); spec is that of kdkernels/ops/divergences.py.
PyObject* logit_loss(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const at::Tensor *student = plain(args[0]), *teacher = plain(args[1]);
  if (student == nullptr || teacher == nullptr) NOT_HERE;
  const auto dtype = dtype_of(*student);
  const auto q = matrix_of(*student), p = matrix_of(*teacher);
  const auto q_temperature = temperature_of(args[4]);
  const auto p_temperature = args[5] == Py_None ? q_temperature : temperature_of(args[5]);
  const auto reduction = reduction_of(args[7]);
  const auto spec = Spec::of(args[3]);
  const bool graph = at::GradMode::is_enabled();
  if (!dtype || !q || !p || !q_temperature || !p_temperature || !reduction ||
      student->scalar_type() != teacher->scalar_type() || student->sizes() != teacher->sizes() ||
      !spec || (graph && spec->reads_target() && teacher->requires_grad())) {
    NOT_HERE;
  }
  const at::Tensor* labels = nullptr;
  if (!labels_fit(args[2], args[6], *spec, *student, q->rows, labels)) NOT_HERE;

  variable_list gradients(1);
  if (graph && student->requires_grad()) gradients[0] = fresh(student->sizes(), student->options());
  Rows rows(*student, *reduction, q->rows, *dtype);
  LogitLossParams params = spec->params(q->classes, *q_temperature, *p_temperature);
  params.rows = q->rows;
  params.classes = params.grad_stride = q->classes;
  params.input = student->data_ptr(), params.input_stride = q->stride;
  // What is not read is not kept either.
  const at::Tensor target = spec->reads_target() ? *teacher : at::Tensor();
  params.target = address(target), params.target_stride = p->stride;
  if (labels != nullptr) params.labels = labels->const_data_ptr<int64_t>();
  params.scale = scale_of(*reduction, q->rows);
  params.loss = rows.each;
  params.grad_input = address(gradients[0]);
  params.dtype = params.grad_dtype = *dtype;
  try {
    const WithoutLock unlocked;
    kernels->logit_loss(params, at::get_num_threads());
    rows.reduce();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  return finish({*student, target, labels == nullptr ? at::Tensor() : *labels},
                std::move(gradients), std::move(rows.loss), args[8], args, 3, 8);
  END_HANDLE_TH_ERRORS
}

// One side of a linear loss: hidden states, head and bias (None: undefined), from args on.
struct Side {
  at::Tensor tensors[3];
  Matrix x, weight;

  // False where it is not done here.
  bool take(PyObject* const* args) {
    for (int i = 0; i < 3; ++i) {
      if (args[i] == Py_None && i == 2) continue;
      const at::Tensor* tensor = plain(args[i]);
      if (tensor == nullptr) return false;
      tensors[i] = *tensor;
    }
    const auto of_x = matrix_of(tensors[0]), of_weight = matrix_of(tensors[1]);
    if (!of_x || !of_weight || tensors[1].dim() != 2) return false;
    x = *of_x, weight = *of_weight;
    const at::Tensor& bias = tensors[2];
    return tensors[0].scalar_type() == tensors[1].scalar_type() && x.classes == weight.classes &&
           (!bias.defined() || (bias.scalar_type() == tensors[0].scalar_type() && bias.dim() == 1 &&
                                bias.numel() == weight.rows && bias.is_contiguous()));
  }

  LinearSide params(DType dtype, const at::Tensor* gradients) const {
    return {address(tensors[0]),
            address(tensors[1]),
            address(tensors[2]),
            address(gradients[0]),
            address(gradients[1]),
            address(gradients[2]),
            x.classes,
            x.stride,
            weight.stride,
            dtype,
            dtype};
  }
};

// Classes, multiplications and logits of a call that kdkernels/ops/linear_loss.py gives to the one
// kernel on any machine: SMALL_HEAD, _FEW, and logits that any last cache holds.
constexpr int64_t kSmallHead = 4096, kFew = int64_t{1} << 23, kFewLogits = int64_t{1} << 16;

// (student, weight, bias or None, teacher, teacher_weight, teacher_bias or None, labels or None,
// spec.exchanged(), spec, temperature, teacher_temperature or None, ignore_index, reduction, again)
PyObject* linear_loss(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  Side student, teacher;
  if (!student.take(args) || !teacher.take(args + 3)) NOT_HERE;
  const auto dtype = dtype_of(student.tensors[0]);
  const auto q_temperature = temperature_of(args[9]);
  const auto p_temperature = args[10] == Py_None ? q_temperature : temperature_of(args[10]);
  const auto reduction = reduction_of(args[12]);
  const int64_t rows = student.x.rows, classes = student.weight.rows;
  if (!dtype || *dtype == DType::kFloat16 || !q_temperature || !p_temperature || !reduction ||
      *reduction == Reduction::kNone ||
      student.tensors[0].scalar_type() != teacher.tensors[0].scalar_type() ||
      rows_of(student.tensors[0]) != rows_of(teacher.tensors[0]) ||
      classes != teacher.weight.rows || classes > kSmallHead || rows * classes > kFewLogits ||
      rows * classes * (student.x.classes + teacher.x.classes) > kFew ||
      (args[1] == args[4] && args[2] == args[5])) {  // one head for both has one gradient
    NOT_HERE;
  }
  const auto exchanged = Spec::of(args[7]), spec = Spec::of(args[8]);
  const at::Tensor* labels = nullptr;
  if (!spec || !exchanged || !spec->reads_target() ||
      !labels_fit(args[6], args[11], *spec, student.tensors[0], rows, labels)) {
    NOT_HERE;
  }

  const bool graph = at::GradMode::is_enabled();
  variable_list inputs, gradients(6);
  for (int i = 0; i < 6; ++i) {
    inputs.push_back((i < 3 ? student : teacher).tensors[i % 3]);
    const at::Tensor& x = inputs[i];
    if (!graph || !x.defined() || !x.requires_grad()) continue;
    const auto summed = i % 3 == 2 ? statistics_of(*dtype) : x.scalar_type();
    gradients[i] = at::empty(x.sizes(), x.options().dtype(summed));
  }
  inputs.push_back(labels == nullptr ? at::Tensor() : *labels);
  Rows sum(student.tensors[0], *reduction, rows, *dtype);
  SmallLinearLossParams params{};
  params.losses[0] = spec->params(classes, *q_temperature, *p_temperature);
  params.losses[1] = exchanged->params(classes, *p_temperature, *q_temperature);
  params.losses[1].soft_scale_value = params.losses[0].soft_scale_value;  // of the student's T
  for (LogitLossParams& each : params.losses) {
    each.rows = rows;
    each.classes = classes;
    each.scale = scale_of(*reduction, rows);
    if (labels != nullptr) each.labels = labels->const_data_ptr<int64_t>();
  }
  params.losses[0].loss = sum.each;
  params.sides[0] = student.params(*dtype, gradients.data());
  params.sides[1] = teacher.params(*dtype, gradients.data() + 3);
  try {
    const WithoutLock unlocked;
    kernels->small_linear_loss(params, at::get_num_threads());
    sum.reduce();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  for (int i = 0; i < 6; ++i) {
    if (gradients[i].defined()) gradients[i] = gradients[i].to(inputs[i].scalar_type());
  }
  return finish(std::move(inputs), std::move(gradients), std::move(sum.loss), args[13], args, 8,
                13);
  END_HANDLE_TH_ERRORS
}

// A number for each of `count` teachers: one for all, or a list or tuple of as many.
bool numbers_of(PyObject* object, Py_ssize_t count, double* values) {
  const bool many = PyList_CheckExact(object) || PyTuple_CheckExact(object);
  if (many && PySequence_Fast_GET_SIZE(object) != count) return false;
  for (Py_ssize_t k = 0; k < count; ++k) {
    const auto value = number_of(many ? PySequence_Fast_GET_ITEM(object, k) : object);
    if (!value) return false;
    values[k] = *value;
  }
  return true;
}

// (student, teachers, weights or None, temperatures, reduction, again)
PyObject* multi_teacher_kl_div(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const at::Tensor* student = plain(args[0]);
  if (student == nullptr || !(PyList_CheckExact(args[1]) || PyTuple_CheckExact(args[1]))) NOT_HERE;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(args[1]);
  const auto dtype = dtype_of(*student);
  const auto q = matrix_of(*student);
  const auto reduction = reduction_of(args[4]);
  MultiTeacherKlDivParams params{};
  if (!dtype || !q || !reduction || count < 1 || count > kMaxTeachers ||
      !numbers_of(args[3], count, params.temperature_values)) {
    NOT_HERE;
  }
  const double scale = scale_of(*reduction, q->rows);
  if (args[2] == Py_None) {
    std::fill_n(params.weight_values, count, 1.0);
  } else if (!(PyList_CheckExact(args[2]) || PyTuple_CheckExact(args[2])) ||
             !numbers_of(args[2], count, params.weight_values)) {
    NOT_HERE;
  }
  const bool graph = at::GradMode::is_enabled();
  variable_list inputs{*student};
  for (Py_ssize_t k = 0; k < count; ++k) {
    const at::Tensor* teacher = plain(PySequence_Fast_GET_ITEM(args[1], k));
    const auto p = teacher == nullptr ? std::nullopt : matrix_of(*teacher);
    const double temperature = params.temperature_values[k];
    if (!p || teacher->scalar_type() != student->scalar_type() ||
        teacher->sizes() != student->sizes() || (graph && teacher->requires_grad()) ||
        !(temperature > 0 && temperature < INFINITY)) {
      NOT_HERE;
    }
    params.targets[k] = teacher->data_ptr();
    params.target_strides[k] = p->stride;
    params.weight_values[k] *= scale;
    inputs.push_back(*teacher);
  }
  variable_list gradients(1);
  if (graph && student->requires_grad()) gradients[0] = fresh(student->sizes(), student->options());
  Rows rows(*student, *reduction, q->rows, *dtype);
  params.input = student->data_ptr();
  params.loss = rows.each;
  params.grad_input = address(gradients[0]);
  params.rows = q->rows;
  params.classes = q->classes;
  params.teachers = count;
  params.input_stride = q->stride;
  params.dtype = *dtype;
  {
    const WithoutLock unlocked;
    kernels->multi_teacher_kl_div(params, at::get_num_threads());
    rows.reduce();
  }
  return finish(std::move(inputs), std::move(gradients), std::move(rows.loss), args[5], args, 2, 5);
  END_HANDLE_TH_ERRORS
}

// (student, log_probs, indices, temperature, tail, reduction, again); tail is a Tail.
PyObject* topk_kl_div(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const at::Tensor *student = plain(args[0]), *log_probs = plain(args[1]),
                   *indices = plain(args[2]);
  if (student == nullptr || log_probs == nullptr || indices == nullptr) NOT_HERE;
  const auto dtype = dtype_of(*student);
  const auto q = matrix_of(*student);
  const auto temperature = temperature_of(args[3]);
  const auto tail = number_of(args[4]);
  const auto reduction = reduction_of(args[5]);
  if (!dtype || !q || !temperature || !tail || !reduction ||
      log_probs->scalar_type() != statistics_of(*dtype) || indices->scalar_type() != at::kLong ||
      !log_probs->is_contiguous() || !indices->is_contiguous() || log_probs->dim() == 0 ||
      log_probs->numel() == 0 || log_probs->size(-1) > q->classes ||
      rows_of(*log_probs) != rows_of(*student) || indices->sizes() != log_probs->sizes()) {
    NOT_HERE;
  }
  variable_list inputs{*student, *log_probs, *indices}, gradients(2);
  for (int i = 0; i < 2; ++i) {
    if (at::GradMode::is_enabled() && inputs[i].requires_grad()) {
      gradients[i] = fresh(inputs[i].sizes(), inputs[i].options());
    }
  }
  Rows rows(*student, *reduction, q->rows, *dtype);
  TopkKlDivParams params{};
  params.input = student->data_ptr();
  params.log_probs = log_probs->data_ptr();
  params.indices = indices->const_data_ptr<int64_t>();
  params.loss = rows.each;
  params.grad_input = address(gradients[0]);
  params.grad_log_probs = address(gradients[1]);
  params.input_temperature_value = *temperature;
  params.scale = scale_of(*reduction, q->rows);
  params.rows = q->rows;
  params.classes = params.grad_stride = q->classes;
  params.k = log_probs->size(-1);
  params.input_stride = q->stride;
  params.tail = static_cast<Tail>(static_cast<int32_t>(*tail));
  params.dtype = *dtype;
  try {
    const WithoutLock unlocked;
    kernels->topk_kl_div(params, at::get_num_threads());
    rows.reduce();
  } catch (const std::invalid_argument&) {
    NOT_HERE;  // a wrong index, which Python names
  }
  return finish(std::move(inputs), std::move(gradients), std::move(rows.loss), args[6], args, 3, 6);
  END_HANDLE_TH_ERRORS
}

struct Problems {
  int64_t count, samples, problem_stride, stride;
};

// (..., n, d) as problems of samples with features side by side, where that takes no copy.
std::optional<Problems> problems_of(const at::Tensor& x) {
  if (x.dim() < 2 || x.numel() == 0 || x.stride(-1) != 1) return std::nullopt;
  const int64_t samples = x.size(-2), count = x.numel() / samples / x.size(-1);
  if (x.dim() == 2) return Problems{1, samples, 0, x.stride(0)};
  if (x.dim() == 3) return Problems{count, samples, x.stride(0), x.stride(1)};
  if (x.is_contiguous()) {  // whatever the strides of dimensions of one are
    return Problems{count, samples, samples * x.size(-1), x.size(-1)};
  }
  return std::nullopt;
}

// (x, y, labels or None, options, again), checked as `native_distance` has them; run(options, pair)
// gives whether the options are of a kind that is done here.
template <typename Run>
PyObject* distance(PyObject* const* args, const Run& run) {
  HANDLE_TH_ERRORS
  const at::Tensor *x = plain(args[0]), *y = plain(args[1]);
  if (x == nullptr || y == nullptr) NOT_HERE;
  const auto dtype = dtype_of(*x);
  const auto of_x = problems_of(*x), of_y = problems_of(*y);
  const bool graph = at::GradMode::is_enabled();
  const bool needs[2] = {graph && x->requires_grad(), graph && y->requires_grad()};
  // float16 has no range for a gradient that is still to meet its upstream gradient.
  if (!dtype || !of_x || !of_y || (*dtype == DType::kFloat16 && (needs[0] || needs[1]))) NOT_HERE;
  at::Tensor labels;
  if (args[2] != Py_None) {
    const at::Tensor* of_classes = plain(args[2]);
    if (of_classes == nullptr || of_classes->scalar_type() != at::kLong ||
        !of_classes->is_contiguous()) {
      NOT_HERE;
    }
    labels = *of_classes;
  }
  variable_list gradients(2);
  if (needs[0]) gradients[0] = fresh(x->sizes(), x->options());
  if (needs[1]) gradients[1] = fresh(y->sizes(), y->options());
  at::Tensor loss =
      at::empty(x->sizes().slice(0, x->dim() - 2), x->options().dtype(statistics_of(*dtype)));
  const PairParams pair{x->data_ptr(),
                        y->data_ptr(),
                        static_cast<const int64_t*>(address(labels)),
                        nullptr,
                        nullptr,
                        loss.data_ptr(),
                        address(gradients[0]),
                        address(gradients[1]),
                        of_x->count,
                        of_x->samples,
                        of_y->samples,
                        x->size(-1),
                        of_x->problem_stride,
                        of_x->stride,
                        of_y->problem_stride,
                        of_y->stride,
                        *dtype};
  if (!run(args[3], pair)) NOT_HERE;
  return finish({*x, *y, labels}, std::move(gradients), std::move(loss), args[4], args, 3, 4);
  END_HANDLE_TH_ERRORS
}

std::optional<double> option(PyObject* options, Py_ssize_t i) {
  return number_of(PyTuple_GET_ITEM(options, i));
}

PyObject* coral(PyObject*, PyObject* const* args, Py_ssize_t) {
  return distance(args, [](PyObject*, const PairParams& pair) {
    const WithoutLock unlocked;
    kernels->coral(pair, at::get_num_threads());
    return true;
  });
}

PyObject* gaussian(PyObject*, PyObject* const* args, Py_ssize_t) {
  return distance(args, [](PyObject* options, const PairParams& pair) {
    const auto which = option(options, 0), eps = option(options, 1), least = option(options, 2);
    if (!which || !eps || !least || !(*least < 1e18)) return false;
    const GaussianParams params{pair, *eps, static_cast<int64_t>(*least),
                                static_cast<GaussianDistance>(static_cast<int32_t>(*which))};
    const WithoutLock unlocked;
    kernels->gaussian(params, at::get_num_threads());
    return true;
  });
}

PyObject* mmd(PyObject*, PyObject* const* args, Py_ssize_t) {
  return distance(args, [](PyObject* options, const PairParams& pair) {
    const auto which = option(options, 1), unbiased = option(options, 2);
    if (!which || !unbiased) return false;
    MmdParams params{pair, nullptr, 0, static_cast<MmdKernel>(static_cast<int32_t>(*which)),
                     *unbiased != 0};
    if (PyTuple_GET_ITEM(options, 0) != Py_None) {
      const at::Tensor* bandwidths = plain(PyTuple_GET_ITEM(options, 0));
      if (bandwidths == nullptr || bandwidths->scalar_type() != statistics_of(pair.dtype) ||
          !bandwidths->is_contiguous()) {
        return false;
      }
      params.bandwidths = bandwidths->data_ptr();
      params.bandwidth_count = bandwidths->numel();
    }
    const WithoutLock unlocked;
    kernels->mmd(params, at::get_num_threads());
    return true;
  });
}

// Calls come from kdkernels/ops alone, with as many arguments as they have here.
PyMethodDef methods[] = {
    {"kl_div", reinterpret_cast<PyCFunction>(kl_div), METH_FASTCALL, nullptr},
    {"logit_loss", reinterpret_cast<PyCFunction>(logit_loss), METH_FASTCALL, nullptr},
    {"multi_teacher_kl_div", reinterpret_cast<PyCFunction>(multi_teacher_kl_div), METH_FASTCALL,
     nullptr},
    {"topk_kl_div", reinterpret_cast<PyCFunction>(topk_kl_div), METH_FASTCALL, nullptr},
    {"linear_loss", reinterpret_cast<PyCFunction>(linear_loss), METH_FASTCALL, nullptr},
    {"coral", reinterpret_cast<PyCFunction>(coral), METH_FASTCALL, nullptr},
    {"gaussian", reinterpret_cast<PyCFunction>(gaussian), METH_FASTCALL, nullptr},
    {"mmd", reinterpret_cast<PyCFunction>(mmd), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      KDKERNELS_CALLS,
                      nullptr,
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace
}  // namespace kdkernels

#define INIT_OF(name) PyInit_##name
#define INIT(name) INIT_OF(name)

PyMODINIT_FUNC INIT(KDKERNELS_CALLS_NAME)() {
  using kdkernels::kCpuKernels;
  PyObject* native = PyImport_ImportModule("kdkernels._C");
  if (native == nullptr) return nullptr;
  PyObject* capsule = PyObject_GetAttrString(native, "cpu_kernels");
  Py_DECREF(native);
  if (capsule == nullptr) return nullptr;
  if (PyCapsule_IsValid(capsule, kCpuKernels)) {
    kdkernels::kernels =
        static_cast<const kdkernels::CpuKernels*>(PyCapsule_GetPointer(capsule, kCpuKernels));
  } else {
    PyErr_SetString(PyExc_ImportError,
                    "kdkernels." KDKERNELS_CALLS
                    " was built with another kdkernels._C: install kdkernels again");
  }
  Py_DECREF(capsule);  // what it points to is static
  return kdkernels::kernels == nullptr ? nullptr : PyModule_Create(&kdkernels::module);
}
