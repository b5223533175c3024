"""What a study's figures say, in sentences made from them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cwfast.study.comparing import VERDICTS, is_cwrf
from cwfast.study.presets import DEFENSES

Levels = Sequence[Mapping[str, Any]]


def reading(part: Mapping[str, Any]) -> list[str]:
    """What was found on one data set, in sentences made from the figures."""
    said = _lead(part["levels"])
    if len(part["seeds"]) == 1 and said:
        said.append(
            "With one seed, each curve's setting is chosen where it is measured: that flatters curves of many points."
        )
    for base, levels in part["levels"].items():
        for level in levels:
            if level["curves"]:
                said.append(_at_level(DEFENSES[base], level))
        said += _by_rate(DEFENSES[base], part["pairs"][base])
    return said


def verdicts(levels_of: Mapping[str, Levels]) -> dict[str, str]:
    """For each base: who has the lowest AUC at equal utility, and whether CWRF is told apart from the best without it.

    Args:
        levels_of: by base, ``comparing.at_equal_utility``.
    """
    found = {}
    for base, levels in levels_of.items():
        told = [level["curves"] for level in levels if level["curves"]]
        if told:
            found[base] = _verdict(DEFENSES[base], told)
    return found


def _verdict(base: str, levels: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    first = Counter(_named(curves[0]["curve"]) for curves in levels)
    winners = ", ".join(f"{name} at {n}" for name, n in first.most_common())
    places = Counter(_place(curves) for curves in levels)
    ours = ", ".join(f"{place} at {places[place]}" for place in PLACES if places[place])
    lowest = f"lowest AUC at equal utility ({len(levels)} levels): {winners}"
    return f"{base}: {lowest}. CWRF against the best curve without it: {ours}."


PLACES = (
    "ahead",
    "first but not told apart",
    "not first but not told apart",
    "behind",
    "without a rival",
    "below the level",
)


def _place(curves: Sequence[Mapping[str, Any]]) -> str:
    """Where the best curve of CWRF stands; ``curves``: of one level, the lowest AUC first."""
    ours = next((one for one in curves if one["cwrf"]), None)
    best = next((one for one in curves if not one["cwrf"]), None)
    if ours is None:
        return "below the level"
    if best is None:
        return "without a rival"
    second = best if ours is curves[0] else ours
    apart = second["behind"]["auc_low"] > 0
    if ours is curves[0]:
        return "ahead" if apart else "first but not told apart"
    return "behind" if apart else "not first but not told apart"


def _lead(levels_of: Mapping[str, Levels]) -> list[str]:
    """How often each curve is the first, or not told apart from it."""
    levels = [level for levels in levels_of.values() for level in levels if level["curves"]]
    if not levels:
        return []
    first, near = Counter[str](), Counter[str]()
    for level in levels:
        first[level["curves"][0]["curve"]] += 1
        near.update(one["curve"] for one in level["curves"] if one["behind"]["auc_low"] <= 0)
    told = "; ".join(f"{_named(curve)} {first[curve]} ({n})" for curve, n in near.most_common(6))
    where = f"{len(levels_of)} base defense{'s' * (len(levels_of) > 1)}, {len(levels) // len(levels_of)} levels each"
    comparisons = f"{len(levels)} comparisons: {where}"
    return [
        f"At equal utility ({comparisons}), how often the lowest LiRA AUC was that of a curve, in brackets how often "
        f"that or not told apart from it: {told}."
    ]


def _named(curve: str) -> str:
    own = {"from scratch": "the base defense from scratch"}
    return own.get(curve, f"CWRF by {curve}" if is_cwrf(curve) else curve)


def _at_level(base: str, level: Mapping[str, Any]) -> str:
    first, *rest = level["curves"]
    close = [_named(one["curve"]) for one in rest if one["behind"]["auc_low"] <= 0]
    behind = [one for one in rest if one["behind"]["auc_low"] > 0]
    text = (
        f"{base}, at no less than {level['level']} ({level['accuracy']:.3f}): lowest LiRA AUC: "
        f"{_named(first['curve'])}, {first['auc']:.3f} [{first['auc_low']:.3f}, {first['auc_high']:.3f}] "
        f"at accuracy {first['accuracy']:.3f}"
    )
    if close:
        text += f"; not told apart from it: {', '.join(close)}"
    if behind:
        text += "; behind by " + ", ".join(f"{one['behind']['auc']:.3f} {_named(one['curve'])}" for one in behind)
    if level["short"]:
        text += "; not ranked, as below the level where they were not chosen: "
        text += ", ".join(f"{_named(curve)} by {by:.3f}" for curve, by in level["short"].items())
    return text + "."


def _by_rate(base: str, pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    said = []
    for criterion in dict.fromkeys(pair["criterion"] for pair in pairs):
        for against in dict.fromkeys(pair["against"] for pair in pairs):
            mine = [pair for pair in pairs if (pair["criterion"], pair["against"]) == (criterion, against)]
            if not mine:
                continue
            by = {
                verdict: [f"{100 * pair['rate']:.3g}%" for pair in mine if pair["verdict"] == verdict]
                for verdict in VERDICTS
            }
            told = "; ".join(f"{verdict} at {', '.join(rates)}" for verdict, rates in by.items() if rates)
            said.append(f"{base}, CWRF by {criterion} against {against}: {told}.")
    return said
