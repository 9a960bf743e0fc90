"""How far a result is from the truth, in numbers and as they are printed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEGLIGIBLE = 1e-8  # a float32 kernel may give 0 for this; there the error is absolute


def relative(got: Tensor, truth: Tensor) -> float:
    """Relative error in norm; absolute where the truth is negligible; NaN or inf where `got` has one."""
    if not torch.isfinite(got).all():
        return math.nan if torch.isnan(got).any() else math.inf
    size = truth.norm().item()
    return (got - truth).norm().item() / (size if size > NEGLIGIBLE else 1.0)


def number(error: float) -> str:
    """One digit: 3e-7; 0 for what is below 1e-12."""
    if not math.isfinite(error):
        return "NaN" if math.isnan(error) else "inf"
    return f"{error:.0e}".replace("e-0", "e-").replace("e+0", "e+") if error >= 1e-12 else "0"
