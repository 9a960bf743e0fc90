"""What the tests of distances of two batches share: the losses as cases, data, gradients."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import kdkernels

EPS32 = torch.finfo(torch.float32).eps


def sliced(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """With the same directions in every call."""
    generator = torch.Generator().manual_seed(5)
    return kdkernels.sliced_wasserstein(x, y, projections=7, generator=generator, **options)


class Case(NamedTuple):
    function: Callable[..., Tensor]
    backends: Sequence[str | None] = ("reference",)
    labels: bool = True  # takes labels
    repeats: bool = True  # a sample of weight 2 is a sample that is there twice
    pot: bool = False  # weights and n != m take POT
    constant_weights: bool = False  # weights have no gradient
    signed: bool = False  # may be negative, and is not 0 where x equals y
    terms: float = 0.0  # of sums of this order it is the difference


CASES = {
    "gaussian_wasserstein": Case(kdkernels.gaussian_wasserstein, ("reference", "cpu", "triton")),
    "gaussian_wasserstein, full": Case(partial(kdkernels.gaussian_wasserstein, covariance="full")),
    "gaussian_kl": Case(kdkernels.gaussian_kl, ("reference", "cpu", "triton")),
    "gaussian_kl, shrinkage": Case(partial(kdkernels.gaussian_kl, shrinkage=0.3)),
    "gaussian_kl, full": Case(partial(kdkernels.gaussian_kl, covariance="full", shrinkage=0.2)),
    "coral": Case(kdkernels.coral, ("reference", "cpu", "triton"), repeats=False),
    "mmd": Case(partial(kdkernels.mmd, bandwidths=[4.0, 8.0, 5.0]), ("reference", "cpu", "triton"), terms=12),
    "mmd, unbiased": Case(
        partial(kdkernels.mmd, bandwidths=6.0, estimator="unbiased"),
        ("reference", "cpu", "triton"),
        repeats=False,
        signed=True,
        terms=4,
    ),
    "mmd, laplacian": Case(
        partial(kdkernels.mmd, kernel="laplacian", bandwidths=[6.0, 3.0]),
        ("reference", "cpu", "triton"),
        terms=8,
    ),
    "mmd, polynomial": Case(
        partial(kdkernels.mmd, kernel="polynomial"), ("reference", "cpu", "triton"), terms=200
    ),
    "mmd, imq": Case(
        partial(kdkernels.mmd, kernel="imq", bandwidths=(3.0, 9.0)), ("reference", "cpu", "triton"), terms=8
    ),
    "mmd, linear": Case(partial(kdkernels.mmd, kernel="linear"), terms=4),
    "energy_distance": Case(kdkernels.energy_distance, ("reference", "cpu", "triton"), terms=20),
    "sliced_wasserstein": Case(sliced, ("reference", "cpu", "triton"), labels=False),
    "sliced_wasserstein, p=1": Case(partial(sliced, p=1), ("reference", "cpu", "triton"), labels=False),
    "sliced_wasserstein, p=3": Case(partial(sliced, p=3), ("reference", "cpu", "triton"), labels=False),
    # So much entropy that 60 iterations converge to the last bit.
    "sinkhorn": Case(
        partial(kdkernels.sinkhorn_divergence, epsilon=20.0, max_iter=60),
        ("reference", "cpu", "triton"),
        terms=2,
    ),
    "sinkhorn, euclidean": Case(
        partial(kdkernels.sinkhorn_divergence, cost="euclidean", epsilon=3.0, max_iter=60),
        ("reference", "cpu", "triton"),
        terms=2,
    ),
    "wasserstein": Case(kdkernels.wasserstein, pot=True, constant_weights=True),
    "wasserstein, p=1": Case(partial(kdkernels.wasserstein, p=1), pot=True, constant_weights=True),
    "wasserstein, p=3": Case(partial(kdkernels.wasserstein, p=3), pot=True, constant_weights=True),
}
# The interpreter is slow: what these kernels have of their own is tested in test_mmd.py and test_sinkhorn.py.
ELSEWHERE = [
    (name, "triton")
    for name in (
        *(f"mmd, {kernel}" for kernel in ("laplacian", "polynomial", "imq")),
        "sinkhorn",
        "sinkhorn, euclidean",
    )
]
GRID = [
    (name, backend)
    for name, case in CASES.items()
    for backend in case.backends
    if (name, backend) not in ELSEWHERE
]


def ready(name: str, backend: str | None, *, weighted: bool) -> Callable[..., Tensor]:
    """The case's function with that backend; the test is skipped where POT is needed and absent."""
    from conftest import device_of, missing

    case = CASES[name]
    state = "available" if backend is None else kdkernels.available_backends(device_of(backend))[backend]
    if state != "available":
        missing(f"backend {backend}: {state}")
    if weighted and case.pot and importlib.util.find_spec("ot") is None:
        missing("POT is not installed")
    return partial(moved, case.function, backend)


over_cases = pytest.mark.parametrize(("name", "backend"), GRID, ids=[f"{n}-{b}" for n, b in GRID])


def features(
    *batch_n_d: int,
    m: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x and y of another mean, spread and correlation: distances and gradients of order 1. In float32 where `backend`
    has no float64."""
    if backend == "triton" and dtype == torch.float64:
        dtype = torch.float32
    generator = torch.Generator().manual_seed(seed)
    *batch, n, d = batch_n_d

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mix = torch.eye(d, dtype=torch.float64) + 0.5 * normal(d, d) / d**0.5
    x = normal(*batch, n, d) @ mix + 0.5 * normal(d)
    y = 0.6 * normal(*batch, n if m is None else m, d) + 0.3 * normal(d) + 1
    return x.to(dtype), y.to(dtype)


def moved(function: Callable[..., Tensor], backend: str | None, *inputs: Tensor, **options: Any) -> Tensor:
    """`function` of tensors that were brought to the device of `backend`, and its result from there."""
    from conftest import device_of

    device = "cpu" if backend is None else device_of(backend)
    there = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in options.items()}
    return function(*(x.to(device) for x in inputs), backend=backend, **there).cpu()


def gradients(
    function: Callable[..., Tensor], *inputs: Tensor, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """The loss, and the gradients of the inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = function(*leaves, **options)
    if upstream is None:
        upstream = torch.ones_like(loss)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))


def assert_equal_up_to_rounding(
    got: Sequence[Tensor], truth: Sequence[Tensor], scale: float = 1.0, terms: float = 0.0
) -> None:
    """Losses and gradients, each to 64 eps of float32 (float64) of its largest value; `scale` is what the arithmetic
    goes through beyond that, and `terms` the order of what is differenced, whose 8 eps are left."""
    for a, b in zip(got, truth, strict=True):
        assert a.shape == b.shape and torch.isfinite(a).all()
        own = torch.finfo(a.dtype).eps if a.dtype == torch.float64 else EPS32
        largest = b.abs().max().item() if b.numel() else 0.0
        information = torch.finfo(a.dtype)
        rounding = information.eps * b.double().abs() + information.smallest_normal * information.eps
        error = (a.double() - b.double()).abs() / (64 * own * scale * largest + 8 * own * terms + rounding)
        assert (error <= 1).all(), (
            f"error {error.max():.2g} of what is allowed, of values up to {largest:.2g}"
        )
