"""What else lies in a model's folder: copied where it can hold neither weights nor code."""

import json
import shutil
from pathlib import Path
from typing import Any

from cwfast.checkpoint.files import atomic_write
from cwfast.checkpoint.reader import INDEX
from cwfast.errors import CheckpointError

# What else is copied. Weights in another format would still be those that were not rewound, so nothing unknown is;
# .jsonl and other .txt files may be the texts that the model was trained on.
_KNOWN = {".json", ".model", ".jinja", ".md", ".tiktoken", ".vocab", ".merges"}
_KNOWN_NAMES = {"vocab.txt", "merges.txt", "dict.txt"} | {
    name + suffix for name in ("LICENSE", "NOTICE", "USE_POLICY") for suffix in ("", ".txt")
}


def copy_others(model: Path, partial: Path, copy_code: bool, own: set[str]) -> tuple[list[str], list[str]]:
    """Copies config, tokenizer and the like, the index last.

    Args:
        model: folder; of a file there are no others.
        partial: where they go; shards that are there have been written already.
        copy_code: also ``*.py``, and ``auto_map`` in JSON files.
        own: names of files that are not the model's to give.

    Returns:
        Names of the files that were copied, and of those that were not.

    Raises:
        CheckpointError: a file with ``auto_map`` is no JSON.
    """
    if not model.is_dir():
        return [], []
    files = sorted((f for f in model.iterdir() if f.is_file()), key=lambda f: (f.name == INDEX, f.name))
    copied, left_out = [], []
    for file in files:
        if (partial / file.name).exists() and file.suffix == ".safetensors":
            continue  # written already
        known = file.suffix in _KNOWN or file.name in _KNOWN_NAMES or (file.suffix == ".py" and copy_code)
        other_index = file.name.endswith(".index.json") and file.name != INDEX
        if not known or other_index or file.name.startswith(".") or file.name in own:
            left_out.append(file.name)
            continue
        with atomic_write(partial / file.name) as temporary:
            if file.suffix == ".json" and file.name != INDEX and not copy_code:
                temporary.write_bytes(without_code(file.read_bytes()))
            else:
                shutil.copyfile(file, temporary)
        copied.append(file.name)
    return copied, left_out + sorted(f"{f.name}/" for f in model.iterdir() if f.is_dir())


def without_code(data: bytes) -> bytes:
    """A JSON file without ``auto_map``, wherever in it; unchanged where it has none.

    Raises:
        CheckpointError: it has, and cannot be read.
    """
    if b"auto_map" not in data and b"\\u" not in data:  # a name may be written with escapes
        return data
    try:
        found = json.loads(data)
        cleaned = _cleaned(found)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"a file with auto_map must be JSON; {type(error).__name__}: {error}") from error
    return data if cleaned == found else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cleaned(item) for key, item in value.items() if key != "auto_map"}
    return [_cleaned(item) for item in value] if isinstance(value, list) else value
