"""anchor_penalty: the sum, mixed parameters, gradients, the module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kdkernels import AnchorPenaltyLoss, anchor_penalty, anchor_penalty_reference

BACKENDS = pytest.mark.parametrize("backend", [None, "reference"])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def moved(parameters, step=0.5):
    generator = torch.Generator().manual_seed(1)
    return [p.detach() + step * torch.randn(p.shape, generator=generator).to(p.dtype) for p in parameters]


@BACKENDS
@pytest.mark.parametrize("min_dim", [0, 1, 2, 4, 5])
def test_sum_and_gradient(backend, min_dim):
    parameters = list(network().parameters())
    anchors = moved(parameters)
    loss = anchor_penalty(iter(parameters), iter(anchors), min_dim=min_dim, backend=backend)
    taken = [p.dim() >= min_dim for p in parameters]
    expected = sum((p - a).double().square().sum().item() for p, a, t in zip(parameters, anchors, taken) if t)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)
    if not any(taken):
        assert loss == 0
        return
    assert loss > 0
    (3 * loss).backward()
    for p, a, t in zip(parameters, anchors, taken):
        if t:
            torch.testing.assert_close(p.grad, 6 * (p - a).detach())
        else:
            assert p.grad is None


@BACKENDS
def test_mixed_dtypes(backend):
    """Differences and sums in float32 (float64), gradients in each one's dtype."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float64]
    shapes = [(3, 4), (5,), (2, 2, 2), (), (0, 3)]
    parameters = [torch.randn(s, generator=generator).to(t).requires_grad_() for s, t in zip(shapes, dtypes)]
    anchors = [torch.randn(s, generator=generator) for s in shapes]  # all float32
    anchors[0].requires_grad_()
    loss = anchor_penalty(parameters[:4], anchors[:4], backend=backend)
    assert loss.dtype == torch.float32
    loss = anchor_penalty(parameters, anchors, backend=backend)
    exact = [(p.detach().double(), a.detach().double()) for p, a in zip(parameters, anchors)]
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(sum((p - a).square().sum().item() for p, a in exact), rel=1e-6)
    got = torch.autograd.grad(loss, [*parameters, anchors[0]])
    for g, p, (theta, anchor) in zip(got, parameters, exact):
        assert g.dtype == p.dtype
        torch.testing.assert_close(
            g, (2 * (theta - anchor)).to(p.dtype), rtol=2 * torch.finfo(p.dtype).eps, atol=1e-6
        )
    torch.testing.assert_close(got[-1], -2 * (exact[0][0] - exact[0][1]).float())


@BACKENDS
def test_gradcheck(backend):
    parameters = [torch.randn(2, 3).double().requires_grad_(), torch.randn(4).double().requires_grad_()]
    anchors = [torch.randn(2, 3).double().requires_grad_(), torch.randn(4).double()]

    def call(a, b, c):
        return anchor_penalty([a, b], [c, anchors[1]], backend=backend)

    assert torch.autograd.gradcheck(call, (*parameters, anchors[0]))
    assert torch.autograd.gradgradcheck(call, (*parameters, anchors[0]))


@BACKENDS
def test_at_the_anchor(backend):
    parameters = [p.bfloat16() for p in network().parameters()]
    leaves = [p.detach().requires_grad_() for p in parameters]
    loss = anchor_penalty(leaves, parameters, backend=backend)
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, leaves))


def test_near_the_anchor_in_bfloat16():
    """One step of bfloat16 from 1 is 2^-7, and its square is not lost in a sum of thousands."""
    theta = torch.full((4096, 8), 1 + 2.0**-7, dtype=torch.bfloat16)
    assert anchor_penalty([theta], [torch.ones_like(theta)]).item() == pytest.approx(
        4096 * 8 * 2.0**-14, rel=1e-5
    )


def test_parameters_that_change_in_place_are_noticed():
    parameter = torch.randn(3, 3, requires_grad=True)
    loss = anchor_penalty([parameter], [torch.zeros(3, 3)])
    with torch.no_grad():
        parameter.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_module_keeps_the_anchors():
    model = network()
    penalty = AnchorPenaltyLoss(model.parameters(), min_dim=2)
    assert penalty(model.parameters()) == 0
    start = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.ones(2, 3, 3, 3)).square().sum() + penalty(model.parameters())).backward()
        optimizer.step()
    expected = anchor_penalty_reference(model.parameters(), start.parameters(), min_dim=2)
    torch.testing.assert_close(penalty(model.parameters()), expected)
    assert not list(penalty.parameters()) and len(penalty.state_dict()) == len(list(model.parameters()))
    assert "8 anchors, min_dim=2" in repr(penalty) or "anchors, min_dim=2" in repr(penalty)


def test_compile():
    parameters = [p.detach().requires_grad_() for p in network().parameters()]
    anchors = moved(parameters)
    torch._dynamo.reset()
    compiled = torch.compile(lambda p, a: anchor_penalty(p, a, min_dim=2), fullgraph=True)
    loss = compiled(parameters, anchors)
    torch.testing.assert_close(loss, anchor_penalty(parameters, anchors, min_dim=2))
    wanted = [p for p in parameters if p.dim() >= 2]
    expected = torch.autograd.grad(anchor_penalty(parameters, anchors, min_dim=2), wanted)
    for a, b in zip(torch.autograd.grad(loss, wanted), expected):
        torch.testing.assert_close(a, b)


def test_bad_input():
    theta = torch.zeros(2, 3)
    for wrong, error, message in (
        ((theta, [theta]), TypeError, "parameters must be several tensors"),
        (([theta], theta), TypeError, "anchors must be several tensors"),
        (([theta], [1.0]), TypeError, r"anchors must be floating tensors, got 1\.0"),
        (([theta.long()], [theta]), TypeError, "parameters must be floating tensors"),
        (([theta, theta], [theta]), ValueError, "an anchor for each of 2 parameters, got 1"),
        (([theta], [theta.T]), ValueError, r"anchor 0 must have its parameter's shape \(2, 3\) .*\(3, 2\)"),
        (([theta], [theta.to("meta")]), ValueError, "anchor 0 must have .* device cpu, got .* on meta"),
    ):
        with pytest.raises(error, match=message):
            anchor_penalty(*wrong)
    with pytest.raises(ValueError, match="has only the backend reference, got 'cpu'"):
        anchor_penalty([theta], [theta], backend="cpu")
    with pytest.raises(TypeError, match="min_dim must be an int"):
        anchor_penalty([theta], [theta], min_dim=1.5)
