"""The network whose Hessian is decomposed, exact products with it, and what a set of eigenpairs is worth."""

import copy
import importlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.datasets.digits import DIGITS, read_digits

NUM_WEIGHTS = 21_634


@dataclass(frozen=True)
class HessianSize:
    """What is decomposed, and how much of it.

    Attributes:
        images: How many of scikit-learn's digits, 8 x 8 pixels.
        train_steps: Steps of gradient descent on them before, so that a few eigenvalues stand out.
        top: Largest eigenvalues to find.
        bottom: Smallest ones.
        seed: Of weights and start vector.
        device: Where.
    """

    images: int = 128
    train_steps: int = 20
    top: int = 20
    bottom: int = 5
    seed: int = 0
    device: str = "cpu"

    def tiny(self) -> "HessianSize":
        """Return a size that takes no time, to have code and buffers in place before memory is measured."""
        return replace(self, images=4, train_steps=1, top=2, bottom=1)


@dataclass(frozen=True)
class Answer:
    """Eigenpairs as a solver gives them.

    Attributes:
        top: Eigenvalues from the upper end, the largest first.
        top_vectors: Their eigenvectors in columns.
        bottom: Eigenvalues from the lower end, the smallest first.
        bottom_vectors: Their eigenvectors in columns.
        products: Products with the Hessian that were needed.
    """

    top: Tensor
    top_vectors: Tensor
    bottom: Tensor
    bottom_vectors: Tensor
    products: int

    @classmethod
    def ends(cls, values: Tensor, vectors: Tensor, size: HessianSize, products: int) -> "Answer":
        """Take both ends of some pairs in any order."""
        order = values.argsort(descending=True)
        top, bottom = order[: size.top], order.flip(0)[: size.bottom]
        return cls(values[top], vectors[:, top], values[bottom], vectors[:, bottom], products)


def network() -> nn.Module:
    """Return a convolutional network of `NUM_WEIGHTS` weights for images of 8 x 8 pixels."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 8),
        nn.MaxPool2d(2),
        *block(8, 24),
        *block(24, 34),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 34, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


class HessianProblem:
    """A network in evaluation mode, the images it was trained on, and a start vector for all solvers."""

    def __init__(self, size: HessianSize) -> None:
        self.size, self.device = size, torch.device(size.device)
        data = read_digits(Path(), train=True)
        images = data.images[: size.images].sub(DIGITS.mean[0]).div(DIGITS.std[0])
        self.x, self.y = images.to(self.device), data.targets[: size.images].to(self.device)
        with torch.random.fork_rng():
            torch.manual_seed(size.seed)
            self.model = network().to(self.device)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(size.train_steps):
            optimizer.zero_grad()
            cross_entropy(self.model(self.x), self.y).backward()
            optimizer.step()
        self.model.zero_grad()
        self.model.eval()
        self.num_weights = sum(p.numel() for p in self.model.parameters())
        generator = torch.Generator().manual_seed(size.seed)
        self.start = torch.randn(self.num_weights, generator=generator).to(self.device)

    @property
    def loss(self) -> float:
        """The mean loss over the images."""
        with torch.no_grad():
            return cross_entropy(self.model(self.x), self.y).item()

    @cached_property
    def exact(self) -> "ExactHessian":
        """Products in float64; no solver is given them."""
        return ExactHessian(self.model, self.x, self.y)


class ExactHessian:
    """Products in float64 with the Hessian of the mean loss, through a graph of the gradient that is kept."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        model = copy.deepcopy(model).double()
        self._parameters = list(model.parameters())
        loss = cross_entropy(model(x.double()), y)
        self._gradient = torch.autograd.grad(loss, self._parameters, create_graph=True)

    def __call__(self, vector: Tensor) -> Tensor:
        parts = vector.double().split([p.numel() for p in self._parameters])
        heads = [part.view_as(p) for part, p in zip(parts, self._parameters, strict=True)]
        product = torch.autograd.grad(self._gradient, self._parameters, heads, retain_graph=True)
        return torch.cat([part.flatten() for part in product])


@dataclass(frozen=True)
class Reference:
    """Eigenvalues to compare with, found in float64.

    Attributes:
        top: From the largest down.
        bottom: From the smallest up.
        residual: The worst residual of these pairs over the largest eigenvalue in size: none is further off.
        products: What they took.
    """

    top: tuple[float, ...]
    bottom: tuple[float, ...]
    residual: float
    products: int

    @property
    def scale(self) -> float:
        """The largest eigenvalue in size, which residuals and errors are relative to."""
        return max(abs(self.top[0]), abs(self.bottom[0]))


def find_reference(problem: HessianProblem, tol: float = 1e-8) -> Reference:
    """Decompose the exact Hessian by SciPy's eigsh, a large basis, and neither operator nor solver of this library."""
    size, sparse, products = problem.size, importlib.import_module("scipy.sparse.linalg"), 0

    def product(vector: Any) -> Any:
        nonlocal products
        products += 1
        column = torch.from_numpy(vector).flatten().to(problem.device)
        return problem.exact(column).cpu().numpy()

    operator = sparse.LinearOperator((problem.num_weights,) * 2, matvec=product, dtype="float64")
    found = []
    for count, which in ((size.top, "LA"), (size.bottom, "SA")):
        values, vectors = sparse.eigsh(
            operator, count, which=which, tol=tol, ncv=5 * count + 40, v0=problem.start.double().cpu().numpy()
        )
        found.append((torch.from_numpy(values), torch.from_numpy(vectors).to(problem.device)))
    (top, top_vectors), (bottom, bottom_vectors) = found
    order, scale = top.argsort(descending=True), max(float(top.abs().max()), float(bottom.abs().max()))
    worst = max(
        residuals(problem, top, top_vectors).max().item(), residuals(problem, bottom, bottom_vectors).max().item()
    )
    return Reference(tuple(top[order].tolist()), tuple(bottom.sort().values.tolist()), worst / scale, products)


def residuals(problem: HessianProblem, values: Tensor, vectors: Tensor) -> Tensor:
    """Return ||Hv - lambda v|| / ||v|| in float64, measured by products that nobody counts; infinity for no vector."""
    found = []
    for value, vector in zip(values.double().tolist(), vectors.mT.double(), strict=True):
        norm = vector.norm()
        defect = (problem.exact(vector) - value * vector).norm()
        found.append(float(defect / norm) if norm > 0 else float("inf"))
    return torch.tensor(found, dtype=torch.float64)


def judge(problem: HessianProblem, answer: Answer, reference: Reference) -> dict[str, Any]:
    """Return what an answer is worth; residuals and errors are relative to the largest eigenvalue, None where none is.

    An error is that of the i-th value against the i-th of the reference, so that a missed or a doubled one shows.
    """
    found: dict[str, Any] = {"products": answer.products}
    ends = (
        ("top", answer.top, answer.top_vectors, reference.top),
        ("bottom", answer.bottom, answer.bottom_vectors, reference.bottom),
    )
    for name, values, vectors, truth in ends:
        count = min(len(values), len(truth))
        errors = values[:count].double().cpu() - torch.tensor(truth[:count], dtype=torch.float64)
        measured = residuals(problem, values[:count], vectors[:, :count])
        found[f"found_{name}"] = count
        found[f"residual_{name}"] = measured.max().item() / reference.scale if count else None
        found[f"error_{name}"] = errors.abs().max().item() / reference.scale if count else None
    worst = [found["residual_top"], found["residual_bottom"]]
    complete = found["found_top"] == len(reference.top) and found["found_bottom"] == len(reference.bottom)
    found["residual"] = max(worst) if complete else None
    return found
