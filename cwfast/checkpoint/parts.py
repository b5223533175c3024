"""One safetensors file whose tensors grow piece by piece, side by side; what is said of them comes last."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cwfast.checkpoint.reader import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Parts:
    """A file of zeros, laid out for the tensors that shall be in it.

    Args:
        path: is written over.
        layout: dtype and shape of each tensor.
        metadata: as long as those that ``describe`` will put in their place.
    """

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str]) -> None:
        self.path = path
        # Wide entries first: readers that map the file want each at a multiple of its own size.
        self._layout = dict(sorted(layout.items(), key=lambda item: -item[1][0].itemsize))
        self._header = header(self._layout, metadata)
        self._at, self._end = {}, {}
        end = len(self._header)
        for name, (dtype, shape) in self._layout.items():
            self._at[name] = end
            end += math.prod(shape) * dtype.itemsize
            self._end[name] = end
        with open(path, "wb") as new:
            new.write(self._header)
            new.truncate(end)

    def append(self, name: str, piece: Tensor) -> None:
        """Write the next entries of a tensor.

        Raises:
            ValueError: they are of another dtype, or more than there is room for.
            OSError: the disk is full.
        """
        dtype, shape = self._layout[name]
        if piece.dtype != dtype or self._at[name] + piece.nbytes > self._end[name]:
            raise ValueError(f"{name!r} must get {dtype} of shape {shape}; got more, or {piece.dtype}")
        with open(self.path, "r+b", buffering=0) as file:
            write_at(file.fileno(), memoryview(piece.contiguous().view(torch.uint8).numpy()), self._at[name])  # type: ignore[arg-type]
        self._at[name] += piece.nbytes

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Put these metadata in place of those of the beginning; all tensors must be complete.

        Raises:
            ValueError: one is not, or the metadata are of another length.
        """
        short = next((name for name, end in self._end.items() if self._at[name] != end), None)
        if short is not None:
            raise ValueError(f"{short!r} must be complete; {self._end[short] - self._at[short]} bytes are missing")
        new = header(self._layout, metadata)
        if len(new) != len(self._header):
            raise ValueError(f"metadata must be as long as at the beginning; {len(new)} bytes, not {len(self._header)}")
        with open(self.path, "r+b", buffering=0) as file:
            write_at(file.fileno(), memoryview(new), 0)


def header(layout: Layout, metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with, for tensors that follow each other in this order."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, (dtype, shape) in layout.items():
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_at(handle: int, memory: memoryview, at: int) -> None:
    """All of it: the system may write less than it is asked to."""
    while len(memory):
        count = os.pwrite(handle, memory, at)
        memory, at = memory[count:], at + count
