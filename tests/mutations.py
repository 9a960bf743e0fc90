"""Breaks the code in known ways, one at a time, and checks that the tests notice: `python tests/mutations.py [WORD]`.

Works on a copy of the tree; builds what a change touches. Prints a line for each break and fails if one survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str  # pytest's arguments


CPU, CUDA, TRITON = "csrc/cpu/kl_div.cpp", "csrc/cuda/kl_div.cu", "kdkernels/_triton/kl_div.py"
TRITON_ROWS = "kdkernels/_triton/rows.py"
OP, TRAIN = "kdkernels/ops/kl_div.py", "kdkernels/train/loop.py"


def grid(backend: str, *words: str) -> str:
    chosen = " or ".join(words) or "loss_and_gradients or last_class or masked"
    return f"tests/test_kl_div.py -k '{backend} and ({chosen})'"


MUTATIONS = [
    Mutation("cpu: zero gradient", CPU, "a * w - b * element.e", "0.0f", grid("cpu")),
    Mutation("cpu: sign of the gradient", CPU, "a * w - b * element.e", "b * element.e - a * w", grid("cpu")),
    Mutation("cpu: last class skipped", CPU, "std::min(kBlock, classes - begin)", "std::min(kBlock, classes - 1 - begin)", grid("cpu")),
    Mutation("cpu: mask ignored", CPU, "params.mask != nullptr &&", "false &&", grid("cpu")),
    Mutation("cpu: 1/T missing in the gradient", CPU, "sums, scale * input_inverse, stash", "sums, scale, stash", grid("cpu")),
    Mutation("cpu: later blocks on the first one's scale", CPU, "sums.S *= rescale, sums.A *= rescale, sums.B *= rescale;", "", grid("cpu", "mass")),
    Mutation("cpu: a bad guess kept", CPU, "exp_y < 0.02 || exp_y > 50", "false", grid("cpu", "mass")),
    Mutation("cpu: P = 0 taken for the least float", CPU, "return least > kLeastExp2 &&", "return", grid("cpu", "minus")),
    Mutation("cpu: scale_rows does nothing", "csrc/cpu/scale_rows.cpp", "if (scale == S(1)) continue;", "continue;", grid("cpu", "twice")),
    Mutation("both natives: series sign", "csrc/math.h", "near ? p * (e - x)", "near ? p * (e + x)", grid("cuda")),
    Mutation("cuda: mask ignored", CUDA, "params.mask != nullptr &&", "false &&", grid("cuda")),
    Mutation("cuda: a barrier missing", "csrc/cuda/reduce.cuh", "__syncthreads();  // the previous reduction may still be read", "", "tests/test_cuda_on_cpu.py -k 'not sanit'"),
    Mutation("cuda: temperature gradient off", CUDA, "sums[1] - sums[2] * sums[3]", "-sums[1]", grid("cuda", "row_arguments")),
    Mutation("triton: mask ignored", TRITON, "live = exists & (tl.load(mask_ptr + row, mask=exists, other=0) != 0)", "live = exists", grid("triton")),
    Mutation("triton: zero gradient", TRITON, "difference * grad_scale_q", "difference * 0.0", grid("triton")),
    Mutation("triton: last class skipped", TRITON_ROWS, "mask=live & (column < classes)", "mask=live & (column < classes - 1)", grid("triton")),
    Mutation("op: divides by all rows", OP, "each = mask.sum().clamp(min=1)", "each = torch.ones_like(mask).sum()", grid("cpu", "batchmean")),
    Mutation("op: buffer handed out twice", OP, "gradients, ctx.gradients = ctx.gradients, None", "gradients = ctx.gradients", grid("cpu", "twice")),
    Mutation("op: reverse ignored", OP, "    if reverse:\n        input, target", "    if False:\n        input, target", grid("cpu", "loss_and")),
    Mutation(
        "op: upstream gradient ignored",
        OP,
        "upstream, of_weights = grad_output.contiguous(), None",
        "upstream, of_weights = torch.ones_like(grad_output), None",
        grid("cpu", "twice or row_arg"),
    ),
    Mutation("op: gradient of weights missing its factor", OP, "of_weights = rows * grad_output *", "of_weights = rows *", grid("cpu", "row_arguments")),
    Mutation("op: double backward without the upstream gradient", OP, "wanted, grad_output, create_graph=True", "wanted, torch.ones_like(grad_output), create_graph=True", grid("cpu", "gradcheck or double")),
    Mutation("train: T² missing", TRAIN, "temperature**2 * kl_div(", "kl_div(", "tests/test_train.py -k 'loss or soft or gradient'"),
]  # fmt: skip


def shell(command: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(cwd), **extra}
    return subprocess.run(command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True)


def main(word: str = "") -> int:
    survivors = 0
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        files = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for name in files.splitlines():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
        build = f"{sys.executable} setup.py -q build_ext --inplace"
        native = shell(build, tree, KDKERNELS_CUDA="0")
        if native.returncode:
            raise SystemExit(native.stderr)
        stale = False  # whether the native module is that of the break before
        for mutation in MUTATIONS:
            if word not in mutation.name:
                continue
            path = tree / mutation.file
            text = path.read_text()
            if mutation.old not in text:
                raise SystemExit(f"{mutation.name}: {mutation.file} no longer holds {mutation.old!r}")
            path.write_text(text.replace(mutation.old, mutation.new))
            rebuild = mutation.file.startswith(("csrc/cpu", "csrc/math"))
            if rebuild or stale:
                shell(build, tree, KDKERNELS_CUDA="0")
            stale = rebuild
            done = shell(f"{sys.executable} -m pytest -x -q -p no:cacheprovider {mutation.tests}", tree)
            # 1: tests failed. Anything else (no test chosen, a crash) proves nothing of the tests.
            noticed = done.returncode == 1
            survivors += not noticed
            verdict = "noticed" if noticed else f"SURVIVED (pytest {done.returncode})"
            print(f"{verdict:10} {mutation.name}", flush=True)
            path.write_text(text)
    print(f"{survivors} survived")
    return min(survivors, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
