"""The report of ``cwfast study``: report.json, pictures of each data set, report.html, and a Markdown table."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cwfast.checkpoint.files import atomic_write
from cwfast.defense.specs import DEFENSES
from cwfast.report import plots, prepare, study_tables, table
from cwfast.report.table import MAIN_ATTACK, interval, number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMMON = {  # curves that stand in every panel
    "undefended": ("#000000", "*", "none"),
    "early stopping": ("#8C8C8C", "^", "-"),
    "early stopping by the reference set": ("#8C8C8C", "P", "none"),
    "interpolation": ("#A6A6A6", "v", "-"),
}
OWN = {  # curves of one base
    "from scratch": ("#4D4D4D", "s", "--"),
    "fine-tuning without rewinding": ("#4D4D4D", "X", "none"),
    "fine-tuning stopped by the reference set": ("#4D4D4D", "d", "none"),
    "random": ("#6E6E6E", ".", ":"),
}
OTHER = ("#A6A6A6", "h", "none")  # weight decay, mixup...
NAMES = {"random": "random weights"}
Rows = Sequence[Mapping[str, Any]]


def write(report: Mapping[str, Any], out: str | os.PathLike[str]) -> list[Path]:
    """Write report.json, report.html, report.md and two pictures of each data set; each appears whole or not at all.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
        OSError: ``out`` cannot be made or written.
        ValueError: the report holds NaN or infinity, which JSON cannot.
    """
    made = prepare(out)
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    pictures = {
        f"{name}-{kind}": draw(part)
        for name, part in report["data"].items()
        for kind, draw in (("tradeoff", tradeoff_figure), ("rates", rates_figure))
    }
    written = {"report.json": text.encode(), "report.md": markdown(report).encode()}
    written |= {f"{name}.png": plots.png(figure) for name, figure in pictures.items()}
    written["report.html"] = page(report, pictures).encode()
    for name, content in written.items():
        with atomic_write(made / name) as temporary:
            temporary.write_bytes(content)
    return [made / name for name in written]


def page(report: Mapping[str, Any], pictures: Mapping[str, "Figure"]) -> str:
    """Return one HTML page that needs nothing else; every text of the report is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    for filter_ in (number, percent, table.count, interval):
        environment.filters[filter_.__name__] = filter_
    read = files("cwfast.report").joinpath
    style = read("page.html").read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    template = environment.from_string(read("study.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        style=style,
        pictures={name: plots.data_uri(figure) for name, figure in pictures.items()},
        head=head(report),
        cells=cells,
        missing=missing,
        tables=study_tables.tables,
        notes=study_tables.notes,
        main=MAIN_ATTACK,
        attacks=table.ATTACKS,
    )


def head(report: Mapping[str, Any]) -> list[str]:
    """The heads of ``cells``."""
    row = next(row for part in report["data"].values() for row in part["rows"]) if report["data"] else None
    rates = [] if row is None else [f"TPR@{percent(p['fpr'])}" for p in row["attacks"][MAIN_ATTACK]["tpr_at_fpr"]]
    return ["models", "rewound", "reference", "train acc", "test acc", "LiRA AUC [low, high]", "RMIA AUC [low, high]",
            "loss AUC", *rates]  # fmt: skip


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row's texts."""
    attacks = row["attacks"]
    return [
        row["label"],
        table.count(row["rewound"]),
        row["reference"],
        number(row["train_accuracy"]),
        number(row["test_accuracy"]),
        interval(attacks[MAIN_ATTACK]),
        interval(attacks["rmia"]),
        number(attacks["loss"]["auc"]),
        *(number(point["tpr"]) for point in attacks[MAIN_ATTACK]["tpr_at_fpr"]),
    ]


def counts(report: Mapping[str, Any]) -> str:
    """How many models and samples it rests on, in one sentence."""
    parts = [
        f"{name}: {len(part['seeds'])} {'seed' if len(part['seeds']) == 1 else 'seeds'}, "
        f"{len(part['rows'])} fleets of {report['models']} models each, {part['samples']['pool']} samples audited, "
        f"{part['samples']['reference']} for reference, {part['samples']['test']} for accuracy"
        for name, part in report["data"].items()
    ]
    return "; ".join([*parts, f"{report['trained_models']} models in all."])


def markdown(report: Mapping[str, Any]) -> str:
    """Return what was found and all rows as Markdown."""
    lines = [f"# {report['title']}", "", f"`{report['command']}`", "", f"{report['note']} {counts(report)}", ""]
    lines += [line for sentence in missing(report) for line in (sentence, "")]
    for name, part in report["data"].items():
        lines += [f"## {name}", "", f"{part['network']}; {part['recipe']}. {part['note']}.", ""]
        lines += [f"- {sentence}" for sentence in part["reading"]]
        lines += ["", *_table(head(report), [cells(row) for row in part["rows"]])]
        for one in study_tables.tables(part):
            lines += [f"### {one.title}", "", *_table(one.head, one.rows)]
        lines += [line for note in study_tables.notes(part) for line in (note, "")]
    return "\n".join(lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[text.replace("|", "/") for text in row] for row in rows]
    return [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}", *(f"| {' | '.join(row)} |" for row in escaped), ""]


def text(report: Mapping[str, Any]) -> str:
    """What the terminal shows."""
    lines = [counts(report), report["note"]]
    for name, part in report["data"].items():
        lines += ["", name, *(f"  {sentence}" for sentence in part["reading"])]
    lines += ["", *missing(report)]
    return "\n".join(lines)


def missing(report: Mapping[str, Any]) -> list[str]:
    """What was left out, and what is not done: the rows are then of fewer seeds, or of a part of one."""
    out = [
        f"Left out of {name}: {base} ({why})." for name, part in report["data"].items()
        for base, why in part["left_out"].items()
    ]  # fmt: skip
    left = {f"{name}, seed {seed}": n for name, seeds in report["missing"].items() for seed, n in seeds.items() if n}
    return out + [f"Not done: {n} fleets of {where}." for where, n in left.items()]


@plots.styled
def tradeoff_figure(part: Mapping[str, Any]) -> "Figure":
    """Draw test accuracy against the AUC of the main attack, one panel for each base defense."""
    from matplotlib.figure import Figure

    bases = list(part["levels"])
    columns = min(2, len(bases))
    lines = -(-len(bases) // columns)
    figure = Figure(figsize=(10, 1.6 + 4.1 * lines))
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel())
    legend: dict[str, Any] = {}
    for axes, base in zip(panels, bases, strict=False):
        for curve, look in {**COMMON, **_looks(part["rows"])}.items():
            rows = [row for row in part["rows"] if row["curve"] == curve and (curve in COMMON or row["base"] == base)]
            if rows:
                legend.setdefault(NAMES.get(curve, curve), _curve(axes, rows, look))
        others = [row for row in part["rows"] if row["base"] == "other"]
        if others:
            legend.setdefault("other defenses", _curve(axes, others, OTHER))
        axes.axvline(0.5, **plots.GUIDE)
        axes.grid(True)
        axes.set_title(_base(base))
        axes.set_xlabel("← better    AUC of LiRA    0.5 = guessing")
    _least(panels[: len(bases)], part["rows"])
    for axes in panels[len(bases) :]:
        axes.set_visible(False)
    for axes in panels[: len(bases) : columns]:
        axes.set_ylabel("test accuracy    better →")
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3)
    return figure


