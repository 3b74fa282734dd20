"""What a careful user would write without this library: K x D rows, chunks, K x K algebra in float64.

A contender in its own right: no checks, no batches, no classes, nothing but the arithmetic. Deviations are the rows of
``storage`` (K, D) and Sigma = diag(diag) + storage' storage.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 16_384
LOG_2PI = math.log(2 * math.pi)


def chunks(vector: Tensor) -> Iterator[slice]:
    """Yield slices of `CHUNK` columns that cover a vector, or of a twentieth of it on a GPU."""
    dim = vector.shape[-1]
    width = CHUNK if vector.device.type == "cpu" else max(CHUNK, dim // 20)
    for start in range(0, dim, width):
        yield slice(start, min(start + width, dim))


def sample(storage: Tensor, diag: Tensor, mean: Tensor, n: int) -> Tensor:
    """Draw n vectors, (n, D): one pass over the rows."""
    low_rank = torch.randn(n, storage.shape[0], dtype=diag.dtype, device=diag.device)
    draws = torch.empty(n, len(diag), dtype=diag.dtype, device=diag.device).normal_()
    for part in chunks(diag):
        chunk = draws[:, part].mul_(diag[part].sqrt()).add_(mean[part])
        chunk.addmm_(low_rank, storage[:, part])
    return draws


def diagonal(storage: Tensor, diag: Tensor) -> Tensor:
    """Return diag + the sum of squares of the rows, (D,)."""
    result = torch.empty_like(diag)
    for part in chunks(diag):
        torch.add(diag[part], storage[:, part].square().sum(0), out=result[part])
    return result


def factorize(storage: Tensor, diag: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factor of I + W'W, (K, K), and the log-determinant, both float64."""
    capacitance = torch.eye(storage.shape[0], dtype=torch.float64, device=diag.device)
    logdet = torch.zeros((), dtype=torch.float64, device=diag.device)
    for part in chunks(diag):
        rows = storage[:, part] * diag[part].rsqrt()
        capacitance += (rows @ rows.mT).double()
        logdet += diag[part].double().log().sum()
    cholesky = torch.linalg.cholesky(capacitance)
    return cholesky, logdet + 2 * cholesky.diagonal().log().sum()


