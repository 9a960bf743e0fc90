// C entry points to the CUDA kernels, for ctypes.
#include "kdkernels.h"

extern "C" {
int kdk_kl_div(const kdkernels::KlDivParams* params) {
  return kdkernels::cuda::kl_div(*params, nullptr);
}
int kdk_scale_rows(const kdkernels::ScaleRowsParams* params) {
  return kdkernels::cuda::scale_rows(*params, nullptr);
}
const char* kdk_error_string(int error) { return kdkernels::cuda::error_string(error); }
}
