"""KD, DKD, NKD, LSKD, CTKD, RCO, TAKD and DGKD against their formulas, step by step in float64."""

from __future__ import annotations

import math

import pytest
import torch
from methods import (
    BATCH,
    CLASSES,
    PAIRS,
    ConvNet,
    batch,
    check,
    cross_entropy,
    gradients,
    kl,
    learning,
    make,
    pair,
    seen,
)
from torch import Tensor, nn

from kdkernels.methods import CTKD, DGKD, DKD, KD, LSKD, NKD, RCO, TAKD, chain

labelled = pytest.mark.parametrize("labelled", [BATCH, 3], ids=["all", "some"])


def targets(labels: Tensor, teacher: Tensor) -> Tensor:
    """An image without a label counts for what the teacher takes it for."""
    return torch.cat([labels, teacher[len(labels) :].argmax(1)])


def decoupled(z: Tensor, z_t: Tensor, y: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """T² TCKD and T² NCKD."""
    p, q = (z_t / t).softmax(1), (z / t).softmax(1)
    rows = torch.arange(len(y))
    b_t, b_s = p[rows, y], q[rows, y]
    tckd = b_t * (b_t / b_s).log() + (1 - b_t) * ((1 - b_t) / (1 - b_s)).log()
    others = ~nn.functional.one_hot(y, z.shape[1]).bool()
    rest_p, rest_q = ((x[others].view(len(y), -1) / t).softmax(1) for x in (z_t, z))
    nckd = (rest_p * (rest_p / rest_q).log()).sum(1)
    return t * t * tckd.mean(), t * t * nckd.mean()


def standardized(z: Tensor) -> Tensor:
    return (z - z.mean(1, keepdim=True)) / (1e-7 + z.std(1, keepdim=True))


@labelled
@pytest.mark.parametrize("kind", PAIRS)
def test_kd(kind, labelled):
    images, labels = batch(labelled)

    def formula(m):
        z, (z_t, *_) = m.student(images), seen(m.teacher, images)
        return {"hard": 0.3 * cross_entropy(z, labels), "soft": 0.6 * kl(z, z_t, 3.0)}

    method = make("kd", *pair(kind), temperature=3.0, soft_weight=0.6, hard_weight=0.3)
    check(method, formula, images, labels)


def test_the_defaults_are_the_papers():
    images, labels = batch()
    student, teacher = pair()

    def loss(method):
        method.eval()
        return method(images, labels).loss

    z, (z_t, *_) = student.eval()(images), seen(teacher, images)
    hard = cross_entropy(z, labels)
    first, second = decoupled(z, z_t, labels, 4.0)
    near = torch.testing.assert_close
    near(loss(KD(student, teacher)), 0.1 * hard + 0.9 * kl(z, z_t, 4.0))
    near(loss(DKD(student, teacher)), hard + first + 8 * second)
    near(loss(LSKD(student, teacher)), 0.1 * hard + 9 * kl(standardized(z), standardized(z_t), 2.0))
    near(loss(TAKD(student, teacher)), 0.5 * hard + 0.5 * kl(z, z_t, 5.0))
    near(loss(CTKD(student, teacher)), 0.1 * hard + 0.9 * kl(z, z_t, 1 + 20 / (1 + math.exp(-1))))
    near(loss(DGKD(student, teacher)), kl(z, z_t, 5.0))


@labelled
def test_dkd(labelled):
    images, labels = batch(labelled)
    method = make("dkd", *pair(), alpha=0.7, beta=2.0, temperature=2.0, soft_weight=0.9, warmup=4)
    for epoch, ramp in ((1, 0.25), (3, 0.75), (4, 1.0), (9, 1.0)):

        def formula(m, ramp=ramp):
            z, (z_t, *_) = m.student(images), seen(m.teacher, images)
            first, second = decoupled(z, z_t, targets(labels, z_t), 2.0)
            soft = ramp * 0.9 * (0.7 * first + 2.0 * second)
            return {"hard": cross_entropy(z, labels), "soft": soft}

        method.start_epoch(epoch, 10)
        check(method, formula, images, labels)
    assert make("dkd", *pair(), warmup=0).soft_weight_now() == 1


@labelled
def test_nkd(labelled):
    images, labels = batch(labelled)

    def formula(m):
        z, (z_t, *_) = m.student(images), seen(m.teacher, images)
        y = targets(labels, z_t)
        rows = torch.arange(BATCH)
        target = -(z_t.softmax(1)[rows, y] * z.log_softmax(1)[rows, y]).mean()
        others = ~nn.functional.one_hot(y, CLASSES).bool()
        p, q = (x[others].view(BATCH, -1) / 3 for x in (z_t, z))
        rest = -(p.softmax(1) * q.log_softmax(1)).sum(1).mean()
        return {"hard": cross_entropy(z, labels), "soft": target + 3.5 * 9 * rest}

    check(make("nkd", *pair(), temperature=3.0, gamma=3.5), formula, images, labels)


@labelled
@pytest.mark.parametrize("name", ["lskd", "dkd"])
def test_standardized_logits(name, labelled):
    """The cross-entropy stays on the logits as they are."""
    images, labels = batch(labelled)

    def formula(m):
        z, (z_t, *_) = m.student(images), seen(m.teacher, images)
        y, s, t = targets(labels, z_t), standardized(z), standardized(z_t)
        if name == "lskd":
            return {"hard": 0.1 * cross_entropy(z, labels), "soft": 9 * kl(s, t, 2.0)}
        first, second = decoupled(s, t, y, 4.0)
        return {"hard": cross_entropy(z, labels), "soft": first + 8 * second}

    options = {"standardize": True} if name == "dkd" else {}
    check(make(name, *pair(), **options), formula, images, labels)


@labelled
@pytest.mark.parametrize("soft", ["kl", "dkd"])
def test_ctkd(soft, labelled):
    """T in both softmaxes and in T²; theta's gradient reversed, ever more strongly."""
    images, labels = batch(labelled)
    method = make("ctkd", *pair(), soft=soft, alpha=0.5, beta=2.0).double()
    with torch.no_grad():
        method.learned.theta.fill_(-1.5)  # where the sigmoid is not flat
    strengths = []
    for epoch in (1, 2, 3, 10, 12):
        strength = 0.5 - 0.5 * math.cos(math.pi * min(epoch, 10) / 10)
        strengths.append(-strength)

        def formula(m, strength=strength):
            theta = m.learned.theta
            theta.register_hook(lambda g: -strength * g)
            t = 1 + 20 * theta.sigmoid()
            z, (z_t, *_) = m.student(images), seen(m.teacher, images)
            if soft == "kl":
                d = kl(z, z_t, t)
            else:
                first, second = decoupled(z, z_t, targets(labels, z_t), t)
                d = 0.5 * first + 2 * second
            return {"hard": 0.1 * cross_entropy(z, labels), "soft": 0.9 * d}

        method.start_epoch(epoch, 240)
        check(method, formula, images, labels)
    assert strengths[:3] == pytest.approx([-0.024, -0.095, -0.206], abs=5e-4) and strengths[-1] == -1


def test_ctkd_ascends():
    images, labels = batch()
    method = make("ctkd", *pair(), temperature=99.0).double()  # of no use: T is learnt
    method.start_epoch(10, 240)
    before = method(images, labels).terms["soft"]
    theta = method.learned.theta
    gradient = gradients(method, method(images, labels).loss)["learned.theta"]
    with torch.no_grad():
        theta -= 0.1 * gradient / gradient.abs()  # as an optimizer does
    assert method(images, labels).terms["soft"] > before
    assert sum(p is theta for p in method.parameters_to_train()) == 1
    assert method.monitor(images, labels) == {
        "temperature": pytest.approx(1 + 20 / (1 + math.exp(-theta.item())))
    }


def test_ctkd_before_the_first_epoch_is_as_in_it():
    assert make("ctkd", *pair()).strength == pytest.approx(0.0245, abs=1e-4)


@labelled
@pytest.mark.parametrize("element_mean", [False, True])
def test_takd(element_mean, labelled):
    images, labels = batch(labelled)

    def formula(m):
        z, (z_t, *_) = m.student(images), seen(m.teacher, images)
        soft = 0.3 * kl(z, z_t, 5.0) / (CLASSES if element_mean else 1)
        return {"hard": 0.7 * cross_entropy(z, labels), "soft": soft}

    check(make("takd", *pair(), soft_weight=0.3, element_mean=element_mean), formula, images, labels)


def test_chain():
    assert chain("abcd") == [(1, (0,)), (2, (1,)), (3, (2,))]
    assert chain("abcd", dense=True) == [(1, (0,)), (2, (0, 1)), (3, (0, 1, 2))]
    with pytest.raises(ValueError, match=r"a chain must have a teacher and a student at least, got 1 models"):
        chain("a")


def several(count: int = 4) -> tuple[nn.Module, list[nn.Module]]:
    student, _ = pair()
    return student, [pair(kind, seed)[1] for seed, kind in enumerate(["wider", "equal", "larger", "mlp"])][
        :count
    ]


@labelled
@pytest.mark.parametrize("element_mean", [False, True])
def test_dgkd(element_mean, labelled):
    images, labels = batch(labelled)
    student, teachers = several()
    generator = torch.Generator().manual_seed(3)
    method = DGKD(
        student, teachers, soft_weight=0.8, drop=2, element_mean=element_mean, generator=generator
    ).train()
    left_out = set()
    for _ in range(4):
        order = torch.randperm(4, generator=torch.Generator().set_state(generator.get_state()))
        kept = order[2:].tolist()
        left_out.update(set(range(4)) - set(kept))

        def formula(m, kept=kept):
            z = m.student(images)
            soft = sum(kl(z, seen(m.teachers[j], images)[0], 5.0) for j in kept)
            soft = 0.8 * soft / (CLASSES if element_mean else 1)
            return {"soft": soft, "hard": (1 - 0.8) * cross_entropy(z, labels)}

        check(method, formula, images, labels)
    assert len(left_out) > 2


def test_dgkd_leaves_teachers_out_in_training_only():
    images, labels = batch()
    student, teachers = several(3)
    method = DGKD(student, teachers, drop=2).eval()
    z = student(images)
    every = [kl(z, seen(t, images)[0], 5.0) for t in teachers]
    torch.testing.assert_close(method(images, labels).loss, sum(every))
    known = method.look_at_teachers(images)
    torch.testing.assert_close(method(images, labels, known).loss, sum(every))
    method.train()
    student.eval()  # the same logits
    found = {method(images, labels, known).loss.item() for _ in range(30)}
    assert sorted(found) == pytest.approx(sorted(x.item() for x in every))


def test_dgkd_does_not_run_a_teacher_that_is_left_out():
    images, labels = batch()
    student, teachers = several(3)
    method = DGKD(student, teachers, drop=1).train()
    method(images, labels)
    method.look_at_teachers(images)  # the first look
    runs = []
    for i, t in enumerate(teachers):
        t.register_forward_hook(lambda *_, i=i: runs.append(i))
    method(images, labels)
    assert len(runs) == 2 == len(set(runs))


def test_dgkd_of_one_teacher_drops_none():
    images, labels = batch()
    method = make("kd", *pair(), temperature=5.0, soft_weight=1.0, hard_weight=0.0)
    dense = DGKD(*pair()).train()
    torch.testing.assert_close(dense(images, labels).loss, method(images, labels).loss)
    assert learning(dense, dense(images, labels).loss) == {"student", "student.fc"}


def test_dgkd_refuses():
    student, teachers = several(2)
    with pytest.raises(ValueError, match=r"teachers must be one model at least, got none"):
        DGKD(student, [])
    for drop in (-1, 2):
        with pytest.raises(ValueError, match=f"drop must leave one of the 2 teachers at least, got {drop}"):
            DGKD(student, teachers, drop=drop)
    with pytest.raises(ValueError, match=r"student must have the teacher's 4 classes, got 5"):
        DGKD(student, [teachers[0], ConvNet(6, classes=4)])
    method = DGKD(student, teachers)
    images, labels = batch()
    with pytest.raises(TypeError, match=r"teacher must be the logits of all teachers"):
        method(images, labels, method.look_at_teacher(images))
    with pytest.raises(ValueError, match=r"teacher must be the logits of all 2 teachers, got 1"):
        method(images, labels, method.look_at_teachers(images)[:1])


def checkpoints(teacher: nn.Module, count: int) -> list[dict[str, Tensor]]:
    return [
        {name: x + 0.1 * i if x.is_floating_point() else x for name, x in teacher.state_dict().items()}
        for i in range(count)
    ]


def test_rco(tmp_path):
    """The anchor of each epoch teaches; from files and from state dicts."""
    student, teacher = pair()
    anchors = checkpoints(teacher, 3)
    torch.save(anchors[1], tmp_path / "1.pt")
    images, labels = batch()
    method = RCO(student, teacher, anchors=[anchors[0], tmp_path / "1.pt", anchors[2]]).train()
    for epoch in range(1, 9):
        method.start_epoch(epoch, 8)
        wanted = anchors[[0, 0, 0, 1, 1, 1, 2, 2][epoch - 1]]
        assert all(torch.equal(x, wanted[name]) for name, x in teacher.state_dict().items())
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())

    def formula(m):
        z, (z_t, *_) = m.student(images), seen(m.teacher, images)
        return {"hard": 0.1 * cross_entropy(z, labels), "soft": 0.9 * kl(z, z_t, 4.0)}

    check(method, formula, images, labels)
    assert [method.anchor_of(e, 2) for e in (1, 2, 3)] == [
        0,
        1,
        2,
    ]  # more anchors than epochs: some are left out
    method = RCO(student, teacher, anchors=anchors, epochs=[1, 2, 7])
    assert [method.anchor_of(e, 8) for e in range(1, 9)] == [0, 1, 1, 1, 1, 1, 2, 2]


