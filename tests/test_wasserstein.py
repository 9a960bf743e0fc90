"""wasserstein, joint_wasserstein, gromov_wasserstein: closed forms, brute force, POT, gradients, missing libraries."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from distances import assert_equal_up_to_rounding, features, gradients

from kdkernels import (
    GromovWassersteinLoss,
    JointWassersteinLoss,
    gromov_wasserstein,
    joint_wasserstein,
    wasserstein,
)

pytest.importorskip("scipy")


def least_over_permutations(cost):
    n = len(cost)
    return min(sum(cost[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(n))) / n


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
def test_brute_force(p):
    for seed in range(5):
        x, y = features(6, 3, seed=seed)
        x = x + 3 * torch.randn(6, 3, generator=torch.Generator().manual_seed(seed))
        expected = least_over_permutations(torch.cdist(x, y).pow(p))
        assert wasserstein(x, y, p=p).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_closed_forms(p):
    x, _ = features(40, 5)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for z in (x, x.float(), x.bfloat16()):
        loss, *got = gradients(wasserstein, z, z[order], p=p)
        assert loss == 0 and all((g == 0).all() for g in got)
    shift = torch.tensor([1.0, 2, -2, 0, 4]).double()
    loss, of_x, of_y = gradients(wasserstein, x, (x + shift)[order], p=p)
    assert loss.item() == pytest.approx(5.0**p, rel=1e-12)
    torch.testing.assert_close(of_x, -(p * 5.0 ** (p - 2) * shift / 40).expand(40, 5))
    torch.testing.assert_close(of_y, -of_x)
    one, other = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    assert wasserstein(one, other, p=p) == 5.0**p


def test_one_dimension_is_sorting():
    x, y = features(4, 30, 1)
    expected = (x.sort(1).values - y.sort(1).values).square().mean((1, 2))
    torch.testing.assert_close(wasserstein(x, y), expected)


def test_near_convergence():
    """Costs are those of differences: float32 keeps its digits."""
    x = features(64, 32, dtype=torch.float32)[0]
    y = x + 1e-4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    got, truth = gradients(wasserstein, x, y), gradients(wasserstein, x.double(), y.double())
    assert_equal_up_to_rounding(got, truth)
    assert truth[0].item() == pytest.approx(32e-8, rel=0.2)


@pytest.mark.parametrize("p", [1, 2])
def test_agrees_with_pot(p):
    ot = pytest.importorskip("ot")
    x, y = features(12, 4, m=9)
    u, v = torch.rand(12, dtype=torch.float64), torch.rand(9, dtype=torch.float64)

    def pot(x, y):
        return ot.emd2(u / u.sum(), v / v.sum(), torch.cdist(x, y).pow(p))

    got = gradients(wasserstein, x, y, p=p, x_weights=u, y_weights=v)
    assert_equal_up_to_rounding(got, gradients(pot, x, y))
    # A point from many: every cost, whatever the plan.
    loss = wasserstein(x, y[:1], p=p, x_weights=u)
    torch.testing.assert_close(loss, (u / u.sum() * (x - y[:1]).norm(dim=-1).pow(p)).sum())


def test_threads_change_nothing():
    x, y = features(9, 12, 3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gradients(wasserstein, x, y)
        torch.set_num_threads(4)
        four = gradients(wasserstein, x, y)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, four))


@pytest.mark.parametrize(("name", "package"), [("scipy.optimize", "scipy"), ("ot", "POT")])
def test_missing_libraries_say_what_to_install(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, name, None)
    x, y = features(4, 3)
    message = rf"needs {package}, which is not installed: pip install 'kdkernels\[transport\]'"
    with pytest.raises(ImportError, match=message):
        wasserstein(x, y if package == "scipy" else y[:3])
    if package == "POT":
        with pytest.raises(ImportError, match=message):
            gromov_wasserstein(x, y)


def test_weights_have_no_gradient():
    x, y = features(4, 3)
    weights = torch.ones(4, requires_grad=True)
    for function in (wasserstein, gromov_wasserstein):
        with pytest.raises(ValueError, match=r"x_weights has no gradient here.*pass x_weights\.detach\(\)"):
            function(x, y, x_weights=weights)


def labels_of(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def label_costs(a, b, kind):
    if kind == "sqeuclidean":
        return torch.cdist(a, b).square()
    log_a, log_b = torch.log_softmax(a, -1), torch.log_softmax(b, -1)
    if kind == "kl":
        return (log_a.exp()[:, None] * (log_a[:, None] - log_b[None])).sum(-1)
    return -(log_b.exp()[None] * log_a[:, None]).sum(-1)


@pytest.mark.parametrize("kind", ["sqeuclidean", "kl", "cross_entropy"])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("normalize", [False, True])
def test_joint_brute_force(kind, p, normalize):
    x, y = features(5, 3)
    a, b = 2 * labels_of(5, 4), 2 * labels_of(5, 4, seed=8)
    of_features = torch.cdist(x, y).pow(p)
    if normalize:
        of_features = of_features / of_features.max()
    expected = least_over_permutations(of_features + 0.7 * label_costs(a, b, kind))
    options = {"label_weight": 0.7, "label_cost": kind, "p": p, "normalize": normalize}
    assert joint_wasserstein(x, y, a, b, **options).item() == pytest.approx(expected.item(), rel=1e-10)
    module = JointWassersteinLoss(**options)
    assert module(x, y, a, b).item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("kind", ["sqeuclidean", "kl", "cross_entropy"])
@pytest.mark.parametrize("m", [4, 3])
def test_joint_gradcheck(kind, m):
    """Through features and labels, of both sides."""
    if m != 4:
        pytest.importorskip("ot")
    x, y = features(2, 4, 3, m=m)
    inputs = [z.requires_grad_() for z in (x, y, labels_of(2, 4, 5), labels_of(2, m, 5, seed=8))]

    def call(x, y, a, b):
        return joint_wasserstein(x, y, a, b, label_cost=kind, label_weight=0.5)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    assert all(g.abs().max() > 1e-2 for g in torch.autograd.grad(call(*inputs).sum(), inputs))


def test_joint_limits():
    x, y = features(2, 6, 3)
    a, b = labels_of(2, 6, 4), labels_of(2, 6, 4, seed=8)
    torch.testing.assert_close(joint_wasserstein(x, y, a, b, label_weight=0.0), wasserstein(x, y))
    # The same classes in another order: labels alone decide who meets whom.
    hot = torch.eye(6).double()
    order = torch.tensor([3, 1, 0, 2, 5, 4])
    met = joint_wasserstein(x[0], y[0], hot, hot[order], label_weight=1e6)
    torch.testing.assert_close(met, (x[0][order] - y[0]).square().sum(-1).mean())
    # Equal sides are 0, with gradient 0; cross-entropy has the entropy left.
    for kind in ("sqeuclidean", "kl"):
        for dtype in (torch.float32, torch.bfloat16):
            z, c = x.to(dtype), a.to(dtype)
            loss, *got = gradients(joint_wasserstein, z, z, c, c, label_cost=kind)
            assert (loss == 0).all() and all(g.abs().max() < 1e-7 for g in got)
    entropy = torch.distributions.Categorical(logits=a).entropy().mean(1)
    sharp = joint_wasserstein(x, x, a, a, label_cost="cross_entropy", label_weight=1.0)
    assert (sharp <= entropy + 1e-12).all()


def test_joint_in_other_dtypes():
    x, y = features(2, 7, 4, dtype=torch.bfloat16)
    a, b = labels_of(2, 7, 3), labels_of(2, 7, 3, seed=8)
    loss, *got = gradients(joint_wasserstein, x, y, a.float(), b.bfloat16(), normalize=True)
    assert loss.dtype == torch.float32 and [g.dtype for g in got][2:] == [torch.float32, torch.bfloat16]
    truth = gradients(
        joint_wasserstein, *(z.double() for z in (x, y, a.float(), b.bfloat16())), normalize=True
    )
    assert_equal_up_to_rounding((loss, *got), truth)


def test_joint_bad_input():
    x, y = features(2, 5, 4)
    a = labels_of(2, 5, 3)
    for wrong, error, message in (
        ((x, y, a.long(), a), TypeError, "x_labels must be a floating tensor"),
        ((x, y, a, a[0]), ValueError, r"y_labels must have shape \(2, 5, 'K'\), got \(5, 3\)"),
        ((x, y, a, a[:, :4]), ValueError, "y_labels must have shape"),
        ((x, y, a, a[..., :2]), ValueError, "the same K >= 1, got 3 and 2"),
        ((x, y, a, a.to("meta")), ValueError, "y_labels must be on x's device"),
    ):
        with pytest.raises(error, match=message):
            joint_wasserstein(*wrong)
    with pytest.raises(
        ValueError, match="label_cost must be one of sqeuclidean, kl, cross_entropy, got 'l1'"
    ):
        joint_wasserstein(x, y, a, a, label_cost="l1")
    with pytest.raises(ValueError, match="label_weight must be finite and at least 0"):
        joint_wasserstein(x, y, a, a, label_weight=-1)
    with pytest.raises(ValueError, match="has no backend 'cpu', only reference"):
        joint_wasserstein(x, y, a, a, backend="cpu")


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
def test_gromov_is_pot_with_its_gradient(metric):
    ot = pytest.importorskip("ot")
    x, y = features(2, 7, 4, m=6)
    y = y[..., :3]
    u, v = torch.rand(7, dtype=torch.float64) + 0.1, torch.rand(6, dtype=torch.float64) + 0.1

    def within(z):
        if metric == "cosine":
            z = torch.nn.functional.normalize(z, dim=-1)
            return 1 - z @ z.T
        squared = (z[:, None] - z[None]).square().sum(-1)
        off = ~torch.eye(len(z), dtype=torch.bool)
        return (
            squared if metric == "sqeuclidean" else torch.where(off, torch.where(off, squared, 1).sqrt(), 0)
        )

    def pot(x, y):
        sides = [within(x), within(y), u / u.sum(), v / v.sum()]
        plan = torch.from_numpy(
            ot.gromov.gromov_wasserstein(*(s.detach().numpy() for s in sides), loss_fun="square_loss")
        )
        cost = (sides[0][:, :, None, None] - sides[1][None, None]).square()  # (i, k, j, l)
        return torch.einsum("ikjl,ij,kl->", cost, plan, plan)

    loss, of_x, of_y = gradients(gromov_wasserstein, x, y, metric=metric, x_weights=u, y_weights=v)
    for i in range(2):
        assert_equal_up_to_rounding((loss[i], of_x[i], of_y[i]), gradients(pot, x[i], y[i]), scale=20)


def test_gromov_sees_no_isometry():
    pytest.importorskip("ot")
    x, _ = features(8, 3)
    rotation = torch.linalg.qr(features(3, 3)[0])[0]
    wider = torch.cat([x @ rotation + 5, torch.zeros(8, 2).double()], -1)
    assert gromov_wasserstein(x, wider).item() == pytest.approx(0, abs=1e-9)
    assert gromov_wasserstein(x, 2 * wider).item() > 1
    assert gromov_wasserstein(x, x).abs() < 1e-10
    half = gradients(gromov_wasserstein, x.bfloat16(), x.bfloat16(), metric="euclidean")
    assert all(torch.isfinite(z).all() for z in half) and half[0].dtype == torch.float32
    assert gromov_wasserstein(x[:0], wider[:0]) == 0
    assert gromov_wasserstein(x[None][:0], wider[None][:0]).shape == (0,)
    assert torch.equal(
        GromovWassersteinLoss(metric="cosine")(x, wider), gromov_wasserstein(x, wider, metric="cosine")
    )


def test_gromov_bad_input():
    x, y = features(2, 5, 4)
    with pytest.raises(ValueError, match="metric must be one of sqeuclidean, euclidean, cosine, got 'l1'"):
        gromov_wasserstein(x, y, metric="l1")
    with pytest.raises(ValueError, match="the same batch dimensions, got"):
        gromov_wasserstein(x, y[0])
    with pytest.raises(ValueError, match="has no backend 'triton'"):
        gromov_wasserstein(x, y, backend="triton")


def test_infinite_or_nan_features_are_refused_by_name():
    x, y = features(5, 4)
    x[1, 2] = math.nan
    with pytest.raises(ValueError):
        wasserstein(x, y)
