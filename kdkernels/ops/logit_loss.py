r"""The family of losses from two rows of logits, as one registered op: a soft term against the teacher, hard
cross-entropy, z-loss and logit MSE in one read of both logits and one write of one gradient. The public losses (jsd,
dkd, distillation_loss, ...) are calls of `logit_loss` with a `Spec`; kdkernels.ops.divergences has their formulas.

    row  = soft_weight T² D(P, Q) + hard_weight CE(student, y) + z_loss lse(student)²
           + logit_mse mean (student − teacher)²
    loss = the rows times their weights, reduced over those that count

A row counts where the mask is True and its label is not `ignore_index`.

Gradient: a kernel makes the gradient of its first side. The teacher's is made by the same kernel with the sides
exchanged, when it is asked for: 2 reads and 1 write more.

Saved: the inputs, and the gradient that the forward already computed while it had the rows at hand. The first
backward hands that buffer out; any later one computes it again from the inputs. Double backward goes through the
reference.

Bytes moved per element by forward + backward for the student: 2 reads and 1 write of the input's dtype, where a row
is read once (kdkernels._triton.logit_loss says for which sizes that holds on a GPU); a learnable temperature's part
that comes from the teacher's side adds 2 reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels.backend import LIBRARY, fresh, launcher, resolve, statistics_dtype, sum_of_rows, unobserved
from kdkernels.ops.calls import COMMON, again_by
from kdkernels.ops.divergences import (
    NONE,
    NORMALIZED,
    OF_LABELS,
    REVERSE_NORMALIZED,
    Spec,
    hard_rows,
    mse_rows,
    soft_rows,
)
from kdkernels.ops.rows import (
    Range,
    Temperature,
    as_matrix,
    as_vectors,
    check_labels,
    check_logits,
    check_mask,
    check_reduction,
    check_temperatures,
    check_weights,
    reduce_rows,
    refuse_logits,
    scale_of_rows,
    split_temperatures,
)
from kdkernels.ops.scale_rows import scale_rows_

TERMS = ("soft", "hard", "z_loss", "target", "logit_mse")


def logit_loss_reference(
    student: Tensor,  # (..., N)
    teacher: Tensor | None,  # (..., N)
    labels: Tensor | None,  # rows
    temperature: Temperature,
    teacher_temperature: Temperature,
    weights: Tensor | None,  # rows
    mask: Tensor | None,  # rows
    spec: Spec,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The specification of the family: (loss, terms), in plain PyTorch, on any device, with any derivative.

    The terms are (5,), or (5, rows) where nothing is reduced: the parts of the loss in the order of TERMS, "target"
    being the part of "soft" with the factor `first`.
    """
    dtype = statistics_dtype(student.dtype)
    wrong = None
    if mask is not None:  # a row that does not count is not looked at: whatever it holds cannot spread
        student = torch.where(mask[..., None], student, 0)
        teacher = None if teacher is None else torch.where(mask[..., None], teacher, 0)
        labels = None if labels is None else torch.where(mask, labels, 0)
    if labels is not None:
        wrong = (labels < 0) | (labels >= student.shape[-1])
        labels = torch.where(wrong, 0, labels)
    student, teacher = student.to(dtype), None if teacher is None else teacher.to(dtype)
    # Zeros that have a graph, whatever is switched off.
    soft = first = hard = z = mse = torch.where(torch.zeros_like(student, dtype=torch.bool), student, 0).sum(
        -1
    )
    if spec.divergence != NONE:
        assert teacher is not None
        soft, first = soft_rows(student, teacher, labels, temperature, teacher_temperature, spec)
    if spec.hard_weight:
        assert labels is not None
        hard = spec.hard_weight * hard_rows(student, labels, spec.label_smoothing)
    if spec.z_loss:
        z = spec.z_loss * torch.logsumexp(student, -1).square()
    if spec.logit_mse:
        assert teacher is not None
        mse = spec.logit_mse * mse_rows(student, teacher)
    terms = torch.stack((soft, hard, z, first, mse))
    each = soft + hard + z + mse
    if wrong is not None:
        each, terms = torch.where(wrong, torch.nan, each), torch.where(wrong, torch.nan, terms)
    loss, *parts = (reduce_rows(x, mask, weights, reduction) for x in (each, *terms))
    return loss, torch.stack(parts).detach()


