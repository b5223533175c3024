"""How vulnerable each weight is: the criteria by name, and from their scores to the weights to rewind."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cwfast._parameters import Initial, initial_values, trainable
from cwfast._scopes import Scope, groups_of
from cwfast._selecting import select
from cwfast.defense.gap import gap_gradients, gap_shares
from cwfast.defense.pve import vulnerability
from cwfast.defense.recalibration import Batch
from cwfast.masks import MaskSet
from cwfast.scoring import CRITERIA as TAYLOR_CRITERIA


@dataclass(frozen=True)
class Estimate:
    """How a criterion is computed; each reads what concerns it.

    Attributes:
        lam: see ``vulnerability``, as for all but the last two.
        steps: T; None: one pass over the members.
        granularity: "sample" or "batch".
        update: train the copy meanwhile.
        lr: of these steps.
        backend: of the sums.
        points: see ``gap_shares``.
        seed: of "random".
    """

    lam: float = 0.5
    steps: int | None = None
    granularity: str = "sample"
    update: bool = True
    lr: float = 0.01
    backend: str = "auto"
    points: int = 3
    seed: int = 0


Score = Callable[[nn.Module, Initial, Iterable[Batch], Iterable[Batch], Estimate], dict[str, Tensor]]


@dataclass(frozen=True)
class Criterion:
    """A way to score weights.

    Attributes:
        score: (model, initial, members, reference, estimate) -> ``{name: scores}`` of the parameters that require a
            gradient; neither the model nor its ``.grad`` is changed.
        signed: the scores have a sign, and only weights with a positive one may be rewound.
    """

    score: Score
    signed: bool = False


CRITERIA: dict[str, Criterion] = {}


def criterion(name: str, *, signed: bool = False) -> Callable[[Score], Score]:
    """Decorator: the function is from now on the criterion of this name, wherever one can be named.

    Args:
        name: new.
        signed: see ``Criterion``.

    Raises:
        ValueError: there is one of this name.
    """

    def register(score: Score) -> Score:
        if name in CRITERIA:
            raise ValueError(f"a criterion must have a new name; {name!r} is there already")
        CRITERIA[name] = Criterion(score, signed)
        return score

    return register


def check_criterion(name: str) -> None:
    """There is such a criterion.

    Raises:
        ValueError: there is none.
    """
    if name not in CRITERIA:
        raise ValueError(f"criterion must be one of {tuple(CRITERIA)}; got {name!r}")


def _estimated(name: str) -> Score:
    """A criterion of ``vulnerability``."""

    def score(
        model: nn.Module,
        initial: Initial,
        members: Iterable[Batch],
        reference: Iterable[Batch],
        estimate: Estimate,
    ) -> dict[str, Tensor]:
        e = estimate
        options = {"granularity": e.granularity, "lam": e.lam, "steps": e.steps, "update": e.update, "lr": e.lr}
        return vulnerability(model, initial, members, reference, criterion=name, backend=e.backend, **options)  # type: ignore[arg-type]

    return score


for _name in TAYLOR_CRITERIA:
    criterion(_name)(_estimated(_name))


@criterion("gap", signed=True)
def _gap(
    model: nn.Module, initial: Initial, members: Iterable[Batch], reference: Iterable[Batch], estimate: Estimate
) -> dict[str, Tensor]:
    """The weight's share of the generalisation gap."""
    return gap_shares(model, initial, members, reference, points=estimate.points)


@criterion("past")
def _past(
    model: nn.Module, initial: Initial, members: Iterable[Batch], reference: Iterable[Batch], estimate: Estimate
) -> dict[str, Tensor]:
    """``|g_ref - g_mem|`` at the trained weights, by which PAST (arXiv 2410.06814) weighs its sparsity penalty."""
    return {name: gradient.abs() for name, gradient in gap_gradients(model, members, reference).items()}


@criterion("delta")
def _delta(
    model: nn.Module, initial: Initial, members: Iterable[Batch], reference: Iterable[Batch], estimate: Estimate
) -> dict[str, Tensor]:
    """``|w - w0|``: how far training moved the weight."""
    weights = trainable(model)
    start = initial_values(initial, weights)
    return {name: (weight.detach() - start[name].to(weight)).abs() for name, weight in weights.items()}


@criterion("magnitude")
def _magnitude(
    model: nn.Module, initial: Initial, members: Iterable[Batch], reference: Iterable[Batch], estimate: Estimate
) -> dict[str, Tensor]:
    """``|w|``."""
    return {name: weight.detach().abs() for name, weight in trainable(model).items()}


@criterion("random")
def _random(
    model: nn.Module, initial: Initial, members: Iterable[Batch], reference: Iterable[Batch], estimate: Estimate
) -> dict[str, Tensor]:
    """Uniform in [0, 1), from ``seed``: a control."""
    generator = torch.Generator().manual_seed(estimate.seed)
    return {
        name: torch.rand(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
        for name, weight in trainable(model).items()
    }


def critical_scores(
    model: nn.Module,
    initial: Initial,
    members: Iterable[Batch],
    reference: Iterable[Batch],
    *,
    criterion: str = "taylor",
    **options: object,
) -> dict[str, Tensor]:
    """Scores by any criterion, at least 0: a signed one is clamped.

    Args:
        model: trained; not changed.
        initial: its initial weights: module, mapping or safetensors file.
        members: re-iterable batches ``(inputs, targets)`` of training samples.
        reference: the same of non-members.
        criterion: one of ``CRITERIA``.
        options: fields of ``Estimate``.

    Raises:
        TypeError: ``Estimate`` has no such field.
        ValueError: there is no such criterion, or an option is out of range.
    """
    check_criterion(criterion)
    found = CRITERIA[criterion]
    scores = found.score(model, initial, members, reference, Estimate(**options))  # type: ignore[arg-type]
    return {name: score.clamp(min=0) for name, score in scores.items()} if found.signed else scores


def critical_masks(
    scores: Mapping[str, Tensor],
    rate: float | None = None,
    *,
    criterion: str = "taylor",
    scope: Scope = "global",
    exclude: Sequence[str] | None = None,
) -> MaskSet:
    """The critical weights: the top ``rate`` of the scores.

    Args:
        scores: of ``critical_scores``.
        rate: see ``cwfast.select``, as for scope and exclude.
        criterion: that the scores are of.
        scope: "global", "layer" or ``{pattern: rate}``.
        exclude: patterns of parameters of which nothing is rewound.

    Raises:
        ValueError: for a signed criterion ("gap"), more are asked for than have a positive score; the message names the
            largest rate.
    """
    check_criterion(criterion)
    if CRITERIA[criterion].signed:
        numel = {name: score.numel() for name, score in scores.items()}
        for names, k in groups_of(numel, rate, None, scope, exclude):
            positive, of = sum(int((scores[name] > 0).sum()) for name in names), sum(numel[name] for name in names)
            if k > positive:
                largest = positive * 10**9 // of / 10**9  # rounded down
                where = "here" if scope == "global" else f"here for {names[0]!r}"
                raise ValueError(
                    f"rate must be at most {largest} {where}: {positive} of {of} weights have a positive share of the "
                    f"gap, and rewinding the others would widen it; got {rate if rate is not None else scope}"
                )
    return select(scores, rate=rate, scope=scope, exclude=exclude)
