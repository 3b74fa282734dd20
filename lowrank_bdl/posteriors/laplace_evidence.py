r"""Laplace's log evidence as a function of the prior precision, and its maximum."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_TOLERANCE = 1e-10


def log_evidence(
    log_likelihood: float, squared_norm: float, eigenvalues: Iterable[Tensor], prior_precision: float
) -> float:
    r"""Return :math:`\log p(D|\theta) + \tfrac12 \sum_i (\log\tau - \log(h_i + \tau)) - \tfrac\tau2 |\theta|^2` [nat].

    The :math:`2\pi` of the prior and of the integral cancel.

    Args:
        log_likelihood: At the weights, summed over the data.
        squared_norm: :math:`|\theta|^2` of the weights that have a curvature.
        eigenvalues: :math:`h_i \geq 0` of the data's curvature, in parts, float64.
        prior_precision: :math:`\tau > 0`.

    Example:
        >>> import torch
        >>> value = log_evidence(-1.0, 4.0, [torch.tensor([3.0, 8.0], dtype=torch.float64)], 1.0)
        >>> abs(value - (-1.0 - 2.0 - 0.5 * math.log(4 * 9))) < 1e-12
        True
    """
    # log1p: where the data say little of a direction, the two logarithms nearly cancel
    occam = -_total((values / prior_precision).log1p() for values in eigenvalues)
    return log_likelihood + 0.5 * (occam - prior_precision * squared_norm)


def most_likely_precision(eigenvalues: Callable[[], Iterable[Tensor]], squared_norm: float) -> float:
    r"""Return the prior precision of largest evidence, to 1e-10 relative.

    At a stationary point :math:`\gamma = \tau |\theta|^2` with :math:`\gamma = \sum_i h_i / (h_i + \tau)`, the
    number of well-determined weights (MacKay, "Bayesian Interpolation", Neural Computation 1992). The left side falls
    with :math:`\tau` and the right side rises, so there is one, a maximum, and bisection of :math:`\log\tau` finds it.

    Args:
        eigenvalues: Gives :math:`h_i \geq 0` in parts, float64, anew at each call.
        squared_norm: :math:`|\theta|^2`.

    Raises:
        ValueError: If no :math:`h_i` is positive or :math:`|\theta|^2 = 0`: the evidence then has no maximum.

    Cost: about 50 sums over the eigenvalues.

    Example:
        >>> import torch
        >>> values = torch.tensor([2.0], dtype=torch.float64)
        >>> precision = most_likely_precision(lambda: [values], 1.0)  # 2 / (2 + t) = t
        >>> round(precision, 9) == round(math.sqrt(3) - 1, 9)
        True
    """
    positive = sum(int(values.count_nonzero()) for values in eigenvalues())
    if not (positive and squared_norm > 0):
        raise ValueError(
            "the evidence has a maximum only if neither the weights nor the curvature are all zero; "
            f"got |mean|^2 = {squared_norm} and {positive} positive eigenvalues."
        )

    def is_too_small(precision: float) -> bool:
        determined = _total(values / (values + precision) for values in eigenvalues())
        return determined > precision * squared_norm

    low = high = positive / squared_norm  # not too small: fewer than all directions are determined
    while not is_too_small(low):
        low, high = low / 16, low
    while high > low * (1 + _TOLERANCE):
        middle = math.sqrt(low) * math.sqrt(high)
        low, high = (middle, high) if is_too_small(middle) else (low, middle)
    return math.sqrt(low) * math.sqrt(high)


def _total(blocks: Iterable[Tensor]) -> float:
    """Return the sum over all blocks; one host synchronisation."""
    sums = [block.sum() for block in blocks]
    return torch.stack([part.to(sums[0].device) for part in sums]).sum().item() if sums else 0.0
