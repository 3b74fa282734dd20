"""One cell of `experiments.synthetic_regression`: a method's functions on a grid, and how well they predict."""

import json
import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lowrank_bdl as lb
from experiments.common import RunDir, replacing
from experiments.synthetic_regression_data import features
from experiments.synthetic_regression_methods import FITS, Bench, Outcome
from experiments.uci_metrics import Forecast, metrics_of

MOST_FUNCTIONS = 200  # that a cell keeps

Cell = dict[str, Any]


def cell_name(method: str, suffix: str = "json") -> str:
    return f"cells/{method}.{suffix}"


def read_cell(run: RunDir, bench: Bench, method: str) -> Cell | None:
    """Return what an earlier part of this run found, if it did.

    Raises:
        SettingsError: If the file is damaged or of another recipe.
    """
    if not (run.path / cell_name(method, "npz")).exists():
        return None
    return run.read_cell(cell_name(method), bench.recipe)


def read_functions(run: RunDir, method: str) -> np.ndarray:
    """Return the functions that a cell kept, (S, G)."""
    with np.load(run.path / cell_name(method, "npz")) as arrays:
        return np.asarray(arrays["functions"], dtype=np.float64)


def correlation(functions: np.ndarray) -> np.ndarray:
    r"""Return corr(f(x), f(x')) over functions, (S, G) to (G, G); NaN where f does not vary."""
    centred = functions - functions.mean(0)
    covariance = centred.T @ centred / max(len(functions) - 1, 1)
    std = np.sqrt(np.diag(covariance))
    std = np.where(std > 1e-9 * max(1.0, float(np.abs(functions).max())), std, np.nan)
    return covariance / np.outer(std, std)


def metrics(bench: Bench, outcome: Outcome) -> dict[str, dict[str, float]]:
    """Return how well the held-out rows are predicted, by where they lie."""
    found = {}
    for name, (x, y) in bench.data.held_out.items():
        predicted = lb.predict(
            outcome.net,
            outcome.thetas,
            [(features(x).to(outcome.thetas.dtype), y.to(outcome.thetas.dtype).unsqueeze(1))],
            likelihood="gaussian",
            noise_variance=bench.settings.noise_variance,
            progress=False,
        )
        numbers = metrics_of(Forecast.of(predicted), std=1.0)
        spread = predicted.epistemic_variance
        assert spread is not None
        found[name] = {
            **{key: numbers[key] for key in ("log_likelihood", "gaussian_log_likelihood", "rmse", "coverage")},
            "function_std": spread.double().mean().sqrt().item(),
            "rows": len(x),
        }
    return found


def function_rhat(functions: Tensor, chains: int) -> dict[str, float]:
    """Return R-hat of f(x), the largest and the median over the grid."""
    values = lb.split_rhat(functions.unflatten(0, (chains, -1)))
    values = values[~values.isnan()]
    if not len(values):
        return {"largest_function_rhat": math.nan, "median_function_rhat": math.nan}
    return {"largest_function_rhat": values.max().item(), "median_function_rhat": values.median().item()}


def run_cell(run: RunDir, bench: Bench, method: str) -> Cell:
    """Fit one method, look at its functions, and write its cell."""
    began = time.perf_counter()
    outcome = FITS[method](bench)
    with torch.no_grad():
        functions = bench.functions(outcome)
        details = dict(outcome.details)
        if outcome.chains is not None:
            details |= function_rhat(functions, outcome.chains)
        cell = {
            "method": method,
            "recipe": bench.recipe,
            "parameters": outcome.thetas.shape[1],
            "draws": len(functions),
            "mean": functions.mean(0).tolist(),
            "std": functions.std(0, correction=0).tolist(),
            "metrics": metrics(bench, outcome),
            "details": details,
            "seconds": time.perf_counter() - began,
        }
    kept = functions[torch.linspace(0, len(functions) - 1, min(len(functions), MOST_FUNCTIONS)).round().long()]
    with replacing(run.path / cell_name(method, "npz")) as file:
        np.savez_compressed(file, x=bench.grid.numpy(), functions=kept.float().numpy())
    run.write_json(cell_name(method), cell)
    run.log(method=method, seconds=cell["seconds"])
    return dict(json.loads(json.dumps(cell)))
