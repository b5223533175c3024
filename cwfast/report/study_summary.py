"""A study in a screenful of Markdown: each curve's best setting at equal utility, and who wins."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cwfast.report.table import interval, number


def summary(report: Mapping[str, Any]) -> list[str]:
    """Lines: for each data set the best curve of each base defense with and without CWRF, verdicts, and all curves."""
    lines = [f"# {report['title']}", "", f"`{report['command']}`", "", report["note"], ""]
    lines += [
        "LiRA AUC [95%] and test accuracy of each curve's setting of the lowest AUC among those that keep an accuracy; "
        "in brackets the setting: rate, strength or epochs (of several seeds, as chosen for each on the others). Bold: "
        f"lowest; =: not told apart from it; -: below the level by more than {report['margin']:g}.", "",
    ]  # fmt: skip
    for name, part in report["data"].items():
        seeds = ", ".join(str(seed) for seed in part["seeds"])
        alone = "" if len(part["seeds"]) > 1 else " (alone: settings are chosen where they are measured)"
        about = f"{part['network']}; seed {seeds}{alone}, {report['models']} models of each cell and seed."
        lines += [f"## {name}", "", about, "", *_best(part["levels"])]
        lines += [*(f"- {verdict}" for verdict in part["verdicts"].values()), ""]
        for base, levels in part["levels"].items():
            lines += _curves(base, levels)
    return lines


def _best(levels_of: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Of each base: the best curve with CWRF above the best one without it."""
    levels = next(iter(levels_of.values()), [])
    if not levels:
        return []
    lines = _head("base defense", (f"at no less than {level['level']}" for level in levels))
    for base, levels in levels_of.items():
        for what, wanted in (("CWRF", True), ("without", False)):
            shown = []
            for level in levels:
                best = next((one for one in level["curves"] if one["cwrf"] is wanted), None)
                said = "-" if best is None else f"{best['curve']} {_cell(best, first=best is level['curves'][0])}"
                shown.append(said)
            lines.append(f"| {' | '.join([f'{base}: {what}', *shown])} |")
    return [*lines, ""]


def _curves(base: str, levels: Sequence[Mapping[str, Any]]) -> list[str]:
    """All of one base."""
    curves = dict.fromkeys(one["curve"] for level in levels for one in level["curves"])
    if not curves:
        return []
    lines = _head(base, (f"at no less than {level['level']} ({number(level['accuracy'])})" for level in levels))
    found = [{one["curve"]: one for one in level["curves"]} for level in levels]
    for curve in curves:
        shown = [_cell(level.get(curve), first=next(iter(level), None) == curve) for level in found]
        lines.append(f"| {' | '.join([curve, *shown])} |")
    return [*lines, ""]


def _head(first: str, others: Iterable[str]) -> list[str]:
    heads = [first, *others]
    return [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]


def _cell(one: Mapping[str, Any] | None, first: bool) -> str:
    if one is None:
        return "-"
    mark = "**" if first else ""
    near = "" if first or one["behind"]["auc_low"] > 0 else " ="
    points = "; ".join(dict.fromkeys(point for point in one["points"] if point))
    return f"{mark}{interval(one)}{mark}{near}, {number(one['accuracy'])}" + (f" ({points})" if points else "")
