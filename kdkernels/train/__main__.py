"""python -m kdkernels.train: flags, their checks, and what is said when a run cannot go on."""

import errno
import json
import logging
import math
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

try:
    import matplotlib  # noqa: F401  (asked for now: curves are drawn when minutes of training are over)
    import safetensors  # noqa: F401
    import tensorboard  # noqa: F401
    import typer
    import yaml
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy
    from rich.console import Console
except ImportError as error:
    sys.exit(f"error: kdkernels.train needs {error.name}: pip install 'kdkernels[train]'")

import torch

from kdkernels.backend import resolve
from kdkernels.methods import METHODS, METRICS
from kdkernels.train import compare as comparison
from kdkernels.train import data as datasets
from kdkernels.train import models, recipes
from kdkernels.train.experiment import CHAINS, OF_CHECKPOINTS, Config, accepted, run
from kdkernels.train.loop import BadLoss, TrainingError
from kdkernels.train.report import Report, write_json
from kdkernels.train.signals import Stopped, handled

# Chosen on validation accuracy; digits is a smoke run of seconds. The others are where a recipe starts.
DEFAULTS: dict[str, dict[str, Any]] = {
    "fashion-mnist": {"labels": 500, "epochs": 60, "teacher_epochs": 3},
    "digits": {"labels": 100, "epochs": 60, "teacher_epochs": 30},
    "cifar10": {"labels": 1000, "epochs": 60, "teacher_epochs": 20},
    "cifar100": {"labels": 5000, "epochs": 60, "teacher_epochs": 20},
    "folder": {"labels": None, "epochs": 60, "teacher_epochs": 20},
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
# What typer raises for an unknown flag or a bad value: a class of its own or of click, by its version.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Failure(Exception):
    """The run is over: one line for the user, and the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def _bad(flag: str, message: str) -> NoReturn:
    raise typer.BadParameter(message, param_hint=f"'{flag}'")


def _number(
    metavar: str, help: str, default: str | bool, convert: type, accepts: Callable[[Any], bool], takes: str
) -> Any:
    """A flag for a number, whose error says what it got and what it takes."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise typer.BadParameter(f"got {text!r}, takes {takes}")
        return value

    return typer.Option(parser=parse, metavar=metavar, help=help, show_default=default)


def _count(help: str, default: str | bool = True) -> Any:
    return _number("N", help, default, int, lambda x: x >= 1, "a whole number, 1 or more")


def _positive(metavar: str, help: str, default: str | bool = True) -> Any:
    takes = "a number above 0 and at most 1000"
    return _number(metavar, help, default, float, lambda x: 0 < x <= 1000, takes)


def _weight(help: str, default: str | bool = True) -> Any:
    return _number("W", help, default, float, lambda x: 0 <= x <= 1000, "a number from 0 to 1000; kd: to 1")


def _fraction(help: str) -> Any:
    return _number("X", help, True, float, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def _part(help: str) -> Any:
    return _number("PART", help, False, float, lambda x: 0 < x <= 1, "a number above 0 and at most 1")


def _seed(help: str) -> Any:
    return _number("N", help, True, int, lambda x: 0 <= x < 2**63, "a whole number from 0 to 2^63 - 1")


def _folder(help: str) -> Any:
    return typer.Option(metavar="FOLDER", help=help)


def _milestones(value: Any) -> tuple[int, ...]:
    """Epochs, as 150,180,210 or a recipe's list."""
    parts = value.split(",") if isinstance(value, str) else list(value)
    try:
        epochs = tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        epochs = (0,)
    if not epochs or min(epochs) < 1 or sorted(set(epochs)) != list(epochs):
        raise typer.BadParameter(f"got {value!r}, takes rising epochs, as 150,180,210")
    return epochs


def _names(value: Any) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(value)


def _take_recipe(context: typer.Context, value: str | None) -> str | None:
    """A recipe's values become the flags' defaults: what is given on the command line replaces them."""
    if value is None:
        return None
    try:
        content = recipes.read(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    flags = {parameter.name for parameter in context.command.params}
    unknown = [name for name in content if name not in {*flags, "options", "published", "notes"}]
    if unknown:
        raise typer.BadParameter(f"got {value!r}, whose {unknown[0]!r} is no flag")
    context.default_map = {k: v for k, v in content.items() if k not in ("options", "published", "notes")}
    context.obj = content
    return value


def _given(context: typer.Context, name: str) -> bool:
    """Is the flag on the command line (and not of a recipe, or by default)?"""
    return getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"


def _option(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not found or not name:
        _bad("--option", f"got {text!r}, takes NAME=VALUE")
    try:
        return name.replace("-", "_"), yaml.safe_load(value)
    except yaml.YAMLError:
        return name.replace("-", "_"), value


def _list(value: bool) -> None:
    if not value:
        return
    for title, names in (
        ("--method", METHODS),
        ("--metric (kd2m)", METRICS),
        ("--data", datasets.NAMES),
        ("--teacher, --student, --assistants", (*models.NAMES, "timm:NAME")),
        ("--recipe", recipes.names()),
    ):
        typer.echo(f"{title}\n{textwrap.fill(' '.join(names), 100, break_on_hyphens=False)}\n")
    raise typer.Exit


HELP = {
    "method": "How the students learn from the teacher; --list has the names.",
    "metric": "Of kd2m: the distance between the features' distributions; --list has the names.",
    "recipe": "A named recipe, or a YAML file: values for the other flags, which replace them where given.",
    "data": "What to learn: 28×28 clothing, scikit-learn's 8×8 digits (no download, seconds), CIFAR, or `folder`: "
    "images in DATA_DIR/train/CLASS and DATA_DIR/val/CLASS.",
    "data_dir": "Folder with the data set's files: Fashion-MNIST's four idx.gz files, CIFAR's python batches, or the "
    "image folders. Without it: Fashion-MNIST from Debian's package dataset-fashion-mnist if installed, else a checked "
    "download, kept in ~/.cache/kdkernels.",
    "image_size": "Of --data folder: what its images are brought to, shorter side and centre.",
    "teacher": "The teacher's network; --list has the names. Of atsc: several, with commas between.",
    "student": "The students' network.",
    "assistants": "Of takd and dgkd: networks between teacher and student, larger first, with commas between.",
    "teacher_checkpoint": "Weights (a state dict) of a trained teacher: none is trained then.",
    "labels": "Labelled training images the students get; all others are the unlabelled pool.",
    "label_fraction": "The same as a part of the training images.",
    "epochs": "Epochs of each student; an epoch is one pass over the labelled images.",
    "teacher_epochs": "Epochs of the teacher; an epoch is one pass over all training images.",
    "batch_size": "Labelled images per step of a student, of all processes together.",
    "teacher_batch_size": "Images per step of the teacher and of assistants.",
    "pool_ratio": "With the pool, this many unlabelled images are added per labelled one.",
    "temperature": "T: both softmaxes in the soft loss are of logits / T. Of the methods that have one.",
    "soft_weight": "w: the loss of kd is (1 − w) · cross-entropy + w · T² · KL(teacher ‖ student). Other methods: the "
    "weight of their soft loss.",
    "option": "A keyword of the method, as beta=6; may be repeated.",
    "learning_rate": "The students' first learning rate.",
    "teacher_learning_rate": "The teacher's and the assistants'.",
    "optimizer": "AdamW, or SGD with momentum.",
    "momentum": "SGD's momentum.",
    "weight_decay": "The optimizers' weight decay.",
    "schedule": "How the learning rate falls: to 0 along a cosine, by steps at the milestones, or not.",
    "milestones": "Epochs after which the rate is multiplied by --decay, as 150,180,210 (a teacher's: in proportion).",
    "decay": "What the rate is multiplied by at a milestone.",
    "final_rate": "Where the cosine ends, as a part of the first rate.",
    "clip_norm": "The largest norm of a step's gradient.",
    "accumulate": "Pieces in which a step's images are taken, to need less memory.",
    "augment": "Random crops and flips of the training images (default: of CIFAR and folders only).",
    "alone": "Train the student alone too.",
    "pool": "Distil on the unlabelled pool too.",
    "anchors": "Of rco: how many of the teacher's own checkpoints make the course.",
    "amp": "Mixed precision.",
    "compile": "Compile the models with torch.compile.",
    "cache_teacher": "Keep the frozen teacher's outputs on disk (npy files in the run's folder). Small "
    "outputs are kept in memory anyway.",
    "seed": "Draws the validation and labelled images, first weights and batches. The same seed, machine "
    "and number of threads give the same accuracies.",
    "seeds": "So many runs with seeds SEED, SEED + 1, …; the summary has their mean and standard deviation.",
    "device": "Where to train; auto: cuda if torch sees a GPU.",
    "resume": "Go on with a run that was stopped: its folder. Takes no other flag but --quiet.",
    "out": "Where the folder of this run is made.",
    "name": "The run's folder, a new one.",
    "quiet": "Print nothing but the final table.",
    "list": "Print the names of methods, metrics, data sets, networks and recipes.",
}


@app.callback(invoke_without_command=True)
def train(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Option(callback=_take_recipe, is_eager=True, metavar="NAME", help=HELP["recipe"])
    ] = None,
    method: Annotated[str, typer.Option(metavar="NAME", help=HELP["method"])] = "kd",
    metric: Annotated[str | None, typer.Option(metavar="NAME", help=HELP["metric"])] = None,
    data: Annotated[
        Literal["fashion-mnist", "digits", "cifar10", "cifar100", "folder"], typer.Option(help=HELP["data"])
    ] = "fashion-mnist",
    data_dir: Annotated[Path | None, _folder(HELP["data_dir"])] = None,
    image_size: Annotated[int, _count(HELP["image_size"])] = 32,
    teacher: Annotated[str | None, typer.Option(metavar="NAME", help=HELP["teacher"])] = None,
    student: Annotated[str | None, typer.Option(metavar="NAME", help=HELP["student"])] = None,
    assistants: Annotated[Any, typer.Option(parser=_names, metavar="NAMES", help=HELP["assistants"])] = None,
    teacher_checkpoint: Annotated[
        str | None, typer.Option(metavar="FILE", help=HELP["teacher_checkpoint"])
    ] = None,
    labels: Annotated[int | None, _count(HELP["labels"], "500; digits: 100")] = None,
    label_fraction: Annotated[float | None, _part(HELP["label_fraction"])] = None,
    epochs: Annotated[int | None, _count(HELP["epochs"], "60")] = None,
    teacher_epochs: Annotated[int | None, _count(HELP["teacher_epochs"], "3; digits: 30")] = None,
    batch_size: Annotated[int, _count(HELP["batch_size"])] = 50,
    teacher_batch_size: Annotated[int, _count(HELP["teacher_batch_size"])] = 128,
    pool_ratio: Annotated[int, _count(HELP["pool_ratio"])] = 4,
    temperature: Annotated[float | None, _positive("T", HELP["temperature"], "the method's; kd: 4")] = None,
    soft_weight: Annotated[float | None, _weight(HELP["soft_weight"], "the method's; kd: 0.9")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help=HELP["option"])
    ] = None,
    optimizer: Annotated[Literal["adamw", "sgd"], typer.Option(help=HELP["optimizer"])] = "adamw",
    learning_rate: Annotated[float, _positive("RATE", HELP["learning_rate"])] = 0.03,
    teacher_learning_rate: Annotated[float, _positive("RATE", HELP["teacher_learning_rate"])] = 0.01,
    momentum: Annotated[float, _fraction(HELP["momentum"])] = 0.9,
    weight_decay: Annotated[float, _fraction(HELP["weight_decay"])] = 0.01,
    schedule: Annotated[
        Literal["cosine", "step", "constant"], typer.Option(help=HELP["schedule"])
    ] = "cosine",
    milestones: Annotated[
        Any, typer.Option(parser=_milestones, metavar="EPOCHS", help=HELP["milestones"])
    ] = None,
    decay: Annotated[float, _fraction(HELP["decay"])] = 0.1,
    final_rate: Annotated[float, _fraction(HELP["final_rate"])] = 0.0,
    clip_norm: Annotated[float | None, _positive("NORM", HELP["clip_norm"], "none")] = None,
    accumulate: Annotated[int, _count(HELP["accumulate"])] = 1,
    augment: Annotated[bool | None, typer.Option(help=HELP["augment"])] = None,
    alone: Annotated[bool, typer.Option(help=HELP["alone"])] = True,
    pool: Annotated[bool, typer.Option(help=HELP["pool"])] = True,
    anchors: Annotated[int, _count(HELP["anchors"])] = 3,
    amp: Annotated[Literal["bf16", "fp16"] | None, typer.Option(help=HELP["amp"])] = None,
    compile: Annotated[bool, typer.Option("--compile", help=HELP["compile"])] = False,
    cache_teacher: Annotated[bool, typer.Option("--cache-teacher", help=HELP["cache_teacher"])] = False,
    seed: Annotated[int, _seed(HELP["seed"])] = 0,
    seeds: Annotated[int, _count(HELP["seeds"])] = 1,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help=HELP["device"])] = "auto",
    resume: Annotated[Path | None, _folder(HELP["resume"])] = None,
    out: Annotated[Path, _folder(HELP["out"])] = Path("runs"),
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help=HELP["name"], show_default="data, method, labels, seed and the time"
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help=HELP["quiet"])] = False,
    list: Annotated[bool, typer.Option("--list", callback=_list, is_eager=True, help=HELP["list"])] = False,
) -> None:
    """Distil a teacher into a small student, and show what that gains.

    A teacher learns from all training labels. A small student then learns from few of them, three times from
    the same first weights with the same number of steps: alone; with the teacher on the same images;
    and with the teacher on the unlabelled pool too. Each model keeps its best epoch on 2,000 validation images
    (digits: 237) taken from the training images. The test images are scored once, at the end.

    Without a flag: KD on Fashion-MNIST, 500 labels, one to two minutes on two CPU cores. Several processes:
    torchrun --nproc-per-node 2 -m kdkernels.train.

    OUT/NAME then holds config.json, metrics.jsonl (one line per model and epoch), summary.json (accuracies in
    percent; seconds of the whole run; images_per_second, the images the students trained on per second of
    training, validation not counted), curves.png, tensorboard/, and for each model its best weights (student.pt, with
    the pool) and the module to ship (student.safetensors: kdkernels.methods.load_deployable).
    """
    if context.invoked_subcommand is not None:
        return
    if device == "cuda" and not torch.cuda.is_available():
        _bad("--device", "got 'cuda', takes 'auto' or 'cpu' here: torch sees no CUDA device")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if resume is not None:
        more = [
            p.opts[0]
            for p in context.command.params
            if p.name not in ("resume", "quiet", None) and _given(context, str(p.name))
        ]
        if more:
            _bad("--resume", f"takes no other flag but --quiet, got {more[0]} too")
        _execute(*_to_resume(resume), quiet=quiet, resume=True)
        return
    if name is not None and (name in ("", ".", "..") or Path(name).name != name):
        _bad("--name", f"got {name!r}, takes the name of one folder")
    if data == "digits" and data_dir is not None:
        _bad("--data-dir", f"got '{data_dir}', takes nothing with --data digits: scikit-learn brings them")
    if data == "folder" and data_dir is None:
        _bad("--data-dir", "takes the folder of the images with --data folder")
    if labels is not None and label_fraction is not None:
        if not _given(context, "label_fraction"):
            label_fraction = None  # a recipe's
        elif not _given(context, "labels"):
            labels = None
    if labels is not None and label_fraction is not None:
        _bad("--label-fraction", "takes the place of --labels: give one of them")
    if method not in METHODS:
        _bad("--method", f"got {method!r}, takes one of {', '.join(METHODS)}")
    teachers = teacher.split(",") if teacher else []
    for flag, networks in (
        ("--teacher", teachers),
        ("--student", [student]),
        ("--assistants", assistants or ()),
    ):
        for network in networks:
            if network is not None and not network.startswith("timm:") and network not in models.NAMES:
                _bad(flag, f"got {network!r}, takes one of the names that --list prints")
    if len(teachers) > 1 and method != "atsc":
        _bad("--teacher", f"takes one name with --method {method}: atsc has several teachers")
    if method in OF_CHECKPOINTS and teacher_checkpoint and not any("anchors=" in o for o in option or ()):
        _bad(
            "--teacher-checkpoint",
            f"takes -o anchors=[A.pt,B.pt] beside it: {method} needs the teacher's course",
        )
    if assistants and method not in CHAINS:
        _bad("--assistants", f"takes nothing with --method {method}: {' and '.join(CHAINS)} have assistants")
    if amp == "fp16" and device == "cpu":
        _bad("--amp", "got 'fp16', takes 'bf16' on a CPU")
    if schedule == "step" and not milestones:
        _bad("--milestones", "takes the epochs of --schedule step")
    content = context.obj or {}
    keywords = _options(method, metric, temperature, soft_weight, option or [], content.get("options") or {})
    if cache_teacher and augment:
        _bad("--cache-teacher", "takes --no-augment: a teacher says something else of every crop")
    default = DEFAULTS[data]
    config = Config(
        data=data,
        data_dir=str(data_dir) if data_dir else None,
        image_size=image_size,
        labels=labels or 0,
        epochs=epochs or default["epochs"],
        teacher_epochs=teacher_epochs or default["teacher_epochs"],
        batch_size=batch_size,
        pool_ratio=pool_ratio,
        learning_rate=learning_rate,
        seed=seed,
        device=device,
        method=method,
        options=keywords,
        teacher=teacher,
        student=student,
        assistants=tuple(assistants or ()),
        teacher_checkpoint=teacher_checkpoint,
        anchors=anchors,
        temperature=keywords.get("temperature"),
        soft_weight=keywords.get("soft_weight"),
        teacher_batch_size=teacher_batch_size,
        teacher_learning_rate=teacher_learning_rate,
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
        milestones=tuple(milestones or ()),
        decay=decay,
        final_rate=final_rate,
        clip_norm=clip_norm,
        accumulate=accumulate,
        augment=(data in ("cifar10", "cifar100", "folder") and not cache_teacher)
        if augment is None
        else augment,
        alone=alone,
        pool=pool,
        amp=amp,
        compile=compile,
        cache_teacher=cache_teacher,
        seeds=seeds,
        recipe=recipe,
        published=content.get("published") or {},
    )
    _execute(config, None, (out, name), label_fraction, quiet=quiet)


