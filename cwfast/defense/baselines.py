"""What CWRF is compared with: plain training, early stopping, weight decay, interpolation to the initial weights."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from cwfast.data import Batches
from cwfast.defense.recalibration import Batch, recalibrate_
from cwfast.training import Defense, Fitted, Loss, Task, cross_entropy, fit_from_scratch


class PlainTraining(Defense):
    """Training from scratch by the recipe, with any loss; with cross-entropy: no defense."""

    def __init__(self, loss: Loss = cross_entropy) -> None:
        self.loss = loss

    def fit_many(
        self,
        task: Task,
        train_ids: Sequence[Tensor],
        reference_ids: Tensor,
        seeds: Sequence[int],
        *,
        trained: Sequence[Fitted] | None = None,
    ) -> list[Fitted]:
        """``trained`` is not used: training starts from the initial weights."""
        return fit_from_scratch(task, train_ids, seeds, loss=self.loss)


class EarlyStopping(Defense):
    """Plain training, cut after ``epochs`` epochs of the recipe's schedule."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def fit_many(
        self,
        task: Task,
        train_ids: Sequence[Tensor],
        reference_ids: Tensor,
        seeds: Sequence[int],
        *,
        trained: Sequence[Fitted] | None = None,
    ) -> list[Fitted]:
        """``trained`` is not used: training starts from the initial weights."""
        return early_stopping_sweep(task, train_ids, seeds, [self.epochs])[1][self.epochs]


class WeightDecay(Defense):
    """Plain training with the optimizer's weight decay at another strength than the recipe's.

    Args:
        strength: at least 0.
        loss: of training.
    """

    def __init__(self, strength: float = 5e-4, *, loss: Loss = cross_entropy) -> None:
        if not strength >= 0:
            raise ValueError(f"strength must be at least 0; got {strength}")
        self.strength, self.loss = strength, loss

    def fit_many(
        self,
        task: Task,
        train_ids: Sequence[Tensor],
        reference_ids: Tensor,
        seeds: Sequence[int],
        *,
        trained: Sequence[Fitted] | None = None,
    ) -> list[Fitted]:
        """``trained`` is not used: training starts from the initial weights."""
        decayed = replace(task, recipe=replace(task.recipe, weight_decay=self.strength))
        return fit_from_scratch(decayed, train_ids, seeds, loss=self.loss)


def early_stopping_sweep(
    task: Task, train_ids: Sequence[Tensor], seeds: Sequence[int], epochs: Sequence[int]
) -> tuple[list[Fitted], dict[int, list[Fitted]]]:
    """The fully trained models, and those after each number of epochs, from one training run.

    Raises:
        ValueError: a number of epochs is not within the recipe's.
    """
    if not all(1 <= n <= task.recipe.epochs for n in epochs):
        raise ValueError(f"epochs must lie between 1 and the recipe's {task.recipe.epochs}; got {list(epochs)}")
    kept: dict[int, list[dict[str, Tensor]]] = {}
    final = fit_from_scratch(
        task, train_ids, seeds, on_epoch=lambda done, weights: kept.update({done: weights()} if done in epochs else {})
    )
    return final, {n: [_with_weights(f, state) for f, state in zip(final, kept[n], strict=True)] for n in epochs}


def interpolated(fitted: Fitted, tau: float, members: Iterable[Batch]) -> nn.Module:
    """A model with the weights ``w0 + tau (w - w0)``: 1 is the trained model, 0 has the initial weights.

    BatchNorm's running statistics are measured again over ``members``, batches of training samples; not at 0 and 1, as
    CWRF does it.
    """
    model = copy.deepcopy(fitted.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.lerp(fitted.initial[name], parameter, tau))
    return model if tau in (0, 1) else recalibrate_(model, members)


def interpolate_many(
    task: Task, trained: Sequence[Fitted], train_ids: Sequence[Tensor], seeds: Sequence[int], taus: Sequence[float]
) -> list[nn.Module]:
    """``interpolated`` for a fleet, each model by its own tau, in batches of its members as CWRF takes them."""
    found = []
    for fitted, ids, seed, tau in zip(trained, train_ids, seeds, taus, strict=True):
        members = Batches(task.dataset, ids, task.recipe.batch_size, seed, wrap=True)
        found.append(interpolated(fitted, tau, members))
    return found


def tau_at_distance(fitted: Fitted, other: nn.Module) -> float:
    """The tau at which ``interpolated`` is as far from the trained weights (Euclidean) as ``other`` is."""
    trained = dict(fitted.model.named_parameters())
    moved = _distance(trained, dict(other.named_parameters()))
    whole = _distance(trained, {name: fitted.initial[name] for name in trained})
    return 1 - moved / whole if whole else 1.0


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    with torch.no_grad():
        return float(sum((a[name].double() - b[name].double()).square().sum() for name in a)) ** 0.5


def _with_weights(fitted: Fitted, state: Mapping[str, Tensor]) -> Fitted:
    model = copy.deepcopy(fitted.model)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.copy_(state[name])
    return Fitted(model, fitted.initial)
