"""The fused kernel against the plain path, on the GPU where there is one and in Triton's interpreter on a CPU."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowrank_bdl.linalg import kernels

triton = pytest.importorskip("triton", reason="the fused draw needs Triton")

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


FAR = """
import os, sys, torch
from lowrank_bdl.linalg.factors import LowRankFactors
from lowrank_bdl.linalg.fused_draw import fused_draw

# Rows of int8 codes 2^30 + 3 bytes apart, in a file that is empty but for what is written: the last is behind 2^31.
dim, rank, apart = 5000, 4, 2**30 + 3
with open(sys.argv[1], "wb") as file:
    file.truncate((rank - 1) * apart + dim)
storage = torch.from_file(sys.argv[1], shared=True, size=(rank - 1) * apart + dim, dtype=torch.int8)
root = storage.as_strided((dim, rank), (1, apart))
scale = torch.rand(rank, 2, generator=torch.Generator().manual_seed(0))
for k in range(rank):
    root[:, k] = torch.randint(-100, 100, (dim,), generator=torch.Generator().manual_seed(k))
factors = LowRankFactors(root, torch.zeros(dim), torch.tensor(1.0, dtype=torch.float64), scale)
inner = torch.randn(rank, 3, generator=torch.Generator().manual_seed(1))
expected = inner.mT.double() @ (root.mT.double() * scale.double().repeat_interleave(4096, 1)[:, :dim])
torch.testing.assert_close(fused_draw(factors, inner, None, None).double(), expected, rtol=1e-5, atol=1e-4)
print("rows far apart")
"""

# Many draws of few coordinates: more blocks of draws than the second axis of a grid has places on a GPU.
TALL = """
import torch
from lowrank_bdl.linalg import fused_draw as module
from lowrank_bdl.linalg.factors import LowRankFactors

grids = []


class Recorded:
    def __getitem__(self, grid):
        grids.append(grid)
        return lambda *args, **kwargs: None


module._draw_kernel = Recorded()
factors = LowRankFactors(torch.zeros(3, 1), torch.ones(3), torch.tensor(1.0, dtype=torch.float64))
module.fused_draw(factors, torch.zeros(1, 2_200_000), None, None)
assert len(grids) == 1 and len(grids[0]) == 1 and grids[0][0] == 68_750, grids
"""

STORED = {"fp32": False, "bf16": False, "fp16": True, "fp8e4nv": True, "i8": True}
"""Types of roots that the library stores, and whether they come with scales."""


def interpreted(program: str, *arguments: str) -> str:
    """Run a program in Triton's interpreter (on the GPU where there is one) and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.setdefault("OMP_NUM_THREADS", "2")
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"  # has to be set before Triton is imported: hence the process
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_fused_draw_agrees_with_the_plain_path_on_its_own_normals():
    assert "fused draw agrees" in interpreted(CHECK)


@pytest.mark.skipif(torch.cuda.is_available(), reason="rows in a file are no memory of a GPU")
def test_rows_further_apart_than_two_to_the_31(tmp_path):
    assert "rows far apart" in interpreted(FAR, str(tmp_path / "storage"))


def test_more_draws_than_a_grid_is_high():
    interpreted(TALL)


def compiled_for(capability: int, root: str, *, mean: bool, width: str, transposed: bool = False) -> Any:
    """Compile the kernel for a GPU that need not be there: `width` is the type of sizes and strides."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lowrank_bdl.linalg.fused_draw import _draw_kernel

    sizes = ("dim", "num_samples", "num_columns", "root_stride_k", "scale_stride_k")
    pointers = ("out", "scale", "diag", "mean", "inner", "noise_out")
    constants = {"HAS_MEAN": mean, "HAS_SCALE": STORED[root], "EXPORT": mean, "SCALE_BLOCK": 4096}
    constants |= {"BLOCK_S": 32, "BLOCK_D": 128} if mean else {"BLOCK_S": 1, "BLOCK_D": 1024}
    constants |= {} if transposed else {"root_stride_d": 1}
    types = dict.fromkeys(pointers, "*fp32") | dict.fromkeys(sizes, width) | {"seed_at": "*i64", "root": f"*{root}"}
    signature = {name: types.get(name, width) for name in _draw_kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    return triton.compile(ASTSource(_draw_kernel, signature, constants), target=GPUTarget("cuda", capability, 32))


def narrow_addresses(code: str) -> list[str]:
    """Return the lines that make an address from anything but int64, or from an int32 product, sum or quotient."""
    lines = [line.strip() for line in code.splitlines()]
    pointers = [line for line in lines if "tt.addptr" in line]
    assert len(pointers) >= 6
    # the names of all int32 results of arithmetic (those of the generator of random numbers never become int64)
    arithmetic = re.compile(r"(%\S+) = arith\.(?:muli|addi|subi|shli|divsi|remsi) .*: (?:tensor<\S*x)?i32>? ")
    narrow = {match[1] for line in lines if (match := arithmetic.match(line))}
    widened = [line for line in lines if "arith.extsi" in line and re.search(r"extsi (%\S+) ", line)[1] in narrow]
    return [line for line in pointers if not re.search(r", (tensor<\S*x)?i64>? loc", line)] + widened


@pytest.mark.parametrize("capability", [75, 80, 90, 100])
@pytest.mark.parametrize("root", STORED)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted code is not compiled")
def test_compiled_for_gpus_with_addresses_of_64_bits(capability, root, tmp_path, monkeypatch):
    """Down to machine code by the ptxas that Triton brings: every stored type, with and without a mean."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if root == "fp8e4nv" and divmod(capability, 10) < kernels.FLOAT8_SINCE:
        with pytest.raises(Exception, match="fp8e4nv not supported"):
            compiled_for(capability, root, mean=True, width="i32")
        return
    for mean, width, transposed in ((True, "i32", False), (False, "i64", False), (True, "i32", True)):
        code = compiled_for(capability, root, mean=mean, width=width, transposed=transposed).asm
        assert len(code["cubin"]) > 1000
        assert narrow_addresses(code["ttir"]) == []


@pytest.mark.parametrize(
    ("capability", "dtype", "fused"),
    [
        ((8, 0), torch.float8_e4m3fn, False),
        ((7, 5), torch.float8_e4m3fn, False),
        ((8, 9), torch.float8_e4m3fn, True),
        ((10, 0), torch.float8_e4m3fn, True),
        ((7, 5), torch.int8, True),
        ((8, 0), torch.float16, True),
    ],
    ids=str,
)
def test_float8_roots_of_older_gpus_take_the_plain_path(capability, dtype, fused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    diag = SimpleNamespace(is_cuda=True, ndim=1, dtype=torch.float32, device=torch.device("cuda:1"))
    factors: Any = SimpleNamespace(diag=diag, root=SimpleNamespace(dtype=dtype))
    assert kernels._fusable(factors) is fused


def test_the_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch):
    from lowrank_bdl.linalg import fused_draw as module
    from lowrank_bdl.linalg.factors import LowRankFactors

    events: list[Any] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Any:
        events.append(tensor)
        yield
        events.append("left")

    class Kernel:
        def __getitem__(self, grid: object) -> Any:
            return lambda *args, **kwargs: events.append("launched")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(module, "_draw_kernel", Kernel())
    factors = LowRankFactors(torch.zeros(3, 1), torch.ones(3), torch.tensor(1.0, dtype=torch.float64))
    module.fused_draw(factors, torch.zeros(1, 2), None, None)
    assert events[0] is factors.diag and events[1:] == ["launched", "left"]
