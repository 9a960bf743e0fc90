"""Global average pooling of two feature maps, and the mean squared error between them, in one read of both.

For maps s and t of C channels and P positions, for each sample:

    pooled_s[c] = 1/P sum_p s[c, p],  pooled_t[c] = 1/P sum_p t[c, p],  mse = 1/(C P) sum_cp (s[c, p] - t[c, p])^2

What methods share that put the teacher's classifier on the student's features (SimKD, Chen et al. 2022, arXiv
2203.14001; SRRL; IJCKD, arXiv 2304.11004): the classifier takes the pooled features, the loss the distance.

Gradient, for upstream gradients g_s, g_t (B, C) of the pooled features and g (B,) of the errors:
    ds[c, p] =   2 (s[c, p] - t[c, p]) / (C P) g + g_s[c] / P
    dt[c, p] = - 2 (s[c, p] - t[c, p]) / (C P) g + g_t[c] / P

Saved: the inputs. Double backward goes through the reference.

Bytes moved per element of one map: forward 2 reads. Backward 2 reads and 1 write for each side that wants its
gradient, and the writes alone where only pooled features were used. (Eager PyTorch: forward 5 reads and 1
write; backward of the student alone 4 reads and 3 writes.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from kdkernels.backend import LIBRARY, launcher, resolve, statistics_dtype, unobserved
from kdkernels.ops.rows import kind_of


def pool_mse_reference(
    student: Tensor,  # (B, C, *spatial)
    teacher: Tensor,  # (B, C, *spatial)
    *,
    mask: Tensor | None = None,  # (B,)
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of `pool_mse`: plain PyTorch, on any device, with any derivative.

    Same arguments and result as `pool_mse`, which checks them; here they are taken as they come.
    """
    dtype = student.dtype
    shape = (*student.shape[:2], math.prod(student.shape[2:]))
    student, teacher = (x.reshape(shape).to(statistics_dtype(dtype)) for x in (student, teacher))
    if mask is not None:  # a sample that does not count is not looked at: whatever it holds cannot spread
        student, teacher = (torch.where(mask[:, None, None], x, 0) for x in (student, teacher))
    return student.mean(2).to(dtype), teacher.mean(2).to(dtype), (student - teacher).square().mean((1, 2))


LIBRARY.define("pool_mse_fwd(Tensor student, Tensor teacher, Tensor? mask, str backend) -> Tensor[]")
# The gradients that `needs` asks for. Student and teacher lie alike in memory, as `_alike` makes them.
LIBRARY.define(
    "pool_mse_bwd(Tensor student, Tensor teacher, Tensor? mask, Tensor? grad_pooled_student, "
    "Tensor? grad_pooled_teacher, Tensor? grad_mse, bool[] needs, str backend) -> Tensor[]"
)


