"""Allocations that cannot fit are refused with numbers."""

import pytest
import torch

from lowrank_bdl.errors import MemoryLimitError
from lowrank_bdl.linalg import memory
from lowrank_bdl.linalg.moments import StreamingMoments
from lowrank_bdl.linalg.ring_buffer import DeviationBuffer

CPU = torch.device("cpu")


def test_refuses_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(memory, "_host_memory", lambda: 3 * 2**30)
    monkeypatch.setattr(memory, "_container_memory", lambda files: 2**31)
    assert memory.available_memory(CPU) == 2**31
    memory.require_memory(2**31, CPU, "a buffer")
    with pytest.raises(MemoryLimitError, match=r"a buffer needs 4\.00 GiB on cpu; 2\.00 GiB are free"):
        memory.require_memory(2**32, CPU, "a buffer")


def test_unknown_memory_refuses_nothing(monkeypatch):
    monkeypatch.setattr(memory, "_host_memory", lambda: None)
    monkeypatch.setattr(memory, "_container_memory", lambda files: None)
    assert memory.available_memory(CPU) is None
    memory.require_memory(2**80, CPU, "a buffer")
    assert memory.available_memory(torch.device("meta")) is None


def test_container_files(tmp_path):
    limit, used = tmp_path / "max", tmp_path / "current"
    used.write_text("300\n")
    assert memory._container_memory((str(limit), str(used))) is None
    limit.write_text("max\n")
    assert memory._container_memory((str(limit), str(used))) is None
    limit.write_text("1000\n")
    assert memory._container_memory((str(limit), str(used))) == 700


def test_this_machine_answers_with_a_plausible_number():
    available = memory._host_memory()
    assert available is None or 2**20 < available < 2**60


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [None, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_estimate_is_what_the_collectors_allocate(dtype, stored):
    moments = StreamingMoments(5000, dtype=dtype)
    buffer = DeviationBuffer(3, 5000, dtype=stored or dtype)
    estimate = memory.estimate_memory(5000, 3, num_samples=7, dtype=dtype, deviation_dtype=stored)
    size = {name: t.nbytes for state in (moments.state(), buffer.state()) for name, t in state.items() if t.ndim}
    assert estimate.moments == size["shift"] + size["offset"] + size["sum_sq"]
    assert estimate.deviations == size["storage"] + size.get("scale", 0)
    assert estimate.collector == sum(size.values())
    assert estimate.samples == torch.empty(7, 5000, dtype=dtype).nbytes
    assert estimate.total == estimate.collector + estimate.posterior + estimate.samples


def test_estimate_refuses_negative_numbers():
    with pytest.raises(ValueError, match="must be >= 0; got 3, -1 and 0"):
        memory.estimate_memory(3, -1)
