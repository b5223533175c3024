"""What the rows of a defended language model say, in sentences made from their figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cwfast.report.table import interval, number

Row = Mapping[str, Any]
MAIN = "reference"  # chosen beforehand: the attack of the curve
STRONGEST = "strongest"  # whichever attack has the highest AUC on a model
SLACK = 0.01  # a perplexity higher by so much counts as equal


def attack_of(row: Row, name: str) -> str:
    """The attack itself where ``name`` is ``STRONGEST``."""
    return max(row["attacks"], key=lambda one: row["attacks"][one]["auc"]) if name == STRONGEST else name


def auc(row: Row, name: str = MAIN) -> float:
    """Of an attack on a row's model."""
    return row["attacks"][attack_of(row, name)]["auc"]


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
            f"difference {_signed(found)}."
        )
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
        sentences.append(
            f"{undefended['label']}: perplexity {_perplexity(undefended)}, {_attacks(undefended)}. "
            "An AUC of 0.5 is a coin toss."
        )
        for title, groups in (("CWRF", ("cwrf",)), ("everything else", ("control", "baseline"))):
            able = [r for r in here if r["group"] in groups and _no_worse(r, undefended)]
            if able:
                best = min(able, key=auc)
                sentences.append(
                    f"Lowest AUC of the {MAIN} attack by {title} at no more than the undefended perplexity (+1%): "
                    f"{best['label']}, perplexity {_perplexity(best)}, {_attacks(best)}; against undefended "
                    f"{_signed(difference(best, undefended, MAIN))}."
                )
            else:
                sentences.append(f"No row of {title} keeps the undefended perplexity (+1%).")
        for name in (MAIN, STRONGEST):
            sentences.append(_who_wins(matched(here, name), name))
    sentences.append(
        "Best rows and best rivals were found by looking, which flatters the side with more rows. One model, one "
        "training run, one split of the texts: the intervals are over texts only; how far another run would move these "
        "figures is not known."
    )
    return sentences


def matched(rows: Sequence[Row], name: str) -> list[dict[str, Any]]:
    """Each CWRF row beside the rival with the lowest AUC among the other rows of no higher perplexity (+1%).

    Args:
        rows: of one start.
        name: an attack, or ``STRONGEST``.

    Returns:
        ``row``, ``rival`` (None where no other row has so low a perplexity), ``auc``, ``auc_low``, ``auc_high`` (of the
        difference, row minus rival: below 0 the row wins) and ``verdict``: "ahead", "behind" or "not told apart" by
        that interval, "alone" without a rival.
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
        if apart["auc_high"] < 0 or apart["auc_low"] > 0:
            verdict = "ahead" if apart["auc_high"] < 0 else "behind"
        found.append({"row": row, "rival": rival, "verdict": verdict, **apart})
    return found


def difference(one: Row, other: Row, name: str) -> dict[str, float]:
    """AUC of the first less that of the second, with a 95% interval over texts: replicates come in pairs."""
    draws = [np.array(row["draws"][attack_of(row, name)]) for row in (one, other)]
    low, high = np.quantile(draws[0] - draws[1], [0.025, 0.975]).tolist()
    return {"auc": auc(one, name) - auc(other, name), "auc_low": low, "auc_high": high}


def _who_wins(pairs: Sequence[Mapping[str, Any]], name: str) -> str:
    what = f"the {name} attack" + (" on each model" if name == STRONGEST else "")
    counts = {verdict: sum(pair["verdict"] == verdict for pair in pairs) for verdict in ("ahead", "behind", "alone")}
    text = (
        f"At matched perplexity (no higher than the row's +1%), by {what}: {counts['ahead']} of {len(pairs)} CWRF "
        f"rows are ahead of every other row, {counts['behind']} are behind some, "
        f"{len(pairs) - sum(counts.values())} are not told apart from the best rival"
    )
    text += f", {counts['alone']} have no rival." if counts["alone"] else "."
    decided = [pair for pair in pairs if pair["rival"] is not None]
    if decided:
        best = min(decided, key=lambda pair: pair["auc"])
        text += (
            f" Widest margin: {best['row']['label']} (perplexity {number(best['row']['perplexity'], 2)}) against "
            f"{best['rival']['label']} ({number(best['rival']['perplexity'], 2)}), {_signed(best)}."
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


def _signed(found: Mapping[str, Any]) -> str:
    return f"{found['auc']:+.3f} [{found['auc_low']:+.3f}, {found['auc_high']:+.3f}]"