def _pieces(student: Tensor, backend: str) -> int:
    """Into how many pieces a sample's sum of squares is cut, each a block's of a GPU: they must be many, also where
    the samples are few, and each long enough to hide what it costs to start."""
    if backend == "cpu":
        return 1
    batch, channels, *spatial = student.shape
    blocks = -(-1024 // batch)
    return max(1, min(channels * math.prod(spatial) // 4096, blocks, channels))


def _fwd_outputs(student: Tensor, pieces: int) -> list[Tensor]:
    batch, channels = student.shape[:2]
    of_pieces = (batch,) if pieces == 1 else (batch, pieces)
    return [
        student.new_empty(batch, channels),
        student.new_empty(batch, channels),
        student.new_empty(of_pieces, dtype=statistics_dtype(student.dtype)),
    ]


def _fwd(student: Tensor, teacher: Tensor, mask: Tensor | None, backend: str) -> list[Tensor]:
    if not student.shape[0]:
        return _fwd_outputs(student, 1)
    pieces = _pieces(student, backend)
    *pooled, mse = outputs = _fwd_outputs(student, pieces)
    launcher(backend, "pool_mse")(student, teacher, mask, None, None, None, *outputs, None, None)
    return outputs if pieces == 1 else [*pooled, mse.sum(1)]


def _bwd_outputs(student: Tensor, teacher: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    return [torch.empty_like(x) if need else None for x, need in zip((student, teacher), needs)]


def _bwd(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    grad_pooled_student: Tensor | None,
    grad_pooled_teacher: Tensor | None,
    grad_mse: Tensor | None,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    outputs = _bwd_outputs(student, teacher, needs)
    if student.shape[0]:
        upstream: tuple[Tensor | None, ...] = (grad_pooled_student, grad_pooled_teacher, grad_mse)
        launcher(backend, "pool_mse")(student, teacher, mask, *upstream, None, None, None, *outputs)
    return [output for output in outputs if output is not None]


def _fwd_fake(student: Tensor, teacher: Tensor, mask: Tensor | None, backend: str) -> list[Tensor]:
    return _fwd_outputs(student, 1)


def _bwd_fake(student: Tensor, teacher: Tensor, *arguments: Any) -> list[Tensor]:  # as in _bwd
    return [output for output in _bwd_outputs(student, teacher, arguments[-2]) if output is not None]


for _name, _body, _fake in (("pool_mse_fwd", _fwd, _fwd_fake), ("pool_mse_bwd", _bwd, _bwd_fake)):
    LIBRARY.impl(_name, _body, "CPU")
    LIBRARY.impl(_name, _body, "CUDA")
    torch.library.register_fake(f"kdkernels::{_name}", _fake, lib=LIBRARY)


def _run_fwd(student: Tensor, *arguments: Any) -> list[Tensor]:
    return (_fwd if unobserved(student) else torch.ops.kdkernels.pool_mse_fwd)(student, *arguments)


def _run_bwd(student: Tensor, *arguments: Any) -> list[Tensor]:
    return (_bwd if unobserved(student) else torch.ops.kdkernels.pool_mse_bwd)(student, *arguments)


class _PoolMSE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (B, C, *spatial)
        teacher: Tensor,  # (B, C, *spatial)
        mask: Tensor | None,  # (B,)
        backend: str,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # an output that nobody used costs nothing
        ctx.backend = backend
        ctx.save_for_backward(student, teacher, mask)
        return tuple(_run_fwd(student, teacher, mask, backend))

    @staticmethod
    def backward(
        ctx: Any,
        grad_pooled_student: Tensor | None,  # (B, C)
        grad_pooled_teacher: Tensor | None,  # (B, C)
        grad_mse: Tensor | None,  # (B,)
    ) -> tuple[Tensor | None, ...]:
        upstream: tuple[Tensor | None, ...] = (grad_pooled_student, grad_pooled_teacher, grad_mse)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, upstream)
        student, teacher, mask = ctx.saved_tensors
        needs = [
            ctx.needs_input_grad[side] and not (upstream[side] is None and grad_mse is None)
            for side in (0, 1)
        ]
        if not any(needs):
            return None, None, None, None
        given = (None if x is None else x.contiguous() for x in upstream)
        found = iter(_run_bwd(student, teacher, mask, *given, needs, ctx.backend))
        return (*(next(found) if need else None for need in needs), None, None)


def _differentiable_backward(ctx: Any, upstream: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradient as a graph, for ``create_graph=True``: autograd through the reference."""
    student, teacher, mask = ctx.saved_tensors
    used = [
        (output, grad)
        for output, grad in zip(pool_mse_reference(student, teacher, mask=mask), upstream)
        if grad is not None and output.requires_grad
    ]
    if not used:
        return None, None, None, None
    outputs, grads = zip(*used)
    needs = ctx.needs_input_grad[:2]
    wanted = [side for side, need in zip((student, teacher), needs) if need]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return (*(next(found) if need else None for need in needs), None, None)


def pool_mse(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Both maps averaged over their positions, and the mean squared error between them, sample by sample.

    Equivalent to ``student.mean((2, 3)), teacher.mean((2, 3)), (student - teacher).square().mean((1, 2, 3))``, with
    sums in float32, or float64 for float64 maps.

    Args:
        student: (B, C, H, W) feature maps, (B, C, *spatial) with any number of spatial dimensions, or (B, C)
            vectors, which are their own mean: float32, float16, bfloat16, or float64 (backends reference and
            cpu). Contiguous maps and channels_last ones are taken as they are; others are copied.
        teacher: maps of the same shape, dtype and device. They are copied where they do not lie in memory as the
            student's do. Gradients go to the teacher too when it requires them.
        mask: bool (B,), True where a sample counts. A sample that does not count is not read, so it may hold
            anything; its outputs and gradients are 0.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best that is available for the
            student's device and dtype (`available_backends`). A named one is obeyed or raises.

    Returns:
        The student's and the teacher's pooled features, (B, C) in the maps' dtype, and the errors, (B,) float32,
        or float64 for float64 maps. An output that nothing is made of costs no time in the backward.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or name.
        RuntimeError: the named backend is not available.

    Second derivatives are right (they go through the reference). Equal inputs give bit-equal results.

    >>> pooled, target, error = kdkernels.pool_mse(connector(student_features), teacher_features)
    >>> loss = F.cross_entropy(teacher_classifier(pooled), labels) + error.mean()
    """
    if not (
        isinstance(student, Tensor)
        and isinstance(teacher, Tensor)
        and (shape := student.shape) == teacher.shape
        and len(shape) > 1
        and 0 not in shape[1:]
        and student.dtype == teacher.dtype
        and student.device == teacher.device
    ):
        _refuse(student, teacher)
    backend = resolve(backend, student, "student")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {kind_of(mask)}")
        if mask.shape != shape[:1]:
            raise ValueError(
                f"mask must have one value for each sample, shape ({shape[0]},), got {tuple(mask.shape)}"
            )
        if mask.device != student.device:
            raise ValueError(f"mask must be on the student's device {student.device}, got {mask.device}")
        mask = mask.contiguous()
    if backend == "reference":
        return pool_mse_reference(student, teacher, mask=mask)
    student, teacher = _alike(student, teacher)
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        pooled_student, pooled_teacher, mse = _PoolMSE.apply(student, teacher, mask, backend)
    else:
        pooled_student, pooled_teacher, mse = _run_fwd(student, teacher, mask, backend)
    return pooled_student, pooled_teacher, mse


def _alike(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both contiguous, or both with their channels side by side; the teacher is copied before the student is."""
    if student.is_contiguous():
        return student, teacher.contiguous()
    if student.movedim(1, -1).is_contiguous():
        last = teacher.movedim(1, -1)
        return student, teacher if last.is_contiguous() else last.contiguous().movedim(-1, 1)
    return student.contiguous(), teacher.contiguous()


def _refuse(student: Any, teacher: Any) -> NoReturn:
    for name, maps in (("student", student), ("teacher", teacher)):
        if not isinstance(maps, Tensor):
            raise TypeError(f"{name} must be a tensor of features, got {kind_of(maps)}")
    if student.dim() < 2 or 0 in student.shape[1:]:
        raise ValueError(
            "student must have shape (B, C) or (B, C, *spatial), with at least one channel and position, got "
            f"{tuple(student.shape)}"
        )
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher must have the student's shape {tuple(student.shape)}, got {tuple(teacher.shape)}"
        )
    if teacher.dtype != student.dtype:
        raise TypeError(f"teacher must have the student's dtype {student.dtype}, got {teacher.dtype}")
    raise ValueError(f"teacher must be on the student's device {student.device}, got {teacher.device}")
