"""The comparison of ways to predict judges the answers, gives ratios and refuses bad settings."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import predict_vectorized
from benchmarks.predict_vectorized import ALONE, CASES, Case, Problem, check
from lowrank_bdl.models.mlp import MLP

SMALL = "MLP 13-50-2, batch 32"


def test_ratios_of_one_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--networks", SMALL, "SmallConvNet", "--num_samples", "4", "--batch_size", "8", "--budget", "0.2"]
    assert predict_vectorized.main([*arguments, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("predict-vectorized-*.json")
    record = json.loads(file.read_text())
    assert record["environment"]["threads"] == 1 and list(record["networks"]) == [SMALL, "SmallConvNet"]
    for found in record["networks"].values():
        assert (found["batch_size"], found["num_samples"]) == (8, 4)
        rows = {row["contender"]: row for row in found["rows"]}
        assert {ALONE, "auto", "at once, own choice", "4 at once"} < set(rows)
        assert all(row["status"] == "ok" and row["error"] <= 1 for row in rows.values())
        assert rows[ALONE]["ratios"][ALONE]["median"] == 1.0
        assert all(row["ratios"][ALONE]["median"] > 0 for row in rows.values())
    assert "4 at once" in file.with_suffix(".md").read_text() and "4 at once" in capsys.readouterr().out


def test_a_wrong_answer_is_not_timed() -> None:
    case = Case(lambda: MLP(2, in_features=3, hidden=(4,)), (3,), 5, 3)
    problem = Problem(case, 0, torch.device("cpu"))
    assert check(problem, problem.expected).ok
    assert not check(problem, problem.expected + 2e-6).ok
    assert not check(problem, problem.expected * torch.nan).ok


def test_the_networks_that_were_asked_for_are_there() -> None:
    assert {"LeNet5", "SmallConvNet", "PreResNet20"} < set(CASES)
    assert CASES["LeNet5"].batch_size == 500


@pytest.mark.parametrize("flag", ["--batch_size", "--num_samples", "--threads"])
def test_bad_settings_are_refused(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert predict_vectorized.main([flag, "0", "--out", str(out)]) == 2
    assert f"{flag} must be at least 1; got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        predict_vectorized.main(["--networks", "LeNet6"])
    assert not out.exists()
