"""What holds for every method of kdkernels.methods."""

from __future__ import annotations

import copy

import pytest
import torch
from methods import ConvNet, batch, check, cross_entropy, kl, make, names, pair, seen
from torch import nn

import kdkernels
from kdkernels.methods import KD2M, METHODS, Seen
from kdkernels.methods.method import Method

each = pytest.mark.parametrize("name", METHODS)
FROZEN = [name for name in METHODS if name != "atsc"]
KEPT = [name for name in FROZEN if name != "rco"]  # its teacher changes with the anchors


@each
@pytest.mark.parametrize("labelled", [8, 3, 0])
def test_terms_add_up_to_the_loss(name, labelled):
    images, labels = batch(labelled)
    output = make(name, *pair())(images, labels)
    torch.testing.assert_close(sum(output.terms.values()), output.loss)
    assert output.loss.isfinite() and output.loss.requires_grad
    output.loss.backward()


@each
def test_a_batch_of_one(name):
    images, labels = batch(size=1, labelled=1)
    output = make(name, *pair(), **({"connector": "linear"} if name == "srrl" else {}))(images, labels)
    assert output.loss.isfinite()
    output.loss.backward()


@pytest.mark.parametrize("name", FROZEN)
def test_the_teacher_stays_as_it_is(name):
    images, labels = batch()
    method = make(name, *pair())
    was = {key: x.clone() for key, x in method.teacher.state_dict().items()}
    optimizer = torch.optim.SGD(method.parameters_to_train(), 0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        method(images, labels).loss.backward()
        optimizer.step()
    for teacher in method.frozen():
        assert not any(module.training for module in teacher.modules())
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(x, was[key]) for key, x in method.teacher.state_dict().items())
    assert method.student.training and not method.eval().student.training


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in METHODS
        for kind in ("wider", "equal", "mlp")
        if (name, kind) != ("maskd", "mlp")
    ],
)
def test_every_parameter_to_train_is_there_once_and_learns(name, kind):
    images, labels = batch()
    method = make(name, *pair(kind))
    parameters = method.parameters_to_train()
    assert len({id(p) for p in parameters}) == len(parameters)
    method(images, labels).loss.backward()
    idle = {"teacher.fc.bias"} if name == "atsc" else set()
    assert names(method, [p for p in parameters if p.grad is None]) <= idle
    assert all(p.requires_grad for p in parameters)
    given = {n for n, p in method.named_parameters() if p.grad is not None}
    assert given <= names(method, parameters)


@each
def test_predicts_what_is_deployed(name):
    images, labels = batch()
    method = make(name, *pair())
    method(images, labels).loss.backward()
    method.eval()
    deployed = method.deployable().eval()
    logits = method.predict(images)
    torch.testing.assert_close(deployed(images), logits, rtol=0, atol=0)
    torch.testing.assert_close(method(images, labels).logits, logits)
    optimizer = torch.optim.SGD(method.parameters_to_train(), 0.1)
    optimizer.step()  # a copy: training on does not change it
    torch.testing.assert_close(deployed(images), logits, rtol=0, atol=0)
    assert not torch.equal(method.predict(images), logits)


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_outputs_that_a_caller_kept(name, dtype):
    """In another dtype, and without what the method does not use."""
    images, labels = batch()
    method = make(name, *pair()).eval()
    loss = method(images, labels)
    if name == "dgkd":
        kept = [x.to(dtype) for x in method.look_at_teachers(images)]
    else:
        whole = method.look_at_teacher(images)
        kept = Seen(*(x.to(dtype) if n in method.uses else None for n, x in whole._asdict().items()))
    torch.manual_seed(0)
    wanted = method(images, labels)
    method.teacher.forward = None  # is not run
    torch.manual_seed(0)
    got = method(images, labels, kept)
    assert got.loss.dtype == loss.loss.dtype == torch.float64
    near = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2}[dtype]
    torch.testing.assert_close(got.loss, wanted.loss, rtol=near, atol=0)
    got.loss.backward()


