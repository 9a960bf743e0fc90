r"""Exact optimal transport of two batches of features (KD²M, arXiv 2504.01757), solved on the host.

    D = min over plans γ of Σ_ij γ_ij c_ij,  γ ≥ 0 with the samples' weights as marginals,  c_ij = ‖x_i − y_j‖ᵖ

Gradient: that of Σ γ c with the plan held (the envelope theorem): dD/dx_i = Σ_j γ_ij p ‖x_i − y_j‖^(p−2) (x_i − y_j),
0 where x_i = y_j. The plan is piecewise constant, so second derivatives are right too, where it does not change.

A plan is kept as its pairs (i, j) and their mass, at most n + m − 1 of them: the costs of those are computed anew from
differences, so x = y gives exactly 0. Equal weights and n = m are an assignment (scipy), all else a network simplex
(POT); problems and classes are shared out over threads.
"""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from kdkernels.backend import resolve, statistics_dtype
from kdkernels.ops.divergences import kl_rows
from kdkernels.ops.features import (
    FeatureLoss,
    as_problems,
    check_at_least,
    check_choice,
    check_class_labels,
    check_features,
    check_order,
    check_sample_weights,
    proportions,
    square_root,
)
from kdkernels.ops.rows import kind_of

LABEL_COSTS = ("sqeuclidean", "kl", "cross_entropy")
METRICS = ("sqeuclidean", "euclidean", "cosine")
Pairs = tuple[Tensor, Tensor, Tensor]  # (B, K) of x, (B, K) of y, (B, K) mass


def _library(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = {"scipy.optimize": "scipy", "ot": "POT"}[name]
        raise ImportError(
            f"{purpose} needs {package}, which is not installed: pip install 'kdkernels[transport]'"
        ) from error


@torch.no_grad()
def distances(x: Tensor, y: Tensor, p: float) -> Tensor:  # (..., n, d), (..., m, d) -> (..., n, m) float64
    """‖x_i − y_j‖ᵖ: in float64, a matrix product is as good as differences for choosing a plan."""
    x, y = x.double(), y.double()
    middle = x.mean(-2, keepdim=True) if x.shape[-2] else 0
    x, y = x - middle, y - middle
    squared = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2 * (x @ y.mT)
    return squared.clamp_(min=0) if p == 2 else squared.clamp_(min=0).pow_(p / 2)


@torch.no_grad()
def optimal_pairs(
    cost: Tensor,  # (B, n, m) float64
    x_weights: Tensor | None,  # (B, n)
    y_weights: Tensor | None,  # (B, m)
    labels: Tensor | None,  # (B, n)
) -> Pairs:
    """The pairs of an optimal plan of each problem, and their mass, filled up with pairs of mass 0; with labels, a plan
    of each class."""
    device, (problems, n, m) = cost.device, cost.shape
    if cost.numel() == 0:
        empty = torch.zeros(problems, 0, dtype=torch.int64, device=device)
        return empty, empty, empty.double()
    assignment = x_weights is None and y_weights is None and n == m
    solver = (
        _library("scipy.optimize", "exact transport")
        if assignment
        else _library("ot", "exact transport with weights, or with n != m,")
    )
    import numpy as np

    cost_ = cost.cpu().numpy()
    weights = [
        np.ones((problems, size)) if w is None else w.double().cpu().numpy()
        for w, size in ((x_weights, n), (y_weights, m))
    ]
    groups: list[tuple[int, Any]] = []  # (problem, its samples or None for all)
    for problem in range(problems):
        if labels is None:
            groups.append((problem, None))
        else:
            of_problem = labels[problem].cpu().numpy()
            order = np.argsort(of_problem, kind="stable")
            cuts = np.flatnonzero(np.diff(of_problem[order])) + 1
            groups += [(problem, samples) for samples in np.split(order, cuts)]

    def solve(group: tuple[int, Any]) -> tuple[Any, Any, Any]:
        problem, samples = group
        c, a, b = cost_[problem], weights[0][problem], weights[1][problem]
        if samples is not None:
            c, a, b = c[np.ix_(samples, samples)], a[samples], b[samples]
        if c.shape == (1, 1):
            i, j = np.zeros(1, np.int64), np.zeros(1, np.int64)
            mass = np.ones(1) * float(a[0] > 0 and b[0] > 0)
        elif assignment:
            i, j = solver.linear_sum_assignment(c)
            mass = np.full(len(i), 1 / len(i))
        elif a.sum() <= 0 or b.sum() <= 0:
            i, j, mass = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
        else:
            plan = solver.emd(a / a.sum(), b / b.sum(), c, numItermax=10_000_000)
            i, j = np.nonzero(plan)
            mass = plan[i, j]
        return (i, j, mass) if samples is None else (samples[i], samples[j], mass)

    threads = min(torch.get_num_threads(), len(groups)) if n * m > 64 else 1
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            solved = list(pool.map(solve, groups))
    else:
        solved = [solve(group) for group in groups]
    found: list[list[Any]] = [[] for _ in range(problems)]
    for (problem, _), pairs in zip(groups, solved):
        found[problem].append(pairs)
    each = [[np.concatenate(part) for part in zip(*parts)] for parts in found]
    longest = max(len(i) for i, _, _ in each)
    table = np.zeros((3, problems, longest))
    for problem, parts in enumerate(each):
        for row, part in zip(table, parts):
            row[problem, : len(part)] = part
    i, j, mass = torch.from_numpy(table).to(device)
    return i.long(), j.long(), mass


def pair_costs(x: Tensor, y: Tensor, pairs: Pairs, p: float) -> Tensor:  # (B, n, d), (B, m, d) -> (B, K)
    """‖x_i − y_j‖ᵖ of the pairs, with gradient 0 where it is 0."""
    squared = (_take(x, pairs[0]) - _take(y, pairs[1])).square().sum(-1)
    if p == 2:
        return squared
    if p == 1:
        return square_root(squared)
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1).pow(p / 2), 0)


