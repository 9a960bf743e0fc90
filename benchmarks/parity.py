"""`python -m benchmarks.parity`: the peers' formulas and ours, regime by regime, against float64.

Writes parity.json and parity.md to benchmarks/results. A peer that is a package runs as it is where it is installed
(`pip install 'kdkernels[peers]'`), Liger's Triton kernel of the JSD in Triton's interpreter where TRITON_INTERPRET=1 is
set; what does not run here is computed "by formula", and the table says so. Ours is what backend=None takes.

The truth is our reference in float64. That it is the peer's loss too is shown by the peer's formula in float64, on
plain data and, for the masked classes, on data that never had those classes.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels
from benchmarks import formulas, peers
from benchmarks.errors import NEGLIGIBLE, number, relative
from benchmarks.report import RESULTS, lines_of

IGNORED = -100
Theirs = Callable[[Tensor, Tensor, Tensor], Tensor]  # student, teacher, labels


class Regime(NamedTuple):
    """One kind of data, and what is particular about it."""

    shape: tuple[int, int]
    dtype: torch.dtype
    scale: float = 3.0
    noise: float = 0.0  # the student is the teacher but for this relative noise
    masked: bool = False  # every fifth class is −inf on both sides
    ignored: bool = False  # no row counts
    constant: bool = False  # the student's first row is constant, as a new classifier's are


FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
REGIMES = {
    "plain": Regime((32, 100), FLOAT32),
    "near": Regime((4, 32_000), FLOAT32, noise=1e-3),
    "−inf": Regime((32, 100), FLOAT32, masked=True),
    "far": Regime((32, 100), FLOAT32, scale=1e3),
    "two classes": Regime((32, 2), FLOAT32),
    "constant row": Regime((32, 100), FLOAT32, constant=True),
    "all ignored": Regime((32, 100), FLOAT32, ignored=True),
    "bfloat16": Regime((32, 100), BFLOAT16),
    "bfloat16, near": Regime((4, 32_000), BFLOAT16, noise=1e-2),
}
NOTES = {
    "plain": "N(0, 3²) logits, 32×100",
    "near": "the student is its teacher but for relative noise of 1e-3, 4×32000",
    "−inf": "every fifth class is −inf on both sides",
    "far": "N(0, 1000²) logits",
    "two classes": "32×2; standardised, two classes are ±1/√2, and only the 1e-7 in the formula has a gradient",
    "constant row": "one row of the student is constant, where LSKD's formula has a gradient of 1e7 and ours of 0",
    "all ignored": "no row counts",
    "bfloat16": "plain, in bfloat16",
    "bfloat16, near": "noise of 1e-2, 4×32000, in bfloat16",
}


def data(regime: Regime) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(regime.shape, generator=generator, dtype=torch.float64)

    rows, classes = regime.shape
    teacher = (regime.scale * normal()).to(regime.dtype)
    student = regime.scale * normal()
    if regime.noise:
        student = teacher.double() * (1 + regime.noise * normal())
    student = student.to(regime.dtype)
    if regime.constant:
        student[0] = 0.5
    labels = torch.randint(classes, (rows,), generator=generator)
    if regime.masked:
        student[:, ::5] = teacher[:, ::5] = -math.inf
        labels = torch.where(labels % 5 == 0, labels + 1, labels)
    if regime.ignored:
        labels = torch.full_like(labels, IGNORED)
    return student, teacher, labels


class _Given(torch.autograd.Function):
    """A value with the gradient that a kernel gives for it."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * upstream, None, None


