"""Ways to both ends of a Hessian's spectrum: ours, and those of other packages where they are installed.

Every way starts from the same random vector, makes its operator anew, leaves out checks of it, and has its products
counted. Packages are imported when they are used.
"""

import copy
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.environment import version_of
from benchmarks.harness import Call, Contender
from benchmarks.hessian_problem import Answer, HessianProblem, HessianSize
from lowrank_bdl.curvature.hessian import HessianLinearOperator
from lowrank_bdl.linalg.lanczos import LanczosProgress, lanczos

OURS = "lowrank_bdl, tol 1e-3"
OURS_TIGHT = "lowrank_bdl, tol 1e-5"
OURS_WIDE = "lowrank_bdl, tol 1e-3, no restart"
WIDE = 4
"""Basis vectors an eigenpair with which ours does not restart: peers that are told how many steps to take never do."""
PEERS = ("curvlinops-for-pytorch", "pyhessian", "hessian-eigenthings", "linear-operator", "scipy")


class Counted:
    """A function of one vector, or of several in columns, that counts vectors."""

    def __init__(self, product: Callable[[Any], Any]) -> None:
        self.product, self.count = product, 0

    def __call__(self, vectors: Any) -> Any:
        self.count += 1 if vectors.ndim == 1 else vectors.shape[1]
        return self.product(vectors)


def own_product(problem: HessianProblem) -> Counted:
    """Return counted products with our operator."""
    data = (problem.x, problem.y)
    return Counted(HessianLinearOperator(problem.model, cross_entropy, data, check=False).matmul)


def ours(problem: HessianProblem, tol: float, num_basis: int | None = None) -> Answer:
    """Find both ends in one run; None leaves the size of the basis to the solver, which then may restart."""
    size, product = problem.size, own_product(problem)
    pairs = lanczos(product, (size.top, size.bottom), tol=tol, num_basis=num_basis, start=problem.start)
    return Answer.ends(pairs.eigenvalues, pairs.eigenvectors, size, product.count)


def wide(size: HessianSize) -> int:
    """Return how many vectors a basis has that needs no restart."""
    return max(WIDE * (size.top + size.bottom), 60)


def descent(problem: HessianProblem, tol: float, max_matvecs: int) -> list[tuple[int, float]]:
    """Return what residual over the largest value our run, of a basis that is wide, has after so many products."""
    size, found = problem.size, []

    def note(progress: LanczosProgress) -> None:
        if len(progress.residuals) == size.top + size.bottom:
            scale = progress.tolerance / tol
            found.append((progress.num_matvecs, progress.residuals.max().item() / scale))

    counts, product = (size.top, size.bottom), own_product(problem)
    lanczos(
        product,
        counts,
        tol=tol,
        num_basis=wide(size),
        start=problem.start,
        max_matvecs=max_matvecs,
        callback=note,
    )
    return found


def tridiagonal(problem: HessianProblem, steps: int, shipped: bool) -> Answer:
    """Take linear_operator's Lanczos steps, and eigenvalues from torch, or as linear_operator has them."""
    utilities = importlib.import_module("linear_operator.utils.lanczos")
    product, size = own_product(problem), problem.size
    basis, projected = utilities.lanczos_tridiag(
        product,
        steps,
        dtype=problem.start.dtype,
        device=problem.device,
        matrix_shape=torch.Size((problem.num_weights,) * 2),
        init_vecs=problem.start.unsqueeze(-1),
    )
    decompose = utilities.lanczos_tridiag_to_diag if shipped else torch.linalg.eigh
    values, coordinates = decompose(projected)
    found = Answer.ends(values, coordinates, size, product.count)
    return Answer(found.top, basis @ found.top_vectors, found.bottom, basis @ found.bottom_vectors, product.count)


def arpack(problem: HessianProblem, tol: float) -> Answer:
    """Run SciPy's eigsh for each end, on the operator of curvlinops."""
    curvlinops, sparse = importlib.import_module("curvlinops"), importlib.import_module("scipy.sparse.linalg")
    parameters, data = list(problem.model.parameters()), [(problem.x, problem.y)]
    operator = curvlinops.HessianLinearOperator(
        problem.model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False
    ).to_scipy()
    product, start = Counted(operator.matvec), problem.start.double().cpu().numpy()
    counted, found = sparse.LinearOperator(operator.shape, matvec=product, dtype=operator.dtype), []
    for count, which in ((problem.size.top, "LA"), (problem.size.bottom, "SA")):
        values, vectors = sparse.eigsh(counted, count, which=which, tol=tol, v0=start)
        found.append((torch.from_numpy(values.copy()), torch.from_numpy(vectors.copy()).to(problem.device)))
    return _two_ends(found, problem.size, product.count)


def eigenthings(problem: HessianProblem, steps: int | None) -> Answer:
    """Run hessian-eigenthings for each end, so many steps, or as many as it takes on its own account."""
    package = importlib.import_module("hessian_eigenthings")
    operators = importlib.import_module("hessian_eigenthings.operators")
    loss = package.supervised_loss(nn.CrossEntropyLoss())
    operator = operators.HessianOperator(problem.model, [(problem.x, problem.y)], loss)
    product = operator.matvec = Counted(operator.matvec)
    options = {"seed": problem.size.seed, "max_iter": steps}
    found = []
    for count, which in ((problem.size.top, "LA"), (problem.size.bottom, "SA")):
        pairs = package.lanczos(operator, k=count, which=which, **options)
        found.append((pairs.eigenvalues, pairs.eigenvectors.mT))
    return _two_ends(found, problem.size, product.count)


