"""The blocks of a page, Python and shell, as one program: tests run it, and so does ``make_gallery.py``."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parent
_BLOCK = re.compile(r"^```(python|sh) ?([\w.]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """What stands between two fences.

    Attributes:
        language: python or sh.
        name: the word after it, often none: a recipe, or the file (``*.py``) that the reader saves it as.
        code: the block.
    """

    language: str
    name: str
    code: str


def blocks(page: str) -> list[Block]:
    """Every block of ``docs/<page>``."""
    return [Block(*found) for found in _BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))]


def run(page: str, recipe: str = "") -> dict[str, Any]:
    """Run the page's blocks without a name and those of ``recipe``, in their order, as one program.

    Shell blocks run in the current folder, with this Python's ``cwfast`` first on the path; files are written there.

    Returns:
        What the Python blocks defined.

    Raises:
        Exception: as a block does.
        RuntimeError: a command of a shell block failed; the message is what it printed.
    """
    found: dict[str, Any] = {}
    for language, name, code in blocks(page):
        if name.endswith(".py"):
            Path(name).write_text(code, encoding="utf-8")
        elif name in ("", recipe) and language == "python":
            exec(compile(code, f"{page}:{recipe}" if recipe else page, "exec"), found)
        elif name in ("", recipe):
            _shell(code)
    return found


def _shell(code: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    done = subprocess.run(
        ["sh", "-e", "-c", code],
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"a block of the page failed:\n{code}\n{done.stdout}")
    print(done.stdout, end="")
