"""What a result file says of the machine: what matters to a timing, not whose it is."""

from __future__ import annotations

import os
import platform
from typing import Any

import pytest
import torch

import kdkernels
from benchmarks import peers

# How busy the machine was before anything ran here: on one that is not idle even the ratios are worthless.
LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    cpu = machine_info.get("cpu", {})
    machine_info.clear()
    machine_info.update(
        cpu=cpu.get("brand_raw", platform.machine()),
        threads=torch.get_num_threads(),
        capability=torch.backends.cpu.get_cpu_capability(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        system=platform.system(),
        python=platform.python_version(),
        torch=torch.__version__,
        kdkernels=kdkernels.__version__,
        peers=peers.versions(),
        load=LOAD,
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    cells = [bench for bench in session.benchmarks if "providers" in bench.extra_info] if session else []
    for bench in cells:
        info = bench.extra_info
        parts = (
            f"{name} {cell['median_ms']:.3f}"
            for name, cell in info["providers"].items()
            if "median_ms" in cell
        )
        terminalreporter.write_line(f"{info['cell']}: {', '.join(parts)} ms")
    absent = {name: why for bench in cells for name, why in bench.extra_info["absent"].items()}
    for name, why in sorted(absent.items()):
        terminalreporter.write_line(f"{name} was not measured: {why}")
