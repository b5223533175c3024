"""Texts as token ids, what part of them is scored, and the windows and batches in which a model reads them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Document(NamedTuple):
    """Token ids of which the first ``context`` are read and never scored: BOS, a prefix. Without them the first token
    is not scored, as nothing predicts it.
    """

    ids: list[int]
    context: int

    @property
    def first(self) -> int:
        """Index of the first token that is scored."""
        return max(1, self.context)

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return len(self.ids) - self.first


class Window(NamedTuple):
    """Tokens ``start .. stop`` of a document in one row; those from ``first`` on are scored, by their predecessors."""

    document: int
    start: int
    stop: int
    first: int


class Batch(NamedTuple):
    """Rows [B, T], and where in them what is scored is predicted."""

    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T], 0 where padded on the left: no token sees pads on its right, and a row of pads alone is NaN
    row: Tensor  # [n]
    column: Tensor  # [n], of the hidden state that predicts
    document: Tensor  # [n]
    token: Tensor  # [n], index of the predicted token in its document


def documents(
    tokenizer: Any,
    texts: Sequence[Any],
    *,
    prefix: Any = None,
    bos: bool | None = None,
    max_tokens: int | None = None,
    bos_id: int | None = None,
) -> list[Document]:
    """Texts, or sequences of token ids, as documents.

    Args:
        tokenizer: of transformers; None for token ids.
        texts: strings, or sequences of token ids, which are taken as they are.
        prefix: a text or token ids put before each of them.
        bos: put the beginning-of-sequence token first; None: for texts what the tokenizer does by itself, for token ids
            no.
        max_tokens: of each text, its first ones; BOS and prefix not counted.
        bos_id: that token, where no tokenizer tells.

    Raises:
        ValueError, TypeError: texts without a token to score, no BOS token, ids without a tokenizer.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of texts; got a single str")
    rows = _encoded(tokenizer, texts)
    before = [] if prefix is None else _encoded(tokenizer, [prefix])[0]
    if bos is None:
        bos = bool(texts) and isinstance(texts[0], str) and adds_bos(tokenizer)
    if bos:
        token = getattr(tokenizer, "bos_token_id", None) if bos_id is None else bos_id
        if token is None:
            raise ValueError("bos=True needs a tokenizer with a BOS token; this one has none")
        before = [int(token), *before]
    found = [Document(before + row[:max_tokens], len(before)) for row in rows]
    for i, document in enumerate(found):
        if document.scored < 1:
            raise ValueError(
                f"texts must have a token to score each (the first has no prediction unless BOS or a prefix comes "
                f"before it); text {i} has {len(document.ids)} in all"
            )
    return found


def windows(
    found: Sequence[Document], chosen: Sequence[int], max_length: int, stride: int, known: int = 0
) -> list[Window]:
    """The windows of the chosen documents: what a window has read is scored once, by the first window that holds it.

    The first ``known`` tokens, of a prefix that all documents have, are left out of the windows.

    Raises:
        ValueError: a stride that leaves a token without its predecessor, a prefix that leaves no room.
    """
    if not 1 <= stride < max_length:
        raise ValueError(f"stride must lie in 1 .. max_length - 1 = {max_length - 1}; got {stride}")
    made = []
    for i in chosen:
        document = found[i]
        if document.context > 1 and len(document.ids) > max_length:
            raise ValueError(
                f"prefix and text must fit into max_length = {max_length} tokens together; text {i} needs "
                f"{len(document.ids)}: shorten the prefix, or give max_tokens"
            )
        start, first = 0, document.first
        stop = min(len(document.ids), max_length)
        made.append(Window(i, known, stop, first))
        while stop < len(document.ids):
            start, first = start + stride, stop
            stop = min(len(document.ids), start + max_length)
            made.append(Window(i, start, stop, first))
    return made


def batches(
    found: Sequence[Document], made: Sequence[Window], batch_tokens: int, padding: str, known: int = 0
) -> Iterator[Batch]:
    """The windows by falling length, as many a batch as ``batch_tokens`` (padding and ``known`` tokens before each row
    counted) allow, at least one.
    """
    order = sorted(made, key=lambda window: window.start - window.stop)
    while order:
        width = order[0].stop - order[0].start
        rows = max(1, batch_tokens // (known + width))
        yield _batch(found, order[:rows], width, padding)
        order = order[rows:]


def row_batches(found: Sequence[Document], made: Sequence[Window], rows: int) -> list[Batch]:
    """The windows by falling length, ``rows`` a batch, padded on the right."""
    order = sorted(made, key=lambda window: window.start - window.stop)
    parts = [order[i : i + rows] for i in range(0, len(order), rows)]
    return [_batch(found, part, part[0].stop - part[0].start, "right") for part in parts]


def _batch(found: Sequence[Document], rows: Sequence[Window], width: int, padding: str) -> Batch:
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.ones(len(rows), width, dtype=torch.int64)
    where: list[Tensor] = []
    for r, window in enumerate(rows):
        length = window.stop - window.start
        offset = width - length if padding == "left" else 0
        ids[r, offset : offset + length] = torch.tensor(found[window.document].ids[window.start : window.stop])
        mask[r, :offset] = 0
        token = torch.arange(window.first, window.stop)
        row, document = torch.full_like(token, r), torch.full_like(token, window.document)
        where.append(torch.stack([row, offset + token - 1 - window.start, document, token]))
    return Batch(ids, mask, *torch.cat(where, dim=1))


def _encoded(tokenizer: Any, texts: Sequence[Any]) -> list[list[int]]:
    strings = [text for text in texts if isinstance(text, str)]
    if strings and tokenizer is None:
        raise TypeError("tokenizer must be given for texts; got None")
    ids = iter(tokenizer(strings, add_special_tokens=False)["input_ids"] if strings else [])
    return [next(ids) if isinstance(text, str) else [int(token) for token in text] for text in texts]


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts its BOS token before a text by itself."""
    token = getattr(tokenizer, "bos_token_id", None)
    return token is not None and tokenizer("a")["input_ids"][:1] == [token]
