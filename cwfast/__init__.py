"""cwfast: score, select, rewind, retrain and audit the few weights that leak a model's training data.

Importing this package loads neither torch nor triton: each public name is imported when first used (PEP 562).
"""

from importlib import import_module
from typing import Any

_HOME = {  # public name -> the module that holds it
    "MaskSet": "masks",
    "SaliencyScorer": "scoring",
    "backends": "_backends",
    "freeze": "freezing",
    "rewind_": "masks",
    "select": "_selecting",
}
_ROOMS = (
    "checkpoint",
    "data",
    "defense",
    "distributed",
    "errors",
    "integrations",
    "layers",
    "llm",
    "mia",
    "ops",
    "optim",
    "reference",
    "report",
    "shadow",
    "testing",
    "training",
)

__all__ = [*_HOME, *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("cwfast")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
