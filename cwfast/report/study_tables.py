"""The small tables of a study as texts: title, heads, rows; the page and the Markdown take theirs from here."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cwfast.report.table import MAIN_ATTACK, count, interval, number, percent


class Table(NamedTuple):
    """A table of texts; the first column names its rows."""

    title: str
    head: list[str]
    rows: list[list[str]]


PAPER = {  # Fang & Kim, ICLR 2026, as far as their figures are known here: a direction to compare with
    "ablation": "The paper (CIFAR-10, ResNet18; train / test loss): A1 reaches an accuracy of 0.1 to 5%; A2 "
    "0.43 / 0.93; A3 0.45 / 0.80; RelaxLoss from scratch 0.81 / 1.54. These networks and data are small: compare "
    "directions alone.",
    "entanglement": "The paper's correlations: ResNet18 0.94 conv, 0.81 linear, 0.68 norm, 0.83 all; ViT 0.91 for "
    "attention and MLP, 0.86 linear, 0.73 norm, 0.77 all. These networks and data are small: compare directions alone.",
}


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
    for table in part["tables"]:
        found += _ablation(table) if "loss" in table else _entanglement(table)
    return found


def notes(part: Mapping[str, Any]) -> list[str]:
    """What to compare these tables with."""
    kinds = ("ablation" if "loss" in table else "entanglement" for table in part["tables"])
    return [PAPER[kind] for kind in dict.fromkeys(kinds)]


def _beside(part: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """The undefended models and RelaxLoss without rewinding, for comparison."""
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
