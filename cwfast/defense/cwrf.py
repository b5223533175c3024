"""CWRF: critical weights rewinding and fine-tuning."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cwfast._parameters import Initial, check_apart
from cwfast._scopes import count
from cwfast._selecting import select
from cwfast.data import Batches, check_reiterable
from cwfast.defense.gap import gap_shares
from cwfast.defense.pve import vulnerability
from cwfast.freezing import freeze
from cwfast.masks import MaskSet, rewind_
from cwfast.scoring import CRITERIA as TAYLOR_CRITERIA
from cwfast.training import Defense, Fitted, Loss, Task, cosine, cross_entropy, fit_from_scratch, train_many

CRITERIA = (*TAYLOR_CRITERIA, "gap")
Batch = tuple[Tensor, Tensor]


@dataclass(eq=False)
class CWRFResult:
    """What ``cwrf_`` found: the rewound weights, their scores, and the mean loss of each fine-tuning epoch."""

    masks: MaskSet
    scores: dict[str, Tensor]
    history: list[float]


def critical_scores(
    model: nn.Module,
    initial: Initial,
    members: Iterable[Batch],
    reference: Iterable[Batch],
    *,
    criterion: str = "taylor",
    **options: object,
) -> dict[str, Tensor]:
    """Scores by any criterion: ``gap_shares`` clamped at 0 for "gap", else ``vulnerability``, which takes ``options``.

    Raises:
        ValueError: there is no such criterion.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {CRITERIA}; got {criterion!r}")
    if criterion == "gap":
        return {name: share.clamp_(min=0) for name, share in gap_shares(model, initial, members, reference).items()}
    return vulnerability(model, initial, members, reference, criterion=criterion, **options)  # type: ignore[arg-type]


def critical_masks(scores: Mapping[str, Tensor], rate: float, *, criterion: str = "taylor") -> MaskSet:
    """The critical weights: the global top ``rate`` of the scores.

    Raises:
        ValueError: for "gap", more are asked for than have a positive share; the message names the largest rate.
    """
    if criterion == "gap":
        positive = sum(int((score > 0).sum()) for score in scores.values())
        numel = sum(score.numel() for score in scores.values())
        if count(rate, numel) > positive:
            largest = positive * 10**9 // numel / 10**9  # rounded down
            raise ValueError(
                f"rate must be at most {largest} here: {positive} of {numel} weights have a positive share of the gap, "
                f"and rewinding the others would widen it; got {rate}"
            )
    return select(scores, rate=rate)


def cwrf_(
    model: nn.Module,
    initial: Initial,
    members: Iterable[Batch],
    reference: Iterable[Batch],
    *,
    rate: float,
    loss: Loss | None = None,
    lam: float = 0.5,
    steps: int | None = None,
    criterion: str = "taylor",
    granularity: str = "sample",
    update: bool = True,
    lr: float = 0.1,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    epochs: int = 0,
) -> CWRFResult:
    """Score, select, rewind and (with ``epochs``) fine-tune a trained model in place.

    Args:
        model: trained.
        initial: its initial weights: module, mapping or safetensors file.
        members: re-iterable batches ``(inputs, targets)`` of its training samples.
        reference: the same of non-members.
        rate: share of the weights to rewind, 0 .. 1.
        loss: of fine-tuning; None: cross-entropy.
        lam: see ``vulnerability``, as for the next; not used by "gap".
        steps: see ``vulnerability``.
        criterion: one of ``CRITERIA``.
        granularity: see ``vulnerability``.
        update: see ``vulnerability``.
        lr: the initial learning rate of training: estimation takes a tenth of it, fine-tuning starts from it.
        optimizer: parameters -> a fresh optimizer for fine-tuning; None: SGD at ``lr`` with momentum 0.9.
        epochs: of fine-tuning, in training mode, by a cosine schedule over all batches as in ``Recipe``; 0: none, the
            rewound model is yours to fine-tune inside ``cwfast.freeze``.

    Raises:
        TypeError: ``members`` or ``reference`` can be iterated only once, or ``optimizer`` cannot be called.
        ValueError: an argument is out of range or not of this model, or ``initial`` is the model's own memory. In all
            these cases the model has not been changed.

    Source:
        Fang & Kim, "Learnability and Privacy Vulnerability Are Entangled in a Few Critical Weights", ICLR 2026.
    """
    if not isinstance(epochs, int) or epochs < 0:
        raise ValueError(f"epochs must be a whole number, at least 0; got {epochs!r}")
    if optimizer is not None and not callable(optimizer):
        raise TypeError(f"optimizer must be called with parameters and return one; got {type(optimizer).__name__}")
    check_reiterable(members=members, reference=reference)
    check_apart(initial, dict(model.named_parameters()))
    scores = critical_scores(
        model,
        initial,
        members,
        reference,
        criterion=criterion,
        **(
            {}
            if criterion == "gap"
            else {"lam": lam, "steps": steps, "granularity": granularity, "update": update, "lr": 0.1 * lr}
        ),
    )
    masks = critical_masks(scores, rate, criterion=criterion)
    if epochs:  # built before the model changes: this may refuse lr
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fresh = optimizer(parameters) if optimizer else torch.optim.SGD(parameters, lr, momentum=0.9)
        total = epochs * _length(members)
        schedule = torch.optim.lr_scheduler.LambdaLR(fresh, lambda step: cosine(min(step, total), total))
    rewind_(model, masks, initial)
    history = []
    if epochs:
        with _training(model), freeze(model, fresh, masks):
            for epoch in range(epochs):
                history.append(_train_epoch(model, members, fresh, schedule, loss or cross_entropy, epoch))
    return CWRFResult(masks, scores, history)


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


