"""Which backend runs a call, and the `torch.library` namespace that the ops register in.

A backend is a set of functions with equal arguments: inputs, outputs allocated by the caller, scalars; they
return nothing. What is available is decided once, at import:

=========== ============================================== ===========================================
backend     devices                                        dtypes
=========== ============================================== ===========================================
reference   every device                                   float64, float32, float16, bfloat16
cpu         cpu (the native module was built)              float64, float32, float16, bfloat16
triton      cuda (triton is installed); cpu when           float32, float16, bfloat16
            ``TRITON_INTERPRET=1`` was set before import
cuda        cuda (the native module was built with nvcc)   float32, float16, bfloat16
=========== ============================================== ===========================================
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("kdkernels", "DEF")

BACKENDS = ("reference", "cpu", "triton", "cuda")
HALF_AND_FLOAT = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = {
    "reference": (*HALF_AND_FLOAT, torch.float64),
    "cpu": (*HALF_AND_FLOAT, torch.float64),
    "triton": HALF_AND_FLOAT,
    "cuda": HALF_AND_FLOAT,
}
# The native module's DType (csrc/kdkernels.h).
_DTYPE_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def _native() -> ModuleType | None:
    # Absent is a pure-Python install; present but broken is an error that must be seen.
    if importlib.util.find_spec("kdkernels._C") is None:
        return None
    return importlib.import_module("kdkernels._C")


_C = _native()


def _calls() -> ModuleType | None:
    """The common calls of CPU tensors in C++, where they were compiled for this torch and KDKERNELS_CALLS is not 0."""
    name = "kdkernels._calls_" + re.sub(r"\W", "_", torch.__version__)
    off = os.environ.get("KDKERNELS_CALLS") == "0"
    if _C is None or off or importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(name)


CALLS = _calls()


def _devices() -> dict[str, dict[str, str]]:
    """For each backend and device type, "" where it runs, else why it does not."""
    no_module = "the native module was not built (reinstall without KDKERNELS_NATIVE=0)"
    no_nvcc = "the native module was built without CUDA (reinstall with nvcc on PATH or KDKERNELS_CUDA=1)"
    no_triton = "triton is not installed (pip install triton)"
    no_interpreter = "triton runs on the CPU only with TRITON_INTERPRET=1 set before the import"
    triton = importlib.util.find_spec("triton") is not None
    interpreter = os.environ.get("TRITON_INTERPRET") == "1"
    cuda = no_module if _C is None else "" if _C.with_cuda else no_nvcc
    return {
        "cpu": {"cpu": no_module if _C is None else ""},
        "triton": {
            "cuda": "" if triton else no_triton,
            "cpu": no_triton if not triton else "" if interpreter else no_interpreter,
        },
        "cuda": {"cuda": cuda},
    }


_DEVICES = _devices()
# What `backend=None` tries, in this order. CUDA C++ before Triton: the kernels move the same bytes, and a
# C++ launch costs the host less than Triton's Python launcher.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


def _why_not(backend: str, device: str) -> str:
    if backend == "reference":
        return ""
    return _DEVICES[backend].get(device, f"it does not run on {device} tensors")


def available_backends(device: str | torch.device = "cpu") -> dict[str, str]:
    """For each backend, "available" on tensors of `device` (a type such as "cuda"), else the reason why not.

    >>> kdkernels.available_backends("cpu")["reference"]
    'available'
    """
    kind = torch.device(device).type
    return {name: _why_not(name, kind) or "available" for name in BACKENDS}


def resolve(backend: str | None, tensor: Tensor, name: str, has: tuple[str, ...] = BACKENDS) -> str:
    """The backend that runs a call on `tensor` (the argument called `name`), of those that the op `has`.

    Raises ValueError for an unknown backend or one that the op has not, RuntimeError for one that is not available
    on the tensor's device, TypeError for a dtype it does not take. ``None`` takes the first that fits.
    """
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be None or a name, got {backend!r}")
    return _resolve(backend, tensor.device.type, tensor.dtype, name, has)


@functools.cache
def _resolve(
    backend: str | None, device: str, dtype: torch.dtype, name: str, has: tuple[str, ...] = BACKENDS
) -> str:
    if dtype not in DTYPES["reference"]:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {_short(dtype)}")
    if backend is None:
        for candidate in _PREFERENCE.get(device, ("reference",)):
            if candidate in has and not _why_not(candidate, device) and dtype in DTYPES[candidate]:
                return candidate
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend not in has:
        raise ValueError(f"this loss, with these options, has no backend {backend!r}, only {', '.join(has)}")
    reason = _why_not(backend, device)
    if reason:
        raise RuntimeError(f"backend {backend!r} is not available for {name} on {device}: {reason}")
    if dtype not in DTYPES[backend]:
        takes = ", ".join(map(_short, DTYPES[backend]))
        raise TypeError(f"backend {backend!r} takes {takes}; {name} is {_short(dtype)}")
    return backend


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for all others: the dtype of losses, sums and temperatures."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_AS_IT_IS = nullcontext()


def full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which matrix products keep the dtypes that they are given, autocast or not."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _AS_IT_IS


def _threads(tensor: Tensor) -> int:
    return torch.get_num_threads()


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _on_device(launch: Callable[..., None]) -> Callable[..., None]:
    """`launch` with its first tensor's device as the current one, where a CUDA launch goes."""

    def launch_there(tensor: Tensor, *arguments: object) -> None:
        with torch.cuda.device_of(tensor):
            launch(tensor, *arguments)

    return launch_there


