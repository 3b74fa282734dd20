"""Losses of predictions for every position of an image, some of which have no label."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_bdl.parameters.noisy_logits import noisy_log_probs


def labelled_accuracy(ignore_index: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the metric "fraction of the labelled positions whose largest logit is the target's".

    Args:
        ignore_index: Target of positions without a label.

    Returns:
        A function of logits ``(N, C, *positions)`` and targets ``(N, *positions)`` to a 0-d tensor in [0, 1], 0 for a
        batch without labels.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0, 1.0], [1.0, 1.0, 0.0]]])
        >>> labelled_accuracy(ignore_index=9)(logits, torch.tensor([[0, 0, 9]])).item()
        0.5
    """

    def accuracy(output: Tensor, targets: Tensor) -> Tensor:
        labelled = targets != ignore_index
        right = (output.argmax(1) == targets) & labelled
        return right.sum() / labelled.sum().clamp(min=1).double()

    return accuracy


def _mean_nll(log_probs: Tensor, targets: Tensor, ignore_index: int, weight: Tensor | None) -> Tensor:
    """Weighted mean over the labelled positions; zero, with a zero gradient, for a batch that has none."""
    weight = log_probs.new_ones(log_probs.shape[1]) if weight is None else weight.to(log_probs)
    total = functional.nll_loss(log_probs, targets, weight, ignore_index=ignore_index, reduction="sum")
    labelled = targets[targets != ignore_index]
    return total / weight[labelled].sum().clamp(min=torch.finfo(weight.dtype).tiny)


def _check(weight: Tensor | None) -> None:
    if weight is not None and not (weight.ndim == 1 and bool((weight > 0).all()) and bool(weight.isfinite().all())):
        raise ValueError(f"weight must be one positive number a class; got {weight}.")


@dataclass(frozen=True)
class DenseCrossEntropy:
    r"""Cross entropy of the labelled positions, weighted by class.

    .. math:: \sum_i w_{y_i} \, (-\log p(y_i)) \, / \, \sum_i w_{y_i}

    over the positions i of the batch that have a label. As torch's own, but for a batch without any label, whose loss
    is 0 and not NaN: a crop of an image may hold nothing else.

    Args:
        ignore_index: Target of positions without a label.
        weight: w, one number > 0 a class, ``(C,)``; None weighs all alike.

    Raises:
        ValueError: If a weight is not positive.

    Example:
        >>> logits = torch.zeros(1, 2, 3)
        >>> loss, output = DenseCrossEntropy(ignore_index=9)(nn.Identity(), logits, torch.tensor([[0, 1, 9]]))
        >>> round(loss.item(), 4), output is logits
        (0.6931, True)
    """

    ignore_index: int = -100
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        _check(self.weight)

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss ``()`` [nats] and the logits.

        Args:
            model: Gives logits ``(N, C, *positions)``.
            inputs: ``(N, ...)``.
            targets: Class indices ``(N, *positions)``, or ``ignore_index``.
        """
        output = model(inputs)
        log_probs = output.to(torch.promote_types(output.dtype, torch.float32)).log_softmax(1)
        return _mean_nll(log_probs, targets, self.ignore_index, self.weight), output


@dataclass(frozen=True)
class AleatoricCrossEntropy:
    r"""Cross entropy of class probabilities averaged over noise on the logits, whose size the network learns.

    .. math:: -\log \frac1T \sum_{t=1}^T \mathrm{softmax}(\mu + \sigma \odot \epsilon_t)_{y}

    weighted and averaged over labelled positions as in :class:`DenseCrossEntropy`; see
    :func:`~lowrank_bdl.parameters.noisy_logits.noisy_log_probs`. Predict with
    :class:`~lowrank_bdl.parameters.noisy_logits.NoisyLogitsLikelihood`.

    Args:
        num_draws: T >= 1; the published number is 50.
        ignore_index: Target of positions without a label.
        weight: One number > 0 a class, ``(C,)``; None weighs all alike.
        generator: Source of the noise, on any device; None takes torch's global generator, which the
            trainer's checkpoints hold.

    Raises:
        ValueError: If ``num_draws`` < 1 or a weight is not positive.

    Cost: the memory of T softmaxes until the backward pass.

    Source: Kendall and Gal, "What Uncertainties Do We Need in Bayesian Deep Learning for Computer Vision?" (2017), eq.
    12.

    Example:
        >>> wrong, y = torch.tensor([[5.0, 0.0]]), torch.tensor([1])
        >>> loss = AleatoricCrossEntropy(5000, generator=torch.Generator().manual_seed(0))
        >>> quiet, noisy = (torch.stack([wrong, torch.full((1, 2), raw)], 1) for raw in (-200.0, 20.0))
        >>> round(loss(nn.Identity(), quiet, y)[0].item(), 2)  # the cross entropy
        5.01
        >>> loss(nn.Identity(), noisy, y)[0].item() < 1  # doubt makes the error cheaper
        True
    """

    num_draws: int = 50
    ignore_index: int = -100
    weight: Tensor | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.num_draws < 1:
            raise ValueError(f"num_draws must be at least 1; got {self.num_draws}.")
        _check(self.weight)

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss ``()`` [nats] and the averaged log-probabilities ``(N, C, *positions)``.

        Args:
            model: Gives mean and noise of every logit, ``(N, 2, C, *positions)``.
            inputs: ``(N, ...)``.
            targets: Class indices ``(N, *positions)``, or ``ignore_index``.

        Raises:
            ShapeError: If the output has another shape.
        """
        log_probs = noisy_log_probs(model(inputs), self.num_draws, self.generator)
        return _mean_nll(log_probs, targets, self.ignore_index, self.weight), log_probs
