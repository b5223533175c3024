"""A study in a screenful of Markdown: each curve's best setting at equal utility, and who wins."""

from collections.abc import Mapping, Sequence
from typing import Any

from cwfast.report.table import interval, number


def summary(report: Mapping[str, Any]) -> list[str]:
    """Lines: for each data set the verdicts, and a table for each base defense with a column for each accuracy."""
    lines = [f"# {report['title']}", "", f"`{report['command']}`", "", report["note"], ""]
    for name, part in report["data"].items():
        seeds = ", ".join(str(seed) for seed in part["seeds"])
        chosen = "on the other seeds" if len(part["seeds"]) > 1 else "where they are measured, as there is one seed"
        lines += [
            f"## {name}", "",
            f"{part['network']}; {'seeds' if len(part['seeds']) > 1 else 'seed'} {seeds}, {report['models']} models of "
            f"each cell and seed. LiRA AUC [95%] and test accuracy of each curve's setting of the lowest AUC, chosen "
            f"{chosen}, in brackets (of several seeds, in turn). Bold: lowest; =: not told apart from it; -: "
            "below the level.", "",
            *(f"- {verdict}" for verdict in part["verdicts"].values()), "",
        ]  # fmt: skip
        for base, levels in part["levels"].items():
            lines += _table(base, levels)
    return lines


def _table(base: str, levels: Sequence[Mapping[str, Any]]) -> list[str]:
    curves = dict.fromkeys(one["curve"] for level in levels for one in level["curves"])
    if not curves:
        return []
    heads = [f"at no less than {level['level']} ({number(level['accuracy'])})" for level in levels]
    found = [{one["curve"]: one for one in level["curves"]} for level in levels]
    lines = [f"| {' | '.join([base, *heads])} |", f"|{' --- |' * (1 + len(levels))}"]
    for curve in curves:
        shown = [_cell(level.get(curve), first=next(iter(level), None) == curve) for level in found]
        lines.append(f"| {' | '.join([curve, *shown])} |")
    return [*lines, ""]


def _cell(one: Mapping[str, Any] | None, first: bool) -> str:
    if one is None:
        return "-"
    mark = "**" if first else ""
    near = "" if first or one["behind"]["auc_low"] > 0 else " ="
    points = "; ".join(dict.fromkeys(point for point in one["points"] if point))
    return f"{mark}{interval(one)}{mark}{near}, {number(one['accuracy'])}" + (f" ({points})" if points else "")
