"""Artefact files: a mask file with a value for each selected entry; written as a stream, and all of it checked."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cwfast import _picks
from cwfast._mask_files import MaskFile, described, digest, read_hashes, read_word
from cwfast.checkpoint import Checkpoint
from cwfast.checkpoint.parts import Layout, Parts
from cwfast.errors import CheckpointError
from cwfast.ops.rewind import Bits

FORMAT = "cwfast-artefact/1"
_NO_HASH = "0" * 64


class ArtefactFile(MaskFile):
    """An artefact that is read tensor by tensor: names, shapes and hash are checked when it is opened.

    Attributes:
        result: SHA-256 of each tensor of the model that it makes, also of those of which nothing is selected.
        base_id: what the base is called on a hub; None where that was not told.
        base: SHA-256 of the base's tensors where the values are the base's; None where they are a model's own.
        path, shapes, zero_score_selected, criterion: see ``MaskFile``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not such a file, or broken; the message says where.
    """

    format = FORMAT
    kind = "an artefact, as cwfast artefact writes it"
    more = ("value",)

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        metadata = self._file.metadata
        self.result = read_hashes(path, "result", metadata.get("result", ""))
        self.base_id = read_word(path, "base_id", metadata["base_id"]) if "base_id" in metadata else None
        if unknown := sorted({*self.shapes, *(self.base or ())} - set(self.result)):
            raise CheckpointError(f"{path} must state the result of each of its tensors; it lacks {unknown[0]!r}")

    def dtype(self, name: str) -> torch.dtype:
        """Of a parameter's values."""
        return self._file.entries[f"{name}/value"].dtype

    def picks(self, name: str) -> Bits:
        """As ``MaskFile.picks``, and as many as there are values."""
        bits, shape = super().picks(name), self._file.entries[f"{name}/value"].shape
        if shape != (_picks.count(bits),):
            raise CheckpointError(
                f"{self.path} must hold a value for each of the {_picks.count(bits)} selected entries of {name!r}; "
                f"they have shape {shape}"
            )
        return bits

    def values(self, name: str) -> Iterator[Tensor]:
        """The values of a parameter's selected entries, in flat order and in bounded pieces."""
        return self._file.pieces(f"{name}/value")


class ArtefactWriter:
    """Writes an artefact for the masks of a file; of values, a piece is in memory.

    Args:
        path: is written over.
        masks: what is selected.
        dtypes: of the values, by parameter.
        result: names of all tensors of the model that it will make.
        base: names of the base's tensors whose hashes will be known; None where values are a model's own.
        base_id: see ``ArtefactFile``.
    """

    def __init__(
        self,
        path: Path,
        masks: MaskFile,
        dtypes: Mapping[str, torch.dtype],
        result: list[str],
        base: list[str] | None,
        base_id: str | None,
    ) -> None:
        self._masks, self._base_id = masks, base_id
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, count in masks.counts().items():
            layout |= {f"{name}/{part}": found for part, found in masks.layout(name).items()}
            layout[f"{name}/value"] = dtypes[name], (count,)
        self.size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())
        self._layout: Layout = layout
        no_base = None if base is None else dict.fromkeys(base, _NO_HASH)
        self._empty = self._described(_NO_HASH, dict.fromkeys(result, _NO_HASH), no_base)
        self._path = path

    def begin(self) -> None:
        """Lay the file out, and write the masks."""
        self._parts = Parts(self._path, self._layout, self._empty)
        for name in self._masks.shapes:
            for part in self._masks.layout(name):
                for piece in self._masks.pieces(name, part):
                    self._parts.append(f"{name}/{part}", piece)

    def append(self, name: str, values: Tensor) -> None:
        """The next values of a parameter."""
        self._parts.append(f"{name}/value", values)

    def finish(self, result: Mapping[str, str], base: Mapping[str, str] | None) -> None:
        """Write the hashes, in the order of the names that were given; the data's own is of what was written."""
        written = Checkpoint(self._path)
        sha256 = digest({key: written.pieces(key) for key in written.entries})
        self._parts.describe(self._described(sha256, result, base))

    def _described(self, sha256: str, result: Mapping[str, str], base: Mapping[str, str] | None) -> dict[str, str]:
        masks = self._masks
        found = described(FORMAT, sha256, masks.shapes, masks.zero_score_selected, base, masks.criterion)
        found |= {"result": json.dumps(dict(result))}
        return found | ({} if self._base_id is None else {"base_id": self._base_id})
