r"""The family of losses from two rows of hidden states, through their heads, as one registered op: no tensor of the
size rows × classes exists, neither in the forward nor in the backward.

    s = cap_s tanh(a_s (x W_sᵀ + b_s) / cap_s),  t likewise from the teacher's hidden states, or log-probabilities
    loss = the row losses of kdkernels.ops.logit_loss on s and t, weighted and reduced

Two strategies, chosen by `plan_linear_loss`:

    chunks   for a few rows at a time: logits in float32, the loss's kernel turns the student's into their gradient in
             place, and the products for the gradients of features and head follow at once
    tiles    (Triton) logits exist as tiles on the chip, and are formed again in the backward

On the CPU, where all rows are one chunk and the classes few, one native kernel makes the whole of it.

Products per step, each of 2 M N D operations: student and teacher logits, the gradient of x, that of W: 4. A head or
features without gradient cost none; where both sides have one head, one product makes both logits.

Gradient: with G = dloss/ds, times what cap and scale do to it, G W, Gᵀ x, Gᵀ 1; the teacher's likewise, by the same
kernel with the sides exchanged. That of the scale, Σ x·(G W) + Σ b·(Gᵀ 1) with G of a (x Wᵀ + b), needs no logits.

Saved: the inputs, and the gradients that the forward already computed where the loss is a number, which the first
backward hands out; any later one computes them again. Where each row has an upstream gradient of its own (reduction
"none"), where the rows' weights are learnt, and in a compiled graph, the backward computes: 2 products more. Double
backward goes through the reference.

Memory: chunk_rows × N × 8 bytes (float32, a teacher with hidden states), and the gradients.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.backend import (
    LIBRARY,
    fresh,
    full_precision,
    launcher,
    resolve,
    statistics_dtype,
    sum_of_rows,
    unobserved,
)
from kdkernels.ops import projection
from kdkernels.ops.calls import COMMON, again_by
from kdkernels.ops.divergences import (
    KL,
    MIXTURE,
    NONE,
    OF_LABELS,
    REVERSE_KL,
    TOTAL_VARIATION,
    Spec,
)
from kdkernels.ops.logit_loss import logit_loss_reference, run_logit_loss_kernels, scale_of_soft
from kdkernels.ops.rows import (
    Range,
    Temperature,
    as_matrix,
    as_vectors,
    check_labels,
    check_mask,
    check_number,
    check_range,
    check_ranges,
    check_reduction,
    check_temperatures,
    check_weights,
    kind_of,
    reduce_rows,
    scale_of_rows,
    split_temperatures,
)
from kdkernels.ops.scale_rows import scale_rows_
from kdkernels.ops.topk_kl_div import (
    TAILS,
    check_topk_indices,
    check_topk_teacher,
    topk_kl_div_reference,
)

# What the teacher is known by.
NO_TEACHER, HIDDEN, LOGITS, TOPK = range(4)
STRATEGIES = ("chunks", "tiles")
SMALL_HEAD = 4096  # classes
LINEAR_STATISTICS = 8  # kdkernels._triton.linear_loss.STATISTICS_ROWS, without importing triton
Scale = float | Tensor


class Plan(NamedTuple):
    strategy: str
    chunk_rows: int


def plan_linear_loss(
    rows: int,
    classes: int,
    *,
    itemsize: int = 4,
    device: str = "cpu",
    cores: int = 1,
    cache: int = 32 << 20,
    tiled: bool = False,
) -> Plan:
    """How a call is carried out: its strategy, and how many rows are a chunk of the first.

    Args:
        rows, classes: M and N of the logits.
        itemsize: bytes of one logit in a chunk: 4, or 8 for float64.
        device: "cpu", or "cuda" for any GPU.
        cores: the GPU's multiprocessors.
        cache: bytes of the CPU's last cache.
        tiled: whether the loss, dtype and backend have a kernel for the strategy "tiles".

    Tiles where the head is small: a launch then costs more than forming the logits twice. A chunk holds both sides'
    logits: as many as stay in a CPU's last cache, but not more than 32 MiB of them, for the sake of memory, and
    at least 16 rows, with fewer of which a product waits for the head to arrive; on a GPU, enough 128 × 128 tiles for
    eight on each multiprocessor. Chunks are equally long.
    """
    if tiled and classes <= SMALL_HEAD:
        return Plan("tiles", 0)
    if device == "cpu":
        budget = min(max(cache, 8 << 20), 32 << 20)
        step, most = 16, max(16, budget // (2 * itemsize * classes))
    else:
        step, most = 128, max(128, cores * 8 * 128 * 128 // classes)
    most = most // step * step
    chunks = max(1, -(-rows // most))
    each = -(-rows // chunks)
    return Plan("chunks", max(1, min(rows, -(-each // step) * step)))


def _machine(device: torch.device) -> tuple[int, int]:
    """(cores, cache) as `plan_linear_loss` takes them."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count, 0
    try:
        return 1, os.sysconf("SC_LEVEL3_CACHE_SIZE") or 32 << 20
    except (AttributeError, ValueError, OSError):
        return 1, 32 << 20


class Call(NamedTuple):
    """The op's arguments, in the order of its schema. M rows, N_s and N_t classes of which `classes` count."""

    input: Tensor  # (M, D_s)
    weight: Tensor  # (N_s, D_s)
    bias: Tensor | None  # (N_s,)
    target: Tensor | None  # HIDDEN (M, D_t), LOGITS (M, N_t), TOPK (M, k)
    target_weight: Tensor | None  # (N_t, D_t); None where `tied`
    target_bias: Tensor | None  # (N_t,)
    indices: Tensor | None  # TOPK (M, k)
    labels: Tensor | None  # (M,) counted from `start`
    input_temperature: Tensor | None  # (M,)
    target_temperature: Tensor | None  # (M,)
    input_temperature_value: float
    target_temperature_value: float
    scale: Tensor | None  # () of the logits
    target_scale: Tensor | None  # ()
    scale_value: float
    target_scale_value: float
    cap: float
    target_cap: float
    row_scale: Tensor | None  # (M,) of the rows' losses
    row_scale_value: float
    mask: Tensor | None  # (M,)
    spec: Spec
    kind: int
    tied: bool  # the teacher's head is the student's
    tail: int
    start: int
    target_start: int
    classes: int
    chunk_rows: int  # 0: tiles, -1: as `plan_linear_loss` says
    with_terms: bool
    # input, weight, bias, target, target_weight, target_bias, temperatures, scales
    needs: Sequence[bool]
    backend: str

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> Call:
        first = cls._fields.index("spec")
        last = first + len(Spec._fields)
        return cls(*arguments[:first], Spec(*arguments[first:last]), *arguments[last:])  # type: ignore[call-arg]

    def arguments(self) -> list[Any]:
        first = self._fields.index("spec")
        return [*self[:first], *self.spec, *self[first + 1 :]]


