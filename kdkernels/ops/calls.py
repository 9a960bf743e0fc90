"""What the calls in C++ (python/calls.cpp) leave to Python: gradients after the first, and those of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.backend import CALLS, full_precision

Again = Callable[[tuple[Any, ...], Sequence[Tensor | None], Sequence[bool], Tensor], Sequence[Tensor | None]]


# Each gives the loss, or None for what is left to Python.
COMMON: dict[str, Callable[..., Tensor | None]] = {
    name: getattr(CALLS, name)
    for name in (
        "kl_div",
        "logit_loss",
        "multi_teacher_kl_div",
        "topk_kl_div",
        "linear_loss",
        "coral",
        "gaussian",
        "mmd",
    )
    if CALLS is not None
}


def again_by(function: Callable[..., Tensor]) -> Again:
    """How a C++ call's node computes gradients by `function`, the same loss of the same tensors and arguments."""

    def again(
        arguments: tuple[Any, ...],
        inputs: Sequence[Tensor | None],
        needs: Sequence[bool],  # of the first inputs
        grad_output: Tensor,
    ) -> Sequence[Tensor | None]:
        twice = torch.is_grad_enabled()
        with torch.enable_grad(), full_precision(grad_output):
            # The inputs' hooks run once, with what this returns: none of these is an input itself.
            inputs = [x if x is None else x.view_as(x) if twice else x.detach() for x in inputs]
            if not twice:
                for x, need in zip(inputs, needs):
                    if x is not None:
                        x.requires_grad_(need)
            loss = function(*inputs, *arguments)
            wanted = [x for x, need in zip(inputs, needs) if x is not None and need]
            found = iter(torch.autograd.grad(loss, wanted, grad_output, create_graph=twice))
        return [next(found) if need else None for need in needs]

    return again
