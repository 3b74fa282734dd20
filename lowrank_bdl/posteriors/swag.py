r"""SWAG: a Gaussian over network weights from the iterates of an optimiser.

Maddox, Garipov, Izmailov, Vetrov and Wilson, "A Simple Baseline for Bayesian Uncertainty in Deep Learning" (NeurIPS
2019), algorithm 1. SWA (Izmailov et al., UAI 2018) is its mean, SWAG-Diag its rank-0 posterior.
"""

import hashlib
import json
import math
from typing import Literal, overload

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lowrank_bdl.linalg.devices import sums_device
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.memory import require_memory
from lowrank_bdl.linalg.moments import StreamingMoments
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.linalg.ring_buffer import DeviationBuffer
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.memory_estimates import estimate_memory
from lowrank_bdl.parameters.selection import Selector
from lowrank_bdl.parameters.wrappers import require_values
from lowrank_bdl.posteriors.blocks import BlockPosterior
from lowrank_bdl.posteriors.gaussian import GaussianPosterior
from lowrank_bdl.posteriors.iterates import flatten_finite
from lowrank_bdl.posteriors.own_tensors import OwnTensors

CENTERINGS = ("running", "final")
_WRAPPERS = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")  # names in states of early versions


@exact_methods
class SWAG(OwnTensors):
    r"""Collect iterates :math:`\theta_1, \dots, \theta_T` of any optimiser into a low-rank-plus-diagonal Gaussian.

    .. math::
        \Sigma = \mathrm{scale} \cdot \Big(\mathrm{diag}(\mathrm{var})
                 + \tfrac{1}{\max(\mathrm{rows} - 1, 1)} \sum_k d_k d_k^\top\Big), \quad
        d_t = \theta_t - \bar\theta_t,

    with the mean :math:`\bar\theta_t` *after* iterate t (equation 1 and section 3.2 of the paper, whose factor ½ is
    ``scale=0.5``) and rows = min(T, rank). The first deviation is exactly zero: it counts in rows while it is inside
    that window and is never stored.

    The collector is a module without parameters and buffers: register it inside a training module, save it with the
    training state, and collection resumes bit for bit. What it holds is in ``state_dict()``, and nothing that
    DistributedDataParallel sends around or AveragedModel and Lightning's WeightAveraging average. It follows moves
    between devices, and keeps its own dtypes under ``.half()``, ``.bfloat16()`` and ``.double()``. It holds a layout,
    never the model.

    Args:
        model: Defines names and shapes; nothing of it is kept or changed, and its current weights are not counted.
        rank: K >= 0, the number of deviations kept.
        include: Parameters to collect, by name pattern or predicate; all that require a gradient if None.
        exclude: Parameters to leave out of these.
        deviation_dtype: Storage of the deviations: float32, float64, bfloat16, float16, float8_e4m3fn or int8 (the
            last three with block scales); None takes the dtype of the moments.
        device: Where the collector lives; None takes the device of the model's first parameter.
        centering: ``"running"`` for :math:`d_t` as above; ``"final"`` for :math:`\theta_t - \bar\theta_T`, which is
            exact from the stored rows since :math:`\theta_t - \bar\theta_T = d_t - \sum_{s>t} d_s / (s - 1)`.
        correction: 1 for the unbiased variance, 0 for the population variance of the paper's released code.

    Attributes:
        layout: Names, shapes and order of the D coordinates.
        rank: K.

    Raises:
        ValueError: If ``rank`` < 0, or ``centering``, ``correction`` or ``deviation_dtype`` is unknown.
        ShapeError: If no parameter is selected.
        LowRankBDLError: If the parameters have no values (on the meta device) and ``device`` is None, or are sharded.
        TypeError: If ``model`` is no module.
        MemoryLimitError: If the buffers do not fit the free memory of the device, before they are allocated.

    Cost: (K + 3)·D numbers, float32 unless a parameter is float64; an update allocates D more for its duration.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> swag = SWAG(net, rank=5)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> for _ in range(8):
        ...     optimizer.zero_grad()
        ...     net(torch.randn(4, 3)).square().mean().backward()
        ...     _ = optimizer.step()
        ...     swag.update_parameters(net)
        >>> posterior = swag.posterior(scale=0.5)
        >>> posterior.sample(10).shape, posterior.covariance.rank
        (torch.Size([10, 8]), 5)
    """

    shift: Tensor
    offset: Tensor
    sum_sq: Tensor
    count: Tensor
    prior_count: Tensor
    storage: Tensor
    storage_scale: Tensor | None
    num_pushed: Tensor
    layout_digest: Tensor

    def __init__(
        self,
        model: nn.Module,
        rank: int = 20,
        *,
        include: "Selector | None" = None,
        exclude: "Selector | None" = None,
        deviation_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        centering: str = "running",
        correction: int = 1,
    ) -> None:
        super().__init__()
        if rank < 0:
            raise ValueError(f"rank must be >= 0; got {rank}.")
        if centering not in CENTERINGS:
            raise ValueError(f"centering must be one of {', '.join(CENTERINGS)}; got {centering!r}.")
        if correction not in (0, 1):
            raise ValueError(f"correction must be 0 or 1; got {correction}.")
        self.layout = ParameterLayout.from_module(model, include=include, exclude=exclude)
        self.rank, self.centering, self.correction = rank, centering, correction
        own = self.layout.parameters_of(model)
        if device is None:
            require_values(zip(self.layout.names, own, strict=True))
        place = own[0].device if device is None else torch.device(device)
        dtype, numel = self.layout.dtype, self.layout.numel
        stored_as = dtype if deviation_dtype is None else deviation_dtype
        num_bytes = estimate_memory(numel, rank, "state", dtype, deviation_dtype=stored_as).result
        require_memory(num_bytes, place, f"SWAG of rank {rank} over {numel:,} parameters")
        with torch.inference_mode(False):  # tensors made in inference mode have no version counter to detect changes by
            moments = StreamingMoments(numel, dtype=dtype, device=place)
            buffer = DeviationBuffer(rank, numel, dtype=stored_as, device=place)
            for name, tensor in moments.state().items():
                self.keep(name, tensor)
            self.keep("storage", buffer.storage)
            self.keep("storage_scale", buffer.scale)
            self.keep("num_pushed", buffer.state()["num_pushed"])
            self.keep("layout_digest", torch.tensor(_digest(self.layout), device="cpu"))

    @classmethod
    def from_averaged_model(
        cls,
        averaged: AveragedModel,
        rank: int = 20,
        *,
        include: "Selector | None" = None,
        exclude: "Selector | None" = None,
        deviation_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        centering: str = "running",
        correction: int = 1,
    ) -> "SWAG":
        """Continue the equal average of an ``AveragedModel``: its n₀ averages count in the mean only.

        The variance and the deviations are of the iterates that the new collector sees itself.

        Args:
            averaged: An equal average, with the default ``avg_fn`` or one that does the same; its network is
                ``averaged.module``.
            rank: As in :class:`SWAG`, like the other arguments.
            include: See :class:`SWAG`; names without the wrapper's ``module.``.
            exclude: See :class:`SWAG`.
            deviation_dtype: See :class:`SWAG`.
            device: See :class:`SWAG`.
            centering: See :class:`SWAG`.
            correction: See :class:`SWAG`.

        Raises:
            ValueError: If the average is not the equal one of its iterates, an exponential one say.
            NonFiniteError: If a weight of the average is not finite.
        """
        _require_equal_average(averaged)
        options = {"include": include, "exclude": exclude, "deviation_dtype": deviation_dtype, "device": device}
        swag = cls(averaged.module, rank, centering=centering, correction=correction, **options)  # type: ignore[arg-type]
        prior_count = int(averaged.n_averaged)
        if prior_count > 0:  # an AveragedModel without averages holds initial weights that it will overwrite
            swag.shift.copy_(swag._flatten(averaged.module))
            swag.prior_count.fill_(prior_count)
        return swag

    # ---- collection ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Count the model's present weights as one more iterate.

        A posterior that shares this collector's deviations is stale from here on: its every use raises StaleError.

        Args:
            model: The model this collector was made for, or one with the same parameters.

        Raises:
            ShapeError: If a parameter is missing or has another shape; names the first one. Nothing is counted.
            NonFiniteError: If a weight is NaN, infinite or too large to square; names it. Nothing is counted.

        Cost: one pass over the weights, the three moments and one row of the buffer.
        """
        with torch.inference_mode(False):
            theta = self._flatten(model)
            moments, buffer = self._moments(), self._buffer()
            stored = moments.count > 0 or moments.prior_count > 0  # else the deviation is exactly zero
            row = buffer.next_row() if stored else None
            moments.update(theta, check_finite=False, deviation=row)
            if row is not None:
                buffer.advance()
            elif stored:
                buffer.push(moments.center_(theta), check_finite=False)

    def _flatten(self, model: nn.Module) -> Tensor:
        """Return the model's weights as a new vector, every entry usable."""
        return flatten_finite(self.layout, model, self._moments().bound, out=torch.empty_like(self.shift))

    def _moments(self) -> StreamingMoments:
        names = ("shift", "offset", "sum_sq", "count", "prior_count")
        return StreamingMoments.from_state({name: getattr(self, name) for name in names})

    def _buffer(self) -> DeviationBuffer:
        state = {"storage": self.storage, "num_pushed": self.num_pushed}
        if self.storage_scale is not None:
            state["scale"] = self.storage_scale
        return DeviationBuffer.from_state(state)

    # ---- what was collected -------------------------------------------------------------------------------------

    @property
    def n_averaged(self) -> int:
        """T: iterates in the mean, those of an ``AveragedModel`` this collector started from included."""
        moments = self._moments()
        return moments.count + moments.prior_count

    @property
    def mean(self) -> Tensor:
        """The SWA solution, shape ``(D,)`` [parameter]; a new tensor.

        Raises:
            ValueError: Before the first iterate.
        """
        if self.n_averaged == 0:
            raise ValueError("the mean needs at least 1 snapshot; got 0. Call update_parameters(model) first.")
        return self._moments().mean

    @property
    def variance(self) -> Tensor:
        """Variance of each weight over the iterates seen, shape ``(D,)`` [parameter²]; a new tensor.

        Raises:
            ValueError: Before the second iterate (the first if ``correction=0``).
        """
        return self._moments().variance(self.correction)

    @property
    def deviations(self) -> Tensor:
        """Stored deviations from the running mean, oldest first, decoded: a copy, shape ``(rows, D)`` [parameter]."""
        return self._buffer().rows()

    @overload
    def posterior(
        self, scale: float = ..., rank: int | None = ..., copy: bool = ..., blockwise: Literal[False] = ...
    ) -> GaussianPosterior: ...

    @overload
    def posterior(
        self, scale: float = ..., rank: int | None = ..., copy: bool = ..., *, blockwise: Literal[True]
    ) -> BlockPosterior: ...

    @overload
    def posterior(
        self, scale: float = ..., rank: int | None = ..., copy: bool = ..., *, blockwise: bool
    ) -> GaussianPosterior | BlockPosterior: ...

    def posterior(
        self, scale: float = 0.5, rank: int | None = None, copy: bool = False, blockwise: bool = False
    ) -> GaussianPosterior | BlockPosterior:
        """Return the Gaussian over the weights.

        Args:
            scale: Multiplies the whole covariance; 0.5 is the paper's SWAG, and 1.0 with ``rank=0`` its SWAG-Diag.
            rank: How many of the newest deviations to use, at most the collector's; None uses all of them.
            copy: Own the deviations. Otherwise they are shared, and every use of the posterior after the next update
                of this collector raises StaleError.
            blockwise: Draw the low-rank part of each parameter tensor independently of the others, as the paper's
                released code does on request: the block-diagonal part of the covariance. ``scale`` multiplies the
                variance here too (there it multiplies the standard deviation).

        Returns:
            A posterior whose covariance is a ``LowRankPlusDiagLinearOperator``; with ``blockwise``, a
            :class:`BlockPosterior` of one such block a parameter tensor, views of the same deviations.

        Raises:
            ValueError: If ``scale`` is not a positive number, ``rank`` is negative or more than the collector's, or
                fewer than 2 snapshots were collected.
            MemoryLimitError: If a copy does not fit the free memory, before it is made.

        Cost: 2·D numbers (mean and variance); K·D more with ``copy=True``.
        """
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"scale must be a positive number; got {scale}. For SWA itself use swag.mean.")
        rank = self.rank if rank is None else rank
        if rank < 0:
            raise ValueError(f"rank must be >= 0; got {rank}.")
        if rank > self.rank:
            raise ValueError(f"rank must be at most {self.rank}, the deviations that this collector keeps; got {rank}.")
        moments, buffer = self._moments(), self._buffer()
        if moments.count < 2:
            raise ValueError(f"a posterior needs at least 2 snapshots; got {moments.count}.")
        with torch.inference_mode(False), torch.no_grad():
            rows = min(moments.count, rank)
            part, mix = self._window(buffer, rows, self.n_averaged)
            storage = buffer.storage[part]
            scales = None if buffer.scale is None else buffer.scale[part]
            if copy:
                num_bytes = storage.nbytes + (0 if scales is None else scales.nbytes)
                require_memory(num_bytes, storage.device, f"a copy of {len(storage)} deviations")
                storage, scales = storage.clone(), None if scales is None else scales.clone()
            covariance = LowRankPlusDiagLinearOperator(
                storage.mT,
                moments.variance(self.correction).mul_(scale),
                mix=mix * math.sqrt(scale / max(rows - 1, 1)),
                root_scale=scales,
            )
            provenance = {
                "source": "swag",
                "n_averaged": self.n_averaged,
                "n_seen": moments.count,
                "rank": rank,
                "rows": rows,
                "scale": scale,
                "centering": self.centering,
                "correction": self.correction,
            }
            mean = moments.mean
        posterior = GaussianPosterior(mean, covariance if copy else covariance.pin(), self.layout, provenance)
        return BlockPosterior.from_joint(posterior) if blockwise else posterior

    def _window(self, buffer: DeviationBuffer, rows: int, last: int) -> tuple[slice, Tensor]:
        """Return which storage rows to share, and the float64 mix that makes the newest ``rows`` deviations of them.

        Args:
            buffer: The ring buffer.
            rows: How many of the newest iterates make the low-rank part, an unstored zero row of the first included.
            last: Number T of the newest iterate, so that the newest row is that of iterate T.
        """
        place = sums_device(self.storage.device)
        stored = min(len(buffer), rows)
        if stored == 0:
            return slice(0, 0), torch.ones((), dtype=torch.float64, device=place)
        kept = buffer.ages()[-stored:]
        low, high = min(kept), max(kept) + 1
        if self.centering == "running":
            if high - low == stored:  # the order of columns changes nothing
                return slice(low, high), torch.ones((), dtype=torch.float64, device=place)
            combination = torch.eye(stored, dtype=torch.float64, device=place)
        else:
            # column t of the strict lower triangle holds the later iterates s > t, each a step of -d_s / (s - 1)
            steps = 1 / torch.arange(last - stored, last, dtype=torch.float64, device=place)
            full = -steps[:, None].expand(stored, stored).tril(-1) + torch.eye(
                stored, dtype=torch.float64, device=place
            )
            # the first iterate has no running deviation, but it has a final one while it is inside the window
            combination = torch.cat([-steps[:, None], full], dim=1) if rows > stored else full
        mix = torch.zeros((high - low, combination.shape[1]), dtype=torch.float64, device=place)
        mix[torch.tensor(kept, device="cpu") - low] = combination
        return slice(low, high), mix

    def to_averaged_model(self, model: nn.Module) -> AveragedModel:
        """Return torch's ``AveragedModel`` of ``model`` that holds the mean and the number of averages.

        Args:
            model: The network; copied, not changed. Its buffers and uncollected parameters are taken as they are.

        Raises:
            ValueError: Before the first iterate.
            ShapeError: If the model does not fit the layout.
        """
        self.layout.check(model)
        mean = self.mean
        averaged = AveragedModel(model)
        self.layout.assign_(averaged.module, mean)
        averaged.n_averaged.fill_(self.n_averaged)
        return averaged

    # ---- state --------------------------------------------------------------------------------------------------

    def refuse_state(self, found: dict[str, Tensor], prefix: str) -> str | None:
        """Say that a state is of other parameters."""
        digest = found.get("layout_digest")
        if digest is None or int(digest) in (_digest(self.layout, wrapper) for wrapper in _WRAPPERS):
            return None
        return (
            f"{prefix}layout_digest: the state was collected from parameters with other names or shapes; "
            "the collector is unchanged."
        )

    def extra_repr(self) -> str:
        """Describe the collector in one line."""
        return (
            f"numel={self.layout.numel}, rank={self.rank}, n_averaged={self.n_averaged}, "
            f"centering={self.centering!r}, correction={self.correction}, deviation_dtype={self.storage.dtype}"
        )


def _require_equal_average(averaged: AveragedModel) -> None:
    """Refuse an average whose next value is not (n a + x) / (n + 1), by trying its function on numbers."""
    for count in (1, 4):
        average, value, number = torch.zeros(1), torch.ones(1), torch.tensor(count)
        if averaged.multi_avg_fn is not None:
            averaged.multi_avg_fn([average], [value], number)
        elif averaged.avg_fn is not None:
            average = averaged.avg_fn(average, value, number)
        else:
            return
        weight = float(average)
        if abs(weight * (count + 1) - 1) > 1e-3:
            raise ValueError(
                f"averaged must be an equal average, which gives iterate {count + 1} the weight {1 / (count + 1):g}; "
                f"got one that gives it {weight:g}, as an exponential average does."
            )


def _digest(layout: ParameterLayout, wrapper: str = "") -> int:
    """Return 63 bits that name the parameters and shapes of a layout, whatever their dtypes."""
    metadata = layout.to_metadata()
    text = json.dumps([[wrapper + name for name in metadata["names"]], metadata["shapes"]])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
