// Rows of a loss from logits on CUDA devices: logit_loss.cuh has the kernel.
#include "logit_loss.cuh"

namespace kdkernels::cuda {
namespace {

// The same with a kernel that reads the target: a divergence of weight 0.
LogitLossParams without_soft(LogitLossParams params) {
  params.divergence = Divergence::kKl;
  params.soft_scale = nullptr;
  params.soft_scale_value = 0;
  params.standardize = false;
  return params;
}

}  // namespace

int logit_loss(const LogitLossParams& params, void* stream) {
  if (params.classes > kMaxClasses) return cudaErrorInvalidValue;
  const bool is_narrower = params.dtype == DType::kFloat32 && params.grad_dtype != DType::kFloat64;
  if (params.grad_dtype != params.dtype && !is_narrower) return cudaErrorInvalidValue;
  if (params.rows == 0) return cudaSuccess;
  switch (params.divergence) {
    case Divergence::kNone:
      if (params.logit_mse != 0)
        return launch_logit_loss<Divergence::kKl>(without_soft(params), stream);
      return launch_logit_loss<Divergence::kNone>(params, stream);
    case Divergence::kKl:
    case Divergence::kReverseKl:
      return launch_logit_loss<Divergence::kKl>(params, stream);
    case Divergence::kMixture:
      return launch_logit_loss<Divergence::kMixture>(params, stream);
    case Divergence::kTotalVariation:
      return launch_logit_loss<Divergence::kTotalVariation>(params, stream);
    case Divergence::kDecoupled:
    case Divergence::kReverseDecoupled:
      return launch_logit_loss<Divergence::kDecoupled>(params, stream);
    case Divergence::kNormalized:
    case Divergence::kReverseNormalized:
      return launch_logit_loss<Divergence::kNormalized>(params, stream);
    case Divergence::kStatistics:
      return launch_logit_loss<Divergence::kStatistics>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace kdkernels::cuda
