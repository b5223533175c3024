"""Texts in files of JSON lines, and the part of a text that is read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_texts(path: Path) -> list[str]:
    """A text per line: a JSON object with ``text``, or a JSON string; blank lines are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is neither.
    """
    if not path.is_file():
        raise FileNotFoundError(f"texts must be a file of JSON lines; there is none at {path}")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                one = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path} must hold a JSON object with a text in each line; line {number}: {error}"
                ) from None
            text = one.get("text") if isinstance(one, dict) else one
            if not isinstance(text, str):
                raise ValueError(
                    f'{path} must hold {{"text": "..."}} in each line; line {number} has {type(one).__name__}'
                )
            found.append(text)
    return found


def all_as_read(tokenizer: Any, texts: Sequence[str], max_tokens: int | None) -> list[str]:
    """Texts as far as they are read: each whole, or what its first ``max_tokens`` tokens stand for."""
    if max_tokens is None or not texts:
        return list(texts)
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [as_read(tokenizer, *one, max_tokens) for one in zip(texts, rows, strict=True)]


def as_read(tokenizer: Any, text: str, ids: Sequence[int], max_tokens: int | None) -> str:
    """One such text, of which the token ids are known."""
    return text if max_tokens is None or len(ids) < max_tokens else tokenizer.decode(ids[:max_tokens])
