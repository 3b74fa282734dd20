"""The tasks of the study: data, network, recipe and size of each.

Learning rates were chosen on validation data alone, with seeds that are no seeds of the study; see `Task.chosen`.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.common import SettingsError, require_positive
from experiments.datasets import Datasets, Split, load_dataset
from experiments.models import build_model
from experiments.train_setup import AUGMENTATION
from experiments.training_data import AsTrained, TrainingBatches
from lowrank_bdl.models import create_model
from lowrank_bdl.models.registry import closest_first

_SUBSET_SEED = 0  # which test images are used is part of the task, not of a run


@dataclass(frozen=True)
class Task:
    """One comparison of the methods.

    Attributes:
        name: What it is called on the command line.
        source: A key of `FUNCTIONS` (regression), or a data set of `experiments.datasets`.
        model: Name of the network.
        options: Of the network.
        seeds: Number of seeds.
        epochs: Of each of the two runs.
        train_limit: Training examples.
        eval_limit: Most validation and most test examples.
        bn_limit: Training images that batch norm is recalibrated on.
        batch_size: Examples in a training batch.
        lr_init: Learning rate of the first half of the epochs.
        swa_lr: Constant learning rate of the second half in the run whose weights are averaged.
        wd: Weight decay.
        collects_per_epoch: Snapshots in an epoch.
        threads: CPU threads, 0 for torch's choice.
        chosen: How the learning rates were chosen.
    """

    name: str
    source: str
    model: str
    options: dict[str, Any]
    seeds: int
    epochs: int
    train_limit: int
    eval_limit: int
    bn_limit: int
    batch_size: int
    lr_init: float
    swa_lr: float
    wd: float
    collects_per_epoch: int
    threads: int
    chosen: str

    @property
    def is_regression(self) -> bool:
        return self.source in FUNCTIONS

    @property
    def metrics(self) -> tuple[str, str]:
        """The primary and the secondary metric; of both less is better."""
        return ("rmse" if self.is_regression else "error", "nll")

    @property
    def branch(self) -> int:
        """Epochs that both runs share."""
        return self.epochs // 2

    @property
    def collect(self) -> int:
        """Epochs before the first snapshot: a fifth of the run's second half is for settling at the new rate."""
        return self.branch + (self.epochs - self.branch) // 5

    @property
    def snapshots(self) -> int:
        return (self.epochs - self.collect) * self.collects_per_epoch

    @property
    def ema_decay(self) -> float:
        """A memory, 1 / (1 − decay), of a tenth of the steps of a run."""
        steps = self.epochs * -(-self.train_limit // self.batch_size)
        return max(0.0, 1 - 10 / steps)


def toy(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Y = sin(3 x₁) cos(3 x₂) + x₁ x₂ / 2 + N(0, 0.1²), x uniform on [−1, 1]²."""
    x = rng.uniform(-1, 1, (count, 2))
    y = np.sin(3 * x[:, 0]) * np.cos(3 * x[:, 1]) + x[:, 0] * x[:, 1] / 2
    return x, y + 0.1 * rng.standard_normal(count)


def friedman(number: int, noise: float) -> Any:
    """Return scikit-learn's generator of Friedman's data, with the noise that R's mlbench adds [standard deviation].

    That gives the second and third function a signal-to-noise ratio of 3, as in Friedman, "Multivariate adaptive
    regression splines" (1991).
    """

    def draw(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        from sklearn import datasets

        state = np.random.RandomState(rng.integers(2**32))
        x, y = getattr(datasets, f"make_friedman{number}")(count, noise=noise, random_state=state)
        return x, y

    return draw


FUNCTIONS: dict[str, Any] = {
    "toy-2d": toy, "friedman1": friedman(1, 1.0), "friedman2": friedman(2, 125.0), "friedman3": friedman(3, 0.1),
}  # fmt: skip


_RATES = (
    "lr_init: of 0.001 (friedman2), 0.005, 0.01 (Friedman's), 0.02, 0.05 and 0.1 the one with the lowest validation "
    "NLL of SGD, mean of seeds 100 to 102; swa_lr: of 1, 0.3 and 0.1 times it the one with the lowest validation NLL "
    "of SWA"
)
_RATE = (
    "lr_init: of 0.03, 0.1 and 0.3 (0.01 too for MobileNetV2) the one with the lowest validation NLL of SGD, seed 100; "
    "swa_lr: 0.3 times it"
)


def _regression(name: str, lr_init: float, swa_lr: float, **changes: Any) -> Task:
    recipe: dict[str, Any] = dict(
        model="MLP", options={"hidden": (64, 64)}, seeds=20, epochs=100, train_limit=400, eval_limit=2000,
        bn_limit=0, batch_size=20, wd=1e-4, collects_per_epoch=1, threads=1, chosen=_RATES,
    )  # fmt: skip
    return Task(name, name, lr_init=lr_init, swa_lr=swa_lr, **recipe | changes)


def _images(source: str, model: str, short: str, **changes: Any) -> Task:
    recipe: dict[str, Any] = dict(
        options={}, seeds=5, bn_limit=1000, batch_size=64, wd=5e-4, collects_per_epoch=2, threads=0, chosen="not chosen"
    )
    return Task(f"{source.lower()}-{short}", source, model, **recipe | changes)


_TASKS = (
    _regression("toy-2d", 0.05, 0.015),
    _regression("friedman1", 0.05, 0.005),
    _regression("friedman2", 0.001, 0.0001),
    _regression("friedman3", 0.01, 0.001),
    _images("MNIST", "SmallConvNet", "cnn", epochs=10, train_limit=5000, eval_limit=2000, lr_init=0.3, swa_lr=0.09,
            chosen=_RATE),
    _images("MNIST", "MobileNetV2", "mobilenet", epochs=8, train_limit=2000, eval_limit=1000, lr_init=0.03,
            swa_lr=0.009, options={"width_mult": 0.25}, bn_limit=500, collects_per_epoch=4, chosen=_RATE),
    _images("CIFAR10", "SmallConvNet", "cnn", epochs=16, train_limit=10_000, eval_limit=2000, lr_init=0.1, swa_lr=0.03,
            options={"width": 16}, chosen=_RATE),
    _images("CIFAR10", "MobileNetV2", "mobilenet", epochs=10, train_limit=4000, eval_limit=1000, lr_init=0.03,
            swa_lr=0.009, options={"width_mult": 0.25}, bn_limit=500, collects_per_epoch=4,
            chosen="as for mnist-mobilenet"),
    _images("digits", "SmallConvNet", "cnn", epochs=30, train_limit=200, eval_limit=1000, batch_size=10, lr_init=0.1,
            swa_lr=0.05, collects_per_epoch=1, threads=1),
)  # fmt: skip
TASKS = {task.name: task for task in _TASKS}
NOT_BY_DEFAULT = ("digits-cnn",)  # needs no files: for trying the study out
DEFAULT = tuple(name for name in TASKS if name not in NOT_BY_DEFAULT)


def quick(task: Task) -> Task:
    """Shrink a task until it says nothing but that everything works."""
    return dataclasses.replace(
        task,
        seeds=2,
        epochs=4,
        train_limit=min(task.train_limit, 100),
        eval_limit=min(task.eval_limit, 200),
        collects_per_epoch=2,
    )


def find_tasks(names: str) -> tuple[str, ...]:
    """Split a list of names at its commas; "all" is every task that is not just for trying out.

    Raises:
        SettingsError: If a task is unknown or named twice.
    """
    if names == "all":
        return DEFAULT
    found = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in found:
        if name not in TASKS:
            raise SettingsError(f"--tasks: unknown task {name!r}; known are {', '.join(closest_first(name, TASKS))}")
    if not found or len(set(found)) < len(found):
        raise SettingsError(f"--tasks must name at least one task, and each once; got {names!r}")
    return found


@dataclass(frozen=True)
class StudyData:
    """What a network is trained, validated and tested on.

    Attributes:
        train: Training examples.
        held_out: Validation examples, then test examples.
        num_validation: How many of them are for validation.
        mean: What was subtracted from the targets; of classes nothing.
        scale: What they were then divided by.
        images: The data set that the examples are of, where they are images.
    """

    train: Split
    held_out: Split
    num_validation: int
    mean: float = 0.0
    scale: float = 1.0
    images: Datasets | None = None

    @property
    def sizes(self) -> dict[str, int]:
        rest = len(self.held_out) - self.num_validation
        return {"train": len(self.train), "validation": self.num_validation, "test": rest}


def regression_data(task: Task, seed: int, device: torch.device) -> StudyData:
    """Draw data of their own for a seed; standardise inputs and targets with the training examples' moments."""
    sizes = [task.train_limit, min(task.eval_limit, task.train_limit), task.eval_limit]
    x, y = FUNCTIONS[task.source](sum(sizes), np.random.default_rng([seed, list(FUNCTIONS).index(task.source)]))
    x = (x - x[: sizes[0]].mean(0)) / x[: sizes[0]].std(0)
    mean, scale = float(y[: sizes[0]].mean()), float(y[: sizes[0]].std())
    inputs = torch.as_tensor(x, dtype=torch.float32, device=device)
    targets = torch.as_tensor((y - mean) / scale, dtype=torch.float32, device=device).unsqueeze(-1)
    train, held_out = (Split(inputs[part], targets[part]) for part in (slice(sizes[0]), slice(sizes[0], None)))
    return StudyData(train, held_out, sizes[1], mean, scale)


def image_data(task: Task, data_path: str | None, device: torch.device) -> StudyData:
    """Load a subset of the images: the same for every seed.

    Raises:
        SettingsError: If files are missing or damaged, or there are fewer images than the task asks for.
    """
    data = load_dataset(
        task.source, data_path, use_test=True, validation=True, train_limit=task.train_limit, device=device
    )
    parts = []
    for split in (data.validation, data.test):
        assert isinstance(split, Split), "validation and test images were asked for, and fit into memory"
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(_SUBSET_SEED))[: task.eval_limit]
        parts.append(Split(split.inputs[order.to(device)], split.targets[order.to(device)]))
    assert isinstance(data.train, Split)
    held_out = Split.concatenate(parts)
    held_out = Split(held_out.inputs.to(memory_format=torch.channels_last), held_out.targets)  # several times as fast
    return StudyData(data.train, held_out, len(parts[0]), images=data)


def make_model(task: Task, data: StudyData, device: torch.device) -> nn.Module:
    """Make the task's network; initial weights come from torch's global generator."""
    if task.is_regression:
        return create_model(task.model, 1, in_features=data.train.inputs.shape[1], **task.options).to(device)
    assert data.images is not None
    shape = dict(channels=data.images.channels, image_size=data.images.image_size)
    model = build_model(task.model, data.images.num_classes, **shape, **task.options)
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def training_batches(task: Task, data: StudyData, generator: torch.Generator) -> Iterable[tuple[Tensor, Tensor]]:
    """Return one epoch's batches: images shifted, and photographs mirrored, at random."""
    if data.images is None:
        return data.train.shuffled(task.batch_size, generator)
    return TrainingBatches(data.images, task.batch_size, generator, *AUGMENTATION[task.source])


def bn_images(task: Task, data: StudyData) -> AsTrained:
    """Return the images that batch norm is recalibrated on: augmented as they were trained on."""
    assert data.images is not None
    return AsTrained(data.train.first(task.bn_limit), *AUGMENTATION[task.source], data.images.black)


def check(task: Task) -> Task:
    """Refuse a recipe that cannot run.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    if not task.epochs >= 2:
        raise SettingsError(f"--epochs must be at least 2, of which the runs share one half; got {task.epochs}")
    if not task.train_limit >= 2 * task.batch_size >= 4:
        raise SettingsError(
            f"{task.name}: --train_limit must be at least twice --batch_size, which must be at least 2; "
            f"got {task.train_limit} and {task.batch_size}"
        )
    require_positive(task, ("lr_init", "swa_lr"))
    if task.snapshots < 2:
        raise SettingsError(f"{task.name}: SWAG needs at least 2 snapshots, and gets {task.snapshots}: more --epochs")
    return task
