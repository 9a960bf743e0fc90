"""What a method ships: saved, loaded, counted."""

from __future__ import annotations

import json

import pytest
import torch
from methods import CLASSES, MLP, ConvNet, batch, make, pair
from torch import nn

from kdkernels.methods import ATSC, METHODS, Bottleneck, Deployable, SimKD, load_deployable
from kdkernels.methods.deployable import read_about


def shipped(name="simkd", kind="wider", dtype=torch.float64, **options):
    method = make(name, *pair(kind, dtype=dtype), **options)
    method(*batch(dtype=dtype))
    return method.eval().deployable().eval()


@pytest.mark.parametrize("name", METHODS)
def test_round_trip(name, tmp_path):
    """Bit for bit, in the precision that was saved."""
    images, _ = batch()
    deployed = shipped(name)
    deployed.save(tmp_path / "student.safetensors", method=name, accuracy=0.5)
    loaded = load_deployable(tmp_path / "student.safetensors", pair(seed=9, dtype=torch.float32)[0])
    assert not loaded.training
    assert torch.equal(loaded(images), deployed(images))
    assert loaded.state_dict().keys() == deployed.state_dict().keys()
    assert all(torch.equal(x, deployed.state_dict()[key]) for key, x in loaded.state_dict().items())
    assert read_about(tmp_path / "student.safetensors") == {"method": name, "accuracy": 0.5}
    assert [p.name for p in tmp_path.iterdir()] == ["student.safetensors"]
    loaded.save(tmp_path / "again.safetensors")
    again = load_deployable(tmp_path / "again.safetensors", pair()[0])
    assert torch.equal(again(images), deployed(images))


@pytest.mark.parametrize("connector", ["bottleneck", "conv", "linear"])
@pytest.mark.parametrize("kind", ["larger", "mlp"])
def test_round_trip_of_connectors(kind, connector, tmp_path):
    images, _ = batch()
    deployed = shipped("ijckd", kind, connector=connector)
    deployed.save(tmp_path / "x")
    assert torch.equal(load_deployable(tmp_path / "x", pair(kind)[0])(images), deployed(images))


def test_round_trip_of_several_teachers(tmp_path):
    images, labels = batch()
    student, first = pair()
    method = ATSC(student, [first, pair("larger")[1], pair("equal")[1]]).train()
    method(images, labels)
    deployed = method.eval().deployable().eval()
    assert len(deployed.connectors) == 3
    deployed.save(tmp_path / "x")
    assert torch.equal(load_deployable(tmp_path / "x", pair()[0])(images), deployed(images))
    torch.testing.assert_close(method.predict(images), deployed(images), rtol=0, atol=0)


def test_own_connector(tmp_path):
    images, _ = batch()
    deployed = shipped(connector=nn.Conv2d(6, 10, 1).double())
    deployed.save(tmp_path / "x")
    with pytest.raises(
        ValueError, match=r"x has a connector of the user's own: give a new one in connectors="
    ):
        load_deployable(tmp_path / "x", pair()[0])
    loaded = load_deployable(tmp_path / "x", pair()[0], [nn.Conv2d(6, 10, 1)])
    assert torch.equal(loaded(images), deployed(images))
    with pytest.raises(
        ValueError, match=r"x is of another student: connectors.0.weight is \(10, 6, 1, 1\), not"
    ):
        load_deployable(tmp_path / "x", pair()[0], [nn.Conv2d(6, 9, 1)])


