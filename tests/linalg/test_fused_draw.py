"""The fused kernel against the plain path, on the GPU where there is one and in Triton's interpreter on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the fused draw needs Triton")

CHECK = """
import torch
from lowrank_bdl.linalg.block_scaling import encode_rows
from lowrank_bdl.linalg.factors import LowRankFactors
from lowrank_bdl.linalg.fused_draw import fused_draw
from lowrank_bdl.linalg.kernels import finish_draw_

device = "cuda" if torch.cuda.is_available() else "cpu"


def seeded(seed):
    return torch.Generator(device).manual_seed(seed)


def draw(factors, samples, mean, export=True):
    inner = torch.randn(factors.root.shape[-1], samples, device=device, generator=seeded(1))
    noise = torch.empty(samples, factors.dim, device=device) if export else None
    return fused_draw(factors, inner, seeded(2), mean, noise), noise, inner


one = torch.tensor(1.0, dtype=torch.float64, device=device)
for dim, rank, samples in ((1, 0, 1), (5, 1, 3), (4100, 2, 33)):
    root = torch.randn(rank, dim, device=device, generator=seeded(0)).mT
    diag, mean = torch.rand(dim, device=device, generator=seeded(3)), torch.arange(dim, device=device).float()
    codes, scale = encode_rows(root.mT, torch.float16)
    for factors in (
        LowRankFactors(root, diag, one),
        LowRankFactors(root.contiguous(), diag, one),
        LowRankFactors(codes.mT, diag, one, scale),
    ):
        for centre in (None, mean):
            fused, noise, inner = draw(factors, samples, centre)
            assert torch.equal(fused, draw(factors, samples, centre, export=False)[0]), "export changes the draw"
            plain = finish_draw_(factors, noise.clone(), inner, centre)
            torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)

# the noise of a sample does not depend on how many are drawn, nor on the block sizes that follow from that
factors = LowRankFactors(torch.zeros(2048, 0, device=device), torch.ones(2048, device=device), one)
few, many = draw(factors, 2, None)[1], draw(factors, 40, None)[1]
assert torch.equal(few, many[:2]), "the noise depends on the number of draws"
assert len(many.unique()) > 0.99 * many.numel(), "the noise repeats"
# 81,920 normals: each bound holds for a correct generator but for one seed in 10^6
z, bound = many.double().flatten(), 4.9 / many.numel() ** 0.5
assert abs(z.mean()) < bound and abs(z.square().mean() - 1) < 2**0.5 * bound
assert abs((z**4).mean() - 3) < 96**0.5 * bound
for lag in (1, 2, 3, 4):
    assert abs((many[:, lag:] * many[:, :-lag]).double().mean()) < bound * 1.01
assert abs((many[1:] * many[:-1]).double().mean()) < bound * 1.01
print("fused draw agrees")
"""


def test_fused_draw_agrees_with_the_plain_path_on_its_own_normals():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.setdefault("OMP_NUM_THREADS", "2")
    import torch

    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"  # has to be set before Triton is imported: hence the process
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fused draw agrees" in done.stdout