_INPUTS = (
    "Tensor input, Tensor? target, Tensor? labels, Tensor? input_temperature, Tensor? target_temperature, "
    "float input_temperature_value, float target_temperature_value, Tensor? row_scale, float scale, Tensor? mask, "
    "int divergence, float first, float second, float mix, bool standardize, float soft_weight, bool squared, "
    "float hard_weight, float label_smoothing, float z_loss, float logit_mse, int start, int target_start, "
    "int classes, bool with_terms, bool[] needs, str backend"
)
# Both give the gradients that `needs` asks for, in the order input, target, input_temperature, target_temperature;
# the first gives the rows' losses before them, and their terms (5, M) where asked. All are times row_scale (or
# scale). `classes` from `start` (`target_start`) on are what there is of a row: the others have gradient 0.
LIBRARY.define(f"logit_loss_fwd({_INPUTS}) -> Tensor[]")
LIBRARY.define(f"logit_loss_bwd({_INPUTS}) -> Tensor[]")


def _outputs(with_loss: bool, arguments: Sequence[Any]) -> list[Tensor | None]:
    input, target, with_terms, needs = arguments[0], arguments[1], arguments[-3], arguments[-2]
    rows = input.shape[0]
    dtype = statistics_dtype(input.dtype)
    return [
        torch.empty(rows, dtype=dtype, device=input.device) if with_loss else None,
        torch.empty(len(TERMS), rows, dtype=dtype, device=input.device) if with_loss and with_terms else None,
        fresh(input.shape, input.dtype, input.device) if needs[0] else None,
        fresh(target.shape, target.dtype, target.device) if needs[1] else None,
        torch.empty(rows, dtype=dtype, device=input.device) if needs[2] else None,
        torch.empty(rows, dtype=dtype, device=input.device) if needs[3] else None,
    ]


def _body(with_loss: bool, *arguments: Any) -> list[Tensor]:  # as in _INPUTS
    outputs = _outputs(with_loss, arguments)
    rest = (*arguments[:10], Spec(*arguments[10:21]), *arguments[21:24], arguments[-1])
    run_logit_loss_kernels(outputs, *rest)
    return [output for output in outputs if output is not None]


def run_logit_loss_kernels(
    outputs: Sequence[Tensor | None],
    input: Tensor,  # (M, N_s)
    target: Tensor | None,  # (M, N_t)
    labels: Tensor | None,  # (M,)
    input_temperature: Tensor | None,  # (M,)
    target_temperature: Tensor | None,  # (M,)
    input_temperature_value: float,
    target_temperature_value: float,
    row_scale: Tensor | None,  # (M,)
    scale: float,
    mask: Tensor | None,  # (M,)
    spec: Spec,
    start: int,
    target_start: int,
    classes: int,
    backend: str,
) -> None:
    """Fills those of `outputs` that are tensors: loss, terms, grad_input, grad_target, grad_temperature and
    grad_target_temperature, shaped as `_outputs` makes them.

    A gradient of float32 logits may be float16 or bfloat16. It may also take the place of the logits: `grad_target` is
    `target`, or `grad_input` is `input` where nothing is wanted of the target's side, which is computed last.
    """
    loss, terms, grad_input, grad_target, grad_temperature, grad_target_temperature = outputs
    temperatures = (
        input_temperature,
        target_temperature,
        input_temperature_value,
        target_temperature_value,
    )
    rows = input.shape[0]
    if not rows:
        return
    # T² has a derivative too, and it is made of the terms.
    if spec.squared and grad_temperature is not None and terms is None:
        terms = torch.empty(len(TERMS), rows, dtype=grad_temperature.dtype, device=input.device)
    kernel = launcher(backend, "logit_loss")
    input, grad_input = _within(input, grad_input, start, classes)
    if target is not None:
        target, grad_target = _within(target, grad_target, target_start, classes)
    soft_scale = scale_of_soft(spec, input_temperature, input_temperature_value)
    shared = (*soft_scale, row_scale, scale, mask)
    if loss is not None or terms is not None or grad_input is not None or grad_temperature is not None:
        found = (loss, terms, grad_input, grad_temperature)
        kernel(input, target, labels, *temperatures, *shared, *spec.of_kernels, *found)
    if grad_target is not None or grad_target_temperature is not None:
        sides = [temperatures[i] for i in (1, 0, 3, 2)]
        found = (None, None, grad_target, grad_target_temperature)
        kernel(target, input, labels, *sides, *shared, *spec.exchanged().of_kernels, *found)
    if spec.squared and grad_temperature is not None:
        assert terms is not None and input_temperature is not None
        of_square = terms[0] - terms[3] if spec.divergence in (NORMALIZED, REVERSE_NORMALIZED) else terms[0]
        grad_temperature.add_(of_square / input_temperature, alpha=2)


