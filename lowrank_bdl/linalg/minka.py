"""Choose the number of principal components by Minka's approximation of the evidence.

Minka, "Automatic Choice of Dimensionality for PCA" (NeurIPS 2000), equations 77 to 80.
"""

import math

import torch
from torch import Tensor

from lowrank_bdl.errors import ShapeError


def minka_log_evidence(variances: Tensor, num_samples: int, dim: int) -> Tensor:
    r"""Return Laplace's approximation of the log evidence of probabilistic PCA for each number of components.

    With eigenvalues :math:`\lambda_1 \ge \dots \ge \lambda_d` of the sample covariance, N samples, the noise variance
    :math:`v = \sum_{j>k} \lambda_j / (d - k)`, :math:`m = dk - k(k+1)/2` and :math:`\hat\lambda_j = \lambda_j` for
    :math:`j \le k`, else v:

    .. math::
        \log p(D \mid k) \approx \log p(U) - \tfrac N2 \sum_{j \le k} \log \lambda_j - \tfrac{N (d-k)}2 \log v
        + \tfrac{m + k}2 \log 2\pi - \tfrac12 \log|A| - \tfrac k2 \log N, \\
        \log|A| = \sum_{i \le k} \sum_{j=i+1}^{d} \log\big((\hat\lambda_j^{-1} - \hat\lambda_i^{-1})
        (\lambda_i - \lambda_j) N\big).

    The approximation breaks down where two of the first k eigenvalues, or one of them and a later one, are equal.
    Only the eigenvalues that are not zero by construction are given; the other d - R enter as zeros, in closed form, so
    that d may be the number of weights of a network.

    Args:
        variances: The R largest eigenvalues, descending, R >= 1; further ones are zero [unit²].
        num_samples: N >= 1.
        dim: d >= R.

    Returns:
        Float64, shape ``(R,)``: entry k - 1 is of k components; -inf where the rest has no variance (k = d included).

    Raises:
        ShapeError: If the eigenvalues are no vector of 1 to d, or negative, or not descending.

    Cost: O(R³) time.

    Example:
        >>> minka_log_evidence(torch.tensor([9.0, 8.0, 0.11, 0.1, 0.09]), 100, dim=5).argmax().item() + 1
        2
    """
    values = variances.double()
    count = len(values) if values.ndim == 1 else 0
    if not 1 <= count <= dim:
        raise ShapeError(f"variances must be (R,) with R from 1 to d = {dim}; got {tuple(values.shape)}.")
    if not (bool((values >= 0).all()) and bool((values.diff() <= 0).all())):
        raise ShapeError("variances must be >= 0 and descending; got others.")
    result = torch.full((count,), -math.inf, dtype=torch.float64, device=values.device)
    n = float(num_samples)
    for k in range(1, min(count, dim - 1) + 1):
        rest = values[k:].sum() / (dim - k)
        if not bool(rest > torch.finfo(torch.float64).eps * values[0]) or not bool(values[k - 1] > 0):
            break
        places = torch.arange(1, k + 1, dtype=torch.float64, device=values.device)
        halves = (dim - places + 1) / 2
        uniform = (torch.lgamma(halves) - halves * math.log(math.pi)).sum() - k * math.log(2)
        m = dim * k - k * (k + 1) / 2
        padded = torch.cat([values, values.new_zeros(1)])  # one zero stands for the dim - count zeros
        hat = torch.cat([values[:k], rest.expand(count + 1 - k)])
        top = values[:k, None]
        terms = (1 / hat[None, :] - 1 / top).log() + (top - padded[None, :]).log() + math.log(n)
        number = torch.ones(count + 1, dtype=torch.float64, device=values.device)
        number[-1] = dim - count
        pairs = torch.ones_like(terms).triu(1).bool()
        hessian = torch.where(pairs & (number > 0), terms * number, 0.0).sum()
        result[k - 1] = (
            uniform
            - n / 2 * values[:k].log().sum()
            - n * (dim - k) / 2 * rest.log()
            + (m + k) / 2 * math.log(2 * math.pi)
            - hessian / 2
            - k / 2 * math.log(n)
        )
    return result


def minka_rank(variances: Tensor, num_samples: int, dim: int) -> int:
    """Return the number of components with the largest evidence, at least 1.

    Args:
        variances: As for :func:`minka_log_evidence`.
        num_samples: N.
        dim: d.
    """
    return int(minka_log_evidence(variances, num_samples, dim).argmax()) + 1
