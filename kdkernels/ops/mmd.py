r"""Maximum mean discrepancy (Gretton et al. 2012) and energy distance (Székely & Rizzo 2013) of two batches.

    MMD²    = Σ_ij u_i u_j k(x_i, x_j) + Σ_ij v_i v_j k(y_i, y_j) − 2 Σ_ij u_i v_j k(x_i, y_j)
    energy  = 2 Σ_ij u_i v_j ‖x_i − y_j‖ − Σ_ij u_i u_j ‖x_i − x_j‖ − Σ_ij v_i v_j ‖y_i − y_j‖

with samples' weights u and v that add up to 1 (1/n and 1/m). The energy distance is MMD² with k = −‖a − b‖. The
unbiased estimator leaves i = j out of the sums within a batch, and divides these by 1 − Σ u² and 1 − Σ v².

Gradient, with a signed weights (u_i/(1 − Σ u²) or −v_j, from x's side) and k a function of r² = ‖a − b‖²:

    dx_i = 4 u_i Σ_j a_j k'(r²_ij) (x_i − z_j) = 4 u_i (x_i Σ_j c_ij − Σ_j c_ij z_j),  c_ij = a_j k'(r²_ij)

Two products over all pairs: inner products, whose tile becomes r² and k and c before it leaves the cache, and c times
the samples. No n×m matrix is made. r² is |a|² + |b|² − 2 ab about the common centre, and the sum of squared differences
where that would be much smaller than |a|² + |b|², so it is exact for equal samples and good for near ones.

Saved by the native form: the inputs, and the gradient that the forward already computed. The first backward hands that
buffer out; any later one computes it again. Second derivatives, and those of weights, go through the reference. Memory
beyond the gradients: x and y once or twice, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.backend import full_precision, resolve, statistics_dtype
from kdkernels.ops.features import (
    FeatureLoss,
    by_class,
    check_choice,
    check_class_labels,
    check_features,
    check_sample_weights,
    moments,
    proportions,
)
from kdkernels.ops.native_distance import native_distance
from kdkernels.ops.rows import kind_of

KERNELS = ("rbf", "laplacian", "polynomial", "imq", "linear")
ESTIMATORS = ("biased", "unbiased")
# MmdKernel in csrc/kdkernels.h.
_KERNEL_CODE = {"rbf": 0, "laplacian": 1, "polynomial": 2, "imq": 3, "energy": 4}
# Differences of pairs that the reference holds at once.
_DIFFERENCES = 1 << 24


def mmd_reference(
    x: Tensor,  # (..., n, d)
    y: Tensor,  # (..., m, d)
    *,
    kernel: str = "rbf",
    bandwidths: Tensor | None = None,  # (K,)
    estimator: str = "biased",
    x_weights: Tensor | None = None,  # (..., n)
    y_weights: Tensor | None = None,  # (..., m)
    labels: Tensor | None = None,  # (..., n)
) -> Tensor:
    """The specification of `mmd`: plain PyTorch, on any device, with any derivative. Arguments are taken as they come.
    It makes the n×n, m×m and n×m matrices."""
    x, y = (z.to(statistics_dtype(z.dtype)) for z in (x, y))
    unbiased = estimator == "unbiased"
    if kernel == "linear" and not unbiased:
        return _means(x, y, x_weights, y_weights, labels)
    weighted = x_weights is not None or y_weights is not None
    if labels is not None:
        (x, x_weights), (y, y_weights) = by_class(x, x_weights, labels), by_class(y, y_weights, labels)
    u, v = proportions(x_weights, x), proportions(y_weights, y)
    there_x, there_y = ((w > 0).sum(-1) >= (2 if unbiased else 1) for w in (u, v))
    there = there_x & there_y
    if kernel == "linear":
        each = _unbiased_means(x, y, u, v, weighted)
    elif kernel == "polynomial":
        scale = [1 / x.shape[-1]] if bandwidths is None else 1 / bandwidths.square()
        with full_precision(x):
            products = [a @ b.mT for a, b in ((x, x), (y, y), (x, y))]
        each = _combine([sum((s * g + 1).pow(3) for s in scale) for g in products], u, v, unbiased)
    else:
        squared = [squared_distances(a, b) for a, b in ((x, x), (y, y), (x, y))]
        if kernel == "energy":
            widths: Any = []
        elif bandwidths is None:
            widths = [_mean_distance(squared, u, v)[..., None, None]]
        else:
            widths = bandwidths
        each = _combine([_kernel(kernel, d, widths) for d in squared], u, v, unbiased)
    if not unbiased:  # rounding may leave a little less than nothing
        each = torch.where(each < 0, each - each.detach(), each)
    each = torch.where(there, each, 0)
    return each if labels is None else each.sum(-1)


def energy_distance_reference(
    x: Tensor,  # (..., n, d)
    y: Tensor,  # (..., m, d)
    *,
    x_weights: Tensor | None = None,  # (..., n)
    y_weights: Tensor | None = None,  # (..., m)
    labels: Tensor | None = None,  # (..., n)
) -> Tensor:
    """The specification of `energy_distance`: as `mmd_reference`."""
    return mmd_reference(x, y, kernel="energy", x_weights=x_weights, y_weights=y_weights, labels=labels)


def _kernel(kernel: str, squared: Tensor, widths: Any) -> Tensor:
    if kernel == "energy":
        return -_root(squared)
    if kernel == "rbf":
        return sum(torch.exp(-squared / (2 * s * s)) for s in widths)  # type: ignore[return-value]
    if kernel == "laplacian":
        distance = _root(squared)
        return sum(torch.exp(-distance / s) for s in widths)  # type: ignore[return-value]
    return sum(torch.rsqrt(1 + squared / (s * s)) for s in widths)  # type: ignore[return-value]


def _root(squared: Tensor) -> Tensor:
    """√squared, with gradient 0 where it is 0; NaN stays."""
    zero = squared == 0
    return torch.where(zero, 0, torch.where(zero, 1, squared).sqrt())


def _combine(
    kernels: Sequence[Any], u: Tensor, v: Tensor, unbiased: bool
) -> Tensor:  # of xx, yy, xy -> (...,)
    parts = [
        (a[..., :, None] * b[..., None, :] * k).sum((-2, -1))
        for k, (a, b) in zip(kernels, ((u, u), (v, v), (u, v)))
    ]
    if unbiased:
        for i, w in enumerate((u, v)):
            left = 1 - w.square().sum(-1)
            diagonal = (w.square() * kernels[i].diagonal(dim1=-2, dim2=-1)).sum(-1)
            parts[i] = (parts[i] - diagonal) / torch.where((w > 0).sum(-1) > 1, left, 1)
    return parts[0] + parts[1] - 2 * parts[2]


@torch.no_grad()
def _mean_distance(squared: Sequence[Tensor], u: Tensor, v: Tensor) -> Tensor:  # (...,)
    means = [
        (a[..., :, None] * b[..., None, :] * d.sqrt()).sum((-2, -1))
        for d, (a, b) in zip(squared, ((u, u), (v, v), (u, v)))
    ]
    mean = (means[0] + means[1] + means[2]) / 3
    return torch.where(mean > 0, mean, 1)


def _means(
    x: Tensor, y: Tensor, x_weights: Tensor | None, y_weights: Tensor | None, labels: Tensor | None
) -> Tensor:
    """‖μ_x − μ_y‖², of the classes where there are labels."""
    if labels is not None:
        (there_x, mean_x, _), (there_y, mean_y, _) = (
            moments(x, x_weights, labels),
            moments(y, y_weights, labels),
        )
        each = (mean_x - mean_y).square().sum(-1)
        return torch.where((there_x > 0) & (there_y > 0), each, 0).sum(-1)
    if x.shape[-2] == 0 or y.shape[-2] == 0:
        return 0 * (x.sum((-2, -1)) + y.sum((-2, -1)))
    u, v = (None if w is None else proportions(w, z) for w, z in ((x_weights, x), (y_weights, y)))
    mean_x, mean_y = _mean(x, u, y), _mean(y, v, y)
    there = torch.ones(x.shape[:-2], dtype=torch.bool, device=x.device)
    for w in (u, v):
        there = there if w is None else there & (w > 0).any(-1)
    return torch.where(there, (mean_x - mean_y).square().sum(-1), 0)


def _mean(z: Tensor, share: Tensor | None, y: Tensor) -> Tensor:  # (..., d), from y's first sample on
    z = z - y[..., :1, :].detach()
    return z.mean(-2) if share is None else (share[..., None] * z).sum(-2)


def _unbiased_means(x: Tensor, y: Tensor, u: Tensor, v: Tensor, weighted: bool) -> Tensor:  # (...,)
    """The unbiased estimator of ‖μ_x − μ_y‖²: less the samples' own squares."""
    if x.shape[-2] == 0 or y.shape[-2] == 0:
        return 0 * (x.sum((-2, -1)) + y.sum((-2, -1)))
    # Where all samples weigh the same, any origin gives the same, and a near one keeps the digits.
    origin = 0 if weighted else torch.cat((x, y), -2).mean(-2, keepdim=True).detach()
    means, within = [], []
    for z, w in ((x - origin, u), (y - origin, v)):
        mean = (w[..., None] * z).sum(-2)
        left = 1 - w.square().sum(-1)
        own = (w.square() * z.square().sum(-1)).sum(-1)
        within.append((mean.square().sum(-1) - own) / torch.where((w > 0).sum(-1) > 1, left, 1))
        means.append(mean)
    return within[0] + within[1] - 2 * (means[0] * means[1]).sum(-1)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:  # (..., n, d), (..., m, d) -> (..., n, m)
    """Sums of squared differences, some rows at a time: 0 exactly where samples are equal."""
    return _SquaredDistances.apply(x, y)


