"""What a run shows and leaves behind: progress bars, the run's folder, the final table, the curves.

Every file but metrics.jsonl appears whole or not at all: it is written beside its place and moved there.
metrics.jsonl grows by whole lines. So whatever stops a run, each file in its folder can be read, and state.pt, written
after each epoch, has all that the next one needs.
"""

import io
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import kdkernels
from kdkernels.backend import resolve
from kdkernels.methods import Cost, Deployable
from kdkernels.methods.deployable import write_atomically
from kdkernels.train import signals
from kdkernels.train.loop import Epoch, Training, TrainingError

if TYPE_CHECKING:
    from kdkernels.train.experiment import Config


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
    """Collects one run. Use it as a context: the progress bars live inside it.

    Of several processes only the first one (`main`) shows and writes anything.
    """

    def __init__(
        self,
        folder: Path,
        config: "Config",
        images: dict[str, int],
        console: Console,
        quiet: bool,
        main: bool = True,
        resume: bool = False,
    ) -> None:
        self.folder, self.config, self.images = folder, config, images
        self.console, self.quiet, self.main = console, quiet or not main, main
        self.started = time.perf_counter()
        self.titles: dict[str, str] = {}
        self.sources: dict[str, str] = {}
        self.history: dict[str, list[Epoch]] = {}
        self.best: dict[str, Epoch] = {}  # of what is done
        self.alias: dict[str, str] = {}
        self.results: dict[str, tuple[Cost, float]] = {}  # of the shipped module, and its test accuracy
        self.status = "before the first epoch"
        self.saved = "no checkpoint yet"
        self.before = 0.0  # seconds of the run that this one goes on with
        self._open: dict[str, Any] = {}
        if resume:
            self._take_up()
        # Off a terminal bars would be noise in a log: there `epoch` prints a line now and then.
        self.progress = Progress(
            TextColumn("{task.description:19}"),
            BarColumn(bar_width=16),
            TextColumn("epoch {task.fields[epoch]:>3}/{task.fields[epochs]:<3} {task.fields[score]:>10}"),
            TextColumn("{task.fields[rate]:>11}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=self.quiet or not console.is_terminal,
        )
        self.task = TaskID(0)
        self.writer: Any = None
        if main:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder / "tensorboard")

    @signals.held()
    def __enter__(self) -> "Report":
        self.progress.start()
        return self

    @signals.held()
    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        if self.writer is not None:
            with suppress(OSError):
                self.writer.close()

    def say(self, text: str) -> None:
        """A line on the console, never wrapped."""
        if not self.quiet:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    # A training's life: begin, (checkpoint, epoch, state) for each epoch, done; or finished before.

    @signals.held()
    def begin(self, training: Training, first: int) -> Callable[[], None]:
        """A training starts, or goes on; returns what to call after each of its steps."""
        name, epochs = training.name, training.optimisation.epochs
        self._name(training)
        self.status = f"in epoch {first} of {epochs} of the {training.title}"
        self.history.setdefault(name, [])
        steps = training.steps_per_epoch
        done = (first - 1) * steps
        shown: dict[str, Any] = {"epoch": first - 1, "epochs": epochs, "score": "val    – %", "rate": ""}
        task = self.progress.add_task(training.title, total=epochs * steps, completed=done, **shown)
        self.task = task

        def advance() -> None:
            signals.check()
            self.progress.advance(task)

        return advance

    def _name(self, training: Training) -> None:
        self.titles[training.name], self.sources[training.name] = training.title, training.source

    @signals.held()
    def checkpoint(self, training: Training, epoch: Epoch, weights: dict[str, Tensor]) -> None:
        """Replace the model's weights on disk by better ones."""
        path = self.folder / f"{training.name}.pt"
        self._save(path, weights)
        self.saved = f"the last checkpoint, {path} (epoch {epoch.number}), is whole"

    @signals.held()
    def anchor(self, number: int, weights: dict[str, Tensor]) -> None:
        """One of the teacher's own checkpoints."""
        self._save(self.folder / f"teacher-anchor-{number + 1}.pt", weights)

    def anchors(self, count: int) -> list[Path]:
        """The teacher's own checkpoints, early to late."""
        paths = [self.folder / f"teacher-anchor-{i + 1}.pt" for i in range(count)]
        return [path for path in paths if path.exists()]

    @signals.held()
    def epoch(self, training: Training, epoch: Epoch) -> None:
        """An epoch is over: one line of metrics."""
        name, total = training.name, training.optimisation.epochs
        self.history[name].append(epoch)
        record = {
            "model": name,
            "epoch": epoch.number,
            "train_loss": epoch.train_loss,
            "validation_accuracy": round(epoch.validation_accuracy, 4),
            "seconds": round(self.seconds(), 3),
            "images_per_second": round(epoch.images / epoch.train_seconds, 1),
            "terms": epoch.terms,
            **({"monitor": epoch.monitor} if epoch.monitor else {}),
        }
        if self.main:
            append_line(self.folder / "metrics.jsonl", json.dumps(record))
            scalars = {
                "train_loss": epoch.train_loss,
                "validation_accuracy": epoch.validation_accuracy,
                **{f"terms/{term}": value for term, value in epoch.terms.items()},
                **epoch.monitor,
            }
            with suppress(OSError):
                for key, value in scalars.items():
                    self.writer.add_scalar(f"{name}/{key}", value, epoch.number)
        score = f"validation {epoch.validation_accuracy:.1f} %"
        self.progress.update(
            self.task,
            epoch=epoch.number,
            score=f"val {epoch.validation_accuracy:.1f} %",
            rate=f"{epoch.images / epoch.train_seconds:,.0f}/s",
        )
        if not self.console.is_terminal and (epoch.number % max(1, total // 4) == 0 or epoch.number == total):
            self.say(f"{training.title}: epoch {epoch.number}/{total}, {score}, {record['seconds']:.0f} s")
        self.status = f"in epoch {epoch.number + 1} of {total} of the {training.title}"
        if epoch.number == total:
            self.status = f"after the last epoch of the {training.title}"

    @signals.held()
    def state(self, training: Training, state: dict[str, Any]) -> None:
        """All that the training's next epoch depends on."""
        self._open = {"training": training.name, **state, "best": asdict(state["best"])}
        self._write_state()

    @signals.held()
    def done(self, training: Training, best: Epoch, module: Deployable) -> None:
        """A training is over: the module to ship."""
        name = training.name
        if self.main:
            module.save(self.folder / f"{name}.safetensors", **training.about)
        self.best[name] = best
        self._open = {}
        self._write_state()

    def given(self, training: Training, epoch: Epoch, module: Deployable) -> None:
        """A model that came trained."""
        self._name(training)
        self.history.setdefault(training.name, [])
        self.done(training, epoch, module)

    def same(self, name: str, other: str) -> None:
        """A model that would be another one again."""
        self.alias[name] = other

    def finished(self, training: Training) -> bool:
        """Was it trained to its end before the run was stopped?"""
        self._name(training)
        return training.name in self.best

    def weights_of(self, name: str) -> Path:
        return self.folder / f"{name}.pt"

    def state_of(self, training: Training) -> dict[str, Any] | None:
        """Where to go on with a training that was stopped."""
        if self._open.get("training") != training.name:
            return None
        return {**self._open, "best": Epoch(**self._open["best"])}

    def deployables(self) -> list[tuple[str, Path]]:
        """The modules to ship, in the order they were trained."""
        return [(name, self.folder / f"{name}.safetensors") for name in self.best]

    def result(self, name: str, cost: Cost, test_accuracy: float) -> None:
        """What a module costs, and its score on the test images."""
        self.results[name] = (cost, test_accuracy)

    def bad_batch(self, batch: dict[str, Any]) -> Path:
        """Keep the batch whose loss was not a number."""
        path = self.folder / "bad-batch.pt"
        self._save(path, batch)
        return path

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    def _save(self, path: Path, content: Any) -> None:
        if self.main:
            buffer = io.BytesIO()  # so that a full disk is an OSError of our own write
            torch.save(content, buffer)
            write_atomically(path, buffer.getvalue())

    def _write_state(self) -> None:
        metrics = self.folder / "metrics.jsonl"
        self._save(
            self.folder / "state.pt",
            {
                "open": self._open,
                "best": {name: asdict(epoch) for name, epoch in self.best.items()},
                "history": {name: [asdict(e) for e in epochs] for name, epochs in self.history.items()},
                "metrics_size": metrics.stat().st_size if metrics.exists() else 0,
                "seconds": self.seconds(),
            },
        )

    def _take_up(self) -> None:
        """Go on where state.pt stands. Lines of epochs after it are taken back: those are done again."""
        path = self.folder / "state.pt"
        size = 0
        if path.exists():
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                self._open, size, self.before = state["open"], state["metrics_size"], state["seconds"]
                self.best = {name: Epoch(**epoch) for name, epoch in state["best"].items()}
                self.history = {
                    name: [Epoch(**e) for e in epochs] for name, epochs in state["history"].items()
                }
            except Exception as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise TrainingError(f"--resume: {path} is damaged ({reason})") from None
        metrics = self.folder / "metrics.jsonl"
        if self.main and metrics.exists():
            os.truncate(metrics, size)

    def finish(self) -> dict[str, Any]:
        """Write curves.png and summary.json, print the table; returns the summary."""
        for name, other in self.alias.items():
            self.results[name] = self.results[other]
            self.best[name], self.history[name] = self.best[other], self.history[other]
            self.titles[name], self.sources[name] = self.titles[other], self.sources[other]
        epochs = [
            e
            for name in self.history
            if "student" in name and name not in self.alias
            for e in self.history[name]
        ]
        train_seconds = sum(epoch.train_seconds for epoch in epochs)
        summary: dict[str, Any] = {
            f"{name}_accuracy": round(self.results[name][1], 4) for name in self.results
        }
        summary |= {
            "method": self.config.method,
            "seconds": round(self.seconds(), 3),
            "images_per_second": round(sum(epoch.images for epoch in epochs) / train_seconds, 1),
            "validation_accuracy": {n: round(e.validation_accuracy, 4) for n, e in self.best.items()},
            "best_epoch": {n: e.number for n, e in self.best.items()},
            "parameters": {n: cost.parameters for n, (cost, _) in self.results.items()},
            "flops": {n: cost.flops for n, (cost, _) in self.results.items()},
            "images": self.images,
            "threads": torch.get_num_threads(),
            "backend": resolve(None, torch.zeros(1, device=self.config.device), "logits"),
            "versions": {
                "kdkernels": kdkernels.__version__,
                "torch": str(torch.__version__),
                "python": sys.version.split()[0],
            },
        }
        if self.main:
            for name, other in self.alias.items():
                for end in ("pt", "safetensors"):
                    content = (self.folder / f"{other}.{end}").read_bytes()
                    write_atomically(self.folder / f"{name}.{end}", content)
            write_atomically(self.folder / "curves.png", self._curves())
            write_json(self.folder / "summary.json", summary)
            (self.folder / "state.pt").unlink(missing_ok=True)
            self.console.print(self._table())
            self.console.print(
                f"{summary['seconds']:.0f} s, {summary['images_per_second']:,.0f} images/s in student training; "
                f"all files in {self.folder}",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )
        return summary

    def _table(self) -> Table:
        table = Table(
            title=f"{self.config.data}, {self.config.method}, {self.images['test']:,} test images",
            caption="parameters and FLOPs for one image: of what is shipped",
        )
        table.add_column("model")
        table.add_column("learns from")
        for heading in ("parameters", "MFLOPs", "epoch", "val %", "test %"):
            table.add_column(heading, justify="right")
        for name, (cost, score) in self.results.items():
            if name in self.alias:
                continue
            best = self.best[name]
            table.add_row(
                self.titles[name],
                self.sources[name],
                f"{cost.parameters:,}",
                f"{cost.flops / 1e6:,.3g}",
                str(best.number) if best.number else "–",
                f"{best.validation_accuracy:.1f}",
                f"{score:.1f}",
                end_section="student" not in name,
            )
        return table

    def _curves(self) -> bytes:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
        students = [name for name in self.results if "student" in name and name not in self.alias]
        for number, name in enumerate(reversed(students)):
            numbers = [epoch.number for epoch in self.history[name]]
            best, (_, test) = self.best[name], self.results[name]
            axis.plot(
                numbers,
                [epoch.validation_accuracy for epoch in self.history[name]],
                color=f"C{number}",
                marker="o" if len(numbers) == 1 else None,
                label=f"{self.titles[name]} (test {test:.1f} %)",
            )
            axis.plot(best.number, best.validation_accuracy, "o", color=f"C{number}")
        best, (_, test) = self.best["teacher"], self.results["teacher"]
        label = f"teacher (test {test:.1f} %)"
        axis.axhline(best.validation_accuracy, color="0.4", linestyle="--", label=label)
        axis.set(
            xlabel=f"epoch ({self.images['labelled']:,} labelled images each)",
            ylabel="validation accuracy, %",
            title=f"{self.config.data}, {self.config.method}; dots: the epochs kept",
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
