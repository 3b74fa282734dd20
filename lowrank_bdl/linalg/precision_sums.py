r"""Sums and blocks of inverses of low-rank-plus-diagonal matrices, exactly and without cancellation.

For :math:`\Sigma_i = D_i + U_i U_i^\top` the sum of the inverses is the inverse of

.. math::
    (\Sigma_1^{-1} + \Sigma_2^{-1})^{-1} = G + Z (I + W^\top W)^{-1} Z^\top, \quad
    G = D_1 D_2 (D_1 + D_2)^{-1}, \\
    W = (D_1 + D_2)^{-1/2} [U_1, -U_2], \quad Z = (D_1 + D_2)^{-1} [D_2 U_1, D_1 U_2]:

low-rank plus diagonal again, with a root of as many columns as both together. It is Woodbury's identity for
:math:`D_1^{-1} + D_2^{-1} - V V^\top`, in which every difference has been taken by hand, so that only positive numbers
are added. A diagonal E in place of the second precision is the case :math:`D_2 = E^{-1}` without :math:`U_2`.
"""

import torch
from torch import Tensor

from lowrank_bdl.errors import NotPSDError
from lowrank_bdl.linalg.capacitance import checked_cholesky
from lowrank_bdl.linalg.devices import to_float64
from lowrank_bdl.linalg.indices import Index
from lowrank_bdl.linalg.operator_structure import LowRankPlusDiagStructure, block_diagonal

LOST = 1e-6
"""Largest estimated relative error that the K x K factorisation may cause."""


def add_to_precision(sigma: LowRankPlusDiagStructure, diag: Tensor) -> LowRankPlusDiagStructure:
    r"""Return the matrix whose inverse is :math:`\Sigma^{-1} + \mathrm{diag}(e)`.

    Args:
        sigma: :math:`\Sigma`, shape ``(*B, D, D)``. At its point masses the precision counts as zero.
        diag: :math:`e \ge 0`, shape ``(*B, D)``, ``(*B, 1)`` or ``()``.

    Raises:
        NotPSDError: If float64 would lose the result.

    Cost: a read of the root, O(D K^2) time, and the new root, in the dtype of the diagonal.
    """
    if diag.ndim <= 1 and sigma._core is not sigma:
        expanded: LowRankPlusDiagStructure = add_to_precision(sigma._core, diag)._expand_batch(sigma.batch_shape)
        return expanded
    batch = torch.broadcast_shapes(sigma.batch_shape, diag.shape[:-1])
    sigma = sigma._expand_batch(batch)
    own, added = sigma.diag, diag.to(sigma.diag)
    keep = 1 / (1 + added * own)  # d_2 / (d_1 + d_2)
    variance = own * keep
    if bool((own == 0).any()):  # a point mass has no precision of its own
        moved = (sigma._mixed_root() != 0).any(-1)
        variance = torch.where((own == 0) & ~moved & (added > 0), 1 / torch.where(added > 0, added, 1.0), variance)
    mix = _whitened((sigma,), (sigma._mix_matrix(),), added * keep)
    return type(sigma)(_scaled_rows(sigma, keep).mT, variance, mix)


def add_precisions(p: LowRankPlusDiagStructure, q: LowRankPlusDiagStructure) -> LowRankPlusDiagStructure | None:
    r"""Return the matrix whose inverse is :math:`\Sigma_p^{-1} + \Sigma_q^{-1}`, None where one has a zero variance.

    Raises:
        NotPSDError: If float64 would lose the result.

    Cost: a read of both roots, O(D (K_p + K_q)^2) time, and the new root of as many columns as both.
    """
    if p.shape[-1] != q.shape[-1] or bool((p.diag == 0).any()) or bool((q.diag == 0).any()):
        return None
    batch = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    dtype = torch.promote_types(p.dtype, q.dtype)
    p, q = (sigma.to(dtype)._expand_batch(batch) for sigma in (p, q))
    weight = 1 / (p.diag + q.diag)
    mixes = (p._mix_matrix(), q._mix_matrix())
    mix = _whitened((p, q), mixes, weight)
    rows = torch.cat((_scaled_rows(p, q.diag * weight), _scaled_rows(q, p.diag * weight)), dim=-2)
    return type(p)(rows.mT, p.diag * q.diag * weight, mix)


def precision_block(sigma: LowRankPlusDiagStructure, index: Index) -> LowRankPlusDiagStructure:
    r"""Return the matrix whose inverse is the block of :math:`\Sigma^{-1}` at these rows and columns.

    With i the coordinates chosen and r the rest it is the Schur complement
    :math:`D_i + U_i (I + U_r^\top D_r^{-1} U_r)^{-1} U_i^\top`: low-rank plus diagonal, and nothing is subtracted.

    Args:
        sigma: :math:`\Sigma`, shape ``(*B, D, D)``.
        index: A slice, or distinct coordinates as a LongTensor.

    Raises:
        NotPSDError: If float64 would lose the result.

    Cost: a read of the root, O(D K^2) time, and the chosen rows of the root.
    """
    sigma._core.capacitance()  # for its checks of the diagonal
    variances = sigma.diag.double()
    weight = torch.where(variances > 0, 1 / torch.where(variances > 0, variances, 1.0), 0.0)
    weight[..., index] = 0
    mix = _whitened((sigma,), (sigma._mix_matrix(),), weight)
    chosen = sigma.select(index, index)
    assert isinstance(chosen, LowRankPlusDiagStructure)
    return chosen._derived(chosen.root, chosen.diag, mix, chosen.root_scale)


def _scaled_rows(sigma: LowRankPlusDiagStructure, factor: Tensor) -> Tensor:
    """Return the transposed root times a factor a coordinate, ``(*B, K, D)``."""
    rows = sigma.factors.rows(slice(0, sigma.shape[-1]), sigma.dtype)
    if rows.data_ptr() != sigma.root.data_ptr() and not rows.requires_grad and not factor.requires_grad:
        return rows.mul_(factor.unsqueeze(-2))  # converted already: a tensor of its own
    return rows * factor.unsqueeze(-2)


def _whitened(terms: tuple[LowRankPlusDiagStructure, ...], mixes: tuple[Tensor, ...], weight: Tensor) -> Tensor:
    r"""Return :math:`M L^{-\top}` with :math:`L L^\top = I + M_\pm^\top R^\top \mathrm{diag}(w) R M_\pm`, float64.

    R has the roots of all terms side by side and M their mixes on its diagonal, the second one negative in
    :math:`M_\pm`.
    """
    first = terms[0].factors
    count = sum(term.root.shape[-1] for term in terms)
    gram = first.zeros(count, count)
    for part in first.chunks():
        rows = torch.cat([term.factors.rows(part, torch.float64) for term in terms], dim=-2)
        gram = gram + (rows * to_float64(weight[..., None, part])) @ rows.mT
    signed = block_diagonal([mix if number == 0 else -mix for number, mix in enumerate(mixes)])
    factor, amplification = checked_cholesky(signed.mT @ gram @ signed)
    lost = torch.finfo(torch.float64).eps * amplification
    if not lost < LOST:
        raise NotPSDError(
            "a sum of precisions needs variances that are not too far below the deviations; float64 leaves a relative "
            f"error of about {lost:.0e} (expected at most {LOST:.0e})."
        )
    mix = block_diagonal(list(mixes)).expand(*factor.shape[:-2], -1, -1)
    whitened: Tensor = torch.linalg.solve_triangular(factor, mix.mT, upper=False)
    return whitened.mT
