"""The log-joint of data and subspace coordinates: a tempered likelihood and a Gaussian prior."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lowrank_bdl.curvature.backward import differentiable_kernels
from lowrank_bdl.curvature.loss_gradients import (
    BatchNormMode,
    batch_norm_mode,
    check_modes,
)
from lowrank_bdl.errors import LowRankBDLError, ShapeError
from lowrank_bdl.linalg.devices import sums_device, to_float64
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.linalg.transforms import differentiable_gradients, transformed
from lowrank_bdl.parameters.batch_norm import recalibrate_batch_norm
from lowrank_bdl.parameters.batches import CallFn, Data, TargetFn, fixed_batches, joined, split_batch
from lowrank_bdl.parameters.functional import FunctionalModel, is_plain_perceptron
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.likelihoods import (
    CategoricalLikelihood,
    Likelihood,
    align_targets,
    check_deferred,
    resolve_likelihood,
)
from lowrank_bdl.parameters.loss_terms import LossFn, LossTerms, NumTerms, Reduction
from lowrank_bdl.progress import progress_bar

_MOST_PRODUCTS = 3_000_000  # a network and batch; evaluating together gains nothing above it, measured for predict
_NUMBERS_AT_ONCE = 1 << 22  # of the widest layer, over all networks that are evaluated together
_WEIGHTS_AT_ONCE = 1 << 24  # numbers in the weight vectors that one pass over the data serves


class Target(Protocol):
    """What the samplers need: a log-likelihood and a Gaussian prior over k coordinates."""

    @property
    def rank(self) -> int:
        """K."""

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior N(0, prior_std² I)."""

    def log_likelihood(self, z: Tensor) -> Tensor:
        """Return the tempered log-likelihood of ``(S, k)`` coordinates, shape ``(S,)``, differentiable in z."""

    def log_prior(self, z: Tensor) -> Tensor:
        """Return the log-density of the prior of ``(S, k)`` coordinates, shape ``(S,)``."""


class MapsToWeights(Protocol):
    """An affine subspace of weight space."""

    @property
    def layout(self) -> "ParameterLayout | None":
        """What the weight vectors hold."""

    @property
    def origin(self) -> Tensor:
        """The weights at z = 0, shape ``(D,)``."""

    @property
    def rank(self) -> int:
        """K."""

    def to_theta(self, z: Tensor, /) -> Tensor:
        """Return the weights ``(*S, D)`` at coordinates ``(*S, k)``, differentiably."""


def gaussian_log_prior(z: Tensor, prior_std: float) -> Tensor:
    r"""Return :math:`\log N(z; 0, s^2 I)`, all constants included.

    Args:
        z: Shape ``(*S, k)``.
        prior_std: s > 0.

    Returns:
        Shape ``(*S,)``, float64 [nat].

    Example:
        >>> gaussian_log_prior(torch.zeros(2), 1.0)
        tensor(-1.8379, dtype=torch.float64)
    """
    constant = z.shape[-1] * (math.log(prior_std) + 0.5 * math.log(2 * math.pi))
    return -0.5 * (to_float64(z) / prior_std).square().sum(-1) - constant