def _take(x: Tensor, samples: Tensor) -> Tensor:  # (B, n, d), (B, K) -> (B, K, d)
    return x.gather(1, samples[..., None].expand(-1, -1, x.shape[-1]))


def _problems(x: Tensor | None, trailing: int) -> Any:
    return None if x is None else as_problems(x, trailing)


def wasserstein_reference(
    x: Tensor,  # (..., n, d)
    y: Tensor,  # (..., m, d)
    *,
    p: float = 2,
    x_weights: Tensor | None = None,  # (..., n)
    y_weights: Tensor | None = None,  # (..., m)
    labels: Tensor | None = None,  # (..., n)
) -> Tensor:
    """The specification of `wasserstein`: plain PyTorch over a host's solver, on any device, with any derivative.
    Arguments are taken as they come."""
    batch = x.shape[:-2]
    x, y = (_problems(z.to(statistics_dtype(z.dtype)), 2) for z in (x, y))
    x_weights, y_weights, labels = (_problems(z, 1) for z in (x_weights, y_weights, labels))
    pairs = optimal_pairs(distances(x, y, p), x_weights, y_weights, labels)
    return (pairs[2].to(x.dtype) * pair_costs(x, y, pairs, p)).sum(-1).reshape(batch)


def joint_wasserstein_reference(
    x: Tensor,  # (..., n, d)
    y: Tensor,  # (..., m, d)
    x_labels: Tensor,  # (..., n, K)
    y_labels: Tensor,  # (..., m, K)
    *,
    label_weight: float = 1.0,
    label_cost: str = "sqeuclidean",
    p: float = 2,
    normalize: bool = False,
    x_weights: Tensor | None = None,  # (..., n)
    y_weights: Tensor | None = None,  # (..., m)
) -> Tensor:
    """The specification of `joint_wasserstein`, as `wasserstein_reference`."""
    batch, dtype = x.shape[:-2], statistics_dtype(x.dtype)
    x, y, x_labels, y_labels = (_problems(z.to(dtype), 2) for z in (x, y, x_labels, y_labels))
    x_weights, y_weights = (_problems(z, 1) for z in (x_weights, y_weights))
    cost = distances(x, y, p)
    scale = None
    if normalize and cost.numel():
        scale = cost.amax((-2, -1))
        scale = 1 / torch.where(scale > 0, scale, 1)
        cost = cost * scale[:, None, None]
    cost = cost + label_weight * _label_costs(x_labels, y_labels, label_cost)
    pairs = optimal_pairs(cost, x_weights, y_weights, None)
    of_features = pair_costs(x, y, pairs, p)
    if scale is not None:
        of_features = of_features * scale[:, None].to(dtype)
    of_labels = _pair_label_costs(_take(x_labels, pairs[0]), _take(y_labels, pairs[1]), label_cost)
    return (pairs[2].to(dtype) * (of_features + label_weight * of_labels)).sum(-1).reshape(batch)


@torch.no_grad()
def _label_costs(x: Tensor, y: Tensor, kind: str) -> Tensor:  # (B, n, K), (B, m, K) -> (B, n, m) float64
    if kind == "sqeuclidean":
        return distances(x, y, 2)
    log_x, log_y = torch.log_softmax(x.double(), -1), torch.log_softmax(y.double(), -1)
    if kind == "kl":
        return (log_x.exp() * log_x).sum(-1)[..., :, None] - log_x.exp() @ log_y.mT
    return -(log_x @ log_y.exp().mT)


