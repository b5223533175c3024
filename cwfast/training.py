"""What joins defenses, shadows and attacks: a recipe, a task, a defense and what it fits; and training of many small
models as one stacked fleet."""

import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from cwfast._fleet import Alone, Fleet, Stacked, signature, why_alone
from cwfast._parameters import snapshot
from cwfast.data import Dataset
from cwfast.freezing import freeze
from cwfast.masks import MaskSet

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        optimizer: "sgd" (with ``momentum``) or "adamw".
        lr: initial learning rate.
        epochs: passes over the training samples.
        batch_size: samples a step; an epoch's last batch may be smaller.
        schedule: "cosine" (from ``lr`` to 0 over all steps) or "constant".
        momentum: of sgd.
        weight_decay: of the optimizer.
        seed: base of the seeds where a caller gives none.
        stack: train many models as one stack where that can be done (see ``train_many``); False: always one by one.
    """

    optimizer: str = "sgd"
    lr: float = 0.1
    epochs: int = 30
    batch_size: int = 32
    schedule: str = "cosine"
    momentum: float = 0.9
    weight_decay: float = 0.0
    seed: int = 0
    stack: bool = True

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {OPTIMIZERS}; got {self.optimizer!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES}; got {self.schedule!r}")
        if self.epochs < 0 or self.batch_size < 1:
            raise ValueError(f"epochs must be at least 0 and batch_size 1; got {self.epochs} and {self.batch_size}")


class Loss(Protocol):
    """A training loss: ``[B, C]`` logits and ``[B]`` targets -> scalar. ``epoch`` counts from 0."""

    def __call__(self, logits: Tensor, targets: Tensor, *, epoch: int = 0) -> Tensor: ...


def cross_entropy(logits: Tensor, targets: Tensor, *, epoch: int = 0) -> Tensor:
    """Mean cross-entropy, in nats."""
    return functional.cross_entropy(logits, targets)


class Objective:
    """What the steps of one fleet minimise: a loss of each model's logits. Subclasses may minimise more than that.

    Args:
        fleet: holds the parameters.
        models: which of all models it holds.
        loss: of one model's batch.
    """

    def __init__(self, fleet: Fleet, models: range, loss: Loss = cross_entropy) -> None:
        self.fleet, self.models, self.loss = fleet, models, loss

    def start(self, epoch: int) -> None:
        """Before the first step of an epoch."""

    def losses(self, inputs: Tensor, targets: Tensor, epoch: int) -> Tensor:
        """``[models]``, of batches ``[models, batch, ...]``; the sum is what backward starts from."""
        return self.fleet.losses(self.loss, inputs, targets, epoch)

    def outputs(self, inputs: Tensor) -> Tensor:
        """``[models, batch, ...]``: what the models return, as they are: in training mode."""
        return self.fleet.losses(_outputs, inputs, inputs, 0)

    def stepped(self) -> None:
        """After each step of the optimizer."""


def _outputs(outputs: Tensor, targets: Tensor, *, epoch: int) -> Tensor:
    return outputs


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's generators begin at a seed; afterwards they are as they were, CUDA's too where CUDA is initialized.

    Not yet run on a GPU.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Task:
    """A model architecture, data, and how to train. ``make_model()`` draws its initial weights from torch's RNG."""

    make_model: Callable[[], nn.Module]
    dataset: Dataset
    recipe: Recipe

    def initial_model(self, seed: int) -> nn.Module:
        """A fresh model whose initial weights depend on ``seed`` alone; the global RNG is left as it was."""
        with seeded(seed):
            return self.make_model()


