"""What Python asks for: device arguments of factories and of ``.to``, lists as indices, generators, autocast."""

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.fake_device.backend import Backend
from tests.fake_device.rules import check_generator
from tests.fake_device.tensor import META, OnDevice, place_of

_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray)
_LOWERED = {
    "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "addbmm", "addr", "linear",
    "einsum", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention", "multi_dot", "chain_matmul", "inner",
    "tensordot",
}  # fmt: skip


class Arguments(TorchFunctionMode):
    """The fake device becomes ``meta``, marked so that the backend makes a wrapper of it."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.backend, self.kind, self.note = backend, backend.default.type, backend.log.note

    def is_fake(self, device: Any) -> bool:
        """Whether a device argument means the fake device."""
        if device is None or isinstance(device, Tensor):
            return False
        return self.kind == "cuda" if isinstance(device, int) else torch.device(device).type == self.kind

    def full(self, device: Any) -> torch.device:
        """Return a device argument with its index."""
        device = torch.device(self.kind, device) if isinstance(device, int) else torch.device(device)
        return torch.device(device.type, 0) if device.index is None else device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        first = args[0] if args else None
        if name == "__get__" and args and not isinstance(first, OnDevice):
            return self._property(func, args, kwargs)
        if name == "new_tensor" and place_of(first) is not None:
            kwargs.setdefault("device", place_of(first))
            kwargs["dtype"] = kwargs.get("dtype") or first.dtype
            return self._from_data(torch.tensor, args[1:], kwargs)
        if name in ("__getitem__", "__setitem__") and place_of(first) is not None:
            return func(first, self._index(args[1]), *args[2:])
        if name in ("cuda", "cpu", "mps") and isinstance(first, Tensor):
            return self._to(first, ("cpu" if name == "cpu" else self.backend.default,), kwargs)
        if name == "to" and isinstance(first, Tensor):
            return self._to(first, args[1:], kwargs)
        if name == "_parse_to":  # what `.to` is asked for: the device as it was given
            return func(*args, **kwargs)
        if func in _FROM_DATA:
            return self._from_data(func, args, kwargs)
        if name in _LOWERED and self.kind == "cuda" and torch.is_autocast_enabled("cuda"):
            args, kwargs = pytree.tree_map(self._lowered, (args, kwargs))
        return self._call(func, args, kwargs)

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        generator, device = kwargs.get("generator"), kwargs.get("device")
        first = args[0] if args else None
        if isinstance(device, (str, torch.device)) and torch.device(device) == META:
            with self.backend.making(None):  # meta in earnest: shapes without numbers
                return func(*args, **kwargs)
        if not self.is_fake(device):
            if generator is not None and isinstance(first, Tensor):
                check_generator(generator, place_of(first) or first.device)
            elif generator is not None and not isinstance(device, Tensor):
                check_generator(generator, torch.device("cpu") if device is None else torch.device(device))
            return func(*args, **kwargs)
        place = self.full(device)
        check_generator(generator, place)
        if place_of(first) == place:
            kwargs.pop("device")
            return func(*args, **kwargs)
        wanted = kwargs.pop("requires_grad", False)
        kwargs.pop("pin_memory", None)
        if place_of(first) is not None:  # like a tensor of the other device
            first = OnDevice(first.inner, place)
            kwargs.pop("device")
            result = func(first, *args[1:], **kwargs)
        else:
            with self.backend.making(place):
                result = func(*args, **(kwargs | {"device": META}))
        return result.requires_grad_() if wanted else result

    def _property(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        place = place_of(args[0]) if name in ("device", "is_cuda", "is_cpu", "is_mps", "is_meta") else None
        if place is None:
            return func(*args, **kwargs)
        return place if name == "device" else name == f"is_{place.type}"

    def _lowered(self, leaf: Any) -> Any:
        """What autocast makes of a factor, above autograd as in torch."""
        lower = isinstance(leaf, Tensor) and leaf.dtype is torch.float32 and place_of(leaf) is not None
        return leaf.to(torch.get_autocast_dtype("cuda")) if lower else leaf

    def _index(self, index: Any) -> Any:
        """Lists become tensors here: C++ would make them on meta, without numbers. A GPU copies them, and waits."""
        if isinstance(index, tuple):
            return tuple(self._index(part) for part in index)
        if not isinstance(index, list):
            return index
        self.note("h2d", "index by a list")
        return torch.tensor(index, dtype=torch.bool if index and isinstance(index[0], bool) else torch.long)

    def _to(self, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        other = args[0] if args and isinstance(args[0], Tensor) else kwargs.pop("other", None)
        device: torch.device | None
        if other is not None:
            device, dtype, layout = place_of(other) or other.device, other.dtype, None
            non_blocking = (len(args) > 1 and args[1]) or kwargs.get("non_blocking")
        else:
            device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        place, dtype = place_of(x), x.dtype if dtype is None else dtype
        options = {"copy": copy} | ({} if layout is None else {"memory_format": layout})
        waits = "-async" if non_blocking else ""
        if place is not None and device == META:  # torch's own code asked C++ where the tensor lies
            device = None
        target = None if device is None else self.full(device) if self.is_fake(device) else device
        if target is None or target == (place or x.device):
            return Tensor.to(x, dtype=dtype, **options)
        if place is None and target.type == self.kind:
            self.note(f"h2d{waits}", "to")
            with self.backend.making(target):
                return Tensor.to(x, device=META, dtype=dtype, **options)
        if place is not None and target.type == self.kind:
            return _Moved.apply(x, target).to(dtype)
        if place is not None:
            self.note(f"d2h{waits}", "to")
        return Tensor.to(x, device=target, dtype=dtype, **options)

    def _from_data(self, func: Any, args: Any, kwargs: Any) -> Any:
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        data = args[0] if args else kwargs.get("data")
        if place_of(data) is not None:  # a tensor of the device already
            made = data.detach().clone() if func is torch.tensor else data
            options = {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}
            return self._to(made, (), options) if options else made
        if any(isinstance(leaf, OnDevice) for leaf in pytree.tree_leaves(data)):
            data = pytree.tree_map(lambda leaf: leaf.item() if isinstance(leaf, OnDevice) else leaf, data)
            args = (data, *args[1:])
        if not self.is_fake(device):
            return func(*args, **kwargs)
        kwargs.pop("device")
        wanted = kwargs.pop("requires_grad", False)
        made = self._to(func(*args, **kwargs), (device,), {})
        return made.requires_grad_() if wanted else made


class _Moved(torch.autograd.Function):
    """A copy on the other device; gradients go back."""

    @staticmethod
    def forward(ctx: Any, x: Any, target: torch.device) -> Tensor:
        ctx.place = x.place
        return OnDevice(x.inner.clone(), target)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Tensor, None]:
        return OnDevice(grad.inner.clone(), ctx.place), None
