"""The loop against one written by hand, its collections, and what it refuses."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as ce
from torch.utils.data import DataLoader, TensorDataset

import lowrank_bdl as lb
from lowrank_bdl.training import averages, losses
from lowrank_bdl.training.collection import Collection
from lowrank_bdl.training.schedules import SWAGLR, TriangularLR
from lowrank_bdl.training.trainer import Trainer

X = torch.randn(21, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (21,), generator=torch.Generator().manual_seed(1))
Batches = list[tuple[Tensor, Tensor]]


def batches(generator: torch.Generator) -> Batches:
    order = torch.randperm(21, generator=generator)
    return [(X[part], Y[part]) for part in order.split(8)]


def network() -> nn.Module:
    torch.manual_seed(0)
    convolution = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(64, 3))


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)


class Snapshots:
    """A collector of one's own: keeps every iterate."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def update_parameters(self, model: nn.Module) -> None:
        self.rows.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        self.rows = list(state["rows"])


@pytest.fixture(autouse=True)
def leave_the_global_generator_as_it_was() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def test_the_loop_equals_one_written_by_hand_bit_for_bit() -> None:
    model = network()
    optimizer = sgd(model)
    clip = 0.8
    iterates, expected = [], []
    torch.manual_seed(5)
    for epoch in range(4):
        model.train()
        lr = 0.1 if epoch <= 1 else 0.1 + (epoch / 2 - 0.5) / 0.4 * (0.02 - 0.1) if epoch <= 1.8 else 0.02
        optimizer.param_groups[0]["lr"] = lr
        losses_, right = [], []
        for inputs, targets in batches(torch.Generator().manual_seed(3 * 1_000_003 + epoch)):
            optimizer.zero_grad()
            logits = model(inputs)
            loss = ce(logits, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            losses_.append(loss.item() * len(targets))
            right.append((logits.argmax(1) == targets).sum().item())
        if epoch >= 2:
            iterates.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        expected.append({"epoch": epoch + 1, "lr": lr, "loss": sum(losses_) / 21, "accuracy": sum(right) / 21})

    other = network()
    snapshots, optimizer = Snapshots(), sgd(other)
    trainer = Trainer(
        other,
        optimizer,
        schedule=SWAGLR(optimizer, swa_lr=0.02, horizon=2),
        collections={"snapshots": Collection(snapshots, start=2)},
        metrics={"accuracy": losses.accuracy},
        seed=3,
        clip_grad_norm=clip,
    )
    torch.manual_seed(5)
    trainer.fit(batches, 4, progress=False)
    for (name, value), found in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, found), name
    assert torch.equal(torch.stack(snapshots.rows), torch.stack(iterates))
    for record, own in zip(trainer.history, expected, strict=True):
        assert record == pytest.approx(own, rel=1e-12)


