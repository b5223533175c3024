"""CWRF for causal language models: score, select, rewind to the base, fine-tune the rest held at a level of loss."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cwfast._parameters import Initial
from cwfast._selecting import select
from cwfast.llm.measuring import Ids, token_loss
from cwfast.llm.scoring import score
from cwfast.llm.training import fine_tune
from cwfast.masks import MaskSet, rewind_


class Defended(NamedTuple):
    """What ``defend_`` did.

    Attributes:
        masks: which weights were rewound and frozen.
        alpha: the level of loss, in nats a token; None: no step was made.
        losses: mean token loss of each step's batch.
    """

    masks: MaskSet
    alpha: float | None
    losses: list[float]


def defend_(
    model: Any,
    base: Initial,
    members: Sequence[Tensor],
    reference: Sequence[Tensor],
    *,
    criterion: str = "gap",
    rate: float = 0.1,
    points: int = 1,
    lam: float = 0.5,
    steps: int = 15,
    lr: float = 5e-5,
    batch: int = 8,
    alpha: float | None = None,
    autocast: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> Defended:
    """Score the weights, rewind the ``rate`` with the largest scores, fine-tune the others; in place.

    Args:
        model: a causal language model of transformers, fine-tuned; in float32, as small updates are lost in bfloat16.
        base: the weights before fine-tuning: state dict, module, or safetensors folder.
        members: token ids, int64, of each text that the model was fine-tuned on.
        reference: of texts that it was not; audit on others, as these shape the mask.
        criterion: of ``cwfast.llm.scoring.score``.
        rate: share of the weights to rewind.
        points: of the path, for "gap".
        lam: weight of the reference half, for the other criteria.
        steps: of fine-tuning on the members; 0: none.
        lr: learning rate.
        batch: texts a step, and a pass of scoring.
        alpha: level of the mean token loss; None: that of the rewound model on the members. A level above what the
            rewound model has makes it worse at everything.
        autocast: score and fine-tune in bfloat16 where autocast does; weights and sums keep their dtype.
        seed: of the order of the members.
        progress: show bars on stderr.

    Returns:
        Masks, level and losses.

    Raises:
        ValueError: an option out of range; ``rate`` selects weights with score 0; texts that are too short.
    """
    found = score(
        model, base, members, reference, criterion=criterion, lam=lam, points=points, batch_size=batch,
        autocast=torch.bfloat16 if autocast else None, progress=progress,
    )  # fmt: skip
    masks = masks_of(found, rate)
    del found  # one float a weight
    rewind_(model, masks, base)
    level, losses = hold_(
        model, members, steps=steps, lr=lr, batch=batch, alpha=alpha, masks=masks, autocast=autocast,
        seed=seed, progress=progress,
    )  # fmt: skip
    return Defended(masks, level, losses)


def masks_of(scores: Mapping[str, Tensor], rate: float) -> MaskSet:
    """The ``rate`` of weights with the largest scores, all of them above 0.

    Raises:
        ValueError: not so many are; the message has the largest rate.
    """
    positive = sum(int((one > 0).sum()) for one in scores.values())
    total = sum(one.numel() for one in scores.values())
    if not 0 < rate <= positive / total:
        raise ValueError(
            f"rate must lie above 0, and at most {positive / total:.6g}, the share of weights with a score above 0; "
            f"got {rate:g}"
        )
    return select(scores, rate=rate)


def hold_(
    model: Any,
    members: Ids | Sequence[Tensor],
    *,
    steps: int,
    lr: float = 5e-5,
    batch: int = 8,
    alpha: float | None = None,
    masks: MaskSet | None = None,
    autocast: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> tuple[float | None, list[float]]:
    """Fine-tune on the members toward a mean token loss of ``alpha``; None: the loss that the model has now.

    Args:
        model: rewound, or moved back otherwise.
        members: token ids of each text.
        steps: how many; 0: the model stays as it is.
        lr: learning rate.
        batch: texts a step.
        alpha: in nats a token.
        masks: weights that stay as they are.
        autocast: see ``fine_tune``.
        seed: of the order.
        progress: show a bar on stderr.

    Returns:
        The level (None without steps), and each step's loss.
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0; got {steps}")
    if steps == 0:
        return None, []
    level = token_loss(model, [torch.as_tensor(text).tolist() for text in members]) if alpha is None else alpha
    name = "fine-tune" if progress else None
    losses = fine_tune(
        model, members, steps=steps, lr=lr, batch=batch, alpha=level, masks=masks, autocast=autocast, seed=seed,
        progress=name,
    )  # fmt: skip
    return level, losses
