"""Shadow models trained by the target's own defense, and what an attacker sees of them."""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cwfast.mia import Signals
from cwfast.shadow.describing import describe
from cwfast.shadow.plan import Plan
from cwfast.shadow.runner import collect, run
from cwfast.shadow.work import resolve
from cwfast.training import Defense, Task, seeded

BATCH = 1024  # samples a query: fixed, since the bits of logits depend on it
Queries = Callable[[Tensor], Sequence[Tensor]]
Setup = tuple[Task, Defense] | tuple[Task, Defense, Queries]


def signals(
    source: "str | Callable[[], Setup] | Setup",
    out: str | os.PathLike[str],
    *,
    models: int = 64,
    seed: int = 0,
    group: int = 8,
    **how: Any,
) -> Signals:
    """Train shadow models on halves of a task's pool, resume where it was interrupted, and return their signals.

    Args:
        source: what to train, as ``(task, defense)`` or ``(task, defense, queries)``; a function without arguments that
            returns that; or its name, "module:function" (which keeps the data out of what is sent to workers). Each
            process must get the same of it. ``queries(inputs [n, ...])`` gives Q tensors like ``inputs``, the
            augmentations with which each sample is queried; without it, each is queried once, as it is.
        out: folder of the run.
        models: an even number; each sample is a member of half of them.
        seed: of the plan.
        group: models trained at once, as one call of ``Defense.fit_many``.
        how: ``engine``, ``workers``, ``threads``... of ``cwfast.shadow.run``.

    Returns:
        The statistics of ``cwfast.ops.logit_stats`` of ``Fitted.predict`` on the pool (less its last sample if odd),
        [models, N, Q], with labels and manifest. Every model may be the target in turn.

    Raises:
        Exception: as ``Plan.halves``, ``run`` and ``collect`` do.
    """
    job = Training(source)
    plan = job.plan(models, seed)
    run(plan, job, out, group=group, **how)
    found = collect(plan, out)
    found.require(plan.expected)
    return found


@dataclass(frozen=True)
class Training:
    """A job for ``cwfast.shadow.run``: trains by ``Defense.fit_many`` and queries ``Fitted.predict`` on all samples.

    Args:
        source: see ``signals``.
    """

    source: "str | Callable[[], Setup] | Setup"

    @property
    def setup(self) -> tuple[Task, Defense, Queries]:
        """Task, defense, queries.

        Raises:
            TypeError: the source gives something else.
        """
        made = self.source if isinstance(self.source, tuple) else _made(self.source)
        if not (isinstance(made, tuple) and len(made) in (2, 3)):
            raise TypeError(f"{self.source} must give (task, defense) or (task, defense, queries); got {made!r}")
        task, defense, *more = made
        if not (isinstance(task, Task) and isinstance(defense, Defense) and all(map(callable, more))):
            kinds = ", ".join(type(one).__name__ for one in made)
            raise TypeError(f"{self.source} must give a Task, a Defense and perhaps queries; got {kinds}")
        return task, defense, more[0] if more else as_they_are

    def plan(self, models: int, seed: int) -> Plan:
        """``Plan.halves`` of the task's pool, less its last sample if it is odd.

        Raises:
            ValueError: as ``Plan.halves`` does.
        """
        dataset = self.setup[0].dataset
        pool = dataset.pool[: len(dataset.pool) // 2 * 2].cpu()
        return Plan.halves(pool, dataset.reference.cpu(), models, seed)

    @property
    def manifest(self) -> dict[str, Any]:
        """What is trained, how and on which data; the model also by its initial weights and answers to a few samples.

        Computed by one thread, as initial weights may depend on how many there are (those by a QR decomposition do).
        """
        task, defense, queries = self.setup
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            model = task.initial_model(0)
            about = {"model": describe(model), "answers": _answers(model, task.dataset.inputs[task.dataset.pool[:4]])}
        finally:
            torch.set_num_threads(threads)
        return {
            "dataset": task.dataset.name,
            "data": task.dataset.sha256,
            **about,
            "recipe": asdict(task.recipe),
            "defense": describe(defense),
            "queries": describe(queries),
        }

    def __call__(self, plan: Plan, models: Sequence[int]) -> dict[str, Tensor]:
        """The statistics of some models, each [models, N, Q], and the labels."""
        task, defense, queries = self.setup
        data = task.dataset
        inputs, labels = data.inputs[plan.ids], data.targets[plan.ids].cpu()
        train_ids = [plan.train_ids(model) for model in models]
        fitted = defense.fit_many(task, train_ids, plan.reference, [plan.seeds[model] for model in models])
        found = []
        for model, one in zip(models, fitted, strict=True):
            with torch.no_grad():
                asked = [[one.predict(x) for x in queries(batch)] for batch in inputs.split(BATCH)]
            logits = torch.cat([torch.stack(each, dim=1) for each in asked])  # [N, Q, C]
            found.append(Signals.from_logits(logits[None], labels, plan.membership[[model]]).values)
        return {"labels": labels} | {name: torch.cat([one[name] for one in found]) for name in found[0]}


def as_they_are(inputs: Tensor) -> list[Tensor]:
    """One query per sample: the sample."""
    return [inputs]


def _answers(model: nn.Module, inputs: Tensor) -> Any:
    """Its logits in float64, rounded: what is left does not depend on the order of sums. None: it has no float64."""
    device = next((parameter.device for parameter in model.parameters()), inputs.device)
    asked = inputs.to(device, torch.float64 if inputs.is_floating_point() else inputs.dtype)
    try:
        with torch.no_grad(), seeded(0):
            return describe(model.double().eval()(asked).round(decimals=6) + 0.0)  # + 0.0: no -0.0
    except RuntimeError:  # it casts to another dtype within
        return None


@functools.lru_cache(maxsize=1)
def _made(source: str | Callable[[], Setup]) -> Setup:
    """Made once per process: a worker does several jobs with the same data."""
    return resolve(source)()
