"""MasKD, MGD, KD²M and SRRL against their formulas, step by step in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from methods import (
    BATCH,
    ConvNet,
    at_one_size,
    batch,
    check,
    cross_entropy,
    kl,
    learning,
    make,
    pair,
    seen,
)
from torch import Tensor, nn

from kdkernels.methods import KD2M, METRICS, MGD, SRRL, MasKD

labelled = pytest.mark.parametrize("labelled", [BATCH, 3], ids=["all", "some"])
maps = pytest.mark.parametrize("kind", ["equal", "wider", "larger", "smaller"])


# MasKD


def masks_of(m: Any, x: Tensor) -> Tensor:
    return torch.sigmoid((m.tokens.tokens[None, :, :, None, None] * x[:, None]).sum(2))


def masked_loss(m: Any, x: Tensor, y: Tensor, masks: Tensor) -> Tensor:
    """With the (M, T, C, H, W) tensor that the op does without."""
    convolved = m.tokens.weigh[2](m.tokens.weigh[0](y).mean((2, 3), keepdim=True)).flatten(1)
    shares = convolved.softmax(1).detach()
    masks = masks.detach()[:, :, None]
    each = (masks * (x - y)[:, None]).square().sum((3, 4)) / (1e-6 + masks.sum((3, 4)))
    return (shares * each.mean(2)).sum(1).mean()


@labelled
@maps
def test_maskd(kind, labelled):
    images, labels = batch(labelled)
    method = make("maskd", *pair(kind), weight=0.7, hard_weight=0.4, tokens=3)

    def formula(m):
        f, (_, _, y) = m.student.maps(images), seen(m.teacher, images)
        x, y = at_one_size(m.align(f), y)
        hard = 0.4 * cross_entropy(m.student.fc(f.mean((2, 3))), labels)
        return {"hard": hard, "masked": 0.7 * masked_loss(m, x, y, masks_of(m, y))}

    check(method, formula, images, labels)
    learnt = {"student", "student.fc"} | (set() if kind in ("equal", "smaller") else {"align"})
    assert learning(method, method(images, labels).loss) == learnt


def test_maskd_masks_of_the_student():
    """After so many steps in training, and not before."""
    images, labels = batch()
    method = make("maskd", *pair(), student_masks_after=2)
    with torch.no_grad():
        method.tokens.tokens.normal_()  # masks that are not all ½
    method.eval()
    method(images, labels)
    method.train()
    for step in range(4):

        def formula(m, step=step):
            f, (_, _, y) = m.student.maps(images), seen(m.teacher, images)
            x = m.align(f)
            masks = masks_of(m, y) * (masks_of(m, x) if step >= 2 else 1)
            hard = cross_entropy(m.student.fc(f.mean((2, 3))), labels)
            return {"hard": hard, "masked": masked_loss(m, x, y, masks)}

        assert method.steps == step
        check(method, formula, images, labels)


@labelled
@pytest.mark.parametrize("tokens", [1, 3])
def test_maskd_stage_one(tokens, labelled):
    images, labels = batch(labelled)
    student, teacher = pair()
    torch.manual_seed(0)
    method = MasKD(student, teacher, tokens=tokens, diversity_weight=0.3).train()
    with torch.no_grad():
        method.tokens.tokens.normal_()

    def formula(m):
        _, _, y = seen(m.teacher, images)
        masks = masks_of(m, y)
        shares = m.tokens.weigh(y).softmax(1)
        logits = m.teacher.fc((y * (shares[:, :, None, None] * masks).sum(1)[:, None]).mean((2, 3)))
        pairs = []
        for a, b in itertools.permutations(range(tokens), 2):
            u, v = masks[:, a].flatten(1), masks[:, b].flatten(1)
            pairs.append((2 * (u * v).sum(1) / (u.square().sum(1) + v.square().sum(1) + 2e-12)).mean())
        likeness = torch.stack(pairs).mean() if pairs else masks.sum() * 0
        return {"hard": cross_entropy(logits, labels), "likeness": 0.3 * likeness}

    method.forward = method.mask_loss
    check(method, formula, images, labels)
    assert learning(method, method.mask_loss(images, labels).loss) == {"tokens"}


def test_maskd_prepare():
    images, labels = batch()
    student, teacher = pair()
    labels = seen(teacher, images)[0].argmax(1)
    method = MasKD(student, teacher, mask_steps=100, mask_learning_rate=1.0).train()
    with pytest.raises(RuntimeError, match=r"the masks are not learned yet: call prepare\(batches\) first"):
        method(images, labels)
    with pytest.raises(
        ValueError, match=r"batches must hold one batch of images and labels at least, got none"
    ):
        method.prepare([])
    assert not method.prepared
    was = {name: x.clone() for name, x in teacher.state_dict().items()}
    before = method.mask_loss(images, labels).terms
    taken = []

    def batches():
        for i in range(200):
            taken.append(i)
            yield images, labels

    method.prepare(batches())
    assert len(taken) == 100 and method.prepared
    after = method.mask_loss(images, labels).terms
    assert after["hard"] < 0.9 * before["hard"] and after["likeness"] < 0.6 * before["likeness"]
    assert all(torch.equal(x, was[name]) for name, x in teacher.state_dict().items())
    assert all(not p.requires_grad and p.grad is None for p in method.tokens.parameters())
    assert not {id(p) for p in method.tokens.parameters()} & {id(p) for p in method.parameters_to_train()}
    method.prepare([(images, labels)])  # may be had again
    assert method.prepared and not any(p.requires_grad for p in method.tokens.parameters())


def test_maskd_state():
    images, labels = batch()
    method = make("maskd", *pair(), student_masks_after=1)
    method(images, labels)
    method(images, labels)
    other = MasKD(*pair(seed=5), student_masks_after=1).train()
    other.load_state_dict(method.state_dict())
    assert other.prepared and other.steps == 2
    assert not any(p.requires_grad for p in other.tokens.parameters())
    assert torch.equal(other(images, labels).loss, method(images, labels).loss)


def test_maskd_map_module_of_several_uses():
    """One ReLU after both convolutions: the masks go on its last output only."""

    class Reused(ConvNet):
        def __init__(self):
            super().__init__(4)
            self.relu = nn.ReLU()
            self.stem[2], self.last[2] = nn.Identity(), nn.Identity()

        def maps(self, x):
            return self.relu(self.last(self.relu(self.stem(x))))

    images, labels = batch()
    torch.manual_seed(0)
    method = MasKD(ConvNet(4).double(), Reused().double())
    got = method.mask_loss(images, labels).terms["hard"]
    y, masks = seen(method.teacher, images)[2], None
    masks = masks_of(method, y)
    shares = method.tokens.weigh(y).softmax(1)
    logits = method.teacher.fc((y * (shares[:, :, None, None] * masks).sum(1)[:, None]).mean((2, 3)))
    assert method._teacher.map_name == "relu"
    torch.testing.assert_close(got, F.cross_entropy(logits, labels).detach())


def test_maskd_refuses():
    with pytest.raises(ValueError, match=r"tokens must be 1 or more, got 0"):
        MasKD(*pair(), tokens=0)
    with pytest.raises(ValueError, match=r"teacher must have maps \(M, C, H, W\) for masks, got one without"):
        MasKD(*pair("mlp")).prepare([batch()])


# MGD


@labelled
@pytest.mark.parametrize("mask", ["channels", "pixels"])
@maps
def test_mgd(kind, mask, labelled):
    """The sum over a map's elements, not their mean; nothing scaled up."""
    images, labels = batch(labelled)
    generator = torch.Generator().manual_seed(5)
    method = make("mgd", *pair(kind), mask=mask, drop=0.4, weight=3e-3, hard_weight=0.6, generator=generator)
    start = generator.get_state()

    def formula(m):
        f, (_, _, y) = m.student.maps(images), seen(m.teacher, images)
        x, y = at_one_size(m.align(f), y)
        shape = (BATCH, x.shape[1], 1, 1) if mask == "channels" else (BATCH, 1, *x.shape[2:])
        kept = torch.rand(shape, generator=torch.Generator().set_state(start)) >= 0.4
        first, _, second = m.generation
        made = second(first(x * kept).relu())
        of_maps = 3e-3 * (made - y).square().sum() / BATCH
        return {"hard": 0.6 * cross_entropy(m.student.fc(f.mean((2, 3))), labels), "generation": of_maps}

    check(method, formula, images, labels)
    learnt = {"student", "student.fc", "generation"} | (set() if kind in ("equal", "smaller") else {"align"})
    assert learning(method, method(images, labels).loss) == learnt


