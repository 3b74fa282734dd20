"""An affine subspace of weight space, and the way between its k coordinates and the D weights."""

import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lowrank_bdl.errors import CheckpointError, NonFiniteError, ShapeError
from lowrank_bdl.linalg.dense_basis import DenseBasis
from lowrank_bdl.linalg.eigen import eigh_psd
from lowrank_bdl.linalg.files import read_tensors, write_tensors
from lowrank_bdl.linalg.hadamard import RandomizedHadamardLinearOperator
from lowrank_bdl.linalg.moments import first_unusable
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.storage import layout_difference, required

KIND = "subspace"
"""What a file of a subspace is said to hold."""


@exact_methods
class Subspace:
    r"""The weights :math:`\theta = \hat\theta + P z` for :math:`z \in R^k`.

    Izmailov et al., "Subspace Inference for Bayesian Deep Learning" (UAI 2019), equation 2. The columns of P need be
    neither orthogonal nor of one length: those of :func:`~lowrank_bdl.subspaces.principal.pca_subspace` are scaled so
    that :math:`z \sim N(0, I)` is the low-rank law they were made from.

    Args:
        layout: Names and shapes of the D coordinates; None for plain vectors.
        origin: :math:`\hat\theta`, shape ``(D,)`` [parameter].
        basis: :math:`P`, shape ``(D, k)``, k >= 1, float32 or float64, the dtype of every result; the transposed view
            of contiguous ``(k, D)`` storage is the fast layout. Or a
            :class:`~lowrank_bdl.linalg.hadamard.RandomizedHadamardLinearOperator`, which stores no such matrix. Shared,
            and not to be changed in place [parameter].
        provenance: Where it came from, as JSON scalars by name; saved with it.
        check_finite: Look for NaN and infinities in the basis; False is for callers who have done so.

    Attributes:
        layout: As given.
        origin: As given, in the dtype of the basis.
        basis: As given.
        provenance: As given.

    Raises:
        ShapeError: If layout, origin and basis do not agree on D, or there is no column.
        TypeError: If the basis is neither float32 nor float64.
        NonFiniteError: If an entry is not finite.

    Example:
        >>> plane = Subspace(None, torch.tensor([1.0, 1.0, 1.0]), torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]]))
        >>> theta = plane.to_theta(torch.tensor([[1.0, -1.0], [0.0, 0.5]]))
        >>> theta
        tensor([[ 3.0000, -2.0000,  1.0000],
                [ 1.0000,  2.5000,  1.0000]])
        >>> plane.project(theta).tolist()
        [[1.0, -1.0], [0.0, 0.5]]
        >>> plane.lengths.tolist(), plane.orthonormal().lengths.tolist()
        ([2.0, 3.0], [1.0, 1.0])
    """

    def __init__(
        self,
        layout: ParameterLayout | None,
        origin: Tensor,
        basis: Tensor | RandomizedHadamardLinearOperator,
        provenance: Mapping[str, Any] | None = None,
        *,
        check_finite: bool = True,
    ) -> None:
        if basis.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"basis must be float32 or float64; got {basis.dtype}.")
        if origin.ndim != 1 or len(basis.shape) != 2 or basis.shape[0] != len(origin) or basis.shape[1] < 1:
            raise ShapeError(
                f"origin must be (D,) and basis (D, k) with k >= 1; got {tuple(origin.shape)} and {tuple(basis.shape)}."
            )
        if layout is not None and layout.numel != len(origin):
            raise ShapeError(f"layout has {layout.numel} coordinates; origin and basis have {len(origin)}.")
        if origin.device != basis.device:
            raise ShapeError(f"origin and basis must be on one device; got {origin.device} and {basis.device}.")
        self.layout = layout
        self.origin = origin.detach().to(basis.dtype)
        self.basis = basis.detach() if isinstance(basis, Tensor) else basis
        self._kernel = DenseBasis(self.basis) if isinstance(self.basis, Tensor) else self.basis
        self.provenance: dict[str, Any] = dict(provenance or {})
        bad = first_unusable(self.origin, float("inf"))
        if bad is not None:
            raise NonFiniteError(f"origin must be finite; entry {bad} is {origin[bad].item()}.")
        for number, column in enumerate(self.basis.mT if check_finite and isinstance(self.basis, Tensor) else ()):
            bad = first_unusable(column, float("inf"))
            if bad is not None:
                raise NonFiniteError(f"basis must be finite; entry {bad} of column {number} is {column[bad].item()}.")

    # ---- sizes --------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """k, the number of coordinates."""
        return int(self.basis.shape[1])

    @property
    def numel(self) -> int:
        """D, the number of weights."""
        return len(self.origin)

    @property
    def dtype(self) -> torch.dtype:
        """Of the origin and of every weight vector."""
        return self.origin.dtype

    @property
    def device(self) -> torch.device:
        """Of the origin and of every weight vector."""
        return self.origin.device

    @cached_property
    def gram(self) -> Tensor:
        r""":math:`P^\top P`, shape ``(k, k)``, float64 [parameter²]. Cost: one read of the basis, once."""
        return self._kernel.gram()

    @property
    def lengths(self) -> Tensor:
        """Length of each column of the basis, shape ``(k,)``, float64 [parameter]."""
        return self.gram.diagonal().sqrt()

    # ---- the way there and back ---------------------------------------------------------------------------------

    def to_theta(self, z: Tensor) -> Tensor:
        r"""Return :math:`\hat\theta + P z`, differentiable in z.

        Args:
            z: Coordinates, shape ``(*S, k)``, any floating dtype and device.

        Returns:
            Weights, shape ``(*S, D)``, in the dtype and on the device of the basis [parameter].

        Raises:
            ShapeError: If the last axis is not k.

        Cost: one read of the basis for all S vectors; O(S D k) time, O(S D log D) for a structured basis.
        """
        if z.ndim == 0 or z.shape[-1] != self.rank:
            raise ShapeError(f"z must have shape (*S, {self.rank}); got {tuple(z.shape)}.")
        z = z.to(device=self.device, dtype=self.dtype)  # draws are small, and made wherever the sampler ran
        offsets: Tensor = self._kernel.lift(z.reshape(-1, self.rank), self.origin)
        return offsets.reshape(*z.shape[:-1], self.numel)

    @torch.no_grad()
    def project(self, theta: Tensor) -> Tensor:
        r"""Return the coordinates of the nearest point of the subspace, :math:`(P^\top P)^+ P^\top(\theta-\hat\theta)`.

        Where columns of the basis depend on each other, the shortest such z.

        Args:
            theta: Weights, shape ``(*S, D)`` [parameter].

        Returns:
            Coordinates, shape ``(*S, k)``, in the dtype of the basis; sums over D and all k-sized work in float64.

        Raises:
            ShapeError: If the last axis is not D.

        Cost: one read of the basis, and one more the first time.
        """
        if theta.ndim == 0 or theta.shape[-1] != self.numel:
            raise ShapeError(f"theta must have shape (*S, {self.numel}); got {tuple(theta.shape)}.")
        offsets = (theta.to(self.device) - self.origin).reshape(-1, self.numel)
        scale, vectors, values = self._spectrum
        products = self._kernel.inner_products(offsets)
        coordinates = scale @ (vectors / values) @ (vectors.mT @ (scale @ products))
        return coordinates.mT.reshape(*theta.shape[:-1], self.rank).to(self.device, self.dtype)

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """What inverts the Gram matrix: 1 / lengths as a matrix, and the eigenpairs of the cosines that are not zero.

        Columns of very different lengths are no bad conditioning, so they are made of one length first.
        """
        scale = torch.where(self.lengths > 0, 1 / self.lengths, 0.0).diag()
        values, vectors = eigh_psd(scale @ self.gram @ scale)
        kept = values > self.rank * torch.finfo(torch.float64).eps * values.max()
        return scale, vectors[:, kept], values[kept]

    def orthonormal(self, length: float = 1.0) -> "Subspace":
        r"""Return the same subspace with orthonormal columns, :math:`P V \Lambda^{-1/2}` by the k x k route.

        Columns that depend on the others are dropped: the rank of the result is the numerical rank of the basis.

        Args:
            length: Of every column, 1 for an orthonormal basis [parameter].

        Raises:
            ValueError: If ``length`` is not a positive number.
            ShapeError: If every column is zero.

        Cost: two reads of the basis, one write of the result.
        """
        if not 0 < length < float("inf"):
            raise ValueError(f"length must be a positive number; got {length}.")
        scale, vectors, values = self._spectrum
        if not len(values):
            raise ShapeError("an orthonormal basis needs a column that is not zero; got none.")
        basis = self._kernel.mixed(length * scale @ (vectors * values.rsqrt()).flip(-1))
        return Subspace(self.layout, self.origin, basis, self.provenance, check_finite=False)

    # ---- copies and files ---------------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> "Subspace":
        """Return the subspace on another device or in another dtype, as ``torch.Tensor.to``."""
        origin = self.origin.to(*args, **kwargs)
        basis = self._kernel.to(device=origin.device, dtype=origin.dtype)
        return Subspace(self.layout, origin, basis, self.provenance, check_finite=False)

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors by name, shared where they can be (of a structured basis its signs), and JSON metadata."""
        layout = None if self.layout is None else self.layout.to_metadata()
        return {"origin": self.origin, **self._kernel.to_state()}, {"layout": layout, "provenance": self.provenance}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> "Subspace":
        """Return the subspace of :meth:`to_state`.

        Raises:
            CheckpointError: If a tensor is missing, or the layout is damaged; so do the errors of the constructor.
        """
        (origin,) = required(tensors, "origin")
        found = metadata.get("layout")
        layout = None if found is None else ParameterLayout.from_metadata(found)
        structured = "outer_signs" in tensors
        basis = RandomizedHadamardLinearOperator.from_state(tensors) if structured else required(tensors, "basis")[0].mT
        return cls(layout, origin, basis, metadata.get("provenance"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the subspace to one safetensors file, atomically.

        Args:
            path: The file; its directory must exist.

        Raises:
            TypeError: If the provenance is not JSON.
            OSError: If the file cannot be written.
        """
        tensors, metadata = self.to_state()
        write_tensors(path, KIND, tensors, metadata)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        layout: ParameterLayout | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> "Subspace":
        """Read what :meth:`save` wrote; nothing is unpickled.

        Args:
            path: The file.
            layout: If given, the file's layout must equal it (dtypes aside).
            device: Where the tensors go; the CPU if None.

        Raises:
            CheckpointError: If the file is truncated, foreign, of another kind or a newer version, contradicts itself,
                or is of other parameters than ``layout``.
            FileNotFoundError: If there is no such file.
        """
        name = os.fspath(path)
        tensors, metadata = read_tensors(path, KIND, ("origin",), device)
        try:
            found = cls.from_state(tensors, metadata)
        except (CheckpointError, ShapeError, TypeError, NonFiniteError) as error:
            raise CheckpointError(f"{name} holds no usable subspace: {error}") from error
        if layout is not None:
            difference = "no layout" if found.layout is None else layout_difference(layout, found.layout)
            if difference is not None:
                raise CheckpointError(f"{name} is of other parameters: {difference}.")
        return found

    def __repr__(self) -> str:
        return f"Subspace(numel={self.numel}, rank={self.rank}, dtype={self.dtype})"
