r"""Row-wise KL divergence of temperature softmaxes (Hinton, Vinyals, Dean 2015, arXiv 1503.02531).

For rows of logits t ("target", P's side) and s ("input", Q's side), with temperatures T_P and T_Q:

    P = softmax(t / T_P),  Q = softmax(s / T_Q),  D = log P - log Q,  KL(P||Q) = sum_j P_j D_j

The teacher is the target and the student the input; ``reverse`` exchanges the two and nothing else.

Gradient, for a row that enters the loss with factor w:
    dKL/ds_j  = w (Q_j - P_j) / T_Q              dKL/dT_Q = -w / T_Q  sum_j (Q_j - P_j) s_j / T_Q
    dKL/dt_j  = w P_j (D_j - KL) / T_P           dKL/dT_P = -w / T_P  sum_j P_j (D_j - KL) t_j / T_P

Rounding: the logits are differenced first, and KL is summed in the Bregman form sum_j P_j (D_j + e^-D_j - 1),
whose terms are all >= 0 and of second order, so that nothing cancels as the student approaches the teacher.

Saved: the inputs, and the gradient that the forward already computed while it had the rows at hand. The first
backward hands that buffer out; any later one computes it again from the inputs. Double backward goes through
the reference.

Bytes moved per element by forward + backward of one side: 2 reads and 1 write of the input's dtype, where a
row is read once (kdkernels._triton.kl_div says for which sizes that holds on a GPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels.backend import LIBRARY, fresh, launcher, resolve, statistics_dtype, sum_of_rows, unobserved
from kdkernels.ops.calls import COMMON, again_by
from kdkernels.ops.divergences import KL, REVERSE_KL, Spec, kl_rows
from kdkernels.ops.logit_loss import logit_loss
from kdkernels.ops.module import LossModule
from kdkernels.ops.rows import (
    Range,
    Temperature,
    as_matrix,
    as_vectors,
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


def kl_div_reference(
    student: Tensor,  # (..., N)
    teacher: Tensor,  # (..., N)
    *,
    temperature: Temperature = 1.0,
    teacher_temperature: Temperature | None = None,
    reverse: bool = False,
    mask: Tensor | None = None,  # rows
    weights: Tensor | None = None,  # rows
    reduction: str = "batchmean",
) -> Tensor:
    """The specification of `kl_div`: plain PyTorch, on any device, with any derivative.

    Same arguments and result as `kl_div`, which checks them; here they are taken as they come.
    """
    if teacher_temperature is None:
        teacher_temperature = temperature
    q_logits, p_logits, q_temperature, p_temperature = student, teacher, temperature, teacher_temperature
    if reverse:
        q_logits, p_logits, q_temperature, p_temperature = teacher, student, teacher_temperature, temperature
    if mask is not None:  # a row that does not count is not looked at: whatever it holds cannot spread
        q_logits, p_logits = (torch.where(mask[..., None], x, 0) for x in (q_logits, p_logits))
    log_q, log_p = (
        torch.log_softmax(
            x.to(statistics_dtype(x.dtype)) / (t[..., None] if isinstance(t, Tensor) else t), -1
        )
        for x, t in ((q_logits, q_temperature), (p_logits, p_temperature))
    )
    return reduce_rows(kl_rows(log_p, log_q), mask, weights, reduction)


_INPUTS = (
    "Tensor input, Tensor target, Tensor? input_temperature, Tensor? target_temperature, "
    "float input_temperature_value, float target_temperature_value, Tensor? row_scale, float scale, "
    "Tensor? mask, bool[] needs, str backend"
)
# Both give the gradients that `needs` asks for, in the order input, target, input_temperature,
# target_temperature; the first gives the rows' losses before them. All are times row_scale (or scale).
LIBRARY.define(f"kl_div_fwd({_INPUTS}) -> Tensor[]")
LIBRARY.define(f"kl_div_bwd({_INPUTS}) -> Tensor[]")


def _outputs(input: Tensor, needs: Sequence[bool], with_loss: bool) -> list[Tensor | None]:
    rows = input.shape[0]
    dtype = statistics_dtype(input.dtype)
    return [
        torch.empty(rows, dtype=dtype, device=input.device) if with_loss else None,
        fresh(input.shape, input.dtype, input.device) if needs[0] else None,
        fresh(input.shape, input.dtype, input.device) if needs[1] else None,
        torch.empty(rows, dtype=dtype, device=input.device) if needs[2] else None,
        torch.empty(rows, dtype=dtype, device=input.device) if needs[3] else None,
    ]


def _body(with_loss: bool, input: Tensor, target: Tensor, *arguments: Any) -> list[Tensor]:  # as in _INPUTS
    outputs = _outputs(input, arguments[-2], with_loss)
    if input.shape[0]:
        launcher(arguments[-1], "kl_div")(input, target, *arguments[:-2], *outputs)
    return [output for output in outputs if output is not None]


def _fake(with_loss: bool, input: Tensor, *arguments: Any) -> list[Tensor]:
    return [output for output in _outputs(input, arguments[-2], with_loss) if output is not None]


for _name, _with_loss in (("kl_div_fwd", True), ("kl_div_bwd", False)):
    LIBRARY.impl(_name, partial(_body, _with_loss), "CPU")
    LIBRARY.impl(_name, partial(_body, _with_loss), "CUDA")
    torch.library.register_fake(f"kdkernels::{_name}", partial(_fake, _with_loss), lib=LIBRARY)


def run_kl_div(with_loss: bool, input: Tensor, *arguments: Any) -> list[Tensor]:
    if unobserved(input):
        return _body(with_loss, input, *arguments)
    return (torch.ops.kdkernels.kl_div_fwd if with_loss else torch.ops.kdkernels.kl_div_bwd)(
        input, *arguments
    )


class _KLDiv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # (M, N)
        target: Tensor,  # (M, N)
        input_temperature: Temperature,  # (M,)
        target_temperature: Temperature,  # (M,)
        weights: Tensor | None,  # (M,)
        mask: Tensor | None,  # (M,)
        reduction: str,
        backend: str,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        row_scale, scale = scale_of_rows(
            weights, mask, reduction, input.shape[0], statistics_dtype(input.dtype)
        )
        # What the weights' gradient is made of are unscaled losses: then the scaling is left to the backward.
        late_scale = row_scale if needs[4] else None
        arguments = (
            *split_temperatures(input_temperature, target_temperature),
            *((None, 1.0) if needs[4] else (row_scale, scale)),
            mask,
        )
        # A captured graph cannot hand a buffer out once: there the backward computes.
        compiling = torch.compiler.is_compiling()
        rows, *gradients = run_kl_div(
            True, input, target, *arguments, NOTHING if compiling else needs[:4], backend
        )
        ctx.gradients = None if compiling else gradients
        ctx.arguments = (*arguments[2:4], arguments[5], reduction, backend)
        ctx.save_for_backward(
            input,
            target,
            *arguments[:2],
            weights,
            mask,
            arguments[4],
            late_scale,
            rows if needs[4] else None,
        )
        if late_scale is not None:
            rows = rows * late_scale
        return rows if reduction == "none" else sum_of_rows(rows, backend)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # () or (M,)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, grad_output)
        needs = ctx.needs_input_grad
        gradients, ctx.gradients = ctx.gradients, None
        upstream, of_weights = grad_output.contiguous(), None
        if gradients is None or needs[4]:
            input, target, *temperatures, _, mask, row_scale, late_scale, rows = ctx.saved_tensors
            *values, scale, reduction, backend = ctx.arguments
            if gradients is None:
                # The same kernel on the same inputs: bit for bit what the first backward had.
                arguments = (*temperatures, *values, row_scale, scale, mask, needs[:4], backend)
                gradients = run_kl_div(False, input, target, *arguments) if any(needs[:4]) else []
            if needs[4]:
                each, one = scale_of_rows(None, mask, reduction, rows.shape[0], rows.dtype)
                of_weights = rows * grad_output * (one if each is None else each)
                upstream = grad_output * late_scale
        for gradient in gradients:
            if gradient.dim() == 2:
                scale_rows_(gradient, upstream, ctx.arguments[-1])
            else:
                gradient.mul_(upstream)
        remaining = iter(gradients)
        found = [next(remaining) if need else None for need in needs[:4]]
        return (*found, of_weights, None, None, None)


NOTHING = (False, False, False, False)


def _differentiable_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient as a graph, for ``create_graph=True``: autograd through the reference."""
    input, target, input_temperature, target_temperature, weights, mask, *_ = ctx.saved_tensors
    temperatures = (
        ctx.arguments[0] if input_temperature is None else input_temperature,
        ctx.arguments[1] if target_temperature is None else target_temperature,
    )
    loss = kl_div_reference(
        input,
        target,
        temperature=temperatures[0],
        teacher_temperature=temperatures[1],
        mask=mask,
        weights=weights,
        reduction=ctx.arguments[3],
    )
    sources = (input, target, *temperatures, weights)
    wanted = [source for source, need in zip(sources, ctx.needs_input_grad) if need]
    gradients = iter(torch.autograd.grad(loss, wanted, grad_output, create_graph=True))
    return (*(next(gradients) if need else None for need in ctx.needs_input_grad[:5]), None, None, None)


