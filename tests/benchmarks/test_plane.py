"""The comparison with bare forward passes judges the losses, gives ratios and refuses bad settings."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import plane
from benchmarks.plane import BARE, CASES, OURS, Problem, check

SMALL = "MLP-2-25-25-2"


def test_ratios_of_one_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--networks", SMALL, "PreResNet20", "--num_data", "8", "--points", "2", "--budget", "0.2"]
    assert plane.main([*arguments, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("plane-*.json")
    record = json.loads(file.read_text())
    assert record["environment"]["threads"] == 1 and list(record["networks"]) == [SMALL, "PreResNet20"]
    for found in record["networks"].values():
        assert (found["num_data"], found["points"]) == (8, 2)
        rows = {row["contender"]: row for row in found["rows"]}
        assert list(rows) == [BARE, OURS] and rows[OURS]["error"] <= 1
        assert all(row["status"] == "ok" for row in rows.values())
        assert rows[OURS]["ratios"][BARE]["median"] > 0
    text = file.with_suffix(".md").read_text()
    assert "41 x 41 points" in text and OURS in text and OURS in capsys.readouterr().out


def test_a_wrong_answer_is_not_timed() -> None:
    problem = Problem(replace(CASES[SMALL], num_data=6, points=3), 0, torch.device("cpu"))
    assert check(problem, problem.expected).ok
    assert not check(problem, problem.expected * (1 + 1e-4)).ok
    assert not check(problem, problem.expected * torch.nan).ok


def test_the_network_of_the_target_is_there() -> None:
    assert CASES["LeNet5"].num_data == 10_000 and not CASES["LeNet5"].batch_norm


@pytest.mark.parametrize("flag", ["--num_data", "--points", "--threads"])
def test_bad_settings_are_refused(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert plane.main([flag, "0", "--out", str(out)]) == 2
    assert f"{flag} must be at least 1; got 0" in capsys.readouterr().err
    assert not out.exists()
