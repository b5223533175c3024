"""What each process of test_distributed.py does: a module of its own, since spawned processes import it by name."""

import contextlib
import copy
import datetime
import itertools
import random

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor import Shard as ShardOf

import cwfast
from cwfast import MaskSet, ops, reference
from cwfast.distributed import Shard, lm_token_stats, select_topk, shard_of
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
    _ties(rank, ranks)


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


def fsdp(rank, ranks):
    """Gradients that FSDP2 has sharded, of layers that no number of ranks divides; on 4 ranks HSDP: 2 copies of 2."""
    copies = 2 if ranks == 4 else 1
    mesh = init_device_mesh("cpu", (copies, ranks // copies), mesh_dim_names=("copy", "shard"))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 1, bias=False))
    model = copy.deepcopy(plain)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh if copies > 1 else mesh["shard"])
    x = torch.randint(-2, 3, (8, 7)).float()  # every rank has the same batch: the mean of gradients is the gradient
    for net in (plain, model):
        net(x).sum().backward()
    shards = [shard_of(p.grad, i) for i, p in enumerate(model.parameters())]
    whole = [p.grad.full_tensor() for p in model.parameters()]
    for gradient, p in zip(whole, plain.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad)
    group = mesh["shard"].get_group()
    for k in (1, 20, 60):
        _same_as_whole(shards, [gradient.abs() for gradient in whole], k, group, transform="abs")
    masks = MaskSet.from_masks({n: torch.rand(p.shape) < 0.5 for n, p in plain.named_parameters()})
    with pytest.raises(TypeError, match=r"plain tensors; '0\.weight' is a DTensor"):
        cwfast.optim.SelectedAdamW(model, masks)


def vocabulary(rank, ranks):
    """Token statistics of an LM head whose rows are spread unevenly; the second rank has none of three."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(40, 12), torch.randn(700, 12), torch.randn(700)
    targets = torch.randint(700, (40,))
    weight[3, 0], hidden[5, 0] = torch.inf, 0.0  # a token without a distribution
    edges = [0, 333, 700] if ranks == 2 else [0, 20, 20, 700]
    mine = slice(edges[rank], edges[rank + 1])
    options = {"softcap": None, "scale": 0.5, "topk": 32}

    def run(**changes):
        given = {"hidden": hidden, "weight": weight[mine], "targets": targets, "first": mine.start}
        return lm_token_stats(**(given | {"bias": bias[mine], **options} | changes))

    for cap in (None, 8.0):
        options["softcap"] = cap
        found, whole = run(), ops.lm_token_stats(hidden, weight, targets, bias=bias, backend="cpu", **options)
        for name, value in found._asdict().items():
            for mine_, other in zip(value, whole._asdict()[name], strict=True):
                torch.testing.assert_close(mine_, other, rtol=2e-6, atol=2e-6, equal_nan=True, msg=name)
        copies = [torch.empty_like(found.logprob) for _ in range(ranks)]
        dist.all_gather(copies, found.logprob)
        assert all(torch.equal(copy.nan_to_num(), copies[0].nan_to_num()) for copy in copies)
    for error, message, changes in (
        (ValueError, "rank 1 refused|hidden must have 2", {"hidden": hidden if rank != 1 else hidden[0]}),
        (ValueError, "cover the vocabulary once", {"first": mine.start + (rank == 1)}),
        (ValueError, "the same on all ranks", {"topk": rank}),
        (ValueError, "targets must lie in 0 .. 699; got 0 to 700", {"targets": torch.arange(40) * 700 // 39}),
    ):
        with pytest.raises(error, match=message):
            run(**changes)


def _ties(rank, ranks):
    """Equal scores on both sides of every border, and thresholds that fall before, on and after one."""
    scores = [torch.ones(64 * ranks), torch.ones(7)]
    shards = [Shard(scores[0][64 * rank : 64 * rank + 64], 0, 64 * rank)]
    shards += [Shard(scores[1], 1)] if rank == ranks - 1 else []
    for k in (1, 63, 64, 65, 64 * ranks - 1, 64 * ranks, 64 * ranks + 1, 64 * ranks + 7):
        _same_as_whole(shards, scores, k)
    scores[0][:64:2] = 2  # the first rank alone has larger ones
    for k in (31, 32, 33, 32 + 64):
        _same_as_whole(shards, scores, k)


def _same_as_whole(shards, scores, k, group=None, **options):
    expected = ops.select_topk(scores, k)
    found = select_topk(shards, k, group=group, **options)
    assert (found.k, found.threshold) == (k, expected.threshold)
    for shard, bits in zip(shards, found.bits, strict=True):
        part = reference.unpack(expected.bits[shard.tensor], scores[shard.tensor].numel())[shard.offset :]
        assert torch.equal(bits, reference.pack(part[: shard.values.numel()]))


def ddp(rank, ranks):
    """Frozen training under DDP: replicas stay equal, frozen entries keep their bits, gradients are those of one."""
    for view in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 10))
        masks = MaskSet.from_masks({name: torch.rand(p.shape) < 0.3 for name, p in model.named_parameters()})
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=view, bucket_cap_mb=0.001)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
        torch.manual_seed(rank + 1)  # other data on each rank
        with cwfast.freeze(model, optimizer, masks):
            for step in range(6):
                with parallel.no_sync() if step % 2 else contextlib.nullcontext():
                    parallel(torch.randn(4, 20)).square().sum().backward()
                if step % 2:
                    continue
                assert not any(p.grad[masks[name]].any() for name, p in model.named_parameters())
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                for name, p in model.named_parameters():
                    copies = [torch.empty_like(p) for _ in range(ranks)]
                    dist.all_gather(copies, p.detach())
                    assert all(torch.equal(copies[0], other) for other in copies)
                    same = p == before[name]
                    assert same[masks[name]].all()
                    assert not same[~masks[name]].all()


def run(rank, ranks, store, work):
    torch.set_num_threads(1)
    how = {"init_method": f"file://{store}", "timeout": datetime.timedelta(minutes=5)}  # a deadlock ends the test
    dist.init_process_group("gloo", rank=rank, world_size=ranks, **how)
    try:
        globals()[work](rank, ranks)
    finally:
        dist.destroy_process_group()
