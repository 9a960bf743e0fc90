"""What the tests share: the tolerance rule, and each regime's data."""

from __future__ import annotations

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps


def assert_near(got: Tensor, truth: Tensor, reference: Tensor, magnitude: float, what: str) -> None:
    """`got` against the float64 `truth`, without a hand-tuned number.

    Allowed is twice the error of the `reference` in the same dtype, one rounding of the output, and 8 eps of
    `magnitude`: how large the values are that the op's arithmetic goes through (eps of float32, or of float64
    where that is the dtype).
    """
    assert got.shape == truth.shape and got.dtype == reference.dtype, f"{what}: {got.shape}, {got.dtype}"
    finite = torch.isfinite(truth)
    assert torch.equal(torch.isnan(got), torch.isnan(truth)), f"{what}: NaN elsewhere"
    assert torch.equal(got.double()[~finite], truth[~finite]) or torch.isnan(truth).any(), (
        f"{what}: {got} {truth}"
    )
    information = torch.finfo(got.dtype)
    own = information.eps if got.dtype == torch.float64 else EPS32
    got, truth, reference = got.double()[finite], truth[finite], reference.double()[finite]
    rounding = information.eps * truth.abs() + information.smallest_normal * information.eps
    allowed = 2 * (reference - truth).abs().nan_to_num(0, 0, 0) + rounding + 8 * own * magnitude
    worst = ((got - truth).abs() / allowed).max().item() if truth.numel() else 0.0
    assert worst <= 1, f"{what}: error {worst:.2f} of what is allowed"


def assert_not_vacuous(truth: Tensor, reference: Tensor, magnitude: float) -> None:
    """Zeros in place of `truth` would not pass `assert_near`."""
    try:
        assert_near(torch.zeros_like(reference), truth, reference, magnitude, "zeros")
    except AssertionError:
        return
    raise AssertionError("these data would let a result of zero pass")


REGIMES = ("plain", "warm", "near", "far", "ties", "uniform")


def logits(regime: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(student, teacher) of one regime; "warm" is plain data meant for a temperature of 4."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    teacher = 3 * normal()
    if regime == "near":
        # Held in the dtype first, so that the noise is the difference that the op really sees.
        student = teacher.to(dtype).double() * (1 + 1e-3 * normal())
    elif regime == "far":
        teacher, student = 1e3 * normal(), 1e3 * normal()
    elif regime == "ties":
        teacher = teacher.round()
        student = teacher.flip(-1)
    elif regime == "uniform":
        teacher, student = torch.zeros(shape, dtype=torch.float64), 3 * normal()
    else:
        student = 3 * normal()
    return student.to(dtype), teacher.to(dtype)
