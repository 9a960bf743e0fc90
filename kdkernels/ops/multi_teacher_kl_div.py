r"""Weighted sum of row-wise KL divergences from several teachers (You et al. 2017, doi 10.1145/3097983.3098135).

For rows of logits s ("input") and t_k ("targets"), k = 1 ... K, with temperatures T_k and weights w_k:

    P_k = softmax(t_k / T_k),  Q_k = softmax(s / T_k),  D_k = log P_k - log Q_k
    loss = sum_k w_k KL(P_k||Q_k)

Gradient:
    dloss/ds   = sum_k w_k (Q_k - P_k) / T_k            dloss/dw_k = KL(P_k||Q_k)
    dloss/dt_k = w_k P_k (D_k - KL_k) / T_k             dloss/dT_k: the two of kdkernels.ops.kl_div, times w_k

The weights that a kernel sees hold the rows' weights and the reduction too. Rounding: as in kdkernels.ops.kl_div
for each teacher; the sum over the teachers is held in float32 (float64), and rounded once.

Saved: the inputs, and the student's gradient that the forward already computed, which the first backward hands
out; any later one computes it again. The gradients of teachers and temperatures are made in the backward, by
kl_div_bwd. Double backward goes through the reference.

Bytes moved per class by forward + backward: 1 + K reads and 1 write of the input's dtype, where a row is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.backend import LIBRARY, fresh, launcher, resolve, statistics_dtype, sum_of_rows, unobserved
from kdkernels.ops.calls import COMMON, again_by
from kdkernels.ops.kl_div import kl_div_reference, run_kl_div
from kdkernels.ops.rows import (
    as_matrix,
    as_vectors,
    check_mask,
    check_reduction,
    check_student,
    check_temperature,
    check_temperature_tensor,
    check_weights,
    kind_of,
    reduce_rows,
    refuse_logits,
    scale_of_rows,
)
from kdkernels.ops.scale_rows import scale_rows_

MAX_TEACHERS = 16  # csrc/kdkernels.h's kMaxTeachers
Values = float | Sequence[float] | Tensor


def multi_teacher_kl_div_reference(
    student: Tensor,  # (..., N)
    teachers: Sequence[Tensor] | Tensor,  # K of (..., N)
    *,
    weights: Sequence[float] | Tensor | None = None,  # (K,) or (K, rows)
    temperatures: Values = 1.0,  # (), (K,) or (K, rows)
    mask: Tensor | None = None,  # rows
    teacher_mask: Tensor | None = None,  # (K,) or (K, rows)
    row_weights: Tensor | None = None,  # rows
    reduction: str = "batchmean",
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification of `multi_teacher_kl_div`: plain PyTorch, on any device, with any derivative.

    Same arguments and result as `multi_teacher_kl_div`, which checks them; here they are taken as they come.
    """
    rows = student.shape[:-1]
    terms, total = [], torch.zeros(rows, dtype=statistics_dtype(student.dtype), device=student.device)
    each: Any = temperatures
    if not (each.dim() if isinstance(each, Tensor) else isinstance(each, Sequence)):
        each = [each] * len(teachers)
    for k, teacher in enumerate(teachers):
        counts = mask
        if teacher_mask is not None:
            of_teacher = teacher_mask[k].expand(rows)
            counts = of_teacher if mask is None else of_teacher & mask
        term = kl_div_reference(student, teacher, temperature=each[k], mask=counts, reduction="none")
        terms.append(term.detach())
        if weights is None:
            total = total + term
        else:
            weight = weights[k]
            if counts is not None and isinstance(weight, Tensor):
                weight = torch.where(counts, weight, 0)
            total = total + weight * term
    loss = reduce_rows(total, mask, row_weights, reduction)
    if not return_terms:
        return loss
    row_weights = None if row_weights is None else row_weights.detach()
    return loss, torch.stack([reduce_rows(term, mask, row_weights, reduction) for term in terms])


_INPUTS = (
    "Tensor input, Tensor[] targets, Tensor? temperature, float[] temperature_values, Tensor? weight, "
    "float[] weight_values, Tensor? teacher_mask, Tensor? mask, bool[] needs, str backend"
)
# Both give what `needs` asks for: the KLs of each teacher, the gradient of the input. The first gives the rows'
# losses before them.
LIBRARY.define(f"multi_teacher_kl_div_fwd({_INPUTS}) -> Tensor[]")
LIBRARY.define(f"multi_teacher_kl_div_bwd({_INPUTS}) -> Tensor[]")


