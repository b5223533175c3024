"""A study in a screenful of Markdown: each curve's best setting at no less than an accuracy, and who wins."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cwfast.report.privacy import STATEMENT
from cwfast.report.table import interval


def summary(report: Mapping[str, Any]) -> list[str]:
    """Lines: for each data set the best curve of each base defense with and without CWRF, verdicts, and all curves."""
    margin = f"{report['margin']:g}"
    lines = [f"# {report['title']}", "", f"`{report['command']}`", "", report["note"], ""]
    lines += [
        "LiRA AUC [95%] and test accuracy [95%] of each curve's setting of the lowest AUC among those that reach an "
        f"accuracy (by point estimate, less {margin}); in brackets the setting: rate, strength or epochs (of several "
        "seeds, as chosen for each on the others). Bold: lowest; =: not told apart from it; -: no setting reaches the "
        f"level, or those chosen miss it by more than {margin} where they were not chosen. Which curve is the first is "
        "seen by looking: no interval is corrected for that.", "",
    ]  # fmt: skip
    for name, part in report["data"].items():
        seeds = ", ".join(str(seed) for seed in part["seeds"])
        alone = "" if len(part["seeds"]) > 1 else (
            " (alone: settings are chosen where they are measured, and the intervals say nothing of how another split "
            "or reference set would differ)"
        )  # fmt: skip
        about = f"{part['network']}; seed {seeds}{alone}, {report['models']} models of each cell and seed, "
        about += f"{part['samples']['test']} test samples."
        lines += [f"## {name}", "", about, "", *_best(part["levels"])]
        lines += [*(f"- {verdict}" for verdict in part["verdicts"].values()), ""]
        if "dpsgd" in part["levels"]:
            lines += [STATEMENT, ""]
        for base, levels in part["levels"].items():
            lines += _curves(base, levels)
    return lines


def _best(levels_of: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Of each base and level: the best curve with CWRF, the best one without it, and the difference of the two."""
    if not any(levels_of.values()):
        return []
    lines = _head("base defense", ("at no less than", "CWRF", "without", "difference of AUC", "of accuracy", "verdict"))
    for base, levels in levels_of.items():
        for level in levels:
            shown = []
            for wanted in (True, False):
                best = next((one for one in level["curves"] if one["cwrf"] is wanted), None)
                shown.append(
                    "-" if best is None else f"{best['curve']} {_cell(best, first=best is level['curves'][0])}"
                )
            ours = level["ours"]
            told = ["-"] * 3 if ours is None else [interval(ours), interval(ours, "accuracy"), ours["verdict"]]
            lines.append(f"| {' | '.join([base, level['level'], *shown, *told])} |")
    return [*lines, ""]


def _curves(base: str, levels: Sequence[Mapping[str, Any]]) -> list[str]:
    """All of one base."""
    curves = dict.fromkeys(one["curve"] for level in levels for one in level["curves"])
    if not curves:
        return []
    lines = _head(base, (f"at no less than {level['level']}" for level in levels))
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
    return f"{mark}{interval(one)}{mark}{near}, {interval(one, 'accuracy')}" + (f" ({points})" if points else "")
