"""The learnable temperature of CTKD: schedule, reversal, parametrisation, and the direction it learns in."""

from __future__ import annotations

import math

import pytest
import torch
from testing import logits

from kdkernels import LearnableTemperature, cosine_reversal, distillation_loss, gradient_reversal


def test_cosine_schedule():
    """λ_e = ½ (1 − cos(π e / E)) over E = 10 epochs: 0.024, 0.095, ... 1."""
    assert cosine_reversal(0) == 0 and cosine_reversal(5) == pytest.approx(0.5)
    values = [0.0245, 0.0955, 0.2061, 0.3455, 0.5, 0.6545, 0.7939, 0.9045, 0.9755, 1.0]
    assert [cosine_reversal(epoch) for epoch in range(1, 11)] == pytest.approx(values, abs=1e-4)
    assert cosine_reversal(10) == cosine_reversal(200) == cosine_reversal(7, epochs=5) == 1
    assert cosine_reversal(2.5, epochs=5) == pytest.approx(0.5)
    for bad in ((-1, 10), (1, 0), (1, -5)):
        with pytest.raises(ValueError, match="must be"):
            cosine_reversal(*bad)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_gradient_reversal(strength):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    y = gradient_reversal(x, strength)
    assert torch.equal(y, x) and y is not x
    [gradient] = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    torch.testing.assert_close(gradient, -strength * 3 * x**2)
    [second] = torch.autograd.grad(gradient.sum(), x)
    # Both times that the gradient passes it is turned.
    torch.testing.assert_close(second, strength**2 * 6 * x)
    assert torch.equal(*torch.autograd.grad(gradient_reversal(x).sum() + x.sum(), [x]), torch.zeros_like(x))


def test_learnable_temperature():
    temperature = LearnableTemperature()
    [theta] = temperature.parameters()
    assert theta == 1 and temperature().item() == pytest.approx(1 + 20 / (1 + math.exp(-1)))  # 15.62
    assert temperature().shape == ()
    sigmoid = 1 / (1 + math.exp(-1))
    for strength in (0.0, 0.4, 1.0):
        [gradient] = torch.autograd.grad(temperature(strength), theta)
        assert gradient.item() == pytest.approx(-strength * 20 * sigmoid * (1 - sigmoid), abs=1e-6)
    other = LearnableTemperature(start=2.0, span=0.0)
    assert other() == 2 and "start=2.0, span=0.0" in repr(other)
    for start, span in ((0.0, 1.0), (-1.0, 1.0), (math.inf, 1.0), (1.0, -1.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="start must be positive and span >= 0"):
            LearnableTemperature(start, span)


def test_temperature_ascends_while_the_student_descends():
    student, teacher = logits("plain", (6, 20), torch.float64)
    student.requires_grad_()
    temperature = LearnableTemperature(span=4.0).double()

    def loss(strength: float = 1.0) -> torch.Tensor:
        return distillation_loss(student, teacher, temperature=temperature(strength), hard_weight=0.0)

    first = loss()
    first.backward()
    with torch.no_grad():
        temperature.theta -= 1e-2 * temperature.theta.grad
    assert loss() > first  # a step down its gradient goes up the loss
    with torch.no_grad():
        temperature.theta += 1e-2 * temperature.theta.grad
        student -= 1e-2 * student.grad
    assert loss() < first
    temperature.theta.grad = None
    loss(0.0).backward()
    assert temperature.theta.grad == 0  # not yet in the first epoch
