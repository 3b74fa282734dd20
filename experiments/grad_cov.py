"""Train a network as `experiments.train` does, and measure the noise of its gradients as it goes.

After every epoch from --grad_cov_start on, the weights stay fixed for one more pass over the training images, in
batches as they are trained on. From the gradients' covariance V, the trace of the noise tr V, the optimal constant
learning rate 2 (1 - momentum) D / (N tr V) for D weights and N images (Mandt, Hoffman and Blei, 2017), signal to noise,
the noise scale (the batch size at which noise is as large as signal), and the largest eigenvalues of V; with --swa and
--cov_mat also the share of the noise that lies along SWAG's principal directions. Weight decay has no noise.

Example:
  python -m experiments.grad_cov --dir runs/grad_cov --dataset MNIST --data_path DATA_DIR --model LeNet5 --use_test
      --epochs 30 --lr_init 0.05 --swa --swa_start 15 --swa_lr 0.01 --cov_mat --grad_cov_start 0

Writes what `experiments.train` writes, and grad_cov.json, grad_cov.csv, grad_cov.png. A run that was killed goes on
with --resume auto and ends with the same numbers.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import lowrank_bdl as lb
from experiments import train, train_settings
from experiments.common import RunDir, SettingsError, parse_settings, require_at_least, run_script, setting
from experiments.datasets import Datasets
from experiments.grad_cov_report import FILES, report
from experiments.train_setup import network, training_batches
from lowrank_bdl.training.trainer import Trainer

PROG = "python -m experiments.grad_cov"
DIRECTIONS = 5  # eigenvalues of the noise, and principal directions of SWAG, at most


@dataclass(frozen=True)
class Settings(train_settings.Settings):
    """The flags of a training run, and what is measured on its way."""

    grad_cov_start: int = setting(161, "measure after every epoch from this one on, counted from 0")
    grad_cov_freq: int = setting(1, "measure after every so many epochs")
    grad_cov_batches: int | None = setting(None, "batches in a measurement (default: all of an epoch)", kind=int)
    grad_cov_rank: int = setting(20, "newest gradients of a measurement that are kept, for eigenvalues and shares")
    bn_mode: str = setting(
        "train", "batch norm by the batch, as in training, or by its running statistics", choices=("train", "eval")
    )


def check(settings: Settings) -> Settings:
    """Refuse what cannot run.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    checked = train_settings.check(settings)
    assert isinstance(checked, Settings)
    require_at_least(checked, dict(grad_cov_start=0, grad_cov_freq=1, grad_cov_batches=2, grad_cov_rank=0))
    if checked.momentum >= 1:
        raise SettingsError(f"--momentum must be less than 1; got {checked.momentum}")
    if not measured(checked, checked.epochs):
        raise SettingsError(
            f"--grad_cov_start must be less than --epochs; got {checked.grad_cov_start} and {checked.epochs}"
        )
    for name, used in (("vi", checked.vi), ("loss adv_CE", checked.loss == "adv_CE")):
        if used:
            raise SettingsError(
                f"--{name}: the noise is that of the plain cross-entropy, which such a run does not train"
            )
    return checked


def measured(settings: Settings, epochs: int) -> list[int]:
    """Return the epochs, counted from 1, after which is measured."""
    return list(range(settings.grad_cov_start + 1, epochs + 1, settings.grad_cov_freq))


def include(settings: Settings) -> list[str] | None:
    return None if settings.include is None else settings.include.split(",")


def collector(settings: Settings, trainer: Trainer) -> lb.GradientCovariance:
    rank = settings.grad_cov_rank
    kept = include(settings)
    bn_mode: Any = settings.bn_mode
    try:
        return lb.GradientCovariance(network(trainer), cross_entropy, rank=rank, include=kept, bn_mode=bn_mode)
    except lb.MemoryLimitError as error:
        raise SettingsError(f"--grad_cov_rank {rank}: {error}") from None


def check_run(settings: Settings, trainer: Trainer, data: Datasets) -> None:
    """Refuse a run with too little memory or too few batches.

    Raises:
        SettingsError: Says which.
    """
    collector(settings, trainer)
    if len(data.train) <= settings.batch_size:
        raise SettingsError(
            f"--batch_size {settings.batch_size}: a covariance needs at least 2 batches; there are {len(data.train)} "
            "training images"
        )


def measure(settings: Settings, trainer: Trainer, data: Datasets) -> dict[str, Any]:
    """Measure the gradients at the present weights; what is random depends on seed and epoch alone.

    Returns:
        The entry ``grad_cov`` of the epoch's record, or nothing after an epoch that is not measured.
    """
    if trainer.epoch not in measured(settings, trainer.epoch):
        return {}
    generator = torch.Generator().manual_seed(settings.seed * 100_003 + trainer.epoch)
    noise = collector(settings, trainer)
    total = min(-(-len(data.train) // settings.batch_size), settings.grad_cov_batches or sys.maxsize)
    batches = islice(training_batches(settings, data, generator), total)
    for inputs, targets in tqdm(batches, "gradients", total, unit="batch", leave=False):
        noise.update((inputs.to(trainer.device), targets.to(trainer.device)))
    return {"grad_cov": summary(settings, noise, trainer, len(data.train))}


def summary(settings: Settings, noise: lb.GradientCovariance, trainer: Trainer, num_data: int) -> dict[str, Any]:
    """Return what a measurement says, as JSON; for batches of --batch_size images."""
    size = settings.batch_size
    found: dict[str, Any] = {
        "gradients": noise.num_gradients,
        "trace": noise.trace * noise.batch_size / size,
        "squared_gradient_norm": noise.squared_gradient_norm,
        "signal_to_noise": noise.signal_to_noise * size / noise.batch_size,
        "noise_scale": noise.noise_scale,
        "optimal_learning_rate": noise.optimal_learning_rate(settings.momentum, size, num_data=num_data),
    }
    kept = min(noise.rank, noise.num_gradients - 1)
    if kept > 0 and noise.trace > 0:
        values, _ = noise.recent_covariance.principal_components(min(DIRECTIONS, kept))
        found["eigenvalues"] = (values * noise.batch_size / size).tolist()
        found |= along_swag(noise, trainer)
    return found


def along_swag(noise: lb.GradientCovariance, trainer: Trainer) -> dict[str, float]:
    """Return the share of the noise along SWAG's principal directions, and their number, once there are any."""
    collection = trainer.collections.get("swag")
    swag = None if collection is None else collection.collector
    if not isinstance(swag, lb.SWAG) or swag.rank == 0 or swag.n_averaged < 2:
        return {}
    directions = min(DIRECTIONS, swag.n_averaged - 1, swag.rank)
    _, vectors = swag.posterior(scale=1.0).covariance.principal_components(directions)
    return {"swag_share": noise.alignment(vectors).sum().item(), "swag_directions": directions}


def work(settings: Settings) -> str:
    """Check everything, then train and measure; return what to print."""

    def write(run: RunDir, trainer: Trainer, data: Datasets) -> list[str]:
        title = f"{settings.model} on {data.name}"
        parameters = lb.ParameterLayout.from_module(network(trainer), include=include(settings)).numel
        return report(run, trainer.history, title, settings.batch_size, parameters)

    extra = train.Extra(
        FILES,
        lambda trainer, data: check_run(settings, trainer, data),
        lambda trainer, data: measure(settings, trainer, data),
        write,
    )
    return train.work(settings, extra)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads, go_on="--resume auto")


if __name__ == "__main__":
    sys.exit(main())
