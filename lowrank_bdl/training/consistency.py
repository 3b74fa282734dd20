"""A loss for images without labels: what a network says about two views of one image should agree."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_bdl.errors import ShapeError

UNLABELLED = -1
"""The target of an example without a label."""


def sigmoid_rampup(time: float, length: float) -> float:
    r"""Return :math:`\exp(-5 (1 - \min(t / \ell, 1))^2)`, which rises from 0.0067 at time 0 to 1 at time ``length``.

    Args:
        time: t >= 0, in any unit.
        length: ℓ >= 0, in the same unit; 0 gives 1 throughout.

    Raises:
        ValueError: If either is negative or not finite.

    Source: Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning" (ICLR 2017), section 2.1.

    Example:
        >>> [round(sigmoid_rampup(epoch, 5), 3) for epoch in (0, 2.5, 5, 9)]
        [0.007, 0.287, 1.0, 1.0]
    """
    for name, value in (("time", time), ("length", length)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite; got {value}.")
    progress = min(time / length, 1.0) if length else 1.0
    return math.exp(-5.0 * (1.0 - progress) ** 2)


def labelled_accuracy(output: Tensor, targets: Tensor) -> Tensor:
    """Return the fraction of a batch's labelled examples whose largest logit is the target's.

    Args:
        output: Logits ``(N, C)``.
        targets: Class indices ``(N)``, :data:`UNLABELLED` where there is none.

    Returns:
        A 0-d tensor in [0, 1]; NaN where no example has a label.

    Example:
        >>> labelled_accuracy(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, UNLABELLED])).item()
        1.0
    """
    right = (output.argmax(1) == targets).sum()
    return right.double() / (targets != UNLABELLED).sum()


@dataclass(frozen=True)
class ConsistencyLoss:
    r"""Cross entropy where there are labels, plus the disagreement between two views of every example.

    With logits :math:`f(x)` of the network, :math:`g(x')` of the teacher at the other view, and N examples of which L
    have a label,

    .. math:: \frac1N \sum_{i \in L} \ell(f(x_i), y_i)
              + \frac{w}{N C} \sum_i \lVert \mathrm{softmax}\, f(x_i) - \mathrm{softmax}\, g(x_i') \rVert^2,

    or, for ``kind="kl"``, :math:`\mathrm{KL}(\mathrm{softmax}\, g \,\|\, \mathrm{softmax}\, f)` in place of the squared
    distance. What the teacher says is a constant. With the network as its own teacher this is the Π-model; with an
    exponential average of its weights, the Mean Teacher.

    With ``separate`` the two kinds of examples pass the networks one after the other, so that batch norm never mixes
    two domains; consistency is then of the examples without a label alone, the mean over those, and the cross entropy
    the mean over L. With ``confidence`` an example counts where the teacher gives a class more than that; the others
    add zeros to the mean.

    Args:
        weight: w >= 0; a function without arguments is asked at every batch (a ramp).
        teacher: Gives ``(N, C)`` in the mode it is in, as the network does; None is the network itself.
        kind: ``"mse"`` or ``"kl"``.
        separate: See above.
        confidence: In [0, 1), or None.

    Raises:
        ValueError: If an argument is out of range.

    Cost: two forward passes and one backward pass.

    Source: Laine and Aila (ICLR 2017); Tarvainen and Valpola, "Mean teachers are better role models" (NeurIPS 2017);
    normalised as in Athiwaratkun et al., "There Are Many Consistent Explanations of Unlabeled Data" (ICLR 2019), whose
    w is 100. Two domains: French, Mackiewicz and Fisher, "Self-ensembling for visual domain adaptation" (ICLR 2018).

    Example:
        >>> views = torch.tensor([[[0.0, 0.0]], [[0.0, 1.0]]])  # two views of one example
        >>> loss, logits = ConsistencyLoss(weight=4.0)(nn.Identity(), views, torch.tensor([UNLABELLED]))
        >>> logits, round(loss.item(), 4)  # (1/2 - 1 / (1 + e))^2, of two classes
        (tensor([[0., 0.]]), 0.2136)
    """

    weight: "float | Callable[[], float]"
    teacher: nn.Module | None = None
    kind: str = "mse"
    separate: bool = False
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("mse", "kl"):
            raise ValueError(f"kind must be 'mse' or 'kl'; got {self.kind!r}.")
        if self.confidence is not None and not 0 <= self.confidence < 1:
            raise ValueError(f"confidence must be in [0, 1), or None; got {self.confidence}.")
        if not callable(self.weight):
            self._checked(self.weight)

    @staticmethod
    def _checked(weight: float) -> float:
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight must be at least 0 and finite; got {weight}.")
        return weight

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss ``()`` and the logits of the first view.

        Args:
            model: Gives logits ``(N, C)``.
            inputs: Two views of each example, ``(2, N, ...)``: the network's and the teacher's.
            targets: Class indices ``(N)``, :data:`UNLABELLED` where there is none.

        Raises:
            ShapeError: If there are not two views, or of other than N examples.
        """
        if inputs.ndim < 2 or inputs.shape[:2] != (2, len(targets)):
            expected = f"(2, {len(targets)}, ...)"
            raise ShapeError(f"inputs must be two views of each example, {expected}; got {tuple(inputs.shape)}.")
        labelled = targets != UNLABELLED
        weight = self._checked(self.weight() if callable(self.weight) else self.weight)
        output = self._forward(model, inputs[0], labelled)
        logits = output.to(torch.promote_types(output.dtype, torch.float32))
        loss = functional.cross_entropy(logits, targets, ignore_index=UNLABELLED, reduction="sum")
        loss = loss / (labelled.sum().clamp(min=1) if self.separate else len(targets))
        view = inputs[1]
        if self.separate:
            logits, view = logits[~labelled], view[~labelled]
        if weight == 0 or len(view) == 0:
            return loss, output
        teacher = model if self.teacher is None else self.teacher
        with torch.no_grad():
            goal = teacher(view).to(logits.dtype).softmax(-1)
        return loss + weight * self._disagreement(logits, goal), output

    def _forward(self, model: nn.Module, inputs: Tensor, labelled: Tensor) -> Tensor:
        """Return logits in the order of the inputs."""
        if not self.separate or bool(labelled.all()) or not bool(labelled.any()):
            output: Tensor = model(inputs)
            return output
        order = torch.cat([labelled.nonzero(), (~labelled).nonzero()]).squeeze(-1)
        parts = [model(inputs[labelled]), model(inputs[~labelled])]
        return torch.cat(parts)[order.argsort()]

    def _disagreement(self, logits: Tensor, goal: Tensor) -> Tensor:
        """Return its mean over examples and classes."""
        if self.kind == "mse":
            each = (logits.softmax(-1) - goal).square()
        else:
            each = functional.kl_div(logits.log_softmax(-1), goal, reduction="none")
        if self.confidence is not None:
            each = each * (goal.amax(-1, keepdim=True) > self.confidence)
        return each.mean()
