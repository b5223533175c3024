"""What each process of test_sharded.py does: a module of its own, since spawned processes import it by name."""

import copy
import datetime
import os
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from tensor_parallel import tensor_parallel  # noqa: F401  (run finds it by name)
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import cross_entropy

import cwfast
from cwfast import MaskSet
from cwfast._shards import is_sharded
from cwfast.checkpoint import Checkpoint
from cwfast.defense.gap import gap_gradients, gap_shares
from cwfast.distributed import ShardedMaskSet, sum_scores
from cwfast.errors import UnsupportedLayer

EDGES = {2: [0, 5, 7], 3: [0, 3, 4, 7], 4: [0, 2, 4, 6, 7]}  # of 7 samples: uneven batches
VOCABULARY = 11


class Net(nn.Module):
    """Tied weights, a bare parameter of 1 entry; sizes 11 and 7, which no number of ranks divides, and 6."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 7)
        self.norm = nn.LayerNorm(7)
        self.middle = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 7, bias=False))
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


def assert_same(sharded, whole, atol=1e-7):
    assert list(sharded) == list(whole)
    for name, score in whole.items():
        torch.testing.assert_close(sharded[name].full_tensor(), score, rtol=1e-5, atol=atol)


def one_at_a_time(scorer):
    """From now on, two parameters' whole scores at once are an error; how many there have been is counted."""
    made, make = [0, lambda: None], scorer._sums

    def counted(name, device):
        if device == "meta":
            return make(name, device)
        assert made[1]() is None
        sums = make(name, device)
        made[0], made[1] = made[0] + 1, weakref.ref(sums)
        return sums

    scorer._sums = counted
    return made


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
            alive = one_at_a_time(scorers[1])
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
            assert alive[0] == 3 * len(list(plain.parameters()))
            assert scorers[1].samples == 3 * len(mine)
            norms = scorers[0].norms().reshape(3, 7)[:, EDGES[ranks][rank] : EDGES[ranks][rank + 1]]
            torch.testing.assert_close(scorers[1].norms(), norms.flatten(), rtol=1e-5, atol=1e-7)
            assert not grads or model.scale.grad is not None
            assert grads or all(p.grad is None for p in model.parameters())


def integer_scores(plain, model):
    """Equal scores, with ties across every border; whole, and sharded as the model is."""
    generator = torch.Generator().manual_seed(3)
    whole = {n: torch.randint(0, 4, p.shape, generator=generator).float() for n, p in plain.named_parameters()}
    sharded = {n: distribute_tensor(s, *spec(model.get_parameter(n))) for n, s in whole.items()}
    return whole, sharded


def spec(parameter):
    return parameter.device_mesh, parameter.placements


def selection(rank, ranks):
    _, plain, model = models(mesh_of(ranks))
    whole, sharded = integer_scores(plain, model)
    numel = sum(score.numel() for score in whole.values())
    for options in (
        {"k": 0},
        {"k": 1},
        {"rate": 0.3},
        {"k": numel},
        {"rate": 0.5, "scope": "layer"},
        {"scope": {"middle.*": 0.4, "*.bias": 1.0}},
        {"rate": 0.7, "exclude": ["embed*", "scale"]},
    ):
        with warnings.catch_warnings(record=True) as expected_warnings:
            warnings.simplefilter("always")
            expected = cwfast.select(whole, **options)
        with warnings.catch_warnings(record=True) as found_warnings:
            warnings.simplefilter("always")
            found = cwfast.select(sharded, **options)
        assert [str(w.message) for w in found_warnings] == [str(w.message) for w in expected_warnings]
        assert isinstance(found, ShardedMaskSet)
        assert found.whole() == expected
        assert found.zero_score_selected == found.whole().zero_score_selected == expected.zero_score_selected
        assert ShardedMaskSet.of(expected, model) == found
        everyone = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
        dist.all_gather(everyone, torch.tensor([found.total]))
        assert sum(everyone).item() == expected.total * (2 if ranks == 4 else 1)
    assert (found - found).whole().total == 0
    rows = {name: part._replace(begin=part.begin + 1) for name, part in found.parts.items()}
    moved = ShardedMaskSet(dict(found.bits), rows)  # as many entries, of other rows
    assert moved != found
    with pytest.raises(ValueError, match="mask sets must be sharded alike; they differ at 'scale'"):
        found & moved
    assert found.random_like(5).whole() == expected.random_like(5)
    assert f"Sharded{MaskSet.__name__}" in repr(found)
    nan = dict(sharded)
    nan["scale"] = distribute_tensor(torch.full((1,), torch.nan), *spec(model.scale))
    with pytest.raises(ValueError, match=r"1 NaN and 0 negative in the shard scores\['scale'\]"):
        cwfast.select(nan, rate=0.1)
    assert cwfast.select(nan, k=5, nan="skip").whole().counts["scale"] == 0
    with pytest.raises(TypeError, match="all, or none; 'scale' is a plain tensor"):
        cwfast.select(sharded | {"scale": whole["scale"]}, rate=0.1)
    with pytest.raises(ValueError, match="backend must be 'auto'"):
        cwfast.select(sharded, rate=0.1, backend="cpu")
    mesh, placements = spec(model.scale)
    columns = distribute_tensor(torch.ones(4, 6), mesh, [Shard(1) if isinstance(p, Shard) else p for p in placements])
    with pytest.raises(ValueError, match=r"scores\['norm.weight'\] must be sharded along dimension 0"):
        cwfast.select({"norm.weight": columns}, rate=0.1)
    with pytest.raises(ValueError, match="sharded over the same ranks; 'b' is sharded over dimension None"):
        cwfast.select({"a": sharded["scale"], "b": distribute_tensor(torch.ones(4), mesh)}, rate=0.1)


