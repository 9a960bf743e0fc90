"""Runs CMake, nothing else: KDKERNELS_NATIVE=0 skips it, KDKERNELS_CUDA=0|1 forbids or demands nvcc, and
KDKERNELS_CALLS=0|1 what is compiled for the torch that is installed already."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def switch(name: str, default: bool) -> bool:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, got {value!r}")
    return default if value == "" else value == "1"


def installed_torch() -> Path | None:
    """The environment's torch, which a build apart from it cannot import."""
    found = importlib.util.find_spec("torch")
    places = [Path(place) / "torch" for place in map(sysconfig.get_path, ("platlib", "purelib"))]
    for torch in [*(map(Path, found.submodule_search_locations or ()) if found else ()), *places]:
        if (torch / "include" / "ATen" / "ATen.h").exists():
            return torch
    return None


def calls() -> tuple[Path, str] | None:
    """Which torch to compile the calls for, and the module's name, as `_calls` in kdkernels/backend.py has it."""
    torch = installed_torch()
    if not switch("KDKERNELS_CALLS", default=torch is not None):
        return None
    if torch is None:
        raise SystemExit("KDKERNELS_CALLS=1 wants a torch that is installed before kdkernels")
    found = re.search(r"__version__ = ['\"]([^'\"]+)", (torch / "version.py").read_text())
    if found is None:
        raise SystemExit(f"{torch / 'version.py'} has no version")
    return torch, "_calls_" + re.sub(r"\W", "_", found[1])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if ext is not extensions[0]:
            return  # built with the first
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        for stale in (*target.glob("_calls_*"), *Path("kdkernels").glob("_calls_*")):
            stale.unlink()  # of another _C than the one that is built now
        cuda = switch("KDKERNELS_CUDA", default=shutil.which("nvcc") is not None)
        torch, name = for_torch or ("", "")
        configure = [
            "cmake", "-G", "Ninja", "-S", ".", "-B", self.build_temp,
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-DKDKERNELS_WITH_CUDA={'ON' if cuda else 'OFF'}",
            f"-DKDKERNELS_TORCH={torch}", f"-DKDKERNELS_CALLS={name}",
            f"-Dpybind11_DIR={__import__('pybind11').get_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", self.build_temp], check=True)


extensions: list[Extension] = []
for_torch = None
if switch("KDKERNELS_NATIVE", default=True):
    extensions = [Extension("kdkernels._C", sources=[])]
    for_torch = calls()
    if for_torch is not None:
        extensions.append(Extension(f"kdkernels.{for_torch[1]}", sources=[]))
setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
