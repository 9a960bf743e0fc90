"""grad[r, :] *= scale[r], in place: what a backward does to a gradient that its forward computed.

Bytes moved: 4 for each row whose scale is 1, else 2·N·itemsize for it. So a loss that is itself the root of
the backward pass (upstream gradient 1) pays nothing, and no value travels to the host to find that out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backend import LIBRARY, launcher, unobserved

LIBRARY.define("scale_rows_(Tensor(a!) grad, Tensor scale, str backend) -> ()")


def _body(grad: Tensor, scale: Tensor, backend: str) -> None:  # (M, ...) contiguous, () or (M,)
    if grad.numel():
        launcher(backend, "scale_rows")(grad, scale.resolve_neg())


LIBRARY.impl("scale_rows_", _body, "CPU")
LIBRARY.impl("scale_rows_", _body, "CUDA")
torch.library.register_fake("kdkernels::scale_rows_", lambda grad, scale, backend: None, lib=LIBRARY)


def scale_rows_(grad: Tensor, scale: Tensor, backend: str) -> None:  # (M, ...) contiguous, () or (M,)
    """grad[r, :] *= scale[r] in place; a row whose scale is 1 is left alone."""
    (_body if unobserved(grad) else torch.ops.kdkernels.scale_rows_)(grad, scale, backend)