_INPUTS = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor? target, Tensor? target_weight, Tensor? target_bias, "
    "Tensor? indices, Tensor? labels, Tensor? input_temperature, Tensor? target_temperature, "
    "float input_temperature_value, float target_temperature_value, Tensor? scale, Tensor? target_scale, "
    "float scale_value, float target_scale_value, float cap, float target_cap, Tensor? row_scale, "
    "float row_scale_value, Tensor? mask, int divergence, float first, float second, float mix, bool standardize, "
    "float soft_weight, bool squared, float hard_weight, float label_smoothing, float z_loss, float logit_mse, "
    "int kind, bool tied, int tail, int start, int target_start, int classes, int chunk_rows, bool with_terms, "
    "bool[] needs, str backend"
)
# Both give the gradients that `needs` asks for, in its order; the first gives the rows' losses before them, and their
# terms (5, M) where asked. All are times row_scale (or its value).
LIBRARY.define(f"linear_loss_fwd({_INPUTS}) -> Tensor[]")
LIBRARY.define(f"linear_loss_bwd({_INPUTS}) -> Tensor[]")
NOTHING = (False,) * 10


def _outputs(with_loss: bool, call: Call) -> list[Tensor | None]:
    """loss, terms, and the ten gradients of `needs`, in the dtypes in which they are summed."""
    rows, device = call.input.shape[0], call.input.device
    dtype = statistics_dtype(call.input.dtype)
    chunks = -(-rows // call.chunk_rows) if call.chunk_rows > 0 else 1

    outputs = [
        torch.empty(rows, dtype=dtype, device=device) if with_loss else None,
        torch.empty(5, rows, dtype=dtype, device=device) if with_loss and call.with_terms else None,
    ]
    for i, need in enumerate(call.needs):
        if not need:
            outputs.append(None)
            continue
        x = call[i] if i < 6 else None
        shape = x.shape if isinstance(x, Tensor) else (rows,) if i in (6, 7) else ()
        of_product = isinstance(x, Tensor) and i in (0, 1, 3, 4)
        summed = projection.sum_dtype(x, chunks) if of_product else dtype  # type: ignore[arg-type]
        outputs.append(fresh(shape, summed, device))
    return outputs


def _handed_out(call: Call, outputs: Sequence[Tensor | None]) -> list[Tensor]:
    """What the op gives: sums in float32 as what they are gradients of, except float16's, which has no range for a
    gradient that is still to meet its upstream gradient."""

    found = [x for x in outputs[:2] if x is not None]
    for x, of in zip(outputs[2:], (*call[:6], *[None] * 4)):
        if x is not None:
            found.append(x if of is None or of.dtype in (x.dtype, torch.float16) else x.to(of.dtype))
    return found


def _planned(call: Call) -> Call:
    if call.chunk_rows >= 0:
        return call
    tiled = _takes_tiles(call.backend, call.kind, call.spec, (call.scale, call.target_scale))
    chunk_rows = planned_rows(call.input, call.classes, tiled)
    return call._replace(
        chunk_rows=0 if call.input.shape[0] <= chunk_rows and _is_small(call) else chunk_rows
    )


def planned_rows(x: Tensor, classes: int, tiled: bool = False) -> int:
    """`plan_linear_loss` for rows `x` (M, D), as Call's chunk_rows."""
    return _planned_rows(x.shape[0], classes, statistics_dtype(x.dtype).itemsize, x.device, tiled)


@cache
def _planned_rows(rows: int, classes: int, itemsize: int, device: torch.device, tiled: bool) -> int:
    cores, size = _machine(device)
    plan = plan_linear_loss(
        rows, classes, itemsize=itemsize, device=device.type, cores=cores, cache=size, tiled=tiled
    )
    return plan.chunk_rows


# What kdkernels._triton.linear_loss has terms for.
_TILED = (NONE, KL, REVERSE_KL, MIXTURE, TOTAL_VARIATION)


def _takes_tiles(backend: str, kind: int, spec: Spec, scales: Iterable[Scale | None]) -> bool:
    """Whether there is a kernel that forms the logits in tiles."""
    return (
        backend == "triton"
        and kind in (NO_TEACHER, HIDDEN)
        and spec.divergence in _TILED
        and not spec.standardize
        and not any(isinstance(scale, Tensor) for scale in scales)
    )


# Multiplications that fast products make worth several calls.
_FEW = 1 << 23


def _is_small(call: Call) -> bool:
    """Whether one native call takes all rows of a CPU's, which it holds the logits of."""
    needs = call.needs
    if (
        call.backend != "cpu"
        or call.kind not in (NO_TEACHER, HIDDEN)
        or call.classes > SMALL_HEAD
        or call.mask is not None
        or call.scale is not None
        or call.target_scale is not None
        or call.scale_value != 1
        or call.target_scale_value != 1
        or call.cap
        or call.target_cap
        or (call.spec.squared and (needs[6] or needs[7]))
        or (call.labels is None and call.spec.divergence in OF_LABELS)
    ):
        return False
    features = call.input.shape[1] + (0 if call.kind == NO_TEACHER else call.target.shape[1])  # type: ignore[union-attr]
    few = call.input.shape[0] * call.classes * features <= _FEW
    return few or not projection.fast_products(call.input)


def _body(with_loss: bool, *arguments: Any) -> list[Tensor]:  # as in _INPUTS
    return _execute(with_loss, Call.of(arguments))


def _execute(with_loss: bool, call: Call) -> list[Tensor]:
    call = _planned(call)
    outputs = _outputs(with_loss, call)
    if call.chunk_rows:
        _run_chunks(call, outputs)
    else:
        _run_tiles(call, outputs)
    return _handed_out(call, outputs)


def _fake(with_loss: bool, *arguments: Any) -> list[Tensor]:
    call = Call.of(arguments)
    return _handed_out(call, _outputs(with_loss, call))


for _name, _with_loss in (("linear_loss_fwd", True), ("linear_loss_bwd", False)):
    LIBRARY.impl(_name, partial(_body, _with_loss), "CPU")
    LIBRARY.impl(_name, partial(_body, _with_loss), "CUDA")
    torch.library.register_fake(f"kdkernels::{_name}", partial(_fake, _with_loss), lib=LIBRARY)


def _run(with_loss: bool, call: Call) -> list[Tensor]:
    if unobserved(call.input):
        return _execute(with_loss, call)
    arguments = call.arguments()
    op = torch.ops.kdkernels.linear_loss_fwd if with_loss else torch.ops.kdkernels.linear_loss_bwd
    return op(*arguments)


def _run_chunks(call: Call, outputs: Sequence[Tensor | None]) -> None:
    """Fills `outputs`, a few rows at a time."""
    rows, mask, live = call.input.shape[0], call.mask, None
    loss, terms, *gradients = outputs
    if mask is not None and mask.device.type == "cpu":
        # Rows that do not count are not projected either. (A GPU would have to wait for their number.)
        live, mask = mask.nonzero()[:, 0], None
        rows = live.numel()
        for x in (loss, terms, *(gradients[i] for i in (0, 3, 6, 7))):
            if x is not None:
                x.zero_()
    for i in (1, 2, 4, 5, 8, 9):  # sums over rows, which start with the first chunk
        x = gradients[i]
        if x is not None and (rows == 0 or i > 5 or x.shape[0] != call.classes):
            x.zero_()
    whole = live is None and rows <= call.chunk_rows
    for begin in range(0, rows, call.chunk_rows):
        chunk = slice(begin, min(begin + call.chunk_rows, rows))
        some = None if whole else chunk if live is None else live[chunk]
        _run_chunk(call, some, begin == 0, mask, outputs)


# Which rows a chunk has: all, some in a row, or those that count.
Rows = slice | Tensor | None


def _run_chunk(
    call: Call, rows: Rows, first: bool, mask: Tensor | None, outputs: Sequence[Tensor | None]
) -> None:
    loss, terms, *gradients = outputs
    needs, dtype = call.needs, statistics_dtype(call.input.dtype)
    mask = _of_rows(mask, rows)
    x, target = _of_rows(call.input, rows), _of_rows(call.target, rows)
    assert x is not None
    if mask is not None:  # whatever a row holds that does not count
        x = torch.where(mask[:, None], x, 0)
        if call.kind in (HIDDEN, LOGITS):
            target = torch.where(mask[:, None], target, 0)  # type: ignore[arg-type]
    weight, bias = (
        _classes(call.weight, call.start, call.classes),
        _classes(call.bias, call.start, call.classes),
    )
    target_weight, target_bias = weight, bias
    if not call.tied:
        target_weight = _classes(call.target_weight, call.target_start, call.classes)
        target_bias = _classes(call.target_bias, call.target_start, call.classes)
    assert weight is not None

    student = teacher = None
    if call.kind == HIDDEN:
        assert target is not None and target_weight is not None
        if (
            _same_memory(weight, target_weight)
            and _same_memory(bias, target_bias)
            and x.dtype == target.dtype
        ):
            both = projection.logits(
                torch.cat((x, target)), weight, bias
            )  # each part of the head is read once
            student, teacher = both[: x.shape[0]], both[x.shape[0] :]
        else:
            teacher = projection.logits(target, target_weight, target_bias)
        _transform(teacher, call.target_scale, call.target_scale_value, call.target_cap)
    elif call.kind == LOGITS:
        assert target is not None
        teacher = target.narrow(1, call.target_start, call.classes).to(dtype)
        teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    if student is None:
        student = projection.logits(x, weight, bias)
    _transform(student, call.scale, call.scale_value, call.cap)

    count, device = x.shape[0], x.device
    tied_head = call.tied and (needs[1] or needs[2])
    of_student = needs[0] or needs[1] or needs[2] or needs[8]
    of_teacher = teacher is not None and (needs[3] or needs[4] or needs[5] or needs[9] or tied_head)

    def gradient(logits: Tensor, features: Tensor, cap: float, read_again: bool) -> Tensor:
        """Where the kernel leaves a gradient: in the logits' place, unless something reads them again."""
        wanted = projection.gradient_dtype(features)
        if cap or read_again or wanted != logits.dtype:
            return torch.empty(logits.shape, dtype=wanted, device=device)
        return logits

    grad = grad_teacher = None
    if of_student:
        grad = gradient(student, x, call.cap, of_teacher or needs[7] or call.kind == TOPK)
    if of_teacher:
        assert teacher is not None and target is not None
        grad_teacher = gradient(teacher, target, call.target_cap, call.kind == LOGITS)

    def piece(whole: Tensor | None) -> Tensor | None:
        """A part of an output (..., M) for a kernel to fill: its own memory where that is contiguous."""
        if whole is None or rows is None:
            return whole
        if isinstance(rows, slice) and whole.dim() == 1:
            return whole[rows]
        return torch.empty(*whole.shape[:-1], count, dtype=whole.dtype, device=device)

    outs = (loss, terms, gradients[6], gradients[7])
    pieces = [piece(x) for x in outs]
    labels = _of_rows(call.labels, rows)
    if labels is None and call.spec.divergence in OF_LABELS:
        assert teacher is not None
        labels = teacher.argmax(1)
    shared = (
        labels,
        _of_rows(call.input_temperature, rows),
        _of_rows(call.target_temperature, rows),
        call.input_temperature_value,
        call.target_temperature_value,
        _of_rows(call.row_scale, rows),
        call.row_scale_value,
        mask,
    )
    if call.kind == TOPK:
        assert target is not None
        of_log_probs = torch.empty_like(target) if needs[3] else None
        filled = (pieces[0], pieces[1], grad, of_log_probs, pieces[2])
        _fill_topk(call, student, target, _of_rows(call.indices, rows), shared, filled)
        if needs[3]:
            _put(gradients[3], rows, of_log_probs)
    else:
        filled = (pieces[0], pieces[1], grad, grad_teacher, pieces[2], pieces[3])  # type: ignore[assignment]
        run_logit_loss_kernels(filled, student, teacher, *shared, call.spec, 0, 0, call.classes, call.backend)
    for whole, part in zip(outs, pieces):
        if part is not whole and not (isinstance(rows, slice) and part is not None and part.dim() == 1):
            if whole is not None and whole.dim() == 2:
                whole[:, rows] = part  # type: ignore[assignment]
            else:
                _put(whole, rows, part)

    if grad is not None:
        _uncap(grad, student, call.cap)
        scale = call.scale_value if call.scale is None else call.scale
        of_side = (gradients[0], gradients[1], gradients[2], gradients[8])
        _backproject(grad, x, weight, bias, scale, of_side, rows, call.start, first)
    if grad_teacher is not None:
        assert teacher is not None and target is not None
        if call.kind == LOGITS:
            whole = gradients[3]
            assert whole is not None
            if whole.shape[1] > call.classes:
                padded = torch.zeros(count, whole.shape[1], dtype=grad_teacher.dtype, device=device)
                padded[:, call.target_start : call.target_start + call.classes] = grad_teacher
                grad_teacher = padded
            _put(whole, rows, grad_teacher)
            return
        assert target_weight is not None
        _uncap(grad_teacher, teacher, call.target_cap)
        scale = call.target_scale_value if call.target_scale is None else call.target_scale
        start = call.start if call.tied else call.target_start
        heads = gradients[1:3] if call.tied else gradients[4:6]
        of_side = (gradients[3], heads[0], heads[1], gradients[9])
        first = first and not (call.tied and grad is not None)
        _backproject(grad_teacher, target, target_weight, target_bias, scale, of_side, rows, start, first)


def _of_rows(x: Tensor | None, rows: Rows) -> Tensor | None:
    if x is None or rows is None:
        return x
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _put(whole: Tensor | None, rows: Rows, part: Tensor | None) -> None:
    """whole[rows] = part."""
    if whole is not None and part is not None:
        whole[slice(None) if rows is None else rows] = part.to(whole.dtype)


def _classes(x: Tensor | None, start: int, classes: int) -> Tensor | None:  # (N, D) or (N,)
    return x if x is None or x.shape[0] == classes else x.narrow(0, start, classes)


def _same_memory(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def _transform(logits: Tensor, scale: Tensor | None, scale_value: float, cap: float) -> None:
    """In place: cap tanh(scale u / cap)."""
    if scale is not None:
        logits.mul_(scale)
    elif scale_value != 1:
        logits.mul_(scale_value)
    if cap:
        logits.div_(cap).tanh_().mul_(cap)


def _uncap(grad: Tensor, logits: Tensor, cap: float) -> None:
    """In place: the gradient of u from that of the logits cap tanh(u / cap)."""
    if cap:
        grad.mul_(torch.addcmul(torch.ones_like(logits), logits, logits, value=-1 / cap**2))


def _backproject(
    grad: Tensor,  # (c, classes)
    x: Tensor,  # (c, D)
    weight: Tensor,  # (classes, D)
    bias: Tensor | None,  # (classes,)
    scale: Scale,  # of x Wᵀ + b
    of_side: Sequence[Tensor | None],  # (M, D), (N, D), (N,), ()
    rows: Rows,
    start: int,
    first: bool,
) -> None:
    of_x, of_weight, of_bias, of_scale = of_side
    classes, scaled = weight.shape[0], isinstance(scale, Tensor) or scale != 1
    if of_x is not None or of_scale is not None:
        features = projection.grad_features(grad, weight)
        if of_scale is not None:
            of_scale += (features.to(of_scale.dtype) * x).sum()
        _put(of_x, rows, features.mul_(scale) if scaled else features)
    if of_bias is not None or (of_scale is not None and bias is not None):
        total = grad.sum(0, dtype=statistics_dtype(x.dtype))
        if of_scale is not None and bias is not None:
            of_scale += torch.where(total == 0, 0, total * bias).sum()  # a class of no mass has −inf here
        if of_bias is not None:
            total = total * scale if scaled else total
            part = of_bias.narrow(0, start, classes)
            part.copy_(total) if first else part.add_(total)
    if of_weight is not None:
        sums = _classes(of_weight, start, classes)
        assert sums is not None
        projection.add_grad_weight_(sums, grad.mul_(scale) if scaled else grad, x, first)


def _fill_topk(
    call: Call,
    student: Tensor,  # (c, classes)
    log_probs: Tensor,  # (c, k)
    indices: Tensor | None,  # (c, k)
    shared: Sequence[Any],
    filled: Sequence[Tensor | None],
) -> None:
    """The rows whose teacher is known by k log-probabilities: two kernels, for the soft part and for the rest."""
    labels, temperature, _, temperature_value, _, row_scale, row_scale_value, mask = shared
    loss, terms, grad, grad_log_probs, of_temperature = filled
    spec = call.spec
    each, factor = scale_of_soft(spec, temperature, temperature_value)
    if each is None:
        soft_scale = None if row_scale is None else row_scale * factor
    else:
        soft_scale = each * (row_scale_value if row_scale is None else row_scale)
    soft = torch.empty(student.shape[0], dtype=student.dtype, device=student.device)
    wanted = grad if grad is None or grad.dtype == student.dtype else torch.empty_like(student)
    launcher(call.backend, "topk_kl_div")(
        student,
        log_probs,
        indices if indices is None or not call.start else indices - call.start,
        temperature,
        temperature_value,
        soft_scale,
        factor * row_scale_value,
        mask,
        call.tail,
        soft,
        wanted,
        grad_log_probs,
        of_temperature,
    )
    if of_temperature is not None and spec.squared:
        of_temperature.add_(soft / temperature, alpha=2)
    rest = spec._replace(divergence=NONE)
    if rest.hard_weight or rest.z_loss:
        # In place, unless a cap reads the logits once more: the soft part is through with them.
        of_rest = None if grad is None else torch.empty_like(student) if call.cap else student
        run_logit_loss_kernels(
            (loss, terms, of_rest, None, None, None),
            student,
            None,
            labels,
            None,
            None,
            1.0,
            1.0,
            row_scale,
            row_scale_value,
            mask,
            rest,
            0,
            0,
            call.classes,
            call.backend,
        )
        if wanted is not None:
            wanted.add_(of_rest)  # type: ignore[arg-type]
        if loss is not None:
            loss.add_(soft)
    else:
        if loss is not None:
            loss.copy_(soft)
        if terms is not None:
            terms.zero_()
    if terms is not None:
        terms[0] = soft
    if grad is not None and wanted is not grad:
        assert wanted is not None
        grad.copy_(wanted)


def _run_tiles(call: Call, outputs: Sequence[Tensor | None]) -> None:
    """Fills `outputs` by one launch, and on a GPU one more where there are gradients among them."""
    loss, terms, *gradients = outputs
    rows, device, spec = call.input.shape[0], call.input.device, call.spec
    if not rows:
        for x in (loss, terms, *gradients):
            if x is not None:
                x.zero_()
        return
    dtype = statistics_dtype(call.input.dtype)
    if spec.squared and call.needs[6] and terms is None:  # T² has a derivative too, made of the soft term
        terms = torch.empty(5, rows, dtype=dtype, device=device)
    target_weight, target_bias, target_start = call.target_weight, call.target_bias, call.target_start
    of_target = list(gradients[3:6])
    if call.tied:
        target_weight, target_bias, target_start = call.weight, call.bias, call.start
        of_target[1:] = [None if x is None else torch.empty_like(x) for x in gradients[1:3]]
    of_input = gradients[:3]
    for of_side, start in ((of_input, call.start), (of_target, target_start)):
        for i, x in enumerate(of_side):
            if i and x is not None and x.shape[0] > call.classes:
                x.zero_()
                of_side[i] = x.narrow(0, start, call.classes)
    start, classes = call.start, call.classes
    input = (call.input, _classes(call.weight, start, classes), _classes(call.bias, start, classes))
    target: tuple[Tensor | None, ...] = (call.target, None, None)
    if call.kind == HIDDEN:
        head = (_classes(target_weight, target_start, classes), _classes(target_bias, target_start, classes))
        target = (call.target, *head)
    else:
        of_target = [None, None, None]
    shared = (
        *call[8:12],
        *scale_of_soft(spec, call.input_temperature, call.input_temperature_value),
        call.row_scale,
        call.row_scale_value,
    )
    if call.backend == "cpu":
        other = any(x is not None for x in (*of_target, gradients[7]))
        exchanged = spec.exchanged() if other else spec
        launcher("cpu", "small_linear_loss")(
            (*input, *of_input),
            (*target, *of_target),
            call.labels,
            *shared,
            spec.of_kernels,
            exchanged.of_kernels,
            loss,
            terms,
            *gradients[6:8],
        )
    else:
        inputs = (
            *input,
            *target,
            call.labels,
            *shared,
            call.mask,
            *spec[:4],
            *spec[7:],
            call.cap,
            call.target_cap,
            call.scale_value,
            call.target_scale_value,
        )
        kernel = launcher(call.backend, "linear_loss")
        statistics = torch.empty(LINEAR_STATISTICS, rows, dtype=dtype, device=device)
        kernel(*inputs, loss, terms, statistics, *[None] * 8)
        wanted = (*of_input, *of_target, *gradients[6:8])
        if any(x is not None for x in wanted):
            kernel(*inputs, None, None, statistics, *wanted)
    if call.tied:
        for whole, part in zip(of_input[1:], of_target[1:]):
            if whole is not None and part is not None:
                whole.add_(part)
    if spec.squared and gradients[6] is not None:
        assert terms is not None
        gradients[6].add_(terms[0] / call.input_temperature, alpha=2)  # type: ignore[operator]


def projected(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (N, D)
    bias: Tensor | None,  # (N,)
    scale: Scale,
    cap: float,
    dtype: torch.dtype,
) -> Tensor:
    """A side's logits in `dtype`: cap tanh(scale (x Wᵀ + b) / cap)."""
    logits = torch.nn.functional.linear(
        x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    )
    if isinstance(scale, Tensor):  # −inf stays, and has no part in the scale's gradient
        live = logits != -torch.inf
        logits = torch.where(live, torch.where(live, logits, 0) * scale, logits)
    elif scale != 1:
        logits = logits * scale
    return cap * torch.tanh(logits / cap) if cap else logits


class Options(NamedTuple):
    """What of a call is no tensor."""

    spec: Spec
    kind: int
    tied: bool
    tail: int
    caps: tuple[float, float]
    ranges: tuple[int, int, int]
    reduction: str
    chunk_rows: int  # as Call's
    with_terms: bool
    backend: str


def linear_loss_reference(
    student: Tensor,  # (..., D_s)
    weight: Tensor,  # (N_s, D_s)
    bias: Tensor | None,  # (N_s,)
    teacher: Tensor | None,  # HIDDEN (..., D_t), LOGITS (..., N_t), TOPK (..., k)
    teacher_weight: Tensor | None,  # (N_t, D_t)
    teacher_bias: Tensor | None,  # (N_t,)
    temperature: Temperature,
    teacher_temperature: Temperature,
    scale: Scale,
    teacher_scale: Scale,
    weights: Tensor | None,  # rows
    indices: Tensor | None,  # (..., k)
    labels: Tensor | None,  # rows
    mask: Tensor | None,  # rows
    options: Options,
) -> tuple[Tensor, Tensor]:
    """The specification: both sides' logits in full, then `logit_loss_reference` (or the top-k's)."""
    spec, (start, teacher_start, classes) = options.spec, options.ranges
    dtype = statistics_dtype(student.dtype)
    if mask is not None:  # whatever a row holds that does not count
        student = torch.where(mask[..., None], student, 0)
        if teacher is not None and options.kind != TOPK:
            teacher = torch.where(mask[..., None], teacher, 0)
    cap, teacher_cap = options.caps
    if options.tied:
        teacher_weight, teacher_bias, teacher_start = weight, bias, start

    def head(x: Tensor | None, start: int) -> Any:  # the classes that there are
        return None if x is None else x[start : start + classes]

    s = projected(student, head(weight, start), head(bias, start), scale, cap, dtype)
    t = None
    if options.kind == HIDDEN:
        assert teacher is not None and teacher_weight is not None
        teacher_head = (head(teacher_weight, teacher_start), head(teacher_bias, teacher_start))
        t = projected(teacher, *teacher_head, teacher_scale, teacher_cap, dtype)
    elif options.kind == LOGITS:
        assert teacher is not None
        t = teacher[..., teacher_start : teacher_start + classes].to(dtype)
    if labels is None and spec.divergence in OF_LABELS:
        assert t is not None
        labels = t.detach().argmax(-1)
    if options.kind != TOPK:
        return logit_loss_reference(
            s, t, labels, temperature, teacher_temperature, weights, mask, spec, options.reduction
        )
    assert teacher is not None and indices is not None
    rest = spec._replace(divergence=NONE)
    each, terms = logit_loss_reference(s, None, labels, 1.0, 1.0, None, mask, rest, "none")
    soft = topk_kl_div_reference(
        s,
        teacher,
        indices - start,
        temperature=temperature,
        tail=TAILS[options.tail],
        mask=mask,
        reduction="none",
    )
    soft = soft * spec.soft_weight * (temperature**2 if spec.squared else 1.0)
    terms = torch.cat((soft.detach()[None], terms[1:]))
    loss, *parts = (reduce_rows(x, mask, weights, options.reduction) for x in (each + soft, *terms))
    return loss, torch.stack(parts)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # (M, D_s)
        weight: Tensor,  # (N_s, D_s)
        bias: Tensor | None,  # (N_s,)
        target: Tensor | None,  # HIDDEN (M, D_t), LOGITS (M, N_t), TOPK (M, k)
        target_weight: Tensor | None,  # (N_t, D_t)
        target_bias: Tensor | None,  # (N_t,)
        temperature: Temperature,  # (M,)
        target_temperature: Temperature,  # (M,)
        scale: Scale,  # ()
        target_scale: Scale,  # ()
        weights: Tensor | None,  # (M,)
        indices: Tensor | None,  # (M, k)
        labels: Tensor | None,  # (M,)
        mask: Tensor | None,  # (M,)
        options: Options,
    ) -> tuple[Tensor, Tensor | None]:
        needs = ctx.needs_input_grad
        tensors = (input, weight, bias, target, target_weight, target_bias)
        numbers = (temperature, target_temperature, scale, target_scale)
        dtype = statistics_dtype(input.dtype)
        row_scale, scale_value = scale_of_rows(weights, mask, options.reduction, input.shape[0], dtype)
        # Each of these makes what a row's gradient is multiplied with known only to the backward, where it goes into
        # the sums over rows. A captured graph cannot hand a buffer out once.
        ctx.later = options.reduction == "none" or needs[10] or torch.compiler.is_compiling()
        # What the weights' gradient is made of are unscaled losses.
        late_scale = row_scale if needs[10] else None
        call = _call(
            tensors,
            numbers,
            indices,
            labels,
            mask,
            *((None, 1.0) if needs[10] else (row_scale, scale_value)),
            options,
            NOTHING if ctx.later else needs[:10],
        )
        rows, *gradients = _run(True, call)
        terms = gradients.pop(0) if options.with_terms else None
        ctx.gradients = None if ctx.later else gradients
        ctx.options, ctx.scale_value = options, scale_value
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in numbers]
        ctx.save_for_backward(
            *tensors,
            *(x if isinstance(x, Tensor) else None for x in numbers),
            weights,
            indices,
            labels,
            mask,
            row_scale,
            rows if needs[10] else None,
        )
        if late_scale is not None:
            rows = rows * late_scale
            terms = None if terms is None else terms * late_scale
        if terms is not None:
            terms = terms if options.reduction == "none" else terms.sum(1)
            ctx.mark_non_differentiable(terms)
        return (rows if options.reduction == "none" else sum_of_rows(rows, options.backend)), terms

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # () or (M,)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, grad_output)
        needs, options = ctx.needs_input_grad, ctx.options
        gradients, ctx.gradients = ctx.gradients, None
        upstream, of_weights = grad_output, None
        *saved, row_scale, rows = ctx.saved_tensors
        tensors, numbers, (indices, labels, mask) = saved[:6], saved[6:10], saved[11:]
        if gradients is None and any(needs[:10]):
            scale_value = ctx.scale_value
            if ctx.later:
                row_scale = (upstream * (scale_value if row_scale is None else row_scale)).expand(
                    tensors[0].shape[0]
                )
                row_scale, scale_value = row_scale.contiguous(), 1.0
            numbers = [a if b is None else b for a, b in zip(ctx.numbers, numbers)]
            call = _call(tensors, numbers, indices, labels, mask, row_scale, scale_value, options, needs[:10])
            with full_precision(tensors[0]):
                gradients = _run(False, call._replace(with_terms=False))
        if needs[10]:
            each, one = scale_of_rows(None, mask, options.reduction, rows.shape[0], rows.dtype)
            of_weights = rows * grad_output * (one if each is None else each)
        found: list[Tensor | None] = []
        remaining = iter(gradients or ())
        for source, need in zip((*tensors, *numbers), needs[:10]):
            gradient = next(remaining) if need else None
            if gradient is not None and not ctx.later:
                if gradient.dim() == 2:
                    scale_rows_(gradient, upstream.contiguous(), options.backend)
                else:
                    gradient.mul_(upstream)
            if gradient is not None and isinstance(source, Tensor):
                gradient = gradient.to(source.dtype)
            found.append(gradient)
        return (*found, of_weights, *[None] * 4)


