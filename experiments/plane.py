"""Loss and error of a network on a plane in weight space: contours, and a view in three dimensions.

--run      about the SWA mean of a finished run, in the plane of two directions of a subspace (--span: principal
           directions of SWAG's deviations, of its whole covariance, of the curvature, or random ones), with the path of
           SGD, its last iterate and SWAG's 3-sigma ellipse, all projected on the plane
--curve    through the ends and the middle bend of a curve that experiments.curve trained, with the curve on it
--ckpt     through three given sets of weights
--toy      two small networks on two spirals and a curve between them, trained here, in less than a minute

Batch-norm statistics are recomputed at every point from training images, augmented as they were trained on; losses and
errors are of images as they are. Projections hide how far from the plane something is: the table has the distance, and
loss and error at the weights themselves.

Examples:
  python -m experiments.plane --toy two_spirals --dir runs/spirals-plane
  python -m experiments.plane --run runs/digits --dir runs/digits-plane --grid_points 21
  python -m experiments.plane --run runs/preresnet20 --data_path DATA_DIR --span hessian --train_limit 5000
      --eval_limit 5000 --bn_subset 0.1 --grid_points 21 --dir runs/preresnet20-hessian-plane
  python -m experiments.plane --curve runs/lenet-curve/curve-Bezier.safetensors --data_path DATA_DIR
      --train_limit 10000 --dir runs/lenet-curve-plane
  python -m experiments.plane --ckpt runs/a,runs/b,runs/c --source SWA --dir runs/three-plane

Writes to --dir: plane.safetensors (read by lowrank_bdl.Subspace.load), values-plane.npz (what a killed run goes on
from), plane.npz (xs, ys, loss and error of every grid point, curves and markers), plane.png, plane-3d.png, table.txt,
log.jsonl, results.json (last), settings.json, environment.json, command.sh
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments import plane_plots
from experiments.common import (
    RunDir,
    format_table,
    parse_settings,
    replacing,
    resolve_device,
    run_script,
    write_atomically,
)
from experiments.plane_settings import Settings, check
from experiments.plane_sources import Scene, open_scene, projected
from experiments.surface_bench import at_weights, evaluate, finish
from lowrank_bdl.surfaces.ellipse import swag_ellipse
from lowrank_bdl.surfaces.evaluation import PointValues

PROG = "python -m experiments.plane"
OUTPUTS = (
    "results.json", "log.jsonl", "table.txt", "plane.safetensors", "lanczos.safetensors", "values-plane.npz",
    "plane.npz", "plane.png", "plane-3d.png", "curve-*.safetensors", "checkpoint-*.safetensors",
)  # fmt: skip


def frame(settings: Settings, scene: Scene, lines: dict[str, Tensor], spots: dict[str, Tensor]) -> Tensor:
    """Return the grid: about everything that is drawn, or as far as --dist says."""
    columns = settings.grid_points
    if settings.dist is not None:
        return scene.plane.grid(columns, radius=settings.dist)
    margins = tuple(float(getattr(settings, f"margin_{side}")) for side in ("left", "right", "bottom", "top"))
    shown = torch.cat([*lines.values(), *(spot[None] for spot in spots.values()), scene.plane.anchors.cpu()])
    return scene.plane.grid(columns, margin=margins, around=shown)  # type: ignore[arg-type]


def picture(values: dict[str, PointValues], shape: Sequence[int], shown: str) -> dict[str, np.ndarray]:
    """Return what is drawn as images (ny, nx): `train_loss` and the like, errors in [0, 1]."""
    found = {}
    for name, measured in values.items():
        grid = measured.reshape(*shape)
        found |= {f"{name}_loss": grid.loss.cpu().numpy(), f"{name}_error": grid.error.cpu().numpy()}
    return found


def describe(scene: Scene, grid: Tensor, images: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return where on the grid each image is lowest."""
    lowest = {}
    for name, image in images.items():
        row, column = np.unravel_index(int(np.argmin(image)), image.shape)
        x, y = grid[row, column].tolist()
        lowest[name] = {"value": float(image[row, column]), "x": x, "y": y, "largest": float(image.max())}
    return lowest


def experiment(scene: Scene, run: RunDir) -> str:
    """Evaluate, draw, and write results.json last; return the table."""
    bench, settings, began = scene.bench, scene.settings, time.perf_counter()
    plane = scene.plane
    lines = {name: projected(plane, thetas, settings.curve_points) for name, thetas in scene.lines.items()}
    spots = {name: plane.project(theta).double().cpu() for name, theta in scene.markers.items()}
    if scene.posterior is not None:
        lines["SWAG"] = swag_ellipse(plane, scene.posterior, settings.sigmas).cpu()
    grid = frame(settings, scene, lines, spots)
    weights = [plane.origin, *plane.directions]
    values = evaluate(bench, run, "plane", grid.flatten(0, 1), plane, weights)
    images = picture(values, grid.shape[:2], bench.shown)
    own = at_weights(bench, scene.markers)
    for name, theta in scene.markers.items():
        own[name] |= dict(zip("xy", spots[name].tolist(), strict=True)) | {"off": plane.distance(theta).item()}
    grid = grid.cpu()
    arrays: dict[str, Any] = {"xs": grid[0, :, 0].numpy(), "ys": grid[:, 0, 1].numpy(), **images}
    arrays |= {f"line_{name}": line.numpy() for name, line in lines.items()}
    arrays |= {f"marker_{name}": spot.numpy() for name, spot in spots.items()}
    with replacing(run.path / "plane.npz") as file:
        np.savez(file, **arrays)
    title = f"{bench.title}: {scene.about}"
    drawn = plane_plots.Drawn(grid.numpy(), images, lines, spots, scene.axes, settings.sigmas)
    plane_plots.contours(run.path / "plane.png", drawn, bench.shown, title)
    plane_plots.surface(run.path / "plane-3d.png", drawn, title)
    text = table(own, bench.shown)
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
            "plane": scene.facts,
            "axes": list(scene.axes),
            "lowest": describe(scene, grid, images),
            "markers": own,
            "seconds": time.perf_counter() - began,
        },
    )
    run.log(points=grid[..., 0].numel(), seconds=time.perf_counter() - began)
    return text


def table(own: dict[str, dict[str, float]], shown: str) -> str:
    """Lay out what the weights themselves do, and where they are."""
    header = ["weights", "x", "y", "off the plane", "train loss", "train error %", f"{shown} loss", f"{shown} error %"]
    rows = []
    for name, found in own.items():
        place = [f"{found[key]:.2f}" for key in ("x", "y", "off")]
        sets = ("train", shown)
        measured = [(f"{found[f'{s}_loss']:.4f}", f"{100 * found[f'{s}_error']:.2f}") for s in sets]
        rows.append([name, *place, *(cell for pair in measured for cell in pair)])
    return format_table(header, rows)


def work(settings: Settings) -> str:
    """Check everything, then evaluate; return what to print."""
    device = resolve_device(settings.device)
    run = RunDir(settings, OUTPUTS, device)
    scene = open_scene(settings, device)
    return finish(run, lambda: experiment(scene(run), run))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
