"""Answers in float64, by formulas other than the library's: Woodbury with subtraction, which float64 can afford here.

Only used on well-conditioned problems; `tests/benchmarks` compares it with dense float64 algebra at a small size.
"""

import math

import torch
from torch import Tensor

from benchmarks.harness import Check

CHUNK = 65_536
FALSE_ALARM = 1e-9
"""Probability with which the test of a right sampler fails, each of its two sides."""


class Oracle:
    """The Gaussian N(mean, diag(diag) + rows' rows), with rows (K, D) in any dtype; sums over D in float64."""

    def __init__(self, rows: Tensor, diag: Tensor, mean: Tensor | None = None) -> None:
        self.rows, self.diag, self.mean = rows, diag, mean
        self.weighted, self.plain, self.log_diag = self._sums()
        self.capacitance = self.weighted + torch.eye(len(rows), dtype=torch.float64, device=diag.device)
        self.cholesky = torch.linalg.cholesky(self.capacitance)

    def _parts(self) -> list[slice]:
        return [slice(i, i + CHUNK) for i in range(0, len(self.diag), CHUNK)]

    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        shape = (len(self.rows), len(self.rows))
        weighted, plain = (torch.zeros(shape, dtype=torch.float64, device=self.diag.device) for _ in range(2))
        log_diag = torch.zeros((), dtype=torch.float64, device=self.diag.device)
        for part in self._parts():
            rows, diag = self.rows[:, part].double(), self.diag[part].double()
            weighted += (rows / diag) @ rows.mT
            plain += rows @ rows.mT
            log_diag += diag.log().sum()
        return weighted, plain, log_diag

    @property
    def dim(self) -> int:
        """D."""
        return len(self.diag)

    def logdet(self) -> float:
        """Log-determinant of the covariance [nat]."""
        return float(self.log_diag + 2 * self.cholesky.diagonal().log().sum())

    def entropy(self) -> float:
        """Differential entropy [nat]."""
        return 0.5 * (self.logdet() + self.dim * (1 + math.log(2 * math.pi)))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows diag^-1 x, (K, S), and x' diag^-1 x, (S,), for x of shape (S, D), minus the mean."""
        inner = torch.zeros(len(self.rows), len(x), dtype=torch.float64, device=x.device)
        square = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for part in self._parts():
            chunk = self._centred(x, part)
            weighted = chunk / self.diag[part].double()
            inner += self.rows[:, part].double() @ weighted.mT
            square += (weighted * chunk).sum(-1)
        return inner, square

    def _centred(self, x: Tensor, part: slice) -> Tensor:
        chunk = x[:, part].double()
        return chunk if self.mean is None else chunk - self.mean[part].double()

    def log_prob(self, x: Tensor) -> float:
        """Log-density at one vector [nat]."""
        inner, square = self.project(x.unsqueeze(0))
        quadratic = square[0] - (inner * torch.cholesky_solve(inner, self.cholesky)).sum()
        return -0.5 * (float(quadratic) + self.logdet() + self.dim * math.log(2 * math.pi))

    def solve_error(self, x: Tensor, answer: Tensor) -> float:
        """Relative error in the 2-norm of ``answer`` to S^-1 x, for one vector x (nothing is subtracted from it)."""
        bare = Oracle.__new__(Oracle)
        bare.__dict__.update(self.__dict__, mean=None)
        inner, _ = bare.project(x.unsqueeze(0))
        weights = torch.cholesky_solve(inner, self.cholesky).squeeze(-1)
        error = norm = 0.0
        for part in self._parts():
            exact = (x[part].double() - weights @ self.rows[:, part].double()) / self.diag[part].double()
            error += float((answer[part].double() - exact).square().sum())
            norm += float(exact.square().sum())
        return math.sqrt(error / norm)

    def diagonal_error(self, answer: Tensor) -> float:
        """Largest relative error of ``answer`` to the diagonal."""
        worst = 0.0
        for part in self._parts():
            exact = self.diag[part].double() + self.rows[:, part].double().square().sum(0)
            worst = max(worst, float(((answer[part].double() - exact) / exact).abs().max()))
        return worst

    def gradient_errors(
        self, x: Tensor, rows_grad: Tensor, diag_grad: Tensor, count: int = 4096
    ) -> tuple[float, float]:
        """Relative errors, on the first ``count`` coordinates, of the log-density's gradients to rows and diagonal."""
        inner, _ = self.project(x.unsqueeze(0))
        weights = torch.cholesky_solve(inner, self.cholesky).squeeze(-1)  # U' S^-1 x
        part = slice(0, count)
        rows, diag = self.rows[:, part].double(), self.diag[part].double()
        solution = (self._centred(x.unsqueeze(0), part)[0] - weights @ rows) / diag
        pulled = torch.cholesky_solve(rows / diag, self.cholesky)
        exact_rows = torch.outer(weights, solution) - pulled
        exact_diag = 0.5 * (solution.square() - (1 - (pulled * rows).sum(0)) / diag)
        errors = ((rows_grad[:, part].double(), exact_rows), (diag_grad[part].double(), exact_diag))
        first, second = (float((found - exact).norm() / exact.norm()) for found, exact in errors)
        return first, second

    def components_errors(self, values: Tensor, directions: Tensor) -> dict[str, float]:
        """Errors of the top variances ``(k,)`` of the low-rank part and their directions, rows ``(k, D)``.

        Relative error of the variances, residual of ``U U' v = lambda v`` over the largest variance, and departure
        from orthonormality.
        """
        exact = torch.linalg.eigvalsh(self.plain).flip(-1)[: len(values)]
        shape = (len(self.rows), len(values))
        projected = torch.zeros(shape, dtype=torch.float64, device=values.device)
        overlap = torch.zeros(len(values), len(values), dtype=torch.float64, device=values.device)
        for part in self._parts():
            chunk = directions[:, part].double()
            projected += self.rows[:, part].double() @ chunk.mT
            overlap += chunk @ chunk.mT
        found, residual = values.double(), torch.zeros(len(values), dtype=torch.float64, device=values.device)
        for part in self._parts():  # a second pass: expanding the square would leave half of the digits
            chunk = projected.mT @ self.rows[:, part].double() - found.unsqueeze(-1) * directions[:, part].double()
            residual += chunk.square().sum(-1)
        identity = torch.eye(len(values), dtype=torch.float64, device=values.device)
        return {
            "variances": float(((found - exact) / exact).abs().max()),
            "residual": float(residual.sqrt().max() / exact[0]),
            "orthonormal": float((overlap - identity).abs().max()),
        }

    def sample_check(self, draws: Tensor) -> Check:
        """Test draws ``(n, D)`` in the K directions of the low-rank part and in the others, by chi-square."""
        inner, square = self.project(draws)
        triangle, info = torch.linalg.cholesky_ex(self.weighted)
        if int(info):
            return Check.of(rank=(math.inf, 1.0))
        along = torch.linalg.solve_triangular(triangle, inner, upper=False)  # N(0, I + L'L) in an orthonormal basis
        covariance = torch.eye(len(along), dtype=torch.float64, device=along.device) + triangle.mT @ triangle
        white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), along, upper=False)
        low = float(white.square().sum())
        rest = float((square - along.square().sum(0)).sum())
        count = len(draws)
        return Check.of(
            low_rank_part=(_surprise(low, count * len(along)), 1.0),
            diagonal_part=(_surprise(rest, count * (self.dim - len(along))), 1.0),
            diagonal_variance_off=(rest / (count * (self.dim - len(along))) - 1, math.inf),
        )