def scale_of_soft(
    spec: Spec, temperature: Tensor | None, temperature_value: float
) -> tuple[Tensor | None, float]:
    """What a row's divergence is multiplied with, T² included: values of the rows (M,), or one for all."""
    if not spec.squared:
        return None, spec.soft_weight
    if temperature is None:
        return None, spec.soft_weight * temperature_value**2
    squared = temperature * temperature
    return (squared if spec.soft_weight == 1 else squared * spec.soft_weight), 1.0


def _within(x: Tensor, grad: Tensor | None, start: int, classes: int) -> tuple[Tensor, Tensor | None]:
    """The classes that there are of `x` and of its gradient, which is 0 elsewhere."""
    if x.shape[1] == classes:
        return x, grad
    if grad is not None:
        grad[:, :start].zero_()
        grad[:, start + classes :].zero_()
        grad = grad.narrow(1, start, classes)
    return x.narrow(1, start, classes), grad


def _fake(with_loss: bool, *arguments: Any) -> list[Tensor]:
    return [output for output in _outputs(with_loss, arguments) if output is not None]


for _name, _with_loss in (("logit_loss_fwd", True), ("logit_loss_bwd", False)):
    LIBRARY.impl(_name, partial(_body, _with_loss), "CPU")
    LIBRARY.impl(_name, partial(_body, _with_loss), "CUDA")
    torch.library.register_fake(f"kdkernels::{_name}", partial(_fake, _with_loss), lib=LIBRARY)


def run_logit_loss(with_loss: bool, *arguments: Any) -> list[Tensor]:
    if unobserved(arguments[0]):
        return _body(with_loss, *arguments)
    return (torch.ops.kdkernels.logit_loss_fwd if with_loss else torch.ops.kdkernels.logit_loss_bwd)(
        *arguments
    )


NOTHING = (False, False, False, False)


