"""Short fine-tuning of a causal language model on texts."""

from collections.abc import Sequence
from typing import Any

import torch


def fine_tune(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    epochs: int = 1,
    lr: float = 5e-5,
    batch: int = 8,
    max_tokens: int | None = 64,
    seed: int = 0,
) -> list[float]:
    """AdamW, constant learning rate, bfloat16 autocast over float32 weights; returns the loss of every step.

    Args:
        model: a causal language model of transformers; trained in place.
        tokenizer: its tokenizer.
        texts: to be fitted, from their first ``max_tokens`` tokens.
        epochs: passes over the texts, each in another order.
        lr: learning rate.
        batch: texts a step.
        max_tokens: of a text; None: all.
        seed: of the order.
    """
    ids = [tokenizer(text)["input_ids"][:max_tokens] for text in texts]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr, weight_decay=0.0)
    losses: list[float] = []
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(ids), generator=generator).split(batch):
            rows = [ids[i] for i in chosen.tolist()]
            width = max(map(len, rows))
            inputs = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = model(input_ids=inputs, attention_mask=mask, labels=inputs.masked_fill(mask == 0, -100)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    return losses
