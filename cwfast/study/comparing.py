"""Who wins where: cells beside each other on the same models and samples, and curves at no less than an accuracy."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cwfast.defense import CRITERIA
from cwfast.study.intervals import Floats, Measured, stacked

SHARED = (
    "undefended",
    "early stopping",
    "early stopping by the reference set",
    "short training",
    "interpolation",
)  # stand beside any base
PLAIN = "fine-tuning without rewinding"
MARGIN = 0.005  # of test accuracy: no more than this counts as none
VERDICTS = (
    "better",
    "even AUC, higher accuracy",
    "lower AUC, accuracy open",
    "trade",
    "even",
    "higher AUC, accuracy open",
    "even AUC, lower accuracy",
    "worse",
)
DROPS = (0.01, 0.0)  # test accuracy that may be given up, against the undefended models
NEAR_BEST = (0.03, 0.01)  # and against the best of all cells


def is_cwrf(curve: str) -> bool:
    """Whether a curve rewinds weights by a criterion: in whatever strength, and not by chance."""
    name = curve.partition(",")[0]
    return name in CRITERIA and name != "random"


def beside(one: Measured, other: Measured) -> dict[str, Any]:
    """One cell less another, both on the same models and samples.

    Returns:
        ``auc``, ``auc_low``, ``auc_high``, ``accuracy``, ``accuracy_low``, ``accuracy_high`` (see ``Figure``) and
        ``verdict``, one of ``VERDICTS``. "even": the interval of the AUCs' difference holds 0; "even AUC,
        higher accuracy" (or lower): the accuracies' whole interval is beyond ``MARGIN``. "better": a lower AUC,
        and an accuracy that is lower by less than ``MARGIN`` (by the whole interval); "worse": a higher AUC, and an
        accuracy that is higher by less than that. "trade": both are lower, or both higher. Otherwise the AUCs differ,
        and the accuracies' interval is too wide to tell.
    """
    auc, accuracy = one.auc.less(other.auc), one.accuracy.less(other.accuracy)
    (low, high), (least, most) = auc.interval, accuracy.interval
    if low <= 0 <= high:
        verdict = "even"
        if least > MARGIN or most < -MARGIN:
            verdict = f"even AUC, {'higher' if least > 0 else 'lower'} accuracy"
    elif high < 0:
        verdict = "better" if least > -MARGIN else "trade" if most < 0 else "lower AUC, accuracy open"
    else:
        verdict = "worse" if most < MARGIN else "trade" if least > 0 else "higher AUC, accuracy open"
    return {**auc.told("auc"), **accuracy.told("accuracy"), "verdict": verdict}


def pairs(cells: Sequence[Measured], base: str) -> list[dict[str, Any]]:
    """Each CWRF cell of a base beside its controls, where they are there, all with the base at the same strength.

    These are the same fine-tuning without rewinding; as many weights rewound in each tensor, chosen at random; and the
    whole model interpolated as far to the initial weights, then fine-tuned. The last two are those that copy the cell's
    own criterion at its own rate.
    """
    mine = [cell for cell in cells if cell.row["base"] == base]
    found = []
    for cell in mine:
        criterion, rate, strength = (cell.row[name] for name in ("criterion", "rate", "strength"))
        if cell.row["curve"] not in (criterion, f"{criterion}, other strengths"):
            continue
        alike = [c for c in mine if c.row["strength"] == strength]
        copies = [c for c in alike if c.row["like"] == criterion and c.row["rate"] == rate]
        rivals = {PLAIN: next((c for c in alike if c.row["curve"] == PLAIN), None)}
        for kind, name in (("random", "random weights"), ("interpolated", "interpolation, then fine-tuning")):
            rivals[name] = next((c for c in copies if c.row["curve"].startswith(f"{kind} as ")), None)
        found += [
            {"criterion": criterion, "rate": rate, "strength": strength, "against": name, **beside(cell, rival)}
            for name, rival in rivals.items()
            if rival is not None
        ]
    return found


def at_levels(cells: Sequence[Measured], base: str) -> list[dict[str, Any]]:
    """At no less than several levels of test accuracy: the lowest AUC of each curve, its setting chosen on other seeds.

    With several seeds the setting (rate, alpha, epochs...) is the best on the other seeds, and measured on the seed
    that is left out, in turn. With a single seed it is chosen where it is measured. A setting reaches a level if its
    accuracy, as measured, is less by no more than ``MARGIN``. Levels at which the same settings were chosen are one.

    DP-SGD from scratch is no curve of the base "dpsgd": its epsilon is that of the released model, the others' is not.

    Returns:
        For each level: ``level`` (in words, with the mean accuracy), ``accuracy`` (the mean; of several levels that are
        one, the highest), ``curves``, the lowest AUC first, each with ``cwrf`` (see ``is_cwrf``), ``auc`` and
        ``accuracy`` with intervals, ``settings`` and ``points`` (as chosen for each seed), and ``behind``: its AUC less
        that of the first, with interval. ``ours``: the first curve of CWRF ``beside`` the first other one, with the
        names of both as ``curve`` and ``against``; None where one of them is not there. ``short``: curves that are not
        ranked, with the accuracy that they lack: no setting reaches the level, or those that do miss it by more than
        ``MARGIN`` on the seeds left out.
    """
    undefended = next((cell for cell in cells if cell.row["curve"] == "undefended"), None)
    if undefended is None:
        return []
    curves: dict[str, list[Measured]] = {}
    for cell in cells:
        curve = cell.row["curve"]
        shared = curve in SHARED or cell.row["base"] == "other"
        apart = curve.startswith("ablation") or (base == "dpsgd" and curve == "from scratch")
        if (cell.row["base"] == base or shared) and not apart:
            curves.setdefault(curve, []).append(cell)
    found: dict[Any, dict[str, Any]] = {}
    for words, level in _levels(cells, curves, undefended):
        one = _at_level(curves, level) | {"level": f"{words} ({level.mean():.3f})", "accuracy": float(level.mean())}
        choices = tuple((curve["curve"], *curve["settings"]) for curve in one["curves"])
        same = found.get(choices)
        if same is not None:
            one = max(one, same, key=lambda either: either["accuracy"]) | {
                "level": f"{same['level']} and {one['level']}"
            }
        found[choices] = one
    return list(found.values())


def _levels(
    cells: Sequence[Measured], curves: Mapping[str, Sequence[Measured]], undefended: Measured
) -> list[tuple[str, Floats]]:
    """In words, and of each seed."""
    own = undefended.accuracy
    best = max(cells, key=lambda cell: cell.accuracy.mean)
    found = [(f"{100 * drop:g} point less than undefended" if drop else "the undefended accuracy", own.seeds - drop)
             for drop in DROPS]  # fmt: skip
    for drop in NEAR_BEST:
        words = f"{100 * drop:g} point{'s' * (drop > 0.01)} less than the best of all cells, {best.row['label']}"
        found.append((f"{words} at {best.accuracy.mean:.3f}", best.accuracy.seeds - drop))
    ours = [cell for name, curve in curves.items() if is_cwrf(name) for cell in curve]
    able = [cell for cell in ours if cell.accuracy.mean > own.mean]
    if able:
        lowest = min(able, key=lambda cell: cell.auc.mean)
        words = f"the accuracy of CWRF's lowest AUC above the undefended accuracy, {lowest.row['label']}"
        found.append((words, lowest.accuracy.seeds))
    return found


def _at_level(curves: Mapping[str, Sequence[Measured]], level: Floats) -> dict[str, Any]:
    able, short = [], {}
    for name, curve in curves.items():
        picked, lacks = _chosen(curve, level)
        if lacks > MARGIN:
            short[name] = lacks
            continue
        accuracy, auc = stacked(picked)
        points = [_point(cell.row) for cell, _ in picked]
        told = {"curve": name, "cwrf": is_cwrf(name), "settings": [cell.row["label"] for cell, _ in picked]}
        able.append((told | {"points": points}, Measured({}, accuracy, auc)))
    able.sort(key=lambda pair: pair[1].auc.mean)
    ranked = [
        told
        | one.auc.told("auc")
        | one.accuracy.told("accuracy")
        | {"behind": one.auc.less(able[0][1].auc).told("auc")}
        for told, one in able
    ]
    ours, rival = (next((pair for pair in able if pair[0]["cwrf"] is which), None) for which in (True, False))
    against = None
    if ours is not None and rival is not None:
        against = {"curve": ours[0]["curve"], "against": rival[0]["curve"], **beside(ours[1], rival[1])}
    return {"curves": ranked, "ours": against, "short": short}


def _chosen(curve: Sequence[Measured], level: Floats) -> tuple[list[tuple[Measured, int]], float]:
    """For each seed a curve's setting of the lowest AUC at a level, with the accuracy that it lacks; maybe none."""
    seeds = range(len(level))
    picked = []
    for seed in seeds:
        others = [s for s in seeds if s != seed] or [seed]
        lacks = [float((level - cell.accuracy.seeds)[others].mean()) for cell in curve]
        if min(lacks) > MARGIN:
            return [], min(lacks)
        able = [cell for cell, lack in zip(curve, lacks, strict=True) if lack <= MARGIN]
        picked.append((min(able, key=lambda cell: float(cell.auc.seeds[others].mean())), seed))
    return picked, float(np.mean([level[seed] - cell.accuracy.seeds[seed] for cell, seed in picked]))


def _point(row: Mapping[str, Any]) -> str:
    """What tells a cell from the others of its curve; empty for the only one."""
    rate, strength = row["rate"], row["strength"]
    said = [f"{100 * rate:.3g}%"] if rate else []
    return ", ".join(said + ([] if strength is None else [f"{strength:g}"]))
