"""gpytorch's multivariate normal, exact for low-rank-plus-diagonal covariances and for their inverses."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import gpytorch
import torch
from linear_operator.operators import DiagLinearOperator, LinearOperator, LowRankRootAddedDiagLinearOperator
from torch import Tensor
from torch.distributions.kl import register_kl

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.columns import Fold
from lowrank_bdl.linalg.inverse import InverseLowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.kl import kl_differentiable, kl_low_rank
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator

LOG_2PI = math.log(2 * math.pi)

Shape: TypeAlias = int | Sequence[int]
_ONE_DRAW = torch.Size()


class MultivariateNormal(gpytorch.distributions.MultivariateNormal):
    r"""N(m, Sigma) with every method exact, O(D K^2) at most, and of one law.

    gpytorch's own class draws through a rank-100 Lanczos root above 800 dimensions, takes entropy and KL through dense
    or Lanczos factors and floors float32 variances at 1e-6. Here draws, densities, entropy, variance and KL speak of
    the same Sigma. Sums over D (log_prob, entropy, KL) come in float64, since one ulp of float32 at 10^7 nat is a nat.
    Point masses of Sigma are left out of the density; log_prob is -inf off their value.

    Args:
        mean: :math:`m`, shape ``(*B, D)`` [parameter].
        covariance_matrix: A `LowRankPlusDiagLinearOperator`, its `inverse()`, or linear_operator's
            `LowRankRootAddedDiagLinearOperator`, which is converted; shape ``(*B, D, D)`` [parameter²].
        validate_args: As in torch.distributions.

    Raises:
        TypeError: If the covariance is of another class.
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
        if not isinstance(covariance_matrix, LowRankPlusDiagLinearOperator | InverseLowRankPlusDiagLinearOperator):
            if not isinstance(covariance_matrix, LowRankRootAddedDiagLinearOperator):
                raise TypeError(
                    "covariance_matrix must be a LowRankPlusDiagLinearOperator or its inverse(), got "
                    f"{type(covariance_matrix).__name__}; gpytorch.distributions.MultivariateNormal takes any."
                )
            covariance_matrix = LowRankPlusDiagLinearOperator.from_linear_operator(covariance_matrix)
        if mean.ndim < 1 or mean.shape[-1] != covariance_matrix.shape[-1]:
            raise ShapeError(f"mean must be (*B, {covariance_matrix.shape[-1]}); got {tuple(mean.shape)}.")
        super().__init__(mean, covariance_matrix, validate_args)

    @property
    def _sigma(self) -> LowRankPlusDiagLinearOperator | InverseLowRankPlusDiagLinearOperator:
        covariance = self.lazy_covariance_matrix
        assert isinstance(covariance, LowRankPlusDiagLinearOperator | InverseLowRankPlusDiagLinearOperator)
        return covariance

    def _num_free(self) -> Tensor:
        sigma = self._sigma
        base = sigma.base if isinstance(sigma, InverseLowRankPlusDiagLinearOperator) else sigma
        return base._core.capacitance().num_free.expand(sigma.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Return the log-density of values ``(*S, *B, D)``, shape ``(*S, *B)`` [nat], float64.

        Cost: a factorisation, once, and two reads of the root for all values together.
        """
        if value.shape[-1] != self.loc.shape[-1]:
            raise ShapeError(f"value must be (..., {self.loc.shape[-1]}); got {tuple(value.shape)}.")
        sigma, loc = self._sigma, self.loc
        core = torch.Size() if isinstance(sigma, InverseLowRankPlusDiagLinearOperator) else sigma._core.batch_shape
        while loc.ndim > len(core) + 1 and loc.stride(0) == 0:  # an expanded mean is one mean
            loc = loc[0]
        if isinstance(sigma, InverseLowRankPlusDiagLinearOperator) or loc.shape[:-1] != core:
            difference = (value - self.loc).unsqueeze(-1)
            quadratic, log_det = sigma.inv_quad_logdet(difference, logdet=True)
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
            transformed: Tensor = super().rsample(_as_size(sample_shape), base_samples)
            return transformed
        shape = _as_size(sample_shape)
        sigma = self._sigma
        if self.loc.shape[:-1] != self.batch_shape or sigma.batch_shape != self.batch_shape:
            return self.expand(self.batch_shape).rsample(shape, generator=generator)
        draws: Tensor
        if self.loc.requires_grad and torch.is_grad_enabled():
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
        return type(self)(self.loc.expand(*batch, -1), covariance)

    def __getitem__(self, idx: Any) -> gpytorch.distributions.MultivariateNormal:
        """Return batch entries, or the marginal over coordinates chosen by a slice or LongTensor, structure kept.

        One coordinate of one distribution is a distribution of one dimension; one coordinate of a batch is gpytorch's
        own: a vector with independent entries.
        """
        idx = idx if isinstance(idx, tuple) else (idx,)
        if any(part is Ellipsis for part in idx):
            place = next(i for i, part in enumerate(idx) if part is Ellipsis)
            fill = (slice(None),) * (self.loc.ndim - len(idx) + 1)
            idx = idx[:place] + fill + idx[place + 1 :]
        if len(idx) > self.loc.ndim:
            raise IndexError(f"too many indices for a distribution of shape {tuple(self.loc.shape)}: {len(idx)}.")
        sigma = self._sigma
        if len(idx) < self.loc.ndim:
            return type(self)(self.loc[idx], sigma[idx])
        last = idx[-1]
        if isinstance(sigma, InverseLowRankPlusDiagLinearOperator):
            raise NotImplementedError("marginals of a Gaussian given by its precision are not implemented.")
        if isinstance(last, int) and not self.batch_shape:
            last = slice(range(self.loc.shape[-1])[last], range(self.loc.shape[-1])[last] + 1)
        elif isinstance(last, int):
            variance = DiagLinearOperator(self.variance[idx])
            return gpytorch.distributions.MultivariateNormal(self.loc[idx], variance)
        batch = idx[:-1]
        sigma = sigma[batch] if batch else sigma
        assert isinstance(sigma, LowRankPlusDiagLinearOperator)
        return type(self)(self.loc[batch][..., last], sigma.select(last, last))


def _as_size(shape: Shape) -> torch.Size:
    """Return a number of draws or a sequence of ints as a `torch.Size`."""
    return torch.Size((shape,) if isinstance(shape, int) else tuple(shape))


@register_kl(MultivariateNormal, MultivariateNormal)  # type: ignore[untyped-decorator]
def kl_multivariate_normal(p: MultivariateNormal, q: MultivariateNormal) -> Tensor:
    """Return KL(p || q), shape ``(*B,)`` [nat], float64; see `kl.py` for the formula and its cost."""
    if p.event_shape != q.event_shape:
        raise ShapeError(f"KL needs equal dimensions; got {p.event_shape[0]} and {q.event_shape[0]}.")
    sigma_p, sigma_q = p._sigma, q._sigma
    if not isinstance(sigma_p, LowRankPlusDiagLinearOperator) or not isinstance(sigma_q, LowRankPlusDiagLinearOperator):
        raise NotImplementedError("KL between Gaussians given by their precision is not implemented.")
    batch = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    factors_p, factors_q = (s._expand_batch(batch).factors for s in (sigma_p, sigma_q))
    means = p.loc.expand(*batch, -1), q.loc.expand(*batch, -1)
    tensors = (*vars(factors_p).values(), *vars(factors_q).values(), *means)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return kl_differentiable(factors_p, factors_q, *means)
    return kl_low_rank(factors_p, factors_q, *means)
