"""Losses of a batch: ``loss(model, inputs, targets) -> (mean loss, output of the model)``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_bdl.surfaces.surface_model import SurfaceModel
from lowrank_bdl.training.variational import MeanFieldModel

Loss: TypeAlias = Callable[[nn.Module, Any, Any], tuple[Tensor, Any]]
"""Mean loss over the batch (0-d, differentiable) and the model's output, which the metrics are made from."""

Metric: TypeAlias = Callable[[Any, Any], Tensor]
"""``metric(output, targets)``: mean over the batch, a 0-d tensor."""


@runtime_checkable
class HasVolume(Protocol):
    """A surface that can be kept from collapsing."""

    def log_volume(self) -> Tensor:
        """Return the logarithm of its volume, ``()``, differentiably."""


def cross_entropy(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross entropy of the model's logits [nats], and the logits.

    Args:
        model: Gives logits ``(N, C)`` or ``(N, C, *positions)``.
        inputs: ``(N, ...)``.
        targets: Class indices ``(N)`` or ``(N, *positions)``.

    Returns:
        The loss ``()`` and the logits.

    Example:
        >>> loss, logits = cross_entropy(nn.Identity(), torch.zeros(3, 2), torch.tensor([0, 1, 1]))
        >>> round(loss.item(), 4), logits.shape
        (0.6931, torch.Size([3, 2]))
    """
    output = model(inputs)
    return functional.cross_entropy(_at_least_single(output), targets), output


def _at_least_single(output: Tensor) -> Tensor:
    """Mixed precision is for matrix products: a loss in half precision would lose three digits."""
    return output.to(torch.promote_types(output.dtype, torch.float32))


def of_output(function: Callable[[Any, Any], Tensor]) -> Loss:
    """Make a loss from a function of the model's output and the targets.

    Args:
        function: ``function(output, targets)``: mean loss of the batch, ``()``.

    Returns:
        The loss.

    Example:
        >>> squared = of_output(torch.nn.functional.mse_loss)
        >>> squared(nn.Identity(), torch.ones(2, 1), torch.zeros(2, 1))[0].item()
        1.0
    """

    def loss(model: nn.Module, inputs: Any, targets: Any) -> tuple[Tensor, Any]:
        output = model(inputs)
        return function(output, targets), output

    return loss


def accuracy(output: Tensor, targets: Tensor) -> Tensor:
    """Return the fraction of the batch whose largest logit is the target's, as a tensor on the device.

    Args:
        output: Logits ``(N, C)`` or ``(N, C, *positions)``.
        targets: Class indices ``(N)`` or ``(N, *positions)``.

    Returns:
        A 0-d tensor in [0, 1].

    Example:
        >>> accuracy(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1])).item()
        0.5
    """
    return (output.argmax(1) == targets).double().mean()


@dataclass(frozen=True)
class AdversarialCrossEntropy:
    r"""Mean of the cross entropies of a batch and of its fast-gradient-sign perturbation.

    .. math::
        \tfrac12 \ell(x) + \tfrac12 \ell(\mathrm{clamp}(x + \epsilon (h - l) \, \mathrm{sign}\, \nabla_x \ell(x), l, h))

    The perturbation is :math:`\epsilon` of the range of *normalised* values, and clamped there: bounds of [0, 1] would
    cut off more than half of a normalised image. The perturbed batch is a constant (no second derivative).

    Args:
        low: Smallest possible input, a number or a tensor that broadcasts against a batch, such as ``(C, 1, 1)``.
        high: Largest possible input, likewise.
        epsilon: Size of the perturbation as a fraction of ``high - low``, >= 0.

    Raises:
        ValueError: If ``epsilon`` < 0, or ``low`` is not below ``high``.

    Cost: two forward and two backward passes. Batch norm in training mode sees both batches.

    Source: Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples" (2015), section 6;
    Lakshminarayanan et al. (NeurIPS 2017), section 2.3 and algorithm 1.

    Example:
        >>> loss = AdversarialCrossEntropy(low=-1.0, high=1.0, epsilon=0.1)
        >>> x, y = torch.tensor([[0.5, 0.0]]), torch.tensor([0])
        >>> value, logits = loss(nn.Identity(), x, y)
        >>> clean, attacked = (functional.cross_entropy(z, y) for z in (x, torch.tensor([[0.3, 0.2]])))
        >>> torch.equal(logits, x), torch.allclose(value, (clean + attacked) / 2)
        (True, True)
    """

    low: "Tensor | float"
    high: "Tensor | float"
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must be >= 0; got {self.epsilon}.")
        if not bool(torch.as_tensor(self.low < self.high).all()):
            raise ValueError(f"low must be below high everywhere; got {self.low} and {self.high}.")

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss ``()`` [nats] and the logits of the batch as it is.

        Args:
            model: Gives logits ``(N, C)``.
            inputs: ``(N, ...)``, normalised.
            targets: Class indices ``(N)``.
        """
        low, high = (
            torch.as_tensor(bound, dtype=inputs.dtype, device=inputs.device) for bound in (self.low, self.high)
        )
        clean = inputs.detach().requires_grad_()
        loss, output = cross_entropy(model, clean, targets)
        (gradient,) = torch.autograd.grad(loss, clean, retain_graph=True)
        step = self.epsilon * (high - low)
        attacked = torch.clamp(inputs.detach() + step * gradient.sign(), low, high)
        return 0.5 * loss + 0.5 * cross_entropy(model, attacked, targets)[0], output


