"""Tables of the paper on small networks of its kinds: what each part of the method does, and the entanglement."""

import math
from typing import TYPE_CHECKING, Any

from cwfast.defense import experiments
from cwfast.defense.specs import parse_loss
from cwfast.study.presets import Setting

if TYPE_CHECKING:
    from cwfast.study.subject import Subject

MODELS = 2  # trained one by one, with a scorer on every step
EPOCHS = 30


def settings(setting: Setting) -> list[Any]:
    """What a table depends on, beside its network and the data."""
    return [MODELS, EPOCHS, setting.losses.get("relaxloss"), setting.ablation_rate]


def table(subject: "Subject", spec: str) -> dict[str, Any]:
    """``"entanglement:ResNet18"``, ``"ablation:ViT"``: see ``cwfast.defense.experiments``."""
    kind, _, network = spec.partition(":")
    task = experiments.architectures(subject.task.dataset, epochs=EPOCHS)[network]
    rows = range(MODELS)
    ids, seeds = [subject.plan.train_ids(row) for row in rows], [subject.plan.seeds[row] for row in rows]
    if kind == "entanglement":
        criteria = ("taylor", "taylor_delta", "gap", "magnitude", "random")
        found = experiments.entanglement(task, ids, subject.plan.reference, seeds, criteria=criteria)
    else:
        loss = parse_loss(subject.setting.losses["relaxloss"])
        rate = subject.setting.ablation_rate
        found = experiments.ablation(task, ids, subject.plan.reference, seeds, loss=loss, rate=rate)
    finite: dict[str, Any] = _finite({"network": network, "epochs": EPOCHS, **found})
    return finite


def _finite(value: Any) -> Any:
    """JSON has no infinity: what diverged is None."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
