"""The script that writes corrupted test images, end to end on digits: what is in each file, resume, refusals."""

import json
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from experiments import corrupt as script
from experiments.corruptions import SEVERITIES, corrupt, file_name, generator_for, load_corrupted, names_for
from experiments.datasets import load_dataset
from experiments.datasets.loading import read_test_images
from tests.experiments.datasets.writers import write_cifar

ROOT = Path(__file__).parents[2]
TINY = ["--dataset", "digits", "--limit", "30"]


def run(path: Path, *more: str) -> int:
    return script.main(["--dir", str(path), *TINY, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; what it printed lies beside its folder."""
    path = tmp_path_factory.mktemp("corrupt") / "run"
    with redirect_stdout(StringIO()) as printed:
        assert run(path) == 0
    (path.parent / "stdout").write_text(printed.getvalue())
    return path


def clean_images(limit: int | None = 30) -> tuple[torch.Tensor, torch.Tensor]:
    pool = read_test_images("digits", limit=limit)
    return pool.images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous(), pool.targets


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_every_file_holds_one_severity_alone(finished: Path) -> None:
    """A published script never emptied its list: its file k held severities 1 to k."""
    images, labels = clean_images()
    files = {file.name for file in finished.glob("*.npz")}
    assert files == {file_name(name, severity) for name in names_for(1) for severity in SEVERITIES}
    for name in names_for(1):
        for severity in SEVERITIES:
            with np.load(finished / file_name(name, severity)) as file:
                assert file["data"].shape == (30, 8, 8, 1) and file["labels"].shape == (30,)
                expected = corrupt(images, name, severity, generator_for(0, name, severity))
                assert np.array_equal(file["data"], expected.numpy()), (name, severity)
                assert file["labels"].tolist() == labels.tolist()


def test_a_run_writes_what_it_says(finished: Path) -> None:
    written = set(contents(finished)) - {file.name for file in finished.glob("*.npz")}
    assert written == {
        "log.jsonl", "examples.png", "damage.png", "results.json", "settings.json", "environment.json", "command.sh",
    }  # fmt: skip
    assert imread(finished / "examples.png").shape[1] > 800 and imread(finished / "damage.png").shape[1] > 800
    found = json.loads((finished / "results.json").read_text())
    assert found["images"] == 30 and found["shape"] == [8, 8, 1] and len(found["files"]) == 5 * len(names_for(1))
    images, _ = clean_images()
    for entry in found["files"]:
        with np.load(finished / file_name(entry["corruption"], entry["severity"])) as file:
            change = np.abs(file["data"].astype(float) - images.numpy()).mean()
        assert entry["change"] == pytest.approx(change, rel=1e-12) and entry["images"] == 30
    lines = (finished.parent / "stdout").read_text().splitlines()
    assert lines[0] == "30 test images of digits; mean absolute change of a pixel at each severity, of 255"
    assert lines[2].split() == ["corruption", "1", "2", "3", "4", "5"]
    assert [line.split()[0] for line in lines[4 : 4 + len(names_for(1))]] == list(names_for(1))


def test_files_can_be_loaded_for_a_network(finished: Path) -> None:
    data = load_dataset("digits")
    found = load_corrupted(finished, "contrast", 5, data)
    assert found.shape == data.train.shape and len(found) == 30
    assert found.inputs.std() < 0.2 * data.train.inputs.std()


def test_files_depend_on_seed_corruption_and_severity_alone(finished: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "some", "--corruptions", "fog,shot_noise", "--severities", "4,2") == 0
    for key in (("fog", 2), ("fog", 4), ("shot_noise", 2), ("shot_noise", 4)):
        name = file_name(*key)
        assert (tmp_path / "some" / name).read_bytes() == (finished / name).read_bytes()
    assert len(list((tmp_path / "some").glob("*.npz"))) == 4
    assert run(tmp_path / "other", "--corruptions", "fog", "--severities", "2", "--seed", "1") == 0
    assert (tmp_path / "other" / "fog_2.npz").read_bytes() != (finished / "fog_2.npz").read_bytes()


def test_resume_keeps_what_is_there_and_adds_the_rest(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert run(path, "--corruptions", "fog", "--severities", "1,2") == 0
    times = {file.name: file.stat().st_mtime_ns for file in path.glob("*.npz")}
    (path / "fog_2.npz").unlink()
    assert run(path, "--corruptions", "fog,contrast", "--resume") == 0
    assert (path / "fog_1.npz").stat().st_mtime_ns == times["fog_1.npz"]
    for file in path.glob("*.npz"):
        assert file.read_bytes() == (finished / file.name).read_bytes()
    found = json.loads((path / "results.json").read_text())["files"]
    whole = json.loads((finished / "results.json").read_text())["files"]
    assert len(found) == 10 and all(entry in whole for entry in found)
    assert run(path, "--corruptions", "contrast") == 0  # a fresh run replaces the folder's files
    assert {file.name for file in path.glob("*.npz")} == {f"contrast_{s}.npz" for s in SEVERITIES}


def test_a_killed_run_goes_on_to_the_same_files(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "killed"
    command = [sys.executable, "-m", "experiments.corrupt", "--dir", str(path), *TINY]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(path.glob("*.npz"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (path / "results.json").exists()
    assert run(path, "--resume") == 0
    assert sorted(file.name for file in path.glob(".*")) == []
    for file in finished.glob("*.npz"):
        assert (path / file.name).read_bytes() == file.read_bytes()
    results = [json.loads((each / "results.json").read_text()) for each in (path, finished)]
    assert results[0]["files"] == results[1]["files"]


def test_colour_images_of_their_own_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = write_cifar(tmp_path, monkeypatch, "CIFAR10")["test"]
    argv = ["--dir", str(tmp_path / "run"), "--data_path", str(tmp_path), "--severities", "5"]
    assert script.main([*argv, "--corruptions", "saturate,pixelate"]) == 0
    with np.load(tmp_path / "run" / "saturate_5.npz") as file:
        assert file["data"].shape == (10, 32, 32, 3) and file["labels"].tolist() == labels.tolist()
        expected = corrupt(
            torch.from_numpy(images.transpose(0, 2, 3, 1).copy()), "saturate", 5, generator_for(0, "saturate", 5)
        )
        assert np.array_equal(file["data"], expected.numpy())


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--corruptions", "frost"], "--corruptions: unknown corruption 'frost'; known are gaussian_noise, "),
        (["--corruptions", "fog,fog"], "--corruptions must name each once; got 'fog,fog'"),
        (["--corruptions", "saturate"], "--corruptions: saturate needs colours; images of digits are grey"),
        (["--severities", "0"], "--severities must be some of 1 to 5, each once; got '0'"),
        (["--severities", "1,1"], "--severities must be some of 1 to 5, each once; got '1,1'"),
        (["--limit", "0"], "the number of images must be at least 1; got 0"),
        (["--example", "30"], "--example must be less than 30, the number of images; got 30"),
        (["--seed", "-1"], "--seed must be at least 0; got -1"),
        (["--dataset", "MNIST"], "--dataset MNIST needs --data_path, the folder that holds its files"),
        (["--dataset", "nothing"], "unknown data set 'nothing'; known are "),
        (["--resume"], "--resume: there is no run in"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = run(tmp_path / "run", *argv)
    except SystemExit as exit:
        status = exit.code  # type: ignore[assignment]
    error = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(error) == 1 and message in error[0]
    assert not (tmp_path / "run").exists()


def test_a_resume_that_does_not_fit_changes_nothing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    argv = ["--corruptions", "fog,contrast"]
    assert run(path, *argv) == 0

    def refused(message: str, *more: str) -> None:
        before = contents(path)
        capsys.readouterr()
        assert run(path, *argv, "--resume", *more) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and contents(path) == before

    refused("seed was 0, now 1", "--seed", "1")
    refused("limit was 30, now 20", "--limit", "20")
    (path / "fog_1.npz").write_bytes((path / "fog_1.npz").read_bytes()[:500])
    refused("fog_1.npz")
    np.savez(path / "fog_1.npz", data=np.zeros((3, 8, 8, 1), np.uint8), labels=np.zeros(3, np.uint8))
    refused("fog_1.npz is not of these images; delete it to make it again")


def test_what_does_not_fit_on_the_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    assert run(tmp_path / "run") == 2
    assert "0.000156 GB are needed, and 1e-06 GB are free" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
