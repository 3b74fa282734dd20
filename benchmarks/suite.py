"""The plan of a run, the run itself, and its record: a JSON file that is whole after every comparison."""

import json
import os
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import peers
from benchmarks.environment import environment, version_of
from benchmarks.floors import machine_floors
from benchmarks.harness import Contender, Policy, compare
from benchmarks.measure import REGISTRY, History, input_bytes, measure_memory
from benchmarks.memory import in_own_process
from benchmarks.operations import Operation
from benchmarks.problems import CollectProblem, Size, model_numel
from benchmarks.targets import judge, state_slope
from lowrank_bdl.linalg.memory import available_memory
from lowrank_bdl.parameters.memory_estimates import estimate_memory

FORMAT = "lowrank_bdl-benchmark"
VERSION = 1
MEMORY_SHARE = 0.7
"""A contender that is predicted to need more of the free memory is skipped."""
MAX_SECONDS = 60.0
"""A contender that is predicted to take longer for one call is skipped."""
ESTIMATE_RELATIVE, ESTIMATE_ABSOLUTE = 0.05, 16 * 2**20
"""What `estimate_memory` may be off by: 5 % of the measured peak plus 16 MiB."""


@dataclass(frozen=True)
class Settings:
    """One run.

    Attributes:
        dims: Sizes D.
        ranks: Ranks K.
        main_rank: The rank at which every operation and contender is measured.
        models: Networks to collect from.
        state_model: Network on which stored state is measured against rank; None for none.
        operations: Names to run, None for all.
        dtype: Of all tensors.
        device: Where.
        threads: For the CPU.
        scale: Multiplies the time spent on rounds.
        max_minutes: No comparison is started after this long.
        seed: Of the inputs, the order of rounds and the bootstrap.
        memory: Whether to measure memory.
        quick: Leave out contenders that take tens of seconds, and memory of all but ours.
    """

    dims: tuple[int, ...] = (100_000, 1_000_000, 10_000_000, 36_000_000)
    ranks: tuple[int, ...] = (1, 5, 10, 20, 50, 100)
    main_rank: int = 20
    models: tuple[str, ...] = ("330-tensors", "36M")
    state_model: str | None = "36M"
    operations: tuple[str, ...] | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    scale: float = 1.0
    max_minutes: float = 60.0
    seed: int = 0
    memory: bool = True
    quick: bool = False


@dataclass(frozen=True)
class Cell:
    """One comparison: an operation at a size. ``full`` means every contender, else those that are quick."""

    operation: str
    size: Size
    full: bool = True
    memory_of: tuple[str, ...] | None = None

    @property
    def key(self) -> str:
        """Identity in the record; a resumed run skips the keys that are there."""
        size = self.size
        return f"{self.operation}/{size.model or size.numel}/{size.rank}/{size.dtype}/{size.device}"


