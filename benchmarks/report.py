"""`python -m benchmarks.report [FILE...]`: result files → Markdown tables and plots beside them.

Without arguments it takes every result file of benchmarks/results. The tables hold every cell that was measured;
those that a backend of ours loses are counted and printed in bold. A short table of forward + backward for README
goes to the standard output.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
BASELINES = ("eager", "compile")
BACKENDS = ("cpu", "cuda", "triton", "reference")
# Of the losses from hidden states: what else runs in their rounds, and what is to be reached.
FLOOR = "floor"
FLOORS = (FLOOR, "floor (oneDNN)")
OURS_OTHERWISE = ("unfrozen", "full form")  # what the same loss takes without what a cell saves
FROZEN = 0.8  # of the time of the same loss with a learnt head
LINEAR = "linear_loss"
TRAIN_STEP = "train_step"
COLOURS = {
    "eager": "#9aa0a6",
    "compile": "#5f6368",
    "torchdistill": "#a1887f",
    "liger": "#c0a16b",
    "POT": "#7cb0a8",
    "geomloss": "#b08aa5",
    "eager, upcast": "#dadce0",
    "floor": "#202124",
    "floor (oneDNN)": "#80868b",
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
    return "×".join(map(str, cell["shape"]))


def best(cell: dict[str, Any]) -> float:
    """The better baseline's median, ms."""
    return min(cell["providers"][name]["median_ms"] for name in BASELINES if name in cell["providers"])


def faster(times: float) -> str:
    """How many times as fast; bold where slower."""
    return f"{times:.2f}" if times >= 1 else f"**{times:.2f}**"


def ratio(cell: dict[str, Any], name: str) -> str:
    """How many times as fast as the better baseline."""
    return faster(best(cell) / cell["providers"][name]["median_ms"])


