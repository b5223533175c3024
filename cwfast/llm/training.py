"""Short fine-tuning of a causal language model on token ids: by cross-entropy, or held at a level of it."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import AdamW
from tqdm import tqdm

from cwfast.freezing import freeze
from cwfast.masks import MaskSet


def fine_tune(
    model: Any,
    texts: Sequence[Sequence[int] | Tensor],
    *,
    epochs: int = 1,
    steps: int | None = None,
    lr: float = 5e-5,
    batch: int = 8,
    alpha: float | None = None,
    masks: MaskSet | None = None,
    autocast: bool = True,
    seed: int = 0,
    progress: str | None = None,
) -> list[float]:
    """Minimise the mean cross-entropy of a batch's tokens, ``L``, or with ``alpha`` the distance ``|L - alpha|``.

    The latter is the first branch of RelaxLoss: texts that are fitted better than the level are unlearned, the others
    learned. A model that starts far below the level is driven up by gradient ascent, which ruins it: rewind first.

    Unlike scoring, a step makes the batch's logits ``[B, T, V]``, with a float32 copy: at least 6 bytes a token and
    entry of the vocabulary, and as much again for their gradients. Where that is too much, give a smaller ``batch``.

    Args:
        model: a causal language model of transformers; trained in place where its parameters require a gradient, left
            in evaluation mode.
        texts: token ids of each, at least two; the first is not predicted.
        epochs: passes over the texts, each in another order.
        steps: stop after so many; beyond ``epochs`` passes, others follow.
        lr: constant learning rate of AdamW, without weight decay.
        batch: texts a step; the last step of a pass may have fewer.
        alpha: in nats a token; None: plain cross-entropy.
        masks: weights that keep the values they have (see ``cwfast.freeze``).
        autocast: run layers in bfloat16; weights, gradients and the optimizer keep their dtype.
        seed: of the order, and of dropout where the model has it; the global random state is left as it was.
        progress: name of a bar on stderr; None: no bar.

    Returns:
        ``L`` of every step, before it.

    Raises:
        ValueError: an option out of range, no texts, one with fewer than two tokens, or a model that is frozen whole.

    Source:
        Chen, Yu & Fritz, "RelaxLoss", ICLR 2022, for the form with ``alpha``.
    """
    rows = [torch.as_tensor(text, dtype=torch.int64) for text in texts]
    _check(rows, epochs=epochs, steps=steps, batch=batch, alpha=alpha)
    total = epochs * -(-len(rows) // batch) if steps is None else steps
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not own:
        raise ValueError("model must have parameters that require a gradient; none does")
    device = own[0].device
    optimizer = AdamW(own, lr=lr, weight_decay=0.0, fused=device.type in ("cpu", "cuda"))
    losses: list[float] = []
    model.train()
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        nullcontext() if masks is None else freeze(model, optimizer, masks),
    ):
        torch.manual_seed(seed)
        order = _order(len(rows), batch, seed)
        for _ in tqdm(range(total), desc=progress, unit="step", file=sys.stderr, disable=None if progress else True):
            inputs, mask = padded([rows[i] for i in next(order)])
            inputs, mask = inputs.to(device), mask.to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
            loss = _mean_token(logits, inputs, mask)
            losses.append(loss.item())
            optimizer.zero_grad()
            (loss if alpha is None else (loss - alpha).abs()).backward()
            optimizer.step()
    optimizer.zero_grad()  # their memory is not the caller's
    model.eval()
    return losses


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, T], int64, padded on the right with token 0."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).to(torch.int64)


def _mean_token(logits: Tensor, inputs: Tensor, mask: Tensor) -> Tensor:
    """The mean cross-entropy of the tokens that follow others, in float32 at least."""
    kept = mask[:, 1:].bool()
    chosen = logits[:, :-1][kept]
    return functional.cross_entropy(chosen if chosen.dtype == torch.float64 else chosen.float(), inputs[:, 1:][kept])


def _order(count: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Batches of indices, pass after pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(count, generator=generator).split(batch):
            yield chosen.tolist()


def _check(rows: Sequence[Tensor], *, epochs: int, steps: int | None, batch: int, alpha: float | None) -> None:
    for name, value in (("epochs", epochs), ("steps", 1 if steps is None else steps), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if alpha is not None and not alpha >= 0:
        raise ValueError(f"alpha must be at least 0; got {alpha}")
    if not rows:
        raise ValueError("texts must hold at least one text; got none")
    for i, row in enumerate(rows):
        if row.ndim != 1 or len(row) < 2:
            raise ValueError(f"each text must be at least two token ids [T]; text {i} has shape {tuple(row.shape)}")