def _surprise(value: float, dof: int) -> float:
    """Return how improbable a chi-square value is: 1 where a right sampler lands with probability `FALSE_ALARM`."""
    if dof <= 0:
        return 0.0
    shape, half = torch.tensor(dof / 2, dtype=torch.float64), torch.tensor(value / 2, dtype=torch.float64)
    if dof > 10_000:  # normal to better than 1e-2 in the exponent here
        z = (value - dof) / math.sqrt(2 * dof)
        tail = 0.5 * math.erfc(abs(z) / math.sqrt(2))
    else:
        tail = float(torch.minimum(torch.special.gammainc(shape, half), torch.special.gammaincc(shape, half)))
    return math.log(max(tail, 1e-300)) / math.log(FALSE_ALARM)


def kl_divergence(p: Oracle, q: Oracle) -> float:
    """Return KL(p || q) [nat] in float64, each trace by Woodbury with subtraction."""
    assert p.mean is not None and q.mean is not None
    ratio = leverage = 0.0
    kp, kq = len(p.rows), len(q.rows)
    cross = torch.zeros(kq, kp + 1, dtype=torch.float64, device=p.diag.device)
    start = 0.0
    weighted = torch.zeros(kq, kq, dtype=torch.float64, device=p.diag.device)
    for part in p._parts():
        dp, dq = p.diag[part].double(), q.diag[part].double()
        columns = torch.cat((p.rows[:, part].double(), (p.mean[part].double() - q.mean[part].double()).unsqueeze(0)))
        rows = q.rows[:, part].double() / dq
        r = dp / dq
        ratio += float((r - 1 - r.log()).sum())
        cross += rows @ columns.mT
        weighted += (rows * r) @ q.rows[:, part].double().mT
        start += float((columns.square() / dq).sum())
    leverage = float(torch.cholesky_solve(weighted, q.cholesky).trace())
    quadratic = start - float((cross * torch.cholesky_solve(cross, q.cholesky)).sum())
    capacitances = q.cholesky.diagonal().log().sum() - p.cholesky.diagonal().log().sum()
    return 0.5 * (ratio - leverage + quadratic) + float(capacitances)
