"""Tables of a comparison: every number where it belongs, no empty cell, the control named."""

import statistics
from pathlib import Path

import pytest
from matplotlib.image import imread

from experiments import uncertainty_report
from tests.experiments.uncertainty_cases import cell, cells

NLLS = {"SGD": [0.4, 0.5, 0.6], "SWAG": [0.1, 0.2, 0.3], "SWA": [0.2, 0.25, 0.1], "NaiveNoise": [0.3, 0.3, 0.3]}


def rows(text: str, section: int = 0) -> list[list[str]]:
    """The cells of one table of a Markdown text."""
    tables = [part for part in text.split("\n\n") if part.startswith("| ")]
    return [[entry.strip() for entry in line.strip("|").split("|")] for line in tables[section].splitlines()]


def test_the_table_has_mean_and_deviation_over_seeds() -> None:
    text = uncertainty_report.markdown("title", cells(NLLS), ["a note"])
    head, _, *body = rows(text)
    assert head == ["method", "epochs", "networks", "accuracy %", "NLL", "Brier", "ECE %", "AUROC % noise"]
    assert [row[0] for row in body] == list(NLLS)
    sd = statistics.stdev(NLLS["SWA"])
    assert body[2] == [
        "SWA", "20", "30", f"95.42 ± {25 * sd:.2f}", f"0.1833 ± {sd:.4f}", f"0.0917 ± {sd / 2:.4f}",
        f"1.83 ± {10 * sd:.2f}", "90.00 ± 0.00",
    ]  # fmt: skip
    assert text.startswith("# title\n") and "\n- a note\n" in text
    assert all(entry and "nan" not in entry for part in range(3) for row in rows(text, part) for entry in row)
    assert rows(text, 1)[0] == ["method", "AUROC % noise", "AUPR % noise", "FPR95 % noise", "KL noise"]
    assert rows(text, 1)[2] == ["SGD", "90.00 ± 0.00", "80.00 ± 0.00", "30.00 ± 0.00", "2.500 ± 0.000"]
    assert rows(text, 2)[0] == ["method", "seed 0", "seed 1", "seed 2"]
    assert rows(text, 2)[2] == ["SGD", *["scale 0.5, labels sampled"] * 3]


def test_one_seed_has_the_standard_error_of_the_images() -> None:
    found = {name: [cell(name, 1, 0.2)] for name in ("SGD", "NaiveNoise")}
    body = rows(uncertainty_report.markdown("title", found, []))[2:]
    assert body[0][3:] == ["95.00 ± 4.75", "0.2000 ± 0.0100", "0.1000 ± 0.0050", "2.00 ± 0.10", "90.00"]


def test_without_foreign_images_there_is_no_such_table() -> None:
    found = {name: [cell(name, 1, 0.2, foreign={})] for name in ("SGD", "NaiveNoise")}
    text = uncertainty_report.markdown("title", found, [])
    assert "Foreign" not in text and rows(text)[0][-1] == "ECE %"


def test_the_control_is_compared_with_seed_by_seed() -> None:
    text = uncertainty_report.markdown("title", cells(NLLS), [])
    line = next(line for line in text.splitlines() if line.startswith("- NLL against"))
    assert line == (
        "- NLL against that of NaiveNoise, lower on every seed: SWA; lower on some seeds: SWAG; "
        "not lower on any seed: SGD."
    )


def test_the_summary_is_json_and_keeps_the_seeds() -> None:
    found = uncertainty_report.summary(cells(NLLS))
    assert found["SGD"]["nll"]["values"] == NLLS["SGD"]
    assert found["SGD"]["nll"]["mean"] == pytest.approx(0.5) and found["SGD"]["nll"]["spread"] == pytest.approx(0.1)
    assert found["SGD"]["foreign"]["noise"]["auroc"]["values"] == [0.9] * 3
    assert found["SGD"]["epochs"] == 20 and len(found["SGD"]["levels"]) == 3


def test_the_figures_are_written(tmp_path: Path) -> None:
    names = uncertainty_report.draw(tmp_path, cells(NLLS), "title")
    assert names == ["reliability.png", "metrics.png", "entropy-noise.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)
    for name in names:
        picture = imread(tmp_path / name)
        assert picture.shape[0] >= 250 and picture.shape[1] >= 600 and picture[..., :3].std() > 0.02
