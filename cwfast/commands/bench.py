"""``cwfast bench``: the benchmarks in a process of their own, their results as one table."""

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs ``python -m cwfast.benchmarks`` in a process of its own, whose output goes to stderr."""
    if options.chart is not None and not options.chart.resolve().parent.is_dir():
        raise ValueError(f"--chart must name a file in a folder that exists; got {options.chart}")
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "results.jsonl"
        command = [sys.executable, "-P", "-m", "cwfast.benchmarks", *options.suites, "--size", options.size]
        if options.out is not None:  # an unwritable one is found now, not after minutes
            options.out.open("a").close()
        done = subprocess.run([*command, "--out", str(lines)], stdout=sys.stderr, check=False)
        written = lines.read_text(encoding="utf-8") if lines.exists() else ""
    if options.out is not None:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(written)
    results = [json.loads(line) for line in written.splitlines()]
    if done.returncode:
        raise RuntimeError(
            f"every benchmark must run; exit status {done.returncode} after {len(results)} cases, see above"
        )
    skipped = sorted({peer for result in results for peer in result.get("skipped_peers", ())})
    document = {"size": options.size, "results": results, "skipped_peers": skipped}
    text = _table(results)
    if skipped:
        text += f"\n\nPeers not installed, skipped: {', '.join(skipped)}"
    if options.chart is not None:
        text += f"\n{_chart(options.chart, results)}"
    return document, text


def _chart(path: Path, results: list[dict[str, Any]]) -> str:
    """Draws the results, or says why not."""
    if importlib.util.find_spec("matplotlib") is None:
        return 'No chart: matplotlib must be installed (pip install "cwfast[demo]")'
    from cwfast.report import benchmarks, plots

    if not benchmarks.drawn(results):
        return "No chart: no case has a ratio to draw"
    path.write_bytes(plots.png(benchmarks.figure(results)))
    return f"Chart: {path.resolve()}"


def _table(results: list[dict[str, Any]]) -> str:
    """A row per case: our time, what others take in units of it and what it takes in units of a limit, memory."""

    def lines(parts: list[str], width: int) -> list[str]:  # broken between the parts, never inside one
        joined = ", ".join(part.replace(" ", "\0") for part in parts)
        return [line.replace("\0", " ") for line in textwrap.wrap(joined, width, break_on_hyphens=False)]

    rows = [("case", "time", "ratios", "memory")]
    for result in results:
        ratios = [f"{name} {value:.3g}" for name, value in result["ratios"].items()]
        memory = [
            f"{name} {count / 1e6:.1f} MB" for name, count in result.get("bytes", {}).items() if count is not None
        ]
        time = next((f"{seconds * 1e3:.4g} ms" for seconds in result["seconds"].values()), "")  # memory alone has none
        cells = [result["case"]], [time], lines(ratios, 76), lines(memory, 44)
        rows += list(itertools.zip_longest(*cells, fillvalue=""))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(f"{c:<{w}}" for c, w in zip(r, widths, strict=False)), r[3]]).rstrip() for r in rows)
