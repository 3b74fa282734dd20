"""Tensors and generators that say they are on the fake device."""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

META = torch.device("meta")
CpuGenerator = torch.Generator
T = TypeVar("T")


class OnDevice(Tensor):
    """A tensor on the fake device; ``inner`` is the CPU tensor with its numbers.

    ``anywhere`` marks a number that C++ made by itself (a scalar, a zero gradient): it is of the device that it meets.
    """

    inner: Tensor
    place: torch.device
    anywhere = False
    run: ClassVar[Callable[[Any, Any, Any], Any]]  # what computes on these tensors, and what notes events:
    note: ClassVar[Callable[[str, str], None]]  # set by the FakeDevice that is entered
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, place: torch.device) -> "OnDevice":
        self = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=META,
        )
        self.inner, self.place = inner, place
        return self

    device = property(lambda self: self.place)
    is_cuda = property(lambda self: self.place.type == "cuda")
    is_mps = property(lambda self: self.place.type == "mps")
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return OnDevice.run(func, args, kwargs or {})

    def tolist(self) -> Any:
        OnDevice.note("sync", "tolist")
        return self.inner.detach().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.place} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnDevice":
        if id(self) not in memo:
            copy = self.detach().clone().requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                copy._is_param = True
            memo[id(self)] = copy
        return memo[id(self)]

    def __repr__(self, **kwargs: Any) -> str:
        return f"OnDevice({self.inner!r}, {self.place})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.ndim == 0 else repr(self)


class FakeGenerator(CpuGenerator):
    """A generator that says it is on the fake device and draws on the CPU."""

    place: torch.device

    def __new__(cls, device: Any = "cpu") -> "FakeGenerator":
        self = super().__new__(cls, "cpu")
        self.place = torch.device(device)
        if self.place.type != "cpu" and self.place.index is None:
            self.place = torch.device(self.place.type, 0)
        return self

    device = property(lambda self: self.place)


def place_of(value: Any) -> torch.device | None:
    """Return the fake device of a tensor, also inside functorch's wrappers; None for all else."""
    while isinstance(value, Tensor) and not isinstance(value, OnDevice):
        if not torch._C._functorch.is_functorch_wrapped_tensor(value):
            return None
        value = torch._C._functorch.get_unwrapped(value)
    return value.place if isinstance(value, OnDevice) else None


def on_cpu(value: T) -> T:
    """Return a structure of tensors with the numbers of those on the fake device, as plain tensors; notes nothing."""
    return pytree.tree_map(lambda leaf: leaf.inner.detach() if isinstance(leaf, OnDevice) else leaf, value)
