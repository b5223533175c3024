"""What each process of test_sharded.py does with linear layers that tensor parallelism splits."""

import copy
import itertools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import cwfast
from cwfast._shards import is_sharded
from cwfast.distributed import sum_scores
from cwfast.errors import UnsupportedLayer

SAMPLES, WIDTH = 5, 7  # no number of ranks divides them


class Block(nn.Module):
    """As in a transformer: a norm, a feed-forward part that is split, and a linear layer; 12 is for 2 to 4 ranks."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.last = nn.Linear(WIDTH, 3)

    def rows(self, x):
        return x

    def forward(self, x):
        x = self.rows(self.norm(x))
        return self.last(x + self.down(self.up(x).sin()))


class Routed(Block):
    """Rows that an index picks, of two dimensions: a router sends some tokens here."""

    def rows(self, x):
        return x.flatten(0, 1)[torch.tensor([7, 2, 3, 11, 2, 0, 14])]


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def scored(model, x, **options):
    """Two passes, the weights moved between them; the scorer, and the gradients of the last pass."""
    scorer = cwfast.SaliencyScorer(model, reduction="sum", **options)
    with scorer:
        for _ in range(2):
            model.zero_grad()
            whole({0: model(x)})[0].square().sum().backward()
            scorer.step()
            scorer.scores()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.9)
    return scorer.scores(), {name: p.grad for name, p in model.named_parameters()}


def whole(tensors):
    return {n: t.full_tensor() if is_sharded(t) else t for n, t in tensors.items() if t is not None}


def tensor_parallel(rank, ranks):
    """Each rank has the scores of its part of the weights, those of one process: nothing is summed over ranks."""
    mesh = init_device_mesh("cpu", (ranks,))
    torch.manual_seed(0)
    for kind, plan in ((Block, PLAN), (Routed, PLAN), (Block, {"up": ColwiseParallel(output_layouts=Replicate())})):
        plain = kind()
        x = torch.randn(SAMPLES, 3, WIDTH)
        for options in (
            {},
            {"criterion": "fisher"},
            {"criterion": "taylor_delta", "initial": {n: p.detach() / 2 for n, p in plain.named_parameters()}},
            {"grads": False},
            {"exclude": ["*.bias", "down.*"]},
            {"granularity": "batch"},
        ):
            split = parallelize_module(copy.deepcopy(plain), mesh, plan)
            expected, gradients = scored(copy.deepcopy(plain), x, **options)
            found, split_gradients = scored(split, x, **options)
            assert_close(whole(found), expected)
            assert_close(whole(split_gradients), whole(gradients))
            parts = [(score, split.get_parameter(name)) for name, score in found.items()]
            assert all(is_sharded(score) == is_sharded(parameter) for score, parameter in parts)
            assert all(s.placements == p.placements for s, p in parts if is_sharded(s))
    inputs(mesh)
    rewound(mesh, rank)
    beside_data(rank, ranks)
    dealt(mesh, rank, ranks)
    sequence(mesh, rank, ranks)
    refused(mesh, ranks)


def assert_close(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def inputs(mesh):
    """Whatever the layer gets and gives, its rule exchanges what it needs: parts of samples, of tokens, of features."""
    torch.manual_seed(0)
    x = torch.randn(6, 6, 6)  # torch's own limit: ranks divide what is flattened
    for dims in itertools.product((None, 0, 1), (None, 0, 1, 2)):
        of_weight, of_input = ([Replicate() if dim is None else Shard(dim)] for dim in dims)
        plain = nn.Sequential(nn.Linear(6, 7, bias=dims[0] != 1))
        split = copy.deepcopy(plain)
        for name, parameter in plain[0].named_parameters():
            split[0].register_parameter(
                name, nn.Parameter(distribute_tensor(parameter.detach().clone(), mesh, of_weight))
            )
        expected, gradients = scored(plain, x)
        found, split_gradients = scored(split, distribute_tensor(x, mesh, of_input))
        assert_close(whole(found), expected)
        assert_close(whole(split_gradients), gradients)


def sequence(mesh, rank, ranks):
    """Outside the split layers every rank has its tokens, inside them all: what the layers get is exchanged."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, WIDTH))
    plan = {"0": ColwiseParallel(input_layouts=Shard(1)), "2": RowwiseParallel(output_layouts=Shard(1))}
    x = torch.randn(SAMPLES, 2 * ranks, WIDTH)
    for options in ({}, {"granularity": "batch"}):
        split = parallelize_module(copy.deepcopy(plain), mesh, plan)
        expected, gradients = scored(copy.deepcopy(plain), x, **options)
        found, split_gradients = scored(split, x[:, 2 * rank : 2 * rank + 2], **options)
        assert_close(whole(found), expected)
        assert_close(whole(split_gradients), gradients)
    plain = nn.Sequential(nn.LayerNorm(WIDTH))  # each rank has its tokens' term of the gradient, all have the weight
    expected, _ = scored(copy.deepcopy(plain), x, granularity="batch")
    norm = parallelize_module(plain, mesh, {"0": SequenceParallel(use_local_output=True)})
    found, gradients = scored(norm, x[:, 2 * rank : 2 * rank + 2], granularity="batch")
    assert gradients["0.weight"].placements != norm[0].weight.placements
    assert_close(whole(found), expected)