def native_kl_div(run: Callable[..., None], where: Callable[[Tensor], int]) -> Callable[..., None]:
    """The launcher over a function of the native module; `where` gives its threads or its stream."""

    def kl_div(
        input: Tensor,  # (M, N)
        target: Tensor,  # (M, N)
        input_temperature: Tensor | None,  # (M,)
        target_temperature: Tensor | None,  # (M,)
        input_temperature_value: float,
        target_temperature_value: float,
        row_scale: Tensor | None,  # (M,)
        scale: float,
        mask: Tensor | None,  # (M,)
        loss: Tensor | None,  # (M,)
        grad_input: Tensor | None,  # (M, N)
        grad_target: Tensor | None,  # (M, N)
        grad_input_temperature: Tensor | None,  # (M,)
        grad_target_temperature: Tensor | None,  # (M,)
    ) -> None:
        rows, classes = input.shape
        run(
            where(input),
            _DTYPE_CODE[input.dtype],
            rows,
            classes,
            input.stride(0),
            target.stride(0),
            input,
            target,
            input_temperature,
            target_temperature,
            input_temperature_value,
            target_temperature_value,
            row_scale,
            scale,
            mask,
            loss,
            grad_input,
            grad_target,
            grad_input_temperature,
            grad_target_temperature,
        )

    return kl_div


def native_logit_loss(run: Callable[..., None], where: Callable[[Tensor], int]) -> Callable[..., None]:
    """As native_kl_div."""

    def logit_loss(
        input: Tensor,  # (M, N)
        target: Tensor | None,  # (M, N)
        labels: Tensor | None,  # (M,) int64
        input_temperature: Tensor | None,  # (M,)
        target_temperature: Tensor | None,  # (M,)
        input_temperature_value: float,
        target_temperature_value: float,
        soft_scale: Tensor | None,  # (M,)
        soft_scale_value: float,
        row_scale: Tensor | None,  # (M,)
        scale: float,
        mask: Tensor | None,  # (M,)
        divergence: int,
        first: float,
        second: float,
        mix: float,
        standardize: bool,
        hard_weight: float,
        label_smoothing: float,
        z_loss: float,
        logit_mse: float,
        loss: Tensor | None,  # (M,)
        terms: Tensor | None,  # (5, M)
        grad_input: Tensor
        | None,  # (M, N) of input's dtype, or a half of float32 logits; may be input itself
        grad_input_temperature: Tensor | None,  # (M,)
    ) -> None:
        rows, classes = input.shape
        run(
            where(input),
            _DTYPE_CODE[input.dtype],
            _DTYPE_CODE[input.dtype if grad_input is None else grad_input.dtype],
            rows,
            classes,
            input.stride(0),
            0 if target is None else target.stride(0),
            0 if grad_input is None else grad_input.stride(0),
            input,
            target,
            labels,
            input_temperature,
            target_temperature,
            input_temperature_value,
            target_temperature_value,
            soft_scale,
            soft_scale_value,
            row_scale,
            scale,
            mask,
            divergence,
            first,
            second,
            mix,
            standardize,
            hard_weight,
            label_smoothing,
            z_loss,
            logit_mse,
            loss,
            terms,
            grad_input,
            grad_input_temperature,
        )

    return logit_loss


