r"""Row-wise KL divergence from a teacher known by its k largest log-probabilities.

What is left of a teacher whose logits were stored, or sent, as their top k; what the choice of the tail does to
the student: Anshumann et al. 2025 (arXiv 2503.16870). For a row of logits s ("input") with temperature T, and
log-probabilities log P_i at the classes I:

    Q = softmax(s / T),  D_i = log P_i - log Q_i,  Q_r = sum_{j not in I} Q_j

    bucket        sum_i P_i D_i + P_r log(P_r / Q_r),  P_r = max(0, 1 - sum_i P_i), without it where k = N
    renormalize   sum_i P'_i log(P'_i / Q'_i),  P' = P / sum_i P_i,  Q' = Q / sum_i Q_i
    drop          sum_i P_i D_i

Gradient, for a row that enters the loss with factor w; bucket with W = sum_i P_i + P_r (1 unless P_r = 0), drop
with P_r = 0 and W = sum_i P_i, renormalize with P', Q' in place of P, Q and nothing outside I:
    dL/ds_i       = w (W Q_i - P_i) / T             i in I
    dL/ds_j       = w (W Q_r - P_r) / T  Q_j / Q_r  j not in I
    dL/dT         = -1 / T  sum_j dL/ds_j s_j
    dL/dlog P_i   = w P_i (D_i - D_r), with D_r = log(P_r / Q_r), -1 where P_r = 0, and the loss for renormalize

Rounding: Q_r is the sum of what lies outside I, never 1 minus the rest, and the divergences are summed in the
Bregman form (kdkernels.ops.kl_div).

Saved: the inputs, and the gradient that the forward already computed, which the first backward hands out; any
later one computes it again. Double backward goes through the reference. With `valid_classes` the kernels see a
view of the valid columns, of the logits and of the one gradient.

Bytes moved per class by forward + backward: 1 read and 1 write of the input's dtype, where a row is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.backend import LIBRARY, fresh, launcher, resolve, statistics_dtype, sum_of_rows, unobserved
from kdkernels.ops.calls import COMMON, again_by
from kdkernels.ops.rows import (
    Range,
    Temperature,
    as_matrix,
    as_vectors,
    check_mask,
    check_range,
    check_reduction,
    check_student,
    check_temperature,
    check_weights,
    kind_of,
    reduce_rows,
    scale_of_rows,
)
from kdkernels.ops.scale_rows import scale_rows_

TAILS = ("bucket", "renormalize", "drop")  # in the order of csrc/kdkernels.h's Tail


def topk_kl_div_reference(
    student: Tensor,  # (..., N)
    teacher_log_probs: Tensor,  # (..., k)
    teacher_indices: Tensor,  # (..., k)
    *,
    temperature: Temperature = 1.0,
    tail: str = "bucket",
    mask: Tensor | None = None,  # rows
    weights: Tensor | None = None,  # rows
    reduction: str = "batchmean",
    valid_classes: Range = None,
) -> Tensor:
    """The specification of `topk_kl_div`: plain PyTorch, on any device, with any derivative.

    Same arguments and result as `topk_kl_div`, which checks them; here they are taken as they come.
    """
    start, stop = check_range(valid_classes, "valid_classes", student.shape[-1])
    dtype, k = statistics_dtype(student.dtype), teacher_indices.shape[-1]
    logits, log_p = student[..., start:stop].to(dtype), teacher_log_probs.to(dtype)
    indices = teacher_indices.long() - start
    if mask is not None:  # a row that does not count is not looked at: whatever it holds cannot spread
        logits, log_p = (torch.where(mask[..., None], x, 0) for x in (logits, log_p))
        indices = torch.where(mask[..., None], indices, torch.arange(k, device=indices.device))
    logits = logits / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    log_q = logits.gather(-1, indices)
    if tail == "renormalize":
        log_p, log_q = torch.log_softmax(log_p, -1), torch.log_softmax(log_q, -1)
        p_rest = None
    else:
        lse = torch.logsumexp(logits, -1, keepdim=True)
        log_q = log_q - lse
        if tail == "bucket" and k < stop - start:
            p_rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=0)
            log_p_rest = torch.where(p_rest > 0, torch.where(p_rest > 0, p_rest, 1).log(), -torch.inf)
            outside = logits.scatter(-1, indices, -torch.inf)
            # Where nothing is outside, the gradient of its logsumexp is of the form inf - inf.
            empty = (outside == -torch.inf).all(-1, keepdim=True)
            lse_rest = torch.logsumexp(torch.where(empty, 0, outside), -1, keepdim=True)
            log_q_rest = torch.where(empty, -torch.inf, lse_rest) - lse
            log_p = torch.cat([log_p, log_p_rest], -1)
            log_q = torch.cat([log_q, log_q_rest], -1)
        else:
            p_rest = torch.zeros_like(lse)
    p, q = log_p.exp(), log_q.exp()
    delta = torch.where(p == 0, 0, log_p - log_q)
    near = delta.abs() < 1
    difference = torch.where(near & (p > 0), p * torch.expm1(-torch.where(near, delta, 0)), q - p).sum(-1)
    # Both sides sum to 1 where every class has its term: then these sum to 0, and to what rounding took from the
    # terms before them. Elsewhere they do not belong to the loss.
    if p_rest is not None:
        difference = torch.where(p_rest[..., 0] > 0, difference, 0)
    return reduce_rows((p * delta).sum(-1) + difference, mask, weights, reduction)


_INPUTS = (
    "Tensor input, Tensor log_probs, Tensor indices, Tensor? temperature, float temperature_value, "
    "Tensor? row_scale, float scale, Tensor? mask, int tail, int start, int stop, bool[] needs, str backend"
)
# Both give the gradients that `needs` asks for, in the order input, log_probs, temperature; the first gives the
# rows' losses before them. All are times row_scale (or scale). The classes are start to stop; what the gradient
# of the input has besides is 0.
LIBRARY.define(f"topk_kl_div_fwd({_INPUTS}) -> Tensor[]")
LIBRARY.define(f"topk_kl_div_bwd({_INPUTS}) -> Tensor[]")


def _outputs(input: Tensor, log_probs: Tensor, needs: Sequence[bool], with_loss: bool) -> list[Tensor | None]:
    rows, dtype = input.shape[0], statistics_dtype(input.dtype)
    return [
        torch.empty(rows, dtype=dtype, device=input.device) if with_loss else None,
        fresh(input.shape, input.dtype, input.device) if needs[0] else None,
        fresh(log_probs.shape, log_probs.dtype, log_probs.device) if needs[1] else None,
        torch.empty(rows, dtype=dtype, device=input.device) if needs[2] else None,
    ]


def _body(with_loss: bool, *arguments: Any) -> list[Tensor]:  # as in _INPUTS
    input, log_probs, indices, *rest, start, stop, needs, backend = arguments
    outputs = _outputs(input, log_probs, needs, with_loss)
    if input.shape[0]:
        loss, grad_input, *others = outputs
        if stop - start < input.shape[1]:
            input = input[:, start:stop]
            if grad_input is not None:
                grad_input[:, :start] = 0
                grad_input[:, stop:] = 0
                grad_input = grad_input[:, start:stop]
        inside = indices - start if start else indices
        try:
            launcher(backend, "topk_kl_div")(input, log_probs, inside, *rest, loss, grad_input, *others)
        except ValueError:  # the kernel met a wrong index; here its name and number are those of the caller
            check_topk_indices(indices, rest[4], start, stop)
            raise
    return [output for output in outputs if output is not None]


def _fake(with_loss: bool, input: Tensor, log_probs: Tensor, *arguments: Any) -> list[Tensor]:
    outputs = _outputs(input, log_probs, arguments[-2], with_loss)
    return [output for output in outputs if output is not None]


for _name, _with_loss in (("topk_kl_div_fwd", True), ("topk_kl_div_bwd", False)):
    LIBRARY.impl(_name, partial(_body, _with_loss), "CPU")
    LIBRARY.impl(_name, partial(_body, _with_loss), "CUDA")
    torch.library.register_fake(f"kdkernels::{_name}", partial(_fake, _with_loss), lib=LIBRARY)


def _run(with_loss: bool, input: Tensor, *arguments: Any) -> list[Tensor]:
    if unobserved(input):
        return _body(with_loss, input, *arguments)
    op = torch.ops.kdkernels.topk_kl_div_fwd if with_loss else torch.ops.kdkernels.topk_kl_div_bwd
    return op(input, *arguments)


NOTHING = (False, False, False)


class _TopkKLDiv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # (M, N)
        log_probs: Tensor,  # (M, k)
        temperature: Temperature,  # (M,)
        row_scale: Tensor | None,  # (M,)
        indices: Tensor,  # (M, k)
        mask: Tensor | None,  # (M,)
        *arguments: Any,  # scale, tail, start, stop, reduction, backend
    ) -> Tensor:
        scale, tail, start, stop, reduction, backend = arguments
        # A captured graph cannot hand a buffer out once: there the backward computes.
        compiling = torch.compiler.is_compiling()
        needs = NOTHING if compiling else ctx.needs_input_grad[:3]
        rows, *gradients = _run(
            True,
            input,
            log_probs,
            indices,
            *_split(temperature),
            row_scale,
            scale,
            mask,
            tail,
            start,
            stop,
            needs,
            backend,
        )
        ctx.gradients = None if compiling else gradients
        ctx.arguments = arguments
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        ctx.save_for_backward(
            input, log_probs, None if ctx.temperature else temperature, row_scale, indices, mask
        )
        return rows if reduction == "none" else sum_of_rows(rows, backend)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # () or (M,)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, grad_output)
        needs = ctx.needs_input_grad
        gradients, ctx.gradients = ctx.gradients, None
        upstream, of_row_scale = grad_output.contiguous(), None
        if gradients is None or needs[3]:
            input, log_probs, temperature, row_scale, indices, mask = ctx.saved_tensors
            scale, tail, start, stop, _, backend = ctx.arguments
            inputs = (input, log_probs, indices, temperature, ctx.temperature or 1.0)
            classes = (mask, tail, start, stop)
            if gradients is None:
                # The same kernel on the same inputs: bit for bit what the first backward had.
                gradients = []
                if any(needs[:3]):
                    gradients = _run(False, *inputs, row_scale, scale, *classes, needs[:3], backend)
            if needs[3]:
                [rows] = _run(True, *inputs, None, 1.0, *classes, NOTHING, backend)
                of_row_scale = rows * upstream
        for gradient in gradients:
            if gradient.shape[1:]:
                scale_rows_(gradient, upstream, ctx.arguments[-1])
            else:
                gradient.mul_(upstream)
        remaining = iter(gradients)
        found = [next(remaining) if need else None for need in needs[:3]]
        return (*found, of_row_scale, *(None,) * 8)


def _split(temperature: Temperature) -> tuple[Tensor | None, float]:
    return (temperature, 1.0) if isinstance(temperature, Tensor) else (None, temperature)


def _differentiable_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient as a graph, for ``create_graph=True``: autograd through the reference."""
    input, log_probs, temperature, row_scale, indices, mask = ctx.saved_tensors
    scale, tail, start, stop, reduction, _ = ctx.arguments
    temperature = ctx.temperature if temperature is None else temperature
    loss = topk_kl_div_reference(
        input,
        log_probs,
        indices,
        temperature=temperature,
        tail=TAILS[tail],
        mask=mask,
        weights=row_scale,
        reduction="none" if reduction == "none" else "sum",
        valid_classes=(start, stop),
    )
    needs = ctx.needs_input_grad[:4]
    sources = (input, log_probs, temperature, row_scale)
    wanted = [source for source, need in zip(sources, needs) if need]
    gradients = iter(torch.autograd.grad(loss * scale, wanted, grad_output, create_graph=True))
    return (*(next(gradients) if need else None for need in needs), *(None,) * 8)