@pytest.mark.parametrize("mask", ["channels", "pixels"])
def test_mgd_drops_as_often_as_told(mask):
    images, labels = batch()
    method = make("mgd", *pair(), mask=mask, drop=0.3, weight=1.0, hard_weight=0.0)
    inputs = []
    method.generation[0].register_forward_hook(lambda _, x, out: inputs.append(x[0]))
    for _ in range(150):
        method(images, labels)
    x = torch.stack(inputs)  # (calls, M, C, H, W)
    assert not torch.equal(x[0] == 0, x[1] == 0)
    zero = (x == 0).all(4).all(3).flatten() if mask == "channels" else (x == 0).all(2).flatten()
    sigma = math.sqrt(0.3 * 0.7 / zero.numel())
    assert abs(zero.double().mean().item() - 0.3) < 5 * sigma
    kept = make("mgd", *pair(), mask=mask, drop=0.0)
    kept.generation[0].register_forward_hook(lambda _, x, out: inputs.append(x[0]))
    kept(images, labels)
    assert (inputs[-1] != 0).all()


def test_mgd_is_reproducible():
    images, labels = batch()
    losses = []
    for seed in (1, 1, 2):
        method = make("mgd", *pair(), generator=torch.Generator().manual_seed(seed), drop=0.5, weight=1.0)
        losses.append([method(images, labels).loss.item() for _ in range(3)])
    assert losses[0] == losses[1] != losses[2] and len(set(losses[0])) == 3


