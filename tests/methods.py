"""What the tests of kdkernels.methods share: small models, one of each method, and a method against its formula."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels.methods import METHODS, Method

CLASSES, BATCH = 5, 8


class ConvNet(nn.Module):
    """Two convolutions with batch norm, the mean over space by a function, a classifier."""

    def __init__(self, width: int, stride: int = 2, classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        )
        self.last = nn.Sequential(
            nn.Conv2d(4, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.fc = nn.Linear(width, classes)

    def maps(self, x: Tensor) -> Tensor:
        return self.last(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.maps(x).mean((2, 3)))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(108, width), nn.ReLU())
        self.fc = nn.Linear(width, CLASSES)

    def maps(self, x: Tensor) -> Tensor:
        return self.body(x)[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


# Student and teacher: maps of 3 × 3 and of 6 × 6.
PAIRS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "equal": lambda: (ConvNet(6), ConvNet(6)),
    "wider": lambda: (ConvNet(6), ConvNet(10)),
    "larger": lambda: (ConvNet(6), ConvNet(10, stride=1)),
    "smaller": lambda: (ConvNet(6, stride=1), ConvNet(6)),
    "mlp": lambda: (MLP(6), MLP(10)),
}


def pair(kind: str = "wider", seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """A student and a teacher that has seen data."""
    torch.manual_seed(seed)
    student, teacher = (model.to(dtype) for model in PAIRS[kind]())
    with torch.no_grad():
        for _ in range(3):
            teacher(2 * torch.randn(16, 3, 6, 6, dtype=dtype) + 0.3)
    for module in (student, teacher):
        nn.init.normal_(module.fc.weight, std=0.8)
        nn.init.normal_(module.fc.bias)
    return student, teacher


def batch(
    labelled: int = BATCH, dtype: torch.dtype = torch.float64, size: int = BATCH
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    images = 2 * torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64)
    return images.to(dtype), (torch.arange(size) * 3 % CLASSES)[:labelled]


def make(name: str, student: nn.Module, teacher: nn.Module, **options: Any) -> Method:
    """A method by name, ready to train."""
    torch.manual_seed(1)
    if name == "dgkd":
        other = copy.deepcopy(teacher)
        nn.init.normal_(other.fc.bias)
        return METHODS[name](student, [teacher, other], **options)
    if name == "rco":
        options = {"anchors": [copy.deepcopy(teacher.state_dict())], **options}
    method = METHODS[name](student, teacher, **options)
    if name == "maskd":
        dtype = next(student.parameters()).dtype
        method.prepare([batch(dtype=dtype)] * 2)
    return method.train()


def gradients(method: Method, loss: Tensor) -> dict[str, Tensor | None]:
    for p in method.parameters():
        p.grad = None
    loss.backward()
    return {name: p.grad for name, p in method.named_parameters()}


def learning(method: Method, loss: Tensor) -> set[str]:
    """The parameters that get a gradient which is not 0, by the first part of their name, and the second where it is a
    classifier's."""
    found = {name for name, grad in gradients(method, loss).items() if grad is not None and grad.any()}
    return {".".join(name.split(".")[:2]) if ".fc." in name else name.split(".")[0] for name in sorted(found)}


def check(
    method: Method, formula: Callable[[Any], dict[str, Tensor]], images: Tensor, labels: Tensor, **call: Any
) -> None:
    """Loss, terms, gradients and running statistics of a step against `formula`, which gets a copy of the method."""
    twin = copy.deepcopy(method)
    output = method(images, labels, **call)
    wanted = formula(twin)
    assert set(output.terms) == set(wanted)
    near = {"rtol": 1e-8, "atol": 1e-11}
    for name, term in wanted.items():
        torch.testing.assert_close(
            output.terms[name], term.detach(), **near, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert not output.terms[name].requires_grad
    loss = torch.stack([*wanted.values()]).sum()
    torch.testing.assert_close(output.loss, loss, **near)
    assert output.loss.dtype == torch.float64 and output.logits.shape == (len(images), CLASSES)
    got, true = gradients(method, output.loss), gradients(twin, loss)
    for name, grad in true.items():
        ours = got[name]
        if ours is None or grad is None:
            assert grad is None or not grad.any(), f"{name} has no gradient"
            assert ours is None or not ours.any(), f"{name} has a gradient"
        else:
            torch.testing.assert_close(ours, grad, **near, msg=lambda m, n=name: f"{n}: {m}")
    for (name, ours), theirs in zip(method.named_buffers(), twin.buffers()):
        torch.testing.assert_close(ours, theirs, msg=lambda m, n=name: f"{n}: {m}")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the first rows, which are those that have labels."""
    return F.cross_entropy(logits[: len(labels)], labels) if len(labels) else logits.sum() * 0


def kl(student: Tensor, teacher: Tensor, t: Any) -> Tensor:
    """T² KL of logits, a mean over rows."""
    p = (teacher / t).softmax(1)
    return t * t * (p * (p.log() - (student / t).log_softmax(1))).sum(1).mean()


@torch.no_grad()
def seen(model: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, features, maps) of a frozen model."""
    model.eval()
    maps = model.maps(images)
    return model.fc(maps.mean((2, 3))), maps.mean((2, 3)), maps


def at_one_size(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    size = min(x.shape[2], y.shape[2])
    return F.adaptive_avg_pool2d(x, size), F.adaptive_avg_pool2d(y, size)


def names(method: Method, parameters: Iterable[nn.Parameter]) -> set[str]:
    own = {id(p): name for name, p in method.named_parameters()}
    return {own[id(p)] for p in parameters}
