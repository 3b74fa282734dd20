"""What an accelerator refuses, and what makes the host wait for it."""

from typing import Any

import torch
from torch import Tensor

from tests.fake_device.log import Log, line
from tests.fake_device.tensor import OnDevice

aten = torch.ops.aten

# operations after which a CUDA build waits for the device, beside those that give Python a number
WAITS = {
    aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.unique_consecutive, aten.unique_dim,
    aten.bincount, aten._linalg_eigh, aten._linalg_svd, aten._linalg_check_errors, aten.linalg_eig, aten.is_nonzero,
    aten.linalg_lstsq, aten.multinomial, aten._linalg_eigvals,
}  # fmt: skip
# operations that start no kernel
FREE = {
    aten.detach, aten.alias, aten._unsafe_view, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty,
    aten.new_empty_strided, aten.lift_fresh, aten.lift, aten._local_scalar_dense, aten.is_same_size, aten.sym_size,
    aten._reshape_alias, aten._assert_async,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_}
CPU_BESIDE = {aten.copy_, aten._to_copy, aten._unsafe_index, *INDEXING}
# a 0-dimensional CPU tensor may stand beside one of the device in element-wise arithmetic only
NUMBER_BESIDE = {
    "add", "sub", "mul", "div", "pow", "maximum", "minimum", "fmod", "remainder", "atan2", "where", "eq", "ne", "lt",
    "le", "gt", "ge", "rsub", "true_divide", "copy", "fill", "masked_fill", "logical_and", "logical_or",
    "bitwise_and", "bitwise_or", "floor_divide", "ldexp", "hypot", "clamp", "index_put", "_index_put_impl", "xlogy",
    "logaddexp", "lerp", "to_copy",
}  # fmt: skip


def check_generator(generator: Any, place: torch.device) -> None:
    """Refuse a generator of another kind of device, in torch's words."""
    if generator is not None and generator.device.type != place.type:
        found = generator.device.type
        raise RuntimeError(f"Expected a '{place.type}' device type for generator but found '{found}'")


def check_devices(log: Log, packet: Any, name: str, args: Any, tensors: list[Tensor], ours: list[OnDevice]) -> None:
    """Refuse tensors of two devices in one operation; note the copies that an operation makes by itself."""
    together = "Expected all tensors to be on the same device, but found"
    places = {str(tensor.place) for tensor in ours if not tensor.anywhere}
    if len(places) > 1 and packet not in (aten.copy_, aten._to_copy):
        raise RuntimeError(f"{together} {' and '.join(sorted(places))} ({name}, {line()})")
    others = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
    if not others:
        return
    if packet in INDEXING:
        if not isinstance(args[0], OnDevice):
            where = "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            raise RuntimeError(f"{where} ({line()})")
        if any(isinstance(index, Tensor) and not isinstance(index, OnDevice) for index in args[1]):
            log.note("h2d-async", name)
    if packet is aten.copy_:
        waits = not (args[2] if len(args) > 2 else False)
        log.note(("h2d" if isinstance(args[0], OnDevice) else "d2h") + ("" if waits else "-async"), name)
    if packet in CPU_BESIDE or (all(other.ndim == 0 for other in others) and name.rstrip("_") in NUMBER_BESIDE):
        return
    shapes = [tuple(other.shape) for other in others]
    raise RuntimeError(f"{together} {ours[0].place} and cpu {shapes} ({name}, {line()})")


def note_waits(log: Log, packet: Any, name: str, args: Any) -> None:
    """Note an operation that makes the host wait for its result."""
    if packet is aten._local_scalar_dense:
        log.note("sync", "item")
    elif packet in WAITS:
        log.note("sync", name)
    elif packet in INDEXING:
        masks = [index for index in args[1] if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)]
        filled = packet is not aten.index and args[2].ndim == 0 and len(masks) == 1
        if masks and not filled:
            log.note("sync", f"{name} by a mask")
    elif packet is aten.repeat_interleave and len(args) and isinstance(args[-1], Tensor):
        log.note("sync", name)
