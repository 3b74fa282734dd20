"""How far chains have mixed: effective sample size and R-hat of each coordinate."""

import torch
from torch import Tensor

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.precision import exact


@exact
def effective_sample_size(draws: Tensor) -> Tensor:
    r"""Return how many independent draws give the chains' mean its precision, for each coordinate.

    Every chain is split into halves; with :math:`\rho_t` their autocorrelation at lag t, estimated over all of them,

    .. math:: \text{ESS} = \frac{C n}{1 + 2 \sum_{t \ge 1} \rho_t}

    where the sum stops by Geyer's rule: sums of neighbouring pairs are positive and do not grow. Draws that alternate
    about the mean can count for more than C n.

    Args:
        draws: Shape ``(C, n, k)``: chains, draws of each, coordinates; n >= 4.

    Returns:
        Shape ``(k,)``, float64; NaN where all draws are the same or one is not finite.

    Raises:
        ShapeError: If ``draws`` has another form.

    Cost: O(C n log n) a coordinate.

    Source: Geyer, "Practical Markov chain Monte Carlo" (1992), section 3.3; Vehtari et al., "Rank-normalization,
    folding, and localization: an improved R-hat" (2021), eq. 10 to 12.

    Example:
        >>> white = torch.randn(2, 1000, 1, generator=torch.Generator().manual_seed(0))
        >>> 1600 < effective_sample_size(white).item() < 2400
        True
        >>> effective_sample_size(white.repeat_interleave(4, 1)).item() < 2400  # every draw four times
        True
    """
    halves = _split(draws)
    number, length = halves.shape[:2]
    within, total = _variances(halves)
    size = 2 * length  # zero padding: the transform would wrap lags around
    spectrum = torch.fft.rfft(halves - halves.mean(1, keepdim=True), size, dim=1)
    autocovariance = torch.fft.irfft(spectrum.abs().square(), size, dim=1)[:, :length] / length
    rho = 1 - (within - autocovariance.mean(0)) / total  # (length, k)
    rho[0] = 1
    pairs = rho[: length // 2 * 2].unflatten(0, (-1, 2)).sum(1)
    positive = (pairs > 0).cumprod(0).bool()
    pairs = pairs.cummin(0).values.where(positive, 0)
    time = 2 * pairs.sum(0) - 1
    least = 1 / torch.log10(torch.tensor(float(number * length), dtype=torch.float64, device=draws.device))
    return (number * length / torch.maximum(time, least)).where(total.isfinite(), torch.nan)


@exact
def split_rhat(draws: Tensor) -> Tensor:
    r"""Return the rank-normalised split R-hat of each coordinate: 1 when chains agree, above 1.01 when they do not yet.

    Every chain is split into halves; draws are replaced by normal scores of their ranks, and
    :math:`\hat R = \sqrt{\hat V / W}` compares the variance of all with that inside the halves. The larger of two
    values is returned: of the draws, and of their distances from the median, which sees chains that agree in location
    and not in scale. Chains that start at one point and have not moved apart look alike: start them apart
    (``initial="prior"``) for R-hat to mean much.

    Args:
        draws: Shape ``(C, n, k)``: chains, draws of each, coordinates; n >= 4.

    Returns:
        Shape ``(k,)``, float64; NaN where all draws are the same or one is not finite.

    Raises:
        ShapeError: If ``draws`` has another form.

    Cost: a sort of C n numbers a coordinate.

    Source: Vehtari et al. (2021), sections 3 and 4.

    Example:
        >>> draws = torch.randn(2, 500, 1, generator=torch.Generator().manual_seed(0))
        >>> split_rhat(draws).item() < 1.01, split_rhat(draws + torch.tensor([0.0, 2.0]).view(2, 1, 1)).item() > 1.3
        (True, True)
    """
    halves = _split(draws)
    flat = halves.flatten(0, 1)
    ordered = flat.sort(0).values  # the median is the mean of the middle two, as everywhere but in torch
    median = (ordered[(len(flat) - 1) // 2] + ordered[len(flat) // 2]) / 2
    return torch.maximum(*(_rhat(_normal_scores(values)) for values in (halves, (halves - median).abs())))


def _split(draws: Tensor) -> Tensor:
    """Return (2C, n // 2, k) in float64; the middle draw of an odd number is left out."""
    if draws.ndim != 3 or draws.shape[0] < 1 or draws.shape[1] < 4:
        raise ShapeError(f"draws must have shape (C, n, k) with at least 1 chain of 4 draws; got {tuple(draws.shape)}.")
    half = draws.shape[1] // 2
    return torch.cat([draws[:, :half], draws[:, -half:]]).double()


def _variances(chains: Tensor) -> tuple[Tensor, Tensor]:
    """Mean variance inside the chains, and the estimate of the marginal variance; zero becomes NaN."""
    length = chains.shape[1]
    within = chains.var(1).mean(0)
    between = chains.mean(1).var(0)  # of means: B / n in the literature
    total = within * (length - 1) / length + between
    return within, total.where(total > 0, torch.nan)


def _rhat(chains: Tensor) -> Tensor:
    within, total = _variances(chains)
    return (total / within).sqrt()


def _normal_scores(chains: Tensor) -> Tensor:
    """Replace every number by the normal quantile of its rank among all of its coordinate; ties share a mean rank."""
    scores = torch.empty_like(chains)
    for coordinate in range(chains.shape[-1]):
        values = chains[..., coordinate]
        _, where, counts = torch.unique(values, return_inverse=True, return_counts=True)
        ranks = counts.cumsum(0) - (counts - 1) / 2
        fractions = (ranks.double() - 3 / 8) / (values.numel() + 1 / 4)
        scores[..., coordinate] = torch.special.ndtri(fractions)[where]
    return scores.where(chains.isfinite().all(0).all(0), torch.nan)
