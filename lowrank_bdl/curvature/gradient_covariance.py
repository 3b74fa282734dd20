r"""The covariance of mini-batch gradients at fixed weights, in the structure of the weights' own covariance.

Mandt, Hoffman and Blei, "Stochastic Gradient Descent as Approximate Bayesian Inference" (JMLR 2017), theorem 1 and
section 4.4, for the learning rate; McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training"
(2018), equation 2.9 and appendix A.1, for the noise scale.
"""

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_bdl.curvature.loss_gradients import BatchNormMode, LossGradients
from lowrank_bdl.curvature.model_state import differences, model_state
from lowrank_bdl.errors import NonFiniteError, ShapeError, StaleError
from lowrank_bdl.linalg.devices import sum_in_float64, sums_device, to_float64
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.memory import require_memory
from lowrank_bdl.linalg.moments import StreamingMoments, first_unusable
from lowrank_bdl.linalg.precision import exact, exact_methods
from lowrank_bdl.linalg.ring_buffer import DeviationBuffer
from lowrank_bdl.parameters.batches import CallFn, TargetFn
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.loss_terms import LossFn, NumTerms, Reduction
from lowrank_bdl.parameters.memory_estimates import estimate_memory
from lowrank_bdl.parameters.selection import Selector


@exact_methods
class GradientCovariance:
    r"""Collect gradients :math:`g_1, \dots, g_T` of mini-batches of :math:`S_1, \dots, S_T` examples at fixed weights.

    With :math:`N = \sum_t S_t`, the mean :math:`m = \sum_t S_t g_t / N` and
    :math:`\mathrm{var} = \frac{1}{T - 1} \sum_t S_t (g_t - m)^2` for one example, the covariance of the mean gradient
    of S examples is

    .. math::
        V = R R^\top + \mathrm{diag}(\max(\mathrm{var} / S - \mathrm{diag}\, R R^\top, 0)), \quad
        R = \frac{1}{\sqrt{(T - 1) S}} \big[\sqrt{S_t}\, (g_t - m)\big]_t

    over the newest K gradients (all of them while :math:`T \le K + 1`: V is then the sample covariance itself), so that
    :math:`\mathrm{tr}\, V = \sum \mathrm{var} / S` and no noise is counted twice. The weights :math:`S_t` make a ragged
    last batch exact: var is unbiased for batches of independent examples, and for random partitions of a data set (then
    with N - 1 as divisor). Of older gradients only the variances are kept: beyond K + 1 gradients the off-diagonal part
    is K / T of its value on average; :attr:`recent_covariance` is unbiased in every entry.

    Where the mean of ``loss_fn`` divides by something else than examples (class weights, ignored targets, entries),
    :math:`S_t g_t` is the gradient of the sum of a batch's terms, and all gradients are scaled by N over the number of
    terms seen: m is the gradient of the mean over all the data, however these are cut into batches.

    Weight decay adds no noise and is no part of the gradients. Dropout is off. With ``bn_mode="train"`` a batch's
    gradient is not the mean of its examples' own; quantities for another batch size are then approximate.

    Args:
        model: The network. It is not changed.
        loss_fn: ``loss_fn(outputs, targets)`` gives a scalar.
        rank: K >= 0, how many gradients are kept.
        per_example: Count the gradient of every example (S = 1) in place of the batch's.
        include: Parameters to differentiate by, by name pattern or predicate; all that require a gradient if None.
        exclude: Parameters to leave out of these.
        reduction: Whether ``loss_fn`` gives the ``"mean"`` or the ``"sum"`` over a batch.
        num_terms: ``num_terms(outputs, targets)`` gives what the mean of a batch divides by; None asks torch's own
            losses, and takes the number of examples for others.
        bn_mode: Batch norm by stored statistics (``"eval"``) or by the batch's (``"train"``); the stored ones are left
            as they are.
        call_fn: ``call_fn(model, batch)`` gives the outputs; None calls ``model(x)``, or
            ``model(**entries).logits`` on a mapping without its targets.
        target_fn: ``target_fn(batch)`` gives the targets; None takes y, or a mapping's ``labels`` or ``targets``.

    Attributes:
        layout: Names, shapes and order of the D coordinates.
        rank: K.
        num_gradients: T.
        num_examples: N.
        batch_size: S, the size of the largest batch: what :attr:`covariance` and all else is for.

    Raises:
        ValueError: If ``rank`` < 0, ``reduction`` or ``bn_mode`` is unknown, or gradients an example are asked for with
            batch norm by the batch.
        ShapeError: If no parameter is selected.
        MemoryLimitError: If the state does not fit the free memory, before it is allocated.

    Cost: (K + 3)·D numbers, float32 unless a parameter is float64, and a copy of the model's weights to compare with.

    Example:
        >>> net = nn.Linear(3, 1)
        >>> x, y = torch.randn(50, 3), torch.randn(50, 1)
        >>> noise = GradientCovariance(net, nn.functional.mse_loss, rank=10)
        >>> for batch in zip(x.split(8), y.split(8)):
        ...     noise.update(batch)
        >>> noise.num_gradients, noise.num_examples, noise.batch_size, noise.covariance.shape
        (7, 50, 8, torch.Size([4, 4]))
        >>> bool(torch.isclose(noise.covariance.diagonal().sum(), torch.tensor(noise.trace)))
        True
        >>> rates = [noise.optimal_learning_rate(momentum, num_data=50) for momentum in (0.0, 0.9)]
        >>> round(rates[0] / rates[1], 6)
        10.0
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        rank: int = 20,
        per_example: bool = False,
        include: "Selector | None" = None,
        exclude: "Selector | None" = None,
        reduction: Reduction = "mean",
        bn_mode: BatchNormMode = "eval",
        num_terms: NumTerms | None = None,
        call_fn: CallFn | None = None,
        target_fn: TargetFn | None = None,
    ) -> None:
        if rank < 0:
            raise ValueError(f"rank must be >= 0; got {rank}.")
        if per_example and bn_mode == "train":
            raise ValueError(
                'gradients an example need bn_mode="eval": normalised by its batch, an example has none; got "train".'
            )
        self.layout = ParameterLayout.from_module(model, include=include, exclude=exclude)
        self.rank, self.per_example = rank, per_example
        self._gradients = LossGradients(
            model,
            self.layout,
            loss_fn,
            reduction=reduction,
            bn_mode=bn_mode,
            num_terms=num_terms,
            call_fn=call_fn,
            target_fn=target_fn,
        )
        numel, dtype = self.layout.numel, self.layout.dtype
        place = self.layout.parameters_of(model)[0].device
        num_bytes = estimate_memory(numel, rank, "state", dtype, deviation_dtype=dtype).result
        num_bytes += sum(tensor.nbytes for tensor in self._model_state().values())
        require_memory(num_bytes, place, f"a gradient covariance of rank {rank} over {numel:,} parameters")
        with torch.inference_mode(False):
            self._moments = StreamingMoments(numel, dtype=dtype, device=place)
            self._buffer = DeviationBuffer(rank, numel, dtype=dtype, device=place)
        self.reset()

    # ---- collection ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset(self) -> None:
        """Forget every gradient; the next update fixes the weights anew. Covariances that share memory become stale."""
        for tensor in (*self._moments.state().values(), *self._buffer.state().values()):
            tensor.zero_()
        self.num_gradients = 0
        self.batch_size = 0
        self._num_terms: Tensor | float = 0
        self._sizes: deque[int] = deque(maxlen=self.rank + 1)
        self._reference: dict[str, Tensor] | None = None

    def update(self, batch: Any) -> None:
        """Count the gradient of one batch, or of each of its examples with ``per_example``.

        A covariance that shares this collector's memory is stale from here on: its every use raises StaleError.

        Args:
            batch: ``(x, y)``, the length of y being the number of examples; moved to the model's device.

        Raises:
            StaleError: If a weight or buffer of the model has changed since the first gradient: what the gradients
                spread by would be drift, not noise.
            ShapeError: If the batch or the loss has another form than expected.
            NonFiniteError: If a gradient is NaN, infinite or too large to square; names the parameter. It is not
                counted; with ``per_example`` the examples before it in the batch are, and the message says how many.

        Cost: a forward and a backward pass, and for each gradient a pass over some 10·D numbers; one host
        synchronisation, or one for the examples whose gradients are in memory together.
        """
        with torch.inference_mode(False):  # tensors made in inference mode cannot be differentiated by
            self._update(batch)

    def _update(self, batch: Any) -> None:
        inputs, targets, size = self._gradients.split(batch)
        if not self.per_example:
            gradient, number = self._gradients.of_batch((inputs, targets), size)
            if self._look_at(gradient.unsqueeze(0)) == 0:
                self._refuse(gradient, "")
            self._count(gradient, size)
            self._num_terms = self._num_terms + number
            return
        counted = 0
        try:
            for gradients in self._gradients.of_examples((inputs, targets)):
                usable = self._look_at(gradients, weights=counted == 0)
                for gradient in gradients[:usable]:
                    self._count(gradient, 1)
                counted += usable
                if usable < len(gradients):
                    self._refuse(
                        gradients[usable], f" in example {counted} of the batch; the {counted} before it were counted"
                    )
        finally:
            if counted:
                self._num_terms = self._num_terms + self._gradients.number_of_terms((inputs, targets), counted)

    @torch.no_grad()
    def _count(self, gradient: Tensor, size: int) -> None:
        """Count a gradient, which is overwritten, as ``size`` equal ones whose own spread is zero."""
        if self._reference is None:
            self._reference = {name: tensor.clone() for name, tensor in self._model_state().items()}
        zero = gradient.new_zeros(()).expand_as(gradient)
        number = torch.tensor(size, device="cpu")
        state = {"shift": gradient, "offset": zero, "sum_sq": zero, "count": number, "prior_count": number * 0}
        self._moments.merge(StreamingMoments.from_state(state))
        if self.num_gradients:  # the first deviation from the running mean is exactly zero
            self._buffer.push(self._moments.center_(gradient), check_finite=False)
        self.num_gradients += 1
        self._sizes.append(size)
        self.batch_size = max(self.batch_size, size)

    @torch.no_grad()
    def _look_at(self, gradients: Tensor, weights: bool = True) -> int:
        """Return how many gradients ``(B, D)`` come before one that cannot be counted; one host synchronisation.

        Args:
            gradients: In their order.
            weights: Whether to look at the model too.

        Raises:
            StaleError: If the model has changed since the first gradient.
        """
        if not gradients.shape[1]:
            gradients = gradients.new_zeros(len(gradients), 1)
        low, high = gradients.aminmax(dim=1)  # both are NaN if any entry is
        flags = ~((low > -self._moments.bound) & (high < self._moments.bound))
        present = self._model_state() if weights and self._reference is not None else {}
        if present and self._reference is not None:
            flags = torch.cat([flags, differences(self._reference, present).to(flags.device)])
        found = flags.tolist()
        if self._reference is not None and True in (moved := found[len(gradients) :]):
            changed = list(self._reference)[moved.index(True)]
            raise StaleError(
                f"the model must stay as it was at the first of the {self.num_gradients} gradients; {changed!r} has "
                "changed. Call reset() to measure at the present weights."
            )
        return [*found[: len(gradients)], True].index(True)

    def _refuse(self, gradient: Tensor, where: str) -> None:
        bad = first_unusable(gradient, self._moments.bound)
        assert bad is not None
        raise NonFiniteError(
            f"expected a gradient below {self._moments.bound:.1e} in magnitude; that of parameter "
            f"{self.layout.name_of(bad)!r} is {gradient[bad].item()}{where}."
        )

    def _model_state(self) -> dict[str, Tensor]:
        return model_state(self._gradients.model, self._gradients.bn_mode)

    # ---- what was collected -------------------------------------------------------------------------------------

    @property
    def num_examples(self) -> int:
        """N: examples seen, with repetitions."""
        return self._moments.count

    @property
    def mean(self) -> Tensor:
        """The mean gradient over all examples seen, shape ``(D,)`` [loss / parameter]; a new tensor."""
        self._require(1)
        number = self._num_terms
        if isinstance(number, Tensor) and number.device.type != "cpu":  # without waiting; NaN if there are no terms
            return self._moments.mean * (self.num_examples / number)
        return self._moments.mean.mul_(self._scale)

    @property
    def variance(self) -> Tensor:
        """Variance of each entry of the gradient of :attr:`batch_size` examples, shape ``(D,)``; a new tensor."""
        self._require(2)
        return self._moments.sum_sq * (self._scale**2 / ((self.num_gradients - 1) * self.batch_size))

    @property
    def covariance(self) -> LowRankPlusDiagLinearOperator:
        """V of the gradient of :attr:`batch_size` examples, as above; it shares the collector's memory.

        While it is the sample covariance itself (T <= K + 1) its diagonal part is exactly zero: it has no inverse, and
        ``solve`` and ``logdet`` raise NotPSDError.

        Cost: D numbers, and O(D K²) time.
        """
        self._require(2)
        with torch.inference_mode(False), torch.no_grad():  # inference tensors have no versions to be stale by
            root, mix, complete = self._root()
            mix = mix / math.sqrt((self.num_gradients - 1) * self.batch_size)
            diag = torch.zeros_like(self._moments.shift)
            if not complete:
                diag = self.variance.sub_(LowRankPlusDiagLinearOperator(root, diag, mix=mix).diagonal()).clamp_(min=0)
            return LowRankPlusDiagLinearOperator(root, diag, mix=mix).pin()

    @property
    def recent_covariance(self) -> LowRankPlusDiagLinearOperator:
        r"""An unbiased estimate of V from the K newest gradients alone, without a diagonal part; shares memory.

        The divisor is :math:`\sum_t (1 - S_t / N)` over the gradients kept, since the mean is of all of them. Its
        eigenpairs are those of ``recent_covariance.principal_components(k)``. It is :attr:`covariance` while
        T <= K + 1.

        Raises:
            ValueError: If no gradient is kept (rank 0), or fewer than 2 were collected.
        """
        self._require(2)
        if self.rank == 0:
            raise ValueError("a covariance of the gradients kept needs rank >= 1; got rank 0.")
        with torch.inference_mode(False), torch.no_grad():
            root, mix, complete = self._root()
            kept = list(self._sizes)[0 if complete else -len(self._buffer) :]
            divisor = len(kept) - sum(kept) / self.num_examples
            diag = torch.zeros_like(self._moments.shift)
            return LowRankPlusDiagLinearOperator(root, diag, mix=mix / math.sqrt(divisor * self.batch_size)).pin()

    def _root(self) -> tuple[Tensor, Tensor, bool]:
        r"""Return stored rows, the float64 mix that makes scaled :math:`\sqrt{S_t} (g_t - m)` of them, and if for all.

        A row is :math:`d_t = g_t - m_t` with the running mean, and :math:`m_s - m_{s-1} = d_s S_s / N_{s-1}`, hence
        :math:`g_t - m = d_t - \sum_{s>t} d_s S_s / N_{s-1}`, for t = 1 as well, whose own :math:`d_1` is zero.
        """
        place = sums_device(self._moments.shift.device)
        order = self._buffer.age_order().to(place)
        stored = len(order)
        complete = self.num_gradients == stored + 1
        sizes = torch.tensor(list(self._sizes), dtype=torch.float64, device=place)[len(self._sizes) - stored :]
        before = self.num_examples - sizes.flip(0).cumsum(0).flip(0)  # N_{s-1}
        steps = (sizes / before)[:, None]
        eye = torch.eye(stored, dtype=torch.float64, device=place)
        columns = (eye - steps.expand(stored, stored).tril(-1)) * sizes.sqrt()
        if complete:
            columns = torch.cat([-steps * math.sqrt(self._sizes[0]), columns], dim=1)
        mix = torch.empty_like(columns)
        mix[order] = columns
        return self._buffer.storage[:stored].mT, mix.mul_(self._scale), complete

    @property
    def _scale(self) -> float:
        """N over the number of terms seen."""
        number = float(self._num_terms)
        if not number > 0:
            raise ValueError(
                f"the loss must have terms; the {self.num_gradients} gradients seen have {number:g} in all."
            )
        return self.num_examples / number

    def _require(self, number: int) -> None:
        if self.num_gradients < number:
            raise ValueError(f"expected at least {number} gradient(s); got {self.num_gradients}. Call update(batch).")

    # ---- summaries ----------------------------------------------------------------------------------------------

    @property
    def trace(self) -> float:
        """Trace of V, the gradient being that of :attr:`batch_size` examples; unbiased, from all gradients seen."""
        self._require(2)
        total = float(sum_in_float64(self._moments.sum_sq, 0))
        return total * self._scale**2 / ((self.num_gradients - 1) * self.batch_size)

    @property
    def squared_gradient_norm(self) -> float:
        r"""Squared norm of the expected gradient, :math:`|m|^2 - \mathrm{tr}\, V S / N`: what noise adds is taken off.

        Unbiased for independent examples, and therefore below zero at times where the gradient is small.
        """
        return float(to_float64(self.mean).square().sum()) - self.trace * self.batch_size / self.num_examples

    @property
    def signal_to_noise(self) -> float:
        """:attr:`squared_gradient_norm` over :attr:`trace`: that of one gradient of :attr:`batch_size` examples."""
        return _ratio(self.squared_gradient_norm, self.trace)

    @property
    def noise_scale(self) -> float:
        r"""The batch size at which noise is as large as signal, :math:`S\, \mathrm{tr}\, V / |G|^2` [examples].

        Infinite where :attr:`squared_gradient_norm` is not positive: no gradient was seen above the noise.
        """
        return _ratio(self.trace * self.batch_size, max(self.squared_gradient_norm, 0.0))

    def optimal_learning_rate(self, momentum: float = 0.0, batch_size: int | None = None, *, num_data: int) -> float:
        r"""Return the constant learning rate at which SGD samples the posterior best, in Kullback-Leibler divergence.

        :math:`2 (1 - \mu) D / (N_{data}\, \mathrm{tr}\, V)`, D the number of weights and V the covariance of the
        mean gradient of a batch.

        Args:
            momentum: :math:`\mu` of SGD with heavy-ball momentum, in [0, 1).
            batch_size: Of the training run; :attr:`batch_size` if None.
            num_data: Size of the data set.

        Returns:
            The learning rate for the mean loss; infinite without noise.

        Raises:
            ValueError: If an argument is out of range, or fewer than 2 gradients were collected.
        """
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1); got {momentum}.")
        batch_size = max(self.batch_size, 1) if batch_size is None else batch_size
        for name, value in (("batch_size", batch_size), ("num_data", num_data)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1; got {value}.")
        trace = self.trace * self.batch_size / batch_size
        return _ratio(2 * (1 - momentum) * self.layout.numel, num_data * trace)

    def alignment(self, directions: Tensor) -> Tensor:
        r"""Return the share of the noise along directions, :math:`v^\top V v / (v^\top v\, \mathrm{tr}\, V)`.

        1 / D for noise that is alike in all directions; the shares of an orthonormal basis sum to 1 where V is the
        sample covariance itself. The numerator is of :attr:`recent_covariance`, hence unbiased also along directions
        that mix coordinates; with K gradients kept its relative standard deviation is about :math:`\sqrt{2 / K}`.

        Args:
            directions: Shape ``(D,)``, or ``(D, k)`` in columns, as eigenvectors come from ``lb.lanczos`` (of the
                Hessian) and ``covariance.principal_components`` (of SWAG); of any length but zero.

        Returns:
            Float64, shape ``()`` or ``(k,)``.

        Raises:
            ShapeError: If the first axis is not D.
            ValueError: If a direction is zero or not finite, there is no noise, or as :attr:`recent_covariance`.

        Cost: one read of the gradients kept.
        """
        numel = self.layout.numel
        if directions.ndim not in (1, 2) or directions.shape[0] != numel:
            raise ShapeError(f"directions must have shape ({numel},) or ({numel}, k); got {tuple(directions.shape)}.")
        covariance, trace = self.recent_covariance, self.trace
        columns = directions.detach().reshape(numel, -1)
        squares = to_float64(columns).square().sum(0)
        if not bool(((squares > 0) & squares.isfinite()).all()):
            raise ValueError("directions must be finite and not zero; got one that is not.")
        if trace == 0:
            raise ValueError("an alignment needs noise; all gradients are equal.")
        shares = covariance.project(columns.to(covariance.dtype)).square().sum(0) / squares / trace
        return shares.reshape(directions.shape[1:])

    def overlap(self, covariance: LowRankPlusDiagLinearOperator) -> float:
        r"""Return :math:`\mathrm{tr}(V \Sigma) / (|V| |\Sigma|)`, how alike V and a covariance of the weights are.

        1 for proportional matrices, 0 for those of orthogonal ranges; the norms are Frobenius'. V is
        :attr:`covariance`, whose correlations fade beyond K + 1 gradients: compare at T <= K + 1.

        Args:
            covariance: (D, D), such as ``swag.posterior().covariance``; its scale plays no part.

        Returns:
            In [0, 1].

        Raises:
            ShapeError: If it is not (D, D).
            ValueError: If one of the two is zero, or fewer than 2 gradients were collected.

        Cost: K products with each of the two, and the rank of the other with itself.
        """
        numel = self.layout.numel
        if covariance.shape != (numel, numel):
            raise ShapeError(f"covariance must have shape {(numel, numel)}; got {tuple(covariance.shape)}.")
        own = self.covariance
        norms = [math.sqrt(_inner(each, each)) for each in (own, covariance)]
        if not all(norms):
            raise ValueError("an overlap needs two covariances that are not zero; got one that is.")
        return _inner(own, covariance) / norms[0] / norms[1]


@exact
@torch.no_grad()
def _inner(left: LowRankPlusDiagLinearOperator, right: LowRankPlusDiagLinearOperator) -> float:
    """Return the trace of the product: of a diagonal and a low-rank part, each a sum of nothing negative."""
    total = float(to_float64(left.diag) @ to_float64(right.diagonal()))
    for column in torch.eye(left.rank, dtype=torch.float64, device=sums_device(left.device)):
        vector = left.lift(column[:, None])
        total += float((to_float64(vector) * to_float64(right.matmul(vector.to(right.dtype)))).sum())
    return total


def _ratio(numerator: float, denominator: float) -> float:
    if denominator == 0:
        return math.inf if numerator > 0 else math.nan
    return numerator / denominator
