"""How a distance of two batches that has native kernels becomes registered ops and enters autograd.

The forward computes the gradients with the distances, while it has the samples at hand. The first backward hands those
buffers out; any later one computes them again, bit for bit. Second derivatives, and those of weights, go through the
reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels.backend import LIBRARY, launcher, statistics_dtype, unobserved
from kdkernels.ops.features import as_problems, by_reference
from kdkernels.ops.scale_rows import scale_rows_


def native_distance(
    name: str,
    arguments: str,
    reference: Callable[..., Tensor],
    devices: Sequence[str] = ("CPU",),
) -> Callable[..., Tensor]:
    """Defines kdkernels::NAME_fwd and _bwd, for the devices' kernels of that name, and returns

        distance(x, y, x_weights, y_weights, labels, options, backend) -> (...,)

    of x (..., n, d) and y (..., m, d). `arguments` are the options in the ops' schema; `reference` takes x, y,
    x_weights, y_weights, labels and the options.
    """
    inputs = (
        "Tensor x, Tensor y, Tensor? labels, Tensor? x_weights, Tensor? y_weights, "
        f"{arguments}, bool[] needs, str backend"
    )
    # The problems' distances, then the gradients by x and y where `needs` asks for them; the second gives those alone.
    for with_loss in (True, False):
        op = f"{name}_{'fwd' if with_loss else 'bwd'}"
        LIBRARY.define(f"{op}({inputs}) -> Tensor[]")
        for device in devices:
            LIBRARY.impl(op, partial(_body, name, with_loss), device)
        torch.library.register_fake(f"kdkernels::{op}", partial(_fake, with_loss), lib=LIBRARY)
    forward, backward = (getattr(torch.ops.kdkernels, f"{name}_{end}") for end in ("fwd", "bwd"))

    def run(with_loss: bool, x: Tensor, *arguments: Any) -> list[Tensor]:
        if unobserved(x):
            return _body(name, with_loss, x, *arguments)
        return (forward if with_loss else backward)(x, *arguments)

    def distance(
        x: Tensor,  # (..., n, d)
        y: Tensor,  # (..., m, d)
        x_weights: Tensor | None,  # (..., n)
        y_weights: Tensor | None,  # (..., m)
        labels: Tensor | None,  # (..., n)
        options: tuple[Any, ...],
        backend: str,
    ) -> Tensor:  # (...,)
        samples = (x, y, x_weights, y_weights)
        if torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in samples):
            return _Distance.apply(*samples, labels, run, reference, backend, *options)
        [loss] = run(True, *_problems(*samples, labels), *options, (False, False), backend)
        return loss.view(x.shape[:-2])

    return distance


def _outputs(x: Tensor, y: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    return [
        torch.empty(x.shape[0], dtype=statistics_dtype(x.dtype), device=x.device),
        torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None,
        torch.empty_like(y, memory_format=torch.contiguous_format) if needs[1] else None,
    ]


def _body(name: str, with_loss: bool, x: Tensor, y: Tensor, *arguments: Any) -> list[Tensor]:
    outputs = _outputs(x, y, arguments[-2])
    if x.shape[0]:
        launcher(arguments[-1], name)(x, y, *arguments[:-2], *outputs)
    return [output for output in outputs[0 if with_loss else 1 :] if output is not None]


def _fake(with_loss: bool, x: Tensor, y: Tensor, *arguments: Any) -> list[Tensor]:
    return [output for output in _outputs(x, y, arguments[-2])[0 if with_loss else 1 :] if output is not None]


def _problems(
    x: Tensor,  # (..., n, d)
    y: Tensor,  # (..., m, d)
    x_weights: Tensor | None,  # (..., n)
    y_weights: Tensor | None,  # (..., m)
    labels: Tensor | None,  # (..., n)
) -> tuple[Any, ...]:
    """As the ops take them: x, y, labels, x_weights, y_weights."""
    a, b = (z if z.dim() == 3 else as_problems(z, 2) for z in (x, y))
    a, b = (z if z.stride(2) == 1 else z.contiguous() for z in (a, b))
    u, v, numbers = (
        None if z is None else as_problems(z, 1).contiguous()
        for z in (x_weights, y_weights, labels if labels is None else labels.long())
    )
    return a, b, numbers, u, v


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., n, d)
        y: Tensor,  # (..., m, d)
        x_weights: Tensor | None,  # (..., n)
        y_weights: Tensor | None,  # (..., m)
        labels: Tensor | None,  # (..., n)
        run: Callable[..., list[Tensor]],
        reference: Callable[..., Tensor],
        backend: str,
        *options: Any,  # constants
    ) -> Tensor:  # (...,)
        # A captured graph cannot hand a buffer out once: there the backward computes.
        compiling = torch.compiler.is_compiling()
        wanted = (False, False) if compiling else ctx.needs_input_grad[:2]
        problems = _problems(x, y, x_weights, y_weights, labels)
        loss, *gradients = run(True, *problems, *options, wanted, backend)
        ctx.gradients = None if compiling else gradients
        ctx.run, ctx.reference, ctx.backend, ctx.options = run, reference, backend, options
        ctx.save_for_backward(x, y, x_weights, y_weights, labels)
        return loss.view(x.shape[:-2])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # (...,)
        x, y, x_weights, y_weights, labels = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        rest = (None,) * (4 + len(ctx.options))
        gradients, ctx.gradients = ctx.gradients, None
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if twice or needs[2] or needs[3]:

            def reference(x: Tensor, y: Tensor, u: Tensor | None, v: Tensor | None) -> Tensor:
                return ctx.reference(x, y, u, v, labels, *ctx.options)

            return (*by_reference(reference, (x, y, x_weights, y_weights), needs, grad_output, twice), *rest)
        if gradients is None:
            # The same kernel on the same inputs: bit for bit what the first backward had.
            problems = _problems(x, y, x_weights, y_weights, labels)
            gradients = ctx.run(False, *problems, *ctx.options, needs[:2], ctx.backend)
        upstream = grad_output.reshape(-1)
        for gradient in gradients:
            scale_rows_(gradient.flatten(1), upstream, ctx.backend)
        each = iter(gradients)
        of_x, of_y = (next(each).view(z.shape) if need else None for z, need in zip((x, y), needs))
        return of_x, of_y, None, None, *rest
