"""What must hold of CWRF, on small forms of the paper's networks and on each base defense."""

import copy
import functools
import math

import pytest
import torch

from cwfast import networks
from cwfast.data import Dataset
from cwfast.defense import CWRF, DPSGD, HAMP, ConvexConcave, PlainTraining, RelaxLoss
from cwfast.defense.tuning import fine_tune
from cwfast.training import Recipe, Task, cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore:BatchNorm in training mode mixes")
NETWORKS = {
    "MLP": lambda: networks.mlp(64, 3, width=16),
    "ResNet18": lambda: networks.resnet18(1, 3, width=2),
    "ViT": lambda: networks.vit(8, 1, 3, patch=4, dim=8, depth=1, heads=2),
}
LOSSES = {
    "CE": cross_entropy,
    "RelaxLoss": RelaxLoss(0.5),
    "HAMP": HAMP(0.8, 0.01),
    "CCL": ConvexConcave("ccel", 0.5),
    "CCQL": ConvexConcave("ccql", 0.5),
    "focal": ConvexConcave("focal", 2.0),
}
PRIVATE = DPSGD(noise_multiplier=1.0, delta=1e-3, accountant="rdp")
SEED = 3


@functools.cache
def trained(network):
    """A task, the members of one model, and that model; weights decay and have momentum."""
    generator = torch.Generator().manual_seed(0)
    inputs, ids = torch.randn(48, 1, 8, 8, generator=generator), torch.arange(48)
    targets = ids % 3
    data = Dataset("noise", inputs, targets, ids[:32], ids[32:40], ids[40:], torch.zeros(48) > 0, "made here")
    task = Task(NETWORKS[network], data, Recipe(lr=0.05, epochs=4, batch_size=8, momentum=0.9, weight_decay=0.1))
    members = data.pool[:14]  # the last batch is a part of one
    return task, members, PlainTraining().fit(task, members, data.reference, SEED)


def bases(network):
    return [*LOSSES, *(["DP-SGD"] if network != "ResNet18" else [])]  # BatchNorm mixes samples


ALL = [(network, base) for network in NETWORKS for base in bases(network)]
FEWER = [pair for pair in ALL if pair[0] != "ResNet18" or pair[1] in ("RelaxLoss", "HAMP")]  # that one takes its time
ENDS = [pair for pair in ALL if pair[1] in ("CE", "DP-SGD")]  # a loss has no say where all is frozen


def defended(network, base, rate, **options):
    task, members, before = trained(network)
    private = PRIVATE if base == "DP-SGD" else None
    defense = CWRF(rate, loss=LOSSES.get(base), private=private, criterion="delta", **options)
    return defense.fit(task, members, task.dataset.reference, SEED, trained=before)


def states_equal(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize(("network", "base"), ALL)
def test_exactly_floor_of_the_rate_is_rewound_and_stays_by_bits(network, base):
    before = trained(network)[2].model
    one = defended(network, base, 0.29)
    numel = sum(p.numel() for p in before.parameters())
    assert one.masks.total == math.floor(0.29 * numel) == sum(int(one.masks[n].sum()) for n in one.masks.names)
    moved = 0
    for name, p in one.model.named_parameters():
        mask = one.masks[name]
        assert torch.equal(p[mask], one.initial[name][mask]), name
        moved += int((p != before.get_parameter(name))[~mask].sum())
    assert moved > 0.9 * (numel - one.masks.total)  # under weight decay and momentum


@pytest.mark.parametrize(("network", "base"), FEWER)
def test_at_rate_0_it_is_the_base_defense_fine_tuned_from_the_trained_weights(network, base):
    task, members, before = trained(network)
    start = copy.deepcopy(before.model)
    sets = (task, [start], [before], [members], [SEED])
    if base == "DP-SGD":
        nothing = defended(network, base, 0.0, epochs=0).masks
        expected = PRIVATE.fine_tune(*sets, masks=[nothing])[0]
    else:
        expected = fine_tune(*sets, loss=LOSSES[base])[0]
    found = defended(network, base, 0.0)
    assert found.masks.total == 0
    assert states_equal(found.model, expected.model)
    assert not states_equal(found.model, before.model)


@pytest.mark.parametrize(("network", "base"), ENDS)
def test_at_rate_1_parameters_are_the_initial_ones(network, base):
    found = defended(network, base, 1.0)
    for name, p in found.model.named_parameters():
        assert torch.equal(p, found.initial[name]), name


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("criterion", ["taylor", "gap"])
def test_what_is_scored_is_rewound_on_each_network(network, criterion):
    task, members, before = trained(network)
    defense = CWRF(0.05, criterion=criterion)
    found = defense.fit(task, members, task.dataset.reference, SEED, trained=before)
    assert found.masks.total == math.floor(0.05 * found.masks.numel)
    for name, p in found.model.named_parameters():
        assert torch.equal(p[found.masks[name]], found.initial[name][found.masks[name]]), name
