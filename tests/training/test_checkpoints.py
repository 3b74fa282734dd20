"""A run that was killed and goes on from its checkpoint is the run that was not, to the last bit."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, SequentialLR
from torch.optim.swa_utils import SWALR

import lowrank_bdl as lb
from lowrank_bdl.training import averages, checkpoints, losses
from lowrank_bdl.training.collection import Collection
from lowrank_bdl.training.schedules import SWAGLR, TriangularLR
from lowrank_bdl.training.trainer import Trainer

X = torch.randn(21, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (21,), generator=torch.Generator().manual_seed(1))
Optimizer = torch.optim.Optimizer

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, amsgrad=True),
    "AdamW": lambda m: torch.optim.AdamW([{"params": [p]} for p in m.parameters()], lr=0.01),
}
SCHEDULES: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "SGD": lambda o: SWAGLR(o, swa_lr=0.05, horizon=2),
    "Adam": lambda o: TriangularLR(o, min_lr=0.001, cycle=5),
    "AdamW": lambda o: SequentialLR(o, [SWAGLR(o, 0.005, 2), SWALR(o, 0.002, anneal_epochs=2)], milestones=[2]),
}


class Killed(Exception):
    """What the process dies of in the middle of an epoch."""


def data(fail_at: tuple[int, int] | None = None) -> Callable[[torch.Generator], Iterator[tuple[Tensor, Tensor]]]:
    """Augmented batches; dies in batch `fail_at[1]` of epoch `fail_at[0]`, counted from 0."""
    epochs = iter(range(100))

    class Epoch:
        def __init__(self, generator: torch.Generator) -> None:
            self.generator, self.number = generator, next(epochs)

        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for number, part in enumerate(torch.randperm(21, generator=self.generator).split(8)):
                if (self.number, number) == fail_at:
                    raise Killed
                yield X[part] + 0.1 * torch.randn(X[part].shape, generator=self.generator), Y[part]

    return Epoch


def make(name: str = "SGD", rank: int = 3, width: int = 4, channels_last: bool = True, **options: Any) -> Trainer:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(16 * width, 3))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS[name](model)
    collections = {
        "swag": Collection(lb.SWAG(model, rank=rank), start=2, per_epoch=2),
        "swa": Collection(averages.swa(model), start=2),
        "ema": Collection(averages.ema(model, 0.9), per_epoch=None),
    }
    settings: dict[str, Any] = dict(
        schedule=SCHEDULES[name](optimizer),
        step_every="batch" if name == "Adam" else "epoch",
        collections=collections,
        metrics={"accuracy": losses.accuracy},
        memory_format=torch.channels_last if channels_last else None,
    )
    return Trainer(model, optimizer, **{**settings, **options})


def tensors(trainer: Trainer) -> dict[str, Tensor]:
    found = {f"model.{key}": value for key, value in trainer.model.state_dict().items()}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    for name, c in trainer.collections.items():
        found |= {f"{name}.{key}": value for key, value in c.collector.state_dict().items()}
    return found


def assert_identical(found: Trainer, expected: Trainer) -> None:
    own, other = tensors(found), tensors(expected)
    assert own.keys() == other.keys() and len(own) > 20
    for key, value in other.items():
        assert torch.equal(own[key], value), key
    assert found.history == expected.history and found.epoch == expected.epoch


@pytest.fixture(autouse=True)
def leave_the_global_generator_as_it_was() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("fail_at", [(1, 2), (2, 2), (3, 1), (5, 0)], ids=lambda at: f"epoch{at[0]}batch{at[1]}")
def test_a_killed_and_resumed_run_is_identical(name: str, fail_at: tuple[int, int], tmp_path: Path) -> None:
    whole = make(name)
    torch.manual_seed(7)
    whole.fit(data(), 6, progress=False)

    path = tmp_path / "checkpoint.safetensors"
    killed = make(name)
    torch.manual_seed(7)
    with pytest.raises(Killed, match="^$"):
        killed.fit(data(fail_at), 6, checkpoint=path, progress=False)
    torch.manual_seed(99)  # a new process has another global state
    resumed = make(name)
    resumed.load(path)
    assert resumed.epoch == fail_at[0]
    resumed.fit(data(), 6, checkpoint=path, progress=False)
    assert_identical(resumed, whole)
    posterior = resumed.collections["swag"].collector.posterior()
    expected = whole.collections["swag"].collector.posterior()
    draws = [p.sample(3, generator=torch.Generator().manual_seed(0)) for p in (posterior, expected)]
    assert torch.equal(*draws)


def test_checkpoints_are_written_and_kept_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    seen = []

    def after(trainer: Trainer, record: dict[str, Any]) -> dict[str, Any]:
        seen.append(checkpoints.read(path)[0]["epoch"] if path.exists() else 0)
        return {"note": f"epoch {trainer.epoch}"}

    make().fit(data(), 7, after_epoch=after, checkpoint=path, save_every=3, keep_every=4, progress=False)
    assert seen == [0, 0, 0, 3, 4, 4, 6]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run-4.safetensors", "run.safetensors"]
    assert checkpoints.read(tmp_path / "run-4.safetensors")[0]["epoch"] == 4
    state, _, _ = checkpoints.read(path)
    assert state["epoch"] == 7 and [record["note"] for record in state["history"]] == [
        f"epoch {e}" for e in range(1, 8)
    ]


def test_settings_are_stored_and_compared(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    make().save(path, {"lr": 0.1, "layers": (2, 3)})
    assert make().load(path) == {"lr": 0.1, "layers": [2, 3]}
    assert make().load(path, {"lr": 0.1, "layers": (2, 3)}) == {"lr": 0.1, "layers": [2, 3]}
    with pytest.raises(lb.CheckpointError, match="settings differ: lr was 0.1, now 0.2"):
        make().load(path, {"lr": 0.2, "layers": (2, 3)})


@pytest.mark.parametrize(
    "options,message",
    [
        (
            {"width": 5},
            r"the model does not fit: '0.weight' is \(5, 3, 3, 3\) torch.float32; the file has \(4, 3, 3, 3\)",
        ),
        (
            {"rank": 4},
            r"collection 'swag' does not fit: 'storage' is \(4, 315\) torch.float32; the file has \(3, 315\)",
        ),
        (
            {"name": "Adam"},
            "optimizer was 'SGD', now 'Adam'; schedule was 'SWAGLR', now 'TriangularLR'; step_every was",
        ),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"collections": {}}, "collection ema was 'AveragedModel.start=0, every=1, per_epoch=None.', now None"),
        ({"autocast": torch.bfloat16}, "autocast was None, now 'torch.bfloat16'"),
    ],
)
def test_a_checkpoint_of_another_run_changes_nothing(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    trained = make()
    trained.fit(data(), 3, checkpoint=path, progress=False)
    other = make(**options)
    before = {key: value.clone() for key, value in tensors(other).items()}
    state = torch.get_rng_state()
    with pytest.raises(lb.CheckpointError, match=rf"c.safetensors is of another training run: .*{message}"):
        other.load(path)
    assert all(torch.equal(value, before[key]) for key, value in tensors(other).items())
    assert other.epoch == 0 and torch.equal(torch.get_rng_state(), state)


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    trainer = make()
    trainer.fit(data(), 3, checkpoint=path, progress=False)
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(lb.CheckpointError, match="c.safetensors is truncated or no safetensors file"):
            make().load(path)
    trainer.collections["swag"].collector.posterior().save(path)
    with pytest.raises(lb.CheckpointError, match="c.safetensors holds a 'gaussian.*'; expected a 'training'"):
        make().load(path)
    with pytest.raises(FileNotFoundError, match="no such file: .*gone"):
        make().load(tmp_path / "gone")


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    trainer = make()
    trainer.save(path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fail)
    trainer.train_epoch(data())
    with pytest.raises(OSError, match="no space left"):
        trainer.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_state_that_is_no_state_is_named(tmp_path: Path) -> None:
    class Odd:
        def update_parameters(self, model: nn.Module) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {"function": len}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    trainer = make(collections={"odd": Collection(Odd())})
    with pytest.raises(TypeError, match="collections.odd.function: state must be made of tensors"):
        trainer.save(tmp_path / "c.safetensors")
    assert list(tmp_path.iterdir()) == []
