"""What the rows of a defended language model say, in sentences made from their figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cwfast.report.table import interval, number

Row = Mapping[str, Any]
MAIN = "reference"  # chosen beforehand: the attack of the curve
STRONGEST = "strongest"  # whichever attack tells most of a model
SLACK = 0.01  # a perplexity higher by so much counts as equal
TURNED = (
    "An AUC of 0.5 is a coin toss. One below 0.5 leaks as much as one above: AUCs are compared, and differences taken, "
    "as max(AUC, 1 - AUC)."
)


def attack_of(row: Row, name: str) -> str:
    """The attack itself where ``name`` is ``STRONGEST``."""
    return max(row["attacks"], key=lambda one: auc(row, one)) if name == STRONGEST else name


def auc(row: Row, name: str = MAIN) -> float:
    """Of an attack on a row's model, or 1 less it: whoever is wrong more often than not need only be turned around."""
    found = row["attacks"][attack_of(row, name)]["auc"]
    return max(found, 1 - found)


def before_and_after(rows: Sequence[Row]) -> list[str]:
    """Sentences on a base model, its fine-tuned model and the defended one, in this order."""
    _, before, after = rows
    sentences = [
        f"Held-out perplexity: {_perplexity(before)} before the defense, {_perplexity(after)} after; "
        f"{number(rows[0]['perplexity'], 2)} before any fine-tuning."
    ]
    for name in before["attacks"]:
        found = difference(after, before, name)
        sentences.append(
            f"{name}: AUC {interval(before['attacks'][name])} before, {interval(after['attacks'][name])} after, "
            f"difference {signed(found)}."
        )
    if after["alpha"] is not None:
        reached = after["loss"]["members"]
        sentences.append(
            f"The steps aimed at a member loss of {after['alpha']:.2f}; it is {reached:.2f} "
            f"({reached - after['alpha']:+.2f})."
        )
    sentences.append(TURNED)
    sentences.append("One model and one set of texts: intervals tell how far other texts would move these figures.")
    return sentences


def reading(rows: Sequence[Row]) -> list[str]:
    """Sentences on a demo's rows: for each start the undefended model, the best of each group, who wins at matched
    perplexity.
    """
    sentences = []
    for start in dict.fromkeys(row["start"] for row in rows if row["start"]):
        here = [row for row in rows if row["start"] in (start, None)]
        undefended = next((row for row in here if row["group"] == "undefended"), None)
        if undefended is None:
            continue
        sentences.append(f"{undefended['label']}: perplexity {_perplexity(undefended)}, {_attacks(undefended)}.")
        for title, groups in (("CWRF", ("cwrf",)), ("everything else", ("control", "baseline"))):
            able = [r for r in here if r["group"] in groups and _no_worse(r, undefended)]
            if able:
                best = min(able, key=auc)
                sentences.append(
                    f"Lowest AUC of the {MAIN} attack by {title} at no more than the undefended perplexity (+1%): "
                    f"{best['label']}, perplexity {_perplexity(best)}, {_attacks(best)}; against undefended "
                    f"{signed(difference(best, undefended, MAIN))}."
                )
            else:
                sentences.append(f"No row of {title} keeps the undefended perplexity (+1%).")
        for name in (MAIN, STRONGEST):
            sentences.append(_who_wins(matched(here, name), name))
    sentences.append(TURNED)
    sentences.append("Only scoring by gap and taylor_delta saw the reference texts; no control and no baseline did.")
    sentences.append(
        "Best rows and best rivals were found by looking, which flatters the side with more rows, and intervals are "
        "not corrected for the number of rows. One model, one training run, one split of the texts: the intervals "
        "are over texts only; how far another run would move these figures is not known."
    )
    return sentences


