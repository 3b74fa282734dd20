"""The flags of training with a consistency loss, which `semi_supervised` and `domain_adaptation` share."""

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from experiments.common import SettingsError, require_at_least, setting
from experiments.seed_study import check_seeds

R = TypeVar("R", bound="Recipe")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a network is trained; the names are those of the released script."""

    dir: str = setting(dataclasses.MISSING, "folder to write to", kind=str, free=True)
    data_path: str | None = setting(None, "folder with the data sets' files (none for digits)", kind=str, free=True)
    use_test: bool = setting(False, "train on all training images and measure on the test images")
    train_limit: int | None = setting(None, "use so many training images only, with and without labels", kind=int)
    eval_limit: int | None = setting(None, "measure on so many images only", kind=int)
    model: str = setting("LeNet5", "network, such as LeNet5, PreResNet20, SmallConvNetDrop")
    epochs: int = setting(20, "epochs before the cycles; one is a pass over the images without labels")
    num_cycles: int = setting(4, "cycles of the learning rate after them")
    cycle_interval: int = setting(5, "epochs of a cycle, whose rates are the last ones before the cycles again")
    fastswa_frequencies: int = setting(1, "epochs between two collections of fast-SWA; SWA collects once a cycle")
    batch_size: int = setting(100, "images in a training batch")
    labeled_batch_size: int = setting(50, "of which so many have labels")
    lr: float = setting(0.05, "highest learning rate; a cosine would bring it to 0 after epochs + cycle_interval")
    momentum: float = setting(0.9, "momentum of Nesterov's kind")
    weight_decay: float = setting(1e-4, "weight decay")
    consistency: float = setting(100.0, "weight of the consistency loss")
    consistency_type: str = setting("mse", "distance of two predictions", choices=("mse", "kl"))
    consistency_rampup: float = setting(5.0, "epochs in which that weight rises")
    ema_decay: float = setting(0.97, "decay a step of the average that is the Mean Teacher")
    max_num_models: int = setting(20, "rank of SWAG")
    num_samples: int = setting(30, "weight samples of SWAG")
    bn_size: int = setting(10_000, "training images that batch norm is recalibrated on")
    eval_freq: int = setting(5, "epochs between two measurements while training")
    seeds: int = setting(3, "seeds: of the choice of labels, weights and order of the data", free=True)
    first_seed: int = setting(0, "the first of them", free=True)
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA where there is some", free=True)
    threads: int = setting(0, "CPU threads, 0 for torch's choice", free=True)
    resume: bool = setting(False, "go on with the run in --dir, at the last checkpoint", free=True)

    @property
    def all_epochs(self) -> int:
        return self.epochs + self.num_cycles * self.cycle_interval

    @property
    def collected_from(self) -> int:
        """The epoch after which averages begin: a cycle's length before the cycles."""
        return self.epochs - self.cycle_interval


def check_recipe(recipe: R) -> R:
    """Refuse what cannot run."""
    check_seeds(recipe)
    least: dict[str, Any] = dict(
        epochs=1, num_cycles=0, cycle_interval=1, fastswa_frequencies=1, batch_size=2, labeled_batch_size=1, lr=0,
        momentum=0, weight_decay=0, consistency=0, consistency_rampup=0, ema_decay=0, max_num_models=1, num_samples=1,
        bn_size=2, eval_freq=1, threads=0, train_limit=1, eval_limit=1,
    )  # fmt: skip
    require_at_least(recipe, least)
    for name in ("momentum", "ema_decay"):
        if getattr(recipe, name) >= 1:
            raise SettingsError(f"--{name} must be less than 1; got {getattr(recipe, name)}")
    if recipe.labeled_batch_size >= recipe.batch_size:
        expected = f"--labeled_batch_size must be less than --batch_size {recipe.batch_size}"
        raise SettingsError(f"{expected}; got {recipe.labeled_batch_size}")
    if recipe.cycle_interval > recipe.epochs:
        raise SettingsError(f"--cycle_interval must be at most --epochs {recipe.epochs}; got {recipe.cycle_interval}")
    collected = (recipe.all_epochs - recipe.collected_from) // recipe.fastswa_frequencies
    if collected < 2:
        raise SettingsError(
            f"--fastswa_frequencies {recipe.fastswa_frequencies} collects {collected} times in the last "
            f"{recipe.all_epochs - recipe.collected_from} epochs; SWAG needs at least 2"
        )
    return recipe
