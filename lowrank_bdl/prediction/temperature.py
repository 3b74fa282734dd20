"""Temperature scaling: probabilities made softer or sharper by one number, fitted on held-out data."""

import math

import torch
from torch import Tensor

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.devices import to_float64
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.parameters.likelihoods import IGNORED
from lowrank_bdl.prediction.metrics import checked_probabilities, checked_targets
from lowrank_bdl.prediction.predictive import Predictive

_TOLERANCE = 1e-10  # of log T
_MAX_STEPS = 200  # bisection alone needs 37 from the widest default bracket


def _require_positive(temperature: float) -> float:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite; got {temperature}.")
    return float(temperature)


def _log(probabilities: Tensor) -> Tensor:
    """Logarithms in float64; what underflowed to 0 counts as the smallest normal number of its dtype."""
    floor = torch.finfo(probabilities.dtype).tiny
    return to_float64(probabilities.detach()).clamp(min=floor).log()


def _pair(given: "Tensor | Predictive", targets: Tensor | None) -> tuple[Tensor, Tensor]:
    if isinstance(given, Predictive):
        if targets is not None:
            raise TypeError("targets must be left out with a Predictive, which has its own.")
        probabilities, targets = given.class_probabilities, given.targets
    else:
        probabilities = given
    if targets is None:
        raise ShapeError("targets must be given: class indices of shape (...), or a Predictive with targets.")
    return probabilities, targets


