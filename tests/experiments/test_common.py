"""Settings, run folders and measurements that every experiment shares."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments.common import (
    RunDir,
    SettingsError,
    differences,
    fixed,
    format_table,
    parse_settings,
    peak_memory,
    require_at_least,
    require_fraction,
    require_positive,
    resolve_device,
    setting,
    write_atomically,
)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Toy:
    dir: str = setting("runs/toy", "folder", free=True)
    rank: int = setting(20, "rank", alias="--r")
    rate: float | None = setting(None, "rate", kind=float)
    resume: bool = setting(False, "go on", free=True)


def parse(*argv: str) -> Toy:
    return parse_settings(Toy, argv, prog="toy", description="A toy.")


def test_flags_come_from_the_dataclass() -> None:
    assert parse() == Toy()
    assert parse("--r", "3", "--rate", "0.5", "--resume", "--dir", "x") == Toy("x", 3, 0.5, True)


@pytest.mark.parametrize("argv", [["--rank", "two"], ["--unknown"], ["--ran", "3"]])
def test_a_bad_command_line_is_one_line_and_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        parse(*argv)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("toy: error: ") and captured.err.count("\n") == 1


def test_help_names_every_flag_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        parse("--help")
    text = capsys.readouterr().out
    assert "--rank RANK, --r RANK" in text and "(default: 20)" in text and "(default: None)" not in text


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_atomically(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def begun(settings: Toy, outputs: list[str]) -> RunDir:
    run = RunDir(settings, outputs, CPU)
    run.begin()
    return run


def folder_state(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_resume_with_other_settings_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    run = begun(Toy(str(tmp_path / "run")), ["log.jsonl"])
    run.log(phase="a", epoch=1)
    before = folder_state(run.path)
    with pytest.raises(SettingsError, match="rank was 20, now 5; rate was None, now 0.1"):
        RunDir(Toy(str(run.path), rank=5, rate=0.1, resume=True), ["log.jsonl"], CPU)
    assert folder_state(run.path) == before
    again = begun(Toy(str(run.path), resume=True), ["log.jsonl"])
    assert again.read_log() == [{"phase": "a", "epoch": 1}]


def test_a_fresh_run_replaces_the_files_of_the_last_one(tmp_path: Path) -> None:
    run = begun(Toy(str(tmp_path / "run")), ["log.jsonl", "results.json"])
    run.log(phase="a", epoch=1)
    run.write_json("results.json", {})
    again = begun(Toy(str(run.path), rank=2), ["log.jsonl", "results.json"])
    assert again.read_log() == [] and not (run.path / "results.json").exists()
    assert json.loads((run.path / "settings.json").read_text())["rank"] == 2


def test_folders_that_are_not_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no run in"):
        RunDir(Toy(str(tmp_path / "none"), resume=True), [], CPU)
    assert not (tmp_path / "none").exists()
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(SettingsError, match="holds files that are not a run's"):
        RunDir(Toy(str(tmp_path)), ["thesis.tex"], CPU)
    assert folder_state(tmp_path) == {"thesis.tex": b"precious"}
    with pytest.raises(SettingsError, match="is not a folder"):
        RunDir(Toy(str(tmp_path / "thesis.tex")), [], CPU)
    with pytest.raises(SettingsError, match="thesis.tex/run: Not a directory"):
        begun(Toy(str(tmp_path / "thesis.tex" / "run")), [])


def test_a_run_only_looks_until_it_begins(tmp_path: Path) -> None:
    run = RunDir(Toy(str(tmp_path / "run")), [], CPU)
    assert not run.path.exists() and not run.resuming
    run.begin()
    assert set(folder_state(run.path)) == {"settings.json", "environment.json", "command.sh"}
    assert RunDir(Toy(str(run.path)), [], CPU, resuming=True).resuming


def test_what_a_killed_process_left_is_removed_and_is_no_obstacle(tmp_path: Path) -> None:
    names = (".settings.json.tmp", ".checkpoint.safetensors.7-ab.partial", ".training.tmp.png")
    for name in names:
        (tmp_path / name).write_text("half")
    begun(Toy(str(tmp_path)), [])
    assert not {*names} & set(folder_state(tmp_path))


def test_outputs_may_be_patterns(tmp_path: Path) -> None:
    run = begun(Toy(str(tmp_path / "run")), ["checkpoint*.safetensors"])
    for name in ("checkpoint.safetensors", "checkpoint-4.safetensors", "other.safetensors"):
        (run.path / name).write_text("")
    begun(Toy(str(run.path)), ["checkpoint*.safetensors"])
    assert "other.safetensors" in folder_state(run.path) and "checkpoint-4.safetensors" not in folder_state(run.path)


def test_fixed_settings_are_compared_as_json_gives_them_back() -> None:
    assert fixed(Toy(rank=3, dir="x")) == {"rank": 3, "rate": None}
    assert differences(Toy(rank=3), {"rank": 3, "rate": None, "dir": "elsewhere"}) == ""
    assert differences(Toy(rank=3, rate=0.5), {"rank": 4}) == "rank was 4, now 3; rate was None, now 0.5"


def test_the_log_survives_a_half_written_line(tmp_path: Path) -> None:
    run = begun(Toy(str(tmp_path / "run")), [])
    run.log(epoch=1)
    run.log(epoch=2)
    with open(run.path / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "lo')
    assert run.read_log() == [{"epoch": 1}, {"epoch": 2}]
    run.write_log(record for record in run.read_log() if record["epoch"] < 2)
    run.log(epoch=5)
    assert (run.path / "log.jsonl").read_text() == '{"epoch": 1}\n{"epoch": 5}\n'


def test_environment_names_what_numbers_depend_on(tmp_path: Path) -> None:
    run = begun(Toy(str(tmp_path / "run")), [])
    found = json.loads((run.path / "environment.json").read_text())
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"]
    assert found["device"] == "cpu" and found["processor"] and found["threads"] == torch.get_num_threads()


def test_peak_memory_counts_what_is_held_at_once() -> None:
    mib = 2**20

    def work() -> torch.Tensor:
        a = torch.ones(4 * mib, dtype=torch.uint8)
        del a
        b = torch.ones(2 * mib, dtype=torch.uint8)
        return b + 1  # b and the sum are alive together, a is not

    result, peak = peak_memory(work, CPU)
    assert result.numel() == 2 * mib
    assert 4 * mib <= peak < 4 * mib + 1024  # a few bytes go to scalars


def test_tables_align_on_the_right() -> None:
    table = format_table(["method", "NLL"], [["SGD", "0.1"], ["SWAG-Diag", "10.25"]])
    assert table == "method       NLL\n---------  -----\nSGD          0.1\nSWAG-Diag  10.25"


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=f"--device {name}: "):
        resolve_device(name)


def test_settings_out_of_their_range_are_named() -> None:
    settings = SimpleNamespace(lr=0.0, limit=None, rate=math.inf, bad=math.nan, one=1.0)
    require_at_least(settings, dict(lr=0, limit=3, one=1))
    require_positive(settings, ("one", "limit"))
    require_fraction(settings, ("lr", "limit"))
    for refuse, message in (
        (lambda: require_at_least(settings, dict(one=0, lr=1)), "--lr must be at least 1; got 0.0"),
        (lambda: require_at_least(settings, dict(bad=0)), "--bad must be at least 0; got nan"),
        (lambda: require_at_least(settings, dict(rate=1)), "--rate must be at least 1; got inf"),
        (lambda: require_positive(settings, ("one", "lr")), "--lr must be positive; got 0.0"),
        (lambda: require_positive(settings, ("bad",)), "--bad must be positive; got nan"),
        (lambda: require_positive(settings, ("rate",)), "--rate must be positive; got inf"),
        (lambda: require_fraction(settings, ("lr", "one")), "--one must be at least 0 and less than 1; got 1.0"),
        (lambda: require_fraction(settings, ("bad",)), "--bad must be at least 0 and less than 1; got nan"),
    ):
        with pytest.raises(SettingsError, match=message):
            refuse()
