"""Multi-layer perceptrons for classification, and for regression with a predicted variance."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lowrank_bdl.models.construction import at_least, dropout

VARIANCES = ("input", "constant", "none")


def linear_layers(sizes: Sequence[int], rate: float) -> "OrderedDict[str, nn.Module]":
    """Make linear layers of the given sizes with ReLU between them.

    Args:
        sizes: Numbers of units: inputs, hidden layers, outputs.
        rate: Dropout before every linear layer but the first.

    Returns:
        Name to layer, in order: ``linear0``, ``relu0``, ``dropout1`` where the rate is not 0, ``linear1``, ...

    Raises:
        ShapeError: If a size is not positive.
        ValueError: If the rate is outside [0, 1).

    Example:
        >>> list(linear_layers([2, 3, 1], rate=0.0))
        ['linear0', 'relu0', 'linear1']
    """
    sizes = [at_least("a layer's size", size) for size in sizes]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    last = len(sizes) - 2
    for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        if rate and i > 0:
            layers[f"dropout{i}"] = dropout(rate)
        layers[f"linear{i}"] = nn.Linear(inputs, outputs)
        if i < last:
            layers[f"relu{i}"] = nn.ReLU()
    return layers


class MLP(nn.Sequential):
    """Linear layers with ReLU between them.

    Parameter names (``linear0.weight``, ...) are those of the released drbayes code; a hidden list of (200, 50, 50, 50)
    on 2 features is its ToyRegNet.

    Args:
        num_outputs: Number of logits or of predicted means.
        in_features: Number of features of an example; images are flattened.
        hidden: Units of the hidden layers; empty for a linear model.
        dropout_rate: Rate before every linear layer but the first.

    Raises:
        ShapeError: If a size is not positive.
        ValueError: If the rate is outside [0, 1).

    Shape:
        ``(N, in_features)`` or ``(N, *image)`` to ``(N, num_outputs)``.

    Example:
        >>> MLP(1, in_features=2, hidden=(10, 10))(torch.zeros(5, 2)).shape
        torch.Size([5, 1])
    """

    def __init__(
        self, num_outputs: int, *, in_features: int, hidden: Sequence[int] = (400, 400), dropout_rate: float = 0.0
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        layers.update(linear_layers([in_features, *hidden, at_least("num_outputs", num_outputs)], dropout_rate))
        super().__init__(layers)


class VarianceHead(nn.Module):
    r"""Split outputs into a mean and a variance, :math:`\sigma^2 = \mathrm{softplus}(h) + \mathrm{softplus}(v)`.

    The first half of the outputs is the mean and the second half h; without h the variance is softplus(v) everywhere.
    v is learned and starts at 0.

    Args:
        num_outputs: k, the number of targets; v is one number for all of them.
        per_input: Whether the outputs contain h.

    Attributes:
        var: v, shape ``(1,)`` [unit of the target, squared, before softplus].

    Shape:
        ``(N, 2 k)`` (or ``(N, k)`` without h) to a pair of ``(N, k)``.

    Source: the noise model of Izmailov et al., "Subspace inference for Bayesian deep learning" (2019), appendix.

    Example:
        >>> mean, variance = VarianceHead(1)(torch.tensor([[3.0, 0.0]]))
        >>> mean.item(), round(variance.item(), 4)  # 2 log 2
        (3.0, 1.3863)
    """

    def __init__(self, num_outputs: int, per_input: bool = True) -> None:
        super().__init__()
        self.num_outputs, self.per_input = at_least("num_outputs", num_outputs), per_input
        self.var = nn.Parameter(torch.zeros(1))

    def forward(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the variance, each ``(N, num_outputs)``."""
        mean = outputs[:, : self.num_outputs]
        if not self.per_input:
            return mean, softplus(self.var).expand_as(mean)
        return mean, softplus(outputs[:, self.num_outputs :]) + softplus(self.var)


class RegNet(nn.Sequential):
    """Regression network that predicts a mean and a variance, as in the published UCI experiments.

    The default hidden layers are the published ones for more than 6000 training points, down to a last hidden layer of
    2 units that every prediction has to pass; (1000, 1000, 500, 50) is the same without it. Parameter names are those
    of the released drbayes code, whose network gives mean and variance as the two columns of one tensor.

    Args:
        num_outputs: k, the number of targets.
        in_features: Number of features of an example.
        hidden: Units of the hidden layers (published for small sets: (50,); for skillcraft (1000, 500, 50, 2)).
        variance: "input": the variance depends on the input; "constant": one learned number; "none": the network gives
            the mean alone.
        dropout_rate: Rate before every linear layer but the first.

    Raises:
        ShapeError: If a size is not positive.
        ValueError: If ``variance`` is unknown or the rate is outside [0, 1).

    Shape:
        ``(N, in_features)`` to a pair (mean, variance) of ``(N, k)``, which ``torch.nn.GaussianNLLLoss`` and
        ``lb.predict(..., likelihood="gaussian")`` take; to ``(N, k)`` with ``variance="none"``.

    Source: Izmailov et al., "Subspace inference for Bayesian deep learning" (2019), section 5.2 and appendix.

    Example:
        >>> mean, variance = RegNet(1, in_features=13, hidden=(50,))(torch.zeros(4, 13))
        >>> mean.shape, variance.shape, bool((variance > 0).all())
        (torch.Size([4, 1]), torch.Size([4, 1]), True)
    """

    def __init__(
        self,
        num_outputs: int,
        *,
        in_features: int,
        hidden: Sequence[int] = (1000, 1000, 500, 50, 2),
        variance: str = "input",
        dropout_rate: float = 0.0,
    ) -> None:
        if variance not in VARIANCES:
            raise ValueError(f"variance must be one of {', '.join(VARIANCES)}; got {variance!r}.")
        outputs = at_least("num_outputs", num_outputs) * (2 if variance == "input" else 1)
        layers = linear_layers([in_features, *hidden, outputs], dropout_rate)
        if variance != "none":
            layers["var_split"] = VarianceHead(num_outputs, per_input=variance == "input")
        super().__init__(layers)
