r"""The spectral density of a symmetric matrix by stochastic Lanczos quadrature.

S. Ubaru, J. Chen and Y. Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, SIAM J. Matrix Anal. Appl.
38 (2017), algorithm 1; L. Lin, Y. Saad and C. Yang, Approximating spectral densities of large matrices, SIAM Review 58
(2016), section 3.2, for the density.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError
from lowrank_bdl.linalg.lanczos_quadrature import gauss_rule, lanczos_coefficients
from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.linalg.probing import (
    Matrix,
    ProbedMatrix,
    Progress,
    StochasticEstimate,
    estimate_mean,
    require_count,
)


@dataclass(frozen=True)
class SpectralDensity:
    r"""Gauss rules :math:`\sum_j w_{pj}\, \delta(\lambda - t_{pj})`, one a probe, of the eigenvalues' distribution.

    Attributes:
        nodes: :math:`t`, shape ``(P, m)``, float64, ascending for each probe [unit of the matrix].
        weights: :math:`w \ge 0`, shape ``(P, m)``, float64; each row sums to one. Nodes without weight fill up the rows
            of probes that needed fewer.
        diagonal: Lanczos coefficients, shape ``(P, m)``: the tridiagonal matrices whose eigenvalues the nodes are.
        off_diagonal: Shape ``(P, m - 1)``.
        size: D, the number of eigenvalues.
        num_matvecs: Products with one vector.
    """

    nodes: Tensor
    weights: Tensor
    diagonal: Tensor
    off_diagonal: Tensor
    size: int
    num_matvecs: int

    def integrate(self, function: Callable[[Tensor], Tensor]) -> StochasticEstimate:
        r"""Return an estimate of :math:`\mathrm{tr} f(A) = \sum_i f(\lambda_i)`, with its error bar.

        Args:
            function: f, elementwise on a tensor of nodes.

        Raises:
            NonFiniteError: If f is NaN or infinite at a node with a weight.

        Example:
            >>> eigenvalues = torch.tensor([1.0, 2.0, 3.0]).double()
            >>> found = spectral_density(torch.diag(eigenvalues), 4, 3, generator=torch.Generator().manual_seed(0))
            >>> round(found.integrate(torch.square).value.item(), 6)
            14.0
        """
        full = self._quadratic_forms(function, self.nodes, self.weights)
        half = (self.nodes.shape[1] + 1) // 2
        coarse = gauss_rule(self.diagonal[:, :half], self.off_diagonal[:, : half - 1])
        truncation = (full.mean() - self._quadratic_forms(function, *coarse).mean()).abs()
        estimate = estimate_mean(full, self.num_matvecs)
        return StochasticEstimate(estimate.value, estimate.standard_error, truncation, self.num_matvecs)

    def _quadratic_forms(self, function: Callable[[Tensor], Tensor], nodes: Tensor, weights: Tensor) -> Tensor:
        """Return D times the quadrature of f, one a probe, shape ``(P,)``."""
        values = torch.where(weights > 0, function(nodes).double(), 0.0)
        if not bool(values.isfinite().all()):
            low, high = nodes.min().item(), nodes.max().item()
            raise NonFiniteError(f"the function must be finite on the nodes, from {low:.6g} to {high:.6g}.")
        return self.size * (weights * values).sum(-1)

    def default_width(self) -> float:
        """Return the range of the nodes over m: Gaussians of this width are what m steps integrate to 3e-4."""
        spread = (self.nodes.max() - self.nodes.min()).item()
        largest = self.nodes.abs().max().item()
        return max(spread / self.nodes.shape[1], 1e-6 * largest) or 1.0

    def density(self, grid: Tensor | int = 400, width: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return the density smoothed by Gaussians, :math:`\frac{1}{D} \sum_i N(x; \lambda_i, \sigma^2)`.

        Args:
            grid: Points x, shape ``(G,)``, or how many of them, evenly spaced over the nodes and four widths beyond.
            width: :math:`\sigma > 0` [unit of the matrix]; None means `default_width`. What lies closer together than
                this is not told apart, and below the default the bulk of the curve is the rule's own bumps.

        Returns:
            The points, float64; the density there, whose integral is one; and its standard error over the probes, NaN
            if there is but one. Each of shape ``(G,)``.

        Raises:
            ValueError: If ``width`` or the number of points is not positive.
        """
        sigma = self.default_width() if width is None else width
        if not 0 < sigma < math.inf:
            raise ValueError(f"width must be > 0 and finite; got {width}.")
        if isinstance(grid, Tensor):
            points = grid.to(self.nodes)
        else:
            require_count("the number of grid points", grid)
            low, high = self.nodes.min().item() - 4 * sigma, self.nodes.max().item() + 4 * sigma
            points = torch.linspace(low, high, grid, dtype=torch.float64, device=self.nodes.device)
        curves = torch.stack([
            (torch.exp(-0.5 * ((points - nodes[:, None]) / sigma).square()) * weights[:, None]).sum(0)
            for nodes, weights in zip(self.nodes, self.weights, strict=True)
        ])  # fmt: skip
        curves /= sigma * math.sqrt(2 * math.pi)
        count = len(curves)
        error = curves.std(0) / count**0.5 if count > 1 else torch.full_like(points, torch.nan)
        return points, curves.mean(0), error


