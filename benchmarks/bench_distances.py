"""Distances of two batches of features, beside what people write today: eager PyTorch, `torch.compile` of it, POT and
geomloss.

Forward + backward for x. The formulas are the textbooks'; KD²M's code has the same for the Gaussians, exact transport
and the classes' loop. "cpu" is the native kernel; where there is none, our form in plain PyTorch goes by "reference".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import kdkernels
from benchmarks import harness, peers
from benchmarks.harness import Loss

OT, NO_POT = peers.library("ot")
GEOMLOSS, NO_GEOMLOSS = peers.library("geomloss")
EPS = 1e-6
EPSILON = 0.05  # of a cost whose mean is about 1.5: features of length about 1


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), x.var(0, correction=0)


def wasserstein_of_gaussians(x: Tensor, y: Tensor) -> Tensor:
    (mean_x, v_x), (mean_y, v_y) = moments(x), moments(y)
    # What keeps the root's gradient finite where a class has one sample.
    return (mean_x - mean_y).square().sum() + ((v_x + 1e-12).sqrt() - (v_y + 1e-12).sqrt()).square().sum()


def kl_of_gaussians(x: Tensor, y: Tensor) -> Tensor:
    (mean_x, v_x), (mean_y, v_y) = moments(x), moments(y)
    v_x, v_y = v_x + EPS, v_y + EPS
    return 0.5 * (v_x / v_y - 1 - torch.log(v_x / v_y) + (mean_x - mean_y).square() / v_y).sum()


def each_class(distance: Loss, least: int, x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    total = x.sum() * 0
    for label in labels.unique():
        here = labels == label
        if here.sum() >= least:
            total = total + distance(x[here], y[here])
    return total


def bures(x: Tensor, y: Tensor) -> Tensor:
    """Through the singular values of the samples' products: what to write if one knows."""
    a, b = ((z - z.mean(0)) / len(z) ** 0.5 for z in (x, y))
    traces = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return (x.mean(0) - y.mean(0)).square().sum() + traces


def pot_bures(x: Tensor, y: Tensor) -> Tensor:
    c_x, c_y = torch.cov(x.T, correction=0), torch.cov(y.T, correction=0)
    return OT.gaussian.bures_wasserstein_distance(x.mean(0), y.mean(0), c_x, c_y).square()


def coral(x: Tensor, y: Tensor) -> Tensor:
    return (torch.cov(x.T) - torch.cov(y.T)).square().sum() / (4 * x.shape[1] ** 2)


