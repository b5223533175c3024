"""The Python blocks of a page as one program: tests run it, and so does ``make_gallery.py``."""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
_BLOCK = re.compile(r"^```python ?(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """``(recipe, code)`` of every block of ``docs/<page>``; the recipe is the word after ``python``, often none."""
    return _BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


def run(page: str, recipe: str = "") -> dict[str, Any]:
    """Run the page's blocks without a recipe's name and those of ``recipe``, in their order, as one program.

    Returns:
        What the program defined.
    """
    code = "\n".join(text for name, text in blocks(page) if name in ("", recipe))
    found: dict[str, Any] = {}
    exec(compile(code, f"{page}:{recipe}" if recipe else page, "exec"), found)
    return found
