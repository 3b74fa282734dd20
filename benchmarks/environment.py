"""What a measurement depends on: hardware, threads, clock and versions; no names of hosts or users."""

import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lowrank_bdl.linalg.compiler import find_compiler, library

PACKAGES = ("torch", "gpytorch", "linear-operator", "numpy", "scikit-learn", "safetensors", "lowrank-bdl")


def cpu_model() -> str:
    """Return the processor's own name, or the architecture where the system does not give it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def total_memory() -> int | None:
    """Return the bytes of main memory, or None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def version_of(package: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def hardware_label(device: torch.device) -> str:
    """Return a short label of the hardware for file names, such as ``2-core-cpu`` or ``nvidia-h200``."""
    if device.type == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores}-core-{device.type}"


def compiler_version() -> str | None:
    """Return what compiled the library's CPU kernels, in words; None where those written in torch are used."""
    compiler = find_compiler()
    if compiler is None or library() is None:
        return None
    found = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return found.splitlines()[0] if found else Path(compiler).name


def environment(device: torch.device) -> dict[str, Any]:
    """Return everything that a reader needs to judge or repeat a measurement, as JSON values."""
    clock = time.get_clock_info("perf_counter")
    found: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": total_memory(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "clock": {
            "name": "time.perf_counter",
            "implementation": clock.implementation,
            "resolution_s": clock.resolution,
        },
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "compiled_kernels": compiler_version(),
        "versions": {package: version_of(package) for package in PACKAGES},
    }
    if hasattr(os, "getloadavg"):
        found["load_average"] = list(os.getloadavg())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found
