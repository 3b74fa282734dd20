"""Two plain answers: the mode of the posterior, and the low-rank Gaussian that the subspace was made from."""

import math
import time
from typing import Literal

import torch
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError
from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.subspaces.ascent import ascend
from lowrank_bdl.subspaces.chains import CountedTarget, normals, require_counts, seeded, starts
from lowrank_bdl.subspaces.draws import Draws
from lowrank_bdl.subspaces.log_joint import Target


@exact
def map_estimate(
    log_joint: Target,
    *,
    method: Literal["lbfgs", "adam"] = "lbfgs",
    num_steps: int = 100,
    lr: float | None = None,
    initial: "Tensor | str | None" = None,
    minibatch: bool = False,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Draws:
    """Return the most probable z of the posterior in a subspace: training projected on it.

    Args:
        log_joint: As for :func:`~lowrank_bdl.subspaces.elliptical_slice.elliptical_slice`, differentiable in z.
        method: ``"lbfgs"``, with a strong Wolfe line search, needs all data at every step; ``"adam"`` may take
            minibatches.
        num_steps: Most iterations of L-BFGS, which stops when nothing changes; steps of Adam.
        lr: Step size; None: 1 for L-BFGS, a twentieth of the prior's standard deviation for Adam, falling to 0.
        initial: Where it starts: ``(k,)``, ``"prior"``, or None for z = 0.
        minibatch: With Adam: estimate the likelihood from one batch at random each step.
        generator: Source of all randomness; None takes torch's global generator, on the CPU.
        progress: Show a progress bar (Adam).

    Returns:
        :class:`~lowrank_bdl.subspaces.draws.Draws` with one draw, the mode, float64; ``trace`` is the log-joint at
        each evaluation.

    Raises:
        ValueError: If an argument is out of range or unknown.
        NonFiniteError: If the log-joint is not finite.

    Cost: a likelihood and gradient a step; L-BFGS needs 1 to 2.

    Source: the projected SGD of the code of Izmailov et al. (2019).

    Example:
        >>> from lowrank_bdl.subspaces.log_joint import gaussian_log_prior
        >>> class Target:  # posterior N(2.4, 0.8)
        ...     rank, prior_std = 1, 2.0
        ...     def log_likelihood(self, z):
        ...         return -(z - 3).square().sum(-1) / 2
        ...     def log_prior(self, z):
        ...         return gaussian_log_prior(z, 2.0)
        >>> round(map_estimate(Target()).mean.item(), 6)
        2.4
    """
    if method not in ("lbfgs", "adam"):
        raise ValueError(f"method must be 'lbfgs' or 'adam'; got {method!r}.")
    if minibatch and method == "lbfgs":
        raise ValueError("L-BFGS needs all data at every step; pass method='adam' for minibatches.")
    require_counts(num_steps=(num_steps, 1))
    began = time.perf_counter()
    target, own = CountedTarget(log_joint), seeded(generator, 1)
    z = starts(initial, log_joint, own).requires_grad_()

    def objective() -> tuple[Tensor, Tensor]:
        data = target.estimate(z, own[0]) if minibatch else target.log_likelihood(z)
        value = (data + target.log_prior(z)).sum()
        return value, value

    if method == "adam":
        rate = log_joint.prior_std / 20 if lr is None else lr
        trace = ascend(objective, [z], num_steps=num_steps, lr=rate, name="MAP", progress=progress)
    else:
        rate = 1.0 if lr is None else lr
        optimizer = torch.optim.LBFGS(
            [z], lr=rate, max_iter=num_steps, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )
        values: list[Tensor] = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            value, _ = objective()
            values.append(value.detach())
            if not bool(value.isfinite()):
                raise NonFiniteError(f"the log-joint must be finite; got {value.item()}.")
            (-value).backward()
            return -value.detach()

        with torch.enable_grad():
            optimizer.step(closure)
        trace = torch.stack(values)
    settings = {"method": method, "num_steps": num_steps, "lr": rate, "minibatch": minibatch}
    return target.described(z.detach(), "map", began, trace, settings)


@exact
def low_rank_gaussian(
    log_joint: Target,
    num_samples: int,
    *,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> Draws:
    r"""Draw :math:`z \sim N(0, c I)`: with a basis scaled by its singular values, the low-rank law it was made from.

    No data are asked; the log-joints are those of the draws.

    Args:
        log_joint: As for :func:`~lowrank_bdl.subspaces.elliptical_slice.elliptical_slice`.
        num_samples: How many.
        scale: c > 0, which multiplies the variance.
        generator: Source of the normals; None takes torch's global generator, on the CPU.

    Returns:
        :class:`~lowrank_bdl.subspaces.draws.Draws`, float64, one chain of independent draws.

    Raises:
        ValueError: If an argument is out of range.

    Cost: ``num_samples`` likelihoods.

    Example:
        >>> from lowrank_bdl.subspaces.log_joint import gaussian_log_prior
        >>> class Target:
        ...     rank, prior_std = 2, 1.0
        ...     def log_likelihood(self, z):
        ...         return -z.square().sum(-1)
        ...     def log_prior(self, z):
        ...         return gaussian_log_prior(z, 1.0)
        >>> low_rank_gaussian(Target(), 5)
        Draws(method='low-rank Gaussian', chains=1, draws=5, rank=2, evaluations=5, seconds=0.0)
    """
    require_counts(num_samples=(num_samples, 1))
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite; got {scale}.")
    began = time.perf_counter()
    target, own = CountedTarget(log_joint), seeded(generator, 1)
    z = math.sqrt(scale) * normals((num_samples, target.rank), own)[0]
    return target.described(z, "low-rank Gaussian", began, None, {"scale": scale})
