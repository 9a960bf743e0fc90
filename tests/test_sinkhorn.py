"""sinkhorn_divergence and its relatives in every backend: closed forms, an independent solver, the reference."""

from __future__ import annotations

import importlib.util
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import GPU, _ready, device_of
from testing import assert_near, assert_not_vacuous, assert_same_bits_whatever_the_threads
from torch import Tensor

import kdkernels
from kdkernels import (
    SinkhornDivergenceLoss,
    apply_plan,
    potentials,
    sinkhorn_divergence,
    sinkhorn_divergence_reference,
    sinkhorn_plan,
)

# Triton's interpreter takes 20 ms for a block of rows in an iteration: there that backend has only the tests that ask
# for it.
BACKENDS = ("reference", "cpu", "cuda", *(["triton"] if GPU else []))
with_triton = pytest.mark.parametrize("backend", ("reference", "cpu", "cuda", "triton"), indirect=True)
COSTS = ("sqeuclidean", "euclidean", "cosine")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
over_costs = pytest.mark.parametrize("cost", COSTS)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return _ready(request.param, request)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


PAIRS = [(b, t) for b in BACKENDS for t in FLOATS if b not in ("cuda", "triton") or t != torch.float64]
if not GPU:  # halves are converted before the op
    PAIRS.append(("triton", torch.float32))


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[0]}-{str(pair[1]).removeprefix('torch.')}")
def backend_dtype(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    return _ready(request.param[0], request), request.param[1]


def precise(backend: str) -> torch.dtype:
    """The most precise dtype that the backend takes."""
    return torch.float32 if backend in ("cuda", "triton") else torch.float64


def enough(backend: str, max_iter: int, interpreted: int = 6) -> int:
    """Fewer where a thread of a device is a fiber, which takes a millisecond for each iteration, or is interpreted."""
    return max_iter if GPU else min(max_iter, {"cuda": 300, "triton": interpreted}.get(backend, max_iter))


def samples(
    *batch_n_d: int, m: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    *batch, n, d = batch_n_d

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(*batch, n, d) / d**0.5
    y = 0.7 * normal(*batch, n if m is None else m, d) / d**0.5 + 0.6 / d**0.5
    return x.to(dtype), y.to(dtype)


def some_weights(*shape: int, seed: int = 1) -> Tensor:
    weights = 0.2 + torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights[..., 1] = 0
    return weights


def costs_of(x: Tensor, y: Tensor, cost: str) -> Tensor:
    x, y = x.double(), y.double()
    if cost == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(x[..., :, None, :], y[..., None, :, :], dim=-1)
    squared = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
    return squared if cost == "sqeuclidean" else squared.sqrt()


def solve(
    costs: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    epsilon: float,
    rho: float = math.inf,
    iterations: int = 50_000,
) -> tuple[float, np.ndarray]:
    """(min Σγ C + ε KL + ρ KL + ρ KL, γ): a dense loop in the log domain, which knows nothing of the library."""
    damping = 1.0 if rho == math.inf else rho / (rho + epsilon)
    f, g = np.zeros(len(a)), np.zeros(len(b))

    def lse(z: np.ndarray, weights: np.ndarray) -> np.ndarray:
        z = np.where(weights[None, :] > 0, z, -np.inf)
        top = z.max(1)
        return np.log((weights * np.exp(z - top[:, None])).sum(1)) + top

    for _ in range(iterations):
        before = f
        f = -damping * epsilon * lse((g[None, :] - costs) / epsilon, b)
        g = -damping * epsilon * lse((f[None, :] - costs.T) / epsilon, a)
        if np.abs(f - before).max() < 1e-14:
            break
    product = a[:, None] * b[None, :]
    plan = product * np.exp((f[:, None] + g[None, :] - costs) / epsilon)

    def kl(p: np.ndarray, q: np.ndarray) -> float:
        alive = p > 0
        return float((p[alive] * np.log(p[alive] / q[alive])).sum() - p.sum() + q.sum())

    value = (plan * costs).sum() + epsilon * kl(plan, product)
    if rho != math.inf:
        value += rho * (kl(plan.sum(1), a) + kl(plan.sum(0), b))
    return float(value), plan


def gradients(function, arguments: dict, wanted: tuple[str, ...], dtype: torch.dtype, upstream: Tensor):
    """The loss and the gradients of `wanted` (tensors, or tuples of them) under `upstream`."""
    leaves = dict(arguments)
    for name in ("x", "y", "x_weights", "y_weights", "extra_cost"):
        value = arguments.get(name)
        statistics = (
            dtype if name in ("x", "y") else torch.float64 if dtype == torch.float64 else torch.float32
        )
        if isinstance(value, Tensor):
            leaves[name] = value.detach().to(statistics).requires_grad_(name in wanted)
        elif isinstance(value, tuple):
            leaves[name] = tuple(z.detach().to(statistics).requires_grad_(name in wanted) for z in value)
    flat = []
    for name in wanted:
        flat += leaves[name] if isinstance(leaves[name], tuple) else [leaves[name]]
    loss = function(**leaves)
    found = torch.autograd.grad(loss, flat, upstream.to(loss)) if flat else []
    return loss.detach(), list(found)


def compare(backend: str, arguments: dict, dtype: torch.dtype = torch.float32) -> None:
    """Loss and all gradients against the float64 reference of the same inputs."""
    wanted = tuple(
        name for name in ("x", "y", "x_weights", "y_weights", "extra_cost") if arguments.get(name) is not None
    )
    arguments = {k: v.to(dtype) if k in ("x", "y") else v for k, v in arguments.items()}
    arguments.setdefault("max_iter", enough(backend, 100))
    x, y = arguments["x"], arguments["y"]
    upstream = 0.5 + torch.rand(x.shape[:-2], generator=torch.Generator().manual_seed(3))
    specification = sinkhorn_divergence_reference
    truth, true_gradients = gradients(specification, arguments, wanted, torch.float64, upstream)
    reference, reference_gradients = gradients(specification, arguments, wanted, dtype, upstream)
    device = device_of(backend)
    moved = {
        k: v.to(device)
        if isinstance(v, Tensor)
        else tuple(z.to(device) for z in v)
        if isinstance(v, tuple)
        else v
        for k, v in arguments.items()
    }
    got, got_gradients = gradients(
        partial(sinkhorn_divergence, backend=backend), moved, wanted, dtype, upstream.to(device)
    )
    cost = arguments.get("cost", "sqeuclidean")
    largest = max(costs_of(u, v, cost).max().item() for u, v in ((x, y), (x, x), (y, y)))
    # What is rounded is the cost, beside epsilon in an exponent.
    ratio = 1 + largest / arguments["epsilon"]
    assert_near(got.cpu(), truth, reference, max(1.0, largest), "loss")
    assert_not_vacuous(truth, reference, max(1.0, largest))
    for true, own, found in zip(true_gradients, reference_gradients, got_gradients):
        scale = ratio * true.abs().max().item()
        assert_near(found.cpu(), true, own, scale, f"a gradient {tuple(true.shape)}")
        assert_not_vacuous(true, own, scale)


# ------------------------------------------------------------------------- against the float64 reference


@pytest.mark.parametrize("debias", [True, False])
@over_costs
def test_loss_and_gradients(backend_dtype, cost, debias):
    backend, dtype = backend_dtype
    x, y = samples(2, 9, 6, m=7)
    compare(backend, {"x": x, "y": y, "cost": cost, "epsilon": 0.2, "debias": debias}, dtype)


@with_triton
@pytest.mark.parametrize("reach", [None, 0.8])
@over_costs
def test_weights(backend, cost, reach):
    x, y = samples(2, 9, 6, m=7)
    options = {"cost": cost, "epsilon": 0.2, "reach": reach, "x_weights": some_weights(2, 9)}
    compare(backend, {"x": x, "y": y, **options, "y_weights": some_weights(2, 7, seed=2)})


@with_triton
@pytest.mark.parametrize("debias", [True, False])
@over_costs
def test_extra_cost(backend, cost, debias):
    x, y = samples(2, 5, 4, m=7)
    extra = tuple(torch.rand(2, *sizes, dtype=torch.float64) for sizes in ((5, 7), (5, 5), (7, 7)))
    extra = (extra[0], extra[1] + extra[1].mT, extra[2] + extra[2].mT)
    options = {"cost": cost, "epsilon": 0.2, "debias": debias}
    compare(backend, {"x": x, "y": y, **options, "extra_cost": extra if debias else extra[0]})


@pytest.mark.parametrize("n", [1, 2, 5, 8, 15, 16, 17, 33, 65])
@pytest.mark.parametrize("m", [1, 7, 16, 31, 65])
def test_every_number_of_samples(backend, n, m):
    x, y = samples(1, n, 3, m=m)
    for debias in (True, False):
        options = {"epsilon": 0.3, "max_iter": 30, "debias": debias}
        if n + m > 2:
            compare(backend, {"x": x, "y": y, **options})


@pytest.mark.parametrize("d", [1, 2, 7, 8, 15, 16, 17, 33, 100])
def test_every_number_of_features(backend, d):
    x, y = samples(1, 6, d, m=9)
    for cost in COSTS if d > 1 else COSTS[:2]:
        compare(backend, {"x": x, "y": y, "epsilon": 0.3, "max_iter": 40, "cost": cost})


@pytest.mark.parametrize("max_iter", [10, 11, 20, 27, 60])
def test_every_number_of_iterations(backend, max_iter):
    """The backends agree also where nothing has converged."""
    x, y = samples(2, 9, 4, m=6)
    options = {"epsilon": 0.01, "max_iter": max_iter, "cost": "sqeuclidean"}
    compare(backend, {"x": x, "y": y, **options})
    compare(backend, {"x": x, "y": y, **options, "debias": False, "reach": 1.0})


@pytest.mark.parametrize(("n", "m", "d"), [(33, 65, 3), (1, 17, 17), (40, 1, 100), (16, 32, 64)])
def test_blocks_of_triton(request, n, m, d):
    """Some more than a block of rows, of columns, of features; some fewer."""
    x, y = samples(1, n, d, m=m)
    backend = _ready("triton", request)
    for cost, debias in (("euclidean", True), ("sqeuclidean", False)):
        compare(backend, {"x": x, "y": y, "epsilon": 0.3, "max_iter": 2, "cost": cost, "debias": debias})


@with_triton
@pytest.mark.parametrize("reach", [None, 1.0])
def test_alternating_iterations(backend, reach):
    """From the 17th on after the last epsilon, which each problem has in another one."""
    x, y = samples(2, 5, 4, m=6)
    x[1], y[1] = 4 * x[1], 4 * y[1]
    options = {"epsilon": 0.3, "max_iter": 23, "debias": False, "reach": reach}
    compare(backend, {"x": x, "y": y, **options})


@with_triton
def test_one_iteration(backend):
    """Which has the last epsilon."""
    x, y = samples(2, 5, 4, m=6)
    compare(backend, {"x": x, "y": y, "epsilon": 0.3, "max_iter": 1})


@with_triton
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
def test_far_clusters_are_differenced(backend, cost):
    x, y = samples(1, 12, 4, m=10, dtype=torch.float32)
    x[:, ::2] += 50
    y[:, ::2] -= 50
    y[:, 1] = x[:, 1]
    compare(backend, {"x": x, "y": y, "epsilon": 0.2, "max_iter": enough(backend, 40), "cost": cost})


@over_costs
def test_small_epsilon(backend, cost):
    """A thousandth of the costs: scalings leave the range of float32 on the way."""
    x, y = samples(1, 24, 3, m=20)
    compare(backend, {"x": x, "y": y, "epsilon": 2e-3, "max_iter": 400, "cost": cost})


def test_far_clusters(backend):
    x, y = samples(2, 12, 4, m=10, dtype=torch.float32)
    x[:, ::2] += 50
    y[:, ::2] -= 50
    for epsilon in (0.05, 10.0):
        for name in ("sqeuclidean", "euclidean"):
            loss, found = gradients(
                partial(sinkhorn_divergence, backend=backend),
                {
                    "x": x.to(device_of(backend)),
                    "y": y.to(device_of(backend)),
                    "epsilon": epsilon,
                    "cost": name,
                },
                ("x", "y"),
                torch.float32,
                torch.ones(2),
            )
            truth, true = gradients(
                sinkhorn_divergence_reference,
                {"x": x, "y": y, "epsilon": epsilon, "cost": name},
                ("x", "y"),
                torch.float64,
                torch.ones(2),
            )
            assert torch.allclose(loss.cpu().double(), truth, rtol=1e-4)
            for a, b in zip(found, true):
                assert torch.isfinite(a).all()
                assert (a.cpu().double() - b).norm() < 2e-2 * b.norm()


# ------------------------------------------------------------------------------------- an independent solver


@pytest.mark.parametrize("rho", [math.inf, 0.7])
@over_costs
def test_value_and_plan_of_an_independent_solver(backend, cost, rho):
    dtype = precise(backend)
    x, y = (z.to(dtype) for z in samples(9, 5, m=6))
    a, b = some_weights(9), some_weights(6, seed=2)
    a, b = a / a.sum(), b / b.sum()
    reach = None if rho == math.inf else rho ** (1 / (2 if cost == "sqeuclidean" else 1))
    options = {
        "cost": cost,
        "epsilon": 0.1,
        "max_iter": enough(backend, 2000),
        "reach": reach,
        "backend": backend,
    }
    value, plan = solve(costs_of(x, y, cost).numpy(), a.numpy(), b.numpy(), 0.1, rho)
    weights = {"x_weights": a, "y_weights": b}
    device = device_of(backend)
    weights = {k: v.to(device, dtype) for k, v in weights.items()}
    x, y = x.to(device), y.to(device)
    tolerance = 1e-9 if dtype == torch.float64 else 3e-6
    got = sinkhorn_divergence(x, y, debias=False, **weights, **options)
    assert abs(got.item() - value) < tolerance
    got_plan = sinkhorn_plan(x, y, **weights, **options)
    assert np.abs(got_plan.cpu().double().numpy() - plan).max() < tolerance
    f, g = potentials(x, y, **weights, **options)
    z = (f[:, None] + g[None, :]).cpu().double() - costs_of(x.cpu(), y.cpu(), cost)
    assert np.abs((a[:, None] * b * torch.exp(z / 0.1)).numpy() - plan).max() < 5 * tolerance
    v = torch.randn(6, 3, dtype=torch.float64)
    applied = apply_plan(x, y, v.to(device, dtype), **weights, **options)
    assert np.abs(applied.cpu().double().numpy() - plan @ v.numpy()).max() < 20 * tolerance
    same = [
        solve(costs_of(u, u, cost).cpu().numpy(), c.numpy(), c.numpy(), 0.1, rho)[0]
        for u, c in ((x, a), (y, b))
    ]
    debiased = sinkhorn_divergence(x, y, **weights, **options)
    assert abs(debiased.item() - (value - sum(same) / 2)) < max(
        tolerance, 1e-8
    )  # what `solve` of (x, x) lacks


@with_triton
@pytest.mark.parametrize("reach", [None, 0.9])
def test_potentials(backend, reach):
    """Of those that are one but for a constant, the ones that are level."""
    x, y = samples(2, 6, 3, m=5)
    options = {"epsilon": 0.2, "reach": reach, "max_iter": enough(backend, 40)}
    weights = {"x_weights": some_weights(2, 6), "y_weights": some_weights(2, 5, seed=2)}
    truth = potentials(x, y, **weights, **options, backend="reference")
    x, y = (z.to(device_of(backend), precise(backend)) for z in (x, y))
    weights = {k: v.to(x) for k, v in weights.items()}
    found = potentials(x, y, **weights, **options, backend=backend)
    for got, true in zip(found, truth):
        assert (got.cpu().double() - true).abs().max() < 1e-5 * true.abs().max()


def test_masses_with_reach(backend):
    """Unbalanced, with masses that are not 1: the formula of the paper and of geomloss, from the potentials."""
    dtype = precise(backend)
    x, y = (z.to(device_of(backend), dtype) for z in samples(6, 3, m=5))
    a, b = 2 * some_weights(6).to(x), 0.7 * some_weights(5, seed=2).to(x)
    options = {"epsilon": 0.2, "reach": 0.9, "max_iter": enough(backend, 500), "backend": backend}
    rho = 0.81
    f, g = potentials(x, y, x_weights=a, y_weights=b, **options)
    f_x, _ = potentials(x, x, x_weights=a, y_weights=a, **options)
    g_y, _ = potentials(y, y, x_weights=b, y_weights=b, **options)

    def fall(u: Tensor, v: Tensor) -> Tensor:
        return torch.exp(-u / rho) - torch.exp(-v / rho)

    wanted = (rho + 0.1) * ((a * fall(f_x, f)).sum() + (b * fall(g_y, g)).sum())
    got = sinkhorn_divergence(x, y, x_weights=a, y_weights=b, **options)
    assert abs(got - wanted) < (1e-9 if dtype == torch.float64 else 2e-6)


def test_marginals(backend):
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(3, 20, 8, m=30))
    for cost in COSTS:
        plan = sinkhorn_plan(x, y, cost=cost, epsilon=0.1, max_iter=enough(backend, 1000), backend=backend)
        assert (plan.sum(-1) - 1 / 20).abs().max() < 1e-6
        assert (plan.sum(-2) - 1 / 30).abs().max() < 1e-6
        assert (plan >= 0).all()


# --------------------------------------------------------------------------------------------- closed forms


@over_costs
def test_diracs(backend, cost):
    x, y = (z.to(device_of(backend), precise(backend)) for z in samples(3, 1, 6))
    expected = costs_of(x.cpu(), y.cpu(), cost)[:, 0, 0]
    for debias in (True, False):
        got = sinkhorn_divergence(x, y, cost=cost, debias=debias, backend=backend)
        assert torch.allclose(got.cpu().double(), expected, rtol=1e-6)


def test_large_epsilon_couples_everything(backend):
    """ε → ∞: the plan is a⊗b; OT is the mean cost, and half the energy distance is what remains debiased."""
    x, y = (z.to(device_of(backend), precise(backend)) for z in samples(8, 3, m=5))
    a, b = some_weights(8).to(x), some_weights(5, seed=2).to(x)
    weights = {"x_weights": a, "y_weights": b, "epsilon": 1e4, "backend": backend}
    plan = sinkhorn_plan(x, y, **weights)
    a, b = a / a.sum(), b / b.sum()
    assert torch.allclose(plan, a[:, None] * b, atol=1e-4)
    xy, xx, yy = (
        (u[:, None] * v * costs_of(p.cpu(), q.cpu(), "sqeuclidean").to(u)).sum()
        for p, q, u, v in ((x, y, a, b), (x, x, a, a), (y, y, b, b))
    )
    tolerance = 1e-4 if precise(backend) == torch.float64 else 5e-3
    assert abs(sinkhorn_divergence(x, y, debias=False, **weights) - xy) < tolerance
    assert abs(sinkhorn_divergence(x, y, **weights) - (xy - xx / 2 - yy / 2)) < 2 * tolerance


@over_costs
def test_small_epsilon_is_the_assignment(backend, cost):
    from scipy.optimize import linear_sum_assignment

    x, y = (z.to(device_of(backend), precise(backend)) for z in samples(10, 4))
    costs = costs_of(x.cpu(), y.cpu(), cost).numpy()
    rows, columns = linear_sum_assignment(costs)
    options = {"cost": cost, "epsilon": 2e-3, "max_iter": enough(backend, 3000), "backend": backend}
    exact = costs[rows, columns].mean()
    # Σγ C ≤ OT_ε ≤ W + ε log n
    assert -1e-5 < sinkhorn_divergence(x, y, debias=False, **options) - exact < 2e-3 * math.log(10) + 1e-5
    plan = sinkhorn_plan(x, y, **options).cpu().numpy()
    assert (plan.argmax(1) == columns).all() and (plan.max(1) > 0.6 / 10).all()


@over_costs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_batches_are_exactly_zero(backend, cost, dtype):
    x, _ = (z.to(device_of(backend)) for z in samples(2, 19, 5, dtype=dtype))
    weights = some_weights(2, 19).to(x.device, torch.float32)
    for options in ({}, {"x_weights": weights, "y_weights": weights}, {"reach": 0.5}, {"max_iter": 3}):
        leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        loss = sinkhorn_divergence(*leaves, cost=cost, backend=backend, **options)
        assert torch.equal(loss, torch.zeros_like(loss))
        for gradient in torch.autograd.grad(loss.sum(), leaves):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@with_triton
def test_equal_batches_and_others(backend):
    """Each problem for itself: only one of these is the same thrice."""
    x, _ = (z.to(device_of(backend), torch.float32) for z in samples(3, 9, 5))
    weights = some_weights(3, 9).to(x.device, torch.float32)
    y, others = x.clone(), weights.clone()
    y[1, 8, 4] += 1e-3
    others[2, 8] += 0.1
    leaves = [z.requires_grad_() for z in (x, y, weights, others)]
    options = {"epsilon": 0.1, "max_iter": 3, "backend": backend}
    loss = sinkhorn_divergence(x, y, x_weights=weights, y_weights=others, **options)
    assert loss[0] == 0 and loss[1] != 0 and loss[2] != 0
    for gradient in torch.autograd.grad(loss.sum(), leaves):
        assert not gradient[0].any() and gradient[1].any() and gradient[2].any()


@with_triton
def test_equal_batches_with_equal_extra_costs(backend):
    x, _ = (z.to(device_of(backend), torch.float32) for z in samples(2, 9, 5))
    extra = torch.rand(2, 9, 9).to(x)
    extra = (extra + extra.mT).requires_grad_()
    leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    options = {"epsilon": 0.2, "max_iter": enough(backend, 100, 2), "backend": backend}
    loss = sinkhorn_divergence(*leaves, extra_cost=(extra, extra, extra), **options)
    assert torch.equal(loss, torch.zeros_like(loss))
    *of_features, of_extra = torch.autograd.grad(loss.sum(), (*leaves, extra))
    assert not any(g.any() for g in of_features) and not of_extra.any()
    other = extra.detach().clone()
    other[1, 2, 2] += 1
    moved = sinkhorn_divergence(x, x, extra_cost=(extra, extra, other), **options)
    assert moved[0] == 0 and moved[1] != 0


@with_triton
@over_costs
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(backend, cost, bad):
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(2, 6, 3, m=5))
    x[0, 2, 1] = bad
    x.requires_grad_()
    options = {"cost": cost, "epsilon": 0.3, "max_iter": enough(backend, 100, 2), "backend": backend}
    for debias in (True, False):
        loss = sinkhorn_divergence(x, y, debias=debias, **options)
        [gradient] = torch.autograd.grad(loss.sum(), x)
        assert loss[0].isnan() and loss[1].isfinite()
        assert not gradient[0].isfinite().all() and gradient[1].isfinite().all()
    plan = sinkhorn_plan(x, y, **options)
    assert plan[0].isnan().any() and plan[1].isfinite().all()


