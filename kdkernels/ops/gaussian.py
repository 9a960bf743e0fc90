r"""Two batches of features as Gaussians (KD²M, arXiv 2504.01757): W₂² and KL of the normal distributions with their
means μ and covariances Σ (ddof 0).

    W₂²    = ‖μ_x − μ_y‖² + tr(Σ_x + Σ_y − 2 (Σ_x^½ Σ_y Σ_x^½)^½),   diagonal: ‖μ_x − μ_y‖² + ‖σ_x − σ_y‖²
    KL     = ½ (tr Σ_y⁻¹Σ_x − d − log det Σ_y⁻¹Σ_x + (μ_x − μ_y)ᵀ Σ_y⁻¹ (μ_x − μ_y))
             with each Σ replaced by (1 − s) Σ + (s tr(Σ)/d + eps) I

Gradient, for a sample of weight w_i in a total of 1, with v = σ² regularised as above (s = 0):
    W₂²:   dx_i = 2 w_i ((μ_x − μ_y) + (σ_x − σ_y) (x_i − μ_x) / σ_x), the second part 0 where σ_x = 0
    KL:    dx_i = w_i ((μ_x − μ_y) / v_y + (1/v_y − 1/v_x) (x_i − μ_x))

Full W₂ never sees a d×d matrix where n < d. With A and B the centred samples times √w (so that Σ_x = AᵀA, Σ_y = BᵀB),
filled up to equally many rows, tr (Σ_x^½ Σ_y Σ_x^½)^½ is the nuclear norm of A Bᵀ, and the covariances' part is

    min over orthogonal Q of ‖A − Q B‖²  =  ‖A − U Vᵀ B‖²  with  A Bᵀ = U S Vᵀ:

a sum of squares, in which nothing cancels, whose gradient needs no derivative of Q (2 (A − Q B), the envelope) and
exists whatever the rank. Where n > d, A and B are replaced by the triangular factors of their QR decompositions.

Full KL differences the covariances first, Σ_x − Σ_y = ½ ((A−B)ᵀ(A+B) + (A+B)ᵀ(A−B)), and takes d×d matrices where
d ≤ n, else n×n ones (Woodbury): in float64, whose cost is small beside the eigenvalues' spread.

With labels, classes are segments of one pass in the diagonal forms, and problems of one batch in the full ones.

Saved by the kernels (diagonal): the inputs, and the gradient that the forward already computed while it had the
samples at hand. The first backward hands that buffer out; any later one computes it again. Second derivatives, and
those of weights, go through the reference. Bytes moved per element by forward + backward of one side: 1 read and 1
write where 64 features (Triton: 64, or 128 with labels) of a class's samples stay in a cache, else 3 reads (Triton: 2)
and 1 write.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.backend import full_precision, resolve, statistics_dtype
from kdkernels.ops.features import (
    COVARIANCES,
    FeatureLoss,
    by_class,
    centre,
    check_at_least,
    check_choice,
    check_class_labels,
    check_features,
    check_sample_weights,
    moments,
    proportions,
    sizes,
    square_root,
)
from kdkernels.ops.native_distance import native_distance


def gaussian_wasserstein_reference(
    x: Tensor,  # (..., n, d)
    y: Tensor,  # (..., m, d)
    *,
    covariance: str = "diagonal",
    x_weights: Tensor | None = None,  # (..., n)
    y_weights: Tensor | None = None,  # (..., m)
    labels: Tensor | None = None,  # (..., n)
) -> Tensor:
    """The specification of `gaussian_wasserstein`: plain PyTorch, on any device. Arguments are taken as they come."""
    x, y = (z.to(statistics_dtype(z.dtype)) for z in (x, y))
    if covariance == "diagonal":
        (there_x, mean_x, v_x), (there_y, mean_y, v_y) = (
            moments(x, x_weights, labels),
            moments(y, y_weights, labels),
        )
        each = ((mean_x - mean_y).square() + (square_root(v_x) - square_root(v_y)).square()).sum(-1)
        return torch.where((there_x > 0) & (there_y > 0), each, 0).sum(-1)
    if labels is not None:
        (x, x_weights), (y, y_weights) = by_class(x, x_weights, labels), by_class(y, y_weights, labels)
    (there_x, mean_x, a), (there_y, mean_y, b) = root(x, x_weights), root(y, y_weights)
    each = (mean_x - mean_y).square().sum(-1) + _Bures.apply(*equal_rows(a, b))
    each = torch.where(there_x & there_y, each, 0)
    return each if labels is None else each.sum(-1)


def root(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # (...,), (..., d), (..., n, d)
    """Whether there are samples, their mean, and the A whose AᵀA is their covariance."""
    there, mean, centred = centre(x, weights)
    return there, mean, square_root(proportions(weights, x))[..., None] * centred


def equal_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The shorter one filled up with rows of 0, which no covariance sees."""
    rows = max(a.shape[-2], b.shape[-2])
    a, b = (z if z.shape[-2] == rows else F.pad(z, (0, 0, 0, rows - z.shape[-2])) for z in (a, b))
    return a, b


