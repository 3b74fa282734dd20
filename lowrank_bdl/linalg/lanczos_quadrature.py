r"""Gauss rules of a symmetric matrix from Lanczos coefficients, with no stored basis.

The Lanczos coefficients of a matrix A and a unit vector q are a tridiagonal T with :math:`q^\top f(A) q \approx
e_1^\top f(T) e_1`, exact for polynomials of degree 2 m - 1 (G. Golub and G. Meurant, Matrices, Moments and Quadrature
with Applications, 2010, chapter 6). In rounded arithmetic the vectors lose their orthogonality and eigenvalues come
back as copies, which share one weight: the rule stays that of a matrix with eigenvalues in tiny intervals around those
of A (A. Greenbaum, Behavior of slightly perturbed Lanczos and conjugate-gradient recurrences, Linear Algebra and its
Applications 113, 1989). Three vectors are enough therefore.
"""

import torch
from torch import Tensor

from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.linalg.probing import ProbedMatrix, row_dots


def lanczos_coefficients(
    matrix: ProbedMatrix, starts: Tensor, num_steps: int, reorthogonalize: bool = False
) -> tuple[Tensor, Tensor]:
    """Run S Lanczos recurrences side by side.

    A recurrence ends where its Krylov space does; from there on its off-diagonal entries are 0, and its diagonal
    repeats the first entry, so that ``gauss_rule`` gives what is left the weight 0.

    Args:
        matrix: Symmetric, D x D.
        starts: Shape ``(S, D)``, not zero; overwritten.
        num_steps: m >= 1, at most D.
        reorthogonalize: Keep all m vectors of each, and orthogonalise every new one twice against them.

    Returns:
        Diagonal ``(S, m)`` and off-diagonal ``(S, m - 1)`` of each tridiagonal matrix, float64.

    Raises:
        NonFiniteError: If a product holds NaN or infinity.
        ValueError: If the matrix is seen not to be symmetric, or gives another product for the same vector.

    Cost: S m products; memory of 3 S vectors and the products, or (m + 3) S with ``reorthogonalize``; one host
    synchronisation a step.
    """
    count, size = starts.shape
    eps = torch.finfo(matrix.dtype).eps
    diagonal = torch.zeros(count, num_steps, dtype=torch.float64, device=starts.device)
    off_diagonal = torch.zeros_like(diagonal)
    basis = starts.new_empty(count, num_steps, size) if reorthogonalize else None
    live = torch.arange(count, device=starts.device)  # recurrences that go on; not a list, whose copies make one wait
    current = starts.div_(row_dots(starts, starts).sqrt().to(starts.dtype)[:, None])
    previous = torch.zeros_like(current)
    scale = diagonal.new_zeros(count)
    for step in range(num_steps):
        product = matrix.product(current)
        before = off_diagonal[live, step - 1] if step else scale
        if step == 1:
            _require_symmetric(row_dots(previous, product), before, scale, eps**0.5)
        new = previous.mul_(-before.to(current.dtype)[:, None]).add_(product)
        del product
        alpha = row_dots(new, current)
        _subtract(new, alpha, current)
        if basis is not None:
            for row, number in enumerate(live.tolist()):
                basis[number, step] = current[row]
                alpha[row] += _orthogonalize(new[row], basis[number, : step + 1])
        beta = row_dots(new, new).sqrt()
        scale = torch.maximum(scale, alpha.abs() + beta + before)
        faint, finite = torch.stack((beta <= eps**0.5 * scale, (alpha + beta).isfinite())).tolist()
        if not all(finite):
            matrix.require_finite(alpha, beta)
        if any(faint):  # few digits are left: the direction of the last vector must go once more
            again = row_dots(new, current)
            _subtract(new, again, current)
            alpha += again
            beta = row_dots(new, new).sqrt()
        diagonal[live, step] = alpha
        off_diagonal[live, step] = beta
        going = (beta > eps * scale) if any(faint) else None
        keep = None if going is None else going.nonzero().squeeze(-1)
        if keep is not None and going is not None and len(keep) < len(live):
            ended = live[~going]
            off_diagonal[ended, step] = 0
            diagonal[ended, step + 1 :] = diagonal[ended, :1]
            live = live[keep]
            if not len(live):
                break
            new, current, beta, scale = new[keep], current[keep], beta[keep], scale[keep]
        previous, current = current, new.div_(beta.to(new.dtype)[:, None])
    return diagonal, off_diagonal[:, : num_steps - 1]


@exact
def gauss_rule(diagonal: Tensor, off_diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Return nodes (ascending) and weights (their sum is one), ``(S, m)`` each, of tridiagonal matrices.

    Args:
        diagonal: Shape ``(S, m)``.
        off_diagonal: Shape ``(S, m - 1)``.
    """
    tridiagonal = torch.diag_embed(diagonal) + torch.diag_embed(off_diagonal, 1) + torch.diag_embed(off_diagonal, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    first = vectors[..., 0, :]
    return nodes, torch.where(first.abs() > torch.finfo(first.dtype).eps, first.square(), 0.0)  # the rest is rounding


def _subtract(rows: Tensor, weights: Tensor, others: Tensor) -> None:
    """Subtract ``weights`` times ``others`` in place."""
    rows.addcmul_(weights.to(rows.dtype)[:, None], others, value=-1)


def _orthogonalize(vector: Tensor, rows: Tensor) -> Tensor:
    """Remove the span of ``rows`` from ``vector`` in place, in two passes; return what the last row had of it."""
    last = torch.zeros((), dtype=torch.float64, device=vector.device)
    for _ in range(2):
        weights = rows @ vector
        vector.addmv_(rows.mT, weights, alpha=-1)
        last += weights[-1]
    return last


def _require_symmetric(forth: Tensor, back: Tensor, scale: Tensor, tolerance: float) -> None:
    """Raise unless q'A p = p'A q for the first two vectors p and q of each recurrence."""
    wrong = (forth - back).abs() > tolerance * torch.maximum(scale, forth.abs())
    wrong &= back > tolerance * scale  # a fainter second vector is not orthogonal enough to tell
    if bool(wrong.any()):
        first = int(wrong.to(torch.uint8).argmax())
        raise ValueError(
            "the matrix must be symmetric, and its products repeatable: "
            f"q'Ap is {back[first].item():.6g} and p'Aq {forth[first].item():.6g}."
        )
