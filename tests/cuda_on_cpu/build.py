"""Compiles csrc/cuda/*.cu, unchanged, with the host compiler and links them with the fiber scheduler.

The kernels then run on CPU memory: a whole ``_C`` module when python/bindings.cpp is among the sources, else
a library for ctypes, or a program.
"""

import hashlib
import os
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", f"-I{HERE}", f"-I{CSRC}"]  # first: a cuda_runtime.h of our own
# Unoptimised, and without the checks that AddressSanitizer makes redundant: it compiles three times as fast.
SANITIZE = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize=null,pointer-overflow,object-size,vptr"]
SANITIZE += ["-fno-sanitize-recover=all"]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _flags_for(source: Path) -> list[str]:
    if source.name == "bindings.cpp":
        import pybind11

        includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        return ["-DKDKERNELS_WITH_CUDA", "-fvisibility=hidden", *(f"-I{path}" for path in includes)]
    if CSRC / "cpu" in source.parents:  # only for bindings.cpp to find: nobody calls these here
        return ["-fopenmp", "-O0", "-Wno-psabi"]
    return []


def _compile(source: Path, flags: list[str], headers: bytes, directory: Path) -> Path:
    key = _digest(headers, source.read_bytes(), repr((source, flags)).encode())
    compiled = directory / f"{source.stem}-{key}.o"
    if not compiled.exists():
        partial = compiled.with_suffix(f".{os.getpid()}")
        _run([COMPILER, *flags, "-x", "c++", "-c", str(source), "-o", str(partial)])
        partial.rename(compiled)
    return compiled


def build(
    directory: Path,
    *,
    sources: Sequence[Path] | None = None,
    sanitize: bool = False,
    defines: Mapping[str, str] | None = None,
    program: bool = False,
) -> Path:
    """Builds the kernels with `sources` (default: the ctypes shim) and returns the path of the result.

    `directory` caches objects and results by content. With `program`, one of the sources has a main().
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    extra = [Path(s).resolve() for s in (sources if sources is not None else [HERE / "shim.cpp"])]
    everything = [*sorted((CSRC / "cuda").glob("*.cu")), HERE / "cuda_on_cpu.cpp", *extra]
    flags = [*FLAGS, *(SANITIZE if sanitize else [])]
    flags += [f"-D{name}={value}" for name, value in (defines or {}).items()]
    included = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *HERE.glob("*.h")]
    headers = b"".join(path.read_bytes() for path in sorted(included))
    # The lock: pytest's workers build one thing once.
    with FileLock(directory / "lock"), ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(
            pool.map(lambda s: _compile(s, [*flags, *_flags_for(s)], headers, directory), everything)
        )

    if program:
        name = "program"
    elif any(s.name == "bindings.cpp" for s in extra):
        name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    else:
        name = "kernels.so"
    linked = directory / _digest(repr((objects, flags)).encode()) / name
    if not linked.exists():
        linked.parent.mkdir(exist_ok=True)
        partial = linked.with_suffix(f".{os.getpid()}")
        libraries = sorted({flag for s in extra for flag in _flags_for(s) if flag == "-fopenmp"})
        kind = [] if program else ["-shared"]
        _run([COMPILER, *flags, *libraries, *kind, *map(str, objects), "-o", str(partial)])
        partial.rename(linked)
    return linked