def plan(settings: Settings) -> tuple[list[Cell], list[str]]:
    """Return the comparisons in the order of running, and sentences on what the plan leaves out."""
    names = [n for n in REGISTRY if settings.operations is None or n in settings.operations]
    gaussian = [n for n in names if REGISTRY[n].problem is not CollectProblem]
    dims, main = sorted(settings.dims), settings.main_rank
    others = [rank for rank in settings.ranks if rank != main]
    cells: list[Cell] = []
    left_out: list[str] = []

    def size(numel: int, rank: int) -> Size:
        return Size(numel, rank, settings.dtype, settings.device, seed=settings.seed)

    for numel in dims:
        large = numel > 10_000_000
        for name in gaussian:
            op = REGISTRY[name]
            if (op.max_numel is not None and numel > op.max_numel) or (large and not op.sweep):
                left_out.append(f"{op.title} at D = {numel:,}")
            elif main >= op.min_rank:
                of = (peers.OURS,) if settings.quick else (peers.OURS, peers.HAND) if large else None
                cells.append(Cell(name, size(numel, main), memory_of=of))
    if "collect" in names:
        of = (peers.OURS,) if settings.quick else None
        cells += [Cell("collect", _model_size(m, main, settings), memory_of=of) for m in settings.models]
    if "state" in names and settings.state_model is not None and settings.memory:
        cells += [Cell("state", _model_size(settings.state_model, rank, settings)) for rank in sorted({*others, main})]
    swept = [n for n in gaussian if REGISTRY[n].sweep]
    # 10^6 first: where the time runs out, the sweep of a middle size is the one to have
    for numel in sorted((d for d in dims if d <= 10_000_000), key=lambda d: abs(d - 1_000_000)):
        of = None if numel == 1_000_000 and not settings.quick else (peers.OURS,)
        cells += [Cell(n, size(numel, rank), full=False, memory_of=of) for rank in others for n in swept]
    if settings.quick:
        heavy = sorted({c for n in names for c in REGISTRY[n].heavy})
        left_out.append(
            f"in a quick run, where they take long or repeat a row: {', '.join(heavy)}; memory of all but ours"
        )
    if others:
        unswept = [REGISTRY[n].title for n in gaussian if n not in swept]
        if unswept:
            left_out.append(f"ranks other than {main} for: {', '.join(unswept)}")
        if any(d > 10_000_000 for d in dims):
            left_out.append(f"ranks other than {main} above D = 10,000,000")
        heavy = sorted({c for n in swept for c in REGISTRY[n].heavy})
        if heavy:
            left_out.append(f"at ranks other than {main}, where they take long or repeat a row: {', '.join(heavy)}")
    return cells, left_out


def _model_size(model: str, rank: int, settings: Settings) -> Size:
    return Size(model_numel(model), rank, settings.dtype, settings.device, model, settings.seed)


def policy_of(cell: Cell, settings: Settings) -> Policy:
    """Return how long to measure a cell."""
    numel = cell.size.numel
    budget = 1.5 if numel <= 200_000 else 4.0 if numel <= 2_000_000 else 8.0
    if not cell.full:
        budget *= 0.5
    fewest = 3 if numel > 20_000_000 else 4 if not cell.full else 5
    if settings.quick:
        fewest = 3
    return Policy(budget_s=budget * settings.scale, min_rounds=fewest, max_rounds=30)


