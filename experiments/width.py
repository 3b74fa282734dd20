"""How wide the minimum of a finished run is: training loss and test error along rays in weight space.

line    from the SWA mean through SGD's last iterate, and as far to the other side
pca     from the SWA mean along principal directions of SGD's iterates (of those that --snapshots kept, else of SWAG's
        deviations): the top one, the middle one and the last
swag    likewise of the low-rank part of SWAG's covariance
random  from the SWA mean along random directions, orthogonal to SWAG's deviations and to each other
sgd     from SGD's last iterate along the same random directions

Directions have length 1, so that distances compare. Batch-norm statistics are recomputed at every point from training
images, augmented as they were trained on; losses and errors are of images as they are. The table has the distance at
which the training loss has risen by --increase, on average over both sides (and over random directions).

Examples:
  python -m experiments.width --run runs/digits --dir runs/digits-width --dist 3 --orth_dist 6
  python -m experiments.width --run runs/preresnet20 --data_path DATA_DIR --dir runs/preresnet20-width
      --train_limit 5000 --eval_limit 5000 --bn_subset 0.1
  python -m experiments.width --run runs/lenet --data_path DATA_DIR --rays line,swag,random --K 3 --N 11 --orth_N 11
      --train_limit 5000 --dir runs/lenet-width

Writes to --dir: values-KIND.npz (what a killed run goes on from), width.npz (of each kind distances, directions' names,
loss and error, KxT), width.png, line.png, table.txt, log.jsonl, results.json (last), settings.json, environment.json,
command.sh
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import lowrank_bdl as lb
from experiments import width_plots
from experiments.common import (
    RunDir,
    SettingsError,
    format_table,
    parse_settings,
    replacing,
    require_positive,
    resolve_device,
    run_script,
    setting,
    write_atomically,
)
from experiments.subspace_sources import Bench as RunBench
from experiments.subspace_sources import open_bench
from experiments.surface_bench import Bench, Kept, evaluate, finish, last_weights, of_run
from experiments.surface_settings import SurfaceSettings, as_subspace, check_shared
from experiments.uncertainty_settings import find_names
from lowrank_bdl.subspaces.principal import pca_subspace
from lowrank_bdl.surfaces.ray import Ray
from lowrank_bdl.surfaces.widths import (
    WidthProfile,
    orthogonal_width,
    pca_width,
    random_orthogonal_directions,
    swag_width,
    width_profile,
)

PROG = "python -m experiments.width"
OUTPUTS = ("results.json", "log.jsonl", "table.txt", "values-*.npz", "width.npz", "width.png", "line.png")
RAYS = ("line", "pca", "swag", "random", "sgd")


@dataclass(frozen=True)
class Settings(SurfaceSettings):
    """Everything that decides which rays are walked, and how far."""

    rays: str = setting("line,pca,random,sgd", f"which, separated by commas: {', '.join(RAYS)}", free=True)
    dist: float = setting(30.0, "reach along principal directions [parameter]")
    N: int = setting(21, "points along each of them")
    orth_dist: float = setting(60.0, "reach along random directions [parameter]")
    orth_N: int = setting(31, "points along each of them")
    K: int = setting(7, "random directions")
    line_N: int = setting(31, "points along the line")
    swag_rank: int | None = setting(
        None, "principal directions to choose top, middle and last from (default: all)", kind=int
    )
    increase: float = setting(0.1, "rise of the training loss that ends a width [nat]", free=True)


def check(settings: Settings) -> Settings:
    """Refuse what cannot run.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    check_shared(settings, N=2, orth_N=2, K=1, line_N=2, swag_rank=1)
    require_positive(settings, ("dist", "orth_dist", "increase"))
    find_names("rays", settings.rays, RAYS, "kind of ray")
    if settings.run is None:
        raise SettingsError("--run is needed: a finished run of experiments.train --swa --cov_mat")
    return settings


class Work:
    """What is done with one run.

    Args:
        bench: Network and images.
        opened: The run.
        folder: To write to.
    """

    def __init__(self, bench: Bench, opened: RunBench, folder: RunDir) -> None:
        assert isinstance(bench.settings, Settings)
        self.settings, self.bench, self.folder = bench.settings, bench, folder
        self.trained, self.mean = opened.trained, opened.trained.posterior.mean
        last = last_weights(opened)
        assert last is not None, "a run has one"
        self.last = last

    def profile(self, kind: str) -> WidthProfile:
        """Evaluate the rays of one kind, going on with what an earlier part of the run has evaluated."""
        settings, bench = self.settings, self.bench
        if kind == "line":
            line = Ray.between(self.mean, self.last, bench.layout)
            t = torch.linspace(-line.length, 2 * line.length, settings.line_N, dtype=torch.float64).to(self.mean.device)
            values = evaluate(bench, self.folder, kind, t, line, [self.mean, self.last])
            shaped = {name: one.reshape(1, -1) for name, one in values.items()}
            return WidthProfile(("SWA to SGD",), t, shaped, None)
        random = kind in ("random", "sgd")
        reach, num = (settings.orth_dist, settings.orth_N) if random else (settings.dist, settings.N)
        t = torch.linspace(-reach, reach, num, dtype=torch.float64)
        kept = Kept(self.folder, kind, t, [self.mean, self.last])
        options: dict[str, Any] = {"known": kept.known, "on_values": kept.write, **bench.options}
        generator = torch.Generator(self.mean.device).manual_seed(settings.seed)
        common = (bench.images, cross_entropy, t)
        if kind == "swag":
            return swag_width(bench.model, self.trained.posterior, *common, rank=settings.swag_rank, **options)
        if kind == "pca":
            return pca_width(bench.model, self.iterates(), *common, **options)
        span = pca_subspace(self.trained.collector or self.trained.posterior)
        if kind == "random":
            return orthogonal_width(
                bench.model, span, *common, num_directions=settings.K, generator=generator, **options
            )
        rows = random_orthogonal_directions(span, settings.K, generator)
        names = [f"random {number + 1}" for number in range(settings.K)]
        return width_profile(bench.model, self.last, rows, *common, names=names, **options)

    def iterates(self) -> lb.Subspace:
        """Return the principal directions of the iterates."""
        rank, rows = self.settings.swag_rank, self.trained.iterates
        if rows is None:
            return pca_subspace(self.trained.collector or self.trained.posterior, rank)
        most = len(rows) - 1  # their sum is zero, but for rounding
        deviations = rows.to(self.mean) - self.mean
        return pca_subspace(deviations, min(rank or most, most), origin=self.mean, layout=self.bench.layout)


