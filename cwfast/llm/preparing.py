"""The arguments of ``score``, checked, and a model that may hold other weights for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cwfast._parameters import Initial
from cwfast.llm.estimating import CRITERIA, Estimator, Settings, rows_of
from cwfast.llm.heads import Body
from cwfast.llm.swapping import Weights
from cwfast.llm.windows import Document, documents
from cwfast.scoring import GRANULARITIES

Ids = Tensor | Sequence[int]


@contextmanager
def prepared(
    model: Any, initial: Initial, members: Sequence[Ids], reference: Sequence[Ids], settings: Settings
) -> Iterator[Estimator]:
    """All arguments are checked; inside, the model may hold other weights."""
    check_settings(settings)
    body = Body(model)
    found = [_documents(name, texts, body) for name, texts in (("members", members), ("reference", reference))]
    weights = Weights(model, initial)
    with body.ready(), weights.kept():
        body.check(found[0][0].ids)
        sides = [rows_of(side, settings.batch_size) for side in found]
        yield Estimator(body, weights, sides[0], sides[1], settings)


def check_settings(settings: Settings) -> None:
    """They are in range.

    Raises:
        ValueError: they are not.
    """
    s = settings
    if s.criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {CRITERIA}; got {s.criterion!r}")
    if s.granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {GRANULARITIES}; got {s.granularity!r}")
    if not 0 <= s.lam <= 1:
        raise ValueError(f"lam must lie between 0 and 1; got {s.lam}")
    if s.autocast not in (None, torch.bfloat16):  # the gradients of long texts are too small for float16
        raise ValueError(f"autocast must be None or torch.bfloat16; got {s.autocast}")
    for name, value in (("points", s.points), ("batch_size", s.batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}")


def _documents(name: str, texts: Sequence[Ids], body: Body) -> list[Document]:
    """Token ids, each text checked."""
    if isinstance(texts, str | Tensor) or not len(texts):
        given = type(texts).__name__ if isinstance(texts, str | Tensor) else "none"
        raise ValueError(f"{name} must be a list of texts as token ids, at least one; got {given}")
    rows = []
    config = body.model.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text_config, "max_position_embeddings", None)
    vocabulary = body.model.get_input_embeddings().weight.shape[0]
    for i, text in enumerate(texts):
        if isinstance(text, str):
            raise TypeError(f"{name} must be token ids; text {i} is a str: tokenize it first")
        row = text if isinstance(text, Tensor) else torch.tensor(text, dtype=torch.int64)
        if row.ndim != 1 or row.dtype != torch.int64:
            raise TypeError(f"{name} must be 1-D int64 token ids; text {i} is {row.dtype} of shape {tuple(row.shape)}")
        if longest is not None and len(row) > longest:
            raise ValueError(f"{name} must fit into the model's {longest} tokens; text {i} has {len(row)}: cut it")
        if len(row) and (int(row.min()) < 0 or int(row.max()) >= vocabulary):
            raise ValueError(
                f"{name} must hold tokens in 0 .. {vocabulary - 1}; text {i} has {int(row.min())} to {int(row.max())}"
            )
        rows.append(row.tolist())
    try:
        return documents(None, rows)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
