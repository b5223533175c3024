"""Which checkpoint it is: the hash of each tensor, and one of them all, whatever files they lie in."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cwfast.checkpoint.reader import Checkpoint, Memory
from cwfast.errors import CheckpointError

SCORES = "cwfast-scores.json"  # in a folder of scores: how they were made, and from what


def tensor_hashes(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the bytes of each tensor, which are read in pieces."""
    memory = Memory(1)
    return {name: sha256_of(checkpoint.pieces(name, memory=memory)) for name in names}


def sha256_of(pieces: Iterable[Tensor]) -> str:
    """Of a tensor's bytes."""
    found = hashlib.sha256()
    for _ in hashed(pieces, found):
        pass
    return found.hexdigest()


def hashed(pieces: Iterable[Tensor], into: "hashlib._Hash") -> Iterator[Tensor]:
    """The pieces, each hashed before it is handed on."""
    for piece in pieces:
        into.update(piece.view(torch.uint8).numpy().data)
        yield piece


def identity(hashes: Mapping[str, str]) -> str:
    """SHA-256 over the names and hashes of tensors: the same for any sharding."""
    return hashlib.sha256("".join(f"{hashes[name]} {name}\n" for name in sorted(hashes)).encode()).hexdigest()


def files_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sizes and times of the files: enough to see that a resumed run has other inputs than the one that was stopped."""
    files = sorted({entry.file for entry in checkpoint.entries.values()})
    return {"files": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}}


class Origin(NamedTuple):
    """How a folder of scores was made; None where it does not say."""

    base: dict[str, str] | None  # SHA-256 of the base checkpoint's tensors
    criterion: str | None


def origin_of_scores(scores: str | os.PathLike[str]) -> Origin:
    """What a folder of scores says of itself.

    Raises:
        CheckpointError: it says so in no known form.
    """
    path = Path(scores) / SCORES
    if not path.is_file():
        return Origin(None, None)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        criterion = found["inputs"]["settings"]["criterion"]
        return Origin(checked_hashes(found["base"]["tensors"]), checked_word(criterion))
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} must be JSON of cwfast score; {type(error).__name__}: {error}") from error


def checked_hashes(found: Any) -> dict[str, str]:
    """``{name: SHA-256}``, as it was read from a file.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(found, dict) or not all(_is_hash(value) for value in found.values()):
        raise ValueError(f"hashes must be an object of 64 hexadecimal digits by name; got {str(found)[:80]}")
    return found


def checked_word(found: Any) -> str:
    """A name such as a criterion's or a hub id, as it was read from a file: safe in a table or a header.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(found, str) or not re.fullmatch(r"\w[\w.-]{0,99}(/\w[\w.-]{0,99})?", found, re.ASCII):
        raise ValueError(f"a name must be letters, digits and _ . -, and one / at most; got {str(found)[:80]!r}")
    return found


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")
