"""What `experiments.curve` works with: network, images, the weights at the ends, and the paths between them."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lowrank_bdl as lb
from experiments import train, train_settings
from experiments.common import RunDir, SettingsError, fixed, replacing
from experiments.curve_settings import CHAIN, LINE, Settings, TrainSettings
from experiments.datasets import Datasets
from experiments.ensembling import load_data
from experiments.evaluation import BN_BATCH_SIZE, has_batch_norm
from experiments.hessian_points import read_point
from experiments.train_setup import arithmetic, bn_images, make_model, training_batches, try_model
from experiments.two_spirals import NAME, load_two_spirals, perceptron
from experiments.uncertainty_members import is_finished, read_settings
from lowrank_bdl.surfaces.curves import BezierCurve, Curve, PolygonalChain
from lowrank_bdl.surfaces.evaluation import PointValues, evaluate_points
from lowrank_bdl.surfaces.surface_model import SurfaceModel
from lowrank_bdl.training import losses, schedules
from lowrank_bdl.training.trainer import Record, Trainer

KINDS: dict[str, type[Curve]] = {"PolyChain": PolygonalChain, "Bezier": BezierCurve}
EVAL_BATCH_SIZE = 250
FINAL_LR = 0.01  # of the first learning rate, as published
TOY_WIDTH = 24
TOY_POINTS = 600
SAVE_EVERY = 50  # epochs of the toy


@dataclass(frozen=True)
class Bench:
    """Network and images.

    Attributes:
        settings: Of the script (of another one, if it has --eval_limit).
        recipe: How the networks at the ends are trained.
        data: Images.
        shown: Name of the images to test on.
        model: The network; its weights are of no account.
    """

    settings: Any
    recipe: TrainSettings
    data: Datasets
    shown: str
    model: nn.Module

    @property
    def layout(self) -> lb.ParameterLayout:
        """What a weight vector holds."""
        return lb.ParameterLayout.from_module(self.model)

    @property
    def weight_decay(self) -> float:
        """Of curves and of the regularised loss."""
        return self.recipe.wd if self.settings.wd is None else self.settings.wd

    @property
    def images(self) -> dict[str, Any]:
        """Batches of the images to evaluate on, by name; training images are not augmented."""
        return {name: self.split(name).batches(EVAL_BATCH_SIZE) for name in ("train", self.shown)}

    def split(self, name: str) -> Any:
        """Return the images of that name that are evaluated."""
        images, limit = getattr(self.data, name), self.settings.eval_limit
        return images if limit is None else images.first(limit)

    @property
    def facts(self) -> dict[str, Any]:
        """What results.json says about every run."""
        return {
            "schema": 1,
            "settings": dataclasses.asdict(self.settings),
            "recipe": dataclasses.asdict(self.recipe),
            "data": self.data.facts,
            "reported_on": self.shown,
            "parameters": self.layout.numel,
        }


def open_bench(settings: Settings, device: torch.device) -> Bench:
    """Load images and make the network; nothing is written.

    Raises:
        SettingsError: If there is no recipe for them, or they do not fit together.
    """
    recipe = recipe_of(settings)
    if settings.toy is not None:
        data, shown = load_two_spirals(TOY_POINTS, TOY_POINTS, settings.seed, device), "test"
        return Bench(settings, recipe, data, shown, perceptron(TOY_WIDTH, settings.seed, device))
    data, shown = load_data(settings, recipe, device)  # type: ignore[arg-type]
    model = make_model(recipe, data, device)
    try_model(model, data)
    return Bench(settings, recipe, data, shown, model)


def recipe_of(settings: Settings) -> TrainSettings:
    """Return how the networks at the ends were, or are to be, trained."""
    changes: dict[str, Any] = {"bn_size": settings.bn_size, "threads": settings.threads, "device": settings.device}
    if settings.batch_size is not None:
        changes["batch_size"] = settings.batch_size
    if settings.data_path is not None:
        changes["data_path"] = settings.data_path
    if settings.toy is None and settings.model is None:
        first = Path(settings.files[0])
        if not first.exists():
            raise SettingsError(f"{first}: there is no such file or folder")
        return dataclasses.replace(read_settings(first if first.is_dir() else first.parent), **changes)
    keys = ("dataset", "use_test", "train_limit", "momentum", "seed")
    changes |= {key: getattr(settings, key) for key in keys}
    if settings.wd is not None:
        changes["wd"] = settings.wd
    if settings.toy is not None:
        return TrainSettings(dir=settings.dir, **(changes | {"dataset": NAME, "model": "perceptron", "use_test": True}))
    epochs = settings.endpoint_epochs
    changes |= dict(model=settings.model, epochs=epochs, lr_init=settings.endpoint_lr, eval_freq=epochs, resume="auto")
    return train_settings.check(TrainSettings(dir=settings.dir, optimizer="SGD", save_freq=10**6, **changes))


# ---- the weights at the ends -----------------------------------------------------------------------------------------


def given_points(bench: Bench) -> list[Tensor]:
    """Read the weights that are given, each (D,); see that they fit the network and differ.

    Raises:
        SettingsError: If a file is missing, damaged, or of another network.
    """
    files, found = bench.settings.files, read_thetas(bench.settings.files, bench.settings.source, bench.model)
    for number in range(1, len(found)):
        if torch.equal(found[number], found[number - 1]):
            raise SettingsError(f"{files[number]} has the same weights as the file before it")
    return found


def read_thetas(files: Sequence[str], source: str, model: nn.Module) -> list[Tensor]:
    """Read weights, each (D,), through a network, whose own weights are lost.

    Args:
        files: Runs of `experiments.train`, or files of weights; see `experiments.hessian_points`.
        source: Which of a finished run's weights: ``last``, or a name such as ``SWA``.
        model: The network.

    Raises:
        SettingsError: If a file is missing, damaged, or of another network.
    """
    layout = lb.ParameterLayout.from_module(model)
    found = []
    for file in files:
        try:
            read_point(Path(file), source, model).load_(model)
        except FileNotFoundError:
            raise SettingsError(f"{file}: there is no such file, or no weights.safetensors in it") from None
        except (lb.CheckpointError, OSError) as error:
            raise SettingsError(f"{file}: {' '.join(str(error).split())}") from None
        found.append(layout.flatten(model))
    return found


def endpoint_runs(bench: Bench) -> list[TrainSettings]:
    """Return the training runs of the two ends where none are given: of two seeds, in folders of their own."""
    folder, seed = Path(bench.settings.dir), bench.settings.seed
    return [
        dataclasses.replace(bench.recipe, dir=str(folder / name), seed=2 * seed + number)
        for number, name in enumerate(("start", "end"))
    ]


def train_ends(bench: Bench, run: RunDir) -> list[Tensor]:
    """Train the two networks that are to be connected, or what is left of them."""
    if bench.settings.toy is not None:
        return [toy_network(bench, run, number) for number in range(2)]
    found = []
    for own in endpoint_runs(bench):
        if not is_finished(own):
            train.work(own)
        found += read_thetas([own.dir], bench.settings.source, bench.model)
    return found


def toy_network(bench: Bench, run: RunDir, number: int) -> Tensor:
    model = perceptron(TOY_WIDTH, 2 * bench.settings.seed + number, run.device)
    loss: losses.Loss = losses.cross_entropy
    if bench.weight_decay:
        loss = losses.GaussianPrior(loss, 1 / bench.weight_decay, 1)  # as of the curves: half of it times |w|^2
    epochs = bench.settings.endpoint_epochs
    assert epochs is not None
    fit(bench, run, f"network-{number + 1}", model, list(model.parameters()), loss, epochs)
    return bench.layout.flatten(model)


# ---- curves ----------------------------------------------------------------------------------------------------------


def digest_of(points: list[Tensor]) -> str:
    """Return 16 hexadecimal digits that name weights by their content."""
    found = hashlib.blake2b(digest_size=8)
    for point in points:
        found.update(point.cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def trained_curve(bench: Bench, run: RunDir, name: str, ends: list[Tensor]) -> Curve:
    """Train a curve between two networks and write it, or read what an earlier part of the run has trained.

    Raises:
        SettingsError: If a file of this run is damaged, or of other ends.
    """
    path = run.path / f"curve-{name}.safetensors"
    settings = bench.settings
    identity = json.dumps([fixed(settings), digest_of(ends)])
    device = ends[0].device
    if settings.resume and path.exists():
        try:
            found = KINDS[name].load(path, bench.layout, device=device)
        except (lb.CheckpointError, OSError) as error:
            raise SettingsError(f"--resume: {' '.join(str(error).split())}") from None
        if found.provenance.get("identity") != identity:
            raise SettingsError(f"--resume: {path} is between other networks; delete it to make it again")
        return found
    free = {"fix_start": not settings.free_start, "fix_end": not settings.free_end}
    if settings.init_linear_off:
        points = [ends[0], *fresh_points(bench, settings.num_bends - 2, device), ends[1]]
        curve = KINDS[name](points, bench.layout, **free)
    else:
        curve = KINDS[name].between(*ends, settings.num_bends, bench.layout, **free)
    curve.provenance = {"identity": identity}
    loss = losses.SurfaceLoss(losses.cross_entropy, weight_decay=bench.weight_decay)
    epochs = settings.curve_epochs
    assert epochs is not None
    fit(bench, run, name, SurfaceModel(bench.model, curve), list(curve.parameters()), loss, epochs, identity)
    curve.save(path)
    checkpoint_of(run, name).unlink()
    return curve


def fresh_points(bench: Bench, count: int, device: torch.device) -> list[Tensor]:
    """Return the weights of so many untrained networks, each (D,), of seeds that no endpoint trained here has."""
    found = []
    for seed in range(2 * bench.settings.seed + 2, 2 * bench.settings.seed + 2 + count):
        if bench.settings.toy is not None:
            model: nn.Module = perceptron(TOY_WIDTH, seed, device)
        else:
            model = make_model(dataclasses.replace(bench.recipe, seed=seed), bench.data, device)
        found.append(bench.layout.flatten(model))
    return found


def checkpoint_of(run: RunDir, name: str) -> Path:
    return run.path / f"checkpoint-{name}.safetensors"


def fit(
    bench: Bench,
    run: RunDir,
    name: str,
    model: nn.Module,
    parameters: list[nn.Parameter],
    loss: losses.Loss,
    epochs: int,
    identity: str = "",
) -> None:
    """Train parameters of a model, from the checkpoint of that name if the run goes on and there is one."""
    settings, rate = bench.settings, float(bench.settings.lr or 0)
    torch.manual_seed(settings.seed)
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(parameters, lr=rate)
        if settings.optimizer == "Adam"
        else torch.optim.SGD(parameters, lr=rate, momentum=settings.momentum)
    )
    trainer = Trainer(
        model,
        optimizer,
        loss,
        schedule=schedules.SWAGLR(optimizer, swa_lr=FINAL_LR * rate, horizon=epochs),
        metrics={"accuracy": losses.accuracy},
        seed=settings.seed,
        **arithmetic(bench.recipe),
    )
    checkpoint = checkpoint_of(run, name)
    facts = {"identity": identity, "epochs": epochs}
    if settings.resume and checkpoint.exists():
        trainer.load(checkpoint, facts)

    def log(trainer: Trainer, record: Record) -> None:
        if settings.toy is None or trainer.epoch == epochs:
            run.log(path=name, **record)

    trainer.fit(
        lambda generator: training_batches(bench.recipe, bench.data, generator),
        epochs,
        after_epoch=log,
        checkpoint=checkpoint,
        save_every=1 if settings.toy is None else SAVE_EVERY,
        settings=facts,
        description=name,
    )


def untrained_paths(bench: Bench, points: list[Tensor]) -> dict[str, Curve]:
    """Return the straight line between two networks, or that from file to file of --ckpt."""
    return {CHAIN if bench.settings.ckpt is not None else LINE: PolygonalChain(points, bench.layout)}


def grid_of(settings: Settings, path: Curve) -> Tensor:
    """Return the t at which a path is evaluated: --num_points in all, or from each file of --ckpt to the next."""
    assert settings.num_points is not None
    pieces = path.num_pieces if settings.ckpt is not None else 1
    return torch.linspace(0, 1, pieces * (settings.num_points - 1) + 1, dtype=torch.float64)


# ---- evaluation ------------------------------------------------------------------------------------------------------


def evaluate(bench: Bench, run: RunDir, name: str, path: Curve) -> dict[str, PointValues]:
    """Evaluate the network along a path, going on with what an earlier part of the run has evaluated."""
    t = grid_of(bench.settings, path)
    file = run.path / f"values-{name}.npz"
    identity = json.dumps([fixed(bench.settings), digest_of([point.detach() for point in path.points])])
    bn = bn_images(bench.recipe, bench.data).batches(BN_BATCH_SIZE) if has_batch_norm(bench.model) else None
    return evaluate_points(
        bench.model,
        t,
        bench.images,
        cross_entropy,
        surface=path,
        bn_loader=bn,
        known=read_values(file, identity) if bench.settings.resume else None,
        on_values=lambda values: write_values(file, identity, t, values),
    )


def write_values(file: Path, identity: str, t: Tensor, values: Mapping[str, PointValues]) -> None:
    """Write what is known so far: t and, of each set of images, NAME_loss, NAME_accuracy and NAME_squared_norm."""
    arrays = {"t": t.numpy(), "identity": np.array(identity), "sets": np.array(list(values))}
    for name, found in values.items():
        for field in dataclasses.fields(found):
            arrays[f"{name}_{field.name}"] = getattr(found, field.name).cpu().numpy()
    with replacing(file) as stream:
        np.savez(stream, **arrays)


def read_values(file: Path, identity: str) -> dict[str, PointValues] | None:
    """Read what `write_values` wrote; None if there is nothing, or of something else."""
    try:
        with np.load(file) as arrays:
            if str(arrays["identity"]) != identity:
                return None
            fields = [field.name for field in dataclasses.fields(PointValues)]
            return {
                str(name): PointValues(*(torch.from_numpy(arrays[f"{name}_{field}"]) for field in fields))
                for name in arrays["sets"]
            }
    except (OSError, ValueError, KeyError):
        return None
