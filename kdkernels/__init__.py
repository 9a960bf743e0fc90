"""kdkernels: fused, exact distillation losses for PyTorch."""

from kdkernels.backend import available_backends
from kdkernels.ops.anchor_penalty import AnchorPenaltyLoss, anchor_penalty, anchor_penalty_reference
from kdkernels.ops.coral import CoralLoss, coral, coral_reference
from kdkernels.ops.distillation_loss import DistillationLoss, distillation_loss, distillation_loss_reference
from kdkernels.ops.dkd import DKDLoss, dkd, dkd_reference
from kdkernels.ops.gaussian import (
    GaussianKLLoss,
    GaussianWassersteinLoss,
    gaussian_kl,
    gaussian_kl_reference,
    gaussian_wasserstein,
    gaussian_wasserstein_reference,
)
from kdkernels.ops.jsd import JSDLoss, jsd, jsd_reference
from kdkernels.ops.kd_statistics import KDStatistics, kd_statistics
from kdkernels.ops.kl_div import KLDivLoss, kl_div, kl_div_reference
from kdkernels.ops.linear_distillation_loss import (
    LinearDistillationLoss,
    linear_distillation_loss,
    linear_distillation_loss_reference,
)
from kdkernels.ops.linear_kl_div import LinearKLDivLoss, linear_kl_div, linear_kl_div_reference
from kdkernels.ops.linear_loss import plan_linear_loss
from kdkernels.ops.masked_feature_loss import (
    MaskedFeatureLoss,
    masked_feature_loss,
    masked_feature_loss_reference,
)
from kdkernels.ops.mmd import (
    EnergyDistanceLoss,
    MMDLoss,
    energy_distance,
    energy_distance_reference,
    mmd,
    mmd_reference,
)
from kdkernels.ops.multi_teacher_kl_div import (
    MultiTeacherKLDivLoss,
    multi_teacher_kl_div,
    multi_teacher_kl_div_reference,
)
from kdkernels.ops.nkd import NKDLoss, nkd, nkd_reference
from kdkernels.ops.pool_mse import pool_mse, pool_mse_reference
from kdkernels.ops.shared_classifier_loss import (
    SharedClassifierLoss,
    shared_classifier_loss,
    shared_classifier_loss_reference,
)
from kdkernels.ops.skew_kl_div import SkewKLDivLoss, skew_kl_div, skew_kl_div_reference
from kdkernels.ops.sliced_wasserstein import (
    SlicedWassersteinLoss,
    sliced_wasserstein,
    sliced_wasserstein_reference,
)
from kdkernels.ops.teacher_statistics import TeacherStatistics, precompute_teacher
from kdkernels.ops.temperature import LearnableTemperature, cosine_reversal, gradient_reversal
from kdkernels.ops.topk_kl_div import TopKKLDivLoss, topk_kl_div, topk_kl_div_reference
from kdkernels.ops.tvd import TVDLoss, tvd, tvd_reference
from kdkernels.ops.wasserstein import (
    GromovWassersteinLoss,
    JointWassersteinLoss,
    WassersteinLoss,
    gromov_wasserstein,
    gromov_wasserstein_reference,
    joint_wasserstein,
    joint_wasserstein_reference,
    wasserstein,
    wasserstein_reference,
)

__version__ = "0.1.0"
__all__ = [
    "AnchorPenaltyLoss",
    "CoralLoss",
    "DKDLoss",
    "DistillationLoss",
    "EnergyDistanceLoss",
    "GaussianKLLoss",
    "GaussianWassersteinLoss",
    "GromovWassersteinLoss",
    "JSDLoss",
    "JointWassersteinLoss",
    "KDStatistics",
    "KLDivLoss",
    "LearnableTemperature",
    "LinearDistillationLoss",
    "LinearKLDivLoss",
    "MMDLoss",
    "MaskedFeatureLoss",
    "MultiTeacherKLDivLoss",
    "NKDLoss",
    "SharedClassifierLoss",
    "SkewKLDivLoss",
    "SlicedWassersteinLoss",
    "TVDLoss",
    "TeacherStatistics",
    "TopKKLDivLoss",
    "WassersteinLoss",
    "anchor_penalty",
    "anchor_penalty_reference",
    "available_backends",
    "coral",
    "coral_reference",
    "cosine_reversal",
    "distillation_loss",
    "distillation_loss_reference",
    "dkd",
    "dkd_reference",
    "energy_distance",
    "energy_distance_reference",
    "gaussian_kl",
    "gaussian_kl_reference",
    "gaussian_wasserstein",
    "gaussian_wasserstein_reference",
    "gradient_reversal",
    "gromov_wasserstein",
    "gromov_wasserstein_reference",
    "joint_wasserstein",
    "joint_wasserstein_reference",
    "jsd",
    "jsd_reference",
    "kd_statistics",
    "kl_div",
    "kl_div_reference",
    "linear_distillation_loss",
    "linear_distillation_loss_reference",
    "linear_kl_div",
    "linear_kl_div_reference",
    "masked_feature_loss",
    "masked_feature_loss_reference",
    "mmd",
    "mmd_reference",
    "multi_teacher_kl_div",
    "multi_teacher_kl_div_reference",
    "nkd",
    "nkd_reference",
    "plan_linear_loss",
    "pool_mse",
    "pool_mse_reference",
    "precompute_teacher",
    "shared_classifier_loss",
    "shared_classifier_loss_reference",
    "skew_kl_div",
    "skew_kl_div_reference",
    "sliced_wasserstein",
    "sliced_wasserstein_reference",
    "topk_kl_div",
    "topk_kl_div_reference",
    "tvd",
    "tvd_reference",
    "wasserstein",
    "wasserstein_reference",
]