@dataclass
class Fitted:
    """A trained model, and what its defense did.

    Attributes:
        model: in evaluation mode.
        initial: its ``state_dict`` before training.
        masks: the weights that were rewound and frozen, or None.
        predict: inputs ``[N, ...]`` -> logits ``[N, C]``: all that an attacker may query. None: the model's own output.
        notes: what else its defense has to say, by name: "privacy" (``DPSGD``).
    """

    model: nn.Module
    initial: dict[str, Tensor]
    masks: MaskSet | None = None
    predict: Callable[[Tensor], Tensor] = field(default=None)  # type: ignore[assignment]
    notes: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model.eval()
        if self.predict is None:
            self.predict = self._logits

    @torch.no_grad()
    def _logits(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)


class Defense:
    """Trains models in a way that should leak less. Shadow models are trained by the target's own defense."""

    def fit_many(
        self,
        task: Task,
        train_ids: Sequence[Tensor],
        reference_ids: Tensor,
        seeds: Sequence[int],
        *,
        trained: Sequence[Fitted] | None = None,
    ) -> list[Fitted]:
        """Train one model per item of ``train_ids``.

        Args:
            task: architecture, data, recipe.
            train_ids: for each model, the int64 indices of its members; equally many for all.
            reference_ids: non-members that the defense may use.
            seeds: for each model: initial weights and order of the samples.
            trained: undefended models to start from, which skips the initial training; left as they are.
        """
        raise NotImplementedError

    def fit(
        self, task: Task, train_ids: Tensor, reference_ids: Tensor, seed: int, *, trained: Fitted | None = None
    ) -> Fitted:
        """``fit_many`` for one model."""
        several = self.fit_many(
            task, [train_ids], reference_ids, [seed], trained=None if trained is None else [trained]
        )
        return several[0]


def train_many(
    models: Sequence[nn.Module],
    dataset: Dataset,
    ids: Sequence[Tensor],
    seeds: Sequence[int],
    recipe: Recipe,
    *,
    loss: Loss = cross_entropy,
    objective: Callable[[Fleet, range], Objective] | None = None,
    epochs: int | None = None,
    masks: Sequence[MaskSet] | None = None,
    on_epoch: Callable[[int, Callable[[], list[dict[str, Tensor]]]], None] | None = None,
) -> None:
    """Train models of one architecture in place, all in one stack of tensors: the same steps as one by one, faster.

    Results equal those of a fleet of one up to the rounding of batched matrix products; BatchNorm's running statistics
    are each model's own. Not stacked but trained one by one are models with dropout or other modules that draw random
    numbers (each model's then follow from its seed alone), recurrent ones, BatchNorm with ``momentum=None``, and all
    models where ``recipe.stack`` is False. Where the recipe would have them stacked, a warning says why they are not.
    Models and dataset lie on one device; not yet run on a GPU.

    Args:
        models: trained in training mode from their present weights; each module keeps its mode.
        dataset: inputs and targets.
        ids: for each model the indices it trains on, equally many.
        seeds: of each model's order of samples, and of its random numbers.
        recipe: optimizer, schedule, batch size, whether to stack.
        loss: applied to each model's batch.
        objective: instead of ``loss``: given a fleet and which of the models it holds, makes what it minimises.
        epochs: instead of ``recipe.epochs``.
        masks: for each model, weights that stay as they are.
        on_epoch: called after each epoch with the number of epochs done and a function that gives the present
            parameters and buffers of each model by name.

    Raises:
        ValueError: the models differ in architecture, or the lists in length.
        RuntimeError: ``torch.func.vmap`` cannot run the model or the loss; nothing has been trained.
    """
    _check_lists(models, ids, seeds, masks)
    epochs = recipe.epochs if epochs is None else epochs
    reason = why_alone(models[0]) if recipe.stack else None
    if reason is not None and len(models) > 1:
        warnings.warn(f"{len(models)} models are trained one by one, not as one stack: {reason}", stacklevel=2)
    together = recipe.stack and reason is None
    groups = [slice(0, len(models))] if together else [slice(k, k + 1) for k in range(len(models))]
    fleets: list[Fleet] = [Stacked(models[g]) if together else Alone(models[g.start], seeds[g.start]) for g in groups]
    with ExitStack() as stack:
        runs = []
        for fleet, g in zip(fleets, groups, strict=True):
            stack.callback(fleet.finish)
            frozen = None if masks is None else masks[g]
            rows = range(len(models))[g]
            goal = Objective(fleet, rows, loss) if objective is None else objective(fleet, rows)
            runs.append(_run(fleet, dataset, ids[g], seeds[g], recipe, goal, epochs, frozen))
            stack.callback(runs[-1].close)
        for epoch in range(epochs):
            for run in runs:
                next(run)
            if on_epoch is not None:
                on_epoch(epoch + 1, lambda: [_copy(state) for fleet in fleets for state in fleet.states()])


