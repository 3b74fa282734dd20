"""Fisher matrices of the weights as linear operators: expected, by sampled labels, and empirical."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from lowrank_bdl.curvature.ggn import GaussNewtonLinearOperator, OutputProduct
from lowrank_bdl.curvature.loss_gradients import BatchNormMode
from lowrank_bdl.curvature.scores import BernoulliScores, GaussianScores, Labels, resolve_scores
from lowrank_bdl.parameters.batches import CallFn, Data, TargetFn
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.likelihoods import IGNORED
from lowrank_bdl.parameters.selection import Selector

FisherKind: TypeAlias = Literal["expected", "sampled", "empirical"]

_LABELS: dict[str, Labels] = {"expected": "expected", "sampled": "sampled", "empirical": "true"}


class FisherLinearOperator(GaussNewtonLinearOperator):
    r"""The Fisher matrix :math:`F = \frac1N \sum_n J_n^\top E[s s^\top] J_n`, :math:`s = \nabla_f \log p(y \mid f_n)`.

    What y is drawn from is part of its definition (Kunstner, Balles and Hennig, "Limitations of the empirical Fisher
    approximation", NeurIPS 2019):

    - ``kind="expected"``: the expectation under the model's own :math:`p(y \mid f_n)`, exactly; the generalised
      Gauss-Newton matrix of the negative log-likelihood.
    - ``kind="sampled"``: ``num_samples`` draws from it an example, an unbiased estimate; drawn once, the same in every
      product.
    - ``kind="empirical"``: y of the data set. No approximation of the curvature: it vanishes with the residuals.

    The likelihood of an example is that of all its outputs together, and no mean over them: with
    ``likelihood="gaussian"`` and outputs of C numbers, F is C / 2 times the Gauss-Newton matrix of ``mse_loss``.

    Args:
        model: The network, not changed. The weights are those it has now.
        likelihood: ``"categorical"`` (outputs are logits ``(N, C, *positions)``; targets of -100 count nowhere),
            ``"bernoulli"`` (logits ``(N, *S)``, targets in [0, 1]) or ``"gaussian"`` (means ``(N, *S)``).
        data: As for `HessianLinearOperator`; the targets are used only by ``kind="empirical"``, but always checked.
        kind: Which Fisher matrix.
        noise_variance: Of the Gaussian likelihood [unit of y, squared].
        num_samples: Labels drawn for each example by ``kind="sampled"``.
        generator: Source of the seed of these draws; which labels come also depends on how the data are batched.
        layout: As for `HessianLinearOperator`, like all that follow.
        include: Parameters to take.
        exclude: Parameters to leave out.
        bn_mode: Batch norm by stored statistics or by the batch's.
        check: Whether to see that F is the same every time.
        chunk_size: How many vectors of a block go through the graph at once.
        call_fn: ``call_fn(model, batch)`` gives the outputs.
        target_fn: ``target_fn(batch)`` gives the targets.

    Raises:
        ShapeError: If no parameter is selected, or outputs and targets do not fit the likelihood.
        ValueError: If an argument is unknown or out of range, or the data are shuffled or can be read only once.
        LowRankBDLError: If two passes over the data do not give the same matrix.
        NonFiniteError: If a product is not finite.

    Cost: as `GGNLinearOperator`.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> FisherLinearOperator(net, "gaussian", (x, y)).to_dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        data: Data,
        *,
        kind: FisherKind = "expected",
        noise_variance: float = 1.0,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        layout: ParameterLayout | None = None,
        include: "Selector | None" = None,
        exclude: "Selector | None" = None,
        bn_mode: BatchNormMode = "eval",
        check: bool = True,
        chunk_size: int | None = None,
        call_fn: CallFn | None = None,
        target_fn: TargetFn | None = None,
    ) -> None:
        if kind not in _LABELS:
            raise ValueError(f"kind must be one of {', '.join(_LABELS)}; got {kind!r}.")
        if num_samples < 1 or (num_samples > 1 and kind != "sampled"):
            raise ValueError(f"num_samples must be at least 1, and 1 unless kind='sampled'; got {num_samples}.")
        self._scores = resolve_scores(likelihood, noise_variance)
        super().__init__(
            model,
            data,
            layout=layout,
            include=include,
            exclude=exclude,
            bn_mode=bn_mode,
            chunk_size=chunk_size,
            call_fn=call_fn,
            target_fn=target_fn,
        )
        self.kind: FisherKind = kind
        self._num_samples = num_samples
        if kind == "sampled":
            place = "cpu" if generator is None else generator.device
            self._seed = int(torch.randint(2**62, (), generator=generator, device=place))
        if check:
            self._run_check()

    def _output_product(self, outputs: Tensor, targets: Tensor, generator: torch.Generator | None) -> OutputProduct:
        outputs, targets = self._scores.check(outputs, targets)
        self._num_terms = self._scores.examples(targets)
        if self.kind == "expected":
            if isinstance(self._scores, GaussianScores):
                precision = 1 / self._scores.noise_variance
                return lambda vectors: vectors * precision
            if isinstance(self._scores, BernoulliScores):
                variance = self._scores.variance(outputs).to(outputs.dtype)
                return lambda vectors: vectors * variance
            probs = outputs.to(torch.promote_types(outputs.dtype, torch.float32)).softmax(1)
            probs = probs * (targets != IGNORED).unsqueeze(1)
            return lambda vectors: _covariance_product(probs, vectors)
        rounds = range(self._num_samples)
        drawn = [self._scores.scores(outputs, targets, _LABELS[self.kind], generator) for _ in rounds]
        scores = torch.stack([score for each in drawn for score in each]).flatten(2)  # (S, N, outputs)

        def product(vectors: Tensor) -> Tensor:
            flat = vectors.flatten(2)
            weights = torch.einsum("sno,cno->csn", scores, flat)
            return (torch.einsum("csn,sno->cno", weights, scores) / len(rounds)).view(vectors.shape)

        return product


def _covariance_product(probs: Tensor, vectors: Tensor) -> Tensor:
    """Multiply ``(c, N, C, ...)`` by diag(p) - p p' of each example and position."""
    weighted = probs * vectors
    return (weighted - probs * weighted.sum(2, keepdim=True)).to(vectors.dtype)
