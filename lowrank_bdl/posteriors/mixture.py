r"""Mixtures of posteriors: MultiSWAG with its exact density.

Wilson and Izmailov, "Bayesian Deep Learning and a Probabilistic Perspective of Generalization" (NeurIPS 2020), section
4: a Gaussian around each of several independently found solutions. No evidence is needed for equal weights.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.devices import generator_on, sums_device, to_float64
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.linalg.transforms import transformed
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.selection import Selector
from lowrank_bdl.posteriors.gaussian import sample_size
from lowrank_bdl.posteriors.parts import COMPONENT, Component, means_of
from lowrank_bdl.posteriors.storage import StoredPosterior, join_states, layout_difference, required, split_states


@exact_methods
class MixturePosterior(StoredPosterior, kind="mixture posterior"):
    r"""The mixture :math:`p(\theta) = \sum_m w_m p_m(\theta)` of posteriors over the same weights.

    With SWAG posteriors of independent runs this is MultiSWAG; a component that is itself a mixture is taken apart.

    Args:
        components: M posteriors :math:`p_m` with ``mean``, ``stddev``, ``sample`` and ``log_prob``, over the same
            parameters.
        weights: M relative weights >= 0, normalised to sum to 1; None weighs all alike.
        provenance: Where it came from, as JSON scalars by name.

    Attributes:
        components: The M posteriors.
        weights: :math:`w`, shape ``(M,)``, float64.
        layout: That of the components.
        provenance: As given; saved with the posterior.

    Raises:
        ShapeError: If there is no component, or they are over different parameters.
        TypeError: If a component has no density, or dtypes or devices differ.
        ValueError: If a weight is negative or not finite, or all are zero.

    Example:
        >>> from lowrank_bdl.posteriors.gaussian import GaussianPosterior
        >>> left, right = (GaussianPosterior.diagonal(torch.tensor([m]), torch.tensor([1.0])) for m in (-2.0, 2.0))
        >>> mixture = MixturePosterior([left, right], weights=[1, 3])
        >>> mixture.weights.tolist(), mixture.mean, mixture.stddev
        ([0.25, 0.75], tensor([1.]), tensor([2.]))
        >>> round(mixture.log_prob(torch.tensor([2.0])).exp().item(), 4)
        0.2992
        >>> [mixture.component_of(s) for s in range(8)]
        [1, 0, 1, 1, 1, 0, 1, 1]
    """

    def __init__(
        self,
        components: Sequence[Component],
        weights: Sequence[float] | Tensor | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        if not components:
            raise ShapeError("a mixture needs at least 1 component; got none.")
        means = means_of(components, "component", COMPONENT)
        if any(mean.shape != means[0].shape for mean in means):
            raise ShapeError(f"components must have one length D; got {[mean.numel() for mean in means]}.")
        self.layout = _common_layout(components)
        shares = _normalised(weights, len(components))
        flat: list[Component] = []
        fractions: list[float] = []
        for component, share in zip(components, shares, strict=True):
            inside = isinstance(component, MixturePosterior)
            flat += component.components if inside else [component]  # type: ignore[attr-defined]
            fractions += [share * w for w in component.weights.tolist()] if inside else [share]  # type: ignore[attr-defined]
        self.components: tuple[Component, ...] = tuple(flat)
        self.weights = torch.tensor(fractions, dtype=torch.float64, device=sums_device(means[0].device))
        self.provenance: dict[str, Any] = dict(provenance or {})
        self._shares = fractions
        self._order: list[int] = []
        self._counts = [0] * len(flat)
        self._num_free: Tensor | None = None

    # ---- moments ------------------------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        r"""The mean :math:`\sum_m w_m \mu_m`, shape ``(D,)`` [parameter]. Cost: one read of every component's mean."""
        total = torch.zeros_like(self.components[0].mean)
        for share, component in zip(self._shares, self.components, strict=True):
            total.add_(component.mean, alpha=share)
        return total

    @property
    def stddev(self) -> Tensor:
        r"""Marginal standard deviations, :math:`\sqrt{\sum_m w_m (\sigma_m^2 + (\mu_m - \mu)^2)}`, shape ``(D,)``.

        The law of total variance [parameter]. Cost: that of the components' ``stddev``.
        """
        centre = self.mean
        total = torch.zeros_like(centre)
        for share, component in zip(self._shares, self.components, strict=True):
            total.add_(component.stddev.square(), alpha=share)
            total.add_((component.mean - centre).square_(), alpha=share)
        return total.sqrt_()

    # ---- draws and densities ------------------------------------------------------------------------------------

    def sample(self, n: int | Sequence[int] = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draw weights: of each draw a component by its weight, and then from that.

        Args:
            n: How many, or a shape S (``torch.Size()`` for one plain vector).
            generator: Source of the randomness; None means torch's default generator.

        Returns:
            Shape ``(n, D)`` or ``(*S, D)``.

        Cost: one call of each component that is drawn from; memory of the result and of one component's draws.
        """
        shape = sample_size(n)
        number = shape.numel()
        like = self.components[0].mean
        result = like.new_empty((number, like.numel()))
        if number:
            generator = generator_on(self.weights.device, generator)
            chosen = torch.multinomial(self.weights, number, replacement=True, generator=generator)
            for index, count in enumerate(torch.bincount(chosen, minlength=len(self.components)).tolist()):
                if count:
                    result[chosen == index] = self.components[index].sample(count, generator=generator)
        return result.view(*shape, like.numel())

    def draw(self, s: int, generator: torch.Generator | None = None) -> Tensor:
        """Return draw number s of a stratified sequence, in which every component has its share of the draws.

        Args:
            s: Number of the draw, from 0.
            generator: Source of the randomness; None means torch's default generator.

        Returns:
            Shape ``(D,)``.

        Source: the published MultiSWAG takes the same number of samples from each of its components.
        """
        return self.components[self.component_of(s)].sample(1, generator=generator)[0]

    def component_of(self, s: int) -> int:
        """Return the component of draw number s: the one whose share of the draws so far is furthest behind.

        It depends on s and the weights alone: round robin for equal weights, so that S draws of M components hold
        S / M of each.

        Raises:
            ValueError: If ``s`` < 0.
        """
        if s < 0:
            raise ValueError(f"the number of a draw must be >= 0; got {s}.")
        while len(self._order) <= s:
            due = len(self._order) + 1
            deficits = [due * share - count for share, count in zip(self._shares, self._counts, strict=True)]
            chosen = max(range(len(deficits)), key=deficits.__getitem__)
            self._order.append(chosen)
            self._counts[chosen] += 1
        return self._order[s]

    def log_prob(self, theta: Tensor) -> Tensor:
        r"""Return :math:`\log \sum_m w_m p_m(\theta)` exactly, float64 of shape ``(*S,)`` [nat].

        Components may have point masses (weights of zero variance) in different coordinates. Then, where several
        have a density, those with the most point masses count alone: the others give such values probability zero.

        Args:
            theta: Shape ``(*S, D)``.

        Raises:
            ShapeError: If the last axis is not D.

        Cost: that of the M components.
        """
        terms = torch.stack([to_float64(component.log_prob(theta)) for component in self.components])
        terms = terms + self.weights.log().view(-1, *(1,) * (terms.ndim - 1))
        free = self._free_coordinates().view(-1, *(1,) * (terms.ndim - 1))
        if transformed() or bool((free != free[:1]).any()):
            possible = torch.where(terms > -torch.inf, free, free.max())
            terms = terms.masked_fill(free > possible.amin(0), -torch.inf)
        return terms.logsumexp(0)

    def _free_coordinates(self) -> Tensor:
        """Return how many coordinates of each component are no point masses, int64, shape ``(M,)``."""
        if transformed():  # nothing that torch.func or torch.compile made may stay
            return torch.stack([(component.stddev > 0).sum() for component in self.components])
        if self._num_free is None:
            self._num_free = torch.stack([(component.stddev > 0).sum() for component in self.components])
        return self._num_free

    # ---- derived posteriors and files ---------------------------------------------------------------------------

    def marginal(self, include: "Selector | None" = None, exclude: "Selector | None" = None) -> "MixturePosterior":
        """Return the exact marginal over some parameters: the mixture of the components' marginals.

        Args:
            include: Name pattern, list of them, or predicate; None keeps everything.
            exclude: What to leave out of that.

        Raises:
            TypeError: If a component has no marginals.
            ShapeError: If there is no layout to select by, or nothing is selected.
        """
        return self._each("marginal", include, exclude)

    def to(self, *args: Any, **kwargs: Any) -> "MixturePosterior":
        """Return the posterior on another device or in another dtype, as ``torch.Tensor.to``.

        Raises:
            TypeError: If a component has no such method.
        """
        return self._each("to", *args, **kwargs)

    def _each(self, method: str, *args: Any, **kwargs: Any) -> "MixturePosterior":
        changed = []
        for number, component in enumerate(self.components):
            change = getattr(component, method, None)
            if change is None:
                raise TypeError(f"component {number} is a {type(component).__name__}, which has no {method}().")
            changed.append(change(*args, **kwargs))
        return MixturePosterior(changed, self.weights, self.provenance)

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the weights and the states of the components.

        Raises:
            TypeError: If a component has no file format.
        """
        tensors, parts = join_states(self.components)
        return {"weights": self.weights, **tensors}, {"parts": parts}

    @classmethod
    def from_state(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        layout: ParameterLayout | None,
        provenance: Mapping[str, Any],
    ) -> Self:
        """Return the posterior of :meth:`to_state`."""
        (weights,) = required(tensors, "weights")
        components = split_states(tensors, metadata.get("parts"), layout)
        return cls(components, weights, provenance)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        dim = self.components[0].mean.numel()
        return f"MixturePosterior(numel={dim}, components={len(self.components)})"


def _common_layout(components: Sequence[Component]) -> ParameterLayout | None:
    known = [(number, c.layout) for number, c in enumerate(components) if c.layout is not None]
    for number, layout in known[1:]:
        difference = layout_difference(known[0][1], layout)
        if difference is not None:
            raise ShapeError(f"component {number} is over other parameters than component {known[0][0]}: {difference}.")
    return known[0][1] if known else None


def _normalised(weights: Sequence[float] | Tensor | None, number: int) -> list[float]:
    """Return weights that sum to 1; those that do already stay as they are, to the last bit."""
    given = [1.0] * number if weights is None else [float(weight) for weight in weights]
    if len(given) != number:
        raise ValueError(f"weights must be one for each of {number} components; got {len(given)}.")
    if not all(0 <= weight < math.inf for weight in given) or not sum(given) > 0:
        raise ValueError(f"weights must be >= 0, finite and not all zero; got {given}.")
    total = math.fsum(given)
    return given if abs(total - 1) < 1e-12 else [weight / total for weight in given]
