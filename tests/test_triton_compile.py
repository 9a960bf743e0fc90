"""What the compiler makes of the Triton kernels, without a GPU: access widths, registers, spills.

Run as a script it is the compiling half, a process of its own because TRITON_INTERPRET turns the compiler
off: it records what each launcher starts, compiles exactly that, and prints a report as JSON.
"""

import contextlib
import io
import json
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


def cases() -> list[dict[str, Any]]:
    def case(kernel: str, dtype: str, classes: int, tensors: list[str]) -> dict[str, Any]:
        return {"kernel": kernel, "dtype": dtype, "classes": classes, "tensors": tensors}

    return [
        *(case("kl_div", dtype, classes, MAIN) for dtype in DTYPES for classes in CLASSES),
        *(case("kl_div", "float32", classes, OUTPUTS + ROW_INPUTS) for classes in (100, 8192, 32000)),
        *(case("kl_div", "float32", classes, ["loss"]) for classes in (32000,)),
        *(case("kl_div", "float32", classes, MAIN) for classes in (1, 1001)),
        *(case("scale_rows", "float16", classes, []) for classes in (100, 1000, 32000)),
    ]


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
    assert sum(len(report["lengths"]) for report in reports) == len(cases())

    failures = []
    for report in reports:
        line = "{name}: tile {tile}, {registers} registers, {spills} spills, {stack} B stack".format(**report)
        print(line, report["loads"], report["stores"])
        if report["spills"] or report["stack"] or report["local_memory"]:
            failures.append(f"{line}: uses local memory")
        for kind in ("loads", "stores"):
            # Per-row vectors are narrower; the tiles must be covered by wide accesses alone.
            wide = sum(width for width in report[kind] if width >= report["width"])
            if wide < report[f"tile_{kind}"]:
                failures.append(
                    f"{line}: {wide} of {report[f'tile_{kind}']} bytes a thread are {kind} of"
                    f" {report['width']}: {report[kind]}"
                )
    assert not failures, "\n".join(failures)


def record_launch(case: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The kernel and the arguments by name that the launcher passes for tensors of this shape."""
    import torch

    from kdkernels._triton import kl_div, scale_rows

    dtype = getattr(torch, case["dtype"])
    matrix = torch.empty(2, case["classes"], dtype=dtype, device="meta")
    row = torch.empty(2, device="meta")

    def optional(name: str) -> torch.Tensor | None:
        if name not in case["tensors"]:
            return None
        return row.bool() if name == "mask" else matrix if name in ("grad_input", "grad_target") else row

    module, name = (
        (kl_div, "kl_div_fwd_kernel") if case["kernel"] == "kl_div" else (scale_rows, "scale_rows_kernel")
    )
    kernel = getattr(module, name)
    launch = mock.MagicMock()
    with mock.patch.object(module, name, launch):
        if module is kl_div:
            temperatures = (optional("input_temperature"), optional("target_temperature"), 2.0, 2.0)
            outputs = (optional(output) for output in OUTPUTS)
            kl_div.kl_div(
                matrix, matrix, *temperatures, optional("row_scale"), 1.0, optional("mask"), *outputs
            )
        else:
            scale_rows.scale_rows(matrix, row)
    call = launch.__getitem__.return_value.call_args
    return kernel, dict(zip(kernel.arg_names, call.args, strict=False)) | call.kwargs


def compile_case(target: str, case: dict[str, Any]) -> dict[str, Any]:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, arguments = record_launch(case)
    options = {"num_warps": arguments.pop("num_warps")}
    types = {
        torch.float32: "fp32",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.bool: "i1",
    }
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + types[value.dtype]
            # As at run time: PyTorch's allocations start on 16 bytes and more.
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            assert parameter.do_not_specialize, f"{parameter.name} would be compiled anew for 1 and for 16"
            signature[parameter.name] = "i32"

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

    tensors = case["tensors"]
    tile_bytes = arguments["BLOCK_M"] * arguments["BLOCK_N"] * getattr(torch, case["dtype"]).itemsize
    per_thread = tile_bytes // (gpu.warp_size * options["num_warps"])
    if case["kernel"] == "scale_rows":
        tile_loads = tile_stores = 1
    else:
        sweeps = 1 if not arguments["STREAMED"] else 3 if "grad_target" in tensors else 2
        tile_loads = 2 * sweeps
        tile_stores = len({"grad_input", "grad_target"} & set(tensors))
    report = {
        "name": " ".join([target, *(str(case[key]) for key in ("kernel", "dtype", "lengths"))]),
        "lengths": case["lengths"],
        "tile": [arguments["BLOCK_M"], arguments["BLOCK_N"], options["num_warps"]],
        "width": min(16, arguments["VECTOR"] * getattr(torch, case["dtype"]).itemsize, per_thread),
        "tile_loads": tile_loads * per_thread,
        "tile_stores": tile_stores * per_thread,
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

    return {
        "registers": total(r"Used (\d+) registers"),
        "spills": total(r"(\d+) bytes spill (?:stores|loads)"),
        "stack": total(r"(\d+) bytes stack frame"),
        "local_memory": bool(re.search(r"\.local\b", assembly["ptx"])),
        "loads": widths("ld"),
        "stores": widths("st"),
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
        "spills": total("vgpr_spill_count") + total("sgpr_spill_count"),
        "stack": total("private_segment_fixed_size"),
        "local_memory": bool(re.search(r"\bscratch_(?:load|store)", text)),
        "loads": widths("load"),
        "stores": widths("store"),
    }


def compile_half(target: str, half: int) -> list[dict[str, Any]]:
    # Lengths that start the same code are compiled once.
    distinct: dict[str, dict[str, Any]] = {}
    for case in cases():
        _, arguments = record_launch(case)
        options = {name: value for name, value in arguments.items() if name.isupper() or name == "num_warps"}
        key = str([case["kernel"], case["dtype"], case["tensors"], options])
        distinct.setdefault(key, case | {"lengths": []})["lengths"].append(case["classes"])
    return [compile_case(target, case) for case in list(distinct.values())[half::2]]


if __name__ == "__main__":
    print(json.dumps(compile_half(sys.argv[1], int(sys.argv[2]))))
