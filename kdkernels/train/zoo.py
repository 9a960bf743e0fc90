"""Networks by name: those of the distillation literature for 32×32 images, and the small ones of default runs.

    features:   (M, C, H, W) → (M, D, h, w) ≥ 0   its output is the last map, after its ReLU
    pool:       (M, D, h, w) → (M, D)             the mean over all positions
    classifier: (M, D) → (M, N)                   nn.Linear

Written from the papers. Where one leaves a choice for images this small (the stem, the strides, a bias), the
choice is the one whose number of parameters is the literature's, so that accuracies can be compared. Nothing
here works in place: a hook on any module sees what that module gave out.
"""

import difflib
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn


class NetworkError(Exception):
    """No such network, or not on this machine; the message is one line for the user."""


def build(name: str, classes: int = 100, channels: int = 3, image_size: int = 32) -> nn.Module:
    """An untrained network by its name in NAMES, or timm's by `timm:NAME`; its weights in channels_last.

    `image_size` matters to the MLPs alone: every other network takes images of any size from 8×8 on.
    """
    if name.startswith("timm:"):
        return _timm(name.removeprefix("timm:"), classes, channels)
    if name not in _MAKERS:
        close = difflib.get_close_matches(name, NAMES, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"takes {', '.join(NAMES)} or timm:NAME"
        raise NetworkError(f"unknown network {name!r}: {hint}")
    network = _MAKERS[name](classes, channels, image_size)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class GlobalAverage(nn.Module):
    """(M, C, H, W) → (M, C): plain `mean`, whose gradient is deterministic on CUDA too."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Network(nn.Module):
    """features, pool, classifier: the form of every network of the literature here."""

    def __init__(
        self, width: int, classes: int, stem: nn.Module, *stages: nn.Module, tail: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("stem", stem)
        for number, stage in enumerate(stages, 1):
            self.features.add_module(f"stage{number}", stage)
        if tail is not None:
            self.features.add_module("tail", tail)
        self.pool = GlobalAverage()
        self.classifier = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)))


def _conv(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)


def _conv_norm(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, outputs, kernel, stride, groups, bias), nn.BatchNorm2d(outputs))


def _conv_norm_relu(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Sequential:
    return _conv_norm(inputs, outputs, kernel, stride, groups, bias).append(nn.ReLU())


def _stage(
    block: Callable[[int, int, int], nn.Module], inputs: int, outputs: int, stride: int, blocks: int
) -> nn.Sequential:
    """Blocks of which the first alone has the stride and may change the width."""
    rest = (block(outputs, outputs, 1) for _ in range(blocks - 1))
    return nn.Sequential(block(inputs, outputs, stride), *rest)


# ResNet: arXiv 1512.03385


class ResidualBlock(nn.Module):
    """relu(conv-BN-relu-conv-BN(x) + x), x through a 1×1 convolution and BN where its shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _conv_norm_relu(inputs, outputs, stride=stride), _conv_norm(outputs, outputs)
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv_norm(inputs, outputs, 1, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.residual(x) + self.shortcut(x))


def _resnet(
    classes: int, channels: int, _: int, depth: int, widths: tuple[int, int, int, int] = (16, 16, 32, 64)
) -> Network:
    blocks = (depth - 2) // 6
    stages = [
        _stage(ResidualBlock, inputs, outputs, stride, blocks)
        for inputs, outputs, stride in zip(widths, widths[1:], (1, 2, 2))
    ]
    return Network(widths[-1], classes, _conv_norm_relu(channels, widths[0]), *stages)


# Wide ResNet: arXiv 1605.07146


class PreActivationBlock(nn.Module):
    """conv-BN-relu-conv(y) + x with y = relu(BN(x)); where the shape changes, x is a 1×1 convolution of y."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.residual = nn.Sequential(
            _conv_norm_relu(inputs, outputs, stride=stride), _conv(outputs, outputs)
        )
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(x)
        return self.residual(y) + (x if self.shortcut is None else self.shortcut(y))


def _wide_resnet(classes: int, channels: int, _: int, depth: int, factor: int) -> Network:
    widths = (16, 16 * factor, 32 * factor, 64 * factor)
    stages = [
        _stage(PreActivationBlock, inputs, outputs, stride, (depth - 4) // 6)
        for inputs, outputs, stride in zip(widths, widths[1:], (1, 2, 2))
    ]
    tail = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU())
    return Network(widths[-1], classes, _conv(channels, widths[0]), *stages, tail=tail)


# VGG with batch norm: arXiv 1409.1556. No fully connected layer but the last, and the last two blocks share a
# resolution: 4×4 of 32×32.


def _vgg(classes: int, channels: int, _: int, convolutions: int) -> Network:
    widths = (channels, 64, 128, 256, 512, 512)
    blocks = []
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        pool = [nn.MaxPool2d(2)] if 1 <= number <= 3 else []
        first = _conv_norm_relu(inputs, outputs, bias=True)
        rest = (_conv_norm_relu(outputs, outputs, bias=True) for _ in range(convolutions - 1))
        blocks.append(nn.Sequential(*pool, first, *rest))
    return Network(widths[-1], classes, *blocks)


# MobileNetV2: arXiv 1801.04381. ReLU for the paper's ReLU6; the stem has stride 2, the second stage has not.


class InvertedResidual(nn.Module):
    """1×1 convolution to `expansion` times the width, 3×3 in each channel, 1×1 back; plus x where it fits."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = inputs * expansion
        self.residual = nn.Sequential(
            _conv_norm_relu(inputs, middle, 1),
            _conv_norm_relu(middle, middle, stride=stride, groups=middle),
            _conv_norm(middle, outputs, 1),
        )
        self.adds = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x) if self.adds else self.residual(x)


