"""The networks by name: sizes as published, one form for all, the default runs' weights unchanged."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("numpy", reason="kdkernels[train] is not installed")

from kdkernels.train import data, models, zoo

CONVOLUTIONAL = [name for name in zoo.NAMES if not name.startswith("mlp")]
# As the literature prints them, of 100 classes (github.com/HobbitLong/RepDistiller and those who use its
# networks).
PUBLISHED = {
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenet_v2": 812_836,
    "shufflenet_v1": 949_258,
    "shufflenet_v2": 1_355_528,
}


def count(name: str, *shape: int) -> int:
    return sum(parameter.numel() for parameter in zoo.build(name, *shape).parameters())


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_number_of_parameters_is_the_published_one(name):
    assert count(name) == PUBLISHED[name]


def test_the_numbers_of_parameters_that_follow_from_others():
    # One block more in each stage: two 3×3 convolutions and two norms of 16, 32 and 64 channels.
    three_blocks = sum(2 * 9 * width**2 + 4 * width for width in (16, 32, 64))
    for depth in (8, 14, 44):
        assert count(f"resnet{depth}") == PUBLISHED["resnet20"] + (depth - 20) // 6 * three_blocks
    assert count("wrn_16_1") == PUBLISHED["wrn_40_1"] - 4 * three_blocks

    def shufflenet_v2(widths: tuple[int, int, int]) -> int:
        total, inputs = 3 * 24 + 2 * 24, 24
        for outputs, units in zip(widths, (4, 8, 4), strict=True):
            half = outputs // 2
            total += (inputs * half + 15 * half + half**2) + (11 * inputs + inputs * half + 2 * half)
            total += (units - 1) * (2 * half**2 + 15 * half)
            inputs = outputs
        return total + inputs * 1024 + 2 * 1024 + 1024 * 100 + 100

    assert shufflenet_v2((116, 232, 464)) == PUBLISHED["shufflenet_v2"]
    assert shufflenet_v2((176, 352, 704)) == count("shufflenet_v2_x1_5")


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_network_trains(name):
    network = zoo.build(name, 7).train()
    logits = network(images(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    if name in ("resnet44", "resnet56", "resnet110", "wrn_40_1", "wrn_40_2"):
        return  # as their shallower kin, only longer
    (logits * images(2, 7)).sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_the_classifier_gets_the_mean_of_the_last_map(name):
    network = zoo.build(name).eval()
    classifier = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    pool = next(module for module in network.modules() if isinstance(module, zoo.GlobalAverage))
    seen: dict[str, Tensor] = {}
    pool.register_forward_pre_hook(lambda _, inputs: seen.update(map=inputs[0]))
    classifier.register_forward_pre_hook(lambda _, inputs: seen.update(feature=inputs[0]))
    classifier.register_forward_hook(lambda _, inputs, output: seen.update(logits=output))
    with torch.no_grad():
        logits = network(images(2, 3, 32, 32))
    assert seen["map"].dim() == 4
    assert seen["map"].min() >= 0
    assert seen["map"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(seen["map"].mean((2, 3)), seen["feature"])
    assert torch.equal(seen["logits"], logits)
    assert seen["feature"].shape == (2, classifier.in_features)
    if isinstance(network, zoo.Network):
        with torch.no_grad():
            assert torch.equal(network.features(images(2, 3, 32, 32)), seen["map"])


@pytest.mark.parametrize(
    "name", ["resnet8x4", "wrn_16_1", "vgg8", "mobilenet_v2", "shufflenet_v1", "shufflenet_v2"]
)
def test_a_hook_sees_what_a_module_gave_out(name):
    network = zoo.build(name).train()
    seen: list[tuple[Tensor, Tensor]] = []
    for module in network.modules():
        module.register_forward_hook(lambda _, inputs, output: seen.append((output, output.clone())))
    network(images(2, 3, 32, 32))
    assert all(torch.equal(*pair) for pair in seen)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_other_sizes_of_images(name):
    for channels, size in ((1, 28), (3, 8)):
        network = zoo.build(name, 5, channels, size).eval()
        with torch.no_grad():
            assert network(images(2, channels, size, size)).shape == (2, 5)


def test_the_sizes_of_the_last_maps():
    sizes = {
        "resnet8x4": 8,
        "wrn_16_2": 8,
        "vgg13": 4,
        "mobilenet_v2": 2,
        "shufflenet_v1": 4,
        "shufflenet_v2": 4,
    }
    for name, size in sizes.items():
        with torch.no_grad():
            assert zoo.build(name).eval().features(images(1, 3, 32, 32)).shape[2:] == (size, size), name


@pytest.mark.parametrize("name", ["resnet8x4", "shufflenet_v1", "shufflenet_v2"])
def test_the_layout_in_memory_changes_no_result(name):
    network = zoo.build(name).double().eval()
    x = images(2, 3, 32, 32).double()
    with torch.no_grad():
        as_built = network(x)
        torch.testing.assert_close(network(x.contiguous(memory_format=torch.channels_last)), as_built)
        torch.testing.assert_close(network.to(memory_format=torch.contiguous_format)(x), as_built)


def test_a_seed_gives_the_same_weights():
    def weights(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return list(zoo.build("shufflenet_v2").state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


def test_a_residual_block_is_its_formula():
    for inputs, outputs, stride in ((4, 4, 1), (4, 6, 2), (4, 6, 1)):
        block = zoo.ResidualBlock(inputs, outputs, stride).eval()
        x = images(2, inputs, 8, 8)
        conv = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
        scale = 1 / (1 + 1e-5) ** 0.5  # what a fresh batch norm does in evaluation
        y = nn.functional.conv2d(x, conv[0].weight, stride=stride, padding=1).mul(scale).relu()
        y = nn.functional.conv2d(y, conv[1].weight, padding=1) * scale
        kept = x if len(conv) == 2 else nn.functional.conv2d(x, conv[2].weight, stride=stride) * scale
        torch.testing.assert_close(block(x), (y + kept).relu())
        assert (len(conv) == 2) == (inputs == outputs)


def test_a_pre_activation_block_is_its_formula():
    for inputs, outputs, stride in ((4, 4, 1), (4, 6, 2)):
        block = zoo.PreActivationBlock(inputs, outputs, stride).eval()
        x = images(2, inputs, 8, 8)
        conv = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
        scale = 1 / (1 + 1e-5) ** 0.5
        y = (x * scale).relu()
        z = nn.functional.conv2d(y, conv[0].weight, stride=stride, padding=1).mul(scale).relu()
        kept = x if len(conv) == 2 else nn.functional.conv2d(y, conv[2].weight, stride=stride)
        torch.testing.assert_close(block(x), nn.functional.conv2d(z, conv[1].weight, padding=1) + kept)


def test_shuffle_interleaves_the_groups():
    x = torch.arange(12.0).view(1, 12, 1, 1).expand(2, 12, 3, 3)
    expected = [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert zoo.Shuffle(3)(x)[1, :, 2, 2].tolist() == expected
    assert torch.equal(zoo.Shuffle(3)(x), nn.ChannelShuffle(3)(x.contiguous()))
    assert torch.equal(zoo.Shuffle(1)(x), x)


def test_the_default_runs_draw_the_weights_they_always_drew():
    def conv(inputs: int, outputs: int, pool: bool = False) -> list[nn.Module]:
        layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
        return [*layers, *([nn.MaxPool2d(2)] if pool else []), nn.BatchNorm2d(outputs), nn.ReLU()]

    torch.manual_seed(5)
    expected = [
        nn.Sequential(
            *conv(1, 16, True), *conv(16, 32), *conv(32, 32, True), *conv(32, 64), *conv(64, 64),
            zoo.GlobalAverage(), nn.Linear(64, 10),
        ),
        nn.Sequential(
            *conv(1, 8, True), *conv(8, 16, True), *conv(16, 32), zoo.GlobalAverage(), nn.Linear(32, 10)
        ),
        nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)),
        nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)),
    ]  # fmt: skip
    torch.manual_seed(5)
    made = [make(name) for name in ("fashion-mnist", "digits") for make in (models.teacher, models.student)]
    for network, other in zip(made, expected, strict=True):
        state, other_state = network.state_dict(), other.state_dict()
        assert list(state) == list(other_state)
        assert all(torch.equal(state[key], other_state[key]) for key in state)
        x = images(3, 1, 28, 28) if state["0.weight"].dim() == 4 else images(3, 64)
        torch.testing.assert_close(network(x), other(x))


def test_every_data_set_has_its_pair():
    assert set(models.PAIRS) == set(data.NAMES)
    for name, (classes, channels, size) in data.SHAPES.items():
        for make in (models.teacher, models.student):
            with torch.no_grad():
                assert make(name).eval()(images(1, channels, size, size)).shape == (1, classes)


# What cannot be built


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet32x", ["'resnet32x'", "did you mean", "resnet32x4"]),
        ("wrn-40-2", ["'wrn-40-2'", "wrn_40_2"]),
        ("transformer", ["'transformer'", "takes resnet8", "mlp-16", "timm:NAME"]),
        ("", ["''", "takes"]),
    ],
)
def test_an_unknown_network_is_named(name, words):
    with pytest.raises(zoo.NetworkError) as caught:
        zoo.build(name)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_a_network_of_timm(monkeypatch):
    asked: dict[str, dict] = {}

    def create_model(name: str, **options: int) -> nn.Module:
        if name != "resnet10t":
            raise RuntimeError(f"Unknown model ({name})\nand more")
        asked[name] = options
        return nn.Linear(1, 1)

    stub = ModuleType("timm")
    stub.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", stub)
    assert isinstance(zoo.build("timm:resnet10t", 12, 1), nn.Linear)
    assert asked == {"resnet10t": {"num_classes": 12, "in_chans": 1}}
    with pytest.raises(zoo.NetworkError, match=r"^timm:nothing: Unknown model \(nothing\)$"):
        zoo.build("timm:nothing")


def test_timm_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(zoo.NetworkError, match=r"timm:resnet10t needs timm.*pip install timm"):
        zoo.build("timm:resnet10t")
