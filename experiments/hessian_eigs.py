"""Extreme eigenvalues and the spectral density of the Hessian, GGN or Fisher matrix of a trained network.

The matrix is of the mean cross-entropy over training images without augmentation, read in one order at every product.
Both ends come from one Lanczos run, with the residual |A v - lambda v| of every pair; pairs above --tol times the
largest eigenvalue are reported as not converged. --file takes finished runs of `experiments.train` (a folder), its
checkpoints, and state dicts by torch.save; of several files, such as the checkpoints of one run, the eigenvalues are
drawn against the epoch. With --posterior also at samples from a posterior, and with batch-norm statistics recomputed
for each from training images augmented as they were trained on.

Examples:
  python -m experiments.hessian_eigs --file runs/lenet --dataset MNIST --data_path DATA_DIR --model LeNet5 --use_test
      --batch_size 1000 --dir runs/lenet-hessian
  python -m experiments.hessian_eigs --file runs/lenet/checkpoint-25.safetensors,runs/lenet/checkpoint-50.safetensors
      --dataset MNIST --data_path DATA_DIR --model LeNet5 --train_limit 5000 --dir runs/lenet-path
  python -m experiments.hessian_eigs --file runs/preresnet20 --data_path DATA_DIR --model PreResNet20 --train_limit 2000
      --posterior runs/preresnet20/posterior.safetensors --samples 3 --source SWA --dir runs/preresnet20-hessian

Writes to --dir: cells/NAME.json (one for each set of weights, so that a killed run goes on from there) and, while one
is worked on, lanczos-NAME.safetensors; eigs.npz, spectrum.png, along.png (of several), log.jsonl, results.json (last),
settings.json, environment.json, command.sh
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import lowrank_bdl as lb
from experiments import hessian_report
from experiments.common import (
    RunDir,
    SettingsError,
    fixed,
    parse_settings,
    require_at_least,
    resolve_device,
    run_script,
    setting,
)
from experiments.datasets import Datasets, load_dataset
from experiments.evaluation import BN_BATCH_SIZE, has_batch_norm
from experiments.hessian_points import LAST, Point, points_of, samples_of
from experiments.models import build_model
from experiments.train_setup import AUGMENTATION
from experiments.training_data import AsTrained
from experiments.uncertainty_settings import names

PROG = "python -m experiments.hessian_eigs"
OUTPUTS = (
    "results.json", "log.jsonl", "cells/*.json", "lanczos-*.safetensors", "eigs.npz", "spectrum.png", "along.png",
)  # fmt: skip
OPERATORS = ("hessian", "ggn", "fisher", "empirical_fisher")


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is computed."""

    dir: str = setting("runs/hessian_eigs", "folder to write to", free=True, alias="--save_path")
    file: str | None = setting(None, "weights; several files or folders are separated by commas", kind=str)
    source: str = setting(LAST, "which weights of a finished run: last, or SWA, EMA, ... as its results.json has them")
    posterior: str | None = setting(None, "also at samples of this posterior (posterior.safetensors)", kind=str)
    samples: int = setting(3, "samples of --posterior")
    dataset: str = setting("CIFAR10", "data set")
    data_path: str | None = setting(None, "folder with the data set's files (none for digits)", kind=str, free=True)
    use_test: bool = setting(False, "the run was trained on all training images (with --use_test)")
    split_classes: int | None = setting(None, "half of the classes of CIFAR10", kind=int, choices=(0, 1))
    train_limit: int | None = setting(None, "use so many training images only", kind=int)
    batch_size: int = setting(128, "images in a batch; of the result only with --bn_mode train")
    num_workers: int = setting(4, "processes that read images which do not fit into memory", free=True)
    model: str = setting("VGG16", "network")
    operator: str = setting("hessian", "which matrix; fisher is the expected one", choices=OPERATORS)
    include: str | None = setting(None, "parameters that count, as name patterns separated by commas", kind=str)
    bn_mode: str = setting(
        "eval", "batch norm by its running statistics, or by the batch's as in training", choices=("eval", "train")
    )
    num_eigs: int = setting(20, "largest eigenvalues")
    num_bottom: int = setting(5, "smallest (most negative) eigenvalues")
    tol: float = setting(1e-3, "residual of a converged pair, as a fraction of the largest eigenvalue")
    max_products: int = setting(300, "most products with a vector for the eigenvalues of one set of weights")
    density_probes: int = setting(1, "random vectors for the spectral density; 0 leaves it out")
    density_steps: int = setting(60, "products for each of these")
    bn_size: int = setting(5000, "images that batch norm is recomputed from where the weights have no statistics")
    save_vectors: bool = setting(False, "write the eigenvectors into eigs.npz too")
    checkpoint_every: int = setting(20, "products between two checkpoints", free=True)
    seed: int = setting(1, "seed of start vectors, probes and samples")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA where there is some", free=True)
    threads: int = setting(0, "CPU threads, 0 for torch's choice", free=True)
    resume: bool = setting(False, "go on with the run in --dir", free=True)