class _SquaredDistances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:  # (..., n, d), (..., m, d)
        step = max(1, _DIFFERENCES // max(y.numel(), 1))
        tiles = [
            (x[..., i : i + step, None, :] - y[..., None, :, :]).square().sum(-1)
            for i in range(0, x.shape[-2], step)
        ]
        squared = torch.cat(tiles, -2) if tiles else x.new_zeros(*x.shape[:-1], y.shape[-2])
        ctx.save_for_backward(x, y, squared)
        return squared

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:  # (..., n, m)
        x, y, squared = ctx.saved_tensors
        if not torch.is_grad_enabled():
            # What these add cancels, but not to the last digit, and may be all there is. (Its derivative stays.)
            grad_output = torch.where(squared == 0, 0, grad_output)
        centre = y.detach().sum(-2, keepdim=True) / max(y.shape[-2], 1)  # keeps the products small
        x, y = x - centre, y - centre
        with full_precision(x):
            of_x = grad_output.sum(-1)[..., None] * x - grad_output @ y
            of_y = grad_output.sum(-2)[..., None] * y - grad_output.mT @ x
        return 2 * of_x, 2 * of_y


def _of_kernel(
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    labels: Tensor | None,
    bandwidths: Tensor | None,
    kernel: int,
    unbiased: bool,
) -> Tensor:
    return mmd_reference(
        x,
        y,
        kernel=list(_KERNEL_CODE)[kernel],
        bandwidths=bandwidths,
        estimator="unbiased" if unbiased else "biased",
        x_weights=x_weights,
        y_weights=y_weights,
        labels=labels,
    )


_native = native_distance("mmd", "Tensor? bandwidths, int kernel, bool unbiased", _of_kernel, ("CPU", "CUDA"))


def _distance(
    x: Tensor,
    y: Tensor,
    kernel: str,
    bandwidths: Any,
    estimator: str,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    labels: Tensor | None,
    backend: str | None,
) -> Tensor:
    check_features(x, y)
    has = ("reference",) if kernel == "linear" else ("reference", "cpu", "triton")
    backend = resolve(backend, x, "x", has=has)
    bandwidths = _check_bandwidths(bandwidths, kernel, x)
    x_weights = check_sample_weights(x_weights, x, "x_weights")
    y_weights = check_sample_weights(y_weights, y, "y_weights")
    labels = check_class_labels(labels, x, y)
    if backend == "reference":
        return mmd_reference(
            x,
            y,
            kernel=kernel,
            bandwidths=bandwidths,
            estimator=estimator,
            x_weights=x_weights,
            y_weights=y_weights,
            labels=labels,
        )
    options = (bandwidths, _KERNEL_CODE[kernel], estimator == "unbiased")
    return _native(x, y, x_weights, y_weights, labels, options, backend)


def _check_bandwidths(bandwidths: Any, kernel: str, x: Tensor) -> Tensor | None:  # (K,)
    if bandwidths is None or kernel == "energy":
        return None
    if kernel == "linear":
        raise ValueError(f"the linear kernel has no bandwidths, got {bandwidths!r}")
    if isinstance(bandwidths, Tensor):
        if not bandwidths.is_floating_point():
            raise TypeError(f"bandwidths must be floats, got {kind_of(bandwidths)}")
        if bandwidths.requires_grad:
            raise ValueError("bandwidths are constants, and have no gradient: detach() them")
        if bandwidths.dim() > 1 or bandwidths.numel() == 0:
            raise ValueError(f"bandwidths must have shape () or (K,), got {tuple(bandwidths.shape)}")
        if bandwidths.device != x.device:
            raise ValueError(f"bandwidths must be on x's device {x.device}, got {bandwidths.device}")
        if bandwidths.device.type == "cpu" and not torch.compiler.is_compiling():
            bad = bandwidths[~((bandwidths > 0) & (bandwidths < math.inf))]
            if bad.numel():
                raise ValueError(f"bandwidths must be finite and above 0, got {bad[0].item()}")
        return bandwidths.reshape(-1).to(statistics_dtype(x.dtype)).contiguous()
    several = (
        bandwidths if isinstance(bandwidths, Sequence) and not isinstance(bandwidths, str) else [bandwidths]
    )
    if not several:
        raise ValueError("bandwidths must be at least one, got none")
    for each in several:
        if isinstance(each, bool) or not isinstance(each, (int, float)):
            raise TypeError(f"bandwidths must be a float, several, or a tensor, got {kind_of(each)}")
        if not 0 < each < math.inf:
            raise ValueError(f"bandwidths must be finite and above 0, got {each}")
    return torch.tensor(several, dtype=statistics_dtype(x.dtype), device=x.device)


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "rbf",
    bandwidths: float | Sequence[float] | Tensor | None = None,
    estimator: str = "biased",
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    labels: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Squared maximum mean discrepancy of two batches of features; no root.

    biased (V-statistic):    Σ_ij k(x_i, x_j)/n² + Σ_ij k(y_i, y_j)/m² − 2 Σ_ij k(x_i, y_j)/(nm)
    unbiased (U-statistic):  Σ_i≠j k(x_i, x_j)/(n(n−1)) + Σ_i≠j k(y_i, y_j)/(m(m−1)) − 2 Σ_ij k(x_i, y_j)/(nm)

    The biased one is never negative, and exactly 0 with a finite gradient where x equals y (0 on "cpu" and "triton").
    The unbiased one is 0 in expectation where the distributions are equal, and may be negative.

    KD²M (arXiv 2504.01757): ``mmd(x, y)`` and ``mmd(x, y, kernel="linear")``, λ 1e-4 beside CE 1.

    Args:
        x: (..., n, d) features: float32, float16, bfloat16, float64. Leading dimensions are independent problems.
        y: (..., m, d) features of the same dtype and device. Gradients go to x and y.
        kernel: with r = ‖a − b‖, and **summed** over the bandwidths σ:

            - "rbf": exp(−r² / (2σ²))
            - "laplacian": exp(−r / σ), with gradient 0 at r = 0
            - "imq": (1 + r²/σ²)^(−1/2), the inverse multiquadric
            - "polynomial": (a·b/σ² + 1)³, with σ² = d (KID, arXiv 1801.01401) unless given
            - "linear": a·b, so that MMD² = ‖μ_x − μ_y‖², from the means in O((n + m) d)
        bandwidths: σ: a float, several, or a tensor (K,): constants. None takes the mean distance r, without a
            gradient, of all pairs in x, in y and across (the mean of the three means, each with its pairs i = j), of
            each problem and each class, without a matrix of pairs and without a wait for a device; 1 where all samples
            are equal.
        estimator: "biased" or "unbiased".
        x_weights, y_weights: floating (..., n) and (..., m), ≥ 0: what each sample counts for, in any scale;
            differentiable. 1/n² becomes u_i u_j with Σ u = 1, 1/(n(n−1)) becomes u_i u_j / (1 − Σ u²). Values are
            checked on the CPU only.
        labels: integers (..., n), x and y being the same samples through two networks (n = m): the distances of the
            classes, **summed** over the classes present in each problem. (The reference waits for a GPU, to know the
            classes' sizes.)
        backend: "reference", or "cpu" and "triton" (not linear); None takes the best that there is. A named one is
            obeyed or raises. The reference holds all pairs in memory, the others tiles of them.

    A problem, or class, without a sample of positive weight on each side (unbiased: two on each side) is 0.

    Returns:
        (...): float32, or float64 for float64 features.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, value or name; a backend that there is not for these options.

    Second derivatives are right, and go through the reference.

    >>> loss = ce + 1e-4 * kdkernels.mmd(student_features, teacher_features, bandwidths=[4, 8, 16])
    """
    check_choice(kernel, "kernel", KERNELS)
    check_choice(estimator, "estimator", ESTIMATORS)
    return _distance(x, y, kernel, bandwidths, estimator, x_weights, y_weights, labels, backend)


def energy_distance(
    x: Tensor,
    y: Tensor,
    *,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    labels: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Energy distance of two batches of features, 2 E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖, over all pairs; no root.

    Never negative, and exactly 0 with a finite gradient where x equals y (0 on "cpu" and "triton"). The gradient of
    ‖a − b‖ is 0 where a equals b. geomloss' ``energy`` is half of it.

    Args:
        x: (..., n, d) features: float32, float16, bfloat16, float64. Leading dimensions are independent problems.
        y: (..., m, d) features of the same dtype and device. Gradients go to x and y.
        x_weights, y_weights: floating (..., n) and (..., m), ≥ 0: what each sample counts for, in any scale;
            differentiable. Values are checked on the CPU only. A problem whose weights are all 0 on either side, or
            that has no samples, is 0.
        labels: integers (..., n), x and y being the same samples through two networks (n = m): the distances of the
            classes, **summed** over the classes present in each problem. A class of one sample gives 2 ‖x_i − y_i‖.
        backend: "reference", "cpu" or "triton"; None takes the best that there is. A named one is obeyed or raises. The
            reference holds all pairs in memory, the others tiles of them.

    Returns:
        (...): float32, or float64 for float64 features.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, value or name.

    Second derivatives are right where no samples are equal, and go through the reference.
    """
    return _distance(x, y, "energy", None, "biased", x_weights, y_weights, labels, backend)


class MMDLoss(FeatureLoss):
    """`mmd` as a module: ``MMDLoss(bandwidths=[4, 8, 16])(x, y)``; weights and labels are given with each call."""

    function = staticmethod(mmd)


class EnergyDistanceLoss(FeatureLoss):
    """`energy_distance` as a module: ``EnergyDistanceLoss()(x, y)``; weights and labels are given with each call."""

    function = staticmethod(energy_distance)
