"""A wrong answer is reported and never timed; rounds are paired; bootstrap intervals cover."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.harness import Check, Contender, Policy, bootstrap_median, compare

CPU = torch.device("cpu")


def run(*contenders: Contender, **options: Any) -> dict[str, dict[str, Any]]:
    """Compare functions of the number 3, of which the square is wanted."""
    rows = compare(
        3.0,
        contenders,
        lambda problem, answer: Check.of(square=(answer - problem**2, 1e-6)),
        device=CPU,
        policy=options.pop("policy", Policy(budget_s=0.01, min_rounds=4, max_rounds=6)),
        rng=random.Random(0),
        references=[c.name for c in contenders],
        **options,
    )
    return {row["contender"]: row for row in rows}


def counting(function: Callable[[float], Any], calls: list[str], name: str) -> Callable[[float], Callable[[], Any]]:
    def prepare(problem: float) -> Callable[[], Any]:
        def call() -> Any:
            calls.append(name)
            return function(problem)

        return call

    return prepare


def test_a_wrong_answer_is_reported_with_its_error_and_not_timed() -> None:
    calls: list[str] = []
    right = Contender("right", counting(lambda x: x * x, calls, "right"))
    wrong = Contender("wrong", counting(lambda x: x * x + 0.5, calls, "wrong"))
    rows = run(right, wrong)
    assert rows["wrong"]["status"] == "wrong"
    assert rows["wrong"]["errors"] == {"square": 0.5}
    assert "square 0.5" in rows["wrong"]["reason"]
    assert rows["wrong"]["times_s"] == [] and "ratios" not in rows["wrong"]
    assert calls.count("wrong") == 1  # the answer that was judged, and no round
    assert rows["right"]["status"] == "ok" and set(rows["right"]["ratios"]) == {"right"}


def test_nan_is_wrong() -> None:
    rows = run(Contender("nan", lambda x: lambda: float("nan")))
    assert (rows["nan"]["status"], rows["nan"]["error"]) == ("wrong", "inf")


def test_a_failure_is_a_result_of_its_own() -> None:
    def fails(problem: float) -> Any:
        raise RuntimeError("no such kernel")

    rows = run(Contender("fails", fails), Contender("right", lambda x: lambda: x * x))
    assert rows["fails"]["status"] == "failed"
    assert rows["fails"]["reason"] == "RuntimeError: no such kernel"
    assert rows["right"]["status"] == "ok"


def test_a_skipped_contender_is_listed_with_the_reason() -> None:
    def prepare(problem: float) -> Any:
        raise AssertionError("prepared although skipped")

    rows = run(Contender("large", prepare), skipped={"large": "predicted to need 99 GiB"})
    assert (rows["large"]["status"], rows["large"]["reason"]) == ("skipped", "predicted to need 99 GiB")


def test_a_slow_contender_is_timed_once() -> None:
    calls: list[str] = []
    slow = Contender("slow", counting(lambda x: x * x, calls, "slow"))
    rows = run(slow, policy=Policy(budget_s=0.01, once_above_s=0.0))
    assert rows["slow"]["status"] == "once" and len(rows["slow"]["times_s"]) == 1
    assert calls == ["slow"]


def test_what_was_measured_elsewhere_is_not_run_again_and_is_judged_too() -> None:
    def prepare(problem: float) -> Any:
        raise AssertionError("prepared although measured")

    seen = {"slow": (30.0, Check.of(square=(1e-7, 1e-6))), "off": (40.0, Check.of(square=(0.5, 1e-6)))}
    right = Contender("right", lambda x: lambda: x * x)
    rows = run(right, Contender("slow", prepare), Contender("off", prepare), measured=seen)
    assert (rows["slow"]["status"], rows["slow"]["times_s"]) == ("once", [30.0])
    assert rows["slow"]["ratios"]["right"]["median"] > 1000 and rows["slow"]["ratios"]["right"]["ci95"] is None
    assert (rows["off"]["status"], rows["off"]["times_s"], rows["off"]["first_call_s"]) == ("wrong", [], 40.0)


def test_every_contender_runs_in_every_round_in_changing_order() -> None:
    calls: list[str] = []
    names = ("a", "b", "c")
    rows = run(*(Contender(n, counting(lambda x: x * x, calls, n)) for n in names), policy=Policy(1.0, 8, 8))
    rounds = [tuple(calls[i : i + 3]) for i in range(3, len(calls), 3)]
    assert all(sorted(order) == list(names) for order in rounds)
    assert len(set(rounds)) > 1
    assert {len(rows[n]["times_s"]) for n in names} == {len(rounds) - 1}  # the first round warms up


def test_floors_have_no_answer_to_check() -> None:
    rows = run(Contender("floor", lambda x: lambda: None, floor=True))
    assert rows["floor"]["status"] == "ok" and rows["floor"]["error"] is None


def test_bootstrap_interval_covers_the_median_at_its_rate() -> None:
    # 95 % nominal; the percentile bootstrap of a median of 25 covers about 94 %. Fewer than 88 % of 400 intervals has
    # a probability below 1e-5 at that rate.
    rng = random.Random(1)
    covered = 0
    for _ in range(400):
        low, high = bootstrap_median([rng.gauss(0.0, 1.0) for _ in range(25)], rng, repeats=200)["ci95"]
        covered += low <= 0.0 <= high
    assert 0.88 * 400 <= covered < 400


def test_two_values_have_no_interval() -> None:
    assert bootstrap_median([1.0, 3.0], random.Random(0)) == {"median": 2.0, "ci95": None}


@pytest.mark.parametrize("error", [2e-6, -2e-6])
def test_check_takes_the_worst_error_relative_to_its_tolerance(error: float) -> None:
    check = Check.of(a=(error, 1e-6), b=(0.5, 1.0))
    assert check.error == pytest.approx(2.0) and not check.ok
    assert check.detail == {"a": pytest.approx(2e-6), "b": 0.5}
