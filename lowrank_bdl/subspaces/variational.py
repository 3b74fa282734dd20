"""Gaussian variational inference over subspace coordinates."""

import math
import time
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.subspaces.ascent import ascend
from lowrank_bdl.subspaces.chains import CountedTarget, normals, require_counts, seeded, starts
from lowrank_bdl.subspaces.draws import Draws
from lowrank_bdl.subspaces.log_joint import Target


def gaussian_kl(location: Tensor, scale_tril: Tensor, prior_std: float) -> Tensor:
    r"""Return :math:`\mathrm{KL}(N(m, L L^\top) \,\|\, N(0, s^2 I))`, every constant included.

    .. math:: \sum_i \log\frac{s}{L_{ii}} + \frac{\lVert L \rVert_F^2 + \lVert m \rVert^2}{2 s^2} - \frac k2

    Args:
        location: m, shape ``(k,)``.
        scale_tril: L, lower triangular with a positive diagonal, shape ``(k, k)``.
        prior_std: s > 0.

    Returns:
        A scalar [nat], differentiable.

    Example:
        >>> gaussian_kl(torch.zeros(2), 2 * torch.eye(2), 2.0)
        tensor(0.)
    """
    squares = (scale_tril.square().sum() + location.square().sum()) / (2 * prior_std**2)
    return (math.log(prior_std) - scale_tril.diagonal().log()).sum() + squares - len(location) / 2


class GaussianFamily:
    """The parameters of q(z) = N(m, L L'), in units of the prior.

    Args:
        start: Where the mean starts, shape ``(k,)``.
        std: Where every standard deviation starts.
        prior_std: The unit.
        full: A full L, or a diagonal one.
        fit_mean: Whether the mean is fitted too.
    """

    def __init__(self, start: Tensor, std: float, prior_std: float, full: bool, fit_mean: bool) -> None:
        self._unit = prior_std
        self._mean = (start / prior_std).requires_grad_(fit_mean)
        self._log_std = torch.full_like(start, math.log(std / prior_std), requires_grad=True)
        self._mix = start.new_zeros(len(start), len(start)).requires_grad_(full)

    @property
    def parameters(self) -> list[Tensor]:
        """What is fitted."""
        return [tensor for tensor in (self._mean, self._log_std, self._mix) if tensor.requires_grad]

    @property
    def location(self) -> Tensor:
        """m, shape ``(k,)``."""
        return self._unit * self._mean

    @property
    def scale_tril(self) -> Tensor:
        """L, shape ``(k, k)``: standard deviations times a unit triangular matrix."""
        unit = self._mix.tril(-1) + torch.eye(len(self._mean), dtype=self._mean.dtype, device=self._mean.device)
        return self._unit * self._log_std.exp().unsqueeze(-1) * unit


