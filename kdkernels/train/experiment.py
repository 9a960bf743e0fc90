"""The experiment: which models are trained, in which order, from what.

    teacher              all training labels (unless a checkpoint is given); teacher_2, … of ATSC
    assistant_1, …       all training labels, from the teacher or all before (TAKD, DGKD)
    student_alone        the labelled images alone
    student_same_images  the labelled images and what the teacher says of them
    student              those, and what the teacher says of the unlabelled pool

The students have the same first weights, labelled images, batches of them in the same order, number of steps, learning
rates and choice of the epoch by validation accuracy. With the pool a step sees `1 + pool_ratio` times as many images.
Without a pool (every image has its label, or it is not wanted) "student" is "student_same_images" itself.
The test images are scored once, at the end, with the modules that are shipped.
"""

import copy
import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from kdkernels.methods import DGKD, METHODS
from kdkernels.methods.deployable import fit as load_weights
from kdkernels.train import load, models
from kdkernels.train.data import Dataset, split
from kdkernels.train.loop import (
    Epoch,
    Fit,
    Optimisation,
    Supervised,
    Training,
    TrainingError,
    accuracy,
    load_trained_part,
    steps_of,
    take,
    trained_part,
)
from kdkernels.train.outputs import SeveralOutputs, TeacherOutputs, compute
from kdkernels.train.report import Report

#: Methods that learn through assistants, from all models above at once, and from the teacher's own checkpoints.
CHAINS = ("takd", "dgkd")
OF_SEVERAL = ("dgkd", "atsc")
OF_CHECKPOINTS = ("rco",)
TITLES = {"student": "student with pool"}


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
    learning_rate: float
    seed: int
    device: str
    image_size: int = 32  # of a folder's images
    method: str = "kd"
    options: dict[str, Any] = field(default_factory=dict)  # the method's keywords
    teacher: str | None = None  # None: the data set's own; several with commas between
    student: str | None = None
    assistants: tuple[str, ...] = ()
    teacher_checkpoint: str | None = None
    anchors: int = 3  # checkpoints of the teacher that RCO takes
    temperature: float | None = None  # as far as the method has them; in options too
    soft_weight: float | None = None
    teacher_batch_size: int = 128
    teacher_learning_rate: float = 0.01
    optimizer: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.01
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    final_rate: float = 0.0
    clip_norm: float | None = None
    accumulate: int = 1
    augment: bool = False
    alone: bool = True  # train the student alone too
    pool: bool = True
    amp: str | None = None
    compile: bool = False
    cache_teacher: bool = False
    seeds: int = 1
    recipe: str | None = None
    published: dict[str, Any] = field(
        default_factory=dict
    )  # what the recipe aims at, and where that is printed

    def optimisation(self, of_teacher: bool = False) -> Optimisation:
        shared = {
            name: getattr(self, name)
            for name in (
                "optimizer", "momentum", "weight_decay", "schedule", "decay", "final_rate", "clip_norm", "accumulate"
            )
        }  # fmt: skip
        epochs = self.teacher_epochs if of_teacher else self.epochs
        # The milestones are given in the students' epochs.
        milestones = tuple(round(m * epochs / self.epochs) for m in self.milestones)
        if of_teacher:
            return Optimisation(
                epochs, self.teacher_batch_size, self.teacher_learning_rate, milestones=milestones, **shared
            )
        return Optimisation(epochs, self.batch_size, self.learning_rate, milestones=milestones, **shared)


def run(config: Config, data: Dataset, report: Report, fabric: Fabric) -> None:
    """The whole experiment. `report` gets every epoch, the best weights so far, then the test scores."""
    _Experiment(config, data, report, fabric).run()


