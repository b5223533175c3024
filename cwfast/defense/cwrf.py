"""CWRF: critical weights rewinding and fine-tuning."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cwfast._parameters import Initial, check_apart
from cwfast._scopes import Scope
from cwfast.data import Batches, check_reiterable
from cwfast.defense.criteria import CRITERIA, Batch, Estimate, critical_masks, critical_scores
from cwfast.defense.dp import DPSGD
from cwfast.defense.tuning import Tuning, check_epochs, fine_tune
from cwfast.defense.variants import Variant, find_masks
from cwfast.masks import MaskSet
from cwfast.scoring import CRITERIA as TAYLOR_CRITERIA
from cwfast.training import Defense, Fitted, Loss, Task, cross_entropy, fit_from_scratch

STARTS = ("members", "reference")

__all__ = ["CRITERIA", "CWRF", "CWRFResult", "critical_masks", "critical_scores", "cwrf_", "fine_tune"]


@dataclass(eq=False)
class CWRFResult:
    """What ``cwrf_`` found.

    Attributes:
        masks: the critical weights.
        scores: of the trained model, which they are the largest of (with several rounds: the first of them are).
        history: the mean loss of each fine-tuning epoch.
    """

    masks: MaskSet
    scores: Mapping[str, Tensor]
    history: list[float]


def cwrf_(
    model: nn.Module,
    initial: Initial,
    members: Iterable[Batch],
    reference: Iterable[Batch],
    *,
    rate: float | None = None,
    loss: Loss | None = None,
    lam: float = 0.5,
    steps: int | None = None,
    criterion: str = "taylor",
    granularity: str = "sample",
    update: bool = True,
    points: int = 3,
    seed: int = 0,
    scope: Scope = "global",
    exclude: Sequence[str] | None = None,
    rounds: int = 1,
    value: str = "initial",
    train: str = "rest",
    recalibrate: bool = True,
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
        rate: share of the weights to rewind, 0 .. 1; None where ``scope`` holds the rates.
        loss: of fine-tuning; None: cross-entropy.
        lam: see ``vulnerability``, as for the next; used by taylor, taylor_delta, grad and fisher.
        steps: see ``vulnerability``.
        criterion: one of ``CRITERIA``: taylor, taylor_delta, grad, fisher (``vulnerability``), gap (``gap_shares``),
            past (``|g_ref - g_mem|``), delta (``|w - w0|``), magnitude, random, or your own.
        granularity: see ``vulnerability``.
        update: see ``vulnerability``.
        points: see ``gap_shares``.
        seed: of "random".
        scope: see ``cwfast.select``: "global", "layer" or ``{pattern: rate}``.
        exclude: patterns of parameters of which nothing is rewound; they are fine-tuned.
        rounds: score again after each of so many parts of the rate has been rewound.
        value: "initial", or "zero": the critical weights are removed (the paper's ablation A1).
        train: "rest": the critical weights stay as they are now; "critical": only they are fine-tuned, all other
            parameters stay as they were trained (A2).
        recalibrate: measure BatchNorm's running statistics again over ``members`` once the weights are rewound; not
            where none or all are.
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
    check_epochs(epochs)
    if optimizer is not None and not callable(optimizer):
        raise TypeError(f"optimizer must be called with parameters and return one; got {type(optimizer).__name__}")
    check_reiterable(members=members, reference=reference)
    check_apart(initial, dict(model.named_parameters()))
    variant = Variant(rate, criterion, scope, exclude, rounds, value, train, recalibrate)
    estimate = Estimate(lam, steps, granularity, update, 0.1 * lr, points=points, seed=seed)
    masks, scores = find_masks(variant, estimate, model, initial, members, reference)
    tuning = Tuning(model, members, loss, lr, optimizer, epochs)  # before the model changes: this may refuse lr
    variant.put_(model, masks, initial, members)
    return CWRFResult(masks, scores, tuning.run(variant.frozen(model, masks)))


class CWRF(Defense):
    """``cwrf_`` for a fleet: undefended training, critical weights rewound and frozen, the rest fine-tuned.

    Args:
        rate: share of the weights to rewind; None where ``scope`` holds the rates.
        loss: of fine-tuning; None: cross-entropy.
        epochs: of fine-tuning; None: half of the recipe's, rounded up; 0: rewinding alone.
        criterion, granularity, lam, steps, update, points: see ``cwrf_``, as for the next.
        scope, exclude, rounds, value, train, recalibrate: see ``cwrf_``.
        private: fine-tuning is DP-SGD, with noise and clipping for the weights that are not frozen; each
            ``Fitted.notes["privacy"]`` tells epsilon, and that it covers fine-tuning only.
        start: "members": the model is trained and scored on the samples that it is fine-tuned on. "reference": on half
            of the reference samples, with the other half as its reference: then epsilon covers the released model.

    Raises:
        ValueError: an option is none of those that there are.
    """

    def __init__(
        self,
        rate: float | None,
        *,
        loss: Loss | None = None,
        criterion: str = "taylor",
        granularity: str = "sample",
        lam: float = 0.5,
        steps: int | None = None,
        update: bool = True,
        points: int = 3,
        scope: Scope = "global",
        exclude: Sequence[str] | None = None,
        rounds: int = 1,
        value: str = "initial",
        train: str = "rest",
        recalibrate: bool = True,
        epochs: int | None = None,
        private: DPSGD | None = None,
        start: str = "members",
    ) -> None:
        if start not in STARTS:
            raise ValueError(f"start must be one of {STARTS}; got {start!r}")
        check_epochs(epochs)
        self.private, self.start = private, start
        self.variant = Variant(rate, criterion, scope, exclude, rounds, value, train, recalibrate)
        self.rate, self.loss, self.criterion, self.epochs = rate, loss or cross_entropy, criterion, epochs
        self._estimate = {"granularity": granularity, "lam": lam, "steps": steps, "update": update, "points": points}

    def score(
        self,
        task: Task,
        train_ids: Sequence[Tensor],
        reference_ids: Tensor,
        seeds: Sequence[int],
        trained: Sequence[Fitted],
    ) -> list[dict[str, Tensor]]:
        """Each trained model's scores: what ``fit_many`` selects from. They do not depend on the rate.

        With start="reference" they are of the halves of the reference samples, and members are not looked at.

        Raises:
            ValueError: see ``fit_many``.
        """
        start_ids, reference_ids = self._start(train_ids, reference_ids)
        found = []
        for fitted, ids, seed in zip(trained, start_ids, seeds, strict=True):
            sets, estimate = self._inputs(task, ids, reference_ids, seed)
            options = vars(estimate)
            found.append(critical_scores(fitted.model, fitted.initial, *sets, criterion=self.criterion, **options))
        return found

    def masks(self, scores: Sequence[Mapping[str, Tensor]]) -> list[MaskSet]:
        """Each model's critical weights at this rate.

        Raises:
            ValueError: there are several rounds, in which the model is scored again: ``fit_many`` does that.
        """
        if self.variant.rounds > 1:
            raise ValueError(f"scores alone give masks where rounds is 1; got {self.variant.rounds}")
        return [self.variant.select(one) for one in scores]

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
        """As ``Defense.fit_many``; ``scores`` (of ``score``, shared over rates) or ``masks`` skip those steps.

        Raises:
            ValueError: start is "reference", and anything computed elsewhere is given, or a member is among them; or
                there are not as many of what is given as models.
        """
        elsewhere = {"trained": trained, "scores": scores, "masks": masks}
        given = {name: len(x) for name, x in elsewhere.items() if x is not None}
        if given and self.start == "reference":
            raise ValueError(f'with start="reference" all is computed here; {", ".join(given)} must not be given')
        if any(count != len(train_ids) for count in given.values()):
            raise ValueError(f"what is given must be one for each of {len(train_ids)} models; got {given}")
        if self.private is not None:  # before anything is trained
            self.private.check(task.initial_model(seeds[0]), len(train_ids[0]))
        start_ids, reference_ids = self._start(train_ids, reference_ids)
        trained = trained or fit_from_scratch(task, start_ids, seeds)
        models, found = [], []
        for k, (fitted, ids, seed) in enumerate(zip(trained, start_ids, seeds, strict=True)):
            (members, reference), estimate = self._inputs(task, ids, reference_ids, seed)
            if masks is None:
                first = None if scores is None else scores[k]
                start: Any = (fitted.model, fitted.initial, members, reference)
                found.append(find_masks(self.variant, estimate, *start, first=first)[0])
            else:
                found.append(masks[k])
            models.append(self.variant.put_(copy.deepcopy(fitted.model), found[k], fitted.initial, members))
        frozen = [self.variant.frozen(model, one) for model, one in zip(models, found, strict=True)]
        options: Any = {"loss": self.loss, "epochs": self.epochs, "masks": found, "frozen": frozen}
        if self.private is not None:
            covers = "model" if self.start == "reference" else "fine-tuning"
            return self.private.fine_tune(task, models, trained, train_ids, seeds, covers=covers, **options)
        return fine_tune(task, models, trained, train_ids, seeds, **options)

    def _start(self, train_ids: Sequence[Tensor], reference_ids: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """For each model the samples that it is first trained and scored on, and what is the reference then."""
        if self.start == "members":
            return train_ids, reference_ids
        if any(bool(torch.isin(ids, reference_ids).any()) for ids in train_ids):
            raise ValueError('with start="reference" no member may be a reference sample; some are both')
        half = len(reference_ids) // 2
        if not half:
            raise ValueError(f'with start="reference" there must be reference samples for both halves; got {half}')
        return [reference_ids[:half]] * len(train_ids), reference_ids[half:]

    def _inputs(
        self, task: Task, ids: Tensor, reference_ids: Tensor, seed: int
    ) -> tuple[tuple[Batches, Batches], Estimate]:
        """Members and reference samples as the criterion wants them, and how it is computed.

        The estimate of ``vulnerability`` wants batches of equal size; any other criterion counts each sample once.
        """
        wrap, size = self.criterion in TAYLOR_CRITERIA, task.recipe.batch_size
        members, reference = (Batches(task.dataset, x, size, seed, wrap=wrap) for x in (ids, reference_ids))
        return (members, reference), Estimate(lr=0.1 * task.recipe.lr, seed=seed, **self._estimate)  # type: ignore[arg-type]