@with_triton
def test_costs_that_overflow_show(backend):
    """Also where no number is: of 17 samples every other one has a part in the centre."""
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(2, 17, 3, m=5))
    x[0, 3, 1] = 1e25
    options = {"epsilon": 0.3, "max_iter": enough(backend, 100, 2), "debias": False, "backend": backend}
    loss = sinkhorn_divergence(x, y, **options)
    assert loss[0].isnan() and loss[1].isfinite()


def test_no_samples(backend):
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(2, 6, 3, m=5))
    none = x[:, :0]
    assert sinkhorn_plan(none, y, backend=backend).shape == (2, 0, 5)
    assert sinkhorn_plan(x, y[:, :0], backend=backend).shape == (2, 6, 0)
    f, g = potentials(none, y, backend=backend)
    assert f.shape == (2, 0) and g.shape == (2, 5)
    assert apply_plan(none, y, y, backend=backend).shape == (2, 0, 3)
    assert torch.equal(apply_plan(x, y[:, :0], y[:, :0], backend=backend), torch.zeros_like(x))
    extra = tuple(torch.ones(*sizes, device=x.device) for sizes in ((0, 5), (0, 0), (5, 5)))
    assert not sinkhorn_divergence(none, y, extra_cost=extra, backend=backend).any()


@with_triton
@pytest.mark.parametrize("reach", [None, 1.2])
def test_a_problem_without_mass(backend, reach):
    """On one side, on the other; beside one that has mass on both."""
    x, y = samples(3, 5, 3, m=4)
    a, b = some_weights(3, 5), some_weights(3, 4, seed=2)
    a[0], b[1] = 0, 0
    options = {"epsilon": 0.3, "reach": reach, "x_weights": a, "y_weights": b}
    compare(backend, {"x": x, "y": y, **options, "max_iter": enough(backend, 100, 3)})


