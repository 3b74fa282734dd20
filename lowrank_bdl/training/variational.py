"""Mean-field variational inference over all weights: a network that draws them anew at every forward pass."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lowrank_bdl.linalg.devices import generator_on
from lowrank_bdl.linalg.precision import callers_precision, exact_methods
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.selection import Selector
from lowrank_bdl.parameters.substitution import Substitution
from lowrank_bdl.posteriors.gaussian import GaussianPosterior


@exact_methods
class MeanFieldModel(nn.Module):
    r"""A network with independent Gaussian weights, :math:`q(\theta) = N(\mu, \mathrm{diag}(\sigma^2))`.

    In training mode every forward pass draws :math:`\theta = \mu + \sigma \epsilon`, :math:`\epsilon \sim N(0, I)`,
    with :math:`\sigma = \log(1 + e^\rho)`; the network is called with the drawn tensors in place of its own, so that
    gradients reach μ and ρ. In evaluation mode it is the network at the mean; average over draws with
    ``lb.predict(net.model, net.posterior(), ...)``. Train it with :class:`lowrank_bdl.training.losses.ELBO`.

    The means are the network's own parameters: training moves them, and its buffers, in place. Parameters that are left
    out have no variance; they are trained as they are unless frozen.

    Args:
        model: Any module; its present weights are where the means start.
        init_std: Where every σ starts, > 0 [parameter].
        include: Parameters with a variance, as in :meth:`ParameterLayout.from_module`; None takes all trainable ones.
        exclude: What to leave out of these.
        generator: Source of the draws, on any device; its state is the caller's to keep. None takes torch's
            default generator, whose state a :class:`~lowrank_bdl.training.trainer.Trainer` keeps in its checkpoints.

    Attributes:
        model: The network, with μ as its parameters.
        layout: What has a variance.
        rho: ρ of each of these parameters, in the order of the layout.

    Raises:
        ValueError: If ``init_std`` is not positive and finite.
        ShapeError: If nothing is selected.

    Cost: a forward pass, D normals, and two tensors of the weights' size; σ doubles the trained parameters.

    Source: Blundell et al., "Weight Uncertainty in Neural Networks" (ICML 2015), section 3.2.

    Example:
        >>> net = MeanFieldModel(nn.Linear(2, 1), init_std=0.1)
        >>> x = torch.ones(1, 2)
        >>> torch.equal(net(x), net(x)), torch.equal(net.eval()(x), net.model(x))
        (False, True)
        >>> net.posterior().stddev
        tensor([0.1000, 0.1000, 0.1000])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        init_std: float,
        include: "Selector | None" = None,
        exclude: "Selector | None" = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 0 < init_std < math.inf:
            raise ValueError(f"init_std must be positive and finite; got {init_std}.")
        self.layout = ParameterLayout.from_module(model, include, exclude)
        self.model = model
        self._substitution = Substitution(model, protect=False)
        self.generator = generator
        start = init_std + math.log(-math.expm1(-init_std))  # softplus(start) = init_std
        means = self.layout.parameters_of(model)
        self.rho = nn.ParameterList(torch.full_like(mean, start, requires_grad=True) for mean in means)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network: with weights drawn anew in training mode, at the mean in evaluation mode.

        Args:
            *args: As the network takes them.
            **kwargs: As the network takes them.

        Returns:
            What the network returns.
        """
        if not self.training:
            return self.model(*args, **kwargs)
        with callers_precision():
            return self._substitution(self.draw(), lambda: self.model(*args, **kwargs))

    def draw(self) -> dict[str, Tensor]:
        """Draw the weights once, differentiably in μ and ρ.

        Returns:
            Name to tensor, of the parameters in the layout.
        """
        drawn = {}
        for name, mean, std in self._named():
            generator = generator_on(mean.device, self.generator)
            noise = torch.empty_like(mean, requires_grad=False).normal_(generator=generator)
            drawn[name] = torch.addcmul(mean, std, noise)
        return drawn

    def _named(self) -> list[tuple[str, Tensor, Tensor]]:
        """Name, μ and σ of each parameter in the layout."""
        means = self.layout.parameters_of(self.model)
        return [(n, m, softplus(rho)) for n, m, rho in zip(self.layout.names, means, self.rho, strict=True)]

    def kl(self, prior_std: float) -> Tensor:
        r"""Return :math:`\mathrm{KL}(q \,\|\, N(0, s^2 I))` in closed form, all constants included.

        .. math:: \sum_i \log\frac{s}{\sigma_i} + \frac{\sigma_i^2 + \mu_i^2}{2 s^2} - \frac12

        Args:
            prior_std: s > 0 [parameter].

        Returns:
            A float64 scalar [nat], differentiable in μ and ρ.

        Raises:
            ValueError: If ``prior_std`` is not positive and finite.

        Cost: O(D).

        Example:
            >>> MeanFieldModel(nn.Linear(3, 1, bias=False), init_std=1.0).kl(1.0).item() >= 0
            True
        """
        if not 0 < prior_std < math.inf:
            raise ValueError(f"prior_std must be positive and finite; got {prior_std}.")
        terms = []
        for _, mean, std in self._named():
            ratio = std.double() / prior_std
            terms.append((0.5 * (ratio.square() + (mean.double() / prior_std).square() - 1) - ratio.log()).sum())
        return torch.stack(terms).sum()

    @torch.no_grad()
    def posterior(self) -> GaussianPosterior:
        """Return q as a Gaussian of rank 0 over the network's weights: a copy, untouched by further training."""
        named = self._named()
        mean = self.layout.flatten({name: mean for name, mean, _ in named})
        variance = self.layout.flatten({name: std for name, _, std in named}).square_()
        provenance = {"method": "mean-field variational inference"}
        return GaussianPosterior.diagonal(mean, variance, self.layout, provenance)