class _WithGradient(torch.autograd.Function):
    """Values whose gradients with respect to the weights are known already."""

    @staticmethod
    def forward(
        ctx: Any, thetas: Tensor, values: Tensor, gradients: Tensor, again: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(thetas, gradients)
        ctx.again = again
        return values.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        thetas, gradients = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return outer.unsqueeze(-1).to(gradients) * gradients, None, None, None
        return *differentiable_gradients(ctx.again, (thetas,), (outer,), (True,)), None, None, None


@exact_methods
class LogJoint:
    r"""The function :math:`\log p(z, \mathcal D) = \tfrac1T \log p(\mathcal D \mid \theta(z)) + \log N(z; 0, s^2 I)`.

    θ(z) = origin + P z. The log-likelihood is summed over the whole data set in float64, batch by batch, whatever their
    sizes. The temperature T divides the likelihood and nothing else: :meth:`log_likelihood` is tempered,
    :meth:`log_prior` is not.

    The value is differentiable in z. Gradients are taken batch by batch, with respect to the weights, and brought to z
    at the end, so that memory is that of one batch. Higher derivatives (``create_graph=True``), torch.func and
    forward-mode differentiation evaluate the network on all data again with one graph: memory is that of all batches.
    The network runs in evaluation mode; its weights, buffers and modes stay as they are.

    Batch norm: the stored statistics, whatever z; with ``bn_loader`` those of the weights at each z, computed anew from
    that loader and treated as constants by gradients; with ``bn_mode="train"`` those of each batch of ``data``, as in
    training (and as published for subspace inference).

    The last value, and gradient, is kept: asking for the log-likelihood, the prior and the log-joint at one z costs one
    pass over the data.

    Args:
        subspace: Anything with ``to_theta(z)``, ``origin``, ``rank`` and ``layout``: :class:`lowrank_bdl.Subspace`.
        model: The network.
        likelihood: ``"categorical"``, ``"gaussian"``, or a callable from outputs to a ``torch.distributions`` object,
            as for :func:`lowrank_bdl.predict`; None where ``loss_fn`` says it.
        data: A pair ``(x, y)``, a list of such pairs, or a DataLoader that does not shuffle: training data without
            augmentation.
        noise_variance: For ``"gaussian"``: the known noise variance [unit of y, squared]; None: the network gives it.
        loss_fn: In place of a likelihood: ``loss_fn(outputs, targets)`` gives a scalar, the negative log-likelihood.
        reduction: Whether that is the ``"mean"`` over a batch or the ``"sum"``. The log-likelihood is the mean over all
            data times the number of examples, those that the loss ignores left out, however the data are batched.
        num_terms: What a mean divides by, ``num_terms(outputs, targets)``; None asks torch's own losses, and takes
            the number of examples for others. See `LossTerms`.
        temperature: T > 0; above 1 the data count for less.
        prior_std: s > 0, of every coordinate.
        call_fn: ``call_fn(model, batch)`` gives the outputs; None calls ``model(x)``, or
            ``model(**entries).logits`` on a mapping without its targets.
        target_fn: ``target_fn(batch)`` gives the targets; None takes y, or a mapping's ``labels`` or ``targets``.
        bn_loader: See above.
        bn_fraction: Fraction of ``bn_loader`` to use, in (0, 1]; below 1 its first batches only.
        bn_mode: See above.
        vectorize: ``True`` evaluates several z at once by ``torch.vmap``; ``"auto"`` does so for small networks of
            linear layers. Values agree up to rounding.
        chunk_size: How many z at once; None goes by the width of the widest layer.
        progress: Show a progress bar for every pass over the data: for large networks.

    Attributes:
        subspace: As given.
        temperature: As given.
        prior_std: As given.
        num_evaluations: How many z the data, or the first of them, were read for so far.

    Raises:
        ShapeError: If subspace and model do not fit, or the data are no batches ``(x, y)``.
        ValueError: If an argument is out of range or unknown, or the data are shuffled or can be read only once.

    Cost: for each z a pass over the data (with gradients a backward pass too); one pass serves several z, as many as
    fit in 64 MiB or as the basis has columns. Memory: a batch, and D numbers a z.

    Source: Izmailov et al., "Subspace Inference for Bayesian Deep Learning" (2019), section 3.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> class Line:  # theta(z) = 1 + 2 z; a Subspace in earnest
        ...     layout, origin, rank = None, torch.ones(1), 1
        ...     def to_theta(self, z):
        ...         return self.origin + 2 * z
        >>> x, y = torch.ones(3, 1), torch.zeros(3, 1)
        >>> log_joint = LogJoint(Line(), net, "gaussian", (x, y), noise_variance=1.0, temperature=3.0)
        >>> z = torch.tensor([0.0], requires_grad=True)
        >>> value = log_joint.log_likelihood(z)  # 3 (-1 / 2 - log(2 pi) / 2) / 3
        >>> value
        tensor(-1.4189, dtype=torch.float64, grad_fn=<SelectBackward0>)
        >>> torch.autograd.grad(value, z)
        (tensor([-2.]),)
    """

    def __init__(
        self,
        subspace: MapsToWeights,
        model: nn.Module,
        likelihood: "str | Likelihood | None",
        data: Data,
        *,
        noise_variance: "float | Tensor | None" = None,
        loss_fn: "LossFn | None" = None,
        reduction: Reduction = "mean",
        num_terms: NumTerms | None = None,
        temperature: float = 1.0,
        prior_std: float = 1.0,
        call_fn: CallFn | None = None,
        target_fn: TargetFn | None = None,
        bn_loader: Iterable[Any] | None = None,
        bn_fraction: float = 1.0,
        bn_mode: BatchNormMode = "eval",
        vectorize: "bool | Literal['auto']" = "auto",
        chunk_size: int | None = None,
        progress: bool = False,
    ) -> None:
        check_modes(reduction, bn_mode)
        for name, value in (("temperature", temperature), ("prior_std", prior_std)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {value}.")
        if (likelihood is None) == (loss_fn is None):
            raise ValueError("exactly one of likelihood and loss_fn must be given; got " + _got(likelihood, loss_fn))
        if bn_loader is not None and bn_mode == "train":
            raise ValueError("bn_mode='train' takes the statistics of each batch and has no use for a bn_loader.")
        if vectorize != "auto" and not isinstance(vectorize, bool):
            raise ValueError(f"vectorize must be True, False or 'auto'; got {vectorize!r}.")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1; got {chunk_size}.")
        self.subspace = subspace
        self.temperature, self.prior_std = float(temperature), float(prior_std)
        self.num_evaluations = 0
        self._likelihood = None if likelihood is None else resolve_likelihood(likelihood, noise_variance)
        self._terms = None if loss_fn is None else LossTerms(loss_fn, reduction, num_terms)
        self._last: tuple[Tensor | float, Tensor | int] = (1.0, 1)  # terms and examples of the last batch
        self._network = FunctionalModel(model, subspace.layout, call_fn)
        self._data = fixed_batches(data)
        self._target_fn = target_fn
        self._bn_loader, self._bn_fraction, self._bn_mode = bn_loader, bn_fraction, bn_mode
        self._call_fn, self._progress = call_fn, progress
        self._insists = vectorize is True
        self._at_once = self._insists or (vectorize == "auto" and call_fn is None and is_plain_perceptron(model))
        self._chunk_size = chunk_size
        self._width = max((m.out_features for m in model.modules() if isinstance(m, nn.Linear)), default=1)
        self._num_data: int | None = None
        self._deferred: list[Tensor] = []  # range checks of class indices, read once a call
        self._kept: tuple[Tensor, Tensor, Tensor | None] | None = None
        if subspace.origin.shape != (self._network.layout.numel,):
            raise ShapeError(
                f"the subspace must be of the {self._network.layout.numel} weights of the layout; "
                f"its origin has shape {tuple(subspace.origin.shape)}."
            )

    @property
    def rank(self) -> int:
        """K."""
        return self.subspace.rank

    @property
    def num_data(self) -> int:
        """N, the number of targets; the data are read once for it if they have not been read yet."""
        if self._num_data is None:
            self._num_data = sum(split_batch(batch, None, self._target_fn)[2] for batch in self._data)
        return self._num_data

    def __call__(self, z: Tensor) -> Tensor:
        """Return the log-joint.

        Args:
            z: Shape ``(k,)`` or ``(S, k)``.

        Returns:
            Shape ``()`` or ``(S,)``, float64, on z's device [nat].

        Raises:
            ShapeError: If z has another shape, or the data are no batches ``(x, y)``.
        """
        return self.log_likelihood(z) + self.log_prior(z)

    def log_prior(self, z: Tensor) -> Tensor:
        """Return the log-density of N(0, prior_std² I), not tempered, with all constants.

        Args:
            z: Shape ``(k,)`` or ``(S, k)``.

        Returns:
            Shape ``()`` or ``(S,)``, float64 [nat].
        """
        self._check(z)
        return gaussian_log_prior(z, self.prior_std)

    def log_likelihood(self, z: Tensor) -> Tensor:
        """Return the log-likelihood of all data over the temperature.

        Args:
            z: Shape ``(k,)`` or ``(S, k)``.

        Returns:
            Shape ``()`` or ``(S,)``, float64, on z's device [nat]; NaN where the network's output is.

        Raises:
            ShapeError: As for the call.
        """
        self._check(z)
        values = self._over(z.unsqueeze(0) if z.ndim == 1 else z, self._data, keep=True)
        return values[0] if z.ndim == 1 else values

    def log_likelihood_above(self, z: Tensor, thresholds: Tensor) -> Tensor:
        """Return the log-likelihood where it is above a threshold, as slice samplers want it; no gradients.

        Classes have log-probabilities of at most 0, so that a sum over some of the data bounds the whole from above:
        once that is not above the threshold, the rest of the data is not read. Values above it are those of
        :meth:`log_likelihood`, to the last bit where networks are evaluated one by one. Of other likelihoods all is
        read.

        Args:
            z: Shape ``(S, k)``.
            thresholds: Shape ``(S,)`` [nat], of the tempered log-likelihood.

        Returns:
            Shape ``(S,)``, float64, on z's device [nat]; an upper bound, not above the threshold, where reading ended.

        Raises:
            ShapeError: As for the call, and if there is not a threshold for each z.

        Cost: a pass over the data, or its first batches only: the less, the worse z is.
        """
        self._check(z)
        if thresholds.shape != z.shape[:1] or z.ndim != 2:
            raise ShapeError(
                f"thresholds must be one for each of (S, {self.rank}) z; "
                f"got {tuple(thresholds.shape)} and {tuple(z.shape)}."
            )
        with torch.no_grad():
            if not isinstance(self._likelihood, CategoricalLikelihood):
                return self._over(z, self._data, keep=True)
            device = self._network.stateless.device
            return self._over(z, self._data, keep=False, thresholds=thresholds.to(sums_device(device or z.device)))

    def estimate_log_likelihood(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return an unbiased estimate of :meth:`log_likelihood` from one batch: M times its own, of M batches.

        Args:
            z: Shape ``(k,)`` or ``(S, k)``; all see the same batch.
            generator: Chooses the batch, uniformly; None means torch's default generator.

        Returns:
            Shape ``()`` or ``(S,)``, float64 [nat].

        Raises:
            TypeError: If the data are not a list of batches.
            ShapeError: As for the call.

        Cost: one batch a z.
        """
        self._check(z)
        if not isinstance(self._data, Sequence):
            raise TypeError(f"estimates need a list of batches, to draw from; got {type(self._data).__name__}.")
        device = torch.device("cpu") if generator is None else generator.device
        number = int(torch.randint(len(self._data), (), generator=generator, device=device))
        values = self._over(z.unsqueeze(0) if z.ndim == 1 else z, [self._data[number]], keep=False)
        return len(self._data) * (values[0] if z.ndim == 1 else values)

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def _check(self, z: Tensor) -> None:
        if z.ndim not in (1, 2) or z.shape[-1] != self.rank or not z.is_floating_point():
            raise ShapeError(
                f"z must be floating-point of shape ({self.rank},) or (S, {self.rank}); got {z.dtype} {tuple(z.shape)}."
            )

    def _over(self, z: Tensor, batches: Iterable[Any], keep: bool, thresholds: "Tensor | None" = None) -> Tensor:
        """Tempered log-likelihoods ``(S,)`` of some batches, or bounds below thresholds; a sum over all is kept."""
        if transformed():
            self.num_evaluations += len(z) if keep else 0
            return self._differentiable(self.subspace.to_theta(z.to(self.subspace.origin)), batches) / self.temperature
        needs_gradient = torch.is_grad_enabled() and z.requires_grad

        def again(thetas: Tensor) -> Tensor:
            return self._differentiable(thetas, batches)

        size = max(self.rank, _WEIGHTS_AT_ONCE // self._network.layout.numel, 1)
        origin = self.subspace.origin
        if keep and self._kept is not None:
            where, values, gradients = self._kept
            same = where.dtype == z.dtype and where.device == z.device and torch.equal(where, z.detach())
            if same and not needs_gradient:
                return values.to(sums_device(z.device)) / self.temperature
            if same and gradients is not None:
                thetas = self.subspace.to_theta(z.to(origin))
                result: Tensor = _WithGradient.apply(thetas, values, gradients, again)
                return result.to(sums_device(z.device)) / self.temperature
        found, slopes = [], []
        for start in range(0, len(z), size):
            part = z[start : start + size]
            limits = None if thresholds is None else thresholds[start : start + size]
            thetas = self.subspace.to_theta(part.to(origin))
            values, gradients = self._evaluate(thetas.detach(), batches, needs_gradient, limits)
            if gradients is not None:
                slopes.append(gradients)
                values = _WithGradient.apply(thetas, values, gradients, again)
            found.append(values)
            if keep or limits is not None:
                self.num_evaluations += len(part)
        total = torch.cat(found) if found else torch.zeros(0, dtype=torch.float64, device=sums_device(z.device))
        if keep and len(z) <= size:
            self._kept = (z.detach().clone(), total.detach(), slopes[0] if slopes else None)
        return total.to(sums_device(z.device)) / self.temperature

    def _evaluate(
        self, thetas: Tensor, batches: Iterable[Any], needs_gradient: bool, limits: "Tensor | None"
    ) -> "tuple[Tensor, Tensor | None]":
        """Log-likelihoods ``(S,)`` and their gradients ``(S, D)`` by one pass over the batches.

        With tempered limits ``(S,)``, those that fall to theirs are left where they are.
        """
        model, device = self._network.stateless.model, self._network.stateless.device
        buffers = self._statistics(thetas)
        totals = torch.zeros(len(thetas), dtype=torch.float64, device=sums_device(device or thetas.device))
        gradients = torch.zeros_like(thetas) if needs_gradient else None
        num_data = num_batches = 0
        counts: list[tuple[Tensor | float, Tensor | int]] = []
        going = list(range(len(thetas)))
        self._deferred.clear()
        bar = progress_bar(batches, "log-likelihood", unit="batch", leave=False, show=self._progress)
        with batch_norm_mode(model, self._bn_mode), torch.set_grad_enabled(needs_gradient):
            for batch in bar:
                inputs, targets, size = split_batch(batch, device, self._target_fn)
                num_data, num_batches = num_data + size, num_batches + 1
                for rows in _row_groups(going, self._chunk(len(going), size)):
                    leaves = thetas[rows].detach()
                    leaves.requires_grad_(needs_gradient)
                    own = {name: value[rows] for name, value in buffers.items()}
                    values = self._together(leaves, (inputs, targets), own)
                    totals[rows] += values.detach()
                    if gradients is not None:
                        (slope,) = torch.autograd.grad(values.sum(), leaves)
                        gradients[rows] += slope
                counts.append(self._last)
                if limits is not None:
                    above = (totals / self.temperature > limits).tolist()
                    going = [row for row in going if above[row]]
                    if not going:
                        break
        check_deferred(self._deferred)
        if num_batches == 0:
            raise ShapeError("data must give at least one batch; got none.")
        if batches is self._data and going:
            self._num_data = num_data
        if self._terms is not None:
            factor = self._examples_a_term(counts, totals)
            totals *= factor
            if gradients is not None:
                gradients *= factor.to(gradients)
        return totals, gradients

    def _statistics(self, thetas: Tensor) -> Mapping[str, Tensor]:
        """The buffers of batch normalisation at given weights ``(S, D)``, where a loader for them was given."""
        if self._bn_loader is None:
            return {}
        if transformed():
            raise NotImplementedError(
                "expected a LogJoint without bn_loader under torch.func and torch.compile; got one with it: "
                "torch.autograd differentiates it, with statistics as constants."
            )
        return recalibrate_batch_norm(
            self._network.stateless.model,
            thetas.detach(),
            self._bn_loader,
            layout=self._network.layout,
            call_fn=self._call_fn,
            fraction=self._bn_fraction,
        )

    def _differentiable(self, thetas: Tensor, batches: Iterable[Any]) -> Tensor:
        """Log-likelihoods ``(S,)`` by one graph over all batches, differentiable any number of times."""
        model, device = self._network.stateless.model, self._network.stateless.device
        buffers = self._statistics(thetas)
        sums = sums_device(device or thetas.device)
        self._deferred.clear()
        total, read = torch.zeros(len(thetas), dtype=torch.float64, device=sums), False
        counts: list[tuple[Tensor | float, Tensor | int]] = []
        with batch_norm_mode(model, self._bn_mode), differentiable_kernels():
            for batch in batches:
                inputs, targets, size = split_batch(batch, device, self._target_fn)
                groups = _row_groups(range(len(thetas)), self._chunk(len(thetas), size))
                pieces = ((thetas[rows], {name: value[rows] for name, value in buffers.items()}) for rows in groups)
                total = total + torch.cat([self._together(part, (inputs, targets), own) for part, own in pieces])
                read = True
                counts.append(self._last)
        if not transformed():
            check_deferred(self._deferred)
        self._deferred.clear()
        if not read:
            raise ShapeError("data must give at least one batch; got none.")
        return total if self._terms is None else total * self._examples_a_term(counts, total)

    @staticmethod
    def _examples_a_term(counts: "Sequence[tuple[Tensor | float, Tensor | int]]", like: Tensor) -> Tensor:
        """Number of examples over that of terms, of all batches: their sum of terms becomes a mean times N."""
        terms, examples = (sum(torch.as_tensor(one).to(like) for one in each) for each in zip(*counts, strict=True))
        return torch.as_tensor(examples / terms)

    def _chunk(self, number: int, rows: int) -> int:
        """How many of a number of networks to evaluate together on a batch of some rows."""
        too_much = not self._insists and rows * self._network.layout.numel > _MOST_PRODUCTS
        if not self._at_once or number == 1 or too_much:
            return 1
        return self._chunk_size or max(2, _NUMBERS_AT_ONCE // (rows * self._width))

    def _together(self, thetas: Tensor, batch: tuple[Any, Tensor], buffers: Mapping[str, Tensor]) -> Tensor:
        """Log-likelihoods ``(S,)`` of one batch, at once where that is possible."""
        if len(thetas) > 1:
            try:
                result: Tensor = torch.vmap(lambda theta, own: self._one(theta, batch, own))(thetas, dict(buffers))
                return result
            except Exception as error:  # a network may fail under vmap in any way
                if self._insists:
                    self._one(thetas[0], batch, {name: value[0] for name, value in buffers.items()})  # its own error
                    raise LowRankBDLError(
                        f"The network cannot be evaluated at several z at once ({error}); pass vectorize=False."
                    ) from error
                self._at_once = False
        each = enumerate(thetas)
        return torch.stack([self._one(row, batch, {k: v[i] for k, v in buffers.items()}) for i, row in each])

    def _one(self, theta: Tensor, batch: tuple[Any, Tensor], buffers: Mapping[str, Tensor]) -> Tensor:
        """Log-likelihood of one batch at one weight vector, float64."""
        outputs = self._network(theta, joined(*batch), buffers)
        targets = batch[1]
        if self._terms is not None:
            self._last = self._terms.number(outputs, targets), self._terms.examples(targets)
            return -to_float64(self._terms.total(outputs, targets))
        assert self._likelihood is not None
        distribution = self._likelihood(outputs)
        return to_float64(distribution.log_prob(align_targets(distribution, targets, self._deferred))).sum()


def _row_groups(rows: Sequence[int], size: int) -> Iterator["slice | list[int]"]:
    """Cut rows into groups, each a slice where it can be one: rows of large matrices are not copied."""
    for start in range(0, len(rows), size):
        group = list(rows[start : start + size])
        together = group[-1] - group[0] == len(group) - 1
        yield slice(group[0], group[-1] + 1) if together else group


def _got(likelihood: object, loss_fn: "Callable[..., Any] | None") -> str:
    return "neither." if likelihood is None and loss_fn is None else f"likelihood={likelihood!r} and a loss_fn."
