"""The small tables of a study as texts: title, heads, rows; the page and the Markdown take theirs from here."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cwfast.report import paper
from cwfast.report.privacy import HEAD, STATEMENT, privacy_rows
from cwfast.report.table import MAIN_ATTACK, count, interval, number, percent


class Table(NamedTuple):
    """A table of texts; the first column names its rows."""

    title: str
    head: list[str]
    rows: list[list[str]]


def tables(part: Mapping[str, Any]) -> list[Table]:
    """Of one data set: the ablations attacked, then those of the paper's tables that were made."""
    found = []
    rows = [row for row in part["rows"] if row["curve"].startswith("ablation") or _beside(part, row)]
    if any(row["curve"].startswith("ablation") for row in rows):
        found.append(
            Table(
                "Variants of CWRF, attacked",
                ["models", "train loss", "test loss", "train acc", "test acc", "LiRA AUC [low, high]", "RMIA AUC"],
                [_variant(row) for row in rows],
            )
        )
    private = privacy_rows(part["rows"])
    if private:
        found.append(Table("DP-SGD: what it spent, and of what that is a guarantee", HEAD, private))
    for table in part["tables"]:
        found += _ablation(table) if "loss" in table else _entanglement(table)
    return found


def notes(part: Mapping[str, Any]) -> list[str]:
    """What to compare these tables with."""
    ablations = {table["network"]: table for table in part["tables"] if "loss" in table}
    entanglements = {table["network"]: table for table in part["tables"] if "loss" not in table}
    private = [STATEMENT] if privacy_rows(part["rows"]) else []
    return private + [
        " ".join(make(found))
        for make, found in ((paper.ablation_notes, ablations), (paper.entanglement_notes, entanglements))
        if found
    ]


def _beside(part: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """The undefended models and RelaxLoss (of any strength) without rewinding, for comparison."""
    plain = row["curve"] == "fine-tuning without rewinding" and row["base"] == "relaxloss"
    return row["curve"] == "undefended" or plain


def _variant(row: Mapping[str, Any]) -> list[str]:
    attacks = row["attacks"]
    return [
        row["label"], number(row["train_loss"]), number(row["test_loss"]), number(row["train_accuracy"]),
        number(row["test_accuracy"]), interval(attacks[MAIN_ATTACK]), number(attacks["rmia"]["auc"]),
    ]  # fmt: skip


def _ablation(table: Mapping[str, Any]) -> list[Table]:
    title = (
        f"Ablation, {table['network']}: {percent(table['rate'])} by {table['criterion']} ({table['granularity']}), "
        f"{table['loss']}, {table['models']} models"
    )
    names = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    rows = [[row["label"], *(number(row[name]) for name in names)] for row in table["rows"]]
    return [Table(title, ["models", *(name.replace("_", " ") for name in names)], rows)]


def _entanglement(table: Mapping[str, Any]) -> list[Table]:
    of = f"{table['network']}, {table['models']} models of {count(table['weights'])} weights"
    correlations = [
        [group, percent(one["share"]), number(one["mean"]), ", ".join(number(value) for value in one["pearson"])]
        for group, one in table["correlation"].items()
    ]
    held = [[name, *(percent(top["mean"]) for top in tops)] for name, tops in table["concentration"].items()]
    tops = next(iter(table["concentration"].values()))
    layers = [
        [
            row["layer"],
            count(row["weights"]),
            count(row["critical"]),
            _small(row["moved_critical"]),
            _small(row["moved_rest"]),
        ]
        for row in table["layers"]
    ]
    names = table["overlap"]["names"]
    return [
        Table(f"Vulnerability (taylor) and learnability, Pearson's correlation: {of}",
              ["weights of", "share", "correlation", "of each model"], correlations),
        Table(f"Share of the whole score in the largest: {table['network']}",
              ["score", *(percent(top["top"]) for top in tops)], held),
        Table(f"Top {percent(table['rate'])} by taylor, and how far training moved the weights: {table['network']}",
              ["layer", "weights", "critical", "moved, critical", "moved, others"], layers),
        Table(f"Overlap (Jaccard) of the top {percent(table['rate'])}: {table['network']}", ["criterion", *names],
              _matrix(names, table["overlap"]["jaccard"])),
    ]  # fmt: skip


def _matrix(names: Sequence[str], values: Sequence[Sequence[float]]) -> list[list[str]]:
    return [[name, *(number(value, 2) for value in row)] for name, row in zip(names, values, strict=True)]


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
