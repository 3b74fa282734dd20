"""Train a network with SGD, collect SWA and SWAG from its iterates, and compare what they predict.

SGD        the last iterate
SWA        the mean of the iterates collected every --swa_c_epochs epochs from --swa_start on
SWAG-Diag  a Gaussian around that mean with the iterates' variances (scale 1, rank 0)
SWAG       the same with --max_num_models deviations in its covariance (--cov_mat, --scale)
EMA        an exponential average of every iterate (--ema)
Polyak     the equal average of every iterate from --swa_start on (--polyak)
Snapshots  an ensemble of the collected iterates themselves (--snapshots)
SGLD, SGHMC  the last iterate of a chain whose iterates are draws from the posterior (--optimizer); the collected
           ones, after --swa_start, are the sample (--snapshots), SWA is their mean
mean, MFVI   mean-field variational inference (--vi): the network at the mean, and draws

Batch-norm statistics are recomputed from training images, augmented as they were trained on, for every set of weights.
The report is on the test images with --use_test, else on the validation images held out of the training images (the
last 5,000); nothing is chosen on either. A run that was killed goes on with --resume auto and ends with the same
numbers.

Examples:
  python -m experiments.train --dir runs/digits --dataset digits --model SmallConvNet --epochs 60 --batch_size 32
      --lr_init 0.05 --swa --swa_start 30 --swa_lr 0.02 --cov_mat
  python -m experiments.train --dir runs/lenet --dataset MNIST --data_path DATA_DIR --model LeNet5 --use_test
      --epochs 50 --lr_init 0.05 --swa --swa_start 25 --swa_lr 0.01 --cov_mat --ema
  python -m experiments.train --dir runs/vgg16 --dataset CIFAR10 --data_path DATA_DIR --model VGG16 --use_test
      --epochs 300 --lr_init 0.05 --wd 5e-4 --swa --swa_start 161 --swa_lr 0.01 --cov_mat --resume auto
  python -m experiments.train --dir runs/sgld --dataset digits --model SmallConvNet --epochs 20 --init_from runs/digits
      --optimizer SGLD --lr_init 0.01 --no_schedule --swa --swa_start 5 --snapshots
  python -m experiments.train --dir runs/vi --dataset digits --model SmallConvNet --epochs 20 --init_from runs/digits
      --vi --temperature 0.01 --lr_init 0.001

Writes to --dir: checkpoint.safetensors, checkpoint-EPOCH.safetensors, posterior.safetensors (of --swa or --vi),
snapshots.safetensors (of --snapshots), weights.safetensors (every weight vector that is compared, and the buffers of
the last iterate; see experiments.train_weights), log.jsonl, training.png, reliability.png, results.json (last),
settings.json, environment.json, command.sh
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lowrank_bdl as lb
from experiments.common import RunDir, SettingsError, parse_settings, resolve_device, run_script
from experiments.datasets import Datasets, load_dataset
from experiments.evaluation import validate
from experiments.train_report import report, weight_sources, weights_of
from experiments.train_settings import Settings, check, identity
from experiments.train_setup import bn_images, make_trainer, network, training_batches, try_model
from experiments.train_weights import WEIGHTS, read_start, write_weights
from lowrank_bdl.training import checkpoints
from lowrank_bdl.training.trainer import Record, Trainer

PROG = "python -m experiments.train"
CHECKPOINT, POSTERIOR, SNAPSHOTS = "checkpoint.safetensors", "posterior.safetensors", "snapshots.safetensors"
OUTPUTS = (
    "results.json",
    "log.jsonl",
    POSTERIOR,
    SNAPSHOTS,
    WEIGHTS,
    "checkpoint*.safetensors",
    "training.png",
    "reliability.png",
)


def find_checkpoint(settings: Settings) -> Path | None:
    """Return the checkpoint to go on from, or None to begin."""
    if settings.resume is None:
        return None
    if settings.resume == "auto":
        path = Path(settings.dir) / CHECKPOINT
        return path if path.exists() else None
    path = Path(settings.resume)
    if not path.is_file():
        raise SettingsError(f"--resume {path}: there is no such file")
    return path


def unfinished(settings: Settings) -> bool:
    """Tell whether --resume auto finds a run in --dir, be it without a checkpoint yet."""
    return settings.resume == "auto" and (Path(settings.dir) / "settings.json").exists()


def load_data(settings: Settings, device: torch.device) -> Datasets:
    return load_dataset(
        settings.dataset,
        settings.data_path,
        use_test=settings.use_test,
        split_classes=settings.split_classes,
        label_arr=settings.label_arr,
        train_limit=settings.train_limit,
        num_workers=settings.num_workers,
        device=device,
    )


def restore(settings: Settings, trainer: Trainer, path: Path | None) -> dict[str, Any]:
    """Put the trainer where it starts: at --init_from, --swa_resume or the checkpoint; nothing is written.

    Returns:
        What checkpoints are compared by: settings, and the start weights by their content, wherever they lie.
    """
    facts = identity(settings)
    if settings.init_from is not None:
        start = read_start(settings.init_from, network(trainer))
        start.load_into_(network(trainer), start.start)
        facts["init_from"] = start.digest()
    if path is None:
        carry_over(settings, trainer)
        return facts
    try:
        trainer.load(path, facts)
    except (lb.CheckpointError, OSError) as error:
        raise SettingsError(f"--resume: {' '.join(str(error).split())}") from None
    if trainer.epoch > settings.epochs:
        raise SettingsError(f"--epochs {settings.epochs}: {path} has done {trainer.epoch} already")
    return facts


def carry_over(settings: Settings, trainer: Trainer) -> None:
    """Load the collected weights of --swa_resume."""
    if settings.swa_resume is None:
        return
    try:
        state, _, _ = checkpoints.read(settings.swa_resume)
        for name in ("swag", "snapshots") if settings.snapshots else ("swag",):
            if name not in state["collections"]:
                raise SettingsError(f"--swa_resume {settings.swa_resume}: it has not collected {name}")
            trainer.collections[name].collector.load_state_dict(state["collections"][name])
    except (lb.CheckpointError, RuntimeError, KeyError, OSError) as error:
        raise SettingsError(f"--swa_resume {settings.swa_resume}: {' '.join(str(error).split())}") from None


def held_out(data: Datasets) -> Any:
    """Return what is evaluated while training: validation images, or the test images where none are held out."""
    return data.test if data.validation is None else data.validation


@dataclass(frozen=True)
class Extra:
    """What another script adds to a training run.

    Attributes:
        outputs: Names of the files that it writes.
        check: Refuses a trainer or data that it cannot measure, before anything is written.
        measure: Gives more for the record of an epoch (JSON) after it; a function of weights, collections and epoch.
        report: Writes its files from the finished history; gives the lines to print.
    """

    outputs: tuple[str, ...] = ()
    check: Callable[[Trainer, Datasets], None] = lambda trainer, data: None
    measure: Callable[[Trainer, Datasets], dict[str, Any]] = lambda trainer, data: {}
    report: Callable[[RunDir, Trainer, Datasets], list[str]] = lambda run, trainer, data: []


def train(
    settings: Settings,
    run: RunDir,
    trainer: Trainer,
    data: Datasets,
    facts: dict[str, Any],
    measure: Callable[[Trainer, Datasets], dict[str, Any]],
) -> None:
    """Train to the last epoch: a line in log.jsonl for each, a checkpoint every --checkpoint_freq."""
    run.write_log(trainer.history)
    began = time.perf_counter()

    def after_epoch(trainer: Trainer, record: Record) -> dict[str, Any]:
        nonlocal began
        extra: dict[str, Any] = {}
        if trainer.epoch % settings.eval_freq == 0 or trainer.epoch == settings.epochs:
            extra["held_out"] = validate(trainer.model, held_out(data))
            swag = trainer.collections["swag"].collector if settings.swa else None
            if isinstance(swag, lb.SWAG) and swag.n_averaged > 0:
                extra["held_out_swa"] = evaluate_weights(settings, trainer, data, swag.mean, swag.layout)
        extra |= measure(trainer, data)
        extra["seconds"] = time.perf_counter() - began
        began = time.perf_counter()
        run.log(**record, **extra)
        return extra

    trainer.fit(
        lambda generator: training_batches(settings, data, generator),
        settings.epochs,
        after_epoch=after_epoch,
        checkpoint=run.path / CHECKPOINT,
        save_every=settings.checkpoint_freq,
        keep_every=settings.save_freq,
        settings=facts,
        description=settings.model,
    )


def evaluate_weights(
    settings: Settings, trainer: Trainer, data: Datasets, theta: torch.Tensor, layout: lb.ParameterLayout
) -> dict[str, float]:
    """NLL [nats] and accuracy of one weight vector on the held-out images."""
    prediction = lb.predict(
        trainer.model,
        theta,
        held_out(data).batches(500),
        bn_loader=bn_images(settings, data).batches(500),
        layout=layout,
        progress=False,
    )
    return {"nll": prediction.nll, "accuracy": prediction.accuracy}


def experiment(
    settings: Settings, data: Datasets, run: RunDir, trainer: Trainer, facts: dict[str, Any], extra: Extra
) -> str:
    """Train, evaluate, draw, and write results.json last; return the tables."""
    train(settings, run, trainer, data, facts, extra.measure)
    sources = weight_sources(settings, trainer)
    for name in ("MFVI", "SWAG", "SWAG-Diag"):
        if name in sources:
            sources[name].save(run.path / POSTERIOR)
            break
    if "Snapshots" in sources:
        sources["Snapshots"].save(run.path / SNAPSHOTS)
    write_weights(run.path / WEIGHTS, weights_of(trainer, sources))
    more = extra.report(run, trainer, data)
    return "\n".join([report(settings, run, trainer, data, sources, bn_images(settings, data)), *more])


def work(settings: Settings, extra: Extra | None = None) -> str:
    """Check everything, then run the experiment; return what to print."""
    extra = extra or Extra()
    device = resolve_device(settings.device)
    path = find_checkpoint(settings)
    own = path is not None and path.parent.resolve() == Path(settings.dir).resolve()
    run = RunDir(settings, (*OUTPUTS, *extra.outputs), device, resuming=own or unfinished(settings))
    data = load_data(settings, device)
    trainer = make_trainer(settings, data, device)
    try_model(trainer.model, data)
    extra.check(trainer, data)
    facts = restore(settings, trainer, path)
    run.begin()
    return f"{experiment(settings, data, run, trainer, facts, extra)}\n\nwritten to {run.path}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads, go_on="--resume auto")


if __name__ == "__main__":
    sys.exit(main())
