"""Tensors and JSON metadata in one safetensors file, written atomically and read without unpickling."""

import json
import os
import secrets
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank_bdl.errors import CheckpointError

FORMAT = "lowrank_bdl"
VERSION = 1
"""Raised whenever an older reader would misread a file; readers refuse files newer than themselves."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def write_tensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write a file that is complete or not there: to a temporary name, synced to disk, then renamed.

    Args:
        path: The file; an existing one is replaced.
        kind: What the tensors make up; checked on reading.
        tensors: By name; those that are contiguous, and alone in their memory, are written from where they lie.
        metadata: JSON-able values by name.

    Raises:
        TypeError: If the metadata are not JSON (a NaN included, which JSON lacks).
        OSError: If the file cannot be written; the old one is left as it was.
    """
    target = Path(path)
    header = {"format": FORMAT, "version": str(VERSION), "kind": kind}
    try:
        header["metadata"] = json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be plain JSON values; {error}.") from error
    partial = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as stream:  # an unwritable directory fails here with a plain OSError
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
        try:
            save_file(_unshared(tensors), partial, metadata=header)
        except SafetensorError as error:
            raise OSError(f"cannot write {target}: {error}") from error
        os.chmod(partial, mode)  # some versions of safetensors make files that only their owner can read
        with open(partial, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, target)
        _sync_directory(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors, each in memory of its own: a file of tensors has no views."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.contiguous()
        storage = plain.untyped_storage().data_ptr()
        result[name] = plain.clone() if plain.numel() and storage in seen else plain
        seen.add(storage)
    return result


def read_kind(path: str | os.PathLike[str]) -> str:
    """Say what a file of :func:`write_tensors` holds, reading its header alone.

    Args:
        path: The file.

    Returns:
        The kind it was written with.

    Raises:
        CheckpointError: If the file is truncated, foreign, damaged or of a newer version.
        FileNotFoundError: If there is no such file.
    """
    return _read_header(os.fspath(path))[0]


def read_tensors(
    path: str | os.PathLike[str],
    kind: str,
    required: Sequence[str],
    device: torch.device | str | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote.

    Args:
        path: The file.
        kind: What it must hold.
        required: Tensors that must be there.
        device: Where they go; the CPU if None.

    Returns:
        Tensors by name, and the metadata.

    Raises:
        CheckpointError: If the file is truncated, foreign, of another kind or a newer version, or lacks a tensor.
        FileNotFoundError: If there is no such file.
    """
    name = os.fspath(path)
    found, metadata, keys = _read_header(name)
    if found != kind:
        raise CheckpointError(f"{name} holds a {found!r}; expected a {kind!r}.")
    missing = [key for key in required if key not in keys]
    if missing:
        raise CheckpointError(f"{name} lacks {', '.join(missing)}.")
    return _read_owned(name, keys, device), metadata


def _read_owned(name: str, keys: Sequence[str], device: torch.device | str | None) -> dict[str, Tensor]:
    """Read the tensors of a valid file straight into memory of their own.

    The tensors of safe_open are views of the mapped file: they die with it, and are not aligned, so that results
    differ in the last bit from those of the tensors that were saved.
    """
    tensors = {}
    with open(name, "rb") as stream:
        start = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(start))
        for key in keys:
            if entries[key]["dtype"] not in _DTYPES:
                raise CheckpointError(f"{name}: {key!r} has the unknown dtype {entries[key]['dtype']}.")
            tensor = torch.empty(entries[key]["shape"], dtype=_DTYPES[entries[key]["dtype"]])
            target = tensor.reshape(-1).view(torch.uint8).numpy().data
            stream.seek(8 + start + entries[key]["data_offsets"][0])
            while len(target):
                count = stream.readinto(target)
                if not count:
                    raise CheckpointError(f"{name} is truncated inside {key!r}.")
                target = target[count:]
            tensors[key] = tensor.to(device=device)
    return tensors


def _read_header(name: str) -> tuple[str, dict[str, Any], list[str]]:
    """Return kind, metadata and the names of the tensors of a valid file."""
    if not os.path.isfile(name):
        raise FileNotFoundError(f"no such file: {name}")
    try:
        with safe_open(name, framework="pt") as stream:  # checks every offset against the length of the file
            return *_check_header(name, stream.metadata() or {}), list(stream.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{name} is truncated or no safetensors file: {error}") from error


def _check_header(name: str, header: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{name} is no file of {FORMAT}; its format is {header.get('format')!r}.")
    try:
        version = int(header["version"])
        metadata = json.loads(header["metadata"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{name} has a damaged header: {error}.") from error
    if version > VERSION:
        raise CheckpointError(
            f"{name} has format version {version}; this library reads up to {VERSION}. Update lowrank_bdl to read it."
        )
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{name} has a damaged header: metadata must be an object.")
    return str(header.get("kind")), metadata


def _sync_directory(directory: Path) -> None:
    """Make the rename itself survive a power failure, where the system can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:  # systems without directory descriptors
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