@pytest.mark.parametrize("absent", ["samples", "weight"])
def test_a_side_without_mass_with_reach(backend, absent):
    """What has nowhere to go is destroyed: ρ for each unit of mass."""
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(6, 3, m=5))
    a, b = torch.zeros(6).to(x), some_weights(5).to(x)
    if absent == "samples":
        x, a = x[:0], a[:0]
    options = {"epsilon": 0.3, "reach": 1.2, "max_iter": 200, "backend": backend}
    weights = {"x_weights": a, "y_weights": b}
    rho, mass = 1.44, b.sum()
    got = sinkhorn_divergence(x, y, **weights, debias=False, **options)
    assert torch.allclose(got, rho * mass)
    own = sinkhorn_divergence(y, y, x_weights=b, y_weights=b, debias=False, **options)
    expected = rho * mass - own / 2 + 0.15 * mass**2
    assert torch.allclose(sinkhorn_divergence(x, y, **weights, **options), expected, rtol=1e-5)
    swapped = sinkhorn_divergence(y, x, x_weights=b, y_weights=a, **options)
    assert torch.allclose(swapped, expected, rtol=1e-5)


@pytest.mark.parametrize("given", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("reach", [None, 0.9])
def test_labels_are_a_loop(backend, reach, given):
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(2, 9, 4, m=9))
    labels = torch.tensor([[3, 3, -1, 3, 3, -1, 7, 3, -1], [0] * 9], device=x.device)
    weights = {}
    if given:
        weights = {"x_weights": some_weights(2, 9).to(x), "y_weights": some_weights(2, 9, seed=2).to(x)}
    options = {"epsilon": 0.2, "reach": reach, "cost": "euclidean", "backend": backend}
    got = sinkhorn_divergence(x, y, labels=labels, **weights, **options)
    for i in range(2):
        total = torch.zeros((), device=x.device)
        for label in labels[i].unique():
            here = labels[i] == label
            own = {name: w[i, here] for name, w in weights.items()}
            total = total + sinkhorn_divergence(x[i, here], y[i, here], **own, **options)
        assert torch.allclose(got[i], total, rtol=1e-5, atol=1e-6)


