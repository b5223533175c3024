"""A study's files: each whole or absent, made once by whoever holds its lock, and known by what it was made of."""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cwfast.checkpoint.files import atomic_write
from cwfast.errors import CheckpointError

FORMAT = "cwfast-study/1"


class Folder:
    """Files under ``root``, of one data set and seed.

    Args:
        root: made if it does not exist.
        made_of: digest of data, plan, recipe, model and versions: files of another are made again.
    """

    def __init__(self, root: Path, made_of: str) -> None:
        self.root, self.made_of = root, made_of
        (root / ".locks").mkdir(parents=True, exist_ok=True)

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]], more: str = "") -> dict[str, Tensor]:
        """What ``make`` returns, kept in ``name.safetensors``; made by one process at a time, and not again."""
        path, about = self.root / f"{name}.safetensors", {"format": FORMAT, "made_of": self.made_of + more}
        found = _read(path, about)
        if found is not None:
            return found
        with self.lock(name):
            found = _read(path, about)
            if found is None:
                found = {key: value.detach().cpu().contiguous() for key, value in make().items()}
                with atomic_write(path) as temporary:
                    save_file(found, temporary, metadata=about)
        return found

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Wait until no other process holds it; the kernel frees it when its holder dies in whatever way."""
        with open(self.root / ".locks" / name, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def document(self, name: str, more: str = "") -> dict[str, Any] | None:
        """A JSON document that ``write`` wrote; None if there is none made of the same.

        Raises:
            CheckpointError: it is broken.
        """
        path = self.root / f"{name}.json"
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} must hold JSON; {error}: remove it to have it made again") from error
        same = isinstance(found, dict) and found.get("made_of") == self.made_of + more
        return found if same else None

    def write(self, name: str, document: Mapping[str, Any], more: str = "") -> None:
        """Write a JSON document, whole or not at all."""
        whole = {"format": FORMAT, "made_of": self.made_of + more, **document}
        with atomic_write(self.root / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n")

    def clear(self) -> None:
        """Remove what processes that were killed left half written."""
        for left in self.root.glob(".*.tmp"):
            left.unlink()


def log(out: Path, **event: object) -> None:
    """One line of ``log.jsonl``: all that differs between two runs of one study."""
    line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **event}) + "\n"
    handle = os.open(out / "log.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def _read(path: Path, about: Mapping[str, str]) -> dict[str, Tensor] | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}) != about:
                return None
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} must be a safetensors file; {error}: remove it to have it made again") from error