def _run(
    fleet: Fleet,
    dataset: Dataset,
    ids: Sequence[Tensor],
    seeds: Sequence[int],
    recipe: Recipe,
    goal: Objective,
    epochs: int,
    masks: Sequence[MaskSet] | None,
) -> Generator[None, None, None]:
    """Trains, and pauses after each epoch."""
    samples = torch.stack(list(ids))
    steps = epochs * -(-samples.shape[1] // recipe.batch_size)
    optimizer = _optimizer([p for p in fleet.module.parameters() if p.requires_grad], recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(recipe, step, steps))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with ExitStack() as stack:
        if masks is not None:
            stack.enter_context(freeze(fleet.module, optimizer, fleet.masks(masks)))
        for epoch in range(epochs):
            goal.start(epoch)
            order = torch.stack([torch.randperm(samples.shape[1], generator=generator) for generator in generators])
            for batch in samples.gather(1, order).split(recipe.batch_size, dim=1):
                optimizer.zero_grad()
                goal.losses(dataset.inputs[batch], dataset.targets[batch], epoch).sum().backward()
                optimizer.step()
                goal.stepped()
                schedule.step()
            yield


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def fit_from_scratch(
    task: Task,
    train_ids: Sequence[Tensor],
    seeds: Sequence[int],
    *,
    loss: Loss = cross_entropy,
    objective: Callable[[Fleet, range], Objective] | None = None,
    on_epoch: Callable[[int, Callable[[], list[dict[str, Tensor]]]], None] | None = None,
) -> list[Fitted]:
    """Fresh models, trained by the task's recipe."""
    models = [task.initial_model(seed) for seed in seeds]
    initial = [snapshot(model) for model in models]
    train_many(models, task.dataset, train_ids, seeds, task.recipe, loss=loss, objective=objective, on_epoch=on_epoch)
    return [Fitted(model, before) for model, before in zip(models, initial, strict=True)]


def _check_lists(
    models: Sequence[nn.Module], ids: Sequence[Tensor], seeds: Sequence[int], masks: Sequence[MaskSet] | None
) -> None:
    lengths = {"models": len(models), "ids": len(ids), "seeds": len(seeds)} | (
        {} if masks is None else {"masks": len(masks)}
    )
    if not models or len(set(lengths.values())) != 1:
        raise ValueError(f"there must be as many ids, seeds and masks as models, at least one; got {lengths}")
    if len({len(x) for x in ids}) != 1:
        raise ValueError(f"models of one fleet must train on equally many samples; got {sorted({len(x) for x in ids})}")
    for k, model in enumerate(models):
        for what, own, first in zip(
            ("parameters", "buffers", "modules"), signature(model), signature(models[0]), strict=True
        ):
            if own != first:
                raise ValueError(
                    f"models of one fleet must have {what} of the same names, types, shapes, dtypes and "
                    f"requires_grad; those of models 0 and {k} differ"
                )


def _optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True
        )
    return torch.optim.AdamW(parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def _factor(recipe: Recipe, step: int, steps: int) -> float:
    return 1.0 if recipe.schedule == "constant" else cosine(step, steps)


def cosine(step: int, steps: int) -> float:
    """The share of the learning rate at ``step``, the number of batches done: from 1 to 0 over ``steps``."""
    return 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
