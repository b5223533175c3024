"""``cwfast defend-llm``: a fine-tuned language model scored, rewound, fine-tuned on, saved, and attacked before and
after."""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cwfast import report
from cwfast.checkpoint.files import atomic_folder, atomic_write, exclusive, sha256
from cwfast.commands import audit_llm
from cwfast.errors import CheckpointError
from cwfast.llm import controls, defending, measuring
from cwfast.llm.loading import local
from cwfast.llm.other_files import without_code
from cwfast.llm.scoring import score
from cwfast.llm.storage import TokenRecords
from cwfast.llm.texts import all_as_read, read_texts
from cwfast.llm.windows import adds_bos
from cwfast.masks import MaskSet, rewind_
from cwfast.ops import gather
from cwfast.report import llm_defense, llm_reading, provenance
from cwfast.report.table import percent

SCHEMA = "cwfast-defend-llm/1"
SIDES = ("members", "reference", "nonmembers", "heldout")
PACKAGES = ("cwfast", "torch", "transformers", "tokenizers", "numpy", "safetensors")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The report and what is printed; ``--out`` gets the model, the mask and the report.

    Raises:
        ImportError: transformers, matplotlib or jinja2 is missing.
        FileExistsError: ``--out`` holds a model already.
        RuntimeError: another process writes there.
        ValueError, TypeError, UnsupportedLayer, CheckpointError, OSError: as the messages say.
    """
    _check_usage(options)
    _check_place(options)
    out = report.prepare(options.out)
    with exclusive(out):
        return _run(options, out)


def _run(options: argparse.Namespace, out: Path) -> tuple[dict[str, Any], str]:
    """``run``, its arguments checked, alone in the folder ``out``."""
    if (out / "model").exists():
        raise FileExistsError(f"{out / 'model'} must not exist: nothing is written over")
    given = [name for name in SIDES if getattr(options, name) is not None]
    texts = {name: read_texts(getattr(options, name)) for name in given}
    check_apart(texts)
    model, tokenizer = local(Path(options.model)), audit_llm._tokenizer(options.model)
    dtype = next(model.parameters()).dtype
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    read = options.max_tokens if window is None else min(window - adds_bos(tokenizer), options.max_tokens)
    shown = {name: all_as_read(tokenizer, side, read) for name, side in texts.items()}
    notes = check_apart(shown, f", as far as they are read (--max-tokens): {read} tokens")
    rows = {name: measuring.tokenized(tokenizer, side, read) for name, side in texts.items()}
    known = [set(read_texts(Path(folder) / "members.jsonl")) for folder in options.shadow]
    audited = [*texts["members"], *texts["nonmembers"]]
    judged = (rows["members"], rows["nonmembers"], rows.get("heldout", rows["nonmembers"]))
    work = _work(out)

    def shadow(i: int) -> TokenRecords:
        return measuring.read(audit_llm._model(options.shadow[i]), *judged, out=work / f"shadow-{i}")

    shadows = [(partial(shadow, i), np.array([text in side for text in audited])) for i, side in enumerate(known)]
    base = local(Path(options.base))
    before, start = (
        measuring.read(one, *judged, out=work / name) for one, name in ((base, "base"), (model, "undefended"))
    )
    meter = measuring.Meter(
        before, *judged, shadows=shadows, fprs=options.fpr, bootstrap=options.bootstrap, seed=options.seed
    )
    found = [_row("base", "base", "Before fine-tuning", meter.base())]
    found.append(_row("undefended", "undefended", "Fine-tuned, undefended", meter(start)))
    model.to(torch.float32)  # small updates are lost in bfloat16
    scoring = {name: getattr(options, name) for name in ("criterion", "rate", "points", "batch")}
    tuning = {name: getattr(options, name) for name in ("steps", "lr", "batch", "seed")}
    models = [one.manifest["model"] for one in (before, start)]
    masks = _masks(work, model, base, [rows[name] for name in ("members", "reference")], models, scoring)
    rewind_(model, masks, base)
    alpha, losses = defending.hold_(
        model, rows["members"], alpha=options.alpha, masks=masks, **tuning, progress=sys.stderr.isatty()
    )
    model.to(dtype)
    label = f"CWRF {options.criterion} {percent(options.rate)}, {options.steps} steps"
    found.append(_row("defended", "cwrf", label, meter(model), criterion=options.criterion, rate=options.rate,
                      steps=options.steps, alpha=alpha, rewound=masks.total))  # fmt: skip
    reading = llm_reading.before_and_after(found)
    document = {
        "schema": SCHEMA,
        "title": "A language model, defended",
        "command": options.command_line,
        "seed": options.seed,
        "versions": provenance.versions(PACKAGES),
        "device": str(next(model.parameters()).device),
        "machine": provenance.machine(),
        "backends": provenance.backends("saliency", "select", "rewind", "lm_token_stats"),
        "models": {"model": options.model, "base": options.base, "shadows": options.shadow},
        "inputs": {name: audit_llm._named(getattr(options, name)) for name in given},
        "texts": {name: len(side) for name, side in texts.items()},
        "settings": {**scoring, **tuning, "alpha": options.alpha, "max_tokens": read},
        "rewound": {"weights": masks.total, "of": masks.numel},
        "losses": losses,
        "rows": [llm_defense.without_draws(row) for row in found],
        "reading": reading,
        "notes": notes,
    }
    with atomic_folder(out / "model") as made:  # which appears last: a run that was stopped before can go on
        document["files"] = _save(made, model, tokenizer, masks, base)
        masks.save(out / "mask.safetensors")
        document["files"]["mask.safetensors"] = sha256(out / "mask.safetensors")
        llm_defense.write(document, out)
        shutil.rmtree(work)
    return document, "\n".join([llm_defense.text(document), "", f"Model: {(out / 'model').resolve()}",
                                f"Report: {(out / 'report.html').resolve()}"])  # fmt: skip


def check_apart(texts: Mapping[str, Sequence[str]], how: str = "") -> list[str]:
    """No text is in two of the sets: what shaped the defense must not judge it. Near-duplicates are told.

    Args:
        texts: the sets by name.
        how: how much of each text that is, for the error.

    Raises:
        ValueError: a set is too small, or shares texts with another (up to white space).
    """
    for name, least in (("members", 5), ("reference", 1), ("nonmembers", 5), ("heldout", 1)):
        if name in texts and len(texts[name]) < least:
            raise ValueError(f"{name} must hold at least {least} texts; got {len(texts[name])}")
    names, notes = list(texts), []
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            shared = controls.duplicates(texts[one], texts[other])
            if shared["exact"]:
                raise ValueError(f"{one} and {other} must share no text; got {shared['exact']} in both{how}")
            if shared["members"] or shared["nonmembers"]:
                notes.append(
                    f"{shared['members']} texts of {one} and {shared['nonmembers']} of {other} share runs of "
                    f"{shared['n']} words with the other set (at least {100 * shared['share']:g}% of their own)."
                )
    return notes


def _check_usage(options: argparse.Namespace) -> None:
    for name, least in (("steps", 0), ("batch", 1), ("points", 1), ("bootstrap", 1), ("max_tokens", 2)):
        if getattr(options, name) < least:
            options.usage(f"--{name.replace('_', '-')} must be at least {least}; got {getattr(options, name)}")
    for fpr in options.fpr:
        if not 0 <= fpr <= 1:
            options.usage(f"--fpr must lie in [0, 1]; got {fpr:g}")
    if not 0 < options.rate <= 1:
        options.usage(f"--rate must lie above 0, and at most 1; got {options.rate:g}")
    if options.alpha != "auto":
        try:
            options.alpha = float(options.alpha)
        except ValueError:
            options.usage(f"--alpha must be auto or a number of nats; got {options.alpha!r}")
        if not 0 <= options.alpha < float("inf"):
            options.usage(f"--alpha must be at least 0 and finite; got {options.alpha:g}")
    else:
        options.alpha = None


def _check_place(options: argparse.Namespace) -> None:
    """Before anything takes time: both models are folders, and no written file would lie in them or over another."""
    out = options.out
    for what in ("model", "base"):
        folder = Path(getattr(options, what))
        if not folder.is_dir():
            raise FileNotFoundError(f"{what.upper()} must be a folder of transformers; there is none at {folder}")
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{what.upper()} must be a whole model; {folder} holds an adapter: merge it first")
        if folder.resolve() in (out.resolve(), *out.resolve().parents):
            raise ValueError(f"--out must lie outside {what.upper()}; {out} is in {folder}")


def _work(out: Path) -> Path:
    """The folder of what a run that was stopped goes on with; token ids are in it, so it does not stay.

    Raises:
        CheckpointError: the stopped run had other versions, or what lies there is no run's.
    """
    work = out / ".cwfast-defend-llm"
    plan = json.dumps({"schema": SCHEMA, "versions": provenance.versions(PACKAGES)})
    mark = work / "run.json"
    if not work.exists():
        work.mkdir()
        with atomic_write(mark) as temporary:
            temporary.write_text(plan, encoding="utf-8")
    if not mark.is_file() or mark.read_text(encoding="utf-8") != plan:
        raise CheckpointError(f"{work} must be of a stopped run by the same versions; it is not: remove it")
    return work


def _masks(
    work: Path, model: Any, base: Any, sides: Sequence[Sequence[Sequence[int]]], models: Any, settings: Any
) -> MaskSet:
    """The weights to rewind: scored now, or by a run that was stopped, of the same models, texts and settings."""
    plan = json.dumps([provenance.versions(PACKAGES), models, settings, sides], sort_keys=True)
    file = work / f"mask-{hashlib.sha256(plan.encode()).hexdigest()[:16]}.safetensors"
    if file.exists():
        return MaskSet.load(file)
    members, reference = ([torch.tensor(row) for row in side] for side in sides)
    scores = score(
        model, base, members, reference, criterion=settings["criterion"], points=settings["points"],
        batch_size=settings["batch"], autocast=torch.bfloat16, progress=sys.stderr.isatty(),
    )  # fmt: skip
    masks = defending.masks_of(scores, settings["rate"])
    masks.save(file)
    return masks


def _row(name: str, group: str, label: str, measured: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "id": name,
        "group": group,
        "label": label,
        "curve": group,
        **llm_defense.NO_SETTINGS,
        "start": None if group == "base" else "this model",
        **more,
        **measured,
    }


def _save(made: Path, model: Any, tokenizer: Any, masks: MaskSet, base: Any) -> dict[str, str]:
    """The model as a complete folder; hashes of its files."""
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    for file in made.glob("*.json"):  # MODEL's auto_map names code that trust_remote_code would run
        file.write_bytes(without_code(file.read_bytes()))
    _check_saved(model, base, masks, made)
    return {f"model/{file.name}": sha256(file) for file in sorted(made.iterdir())}


def _check_saved(model: Any, base: Any, masks: MaskSet, folder: Path) -> None:
    """What was written loads as what was measured, and the weights that were rewound are the base's, bit for bit.

    Raises:
        CheckpointError: not so.
    """
    loaded = local(folder)
    ours, before = dict(model.named_parameters()), dict(base.named_parameters())
    for name, parameter in loaded.named_parameters():
        if not torch.equal(parameter, ours[name]):
            raise CheckpointError(f"{folder} must load as the model that was measured; {name!r} differs")
        if masks.counts.get(name):
            picks = masks.picks(name)
            rewound, wanted = (gather([one.detach()], [picks])[0] for one in (parameter, before[name].to(parameter)))
            if not torch.equal(rewound, wanted):
                raise CheckpointError(f"{folder} must hold the base's values where the mask says; {name!r} does not")