def kl_div(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: Temperature = 1.0,
    teacher_temperature: Temperature | None = None,
    reverse: bool = False,
    standardize: bool = False,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "batchmean",
    valid_classes: Range = None,
    teacher_valid_classes: Range = None,
    backend: str | None = None,
) -> Tensor:
    r"""KL(teacher‖student) of temperature softmaxes, row by row; no T² factor.

    Each row is KL(p‖q) = Σ p (log p − log q) with p = softmax(teacher / T_t), q = softmax(student / T_s).
    Multiply the result by T² for the loss of Hinton et al. (arXiv 1503.02531).

    Args:
        student: (..., N) logits: float32, float16, bfloat16, or float64 (backends reference and cpu).
        teacher: (..., N) logits of the same shape, dtype and device. −inf is legal in both (a masked class):
            where p > 0 and q = 0 the row is +inf. Gradients go to the teacher too when it requires them.
        temperature: T_s, and T_t unless given: a positive float, or a floating tensor that broadcasts to the
            rows (...), learnable. The values of a tensor are checked on the CPU only (a GPU would have to
            wait); there a value ≤ 0 gives what the formula gives.
        teacher_temperature: T_t, when it differs.
        reverse: KL(student‖teacher) instead, KL(q‖p).
        standardize: take (z − mean) / (1e-7 + std) of each row (std over N − 1) instead of the logits z, on both
            sides (LSKD, arXiv 2403.01427); a constant row gives zeros.
        mask: bool, broadcasts to the rows: True where a row counts. A row that does not count is not read,
            so it may hold anything; its loss and gradients are 0.
        weights: floating, broadcasts to the rows: multiplies each row's loss; differentiable.
        reduction: "none" (the rows), "sum", or "batchmean": the sum divided by how many rows count (those
            that the mask leaves, whatever their weights). With no row that counts the loss is 0.
        valid_classes: the student's classes that there are: the first n, or (start, stop). The others (padding of
            a vocabulary) carry no mass and get no gradient. The teacher's too, unless
            ``teacher_valid_classes`` is given; the two must be equally long.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best that is available for the
            student's device and dtype (`available_backends`). A named one is obeyed or raises.

    Returns:
        The loss, () or (...): float32, or float64 for float64 logits. Its gradients have the inputs' dtypes.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, value or name.
        RuntimeError: the named backend is not available.

    Second derivatives are right (they go through the reference). Equal inputs give bit-equal results.

    >>> loss = 4.0**2 * kdkernels.kl_div(student_logits, teacher_logits, temperature=4.0)
    """
    if standardize or valid_classes is not None or teacher_valid_classes is not None:
        loss, _ = logit_loss(
            student,
            teacher,
            None,
            Spec(REVERSE_KL if reverse else KL, standardize=standardize),
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            mask=mask,
            weights=weights,
            reduction=reduction,
            valid_classes=valid_classes,
            teacher_valid_classes=teacher_valid_classes,
            backend=backend,
        )
        return loss
    if (
        not torch.compiler.is_dynamo_compiling()
        and (common := COMMON.get("kl_div"))
        and mask is None
        and weights is None
        and (backend is None or backend == "cpu")
    ):
        found = common(student, teacher, temperature, teacher_temperature, reverse, reduction, _again)
        if found is not None:
            return found
    return _kl_div(
        student, teacher, temperature, teacher_temperature, reverse, reduction, mask, weights, backend
    )


