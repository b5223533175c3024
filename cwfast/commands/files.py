"""``cwfast select`` and ``cwfast rewind``: from scores to a mask file, from a model and a mask to a rewound model."""

import argparse
import sys
import warnings
from typing import Any

from tqdm import tqdm

from cwfast._selecting import select
from cwfast.checkpoint import Checkpoint
from cwfast.checkpoint.files import sha256
from cwfast.checkpoint.identity import identity
from cwfast.llm.folders import rewind_folder
from cwfast.report import provenance

PACKAGES = ("cwfast", "torch", "safetensors")


def run_select(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The mask, written to ``--out``, and its table.

    Raises:
        ValueError, CheckpointError, OSError: as ``cwfast.select`` and ``MaskSet.save`` say.
    """
    scope: Any = options.scope or "global"
    if options.rates:
        if options.rate is not None or options.k is not None:
            raise ValueError("one of --rate, --k and --rates must be given; got several")
        if options.scope is not None:
            raise ValueError("one of --scope and --rates must be given; got both")
        pairs = [_pair(text) for text in options.rates]
        scope = dict(pairs)
        if len(scope) < len(pairs):
            raise ValueError(f"--rates must name each pattern once; got {' '.join(options.rates)}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        masks = select(
            options.scores, rate=options.rate, k=options.k, scope=scope, exclude=options.exclude, nan=options.nan
        )
    masks.save(options.out)
    notes = [str(item.message) for item in caught]
    document = {
        "schema": "cwfast-select/1",
        "command": options.command_line,
        "versions": provenance.versions(PACKAGES),
        "machine": provenance.machine(),
        "backends": provenance.backends("select"),
        "scores": str(options.scores),
        "mask": {"path": str(options.out), "sha256": sha256(options.out)},
        "base_sha256": None if masks.base is None else identity(masks.base),
        "selected": masks.total,
        "weights": masks.numel,
        "zero_score_selected": masks.zero_score_selected,
        "counts": masks.counts,
        "warnings": notes,
    }
    lines = [masks.summary("kind"), "", *(f"Warning: {note}" for note in notes), f"Mask: {options.out.resolve()}"]
    return document, "\n".join(lines)


def run_rewind(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The folder ``--out``, and what is in it.

    Raises:
        ValueError, CheckpointError, OSError, RuntimeError: as ``rewind_folder`` says.
    """
    source = Checkpoint(options.model)
    total = sum(file.stat().st_size for file in {entry.file for entry in source.entries.values()})
    with tqdm(total=total, desc="rewind", unit="B", unit_scale=True, file=sys.stderr, disable=None) as bar:
        done = rewind_folder(
            options.model,
            options.base,
            options.mask,
            options.out,
            resume=options.resume,
            copy_code=options.copy_code,
            progress=bar.update,
        )
    document = {
        "schema": "cwfast-rewind/1",
        "command": options.command_line,
        "versions": provenance.versions(PACKAGES),
        "machine": provenance.machine(),
        "backends": provenance.backends("rewind"),
        "out": str(options.out),
        **done,
    }
    lines = [f"{done['rewound']:,} weights rewound in {len(done['files'])} files of {total:,} bytes"]
    if done["left_out"]:
        lines.append(f"Not copied from {options.model}: {', '.join(done['left_out'])}")
    return document, "\n".join([*lines, f"Model: {options.out.resolve()}"])


def _pair(text: str) -> tuple[str, float]:
    pattern, _, rate = text.rpartition("=")
    try:
        return pattern, float(rate)
    except ValueError:
        raise ValueError(f"--rates must be PATTERN=RATE; got {text!r}") from None
