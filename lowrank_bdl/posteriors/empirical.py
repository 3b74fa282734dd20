"""Given weight vectors as a posterior: deep ensembles, fast geometric ensembles, chains of SGLD, MultiSWA."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.devices import generator_on
from lowrank_bdl.linalg.moments import column_chunks, first_unusable
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.selection import Selector
from lowrank_bdl.posteriors.gaussian import sample_size
from lowrank_bdl.posteriors.iterates import flatten_finite
from lowrank_bdl.posteriors.storage import StoredPosterior, required


@exact_methods
class EmpiricalPosterior(StoredPosterior, kind="empirical posterior"):
    r"""The uniform distribution over M given weight vectors, :math:`\frac1M \sum_m \delta_{\theta_m}`.

    Args:
        thetas: The vectors, shape ``(M, D)``, M >= 1, oldest first where they have an age; shared, not copied.
        layout: Names and shapes of the coordinates; None for plain vectors.
        provenance: Where it came from, as JSON scalars by name.

    Attributes:
        thetas: As given.
        layout: As given.
        provenance: As given; saved with the posterior.

    Raises:
        ShapeError: If ``thetas`` is not ``(M, D)`` with M >= 1 in a real floating dtype, or the layout has another D.
        NonFiniteError: If an entry is not finite.

    Example:
        >>> ensemble = EmpiricalPosterior(torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0], [6.0, 1.0]]))
        >>> ensemble.mean, ensemble.stddev
        (tensor([3., 1.]), tensor([2.2361, 0.0000]))
        >>> ensemble.members(2)
        tensor([[2., 1.],
                [6., 1.]])
        >>> ensemble.sample(3, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self, thetas: Tensor, layout: ParameterLayout | None = None, provenance: Mapping[str, Any] | None = None
    ) -> None:
        if thetas.ndim != 2 or not len(thetas) or not thetas.is_floating_point():
            raise ShapeError(
                f"thetas must be real floating-point numbers of shape (M, D) with M >= 1; "
                f"got {tuple(thetas.shape)} {thetas.dtype}."
            )
        if layout is not None and layout.numel != thetas.shape[-1]:
            raise ShapeError(f"layout has {layout.numel} coordinates; thetas have {thetas.shape[-1]}.")
        for number, theta in enumerate(thetas.detach()):
            bad = first_unusable(theta, float("inf"))
            if bad is not None:
                raise NonFiniteError(f"thetas must be finite; entry {bad} of vector {number} is {theta[bad].item()}.")
        self.thetas = thetas
        self.layout = layout
        self.provenance: dict[str, Any] = dict(provenance or {})

    @classmethod
    def from_models(
        cls,
        models: Iterable[nn.Module],
        *,
        include: "Selector | None" = None,
        exclude: "Selector | None" = None,
    ) -> Self:
        """Return the ensemble of several networks' present weights; batch-norm statistics are not part of it.

        Args:
            models: M networks with the same parameters; not changed.
            include: Parameters to keep, by name; all that require a gradient if None.
            exclude: Parameters to leave out of these.

        Raises:
            ShapeError: If there is no network, or one has other parameters than the first.
            NonFiniteError: If a weight is not finite; names it.

        Example:
            >>> EmpiricalPosterior.from_models(nn.Linear(3, 2) for _ in range(4))
            EmpiricalPosterior(num_members=4, numel=8, dtype=torch.float32)
        """
        rows: list[Tensor] = []
        layout = None
        for model in models:
            layout = ParameterLayout.from_module(model, include=include, exclude=exclude) if layout is None else layout
            rows.append(flatten_finite(layout, model, float("inf")))
        if layout is None:
            raise ShapeError("an ensemble needs at least 1 network; got none.")
        return cls(torch.stack(rows), layout, {"source": "models"})

    # ---- members ------------------------------------------------------------------------------------------------

    @property
    def num_members(self) -> int:
        """M."""
        return len(self.thetas)

    def members(self, num: int | None = None) -> Tensor:
        """Return weight vectors, each once.

        Args:
            num: How many of the M, evenly spaced and the newest among them; None for all.

        Returns:
            Shape ``(num, D)``; a view where the spacing is even, else a copy.

        Raises:
            ValueError: If ``num`` is not between 1 and M.
        """
        total = self.num_members
        if num is None:
            return self.thetas
        if not 1 <= num <= total:
            raise ValueError(f"the number of members must be between 1 and {total}; got {num}.")
        if total % num == 0:
            return self.thetas[total // num - 1 :: total // num]
        return self.thetas[[(i + 1) * total // num - 1 for i in range(num)]]

    def sample(self, n: int | Sequence[int] = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draw members with replacement.

        Args:
            n: How many, or a shape S (``torch.Size()`` for one plain vector).
            generator: Source of the randomness; None means torch's default generator.

        Returns:
            Shape ``(n, D)`` or ``(*S, D)``.
        """
        shape = sample_size(n)
        generator = generator_on(self.thetas.device, generator)
        return self.thetas[torch.randint(self.num_members, shape, generator=generator, device=self.thetas.device)]

    # ---- moments ------------------------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """The mean of the members, shape ``(D,)``, at least float32 [parameter]. Cost: one read of the members."""
        return self._by_chunks(lambda rows: rows.mean(0))

    @property
    def stddev(self) -> Tensor:
        """Marginal standard deviations of this distribution (divisor M), shape ``(D,)`` [parameter].

        Cost: one read of the members.
        """
        return self._by_chunks(lambda rows: rows.std(0, correction=0))

    def _by_chunks(self, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        dtype = torch.promote_types(self.thetas.dtype, torch.float32)
        numel = self.thetas.shape[-1]
        result = self.thetas.new_empty(numel, dtype=dtype)
        for columns in column_chunks(numel, self.thetas.device):
            result[columns] = reduce(self.thetas[:, columns].detach().to(dtype))
        return result

    # ---- derived posteriors and files ---------------------------------------------------------------------------

    def marginal(self, include: "Selector | None" = None, exclude: "Selector | None" = None) -> "EmpiricalPosterior":
        """Return the distribution of some of the parameters.

        Args:
            include: Name pattern, list of them, or predicate; None keeps everything.
            exclude: What to leave out of that.

        Raises:
            ShapeError: If there is no layout to select by, or nothing is selected.

        Cost: a view where the kept parameters are neighbours; otherwise a copy of the kept coordinates.
        """
        if self.layout is None:
            raise ShapeError("marginal selects parameters by name and needs a layout; this posterior has none.")
        layout, index = self.layout.subset(include=include, exclude=exclude)
        return EmpiricalPosterior(self.thetas[:, index], layout, self.provenance)

    def to(self, *args: Any, **kwargs: Any) -> "EmpiricalPosterior":
        """Return the posterior on another device or in another dtype, as ``torch.Tensor.to``."""
        return EmpiricalPosterior(self.thetas.to(*args, **kwargs), self.layout, self.provenance)

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the vectors."""
        return {"thetas": self.thetas.detach()}, {}

    @classmethod
    def from_state(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        layout: ParameterLayout | None,
        provenance: Mapping[str, Any],
    ) -> Self:
        """Return the posterior of :meth:`to_state`."""
        (thetas,) = required(tensors, "thetas")
        return cls(thetas, layout, provenance)

    def __repr__(self) -> str:
        size = f"num_members={self.num_members}, numel={self.thetas.shape[-1]}"
        return f"EmpiricalPosterior({size}, dtype={self.thetas.dtype})"
