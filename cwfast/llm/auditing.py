"""Every attack on one language model: records, scores, metrics with intervals, controls; a JSON-able report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cwfast.errors import CheckpointError, UnsupportedLayer
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
    scored, own, left_out = _scores(inputs, attacks, skip)
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
        "attacks": {name: judged(score, flags, how) for name, score in scored.items()},
        "controls": {name: _control(score, flags, several) for name, score in controls.items()},
        "duplicates": duplicates(inputs.members, inputs.nonmembers),
        "dataset_inference": None,
        "left_out": left_out,
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


def _scores(
    inputs: Inputs, attacks: Sequence[str], skip: bool
) -> tuple[dict[str, Floats], TokenRecords, dict[str, str]]:
    texts, needs = inputs.texts, {need for name in attacks for need in ATTACKS[name].needs}
    made: dict[str, Any] = {}
    failed: dict[str, str] = {}  # what could not be made, and why

    def recorded(which: str, given: Sequence[str], **more: Any) -> TokenRecords:
        folder = None if inputs.out is None else inputs.out / "records" / which
        more = {**inputs.how, "max_tokens": inputs.max_tokens, "out": folder, **more}
        return records(more.pop("model", inputs.model), inputs.tokenizer, given, **more)

    def tried(name: str, make: Callable[[], Any], reasons: dict[str, str]) -> Any:
        try:
            return make()
        except CheckpointError:
            raise
        except (ValueError, TypeError, UnsupportedLayer) as error:
            if not skip:
                raise
            reasons[name] = f"cannot run here: {error}"
            return None

    def prefixed(shots: Sequence[str]) -> Callable[[str], TokenRecords]:
        return lambda name: recorded(name, texts, prefix=_prefix(inputs, shots))

    copies: dict[str, Any] = {"copies": inputs.copies, "seed": inputs.seed}
    makers: dict[str, Callable[[str], Any]] = {
        "lower": lambda name: recorded(name, variants.lowercased(texts)),
        "neighbours": lambda name: recorded(name, variants.neighbours(texts, **copies)),
        "swapped": lambda name: recorded(name, variants.swapped(texts, **copies)),
        "prefixed": prefixed(inputs.shots),
        "member_prefixed": prefixed(inputs.member_shots),
        "counts": lambda _: variants.token_counts(
            inputs.tokenizer, inputs.corpus, inputs.model.get_output_embeddings().weight.shape[0]
        ),
        "norms": lambda _: gradient_norms(inputs.model, inputs.tokenizer, texts, max_tokens=inputs.max_tokens),
        "shadows": lambda _: [recorded(f"shadow-{i}", texts, model=one) for i, (one, _) in enumerate(inputs.shadows)],
    }
    own = None
    if "kl" in needs:
        own = tried("kl", lambda: recorded("texts-kl", texts, reference=inputs.reference, kl=True), failed)
    if own is None:
        own = recorded("texts", texts, reference=inputs.reference, kl=False)
    for need, make in makers.items():
        if need in needs:
            made[need] = tried(need, lambda need=need, make=make: make(need), failed)  # type: ignore[misc]
    if "shadows" in needs:
        sides = [set(inputs.members), *(set(known) for _, known in inputs.shadows)]
        made["membership"] = np.array([[text in side for text in texts] for side in sides])
    scored: dict[str, Floats] = {}
    left_out: dict[str, str] = {}
    for name in attacks:
        lost = next((failed[need] for need in ATTACKS[name].needs if need in failed), None)
        if lost is not None:
            left_out[name] = lost
            continue
        given = {need: made[need] for need in ATTACKS[name].needs if need in made}
        score = tried(name, lambda name=name, given=given: attack(name, own, **given), left_out)  # type: ignore[misc]
        if score is not None:
            scored[name] = score
    if not scored:
        raise ValueError(f"at least one attack must be able to run; {next(iter(left_out.values()))}")
    return scored, own, left_out


def _prefix(inputs: Inputs, shots: Sequence[str]) -> list[int]:
    """The first shots, each cut as the texts are, one after another."""
    rows = inputs.tokenizer(list(shots[:PREFIX_SHOTS]), add_special_tokens=False)["input_ids"]
    return [token for row in rows for token in row[: inputs.max_tokens]]


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


def _control(scores: Floats, flags: Any, confidence: float) -> dict[str, Any]:
    found = metrics.delong(scores, flags, confidence=confidence)
    return {"auc": found.auc, "auc_low": found.low, "auc_high": found.high, "confidence": confidence}


def _exposed(scores: Floats, members: int) -> list[dict[str, Any]]:
    order = np.argsort(-scores[:members], kind="stable")[:_EXPOSED]
    return [{"member": int(i), "score": float(scores[i]), "rank": int((scores > scores[i]).sum()) + 1} for i in order]
