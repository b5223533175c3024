"""A folder that appears whole or not at all: made beside its place, resumable, used by one run at a time."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cwfast.checkpoint.files import atomic_write, exclusive, fsync
from cwfast.errors import CheckpointError

SPARE = 64 << 20  # bytes that must be free beside what is written


class Making:
    """The folder while it is made.

    Attributes:
        path: of the folder, beside the one that it becomes.
        state: what its manifest says; of a run that was stopped, what that had saved.
    """

    def __init__(self, path: Path, manifest: str, state: dict[str, Any]) -> None:
        self.path, self.state = path, state
        self._manifest = path / manifest

    def save(self) -> None:
        """Write the manifest: what it names as done is kept, whatever happens from now on."""
        with atomic_write(self._manifest) as temporary:
            temporary.write_text(json.dumps(self.state, indent=1) + "\n", encoding="utf-8")


@contextmanager
def making(
    out: Path,
    outside: Mapping[str, Path],
    inputs: Mapping[str, Any],
    *,
    kind: str,
    manifest: str,
    resume: bool,
    **start: Any,
) -> Iterator[Making]:
    """A folder beside ``out``, whose name begins with a dot; at the end it is renamed to ``out``.

    Args:
        out: must not exist (an empty folder may), and lie in a folder that does.
        outside: what ``out`` may not lie in, by name.
        inputs: identities of the inputs, by name: a run goes on only with the same ones.
        kind: "format" of the manifest.
        manifest: name of that file.
        resume: go on where an earlier run was stopped.
        start: further entries of the state of a new run.

    Raises:
        FileNotFoundError: there is no folder to make it in.
        FileExistsError: ``out`` is there, or an unfinished run of it is and ``resume`` is False.
        ValueError: ``out`` lies in an input.
        CheckpointError: the unfinished run had other inputs, or its manifest is broken.
        RuntimeError: another process makes the same folder.
    """
    _check_place(out, outside)
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists() and not resume:
        raise FileExistsError(
            f"{partial} must not exist: a run into {out} was stopped; resume it, or remove that folder"
        )
    partial.mkdir(exist_ok=True)
    with exclusive(partial):
        for broken in partial.glob(".*.tmp"):  # of a run that was killed
            broken.unlink()
        path = partial / manifest
        if path.exists():
            made = Making(partial, manifest, _state(path, kind, inputs, start))
        else:
            made = Making(partial, manifest, {"format": kind, "inputs": dict(inputs), **start})
            made.save()
        yield made
        made.save()
        (partial / "lock").unlink()
        with suppress(OSError):
            out.rmdir()  # where it is there and empty
        partial.rename(out)
        fsync(out.parent)


def check_space(partial: Path, need: int) -> None:
    """The disk has room.

    Raises:
        OSError: it has not.
    """
    free = shutil.disk_usage(partial).free
    if need + SPARE > free:
        raise OSError(f"the disk of {partial.parent} must have {need + SPARE:,} bytes free; it has {free:,}")


def _check_place(out: Path, outside: Mapping[str, Path]) -> None:
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out} must be made in a folder that exists; there is no {out.parent}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} must not exist, or be an empty folder: nothing is written over")
    there = out.resolve()
    for what, path in outside.items():
        given = path.resolve()
        if there == given or given in there.parents:
            raise ValueError(f"the folder that is written must lie outside {what}; {out} is in {path}")


def _state(path: Path, kind: str, inputs: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
    """Of the run that was stopped."""
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = state["inputs"]
        if state["format"] != kind or any(type(state[name]) is not type(value) for name, value in start.items()):
            raise ValueError(state["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} must be the manifest of a stopped run; remove {path.parent}") from error
    for what, identity in inputs.items():
        if known.get(what) != identity:
            raise CheckpointError(
                f"{path.parent} must be of a run with the same {what}; it was begun with another: remove that folder"
            )
    return state
