"""What a run shows and leaves behind: progress bars, the run's folder, the final table, the curves.

Every file but metrics.jsonl appears whole or not at all: it is written beside its place and moved there.
metrics.jsonl grows by whole lines. So whatever stops a run, each file in its folder can be read.
"""

import io
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import kdkernels
from kdkernels.backend import resolve

if TYPE_CHECKING:
    from kdkernels.train.loop import Config, Epoch

# What each model is called on screen; the keys name its checkpoint and its lines in metrics.jsonl.
TITLES = {
    "teacher": "teacher",
    "student_alone": "student alone",
    "student_same_images": "student same images",
    "student": "student with pool",
}


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: what stood at `path` stays until the new bytes are on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not say of which file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Append one whole line, or nothing when the disk is full."""
    content = (line + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        written = 0
        try:
            while written < len(content):
                written += file.write(content[written:])
        except OSError as error:
            error.filename = str(path)
            raise
        finally:
            if written < len(content):
                with suppress(OSError):  # the first error is the one to tell
                    file.truncate(size)


class Report:
    """Collects one run. Use it as a context: the progress bars live inside it."""

    def __init__(
        self, folder: Path, config: "Config", images: dict[str, int], console: Console, quiet: bool
    ) -> None:
        self.folder, self.config, self.images = folder, config, images
        self.console, self.quiet = console, quiet
        self.started = time.perf_counter()
        self.epochs: dict[str, list[Epoch]] = {}
        self.results: dict[str, tuple[int, Epoch, float]] = {}  # parameters, best epoch, test accuracy
        self.state = "before the first epoch"
        self.saved = "no checkpoint yet"
        # Off a terminal bars would be noise in a log: there `epoch` prints a line now and then.
        self.progress = Progress(
            TextColumn("{task.description:19}"),
            BarColumn(bar_width=16),
            TextColumn("epoch {task.fields[epoch]:>3}/{task.fields[epochs]:<3} {task.fields[score]:>10}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self.task = TaskID(0)

    def __enter__(self) -> "Report":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """A line on the console, never wrapped."""
        if not self.quiet:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def begin(self, name: str, epochs: int, steps_per_epoch: int) -> Callable[[], None]:
        """A model starts; returns what to call after each of its steps."""
        self.state = f"in epoch 1 of {epochs} of the {TITLES[name]}"
        self.epochs[name] = []
        task = self.progress.add_task(
            TITLES[name], total=epochs * steps_per_epoch, epoch=0, epochs=epochs, score="val    – %"
        )
        self.task = task
        return lambda: self.progress.advance(task)

    def checkpoint(self, name: str, epoch: "Epoch", weights: dict[str, Tensor]) -> None:
        """Replace the model's weights on disk by better ones."""
        path = self.folder / f"{name}.pt"
        buffer = io.BytesIO()  # so that a full disk is an OSError of our own write
        torch.save(weights, buffer)
        write_atomically(path, buffer.getvalue())
        self.saved = f"the last checkpoint, {path} (epoch {epoch.number}), is whole"

    def epoch(self, name: str, epoch: "Epoch") -> None:
        """An epoch is over: one line of metrics."""
        total = self.config.teacher_epochs if name == "teacher" else self.config.epochs
        self.epochs[name].append(epoch)
        record = {
            "model": name,
            "epoch": epoch.number,
            "train_loss": epoch.train_loss,
            "validation_accuracy": round(epoch.validation_accuracy, 4),
            "seconds": round(time.perf_counter() - self.started, 3),
        }
        append_line(self.folder / "metrics.jsonl", json.dumps(record))
        score = f"validation {epoch.validation_accuracy:.1f} %"
        self.progress.update(self.task, epoch=epoch.number, score=f"val {epoch.validation_accuracy:.1f} %")
        if not self.console.is_terminal and (epoch.number % max(1, total // 4) == 0 or epoch.number == total):
            self.say(f"{TITLES[name]}: epoch {epoch.number}/{total}, {score}, {record['seconds']:.0f} s")
        self.state = f"in epoch {epoch.number + 1} of {total} of the {TITLES[name]}"
        if epoch.number == total:
            self.state = f"after the last epoch of the {TITLES[name]}"

    def result(self, name: str, parameters: int, best: "Epoch", test_accuracy: float) -> None:
        """A model's score on the test images."""
        self.results[name] = (parameters, best, test_accuracy)

    def finish(self) -> None:
        """Write curves.png and summary.json, print the table."""
        write_atomically(self.folder / "curves.png", self._curves())
        students = [epoch for name in self.epochs if name != "teacher" for epoch in self.epochs[name]]
        train_seconds = sum(epoch.train_seconds for epoch in students)
        summary: dict[str, Any] = {f"{name}_accuracy": round(self.results[name][2], 4) for name in TITLES}
        summary |= {
            "seconds": round(time.perf_counter() - self.started, 3),
            "images_per_second": round(sum(epoch.images for epoch in students) / train_seconds, 1),
            "validation_accuracy": {n: round(r[1].validation_accuracy, 4) for n, r in self.results.items()},
            "best_epoch": {n: r[1].number for n, r in self.results.items()},
            "parameters": {n: self.results[n][0] for n in ("teacher", "student")},
            "images": self.images,
            "threads": torch.get_num_threads(),
            "backend": resolve(None, torch.zeros(1, device=self.config.device), "logits"),
            "versions": {
                "kdkernels": kdkernels.__version__,
                "torch": str(torch.__version__),
                "python": sys.version.split()[0],
            },
        }
        write_json(self.folder / "summary.json", summary)
        self.console.print(self._table())
        self.console.print(
            f"{summary['seconds']:.0f} s, {summary['images_per_second']:,.0f} images/s in student training; "
            f"all files in {self.folder}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )

    def _table(self) -> Table:
        labels, pool = self.images["labelled"], self.images["pool"]
        sources = {
            "teacher": f"{labels + pool:,} labels",
            "student_alone": f"{labels:,} labels",
            "student_same_images": f"{labels:,} labels, teacher on same",
            "student": f"{labels:,} labels, teacher on {labels + pool:,}",
        }
        teacher, student = self.results["teacher"][0], self.results["student"][0]
        table = Table(
            title=f"{self.config.data}, {self.images['test']:,} test images",
            caption=f"parameters: teacher {teacher:,}, student {student:,}",
        )
        table.add_column("model")
        table.add_column("learns from")
        for heading in ("epoch", "val %", "test %"):
            table.add_column(heading, justify="right")
        for name, (_, best, score) in self.results.items():
            table.add_row(
                TITLES[name],
                sources[name],
                str(best.number),
                f"{best.validation_accuracy:.1f}",
                f"{score:.1f}",
                end_section=name == "teacher",
            )
        return table

    def _curves(self) -> bytes:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
        for name, color in {"student": "C0", "student_same_images": "C1", "student_alone": "C2"}.items():
            numbers = [epoch.number for epoch in self.epochs[name]]
            _, best, test = self.results[name]
            axis.plot(
                numbers,
                [epoch.validation_accuracy for epoch in self.epochs[name]],
                color=color,
                marker="o" if len(numbers) == 1 else None,
                label=f"{TITLES[name]} (test {test:.1f} %)",
            )
            axis.plot(best.number, best.validation_accuracy, "o", color=color)
        _, best, test = self.results["teacher"]
        label = f"teacher, best epoch (test {test:.1f} %)"
        axis.axhline(best.validation_accuracy, color="0.4", linestyle="--", label=label)
        axis.set(
            xlabel=f"epoch ({self.images['labelled']:,} labelled images each)",
            ylabel="validation accuracy, %",
            title=f"{self.config.data}, T = {self.config.temperature:g}, dots: the epochs kept",
            ylim=(None, 100),
        )
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        pyplot.close(figure)
        return buffer.getvalue()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON, atomically."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
