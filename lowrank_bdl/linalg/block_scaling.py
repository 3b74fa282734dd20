r"""Rows of small numbers in few bits: one float32 scale per row and block of columns.

float16 underflows below 6e-8 and SWAG deviations reach 1e-9; with a scale per block, every block uses the full range
of the code type, as in microscaling formats (OCP "Microscaling Formats (MX) Specification", v1.0, 2023, section 5).
Scales of floating codes are powers of two, so scaling rounds nothing and encoding what was decoded changes no bit.
"""

import torch
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.moments import column_chunks

BLOCK = 4096
"""Columns that share one scale: 4 bytes in 8 kB of float16 codes."""

# the largest magnitude of a block is brought into [2**(e-1), 2**e): half the largest code or more, never above it
_FLOAT_EXPONENT = {torch.float16: 15, torch.float8_e4m3fn: 8}
_INT_LIMIT = {torch.int8: 127}
_SMALLEST_EXPONENT = -126  # a subnormal scale would have an infinite reciprocal


def needs_scale(dtype: torch.dtype) -> bool:
    """Say whether rows stored in ``dtype`` carry block scales: float32, float64 and bfloat16 have the range not to.

    Raises:
        ValueError: If ``dtype`` is no storage type of deviations.
    """
    if dtype in (torch.float32, torch.float64, torch.bfloat16):
        return False
    if dtype in _FLOAT_EXPONENT or dtype in _INT_LIMIT:
        return True
    names = "float32, float64, bfloat16, float16, float8_e4m3fn or int8"
    raise ValueError(f"storage dtype must be {names}; got {dtype}.")


