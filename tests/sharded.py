"""What each process of test_sharded.py does: a module of its own, since spawned processes import it by name."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

import cwfast
from cwfast.distributed import ShardedMaskSet, sum_scores

EDGES = {2: [0, 5, 7], 3: [0, 3, 4, 7], 4: [0, 2, 4, 6, 7]}  # of 7 samples: uneven batches
VOCABULARY = 11


class Net(nn.Module):
    """Tied weights, a bare parameter, sizes that no number of ranks divides, one of 1 entry."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 7)
        self.norm = nn.LayerNorm(7)
        self.middle = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 7, bias=False))
        self.head = nn.Linear(7, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, ids):
        return self.head(self.norm(self.middle(self.embed(ids))) * self.scale)


def models(mesh=None, **options):
    """Trained a little and as it was before, in one process; and the trained one sharded over the mesh."""
    torch.manual_seed(0)
    initial = Net()
    plain = copy.deepcopy(initial)
    for parameter in plain.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return initial, plain, shard(copy.deepcopy(plain), mesh, **options)


def shard(model, mesh, **options):
    for part in (model.middle[0], model.middle[2], model):
        fully_shard(part, mesh=mesh, **options)
    return model


def mesh_of(ranks):
    if ranks < 4:
        return init_device_mesh("cpu", (ranks,))
    return init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("copy", "shard"))  # HSDP


def samples(rank, ranks):
    ids = torch.randint(VOCABULARY, (7, 6), generator=torch.Generator().manual_seed(1))
    return ids, ids[EDGES[ranks][rank] : EDGES[ranks][rank + 1]]


def loss_of(model, ids):
    return cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def assert_same(sharded, whole):
    assert list(sharded) == list(whole)
    for name, score in whole.items():
        torch.testing.assert_close(
            sharded[name].full_tensor(), score, rtol=1e-5, atol=1e-7, msg=lambda m: f"{name}: {m}"
        )


def scores(rank, ranks):
    mesh = mesh_of(ranks)
    ids, mine = samples(rank, ranks)
    for criterion in ("taylor", "taylor_delta", "grad", "fisher"):
        for grads in (True, False):
            initial, plain, model = models(mesh)
            options = {"criterion": criterion, "grads": grads, "norms": True}
            options |= {"initial": initial} if criterion == "taylor_delta" else {}
            pairs = [(plain, ids), (model, mine)]
            scorers = [cwfast.SaliencyScorer(net, **options) for net, _ in pairs]
            optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net, _ in pairs]
            for scorer, optimizer, (net, data) in zip(scorers, optimizers, pairs, strict=True):
                with scorer:
                    for _ in range(2):
                        # as if FSDP2, which averages over ranks, averaged over samples
                        loss_of(net, data).backward()
                    if grads:
                        for parameter in net.parameters():  # uneven batches: another mean than that of one process
                            parameter.grad = None
                    optimizer.step()  # folds the factor
                    loss_of(net, data).backward()
            assert_same(scorers[1].scores(), scorers[0].scores())
            assert scorers[1].samples == 3 * len(mine)
            norms = scorers[0].norms().reshape(3, 7)[:, EDGES[ranks][rank] : EDGES[ranks][rank + 1]]
            torch.testing.assert_close(scorers[1].norms(), norms.flatten(), rtol=1e-5, atol=1e-7)
            assert not grads or model.scale.grad is not None
            assert grads or all(p.grad is None for p in model.parameters())


def run(rank, ranks, store, works):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # of torch: nn.Linear gives a view
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        for work in works:
            globals()[work](rank, ranks)
    finally:
        dist.destroy_process_group()
