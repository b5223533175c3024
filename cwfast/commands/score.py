"""``cwfast score``: from a fine-tuned language model, its base and texts to a folder of scores."""

import argparse
from pathlib import Path
from typing import Any

from cwfast.checkpoint.files import sha256
from cwfast.llm.texts import read_texts
from cwfast.llm.windows import documents
from cwfast.report import provenance


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The folder ``--out``, and what is in it.

    Raises:
        ImportError: transformers is not installed.
        ValueError, TypeError, UnsupportedLayer, CheckpointError, OSError, RuntimeError: as ``score_folder`` says.
    """
    if options.max_tokens is not None and options.max_tokens < 2:
        options.usage(f"--max-tokens must be at least 2; got {options.max_tokens}")
    if not options.model.is_dir():  # else the tokenizer would be looked for on the hub
        raise FileNotFoundError(f"MODEL must be a folder of transformers; there is none at {options.model}")
    files = {"members": options.members, "reference": options.reference}
    texts = {name: read_texts(path) for name, path in files.items()}
    both = set(texts["members"]) & set(texts["reference"])
    if both:
        raise ValueError(f"members and reference must share no text; got {len(both)} in both")
    tokenizer = _tokenizer(options.model)
    ids = {name: _ids(name, tokenizer, rows, options.max_tokens) for name, rows in texts.items()}
    read = set(map(tuple, ids["members"])) & set(map(tuple, ids["reference"]))
    if read:
        raise ValueError(
            f"members and reference must share no text as far as it is read (--max-tokens); got {len(read)} in both"
        )

    import torch

    from cwfast.llm.scoring import score_folder

    done = score_folder(
        options.model,
        options.base,
        ids["members"],
        ids["reference"],
        options.out,
        criterion=options.criterion,
        lam=options.lam,
        points=options.points,
        batch_size=options.batch_size,
        granularity=options.granularity,
        device=options.device,
        params_per_pass=options.params_per_pass,
        resume=options.resume,
        progress=not options.json,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        autocast=None if options.autocast is None else getattr(torch, options.autocast),
    )
    document = {
        "schema": "cwfast-score/1",
        "command": options.command_line,
        "versions": provenance.versions(("cwfast", "torch", "transformers", "tokenizers", "safetensors")),
        "machine": provenance.machine(),
        "device": options.device,
        "backends": provenance.backends("saliency", "lm_token_stats", "lm_token_kl"),
        "out": str(options.out),
        "files": {name: {"file": str(path), "sha256": sha256(path)} for name, path in files.items()},
        **done,
    }
    lines = [f"{done['weights']:,} weights scored by {options.criterion}, in {len(done['tensors'])} tensors"]
    if done["unscored"]:
        lines.append(f"Not scored, as they are no parameters of the model: {', '.join(done['unscored'])}")
    return document, "\n".join([*lines, f"Scores: {options.out.resolve()}"])


def _tokenizer(folder: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError('score needs transformers; pip install "cwfast[llm]" brings it') from error
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _ids(name: str, tokenizer: Any, texts: list[str], max_tokens: int | None) -> list[list[int]]:
    """Token ids as the tokenizer makes them by itself, with BOS where it adds it."""
    if not texts:
        raise ValueError(f"{name} must hold at least one text; got none")
    try:
        return [document.ids for document in documents(tokenizer, texts, max_tokens=max_tokens)]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