class _Bures(torch.autograd.Function):
    """The least ‖A − Q B‖² over orthogonal Q."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:  # (..., k, d)
        basis_a = basis_b = None
        left, right = a, b
        with full_precision(a):
            if a.shape[-2] > a.shape[-1]:
                (basis_a, left), (basis_b, right) = torch.linalg.qr(a), torch.linalg.qr(b)
            u, _, vh = torch.linalg.svd(left @ right.mT)
            q = u @ vh
            of_a = left - q @ right
            # The decomposition rounds: what is equal has distance 0, and not 1e-14.
            of_a = torch.where((a == b).all(-1).all(-1)[..., None, None], 0, of_a)
            loss = of_a.square().sum((-2, -1))
            of_b = -(q.mT @ of_a) if ctx.needs_input_grad[1] else None
            if basis_a is not None and basis_b is not None:
                of_a, of_b = basis_a @ of_a, None if of_b is None else basis_b @ of_b
        ctx.save_for_backward(a, b, of_a, of_b)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None]:  # (...,)
        a, b, of_a, of_b = ctx.saved_tensors
        scale = 2 * grad_output[..., None, None]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            q = _Polar.apply(a @ b.mT)
            of_a, of_b = a - q @ b, b - q.mT @ a
        return scale * of_a, None if of_b is None else scale * of_b


class _Polar(torch.autograd.Function):
    """U Vᵀ of M = U S Vᵀ. Its derivative divides by s_i + s_j, and is left out where both are 0: what it multiplies
    there is 0 to first order."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:  # (..., k, k)
        u, s, vh = torch.linalg.svd(matrix)
        ctx.save_for_backward(u, s, vh)
        return u @ vh

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        u, s, vh = ctx.saved_tensors
        inner = u.mT @ grad_output @ vh.mT
        sums = s[..., :, None] + s[..., None, :]
        least = 8 * s.shape[-1] * torch.finfo(s.dtype).eps * s[..., :1, None]
        inner = torch.where(sums > least, (inner - inner.mT) / torch.where(sums > least, sums, 1), 0)
        return u @ inner @ vh