def statistics(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def liger_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    x, y = (F.log_softmax(z, -1) for z in (student, teacher))
    p = statistics(y).exp()
    value = (p * (statistics(y) - statistics(x))).sum() / x.shape[0]
    return _Given.apply(x, value.detach(), (-p / x.shape[0]).to(x.dtype))


def liger_jsd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    counts = labels != IGNORED
    x, y = (F.log_softmax(z, -1) for z in (student, teacher))
    if INTERPRETED and student.dtype == FLOAT32:
        return INTERPRETED.LigerJSD(beta=0.5)(x, y, labels)
    log_q, log_p = statistics(x), statistics(y)
    top = torch.maximum(log_q, log_p)
    log_m = top + (0.5 * (log_p - top).exp() + 0.5 * (log_q - top).exp()).log()
    of_student = 0.5 * log_q.exp() * (log_q - log_m)
    each = 0.5 * log_p.exp() * (log_p - log_m) + of_student
    scale = 1 / counts.sum().clamp(min=1)
    each, gradient = (torch.where(counts[:, None], z * scale, 0) for z in (each, of_student))
    return _Given.apply(x, each.sum().to(x.dtype).detach(), gradient.detach().to(x.dtype))


def liger_tvd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    q, p = (F.softmax(z, -1) for z in (student, teacher))
    scale = 1.0 / int((labels != IGNORED).sum())
    value = statistics(0.5 * (q - p).abs()).sum() * scale
    return _Given.apply(q, value.detach(), (0.5 * scale * (q - p).sign()).detach())


def liger_chunk(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    count = (labels != IGNORED).sum().clamp(min=1)
    if peers.LIGER is None:
        return trl_jsd(student, teacher, labels)
    function = peers.LIGER.LigerFusedLinearJSDFunction.distillation_loss_fn
    return function(student, teacher, beta=0.5, target=labels, ignore_index=IGNORED) / count


def trl_jsd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Every term of formulas.jsd, so that rows can be left out."""
    counts = labels != IGNORED
    log_q, log_p = (F.log_softmax(z, -1) for z in (student, teacher))
    half = torch.tensor(0.5, dtype=log_q.dtype)
    log_m = torch.logsumexp(torch.stack([log_q + half.log(), log_p + half.log()]), 0)
    of_teacher, of_student = (F.kl_div(log_m, x, reduction="none", log_target=True) for x in (log_p, log_q))
    return (half * of_teacher + (1 - half) * of_student)[counts].sum() / counts.sum().clamp(min=1)


def trl_topk(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    counts = labels != IGNORED
    log_probs, indices = top(teacher)
    terms = formulas.topk(student[counts], log_probs[counts], indices[counts], temperature=1.0)
    return terms if counts.any() else 0 * student.sum()


def torchdistill(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    if peers.TORCHDISTILL is None:
        return formulas.hard_and_soft(student, teacher, labels, **KD)
    return peers.torchdistill_kd(**KD)["torchdistill"](student, teacher, labels)


def torchdistill_standardized(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    if peers.TORCHDISTILL is None:
        return formulas.standardized_kl(student, teacher, **STANDARDIZED)
    return peers.torchdistill_standardized(**STANDARDIZED)["torchdistill"](student, teacher)


def cut_nkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """cls_KD: the target's column is cut out."""
    y = labels[:, None]
    target_part = F.softmax(teacher, -1).gather(-1, y) * F.log_softmax(student, -1).gather(-1, y)
    others = torch.ones_like(student, dtype=torch.bool).scatter(-1, y, False)
    s, t = (x[others].view(x.shape[0], -1) for x in (student, teacher))
    rest = (F.softmax(t, -1) * F.log_softmax(s, -1)).sum(-1)
    return -target_part.mean() - 1.5 * rest.mean()


KD = {"temperature": 4.0, "hard": 0.1, "soft": 0.9}
STANDARDIZED = {"temperature": 2.0, "weight": 9.0}
DKD = {"alpha": 1.0, "beta": 8.0, "temperature": 4.0}


def kd_ours(s: Tensor, t: Tensor, y: Tensor, backend: str | None) -> Tensor:
    return kdkernels.distillation_loss(s, t, y, temperature=4.0, backend=backend)


def standardized_ours(s: Tensor, t: Tensor, y: Tensor, backend: str | None) -> Tensor:
    options = {"soft_weight": 9.0, "hard_weight": 0.0, "standardize": True}
    return kdkernels.distillation_loss(s, t, temperature=2.0, **options, mask=y != IGNORED, backend=backend)


def dkd_ours(s: Tensor, t: Tensor, y: Tensor, backend: str | None) -> Tensor:
    return kdkernels.distillation_loss(
        s, t, y, soft="dkd", temperature=4.0, soft_weight=1.0, hard_weight=0.0, backend=backend
    )


def nkd_ours(s: Tensor, t: Tensor, y: Tensor, backend: str | None) -> Tensor:
    return kdkernels.nkd(s, t, y, backend=backend)


def kl_ours(s: Tensor, t: Tensor, y: Tensor, backend: str | None) -> Tensor:
    return kdkernels.kl_div(s, t, mask=y != IGNORED, backend=backend)


def jsd_ours(s: Tensor, t: Tensor, y: Tensor, backend: str | None) -> Tensor:
    return kdkernels.jsd(s, t, mask=y != IGNORED, backend=backend)


def tvd_ours(s: Tensor, t: Tensor, y: Tensor, backend: str | None) -> Tensor:
    return kdkernels.tvd(s, t, mask=y != IGNORED, backend=backend)


def topk_ours(s: Tensor, t: Tensor, y: Tensor, backend: str | None) -> Tensor:
    return kdkernels.topk_kl_div(s, *top(t), mask=y != IGNORED, backend=backend)


def top(teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The half of the classes that a teacher likes best, 64 at most, as a float32 cache holds them."""
    live = int((teacher[0] > -math.inf).sum())
    log_probs, indices = F.log_softmax(teacher.double(), -1).float().topk(min(64, live // 2))
    return log_probs.to(statistics(teacher).dtype), indices


def _interpreted() -> Any:
    """Liger's Triton kernels, where they run: None without the package or the interpreter."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return None
    return peers.library("liger_kernel.transformers")[0]


INTERPRETED = _interpreted()


class Peer(NamedTuple):
    name: str
    how: str
    loss: str
    theirs: Theirs
    ours: Callable[..., Tensor]
    in_float64: Theirs  # the formula, where the code itself is float32 only
    ignores: bool = True  # it can leave rows out


def _package(name: str) -> str:
    version = peers.versions().get(name)
    return f"{name} {version}" if version else "by formula"


def _kernel() -> str:
    formula = "by formula of 0.8.5"
    return f"0.8.5 interpreted, bfloat16 {formula}" if INTERPRETED else formula


def _eager_kl(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return formulas.kl(s, t)


def _dkd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return formulas.dkd(s, t, y, **DKD)


PEERS = [
    Peer("PyTorch F.kl_div", "torch", "kl_div", _eager_kl, kl_ours, _eager_kl, ignores=False),
    Peer("Liger KL", "by formula of 0.8.5", "kl_div", liger_kl, kl_ours, _eager_kl, ignores=False),
    Peer(
        "torchdistill KDLoss",
        _package("torchdistill"),
        "distillation_loss",
        torchdistill,
        kd_ours,
        torchdistill,
    ),
    Peer(
        "torchdistill LogitStdKDLoss",
        _package("torchdistill"),
        "distillation_loss, standardize",
        torchdistill_standardized,
        standardized_ours,
        torchdistill_standardized,
        ignores=False,
    ),
    Peer("mdistiller DKD", "by formula", "dkd", _dkd, dkd_ours, _dkd),
    Peer("cls_KD NKD", "by formula", "nkd", cut_nkd, nkd_ours, cut_nkd),
    Peer("TRL GKD", "by formula of 1.16.0", "jsd", trl_jsd, jsd_ours, trl_jsd),
    Peer("Liger chunked JSD", _package("liger-kernel"), "jsd", liger_chunk, jsd_ours, liger_chunk),
    Peer("Liger JSD", _kernel(), "jsd", liger_jsd, jsd_ours, liger_jsd),
    Peer("Liger TVD", "by formula of 0.8.5", "tvd", liger_tvd, tvd_ours, liger_tvd),
    Peer("TRL top-k with tail", "by formula of 1.16.0", "topk_kl_div", trl_topk, topk_ours, trl_topk),
]


def run(loss: Callable[..., Tensor], student: Tensor, *rest: Any) -> tuple[Tensor, Tensor] | str:
    """(value, gradient), or the name of the exception."""
    leaf = student.detach().clone().requires_grad_()
    try:
        value = loss(leaf, *rest)
        [gradient] = torch.autograd.grad(value, leaf)
    except Exception as error:
        return type(error).__name__
    return value.detach().double(), gradient.double()


def errors(result: tuple[Tensor, Tensor] | str, truth: tuple[Tensor, Tensor]) -> list[float] | str:
    return result if isinstance(result, str) else [relative(*pair) for pair in zip(result, truth)]


def right(found: list[float] | str, dtype: torch.dtype) -> bool:
    """Value and gradient to 1e-4, or 4 eps of a half."""
    limit = max(1e-4, 4 * torch.finfo(dtype).eps)
    return not isinstance(found, str) and all(error <= limit for error in found)


def same_loss(peer: Peer) -> list[float]:
    """How far the peer's formula in float64 is from the truth: plain, and with the −inf classes cut out."""
    distances = []
    for regime in (REGIMES["plain"], REGIMES["−inf"]):
        student, teacher, labels = data(regime)
        student, teacher = student.double(), teacher.double()
        truth = run(peer.ours, student, teacher, labels, "reference")
        live = (student[0] > -math.inf).nonzero()[:, 0]
        place = torch.full((student.shape[1],), IGNORED)
        place[live] = torch.arange(len(live))
        cut = run(peer.in_float64, student[:, live], teacher[:, live], place[labels])
        assert not isinstance(truth, str) and not isinstance(cut, str), (peer.name, truth, cut)
        whole = torch.zeros_like(student)
        whole[:, live] = cut[1]
        distances.append(max(relative(cut[0], truth[0]), relative(whole, truth[1])))
    return distances


def compare(peer: Peer, regime: Regime) -> dict[str, Any] | None:
    """The errors of one cell; None where the peer has no such thing."""
    if regime.ignored and not peer.ignores:
        return None
    student, teacher, labels = data(regime)
    truth = run(peer.ours, student.double(), teacher.double(), labels, "reference")
    assert not isinstance(truth, str), (peer.name, truth)
    theirs = errors(run(peer.theirs, student, teacher, labels), truth)
    ours = errors(run(peer.ours, student, teacher, labels, None), truth)
    verdict = {
        (True, True): "both",
        (False, True): "ours",
        (True, False): "theirs",
        (False, False): "neither",
    }
    return {
        "theirs": theirs,
        "ours": ours,
        "right": verdict[right(theirs, regime.dtype), right(ours, regime.dtype)],
    }


def cell(found: list[float] | str) -> str:
    return found if isinstance(found, str) else " / ".join(map(number, found))


def markdown(result: dict[str, Any]) -> str:
    rows: Iterable[dict[str, Any]] = result["peers"]
    mark = {"both": "=", "ours": "**ours**", "theirs": "theirs", "neither": "neither"}
    matrix, table = [], []
    for row in rows:
        cells = row["regimes"]
        marks = [mark[cells[r]["right"]] if cells[r] else "–" for r in REGIMES]
        matrix.append(
            [row["name"], row["how"], f"`{row['loss']}`", *(f"{x:.0e}" for x in row["same_loss"]), *marks]
        )
        table += [
            [row["name"], name, cell(found["theirs"]), cell(found["ours"]), mark[found["right"]]]
            for name, found in cells.items()
            if found
        ]
    lines = [
        f"torch {result['torch']}, kdkernels {result['kdkernels']} (backend {result['backend']}), "
        f"Python {result['python']}. Written by `python -m benchmarks.parity`.",
        "",
        "Who is right: = both, **ours** where only ours is, – where the peer has no such option. Right is a value and "
        'a gradient within 1e-4 of float64 (4 eps in bfloat16). "Same loss" is how far the peer\'s formula in '
        "float64 is from ours, on plain data and on data without the classes that are −inf.",
        "",
        *lines_of(["peer", "how it ran", "loss", "same loss", "without −inf", *REGIMES], matrix),
        "",
        *(f"- {name}: {note}." for name, note in NOTES.items()),
        "",
        f"Errors relative to float64 (norm; absolute where that is below {number(NEGLIGIBLE)}): value / gradient.",
        "",
        *lines_of(["peer", "data", "theirs", "ours", "right"], table),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    result = {
        "torch": torch.__version__,
        "kdkernels": kdkernels.__version__,
        "python": platform.python_version(),
        "backend": "cpu" if kdkernels.available_backends("cpu")["cpu"] == "available" else "reference",
        "peers": [
            {
                "name": peer.name,
                "how": peer.how,
                "loss": peer.loss,
                "same_loss": same_loss(peer),
                "regimes": {name: compare(peer, regime) for name, regime in REGIMES.items()},
            }
            for peer in PEERS
        ],
    }
    (RESULTS / "parity.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "parity.md").write_text(markdown(result))
    print(RESULTS / "parity.md")


if __name__ == "__main__":
    main()