def _pair_label_costs(x: Tensor, y: Tensor, kind: str) -> Tensor:  # (B, K, classes) twice -> (B, K)
    if kind == "sqeuclidean":
        return (x - y).square().sum(-1)
    log_x, log_y = torch.log_softmax(x, -1), torch.log_softmax(y, -1)
    if kind == "kl":
        return kl_rows(log_x, log_y)
    return -(log_y.exp() * log_x).sum(-1)


def gromov_wasserstein_reference(
    x: Tensor,  # (..., n, d)
    y: Tensor,  # (..., m, e)
    *,
    metric: str = "sqeuclidean",
    x_weights: Tensor | None = None,  # (..., n)
    y_weights: Tensor | None = None,  # (..., m)
) -> Tensor:
    """The specification of `gromov_wasserstein`, as `wasserstein_reference`."""
    batch, dtype = x.shape[:-2], statistics_dtype(x.dtype)
    x, y = (_problems(z.to(dtype), 2) for z in (x, y))
    x_share, y_share = proportions(_problems(x_weights, 1), x), proportions(_problems(y_weights, 1), y)
    within_x, within_y = _within(x, metric), _within(y, metric)
    plan = _gromov_plans(within_x, within_y, x_share, y_share).to(dtype)
    own = sum(
        torch.einsum("bi,bij,bj->b", share, within.square(), share)
        for share, within in ((plan.sum(2), within_x), (plan.sum(1), within_y))
    )
    return (own - 2 * (plan * (within_x @ plan @ within_y)).sum((1, 2))).reshape(batch)


def _within(x: Tensor, metric: str) -> Tensor:  # (B, n, d) -> (B, n, n)
    if metric == "cosine":
        x = x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        return 1 - x @ x.mT
    squared = (x[:, :, None] - x[:, None]).square().sum(-1)
    return squared if metric == "sqeuclidean" else square_root(squared)


@torch.no_grad()
def _gromov_plans(within_x: Tensor, within_y: Tensor, p: Tensor, q: Tensor) -> Tensor:  # (B, n, m)
    ot = _library("ot", "gromov_wasserstein")

    def solve(problem: int) -> Tensor:
        a, b = p[problem].double(), q[problem].double()
        if a.sum() <= 0 or b.sum() <= 0:
            return torch.zeros(len(a), len(b), dtype=torch.float64)
        sides = (within_x[problem], within_y[problem], a / a.sum(), b / b.sum())
        plan = ot.gromov.gromov_wasserstein(
            *(z.detach().double().cpu().numpy() for z in sides), loss_fun="square_loss"
        )
        return torch.from_numpy(plan)

    if not len(p):
        return within_x.new_zeros(0, p.shape[1], q.shape[1])
    with ThreadPoolExecutor(min(torch.get_num_threads(), len(p))) as pool:
        return torch.stack(list(pool.map(solve, range(len(p))))).to(p.device)


def _check_constant(weights: Tensor | None, x: Tensor, name: str) -> Tensor | None:
    weights = check_sample_weights(weights, x, name)
    if weights is not None and weights.requires_grad:
        raise ValueError(f"{name} has no gradient here, as the plan is held: pass {name}.detach()")
    return weights


def wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    p: float = 2,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    labels: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Exact Wasserstein distance to the power p of two batches, min_γ Σ γ_ij ‖x_i − y_j‖ᵖ; no root.

    Solved on the host (a GPU is waited for): equal weights and n = m by scipy, all else by POT;
    ``pip install 'kdkernels[transport]'`` brings both.

    Args:
        x: (..., n, d) features: float32, float16, bfloat16, float64. Leading dimensions are independent problems,
            solved on as many threads as torch has.
        y: (..., m, d) features of the same dtype and device. Gradients go to x and y; the plan is held.
        p: ≥ 1.
        x_weights, y_weights: floating (..., n) and (..., m), ≥ 0: what each sample counts for, in any scale; constants
            (no gradient). Values are checked on the CPU only. A problem whose weights are all 0 on either side, or that
            has no samples, is 0.
        labels: integers (..., n), x and y being the same samples through two networks (n = m): transport within each
            class, **summed** over the classes present in each problem. A class of one sample is ‖x_i − y_i‖ᵖ.
        backend: "reference" or None.

    Returns:
        (...): float32, or float64 for float64 features; exactly 0 with gradient 0 where x equals y.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, value or name.
        ImportError: the solver's library is not installed.

    Second derivatives are right, with the plan held.
    """
    check_features(x, y)
    p = check_order(p)
    resolve(backend, x, "x", has=("reference",))
    return wasserstein_reference(
        x,
        y,
        p=p,
        x_weights=_check_constant(x_weights, x, "x_weights"),
        y_weights=_check_constant(y_weights, y, "y_weights"),
        labels=check_class_labels(labels, x, y),
    )


def joint_wasserstein(
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    *,
    label_weight: float = 1.0,
    label_cost: str = "sqeuclidean",
    p: float = 2,
    normalize: bool = False,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Exact transport of features and labels together: min_γ Σ γ_ij (‖x_i − y_j‖ᵖ + label_weight ℓ(a_i, b_j)), a and b
    the labels.

    KD²M's joint distance, with the distances from x to y that its paper means (its release takes those from x to x, and
    passes no gradient through them).

    Args:
        x, y, p, x_weights, y_weights, backend: as in `wasserstein`.
        x_labels: (..., n, K) logits of x's samples (for "sqeuclidean", anything: one-hot labels, probabilities).
        y_labels: (..., m, K), as x_labels. Gradients go to x, y, x_labels and y_labels; the plan is held.
        label_weight: ≥ 0.
        label_cost: "sqeuclidean", ‖a − b‖² of the labels as they are; "kl", KL(softmax a ‖ softmax b); "cross_entropy",
            −Σ softmax(b) log softmax(a).
        normalize: divide the features' costs by their greatest value in each problem (held), as KD²M does.

    Returns, raises, second derivatives: as in `wasserstein`.
    """
    check_features(x, y)
    p = check_order(p)
    check_at_least(label_weight, "label_weight", 0)
    check_choice(label_cost, "label_cost", LABEL_COSTS)
    for name, labels, features in (("x_labels", x_labels, x), ("y_labels", y_labels, y)):
        if not isinstance(labels, Tensor) or not labels.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {kind_of(labels)}")
        if labels.dim() != features.dim() or labels.shape[:-1] != features.shape[:-1]:
            raise ValueError(
                f"{name} must have shape {(*features.shape[:-1], 'K')}, got {tuple(labels.shape)}"
            )
        if labels.device != features.device:
            raise ValueError(f"{name} must be on x's device {features.device}, got {labels.device}")
    if x_labels.shape[-1] != y_labels.shape[-1] or x_labels.shape[-1] == 0:
        raise ValueError(
            f"x_labels and y_labels must have the same K >= 1, got {x_labels.shape[-1]} and {y_labels.shape[-1]}"
        )
    resolve(backend, x, "x", has=("reference",))
    return joint_wasserstein_reference(
        x,
        y,
        x_labels,
        y_labels,
        label_weight=label_weight,
        label_cost=label_cost,
        p=p,
        normalize=normalize,
        x_weights=_check_constant(x_weights, x, "x_weights"),
        y_weights=_check_constant(y_weights, y, "y_weights"),
    )


def gromov_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    metric: str = "sqeuclidean",
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Gromov–Wasserstein with the square loss: Σ (D_x(i, k) − D_y(j, l))² γ_ij γ_kl, over distances within each batch.

    x and y may have different widths. The plan is POT's (``pip install 'kdkernels[transport]'``), on the host: a local
    minimum, as the problem is not convex, held while gradients go through the distances to x and y.

    Args:
        x: (..., n, d) features: float32, float16, bfloat16, float64. Leading dimensions are independent problems,
            solved on as many threads as torch has.
        y: (..., m, e) features of the same dtype and device.
        metric: "sqeuclidean", "euclidean" or "cosine" (1 − cos) within x, and within y.
        x_weights, y_weights, backend: as in `wasserstein`.

    Returns, raises, second derivatives: as in `wasserstein`; x = y gives 0 up to rounding.
    """
    check_features(x, y, equal_width=False)
    check_choice(metric, "metric", METRICS)
    resolve(backend, x, "x", has=("reference",))
    return gromov_wasserstein_reference(
        x,
        y,
        metric=metric,
        x_weights=_check_constant(x_weights, x, "x_weights"),
        y_weights=_check_constant(y_weights, y, "y_weights"),
    )


class WassersteinLoss(FeatureLoss):
    """`wasserstein` as a module: ``WassersteinLoss(p=1)(x, y, labels=labels)``; weights and labels are given with each
    call."""

    function = staticmethod(wasserstein)


class JointWassersteinLoss(FeatureLoss):
    """`joint_wasserstein` as a module: ``JointWassersteinLoss(label_weight=0.1)(x, y, x_labels, y_labels)``."""

    function = staticmethod(joint_wasserstein)


class GromovWassersteinLoss(FeatureLoss):
    """`gromov_wasserstein` as a module: ``GromovWassersteinLoss(metric="cosine")(x, y)``."""

    function = staticmethod(gromov_wasserstein)
