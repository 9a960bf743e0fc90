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
CPU_ROW, CPU_BLOCKS = "csrc/cpu/kl_row.h", "csrc/cpu/softmax.h"
CPU_TOPK, CPU_MULTI = "csrc/cpu/topk_kl_div.cpp", "csrc/cpu/multi_teacher_kl_div.cpp"
OP, TRAIN = "kdkernels/ops/kl_div.py", "kdkernels/train/loop.py"
OP_TOPK, OP_MULTI = "kdkernels/ops/topk_kl_div.py", "kdkernels/ops/multi_teacher_kl_div.py"


def grid(backend: str, *words: str, op: str = "kl_div") -> str:
    chosen = " or ".join(words) or "loss_and_gradients or last_class or masked"
    return f"tests/test_{op}.py -k '{backend} and ({chosen})'"


def topk(*words: str) -> str:
    return grid("cpu", *words, op="topk_kl_div")


def multi(*words: str) -> str:
    return grid("cpu", *words, op="multi_teacher_kl_div")


MUTATIONS = [
    Mutation("cpu: zero gradient", CPU_ROW, "a * w_j - b * element.e", "0.0f", grid("cpu")),
    Mutation("cpu: sign of the gradient", CPU_ROW, "a * w_j - b * element.e", "b * element.e - a * w_j", grid("cpu")),
    Mutation("cpu: last class skipped", CPU_BLOCKS, "std::min(kBlock, classes - begin)", "std::min(kBlock, classes - 1 - begin)", grid("cpu")),
    Mutation("cpu: mask ignored", CPU, "params.mask != nullptr &&", "false &&", grid("cpu")),
    Mutation("cpu: 1/T missing in the gradient", CPU, "sums, scale * input_inverse, stash", "sums, scale, stash", grid("cpu")),
    Mutation("cpu: later blocks on the first one's scale", CPU_ROW, "sums.S *= rescale, sums.A *= rescale, sums.B *= rescale;", "", grid("cpu", "mass")),
    Mutation("cpu: a bad guess kept", CPU_ROW, "exp_y < 0.02 || exp_y > 50", "false", grid("cpu", "mass")),
    Mutation("cpu: P = 0 taken for the least float", CPU_ROW, "return least > kLeastExp2 &&", "return", grid("cpu", "minus")),
    Mutation("cpu: scale_rows does nothing", "csrc/cpu/scale_rows.cpp", "if (scale == S(1)) continue;", "continue;", grid("cpu", "twice")),
    Mutation("both natives: series sign", "csrc/math.h", "near ? p * (e - x)", "near ? p * (e + x)", grid("cuda")),
    Mutation("cuda: mask ignored", CUDA, "params.mask != nullptr &&", "false &&", grid("cuda")),
    Mutation("cuda: a barrier missing", "csrc/cuda/reduce.cuh", "__syncthreads();  // the previous reduction may still be read", "", "tests/test_cuda_on_cpu.py -k 'not sanit'"),
    Mutation("cuda: temperature gradient off", CUDA, "sums[1] - sums[2] * sums[3]", "-sums[1]", grid("cuda", "row_arguments")),
    Mutation("triton: mask ignored", TRITON, "live = exists & (tl.load(mask_ptr + row, mask=exists, other=0) != 0)", "live = exists", grid("triton")),
    Mutation("triton: zero gradient", TRITON, "difference * grad_scale_q", "difference * 0.0", grid("triton")),
    Mutation("triton: last class skipped", TRITON, "mask=live & (column < classes)", "mask=live & (column < classes - 1)", grid("triton")),
    Mutation("op: divides by all rows", "kdkernels/ops/rows.py", "each = mask.sum().clamp(min=1)", "each = torch.ones_like(mask).sum()", grid("cpu", "batchmean")),
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
    Mutation("topk cpu: zero gradient of the rest", CPU_TOPK, "block[j] *= a;", "block[j] *= 0 * a;", topk()),
    Mutation("topk cpu: sign of the named classes", CPU_TOPK, "store(scale * inverse * (whole", "store(-scale * inverse * (whole", topk()),
    Mutation("topk cpu: last class skipped", CPU_BLOCKS, "std::min(kBlock, classes - begin)", "std::min(kBlock, classes - 1 - begin)", topk()),
    Mutation("topk cpu: mask ignored", CPU_TOPK, "params.mask != nullptr &&", "false &&", topk()),
    Mutation("topk cpu: named classes in the rest too", CPU_TOPK, "if (any == 0) return x;", "return x;", topk()),
    Mutation("topk cpu: later blocks on the first one's scale", CPU_TOPK, "rest.sum *= rescale;", "", topk("every_number", "far_below")),
    Mutation("topk cpu: repeats unnoticed", CPU_TOPK, "|| !chosen.add(indices[i])", "|| (chosen.add(indices[i]), false)", topk("refused")),
    Mutation("topk cpu: biased exponentials", CPU_TOPK, "exp2_unbiased(y)", "exp2_above(y)", topk("near_convergence")),
    Mutation("topk cpu: gradient of log_probs without the rest's", CPU_TOPK, "term.delta - slope", "term.delta", topk()),
    Mutation("topk cpu: temperature's gradient without the rest's", CPU_TOPK, "of_rest * (rest.moment", "0 * (rest.moment", topk("row_arguments")),
    Mutation("topk op: padding left as it comes", OP_TOPK, "                grad_input[:, stop:] = 0\n", "", topk("padding")),
    Mutation("topk op: indices of the whole student", OP_TOPK, "indices - start if start else indices", "indices", topk("padding")),
    Mutation("topk op: buffer handed out twice", OP_TOPK, "gradients, ctx.gradients = ctx.gradients, None", "gradients = ctx.gradients", topk("twice")),
    Mutation("topk op: gradient of weights is the scaled loss's", OP_TOPK, "_run(True, *inputs, None, 1.0, ", "_run(True, *inputs, row_scale, scale, ", topk("row_arguments")),
    Mutation("multi cpu: zero gradient", CPU_MULTI, "gradient[j] += of_e * e[j] - of_v * v[j]", "gradient[j] += 0 * e[j]", multi()),
    Mutation("multi cpu: only the last teacher's gradient", CPU_MULTI, "gradient[j] += of_e", "gradient[j] = of_e", multi()),
    Mutation("multi cpu: sign of the gradient of a few rows", CPU_MULTI, "fast, sums, scale, stash, gradient", "fast, sums, -scale, stash, gradient", multi()),
    Mutation("multi cpu: mask ignored", CPU_MULTI, "params.mask == nullptr ||", "true ||", multi()),
    Mutation("multi cpu: teacher_mask ignored", CPU_MULTI, "params.teacher_mask == nullptr ||", "true ||", multi()),
    Mutation("multi cpu: a bad guess kept", CPU_MULTI, "ratio < 0.2 || ratio > 50", "false", multi("mass")),
    Mutation("multi cpu: Q = 0 taken for the least float", CPU_MULTI, "!student.underflows &&", "", multi("minus", "without_q")),
    Mutation("multi cpu: the first teacher's temperature for all", CPU_MULTI, "if (factor == new_factor) return;", "if (factor == factor) return;", multi("many_temp")),
    Mutation("multi op: buffer handed out twice", OP_MULTI, "of_input, ctx.gradient = ctx.gradient, None", "of_input = ctx.gradient", multi("twice")),
    Mutation("multi op: upstream gradient ignored", OP_MULTI, "scale_rows_(of_input, upstream, backend)", "None", multi("twice", "row_arg")),
    Mutation("multi op: rows' weights ignored", OP_MULTI, "weight * (scale if row_scale is None else row_scale)", "weight", multi("row_arg")),
    Mutation("multi op: one side of the temperature's gradient", OP_MULTI, "found[-2] + found[-1]", "found[-1]", multi("row_arg")),
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
