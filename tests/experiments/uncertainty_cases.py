"""Cells as `experiments.uncertainty` writes them, with made-up numbers."""

from typing import Any

import numpy as np

from experiments.uncertainty_plots import entropy_counts


def cell(method: str, seed: int, nll: float, **changes: Any) -> dict[str, Any]:
    """One cell; its numbers are a function of the NLL."""
    metrics = {"accuracy": 1 - nll / 4, "nll": nll, "brier": nll / 2, "ece": nll / 10}
    random = np.random.default_rng(seed)
    return {
        "method": method,
        "seed": seed,
        "epochs": 20,
        "networks": 30,
        "levels": {"scale": 0.5, "labels": "sampled"},
        "tried": [[0.5, nll]],
        "metrics": {"test": {**metrics, **{f"{name}_se": value / 20 for name, value in metrics.items()}}},
        "foreign": {"noise": {"auroc": 0.9, "aupr": 0.8, "fpr95": 0.3, "divergence": 2.5}},
        "reliability": {"confidence": [0.4, 0.9, 0.9999], "accuracy": [0.5, 0.85, 1.0], "count": [3, 3, 4]},
        "entropy": {
            "test": entropy_counts(random.exponential(0.01, 500)).tolist(),
            "noise": entropy_counts(random.uniform(0.2, 1.5, 300)).tolist(),
        },
        **changes,
    }


def cells(nlls: dict[str, list[float]]) -> dict[str, list[dict[str, Any]]]:
    """Cells of several methods, a value of the NLL a seed."""
    return {method: [cell(method, seed, nll) for seed, nll in enumerate(own)] for method, own in nlls.items()}
