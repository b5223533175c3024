"""Reports: JSON first; tables, plots and one self-contained page from it.

Importing this package loads neither matplotlib nor jinja2; they come with ``pip install "cwfast[demo]"``.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from cwfast.checkpoint.files import atomic_write

__all__ = ["folder", "prepare", "write_report"]


def prepare(out: str | os.PathLike[str]) -> Path:
    """Make the folder ``out`` and check all that ``write_report`` will need; call it before a long run.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
        OSError: ``out`` cannot be made or written.
    """
    for name in ("matplotlib", "jinja2"):
        try:
            import_module(name)
        except ImportError as error:
            message = f'a report needs {name}, which cannot be imported here; pip install "cwfast[demo]" brings it'
            raise ImportError(message, name=name) from error
    return folder(out)


def folder(out: str | os.PathLike[str]) -> Path:
    """Make the folder ``out`` and see that files can be made in it.

    Raises:
        OSError: they cannot.
    """
    made = Path(out)
    try:
        made.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=made):  # permission bits alone do not tell (root, read-only mounts)
            pass
    except OSError as error:
        reason = f"the output must be a folder that can be made and written; got {str(made)!r} ({error.strerror})"
        raise OSError(reason) from error
    return made


def write_report(report: Mapping[str, Any], out: str | os.PathLike[str]) -> list[Path]:
    """Write ``report.json``, the plots as PNG and ``report.html`` into the folder ``out``.

    Everything is rendered before the first file is written, and each file appears whole or not at all.

    Args:
        report: JSON-able, finite numbers only; schema ``cwfast-demo/1``.
        out: the folder, made if missing; files of the same names are replaced.

    Returns:
        The paths written.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
        OSError: ``out`` cannot be made or written.
        ValueError: the report holds NaN or infinity, which JSON cannot.
    """
    made = prepare(out)
    from cwfast.report import page, plots

    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    figures = plots.figures(report)
    files = {"report.json": text.encode()}
    files |= {f"{name}.png": plots.png(figure) for name, figure in figures.items()}
    files["report.html"] = page.render(report, figures).encode()
    for name, content in files.items():
        with atomic_write(made / name) as temporary:
            temporary.write_bytes(content)
    return [made / name for name in files]
