"""Peaks are measured where they are known, and processes that fail or hang are reported."""

import time
from typing import Any

import pytest
import torch

from benchmarks.measure import measure_memory
from benchmarks.memory import in_own_process
from benchmarks.problems import Size

CPU = torch.device("cpu")
MIB = 2**20


def peak_of(num_bytes: int, keep: bool) -> dict[str, Any]:
    """Measure a call that holds ``num_bytes`` twice (or once, if it keeps nothing)."""
    from benchmarks.memory import peak_above

    torch.ones(4 * MIB).sum()  # freed before: must not hide the peak

    def call() -> torch.Tensor:
        first = torch.ones(num_bytes // 4)
        return first * 2 if keep else first.sum()

    above, method = peak_above(call, CPU)
    return {"above_inputs": above, "method": method}


def fails() -> dict[str, Any]:
    raise RuntimeError("out of luck")


def hangs() -> dict[str, Any]:
    time.sleep(60)
    return {}


@pytest.mark.parametrize(("keep", "factor"), [(True, 2), (False, 1)])
def test_peak_is_what_was_allocated(keep: bool, factor: int) -> None:
    found = in_own_process(peak_of, {"num_bytes": 64 * MIB, "keep": keep}, device=CPU, timeout_s=60)
    assert found["status"] == "ok"
    assert found["above_inputs"] == pytest.approx(factor * 64 * MIB, abs=3 * MIB)


def test_failure_and_timeout_are_reported() -> None:
    assert in_own_process(fails, {}, device=CPU, timeout_s=60)["reason"] == "RuntimeError: out of luck"
    assert in_own_process(hangs, {}, device=CPU, timeout_s=1.0)["status"] == "timeout"


def test_inputs_do_not_count() -> None:
    size = Size(1_000_000, 8)
    case = {"operation": "sample", "contender": "hand-written", "size": size}
    found = in_own_process(measure_memory, case, device=CPU, timeout_s=60)
    assert found["status"] == "ok"
    assert found["above_inputs"] == pytest.approx(
        size.numel * 4, abs=3 * MIB
    )  # the draw, and not the 32 MB of deviations
