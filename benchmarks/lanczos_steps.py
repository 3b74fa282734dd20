"""The eigensolver's own time and memory, on an operator that costs next to nothing.

The floor is what two-pass reorthogonalisation cannot do without: at each step four matrix-vector products with the
basis so far, in memory that has been touched before. The solver's time is a whole run's: allocation of the basis, the
products, norms, small eigenproblems and the eigenvectors in the end are in it, and none of that in the floor.
"""

import importlib
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Call, Check, Contender, Policy, compare, timed
from benchmarks.memory import in_own_process, peak_above
from lowrank_bdl.linalg.lanczos import Eigenpairs, lanczos

OURS = "lowrank_bdl"
PEER = "linear_operator lanczos_tridiag"
FLOOR = "four GEMV passes over the basis a step"
ORTHOGONALITY = 1e-5
"""The largest entry of Q'Q - I allowed, in float32."""


@dataclass(frozen=True)
class StepSize:
    """A run on a diagonal matrix.

    Attributes:
        dim: D.
        steps: How many steps, all of which are kept.
        top: Eigenpairs to compute in the end, from the upper end.
        bottom: Likewise from the lower end.
        seed: Of the matrix and the start vector.
        device: Where.
    """

    dim: int
    steps: int
    top: int = 20
    bottom: int = 5
    seed: int = 0
    device: str = "cpu"

    @property
    def vector_bytes(self) -> int:
        """Size of one vector."""
        return 4 * self.dim


class StepProblem:
    """A diagonal matrix with a spectrum like that of a Hessian: a bulk around zero, and values far above and below."""

    def __init__(self, size: StepSize) -> None:
        self.size, self.device = size, torch.device(size.device)
        generator = torch.Generator().manual_seed(size.seed)
        diagonal = 0.01 * torch.randn(size.dim, generator=generator)
        diagonal[:20] = torch.logspace(2, -1, 20)
        diagonal[20:25] = -torch.logspace(0, -1, 5)
        self.diagonal = diagonal.to(self.device)
        self.start = torch.randn(size.dim, generator=generator).to(self.device)

    def product(self, vector: Tensor) -> Tensor:
        """Multiply a vector ``(D,)``."""
        return self.diagonal * vector

    def column_product(self, column: Tensor) -> Tensor:
        """Multiply a column ``(D, 1)``."""
        return self.diagonal.unsqueeze(-1) * column


def floor(problem: StepProblem) -> Call:
    """Return the four passes of every step over a basis that is there."""
    size = problem.size
    basis = torch.full((size.steps, size.dim), 1e-3, device=problem.device)
    vector = problem.start.clone()

    def call() -> None:
        for step in range(1, size.steps + 1):
            for _ in range(2):
                coefficients = basis[:step] @ vector
                vector.addmv_(basis[:step].mT, coefficients.mul_(1e-9), alpha=-1)

    return call


def own_steps(problem: StepProblem) -> Call:
    """Return a run of ours that cannot converge before its products are spent."""
    size = problem.size
    wanted = (size.top, size.bottom)
    return lambda: lanczos(
        problem.product, wanted, tol=0.0, num_basis=size.steps, max_matvecs=size.steps, start=problem.start
    )


def peer_steps(problem: StepProblem) -> Call:
    """Return as many steps of linear_operator's."""
    size, module = problem.size, importlib.import_module("linear_operator.utils.lanczos")
    shape = torch.Size((size.dim,) * 2)
    return lambda: module.lanczos_tridiag(
        problem.column_product,
        size.steps,
        dtype=problem.start.dtype,
        device=problem.device,
        matrix_shape=shape,
        init_vecs=problem.start.unsqueeze(-1),
    )


def contenders(peer: bool) -> list[Contender]:
    """Return floor, ours, and where asked for the peer."""
    found = [Contender(FLOOR, floor, floor=True), Contender(OURS, own_steps)]
    note = "basis and tridiagonal matrix; no eigenvectors"
    return [*found, Contender(PEER, peer_steps, package="linear-operator", note=note)] if peer else found


def check(problem: StepProblem, answer: Any) -> Check:
    """Judge a run: columns must be orthonormal, and our residuals as claimed, relative to the largest eigenvalue."""
    vectors = answer.eigenvectors if isinstance(answer, Eigenpairs) else answer[0]
    # in float64: a float32 sum of 10^6 products is itself wrong by 1e-3
    gram = torch.stack([part.mT @ part for part in map(torch.Tensor.double, vectors.split(2**16))]).sum(0)
    orthogonality = (gram - torch.eye(len(gram), device=gram.device)).abs().max().item()
    errors = {"orthogonality": (orthogonality, ORTHOGONALITY)}
    if isinstance(answer, Eigenpairs):
        steps = abs(answer.num_matvecs - problem.size.steps)
        measured = [
            (problem.product(vector).double() - value * vector.double()).norm().item()
            for value, vector in zip(answer.eigenvalues.tolist(), vectors.mT, strict=True)
        ]
        off = (torch.tensor(measured) - answer.residuals.cpu()).abs().max() / answer.eigenvalues.abs().max().cpu()
        errors |= {"residuals": (off.item(), 1e-5), "steps": (float(steps), 0.5)}
    return Check.of(**errors)


def measure_peak(contender: str, size: StepSize) -> dict[str, Any]:
    """Return the peak of one run above its inputs; runs in a process of its own."""
    way = next(way for way in contenders(peer=True) if way.name == contender)
    least = size.top + size.bottom + 1
    way.prepare(StepProblem(replace(size, dim=32_768, steps=max(min(size.steps, 40), least))))()
    problem = StepProblem(size)
    call, seconds = way.prepare(problem), 0.0

    def timed_call() -> Any:
        nonlocal seconds
        seconds, answer = timed(call, problem.device)
        return answer

    above, method = peak_above(timed_call, problem.device)
    return {"above_inputs": above, "method": method, "seconds": seconds}


def measure(size: StepSize, *, peer: bool, policy: Policy, timeout_s: float) -> dict[str, Any]:
    """Return times in paired rounds against the floor, and peaks in units of a vector beyond the basis."""
    problem, rng, ways = StepProblem(size), random.Random(size.seed), contenders(peer)
    rows = compare(problem, ways, check, device=problem.device, policy=policy, rng=rng, references=(FLOOR, OURS))
    del problem
    for row in rows:
        if row["floor"]:
            continue
        case = {"contender": row["contender"], "size": size}
        row["memory"] = in_own_process(measure_peak, case, device=torch.device(size.device), timeout_s=timeout_s)
        if row["memory"]["status"] == "ok":
            vectors = row["memory"]["above_inputs"] / size.vector_bytes
            row["memory"] |= {"vectors_beyond_basis": vectors - size.steps, "bases": vectors / size.steps}
    return {"dim": size.dim, "steps": size.steps, "wanted": [size.top, size.bottom], "rows": rows}
