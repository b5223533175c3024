"""Files: safetensors folders read as streams, results written whole or not at all. Knows no model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cwfast.checkpoint.reader import Checkpoint

__all__ = ["Checkpoint"]


def __getattr__(name: str) -> Any:  # report and the command line write files without loading torch
    if name == "Checkpoint":
        from cwfast.checkpoint.reader import Checkpoint

        return Checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