class _LogitLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (M, N_s)
        teacher: Tensor | None,  # (M, N_t)
        temperature: Temperature,  # (M,)
        teacher_temperature: Temperature,  # (M,)
        weights: Tensor | None,  # (M,)
        labels: Tensor | None,  # (M,) in the range
        mask: Tensor | None,  # (M,)
        spec: Spec,
        ranges: tuple[int, int, int],
        reduction: str,
        with_terms: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor | None]:
        needs = ctx.needs_input_grad
        row_scale, scale = scale_of_rows(
            weights, mask, reduction, student.shape[0], statistics_dtype(student.dtype)
        )
        # What the weights' gradient is made of are unscaled losses: then the scaling is left to the backward.
        late_scale = row_scale if needs[4] else None
        arguments = (
            labels,
            *split_temperatures(temperature, teacher_temperature),
            *((None, 1.0) if needs[4] else (row_scale, scale)),
            mask,
            *spec,
            *ranges,
        )
        # A captured graph cannot hand a buffer out once: there the backward computes.
        compiling = torch.compiler.is_compiling()
        wanted = NOTHING if compiling else needs[:4]
        rows, *gradients = run_logit_loss(True, student, teacher, *arguments, with_terms, wanted, backend)
        terms = gradients.pop(0) if with_terms else None
        ctx.gradients = None if compiling else gradients
        ctx.arguments = (*arguments[3:5], scale, spec, ranges, reduction, backend)
        ctx.save_for_backward(
            student,
            teacher,
            *arguments[1:3],
            weights,
            labels,
            mask,
            arguments[5],
            late_scale,
            rows if needs[4] else None,
        )
        if late_scale is not None:
            rows = rows * late_scale
            terms = None if terms is None else terms * late_scale
        if terms is not None:
            terms = terms if reduction == "none" else terms.sum(1)
            ctx.mark_non_differentiable(terms)
        return (rows if reduction == "none" else sum_of_rows(rows, backend)), terms

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # () or (M,)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, grad_output)
        needs = ctx.needs_input_grad
        gradients, ctx.gradients = ctx.gradients, None
        *values, scale, spec, ranges, reduction, backend = ctx.arguments
        upstream, of_weights = grad_output.contiguous(), None
        if gradients is None or needs[4]:
            student, teacher, *temperatures, _, labels, mask, row_scale, late_scale, rows = ctx.saved_tensors
            if gradients is None:
                # The same kernel on the same inputs: bit for bit what the first backward had.
                scales = (None, 1.0) if needs[4] else (row_scale, scale)
                arguments = (
                    labels,
                    *temperatures,
                    *values,
                    *scales,
                    mask,
                    *spec,
                    *ranges,
                    False,
                    needs[:4],
                    backend,
                )
                gradients = run_logit_loss(False, student, teacher, *arguments) if any(needs[:4]) else []
            if needs[4]:
                each, one = scale_of_rows(None, mask, reduction, rows.shape[0], rows.dtype)
                of_weights = rows * grad_output * (one if each is None else each)
                upstream = grad_output * late_scale
        for gradient in gradients:
            if gradient.dim() == 2:
                scale_rows_(gradient, upstream, backend)
            else:
                gradient.mul_(upstream)
        remaining = iter(gradients)
        found = [next(remaining) if need else None for need in needs[:4]]
        return (*found, of_weights, *[None] * 7)


def _differentiable_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient as a graph, for ``create_graph=True``: autograd through the reference."""
    student, teacher, temperature, teacher_temperature, weights, labels, mask, *_ = ctx.saved_tensors
    temperatures = (
        ctx.arguments[0] if temperature is None else temperature,
        ctx.arguments[1] if teacher_temperature is None else teacher_temperature,
    )
    spec, (start, teacher_start, classes), reduction = ctx.arguments[3:6]
    loss, _ = logit_loss_reference(
        student.narrow(1, start, classes),
        None if teacher is None else teacher.narrow(1, teacher_start, classes),
        labels,
        *temperatures,
        weights,
        mask,
        spec,
        reduction,
    )
    sources = (student, teacher, *temperatures, weights)
    wanted = [source for source, need in zip(sources, ctx.needs_input_grad) if need]
    gradients = iter(
        torch.autograd.grad(loss, wanted, grad_output, create_graph=True, materialize_grads=True)
    )
    return (*(next(gradients) if need else None for need in ctx.needs_input_grad[:5]), *[None] * 7)


def logit_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    spec: Spec,
    *,
    temperature: Temperature = 1.0,
    teacher_temperature: Temperature | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "batchmean",
    valid_classes: Range = None,
    teacher_valid_classes: Range = None,
    with_terms: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(loss, terms) of the family member that `spec` describes; the public losses name and explain the arguments."""
    if (
        not torch.compiler.is_dynamo_compiling()
        and (common := COMMON.get("logit_loss"))
        and mask is None
        and weights is None
        and not with_terms
        and valid_classes is None
        and teacher_valid_classes is None
        and (backend is None or backend == "cpu")
    ):
        options = (spec, temperature, teacher_temperature, ignore_index, reduction)
        found = common(student, teacher, labels, *options, _again)
        if found is not None:
            return found, None
    return _logit_loss(
        student,
        teacher,
        labels,
        spec,
        temperature,
        teacher_temperature,
        ignore_index,
        reduction,
        mask,
        weights,
        valid_classes,
        teacher_valid_classes,
        with_terms,
        backend,
    )