@over_costs
def test_near_equal_batches(backend, cost):
    """A step away from y = x, unconverged: neither loss nor gradient may jump."""
    x, noise = (z.to(device_of(backend), torch.float32) for z in samples(2, 30, 5))
    y = x + 1e-3 * noise
    x.requires_grad_()
    loss = sinkhorn_divergence(x, y, cost=cost, epsilon=0.02, max_iter=60, backend=backend)
    [gradient] = torch.autograd.grad(loss.sum(), x)
    exact = x.detach().cpu().double().requires_grad_()
    truth = sinkhorn_divergence_reference(exact, y.cpu().double(), cost=cost, epsilon=0.02, max_iter=5000)
    [true_gradient] = torch.autograd.grad(truth.sum(), exact)
    assert (loss.cpu() - truth).abs().max() < 1e-6
    assert (gradient.cpu() - true_gradient).norm() < 1e-2 * true_gradient.norm()


def test_coincident_points_have_finite_gradients(backend):
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(6, 3))
    y[:3] = x[:3]
    x[4] = x[5]
    for cost in COSTS:
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        loss = sinkhorn_divergence(*leaves, cost=cost, epsilon=0.1, backend=backend)
        for gradient in torch.autograd.grad(loss, leaves):
            assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    arguments = {"x": x.cpu(), "y": y.cpu(), "cost": "euclidean", "epsilon": 0.1}
    compare(backend, arguments)


