"""Shadow models: the base fine-tuned on random halves of the audited texts, what lira, rmia and base compare with.

``python -m cwfast.llm.shadows BASE --texts members.jsonl nonmembers.jsonl --out shadows`` writes folders that
``cwfast audit-llm --shadow shadows/shadow-*`` takes.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cwfast.checkpoint.files import atomic_folder, sha256
from cwfast.errors import CheckpointError
from cwfast.llm._segments import Bools
from cwfast.llm.loading import whole
from cwfast.llm.measuring import tokenized
from cwfast.llm.texts import read_texts
from cwfast.llm.training import fine_tune

FACTS = "shadow.json"
COUNT, RANK, EPOCHS, LR = 8, 16, 1, 1e-3


def halves(texts: int, count: int, seed: int = 0) -> Bools:
    """bool [count, texts]: shadow 2 j trains on a random half of the texts, shadow 2 j + 1 on the others.

    With an even count each text is in exactly half of the models.

    Raises:
        ValueError: fewer than two texts or one model.
    """
    if texts < 2 or count < 1:
        raise ValueError(f"there must be at least 2 texts and 1 shadow; got {texts} and {count}")
    rng = np.random.default_rng(seed)
    chosen = np.zeros((count, texts), bool)
    for i in range(0, count, 2):
        chosen[i, rng.permutation(texts)[: texts // 2]] = True
        chosen[i + 1 : i + 2] = ~chosen[i]
    return chosen


def train(
    base: str | Path,
    texts: Sequence[str],
    out: str | Path,
    *,
    count: int = COUNT,
    rank: int | None = RANK,
    epochs: int = EPOCHS,
    lr: float = LR,
    batch: int = 8,
    max_tokens: int | None = 64,
    seed: int = 0,
    progress: Callable[[int, Sequence[float]], object] = lambda i, losses: None,
) -> list[Path]:
    """Fine-tune ``count`` shadows of a base model; a run that was stopped goes on with the first that is not there.

    An attack is strongest where shadows are trained as the target was: give its texts, epochs and learning rate. LoRA
    adapters take a few megabytes each and share the base; they are a cheaper stand-in for a target whose every weight
    was trained, and their scores are on another scale then.

    Args:
        base: folder of transformers with the model before fine-tuning.
        texts: the audited ones, members and non-members.
        out: a folder: ``shadow-0000/`` ... with the model, ``members.jsonl`` (its texts) and ``shadow.json``.
        count: of models; an even one has each text in half of them (``halves``).
        rank: of the LoRA adapters on all linear layers but the head (alpha is twice that; needs peft); None: train
            every weight, and save whole models.
        epochs: passes over a half.
        lr: learning rate of AdamW.
        batch: texts a step.
        max_tokens: of a text, its first ones; None: all.
        seed: of halves, order and adapters.
        progress: called with each shadow's number and its losses once it is saved.

    Returns:
        The folders.

    Raises:
        ImportError: transformers, or peft for adapters, is missing.
        CheckpointError: a folder holds a shadow of other texts, settings or another base.
        ValueError, OSError: as the messages say.
    """
    chosen = halves(len(texts), count, seed)
    settings = {"rank": rank, "epochs": epochs, "lr": lr, "batch": batch, "max_tokens": max_tokens, "seed": seed}
    weights = {file.name: sha256(file) for file in sorted(Path(base).glob("*.safetensors"))}
    if not weights:
        raise FileNotFoundError(f"base must be a folder with *.safetensors; there is none in {base}")
    folders = []
    for i, mine in enumerate(chosen):
        own = [text for text, member in zip(texts, mine, strict=True) if member]
        known = hashlib.sha256(json.dumps(own).encode()).hexdigest()
        plan = {"shadow": i, "base": weights, "texts_sha256": known, **settings}
        folder = Path(out) / f"shadow-{i:04d}"
        folders.append(folder)
        if not _kept(folder, plan):
            with atomic_folder(folder) as partial:
                losses = _one(Path(base), own, partial, settings, seed + i)
                lines = "".join(json.dumps({"text": text}) + "\n" for text in own)
                (partial / "members.jsonl").write_text(lines, encoding="utf-8")
                content = json.dumps({**plan, "losses": losses}, indent=1) + "\n"
                (partial / FACTS).write_text(content, encoding="utf-8")
            progress(i, losses)
    return folders


def _one(base: Path, texts: Sequence[str], out: Path, settings: Mapping[str, Any], seed: int) -> list[float]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = whole(AutoModelForCausalLM, base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings["rank"] is not None:
            model = _adapted(model, base, settings["rank"])
        how = {name: settings[name] for name in ("epochs", "lr", "batch")}
        losses = fine_tune(model, tokenized(tokenizer, texts, settings["max_tokens"]), seed=seed, **how)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return losses


def _adapted(model: Any, base: Path, rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA shadows need peft; pip install peft brings it, rank=None does without") from error
    transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())  # GPT-2 keeps weights [in, out]
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=transposed
    )
    made = get_peft_model(model, config)
    config.base_model_name_or_path = str(base.resolve())  # found again from any working directory
    return made


def _kept(folder: Path, plan: Mapping[str, Any]) -> bool:
    """Whether the folder is there and is this shadow."""
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        same = all(found[name] == value for name, value in plan.items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder} must be a shadow's folder, with {FACTS}; {error}") from error
    if not same:
        raise CheckpointError(f"{folder} must be of this run (base, texts and settings); it is of another")
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m cwfast.llm.shadows BASE --texts FILE ... --out FOLDER``."""
    parser = argparse.ArgumentParser(prog="python -m cwfast.llm.shadows", description=str(__doc__).splitlines()[0])
    parser.add_argument("base", type=Path, metavar="BASE", help="folder of transformers: the model before fine-tuning")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, metavar="FILE", help="members and non-members")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, and to go on with")
    parser.add_argument("--count", type=int, default=COUNT, help="of shadows (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=RANK, help="of the adapters (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="train every weight instead, and save whole models")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over a half (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=LR, help="learning rate (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of each text (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of halves, order and adapters (default: %(default)s)")
    options = parser.parse_args(argv)
    train(
        options.base,
        [text for file in options.texts for text in read_texts(file)],
        options.out,
        count=options.count,
        rank=None if options.full else options.rank,
        epochs=options.epochs,
        lr=options.lr,
        max_tokens=options.max_tokens,
        seed=options.seed,
        progress=lambda i, losses: print(f"shadow {i}: loss {losses[0]:.3f} -> {losses[-1]:.3f}", flush=True),
    )


if __name__ == "__main__":
    main()
