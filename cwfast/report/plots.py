"""The three pictures of a report: ROC curves, accuracy against leakage, critical weights by layer.

Figures are built from matplotlib's objects, never through pyplot: no list of open figures, no display.
Colours are those of Okabe and Ito, which colour-blind readers can tell apart; shapes repeat what colours say.
"""

import base64
import functools
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from cwfast.report.table import ATTACKS, MAIN_ATTACK, count, grouped, interval, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

CRITERIA = {  # colour, marker
    "taylor": ("#0072B2", "o"),
    "taylor (batch)": ("#56B4E9", "s"),
    "gap": ("#D55E00", "D"),
    "taylor_delta": ("#009E73", "p"),
    "grad": ("#CC79A7", "h"),
    "fisher": ("#E69F00", "8"),
}
GREYS = [
    ("#4D4D4D", "^", "--"),
    ("#8C8C8C", "X", ":"),
    ("#6E6E6E", "v", "-."),
    ("#9A9A9A", "P", "--"),
    ("#5A5A5A", ">", ":"),
    ("#7D7D7D", "<", "-."),
    ("#A6A6A6", "d", "--"),
    ("#606060", "p", ":"),
]
UNDEFENDED = ("#000000", "*", "-")
STYLE: dict[str, Any] = {  # figures are 10 inches wide: shown 1000 pixels wide, 11 points are 15 pixels
    "font.size": 11.0,
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12.5,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": "#E8E8E8",
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "text.parse_math": False,  # a dollar sign in a label is one
    "svg.hashsalt": "cwfast",  # the same report gives the same bytes
}
P = ParamSpec("P")
T = TypeVar("T")
SIDES = [(0, 10), (0, -10), (1, 0), (-1, 0), (1, 8), (-1, 8), (1, -8), (-1, -8), (0, 19), (0, -19)]  # in points
GUIDE: dict[str, Any] = {"color": "#B0B0B0", "linewidth": 1.2, "linestyle": (0, (2, 3)), "zorder": 0}


@dataclass
class Series:
    """Rows joined by one line: the same criterion (or defense) and the same loss, over rates or strengths."""

    name: str
    ours: bool
    colour: str
    marker: str
    dash: str
    loss: str | None
    rows: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def everywhere(self) -> bool:
        """Whether it is trained from scratch, so that it compares with any loss used for retraining."""
        return self.rows[0]["group"] == "baseline" and self.rows[0]["rate"] is None


def series(report: Mapping[str, Any]) -> list[Series]:
    """Sort the rows into lines, each with its look: CWRF in colours, everything else in greys."""
    lines: dict[tuple[Any, ...], Series] = {}
    looks: dict[tuple[Any, ...], tuple[str, str, str]] = {}  # not by loss: one look in every panel
    greys = 0
    for row in (row for _, members in grouped(report["rows"]) for row in members):
        ours = row["group"] == "cwrf" and row["criterion"] is not None
        kind = (ours, row["criterion"] if ours else row["defense"], row["rate"] is None)
        if kind not in looks:
            if row["id"] == "undefended":
                looks[kind] = UNDEFENDED
            elif ours and row["criterion"] in CRITERIA:
                looks[kind] = (*CRITERIA[row["criterion"]], "-")
            else:
                looks[kind] = GREYS[greys % len(GREYS)]
                greys += 1
        name = f"CWRF, {row['criterion']}" if ours else row["defense"]
        line = lines.setdefault((*kind, row["loss"]), Series(name, ours, *looks[kind], row["loss"]))
        line.rows.append(row)
    for line in lines.values():
        if len(line.rows) == 1 and line.rows[0]["criterion"] is None:
            line.name, line.dash = line.rows[0]["label"], "none"
    return list(lines.values())


def colours(report: Mapping[str, Any]) -> dict[str, str]:
    """Return each row's colour by its id."""
    return {row["id"]: line.colour for line in series(report) for row in line.rows}


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Run ``draw`` under ``STYLE``: ticks and layout are made as late as on drawing, so saving needs it as well."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> T:
        from matplotlib import style

        with style.context(["default", STYLE]):  # whatever the user's matplotlibrc says
            return draw(*args, **kwargs)

    return styled


