"""One process's answers from scores that are spread over ranks: histograms are summed, scores stay where they are."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from cwfast import _checks, _picks, _radix, _shards
from cwfast._ranks import device_of, gather_rows
from cwfast._sharded_masks import ShardedMaskSet
from cwfast.checkpoint.reader import PIECE
from cwfast.ops._lm_token_parts import Parts, finish, merge
from cwfast.ops._lm_token_tiles import parts_of, target_logits
from cwfast.ops.lm_token_stats import MOST, check_targets, check_tokens, token_stats
from cwfast.ops.select import Selection, check_options
from cwfast.reference import LMHead, TokenStats


class Shard(NamedTuple):
    """A contiguous range of a flattened (row-major) tensor.

    Attributes:
        values: its entries, of any shape; they count in row-major order.
        tensor: which tensor of the list, from 0.
        offset: the flat index of the first entry.
    """

    values: Tensor
    tensor: int
    offset: int = 0


__all__ = ["Shard", "ShardedMaskSet", "lm_token_stats", "select_topk", "shard_of", "sum_scores"]


def shard_of(value: DTensor, tensor: int) -> Shard:
    """This rank's part of a DTensor sharded along its first dimension, as FSDP2 shards parameters.

    Replicated mesh dimensions (HSDP) hold copies: give ``select_topk`` the group of the sharded dimension.

    Raises:
        TypeError: not a DTensor.
        ValueError: sharded in another way, so that a part is no contiguous range.
    """
    if not isinstance(value, DTensor):
        raise TypeError(f"value must be a DTensor; got {type(value).__name__}")
    return Shard(_shards.local(value), tensor, _shards.part_of(value).begin)


def select_topk(
    shards: Sequence[Shard],
    k: int,
    *,
    nan: str = "raise",
    transform: str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Selection:
    """``cwfast.ops.select_topk`` of all ranks' scores; each rank gets the bits of its own shards.

    The same bits as in one process that has everything, ties to the lowest (tensor, flat index) included. A rank sends
    a histogram of 512 KB per 16 bits of the dtype, and 72 bytes per shard. All ranks of the group must call this.

    Args:
        shards: this rank's, in any order and number (also none); no entry belongs to two shards. One dtype on all
            ranks (float32, bfloat16, float16 or float64); at least 0.
        k: how many to select of all ranks' entries. k, nan and transform must be the same on all ranks.
        nan: see ``cwfast.ops.select_topk``.
        transform: likewise.
        group: of ``torch.distributed``; None: all ranks.

    Returns:
        ``bits`` and ``counts`` of this rank's shards (entry i of a shard is bit i); ``threshold`` and ``k`` of all.

    Raises:
        TypeError, ValueError: an argument does not hold what is written above: on every rank, whosever it is.
    """
    refusal, dtype = _refusal(shards, k, nan, transform)
    skip, absolute = nan == "skip", transform == "abs"
    header = [refusal is not None, -1 if dtype is None else _checks.FLOATS.index(dtype)]
    header += [0, 0, 0] if refusal else [k, skip, absolute]
    headers = gather_rows([header], group)
    if refusal is not None:
        raise refusal
    if any(row[0] for row in headers):
        raise ValueError(
            f"rank {next(i for i, row in enumerate(headers) if row[0])} refused its arguments; its error says why"
        )
    for place, name in enumerate(("k", "nan", "transform"), start=2):
        if len({row[place] for row in headers}) > 1:
            raise ValueError(f"{name} must be the same on all ranks; got {[row[place] for row in headers]}")
    dtypes = {row[1] for row in headers} - {-1}
    if len(dtypes) > 1:
        raise TypeError(
            f"scores must have one dtype on all ranks; got {[str(_checks.FLOATS[i]) for i in sorted(dtypes)]}"
        )
    dtype = _checks.FLOATS[dtypes.pop()] if dtypes else torch.float32
    flats = [shard.values.detach().reshape(-1) for shard in shards]
    _check_shards(shards, flats, k, skip, absolute, group)

    def histogram(*bins: int) -> Tensor:
        keys = (_radix.keys(piece).cpu() for flat in flats for piece in flat.split(PIECE))
        counts = _radix.histogram(keys, *bins).to(device_of(group))
        dist.all_reduce(counts, group=group)
        return counts.cpu()

    key, _, ties = _radix.bracket(histogram, dtype, k)
    bits = []
    for flat, quota in zip(flats, _quotas(shards, flats, key, ties, group), strict=True):
        parts = [torch.empty(0, dtype=torch.uint8, device=flat.device)]
        for piece in flat.split(PIECE):
            part, quota = _radix.mark(_radix.keys(piece), key, quota)
            parts.append(part)
        bits.append(torch.cat(parts))
    return Selection(bits, [_picks.count(b) for b in bits], _radix.score_of(key, dtype), k)


def sum_scores(scores: Mapping[str, Tensor], *, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """The sums of all ranks' scores, where each rank has scored parameters by its own samples: under DDP.

    New tensors: a scorer's own go on being this rank's. All ranks of the group must call this, with the same names.
    Under FSDP2 a scorer has done it, and shards the sums. Of parameters that tensor parallelism splits, DTensors, the
    group is that of the ranks that have the same part.

    Args:
        scores: ``{name: scores}``, as ``SaliencyScorer.scores`` gives them.
        group: of ``torch.distributed``; None: all ranks.

    Raises:
        TypeError: scores are DTensors of ranks of the group: FSDP2's, or the group is not given.
    """
    mine = set(dist.get_process_group_ranks(group))
    for name, score in scores.items():
        if _shards.is_sharded(score) and len(mine & set(score.device_mesh.mesh.flatten().tolist())) > 1:
            raise TypeError(
                f"scores must be plain tensors, or DTensors of a mesh that has one rank of the group, {sorted(mine)}; "
                f"{name!r} is one of {score.device_mesh}: under FSDP2 it holds the sums already"
            )
    found = {}
    for name, score in scores.items():
        sums = _shards.local(score).to(device_of(group), copy=True)
        dist.all_reduce(sums, group=group)
        found[name] = sums.to(score.device)
        if _shards.is_sharded(score):
            found[name] = _shards.whole_like(found[name], score)
    return found


def lm_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    first: int,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    topk: int = 0,
    group: dist.ProcessGroup | None = None,
) -> TokenStats:
    """``cwfast.ops.lm_token_stats`` of a vocabulary that is split across ranks; every rank gets all of it.

    A rank sends 56 bytes a token, and 16 more for each of topk. All ranks of the group must call this, with the same
    hidden and targets; the results are the same bits on all of them, and those of one process to rounding.

    Args:
        hidden: ``[N, d]`` on the CPU, as there.
        weight: this rank's rows of the LM head, those of the tokens ``first ... first + len(weight) - 1``; also none.
        targets: ``[N]`` int64, tokens of the whole vocabulary.
        first: where this rank's rows begin. The ranks' rows cover the vocabulary, none of it twice.
        bias: this rank's entries of it, or None.
        softcap: as there.
        scale: likewise.
        topk: likewise.
        group: of ``torch.distributed``; None: all ranks.

    Raises:
        TypeError, ValueError: an argument does not hold what is written above: on every rank, whosever it is.
    """
    refusal: TypeError | ValueError | None = None
    head = LMHead(weight, bias, softcap, scale)
    try:
        if type(first) is not int or first < 0:
            raise ValueError(f"first must be an int of at least 0; got {first!r}")
        check_tokens(hidden, head, targets, vocabulary=MOST, topk=topk)
        _checks.same_device(torch.device("cpu"), hidden=hidden)
    except (TypeError, ValueError) as error:
        refusal = error
    row = [1, 0, 0, 0, 0] if refusal else [0, first, len(weight), len(hidden), topk]
    rows = gather_rows([row], group)
    if refusal is not None:
        raise refusal
    if any(other[0] for other in rows):
        raise ValueError(f"rank {[other[0] for other in rows].index(1)} refused its arguments; its error says why")
    if len({tuple(other[3:]) for other in rows}) > 1:
        raise ValueError(f"hidden and topk must be the same on all ranks; got {[other[3:] for other in rows]}")
    vocabulary = 0
    for begin, count in sorted(other[1:3] for other in rows):
        if begin != vocabulary:
            raise ValueError(
                f"the ranks' rows must cover the vocabulary once; token {vocabulary} is not the next first"
            )
        vocabulary += count
    check_tokens(hidden, head, targets, vocabulary=vocabulary, topk=topk)
    check_targets(targets, vocabulary)
    here = (targets >= first) & (targets < first + len(weight))
    target_logit = torch.where(here, target_logits(hidden, head, targets, first), 0)
    dist.all_reduce(target_logit, group=group)
    own = parts_of(hidden, head, targets, target_logit, topk, first, vocabulary)
    reals, ints = torch.stack(own[:5], dim=1), torch.stack(own[5:7], dim=1)
    reals, ints = torch.cat([reals, own.values.double()], dim=1), torch.cat([ints, own.indices], dim=1)
    everyone = []
    for mine in (reals, ints):
        copies = [torch.empty_like(mine) for _ in rows]
        dist.all_gather(copies, mine, group=group)
        everyone.append(copies)
    parts = [
        Parts._make([*x[:, :5].unbind(1), *i[:, :2].unbind(1), x[:, 5:].to(target_logit.dtype), i[:, 2:]])
        for x, i in zip(*everyone, strict=True)
    ]
    return token_stats(finish(functools.reduce(merge, parts), target_logit, targets))


def _refusal(
    shards: Sequence[Shard], k: int, nan: str, transform: str | None
) -> tuple[TypeError | ValueError | None, torch.dtype | None]:
    """What is wrong on this rank alone, and the dtype of its scores."""
    try:
        values = _checks.tensors("values of shards", [shard.values for shard in shards])
        for i, shard in enumerate(shards):
            _checks.tensor(f"values of shards[{i}]", shard.values, dtypes=(values[0].dtype,))
            _checks.tensor(f"values of shards[{i}]", shard.values, dtypes=_checks.FLOATS)
            if type(shard.tensor) is not int or type(shard.offset) is not int or shard.tensor < 0 or shard.offset < 0:
                raise ValueError(
                    f"tensor and offset must be ints of at least 0; got {shard.tensor!r}, {shard.offset!r}"
                )
        check_options(k, None, nan, transform)
    except (TypeError, ValueError) as error:
        return error, None
    return None, values[0].dtype if values else None


def _check_shards(
    shards: Sequence[Shard],
    flats: list[Tensor],
    k: int,
    skip_nan: bool,
    absolute: bool,
    group: dist.ProcessGroup | None,
) -> None:
    """Every rank learns of every shard, and so every rank raises the same."""
    rows = []
    for shard, flat in zip(shards, flats, strict=True):
        bad = torch.zeros(2, dtype=torch.int64, device=flat.device)
        for piece in flat.split(PIECE):
            bad += _radix.check(piece, absolute)
        rows.append([shard.tensor, shard.offset, len(flat), *bad.tolist()])
    everyone = sorted(row for row in gather_rows(rows, group, columns=5) if row[2])
    for (tensor, offset, numel, *_), after in itertools.pairwise(everyone):
        if tensor == after[0] and offset + numel > after[1]:
            raise ValueError(
                f"no entry may belong to two shards; those of tensor {tensor} from {offset} to {offset + numel} and "
                f"from {after[1]} share some"
            )
    for tensor, offset, _, nans, negatives in everyone:
        if negatives or (nans and not skip_nan):
            raise ValueError(
                f"scores must not be NaN or negative; got {nans} NaN and {negatives} negative in the shard of tensor "
                f"{tensor} from {offset}"
            )
    selectable = sum(row[2] - row[3] for row in everyone)
    if k > selectable:
        raise ValueError(f"k must be at most {selectable}, the number of scores that are not NaN; got {k}")


def _quotas(
    shards: Sequence[Shard],
    flats: list[Tensor],
    key: int,
    ties: int,
    group: dist.ProcessGroup | None,
) -> list[int]:
    """How many of its entries at the threshold each shard selects: the lowest (tensor, flat index) of all ranks'."""
    rows = []
    for shard, flat in zip(shards, flats, strict=True):
        equal = sum(int((_radix.keys(piece) == key).sum()) for piece in flat.split(PIECE))
        rows.append([shard.tensor, shard.offset, equal])
    quota: dict[tuple[int, int], int] = {}
    for tensor, offset, equal in sorted(row for row in gather_rows(rows, group, columns=3) if row[2]):
        quota[tensor, offset] = min(equal, ties)
        ties -= quota[tensor, offset]
    return [
        quota.get((shard.tensor, shard.offset), 0) if len(flat) else 0
        for shard, flat in zip(shards, flats, strict=True)
    ]