def test_zero_vectors_have_cosine_zero(backend):
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(6, 3, m=4))
    x[2] = 0
    y[1] = 0
    leaves = [x.requires_grad_(), y.requires_grad_()]
    loss = sinkhorn_divergence(*leaves, cost="cosine", epsilon=0.1, debias=False, backend=backend)
    for gradient in torch.autograd.grad(loss, leaves):
        assert torch.isfinite(gradient).all()
    value, _ = solve(
        costs_of(x.detach().cpu(), y.detach().cpu(), "cosine").numpy(),
        np.full(6, 1 / 6),
        np.full(4, 1 / 4),
        0.1,
    )
    assert abs(loss.item() - value) < 1e-5


@over_costs
def test_symmetry_and_positivity(backend, cost):
    x, y = (z.to(device_of(backend), precise(backend)) for z in samples(3, 9, 4, m=9))
    options = {"cost": cost, "epsilon": 0.1, "max_iter": enough(backend, 1000), "backend": backend}
    there, back = sinkhorn_divergence(x, y, **options), sinkhorn_divergence(y, x, **options)
    assert torch.allclose(there, back, atol=1e-9 if precise(backend) == torch.float64 else 1e-6)
    assert (there > 0).all()


# --------------------------------------------------------------------------------------------- the interface


def test_batch_is_a_loop(backend):
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(2, 3, 9, 4, m=7))
    a = some_weights(2, 3, 9).to(x)
    whole = sinkhorn_divergence(x, y, x_weights=a, backend=backend)
    assert whole.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one = sinkhorn_divergence(x[i, j], y[i, j], x_weights=a[i, j], backend=backend)
            assert one.shape == () and torch.allclose(one, whole[i, j], rtol=1e-6, atol=1e-7)
    assert sinkhorn_plan(x, y, backend=backend).shape == (2, 3, 9, 7)
    f, g = potentials(x, y, backend=backend)
    assert f.shape == (2, 3, 9) and g.shape == (2, 3, 7)
    assert apply_plan(x, y, y, backend=backend).shape == (2, 3, 9, 4)
    assert sinkhorn_divergence(x[:0], y[:0], backend=backend).shape == (0, 3)


def test_zero_weights_are_absent_samples(backend):
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(8, 4, m=6))
    weights = torch.tensor([1.0, 1, 0, 1, 1, 0, 1, 1], device=x.device)
    options = {"epsilon": 0.2, "max_iter": 300, "backend": backend}
    got = sinkhorn_divergence(x, y, x_weights=weights, **options)
    expected = sinkhorn_divergence(x[weights > 0], y, **options)
    assert torch.allclose(got, expected, atol=1e-6)
    leaf = x.clone().requires_grad_()
    loss = sinkhorn_divergence(leaf, y, x_weights=torch.zeros_like(weights), **options)
    assert loss == 0
    assert not torch.autograd.grad(loss, leaf)[0].any()


