"""Compare implementations of one operation: the answer is checked first, then time is measured in paired rounds.

A wrong answer is reported with its error and never timed. Every contender runs in every round, in random order, so
that a slow phase of the machine hits all of them; ratios are taken within a round, and come with a bootstrap interval.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Check:
    """How far an answer is from the float64 oracle.

    Attributes:
        error: The largest of its errors; each is divided by its tolerance, so that 1 is the limit.
        detail: The errors by name, for the table.
    """

    error: float
    detail: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, **errors: tuple[float, float]) -> "Check":
        """Combine ``name=(error, tolerance)`` pairs; NaN counts as infinitely wrong."""
        finite = {name: (math.inf if math.isnan(e) else abs(e), tol) for name, (e, tol) in errors.items()}
        worst = max(e / tol for e, tol in finite.values())
        return cls(worst, {name: e for name, (e, _) in finite.items()})

    @property
    def ok(self) -> bool:
        """Whether every error is within its tolerance."""
        return self.error <= 1.0


@dataclass(frozen=True)
class Contender:
    """One implementation of an operation, or a floor under all of them.

    Attributes:
        name: What tables call it.
        prepare: Makes the call to be timed from a problem; runs once, untimed.
        floor: A floor moves the bytes and draws the normals but computes nothing: it has no answer to check.
        package: The distribution it needs; reported "not installed" where that is missing.
        need: Bytes it allocates at a size, where that is known beforehand (a dense matrix, say).
        note: A remark for the table, such as that it computes less than the others.
    """

    name: str
    prepare: Callable[[Any], Call]
    floor: bool = False
    package: str | None = None
    need: Callable[[Any], int] | None = None
    note: str = ""


@dataclass(frozen=True)
class Policy:
    """How long to measure.

    Attributes:
        budget_s: Time to spend on the rounds of one comparison.
        min_rounds: Fewest rounds.
        max_rounds: Most rounds.
        once_above_s: A contender whose first call takes longer is timed by that call alone.
    """

    budget_s: float = 6.0
    min_rounds: int = 5
    max_rounds: int = 30
    once_above_s: float = 5.0


def timed(call: Call, device: torch.device) -> tuple[float, Any]:
    """Return seconds and the result of one call; waits for a CUDA device before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def bootstrap_median(values: Sequence[float], rng: random.Random, repeats: int = 500) -> dict[str, Any]:
    """Return the median with a 95 % percentile-bootstrap interval (None for fewer than three values)."""
    median = statistics.median(values)
    if len(values) < 3:
        return {"median": median, "ci95": None}
    draws = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(repeats))
    return {"median": median, "ci95": [draws[int(0.025 * repeats)], draws[int(0.975 * repeats)]]}


def compare(
    problem: Any,
    contenders: Sequence[Contender],
    check: Callable[[Any, Any], Check],
    *,
    device: torch.device,
    policy: Policy,
    rng: random.Random,
    references: Sequence[str] = (),
    skipped: Mapping[str, str] | None = None,
    measured: Mapping[str, tuple[float, Check]] | None = None,
) -> list[dict[str, Any]]:
    """Check, then time.

    Args:
        problem: What `Contender.prepare` and ``check`` are given.
        contenders: All of them, floors included; each yields one row.
        check: Judges an answer: ``check(problem, answer)``.
        device: Where the work runs.
        policy: How long to measure.
        rng: Source of the order of contenders and of the bootstrap.
        references: Names of the contenders that paired ratios are taken to.
        skipped: Contenders to leave out, by name, with the reason.
        measured: Contenders so slow that one call elsewhere is all there is: its seconds and the verdict on its answer.

    Returns:
        A dictionary a contender: ``status`` is ``"ok"``, ``"once"``, ``"wrong"``, ``"failed"`` or ``"skipped"``;
        ``times_s`` is empty but for the first two; ``ratios[reference]`` has the median of the ratios paired in a
        round (of unpaired medians for ``"once"``, without an interval).
    """
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for contender in contenders:
        row: dict[str, Any] = {"contender": contender.name, "floor": contender.floor, "note": contender.note}
        row |= {"status": "ok", "reason": None, "error": None, "errors": {}, "first_call_s": None, "times_s": []}
        rows[contender.name] = row
        if skipped and contender.name in skipped:
            row |= {"status": "skipped", "reason": skipped[contender.name]}
            continue
        if measured and contender.name in measured:
            seconds, verdict = measured[contender.name]
            _judge(row, verdict, seconds)
            if verdict.ok:
                row |= {"status": "once", "times_s": [seconds]}
            continue
        try:
            call = contender.prepare(problem)
            seconds, answer = timed(call, device)
        except Exception as error:  # a peer may fail in any way: that is its result
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {str(error)[:300]}"}
            continue
        row["first_call_s"] = seconds
        if not contender.floor:
            verdict = check(problem, answer)
            _judge(row, verdict, seconds)
            if not verdict.ok:
                continue
        del answer
        if seconds > policy.once_above_s:
            row |= {"status": "once", "times_s": [seconds]}
        else:
            calls[contender.name] = call
    _rounds(calls, rows, device, policy, rng)
    for row in rows.values():
        if row["times_s"]:
            row["median_s"] = statistics.median(row["times_s"])
            row["ratios"] = {
                name: _ratio(row, rows[name], rng) for name in references if name in rows and rows[name]["times_s"]
            }
    return list(rows.values())


def _judge(row: dict[str, Any], verdict: Check, seconds: float) -> None:
    """Write the verdict on an answer into a row."""
    row["first_call_s"] = seconds
    row |= {"error": _finite(verdict.error), "errors": {k: _finite(v) for k, v in verdict.detail.items()}}
    if not verdict.ok:
        row |= {"status": "wrong", "reason": f"wrong answer: {_say(verdict)}"}


def _rounds(
    calls: Mapping[str, Call],
    rows: Mapping[str, dict[str, Any]],
    device: torch.device,
    policy: Policy,
    rng: random.Random,
) -> None:
    """Run every call once a round in random order, until the budget is spent; append to ``times_s``."""
    names, start, count = list(calls), time.perf_counter(), 0
    gc.collect()
    gc.disable()
    try:
        while names and count < policy.max_rounds:
            for name in rng.sample(names, len(names)):
                seconds, answer = timed(calls[name], device)
                del answer
                if count > 0 or sum(rows[n]["first_call_s"] for n in names) > policy.budget_s / 2:
                    rows[name]["times_s"].append(seconds)
            count += 1
            if count > policy.min_rounds and time.perf_counter() - start > policy.budget_s:
                break
    finally:
        gc.enable()


def _ratio(row: Mapping[str, Any], reference: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    """Return the paired ratio of times where both were measured in the same rounds."""
    mine, theirs = row["times_s"], reference["times_s"]
    if len(mine) == len(theirs) and row["status"] == reference["status"] == "ok":
        return bootstrap_median([a / b for a, b in zip(mine, theirs, strict=True)], rng)
    return {"median": statistics.median(mine) / statistics.median(theirs), "ci95": None}


def _finite(value: float) -> float | str:
    """Return a number that JSON can hold, or its name."""
    return value if math.isfinite(value) else str(value)


def _say(verdict: Check) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in verdict.detail.items()) or f"{verdict.error:.3g}"
