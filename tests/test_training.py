"""Stacked training equals training one by one; frozen weights stay; data splits hold what they promise."""

import copy

import pytest
import torch
from torch import nn

from cwfast import MaskSet
from cwfast.data import Batches, Dataset
from cwfast.data.bundled import digits
from cwfast.defense.losses import RelaxLoss
from cwfast.training import Fitted, Recipe, Task, cross_entropy, fit_from_scratch, train_many


def blobs(n=90, features=6, classes=3):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(n) % classes
    inputs = torch.randn(n, features, generator=generator) + 2 * torch.eye(classes, features)[targets]
    ids = torch.arange(n)
    return Dataset(
        "blobs", inputs, targets, ids[:60], ids[60:75], ids[75:], torch.zeros(n, dtype=torch.bool), "made here"
    )


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def ids_of(models, n=30):
    return [torch.randperm(60, generator=torch.Generator().manual_seed(k))[:n] for k in range(models)]


def plain_loop(model, data, ids, seed, recipe, loss, epochs):
    """The same training, written as anyone would."""
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    steps = epochs * -(-len(ids) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for batch in ids[torch.randperm(len(ids), generator=generator)].split(recipe.batch_size):
            optimizer.zero_grad()
            loss(model(data.inputs[batch]), data.targets[batch], epoch=epoch).backward()
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("loss", [cross_entropy, RelaxLoss(0.7)], ids=["ce", "relaxloss"])
def test_a_fleet_trains_as_its_models_would_alone(optimizer, loss):
    data, recipe = blobs(), Recipe(optimizer, lr=0.05, epochs=6, batch_size=8, weight_decay=0.01)
    task, ids, seeds = Task(network, data, recipe), ids_of(3), [5, 6, 7]
    fleet = [task.initial_model(seed).double() for seed in seeds]
    double = Dataset(**{**vars(data), "inputs": data.inputs.double()})
    train_many(fleet, double, ids, seeds, recipe, loss=loss)
    for k, model in enumerate(fleet):
        alone = task.initial_model(seeds[k]).double()
        plain_loop(alone, double, ids[k], seeds[k], recipe, loss, recipe.epochs)
        for a, b in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_frozen_weights_stay_and_the_others_move():
    data, seeds = blobs(), [0, 1]
    task = Task(network, data, Recipe(epochs=3, batch_size=8, weight_decay=0.1))
    models = [task.initial_model(seed) for seed in seeds]
    before = [{name: p.detach().clone() for name, p in model.named_parameters()} for model in models]
    masks = [MaskSet.from_masks({name: torch.rand(p.shape) < 0.3 for name, p in m.named_parameters()}) for m in models]
    train_many(models, data, ids_of(2), seeds, task.recipe, masks=masks)
    for model, old, mask in zip(models, before, masks, strict=True):
        for name, parameter in model.named_parameters():
            same = parameter.detach() == old[name]
            assert same[mask[name]].all(), name
            assert not same[~mask[name]].any(), name


def test_on_epoch_sees_the_weights_of_that_epoch():
    data = blobs()
    task, kept = Task(network, data, Recipe(epochs=4, batch_size=8, schedule="constant")), {}
    fitted = fit_from_scratch(task, ids_of(2), [0, 1], on_epoch=lambda done, weights: kept.update({done: weights()}))
    assert list(kept) == [1, 2, 3, 4]
    short = fit_from_scratch(
        Task(network, data, Recipe(epochs=2, batch_size=8, schedule="constant")), ids_of(2), [0, 1]
    )
    for k in range(2):
        for name, parameter in fitted[k].model.named_parameters():
            assert torch.equal(kept[4][k][name], parameter.detach())
            assert torch.equal(kept[2][k][name], dict(short[k].model.named_parameters())[name].detach())


def test_initial_weights_depend_on_the_seed_alone_and_leave_the_rng():
    task = Task(network, blobs(), Recipe())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second, other = task.initial_model(1), task.initial_model(1), task.initial_model(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


@pytest.mark.parametrize(("initialized", "kept"), [(True, {0: "state 0", 1: "state 1"}), (False, {})])
def test_initial_weights_leave_the_rng_of_cuda_where_it_is_initialized(initialized, kept, monkeypatch):
    """By a CUDA that only keeps account: not yet run on a GPU."""
    given, seeds = {}, []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"state {device}")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: given.update({device: state}))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    Task(network, blobs(), Recipe()).initial_model(1)
    assert given == kept
    assert seeds == [1]


