"""python -m kdkernels.train: flags, their checks, and what is said when a run cannot go on."""

import errno
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

try:
    import matplotlib  # noqa: F401  (asked for now: curves are drawn when minutes of training are over)
    import typer
    from rich.console import Console
except ImportError as error:
    sys.exit(f"error: kdkernels.train needs {error.name}: pip install 'kdkernels[train]'")

import torch

from kdkernels.backend import resolve
from kdkernels.train import data as datasets
from kdkernels.train.loop import Config, TrainingError, run
from kdkernels.train.report import Report, write_json

# Chosen on validation accuracy; digits is a smoke run of seconds.
DEFAULTS: dict[str, dict[str, int]] = {
    "fashion-mnist": {"labels": 500, "epochs": 60, "teacher_epochs": 3},
    "digits": {"labels": 100, "epochs": 60, "teacher_epochs": 30},
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
# What typer raises for an unknown flag or a bad value: a class of its own or of click, by its version.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Failure(Exception):
    """The run is over: one line for the user, and the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Stopped(BaseException):
    """A signal asked the run to stop. Not an Exception, so that no library swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.code = 128 + number


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


def _positive(metavar: str, help: str) -> Any:
    takes = "a number above 0 and at most 1000"
    return _number(metavar, help, True, float, lambda x: 0 < x <= 1000, takes)


def _weight(help: str) -> Any:
    return _number("W", help, True, float, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def _seed(help: str) -> Any:
    return _number("N", help, True, int, lambda x: 0 <= x < 2**63, "a whole number from 0 to 2^63 - 1")


def _folder(help: str) -> Any:
    return typer.Option(metavar="FOLDER", help=help)


HELP = {
    "data": "What to learn: 28×28 clothing, or scikit-learn's 8×8 digits (no download, seconds).",
    "data_dir": "Folder with Fashion-MNIST's four idx.gz files. Without it: Debian's package "
    "dataset-fashion-mnist if installed, else a checked download, kept in ~/.cache/kdkernels.",
    "labels": "Labelled training images the students get; all others are the unlabelled pool.",
    "epochs": "Epochs of each student; an epoch is one pass over the labelled images.",
    "teacher_epochs": "Epochs of the teacher; an epoch is one pass over all training images.",
    "batch_size": "Labelled images per step of a student.",
    "pool_ratio": "With the pool, this many unlabelled images are added per labelled one.",
    "temperature": "T: both softmaxes in the soft loss are of logits / T.",
    "soft_weight": "w: the loss is (1 − w) · cross-entropy + w · T² · KL(teacher ‖ student).",
    "learning_rate": "The students' first learning rate (AdamW; falls to 0 along a cosine).",
    "seed": "Draws the validation and labelled images, first weights and batches. The same seed, machine "
    "and number of threads give the same accuracies.",
    "device": "Where to train; auto: cuda if torch sees a GPU.",
    "out": "Where the folder of this run is made.",
    "name": "The run's folder, a new one.",
    "quiet": "Print nothing but the final table.",
}


@app.command()
def train(
    data: Annotated[Literal["fashion-mnist", "digits"], typer.Option(help=HELP["data"])] = "fashion-mnist",
    data_dir: Annotated[Path | None, _folder(HELP["data_dir"])] = None,
    labels: Annotated[int | None, _count(HELP["labels"], "500; digits: 100")] = None,
    epochs: Annotated[int | None, _count(HELP["epochs"], "60")] = None,
    teacher_epochs: Annotated[int | None, _count(HELP["teacher_epochs"], "3; digits: 30")] = None,
    batch_size: Annotated[int, _count(HELP["batch_size"])] = 50,
    pool_ratio: Annotated[int, _count(HELP["pool_ratio"])] = 4,
    temperature: Annotated[float, _positive("T", HELP["temperature"])] = 4.0,
    soft_weight: Annotated[float, _weight(HELP["soft_weight"])] = 0.9,
    learning_rate: Annotated[float, _positive("RATE", HELP["learning_rate"])] = 0.03,
    seed: Annotated[int, _seed(HELP["seed"])] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help=HELP["device"])] = "auto",
    out: Annotated[Path, _folder(HELP["out"])] = Path("runs"),
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=HELP["name"], show_default="data, labels, seed and the time"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help=HELP["quiet"])] = False,
) -> None:
    """Distil a teacher into a small student, and show what that gains.

    A teacher learns from all training labels. A small student then learns from few of them, three times from
    the same first weights with the same number of steps: alone; with the teacher's logits on the same images;
    and with its logits on the unlabelled pool too. Each model keeps its best epoch on 2,000 validation images
    (digits: 237) taken from the training images. The test images are scored once, at the end.

    Without a flag: Fashion-MNIST, 500 labels, one to two minutes on two CPU cores.

    OUT/NAME then holds config.json, metrics.jsonl (one line per model and epoch), summary.json (accuracies in
    percent; seconds of the whole run; images_per_second, the images the students trained on per second of
    training, validation not counted), curves.png, student.pt (best weights, with the pool) and the weights
    of the other three models.
    """
    if device == "cuda" and not torch.cuda.is_available():
        _bad("--device", "got 'cuda', takes 'auto' or 'cpu' here: torch sees no CUDA device")
    if name is not None and (name in ("", ".", "..") or Path(name).name != name):
        _bad("--name", f"got {name!r}, takes the name of one folder")
    if data == "digits" and data_dir is not None:
        _bad("--data-dir", f"got '{data_dir}', takes nothing with --data digits: scikit-learn brings them")
    if labels is not None and labels < datasets.CLASSES:
        _bad("--labels", f"got {labels}, takes {datasets.CLASSES} or more: one per class")

    console = Console()
    status = "while the data was loaded"
    report: Report | None = None
    try:
        dataset = datasets.load(data, data_dir, lambda text: None if quiet else typer.echo(text))
        default = DEFAULTS[data]
        config = Config(
            data=data,
            data_dir=str(data_dir) if data_dir else None,
            labels=labels if labels is not None else min(default["labels"], dataset.trainable),
            epochs=epochs or default["epochs"],
            teacher_epochs=teacher_epochs or default["teacher_epochs"],
            batch_size=batch_size,
            pool_ratio=pool_ratio,
            temperature=temperature,
            soft_weight=soft_weight,
            learning_rate=learning_rate,
            seed=seed,
            device=("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device,
        )
        if config.labels > dataset.trainable:
            _bad(
                "--labels",
                f"got {config.labels}, takes at most {dataset.trainable}: the training images without the "
                f"{dataset.validation_size} for validation",
            )
        images = {
            "labelled": config.labels,
            "pool": dataset.trainable - config.labels,
            "validation": dataset.validation_size,
            "test": len(dataset.test_labels),
        }
        folder = _make_folder(out, name, config)
        report = Report(folder, config, images, console, quiet)
        write_json(folder / "config.json", asdict(config))
        backend = resolve(None, torch.zeros(1, device=config.device), "logits")
        report.say(
            f"{data}: {images['labelled']:,} labels, pool of {images['pool']:,}; losses by backend {backend}; "
            f"writing to {folder}"
        )
        with report:
            run(config, dataset, report)
        report.finish()
    except datasets.DataError as error:
        raise Failure(str(error), 1) from None
    except (Stopped, TrainingError, OSError, torch.OutOfMemoryError) as error:
        if report is not None:
            status = f"{report.state}; {report.saved}"
        raise Failure(f"{_cause(error)} {status}", getattr(error, "code", 1)) from None


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
    stem = name or f"{config.data}-{config.labels}-labels-seed-{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
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


def _stop(number: int, _: FrameType | None) -> NoReturn:
    raise Stopped(number)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code.

    0 done, 1 failed, 2 a bad flag, 130 interrupted, 143 terminated.
    """
    # SIGINT too: a shell starts background jobs with it ignored, and Python then leaves it so.
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return app(arguments, prog_name="python -m kdkernels.train", standalone_mode=False) or 0
    except UsageError as error:
        message, code = f"{error.format_message()} (--help lists all flags)", 2  # type: ignore[attr-defined]
    except Failure as failure:
        message, code = str(failure), failure.code
    except Stopped as stopped:
        message, code = str(stopped), stopped.code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    # Waiting OpenMP threads spin for long by default and, beside other programs, keep the CPU from the very
    # thread they wait for: a step took 9 times as long with four busy programs per core. Spinning shortly does
    # not, and is faster than sleeping at once (38 s against 47 for one teacher epoch on two quiet cores).
    # libgomp reads this once, when torch is loaded, and importing this package has done that: start again.
    if sys.platform == "linux" and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "20000"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sys.exit(main())