@each
def test_state(name):
    """A method from other weights, given the state, goes on as the first."""
    images, labels = batch()
    method, other = make(name, *pair()), make(name, *pair(seed=4))
    method.start_epoch(2, 9)
    other.start_epoch(2, 9)
    if name == "atsc":
        with torch.no_grad():
            method.teacher.fc.weight += 0.1
    method(images, labels)
    other.load_state_dict(method.state_dict())
    outputs = []
    for m in (method, other):
        torch.manual_seed(3)
        outputs.append(m(images, labels))
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert torch.equal(outputs[0].logits, outputs[1].logits)


@each
def test_deepcopy(name):
    """A copy sees its own models."""
    images, labels = batch()
    method = make(name, *pair())
    method(images, labels).loss.backward()
    twin = copy.deepcopy(method)
    torch.manual_seed(3)
    loss = method(images, labels).loss
    with torch.no_grad():
        for p in method.parameters():
            p.zero_()
    torch.manual_seed(3)
    torch.testing.assert_close(twin(images, labels).loss, loss)


@each
def test_autocast(name):
    """Half precision inside, the loss in float32 and near the plain one."""
    images, labels = batch(dtype=torch.float32)
    method = make(name, *pair(dtype=torch.float32))
    twin = copy.deepcopy(method)
    torch.manual_seed(3)
    plain = twin(images, labels)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        output = method(images, labels)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, plain.loss, rtol=0.05, atol=0.02)
    output.loss.backward()
    for p in method.student.stem.parameters():
        assert p.grad.isfinite().all() and p.grad.any()
    if name == "atsc":
        with torch.autocast("cpu", torch.bfloat16):
            loss = method.upkeep_loss(images, labels)
        assert loss.dtype == torch.float32 and loss.isfinite()
    if name == "maskd":
        with torch.autocast("cpu", torch.bfloat16):
            method.prepare([(images, labels)])


@pytest.mark.parametrize("metric", kdkernels.methods.METRICS)
def test_distances_under_autocast(metric):
    """Of features in bfloat16, but summed in float32: as far as rounding the features goes."""
    images, labels = batch(size=24, labelled=24, dtype=torch.float32)
    student, teacher = pair("equal", dtype=torch.float32)
    options = {"projections": torch.eye(6)} if metric == "sliced" else {}
    method = KD2M(student, teacher, metric=metric, weight=1.0, metric_options=options).eval()
    plain = method(images, labels).terms["distance"]
    with torch.autocast("cpu", torch.bfloat16):
        half = method(images, labels).terms["distance"]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=0.05, atol=0.02)


@each
def test_a_teacher_in_half_precision(name):
    """Student in float32, teacher in bfloat16: what a method adds follows the student."""
    images, labels = batch(dtype=torch.float32)
    student, teacher = pair(dtype=torch.float32)

    class Half(ConvNet):
        def forward(self, x):
            return super().forward(x.bfloat16())

    half = Half(10).bfloat16()
    half.load_state_dict(teacher.state_dict())
    method = make(name, student, half)
    output = method(images, labels)
    assert output.loss.dtype == torch.float32 and output.loss.isfinite()
    output.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in student.stem.parameters())
    method.eval()
    torch.testing.assert_close(method.deployable().eval()(images), method.predict(images))


@each
def test_new_modules_are_where_the_student_is(name):
    """Nothing is left to move: a method of models on one device and in one dtype runs."""
    student, teacher = pair(dtype=torch.bfloat16)
    images, labels = batch(dtype=torch.bfloat16)
    output = make(name, student, teacher)(images, labels)
    assert output.loss.dtype == torch.float32 and output.loss.isfinite()


# Not KD²M's exact transport, whose solver is on the host, nor DGKD, whose teachers are drawn for each batch.
@pytest.mark.parametrize("name", ["kd", "ctkd", "maskd", "mgd", "srrl", "ijckd", "atsc"])
def test_compiles_into_one_graph(name):
    """Once the models were looked at."""
    images, labels = batch()
    method = make(name, *pair())
    method.eval()(images, labels)
    method.train()
    twin = copy.deepcopy(method)
    compiled = torch.compile(method, backend="aot_eager", fullgraph=True)
    losses = []
    for m in (compiled, twin):
        torch.manual_seed(0)
        loss = m(images, labels).loss
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses)
    for p, q in zip(method.parameters_to_train(), twin.parameters_to_train()):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("name", ["kd", "simkd", "dgkd"])
