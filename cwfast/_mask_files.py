"""Mask files: safetensors, written whole or not at all; everything that is read is checked."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cwfast import _picks
from cwfast.checkpoint.files import atomic_write
from cwfast.checkpoint.identity import checked_hashes, checked_word
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
    criterion: str | None = None,
) -> None:
    """Per parameter ``<name>/low`` and ``<name>/offset``, or ``<name>/bits``: the smaller of the two forms."""
    from safetensors.torch import save as serialize

    tensors: dict[str, Tensor] = {}
    for name, bits in picks.items():
        bits = _picks.to_device(_picks.compact(bits, math.prod(shapes[name])), "cpu")
        parts = {"low": bits[0], "offset": bits[1]} if isinstance(bits, tuple) else {"bits": bits}
        tensors |= {f"{name}/{part}": tensor.contiguous() for part, tensor in parts.items()}
    sha256 = digest({key: [tensor.reshape(-1)] for key, tensor in tensors.items()})
    metadata = described(FORMAT, sha256, shapes, zero_score_selected, base, criterion)
    with atomic_write(path) as temporary:
        temporary.write_bytes(serialize(tensors, metadata=metadata))  # an OSError stays one, unlike from save_file


def described(
    format: str,
    sha256: str,
    shapes: Shapes,
    zero_score_selected: int,
    base: Mapping[str, str] | None,
    criterion: str | None,
) -> dict[str, str]:
    """The metadata of a file of masks."""
    found = {
        "format": format,
        "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()}),
        "sha256": sha256,
        "zero_score_selected": str(zero_score_selected),
    }
    found |= {} if base is None else {"base": json.dumps(dict(base))}
    return found | ({} if criterion is None else {"criterion": criterion})


class MaskFile:
    """A mask file that is read tensor by tensor: names, shapes and hash are checked when it is opened.

    Attributes:
        path: of the file.
        shapes: of the parameters, in order.
        zero_score_selected: see ``cwfast.select``.
        base: see ``MaskSet``.
        criterion: see ``MaskSet``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not such a file, or broken; the message says where.
    """

    format = FORMAT
    kind = "a mask file, as MaskSet.save writes it"
    more: tuple[str, ...] = ()  # what else it holds of each parameter

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if Path(path).is_dir():
            raise CheckpointError(f"{path} must be {self.kind}; it is a folder")
        self.path = Path(path)
        self._file = Checkpoint(path)
        metadata = self._file.metadata
        if metadata.get("format") != self.format:
            raise CheckpointError(
                f"{path} must be {self.kind}, of format {self.format}; got {metadata.get('format')!r}"
            )
        if metadata.get("sha256") != digest({key: self._file.pieces(key) for key in self._file.entries}):
            raise CheckpointError(f"{path} must hold the data it was written with; its SHA-256 differs")
        self.shapes = _read_shapes(path, metadata.get("shapes", ""))
        expected = {f"{name}/{part}" for name in self.shapes for part in (*self._parts(name), *self.more)}
        have = set(self._file.entries)
        if have != expected:
            raise CheckpointError(
                f"{path} must hold {', '.join(('bits, or low and offset', *self.more))}, of each parameter; "
                f"{sorted(expected ^ have)[:3]}"
            )
        zeros = metadata.get("zero_score_selected", "")
        if not (zeros.isascii() and zeros.isdecimal() and len(zeros) <= 19):
            raise CheckpointError(f"{path} must state zero_score_selected as a number; got {zeros!r}")
        self.zero_score_selected = int(zeros)
        self.base = read_hashes(path, "base", metadata["base"]) if "base" in metadata else None
        self.criterion = read_word(path, "criterion", metadata["criterion"]) if "criterion" in metadata else None

    def _parts(self, name: str) -> tuple[str, ...]:
        return ("bits",) if f"{name}/bits" in self._file.entries else ("low", "offset")

    def layout(self, name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each part of a parameter's mask."""
        entries = {part: self._file.entries[f"{name}/{part}"] for part in self._parts(name)}
        return {part: (entry.dtype, entry.shape) for part, entry in entries.items()}

    def pieces(self, name: str, part: str) -> Iterator[Tensor]:
        """A part of a parameter's mask, in bounded pieces."""
        return self._file.pieces(f"{name}/{part}")

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


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Bits], MaskFile]:
    """The picks that ``save`` was given, and the file; that they are in range and in order is for ``MaskSet`` to check.

    Raises as ``MaskFile`` does.
    """
    file = MaskFile(path)
    return {name: file.read(name) for name in file.shapes}, file


def digest(tensors: Mapping[str, Iterable[Tensor]]) -> str:
    """SHA-256 of names and bytes; each tensor comes as its flat pieces."""
    found = hashlib.sha256()
    for key in sorted(tensors):
        found.update(key.encode())
        for piece in tensors[key]:
            found.update(piece.view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_hashes(path: str | os.PathLike[str], what: str, text: str) -> dict[str, str]:
    """Of a file's metadata.

    Raises:
        CheckpointError: they are none.
    """
    try:
        return checked_hashes(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must state {what} as a JSON object of SHA-256 by name; {error}") from error


def read_word(path: str | os.PathLike[str], what: str, text: str) -> str:
    """Of a file's metadata.

    Raises:
        CheckpointError: it is no name.
    """
    try:
        return checked_word(text)
    except ValueError as error:
        raise CheckpointError(f"{path} must state {what} as a name; {error}") from error


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
