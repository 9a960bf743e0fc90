"""The experiment: train the teacher, then the student three times, and score each on the test images once.

    loss of a batch   (1 − w) · CE(labelled rows) + w · T² · KL(teacher_T ‖ student_T)(all rows)

The three students have the same first weights, labelled images, batches of them in the same order, number of
optimisation steps, learning rates and epoch choice by validation accuracy. "alone" has w = 0; "same images"
adds the teacher's logits on the labelled images; "with the pool" appends unlabelled rows to every batch, so
each of its steps sees `1 + pool_ratio` times as many images.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdkernels import kl_div
from kdkernels.train import models
from kdkernels.train.data import Dataset, split
from kdkernels.train.report import Report


class TrainingError(Exception):
    """The training cannot go on; the message is one line for the user."""


@dataclass(frozen=True)
class Config:
    """One run, as config.json keeps it."""

    data: str
    data_dir: str | None
    labels: int
    epochs: int  # an epoch is one pass over the labelled images
    teacher_epochs: int
    batch_size: int  # labelled images in a student's batch
    pool_ratio: int  # unlabelled images beside each labelled one, with the pool
    temperature: float
    soft_weight: float
    learning_rate: float
    seed: int
    device: str
    teacher_batch_size: int = 128
    teacher_learning_rate: float = 0.01
    weight_decay: float = 0.01


@dataclass(frozen=True, eq=False)
class Training:
    """One model and what it learns from."""

    name: str
    model: nn.Module
    labelled: Tensor  # indices into the training images
    epochs: int
    batch_size: int
    learning_rate: float
    teacher_logits: Tensor | None = None  # (all training images, N); none: cross-entropy alone
    pool: Tensor | None = None  # indices of the unlabelled images

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.labelled) // self.batch_size)


@dataclass(frozen=True)
class Epoch:
    """What one epoch of one model came to."""

    number: int
    train_loss: float
    validation_accuracy: float  # percent
    images: int  # trained on, labelled and not
    train_seconds: float  # without validation


def distillation_loss(
    logits: Tensor,  # (M, N), the labelled rows first
    labels: Tensor,  # (L,), L ≤ M
    teacher_logits: Tensor | None,  # (M, N)
    temperature: float,
    soft_weight: float,
) -> Tensor:
    """Cross-entropy on the rows that have labels, T²·KL to the teacher on all rows (arXiv 1503.02531)."""
    hard = F.cross_entropy(logits[: len(labels)], labels)
    if teacher_logits is None or soft_weight == 0:
        return hard
    # T² keeps the soft gradient's size: it shrinks as 1/T².
    soft = temperature**2 * kl_div(logits, teacher_logits, temperature=temperature)
    return (1 - soft_weight) * hard + soft_weight * soft


def predict(model: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """Logits in evaluation mode, without gradients."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(batch_size)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of the images whose largest logit is the label's."""
    return 100 * (predict(model, images).argmax(1) == labels).double().mean().item()


def fit(
    training: Training,
    data: Dataset,
    validation: Tensor,
    config: Config,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[Epoch]:
    """Train the model in place: one epoch per item, one call of `advance` per optimisation step."""
    model, rate = training.model, training.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=config.weight_decay)
    steps = training.steps_per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.epochs * steps)
    generator = torch.Generator().manual_seed(config.seed)
    drawn = 0  # the pool is shuffled already: taken round and round, every image is seen equally often
    for number in range(1, training.epochs + 1):
        started = time.perf_counter()
        model.train()
        total, images = torch.zeros((), device=data.train_images.device), 0
        order = training.labelled[torch.randperm(len(training.labelled), generator=generator)]
        for batch in order.split(training.batch_size):
            labels = data.train_labels[batch]
            if training.pool is not None:
                more = torch.arange(drawn, drawn + config.pool_ratio * training.batch_size) % len(
                    training.pool
                )
                batch = torch.cat([batch, training.pool[more]])
                drawn += len(more)
            soft = None if training.teacher_logits is None else training.teacher_logits[batch]
            logits = model(data.train_images[batch])
            loss = distillation_loss(logits, labels, soft, config.temperature, config.soft_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
            images += len(batch)
            advance()
        train_loss = total.item() / steps  # the first wait for a GPU in this epoch: the time is read after it
        train_seconds = time.perf_counter() - started
        if not math.isfinite(train_loss):
            raise TrainingError(f"the loss became {train_loss}")
        score = accuracy(model, data.train_images[validation], data.train_labels[validation])
        yield Epoch(number, train_loss, score, images, train_seconds)


def run(config: Config, data: Dataset, report: Report) -> None:
    """The whole experiment. `report` gets every epoch, the best weights so far, then the test scores."""
    # Drawn on the CPU, so that a seed means the same images on every device.
    parts = split(data.train_labels, data.validation_size, config.labels, config.seed)
    data = data.to(torch.device(config.device))
    torch.manual_seed(config.seed)
    torch.backends.cudnn.deterministic = True
    teacher = models.teacher(config.data).to(config.device)
    first_student = models.student(config.data).to(config.device)

    teaching = Training(
        "teacher",
        teacher,
        torch.cat([parts.labelled, parts.pool]),
        config.teacher_epochs,
        config.teacher_batch_size,
        config.teacher_learning_rate,
    )
    best = {teaching: _train(teaching, data, parts.validation, config, report)}
    teacher_logits = predict(teacher, data.train_images)

    alone = Training(
        "student_alone",
        copy.deepcopy(first_student),
        parts.labelled,
        config.epochs,
        config.batch_size,
        config.learning_rate,
    )
    same_images = replace(
        alone, name="student_same_images", model=copy.deepcopy(first_student), teacher_logits=teacher_logits
    )
    pool = parts.pool if len(parts.pool) else None  # every image may have its label
    with_pool = replace(same_images, name="student", model=copy.deepcopy(first_student), pool=pool)
    for student in (alone, same_images, with_pool):
        best[student] = _train(student, data, parts.validation, config, report)

    for training, epoch in best.items():  # every choice is made: now, and only now, the test images
        score = accuracy(training.model, data.test_images, data.test_labels)
        parameters = sum(p.numel() for p in training.model.parameters())
        report.result(training.name, parameters, epoch, score)


def _train(training: Training, data: Dataset, validation: Tensor, config: Config, report: Report) -> Epoch:
    """Fit, keep the epoch with the best validation accuracy on disk and, at the end, in the model."""
    best: Epoch | None = None
    weights: dict[str, Tensor] = {}
    advance = report.begin(training.name, training.epochs, training.steps_per_epoch)
    for epoch in fit(training, data, validation, config, advance):
        if best is None or epoch.validation_accuracy > best.validation_accuracy:
            best, weights = epoch, copy.deepcopy(training.model.state_dict())
            report.checkpoint(training.name, epoch, weights)
        report.epoch(training.name, epoch)
    assert best is not None
    training.model.load_state_dict(weights)
    return best