def test_tol(backend):
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(3, 12, 4, m=9))
    options = {"epsilon": 0.2, "backend": backend}
    full = sinkhorn_divergence(x, y, max_iter=enough(backend, 1000), **options)
    early = sinkhorn_divergence(x, y, max_iter=1000, tol=1e-3, **options)
    assert torch.allclose(early, full, atol=1e-2) and not torch.equal(early, full)
    at_once = sinkhorn_divergence(x, y, max_iter=1000, tol=1e9, **options)
    assert not torch.allclose(at_once, full, atol=1e-4)
    plan = sinkhorn_plan(x, y, max_iter=10_000, tol=1e-7, **options)
    assert (plan.sum(-1) - 1 / 12).abs().max() < 1e-6


@with_triton
@pytest.mark.parametrize("debias", [True, False])
def test_tol_stops_each_problem_for_itself(backend, debias):
    """Where the reference stops; and not after all iterations."""
    x, y = samples(2, 6, 3, m=5)
    x[1], y[1] = 3 * x[1], 3 * y[1]
    arguments = {"x": x, "y": y, "epsilon": 0.5, "max_iter": 16, "tol": 0.05, "debias": debias}
    compare(backend, arguments)
    stopped, not_stopped = (
        sinkhorn_divergence_reference(**{**arguments, "tol": tol}) for tol in (0.05, None)
    )
    assert ((stopped - not_stopped).abs() > 1e-4).all()


def test_backward_twice(backend):
    x, y = (z.to(device_of(backend), torch.float32).requires_grad_() for z in samples(2, 6, 4, m=5))
    loss = sinkhorn_divergence(x, y, epsilon=0.2, backend=backend)
    first = torch.autograd.grad(loss.sum(), (x, y), retain_graph=True)
    kept = [z.clone() for z in first]
    again = torch.autograd.grad(loss, (x, y), torch.tensor([2.0, 3.0], device=x.device))
    factor = torch.tensor([2.0, 3.0], device=x.device)[:, None, None]
    for a, b, c in zip(first, kept, again):
        assert torch.equal(a, b) and torch.equal(c, factor * b)


SUBSETS = [
    (backend, wanted, debias)
    for backend in BACKENDS
    for wanted in (("x",), ("y",), ("x_weights",), ("extra_cost",), ("y", "y_weights"))
    for debias in (True, False)
]
if not GPU:
    SUBSETS += [
        ("triton", ("y",), True),
        ("triton", ("x_weights",), True),
        ("triton", ("extra_cost",), False),
        ("triton", ("y_weights",), False),
    ]


@pytest.mark.parametrize(("backend", "wanted", "debias"), SUBSETS, indirect=["backend"])
def test_gradients_of_some(backend, wanted, debias):
    x, y = samples(2, 6, 4, m=5)
    extra = tuple(torch.rand(2, *s, dtype=torch.float64) for s in ((6, 5), (6, 6), (5, 5)))
    arguments = {
        **{k: v.to(device_of(backend)) for k, v in {"x": x, "y": y}.items()},
        "x_weights": some_weights(2, 6).to(device_of(backend)),
        "y_weights": some_weights(2, 5).to(device_of(backend)),
        "extra_cost": tuple(
            (z + z.mT if z.shape[-1] == z.shape[-2] else z).to(device_of(backend)) for z in extra
        ),
        "epsilon": 0.2,
        "max_iter": enough(backend, 100, 2),
        "debias": debias,
    }
    if not debias:
        arguments["extra_cost"] = arguments["extra_cost"][0]
    run = partial(sinkhorn_divergence, backend=backend)
    names = ("x", "y", "x_weights", "y_weights", "extra_cost")
    upstream = torch.ones(2, device=device_of(backend))
    _, everything = gradients(run, arguments, names, torch.float32, upstream)
    by_name = dict(zip(names[:4], everything))
    _, found = gradients(run, arguments, wanted, torch.float32, upstream)
    expected = [g for n in wanted for g in (everything[4:] if n == "extra_cost" else [by_name[n]])]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_strided_inputs(backend):
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(2, 6, 8, m=6))
    got = sinkhorn_divergence(
        x.mT[:, ::2].mT, y.transpose(0, 1).contiguous().transpose(0, 1)[..., ::2], backend=backend
    )
    expected = sinkhorn_divergence(x[..., ::2].contiguous(), y[..., ::2].contiguous(), backend=backend)
    assert torch.equal(got, expected)


def test_no_gradient_is_no_graph(backend):
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(6, 3))
    assert not sinkhorn_divergence(x, y, backend=backend).requires_grad
    with torch.no_grad():
        assert not sinkhorn_divergence(x.requires_grad_(), y, backend=backend).requires_grad
    assert not potentials(x, y, backend=backend)[0].requires_grad
    assert not sinkhorn_plan(x, y, backend=backend).requires_grad


@with_triton
def test_apply_plan_has_the_gradient_of_v(backend):
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(2, 6, 3, m=5))
    v = torch.randn(2, 5, 4, device=x.device, requires_grad=True)
    extra = torch.rand(2, 6, 5, device=x.device)
    options = {
        "epsilon": 0.3,
        "max_iter": enough(backend, 100),
        "extra_cost": extra,
        "backend": backend,
    }
    plan = sinkhorn_plan(x, y, **options)
    out = apply_plan(x, y, v, **options)
    upstream = torch.randn_like(out)
    assert torch.allclose(out, plan @ v, atol=1e-6)
    assert torch.allclose(torch.autograd.grad(out, v, upstream)[0], plan.mT @ upstream, atol=1e-6)


def test_apply_plan_in_blocks(backend, monkeypatch):
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(2, 11, 3, m=5))
    whole = apply_plan(x, y, y, backend=backend)
    monkeypatch.setattr(kdkernels.ops.sinkhorn._Apply, "BLOCK", 40)
    assert torch.allclose(apply_plan(x, y, y, backend=backend), whole, atol=1e-7)