@dataclass(frozen=True)
class GaussianPrior:
    r"""Add the negative log-density of a Gaussian prior, per training example and without its constant.

    .. math:: \ell(\theta) + \frac{\lVert \theta \rVert^2}{2 \, \sigma^2 N}

    Equal to weight decay 1 / (σ² N) in plain SGD, but part of the loss: it is what a MAP estimate minimises, and
    whatever reads the loss's gradient sees it.

    Args:
        loss: What it is added to.
        prior_var: σ² > 0 [parameter²].
        num_data: N >= 1, the number of training examples.

    Raises:
        ValueError: If ``prior_var`` or ``num_data`` is out of range.

    Source: Wilson and Izmailov, "Bayesian Deep Learning and a Probabilistic Perspective of Generalization" (2020).

    Example:
        >>> net = nn.Linear(1, 2, bias=False)
        >>> prior = GaussianPrior(cross_entropy, prior_var=0.1, num_data=50)
        >>> x, y = torch.ones(1, 1), torch.tensor([0])
        >>> difference = prior(net, x, y)[0] - cross_entropy(net, x, y)[0]
        >>> torch.allclose(difference, net.weight.square().sum() / (2 * 0.1 * 50), atol=1e-6)
        True
    """

    loss: Loss
    prior_var: float
    num_data: int

    def __post_init__(self) -> None:
        if not 0 < self.prior_var < float("inf"):
            raise ValueError(f"prior_var must be positive and finite; got {self.prior_var}.")
        if self.num_data < 1:
            raise ValueError(f"num_data must be at least 1; got {self.num_data}.")

    def __call__(self, model: nn.Module, inputs: Any, targets: Any) -> tuple[Tensor, Any]:
        """Return the loss with the prior's term, and the model's output.

        Args:
            model: All its parameters that require a gradient have the prior; tied ones count once.
            inputs: As ``loss`` takes them.
            targets: As ``loss`` takes them.
        """
        value, output = self.loss(model, inputs, targets)
        squares = [p.square().sum() for p in model.parameters() if p.requires_grad]
        norm = torch.stack([square.to(value) for square in squares]).sum() if squares else value.new_zeros(())
        return value + norm / (2 * self.prior_var * self.num_data), output


