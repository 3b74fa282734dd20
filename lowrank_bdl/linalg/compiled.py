r"""The compiled kernels of `compiled.c` on torch tensors; each is the same sum as its neighbour written in torch.

They apply to one float32 or float64 matrix :math:`\mathrm{diag}(d) + R R^\top` in K x D storage on the CPU, where a C
compiler was found (`compiler.py`). ``root`` is R, shape ``(D, K)``, and ``diag`` is d, shape ``(D,)``, throughout.
Sums over D are taken in blocks of 1,024 products and, across blocks, in float64, which makes them a hundred times more
precise than one long product in float32. Results do not depend on the number of threads.
"""

import ctypes
import math

import torch
from torch import Tensor
from torch.nn import Parameter

from lowrank_bdl.linalg.compiler import library

SMALLEST = 16_384
"""Coordinates below which the kernels written in torch serve: the time is that of a few calls either way."""
BLOCK = 1024
"""Products that are summed before a sum goes into float64."""
A_THREAD = 65_536
"""Numbers that make it worthwhile to wake one more thread."""
_NAMES = {torch.float32: "float", torch.float64: "double"}


def applies(root: Tensor, diag: Tensor, *vectors: Tensor | None) -> bool:
    """Say whether the compiled kernels take this matrix, and vectors of its size and dtype beside it."""
    if diag.ndim != 1 or len(diag) < SMALLEST or root.dtype != diag.dtype:
        return False
    if root.ndim != 2 or root.shape[-1] == 0 or root.stride(0) != 1 or not takes(diag):
        return False
    if not all(v is None or (v.dtype == diag.dtype and v.shape == diag.shape and takes(v)) for v in vectors):
        return False
    return type(root) in (Tensor, Parameter) and root.device.type == "cpu" and library() is not None


def takes(vector: Tensor) -> bool:
    """Say whether a vector is plain memory of a dtype that the kernels know."""
    plain = type(vector) in (Tensor, Parameter) and vector.device.type == "cpu" and vector.dtype in _NAMES
    return plain and vector.stride(0) == 1


def rounding(dim: int, dtype: torch.dtype) -> float:
    """Return the error of a sum of D products relative to the norms of its factors, estimated with a factor of four.

    Blocks of products round independently of each other: their errors add like a random walk.
    """
    return 4 * torch.finfo(dtype).eps / math.sqrt(max(1.0, dim / BLOCK))


