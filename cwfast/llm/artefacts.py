"""Sparse artefacts: the values that a checkpoint has at the entries of a mask, and the hashes of that checkpoint.

Applied to any checkpoint that agrees with it elsewhere, an artefact makes it, bit for bit, or makes nothing. So the one
of the rewound model turns the trained model into it, and the one of the trained model turns it back.
"""

import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cwfast import _picks, ops
from cwfast._artefact_files import FORMAT, ArtefactFile, ArtefactWriter
from cwfast._mask_files import MaskFile
from cwfast.checkpoint import Checkpoint
from cwfast.checkpoint.files import atomic_write, sha256
from cwfast.checkpoint.identity import checked_word, files_of, hashed
from cwfast.checkpoint.making import check_space
from cwfast.checkpoint.reader import Memory
from cwfast.checkpoint.writer import HELD
from cwfast.errors import CheckpointError
from cwfast.llm.cards import model_card
from cwfast.llm.folders import INTS, Seen, check_base, check_masks, memory_of, rewound, write_folder


def make_artefact(
    model: str | os.PathLike[str],
    mask: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    base_id: str | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> dict[str, Any]:
    """One safetensors file of the mask, a value for each selected entry and the hashes of what it makes.

    2 bytes of position and a value an entry, 4 bytes in bfloat16 (above 1/16 of a tensor's entries 1/8 byte for each of
    all its entries, and the values). Model and base are read once, in pieces: memory does not grow with them.

    Args:
        model: safetensors file or folder. It is only read.
        mask: file of ``MaskSet.save``; its names are those of ``model``.
        out: file to make, which must not exist; written whole or not at all. A run that was stopped begins anew.
        base: the values are those of this checkpoint, and the artefact makes ``model`` rewound to it. None: they are
            those of ``model``, and the artefact makes ``model``, from it rewound or from it trained further at the
            selected entries alone.
        base_id: what the base is called on a hub ("owner/name"), for model cards; no path is ever recorded.
        progress: called with the number of bytes each time that some of ``model`` have been read.

    Returns:
        JSON-able: format, sha256 and bytes of the file, selected, weights.

    Raises:
        FileNotFoundError: an input is not there.
        CheckpointError: a broken file, names, shapes or dtypes that do not fit, or another base than the mask's.
        FileExistsError: ``out`` is there.
        ValueError: ``out`` lies in an input, or ``base_id`` is no name.
        OSError: the disk is too small or full.
    """
    source, masks, out = Checkpoint(model), MaskFile(mask), Path(out)
    initial = None if base is None else Checkpoint(base)
    check_masks(source, masks)
    if initial is not None:
        check_base(source, initial, masks.shapes)
    if base_id is not None:
        checked_word(base_id)
    _check_place(out, [source] + ([] if initial is None else [initial]))
    counts = masks.counts()
    of_base = None if initial is None else [name for name, count in counts.items() if count]
    dtypes = {name: source.entries[name].dtype for name in masks.shapes}
    with atomic_write(out) as temporary:
        writer = ArtefactWriter(temporary, masks, dtypes, list(source.entries), of_base, base_id)
        check_space(temporary, writer.size)
        writer.begin()
        seen, result, memory = Seen({}, {}), dict.fromkeys(source.entries, ""), memory_of(1)
        for name in sorted(source.entries, key=lambda name: (source.entries[name].file, source.entries[name].begin)):
            found = hashlib.sha256()
            pieces = (
                source.pieces(name, memory=memory[0])
                if initial is None
                else rewound(source, initial, masks, memory, seen, name)
            )
            bits = masks.picks(name) if counts.get(name) else None
            begin = 0
            for piece in hashed(pieces, found):
                end = begin + len(piece)
                if bits is not None:
                    values = ops.gather([piece.view(INTS[piece.element_size()])], [_picks.part(bits, begin, end)])[0]
                    writer.append(name, values.view(piece.dtype))
                progress(piece.nbytes)
                begin = end
            result[name] = found.hexdigest()
        writer.finish(result, None if of_base is None else {name: seen.base[name] for name in of_base})
    return {
        "format": FORMAT,
        "sha256": sha256(out),
        "bytes": out.stat().st_size,
        "selected": sum(counts.values()),
        "weights": sum(math.prod(shape) for shape in masks.shapes.values()),
    }


def apply_artefact(
    model: str | os.PathLike[str],
    artefact: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    copy_code: bool = False,
    card: bool = False,
    base_id: str | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> dict[str, Any]:
    """``W[mask] = values`` for a checkpoint on disk, as ``rewind_folder`` does it, and what comes out is verified.

    Args:
        model: safetensors file or folder that agrees with what the artefact makes, but for the selected entries.
        artefact: file of ``make_artefact``.
        out: see ``rewind_folder``, as for what follows.
        resume: go on with a stopped run.
        copy_code: also copy code.
        card: write a model card. It needs an artefact made with a base: of others it is unknown what the values are.
        base_id: for the card; default: what the artefact says.
        progress: called with numbers of bytes.

    Returns:
        See ``rewind_folder``.

    Raises:
        CheckpointError: a broken file, names, shapes or dtypes that do not fit, or another model: a tensor comes out
            otherwise than the artefact says.
        ValueError: ``card`` for an artefact of a model's own values.
        FileNotFoundError, FileExistsError, RuntimeError, OSError: see ``rewind_folder``.
    """
    source, changes = Checkpoint(model), ArtefactFile(artefact)
    if base_id is not None:
        checked_word(base_id)
    check_masks(source, changes)
    _check_fit(source, changes)
    if card and changes.base is None:
        raise ValueError(f"a model card needs an artefact made with a base; {changes.path} has a model's own values")
    write_card = functools.partial(model_card, changes, base_id or changes.base_id)
    return write_folder(
        source,
        Path(out),
        {"MODEL": source.path},
        {"model": files_of(source), "artefact": {"sha256": sha256(artefact)}},
        functools.partial(_applied, source, changes, Memory(HELD)),
        check=functools.partial(_check_result, source, changes),
        card=(lambda _: write_card(changes.base or {})) if card else None,
        resume=resume,
        copy_code=copy_code,
        progress=progress,
    )


def _applied(source: Checkpoint, changes: ArtefactFile, memory: Memory, seen: Seen, name: str) -> Iterator[Tensor]:
    """The pieces of a tensor, its selected entries as the artefact has them."""
    bits = changes.picks(name) if name in changes.shapes else None
    if bits is None:
        yield from source.pieces(name, memory=memory)
        return
    seen.counts[name] = _picks.count(bits)
    values, begin = _Values(changes.values(name)), 0
    for piece in source.pieces(name, memory=memory):
        end = begin + len(piece)
        part = _picks.part(bits, begin, end)
        if count := _picks.count(part):  # by bits of the same width: every dtype, and every NaN, is written alike
            ops.scatter_([piece.view(INTS[piece.element_size()])], [part], [values.take(count)])
        yield piece
        begin = end


class _Values:
    """Hands out the next values of a tensor, as integers of the same width; of those on disk a piece is in memory."""

    def __init__(self, pieces: Iterator[Tensor]) -> None:
        self._pieces = pieces
        self._rest = torch.empty(0)

    def take(self, count: int) -> Tensor:
        """At least one."""
        parts = []
        while count:
            if not len(self._rest):
                piece = next(self._pieces)
                self._rest = piece.view(INTS[piece.element_size()])
            parts.append(self._rest[:count])
            self._rest = self._rest[count:]
            count -= len(parts[-1])
        return torch.cat(parts)


def _check_fit(source: Checkpoint, changes: ArtefactFile) -> None:
    if wrong := sorted(set(source.entries) ^ set(changes.result)):
        raise CheckpointError(f"{changes.path} must be of {source.path}: {wrong[0]!r} is in one of them alone")
    for name in changes.shapes:
        if changes.dtype(name) != source.entries[name].dtype:
            raise CheckpointError(
                f"{changes.path} must be of {source.path}: {name!r} is {source.entries[name].dtype} there, "
                f"{changes.dtype(name)} in the artefact"
            )
    changes.counts()  # reads and checks all masks: broken ones are found before anything is written


def _check_result(source: Checkpoint, changes: ArtefactFile, name: str, found: str) -> None:
    if found != changes.result[name]:
        raise CheckpointError(
            f"{source.path} must be the model that {changes.path} was made for, but for the selected weights; the "
            f"SHA-256 of {name!r} would be {found[:16]}..., in the artefact {changes.result[name][:16]}..."
        )


def _check_place(out: Path, inputs: list[Checkpoint]) -> None:
    if out.exists():
        raise FileExistsError(f"{out} must not exist: nothing is written over")
    there = out.resolve()
    for given in inputs:
        if given.path.is_dir() and given.path.resolve() in there.parents:
            raise ValueError(f"the artefact must lie outside its inputs; {out} is in {given.path}")