@over_costs
@pytest.mark.parametrize("reach", [None, 0.8])
@pytest.mark.parametrize("debias", [True, False])
def test_gradcheck(backend, cost, reach, debias):
    """First and second derivatives; the backends without float64 are compared with the reference's."""
    if precise(backend) != torch.float64:
        pytest.skip("gradcheck is of float64")
    x, y = samples(3, 2, m=2)
    inputs = [z.requires_grad_() for z in (x, y, some_weights(3) + 0.1, some_weights(2) + 0.1)]

    def loss(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        options = {"cost": cost, "epsilon": 0.5, "max_iter": 120, "reach": reach, "debias": debias}
        return sinkhorn_divergence(x, y, x_weights=a, y_weights=b, backend=backend, **options)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_gradcheck_of_extra_cost(backend):
    if precise(backend) != torch.float64:
        pytest.skip("gradcheck is of float64")
    x, y = samples(3, 2, m=2)
    extra = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    loss = partial(sinkhorn_divergence, x, y, epsilon=0.5, max_iter=120, backend=backend)
    assert torch.autograd.gradcheck(lambda z: loss(extra_cost=z, debias=False), extra)
    assert torch.autograd.gradgradcheck(lambda z: loss(extra_cost=z, debias=False), extra)
    own_x, own_y = (torch.rand(k, k, dtype=torch.float64, requires_grad=True) for k in (3, 2))

    def debiased(z: Tensor, z_x: Tensor, z_y: Tensor) -> Tensor:
        return loss(extra_cost=(z, z_x + z_x.mT, z_y + z_y.mT))

    assert torch.autograd.gradcheck(debiased, (extra, own_x, own_y))
    assert torch.autograd.gradgradcheck(debiased, (extra, own_x, own_y))


def test_double_backward(backend):
    x, y = samples(2, 5, 3, m=4)

    def second(z: Tensor, backend: str) -> Tensor:
        leaf = z.detach().requires_grad_()
        other = y.to(leaf)
        loss = sinkhorn_divergence(leaf, other, epsilon=0.3, max_iter=200, backend=backend)
        [g] = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
        return torch.autograd.grad(g.square().sum(), leaf)[0]

    truth = second(x, "reference")
    got = second(x.to(device_of(backend), torch.float32), backend)
    assert (got.cpu().double() - truth).abs().max() < 1e-4 * truth.abs().max()


def test_third_derivatives_are_refused():
    x, y = samples(4, 2)
    x.requires_grad_()
    loss = sinkhorn_divergence(x, y, epsilon=0.3, backend="reference")
    [g] = torch.autograd.grad(loss, x, create_graph=True)
    [h] = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no third ones"):
        torch.autograd.grad(h.sum(), x)


def test_double_backward_of_a_large_problem_is_refused(monkeypatch):
    monkeypatch.setattr(kdkernels.ops.sinkhorn, "MOST_UNKNOWNS", 6)
    x, y = samples(4, 2)
    x.requires_grad_()
    loss = sinkhorn_divergence(x, y, epsilon=0.3, backend="reference")
    [g] = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="dense system of n \\+ m unknowns, at most 6; got 4 \\+ 4"):
        torch.autograd.grad(g.square().sum(), x)


def test_compile(backend):
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(2, 6, 3, m=5))
    a = some_weights(2, 6).to(x)

    def loss(x: Tensor, y: Tensor, a: Tensor) -> Tensor:
        return sinkhorn_divergence(x, y, epsilon=0.3, x_weights=a, backend=backend)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [z.clone().requires_grad_() for z in (x, y, a)]
        value = function(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), leaves)))
    for got, expected in zip(*results):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_opcheck(backend):
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(2, 6, 3, m=5))
    a, b = torch.full((2, 6), 1 / 6, device=x.device), torch.full((2, 5), 1 / 5, device=x.device)
    extra = [torch.rand(2, *s, device=x.device) for s in ((6, 5), (6, 6), (5, 5))]
    for debias, extras, needs in (
        (True, [], [True] * 4 + [False]),
        (True, extra, [False] * 4 + [True]),
        (False, [], [False] * 4 + [True]),
        (False, extra[:1], [True] * 5),
    ):
        arguments = (x, y, a, b, extras, "sqeuclidean", 0.2, math.inf, 10, -1.0, debias, needs, backend)
        torch.library.opcheck(torch.ops.kdkernels.sinkhorn.default, arguments)


def test_module(backend):
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(2, 6, 3, m=5))
    module = SinkhornDivergenceLoss(epsilon=0.3, cost="euclidean", backend=backend)
    assert repr(module) == f"SinkhornDivergenceLoss(epsilon=0.3, cost='euclidean', backend='{backend}')"
    weights = some_weights(2, 6).to(x)
    expected = sinkhorn_divergence(x, y, epsilon=0.3, cost="euclidean", x_weights=weights, backend=backend)
    assert torch.equal(module(x, y, x_weights=weights), expected)


def test_autocast_changes_nothing(backend):
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(6, 3, m=5))
    for cost in COSTS:
        expected = sinkhorn_divergence(x, y, cost=cost, backend=backend)
        with torch.autocast(x.device.type, torch.bfloat16):
            assert torch.equal(sinkhorn_divergence(x, y, cost=cost, backend=backend), expected)


