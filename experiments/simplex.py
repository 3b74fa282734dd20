"""Grow simplexes of low loss from trained networks, and compare ensembles of them with ensembles of the networks.

deep ensemble   the networks themselves, one a component
1-simplex, ...  predictions averaged over --num_samples random points of a simplex grown from each network (ESPRO)

A simplex grows vertex by vertex (SPRO, Benton et al., 2021): a new vertex starts beside the centroid of the others, and
is trained with them fixed, on the mean loss of random points of the simplex less --volume times its log-volume.
Ensembles of different dimensions are compared at equal numbers of components; the table also says how many networks a
prediction costs. With --connect the networks are also joined into one complex by shared connecting points, whose loss
is set against that midway on the straight lines. Batch-norm statistics are recomputed at every point from training
images, augmented as they were trained on. Nothing is chosen on the images that are reported.

Examples:
  python -m experiments.simplex --toy two_spirals --n_verts 4 --connect 2 --dir runs/spirals-simplex
  python -m experiments.simplex --dataset digits --model SmallConvNet --endpoint_epochs 60 --epochs 10
      --dir runs/digits-simplex
  python -m experiments.simplex --run runs/lenet-1,runs/lenet-2,runs/lenet-3 --connect 2 --dir runs/lenet-simplex
  python -m experiments.simplex --model VGG16 --dataset CIFAR10 --data_path DATA_DIR --use_test --n_component 8
      --n_verts 4 --base_epochs 300 --base_lr 0.05 --wd 5e-4 --simplex_epochs 10 --n_sample 5 --dir runs/vgg16-simplex

Writes to --dir: simplex-COMPONENT.safetensors and complex.safetensors (read by lowrank_bdl.load_posterior),
predictions-COMPONENT-DIMENSION.npz, values-NAME.npz, ensembles.png, simplex.png, of the toy decisions.png, table.txt,
log.jsonl, checkpoint-NAME.safetensors, network-N/ (runs of experiments.train, where they are made here), results.json
(last), settings.json, environment.json, command.sh
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from experiments import simplex_plots, simplex_report
from experiments.common import RunDir, SettingsError, parse_settings, resolve_device, run_script, write_atomically
from experiments.curve_bench import Bench, digest_of, given_points, open_bench
from experiments.simplex_bench import (
    COMPLEX,
    base_runs,
    first_vertices,
    grown,
    point_values,
    predictions,
    random_points,
    train_networks,
)
from experiments.simplex_settings import Settings, check
from experiments.uncertainty_members import is_finished
from lowrank_bdl.errors import LowRankBDLError
from lowrank_bdl.surfaces.simplicial_complex import SimplicialComplex
from lowrank_bdl.surfaces.surface_ensemble import SurfaceEnsemble

PROG = "python -m experiments.simplex"
OUTPUTS = (
    "results.json", "log.jsonl", "table.txt", "simplex-*.safetensors", f"{COMPLEX}.safetensors",
    "checkpoint-*.safetensors", "predictions-*.npz", "values-*.npz", "ensembles.png", "simplex.png", "decisions.png",
)  # fmt: skip


def halfway(count: int) -> Tensor:
    """Return the coefficients of the points halfway between any two of the networks."""
    pairs = list(combinations(range(count), 2))
    found = torch.zeros(len(pairs), count, dtype=torch.float64)
    for row, (i, j) in enumerate(pairs):
        found[row, i] = found[row, j] = 0.5
    return found


def connected(bench: Bench, run: RunDir, modes: list[Tensor]) -> tuple[dict[str, Any], dict[str, float]]:
    """Join the networks by shared points; measure the complex, and the middles of the straight lines."""
    surface = grown(bench, run, COMPLEX, modes, bench.settings.connect, bench.settings.connect_epochs, stream=0)
    values = point_values(bench, run, COMPLEX, surface, random_points(bench, surface))
    plain = SimplicialComplex(modes, layout=bench.layout)
    straight = point_values(bench, run, "straight", plain, halfway(len(modes)))
    return simplex_report.points_of(bench, surface, values), simplex_report.midway(bench, straight)


def draw(bench: Bench, run: RunDir, surfaces: list[SimplicialComplex], found: dict[str, Any], title: str) -> None:
    settings = bench.settings
    simplex_plots.ensembles(run.path / "ensembles.png", found, bench.shown, title)
    if settings.picture >= 2 and settings.n_verts >= 3:
        coefficients = simplex_plots.picture_points(settings.n_verts, settings.picture)
        loss = point_values(bench, run, "picture", surfaces[0], coefficients)["train"].regularized(bench.weight_decay)
        label = "training loss, regularised [nats]"
        simplex_plots.picture(run.path / "simplex.png", surfaces[0], loss, settings.picture, label, title)
    if settings.toy is not None:
        networks = torch.stack([surface.vertices[0] for surface in surfaces])
        shown: dict[str, Any] = {"one network": networks[:1], f"deep ensemble of {len(networks)}": networks}
        if settings.n_verts > 1:
            shown[f"{len(surfaces)} simplexes of {settings.n_verts} vertices"] = SurfaceEnsemble(surfaces)
        simplex_plots.decisions(run.path / "decisions.png", bench, shown)


def experiment(bench: Bench, run: RunDir, modes: list[Tensor]) -> str:
    """Train, grow, evaluate, draw, and write results.json last; return the tables."""
    settings, began = bench.settings, time.perf_counter()
    modes = modes or train_networks(bench, run)
    based = time.perf_counter()
    surfaces = [
        grown(bench, run, f"simplex-{number}", [mode], settings.n_verts - 1, settings.epochs, stream=number)
        for number, mode in enumerate(modes, start=1)
    ]
    joined, between = connected(bench, run, modes) if settings.connect else (None, None)
    trained = time.perf_counter()
    every = {
        (number, dimension): predictions(bench, run, number, dimension, first_vertices(surface, dimension + 1))
        for number, surface in enumerate(surfaces, start=1)
        for dimension in range(settings.n_verts)
    }
    found = simplex_report.ensembles(every, settings.num_samples, settings.seed)
    points = {
        f"simplex {number}": simplex_report.points_of(
            bench, surface, point_values(bench, run, f"simplex-{number}", surface, random_points(bench, surface))
        )
        for number, surface in enumerate(surfaces, start=1)
        if settings.n_verts > 1
    }
    if joined is not None:
        points[COMPLEX] = joined
    title = f"{bench.recipe.model} on {bench.data.name}"
    draw(bench, run, surfaces, found, title)
    parts = [f"{title}: {bench.layout.numel:,} weights", simplex_report.ensemble_table(found, bench.shown)]
    if points:
        parts.append(simplex_report.point_table(points, between, bench.shown))
    text = "\n\n".join(parts)
    write_atomically(run.path / "table.txt", text + "\n")
    run.write_json(
        "results.json",
        {
            "schema": 1,
            "settings": dataclasses.asdict(settings),
            "recipe": dataclasses.asdict(bench.recipe),
            "data": bench.data.facts,
            "reported_on": bench.shown,
            "parameters": bench.layout.numel,
            "weight_decay": bench.weight_decay,
            "networks": digest_of(modes),
            "ensembles": found,
            "points": points,
            "midway": between,
            "seconds": {
                "networks": based - began, "simplexes": trained - based, "evaluate": time.perf_counter() - trained,
            },
        },
    )  # fmt: skip
    return text


def work(settings: Settings) -> str:
    """Check everything, then grow and measure; return what to print."""
    device = resolve_device(settings.device)
    run = RunDir(settings, OUTPUTS, device)
    bench = open_bench(settings, device)  # type: ignore[arg-type]
    modes = given_points(bench)
    if not modes and settings.toy is None:
        for own in base_runs(bench):
            is_finished(own)  # refuses a folder with another run
    run.begin()
    try:
        return f"{experiment(bench, run, modes)}\n\nwritten to {run.path}"
    except LowRankBDLError as error:
        raise SettingsError(" ".join(str(error).split())) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
