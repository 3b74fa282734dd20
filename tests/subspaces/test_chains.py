"""Checkpoints of chains: what a killed run goes on with is bit for bit what it would have drawn."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_bdl.errors import CheckpointError
from lowrank_bdl.subspaces.draws import Draws
from lowrank_bdl.subspaces.elliptical_slice import elliptical_slice
from tests.subspaces.targets import LinearGaussian


class Killed(Exception):
    pass


class Mortal(LinearGaussian):
    """Dies at a call, as a killed process would."""

    last = 0

    def log_likelihood(self, z: torch.Tensor) -> torch.Tensor:
        if self.calls == self.last:
            raise Killed("at a call")
        return super().log_likelihood(z)


def run(target: LinearGaussian, num_samples: int = 12, seed: int = 3, **options: Any) -> Draws:
    settings = {"num_chains": 2, "burn_in": 5, "thin": 2, "checkpoint_every": 3, **options}
    return elliptical_slice(target, num_samples, generator=torch.Generator().manual_seed(seed), **settings)


def same(found: Draws, expected: Draws) -> bool:
    names = ("draws", "log_joints", "accept")
    return all(torch.equal(getattr(found, name), getattr(expected, name)) for name in names)


@pytest.mark.parametrize("last", [8, 30, 50])  # in the burn-in, in the middle, near the end
def test_a_killed_run_goes_on_to_the_last_bit(last: int, tmp_path: Path) -> None:
    whole = run(LinearGaussian())
    mortal = Mortal()
    mortal.last = last
    with pytest.raises(Killed, match="at a call"):
        run(mortal, checkpoint=tmp_path / "chain")
    assert (tmp_path / "chain").exists()
    other_seed = run(LinearGaussian(), seed=99, checkpoint=tmp_path / "chain", resume=True)
    assert same(other_seed, whole) and other_seed.num_evaluations >= whole.num_evaluations
    assert [file.name for file in tmp_path.iterdir()] == ["chain"]


def test_a_finished_run_is_lengthened(tmp_path: Path) -> None:
    whole, path = run(LinearGaussian(), 12), tmp_path / "chain"
    run(LinearGaussian(), 7, checkpoint=path)
    longer = run(LinearGaussian(), 12, checkpoint=path, resume=True)
    assert same(longer, whole)
    assert longer.num_evaluations == whole.num_evaluations + 2  # one a chain, to know the target again
    assert same(run(LinearGaussian(), 12, checkpoint=path, resume=True), whole)  # nothing left to do
    with pytest.raises(CheckpointError, match="holds 12 draws of each chain; expected at most 7"):
        run(LinearGaussian(), 7, checkpoint=path, resume=True)


def test_without_resume_it_starts_again(tmp_path: Path) -> None:
    first = run(LinearGaussian(), seed=1, checkpoint=tmp_path / "chain")
    second = run(LinearGaussian(), seed=2, checkpoint=tmp_path / "chain")
    assert not same(first, second)
    assert same(run(LinearGaussian(), seed=2, checkpoint=tmp_path / "none", resume=True), second)  # not there yet


def test_refuses_chains_of_another_kind_or_target(tmp_path: Path) -> None:
    path = tmp_path / "chain"
    run(LinearGaussian(), checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="of other chains: num_chains was 2, now 3; thin was 2, now 1"):
        run(LinearGaussian(), num_chains=3, thin=1, checkpoint=path, resume=True)
    with pytest.raises(CheckpointError, match="temperature was 1.7, now 2.0"):
        run(LinearGaussian(temperature=2.0), checkpoint=path, resume=True)
    with pytest.raises(CheckpointError, match="of another log-likelihood: it was"):
        run(LinearGaussian(noise=0.81), checkpoint=path, resume=True)
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        run(LinearGaussian(), checkpoint=path, resume=True)


def test_progress_is_shown_when_asked_for(terminal: pytest.CaptureFixture[str]) -> None:
    run(LinearGaussian())
    assert terminal.readouterr().err == ""
    run(LinearGaussian(), progress=True)
    assert "elliptical slice: 100%" in terminal.readouterr().err
