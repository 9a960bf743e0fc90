"""One training: a learner, its images, and an epoch at a time.

A learner is a `kdkernels.methods.Method`, or `Supervised`: a module whose call gives a loss, which names the parameters
to train and the module to ship. Everything random in an epoch (the order of the images, their augmentation) is drawn
from the seed and the epoch's number, so that an epoch can be done again, and is the same in any number of processes.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from kdkernels.methods import Deployable, Output
from kdkernels.train.data import Dataset
from kdkernels.train.distributed import gather_rows, share_of, sum_over_processes, use_global_batch_norm
from kdkernels.train.outputs import SeveralOutputs, TeacherOutputs

EVALUATION_BATCH = 500


class TrainingError(Exception):
    """The training cannot go on; the message is one line for the user."""


class BadLoss(TrainingError):
    """A loss that is not a number, and the batch it came of."""

    def __init__(
        self, value: float, epoch: int, step: int, images: Tensor, labels: Tensor, rows: Tensor
    ) -> None:
        super().__init__(f"the loss became {value} in step {step}")
        self.batch = {
            "epoch": epoch, "step": step, "images": images.cpu(), "labels": labels.cpu(), "indices": rows.cpu()
        }  # fmt: skip


@dataclass(frozen=True)
class Optimisation:
    """How a learner is trained."""

    epochs: int  # an epoch is one pass over the labelled images
    batch_size: int  # labelled images a step, of all processes together
    learning_rate: float
    optimizer: str = "adamw"  # or "sgd"
    momentum: float = 0.9  # of sgd
    weight_decay: float = 0.01
    schedule: str = "cosine"  # or "step", "constant"
    milestones: tuple[int, ...] = ()  # epochs after which the rate is multiplied by `decay`
    decay: float = 0.1
    final_rate: float = 0.0  # where the cosine ends, as a part of the first rate
    clip_norm: float | None = None
    accumulate: int = 1  # pieces a step's images are taken in

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """What the learning rate is multiplied by in a step, counted from 0."""
        if self.schedule == "cosine":
            done = step / (self.epochs * steps_per_epoch)
            return self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "step":
            return self.decay ** sum(step // steps_per_epoch >= epoch for epoch in self.milestones)
        return 1.0

    def make(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
            )
        return torch.optim.AdamW(parameters, self.learning_rate, weight_decay=self.weight_decay)


class Supervised(nn.Module):
    """A learner with no teacher: cross-entropy alone."""

    uses: tuple[str, ...] = ()

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.student = model

    def frozen(self) -> list[nn.Module]:
        return []

    def start_epoch(self, epoch: int, epochs: int) -> None:
        pass

    def parameters_to_train(self) -> list[nn.Parameter]:
        return list(self.student.parameters())

    def forward(self, images: Tensor, labels: Tensor, teacher: None = None) -> Output:
        logits = self.student(images)
        loss = F.cross_entropy(logits.float(), labels)
        return Output(loss, {"hard": loss.detach()}, logits)

    def predict(self, images: Tensor) -> Tensor:
        return self.student(images)

    def monitor(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        return {}

    def deployable(self) -> Deployable:
        return Deployable(self.student)


@dataclass(eq=False)
class Training:
    """One learner and what it learns from."""

    name: str  # of its files and its lines in metrics.jsonl
    title: str  # on screen
    source: str  # what it learns from, for the table
    learner: Any
    labelled: Tensor  # indices into the training images
    optimisation: Optimisation
    outputs: TeacherOutputs | SeveralOutputs | None = None  # what the teacher says, where it is known already
    pool: Tensor | None = None  # indices of the unlabelled images
    pool_ratio: int = 0  # of them in a step, for each labelled one
    seed: int = 0
    keep: tuple[int, ...] = ()  # epochs after which the model itself is kept (RCO's anchors)
    about: dict[str, Any] = field(
        default_factory=dict
    )  # the model's name and sizes, for the deployable's file

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.labelled) // self.optimisation.batch_size)


@dataclass(frozen=True)
class Epoch:
    """What one epoch of one model came to."""

    number: int
    train_loss: float
    validation_accuracy: float  # percent
    images: int  # trained on, labelled and not
    train_seconds: float  # without validation
    terms: dict[str, float] = field(default_factory=dict)  # means over the epoch
    monitor: dict[str, float] = field(default_factory=dict)


def take(data: Dataset, part: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Some of the "train" or "test" images, ready for a model, and their labels."""
    if part == "train":
        return data.batch(rows), data.train_labels[rows]
    return data.normalise(data.test_images[rows]), data.test_labels[rows]


