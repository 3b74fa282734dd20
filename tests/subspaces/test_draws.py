"""The result of a sampler: its shapes, summaries and file."""

from pathlib import Path

import pytest
import torch

from lowrank_bdl.errors import CheckpointError, ShapeError
from lowrank_bdl.linalg.files import write_tensors
from lowrank_bdl.subspaces.draws import KIND, Draws


def make(**changes: object) -> Draws:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    return Draws(**{"draws": draws, "log_joints": draws.sum(-1), "method": "variational", **changes})  # type: ignore[arg-type]


def test_summaries() -> None:
    draws = make(location=torch.zeros(3), scale_tril=2 * torch.eye(3), trace=torch.arange(3.0))
    assert (draws.num_chains, draws.num_samples, draws.rank) == (2, 6, 3)
    assert torch.equal(draws.flat[6], draws.draws[1, 0])
    torch.testing.assert_close(draws.mean, draws.draws.mean((0, 1)))
    torch.testing.assert_close(draws.covariance, torch.cov(draws.draws.reshape(12, 3).mT))
    assert draws.ess().shape == draws.rhat().shape == (3,)
    assert draws.elbo is draws.trace and draws.distribution is not None
    assert draws.distribution.variance.tolist() == [4.0, 4.0, 4.0]
    other = make(method="map", trace=torch.zeros(2))
    assert other.elbo is None and other.distribution is None
    assert make(draws=torch.zeros(1, 2, 1), log_joints=torch.zeros(1, 2)).covariance.shape == (1, 1)


def test_file_gives_everything_back(tmp_path: Path) -> None:
    draws = make(accept=torch.rand(2, 6), num_evaluations=7, seconds=1.5, settings={"thin": 2, "initial": None})
    draws.save(tmp_path / "draws.safetensors")
    again = Draws.load(tmp_path / "draws.safetensors")
    for name in ("draws", "log_joints", "accept"):
        assert torch.equal(getattr(again, name), getattr(draws, name))
    assert again.trace is None and again.settings == draws.settings
    assert (again.method, again.num_evaluations, again.seconds) == ("variational", 7, 1.5)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"draws": torch.zeros(2, 3)}, r"draws must have shape \(C, n, k\) with C, n >= 1; got \(2, 3\)"),
        ({"draws": torch.zeros(2, 0, 3)}, r"got \(2, 0, 3\)"),
        ({"log_joints": torch.zeros(2, 5)}, r"log_joints must have shape \(2, 6\); got \(2, 5\)"),
        ({"accept": torch.zeros(12)}, r"accept must have shape \(2, 6\); got \(12,\)"),
        ({"location": torch.zeros(3)}, "needs both location and scale_tril"),
    ],
)
def test_refuses_shapes_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        make(**changes)


def test_refuses_a_file_that_contradicts_itself(tmp_path: Path) -> None:
    path = tmp_path / "draws.safetensors"
    tensors = {"draws": torch.zeros(2, 3, 1), "log_joints": torch.zeros(2, 2)}
    write_tensors(path, KIND, tensors, {"method": "x"})
    with pytest.raises(CheckpointError, match="contradicts itself: log_joints must have shape"):
        Draws.load(path)
    write_tensors(path, "something else", tensors, {})
    with pytest.raises(CheckpointError, match="holds a 'something else'"):
        Draws.load(path)
