"""Models as transformers loads them, or not at all: what a folder lacks is never filled in."""

import os
from pathlib import Path
from typing import Any

import torch

from cwfast.errors import CheckpointError


def whole(kind: Any, source: str | os.PathLike[str], **options: Any) -> Any:
    """``kind.from_pretrained(source)`` where every weight comes from there; code that lies there is not run.

    transformers draws what is not there at random, and only warns. A tied weight may have any of its names.

    Args:
        kind: class of transformers.
        source: folder, or id on a hub.
        options: of ``from_pretrained``.

    Raises:
        CheckpointError: a weight is not there, or has another shape than the model's.
        OSError, ValueError: as ``from_pretrained`` does.
    """
    checks = {"trust_remote_code": False, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, told = kind.from_pretrained(source, **{**options, **checks})
    wrong = sorted(told["missing_keys"])
    if wrong:
        raise CheckpointError(
            f"{source} must hold every weight of {type(model).__name__}; it lacks {wrong[0]!r} (missing in all: "
            f"{len(wrong)})"
        )
    for name, there, here in sorted(told["mismatched_keys"]):
        raise CheckpointError(
            f"{source} must hold {name!r} of shape {tuple(here)}, as {type(model).__name__} does; it has {tuple(there)}"
        )
    return model


def local(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The causal language model of a local folder of safetensors files, in evaluation mode; nothing else is read.

    Raises:
        ValueError: a file, or an adapter's folder.
        CheckpointError: a weight is missing.
        OSError: no safetensors files.
    """
    from transformers import AutoModelForCausalLM

    if not folder.is_dir():
        raise ValueError(f"model must be a folder of transformers; {folder} is a file")
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"model must be a folder of whole weights; {folder} holds a PEFT adapter: merge it into its base "
            "(merge_and_unload), or score its own weights in memory (cwfast.llm.score)"
        )
    options: dict[str, Any] = {"dtype": dtype or "auto", "use_safetensors": True, "local_files_only": True}
    return whole(AutoModelForCausalLM, folder, **options).eval()