def _outputs(input: Tensor, teachers: int, needs: Sequence[bool], with_loss: bool) -> list[Tensor | None]:
    rows, dtype = input.shape[0], statistics_dtype(input.dtype)
    return [
        torch.empty(rows, dtype=dtype, device=input.device) if with_loss else None,
        torch.empty(teachers, rows, dtype=dtype, device=input.device) if needs[0] else None,
        fresh(input.shape, input.dtype, input.device) if needs[1] else None,
    ]


def _body(
    with_loss: bool, input: Tensor, targets: Sequence[Tensor], *arguments: Any
) -> list[Tensor]:  # as in _INPUTS
    outputs = _outputs(input, len(targets), arguments[-2], with_loss)
    if input.shape[0]:
        launcher(arguments[-1], "multi_teacher_kl_div")(input, targets, *arguments[:-2], *outputs)
    return [output for output in outputs if output is not None]


def _fake(with_loss: bool, input: Tensor, targets: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    outputs = _outputs(input, len(targets), arguments[-2], with_loss)
    return [output for output in outputs if output is not None]


for _name, _with_loss in (("multi_teacher_kl_div_fwd", True), ("multi_teacher_kl_div_bwd", False)):
    LIBRARY.impl(_name, partial(_body, _with_loss), "CPU")
    LIBRARY.impl(_name, partial(_body, _with_loss), "CUDA")
    torch.library.register_fake(f"kdkernels::{_name}", partial(_fake, _with_loss), lib=LIBRARY)


def _run(with_loss: bool, input: Tensor, *arguments: Any) -> list[Tensor]:
    if unobserved(input):
        return _body(with_loss, input, *arguments)
    ops = torch.ops.kdkernels
    return (ops.multi_teacher_kl_div_fwd if with_loss else ops.multi_teacher_kl_div_bwd)(input, *arguments)


class _MultiTeacherKLDiv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # (M, N)
        temperature: Tensor | None,  # (K, M)
        weight: Tensor | None,  # (K, M), with the rows' weights and the reduction
        temperature_values: Sequence[float],  # K
        weight_values: Sequence[float],  # K
        teacher_mask: Tensor | None,  # (K, M)
        mask: Tensor | None,  # (M,)
        with_terms: bool,
        reduction: str,
        backend: str,
        *targets: Tensor,  # K of (M, N)
    ) -> Any:
        needs = ctx.needs_input_grad
        # A captured graph cannot hand a buffer out once: there the backward computes.
        compiling = torch.compiler.is_compiling()
        wanted = (with_terms or needs[2], needs[0] and not compiling)
        arguments = (temperature, temperature_values, weight, weight_values, teacher_mask, mask)
        rows, *others = _run(True, input, targets, *arguments, wanted, backend)
        losses = others[0] if wanted[0] else None
        ctx.gradient = others[-1] if wanted[1] else None
        ctx.arguments = (temperature_values, weight_values, reduction, backend)
        ctx.save_for_backward(input, temperature, weight, teacher_mask, mask, losses, *targets)
        loss = rows if reduction == "none" else sum_of_rows(rows, backend)
        if not with_terms:
            return loss
        ctx.mark_non_differentiable(losses)
        return loss, losses

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # () or (M,)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, grad_output)
        needs, of_input, of_temperature, of_weight = ctx.needs_input_grad, None, None, None
        of_targets: list[Tensor | None] = [None] * len(needs[10:])
        input, temperature, weight, teacher_mask, mask, losses, *targets = ctx.saved_tensors
        temperature_values, weight_values, _, backend = ctx.arguments
        upstream = grad_output.contiguous()
        if needs[0]:
            of_input, ctx.gradient = ctx.gradient, None
            if of_input is None:
                # The same kernel on the same inputs: bit for bit what the first backward had.
                arguments = (temperature, temperature_values, weight, weight_values, teacher_mask, mask)
                [of_input] = _run(False, input, targets, *arguments, (False, True), backend)
            scale_rows_(of_input, upstream, backend)
        if needs[2]:
            of_weight = losses * upstream
        if needs[1] or any(needs[10:]):
            over_rows = upstream.expand(input.shape[0])
            of_temperatures: list[Tensor] = []
            for k, target in enumerate(targets):
                counts = mask
                if teacher_mask is not None:
                    counts = (teacher_mask[k] if mask is None else teacher_mask[k] & mask).contiguous()
                of_row = None if temperature is None else temperature[k].contiguous()
                scale = over_rows * (weight_values[k] if weight is None else weight[k])
                found = run_kl_div(
                    False,
                    input,
                    target,
                    of_row,
                    of_row,
                    temperature_values[k],
                    temperature_values[k],
                    scale,
                    1.0,
                    counts,
                    (False, needs[10 + k], needs[1], needs[1]),
                    backend,
                )
                if needs[10 + k]:
                    of_targets[k] = found[0]
                if needs[1]:
                    of_temperatures.append(found[-2] + found[-1])
            of_temperature = torch.stack(of_temperatures) if needs[1] else None
        return (of_input, of_temperature, of_weight, *(None,) * 7, *of_targets)


