"""A safetensors folder whose tensors are written one by one, in any order, as they become known."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cwfast.checkpoint.files import atomic_write, fsync
from cwfast.checkpoint.identity import sha256_of
from cwfast.checkpoint.reader import INDEX, PIECE, Checkpoint
from cwfast.errors import CheckpointError

_NAMES = {torch.float32: "F32", torch.float64: "F64"}


class Filling:
    """Files of zeros, laid out for the tensors that shall be in them.

    Args:
        folder: exists; files that are there as they shall be are kept.
        files: ``{file: {tensor: shape}}``.
        dtype: of all of them, float32 or float64.
    """

    def __init__(self, folder: Path, files: Mapping[str, Mapping[str, tuple[int, ...]]], dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self._files = {name: file for file, shapes in files.items() for name in shapes}
        for file, shapes in files.items():
            header = _header(shapes, dtype)
            size = len(header) + sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
            if not _is_laid_out(folder / file, header, size):
                with atomic_write(folder / file) as temporary, open(temporary, "wb") as new:
                    new.write(header)
                    new.truncate(size)
        self._laid_out = Checkpoint(folder)

    def write(self, name: str, tensor: Tensor) -> str:
        """Fill a tensor in; return its SHA-256. On the disk for good only after ``flush``.

        Raises:
            CheckpointError: it is none of them, or of another shape.
            OSError: the disk is full.
        """
        entry = self._laid_out.entries.get(name)
        if entry is None or entry.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{self.folder} must get {name!r} of shape {None if entry is None else entry.shape}; got "
                f"{tuple(tensor.shape)}"
            )
        found, at = hashlib.sha256(), entry.begin
        with open(entry.file, "r+b", buffering=0) as file:
            for piece in tensor.detach().reshape(-1).split(PIECE):
                memory = memoryview(piece.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy())
                found.update(memory)
                while len(memory):
                    count = os.pwrite(file.fileno(), memory, at)
                    memory, at = memory[count:], at + count
        return found.hexdigest()

    def flush(self) -> None:
        """What was written is on the disk."""
        for file in sorted(set(self._files.values())):
            fsync(self.folder / file)

    def holds(self, name: str, sha256: str) -> bool:
        """The tensor on the disk has this hash."""
        return sha256_of(self._laid_out.pieces(name)) == sha256

    def finish(self) -> None:
        """Write the index."""
        size = sum(math.prod(shape) for shape in self._laid_out.shapes.values()) * self.dtype.itemsize
        with atomic_write(self.folder / INDEX) as temporary:
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(self._files.items()))}
            temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _is_laid_out(path: Path, header: bytes, size: int) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    with open(path, "rb") as file:
        return file.read(len(header)) == header
