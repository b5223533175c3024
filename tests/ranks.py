"""What each process of test_distributed.py does: a module of its own, since spawned processes import it by name."""

import itertools
import random

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor import Shard as ShardOf

from cwfast import ops, reference
from cwfast.distributed import Shard, select_topk, shard_of
from cwfast.testing import HOSTILE, hostile_scores

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def cut(scores, ranks, seed):
    """Uneven contiguous ranges of each tensor, dealt to ranks at random; the last rank may get none."""
    draw = random.Random(seed)
    hands = [[] for _ in range(ranks)]
    for tensor, score in enumerate(scores):
        flat = score.reshape(-1)
        edges = [0, *sorted(draw.randrange(len(flat) + 1) for _ in range(draw.randrange(5))), len(flat)]
        for begin, end in itertools.pairwise(edges):
            hands[draw.randrange(ranks)].append(Shard(flat[begin:end], tensor, begin))
    for hand in hands:
        draw.shuffle(hand)
    return hands


def check(scores, k, seed, **options):
    expected = ops.select_topk(scores, k, backend="reference", **options)
    shards = cut(scores, dist.get_world_size(), seed)[dist.get_rank()]
    found = select_topk(shards, k, **options)
    assert found.k == k
    assert found.threshold == expected.threshold
    for shard, bits, count in zip(shards, found.bits, found.counts, strict=True):
        end = shard.offset + shard.values.numel()
        whole = reference.unpack(expected.bits[shard.tensor], scores[shard.tensor].numel())
        assert torch.equal(bits, reference.pack(whole[shard.offset : end]))
        assert count == int(whole[shard.offset : end].sum())
    total = torch.tensor(sum(found.counts))
    dist.all_reduce(total)
    assert total == k


def refused(error, message, shards, k, **options):
    """On every rank."""
    with pytest.raises(error, match=message):
        select_topk(shards, k, **options)


def hostile(rank, ranks):
    for seed, kind in enumerate(HOSTILE):
        for dtype in DTYPES if kind in ("few_values", "all_equal") else DTYPES[seed % 4 :][:1]:
            scores = hostile_scores(kind, dtype, 5_000)
            numel = sum(s.numel() for s in scores)
            for k in (0, 1, numel // 100, numel // 2, numel):
                check(scores, k, seed + k)


def options(rank, ranks):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(n, generator=generator) for n in (1000, 0, 77)]
    check(scores, 100, 0, transform="abs")
    scores[0][:300] = torch.nan
    check(scores, 777, 1, transform="abs", nan="skip")
    one = [Shard(torch.rand(10), rank)]
    refused(ValueError, "k must be at most 777", cut(scores, ranks, 2)[rank], 778, transform="abs", nan="skip")
    refused(ValueError, "300 NaN and 0 negative|must not be NaN", cut(scores, ranks, 2)[rank], 5, transform="abs")
    refused(ValueError, "k must be the same on all ranks", one, rank)
    refused(TypeError, "one dtype on all ranks", [Shard(torch.rand(10, dtype=DTYPES[rank]), rank)], 3)
    refused(ValueError, "two shards; those of tensor 0", [Shard(torch.rand(10), 0, 9 * rank)], 3)
    refused(ValueError, "negative in the shard of tensor 0", [Shard(torch.rand(10) - 2 * (rank == 0), rank)], 3)
    refused(
        ValueError,
        "rank 1 refused" if rank != 1 else "at least 0; got 1, -1",
        [Shard(torch.rand(9), rank, -(rank == 1))],
        3,
    )
    check([torch.arange(9.0)], 4, 3)  # and they still go on together


def dtensors(rank, ranks):
    mesh = init_device_mesh("cpu", (ranks,))
    generator = torch.Generator().manual_seed(0)
    shapes = ((7, 5), (1, 9), (4,), (2, 3, 3))
    scores = [torch.randint(0, 6, shape, generator=generator).float() for shape in shapes]
    expected = ops.select_topk(scores, 40)
    shards = [shard_of(distribute_tensor(score, mesh, [ShardOf(0)]), i) for i, score in enumerate(scores)]
    for shard, bits in zip(shards, select_topk(shards, 40).bits, strict=True):
        whole = reference.unpack(expected.bits[shard.tensor], scores[shard.tensor].numel())
        part = whole[shard.offset : shard.offset + shard.values.numel()]
        assert torch.equal(bits, reference.pack(part))
    with pytest.raises(ValueError, match="along dimension 0"):
        shard_of(distribute_tensor(scores[0], mesh, [ShardOf(1)]), 0)
    assert shard_of(distribute_tensor(scores[0], mesh, [Replicate()]), 0).offset == 0
    with pytest.raises(TypeError, match="must be a DTensor"):
        shard_of(scores[0], 0)


def run(rank, ranks, store, work):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        globals()[work](rank, ranks)
    finally:
        dist.destroy_process_group()
