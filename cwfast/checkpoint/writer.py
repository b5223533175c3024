"""A safetensors file written again with some of its values changed: as a stream, hashed on the way, or not at all."""

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cwfast.checkpoint.files import atomic_write
from cwfast.checkpoint.identity import hashed
from cwfast.checkpoint.reader import Checkpoint

Change = Callable[[str], Iterator[Tensor]]
_AHEAD = 4  # pieces that wait to be written: reading goes on meanwhile, memory stays bounded
HELD = _AHEAD + 2  # pieces in use at a time: those, one that is written and the next


def rewrite(
    source: Checkpoint, file: Path, target: Path, pieces: Change, check: Callable[[str, str], None] | None = None
) -> dict[str, str]:
    """Write ``target``: the header of ``file``, byte for byte, and for each of its tensors what ``pieces`` gives.

    Args:
        source: the checkpoint that ``file`` is of.
        file: one of its files.
        target: written to a temporary name, fsynced and renamed; nothing is left of it where something fails.
        pieces: tensor name -> its flat pieces from the first entry to the last, in the dtype that it has in ``file``;
            each must stay as it is until ``HELD`` - 1 others have followed.
        check: called with a tensor's name and SHA-256 once it is written; what it raises is raised.

    Returns:
        Each tensor's SHA-256, of the bytes that were handed to the system.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
        ValueError: the pieces of a tensor are not as long as the tensor.
    """
    entries = sorted((entry.begin, name) for name, entry in source.entries.items() if entry.file == file)
    data = entries[0][0] if entries else file.stat().st_size
    with open(file, "rb") as given:
        header = given.read(data)
    hashes = {}
    with atomic_write(target) as temporary, open(temporary, "wb", buffering=0) as out:
        _write(out.fileno(), header)
        for begin, name in entries:
            entry = source.entries[name]
            found = hashlib.sha256()
            with _writer(out.fileno()) as put:
                for piece in hashed(pieces(name), found):
                    if piece.dtype != entry.dtype:
                        raise ValueError(f"{name!r} must be written in {entry.dtype}; got {piece.dtype}")
                    put(piece)
            numel = torch.Size(entry.shape).numel()
            if out.tell() - begin != numel * entry.dtype.itemsize:
                raise ValueError(f"{name!r} must be written with {numel} entries; got {out.tell() - begin} bytes")
            hashes[name] = found.hexdigest()
            if check is not None:
                check(name, hashes[name])
    return hashes


@contextmanager
def _writer(handle: int) -> Iterator[Callable[[Tensor], None]]:
    """A function that hands pieces to a thread, which writes them without the interpreter's lock."""
    waiting: queue.Queue[Tensor | None] = queue.Queue(_AHEAD)
    failed: list[BaseException] = []

    def work() -> None:
        while (piece := waiting.get()) is not None:
            if failed:
                continue  # whoever puts must not wait for ever
            try:
                at = os.lseek(handle, 0, os.SEEK_CUR)
                _write(handle, piece.view(torch.uint8).numpy().data)
                if hasattr(os, "posix_fadvise"):  # the disk begins now, and not with fsync when all has been hashed
                    os.posix_fadvise(handle, at, piece.nbytes, os.POSIX_FADV_DONTNEED)
            except BaseException as error:
                failed.append(error)

    def put(piece: Tensor) -> None:
        if failed:
            raise failed[0]
        waiting.put(piece)

    thread = threading.Thread(target=work, name="cwfast-writer")
    thread.start()
    try:
        yield put
    finally:
        waiting.put(None)
        thread.join()
    if failed:
        raise failed[0]


def _write(handle: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(handle, view) :]