def power_iteration(problem: HessianProblem) -> Answer:
    """Run pyhessian's power iteration for the largest values in size, as many as are wanted at both ends."""
    module = importlib.import_module("pyhessian.hessian")
    size, count = problem.size, 0
    multiply = module.hessian_vector_product

    def product(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return multiply(*arguments)

    model = copy.deepcopy(problem.model)  # it fills .grad
    with torch.random.fork_rng(), mock.patch.object(module, "hessian_vector_product", product):
        torch.manual_seed(size.seed)
        on_gpu = problem.device.type == "cuda"
        solver = module.hessian(model, nn.CrossEntropyLoss(), data=(problem.x, problem.y), cuda=on_gpu)
        values, parts = solver.eigenvalues(top_n=size.top + size.bottom)
    model.zero_grad()  # which holds the graph that holds it
    found = torch.tensor(values, dtype=torch.float64)
    vectors = torch.stack([torch.cat([part.flatten() for part in vector]) for vector in parts], 1).detach()
    above, below = found > 0, found < 0
    return _two_ends([(found[above], vectors[:, above]), (found[below], vectors[:, below])], size, count)


def _two_ends(ends: Sequence[tuple[Tensor, Tensor]], size: HessianSize, products: int) -> Answer:
    """Join values and vectors from the top, in any order, with those from the bottom."""
    (above, above_vectors), (below, below_vectors) = ends
    first, last = above.argsort(descending=True)[: size.top], below.argsort()[: size.bottom]
    return Answer(above[first], above_vectors[:, first], below[last], below_vectors[:, last], products)


def contenders(size: HessianSize, steps: int) -> list[Contender]:
    """Return the ways to compare.

    Args:
        size: What is decomposed.
        steps: Of those that are told how many to take and do not stop by themselves.
    """
    steps = max(steps, size.top + size.bottom)

    def way(name: str, solve: Callable[[HessianProblem], Answer], note: str, package: str | None = None) -> Contender:
        def quiet(problem: HessianProblem) -> Answer:
            with warnings.catch_warnings():
                if package is not None:
                    warnings.simplefilter("ignore")  # of a peer about itself
                return solve(problem)

        def prepare(problem: HessianProblem) -> Call:
            return lambda: quiet(problem)

        return Contender(name, prepare, package=package, note=note)

    arpack_note = "two runs; stops by itself"
    fixed = "told how many steps to take: as many as ours without restart took to 1e-3"
    return [
        way(OURS, lambda problem: ours(problem, 1e-3), "both ends in one run; stops by itself"),
        way(OURS_TIGHT, lambda problem: ours(problem, 1e-5), "both ends in one run; stops by itself"),
        way(
            OURS_WIDE,
            lambda problem: ours(problem, 1e-3, wide(size)),
            f"both ends in one run, {wide(size)} basis vectors; stops by itself",
        ),
        way(
            "linear_operator lanczos_tridiag, torch.linalg.eigh",
            lambda problem: tridiagonal(problem, steps, shipped=False),
            f"on our operator; {fixed}",
            "linear-operator",
        ),
        way(
            "linear_operator lanczos_tridiag, its to_diag",
            lambda problem: tridiagonal(problem, steps, shipped=True),
            f"on our operator; {fixed}; turns negative eigenvalues into 1 and their vectors into 0",
            "linear-operator",
        ),
        way(
            "curvlinops, SciPy eigsh, tol 1e-3",
            lambda problem: arpack(problem, 1e-3),
            arpack_note,
            "curvlinops-for-pytorch",
        ),
        way(
            "curvlinops, SciPy eigsh, tol 1e-5",
            lambda problem: arpack(problem, 1e-5),
            arpack_note,
            "curvlinops-for-pytorch",
        ),
        way(
            "hessian-eigenthings",
            lambda problem: eigenthings(problem, steps),
            f"two runs; {fixed}, in each; beyond 50 steps it does not reorthogonalise unless told to",
            "hessian-eigenthings",
        ),
        way(
            "hessian-eigenthings, its defaults",
            lambda problem: eigenthings(problem, None),
            "two runs, of twice as many steps as eigenvalues",
            "hessian-eigenthings",
        ),
        way(
            "pyhessian, its defaults",
            power_iteration,
            f"the {size.top + size.bottom} largest in size: it cannot be asked for one end",
            "pyhessian",
        ),
    ]


def missing(ways: list[Contender]) -> dict[str, str]:
    """Return the contenders that are left out because what they need is not installed, with the reason."""
    absent = {way.package for way in ways if way.package is not None and version_of(way.package) is None}
    return {way.name: f"left out: {way.package} is not installed" for way in ways if way.package in absent}


def versions() -> dict[str, str | None]:
    """Return the installed versions of the peers, None for those that are missing."""
    return {package: version_of(package) for package in PEERS}
