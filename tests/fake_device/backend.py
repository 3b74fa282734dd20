"""What is computed: every operation on a tensor of the fake device, on the CPU tensor inside."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from tests.fake_device.log import Log, line
from tests.fake_device.rules import FREE, check_devices, note_waits
from tests.fake_device.tensor import META, OnDevice

aten = torch.ops.aten
_TENSOR_CORES = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.addmm_, aten.baddbmm_}


class Backend(TorchDispatchMode):
    """Runs operations of which a tensor is, or is to be made, on the fake device."""

    def __init__(self, default: torch.device, log: Log, float64: bool) -> None:
        super().__init__()
        self.default, self.log, self.float64 = default, log, float64
        self._makes: list[torch.device | None] = []

    @contextmanager
    def making(self, place: torch.device | None) -> Iterator[None]:
        """Put what is made on ``meta`` for the duration on a device instead; None: on meta, in earnest."""
        self._makes.append(place)
        try:
            yield
        finally:
            self._makes.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute one operation of ATen."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        if not ours and not self._made_for_ours(tensors, kwargs):
            return func(*args, **kwargs)
        packet = getattr(func, "overloadpacket", func)
        name = str(packet).removeprefix("aten.")
        place = self._place(ours)
        inner_args, inner_kwargs = pytree.tree_map(_inside, (args, kwargs))
        to_host = False
        if inner_kwargs.get("device") is not None:
            to_host = bool(ours) and torch.device(inner_kwargs["device"]).type == "cpu" and packet is aten._to_copy
            inner_kwargs["device"] = torch.device("cpu")
        if ours:
            check_devices(self.log, packet, name, args, tensors, ours)
            note_waits(self.log, packet, name, inner_args)
        if packet in _TENSOR_CORES and place.type == "cuda" and _tf32():
            first = 1 if "add" in name else 0
            factors = map(_as_tf32, inner_args[first : first + 2])
            inner_args = (*inner_args[:first], *factors, *inner_args[first + 2 :])
        result = func(*inner_args, **inner_kwargs)
        if not isinstance(result, (Tensor, tuple, list)):
            return result
        found = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if not self.float64 and not to_host and any(tensor.dtype is torch.float64 for tensor in found):
            unsupported = "as the MPS framework doesn't support float64. Please use float32 instead."
            raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype {unsupported} ({name}, {line()})")
        if packet not in FREE and not func.is_view and (not found or any(tensor.numel() for tensor in found)):
            read = sum(_num_bytes(tensor.inner) for tensor in {id(tensor): tensor for tensor in ours}.values())
            sizes = [_num_bytes(tensor) for tensor in found]
            self.log.launched(name, read + sum(sizes), max(sizes, default=0))
        if packet is aten.copy_ and not isinstance(args[0], OnDevice):
            return args[0]
        if to_host:
            return result
        wrapped = pytree.tree_map(lambda leaf: OnDevice(leaf, place) if isinstance(leaf, Tensor) else leaf, result)
        if not self._makes and all(tensor.anywhere for tensor in ours):
            for leaf in pytree.tree_leaves(wrapped):
                if isinstance(leaf, OnDevice):
                    leaf.anywhere = True
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if ours else wrapped

    def _made_for_ours(self, tensors: list[Tensor], kwargs: Any) -> bool:
        """Whether an operation without tensors of ours makes one: asked for, or by C++ for one that it has seen."""
        to_meta = kwargs.get("device") is not None and torch.device(kwargs["device"]) == META
        in_earnest = bool(self._makes) and self._makes[-1] is None
        return to_meta and not in_earnest and all(tensor.device != META for tensor in tensors)

    def _place(self, ours: list[OnDevice]) -> torch.device:
        settled = [tensor for tensor in ours if not tensor.anywhere] or ours
        if settled:
            return settled[0].place
        made = self._makes[-1] if self._makes else None
        return self.default if made is None else made


def _inside(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, OnDevice) else leaf


def _tf32() -> bool:
    return torch._C._get_cublas_allow_tf32()


def _as_tf32(x: Any) -> Any:
    """What tensor cores read of a float32 factor where TF32 is allowed: 10 bits of mantissa, rounded to nearest."""
    if not isinstance(x, Tensor) or x.dtype is not torch.float32:
        return x
    bits = x.detach().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def _num_bytes(tensor: Tensor) -> int:
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else 1
    return size