@app.command("compare")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders of finished runs.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The plot.")] = Path("comparison.png"),
) -> None:
    """Compare runs: a table and a plot of their test accuracies, the seeds of one method together."""
    try:
        rows = comparison.read(runs)
        comparison.plot(rows, out)
    except comparison.CompareError as error:
        raise Failure(str(error), 1) from None
    except OSError as error:
        raise Failure(_cause(error), 1) from None
    Console().print(comparison.table(rows))
    typer.echo(f"plot: {out}")


def _options(
    method: str,
    metric: str | None,
    temperature: float | None,
    soft_weight: float | None,
    given: list[str],
    of_recipe: dict[str, Any],
) -> dict[str, Any]:
    """The method's keywords: of the recipe, of the flags, of --option, the later ones first."""
    takes = accepted(method)
    keywords = dict(of_recipe)
    if method == "kd":
        if soft_weight is not None and soft_weight > 1:
            _bad("--soft-weight", f"got '{soft_weight:g}', takes a number from 0 to 1")
        keywords = {"temperature": 4.0, "soft_weight": 0.9} | keywords
    for flag, value in (("metric", metric), ("temperature", temperature), ("soft_weight", soft_weight)):
        if value is None:
            continue
        if flag not in takes:
            _bad(f"--{flag.replace('_', '-')}", f"takes nothing with --method {method}, which has none")
        keywords[flag] = value
    keywords |= dict(_option(text) for text in given)
    keywords = {name: _as_number(value) for name, value in keywords.items()}
    for keyword in keywords:
        if keyword not in takes:
            _bad("--option", f"got {keyword!r}; {method} takes {', '.join(sorted(takes))}")
    if keywords.get("metric", "w2") not in METRICS:
        _bad("--metric", f"got {keywords['metric']!r}, takes one of {', '.join(METRICS)}")
    if method == "kd":
        keywords.setdefault("hard_weight", 1 - keywords["soft_weight"])
    return keywords