@torch.no_grad()
def accuracy(
    model: Callable[[Tensor], Tensor],
    data: Dataset,
    part: str,
    rows: Tensor | None = None,
    fabric: Fabric | None = None,
) -> float:
    """Percent of the images whose largest logit is the label's. Processes share the work."""
    labels = data.train_labels if part == "train" else data.test_labels
    rows = torch.arange(len(labels)) if rows is None else rows
    mine = rows if fabric is None else rows[share_of(len(rows), fabric.global_rank, fabric.world_size)]
    right = torch.zeros((), device=labels.device)
    for some in mine.split(EVALUATION_BATCH) if len(mine) else ():
        images, wanted = take(data, part, some)
        right += (model(images).argmax(1) == wanted).sum()
    return 100 * float(sum_over_processes(right)) / len(rows)


def steps_of(training: Training, epoch: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """An epoch's batches: indices of labelled images, and of unlabelled ones."""
    size = training.optimisation.batch_size
    generator = torch.Generator().manual_seed((training.seed * 1_000_003 + epoch) % 2**63)
    order = training.labelled[torch.randperm(len(training.labelled), generator=generator)]
    batches = list(order.split(size))
    if len(batches) > 1 and len(batches[-1]) == 1:  # batch normalisation cannot train on one image
        batches[-2:] = [torch.cat(batches[-2:])]
    more = training.pool_ratio * size
    drawn = (epoch - 1) * training.steps_per_epoch * more
    for batch in batches:
        if training.pool is None:
            yield batch, None
            continue
        # The pool is shuffled already: taken round and round, every image is seen equally often.
        yield batch, training.pool[torch.arange(drawn, drawn + more) % len(training.pool)]
        drawn += more


class Fit:
    """A training under way."""

    def __init__(self, training: Training, data: Dataset, fabric: Fabric, compiled: bool = False) -> None:
        self.training, self.data, self.fabric = training, data, fabric
        learner: Any
        learner, how = training.learner, training.optimisation
        learner.to(fabric.device)
        if fabric.world_size > 1:
            use_global_batch_norm(learner)
        optimizers = [how.make(learner.parameters_to_train())]
        upkeep = learner.upkeep_parameters() if hasattr(learner, "upkeep_parameters") else []
        if upkeep:
            optimizers.append(how.make(upkeep))
        if compiled:
            self._compile()
        if hasattr(learner, "gather"):
            learner.gather = lambda x: gather_rows(x, self._sizes())
        self.present = (0, 0, 0)  # labelled images and others of the present batch, and which piece of it
        self.module, *self.optimizers = fabric.setup(learner, *optimizers)
        self.module.mark_forward_method("predict")
        if upkeep:
            self.module.mark_forward_method("upkeep_loss")
        steps = training.steps_per_epoch
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(o, lambda step: how.factor(step, steps)) for o in optimizers
        ]

    def _compile(self) -> None:
        learner = self.training.learner
        images, labels = take(self.data, "train", self.training.labelled[:2])
        learner.eval()
        with torch.no_grad():
            learner(
                images, labels
            )  # methods find the models' last maps in a first pass, which is not compiled
        learner.student.compile()
        for teacher in learner.frozen():
            teacher.compile()

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on."""
        return {
            "learner": trained_part(self.training.learner),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "random": torch.get_rng_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        load_trained_part(self.training.learner, state["learner"])
        for optimizer, one in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(one)
        for schedule, one in zip(self.schedules, state["schedules"]):
            schedule.load_state_dict(one)
        torch.set_rng_state(state["random"])

    def epoch(self, number: int, validation: Tensor, advance: Callable[[], None] = lambda: None) -> Epoch:
        """Train for an epoch, then score the validation images."""
        training, fabric = self.training, self.fabric
        learner = training.learner
        started = time.perf_counter()
        self.module.train()
        learner.start_epoch(number, training.optimisation.epochs)
        augmentation = torch.Generator().manual_seed((training.seed * 1_000_003 + number + 2**40) % 2**63)
        losses: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        images = steps = checked = 0
        # Looking at a loss makes the host wait for a GPU: there it is done now and then.
        patience = 50 if fabric.device.type == "cuda" else 1
        for step, (labelled, pool) in enumerate(steps_of(training, number), start=1):
            loss, parts = self._step(labelled, pool, augmentation)
            losses.append(loss)
            for name, term in parts.items():
                terms[name] = terms[name] + term if name in terms else term
            images += len(labelled) + (0 if pool is None else len(pool))
            steps = step
            if step % patience == 0:
                self._check(number, checked, losses)
                checked = step
            advance()
        self._check(number, checked, losses)
        mean = sum_over_processes(torch.stack(losses).sum()).item() / fabric.world_size / steps
        seconds = time.perf_counter() - started  # the line above waited for a GPU
        means = {
            name: float(sum_over_processes(total)) / fabric.world_size / steps
            for name, total in terms.items()
        }
        self.module.eval()
        score = accuracy(self.module.predict, self.data, "train", validation, fabric)
        seen, labels = take(self.data, "train", validation[:EVALUATION_BATCH])
        return Epoch(
            number,
            mean,
            score,
            images,
            seconds,
            means,
            learner.monitor(seen, labels),
        )

    def _step(
        self, labelled: Tensor, pool: Tensor | None, augmentation: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step on this process's part of a batch; gives its part of the loss and of its terms."""
        fabric, how = self.fabric, self.training.optimisation
        rank, world = fabric.global_rank, fabric.world_size
        rows = labelled if pool is None else torch.cat([labelled, pool])
        # Of the whole batch, so that every number of processes sees the same crops.
        images = self.data.batch(rows, augmentation)
        labels = self.data.train_labels[rows]
        mine = [share_of(len(labelled), rank, world)]
        if pool is not None:
            own = share_of(len(pool), rank, world)
            mine.append(slice(len(labelled) + own.start, len(labelled) + own.stop))
        total: Tensor | None = None
        terms: dict[str, Tensor] = {}
        every: list[tuple[Tensor, Tensor]] = []
        for piece in range(how.accumulate):
            parts = [
                torch.arange(p.start, p.stop)[share_of(p.stop - p.start, piece, how.accumulate)] for p in mine
            ]
            some = torch.cat(parts)
            self.present = (len(labelled), len(rows) - len(labelled), piece)
            if not len(some):
                continue
            known = None if self.training.outputs is None else self.training.outputs.rows(rows[some])
            some = some.to(labels.device)
            batch, answers = images[some], labels[some[: len(parts[0])]]
            weight = len(some) * world / len(rows)
            last = piece == how.accumulate - 1
            with fabric.no_backward_sync(self.module, enabled=not last):
                output = self.module(batch, answers, known)
                fabric.backward(output.loss * weight)
            total = output.loss.detach() * weight if total is None else total + output.loss.detach() * weight
            for name, term in output.terms.items():
                terms[name] = terms.get(name, 0) + term * weight
            every.append((batch, answers))
        assert total is not None
        self._update(0)
        if len(self.optimizers) > 1:
            for number, (batch, answers) in enumerate(every):
                with fabric.no_backward_sync(self.module, enabled=number < len(every) - 1):
                    loss = self.module.upkeep_loss(batch, answers)
                    fabric.backward(loss * (len(answers) * world / len(labelled)))
            self._update(1)
        return total, terms

    def _sizes(self) -> list[int]:
        """How many rows of the present piece each process has."""
        *counts, piece = self.present
        pieces, world = self.training.optimisation.accumulate, self.fabric.world_size

        def rows(count: int, rank: int) -> int:
            own = share_of(count, rank, world)
            part = share_of(own.stop - own.start, piece, pieces)
            return part.stop - part.start

        return [sum(rows(count, rank) for count in counts) for rank in range(world)]

    def _update(self, number: int) -> None:
        optimizer, how = self.optimizers[number], self.training.optimisation
        if how.clip_norm is not None:
            self.fabric.clip_gradients(
                self.module, optimizer, max_norm=how.clip_norm, error_if_nonfinite=False
            )
        optimizer.step()
        # Of all parameters: step A leaves a gradient on a head that step B has to begin without.
        self.module.zero_grad(set_to_none=True)
        self.schedules[number].step()

    def _check(self, epoch: int, checked: int, losses: list[Tensor]) -> None:
        """Stop at a loss that is not a number, in every process, and say which batch gave it; `checked` losses were
        looked at before."""
        if checked == len(losses):
            return
        whole = sum_over_processes(torch.stack(losses[checked:])) / self.fabric.world_size
        if bool(torch.isfinite(whole).all()):
            return
        first = int((~torch.isfinite(whole)).nonzero()[0, 0])
        step = checked + first
        labelled, pool = list(steps_of(self.training, epoch))[step]
        rows = labelled if pool is None else torch.cat([labelled, pool])
        images, labels = take(self.data, "train", rows)
        raise BadLoss(float(whole[first]), epoch, step + 1, images, labels, rows)


def trained_part(learner: nn.Module) -> dict[str, Any]:
    """A learner's state without the models that stay as they are."""
    models: list[nn.Module] = learner.frozen()  # type: ignore[operator]
    frozen = {id(t) for model in models for t in (*model.parameters(), *model.buffers())}
    whole = learner.state_dict(keep_vars=True)
    return {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in whole.items()
        if id(value) not in frozen
    }


def load_trained_part(learner: nn.Module, state: dict[str, Any]) -> None:
    learner.load_state_dict(learner.state_dict() | state)
