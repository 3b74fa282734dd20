"""Allocations that cannot fit are refused with numbers."""

import pytest
import torch

from lowrank_bdl.errors import MemoryLimitError
from lowrank_bdl.linalg import memory

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
