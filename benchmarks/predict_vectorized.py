"""Predictions under several weight vectors: one network after another, or several at once by torch.vmap.

Every way of `lowrank_bdl.predict` is timed on the same weights and one batch of random inputs (the time does not depend
on their values), after its probabilities agreed with those of one network after another to 1e-6. Ways run in random
order within each round, and ratios are of times of the same round.

    python -m benchmarks.predict_vectorized                          # on one thread, about a minute
    python -m benchmarks.predict_vectorized --networks LeNet5 --batch_size 100 --num_samples 30

Writes predict-vectorized-HARDWARE.json and .md into --out.
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from benchmarks.harness import Call, Check, Contender, Policy, compare
from benchmarks.networks import error_cell, network_parser, policy_of, ratio_cells, run_networks
from experiments.common import format_table
from experiments.models import SmallConvNet
from lowrank_bdl.models import create_model
from lowrank_bdl.models.mlp import MLP

PROG = "python -m benchmarks.predict_vectorized"
ALONE = "one after another"
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Case:
    """A network and how it is used.

    Attributes:
        make: Makes the network.
        shape: Shape of one input.
        batch_size: Examples in the batch.
        num_samples: Weight vectors; fewer for slow networks, whose ratios do not depend on it.
        chunks: Numbers of networks at once, besides what the library chooses.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch_size: int
    num_samples: int = 30
    chunks: tuple[int, ...] = (3, 10, 30)


def _perceptron(*sizes: int) -> Callable[[], nn.Module]:
    return lambda: MLP(sizes[-1], in_features=sizes[0], hidden=sizes[1:-1])


CASES = {
    "MLP 13-50-2, batch 32": Case(_perceptron(13, 50, 2), (13,), 32),
    "MLP 13-50-2, batch 500": Case(_perceptron(13, 50, 2), (13,), 500),
    "MLP 64-64-10, batch 500": Case(_perceptron(64, 64, 10), (64,), 500),
    "MLP 64-256-10, batch 500": Case(_perceptron(64, 256, 10), (64,), 500),
    "MLP 784-200-10, batch 500": Case(_perceptron(784, 200, 10), (784,), 500),
    "SmallConvNet": Case(lambda: SmallConvNet(1, 28, 10), (1, 28, 28), 500, 6, (2, 6)),
    "LeNet5": Case(lambda: create_model("LeNet5", 10, in_channels=1, image_size=28), (1, 28, 28), 500, 4, (2, 4)),
    "PreResNet20": Case(lambda: create_model("PreResNet20", 10), (3, 32, 32), 50, 4, (2, 4)),
}


class Problem:
    """A network, weight vectors around its own, one batch, and the probabilities that every way must give."""

    def __init__(self, case: Case, seed: int, device: torch.device) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = case.make().to(device)
        generator = torch.Generator().manual_seed(seed)
        layout = lb.ParameterLayout.from_module(self.model)
        noise = torch.randn(case.num_samples, layout.numel, generator=generator).to(device)
        self.thetas = layout.flatten(self.model).detach() + 0.01 * noise
        self.batch = torch.randn(case.batch_size, *case.shape, generator=generator).to(device)
        self.expected = self.predict(vectorize=False)

    def predict(self, **options: Any) -> Tensor:
        """Return the mean probabilities."""
        options = {"bn_loader": "stored", "progress": False, **options}  # any statistics take the same time
        return lb.predict(self.model, self.thetas, [self.batch], **options).mean


def check(problem: Problem, answer: Tensor) -> Check:
    """Judge probabilities."""
    return Check.of(probabilities=((answer - problem.expected).abs().max().item(), TOLERANCE))


def contenders(case: Case) -> list[Contender]:
    """Return the ways to compare."""

    def way(name: str, **options: Any) -> Contender:
        def prepare(problem: Problem) -> Call:
            return lambda: problem.predict(**options)

        return Contender(name, prepare)

    chunks = sorted({min(chunk, case.num_samples) for chunk in case.chunks})
    return [
        way(ALONE, vectorize=False),
        way("auto", vectorize="auto"),
        way("at once, own choice", vectorize=True),
        *(way(f"{chunk} at once", vectorize=True, chunk_size=chunk) for chunk in chunks),
    ]


def measure(case: Case, *, device: torch.device, policy: Policy, seed: int) -> dict[str, Any]:
    """Return a network's record."""
    problem = Problem(case, seed, device)
    rows = compare(
        problem, contenders(case), check, device=device, policy=policy, rng=random.Random(seed), references=(ALONE,)
    )
    return {
        "parameters": problem.thetas.shape[1],
        "batch_size": case.batch_size,
        "num_samples": case.num_samples,
        "rows": rows,
    }


def markdown(record: dict[str, Any]) -> str:
    """Lay the times out as a table."""
    head = ["network", "weights", "batch", "samples", "way", f"time / {ALONE}", "95 %", "error"]
    rows = []
    for name, found in record["networks"].items():
        sizes = [f"{found['parameters']:,}", str(found["batch_size"]), str(found["num_samples"])]
        for row in found["rows"]:
            rows.append([name, *sizes, row["contender"], *ratio_cells(row, ALONE), error_cell(row)])
            name, sizes = "", ["", "", ""]
    machine = record["environment"]
    note = (
        f"{machine['cpu']}, {machine['threads']} thread(s), torch {machine['versions']['torch']}. Medians of ratios "
        "within a round, below 1 is faster; errors in units of 1e-6 of probability."
    )
    return f"# Predictions under several weight vectors at once\n\n{note}\n\n```\n{format_table(head, rows)}\n```\n"


NUMBERS = {
    "batch_size": "examples in the batch, for all networks",
    "num_samples": "weight vectors, for all networks",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    options = network_parser(PROG, __doc__, list(CASES), NUMBERS, 5.0).parse_args(argv)

    def of_network(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
        case = CASES[name]
        changes = {number: getattr(options, number) or getattr(case, number) for number in NUMBERS}
        policy = policy_of(options, min_rounds=2, once_above_s=60.0)
        return measure(replace(case, **changes), device=device, policy=policy, seed=options.seed)

    return run_networks(PROG, "predict-vectorized", options, list(NUMBERS), of_network, markdown)


if __name__ == "__main__":
    sys.exit(main())