def _differentiable_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient as a graph, for ``create_graph=True``: autograd through the reference."""
    input, temperature, weight, teacher_mask, mask, _, *targets = ctx.saved_tensors
    temperature_values, weight_values, reduction, _ = ctx.arguments
    loss = multi_teacher_kl_div_reference(
        input,
        targets,
        weights=weight_values if weight is None else weight,
        temperatures=temperature_values if temperature is None else temperature,
        mask=mask,
        teacher_mask=teacher_mask,
        reduction="none" if reduction == "none" else "sum",
    )
    assert isinstance(loss, Tensor)
    sources = (input, temperature, weight, *(None,) * 7, *targets)
    wanted = [source for source, need in zip(sources, ctx.needs_input_grad) if need]
    gradients = iter(torch.autograd.grad(loss, wanted, grad_output, create_graph=True))
    return tuple(next(gradients) if need else None for need in ctx.needs_input_grad)


def multi_teacher_kl_div(
    student: Tensor,
    teachers: Sequence[Tensor] | Tensor,
    *,
    weights: Sequence[float] | Tensor | None = None,
    temperatures: Values = 1.0,
    mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    row_weights: Tensor | None = None,
    reduction: str = "batchmean",
    return_terms: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Σ_k weight_k KL(softmax(teacher_k / T_k)‖softmax(student / T_k)), row by row; no T² factor.

    The student is read once for all teachers, and there is one gradient. The stochastic drop of densely guided
    distillation (Son et al. 2021, arXiv 2009.08825) is a `teacher_mask` drawn for each call.

    Args:
        student: (..., N) logits: float32, float16, bfloat16, or float64 (backends reference and cpu).
        teachers: 1 to 16 tensors of the student's shape, dtype and device, or one tensor (K, ..., N); they are
            not copied. Gradients go to those that require them. −inf is legal in all (a masked class): where
            p > 0 and q = 0 the row is +inf.
        weights: w_k: None (each 1), K floats, a floating tensor (K,), or one of as many dimensions as
            (K, rows) that broadcasts to it; differentiable.
        temperatures: T_k: a positive float, K of them, or a floating tensor as for `weights` (or a scalar);
            learnable. The values of a tensor are checked on the CPU only.
        mask: bool, broadcasts to the rows: True where a row counts. A row that does not count is not read, so
            it may hold anything; its loss and gradients are 0.
        teacher_mask: bool, (K,) or as for `weights`: False leaves a teacher, or its row, out of the sum. It is
            not read there. A row that every teacher is left out of has loss 0, and still counts.
        row_weights: floating, broadcasts to the rows: multiplies each row's loss; differentiable.
        reduction: "none" (the rows), "sum", or "batchmean": the sum divided by how many rows count (those
            that `mask` leaves). With no row that counts the loss is 0.
        return_terms: also return each teacher's loss, without its weight.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best that is available for the
            student's device and dtype (`available_backends`). A named one is obeyed or raises.

    Returns:
        The loss, () or (...): float32, or float64 for float64 logits. Its gradients have the inputs' dtypes. With
        `return_terms` a pair: the loss, and the teachers' losses, (K,) or (K, ...), detached, with the same
        row_weights and reduction, so that the loss is their sum, each times its weight.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, value, number of teachers or name.
        RuntimeError: the named backend is not available.

    Second derivatives are right (they go through the reference). Equal inputs give bit-equal results.

    >>> kdkernels.multi_teacher_kl_div(student, [teacher, assistant], weights=[0.7, 0.3], temperatures=4.0)
    """
    if (
        not torch.compiler.is_dynamo_compiling()
        and (common := COMMON.get("multi_teacher_kl_div"))
        and mask is None
        and teacher_mask is None
        and row_weights is None
        and not return_terms
        and (backend is None or backend == "cpu")
    ):
        found = common(student, teachers, weights, temperatures, reduction, _again)
        if found is not None:
            return found
    return _multi_teacher_kl_div(
        student,
        teachers,
        weights,
        temperatures,
        reduction,
        mask,
        teacher_mask,
        row_weights,
        return_terms,
        backend,
    )