def _mobilenet_v2(classes: int, channels: int, _: int) -> Network:
    inputs = 16
    stem = _conv_norm_relu(channels, inputs, stride=2)
    stages = []
    for expansion, outputs, blocks, stride in (  # half the paper's widths; the tail is not halved
        (1, 8, 1, 1),
        (6, 12, 2, 1),
        (6, 16, 3, 2),
        (6, 32, 4, 2),
        (6, 48, 3, 1),
        (6, 80, 3, 2),
        (6, 160, 1, 1),
    ):
        block = partial(InvertedResidual, expansion=expansion)
        stages.append(_stage(block, inputs, outputs, stride, blocks))
        inputs = outputs
    return Network(1280, classes, stem, *stages, tail=_conv_norm_relu(inputs, 1280, 1))


# ShuffleNet: arXiv 1707.01083, and V2: arXiv 1807.11164. The stem is a 1×1 convolution to 24 channels, and
# nothing is pooled before the stages.


class Shuffle(nn.Module):
    """Channel i·(C/groups) + j becomes channel j·groups + i."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        # Channels as the last dimension: a channels_last map stays one.
        x = x.permute(0, 2, 3, 1).unflatten(3, (self.groups, -1))
        return x.transpose(3, 4).flatten(3).permute(0, 3, 1, 2)


class ShuffleUnit(nn.Module):
    """Grouped 1×1, shuffle, 3×3 in each channel, grouped 1×1; plus x, or beside x pooled when the stride is 2."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        groups = 3
        made = outputs if stride == 1 else outputs - inputs
        middle = made // 4
        first = 1 if inputs == 24 else groups  # the stem's few channels are not worth grouping
        self.residual = nn.Sequential(
            _conv_norm_relu(inputs, middle, 1, groups=first),
            Shuffle(first),
            _conv_norm_relu(middle, middle, stride=stride, groups=middle),
            _conv_norm(middle, made, 1, groups=groups),
        )
        self.pool = None if stride == 1 else nn.AvgPool2d(3, stride, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is None:
            return self.relu(self.residual(x) + x)
        return self.relu(torch.cat([self.residual(x), self.pool(x)], 1))


def _shufflenet_v1(classes: int, channels: int, _: int) -> Network:
    widths = (24, 240, 480, 960)
    stages = [_stage(ShuffleUnit, *ends, 2, blocks) for ends, blocks in zip(pairwise(widths), (4, 8, 4))]
    return Network(widths[-1], classes, _conv_norm_relu(channels, 24, 1), *stages)


class ShuffleUnitV2(nn.Module):
    """Half of x beside a branch of the other half, or two branches of x when the stride is 2; then shuffle."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        inputs = half if stride == 1 else inputs
        self.branch = nn.Sequential(
            _conv_norm_relu(inputs, half, 1),
            _conv_norm(half, half, stride=stride, groups=half),
            _conv_norm_relu(half, half, 1),
        )
        self.down = None
        if stride == 2:
            self.down = nn.Sequential(
                _conv_norm(inputs, inputs, stride=stride, groups=inputs), _conv_norm_relu(inputs, half, 1)
            )
        self.shuffle = Shuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        kept, used = x.chunk(2, 1) if self.down is None else (self.down(x), x)
        return self.shuffle(torch.cat([kept, self.branch(used)], 1))


def _shufflenet_v2(classes: int, channels: int, _: int, widths: tuple[int, int, int]) -> Network:
    ends = pairwise((24, *widths))
    stages = [_stage(ShuffleUnitV2, *end, 2, blocks) for end, blocks in zip(ends, (4, 8, 4))]
    stem, tail = _conv_norm_relu(channels, 24, 1), _conv_norm_relu(widths[-1], 1024, 1)
    return Network(1024, classes, stem, *stages, tail=tail)


# The default runs' own: small enough that four trainings fit into minutes on two CPU cores. Their first
# weights are what torch draws layer by layer.


class MLP(nn.Sequential):
    """Linear layers with ReLU between them, of images or of rows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def _mlp(classes: int, channels: int, image_size: int, widths: tuple[int, ...]) -> MLP:
    ends = pairwise((channels * image_size**2, *widths))
    hidden = [layer for inputs, outputs in ends for layer in (nn.Linear(inputs, outputs), nn.ReLU())]
    return MLP(*hidden, nn.Linear(widths[-1], classes))


def _cnn_16_32_64(classes: int, channels: int, _: int) -> nn.Sequential:
    return nn.Sequential(
        *_pooled_conv(channels, 16, pool=True),
        *_pooled_conv(16, 32),
        *_pooled_conv(32, 32, pool=True),
        *_pooled_conv(32, 64),
        *_pooled_conv(64, 64),
        GlobalAverage(),
        nn.Linear(64, classes),
    )


def _small_cnn(classes: int, channels: int, _: int, widths: tuple[int, int, int]) -> nn.Sequential:
    return nn.Sequential(
        *_pooled_conv(channels, widths[0], pool=True),
        *_pooled_conv(widths[0], widths[1], pool=True),
        *_pooled_conv(widths[1], widths[2]),
        GlobalAverage(),
        nn.Linear(widths[2], classes),
    )


def _pooled_conv(inputs: int, outputs: int, pool: bool = False) -> list[nn.Module]:
    # Pooling before normalisation leaves batch norm and ReLU a quarter of the work: with channels_last the
    # training step takes 0.5 to 0.6 of the time of the usual order in the usual layout.
    return [_conv(inputs, outputs), *([nn.MaxPool2d(2)] if pool else []), nn.BatchNorm2d(outputs), nn.ReLU()]


def _timm(name: str, classes: int, channels: int) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        reason = str(error).splitlines()[0]
        raise NetworkError(
            f"timm:{name} needs timm (pip install timm), which cannot be imported: {reason}"
        ) from None
    try:
        return timm.create_model(name, num_classes=classes, in_chans=channels)
    except RuntimeError as error:  # what timm raises for a name it does not know
        raise NetworkError(f"timm:{name}: {str(error).splitlines()[0]}") from None


# name: (classes, channels, image_size) → network
_MAKERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    **{f"resnet{depth}": partial(_resnet, depth=depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(_resnet, depth=depth, widths=(32, 64, 128, 256)) for depth in (8, 32)},
    **{
        f"wrn_{depth}_{factor}": partial(_wide_resnet, depth=depth, factor=factor)
        for depth in (16, 40)
        for factor in (1, 2)
    },
    "vgg8": partial(_vgg, convolutions=1),
    "vgg13": partial(_vgg, convolutions=2),
    "mobilenet_v2": _mobilenet_v2,
    "shufflenet_v1": _shufflenet_v1,
    "shufflenet_v2": partial(_shufflenet_v2, widths=(116, 232, 464)),
    "shufflenet_v2_x1_5": partial(_shufflenet_v2, widths=(176, 352, 704)),
    "cnn-16-32-64": _cnn_16_32_64,
    "cnn-12-24-48": partial(_small_cnn, widths=(12, 24, 48)),  # between the two, for an assistant
    "cnn-8-16-32": partial(_small_cnn, widths=(8, 16, 32)),
    "mlp-256-256": partial(_mlp, widths=(256, 256)),
    "mlp-16": partial(_mlp, widths=(16,)),
}
NAMES = tuple(_MAKERS)
