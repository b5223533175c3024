"""How the models of each kind of cell are made, from what a subject keeps."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from cwfast.defense.baselines import interpolate_many, tau_at_distance
from cwfast.defense.cwrf import CWRF
from cwfast.defense.specs import parse
from cwfast.masks import MaskSet, rewind_
from cwfast.study.grid import Cell
from cwfast.study.halting import halted
from cwfast.study.subject import BEST, Subject
from cwfast.training import Fitted, fit_from_scratch


class Impossible(Exception):
    """A cell that has no models, for a reason that belongs in the report."""


def fit(subject: Subject, cell: Cell, group: int) -> list[Fitted]:
    """A cell's models, of one group.

    Raises:
        Impossible: a rate is larger than the share of weights that the criterion would rewind.
    """
    try:
        return HOW[cell.how](subject, cell, group)
    except ValueError as error:
        if "rate must be at most" not in str(error):
            raise
        raise Impossible(str(error)) from error


def _stopped(subject: Subject, cell: Cell, group: int) -> list[Fitted]:
    """As they were after ``strength`` epochs, or at the lowest loss on the reference set."""
    return subject.models(group, BEST if cell.strength is None else str(int(cell.strength)))


def _short(subject: Subject, cell: Cell, group: int) -> list[Fitted]:
    """Undefended, with a schedule that ends after ``strength`` epochs."""
    assert cell.strength is not None
    recipe = replace(subject.task.recipe, epochs=int(cell.strength))
    return fit_from_scratch(replace(subject.task, recipe=recipe), *subject.of(group))


def _interpolated(subject: Subject, cell: Cell, group: int) -> list[Fitted]:
    """``w0 + strength (w - w0)``."""
    assert cell.strength is not None
    trained = subject.trained(group)
    return _moved(subject, group, trained, [cell.strength] * len(trained))


def _halted(subject: Subject, cell: Cell, group: int) -> list[Fitted]:
    """Fine-tuned by the loss ``spec`` up to the lowest loss on the reference set, maybe before the first epoch."""
    return _by(halted(cell.spec), subject, group, trained=subject.trained(group))


def _defense(subject: Subject, cell: Cell, group: int) -> list[Fitted]:
    """By ``spec``: from scratch, or CWRF and its controls from the trained weights."""
    if cell.criterion is None:
        return _by(parse(cell.spec), subject, group)
    trained, masks = _start(subject, cell, group)
    return _by(parse(cell.spec), subject, group, trained=trained, masks=masks)


def _variant(subject: Subject, cell: Cell, group: int) -> list[Fitted]:
    """CWRF by ``spec`` with options that change its scores, which are therefore its own."""
    return _by(parse(cell.spec), subject, group, trained=subject.trained(group), half=cell.how == "half reference")


def _private(subject: Subject, cell: Cell, group: int) -> list[Fitted]:
    """As ``_defense``, fine-tuned by DP-SGD."""
    private: Any = parse(cell.spec)
    trained, masks = _start(subject, cell, group)
    models = _rewound(trained, masks)
    found: list[Fitted] = private.fine_tune(subject.task, models, trained, *subject.of(group), masks=masks)
    return found


def _by(defense: Any, subject: Subject, group: int, *, half: bool = False, **more: Any) -> list[Fitted]:
    ids, seeds = subject.of(group)
    reference = subject.plan.reference[:: 2 if half else 1]
    found: list[Fitted] = defense.fit_many(subject.task, ids, reference, seeds, **more)
    return found


def _start(subject: Subject, cell: Cell, group: int) -> tuple[list[Fitted], list[MaskSet]]:
    """What fine-tuning starts from, and the weights that it rewinds and freezes.

    A cell that is "random" has the criterion's counts in each tensor. One that is "distance" begins at the models
    interpolated as far as the criterion's rewinding moves them, and freezes nothing.
    """
    trained, criterion = subject.trained(group), str(cell.criterion)
    scores = subject.scores(criterion, cell.lam, group)
    masks = CWRF(cell.rate, criterion=criterion).masks(scores)
    if "random" in cell.how:
        return trained, [one.random_like(seed) for one, seed in zip(masks, subject.of(group)[1], strict=True)]
    if "distance" not in cell.how:
        return trained, masks
    taus = [tau_at_distance(one, other) for one, other in zip(trained, _rewound(trained, masks), strict=True)]
    return _moved(subject, group, trained, taus), CWRF(0.0, criterion=criterion).masks(scores)


def _moved(subject: Subject, group: int, trained: Sequence[Fitted], taus: Sequence[float]) -> list[Fitted]:
    models = interpolate_many(subject.task, trained, *subject.of(group), taus)
    return [Fitted(model, one.initial) for model, one in zip(models, trained, strict=True)]


def _rewound(trained: Sequence[Fitted], masks: Sequence[MaskSet]) -> list[Any]:
    pairs = zip(trained, masks, strict=True)
    return [rewind_(copy.deepcopy(one.model), mask, one.initial) for one, mask in pairs]


HOW: dict[str, Callable[[Subject, Cell, int], list[Fitted]]] = {
    "trained": lambda subject, cell, group: subject.trained(group),
    "stopped": _stopped,
    "short": _short,
    "interpolated": _interpolated,
    "halted": _halted,
    "defense": _defense,
    "random": _defense,
    "distance": _defense,
    "variant": _variant,
    "half reference": _variant,
    "private": _private,
    "private random": _private,
    "private distance": _private,
}