def test_rco_loads_an_anchor_once(tmp_path, monkeypatch):
    student, teacher = pair()
    method = RCO(student, teacher, anchors=checkpoints(teacher, 2))
    loaded = []
    monkeypatch.setattr(teacher, "load_state_dict", lambda x: loaded.append(x))
    for epoch in range(1, 7):
        method.start_epoch(epoch, 6)
    assert loaded == method.anchors


def test_rco_refuses(tmp_path):
    student, teacher = pair()
    anchors = checkpoints(teacher, 2)
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save(anchors[0], good)
    bad.write_bytes(good.read_bytes()[:-300])
    text, other, list_ = tmp_path / "text.pt", tmp_path / "other.pt", tmp_path / "list.pt"
    text.write_text("no checkpoint")
    torch.save({"model": anchors[0]}, other)
    torch.save([1], list_)
    wide = {**anchors[1], "fc.bias": torch.zeros(7)}
    for anchor, message in (
        (tmp_path / "none.pt", "anchor 1, .*none.pt, is no file"),
        (bad, "anchor 1, .*bad.pt, is damaged or no file of torch.save"),
        (text, "anchor 1, .*text.pt, is damaged"),
        (list_, "anchor 1, .*list.pt, must hold a state dict, got list"),
        (other, "anchor 1, .*other.pt, is not of this teacher: it lacks fc.bias"),
        (wide, r"anchor 1 is not of this teacher: fc.bias is \(7,\), not \(5,\)"),
        ({**anchors[1], "more": torch.zeros(1)}, "anchor 1 is not of this teacher: it has more"),
    ):
        with pytest.raises(ValueError, match=message):
            RCO(student, teacher, anchors=[good, anchor])
    method = RCO(student, teacher, anchors=[anchors[0], good], epochs=[1, 2])
    good.write_bytes(bad.read_bytes())  # while training
    with pytest.raises(ValueError, match=r"anchor 1, .* is damaged"):
        method.start_epoch(2, 3)
    assert method.current is None
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    with pytest.raises(ValueError, match=r"anchors must be one state dict of the teacher at least, got none"):
        RCO(student, teacher, anchors=[])
    for epochs in ([1], [2, 3], [1, 1], [1, 3, 2]):
        with pytest.raises(ValueError, match=r"epochs must be 2 rising numbers, the first 1"):
            RCO(student, teacher, anchors=anchors, epochs=epochs)


def test_wrong_options():
    with pytest.raises(ValueError, match=r"warmup must be a number of epochs, 0 or more, got -1"):
        DKD(*pair(), warmup=-1)
    with pytest.raises(ValueError, match=r"soft must be 'kl' or 'dkd', got 'nkd'"):
        CTKD(*pair(), soft="nkd")
    with pytest.raises(ValueError, match=r"reversal_epochs must be positive, got 0"):
        CTKD(*pair(), reversal_epochs=0)
    assert NKD(*pair()).gamma == 1.5