def test_fitted_predicts_in_evaluation_mode_without_a_graph():
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.9)).train()
    fitted, x = Fitted(model, {}), torch.randn(4, 6)
    assert torch.equal(fitted.predict(x), fitted.predict(x))
    assert not fitted.predict(x).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ids_of(3)}, "as many ids"),
        ({"ids": [torch.arange(5), torch.arange(6)]}, "equally many samples"),
        ({"models": [nn.Linear(6, 3), nn.Linear(6, 4)]}, "parameters of the same names, .* 0 and 1 differ"),
        ({"models": [nn.BatchNorm1d(6), nn.BatchNorm1d(6).double()]}, "parameters of the same"),
        ({"models": [nn.BatchNorm1d(6), nn.BatchNorm1d(6, track_running_stats=False)]}, "buffers of the same"),
        ({"models": [nn.Sequential(nn.Linear(6, 3), act()) for act in (nn.ReLU, nn.Tanh)]}, "modules of the same"),
        ({"models": [], "ids": [], "seeds": []}, "at least one"),
    ],
    ids=["number", "lengths", "shapes", "dtypes", "buffers", "modules", "none"],
)
def test_models_that_are_no_fleet_are_refused(change, message):
    given = {"models": [network(), network()], "ids": ids_of(2), "seeds": [0, 1]} | change
    with pytest.raises(ValueError, match=message):
        train_many(given["models"], blobs(), given["ids"], given["seeds"], Recipe(epochs=1))


@pytest.mark.parametrize("bad", [{"optimizer": "lion"}, {"schedule": "step"}, {"epochs": -1}, {"batch_size": 0}])
def test_recipe_names_what_is_wrong(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Recipe(**bad)


def test_digits_splits_are_disjoint_and_labels_randomised_by_the_stated_share():
    clean, data = digits(random_label_share=0), digits(random_label_share=0.2)
    roles = torch.cat([data.pool, data.reference, data.test])
    assert torch.equal(roles.sort().values, torch.arange(1797))
    assert (len(data.pool), len(data.reference), len(data.test)) == (1200, 300, 297)
    changed = clean.targets != data.targets
    assert torch.equal(changed, data.randomised)
    assert changed[data.pool].sum() == 240
    assert changed[data.reference].sum() == 60
    assert not changed[data.test].any()
    assert data.targets.min() >= 0
    assert data.targets.max() <= 9
    assert not torch.equal(digits(seed=1).pool, data.pool)


@pytest.mark.parametrize("bad", [{"pool": 1500, "reference": 300}, {"random_label_share": 1.5}])
def test_digits_refuses_impossible_splits(bad):
    with pytest.raises(ValueError, match="must"):
        digits(**bad)


def test_batches_repeat_their_order_and_wrap_only_when_asked():
    data, ids = blobs(), torch.arange(10, 33)
    batches = Batches(data, ids, 8, seed=1)
    first, second = list(batches), list(batches)
    assert [len(y) for _, y in first] == [8, 8, 7]
    assert len(batches) == 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    seen = torch.cat([x for x, _ in first])
    assert torch.equal(seen.sort(dim=0).values, data.inputs[ids].sort(dim=0).values)
    wrapped = Batches(data, ids, 8, seed=1, wrap=True)
    assert [len(y) for _, y in wrapped] == [8, 8, 8]
    assert [len(y) for _, y in Batches(data, ids[:3], 8, seed=1, wrap=True)] == [8]


def test_parameters_without_gradient_stay_as_they_are():
    models = [network() for _ in range(2)]
    for model in models:
        next(model.parameters()).requires_grad_(False)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    data = blobs()
    train_many(models, data, ids_of(2), [0, 1], Recipe(lr=0.1, epochs=1, batch_size=8))
    for model, start in zip(models, before, strict=True):
        unchanged = [torch.equal(value, start[name]) for name, value in model.state_dict().items()]
        assert unchanged[0]
        assert not any(unchanged[1:])
    models[1].requires_grad_(True)
    with pytest.raises(ValueError, match="dtypes and requires_grad; those of models 0 and 1"):
        train_many(models, data, ids_of(2), [0, 1], Recipe(lr=0.1, epochs=1, batch_size=8))
