"""Every attack on one language model: records, scores, metrics with intervals, controls; a JSON-able report."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cwfast.llm.attacks import attack
from cwfast.llm.controls import bag_of_words, duplicates
from cwfast.llm.datasets import dataset_inference
from cwfast.llm.gathering import Inputs, scores
from cwfast.llm.storage import Floats, TokenRecords
from cwfast.mia import metrics

SCHEMA = "cwfast-audit-llm/1"
HEADLINE = ("ez_mia", "reference", "min_k_pp", "loss")  # the first that runs speaks for all: chosen before any score
_EXPOSED = 20  # texts that a report lists
_CONTROLS = ("loss", "zlib", "min_k", "min_k_pp", "surp")  # of a reference, which saw neither side


def audit(
    inputs: Inputs,
    attacks: Sequence[str],
    *,
    fprs: Sequence[float] = (0.01,),
    bootstrap: int = 1000,
    confidence: float = 0.95,
    skip: bool = False,
) -> tuple[dict[str, Any], dict[str, Floats], TokenRecords]:
    """Run attacks and controls.

    Args:
        inputs: models and texts.
        attacks: names of ``ATTACKS``, none of which lacks anything.
        fprs: false-positive rates for TPR at FPR.
        bootstrap: replicates for the intervals.
        confidence: of each interval.
        skip: leave attacks out that these inputs do not allow, with the reason in the report's ``left_out``; else
            such an attack is an error.

    Returns:
        The report; float64 [N] of each attack and control; the records.

    Raises:
        ValueError, TypeError, KeyError, UnsupportedLayer, CheckpointError: as ``records`` and the attacks do.
    """
    scored, own, left_out = scores(inputs, attacks, skip)
    seed, flags, read = inputs.seed, inputs.flags, inputs.read
    controls = {"bag_of_words": bag_of_words(read, flags, seed=seed)}
    if inputs.reference is not None:
        base = own.of_reference()
        controls |= {f"reference_{name}": attack(name, base) for name in _CONTROLS}
    several = 1 - (1 - confidence) / len(controls)  # Bonferroni: all of them together at this confidence
    how = {"fprs": fprs, "bootstrap": bootstrap, "confidence": confidence, "seed": seed}
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "texts": {
            "members": len(inputs.members),
            "nonmembers": len(inputs.nonmembers),
            "scored_tokens": len(own.tokens),
        },
        "records": dict(own.manifest),
        "seed": seed,
        "attacks": {name: judged(score, flags, how) for name, score in scored.items()},
        "controls": {name: _area(score, flags, several) for name, score in controls.items()},
        "duplicates": duplicates(read[: len(inputs.members)], read[len(inputs.members) :]),
        "dataset_inference": None,
        "left_out": left_out,
    }
    side = min(len(inputs.members), len(inputs.nonmembers))
    if side >= 8 and len(scored) > 1:
        features = np.stack(list(scored.values()), axis=1)
        report["dataset_inference"] = dataset_inference(features[flags], features[~flags], seed=seed)._asdict()
    report["warnings"] = warnings(report)
    report["headline"] = headline = next((name for name in HEADLINE if name in scored), next(iter(scored)))
    best = max(scored, key=lambda name: report["attacks"][name]["auc"])
    # Of as many as there are to choose from: intervals that hold for all of them together hold for the highest.
    report["highest"] = {"attack": best, **_area(scored[best], flags, 1 - (1 - confidence) / len(scored))}
    report["exposed"] = {"attack": headline, "texts": _exposed(scored[headline], len(inputs.members))}
    return report, {**scored, **controls}, own


def warnings(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know before reading any AUC."""
    found = []
    for name, control in report["controls"].items():
        if not control["auc_low"] <= 0.5 <= control["auc_high"]:
            without = "without any model" if name == "bag_of_words" else "by the model before its training"
            found.append(
                f"{name} tells members from non-members {without}: AUC {control['auc']:.3f} "
                f"[{control['auc_low']:.3f}, {control['auc_high']:.3f}]. The two sides differ by themselves; the "
                "attacks' AUCs are no measure of what this model gives away."
            )
    repeated = report["duplicates"]
    if repeated["members"] or repeated["nonmembers"]:
        found.append(
            f"{repeated['members']} members and {repeated['nonmembers']} non-members share {repeated['n']}-word runs "
            f"with the other side (at least {100 * repeated['share']:g}% of their own): attacks look too weak."
        )
    return found


def judged(scores: Floats, flags: Any, how: Mapping[str, Any]) -> dict[str, Any]:
    """``cwfast.mia.metrics.summary`` with intervals of the TPR by Clopper and Pearson, the bootstrap's beside them.

    Args:
        scores: [N].
        flags: bool [N], members.
        how: options of ``summary``, ``confidence`` among them.
    """
    found = metrics.summary(scores, flags, **how)
    for point in found["tpr_at_fpr"]:
        at = metrics.tpr_at_fpr(scores, flags, point["fpr"])
        hits, trials = round(at.tpr * int(flags.sum())), int(flags.sum())
        low, high = metrics.clopper_pearson(hits, trials, confidence=how["confidence"])
        point |= {"bootstrap_low": point["low"], "bootstrap_high": point["high"], "low": low, "high": high}
    return found


def _area(scores: Floats, flags: Any, confidence: float) -> dict[str, Any]:
    found = metrics.delong(scores, flags, confidence=confidence)
    return {"auc": found.auc, "auc_low": found.low, "auc_high": found.high, "confidence": confidence}


def _exposed(scores: Floats, members: int) -> list[dict[str, Any]]:
    order = np.argsort(-scores[:members], kind="stable")[:_EXPOSED]
    return [{"member": int(i), "score": float(scores[i]), "rank": int((scores > scores[i]).sum()) + 1} for i in order]
