"""What the compiler makes of the Triton kernels, without a GPU: access widths, registers, spills.

Run as a script it is the compiling half, a process of its own because TRITON_INTERPRET turns the compiler
off: it records what each launcher starts, compiles exactly that, and prints a report as JSON.
"""

import contextlib
import importlib
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

DTYPES = ["float32", "float16", "bfloat16"]
# Lengths that take a 2-D tile, one tile with and without padding, the longest one tile, and streaming.
CLASSES = [100, 1000, 4096, 8192, 16384, 32000, 128256]
MAIN = ["loss", "grad_input"]
OUTPUTS = [*MAIN, "grad_target", "grad_input_temperature", "grad_target_temperature"]
ROW_INPUTS = ["input_temperature", "target_temperature", "row_scale", "mask"]
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
SHARED = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}  # bytes a program may have
DISTANCE = 5  # the kernel of mmd's mean distance
SIDES = ["input", "input_weight", "input_bias", "target", "target_weight", "target_bias"]


def cases(target: str) -> list[dict[str, Any]]:
    def case(kernel: str, dtype: str, classes: int, tensors: list[str], **options: Any) -> dict[str, Any]:
        if kernel in ("gaussian", "mmd") and dtype == "float16":
            options["grad_dtype"] = "float32"  # until it meets the upstream gradient
        return {"kernel": kernel, "dtype": dtype, "classes": classes, "tensors": tensors, "options": options}

    every = [*MAIN, "terms", "grad_input_temperature", *ROW_INPUTS, "soft_scale"]
    parts = {"hard_weight": 0.5, "label_smoothing": 0.1, "z_loss": 1e-4, "logit_mse": 0.1, "softcap": 30.0}
    of_student, of_both = [f"grad_{side}" for side in SIDES[:3]], [f"grad_{side}" for side in SIDES]
    # Compiled for one target only: what differs is the arithmetic.
    divergences = [
        case("logit_loss", dtype, 4096, ["loss", "terms"] if divergence == 9 else MAIN, divergence=divergence)
        for dtype in ("float32", "bfloat16")
        for divergence in range(10)
    ]
    found = [
        *(divergences if target == "sm_90" else []),
        case("logit_loss", "float32", 8192, MAIN, divergence=1, hard_weight=0.5),
        case(
            "logit_loss", "float16", 1000, every, divergence=5, standardize=True, hard_weight=0.5, z_loss=1e-4
        ),
        case("logit_loss", "bfloat16", 32000, every, divergence=1, hard_weight=0.5, label_smoothing=0.1),
        case("logit_loss", "float32", 32000, MAIN, divergence=3),
        # As the end of a linear loss: everything on, the gradient for the next product of matrices.
        *(
            case(
                "logit_loss",
                "float32",
                classes,
                MAIN,
                divergence=divergence,
                hard_weight=0.5,
                z_loss=1e-4,
                logit_mse=0.1,
                grad_dtype="bfloat16",
            )
            for classes, divergence in ((4096, 0), (8192, 1), (4096, 7), (32000, 1), (32000, 3))
        ),
        # Few rows and many, which have tiles of their own.
        *(
            case("linear_loss", dtype, 1000, outputs, rows=rows, divergence=1, hard_weight=0.5)
            for dtype, rows in (("float32", 256), ("float32", 8192), ("float16", 256), ("bfloat16", 8192))
            for outputs in (["loss"], of_student)
        ),
        case(
            "linear_loss", "bfloat16", 1000, ["loss", "terms", *ROW_INPUTS], rows=256, divergence=3, **parts
        ),
        case("linear_loss", "bfloat16", 1000, [*of_both, *ROW_INPUTS], rows=256, divergence=1, one_head=True),
        case("multi_teacher_kl_div", "float32", 8192, [*MAIN, "losses"], teachers=16),
        case("multi_teacher_kl_div", "bfloat16", 32000, MAIN, teachers=3),
        case("topk_kl_div", "float32", 8192, MAIN, k=64, tail=0),
        case(
            "topk_kl_div",
            "bfloat16",
            32000,
            [*MAIN, "grad_log_probs", "grad_input_temperature"],
            k=64,
            tail=0,
        ),
        *(
            case("pool_mse", dtype, positions, [], side=side, channels_last=last)
            for side in ("fwd", "bwd")
            for dtype, positions, last in (
                ("float32", 49, False),
                ("bfloat16", 64, False),
                ("float16", 3136, False),
                ("float32", 49, True),
                ("bfloat16", 49, True),
                ("bfloat16", 1, True),
            )
        ),
        *(
            case("masked_feature_loss", dtype, positions, ["grad_student", "squares"])
            for dtype in DTYPES
            for positions in (49, 64, 3136)
        ),
        case("masked_feature_loss", "bfloat16", 3136, []),
        # Columns in one block and in several, aligned and not; then samples that are split, and classes.
        *(
            case("gaussian", dtype, features, ["grad_x", "grad_y"], samples=128, distance=distance)
            for dtype in DTYPES
            for features in (64, 100, 512)
            for distance in (0, 1)
        ),
        *(
            case("gaussian", dtype, 64, tensors, samples=8192, distance=1, stage=stage)
            for dtype in DTYPES
            for tensors in (["grad_x", "grad_y"], ["x_weights", "y_weights"])
            for stage in ("gaussian_moments_kernel", "gaussian_kernel")
        ),
        *(
            case("gaussian", dtype, 512, tensors, samples=128, distance=1, labels=True)
            for dtype in ("float32", "bfloat16")
            for tensors in (["grad_x"], ["grad_x", "grad_y", "x_weights", "y_weights"])
        ),
        # Gradients of all features in one program, and in parts; then classes; then what leads to the pairs.
        *(
            case("mmd", dtype, 512, ["grad_x", "grad_y"], samples=samples, of=kernel)
            for dtype, kernels in (("float32", range(5)), ("float16", (0,)), ("bfloat16", (4,)))
            for samples in (128, 8192)
            for kernel in kernels
        ),
        *(
            case(
                "mmd",
                dtype,
                512,
                ["grad_x", *more],
                samples=samples,
                of=kernel,
                labels=True,
                unbiased=True,
            )
            for dtype, samples, kernel, more in (
                ("float32", 128, 0, ["grad_y", "x_weights", "y_weights"]),
                ("bfloat16", 8192, 1, []),
            )
        ),
        *(case("mmd", "float32", 512, [], samples=samples, of=DISTANCE) for samples in (128, 8192)),
        *(
            case("mmd", dtype, features, [], samples=128, of=0, stage="prepare_samples_kernel")
            for dtype in DTYPES
            for features in (100, 512)
        ),
        *(
            case("mmd", "float32", 512, tensors, samples=128, of=0, stage=stage, **options)
            for stage in ("mmd_shares_kernel", "mmd_bandwidth_kernel")
            for tensors, options in (
                ([], {}),
                (["x_weights", "y_weights"], {"labels": True, "unbiased": True}),
            )
        ),
        # Few samples and many, aligned and not; then the squares of either way.
        *(
            case("coral", dtype, features, tensors, samples=samples, stage=stage, grad_dtype="float32")
            for dtype in DTYPES
            for features, samples, tensors in ((64, 8192, ["a", "b"]), (100, 128, []))
            for stage in ("means_kernel", "samples_kernel")
        ),
        case("coral", "float32", 64, ["a", "b", "weights"], samples=8192, stage="samples_kernel"),
        *(
            case("coral", "float32", features, ["a"], samples=samples, stage=stage)
            for features, samples, stage in (
                (512, 1024, "covariances_kernel"),
                (100, 1024, "covariances_kernel"),
                (1024, 512, "inner_products_kernel"),
                (128, 100, "inner_products_kernel"),
            )
        ),
        # Rows that share a warp and the longest that a program sorts; those that torch sorts, and weights.
        *(
            case("sliced_wasserstein", "float32", samples, ["grad_x", "grad_y"], p=p)
            for samples, p in ((16, 1.0), (4096, 2.0), (4096, 3.0))
        ),
        *(
            case("sliced_wasserstein", "float32", samples, tensors, p=p, stage=stage)
            for samples, tensors, p, stage in (
                (8192, ["grad_x", "grad_y"], 2.0, "merge_kernel"),
                (4096, ["grad_x", "grad_y", "x_weights", "y_weights"], 3.0, "merge_kernel"),
                (4096, ["y_weights"], 2.0, "sort_kernel"),
                (8192, ["x_weights"], 2.0, "sum_weights_kernel"),
            )
        ),
        # Few rows to a program, more and most; then all that costs, masses and early stops add.
        *(
            case("sinkhorn", "float32", 512, ["grad_x", "grad_y"], samples=samples, cost=cost, stage=stage)
            for stage in ("sinkhorn_step_kernel", "sinkhorn_gradient_kernel")
            for samples, cost in ((128, "sqeuclidean"), (2048, "cosine"), (8192, "euclidean"))
        ),
        *(
            case("sinkhorn", "float32", 512, [*grads, "extra"], samples=8192, cost="euclidean", stage=stage)
            for stage, grads in (
                ("sinkhorn_largest_kernel", []),
                ("sinkhorn_schedule_kernel", []),
                ("sinkhorn_step_kernel", []),
                ("sinkhorn_stop_kernel", []),
                ("sinkhorn_finish_kernel", []),
                ("sinkhorn_gradient_kernel", ["grad_a"]),
                ("sinkhorn_gradient_kernel", ["grad_x", "grad_y", "grad_a", "grad_b"]),
                ("sinkhorn_plan_kernel", []),
            )
        ),
        *(
            case(
                "sinkhorn",
                "float32",
                512,
                ["grad_x", "extra"],
                samples=128,
                cost="sqeuclidean",
                debias=False,
                stage=f"sinkhorn_{stage}_kernel",
            )
            for stage in ("largest", "schedule", "step", "stop", "finish", "gradient", "plan")
        ),
        *(case("kl_div", dtype, classes, MAIN) for dtype in DTYPES for classes in CLASSES),
        *(case("kl_div", "float32", classes, OUTPUTS + ROW_INPUTS) for classes in (100, 8192, 32000)),
        *(case("kl_div", "float32", classes, ["loss"]) for classes in (32000,)),
        *(case("kl_div", "float32", classes, MAIN) for classes in (1, 1001)),
        *(case("scale_rows", "float16", classes, []) for classes in (100, 1000, 32000)),
    ]
    if target != "sm_90":  # float16 differs from bfloat16 in its loads and stores alone
        found = [x for x in found if x["dtype"] != "float16" or {**x, "dtype": "bfloat16"} not in found]
    if target == "gfx942":  # where the tiles of a linear loss, chosen for NVIDIA's, spill in all but float16
        found = [x for x in found if x["kernel"] != "linear_loss" or x["dtype"] == "float16"]
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_wide_accesses_and_no_spills(target: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    root = Path(__file__).resolve().parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Two processes rather than a forked pool, which was seen to hang and to crash at its exit.
    halves = [
        subprocess.Popen(
            [sys.executable, __file__, target, half],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for half in ("0", "1")
    ]
    reports = []
    for process, (output, errors) in [(process, process.communicate()) for process in halves]:
        assert process.returncode == 0, errors
        reports += json.loads(output.splitlines()[-1])
    assert sum(len(report["lengths"]) for report in reports) == len(cases(target))

    failures = []
    for report in reports:
        line = "{name}: tile {tile}, {registers} registers, {spills} spills, {stack} B stack".format(**report)
        print(line, report["loads"], report["stores"])
        # What little is spilt below the limit of registers is the assembler's choice, to have more warps at a time.
        by_choice = 0 < report["spills"] <= 64 and report["registers"] < report["limit"]
        if not by_choice and (report["spills"] or report["stack"] or report["local_memory"]):
            failures.append(f"{line}: uses local memory")
        if report["shared"] > SHARED[target]:
            failures.append(f"{line}: {report['shared']} bytes of shared memory")
        # float32 tiles of 16 features arrive in single elements; wider ones spill.
        if report["narrow_copies"] and " linear_loss float32 " not in line:
            failures.append(f"{line}: tiles arrive {report['narrow_copies']} bytes at a time")
        for kind in ("loads", "stores"):
            # Per-row vectors are narrower; the tiles must be covered by wide accesses alone.
            wide = sum(width for width in report[kind] if width >= report[f"{kind}_width"])
            if wide < report[f"tile_{kind}"]:
                failures.append(
                    f"{line}: {wide} of {report[f'tile_{kind}']} bytes a thread are {kind} of"
                    f" {report[f'{kind}_width']}: {report[kind]}"
                )
    assert not failures, "\n".join(failures)


def record_launch(case: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The kernel and the arguments by name that the launcher passes for tensors of this shape."""
    import torch

    dtype = getattr(torch, case["dtype"])
    options, tensors, launcher = case["options"], case["tensors"], case["kernel"]
    matrix = torch.empty(2, case["classes"], dtype=dtype, device="meta")
    row = torch.empty(2, device="meta")
    of_k = torch.empty(2, options.get("k", 1), device="meta")
    teachers = options.get("teachers", 1)

    def optional(name: str) -> torch.Tensor | None:
        if name not in tensors:
            return None
        if name in ("terms", "losses"):
            return torch.empty(5 if name == "terms" else teachers, 2, device="meta")
        if name == "grad_log_probs":
            return of_k
        if name in ("grad_input", "grad_target"):
            return matrix.to(getattr(torch, options.get("grad_dtype", case["dtype"])))
        return row.bool() if name == "mask" else row

    temperatures = (optional("input_temperature"), optional("target_temperature"), 2.0, 2.0)
    row_scale = (optional("row_scale"), 1.0)
    arguments: tuple[Any, ...]
    if case["kernel"] == "kl_div":
        name = "kl_div_fwd_kernel"
        outputs = map(optional, OUTPUTS)
        arguments = (matrix, matrix, *temperatures, *row_scale, optional("mask"), *outputs)
    elif case["kernel"] == "scale_rows":
        name = "scale_rows_kernel"
        arguments = (matrix, row)
    elif case["kernel"] == "logit_loss":
        name = "logit_loss_kernel"
        divergence = options["divergence"]
        parts = ("hard_weight", "label_smoothing", "z_loss", "logit_mse")
        hard = [options.get(key, 0.0) for key in parts]
        if divergence == 0:
            hard[0] = 1.0
        labels = row.long() if divergence in (5, 6, 7, 8) or hard[0] else None
        target = matrix if divergence or hard[3] else None
        scales = (optional("soft_scale"), 4.0, *row_scale, optional("mask"))
        weights = (divergence, 0.5, 0.5, 0.5, options.get("standardize", False), *hard)
        outputs = map(optional, ("loss", "terms", "grad_input", "grad_input_temperature"))
        arguments = (matrix, target, labels, *temperatures, *scales, *weights, *outputs)
    elif case["kernel"] == "multi_teacher_kl_div":
        name = "multi_teacher_kl_div_kernel"
        ones = [1.0] * teachers
        outputs = map(optional, ("loss", "losses", "grad_input"))
        arguments = (matrix, [matrix] * teachers, None, ones, None, ones, None, None, *outputs)
    elif case["kernel"] == "pool_mse":
        name = f"pool_mse_{options['side']}_kernel"
        maps = torch.empty(2, 512, case["classes"], dtype=dtype, device="meta")
        if options["channels_last"]:
            maps = maps.mT.contiguous().mT
        pooled = [torch.empty(2, 512, dtype=dtype, device="meta")] * 2
        mask = row.bool()
        forward = (maps, maps, mask, None, None, None, *pooled, row, None, None)
        backward = (maps, maps, mask, *pooled, row, None, None, None, maps, maps)
        arguments = forward if options["side"] == "fwd" else backward
    elif case["kernel"] == "masked_feature_loss":
        name = "masked_feature_loss_kernel"
        maps = torch.empty(2, 512, case["classes"], dtype=dtype, device="meta")
        weights = torch.empty(2, case["classes"], device="meta")
        wanted = [x if key in tensors else None for key, x in (("grad_student", maps), ("squares", weights))]
        arguments = (maps, maps, weights, torch.empty((), device="meta"), *wanted)
    elif case["kernel"] in ("gaussian", "mmd"):
        name = options.get("stage", "gaussian_kernel" if case["kernel"] == "gaussian" else "mmd_pairs_kernel")
        x = torch.empty(2, options["samples"], case["classes"], dtype=dtype, device="meta")
        each = torch.empty(2, options["samples"], device="meta")
        weights = [each if key in tensors else None for key in ("x_weights", "y_weights")]
        of_x = x.to(getattr(torch, options.get("grad_dtype", case["dtype"])))
        grads = [of_x if key in tensors else None for key in ("grad_x", "grad_y")]
        labels = each.long() if options.get("labels") else None
        if case["kernel"] == "gaussian":
            given = (options["distance"], 1e-6, 2)
        else:
            # The mean distance's kernels are started where no bandwidths are given.
            bandwidths = torch.empty(3, device="meta") if name == "mmd_pairs_kernel" else None
            given = (bandwidths, options["of"], options.get("unbiased", False))
        arguments = (x, x, labels, *weights, *given, row, *grads)
    elif case["kernel"] == "coral":
        launcher = "distances_of_covariances"
        name, features, rows = options["stage"], case["classes"], options["samples"]
        x = torch.empty(2, rows, features, dtype=dtype, device="meta")
        each = torch.empty(2, rows, device="meta")
        weights = [each, each, row.long()] if "weights" in tensors else []
        samples = torch.empty(2, 2 * rows, features, device="meta")
        products = torch.empty(2, *[features if features <= rows else 2 * rows] * 2, device="meta")
        kept = [x.float() if key in tensors else None for key in ("a", "b")]
        covariance = products if "a" in tensors else None
        arguments = (x, x, weights, weights, samples, products, row, *kept, covariance)
    elif case["kernel"] == "sliced_wasserstein":
        name = options.get("stage", "equal_ranks_kernel")
        x = torch.empty(2, 64, case["classes"], device="meta")
        weights = [x[:, 0].contiguous() if key in tensors else None for key in ("x_weights", "y_weights")]
        grads = [x if key in tensors else None for key in ("grad_x", "grad_y")]
        arguments = (x, x, *weights, options["p"], x[..., 0].contiguous(), *grads)
    elif case["kernel"] == "sinkhorn":
        name, samples = options["stage"], options["samples"]
        x = torch.empty(2, samples, case["classes"], device="meta")
        each, pairs = x[..., 0].contiguous(), x.new_empty(2, samples, samples)
        debias = options.get("debias", True)
        extra, tol = ([pairs] * (3 if debias else 1), 1e-3) if "extra" in tensors else ([], -1.0)
        own = [each if debias else None] * 2
        of_sides = {"grad_x": x, "grad_y": x, "grad_a": each, "grad_b": each}
        grads = [z if key in tensors else None for key, z in of_sides.items()]
        arguments = (x, x, each, each, extra, options["cost"], 0.1, math.inf, 20, tol, debias)
        arguments += (row, each, each, *own, *grads, extra)
    elif case["kernel"] == "linear_loss":
        rows, widths = options["rows"], (512, 512 if "one_head" in options else 2048)
        row = torch.empty(rows, device="meta")
        given, grads = {}, {}
        for side, width in zip(("input", "target"), widths):
            shapes = {side: (rows, width), f"{side}_weight": (case["classes"], width)}
            for key, shape in (shapes | {f"{side}_bias": (case["classes"],)}).items():
                given[key] = torch.empty(shape, dtype=dtype, device="meta")
                grads[key] = torch.empty(shape, device="meta") if f"grad_{key}" in tensors else None
        temperatures = (optional("input_temperature"), optional("target_temperature"), 2.0, 2.0)
        scales = (None, 4.0, optional("row_scale"), 1.0, optional("mask"))
        hard = [options.get(key, 0.0) for key in ("hard_weight", "label_smoothing", "z_loss", "logit_mse")]
        cap = options.get("softcap", 0.0)
        weights = (options["divergence"], 0.5, 0.5, 0.5, *hard, cap, cap, 1.0, 1.0)
        name = "linear_loss_fwd_kernel" if "loss" in tensors else "linear_loss_bwd_kernel"
        arguments = (*given.values(), row.long() if hard[0] else None, *temperatures, *scales, *weights)
        terms, statistics = optional("terms"), torch.empty(8, rows, device="meta")
        arguments += (optional("loss"), terms, statistics, *grads.values(), None, None)
    else:
        name = "topk_kl_div_kernel"
        outputs = map(optional, ("loss", "grad_input", "grad_log_probs", "grad_input_temperature"))
        arguments = (matrix, of_k, of_k.long(), None, 2.0, *row_scale, None, options["tail"], *outputs)

    module = importlib.import_module(f"kdkernels._triton.{case['kernel']}")
    samples = importlib.import_module("kdkernels._triton.samples")
    kernels = {key: x for of in (samples, module) for key, x in vars(of).items() if key.endswith("_kernel")}
    kernel, launches = kernels[name], {key: mock.MagicMock() for key in kernels}
    with contextlib.ExitStack() as stack:
        for of in (samples, module):
            here = {key: launch for key, launch in launches.items() if hasattr(of, key)}
            stack.enter_context(mock.patch.multiple(of, **here))
        getattr(module, launcher)(*arguments)
    call = launches[name].__getitem__.return_value.call_args
    found = dict(zip(kernel.arg_names, call.args, strict=False)) | call.kwargs
    # Tensors of no memory have no address by which the launcher would know one head from two.
    return kernel, found | ({"SHARED": "one_head" in options} if case["kernel"] == "linear_loss" else {})


def accesses(case: dict[str, Any], streamed: bool) -> tuple[int, int]:
    """How often the kernel's code loads a tile, and how often it stores one."""
    kernel, options, tensors = case["kernel"], case["options"], case["tensors"]
    grads = len({"grad_input", "grad_target"} & set(tensors))
    if kernel == "scale_rows":
        return 1, 1
    if kernel == "linear_loss":
        return 0, grads  # what it loads is copied to shared memory
    if kernel == "mmd":
        if "stage" in options:
            # Both sides, and the samples that their centre is made of.
            return (4, 2) if options["stage"] == "prepare_samples_kernel" else (0, 0)
        return 0, len({"grad_x", "grad_y"} & set(tensors))
    if kernel == "sinkhorn":
        return 0, len({"grad_x", "grad_y"} & set(tensors)) if "gradient" in options["stage"] else 0
    if kernel == "gaussian":
        grads = len({"grad_x", "grad_y"} & set(tensors))
        if options["samples"] == 128:
            return 2 + grads, grads
        return (1, 0) if options["stage"] == "gaussian_moments_kernel" else (grads, grads)
    if kernel == "coral":
        stores = 2 + len({"a", "b"} & set(tensors))
        stages = {"means_kernel": (1, 0), "samples_kernel": (2, stores), "covariances_kernel": (2, 2)}
        return stages.get(options["stage"], (4, 0))
    if kernel == "sliced_wasserstein":
        if options.get("stage") == "sort_kernel":
            return 1, 1
        return 2, 0  # each gradient is scattered, and weights are gathered
    if kernel == "masked_feature_loss":
        return 2, int("grad_student" in tensors)
    if kernel == "pool_mse":
        return 2, 2 if options["side"] == "bwd" else 0
    if kernel == "kl_div":
        return 2 * (1 if not streamed else 3 if "grad_target" in tensors else 2), grads
    if kernel == "logit_loss":
        divergence, standardize = options["divergence"], options.get("standardize", False)
        sides = 2 if divergence else 1
        both = 2 if divergence or options.get("logit_mse") else 1
        later = grads and (standardize or divergence not in (0, 1, 5, 7, 9))
        if not streamed:
            return both, grads
        return sides * (1 + standardize) + both * (1 + bool(later)), grads
    if kernel == "multi_teacher_kl_div":
        teachers = options["teachers"]
        return (2 * teachers + 1 + -(-teachers // 4) if streamed else 2), grads
    return 1 + streamed, grads


def compile_case(target: str, case: dict[str, Any]) -> dict[str, Any]:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, arguments = record_launch(case)
    options = {key: arguments.pop(key) for key in ("num_warps", "enable_fp_fusion") if key in arguments}
    types = {
        torch.float32: "fp32",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.bool: "i1",
        torch.int64: "i64",
        torch.float64: "fp64",
    }
    signature, constants, attributes = {}, {}, {}

    def kind(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(element, (*path, index)) for index, element in enumerate(value))
        if isinstance(value, torch.Tensor):
            # As at run time: PyTorch's allocations start on 16 bytes and more.
            attributes[path] = [["tt.divisibility", 16]]
            return "*" + types[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"

    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            signature[parameter.name] = kind(value, (index,))
            specialized = "i32" in signature[parameter.name] and not parameter.do_not_specialize
            assert not specialized, f"{parameter.name} would be compiled anew for 1 and for 16"

    architecture = int(target[3:]) if target.startswith("sm_") else target
    gpu = (
        GPUTarget("cuda", architecture, 32)
        if target.startswith("sm_")
        else GPUTarget("hip", architecture, 64)
    )
    triton.knobs.compilation.always_compile = True  # ptxas reports only what it compiles
    triton.knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, attributes), target=gpu, options=options
        )

    # BLOCK_K is of something else: a sparse teacher's classes.
    tile = [value for name, value in arguments.items() if name.startswith("BLOCK_") and name != "BLOCK_K"]
    tile = tile or [arguments["BLOCK"]] * 2  # the side of a square
    both = ("BLOCK_M", "BLOCK_D")
    shape = [arguments[name] for name in both] if arguments.keys() >= set(both) else tile
    elements = math.prod(shape) // (gpu.warp_size * options["num_warps"])
    itemsize = getattr(torch, case["dtype"]).itemsize
    grad_itemsize = getattr(torch, case["options"].get("grad_dtype", case["dtype"])).itemsize
    tile_loads, tile_stores = accesses(case, arguments.get("STREAMED", False))
    width = min(16, arguments.get("VECTOR", 16) * itemsize, elements * itemsize)
    report = {
        "name": " ".join([target, *(str(case[key]) for key in ("kernel", "dtype", "lengths"))]),
        "lengths": case["lengths"],
        "limit": min(255, 65536 // (gpu.warp_size * options["num_warps"])),
        "tile": [*tile, options["num_warps"]],
        "shared": compiled.metadata.shared,
        "loads_width": width,
        # As many elements as are loaded at once.
        "stores_width": min(16, width * grad_itemsize // itemsize),
        "tile_loads": tile_loads * elements * itemsize,
        "tile_stores": tile_stores * elements * grad_itemsize,
    }
    return report | (read_ptx if gpu.backend == "cuda" else read_amdgcn)(compiled.asm, log.getvalue())


def read_ptx(assembly: dict[str, Any], log: str) -> dict[str, Any]:
    def widths(operation: str) -> list[int]:
        found = re.findall(rf"\b{operation}\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\b", assembly["ptx"])
        return [int(count or 1) * int(bits) // 8 for count, bits in found]

    def total(pattern: str) -> int:
        found = re.findall(pattern, log)
        assert found, log
        return sum(map(int, found))

    copies = re.findall(r"cp\.async\.c[ag]\S* \[[^]]*\], \[[^]]*\], 0x([0-9a-f]+)", assembly["ptx"])
    return {
        "registers": total(r"Used (\d+) registers"),
        "spills": total(r"(\d+) bytes spill (?:stores|loads)"),
        "stack": total(r"(\d+) bytes stack frame"),
        "local_memory": bool(re.search(r"\.local\b", assembly["ptx"])),
        "loads": widths("ld"),
        "stores": widths("st"),
        "narrow_copies": [size for size in (int(copy, 16) for copy in copies) if size < 8],
    }


def read_amdgcn(assembly: dict[str, Any], log: str) -> dict[str, Any]:
    text = assembly["amdgcn"]
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}

    def widths(operation: str) -> list[int]:
        kind = r"(dwordx[234]|dword|short|byte)"
        return [
            sizes[name] for name in re.findall(rf"\b(?:global|buffer|flat)_{operation}_[us]?{kind}", text)
        ]

    def total(name: str) -> int:
        return sum(map(int, re.findall(rf"\.{name}:\s*(\d+)", text)))

    return {
        "registers": total("vgpr_count"),
        # Scalar registers are spilt to the lanes of vector registers.
        "spills": total("vgpr_spill_count"),
        "stack": total("private_segment_fixed_size"),
        "local_memory": bool(re.search(r"\bscratch_(?:load|store)", text)),
        "loads": widths("load"),
        "stores": widths("store"),
        "narrow_copies": [],
    }


def compile_half(target: str, half: int) -> list[dict[str, Any]]:
    # Lengths that start the same code are compiled once.
    distinct: dict[str, dict[str, Any]] = {}
    for case in cases(target):
        _, arguments = record_launch(case)
        options = {name: value for name, value in arguments.items() if name.isupper() or name == "num_warps"}
        key = str([case["kernel"], case["dtype"], case["tensors"], case["options"], options])
        distinct.setdefault(key, case | {"lengths": []})["lengths"].append(case["classes"])
    return [compile_case(target, case) for case in list(distinct.values())[half::2]]


if __name__ == "__main__":
    print(json.dumps(compile_half(sys.argv[1], int(sys.argv[2]))))
