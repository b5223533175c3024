"""Every attack on one language model: records, scores, metrics with intervals, controls; a JSON-able report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cwfast.llm import variants
from cwfast.llm.attacks import ATTACKS, attack
from cwfast.llm.controls import bag_of_words, duplicates
from cwfast.llm.datasets import dataset_inference
from cwfast.llm.gradients import gradient_norms
from cwfast.llm.recording import records
from cwfast.llm.storage import Floats, TokenRecords
from cwfast.mia import metrics

SCHEMA = "cwfast-audit-llm/1"
PREFIX_SHOTS = 3
_EXPOSED = 20  # texts that a report lists
_CONTROLS = ("loss", "zlib", "min_k", "min_k_pp", "surp")  # of a reference, which saw neither side
_SOURCES = {  # why an attack cannot run, by what it lacks
    "reference": "a reference model (--reference)",
    "kl": "a reference model (--reference)",
    "counts": "a corpus of other texts (--corpus)",
    "prefixed": "non-members that are not audited (--shots)",
    "member_prefixed": "members that are not audited (--member-shots)",
    "shadows": "shadow models (--shadow)",
    "membership": "shadow models (--shadow)",
}


@dataclass(frozen=True)
class Inputs:
    """What is audited, and what some attacks need besides."""

    model: Any
    tokenizer: Any
    members: Sequence[str]
    nonmembers: Sequence[str]
    reference: Any = None
    shots: Sequence[str] = ()  # non-members, not audited
    member_shots: Sequence[str] = ()
    corpus: Sequence[str] = ()
    shadows: Sequence[tuple[Any, Sequence[str]]] = ()  # a model, and the texts that it was trained on
    max_tokens: int | None = None
    seed: int = 0
    copies: int = 5
    how: Mapping[str, Any] = field(default_factory=dict)  # further arguments of records()
    out: Path | None = None

    @property
    def texts(self) -> list[str]:
        """Members, then non-members."""
        return [*self.members, *self.nonmembers]

    @property
    def flags(self) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """bool [N]."""
        return np.arange(len(self.texts)) < len(self.members)

    def lacks(self, name: str) -> str | None:
        """What an attack would need and is not there, or None."""
        have = {
            "reference": self.reference is not None,
            "kl": self.reference is not None,
            "counts": bool(self.corpus),
            "prefixed": bool(self.shots),
            "member_prefixed": bool(self.member_shots),
            "shadows": len(self.shadows) > 1,
            "membership": len(self.shadows) > 1,
        }
        return next((_SOURCES[need] for need in ATTACKS[name].needs if not have.get(need, True)), None)


def audit(
    inputs: Inputs,
    attacks: Sequence[str],
    *,
    fprs: Sequence[float] = (0.01,),
    bootstrap: int = 1000,
    confidence: float = 0.95,
) -> tuple[dict[str, Any], dict[str, Floats], TokenRecords]:
    """Run attacks and controls.

    Args:
        inputs: models and texts.
        attacks: names of ``ATTACKS``, none of which lacks anything.
        fprs: false-positive rates for TPR at FPR.
        bootstrap: replicates for the intervals.
        confidence: of each interval.

    Returns:
        The report; float64 [N] of each attack and control; the records.

    Raises:
        ValueError, TypeError, KeyError, UnsupportedLayer, CheckpointError: as ``records`` and the attacks do.
    """
    scored, own = _scores(inputs, attacks)
    seed, flags = inputs.seed, inputs.flags
    controls = {"bag_of_words": bag_of_words(inputs.texts, flags, seed=seed)}
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
        "attacks": {name: _judged(score, flags, how) for name, score in scored.items()},
        "controls": {name: _control(score, flags, several) for name, score in controls.items()},
        "duplicates": duplicates(inputs.members, inputs.nonmembers),
        "dataset_inference": None,
    }
    side = min(len(inputs.members), len(inputs.nonmembers))
    if side >= 8 and len(scored) > 1:
        features = np.stack(list(scored.values()), axis=1)
        report["dataset_inference"] = dataset_inference(features[flags], features[~flags], seed=seed)._asdict()
    report["warnings"] = warnings(report)
    best = max(scored, key=lambda name: report["attacks"][name]["auc"])
    report["exposed"] = {"attack": best, "texts": _exposed(scored[best], len(inputs.members))}
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


def _scores(inputs: Inputs, attacks: Sequence[str]) -> tuple[dict[str, Floats], TokenRecords]:
    texts, needs = inputs.texts, {need for name in attacks for need in ATTACKS[name].needs}

    def recorded(which: str, given: Sequence[str], **more: Any) -> TokenRecords:
        folder = None if inputs.out is None else inputs.out / "records" / which
        more = {**inputs.how, "max_tokens": inputs.max_tokens, "out": folder, **more}
        return records(more.pop("model", inputs.model), inputs.tokenizer, given, **more)

    kl = "kl" in needs
    own = recorded("texts-kl" if kl else "texts", texts, reference=inputs.reference, kl=kl)
    made: dict[str, Any] = {}
    if "lower" in needs:
        made["lower"] = recorded("lower", variants.lowercased(texts))
    if "neighbours" in needs:
        changed = variants.neighbours(texts, copies=inputs.copies, seed=inputs.seed)
        made["neighbours"] = recorded("neighbours", changed)
    if "swapped" in needs:
        made["swapped"] = recorded("swapped", variants.swapped(texts, copies=inputs.copies, seed=inputs.seed))
    for name, shots in (("prefixed", inputs.shots), ("member_prefixed", inputs.member_shots)):
        if name in needs:
            made[name] = recorded(name, texts, prefix=_prefix(inputs, shots))
    if "counts" in needs:
        size = inputs.model.get_output_embeddings().weight.shape[0]
        made["counts"] = variants.token_counts(inputs.tokenizer, inputs.corpus, size)
    if "norms" in needs:
        made["norms"] = gradient_norms(inputs.model, inputs.tokenizer, texts, max_tokens=inputs.max_tokens)
    if "shadows" in needs:
        made["shadows"] = [recorded(f"shadow-{i}", texts, model=one) for i, (one, _) in enumerate(inputs.shadows)]
        sides = [set(inputs.members), *(set(known) for _, known in inputs.shadows)]
        made["membership"] = np.array([[text in side for text in texts] for side in sides])
    wanted = {name: [need for need in ATTACKS[name].needs if need in made] for name in attacks}
    return {name: attack(name, own, **{need: made[need] for need in wanted[name]}) for name in attacks}, own


def _prefix(inputs: Inputs, shots: Sequence[str]) -> list[int]:
    """The first shots, each cut as the texts are, one after another."""
    rows = inputs.tokenizer(list(shots[:PREFIX_SHOTS]), add_special_tokens=False)["input_ids"]
    return [token for row in rows for token in row[: inputs.max_tokens]]


def _judged(scores: Floats, flags: Any, how: Mapping[str, Any]) -> dict[str, Any]:
    found = metrics.summary(scores, flags, **how)
    for point in found["tpr_at_fpr"]:
        at = metrics.tpr_at_fpr(scores, flags, point["fpr"])
        hits, trials = round(at.tpr * int(flags.sum())), int(flags.sum())
        low, high = metrics.clopper_pearson(hits, trials, confidence=how["confidence"])
        point |= {"bootstrap_low": point["low"], "bootstrap_high": point["high"], "low": low, "high": high}
    return found


def _control(scores: Floats, flags: Any, confidence: float) -> dict[str, Any]:
    found = metrics.delong(scores, flags, confidence=confidence)
    return {"auc": found.auc, "auc_low": found.low, "auc_high": found.high, "confidence": confidence}


def _exposed(scores: Floats, members: int) -> list[dict[str, Any]]:
    order = np.argsort(-scores[:members], kind="stable")[:_EXPOSED]
    return [{"member": int(i), "score": float(scores[i]), "rank": int((scores > scores[i]).sum()) + 1} for i in order]
