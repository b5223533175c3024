"""What a cell comes to: what an attacker sees of its models, and what attacks and accuracies say."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cwfast.defense.accounting import Privacy
from cwfast.mia import Signals, attacks, metrics
from cwfast.study.presets import Preset
from cwfast.study.subject import Subject
from cwfast.training import Fitted

REPLICATES = 100  # of the accuracy; they give a standard deviation, not percentiles
BATCH = 1024  # samples a query: fixed, since the bits of logits depend on it
ATTACKS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {  # (phi, log p, membership) -> scores
    "lira_shrinkage": lambda phi, logprob, membership: attacks.lira(phi, membership, variance="shrinkage"),
    "rmia": lambda phi, logprob, membership: attacks.rmia(logprob, membership),
    "loss": lambda phi, logprob, membership: attacks.loss(logprob, membership),
}


def observe(subject: Subject, group: int, fitted: Sequence[Fitted]) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """Signals of a group's models on the pool, [models, N, 1]; and of each model what is told.

    That is ``train_accuracy``, ``train_loss``, ``test_accuracy``, ``test_loss``; ``test_accuracy_draws``: on test sets
    drawn with replacement, the same for all models and cells of a seed; ``rewound``: how many weights; ``privacy``:
    what DP-SGD spent and of what it is a guarantee (the fields of ``Privacy``), or None.
    """
    data, rows = subject.task.dataset, list(subject.groups[group])
    told: list[dict[str, Any]] = []
    found = []
    resampled = _weights(len(data.test), subject.seed)
    for row, one in zip(rows, fitted, strict=True):
        pool = _asked(one, data.inputs[data.pool])
        seen = Signals.from_logits(pool[None], data.targets[data.pool], subject.plan.membership[[row]]).values
        test = _asked(one, data.inputs[data.test])
        member = subject.plan.membership[row]
        right = (test.argmax(dim=1).cpu() == data.targets[data.test].cpu()).double()
        told.append(
            {
                "train_accuracy": float(seen["correct"][0, member, 0].double().mean()),
                "train_loss": float(seen["loss"][0, member, 0].double().mean()),
                "test_accuracy": float(right.mean()),
                "test_loss": float(torch.nn.functional.cross_entropy(test.double(), data.targets[data.test])),
                "test_accuracy_draws": [round(value, 6) for value in (resampled @ right.numpy()).tolist()],
                "rewound": 0 if one.masks is None else one.masks.total,
                "privacy": _privacy(one),
            }
        )
        found.append({name: seen[name] for name in ("loss", "phi")})
    joined = {name: [one[name] for one in told] for name in told[0]}
    return {name: torch.cat([one[name] for one in found]) for name in found[0]}, joined


@functools.lru_cache(maxsize=2)
def _weights(samples: int, seed: int) -> np.ndarray:
    """[REPLICATES, samples]: the share that each sample has of a set drawn with replacement."""
    rng = np.random.default_rng([seed, samples])
    return rng.multinomial(samples, np.full(samples, 1 / samples), size=REPLICATES) / samples


def _privacy(one: Fitted) -> dict[str, Any] | None:
    """For JSON, which has no infinity: an epsilon of None is none at all."""
    privacy = one.notes.get("privacy")
    if not isinstance(privacy, Privacy):
        return None
    return asdict(privacy) | {"epsilon": privacy.epsilon if math.isfinite(privacy.epsilon) else None}


def attacked(signals: Signals, preset: Preset, seed: int) -> dict[str, Any]:
    """Each attack, every model a target in turn: ``metrics.summary`` with the replicates of its AUC.

    ``auc_models`` are the targets' own AUCs.
    """
    phi, logprob = (signals[name][:, :, 0].double().numpy() for name in ("phi", "logprob"))
    member = signals.membership.numpy()
    options: dict[str, Any] = {"fprs": preset.fprs, "bootstrap": preset.bootstrap, "seed": seed, "draws": True}
    found = {}
    for name, attack in ATTACKS.items():
        scores = attack(phi, logprob, member)
        own = [metrics.auc(*one) for one in zip(scores, member, strict=True)]
        found[name] = metrics.summary(scores, member, **options) | {"auc_models": own}
    return found


@torch.no_grad()
def _asked(one: Fitted, inputs: Tensor) -> Tensor:
    return torch.cat([one.predict(batch) for batch in inputs.split(BATCH)])
