// Rows of a loss from logits on CUDA devices: logit_loss.cuh has the kernel.
#include "logit_loss.cuh"

namespace kdkernels::cuda {

int logit_loss(const LogitLossParams& params, void* stream) {
  if (params.classes > kMaxClasses) return cudaErrorInvalidValue;
  if (params.rows == 0) return cudaSuccess;
  switch (params.divergence) {
    case Divergence::kNone:
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
