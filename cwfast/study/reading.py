"""What a study's figures say, in sentences made from them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cwfast.study.comparing import MARGIN, VERDICTS, is_cwrf
from cwfast.study.presets import DEFENSES

Level = Mapping[str, Any]
Levels = Sequence[Level]
ALONE = "With one seed, each curve's setting is chosen where it is measured: that flatters curves of many points."
UNRANKED = (
    "DP-SGD from scratch is not ranked: its epsilon covers the released model, that of fine-tuning does not, and its "
    "learning rate was not tuned. Nothing here says that CWRF does better than DP-SGD."
)


def reading(part: Mapping[str, Any]) -> list[str]:
    """What was found on one data set, in sentences made from the figures."""
    said = _lead(part["levels"])
    if said:
        said.append(
            f"Levels are reached by point estimate, on {part['samples']['test']} test samples: see the accuracies' "
            "intervals."
        )
        said += [ALONE] * (len(part["seeds"]) == 1) + [UNRANKED] * ("dpsgd" in part["levels"])
    for base, levels in part["levels"].items():
        said += [_at_level(_base(base), level) for level in levels if level["curves"] or level["short"]]
        said += _by_rate(_base(base), part["pairs"][base])
    return said


def verdicts(levels_of: Mapping[str, Levels]) -> dict[str, str]:
    """For each base: who has the lowest AUC at no less than some accuracy, and how CWRF stands to the best without it.

    Args:
        levels_of: by base, ``comparing.at_levels``.
    """
    told = {base: [level for level in levels if level["curves"]] for base, levels in levels_of.items()}
    return {base: _verdict(_base(base), levels) for base, levels in told.items() if levels}


def place(level: Level) -> str:
    """How the best curve of CWRF stands to the best one without it: one of ``VERDICTS``, or why it does not."""
    if level["ours"] is not None:
        return str(level["ours"]["verdict"])
    return NO_RIVAL if any(one["cwrf"] for one in level["curves"]) else BELOW


NO_RIVAL, BELOW = "without a rival", "not at the level"


def _verdict(base: str, levels: Levels) -> str:
    first = Counter(named(level["curves"][0]["curve"]) for level in levels)
    winners = ", ".join(f"{name} at {n}" for name, n in first.most_common())
    places = Counter(place(level) for level in levels)
    ours = ", ".join(f"{where} at {places[where]}" + _gaps(levels, where)
                     for where in (*VERDICTS, NO_RIVAL, BELOW) if places[where])  # fmt: skip
    of = f"{len(levels)} levels" if len(levels) > 1 else "one level"
    return (
        f"{base}: lowest AUC at no less than an accuracy ({of}): {winners}. CWRF against the best without it: {ours}."
    )


def _gaps(levels: Levels, where: str) -> str:
    """The differences in accuracy that are larger than the margin."""
    ours = [level["ours"] for level in levels if place(level) == where and level["ours"] is not None]
    far = [f"{one['accuracy']:+.3f}" for one in ours if abs(one["accuracy"]) > MARGIN]
    return f" (accuracy {', '.join(far)})" if far else ""


def _lead(levels_of: Mapping[str, Levels]) -> list[str]:
    """By how many choices of settings each curve is the first somewhere, or not told apart from it."""
    levels = [level for several in levels_of.values() for level in several if level["curves"]]
    if not levels:
        return []
    first = dict.fromkeys(_choice(level["curves"][0]) for level in levels)  # in order, which a set has not
    near = dict.fromkeys(_choice(one) for level in levels for one in level["curves"] if one["behind"]["auc_low"] <= 0)
    firsts, nears = (Counter(curve for curve, *_ in choices) for choices in (first, near))
    told = "; ".join(f"{named(curve)} {firsts[curve]} ({n})" for curve, n in nears.most_common(6))
    return [
        "Curves that have the lowest LiRA AUC at no less than some accuracy, and with how many different choices of "
        f"settings; in brackets, with how many they are not told apart from the lowest, or are it: {told}. Levels and "
        "base defenses share models: these are not so many independent findings."
    ]


def _choice(one: Mapping[str, Any]) -> tuple[str, ...]:
    return (one["curve"], *one["settings"])


def named(curve: str) -> str:
    """A curve, as sentences call it."""
    own = {"from scratch": "the base defense from scratch"}
    return own.get(curve, f"CWRF by {curve}" if is_cwrf(curve) else curve)


def _base(base: str) -> str:
    return "Fine-tuning by DP-SGD" if base == "dpsgd" else DEFENSES[base]


def _at_level(base: str, level: Level) -> str:
    text = f"{base}, at no less than {level['level']}: "
    if level["curves"]:
        first, *rest = level["curves"]
        close = [named(one["curve"]) for one in rest if one["behind"]["auc_low"] <= 0]
        behind = [one for one in rest if one["behind"]["auc_low"] > 0]
        text += f"lowest LiRA AUC: {named(first['curve'])}, {_figures(first)}"
        if close:
            text += f"; not told apart from it: {', '.join(close)}"
        if behind:
            text += "; behind by " + ", ".join(f"{one['behind']['auc']:.3f} {named(one['curve'])}" for one in behind)
    else:
        text += "nothing"
    ours = level["ours"]
    if ours is not None:
        text += f"; {named(ours['curve'])} less {named(ours['against'])}: {_figures(ours, sign='+')}: {ours['verdict']}"
    if level["short"]:
        text += "; not ranked, as no setting reaches the level or those chosen miss it on the seeds left out: "
        text += ", ".join(f"{named(curve)} by {by:.3f}" for curve, by in level["short"].items())
    return text + "."


def _figures(one: Mapping[str, Any], sign: str = "") -> str:
    def told(name: str) -> str:
        return f"{one[name]:{sign}.3f} [{one[name + '_low']:{sign}.3f}, {one[name + '_high']:{sign}.3f}]"

    return f"AUC {told('auc')}, accuracy {told('accuracy')}"


def _by_rate(base: str, pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    said = []
    for criterion in dict.fromkeys(pair["criterion"] for pair in pairs):
        for against in dict.fromkeys(pair["against"] for pair in pairs):
            mine = [pair for pair in pairs if (pair["criterion"], pair["against"]) == (criterion, against)]
            if not mine:
                continue
            by = {verdict: [_rate(pair) for pair in mine if pair["verdict"] == verdict] for verdict in VERDICTS}
            told = "; ".join(f"{verdict} at {', '.join(rates)}" for verdict, rates in by.items() if rates)
            said.append(f"{base}, CWRF by {criterion} against {against}: {told}.")
    return said


def _rate(pair: Mapping[str, Any]) -> str:
    strength = "" if pair["strength"] is None else f" (strength {pair['strength']:g})"
    return f"{100 * pair['rate']:.3g}%{strength}"
