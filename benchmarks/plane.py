"""The loss on a plane in weight space: time a point, beside the bare forward passes.

The floor runs the network over the same batches as often as there are points, with one set of weights and nothing done
with the outputs; for batch norm it runs it once more, in training mode, for the statistics. `evaluate_points` makes the
weights of every point, recalibrates batch norm, and sums loss and accuracy. Each round takes as many points of the grid
as one reading of the data serves, so that the ratio is that of the whole plane. Inputs are random numbers of the data's
shape: the time does not depend on their values.

    python -m benchmarks.plane                                  # LeNet5 on 10,000 images and two more, one thread
    python -m benchmarks.plane --networks LeNet5 --budget 300
    python -m benchmarks.plane --networks MLP-2-25-25-2 --num_data 50 --points 4 --budget 1

Writes plane-HARDWARE.json and .md into --out.
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.harness import Call, Check, Contender, Policy, compare
from benchmarks.networks import error_cell, network_parser, policy_of, ratio_cells, run_networks
from experiments.common import format_table
from lowrank_bdl.models import create_model
from lowrank_bdl.models.mlp import MLP
from lowrank_bdl.parameters.batch_norm import recalibrate_batch_norm_
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.surfaces.evaluation import evaluate_points
from lowrank_bdl.surfaces.plane import Plane

PROG = "python -m benchmarks.plane"
BARE = "bare forward passes"
OURS = "evaluate_points"
GRID = 41
TARGET = 1.2
"""Times the bare forward passes that a plane of LeNet5 may cost."""
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A network and the data its plane is looked at on.

    Attributes:
        make: Makes the network.
        shape: Shape of one input.
        num_data: Number of inputs.
        batch_size: Inputs in a batch.
        points: Points in a round.
        batch_norm: Statistics are recalibrated, on the same data.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    num_data: int
    batch_size: int
    points: int = 16
    batch_norm: bool = False


CASES = {
    "LeNet5": Case(lambda: create_model("LeNet5", 10, in_channels=1, image_size=28), (1, 28, 28), 10_000, 500, 4),
    "PreResNet20": Case(lambda: create_model("PreResNet20", 10), (3, 32, 32), 500, 125, 4, batch_norm=True),
    "MLP-2-25-25-2": Case(lambda: MLP(2, in_features=2, hidden=(25, 25)), (2,), 200, 200, 256),
}


class Problem:
    """A plane through three networks with random weights, some points of its grid, and batches."""

    def __init__(self, case: Case, seed: int, device: torch.device) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            networks = [case.make().to(device) for _ in range(3)]
            x = torch.randn(case.num_data, *case.shape).to(device)
            y = torch.randint(2, (case.num_data,)).to(device)
        self.case, self.model = case, networks[0].eval()
        self.layout = ParameterLayout.from_module(self.model)
        self.plane = Plane.through(*(self.layout.flatten(network) for network in networks), layout=self.layout)
        grid = self.plane.grid(GRID).flatten(0, 1)
        self.points = grid[torch.linspace(0, len(grid) - 1, case.points).long()]
        self.batches = list(zip(x.split(case.batch_size), y.split(case.batch_size), strict=True))
        self.expected = self.by_hand()

    @torch.no_grad()
    def by_hand(self) -> Tensor:
        """Return the losses, summed in float64, by writing each point's weights into the network."""
        own = self.layout.flatten(self.model)
        losses = []
        for theta in self.plane.to_theta(self.points):
            self.layout.assign_(self.model, theta)
            if self.case.batch_norm:
                recalibrate_batch_norm_(self.model, self.batches)
            total = sum(cross_entropy(self.model(x), y, reduction="sum").double() for x, y in self.batches)
            losses.append(total / self.case.num_data)
        self.layout.assign_(self.model, own)
        return torch.stack([torch.as_tensor(loss) for loss in losses])


def _bare(problem: Problem) -> Call:
    @torch.no_grad()
    def call() -> None:
        for _ in range(len(problem.points)):
            for training in (True, False) if problem.case.batch_norm else (False,):
                problem.model.train(training)
                for x, _ in problem.batches:
                    problem.model(x)

    return call


def _ours(problem: Problem) -> Call:
    def call() -> Tensor:
        return evaluate_points(
            problem.model,
            problem.points,
            problem.batches,
            cross_entropy,
            surface=problem.plane,
            bn_loader=problem.batches if problem.case.batch_norm else None,
            progress=False,
        ).loss

    return call


def check(problem: Problem, answer: Tensor) -> Check:
    """Judge losses, relative to the largest."""
    error = (answer - problem.expected).abs().max() / problem.expected.abs().max()
    return Check.of(losses=(error.item(), TOLERANCE))


def measure(case: Case, *, device: torch.device, policy: Policy, seed: int) -> dict[str, Any]:
    """Return a network's record."""
    problem = Problem(case, seed, device)
    ways = [Contender(BARE, _bare, floor=True), Contender(OURS, _ours)]
    rows = compare(problem, ways, check, device=device, policy=policy, rng=random.Random(seed), references=(BARE,))
    return {
        "parameters": problem.layout.numel,
        "num_data": case.num_data,
        "batch_size": case.batch_size,
        "points": case.points,
        "rows": rows,
    }


def markdown(record: dict[str, Any]) -> str:
    """Lay the times out as a table."""
    whole = f"{GRID} x {GRID} points"
    head = ["network", "weights", "data", "way", f"time / {BARE}", "95 %", "ms a point", whole, "error"]
    rows = []
    for name, found in record["networks"].items():
        sizes = [f"{found['parameters']:,}", f"{found['num_data']:,}"]
        for row in found["rows"]:
            seconds = row["median_s"] / found["points"] if row["times_s"] else None
            times = ["", ""] if seconds is None else [f"{seconds * 1e3:.3g}", f"{seconds * GRID**2:,.0f} s"]
            rows.append([name, *sizes, row["contender"], *ratio_cells(row, BARE), *times, error_cell(row)])
            name, sizes = "", ["", ""]
    machine = record["environment"]
    note = (
        f"{machine['cpu']}, {machine['threads']} thread(s), torch {machine['versions']['torch']}. Medians of ratios "
        f"within a round; the target for LeNet5 is {TARGET}. Times of a whole plane are those of a round, scaled; "
        f"errors in units of {TOLERANCE:.0e} of the largest loss. Points of small perceptrons are evaluated at once, "
        "which can be faster than bare passes one after another."
    )
    return f"# The loss on a plane\n\n{note}\n\n```\n{format_table(head, rows)}\n```\n"


NUMBERS = {"num_data": "inputs, for all networks", "points": "points in a round, for all networks"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    options = network_parser(PROG, __doc__, list(CASES), NUMBERS, 60.0).parse_args(argv)

    def of_network(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
        case = CASES[name]
        case = replace(case, num_data=options.num_data or case.num_data, points=options.points or case.points)
        policy = policy_of(options, min_rounds=3, once_above_s=120.0)
        return measure(case, device=device, policy=policy, seed=options.seed)

    return run_networks(PROG, "plane", options, list(NUMBERS), of_network, markdown)


if __name__ == "__main__":
    sys.exit(main())
