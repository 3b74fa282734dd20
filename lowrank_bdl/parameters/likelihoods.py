"""Likelihoods p(y | f): maps from network outputs to torch distributions.

A likelihood is any callable that takes what the network (or ``call_fn``) returns for a batch and gives a
``torch.distributions.Distribution`` of the targets, one row an example.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal
from torch.nn.functional import softplus

from lowrank_bdl.errors import ShapeError

Likelihood: TypeAlias = Callable[[Any], Distribution]

IGNORED = -100
"""The class of targets that count nowhere, torch's own default of ``ignore_index``."""


def examples_with_any(kept: Tensor) -> Tensor:
    """Return how many rows of flags ``(N, *positions)`` hold a True, without waiting for a device.

    Example:
        >>> examples_with_any(torch.tensor([[True, False], [False, False]]))
        tensor(1)
    """
    return kept.flatten(1).any(1).sum() if kept.ndim > 1 else kept.sum()


def _at_least_single(tensor: Tensor) -> Tensor:
    """Half-precision logits would lose the tails of a log-softmax."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _require_tensor(outputs: Any, expected: str) -> Tensor:
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        got = f"dtype {outputs.dtype}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ShapeError(f"The network's output must be {expected}; got {got}. Pass call_fn to pick it.")
    return outputs


@dataclass(frozen=True)
class CategoricalLikelihood:
    r"""Classification: :math:`p(y = c \mid f) = \mathrm{softmax}(f)_c`.

    Example:
        >>> CategoricalLikelihood()(torch.tensor([[0.0, 0.0]], dtype=torch.float16)).probs
        tensor([[0.5000, 0.5000]])
    """

    def __call__(self, outputs: Any) -> Distribution:
        """Give the distribution of the class.

        Args:
            outputs: Logits, shape ``(N, C)`` or, for dense prediction, ``(N, C, *positions)``; half precision is raised
                to float32 first.

        Returns:
            A categorical distribution of batch shape ``(N, *positions)``; its ``probs`` have the classes last.

        Raises:
            ShapeError: If the outputs are not a floating-point tensor with at least two axes and two classes.
        """
        logits = _at_least_single(_require_tensor(outputs, "logits of shape (N, C)"))
        if logits.ndim < 2 or logits.shape[1] < 2:
            raise ShapeError(
                "Logits must have shape (N, C) or (N, C, *positions) with at least 2 classes; "
                f"got {tuple(logits.shape)}. For one logit pass likelihood='bernoulli'."
            )
        return Categorical(logits=logits.movedim(1, -1), validate_args=False)


@dataclass(frozen=True)
class BernoulliLikelihood:
    r"""Yes or no, once or for several labels: :math:`p(y_i = 1 \mid f) = 1 / (1 + e^{-f_i})`, independently.

    Example:
        >>> BernoulliLikelihood()(torch.zeros(2, 3)).log_prob(torch.ones(2, 3))  # -3 log 2
        tensor([-2.0794, -2.0794])
    """

    def __call__(self, outputs: Any) -> Distribution:
        """Give the distribution of the labels.

        Args:
            outputs: One logit for each label, shape ``(N, *S)``; ``(N,)`` is taken as ``(N, 1)``.

        Returns:
            Independent Bernoulli distributions of batch shape ``(N,)``; targets are 0 or 1, or probabilities.

        Raises:
            ShapeError: If the outputs are not a floating-point tensor with at least one axis.
        """
        logits = _at_least_single(_require_tensor(outputs, "logits of shape (N, *labels)"))
        if logits.ndim == 0:
            raise ShapeError("Logits must have shape (N, *labels); got a number without axes.")
        logits = logits.unsqueeze(1) if logits.ndim == 1 else logits
        return Independent(Bernoulli(logits=logits, validate_args=False), logits.ndim - 1, validate_args=False)


@dataclass(frozen=True)
class GaussianLikelihood:
    r"""Regression: :math:`p(y \mid f) = N(y; \mu, \mathrm{diag}(\sigma^2))`, the noise known or predicted.

    Attributes:
        noise_variance: σ² > 0, a number or a tensor that broadcasts to the mean [unit of y, squared]: the network gives
            μ alone. None: the network predicts both, either as a pair ``(mean, variance)`` of equal shapes, the
            variance > 0 and taken as it is (as ``torch.nn.GaussianNLLLoss`` does), or as one tensor ``(N, 2k)``:
            k means, then k numbers whose softplus is the variance.

    Example:
        >>> GaussianLikelihood(0.25)(torch.tensor([[1.0], [2.0]])).stddev.flatten()
        tensor([0.5000, 0.5000])
        >>> GaussianLikelihood()((torch.zeros(3), torch.ones(3))).log_prob(torch.zeros(3, 1))
        tensor([-0.9189, -0.9189, -0.9189])
    """

    noise_variance: "float | Tensor | None" = None

    def __post_init__(self) -> None:
        """Refuse a variance that is not positive."""
        if self.noise_variance is not None and not bool(torch.as_tensor(self.noise_variance > 0).all()):
            raise ValueError(f"noise_variance must be > 0; got {self.noise_variance}.")

    def __call__(self, outputs: Any) -> Distribution:
        """Give the distribution of the targets.

        Args:
            outputs: As said under ``noise_variance``; a mean of shape ``(N,)`` is taken as ``(N, 1)``.

        Returns:
            Independent normals of batch shape ``(N,)`` and event shape ``(k,)``, or all axes of the mean but the first.

        Raises:
            ShapeError: If the outputs do not have that form.
        """
        mean, variance = self._split(outputs)
        if mean.ndim == 1:
            mean, variance = mean.unsqueeze(1), variance.unsqueeze(1) if variance.ndim == 1 else variance
        normal = Normal(mean, variance.sqrt().expand_as(mean), validate_args=False)
        return Independent(normal, mean.ndim - 1, validate_args=False)

    def _split(self, outputs: Any) -> tuple[Tensor, Tensor]:
        if self.noise_variance is not None:
            mean = _at_least_single(_require_tensor(outputs, "the mean, shape (N, k), when noise_variance is given"))
            return mean, torch.as_tensor(self.noise_variance, dtype=mean.dtype, device=mean.device)
        if isinstance(outputs, (tuple, list)):
            if len(outputs) != 2 or outputs[0].shape != outputs[1].shape:
                shapes = [tuple(part.shape) for part in outputs]
                raise ShapeError(f"(mean, variance) must be two tensors of equal shape; got shapes {shapes}.")
            return _at_least_single(outputs[0]), _at_least_single(outputs[1])
        both = _at_least_single(_require_tensor(outputs, "(mean, variance) or one tensor (N, 2k)"))
        if both.ndim != 2 or both.shape[1] % 2:
            raise ShapeError(
                f"Without noise_variance the output must be (mean, variance) or have shape (N, 2k); "
                f"got {tuple(both.shape)}."
            )
        mean, raw = both.chunk(2, dim=1)
        return mean, softplus(raw)


def base_distribution(distribution: Distribution) -> Distribution:
    """Strip ``Independent`` off a distribution.

    Args:
        distribution: Any.

    Returns:
        The distribution of a single value.
    """
    return base_distribution(distribution.base_dist) if isinstance(distribution, Independent) else distribution


def resolve_likelihood(likelihood: "str | Likelihood", noise_variance: "float | Tensor | None" = None) -> Likelihood:
    """Turn what a user writes into a likelihood.

    Args:
        likelihood: ``"categorical"``, ``"bernoulli"``, ``"gaussian"``, or a callable from outputs to a distribution.
        noise_variance: For ``"gaussian"`` only.

    Returns:
        The likelihood.

    Raises:
        ValueError: If the name is unknown, or ``noise_variance`` is given for another likelihood.

    Example:
        >>> resolve_likelihood("gaussian", 0.1)
        GaussianLikelihood(noise_variance=0.1)
    """
    if likelihood == "gaussian":
        return GaussianLikelihood(noise_variance)
    if noise_variance is not None:
        raise ValueError(f"noise_variance goes with likelihood='gaussian'; got likelihood={likelihood!r}.")
    if likelihood == "categorical":
        return CategoricalLikelihood()
    if likelihood == "bernoulli":
        return BernoulliLikelihood()
    if isinstance(likelihood, str) or not callable(likelihood):
        raise ValueError(
            f"likelihood must be 'categorical', 'bernoulli', 'gaussian' or a callable from outputs to a distribution; "
            f"got {likelihood!r}."
        )
    return likelihood


def align_targets(distribution: Distribution, targets: Tensor, deferred: list[Tensor] | None = None) -> Tensor:
    """Bring targets to the shape and dtype of a distribution's values; never broadcasts.

    Args:
        distribution: Of the targets.
        targets: Class indices of shape ``(N, *positions)`` for a categorical distribution; for others the shape of its
            values, of which a last axis of length 1 may be missing.
        deferred: A list that takes the range check of class indices on an accelerator, for :func:`check_deferred` to
            read once at the end; until then classes out of range count as the first. None checks at once, which waits.

    Returns:
        The targets; class indices as int64, others in the distribution's dtype.

    Raises:
        ShapeError: If shape, dtype or the range of class indices is wrong.

    Example:
        >>> align_targets(GaussianLikelihood(1.0)(torch.zeros(2, 1)), torch.tensor([3, 4]))
        tensor([[3.],
                [4.]])
    """
    shape = distribution.batch_shape + distribution.event_shape
    if isinstance(base := base_distribution(distribution), Categorical):
        classes = base.logits.shape[-1]
        if targets.is_floating_point() or targets.is_complex() or targets.shape != shape:
            raise ShapeError(
                f"Targets must be integer class indices of shape {tuple(shape)}; "
                f"got {targets.dtype} of shape {tuple(targets.shape)}."
            )
        if deferred is not None and targets.device.type != "cpu":
            inside = (targets >= 0) & (targets < classes)
            deferred.append(inside.all())
            return torch.where(inside, targets, 0).long()
        if targets.numel() and not bool(((targets >= 0) & (targets < classes)).all()):
            raise ShapeError(
                f"Class indices must be in [0, {classes}); "
                f"got values from {targets.min().item()} to {targets.max().item()}."
            )
        return targets.long()
    if shape[-1:] == (1,) and targets.shape == shape[:-1]:
        targets = targets.unsqueeze(-1)
    if targets.shape != shape:
        raise ShapeError(f"Targets must have the shape of the prediction, {tuple(shape)}; got {tuple(targets.shape)}.")
    if isinstance(base, Bernoulli) and targets.device.type == "cpu":
        if not bool(((targets >= 0) & (targets <= 1)).all()):
            raise ShapeError(
                f"Targets of a Bernoulli distribution must be in [0, 1]; "
                f"got values from {targets.min().item()} to {targets.max().item()}."
            )
    return targets.to(distribution.mean.dtype)


def check_deferred(deferred: list[Tensor]) -> None:
    """Read the checks that :func:`align_targets` put off, in one host synchronisation, and empty the list.

    Raises:
        ShapeError: If a class index was out of range.
    """
    flags, deferred[:] = list(deferred), []
    if flags and not bool(torch.stack(flags).all()):
        raise ShapeError("Class indices must be in [0, number of classes); got some outside.")