def sliced(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    return ((x @ directions.T).sort(0).values - (y @ directions.T).sort(0).values).square().mean()


def pot_sliced(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    return OT.sliced_wasserstein_distance(x, y, projections=directions.T).square()


BANDWIDTHS = (4.0, 8.0, 16.0, 32.0, 64.0)


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """As people write it: a kernel for each bandwidth, of three matrices of distances."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = torch.cdist(a, b).square()
        return sum(torch.exp(-squared / (2 * s * s)) for s in BANDWIDTHS)  # type: ignore[return-value]

    return kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()


def mean_distance_mmd(x: Tensor, y: Tensor) -> Tensor:
    """KD²M's."""
    squared = [torch.cdist(a, b).square() for a, b in ((x, x), (y, y), (x, y))]
    sigma = torch.stack([d.detach().sqrt().mean() for d in squared]).mean()
    of_x, of_y, across = (torch.exp(-d / (2 * sigma * sigma)).mean() for d in squared)
    return of_x + of_y - 2 * across


def energy(x: Tensor, y: Tensor) -> Tensor:
    return 2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()


def geomloss_energy(x: Tensor, y: Tensor) -> Tensor:
    return 2 * GEOMLOSS.SamplesLoss("energy", backend="tensorized")(x, y)


def transport(x: Tensor, y: Tensor) -> Tensor:
    """KD²M, with scipy for its plan."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(x, y).square()
    rows, columns = linear_sum_assignment(cost.detach().cpu().numpy())
    return cost[rows, columns].mean()


def pot_transport(x: Tensor, y: Tensor) -> Tensor:
    cost = torch.cdist(x, y).square()
    weights = torch.full((len(x),), 1 / len(x), dtype=x.dtype)
    return OT.emd2(weights, weights, cost)


def entropic(x: Tensor, y: Tensor) -> Tensor:  # (..., n, d), (..., m, d)
    """Ten iterations in the log domain, with the gradient of a plan that is held."""
    costs = torch.cdist(x, y).square()
    n, m = costs.shape[-2:]
    with torch.no_grad():
        z = costs / -EPSILON
        f, g = z.new_zeros(*z.shape[:-1], 1), z.new_zeros(*z.shape[:-2], 1, m)
        for _ in range(10):
            f = math.log(m) - torch.logsumexp(z + g, -1, keepdim=True)
            g = math.log(n) - torch.logsumexp(z + f, -2, keepdim=True)
        plan = torch.exp(z + f + g) / (n * m)
        value = EPSILON * (f.mean((-2, -1)) + g.mean((-2, -1)))
    return (value + (plan * (costs - costs.detach())).sum((-2, -1))).sum()


def debiased(x: Tensor, y: Tensor) -> Tensor:
    return entropic(x, y) - entropic(x, x) / 2 - entropic(y, y) / 2


def pot_entropic(x: Tensor, y: Tensor) -> Tensor:
    from ot.batch import solve_sample_batch

    solved = solve_sample_batch(x, y, reg=EPSILON, max_iter=10, tol=0, reg_type="kl")
    return solved.value.sum()


def geomloss_sinkhorn(debias: bool, x: Tensor, y: Tensor) -> Tensor:
    """As it comes, but for the cost, whose half it takes."""
    blur = (EPSILON / 2) ** 0.5
    loss = GEOMLOSS.SamplesLoss("sinkhorn", p=2, blur=blur, debias=debias, backend="tensorized")
    return 2 * loss(x, y).sum()


def sinkhorn(x: Tensor, y: Tensor, *, debias: bool = True, max_iter: int = 25) -> Tensor:
    """Of 64 problems of 128×128, the marginals of one lack at most 3e-4 of the mass after 25 iterations; eager's and
    POT's lack 7e-4, geomloss's 8e-2, which 6 of ours fall below."""
    loss = kdkernels.sinkhorn_divergence
    return loss(x, y, epsilon=EPSILON, max_iter=max_iter, debias=debias).sum()


AS_GEOMLOSS = 6  # iterations


def lacking(x: Tensor, y: Tensor, f: Tensor, g: Tensor) -> float:
    """How much of the mass the marginals of these potentials' plans lack, in the worst of the problems."""
    n, m = x.shape[-2], y.shape[-2]
    costs = torch.cdist(x.double(), y.double()).square()
    plans = torch.exp((f.double()[..., :, None] + g.double()[..., None, :] - costs) / EPSILON) / (n * m)
    each = [
        (plans.sum(-1) - 1 / n).abs().sum(-1),
        (plans.sum(-2) - 1 / m).abs().sum(-1),
    ]
    return torch.stack(each).max().item()


def no_worse_than_geomloss(x: Tensor, y: Tensor) -> bool:
    ours = kdkernels.potentials(x, y, epsilon=EPSILON, max_iter=AS_GEOMLOSS)
    options = {"p": 2, "blur": (EPSILON / 2) ** 0.5, "debias": False, "potentials": True}
    f, g = GEOMLOSS.SamplesLoss("sinkhorn", backend="tensorized", **options)(x, y)
    return lacking(x, y, *ours) <= lacking(x, y, 2 * f, 2 * g)


def masked(student: Tensor, teacher: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
    difference = masks[:, :, None] * (student - teacher)[:, None]
    each = difference.square().sum((-2, -1)) / (masks.sum((-2, -1)) + EPS)[..., None]
    return (each.mean(-1) * weights).sum(1).mean()


def pairs(n: int, d: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, d, generator=generator) for _ in range(2))
    return [x, 0.7 * y + 0.1]


def labelled(n: int, d: int, classes: int = 100) -> list[Tensor]:
    labels = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(1))
    return [*pairs(n, d), labels]


def projected(n: int, d: int, projections: int = 128) -> list[Tensor]:
    directions = torch.randn(projections, d, generator=torch.Generator().manual_seed(1))
    return [*pairs(n, d), torch.nn.functional.normalize(directions, dim=-1)]


def problems(*batch_n_d: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*batch_n_d, generator=generator) / batch_n_d[-1] ** 0.5 for _ in range(2))
    return [x, 0.7 * y + 0.1 / batch_n_d[-1] ** 0.5]


def maps(n: int, c: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(n, c, 32, 32, generator=generator) for _ in range(2))
    masks = torch.sigmoid(torch.randn(n, 6, 32, 32, generator=generator))
    return [student, teacher, masks, torch.softmax(torch.randn(n, 6, generator=generator), -1)]


class Case(NamedTuple):
    eager: Loss
    ours: Loss
    shapes: tuple[tuple[int, ...], ...]
    pot: Loss | None = None
    geomloss: Loss | None = None
    native: bool = False
    compiles: bool = True
    inputs: Callable[..., list[Tensor]] = pairs
    equal_error: Callable[..., bool] | None = (
        None  # what shows that ours is as exact as geomloss, which this needs
    )
    near: bool = True  # to the textbook's formula in float64; a sort or an iteration may end elsewhere
    least: int = 7  # rounds


