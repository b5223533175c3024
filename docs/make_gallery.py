"""Makes ``docs/_gallery``: real runs, their reports as pages, and Markdown with their figures for ``gallery.md``.

``python docs/make_gallery.py`` makes it anew; Sphinx makes it where it is missing. ``--demo FOLDER`` takes the report
of a ``cwfast demo`` that has been run already. Takes about a minute on two cores without that.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import snippets

OUT = snippets.DOCS / "_gallery"
AUDIT_PAGE = "how-to/audit-a-classifier.md"


def make_where_missing() -> None:
    """Make the gallery unless it is there."""
    if not OUT.exists():
        make()


def make(demo: Path | None = None) -> None:
    """Make the gallery, whole or not at all.

    Args:
        demo: the folder that ``cwfast demo --out`` wrote; None runs ``cwfast demo --quick``.
    """
    with tempfile.TemporaryDirectory(dir=snippets.DOCS, prefix="_gallery-") as folder:
        made = Path(folder) / "made"
        (made / "pages" / "gallery").mkdir(parents=True)
        _demo(made, demo or _run_demo(Path(folder)))
        _audit(made)
        shutil.rmtree(OUT, ignore_errors=True)
        made.rename(OUT)


def _run_demo(folder: Path) -> Path:
    command = [sys.executable, "-P", "-m", "cwfast.cli", "demo", "--quick", "--out", "cwfast-demo"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / "cwfast-demo"


def _demo(made: Path, source: Path) -> None:
    from cwfast.report.table import markdown_table

    report = json.loads((source / "report.json").read_text(encoding="utf-8"))
    shutil.copy(source / "report.html", made / "pages" / "gallery" / "demo.html")
    for picture in ("tradeoff", "roc", "layers"):
        shutil.copy(source / f"{picture}.png", made / f"{picture}.png")
    words = [
        f"Printed by `{report['command']}` (seed {report['seed']}, torch {report['versions']['torch']}, "
        f"{report['machine']}):",
        markdown_table(report),
        *(f"- {sentence}" for sentence in report["reading"]),
    ]
    (made / "demo.md").write_text("\n".join([words[0], "", *words[1:]]) + "\n", encoding="utf-8")


def _audit(made: Path) -> None:
    """Runs the program of the how-to page and keeps what it printed and wrote."""
    printed = io.StringIO()
    with contextlib.chdir(made), contextlib.redirect_stdout(printed):
        snippets.run(AUDIT_PAGE)
    for name in ("before", "after"):
        (made / f"{name}.html").rename(made / "pages" / "gallery" / f"{name}.html")
    (made / "audit.txt").write_text(printed.getvalue(), encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, help="folder of a report that is there already")
    make(parser.parse_args().demo)
