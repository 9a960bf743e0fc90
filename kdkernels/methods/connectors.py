"""Connectors: small networks that take the student's last map to the teacher's width."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn


class Bottleneck(nn.Sequential):
    """SimKD's projector (arXiv 2203.14001): 1×1 → 3×3 → 1×1 convolutions, the inner ones `factor` times narrower than
    the teacher, each with batch norm and ReLU: (M, inputs, H, W) → (M, outputs, H, W), not negative."""

    def __init__(self, inputs: int, outputs: int, factor: int = 2) -> None:
        if factor < 1 or outputs // factor < 1:
            raise ValueError(f"factor must be from 1 to the teacher's width {outputs}, got {factor}")
        self.spec = {"inputs": inputs, "outputs": outputs, "factor": factor}
        inner = outputs // factor
        super().__init__(
            *_layer(inputs, inner, 1),
            *_layer(inner, inner, 3),
            *_layer(inner, outputs, 1),
        )


class Conv(nn.Sequential):
    """SRRL's connector: one 1×1 convolution with batch norm and ReLU, weights N(0, 2 / outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.spec = {"inputs": inputs, "outputs": outputs}
        convolution, *rest = _layer(inputs, outputs, 1)
        super().__init__(convolution, *rest)
        nn.init.normal_(convolution.get_parameter("weight"), 0.0, (2.0 / outputs) ** 0.5)


class Linear(nn.Module):
    """A linear map of the features, on maps a 1×1 convolution: with it the whole block can be one op
    (`shared_classifier_loss(projector_weight=…)`)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.spec = {"inputs": inputs, "outputs": outputs}
        self.map = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:  # (M, inputs, H, W) -> (M, outputs, H, W)
        return self.map(x.movedim(1, -1)).movedim(-1, 1)


CONNECTORS: dict[str, Callable[..., nn.Module]] = {"bottleneck": Bottleneck, "conv": Conv, "linear": Linear}


def make_connector(
    connector: str | nn.Module, inputs: int, outputs: int, factor: int = 2, like: Tensor | None = None
) -> nn.Module:
    """A connector by its name, on the device and of the dtype of `like`; or the module that was given, as it is."""
    if isinstance(connector, nn.Module):
        return connector
    if connector not in CONNECTORS:
        raise ValueError(
            f"connector must be an nn.Module or one of {', '.join(CONNECTORS)}, got {connector!r}"
        )
    more = {"factor": factor} if connector == "bottleneck" else {}
    module = CONNECTORS[connector](inputs, outputs, **more)
    return module if like is None else module.to(like)


def name_of(connector: nn.Module) -> str | None:
    """The name under which `make_connector` makes its like; None of a module of the user's own."""
    return next((name for name, kind in CONNECTORS.items() if type(connector) is kind), None)


def _layer(inputs: int, outputs: int, size: int) -> Sequence[nn.Module]:
    return (
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
