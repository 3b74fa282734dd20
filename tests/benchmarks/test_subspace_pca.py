"""The comparison judges answers, gives ratios to the floor, and refuses bad settings; at a tiny size."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import peers, subspace_pca
from benchmarks.draw_operations import READ_AND_WRITE
from benchmarks.problems import GaussianProblem, Size
from benchmarks.subspace_pca import check


def test_record_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    arguments = ["--dims", "20000", "--rank", "4", "--budget", "0.2", "--threads", "1", "--out", str(tmp_path)]
    assert subspace_pca.main(arguments) == 0
    (file,) = tmp_path.glob("subspace-pca-*.json")
    (found,) = json.loads(file.read_text())["sizes"]
    assert (found["dim"], found["rank"]) == (20_000, 4)
    rows = {row["contender"]: row for row in found["rows"]}
    assert len(rows) == 5
    for name in (peers.OURS, peers.HAND):
        assert rows[name]["status"] == "ok" and rows[name]["error"] <= 1
        assert rows[name]["ratios"][READ_AND_WRITE]["median"] > 0
        assert rows[name]["memory"]["bases"] >= 0
    text = file.with_suffix(".md").read_text()
    assert "scikit-learn randomized_svd" in text and peers.OURS in capsys.readouterr().out


def test_a_wrong_basis_is_found() -> None:
    problem = GaussianProblem(Size(5000, 3))
    left, singular, _ = torch.linalg.svd(problem.storage.double().mT, full_matrices=False)
    right = (left * singular).mT.float()
    assert check(problem, right).ok
    assert not check(problem, right * 1.01).ok
    assert not check(problem, right + 1e-3 * right.flip(0)).ok
    assert not check(problem, right * torch.nan).ok


@pytest.mark.parametrize("flag", ["--dims", "--rank", "--threads"])
def test_bad_settings_are_refused(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert subspace_pca.main([flag, "0", "--out", str(out)]) == 2
    assert f"{flag} must be a whole number of at least 1; got 0" in capsys.readouterr().err
    assert not out.exists()
