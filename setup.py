"""Runs CMake, nothing else: KDKERNELS_NATIVE=0 skips it, KDKERNELS_CUDA=0|1 forbids or demands nvcc."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def switch(name: str, default: bool) -> bool:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, got {value!r}")
    return default if value == "" else value == "1"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        cuda = switch("KDKERNELS_CUDA", default=shutil.which("nvcc") is not None)
        configure = [
            "cmake", "-G", "Ninja", "-S", ".", "-B", self.build_temp,
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-DKDKERNELS_WITH_CUDA={'ON' if cuda else 'OFF'}",
            f"-Dpybind11_DIR={__import__('pybind11').get_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", self.build_temp], check=True)


native = switch("KDKERNELS_NATIVE", default=True)
setup(
    ext_modules=[Extension("kdkernels._C", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