@exact_methods
class TemperatureScaling:
    r"""Probabilities at another temperature, :math:`p_T(c) = p(c)^{1/T} / \sum_{c'} p(c')^{1/T}`.

    T > 1 makes them softer, T < 1 sharper; the most probable class stays. For one network this divides its logits by
    T; for a model average it acts on the mean of the probabilities. Fit it on data that nothing was trained on.

    Args:
        temperature: T > 0; 1 leaves probabilities as they are.

    Attributes:
        converged: Whether the last :meth:`fit` found a minimum inside its bounds; True before any fit.

    Raises:
        ValueError: If the temperature is not > 0.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (2017), eq. 9.

    Example:
        >>> TemperatureScaling(2.0)(torch.tensor([[0.8, 0.2]]))
        tensor([[0.6667, 0.3333]])
        >>> right = torch.tensor([[0.8, 0.2]]).expand(100, 2)
        >>> targets = torch.tensor([0] * 68 + [1] * 32)
        >>> round(TemperatureScaling().fit(right, targets).temperature, 3)
        1.839
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self._temperature = _require_positive(temperature)
        self.converged = True

    @property
    def temperature(self) -> float:
        """T."""
        return self._temperature

    def __repr__(self) -> str:
        """Name the temperature."""
        return f"TemperatureScaling(temperature={self._temperature!r})"

    def __call__(self, probabilities: "Tensor | Predictive") -> Tensor:
        """Scale probabilities.

        Args:
            probabilities: Shape ``(..., C)`` with the classes last, or a
                :class:`~lowrank_bdl.prediction.predictive.Predictive` of classes, whose ``mean`` is meant.

        Returns:
            Probabilities of the same shape and dtype, computed in float64.

        Raises:
            ShapeError: If rows are not probabilities.
            NonFiniteError: If one is NaN or infinite.

        Cost: O(N C).
        """
        if isinstance(probabilities, Predictive):
            probabilities = probabilities.class_probabilities
        checked_probabilities(probabilities)
        scaled: Tensor = (_log(probabilities) / self._temperature).softmax(-1)
        return scaled.to(probabilities.dtype)

    def log_likelihood(self, probabilities: "Tensor | Predictive", targets: Tensor | None = None) -> Tensor:
        """Log-probability of each target at this temperature.

        Finite also where ``self(probabilities)`` underflows.

        Args:
            probabilities: Shape ``(..., C)``, or a :class:`~lowrank_bdl.prediction.predictive.Predictive` of classes.
            targets: Class indices of shape ``(...)``; left out with a Predictive, which has its own.

        Returns:
            Shape ``(...)``, in the dtype of the probabilities [nats].

        Raises:
            ShapeError: If shapes or classes do not fit, targets are missing, or rows are not probabilities.
            NonFiniteError: If a probability is NaN or infinite.

        Cost: O(N C).
        """
        probabilities, targets = _pair(probabilities, targets)
        checked_targets(probabilities, targets)
        logs = (_log(probabilities) / self._temperature).log_softmax(-1)
        return logs.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1).to(probabilities.dtype)

    def fit(
        self,
        probabilities: "Tensor | Predictive",
        targets: Tensor | None = None,
        *,
        bounds: tuple[float, float] = (0.01, 100.0),
    ) -> "TemperatureScaling":
        r"""Choose the temperature that minimises the mean negative log-likelihood.

        With :math:`z = \log p` the loss is convex in :math:`a = 1/T`, so its slope
        :math:`g(a) = \mathrm{mean}(E_{p_T}[z] - z_y)` has one sign change; that is found between ``bounds`` on the
        scale of log T by Newton steps, kept inside a bracket that shrinks at every step.

        Where the loss has no minimum inside (every target is the most probable class: T to 0; probabilities that are
        worse than even odds: T to infinity), the temperature is the better bound and :attr:`converged` is False.

        Args:
            probabilities: Of held-out examples, shape ``(..., C)``; or a
                :class:`~lowrank_bdl.prediction.predictive.Predictive` of classes.
            targets: Class indices of shape ``(...)``; left out with a Predictive, which has its own. Those of -100
                count nowhere.
            bounds: Smallest and largest temperature.

        Returns:
            This object.

        Raises:
            ShapeError: If shapes or classes do not fit, targets are missing, or rows are not probabilities.
            NonFiniteError: If a probability is NaN or infinite.
            ValueError: If the bounds are not 0 < low < high.

        Cost: about ten evaluations, O(N C) each, in float64.
        """
        if not 0 < bounds[0] < bounds[1] < math.inf:
            raise ValueError(f"bounds must be 0 < low < high < infinity; got {bounds}.")
        probabilities, targets = _pair(probabilities, targets)
        if (ignored := targets == IGNORED).any():
            probabilities, targets = probabilities[~ignored.to(probabilities.device)], targets[~ignored]
        _, classes = checked_targets(probabilities, targets)
        logs = _log(probabilities).flatten(0, -2)
        logs = logs - logs.gather(1, classes.unsqueeze(1))  # the loss is the mean of logsumexp(a * logs)
        self._temperature, self.converged = _minimise(logs, *bounds)
        return self


def _slope(logs: Tensor, log_temperature: float) -> tuple[float, float]:
    """First and second derivative of mean logsumexp(logs / T) in log T."""
    scaled = logs / math.exp(log_temperature)
    weights = scaled.softmax(1)
    first = (weights * scaled).sum(1)
    second = (weights * scaled.square()).sum(1) - first.square()
    return -first.mean().item(), (first + second).mean().item()


def _minimise(logs: Tensor, low: float, high: float) -> tuple[float, bool]:
    """Temperature in [low, high] where the loss is least, and whether its slope is zero there."""
    left, right = math.log(low), math.log(high)
    at = min(max(0.0, left), right)
    slopes = [_slope(logs, end)[0] for end in (left, right)]
    if slopes == [0.0, 0.0]:  # all classes are equally probable
        return math.exp(at), False
    if slopes[0] >= 0:
        return low, False
    if slopes[1] <= 0:
        return high, False
    for _ in range(_MAX_STEPS):
        slope, curvature = _slope(logs, at)
        if slope > 0:
            right = at
        else:
            left = at
        newton = at - slope / curvature if curvature > 0 else math.inf
        new = newton if left < newton < right else 0.5 * (left + right)
        if abs(new - at) < _TOLERANCE or right - left < _TOLERANCE:
            return math.exp(new), True
        at = new
    return math.exp(at), right - left < _TOLERANCE
