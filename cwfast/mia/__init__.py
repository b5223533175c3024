"""Membership inference: scores of samples (larger = more likely a member), and exact metrics over such scores."""

from cwfast.mia import metrics
from cwfast.mia.attacks import (
    attack_p,
    attack_r,
    base,
    calibrated_loss,
    class_thresholds,
    correctness,
    gradient_norm,
    lira,
    lira_carlini,
    loss,
    quantile_regression,
    rmia,
)
from cwfast.mia.auditing import Audit, audit
from cwfast.mia.published import phi_carlini, taylor_logprob
from cwfast.mia.signals import Signals

__all__ = [
    "Audit",
    "Signals",
    "attack_p",
    "attack_r",
    "audit",
    "base",
    "calibrated_loss",
    "class_thresholds",
    "correctness",
    "gradient_norm",
    "lira",
    "lira_carlini",
    "loss",
    "metrics",
    "phi_carlini",
    "quantile_regression",
    "rmia",
    "taylor_logprob",
]
