"""Schedule, snapshots, and resume to the last bit."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from experiments.common import RunDir, SettingsError, setting
from experiments.datasets import Split
from experiments.models import SmallConvNet
from experiments.training import Phase, evaluate, learning_rate, train


@dataclass(frozen=True)
class Toy:
    dir: str = setting("", "folder", free=True)
    resume: bool = setting(False, "go on", free=True)


class Snapshots:
    """A collector that keeps every iterate; stops the process's work when it has `fail_after` of them."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.rows: list[Tensor] = []
        self.fail_after = fail_after

    def update_parameters(self, model: nn.Module) -> None:
        if len(self.rows) == self.fail_after:
            raise KeyboardInterrupt
        self.rows.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())

    def state_dict(self) -> dict[str, Tensor]:
        return {"rows": torch.stack(self.rows)} if self.rows else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.rows = list(state["rows"]) if state else []


def images(n: int, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    return Split(torch.randn(n, 1, 8, 8, generator=generator), torch.randint(0, 3, (n,), generator=generator))


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Dropout(dropout), SmallConvNet(1, 8, 3, width=2))


def phase(**changes: object) -> Phase:
    rate = partial(learning_rate, lr_init=0.1, final_lr=0.05, horizon=2)
    settings = dict(name="toy", epochs=5, learning_rate=rate, seed=3, batch_size=8, momentum=0.9, weight_decay=1e-3)
    return Phase(**{**settings, "max_shift": 1, "flip": True, "start": 2, "collects_per_epoch": 2, **changes})


def run_dir(path: Path, resume: bool = False) -> RunDir:
    return RunDir(Toy(str(path), resume), ["log.jsonl", "checkpoint-toy.safetensors"], torch.device("cpu"))


@pytest.fixture(autouse=True)
def leave_the_global_generator_as_it_was() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def test_schedule_is_flat_then_linear_then_flat() -> None:
    rates = [learning_rate(epoch, 0.1, 0.01, 100) for epoch in (0, 50, 70, 90, 300)]
    assert rates == pytest.approx([0.1, 0.1, 0.055, 0.01, 0.01], rel=1e-12)
    assert learning_rate(0, 0.1, 0.01, 0) == pytest.approx(0.01)


def test_evaluate_weighs_images_equally_and_keeps_the_mode() -> None:
    model, split = network().train(), images(23)
    found = evaluate(model, split, batch_size=7)
    logits = model.eval()(split.inputs)
    assert found["nll"] == pytest.approx(nn.functional.cross_entropy(logits, split.targets).item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == split.targets).float().mean().item(), rel=1e-6)
    model.train()
    evaluate(model, split)
    assert model.training


def test_snapshots_are_taken_after_the_start_only(tmp_path: Path) -> None:
    collector = Snapshots()
    model = network()
    train(run_dir(tmp_path / "run"), phase(collects_per_epoch=3), model, images(30), images(10, 1), collector)
    assert len(collector.rows) == (5 - 2) * 3
    assert torch.equal(collector.rows[-1], nn.utils.parameters_to_vector(model.parameters()))


@pytest.mark.parametrize("fail_after", [0, 1, 4, 5])  # in the first collected epoch, and in the middle of later ones
def test_a_killed_and_resumed_run_is_identical(tmp_path: Path, fail_after: int) -> None:
    data, validation = images(30), images(10, 1)
    whole, whole_model = Snapshots(), network(dropout=0.2)
    whole_run = run_dir(tmp_path / "whole")
    train(whole_run, phase(), whole_model, data, validation, whole)

    with pytest.raises(KeyboardInterrupt, match="^$"):
        train(run_dir(tmp_path / "run"), phase(), network(dropout=0.2), data, validation, Snapshots(fail_after))
    torch.manual_seed(99)  # a new process has another global state
    resumed, model = Snapshots(), network(dropout=0.2)
    run = run_dir(tmp_path / "run", resume=True)
    train(run, phase(), model, data, validation, resumed)

    assert torch.equal(torch.stack(resumed.rows), torch.stack(whole.rows))
    for key, value in whole_model.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert run.read_log() == whole_run.read_log()
    assert [record["epoch"] for record in run.read_log()] == [1, 2, 3, 4, 5]


def test_the_order_of_the_data_depends_on_seed_and_epoch(tmp_path: Path) -> None:
    losses = {}
    for seed in (1, 2):
        run = run_dir(tmp_path / str(seed))
        train(run, phase(seed=seed, epochs=2), network(), images(30), images(10, 1))
        losses[seed] = [record["train_loss"] for record in run.read_log()]
    assert losses[1] != losses[2]


def test_divergence_is_reported_and_not_collected(tmp_path: Path) -> None:
    collector = Snapshots()
    rate = partial(learning_rate, lr_init=1e30, final_lr=1e30, horizon=2)
    with pytest.raises(SettingsError, match="training diverged: loss nan in epoch"):
        train(
            run_dir(tmp_path / "run"), phase(start=0, learning_rate=rate), network(), images(30), images(10), collector
        )
    assert all(row.isfinite().all() for row in collector.rows)