def lines_of(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def present(cells: list[dict[str, Any]], names: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(name in cell["providers"] for cell in cells)]


def peers_in(cells: list[dict[str, Any]]) -> list[str]:
    known = {*BASELINES, *BACKENDS, *FLOORS, *OURS_OTHERWISE, "copy"}
    return sorted({name for cell in cells for name in cell["providers"]} - known)


def median(cell: dict[str, Any], name: str) -> str:
    return f"{cell['providers'][name]['median_ms']:.3f}" if name in cell["providers"] else "–"


def machine_line(result: dict[str, Any]) -> str:
    machine = result["machine_info"]
    commit = result["commit_info"]["id"][:12] + (" + changes" if result["commit_info"].get("dirty") else "")
    load = machine.get("load")
    load = "" if load is None else f"; load before the run {load:.1f}"
    versions = "".join(f", {name} {version}" for name, version in machine.get("peers", {}).items())
    return (
        f"{machine['cpu']}, {machine['threads']} threads ({machine['capability']}), GPU: {machine['gpu']}; "
        f"Python {machine['python']}, torch {machine['torch']}, kdkernels {machine['kdkernels']}"
        f"{versions}, commit {commit}, {result['datetime'][:10]}{load}."
    )


def lost_to_baselines(cells: list[dict[str, Any]], name: str) -> str:
    mine = [cell for cell in cells if name in cell["providers"]]
    lost = [cell for cell in mine if cell["providers"][name]["median_ms"] > best(cell)]
    return f"- `{name}` is slower than the better baseline in {len(lost)} of {len(mine)} cells."


def not_measured(cells: list[dict[str, Any]]) -> list[str]:
    missing = {name: why for cell in cells for name, why in cell.get("absent", {}).items()}
    return [f"- {name} was not measured: {why}." for name, why in sorted(missing.items())]


def table(result: dict[str, Any]) -> str:
    """Milliseconds (median) of every provider; how much faster each backend is than the better baseline."""
    cells = timings(result)
    backends, others = present(cells, BACKENDS), peers_in(cells)
    lines = [
        machine_line(result),
        "",
        "Medians in ms of interleaved runs; × is against the better of eager and compile, bold where ours is the "
        "slower; the share is of the copy bandwidth measured in the same rounds (every input read once, and the "
        "gradient written once with the backward).",
        "",
    ]
    lines += [lost_to_baselines(cells, name) for name in backends]
    for name in others:
        for backend in backends[:1]:
            mine = [cell for cell in cells if {name, backend} <= cell["providers"].keys()]
            lost = [
                c for c in mine if c["providers"][name]["median_ms"] < c["providers"][backend]["median_ms"]
            ]
            lines.append(f"- {name} is faster than `{backend}` in {len(lost)} of {len(mine)} cells.")
    lines += not_measured(cells)
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


def wanted(cell: dict[str, Any]) -> float:
    """What a loss from hidden states may take, in floors: with 100 classes Python is most of the time."""
    return 1.7 if cell["shape"][-1] <= 100 else 1.1


def below(value: float, most: float) -> str:
    """Bold where it is above what is wanted, or about to be."""
    return f"{value:.2f}" if value <= most else f"**{value:.2f}**"


def over(cell: dict[str, Any], name: str, others: Sequence[str]) -> float | None:
    """The time of `name` in that of the fastest of `others`."""
    times = [cell["providers"][other]["median_ms"] for other in others if other in cell["providers"]]
    return cell["providers"][name]["median_ms"] / min(times) if times else None


def of_saved(cell: dict[str, Any], name: str) -> str:
    """The time in that of the same loss with a learnt head, or with the teacher's logits formed anew."""
    value = over(cell, name, OURS_OTHERWISE)
    if value is None:
        return "–"
    return below(value, FROZEN if "unfrozen" in cell["providers"] else 1.0)


def linear_table(result: dict[str, Any]) -> str:
    """The losses from hidden states: every provider, in ms, in floors, and against the baselines and Liger."""
    cells = timings(result)
    [ours, *_] = present(cells, BACKENDS)
    others, floors = peers_in(cells), present(cells, FLOORS)
    slow = [cell for cell in cells if over(cell, ours, [FLOOR]) > wanted(cell)]
    slower = [cell for cell in cells if over(cell, ours, FLOORS) > wanted(cell)]
    frozen = [cell for cell in cells if "unfrozen" in cell["providers"]]
    not_saved = [cell for cell in frozen if over(cell, ours, ["unfrozen"]) > FROZEN]
    liger = [cell for cell in cells if "liger" in cell["providers"]]
    lost = [cell for cell in liger if over(cell, ours, ["liger"]) > 1]
    bound = "1.1 times (1.7 times at 100 classes)"
    lines = [
        machine_line(result),
        "",
        "Medians in ms of interleaved runs of forward + backward, with the gradients of the student's features and, "
        "where it is not frozen, of the head. The floor is the matrix products of the loss by `torch.mm` with nothing "
        "between them (2 for an unfrozen loss's logits, 2 for its gradients), in the dtype of the inputs; the floor of "
        'oneDNN the same products by it. "/ floor" is the time in floors; "/ best floor" in the faster of the two; '
        '"× better" how many times as fast as the better of eager and compile, "× liger" as Liger\'s chunked loss '
        '(beta 0, compiled); "of full" the time in that of the same loss with a learnt head, or without the cache. '
        "Bold is what loses, or is above what is wanted: "
        + bound
        + f" the floor, {FROZEN} of the learnt head's. "
        '"eager, upcast" takes the softmaxes in float32, as under autocast; otherwise they have the logits\' dtype.',
        "",
        lost_to_baselines(cells, ours),
        f"- `{ours}` is slower than Liger in {len(lost)} of {len(liger)} cells.",
        f"- `{ours}` takes more than {bound} the floor of `torch.mm` in {len(slow)} of {len(cells)} cells, and the "
        f"faster floor in {len(slower)}.",
        f"- With a frozen head it takes more than {FROZEN} of the time with a learnt one in {len(not_saved)} of "
        f"{len(frozen)} cells.",
        *not_measured(cells),
        "",
    ]
    header = ["loss", "size", "dtype", *BASELINES, *others, *floors, *present(cells, OURS_OTHERWISE), ours]
    header += ["/ floor", "/ best floor", "× better", "× liger", "of full", *present(cells, BACKENDS)[1:]]
    rows = []
    for cell in cells:
        row = [loss_of(cell), shape_of(cell), cell["dtype"]]
        row += [median(cell, name) for name in header[3 : header.index(ours) + 1]]
        row += [below(over(cell, ours, names), wanted(cell)) for names in ([FLOOR], FLOORS)]
        row += [ratio(cell, ours), faster(1 / over(cell, ours, ["liger"])) if cell in liger else "–"]
        row += [of_saved(cell, ours), *(median(cell, name) for name in present(cells, BACKENDS)[1:])]
        rows.append(row)
    lines += lines_of(header, rows)
    if peaks_of(result):
        lines += ["", *memory_lines(result, ours)]
    return "\n".join(lines) + "\n"


def peaks_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [b["extra_info"] for b in result["benchmarks"] if "extra_bytes" in b["extra_info"]]


# Of eager's extra memory, by the number of classes.
LEAST_MEMORY = {32_000: 1 / 8, 128_256: 1 / 15}


def memory_lines(result: dict[str, Any], ours: str) -> list[str]:
    peaks = peaks_of(result)
    names = list(dict.fromkeys(name for peak in peaks for name in peak["extra_bytes"]))
    fractions = ", ".join(
        f"1/{round(1 / least)} at {classes} classes" for classes, least in LEAST_MEMORY.items()
    )
    rows = []
    for peak in peaks:
        extra = peak["extra_bytes"]
        row = [loss_of(peak), shape_of(peak), peak["dtype"]]
        row += [f"{extra[name] / 2**20:.0f}" if name in extra else "–" for name in names]
        part = extra[ours] / extra["eager"]
        text = f"1/{1 / part:.1f}"
        row.append(text if part <= LEAST_MEMORY[peak["shape"][-1]] else f"**{text}**")
        rows.append(row)
    return [
        "Extra memory of one forward + backward, MiB: the highest resident memory of a process of its own while the "
        "step runs, less what was resident before it (the inputs), less the gradients that it leaves behind. With a "
        "learnt head that flatters whoever holds logits and the head's gradient one after the other, as eager and "
        "compile do: their logits take the place that the gradient takes later, and count only by what they are more. "
        "With a frozen head nothing is subtracted but the features' gradient, and the number is all that the loss "
        f"holds (Liger's then holds a head's gradient that nobody asked for). Bold: above what is wanted, {fractions}, "
        "of eager's.",
        "",
        *lines_of(["loss", "size", "dtype", *names, f"{ours} / eager"], rows),
    ]


def linear_readme(result: dict[str, Any]) -> str:
    cells = timings(result)
    [ours, *_] = present(cells, BACKENDS)
    columns = [*BASELINES, *(["liger"] if "liger" in peers_in(cells) else []), FLOOR, ours]
    header = ["loss", "rows × features × classes", "dtype", *columns, "/ floor", "× the better"]
    rows = [
        [f"`{loss_of(cell)}`", shape_of(cell), cell["dtype"]]
        + [median(cell, name) for name in columns]
        + [below(over(cell, ours, [FLOOR]), wanted(cell)), ratio(cell, ours)]
        for cell in cells
    ]
    lines = lines_of(header, rows)
    for peak in peaks_of(result):
        extra = {name: f"{value / 2**20:.0f}" for name, value in peak["extra_bytes"].items()}
        text = ", ".join(f"{name} {value}" for name, value in extra.items())
        lines += ["", f"Extra memory, `{loss_of(peak)}` at {shape_of(peak)}, {peak['dtype']}, MiB: {text}."]
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
    names = [*BASELINES, *peers_in(cells), *present(cells, FLOORS), *present(cells, BACKENDS)]
    size = (6.5 * len(dtypes), 0.8 + 2.2 * len(groups))
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
    columns = min(len(labels), 4 * len(dtypes))  # what the width holds
    figure.legend(labels.values(), labels.keys(), ncol=columns, loc="upper center", frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.55 / size[1]))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def is_result(file: Path) -> bool:
    return "benchmarks" in json.loads(file.read_text())


