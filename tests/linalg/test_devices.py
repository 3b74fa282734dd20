"""Generators and float64 by device."""

import pytest
import torch

from lowrank_bdl.errors import LowRankBDLError
from lowrank_bdl.linalg import compiled
from lowrank_bdl.linalg.devices import generator_on, has_float64, require_float64, sums_device, to_float64
from tests.fake_device import FakeDevice


def test_a_generator_of_the_device_is_taken_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    assert generator_on(torch.device("cpu"), generator) is generator
    assert generator_on(torch.device("cuda"), None) is None
    with FakeDevice("cuda"):
        own = torch.Generator("cuda")
        assert generator_on(torch.device("cuda:1"), own) is own  # of the same kind, as torch has it


@pytest.mark.parametrize(("of", "on"), [("cpu", "cuda"), ("cuda", "cpu"), ("cpu", "cuda:1")])
def test_a_generator_of_another_device_seeds_one(of: str, on: str) -> None:
    with FakeDevice("cuda"):
        draws = []
        for _ in range(2):
            given = torch.Generator(of).manual_seed(3)
            for _ in range(2):
                generator = generator_on(torch.device(on), given)
                assert generator is not None and generator.device.type == torch.device(on).type
                draws.append(torch.randn(5, device=on, generator=generator).cpu())
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[1], draws[3])  # reproducible
    assert not torch.equal(draws[0], draws[1])  # and the next call draws something else


def test_float64_is_on_the_device_or_on_the_cpu() -> None:
    with FakeDevice("mps"):
        mps, x = torch.device("mps:0"), torch.ones(3, device="mps", requires_grad=True)
        assert not has_float64(mps) and sums_device(mps) == torch.device("cpu")
        wide = to_float64(x)
        assert wide.dtype is torch.float64 and wide.device.type == "cpu"
        wide.square().sum().backward()
        assert x.grad is not None and x.grad.device == mps and x.grad.dtype is torch.float32
        with pytest.raises(LowRankBDLError, match="A solve sums in float64, which mps:0 does not have; move"):
            require_float64(mps, "A solve")
    with FakeDevice("cuda"):
        x = torch.ones(3, device="cuda")
        assert to_float64(x).is_cuda and sums_device(x.device) == x.device
        require_float64(x.device, "A solve")


def test_compiled_kernels_look_at_the_device_of_every_tensor() -> None:
    diag = torch.ones(compiled.SMALLEST)
    assert compiled.applies(torch.ones(2, compiled.SMALLEST).mT, diag) == (compiled.library() is not None)
    assert not compiled.applies(torch.ones(2, compiled.SMALLEST, device="meta").mT, diag)
    assert not compiled.applies(torch.ones(2, compiled.SMALLEST).mT, diag, torch.ones(compiled.SMALLEST, device="meta"))
    assert not compiled.applies(torch.ones(2, compiled.SMALLEST).mT, diag.to("meta"))