@plots.styled
def rates_figure(part: Mapping[str, Any]) -> "Figure":
    """Draw AUC and test accuracy over the rate of CWRF, one column for each base defense."""
    from matplotlib.figure import Figure

    bases = list(part["levels"])
    figure = Figure(figsize=(10, 7))
    panels = figure.subplots(2, len(bases), sharex=True, sharey="row", squeeze=False)
    legend: dict[str, Any] = {}
    for column, base in enumerate(bases):
        for curve, (colour, marker, dash) in _looks(part["rows"]).items():
            rows = [row for row in part["rows"] if row["curve"] == curve and row["base"] == base and row["rate"]]
            rows.sort(key=lambda row: row["rate"])
            if not rows or curve not in (*plots.CRITERIA, "random"):
                continue
            rates = [row["rate"] for row in rows]
            look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": dash, "markersize": 6}
            scores = [row["attacks"][MAIN_ATTACK] for row in rows]
            low, high = [s["auc_low"] for s in scores], [s["auc_high"] for s in scores]
            panels[0, column].fill_between(rates, low, high, color=colour, alpha=0.12, linewidth=0)
            panels[0, column].plot(rates, [s["auc"] for s in scores], **look)
            (drawn,) = panels[1, column].plot(rates, [row["test_accuracy"] for row in rows], **look)
            legend.setdefault(NAMES.get(curve, curve), drawn)
        for row in part["rows"]:
            if row["curve"] == "fine-tuning without rewinding" and row["base"] == base:
                panels[0, column].axhline(row["attacks"][MAIN_ATTACK]["auc"], color="#4D4D4D", linestyle="--")
                drawn = panels[1, column].axhline(row["test_accuracy"], color="#4D4D4D", linestyle="--")
                legend.setdefault("fine-tuned without rewinding", drawn)
        panels[0, column].set_title(_base(base).removeprefix("fine-tuned by ") if len(bases) > 2 else _base(base))
        panels[0, column].set_xscale("log")
        for axes in panels[:, column]:
            axes.grid(True)
        panels[1, column].xaxis.set_major_formatter(lambda rate, _: percent(rate))
        panels[1, column].tick_params(axis="x", labelsize=9)
        panels[1, column].set_xlabel("weights rewound")
    panels[0, 0].set_ylabel("AUC of LiRA    ← better")
    panels[1, 0].set_ylabel("test accuracy    better →")
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=5)
    return figure


def _looks(rows: Rows) -> dict[str, tuple[str, str, str]]:
    """Of the curves that belong to a base: CWRF's in colours, the others in greys."""
    criteria = {row["curve"]: row["criterion"] for row in rows if not row["curve"].startswith("ablation")}
    ours = {
        curve: (*plots.CRITERIA.get(criterion, ("#CC79A7", "h")), "-" if curve == criterion else "--")
        for curve, criterion in criteria.items()
        if criterion is not None and curve not in OWN
    }
    return {**OWN, **ours}


def _curve(axes: "Axes", rows: Rows, look: tuple[str, str, str]) -> Any:
    """Draw one curve with the intervals of its AUCs."""
    colour, marker, dash = look
    scores = [row["attacks"][MAIN_ATTACK] for row in rows]
    x, y = [score["auc"] for score in scores], [row["test_accuracy"] for row in rows]
    spread = [[s["auc"] - s["auc_low"] for s in scores], [s["auc_high"] - s["auc"] for s in scores]]
    ours = not colour[1:3] == colour[3:5] == colour[5:7]
    options: dict[str, Any] = {
        "color": colour, "marker": marker, "linestyle": dash, "linewidth": 2 if ours else 1.2,
        "markersize": {"*": 14, ".": 5}.get(marker, 7), "markeredgecolor": "white", "zorder": 3 if ours else 2,
    }  # fmt: skip
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
    return f"fine-tuned by {'cross-entropy' if base == 'none' else DEFENSES[base].label}"
