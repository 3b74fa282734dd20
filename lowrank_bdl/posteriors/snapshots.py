"""Collect whole weight vectors during training: iterates of SGD, cyclical ensembles, chains of SGLD."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_bdl.errors import CheckpointError
from lowrank_bdl.linalg.memory import require_memory
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.selection import Selector
from lowrank_bdl.parameters.wrappers import require_values
from lowrank_bdl.posteriors.empirical import EmpiricalPosterior
from lowrank_bdl.posteriors.iterates import flatten_finite
from lowrank_bdl.posteriors.storage import layout_difference


@exact_methods
class WeightSnapshots:
    """Keep every weight vector that is shown, or the newest of them.

    A collector as :class:`~lowrank_bdl.posteriors.swag.SWAG` is: show it the model with ``update_parameters``, save
    its ``state_dict`` with the training state, and collection resumes bit for bit. Unlike that it is no ``nn.Module``,
    since its state grows: modules load only states of their own shapes.

    Args:
        model: Defines names and shapes; nothing of it is kept or changed, and its current weights are not counted.
        max_snapshots: Keep the newest so many, >= 1; None keeps all.
        include: Parameters to collect, by name pattern or predicate; all that require a gradient if None.
        exclude: Parameters to leave out of these.
        device: Where the snapshots live; None takes the device of the model's first parameter.

    Attributes:
        layout: Names, shapes and order of the D coordinates.
        max_snapshots: As given.
        n_averaged: Snapshots shown so far, those no longer kept included.

    Raises:
        ValueError: If ``max_snapshots`` < 1.
        ShapeError: If no parameter is selected.

    Cost: D numbers a snapshot, float32 unless a parameter is float64.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> snapshots = WeightSnapshots(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     net(torch.randn(4, 3)).square().mean().backward()
        ...     _ = optimizer.step()
        ...     snapshots.update_parameters(net)
        >>> snapshots.posterior()
        EmpiricalPosterior(num_members=4, numel=8, dtype=torch.float32)
    """

    def __init__(
        self,
        model: nn.Module,
        max_snapshots: int | None = None,
        *,
        include: "Selector | None" = None,
        exclude: "Selector | None" = None,
        device: torch.device | str | None = None,
    ) -> None:
        if max_snapshots is not None and max_snapshots < 1:
            raise ValueError(f"max_snapshots must be at least 1, or None for all; got {max_snapshots}.")
        self.layout = ParameterLayout.from_module(model, include=include, exclude=exclude)
        self.max_snapshots = max_snapshots
        self.n_averaged = 0
        own = self.layout.parameters_of(model)
        if device is None:
            require_values(zip(self.layout.names, own, strict=True))
        self._device = own[0].device if device is None else torch.device(device)
        self._rows: list[Tensor] = []  # written once: what a state or a copy shares never changes

    def __len__(self) -> int:
        """Snapshots kept."""
        return len(self._rows)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Keep a copy of the model's present weights; the oldest one gives way if there are too many.

        Args:
            model: The model this collector was made for, or one with the same parameters.

        Raises:
            ShapeError: If a parameter is missing or has another shape; names the first one. Nothing is counted.
            NonFiniteError: If a weight is NaN or infinite; names it. Nothing is counted.
            MemoryLimitError: If one more does not fit the free memory, before it is made.
        """
        numel = self.layout.numel
        require_memory(
            numel * self.layout.dtype.itemsize, self._device, f"snapshot {len(self) + 1} of {numel:,} weights"
        )
        with torch.inference_mode(False):
            out = torch.empty(numel, dtype=self.layout.dtype, device=self._device)
            self._rows.append(flatten_finite(self.layout, model, float("inf"), out=out))
        self.n_averaged += 1
        self._drop_old()

    def _drop_old(self) -> None:
        if self.max_snapshots is not None:
            del self._rows[: -self.max_snapshots]

    def posterior(self) -> EmpiricalPosterior:
        """Return the uniform distribution over the snapshots kept, oldest first: a copy.

        Raises:
            ValueError: Before the first snapshot.
            MemoryLimitError: If the copy does not fit the free memory, before it is made.
        """
        if not self._rows:
            raise ValueError("a posterior needs at least 1 snapshot; got 0. Call update_parameters(model) first.")
        num_bytes = sum(row.nbytes for row in self._rows)
        require_memory(num_bytes, self._device, f"a copy of {len(self)} snapshots")
        provenance = {"source": "snapshots", "n_averaged": self.n_averaged}
        return EmpiricalPosterior(torch.stack(self._rows), self.layout, provenance)

    def to(self, device: torch.device | str) -> Self:
        """Move the snapshots, and those to come, to another device; returns the collector itself."""
        self._device = torch.device(device)
        self._rows = [row.to(self._device) for row in self._rows]
        return self

    # ---- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that collection goes on from: the snapshots, shared, their number, and the layout."""
        return {"thetas": list(self._rows), "n_averaged": self.n_averaged, "layout": self.layout.to_metadata()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state with any number of snapshots; the newest ``max_snapshots`` of them are kept.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            CheckpointError: If the state is damaged, or of other parameters. Nothing is changed then.
        """
        missing = [key for key in ("thetas", "n_averaged", "layout") if key not in state]
        if missing:
            raise CheckpointError(f"the state of the snapshots lacks {', '.join(missing)}.")
        difference = layout_difference(self.layout, ParameterLayout.from_metadata(state["layout"]))
        if difference is not None:
            raise CheckpointError(f"the snapshots are of other parameters: {difference}.")
        rows, count = list(state["thetas"]), int(state["n_averaged"])
        for number, row in enumerate(rows):
            if row.shape != (self.layout.numel,) or row.dtype != self.layout.dtype:
                raise CheckpointError(
                    f"snapshot {number} must be ({self.layout.numel},) {self.layout.dtype}; "
                    f"got {tuple(row.shape)} {row.dtype}."
                )
        if not len(rows) <= count:
            raise CheckpointError(f"the state holds {len(rows)} snapshots; expected at most the {count} it counted.")
        self._rows, self.n_averaged = [row.to(self._device) for row in rows], count
        self._drop_old()

    def __repr__(self) -> str:
        return (
            f"WeightSnapshots(numel={self.layout.numel}, n_averaged={self.n_averaged}, "
            f"max_snapshots={self.max_snapshots})"
        )
