// The Python module kdkernels._C: addresses, sizes and scalars in, params structs out. No Torch
// here: the callers in kdkernels/backend.py check and allocate, and one build serves every torch
// version.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

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

ScaleRowsParams scale_rows_params(int dtype, int64_t rows, int64_t classes, uintptr_t grad,
                                  uintptr_t scale, int64_t scale_stride) {
  return {address<void>(grad), address<const void>(scale), rows, classes,
          scale_stride,        static_cast<DType>(dtype)};
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
  bind_cpu(m, "cpu_kl_div", kl_div_params, cpu::kl_div);
  bind_cpu(m, "cpu_scale_rows", scale_rows_params, cpu::scale_rows);
#ifdef KDKERNELS_WITH_CUDA
  bind_cuda(m, "cuda_kl_div", kl_div_params, cuda::kl_div);
  bind_cuda(m, "cuda_scale_rows", scale_rows_params, cuda::scale_rows);
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}

}  // namespace kdkernels
