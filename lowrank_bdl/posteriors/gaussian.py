"""A Gaussian over network weights whose covariance is low-rank plus diagonal."""

import os
from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

import gpytorch
import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.divergences import kl_gaussians
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.moments import first_unusable
from lowrank_bdl.linalg.multivariate_normal import MultivariateNormal
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.linalg.transforms import transformed
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.selection import Selector
from lowrank_bdl.posteriors import released_formats
from lowrank_bdl.posteriors.released_formats import ReleasedGaussian
from lowrank_bdl.posteriors.storage import StoredPosterior, layout_difference, required


@exact_methods
class GaussianPosterior(StoredPosterior, kind="gaussian posterior"):
    r"""The distribution :math:`N(m, \Sigma)` over a network's D weights, of one law in every method.

    Args:
        mean: :math:`m`, shape ``(D,)`` [parameter].
        covariance: :math:`\Sigma`, D x D, a scale included if there is one [parameter²].
        layout: Names and shapes of the coordinates; None for a Gaussian over a plain vector.
        provenance: Where it came from (iterates averaged, rank, scale, centring, ...), as JSON scalars by name.

    Attributes:
        layout: As given.
        provenance: As given; saved with the posterior.

    Raises:
        ShapeError: If mean, covariance and layout do not agree on D.
        TypeError: If the covariance is of another class.
        NonFiniteError: If an entry of the mean is not finite.

    Example:
        >>> covariance = LowRankPlusDiagLinearOperator(torch.tensor([[1.0], [1.0]]), torch.tensor([0.5, 0.5]))
        >>> posterior = GaussianPosterior(torch.zeros(2), covariance)
        >>> posterior.sample(3, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 2])
        >>> posterior.stddev
        tensor([1.2247, 1.2247])
        >>> kl_divergence(posterior, posterior).abs().item() < 1e-6
        True
    """

    def __init__(
        self,
        mean: Tensor,
        covariance: LowRankPlusDiagLinearOperator,
        layout: ParameterLayout | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(covariance, LowRankPlusDiagLinearOperator):
            raise TypeError(f"covariance must be a LowRankPlusDiagLinearOperator; got {type(covariance).__name__}.")
        if mean.ndim != 1 or covariance.shape != (*mean.shape, *mean.shape):
            raise ShapeError(
                f"mean must be (D,) and covariance D x D; got {tuple(mean.shape)} and {tuple(covariance.shape)}."
            )
        if layout is not None and layout.numel != mean.numel():
            raise ShapeError(f"layout has {layout.numel} coordinates; mean and covariance have {mean.numel()}.")
        bad = first_unusable(mean.detach(), float("inf"))
        if bad is not None:
            raise NonFiniteError(f"mean must be finite; entry {bad} is {mean[bad].item()}.")
        self._mean = mean.to(covariance.dtype)
        self._covariance = covariance
        self.layout = layout
        self.provenance: dict[str, Any] = dict(provenance or {})

    @classmethod
    def diagonal(
        cls,
        mean: Tensor,
        variance: Tensor,
        layout: ParameterLayout | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Self:
        r"""Return :math:`N(m, \mathrm{diag}(v))`: independent weights, a covariance of rank 0.

        Args:
            mean: :math:`m`, shape ``(D,)`` [parameter].
            variance: :math:`v \ge 0`, shape ``(D,)``, float32 or float64; 0 makes a point mass [parameter²].
            layout: As in the class.
            provenance: As in the class.

        Raises:
            ShapeError: If mean, variance and layout do not agree on D.
            ValueError: If a variance is negative, or not finite (NonFiniteError).

        Cost: no copy.

        Example:
            >>> GaussianPosterior.diagonal(torch.zeros(2), torch.tensor([4.0, 0.0])).stddev
            tensor([2., 0.])
        """
        if variance.ndim != 1 or variance.shape != mean.shape:
            raise ShapeError(f"mean and variance must be (D,); got {tuple(mean.shape)} and {tuple(variance.shape)}.")
        bad = first_unusable(variance.detach(), float("inf"))
        if bad is not None:
            raise NonFiniteError(f"variance must be finite; entry {bad} is {variance[bad].item()}.")
        if variance.numel() and not transformed() and bool((variance < 0).any()):
            raise ValueError(f"variance must be >= 0; the smallest is {variance.min().item()}.")
        root = variance.detach().new_empty((0, variance.numel())).mT
        return cls(mean, LowRankPlusDiagLinearOperator(root, variance), layout, provenance)

    # ---- moments ------------------------------------------------------------------------------------------------

    @property
    def covariance(self) -> LowRankPlusDiagLinearOperator:
        """Σ, D x D, every scale included [parameter²].

        Raises:
            StaleError: If it shares its deviations with a collector that has been updated since.
        """
        _ = self._covariance.factors  # raises if stale
        return self._covariance

    @property
    def mean(self) -> Tensor:
        """The mean, shape ``(D,)`` [parameter]; raises StaleError as :attr:`covariance` does."""
        _ = self._covariance.factors
        return self._mean

    @property
    def stddev(self) -> Tensor:
        """Marginal standard deviations, shape ``(D,)`` [parameter]; nothing is floored. Cost: one read of the root."""
        return self.distribution.stddev

    @property
    def distribution(self) -> MultivariateNormal:
        """The same law as a gpytorch distribution, sharing every tensor."""
        return MultivariateNormal(self._mean, self.covariance)

    # ---- draws and densities ------------------------------------------------------------------------------------

    def sample(self, n: int | Sequence[int] = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draw weights.

        Args:
            n: How many, or a shape S (``torch.Size()`` for one plain vector).
            generator: Source of the normals; None means torch's default generator.

        Returns:
            Shape ``(n, D)`` or ``(*S, D)``, in the posterior's dtype.

        Cost: one read of the root and n·D normals; no memory beyond the result.
        """
        return self.distribution.sample(sample_size(n), generator=generator)

    def rsample(self, n: int | Sequence[int] = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draw as :meth:`sample` does, with gradients to mean, root and diagonal."""
        return self.distribution.rsample(sample_size(n), generator=generator)

    def log_prob(self, theta: Tensor) -> Tensor:
        """Return the log-density of ``theta``, shape ``(*S, D)``, as float64 of shape ``(*S,)`` [nat].

        Point masses (zero variance and zero deviations) are left out; off their value the result is -inf.

        Raises:
            ShapeError: If the last axis is not D.

        Cost: O(D K²) once, O(D K) a vector.
        """
        if theta.ndim == 0 or theta.shape[-1] != self._mean.numel():
            raise ShapeError(f"theta must have shape (*S, {self._mean.numel()}); got {tuple(theta.shape)}.")
        return self.distribution.log_prob(theta)

    def entropy(self) -> Tensor:
        """Return the differential entropy, a float64 scalar [nat], point masses left out. Cost: O(D K²)."""
        return self.distribution.entropy()

    # ---- derived posteriors -------------------------------------------------------------------------------------

    def marginal(self, include: "Selector | None" = None, exclude: "Selector | None" = None) -> "GaussianPosterior":
        """Return the exact marginal over some parameters: the same low-rank structure on fewer coordinates.

        Args:
            include: Name pattern, list of them, or predicate; None keeps everything.
            exclude: What to leave out of that.

        Raises:
            ShapeError: If there is no layout to select by, or nothing is selected.

        Cost: views where the kept parameters are neighbours; otherwise a copy of the kept coordinates.
        """
        if self.layout is None:
            raise ShapeError("marginal selects parameters by name and needs a layout; this posterior has none.")
        layout, index = self.layout.subset(include=include, exclude=exclude)
        if layout == self.layout:
            return GaussianPosterior(self._mean, self.covariance, layout, self.provenance)
        if isinstance(index, Tensor):
            index = index.to(self._mean.device)
        covariance = self.covariance.select(index, index)
        assert isinstance(covariance, LowRankPlusDiagLinearOperator)
        return GaussianPosterior(self._mean[index], covariance, layout, self.provenance)

    def to(self, *args: Any, **kwargs: Any) -> "GaussianPosterior":
        """Return the posterior on another device or in another dtype, as ``torch.Tensor.to``."""
        covariance = self.covariance.to(*args, **kwargs)
        mean = self._mean.to(device=covariance.device, dtype=covariance.dtype)
        return GaussianPosterior(mean, covariance, self.layout, self.provenance)

    def __repr__(self) -> str:
        sigma = self._covariance
        return f"GaussianPosterior(numel={self._mean.numel()}, rank={sigma.rank}, dtype={sigma.dtype})"

    # ---- files --------------------------------------------------------------------------------------------------

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return mean, diagonal, deviations as they are stored, and their K x K mix; no copy."""
        covariance = self.covariance
        tensors = {
            "mean": self._mean.detach(),
            "diag": covariance.diag.detach(),
            "deviations": covariance.root.detach().mT,
            "mix": covariance.mix.detach(),
        }
        if covariance.root_scale is not None:
            tensors["deviation_scale"] = covariance.root_scale.detach()
        return tensors, {}

    @classmethod
    def from_state(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        layout: ParameterLayout | None,
        provenance: Mapping[str, Any],
    ) -> Self:
        """Return the posterior of :meth:`to_state`."""
        mean, diag, deviations, mix = required(tensors, "mean", "diag", "deviations", "mix")
        for key, tensor in (("diag", diag), ("mix", mix)):
            bad = first_unusable(tensor.reshape(-1), float("inf"))
            if bad is not None or (key == "diag" and bool((tensor < 0).any())):
                raise NonFiniteError(f"{key} holds negative or non-finite numbers.")
        covariance = LowRankPlusDiagLinearOperator(deviations.mT, diag, mix, root_scale=tensors.get("deviation_scale"))
        return cls(mean, covariance, layout, provenance)

    @classmethod
    def from_swa_gaussian(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        scale: float = 0.5,
        negative_variance: str = "error",
        var_clamp: float = 1e-30,
        max_num_models: int | None = None,
        prefix: str = "base.",
        include: "Selector | None" = None,
        exclude: "Selector | None" = None,
    ) -> "GaussianPosterior":
        r"""Read a checkpoint of the swa_gaussian repository, with the covariance that file defines.

        :math:`\Sigma = \mathrm{scale} (\mathrm{diag}(v) + \tfrac{1}{K - 1} \sum d_k d_k^\top)` with the population
        variance :math:`v = E[x^2] - E[x]^2`, all rows of the file, its zero row included, and K the ``max_num_models``
        of the collector, also where it had seen fewer.

        Args:
            path: ``swag-<epoch>.pt`` ({epoch, state_dict}) or a bare state dict, read with ``weights_only=True``.
            model: The network without the SWAG wrapper: gives names, shapes and order.
            scale: Multiplies the covariance; 0.5 and 1.0 are the repository's settings for SWAG and SWAG-Diag.
            negative_variance: What to do about variances that rounding made negative: ``"error"``; ``"clamp"``, which
                raises every variance to at least ``var_clamp``, as the repository does; or ``"deviations"``, which
                takes :math:`\sum d_k^2 / (\mathrm{rows} - 1)` there.
            var_clamp: The repository's floor [parameter²].
            max_num_models: K. None takes the number of rows, which is K once more models were averaged than there are
                rows; where there are as many, a warning in the log says that K may have been larger.
            prefix: Name of the network inside the file.
            include: Parameters to keep, by name; all that require a gradient if None.
            exclude: Parameters to leave out of these.

        Raises:
            CheckpointError: If a tensor is missing or misshaped, the file has parameters that the model lacks, its rows
                cannot come of ``max_num_models``, or a variance is negative under ``negative_variance="error"`` (the
                message gives how many).

        Returns:
            The posterior; ``provenance["negative_variances"]`` says how many there were, ``"negative_variance"`` what
            was done about them.
        """
        _check_scale(scale)
        law = released_formats.read_swa_gaussian(
            path,
            model,
            negative_variance,
            var_clamp,
            max_num_models=max_num_models,
            prefix=prefix,
            include=include,
            exclude=exclude,
        )
        return cls._from_released(law, scale)

    @classmethod
    def from_drbayes(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        scale: float = 0.5,
        negative_variance: str = "error",
        var_clamp: float = 1e-6,
        include: "Selector | None" = None,
        exclude: "Selector | None" = None,
    ) -> "GaussianPosterior":
        """Read a checkpoint of the drbayes (or understandingbdl) repository, with the covariance that file defines.

        As :meth:`from_swa_gaussian`, for the flat format: ``mean``, ``sq_mean``, ``n_models``,
        ``subspace.cov_mat_sqrt`` over all parameters of the network in the order of ``model.parameters()``.

        Args:
            path: ``swag-<epoch>.pt`` or a bare state dict.
            model: The network: gives names, shapes and order.
            scale: Multiplies the covariance.
            negative_variance: See :meth:`from_swa_gaussian`.
            var_clamp: The floor of these repositories, which also raises small positive variances [parameter²].
            include: Parameters to keep, by name; all that require a gradient if None.
            exclude: Parameters to leave out of these.

        Raises:
            CheckpointError: As :meth:`from_swa_gaussian`.
        """
        _check_scale(scale)
        law = released_formats.read_drbayes(path, model, negative_variance, var_clamp, include=include, exclude=exclude)
        return cls._from_released(law, scale)

    @classmethod
    def _from_released(cls, law: ReleasedGaussian, scale: float) -> "GaussianPosterior":
        covariance = LowRankPlusDiagLinearOperator(
            law.deviations.mT, law.variance.mul_(scale), mix=(scale / law.divisor) ** 0.5
        )
        return cls(law.mean, covariance, law.layout, {**law.provenance, "scale": scale})


@singledispatch
def kl_divergence(p: Any, q: Any) -> Tensor:
    """Return KL(p || q) exactly, a float64 scalar [nat].

    Args:
        p: A Gaussian posterior, one of independent Gaussian blocks, or a MultivariateNormal, this library's or
            gpytorch's.
        q: Another of the same kind over the same parameters; blocks must have the same sizes.

    Raises:
        ShapeError: If the two are over different parameters; names the first that differs.
        TypeError: If the two are of classes whose divergence has no closed form here.

    Cost: O(D (K_p + K_q)²) for Gaussians; the sum over its blocks for a :class:`BlockPosterior`.
    """
    raise TypeError(
        "a KL divergence in closed form needs two GaussianPosteriors, BlockPosteriors or MultivariateNormals; "
        f"got {type(p).__name__} and {type(q).__name__}."
    )


@kl_divergence.register
def _gaussian_kl(p: GaussianPosterior, q: Any) -> Tensor:
    if not isinstance(q, GaussianPosterior):
        return _refuse_kl(p, q)
    check_same_parameters(p, q)
    result: Tensor = torch.distributions.kl_divergence(p.distribution, q.distribution)
    return result


@kl_divergence.register
def _distribution_kl(p: gpytorch.distributions.MultivariateNormal, q: Any) -> Tensor:
    if not isinstance(q, gpytorch.distributions.MultivariateNormal):
        return _refuse_kl(p, q)
    return kl_gaussians(p.lazy_covariance_matrix, q.lazy_covariance_matrix, p.loc, q.loc)


_refuse_kl = kl_divergence.dispatch(object)


def check_same_parameters(p: StoredPosterior, q: StoredPosterior) -> None:
    """Raise ShapeError if two posteriors have layouts that differ; names the first parameter that does."""
    if p.layout is not None and q.layout is not None:
        difference = layout_difference(p.layout, q.layout)
        if difference is not None:
            raise ShapeError(f"p and q are over different parameters: {difference}.")


def sample_size(n: int | Sequence[int]) -> torch.Size:
    """Return a number of draws, or a shape of them, as a shape."""
    if isinstance(n, int) and n < 0:
        raise ValueError(f"the number of draws must be >= 0; got {n}.")
    return torch.Size((n,) if isinstance(n, int) else n)


def _check_scale(scale: float) -> None:
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be a positive number; got {scale}.")
