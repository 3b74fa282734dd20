"""The emulated accelerator refuses what a real one refuses, waits where it waits, and computes what the CPU does."""

import copy

import pytest
import torch
from torch import nn

from lowrank_bdl.linalg import compiled
from tests.fake_device import FakeDevice, OnDevice, on_cpu


def test_tensors_say_where_they_are() -> None:
    with FakeDevice("cuda:0") as gpu:
        x = torch.ones(3, device="cuda")
        for y in (x, x + 1, x[1:], x.detach(), torch.zeros_like(x), x.new_zeros(2), x.to("cuda"), nn.Parameter(x).data):
            assert isinstance(y, OnDevice)
            assert y.device == gpu.device and y.is_cuda and not y.is_cpu and not y.is_mps
        assert torch.ones(3).device.type == "cpu" and x.cpu().device.type == "cpu"
        assert torch.ones(3, device="meta").device.type == "meta"
        assert x.to("cuda:1").device == torch.device("cuda:1") == torch.zeros_like(x, device="cuda:1").device
        assert x.cpu().tolist() == [1.0, 1.0, 1.0]


def test_a_device_and_the_host_do_not_mix() -> None:
    with FakeDevice("cuda:0"):
        x, host = torch.ones(3, device="cuda"), torch.ones(3)
        for mixed in (
            lambda: x + host,
            lambda: x @ host,
            lambda: torch.stack([x, host]),
            lambda: torch.maximum(host, x),
        ):
            with pytest.raises(RuntimeError, match="same device, but found cuda:0 and cpu"):
                mixed()
        with pytest.raises(RuntimeError, match="indices should be either on cpu"):
            host[torch.tensor([0], device="cuda")]
        with pytest.raises(RuntimeError, match="same device"):
            torch.stack([x[0], torch.tensor(1.0)])
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            x.numpy()
        assert on_cpu(x * torch.tensor(2.0) + 1).tolist() == [3.0, 3.0, 3.0]  # a number may come from anywhere
        assert on_cpu(x[torch.tensor([0, 2])]).tolist() == [1.0, 1.0]


def test_two_devices_do_not_mix() -> None:
    with FakeDevice("cuda:0"):
        x, y = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1", requires_grad=True)
        for mixed in (lambda: x + y, lambda: x @ y, lambda: torch.stack([x, y])):
            with pytest.raises(RuntimeError, match="same device, but found cuda:0 and cuda:1"):
                mixed()
        (x + y.to("cuda:0")).sum().backward()
        assert (
            y.grad is not None
            and y.grad.device == torch.device("cuda:1")
            and on_cpu(y.grad).tolist() == [1.0, 1.0, 1.0]
        )


def test_generators_belong_to_a_kind_of_device() -> None:
    with FakeDevice("cuda:0"):
        with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
            torch.randn(3, device="cuda", generator=torch.Generator())
        with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
            torch.empty(3, device="cuda").normal_(generator=torch.Generator())
        with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'cuda'"):
            torch.randn(3, generator=torch.Generator("cuda"))
        assert torch.Generator("cuda").device == torch.device("cuda:0")
        assert torch.randn(3, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).is_cuda


def test_mps_has_no_float64() -> None:
    with FakeDevice("mps") as mps:
        x = torch.ones(3, device="mps")
        assert x.device == mps.device and x.is_mps and not x.is_cuda
        for wide in (
            x.double,
            lambda: torch.zeros(3, dtype=torch.float64, device="mps"),
            lambda: x.sum(dtype=torch.float64),
        ):
            with pytest.raises(TypeError, match="MPS framework doesn't support float64"):
                wide()
        assert x.to("cpu", torch.float64).dtype is torch.float64
    with FakeDevice("cuda"):
        assert torch.ones(3, device="cuda").double().dtype is torch.float64


def test_what_the_host_waits_for_is_counted_with_its_line() -> None:
    with FakeDevice("cuda") as gpu:
        x = torch.arange(4.0, device="cuda")
        waits = [
            lambda: x[0].item(), lambda: bool(x[0] > 0), lambda: float(x.sum()), x.tolist, x.nonzero, x.cpu,
            lambda: x[x > 1], lambda: torch.equal(x, x), lambda: torch.tensor([1.0], device="cuda"),
            lambda: torch.linalg.eigh(torch.outer(x, x)), lambda: x.copy_(torch.ones(4)),
            lambda: torch.ones(2).to("cuda"),
        ]  # fmt: skip
        for wait in waits:
            with gpu.section() as part:
                wait()
            assert part.num_syncs >= 1, part
        assert "test_fake_device.py:" in part.where()
        with gpu.section() as part:
            x.masked_fill_(x > 2, 0.0)
            x[torch.tensor([0, 1])].add_(1.0)
            torch.ones(2).to("cuda", non_blocking=True)
            (x.unsqueeze(1) * x).sum().sqrt()
        assert part.num_syncs == 0, part.where()
        assert part.ops["mul"] == 1 and part.largest == 64 and part.launches >= 4


def test_a_network_trains_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(6, 4)
    with FakeDevice("cuda") as gpu:
        moved, found = copy.deepcopy(net).to("cuda"), []
        for model, data in ((net, x), (moved, x.to("cuda"))):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            with gpu.section() as steps:
                for _ in range(3):
                    optimizer.zero_grad()
                    model(data).square().mean().backward()
                    optimizer.step()
            found.append([p.detach() for p in model.parameters()])
        assert all(p.is_cuda for p in moved.parameters()) and steps.num_syncs == 0
    for mine, theirs in zip(*map(on_cpu, found), strict=True):
        assert torch.equal(mine, theirs)


def test_autocast_and_tf32_round_products_as_a_gpu_does() -> None:
    a, b = torch.randn(2, 40, 40).unbind()
    exact = a.double() @ b.double()
    with FakeDevice("cuda"):
        x, y = a.to("cuda"), b.to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            assert (x @ y).dtype is torch.bfloat16 and (x + y).dtype is torch.float32
            with torch.autocast("cuda", enabled=False):
                assert (x @ y).dtype is torch.float32
        torch.set_float32_matmul_precision("high")
        try:
            rounded = on_cpu(x @ y)
        finally:
            torch.set_float32_matmul_precision("highest")
        plain = on_cpu(x @ y)
    assert 1e-5 < (rounded - exact).norm() / exact.norm() < 1e-3
    assert (plain - exact).norm() / exact.norm() < 1e-6


def test_device_memory_never_reaches_compiled_kernels() -> None:
    with FakeDevice("cuda"), pytest.raises(AssertionError, match="pointer to device memory"):
        compiled._pointer(torch.ones(3, device="cuda"))