def test_refuses(tmp_path):
    deployed = shipped()
    path = tmp_path / "student.safetensors"
    student = pair()[0]
    with pytest.raises(ValueError, match=r"student.safetensors: no such file"):
        load_deployable(path, student)
    deployed.save(path)
    whole = path.read_bytes()
    for content in (whole[:-5], whole[:100], b"", b"no file of ours", whole[:8] + b"x" * len(whole[8:])):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"student.safetensors is damaged or no safetensors file"):
            load_deployable(path, student)
    path.write_bytes(whole)

    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other is not a deployable module of kdkernels"):
        load_deployable(tmp_path / "other", student)

    class Renamed(ConvNet):
        def __init__(self):
            super().__init__(6)
            self.late, self.last = self.last, nn.Identity()

        def maps(self, x):
            return self.late(self.stem(x))

    headless = ConvNet(6)
    headless.head, headless.fc = headless.fc, nn.Identity()
    without_map = ConvNet(6)
    del without_map.last
    for other, message in (
        (ConvNet(7), r"student.last.0.weight is \(6, 4, 3, 3\), not \(7, 4, 3, 3\)"),
        (Renamed(), "it lacks student.late"),
        (MLP(6), "it has last"),
        (without_map, "it has last"),
    ):
        with pytest.raises(ValueError, match=r"student.safetensors is of another student: " + message):
            load_deployable(path, other)
    del headless.fc
    with pytest.raises(ValueError, match=r"student.safetensors is of another student: it has fc"):
        load_deployable(path, headless)
    shipped("kd").save(path)
    with pytest.raises(
        ValueError, match=r"is of another student: it lacks body.1.bias|it lacks student.body.1.bias"
    ):
        load_deployable(path, MLP(6))


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    deployed = shipped()
    path = tmp_path / "x"
    deployed.save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        deployed.save(path, about=object())  # no JSON
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "disk")))
    with pytest.raises(OSError, match="disk"):
        deployed.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x"]
    with pytest.raises(FileNotFoundError):
        deployed.save(tmp_path / "none" / "x")


def test_structure_is_readable(tmp_path):
    """What stands in the file beside the tensors."""
    from safetensors import safe_open

    shipped().save(tmp_path / "x", epoch=3)
    with safe_open(tmp_path / "x", "pt") as file:
        about = file.metadata()
    assert json.loads(about["structure"]) == {
        "connectors": [{"kind": "bottleneck", "inputs": 6, "outputs": 10, "factor": 2}],
        "classifiers": [[10, CLASSES, True]],
        "classifier": "fc",
        "map": "last",
        "about": {"epoch": 3},
    }


def test_a_method_that_saw_no_images_yet(tmp_path):
    """The last map is not known: rather an error than a module that takes the pooled features."""
    for name in ("simkd", "ijckd", "atsc"):
        with pytest.raises(
            RuntimeError, match=r"student's last map is not known yet: call the method on images first"
        ):
            make(name, *pair()).deployable()
    images, _ = batch()
    named = make("simkd", *pair(), student_map="last").eval()
    torch.testing.assert_close(named.deployable().eval()(images), named.predict(images))


def test_cost():
    """Of the student's body, connector and head; not of a classifier that nothing uses."""
    images, _ = batch()

    def parameters(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())

    student, _ = pair()
    body = 2 * (4 * 27 * 36 + 6 * 36 * 9)  # a multiply-add is two; 6 × 6 and then 3 × 3 places
    kd = shipped("kd").cost(images)
    assert kd == (parameters(student), body + 2 * 6 * CLASSES)
    deployed = shipped()
    inner = 5
    connector = 2 * 9 * (6 * inner + 9 * inner * inner + inner * 10)
    head = nn.Linear(10, CLASSES)
    assert deployed.cost(images) == (
        parameters(student.stem, student.last, Bottleneck(6, 10), head),
        body + connector + 2 * 10 * CLASSES,
    )
    assert not deployed.training and deployed.train().cost(images).parameters and deployed.training
    assert isinstance(deployed.student.fc, nn.Identity)


def test_training_on_does_not_change_it():
    images, labels = batch()
    method = SimKD(*pair()).train()
    method(images, labels)
    deployed = method.deployable().eval()
    before = deployed(images)
    with torch.no_grad():
        for tensor in (*method.parameters(), *method.buffers()):
            tensor.add_(1)
    assert torch.equal(deployed(images), before)
    assert isinstance(method.student.fc, nn.Linear)


def test_deployed_module_keeps_nothing():
    images, _ = batch()
    for name in ("kd", "simkd"):
        deployed = shipped(name)
        deployed(images)
        assert not deployed._keep.kept and not deployed._keep.asked
        with pytest.raises(RuntimeError):
            deployed(images[:, :2])
        assert not deployed._keep.kept and not deployed._keep.asked


@pytest.mark.parametrize("name", ["kd", "simkd"])
def test_exports(name):
    images, _ = batch()
    deployed = shipped(name)
    exported = torch.export.export(deployed, (images,), strict=False)
    assert torch.equal(exported.module()(images), deployed(images))


def test_plain_module():
    student, _ = pair()
    images, _ = batch()
    deployed = Deployable(student).eval()
    assert torch.equal(deployed(images), student.eval()(images))