def num_blocks(numel: int, block: int = BLOCK) -> int:
    """Return ``ceil(numel / block)``, the number of scales of one row."""
    return -(-numel // block)


def encode_rows(
    x: Tensor,
    dtype: torch.dtype,
    block: int = BLOCK,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    check_finite: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Return codes and scales with :math:`x_{kj} \approx \mathrm{code}_{kj}\, s_{k,\lfloor j/\mathrm{block}\rfloor}`.

    The relative error of an entry is at most 2⁻¹¹ in float16 and 2⁻⁴ in float8_e4m3fn, for entries within 2⁻²⁹
    (float16) or 2⁻¹⁴ (float8) of the largest in their block; the error in int8 is at most 1/254 of that largest entry.
    A block of zeros has scale 1.

    Args:
        x: Rows, shape ``(*B, K, D)``, floating dtype.
        dtype: float16, float8_e4m3fn or int8.
        block: Columns per scale.
        out: Codes ``(*B, K, D)`` and scales ``(*B, K, ceil(D/block))`` to write into; new tensors if None.
        check_finite: Look for NaN and infinities, which waits for an accelerator; False for callers who have done so.

    Returns:
        Codes, shape ``(*B, K, D)``, dtype ``dtype``; scales, shape ``(*B, K, ceil(D/block))``, float32.

    Raises:
        ValueError: If ``dtype`` takes no scale.
        ShapeError: If ``out`` does not fit.
        NonFiniteError: If an entry is NaN or infinite (or beyond float32); nothing is written then.

    Cost: two reads of ``x``, one write of the codes; temporaries of a chunk of columns.

    Example:
        >>> x = torch.tensor([[1e-9, -3e-9]])  # float16 alone would make both zero
        >>> codes, scale = encode_rows(x, torch.float16)
        >>> bool(((decode_rows(codes, scale, torch.float32) - x).abs() <= 2**-11 * x.abs()).all())
        True
    """
    if not needs_scale(dtype):
        raise ValueError(f"rows in {dtype} take no scale; use x.to(dtype).")
    shape = (*x.shape[:-1], num_blocks(x.shape[-1], block))
    if out is None:
        out = torch.empty_like(x, dtype=dtype), torch.empty(shape, dtype=torch.float32, device=x.device)
    codes, scale = out
    if codes.shape != x.shape or scale.shape != shape or codes.dtype != dtype:
        raise ShapeError(
            f"out must be {dtype} codes {tuple(x.shape)} and scales {shape}; "
            f"got {codes.dtype} {tuple(codes.shape)} and {tuple(scale.shape)}."
        )
    new_scale = _scales(x, dtype, block)
    if check_finite and not bool(new_scale.isfinite().all()):
        raise NonFiniteError(f"expected finite rows to encode as {dtype}; got NaN or infinity.")
    for columns in column_chunks(x.shape[-1], x.device, block):
        part = x[..., columns].to(torch.promote_types(x.dtype, torch.float32), copy=True)
        _multiply_blocks_(part, new_scale.reciprocal(), block, columns.start)
        if dtype in _INT_LIMIT:
            part.round_().clamp_(-_INT_LIMIT[dtype], _INT_LIMIT[dtype])
        codes[..., columns] = part.to(dtype)
    scale.copy_(new_scale)
    return codes, scale


def decode_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype, block: int = BLOCK, start: int = 0) -> Tensor:
    """Return ``codes * scale`` of each block: rows, or a range of columns of rows, in a floating dtype.

    Args:
        codes: Shape ``(*B, K, d)``: columns ``start`` to ``start + d`` of the encoded rows.
        scale: Scales of the whole rows, shape ``(*B, K, ceil(D/block))``.
        dtype: dtype of the result.
        block: Columns per scale.
        start: First column of ``codes`` inside the rows; need not be a multiple of ``block``.

    Returns:
        Shape ``(*B, K, d)``, dtype ``dtype``; always a new tensor.

    Raises:
        ShapeError: If ``scale`` does not cover the columns.

    Cost: one read of the codes and two passes over the result.
    """
    end = start + codes.shape[-1]
    if start < 0 or num_blocks(end, block) > scale.shape[-1] or scale.shape[:-1] != codes.shape[:-1]:
        raise ShapeError(
            f"scale must be {(*codes.shape[:-1], f'>= {num_blocks(end, block)}')} for columns {start} to {end}; "
            f"got {tuple(scale.shape)}."
        )
    out = codes.to(dtype, copy=True)
    _multiply_blocks_(out, scale.to(dtype), block, start)
    return out


def _scales(x: Tensor, dtype: torch.dtype, block: int) -> Tensor:
    full = x.shape[-1] // block * block
    parts = [x[..., :full].view((*x.shape[:-1], full // block, block))] if full else []
    if full < x.shape[-1]:
        parts.append(x[..., full:].unsqueeze(-2))
    if not parts:
        return x.new_empty((*x.shape[:-1], 0), dtype=torch.float32)
    # max of -min and max, not abs(): no temporary of the size of x
    bounds = [torch.aminmax(part, dim=-1) for part in parts]
    largest = torch.cat([torch.maximum(high, -low) for low, high in bounds], dim=-1).to(torch.float32)
    if dtype in _INT_LIMIT:
        scale = (largest / _INT_LIMIT[dtype]).clamp_min(2.0**_SMALLEST_EXPONENT)
    else:
        exponent = torch.frexp(largest).exponent - _FLOAT_EXPONENT[dtype]
        scale = torch.ldexp(torch.ones_like(largest), exponent.clamp_min(_SMALLEST_EXPONENT))
    scale = torch.where(largest == 0, torch.ones_like(scale), scale)
    return torch.where(largest.isfinite(), scale, largest)  # NaN and infinity stay visible to the caller


def _multiply_blocks_(x: Tensor, factor: Tensor, block: int, start: int) -> None:
    """Multiply columns ``start`` to ``start + d`` in place by their blocks' factors: head, whole blocks, tail."""
    d = x.shape[-1]
    head = min(-start % block, d)
    first = start // block
    if head:
        x[..., :head].mul_(factor[..., first : first + 1])
        first += 1
    whole = (d - head) // block
    if whole:
        body = x[..., head : head + whole * block].view((*x.shape[:-1], whole, block))
        body.mul_(factor[..., first : first + whole, None])
    if head + whole * block < d:
        x[..., head + whole * block :].mul_(factor[..., first + whole : first + whole + 1])