def gram(
    root: Tensor, diag: Tensor | None, dtype: torch.dtype, vector: Tensor | None = None, mean: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    r"""Return :math:`R^\top \mathrm{diag}(d)^{-1} R`, or :math:`R^\top R` without ``diag``, ``(K, K)``, float64.

    With a ``vector`` also what :func:`project` returns for it, from the same read of the root, else None.
    """
    columns = root.shape[-1]
    result = torch.empty(columns, columns, dtype=torch.float64)
    projected = None if vector is None else torch.empty(columns + 1, dtype=torch.float64)
    _call("gram", root, dtype, *map(_pointer, (diag, vector, mean, result, projected)))
    return result, projected


def project(root: Tensor, diag: Tensor | None, vector: Tensor, mean: Tensor | None, dtype: torch.dtype) -> Tensor:
    r"""Return :math:`R^\top \mathrm{diag}(d)^{-1} v`, and then :math:`v^\top \mathrm{diag}(d)^{-1} v`, for v = x - m.

    Returns:
        Float64, shape ``(K + 1,)``.
    """
    result = torch.empty(root.shape[-1] + 1, dtype=torch.float64)
    _call("project", root, dtype, _pointer(diag), _pointer(vector), _pointer(mean), _pointer(result))
    return result


def subtract_(root: Tensor, vector: Tensor, weights: Tensor, project: bool) -> Tensor:
    r"""Replace a vector v by :math:`v - R z`, and return :math:`R^\top v` and :math:`v^\top v` of the new one.

    Args:
        root: R.
        vector: v, shape ``(D,)``, overwritten.
        weights: z, shape ``(K,)``, float64.
        project: Whether to compute :math:`R^\top v`, from the same read of the root; zeros otherwise.

    Returns:
        Float64, shape ``(K + 1,)``.
    """
    result = torch.empty(root.shape[-1] + 1, dtype=torch.float64)
    weights = weights.contiguous()
    arguments = (_pointer(weights), _pointer(vector), ctypes.c_int(project), _pointer(result))
    _call("subtract", root, vector.dtype, *arguments)
    _bump(vector)
    return result


def residual(
    root: Tensor,
    diag: Tensor,
    vector: Tensor,
    mean: Tensor | None,
    weights: Tensor,
    dtype: torch.dtype,
    solve: bool,
) -> tuple[Tensor, Tensor | None]:
    r"""With :math:`v = x - m` and :math:`r = v - R z`, return three sums of squares and :math:`r / d` if asked for.

    Args:
        root: R.
        diag: d.
        vector: x, shape ``(D,)``.
        mean: m, shape ``(D,)``.
        weights: z, shape ``(K,)``, float64.
        dtype: Of the arithmetic.
        solve: Whether to write :math:`r / d`.

    Returns:
        :math:`\|d^{-1/2} r\|^2, \|r / d\|^2, \|v / d\|^2` (the last only with ``solve``), float64, and the quotient
        or None.
    """
    sums = torch.empty(3, dtype=torch.float64)
    solution = torch.empty_like(diag) if solve else None
    weights = weights.contiguous()
    tensors = (diag, vector, mean, weights, solution, sums)
    _call("residual", root, dtype, *map(_pointer, tensors))
    return sums, solution


def lift(
    root: Tensor, diag: Tensor, vector: Tensor, mean: Tensor | None, weights: Tensor, out: Tensor, std: bool
) -> Tensor:
    r"""Write :math:`m + d x + R z` into ``out``, or :math:`m + \sqrt d x + R z` if ``std``; ``out`` may be x."""
    weights = weights.contiguous()
    pointers = map(_pointer, (vector, mean, weights, out))
    _call("lift", root, diag.dtype, _pointer(diag), ctypes.c_int(std), *pointers)
    _bump(out)
    return out


def rotate(root: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``A @ R.T``, shape ``(m, D)``, for ``weights`` A of shape ``(m, K)``, float64."""
    count, dim = len(weights), len(root)
    result = torch.empty(count, dim, dtype=root.dtype)
    weights = weights.contiguous()
    arguments = (_pointer(weights), ctypes.c_int(count), _pointer(result), ctypes.c_ssize_t(dim))
    _call("rotate", root, dtype, *arguments)
    return result


def gather(root: Tensor, index: Tensor) -> Tensor:
    """Return the rows of R at ``index`` (n,), which must be in range, as a new K x n tensor."""
    index = index.contiguous()
    result = torch.empty(root.shape[-1], len(index), dtype=root.dtype)
    _call("gather", root, root.dtype, _pointer(index), ctypes.c_ssize_t(len(index)), _pointer(result))
    return result


def diagonal(root: Tensor, diag: Tensor, factor: float) -> Tensor:
    """Return ``d + factor * rowsum(R * R)``, shape ``(D,)``."""
    result = torch.empty_like(diag)
    _call("diagonal", root, diag.dtype, _pointer(diag), ctypes.c_double(factor), _pointer(result))
    return result


def scan(diag: Tensor) -> tuple[Tensor, int, int]:
    """Return the sum of log d over positive entries, the number of zeros, and that of negative or non-finite ones."""
    sums = torch.empty(3, dtype=torch.float64)
    name = _NAMES[diag.dtype]
    _run(f"scan_{name}_{name}", ctypes.c_ssize_t(len(diag)), _pointer(diag), _pointer(sums), size=len(diag))
    return sums[0].clone(), int(sums[1]), int(sums[2])


def collect(
    vector: Tensor, state: tuple[Tensor, Tensor, Tensor], deviation: Tensor | None, count: int, prior: int
) -> None:
    """Update shift, offset and sum of squares by one vector, in place; the arithmetic of `StreamingMoments.update`."""
    name = _NAMES[vector.dtype]
    numbers = (ctypes.c_double(count), ctypes.c_double(prior), ctypes.c_int(count == 1 and prior == 0))
    tensors = (vector, *state, deviation)
    size = ctypes.c_ssize_t(len(vector))
    _run(f"collect_{name}_{name}", size, *map(_pointer, tensors), *numbers, size=len(vector))
    for tensor in (*state, deviation):
        if tensor is not None:
            _bump(tensor)


def collects(*vectors: Tensor | None) -> bool:
    """Say whether :func:`collect` takes these vectors."""
    given = [v for v in vectors if v is not None]
    same = all(takes(v) and v.dtype == given[0].dtype and v.shape == given[0].shape for v in given)
    return same and len(given[0]) >= SMALLEST and library() is not None


def _call(name: str, root: Tensor, dtype: torch.dtype, *arguments: object) -> None:
    columns = root.shape[-1]
    stride = root.stride(1) if columns > 1 else len(root)
    shape = (_pointer(root), ctypes.c_ssize_t(stride), ctypes.c_int(columns), ctypes.c_ssize_t(len(root)))
    _run(f"{name}_{_NAMES[root.dtype]}_{_NAMES[dtype]}", *shape, *arguments, size=root.numel())


def _run(name: str, *arguments: object, size: int) -> None:
    kernels = library()
    assert kernels is not None
    threads = max(1, min(torch.get_num_threads(), size // A_THREAD))
    if getattr(kernels, name)(*arguments, ctypes.c_int(threads)):
        raise MemoryError(f"{name} could not allocate its buffers.")


def _bump(tensor: Tensor) -> None:
    """Count an in-place change: what shares this memory must see it."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
