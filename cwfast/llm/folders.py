"""A model's folder with its critical weights put back to the base checkpoint's, larger than memory or not."""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cwfast import _picks, ops
from cwfast._mask_files import MaskFile
from cwfast._workers import ahead, alone
from cwfast.checkpoint import Checkpoint
from cwfast.checkpoint.files import atomic_write, sha256
from cwfast.checkpoint.identity import checked_word, files_of, hashed
from cwfast.checkpoint.making import check_space, making
from cwfast.checkpoint.reader import INDEX, Memory
from cwfast.checkpoint.writer import HELD, rewrite
from cwfast.errors import CheckpointError
from cwfast.llm.cards import model_card
from cwfast.llm.other_files import copy_others
from cwfast.llm.twins import check_twins
from cwfast.ops.rewind import Bits

FORMAT = "cwfast-rewound/1"
MANIFEST = "cwfast-rewound.json"  # in the folder that is written
CARD = "README.md"
INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def rewind_folder(
    model: str | os.PathLike[str],
    base: str | os.PathLike[str],
    mask: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    copy_code: bool = False,
    card: bool = False,
    base_id: str | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> dict[str, Any]:
    """``W[mask] = W0[mask]`` for a checkpoint on disk: a complete folder that transformers loads.

    Weights are read, rewound, hashed and written in pieces of 4 million entries: memory does not grow with the model
    (the mask's part of one tensor is held). Everything is written into a folder beside ``out``, whose name begins with
    a dot, and renamed to ``out`` at the end; what a killed run has finished there, file by file, ``resume`` keeps.

    Args:
        model: safetensors file or folder with the trained weights. It is only read.
        base: the same with the initial ones: each tensor of the mask in the same shape and dtype. It is only read.
        mask: file of ``MaskSet.save``; its names are those of ``model``. Where it says which base it was made with, as
            one from ``score_folder``'s scores does, ``base`` must be that.
        out: folder to make; it must not exist (an empty one may), nor lie in ``model`` or ``base``.
        resume: go on where an earlier run with the same arguments, ``copy_code`` and ``card`` too, was stopped.
        copy_code: also copy ``*.py`` and keep ``auto_map``, which names code that ``trust_remote_code`` runs.
        card: write a model card, ``README.md``, in place of the model's own.
        base_id: what the base is called on a hub, for the card.
        progress: called with the number of bytes each time that some have been written.

    Returns:
        What the manifest in ``out`` holds: inputs with their hashes, each tensor's SHA-256, the count of rewound
        weights, and which other files were copied and which were not.

    Raises:
        FileNotFoundError: an input is not there.
        CheckpointError: a broken file, or names, shapes or dtypes that do not fit.
        FileExistsError: ``out`` is there, or an unfinished run of it is and ``resume`` is False.
        RuntimeError: another process writes the same folder.
        OSError: the disk is too small or full. In all these cases no folder ``out`` has been made.
    """
    source, initial, masks = Checkpoint(model), Checkpoint(base), MaskFile(mask)
    places = {"MODEL": source.path, "BASE": initial.path}
    if base_id is not None:
        checked_word(base_id)
    check_masks(source, masks)
    check_base(source, initial, masks.shapes)
    inputs = {"model": files_of(source), "base": files_of(initial), "mask": {"sha256": sha256(mask)}}
    return write_folder(
        source,
        Path(out),
        places,
        inputs,
        functools.partial(rewound, source, initial, masks, memory_of(HELD)),
        card=functools.partial(model_card, masks, base_id) if card else None,
        resume=resume,
        copy_code=copy_code,
        progress=progress,
    )


class Seen(NamedTuple):
    """What was met in the tensors of a file while they were changed."""

    counts: dict[str, int]  # changed entries of each tensor
    base: dict[str, str]  # SHA-256 of the base's tensors that were read


def write_folder(
    source: Checkpoint,
    out: Path,
    places: Mapping[str, Path],
    inputs: Mapping[str, Any],
    change: Callable[[Seen, str], Iterator[Tensor]],
    *,
    check: Callable[[str, str], None] | None = None,
    card: Callable[[Mapping[str, str]], str] | None = None,
    resume: bool,
    copy_code: bool,
    progress: Callable[[int], object],
) -> dict[str, Any]:
    """A model's folder again, its tensors changed on the way; see ``rewind_folder``.

    Args:
        source: the model.
        out: folder to make.
        places: what ``out`` may not lie in.
        inputs: identities of the inputs.
        change: tensor name -> its flat pieces; tells what it meets.
        check: called with each tensor's name and SHA-256; raises where that is wrong.
        card: SHA-256 of the base's tensors -> text of README.md.
        resume: see ``rewind_folder``.
        copy_code: see there.
        progress: see there.

    Returns:
        What the manifest in ``out`` holds.
    """
    inputs = {**inputs, "copy_code": copy_code, "card": card is not None}  # what a stopped run has copied is kept
    with making(out, places, inputs, kind=FORMAT, manifest=MANIFEST, resume=resume, files={}) as made:
        partial, state = made.path, made.state
        _check_space(partial, source, state["files"])
        for file in sorted({entry.file for entry in source.entries.values()}):
            size = file.stat().st_size
            if not _is_done(partial / file.name, state["files"].get(file.name), size):
                seen = Seen({}, {})
                pieces = functools.partial(_told, progress, functools.partial(change, seen))
                hashes = rewrite(source, file, partial / file.name, pieces, check)
                rewound = sum(seen.counts.values())
                state["files"][file.name] = {"bytes": size, "sha256": hashes, "base": seen.base, "rewound": rewound}
                made.save()
            else:
                progress(size)
        own = {MANIFEST, CARD} if card is not None else {MANIFEST}
        state["copied"], state["left_out"] = copy_others(source.path, partial, copy_code, own)
        if card is not None:
            base = {name: found for done in state["files"].values() for name, found in done["base"].items()}
            with atomic_write(partial / CARD) as temporary:
                temporary.write_text(card(base), encoding="utf-8")
        state["rewound"] = sum(done["rewound"] for done in state["files"].values())
        _verify(partial, source)
    return state


def _told(progress: Callable[[int], object], change: Callable[[str], Iterator[Tensor]], name: str) -> Iterator[Tensor]:
    for piece in change(name):
        yield piece
        progress(piece.nbytes)


def memory_of(held: int) -> tuple[Memory, Memory]:
    """Where the pieces that ``rewound`` reads lie: of the model ``held`` are in use at a time, of the base three."""
    return Memory(held), Memory(3)


def rewound(
    source: Checkpoint, initial: Checkpoint, masks: MaskFile, memory: tuple[Memory, Memory], seen: Seen, name: str
) -> Iterator[Tensor]:
    """The pieces of a tensor, its selected entries as in ``initial``.

    ``memory``: see ``memory_of``.

    Raises:
        CheckpointError: the base is another than that of the mask, or a file is broken.
    """
    bits: Bits | None = masks.picks(name) if name in masks.shapes else None
    if bits is not None:
        seen.counts[name] = _picks.count(bits)
        if not seen.counts[name]:
            bits = None
    found = hashlib.sha256()
    base = hashed(initial.pieces(name, memory=memory[1]), found)
    given = ahead(base, 1) if bits is not None else iter(())  # one waits while one is read and one is used
    begin = 0
    for piece in source.pieces(name, memory=memory[0]):
        end = begin + len(piece)
        if bits is not None:  # by bits of the same width: every dtype is rewound alike
            as_int = INTS[piece.element_size()]
            other = next(given)
            with alone():  # others read, hash and write
                ops.rewind_([piece.view(as_int)], [other.view(as_int)], [_picks.part(bits, begin, end)])
        yield piece
        begin = end
    if bits is None:
        return
    seen.base[name] = found.hexdigest()
    expected = None if masks.base is None else masks.base.get(name)
    if expected is not None and found.hexdigest() != expected:
        raise CheckpointError(
            f"{initial.path} must be the base that {masks.path} was made with; the SHA-256 of its {name!r} is "
            f"{found.hexdigest()[:16]}..., in the mask {expected[:16]}..."
        )


def check_masks(source: Checkpoint, masks: MaskFile) -> None:
    """The masks are of this model, of which the index names all tensors, and no copy of what they select is left out.

    Raises:
        CheckpointError: they are not.
    """
    for file in {entry.file for entry in source.entries.values()}:
        if unlisted := sorted(set(Checkpoint(file).entries) - set(source.entries)):
            raise CheckpointError(
                f"{source.path} must list all tensors of {file.name} in {INDEX}; {unlisted[0]!r} is not"
            )
    for name, shape in masks.shapes.items():
        if name not in source.entries:
            raise CheckpointError(f"{masks.path} must be of {source.path}, which has no tensor {name!r}")
        if source.entries[name].shape != shape:
            raise CheckpointError(
                f"{masks.path} must be of {source.path}: {name!r} has shape {source.entries[name].shape} there, "
                f"{shape} in the mask"
            )
    check_twins(source, masks)


def check_base(source: Checkpoint, initial: Checkpoint, names: Iterable[str]) -> None:
    """The base has these tensors as the model has them.

    Raises:
        CheckpointError: it has not.
    """
    for name in names:
        if name not in initial:
            raise CheckpointError(f"{initial.path} must hold the initial values of {name!r}; it has no such tensor")
        here, there = source.entries[name], initial.entry(name)
        if (here.shape, here.dtype) != (there.shape, there.dtype):
            raise CheckpointError(
                f"{initial.path} must hold {name!r} as {source.path} does, {here.dtype} of shape {here.shape}; it has "
                f"{there.dtype} of shape {there.shape}"
            )


def _is_done(target: Path, entry: Mapping[str, Any] | None, size: int) -> bool:
    return entry is not None and target.is_file() and target.stat().st_size == size == entry["bytes"]


def _check_space(partial: Path, source: Checkpoint, done: Mapping[str, Any]) -> None:
    files = {entry.file for entry in source.entries.values()}
    check_space(partial, sum(file.stat().st_size for file in files if file.name not in done))


def _verify(partial: Path, source: Checkpoint) -> None:
    """What was written opens, and has the tensors that the model has."""
    if source.path.is_dir():
        written = Checkpoint(partial)
        same = {name: (e.shape, e.dtype) for name, e in written.entries.items()} == {
            name: (e.shape, e.dtype) for name, e in source.entries.items()
        }
        if not same:
            raise CheckpointError(f"{partial} must hold the tensors of {source.path}; it does not")
