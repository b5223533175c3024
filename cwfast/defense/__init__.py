"""Defenses: each a ``Defense`` (for fleets of shadows) over functions that also work in a user's own loop."""

from cwfast.defense.accounting import Privacy
from cwfast.defense.baselines import EarlyStopping, PlainTraining
from cwfast.defense.clipping import ClippedGradients
from cwfast.defense.criteria import CRITERIA, Estimate, criterion, critical_masks, critical_scores
from cwfast.defense.cwrf import CWRF, CWRFResult, cwrf_
from cwfast.defense.dp import DPSGD
from cwfast.defense.gap import gap_shares
from cwfast.defense.hamp import HAMPOutputs
from cwfast.defense.losses import HAMP, ConfidencePenalty, ConvexConcave, LabelSmoothing, RelaxLoss
from cwfast.defense.pve import vulnerability
from cwfast.defense.specs import parse, parse_loss
from cwfast.defense.variants import recalibrate_

__all__ = [
    "CRITERIA",
    "CWRF",
    "DPSGD",
    "HAMP",
    "CWRFResult",
    "ClippedGradients",
    "ConfidencePenalty",
    "ConvexConcave",
    "EarlyStopping",
    "Estimate",
    "HAMPOutputs",
    "LabelSmoothing",
    "PlainTraining",
    "Privacy",
    "RelaxLoss",
    "criterion",
    "critical_masks",
    "critical_scores",
    "cwrf_",
    "gap_shares",
    "parse",
    "parse_loss",
    "recalibrate_",
    "vulnerability",
]
