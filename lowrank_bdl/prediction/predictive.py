"""What a model average predicts, and how sure of it the samples are."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_bdl.errors import LowRankBDLError
from lowrank_bdl.linalg.devices import sums_device, to_float64
from lowrank_bdl.parameters.likelihoods import IGNORED
from lowrank_bdl.prediction import metrics


@dataclass(frozen=True, repr=False)
class Predictive:
    r"""Predictions averaged over S weight samples, :math:`p(y \mid x) = \frac1S \sum_s p(y \mid x, \theta_s)`.

    Entropies are in nats. Fields that the likelihood or the data do not define are None.

    Attributes:
        mean: Mean of p(y | x): class probabilities ``(N, C)`` (``(N, *positions, C)`` for dense prediction), or the
            mean of the targets ``(N, k)`` [unit of y].
        epistemic_variance: Variance over samples of their means, ``(N, k)`` [unit of y, squared]; None for classes.
        aleatoric_variance: Mean over samples of their variances, ``(N, k)`` [unit of y, squared]; None for classes.
        entropy: Entropy of p(y | x), ``(N,)``. For Gaussians that of the Gaussian with the mixture's mean and
            variances, which is an upper bound: the mixture's own has no closed form.
        expected_entropy: Mean over samples of the entropy of p(y | x, θ_s), ``(N,)``.
        mutual_information: Between y and θ, entropy − expected entropy, ``(N,)``; for Gaussians an upper bound.
        sample_log_likelihood: log p(y_n | x_n, θ_s), ``(S, N)``, 0 for ignored classes; None without labels.
        targets: The labels ``(N,)`` or ``(N, k)``; None without labels. Classes of -100 are ignored: they count in
            no metric.
        sample_means: Class probabilities, or means, of every sample, ``(S, N, C)``; None unless asked for.
        num_samples: S.
    """

    mean: Tensor
    epistemic_variance: Tensor | None
    aleatoric_variance: Tensor | None
    entropy: Tensor | None
    expected_entropy: Tensor | None
    mutual_information: Tensor | None
    sample_log_likelihood: Tensor | None
    targets: Tensor | None
    sample_means: Tensor | None
    num_samples: int

    def __repr__(self) -> str:
        """Return three lines: what it holds, in shapes, and not the numbers themselves."""
        kind = "class probabilities" if self.epistemic_variance is None else "numeric targets"
        held = [name for name, value in vars(self).items() if isinstance(value, Tensor)]
        return (
            f"Predictive({kind}, num_samples={self.num_samples}, mean={tuple(self.mean.shape)} {self.mean.dtype},\n"
            f"           targets={None if self.targets is None else tuple(self.targets.shape)}, {self.mean.device},\n"
            f"           holds {', '.join(held)})"
        )

    def _labelled(self) -> tuple[Tensor, Tensor]:
        if self.targets is None or self.sample_log_likelihood is None:
            raise LowRankBDLError("This needs targets; the loader gave none.")
        return self.targets, self.sample_log_likelihood

    def _counted_log_likelihood(self, values: Tensor) -> Tensor:
        """Return the mean over the last axis of log-likelihoods, 0 where ignored, of the targets that count."""
        targets, per_sample = self._labelled()
        if self.epistemic_variance is not None or targets.shape != per_sample.shape[1:]:
            return values.mean(-1)
        return values.sum(-1) / (targets != IGNORED).sum().to(values.device)

    def _counted_classes(self) -> tuple[Tensor, Tensor]:
        probabilities, targets = self.class_probabilities, self._labelled()[0]
        counted = targets != IGNORED
        return probabilities[counted], targets[counted]

    @property
    def variance(self) -> Tensor:
        """Variance of p(y | x), exact for the mixture: aleatoric plus epistemic, ``(N, k)`` [unit of y, squared]."""
        if self.epistemic_variance is None or self.aleatoric_variance is None:
            raise LowRankBDLError("The variance is of numeric targets; these are classes: see entropy.")
        return self.aleatoric_variance + self.epistemic_variance

    @property
    def log_likelihood(self) -> Tensor:
        """Log of the mean likelihood, log p(y_n | x_n) of the mixture itself, ``(N,)`` [nats]; no mean of logs."""
        _, per_sample = self._labelled()
        mixture: Tensor = to_float64(per_sample).logsumexp(0) - math.log(self.num_samples)
        return mixture.to(per_sample.dtype)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the mixture per example [nats]."""
        return -self._counted_log_likelihood(to_float64(self.log_likelihood).flatten()).item()

    @property
    def nll_by_num_samples(self) -> Tensor:
        """The nll of the first 1, 2, ..., S samples, ``(S,)`` float64 [nats]."""
        _, per_sample = self._labelled()
        sizes = torch.arange(1, self.num_samples + 1, dtype=torch.float64, device=sums_device(per_sample.device))
        mixtures = to_float64(per_sample).flatten(1).logcumsumexp(0) - sizes.log().unsqueeze(-1)
        return -self._counted_log_likelihood(mixtures)

    @property
    def class_probabilities(self) -> Tensor:
        """The mean where it is of class probabilities, ``(N, C)``; an error for numeric targets."""
        if self.epistemic_variance is not None:
            raise LowRankBDLError("This needs class probabilities; the likelihood is a numeric one.")
        return self.mean

    @property
    def predicted_class(self) -> Tensor:
        """Most probable class, ``(N,)``."""
        return self.class_probabilities.argmax(-1)

    @property
    def accuracy(self) -> float:
        """Fraction of examples whose most probable class is the target."""
        return metrics.accuracy(*self._counted_classes())

    @property
    def brier(self) -> float:
        """Brier score, in [0, 2]; see :func:`~lowrank_bdl.prediction.metrics.brier`."""
        return metrics.brier(*self._counted_classes())

    def reliability_curve(self, num_bins: int = 15, binning: str = "width") -> metrics.ReliabilityCurve:
        """Confidence against accuracy, and its expected calibration error as ``.ece``.

        Args:
            num_bins: Number of bins.
            binning: ``"width"`` or ``"mass"``; see :func:`~lowrank_bdl.prediction.metrics.reliability_curve`.

        Returns:
            The curve.

        Raises:
            LowRankBDLError: Without targets or class probabilities.
        """
        return metrics.reliability_curve(*self._counted_classes(), num_bins, binning)
