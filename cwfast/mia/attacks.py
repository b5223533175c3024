"""Scores that tell members of a model's training set from non-members; larger = more likely a member, everywhere.

The target is one row of the signals, the other rows are its shadow models: every model can be attacked in turn.

A split that puts each sample in the same number c of all K models betrays the target: its members have c - 1 IN models
among the others, its non-members c. Estimates from fewer models are worse, so scores would differ even where the
signal says nothing (with 8 models and pure noise, AUC 0.44 instead of 0.50). So where a target's members have, on
average, over half an IN model less among the others than its non-members, one more model is left out per sample: the
next one after the target, cyclically, of the other side. Both then have c - 1 IN and K - c - 1 OUT models. Where coin
tosses made the split, or the target was drawn apart from its shadow models, nothing is left out. Samples in no model
or in all of them are no part of this and keep all others.
"""

from cwfast.mia.difficulty import attack_p, attack_r, calibrated_loss
from cwfast.mia.likelihood import lira, lira_carlini
from cwfast.mia.ratios import base, rmia
from cwfast.mia.regression import quantile_regression
from cwfast.mia.thresholds import class_thresholds, correctness, gradient_norm, loss

__all__ = [
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