class _Experiment:
    def __init__(self, config: Config, data: Dataset, report: Report, fabric: Fabric) -> None:
        self.config, self.report, self.fabric = config, report, fabric
        # Drawn on the CPU, so that a seed means the same images on every device.
        self.parts = split(data.train_labels, data.validation_size, config.labels, config.seed)
        self.data = data.to(fabric.device)
        self.everything = torch.cat([self.parts.labelled, self.parts.pool])

    def names_of(self, role: str) -> list[str]:
        """The networks' names: those that were asked for, or the data set's own."""
        asked = getattr(self.config, role) or models.PAIRS[self.config.data][role == "student"]
        return asked.split(",")

    def build(self, name: str) -> nn.Module:
        try:
            model = models.build(name, self.data.classes, self.data.channels, self.data.image_size)
        except models.NetworkError as error:
            raise TrainingError(str(error)) from None
        return model.to(self.fabric.device)

    def run(self) -> None:
        config, report = self.config, self.report
        torch.manual_seed(config.seed)
        torch.backends.cudnn.deterministic = True
        teachers = {name: self.build(network) for name, network in self.teacher_networks().items()}
        (student_network,) = self.names_of("student")
        first_student = self.build(student_network)
        assistants = [self.build(network) for network in config.assistants]
        # Before the first step, so that a method that does not take these models says so at once.
        above = [*teachers.values(), *assistants]
        if config.method not in OF_CHECKPOINTS:
            self.try_out(self.method(copy.deepcopy(first_student), copy.deepcopy(above)))

        checkpoints = config.teacher_checkpoint.split(",") if config.teacher_checkpoint else []
        for i, (name, teacher) in enumerate(teachers.items()):
            training = self.training(name, "", Supervised(teacher), self.teacher_networks()[name], upper=True)
            if i < len(checkpoints):
                _load(teacher, Path(checkpoints[i]), "--teacher-checkpoint")
                self.given(training)
            else:
                self.train(training)
        for i, assistant in enumerate(assistants):
            method = self.method(assistant, copy.deepcopy(above[: len(teachers) + i]))
            self.train(
                self.training(
                    f"assistant_{i + 1}", ", teacher on same", method, config.assistants[i], upper=True
                )
            )
        if config.alone:
            learner = Supervised(copy.deepcopy(first_student))
            self.train(self.training("student_alone", "", learner, student_network))
        for name, source, pool in (
            ("student_same_images", ", teacher on same", None),
            ("student", f", teacher on {len(self.everything):,}", self.parts.pool),
        ):
            if pool is not None and not (config.pool and len(pool)):
                report.same("student", "student_same_images")
                continue
            method = self.method(copy.deepcopy(first_student), copy.deepcopy(above))
            self.train(self.training(name, source, method, student_network, pool=pool))
        self.score()

    def teacher_networks(self) -> dict[str, str]:
        """By the names of their files: teacher, teacher_2, …"""
        return {
            f"teacher_{i}" if i > 1 else "teacher": n for i, n in enumerate(self.names_of("teacher"), start=1)
        }

    def training(
        self,
        name: str,
        source: str,
        learner: Any,
        network: str,
        *,
        upper: bool = False,  # a teacher or an assistant: on all labels
        pool: Tensor | None = None,
    ) -> Training:
        config = self.config
        labelled = self.everything if upper else self.parts.labelled
        how = config.optimisation(of_teacher=upper)
        keep = (
            anchor_epochs(how.epochs, config.anchors) if (config.method, name) == ("rco", "teacher") else ()
        )
        sizes = {name: getattr(self.data, name) for name in ("classes", "channels", "image_size")}
        return Training(
            name,
            TITLES.get(name, name.replace("_", " ")),
            f"{len(labelled):,} labels{source}",
            learner,
            labelled,
            how,
            pool=pool,
            pool_ratio=config.pool_ratio if pool is not None else 0,
            seed=config.seed,
            keep=keep,
            about={"model": network, **sizes, "method": config.method},
        )

    def method(self, student: nn.Module, above: list[nn.Module]) -> Any:
        """The method for a student and the models above it: the teachers first, the last assistant last."""
        config = self.config
        # Its own modules begin the same in every training, whatever was drawn before and was not drawn again.
        torch.manual_seed(config.seed + 1)
        options = dict(config.options)
        teachers: Any = above if config.method in OF_SEVERAL else above[-1]
        if config.method == "dgkd" and "drop" not in options:
            options["drop"] = min(1, len(above) - 1)
        if config.method in OF_CHECKPOINTS and "anchors" not in options:
            options["anchors"] = self.report.anchors(config.anchors)
        try:
            method = METHODS[config.method](student, teachers, **options)
        except (TypeError, ValueError) as error:
            raise TrainingError(f"--method {config.method}: {error}") from None
        return method.to(self.fabric.device)

    def try_out(self, method: Any) -> None:
        """One pass, thrown away: models that do not fit the method say so before anything was trained."""
        images, labels = take(self.data, "train", self.parts.labelled[:2])
        try:
            with torch.no_grad(), self.fabric.autocast():
                (method.mask_loss if hasattr(method, "mask_loss") else method.eval())(images, labels)
        except ValueError as error:
            raise TrainingError(f"--method {self.config.method}: {error}") from None

    def outputs(self, training: Training) -> TeacherOutputs | SeveralOutputs | None:
        """What the frozen teacher says of the training's images, if that can be kept."""
        method, config = training.learner, self.config
        if not method.uses or config.augment:
            return None
        images = training.labelled if training.pool is None else torch.cat([training.labelled, training.pool])
        method.eval()

        def batches(rows: Tensor) -> Tensor:
            return take(self.data, "train", rows)[0]

        def of(look: Any, number: str = "") -> TeacherOutputs | None:
            folder: Path | None = None
            turn: AbstractContextManager[Any] = nullcontext()
            if config.cache_teacher:  # the first process writes, the others then read
                folder = self.report.folder / "teacher-cache" / f"{training.name}{number}"
                turn = self.fabric.rank_zero_first()
            with self.fabric.autocast(), turn:
                total = len(self.data.train_labels)
                return compute(look, method.uses, batches, images, total, self.fabric.device, folder)

        if isinstance(method, DGKD):
            each = [of(method.look_at(i), f"-{i}") for i in range(len(method.teachers))]
            kept = [outputs for outputs in each if outputs is not None]
            return SeveralOutputs(kept) if len(kept) == len(each) else None
        return of(method.look_at_teacher)

    def train(self, training: Training) -> None:
        """Fit, keep the epoch with the best validation accuracy on disk and, at the end, in the model."""
        report, learner = self.report, training.learner
        if report.finished(training):
            _load(learner.student, report.weights_of(training.name), f"{training.name}")
            return
        training.outputs = self.outputs(training)
        state = report.state_of(training)
        if hasattr(learner, "prepare"):
            if state is None:
                learner.prepare(self.batches(training, learner.mask_steps))
            else:
                load_trained_part(learner, state["fit"]["learner"])
        fit = Fit(training, self.data, self.fabric, self.config.compile)
        best: Epoch | None = None
        weights: dict[str, Any] = {}
        begin = 1
        if state is not None:
            fit.restore(state["fit"])
            with torch.no_grad():  # what is shipped needs the last map's name, which a first pass finds
                learner.eval().predict(take(self.data, "train", training.labelled[:2])[0])
            best, weights, begin = state["best"], state["weights"], state["epoch"] + 1
        advance = report.begin(training, begin)
        for number in range(begin, training.optimisation.epochs + 1):
            epoch = fit.epoch(number, self.parts.validation, advance)
            if best is None or epoch.validation_accuracy > best.validation_accuracy:
                best, weights = epoch, copy.deepcopy(trained_part(learner))
                report.checkpoint(training, epoch, learner.student.state_dict())
            if number in training.keep:
                report.anchor(training.keep.index(number), learner.student.state_dict())
            report.epoch(training, epoch)
            report.state(training, {"fit": fit.state(), "best": best, "weights": weights, "epoch": number})
        assert best is not None
        load_trained_part(learner, weights)
        learner.eval()
        report.done(training, best, learner.deployable())

    def batches(self, training: Training, steps: int) -> Any:
        """Batches of images and labels for what a method learns before the first epoch."""
        epoch = count = 0
        while count < steps:
            epoch += 1
            for labelled, _ in steps_of(training, epoch):
                count += 1
                yield take(self.data, "train", labelled)

    def given(self, training: Training) -> None:
        """A teacher that came trained."""
        learner = training.learner.eval()
        score = accuracy(learner.predict, self.data, "train", self.parts.validation, self.fabric)
        training.source = "given"
        self.report.given(training, Epoch(0, float("nan"), score, 0, 0.0), learner.deployable())

    def score(self) -> None:
        """Every choice is made: now, and only now, the test images."""
        image, _ = take(self.data, "train", torch.zeros(1, dtype=torch.int64))
        for name, path in self.report.deployables():
            module = load(path).to(self.fabric.device)
            with torch.no_grad():
                score = accuracy(module, self.data, "test", None, self.fabric)
            self.report.result(name, module.cost(image), score)


def anchor_epochs(epochs: int, count: int) -> tuple[int, ...]:
    """After which epochs the teacher is kept: spread evenly, the last one among them."""
    count = min(count, epochs)
    return tuple(round((i + 1) * epochs / count) for i in range(count))


def accepted(method: str) -> dict[str, inspect.Parameter]:
    """The keywords that a method takes, with those of the classes it is made from."""
    found: dict[str, inspect.Parameter] = {}
    for kind in reversed(METHODS[method].__mro__):
        own = vars(kind).get("__init__")
        if own is None or not kind.__module__.startswith("kdkernels"):
            continue
        for name, parameter in inspect.signature(own).parameters.items():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                found[name] = parameter
    return found


def _load(model: nn.Module, path: Path, what: str) -> None:
    """A state dict from a file into a model, or one line that says why not."""
    if not path.is_file():
        raise TrainingError(f"{what} {path}: no such file")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(f"{what} {path}: damaged, or not a file of weights ({reason})") from None
    for key in ("state_dict", "model"):
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
    if not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise TrainingError(f"{what} {path}: holds no state dict of a model")
    try:
        load_weights(model, tensors, f"{what} {path} is of another model")
    except ValueError as error:
        raise TrainingError(str(error)) from None