def native_topk_kl_div(run: Callable[..., None], where: Callable[[Tensor], int]) -> Callable[..., None]:
    """As native_kl_div."""

    def topk_kl_div(
        input: Tensor,  # (M, N)
        log_probs: Tensor,  # (M, k) statistics' dtype, contiguous
        indices: Tensor,  # (M, k) int64, contiguous
        input_temperature: Tensor | None,  # (M,)
        input_temperature_value: float,
        row_scale: Tensor | None,  # (M,)
        scale: float,
        mask: Tensor | None,  # (M,)
        tail: int,
        loss: Tensor | None,  # (M,)
        grad_input: Tensor | None,  # (M, N)
        grad_log_probs: Tensor | None,  # (M, k) statistics' dtype, contiguous
        grad_input_temperature: Tensor | None,  # (M,)
    ) -> None:
        rows, classes = input.shape
        run(
            where(input),
            _DTYPE_CODE[input.dtype],
            rows,
            classes,
            indices.shape[1],
            input.stride(0),
            0 if grad_input is None else grad_input.stride(0),
            input,
            log_probs,
            indices,
            input_temperature,
            input_temperature_value,
            row_scale,
            scale,
            mask,
            tail,
            loss,
            grad_input,
            grad_log_probs,
            grad_input_temperature,
        )

    return topk_kl_div


def native_multi_teacher_kl_div(
    run: Callable[..., None], where: Callable[[Tensor], int]
) -> Callable[..., None]:
    """As native_kl_div."""

    def multi_teacher_kl_div(
        input: Tensor,  # (M, N)
        targets: Sequence[Tensor],  # K of (M, N)
        temperature: Tensor | None,  # (K, M), any strides
        temperature_values: Sequence[float],  # K
        weight: Tensor | None,  # (K, M), any strides
        weight_values: Sequence[float],  # K
        teacher_mask: Tensor | None,  # (K, M) bool, any strides
        mask: Tensor | None,  # (M,)
        loss: Tensor | None,  # (M,)
        losses: Tensor | None,  # (K, M) contiguous
        grad_input: Tensor | None,  # (M, N) contiguous
    ) -> None:
        rows, classes = input.shape
        run(
            where(input),
            _DTYPE_CODE[input.dtype],
            rows,
            classes,
            input.stride(0),
            input,
            targets,
            [target.stride(0) for target in targets],
            temperature,
            _strides(temperature),
            temperature_values,
            weight,
            _strides(weight),
            weight_values,
            teacher_mask,
            _strides(teacher_mask),
            mask,
            loss,
            losses,
            grad_input,
        )

    return multi_teacher_kl_div