def ridge(
    storage: Tensor, diag: Tensor, cholesky: Tensor, x: Tensor, solve: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return x' S^-1 x by the ridge residual, z = U' S^-1 x, and S^-1 x if asked for."""
    inner = torch.zeros(storage.shape[0], dtype=torch.float64, device=diag.device)
    for part in chunks(diag):
        inner += (storage[:, part] @ (x[part] / diag[part])).double()
    z = torch.cholesky_solve(inner.unsqueeze(-1), cholesky).squeeze(-1)
    weights, quadratic = z.to(diag.dtype), z.square().sum()
    solution = torch.empty_like(diag) if solve else None
    for part in chunks(diag):
        residual = torch.addmv(x[part], storage[:, part].mT, weights, alpha=-1)
        quadratic += (residual.square() / diag[part]).sum().double()
        if solution is not None:
            torch.div(residual, diag[part], out=solution[part])
    return quadratic, z, solution


def log_prob(storage: Tensor, diag: Tensor, mean: Tensor, x: Tensor, factor: tuple[Tensor, Tensor]) -> Tensor:
    """Return the log-density, float64; the difference to the mean is taken chunk by chunk."""
    cholesky, logdet = factor
    inner = torch.zeros(storage.shape[0], dtype=torch.float64, device=diag.device)
    for part in chunks(diag):
        inner += (storage[:, part] @ ((x[part] - mean[part]) / diag[part])).double()
    z = torch.cholesky_solve(inner.unsqueeze(-1), cholesky).squeeze(-1)
    weights, quadratic = z.to(diag.dtype), z.square().sum()
    for part in chunks(diag):
        residual = torch.addmv(x[part] - mean[part], storage[:, part].mT, weights, alpha=-1)
        quadratic += (residual.square() / diag[part]).sum().double()
    return -0.5 * (quadratic + logdet + len(diag) * LOG_2PI)


def log_prob_gradients(storage: Tensor, diag: Tensor, mean: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the log-density to the rows, (K, D), and to the diagonal, (D,)."""
    cholesky, _ = factorize(storage, diag)
    _, z, solution = ridge(storage, diag, cholesky, x - mean, solve=True)
    assert solution is not None
    inverse = torch.cholesky_inverse(cholesky).to(diag.dtype)
    weights, rows_grad, diag_grad = z.to(diag.dtype), torch.empty_like(storage), torch.empty_like(diag)
    for part in chunks(diag):
        scaled = storage[:, part] / diag[part]
        pulled = inverse @ scaled
        leverage = (pulled * storage[:, part]).sum(0)
        diag_grad[part] = 0.5 * (solution[part].square() - (1 - leverage) / diag[part])
        torch.sub(torch.outer(weights, solution[part]), pulled, out=rows_grad[:, part])
    return rows_grad, diag_grad


def principal_components(storage: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the top k variances of the low-rank part and their directions, (k,) and (k, D), by the K x K route."""
    gram = torch.zeros(len(storage), len(storage), dtype=torch.float64, device=storage.device)
    for part in chunks(storage):
        rows = storage[:, part].double()
        gram += rows @ rows.mT
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(-1)[:k], vectors.flip(-1)[:, :k]
    weights = (vectors * values.rsqrt()).mT.to(storage.dtype)
    return values, weights @ storage


class FlatCollector:
    """Welford moments and a ring of deviations on one flat vector, without any check."""

    def __init__(self, numel: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shift, self.offset, self.sum_sq = (torch.zeros(numel, dtype=dtype, device=device) for _ in range(3))
        self.rows = torch.zeros(rank, numel, dtype=dtype, device=device)
        self.count = self.pushed = 0

    def update(self, parameters: list[Tensor]) -> None:
        """Count the weights as one more iterate."""
        theta = torch.cat([p.detach().reshape(-1) for p in parameters])
        self.count += 1
        if self.count == 1:
            self.shift.copy_(theta)
            return
        for part in chunks(theta):
            delta = theta[part] - self.shift[part] - self.offset[part]
            self.offset[part].add_(delta, alpha=1 / self.count)
            self.sum_sq[part].addcmul_(delta, delta, value=(self.count - 1) / self.count)
        row = self.rows[self.pushed % len(self.rows)]
        torch.sub(theta, self.shift, out=row).sub_(self.offset)
        self.pushed += 1

    @property
    def mean(self) -> Tensor:
        """The mean of the iterates."""
        return self.shift + self.offset

    @property
    def variance(self) -> Tensor:
        """The unbiased variance."""
        return self.sum_sq / (self.count - 1)

    @property
    def newest(self) -> Tensor:
        """The newest deviation."""
        return self.rows[(self.pushed - 1) % len(self.rows)]


class PerTensorCollector:
    """Collection tensor by tensor, as the released SWAG code does: E[x], E[x²] and deviations grown by torch.cat."""

    def __init__(self, parameters: list[Tensor], rank: int) -> None:
        self.rank, self.count = rank, 0
        self.means = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        self.squares = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        self.deviations = [p.new_empty(0, p.numel()).detach() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: list[Tensor]) -> None:
        """Count the weights as one more iterate."""
        n = self.count
        for i, parameter in enumerate(parameters):
            self.means[i] = self.means[i] * n / (n + 1) + parameter / (n + 1)
            self.squares[i] = self.squares[i] * n / (n + 1) + parameter**2 / (n + 1)
            deviation = (parameter - self.means[i]).view(1, -1)
            self.deviations[i] = torch.cat((self.deviations[i], deviation), dim=0)
            if len(self.deviations[i]) > self.rank:
                self.deviations[i] = self.deviations[i][1:]
        self.count += 1

    @property
    def mean(self) -> Tensor:
        """The mean of the iterates."""
        return torch.cat([m.view(-1) for m in self.means])

    @property
    def variance(self) -> Tensor:
        """The population variance E[x²] - E[x]², rescaled to the unbiased one."""
        squares = torch.cat([s.view(-1) for s in self.squares])
        return (squares - self.mean.square()) * (self.count / (self.count - 1))

    @property
    def newest(self) -> Tensor:
        """The newest deviation."""
        return torch.cat([d[-1] for d in self.deviations])