def rewound(mesh, rank):
    """By whole masks: from a module, a mapping and a file; the selected weights keep their bits while others train."""
    torch.manual_seed(0)
    initial, plain = Block(), Block()
    x = torch.randn(SAMPLES, 3, WIDTH)
    path = Path(os.environ["FOLDER"]) / "initial.safetensors"
    if rank == 0:
        save_file(dict(initial.state_dict()), path)
    dist.barrier()
    split = parallelize_module(copy.deepcopy(plain), mesh, PLAN)
    scorer = cwfast.SaliencyScorer(split, reduction="sum")
    with scorer:
        split(x).square().sum().backward()
    masks = cwfast.select(whole(scorer.scores()), rate=0.4)
    expected = cwfast.rewind_(copy.deepcopy(plain), masks, initial)
    for base in (initial, parallelize_module(copy.deepcopy(initial), mesh, PLAN), initial.state_dict(), path):
        split = parallelize_module(copy.deepcopy(plain), mesh, PLAN)
        assert cwfast.rewind_(split, masks, base) is split
        assert all(torch.equal(p, expected.get_parameter(n)) for n, p in whole(dict(split.named_parameters())).items())
    split = parallelize_module(copy.deepcopy(plain), mesh, PLAN)
    optimizer = torch.optim.AdamW(split.parameters(), 0.01, weight_decay=0.1)
    with cwfast.freeze(split, optimizer, masks, initial=path):
        for _ in range(5):
            optimizer.zero_grad()
            split(x).square().sum().backward()
            optimizer.step()
    for name, found in whole(dict(split.named_parameters())).items():
        assert torch.equal(found[masks[name]], initial.get_parameter(name)[masks[name]])
        assert not (found == plain.get_parameter(name))[~masks[name]].any()


def beside_data(rank, ranks):
    """Ranks with the same part of the weights and samples of their own: their sums are those of all samples."""
    torch.manual_seed(0)
    plain = Block()
    mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("data", "parts"))
    split = parallelize_module(copy.deepcopy(plain), mesh["parts"], PLAN)
    x = torch.randn(2 * ranks, 3, WIDTH)
    expected, _ = scored(plain, x)
    found, _ = scored(split, x[2 * rank : 2 * rank + 2])
    with pytest.raises(TypeError, match="must be plain tensors, or DTensors of a mesh that has one rank of the group"):
        sum_scores({"w": distribute_tensor(x, mesh["data"], [Shard(0)])})
    sums = sum_scores(found, group=mesh["data"].get_group())
    assert sums["up.weight"].placements == found["up.weight"].placements
    assert_close(whole(sums), expected)


class Penalised(Block):
    """A use of a split weight that no torch function sees."""

    def forward(self, x):
        return super().forward(x) + self.up.weight.full_tensor().square().sum()


def dealt(mesh, rank, ranks):
    """Rows of two dimensions that ranks deal among them: one of each sample is scored, more are refused."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDTH, 12))
    split = parallelize_module(copy.deepcopy(plain), mesh, {"0": ColwiseParallel(input_layouts=Shard(0))})
    x = torch.randn(2 * ranks, WIDTH)
    for mine in (x[2 * rank : 2 * rank + 2], x[2 * rank : 2 * rank + 2].clone().requires_grad_()):
        found = []
        for model, rows in ((plain, x), (split, mine)):
            scorer = cwfast.SaliencyScorer(model, reduction="sum")
            with scorer, scorer.batch(size=2 * ranks):
                model(rows).square().sum().backward()
            found.append(scorer.scores())
        assert_close(whole(found[1]), found[0])
        with cwfast.SaliencyScorer(split), pytest.raises(UnsupportedLayer, match="must be in the order of the samples"):
            split(mine)


def refused(mesh, ranks):
    """What is not scored says so, by name."""
    x = torch.randn(SAMPLES, 2 * ranks, WIDTH)
    norm = parallelize_module(nn.Sequential(nn.LayerNorm(WIDTH)), mesh, {"0": SequenceParallel()})
    with (
        cwfast.SaliencyScorer(norm),
        pytest.raises(UnsupportedLayer, match=r"'0\.bias', '0\.weight' is used by layer_norm"),
    ):
        norm(x[:, :2])
    table = parallelize_module(nn.Sequential(nn.Embedding(12, 6)), mesh, {"0": ColwiseParallel()})
    looped = cwfast.SaliencyScorer(table, fallback="loop")
    with looped, pytest.raises(UnsupportedLayer, match=r"'0\.weight' is used by embedding"):
        table(torch.arange(6).reshape(3, 2))
    split = parallelize_module(Penalised(), mesh, PLAN)
    unseen = pytest.raises(UnsupportedLayer, match=r"'up\.weight' is used by DTensor.full_tensor")
    with cwfast.SaliencyScorer(split), unseen:
        split(x)
    with pytest.raises(ValueError, match="norms must be False where parameters are split"):
        cwfast.SaliencyScorer(split, norms=True)
    both = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("data", "parts"))
    split = fully_shard(parallelize_module(Block(), both["parts"], PLAN), mesh=both["data"])
    with cwfast.SaliencyScorer(split), pytest.raises(UnsupportedLayer, match=r"by nothing else; 'up\.weight' has"):
        split(x)