@exact
def variational(
    log_joint: Target,
    num_samples: int = 100,
    *,
    covariance: Literal["diagonal", "full"] = "diagonal",
    num_steps: int = 500,
    num_draws: int = 4,
    lr: float = 0.05,
    init_std: float | None = None,
    initial: "Tensor | str | None" = None,
    fit_mean: bool = True,
    minibatch: bool = False,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Draws:
    r"""Fit a Gaussian to the posterior in a subspace by maximising the evidence lower bound, and draw from it.

    .. math:: \mathrm{ELBO} = E_q[\tfrac1T \log p(\mathcal D \mid z)] - \mathrm{KL}(q \,\|\, N(0, s^2 I)),
        \qquad q = N(m, L L^\top)

    The temperature is the log-joint's, on the likelihood; the KL divergence is complete. Each step draws
    :math:`z = m \pm L \epsilon`, and follows the path derivative: q's own density is held fixed in its parameters,
    which leaves the expected gradient as it is, and no noise at all where q is the posterior. A linear-Gaussian
    posterior is thus found exactly with ``covariance="full"``.

    Args:
        log_joint: As for :func:`~lowrank_bdl.subspaces.elliptical_slice.elliptical_slice`, differentiable in z.
        num_samples: Draws from the fitted q to return.
        covariance: ``"diagonal"`` (mean-field) or ``"full"``.
        num_steps: Steps of Adam.
        num_draws: z of each step, in pairs on both sides of the mean where the number is even.
        lr: Its first learning rate, in units of the prior's standard deviation; it falls to 0 along a cosine.
        init_std: Where standard deviations start; None: a tenth of the prior's.
        initial: Where the mean starts: ``(k,)``, ``"prior"``, or None for z = 0.
        fit_mean: False keeps the mean where it starts (drbayes's ``--no_mu``).
        minibatch: Estimate the likelihood from one batch at random a draw; the log-joint then needs
            ``estimate_log_likelihood(z, generator)``.
        generator: Source of all randomness; None takes torch's global generator, on the CPU.
        progress: Show a progress bar.

    Returns:
        :class:`~lowrank_bdl.subspaces.draws.Draws`, float64, one chain: independent draws with their log-joints;
        ``location``, ``scale_tril`` and ``distribution`` are q; ``elbo`` is the estimate of each step.

    Raises:
        ValueError: If an argument is out of range or unknown.
        NonFiniteError: If the objective is not finite; a smaller ``lr`` or ``init_std`` may help.
        TypeError: If ``minibatch`` is asked of a log-joint that cannot.

    Cost: ``num_draws`` likelihoods and gradients a step (of a batch each with ``minibatch``), and ``num_samples``
    likelihoods.

    Source: Izmailov et al. (2019), section 3.3; the path derivative is Roeder, Wu and Duvenaud, "Sticking the landing"
    (2017), section 3.

    Example:
        >>> from lowrank_bdl.subspaces.log_joint import gaussian_log_prior
        >>> class Target:  # posterior N(2.4, 0.8)
        ...     rank, prior_std = 1, 2.0
        ...     def log_likelihood(self, z):
        ...         return -(z - 3).square().sum(-1) / 2
        ...     def log_prior(self, z):
        ...         return gaussian_log_prior(z, 2.0)
        >>> q = variational(Target(), generator=torch.Generator().manual_seed(0)).distribution
        >>> round(q.mean.item(), 3), round(q.variance.item(), 3)
        (2.4, 0.8)
    """
    require_counts(num_samples=(num_samples, 1), num_draws=(num_draws, 1))
    if covariance not in ("diagonal", "full"):
        raise ValueError(f"covariance must be 'diagonal' or 'full'; got {covariance!r}.")
    init_std = log_joint.prior_std / 10 if init_std is None else init_std
    if not 0 < init_std < math.inf:
        raise ValueError(f"init_std must be positive and finite; got {init_std}.")
    began = time.perf_counter()
    target, own = CountedTarget(log_joint), seeded(generator, 1)
    start = starts(initial, log_joint, own)[0]
    family = GaussianFamily(start, init_std, target.prior_std, covariance == "full", fit_mean)

    def objective() -> tuple[Tensor, Tensor]:
        half = normals(((num_draws + 1) // 2, target.rank), own)[0]
        noise = torch.cat([half, -half])[:num_draws] if num_draws > 1 else half
        location, scale_tril = family.location, family.scale_tril
        z = location + noise @ scale_tril.mT
        data = target.estimate(z, own[0]) if minibatch else target.log_likelihood(z)
        fixed = MultivariateNormal(location.detach(), scale_tril=scale_tril.detach(), validate_args=False)
        surrogate = (data + target.log_prior(z) - fixed.log_prob(z)).mean()
        return surrogate, data.detach().mean() - gaussian_kl(location, scale_tril, target.prior_std).detach()

    trace = ascend(
        objective, family.parameters, num_steps=num_steps, lr=lr, name="variational inference", progress=progress
    )
    location, scale_tril = family.location.detach(), family.scale_tril.detach()
    z = location + normals((num_samples, target.rank), own)[0] @ scale_tril.mT
    settings = {"covariance": covariance, "num_steps": num_steps, "num_draws": num_draws, "lr": lr}
    settings |= {"init_std": init_std, "fit_mean": fit_mean, "minibatch": minibatch}
    return target.described(z, "variational", began, trace, settings, location=location, scale_tril=scale_tril)
