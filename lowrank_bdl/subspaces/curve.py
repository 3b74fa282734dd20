"""The subspace that a curve of low loss lies in."""

import math

import torch
from torch import Tensor

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.devices import require_float64
from lowrank_bdl.linalg.moments import column_chunks
from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.subspaces.subspace import Subspace


@exact
def curve_subspace(points: Tensor, layout: ParameterLayout | None = None, *, control_points: bool = False) -> Subspace:
    r"""Return the subspace of n - 1 dimensions that n points of a curve span.

    The origin is their mean. The first column of the basis points from the first to the last point, and each further
    one is the part of :math:`w_i - w_1`, i = 2, ..., n - 1, that is orthogonal to those before. A column is as long as
    that part over the corresponding height of the regular simplex with n corners on the unit sphere, so that points of
    such a shape have coordinates z of length 1. For n = 3 these are the published constants: :math:`(w_3 - w_1) /
    \sqrt 3`, and the orthogonal part of :math:`w_2 - w_1` over 1.5.

    Args:
        points: Shape ``(n, D)``, n >= 3, in order along the curve, or a list's ``torch.stack`` [parameter].
        layout: What the coordinates are; None for plain vectors.
        control_points: The points are those of a Bézier curve of degree n - 1, which passes through the first and the
            last alone: take the points of the curve at t = i / (n - 1) in their place.

    Returns:
        The subspace, of rank n - 1; columns are orthogonal.

    Raises:
        ShapeError: If ``points`` is not ``(n, D)`` with n >= 3, or the points lie in fewer than n - 1 dimensions, to
            within rounding (of the points, and about 1e-7 of the distances between them).
        NonFiniteError: If a point is not finite.

    Cost: two reads of the points in float64, one write of the basis.

    Source: Izmailov et al. (UAI 2019), section 4.3, and their code for a curve with one bend.

    Example:
        >>> bend = torch.tensor([[-1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
        >>> plane = curve_subspace(bend)
        >>> plane.lengths.round(decimals=4).tolist()
        [1.1547, 1.3333]
    """
    if points.ndim != 2 or len(points) < 3 or not points.is_floating_point():
        raise ShapeError(f"points must be real (n, D) with n >= 3; got {tuple(points.shape)} {points.dtype}.")
    points, n = points.detach(), len(points)
    dtype = torch.promote_types(points.dtype, torch.float32)
    require_float64(points.device, "The subspace of a curve")
    curve = _bernstein(n) if control_points else torch.eye(n, dtype=torch.float64)
    order = [n - 1, *range(1, n - 1)]
    steps = (curve[order] - curve[:1]).to(points.device)  # rows sum to 0: w_1 may be subtracted from every point first
    parts = list(column_chunks(points.shape[1], points.device))
    gram = torch.zeros((n - 1, n - 1), dtype=torch.float64, device=points.device)
    squares = torch.zeros(n, dtype=torch.float64, device=points.device)
    for part in parts:
        chunk = points[:, part].double()
        squares += chunk.square().sum(1)
        differences = steps @ (chunk - chunk[:1])
        gram += differences @ differences.mT
    cholesky, failed = torch.linalg.cholesky_ex(gram)
    residuals = cholesky.diagonal()
    if bool(gram.isfinite().all()):
        noise = torch.finfo(points.dtype).eps * squares.max().sqrt()  # of the points' own rounding, at most
        if int(failed) or bool((residuals <= noise).any()) or _nearly_singular(gram):
            raise ShapeError(
                f"{n} points must span {n - 1} dimensions; they lie in fewer (on one line, if there are 3)."
            )
    side = math.sqrt(2 * n / (n - 1))
    heights = [side * math.sqrt((m + 1) / (2 * m)) for m in range(1, n)]
    scales = residuals / torch.tensor(heights, dtype=torch.float64, device=points.device)
    mix = torch.linalg.solve_triangular(cholesky, steps, upper=False) * scales[:, None]
    basis = torch.empty((n - 1, points.shape[1]), dtype=dtype, device=points.device)
    origin = torch.empty(points.shape[1], dtype=dtype, device=points.device)
    weights = curve.mean(0).to(points.device)
    for part in parts:
        chunk = points[:, part].double()
        differences = chunk - chunk[:1]
        basis[:, part] = (mix @ differences).to(dtype)
        origin[part] = (chunk[0] + weights @ differences).to(dtype)
    provenance = {"construction": "curve", "points": n, "control_points": control_points}
    return Subspace(layout, origin, basis.mT, provenance)


def _nearly_singular(gram: Tensor) -> bool:
    """Whether rounding alone could be what makes a Gram matrix in float64 regular, whatever its vectors' lengths."""
    lengths = gram.diagonal().sqrt()
    smallest = torch.linalg.eigvalsh(gram / (lengths[:, None] * lengths))[0]
    return bool(smallest <= 16 * len(gram) * torch.finfo(gram.dtype).eps)


def _bernstein(n: int) -> Tensor:
    """Return the weights of n control points (columns) in the points of their curve at t = i / (n - 1) (rows)."""
    rows = []
    for i in range(n):
        t = i / (n - 1)
        rows.append([math.comb(n - 1, j) * t**j * (1 - t) ** (n - 1 - j) for j in range(n)])
    return torch.tensor(rows, dtype=torch.float64)
