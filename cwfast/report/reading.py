"""What the figures of a report say, in sentences made from them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cwfast.report.table import MAIN_ATTACK, interval, number

Row = Mapping[str, Any]
CONTROLS = {"random": "random masks of the same counts", "distance": "interpolation to the same distance"}
GROUPS = {"cwrf": "CWRF", "baseline": "the baselines", "control": "the controls"}


def reading(rows: Sequence[Row], *, quick: bool = False) -> list[str]:
    """Sentences on a demo's rows.

    The best row of each group that keeps the undefended accuracy (found by looking, and said so); how many rows of
    other groups beat CWRF's on both counts; and how each criterion fares against its paired controls.

    Args:
        quick: say first that the run was too small for conclusions.
        rows: of the report; the ids of a CWRF row's controls differ from its own in the first word only.
    """
    undefended = next(row for row in rows if row["id"] == "undefended")
    sentences = ["A quick run, for a first look: no conclusions from it; a full one may say the opposite."] * quick
    sentences += [f"Undefended: {_text(undefended)}. An AUC of 0.5 is a coin toss."]
    for group, name in GROUPS.items():
        useful = [row for row in _of(rows, group) if row["test_accuracy"] >= undefended["test_accuracy"]]
        useful = [row for row in useful if row is not undefended]
        if useful:
            best = min(useful, key=_auc)
            sentences.append(
                f"Lowest LiRA AUC of {name} at no less than the undefended accuracy: {best['label']}, {_text(best)}."
            )
    sentences.append(
        "These best rows were found by looking at the results, which flatters every group: read the curves."
    )
    ours, others = _of(rows, "cwrf"), [row for row in rows if row["group"] != "cwrf"]
    beaten = {row["id"]: [other for other in others if _beats(other, row)] for row in ours}
    winners = {other["label"] for several in beaten.values() for other in several}
    lost = sum(bool(several) for several in beaten.values())
    sentences.append(
        f"{lost} of {len(ours)} CWRF rows are beaten on both counts (LiRA AUC and test accuracy) by some other row"
        + (f", among them: {', '.join(sorted(winners)[:3])}." if winners else ".")
    )
    by_id = {row["id"]: row for row in rows}
    for criterion in dict.fromkeys(row["criterion"] for row in ours):
        for control, name in CONTROLS.items():
            pairs = [
                (row, by_id[other])
                for row in ours
                if row["criterion"] == criterion and (other := row["id"].replace("cwrf", control, 1)) in by_id
            ]
            if pairs:
                sentences.append(_paired(criterion, name, pairs))
    return sentences


def _paired(criterion: str, control: str, pairs: Sequence[tuple[Row, Row]]) -> str:
    def count(holds: Callable[[Row, Row], bool]) -> int:
        return sum(holds(ours, theirs) for ours, theirs in pairs)

    return (
        f"CWRF by {criterion} against {control}, at equal rate, loss and steps: lower LiRA AUC in "
        f"{count(lambda a, b: _auc(a) < _auc(b))} of {len(pairs)} pairs, higher test accuracy in "
        f"{count(lambda a, b: a['test_accuracy'] > b['test_accuracy'])}, both in {count(_beats)}."
    )


def _of(rows: Sequence[Row], group: str) -> list[Row]:
    return [row for row in rows if row["group"] == group]


def _auc(row: Row) -> float:
    return row["attacks"][MAIN_ATTACK]["auc"]


def _beats(a: Row, b: Row) -> bool:
    return _auc(a) < _auc(b) and a["test_accuracy"] > b["test_accuracy"]


def _text(row: Row) -> str:
    return f"test accuracy {number(row['test_accuracy'])}, LiRA AUC {interval(row['attacks'][MAIN_ATTACK])}"