GOOD = {"x": torch.ones(4, 3), "y": torch.ones(5, 3)}
BAD = [
    ({"x": [1.0]}, TypeError, "x must be a tensor"),
    ({"x": torch.ones(3)}, ValueError, "x must have shape"),
    ({"y": torch.ones(5, 2)}, ValueError, "same batch dimensions and d"),
    ({"y": torch.ones(2, 5, 3)}, ValueError, "same batch dimensions and d"),
    ({"y": torch.ones(5, 3).double()}, TypeError, "y must have x's dtype"),
    ({"x": torch.ones(4, 3).int(), "y": torch.ones(5, 3).int()}, TypeError, "x must be float64"),
    ({"cost": "manhattan"}, ValueError, "cost must be one of sqeuclidean, euclidean, cosine"),
    ({"epsilon": 0}, ValueError, "epsilon must be finite and positive, got 0"),
    ({"epsilon": math.inf}, ValueError, "epsilon must be finite and positive"),
    ({"epsilon": "1"}, TypeError, "epsilon must be a number"),
    ({"reach": -1.0}, ValueError, "reach must be finite and positive"),
    ({"max_iter": 0}, ValueError, "max_iter must be at least 1"),
    ({"max_iter": 2.0}, TypeError, "max_iter must be an integer"),
    ({"tol": -1.0}, ValueError, "tol must be finite and at least 0"),
    ({"x_weights": torch.ones(3)}, ValueError, "x_weights must have the shape of the samples"),
    ({"y_weights": -torch.ones(5)}, ValueError, "y_weights must be finite and not negative"),
    ({"extra_cost": torch.ones(4, 5)}, TypeError, "extra_cost must be a tuple of three where debias=True"),
    ({"extra_cost": torch.ones(5, 4), "debias": False}, ValueError, "extra_cost must have shape"),
    (
        {"extra_cost": (torch.ones(4, 5), torch.ones(4, 5), torch.ones(5, 5))},
        ValueError,
        "extra_cost\\[1\\] must have shape",
    ),
    (
        {"y": torch.ones(4, 3), "labels": torch.zeros(4).long(), "extra_cost": torch.ones(4, 4)},
        ValueError,
        "extra_cost must be None where labels are given",
    ),
    ({"labels": torch.zeros(4).long()}, ValueError, "the same samples, got n 4 and m 5"),
    ({"backend": "nonesuch"}, ValueError, "backend must be None or one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        sinkhorn_divergence(**{**GOOD, **change})


def test_bad_input_of_apply_plan():
    for v, error, message in (
        ([1.0], TypeError, "v must be a tensor"),
        (torch.ones(4, 2), ValueError, "v must have shape"),
        (torch.ones(5, 2).double(), TypeError, "v must have x's dtype"),
    ):
        with pytest.raises(error, match=message):
            apply_plan(GOOD["x"], GOOD["y"], v)


@pytest.mark.skipif(importlib.util.find_spec("geomloss") is None, reason="geomloss is not installed")
@pytest.mark.parametrize(("p", "cost"), [(2, "sqeuclidean"), (1, "euclidean")])
@pytest.mark.parametrize("reach", [None, 0.7])
@pytest.mark.parametrize("debias", [True, False])
def test_geomloss(p, cost, reach, debias):
    from geomloss import SamplesLoss

    x, y = samples(2, 9, 4, m=7)
    blur = 0.4
    theirs = SamplesLoss(
        "sinkhorn", p=p, blur=blur, reach=reach, debias=debias, scaling=0.995, backend="tensorized"
    )
    factor = 2 if p == 2 else 1
    options = {"reach": None if reach is None else reach * factor ** (1 / p), "max_iter": 1000, "cost": cost}
    got = sinkhorn_divergence(x, y, epsilon=factor * blur**p, debias=debias, **options)
    assert torch.allclose(got, factor * theirs(x, y), rtol=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("ot") is None, reason="POT is not installed")
def test_pot():
    import ot

    x, y = samples(9, 4, m=7)
    a, b = torch.full((9,), 1 / 9, dtype=torch.float64), torch.full((7,), 1 / 7, dtype=torch.float64)
    theirs = ot.sinkhorn(
        a, b, costs_of(x, y, "sqeuclidean"), 0.1, method="sinkhorn_log", numItermax=5000, stopThr=1e-14
    )
    assert torch.allclose(sinkhorn_plan(x, y, epsilon=0.1, max_iter=2000), theirs, atol=1e-9)


def test_few_iterations_are_finite(backend):
    x, y = (z.to(device_of(backend), torch.float32) for z in samples(2, 9, 4, m=6))
    for max_iter in range(1, 10):
        for reach in (None, 0.5):
            leaf = x.clone().requires_grad_()
            options = {"epsilon": 0.01, "max_iter": max_iter, "reach": reach, "backend": backend}
            loss = sinkhorn_divergence(leaf, 1 + y, debias=False, **options)
            assert torch.isfinite(potentials(x, 1 + y, **options)[0]).all()
            assert not torch.isnan(loss).any()


def test_cuda_has_problems_that_fit_into_shared_memory(request):
    _ready("cuda", request)
    x, y = samples(1, 172, 3, m=170, dtype=torch.float32)  # the costs fit, their exponentials do not
    compare("cuda", {"x": x, "y": y, "epsilon": 0.3, "max_iter": 8})
    compare("cuda", {"x": x, "y": y, "epsilon": 0.3, "max_iter": 8, "cost": "euclidean", "debias": False})
    x, y = (z.to(device_of("cuda"), torch.float32) for z in samples(1, 260, 3, m=8))
    options = {"max_iter": 1, "epsilon": 0.3}
    with pytest.raises(ValueError, match=r"whose costs fit into .* n = 260 and m = 8"):
        sinkhorn_divergence(x, y, backend="cuda", **options)
    assert sinkhorn_divergence(x, y, debias=False, backend="cuda", **options).isfinite()
    assert sinkhorn_divergence(x, y, **options).isfinite()


def test_triton_has_no_float64(request):
    x, y = (z.to(device_of(_ready("triton", request))) for z in samples(1, 5, 3))
    with pytest.raises(TypeError, match="backend 'triton' takes float32, float16, bfloat16; x is float64"):
        sinkhorn_divergence(x, y, backend="triton")


@pytest.mark.parametrize(("n", "m", "problems"), [(300, 270, 1), (129, 513, 1), (40, 30, 7)])
def test_any_number_of_threads(n, m, problems):
    if kdkernels.available_backends("cpu")["cpu"] != "available":
        pytest.skip("backend cpu")
    x, y = samples(problems, n, 5, m=m, dtype=torch.float32)
    arguments = {"x": x, "y": y, "epsilon": 0.1, "max_iter": 30}
    function = partial(sinkhorn_divergence, backend="cpu")

    def run():
        loss, found = gradients(function, arguments, ("x", "y"), torch.float32, torch.ones(problems))
        return loss, *found

    assert_same_bits_whatever_the_threads(run)


def test_problems_larger_than_the_cache():
    """Where the kernel is made again in each pass: 2^20 elements are kept."""
    if kdkernels.available_backends("cpu")["cpu"] != "available":
        pytest.skip("backend cpu")
    x, y = samples(1, 1060, 3, m=1000)
    compare("cpu", {"x": x, "y": y, "epsilon": 0.3, "max_iter": 12})
    extra = torch.rand(1, 1060, 1000, dtype=torch.float64)
    options = {"epsilon": 0.3, "max_iter": 12, "cost": "euclidean", "debias": False}
    compare("cpu", {"x": x, "y": y, "extra_cost": extra, **options})
