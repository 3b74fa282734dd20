"""Classification with noise of its own on every logit: what the data leave open, learnt beside the classes."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution
from torch.nn.functional import softplus

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.devices import generator_on


def noisy_log_probs(outputs: Tensor, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
    r"""Return the logarithm of the class probabilities, averaged over draws of the logits' noise.

    .. math:: \log \frac1T \sum_{t=1}^T \mathrm{softmax}(\mu + \sigma \odot \epsilon_t), \qquad
        \epsilon_t \sim N(0, I), \quad \sigma = \mathrm{softplus}(r)

    The average of probabilities, not of their logarithms: noise lowers what a wrong class costs, and the network learns
    to be noisy where it cannot be right. (Released code averaged exp(+loss) in place of exp(−loss), which rewards the
    opposite.)

    Args:
        outputs: μ and r of every logit, ``(N, 2, C, *positions)``.
        num_draws: T >= 1.
        generator: Source of the noise, on any device; None takes torch's global generator.

    Returns:
        Log-probabilities ``(N, C, *positions)``, differentiable, float32 at least.

    Raises:
        ShapeError: If the outputs do not have that shape.
        ValueError: If T < 1.

    Cost: time and memory of T softmaxes.

    Source: Kendall and Gal, "What Uncertainties Do We Need in Bayesian Deep Learning for Computer Vision?" (2017), eq.
    12.

    Example:
        >>> quiet = torch.tensor([[[0.0, 1.0], [-200.0, -200.0]]])
        >>> torch.allclose(noisy_log_probs(quiet, 3), torch.tensor([[0.0, 1.0]]).log_softmax(1))
        True
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1; got {num_draws}.")
    if outputs.ndim < 3 or outputs.shape[1] != 2 or not outputs.is_floating_point():
        raise ShapeError(
            "The output must be the mean and the noise of every logit, shape (N, 2, C, *positions); "
            f"got {outputs.dtype} of shape {tuple(outputs.shape)}."
        )
    mean, raw = outputs.to(torch.promote_types(outputs.dtype, torch.float32)).unbind(1)
    generator = generator_on(mean.device, generator)
    noise = torch.randn((num_draws, *mean.shape), dtype=mean.dtype, device=mean.device, generator=generator)
    log_probs: Tensor = (mean + softplus(raw) * noise).log_softmax(2).logsumexp(0) - math.log(num_draws)
    return log_probs


@dataclass(frozen=True)
class NoisyLogitsLikelihood:
    """The distribution of the class that a network with noisy logits predicts, for ``predict(..., likelihood=...)``.

    Attributes:
        num_draws: T >= 1, draws of the noise.
        generator: Their source, on any device; None takes torch's global generator.

    Example:
        >>> rule = NoisyLogitsLikelihood(2000, torch.Generator().manual_seed(0))
        >>> noisy = torch.tensor([[[3.0, 0.0], [10.0, 10.0]]])  # a difference of 3, its noise 14
        >>> 0.5 < rule(noisy).probs[0, 0].item() < 0.65 < torch.tensor(3.0).sigmoid().item()
        True
    """

    num_draws: int = 20
    generator: torch.Generator | None = None

    def __call__(self, outputs: Any) -> Distribution:
        """Give the distribution of the class.

        Args:
            outputs: As :func:`noisy_log_probs` takes them.

        Returns:
            A categorical distribution of batch shape ``(N, *positions)``.

        Raises:
            ShapeError: If the outputs do not have that shape.
        """
        log_probs = noisy_log_probs(outputs, self.num_draws, self.generator)
        return Categorical(logits=log_probs.movedim(1, -1), validate_args=False)
