"""`python -m benchmarks.report [FILE...]`: result files → Markdown tables and plots beside them.

Without arguments it takes every JSON file of benchmarks/results. The tables hold every cell that was measured,
lost ones too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
BASELINES = ("eager", "compile")
COLOURS = {
    "eager": "#9aa0a6",
    "compile": "#5f6368",
    "reference": "#d7b8f3",
    "cpu": "#1a73e8",
    "triton": "#e37400",
    "cuda": "#188038",
}


def timings(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [b["extra_info"] for b in result["benchmarks"] if "providers" in b["extra_info"]]


def table(result: dict[str, Any]) -> str:
    """Milliseconds (median) of every provider; how much faster each backend is than the better baseline."""
    machine = result["machine_info"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads ({machine['capability']}), GPU: {machine['gpu']}; "
        f"Python {machine['python']}, torch {machine['torch']}, kdkernels {machine['kdkernels']}, "
        f"commit {result['commit_info']['id'][:12]}{' + changes' if result['commit_info'].get('dirty') else ''}, "
        f"{result['datetime'][:10]}.",
        "",
        "Medians in ms of interleaved runs; × is against the better of eager and compile; the share is of the "
        "copy bandwidth measured in the same rounds (2 reads, and 1 write with the backward).",
        "",
    ]
    cells = timings(result)
    backends = sorted({p for c in cells for p in c["providers"]} - {*BASELINES, "copy"})
    header = ["rows × classes", "dtype", "what", *BASELINES]
    header += [x for b in backends for x in (b, f"{b} ×", f"{b} share")]
    lines += ["| " + " | ".join([*header, "copy GB/s"]) + " |", "|" + "---|" * (len(header) + 1)]
    for cell in cells:
        providers = cell["providers"]
        row = [f"{cell['shape'][0]}×{cell['shape'][1]}", cell["dtype"], cell["what"]]
        row += [f"{providers[b]['median_ms']:.3f}" for b in BASELINES]
        best = min(providers[b]["median_ms"] for b in BASELINES)
        for backend in backends:
            if backend in providers:
                median = providers[backend]["median_ms"]
                row += [
                    f"{median:.3f}",
                    f"{best / median:.2f}",
                    f"{100 * providers[backend]['copy_share']:.0f} %",
                ]
            else:
                row += ["–"] * 3
        lines.append("| " + " | ".join([*row, f"{providers['copy']['gb_per_s']:.1f}"]) + " |")
    peaks = [b["extra_info"] for b in result["benchmarks"] if "gradients" in b["extra_info"]]
    if peaks:
        names = list(peaks[0]["gradients"])
        lines += ["", "Peak resident memory of one forward + backward above its inputs, in gradients:", ""]
        lines += ["| rows × classes | dtype | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
        for peak in peaks:
            row = [f"{peak['shape'][0]}×{peak['shape'][1]}", peak["dtype"]]
            lines.append("| " + " | ".join([*row, *(f"{peak['gradients'][n]:.2f}" for n in names)]) + " |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed against the better baseline, one group of bars for each cell."""
    cells = timings(result)
    groups = sorted({(c["dtype"], c["what"]) for c in cells}, reverse=True)
    figure, axes = plt.subplots(len(groups), 1, figsize=(9, 2.6 * len(groups)), squeeze=False, sharex=True)
    for axis, group in zip(axes[:, 0], groups):
        mine = [c for c in cells if (c["dtype"], c["what"]) == group]
        names = [n for n in mine[0]["providers"] if n != "copy"]
        for i, name in enumerate(names):
            heights, places = [], []
            for j, cell in enumerate(mine):
                best = min(cell["providers"][b]["median_ms"] for b in BASELINES)
                heights.append(best / cell["providers"][name]["median_ms"])
                places.append(j + (i - (len(names) - 1) / 2) * 0.8 / len(names))
            bars = axis.bar(places, heights, 0.8 / len(names), label=name, color=COLOURS.get(name))
            axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylabel("× better baseline")
        axis.set_title(f"{group[0]}, {group[1]}", fontsize=10, loc="left")
        axis.margins(y=0.18)
        axis.set_xticks(range(len(mine)), [f"{c['shape'][0]}×{c['shape'][1]}" for c in mine])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncol=len(names), loc="upper center", frameon=False)
    axes[-1, 0].set_xlabel("rows × classes")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    files = [Path(a) for a in arguments] or sorted(RESULTS.glob("*.json"))
    if not files:
        raise SystemExit(
            f"no result files in {RESULTS}: run pytest benchmarks --benchmark-json={RESULTS}/NAME.json"
        )
    for file in files:
        result = json.loads(file.read_text())
        file.with_suffix(".md").write_text(table(result))
        plot(result, file.with_suffix(".png"))
        print(f"{file.with_suffix('.md')}\n{file.with_suffix('.png')}")


if __name__ == "__main__":
    main(sys.argv[1:])