def test_mgd_refuses():
    with pytest.raises(ValueError, match=r"mask must be one of channels, pixels, got 'rows'"):
        MGD(*pair(), mask="rows")
    for drop in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"drop must be from 0 to below 1, got {drop}"):
            MGD(*pair(), drop=drop)


# KD²M


def moved(x: Tensor, y: Tensor, cost: Tensor | None = None) -> Tensor:
    """Exact transport of equal weights: the best of all assignments, by brute force up to 5 samples or scipy."""
    from scipy.optimize import linear_sum_assignment

    cost = (x[:, None] - y[None]).square().sum(2) if cost is None else cost
    i, j = linear_sum_assignment(cost.detach().numpy())
    return cost[i, j].mean()


def deviations(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), x.var(0, unbiased=False)


def gaussian_w2(x: Tensor, y: Tensor) -> Tensor:
    (a, v), (b, w) = deviations(x), deviations(y)
    # The root of a feature that does not vary has no derivative; the op's is 0.
    v, w = (torch.where(z > 0, z, 1).sqrt() * (z > 0) for z in (v, w))
    return (a - b).square().sum() + (v - w).square().sum()


def gaussian_kl(x: Tensor, y: Tensor, eps: float = 1e-6) -> Tensor:
    (a, v), (b, w) = deviations(x), deviations(y)
    v, w = v + eps, w + eps
    return 0.5 * (v / w + (a - b).square() / w - 1 + (w / v).log()).sum()


def bures(x: Tensor, y: Tensor) -> Tensor:
    """tr (C_x + C_y) − 2 tr (C_x^½ C_y C_x^½)^½; the last is the sum of the singular values of A Bᵀ, with C = AᵀA."""
    a, b = ((z - z.mean(0)) / len(z) ** 0.5 for z in (x, y))
    singular = torch.linalg.svdvals(a @ b.mT)
    cross = singular[singular > 1e-9].sum()
    return (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross


def coral(x: Tensor, y: Tensor) -> Tensor:
    return (torch.cov(x.mT) - torch.cov(y.mT)).square().sum() / (4 * x.shape[1] ** 2)


DIRECTIONS = F.normalize(torch.randn(7, 10, generator=torch.Generator().manual_seed(0)).double(), dim=1)


def sliced(x: Tensor, y: Tensor) -> Tensor:
    a, b = ((z @ DIRECTIONS.mT).sort(0).values for z in (x, y))
    return (a - b).square().mean()


def gromov(x: Tensor, y: Tensor) -> Tensor:
    import ot

    a, b = ((z[:, None] - z[None]).square().sum(2) for z in (x, y))
    n = torch.full((len(x),), 1 / len(x), dtype=torch.float64)
    plan = ot.gromov.gromov_wasserstein(
        *(z.detach().numpy() for z in (a, b, n, n)), loss_fun="square_loss", symmetric=True
    )
    plan = torch.from_numpy(plan)
    between = (a[:, None, :, None] - b[None, :, None, :]).square()
    return torch.einsum("ij,ijkl,kl->", plan, between, plan)


def pairs(x: Tensor, y: Tensor) -> Tensor:
    """Distances of all pairs, whose derivative at 0 is 0."""
    square = (x[:, None] - y[None]).square().sum(2)
    return torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)