class Run:
    """A run in progress; ``record`` is what the JSON file holds."""

    def __init__(self, settings: Settings, out: Path, resume: bool = False) -> None:
        self.settings, self.out = settings, out
        self.device = torch.device(settings.device)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.start = time.perf_counter()
        self.rng = random.Random(settings.seed)
        self.history = History()
        self.cells, left_out = plan(settings)
        self.record: dict[str, Any] = {"format": FORMAT, "version": VERSION, "cells": [], "wall_s": 0.0}
        if resume and out.exists():
            self.record = json.loads(out.read_text())
            for cell in self.record["cells"]:
                self._remember(cell)
        self.spent_before: float = self.record["wall_s"]
        self.record |= {
            "created": time.strftime("%Y-%m-%d"),
            "finished": False,
            "settings": {**asdict(settings), "threads": torch.get_num_threads()},
            "environment": environment(self.device),
            "left_out": left_out,
        }

    def execute(self, progress: bool = True) -> dict[str, Any]:
        """Run every cell that is not in the record yet, saving after each; an interrupt leaves a whole record."""
        done = {cell["key"] for cell in self.record["cells"]}
        todo = [cell for cell in self.cells if cell.key not in done]
        if "machine_floors" not in self.record:
            num_bytes = 2**29 if max(self.settings.dims, default=0) > 200_000 else 2**25
            self.record["machine_floors"] = machine_floors(self.device, getattr(torch, self.settings.dtype), num_bytes)
        bar = tqdm(total=len(todo), disable=not progress, unit="row", desc="benchmark")
        try:
            for _, group in groupby(todo, key=lambda cell: cell.size):
                self._group(list(group), bar)
            self.record["finished"] = True
        finally:
            bar.close()
            self._save()
        return self.record

    def _late(self) -> bool:
        return time.perf_counter() - self.start > 60 * self.settings.max_minutes

    def _group(self, cells: list[Cell], bar: Any) -> None:
        """Measure memory for all cells of one size first, while this process holds no inputs, then time them."""
        seen: dict[str, dict[str, dict[str, Any]]] = {}
        for cell in cells:
            bar.set_postfix_str(f"memory {cell.key}")
            seen[cell.key] = self._memories(cell)
        problem: Any = None
        free = available_memory(self.device)
        try:
            for cell in cells:
                bar.set_postfix_str(f"time {cell.key}")
                if self._late():
                    self.record["left_out"].append(f"{cell.key}: the time limit was reached")
                    bar.update()
                    continue
                operation = REGISTRY[cell.operation]
                memories = seen[cell.key]
                if cell.operation == "state":
                    rows = [self._memory_row(name, memories[name]) for name in memories]
                else:
                    problem = operation.problem(cell.size) if problem is None else problem
                    rows = self._timed_rows(cell, operation, problem, memories, free)
                    if operation.problem is CollectProblem:
                        problem.close()
                        problem = None
                self._finish(cell, operation, rows, memories)
                bar.update()
        finally:
            if problem is not None:
                problem.close()

    def _contenders(self, cell: Cell) -> list[Contender]:
        operation = REGISTRY[cell.operation]
        every = cell.full and not self.settings.quick
        return [c for c in operation.contenders(cell.size) if every or c.name not in operation.heavy]

    def _objection(self, cell: Cell, contender: Contender, free: int | None) -> str | None:
        """Return why a contender is not tried, or None."""
        if contender.package is not None and version_of(contender.package) is None:
            return f"not installed: {contender.package}"
        seconds, above = self.history.predict(cell.operation, contender.name, cell.size)
        if contender.need is not None:
            above = contender.need(cell.size)
        if above is None:
            above = REGISTRY[cell.operation].result_bytes(cell.size)
        need = above + input_bytes(cell.size, REGISTRY[cell.operation])
        if free is not None and need > MEMORY_SHARE * free:
            gib = 2.0**30
            return (
                f"predicted to need {need / gib:.1f} GiB, more than {MEMORY_SHARE:.0%} of the {free / gib:.1f} GiB free"
            )
        if seconds is not None and seconds > MAX_SECONDS:
            return f"predicted to take {seconds:.0f} s a call, more than {MAX_SECONDS:.0f} s"
        return None

    def _memories(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """Measure each contender of a cell in a process of its own; floors need none."""
        found: dict[str, dict[str, Any]] = {}
        for contender in self._contenders(cell):
            if not self.settings.memory or self._late() or contender.floor:
                continue
            if cell.memory_of is not None and contender.name not in cell.memory_of:
                continue
            reason = self._objection(cell, contender, available_memory(self.device))
            if reason is not None:
                found[contender.name] = {"status": "skipped", "reason": reason}
                continue
            case = {"operation": cell.operation, "contender": contender.name, "size": cell.size}
            memory = in_own_process(measure_memory, case, device=self.device, timeout_s=1.5 * MAX_SECONDS + 30)
            seconds = 2 * MAX_SECONDS if memory["status"] == "timeout" else memory.get("seconds")
            self.history.add(cell.operation, contender.name, cell.size, seconds, memory.get("above_inputs"))
            found[contender.name] = memory
        return found

    def _timed_rows(
        self, cell: Cell, operation: Operation, problem: Any, memories: Mapping[str, Any], free: int | None
    ) -> list[dict[str, Any]]:
        contenders = self._contenders(cell)
        skipped = {}
        for contender in contenders:
            reason = self._objection(cell, contender, free)
            memory = memories.get(contender.name, {})
            if reason is None and memory.get("status") in ("failed", "timeout"):
                reason = f"failed where its memory was measured: {memory['reason']}"
            if reason is not None:
                skipped[contender.name] = reason
        rows = compare(
            problem,
            contenders,
            operation.check,
            device=self.device,
            policy=policy_of(cell, self.settings),
            rng=self.rng,
            references=[c.name for c in contenders],
            skipped=skipped,
            measured={n: (m["seconds"], m["verdict"]) for n, m in memories.items() if "verdict" in m},
        )
        for row in rows:
            if row["first_call_s"] is not None:
                self.history.add(cell.operation, row["contender"], cell.size, row["first_call_s"], None)
        return rows

    def _memory_row(self, name: str, memory: dict[str, Any]) -> dict[str, Any]:
        """Return the row of a contender whose memory alone is of interest."""
        row = {"contender": name, "floor": False, "note": "memory only", "status": memory["status"], "error": None}
        if row["status"] == "timeout":
            row["status"] = "failed"
        return row | {
            "reason": memory.get("reason"),
            "errors": {},
            "first_call_s": memory.get("seconds"),
            "times_s": [],
        }

    def _finish(
        self, cell: Cell, operation: Operation, rows: list[dict[str, Any]], memories: Mapping[str, dict[str, Any]]
    ) -> None:
        """Add memory, estimates and predicted floors to the rows, and save the record."""
        size, result = cell.size, operation.result_bytes(cell.size)
        for row in rows:
            memory = memories.get(row["contender"])
            row["memory"] = None if memory is None else _memory(memory, result, size)
            if row["contender"] == peers.OURS and operation.estimate is not None and row["memory"] is not None:
                row["estimate"] = _estimate(operation.estimate(size), size, row["memory"].get("above_inputs"))
        numbers, normals = operation.traffic(size)
        machine = self.record["machine_floors"]
        predicted = numbers * size.itemsize / machine["read_bytes_per_s"] + normals * machine["seconds_per_normal"]
        entry = {
            "key": cell.key,
            "operation": cell.operation,
            "title": operation.title,
            "numel": size.numel,
            "rank": size.rank,
            "model": size.model,
            "dtype": size.dtype,
            "device": size.device,
            "dk_bytes": size.dk_bytes,
            "result_bytes": result,
            "full": cell.full,
            "floor": {"bytes": numbers * size.itemsize, "normals": normals, "predicted_s": predicted},
            "rows": rows,
        }
        self.record["cells"].append(entry)
        self._save()

    def _remember(self, cell: Mapping[str, Any]) -> None:
        size = Size(cell["numel"], cell["rank"], cell["dtype"], cell["device"], cell["model"])
        for row in cell["rows"]:
            above = (row.get("memory") or {}).get("above_inputs")
            if row["first_call_s"] is not None or above is not None:
                self.history.add(cell["operation"], row["contender"], size, row["first_call_s"], above)

    def _save(self) -> None:
        self.record["wall_s"] = self.spent_before + time.perf_counter() - self.start
        self.record["targets"] = judge(self.record)
        self.record["state_slope"] = state_slope(self.record)
        write_json(self.out, self.record)


def _memory(memory: Mapping[str, Any], result: int, size: Size) -> dict[str, Any]:
    """Return a memory measurement with the extra beyond the result, in bytes and in units of D K itemsize."""
    if memory["status"] != "ok":
        return {"status": memory["status"], "reason": memory["reason"]}
    extra = max(0, memory["above_inputs"] - result)
    found = {name: memory[name] for name in ("status", "above_inputs", "method", "seconds")}
    return found | {"extra_bytes": extra, "extra_dk": extra / size.dk_bytes}


def _estimate(options: dict[str, Any], size: Size, measured: int | None) -> dict[str, Any]:
    """Return what `estimate_memory` says beside what was measured."""
    estimate = estimate_memory(size.numel, size.rank, dtype=getattr(torch, size.dtype), device=size.device, **options)
    expected = estimate.result + estimate.temporaries
    found: dict[str, Any] = {"options": options, "above_inputs": expected, "peak": estimate.peak, "within": None}
    if measured is not None:
        found["within"] = abs(expected - measured) <= ESTIMATE_RELATIVE * measured + ESTIMATE_ABSOLUTE
    return found


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record so that a killed run leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)