def split(result: dict[str, Any]) -> list[tuple[dict[str, Any], bool]]:
    """The losses of logits, and those from hidden states, each as a result of its own, where there are any."""
    parts = []
    for linear in (False, True):
        mine = [b for b in result["benchmarks"] if (b["extra_info"].get("suite") == LINEAR) == linear]
        if any("providers" in b["extra_info"] for b in mine):
            parts.append(({**result, "benchmarks": mine}, linear))
    return parts


def step_lines(steps: list[dict[str, Any]]) -> list[str]:
    """What each method adds to a student's step and a teacher's forward pass."""
    header = ["method", "batch", "student step", "teacher forward", "distillation step", "added", "quartiles"]
    rows = []
    for info in steps:
        low, _, high = info["quartiles_percent"]
        times = [f"{info['median_ms'][name]:.1f}" for name in header[2:5]]
        rows.append(
            [f"`{info['method']}`", str(info["batch"]), *times, f"{info['overhead_percent']:+.1f} %",
             f"{low:+.1f} to {high:+.1f} %"]
        )  # fmt: skip
    return lines_of(header, rows)


def main(arguments: list[str]) -> None:
    files = [Path(a) for a in arguments] or [f for f in sorted(RESULTS.glob("*.json")) if is_result(f)]
    if not files:
        raise SystemExit(
            f"no result files in {RESULTS}: run pytest benchmarks --benchmark-json={RESULTS}/NAME.json"
        )
    for file in files:
        result = json.loads(file.read_text())
        parts = split(result)
        tables = [(linear_table if linear else table)(part) for part, linear in parts]
        short = [(linear_readme if linear else readme)(part) for part, linear in parts]
        steps = [b["extra_info"] for b in result["benchmarks"] if b["extra_info"].get("suite") == TRAIN_STEP]
        if steps:
            short.append("\n".join(step_lines(steps)))
            tables.append("\n".join([machine_line(result), "", *step_lines(steps), ""]))
        written = [file.with_suffix(".md")]
        written[0].write_text("\n".join(tables))
        if parts:
            written.append(file.with_suffix(".png"))
            plot(result, written[-1])
        print("\n".join(map(str, written)), "\n".join(short), sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
