"""The report of ``cwfast defend-llm`` and ``cwfast demo-llm``: JSON first, then a picture, one page and Markdown."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cwfast.checkpoint.files import atomic_write
from cwfast.report import plots, prepare, table
from cwfast.report.llm_page import environment
from cwfast.report.llm_reading import MAIN, STRONGEST, Row, attack_of, auc, signed
from cwfast.report.table import interval, number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_SETTINGS = {"start": None, "criterion": None, "rate": None, "tau": None, "steps": 0, "alpha": None, "rewound": None}
GROUPS = {
    "base": "Before fine-tuning",
    "undefended": "Undefended",
    "baseline": "Trained less, or less of it",
    "cwrf": "CWRF: critical weights rewound to the base, the rest fine-tuned",
    "control": "Controls",
}
LOOKS = {  # of curves that are no criterion's: colour, marker, dash
    "base": ("#000000", "s", "none"),
    "undefended": ("#000000", "*", "none"),
    "trained less": ("#8C8C8C", "^", "none"),
    "trained less, then fine-tuned": ("#8C8C8C", "<", "none"),
    "LoRA": ("#8C8C8C", "P", "none"),
    "interpolation": ("#6E6E6E", "v", "-"),
    "interpolation, then fine-tuned": ("#4D4D4D", "d", "--"),
    "random weights rewound, then fine-tuned": ("#9A9A9A", "X", ":"),
    "fine-tuned without rewinding": ("#5A5A5A", "h", "none"),
}
_OTHER = ("#7D7D7D", ".", ":")
_ROOM = 1.3  # perplexities beyond so many times the undefended one are left out of the picture


def write(report: Mapping[str, Any], out: str | os.PathLike[str]) -> list[Path]:
    """Write report.json, report.md, report.html and curve.png; each appears whole or not at all.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
        OSError: ``out`` cannot be made or written.
        ValueError: the report holds NaN or infinity, which JSON cannot.
    """
    made = prepare(out)
    drawn = figure(report)
    written = {"report.json": (json.dumps(report, indent=1, allow_nan=False) + "\n").encode()}
    written |= {"report.md": markdown(report).encode(), "curve.png": plots.png(drawn)}
    written["report.html"] = page(report, drawn).encode()
    for name, content in written.items():
        with atomic_write(made / name) as temporary:
            temporary.write_bytes(content)
    return [made / name for name in written]


def page(report: Mapping[str, Any], drawn: "Figure") -> str:
    """Return one HTML page that needs nothing else; every text of the report is escaped."""
    made = environment()
    made.filters["count"] = table.count
    read = files("cwfast.report").joinpath
    style = read("page.html").read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    template = made.from_string(read("llm_defense.html").read_text(encoding="utf-8"))
    rows = report["rows"]
    return template.render(
        report=report, style=style, picture=plots.data_uri(drawn), head=head(rows), cells=cells,
        attacks=attacks_of(rows), groups=grouped(rows), colours=_colours(rows), outside=outside(rows),
    )  # fmt: skip


def grouped(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Titles and rows of the groups that are there, in the order of ``GROUPS``."""
    found = [(title, [row for row in rows if row["group"] == group]) for group, title in GROUPS.items()]
    return [(title, some) for title, some in found if some]


def attacks_of(rows: Sequence[Row]) -> list[str]:
    """Names of the attacks on any row, the main one first; a row may lack one that needs shadows."""
    return list(dict.fromkeys([MAIN, *(name for row in rows for name in row["attacks"])]))


def head(rows: Sequence[Row]) -> list[str]:
    """The heads of ``cells``."""
    points = rows[0]["attacks"][MAIN]["tpr_at_fpr"]
    rates = [f"{MAIN} TPR@{percent(point['fpr'])}" for point in points]
    return ["model", "rewound", "alpha", "member loss (less alpha)", "held-out perplexity [low, high]",
            f"{MAIN} AUC [low, high]", *(f"{name} AUC" for name in attacks_of(rows)[1:]),
            *rates]  # fmt: skip


def cells(row: Row, attacks: Sequence[str]) -> list[str]:
    """One row's texts, by ``attacks_of`` all rows; a star marks a rate that rests on few false alarms."""
    reached = row["loss"]["members"]
    spread = f"[{number(row['perplexity_low'], 2)}, {number(row['perplexity_high'], 2)}]"
    return [
        row["label"],
        table.count(row["rewound"]),
        number(row["alpha"], 2),
        number(reached, 2) + (f" ({reached - row['alpha']:+.2f})" if row["alpha"] is not None else ""),
        f"{number(row['perplexity'], 2)} {spread}",
        interval(row["attacks"][MAIN]),
        *(number(row["attacks"][name]["auc"]) if name in row["attacks"] else "-" for name in attacks[1:]),
        *(f"{number(p['tpr'])}{'*' * bool(p['warning'])}" for p in row["attacks"][MAIN]["tpr_at_fpr"]),
    ]


