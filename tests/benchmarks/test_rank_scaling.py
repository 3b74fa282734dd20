"""The real script at a tiny size: its record, tables and plots, resuming, and the plan of a full run."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peers, rank_scaling
from benchmarks.measure import REGISTRY, History
from benchmarks.problems import Size
from benchmarks.suite import FORMAT, VERSION, Settings, plan
from benchmarks.targets import TARGETS, judge, state_slope

ARGUMENTS = ["--dims", "9000", "--ranks", "2", "6", "--models", "tiny", "--quick", "--threads", "1"]
FEW = ["sample", "solve_new", "marginal", "collect", "state"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything a run writes, for a few operations with their memory."""
    out = tmp_path_factory.mktemp("results")
    assert rank_scaling.main([*ARGUMENTS, "--out", str(out), "--label", "test", "--operations", *FEW]) == 0
    return out


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of all operations without memory, which takes a process each."""
    out = tmp_path_factory.mktemp("every") / "every.json"
    assert rank_scaling.main([*ARGUMENTS, "--out", str(out), "--no-memory", "--no-plots", "--dims", "3000"]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("*-test-quick.json")
    found: dict[str, Any] = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return found


def test_record_has_the_schema(record: dict[str, Any]) -> None:
    assert (record["format"], record["version"], record["finished"]) == (FORMAT, VERSION, True)
    assert {"clock", "cpu", "cores", "memory_bytes", "threads", "versions", "device"} <= set(record["environment"])
    assert {"read_bytes_per_s", "copy_bytes_per_s", "seconds_per_normal"} == set(record["machine_floors"])
    assert all(value > 0 for value in record["machine_floors"].values())
    for cell in record["cells"]:
        assert {"key", "operation", "title", "numel", "rank", "dtype", "device", "rows", "floor"} <= set(cell)
        assert cell["floor"]["predicted_s"] > 0
        for row in cell["rows"]:
            assert row["status"] in {"ok", "once", "wrong", "failed", "skipped"}
            assert bool(row["times_s"]) == (row["status"] in {"ok", "once"} and cell["operation"] != "state")
            assert row["status"] in {"ok", "once"} or row["reason"]
            for ratio in row.get("ratios", {}).values():
                assert ratio["median"] > 0
                assert ratio["ci95"] is None or ratio["ci95"][0] <= ratio["median"] <= ratio["ci95"][1]


def test_every_operation_is_measured_and_ours_is_right(every: dict[str, Any]) -> None:
    assert {cell["operation"] for cell in every["cells"]} == set(REGISTRY) - {"state"}  # its memory alone is measured
    for cell in every["cells"]:
        ours = next(row for row in cell["rows"] if row["contender"] == peers.OURS)
        assert ours["status"] == "ok", f"{cell['key']}: {ours['reason']}"
        hand = [row for row in cell["rows"] if row["contender"] == peers.HAND]
        assert all(row["status"] == "ok" for row in hand), cell["key"]


def test_memory_estimates_hold(record: dict[str, Any]) -> None:
    found = [row["estimate"]["within"] for cell in record["cells"] for row in cell["rows"] if "estimate" in row]
    assert len(found) == len(record["cells"]) and all(found)


def test_tables_and_plots_are_written(folder: Path) -> None:
    (document,) = folder.glob("*.md")
    text = document.read_text()
    assert "## Targets" in text and "## Left out" in text and "one sample" in text
    plots = sorted(folder.glob("*.png"))
    assert [p.stem.split("-quick-")[1] for p in plots] == [
        "memory-against-rank",
        "ratios-9000",
        "time-against-rank-9000",
    ]
    assert all(plot.read_bytes().startswith(b"\x89PNG") and plot.name in text for plot in plots)


def test_resume_measures_nothing_twice(folder: Path, record: dict[str, Any], tmp_path: Path) -> None:
    half = {**record, "cells": record["cells"][:-1], "finished": False}
    out = tmp_path / "half.json"
    out.write_text(json.dumps(half))
    assert rank_scaling.main([*ARGUMENTS, "--out", str(out), "--operations", *FEW, "--resume", "--no-plots"]) == 0
    again = json.loads(out.read_text())
    assert [c["key"] for c in again["cells"]] == [c["key"] for c in record["cells"]]
    assert again["cells"][:-1] == record["cells"][:-1] and again["finished"]
    assert not list(tmp_path.glob(".*partial"))


def test_time_limit_lists_what_was_not_measured(tmp_path: Path) -> None:
    out = tmp_path / "late.json"
    assert rank_scaling.main([*ARGUMENTS, "--out", str(out), "--max-minutes", "0", "--no-plots"]) == 0
    late = json.loads(out.read_text())
    assert late["cells"] == []
    assert sum("the time limit was reached" in line for line in late["left_out"]) == len(plan(_settings())[0])


def _settings() -> Settings:
    return rank_scaling._settings(rank_scaling.parser().parse_args(ARGUMENTS))


def test_full_plan_covers_what_it_must_and_says_what_it_leaves_out() -> None:
    cells, left_out = plan(Settings())
    keys = {cell.key for cell in cells}
    assert len(keys) == len(cells)
    for numel in (100_000, 1_000_000, 10_000_000):
        for name, operation in REGISTRY.items():
            if operation.problem.__name__ == "GaussianProblem":
                assert f"{name}/{numel}/20/float32/cpu" in keys
        assert {f"sample/{numel}/{rank}/float32/cpu" for rank in (1, 5, 10, 20, 50, 100)} <= keys
    assert "sample/36000000/20/float32/cpu" in keys
    assert {"collect/36M/20/float32/cpu", "collect/330-tensors/20/float32/cpu"} <= keys
    assert any("36,000,000" in line for line in left_out) and any("ranks other than 20" in line for line in left_out)


def test_unknown_operation_and_bad_rank_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert rank_scaling.main(["--operations", "sampel"]) == 2
    assert "unknown operations sampel" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        rank_scaling.main(["--ranks", "1.5"])
    assert "expected a whole number" in capsys.readouterr().err


def test_prediction_scales_with_size_and_rank() -> None:
    history = History()
    assert history.predict("sample", "x", Size(10, 1)) == (None, None)
    history.add("sample", "x", Size(1000, 10), 2.0, 500)
    history.add("sample", "x", Size(1000, 10), 3.0, None)
    assert history.predict("sample", "x", Size(10_000, 20)) == (40.0, 10_000.0)
    assert history.predict("sample", "y", Size(10_000, 20)) == (None, None)


def fake_record(**row: Any) -> dict[str, Any]:
    cell = {"operation": "sample", "title": "one sample", "numel": 1_000_000, "model": None, "rank": 20}
    cell |= {"dk_bytes": 80_000_000, "result_bytes": 4_000_000}
    base = {"contender": peers.OURS, "memory": None, "errors": {}, **row}
    return {"settings": {"main_rank": 20}, "cells": [{**cell, "rows": [base]}]}


def test_targets_are_judged_by_their_limits() -> None:
    floor = next(t for t in TARGETS if t.operation == "sample" and t.against).against
    ratios = {floor: {"median": 1.3, "ci95": [1.25, 1.35]}}
    memory = {"status": "ok", "above_inputs": 8_000_000, "extra_bytes": 4_000_000, "extra_dk": 0.05}
    time, _, extra = judge(fake_record(ratios=ratios, memory=memory))
    assert (time["value"], time["limit"], time["met"]) == (1.3, 1.2, False)
    assert (extra["value"], extra["limit"], extra["met"]) == (0.05, 0.06, True)
    assert {t["met"] for t in judge(fake_record())} == {None}


def test_state_slope_is_fitted_over_large_rows() -> None:
    def state(rank: int, factor: float) -> dict[str, Any]:
        memory = {"status": "ok", "above_inputs": int(factor * 4_000_000 * (rank + 3))}
        row = {"contender": peers.OURS, "memory": memory}
        return {"operation": "state", "rank": rank, "dk_bytes": rank * 4_000_000, "rows": [row]}

    small = state(1, 3.0)  # under 256 MB: its extra would spoil the fit
    good = state_slope({"cells": [small, state(100, 1.0), state(200, 1.0)]})
    assert good is not None and good["slope"] == pytest.approx(1.0) and good["met"]
    bad = state_slope({"cells": [state(100, 1.0), state(200, 1.05)]})
    assert bad is not None and not bad["met"]
    assert state_slope({"cells": [small]}) is None
