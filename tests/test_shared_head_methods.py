"""SimKD, IJCKD and ATSC against their formulas, step by step in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from methods import (
    BATCH,
    CLASSES,
    MLP,
    PAIRS,
    ConvNet,
    at_one_size,
    batch,
    check,
    cross_entropy,
    gradients,
    kl,
    learning,
    make,
    names,
    pair,
    seen,
)
from torch import nn

from kdkernels.methods import ATSC, Linear, SimKD

labelled = pytest.mark.parametrize("labelled", [BATCH, 3], ids=["all", "some"])


@labelled
@pytest.mark.parametrize("connector", ["bottleneck", "conv", "linear"])
@pytest.mark.parametrize("kind", PAIRS)
def test_simkd(kind, connector, labelled):
    """Maps are compared at the smaller of their sizes; the logits are the teacher's classifier's."""
    images, labels = batch(labelled)
    method = make("simkd", *pair(kind), connector=connector)
    twin = copy.deepcopy(method)

    def formula(m):
        g, y = m.connector(m.student.maps(images)), seen(m.teacher, images)[2]
        return {"feature_mse": F.mse_loss(*at_one_size(g, y))}

    check(method, formula, images, labels)
    output = twin(images, labels)
    classifier = method.teacher.fc
    again = copy.deepcopy(method)
    with torch.no_grad():
        g = again.connector(again.student.maps(images)).mean((2, 3))
        torch.testing.assert_close(output.logits, F.linear(g, classifier.weight, classifier.bias))
    assert not output.logits.requires_grad
    assert learning(twin, output.loss) == {"student", "connector"}
    assert gradients(method, method(images, labels).loss)["student.fc.weight"] is None
    assert not {"student.fc.weight", "student.fc.bias"} & names(method, method.parameters_to_train())


@labelled
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("name", ["ijckd", "simkd"])
def test_ijckd(name, kind, labelled):
    """CE + MSE of logits + MSE of maps; and with a soft term too."""
    images, labels = batch(labelled)
    weights = {"hard_weight": 0.5, "logit_weight": 0.7, "feature_weight": 0.9, "soft_weight": 0.3}
    method = make(name, *pair(kind), **({} if name == "ijckd" else weights), temperature=3.0)

    def formula(m):
        f, (z_t, _, y) = m.student.maps(images), seen(m.teacher, images)
        g = m.connector(f)
        z = F.linear(g.mean((2, 3)), m.teacher.fc.weight, m.teacher.fc.bias)
        terms = {
            "hard": cross_entropy(z, labels),
            "logit_mse": F.mse_loss(z, z_t),
            "feature_mse": F.mse_loss(*at_one_size(g, y)),
        }
        if name == "ijckd":
            return terms
        for term, weight in zip(terms, (0.5, 0.7, 0.9)):
            terms[term] = weight * terms[term]
        return terms | {"soft": 0.3 * kl(z, z_t, 3.0)}

    check(method, formula, images, labels)
    assert learning(method, method(images, labels).loss) == {"student", "connector"}
    assert gradients(method, method(images, labels).loss)["student.fc.weight"] is None


@labelled
@pytest.mark.parametrize("kind", ["equal", "larger", "mlp"])
def test_ijckd_monitor(kind, labelled):
    images, labels = batch(labelled)
    method = make("ijckd", *pair(kind)).eval()
    with torch.no_grad():
        g = method.connector(method.student.maps(images)).mean((2, 3))
        z_t, y, _ = seen(method.teacher, images)
        wanted = {
            "bound_proxy/teacher_ce": cross_entropy(z_t, labels).item(),
            "bound_proxy/student_ce": cross_entropy(method.teacher.fc(g), labels).item(),
            "bound_proxy/feature_mse": F.mse_loss(g, y).item(),
        }
    buffers = [x.clone() for x in method.buffers()]
    assert method.monitor(images, labels) == pytest.approx(wanted)
    assert all(torch.equal(x, y) for x, y in zip(method.buffers(), buffers))


def test_bottleneck_has_simkds_size():
    for factor, wanted in ((2, 214_000), (4, 70_000), (8, 26_000)):
        method = SimKD(ConvNet(256), ConvNet(256), factor=factor)
        assert sum(p.numel() for p in method.connector.parameters()) == pytest.approx(wanted, rel=0.02)
        assert len(method.connector) == 9 and isinstance(method.connector[-1], nn.ReLU)
        assert all(m.bias is None for m in method.connector if isinstance(m, nn.Conv2d))


def test_own_connector():
    images, labels = batch()
    own = nn.Conv2d(6, 10, 1).double()
    method = SimKD(*pair(), connector=own).train()
    assert method.connector is own
    assert learning(method, method(images, labels).loss) == {"student", "connector"}
    for wrong in (nn.Conv2d(6, 9, 1), nn.Sequential(nn.Flatten(), nn.Linear(54, 10))):
        with pytest.raises(ValueError, match=r"connector must give the teacher's \(M, 10, H, W\), got \(8, "):
            SimKD(*pair(), connector=wrong.double())(images, labels)
    with pytest.raises(ValueError, match=r"connector must be an nn.Module or one of .*, got 'mine'"):
        SimKD(*pair(), connector="mine")
    for factor in (0, 11):
        with pytest.raises(
            ValueError, match=f"factor must be from 1 to the teacher's width 10, got {factor}"
        ):
            SimKD(*pair(), factor=factor)


def test_linear_connector_is_a_convolution():
    torch.manual_seed(0)
    linear, x = Linear(6, 10), torch.randn(2, 6, 3, 4)
    wanted = F.conv2d(x, linear.map.weight[:, :, None, None], linear.map.bias)
    torch.testing.assert_close(linear(x), wanted)


def test_a_classifier_with_something_behind_it():
    """Its features are not what makes the teacher's logits: these methods cannot use it."""

    class Scaled(ConvNet):
        def forward(self, x):
            return 2 * super().forward(x)

    images, labels = batch()
    for name in ("simkd", "ijckd", "atsc", "srrl"):
        method = make(name, ConvNet(6).double(), Scaled(6).double())
        with pytest.raises(
            ValueError, match=r"teacher's output must be that of its classifier 'fc', got one that"
        ):
            method(images, labels)
    # The student's is not used.
    student = Scaled(6).double()
    method = make("simkd", student, ConvNet(6).double())
    method(images, labels)
    method.eval()
    torch.testing.assert_close(method.deployable().eval()(images), method.predict(images))
    assert make("kd", student, Scaled(6).double())(images, labels).loss.isfinite()


