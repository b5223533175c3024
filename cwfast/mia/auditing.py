"""Every attack on the same signals, every model a target in turn; what was found, and how sure one may be."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from cwfast.checkpoint.files import atomic_write
from cwfast.mia import _page, metrics
from cwfast.mia._inputs import Array, Bools, Floats, to_numpy
from cwfast.mia.attacks import ATTACKS
from cwfast.mia.signals import Signals

SCHEMA = "cwfast-audit/1"
PRIORS = (0.01, 0.1, 0.5)
_EXPOSED = 20  # samples that a report lists


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        report: JSON-able, schema ``cwfast-audit/1``: per attack its variant, ``metrics.summary``, thresholds carried
            over from the other models, ROC points, the most exposed samples by id and, for attacks by class, the
            balanced accuracy of their own thresholds; what was attacked.
        scores: float64 [K, N] per attack.
        membership: bool [K, N].
    """

    report: dict[str, Any]
    scores: dict[str, Floats]
    membership: Bools

    def table(self) -> str:
        """One line per attack; a star marks a TPR whose sample is too small, and the warning follows below."""
        rows = self.report["attacks"]
        first = next(iter(rows.values()))
        head = ["attack", "AUC [low, high]", "bal. acc", "shadow acc"]
        head += [f"TPR@{100 * point['fpr']:g}% [low, high]" for point in first["tpr_at_fpr"]]
        body = [head, *([name, *_cells(row)] for name, row in rows.items())]
        widths = [max(len(line[i]) for line in body) for i in range(len(head))]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))])
            for line in body
        ]
        notes = dict.fromkeys(p["warning"] for row in rows.values() for p in row["tpr_at_fpr"] if p["warning"])
        return "\n".join([*lines, *(f"* {note}" for note in notes)]) + "\n"

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, whole or not at all.

        Raises:
            OSError: the folder does not exist or cannot be written.
        """
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(self.report, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def to_html(self, path: str | os.PathLike[str], *, inputs: Array | None = None) -> None:
        """Write one page that needs nothing else: the table, ROC curves on logarithmic axes, the most exposed samples.

        Args:
            path: of the page.
            inputs: [N, ...]: the samples themselves. Given, the page shows the most exposed of them, images as
                pictures ([H, W], or 1 or 3 channels first or last); not given, their ids alone.

        Raises:
            OSError: the folder does not exist or cannot be written.
            ValueError: inputs of another number of samples.
        """
        if inputs is not None and len(inputs) != self.report["samples"]:  # type: ignore[arg-type]
            raise ValueError(f"inputs must be [N, ...] with N = {self.report['samples']}; got {len(inputs)}")  # type: ignore[arg-type]
        with atomic_write(path) as temporary:
            temporary.write_text(_page.render(self.report, inputs), encoding="utf-8")

    def summary(self) -> str:
        """What was found, in three or four sentences."""
        return "\n".join(_page.lead(self.report))


def audit(
    signals: Signals | Mapping[str, Array],
    membership: Array | None = None,
    *,
    attacks: Sequence[str] = ("loss", "lira", "rmia"),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    labels: Array | None = None,
    features: Array | None = None,
    target: int | None = None,
    plan: Mapping[str, Any] | None = None,
    fprs: Sequence[float] = (1e-2, 1e-3),
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Audit:
    """Run attacks on stored signals.

    Args:
        signals: ``Signals``, or a mapping of [K, N] or [K, N, Q] arrays named as in there ("logprob" or "loss", "phi").
        membership: bool [K, N]; None takes that of ``Signals``. Given besides, it must be the same.
        attacks: names of ``cwfast.mia.attacks.ATTACKS``.
        options: further keyword arguments by attack, as ``{"rmia": {"gamma": 1.0}}``.
        labels: int [N], for the attacks by class; None takes those of ``Signals``.
        features: [N, F], for ``quantile_regression``.
        target: row of the attacked model, or None for every row in turn.
        plan: what the signals must be, see ``Signals.require``; an audit of other signals is refused.
        fprs: false-positive rates for TPR at FPR.
        bootstrap: replicates for intervals.
        confidence: of the intervals.
        seed: of the bootstrap.

    Returns:
        ``Audit``.

    Raises:
        TypeError: a wrong dtype.
        KeyError: the signals lack what an attack reads.
        ValueError: an unknown attack, signals that do not match the plan or ``membership``, or what an attack refuses.
    """
    kept = signals if isinstance(signals, Signals) else None
    if not attacks:
        raise ValueError("attacks must name at least one attack; got none")
    unknown = [name for name in [*attacks, *(options or {})] if name not in ATTACKS]
    if unknown:
        raise ValueError(f"attacks must be among {', '.join(ATTACKS)}; got {unknown[0]!r}")
    if plan is not None:
        if kept is None:
            raise ValueError("signals must be Signals where a plan is given: plain arrays do not say what they are")
        kept.require(plan)
    if kept is not None:
        if membership is not None:
            kept.require({"membership": membership})
        membership, labels = kept.membership, kept.labels if labels is None else labels
    elif membership is None:
        raise ValueError("membership must be given with plain arrays; got None")
    member = to_numpy("membership", membership, "b")
    rows = list(range(len(member))) if target is None else [target]
    scores: dict[str, Floats] = {}
    found: dict[str, Any] = {}
    for name in attacks:
        attack = ATTACKS[name]
        more = {**attack.options, **(options or {}).get(name, {})}
        given = [_signal(signals, attack.signal, name), member]
        if attack.also is not None:
            more_of_samples = labels if attack.also == "labels" else features
            if more_of_samples is None:
                raise ValueError(f"{attack.also} must be given for the attack {name}; got None")
            given.append(more_of_samples)
        own = attack.function(*given, target=target, **more)
        scores[name] = own if target is None else own[None]
        found[name] = {
            "function": attack.function.__name__,
            "signal": attack.signal,
            "options": {key: value for key, value in more.items() if isinstance(value, str | int | float)},
            **metrics.summary(
                scores[name], member[rows], fprs=fprs, bootstrap=bootstrap, confidence=confidence, seed=seed
            ),
            "shadow_calibrated": _shadow(scores[name], member[rows], fprs),
            "roc": mean_roc(
                scores[name], member[rows], 25, bootstrap=min(bootstrap, 200), confidence=confidence, seed=seed
            ),
            "balanced_accuracy_at_zero": _at_zero(scores[name], member[rows]) if attack.also == "labels" else None,
            "most_exposed": _exposed(scores[name], member[rows], max(fprs, default=0.01), kept),
        }
    report = {
        "schema": SCHEMA,
        "models": len(member),
        "targets": len(rows),
        "samples": member.shape[1],
        "members": {"fewest": int(member[rows].sum(axis=1).min()), "most": int(member[rows].sum(axis=1).max())},
        "manifest": {} if kept is None else dict(kept.manifest),
        "signals_sha256": None if kept is None else kept.sha256,
        "seed": seed,
        "attacks": found,
    }
    return Audit(report, scores, member[rows])


def _signal(signals: Signals | Mapping[str, Array], name: str, attack: str) -> Array:
    """A signal by name; "logprob" may be there as "loss"."""
    if isinstance(signals, Signals):
        return signals[name]
    if name == "logprob" and name not in signals and "loss" in signals:
        loss = signals["loss"]
        return -loss if isinstance(loss, Tensor) else -np.asarray(loss)
    if name not in signals:
        raise KeyError(f"signals must hold {name!r} for the attack {attack}; they hold {', '.join(signals)}")
    return signals[name]


def _at_zero(scores: Floats, members: Bools) -> float:
    """Mean balanced accuracy of "member where the score is at least 0", the rule of the attacks by class."""
    called = scores >= 0
    tpr = (called & members).sum(axis=1) / members.sum(axis=1)
    tnr = (~called & ~members).sum(axis=1) / (~members).sum(axis=1)
    return float((tpr + tnr).mean() / 2)


def _shadow(scores: Floats, members: Bools, fprs: Sequence[float]) -> dict[str, Any] | None:
    """What thresholds from the other models do, averaged over targets; None for a single target."""
    if len(scores) < 2:
        return None
    points = []
    for fpr in fprs:
        at = metrics.shadow_calibrated(scores, members, fpr)
        tpr, realised = float(at.tpr.mean()), float(at.fpr.mean())
        worth = {str(prior): metrics.ppv(tpr, realised, prior) for prior in PRIORS}
        points.append(
            {
                "fpr": float(fpr),
                "tpr": tpr,
                "realised_fpr": realised,
                "ppv": {prior: None if np.isnan(value) else value for prior, value in worth.items()},
            }
        )
    balanced = float(metrics.shadow_calibrated(scores, members).balanced_accuracy.mean())
    return {"balanced_accuracy": balanced, "tpr_at_fpr": points}


def mean_roc(scores: Floats, members: Bools, points: int, **options: Any) -> list[dict[str, float | None]]:
    """``fpr`` (realised), ``tpr``, ``low`` and ``high`` at points even on a logarithmic axis, from one false positive.

    Args:
        scores: [K, N].
        members: bool [K, N].
        points: how many.
        options: ``bootstrap``, ``confidence``, ``seed`` of ``metrics.summary``.
    """
    lowest = np.nextafter(1 / (~members).sum(axis=1).min(), 1)  # as a decimal, 1 / n may be less than one of n
    grid = [float(fpr) for fpr in np.geomspace(lowest, 1, points).clip(max=1)]
    found = metrics.summary(scores, members, fprs=grid, **options)
    return [{"fpr": p["realised_fpr"], **{key: p[key] for key in ("tpr", "low", "high")}} for p in found["tpr_at_fpr"]]


def _exposed(scores: Floats, members: Bools, fpr: float, signals: Signals | None) -> list[dict[str, Any]]:
    """The samples that the most models give away at this rate; of equal ones those with the higher mean rank."""
    share = np.nan_to_num(metrics.vulnerability(scores, members, fpr), nan=-1.0)
    ranks = scores.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable") / scores.shape[1]
    trained = members.sum(axis=0)
    rank = np.where(members, ranks, 0).sum(axis=0) / np.maximum(trained, 1)
    order = np.lexsort((-rank, -share))[:_EXPOSED]
    ids = np.arange(scores.shape[1]) if signals is None or signals.ids is None else signals.ids.numpy()
    return [
        {
            "id": int(ids[i]),
            "row": int(i),
            "found_in": float(share[i]),
            "models": int(trained[i]),
            "mean_rank": float(rank[i]),
        }
        for i in order
        if trained[i]
    ]


def _cells(row: Mapping[str, Any]) -> list[str]:
    shadow = row["shadow_calibrated"]
    cells = [
        f"{row['auc']:.3f}{_interval(row['auc_low'], row['auc_high'], 3)}",
        f"{row['balanced_accuracy']:.3f}",
        "-" if shadow is None else f"{shadow['balanced_accuracy']:.3f}",
    ]
    for point in row["tpr_at_fpr"]:
        star = "*" if point["warning"] else ""
        cells.append(f"{point['tpr']:.4f}{star}{_interval(point['low'], point['high'], 4)}")
    return cells


def _interval(low: float | None, high: float | None, digits: int) -> str:
    return "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
