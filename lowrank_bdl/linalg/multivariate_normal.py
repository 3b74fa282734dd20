"""gpytorch's multivariate normal, exact for low-rank-plus-diagonal covariances and for their inverses."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import gpytorch
import torch
from linear_operator.operators import DiagLinearOperator, LinearOperator
from torch import Tensor
from torch.distributions.kl import register_kl

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.columns import Fold
from lowrank_bdl.linalg.divergences import kl_gaussians, structured
from lowrank_bdl.linalg.indices import plain_index, same_index
from lowrank_bdl.linalg.inverse import InverseLowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.linalg.structured import StructuredLinearOperator
from lowrank_bdl.linalg.transforms import transformed

LOG_2PI = math.log(2 * math.pi)

Shape: TypeAlias = int | Sequence[int]
_ONE_DRAW = torch.Size()


@exact_methods
class MultivariateNormal(gpytorch.distributions.MultivariateNormal):
    r"""N(m, Sigma) with every method exact, O(D K^2) at most, and of one law.

    gpytorch's own class draws through a rank-100 Lanczos root above 800 dimensions, takes entropy and KL through dense
    or Lanczos factors and floors float32 variances at 1e-6. Here draws, densities, entropy, variance and KL speak of
    the same Sigma. Sums over D (log_prob, entropy, KL) come in float64, since one ulp of float32 at 10^7 nat is a nat.
    Point masses of Sigma are left out of the density; log_prob is -inf off their value.

    Args:
        mean: :math:`m`, shape ``(*B, D)`` [parameter].
        covariance_matrix: A `LowRankPlusDiagLinearOperator`, its `inverse()`, or another operator of this library,
            such as a block-diagonal one or a sum. linear_operator's diagonal and `LowRankRootAddedDiagLinearOperator`
            are converted; of its other classes, as of sums, what their structure does not have is computed densely up
            to 800 dimensions and refused above. Shape ``(*B, D, D)`` [parameter²].
        validate_args: As in torch.distributions.

    Raises:
        TypeError: If the covariance is no operator.
        ShapeError: If the shapes do not fit together.

    Example:
        >>> import torch
        >>> sigma = LowRankPlusDiagLinearOperator(torch.ones(3, 1).double(), torch.ones(3).double())
        >>> normal = MultivariateNormal(torch.zeros(3).double(), sigma)
        >>> normal.variance
        tensor([2., 2., 2.], dtype=torch.float64)
        >>> dense = torch.distributions.MultivariateNormal(normal.mean, sigma.to_dense())
        >>> torch.allclose(normal.log_prob(normal.mean), dense.log_prob(dense.mean))
        True
    """

    def __init__(self, mean: Tensor, covariance_matrix: LinearOperator, validate_args: bool = False) -> None:
        if not isinstance(covariance_matrix, LinearOperator):
            raise TypeError(
                "covariance_matrix must be a linear operator, such as a LowRankPlusDiagLinearOperator or its "
                f"inverse(); got {type(covariance_matrix).__name__}. gpytorch's class takes tensors."
            )
        covariance_matrix = structured(covariance_matrix)
        covariance_matrix._require_square("a covariance")
        if mean.ndim < 1 or mean.shape[-1] != covariance_matrix.shape[-1]:
            raise ShapeError(f"mean must be (*B, {covariance_matrix.shape[-1]}); got {tuple(mean.shape)}.")
        super().__init__(mean, covariance_matrix, validate_args)
        self._validate_args = validate_args  # gpytorch lets torch put it back to False

    @property
    def _sigma(self) -> StructuredLinearOperator:
        covariance = self.lazy_covariance_matrix
        assert isinstance(covariance, StructuredLinearOperator)
        return covariance

    def _num_free(self) -> Tensor | int:
        sigma = self._sigma
        base = sigma.base if isinstance(sigma, InverseLowRankPlusDiagLinearOperator) else sigma
        if not isinstance(base, LowRankPlusDiagLinearOperator):
            return int(self.loc.shape[-1])
        return base.num_free()

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Return the log-density of values ``(*S, *B, D)``, shape ``(*S, *B)`` [nat], float64.

        Cost: a factorisation, once, and two reads of the root for all values together.
        """
        if value.shape[-1] != self.loc.shape[-1]:
            raise ShapeError(f"value must be (..., {self.loc.shape[-1]}); got {tuple(value.shape)}.")
        if self._validate_args:
            self._validate_sample(value)
        sigma, loc = self._sigma, self.loc
        core = sigma._core.batch_shape if isinstance(sigma, LowRankPlusDiagLinearOperator) else sigma.batch_shape
        while loc.ndim > len(core) + 1 and loc.stride(0) == 0:  # an expanded mean is one mean
            loc = loc[0]
        if not isinstance(sigma, LowRankPlusDiagLinearOperator) or loc.shape[:-1] != core:
            fold = Fold((value - self.loc).unsqueeze(-1), self.batch_shape, sigma.batch_shape, value.shape[-1])
            columns, log_det = sigma.inv_quad_logdet(fold.columns, logdet=True, reduce_inv_quad=False)
            quadratic = fold.undo(columns.unsqueeze(-2)).squeeze(-1).squeeze(-1)
        else:  # the mean is subtracted chunk by chunk: no difference of the size of value is formed
            fold = Fold(value.unsqueeze(-1), self.batch_shape, core, value.shape[-1])
            columns, log_det = sigma._inv_quad_logdet(fold.columns, loc)
            quadratic = fold.undo(columns.unsqueeze(-2)).squeeze(-1).squeeze(-1)
        return -0.5 * (quadratic + log_det + self._num_free() * LOG_2PI)

    def entropy(self) -> Tensor:
        """Return the differential entropy over the free coordinates, shape ``(*B,)`` [nat], float64."""
        result = 0.5 * (self._sigma.logdet() + self._num_free() * (1 + LOG_2PI))
        return result.expand(self.batch_shape)

    def rsample(
        self, sample_shape: Shape = _ONE_DRAW, base_samples: Tensor | None = None, generator: Any = None
    ) -> Tensor:
        """Draw, with gradients to mean, root, diagonal and mix.

        Args:
            sample_shape: A number of draws or a shape S.
            base_samples: Standard normals ``(*S, *B, D)`` to transform instead, by the square D x D root.
            generator: Source of the normals; None means torch's default generator.

        Returns:
            Draws, shape ``(*S, *B, D)``.

        Cost: one read of the root and S D normals; no memory beyond the result where no gradient is asked for.
        """
        if base_samples is not None:
            given: Tensor = super().rsample(_as_size(sample_shape), base_samples)
            return given
        shape = _as_size(sample_shape)
        sigma = self._sigma
        if self.loc.shape[:-1] != self.batch_shape or sigma.batch_shape != self.batch_shape:
            return self.expand(self.batch_shape).rsample(shape, generator=generator)
        draws: Tensor
        if not hasattr(sigma, "sample"):
            if generator is not None:
                raise NotImplementedError(f"draws of a {type(sigma).__name__} take no generator.")
            draws = sigma.zero_mean_mvn_samples(shape.numel()) + self.loc
        elif transformed() or (self.loc.requires_grad and torch.is_grad_enabled()):
            draws = sigma.sample(shape.numel(), generator) + self.loc
        else:
            draws = sigma.sample(shape.numel(), generator, mean=self.loc)
        return draws.view(*shape, *self.loc.shape)

    def sample(
        self, sample_shape: Shape = _ONE_DRAW, base_samples: Tensor | None = None, generator: Any = None
    ) -> Tensor:
        """Draw without gradients; see `rsample`."""
        with torch.no_grad():
            return self.rsample(sample_shape, base_samples, generator)

    @property
    def variance(self) -> Tensor:
        """The marginal variances ``(*B, D)`` as they are: nothing is floored."""
        diagonal: Tensor = self._sigma.diagonal()
        return diagonal.expand(*self.batch_shape, -1)

    @property
    def stddev(self) -> Tensor:
        """The marginal standard deviations ``(*B, D)``."""
        return self.variance.sqrt()

    def expand(self, batch_size: Shape, _instance: Any = None) -> "MultivariateNormal":
        """Return the distribution with batch shape ``batch_size``, as views."""
        batch = _as_size(batch_size)
        covariance = self._sigma._expand_batch(batch)
        return type(self)(self.loc.expand(*batch, -1), covariance, self._validate_args)

    def __getitem__(self, idx: Any) -> gpytorch.distributions.MultivariateNormal:
        """Return batch entries, or the marginal over coordinates chosen by a slice, mask or list, structure kept.

        One coordinate of one distribution is a distribution of one dimension; one coordinate of a batch is gpytorch's
        own: a vector with independent entries.
        """
        if self.loc.shape[:-1] != self.batch_shape or self._sigma.batch_shape != self.batch_shape:
            return self.expand(self.batch_shape)[idx]
        *batch, last = plain_index(idx, self.loc.shape, self.loc.device)
        entry = all(isinstance(part, int) for part in batch)
        if isinstance(last, int) and not entry:
            places = (*batch, last)
            variance = DiagLinearOperator(self.variance[places])
            return gpytorch.distributions.MultivariateNormal(self.loc[places], variance)
        if isinstance(last, Tensor) and any(isinstance(part, Tensor) for part in batch):
            raise IndexError(
                "a list of batch entries beside a list of coordinates chooses pairs, which have no joint distribution "
                "here; index one after the other: p[entries][..., coordinates]."
            )
        last = slice(last, last + 1) if isinstance(last, int) else last
        loc, sigma = self.loc, self._sigma
        if any(not same_index(part, slice(None), n) for part, n in zip(batch, self.batch_shape, strict=True)):
            loc, sigma = loc[tuple(batch)], sigma[tuple(batch)]
        return type(self)(loc[..., last], sigma.select(last, last), self._validate_args)

    def confidence_region(self) -> tuple[Tensor, Tensor]:
        """Return mean minus and plus 2 standard deviations, each ``(*B, D)``."""
        width = 2 * self.stddev
        return self.mean - width, self.mean + width


def _as_size(shape: Shape) -> torch.Size:
    """Return a number of draws or a sequence of ints as a `torch.Size`."""
    return torch.Size((shape,) if isinstance(shape, int) else tuple(shape))


@register_kl(MultivariateNormal, MultivariateNormal)  # type: ignore[untyped-decorator]
@register_kl(MultivariateNormal, gpytorch.distributions.MultivariateNormal)  # type: ignore[untyped-decorator]
@register_kl(gpytorch.distributions.MultivariateNormal, MultivariateNormal)  # type: ignore[untyped-decorator]
def kl_multivariate_normal(
    p: gpytorch.distributions.MultivariateNormal, q: gpytorch.distributions.MultivariateNormal
) -> Tensor:
    """Return KL(p || q), shape ``(*B,)`` [nat], float64; see `divergences.py`. One of the two may be gpytorch's own."""
    return kl_gaussians(p.lazy_covariance_matrix, q.lazy_covariance_matrix, p.loc, q.loc)
