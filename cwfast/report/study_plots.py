"""The pictures of a study: test accuracy against leakage, and both over the rate; one panel for each base defense."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cwfast.defense.specs import DEFENSES
from cwfast.report import plots
from cwfast.report.table import MAIN_ATTACK, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLAIN = "fine-tuning without rewinding"
BESIDE = {  # colour, marker, line: curves that stand in every panel
    "undefended": ("#000000", "*", "none"),
    "early stopping": ("#8C8C8C", "^", "-"),
    "early stopping by the reference set": ("#8C8C8C", "P", "none"),
    "short training": ("#A6A6A6", "p", "-"),
    "interpolation": ("#A6A6A6", "v", "-"),
}
OWN = {  # of one base; darker: controls of gap
    "from scratch": ("#4D4D4D", "s", "--"),
    PLAIN: ("#4D4D4D", "X", "none"),
    "fine-tuning stopped by the reference set": ("#4D4D4D", "d", "none"),
    "random as gap": ("#6E6E6E", ".", ":"),
    "random as taylor": ("#A6A6A6", ".", ":"),
    "interpolated as gap, then fine-tuned": ("#6E6E6E", "<", "--"),
    "interpolated as taylor, then fine-tuned": ("#A6A6A6", ">", "--"),
}
ELSEWHERE = ", other strengths"  # of the base defense; no line, as they are of one rate
OWN |= {curve + ELSEWHERE: (*look[:2], "none") for curve, look in OWN.items() if " as " in curve}
OTHER = ("#B8B8B8", "h", "none")  # weight decay, mixup...
Rows = Sequence[Mapping[str, Any]]


@plots.styled
def tradeoff_figure(part: Mapping[str, Any]) -> "Figure":
    """Draw test accuracy against the AUC of the main attack, one panel for each base defense."""
    from matplotlib.figure import Figure

    bases = list(part["levels"])
    looks = {**BESIDE, **OWN, **_ours(part["rows"])}
    columns = min(2, len(bases))
    lines = -(-len(bases) // columns)
    figure = Figure(figsize=(10, 1.6 + 4.1 * lines))
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel())
    drawn: dict[str, Any] = {}
    for axes, base in zip(panels, bases, strict=False):
        for curve, look in looks.items():
            rows = [row for row in part["rows"] if row["curve"] == curve and (curve in BESIDE or row["base"] == base)]
            if rows:
                drawn.setdefault(curve, _curve(axes, rows, look))
        others = [row for row in part["rows"] if row["base"] == "other" and row["curve"] not in BESIDE]
        if others:
            drawn.setdefault("other defenses", _curve(axes, others, OTHER))
        axes.axvline(0.5, **plots.GUIDE)
        axes.grid(True)
        axes.set_title(_base(base))
        axes.tick_params(axis="x", labelbottom=True)
        axes.set_xlabel("← better    AUC of LiRA    0.5 = guessing")
    _least(panels[: len(bases)], part["rows"])
    for axes in panels[len(bases) :]:
        axes.set_visible(False)
    for axes in panels[: len(bases) : columns]:
        axes.set_ylabel("test accuracy    better →")
    _legend(figure, drawn)
    return figure


@plots.styled
def rates_figure(part: Mapping[str, Any]) -> "Figure":
    """Draw AUC and test accuracy over the rate of CWRF, one column for each base defense."""
    from matplotlib.figure import Figure

    bases = list(part["levels"])
    figure = Figure(figsize=(max(10, 2.6 * len(bases)), 7.6))
    panels = figure.subplots(2, len(bases), sharex=True, sharey="row", squeeze=False)
    ours = {curve: look for curve, look in _ours(part["rows"]).items() if curve in plots.CRITERIA}
    controls = {curve: look for curve, look in OWN.items() if " as " in curve and not curve.endswith(ELSEWHERE)}
    drawn: dict[str, Any] = {}
    for column, base in enumerate(bases):
        mine = [row for row in part["rows"] if row["base"] == base]
        for curve, (colour, marker, dash) in {**controls, **ours}.items():
            rows = sorted((row for row in mine if row["curve"] == curve), key=lambda row: row["rate"])
            if not rows:
                continue
            rates = [row["rate"] for row in rows]
            look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": dash, "zorder": 2 + (curve in ours)}
            look |= {"markersize": 6, "linewidth": 2} if curve in ours else {"markersize": 4, "linewidth": 1.2}
            scores = [row["attacks"][MAIN_ATTACK] for row in rows]
            low, high = [s["auc_low"] for s in scores], [s["auc_high"] for s in scores]
            if curve in ours:
                panels[0, column].fill_between(rates, low, high, color=colour, alpha=0.12, linewidth=0)
            panels[0, column].plot(rates, [s["auc"] for s in scores], **look)
            (line,) = panels[1, column].plot(rates, [row["test_accuracy"] for row in rows], **look)
            drawn.setdefault(curve, line)
        plain = next((row for row in mine if row["curve"] == PLAIN), None)  # the preset's strength comes first
        if plain is not None:
            panels[0, column].axhline(plain["attacks"][MAIN_ATTACK]["auc"], color="#4D4D4D", linestyle="--")
            drawn.setdefault(PLAIN, panels[1, column].axhline(plain["test_accuracy"], color="#4D4D4D", linestyle="--"))
        panels[0, column].set_title(_base(base).removeprefix("fine-tuned by ") if len(bases) > 2 else _base(base))
        panels[0, column].set_xscale("log")
        for axes in panels[:, column]:
            axes.grid(True)
        panels[1, column].xaxis.set_major_formatter(lambda rate, _: percent(rate))
        panels[1, column].tick_params(axis="x", labelsize=9)
        panels[1, column].set_xlabel("weights rewound")
    panels[0, 0].set_ylabel("AUC of LiRA    ← better")
    panels[1, 0].set_ylabel("test accuracy    better →")
    _legend(figure, drawn)
    return figure


def _ours(rows: Rows) -> dict[str, tuple[str, str, str]]:
    """CWRF's curves, in colours by criterion."""
    criteria = {row["curve"]: row["criterion"] for row in rows if not row["curve"].startswith("ablation")}
    return {
        curve: (*plots.CRITERIA.get(criterion, ("#CC79A7", "h")), "-" if curve == criterion else "--")
        for curve, criterion in criteria.items()
        if criterion is not None and curve not in OWN
    }


