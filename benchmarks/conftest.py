"""Lets pytest find bench_*.py wherever this folder is installed, and prints a line per case at the end."""

from pathlib import Path

import pytest
from cwfast.benchmarks import _harness


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """bench_*.py, unless pytest takes it anyway because it was named."""
    is_bench = file_path.suffix == ".py" and file_path.name.startswith("bench_")
    if is_bench and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Ratios first: how many of our times a peer takes, how many of a limit's times we take."""
    if _harness.SUMMARY:
        terminalreporter.section(f"cwfast benchmarks, size {_harness.size()}")
        for line in _harness.SUMMARY:
            terminalreporter.write_line(line)
        if _harness.SKIPPED:
            terminalreporter.write_line(f"peers not installed, skipped: {', '.join(sorted(_harness.SKIPPED))}")
