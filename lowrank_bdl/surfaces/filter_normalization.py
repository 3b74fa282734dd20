"""Random directions whose filters are as long as the network's own."""

import torch
from torch import Tensor

from lowrank_bdl.linalg.devices import norm_in_float64
from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.surfaces.surface import require_points


@exact
def filter_normalized(
    direction: Tensor, theta: Tensor, layout: ParameterLayout, *, ignore_vectors: bool = True
) -> Tensor:
    r"""Return a direction with every filter scaled to the length of the network's, :math:`d_f \|\theta_f\| / \|d_f\|`.

    Networks with batch norm do the same whatever the scale of a filter, so that a step of one length means little in
    one network and much in another; a step relative to each filter can be compared between them. A filter is what
    makes one output: an entry of the first axis of a weight matrix or convolution.

    Use two such directions in :class:`~lowrank_bdl.surfaces.plane.Plane` itself, which keeps their lengths.

    Args:
        direction: d, shape ``(D,)``; standard normal numbers as published.
        theta: The network's weights, shape ``(D,)`` [parameter].
        layout: What the coordinates are.
        ignore_vectors: Set the direction to 0 in parameters with one axis (biases, batch norm), as published; False
            scales each such parameter as one filter.

    Returns:
        Shape ``(D,)``; a filter whose direction is 0 stays 0 [parameter].

    Raises:
        ShapeError: If direction, weights and layout do not fit together.
        NonFiniteError: If an entry is not finite.

    Cost: two reads of both vectors.

    Source: Li et al., "Visualizing the Loss Landscape of Neural Nets" (2018), section 4.

    Example:
        >>> layout = ParameterLayout.from_module(torch.nn.Linear(2, 2))
        >>> theta = torch.tensor([3.0, 4.0, 0.0, 1.0, 7.0, 7.0])
        >>> (filter_normalized(torch.ones(6), theta, layout) * 2**0.5).round().tolist()
        [5.0, 5.0, 1.0, 1.0, 0.0, 0.0]
    """
    given, weights = require_points([direction, theta], layout)
    result = torch.zeros_like(given)
    for where, shape in zip(layout.slices.values(), layout.shapes, strict=True):
        if len(shape) < 2 and ignore_vectors:
            continue
        filters = (shape[0], shape[1:].numel()) if len(shape) > 1 else (1, shape.numel())
        own, wanted = given.detach()[where].view(filters), weights.detach()[where].view(filters)
        lengths = norm_in_float64(own, dim=1, keepdim=True)
        target = norm_in_float64(wanted, dim=1, keepdim=True)
        scale = torch.where(lengths > 0, target / lengths, 0.0)
        result[where] = (own * scale.to(own.dtype)).flatten()
    return result
