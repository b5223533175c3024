"""Language models: token records from one forward pass, attacks as reductions over them, controls of the texts.

Importing this package loads neither torch nor transformers: each public name is imported when first used.
"""

from importlib import import_module
from typing import Any

_HOME = {  # public name -> the module that holds it
    "ATTACKS": "attacks",
    "Meter": "measuring",
    "TokenRecords": "storage",
    "attack": "attacks",
    "bag_of_words": "controls",
    "dataset_inference": "datasets",
    "defend_": "defending",
    "duplicates": "controls",
    "fine_tune": "training",
    "gradient_norms": "gradients",
    "hold_": "defending",
    "lowercased": "variants",
    "neighbours": "variants",
    "records": "recording",
    "score": "scoring",
    "score_folder": "scoring",
    "swapped": "variants",
    "token_counts": "variants",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
