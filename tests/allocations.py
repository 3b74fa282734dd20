"""What torch allocates on the CPU during a call, as its profiler saw it."""

from collections.abc import Callable
from itertools import accumulate
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def allocations(run: Callable[[], T]) -> tuple[list[int], T]:
    """Return the bytes of every allocation in its order, negative where memory was released, and the call's result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        result = run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler saw no allocation"
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())], result


def peak_bytes(run: Callable[[], T]) -> tuple[int, T]:
    """Return the most bytes that had been allocated at once beyond those from before the call, and its result."""
    sizes, result = allocations(run)
    return max(accumulate(sizes, initial=0)), result


def peak_vectors(run: Callable[[], object], size: int) -> float:
    """Return the peak in float32 vectors of a size."""
    return peak_bytes(run)[0] / (4 * size)
