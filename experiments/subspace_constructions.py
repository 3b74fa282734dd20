"""The subspaces of `experiments.subspace`, each made of what training left behind."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import lowrank_bdl as lb
from experiments.common import SettingsError
from experiments.hessian_points import LAST, read_point
from experiments.subspace_settings import Settings, rank_of, subspaces
from experiments.subspace_sources import Bench, read_posterior
from experiments.train_weights import WEIGHTS
from experiments.uncertainty_settings import names
from lowrank_bdl.subspaces.curve import curve_subspace
from lowrank_bdl.subspaces.directions import eigen_subspace, random_subspace
from lowrank_bdl.subspaces.frequent_directions import FrequentDirections
from lowrank_bdl.subspaces.principal import covariance_subspace, pca_subspace, principal_subspace
from lowrank_bdl.subspaces.subspace import Subspace

HESSIAN_TOL = 1e-3  # residual of an eigenpair, over the largest eigenvalue


def construct(settings: Settings, bench: Bench) -> dict[str, Subspace]:
    """Make the subspaces that cost little; nothing is written.

    Returns:
        By name; all but "hessian", which `hessian` makes.

    Raises:
        SettingsError: If what training left behind does not span a subspace, or a file is missing or damaged.
    """
    found = {}
    for name in subspaces(settings):
        if name == "hessian":
            continue
        try:
            found[name] = MAKERS[name](settings, bench)
        except SettingsError:
            raise
        except (lb.ShapeError, lb.NotConvergedError, lb.MemoryLimitError, ValueError) as error:
            raise SettingsError(f"--subspace {name}: {' '.join(str(error).split())}") from None
    return found


def whole_rank(settings: Settings) -> int:
    rank = rank_of(settings)
    assert isinstance(rank, int), "checked with the settings"
    return rank


def source(bench: Bench) -> Any:
    """Return what has collected the deviations, or the posterior of a file."""
    return bench.trained.posterior if bench.trained.collector is None else bench.trained.collector


def pca(settings: Settings, bench: Bench) -> Subspace:
    return pca_subspace(source(bench), rank_of(settings))


def covariance(settings: Settings, bench: Bench) -> Subspace:
    """Make the subspace of all deviations, whatever the rank."""
    return covariance_subspace(source(bench))


def principal(settings: Settings, bench: Bench) -> Subspace:
    return principal_subspace(source(bench), whole_rank(settings), generator=generator(settings, bench))


def random(settings: Settings, bench: Bench) -> Subspace:
    """Make random directions about the SWA mean, of a length that the published code knows."""
    length = None
    if settings.random_length == "unit":
        length = 1.0
    elif settings.random_length == "pca":
        length = pca_subspace(source(bench)).lengths[:2].mean().item()
    return random_subspace(
        bench.layout,
        bench.trained.posterior.mean,
        whole_rank(settings),
        length=length,
        structured=settings.structured,
        generator=generator(settings, bench),
    )


def freq_dir(settings: Settings, bench: Bench) -> Subspace:
    """Sketch every iterate that the run kept."""
    iterates = bench.trained.iterates
    if iterates is None:
        raise SettingsError(f"--subspace freq_dir: the run {settings.run} kept no iterates (--snapshots)")
    sketch = FrequentDirections(bench.model, settings.sketch_size, include=list(bench.layout.names))
    for theta in iterates:
        sketch.update(theta)
    return sketch.subspace(rank_of(settings))


def curve(settings: Settings, bench: Bench) -> Subspace:
    files = names(str(settings.curve))
    if len(files) == 1:
        device = bench.trained.posterior.mean.device
        points = read_posterior("--curve", files[0], bench.layout, lb.EmpiricalPosterior, device).thetas
    else:
        points = torch.stack([_point(file, settings, bench) for file in files])
    return curve_subspace(points, bench.layout, control_points=settings.control_points)


def _point(file: str, settings: Settings, bench: Bench) -> Tensor:
    """Read the weights of one file (D,)."""
    path = Path(file)
    model = copy.deepcopy(bench.model)
    several = path.is_dir() or path.name == WEIGHTS  # checkpoints and state dicts hold one set of weights
    try:
        read_point(path, settings.source if several else LAST, model).load_(model)
    except FileNotFoundError:
        raise SettingsError(f"--curve {file}: there is no such file") from None
    except (lb.CheckpointError, OSError) as error:
        raise SettingsError(f"--curve {file}: {' '.join(str(error).split())}") from None
    return bench.layout.flatten(model)


def generator(settings: Settings, bench: Bench) -> torch.Generator:
    return torch.Generator(bench.trained.posterior.mean.device).manual_seed(settings.seed)


MAKERS: dict[str, Callable[[Settings, Bench], Subspace]] = {
    "random": random, "pca": pca, "covariance": covariance, "freq_dir": freq_dir, "principal": principal,
    "curve": curve,
}  # fmt: skip


def hessian(settings: Settings, bench: Bench, checkpoint: Path) -> Subspace:
    r"""Make the subspace of the top eigenvectors of the curvature at the SWA mean.

    Columns are v / sqrt(N lambda + tau), tau the weight decay's precision: z ~ N(0, I) is Laplace's approximation.

    Args:
        settings: Of the script.
        bench: The network, and the images of the log-joint, N of them.
        checkpoint: Where Lanczos keeps its state; removed at the end.

    Raises:
        SettingsError: If it does not converge, or an eigenvalue is too negative.
    """
    theta, rank = bench.trained.posterior.mean, whole_rank(settings)
    kind: Any = lb.GGNLinearOperator if settings.operator == "ggn" else lb.HessianLinearOperator
    matrix = kind(bench.network_at(theta), cross_entropy, bench.batches, bn_mode="eval", layout=bench.layout)
    with tqdm(total=settings.max_products, desc=settings.operator, unit="product", leave=False) as bar:

        def show(progress: Any) -> None:
            bar.n = progress.num_matvecs
            bar.refresh()

        try:
            pairs = lb.lanczos(
                matrix,
                rank,
                tol=HESSIAN_TOL,
                max_matvecs=settings.max_products,
                generator=generator(settings, bench),
                checkpoint=checkpoint,
                resume=checkpoint.exists(),
                callback=show,
            )
            decay = len(bench.data.train) * bench.trained.settings.wd
            space = eigen_subspace(bench.layout, theta, pairs, prior_precision=decay, num_data=len(bench.train))
        except (lb.ShapeError, lb.NotConvergedError, ValueError) as error:
            raise SettingsError(f"--subspace hessian: {' '.join(str(error).split())}") from None
    checkpoint.unlink(missing_ok=True)
    return space
