"""Who wins where: cells beside each other on the same models and samples, and curves at equal utility."""

from collections.abc import Callable, Mapping, Sequence
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
MARGIN = 0.005  # of test accuracy: less than this counts as none
VERDICTS = ("better", "lower AUC, accuracy open", "trade", "even", "higher AUC, accuracy open", "worse")
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
        ``verdict``, one of ``VERDICTS``. "even": the interval of the AUCs' difference holds 0. "better": a lower AUC,
        and an accuracy that is lower by less than ``MARGIN`` (by the whole interval); "worse": a higher AUC, and an
        accuracy that is higher by less than that. "trade": both are lower, or both higher. Otherwise the AUCs differ,
        and the accuracies' interval is too wide to tell.
    """
    auc, accuracy = one.auc.less(other.auc), one.accuracy.less(other.accuracy)
    (low, high), (least, most) = auc.interval, accuracy.interval
    if low <= 0 <= high:
        verdict = "even"
    elif high < 0:
        verdict = "better" if least > -MARGIN else "trade" if most < 0 else "lower AUC, accuracy open"
    else:
        verdict = "worse" if most < MARGIN else "trade" if least > 0 else "higher AUC, accuracy open"
    return {**auc.told("auc"), **accuracy.told("accuracy"), "verdict": verdict}


def pairs(cells: Sequence[Measured], base: str) -> list[dict[str, Any]]:
    """Each CWRF cell of a base beside its controls, where they are there.

    These are the same fine-tuning without rewinding; as many weights rewound in each tensor, chosen at random; and the
    whole model interpolated as far to the initial weights, then fine-tuned. The last two are those that copy the cell's
    own criterion at its own rate.
    """
    mine = [cell for cell in cells if cell.row["base"] == base]
    plain = next((cell for cell in mine if cell.row["curve"] == PLAIN), None)  # the preset's strength comes first
    found = []
    for cell in mine:
        criterion, rate = cell.row["criterion"], cell.row["rate"]
        if cell.row["curve"] != criterion:
            continue
        copies = [c for c in mine if c.row["like"] == criterion and c.row["rate"] == rate]
        rivals = {"fine-tuning without rewinding": plain}
        for kind, name in (("random", "random weights"), ("interpolated", "interpolation, then fine-tuning")):
            rivals[name] = next((c for c in copies if c.row["curve"].startswith(f"{kind} as ")), None)
        found += [
            {"criterion": criterion, "rate": rate, "against": name, **beside(cell, rival)}
            for name, rival in rivals.items()
            if rival is not None
        ]
    return found


def at_equal_utility(cells: Sequence[Measured], base: str) -> list[dict[str, Any]]:
    """At several levels of test accuracy: the lowest AUC of each curve, its setting chosen on the other seeds.

    With several seeds the setting (rate, alpha, epochs...) is the best on the other seeds, and measured on the seed
    that is left out, in turn: choosing by luck is not rewarded. With a single seed it is chosen where it is measured.

    Returns:
        For each level: ``level`` (in words), ``accuracy`` (mean over seeds) and ``curves``, the lowest AUC first, each
        with ``cwrf`` (see ``is_cwrf``), ``auc``, its interval, ``accuracy``, ``settings`` and ``points`` (as chosen for
        each seed), and ``behind``: its AUC less that of the first, with interval. ``short``: curves whose settings
        reach the level on the seeds that they are chosen on and miss it by more than ``MARGIN`` on those left out, with
        what they lack; they are not ranked.
    """
    undefended = next((cell for cell in cells if cell.row["curve"] == "undefended"), None)
    if undefended is None:
        return []
    curves: dict[str, list[Measured]] = {}
    for cell in cells:
        curve = cell.row["curve"]
        shared = curve in SHARED or cell.row["base"] == "other"
        if (cell.row["base"] == base or shared) and not curve.startswith("ablation"):
            curves.setdefault(curve, []).append(cell)
    own = undefended.accuracy.seeds
    best = np.max([cell.accuracy.seeds for curve in curves.values() for cell in curve], axis=0)
    levels = {("the undefended accuracy" if not drop else f"{100 * drop:g} point less than undefended"): own - drop
              for drop in DROPS}  # fmt: skip
    for drop in NEAR_BEST:
        levels[f"{100 * drop:g} point{'s' * (drop > 0.01)} less than the best of all"] = best - drop
    found = []
    for words, level in levels.items():
        reached = {name: _chosen(curve, level) for name, curve in curves.items()}
        able = [value | {"curve": name, "cwrf": is_cwrf(name)} for name, value in reached.items() if value]
        ranked = sorted((value for value in able if value["short"] <= MARGIN), key=_by_auc)
        for value in ranked:
            value["behind"] = value["figure"].less(ranked[0]["figure"]).told("auc")
        told = [{name: value[name] for name in value if name != "figure"} for value in ranked]
        short = {value["curve"]: value["short"] for value in able if value["short"] > MARGIN}
        found.append({"level": words, "accuracy": float(level.mean()), "curves": told, "short": short})
    return found


_by_auc: Callable[[Mapping[str, Any]], float] = lambda value: value["auc"]  # noqa: E731


def _chosen(curve: Sequence[Measured], level: Floats) -> dict[str, Any] | None:
    """A curve's setting of the lowest AUC at no less than a level; None where none reaches it."""
    seeds = range(len(level))
    picked = []
    for seed in seeds:
        others = [s for s in seeds if s != seed] or [seed]
        able = [c for c in curve if (c.accuracy.seeds - level)[others].mean() >= 0]
        if not able:
            return None
        picked.append((min(able, key=lambda cell: float(cell.auc.seeds[others].mean())), seed))
    accuracy, auc = stacked(picked)
    return {
        **auc.told("auc"),
        "accuracy": accuracy.mean,
        "short": float((level - accuracy.seeds).mean()),
        "settings": [cell.row["label"] for cell, _ in picked],
        "points": [_point(cell.row) for cell, _ in picked],
        "figure": auc,
    }


def _point(row: Mapping[str, Any]) -> str:
    """What tells a cell from the others of its curve; empty for the only one."""
    rate, strength = row["rate"], row["strength"]
    said = [f"{100 * rate:.3g}%"] if rate else []
    return ", ".join(said + ([] if strength is None else [f"{strength:g}"]))
