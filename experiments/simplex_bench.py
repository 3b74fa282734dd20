"""What `experiments.simplex` works with: the networks, the simplexes grown from them, and what these predict."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import lowrank_bdl as lb
from experiments import train
from experiments.common import RunDir, SettingsError, fixed, replacing
from experiments.curve_bench import Bench, digest_of, fit, read_values, toy_network, write_values
from experiments.evaluation import BN_BATCH_SIZE, Predictions, has_batch_norm, predict_splits
from experiments.hessian_points import read_point
from experiments.simplex_settings import Settings
from experiments.train_setup import bn_images
from experiments.uncertainty_members import TrainSettings, is_finished
from lowrank_bdl.surfaces.evaluation import PointValues, evaluate_points
from lowrank_bdl.surfaces.simplicial_complex import SimplicialComplex
from lowrank_bdl.surfaces.surface_model import SurfaceModel
from lowrank_bdl.training import losses

COMPLEX = "complex"  # name of what --connect makes


def base_runs(bench: Bench) -> list[TrainSettings]:
    """Return the training runs of the networks where none are given, each with a seed and a folder of its own."""
    settings, folder = bench.settings, Path(bench.settings.dir)
    return [
        dataclasses.replace(bench.recipe, dir=str(folder / f"network-{number}"), seed=100 * settings.seed + number)
        for number in range(1, settings.n_component + 1)
    ]


def train_networks(bench: Bench, run: RunDir) -> list[Tensor]:
    """Train the networks, or what is left of them; return their weights, each (D,)."""
    if bench.settings.toy is not None:
        return [toy_network(bench, run, number) for number in range(bench.settings.n_component)]
    found = []
    for own in base_runs(bench):
        if not is_finished(own):
            train.work(own)
        read_point(Path(own.dir), bench.settings.source, bench.model).load_(bench.model)
        found.append(bench.layout.flatten(bench.model))
    return found


# ---- growth ----------------------------------------------------------------------------------------------------------


def recipe_of(settings: Settings, *points: Tensor) -> str:
    """Return what a file of this run depends on, as one string."""
    return json.dumps([fixed(settings), digest_of([point.detach() for point in points])])


def grown(
    bench: Bench, run: RunDir, name: str, modes: Sequence[Tensor], num_new: int, epochs: int | None, stream: int
) -> SimplicialComplex:
    """Grow vertices one by one from modes that they all join, or go on where an earlier part of the run stopped.

    Args:
        bench: Network, images and settings.
        run: Its folder gets ``NAME.safetensors``, anew after every vertex.
        name: Of the file.
        modes: Trained networks, each (D,).
        num_new: Vertices to add.
        epochs: To train each.
        stream: Number of this complex, which decides its random numbers.

    Raises:
        SettingsError: If a file of this run is damaged, or of other networks.
    """
    settings, path = bench.settings, run.path / f"{name}.safetensors"
    identity = recipe_of(settings, *modes)
    surface = SimplicialComplex(
        modes, [(i,) for i in range(len(modes))], bench.layout, provenance={"identity": identity}
    )
    if settings.resume and path.exists():
        try:
            surface = SimplicialComplex.load(path, bench.layout, device=modes[0].device)
        except (lb.CheckpointError, OSError) as error:
            raise SettingsError(f"--resume: {' '.join(str(error).split())}") from None
        if surface.provenance.get("identity") != identity:
            raise SettingsError(f"--resume: {path} is of other networks; delete it to make it again")
    loss = losses.SurfaceLoss(losses.cross_entropy, bench.weight_decay, settings.volume, settings.n_sample)
    while surface.num_vertices < len(modes) + num_new:
        new = surface.num_vertices
        generator = torch.Generator().manual_seed(1_000_003 * settings.seed + 1009 * stream + new)
        surface.add_vertex(perturbation=settings.perturbation, generator=generator)
        net = SurfaceModel(bench.model, surface)
        fit(bench, run, f"{name}-{new}", net, list(surface.parameters()), loss, epochs or 0, identity)
        surface.save(path)
        (run.path / f"checkpoint-{name}-{new}.safetensors").unlink(missing_ok=True)
    surface.freeze()
    return surface


def first_vertices(surface: SimplicialComplex, count: int) -> SimplicialComplex:
    """Return the simplex of the first vertices: growth keeps older ones, so it is the one of that stage."""
    return SimplicialComplex(surface.vertices[:count], layout=surface.layout)


# ---- measurements ----------------------------------------------------------------------------------------------------


def point_values(
    bench: Bench, run: RunDir, name: str, surface: SimplicialComplex, coefficients: Tensor
) -> dict[str, PointValues]:
    """Evaluate the network at points of a complex, going on with what an earlier part of the run has evaluated.

    Args:
        bench: Network, images and settings.
        run: Its folder gets ``values-NAME.npz``.
        name: Of the file.
        surface: The complex.
        coefficients: Weights of the vertices in the points, (M, m).
    """
    file, identity = run.path / f"values-{name}.npz", recipe_of(bench.settings, *surface.vertices, coefficients)
    return evaluate_points(
        bench.model,
        coefficients,
        bench.images,
        cross_entropy,
        surface=surface,
        bn_loader=batch_norm_batches(bench),
        known=read_values(file, identity) if bench.settings.resume else None,
        on_values=lambda values: write_values(file, identity, coefficients, values),
    )


def batch_norm_batches(bench: Bench) -> Any:
    return bn_images(bench.recipe, bench.data).batches(BN_BATCH_SIZE) if has_batch_norm(bench.model) else None


def random_points(bench: Bench, surface: SimplicialComplex) -> Tensor:
    """Return the coefficients of the vertices, one after another, and of --num_samples random points below."""
    generator = torch.Generator().manual_seed(bench.settings.seed)
    corners = torch.eye(surface.num_vertices, dtype=torch.float64)
    return torch.cat([corners, surface.coefficients(bench.settings.num_samples, generator)])


def predictions(bench: Bench, run: RunDir, component: int, dimension: int, surface: SimplicialComplex) -> Predictions:
    """Average the predictions over points of a simplex, or read what an earlier part of the run has predicted.

    Args:
        bench: Network, images and settings.
        run: Its folder gets ``predictions-COMPONENT-DIMENSION.npz``: probabilities (N, C), log_likelihood (N,) [nats]
            and targets (N,).
        component: Number of the network.
        dimension: Of the simplex; 0 is the network itself.
        surface: The simplex.
    """
    file, settings = run.path / f"predictions-{component}-{dimension}.npz", bench.settings
    identity = recipe_of(settings, *surface.vertices)
    if settings.resume and (found := read_predictions(file, identity)) is not None:
        return found
    images = getattr(bench.data, bench.shown)
    limit = settings.eval_limit
    found = predict_splits(
        bench.model,
        surface if dimension else surface.vertices[0].detach(),
        {bench.shown: images if limit is None else images.first(min(limit, len(images)))},
        bn_images(bench.recipe, bench.data),
        num_samples=settings.num_samples,
        seed=1000 * settings.seed + component,
        layout=bench.layout,
    )[bench.shown]
    assert found.targets is not None and found.log_likelihood is not None
    tensors = {"probabilities": found.probabilities, "log_likelihood": found.log_likelihood, "targets": found.targets}
    with replacing(file) as stream:
        np.savez_compressed(
            stream, identity=np.array(identity), **{key: value.cpu().numpy() for key, value in tensors.items()}
        )
    return found


def read_predictions(file: Path, identity: str) -> Predictions | None:
    try:
        with np.load(file) as arrays:
            if str(arrays["identity"]) != identity:
                return None
            probabilities, log_likelihood, targets = (
                torch.from_numpy(arrays[key]) for key in ("probabilities", "log_likelihood", "targets")
            )
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    entropy = torch.special.entr(probabilities).sum(-1)
    return Predictions(probabilities, entropy, targets, log_likelihood)
