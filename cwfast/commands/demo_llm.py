"""``cwfast demo-llm``: the demo of a language model; see ``cwfast.demo_llm``."""

import argparse
from typing import Any

from cwfast import demo_llm
from cwfast.report import llm_defense


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The report and what is printed.

    Raises:
        ImportError, ValueError, CheckpointError, RuntimeError, OSError: as ``cwfast.demo_llm.run`` does.
    """
    report = demo_llm.run(
        options.out,
        full=options.full,
        rates=options.rates,
        shadows=options.shadows,
        seed=options.seed,
        report_only=options.report_only,
        command=options.command_line,
    )
    return report, "\n".join([llm_defense.text(report), "", f"Report: {(options.out / 'report.html').resolve()}"])
