// C entry points to the CUDA kernels, for ctypes.
#include "kdkernels.h"

extern "C" {
int kdk_kl_div(const kdkernels::KlDivParams* params) {
  return kdkernels::cuda::kl_div(*params, nullptr);
}
int kdk_logit_loss(const kdkernels::LogitLossParams* params) {
  return kdkernels::cuda::logit_loss(*params, nullptr);
}
int kdk_multi_teacher_kl_div(const kdkernels::MultiTeacherKlDivParams* params) {
  return kdkernels::cuda::multi_teacher_kl_div(*params, nullptr);
}
int kdk_topk_kl_div(const kdkernels::TopkKlDivParams* params) {
  return kdkernels::cuda::topk_kl_div(*params, nullptr);
}
int kdk_pool_mse(const kdkernels::PoolMseParams* params) {
  return kdkernels::cuda::pool_mse(*params, nullptr);
}
int kdk_scale_rows(const kdkernels::ScaleRowsParams* params) {
  return kdkernels::cuda::scale_rows(*params, nullptr);
}
int kdk_sinkhorn(const kdkernels::SinkhornParams* params) {
  return kdkernels::cuda::sinkhorn(*params, nullptr);
}
const char* kdk_error_string(int error) { return kdkernels::cuda::error_string(error); }
}
