"""Exceptions of lowrank_bdl; every message says what was expected and what was got."""


class LowRankBDLError(Exception):
    """Base class of every error that this library raises on purpose."""


class ShapeError(LowRankBDLError, ValueError):
    """A tensor, model or layout does not have the shape that the operation needs."""


class NonFiniteError(LowRankBDLError, ValueError):
    """A value that must be finite is NaN or infinite."""


class NotPSDError(LowRankBDLError):
    """A matrix that must be positive (semi-)definite is not."""


class NotConvergedError(LowRankBDLError):
    """An iterative method stopped before it reached its tolerance."""


class StaleError(LowRankBDLError):
    """An object shares memory that its owner has changed since."""


class CheckpointError(LowRankBDLError):
    """A file is truncated, foreign, too new, or does not fit the object it is loaded into."""


class MemoryLimitError(LowRankBDLError, MemoryError):
    """An allocation was refused before it was made; the message gives its size in GiB."""