def _differentiable_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient as a graph, for ``create_graph=True``: autograd through the reference."""
    *saved, _, _ = ctx.saved_tensors
    numbers = [a if b is None else b for a, b in zip(ctx.numbers, saved[6:10])]
    sources = (*saved[:6], *numbers, saved[10])
    with full_precision(saved[0]):
        loss, _ = linear_loss_reference(*sources, *saved[11:], ctx.options)  # type: ignore[call-arg]
    needs = ctx.needs_input_grad
    wanted = [source for source, need in zip(sources, needs) if need]
    gradients = iter(
        torch.autograd.grad(loss, wanted, grad_output, create_graph=True, materialize_grads=True)
    )
    return (*(next(gradients) if need else None for need in needs[:11]), *[None] * 4)


def _call(
    tensors: Sequence[Tensor | None],
    numbers: Sequence[Temperature],
    indices: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    row_scale: Tensor | None,
    row_scale_value: float,
    options: Options,
    needs: Sequence[bool],
) -> Call:
    temperature, target_temperature, scale, target_scale = numbers
    start, target_start, classes = options.ranges
    return Call(  # type: ignore[call-arg]
        *tensors,  # type: ignore[arg-type]
        indices,
        labels,
        *split_temperatures(temperature, target_temperature),
        *split_temperatures(scale, target_scale),
        *options.caps,
        row_scale,
        row_scale_value,
        mask,
        options.spec,
        options.kind,
        options.tied,
        options.tail,
        start,
        target_start,
        classes,
        options.chunk_rows,
        options.with_terms,
        list(needs),
        options.backend,
    )


def linear_loss(
    student: Tensor,
    weight: Tensor,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None,
    spec: Spec,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    log_probs: Tensor | None = None,
    indices: Tensor | None = None,
    tail: str = "bucket",
    temperature: Temperature = 1.0,
    teacher_temperature: Temperature | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: Scale | None = None,
    teacher_logit_scale: Scale | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "batchmean",
    valid_classes: Range = None,
    teacher_valid_classes: Range = None,
    strategy: str | None = None,
    chunk_rows: int | None = None,
    with_terms: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(loss, terms) of the family member that `spec` describes; the public losses name and explain the arguments."""
    student, weight, bias, teacher, teacher_weight, teacher_bias = _autocast(
        student, weight, bias, teacher, teacher_weight, teacher_bias
    )
    check_side(student, weight, bias, "student")
    kind = _check_teacher(student, weight, teacher, teacher_weight, teacher_bias, log_probs, indices, spec)
    target = log_probs if kind in (LOGITS, TOPK) else teacher if kind == HIDDEN else None
    tied = kind == HIDDEN and teacher_weight is weight and teacher_bias is bias
    ranges = _ranges(weight, teacher_weight, target, kind, valid_classes, teacher_valid_classes)
    start, _, classes = ranges
    check_reduction(reduction)
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}")
    chunk_rows = check_chunks(strategy, chunk_rows)
    backend = resolve(backend, student, "student")
    shape, dtype = student.shape[:-1], statistics_dtype(student.dtype)
    temperature, teacher_temperature = check_temperatures(temperature, teacher_temperature, student, dtype)
    if spec.divergence == NONE:
        temperature = teacher_temperature = 1.0
    elif kind == TOPK:
        teacher_temperature = 1.0
    cap = _softcap(softcap, "softcap", 0.0)
    caps = (cap, _softcap(teacher_softcap, "teacher_softcap", cap))
    scale = _logit_scale(logit_scale, "logit_scale", student, 1.0)
    teacher_scale = _logit_scale(teacher_logit_scale, "teacher_logit_scale", student, scale)
    if mask is not None:
        mask = check_mask(mask, student)
    if weights is not None:
        weights = check_weights(weights, student, dtype)
    if labels is not None:
        # The native CPU kernel looks for itself, but knows no numbering other than from 0.
        labels, counts = check_labels(
            labels, ignore_index, student, mask, start, classes, look=backend != "cpu" or start > 0
        )
        if counts is not None:
            mask = counts if mask is None else mask & counts
    if classes == 2 and spec.divergence in OF_LABELS:
        spec = spec._replace(second=0.0)  # one class is no distribution to match
    if kind == TOPK:
        assert log_probs is not None and indices is not None
        target, indices = log_probs.to(dtype), indices.long()
        if backend != "cpu" and student.device.type == "cpu":
            check_topk_indices(indices, mask, start, start + classes)
    options = Options(
        spec, kind, tied, TAILS.index(tail), caps, ranges, reduction, chunk_rows, with_terms, backend
    )
    if strategy == "tiles" and not _takes_tiles(backend, kind, spec, (scale, teacher_scale)):
        raise ValueError(
            "strategy must be None or 'chunks', unless the backend is 'triton', the teacher has hidden states, soft "
            "takes no label apart, standardize is False and the logit scales are floats"
        )
    if tied or kind != HIDDEN:
        teacher_weight = teacher_bias = None
    numbers = (temperature, teacher_temperature, scale, teacher_scale)
    if spec.divergence == NONE and not (spec.hard_weight or spec.z_loss or spec.logit_mse):
        differentiable = (student, weight, bias, target, teacher_weight, teacher_bias, *numbers, weights)
        rows = shape if reduction == "none" else ()
        return _nothing(differentiable, rows, dtype, student.device, with_terms)

    with full_precision(student):
        if backend == "reference":
            loss, every = linear_loss_reference(
                student,
                weight,
                bias,
                target,
                teacher_weight,
                teacher_bias,
                *numbers,
                weights,
                indices,
                labels,
                mask,
                options,
            )
            return loss, every if with_terms else None

        tensors = (
            as_matrix(student),
            as_matrix(weight),
            bias,
            None if target is None else as_matrix(target),
            None if teacher_weight is None else as_matrix(teacher_weight),
            teacher_bias,
        )
        temperature, teacher_temperature, labels, mask, weights = as_vectors(
            temperature, teacher_temperature, labels, mask, weights
        )
        numbers = (temperature, teacher_temperature, scale, teacher_scale)
        indices = None if indices is None else as_matrix(indices)
        terms: Tensor | None
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in (*tensors, *numbers, weights)
        ):
            inputs = (*tensors, *numbers, weights)
            if torch.compiler.is_compiling():  # which takes no tensor twice
                inputs = tuple(  # type: ignore[assignment]
                    x.view_as(x) if isinstance(x, Tensor) and any(x is y for y in inputs[:i]) else x
                    for i, x in enumerate(inputs)
                )
            loss, terms = _LinearLoss.apply(*inputs, indices, labels, mask, options)
        else:
            scales = scale_of_rows(weights, mask, reduction, tensors[0].shape[0], dtype)
            call = _call(tensors, numbers, indices, labels, mask, *scales, options, NOTHING)
            loss, *rest = _run(True, call)
            terms = rest[0] if with_terms else None
            if reduction != "none":
                loss = sum_of_rows(loss, options.backend)
                terms = None if terms is None else terms.sum(1)
    if reduction == "none":
        loss = loss.view(shape)
        terms = None if terms is None else terms.view(5, *shape)
    return loss, terms


