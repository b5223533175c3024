"""Copies of a weight under a second name, of which a rewind by names would change one."""

from collections.abc import Iterator

import torch

from cwfast._mask_files import MaskFile
from cwfast.checkpoint import Checkpoint
from cwfast.errors import CheckpointError

_FIRST = 64  # entries that are compared before all are


def check_twins(source: Checkpoint, masks: MaskFile) -> None:
    """No matrix with selected entries is in the model once more, bit for bit, outside the masks.

    Some files hold a tied embedding by both its names: rewinding one would leave the trained copy in the folder.

    Raises:
        CheckpointError: there is one.
    """
    counts: dict[str, int] | None = None
    for name, other in _alike(source, masks):
        pieces = zip(source.pieces(name), source.pieces(other), strict=True)
        if all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pieces):
            counts = masks.counts() if counts is None else counts
            if counts.get(name):
                raise CheckpointError(
                    f"{source.path} must hold each weight once; {name!r} and {other!r} are the same, and {masks.path} "
                    "selects in the first alone: load the model with transformers and save it again (save_pretrained)"
                )


def _alike(source: Checkpoint, masks: MaskFile) -> Iterator[tuple[str, str]]:
    """Pairs of a matrix in the masks and one that is not, with the same dtype, shape and first entries."""
    shapes = {entry.shape for name, entry in source.entries.items() if name in masks.shapes and len(entry.shape) == 2}
    others = [name for name, entry in source.entries.items() if name not in masks.shapes and entry.shape in shapes]
    if not others:
        return
    found: dict[tuple[object, ...], list[str]] = {}
    for name in others:
        found.setdefault(_key(source, name), []).append(name)
    for name in masks.shapes:
        if len(masks.shapes[name]) == 2:
            for other in found.get(_key(source, name), ()):
                yield name, other


def _key(source: Checkpoint, name: str) -> tuple[object, ...]:
    entry = source.entries[name]
    end = min(_FIRST, entry.shape[0] * entry.shape[1])
    first = b"".join(piece.view(torch.uint8).numpy().tobytes() for piece in source.pieces(name, end=end))
    return entry.dtype, entry.shape, first
