"""kdkernels: fused, exact distillation losses for PyTorch."""

from kdkernels.backend import available_backends
from kdkernels.ops.kl_div import KLDivLoss, kl_div, kl_div_reference

__version__ = "0.1.0"
__all__ = ["KLDivLoss", "available_backends", "kl_div", "kl_div_reference"]
