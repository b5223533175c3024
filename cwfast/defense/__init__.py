"""Defenses: each a ``Defense`` (for fleets of shadows) over functions that also work in a user's own loop."""

from cwfast.defense.advreg import AdvReg
from cwfast.defense.baselines import EarlyStopping, PlainTraining, WeightDecay
from cwfast.defense.crl import CRL
from cwfast.defense.cwrf import CWRF, CWRFResult, critical_masks, critical_scores, cwrf_
from cwfast.defense.gap import gap_shares
from cwfast.defense.hamp import HAMPOutputs
from cwfast.defense.losses import HAMP, ConfidencePenalty, ConvexConcave, LabelSmoothing, RelaxLoss
from cwfast.defense.mixup import Mixup
from cwfast.defense.past import PAST
from cwfast.defense.pve import vulnerability
from cwfast.defense.selena import SELENA
from cwfast.defense.specs import parse, parse_loss

__all__ = [
    "CRL",
    "CWRF",
    "HAMP",
    "PAST",
    "SELENA",
    "AdvReg",
    "CWRFResult",
    "ConfidencePenalty",
    "ConvexConcave",
    "EarlyStopping",
    "HAMPOutputs",
    "LabelSmoothing",
    "Mixup",
    "PlainTraining",
    "RelaxLoss",
    "WeightDecay",
    "critical_masks",
    "critical_scores",
    "cwrf_",
    "gap_shares",
    "parse",
    "parse_loss",
    "vulnerability",
]