def test_collections_see_the_weights_when_they_should() -> None:
    model = network()
    every_step, twice, spaced = Snapshots(), Snapshots(), Snapshots()
    ema, swag = averages.ema(model, 0.5), lb.SWAG(model, rank=2)
    collections = {
        "step": Collection(every_step, per_epoch=None),
        "twice": Collection(twice, start=1, per_epoch=2),
        "spaced": Collection(spaced, start=0, every=2),
        "ema": Collection(ema, start=2, per_epoch=None),
        "swag": Collection(swag, start=2),
    }
    Trainer(model, sgd(model), collections=collections).fit(batches, 4, progress=False)
    rows = torch.stack(every_step.rows).view(4, 3, -1)  # epochs, batches
    assert torch.equal(torch.stack(twice.rows), rows[1:, 1:].flatten(0, 1))
    assert torch.equal(torch.stack(spaced.rows), rows[[1, 3], 2])
    torch.testing.assert_close(swag.mean, rows[2:, 2].mean(0), rtol=1e-6, atol=1e-7)
    expected = rows[2, 0]
    for row in rows[2:].flatten(0, 1)[1:]:
        expected = 0.5 * expected + 0.5 * row
    torch.testing.assert_close(averages.weights(ema), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("include", ["5", ["0.weight", "5.bias"]])
def test_the_last_layer_or_a_subset_is_collected_by_pattern(include: "str | list[str]") -> None:
    model = network()
    swag = lb.SWAG(model, rank=3, include=include)
    Trainer(model, sgd(model), collections={"swag": Collection(swag)}).fit(batches, 3, progress=False)
    assert swag.layout.names == (("5.weight", "5.bias") if include == "5" else ("0.weight", "5.bias"))
    posterior = swag.posterior()
    prediction = lb.predict(model, posterior, [(X, Y)], num_samples=2, bn_loader=[(X, Y)], progress=False)
    assert prediction.mean.shape == (21, 3) and prediction.accuracy > 0.3


@pytest.mark.parametrize("kind,lr", [(torch.optim.SGD, 0.1), (torch.optim.Adam, 0.02), (torch.optim.AdamW, 0.02)])
def test_every_optimizer_learns_and_its_average_is_the_mean(
    kind: Callable[..., torch.optim.Optimizer], lr: float
) -> None:
    model = network()
    snapshots, average = Snapshots(), averages.swa(model)
    collections = {"snapshots": Collection(snapshots, start=2), "swa": Collection(average, start=2)}
    trainer = Trainer(model, kind(model.parameters(), lr=lr), collections=collections)
    trainer.fit(batches, 8, progress=False)
    assert trainer.history[-1]["loss"] < 0.7 * trainer.history[0]["loss"]
    expected = torch.stack(snapshots.rows).double().mean(0).float()
    torch.testing.assert_close(averages.weights(average), expected, rtol=1e-5, atol=1e-6)


def test_a_schedule_can_step_with_every_batch() -> None:
    model = network()
    optimizer = sgd(model, lr=0.5)
    seen = []

    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(optimizer.param_groups[0]["lr"])
        return losses.cross_entropy(model, inputs, targets)

    schedule = TriangularLR(optimizer, min_lr=0.1, cycle=6)
    Trainer(model, optimizer, loss, schedule=schedule, step_every="batch").fit(batches, 3, progress=False)
    assert seen == [schedule.rate(step, 0.5) for step in range(9)]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    orders: dict[int, list[int]] = {0: [], 1: []}
    for seed, seen in orders.items():
        model = network()

        def record(generator: torch.Generator, seen: list[int] = seen) -> Batches:
            seen.append(generator.initial_seed())
            return batches(generator)

        Trainer(model, sgd(model), seed=seed).fit(record, 3, progress=False)
    assert orders == {0: [0, 1, 2], 1: [1_000_003, 1_000_004, 1_000_005]}


def test_a_data_loader_is_reseeded_every_epoch() -> None:
    generator = torch.Generator()
    loader = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True, generator=generator)
    found = []
    for warm_up in (0, 3):
        generator.manual_seed(warm_up)  # whatever it was used for before
        model = network()
        torch.manual_seed(1)
        trainer = Trainer(model, sgd(model))
        trainer.fit(loader, 2, progress=False)
        found.append(trainer.history)
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_mixed_precision_and_channels_last_stay_close_to_single_precision(dtype: torch.dtype) -> None:
    found = []
    for autocast, memory_format in ((None, None), (None, torch.channels_last), (dtype, torch.channels_last)):
        model = network()
        if memory_format is not None:
            model = model.to(memory_format=memory_format)
        model[3].p = 0.0
        trainer = Trainer(model, sgd(model, 0.01), autocast=autocast, memory_format=memory_format)
        trainer.fit(batches, 2, progress=False)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        found.append(trainer.history[-1]["loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=2e-2) and found[2] != found[0]


def test_divergence_is_reported_and_not_collected() -> None:
    model = network()
    swag, average = lb.SWAG(model, rank=2), averages.swa(model)
    collections = {"swag": Collection(swag, per_epoch=3), "swa": Collection(average)}
    trainer = Trainer(model, sgd(model, lr=1e30), collections=collections)
    with pytest.raises(lb.NonFiniteError, match=r"training diverged: .*in epoch 1; lower the learning rate"):
        trainer.fit(batches, 3, progress=False)
    assert trainer.epoch == 0 and trainer.history == [] and int(average.n_averaged) == 0
    assert swag.n_averaged == 0 or bool(swag.mean.isfinite().all())


def test_weights_that_the_last_step_broke_are_found() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=float("inf"))
    trainer = Trainer(model, optimizer)
    with pytest.raises(lb.NonFiniteError, match="parameter 'weight' is not finite in epoch 1"):
        trainer.train_epoch([(torch.ones(3, 2), torch.zeros(3, dtype=torch.long))])


def test_batches_weigh_by_their_size() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.0), losses.of_output(nn.functional.mse_loss))
    record = trainer.train_epoch([(torch.ones(3, 1), torch.ones(3, 1)), (torch.ones(1, 1), torch.full((1, 1), 3.0))])
    assert record["loss"] == (3 * 1 + 9) / 4


def test_a_progress_bar_is_shown_only_where_asked(terminal: pytest.CaptureFixture[str]) -> None:
    model = network()
    trainer = Trainer(model, sgd(model))
    trainer.fit(batches, 1, progress=False)
    assert terminal.readouterr().err == ""
    trainer.fit(batches, 2, description="toy run")
    assert "toy run: 100%" in terminal.readouterr().err


def test_a_finished_run_does_nothing() -> None:
    model = network()
    trainer = Trainer(model, sgd(model))
    trainer.fit(batches, 2, progress=False)
    before = nn.utils.parameters_to_vector(model.parameters()).clone()
    trainer.fit(batches, 1, progress=False)
    assert trainer.epoch == 2 and torch.equal(before, nn.utils.parameters_to_vector(model.parameters()))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"step_every": "step"}, "step_every must be 'epoch' or 'batch'; got 'step'"),
        ({"autocast": torch.float64}, "autocast must be None, torch.bfloat16 or torch.float16; got torch.float64"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm must be positive; got 0.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        Trainer(model, sgd(model), **options)


def test_other_misuse_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="schedule must be of the optimizer that the trainer steps"):
        Trainer(model, sgd(model), schedule=SWAGLR(sgd(model), 0.1, 3))
    trainer = Trainer(model, sgd(model), collections={"many": Collection(Snapshots(), per_epoch=2)})
    with pytest.raises(lb.ShapeError, match="at least one batch; got none"):
        trainer.train_epoch([])
    with pytest.raises(TypeError, match="'many' takes several snapshots in an epoch, so data must have a length"):
        trainer.train_epoch(lambda generator: iter(batches(generator)))
    for name in ("save_every", "keep_every"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1 epoch; got 0"):
            trainer.fit(batches, 1, **{name: 0})


def test_data_without_a_length_can_be_collected_once_an_epoch() -> None:
    model = network()
    snapshots = Snapshots()
    trainer = Trainer(model, sgd(model), collections={"one": Collection(snapshots)})
    trainer.fit(lambda generator: iter(batches(generator)), 2, progress=False)
    assert len(snapshots.rows) == 2