@styled
def roc_figure(report: Mapping[str, Any]) -> "Figure":
    """Draw the ROC curves of the rows in ``report["roc"]`` with their interval bands, both axes logarithmic."""
    from matplotlib.figure import Figure

    rows, shades, curves = {row["id"]: row for row in report["rows"]}, colours(report), report["roc"]
    positive = [x for curve in curves.values() for x in curve["fpr"] if x > 0]
    # Further left than 0.1% a curve rests on a handful of examples.
    lowest = min(max(min(positive, default=0.0), 1e-3), 1e-2)
    figure = Figure(figsize=(10, 6.4))
    axes = figure.add_subplot(
        xscale="log", yscale="log", xlim=(lowest, 1), ylim=(lowest, 1.03), aspect="equal", anchor="W"
    )
    drawn: list[str] = []
    marks: set[float] = set()
    for key, curve in curves.items():
        row, colour, score = rows[key], shades[key], rows[key]["attacks"][curve["attack"]]
        grey = any(colour == shade for shade, _, _ in GREYS)
        drawn.append("grey" if grey else colour)  # greys are told apart by their dashes alone
        dash = ["-", "--", ":", "-."][(drawn.count(drawn[-1]) - (not grey)) % 4]
        label = f"{textwrap.fill(row['label'], 34)}\nAUC {interval(score)}"
        axes.fill_between(curve["fpr"], curve["low"], curve["high"], color=colour, alpha=0.13, linewidth=0)
        axes.plot(curve["fpr"], curve["tpr"], color=colour, linestyle=dash, linewidth=2.2, label=label)
        for point in score["tpr_at_fpr"]:
            marks.add(point["fpr"])
            axes.plot(point["fpr"], point["tpr"], "o", color=colour, markersize=7, markeredgecolor="white", zorder=4)
    for rate in marks:
        axes.axvline(rate, **GUIDE)
    axes.plot([lowest, 1], [lowest, 1], color="#AAAAAA", linewidth=1.2, label="guessing (AUC 0.5)")
    for axis in (axes.xaxis, axes.yaxis):
        _percent_ticks(axis)
    axes.grid(True)
    attacks = dict.fromkeys(ATTACKS.get(curve["attack"], curve["attack"]) for curve in curves.values())
    axes.set_title(f"Attack: {', '.join(attacks)}")
    axes.set_xlabel("false alarms: share of non-members called members (FPR)")
    axes.set_ylabel("share of members found (TPR)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), labelspacing=1, borderaxespad=0)
    return figure


@styled
def tradeoff_figure(report: Mapping[str, Any]) -> "Figure":
    """Draw test accuracy against the AUC of the main attack, one line per criterion or defense, one panel per loss."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    lines = series(report)
    losses = sorted({line.loss for line in lines if line.loss and not line.everywhere}) or [""]
    figure = Figure(figsize=(10, 7.8))
    panels = figure.subplots(1, len(losses), sharex=True, sharey=True, squeeze=False)[0]
    legend: dict[str, Line2D | None] = dict.fromkeys(line.name for line in lines)  # groups stay together
    shown = [[line for line in lines if line.everywhere or line.loss in (None, loss)] for loss in losses]
    for axes, loss, here in zip(panels, losses, shown, strict=True):
        for line in here:
            look: dict[str, Any] = {
                "color": line.colour,
                "linestyle": line.dash,
                "linewidth": 2.2 if line.ours else 1.4,
                "marker": line.marker,
                "markersize": 15 if line.marker == "*" else 8,
                "markeredgecolor": "white",
                "zorder": 2 + line.ours + 2 * (line.marker == "*"),
            }
            axes.plot(*zip(*map(_place, line.rows), strict=True), **look)
            legend[line.name] = Line2D([], [], label=line.name, **look)
        axes.axvline(0.5, **GUIDE)
        axes.grid(True)
        axes.margins(0.09)
        axes.set_title(f"retrained with {loss}" if loss else "")
        axes.set_xlabel("← better    attack AUC (LiRA)    0.5 = guessing")
    panels[0].set_ylabel("test accuracy    better →")
    figure.legend(handles=list(legend.values()), loc="outside lower center", ncols=3)
    figure.draw_without_rendering()  # settles the layout, on which the places of the labels depend
    for axes, here in zip(panels, shown, strict=True):
        _label_points(axes, here)
        _typical_interval(axes, here)
    return figure


@styled
def layers_figure(report: Mapping[str, Any]) -> "Figure":
    """Draw which share of each layer is critical, as bars that start where an even spread would end."""
    from matplotlib.figure import Figure

    layers = report["layers"]
    names = list(dict.fromkeys(name for layer in layers.values() for name in layer["counts"]))
    shares = {
        key: [layer["counts"].get(name, 0) / max(layer["numel"].get(name, 0), 1) for name in names]
        for key, layer in layers.items()
    }
    positive = [share for values in shares.values() for share in values if share > 0]
    positive += [layer["rate"] for layer in layers.values()]
    low, high = min(positive) / 2, min(max(positive) * 1.5, 1.0)
    step = 0.8 / len(layers)
    figure = Figure(figsize=(10, 1.6 + 0.42 * len(names) * max(len(layers), 1.5)))
    axes = figure.add_subplot(xscale="log", xlim=(low, high), ylim=(len(names) - 0.5, -0.5))
    for place, (key, layer) in enumerate(layers.items()):
        colour = CRITERIA.get(key, GREYS[place % len(GREYS)])[0]
        y = [index + (place - (len(layers) - 1) / 2) * step for index in range(len(names))]
        ends = [max(share, low) for share in shares[key]]
        widths = [end - layer["rate"] for end in ends]
        axes.barh(y, widths, step * 0.85, left=layer["rate"], color=colour, label=f"{key}, {percent(layer['rate'])}")
        axes.axvline(layer["rate"], color="#555555", linewidth=1.3)
        for height, name in zip(y, names, strict=True):
            text = f"{count(layer['counts'].get(name, 0))} of {count(layer['numel'].get(name, 0))}"
            axes.annotate(
                text, (1.015, height), xycoords=("axes fraction", "data"), va="center", color=colour, fontsize=10
            )
    _percent_ticks(axes.xaxis)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
    axes.set_xlabel("share of the layer's weights that are selected  (line: the same share in every layer)")
    figure.legend(loc="outside upper left", ncols=len(layers), title="criterion, share selected over all layers")
    return figure


def figures(report: Mapping[str, Any]) -> dict[str, "Figure"]:
    """Return the figures for which the report has data, by the stem of the file each is saved to."""
    drawn = {"tradeoff": tradeoff_figure(report)} if report["rows"] else {}
    if report["roc"]:
        drawn["roc"] = roc_figure(report)
    if report["layers"]:
        drawn["layers"] = layers_figure(report)
    return drawn


@styled
def png(figure: "Figure") -> bytes:
    """Return the figure as a PNG file, 2000 pixels wide."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=200, metadata={"Software": None})
    return stream.getvalue()


@styled
def data_uri(figure: "Figure") -> str:
    """Return the figure as an SVG image in a ``data:`` URI: sharp at any size, and its ids clash with no other's."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _percent_ticks(axis: "Axis") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda share, _: percent(share)))
    axis.set_minor_locator(NullLocator())


def _place(row: Mapping[str, Any]) -> tuple[float, float]:
    return row["attacks"][MAIN_ATTACK]["auc"], row["test_accuracy"]


def _point_text(row: Mapping[str, Any]) -> str:
    if row["rate"] is not None:
        return percent(row["rate"])
    if row["strength"] is None:
        return ""
    return f"{'τ ' if row['criterion'] == 'interpolation' else ''}{row['strength']:g}"


def _typical_interval(axes: "Axes", lines: Sequence[Series]) -> None:
    """Draw the median width of the AUC intervals in the corner of the worst results, where points are rare."""
    scores = [row["attacks"][MAIN_ATTACK] for line in lines for row in line.rows]
    width, right = median(score["auc_high"] - score["auc_low"] for score in scores), axes.get_xlim()[1]
    where = axes.get_xaxis_transform()
    bar = {"arrowstyle": "|-|,widthA=0.3,widthB=0.3", "color": "#555555", "shrinkA": 0, "shrinkB": 0}
    ends = (right - 1.2 * width, 0.03), (right - 0.2 * width, 0.03)
    axes.annotate("", *ends, xycoords=where, textcoords=where, arrowprops=bar)
    axes.text(right - 0.2 * width, 0.05, "typical interval", transform=where, ha="right", fontsize=9, color="#555555")


def _label_points(axes: "Axes", lines: Sequence[Series]) -> None:
    """Write each point's rate or strength beside it, on the side where it covers the least of what is there.

    Of a control's line over rates only the ends are labelled: the rates between are those of the coloured lines.
    """
    from matplotlib.patheffects import withStroke

    scale = 72 / axes.figure.dpi  # everything below is in points
    frame = tuple(scale * edge for edge in axes.get_window_extent().extents)
    spots = {id(row): scale * axes.transData.transform(_place(row)) for line in lines for row in line.rows}
    taken: list[tuple[float, ...]] = [(x - 4.0, y - 4.0, x + 4.0, y + 4.0) for x, y in spots.values()]
    for line in lines:
        some = line.rows if line.ours or line.everywhere or len(line.rows) < 3 else [line.rows[0], line.rows[-1]]
        for row in some:
            text = _point_text(row)
            x, y = spots[id(row)]
            width, height = 5.6 * len(text), 9.0
            choices: list[tuple[int, int, tuple[float, ...]]] = []
            for dx, dy in SIDES:
                left, bottom = x + dx * (width / 2 + 7) - width / 2, y + dy - height / 2
                box = (left, bottom, left + width, bottom + height)
                outside = width * height - _overlap(box, frame)
                choices.append((round(sum(_overlap(box, other) for other in taken) + 3 * outside), len(choices), box))
            best = min(choices)[2]  # among equals, the first side
            taken.append(best)
            offset = ((best[0] + best[2]) / 2 - x, (best[1] + best[3]) / 2 - y)
            halo = [withStroke(linewidth=2.5, foreground="white")]
            axes.annotate(
                text,
                _place(row),
                offset,
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=9,
                color=line.colour,
                path_effects=halo,
                zorder=5,
            )


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
