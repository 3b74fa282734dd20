"""The comparison of every method, end to end at a tiny size: what it writes, what it refuses, resume, fairness."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import lowrank_bdl as lb
from experiments import train_report, uncertainty, uncertainty_report, uncertainty_sources
from experiments.datasets import Datasets, Split, load_dataset
from experiments.train_setup import bn_images
from experiments.uncertainty_members import RunName, in_order, member_settings
from experiments.uncertainty_methods import CONTROLS, METHODS, runs_needed
from experiments.uncertainty_settings import Settings, check

PROG = "python -m experiments.uncertainty"
TINY = (
    "--dataset digits --model SmallConvNet --train_limit 96 --batch_size 16 --epochs 4 --lr_init 0.05 --swa_start 1 "
    "--swa_lr 0.02 --max_num_models 3 --seeds 1 --members 2 --fge_cycle 2 --chain_epochs 2 --chain_snapshots 2 "
    "--vi_epochs 1 --temperature 1,0.1 --num_samples 4 --tune_samples 2 --ood noise --ood_limit 60 --eval_limit 80"
).split()
CHOSEN = {
    "scale": ("SWAG-Diag", "SWAG", "SWAG-block", "MultiSWAG", "SWAG-Dropout"), "noise_std": ("HomoNoise",),
    "noise_fraction": ("NaiveNoise",), "prior_precision": ("Laplace-KFAC", "Laplace-Diag"),
}  # fmt: skip


def run(path: Path, *more: str) -> int:
    return uncertainty.main(["--dir", str(path), *TINY, *more])


@pytest.fixture(scope="module", autouse=True)
def _no_figures_of_single_runs() -> Iterator[None]:
    """They are `experiments.train`'s, whose tests look at them, and take longer than such a run itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_report, "draw_figures", lambda *_: None)
        yield


@pytest.fixture
def _without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time of an evaluation this small."""
    monkeypatch.setattr(uncertainty_report, "draw", lambda *_: [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of all methods; what it printed lies beside its folder."""
    path = tmp_path_factory.mktemp("uncertainty") / "run"
    with redirect_stdout(StringIO()) as printed:
        assert run(path, "--save_predictions") == 0
    (path.parent / "stdout").write_text(printed.getvalue())
    return path


def results(path: Path) -> dict[str, Any]:
    """Everything that must not depend on how long it took, or on whether it was interrupted."""
    found = json.loads((path / "results.json").read_text())
    for own in found["cells"].values():
        for cell in own:
            del cell["seconds"]
    del found["figures"]
    for name in ("dir", "resume", "save_predictions", "methods", "members_from", "seeds"):
        del found["settings"][name]
    return found


def cell(path: Path, method: str, seed: int = 1) -> dict[str, Any]:
    return json.loads((path / "cells" / f"{method}-{seed}.json").read_text())


