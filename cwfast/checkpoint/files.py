"""Atomic writes: a reader sees the old or the whole new file or folder, also after kill -9 or a full disk; locks."""

import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is fsynced and renamed to ``path``, else removed.

    Raises:
        OSError: the folder does not exist or cannot be written; nothing is left behind.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files; the result is an ordinary one
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)  # the rename itself


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; on success its files are fsynced and it is renamed to ``path``.

    What a killed run has left in it is removed by the next one; after an error nothing is left. One writer at a time.

    Raises:
        OSError: ``path`` holds something already, or cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in sorted(partial.rglob("*")):
            fsync(file)
        fsync(partial)
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync(path.parent)


def sha256(path: str | os.PathLike[str]) -> str:
    """Of a file's bytes, read as a stream."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: the kernel's, so that it is free again when this process dies in whatever way.

    Raises:
        RuntimeError: another process holds it; the message says which.
    """
    with open(folder / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "a run that begins"
            raise RuntimeError(f"{folder} must be used by one run at a time; it is held by {holder}") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def fsync(path: Path) -> None:
    """Have the system write out a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
