"""``cwfast study``: a grid of defenses with and without CWRF, resumable, and its report."""

import argparse
from typing import Any

from cwfast import study
from cwfast.report import studies


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The report and what is printed.

    Raises:
        ValueError, RuntimeError, OSError, ImportError: as ``cwfast.study.run`` does.
    """
    if options.seed is not None and options.seeds is not None:
        options.usage("--seed and --seeds must not be given together; got both")
    if options.workers is not None and options.workers < 1:
        options.usage(f"--workers must be at least 1; got {options.workers}")
    if options.threads < 1:
        options.usage(f"--threads must be at least 1; got {options.threads}")
    document = study.run(
        options.out,
        preset=options.preset,
        data=options.data,
        seeds=options.seeds if options.seed is None else [options.seed],
        lams=options.lam,
        path=options.path,
        workers=options.workers,
        threads=options.threads,
        engine=options.engine,
        models=options.models,
        report_only=options.report_only,
        command=options.command_line,
    )
    return document, "\n".join([studies.text(document), "", f"Report: {(options.out / 'report.html').resolve()}"])
