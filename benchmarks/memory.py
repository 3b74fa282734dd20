"""Peak memory of one call, in a process of its own.

On a CPU it is the peak of the resident set above what was resident when the inputs were in place (the kernel's
high-water mark, reset just before the call); on a GPU the allocator's peak above what was allocated. The process is
forked from a server that has imported everything and computed nothing, so that a measurement costs little more than
its inputs; the call is first made on a tiny problem, so that code, thread stacks and BLAS buffers are in place.
"""

import ctypes
import gc
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from lowrank_bdl.linalg.memory import available_memory

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's mallopt


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def _settle_allocator() -> None:
    """Make freed blocks leave the process at once, so that neither peak nor baseline depends on what came before."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 65_536)
        libc.malloc_trim(0)
    except (OSError, AttributeError):  # another C library: the peak may then contain freed blocks
        pass


def peak_above(call: Callable[[], Any], device: torch.device) -> tuple[int, str]:
    """Return the bytes that a call holds at its peak beyond what is held now, its result included, and the method."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before, "cuda allocator"
    _settle_allocator()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        result = call()
        peak, method = _status("VmHWM"), "VmHWM"
    except OSError:  # no /proc, or not writable: the mark cannot be reset and may hide a small peak
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        result = call()
        peak, method = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "ru_maxrss"
    del result
    return max(peak - before, 0), method


def _child(
    sender: Connection, measure: Callable[..., dict[str, Any]], case: dict[str, Any], threads: int, limit: int | None
) -> None:
    try:
        torch.set_num_threads(threads)
        if limit is not None:  # a clear allocation error instead of a machine that swaps or a killed process
            soft = _status("VmSize") + limit
            resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
        sender.send({"status": "ok", **measure(**case)})
    except BaseException as error:  # whatever a peer does is its result
        sender.send({"status": "failed", "reason": f"{type(error).__name__}: {str(error)[:300]}"})
    finally:
        sender.close()


_SERVER: Any = None


def _context() -> Any:
    global _SERVER
    if _SERVER is None:
        _SERVER = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            _SERVER.set_forkserver_preload(["benchmarks.measure"])
    return _SERVER


def in_own_process(
    measure: Callable[..., dict[str, Any]], case: dict[str, Any], *, device: torch.device, timeout_s: float
) -> dict[str, Any]:
    """Run ``measure(**case)`` in a new process and return its dictionary, with ``status`` and ``wall_s``.

    Args:
        measure: A module-level function.
        case: Its arguments; must pickle.
        device: On a CPU the process may use at most 90 % of what is available now.
        timeout_s: The process is ended after this long.
    """
    start = time.perf_counter()
    available = available_memory(device) if device.type == "cpu" and sys.platform == "linux" else None
    limit = None if available is None else int(0.9 * available)
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, measure, case, torch.get_num_threads(), limit))
    process.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(timeout_s) else None
        if found is None:
            found = {"status": "timeout", "reason": f"not done after {timeout_s:.0f} s"}
    except EOFError:
        found = {"status": "failed", "reason": "the process ended without an answer (out of memory?)"}
    finally:
        if process.is_alive():
            process.join(0.2)
        if process.is_alive():
            process.kill()
        process.join()
        receiver.close()
    return {**found, "wall_s": time.perf_counter() - start}
