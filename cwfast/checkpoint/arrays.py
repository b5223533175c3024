"""One array from a file that somebody else wrote: npy, npz, safetensors or torch.save. Nothing in it is run."""

import math
import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

from cwfast.errors import CheckpointError

_HEADERS: dict[tuple[int, int], Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_KINDS = ".npy, .npz, .safetensors, .pt or .pth"


def read_array(where: str | os.PathLike[str], name: str) -> Tensor:
    """The array ``name`` of a file, on the CPU.

    Args:
        where: path; where the file holds several arrays, ``path:array`` says which. Without that it is the one called
            ``name``, or the only one.
        name: what it is, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: a broken file, one with pickled objects, or one that does not say which array is meant.
    """
    path, array = split_path(where)
    if not path.is_file():
        raise FileNotFoundError(f"{name} must be a file; there is none at {where}")
    readers = {".npy": _numpy, ".npz": _numpy, ".safetensors": _safetensors, ".pt": _torch, ".pth": _torch}
    if path.suffix not in readers:
        raise CheckpointError(f"{name} must be a file {_KINDS}; got {path}")
    value = readers[path.suffix](path, array, name)
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_complex():
        raise CheckpointError(f"{path} must hold real numbers as {name}; got {type(value).__name__}")
    return value.detach()


def split_path(where: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """``file.npz:array`` in two; a file that has this very name is that file."""
    path, colon, array = os.fspath(where).rpartition(":")
    if not colon or Path(where).exists():
        return Path(where), None
    return Path(path), array


def _numpy(path: Path, array: str | None, name: str) -> Tensor:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"PK"
            file.seek(0)
            if packed:
                with np.load(file, allow_pickle=False) as arrays:
                    found = read_npz(arrays, _chosen(path, arrays.files, array, name))
            elif array is not None:
                raise CheckpointError(f"{path} must be named without an array: it holds one; got :{array}")
            else:
                _check_header(file, path.stat().st_size)
                file.seek(0)
                found = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, CheckpointError):
            raise
        if "allow_pickle" in str(error) and "Object arrays" in str(error):
            raise CheckpointError(f"{path} must hold plain numbers as {name}; got pickled objects") from error
        raise CheckpointError(f"{path} must be a whole {path.suffix} file of plain numbers; {error}") from error
    if found.dtype.kind not in "biuf" or found.dtype.itemsize > 8:
        raise CheckpointError(f"{path} must hold numbers as {name}; got {found.dtype}")
    return torch.from_numpy(np.ascontiguousarray(found, dtype=found.dtype.newbyteorder("=")).reshape(found.shape))


def read_npz(arrays: NpzFile, name: str, limit: int | None = None) -> npt.NDArray[Any]:
    """An array of an opened npz file. What it unpacks to is known before: its header and the archive must agree on it.

    Raises:
        ValueError: it is no array, broken, or of more than ``limit`` bytes, by its header.
        BadZipFile, zlib.error, EOFError: broken.
    """
    archive: zipfile.ZipFile = arrays.zip  # type: ignore[assignment]  # None once it is closed
    entries = {entry.filename: entry for entry in archive.infolist()}
    entry = entries[name] if name in entries else entries[f"{name}.npy"]
    if limit is not None and entry.file_size > limit:
        raise ValueError(f"{name} must be at most {limit} bytes; it has {entry.file_size}")
    with archive.open(entry) as file:
        _check_header(file, entry.file_size)
    return arrays[name]


def _check_header(file: IO[bytes], size: int) -> None:
    """numpy makes room for what a header says before it reads on."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"its format must be 1.0 or 2.0; it is {version}")
    shape, _, dtype = _HEADERS[version](file)
    wanted = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and wanted != size - file.tell():  # objects are refused where they are read
        raise ValueError(f"it must hold {wanted} bytes, as its header says; it holds {size - file.tell()}")


def _safetensors(path: Path, array: str | None, name: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor(_chosen(path, list(file.keys()), array, name))
    except SafetensorError as error:
        raise CheckpointError(f"{path} must be a safetensors file; {error}") from error


def _torch(path: Path, array: str | None, name: str) -> Any:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} must hold tensors alone, as torch.save writes them (other pickled objects can run code and are "
            "not read); it does not, or it is broken"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} must be a file of torch.save; {reason}") from error
    if isinstance(found, dict):
        named = {str(key): value for key, value in found.items()}
        return named[_chosen(path, list(named), array, name)]
    if array is not None:
        raise CheckpointError(f"{path} must be named without an array: it holds one; got :{array}")
    return found


def _chosen(path: Path, names: list[str], array: str | None, name: str) -> str:
    have = ", ".join(names) or "none"
    if array is not None:
        if array not in names:
            raise CheckpointError(f"{path} must hold an array {array!r}; it holds {have}")
        return array
    if name in names:
        return name
    if len(names) != 1:
        raise CheckpointError(
            f"{path} must be given as {path}:ARRAY, to say which array is the {name}; it holds {have}"
        )
    return names[0]
