"""What DP-SGD spent in a study and of what that is a guarantee, in words and as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

STATEMENT = (
    "DP-SGD: only training from scratch covers the released model. Fine-tuning by DP-SGD from models that were trained "
    "without it gives no guarantee for the released model, whatever its epsilon says of the fine-tuning: the start, "
    "the scores and the mask were computed from the same samples without noise. Epsilon is that of one model, for "
    "adding or removing one sample; strengths were not chosen privately, and the noise follows from the seed, which an "
    "audit needs: the guarantee is for a seed that nobody knows. The learning rate of DP-SGD from scratch is that of "
    "all training and was not tuned for it: these rows do not show how well it can do, and a lower AUC beside CWRF is "
    "no guarantee. Nothing here says that CWRF does better than DP-SGD."
)
COVERS = {"model": "the released model", "fine-tuning": "the fine-tuning alone, not the released model"}
SHORT = {"model": "released model", "fine-tuning": "fine-tuning alone"}
HEAD = ["models", "epsilon", "delta", "noise multiplier", "clipped to", "steps", "sampling rate", "covers"]


def privacy_text(privacy: Mapping[str, Any]) -> str:
    """``epsilon 20 of the released model``, for a label."""
    return f"epsilon {_epsilon(privacy)} of the {SHORT[privacy['covers']]}"


def privacy_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One for each way of private training, under ``HEAD``; cells that spent the same stand together."""
    ways: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        spent = row["privacy"]
        if spent is not None:
            numbers = [f"{spent[name]:.3g}" for name in ("delta", "noise_multiplier", "max_grad_norm")]
            told = (_epsilon(spent), *numbers, str(spent["steps"]), f"{spent['sample_rate']:.3g}", spent["covers"])
            ways.setdefault(told, []).append(row["curve"])
    return [[", ".join(dict.fromkeys(curves)), *told[:-1], COVERS[told[-1]]] for told, curves in ways.items()]


def _epsilon(privacy: Mapping[str, Any]) -> str:
    return "infinite" if privacy["epsilon"] is None else f"{privacy['epsilon']:.3g}"
