"""Texts changed for the attacks that look at a text again; the copies of a text come one after another."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def lowercased(texts: Sequence[str]) -> list[str]:
    """In lower case."""
    return [text.lower() for text in texts]


def swapped(texts: Sequence[str], *, copies: int = 5, share: float = 0.3, seed: int = 0) -> list[str]:
    """``copies`` of each text, in which max(1, int(share * words)) times two random words change places, for ``pac``.

    Args:
        texts: N of them; white space becomes single spaces.
        copies: of each.
        share: of the words.
        seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    made = []
    for text in texts:
        for _ in range(copies):
            words = text.split()
            for _ in range(max(1, int(share * len(words)))):
                if len(words) > 1:
                    i, j = rng.choice(len(words), 2, replace=False)
                    words[i], words[j] = words[j], words[i]
            made.append(" ".join(words))
    return made


def neighbours(
    texts: Sequence[str], *, words: Sequence[str] | None = None, copies: int = 5, share: float = 0.1, seed: int = 0
) -> list[str]:
    """``copies`` of each text with max(1, int(share * words)) words replaced at random, for ``neighbourhood``.

    No masked language model is needed; one makes better neighbours, and their records do as well.

    Args:
        texts: N of them; white space becomes single spaces.
        words: to choose from, as often as they occur there; None: those of the texts.
        copies: of each.
        share: of the words.
        seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    pool = [word for text in texts for word in text.split()] if words is None else list(words)
    if not pool:
        raise ValueError("words must hold at least one word; got none")
    made = []
    for text in texts:
        for _ in range(copies):
            own = text.split()
            for i in rng.permutation(len(own))[: max(1, int(share * len(own)))]:
                own[i] = pool[rng.integers(len(pool))]
            made.append(" ".join(own))
    return made


def token_counts(tokenizer: Any, texts: Sequence[str], vocabulary: int) -> Tensor:
    """int64 [V], how often each token occurs in texts, for ``dc_pdd``.

    Args:
        tokenizer: of transformers.
        texts: neither members nor audited.
        vocabulary: V.
    """
    ids = [token for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"] for token in row]
    return torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=vocabulary)
