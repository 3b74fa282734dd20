"""The Gaussian over one layer's weights whose covariance is diagonal in a Kronecker product of eigenbases."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lowrank_bdl.errors import CheckpointError, NonFiniteError, NotPSDError, ShapeError
from lowrank_bdl.linalg.kronecker import KroneckerSpectralLinearOperator, kl_kronecker
from lowrank_bdl.linalg.moments import first_unusable
from lowrank_bdl.linalg.multivariate_normal import LOG_2PI
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.gaussian import check_same_parameters, kl_divergence, sample_size
from lowrank_bdl.posteriors.storage import StoredPosterior, required


@exact_methods
class KroneckerGaussian(StoredPosterior, kind="kronecker gaussian"):
    r"""The distribution :math:`N(m, \Sigma)` of one layer, :math:`\Sigma` diagonal in a Kronecker product of bases.

    Args:
        mean: :math:`m`, shape ``(d,)``: the layer's weight, row by row, and after it its bias if that belongs to the
            block [parameter].
        covariance: :math:`\Sigma` [parameter²].
        layout: Names and shapes of the coordinates, or None.
        provenance: Where it came from, as JSON values by name.

    Attributes:
        layout: As given.
        provenance: As given; saved with the posterior.

    Raises:
        ShapeError: If mean, covariance and layout do not agree on d.
        TypeError: If the covariance is of another class.
        NonFiniteError: If an entry of the mean is not finite.

    Example:
        >>> eye, values = torch.eye(2, dtype=torch.float64)[None], torch.full((1, 2, 2), 0.25, dtype=torch.float64)
        >>> block = KroneckerGaussian(torch.zeros(4), KroneckerSpectralLinearOperator(eye, eye, values))
        >>> block.stddev
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
        >>> round(block.log_prob(torch.zeros(4)).item(), 4)  # 4 log 2 - 2 log(2 pi)
        -0.9032
    """

    def __init__(
        self,
        mean: Tensor,
        covariance: KroneckerSpectralLinearOperator,
        layout: ParameterLayout | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(covariance, KroneckerSpectralLinearOperator):
            raise TypeError(f"covariance must be a KroneckerSpectralLinearOperator; got {type(covariance).__name__}.")
        if mean.ndim != 1 or covariance.shape[-1] != len(mean):
            raise ShapeError(
                f"mean must be (d,) and covariance d x d; got {tuple(mean.shape)} and {tuple(covariance.shape)}."
            )
        if layout is not None and layout.numel != len(mean):
            raise ShapeError(f"layout has {layout.numel} coordinates; mean and covariance have {len(mean)}.")
        bad = first_unusable(mean.detach(), float("inf"))
        if bad is not None:
            raise NonFiniteError(f"mean must be finite; entry {bad} is {mean[bad].item()}.")
        self.mean = mean.to(covariance.dtype)
        self.covariance = covariance
        self.layout = layout
        self.provenance = dict(provenance or {})

    @property
    def stddev(self) -> Tensor:
        """Marginal standard deviations, shape ``(d,)`` [parameter]. Cost: one product of the squared eigenvectors."""
        variance: Tensor = self.covariance.diagonal()
        return variance.sqrt()

    def sample(self, n: int | Sequence[int] = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draw weights.

        Args:
            n: How many, or a shape S (``torch.Size()`` for one plain vector).
            generator: Source of the normals; None means torch's default generator.

        Returns:
            Shape ``(n, d)`` or ``(*S, d)``, in the dtype of the mean.

        Raises:
            ValueError: If n is negative.

        Cost: see :meth:`KroneckerSpectralLinearOperator.sample`.
        """
        shape = sample_size(n)
        return self.covariance.sample(shape.numel(), generator, self.mean).view(*shape, len(self.mean))

    def log_prob(self, theta: Tensor) -> Tensor:
        """Return the log-density of ``theta``, shape ``(*S, d)``, as float64 of shape ``(*S,)`` [nat].

        Args:
            theta: Weights.

        Raises:
            ShapeError: If the last axis is not d.

        Cost: one rotation a vector.
        """
        size = len(self.mean)
        if theta.ndim == 0 or theta.shape[-1] != size:
            raise ShapeError(f"theta must have shape (*S, {size}); got {tuple(theta.shape)}.")
        rows = (theta.double() - self.mean.double()).reshape(-1, size)
        # linear_operator's Kronecker products refuse zero columns
        quadratic = self.covariance.inv_quad(rows.mT, reduce_inv_quad=False) if len(rows) else rows.sum(-1)
        return -0.5 * (quadratic.view(theta.shape[:-1]) + self.covariance.logdet() + size * LOG_2PI)

    def entropy(self) -> Tensor:
        """Return the differential entropy, a float64 scalar [nat]. Cost: O(d)."""
        return 0.5 * (self.covariance.logdet() + len(self.mean) * (1 + LOG_2PI))

    def to(self, *args: Any, **kwargs: Any) -> "KroneckerGaussian":
        """Return the posterior on another device or in another dtype, as ``torch.Tensor.to``."""
        covariance = self.covariance.to(*args, **kwargs)
        mean = self.mean.to(device=covariance.device, dtype=covariance.dtype)
        return KroneckerGaussian(mean, covariance, self.layout, self.provenance)

    def __repr__(self) -> str:
        groups, out, inner = self.covariance.eigenvalues.shape
        return f"KroneckerGaussian(numel={len(self.mean)}, factors={groups} x ({out}, {inner}))"

    # ---- files --------------------------------------------------------------------------------------------------

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return mean, eigenvectors and eigenvalues, and whether the last column is a bias."""
        covariance = self.covariance
        tensors = {
            "mean": self.mean.detach(),
            "left_vectors": covariance.left_vectors,
            "right_vectors": covariance.right_vectors,
            "eigenvalues": covariance.eigenvalues,
        }
        return tensors, {"has_bias": covariance.has_bias}

    @classmethod
    def from_state(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        layout: ParameterLayout | None,
        provenance: Mapping[str, Any],
    ) -> Self:
        """Return the posterior of :meth:`to_state`.

        Args:
            tensors: By name.
            metadata: With ``has_bias``.
            layout: Of the coordinates.
            provenance: Where it came from.

        Raises:
            CheckpointError: If a tensor is missing, holds unusable numbers or contradicts another one.
        """
        mean, left, right, values = required(tensors, "mean", "left_vectors", "right_vectors", "eigenvalues")
        has_bias = metadata.get("has_bias")
        if not isinstance(has_bias, bool):
            raise CheckpointError(f"has damaged metadata: has_bias must be true or false, got {has_bias!r}.")
        try:
            covariance = KroneckerSpectralLinearOperator(left, right, values, has_bias, mean.dtype)
        except NotPSDError as error:
            raise CheckpointError(f"contradicts itself: {error}") from error
        return cls(mean, covariance, layout, provenance)


@kl_divergence.register
def _kronecker_kl(p: KroneckerGaussian, q: Any) -> Tensor:
    if not isinstance(q, KroneckerGaussian):
        raise TypeError(
            f"a KL divergence in closed form needs two KroneckerGaussians; got one and a {type(q).__name__}."
        )
    check_same_parameters(p, q)
    return kl_kronecker(p.covariance, q.covariance, p.mean.double() - q.mean.double())
