r"""Gradients of the log-likelihood with respect to a network's output, for the labels that define a Fisher matrix.

With :math:`f` the output for one example, the Fisher matrix of the weights is
:math:`\sum_n J_n^\top E[s s^\top] J_n`, :math:`s = \nabla_f \log p(y \mid f)`, and the choice of y is part of its
definition (Kunstner, Balles and Hennig, "Limitations of the empirical Fisher approximation", NeurIPS 2019):

- ``"true"``: y of the data set, the *empirical* Fisher. It is no approximation of the curvature: it vanishes with the
  residuals.
- ``"sampled"``: one draw from the model's own p(y | f) an example, an unbiased estimate of the Fisher.
- ``"expected"``: the expectation itself, from as many vectors as there are outputs. It equals the generalised
  Gauss-Newton matrix of both likelihoods here.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax, one_hot

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.parameters.likelihoods import IGNORED, examples_with_any

Labels: TypeAlias = Literal["true", "sampled", "expected"]
LABELS: tuple[Labels, ...] = ("true", "sampled", "expected")


class OutputLikelihood(Protocol):
    """A log-likelihood of the outputs and its gradients.

    Attributes:
        feature_axis: The axis of the outputs whose entries belong together; others are examples and positions.
    """

    feature_axis: ClassVar[int]

    def check(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return outputs and targets in the form the other methods take; raises ShapeError."""

    def examples(self, targets: Tensor) -> "Tensor | int":
        """Return how many examples of a batch have a target that counts."""

    def any_ignored(self, targets: Tensor) -> bool:
        """Return whether a target does not count: `output_fisher` and `pulled_fisher` do not know of it."""

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of log p(y | f) over a batch, all constants included, as a float64 scalar [nat]."""

    def scores(
        self, outputs: Tensor, targets: Tensor, labels: Labels, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        """Yield gradients s of the outputs' shape: the sum of s s' over them is the E[s s'] of each example."""

    def output_fisher(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum ``(C, C)`` of E[s s'] over outputs ``(N, C)``, and each one's diagonal ``(N, C)``; float64."""

    def pulled_fisher(self, outputs: Tensor, weight: Tensor) -> Tensor:
        """Return W' E[s s'] W ``(N, m, m)`` of each of outputs ``(N, C)``, W being ``(C, m)``; float64."""


def _float_tensor(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise ShapeError(f"The network's output must be one floating-point tensor; got {_describe(outputs)}.")
    return outputs


def _of_one_shape(outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Return outputs and targets of one shape, these in float64; a last axis of length 1 of theirs may be missing."""
    outputs = _float_tensor(outputs)
    shape = outputs.shape
    if isinstance(targets, Tensor) and shape[-1:] == (1,) and targets.shape == shape[:-1]:
        targets = targets.unsqueeze(-1)
    if not isinstance(targets, Tensor) or targets.shape != shape or not shape or targets.is_complex():
        raise ShapeError(f"Targets must have the shape of the output, {tuple(shape)}; got {_describe(targets)}.")
    return outputs, targets.double()


def _describe(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _at_least_single(outputs: Tensor) -> Tensor:
    return outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))


def _random(shape: torch.Size, like: Tensor, generator: torch.Generator | None, normal: bool) -> Tensor:
    """Draw on the generator's own device, so that one generator gives one stream wherever the network is."""
    place = like.device if generator is None else generator.device
    draw = torch.randn if normal else torch.rand
    return draw(shape, dtype=torch.float64, device=place, generator=generator).to(like.device)


@dataclass(frozen=True)
class CategoricalScores:
    r"""Classification by softmax.

    :math:`\nabla_f (-\log p(y \mid f)) = p - e_y` and :math:`E[s s^\top] = \mathrm{diag}(p) - p p^\top`; both are zero
    where the target is -100, which torch's losses ignore.

    Example:
        >>> logits = torch.zeros(1, 2)
        >>> [s.tolist() for s in CategoricalScores().scores(logits, torch.tensor([1]), "true", None)]
        [[[0.5, -0.5]]]
    """

    feature_axis: ClassVar[int] = 1

    def check(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Check logits ``(N, C, *positions)`` and class indices ``(N, *positions)``.

        Args:
            outputs: What the network returns.
            targets: What the loader gives beside the inputs.

        Returns:
            Both, the targets as int64.

        Raises:
            ShapeError: If a shape, a dtype or a class index is wrong.
        """
        outputs = _float_tensor(outputs)
        if outputs.ndim < 2 or outputs.shape[1] < 2:
            raise ShapeError(f"Logits must have shape (N, C, *positions), C >= 2; got {tuple(outputs.shape)}.")
        shape = (outputs.shape[0], *outputs.shape[2:])
        wrong = not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex()
        if wrong or targets.shape != shape:
            raise ShapeError(f"Targets must be integer class indices of shape {shape}; got {_describe(targets)}.")
        inside = (targets >= 0) & (targets < outputs.shape[1]) | (targets == IGNORED)
        if targets.numel() and not bool(inside.all()):
            raise ShapeError(
                f"Class indices must be in [0, {outputs.shape[1]}); "
                f"got values from {targets.min().item()} to {targets.max().item()}."
            )
        return outputs, targets.long()

    def examples(self, targets: Tensor) -> Tensor:
        """Return how many examples have a target that is not ignored."""
        return examples_with_any(targets != IGNORED)

    def any_ignored(self, targets: Tensor) -> bool:
        """Return whether a target is ignored."""
        return bool((targets == IGNORED).any())

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of log p(y | f).

        Args:
            outputs: Logits.
            targets: Class indices.

        Returns:
            A float64 scalar [nat].
        """
        kept = targets != IGNORED
        logs = log_softmax(outputs.detach().double(), dim=1).gather(1, targets.where(kept, 0).unsqueeze(1))
        return logs.squeeze(1).where(kept, 0).sum()

    def scores(
        self, outputs: Tensor, targets: Tensor, labels: Labels, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        """Yield gradients of -log p(y | f): one, or C for each position with ``labels="expected"``.

        Args:
            outputs: Logits.
            targets: Class indices; used with ``labels="true"`` only.
            labels: Which y.
            generator: Source of the sampled classes.

        Yields:
            Tensors of the outputs' shape and dtype.
        """
        probs = _at_least_single(outputs).softmax(1).movedim(1, -1)  # (N, *positions, C)
        classes, kept = probs.shape[-1], targets != IGNORED
        if labels != "expected":
            chosen = targets.where(kept, 0) if labels == "true" else self._draw(probs, generator)
            score = (probs - one_hot(chosen, classes)) * kept.unsqueeze(-1)
            yield score.movedim(-1, 1).to(outputs.dtype)
            return
        probs = probs * kept.unsqueeze(-1)
        flat = probs.flatten(1, -2) if probs.ndim > 2 else probs.unsqueeze(1)  # (N, positions, C)
        for position in range(flat.shape[1]):
            for number in range(classes):  # sum over c of p_c (p - e_c)(p - e_c)' = diag(p) - p p'
                score = torch.zeros_like(flat)
                score[:, position] = flat[:, position]
                score[:, position, number] -= 1  # where p is zero, that of an ignored target, so is its weight
                score[:, position] *= flat[:, position, number, None].sqrt()
                yield score.view(probs.shape).movedim(-1, 1).to(outputs.dtype)

    def output_fisher(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of diag(p) - p p' over a batch, and the diagonal of each.

        Args:
            outputs: Logits ``(N, C)``.

        Returns:
            ``(C, C)`` and ``(N, C)``, both float64.
        """
        probs = outputs.detach().double().softmax(1)
        return probs.sum(0).diag() - probs.mT @ probs, probs * (1 - probs)

    def pulled_fisher(self, outputs: Tensor, weight: Tensor) -> Tensor:
        """Return W' (diag(p) - p p') W of each example: the covariance of the rows of W under p.

        Args:
            outputs: Logits ``(N, C)``.
            weight: W, shape ``(C, m)``.

        Returns:
            Shape ``(N, m, m)``, float64.

        Cost: N·C·m numbers, and m times as many operations.
        """
        probs, rows = outputs.detach().double().softmax(1), weight.detach().double()
        centred = (rows - (probs @ rows).unsqueeze(1)) * probs.sqrt().unsqueeze(-1)
        return centred.mT @ centred

    @staticmethod
    def _draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw classes by inverting the distribution function in float64."""
        cumulative = probs.double().cumsum(-1)
        uniform = _random(probs.shape[:-1], probs, generator, normal=False).unsqueeze(-1)
        return (cumulative[..., :-1] <= uniform * cumulative[..., -1:]).sum(-1)


class _IndependentScores(ABC):
    """Labels that are independent of one another, one for each output; every target counts."""

    feature_axis: ClassVar[int] = -1

    def examples(self, targets: Tensor) -> int:
        """Return the number of examples: every target counts."""
        return len(targets)

    def any_ignored(self, targets: Tensor) -> bool:
        """Return whether a target does not count: none."""
        return False

    def scores(
        self, outputs: Tensor, targets: Tensor, labels: Labels, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        """Yield gradients of -log p(y | f): one, or one for each output with ``labels="expected"``.

        Args:
            outputs: Of the network.
            targets: Targets; used with ``labels="true"`` only.
            labels: Which y.
            generator: Source of the sampled labels.

        Yields:
            Tensors of the outputs' shape and dtype.
        """
        if labels == "true":
            yield self._true(outputs, targets).to(outputs.dtype)
        elif labels == "sampled":
            yield self._sampled(outputs, generator).to(outputs.dtype)
        else:
            size = outputs.shape[1:].numel()
            deviations = self._deviations(outputs).to(outputs.dtype).reshape(len(outputs), size)
            for number in range(size):
                score = torch.zeros_like(deviations)
                score[:, number] = deviations[:, number]
                yield score.view(outputs.shape)

    @abstractmethod
    def _true(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the gradients for given labels."""

    @abstractmethod
    def _sampled(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the gradients for labels drawn from p(y | f)."""

    @abstractmethod
    def _deviations(self, outputs: Tensor) -> Tensor:
        """Return the standard deviation of each gradient under p(y | f)."""


@dataclass(frozen=True)
class GaussianScores(_IndependentScores):
    r"""Regression with known noise.

    :math:`\nabla_f (-\log p(y \mid f)) = (f - y) / \sigma^2` and :math:`E[s s^\top] = I / \sigma^2`.

    Attributes:
        noise_variance: :math:`\sigma^2 > 0` [unit of y, squared].

    Example:
        >>> rule = GaussianScores(0.5)
        >>> [s.tolist() for s in rule.scores(torch.tensor([[1.0]]), torch.tensor([[3.0]]), "true", None)]
        [[[-4.0]]]
    """

    noise_variance: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a variance that is not a positive number."""
        if not 0 < self.noise_variance < math.inf:
            raise ValueError(f"noise_variance must be a positive number; got {self.noise_variance}.")

    def check(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Check means ``(N, *S)`` and targets of the same shape, of which a last axis of length 1 may be missing.

        Args:
            outputs: What the network returns.
            targets: What the loader gives beside the inputs.

        Returns:
            Both, of one shape; the targets in float64.

        Raises:
            ShapeError: If the shapes do not agree; nothing is broadcast.
        """
        return _of_one_shape(outputs, targets)

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of log N(y; f, sigma^2).

        Args:
            outputs: Means.
            targets: Targets.

        Returns:
            A float64 scalar [nat].
        """
        squares = (outputs.detach().double() - targets).square().sum() / self.noise_variance
        return -0.5 * (squares + targets.numel() * math.log(2 * math.pi * self.noise_variance))

    def _true(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.detach().double() - targets) / self.noise_variance

    def _sampled(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return _random(outputs.shape, outputs, generator, normal=True) / math.sqrt(self.noise_variance)

    def _deviations(self, outputs: Tensor) -> Tensor:
        return torch.full_like(outputs, 1 / math.sqrt(self.noise_variance), requires_grad=False)

    def output_fisher(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return N I / sigma^2, and the diagonal of I / sigma^2 for each example.

        Args:
            outputs: Means ``(N, C)``.

        Returns:
            ``(C, C)`` and ``(N, C)``, both float64.
        """
        diagonal = torch.full_like(outputs, 1 / self.noise_variance, dtype=torch.float64, requires_grad=False)
        return diagonal.sum(0).diag(), diagonal

    def pulled_fisher(self, outputs: Tensor, weight: Tensor) -> Tensor:
        """Return W'W / sigma^2, the same for each example.

        Args:
            outputs: Means ``(N, C)``.
            weight: W, shape ``(C, m)``.

        Returns:
            Shape ``(N, m, m)``, float64.
        """
        rows = weight.detach().double()
        return (rows.mT @ rows / self.noise_variance).expand(len(outputs), -1, -1)


@dataclass(frozen=True)
class BernoulliScores(_IndependentScores):
    r"""Yes or no, for one label or several independent ones, from their logits.

    :math:`\nabla_f (-\log p(y \mid f)) = p - y` and :math:`E[s s^\top] = \mathrm{diag}(p (1 - p))`,
    :math:`p = 1 / (1 + e^{-f})`.

    Example:
        >>> rule = BernoulliScores()
        >>> [s.tolist() for s in rule.scores(torch.zeros(1, 1), torch.ones(1, 1), "true", None)]
        [[[-0.5]]]
    """

    def check(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Check logits ``(N, *S)`` and targets of the same shape, of which a last axis of length 1 may be missing.

        Args:
            outputs: What the network returns.
            targets: What the loader gives beside the inputs: 0 or 1, or probabilities.

        Returns:
            Both, of one shape; the targets in float64.

        Raises:
            ShapeError: If the shapes do not agree, or a target is outside [0, 1].
        """
        outputs, targets = _of_one_shape(outputs, targets)
        if targets.numel() and not bool(((targets >= 0) & (targets <= 1)).all()):
            raise ShapeError(
                "Targets of a Bernoulli distribution must be in [0, 1]; "
                f"got values from {targets.min().item():g} to {targets.max().item():g}."
            )
        return outputs, targets

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of y log p + (1 - y) log(1 - p).

        Args:
            outputs: Logits.
            targets: Targets.

        Returns:
            A float64 scalar [nat].
        """
        return -binary_cross_entropy_with_logits(outputs.detach().double(), targets, reduction="sum")

    def _true(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.detach().double().sigmoid() - targets

    def _sampled(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        probs = outputs.detach().double().sigmoid()
        return probs - (_random(outputs.shape, outputs, generator, normal=False) < probs).double()

    def _deviations(self, outputs: Tensor) -> Tensor:
        return self.variance(outputs).sqrt()

    def output_fisher(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of diag(p (1 - p)) over a batch, and the diagonal of each.

        Args:
            outputs: Logits ``(N, C)``.

        Returns:
            ``(C, C)`` and ``(N, C)``, both float64.
        """
        diagonal = self.variance(outputs)
        return diagonal.sum(0).diag(), diagonal

    def pulled_fisher(self, outputs: Tensor, weight: Tensor) -> Tensor:
        """Return W' diag(p (1 - p)) W of each example.

        Args:
            outputs: Logits ``(N, C)``.
            weight: W, shape ``(C, m)``.

        Returns:
            Shape ``(N, m, m)``, float64.
        """
        rows = weight.detach().double()
        return (rows * self.variance(outputs).unsqueeze(-1)).mT @ rows

    @staticmethod
    def variance(outputs: Tensor) -> Tensor:
        """Return p (1 - p) of logits of any shape, float64."""
        logits = outputs.detach().double()
        return logits.sigmoid() * (-logits).sigmoid()


def resolve_scores(likelihood: str, noise_variance: float) -> OutputLikelihood:
    """Turn what a user writes into a likelihood.

    Args:
        likelihood: ``"categorical"``, ``"bernoulli"`` or ``"gaussian"``.
        noise_variance: For ``"gaussian"``; 1 otherwise.

    Returns:
        The likelihood.

    Raises:
        ValueError: If the name is unknown, the variance not positive, or given for another likelihood.

    Example:
        >>> resolve_scores("gaussian", 0.25)
        GaussianScores(noise_variance=0.25)
    """
    if likelihood == "gaussian":
        return GaussianScores(noise_variance)
    if likelihood not in ("categorical", "bernoulli"):
        raise ValueError(f"likelihood must be 'categorical', 'bernoulli' or 'gaussian'; got {likelihood!r}.")
    if noise_variance != 1.0:
        raise ValueError(f"noise_variance goes with likelihood='gaussian'; got {noise_variance} for {likelihood!r}.")
    return CategoricalScores() if likelihood == "categorical" else BernoulliScores()
