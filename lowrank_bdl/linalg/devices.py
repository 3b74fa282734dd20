"""Rules of devices: which have float64, where wide sums live, and generators that fit."""

import torch
from torch import Tensor

from lowrank_bdl.errors import LowRankBDLError


def has_float64(device: torch.device) -> bool:
    """Say whether a device computes in float64: all do but Apple's MPS."""
    return device.type != "mps"


def sums_device(device: torch.device) -> torch.device:
    """Return where float64 sums of tensors on a device are kept: there, or on the CPU if it has no float64."""
    return device if has_float64(device) else torch.device("cpu")


def to_float64(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on :func:`sums_device` of its device; differentiable, no copy if it is there."""
    return tensor.double() if has_float64(tensor.device) else tensor.to("cpu").double()


def in_dtype(tensor: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Return a tensor in a dtype, where work in that dtype is done for tensors of a device.

    Args:
        tensor: Of any dtype.
        dtype: Of the work.
        device: Whose tensors it meets; its own if None.
    """
    place = tensor.device if device is None else device
    return tensor.to(device=sums_device(place) if dtype is torch.float64 else place, dtype=dtype)


def sum_in_float64(tensor: Tensor, dim: int) -> Tensor:
    """Return the sum along an axis in float64; no float64 copy of the tensor where the device can do without."""
    return tensor.sum(dim, dtype=torch.float64) if has_float64(tensor.device) else to_float64(tensor).sum(dim)


def norm_in_float64(tensor: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Return 2-norms in float64; no float64 copy of the tensor where the device can do without."""
    if not has_float64(tensor.device):
        tensor = to_float64(tensor)
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dim, keepdim=keepdim, dtype=torch.float64)
    return norm


def require_float64(device: torch.device, what: str) -> None:
    """Refuse what needs float64 on a device without.

    Args:
        device: Where the tensors are.
        what: The operation, as the beginning of a sentence.

    Raises:
        LowRankBDLError: If the device has no float64.

    Example:
        >>> require_float64(torch.device("cpu"), "A solve")
    """
    if not has_float64(device):
        raise LowRankBDLError(
            f"{what} sums in float64, which {device} does not have; move the inputs to the CPU, for example by "
            '.to("cpu").'
        )


def generator_on(device: torch.device, generator: torch.Generator | None) -> torch.Generator | None:
    """Return a generator that draws on a device: the given one, or one that is seeded by a number it draws.

    Args:
        device: Where numbers are drawn.
        generator: Of any device; None stays None (torch's default generator of the device).

    Returns:
        A generator of that kind of device. A generator of another kind moves on by one draw, so that two calls differ
        and both are reproducible.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> generator_on(torch.device("cpu"), generator) is generator
        True
    """
    if generator is None or generator.device.type == device.type:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(device).manual_seed(seed)