def _multi_teacher_kl_div(
    student: Tensor,
    teachers: Sequence[Tensor] | Tensor,
    weights: Sequence[float] | Tensor | None,
    temperatures: Values,
    reduction: str,
    mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    row_weights: Tensor | None = None,
    return_terms: bool = False,
    backend: str | None = "cpu",
) -> Tensor | tuple[Tensor, Tensor]:
    check_student(student)
    teachers = _check_teachers(student, teachers)
    check_reduction(reduction)
    backend = resolve(backend, student, "student")
    rows, count = student.shape[:-1], len(teachers)
    dtype = statistics_dtype(student.dtype)
    temperature, temperature_values = _check_temperatures(temperatures, student, count, dtype)
    weight, weight_values = _check_teacher_weights(weights, student, count, dtype)
    if mask is not None:
        mask = check_mask(mask, student)
    if teacher_mask is not None:
        if not isinstance(teacher_mask, Tensor) or teacher_mask.dtype != torch.bool:
            raise TypeError(f"teacher_mask must be a bool tensor, got {kind_of(teacher_mask)}")
        teacher_mask = _over_teachers(teacher_mask, "teacher_mask", student, count)
    if row_weights is not None:
        row_weights = check_weights(row_weights, student, dtype, "row_weights")

    if backend == "reference":
        return multi_teacher_kl_div_reference(
            student,
            teachers,
            weights=weight_values if weight is None else weight,
            temperatures=temperature_values if temperature is None else temperature,
            mask=mask,
            teacher_mask=teacher_mask,
            row_weights=row_weights,
            reduction=reduction,
            return_terms=return_terms,
        )

    input, targets = as_matrix(student), [as_matrix(teacher) for teacher in teachers]
    mask, row_weights = as_vectors(mask, row_weights)
    temperature, weight, teacher_mask = (
        x if x is None else x.reshape(count, -1) for x in (temperature, weight, teacher_mask)
    )
    row_scale, scale = scale_of_rows(row_weights, mask, reduction, input.shape[0], dtype)
    if weight is not None:
        if mask is not None:  # what does not count must not spread through the products below
            weight = torch.where(mask, weight, 0)
        if teacher_mask is not None:
            weight = torch.where(teacher_mask, weight, 0)
        weight = weight * (scale if row_scale is None else row_scale)
    elif row_scale is not None:
        weight = torch.stack([row_scale * value for value in weight_values])
    else:
        weight_values = [value * scale for value in weight_values]

    arguments = (temperature_values, weight_values, teacher_mask, mask)
    losses = None
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (input, temperature, weight, *targets)
    ):
        found = _MultiTeacherKLDiv.apply(
            input, temperature, weight, *arguments, return_terms, reduction, backend, *targets
        )
        loss, losses = found if return_terms else (found, None)
    else:
        loss, *found = _run(
            True,
            input,
            targets,
            temperature,
            temperature_values,
            weight,
            weight_values,
            teacher_mask,
            mask,
            (return_terms, False),
            backend,
        )
        losses = found[0] if return_terms else None
        if reduction != "none":
            loss = sum_of_rows(loss, backend)
    if reduction == "none":
        loss = loss.view(rows)
    if losses is None:
        return loss
    losses = losses * (scale if row_scale is None else row_scale.detach())
    return loss, losses.view(count, *rows) if reduction == "none" else losses.sum(1)


def _by_python(student: Tensor, *rest: Any) -> Any:
    *teachers, weights, temperatures, reduction = rest
    return _multi_teacher_kl_div(student, teachers, weights, temperatures, reduction)


_again = again_by(_by_python)


def _check_teachers(student: Tensor, teachers: Any) -> list[Tensor]:
    if isinstance(teachers, Tensor):
        if teachers.dim() != student.dim() + 1:
            raise ValueError(
                f"teachers must be a sequence of tensors of the student's shape {tuple(student.shape)}, or one "
                f"tensor (K, *that), got one of shape {tuple(teachers.shape)}"
            )
        teachers = teachers.unbind(0)
    elif not isinstance(teachers, Sequence):
        raise TypeError(f"teachers must be a sequence of tensors or one tensor, got {kind_of(teachers)}")
    if not 1 <= len(teachers) <= MAX_TEACHERS:
        raise ValueError(f"teachers must hold 1 to {MAX_TEACHERS} teachers, got {len(teachers)}")
    for k, teacher in enumerate(teachers):
        if not (
            isinstance(teacher, Tensor)
            and teacher.shape == student.shape
            and teacher.dtype == student.dtype
            and teacher.device == student.device
        ):
            refuse_logits(student, teacher, f"teachers[{k}]")
    return list(teachers)


