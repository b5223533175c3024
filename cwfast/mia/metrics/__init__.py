"""Exact metrics of membership scores: larger = more likely a member; nothing is interpolated, ties keep no order."""

from cwfast.mia.metrics.averages import summary
from cwfast.mia.metrics.decisions import AtThreshold, ppv, shadow_calibrated, vulnerability
from cwfast.mia.metrics.epsilon import (
    epsilon_from_counts,
    epsilon_from_guesses,
    epsilon_lower_bound,
    epsilon_one_run,
)
from cwfast.mia.metrics.intervals import AucInterval, clopper_pearson, delong
from cwfast.mia.metrics.roc import (
    RocCurve,
    TnrAtFnr,
    TprAtFpr,
    auc,
    balanced_accuracy,
    roc_curve,
    tnr_at_fnr,
    tpr_at_fpr,
)

__all__ = [
    "AtThreshold",
    "AucInterval",
    "RocCurve",
    "TnrAtFnr",
    "TprAtFpr",
    "auc",
    "balanced_accuracy",
    "clopper_pearson",
    "delong",
    "epsilon_from_counts",
    "epsilon_from_guesses",
    "epsilon_lower_bound",
    "epsilon_one_run",
    "ppv",
    "roc_curve",
    "shadow_calibrated",
    "summary",
    "tnr_at_fnr",
    "tpr_at_fpr",
    "vulnerability",
]
