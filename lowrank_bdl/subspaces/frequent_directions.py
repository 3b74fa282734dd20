"""A streaming collector of more iterates than it has room for, and the subspace of their frequent directions."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_bdl.errors import CheckpointError, NonFiniteError, ShapeError
from lowrank_bdl.linalg.factors import LowRankFactors
from lowrank_bdl.linalg.frequent_directions import FrequentDirectionsSketch
from lowrank_bdl.linalg.memory import require_memory
from lowrank_bdl.linalg.moments import STATE_NAMES, StreamingMoments, first_unusable
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.selection import Selector
from lowrank_bdl.posteriors.iterates import flatten_finite
from lowrank_bdl.posteriors.storage import layout_difference
from lowrank_bdl.posteriors.swag import CENTERINGS
from lowrank_bdl.subspaces.deviations import Deviations
from lowrank_bdl.subspaces.principal import principal_directions
from lowrank_bdl.subspaces.subspace import Subspace


@exact_methods
class FrequentDirections:
    r"""Sketch the covariance of all iterates :math:`\theta_1, \dots, \theta_T` in :math:`2 \ell` rows, T of any size.

    Where :class:`~lowrank_bdl.posteriors.swag.SWAG` keeps the newest K deviations and forgets the rest, this keeps the
    directions that recur, with a bound on what is lost. Of the deviations
    :math:`d_t = \theta_t - \bar\theta_t` from the running mean after iterate t, the covariance is
    :math:`C = \sum_t d_t d_t^\top / (T - 1)`; with ``centering="final"`` the rows sketched are
    :math:`\sqrt{t / (t - 1)}\, d_t`, whose covariance is exactly that of the iterates about their final mean.

    A collector as SWAG is: show it the model with ``update_parameters``, save its ``state_dict`` with the training
    state, and collection resumes bit for bit.

    Args:
        model: A network, which defines names and shapes (nothing of it is kept or changed, and its current weights are
            not counted); or D, for plain vectors.
        sketch_size: ℓ >= 2; the sketch is exact while iterates span fewer directions.
        centering: ``"running"`` or ``"final"``.
        include: Parameters to collect, by name pattern or predicate; all that require a gradient if None.
        exclude: Parameters to leave out of these.
        dtype: float32 or float64; None takes that of the layout, float32 for plain vectors.
        device: Where the sketch lives; None takes the device of the model's first parameter.

    Attributes:
        layout: Names and shapes of the coordinates; None for plain vectors.
        centering: As given.

    Raises:
        ValueError: If ``sketch_size`` < 2, or ``centering`` is unknown.
        TypeError: If ``model`` is neither a network nor a number.
        ShapeError: If no parameter is selected.
        MemoryLimitError: If the state does not fit the free memory, before it is allocated.

    Cost: (2ℓ + 3)·D numbers; an update is one pass over the weights, and every ℓ + 1 of them a pass over the sketch.

    Source: Ghashami et al. (SIAM J. Comput. 2016); as a subspace, the released code of Izmailov et al. (UAI 2019).

    Example:
        >>> net = nn.Linear(3, 2)
        >>> sketch = FrequentDirections(net, sketch_size=4)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> for _ in range(30):
        ...     optimizer.zero_grad()
        ...     net(torch.randn(4, 3)).square().mean().backward()
        ...     _ = optimizer.step()
        ...     sketch.update_parameters(net)
        >>> sketch.n_averaged, sketch.subspace(rank=2)
        (30, Subspace(numel=8, rank=2, dtype=torch.float32))
    """

    def __init__(
        self,
        model: nn.Module | int,
        sketch_size: int = 20,
        *,
        centering: str = "running",
        include: "Selector | None" = None,
        exclude: "Selector | None" = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if centering not in CENTERINGS:
            raise ValueError(f"centering must be one of {', '.join(CENTERINGS)}; got {centering!r}.")
        if sketch_size < 2:
            raise ValueError(f"sketch_size must be at least 2; got {sketch_size}.")
        self.layout: ParameterLayout | None = None
        if isinstance(model, nn.Module):
            self.layout = ParameterLayout.from_module(model, include=include, exclude=exclude)
            numel, dtype = self.layout.numel, dtype or self.layout.dtype
            device = self.layout.parameters_of(model)[0].device if device is None else device
        elif isinstance(model, int) and model >= 1:
            numel, dtype = model, dtype or torch.float32
        else:
            raise TypeError(f"model must be a network or D >= 1; got {model!r:.80}.")
        place = torch.empty(0, device=device).device
        require_memory((2 * sketch_size + 3) * numel * dtype.itemsize, place, f"a sketch of {numel:,} weights")
        self.centering = centering
        self._moments = StreamingMoments(numel, dtype=dtype, device=place)
        self._sketch = FrequentDirectionsSketch(sketch_size, numel, dtype=dtype, device=place)

    # ---- collection -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Count the model's present weights as one more iterate.

        Args:
            model: The model this collector was made for, or one with the same parameters.

        Raises:
            ShapeError: If the collector is of plain vectors, or a parameter is missing or has another shape; names the
                first one. Nothing is counted.
            NonFiniteError: If a weight is NaN, infinite or too large to square; names it. Nothing is counted.
        """
        if self.layout is None:
            raise ShapeError("a collector of plain vectors knows no parameters; call update(theta).")
        out = torch.empty_like(self._moments.shift)
        self._count(flatten_finite(self.layout, model, self._sketch.bound / 2, out=out))

    @torch.no_grad()
    def update(self, theta: Tensor) -> None:
        """Count one more iterate.

        Args:
            theta: Shape ``(D,)``, floating dtype, on the device of the sketch [parameter].

        Raises:
            ShapeError: If the shape is not ``(D,)``.
            NonFiniteError: If an entry is NaN, infinite or too large to square; nothing is counted.
        """
        if theta.shape != self._moments.shift.shape or not theta.is_floating_point():
            raise ShapeError(f"expected a floating ({self._moments.numel},); got {tuple(theta.shape)}, {theta.dtype}.")
        bad = first_unusable(theta, self._sketch.bound / 2)
        if bad is not None:
            raise NonFiniteError(f"expected finite weights; entry {bad} is {theta[bad].item()}.")
        self._count(theta)

    def _count(self, theta: Tensor) -> None:
        with torch.inference_mode(False):
            count = self._moments.count + 1
            row = self._sketch.next_row() if count > 1 else None  # the first deviation is exactly zero
            self._moments.update(theta, check_finite=False, deviation=row)
            if row is not None:
                if self.centering == "final":
                    row.mul_(math.sqrt(count / (count - 1)))
                self._sketch.advance()

    # ---- what was collected -----------------------------------------------------------------------------------------

    @property
    def n_averaged(self) -> int:
        """T, the iterates so far."""
        return self._moments.count

    @property
    def mean(self) -> Tensor:
        """The mean of the iterates, shape ``(D,)`` [parameter]; a new tensor.

        Raises:
            ValueError: Before the first iterate.
        """
        if self.n_averaged == 0:
            raise ValueError("the mean needs at least 1 iterate; got 0. Call update_parameters(model) first.")
        return self._moments.mean

    @property
    def error_bound(self) -> float:
        r"""A bound on the largest eigenvalue of C minus that of the sketch, :math:`\Delta / (T - 1)` [parameter²].

        The difference is positive semi-definite; zero says that nothing was lost but for rounding.
        """
        return float(self._sketch.shrinkage) / max(self.n_averaged - 1, 1)

    def subspace(self, rank: int | float | Literal["mle"] | None = None, *, orthonormal: bool = False) -> Subspace:
        r"""Return the subspace of the leading directions of the sketch, about the mean of the iterates.

        The basis is scaled as :func:`~lowrank_bdl.subspaces.principal.pca_subspace`'s, by singular values over
        :math:`\sqrt{T - 1}`: the divisor counts the iterates absorbed, not the rows of the sketch.

        Args:
            rank: As for ``pca_subspace``: a number of directions, a share of the sketch's variance, ``"mle"`` (of T
                samples), or None for all.
            orthonormal: Take unit vectors as the basis.

        Returns:
            The subspace, a copy: later updates do not change it.

        Raises:
            ValueError: Before the second iterate, or if ``rank`` is no such number.
            ShapeError: If ``rank`` is more than the numerical rank of the sketch.

        Cost: two reads of the sketch, one write of the basis.
        """
        if self.n_averaged < 2:
            raise ValueError(f"a subspace needs at least 2 iterates; got {self.n_averaged}.")
        mean, divisor = self._moments.mean, math.sqrt(self.n_averaged - 1)
        mix = torch.tensor(1 / divisor, dtype=torch.float64, device=mean.device)
        provenance = {
            "source": "frequent directions",
            "n_averaged": self.n_averaged,
            "sketch_size": self._sketch.sketch_size,
            "centering": self.centering,
            "error_bound": self.error_bound,
        }
        factors = LowRankFactors(self._sketch.rows.mT, mean, mix)
        deviations = Deviations(self.layout, mean, factors, self.n_averaged, provenance)
        return principal_directions(deviations, rank, orthonormal, "frequent directions")

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that collection goes on from, tensors shared."""
        return {
            "moments": self._moments.state(),
            "sketch": self._sketch.state(),
            "centering": self.centering,
            "layout": None if self.layout is None else self.layout.to_metadata(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a collector of the same parameters, sketch size, dtype and centring.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            CheckpointError: If the state is damaged, or of another collector. Nothing is changed then.
        """
        missing = [key for key in ("moments", "sketch", "centering", "layout") if key not in state]
        if missing:
            raise CheckpointError(f"the state of frequent directions lacks {', '.join(missing)}.")
        if state["centering"] != self.centering:
            raise CheckpointError(f"expected a state with centering {self.centering!r}; got {state['centering']!r}.")
        found = None if state["layout"] is None else ParameterLayout.from_metadata(state["layout"])
        if (found is None) != (self.layout is None):
            raise CheckpointError(
                "one of state and collector is of plain vectors, the other of a network's parameters."
            )
        if self.layout is not None and found is not None:
            difference = layout_difference(self.layout, found)
            if difference is not None:
                raise CheckpointError(f"the state is of other parameters: {difference}.")
        own = self._moments.state()
        moments = state["moments"]
        for name in STATE_NAMES:
            if name not in moments or moments[name].shape != own[name].shape or moments[name].dtype != own[name].dtype:
                raise CheckpointError(f"the state's {name} is missing, or of another shape or dtype.")
        try:
            self._sketch.load_state(state["sketch"])
        except ShapeError as error:
            raise CheckpointError(f"the state does not fit: {error}") from error
        for name in STATE_NAMES:
            own[name].copy_(moments[name])

    def __repr__(self) -> str:
        return (
            f"FrequentDirections(numel={self._moments.numel}, sketch_size={self._sketch.sketch_size}, "
            f"n_averaged={self.n_averaged}, centering={self.centering!r})"
        )
