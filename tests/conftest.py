"""Runs every backend on any machine: Triton in its interpreter, CUDA in the host executor, where no GPU is.

A backend that cannot run is skipped with its reason, and fails the run where CI=true.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:  # before kdkernels looks: whether the interpreter is on is decided at import
    os.environ["TRITON_INTERPRET"] = "1"

import kdkernels.backend as kd  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    # torch fills fresh memory with NaN in this mode: an output that no kernel wrote shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")


@pytest.fixture(scope="session", autouse=True)
def fast_sort() -> Iterator[None]:
    """Triton sorts by reductions of XOR, which its interpreter takes an element at a time: numpy takes them at once."""
    if GPU or importlib.util.find_spec("triton") is None:
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    xor = importlib.import_module("triton.language.standard")._xor_combine
    slow = interpreter.ReduceOps.generic_reduce

    def reduce(self: Any, input: tuple[Any, ...]) -> list[Any]:
        if self.combine_fn is not xor:
            return slow(self, input)
        [x] = input
        return [
            self.to_tensor(np.bitwise_xor.reduce(x.handle.data, self.axis, keepdims=self.keep_dims), x.dtype)
        ]

    with mock.patch.object(interpreter.ReduceOps, "generic_reduce", reduce):
        yield


def missing(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def cuda_on_cpu() -> object:
    """The native module whose CUDA kernels run on the CPU, put in the place of backend "cuda"."""
    from cuda_on_cpu.build import build

    library = build(
        ROOT / "build" / "cuda_on_cpu",
        sources=[
            ROOT / "python" / "bindings.cpp",
            *sorted((ROOT / "csrc" / "cpu").glob("*.cpp")),
        ],
    )
    loader = importlib.machinery.ExtensionFileLoader("_C", str(library))
    spec = importlib.util.spec_from_loader("_C", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)

    def no_stream(tensor: torch.Tensor) -> int:
        return 0

    for name, launcher_over in kd.NATIVE.items():
        kd._LAUNCHERS["cuda", name] = launcher_over(getattr(module, f"cuda_{name}"), no_stream)
    kd._DEVICES["cuda"]["cpu"] = ""
    kd._resolve.cache_clear()
    return module


def _ready(name: str, request: pytest.FixtureRequest) -> str:
    if name == "cuda" and not GPU:
        request.getfixturevalue("cuda_on_cpu")
    reason = kd.available_backends(device_of(name))[name]
    if reason != "available":
        missing(f"backend {name}: {reason}")
    return name


def device_of(backend: str) -> str:
    return "cuda" if GPU and backend in ("triton", "cuda") else "cpu"


@pytest.fixture(params=kd.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    return _ready(request.param, request)


# The interpreter of Triton truncates what it stores as bfloat16: that dtype is compiled ahead of time instead.
_PAIRS = [
    (name, dtype)
    for name in kd.BACKENDS
    for dtype in kd.DTYPES[name]
    if GPU or (name, dtype) != ("triton", torch.bfloat16)
]


@pytest.fixture(params=_PAIRS, ids=lambda pair: f"{pair[0]}-{str(pair[1]).removeprefix('torch.')}")
def backend_dtype(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    """Each backend with each dtype that it takes."""
    return _ready(request.param[0], request), request.param[1]
