"""The comparison of storage dtypes runs on a real (tiny) quickstart run and says what it should."""

import json
from pathlib import Path

import pytest

from benchmarks import storage_precision
from experiments import quickstart

TINY = ["--epochs", "6", "--train_size", "60", "--width", "2", "--num_samples", "2", "--rank", "3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("storage") / "run"
    assert quickstart.main(["--dir", str(folder), *TINY]) == 0
    return folder


def test_bits_and_what_they_cost(run: Path, tmp_path: Path) -> None:
    assert storage_precision.main(["--run", str(run), "--num_samples", "3", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "storage-precision-digits.json").read_text())
    rows = record["dtypes"]
    weights = record["parameters"]
    assert rows["float32"]["bytes_per_row"] == 4 * weights
    assert rows["bfloat16"]["bytes_per_row"] == 2 * weights
    assert 1 < rows["int8"]["bytes_per_row"] / weights < 1.1
    exact = rows["float32"]
    assert exact["relative_error_of_deviations"] == 0 and exact["largest_change_of_a_probability"] == 0
    assert abs(exact["kl_nats"]) < 1e-6
    # half a unit in the last place of each format bounds the error; a tenth of it would mean that nothing was rounded
    for name, unit in (("bfloat16", 2**-9), ("float16", 2**-12), ("float8_e4m3fn", 2**-5)):
        assert unit / 10 < rows[name]["relative_error_of_deviations"] < 1.1 * unit
    assert 0 < rows["float16"]["kl_nats"] < rows["bfloat16"]["kl_nats"] < rows["float8_e4m3fn"]["kl_nats"]
    assert "float8_e4m3fn" in (tmp_path / "storage-precision-digits.md").read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert storage_precision.main(["--run", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "is no finished quickstart run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
