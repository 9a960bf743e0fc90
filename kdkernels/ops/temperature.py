r"""A temperature that learns against the student (CTKD, Li et al., arXiv 2211.16231).

The temperature ascends the distillation loss while the student descends it: between the two stands a gradient
reversal, whose strength grows with the epochs from 0 to 1 along a cosine.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output * -ctx.strength, None


def gradient_reversal(x: Tensor, strength: float = 1.0) -> Tensor:
    """`x` itself, whose gradient is multiplied by −strength on the way back."""
    return _Reversal.apply(x, float(strength))


def cosine_reversal(epoch: float, epochs: float = 10) -> float:
    """The reversal's strength in `epoch` (from 0): 0 → 1 along half a cosine over `epochs`, then 1.

    >>> cosine_reversal(0), cosine_reversal(10)
    (0.0, 1.0)
    """
    if epochs <= 0:
        raise ValueError(f"epochs must be positive, got {epochs}")
    if epoch < 0:
        raise ValueError(f"epoch must be >= 0, got {epoch}")
    return 0.5 * (1 - math.cos(math.pi * min(epoch, epochs) / epochs))


class LearnableTemperature(nn.Module):
    """CTKD's global temperature T = start + span · sigmoid(theta), with one parameter theta, initially 1.

    ``temperature = LearnableTemperature()``; in each step ``T = temperature(cosine_reversal(epoch))`` is a tensor () to
    hand to a loss as its ``temperature``. Minimising the loss then raises it with respect to theta.
    """

    def __init__(self, start: float = 1.0, span: float = 20.0) -> None:
        super().__init__()
        if not (0 < start < math.inf and 0 <= span < math.inf):
            raise ValueError(f"start must be positive and span >= 0, got {start} and {span}")
        self.start, self.span = start, span
        self.theta = nn.Parameter(torch.ones(()))

    def forward(self, strength: float = 1.0) -> Tensor:
        return self.start + self.span * torch.sigmoid(gradient_reversal(self.theta, strength))

    def extra_repr(self) -> str:
        return f"start={self.start}, span={self.span}"
