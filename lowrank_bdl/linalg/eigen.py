"""Eigendecompositions of positive semi-definite matrices that LAPACK's routine alone does not always manage."""

import torch
from torch import Tensor


def eigh_psd(matrices: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return eigenvalues and eigenvectors of positive semi-definite matrices, :math:`A = V \Lambda V^\top`.

    A coordinate with a zero on the diagonal has a zero row and column, and is an eigenvector itself: it is left out of
    the decomposition. ``torch.linalg.eigh`` fails to converge on matrices most of whose rows are zero, such as the
    second moments of a layer behind dead rectifiers. Where it fails all the same, the singular value decomposition, of
    such matrices the same thing, takes its place.

    Args:
        matrices: Shape ``(*B, n, n)``, symmetric, finite.

    Returns:
        Eigenvalues ``(*B, n)``, ascending, those that rounding made negative as 0; orthonormal eigenvectors as columns,
        ``(*B, n, n)``.

    Cost: O(n³) each; of a coordinate that is left out, nothing.

    Example:
        >>> values, vectors = eigh_psd(torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 1.0], [0.0, 1.0, 2.0]]))
        >>> values, vectors[:, 0]
        (tensor([0., 1., 3.]), tensor([1., 0., 0.]))
    """
    size = matrices.shape[-1]
    flat = matrices.reshape(-1, size, size)
    used = flat.diagonal(dim1=-2, dim2=-1) > 0
    if bool(used.all()):
        values, vectors = _eigh(flat)
        vectors = vectors.contiguous()  # as a file gives them back: products of another layout differ in the last bit
    else:
        values = torch.zeros_like(flat[..., 0])
        vectors = torch.zeros_like(flat)
        for number, keep in enumerate(used):
            kept, rest = keep.nonzero().squeeze(-1), (~keep).nonzero().squeeze(-1)
            vectors[number, rest, torch.arange(len(rest), device=rest.device)] = 1
            if len(kept):
                values[number, len(rest) :], part = _eigh(flat[number][kept][:, kept])
                vectors[number, kept, len(rest) :] = part
    return values.clamp_(min=0).view(matrices.shape[:-1]), vectors.view(matrices.shape)


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # public, but not in __all__
        vectors, values, _ = torch.linalg.svd(matrices)
        values, vectors = values.flip(-1), vectors.flip(-1)
    return values, vectors
