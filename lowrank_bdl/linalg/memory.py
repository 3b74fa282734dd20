"""Refuse an allocation that would not fit, with its size in GiB, before it is made."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank_bdl.errors import MemoryLimitError
from lowrank_bdl.linalg.block_scaling import needs_scale, num_blocks

GIB = 2.0**30

_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part of a low-rank Gaussian's life.

    Attributes:
        moments: Shift, mean and sum of squares of a collector.
        deviations: Its K x D buffer, scales included.
        posterior: What a posterior holds beside the shared deviations: mean and diagonal.
        samples: S draws.
    """

    moments: int
    deviations: int
    posterior: int
    samples: int

    @property
    def collector(self) -> int:
        """Bytes of a collector: moments and deviations."""
        return self.moments + self.deviations

    @property
    def total(self) -> int:
        """Bytes of collector, posterior and draws together."""
        return self.collector + self.posterior + self.samples

    def __str__(self) -> str:
        parts = ("moments", "deviations", "posterior", "samples", "total")
        return ", ".join(f"{part} {getattr(self, part) / GIB:.2f} GiB" for part in parts)


def estimate_memory(
    numel: int,
    rank: int,
    *,
    num_samples: int = 0,
    dtype: torch.dtype = torch.float32,
    deviation_dtype: torch.dtype | None = None,
) -> MemoryEstimate:
    """Return the bytes that collecting, holding and drawing from a rank-K Gaussian over D weights takes.

    Args:
        numel: D.
        rank: K.
        num_samples: S, the draws held at once.
        dtype: Of moments and draws.
        deviation_dtype: Of the K x D buffer; None takes ``dtype``.

    Raises:
        ValueError: If a number is negative or ``deviation_dtype`` is no storage type.

    Example:
        >>> print(estimate_memory(36_500_000, rank=20, num_samples=1))
        moments 0.41 GiB, deviations 2.72 GiB, posterior 0.27 GiB, samples 0.14 GiB, total 3.54 GiB
    """
    if min(numel, rank, num_samples) < 0:
        raise ValueError(f"numel, rank and num_samples must be >= 0; got {numel}, {rank} and {num_samples}.")
    stored = dtype if deviation_dtype is None else deviation_dtype
    scales = num_blocks(numel) * torch.float32.itemsize if needs_scale(stored) else 0
    vector = numel * dtype.itemsize
    return MemoryEstimate(3 * vector, rank * (numel * stored.itemsize + scales), 2 * vector, num_samples * vector)


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
