"""What kdkernels.methods sees of a model: its classifier, its features, its last map; whatever the model is."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from methods import CLASSES, MLP, ConvNet, batch, make, pair
from torch import Tensor, nn

from kdkernels.methods import KD, SimKD
from kdkernels.methods.network import Keep, Network


class Nested(nn.Module):
    """The classifier inside a head, behind dropout; the mean over space by a module."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ConvNet(6).last
        self.body[0] = nn.Conv2d(3, 6, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.ModuleDict({"drop": nn.Dropout(0.5), "fc": nn.Linear(6, CLASSES)})

    def forward(self, x: Tensor) -> Tensor:
        return self.head["fc"](self.head["drop"](self.pool(self.body(x)).flatten(1)))


class Dropped(Nested):
    """Dropout of whole channels, on what is still a map of one place."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head["fc"](F.dropout2d(self.pool(self.body(x)), 0.5, self.training).flatten(1))


class Sequence(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, CLASSES),
        )


class Functional(ConvNet):
    """ReLU and pooling by functions, the ReLU in place on what the last module gave."""

    def __init__(self) -> None:
        super().__init__(6)
        self.last[2] = nn.Identity()

    def maps(self, x: Tensor) -> Tensor:
        return F.relu_(self.last(self.stem(x)))


class MaxPooled(ConvNet):
    """A map of one place is what the classifier gets; the map before it, of the same width, is not."""

    def __init__(self) -> None:
        super().__init__(6, stride=1)
        self.pool = nn.MaxPool2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.maps(x)).flatten(1))


class SmallMaps(ConvNet):
    """Strides leave one place, as of a small image in a model of large ones; an earlier map is spread."""

    def __init__(self) -> None:
        super().__init__(6)
        self.last[0] = nn.Conv2d(4, 6, 6)


class Generalized(ConvNet):
    """No mean over space: the last map of the features' width is taken."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.maps(x).square().mean((2, 3)).sqrt())


class Several(ConvNet):
    def __init__(self) -> None:
        super().__init__(6)
        self.auxiliary = nn.Linear(6, 3)
        self.projection = nn.Linear(6, 6)
        del self.fc
        self.fc = nn.Linear(6, CLASSES)  # the last by name, and the last that is called

    def forward(self, x: Tensor) -> Tensor:
        x = self.maps(x).mean((2, 3))
        self.auxiliary(x)
        return self.fc(self.projection(x))


@pytest.mark.parametrize(
    ("model", "classifier", "at"),
    [
        (ConvNet, "fc", "last"),
        (Nested, "head.fc", "body"),
        (Dropped, "head.fc", "body"),
        (Sequence, "4", "1"),
        (Functional, "fc", "last"),
        (MaxPooled, "fc", "pool"),
        (SmallMaps, "fc", "last"),
        (Generalized, "fc", "last"),
        (Several, "fc", "last"),
        (MLP, "fc", None),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_finds(model, classifier, at, training):
    torch.manual_seed(0)
    model = (model(6) if model in (ConvNet, Generalized, MLP) else model()).train(training)
    modes = [module.training for module in model.modules()]
    buffers = {name: x.clone() for name, x in model.named_buffers()}
    state = torch.get_rng_state()
    images, _ = batch(dtype=torch.float32)
    network = Network(model, "student")
    network.look(images)
    assert (network.classifier_name, network.map_name) == (classifier, at)
    assert network.width == 6 and network.classes == CLASSES and network.ends_in_classifier
    # Looking leaves no trace.
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(x, buffers[name]) for name, x in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)

    inputs = []
    handle = network.classifier.register_forward_hook(lambda _, x, out: inputs.append(x[0]))
    torch.manual_seed(1)
    logits, features, map_ = network(images)
    torch.manual_seed(1)
    handle.remove()
    assert torch.equal(logits, model(images))
    assert features is inputs[0]
    if at is None:
        assert torch.equal(map_, features[:, :, None, None])
    elif model.__class__ in (ConvNet, Functional, SmallMaps):
        torch.testing.assert_close(map_.mean((2, 3)), features)
    assert map_.dim() == 4 and map_.requires_grad


def test_named():
    images, _ = batch(dtype=torch.float32)
    network = Network(ConvNet(6), "student", "fc", "stem")
    assert network(images).map.shape == (8, 4, 6, 6) and network.found_map() == "stem"
    with pytest.raises(
        ValueError, match=r"student's last map must have the 6 channels .* from 'stem': name another"
    ):
        network.of_width(network(images).map)


@pytest.mark.parametrize("name", ["simkd", "mgd", "maskd", "srrl"])
def test_a_map_of_another_width(name):
    student, teacher = pair()
    message = (
        r"s last map must have the \d+ channels that its classifier takes, got .* from 'stem': name another"
    )
    with pytest.raises(ValueError, match=message):
        method = make(name, student, teacher, student_map="stem")
        method(*batch())
    if name != "srrl":  # which takes the teacher's features
        with pytest.raises(ValueError, match=message):
            method = make(name, *pair(), teacher_map="stem")
            method(*batch())


def test_refuses():
    images, _ = batch(dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"student must have an nn.Linear as its classifier, got Conv2d without one"
    ):
        Network(nn.Conv2d(3, 6, 1), "student")
    with pytest.raises(
        ValueError, match=r"teacher_classifier must name an nn.Linear of the teacher, got 'head': no "
    ):
        Network(ConvNet(6), "teacher", "head")
    with pytest.raises(
        ValueError, match=r"student_classifier must name an nn.Linear .* got 'last.0': Conv2d"
    ):
        Network(ConvNet(6), "student", "last.0")
    with pytest.raises(
        ValueError, match=r"student_map must name a module of the student, got 'x': no such module"
    ):
        Network(ConvNet(6), "student", map="x")
    with pytest.raises(ValueError, match=r"student_map 'fc' must give \(M, C, H, W\), got \(8, 5\)"):
        Network(ConvNet(6), "student", map="fc")(images)

    class Unused(ConvNet):
        def forward(self, x):
            return self.maps(x).mean((2, 3))[:, :CLASSES]

    message = r"student_classifier must name the nn.Linear whose output is the student's: 'fc' gives "
    with pytest.raises(ValueError, match=message + r"nothing, the student \(2, 5\)"):
        Network(Unused(6), "student")(images)

    class NotLast(ConvNet):
        def __init__(self):
            super().__init__(6)
            self.later = nn.Linear(6, 3)

        def forward(self, x):
            self.later(self.maps(x).mean((2, 3)))
            return super().forward(x)

    with pytest.raises(ValueError, match=r"'later' gives \(2, 3\), the student \(2, 5\)"):
        Network(NotLast(), "student")(images)

    class Tuple(ConvNet):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ValueError, match=r"'fc' gives \(2, 5\), the student tuple"):
        Network(Tuple(6), "student")(images)

    class Tokens(ConvNet):
        def forward(self, x):
            return self.fc(self.maps(x).flatten(2).mT)

    with pytest.raises(
        ValueError, match=r"student's classifier must take features \(M, D\), got \(2, 9, 6\)"
    ):
        Network(Tokens(6), "student")(images)

    network = Network(ConvNet(6), "student")
    network(images)
    network.model.fc = nn.Linear(6, CLASSES)  # exchanged behind its back
    with pytest.raises(ValueError, match=r"student_classifier 'fc' is not used by the student"):
        network(images)


def test_nothing_is_kept():
    """Neither by a method's call nor by a call of the student itself; nor where the model fails."""
    images, labels = batch()
    method = make("simkd", *pair())
    kept = [method._student._at_classifier, method._student._at_map, method._teacher._at_map]
    method(images, labels)
    assert not any(keep.kept or keep.asked for keep in kept)
    logits = method.student(images)
    gone = weakref.ref(logits)
    assert not any(keep.kept for keep in kept)
    del logits
    gc.collect()
    assert gone() is None
    for wrong in (images[:, :2], images.float()):
        with pytest.raises(RuntimeError):
            method(wrong, labels)
        assert not any(keep.kept or keep.asked for keep in kept)

    def fail(*_):
        raise KeyError("x")

    handle = method.student.fc.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        method(images, labels)
    handle.remove()
    assert not any(keep.kept or keep.asked for keep in kept)
    copy.deepcopy(method)  # which tensors of a graph would not allow


def test_a_look_that_fails_leaves_no_trace():
    images, _ = batch(dtype=torch.float32)
    model = ConvNet(6).train()
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    network = Network(model, "student")
    with pytest.raises(RuntimeError):
        network(images[:, :2])
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks + 1
    assert all(m.training for m in model.modules())
    assert network(images).map.shape == (8, 6, 3, 3)


def test_one_student_in_several_methods():
    images, labels = batch()
    student, teacher = pair()
    first, second = KD(student, teacher), SimKD(student, teacher)
    second(images, labels)
    first(images, labels)
    assert second(images, labels).loss.isfinite()
    deployed = second.deployable()
    hooks = [h for m in deployed.student.modules() for h in m._forward_hooks.values() if isinstance(h, Keep)]
    assert hooks == [deployed._keep]
    assert not any(m._forward_hooks for m in first.deployable().student.modules())
