"""How a distance of two batches that has native kernels becomes registered ops and enters autograd.

The forward computes the gradients with the distances, while it has the samples at hand. The first backward hands those
buffers out; any later one computes them again, bit for bit. Second derivatives, and those of weights, go through the
reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.backend import LIBRARY, fresh, launcher, statistics_dtype, unobserved
from kdkernels.ops.calls import COMMON, again_by
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
    x_weights, y_weights, labels and the options, of which there may be none.
    """
    inputs = (
        "Tensor x, Tensor y, Tensor? labels, Tensor? x_weights, Tensor? y_weights, "
        f"{arguments}{', ' if arguments else ''}bool[] needs, str backend"
    )
    # x and y are (B, n, d) and (B, m, d), or on a CPU (n, d) and (m, d): one problem, as its outputs are then.
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

    native = Native(run, reference)

    def again_distance(x: Tensor, y: Tensor, labels: Tensor | None, options: tuple[Any, ...]) -> Tensor:
        return _Distance.apply(x, y, None, None, labels, native, options, "cpu")

    again = again_by(again_distance)

    def distance(
        x: Tensor,  # (..., n, d)
        y: Tensor,  # (..., m, d)
        x_weights: Tensor | None,  # (..., n)
        y_weights: Tensor | None,  # (..., m)
        labels: Tensor | None,  # (..., n)
        options: tuple[Any, ...],
        backend: str,
    ) -> Tensor:  # (...,)
        if (
            not torch.compiler.is_dynamo_compiling()
            and (common := COMMON.get(name))
            and backend == "cpu"
            and x_weights is None
            and y_weights is None
        ):
            found = common(x, y, labels, options, again)
            if found is not None:
                return found
        if torch.is_grad_enabled() and (
            x.requires_grad
            or y.requires_grad
            or (x_weights is not None and x_weights.requires_grad)
            or (y_weights is not None and y_weights.requires_grad)
        ):
            return _Distance.apply(x, y, x_weights, y_weights, labels, native, options, backend)
        problems = _problems(x, y, x_weights, y_weights, labels, backend)
        [loss] = run(True, *problems, *options, (False, False), backend)
        return _shaped(loss, x.shape[:-2])

    return distance


class Native(NamedTuple):
    """How a distance is computed: with the loss or without it, and by the reference."""

    run: Callable[..., list[Tensor]]
    reference: Callable[..., Tensor]


def _outputs(x: Tensor, y: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    # float16 has no range for a gradient that is still to meet its upstream gradient.
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    return [
        torch.empty(x.shape[:-2], dtype=statistics_dtype(x.dtype), device=x.device),
        fresh(x.shape, dtype, x.device) if needs[0] else None,
        fresh(y.shape, dtype, x.device) if needs[1] else None,
    ]


def fill(
    outputs: Sequence[Tensor | None], kernel: Callable[..., None], x: Tensor, y: Tensor, *rest: Any
) -> None:
    """The kernel's outputs; without samples on a side they are 0."""
    if x.numel() and y.numel():
        kernel(x, y, *rest, *outputs)
        return
    for output in outputs:
        if output is not None:
            output.zero_()


def _body(name: str, with_loss: bool, x: Tensor, y: Tensor, *arguments: Any) -> list[Tensor]:
    outputs = _outputs(x, y, arguments[-2])
    if x.dtype == torch.float16 and arguments[-1] == "cpu" and any(arguments[-2]):
        x, y = x.float(), y.float()  # that kernel's gradients have its samples' dtype
    fill(outputs, launcher(arguments[-1], name), x, y, *arguments[:-2])
    return [output for output in outputs[0 if with_loss else 1 :] if output is not None]


def _fake(with_loss: bool, x: Tensor, y: Tensor, *arguments: Any) -> list[Tensor]:
    return [output for output in _outputs(x, y, arguments[-2])[0 if with_loss else 1 :] if output is not None]


def _problems(
    x: Tensor,  # (..., n, d)
    y: Tensor,  # (..., m, d)
    x_weights: Tensor | None,  # (..., n)
    y_weights: Tensor | None,  # (..., m)
    labels: Tensor | None,  # (..., n)
    backend: str,
) -> tuple[Any, ...]:
    """As the ops take them: x, y, labels, x_weights, y_weights."""
    return (
        _side_by_side(x, backend),
        _side_by_side(y, backend),
        None if labels is None else as_problems(labels.long(), 1).contiguous(),
        None if x_weights is None else as_problems(x_weights, 1).contiguous(),
        None if y_weights is None else as_problems(y_weights, 1).contiguous(),
    )


def _side_by_side(x: Tensor, backend: str) -> Tensor:  # (..., n, d) -> (B, n, d)
    """One problem stays (n, d) for a CPU, where each view is a good part of a small batch's call."""
    if x.dim() != 3 and not (x.dim() == 2 and backend == "cpu"):
        x = as_problems(x, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _shaped(output: Tensor, shape: Sequence[int]) -> Tensor:
    return output if output.shape == shape else output.view(shape)


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., n, d)
        y: Tensor,  # (..., m, d)
        x_weights: Tensor | None,  # (..., n)
        y_weights: Tensor | None,  # (..., m)
        labels: Tensor | None,  # (..., n)
        native: Native,
        options: tuple[Any, ...],  # constants
        backend: str,
    ) -> Tensor:  # (...,)
        # A captured graph cannot hand a buffer out once: there the backward computes.
        compiling = torch.compiler.is_compiling()
        wanted = (False, False) if compiling else ctx.needs_input_grad[:2]
        problems = _problems(x, y, x_weights, y_weights, labels, backend)
        loss, *gradients = native.run(True, *problems, *options, wanted, backend)
        ctx.gradients = None if compiling else gradients
        ctx.arguments = (native, options, backend)
        ctx.save_for_backward(x, y, x_weights, y_weights, labels)
        return _shaped(loss, x.shape[:-2])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # (...,)
        x, y, x_weights, y_weights, labels = ctx.saved_tensors
        native, options, backend = ctx.arguments
        needs = ctx.needs_input_grad
        gradients, ctx.gradients = ctx.gradients, None
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if twice or needs[2] or needs[3]:

            def reference(x: Tensor, y: Tensor, u: Tensor | None, v: Tensor | None) -> Tensor:
                return native.reference(x, y, u, v, labels, *options)

            inputs = (x, y, x_weights, y_weights)
            found = by_reference(reference, inputs, needs[:4], grad_output, twice)
            return (*found, None, None, None, None)
        if gradients is None:
            # The same kernel on the same inputs: bit for bit what the first backward had.
            problems = _problems(x, y, x_weights, y_weights, labels, backend)
            gradients = native.run(False, *problems, *options, needs[:2], backend)
        upstream = grad_output if grad_output.dim() < 2 else grad_output.reshape(-1)
        for gradient in gradients:
            scale_rows_(gradient, upstream, backend)
        of_x = _shaped(gradients[0], x.shape).to(x.dtype) if needs[0] else None
        of_y = _shaped(gradients[-1], y.shape).to(y.dtype) if needs[1] else None
        return of_x, of_y, None, None, None, None, None, None
