r"""Numbers of few bits, held in floating-point tensors: block floating point with random rounding, and uniform levels.

Training in low precision is simulated as in the papers: tensors keep their dtype, and hold only values that the
narrow format has. (The packages that do this on a processor's own narrow types have other formats; the one of the
papers' authors is no longer kept.)
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.devices import generator_on

Rounding: TypeAlias = Literal["stochastic", "nearest"]

_SEARCHED = 64  # step sizes that are tried for uniform levels, between none clipped and nearly all


def require_bits(bits: int, name: str = "bits") -> None:
    """Refuse widths that no format has.

    Args:
        bits: Of a number, its sign included.
        name: What the caller calls it.

    Raises:
        ValueError: If it is not an integer from 2 to 24, the digits of a float32.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 24:
        raise ValueError(f"{name} must be an integer from 2 to 24; got {bits!r}.")


def block_floating_point(
    values: Tensor,
    bits: int = 8,
    *,
    block_dim: int | None = None,
    rounding: Rounding = "stochastic",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Round to block floating point: integers of a few bits that share an exponent.

    With :math:`E = \lfloor \log_2 \max_i |x_i| \rfloor` over a block and the step :math:`\delta = 2^{E - (W - 2)}`,

    .. math:: Q(x)_i = \delta \, \mathrm{clip}\bigl(\lfloor x_i / \delta + u_i \rfloor,\; -2^{W-1},\; 2^{W-1} - 1\bigr),

    u uniform on [0, 1) for stochastic rounding, which is unbiased where nothing is clipped, and 1/2 for the nearest.

    Args:
        values: Any shape, floating point.
        bits: W, from 2 to 24, the sign included.
        block_dim: The axis each of whose slices has an exponent of its own (0: a filter of a convolution, "small
            blocks"); None: one exponent for the tensor ("big block").
        rounding: ``"stochastic"`` or ``"nearest"``.
        generator: Source of u, on any device; None takes torch's default generator.

    Returns:
        A new tensor like ``values``; a block of zeros stays zero.

    Raises:
        ValueError: If ``bits`` or ``rounding`` is out of range.
        ShapeError: If the values are no floating-point tensor, or have no such axis.
        NonFiniteError: If a value is not finite: its block would have no exponent.

    Cost: two reads and a write, and for stochastic rounding a uniform number a value.

    Source: Yang et al., "SWALP: Stochastic Weight Averaging in Low-Precision Training" (ICML 2019), section 3.2 and
    appendix.

    Example:
        >>> block_floating_point(torch.tensor([1.9, 0.1, -1.0]), 4, rounding="nearest")  # steps of 2^(0 - 2)
        tensor([ 1.7500,  0.0000, -1.0000])
    """
    require_bits(bits)
    if rounding not in ("stochastic", "nearest"):
        raise ValueError(f"rounding must be 'stochastic' or 'nearest'; got {rounding!r}.")
    if not values.is_floating_point():
        raise ShapeError(f"values must be floating point; got {values.dtype}.")
    if block_dim is not None and not -values.ndim <= block_dim < values.ndim:
        raise ShapeError(f"block_dim must be an axis of values of shape {tuple(values.shape)}; got {block_dim}.")
    if not values.numel():
        return values.clone()
    values = values.detach()
    if block_dim is None:
        largest = values.abs().amax()
    else:
        others = [axis for axis in range(values.ndim) if axis != block_dim % values.ndim]
        largest = values.abs().amax(others, keepdim=True) if others else values.abs()
    if not bool(largest.isfinite().all()):
        raise NonFiniteError("values must be finite to share an exponent; got NaN or infinity.")
    wide = torch.promote_types(values.dtype, torch.float32)
    exponent = torch.frexp(largest.to(wide)).exponent - 1  # of 0 it does not matter
    # Two factors: 2^(W - 2 - E) alone overflows where the largest value is near the smallest of its type.
    scaled = torch.ldexp(torch.ldexp(values.to(wide), -exponent), torch.full_like(exponent, bits - 2))
    if rounding == "stochastic":
        generator = generator_on(scaled.device, generator)
        scaled = scaled.add_(torch.rand(scaled.shape, dtype=wide, device=scaled.device, generator=generator))
    else:
        scaled = scaled.add_(0.5)
    limit = 2 ** (bits - 1)
    whole = scaled.floor_().clamp_(-limit, limit - 1)
    return torch.ldexp(torch.ldexp(whole, torch.full_like(exponent, 2 - bits)), exponent).to(values.dtype)


def uniform_step(values: Tensor, bits: int) -> Tensor:
    r"""Return the step of symmetric uniform levels that loses least.

    That is :math:`\arg\min_\Delta \lVert x - Q_\Delta(x) \rVert` for the levels
    :math:`\Delta \cdot \{-m, \dots, m\}`, :math:`m = 2^{b-1} - 1` (2 bits: three levels). Steps between the one that
    clips nothing and a 64th of it are tried, and the best is refined by least squares once.

    Args:
        values: Any shape, floating point.
        bits: b, from 2 to 24.

    Returns:
        Shape ``()``, Δ >= 0; 0 if all values are.

    Raises:
        ValueError: If ``bits`` is out of range.
        NonFiniteError: If a value is not finite.

    Cost: 66 reads.

    Source: Shin, Boo and Sung, "SQWA: Stochastic Quantized Weight Averaging for Improving the Generalization Capability
    of Low-Precision Deep Neural Networks" (2020), section 2: the L2 criterion.

    Example:
        >>> uniform_step(torch.tensor([-2.0, 0.0, 2.0, 2.0]), 2)
        tensor(2.)
    """
    require_bits(bits)
    values = values.detach()
    if not bool(values.isfinite().all()):
        raise NonFiniteError("values must be finite to be put on levels; got NaN or infinity.")
    if not bool(values.any()):
        return values.new_zeros(())
    most = 2 ** (bits - 1) - 1
    widest = values.abs().amax() / most
    steps = widest * torch.arange(1, _SEARCHED + 1, dtype=values.dtype, device=values.device) / _SEARCHED
    losses = torch.stack([(values - round_uniform(values, step, bits)).square().sum() for step in steps])
    best = steps[losses.argmin()]
    levels = (values / best).round().clamp(-most, most)
    refined = (values * levels).sum() / levels.square().sum()  # the best step for these levels
    better = (values - round_uniform(values, refined, bits)).square().sum() < losses.min()
    return torch.where(better, refined, best)


def round_uniform(values: Tensor, step: "Tensor | float", bits: int) -> Tensor:
    r"""Round to the nearest of the levels :math:`\Delta \cdot \{-m, \dots, m\}`, :math:`m = 2^{b-1} - 1`.

    Args:
        values: Any shape, floating point.
        step: Δ >= 0, as of :func:`uniform_step`; 0 gives zeros.
        bits: b, from 2 to 24.

    Returns:
        A new tensor like ``values``.

    Raises:
        ValueError: If ``bits`` is out of range.

    Example:
        >>> round_uniform(torch.tensor([-3.0, 0.4, 0.6]), 1.0, 2)
        tensor([-1.,  0.,  1.])
    """
    require_bits(bits)
    most = 2 ** (bits - 1) - 1
    step = torch.as_tensor(step, dtype=values.dtype, device=values.device)
    safe = step.where(step > 0, 1)
    return (values / safe).round().clamp(-most, most) * step