def _train_epoch(
    model: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    loss: Loss,
    epoch: int,
) -> float:
    total, samples = 0.0, 0
    for inputs, targets in batches:
        optimizer.zero_grad()
        value = loss(model(inputs), targets, epoch=epoch)
        value.backward()
        optimizer.step()
        schedule.step()
        total, samples = total + float(value.detach()) * len(targets), samples + len(targets)
    return total / max(1, samples)


class CWRF(Defense):
    """``cwrf_`` for a fleet: undefended training, critical weights rewound and frozen, the rest fine-tuned.

    Args:
        rate: share of the weights to rewind.
        loss: of fine-tuning; None: cross-entropy.
        criterion, granularity, lam, steps, update: see ``cwrf_``.
        epochs: of fine-tuning; None: half of the recipe's, rounded up.
    """

    def __init__(
        self,
        rate: float,
        *,
        loss: Loss | None = None,
        criterion: str = "taylor",
        granularity: str = "sample",
        lam: float = 0.5,
        steps: int | None = None,
        update: bool = True,
        epochs: int | None = None,
    ) -> None:
        if criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {CRITERIA}; got {criterion!r}")
        self.rate, self.loss, self.criterion, self.epochs = rate, loss or cross_entropy, criterion, epochs
        self._options = {"granularity": granularity, "lam": lam, "steps": steps, "update": update}

    def score(
        self,
        task: Task,
        train_ids: Sequence[Tensor],
        reference_ids: Tensor,
        seeds: Sequence[int],
        trained: Sequence[Fitted],
    ) -> list[dict[str, Tensor]]:
        """Each trained model's scores: what ``fit_many`` selects from. They do not depend on the rate."""
        size, taylor = task.recipe.batch_size, self.criterion != "gap"
        options = dict(self._options, lr=0.1 * task.recipe.lr) if taylor else {}
        return [
            critical_scores(
                fitted.model,
                fitted.initial,
                # gap counts each sample once; the estimate wants batches of equal size
                Batches(task.dataset, ids, size, seed, wrap=taylor),
                Batches(task.dataset, reference_ids, size, seed, wrap=taylor),
                criterion=self.criterion,
                **options,
            )
            for fitted, ids, seed in zip(trained, train_ids, seeds, strict=True)
        ]

    def masks(self, scores: Sequence[Mapping[str, Tensor]]) -> list[MaskSet]:
        """Each model's critical weights at this rate."""
        return [critical_masks(one, self.rate, criterion=self.criterion) for one in scores]

    def fit_many(
        self,
        task: Task,
        train_ids: Sequence[Tensor],
        reference_ids: Tensor,
        seeds: Sequence[int],
        *,
        trained: Sequence[Fitted] | None = None,
        scores: Sequence[Mapping[str, Tensor]] | None = None,
        masks: Sequence[MaskSet] | None = None,
    ) -> list[Fitted]:
        """As ``Defense.fit_many``; ``scores`` (of ``score``, shared over rates) or ``masks`` skip those steps."""
        trained = trained or fit_from_scratch(task, train_ids, seeds)
        if masks is None:
            masks = self.masks(scores or self.score(task, train_ids, reference_ids, seeds, trained))
        models = [copy.deepcopy(fitted.model) for fitted in trained]
        for model, one, fitted in zip(models, masks, trained, strict=True):
            rewind_(model, one, fitted.initial)
        return fine_tune(task, models, trained, train_ids, seeds, loss=self.loss, epochs=self.epochs, masks=masks)


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
) -> list[Fitted]:
    """Train ``models`` in place, with a fresh optimizer from the initial learning rate; ``trained`` is where they come
    from."""
    epochs = math.ceil(task.recipe.epochs / 2) if epochs is None else epochs
    train_many(models, task.dataset, train_ids, seeds, task.recipe, loss=loss, epochs=epochs, masks=masks)
    return [
        Fitted(model, before.initial, masks[k] if masks else None)
        for k, (model, before) in enumerate(zip(models, trained, strict=True))
    ]