# The options that leave a call to Python, where they are given.
_RARE = (
    "log_probs",
    "indices",
    "softcap",
    "teacher_softcap",
    "logit_scale",
    "teacher_logit_scale",
    "mask",
    "weights",
    "valid_classes",
    "teacher_valid_classes",
    "strategy",
    "chunk_rows",
)


_exchanged = cache(Spec.exchanged)


def common_linear_loss(
    student: Tensor,
    weight: Tensor,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None,
    spec: Spec,
    options: Mapping[str, Any],
) -> Tensor | None:
    """The loss by one call in C++, or None for what is left to `linear_loss` of the same arguments."""
    common = None if torch.compiler.is_dynamo_compiling() else COMMON.get("linear_loss")
    if (
        common is None
        or options.get("backend") not in (None, "cpu")
        or options.get("with_terms")
        or options.get("tail", "bucket") != "bucket"
        or any(options.get(name) is not None for name in _RARE)
    ):
        return None
    get = options.get
    sides = (student, weight, get("bias"), teacher, teacher_weight, get("teacher_bias"))
    temperatures = (get("temperature", 1.0), get("teacher_temperature"))
    rest = (get("ignore_index", -100), get("reduction", "batchmean"))
    return common(*sides, labels, _exchanged(spec), spec, *temperatures, *rest, _again)


