"""python -m kdkernels.train compare RUN…: one table and one plot over runs, their methods and seeds."""

import io
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from kdkernels.methods.deployable import write_atomically


class CompareError(Exception):
    """There is nothing to compare; the message is one line for the user."""


@dataclass(frozen=True)
class Row:
    """The runs of one method on one data set."""

    data: str
    method: str
    scores: dict[str, list[float]]  # test accuracies by model, one for each seed
    parameters: int  # of the shipped student
    flops: int

    def mean(self, model: str) -> float:
        return statistics.mean(self.scores[model])

    def shown(self, model: str) -> str:
        scores = self.scores.get(model)
        if not scores:
            return "–"
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        return f"{statistics.mean(scores):.1f}{spread}"


MODELS = ("teacher", "student_alone", "student_same_images", "student")


def read(folders: Iterable[Path]) -> list[Row]:
    """The finished runs in these folders (a run of several seeds counts as so many), grouped by data and method."""
    runs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for folder in folders:
        found = [folder, *sorted(folder.glob("seed-*"))]
        for one in found:
            try:
                config = json.loads((one / "config.json").read_text())
                summary = json.loads((one / "summary.json").read_text())
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                raise CompareError(f"{one}: cannot be read ({error})") from None
            if config.get("seeds", 1) > 1 and one == folder:
                continue  # its seeds are counted one by one
            options = config.get("options", {})
            metric = f" {options['metric']}" if "metric" in options else ""
            key = (config["data"], config["labels"], config.get("method", "kd") + metric)
            runs.setdefault(key, []).append(summary)
    if not runs:
        raise CompareError("compare: no finished run in these folders (a finished one has a summary.json)")
    rows = []
    for (data, labels, method), summaries in runs.items():
        scores = {
            model: [s[f"{model}_accuracy"] for s in summaries if f"{model}_accuracy" in s] for model in MODELS
        }
        student = summaries[0]
        rows.append(
            Row(
                f"{data}, {labels:,} labels",
                method,
                scores,
                student["parameters"]["student"],
                student.get("flops", {}).get("student", 0),
            )
        )
    return sorted(rows, key=lambda row: (row.data, -row.mean("student_same_images")))


def table(rows: list[Row]) -> Table:
    shown = Table(title="test accuracy, %: mean ± standard deviation over seeds")
    for heading in ("data", "method"):
        shown.add_column(heading)
    for heading in ("seeds", "teacher", "alone", "same images", "with pool", "parameters", "MFLOPs"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(
            row.data,
            row.method,
            str(len(row.scores["student_same_images"])),
            *(row.shown(model) for model in MODELS),
            f"{row.parameters:,}",
            f"{row.flops / 1e6:,.3g}",
        )
    return shown


def plot(rows: list[Row], path: Path) -> None:
    """A bar for each method, students alone beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 1.2 + 0.45 * len(rows)
    figure, axis = pyplot.subplots(figsize=(7, height), layout="constrained")
    places = range(len(rows))
    several = len({row.data for row in rows}) > 1
    names = [f"{row.data}: {row.method}" if several else row.method for row in rows]
    shown = (("student_alone", "alone", "C7", 0.26), ("student_same_images", "same images", "C1", 0.0),
             ("student", "with pool", "C0", -0.26))  # fmt: skip
    lowest = 100.0
    for model, label, color, offset in shown:
        have = [(y, row) for y, row in zip(places, rows) if row.scores.get(model)]
        if not have:
            continue
        means = [row.mean(model) for _, row in have]
        spreads = [statistics.stdev(r.scores[model]) if len(r.scores[model]) > 1 else 0.0 for _, r in have]
        axis.barh([y + offset for y, _ in have], means, 0.24, xerr=spreads, color=color, label=label)
        lowest = min(lowest, *means)
    axis.set_yticks(list(places), names)
    axis.invert_yaxis()
    axis.set(xlabel="test accuracy, %", xlim=(max(0, lowest - 8), 100))
    if not several:
        axis.set_title(rows[0].data)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower right", fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    pyplot.close(figure)
    write_atomically(path, buffer.getvalue())
