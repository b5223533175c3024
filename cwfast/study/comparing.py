"""Who wins where: cells beside each other on the same models and samples, and curves at equal utility."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
TAILS = (0.025, 0.975)
SHARED = (
    "undefended",
    "early stopping",
    "early stopping by the reference set",
    "interpolation",
)  # stand beside any base
DROPS = (0.01, 0.0)  # test accuracy that may be given up, against the undefended models
TOLERANCE = 1e-12  # of rounding, where a curve's accuracy is the level itself
NEAR_BEST = (0.03, 0.01)  # and against the best of all cells


@dataclass(frozen=True)
class Measured:
    """One cell over the seeds of one data set; the same seeds for all that are compared.

    Attributes:
        row: what the report says of it.
        accuracy: [seeds, models]: on the test set.
        auc: [seeds].
        draws: [seeds, replicates]: of the AUC, in pairs with those of other cells.
    """

    row: Mapping[str, Any]
    accuracy: Floats
    auc: Floats
    draws: Floats


def interval(draws: Floats) -> tuple[float, float]:
    """95%, of replicates."""
    low, high = np.quantile(draws, TAILS)
    return float(low), float(high)


def beside(one: Measured, other: Measured) -> dict[str, Any]:
    """One cell less another, both on the same models and samples.

    Returns:
        ``auc``, ``auc_low``, ``auc_high`` (paired bootstrap over samples), ``accuracy``, ``accuracy_low``,
        ``accuracy_high`` (normal, over models) and ``verdict``: "better" (lower AUC, accuracy not lower), "worse"
        (higher AUC, accuracy not higher), "trade" (both lower, or both higher), "even" (the AUCs are not told apart).
        Lower and higher: the interval leaves out 0.
    """
    low, high = interval((one.draws - other.draws).mean(axis=0))
    gain = (one.accuracy - other.accuracy).ravel()
    half = 1.96 * float(gain.std(ddof=1)) / gain.size**0.5 if gain.size > 1 else 0.0
    mean = float(gain.mean())
    if low <= 0 <= high:
        verdict = "even"
    elif high < 0:
        verdict = "trade" if mean + half < 0 else "better"
    else:
        verdict = "trade" if mean - half > 0 else "worse"
    return {
        "auc": float((one.auc - other.auc).mean()), "auc_low": low, "auc_high": high,
        "accuracy": mean, "accuracy_low": mean - half, "accuracy_high": mean + half, "verdict": verdict,
    }  # fmt: skip


def pairs(cells: Sequence[Measured], base: str) -> list[dict[str, Any]]:
    """Each CWRF cell of a base beside the same fine-tuning without rewinding, and beside random weights."""
    mine = [cell for cell in cells if cell.row["base"] == base]
    plain = next((cell for cell in mine if cell.row["curve"] == "fine-tuning without rewinding"), None)
    found = []
    for cell in mine:
        criterion, rate = cell.row["curve"], cell.row["rate"]
        if criterion != cell.row["criterion"]:
            continue
        random = next((c for c in mine if c.row["curve"] == "random" and c.row["rate"] == rate), None)
        rivals = {"without rewinding": plain, "random weights": random}
        found += [
            {"criterion": criterion, "rate": rate, "against": name, **beside(cell, rival)}
            for name, rival in rivals.items()
            if rival is not None and rival is not cell
        ]
    return found


def at_equal_utility(cells: Sequence[Measured], base: str) -> list[dict[str, Any]]:
    """At several levels of test accuracy: the lowest AUC of each curve, its setting chosen on the other seeds.

    With several seeds the setting (rate, alpha, epochs...) is the best on the other seeds, and measured on the seed
    that is left out, in turn: choosing by luck is not rewarded. With a single seed it is chosen where it is measured.

    Returns:
        For each level: ``level`` (in words), ``accuracy`` (mean over seeds) and ``curves``, the lowest AUC first, each
        with ``auc``, its interval, ``accuracy``, ``settings`` (as chosen for each seed), and ``behind``: its AUC less
        that of the first, with interval. ``short``: curves whose settings reach the level on the seeds that they are
        chosen on and not on those left out, with what they lack; they are not ranked.
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
    own = undefended.accuracy.mean(axis=1)
    best = np.max([cell.accuracy.mean(axis=1) for curve in curves.values() for cell in curve], axis=0)
    levels = {("the undefended accuracy" if not drop else f"{100 * drop:g} point less than undefended"): own - drop
              for drop in DROPS}  # fmt: skip
    for drop in NEAR_BEST:
        levels[f"{100 * drop:g} point{'s' * (drop > 0.01)} less than the best of all"] = best - drop
    found = []
    for words, level in levels.items():
        reached = {name: _chosen(curve, level) for name, curve in curves.items()}
        able = [value | {"curve": name} for name, value in reached.items() if value]
        ranked = sorted((value for value in able if value["short"] <= TOLERANCE), key=_by_auc)
        for value in ranked:
            low, high = interval(value["draws"] - ranked[0]["draws"])
            value["behind"] = {"auc": value["auc"] - ranked[0]["auc"], "auc_low": low, "auc_high": high}
        told = [{name: value[name] for name in value if name != "draws"} for value in ranked]
        short = {value["curve"]: value["short"] for value in able if value["short"] > TOLERANCE}
        found.append({"level": words, "accuracy": float(level.mean()), "curves": told, "short": short})
    return found


_by_auc: Callable[[Mapping[str, Any]], float] = lambda value: value["auc"]  # noqa: E731


def _chosen(curve: Sequence[Measured], level: Floats) -> dict[str, Any] | None:
    """A curve's setting of the lowest AUC at no less than a level; None where none reaches it."""
    seeds = range(len(level))
    picked = []
    for seed in seeds:
        others = [s for s in seeds if s != seed] or [seed]
        able = [c for c in curve if (c.accuracy.mean(axis=1) - level)[others].mean() >= 0]
        if not able:
            return None
        picked.append(min(able, key=lambda cell: float(cell.auc[others].mean())))
    draws = np.mean([cell.draws[seed] for seed, cell in enumerate(picked)], axis=0)
    low, high = interval(draws)
    return {
        "auc": float(np.mean([cell.auc[seed] for seed, cell in enumerate(picked)])),
        "auc_low": low,
        "auc_high": high,
        "accuracy": float(np.mean([cell.accuracy[seed].mean() for seed, cell in enumerate(picked)])),
        "short": float(np.mean([level[seed] - cell.accuracy[seed].mean() for seed, cell in enumerate(picked)])),
        "settings": [cell.row["label"] for cell in picked],
        "draws": draws,
    }
