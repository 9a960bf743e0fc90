"""What distilling adds to a training step: its time beside a student's own step and the teacher's forward pass."""

from __future__ import annotations

import statistics

import pytest
import torch
import torch.nn.functional as F

from benchmarks import harness
from kdkernels.methods import METHODS
from kdkernels.train import models

BATCH, CLASSES = 128, 100


@pytest.mark.parametrize("method", ["kd", "dkd", "srrl", "simkd", "ijckd"])
def test_train_step(benchmark, method):
    """Batch 128 of 32×32 images, resnet32x4 teaches resnet8x4, SGD. All weights of the step are trained."""
    torch.manual_seed(0)
    device = harness.DEVICE
    student, teacher = (models.build(name, CLASSES).to(device) for name in ("resnet8x4", "resnet32x4"))
    images = torch.randn(BATCH, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (BATCH,), device=device)
    whole = METHODS[method](student, teacher).to(device).train()
    whole(images, labels)  # finds the maps
    optimizers = {
        name: torch.optim.SGD(parameters, 1e-4, momentum=0.9)
        for name, parameters in (("alone", student.parameters()), ("whole", whole.parameters_to_train()))
    }

    def alone() -> None:
        optimizers["alone"].zero_grad()
        F.cross_entropy(student(images), labels).backward()
        optimizers["alone"].step()

    @torch.no_grad()
    def forward() -> None:
        teacher(images)

    def distilled() -> None:
        optimizers["whole"].zero_grad()
        whole(images, labels).loss.backward()
        optimizers["whole"].step()

    jobs = {"student step": alone, "teacher forward": forward, "distillation step": distilled}
    times = benchmark.pedantic(
        harness.interleave,
        args=(jobs, device),
        kwargs={"seconds": 75.0, "least": 9, "warmups": 1},
        rounds=1,
        iterations=1,
    )
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    # Of each round, so that what slows a round slows all three.
    overheads = [d / (s + t) - 1 for s, t, d in zip(*(times[name] for name in jobs))]
    benchmark.extra_info.update(
        suite="train_step",
        method=method,
        batch=BATCH,
        rounds=len(overheads),
        median_ms=medians,
        overhead_percent=100 * statistics.median(overheads),
        quartiles_percent=[100 * q for q in statistics.quantiles(overheads, n=4)],
    )
