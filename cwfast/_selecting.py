"""From scores, in memory or on disk, to the set of the weights with the largest ones."""

import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cwfast import _streaming, ops
from cwfast._scopes import Scope, groups_of
from cwfast.checkpoint import Checkpoint
from cwfast.checkpoint.identity import base_of_scores
from cwfast.masks import MaskSet
from cwfast.ops.rewind import Bits
from cwfast.ops.select import packed_bytes

Scores = Mapping[str, Tensor] | str | os.PathLike[str]


def select(
    scores: Scores,
    *,
    rate: float | None = None,
    k: int | None = None,
    scope: Scope = "global",
    exclude: Sequence[str] | None = None,
    nan: str = "raise",
    backend: str = "auto",
) -> MaskSet:
    """The exactly ``k = floor(rate * N)`` weights with the largest scores; ties to the lowest (parameter, index).

    Args:
        scores: ``{name: scores}``, as ``SaliencyScorer.scores`` gives them; at least 0. Or a safetensors file or folder
            of them, on the CPU: it is read in pieces, so that it may be larger than memory, and gives the same masks.
        rate: share of the N weights that ``exclude`` leaves, 0 to 1; exact (0.3 of 10 is 3). Or
        k: how many.
        scope: "global": the largest of all. "layer": the rate in each parameter. ``{pattern: rate}``: each parameter
            takes the rate of the first ``fnmatch`` pattern that its name matches; unmatched ones select nothing.
        exclude: ``fnmatch`` patterns of parameters of which nothing is selected.
        nan: "raise" or "skip" (NaN is never selected).
        backend: see ``cwfast.ops.select_topk``.

    Returns:
        A MaskSet over all parameters of ``scores``. Its ``zero_score_selected`` counts selected weights whose score is
        exactly 0, which say nothing; above 1% of the selection there is a warning that names the largest useful rate.

    Raises:
        ValueError: rate and k do not fit scope or each other, a pattern of scope matches nothing, or scores are NaN or
            negative.
    """
    if not isinstance(scores, Mapping | str | os.PathLike):
        raise TypeError(f"scores must be {{name: tensor}} or a safetensors file or folder; got {type(scores).__name__}")
    source = scores if isinstance(scores, Mapping) else Checkpoint(scores)
    shapes = {n: tuple(s.shape) for n, s in source.items()} if isinstance(source, Mapping) else source.shapes
    groups = groups_of({name: math.prod(shape) for name, shape in shapes.items()}, rate, k, scope, exclude)
    picks: dict[str, Bits] = {}
    zeros, poorest = 0, (math.inf, "", 0)  # share of positive scores, where, how many
    for names, count in groups:
        found, threshold = _select_group(source, names, count, nan, backend)
        picks.update(zip(names, found, strict=True))
        if count and threshold == 0:
            useful = _positive(source, names)
            zeros += count - useful
            share = useful / sum(math.prod(shapes[name]) for name in names)
            poorest = min(poorest, (share, f" of {names[0]!r}" if len(groups) > 1 else "", useful))
    for name, shape in shapes.items():
        if name not in picks:  # excluded, or no pattern matches
            device = scores[name].device if isinstance(scores, Mapping) else "cpu"
            picks[name] = torch.zeros(packed_bytes(math.prod(shape)), dtype=torch.uint8, device=device)
    base = None if isinstance(scores, Mapping) else base_of_scores(scores)
    masks = MaskSet({name: picks[name] for name in shapes}, shapes, zero_score_selected=zeros, base=base)
    if zeros > 0.01 * masks.total:
        share, where, useful = poorest
        warnings.warn(
            f"{zeros} of {masks.total} selected weights have score 0, which ranks nothing; the largest useful "
            f"rate{where} is {share:.6f} ({useful} weights have a positive score)",
            stacklevel=2,
        )
    return masks


def _select_group(
    scores: Mapping[str, Tensor] | Checkpoint, names: list[str], k: int, nan: str, backend: str
) -> tuple[Sequence[Bits], float]:
    if isinstance(scores, Checkpoint):
        return _streaming.select_topk(scores, names, k, nan, backend)
    try:
        selection = ops.select_topk([scores[name] for name in names], k, nan=nan, backend=backend)
    except (TypeError, ValueError) as error:  # the ops know places, not names
        message = re.sub(r"scores\[(\d+)\]", lambda place: f"scores[{names[int(place[1])]!r}]", str(error))
        raise type(error)(message) from None
    return selection.bits, selection.threshold


def _positive(scores: Mapping[str, Tensor] | Checkpoint, names: list[str]) -> int:
    if isinstance(scores, Checkpoint):
        return _streaming.positive(scores, names)
    return sum(int((scores[name] > 0).sum()) for name in names)
