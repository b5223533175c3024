"""How much each weight of a fine-tuned language model holds its training texts: scores in memory, and in a folder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cwfast._parameters import Initial
from cwfast._tracking import chosen
from cwfast.llm.estimating import CRITERIA, Estimator, Settings, rows_of
from cwfast.llm.heads import Body
from cwfast.llm.swapping import Weights
from cwfast.llm.windows import documents
from cwfast.scoring import GRANULARITIES

Ids = Tensor | Sequence[int]


def score(
    model: Any,
    initial: Initial,
    members: Sequence[Ids],
    reference: Sequence[Ids],
    *,
    criterion: str = "gap",
    lam: float = 0.5,
    points: int = 1,
    batch_size: int = 8,
    only: Sequence[str] | None = None,
    granularity: str = "sample",
    autocast: torch.dtype | None = None,
    backend: str = "auto",
    progress: bool = False,
) -> dict[str, Tensor]:
    """Scores of a language model's weights by its token losses; logits never exist.

    "gap": each weight's share of what training put between the loss on others and on members, where it is positive:
    ``max(0, d * mean over t of (g_ref - g_mem)(w0 + t d))``, ``d = w - w0``, g the gradient of the mean loss over all
    tokens of a side, t the midpoints of ``points`` equal parts of 0 .. 1. "taylor", "taylor_delta":
    ``(1 - lam) mean over members of |g f| + lam mean over reference texts of |h f|``, g the gradient of a member's mean
    token loss, h that of a reference text's mean ``KL(initial || model)`` per token, f the weight, or w - w0.

    The model works in evaluation mode, and is afterwards what it was, bit for bit, also after an error. For "gap" and
    for the KL it holds other weights meanwhile: memory grows by a copy of them, by the scores, and for the KL by the
    initial model's hidden states on the reference texts.

    Args:
        model: a causal language model of transformers with a linear head (or a PEFT model around one), in memory. Its
            parameters that require a gradient are scored, by the names of ``named_parameters``; a tied one once.
        initial: its weights before fine-tuning: module, mapping (``state_dict``), or safetensors file or folder.
        members: token ids of texts that it was trained on, each 1-D int64; the first token of a text is not scored.
        reference: the same of texts from the same source that it was not trained on.
        criterion: "gap", "taylor" or "taylor_delta".
        lam: weight of the KL term, 0 .. 1; not for "gap".
        points: of the path; one pass over both sets for each; only for "gap".
        batch_size: texts of a batch; changes scores by rounding only (not with granularity "batch").
        only: ``fnmatch`` patterns of parameters to score, the others get no gradient; None: all.
        granularity: for "taylor" and "taylor_delta": "sample" as above, or "batch": ``|(1 - lam) g + lam h|`` of the mean
            over a batch's texts, summed over the batches of members (of which reference batches are repeated if there
            are fewer), for models with layers that have no rule.
        autocast: run the model's passes in this dtype, such as ``torch.bfloat16`` for float32 weights.
        backend: of the kernels.
        progress: show a bar on stderr.

    Returns:
        ``{name: scores}``, at least 0, float32 (float64 for float64 parameters), on the parameters' devices.

    Raises:
        TypeError, ValueError: an argument does not hold what is written above; no text, one without a token to score,
            or one longer than the model allows.
        UnsupportedLayer: the logits are not those of the head, or (granularity "sample") a layer has no rule.

    Source:
        "gap": see ``cwfast.defense.gap_shares``. "taylor": Fang & Kim, ICLR 2026.
    """
    settings = Settings(criterion, lam, points, batch_size, granularity, autocast, backend)
    with prepared(model, initial, members, reference, settings) as run:
        names = list(chosen(run.weights.parameters, only, None))
        with tqdm(total=run.batches(), desc="score", unit="batch", disable=not progress) as bar:
            run.progress = bar.update
            return run.scores(names)


@contextmanager
def prepared(
    model: Any, initial: Initial, members: Sequence[Ids], reference: Sequence[Ids], settings: Settings
) -> Iterator[Estimator]:
    """All arguments are checked; inside, the model may hold other weights."""
    _check(settings)
    body = Body(model)
    sides = [_documents(name, texts, body) for name, texts in (("members", members), ("reference", reference))]
    weights = Weights(model, initial)
    with body.ready(), weights.kept():
        body.check(sides[0][0].ids)
        yield Estimator(body, weights, *(rows_of(side, settings.batch_size) for side in sides), settings)


def _check(settings: Settings) -> None:
    s = settings
    if s.criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {CRITERIA}; got {s.criterion!r}")
    if s.granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {GRANULARITIES}; got {s.granularity!r}")
    if not 0 <= s.lam <= 1:
        raise ValueError(f"lam must lie between 0 and 1; got {s.lam}")
    for name, value in (("points", s.points), ("batch_size", s.batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}")


def _documents(name: str, texts: Sequence[Ids], body: Body) -> Any:
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
        if len(row) and not (0 <= int(row.min()) and int(row.max()) < vocabulary):
            raise ValueError(
                f"{name} must hold tokens in 0 .. {vocabulary - 1}; text {i} has {int(row.min())} to {int(row.max())}"
            )
        rows.append(row.tolist())
    try:
        return documents(None, rows)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
