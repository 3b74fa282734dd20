"""Running averages of predictive distributions over weight samples."""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Normal

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.devices import sums_device, to_float64
from lowrank_bdl.parameters.likelihoods import IGNORED, align_targets, base_distribution
from lowrank_bdl.prediction.predictive import Predictive

Parts: TypeAlias = "dict[str, Tensor | None]"  # the fields of Predictive for one batch


def _expected_value(distribution: Distribution) -> Tensor:
    base = base_distribution(distribution)
    if isinstance(base, Categorical):  # its own mean is NaN
        probs: Tensor = base.probs
        return probs
    mean: Tensor = distribution.mean
    return mean


def _entropy(kind: type[Distribution], mean: Tensor, variance: Tensor | None) -> Tensor | None:
    """Entropy of each value, in float64 from a law's mean and variance where these say it all.

    The same function for every sample and for their mixture: it is concave, so the mutual information is not negative.
    """
    if issubclass(kind, Categorical):
        entropy: Tensor = torch.special.entr(mean).sum(-1)
        return entropy
    if issubclass(kind, Bernoulli):
        entropy = torch.special.entr(mean) + torch.special.entr((1 - mean).clamp(min=0.0))  # 1 - p may be -1e-16
        return entropy
    if issubclass(kind, Normal) and variance is not None:
        return 0.5 * (2 * math.pi * math.e * variance).log()
    return None


def _own_entropy(distribution: Distribution) -> Tensor | None:
    try:
        entropy: Tensor = to_float64(distribution.entropy())
        return entropy
    except NotImplementedError:
        return None


class BatchAverage:
    """Averages over the weight samples for one batch; sums are in float64.

    Args:
        number: The batch's number, for messages.
        targets: Its targets, or None.
        keep: Keep every sample's mean.
    """

    def __init__(self, number: int, targets: Tensor | None, keep: bool) -> None:
        self._number = number
        self._targets = targets
        self._keep = keep
        self._counted: Tensor | None = None  # which classes are not ignored
        self._count = 0
        self._unusable: list[Tensor] = []
        self._entropies: list[Tensor | None] = []
        self._log_likelihoods: list[Tensor] = []
        self._means: list[Tensor] = []

    def add(self, distribution: Distribution) -> None:
        """Take in the predictive distribution of the next sample.

        Args:
            distribution: Of the batch's targets, one row an example.

        Raises:
            ShapeError: If the targets do not fit, or the shape is not the one of the samples before.
        """
        mean = _expected_value(distribution)
        if self._count == 0:
            self._start(distribution, mean)
        if mean.shape != self._mean.shape:
            raise ShapeError(
                f"Every sample's prediction must have shape {tuple(self._mean.shape)}; got {tuple(mean.shape)}."
            )
        self._count += 1
        exact, variance = to_float64(mean), None
        unusable = exact.isnan().any()
        delta = exact - self._mean
        self._mean += delta / self._count
        if self._is_numeric:
            variance = to_float64(distribution.variance)
            if issubclass(self._kind, Normal):
                unusable = unusable | ~(variance > 0).all()
            self._sum_sq += delta * (exact - self._mean)
            self._variance += (variance - self._variance) / self._count
        entropy = self._per_example(_entropy(self._kind, exact, variance))
        self._entropies.append(_own_entropy(distribution) if entropy is None else entropy)
        if self._targets is not None:
            values = distribution.log_prob(self._targets)
            self._log_likelihoods.append(values if self._counted is None else values.where(self._counted, 0.0))
        if self._keep:
            self._means.append(mean)
        self._unusable.append(unusable)

    def _start(self, distribution: Distribution, mean: Tensor) -> None:
        base = base_distribution(distribution)
        self._kind = type(base)
        self._is_numeric = not isinstance(base, Categorical)
        self._batch_ndim = len(distribution.batch_shape)
        self._dtype, self._device = mean.dtype, mean.device
        self._mean = torch.zeros(mean.shape, dtype=torch.float64, device=sums_device(mean.device))
        if self._is_numeric:
            self._sum_sq = torch.zeros_like(self._mean)
            self._variance = torch.zeros_like(self._mean)
        if self._targets is not None:
            targets = self._targets
            integer = not targets.is_floating_point() and not targets.is_complex()
            if isinstance(distribution, Categorical) and integer:  # of several together, none can be left out
                self._counted = targets != IGNORED
                targets = targets.where(self._counted, 0)
            self._targets = align_targets(distribution, targets)

    def _per_example(self, entropy: Tensor | None) -> Tensor | None:
        if entropy is None or entropy.ndim == self._batch_ndim:
            return entropy
        return entropy.flatten(self._batch_ndim).sum(-1)

    def finish(self) -> Parts:
        """Check the batch, once after its last sample so that a device is asked for one answer only, and average.

        Returns:
            The fields of :class:`~lowrank_bdl.prediction.predictive.Predictive` for this batch.

        Raises:
            NonFiniteError: If a mean is NaN or a Gaussian's variance is not > 0; names the first such sample.
        """
        unusable = torch.stack(self._unusable)
        if bool(unusable.any()):
            raise NonFiniteError(
                "Predictions must not be NaN and variances must be > 0; "
                f"got others from sample {int(unusable.int().argmax())} in batch {self._number}."
            )
        variance = self._variance + self._sum_sq / self._count if self._is_numeric else None
        entropy = self._per_example(_entropy(self._kind, self._mean, variance))
        entropies = [each for each in self._entropies if each is not None]
        expected = torch.stack(entropies).mean(0) if entropies else None
        sums: Parts = {
            "mean": self._mean,
            "epistemic_variance": self._sum_sq / self._count if self._is_numeric else None,
            "aleatoric_variance": self._variance if self._is_numeric else None,
            "entropy": entropy,
            "expected_entropy": expected,
            "mutual_information": None if entropy is None or expected is None else entropy - expected,
        }
        return {
            name: None if value is None else value.to(self._device, self._dtype) for name, value in sums.items()
        } | {
            "sample_log_likelihood": torch.stack(self._log_likelihoods) if self._log_likelihoods else None,
            "sample_means": torch.stack(self._means) if self._means else None,
            "targets": self._targets
            if self._counted is None or self._targets is None
            else self._targets.where(self._counted, IGNORED),
        }


def join(parts: Sequence[Parts], num_samples: int) -> Predictive:
    """Put batches together.

    Args:
        parts: One for each batch, at least one.
        num_samples: S.

    Returns:
        The predictive of all examples, in the order of the batches.

    Raises:
        ShapeError: If batches disagree about the shape of a prediction, or some have targets and some have none.
    """
    joined: Parts = {}
    for name in (field.name for field in fields(Predictive) if field.name != "num_samples"):
        pieces = [part[name] for part in parts]
        tensors = [piece for piece in pieces if piece is not None]
        if 0 < len(tensors) < len(pieces):
            raise ShapeError(
                f"Either all batches must have {name} or none; got it from {len(tensors)} of {len(pieces)}."
            )
        axis = 1 if name.startswith("sample_") else 0
        shapes = sorted({tuple(tensor.shape[:axis] + tensor.shape[axis + 1 :]) for tensor in tensors})
        if len(shapes) > 1:
            raise ShapeError(f"Every batch must give {name} of one shape an example; got {shapes}.")
        joined[name] = torch.cat(tensors, axis) if tensors else None
    mean = joined.pop("mean")
    if mean is None:
        raise ShapeError("At least one batch is needed; got none.")
    return Predictive(mean=mean, num_samples=num_samples, **joined)
