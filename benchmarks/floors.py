"""What the machine allows: how fast bytes can be read and copied, and normals drawn.

The same functions serve as contenders, so that every ratio to a floor is taken within one round of one run.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import timed

READERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda storage, vector: storage.sum(),
    "dot": lambda storage, vector: torch.dot(storage.view(-1), storage.view(-1)),
    "gemv": lambda storage, vector: storage @ vector,
}
"""Three ways to read a K x D tensor once; which is fastest depends on shape and machine."""


def best_reader(storage: Tensor, repeats: int = 3) -> str:
    """Return the name of the fastest of `READERS` on this tensor."""
    vector = torch.ones(storage.shape[1], dtype=storage.dtype, device=storage.device)
    best = {}
    for name, read in READERS.items():
        read(storage, vector)
        best[name] = min(timed(lambda read=read: read(storage, vector), storage.device)[0] for _ in range(repeats))
    return min(best, key=best.__getitem__)


def machine_floors(
    device: torch.device, dtype: torch.dtype, num_bytes: int = 2**29, repeats: int = 7
) -> dict[str, float]:
    """Return bandwidths [byte/s] and the cost of a normal [s], medians over repeats; every destination is touched.

    Args:
        device: Where.
        dtype: Of the numbers.
        num_bytes: Size of the tensor; well above the caches.
        repeats: How often each is measured.
    """
    rows = torch.ones(8, num_bytes // 8 // dtype.itemsize, dtype=dtype, device=device)
    target = torch.zeros_like(rows)
    vector = torch.ones(rows.shape[1], dtype=dtype, device=device)

    def median(call: Callable[[], Any]) -> float:
        call()
        return statistics.median(timed(call, device)[0] for _ in range(repeats))

    size = rows.numel() * dtype.itemsize
    normals = target.view(-1)[: max(1, rows.numel() // 8)]
    return {
        "read_bytes_per_s": size / min(median(lambda read=read: read(rows, vector)) for read in READERS.values()),
        "copy_bytes_per_s": 2 * size / median(lambda: target.copy_(rows)),
        "seconds_per_normal": median(lambda: normals.normal_()) / normals.numel(),
    }
