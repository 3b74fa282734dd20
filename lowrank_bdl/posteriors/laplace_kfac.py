"""Laplace's approximation with Kronecker-factored curvature."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from lowrank_bdl.curvature.scores import Labels
from lowrank_bdl.linalg.kronecker import KroneckerSpectralLinearOperator
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.parameters.batches import CallFn, TargetFn
from lowrank_bdl.parameters.selection import Selector
from lowrank_bdl.posteriors.blocks import BlockPosterior
from lowrank_bdl.posteriors.gaussian import GaussianPosterior
from lowrank_bdl.posteriors.laplace import Laplace
from lowrank_bdl.posteriors.laplace_block import KroneckerGaussian

OTHERS = ("diagonal", "fixed")


@dataclass(frozen=True)
class ParameterKinds:
    """How each parameter is treated.

    Attributes:
        kronecker: Names that belong to a Kronecker block.
        diagonal: Names with variances from the diagonal Fisher.
        fixed: Names that stay at the mean: point masses.
    """

    kronecker: tuple[str, ...]
    diagonal: tuple[str, ...]
    fixed: tuple[str, ...]


@exact_methods
class KFACLaplace(Laplace[BlockPosterior]):
    r"""Laplace's approximation with a Kronecker-factored block a layer: :math:`(N A \otimes G + \tau I)^{-1}`.

    For each fully connected and convolution layer (any stride, padding, dilation, groups)
    :math:`A = E[\sum_t a_t a_t^\top]` of its inputs, with a 1 appended if there is a bias, and
    :math:`G = E[g g^\top]` of the gradients at its outputs, over all N examples. The inverse is taken exactly through
    the eigenbases of A and G: :math:`\tau` adds to the product of eigenvalues, and is not split over the factors.

    Two layers that share a weight, a weight that is used outside its layer, and layers that do not have the examples on
    the first axis are found and get a diagonal, as do batch norms and all other parameters.

    Args:
        model: The network; its weights now are the mean. It is evaluated by :meth:`fit`, never changed.
        labels: Which y: ``"expected"`` (the generalised Gauss-Newton matrix), ``"sampled"`` (one draw from the model an
            example, what K-FAC takes) or ``"true"`` (the empirical Fisher). There is no default, since they differ.
        likelihood: ``"categorical"``, ``"bernoulli"`` or ``"gaussian"``.
        noise_variance: Of the Gaussian likelihood.
        include: Parameters to treat, by name pattern or predicate; all that require a gradient if None.
        exclude: Parameters to leave out of these.
        others: Parameters without Kronecker factors: ``"diagonal"`` for variances from their diagonal Fisher,
            ``"fixed"`` for point masses at the mean.
        call_fn: ``call_fn(model, batch)`` gives the outputs; None calls ``model(x)``, or
            ``model(**entries).logits`` on a mapping without its targets.
        target_fn: ``target_fn(batch)`` gives the targets; None takes y, or a mapping's ``labels`` or ``targets``.

    Raises:
        ValueError: If ``labels``, ``likelihood``, ``noise_variance`` or ``others`` is unknown or unusable.
        ShapeError: If no parameter is selected.
        NonFiniteError: If a weight is not finite.

    Cost: for a layer with o outputs and m inputs o² + m² float64 numbers in place of (o m)², and one eigendecomposition
    of each factor after the pass over the data; every prior precision and scale shares it.

    Source: Ritter, Botev and Barber, "A Scalable Laplace Approximation for Neural Networks" (ICLR 2018).

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> data = [(torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(4)]
        >>> laplace = KFACLaplace(net, labels="sampled")
        >>> posterior = laplace.fit(data, weight_decay=1e-2, progress=False).posterior()
        >>> posterior.sample(5).shape
        torch.Size([5, 26])
        >>> laplace.kinds.kronecker
        ('0.weight', '0.bias', '2.weight', '2.bias')
    """

    _kronecker = True

    def __init__(
        self,
        model: nn.Module,
        *,
        labels: Labels,
        likelihood: str = "categorical",
        noise_variance: float = 1.0,
        include: "Selector | None" = None,
        exclude: "Selector | None" = None,
        others: str = "diagonal",
        call_fn: CallFn | None = None,
        target_fn: TargetFn | None = None,
    ) -> None:
        if others not in OTHERS:
            raise ValueError(f"others must be 'diagonal' or 'fixed'; got {others!r}.")
        super().__init__(
            model,
            labels=labels,
            likelihood=likelihood,
            noise_variance=noise_variance,
            include=include,
            exclude=exclude,
            call_fn=call_fn,
            target_fn=target_fn,
        )
        self.others = others

    @property
    def _diagonal(self) -> bool:
        return self.others == "diagonal"

    @property
    def kinds(self) -> ParameterKinds:
        """How each parameter is treated, as the first batch of the data showed.

        Raises:
            ValueError: Before :meth:`fit`.
        """
        curvature = self.fisher.kronecker.values()
        kronecker = {name for each in curvature for name in each.layer.parameters}
        rest = tuple(name for name in self.layout.names if name not in kronecker)
        free = self._diagonal
        return ParameterKinds(
            tuple(name for name in self.layout.names if name in kronecker), rest if free else (), () if free else rest
        )

    def eigenvalues(self) -> Iterator[Tensor]:
        """Yield the eigenvalues of the data's curvature, block by block."""
        for curvature in self.fisher.kronecker.values():
            yield curvature.eigenvalues
        yield from self.fisher.diagonal.values()

    def _free_names(self) -> list[str]:
        return [*self.kinds.kronecker, *self.kinds.diagonal]

    def posterior(self, prior_precision: float | None = None, scale: float = 1.0) -> BlockPosterior:
        r"""Return independent Gaussians: a Kronecker block a layer, diagonals and point masses between them.

        Args:
            prior_precision: τ; None takes :attr:`prior_precision`.
            scale: Multiplies the covariance.

        Returns:
            The posterior. Its blocks share the eigenvectors with this object and with each other's posteriors.

        Raises:
            ValueError: Before :meth:`fit`, or if τ or the scale is not a positive number.

        Cost: O(D) for the eigenvalues.
        """
        precision = self._resolve(prior_precision)
        provenance = self._provenance("kfac", precision, scale)
        provenance["others"] = self.others
        kinds = self.kinds
        in_block = set(kinds.kronecker)
        blocks: list[KroneckerGaussian | GaussianPosterior] = []
        for is_kronecker, run in groupby(self.layout.names, key=in_block.__contains__):
            names = list(run)
            if not is_kronecker:
                blocks.append(self._diagonal_block(names, precision, scale))
            else:  # a weight opens a block; a bias inside one follows its weight
                starts = (name for name in names if name in self.fisher.kronecker)
                blocks.extend(self._kronecker_block(name, precision, scale) for name in starts)
        return BlockPosterior(blocks, self.layout, provenance)

    def _kronecker_block(self, weight: str, precision: float, scale: float) -> KroneckerGaussian:
        curvature = self.fisher.kronecker[weight]
        covariance = KroneckerSpectralLinearOperator(
            curvature.left_vectors,
            curvature.right_vectors,
            scale / curvature.eigenvalues.add_(precision),
            has_bias=curvature.layer.bias is not None,
            result_dtype=self.mean.dtype,
        )
        start = self.layout.slices[weight].start
        return KroneckerGaussian(self.mean[start : start + covariance.shape[-1]], covariance)

    def _diagonal_block(self, names: list[str], precision: float, scale: float) -> GaussianPosterior:
        slices = self.layout.slices
        mean = self.mean[slices[names[0]].start : slices[names[-1]].stop]
        if self._diagonal:
            curvature = torch.cat([self.fisher.diagonal[name].flatten() for name in names])
            variance = (scale / curvature.add_(precision)).to(mean.dtype)
        else:
            variance = torch.zeros_like(mean)
        return GaussianPosterior.diagonal(mean, variance)
