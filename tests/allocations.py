"""What torch allocates on the CPU during a call, as its profiler saw it."""

from collections.abc import Callable
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def peak_bytes(run: Callable[[], T]) -> tuple[int, T]:
    """Return the most bytes that had been allocated at once beyond those from before the call, and its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        result = run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler saw no allocation"
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak, result


def peak_vectors(run: Callable[[], object], size: int) -> float:
    """Return the peak in float32 vectors of a size."""
    return peak_bytes(run)[0] / (4 * size)
