"""kdkernels: fused, exact distillation losses for PyTorch."""

from kdkernels.backend import available_backends
from kdkernels.ops.kl_div import KLDivLoss, kl_div, kl_div_reference
from kdkernels.ops.multi_teacher_kl_div import (
    MultiTeacherKLDivLoss,
    multi_teacher_kl_div,
    multi_teacher_kl_div_reference,
)
from kdkernels.ops.topk_kl_div import TopKKLDivLoss, topk_kl_div, topk_kl_div_reference

__version__ = "0.1.0"
__all__ = [
    "KLDivLoss",
    "MultiTeacherKLDivLoss",
    "TopKKLDivLoss",
    "available_backends",
    "kl_div",
    "kl_div_reference",
    "multi_teacher_kl_div",
    "multi_teacher_kl_div_reference",
    "topk_kl_div",
    "topk_kl_div_reference",
]
