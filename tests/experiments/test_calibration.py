"""The calibration script on predictions with known calibration errors."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from experiments import calibration

PROG = "python -m experiments.calibration"


def write(path: Path, confidence: float, right: float, seed: int = 1, count: int = 200) -> None:
    """Predictions that are all equally sure, a given share of them right."""
    probabilities = np.full((count, 3), (1 - confidence) / 2, dtype=np.float32)
    probabilities[:, 0] = confidence
    targets = (np.arange(count) >= round(right * count)).astype(np.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"test/probabilities": probabilities, "test/targets": targets, "noise/probabilities": probabilities}
    np.savez_compressed(path.with_name(f"{path.name}-{seed}.npz"), **arrays)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed, right in ((1, 0.7), (2, 0.8)):
        write(tmp_path / "mnist/cells/SGD", 0.9, right, seed)
        write(tmp_path / "mnist/cells/SWAG-Diag", 0.75, right, seed)
    write(tmp_path / "other/cells/SGD", 0.5, 0.5)
    return tmp_path


def test_errors_are_those_of_the_predictions(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibration.main(["--runs", str(runs / "mnist"), "--dir", str(runs / "out")]) == 0
    found = json.loads((runs / "out/results.json").read_text())["methods"]
    assert list(found) == ["SGD", "SWAG-Diag"]
    assert [seed["ece_width"] for seed in found["SGD"]] == pytest.approx([0.2, 0.1], abs=1e-6)
    assert [seed["ece_mass"] for seed in found["SWAG-Diag"]] == pytest.approx([0.05, 0.05], abs=1e-6)
    assert [seed["accuracy"] for seed in found["SGD"]] == pytest.approx([0.7, 0.8])
    assert [seed["confidence"] for seed in found["SGD"]] == pytest.approx([0.9, 0.9])
    nll = [-(right * np.log(0.9) + (1 - right) * np.log(0.05)) for right in (0.7, 0.8)]
    assert [seed["nll"] for seed in found["SGD"]] == pytest.approx(nll, rel=1e-6)
    text = (runs / "out/calibration.md").read_text()
    assert capsys.readouterr().out.startswith(text)
    row = next(line for line in text.splitlines() if line.startswith("| SGD"))
    sd = statistics.stdev([70, 80])
    assert row.split(" | ")[1:4] == ["2", f"75.00 ± {sd:.2f}", "90.00 ± 0.00"]
    assert row.split(" | ")[-2:] == [f"15.00 ± {sd:.2f}", f"15.00 ± {sd:.2f} |"]
    assert imread(runs / "out/reliability.png").shape[1] >= 600


def test_methods_of_several_folders_are_told_apart(runs: Path) -> None:
    argv = ["--runs", f"{runs}/mnist,{runs}/other", "--methods", "SGD", "--num_bins", "1", "--dir", str(runs / "out")]
    assert calibration.main(argv) == 0
    found = json.loads((runs / "out/results.json").read_text())["methods"]
    assert list(found) == ["mnist/SGD", "other/SGD"] and len(found["other/SGD"]) == 1
    assert found["other/SGD"][0]["ece_width"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--runs", "nowhere"], "--runs nowhere: there are no predictions (cells/*.npz, of --save_predictions) in it"),
        (["--runs", ","], "--runs must name at least one folder, and each once; got ','"),
        (["--methods", "SWA"], "has no predictions of SWA"),
        (["--methods", "SWAGG"], "--methods: unknown method 'SWAGG'; known are SWAG, "),
        (["--images", "noise"], "--images noise: "),
        (["--num_bins", "0"], "--num_bins must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    argv: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = calibration.main(["--runs", str(runs / "mnist"), *argv, "--dir", str(runs / "out")])
    except SystemExit as stop:
        status = stop.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert status == 2 and error.startswith(f"{PROG}: error: ") and message in error and error.count("\n") == 1
    assert not (runs / "out").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no archive"])
def test_a_damaged_file_is_one_line(content: bytes, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "mnist/cells/SGD-1.npz").write_bytes(content)
    assert calibration.main(["--runs", str(runs / "mnist"), "--dir", str(runs / "out")]) == 2
    error = capsys.readouterr().err
    assert "SGD-1.npz is damaged: " in error and error.count("\n") == 1 and not (runs / "out").exists()


def test_numbers_that_are_no_probabilities_are_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {"test/probabilities": np.full((5, 3), 0.5), "test/targets": np.zeros(5, dtype=np.int64)}
    np.savez_compressed(runs / "mnist/cells/SGD-1.npz", **arrays)
    assert calibration.main(["--runs", str(runs / "mnist"), "--dir", str(runs / "out")]) == 2
    assert "SGD-1.npz is damaged: probs must be >= 0 and sum to 1" in capsys.readouterr().err
