"""A safetensors file, or a folder of them, read as a stream of bounded pieces."""

import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cwfast.errors import CheckpointError

INDEX = "model.safetensors.index.json"
PIECE = (
    1 << 22
)  # entries worked on at a time: a multiple of 65,536, whole blocks of a list and whole bytes of packed bits
MAX_NUMEL = 1 << 62  # entries of a tensor: byte counts of what is computed from them still fit 64 bits
_MAX_INDEX = 1 << 28  # bytes; a million tensors with long names take half of that
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Entry(NamedTuple):
    """Where a tensor lies."""

    file: Path
    begin: int  # of its bytes in the file
    dtype: torch.dtype
    shape: tuple[int, ...]


class Memory:
    """Room for ``count`` pieces; a further one takes that of the oldest: fresh memory costs more than reading."""

    def __init__(self, count: int) -> None:
        self._rooms = deque([torch.empty(0, dtype=torch.uint8)] * count)

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor that says nothing yet."""
        room, needed = self._rooms.popleft(), numel * dtype.itemsize
        if len(room) < needed:
            room = torch.empty(needed, dtype=torch.uint8)
        self._rooms.append(room)
        return room[:needed].view(dtype)


class Checkpoint:
    """Tensors of a safetensors file or folder by name; opening reads headers only.

    A folder holds ``model.safetensors.index.json``, whose ``weight_map`` names the file of each tensor, or else any
    number of ``*.safetensors`` files. Files may be symbolic links (caches of hubs are made of them); nothing is ever
    written here. A name that a file's metadata maps to a tensor's name (as ``safetensors.torch.save_model`` does for
    tied weights) stands for that tensor where it is asked for; ``entries`` and ``shapes`` list each tensor once, since
    any other pair of metadata may look the same.

    Args:
        path: file or folder.

    Raises:
        FileNotFoundError: there is no such file or folder.
        CheckpointError: broken or hostile: the message names the file and what it must hold.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}  # of a folder: that of all its files
        if not self.path.is_dir():
            self.entries, self.metadata = _header(self.path)
        elif (self.path / INDEX).exists():
            weight_map = _weight_map(self.path / INDEX)
            headers = {file: _header(self.path / file) for file in sorted(set(weight_map.values()))}
            for name, file in weight_map.items():
                entries, more = headers[file]
                if name not in entries:
                    raise CheckpointError(f"{self.path / file} must hold {name!r}, as {INDEX} says; it does not")
                self.entries[name] = entries[name]
                self.metadata |= more
        else:
            files = sorted(self.path.glob("*.safetensors"))
            if not files:
                raise CheckpointError(f"{self.path} must hold {INDEX} or *.safetensors files; it holds neither")
            for found in files:
                entries, more = _header(found)
                twice = sorted(set(entries) & set(self.entries))
                if twice:
                    raise CheckpointError(f"{self.path} must hold each tensor once; {twice[0]!r} is in several files")
                self.entries |= entries
                self.metadata |= more
        tied = self.metadata.items()
        self._aliases = {name: kept for name, kept in tied if name not in self.entries and kept in self.entries}

    def __contains__(self, name: str) -> bool:
        return name in self.entries or name in self._aliases

    def entry(self, name: str) -> Entry:
        """Where a tensor lies, by its own name or one that stands for it."""
        return self.entries[self._aliases.get(name, name)]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by the tensors' own names."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, in memory of its own."""
        entry = self.entry(name)
        parts = list(self.pieces(name, max(math.prod(entry.shape), 1)))
        return parts[0].reshape(entry.shape) if parts else torch.empty(entry.shape, dtype=entry.dtype)

    def pieces(
        self, name: str, size: int = PIECE, *, begin: int = 0, end: int | None = None, memory: Memory | None = None
    ) -> Iterator[Tensor]:
        """The flat tensor from its first entry to its last, ``size`` entries (the last time fewer) at a time; or from
        ``begin`` to ``end``, of which nothing else is read.

        Each piece is memory of its own, or lies in ``memory``. Read sequentially: reaching for selected entries through
        a memory map is 27 times slower than reading everything when the file is not cached.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        entry = self.entry(name)
        last, item = math.prod(entry.shape) if end is None else end, entry.dtype.itemsize
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(entry.begin + begin * item)
            for at in range(begin, last, size):
                numel = min(size, last - at)
                piece = memory.take(numel, entry.dtype) if memory else torch.empty(numel, dtype=entry.dtype)
                view, got = piece.view(torch.uint8).numpy().data, 0
                while got < len(view):
                    count = file.readinto(view[got:])
                    if not count:
                        raise CheckpointError(f"{entry.file} must hold all of {name!r}; it ends too early")
                    got += count
                yield piece


def _header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata of one file. safetensors itself checks the header: bounds, overlaps, products, holes."""
    from safetensors import SafetensorError, safe_open

    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} must be a safetensors file; it is a {'folder' if path.is_dir() else 'device'}")
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path} must be a safetensors file; {_what_else(path) or error}") from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    entries = {}
    for name, item in header.items():
        if item["dtype"] not in DTYPES:
            raise CheckpointError(f"{path} must hold dtypes of {sorted(DTYPES)}; {name!r} has {item['dtype']}")
        begin, end = item["data_offsets"]
        dtype, shape = DTYPES[item["dtype"]], tuple(item["shape"])
        if end - begin != math.prod(shape) * dtype.itemsize:  # a name twice in the header: who read which is unknown
            raise CheckpointError(f"{path} must hold {name!r} of shape {shape} in its bytes; it has {end - begin}")
        if math.prod(max(size, 1) for size in shape) >= MAX_NUMEL:  # sizes that a size 0 hides, too
            raise CheckpointError(f"{path} must hold tensors below 2**62 entries; {name!r} has shape {shape}")
        entries[name] = Entry(path, 8 + length + begin, dtype, shape)
    return entries, metadata


def _what_else(path: Path) -> str:
    """Names the formats that are most often given in place of safetensors."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:2] in (b"PK", b"\x80\x02"):
        return "it looks like a file of torch.save (.pt, .bin), to be read by torch.load(path, weights_only=True)"
    return "it is a GGUF file" if start == b"GGUF" else ""


def _weight_map(path: Path) -> Mapping[str, str]:
    """The index's ``weight_map``: an index comes with a download, so that no path in it leaves its folder."""
    if path.stat().st_size > _MAX_INDEX:
        raise CheckpointError(f"{path} must be at most {_MAX_INDEX} bytes; it has {path.stat().st_size}")
    try:
        found = json.loads(path.read_bytes())["weight_map"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} must be JSON with a weight_map; {type(error).__name__}: {error}") from error
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path} must map names to files in weight_map; got {str(found)[:80]}")
    for name, file in found.items():
        if not isinstance(file, str) or not _is_bare(file):
            raise CheckpointError(f"{path} must name bare files *.safetensors of its folder; {name!r} has {file!r}")
        if not (path.parent / file).is_file():
            raise CheckpointError(f"{path} must name files that exist; {name!r} is in {file!r}, which does not")
    return found


def _is_bare(file: str) -> bool:
    return file.endswith(".safetensors") and not set(file) & set("/\\:\0") and not file.startswith(".")
