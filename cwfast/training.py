"""What joins defenses, shadows and attacks: a recipe, a task, a defense and what it fits; and training of many small
models as one stacked fleet."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from cwfast import reference
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
    """

    optimizer: str = "sgd"
    lr: float = 0.1
    epochs: int = 30
    batch_size: int = 32
    schedule: str = "cosine"
    momentum: float = 0.9
    weight_decay: float = 0.0
    seed: int = 0

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


@dataclass(frozen=True)
class Task:
    """A model architecture, data, and how to train. ``make_model()`` draws its initial weights from torch's RNG."""

    make_model: Callable[[], nn.Module]
    dataset: Dataset
    recipe: Recipe

    def initial_model(self, seed: int) -> nn.Module:
        """A fresh model whose initial weights depend on ``seed`` alone; the global RNG is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make_model()


@dataclass
class Fitted:
    """A trained model, and what its defense did.

    Attributes:
        model: in evaluation mode.
        initial: its ``state_dict`` before training.
        masks: the weights that were rewound and frozen, or None.
        predict: inputs ``[N, ...]`` -> logits ``[N, C]``: all that an attacker may query. None: the model's own output.
    """

    model: nn.Module
    initial: dict[str, Tensor]
    masks: MaskSet | None = None
    predict: Callable[[Tensor], Tensor] = field(default=None)  # type: ignore[assignment]

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
    epochs: int | None = None,
    masks: Sequence[MaskSet] | None = None,
    on_epoch: Callable[[int, Callable[[], list[dict[str, Tensor]]]], None] | None = None,
) -> None:
    """Train models of one architecture in place, all in one stack of tensors: the same steps as one by one, faster.

    Results equal those of a fleet of one up to the rounding of batched matrix products.

    Args:
        models: without buffers (BatchNorm) and dropout; their present weights are where training starts.
        dataset: inputs and targets.
        ids: for each model the indices it trains on, equally many.
        seeds: of each model's order of samples.
        recipe: optimizer, schedule, batch size.
        loss: applied to each model's batch.
        epochs: instead of ``recipe.epochs``.
        masks: for each model, weights that stay as they are.
        on_epoch: called after each epoch with the number of epochs done and a function that gives the present weights.

    Raises:
        ValueError: the models cannot be stacked, or the lists differ in length.
    """
    _check_stackable(models, ids, seeds, masks)
    epochs = recipe.epochs if epochs is None else epochs
    fleet, names = _stack(models)
    parameters: dict[str, Tensor] = dict(fleet.named_parameters())
    skeleton = copy.deepcopy(models[0]).to("meta")

    def objective(weights: dict[str, Tensor], inputs: Tensor, targets: Tensor, epoch: int) -> Tensor:
        return loss(torch.func.functional_call(skeleton, weights, (inputs,)), targets, epoch=epoch)

    objectives = torch.func.vmap(objective, in_dims=(0, 0, 0, None))
    samples = torch.stack(list(ids))
    steps = epochs * -(-samples.shape[1] // recipe.batch_size)
    optimizer = _optimizer([p for p in fleet.parameters() if p.requires_grad], recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(recipe, step, steps))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with ExitStack() as stack:
        if masks is not None:
            stack.enter_context(freeze(fleet, optimizer, _stacked_masks(masks)))
        for epoch in range(epochs):
            order = torch.stack([torch.randperm(samples.shape[1], generator=generator) for generator in generators])
            for batch in samples.gather(1, order).split(recipe.batch_size, dim=1):
                optimizer.zero_grad()
                objectives(parameters, dataset.inputs[batch], dataset.targets[batch], epoch).sum().backward()
                optimizer.step()
                schedule.step()
            if on_epoch is not None:
                on_epoch(
                    epoch + 1,
                    lambda: [
                        {name: parameters[name][k].detach().clone() for name in names} for k in range(len(models))
                    ],
                )
    with torch.no_grad():
        for k, model in enumerate(models):
            for name, parameter in model.named_parameters():
                parameter.copy_(parameters[name][k])


def fit_from_scratch(
    task: Task,
    train_ids: Sequence[Tensor],
    seeds: Sequence[int],
    *,
    loss: Loss = cross_entropy,
    on_epoch: Callable[[int, Callable[[], list[dict[str, Tensor]]]], None] | None = None,
) -> list[Fitted]:
    """Fresh models, trained by the task's recipe."""
    models = [task.initial_model(seed) for seed in seeds]
    initial = [snapshot(model) for model in models]
    train_many(models, task.dataset, train_ids, seeds, task.recipe, loss=loss, on_epoch=on_epoch)
    return [Fitted(model, before) for model, before in zip(models, initial, strict=True)]


def _check_stackable(
    models: Sequence[nn.Module], ids: Sequence[Tensor], seeds: Sequence[int], masks: Sequence[MaskSet] | None
) -> None:
    lengths = {"models": len(models), "ids": len(ids), "seeds": len(seeds)} | (
        {} if masks is None else {"masks": len(masks)}
    )
    if not models or len(set(lengths.values())) != 1:
        raise ValueError(f"there must be as many ids, seeds and masks as models, at least one; got {lengths}")
    if len({len(x) for x in ids}) != 1:
        raise ValueError(f"models of one fleet must train on equally many samples; got {sorted({len(x) for x in ids})}")
    for model in models:
        if _signature(model) != _signature(models[0]):
            raise ValueError("models of one fleet must have parameters of the same names, shapes and requires_grad")
    stateful = [name for name, _ in models[0].named_buffers()]
    stateful += [name for name, m in models[0].named_modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    if stateful:
        raise ValueError(f"models of one fleet must have no buffers and no dropout; got {stateful[0]!r}")


def _signature(model: nn.Module) -> dict[str, tuple[torch.Size, bool]]:
    return {name: (parameter.shape, parameter.requires_grad) for name, parameter in model.named_parameters()}


def _stack(models: Sequence[nn.Module]) -> tuple[nn.Module, list[str]]:
    """A module of the same structure whose parameters are ``[models, *shape]``, under their usual names."""
    fleet = copy.deepcopy(models[0])
    names = []
    for name, parameter in list(fleet.named_parameters()):
        path, _, leaf = name.rpartition(".")
        stacked = torch.stack([dict(model.named_parameters())[name].detach() for model in models])
        fleet.get_submodule(path)._parameters[leaf] = nn.Parameter(stacked, requires_grad=parameter.requires_grad)
        names.append(name)
    return fleet, names


def _stacked_masks(masks: Sequence[MaskSet]) -> MaskSet:
    """One set over the fleet's stacked parameters."""
    stacked = {name: torch.stack([one[name] for one in masks]) for name in masks[0].names}
    return MaskSet(
        {name: reference.pack(mask) for name, mask in stacked.items()}, {n: m.shape for n, m in stacked.items()}
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
