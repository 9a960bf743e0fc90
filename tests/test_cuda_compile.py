"""What nvcc makes of the CUDA kernels: no spills, no local memory, 16-byte accesses, a library that links.

Needs the toolkit and no GPU.
"""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*.cu"))
ARCHITECTURES = (80, 90, 100)
FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC"]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


class Usage(NamedTuple):
    architecture: int
    kernel: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


class Compiled(NamedTuple):
    object: Path
    ptx: str
    usages: list[Usage]


REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<architecture>\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def nvcc(*arguments) -> str:
    done = subprocess.run(["nvcc", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def compile_source(source: Path, directory: Path) -> Compiled:
    """One run of nvcc, whose kept intermediate files hold the PTX."""
    kept = directory / source.stem
    kept.mkdir()
    compiled = directory / f"{source.stem}.o"
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    # Two architectures at a time.
    report = nvcc(
        *FLAGS, *targets, "--threads=2", "--resource-usage", "--keep", f"--keep-dir={kept}", "-c", source,
        "-o", compiled,
    )  # fmt: skip
    usages = [
        Usage(kernel=m["kernel"], **{name: int(m[name]) for name in Usage._fields if name != "kernel"})
        for m in REPORT.finditer(report)
    ]
    ptx = "\n".join(path.read_text() for path in sorted(kept.glob("*.ptx")))
    return Compiled(compiled, ptx, usages)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    directory = tmp_path_factory.mktemp("nvcc")
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda source: compile_source(source, directory), SOURCES)
        return {source.stem: result for source, result in zip(SOURCES, results, strict=True)}


@pytest.mark.parametrize("stem", [source.stem for source in SOURCES])
def test_registers(compiled, stem):
    usages = compiled[stem].usages
    entries = len(re.findall(r"^\.visible \.entry|^\t?\.entry", compiled[stem].ptx, re.MULTILINE))
    assert len(usages) == entries > 0
    assert {usage.architecture for usage in usages} == set(ARCHITECTURES)
    for usage in sorted(usages):
        print(f"sm_{usage.architecture}  {usage.registers:3d} registers  {usage.kernel}")
        assert (usage.stack, usage.spill_stores, usage.spill_loads) == (0, 0, 0), usage


# Sinkhorn's iterations are in shared memory: it reads its points and writes their gradients once.
@pytest.mark.parametrize("stem", [source.stem for source in SOURCES if source.stem != "sinkhorn"])
@pytest.mark.parametrize("instruction", ["ld", "st"])
def test_16_byte_accesses(compiled, stem, instruction):
    """Every kernel on packets has them: 4 words of 32 bits, or 2 of 64."""
    wide = re.compile(instruction + r"\.global(\.\w+)*\.v(4\.[fbu]32|2\.[bu]64)")
    found = 0
    for kernel in re.split(r"\.entry", compiled[stem].ptx)[1:]:
        name = kernel.split("(", 1)[0].strip()
        single_elements = "Li1E" in name  # V = 1
        # Outputs::kLoss stores no gradient, and pooling a value a row.
        writes = "OutputsE0" not in name and not re.search(r"pool_(positions|channels)_kernel", name)
        if not single_elements and (instruction == "ld" or writes):
            assert wide.search(kernel), name
            found += 1
        elif single_elements:
            assert not wide.search(kernel), name
    assert found > 0


def test_links(compiled, tmp_path):
    library = tmp_path / "kernels.so"
    nvcc("-shared", *(c.object for c in compiled.values()), "-o", library)
    symbols = subprocess.run(["nm", "-DC", library], capture_output=True, text=True, check=True).stdout
    kernels = (
        "kl_div",
        "logit_loss",
        "multi_teacher_kl_div",
        "pool_mse",
        "scale_rows",
        "sinkhorn",
        "topk_kl_div",
    )
    for name in (*kernels, "error_string"):
        assert f"T kdkernels::cuda::{name}(" in symbols