def check(settings: Settings) -> Settings:
    """Refuse what cannot run.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    at_least = dict(
        samples=1, train_limit=1, batch_size=1, num_workers=0, num_eigs=0, num_bottom=0, density_probes=0,
        density_steps=1, bn_size=2, checkpoint_every=1, seed=0, threads=0,
    )  # fmt: skip
    require_at_least(settings, at_least)
    if not 0 < settings.tol < 1:
        raise SettingsError(f"--tol must be between 0 and 1; got {settings.tol}")
    wanted = settings.num_eigs + settings.num_bottom
    if wanted + settings.density_probes == 0:
        raise SettingsError("nothing to compute: --num_eigs, --num_bottom and --density_probes are all 0")
    if settings.max_products < wanted:
        raise SettingsError(f"--max_products must be at least {wanted}, one a pair; got {settings.max_products}")
    if not files(settings) and settings.posterior is None:
        raise SettingsError("--file or --posterior is needed: where the weights are")
    return settings


def files(settings: Settings) -> list[str]:
    return list(names(settings.file or ""))


def load_images(settings: Settings, device: torch.device) -> Datasets:
    return load_dataset(
        settings.dataset,
        settings.data_path,
        use_test=settings.use_test,
        split_classes=settings.split_classes,
        train_limit=settings.train_limit,
        num_workers=settings.num_workers,
        device=device,
    )


def make_network(settings: Settings, data: Datasets, device: torch.device) -> nn.Module:
    torch.manual_seed(settings.seed)
    model = build_model(settings.model, data.num_classes, channels=data.channels, image_size=data.image_size)
    return model.to(device)


def find_points(settings: Settings, model: nn.Module) -> list[Point]:
    """Read all weights before anything is written."""
    points = points_of(files(settings), settings.source, model)
    if settings.posterior is not None:
        base = points[0] if points else None
        points += samples_of(settings.posterior, settings.samples, settings.seed, base, model)
    return points


def load_point(settings: Settings, point: Point, model: nn.Module, data: Datasets) -> None:
    """Write weights into the network, and batch-norm statistics that belong to them."""
    point.load_(model)
    if point.needs_batch_norm and settings.bn_mode == "eval" and has_batch_norm(model):
        images = data.train.first(min(settings.bn_size, len(data.train)))
        max_shift, flip = AUGMENTATION.get(settings.dataset, (0, False))
        lb.recalibrate_batch_norm_(model, AsTrained(images, max_shift, flip, data.black).batches(BN_BATCH_SIZE))


def layout_of(settings: Settings, model: nn.Module) -> lb.ParameterLayout:
    """Return the parameters that count.

    Raises:
        SettingsError: If --include keeps nothing, or more eigenvalues are asked for than there are.
    """
    try:
        layout = lb.ParameterLayout.from_module(
            model, None if settings.include is None else settings.include.split(",")
        )
    except lb.ShapeError as error:
        raise SettingsError(f"--include {settings.include}: {error}") from None
    wanted = settings.num_eigs + settings.num_bottom
    if wanted > layout.numel:
        raise SettingsError(f"--num_eigs, --num_bottom: the matrix has {layout.numel} eigenvalues; got {wanted}")
    return layout


def make_operator(settings: Settings, model: nn.Module, data: Datasets, layout: lb.ParameterLayout) -> Any:
    """Make the matrix of the network as it is."""
    images = data.train.batches(settings.batch_size)
    options: dict[str, Any] = {"bn_mode": settings.bn_mode, "layout": layout}
    if settings.operator == "hessian":
        return lb.HessianLinearOperator(model, cross_entropy, images, **options)
    if settings.operator == "ggn":
        return lb.GGNLinearOperator(model, cross_entropy, images, **options)
    kind = "expected" if settings.operator == "fisher" else "empirical"
    return lb.FisherLinearOperator(model, "categorical", images, kind=kind, **options)


def eigenpairs(settings: Settings, point: Point, matrix: Any, run: RunDir) -> "lb.Eigenpairs | None":
    """Run Lanczos for both ends, from the checkpoint if there is one."""
    top, bottom = settings.num_eigs, settings.num_bottom
    if top + bottom == 0:
        return None
    with tqdm(total=settings.max_products, desc=f"{point.label}: eigenvalues", unit="product", leave=False) as bar:

        def show(progress: Any) -> None:
            bar.n = progress.num_matvecs
            worst = progress.residuals.max().item() if len(progress.residuals) else math.nan
            bar.set_postfix_str(f"{progress.num_converged} of {top + bottom} pairs, worst residual {worst:.1e}")

        file = run.path / f"lanczos-{point.name}.safetensors"
        return lb.lanczos(
            matrix,
            (top, bottom),
            tol=settings.tol,
            max_matvecs=settings.max_products,
            generator=torch.Generator(matrix.device).manual_seed(settings.seed),
            checkpoint=file,
            checkpoint_every=settings.checkpoint_every,
            resume=file.exists(),
            callback=show,
        )


def density_of(settings: Settings, point: Point, matrix: Any) -> "lb.SpectralDensity | None":
    if settings.density_probes == 0:
        return None
    total = settings.density_probes * min(settings.density_steps, matrix.shape[0])
    with tqdm(total=total, desc=f"{point.label}: density", unit="product", leave=False) as bar:
        return lb.spectral_density(
            matrix,
            settings.density_probes,
            settings.density_steps,
            generator=torch.Generator(matrix.device).manual_seed(settings.seed + 1),
            progress=lambda done: bar.update(done - bar.n) or None,
        )


def run_cell(
    settings: Settings, point: Point, model: nn.Module, data: Datasets, layout: lb.ParameterLayout, run: RunDir
) -> dict[str, Any]:
    """Compute everything at one set of weights, and write its cell."""
    began = time.perf_counter()
    load_point(settings, point, model, data)
    matrix = make_operator(settings, model, data, layout)
    pairs = eigenpairs(settings, point, matrix, run)
    solved = time.perf_counter()
    density = density_of(settings, point, matrix)
    cell: dict[str, Any] = {
        "name": point.name,
        "label": point.label,
        "epoch": point.epoch,
        "parameters": matrix.shape[0],
        "images": len(data.train),
        "recipe": recipe_of(settings),
        "seconds": {"eigenvalues": solved - began, "density": time.perf_counter() - solved},
    }
    if pairs is not None:
        cell |= {
            "eigenvalues": pairs.eigenvalues.tolist(),
            "residuals": pairs.residuals.tolist(),
            "converged": pairs.converged.tolist(),
            "products": pairs.num_matvecs,
        }
        if settings.save_vectors:
            hessian_report.save_vectors(run.path, point.name, pairs.eigenvectors)
    if density is not None:
        trace = density.integrate(lambda value: value)
        cell["density"] = {
            "nodes": density.nodes.tolist(),
            "weights": density.weights.tolist(),
            "trace": float(trace.value),
            "trace_se": float(trace.standard_error),
            "products": density.num_matvecs,
        }
    run.write_json(cell_file(point), cell)
    (run.path / f"lanczos-{point.name}.safetensors").unlink(missing_ok=True)
    run.log(point=point.name, seconds=cell["seconds"])
    return dict(json.loads(json.dumps(cell)))


def cell_file(point: Point) -> str:
    return f"cells/{point.name}.json"


def recipe_of(settings: Settings) -> dict[str, Any]:
    """Return the settings that a cell depends on."""
    return {name: value for name, value in fixed(settings).items() if name not in ("file", "samples")}


def work(settings: Settings) -> str:
    """Check everything, then compute what is left; return what to print."""
    device = resolve_device(settings.device)
    run = RunDir(settings, OUTPUTS, device)
    data = load_images(settings, device)
    model = make_network(settings, data, device)
    points = find_points(settings, model)
    layout = layout_of(settings, model)
    cells = {
        point.name: run.read_cell(cell_file(point), recipe_of(settings)) if settings.resume else None
        for point in points
    }
    run.begin()
    (run.path / "cells").mkdir(exist_ok=True)
    for point in tqdm(points, "weights", unit="set", disable=len(points) == 1):
        if cells[point.name] is None:
            try:
                cells[point.name] = run_cell(settings, point, model, data, layout, run)
            except lb.LowRankBDLError as error:
                raise SettingsError(f"{point.label}: {' '.join(str(error).split())}") from None
    done = [cell for cell in cells.values() if cell is not None]
    title = f"{settings.operator} of {settings.model} on {data.name}, {len(data.train):,} training images"
    text, figures = hessian_report.report(run.path, done, title, settings.tol)
    run.write_json(
        "results.json",
        {
            "schema": 1,
            "settings": dataclasses.asdict(settings),
            "data": data.facts,
            "figures": figures,
            "cells": done,
        },
    )
    return f"{text}\n\nwritten to {run.path}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the analysis; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
