"""`python -m benchmarks.report [FILE...]`: result files → Markdown tables and plots beside them.

Without arguments it takes every result file of benchmarks/results. The tables hold every cell that was measured;
those that a backend of ours loses are counted and printed in bold. A short table of forward + backward for README
goes to the standard output.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
BASELINES = ("eager", "compile")
BACKENDS = ("cpu", "cuda", "triton", "reference")
COLOURS = {
    "eager": "#9aa0a6",
    "compile": "#5f6368",
    "torchdistill": "#a1887f",
    "liger": "#c0a16b",
    "reference": "#d7b8f3",
    "cpu": "#1a73e8",
    "triton": "#e37400",
    "cuda": "#188038",
}


def timings(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [b["extra_info"] for b in result["benchmarks"] if "providers" in b["extra_info"]]


def loss_of(cell: dict[str, Any]) -> str:
    return cell.get("loss", cell["suite"])


def shape_of(cell: dict[str, Any]) -> str:
    return f"{cell['shape'][0]}×{cell['shape'][1]}"


def best(cell: dict[str, Any]) -> float:
    """The better baseline's median, ms."""
    return min(cell["providers"][name]["median_ms"] for name in BASELINES if name in cell["providers"])


def ratio(cell: dict[str, Any], name: str) -> str:
    """How many times as fast as the better baseline; bold where slower."""
    times = best(cell) / cell["providers"][name]["median_ms"]
    return f"{times:.2f}" if times >= 1 else f"**{times:.2f}**"


def lines_of(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def present(cells: list[dict[str, Any]], names: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(name in cell["providers"] for cell in cells)]


def peers_in(cells: list[dict[str, Any]]) -> list[str]:
    known = {*BASELINES, *BACKENDS, "copy"}
    return sorted({name for cell in cells for name in cell["providers"]} - known)


def median(cell: dict[str, Any], name: str) -> str:
    return f"{cell['providers'][name]['median_ms']:.3f}" if name in cell["providers"] else "–"


def table(result: dict[str, Any]) -> str:
    """Milliseconds (median) of every provider; how much faster each backend is than the better baseline."""
    machine, cells = result["machine_info"], timings(result)
    backends, others = present(cells, BACKENDS), peers_in(cells)
    commit = result["commit_info"]["id"][:12] + (" + changes" if result["commit_info"].get("dirty") else "")
    load = machine.get("load")
    load = "" if load is None else f"; load before the run {load:.1f}"
    versions = "".join(f", {name} {version}" for name, version in machine.get("peers", {}).items())
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads ({machine['capability']}), GPU: {machine['gpu']}; "
        f"Python {machine['python']}, torch {machine['torch']}, kdkernels {machine['kdkernels']}"
        f"{versions}, commit {commit}, {result['datetime'][:10]}{load}.",
        "",
        "Medians in ms of interleaved runs; × is against the better of eager and compile, bold where ours is the "
        "slower; the share is of the copy bandwidth measured in the same rounds (every input read once, and the "
        "gradient written once with the backward).",
        "",
    ]
    for name in backends:
        mine = [cell for cell in cells if name in cell["providers"]]
        lost = [cell for cell in mine if cell["providers"][name]["median_ms"] > best(cell)]
        lines.append(f"- `{name}` is slower than the better baseline in {len(lost)} of {len(mine)} cells.")
    for name in others:
        for backend in backends[:1]:
            mine = [cell for cell in cells if {name, backend} <= cell["providers"].keys()]
            faster = [
                c for c in mine if c["providers"][name]["median_ms"] < c["providers"][backend]["median_ms"]
            ]
            lines.append(f"- {name} is faster than `{backend}` in {len(faster)} of {len(mine)} cells.")
    missing = {name: why for cell in cells for name, why in cell.get("absent", {}).items()}
    lines += [f"- {name} was not measured: {why}." for name, why in sorted(missing.items())]
    header = ["loss", "rows × classes", "dtype", "what", *BASELINES, *others]
    header += [x for name in backends for x in (name, f"{name} ×", f"{name} share")]
    rows = []
    for cell in cells:
        row = [loss_of(cell), shape_of(cell), cell["dtype"], cell["what"]]
        row += [median(cell, name) for name in (*BASELINES, *others)]
        for name in backends:
            if name in cell["providers"]:
                share = f"{100 * cell['providers'][name]['copy_share']:.0f} %"
                row += [median(cell, name), ratio(cell, name), share]
            else:
                row += ["–"] * 3
        rows.append([*row, f"{cell['providers']['copy']['gb_per_s']:.1f}"])
    lines += ["", *lines_of([*header, "copy GB/s"], rows)]
    peaks = [b["extra_info"] for b in result["benchmarks"] if "gradients" in b["extra_info"]]
    if peaks:
        names = list(dict.fromkeys(name for peak in peaks for name in peak["gradients"]))
        lines += ["", "Peak resident memory of one forward + backward above its inputs, in gradients:", ""]
        rows = [
            [loss_of(peak), shape_of(peak), peak["dtype"]]
            + [f"{peak['gradients'][n]:.2f}" if n in peak["gradients"] else "–" for n in names]
            for peak in peaks
        ]
        lines += lines_of(["loss", "rows × classes", "dtype", *names], rows)
    return "\n".join(lines) + "\n"


