"""Subspaces of given directions: random ones, and eigenvectors of a curvature matrix."""

import torch
from torch import Tensor

from lowrank_bdl.errors import NotConvergedError, ShapeError
from lowrank_bdl.linalg.devices import generator_on
from lowrank_bdl.linalg.hadamard import RandomizedHadamardLinearOperator
from lowrank_bdl.linalg.lanczos import Eigenpairs
from lowrank_bdl.linalg.memory import require_memory
from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.subspaces.subspace import Subspace


@exact
def random_subspace(
    layout: ParameterLayout | None,
    origin: Tensor,
    rank: int,
    *,
    length: float | None = None,
    structured: bool = False,
    generator: torch.Generator | None = None,
) -> Subspace:
    r"""Return the subspace of k random directions.

    Published code knows three lengths: independent standard normals, of expected length :math:`\sqrt D`, are the
    ``random`` subspace of its library (``length=None``); its scripts make them orthonormal and as long as the first two
    principal directions on average (``length=pca.lengths[:2].mean().item()``); its notebook makes them of length 1.

    Args:
        layout: What the coordinates are; None for plain vectors.
        origin: :math:`\hat\theta`, shape ``(D,)``; its dtype and device are the subspace's [parameter].
        rank: k, from 1 to D.
        length: None for entries of mean 0 and variance 1; a number for orthogonal columns of this length, uniform over
            all such [parameter].
        structured: Make the directions of Hadamard matrices and random signs, so that D + n < 3 D bytes are stored and
            a product takes O(D log D) time; see :class:`RandomizedHadamardLinearOperator`, whose entries have the same
            mean and covariance.
        generator: Source of the randomness, on any device; None means torch's default generator.

    Raises:
        ShapeError: If ``rank`` is out of range, or layout and origin do not agree.
        ValueError: If ``length`` is not a positive number.
        MemoryLimitError: If k·D numbers do not fit the free memory, before they are drawn (not for ``structured``).

    Cost: k·D normals; with ``structured``, D + n bytes.

    Example:
        >>> space = random_subspace(None, torch.zeros(50), 3, length=2.0, generator=torch.Generator().manual_seed(0))
        >>> space.lengths.round(decimals=4).tolist()
        [2.0, 2.0, 2.0]
    """
    dim = len(origin)
    if not 1 <= rank <= dim:
        raise ShapeError(f"rank must be between 1 and D = {dim}; got {rank}.")
    dtype = torch.promote_types(origin.dtype, torch.float32)
    basis: Tensor | RandomizedHadamardLinearOperator
    if structured:
        basis = RandomizedHadamardLinearOperator.random(
            dim, rank, dtype=dtype, device=origin.device, generator=generator
        )
    else:
        require_memory(rank * dim * dtype.itemsize, origin.device, f"a basis of {rank} x {dim:,} numbers")
        generator = generator_on(origin.device, generator)
        basis = torch.randn(rank, dim, dtype=dtype, device=origin.device, generator=generator).mT
    provenance = {"construction": "random", "rank": rank, "structured": structured, "length": length}
    space = Subspace(layout, origin, basis, provenance, check_finite=False)
    if length is None:
        return space
    result = space.orthonormal(length)
    if result.rank < rank:
        raise ShapeError(
            f"the {rank} directions drawn depend on each other at D = {dim}; expected fewer, or dense ones."
        )
    return result


@exact
def eigen_subspace(
    layout: ParameterLayout | None,
    origin: Tensor,
    eigenpairs: Eigenpairs,
    *,
    prior_precision: float | None = None,
    num_data: float = 1.0,
) -> Subspace:
    r"""Return the subspace of eigenvectors of a Hessian or Gauss-Newton matrix.

    Args:
        layout: What the coordinates are; None for plain vectors.
        origin: :math:`\hat\theta`, shape ``(D,)`` [parameter].
        eigenpairs: What ``lanczos`` found, :math:`(\lambda_i, v_i)`.
        prior_precision: None for the eigenvectors themselves; :math:`\tau \ge 0` for columns
            :math:`v_i / \sqrt{N \lambda_i + \tau}`, so that :math:`z \sim N(0, I)` is Laplace's approximation in the
            subspace [1 / parameter²].
        num_data: N, where the curvature is that of the mean loss over N data.

    Raises:
        NotConvergedError: If an eigenpair did not converge.
        ShapeError: If layout, origin and eigenvectors do not agree.
        ValueError: If a precision :math:`N \lambda_i + \tau` is not positive; the message gives the smallest.

    Cost: no copy of the eigenvectors without ``prior_precision``; one with it.

    Example:
        >>> from lowrank_bdl.linalg.lanczos import lanczos
        >>> pairs = lanczos(torch.diag(torch.tensor([9.0, 4.0, 1.0, 0.0])).matmul, 2, start=torch.ones(4))
        >>> space = eigen_subspace(None, torch.zeros(4), pairs, prior_precision=0.0)
        >>> space.lengths.round(decimals=3).tolist()
        [0.333, 0.5]
    """
    if not bool(eigenpairs.converged.all()):
        raise NotConvergedError(
            f"expected converged eigenpairs; {int((~eigenpairs.converged).sum())} of {len(eigenpairs.converged)} are "
            f"not (largest residual {eigenpairs.residuals.max().item():.1e})."
        )
    basis = eigenpairs.eigenvectors
    if prior_precision is not None:
        precisions = num_data * eigenpairs.eigenvalues + prior_precision
        if not bool((precisions > 0).all()):
            raise ValueError(
                f"expected num_data * eigenvalue + prior_precision > 0; the smallest is {precisions.min().item():.3e}. "
                "Raise prior_precision, or leave negative eigenvalues out."
            )
        basis = basis * precisions.rsqrt().to(basis.dtype)
    provenance = {
        "construction": "eigen",
        "rank": basis.shape[-1],
        "eigenvalues": eigenpairs.eigenvalues.tolist(),
        "prior_precision": prior_precision,
        "num_data": num_data,
    }
    return Subspace(layout, origin, basis, provenance)