# ATSC


def teacher_map(m, images):
    return m.maps(images)


@labelled
@pytest.mark.parametrize("kind", PAIRS)
def test_atsc(kind, labelled):
    """Both sides get gradients, and the anchor holds the weights."""
    images, labels = batch(labelled)
    method = make("atsc", *pair(kind), anchor_weight=0.5)
    assert method(images, labels).terms["anchor"] == 0
    start = [p.detach().clone() for p in method.teacher.parameters()]
    with torch.no_grad():
        for p in method.teacher.parameters():
            p += 0.1 * torch.randn_like(p)

    def formula(m):
        g, y = m.connector(m.student.maps(images)), m.teacher.maps(images)
        far = sum((p - q).square().sum() for p, q in zip(m.teacher.parameters(), start) if p.dim() > 1)
        return {"feature_mse": F.mse_loss(*at_one_size(g, y)), "anchor": 0.5 * far}

    check(method, formula, images, labels)
    assert method(images, labels).terms["anchor"] > 0
    assert learning(method, method(images, labels).loss) == {"student", "teacher", "teacher.fc", "connector"}
    grads = gradients(method, method(images, labels).loss)
    assert grads["student.fc.weight"] is None and grads["teacher.fc.weight"].any()
    assert grads["teacher.fc.bias"] is None or not grads["teacher.fc.bias"].any()
    if kind != "mlp":
        assert grads["teacher.stem.1.bias"].any()  # free of the anchor, and learning
    trained = names(method, method.parameters_to_train())
    assert {n for n, p in method.named_parameters()} - trained == {"student.fc.weight", "student.fc.bias"}


def test_atsc_anchors_all_that_it_is_asked_to():
    images, labels = batch()
    for least in (0, 1, 2, 5):
        method = make("atsc", *pair(), anchor_min_dim=least)
        far = 0.0
        with torch.no_grad():
            for p in method.teacher.parameters():
                p += 0.1
                far += 0.01 * p.numel() if p.dim() >= least else 0.0
        assert method(images, labels).terms["anchor"].item() == pytest.approx(far)


@labelled
def test_atsc_with_the_other_terms(labelled):
    """The head learns from both sides' logits."""
    images, labels = batch(labelled)
    weights = {"hard_weight": 0.5, "logit_weight": 0.7, "feature_weight": 0.9, "soft_weight": 0.3}
    method = make("atsc", *pair(), **weights, temperature=3.0)

    def formula(m):
        g, y = m.connector(m.student.maps(images)), m.teacher.maps(images)
        z, z_t = m.teacher.fc(g.mean((2, 3))), m.teacher.fc(y.mean((2, 3)))
        return {
            "hard": 0.5 * cross_entropy(z, labels),
            "soft": 0.3 * kl(z, z_t, 3.0),
            "logit_mse": 0.7 * F.mse_loss(z, z_t),
            "feature_mse": 0.9 * F.mse_loss(g, y),
            "anchor": 0 * z.sum(),
        }

    check(method, formula, images, labels)


@pytest.mark.parametrize("training", [True, False])
def test_atsc_teachers_mode(training):
    images, labels = batch()
    method = make("atsc", *pair(), teacher_training=training)
    assert method.teacher.training == training and method.teacher.stem[1].training == training
    counts = method.teacher.stem[1].num_batches_tracked
    before = counts.item()
    method(images, labels)
    method.upkeep_loss(images, labels).backward()
    assert counts - before == (2 if training else 0)
    assert not method.eval().teacher.training


