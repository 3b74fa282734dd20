"""Refuse an allocation that would not fit, with its size in GiB, before it is made."""

import os
from pathlib import Path

import torch

from lowrank_bdl.errors import MemoryLimitError

GIB = 2.0**30

_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on ``device``, or None where the system does not say.

    On the CPU: the kernel's own estimate (which counts caches it can drop), and no more than what the container's
    limit leaves. On CUDA: free memory and what torch's allocator holds but does not use.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    known = [bytes_ for bytes_ in (_host_memory(), *map(_container_memory, _CGROUP_FILES)) if bytes_ is not None]
    return min(known, default=None)


def require_memory(num_bytes: int, device: torch.device, purpose: str) -> None:
    """Raise unless ``num_bytes`` more fit on ``device``.

    Args:
        num_bytes: Size of the allocation to come.
        device: Where it will be made.
        purpose: What it is for, the subject of the message.

    Raises:
        MemoryLimitError: If less is available; the message gives both sizes in GiB.
    """
    available = available_memory(device)
    if available is not None and num_bytes > available:
        needed, free = num_bytes / GIB, available / GIB
        raise MemoryLimitError(f"{purpose} needs {needed:.2f} GiB on {device}; {free:.2f} GiB are free.")


def _host_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):  # not Linux: sizes unknown
        return None


def _container_memory(files: tuple[str, str]) -> int | None:
    try:
        limit, used = (Path(name).read_text().strip() for name in files)
        return max(int(limit) - int(used), 0)  # "max" (no limit) is no integer
    except (OSError, ValueError):
        return None