def test_compiles(name):
    images, labels = batch()
    method = make(name, *pair())
    twin = copy.deepcopy(method)
    compiled = torch.compile(method, backend="aot_eager")
    for _ in range(3):
        torch.manual_seed(0)
        output = compiled(images, labels)
        torch.manual_seed(0)
        wanted = twin(images, labels)
        torch.testing.assert_close(output.loss, wanted.loss)
        output.loss.backward()
        wanted.loss.backward()
        for p, q in zip(method.parameters_to_train(), twin.parameters_to_train()):
            torch.testing.assert_close(p.grad, q.grad)
    del output, wanted
    assert not method._student._at_map.kept and not method._student._at_classifier.kept


def test_classes_that_differ():
    student, _ = pair()
    for name in METHODS:
        with pytest.raises(ValueError, match=r"must have the teacher's 4 classes, got 5"):
            make(name, student, ConvNet(6, classes=4))


def test_what_is_no_model():
    student, teacher = pair()
    with pytest.raises(TypeError, match=r"student must be an nn.Module, got str"):
        METHODS["kd"]("resnet8", teacher)
    with pytest.raises(TypeError, match=r"teacher must be an nn.Module, got NoneType"):
        METHODS["kd"](student, None)


def test_backend_is_handed_on():
    images, labels = batch()
    for name in METHODS:
        method = make(name, *pair())
        twin = copy.deepcopy(method)
        twin.backend = "reference"
        losses = []
        for m in (method, twin):
            torch.manual_seed(0)
            losses.append(m(images, labels).loss)
        torch.testing.assert_close(*losses)
        method.backend = "none such"
        with pytest.raises(ValueError, match=r"none such"):
            method(images, labels)


def test_base():
    images, labels = batch()
    method = Method(*pair())
    with pytest.raises(NotImplementedError):
        method(images, labels)
    assert method.monitor(images, labels) == {}
    assert method.gather(labels) is labels


def test_a_named_classifier_and_map():
    """The last linear layer is not the classifier, and the last map not the one that is wanted."""

    class Twofold(ConvNet):
        def __init__(self, width):
            super().__init__(width)
            self.later = nn.Linear(width, 3)  # an auxiliary head

        def forward(self, x):
            self.later(self.maps(x).mean((2, 3)))
            return super().forward(x)

    images, labels = batch()
    torch.manual_seed(0)
    student, teacher = Twofold(6).double(), Twofold(6).double()
    method = make("kd", student, teacher, student_classifier="fc", teacher_classifier="fc")

    def formula(m):
        z, (z_t, *_) = m.student(images), seen(m.teacher, images)
        return {"hard": 0.1 * cross_entropy(z, labels), "soft": 0.9 * kl(z, z_t, 4.0)}

    check(method, formula, images, labels)
    for several in ("dgkd", "atsc"):  # the names are every teacher's
        method = METHODS[several](
            student,
            [teacher, copy.deepcopy(teacher)],
            student_classifier="fc",
            teacher_classifier="fc",
            teacher_map="last.0",
        )
        assert method(images, labels).loss.isfinite()
        assert [n.found_map() for n in method._networks] == ["last.0", "last.0"]
    named = {f"{role}_{what}": at for role in ("student", "teacher") for what, at in (("map", "last.1"),)}
    method = make("simkd", student, teacher, student_classifier="fc", teacher_classifier="fc", **named)
    method.eval()
    loss = method(images, labels).loss
    before = [m.last[0](m.stem(images)) for m in (student, teacher)]
    x, y = (m.last[1](z).relu() for m, z in zip((student, teacher), before))  # the ReLU works in place
    torch.testing.assert_close(loss, (method.connector(x) - y).square().mean())
