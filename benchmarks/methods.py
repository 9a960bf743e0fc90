"""`python -m benchmarks.methods [SEEDS]`: every Fashion-MNIST recipe of kdkernels.train, for docs/methods.md.

One teacher is trained; each recipe then trains the student with it SEEDS times (3), on the same images and with the
unlabelled pool. The student alone is trained once for each seed, with the same images, first weights, steps and
schedule. Runs that are there already (benchmarks/runs/) are not done again; the numbers that the document is made from
stay in benchmarks/results/methods.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import kdkernels
from kdkernels.train import recipes

FOLDER = Path(__file__).parent
RUNS, RESULT = FOLDER / "runs", FOLDER / "results" / "methods.json"
DOCUMENT = FOLDER.parent / "docs" / "methods.md"
SUFFIX = "-cnn-16-32-64-cnn-8-16-32-fashion-mnist"

HEAD = """# What each method gains on Fashion-MNIST

Written by `python -m benchmarks.methods` from benchmarks/results/methods.json.

{labels} labelled images of Fashion-MNIST; a teacher of {teacher_parameters:,} parameters that saw all
{all_labels:,} labels ({teacher:.1f} % of the {test:,} test images); a student of {student_parameters:,}. Test
accuracy in percent, mean ± standard deviation over {seeds} seeds, which draw the labelled and validation
images, the first weights and the batches. Of two to five weights a method was given the best on validation
accuracy with seed 0 (Sinkhorn, TAKD and DGKD: one was tried); each run's epoch is chosen on validation; the
test images are scored once a run. RCO's teachers learn within its runs, one for each seed. The rate, the
optimizer (AdamW), the epochs and the batches are the same for all unless the options say otherwise.

The student alone: **{alone}**. "Gain" is over that. "Clear": the gain is larger than both spreads together.
"With the pool" the student also sees what the teacher says of the {pool:,} images without a label, five times as many
images a step: not like for like with training alone.

Parameters and MFLOPs (of one image) are of what is shipped: SimKD, IJCKD and ATSC ship a connector and the teacher's
classifier too.
"""


def run(name: str, *arguments: str) -> dict[str, Any]:
    folder = RUNS / name
    if not (folder / "summary.json").exists():
        flags = ["--out", str(RUNS), "--name", name, "--quiet", *arguments]
        if (folder / "config.json").exists():
            flags = ["--resume", str(folder), "--quiet"]
        # Models this small gain nothing from a second thread.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "kdkernels.train", *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        print(name, flush=True)
    return json.loads((folder / "summary.json").read_text())


def of_recipe(name: str, seeds: int, checkpoint: str) -> dict[str, Any]:
    """What a recipe's runs came to."""
    # RCO needs the checkpoints of a teacher that it sees learning.
    given = [] if name.startswith("rco") else ["--teacher-checkpoint", checkpoint]
    summary = run(name, *given, "--seeds", str(seeds), "--recipe", name, "--no-alone")
    config = json.loads((RUNS / name / "config.json").read_text())
    optimizer = {} if config["optimizer"] == "adamw" else {"optimizer": config["optimizer"]}
    return {
        "options": config["options"] | optimizer,
        "same_images": [summary["student_same_images_accuracy"], summary["student_same_images_accuracy_std"]],
        "pool": [summary["student_accuracy"], summary["student_accuracy_std"]],
        "parameters": summary["parameters"]["student"],
        "flops": summary["flops"]["student"],
        "seconds": summary["seconds"],
    }


def collect(seeds: int) -> dict[str, Any]:
    first = run("teacher", "--no-pool")
    checkpoint = str(RUNS / "teacher" / "teacher.pt")
    names = [name for name in recipes.names() if name.endswith(SUFFIX)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        alone = pool.submit(
            run, "alone", "--teacher-checkpoint", checkpoint, "--seeds", str(seeds), "--no-pool"
        )
        jobs = [pool.submit(of_recipe, name, seeds, checkpoint) for name in names]
        rows = {name.removesuffix(SUFFIX): job.result() for name, job in zip(names, jobs)}
    of_students = alone.result()
    return {
        "machine": {
            "system": platform.system(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "kdkernels": kdkernels.__version__,
        },
        "seeds": seeds,
        "teacher": first["teacher_accuracy"],
        "alone": [of_students["student_alone_accuracy"], of_students["student_alone_accuracy_std"]],
        "parameters": {
            "teacher": first["parameters"]["teacher"],
            "student": first["parameters"]["student_alone"],
        },
        "images": first["images"],
        "methods": rows,
    }


def document(result: dict[str, Any]) -> str:
    mean, spread = result["alone"]
    images = result["images"]
    lines = [
        HEAD.format(
            labels=images["labelled"],
            all_labels=images["labelled"] + images["pool"],
            pool=images["pool"],
            test=images["test"],
            teacher=result["teacher"],
            teacher_parameters=result["parameters"]["teacher"],
            student_parameters=result["parameters"]["student"],
            seeds=result["seeds"],
            alone=f"{mean:.1f} ± {spread:.1f}",
        ),
        "| method | same images | gain | clear | with the pool | gain | clear | parameters | MFLOPs | options |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = sorted(result["methods"].items(), key=lambda item: -item[1]["same_images"][0])
    behind = []
    for name, row in order:
        cells = [f"`{name}`"]
        for kind in ("same_images", "pool"):
            value, deviation = row[kind]
            clear = value - mean > deviation + spread
            cells += [f"{value:.1f} ± {deviation:.1f}", f"{value - mean:+.1f}", "yes" if clear else "**no**"]
            if kind == "same_images" and not clear:
                behind.append(name)
        options = ", ".join(
            f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["options"].items()
        )
        cells += [f"{row['parameters']:,}", f"{row['flops'] / 1e6:.3g}", options]
        lines.append("| " + " | ".join(cells) + " |")
    machine = result["machine"]
    lines += [
        "",
        f"On the same images {len(order) - len(behind)} of {len(order)} are clear of the student alone"
        + (f"; not: {', '.join(f'`{name}`' for name in behind)}." if behind else "."),
        "",
        f"Python {machine['python']}, torch {machine['torch']}, kdkernels {machine['kdkernels']}, "
        f"CPU, a thread a run. Mean of the spreads: "
        f"{statistics.mean(row['same_images'][1] for _, row in order):.1f}.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    seeds = int(arguments[0]) if arguments else 3
    RUNS.mkdir(exist_ok=True)
    result = collect(seeds)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    DOCUMENT.write_text(document(result))
    print(DOCUMENT)


if __name__ == "__main__":
    main(sys.argv[1:])
