"""What storing the deviations in fewer bits does to a posterior of a trained network.

Takes the posterior of a quickstart run, stores its deviations in each dtype as the collector does (rounding each row,
with block scales where the dtype needs them), and compares density, KL divergence and predictions with the posterior
as it was. The same normals make the draws of every dtype.

    python -m experiments.quickstart && python -m benchmarks.storage_precision

Writes storage-precision-DATASET.json and .md into --out.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowrank_bdl as lb
from benchmarks.environment import environment
from experiments.common import SettingsError, format_table, write_atomically
from experiments.evaluation import Evaluation, evaluate_method
from experiments.quickstart import Settings, load_data, new_model
from lowrank_bdl.linalg.block_scaling import encode_rows, needs_scale

PROG = "python -m benchmarks.storage_precision"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)


def stored_as(posterior: lb.GaussianPosterior, dtype: torch.dtype) -> lb.GaussianPosterior:
    """Return the posterior with its deviations rounded to ``dtype``."""
    covariance = posterior.covariance
    rows, scale = covariance.root.mT, None
    if needs_scale(dtype):
        rows, scale = encode_rows(rows, dtype)
    else:
        rows = rows.to(dtype)
    narrow = lb.LowRankPlusDiagLinearOperator(rows.mT, covariance.diag, covariance.mix, root_scale=scale)
    return lb.GaussianPosterior(posterior.mean, narrow, posterior.layout, posterior.provenance)


def bytes_per_row(posterior: lb.GaussianPosterior) -> float:
    """Return the bytes of one stored deviation, its scales included: the slope of memory against rank."""
    covariance = posterior.covariance
    stored = covariance.root.nbytes + (0 if covariance.root_scale is None else covariance.root_scale.nbytes)
    return stored / max(covariance.root.shape[-1], 1)


def compare(
    reference: lb.GaussianPosterior, narrow: lb.GaussianPosterior, draws: Tensor, plain: Evaluation, found: Evaluation
) -> dict[str, Any]:
    """Return what changed: sizes in bytes, densities and divergences in nats, predictions on the test images."""
    exact, rounded = (p.covariance.lift(torch.eye(p.covariance.rank)) for p in (reference, narrow))
    before, after = plain.probabilities["test"], found.probabilities["test"]
    difference = (narrow.log_prob(draws) - reference.log_prob(draws)).abs()
    return {
        "bytes_per_row": bytes_per_row(narrow),
        "relative_error_of_deviations": ((rounded - exact).norm() / exact.norm()).item(),
        "log_density_difference_mean_nats": difference.mean().item(),
        "log_density_difference_max_nats": difference.max().item(),
        "kl_nats": lb.kl_divergence(reference, narrow).item(),
        "reverse_kl_nats": lb.kl_divergence(narrow, reference).item(),
        "test": found.metrics["test"],
        "largest_change_of_a_probability": (after - before).abs().max().item(),
        "images_with_another_class": int((after.argmax(-1) != before.argmax(-1)).sum()),
    }


def markdown(record: dict[str, Any]) -> str:
    """Lay the comparison out as a table."""
    head = ["stored as", "bytes / weight", "error of D", "mean |Δ log p|", "KL", "test NLL", "max |Δp|", "other class"]
    rows = []
    for name, row in record["dtypes"].items():
        rows.append(
            [
                name,
                f"{row['bytes_per_row'] / record['parameters']:.3f}",
                f"{row['relative_error_of_deviations']:.1e}",
                f"{row['log_density_difference_mean_nats']:.2g}",
                f"{row['kl_nats']:.2g}",
                f"{row['test']['nll']:.5f}",
                f"{row['largest_change_of_a_probability']:.1e}",
                f"{row['images_with_another_class']} of {record['test_images']:,}",
            ]
        )
    note = (
        f"{record['dataset']}: {record['parameters']:,} weights, rank {record['rank']}, {record['num_samples']} draws "
        "of the float32 posterior; densities and KL(float32 || stored) in nats over all weights."
    )
    return f"# Deviations in fewer bits\n\n{note}\n\n```\n{format_table(head, rows)}\n```\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__, formatter_class=layout)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="folder of a quickstart run")
    parser.add_argument("--data_path", help="folder with the files of MNIST or CIFAR10")
    parser.add_argument("--num_samples", type=int, default=30, help="draws of the weights")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    arguments = parser.parse_args(argv)
    try:
        if arguments.num_samples < 1:
            raise SettingsError(f"--num_samples must be at least 1; got {arguments.num_samples}")
        if not (arguments.run / "results.json").is_file():
            raise SettingsError(f"{arguments.run} is no finished quickstart run (python -m experiments.quickstart)")
        settings = Settings(**json.loads((arguments.run / "settings.json").read_text()))
        data = load_data(settings, arguments.data_path, torch.device("cpu"))
    except SettingsError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    with torch.random.fork_rng():
        network = new_model(settings, data, torch.device("cpu"))
    reference = lb.GaussianPosterior.load(arguments.run / "posterior.safetensors")
    draws = reference.sample(arguments.num_samples, generator=torch.Generator().manual_seed(0))
    splits = {name: getattr(data, name) for name in ("validation", "test")}
    plain = evaluate_method(network, reference, splits, data.train, num_samples=len(draws), seed=0)
    dtypes = {}
    for dtype in DTYPES:
        name, narrow = str(dtype).removeprefix("torch."), stored_as(reference, dtype)
        found = evaluate_method(network, narrow, splits, data.train, num_samples=len(draws), seed=0)
        dtypes[name] = compare(reference, narrow, draws, plain, found)
        if not all(math.isfinite(value) for value in dtypes[name].values() if isinstance(value, float)):
            raise AssertionError(f"{name} gave a number that is not finite: {dtypes[name]}")
    record = {
        "format": "lowrank_bdl-storage-precision",
        "version": 1,
        "environment": environment(torch.device("cpu")),
        "dataset": settings.dataset,
        "parameters": reference.mean.numel(),
        "rank": reference.covariance.rank,
        "num_samples": arguments.num_samples,
        "test_images": len(data.test),
        "dtypes": dtypes,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = f"storage-precision-{settings.dataset}"
    write_atomically(arguments.out / f"{stem}.json", json.dumps(record, indent=2) + "\n")
    write_atomically(arguments.out / f"{stem}.md", markdown(record))
    print(markdown(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