def means(of: Any, x: Tensor, y: Tensor) -> Tensor:
    return of(x, x).mean() + of(y, y).mean() - 2 * of(x, y).mean()


def mmd_rbf(x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        bandwidth = (pairs(x, x).mean() + pairs(y, y).mean() + pairs(x, y).mean()) / 3
    return means(lambda a, b: (-pairs(a, b).square() / (2 * bandwidth**2)).exp(), x, y)


def energy(x: Tensor, y: Tensor) -> Tensor:
    return -means(pairs, x, y)


def sinkhorn(x: Tensor, y: Tensor, epsilon: float = 0.05, steps: int = 100) -> Tensor:
    """The op's own specification: tests/test_sinkhorn.py compares it with others."""
    from kdkernels import sinkhorn_divergence_reference

    return sinkhorn_divergence_reference(x, y, epsilon=epsilon, max_iter=steps)


def by_class(distance: Any, least: int = 1) -> Any:
    def total(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
        groups = [labels == c for c in labels.unique()]
        return sum(distance(x[g], y[g]) for g in groups if g.sum() >= least)

    return total


def distance(metric: str, x: Tensor, y: Tensor, labels: Tensor, z: Tensor, z_t: Tensor) -> Tensor:
    plain = {
        "w2": moved,
        "gaussian-w2": gaussian_w2,
        "bures": bures,
        "gaussian-kl": gaussian_kl,
        "mmd-linear": lambda a, b: (a.mean(0) - b.mean(0)).square().sum(),
        "mmd-rbf": mmd_rbf,
        "energy": energy,
        "sinkhorn": sinkhorn,
        "sliced": sliced,
        "gromov": gromov,
        "coral": coral,
    }
    if metric in plain:
        return plain[metric](x, y)
    if metric == "joint-w2":
        cost = (x[:, None] - y[None]).square().sum(2)
        return moved(x, y, cost / cost.max().detach() + (z[:, None] - z_t[None]).square().sum(2))
    each = {
        "conditional-w2": by_class(moved),
        "conditional-gaussian-w2": by_class(gaussian_w2),
        "conditional-gaussian-kl": by_class(gaussian_kl, 2),
    }
    return each[metric](x, y, labels)


@labelled
@pytest.mark.parametrize("kind", ["equal", "wider", "mlp"])
@pytest.mark.parametrize("metric", METRICS)
def test_kd2m(metric, kind, labelled):
    rows = 24  # more than features, so that covariances have an inverse
    images, labels = batch(labelled if labelled < BATCH else rows, size=rows)
    options: dict[str, Any] = {}
    if metric == "sliced":
        options = {"projections": DIRECTIONS if kind != "equal" else DIRECTIONS[:, :6]}
    method = make("kd2m", *pair(kind), metric=metric, weight=0.02, hard_weight=0.5, metric_options=options)
    projected = kind != "equal" and metric != "gromov"
    assert isinstance(method.projector, nn.Linear) == projected

    def formula(m):
        maps, (z_t, y, _) = m.student.maps(images), seen(m.teacher, images)
        x = maps.mean((2, 3))
        z = m.student.fc(x)
        guessed = torch.cat([labels, z_t[len(labels) :].argmax(1)])
        if metric == "sliced" and kind == "equal":
            a, b = ((v @ DIRECTIONS[:, :6].mT).sort(0).values for v in (x, y))
            d = (a - b).square().mean()
        else:
            d = distance(metric, m.projector(x), y, guessed, z, z_t)
        return {"hard": 0.5 * cross_entropy(z, labels), "distance": 0.02 * d}

    check(method, formula, images, labels)
    learnt = {"student", "student.fc"} | ({"projector"} if projected else set())
    assert learning(method, method(images, labels).loss) == learnt


def test_kd2m_options():
    images, labels = batch()
    student, teacher = pair("equal")

    def loss(**options):
        method = make("kd2m", student, teacher, weight=1.0, hard_weight=0.0, **options).eval()
        return method(images, labels).loss

    x, y = student.eval().maps(images).mean((2, 3)), seen(teacher, images)[1]
    torch.testing.assert_close(
        loss(metric="w2", metric_options={"p": 1}), moved(x, y, (x[:, None] - y[None]).norm(dim=2))
    )
    z, z_t = student(images), teacher(images)
    cost = (x[:, None] - y[None]).square().sum(2) + 0.3 * (z[:, None] - z_t[None]).square().sum(2)
    got = loss(metric="joint-w2", metric_options={"normalize": False, "label_weight": 0.3})
    torch.testing.assert_close(got, moved(x, y, cost))
    torch.testing.assert_close(
        loss(metric="gaussian-kl", metric_options={"eps": 0.1}), gaussian_kl(x, y, 0.1)
    )
    own = nn.Linear(6, 6).double()
    method = KD2M(student, teacher, projector=own)
    assert method.projector is own and set(own.parameters()) <= set(method.parameters_to_train())


def test_kd2m_gathers_every_process():
    """Two halves of a batch, each process with the other's features at hand, know the whole's distance."""
    images, labels = batch()
    method = make("kd2m", *pair(), metric="conditional-w2", weight=1.0, hard_weight=0.0).eval()
    whole = method(images, labels).loss
    gathered: list[Tensor] = []
    method.gather = lambda x: gathered.append(x) or x
    method(images[:4], labels[:4])
    method(images[4:], labels[4:])
    first, second = gathered[:5], iter(gathered[5:])
    others = iter(first)
    method.gather = lambda x: torch.cat([next(others), next(second)])
    torch.testing.assert_close(method(images[:4], labels[:4]).loss, whole)


def test_kd2m_refuses():
    with pytest.raises(ValueError, match=r"metric must be one of w2, .*, got 'w3'"):
        KD2M(*pair(), metric="w3")


# SRRL


@labelled
@pytest.mark.parametrize("kind", ["wider", "larger", "equal", "mlp"])
@pytest.mark.parametrize("variant", ["official", "simkd", "ctkd", "cls_kd"])
def test_srrl(variant, kind, labelled):
    images, labels = batch(labelled)
    method = make("srrl", *pair(kind), variant=variant, feature_weight=0.9)
    hard, soft, regression = {
        "official": (1.0, 0.0, 1.0),
        "simkd": (1.0, 1.0, 1.0),
        "ctkd": (0.1, 0.9, 1.0),
        "cls_kd": (1.0, 0.0, 5.0),
    }[variant]

    def formula(m):
        f, (z_t, y, _) = m.student.maps(images), seen(m.teacher, images)
        z = m.student.fc(f.mean((2, 3)))
        pooled = f.mean((2, 3), keepdim=True)
        v = m.connector(pooled if variant in ("simkd", "ctkd") else f).mean((2, 3))
        head = m.teacher.fc
        terms = {
            "hard": hard * cross_entropy(z, labels),
            "feature": 0.9 * F.mse_loss(v, y),
            "regression": regression * F.mse_loss(F.linear(v, head.weight, head.bias), z_t),
        }
        return terms | ({"soft": soft * kl(z, z_t, 4.0)} if soft else {})

    check(method, formula, images, labels)
    assert learning(method, method(images, labels).loss) == {"student", "student.fc", "connector"}


def test_srrl_pools_before_or_behind_the_connector():
    images, labels = batch()
    losses = []
    for variant in ("official", "simkd"):
        student, teacher = pair()
        method = make("srrl", student, teacher, variant=variant, soft_weight=0.0).eval()
        losses.append(method(images, labels).terms["feature"])
    assert abs(losses[0] - losses[1]) > 1e-3


def test_srrl_weights_replace_the_variants():
    method = SRRL(*pair(), variant="ctkd", hard_weight=0.0, soft_weight=2.0, regression_weight=3.0)
    assert (method.hard_weight, method.soft_weight, method.regression_weight) == (0.0, 2.0, 3.0)
    assert SRRL(*pair(), variant="cls_kd").regression_weight == 5.0


def test_srrl_connector_starts_as_released():
    torch.manual_seed(0)
    weight = SRRL(ConvNet(200), ConvNet(300)).connector[0].weight
    assert weight.shape == (300, 200, 1, 1)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 300), rel=0.02)


def test_srrl_refuses():
    with pytest.raises(ValueError, match=r"variant must be one of official, simkd, ctkd, cls_kd, got 'mine'"):
        SRRL(*pair(), variant="mine")
    with pytest.raises(
        ValueError, match=r"connector must be an nn.Module or one of bottleneck, conv, linear"
    ):
        SRRL(*pair(), connector="mine")
