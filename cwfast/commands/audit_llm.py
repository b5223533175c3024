"""``cwfast audit-llm``: attacks on a causal language model; a table, JSON and, with ``--out``, one page."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from cwfast import report
from cwfast.checkpoint.files import atomic_write, sha256
from cwfast.llm import auditing
from cwfast.llm.attacks import ATTACKS
from cwfast.llm.loading import whole
from cwfast.llm.texts import read_texts
from cwfast.report import llm_page, provenance

FILES = ("members", "nonmembers", "shots", "member_shots", "corpus")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The report and what is printed; with ``--out``, report.json, .html and .md are written.

    Raises:
        ImportError: transformers is missing, or jinja2 with ``--out``.
        ValueError, TypeError, UnsupportedLayer, CheckpointError, OSError: as the messages say.
    """
    _check_usage(options)
    if options.out is not None:
        llm_page.environment()  # jinja2 is missed now, not at the end
        report.folder(options.out)
    sides = {name: read_texts(getattr(options, name)) for name in FILES if getattr(options, name) is not None}
    _check_sides(sides)
    model, tokenizer = _model(options.model), _tokenizer(options.model)
    reference = _reference(options.reference, model)
    shadows = [(partial(_model, folder), read_texts(Path(folder) / "members.jsonl")) for folder in options.shadow]
    inputs = auditing.Inputs(
        model,
        tokenizer,
        sides["members"],
        sides["nonmembers"],
        reference=reference,
        shots=sides.get("shots", ()),
        member_shots=sides.get("member_shots", ()),
        corpus=sides.get("corpus", ()),
        shadows=shadows,
        max_tokens=options.max_tokens,
        seed=options.seed,
        copies=options.copies,
        how={"batch_tokens": options.batch_tokens, "autocast": _autocast(options.autocast)},
        out=options.out,
        progress=lambda stage: print(f"cwfast: {stage}", file=sys.stderr),
    )
    left_out = {name: lack for name in ATTACKS if (lack := inputs.lacks(name)) is not None}
    attacks = [name for name in ATTACKS if name not in left_out] if options.attacks == ["all"] else options.attacks
    for name in attacks:
        if name in left_out:
            raise ValueError(f"the attack {name} needs {left_out[name]}; got none")
    every = options.attacks == ["all"]
    found, _, own = auditing.audit(inputs, attacks, fprs=options.fpr, bootstrap=options.bootstrap, skip=every)
    lacking = {name: f"needs {lack}" for name, lack in left_out.items()} if every else {}
    document = {
        **found,
        "left_out": lacking | found["left_out"],
        "command": options.command_line,
        "versions": provenance.versions(("cwfast", "torch", "transformers", "tokenizers", "peft", "numpy")),
        "device": str(next(model.parameters()).device),
        "machine": provenance.machine(),
        "backends": provenance.backends("lm_token_stats", "lm_token_kl"),
        "inputs": {name: _named(getattr(options, name)) for name in FILES if getattr(options, name) is not None},
        "models": {"model": options.model, "reference": options.reference, "shadows": options.shadow},
    }
    lines = [llm_page.table(document)]
    if options.out is not None:
        shown = llm_page.heat(tokenizer, own, document["exposed"]) if options.show_text else []
        page = llm_page.render(document, shown)
        with atomic_write(options.out / "report.json") as temporary:
            temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        for name, content in (("report.html", page), ("report.md", llm_page.markdown(document))):
            with atomic_write(options.out / name) as temporary:
                temporary.write_text(content, encoding="utf-8")
        lines += ["", f"Report: {(options.out / 'report.html').resolve()}"]
    return document, "\n".join(lines)


def _check_usage(options: argparse.Namespace) -> None:
    """Wrong combinations of arguments end the program, as argparse's own errors do."""
    options.attacks = list(dict.fromkeys(options.attacks))
    unknown = [name for name in options.attacks if name not in ATTACKS]
    if unknown and options.attacks != ["all"]:
        options.usage(f"--attacks must be all, or among {', '.join(ATTACKS)}; got {unknown[0]!r}")
    if options.show_text and options.out is None:
        options.usage("--show-text must come with --out: texts are shown in report.html; got none")
    wrong = [fpr for fpr in options.fpr if not 0 <= fpr <= 1]
    if wrong:
        options.usage(f"--fpr must lie in [0, 1]; got {wrong[0]:g}")
    for name, least in (("bootstrap", 0), ("copies", 1), ("batch_tokens", 1), ("max_tokens", 2)):
        value = getattr(options, name)
        if value is not None and value < least:
            options.usage(f"--{name.replace('_', '-')} must be at least {least}; got {value}")


def _check_sides(sides: dict[str, list[str]]) -> None:
    for name in ("members", "nonmembers"):
        if len(sides[name]) < 5:
            raise ValueError(f"{name} must hold at least 5 texts; got {len(sides[name])}")
    both = set(sides["members"]) & set(sides["nonmembers"])
    if both:
        raise ValueError(f"members and nonmembers must share no text; got {len(both)} in both")
    audited = set(sides["members"]) | set(sides["nonmembers"])
    for name in ("shots", "member_shots", "corpus"):
        seen = len(audited & set(sides.get(name, ())))
        if seen:
            raise ValueError(f"{name} must hold no text that is audited; got {seen}")


def _model(name: str) -> Any:
    """A local folder, else a hub id; a folder with an adapter is a PEFT model."""
    transformers = _transformers()
    if (Path(name) / "adapter_config.json").is_file():
        try:
            from peft import AutoPeftModelForCausalLM
        except ImportError as error:
            raise ImportError("a folder with an adapter needs peft; pip install peft brings it") from error

        class Whole(AutoPeftModelForCausalLM):
            class _target_class:  # what loads the base
                @staticmethod
                def from_pretrained(base: str, **options: Any) -> Any:
                    return whole(transformers.AutoModelForCausalLM, base, **options)

        return Whole.from_pretrained(name).eval()
    return whole(transformers.AutoModelForCausalLM, name, dtype="auto").eval()


def _autocast(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)


def _tokenizer(name: str) -> Any:
    return _transformers().AutoTokenizer.from_pretrained(
        name, trust_remote_code=False, local_files_only=Path(name).is_dir()
    )


def _reference(name: str | None, model: Any) -> Any:
    if name is None:
        return "base" if hasattr(model, "disable_adapter") else None
    return _model(name)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError('audit-llm needs transformers; pip install "cwfast[llm]" brings it') from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _named(path: Path) -> dict[str, Any]:
    """A file, as it was given, and the hash of its bytes."""
    return {"file": str(path), "sha256": sha256(path)}