def _loss(student: Tensor, teacher: Tensor, labels: Tensor | None, *options: Any) -> Tensor:
    return _logit_loss(student, teacher, labels, *options)[0]


_again = again_by(_loss)


def _logit_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    spec: Spec,
    temperature: Temperature,
    teacher_temperature: Temperature | None,
    ignore_index: int,
    reduction: str,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    valid_classes: Range = None,
    teacher_valid_classes: Range = None,
    with_terms: bool = False,
    backend: str | None = "cpu",
) -> tuple[Tensor, Tensor | None]:
    ranges = check_logits(student, teacher, valid_classes, teacher_valid_classes)
    if teacher is None and spec.reads_target:
        refuse_logits(student, teacher)
    check_reduction(reduction)
    backend = resolve(backend, student, "student")
    shape = student.shape[:-1]
    dtype = statistics_dtype(student.dtype)
    temperature, teacher_temperature = check_temperatures(temperature, teacher_temperature, student, dtype)
    if spec.divergence == NONE:
        temperature = teacher_temperature = 1.0
    if mask is not None:
        mask = check_mask(mask, student)
    if weights is not None:
        weights = check_weights(weights, student, dtype)
    start, teacher_start, classes = ranges
    if labels is not None:
        # The native CPU kernel looks for itself, but knows no numbering other than from 0.
        labels, counts = check_labels(
            labels, ignore_index, student, mask, start, classes, look=backend != "cpu" or start > 0
        )
        if counts is not None:
            mask = counts if mask is None else mask & counts
    elif spec.divergence in OF_LABELS:
        assert teacher is not None
        labels = teacher.detach().narrow(-1, teacher_start, classes).argmax(-1)
    if classes == 2 and spec.divergence in OF_LABELS:
        spec = spec._replace(second=0.0)  # one class is no distribution to match

    if backend == "reference":
        loss, every = logit_loss_reference(
            student.narrow(-1, start, classes),
            None if teacher is None else teacher.narrow(-1, teacher_start, classes),
            labels,
            temperature,
            teacher_temperature,
            weights,
            mask,
            spec,
            reduction,
        )
        return loss, every if with_terms else None

    input = as_matrix(student)
    target = None if teacher is None or not spec.reads_target else as_matrix(teacher)
    temperature, teacher_temperature, labels, mask, weights = as_vectors(
        temperature, teacher_temperature, labels, mask, weights
    )
    terms: Tensor | None
    if torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad
        for x in (input, target, temperature, teacher_temperature, weights)
    ):
        loss, terms = _LogitLoss.apply(
            input,
            target,
            temperature,
            teacher_temperature,
            weights,
            labels,
            mask,
            spec,
            ranges,
            reduction,
            with_terms,
            backend,
        )
    else:
        scales = scale_of_rows(weights, mask, reduction, input.shape[0], dtype)
        temperatures = split_temperatures(temperature, teacher_temperature)
        loss, *rest = run_logit_loss(
            True,
            input,
            target,
            labels,
            *temperatures,
            *scales,
            mask,
            *spec,
            *ranges,
            with_terms,
            NOTHING,
            backend,
        )
        terms = rest[0] if with_terms else None
        if reduction != "none":
            loss = sum_of_rows(loss, backend)
            terms = None if terms is None else terms.sum(1)
    if reduction == "none":
        loss = loss.view(shape)
        terms = None if terms is None else terms.view(len(TERMS), *shape)
    return loss, terms
