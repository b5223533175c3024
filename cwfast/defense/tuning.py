"""Fine-tuning around weights that stay: of one model in its owner's batches, and of a fleet."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cwfast.defense.recalibration import Batch, filled
from cwfast.freezing import freeze
from cwfast.masks import MaskSet
from cwfast.training import Fitted, Loss, Task, cosine, cross_entropy, train_many

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Tuning:
    """Fine-tuning of one model as ``cwrf_`` describes it, prepared: what may be refused is refused here.

    Args:
        model: trained in place by ``run``.
        members: re-iterable batches ``(inputs, targets)``.
        loss, lr, optimizer, epochs: see ``cwrf_``.
    """

    def __init__(
        self,
        model: nn.Module,
        members: Iterable[Batch],
        loss: Loss | None,
        lr: float,
        optimizer: MakeOptimizer | None,
        epochs: int,
    ) -> None:
        self._model, self._members, self._loss, self._epochs = model, members, loss or cross_entropy, epochs
        if epochs:
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self._optimizer = optimizer(parameters) if optimizer else torch.optim.SGD(parameters, lr, momentum=0.9)
            total = epochs * _length(members)
            self._schedule = torch.optim.lr_scheduler.LambdaLR(
                self._optimizer, lambda step: cosine(min(step, total), total)
            )

    def run(self, frozen: MaskSet) -> list[float]:
        """Train while the frozen weights stay.

        Returns:
            The mean loss of each epoch.
        """
        if not self._epochs:
            return []
        with _training(self._model), freeze(self._model, self._optimizer, frozen):
            return [self._epoch(epoch) for epoch in range(self._epochs)]

    def _epoch(self, epoch: int) -> float:
        total, samples = 0.0, 0
        for inputs, targets in filled(self._members):
            self._optimizer.zero_grad()
            value = self._loss(self._model(inputs), targets, epoch=epoch)
            value.backward()
            self._optimizer.step()
            self._schedule.step()
            total, samples = total + float(value.detach()) * len(targets), samples + len(targets)
        return total / max(1, samples)


def check_epochs(epochs: int | None) -> None:
    """A number of epochs that training can take; None: some default.

    Raises:
        ValueError: it is not.
    """
    if epochs is not None and (not isinstance(epochs, int) or epochs < 0):
        raise ValueError(f"epochs must be a whole number, at least 0; got {epochs!r}")


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode; each module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _length(batches: Iterable[Batch]) -> int:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # no length, as a DataLoader of an IterableDataset
        return sum(1 for _ in batches)


def fine_tune(
    task: Task,
    models: Sequence[nn.Module],
    trained: Sequence[Fitted],
    train_ids: Sequence[Tensor],
    seeds: Sequence[int],
    *,
    loss: Loss,
    epochs: int | None = None,
    masks: Sequence[MaskSet] | None = None,
    frozen: Sequence[MaskSet] | None = None,
) -> list[Fitted]:
    """Train ``models`` in place, with a fresh optimizer from the initial learning rate.

    Args:
        task: dataset and recipe.
        models: changed from the trained ones in any way.
        trained: where they come from.
        train_ids: for each model, the indices of its members.
        seeds: for each model, of the order of its samples.
        loss: to train by.
        epochs: None: half of the recipe's, rounded up.
        masks: for each model, the critical weights: ``Fitted.masks``.
        frozen: for each model, what stays; None: the critical weights.
    """
    epochs = math.ceil(task.recipe.epochs / 2) if epochs is None else epochs
    frozen = masks if frozen is None else frozen
    train_many(models, task.dataset, train_ids, seeds, task.recipe, loss=loss, epochs=epochs, masks=frozen)
    return [
        Fitted(model, before.initial, masks[k] if masks else None)
        for k, (model, before) in enumerate(zip(models, trained, strict=True))
    ]