def describe(profile: WidthProfile, increase: float, shown: str) -> dict[str, Any]:
    """Return what results.json says about the rays of one kind."""
    center = int(profile.distances.abs().argmin())
    return {
        "names": list(profile.names),
        "reach": float(profile.distances.abs().max()),
        "stddevs": None if profile.stddevs is None else profile.stddevs.tolist(),
        "half_widths": [[finite(side) for side in row] for row in profile.half_widths(increase, "train").tolist()],
        "at_center": {
            "train_loss": profile.of("train").loss[0, center].item(),
            f"{shown}_error": profile.of(shown).error[0, center].item(),
        },
        "lowest_error": {"value": (low := profile.of(shown).error.min()).item(), "at": where(profile, shown, low)},
    }


def finite(value: float) -> float | None:
    """Return a half-width, None where it is beyond the last point."""
    return value if value < float("inf") else None


def where(profile: WidthProfile, shown: str, value: Tensor) -> dict[str, Any]:
    ray, point = (profile.of(shown).error == value).nonzero()[0].tolist()
    return {"ray": profile.names[ray], "distance": profile.distances[point].item()}


def table(found: dict[str, dict[str, Any]], shown: str) -> str:
    """Lay out the widths: one row a principal direction, one for all random ones."""
    header = ["rays", "std along", "half-width", "reach", "train loss", f"{shown} error %", "lowest", "at"]
    rows = []
    for kind, facts in found.items():
        together = kind in ("random", "sgd")
        groups = [range(len(facts["names"]))] if together else [[k] for k in range(len(facts["names"]))]
        for number, group in enumerate(groups):
            sides = [side for k in group for side in facts["half_widths"][k]]
            known = [side for side in sides if side is not None]
            width = ("> " if len(known) < len(sides) else "") + f"{sum(known) / len(known):.3g}" if known else "beyond"
            center, low = facts["at_center"], facts["lowest_error"]
            name = f"{kind} ({len(facts['names'])})" if together else f"{kind}: {facts['names'][number]}"
            first = number == 0
            rows.append(
                [
                    name,
                    "" if facts["stddevs"] is None else f"{facts['stddevs'][number]:.3g}",
                    width,
                    f"{facts['reach']:.3g}",
                    f"{center['train_loss']:.4f}" if first else "",
                    f"{100 * center[f'{shown}_error']:.2f}" if first else "",
                    f"{100 * low['value']:.2f}" if first else "",
                    f"{low['at']['distance']:.2f}" if first else "",
                ]
            )
    return format_table(header, rows)


def experiment(own: Work) -> str:
    """Evaluate, draw, and write results.json last; return the table."""
    settings, bench, folder, began = own.settings, own.bench, own.folder, time.perf_counter()
    profiles = {}
    for kind in find_names("rays", settings.rays, RAYS, "kind of ray"):
        profiles[kind] = own.profile(kind)
        folder.log(kind=kind, seconds=time.perf_counter() - began)
    arrays: dict[str, Any] = {}
    for kind, profile in profiles.items():
        arrays |= {f"{kind}_ts": profile.distances.cpu().numpy(), f"{kind}_names": np.array(profile.names)}
        for name in bench.images:
            arrays[f"{kind}_{name}_loss"] = profile.of(name).loss.cpu().numpy()
            arrays[f"{kind}_{name}_error"] = profile.of(name).error.cpu().numpy()
    with replacing(folder.path / "width.npz") as file:
        np.savez(file, **arrays)
    rays = {kind: profile for kind, profile in profiles.items() if kind != "line"}
    if rays:
        width_plots.rays(folder.path / "width.png", rays, bench.shown, bench.title)
    if "line" in profiles:
        width_plots.line(folder.path / "line.png", profiles["line"], bench.shown, bench.title)
    found = {kind: describe(profile, settings.increase, bench.shown) for kind, profile in profiles.items()}
    text = table(found, bench.shown)
    write_atomically(folder.path / "table.txt", text + "\n")
    folder.write_json(
        "results.json",
        {
            "schema": 1,
            "settings": dataclasses.asdict(settings),
            "recipe": dataclasses.asdict(bench.recipe),
            "data": bench.data.facts,
            "reported_on": bench.shown,
            "parameters": bench.layout.numel,
            "between_swa_and_sgd": torch.linalg.vector_norm(own.last - own.mean).item(),
            "rays": found,
            "seconds": time.perf_counter() - began,
        },
    )
    return text


def work(settings: Settings) -> str:
    """Check everything, then evaluate; return what to print."""
    device = resolve_device(settings.device)
    run = RunDir(settings, OUTPUTS, device)
    opened = open_bench(as_subspace(settings), device)
    own = Work(of_run(settings, opened), opened, run)
    return finish(run, lambda: experiment(own))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
