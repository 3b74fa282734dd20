"""The planes of `experiments.plane`, and what is drawn on them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowrank_bdl as lb
from experiments import curve_bench, curve_settings
from experiments.common import RunDir, SettingsError
from experiments.curve_bench import digest_of, given_points
from experiments.ensembling import load_data
from experiments.plane_settings import Settings
from experiments.subspace_constructions import construct, hessian
from experiments.subspace_sources import open_bench, read_posterior
from experiments.surface_bench import Bench, last_weights, of_run, run_folder
from experiments.surface_settings import as_subspace
from experiments.train_setup import make_model, try_model
from experiments.uncertainty_members import TrainSettings, read_settings
from experiments.uncertainty_settings import names
from lowrank_bdl.surfaces.curves import Curve
from lowrank_bdl.surfaces.filter_normalization import filter_normalized
from lowrank_bdl.surfaces.plane import Plane, plane

CURVE_LABELS = {"PolygonalChain": "polygonal chain", "BezierCurve": "Bézier curve"}


@dataclass(frozen=True)
class Scene:
    """A plane, and what is drawn on it.

    Attributes:
        settings: Of the script.
        bench: Network and images.
        plane: The plane.
        about: What it is, for titles.
        axes: What x and y are.
        markers: Weight vectors (D,) by name.
        lines: Weight vectors (n, D) by name, or a function that makes them a few at a time.
        posterior: Whose ellipse is drawn.
        facts: About the plane, for results.json.
    """

    settings: Settings
    bench: Bench
    plane: Plane
    about: str
    axes: tuple[str, str]
    markers: Mapping[str, Tensor]
    lines: "Mapping[str, Tensor | Curve]" = field(default_factory=dict)
    posterior: "lb.GaussianPosterior | None" = None
    facts: Mapping[str, Any] = field(default_factory=dict)


Opened = Callable[[RunDir], Scene]
"""Makes the scene once the folder is there: what is costly to make, or read from the folder."""


def open_scene(settings: Settings, device: torch.device) -> Opened:
    """Read weights and data; nothing is written.

    Raises:
        SettingsError: If something is missing, damaged, or does not fit together.
    """
    if settings.run is not None:
        return _of_run(settings, device)
    if settings.toy is not None:
        return _of_toy(settings, device)
    recipe = recipe_of(settings)
    data, shown = load_data(settings, recipe, device)  # type: ignore[arg-type]
    model = make_model(recipe, data, device)
    try_model(model, data)
    bench = Bench(settings, recipe, model, lb.ParameterLayout.from_module(model), data, shown)
    if settings.curve is not None:
        curve = read_posterior("--curve", settings.curve, bench.layout, Curve, device)
        return lambda run: of_curve(settings, bench, curve)
    asked = _Given(names(str(settings.ckpt)), settings.source)
    points = given_points(_GivenBench(asked, model, bench.layout))  # type: ignore[arg-type]
    return lambda run: _of_points(settings, bench, dict(zip(asked.files, points, strict=True)))


@dataclass(frozen=True)
class _Given:
    files: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class _GivenBench:
    """What `given_points` looks at."""

    settings: _Given
    model: torch.nn.Module
    layout: lb.ParameterLayout


def recipe_of(settings: Settings) -> TrainSettings:
    """Return how the networks were trained: of the first run that is given, or as --model and --dataset say."""
    if settings.model is not None:
        keys = ("dataset", "model", "use_test", "data_path", "seed")
        return TrainSettings(dir="", **{key: getattr(settings, key) for key in keys})
    folder = run_folder(settings.curve or names(str(settings.ckpt))[0])
    if settings.curve is not None:  # a run of experiments.curve keeps the recipe of its ends
        try:
            return TrainSettings(**json.loads((folder / "results.json").read_text(encoding="utf-8"))["recipe"])
        except (OSError, ValueError, KeyError, TypeError):
            raise SettingsError(
                f"--curve {settings.curve}: no finished run of experiments.curve around it; give --model and --dataset"
            ) from None
    return read_settings(folder)


def of_curve(settings: Settings, bench: Bench, curve: Curve) -> Scene:
    """Return the plane through the ends and the middle bend of a curve.

    Raises:
        SettingsError: If the curve has no bend, or is straight.
    """
    points = [point.detach() for point in curve.points]
    if len(points) < 3:
        raise SettingsError("--curve must have at least one bend; it is a straight line")
    start, bend, end = points[0], points[len(points) // 2], points[-1]
    label = CURVE_LABELS.get(type(curve).__name__, "curve")
    facts = {"through": ["start", "bend", "end"], "num_points": len(points), "length": curve.length()}
    return Scene(
        settings,
        bench,
        Plane.through(start, bend, end, bench.layout),
        f"the plane of a {label}",
        ("from start to end", "towards the bend"),
        {"start": start, "bend": bend, "end": end},
        {label: curve},
        facts=facts,
    )


def _of_points(settings: Settings, bench: Bench, points: Mapping[str, Tensor]) -> Scene:
    labels = [Path(name).name for name in points]
    labels = labels if len(set(labels)) == len(labels) else list(points)
    markers = dict(zip(labels, points.values(), strict=True))
    first, second, third = labels
    axes = (f"from {first} to {third}", f"towards {second}")
    found = Plane.through(*markers.values(), layout=bench.layout)
    return Scene(settings, bench, found, "a plane through three networks", axes, markers, facts={"through": labels})


def _of_toy(settings: Settings, device: torch.device) -> Opened:
    asked = curve_settings.check(
        curve_settings.Settings(
            dir=settings.dir,
            toy=settings.toy,
            seed=settings.seed,
            curve="Bezier",
            device=settings.device,
            threads=settings.threads,
            resume=settings.resume,
        )
    )
    made = curve_bench.open_bench(asked, device)
    bench = Bench(settings, made.recipe, made.model, made.layout, made.data, made.shown)

    def scene(run: RunDir) -> Scene:
        ends = curve_bench.train_ends(made, run)
        return of_curve(settings, bench, curve_bench.trained_curve(made, run, "Bezier", ends))

    return scene


def _of_run(settings: Settings, device: torch.device) -> Opened:
    span = settings.span
    own = {"operator": settings.operator, "max_products": settings.max_products, "random_length": "unit"}
    own |= {"subspace": "random" if span == "filter" else span, "rank": str(max(settings.PC1, settings.PC2) + 1)}
    asked = as_subspace(settings, **own)
    opened = open_bench(asked, device)
    bench, trained = of_run(settings, opened), opened.trained
    try:
        spaces = construct(asked, opened)  # all but the Hessian's, which takes its time
    except SettingsError as error:
        raise SettingsError(str(error).replace("--subspace", "--span", 1)) from None

    def scene(run: RunDir) -> Scene:
        path = run.path / "plane.safetensors"
        if settings.resume and path.exists():
            found = _kept(path, bench, trained.posterior.mean)
        else:
            space = (
                hessian(asked, opened, run.path / "lanczos.safetensors")
                if span == "hessian"
                else spaces[asked.subspace]
            )
            found = _spanned(space, settings)
            lb.Subspace(bench.layout, found.origin, found.basis, _made_of(span, trained.posterior.mean)).save(path)
        markers = {"SWA": trained.posterior.mean}
        last = last_weights(opened)
        if last is not None:
            markers[trained.settings.optimizer] = last
        lines: dict[str, Tensor | Curve] = {} if trained.iterates is None else {"path": trained.iterates}
        facts = {"span": span, "numbers": [settings.PC1, settings.PC2], "lengths": found.lengths.tolist()}
        about, axes = _words(settings)
        return Scene(settings, bench, found, about, axes, markers, lines, trained.posterior, facts)

    return scene


def _spanned(space: lb.Subspace, settings: Settings) -> Plane:
    u, v = space.basis[:, settings.PC1], space.basis[:, settings.PC2]
    if settings.span == "filter":
        assert space.layout is not None
        u, v = (filter_normalized(direction, space.origin, space.layout) for direction in (u, v))
        return Plane(space.layout, space.origin, u, v)
    return plane(space.origin, u, v, space.layout)


def _made_of(span: str, origin: Tensor) -> dict[str, str]:
    return {"span": span, "weights": digest_of([origin])}


def _kept(path: Path, bench: Bench, origin: Tensor) -> Plane:
    try:
        space = lb.Subspace.load(path, bench.layout, device=origin.device)
    except (lb.CheckpointError, OSError) as error:
        raise SettingsError(f"--resume: {' '.join(str(error).split())}") from None
    if space.provenance.get("weights") != digest_of([origin]):
        raise SettingsError(f"--resume: {path} is of another run; delete it to make it again")
    return Plane(space.layout, space.origin, *space.basis.mT)


def _words(settings: Settings) -> tuple[str, tuple[str, str]]:
    what = {
        "pca": "principal directions of SWAG's deviations",
        "principal": "principal directions of SWAG's covariance",
        "hessian": "top eigenvectors of the Hessian"
        if settings.operator == "hessian"
        else "top eigenvectors of the GGN",
        "random": "random directions",
        "filter": "filter-normalised random directions",
    }[settings.span]
    one = {"pca": "principal direction", "principal": "principal direction", "hessian": "eigenvector"}
    name = one.get(settings.span, "random direction")
    return what, (f"{name} {settings.PC1 + 1}", f"{name} {settings.PC2 + 1}")


def projected(found: Plane, line: "Tensor | Curve", num: int) -> Tensor:
    """Return the coordinates of points (n, D), or of a curve at num points, made one at a time; float64, on the CPU."""
    if isinstance(line, Tensor):
        return torch.stack([found.project(theta.to(found.origin)) for theta in line]).double().cpu()
    t = torch.linspace(0, 1, num, dtype=torch.float64)
    with torch.no_grad():
        return torch.stack([found.project(line.to_theta(one)) for one in t]).double().cpu()