@dataclass(frozen=True)
class ELBO:
    r"""The negative evidence lower bound per training example, of a network with mean-field weights.

    .. math:: \frac1S \sum_{s=1}^S \ell(\theta_s) + \frac{T}{N} \, \mathrm{KL}(q \,\|\, N(0, s_p^2 I)),
        \qquad \theta_s \sim q

    With a mean negative log-likelihood ℓ and T = 1, −N times its expectation is a lower bound of the log evidence
    [nat].

    Args:
        loss: Mean loss of a batch [nat].
        num_data: N >= 1, the number of training examples.
        prior_std: Standard deviation :math:`s_p` > 0 of the prior [parameter]; (N λ)^-½ is the prior that a weight
            decay λ stands for.
        temperature: T >= 0: 1 is the posterior, less a colder one.
        num_draws: S >= 1, draws of the weights a batch.

    Raises:
        ValueError: If a value is out of range.

    Cost: S forward passes and O(D).

    Source: Blundell et al., "Weight Uncertainty in Neural Networks" (ICML 2015), eq. 1, with the KL in closed form.

    Example:
        >>> net = MeanFieldModel(nn.Linear(1, 2), init_std=0.5)
        >>> x, y = torch.zeros(1, 1), torch.tensor([0])
        >>> colder, warmer = (ELBO(cross_entropy, 10, 1.0, temperature=t) for t in (0.0, 1.0))
        >>> _ = net.eval()  # at the mean, so that both see the same weights
        >>> torch.allclose(warmer(net, x, y)[0] - colder(net, x, y)[0], (net.kl(1.0) / 10).float())
        True
    """

    loss: Loss
    num_data: int
    prior_std: float
    temperature: float = 1.0
    num_draws: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.prior_std < float("inf"):
            raise ValueError(f"prior_std must be positive and finite; got {self.prior_std}.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0 and finite; got {self.temperature}.")
        for name in ("num_data", "num_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")

    def __call__(self, model: nn.Module, inputs: Any, targets: Any) -> tuple[Tensor, Any]:
        """Return the loss ``()`` [nat per example], and the output of the last draw.

        Args:
            model: The mean-field network.
            inputs: As ``loss`` takes them.
            targets: As ``loss`` takes them.

        Raises:
            TypeError: If the model is of another class.
        """
        if not isinstance(model, MeanFieldModel):
            raise TypeError(f"ELBO needs a MeanFieldModel; got {type(model).__name__}.")
        found = [self.loss(model, inputs, targets) for _ in range(self.num_draws)]
        value = torch.stack([each for each, _ in found]).mean()
        penalty = model.kl(self.prior_std) * (self.temperature / self.num_data)
        return value + penalty.to(value), found[-1][1]


@dataclass(frozen=True)
class SurfaceLoss:
    r"""The loss of a network on a curve or simplex of weights, by draws from it.

    .. math:: \frac1S \sum_{s=1}^S \left[ \ell(\theta_s) + \tfrac{\lambda}{2} \lVert \theta_s \rVert^2 \right]
        - \mu \log V

    with :math:`\theta_s` drawn from the surface and :math:`V` its volume. The penalty is on the weights that are drawn:
    leave the optimizer's own weight decay, which would act on the points, at 0.

    Args:
        loss: Mean loss of a batch [nat].
        weight_decay: λ >= 0, of all weights on the surface [1/parameter²].
        volume: μ >= 0 [nat]; more than 0 needs a surface with a ``log_volume``.
        num_samples: S >= 1, draws of the weights a batch.

    Raises:
        ValueError: If a value is out of range.

    Cost: S forward passes, whose activations are kept until the backward pass, and O(S D).

    Source: Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs" (2018), eq. 2 (curves, S =
    1); Benton et al., "Loss Surface Simplexes for Mode Connecting Volumes and Fast Ensembling" (2021), eq. 3.

    Example:
        >>> from lowrank_bdl.surfaces.curves import PolygonalChain
        >>> net = SurfaceModel(nn.Linear(1, 2, bias=False), PolygonalChain(torch.ones(2, 2)))
        >>> x, y = torch.ones(1, 1), torch.tensor([0])
        >>> round(SurfaceLoss(cross_entropy, weight_decay=0.5)(net, x, y)[0].item(), 4)  # log 2 + 0.25 (1 + 1)
        1.1931
    """

    loss: Loss
    weight_decay: float = 0.0
    volume: float = 0.0
    num_samples: int = 1

    def __post_init__(self) -> None:
        for name in ("weight_decay", "volume"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0 and finite; got {getattr(self, name)}.")
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1; got {self.num_samples}.")

    def __call__(self, model: nn.Module, inputs: Any, targets: Any) -> tuple[Tensor, Any]:
        """Return the loss ``()`` [nat per example], and the output of the last draw.

        Args:
            model: The network on its surface; in evaluation mode the draw is the middle.
            inputs: As ``loss`` takes them.
            targets: As ``loss`` takes them.

        Raises:
            TypeError: If the model is of another class, or there is no volume to weigh.
        """
        if not isinstance(model, SurfaceModel):
            raise TypeError(f"SurfaceLoss needs a SurfaceModel; got {type(model).__name__}.")
        terms, output = [], None
        for _ in range(self.num_samples):
            theta = model.draw() if model.training else model.surface.center_theta()
            with model.at(theta):
                value, output = self.loss(model, inputs, targets)
            norm = theta.square().sum() if self.weight_decay else theta.new_zeros(())
            terms.append(value + (0.5 * self.weight_decay * norm).to(value))
        mean = torch.stack(terms).mean()
        if not self.volume:
            return mean, output
        if not isinstance(model.surface, HasVolume):
            found = type(model.surface).__name__
            raise TypeError(f"volume = {self.volume} needs a surface with a log_volume; {found} has none.")
        return mean - self.volume * model.surface.log_volume().to(mean), output