def _as_number(value: Any) -> Any:
    """1e-5 is a number: to YAML it is one with a point alone, as 1.0e-5."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def _to_resume(folder: Path) -> tuple[Config, Path]:
    """The run that was stopped."""
    try:
        content = json.loads((folder / "config.json").read_text())
        content = {k: tuple(v) if k in ("assistants", "milestones") else v for k, v in content.items()}
        config = Config(**content)
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        _bad("--resume", f"got '{folder}', takes the folder of a run ({reason})")
    if (folder / "summary.json").exists():
        _bad("--resume", f"got '{folder}', which is finished: its summary.json is there")
    return config, folder


def _fabric(config: Config) -> Fabric:
    for library in ("lightning_fabric", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    precision = {None: "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[config.amp]
    more: dict[str, Any] = {"devices": 1}
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:  # under torchrun
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        strategy = DDPStrategy(find_unused_parameters=True)
        more = {"devices": local, "num_nodes": world // local, "strategy": strategy}
    fabric = Fabric(accelerator=config.device, precision=precision, **more)  # type: ignore[arg-type]
    fabric.launch()
    return fabric


def _execute(
    config: Config,
    folder: Path | None,
    place: tuple[Path, str | None] | None = None,
    label_fraction: float | None = None,
    *,
    quiet: bool,
    resume: bool = False,
) -> None:
    """Load the data, then run the experiment, once for each seed."""
    console = Console()
    status = "while the data was loaded"
    report: Report | None = None
    fabric = _fabric(config)
    main_process = fabric.is_global_zero
    try:
        heard = (lambda text: None) if quiet or not main_process else typer.echo
        folder_of_data = Path(config.data_dir) if config.data_dir else None
        dataset = datasets.load(config.data, folder_of_data, heard, config.image_size)
        dataset = replace(dataset, augmented=config.augment)
        if not resume:
            config = replace(config, labels=_labels(config, label_fraction, dataset))
            assert place is not None
            made = _make_folder(*place, config) if main_process else None
            folder = fabric.broadcast(made)
            assert folder is not None
            if main_process:
                write_json(folder / "config.json", asdict(config))
        assert folder is not None
        images = {
            "labelled": config.labels,
            "pool": dataset.trainable - config.labels,
            "validation": dataset.validation_size,
            "test": len(dataset.test_labels),
        }
        summaries = []
        for i in range(config.seeds):
            one = replace(config, seed=config.seed + i, seeds=1)
            own = folder if config.seeds == 1 else folder / f"seed-{one.seed}"
            if (own / "summary.json").exists():
                summaries.append(json.loads((own / "summary.json").read_text()))
                continue
            if config.seeds > 1 and main_process:
                own.mkdir(exist_ok=True)
                write_json(own / "config.json", asdict(one))
            fabric.barrier()
            report = Report(own, one, images, console, quiet, main_process, resume)
            backend = resolve(None, torch.zeros(1, device=config.device), "logits")
            report.say(
                f"{config.data}, {config.method}: {images['labelled']:,} labels, pool of {images['pool']:,}; losses "
                f"by backend {backend}; writing to {own}"
            )
            with report:
                run(one, dataset, report, fabric)
            summaries.append(report.finish())
        if config.seeds > 1 and main_process:
            _write_summary(folder, config, summaries)
        if fabric.world_size > 1:  # the others wait for the first one, which writes
            fabric.barrier()
            torch.distributed.destroy_process_group()
    except datasets.DataError as error:
        raise Failure(str(error), 1) from None
    except (Stopped, TrainingError, OSError, torch.OutOfMemoryError) as error:
        if report is not None:
            status = f"{report.status}; {report.saved}"
            if isinstance(error, BadLoss):
                status += f"; its batch is in {report.bad_batch(error.batch)}"
            if (report.folder / "state.pt").exists():
                status += f"; --resume {folder} goes on"
        between = " " if isinstance(error, Stopped) else ", "
        raise Failure(f"{_cause(error)}{between}{status}", getattr(error, "code", 1)) from None


def _labels(config: Config, fraction: float | None, dataset: datasets.Dataset) -> int:
    default = DEFAULTS[config.data]["labels"] or dataset.trainable
    labels = config.labels or min(default, dataset.trainable)
    flag = "--labels"
    if fraction is not None:
        labels, flag = round(fraction * dataset.trainable), "--label-fraction"
    if labels < dataset.classes:
        _bad(flag, f"got {labels}, takes {dataset.classes} or more: one per class")
    if labels > dataset.trainable:
        _bad(
            flag,
            f"got {labels}, takes at most {dataset.trainable}: the training images without the "
            f"{dataset.validation_size} for validation",
        )
    return labels


def _write_summary(folder: Path, config: Config, summaries: list[dict[str, Any]]) -> None:
    """The seeds together: means, and standard deviations."""
    accuracies = [key for key in summaries[0] if key.endswith("_accuracy") and key != "validation_accuracy"]
    summary: dict[str, Any] = {
        "method": config.method,
        "seeds": [config.seed + i for i in range(config.seeds)],
    }
    for key in accuracies:
        values = [one[key] for one in summaries]
        summary[key] = round(statistics.mean(values), 4)
        summary[f"{key}_std"] = round(statistics.stdev(values), 4)
    summary["seconds"] = round(sum(one["seconds"] for one in summaries), 3)
    summary["images_per_second"] = round(statistics.mean(one["images_per_second"] for one in summaries), 1)
    summary |= {key: summaries[0][key] for key in ("parameters", "flops", "images", "versions")}
    write_json(folder / "summary.json", summary)
    Console().print(comparison.table(comparison.read([folder])))


def _cause(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory (a lower --batch-size or --pool-ratio needs less)"
    if not isinstance(error, OSError):
        return str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    where = f" writing {error.filename}" if error.filename else ""
    return f"{'disk full' if full else 'cannot go on'}{where} ({error.strerror or error})"


def _make_folder(out: Path, name: str | None, config: Config) -> Path:
    """A new folder: a run never writes into another one's."""
    method = "" if config.method == "kd" else f"-{config.method}"
    seed = f"seed-{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    stem = name or f"{config.data}{method}-{config.labels}-labels-{seed}"
    folder, number = out / stem, 1
    while True:
        try:
            out.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError:
            if not out.is_dir():
                _bad("--out", f"got '{out}', a file; takes a folder")
            if name is not None:
                _bad("--name", f"got {name!r}, takes a new name: '{folder}' exists already")
            number += 1
            folder = out / f"{stem}-{number}"
        except OSError as error:
            _bad("--out", f"got '{out}', takes a folder that can be written: {error.strerror}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code.

    0 done, 1 failed, 2 a bad flag, 130 interrupted, 143 terminated.
    """
    try:
        with handled():
            return app(arguments, prog_name="python -m kdkernels.train", standalone_mode=False) or 0
    except UsageError as error:
        message, code = f"{error.format_message()} (--help lists all flags)", 2  # type: ignore[attr-defined]
    except Failure as failure:
        message, code = str(failure), failure.code
    except Stopped as stopped:
        message, code = str(stopped), stopped.code
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    # Waiting OpenMP threads spin for long by default and, beside other programs, keep the CPU from the very
    # thread they wait for: a step took 9 times as long with four busy programs per core. Spinning shortly does
    # not, and is faster than sleeping at once (38 s against 47 for one teacher epoch on two quiet cores).
    # libgomp reads this once, when torch is loaded, and importing this package has done that: start again.
    change = {"GOMP_SPINCOUNT": "20000"}
    if sys.platform != "linux" or {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        change = {}
    if "WORLD_SIZE" in os.environ and "TORCH_CPP_LOG_LEVEL" not in os.environ:
        change["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # a warning that some method might have used all parameters
    if change:
        os.environ.update(change)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sys.exit(main())