@pytest.mark.parametrize(("labelled", "update"), [(BATCH, "bias"), (3, "bias"), (BATCH, "full"), (3, "full")])
def test_atsc_upkeep(update, labelled):
    images, labels = batch(labelled)
    method = make("atsc", *pair(), head_update=update)
    twin = copy.deepcopy(method)
    loss = method.upkeep_loss(images, labels)
    with torch.no_grad():
        y = twin.teacher.maps(images).mean((2, 3))[: len(labels)]
    wanted = F.cross_entropy(twin.teacher.fc(y), labels)
    torch.testing.assert_close(loss, wanted)
    got, true = gradients(method, loss), gradients(twin, wanted)
    held = {"bias": ["teacher.fc.bias"], "full": ["teacher.fc.weight", "teacher.fc.bias"]}[update]
    assert [name for name, grad in got.items() if grad is not None] == held
    for name in held:
        torch.testing.assert_close(got[name], true[name])
    assert names(method, method.upkeep_parameters()) == set(held)
    for (name, x), y in zip(method.named_buffers(), twin.buffers()):  # the batch norms saw the batch
        torch.testing.assert_close(x, y, msg=name)


def test_atsc_without_upkeep():
    images, labels = batch()
    method = make("atsc", *pair(), head_update="none")
    assert method.upkeep_parameters() == [] and not method.upkeep_loss(images, labels).requires_grad
    student, teacher = pair()
    teacher.fc = nn.Linear(10, CLASSES, bias=False).double()
    method = make("atsc", student, teacher)
    assert method.upkeep_parameters() == [] and not method.upkeep_loss(images, labels).requires_grad
    assert learning(method, method(images, labels).loss) == {"student", "connector", "teacher"}


def test_atsc_upkeep_without_labels():
    images, labels = batch(0)
    method = make("atsc", *pair())
    buffers = [x.clone() for x in method.buffers()]
    loss = method.upkeep_loss(images, labels)
    assert loss == 0
    assert not gradients(method, loss)["teacher.fc.bias"].any()
    assert all(torch.equal(x, y) for x, y in zip(method.buffers(), buffers))


@labelled
def test_atsc_of_several_teachers(labelled):
    """Losses and logits are means over the teachers; each has its connector and its classifier."""
    images, labels = batch(labelled)
    student, first = pair()
    _, second = pair("larger", seed=1)
    method = ATSC(student, [first, second], anchor_weight=2.0, connector="conv").train()
    starts = [[p.detach().clone() for p in t.parameters()] for t in (first, second)]
    with torch.no_grad():
        for p in method.teachers.parameters():
            p += 0.1 * torch.randn_like(p)

    def formula(m):
        f, maps, far = m.student.maps(images), [], []
        for teacher, connector, start in zip(m.teachers, m.connectors, starts):
            maps.append(F.mse_loss(*at_one_size(connector(f), teacher.maps(images))))
            far.append(
                sum((p - q).square().sum() for p, q in zip(teacher.parameters(), start) if p.dim() > 1)
            )
        return {"feature_mse": sum(maps) / 2, "anchor": 2 * sum(far) / 2}

    check(method, formula, images, labels)
    parameters = method.parameters_to_train()
    assert len({id(p) for p in parameters}) == len(parameters)
    assert len(method.upkeep_parameters()) == 2
    twin = copy.deepcopy(method)
    loss = method.upkeep_loss(images, labels)
    with torch.no_grad():
        heads = [t.fc(t.maps(images).mean((2, 3)))[: len(labels)] for t in twin.teachers]
    torch.testing.assert_close(loss, sum(F.cross_entropy(z, labels) for z in heads) / 2)
    method.eval()
    with torch.no_grad():
        f = method.student.maps(images)
        logits = [t.fc(c(f).mean((2, 3))) for t, c in zip(method.teachers, method.connectors)]
        torch.testing.assert_close(method.predict(images), sum(logits) / 2)
        torch.testing.assert_close(method(images, labels).logits, sum(logits) / 2)
        torch.testing.assert_close(method.deployable().eval()(images), sum(logits) / 2)


def test_atsc_refuses():
    student, teacher = pair()
    with pytest.raises(ValueError, match=r"teacher must be a model or several, got none"):
        ATSC(student, [])
    with pytest.raises(ValueError, match=r"head_update must be one of bias, full, none, got 'weight'"):
        ATSC(student, teacher, head_update="weight")
    with pytest.raises(
        ValueError, match=r"connector must be a name where there are several teachers, got a module"
    ):
        ATSC(student, [teacher, MLP(10)], connector=nn.Identity())
    with pytest.raises(ValueError, match=r"student must have the teacher's 4 classes, got 5"):
        ATSC(student, [teacher, ConvNet(6, classes=4)])
    images, labels = batch()
    method = ATSC(student, teacher)
    with pytest.raises(
        ValueError, match=r"teacher must be None: a teacher that learns has no outputs to keep"
    ):
        method(images, labels, method.look_at_teacher(images))
