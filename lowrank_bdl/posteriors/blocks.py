"""Independent Gaussians over consecutive parts of the weights: a block-diagonal covariance."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lowrank_bdl.errors import CheckpointError, ShapeError
from lowrank_bdl.linalg.block_diagonal import BlockDiagonalLinearOperator
from lowrank_bdl.linalg.devices import to_float64
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.gaussian import GaussianPosterior, check_same_parameters, kl_divergence, sample_size
from lowrank_bdl.posteriors.parts import BLOCK, Block, means_of
from lowrank_bdl.posteriors.storage import StoredPosterior, join_states, split_states


@exact_methods
class BlockPosterior(StoredPosterior, kind="block posterior"):
    r"""The distribution :math:`\prod_b N(m_b, \Sigma_b)` over a network's D weights, cut into consecutive blocks.

    Args:
        blocks: Gaussians over consecutive coordinates: :class:`GaussianPosterior` or anything with ``mean``,
            ``stddev``, ``covariance``, ``sample``, ``log_prob``, ``entropy`` and ``to``.
        layout: Names and shapes of all D coordinates together; None for a plain vector.
        provenance: Where it came from, as JSON scalars by name.

    Attributes:
        blocks: As given.
        slices: The coordinates of each block.
        layout: As given.
        provenance: As given; saved with the posterior.

    Raises:
        ShapeError: If there is no block, or blocks and layout do not agree on D.
        TypeError: If a block lacks a method, or dtypes or devices differ.

    Cost: of every method the sum over the blocks.

    Example:
        >>> first = GaussianPosterior.diagonal(torch.zeros(2), torch.tensor([1.0, 4.0]))
        >>> second = GaussianPosterior.diagonal(torch.ones(1), torch.tensor([9.0]))
        >>> posterior = BlockPosterior([first, second])
        >>> posterior.mean, posterior.stddev
        (tensor([0., 0., 1.]), tensor([1., 2., 3.]))
        >>> posterior.sample(5, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([5, 3])
        >>> kl_divergence(posterior, posterior).abs().item() < 1e-6
        True
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        layout: ParameterLayout | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        if not blocks:
            raise ShapeError("a block posterior needs at least 1 block; got none.")
        means = means_of(blocks, "block", BLOCK)
        self._set(tuple(blocks), [mean.numel() for mean in means], layout, provenance)

    def _set(
        self,
        blocks: Sequence[Block],
        sizes: Sequence[int],
        layout: ParameterLayout | None,
        provenance: Mapping[str, Any] | None,
        joint: GaussianPosterior | None = None,
    ) -> None:
        ends = list(accumulate(sizes))
        if layout is not None and layout.numel != ends[-1]:
            raise ShapeError(f"layout has {layout.numel} coordinates; the blocks have {ends[-1]}.")
        self.blocks = blocks
        self.slices = tuple(slice(start, end) for start, end in zip([0, *ends], ends, strict=False))
        self.layout = layout
        self.provenance: dict[str, Any] = dict(provenance or {})
        self._joint = joint

    @classmethod
    def from_joint(cls, posterior: GaussianPosterior, sizes: Sequence[int] | None = None) -> Self:
        r"""Return the block-diagonal part of a Gaussian: its marginals over blocks, made independent.

        The blocks are views of the posterior's deviations, which are not copied; deviations in a narrow dtype with
        block scales are decoded a block at a time, whenever one is used. What the posterior shares with a collector,
        this shares too: it is stale when that is.

        Args:
            posterior: A Gaussian.
            sizes: Coordinates in each block, > 0; None makes one block of each parameter tensor.

        Raises:
            ShapeError: If there are no sizes and no layout, or the sizes do not sum to D.

        Cost: none until it is used.

        Example:
            >>> from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
            >>> covariance = LowRankPlusDiagLinearOperator(torch.ones(3, 1), torch.ones(3))
            >>> joint = GaussianPosterior(torch.zeros(3), covariance)
            >>> BlockPosterior.from_joint(joint, [1, 2]).covariance.to_dense()
            tensor([[2., 0., 0.],
                    [0., 2., 1.],
                    [0., 1., 2.]])
        """
        if sizes is None:
            if posterior.layout is None:
                raise ShapeError("blocks are parameter tensors and need a layout; this posterior has none: give sizes.")
            sizes = [size for size in posterior.layout.sizes if size]
        numel = posterior.mean.numel()
        if not sizes or any(size < 1 for size in sizes) or sum(sizes) != numel:
            raise ShapeError(f"sizes must be positive and sum to {numel}; got {list(sizes)}.")
        self = cls.__new__(cls)
        ends = list(accumulate(sizes))
        where = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        blocks = _Marginals(posterior, where)
        self._set(blocks, sizes, posterior.layout, {**posterior.provenance, "blocks": len(sizes)}, joint=posterior)
        return self

    # ---- moments ------------------------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """The mean, shape ``(D,)`` [parameter]."""
        return torch.cat([block.mean for block in self.blocks]) if self._joint is None else self._joint.mean

    @property
    def stddev(self) -> Tensor:
        """Marginal standard deviations, shape ``(D,)`` [parameter]."""
        return torch.cat([block.stddev for block in self.blocks]) if self._joint is None else self._joint.stddev

    @property
    def covariance(self) -> BlockDiagonalLinearOperator:
        """The block-diagonal covariance, D x D [parameter²]; decodes deviations that are stored in a narrow dtype."""
        return BlockDiagonalLinearOperator(*(block.covariance for block in self.blocks))

    # ---- draws and densities ------------------------------------------------------------------------------------

    def sample(self, n: int | Sequence[int] = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draw weights, block after block from one stream of normals.

        Args:
            n: How many, or a shape S (``torch.Size()`` for one plain vector).
            generator: Source of the normals; None means torch's default generator.

        Returns:
            Shape ``(n, D)`` or ``(*S, D)``.

        Cost: that of the blocks; memory of the result and of one block's draws.
        """
        shape = sample_size(n)
        number = shape.numel()
        result: Tensor | None = None
        for block, where in self._parts():
            draws = block.sample(number, generator)
            if result is None:
                result = draws.new_empty((number, self.slices[-1].stop))
            result[:, where] = draws
        assert result is not None
        return result.view(*shape, result.shape[-1])

    def log_prob(self, theta: Tensor) -> Tensor:
        """Return the log-density of ``theta``, shape ``(*S, D)``, as float64 of shape ``(*S,)`` [nat].

        Point masses are left out; off their value the result is -inf.

        Raises:
            ShapeError: If the last axis is not D.
        """
        dim = self.slices[-1].stop
        if theta.ndim == 0 or theta.shape[-1] != dim:
            raise ShapeError(f"theta must have shape (*S, {dim}); got {tuple(theta.shape)}.")
        return self._sum(lambda block, where: block.log_prob(theta[..., where]))

    def entropy(self) -> Tensor:
        """Return the differential entropy, a float64 scalar [nat], point masses left out."""
        return self._sum(lambda block, where: block.entropy())

    def _parts(self) -> Iterator[tuple[Block, slice]]:
        return zip(self.blocks, self.slices, strict=True)

    def _sum(self, term: Callable[[Block, slice], Tensor]) -> Tensor:
        return torch.stack([to_float64(term(block, where)) for block, where in self._parts()]).sum(0)

    # ---- conversions and files ----------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> "BlockPosterior":
        """Return the posterior on another device or in another dtype, as ``torch.Tensor.to``."""
        if self._joint is not None:
            return self._from_joint(self._joint.to(*args, **kwargs), self._sizes, self.provenance)
        return BlockPosterior([block.to(*args, **kwargs) for block in self.blocks], self.layout, self.provenance)

    @property
    def _sizes(self) -> list[int]:
        return [where.stop - where.start for where in self.slices]

    @classmethod
    def _from_joint(cls, joint: GaussianPosterior, sizes: Sequence[int], provenance: Mapping[str, Any]) -> Self:
        self = cls.from_joint(joint, sizes)
        self.provenance = dict(provenance)
        return self

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the states of the blocks; of blocks that share deviations, that of the joint Gaussian and the sizes.

        Raises:
            TypeError: If a block has no file format.
        """
        if self._joint is not None:
            return self._joint.to_state()[0], {"sizes": self._sizes}
        tensors, parts = join_states(self.blocks)
        return tensors, {"parts": parts}

    @classmethod
    def from_state(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        layout: ParameterLayout | None,
        provenance: Mapping[str, Any],
    ) -> Self:
        """Return the posterior of :meth:`to_state`."""
        sizes = metadata.get("sizes")
        if sizes is None:
            blocks = split_states(tensors, metadata.get("parts"))
            return cls(blocks, layout, provenance)  # type: ignore[arg-type]
        if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
            raise CheckpointError(f"has damaged metadata: sizes must be a list of integers, got {sizes!r:.80}.")
        joint = GaussianPosterior.from_state(tensors, {}, layout, {})
        return cls._from_joint(joint, sizes, provenance)

    def __repr__(self) -> str:
        return f"BlockPosterior(numel={self.slices[-1].stop}, blocks={len(self.slices)})"


class _Marginals(Sequence[GaussianPosterior]):
    """Marginals of a Gaussian over runs of coordinates; kept once made, unless they had to be decoded."""

    def __init__(self, joint: GaussianPosterior, slices: Sequence[slice]) -> None:
        self._joint, self._slices = joint, slices
        self._made: dict[int, GaussianPosterior] = {}

    def __len__(self) -> int:
        return len(self._slices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        if number not in self._made:
            covariance = self._joint.covariance
            where = self._slices[number]
            block = GaussianPosterior(self._joint.mean[where], covariance.select(where, where))
            if covariance.root_scale is not None:
                return block
            self._made[number] = block
        return self._made[number]


@kl_divergence.register
def _blockwise_kl(p: BlockPosterior, q: Any) -> Tensor:
    if not isinstance(q, BlockPosterior):
        return kl_divergence.dispatch(object)(p, q)
    check_same_parameters(p, q)
    if p.slices != q.slices:
        raise ShapeError(f"p and q must have blocks of the same sizes; got {p._sizes} and {q._sizes}.")
    pairs = zip(p.blocks, q.blocks, strict=True)
    return torch.stack([kl_divergence(left, right) for left, right in pairs]).sum()
