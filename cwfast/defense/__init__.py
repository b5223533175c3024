"""Defenses: each a ``Defense`` (for fleets of shadows) over functions that also work in a user's own loop."""

from cwfast.defense.accounting import Privacy
from cwfast.defense.advreg import AdvReg
from cwfast.defense.baselines import EarlyStopping, PlainTraining, WeightDecay
from cwfast.defense.clipping import ClippedGradients
from cwfast.defense.criteria import CRITERIA, Estimate, criterion, critical_masks, critical_scores
from cwfast.defense.crl import CRL
from cwfast.defense.cwrf import CWRF, CWRFResult, cwrf_
from cwfast.defense.dp import DPSGD
from cwfast.defense.gap import gap_shares
from cwfast.defense.hamp import HAMPOutputs
from cwfast.defense.losses import HAMP, ConfidencePenalty, ConvexConcave, LabelSmoothing, RelaxLoss
from cwfast.defense.mixup import Mixup
from cwfast.defense.past import PAST
from cwfast.defense.pve import vulnerability
from cwfast.defense.recalibration import recalibrate_
from cwfast.defense.selena import SELENA
from cwfast.defense.specs import parse, parse_loss

__all__ = [
    "CRITERIA",
    "CRL",
    "CWRF",
    "DPSGD",
    "HAMP",
    "PAST",
    "SELENA",
    "AdvReg",
    "CWRFResult",
    "ClippedGradients",
    "ConfidencePenalty",
    "ConvexConcave",
    "EarlyStopping",
    "Estimate",
    "HAMPOutputs",
    "LabelSmoothing",
    "Mixup",
    "PlainTraining",
    "Privacy",
    "RelaxLoss",
    "WeightDecay",
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