def gaussian_kl_reference(
    x: Tensor,  # (..., n, d)
    y: Tensor,  # (..., m, d)
    *,
    covariance: str = "diagonal",
    shrinkage: float = 0.0,
    eps: float = 1e-6,
    min_samples: int = 2,
    x_weights: Tensor | None = None,  # (..., n)
    y_weights: Tensor | None = None,  # (..., m)
    labels: Tensor | None = None,  # (..., n)
) -> Tensor:
    """The specification of `gaussian_kl`: plain PyTorch, on any device, with any derivative. Arguments are taken as
    they come."""
    dtype = statistics_dtype(x.dtype)
    x, y = x.to(dtype), y.to(dtype)
    if covariance == "diagonal":
        (there_x, mean_x, v_x), (there_y, mean_y, v_y) = (
            moments(x, x_weights, labels),
            moments(y, y_weights, labels),
        )
        v_x, v_y = ((1 - shrinkage) * v + (shrinkage * v.mean(-1, keepdim=True) + eps) for v in (v_x, v_y))
        each = 0.5 * (ratio_less_log(v_x, v_y) + (mean_x - mean_y).square() / v_y).sum(-1)
        counts = (there_x > 0) & (there_y > 0)
        if labels is not None:
            of_x, of_y = sizes(labels, x_weights), sizes(labels, y_weights)
            counts = counts & (of_x >= min_samples) & (of_y >= min_samples)
        return torch.where(counts, each, 0).sum(-1)
    if labels is not None:
        (x, x_weights), (y, y_weights) = by_class(x, x_weights, labels), by_class(y, y_weights, labels)
    (counts, mean_x, a), (there_y, mean_y, b) = root(x.double(), x_weights), root(y.double(), y_weights)
    counts = counts & there_y
    for weights in (x_weights, y_weights):
        if labels is not None and weights is not None:
            counts = counts & ((weights > 0).sum(-1) >= min_samples)
    ridge_x, ridge_y = (shrinkage * z.square().mean(-1).sum(-1) + eps for z in (a, b))
    a, b = equal_rows(a, b)
    if shrinkage:
        a, b = (1 - shrinkage) ** 0.5 * a, (1 - shrinkage) ** 0.5 * b
    each = torch.where(counts, full_kl(mean_x - mean_y, a, b, ridge_x, ridge_y), 0).to(dtype)
    return each if labels is None else each.sum(-1)


def ratio_less_log(a: Tensor, b: Tensor) -> Tensor:
    """a/b − 1 − log(a/b), ≥ 0 and of second order in t = a/b − 1: t − log(1 + t), by its series to t¹⁴ where |t| ≤ 1/16
    (the next term is 1e-17 of it). The logarithm is taken of the ratio that is above 1, as 1 + t may round to 0."""
    t = (a - b) / b
    near = t.abs() <= 1 / 16
    small = torch.where(near, t, 0)
    series = torch.zeros_like(t)
    for k in range(14, 1, -1):
        series = (1 / k if k % 2 == 0 else -1 / k) + small * series
    more = t >= 0
    far, ratio = torch.where(near, 1, t), torch.where(more | near, 1, a) / torch.where(more | near, 1, b)
    log = torch.where(more, torch.log1p(torch.where(more, far, 0)), ratio.log())
    return torch.where(near, small * small * series, far - log)


def full_kl(
    shift: Tensor,  # (..., d)
    a: Tensor,  # (..., k, d)
    b: Tensor,  # (..., k, d)
    ridge_x: Tensor,  # (...,)
    ridge_y: Tensor,  # (...,)
) -> Tensor:  # (...,)
    """KL of N(shift, AᵀA + ridge_x I) from N(0, BᵀB + ridge_y I), all in float64."""
    k, d = a.shape[-2:]
    difference, total = a - b, a + b

    def factor(gram: Tensor, ridge: Tensor) -> Tensor:
        one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return torch.linalg.cholesky_ex(gram + ridge[..., None, None] * one)[0]

    def log_det(cholesky: Tensor) -> Tensor:
        return 2 * cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    if d <= k:
        one = torch.eye(d, dtype=a.dtype, device=a.device)
        cross = difference.mT @ total
        cross = 0.5 * (cross + cross.mT) + (ridge_x - ridge_y)[..., None, None] * one
        of_y = factor(b.mT @ b, ridge_y)
        e = torch.linalg.solve_triangular(of_y, cross, upper=False)
        e = torch.linalg.solve_triangular(of_y.mT, e, upper=True, left=False)
        e = 0.5 * (e + e.mT)
        mahalanobis = (
            torch.linalg.solve_triangular(of_y, shift[..., None], upper=False).square().sum((-2, -1))
        )
        trace = e.diagonal(dim1=-2, dim2=-1).sum(-1)
        return 0.5 * (trace - log_det(factor(e, torch.ones_like(ridge_y))) + mahalanobis)

    # Σ_y⁻¹ = (I − PᵀP) / ridge_y, P = L⁻¹B with L Lᵀ = ridge_y I + B Bᵀ
    of_x, of_y = factor(a @ a.mT, ridge_x), factor(b @ b.mT, ridge_y)
    p = torch.linalg.solve_triangular(of_y, b, upper=False)
    trace = (difference * total).sum((-2, -1)) - ((difference @ p.mT) * (total @ p.mT)).sum((-2, -1))
    trace = trace + (ridge_x - ridge_y) * (d - p.square().sum((-2, -1)))
    mahalanobis = shift.square().sum(-1) - (p @ shift[..., None]).square().sum((-2, -1))
    logs = (d - k) * (ridge_x.log() - ridge_y.log()) + log_det(of_x) - log_det(of_y)
    return 0.5 * ((trace + mahalanobis) / ridge_y - logs)


