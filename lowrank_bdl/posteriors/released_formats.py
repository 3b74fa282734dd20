"""SWAG checkpoints of the authors' repositories, read with their own law.

Two formats: wjmaddox/swa_gaussian keeps three buffers a parameter, wjmaddox/drbayes (and izmailovpavel/
understandingbdl) keeps flat vectors. In both the variance is E[x²] − E[x]² in float32, negative wherever rounding
exceeds it, and the zero row of the first iterate counts. The low-rank part is divided by the number of rows minus one
in the second, and by max_num_models - 1 in the first, however few rows there are yet. No file of it holds that number,
but one that averages more models than it has rows has as many rows as it may.
"""

import logging
import os
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_bdl.errors import CheckpointError
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.selection import Selector
from lowrank_bdl.parameters.wrappers import named_parameters

NEGATIVE_VARIANCE_RULES = ("error", "clamp", "deviations")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReleasedGaussian:
    """A Gaussian as a released checkpoint has it, before any scale.

    Attributes:
        mean: Shape ``(D,)`` [parameter].
        variance: Diagonal part, shape ``(D,)`` [parameter²].
        deviations: Shape ``(rows, D)`` [parameter].
        divisor: Of the low-rank part, at least 1.
        layout: Names and shapes of the D coordinates.
        provenance: Facts for the posterior's record.
    """

    mean: Tensor
    variance: Tensor
    deviations: Tensor
    divisor: int
    layout: ParameterLayout
    provenance: dict[str, Any]


def read_swa_gaussian(
    path: str | os.PathLike[str],
    model: nn.Module,
    negative_variance: str,
    var_clamp: float,
    *,
    max_num_models: int | None = None,
    prefix: str = "base.",
    include: "Selector | None" = None,
    exclude: "Selector | None" = None,
) -> ReleasedGaussian:
    """Read ``{prefix}{parameter}_mean``, ``_sq_mean`` and ``_cov_mat_sqrt`` (rows, numel) of every parameter.

    Raises:
        CheckpointError: See ``GaussianPosterior.from_swa_gaussian``.
    """
    name = os.fspath(path)
    state = _load_state(path)
    layout = ParameterLayout.from_module(model, include=include, exclude=exclude)
    known = {f"{prefix}{parameter}" for parameter in named_parameters(model, remove_duplicate=False)}
    in_file = {key.removesuffix("_sq_mean") for key in state if key.endswith("_sq_mean")}
    if in_file - known:
        raise CheckpointError(f"{name} has parameter {min(in_file - known)!r}, which the model lacks.")
    n_models = _count(name, state, "n_models")
    numel, dtype = layout.numel, layout.dtype
    mean, sq_mean = torch.empty(numel, dtype=dtype), torch.empty(numel, dtype=dtype)
    first = f"{prefix}{layout.names[0]}_cov_mat_sqrt"
    rows = state[first].shape[0] if first in state else 0  # no_cov_mat=True keeps no deviations
    deviations = torch.empty(rows, numel, dtype=dtype)
    for parameter, shape in zip(layout.names, layout.shapes, strict=True):
        where = layout.slices[parameter]
        mean[where] = _take(name, state, f"{prefix}{parameter}_mean", shape).reshape(-1)
        sq_mean[where] = _take(name, state, f"{prefix}{parameter}_sq_mean", shape).reshape(-1)
        if first in state:
            expected = (rows, where.stop - where.start)
            deviations[:, where] = _take(name, state, f"{prefix}{parameter}_cov_mat_sqrt", expected)
    window = _window(name, rows, n_models, max_num_models)
    return _finish(
        name, "swa_gaussian", layout, mean, sq_mean, deviations, n_models, negative_variance, var_clamp, window
    )


def _window(name: str, rows: int, n_models: int, max_num_models: int | None) -> int:
    """Return how many rows the collector of a swa_gaussian file was made for, given or found out.

    Raises:
        CheckpointError: If the file cannot come from a collector of that many.
    """
    if max_num_models is not None:
        full = rows == max_num_models or rows == 0
        if not full and (rows > max_num_models or n_models > rows):
            raise CheckpointError(
                f"{name} holds {rows} deviations of {n_models} models, which max_num_models={max_num_models} cannot "
                "give."
            )
        return max_num_models
    if 0 < rows == n_models:
        _log.warning(
            "%s: all %d models have a row, so max_num_models, by which the released code divides, may be larger; "
            "%d is assumed. Give max_num_models= if it was another.",
            name,
            n_models,
            rows,
        )
    return rows


