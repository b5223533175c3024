"""Mask files: safetensors, written whole or not at all; everything that is read is checked."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cwfast import _picks
from cwfast.checkpoint.files import atomic_write
from cwfast.checkpoint.identity import checked_hashes
from cwfast.checkpoint.reader import MAX_NUMEL, Checkpoint
from cwfast.errors import CheckpointError
from cwfast.ops.rewind import Bits

FORMAT = "cwfast-mask/1"
Shapes = dict[str, tuple[int, ...]]


def save(
    path: str | os.PathLike[str],
    picks: Mapping[str, Bits],
    shapes: Shapes,
    zero_score_selected: int,
    base: Mapping[str, str] | None = None,
) -> None:
    """Per parameter ``<name>/low`` and ``<name>/offset``, or ``<name>/bits``: the smaller of the two forms."""
    from safetensors.torch import save as serialize

    tensors: dict[str, Tensor] = {}
    for name, bits in picks.items():
        bits = _picks.to_device(_picks.compact(bits, math.prod(shapes[name])), "cpu")
        parts = {"low": bits[0], "offset": bits[1]} if isinstance(bits, tuple) else {"bits": bits}
        tensors |= {f"{name}/{part}": tensor.contiguous() for part, tensor in parts.items()}
    metadata = {
        "format": FORMAT,
        "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()}),
        "sha256": digest({key: [tensor.reshape(-1)] for key, tensor in tensors.items()}),
        "zero_score_selected": str(zero_score_selected),
    }
    if base is not None:
        metadata["base"] = json.dumps(dict(base))
    with atomic_write(path) as temporary:
        temporary.write_bytes(serialize(tensors, metadata=metadata))  # an OSError stays one, unlike from save_file


class MaskFile:
    """A mask file that is read tensor by tensor: names, shapes and hash are checked when it is opened.

    Attributes:
        path: of the file.
        shapes: of the parameters, in order.
        zero_score_selected: see ``cwfast.select``.
        base: see ``MaskSet``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not such a file, or broken; the message says where.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if Path(path).is_dir():
            raise CheckpointError(f"{path} must be a mask file, as MaskSet.save writes it; it is a folder")
        self.path = Path(path)
        self._file = Checkpoint(path)
        metadata = self._file.metadata
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} must be a mask file of format {FORMAT}; got {metadata.get('format')!r}")
        if metadata.get("sha256") != digest({key: self._file.pieces(key) for key in self._file.entries}):
            raise CheckpointError(f"{path} must hold the data it was written with; its SHA-256 differs")
        self.shapes = _read_shapes(path, metadata.get("shapes", ""))
        expected = {f"{name}/{part}" for name in self.shapes for part in self._parts(name)}
        have = set(self._file.entries)
        if have != expected:
            raise CheckpointError(
                f"{path} must hold bits, or low and offset, of each parameter; {sorted(expected ^ have)[:3]}"
            )
        zeros = metadata.get("zero_score_selected", "")
        if not (zeros.isascii() and zeros.isdecimal() and len(zeros) <= 19):
            raise CheckpointError(f"{path} must state zero_score_selected as a number; got {zeros!r}")
        self.zero_score_selected = int(zeros)
        self.base = _read_base(path, metadata["base"]) if "base" in metadata else None

    def _parts(self, name: str) -> tuple[str, ...]:
        return ("bits",) if f"{name}/bits" in self._file.entries else ("low", "offset")

    def read(self, name: str) -> Bits:
        """What the file has as the selected entries of a parameter, unchecked: for a ``MaskSet``, which checks them."""
        parts = [self._file.tensor(f"{name}/{part}") for part in self._parts(name)]
        return parts[0] if len(parts) == 1 else (parts[0], parts[1])

    def picks(self, name: str) -> Bits:
        """The selected entries of a parameter.

        Raises:
            CheckpointError: they are not in range, in order and in a legal form.
        """
        bits = self.read(name)
        if wrong := _picks.wrong(bits, math.prod(self.shapes[name])):
            raise CheckpointError(f"{self.path} must hold the masks that its shapes promise; {name!r} {wrong}")
        return bits

    def counts(self) -> dict[str, int]:
        """Selected entries by name; packed bits are read for it."""
        return {name: _picks.count(self.picks(name)) for name in self.shapes}


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Bits], Shapes, int, dict[str, str] | None]:
    """What ``save`` was given; that the entries are in range and in order is for ``MaskSet`` to check.

    Raises as ``MaskFile`` does.
    """
    file = MaskFile(path)
    return {name: file.read(name) for name in file.shapes}, file.shapes, file.zero_score_selected, file.base


def digest(tensors: Mapping[str, Iterable[Tensor]]) -> str:
    """SHA-256 of names and bytes; each tensor comes as its flat pieces."""
    found = hashlib.sha256()
    for key in sorted(tensors):
        found.update(key.encode())
        for piece in tensors[key]:
            found.update(piece.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _read_base(path: str | os.PathLike[str], text: str) -> dict[str, str]:
    try:
        return checked_hashes(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must state base as a JSON object of SHA-256 by name; {error}") from error


def _read_shapes(path: str | os.PathLike[str], text: str) -> Shapes:
    try:
        shapes = json.loads(text)
        good = isinstance(shapes, dict) and all(
            isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
            for shape in shapes.values()
        )
    except (ValueError, RecursionError):  # also numbers of too many digits and brackets nested too deeply
        good = False
    if not good:
        raise CheckpointError(f"{path} must state shapes as a JSON object of lists of sizes; got {text[:80]!r}")
    for name, shape in shapes.items():
        if math.prod(max(size, 1) for size in shape) >= MAX_NUMEL:  # Python integers: none that a size 0 would hide
            raise CheckpointError(f"{path} must name tensors below 2**62 entries; {name!r} has shape {shape}")
    return {name: tuple(shape) for name, shape in shapes.items()}
