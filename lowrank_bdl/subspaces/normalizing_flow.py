"""Variational inference by a normalizing flow, of zuko, over subspace coordinates."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.subspaces.ascent import ascend
from lowrank_bdl.subspaces.chains import CountedTarget, require_counts, seeded, starts
from lowrank_bdl.subspaces.draws import Draws
from lowrank_bdl.subspaces.log_joint import Target
from lowrank_bdl.subspaces.optional import import_optional, lent
from lowrank_bdl.subspaces.variational import GaussianFamily


@exact
def normalizing_flow(
    log_joint: Target,
    num_samples: int = 100,
    *,
    num_steps: int = 500,
    num_draws: int = 16,
    lr: float = 0.02,
    init_std: float | None = None,
    initial: "Tensor | str | None" = None,
    transforms: int = 2,
    hidden_features: Sequence[int] = (32, 32),
    minibatch: bool = False,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Draws:
    r"""Fit a normalizing flow to the posterior in a subspace by maximising the evidence lower bound; draw from it.

    .. math:: \mathrm{ELBO} = E_q[\tfrac1T \log p(\mathcal D \mid z) + \log N(z; 0, s^2 I) - \log q(z)]

    q is the law of :math:`z = m + L u`, L lower triangular, u from an inverse autoregressive flow of zuko's rational
    quadratic splines on a standard normal: a Gaussian to begin with, bent where that helps. Gradients of the likelihood
    go through z to m, L and the flow's weights. Zuko draws from torch's global generator, which is lent this one's
    state and put back.

    Args:
        log_joint: As for :func:`~lowrank_bdl.subspaces.elliptical_slice.elliptical_slice`, differentiable in z.
        num_samples: Draws from the fitted flow to return.
        num_steps: Steps of Adam.
        num_draws: z of each step.
        lr: Its first learning rate; it falls to 0 along a cosine.
        init_std: Where the diagonal of L starts; None: a tenth of the prior's standard deviation.
        initial: Where m starts: ``(k,)``, ``"prior"``, or None for z = 0.
        transforms: Autoregressive transforms, each in the reverse order of the one before.
        hidden_features: Widths of the layers that give the splines.
        minibatch: Estimate the likelihood from one batch at random a step; the log-joint then needs
            ``estimate_log_likelihood(z, generator)``.
        generator: Source of all randomness, on the CPU; None takes torch's global generator.
        progress: Show a progress bar.

    Returns:
        :class:`~lowrank_bdl.subspaces.draws.Draws`, float64, one chain: independent draws with their log-joints;
        ``elbo`` is the estimate of each step, every constant included.

    Raises:
        ImportError: If zuko is not installed; names the extra.
        ValueError: If an argument is out of range, or the generator is not on the CPU.
        NonFiniteError: If the objective is not finite; a smaller ``lr`` may help.
        TypeError: If ``minibatch`` is asked of a log-joint that cannot.

    Cost: ``num_draws`` likelihoods and gradients a step, and ``num_samples`` likelihoods.

    Source: Kingma et al., "Improved variational inference with inverse autoregressive flow" (2016); Durkan et al.,
    "Neural spline flows" (2019).
    """
    require_counts(num_samples=(num_samples, 1), num_draws=(num_draws, 1), transforms=(transforms, 1))
    flows = import_optional("zuko.flows", "normalizing_flow")
    init_std = log_joint.prior_std / 10 if init_std is None else init_std
    if not 0 < init_std < math.inf:
        raise ValueError(f"init_std must be positive and finite; got {init_std}.")
    began = time.perf_counter()
    target, (own,) = CountedTarget(log_joint), seeded(generator, 1)
    start = starts(initial, log_joint, [own])[0]
    family = GaussianFamily(start, init_std, target.prior_std, full=True, fit_mean=True)
    with lent(own):
        forwards = flows.NSF(features=target.rank, transforms=transforms, hidden_features=tuple(hidden_features))
    flow = flows.Flow(forwards.transform.inv, forwards.base).double()  # inverted: drawing takes one pass, not k

    def draw(count: int) -> tuple[Tensor, Tensor]:
        with lent(own):
            u, log_density = flow().rsample_and_log_prob((count,))
        scale_tril = family.scale_tril
        return family.location + u @ scale_tril.mT, log_density - scale_tril.diagonal().log().sum()

    def objective() -> tuple[Tensor, Tensor]:
        z, log_density = draw(num_draws)
        data = target.estimate(z, own) if minibatch else target.log_likelihood(z)
        bound = (data + target.log_prior(z) - log_density).mean()
        return bound, bound

    parameters = [*family.parameters, *flow.parameters()]
    trace = ascend(objective, parameters, num_steps=num_steps, lr=lr, name="normalizing flow", progress=progress)
    with torch.no_grad():
        z, _ = draw(num_samples)
    settings: dict[str, Any] = {"num_steps": num_steps, "num_draws": num_draws, "lr": lr, "transforms": transforms}
    settings |= {"init_std": init_std, "hidden_features": list(hidden_features), "minibatch": minibatch}
    return target.described(z, "normalizing flow", began, trace, settings)