def readme(result: dict[str, Any]) -> str:
    """Forward + backward of what a user would choose from: the baselines, the peers, the first backend of ours."""
    cells = [cell for cell in timings(result) if cell["what"] == "forward+backward"]
    if not cells:
        return "No cell with forward + backward.\n"
    others, ours = peers_in(cells), present(cells, BACKENDS)[0]
    header = [
        "loss",
        "rows × classes",
        "dtype",
        "eager",
        "`torch.compile`",
        *others,
        f"`{ours}`",
        "× the better",
    ]
    rows = [
        [f"`{loss_of(cell)}`", shape_of(cell), cell["dtype"]]
        + [median(cell, name) for name in (*BASELINES, *others, ours)]
        + [ratio(cell, ours) if ours in cell["providers"] else "–"]
        for cell in cells
    ]
    return "\n".join(lines_of(header, rows)) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed against the better baseline: a row of axes for each loss, a column for each dtype."""
    cells = timings(result)
    groups = list(dict.fromkeys((loss_of(c), c["what"]) for c in cells))
    dtypes = list(dict.fromkeys(c["dtype"] for c in cells))
    names = [*BASELINES, *peers_in(cells), *present(cells, BACKENDS)]
    size = (6.5 * len(dtypes), 0.6 + 2.2 * len(groups))
    figure, axes = plt.subplots(len(groups), len(dtypes), figsize=size, squeeze=False)
    for (i, (loss, what)), (j, dtype) in itertools.product(enumerate(groups), enumerate(dtypes)):
        axis = axes[i, j]
        mine = [c for c in cells if (loss_of(c), c["what"], c["dtype"]) == (loss, what, dtype)]
        here = [name for name in names if any(name in c["providers"] for c in mine)]
        for k, name in enumerate(here):
            found = [(x, c) for x, c in enumerate(mine) if name in c["providers"]]
            places = [x + (k - (len(here) - 1) / 2) * 0.8 / len(here) for x, _ in found]
            heights = [best(c) / c["providers"][name]["median_ms"] for _, c in found]
            bars = axis.bar(places, heights, 0.8 / len(here), label=name, color=COLOURS.get(name))
            axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(f"{loss}, {dtype}, {what}", fontsize=9, loc="left")
        axis.margins(y=0.18)
        axis.set_xticks(range(len(mine)), [shape_of(c) for c in mine])
        if j == 0:
            axis.set_ylabel("× better baseline", fontsize=8)
    labels = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    labels = {name: labels[name] for name in names if name in labels}
    figure.legend(labels.values(), labels.keys(), ncol=len(labels), loc="upper center", frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / size[1]))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def is_result(file: Path) -> bool:
    return "benchmarks" in json.loads(file.read_text())


def main(arguments: list[str]) -> None:
    files = [Path(a) for a in arguments] or [f for f in sorted(RESULTS.glob("*.json")) if is_result(f)]
    if not files:
        raise SystemExit(
            f"no result files in {RESULTS}: run pytest benchmarks --benchmark-json={RESULTS}/NAME.json"
        )
    for file in files:
        result = json.loads(file.read_text())
        file.with_suffix(".md").write_text(table(result))
        plot(result, file.with_suffix(".png"))
        print(f"{file.with_suffix('.md')}\n{file.with_suffix('.png')}\n\n{readme(result)}")


if __name__ == "__main__":
    main(sys.argv[1:])
