"""global_unstructured gives what torch's gives, over rounds, with importance scores, in any dtype."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from cwfast.integrations.prune import global_unstructured


class Net(nn.Sequential):
    def __init__(self, dtype=torch.float64):
        torch.manual_seed(0)
        super().__init__(nn.Linear(37, 41, dtype=dtype), nn.Conv2d(3, 5, 3, dtype=dtype))
        self.scalar = nn.Parameter(torch.tensor(0.1, dtype=dtype))
        self.empty = nn.Parameter(torch.empty(0, 3, dtype=dtype))

    def pairs(self):
        named = [(self[0], "weight"), (self[0], "bias"), (self[1], "weight"), (self, "scalar"), (self, "empty")]
        return tuple(named)


def assert_same(a, b):
    for (name, x), (other, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert name == other
        assert x.dtype == y.dtype
        assert torch.equal(x, y), name
    for (m, name), (n, _) in zip(a.pairs(), b.pairs(), strict=True):
        assert torch.equal(getattr(m, name), getattr(n, name))
        assert [type(h) for h in m._forward_pre_hooks.values()] == [type(h) for h in n._forward_pre_hooks.values()]


@pytest.mark.parametrize("amount", [0, 0.0, 1, 7, 0.3, 0.985, 1.0])
def test_one_round(backend, amount):
    ours, theirs = Net(), Net()
    global_unstructured(ours.pairs(), pruning_method=prune.L1Unstructured, amount=amount, backend=backend)
    prune.global_unstructured(theirs.pairs(), pruning_method=prune.L1Unstructured, amount=amount)
    assert_same(ours, theirs)


@pytest.mark.parametrize("ours_first", [True, False])
def test_rounds_add_up_in_any_mixture_with_torchs(ours_first):
    a, b = Net(), Net()
    for turn, amount in enumerate((0.3, 100, 0.5)):
        ours = global_unstructured if (turn % 2 == 0) == ours_first else prune.global_unstructured
        ours(a.pairs(), pruning_method=prune.L1Unstructured, amount=amount)
        prune.global_unstructured(b.pairs(), pruning_method=prune.L1Unstructured, amount=amount)
        assert_same(a, b)
    for module, name in a.pairs():
        prune.remove(module, name)
    for module, name in b.pairs():
        prune.remove(module, name)
    assert_same(a, b)


def test_importance_scores_on_some_parameters_over_two_rounds():
    ours, theirs = Net(), Net()
    for _ in range(2):
        for net, call in ((ours, global_unstructured), (theirs, prune.global_unstructured)):
            generator = torch.Generator().manual_seed(5)
            given = torch.randn(41, 37, generator=generator, dtype=torch.float64)
            call(net.pairs(), prune.L1Unstructured, importance_scores={(net[0], "weight"): given}, amount=0.4)
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_lowest_go_and_ties_keep_the_lowest_index(dtype):
    net = Net(dtype)
    flat = torch.cat([getattr(m, n).detach().reshape(-1) for m, n in net.pairs()]).abs()
    global_unstructured(net.pairs(), prune.L1Unstructured, amount=0.9)
    kept = torch.cat([getattr(m, f"{n}_mask").reshape(-1) for m, n in net.pairs()])
    order = torch.sort(flat, descending=True, stable=True).indices[: len(flat) - round(0.9 * len(flat))]
    assert kept.dtype == dtype
    assert kept.sum(dtype=torch.float64) == len(order)
    assert (kept[order] == 1).all()


def test_zeros_pruned_before_stay_pruned_beside_zeros_that_were_kept():
    layer = nn.Linear(20, 1, bias=False)
    with torch.no_grad():
        layer.weight.zero_()[0, :4] = torch.arange(1.0, 5)
    prune.custom_from_mask(layer, "weight", torch.arange(20).reshape(1, 20) % 2)  # 10 left, of them 2 above zero
    global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=5)
    assert layer.weight_mask.sum() == 5
    assert (layer.weight_mask[0, ::2] == 0).all()
    assert layer.weight_mask[0, [1, 3]].tolist() == [1, 1]


def test_gradients_and_forward_work_as_in_torch():
    ours, theirs = nn.Linear(9, 9), nn.Linear(9, 9)
    theirs.load_state_dict(ours.state_dict())
    for net, call in ((ours, global_unstructured), (theirs, prune.global_unstructured)):
        call(((net, "weight"),), prune.L1Unstructured, amount=0.5)
        for _ in range(2):
            net(torch.ones(2, 9)).square().sum().backward()
            torch.optim.SGD(net.parameters(), 0.01).step()
    assert torch.equal(ours.weight_orig, theirs.weight_orig)
    assert torch.equal(copy.deepcopy(ours.state_dict())["weight_mask"], theirs.weight_mask)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pruning_method": prune.RandomUnstructured, "amount": 1}, TypeError, "must be torch.nn.utils.prune.L1"),
        ({"amount": 1.5}, ValueError, "amount=1.5"),
        ({"amount": 10**6}, ValueError, "amount must be at most"),
        ({"amount": 1, "importance_scores": [3]}, TypeError, "must be a mapping"),
    ],
)
def test_wrong_options(options, error, message):
    net = Net()
    with pytest.raises(error, match=message):
        global_unstructured(net.pairs(), **{"pruning_method": prune.L1Unstructured, **options})
    assert not prune.is_pruned(net)


def test_scores_that_do_not_fit_or_rank():
    net = Net()
    with pytest.raises(ValueError, match="must have the shape of weight"):
        global_unstructured(
            net.pairs(), prune.L1Unstructured, importance_scores={(net[0], "weight"): torch.ones(3)}, amount=1
        )
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 NaN"):
        global_unstructured(net.pairs(), prune.L1Unstructured, amount=1)
    with pytest.raises(TypeError, match="iterable of"):
        global_unstructured(3, prune.L1Unstructured, amount=1)
    assert not prune.is_pruned(net)
