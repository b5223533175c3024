"""The rows of a report as text; the terminal, the README and the page all take their numbers from here."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MAIN_ATTACK = "lira_shrinkage"
ATTACKS = {
    "lira_shrinkage": "LiRA, variance by shrinkage",
    "lira_per_example": "LiRA, variance per example",
    "lira_fixed": "LiRA, one fixed variance",
    "rmia": "RMIA",
    "loss": "loss threshold",
}
GROUPS = {"baseline": "Baselines", "cwrf": "CWRF: rewind critical weights, retrain the rest", "control": "Controls"}


def number(value: float | None, digits: int = 3) -> str:
    """``0.819``; a dash where there is no number."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """``0.3%``, from a share: three significant digits, no trailing zeros."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.3g}%"


def count(value: float | None) -> str:
    """``12,345``; a mean count below ten keeps one decimal."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.0f}" if value >= 9.95 or value == int(value) else f"{value:.1f}"


def interval(score: Mapping[str, Any], name: str = "auc") -> str:
    """``0.819 [0.803, 0.834]``, from the keys ``name``, ``name_low`` and ``name_high``."""
    return f"{number(score[name])} [{number(score[name + '_low'])}, {number(score[name + '_high'])}]"


def grouped(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Yield each group's title with its rows: groups in the order of ``GROUPS``, rows in theirs."""
    groups: dict[str, list[Mapping[str, Any]]] = {key: [] for key in GROUPS}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    for key, members in groups.items():
        if members:
            yield GROUPS.get(key, key), members


def columns(row: Mapping[str, Any]) -> list[str]:
    """The heads of ``cells(row)``."""
    rates = [f"TPR@{percent(point['fpr'])}" for point in row["attacks"][MAIN_ATTACK]["tpr_at_fpr"]]
    return ["defense", "rate", "test acc", "LiRA AUC [low, high]", "RMIA AUC", "loss AUC", *rates]


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row's numbers; a star marks a true-positive rate that carries a warning."""
    attacks = row["attacks"]
    return [
        row["label"],
        percent(row["rate"]),
        number(row["test_accuracy"]),
        interval(attacks[MAIN_ATTACK]),
        number(attacks["rmia"]["auc"]),
        number(attacks["loss"]["auc"]),
        *(number(point["tpr"]) + "*" * bool(point["warning"]) for point in attacks[MAIN_ATTACK]["tpr_at_fpr"]),
    ]


def warnings(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The different warnings behind the stars of ``cells``, in order of appearance."""
    points = (point for row in rows for point in row["attacks"][MAIN_ATTACK]["tpr_at_fpr"])
    return list(dict.fromkeys(point["warning"] for point in points if point["warning"]))


def table(report: Mapping[str, Any]) -> str:
    """Return the report's rows as a plain-text table: one line per row, grouped, with the warnings below."""
    rows = report["rows"]
    if not rows:
        return "no rows\n"
    head = columns(rows[0])
    body = {row["id"]: cells(row) for row in rows}
    widths = [max(len(line[i]) for line in [head, *body.values()]) for i in range(len(head))]

    def line(parts: list[str]) -> str:
        numbers = [part.rjust(width) for part, width in zip(parts[1:], widths[1:], strict=True)]
        return "  ".join(["  " + parts[0].ljust(widths[0]), *numbers]).rstrip()

    lines = [line(head)]
    for title, members in grouped(rows):
        lines += [title, *(line(body[row["id"]]) for row in members)]
    notes = warnings(rows)
    more = f" (and {len(notes) - 1} more, see report.json)" if len(notes) > 1 else ""
    lines += [f"* {note}{more}" for note in notes[:1]]
    return "\n".join(lines) + "\n"


def markdown_table(report: Mapping[str, Any], rows: Iterable[str] | None = None) -> str:
    """Return a Markdown table of the rows whose ids are given, in that order; of all rows by default.

    Args:
        report: the report.
        rows: ids of rows.

    Raises:
        KeyError: no row has one of the ids.
    """
    by_id = {row["id"]: row for row in report["rows"]}
    chosen = [by_id[key] for key in (by_id if rows is None else rows)]
    if not chosen:
        return ""
    head = columns(chosen[0])
    rule = ["---", *["---:"] * (len(head) - 1)]
    lines = [head, rule, *(cells(row) for row in chosen)]
    escaped = ([part.replace("|", "\\|").replace("*", "\\*") for part in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped) + "\n"
