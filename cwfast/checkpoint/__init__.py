"""Files: safetensors folders read as streams, results written whole or not at all. Knows no model."""

from cwfast.checkpoint.reader import Checkpoint

__all__ = ["Checkpoint"]
