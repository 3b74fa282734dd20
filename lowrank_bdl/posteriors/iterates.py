"""Weights of a network as a collector takes them: one vector, every entry usable."""

from torch import Tensor, nn

from lowrank_bdl.errors import NonFiniteError
from lowrank_bdl.linalg.moments import first_unusable
from lowrank_bdl.parameters.layout import ParameterLayout


def flatten_finite(layout: ParameterLayout, model: nn.Module, bound: float, out: Tensor | None = None) -> Tensor:
    """Return a network's weights as one vector, or refuse them.

    Args:
        layout: What the vector holds.
        model: The network.
        bound: Entries must be smaller than this in magnitude; infinity asks for finite ones.
        out: Where to write, shape ``(D,)``; a new vector if None.

    Returns:
        Shape ``(D,)``.

    Raises:
        ShapeError: If a parameter is missing or has another shape; names the first one.
        NonFiniteError: If a weight is NaN, infinite or too large; names it.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(net.weight, 2.0)
        >>> flatten_finite(ParameterLayout.from_module(net), net, bound=float("inf"))
        tensor([2.])
    """
    theta = layout.flatten(model, out=out)
    bad = first_unusable(theta, bound)
    if bad is not None:
        name = layout.name_of(bad)
        entry = bad - layout.slices[name].start
        limit = "" if bound == float("inf") else f" below {bound:.1e} in magnitude"
        raise NonFiniteError(
            f"expected finite weights{limit}; parameter {name!r} has {theta[bad].item()} at flat index {entry}. "
            "The collector is unchanged."
        )
    return theta
