"""The subspace of the principal directions of K deviations in D coordinates: time and memory, beside peers and a floor.

The floor is one read of the deviations and one write of a basis of their size, in the same rounds; `lowrank_bdl` reads
them twice, once for the K x K matrix and once to combine them. Every answer is judged in float64 before it is timed.

    python -m benchmarks.subspace_pca                                # D = 10^6 and 10^7, K = 20
    python -m benchmarks.subspace_pca --dims 1e6 --rank 50 --threads 1

Writes subspace-pca-HARDWARE.json and .md into --out.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import hand_written, peers
from benchmarks.draw_operations import READ_AND_WRITE, reader_and
from benchmarks.environment import environment, hardware_label
from benchmarks.harness import Call, Check, Contender, Policy, compare
from benchmarks.memory import in_own_process, peak_above
from benchmarks.problems import GaussianProblem, Size
from experiments.common import format_table, write_atomically
from lowrank_bdl.subspaces.principal import pca_subspace

PROG = "python -m benchmarks.subspace_pca"
TARGET = 2.0
"""Times the floor that our time may be, at D = 10^7 and K = 20."""


def _ours(problem: GaussianProblem) -> Call:
    posterior = peers.posterior(problem)
    return lambda: pca_subspace(posterior, problem.size.rank).basis.mT


def _hand(problem: GaussianProblem) -> Call:
    storage, k = problem.storage, problem.size.rank

    def call() -> Tensor:
        values, directions = hand_written.principal_components(storage, k)
        return directions.mul_(values.sqrt().to(directions.dtype)[:, None])

    return call


def _randomized(problem: GaussianProblem) -> Call:
    from sklearn.utils.extmath import randomized_svd

    rows, k = problem.storage.numpy(), problem.size.rank

    def call() -> Tensor:  # n_iter as in the published code
        _, singular, right = randomized_svd(rows, n_components=k, n_iter=5, random_state=0)
        return torch.from_numpy(singular[:, None] * right)

    return call


def _low_rank(function: Callable[..., tuple[Tensor, Tensor, Tensor]], **options: Any) -> Callable[[Any], Call]:
    def prepare(problem: GaussianProblem) -> Call:
        def call() -> Tensor:
            left, singular, _ = function(problem.storage.mT, q=problem.size.rank, **options)
            return (left * singular).mT

        return call

    return prepare


def contenders() -> list[Contender]:
    """Return floor, ours, our route by hand, and peers."""
    return [
        Contender(
            READ_AND_WRITE,
            reader_and(lambda p: torch.empty_like(p.storage).fill_(1.0)),
            floor=True,
        ),
        Contender(peers.OURS, _ours),
        Contender(peers.HAND, _hand),
        Contender("torch.pca_lowrank", _low_rank(torch.pca_lowrank, center=False)),
        Contender("scikit-learn randomized_svd", _randomized, package="scikit-learn"),
    ]


def check(problem: GaussianProblem, answer: Tensor) -> Check:
    """Judge a scaled basis, rows ``(K, D)``: variances, directions, and that they are orthogonal."""
    lengths = torch.stack([row.double().square().sum().sqrt() for row in answer])
    directions = answer / lengths.to(answer.dtype)[:, None]
    errors = problem.oracle.components_errors(lengths.square(), directions)
    limits = {"variances": 1e-4, "residual": 1e-3, "orthonormal": 1e-4}
    return Check.of(**{name: (errors[name], limit) for name, limit in limits.items()})


def measure_peak(contender: str, size: Size) -> dict[str, Any]:
    """Return the peak of one call above its inputs; runs in a process of its own."""
    way = next(way for way in contenders() if way.name == contender)
    way.prepare(GaussianProblem(Size(8192, size.rank, size.dtype, size.device)))()
    problem = GaussianProblem(size)
    above, method = peak_above(way.prepare(problem), problem.device)
    return {"above_inputs": above, "method": method}


def measure(size: Size, *, policy: Policy, memory: bool, timeout_s: float) -> dict[str, Any]:
    """Return times in paired rounds against the floor, and peaks in units of the basis."""
    problem = GaussianProblem(size)
    ways = contenders()
    rows = compare(
        problem,
        ways,
        check,
        device=problem.device,
        policy=policy,
        rng=random.Random(size.seed),
        references=(READ_AND_WRITE, peers.OURS),
    )
    problem.close()
    for row in rows:
        if memory and not row["floor"] and row["times_s"]:
            case = {"contender": row["contender"], "size": size}
            found = in_own_process(measure_peak, case, device=torch.device(size.device), timeout_s=timeout_s)
            if found["status"] == "ok":
                found["bases"] = found["above_inputs"] / size.dk_bytes
            row["memory"] = found
    return {"dim": size.numel, "rank": size.rank, "rows": rows}


def markdown(record: dict[str, Any]) -> str:
    """Lay times and peaks out as a table."""
    head = ["D", "K", "way", "seconds", "time / floor", "95 %", "peak / basis", "error / limit"]
    rows = []
    for found in record["sizes"]:
        for row in found["rows"]:
            ratio = row.get("ratios", {}).get(READ_AND_WRITE)
            low, high = (ratio and ratio["ci95"]) or (None, None)
            bases = row.get("memory", {}).get("bases")
            rows.append(
                [
                    f"{found['dim']:,}",
                    str(found["rank"]),
                    row["contender"],
                    f"{row['median_s']:.3g}" if row["times_s"] else f"{row['status']}: {row['reason']}",
                    f"{ratio['median']:.2f}" if ratio else "",
                    "" if low is None else f"{low:.2f} to {high:.2f}",
                    "" if bases is None else f"{bases:.2f}",
                    f"{row['error']:.1e}" if isinstance(row["error"], float) else "",
                ]
            )
    machine = record["environment"]
    note = (
        f"Medians of paired rounds on {machine['cpu']}, {machine['threads']} threads, torch "
        f"{machine['versions']['torch']}. Peak: memory above the inputs in units of the basis, which is part of it."
    )
    return f"# Subspace of principal directions\n\n{format_table(head, rows)}\n\n{note}\n"


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--dims", type=float, nargs="+", default=[1e6, 1e7], help="sizes D")
    result.add_argument("--rank", type=int, default=20, help="K")
    result.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    result.add_argument("--threads", type=int, help="threads on the CPU; torch's choice by default")
    result.add_argument("--budget", type=float, default=20.0, help="seconds for the rounds at one size")
    result.add_argument("--timeout", type=float, default=600.0, help="seconds for one measurement of memory")
    result.add_argument("--no-memory", action="store_true", help="leave out the measurements of memory")
    result.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    options = parser().parse_args(argv)
    smallest = {"--dims": min(options.dims), "--rank": options.rank}
    if options.threads is not None:
        smallest["--threads"] = options.threads
    for flag, value in smallest.items():
        if not value >= 1 or value != int(value):
            print(f"{PROG}: {flag} must be a whole number of at least 1; got {value}", file=sys.stderr)
            return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    record: dict[str, Any] = {"environment": environment(device), "sizes": []}
    target = options.out / f"subspace-pca-{hardware_label(device)}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    policy = Policy(budget_s=options.budget)
    for dim in options.dims:
        size = Size(int(dim), options.rank, options.dtype)
        record["sizes"].append(measure(size, policy=policy, memory=not options.no_memory, timeout_s=options.timeout))
        write_atomically(target, json.dumps(record, indent=1, allow_nan=False))
        write_atomically(target.with_suffix(".md"), markdown(record))
    print(markdown(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