def read_drbayes(
    path: str | os.PathLike[str],
    model: nn.Module,
    negative_variance: str,
    var_clamp: float,
    *,
    include: "Selector | None" = None,
    exclude: "Selector | None" = None,
) -> ReleasedGaussian:
    """Read flat ``mean``, ``sq_mean`` and ``subspace.cov_mat_sqrt`` over ``model.parameters()``.

    Raises:
        CheckpointError: See ``GaussianPosterior.from_drbayes``.
    """
    name = os.fspath(path)
    state = _load_state(path)
    every = ParameterLayout.from_module(model, trainable_only=False)  # the file holds frozen parameters too
    layout = ParameterLayout.from_module(model, include=include, exclude=exclude)
    index = torch.cat([torch.arange(every.slices[n].start, every.slices[n].stop) for n in layout.names])
    kept: slice | Tensor = slice(None) if layout.numel == every.numel else index
    n_models = _count(name, state, "n_models")
    mean = _take(name, state, "mean", (every.numel,))[kept].to(layout.dtype, copy=True)
    sq_mean = _take(name, state, "sq_mean", (every.numel,))[kept].to(layout.dtype)
    deviations = torch.empty(0, layout.numel, dtype=layout.dtype)
    if "subspace.cov_mat_sqrt" in state:
        rows = state["subspace.cov_mat_sqrt"].shape[0]
        whole = _take(name, state, "subspace.cov_mat_sqrt", (rows, every.numel))
        deviations = whole[:, kept].to(layout.dtype, copy=True)  # the file may change under a mapped view
    return _finish(name, "drbayes", layout, mean, sq_mean, deviations, n_models, negative_variance, var_clamp)


def _load_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"no such file: {name}")
    try:
        # mapped from disk where the file allows it, so that only what is copied out takes memory
        content = _torch_load(name)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{name} is truncated or holds more than tensors and plain values: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} must hold a state dict or {{epoch, state_dict}}; got {type(content).__name__}.")
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _torch_load(name: str) -> Any:
    with open(name, "rb") as stream:
        is_zip = stream.read(2) == b"PK"  # files from before torch 1.6 cannot be mapped
    return torch.load(name, map_location="cpu", weights_only=True, mmap=is_zip)


def _take(name: str, state: dict[str, Tensor], key: str, shape: tuple[int, ...] | torch.Size) -> Tensor:
    if key not in state:
        raise CheckpointError(f"{name} lacks {key!r} of shape {tuple(shape)}.")
    if state[key].shape != torch.Size(shape):
        raise CheckpointError(f"{name}: {key!r} must have shape {tuple(shape)}; got {tuple(state[key].shape)}.")
    if not bool(state[key].isfinite().all()):
        raise CheckpointError(f"{name}: {key!r} must be finite; got NaN or infinity.")
    return state[key]


def _count(name: str, state: dict[str, Tensor], key: str) -> int:
    if key not in state or state[key].numel() != 1:
        raise CheckpointError(f"{name} lacks {key!r}, the number of models averaged.")
    count = int(state[key])
    if count < 2:
        raise CheckpointError(f"{name} averages {count} models; a posterior needs at least 2.")
    return count


def _finish(
    name: str,
    source: str,
    layout: ParameterLayout,
    mean: Tensor,
    sq_mean: Tensor,
    deviations: Tensor,
    n_models: int,
    negative_variance: str,
    var_clamp: float,
    window: int | None = None,
) -> ReleasedGaussian:
    if negative_variance not in NEGATIVE_VARIANCE_RULES:
        rules = ", ".join(NEGATIVE_VARIANCE_RULES)
        raise ValueError(f"negative_variance must be one of {rules}; got {negative_variance!r}.")
    rows = deviations.shape[0]
    divisor = max((rows if window is None else window) - 1, 1)
    variance = sq_mean - mean.square()  # as the file means it, cancellation included
    negative = variance < 0
    count = int(negative.sum())
    if count and negative_variance == "error":
        raise CheckpointError(
            f"{name}: {count} of {variance.numel()} variances are negative (E[x²] − E[x]² in {variance.dtype}). Choose "
            'negative_variance="clamp" for the law of the released code or "deviations" for that of their deviations.'
        )
    if negative_variance == "clamp":
        variance.clamp_(min=var_clamp)
    elif negative_variance == "deviations" and count:
        if rows < 2:
            raise CheckpointError(f'{name} holds {rows} deviations; negative_variance="deviations" needs at least 2.')
        variance[negative] = deviations[:, negative].square().sum(0) / (rows - 1)
    if count:
        _log.warning("%s: %d of %d variances are negative; rule: %s", name, count, variance.numel(), negative_variance)
    provenance = {
        "source": source,
        "n_averaged": n_models,
        "rank": rows,
        "rows": rows,
        "divisor": divisor,
        "centering": "running",
        "correction": 0,
        "negative_variances": count,
        "negative_variance": negative_variance,
    }
    if negative_variance == "clamp":
        provenance["var_clamp"] = var_clamp
    return ReleasedGaussian(mean, variance, deviations, divisor, layout, provenance)