def topk_kl_div(
    student: Tensor,
    teacher_log_probs: Tensor,
    teacher_indices: Tensor,
    *,
    temperature: Temperature = 1.0,
    tail: str = "bucket",
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "batchmean",
    valid_classes: Range = None,
    check_indices: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""KL(teacher‖student) of a teacher known by k log-probabilities a row; no T² factor.

    `teacher_log_probs` are the log of the teacher's softmax AT `temperature`, over all of its classes, and are used
    as they are: `temperature` divides the student's logits only. To make them::

        log_probs, indices = torch.log_softmax(teacher_logits / temperature, -1).topk(k)

    Args:
        student: (..., N) logits: float32, float16, bfloat16, or float64 (backends reference and cpu). −inf is
            legal (a masked class): where P_i > 0 there the row is +inf.
        teacher_log_probs: (..., k) with 1 <= k <= N, of any floating dtype. −inf is legal: no mass. Each value
            is differentiated as a variable of its own.
        teacher_indices: (..., k) of any integer dtype: the class of each value, in the student's numbering; no
            class twice in a row, in any order.
        temperature: a positive float, or a floating tensor that broadcasts to the rows (...), learnable. The
            values of a tensor are checked on the CPU only.
        tail: what becomes of the mass that the k leave over, P_r = max(0, 1 − Σ P_i). "bucket": one class on
            both sides, with the student's mass of all the classes that are not named; a divergence, 0 only
            where the student agrees. Where the teacher leaves no mass that class is P_r = 0; a student that
            leaves it none, but a teacher that does, if only by rounding, give +inf. "renormalize": teacher and
            student both sum to 1 over the k; no gradient to other classes. "drop": no term, Σ P_i log(P_i/Q_i).
        mask: bool, broadcasts to the rows: True where a row counts. A row that does not count is not read, so
            it may hold anything, wrong indices too; its loss and gradients are 0.
        weights: floating, broadcasts to the rows: multiplies each row's loss; differentiable.
        reduction: "none" (the rows), "sum", or "batchmean": the sum divided by how many rows count. With no
            row that counts the loss is 0.
        valid_classes: n for the first n classes, or (start, stop): the student's other columns are padding, of
            no mass and with a gradient of 0. Indices stay in the student's numbering, and lie inside.
        check_indices: whether Python looks at the indices (in a compiled graph it never does). None: on the
            CPU, where it is cheap; a GPU would have to wait, and gives NaN for a row with an index outside.
            Backend "cpu" always looks.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best that is available for the
            student's device and dtype (`available_backends`). A named one is obeyed or raises.

    Returns:
        The loss, () or (...): float32, or float64 for float64 logits. Its gradients have the inputs' dtypes.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, value or name; an index outside the classes, or twice in a row.
        RuntimeError: the named backend is not available.

    Second derivatives are right (they go through the reference). Equal inputs give bit-equal results.
    """
    if (
        not torch.compiler.is_dynamo_compiling()
        and (common := COMMON.get("topk_kl_div"))
        and mask is None
        and weights is None
        and valid_classes is None
        and not check_indices
        and (backend is None or backend == "cpu")
        and tail in TAILS
    ):
        found = common(
            student, teacher_log_probs, teacher_indices, temperature, TAILS.index(tail), reduction, _again
        )
        if found is not None:
            return found
    return _topk_kl_div(
        student,
        teacher_log_probs,
        teacher_indices,
        temperature,
        tail,
        reduction,
        mask,
        weights,
        valid_classes,
        check_indices,
        backend,
    )


def _topk_kl_div(
    student: Tensor,
    teacher_log_probs: Tensor,
    teacher_indices: Tensor,
    temperature: Temperature,
    tail: str,
    reduction: str,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    valid_classes: Range = None,
    check_indices: bool | None = None,
    backend: str | None = "cpu",
) -> Tensor:
    check_student(student)
    rows, classes = student.shape[:-1], student.shape[-1]
    start, stop = check_range(valid_classes, "valid_classes", classes)
    check_topk_teacher(student, teacher_log_probs, teacher_indices, stop - start)
    check_reduction(reduction)
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}")
    backend = resolve(backend, student, "student")
    dtype = statistics_dtype(student.dtype)
    temperature = check_temperature(temperature, "temperature", student, dtype)
    if mask is not None:
        mask = check_mask(mask, student)
    if weights is not None:
        weights = check_weights(weights, student, dtype)
    if check_indices or (check_indices is None and backend != "cpu" and student.device.type == "cpu"):
        check_topk_indices(teacher_indices, mask, start, stop)

    if backend == "reference":
        return topk_kl_div_reference(
            student,
            teacher_log_probs,
            teacher_indices,
            temperature=temperature,
            tail=tail,
            mask=mask,
            weights=weights,
            reduction=reduction,
            valid_classes=(start, stop),
        )

    input = as_matrix(student)
    k = teacher_indices.shape[-1]
    log_probs = teacher_log_probs.to(dtype).reshape(-1, k).contiguous()
    indices = teacher_indices.long().reshape(-1, k).contiguous()
    temperature, weights, mask = as_vectors(temperature, weights, mask)
    row_scale, scale = scale_of_rows(weights, mask, reduction, input.shape[0], dtype)
    options = (TAILS.index(tail), start, stop)
    if torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in (input, log_probs, temperature, row_scale)
    ):
        loss = _TopkKLDiv.apply(
            input, log_probs, temperature, row_scale, indices, mask, scale, *options, reduction, backend
        )
    else:
        [loss] = _run(
            True,
            input,
            log_probs,
            indices,
            *_split(temperature),
            row_scale,
            scale,
            mask,
            *options,
            NOTHING,
            backend,
        )
        if reduction != "none":
            loss = sum_of_rows(loss, backend)
    return loss.view(rows) if reduction == "none" else loss


def _by_python(student: Tensor, log_probs: Tensor, indices: Tensor, *rest: Any) -> Tensor:
    temperature, tail, reduction = rest
    return _topk_kl_div(student, log_probs, indices, temperature, TAILS[tail], reduction)


_again = again_by(_by_python)


def check_topk_teacher(student: Tensor, log_probs: Any, indices: Any, classes: int) -> None:
    rows = student.shape[:-1]
    if not isinstance(log_probs, Tensor) or not log_probs.is_floating_point():
        raise TypeError(f"teacher_log_probs must be a floating tensor, got {kind_of(log_probs)}")
    if (
        not isinstance(indices, Tensor)
        or indices.is_floating_point()
        or indices.is_complex()
        or indices.dtype == torch.bool
    ):
        raise TypeError(f"teacher_indices must be an integer tensor, got {kind_of(indices)}")
    if log_probs.dim() != student.dim() or log_probs.shape[:-1] != rows or log_probs.shape[-1] == 0:
        raise ValueError(
            f"teacher_log_probs must have shape (*rows, k) with the student's rows {tuple(rows)} and k >= 1, "
            f"got {tuple(log_probs.shape)}"
        )
    if indices.shape != log_probs.shape:
        raise ValueError(
            f"teacher_indices must have the shape of teacher_log_probs {tuple(log_probs.shape)}, "
            f"got {tuple(indices.shape)}"
        )
    if log_probs.shape[-1] > classes:
        raise ValueError(
            f"teacher_log_probs must not have more values in a row than there are classes, {classes}, "
            f"got {log_probs.shape[-1]}"
        )
    for name, tensor in (("teacher_log_probs", log_probs), ("teacher_indices", indices)):
        if tensor.device != student.device:
            raise ValueError(f"{name} must be on the student's device {student.device}, got {tensor.device}")


def check_topk_indices(indices: Tensor, mask: Tensor | None, start: int, stop: int) -> None:
    """Raises where a row that counts names a class outside start to stop, or one twice."""
    if torch.compiler.is_compiling() or not indices.numel():
        return
    if mask is not None:
        legal = torch.arange(start, start + indices.shape[-1], device=indices.device, dtype=indices.dtype)
        indices = torch.where(mask[..., None], indices, legal)
    flat = indices.reshape(-1, indices.shape[-1])
    outside = (flat < start) | (flat >= stop)
    ordered = flat.sort(-1).values
    again = torch.zeros_like(outside)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    for bad, values, allowed in (
        (outside, flat, f"a class is allowed from {start} to {stop - 1}"),
        (again, ordered, "a class is allowed once in a row"),
    ):
        where = bad.nonzero()
        if len(where):
            row, column = where[0].tolist()
            times = "twice" if bad is again else "a class outside the valid ones"
            raise ValueError(
                f"teacher_indices holds {values[row, column].item()} in row {row}, {times}: {allowed}"
            )


class TopKKLDivLoss(nn.Module):
    """`topk_kl_div` as a module: ``TopKKLDivLoss(temperature=2.0)(student, log_probs, indices)``.

    The options are those of `topk_kl_div`; ``mask`` and ``weights`` are given with each call. A temperature that
    is an ``nn.Parameter`` is a parameter of the module.
    """

    def __init__(
        self,
        *,
        temperature: Temperature = 1.0,
        tail: str = "bucket",
        reduction: str = "batchmean",
        valid_classes: Range = None,
        check_indices: bool | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        if tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}")
        self.temperature = temperature
        self.tail = tail
        self.reduction = reduction
        self.valid_classes = valid_classes
        self.check_indices = check_indices
        self.backend = backend

    def forward(
        self,
        student: Tensor,
        teacher_log_probs: Tensor,
        teacher_indices: Tensor,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        return topk_kl_div(
            student,
            teacher_log_probs,
            teacher_indices,
            temperature=self.temperature,
            tail=self.tail,
            mask=mask,
            weights=weights,
            reduction=self.reduction,
            valid_classes=self.valid_classes,
            check_indices=self.check_indices,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, tail={self.tail!r}, reduction={self.reduction!r}"
