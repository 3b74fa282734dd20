r"""Extreme eigenpairs of a symmetric operator by thick-restart Lanczos.

K. Wu and H. Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal. Appl.
22 (2000), algorithm 3; in blocks, with a rank decision where a block loses directions. Every product is orthogonalised
twice against the whole basis by matrix products (one pass is not enough on Hessian-like spectra), eigenvalues of either
sign come out as they are, and the run stops at the first step that has what is asked for.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg import lanczos_checkpoint
from lowrank_bdl.linalg.devices import generator_on, sums_device
from lowrank_bdl.linalg.lanczos_basis import LanczosBasis, norm
from lowrank_bdl.linalg.lanczos_projection import Projection, Ritz, Wanted
from lowrank_bdl.linalg.lanczos_run import LanczosRun, Operator
from lowrank_bdl.linalg.memory import require_memory
from lowrank_bdl.linalg.precision import exact

WHICH = ("LA", "SA", "LM", "BE")


@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenpairs with proof of quality.

    Attributes:
        eigenvalues: Shape ``(k,)``, float64, from large to small.
        eigenvectors: Shape ``(D, k)``, orthonormal columns over ``(k, D)`` storage, dtype of the operator.
        residuals: ``||A v - lambda v||``, shape ``(k,)``, float64.
        converged: Whether each residual is within the tolerance, shape ``(k,)`` bool.
        num_matvecs: Products with the operator, all of them: those that measure residuals or check a file included.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    converged: Tensor
    num_matvecs: int


@dataclass(frozen=True)
class LanczosProgress:
    """Where a run is.

    Attributes:
        num_matvecs: Products so far.
        eigenvalues: The wanted ones as far as there are any, from large to small, float64.
        residuals: Of each, shape as the eigenvalues.
        tolerance: What residuals are to fall below; it grows with the largest eigenvalue found.
    """

    num_matvecs: int
    eigenvalues: Tensor
    residuals: Tensor
    tolerance: float

    @property
    def num_converged(self) -> int:
        """How many are within the tolerance."""
        return int((self.residuals <= self.tolerance).sum())


@exact
def lanczos(
    operator: Operator,
    k: int | tuple[int, int],
    which: str = "LA",
    *,
    tol: float | None = None,
    max_matvecs: int | None = None,
    num_basis: int | None = None,
    block_size: int = 1,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    confirm: bool = False,
    verify: bool | None = None,
    basis_dtype: torch.dtype | None = None,
    basis_device: torch.device | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
    resume: bool = False,
    callback: Callable[[LanczosProgress], bool | None] | None = None,
) -> Eigenpairs:
    r"""Return k extreme eigenpairs of a symmetric D x D operator, from one or both ends of the spectrum in one run.

    Residuals come from the recurrence, where :math:`A Q_m^\top = Q^\top H` was measured: no product is spent on them,
    they are exact to rounding of the basis, and what is not symmetric about the operator is part of them.

    A Krylov space meets every eigenvalue, but of an eigenvalue as many eigenvectors as it had start vectors: copies of
    a multiple one appear late, by rounding. A breakdown (an invariant subspace: identity, low rank) is gone on from
    with fresh random vectors until nothing can be missing, so that multiplicities are right there; elsewhere take
    ``block_size`` as large as the multiplicity, or ``confirm``.

    Args:
        operator: A LinearOperator of shape ``(D, D)``; or a function from ``(D,)`` to ``(D,)``, for blocks also from
            ``(D, S)`` to ``(D, S)`` (then give ``start``). It must not write into its argument.
        k: How many pairs, or ``(n_top, n_bottom)`` from both ends of the spectrum.
        which: Largest (``"LA"``), smallest (``"SA"``), largest in size (``"LM"``), or both ends in equal parts, the top
            having one more if k is odd (``"BE"``). Not used with a pair.
        tol: Residual tolerance relative to the largest Ritz value in size; None means ``eps ** (2/3)`` of the dtype.
        max_matvecs: The most products to spend on the iteration, >= k; None means ``max(300, 20 k)``.
        num_basis: Basis vectors kept, >= k + block_size (or D); None means ``max(2 k + 10, k + 20)``, in whole blocks
            and at least four of them. More of them restart less often and need fewer products.
        block_size: Vectors multiplied at once. 1 needs the fewest products; more find multiple eigenvalues, and may be
            faster where an operator shares work among vectors.
        start: Start vector ``(D,)``, not zero, or ``(D, s)`` with s <= block_size; random ones fill the block.
        generator: Source of start vectors and fresh directions; None seeds one from torch's.
        confirm: When the pairs have converged, look again from a random vector orthogonal to all of them, until nothing
            new comes: this finds further copies of multiple eigenvalues, and what a poor start vector does not meet.
        verify: Measure every residual in the end by a product of its own, k in all; None does so where the basis has a
            narrower dtype than the operator, whose rounding the recurrence does not see.
        basis_dtype: dtype of the basis; ``torch.bfloat16`` takes half the memory of float32, and residuals then stop at
            about 2e-3 of the largest eigenvalue. None means the operator's dtype.
        basis_device: Where the basis is and vectors are orthogonalised, ``"cpu"`` for host memory: a vector goes there
            and back at each step, the basis never. None means the operator's device.
        checkpoint: A file (safetensors) for the state of the run, written atomically; size: the basis.
        checkpoint_every: Products between two writes; it is also written at the end.
        resume: Go on from ``checkpoint`` if it is there, with the numbers of an uninterrupted run to the last bit; one
            product checks that the operator is the file's. ``tol``, ``max_matvecs`` and ``confirm`` may differ.
        callback: Called with a `LanczosProgress` as the run goes on; ends it by returning True.

    Raises:
        ShapeError: If the operator is not square, returns another shape, or k does not fit.
        ValueError: If ``which`` is unknown, ``start`` is zero, or ``num_basis``, ``max_matvecs`` or ``block_size`` does
            not fit k and D.
        MemoryLimitError: If the basis does not fit the free memory, before it is allocated.
        NonFiniteError: If ``start`` or a product holds NaN or infinity.
        CheckpointError: If the file is damaged, of another run, or of another operator.

    Cost: per product, four reads of the basis (two passes of two matrix products) and one host synchronisation. Memory:
    ``num_basis + block_size`` vectors of the basis and the operator's result, with blocks or a basis of another dtype
    ``block_size`` vectors more. The eigenvectors lie in the basis' memory, unless its dtype or device is not the
    operator's: then k vectors more.

    Example:
        >>> import torch
        >>> from linear_operator.operators import DiagLinearOperator
        >>> operator = DiagLinearOperator(torch.arange(50.0).double() - 20)
        >>> pairs = lanczos(operator, (2, 1), generator=torch.Generator().manual_seed(0))
        >>> pairs.eigenvalues.round(decimals=6), bool(pairs.converged.all())
        (tensor([ 29.,  28., -20.], dtype=torch.float64), True)
    """
    if resume and checkpoint is None:
        raise ValueError("resume needs a checkpoint: the file to go on from.")
    size, dtype, device, given = _start(operator, start, block_size)
    wanted = _wanted(k, which, size)
    if wanted.total == 0:
        empty = torch.zeros(0, dtype=torch.float64, device=device)
        return Eigenpairs(empty, torch.zeros(0, size, dtype=dtype, device=device).mT, empty, empty.bool(), 0)
    limit = max(300, 20 * wanted.total) if max_matvecs is None else max_matvecs
    capacity, least = _capacity(wanted.total, size, block_size, num_basis), min(wanted.total + block_size, size)
    if capacity < least or limit < wanted.total:
        raise ValueError(
            f"{wanted.total} pairs need num_basis >= {least} and max_matvecs >= {wanted.total}; "
            f"got {num_basis} and {max_matvecs}."
        )
    work_dtype = torch.promote_types(dtype, torch.float32)
    basis = _allocate(
        wanted.total, capacity, size, block_size, basis_dtype or work_dtype, work_dtype,
        device if basis_device is None else torch.empty(0, device=basis_device).device, device,  # "cuda" is cuda:0
    )  # fmt: skip
    generator = generator_on(device, generator) or _generator(device)
    run = LanczosRun(operator, basis, Projection(capacity, block_size), dtype, device, generator, given is None)
    facts = {
        "dim": size, "dtype": str(dtype), "k": [wanted.top, wanted.bottom], "by_size": wanted.by_size,
        "num_basis": capacity, "block_size": block_size, "basis_dtype": str(basis.dtype),
    }  # fmt: skip
    checks = 0
    if resume and checkpoint is not None and Path(checkpoint).exists():
        checks = lanczos_checkpoint.load(checkpoint, run, facts)
    else:
        run.begin(torch.zeros(0, size, dtype=work_dtype, device=device) if given is None else given.mT.to(work_dtype))
    tolerance = torch.finfo(dtype).eps ** (2 / 3) if tol is None else tol
    save = None if checkpoint is None else (lambda: lanczos_checkpoint.save(checkpoint, run, facts))
    ritz = _iterate(run, wanted, tolerance, limit, confirm, callback, save, checkpoint_every)
    order = wanted.choose(ritz.values)
    order = order[ritz.values[order].argsort(descending=True)]
    values, residuals = ritz.values[order], ritz.residuals[order]
    rows = run.basis.finish(ritz.vectors[:, order], device)
    count = run.num_products + checks
    narrow = torch.finfo(basis.dtype).eps > torch.finfo(work_dtype).eps
    if verify or (verify is None and narrow):
        for i, row in enumerate(rows):
            residuals[i] = norm(run.apply(row[None])[0].sub(row, alpha=values[i].item()))
        count += len(rows)
    converged, place = residuals <= tolerance * ritz.scale, sums_device(device)
    return Eigenpairs(
        values.to(place),
        rows.mT,
        residuals.to(place),
        converged.to(place),
        count,
    )


def _iterate(
    run: LanczosRun,
    wanted: Wanted,
    tolerance: float,
    limit: int,
    confirm: bool,
    callback: Callable[[LanczosProgress], bool | None] | None,
    save: Callable[[], None] | None,
    save_every: int,
) -> Ritz:
    """Step until the wanted pairs have converged or the products are spent; return the last Ritz pairs."""
    known = run.projection
    saved = run.num_products
    while True:
        spent = known.size >= wanted.total and run.num_products + known.pending > limit
        stop = run.exhausted or spent
        if stop or run.full or _due(known.size, 1 if callback else wanted.total):
            ritz = known.ritz()
            if not run.exhausted and known.complete(ritz, tolerance * ritz.scale):
                run.look_elsewhere(complete=run.random)
                ritz = known.ritz()
            done = known.finished(ritz, wanted, tolerance * ritz.scale)
            if callback is not None:
                stop = bool(callback(_progress(run, ritz, wanted, tolerance))) or stop
            order = wanted.choose(ritz.values)
            if done and confirm and not stop and bool((order >= ritz.settled).any()):
                run.restart(ritz, order)
                run.look_elsewhere(complete=False)
            elif (done or stop) and known.size >= wanted.total:
                if save is not None:
                    save()
                return ritz
            elif run.full:
                # more Ritz vectors than wanted, next to them, speed up what follows
                run.restart(ritz, wanted.choose(ritz.values, _spare(known, wanted)))
        run.step()
        if save is not None and run.num_products - saved >= save_every:
            save()
            saved = run.num_products


def _due(size: int, first: int) -> bool:
    """Tell whether a look at the Ritz pairs, O(size^3), is due: at every step while they are few, then every 2 %."""
    return size >= first and size % (1 + size // 50) == 0


def _spare(known: Projection, wanted: Wanted) -> int:
    """Return how many Ritz vectors to keep beyond the wanted ones: half of what is left for the next block and them."""
    return (known.capacity - wanted.total - known.pending) // 2


def _progress(run: LanczosRun, ritz: Ritz, wanted: Wanted, tolerance: float) -> LanczosProgress:
    order = wanted.choose(ritz.values)
    order = order[ritz.values[order].argsort(descending=True)]
    return LanczosProgress(run.num_products, ritz.values[order], ritz.residuals[order], tolerance * ritz.scale)


def _start(
    operator: Operator, start: Tensor | None, block_size: int
) -> tuple[int, torch.dtype, torch.device, Tensor | None]:
    """Return D, dtype and device of the operator, and the start as columns."""
    if isinstance(operator, LinearOperator):
        if operator.ndim != 2 or not operator.is_square:
            raise ShapeError(f"the operator must be (D, D); got {tuple(operator.shape)}.")
        size, dtype, device = operator.shape[-1], operator.dtype, operator.device
    elif start is None:
        raise ValueError("a function as operator needs a start vector, for its size, dtype and device.")
    else:
        size, dtype, device = len(start) if start.ndim else 0, start.dtype, start.device
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1; got {block_size}.")
    if start is None:
        return size, dtype, device, None
    columns = start.detach().unsqueeze(-1) if start.ndim == 1 else start.detach()
    if columns.ndim != 2 or len(columns) != size or not 1 <= columns.shape[1] <= min(block_size, max(size, 1)):
        raise ShapeError(
            f"start must be a vector of the size of the operator, or (D, s) with s <= {block_size}, the block_size; "
            f"got {tuple(start.shape)}."
        )
    if not bool(columns.isfinite().all()):
        raise NonFiniteError("the start vector must be finite; it holds NaN or infinity.")
    if not bool((columns != 0).any(0).all()):
        raise ValueError("the start vector must not be zero.")
    return size, dtype, device, columns


def _wanted(k: int | tuple[int, int], which: str, size: int) -> Wanted:
    """Return how many pairs to find at the top and at the bottom, and whether to choose by absolute value."""
    if which not in WHICH:
        raise ValueError(f"which must be one of {', '.join(WHICH)}; got {which!r}.")
    counts = k if isinstance(k, tuple) else (k, 0)
    if min(counts) < 0 or sum(counts) > size:
        raise ShapeError(f"k must be between 0 and D = {size} in all; got {k}.")
    if isinstance(k, tuple) or which == "LA":
        return Wanted(counts[0], counts[1], False)
    if which == "SA":
        return Wanted(0, k, False)
    return Wanted(k, 0, True) if which == "LM" else Wanted(k - k // 2, k // 2, False)


def _capacity(wanted: int, size: int, block_size: int, num_basis: int | None) -> int:
    if num_basis is None:
        num_basis = max(2 * wanted + 10, wanted + 20, wanted + 4 * block_size)
        num_basis += -num_basis % block_size
    return min(num_basis, size)


def _allocate(
    wanted: int,
    capacity: int,
    size: int,
    block_size: int,
    dtype: torch.dtype,
    work_dtype: torch.dtype,
    device: torch.device,
    operator_device: torch.device,
) -> LanczosBasis:
    """Return an empty basis; raise before if it does not fit, with what the run needs beside it."""
    if not dtype.is_floating_point:
        raise ValueError(f"basis_dtype must be a floating dtype; got {dtype}.")
    in_place = block_size == 1 and dtype == work_dtype  # a vector is worked on in the row that it becomes
    rows, extra = min(capacity + block_size, size), block_size if in_place else 2 * block_size
    purpose = f"the Lanczos basis of {rows} vectors of {size:,}"
    num_bytes = rows * size * dtype.itemsize
    working = extra * size * work_dtype.itemsize
    apart = 0 if dtype == work_dtype and device == operator_device else wanted * size * work_dtype.itemsize
    if device == operator_device:
        require_memory(num_bytes + working + apart, device, f"{purpose} and {extra} to work with")
    else:
        require_memory(num_bytes + working, device, purpose)
        require_memory(working + apart, operator_device, f"{purpose} (elsewhere) and its {wanted} eigenvectors")
    return LanczosBasis(wanted, rows, size, dtype, work_dtype, device)


def _generator(device: torch.device) -> torch.Generator:
    """Return a generator of the run's own, seeded from torch's: its state can be part of a checkpoint."""
    seed = int(torch.randint(2**63 - 1, ()))
    return torch.Generator(device).manual_seed(seed)