def refused(path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit status 2, and no file touched."""
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} if path.exists() else None
    capsys.readouterr()
    try:
        status = uncertainty.main(["--dir", str(path), *argv])
    except SystemExit as stop:  # from the parser
        status = stop.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert status == 2 and captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith(f"{PROG}: error: ") and message in captured.err, captured.err
    after = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} if path.exists() else None
    assert after == before


# ---- what a comparison writes ----------------------------------------------------------------------------------------


def test_it_writes_what_it_says(finished: Path) -> None:
    own = {str(file.relative_to(finished)) for file in finished.rglob("*") if "members" not in file.parts}
    cells = {f"cells/{method}-1.{suffix}" for method in METHODS for suffix in ("json", "npz")}
    figures = {"reliability.png", "metrics.png", "entropy-noise.png"}
    records = {"settings.json", "environment.json", "command.sh", "log.jsonl", "uncertainty.md", "results.json"}
    assert own == cells | figures | records | {"cells"}
    for name in figures:
        picture = imread(finished / name)
        assert picture.shape[0] >= 400 and picture.shape[1] >= 600 and picture[..., :3].std() > 0.02
    newest = max(finished.rglob("*"), key=lambda file: file.stat().st_mtime_ns)
    assert newest.name == "results.json"
    assert (finished.parent / "stdout").read_text().startswith((finished / "uncertainty.md").read_text())


def test_the_table_has_every_method_and_no_empty_cell(finished: Path) -> None:
    lines = (finished / "uncertainty.md").read_text().splitlines()
    tables = [[entry.strip() for entry in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    head, _, *body = tables[: len(METHODS) + 2]
    assert [row[0] for row in body] == list(METHODS)
    assert head[:3] == ["method", "epochs", "networks"] and head[-1] == "AUROC % noise"
    assert all(len(row) == len(head) and all(row) and "nan" not in "".join(row) for row in body)
    assert len(tables) == 3 * (len(METHODS) + 2)


def test_budgets_are_stated(finished: Path) -> None:
    """4 epochs a run; 2 members; the chains and MFVI add theirs to the run they start from."""
    epochs = {method: own[0]["epochs"] for method, own in results(finished)["cells"].items()}
    others = {"MultiSWA": 8, "MultiSWAG": 8, "DeepEnsemble": 8, "SGLD": 6, "SGHMC": 6, "MFVI": 5}
    assert epochs == {method: others.get(method, 4) for method in METHODS}
    networks = {method: own[0]["networks"] for method, own in results(finished)["cells"].items()}
    single = {"SGD": 1, "SWA": 1, "Temperature": 1, "SWA-Temperature": 1}
    kept = {"MultiSWA": 2, "DeepEnsemble": 2, "FGE": 2, "SGD-Iterates": 3, "SGLD": 2, "SGHMC": 2}
    assert networks == {method: {**single, **kept}.get(method, 4) for method in METHODS}


def test_every_method_is_fitted_separately(finished: Path) -> None:
    nll = {method: own[0]["metrics"]["test"]["nll"] for method, own in results(finished)["cells"].items()}
    assert all(math.isfinite(value) and value > 0 for value in nll.values())
    assert len({round(value, 6) for value in nll.values()}) == len(METHODS), nll


def test_levels_are_the_best_of_those_tried_on_the_validation_images(finished: Path) -> None:
    for level, methods in CHOSEN.items():
        for method in methods:
            found = cell(finished, method)
            tried = dict(map(tuple, found["tried"]))
            # a step of the walk that gains less than 1e-5 nats is not taken
            assert tried[found["levels"][level]] <= min(tried.values()) + 1e-5, method
            assert 3 <= len(tried) <= 10
    for method in ("Temperature", "SWA-Temperature"):
        assert cell(finished, method)["levels"]["temperature"] > 0
    for method in ("SGLD", "SGHMC", "MFVI"):
        found = cell(finished, method)
        tried = dict(map(tuple, found["tried"]))
        assert set(tried) == {1.0, 0.1} and tried[found["levels"]["temperature"]] == min(tried.values()), method
    for method in ("SGD", "SWA", "Dropout"):
        assert cell(finished, method)["levels"] == {} and cell(finished, method)["tried"] == []


def test_a_temperature_changes_confidence_and_nothing_else(finished: Path) -> None:
    for scaled, plain in (("Temperature", "SGD"), ("SWA-Temperature", "SWA")):
        with np.load(finished / f"cells/{scaled}-1.npz") as own, np.load(finished / f"cells/{plain}-1.npz") as other:
            temperature = cell(finished, scaled)["levels"]["temperature"]
            expected = lb.TemperatureScaling(temperature)(torch.from_numpy(other["test/probabilities"]))
            np.testing.assert_allclose(own["test/probabilities"], expected.numpy(), rtol=1e-5, atol=1e-7)
            assert own["noise/entropy"].shape == (60,) and "noise/targets" not in own
        after, before = cell(finished, scaled)["metrics"], cell(finished, plain)["metrics"]
        assert after["test"]["accuracy"] == before["test"]["accuracy"]
        assert after["validation"]["nll"] < before["validation"]["nll"]


def test_predictions_on_disk_are_those_of_the_table(finished: Path) -> None:
    for method in ("SGD", "SWAG", "MFVI"):
        found = cell(finished, method)
        with np.load(finished / f"cells/{method}-1.npz") as arrays:
            probabilities, targets = (torch.from_numpy(arrays[f"test/{key}"]) for key in ("probabilities", "targets"))
            inside, outside = (torch.from_numpy(arrays[f"{name}/entropy"]) for name in ("test", "noise"))
        assert found["metrics"]["test"]["nll"] == pytest.approx(lb.metrics.nll(probabilities, targets), rel=1e-4)
        assert found["metrics"]["test"]["ece"] == pytest.approx(lb.metrics.ece(probabilities, targets), rel=1e-9)
        assert found["foreign"]["noise"]["auroc"] == lb.metrics.auroc(inside, outside)
        assert sum(found["entropy"]["test"]) == 80 and sum(found["entropy"]["noise"]) == 60
        assert sum(found["reliability"]["count"]) == 80


def test_sgd_is_the_network_that_was_trained(finished: Path) -> None:
    """By hand: the member's last weights, batch norm recalibrated, accuracy on the test images."""
    settings = check(Settings(dir=str(finished), dataset="digits", model="SmallConvNet", train_limit=96))
    data = uncertainty_sources.load_data(settings, torch.device("cpu"))
    run = uncertainty_sources.TrainedRun(finished / "members/sgd-seed1-member0", data, torch.device("cpu"))
    lb.recalibrate_batch_norm_(run.model, bn_images(run.settings, data).batches(500))
    images = data.test.first(80)
    with torch.no_grad():
        probabilities = run.model.eval()(images.inputs).softmax(-1)
    assert cell(finished, "SGD")["metrics"]["test"]["accuracy"] == lb.metrics.accuracy(probabilities, images.targets)


# ---- fairness --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_without_figures")
def test_nothing_is_chosen_on_the_test_images(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other labels of the test images every level and temperature is the same, and only the report differs."""
    load = uncertainty_sources.load_data

    def relabelled(*arguments: Any) -> Datasets:
        data = load(*arguments)
        return dataclasses.replace(data, test=Split(data.test.inputs, (data.test.targets + 1) % 10))

    monkeypatch.setattr(uncertainty_sources, "load_data", relabelled)
    methods = ("SWAG", "Temperature", "Laplace-Diag", *CONTROLS)
    assert run(tmp_path / "run", "--methods", ",".join(methods), "--members_from", str(finished)) == 0
    for method in methods:
        found, expected = cell(tmp_path / "run", method), cell(finished, method)
        assert found["levels"] == expected["levels"] and found["tried"] == expected["tried"]
        assert found["metrics"]["validation"] == expected["metrics"]["validation"]
        assert found["metrics"]["test"]["nll"] > expected["metrics"]["test"]["nll"]


@pytest.mark.usefixtures("_without_figures")
def test_given_levels_are_used_and_recorded(finished: Path, tmp_path: Path) -> None:
    given = "--scale 0.5 --noise_std 0.01 --noise_fraction 0.1 --prior_precision 100".split()
    methods = "SWAG,Laplace-Diag"
    assert run(tmp_path / "run", "--methods", methods, *given, "--members_from", str(finished)) == 0
    found = results(tmp_path / "run")["cells"]
    assert list(found) == sorted(["SWAG", "Laplace-Diag", *CONTROLS])  # the controls are in every table
    assert [own[0]["tried"] for own in found.values()] == [[]] * 4
    assert found["SWAG"][0]["levels"] == {"scale": 0.5} and found["NaiveNoise"][0]["levels"] == {"noise_fraction": 0.1}
    assert found["Laplace-Diag"][0]["levels"]["prior_precision"] == 100.0


def test_no_two_seeds_share_a_network() -> None:
    settings = check(Settings(dir="d", dataset="digits", model="SmallConvNet", members=3))
    names = in_order(runs_needed(settings, list(METHODS), [1, 2]))
    kinds = {name.kind for name in names}
    assert kinds == {"sgd", "swag", "fge", "drop", "swagdrop", "sgld", "sghmc", "mfvi"}
    seeds = [(name.kind, name.temperature, member_settings(settings, name, Path("d"), 200).seed) for name in names]
    assert len(set(seeds)) == len(seeds) == 2 * (3 + 3 + 3 + 3 * 3)
    assert [name.member for name in names if name.kind == "swag" and name.seed == 2] == [0, 1, 2]


def test_a_run_comes_after_the_one_it_starts_from() -> None:
    assert in_order([RunName("mfvi", 1), RunName("swag", 1)]) == [RunName("swag", 1), RunName("mfvi", 1)]


def test_the_prior_is_the_same_for_every_bayesian_method() -> None:
    settings = check(Settings(dir="d", dataset="digits", model="SmallConvNet", wd=1e-3))
    own = member_settings(settings, RunName("mfvi", 1), Path("d"), 200)
    assert own.prior_std == pytest.approx((200 * 1e-3) ** -0.5)
    assert member_settings(settings, RunName("sgld", 1), Path("d"), 200).wd == 1e-3


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_without_figures")
def test_a_resume_makes_what_is_missing_and_ends_the_same(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished, path, ignore=shutil.ignore_patterns("members"))
    kept = cell(path, "SWA")["seconds"]
    for name in ("cells/SWAG-1.json", "cells/NaiveNoise-1.npz", "results.json"):
        (path / name).unlink()
    resumed = ["--resume", "--save_predictions", "--members_from", str(finished)]
    assert run(path, *resumed) == 0
    assert results(path) == results(finished)
    assert cell(path, "SWA")["seconds"] == kept


@pytest.mark.usefixtures("_without_figures")
def test_more_seeds_can_be_added(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    assert run(path, "--resume", "--seeds", "2", "--methods", "SGD,SWA") == 0
    found = results(path)["methods"]["SGD"]["nll"]
    assert len(found["values"]) == 2 and found["values"][0] == cell(finished, "SGD")["metrics"]["test"]["nll"]
    assert found["spread"] == pytest.approx(abs(found["values"][0] - found["values"][1]) / 2**0.5)
    assert (path / "members/swag-seed2-member0/results.json").exists()
    assert not (path / "members/swag-seed2-member1").exists()  # of no method that was asked for
    assert "Mean ± standard deviation over 2 seeds" in (path / "uncertainty.md").read_text()


def test_a_resume_with_other_settings_or_damaged_cells_changes_nothing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished, path, ignore=shutil.ignore_patterns("members"))
    resumed = [*TINY, "--resume", "--members_from", str(finished)]
    refused(path, [*resumed, "--num_samples", "5"], "settings differ from those of", capsys)
    file = path / "cells/SWA-1.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"recipe": found["recipe"] | {"wd": 1.0}}))
    refused(path, resumed, "SWA-1.json is of another recipe; delete it to make it again", capsys)
    file.write_text('{"method": ')
    refused(path, resumed, "cannot read", capsys)


def test_members_of_another_recipe_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [*TINY, "--swa_lr", "0.01", "--methods", "SWAG"]
    message = "is a run with other settings: swa_lr was 0.02, now 0.01; choose another --dir, or delete it"
    refused(finished, other, message, capsys)
    refused(
        tmp_path / "new", [*TINY, "--members_from", str(tmp_path)], "there is no finished sgd-seed1-member0", capsys
    )


# ---- finished runs ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_without_figures")
def test_a_finished_run_is_evaluated_with_what_it_has(finished: Path, tmp_path: Path) -> None:
    member = finished / "members/swag-seed1-member0"
    argv = "--num_samples 4 --tune_samples 2 --ood none --eval_limit 80".split()
    assert uncertainty.main(["--dir", str(tmp_path / "run"), "--run", str(member), *argv]) == 0
    found = results(tmp_path / "run")
    assert set(found["cells"]) == {
        "SGD", "SWA", "SWAG-Diag", "SWAG", "SWAG-block", "SGD-Iterates", "Temperature", "SWA-Temperature",
        "Laplace-KFAC", "Laplace-Diag", *CONTROLS,
    }  # fmt: skip
    assert found["cells"]["SWA"][0]["metrics"] == cell(finished, "SWA")["metrics"]
    assert found["cells"]["SGD"][0]["metrics"] != cell(finished, "SGD")["metrics"]  # of the averaged run, not its own
    assert (
        f"Evaluated from finished runs of experiments.train: {member}" in (tmp_path / "run/uncertainty.md").read_text()
    )


@pytest.mark.usefixtures("_without_figures")
def test_several_finished_runs_are_an_ensemble(finished: Path, tmp_path: Path) -> None:
    members = ",".join(str(finished / f"members/swag-seed1-member{number}") for number in (0, 1))
    argv = "--methods MultiSWA,MultiSWAG --num_samples 4 --tune_samples 2 --ood none --eval_limit 80".split()
    assert uncertainty.main(["--dir", str(tmp_path / "run"), "--run", members, *argv]) == 0
    for method in ("MultiSWA", "MultiSWAG"):
        own = results(tmp_path / "run")["cells"][method][0]
        assert own["metrics"] == cell(finished, method)["metrics"] and own["epochs"] == 8


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods", "MultiSWAG"], "--methods: MultiSWAG needs at least two runs, which"),
        (["--methods", "SGLD"], "--methods: SGLD needs a run with --optimizer SGLD, which"),
        (["--methods", "Dropout"], "--methods: Dropout needs a network with dropout, which"),
        (["--methods", "FGE"], "--methods: FGE needs a cyclical schedule, which"),
        (["--dataset", "MNIST"], "--dataset and --run exclude each other: the run has its own"),
        (["--num_samples", "0"], "--num_samples must be at least 1; got 0"),
    ],
)
def test_what_a_finished_run_has_not_is_refused(
    argv: list[str], message: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    member = finished / "members/swag-seed1-member0"
    refused(tmp_path / "run", ["--run", str(member), *argv], message, capsys)


def damaged(member: Path, path: Path, name: str, content: bytes | None) -> Path:
    """A copy of a run with one file replaced, or left out."""
    shutil.copytree(member, path)
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("file", "replaced_by", "message"),
    [
        ("settings.json", None, "there is no run of experiments.train in"),
        ("settings.json", b"{", "cannot read"),
        ("settings.json", b'{"model": "LeNet5", "speed": 3}', "is not of a run of experiments.train"),
        ("results.json", None, "is not finished: there is no results.json; go on with it first"),
        ("checkpoint.safetensors", None, "there is no checkpoint.safetensors"),
        ("checkpoint.safetensors", b"short", "checkpoint.safetensors"),
        ("checkpoint.safetensors", "of another network", "is of another training run: the model does not fit"),
        ("snapshots.safetensors", None, "SGD-Iterates needs snapshots.safetensors"),
    ],
)
def test_damaged_runs_are_refused(
    file: str,
    replaced_by: bytes | str | None,
    message: str,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = replaced_by
    if isinstance(replaced_by, str):
        content = other_network(finished, tmp_path, file)
    path = damaged(finished / "members/swag-seed1-member0", tmp_path / "copy", file, content)
    methods = ["--methods", "SGD-Iterates", "--ood", "none"]
    refused(tmp_path / "run", ["--run", str(path), *methods], message, capsys)


def other_network(finished: Path, tmp_path: Path, file: str) -> bytes:
    """The file that the same run of another network would have."""
    from experiments import train

    flags = json.loads((finished / "members/swag-seed1-member0/settings.json").read_text())
    settings = train.Settings(**{**flags, "dir": str(tmp_path / "other"), "model": "MLP", "epochs": 3, "resume": None})
    with redirect_stdout(StringIO()), torch.random.fork_rng():
        train.work(settings)
    return (tmp_path / "other" / file).read_bytes()


def test_a_posterior_of_another_network_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = other_network(finished, tmp_path, "snapshots.safetensors")
    path = damaged(finished / "members/swag-seed1-member0", tmp_path / "copy", "snapshots.safetensors", content)
    given = "--methods SGD-Iterates --ood none --noise_std 0.01 --noise_fraction 0.1".split()
    refused(tmp_path / "run", ["--run", str(path), *given], "is of other parameters", capsys)


def test_runs_of_different_data_are_no_ensemble(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = f"{finished}/members/swag-seed1-member0,{finished}/members/drop-seed1-member0"
    refused(tmp_path / "run", ["--run", runs], "is 'SmallConvNetDrop', and of", capsys)


@pytest.mark.usefixtures("_without_figures")
def test_a_run_that_trained_on_everything_has_nothing_to_choose_levels_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments import train

    recipe = "--dataset digits --model SmallConvNet --train_limit 48 --epochs 1 --num_samples 2 --use_test".split()
    with redirect_stdout(StringIO()):
        assert train.main(["--dir", str(tmp_path / "trained"), *recipe]) == 0
    own = ["--run", str(tmp_path / "trained"), "--ood", "none", "--num_samples", "2", "--eval_limit", "50"]
    refused(
        tmp_path / "run", own, "HomoNoise needs validation images (a run without --use_test) or --noise_std", capsys
    )
    given = ["--noise_std", "0.01", "--noise_fraction", "0.1"]
    assert uncertainty.main(["--dir", str(tmp_path / "run"), *own, *given]) == 0
    assert set(results(tmp_path / "run")["cells"]) == {"SGD", *CONTROLS}
    refused(tmp_path / "new", [*own, *given, "--methods", "Temperature"], "Temperature needs validation images", capsys)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods", "SWAGG"], "--methods: unknown method 'SWAGG'; known are SWAG, "),
        (["--methods", "SWA,SWA"], "--methods must name at least one method, and each once; got 'SWA,SWA'"),
        (["--methods", ""], "--methods must name at least one method, and each once; got ''"),
        (["--num_samples", "0"], "--num_samples must be at least 1; got 0"),
        (["--temperature", "0"], "--temperature must list positive numbers, each once; got '0'"),
        (["--temperature", "1,-1"], "--temperature must list positive numbers, each once; got '1,-1'"),
        (["--scale", "0"], "--scale must be positive; got 0.0"),
        (["--noise_fraction", "nan"], "--noise_fraction must be positive; got nan"),
        (["--prior_precision", "-3"], "--prior_precision must be positive; got -3.0"),
        (["--seeds", "0"], "--seeds must be at least 1; got 0"),
        (["--members", "1"], "--members must be at least 2; got 1"),
        (["--members", "101"], "--members must be at most 100; got 101"),
        (["--chain_burn_in", "2"], "--chain_burn_in must be less than --chain_epochs; got 2 and 2"),
        (["--swa_start", "9"], "--swa_start must be less than --epochs; got 9 and 4"),
        (["--fge_cycle", "3"], "--swa_c_epochs must be even for --schedule cyclical"),
        (["--lr_init", "0"], "--lr_init must be positive; got 0.0"),
        (["--dataset", "MNIST"], "--dataset MNIST needs --data_path"),
        (["--model", "LeNet6"], "--model LeNet6 is unknown; the closest known are LeNet5"),
        (["--model", "MobileNetV2"], "--dropout_model: there is no MobileNetV2Drop; name one with dropout, or leave"),
        (["--ood", "CIFAR10"], "--ood CIFAR10: --dataset CIFAR10 needs --data_path"),
        (["--ood", "cats"], "--ood cats: unknown data set 'cats'"),
        (["--resume"], "--resume: there is no run in"),
        (["--run", "nowhere", "--model", "LeNet5"], "--dataset and --run exclude each other"),
        (["--labels", "guessed"], "argument --labels: invalid choice: 'guessed'"),
        (["--device", "nonsense"], "--device nonsense: "),
    ],
)
def test_what_cannot_run_is_one_line_and_writes_nothing(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(tmp_path / "run", [*TINY, *argv], message, capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "LeNet5"], "--dataset is needed, unless --run names finished runs"),
        (["--dataset", "digits"], "--model is needed, unless --run names finished runs"),
        (["--run", "nowhere"], "there is no run of experiments.train in nowhere (settings.json is missing)"),
        (["--run", ","], "--run must name at least one folder; got ','"),
    ],
)
def test_what_is_missing_is_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(tmp_path / "run", argv, message, capsys)


def test_divergence_is_one_line_that_names_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", "--lr_init", "1e30", "--methods", "SGD") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"{PROG}: error: ") and "-seed1-member0: training diverged: " in error
    assert not (tmp_path / "run/results.json").exists()


def test_foreign_sets_of_split_classes_are_the_other_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    digits = load_dataset("digits", use_test=True)

    def load(name: str, *_: Any, **options: Any) -> Datasets:
        asked.append({"name": name, **options})
        return digits

    monkeypatch.setattr(uncertainty_sources, "load_dataset", load)
    data = dataclasses.replace(digits, name="CIFAR10", details={"split_classes": 0})
    settings = check(Settings(dir="d", dataset="CIFAR10", model="LeNet5", split_classes=0, ood="noise", ood_limit=7))
    found = uncertainty_sources.foreign_sets(settings, data, torch.device("cpu"))
    assert {name: len(images) for name, images in found.items()} == {"other-classes": 7, "noise": 7}
    assert asked[0]["name"] == "CIFAR10" and asked[0]["split_classes"] == 1
    assert uncertainty_sources.foreign_sets(dataclasses.replace(settings, ood="none"), data, torch.device("cpu")) == {}
