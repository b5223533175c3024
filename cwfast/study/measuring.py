"""What a cell comes to: what an attacker sees of its models, and what attacks and accuracies say."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cwfast.mia import Signals, attacks, metrics
from cwfast.study.presets import Preset
from cwfast.study.subject import Subject
from cwfast.training import Fitted

BATCH = 1024  # samples a query: fixed, since the bits of logits depend on it
ATTACKS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {  # (phi, log p, membership) -> scores
    "lira_shrinkage": lambda phi, logprob, membership: attacks.lira(phi, membership, variance="shrinkage"),
    "rmia": lambda phi, logprob, membership: attacks.rmia(logprob, membership),
    "loss": lambda phi, logprob, membership: attacks.loss(logprob, membership),
}


def observe(subject: Subject, group: int, fitted: Sequence[Fitted]) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """Signals of a group's models on the pool, [models, N, 1]; and each model's accuracies and losses."""
    data, rows = subject.task.dataset, list(subject.groups[group])
    told: dict[str, list[Any]] = {
        name: [] for name in ("train_accuracy", "train_loss", "test_accuracy", "test_loss", "rewound")
    }
    found = []
    for row, one in zip(rows, fitted, strict=True):
        pool = _asked(one, data.inputs[data.pool])
        seen = Signals.from_logits(pool[None], data.targets[data.pool], subject.plan.membership[[row]]).values
        test = _asked(one, data.inputs[data.test])
        member = subject.plan.membership[row]
        told["train_accuracy"].append(float(seen["correct"][0, member, 0].double().mean()))
        told["train_loss"].append(float(seen["loss"][0, member, 0].double().mean()))
        told["test_accuracy"].append(float((test.argmax(dim=1).cpu() == data.targets[data.test].cpu()).double().mean()))
        loss = torch.nn.functional.cross_entropy(test.double(), data.targets[data.test])
        told["test_loss"].append(float(loss))
        told["rewound"].append(0 if one.masks is None else one.masks.total)
        found.append({name: seen[name] for name in ("loss", "phi")})
    return {name: torch.cat([one[name] for one in found]) for name in found[0]}, told


def attacked(signals: Signals, preset: Preset, seed: int) -> dict[str, Any]:
    """Each attack, every model a target in turn: ``metrics.summary`` with the replicates of its AUC."""
    phi, logprob = (signals[name][:, :, 0].double().numpy() for name in ("phi", "logprob"))
    member = signals.membership.numpy()
    options: dict[str, Any] = {"fprs": preset.fprs, "bootstrap": preset.bootstrap, "seed": seed, "draws": True}
    return {name: metrics.summary(attack(phi, logprob, member), member, **options) for name, attack in ATTACKS.items()}


@torch.no_grad()
def _asked(one: Fitted, inputs: Tensor) -> Tensor:
    return torch.cat([one.predict(batch) for batch in inputs.split(BATCH)])