def matched(rows: Sequence[Row], name: str) -> list[dict[str, Any]]:
    """Each CWRF row beside the rival with the lowest AUC among the other rows of no higher perplexity (+1%).

    Args:
        rows: of one start.
        name: an attack, or ``STRONGEST``.

    Returns:
        ``row``, ``rival`` (None where no other row has so low a perplexity), what ``difference`` gives (row minus
        rival: below 0 the row wins) and ``verdict``: "ahead", "behind" or "not told apart" by the interval, "not
        judged" where there is none, "alone" without a rival.
    """
    found: list[dict[str, Any]] = []
    for row in (row for row in rows if row["group"] == "cwrf"):
        rivals = [r for r in rows if r["group"] != "cwrf" and _no_worse(r, row)]
        if not rivals:
            found.append({"row": row, "rival": None, "verdict": "alone"})
            continue
        rival = min(rivals, key=lambda one: auc(one, name))
        apart = difference(row, rival, name)
        verdict = "not told apart"
        if name == STRONGEST:
            verdict = "not judged"
        elif apart["auc_high"] < 0 or apart["auc_low"] > 0:
            verdict = "ahead" if apart["auc_high"] < 0 else "behind"
        found.append({"row": row, "rival": rival, "verdict": verdict, **apart})
    return found


def difference(one: Row, other: Row, name: str) -> dict[str, float]:
    """AUC of the first less that of the second (``auc``), with a 95% interval over texts: replicates come in pairs.

    ``STRONGEST`` gets no interval. Its attack is chosen by its AUC and so is flattered, the more so the less the
    attacks agree: neither the chosen attacks' replicates nor the maximum within each need keep to 5% of false verdicts.
    """
    apart = {"auc": auc(one, name) - auc(other, name)}
    if name == STRONGEST:
        return apart
    draws = [np.array(row["draws"][name]) for row in (one, other)]
    told = [np.maximum(some, 1 - some) for some in draws]
    low, high = np.quantile(told[0] - told[1], [0.025, 0.975]).tolist()
    return {**apart, "auc_low": low, "auc_high": high}


def _who_wins(pairs: Sequence[Mapping[str, Any]], name: str) -> str:
    text = "At matched perplexity (no higher than the row's +1%), "
    if name == STRONGEST:
        text += "by the strongest attack on each model: not judged, as that attack is chosen by what it found."
    else:
        told = [pair["verdict"] for pair in pairs]
        ahead, behind, level, alone = map(told.count, ("ahead", "behind", "not told apart", "alone"))
        text += f"by the {name} attack: {ahead} of {len(pairs)} CWRF rows are ahead of the best rival, {behind} are "
        text += f"behind it, {level} are not told apart from it" + (f", {alone} have no rival." if alone else ".")
    decided = [pair for pair in pairs if pair["rival"] is not None]
    if decided:
        best = min(decided, key=lambda pair: pair["auc"])
        text += (
            f" Widest margin: {best['row']['label']} (perplexity {number(best['row']['perplexity'], 2)}) against "
            f"{best['rival']['label']} ({number(best['rival']['perplexity'], 2)}), {signed(best)}."
        )
    return text


def _no_worse(row: Row, than: Row) -> bool:
    return row is not than and row["perplexity"] <= (1 + SLACK) * than["perplexity"]


def _perplexity(row: Row) -> str:
    return f"{row['perplexity']:.2f} [{row['perplexity_low']:.2f}, {row['perplexity_high']:.2f}]"


def _attacks(row: Row) -> str:
    top = attack_of(row, STRONGEST)
    text = f"AUC of the {MAIN} attack {interval(row['attacks'][MAIN])}"
    return text if top == MAIN else f"{text}, of the strongest, {top}, {interval(row['attacks'][top])}"


def signed(found: Mapping[str, Any]) -> str:
    """What ``difference`` gives, as text."""
    spread = f" [{found['auc_low']:+.3f}, {found['auc_high']:+.3f}]" if "auc_low" in found else ""
    return f"{found['auc']:+.3f}{spread}"
