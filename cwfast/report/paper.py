"""How the results of ``cwfast.defense.experiments`` compare in direction with what the paper printed."""

from collections.abc import Mapping
from typing import Any

from cwfast.report.table import number

# Fang & Kim, ICLR 2026: Pearson's correlation of vulnerability and learnability (table 1; CIFAR-10, full-size networks)
# and losses of the ablations (ResNet18, 3% of the weights, RelaxLoss).
CORRELATIONS = {
    "ResNet18": {"conv": 0.9410, "linear": 0.8096, "norm": 0.6776, "all": 0.83},
    "ViT": {"attention and MLP": 0.9068, "linear": 0.8642, "norm": 0.7336, "all": 0.77},
}
LOSSES = {"RelaxLoss from scratch": (0.8087, 1.5398), "A2": (0.4326, 0.9288), "A3": (0.4473, 0.8044)}  # train, test
SMALL = "These are small networks on small images, not the paper's: compare directions, not figures."


def entanglement_notes(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences, each about one finding of the paper and all networks.

    Args:
        results: ``{network: entanglement(...)}``; "ResNet18" and "ViT" are the paper's.
    """
    printed = "; ".join(
        f"{network} " + ", ".join(f"{group} {value}" for group, value in groups.items())
        for network, groups in CORRELATIONS.items()
    )
    found = [
        SMALL,
        f"The paper's correlations of vulnerability and learnability: {printed}. Lowest are norms, both times.",
    ]
    lowest = []
    for network, result in results.items():
        means = {g: one["mean"] for g, one in result["correlation"].items() if g != "all" and one["mean"] is not None}
        if "norm" in means and len(means) > 1:
            least = min(means, key=lambda group: means[group])
            lowest.append(f"{network} {least} ({number(means[least])})")
    if lowest:
        found.append(f"Lowest here: {', '.join(lowest)}.")
    if "ViT" in results:
        found.append("The paper counts the MLPs in a ViT's blocks to its attention; here they are linear.")
    times = []
    for network, result in results.items():
        whole = result["layers"][-1]
        if whole["moved_critical"] is not None and whole["moved_rest"]:
            times.append(f"{network} {whole['moved_critical'] / whole['moved_rest']:.1f}")
    if times:
        found.append(
            "The paper finds vulnerable weights to be the least updated. Here critical weights moved, in multiples of "
            f"what the others did on average: {', '.join(times)}."
        )
    return found


def ablation_notes(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences: what the paper found, then each network beside it.

    Args:
        results: ``{network: ablation(...)}``.
    """
    gaps = ", ".join(f"{test - train:.2f} for {what}" for what, (train, test) in LOSSES.items())
    found = [
        SMALL,
        f"The paper (CIFAR-10, ResNet18): A1 collapses to an accuracy of 0.1 to 5%; test minus train loss is {gaps}.",
    ]
    for network, result in results.items():
        rows = {row["id"]: row for row in result["rows"]}
        gap = {key: _difference(row) for key, row in rows.items()}
        kept, before = rows["A1"]["test_accuracy"], rows["undefended"]["test_accuracy"]
        collapse = "collapses" if kept < before / 2 else "does not collapse"
        said = ", ".join(f"{number(gap[key])} for {key}" for key in ("undefended", "scratch", "A2", "A3", "random"))
        order = ""
        if gap["A2"] is not None and gap["A3"] is not None:
            order = "; A3's is " + ("below A2's, as there" if gap["A3"] < gap["A2"] else "not below A2's, unlike there")
        found.append(
            f"{network}: A1 {collapse} (test accuracy {number(kept)}, no defense {number(before)}); test minus train "
            f"loss is {said}{order}."
        )
    return found


def _difference(row: Mapping[str, Any]) -> float | None:
    """Test minus train loss; None where one of them is not known, as of a model that diverged."""
    return None if row["test_loss"] is None or row["train_loss"] is None else row["test_loss"] - row["train_loss"]