def _kl_div(
    student: Tensor,
    teacher: Tensor,
    temperature: Temperature,
    teacher_temperature: Temperature | None,
    reverse: bool,
    reduction: str,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    backend: str | None = "cpu",
) -> Tensor:
    # In one expression, before anything else is called: at 128×100 a tenth of the call was spent on checks.
    if not (
        isinstance(student, Tensor)
        and isinstance(teacher, Tensor)
        and (shape := student.shape) == teacher.shape
        and shape
        and shape[-1]
        and student.dtype == teacher.dtype
        and student.device == teacher.device
    ):
        refuse_logits(student, teacher)
    check_reduction(reduction)
    backend = resolve(backend, student, "student")
    rows = shape[:-1]
    dtype = statistics_dtype(student.dtype)
    temperature, teacher_temperature = check_temperatures(temperature, teacher_temperature, student, dtype)
    if mask is not None:
        mask = check_mask(mask, student)
    if weights is not None:
        weights = check_weights(weights, student, dtype)

    if backend == "reference":
        return kl_div_reference(
            student,
            teacher,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            reverse=reverse,
            mask=mask,
            weights=weights,
            reduction=reduction,
        )

    input, target = as_matrix(student), as_matrix(teacher)
    input_temperature, target_temperature, weights, mask = as_vectors(
        temperature, teacher_temperature, weights, mask
    )
    if reverse:
        input, target = target, input
        input_temperature, target_temperature = target_temperature, input_temperature

    if torch.is_grad_enabled() and (
        input.requires_grad
        or target.requires_grad
        or any(
            isinstance(x, Tensor) and x.requires_grad
            for x in (input_temperature, target_temperature, weights)
        )
    ):
        loss = _KLDiv.apply(
            input, target, input_temperature, target_temperature, weights, mask, reduction, backend
        )
    else:
        row_scale, scale = scale_of_rows(weights, mask, reduction, input.shape[0], dtype)
        temperatures = split_temperatures(input_temperature, target_temperature)
        [loss] = run_kl_div(True, input, target, *temperatures, row_scale, scale, mask, NOTHING, backend)
        if reduction != "none":
            loss = sum_of_rows(loss, backend)
    return loss.view(rows) if reduction == "none" else loss


_again = again_by(_kl_div)


class KLDivLoss(LossModule):
    """`kl_div` as a module: ``KLDivLoss(temperature=4.0)(student, teacher)``.

    The options are those of `kl_div`; ``mask`` and ``weights`` are given with each call. A temperature that is
    an ``nn.Parameter`` is a parameter of the module.
    """

    function = staticmethod(kl_div)