_DIAGONAL = ("reference", "cpu", "triton")
# GaussianDistance in csrc/kdkernels.h.
WASSERSTEIN, KL = 0, 1


def _diagonal_reference(
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    labels: Tensor | None,
    distance: int,
    eps: float,
    min_samples: int,
) -> Tensor:
    rest: dict[str, Any] = {"x_weights": x_weights, "y_weights": y_weights, "labels": labels}
    if distance == WASSERSTEIN:
        return gaussian_wasserstein_reference(x, y, **rest)
    return gaussian_kl_reference(x, y, eps=eps, min_samples=min_samples, **rest)


_native = native_distance(
    "gaussian", "int distance, float eps, int min_samples", _diagonal_reference, ("CPU", "CUDA")
)


def gaussian_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    covariance: str = "diagonal",
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    labels: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Squared 2-Wasserstein distance of the Gaussians with the two batches' means and covariances.

    diagonal: ‖μ_x − μ_y‖² + ‖σ_x − σ_y‖², σ per dimension with ddof 0 (KD²M, arXiv 2504.01757: λ 1e-4 beside CE 1).
    full: ‖μ_x − μ_y‖² + tr(Σ_x + Σ_y − 2 (Σ_x^½ Σ_y Σ_x^½)^½), the Bures distance of the covariances, by an SVD of
    min(max(n, m), d) rows and columns. Both are exactly 0 with gradient 0 where x equals y, and have a finite gradient
    where a dimension is constant or the covariance has no full rank.

    Args:
        x: (..., n, d) features: float32, float16, bfloat16, float64. Leading dimensions are independent problems.
        y: (..., m, d) features of the same dtype and device. Gradients go to x and y.
        covariance: "diagonal" or "full".
        x_weights, y_weights: floating (..., n) and (..., m), ≥ 0: what each sample counts for, in any scale;
            differentiable (full: a weight of exactly 0 has gradient 0). Values are checked on the CPU only. A problem
            whose weights are all 0 on either side, or that has no samples, is 0.
        labels: integers (..., n), x and y being the same samples through two networks (n = m): the distances of the
            classes, **summed** over the classes present in each problem. A class of one sample has σ = 0: its term is
            ‖x_i − y_i‖². A class that is not there adds 0. (full: a GPU is waited for, to know the classes' sizes.)
        backend: "reference", or "cpu" and "triton" (diagonal only); None takes the best that there is. A named one is
            obeyed or raises.

    Returns:
        (...): float32, or float64 for float64 features.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, value or name; a backend that there is not for these options.

    Second derivatives are right.

    >>> loss = ce + 1e-4 * kdkernels.gaussian_wasserstein(student_features, teacher_features)
    """
    check_features(x, y)
    check_choice(covariance, "covariance", COVARIANCES)
    backend = resolve(backend, x, "x", has=_DIAGONAL if covariance == "diagonal" else ("reference",))
    x_weights = check_sample_weights(x_weights, x, "x_weights")
    y_weights = check_sample_weights(y_weights, y, "y_weights")
    labels = check_class_labels(labels, x, y)
    if backend != "reference":
        return _native(x, y, x_weights, y_weights, labels, (WASSERSTEIN, 0.0, 1), backend)
    return gaussian_wasserstein_reference(
        x, y, covariance=covariance, x_weights=x_weights, y_weights=y_weights, labels=labels
    )


def gaussian_kl(
    x: Tensor,
    y: Tensor,
    *,
    covariance: str = "diagonal",
    shrinkage: float = 0.0,
    eps: float = 1e-6,
    min_samples: int = 2,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    labels: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""KL(x‖y) of the Gaussians with the two batches' means and covariances (ddof 0), the student first in KD²M.

    Each covariance Σ is replaced by (1 − shrinkage) Σ + (shrinkage tr(Σ)/d + eps) I before it is compared, so that a
    dimension without spread (a dead unit) has the variance eps and the divergence stays finite. It is exactly 0 with
    gradient 0 where x equals y, up to rounding in the full form with n < d.

    Args:
        x, y, x_weights, y_weights: as in `gaussian_wasserstein`.
        covariance: "diagonal" or "full". A full covariance of n ≤ d samples has no inverse: that asks for shrinkage.
        shrinkage: in [0, 1].
        eps: ≥ 0, added to every variance, in the features' units squared. (KD²M's release adds 1e-9 to σ, which makes
            a dead teacher unit cost 1e18 σ_x².)
        labels: as in `gaussian_wasserstein`: the sum over the classes present.
        min_samples: with labels, a class with fewer samples on either side (of weight > 0) adds 0. One sample has no
            spread: with 1, its term is ½ ‖x_i − y_i‖² / eps.
        backend: "reference", or "cpu" and "triton" (diagonal, without shrinkage); None takes the best that there is.
            A named one is obeyed or raises.

    Returns:
        (...): float32, or float64 for float64 features. With eps = 0 a dimension without spread gives inf or NaN.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, value or name; full without shrinkage where n ≤ d, or with labels.

    Second derivatives are right.
    """
    check_features(x, y)
    check_choice(covariance, "covariance", COVARIANCES)
    check_at_least(shrinkage, "shrinkage", 0)
    if shrinkage > 1:
        raise ValueError(f"shrinkage must be in [0, 1], got {shrinkage}")
    check_at_least(eps, "eps", 0)
    check_at_least(min_samples, "min_samples", 1)
    labels = check_class_labels(labels, x, y)
    fewest = min(x.shape[-2], y.shape[-2])
    if covariance == "full" and not shrinkage and (labels is not None or fewest <= x.shape[-1]):
        raise ValueError(
            "gaussian_kl with covariance='full' needs shrinkage > 0 "
            + (
                "with labels"
                if labels is not None
                else f"where n <= d, got {fewest} samples of {x.shape[-1]} features"
            )
            + ": such a covariance has no inverse"
        )
    native = covariance == "diagonal" and not shrinkage
    backend = resolve(backend, x, "x", has=_DIAGONAL if native else ("reference",))
    x_weights = check_sample_weights(x_weights, x, "x_weights")
    y_weights = check_sample_weights(y_weights, y, "y_weights")
    if backend != "reference":
        return _native(x, y, x_weights, y_weights, labels, (KL, float(eps), int(min_samples)), backend)
    return gaussian_kl_reference(
        x,
        y,
        covariance=covariance,
        shrinkage=shrinkage,
        eps=eps,
        min_samples=min_samples,
        x_weights=x_weights,
        y_weights=y_weights,
        labels=labels,
    )


class GaussianWassersteinLoss(FeatureLoss):
    """`gaussian_wasserstein` as a module: ``GaussianWassersteinLoss(covariance="full")(x, y, labels=labels)``.

    The options are those of the function; weights and labels are given with each call.
    """

    function = staticmethod(gaussian_wasserstein)


class GaussianKLLoss(FeatureLoss):
    """`gaussian_kl` as a module, as `GaussianWassersteinLoss`."""

    function = staticmethod(gaussian_kl)
