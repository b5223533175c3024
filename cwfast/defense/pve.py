"""Privacy-vulnerability estimation: per-weight scores while a copy of the model learns members and forgets the rest."""

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from cwfast._parameters import Initial, initial_values
from cwfast.checkpoint import Checkpoint
from cwfast.data import check_reiterable
from cwfast.defense.recalibration import Batch, batchnorms, filled, recalibrate_
from cwfast.scoring import SaliencyScorer

MAX_STEPS = 1000


def vulnerability(
    model: nn.Module,
    initial: Initial,
    members: Iterable[Batch],
    reference: Iterable[Batch],
    *,
    criterion: str = "taylor",
    granularity: str = "sample",
    lam: float = 0.5,
    steps: int | None = None,
    update: bool = True,
    lr: float = 0.01,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Sum of ``|g * factor|`` while learning ``(1 - lam) CE(members) + lam KL(initial || model)(reference)``.

    Each step takes one batch of each set. Granularity "sample": members contribute ``|(1 - lam) g_b|``, reference
    samples ``|lam g_b|``, with g_b of the sample's own loss; "batch" (the paper): ``|g|`` of the step's mean loss. The
    KL pulls outputs on non-members to those of the initial model: what must change for that, and holds members, is
    vulnerable.

    Args:
        model: trained; worked on as a copy, in training mode; torch's RNG is left as it was.
        initial: its initial weights: module, mapping or safetensors file. BatchNorm's running statistics, which the
            initial model's outputs need, are taken from there too; where some are missing, all are measured on members.
        members: re-iterable batches ``(inputs, targets)`` of training samples.
        reference: re-iterable batches of non-members; their targets are not used.
        criterion: see ``SaliencyScorer``.
        granularity: "sample" or "batch".
        lam: weight of the KL term, 0 .. 1.
        steps: T; None: one pass over ``members``, at most 1,000.
        update: take a step of plain SGD at ``lr`` after each; False: score the trained weights only.
        lr: of these steps; the default recipe takes 0.1 of the initial training rate.
        backend: see ``cwfast.ops.accumulate_saliency_``.

    Returns:
        ``{name: scores}``, at least 0.

    Raises:
        TypeError: ``members`` or ``reference`` can be iterated only once.
        ValueError: ``lam`` or ``steps`` is out of range, a set is empty, or ``initial`` is not of this model.

    Source:
        Fang & Kim, ICLR 2026 (loss and accumulation); directions and step sizes where the paper is silent are ours.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie between 0 and 1; got {lam}")
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps must be a whole number, at least 1; got {steps!r}")
    check_reiterable(members=members, reference=reference)
    work = copy.deepcopy(model).train()
    with torch.random.fork_rng():  # a pass over the members may draw their order
        teacher = _initial_model(model, initial, members)
    scorer = SaliencyScorer(
        work,
        criterion=criterion,
        granularity=granularity,
        initial=initial if criterion == "taylor_delta" else None,
        grads=update or granularity == "batch",
        backend=backend,
    )
    optimizer = torch.optim.SGD(work.parameters(), lr)
    count = 0
    with torch.random.fork_rng(), scorer:
        for (inputs, targets), (others, _) in zip(
            _members(members, steps), _forever("reference", reference), strict=False
        ):
            optimizer.zero_grad()
            ((1 - lam) * functional.cross_entropy(work(inputs), targets)).backward()
            (lam * _kl(teacher, work, others)).backward()
            scorer.step()
            if update:
                optimizer.step()
            count += 1
    if count == 0:
        raise ValueError("members must hold at least one sample; got none")
    return scorer.scores()


def _initial_model(model: nn.Module, initial: Initial, members: Iterable[Batch]) -> nn.Module:
    """In evaluation mode: parameters and, as far as ``initial`` holds them, buffers."""
    found = copy.deepcopy(model).eval()
    state = dict(found.named_parameters())
    values = initial_values(initial, state)
    source = initial.state_dict() if isinstance(initial, nn.Module) else initial
    held = source if isinstance(source, Mapping) else Checkpoint(source)
    buffers = {name: buffer for name, buffer in found.named_buffers() if name in held}
    with torch.no_grad():
        for name, value in (values | initial_values(source, buffers)).items():
            (state | buffers)[name].copy_(value)
    statistics = [f"{name}.running_{part}".lstrip(".") for name in batchnorms(found) for part in ("mean", "var")]
    return found if all(name in held for name in statistics) else recalibrate_(found, members)


def _kl(teacher: nn.Module, model: nn.Module, inputs: Tensor) -> Tensor:
    """KL(teacher || model), mean over samples."""
    with torch.no_grad():
        wanted = functional.log_softmax(teacher(inputs), dim=1)
    return functional.kl_div(
        functional.log_softmax(model(inputs), dim=1), wanted, log_target=True, reduction="batchmean"
    )


def _members(batches: Iterable[Batch], steps: int | None) -> Iterator[Batch]:
    if steps is None:
        return itertools.islice(filled(batches), MAX_STEPS)
    return itertools.islice(_forever("members", batches), steps)


def _forever(name: str, batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        empty = True
        for batch in filled(batches):
            empty = False
            yield batch
        if empty:
            raise ValueError(f"{name} must hold at least one sample, and be iterable more than once; got none")
