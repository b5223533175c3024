"""The picture of a benchmark run: a row per case, our time over its limits on the left, the peers' over ours right."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from cwfast.report.plots import GUIDE, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
MARKERS = "osD^vph"
PANELS = (  # title, axis, beginnings of the ratios' names
    ("Our time over a limit, or over the step it rides on", "← better    our time / its time", ("over_", "reads")),
    ("A peer's time (or memory) over ours", "its / ours    better →", ("times_", "memory_times_")),
)


def drawn(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of the results that have a ratio to draw; of equal cases the last."""
    latest = {result["case"]: result for result in results}
    starts = tuple(start for *_, names in PANELS for start in names)
    return [result for result in latest.values() if any(name.startswith(starts) for name in result["ratios"])]


@styled
def figure(results: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw the ratios of each result on logarithmic axes.

    Args:
        results: lines as ``cwfast bench --out`` writes them.

    Raises:
        ValueError: none of them has a ratio.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = drawn(results)
    if not rows:
        raise ValueError(f"a chart needs results with ratios; got {len(results)} without")
    drawing = Figure(figsize=(15, 2.6 + 0.3 * len(rows)))
    panels = drawing.subplots(1, 2, sharey=True)
    for axes, (title, label, starts) in zip(panels, PANELS, strict=True):
        found = [
            (y, n, value) for y, row in enumerate(rows) for n, value in row["ratios"].items() if n.startswith(starts)
        ]
        names = sorted({name for _, name, _ in found})
        for i, name in enumerate(names):
            points = [(value, y) for y, other, value in found if other == name]
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]}
            axes.scatter(*zip(*points, strict=True), s=42, edgecolor="white", label=_readable(name, starts), **look)
        axes.axvline(1, **{**GUIDE, "color": "#555555"})
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(True)
        axes.set_title(title)
        axes.set_xlabel(label)
        handles, labels = axes.get_legend_handles_labels()
        place: Literal["outside lower left", "outside lower right"]
        place = "outside lower left" if axes is panels[0] else "outside lower right"
        drawing.legend(handles, labels, loc=place, ncols=2, title=title)
    panels[0].set_yticks(range(len(rows)), [row["case"] for row in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    return drawing


def _readable(name: str, starts: tuple[str, ...]) -> str:
    """``times_torch_topk`` -> "torch topk"."""
    for start in starts:
        if start.endswith("_"):
            name = name.removeprefix(start) if not start.startswith("memory") else name.replace(start, "memory of ")
    return name.replace("_", " ")