def markdown(report: Mapping[str, Any]) -> str:
    """Return what was found and all rows as Markdown."""
    lines = [f"# {report['title']}", "", f"`{report['command']}`", ""]
    lines += [f"- {sentence}" for sentence in report["reading"]] + [""]
    lines += ["![Attack AUC against held-out perplexity](curve.png)", ""]
    heads = head(report["rows"])
    lines += [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    attacks = attacks_of(report["rows"])
    for title, rows in grouped(report["rows"]):
        lines += [f"| **{title}** |{' |' * (len(heads) - 1)}"]
        lines += [f"| {' | '.join(_plain(text) for text in cells(row, attacks))} |" for row in rows]
    lines += [""]
    for one in report.get("matched", []):
        lines += [f"## {one['title']}", "", f"| {' | '.join(one['head'])} |", f"|{' --- |' * len(one['head'])}"]
        lines += [f"| {' | '.join(map(_plain, row))} |" for row in one["rows"]] + [""]
    lines += [f"- {name}: {value}" for name, value in report["settings"].items()] + [""]
    lines += [line for note in report["notes"] for line in (note, "")]
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    return "\n".join([*lines, f"{report['machine']}; {versions}.", ""])


def text(report: Mapping[str, Any]) -> str:
    """What the terminal shows."""
    heads = head(report["rows"])
    attacks = attacks_of(report["rows"])
    body = [heads, *(cells(row, attacks) for _, rows in grouped(report["rows"]) for row in rows)]
    widths = [max(len(line[i]) for line in body) for i in range(len(heads))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in body
    ]
    return "\n".join([*lines, "", *report["reading"], *report["notes"]])


def without_draws(row: Row) -> dict[str, Any]:
    """A row as the report keeps it."""
    return {name: value for name, value in row.items() if name != "draws"}


def matched_table(title: str, pairs: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Of ``llm_reading.matched``: title, head and rows of texts."""
    rows = []
    for pair in pairs:
        row, rival = pair["row"], pair["rival"]
        own = [row["label"], number(row["perplexity"], 2), number(auc(row, name))]
        if rival is None:
            rows.append([*own, "none", "-", "-", "-", pair["verdict"]])
            continue
        theirs = [rival["label"], number(rival["perplexity"], 2), number(auc(rival, name))]
        rows.append([*own, *theirs, signed(pair), pair["verdict"]])
    heads = ["CWRF row", "perplexity", "max(AUC, 1 - AUC)", "best rival", "its perplexity", "its max(AUC, 1 - AUC)",
             "difference [low, high]", ""]  # fmt: skip
    return {"title": title, "head": heads, "rows": rows}


def outside(rows: Sequence[Row]) -> list[Row]:
    """Rows that the picture leaves out, so that the others can be told apart."""
    most = _highest(rows)
    return [row for row in rows if row["perplexity"] > most]


@plots.styled
def figure(report: Mapping[str, Any]) -> "Figure":
    """Draw held-out perplexity against the AUC of the main attack, and of whichever attack is strongest."""
    from matplotlib.figure import Figure

    rows = report["rows"]
    drawn = Figure(figsize=(10, 6.6))
    panels = drawn.subplots(1, 2, sharey=True)
    legend: dict[str, Any] = {}
    shown = [row for row in rows if row not in outside(rows)]
    for axes, name in zip(panels, (MAIN, STRONGEST), strict=True):
        for curve in dict.fromkeys(row["curve"] for row in shown):
            some = [row for row in shown if row["curve"] == curve]
            legend.setdefault(curve if curve != "cwrf" else "CWRF", _curve(axes, some, name, _look(some[0])))
        axes.axvline(0.5, **plots.GUIDE)
        axes.grid(True)
        axes.set_title(f"the {name} attack" + (" on each model" if name == STRONGEST else ""))
        axes.set_xlabel("attack AUC    0.5 = guessing, nearer to it is better")
    panels[0].invert_yaxis()
    panels[0].set_ylabel("held-out perplexity    better →")
    drawn.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=2)
    return drawn


def _curve(axes: "Axes", rows: Sequence[Row], name: str, look: tuple[str, str, str]) -> Any:
    """Draw the rows of one curve with the intervals of both figures."""
    colour, marker, dash = look
    scores = [row["attacks"][attack_of(row, name)] for row in rows]
    x, y = [score["auc"] for score in scores], [row["perplexity"] for row in rows]
    across = [[max(0.0, s["auc"] - s["auc_low"]) for s in scores], [max(0.0, s["auc_high"] - s["auc"]) for s in scores]]
    ours = rows[0]["group"] == "cwrf"
    axes.errorbar(x, y, xerr=across, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.5, zorder=1)
    options: dict[str, Any] = {
        "color": colour, "marker": marker, "linestyle": dash, "linewidth": 2 if ours else 1.2,
        "markersize": 15 if marker == "*" else 8, "markeredgecolor": "white", "zorder": 4 if ours else 3,
    }  # fmt: skip
    (drawn,) = axes.plot(x, y, **options)
    for row, at, height in zip(rows, x, y, strict=True):
        note = percent(row["rate"]) if row["rate"] else f"τ {row['tau']:g}" if row["tau"] is not None else ""
        axes.annotate(note, (at, height), (0, 7), textcoords="offset points", ha="center", fontsize=9, color=colour)
    return drawn


def _look(row: Row) -> tuple[str, str, str]:
    """Colour, marker and dash of a row's curve."""
    if row["group"] == "cwrf":
        colour, marker = plots.CRITERIA.get(row["criterion"], ("#CC79A7", "h"))
        return colour, marker, "-" if row["steps"] else ":"
    return LOOKS.get(row["curve"], _OTHER)


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    return {row["id"]: _look(row)[0] for row in rows}


def _highest(rows: Sequence[Row]) -> float:
    usual = [row["perplexity"] for row in rows if row["group"] in ("undefended", "base")]
    return max(_ROOM * min(usual), 1.02 * max(usual))


def _plain(value: str) -> str:
    return value.replace("|", "/").replace("*", "\\*")
