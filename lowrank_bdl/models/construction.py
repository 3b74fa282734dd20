"""What the networks' constructors share: checks of sizes, dropout that costs nothing at rate 0, initial weights."""

import math
from operator import index

from torch import nn

from lowrank_bdl.errors import ShapeError


def at_least(what: str, value: int, least: int = 1) -> int:
    """Return a size as an int after a check.

    Args:
        what: What the size is of, for the message.
        value: Anything that is an integer: a Python or NumPy int, or a 0-d integer tensor.
        least: Smallest size allowed.

    Returns:
        The size.

    Raises:
        ShapeError: If it is no integer or too small.

    Example:
        >>> at_least("num_classes", 10)
        10
    """
    try:
        size = index(value)
    except TypeError:
        raise ShapeError(f"{what} must be an integer; got {value!r}.") from None
    if size < least:
        raise ShapeError(f"{what} must be at least {least}; got {size}.")
    return size


def image_side(net: str, image_size: int, least: int) -> int:
    """Check that a network can take images of a size.

    Args:
        net: Name of the network, for the message.
        image_size: Height and width of the images [pixels].
        least: Smallest size whose feature maps do not vanish [pixels].

    Returns:
        The size.

    Raises:
        ShapeError: If the images are too small.

    Example:
        >>> image_side("VGG", 32, 32)
        32
    """
    size = at_least("image_size", image_size)
    if size < least:
        raise ShapeError(f"{net} takes images of {least} x {least} pixels or more; got image_size={size}.")
    return size


def dropout(rate: float, channels: bool = False) -> nn.Module:
    """Make a dropout layer, or the identity at rate 0, where torch would still draw a mask.

    Args:
        rate: Probability that a value is dropped, in [0, 1).
        channels: Whether whole channels are dropped.

    Returns:
        The layer; it owns no parameters.

    Raises:
        ValueError: If the rate is outside [0, 1).

    Example:
        >>> dropout(0.0), dropout(0.1)
        (Identity(), Dropout(p=0.1, inplace=False))
    """
    if not 0 <= rate < 1:
        raise ValueError(f"A dropout rate must lie in [0, 1); got {rate}.")
    if rate == 0:
        return nn.Identity()
    return nn.Dropout2d(rate) if channels else nn.Dropout(rate)


def initialise_convolutions_(module: nn.Module) -> None:
    r"""Draw every convolution's weights from :math:`N(0, 2 / (k^2 c_\text{out}))` and zero its biases, in place.

    Args:
        module: The network; its other layers keep what torch gave them.

    Cost: O(D). Draws from torch's global generator, as every ``nn.Module`` does when it is made.

    Source: He et al., "Delving deep into rectifiers" (2015), equation 14 (fan out).

    Example:
        >>> net = nn.Conv2d(1, 2, 3)
        >>> initialise_convolutions_(net)
        >>> net.bias.tolist()
        [0.0, 0.0]
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
            nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
