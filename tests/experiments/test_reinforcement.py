"""Agents with averaged weights, end to end at a tiny size; what is averaged when; refusals."""

import json
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tqdm import tqdm

import lowrank_bdl as lb
from experiments import reinforcement
from experiments.common import SettingsError
from experiments.reinforcement import while_averaging
from experiments.reinforcement_settings import Settings, check

pytest.importorskip("stable_baselines3", reason='needs the extra "applications"')
agents = pytest.importorskip("experiments.reinforcement_agents", reason='needs the extra "applications"')

TINY = (
    "--timesteps 400 --n_envs 4 --width 8 --collections 5 --evaluations 4 --eval_episodes 4 --num_samples 2 "
    "--max_num_models 3 --seeds 2"
).split()
CPU = torch.device("cpu")


def run(path: Path, *more: str) -> int:
    return reinforcement.main(["--dir", str(path), *TINY, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished experiment; what it printed lies beside its folder."""
    path = tmp_path_factory.mktemp("reinforcement") / "run"
    with redirect_stdout(StringIO()) as printed:
        assert run(path) == 0
    (path.parent / "stdout").write_text(printed.getvalue())
    return path


def results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    return found


def tiny(**options: Any) -> Settings:
    values: dict[str, Any] = dict(
        dir="-", timesteps=400, n_envs=4, width=8, collections=5, evaluations=4, eval_episodes=4, num_samples=2
    )
    return check(Settings(**(values | options)))


def test_a_run_writes_what_it_says(finished: Path) -> None:
    names = {str(file.relative_to(finished)) for file in finished.rglob("*") if file.is_file()}
    assert names == {
        "cells/seed-0.json", "cells/seed-1.json", "log.jsonl", "methods.png", "curves.png", "table.txt",
        "results.json", "settings.json", "environment.json", "command.sh",
    }  # fmt: skip
    printed = (finished.parent / "stdout").read_text()
    assert printed == (finished / "table.txt").read_text() + f"written to {finished}\n"
    assert "A2C on CartPole-v1, 400 steps: 2 seeds, mean ± standard deviation over them." in printed
    picture = imread(finished / "curves.png")
    assert picture.shape[1] > 600 and picture[..., :3].std() > 0.01


def test_every_method_is_measured(finished: Path) -> None:
    found = results(finished)
    assert found["baseline"] == "random policy" and found["settings"]["env"] == "CartPole-v1"
    assert set(found["versions"]) == {"stable-baselines3", "gymnasium"}
    assert set(found["summary"]) == {"random policy", "A2C", "SWA", "SWAG"}
    for cell in found["cells"]:
        assert cell["collected"] == 5
        curves = cell["curves"]["CartPole-v1"]
        assert [time for time, _ in curves["A2C"]] == [100, 200, 300, 400]
        assert [time for time, _ in curves["SWA"]] == [300, 400]
        levels = [level for _, level in curves["SWA"]]
        assert cell["methods"]["SWA"]["mean"] == pytest.approx(np.mean(levels))
        assert cell["methods"]["SWA"]["lowest"] == min(levels)
        assert all(1 <= metrics["return"] <= 500 for metrics in cell["methods"].values())


def test_finished_seeds_are_kept(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    assert run(path, "--seeds", "1") == 0
    marked = json.loads((path / "cells/seed-0.json").read_text())
    own, first = (marked["methods"], results(finished)["cells"][0]["methods"])
    assert own == first  # a seed gives the same numbers again, alone or not
    marked["methods"]["SWA"]["return"] = 123.0
    (path / "cells/seed-0.json").write_text(json.dumps(marked))
    assert run(path, "--seeds", "2", "--resume") == 0
    found = results(path)["summary"]["SWA"]["return"]["values"]
    assert found == [123.0, results(finished)["summary"]["SWA"]["return"]["values"][1]]
    assert run(path, "--resume", "--lr", "0.1") == 2 and "lr was 0.0007, now 0.1" in capsys.readouterr().err


def test_the_average_is_of_the_iterates_that_were_due() -> None:
    settings = tiny(swa_start=0.5)
    assert settings.collects_at() == [240, 280, 320, 360, 400] and settings.measures_at() == [100, 200, 300, 400]
    agent = agents.make_agent(settings, 0, CPU)
    module = agents.acting_network(agent)
    layout = lb.ParameterLayout.from_module(module)
    seen: list[torch.Tensor] = []

    class Recorder(lb.SWAG):
        def update_parameters(self, model: torch.nn.Module) -> None:
            seen.append(layout.flatten(model).clone())
            super().update_parameters(model)

    swag = Recorder(module, rank=2)
    evaluator = agents.Evaluator(settings, 0)
    agents.learn(agent, settings, agents.Averaging(settings, swag, evaluator, tqdm(disable=True)))
    assert len(seen) == 5 and len({tuple(theta.tolist()) for theta in seen}) == 5
    torch.testing.assert_close(swag.mean, torch.stack(seen).double().mean(0).float(), rtol=1e-5, atol=1e-7)


def test_measuring_leaves_the_agent_as_it_was() -> None:
    settings = tiny()
    agent = agents.make_agent(settings, 0, CPU)
    module = agents.acting_network(agent)
    layout = lb.ParameterLayout.from_module(module)
    before = layout.flatten(module).clone()
    evaluator = agents.Evaluator(settings, 0)
    with pytest.raises(KeyError, match="inside"), agents.with_weights(module, torch.zeros_like(before), layout):
        assert not layout.flatten(module).any()
        raise KeyError("inside")
    assert torch.equal(layout.flatten(module), before)
    swag = lb.SWAG(module, rank=1)
    swag.update_parameters(module)
    swag.update_parameters(module)
    draws = evaluator.draws(agent, swag.posterior(), 0)
    assert torch.equal(layout.flatten(module), before) and len(draws) == 4
    one, other = (agents.Evaluator(settings, seed).returns(agent) for seed in (0, 1))
    assert one == evaluator.returns(agent) != other  # the same episodes for every method, others for other seeds


def test_the_random_policy_is_uniform() -> None:
    """A pole that is pushed at random falls after 22 steps on average; the standard deviation is 12."""
    settings = tiny(eval_episodes=400)
    returns = agents.Evaluator(settings, 3).random_policy()
    assert len(returns) == 400 and abs(np.mean(returns) - 22.2) < 5 * 12 / 20


def test_ddpg_averages_the_actor_alone(tmp_path: Path) -> None:
    more = "--algorithm DDPG --timesteps 120 --n_envs 1 --eval_episodes 2 --evaluations 2 --seeds 1".split()
    assert run(tmp_path / "run", *more) == 0
    found = results(tmp_path / "run")
    assert set(found["summary"]) == {"random policy", "DDPG", "SWA", "SWAG"}
    assert found["settings"]["env"] == "Pendulum-v1"
    assert found["cells"][0]["parameters"] == (3 * 8 + 8) + (8 * 8 + 8) + (8 + 1)
    assert all(level["return"]["mean"] < 0 for level in found["summary"].values())


@pytest.mark.parametrize("validate", [True, False])
def test_divergence_is_one_line(validate: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other libraries switch the validation of distributions on and off for the whole process."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(validate)
    try:
        assert run(tmp_path / "run", "--lr", "1e38") == 2
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "seed 0: training diverged" in error and not (tmp_path / "run" / "results.json").exists()


def test_measurements_are_compared_at_the_same_times() -> None:
    curve = [[1, 5.0], [2, 1.0], [3, 2.0], [4, 6.0]]
    assert while_averaging(curve, curve[2:]) == {"mean": 4.0, "lowest": 2.0}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--env CartPole-v99", "--env CartPole-v99: "),
        ("--algorithm DDPG --env CartPole-v1", "DDPG needs continuous actions; CartPole-v1 has Discrete(2)"),
        ("--swa_start 1", "--swa_start must be less than 1; got 1.0"),
        ("--collections 1", "--collections must be at least 2; got 1"),
        ("--timesteps 100 --collections 20", "--timesteps 100 is too few for --collections 20 and"),
        ("--evaluations 101", "--timesteps 400 is too few for --collections 5 and --evaluations 101"),
        ("--gamma 1.5", "--gamma must be at most 1; got 1.5"),
        ("--seeds 0", "--seeds must be at least 1; got 0"),
    ],
)
def test_refusals_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, message: str) -> None:
    try:
        status = run(tmp_path / "run", *more.split())
    except SystemExit as error:  # of the command line itself
        status = int(error.code or 0)
    assert status == 2 and not (tmp_path / "run").exists()
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_the_extra_there_is_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.delitem(sys.modules, "experiments.reinforcement_agents")
    monkeypatch.delattr("experiments.reinforcement_agents", raising=False)
    with pytest.raises(SettingsError, match=r'stable_baselines3 is missing: pip install -e "\.\[applications\]"'):
        reinforcement.work(tiny(dir=str(tmp_path / "run")))