@exact
def spectral_density(
    matrix: Matrix,
    num_probes: int = 10,
    num_steps: int = 100,
    *,
    size: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    reorthogonalize: bool = False,
    progress: Progress | None = None,
) -> SpectralDensity:
    r"""Estimate how the eigenvalues of a symmetric matrix are distributed.

    For a vector z of random signs, :math:`z^\top f(A) z` is :math:`\mathrm{tr} f(A)` on average, and m steps of Lanczos
    from z give it by a Gauss rule: exactly for polynomials f of degree 2 m - 1, and for every f once m = D.

    Args:
        matrix: Symmetric, of either sign: a LinearOperator or dense tensor ``(D, D)``, or a function from ``(D,)`` to
            ``(D,)``.
        num_probes: P >= 1. The error bars fall as one over its square root.
        num_steps: m >= 1; more than D means D. Details of the spectrum finer than its range over m are smoothed.
        size: D, for a function.
        dtype: Of the vectors that a function takes; torch's default if None.
        device: Where these live; torch's default if None.
        generator: Source of the signs. Each probe is drawn for itself: the first ones are the same whatever P is.
        reorthogonalize: Keep the Lanczos vectors, and every new one orthogonal to all of them: no copies of converged
            eigenvalues among the nodes, for (m + 3) D numbers in place of 3 D.
        progress: Called after every block of products with the number of products so far, out of P m.

    Raises:
        ShapeError: If the matrix is not ``(D, D)``, or a product has another shape than its vector.
        ValueError: If a count is no positive integer, a function comes without size, or the matrix is seen not to be
            symmetric or repeatable.
        TypeError: If the matrix is none of these, or its numbers are not real floating-point ones.
        NonFiniteError: If a product holds NaN or infinity.
        MemoryLimitError: If the vectors do not fit the free memory, before any of them is made.

    Cost: P m products, four vectors a probe, and no basis. Probes of an operator are multiplied together while they
    take up to 1 GiB, those of a function one by one.

    Example:
        >>> from linear_operator.operators import DiagLinearOperator
        >>> operator = DiagLinearOperator(torch.tensor([-1.0, 0.0, 0.0, 5.0]).double())
        >>> found = spectral_density(operator, 2, 10, generator=torch.Generator().manual_seed(0))
        >>> found.nodes.shape, found.weights[0][found.weights[0] > 1e-9].round(decimals=6)
        (torch.Size([2, 4]), tensor([0.2500, 0.5000, 0.2500], dtype=torch.float64))
    """
    require_count("num_probes", num_probes)
    require_count("num_steps", num_steps)
    probed = ProbedMatrix(matrix, size, dtype, device, progress)
    steps = min(num_steps, probed.size)
    vectors = 4 + (steps if reorthogonalize else 0)
    purpose = f"Lanczos quadrature with {vectors} vectors of {probed.size:,} a probe"
    parts = [
        lanczos_coefficients(probed, probed.probes(together, generator), steps, reorthogonalize)
        for together in probed.blocks(num_probes, vectors, purpose)
    ]
    diagonal, off_diagonal = (torch.cat(part) for part in zip(*parts, strict=True))
    return SpectralDensity(*gauss_rule(diagonal, off_diagonal), diagonal, off_diagonal, probed.size, probed.num_matvecs)
