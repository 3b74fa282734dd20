r"""The Laplace approximation: a Gaussian at a mode of the posterior, with the curvature there as its precision.

MacKay, "A Practical Bayesian Framework for Backpropagation Networks" (Neural Computation 1992); with Kronecker factors
Ritter, Botev and Barber, "A Scalable Laplace Approximation for Neural Networks" (ICLR 2018); evidence of deep networks
Immer et al., "Scalable Marginal Likelihood Estimation for Model Selection in Deep Learning" (ICML 2021).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_bdl.curvature.fisher import FisherSums, fisher_sums
from lowrank_bdl.curvature.scores import LABELS, Labels, resolve_scores
from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.moments import first_unusable
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.parameters.batches import CallFn, TargetFn, batches_of
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.selection import Selector
from lowrank_bdl.posteriors.gaussian import GaussianPosterior
from lowrank_bdl.posteriors.laplace_evidence import log_evidence, most_likely_precision

PosteriorT = TypeVar("PosteriorT")


@exact_methods
class Laplace(ABC, Generic[PosteriorT]):
    r"""What all Laplace approximations share: :math:`N(\theta^*, (H + \tau I)^{-1})` with the data's curvature H.

    :math:`H` is a sum over the N examples, never a mean, and :math:`\tau` the precision of the prior
    :math:`N(0, I / \tau)`. Training with the mean loss and weight decay w finds the mode for :math:`\tau = N w`.

    Attributes:
        layout: Names, shapes and order of the D coordinates.
        mean: :math:`\theta^*`, shape ``(D,)``: the model's weights at construction.
        labels: Which labels the Fisher matrix is made of.
        search: What :meth:`optimize_prior_precision` tried last: pairs of precision and loss, in its order; for the
            evidence the optimum alone, its loss being the negative log evidence.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        labels: Labels,
        likelihood: str = "categorical",
        noise_variance: float = 1.0,
        include: "Selector | None" = None,
        exclude: "Selector | None" = None,
        call_fn: CallFn | None = None,
        target_fn: TargetFn | None = None,
    ) -> None:
        if labels not in LABELS:
            raise ValueError(f"labels must be one of {', '.join(map(repr, LABELS))}; got {labels!r}.")
        self._likelihood = resolve_scores(likelihood, noise_variance)
        self._model, self._call_fn, self._target_fn = model, call_fn, target_fn
        self.labels: Labels = labels
        self.likelihood = likelihood
        self.layout = ParameterLayout.from_module(model, include, exclude)
        self.mean = self.layout.flatten(model)
        bad = first_unusable(self.mean, float("inf"))
        if bad is not None:
            raise NonFiniteError(
                f"the model's weights must be finite; parameter {self.layout.name_of(bad)!r} has {self.mean[bad]}."
            )
        self.search: list[tuple[float, float]] = []
        self._prior_precision: float | None = None
        self._sums: FisherSums | None = None

    # ---- fit ----------------------------------------------------------------------------------------------------

    def fit(
        self,
        loader: Iterable[Any],
        *,
        weight_decay: float | None = None,
        generator: torch.Generator | None = None,
        progress: bool = True,
    ) -> Self:
        """Sum the curvature and the log-likelihood over a data set, in one pass; replaces an earlier fit.

        Every example counts once, whatever the batches' sizes. The network is evaluated at :attr:`mean`, in evaluation
        mode with its batch-norm statistics as they are stored, and is not changed.

        Args:
            loader: Batches ``(x, y)``: the training data, every example once, for N to be their number. Of data that
                are augmented at random the sums are estimates, from one version of each example, of the expected
                curvature that training saw; of data as they are, :attr:`log_likelihood` is that of the labels.
            weight_decay: The w of training; sets :attr:`prior_precision` to N·w.
            generator: Source of the labels with ``labels="sampled"``; None means torch's default generator.
            progress: Show a progress bar.

        Returns:
            The object itself.

        Raises:
            ShapeError: If the loader is empty, a batch is not ``(x, y)`` or does not fit the likelihood, or every
                parameter would be fixed.
            NonFiniteError: If an output, the log-likelihood or a sum is not finite. After an error the earlier fit, if
                any, still stands.
            ValueError: If ``weight_decay`` is not a positive number.
            MemoryLimitError: If the sums do not fit the free memory.

        Cost: one forward and one backward pass over the data; with ``labels="expected"`` one backward pass an output.
        """
        if weight_decay is not None:
            _require_positive("weight_decay", weight_decay)
        sums = fisher_sums(
            self._model,
            self.mean,
            self.layout,
            batches_of(loader),
            self._likelihood,
            self.labels,
            kronecker=self._kronecker,
            diagonal=self._diagonal,
            generator=generator,
            progress=progress,
            call_fn=self._call_fn,
            target_fn=self._target_fn,
        )
        if not (sums.kronecker or sums.diagonal):
            raise ShapeError(
                f"No fully connected or convolution layer of the {len(self.layout.names)} parameters has a weight of "
                "its own, and the others are to be fixed; expected at least one that varies. Use others='diagonal'."
            )
        self._sums = sums
        if weight_decay is not None:
            self.prior_precision = sums.num_data * weight_decay
        return self

    @property
    @abstractmethod
    def _kronecker(self) -> bool:
        """Whether matrices get Kronecker factors."""

    @property
    @abstractmethod
    def _diagonal(self) -> bool:
        """Whether the parameters without Kronecker factors get a diagonal."""

    @property
    def fisher(self) -> FisherSums:
        """The sums over the data.

        Raises:
            ValueError: Before :meth:`fit`.
        """
        if self._sums is None:
            raise ValueError(f"{type(self).__name__} has no data yet; call fit(loader) first.")
        return self._sums

    @property
    def num_data(self) -> int:
        """N, the number of examples that were fitted."""
        return self.fisher.num_data

    @property
    def log_likelihood(self) -> float:
        """Sum of log p(y | f) over the data at the mean, all constants included [nat]."""
        return self.fisher.log_likelihood

    # ---- prior --------------------------------------------------------------------------------------------------

    @property
    def prior_precision(self) -> float | None:
        """τ, the precision of the prior [1/parameter²]; None until it is set, fitted or optimised."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: float) -> None:
        _require_positive("prior_precision", value)
        self._prior_precision = float(value)

    def _resolve(self, prior_precision: float | None) -> float:
        if prior_precision is not None:
            _require_positive("prior_precision", prior_precision)
            return float(prior_precision)
        if self._prior_precision is None:
            raise ValueError(
                "no prior precision is known: give prior_precision=, fit(..., weight_decay=), or call "
                "optimize_prior_precision()."
            )
        return self._prior_precision

    @abstractmethod
    def eigenvalues(self) -> Iterator[Tensor]:
        """Yield the eigenvalues of H >= 0 in float64, a part at a time; fixed parameters have none."""

    @abstractmethod
    def _free_names(self) -> list[str]:
        """Return the parameters that are not fixed."""

    def _squared_norm(self) -> float:
        """Return the squared length of the mean over the parameters that are not fixed."""
        slices = self.layout.slices
        parts = [self.mean[slices[name]].double().square().sum() for name in self._free_names()]
        return torch.stack(parts).sum().item() if parts else 0.0

    def log_marginal_likelihood(self, prior_precision: float | None = None) -> float:
        r"""Return Laplace's estimate of the log evidence, every constant included [nat].

        .. math::
            \log p(D \mid \theta^*) + \log N(\theta^*; 0, I / \tau) + \tfrac{D}{2} \log 2\pi
            - \tfrac{1}{2} \log |H + \tau I|

        over the D parameters that are not fixed. It is exact for a Gaussian posterior if :math:`\theta^*` is the mode
        for this :math:`\tau` and H is exact.

        Args:
            prior_precision: τ; None takes :attr:`prior_precision`. Nothing is stored.

        Raises:
            ValueError: Before :meth:`fit`, or if no τ is known or it is not a positive number.

        Cost: O(D) in float64.

        Source: MacKay (1992); Immer et al. (2021).
        """
        precision = self._resolve(prior_precision)
        return log_evidence(self.log_likelihood, self._squared_norm(), self.eigenvalues(), precision)

    def optimize_prior_precision(
        self,
        method: "str | Callable[[PosteriorT], float]" = "marginal_likelihood",
        *,
        grid: Sequence[float] | None = None,
    ) -> float:
        """Choose τ, and store it as :attr:`prior_precision`.

        Args:
            method: ``"marginal_likelihood"``: the maximum of :meth:`log_marginal_likelihood` at the fitted weights. It
                is unique, and found to 1e-10 relative. Or a function from a posterior to a validation loss, which is
                minimised over ``grid``; on data that neither training nor the test has seen.
            grid: Precisions to try with a function; by default 17 from 1e-8 N to N, half a decade apart: the weight
                decays from 1e-8 to 1.

        Returns:
            τ.

        Raises:
            ValueError: Before :meth:`fit`; if the method is unknown, the grid is empty, holds numbers that are not
                positive or is given for the marginal likelihood; if no precision gives a finite loss; or if the
                evidence has no maximum, since the weights or the curvature are zero.

        Cost: about 50 sums over D; or one call of the function a grid point.
        """
        num_data = self.num_data
        if callable(method):
            points = [num_data * 10 ** (exponent / 2) for exponent in range(-16, 1)] if grid is None else list(grid)
            for point in points:
                _require_positive("each precision of the grid", point)
            found = [(float(point), float(method(self.posterior(point)))) for point in points]
            finite = [(loss, -point) for point, loss in found if math.isfinite(loss)]
            if not finite:
                raise ValueError(f"the validation loss must be finite somewhere on the grid; got {found}.")
            self.search = found
            self.prior_precision = -min(finite)[1]  # of equal losses the larger precision: the narrower posterior
        elif method == "marginal_likelihood":
            if grid is not None:
                raise ValueError("grid goes with a validation loss; the evidence needs none.")
            self.prior_precision = most_likely_precision(self.eigenvalues, self._squared_norm())
            self.search = [(self._resolve(None), -self.log_marginal_likelihood())]
        else:
            raise ValueError(f"method must be 'marginal_likelihood' or a function of a posterior; got {method!r}.")
        return self._resolve(None)

    # ---- result -------------------------------------------------------------------------------------------------

    @abstractmethod
    def posterior(self, prior_precision: float | None = None, scale: float = 1.0) -> PosteriorT:
        r"""Return :math:`N(\theta^*, \mathrm{scale}\,(H + \tau I)^{-1})`.

        Args:
            prior_precision: τ; None takes :attr:`prior_precision`.
            scale: Multiplies the covariance; 1 is Laplace's approximation.

        Raises:
            ValueError: Before :meth:`fit`, or if τ or the scale is not a positive number.
        """

    def _provenance(self, structure: str, prior_precision: float, scale: float) -> dict[str, Any]:
        _require_positive("scale", scale)
        return {
            "source": "laplace",
            "structure": structure,
            "labels": self.labels,
            "likelihood": self.likelihood,
            "num_data": self.num_data,
            "prior_precision": prior_precision,
            "scale": scale,
        }


@exact_methods
class DiagonalLaplace(Laplace[GaussianPosterior]):
    r"""Laplace's approximation with the diagonal of the Fisher matrix: variances :math:`1 / (F_i + \tau)`.

    :math:`F_i = \sum_n E[(\partial_i \log p(y \mid x_n))^2]`, from the gradients of single examples.

    Args:
        model: The network; its weights now are the mean. It is evaluated by :meth:`fit`, never changed.
        labels: Which y: ``"expected"`` (the generalised Gauss-Newton matrix), ``"sampled"`` (one draw from the model an
            example) or ``"true"`` (the empirical Fisher). There is no default, since they differ.
        likelihood: ``"categorical"``, ``"bernoulli"`` or ``"gaussian"``.
        noise_variance: Of the Gaussian likelihood.
        include: Parameters to treat, by name pattern or predicate; all that require a gradient if None.
        exclude: Parameters to leave out of these.
        call_fn: ``call_fn(model, batch)`` gives the outputs; None calls ``model(x)``, or
            ``model(**entries).logits`` on a mapping without its targets.
        target_fn: ``target_fn(batch)`` gives the targets; None takes y, or a mapping's ``labels`` or ``targets``.

    Raises:
        ValueError: If ``labels``, ``likelihood`` or ``noise_variance`` is unknown or unusable.
        ShapeError: If no parameter is selected.
        NonFiniteError: If a weight is not finite.

    Cost: D float64 numbers.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> data = [(torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(4)]
        >>> laplace = DiagonalLaplace(net, labels="expected").fit(data, weight_decay=1e-2, progress=False)
        >>> laplace.num_data, laplace.prior_precision
        (32, 0.32)
        >>> laplace.posterior().sample(5).shape
        torch.Size([5, 8])
    """

    _kronecker = False
    _diagonal = True

    @property
    def fisher_diagonal(self) -> Tensor:
        """F, summed over the data, shape ``(D,)``, float64 [1/parameter²]; a new tensor.

        Raises:
            ValueError: Before :meth:`fit`.
        """
        return self.layout.flatten(self.fisher.diagonal, dtype=torch.float64)

    def eigenvalues(self) -> Iterator[Tensor]:
        """Yield the diagonal of H, parameter by parameter."""
        yield from self.fisher.diagonal.values()

    def _free_names(self) -> list[str]:
        return list(self.layout.names)

    def posterior(self, prior_precision: float | None = None, scale: float = 1.0) -> GaussianPosterior:
        r"""Return :math:`N(\theta^*, \mathrm{scale} \cdot \mathrm{diag}(1 / (F + \tau)))`.

        Args:
            prior_precision: τ; None takes :attr:`prior_precision`.
            scale: Multiplies the covariance.

        Returns:
            A posterior of rank 0.

        Raises:
            ValueError: Before :meth:`fit`, or if τ or the scale is not a positive number.

        Cost: O(D).
        """
        precision = self._resolve(prior_precision)
        provenance = self._provenance("diagonal", precision, scale)
        variance = scale / self.fisher_diagonal.add_(precision)
        return GaussianPosterior.diagonal(self.mean, variance.to(self.mean.dtype), self.layout, provenance)


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number; got {value}.")