def _strides(matrix: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if matrix is None else matrix.stride()


def native_pool_mse(run: Callable[..., None], where: Callable[[Tensor], int]) -> Callable[..., None]:
    """As native_kl_div."""

    def pool_mse(
        student: Tensor,  # (B, C, *spatial), contiguous or channels last
        teacher: Tensor,  # (B, C, *spatial), as the student
        mask: Tensor | None,  # (B,)
        grad_pooled_student: Tensor | None,  # (B, C)
        grad_pooled_teacher: Tensor | None,  # (B, C)
        grad_mse: Tensor | None,  # (B,)
        pooled_student: Tensor | None,  # (B, C)
        pooled_teacher: Tensor | None,  # (B, C)
        mse: Tensor | None,  # (B,), or (B, pieces) that add up to it
        grad_student: Tensor | None,  # (B, C, *spatial), as the student
        grad_teacher: Tensor | None,  # (B, C, *spatial), as the student
    ) -> None:
        batch, channels, *spatial = student.shape
        positions = math.prod(spatial)
        run(
            where(student),
            _DTYPE_CODE[student.dtype],
            batch,
            channels,
            positions,
            mse.shape[1] if mse is not None and mse.dim() == 2 else 1,
            positions == 1 or not student.is_contiguous(),
            student,
            teacher,
            mask,
            grad_pooled_student,
            grad_pooled_teacher,
            grad_mse,
            pooled_student,
            pooled_teacher,
            mse,
            grad_student,
            grad_teacher,
        )

    return pool_mse


def native_scale_rows(run: Callable[..., None], where: Callable[[Tensor], int]) -> Callable[..., None]:
    """As native_kl_div."""

    def scale_rows(grad: Tensor, scale: Tensor) -> None:  # (M, ...), () or (M,)
        rows = grad.shape[0]
        stride = scale.stride(0) if scale.dim() else 0
        run(
            where(grad),
            _DTYPE_CODE[grad.dtype],
            rows,
            grad.numel() // rows,
            grad,
            scale,
            stride,
        )

    return scale_rows


def native_pair(run: Callable[..., None], where: Callable[[Tensor], int]) -> Callable[..., None]:
    """As native_kl_div, of a distance of two batches."""

    def distance(
        x: Tensor,  # (B, n, d), features side by side; or (n, d), which is one problem
        y: Tensor,  # (B, m, d), features side by side; or (m, d)
        labels: Tensor | None,  # (B, n) int64, contiguous
        x_weights: Tensor | None,  # (B, n) statistics' dtype, contiguous
        y_weights: Tensor | None,  # (B, m) statistics' dtype, contiguous
        *rest: Any,  # the distance's options; then loss (B,), grad_x (B, n, d) and grad_y (B, m, d), or None
    ) -> None:
        *batch, samples, width = x.shape
        problems, of_x, of_y = (batch[0], x.stride(0), y.stride(0)) if batch else (1, 0, 0)
        pair = (
            _DTYPE_CODE[x.dtype],
            problems,
            samples,
            y.shape[-2],
            width,
            of_x,
            x.stride(-2),
            of_y,
            y.stride(-2),
            x,
            y,
            labels,
            x_weights,
            y_weights,
        )
        run(where(x), pair, *rest)

    return distance


def native_masked_feature_loss(
    run: Callable[..., None], where: Callable[[Tensor], int]
) -> Callable[..., None]:
    """As native_kl_div."""

    def masked_feature_loss(
        student: Tensor,  # (N, C, H, W) contiguous
        teacher: Tensor,  # (N, C, H, W) contiguous
        weight_map: Tensor,  # (N, H, W) statistics' dtype, contiguous
        loss: Tensor,  # ()
        grad_student: Tensor | None,  # (N, C, H, W) contiguous
        squares: Tensor | None,  # (N, H, W) contiguous
    ) -> None:
        samples, channels, height, width = student.shape
        run(
            where(student),
            _DTYPE_CODE[student.dtype],
            samples,
            channels,
            height * width,
            student,
            teacher,
            weight_map,
            loss,
            grad_student,
            squares,
        )

    return masked_feature_loss


def native_mmd(run: Callable[..., None], where: Callable[[Tensor], int]) -> Callable[..., None]:
    """As native_pair."""

    def counted(
        where: int,
        pair: tuple[Any, ...],
        bandwidths: Tensor | None,  # (K,) statistics' dtype, contiguous
        *rest: Any,
    ) -> None:
        run(where, pair, bandwidths, 0 if bandwidths is None else len(bandwidths), *rest)

    return native_pair(counted, where)


def native_sliced_wasserstein(
    run: Callable[..., None], where: Callable[[Tensor], int]
) -> Callable[..., None]:
    """As native_kl_div."""

    def sliced_wasserstein(
        x: Tensor,  # (B, L, n) contiguous, float32 or float64
        y: Tensor,  # (B, L, m) contiguous
        x_weights: Tensor | None,  # (B, n) contiguous
        y_weights: Tensor | None,  # (B, m) contiguous
        p: float,
        loss: Tensor,  # (B, L)
        grad_x: Tensor | None,  # (B, L, n) contiguous
        grad_y: Tensor | None,  # (B, L, m) contiguous
    ) -> None:
        problems, projections, n = x.shape
        run(
            where(x),
            _DTYPE_CODE[x.dtype],
            problems * projections,
            projections,
            n,
            y.shape[2],
            x,
            y,
            x_weights,
            y_weights,
            p,
            loss,
            grad_x,
            grad_y,
        )

    return sliced_wasserstein


_COST_CODE = {"sqeuclidean": 0, "euclidean": 1, "cosine": 2}  # Cost in csrc/kdkernels.h


def native_sinkhorn(run: Callable[..., None], where: Callable[[Tensor], int]) -> Callable[..., None]:
    """As native_kl_div."""

    def sinkhorn(
        x: Tensor,  # (B, n, d); all tensors are contiguous, in one dtype
        y: Tensor,  # (B, m, d)
        a: Tensor,  # (B, n)
        b: Tensor,  # (B, m)
        extra: Sequence[Tensor],  # (B, n, m), (B, n, n), (B, m, m), the first of them, or none
        cost: str,
        epsilon: float,
        rho: float,
        iterations: int,
        tol: float,
        debias: bool,
        loss: Tensor,  # (B,)
        f: Tensor,  # (B, n)
        g: Tensor,  # (B, m)
        f_self: Tensor | None,  # (B, n)
        g_self: Tensor | None,  # (B, m)
        grad_x: Tensor | None,  # (B, n, d)
        grad_y: Tensor | None,  # (B, m, d)
        grad_a: Tensor | None,  # (B, n)
        grad_b: Tensor | None,  # (B, m)
        plans: Sequence[Tensor],  # as extra
    ) -> None:
        scratch = None
        if debias and where is not _threads:
            elements = sum(z.numel() for z in (grad_x, grad_y, grad_a, grad_b) if z is not None)
            scratch = torch.empty(24 * x.shape[0] + 4 * elements, dtype=torch.uint8, device=x.device)
        run(
            where(x),
            _DTYPE_CODE[x.dtype],
            *x.shape[:2],
            *y.shape[1:],
            x,
            y,
            a,
            b,
            (*extra, None, None, None)[:3],
            _COST_CODE[cost],
            epsilon,
            rho,
            iterations,
            tol,
            debias,
            loss,
            f,
            g,
            f_self,
            g_self,
            grad_x,
            grad_y,
            grad_a,
            grad_b,
            (*plans, None, None, None)[:3],
            scratch,
        )

    return sinkhorn


def native_small_linear_loss(run: Callable[..., None], where: Callable[[Tensor], int]) -> Callable[..., None]:
    """As native_kl_div."""

    def side(
        x: Tensor | None,  # (M, D), features side by side, as in weight
        weight: Tensor | None,  # (N, D)
        bias: Tensor | None,  # (N,)
        grad_x: Tensor | None,  # (M, D) contiguous, of one dtype with grad_weight
        grad_weight: Tensor | None,  # (N, D) contiguous
        grad_bias: Tensor | None,  # (N,) statistics' dtype
    ) -> tuple[Any, ...]:
        if x is None or weight is None:
            return (0, 0, 0, 0, 0, None, None, None, None, None, None)
        of = grad_weight if grad_x is None else grad_x
        return (
            _DTYPE_CODE[x.dtype],
            _DTYPE_CODE[x.dtype if of is None else of.dtype],
            x.shape[1],
            x.stride(0),
            weight.stride(0),
            x,
            weight,
            None if bias is None else bias.contiguous(),
            grad_x,
            grad_weight,
            grad_bias,
        )

    def small_linear_loss(
        input: Sequence[Tensor | None],  # as `side` has them
        target: Sequence[Tensor | None],
        labels: Tensor | None,  # (M,) int64
        input_temperature: Tensor | None,  # (M,)
        target_temperature: Tensor | None,  # (M,)
        input_temperature_value: float,
        target_temperature_value: float,
        soft_scale: Tensor | None,  # (M,)
        soft_scale_value: float,
        row_scale: Tensor | None,  # (M,)
        scale: float,
        options: Sequence[float],  # logit_loss's, from divergence to logit_mse
        exchanged: Sequence[float],  # the same for the gradients of the target's side
        loss: Tensor | None,  # (M,)
        terms: Tensor | None,  # (5, M)
        grad_input_temperature: Tensor | None,  # (M,)
        grad_target_temperature: Tensor | None,  # (M,)
    ) -> None:
        x, weight = input[:2]
        assert x is not None and weight is not None
        run(
            where(x),
            x.shape[0],
            weight.shape[0],
            labels,
            input_temperature,
            target_temperature,
            input_temperature_value,
            target_temperature_value,
            soft_scale,
            soft_scale_value,
            row_scale,
            scale,
            options,
            exchanged,
            loss,
            terms,
            grad_input_temperature,
            grad_target_temperature,
            side(*input),
            side(*target),
        )

    return small_linear_loss


# What the native module has: the name of each kernel, and what makes its launcher.
NATIVE = {
    "kl_div": native_kl_div,
    "logit_loss": native_logit_loss,
    "multi_teacher_kl_div": native_multi_teacher_kl_div,
    "pool_mse": native_pool_mse,
    "scale_rows": native_scale_rows,
    "sinkhorn": native_sinkhorn,
    "topk_kl_div": native_topk_kl_div,
}
# What Triton has.
TRITON = (
    *NATIVE,
    "coral",
    "gaussian",
    "linear_loss",
    "masked_feature_loss",
    "mmd",
    "sliced_wasserstein",
)
# What the native module has for the CPU alone.
NATIVE_CPU = {
    "coral": native_pair,
    "gaussian": native_pair,
    "masked_feature_loss": native_masked_feature_loss,
    "mmd": native_mmd,
    "sliced_wasserstein": native_sliced_wasserstein,
    "small_linear_loss": native_small_linear_loss,
}


def _launchers() -> dict[tuple[str, str], Callable[..., None]]:
    table: dict[tuple[str, str], Callable[..., None]] = {}
    for name, launcher_over in NATIVE.items():
        if _C is not None:
            table["cpu", name] = launcher_over(getattr(_C, f"cpu_{name}"), _threads)
            if _C.with_cuda:
                table["cuda", name] = _on_device(launcher_over(getattr(_C, f"cuda_{name}"), _stream))
    if importlib.util.find_spec("triton") is not None:
        for name in TRITON:
            table["triton", name] = _first_use(name)
    for name, launcher_over in NATIVE_CPU.items():
        if _C is not None:
            table["cpu", name] = launcher_over(getattr(_C, f"cpu_{name}"), _threads)
    return table


def _first_use(name: str) -> Callable[..., None]:
    """A Triton launcher whose module is imported at its first call: importing triton takes a second."""

    def launch(*arguments: object) -> None:
        function = getattr(importlib.import_module(f"kdkernels._triton.{name}"), name)
        _LAUNCHERS["triton", name] = function
        function(*arguments)

    return launch


_LAUNCHERS = _launchers()


_PLAIN = (Tensor, torch.nn.Parameter)


def unobserved(tensor: Tensor) -> bool:
    """No compiler, mode or transform wants to see the op that `tensor` goes into.

    Then its body may be called as the Python function it is: the way through the dispatcher and back into
    Python takes longer than the kernel of a small batch.
    """
    return (
        type(tensor) in _PLAIN  # nor is it being captured: then it is a fake one, but for Dynamo
        and not torch.compiler.is_dynamo_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


def holds_label(labels: Tensor, label: int) -> bool | None:
    """Whether a row has that label; None where it would take a wait, or more than the answer is worth, to find out."""
    if _C is None or labels.device.type != "cpu" or labels.dtype != torch.int64 or not unobserved(labels):
        return None
    if not labels.is_contiguous():
        return None
    return bool(_C.cpu_count_labels(labels, labels.numel(), label))


LARGE = 1 << 25  # bytes: from here on the C library takes fresh memory each time


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Contiguous memory for a kernel to fill.

    A CPU kernel fills a large gradient in less time than the system takes to hand out its memory in pages of 4 KiB: it
    is asked for large ones.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    if type(out) is Tensor and out.nbytes >= LARGE and device.type == "cpu" and _C is not None:
        _C.cpu_prefer_huge_pages(out, out.nbytes)
    return out


def sum_of_rows(rows: Tensor, backend: str) -> Tensor:  # (M,) contiguous, float32 or float64 -> ()
    """The sum of a kernel's rows, which has no graph.

    With caches that a training step has left cold, torch takes longer to find its way to a sum than a small batch's
    kernel takes.
    """
    if backend != "cpu" or _C is None or not unobserved(rows):
        return rows.sum()
    out = torch.empty((), dtype=rows.dtype)
    _C.cpu_sum_of_rows(_DTYPE_CODE[rows.dtype], rows, rows.numel(), out)
    return out


def launcher(backend: str, name: str) -> Callable[..., None]:
    """The function of `backend` that runs the kernel `name`."""
    return _LAUNCHERS[backend, name]


@functools.cache
def has_fast_blas() -> bool:
    """Whether the BLAS behind `torch.mm` is MKL on a processor of its maker's; on others it takes slower paths."""
    return _C is not None and _C.cpu_is_intel() and torch.backends.mkl.is_available()


@functools.cache
def has_bf16_linear() -> bool:
    """Whether this CPU multiplies bfloat16 matrices into float32 (`bf16_linear`)."""
    return _C is not None and _C.cpu_has_bf16_linear()


def bf16_linear(
    x: Tensor,  # (M, D) bfloat16, features side by side, as in weight
    weight: Tensor,  # (N, D) bfloat16
    bias: Tensor | None,  # (N,) bfloat16, contiguous
    out: Tensor,  # (M, N) float32, classes side by side
) -> None:
    """out = x weightᵀ + bias, summed and left in float32."""
    rows, features = x.shape
    _C.cpu_bf16_linear(  # type: ignore[union-attr]
        torch.get_num_threads(),
        rows,
        weight.shape[0],
        features,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        x,
        weight,
        bias,
        out,
    )
