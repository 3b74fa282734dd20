"""Draws on a GPU with the noise generated where it is used: one read of the root, one write of the result.

Needs Triton; `kernels.draw` falls back to torch operations without it. The normal of sample s and coordinate i is a
function of the seed, s and i alone (Philox 4x32-10, counter (i / 4, s)), whatever the block sizes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_bdl.linalg.block_scaling import BLOCK
from lowrank_bdl.linalg.factors import LowRankFactors


@triton.jit  # type: ignore[untyped-decorator]
def _draw_kernel(  # type: ignore[no-untyped-def]
    out,
    root,
    scale,
    diag,
    mean,
    inner,
    noise_out,
    seed_at,
    dim,
    num_samples,
    num_columns,
    root_stride_k,
    root_stride_d,
    scale_stride_k,
    HAS_MEAN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    EXPORT: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Everything that makes an address is int64. One axis of programs: a second one would end at 65,535 blocks.
    dim = tl.cast(dim, tl.int64)
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(dim, BLOCK_D)
    first = program % across * BLOCK_D
    columns = first + tl.arange(0, BLOCK_D)
    samples = program // across * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = columns < dim
    mask = (samples < num_samples)[:, None] & inside[None, :]
    low_rank = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
    for k in range(num_columns):
        at = tl.cast(k, tl.int64)  # K x D numbers are more than 2^31 from D = 107 million at K = 20
        row = tl.load(root + at * root_stride_k + columns * root_stride_d, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCALE:
            row *= tl.load(scale + at * scale_stride_k + columns // SCALE_BLOCK, mask=inside, other=0.0)
        weight = tl.load(inner + at * num_samples + samples, mask=samples < num_samples, other=0.0)
        low_rank += weight[:, None] * row[None, :]
    quads = (first // 4 + tl.arange(0, BLOCK_D // 4)).to(tl.uint32)
    counter = tl.zeros((BLOCK_S, BLOCK_D // 4), dtype=tl.uint32)
    words = tl.philox(
        tl.load(seed_at), counter + quads[None, :], counter + samples.to(tl.uint32)[:, None], counter, counter
    )
    z0, z1 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(words[0]), tl.uint_to_uniform_float(words[1]))
    z2, z3 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(words[2]), tl.uint_to_uniform_float(words[3]))
    noise = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))  # coordinate 4 q + j holds z_j of quad q
    result = noise * tl.sqrt(tl.load(diag + columns, mask=inside, other=0.0))[None, :] + low_rank
    if HAS_MEAN:
        result += tl.load(mean + columns, mask=inside, other=0.0)[None, :]
    place = samples[:, None] * dim + columns[None, :]
    tl.store(out + place, result, mask=mask)
    if EXPORT:
        tl.store(noise_out + place, noise, mask=mask)


def fused_draw(
    factors: LowRankFactors,
    inner: Tensor,
    generator: torch.Generator | None,
    mean: Tensor | None,
    noise_out: Tensor | None = None,
) -> Tensor:
    """Draw as `kernels.draw` does for one matrix without batch axes and a float32 diagonal, shape ``(S, D)``.

    Args:
        factors: The matrix.
        inner: The low-rank normals after the mix, ``M z``, shape ``(K, S)``, float32.
        generator: Source of the seed.
        mean: Shape ``(D,)``, or None for zero.
        noise_out: Where to export the normals, ``(S, D)`` float32; for tests.

    Cost: one read of the root for every 32 draws, one write of the result; nothing else of size D.
    """
    columns, num_samples = inner.shape
    device, dim = factors.diag.device, factors.dim
    out = torch.empty((num_samples, dim), dtype=torch.float32, device=device)
    seed = torch.randint(2**62, (1,), device=device, generator=generator)
    diag = factors.diag.contiguous()
    scale = diag if factors.scale is None else factors.scale.contiguous()
    block_s = min(32, triton.next_power_of_2(max(num_samples, 1)))
    block_d = 1024 // max(block_s // 4, 1)
    grid = (triton.cdiv(dim, block_d) * triton.cdiv(num_samples, block_s),)
    if not out.numel():
        return out
    with torch.cuda.device_of(diag):  # Triton launches on the current device, whatever the tensors'
        _draw_kernel[grid](
            out,
            factors.root,
            scale,
            diag,
            diag if mean is None else mean.contiguous(),
            inner.contiguous(),
            out if noise_out is None else noise_out,
            seed,
            dim,
            num_samples,
            columns,
            factors.root.stride(1),
            factors.root.stride(0),
            scale.stride(0),
            HAS_MEAN=mean is not None,
            HAS_SCALE=factors.scale is not None,
            EXPORT=noise_out is not None,
            SCALE_BLOCK=BLOCK,
            BLOCK_S=block_s,
            BLOCK_D=block_d,
        )
    return out
