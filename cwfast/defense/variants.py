"""What can be done with the critical weights, in one go or in rounds."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cwfast._parameters import Initial, trainable
from cwfast._scopes import Scope
from cwfast.defense.criteria import Estimate, check_criterion, critical_masks, critical_scores
from cwfast.defense.recalibration import Batch, recalibrate_
from cwfast.masks import MaskSet, matching, rewind_

VALUES = ("initial", "zero")
TRAIN = ("rest", "critical")


@dataclass(frozen=True)
class Variant:
    """Which weights, and what is done with them: the options of ``cwrf_`` of the same names.

    Raises:
        ValueError: one is none of those that there are.
    """

    rate: float | None
    criterion: str = "taylor"
    scope: Scope = "global"
    exclude: Sequence[str] | None = None
    rounds: int = 1
    value: str = "initial"
    train: str = "rest"
    recalibrate: bool = True

    def __post_init__(self) -> None:
        check_criterion(self.criterion)
        if self.value not in VALUES:
            raise ValueError(f"value must be one of {VALUES}; got {self.value!r}")
        if self.train not in TRAIN:
            raise ValueError(f"train must be one of {TRAIN}; got {self.train!r}")
        if self.rate is not None and not 0 <= self.rate <= 1:
            raise ValueError(f"rate must lie between 0 and 1; got {self.rate}")
        if not isinstance(self.rounds, int) or self.rounds < 1:
            raise ValueError(f"rounds must be a whole number, at least 1; got {self.rounds!r}")

    def select(self, scores: Mapping[str, Tensor], share: float = 1) -> MaskSet:
        """The critical weights, or those of a share of the rate."""
        rate, scope = self.rate, self.scope
        if share != 1:
            rate = None if rate is None else rate * share
            scope = scope if isinstance(scope, str) else {pattern: one * share for pattern, one in scope.items()}
        return critical_masks(scores, rate, criterion=self.criterion, scope=scope, exclude=self.exclude)

    def frozen(self, model: nn.Module, masks: MaskSet) -> MaskSet:
        """What fine-tuning must not move: the critical weights, or (train="critical") all others of the model."""
        if self.train == "rest":
            return masks
        others = {name: torch.ones_like(parameter, dtype=torch.bool) for name, parameter in trainable(model).items()}
        return MaskSet.from_masks(others | {name: ~masks[name] for name in masks.names})

    def put_(self, model: nn.Module, masks: MaskSet, initial: Initial, members: Iterable[Batch]) -> nn.Module:
        """The selected weights get their value; then BatchNorm's statistics are measured again, unless the selection
        is empty or everything."""
        if self.value == "zero":
            initial = {name: torch.zeros_like(parameter) for name, parameter in matching(model, masks).items()}
        rewind_(model, masks, initial)
        if self.recalibrate and 0 < masks.total < sum(parameter.numel() for parameter in trainable(model).values()):
            recalibrate_(model, members)
        return model


def find_masks(
    variant: Variant,
    estimate: Estimate,
    model: nn.Module,
    initial: Initial,
    members: Iterable[Batch],
    reference: Iterable[Batch],
    *,
    first: Mapping[str, Tensor] | None = None,
) -> tuple[MaskSet, Mapping[str, Tensor]]:
    """The critical weights, and the scores of the trained model (``first``, where they are known).

    With several rounds, a part of the rate is selected and put back on a copy, which is then scored again for the next
    part: weights that share a duty are not all given up at once. Each round's selection holds those before it.
    """

    def rated(work: nn.Module) -> dict[str, Tensor]:
        return critical_scores(work, initial, members, reference, criterion=variant.criterion, **vars(estimate))

    scores = rated(model) if first is None else first
    masks = variant.select(scores, 1 / variant.rounds)
    for part in range(2, variant.rounds + 1):
        work = variant.put_(copy.deepcopy(model), masks, initial, members)
        again = {name: _above(score, masks[name]) for name, score in rated(work).items()}
        masks = variant.select(again, part / variant.rounds)
    return masks, scores


def _above(scores: Tensor, chosen: Tensor) -> Tensor:
    """The chosen ones above all others."""
    return torch.where(chosen, torch.inf, scores.clamp(max=torch.finfo(scores.dtype).max))