def _check_temperatures(
    value: Any, student: Tensor, count: int, dtype: torch.dtype
) -> tuple[Tensor | None, list[float]]:
    """As the op takes them: (K, *rows) and nothing, or K floats."""
    if isinstance(value, Tensor):
        check_temperature_tensor(value, "temperatures")
        return _over_teachers(value, "temperatures", student, count).to(dtype), [1.0] * count
    if not isinstance(value, Sequence) or isinstance(value, str):
        number = check_temperature(value, "temperatures", student, dtype)
        assert isinstance(number, float)
        return None, [number] * count
    numbers = _floats(value, "temperatures", count)
    return None, [float(check_temperature(x, f"temperatures[{k}]", student, dtype)) for k, x in numbers]


def _check_teacher_weights(
    value: Any, student: Tensor, count: int, dtype: torch.dtype
) -> tuple[Tensor | None, list[float]]:
    """As _check_temperatures."""
    if value is None:
        return None, [1.0] * count
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"weights must be floats or a floating tensor, got {kind_of(value)}")
        return _over_teachers(value, "weights", student, count).to(dtype), [1.0] * count
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"weights must be None, a sequence of floats or a tensor, got {kind_of(value)}")
    weights = []
    for k, x in _floats(value, "weights", count):
        try:
            weights.append(float(x))
        except (TypeError, ValueError):
            raise TypeError(f"weights[{k}] must be a float, got {kind_of(x)}") from None
    return None, weights


def _floats(value: Sequence[Any], name: str, count: int) -> list[tuple[int, Any]]:
    if len(value) != count:
        raise ValueError(f"{name} must have one value for each of the {count} teachers, got {len(value)}")
    for k, x in enumerate(value):
        if isinstance(x, Tensor):  # float(x) would cut it from its graph, and wait for a GPU
            raise TypeError(f"{name}[{k}] must be a float, got {kind_of(x)}: give all in one tensor")
    return list(enumerate(value))


def _over_teachers(value: Tensor, name: str, student: Tensor, count: int) -> Tensor:
    """`value` expanded to (K, *rows)."""
    rows = student.shape[:-1]
    if value.device != student.device:
        raise ValueError(f"{name} must be on the student's device {student.device}, got {value.device}")
    whole = (count, *rows)
    shape = tuple(value.shape)
    if value.dim() == 1 and len(rows):  # of the teachers, also where there are as many rows
        shape = (*shape, *(1,) * len(rows))
    fits = len(shape) == len(whole) and all(have in (1, want) for have, want in zip(shape, whole))
    if not fits and not (value.dim() == 0 and name == "temperatures"):
        raise ValueError(
            f"{name} must have shape ({count},), or broadcast to (teachers, *rows) = {whole} with as many "
            f"dimensions, got shape {tuple(value.shape)}"
        )
    return value.view(shape).expand(whole)


class MultiTeacherKLDivLoss(nn.Module):
    """`multi_teacher_kl_div` as a module: ``MultiTeacherKLDivLoss(temperatures=4.0)(student, teachers)``.

    The options are those of `multi_teacher_kl_div`; ``mask``, ``teacher_mask`` and ``row_weights`` are given with
    each call. Weights or temperatures that are an ``nn.Parameter`` are parameters of the module.
    """

    def __init__(
        self,
        *,
        weights: Sequence[float] | Tensor | None = None,
        temperatures: Values = 1.0,
        reduction: str = "batchmean",
        return_terms: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        self.weights = weights
        self.temperatures = temperatures
        self.reduction = reduction
        self.return_terms = return_terms
        self.backend = backend

    def forward(
        self,
        student: Tensor,
        teachers: Sequence[Tensor] | Tensor,
        *,
        mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return multi_teacher_kl_div(
            student,
            teachers,
            weights=self.weights,
            temperatures=self.temperatures,
            mask=mask,
            teacher_mask=teacher_mask,
            row_weights=row_weights,
            reduction=self.reduction,
            return_terms=self.return_terms,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"weights={self.weights}, temperatures={self.temperatures}, reduction={self.reduction!r}"