CASES: Mapping[str, Case] = {
    "gaussian_wasserstein": Case(
        wasserstein_of_gaussians, kdkernels.gaussian_wasserstein, ((128, 512), (2048, 128)), native=True
    ),
    "gaussian_wasserstein of 100 classes": Case(
        partial(each_class, wasserstein_of_gaussians, 1),
        lambda x, y, labels: kdkernels.gaussian_wasserstein(x, y, labels=labels),
        ((128, 512), (1024, 512)),
        native=True,
        compiles=False,
        inputs=labelled,
    ),
    "gaussian_wasserstein, full": Case(
        bures, partial(kdkernels.gaussian_wasserstein, covariance="full"), ((128, 512),), pot=pot_bures
    ),
    "gaussian_kl": Case(kl_of_gaussians, kdkernels.gaussian_kl, ((128, 512), (2048, 128)), native=True),
    "gaussian_kl of 100 classes": Case(
        partial(each_class, kl_of_gaussians, 2),
        lambda x, y, labels: kdkernels.gaussian_kl(x, y, labels=labels),
        ((128, 512),),
        native=True,
        compiles=False,
        inputs=labelled,
    ),
    "mmd, 5 bandwidths": Case(
        mmd,
        partial(kdkernels.mmd, bandwidths=BANDWIDTHS),
        ((128, 512), (1024, 256)),
        native=True,
    ),
    "mmd, mean distance": Case(mean_distance_mmd, kdkernels.mmd, ((128, 512),), native=True),
    "mmd of 100 classes": Case(
        partial(each_class, mean_distance_mmd, 1),
        lambda x, y, labels: kdkernels.mmd(x, y, labels=labels),
        ((1024, 512),),
        native=True,
        compiles=False,
        inputs=labelled,
    ),
    "energy_distance": Case(
        energy,
        kdkernels.energy_distance,
        ((128, 512), (1024, 256)),
        geomloss=geomloss_energy,
        native=True,
    ),
    "coral": Case(coral, kdkernels.coral, ((128, 512), (2048, 128)), native=True),
    "sliced_wasserstein": Case(
        sliced,
        lambda x, y, directions: kdkernels.sliced_wasserstein(x, y, projections=directions),
        ((128, 512), (2048, 128)),
        pot=pot_sliced,
        native=True,
        near=False,
        inputs=projected,
    ),
    "wasserstein": Case(
        transport, kdkernels.wasserstein, ((128, 512), (512, 128)), pot=pot_transport, compiles=False
    ),
    "sinkhorn_divergence": Case(
        debiased,
        sinkhorn,
        ((64, 128, 128),),
        geomloss=partial(geomloss_sinkhorn, True),
        native=True,
        inputs=problems,
        near=False,
    ),
    "sinkhorn_divergence, as exact as geomloss": Case(
        debiased,
        partial(sinkhorn, max_iter=AS_GEOMLOSS),
        ((64, 128, 128),),
        geomloss=partial(geomloss_sinkhorn, True),
        native=True,
        inputs=problems,
        equal_error=no_worse_than_geomloss,
        near=False,
    ),
    "sinkhorn_divergence of a large batch": Case(
        debiased,
        sinkhorn,
        ((4096, 64),),
        geomloss=partial(geomloss_sinkhorn, True),
        native=True,
        compiles=False,
        inputs=problems,
        near=False,
        least=2,
    ),
    "sinkhorn_divergence, debias=False": Case(
        entropic,
        partial(sinkhorn, debias=False),
        ((64, 128, 128),),
        pot=pot_entropic,
        geomloss=partial(geomloss_sinkhorn, False),
        native=True,
        inputs=problems,
        near=False,
    ),
    "masked_feature_loss": Case(masked, kdkernels.masked_feature_loss, ((8, 256),), native=True, inputs=maps),
}
CELLS = [(name, shape) for name, case in CASES.items() for shape in case.shapes]


@pytest.mark.parametrize(
    ("name", "shape"), CELLS, ids=[f"{name}-{'x'.join(map(str, shape))}" for name, shape in CELLS]
)
def test_distances(benchmark, name, shape):
    case = CASES[name]
    inputs = [x.to(harness.DEVICE) for x in case.inputs(*shape)]
    torch._dynamo.reset()
    losses = {"eager": case.eager}
    if case.compiles:
        losses["compile"] = torch.compile(case.eager, dynamic=False)
    if case.pot is not None and OT is not None:
        losses["POT"] = case.pot
    if case.geomloss is not None and GEOMLOSS is not None:
        losses["geomloss"] = case.geomloss
    if case.equal_error is not None:
        if GEOMLOSS is None:
            pytest.skip(NO_GEOMLOSS)
        assert case.equal_error(*inputs)
    mine = "cpu" if case.native and harness.DEVICE == "cpu" else "reference"
    losses[mine] = case.ours
    # One loss: ours is near the textbook's formula in float64.
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    truth = harness.evaluate(case.eager, exact, 1)
    for provider, loss in losses.items():
        harness.check(
            harness.evaluate(loss, inputs, 1), truth, inputs[0].dtype, provider if case.near else "eager"
        )
    times = benchmark.pedantic(
        harness.measure,
        args=(losses, inputs),
        kwargs={
            "leaves": 1,
            "others": {},
            "seconds": 3.0,
            "least": case.least,
            "warmups": min(case.least, 3),
        },
        rounds=1,
        iterations=1,
    )
    moved = sum(x.nbytes for x in inputs) + inputs[0].nbytes
    benchmark.extra_info.update(
        suite="distances",
        loss=name,
        cell=f"{name}: {'×'.join(map(str, shape))} float32 forward+backward",
        shape=list(shape),
        dtype="float32",
        what="forward+backward",
        providers=harness.summary(times, moved),
        absent={name: why for name, why in (("POT", NO_POT), ("geomloss", NO_GEOMLOSS)) if why},
    )
