"""One measurement of memory as a fresh process makes it, and what is known beforehand about cost."""

from typing import Any

import torch

from benchmarks.harness import Contender, Policy, timed
from benchmarks.memory import peak_above
from benchmarks.operations import Operation, operations
from benchmarks.problems import Size, model_numel

REGISTRY = operations()
"""Imported once by the server of the measuring processes, which are forked from it."""


def find(operation: str, contender: str, size: Size) -> tuple[Operation, Contender]:
    """Return an operation and one of its contenders by name."""
    found = REGISTRY[operation]
    return found, next(c for c in found.contenders(size) if c.name == contender)


def measure_memory(operation: str, contender: str, size: Size) -> dict[str, Any]:
    """Return the peak of one call above its inputs [byte] and its time [s]; runs in a process of its own.

    The answer of a slow contender is judged here as well (``verdict``), so that it need not run again.
    """
    device = torch.device(size.device)
    kind, competitor = find(operation, contender, size)
    warm_up = Size(8192, size.rank, size.dtype, size.device, "tiny" if size.model else None)
    problem = kind.problem(warm_up)
    competitor.prepare(problem)()  # code, threads and BLAS buffers are in place before the measurement
    problem.close()
    problem = kind.problem(size)
    call = competitor.prepare(problem)
    seconds, answer = 0.0, None

    def timed_call() -> Any:
        nonlocal seconds, answer
        seconds, result = timed(call, device)
        if seconds > Policy().once_above_s:
            answer = result
        return result

    above, method = peak_above(timed_call, device)
    found: dict[str, Any] = {"above_inputs": above, "method": method, "seconds": seconds}
    if answer is not None:
        found["verdict"] = kind.check(problem, answer)
    problem.close()
    return found


def input_bytes(size: Size, kind: Operation) -> int:
    """Return about how much memory the inputs of an operation take [byte]."""
    if size.model is not None:
        weights = model_numel(size.model) * size.itemsize
        return (size.rank + 6) * weights if kind.name == "collect" else 2 * weights
    return size.dk_bytes + 6 * size.numel * size.itemsize


class History:
    """First-call times and peaks of every contender, to predict those at a larger size before it is tried.

    Time and memory are taken to grow in proportion to D and to K, which is right or too much for everything here that
    is not dense.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], list[tuple[Size, float | None, int | None]]] = {}

    def add(self, operation: str, contender: str, size: Size, seconds: float | None, above: int | None) -> None:
        """Note a measurement."""
        self._seen.setdefault((operation, contender), []).append((size, seconds, above))

    def predict(self, operation: str, contender: str, size: Size) -> tuple[float | None, float | None]:
        """Return seconds and bytes above the inputs at a size, each None where nothing is known."""
        seen = [s for s in self._seen.get((operation, contender), []) if (s[0].model is None) == (size.model is None)]
        results: list[float | None] = []
        for item in (1, 2):
            known = [(s[0], s[item]) for s in seen if s[item] is not None]
            if not known:
                results.append(None)
                continue
            near, value = min(known, key=lambda k: (_distance(k[0], size), -k[0].numel))
            ratio = size.numel / near.numel * max(1.0, size.rank / near.rank)
            results.append(float(value or 0) * ratio)
        return results[0], results[1]


def _distance(a: Size, b: Size) -> float:
    bigger = a.numel > b.numel or a.rank > b.rank
    return abs(a.numel - b.numel) / b.numel + abs(a.rank - b.rank) / b.rank + (1.0 if bigger else 0.0)