def files(rank, ranks):
    """Masks and scores saved from these ranks are those of one process; torch's distributed checkpoints hold both."""
    _, plain, model = models(mesh_of(ranks))
    whole, sharded = integer_scores(plain, model)
    expected, masks = (cwfast.select(scores, rate=0.3) for scores in (whole, sharded))
    folder = Path(os.environ["FOLDER"])
    masks.save(folder / "mask.safetensors")
    assert MaskSet.load(folder / "mask.safetensors") == expected
    with pytest.raises(OSError if rank == 0 else RuntimeError, match=r"missing|failed on another"):
        masks.save(folder / "missing" / "mask.safetensors")
    dcp.save({"masks": masks.dtensors(model), "scores": sharded}, checkpoint_id=folder / "dcp")
    other = shard(copy.deepcopy(plain), init_device_mesh("cpu", (ranks,)))
    like = dict(other.named_parameters())
    loaded = {
        "masks": {name: torch.zeros_like(p, dtype=torch.bool) for name, p in like.items()},
        "scores": {name: torch.zeros_like(p) for name, p in like.items()},
    }
    dcp.load(loaded, checkpoint_id=folder / "dcp")
    assert ShardedMaskSet.from_masks(loaded["masks"]).whole() == expected
    for name, score in whole.items():
        assert torch.equal(loaded["scores"][name].full_tensor(), score)
    with pytest.raises(TypeError, match=r"masks\['scale'\] must be a bool DTensor; got Tensor"):
        ShardedMaskSet.from_masks({"scale": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match="must be sharded as the masks are"):
        masks.dtensors(plain)


def rewind(rank, ranks):
    """From a module, sharded or not, a mapping and a file, of which the other ranks' rows are not read."""
    initial, plain, model = models(mesh_of(ranks))
    masks = cwfast.select(integer_scores(plain, model)[0], rate=0.3)
    start = copy.deepcopy(model.state_dict())
    path = Path(os.environ["FOLDER"]) / "base.safetensors"
    if rank == 0:
        save_file({name: p.detach() for name, p in initial.named_parameters()}, path)
    dist.barrier()
    expected = cwfast.rewind_(copy.deepcopy(plain), masks, initial)
    ids = samples(rank, ranks)[0]
    sharded_initial = shard(copy.deepcopy(initial), mesh_of(ranks))
    read = []
    pieces = Checkpoint.pieces

    def counted(*args, **kwargs):
        for piece in pieces(*args, **kwargs):
            read.append(len(piece))
            yield piece

    Checkpoint.pieces = counted
    for given in (masks, ShardedMaskSet.of(masks, model)):
        for base in (initial, sharded_initial, dict(initial.named_parameters()), path):
            read.clear()
            model.load_state_dict(start)
            with torch.no_grad():
                model(ids)  # leaves whole copies of the root's weights
            assert cwfast.rewind_(model, given, base) is model
            assert sum(read) <= (sum(p.to_local().numel() for p in model.parameters()) if base is path else 0)
            for name, p in expected.named_parameters():
                assert torch.equal(model.get_parameter(name).full_tensor(), p)
            with torch.no_grad():
                torch.testing.assert_close(model(ids), expected(ids))
    Checkpoint.pieces = pieces
    with pytest.raises(ValueError, match="own memory"):
        cwfast.rewind_(model, masks, model)
    with pytest.raises(ValueError, match="has shape"):
        cwfast.rewind_(plain, ShardedMaskSet.of(masks, model), initial)
    with pytest.raises(TypeError, match="all parameters of masks must be DTensors, or none"):
        ShardedMaskSet.of(masks, plain)
    partly = copy.deepcopy(plain)
    fully_shard(partly.middle[0], mesh=mesh_of(ranks))
    some = MaskSet.from_masks({"norm.weight": masks["norm.weight"]})  # of a parameter that is not sharded
    cwfast.rewind_(partly, some, initial)
    assert torch.equal(partly.norm.weight, expected.norm.weight)
    for base in (initial, path):  # some are sharded, some are not
        partly = copy.deepcopy(plain)
        fully_shard(partly.middle[0], mesh=mesh_of(ranks))
        cwfast.rewind_(partly, masks, base)
        for name, p in partly.named_parameters():
            assert torch.equal(p.full_tensor() if is_sharded(p) else p, expected.get_parameter(name))
    with pytest.raises(TypeError, match=r"plain tensors; '.*' is a DTensor"):
        cwfast.optim.SelectedAdamW(model, masks)


def freezing(rank, ranks):
    """50 steps of AdamW with decay, momentum from before, clipping, and rewinding on entry: the same bits."""
    initial, plain, model = models(mesh_of(ranks))
    masks = cwfast.select(integer_scores(plain, model)[1], rate=0.3)
    mine = samples(rank, ranks)[1]
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    copies = {name: p.detach().clone() for name, p in model.named_parameters()}

    def step():
        optimizer.zero_grad()
        loss_of(model, mine).backward()
        for name, p in model.named_parameters():
            seen.append(bool(p.grad.to_local()[masks[name]].any()))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    seen = []
    step()  # momentum
    assert any(seen) or not masks.total
    seen.clear()
    moving = {n: p.full_tensor().clone() for n, p in model.named_parameters()}
    with cwfast.freeze(model, optimizer, masks, initial=initial, also=[copies]):
        for _ in range(50):
            step()
    assert not any(seen)
    for name, p in model.named_parameters():
        mask, found = masks.whole()[name], p.full_tensor()
        assert torch.equal(found[mask], initial.get_parameter(name)[mask])
        assert not (found == moving[name])[~mask].any()
        assert torch.equal(copies[name].to_local()[masks[name]], p.to_local()[masks[name]])
    whole = full(masks)
    with pytest.raises(ValueError, match=r"also\[0\]\['.*'\] must be a DTensor"):
        cwfast.freeze(model, optimizer, whole, also=[plain]).__enter__()
    with pytest.raises(ValueError, match="optimizer must hold parameters of model"):
        cwfast.freeze(model, torch.optim.SGD(plain.parameters()), whole).__enter__()


def full(masks):
    """All entries selected."""
    return MaskSet.from_masks({name: torch.ones(part.shape, dtype=torch.bool) for name, part in masks.parts.items()})


def sum_of(model, ids):
    return cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def score(model, batches, loss=loss_of, **options):
    scorer = cwfast.SaliencyScorer(model, **options)
    with scorer:
        for ids in batches:
            loss(model, ids).backward()
        scorer.step()
    return scorer


def layers(rank, ranks):
    """Attention, whose weights its own module never uses by themselves; convolutions, whose scores come by chunks."""
    mesh = mesh_of(ranks)
    torch.manual_seed(0)
    attention = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    images = nn.Sequential(nn.Conv2d(3, 7, 3), nn.GroupNorm(7, 7), nn.ReLU(), nn.Conv2d(7, 5, 3, groups=1))
    begin, end = EDGES[ranks][rank], EDGES[ranks][rank + 1]
    for plain, x in ((attention, torch.randn(7, 5, 8)), (images, torch.randn(7, 3, 8, 8))):
        model = fully_shard(copy.deepcopy(plain), mesh=mesh)
        found, expected = (
            score(net, [batch], loss=lambda net, x: net(x).sin().flatten(1).sum(1).mean()).scores()
            for net, batch in ((model, x[begin:end]), (plain, x))
        )
        assert_same(found, expected, atol=1e-6)
        empty = score(plain, [x[:0]], reduction="sum", loss=lambda net, x: net(x).sum())
        assert empty.samples == 0
        assert not any(s.any() for s in empty.scores().values())


def variants(rank, ranks):
    """Other ways to shard, to run and to score: what one process gives."""
    mesh, (ids, mine) = mesh_of(ranks), samples(rank, ranks)
    _, plain, _ = models(mesh)
    expected = score(copy.deepcopy(plain), [ids]).scores()

    kept = shard(copy.deepcopy(plain), mesh, reshard_after_forward=False)
    assert_same(score(kept, [mine]).scores(), expected)
    with torch.no_grad():
        kept(ids)  # leaves whole copies, in the place of the parameters
    assert_same(score(kept, [mine]).scores(), expected)

    columns = shard(copy.deepcopy(plain), mesh, shard_placement_fn=lambda p: Shard(int(p.shape == (7, 6))))
    assert columns.middle[2].weight.placements == (Shard(1),)
    assert_same(score(columns, [mine]).scores(), expected)

    recomputed = copy.deepcopy(plain)
    checkpoint_wrapper.apply_activation_checkpointing(recomputed, check_fn=lambda m: isinstance(m, nn.Linear))
    found = score(shard_wrapped(recomputed, mesh), [mine]).scores()
    assert_same({name.replace("._checkpoint_wrapped_module", ""): s for name, s in found.items()}, expected)

    accumulated = shard(copy.deepcopy(plain), mesh)
    accumulated.set_requires_gradient_sync(False)
    double = score(accumulated, [mine, mine]).scores()
    assert_same({name: s / 2 for name, s in double.items()}, expected)

    part = score(shard(copy.deepcopy(plain), mesh), [mine], include=["middle.*"]).scores()
    assert_same(part, {name: s for name, s in expected.items() if name.startswith("middle.")})

    coefficients = torch.full((len(mine),), 1 / len(mine))
    assert_same(score(shard(copy.deepcopy(plain), mesh), [mine], reduction=coefficients).scores(), expected)

    # Granularity "batch" reads .grad, which FSDP2 averages over ranks: even batches have one process's mean.
    even = ids[rank : rank + 1]
    batch = score(shard(copy.deepcopy(plain), mesh), [even], granularity="batch").scores()
    assert_same(batch, score(copy.deepcopy(plain), [ids[:ranks]], granularity="batch").scores())

    low = shard(copy.deepcopy(plain), mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    for name, rough in score(low, [mine]).scores().items():
        assert rough.dtype == torch.float32
        torch.testing.assert_close(rough.full_tensor(), expected[name], rtol=0.3, atol=0.05 * expected[name].max())

    exact = copy.deepcopy(plain).double()
    found, whole = (score(net, [x]).scores() for net, x in ((shard(copy.deepcopy(exact), mesh), mine), (exact, ids)))
    for name in whole:
        torch.testing.assert_close(found[name].full_tensor(), whole[name], rtol=1e-11, atol=1e-14)

    some = ids[:0] if rank == 0 else ids[rank : rank + 2]  # the first rank has no sample
    others = torch.cat([ids[r : r + 2] for r in range(1, ranks)])
    found = score(shard(copy.deepcopy(plain), mesh), [some], reduction="sum", loss=sum_of).scores()
    assert_same(found, score(copy.deepcopy(plain), [others], reduction="sum", loss=sum_of).scores(), atol=1e-6)

    model, graphs = shard(copy.deepcopy(plain), mesh), []
    scorer = cwfast.SaliencyScorer(model)
    with scorer:
        graphs.append(loss_of(model, mine))  # no backward follows
        if rank:
            graphs.clear()  # what a rank has yet to throw away must not change when it meets the others
        loss_of(model, mine).backward()
    assert_same(scorer.scores(), expected)

    looped = copy.deepcopy(plain)
    looped.middle[0] = Odd(7, 7, 6)
    double = shard(copy.deepcopy(looped), mesh)
    whole = score(looped, [ids], fallback="loop").scores()
    assert_same(score(double, [mine], fallback="loop").scores(), whole)


def gap(rank, ranks):
    """Uneven batches of both sets; weights, gradients and modes are put back."""
    initial, plain, model = models(mesh_of(ranks))
    ids, mine = samples(rank, ranks)

    def both(ids):
        pairs = (ids[:, :-1], ids[:, 1:])
        return [pairs], [(pairs[0].roll(1, 1), pairs[1])]

    def loss(logits, targets, **_):
        return cross_entropy(logits.flatten(0, 1), targets.flatten())

    expected = gap_shares(plain, initial, *both(ids), loss=loss)
    loss_of(model, mine).backward()
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    model.middle.train()
    assert_same(gap_shares(model, initial, *both(mine), loss=loss), expected, atol=1e-6)  # differences
    assert model.training
    for name, p in plain.named_parameters():
        assert torch.equal(model.get_parameter(name).full_tensor(), p)
        assert torch.equal(model.get_parameter(name).grad.full_tensor(), grads[name])
    gradients = gap_gradients(model, *both(mine), loss=loss)
    assert_same(gradients, gap_gradients(plain, *both(ids), loss=loss), atol=1e-6)
    members, others = both(mine)
    with pytest.raises(ValueError, match="members must hold at least one sample"):
        gap_gradients(model, [], others, loss=loss)
    uneven = members if rank == 0 else members * 2
    with pytest.raises(ValueError, match=f"members must hold as many batches on each rank; got {len(uneven)} here"):
        gap_gradients(model, uneven, others, loss=loss)
    assert all(torch.equal(p.grad.full_tensor(), grads[name]) for name, p in model.named_parameters())


def shard_wrapped(model, mesh):
    fully_shard(model.middle[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Odd(nn.Bilinear):
    """A layer that no rule scores."""

    def forward(self, x):
        return super().forward(x, x)


class Twice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(self.layer(x))

    def encode(self, x):
        return self.layer(x)


def refusals(rank, ranks):
    mesh = mesh_of(ranks)
    torch.manual_seed(0)
    x = torch.randn(3, 6)
    moved = fully_shard(nn.Linear(6, 6), mesh=mesh)
    scorer = cwfast.SaliencyScorer(moved, criterion="taylor")
    with scorer:
        moved(x).mean(0).sum().backward()
        with torch.no_grad():
            next(moved.parameters()).mul_(2)
        with pytest.raises(RuntimeError, match="was changed in place"):
            scorer.scores()
        next(moved.parameters()).to_local().data.mul_(0.5)  # unseen: nobody counts what is written through .data
        scorer.reset()
    module = fully_shard(Twice(nn.Linear(6, 6)), mesh=mesh)
    register_fsdp_forward_method(module, "encode")
    scorer = cwfast.SaliencyScorer(module)
    with (
        scorer,
        scorer.batch(size=3),
        pytest.raises(UnsupportedLayer, match="in the forward pass of a module that"),
    ):
        module.encode(x).mean(0).sum().backward()
    already = pytest.raises(RuntimeError, match="one scorer at a time; 'weight' already is by another")
    with cwfast.SaliencyScorer(moved), cwfast.SaliencyScorer(moved), already:
        moved(x)


def ddp(rank, ranks):
    """Each rank scores its own samples; the sums of all are those of one process."""
    _, plain, _ = models(init_device_mesh("cpu", (ranks,)))
    ids, mine = samples(rank, ranks)
    expected = score(copy.deepcopy(plain), [ids, ids]).scores()
    for grads in (True, False):
        model = copy.deepcopy(plain)
        parallel = nn.parallel.DistributedDataParallel(model)
        scorer = cwfast.SaliencyScorer(model, grads=grads)
        with scorer:
            for _ in range(2):
                loss_of(parallel, mine).backward()
        found = sum_scores(scorer.scores())
        for name, whole in expected.items():
            torch.testing.assert_close(found[name], whole, rtol=1e-5, atol=1e-7)
        assert scorer.samples == 2 * len(mine)
        del parallel
    model = models(init_device_mesh("cpu", (ranks,)))[2]
    with pytest.raises(TypeError, match="under FSDP2 it holds the sums already"):
        sum_scores(score(model, [mine]).scores())


def run(rank, ranks, store, works):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # of torch: nn.Linear gives a view
    how = {"init_method": f"file://{store}", "timeout": datetime.timedelta(minutes=5)}  # a deadlock ends the test
    dist.init_process_group("gloo", rank=rank, world_size=ranks, **how)
    try:
        for work in works:
            globals()[work](rank, ranks)
    finally:
        dist.destroy_process_group()
