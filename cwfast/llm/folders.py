"""A model's folder with its critical weights put back to the base checkpoint's, larger than memory or not."""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cwfast import _picks, ops
from cwfast._mask_files import MaskFile
from cwfast.checkpoint import Checkpoint
from cwfast.checkpoint.files import atomic_write, sha256
from cwfast.checkpoint.identity import files_of, hashed
from cwfast.checkpoint.making import check_space, making
from cwfast.checkpoint.reader import INDEX
from cwfast.checkpoint.writer import rewrite
from cwfast.errors import CheckpointError
from cwfast.ops.rewind import Bits

FORMAT = "cwfast-rewound/1"
MANIFEST = "cwfast-rewound.json"  # in the folder that is written
_INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# What else is copied. Weights in another format would still be those that were not rewound, so nothing unknown is.
_KNOWN = {".json", ".jsonl", ".txt", ".model", ".jinja", ".md", ".tiktoken", ".vocab", ".merges"}
_KNOWN_NAMES = {"LICENSE", "NOTICE", "USE_POLICY"}


def rewind_folder(
    model: str | os.PathLike[str],
    base: str | os.PathLike[str],
    mask: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    copy_code: bool = False,
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
        resume: go on where an earlier run with the same arguments was stopped.
        copy_code: also copy ``*.py`` and keep ``auto_map``, which names code that ``trust_remote_code`` runs.
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
    out = Path(out)
    places = {"MODEL": source.path, "BASE": initial.path}
    _check_fit(source, initial, masks)
    inputs = {"model": files_of(source), "base": files_of(initial), "mask": {"sha256": sha256(mask)}}
    with making(out, places, inputs, kind=FORMAT, manifest=MANIFEST, resume=resume, files={}) as made:
        partial, state = made.path, made.state
        _check_space(partial, source, state["files"])
        for file in sorted({entry.file for entry in source.entries.values()}):
            size = file.stat().st_size
            if not _is_done(partial / file.name, state["files"].get(file.name), size):
                counts: list[int] = []
                pieces = functools.partial(_rewound, source, initial, masks, counts, progress)
                hashes = rewrite(source, file, partial / file.name, pieces)
                state["files"][file.name] = {"bytes": size, "sha256": hashes, "rewound": sum(counts)}
                made.save()
            else:
                progress(size)
        state["copied"], state["left_out"] = _copy_others(source.path, partial, copy_code)
        state["rewound"] = sum(done["rewound"] for done in state["files"].values())
        _verify(partial, source)
    return state


def _rewound(
    source: Checkpoint,
    initial: Checkpoint,
    masks: MaskFile,
    counts: list[int],
    progress: Callable[[int], object],
    name: str,
) -> Iterator[Tensor]:
    """The pieces of a tensor, its selected entries as in ``initial``; how many these are goes to ``counts``."""
    bits: Bits | None = masks.picks(name) if name in masks.shapes else None
    if bits is not None:
        counts.append(_picks.count(bits))
        if not counts[-1]:
            bits = None
    found = hashlib.sha256()
    base = hashed(initial.pieces(name), found) if bits is not None else iter(())
    begin = 0
    for piece in source.pieces(name):
        end = begin + len(piece)
        if bits is not None:  # by bits of the same width: every dtype is rewound alike
            as_int = _INTS[piece.element_size()]
            ops.rewind_([piece.view(as_int)], [next(base).view(as_int)], [_picks.part(bits, begin, end)])
        yield piece
        progress(piece.nbytes)
        begin = end
    expected = None if masks.base is None or bits is None else masks.base.get(name)
    if expected is not None and found.hexdigest() != expected:
        raise CheckpointError(
            f"{initial.path} must be the base that {masks.path} was made with; the SHA-256 of its {name!r} is "
            f"{found.hexdigest()[:16]}..., in the mask {expected[:16]}..."
        )


def _check_fit(source: Checkpoint, initial: Checkpoint, masks: MaskFile) -> None:
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
    check_base(source, initial, masks.shapes)


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


def _copy_others(model: Path, partial: Path, copy_code: bool) -> tuple[list[str], list[str]]:
    """Config, tokenizer and the like; which were copied, and which were not. The index comes last."""
    if not model.is_dir():
        return [], []
    files = sorted((f for f in model.iterdir() if f.is_file()), key=lambda f: (f.name == INDEX, f.name))
    copied, left_out = [], []
    for file in files:
        if (partial / file.name).exists() and file.suffix == ".safetensors":
            continue  # written already
        known = file.suffix in _KNOWN or file.stem in _KNOWN_NAMES or (file.suffix == ".py" and copy_code)
        other_index = file.name.endswith(".index.json") and file.name != INDEX
        if not known or other_index or file.name.startswith(".") or file.name == MANIFEST:
            left_out.append(file.name)
            continue
        with atomic_write(partial / file.name) as temporary:
            if file.suffix == ".json" and file.name != INDEX and not copy_code:
                temporary.write_bytes(_without_code(file.read_bytes()))
            else:
                shutil.copyfile(file, temporary)
        copied.append(file.name)
    return copied, left_out + sorted(f"{f.name}/" for f in model.iterdir() if f.is_dir())


def _without_code(data: bytes) -> bytes:
    """A JSON file without ``auto_map``, wherever in it; unchanged where it has none.

    Raises:
        CheckpointError: it has, and cannot be read.
    """
    if b"auto_map" not in data and b"\\u" not in data:  # a name may be written with escapes
        return data
    try:
        found = json.loads(data)
        cleaned = _cleaned(found)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"a file with auto_map must be JSON; {type(error).__name__}: {error}") from error
    return data if cleaned == found else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cleaned(item) for key, item in value.items() if key != "auto_map"}
    return [_cleaned(item) for item in value] if isinstance(value, list) else value


def _verify(partial: Path, source: Checkpoint) -> None:
    """What was written opens, and has the tensors that the model has."""
    if source.path.is_dir():
        written = Checkpoint(partial)
        same = {name: (e.shape, e.dtype) for name, e in written.entries.items()} == {
            name: (e.shape, e.dtype) for name, e in source.entries.items()
        }
        if not same:
            raise CheckpointError(f"{partial} must hold the tensors of {source.path}; it does not")
