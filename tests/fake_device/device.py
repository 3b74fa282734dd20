"""The context manager that puts the fake device in the place of a real one."""

import contextlib
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lowrank_bdl.linalg import compiled
from lowrank_bdl.linalg.kernels import finish_draw_
from tests.fake_device.arguments import Arguments
from tests.fake_device.backend import Backend
from tests.fake_device.log import Log, Section
from tests.fake_device.tensor import CpuGenerator, FakeGenerator, OnDevice


class FakeDevice:
    """An accelerator, for the duration of a ``with`` block; a description is in the package's docstring.

    Args:
        name: ``"cuda:0"`` (of two: ``cuda:1`` is there too), or ``"mps"``.
        float64: Whether it has that dtype; by default all have it but MPS.
        free_bytes: What ``torch.cuda.mem_get_info`` says is free.
    """

    def __init__(self, name: str = "cuda:0", *, float64: bool | None = None, free_bytes: int = 80 << 30) -> None:
        device = torch.device(name)
        self.device = torch.device(device.type, device.index or 0)
        self.log, self._free_bytes = Log(), free_bytes
        with_float64 = device.type != "mps" if float64 is None else float64
        self._backend = Backend(self.device, self.log, with_float64)
        self._stack = contextlib.ExitStack()

    def section(self) -> "contextlib.AbstractContextManager[Section]":
        """Open a part of the program whose events are counted by themselves."""
        return self.log.section()

    def __enter__(self) -> "FakeDevice":
        OnDevice.run, OnDevice.note = self._backend.run, self.log.note  # type: ignore[assignment]
        stack = self._stack
        stack.enter_context(mock.patch.object(torch, "Generator", FakeGenerator))
        stack.enter_context(mock.patch.object(compiled, "_pointer", _refuse_device_memory(compiled._pointer)))
        if self.device.type == "cuda":
            self._replace_cuda()
        stack.enter_context(self._backend)
        arguments = Arguments(self._backend)
        run_backward = torch.autograd._engine_run_backward

        def with_modes(*args: Any, **kwargs: Any) -> Any:  # a mode is off while it handles backward(): on again inside
            with arguments:
                return run_backward(*args, **kwargs)

        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", with_modes))
        stack.enter_context(arguments)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _replace_cuda(self) -> None:
        state = [CpuGenerator().get_state()]
        replaced: dict[str, Any] = {
            "mem_get_info": lambda device=None: (self._free_bytes, self._free_bytes),
            "memory_reserved": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
            "get_rng_state": lambda device=None: state[0].clone(),
            "set_rng_state": lambda new, device=None: state.__setitem__(0, new.clone()),
            "device_count": lambda: 2,
            "current_device": lambda: 0,
            "is_bf16_supported": lambda including_emulation=True: True,
        }
        for name, value in replaced.items():
            self._stack.enter_context(mock.patch.object(torch.cuda, name, value))
        available = mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        self._stack.enter_context(available)
        if find_spec("triton"):
            self._stack.enter_context(mock.patch("lowrank_bdl.linalg.fused_draw.fused_draw", self._plain_draw))

    def _plain_draw(self, factors: Any, inner: Tensor, generator: Any, mean: Any, noise_out: Any = None) -> Tensor:
        """Stand in for the Triton kernel: the same arguments, checked; one launch; the numbers of the plain path."""
        place = factors.diag.device
        for tensor in (factors.root, inner, *(() if mean is None else (mean,))):
            assert tensor.device == place, f"Triton would read {tensor.device} from {place}"
        out = torch.empty((inner.shape[1], factors.dim), dtype=torch.float32, device=place)
        with self.log.paused():
            out.normal_(generator=generator)
            finish_draw_(factors, out, inner, mean)
        self.log.launched("triton", sum(tensor.nbytes for tensor in (factors.root, factors.diag, out)))
        return out


def _refuse_device_memory(pointer: Any) -> Any:
    def checked(tensor: Tensor | None) -> Any:
        assert not isinstance(tensor, OnDevice), "a pointer to device memory reached a compiled CPU kernel"
        return pointer(tensor)

    return checked
