// The divergences that set the label's class apart, in a file of their own so that two compilers
// share the work.
#include "logit_loss.cuh"

namespace kdkernels::cuda {

template cudaError_t launch_logit_loss<Divergence::kDecoupled>(const LogitLossParams&, void*);
template cudaError_t launch_logit_loss<Divergence::kNormalized>(const LogitLossParams&, void*);

}  // namespace kdkernels::cuda
