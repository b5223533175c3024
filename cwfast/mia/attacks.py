"""Scores that tell members of a model's training set from non-members; larger = more likely a member, everywhere.

The target is one row of the signals, the other rows are its shadow models: every model can be attacked in turn.

A split that puts each sample in the same number c of all K models betrays the target: its members have c - 1 IN models
among the others, its non-members c. Estimates from fewer models are worse, so scores would differ even where the
signal says nothing (with 8 models and pure noise, AUC 0.44 instead of 0.50). So where a target's members have, on
average, over half an IN model less among the others than its non-members, one more model is left out per sample: the
one trained on exactly the other half, if there is one (kept, it would be OUT for all members and IN for all others, and
how sure it is in general would tell them apart: AUC 0.5 +- 0.07 on pure noise), else the next one after the target,
cyclically, of the other side. Both then have c - 1 IN and K - c - 1 OUT models. Where coin tosses made the split, or
the target was drawn apart from its shadow models, nothing is left out. Samples in no model or in all of them are no
part of this and keep all others.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cwfast.mia._inputs import Floats
from cwfast.mia.difficulty import attack_p, attack_r, calibrated_loss
from cwfast.mia.likelihood import lira, lira_carlini
from cwfast.mia.ratios import base, rmia
from cwfast.mia.regression import quantile_regression
from cwfast.mia.thresholds import class_thresholds, correctness, gradient_norm, loss

__all__ = [
    "ATTACKS",
    "Attack",
    "attack_p",
    "attack_r",
    "base",
    "calibrated_loss",
    "class_thresholds",
    "correctness",
    "gradient_norm",
    "lira",
    "lira_carlini",
    "loss",
    "quantile_regression",
    "rmia",
]


class Attack(NamedTuple):
    """A function of this module, the signal that it reads, and its options: all that names a variant.

    ``also``: what else of the samples it takes, "labels" or "features".
    """

    function: Callable[..., Floats]
    signal: str
    options: Mapping[str, Any] = {}
    also: str | None = None


ATTACKS: dict[str, Attack] = {
    "loss": Attack(loss, "logprob"),
    "lira": Attack(lira, "phi"),
    "lira_per_example": Attack(lira, "phi", {"variance": "per_example"}),
    "lira_fixed": Attack(lira, "phi", {"variance": "fixed"}),
    "lira_offline": Attack(lira, "phi", {"mode": "offline"}),
    "lira_carlini": Attack(lira_carlini, "phi"),
    "lira_carlini_fixed": Attack(lira_carlini, "phi", {"fixed_variance": True}),
    "lira_carlini_offline": Attack(lira_carlini, "phi", {"mode": "offline"}),
    "rmia": Attack(rmia, "logprob"),
    "rmia_offline": Attack(rmia, "logprob", {"mode": "offline"}),
    "rmia_majority": Attack(rmia, "logprob", {"vote": "majority"}),
    "base": Attack(base, "logprob"),
    "base_offline": Attack(base, "logprob", {"mode": "offline"}),
    "attack_r": Attack(attack_r, "logprob"),
    "attack_p": Attack(attack_p, "logprob"),
    "calibrated_loss": Attack(calibrated_loss, "logprob"),
    "correctness": Attack(correctness, "correct"),
    "class_confidence": Attack(class_thresholds, "confidence", also="labels"),
    "class_entropy": Attack(class_thresholds, "entropy", {"larger": False}, also="labels"),
    "class_modified_entropy": Attack(class_thresholds, "modified_entropy", {"larger": False}, also="labels"),
    "gradient_norm": Attack(gradient_norm, "gradient_norm"),
    "quantile_regression": Attack(quantile_regression, "phi", also="features"),
}
