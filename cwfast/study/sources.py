"""The code that a study's figures come from, as one hash: results of other code are not taken for this code's."""

import functools
import hashlib
from pathlib import Path

import cwfast

WHERE = (  # all that trains, scores, rewinds, observes or attacks
    "_*.py", "data", "defense", "freezing.py", "layers", "masks.py", "mia", "networks.py", "ops", "optim.py",
    "scoring.py", "shadow", "training.py",
)  # fmt: skip
STUDY = ("halting.py", "making.py", "measuring.py", "subject.py", "tables.py")  # the others only plan and report
KINDS = (".py", ".so", ".pyd")


@functools.cache
def code() -> str:
    """16 digits: of the names and contents of all source files of ``WHERE`` and ``STUDY``, and of the compiled _C."""
    root = Path(cwfast.__file__).parent
    patterns = (*WHERE, "_C*", *(f"study/{name}" for name in STUDY))
    found = [path for pattern in patterns for path in root.glob(pattern)]
    whole = hashlib.sha256()
    for path in sorted({path for one in found for path in (one.rglob("*") if one.is_dir() else [one])}):
        if path.suffix in KINDS:
            whole.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode() + path.read_bytes())
    return whole.hexdigest()[:16]
