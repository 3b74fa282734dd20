"""The files of posteriors: those of every layer."""

from lowrank_bdl.linalg.files import read_kind, read_tensors, write_tensors

__all__ = ["read_kind", "read_tensors", "write_tensors"]