def _legend(figure: "Figure", drawn: Mapping[str, Any]) -> None:
    """In three columns, each under its title: CWRF, the same fine-tuning otherwise, no such fine-tuning."""
    from matplotlib.lines import Line2D

    blank = Line2D([], [], linestyle="none")
    titles = "CWRF by", "controls, fine-tuned alike", "not fine-tuned"
    columns: list[dict[str, Any]] = [{}, {}, {}]
    for curve, line in drawn.items():
        alike = curve in OWN and curve != "from scratch"
        without = curve in BESIDE or curve in ("from scratch", "other defenses")
        columns[1 if alike else 2 if without else 0][curve] = line
    shown = [(title, column) for title, column in zip(titles, columns, strict=True) if column]
    longest = max(len(column) for _, column in shown)
    handles, labels = [], []
    for title, column in shown:  # a legend is filled column by column
        pad = longest - len(column)
        handles += [blank, *column.values(), *[blank] * pad]
        labels += [title, *column, *[""] * pad]
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=len(shown))
    for text in legend.get_texts():
        if text.get_text() in titles:
            text.set_fontweight("bold")


def _curve(axes: "Axes", rows: Rows, look: tuple[str, str, str]) -> Any:
    """Draw one curve with the intervals of its AUCs."""
    colour, marker, dash = look
    scores = [row["attacks"][MAIN_ATTACK] for row in rows]
    x, y = [score["auc"] for score in scores], [row["test_accuracy"] for row in rows]
    spread = [[s["auc"] - s["auc_low"] for s in scores], [s["auc_high"] - s["auc"] for s in scores]]
    ours = not colour[1:3] == colour[3:5] == colour[5:7]
    hollow = dash != "-" if ours else marker in ".<>" and dash == "none"  # other strengths
    options: dict[str, Any] = {
        "color": colour,
        "marker": marker,
        "linestyle": dash,
        "linewidth": 2 if ours else 1.2,
        "markersize": {"*": 14, ".": 6, "<": 5, ">": 5}.get(marker, 7),
        "markerfacecolor": "white" if hollow else colour,
        "markeredgecolor": colour if hollow else "white",
        "zorder": 4 if marker == "*" else 3 if ours else 2,
    }
    axes.errorbar(x, y, xerr=_positive(spread), fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.6, zorder=1)
    (drawn,) = axes.plot(x, y, **options)
    return drawn


def _positive(spread: list[list[float]]) -> list[list[float]]:
    """A bootstrap interval need not hold its estimate."""
    return [[max(0.0, value) for value in side] for side in spread]


def _least(panels: Sequence["Axes"], rows: Rows) -> None:
    """Leave out what lies far below the rest, so that the rest can be told apart; the table has it."""
    shown = [row["test_accuracy"] for row in rows if not row["curve"].startswith("ablation")]
    top = max(shown)
    middle = sorted(shown)[len(shown) // 2]
    floor = max(min(shown), middle - 3 * max(top - middle, 0.02))
    for axes in panels:
        axes.set_ylim(floor - 0.01, top + 0.01)


def _base(base: str) -> str:
    own = {"none": "cross-entropy", "hamp_plain": "HAMP, outputs unchanged"}
    return f"fine-tuned by {own.get(base) or DEFENSES[base].label}"