def _of_tensors(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    spec: Spec,
    temperature: float,
    teacher_temperature: float | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    return linear_loss(
        student,
        weight,
        teacher,
        teacher_weight,
        labels,
        spec,
        bias=bias,
        teacher_bias=teacher_bias,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        ignore_index=ignore_index,
        reduction=reduction,
        backend="cpu",
    )[0]


_again = again_by(_of_tensors)


def _nothing(
    inputs: Iterable[Any], rows: Sequence[int], dtype: torch.dtype, device: torch.device, with_terms: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss where every weight is 0: no logits, and gradients that are 0."""
    loss = torch.zeros(rows, dtype=dtype, device=device)
    for x in inputs:
        if isinstance(x, Tensor) and x.requires_grad:
            loss = loss + x.flatten()[:0].sum().to(device, dtype)  # of no element: x is not read
    return loss, loss.new_zeros(5, *rows) if with_terms else None


def _autocast(*tensors: Tensor | None) -> list[Any]:
    """What a matrix product would make of its inputs under autocast."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not torch.is_autocast_enabled(first.device.type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(first.device.type)
    cast = {
        id(x): x.to(dtype)
        for x in tensors
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    }
    return [cast.get(id(x), x) for x in tensors]


def check_side(x: Any, weight: Any, bias: Any, name: str, names: Mapping[str, str] | None = None) -> None:
    """Hidden states, head and bias of one side; `names` says what a caller calls the last two."""
    of_weight, of_bias = f"{name}_weight", f"{name}_bias"
    if names is not None:
        of_weight, of_bias = names[of_weight], names[of_bias]
    for argument, value in ((name, x), (of_weight, weight)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{argument} must be a floating tensor, got {kind_of(value)}")
    if x.dim() == 0:
        raise ValueError(f"{name} must have shape (..., D), got ()")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or 0 in weight.shape:
        raise ValueError(
            f"{of_weight} must have shape (N, D) with D = {x.shape[-1]}, the width of {name}, "
            f"got {tuple(weight.shape)}"
        )
    _check_like(weight, x, of_weight, name)
    if bias is None:
        return
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        raise TypeError(f"{of_bias} must be a floating tensor, got {kind_of(bias)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{of_bias} must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    _check_like(bias, x, of_bias, name)


def _check_like(value: Tensor, x: Tensor, argument: str, name: str) -> None:
    if value.dtype != x.dtype:
        raise TypeError(f"{argument} must have the dtype {x.dtype} of {name}, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{argument} must be on the device {x.device} of {name}, got {value.device}")


def _check_teacher(
    student: Tensor,
    weight: Tensor,
    teacher: Any,
    teacher_weight: Any,
    teacher_bias: Any,
    log_probs: Any,
    indices: Any,
    spec: Spec,
) -> int:
    """What kind of teacher it is that the arguments give."""
    if log_probs is not None or indices is not None:
        for name, value in (
            ("teacher", teacher),
            ("teacher_weight", teacher_weight),
            ("teacher_bias", teacher_bias),
        ):
            if value is not None:
                raise TypeError(f"{name} must be None where teacher_log_probs is given, got {kind_of(value)}")
        if indices is not None:
            if spec.divergence not in (NONE, KL) or spec.standardize or spec.logit_mse:
                raise ValueError(
                    "teacher_indices must be None unless soft is 'kl', without standardize and the logits' MSE: k "
                    "log-probabilities do not say more"
                )
            check_topk_teacher(student, log_probs, indices, weight.shape[0])
            return TOPK if spec.divergence != NONE else NO_TEACHER
        if not isinstance(log_probs, Tensor) or not log_probs.is_floating_point():
            raise TypeError(f"teacher_log_probs must be a floating tensor, got {kind_of(log_probs)}")
        if log_probs.dim() != student.dim() or log_probs.shape[:-1] != student.shape[:-1]:
            raise ValueError(
                f"teacher_log_probs must have shape (*rows, N) with the student's rows {tuple(student.shape[:-1])}, "
                f"got {tuple(log_probs.shape)} (k of N classes need teacher_indices)"
            )
        if log_probs.device != student.device:
            raise ValueError(
                f"teacher_log_probs must be on the student's device {student.device}, got {log_probs.device}"
            )
        return LOGITS if spec.divergence != NONE or spec.logit_mse else NO_TEACHER
    if spec.divergence == NONE and not spec.logit_mse:
        return NO_TEACHER
    check_side(teacher, teacher_weight, teacher_bias, "teacher")
    if teacher.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher must have the student's rows {tuple(student.shape[:-1])}, got {tuple(teacher.shape[:-1])}"
        )
    if teacher.device != student.device:
        raise ValueError(f"teacher must be on the student's device {student.device}, got {teacher.device}")
    if statistics_dtype(teacher.dtype) != statistics_dtype(student.dtype):
        raise TypeError(
            f"teacher must be float64 where student is, and only there, got {teacher.dtype} and {student.dtype}"
        )
    return HIDDEN


def _ranges(
    weight: Tensor,
    teacher_weight: Tensor | None,
    target: Tensor | None,
    kind: int,
    valid_classes: Range,
    teacher_valid_classes: Range,
) -> tuple[int, int, int]:
    """Where the student's and the teacher's valid classes start, and how many they are."""
    if kind in (NO_TEACHER, TOPK):
        start, stop = check_range(valid_classes, "valid_classes", weight.shape[0])
        if teacher_valid_classes is not None:
            check_range(teacher_valid_classes, "teacher_valid_classes", weight.shape[0], "teacher")
        return start, start, stop - start
    if kind == HIDDEN:
        assert teacher_weight is not None
        there, name = teacher_weight.shape[0], "teacher_weight"
    else:
        assert target is not None
        there, name = target.shape[-1], "teacher_log_probs"
    if teacher_valid_classes is None and valid_classes is None and there != weight.shape[0]:
        raise ValueError(
            f"{name} must have the student's {weight.shape[0]} classes, got {there} (valid_classes can say which to "
            "compare)"
        )
    return check_ranges(valid_classes, teacher_valid_classes, weight.shape[0], there)


def check_chunks(strategy: str | None, chunk_rows: int | None) -> int:
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(f"strategy must be None or one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if chunk_rows is None:
        return 0 if strategy == "tiles" else -1
    if isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int) or chunk_rows < 1:
        raise ValueError(f"chunk_rows must be None or a positive int, got {chunk_rows!r}")
    if strategy == "tiles":
        raise ValueError("chunk_rows must be None where strategy is 'tiles'")
    return chunk_rows


def _softcap(value: Any, name: str, default: float) -> float:
    """A positive number, or 0 for none."""
    if value is None:
        return default
    if value == math.inf:
        return 0.0
    if check_number(value, name) <= 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return float(value)


def _logit_scale(value: Any, name: str, student: Tensor, default: Scale) -> Scale:
    if value is None:
        return default
    if not isinstance(value, Tensor):
        return check_number(value, name)
    if value.numel() != 1 or not value.is_floating_point():
        raise TypeError(f"{name} must be a float or a floating tensor of one value, got {kind_of(value)}")
    if value.device != student.device:
        raise ValueError(f"{name} must be on the student's device {student.device}, got {value.device}")
    return value.reshape(()).to(statistics_dtype(student.dtype))
