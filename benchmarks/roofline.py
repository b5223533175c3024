"""``python -m cwfast.benchmarks.roofline results.jsonl``: how far the measured cases are from their bounds.

Prints the table of docs/roofline.md, which derives the bounds; ``--page docs/roofline.md`` puts it there. Of equal
cases the last line counts.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
LINE = 64  # bytes that memory moves at least
ENTRY = 4  # bytes of a float32
STEPS = ("cwfast", "cwfast_no_grads", "cwfast_deferred", "cwfast_deferred_no_grads", "fisher", "fisher_no_grads")


class Row(NamedTuple):
    """A measured case and its bound, both in units of ``unit``."""

    suite: str
    case: str
    unit: str
    bound: float
    measured: float


def op_rows(result: Mapping[str, Any]) -> list[Row]:
    """The op: its multiply-adds at their peak, or its bytes at the rate of a read, whichever takes longer."""
    if "moved_bytes" not in result or "fma_peak" not in result["seconds"]:
        return []
    seconds = result["seconds"]
    compute = result["flops"] / result["peak_flops"] * seconds["fma_peak"]
    memory = result["moved_bytes"] / result["read_bytes"] * seconds["read"]
    unit = f"ms, {'multiply-adds' if compute >= memory else 'bytes'}"
    return [Row("saliency", result["case"], unit, 1e3 * max(compute, memory), 1e3 * seconds["cwfast"])]


def step_rows(result: Mapping[str, Any]) -> list[Row]:
    """A training step beside the ordinary one, which is not its bound: the page says what is."""
    ratios = result["ratios"]
    found = [(name, ratios[f"over_step_{name}"]) for name in STEPS if f"over_step_{name}" in ratios]
    return [Row("saliency", f"{result['case']}, {name}", "ordinary steps", 1.0, value) for name, value in found]


def select_rows(result: Mapping[str, Any]) -> list[Row]:
    """Selection: the scores read once, a bit each written."""
    if "reads" not in result["ratios"] or "dtype" not in result:
        return []
    entry = 2 if "16" in result["dtype"] else 4
    return [Row("select", result["case"], "reads", 1 + 1 / (8 * entry), result["ratios"]["reads"])]


def rewind_rows(result: Mapping[str, Any]) -> list[Row]:
    """Rewinding from a list: each line with a selected entry read and written, 2 + 4 bytes a selected entry read."""
    if "reads_cwfast_list" not in result["ratios"] or "k" not in result:
        return []
    rate = result["k"] / result["numel"]
    touched = 1 - (1 - rate) ** (LINE // ENTRY)
    bound = 2 * touched + rate * (2 + ENTRY) / ENTRY
    return [Row("rewind", result["case"], "reads", bound, result["ratios"]["reads_cwfast_list"])]


def rows(results: list[Mapping[str, Any]]) -> list[Row]:
    """The rows of all results that have a bound."""
    makers = {
        "saliency op": op_rows,
        "saliency step": step_rows,
        "saliency fisher": step_rows,
        "select": select_rows,
        "rewind": rewind_rows,
    }
    latest = {result["case"]: result for result in results}
    return [
        row
        for case, result in latest.items()
        for start, make in makers.items()
        if case.startswith(start)
        for row in make(result)
    ]


def table(results: list[Mapping[str, Any]]) -> str:
    """Markdown: what each case takes at least, what it took, and the bound's share of that; the command of each row."""
    found = rows(results)
    if not found:
        raise ValueError(f"a table needs results that have a bound; got {len(results)} without")
    last = results[-1]
    sizes = ", ".join(sorted({str(result["size"]) for result in results}))
    lines = [
        f"{last.get('gpu') or last['cpu']}, {last['threads']} threads, {last['isa']}, torch {last['torch']}, commit "
        f"`{str(last['commit'])[:12]}`, {last['date'][:10]}; sizes: {sizes}.",
        "",
        "| case | unit | bound (steps: 1) | measured | bound / measured | `cwfast bench ... --size full` |",
        "|---|---|---:|---:|---:|---|",
    ]
    for row in found:
        share = f"{row.bound / row.measured:.0%}"
        lines.append(f"| {row.case} | {row.unit} | {row.bound:.4g} | {row.measured:.4g} | {share} | `{row.suite}` |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or put it into a page; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m cwfast.benchmarks.roofline", description=__doc__)
    parser.add_argument("results", type=Path, help="JSON lines of cwfast bench --out")
    parser.add_argument("--page", type=Path, help="replace the table in this page instead of printing it")
    options = parser.parse_args(arguments)
    text = table([json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()])
    if options.page is None:
        print(text)
        return 0
    page = options.page.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        parser.error(f"{options.page} must have a line {BEGIN} and a later one {END}")
    options.page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
