"""CWRF's criteria, scopes, rounds and variants; what must hold of the ends, the counts and the frozen weights."""

import copy
import dataclasses
import functools
import math

import pytest
import torch
from test_defense import small_task
from test_defense import trained_pair as freshly_trained_pair
from test_training import blobs, ids_of, network
from torch import nn
from torch.nn import functional

from cwfast import MaskSet, select
from cwfast.defense import (
    CRITERIA,
    CWRF,
    PAST,
    Estimate,
    PlainTraining,
    RelaxLoss,
    criterion,
    cwrf_,
    gap_shares,
    recalibrate_,
)
from cwfast.defense.criteria import critical_masks, critical_scores
from cwfast.defense.cwrf import fine_tune
from cwfast.defense.gap import gap_gradients
from cwfast.training import Recipe, Task

NAMES = ("taylor", "taylor_delta", "grad", "fisher", "gap", "past", "delta", "magnitude", "random")


@functools.cache
def trained_once(dtype):
    return freshly_trained_pair(dtype=dtype)


def trained_pair(dtype=torch.float64):
    """Copies, so that tests may change them."""
    return copy.deepcopy(trained_once(dtype))


def batchnorm():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def batchnorm_task(epochs=4):
    return Task(batchnorm, blobs(), Recipe(epochs=epochs, batch_size=8)), ids_of(2), [1, 2]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_there_are_the_criteria_of_the_documentation():
    assert tuple(CRITERIA) == NAMES
    assert [name for name, found in CRITERIA.items() if found.signed] == ["gap"]


def test_simple_criteria_equal_their_formulas():
    model, initial, members, reference = trained_pair()
    sets = (model, initial, members, reference)
    w, w0 = dict(model.named_parameters()), dict(initial.named_parameters())

    def mean_gradients(batches):
        x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
        return torch.autograd.grad(functional.cross_entropy(model(x), y), list(w.values()))

    past = [(a - b).abs() for a, b in zip(mean_gradients(members), mean_gradients(reference), strict=True)]
    delta, magnitude = critical_scores(*sets, criterion="delta"), critical_scores(*sets, criterion="magnitude")
    found = critical_scores(*sets, criterion="past")
    for (name, weight), expected in zip(w.items(), past, strict=True):
        assert torch.equal(delta[name], (weight - w0[name]).abs().detach())
        assert torch.equal(magnitude[name], weight.abs().detach())
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())
    one, same_, other = (critical_scores(*sets, criterion="random", seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same_[name]) and not torch.equal(one[name], other[name]) for name in w)


def test_gap_gradients_leave_what_lies_outside_the_model():
    model, outside = torch.nn.Linear(3, 2), torch.ones(2, requires_grad=True)
    batches = [(torch.randn(4, 3), torch.randint(2, (4,)))]

    def loss(logits, targets, **_):
        return torch.nn.functional.cross_entropy(logits * outside, targets)

    found = gap_gradients(model, batches, [(-x, y) for x, y in batches], loss=loss)
    assert found["weight"].any()
    assert outside.grad is None


def test_gap_gradients_refuse_empty_sets_and_generators():
    model, _, members, reference = trained_pair()
    with pytest.raises(ValueError, match="members must hold"):
        gap_gradients(model, [], reference)
    with pytest.raises(TypeError, match="reference must be iterable more than once"):
        gap_gradients(model, members, iter(reference))


def test_a_criterion_of_ones_own_is_a_few_lines(monkeypatch):
    monkeypatch.setattr("cwfast.defense.criteria.CRITERIA", dict(CRITERIA))

    @criterion("largest_last")
    def largest_last(model, initial, members, reference, estimate):
        return {
            name: torch.arange(p.numel(), dtype=torch.float64).reshape(p.shape) for name, p in model.named_parameters()
        }

    task, ids, seeds = small_task()
    defense = CWRF(0.1, criterion="largest_last", epochs=0)
    fitted = defense.fit_many(task, ids, task.dataset.reference, seeds)
    first = fitted[0].masks["0.weight"].flatten().nonzero().flatten()
    assert first.tolist() == list(range(48 - len(first), 48))
    with pytest.raises(ValueError, match="'largest_last' is there already"):
        criterion("largest_last")(largest_last)


def test_options_that_no_criterion_knows_are_refused():
    with pytest.raises(TypeError, match="lamda"):
        critical_scores(*trained_pair(), lamda=0.3)
    for field in dataclasses.fields(Estimate):
        assert field.name in Estimate.__doc__


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "gap"])
def test_masks_have_exactly_floor_of_rate_times_n_entries(name, rate):
    model, initial, members, reference = trained_pair(dtype=torch.float32)
    masks = cwrf_(model, initial, members, reference, rate=rate, criterion=name).masks
    assert masks.total == math.floor(round(rate * 100) * masks.numel / 100)  # in whole percents: exact
    assert sum(int(masks[n].sum()) for n in masks.names) == masks.total


@pytest.mark.parametrize("name", ["taylor", "gap", "magnitude"])
def test_scopes_and_exclusion(name):
    pair = trained_pair(dtype=torch.float32)
    options = {"criterion": name, "epochs": 1}

    def run(**more):
        model, initial, members, reference = copy.deepcopy(pair)
        return model, cwrf_(model, initial, members, reference, **options, **more).masks

    by_layer = run(rate=0.25, scope="layer")[1]
    assert by_layer.counts == {"0.weight": 12, "0.bias": 2, "2.weight": 6, "2.bias": 0}
    patterns = run(scope={"0.*": 0.25})[1]
    assert patterns.counts == {"0.weight": 12, "0.bias": 2, "2.weight": 0, "2.bias": 0}
    model, masks = run(rate=0.25, exclude=["*.bias"])
    assert masks.total == 18
    assert masks.counts["0.bias"] == masks.counts["2.bias"] == 0
    assert not torch.equal(model[0].bias, pair[0][0].bias)  # excluded, so fine-tuned


def test_gap_refuses_per_layer_and_names_it():
    scores = {"a": torch.tensor([1.0, 0, 0, 0]), "b": torch.ones(4)}
    assert critical_masks(scores, 0.25, criterion="gap", scope="layer").total == 2
    with pytest.raises(ValueError, match=r"rate must be at most 0\.25 here for 'a': 1 of 4"):
        critical_masks(scores, 0.5, criterion="gap", scope="layer")
    assert critical_masks(scores, 0.5, criterion="gap", scope="layer", exclude=["a"]).counts == {"a": 0, "b": 2}


@pytest.mark.parametrize("name", ["taylor", "gap", "delta"])
def test_rounds_score_again_after_each_part_and_keep_what_they_chose(name):
    model, initial, members, reference = trained_pair()
    options = {"criterion": name, "lr": 0.05}
    if name == "taylor":
        options["update"] = False
    found = cwrf_(copy.deepcopy(model), initial, members, reference, rate=0.3, rounds=3, **options)
    work, chosen = copy.deepcopy(model), None
    scored = {n: v for n, v in options.items() if n != "lr"} | {"lr": 0.005}
    for rate in (0.1, 0.2, 0.3):
        scores = critical_scores(work, initial, members, reference, **scored)
        if chosen is not None:
            scores = {n: score.masked_fill(chosen[n], math.inf) for n, score in scores.items()}
        now = select(scores, rate=rate)
        assert chosen is None or (chosen - now).total == 0
        chosen, work = now, copy.deepcopy(model)
        with torch.no_grad():
            for (n, p), q in zip(work.named_parameters(), initial.parameters(), strict=True):
                p[chosen[n]] = q[chosen[n]]
    assert found.masks == chosen
    assert found.masks.total == math.floor(0.3 * found.masks.numel)
    single = cwrf_(copy.deepcopy(model), initial, members, reference, rate=0.3, **options)
    assert (found.masks == single.masks) == (name == "delta")  # only there nothing changes in between
    assert all(torch.equal(found.scores[n], single.scores[n]) for n in found.scores)


def test_rounds_of_a_fleet_equal_those_of_one_model():
    task, ids, seeds = small_task()
    trained = PlainTraining().fit_many(task, ids, task.dataset.reference, seeds)
    defense = CWRF(0.2, criterion="gap", rounds=2, epochs=0)
    scores = defense.score(task, ids, task.dataset.reference, seeds, trained)
    fleet = defense.fit_many(task, ids, task.dataset.reference, seeds, trained=trained, scores=scores)
    alone = defense.fit(task, ids[1], task.dataset.reference, seeds[1], trained=trained[1])
    assert fleet[1].masks == alone.masks
    with pytest.raises(ValueError, match="rounds is 1; got 2"):
        defense.masks(scores)


def test_what_is_given_must_be_one_for_each_model():
    task, ids, seeds = small_task()
    trained = PlainTraining().fit_many(task, ids, task.dataset.reference, seeds)
    defense = CWRF(0.1, criterion="delta", epochs=0)
    scores = defense.score(task, ids, task.dataset.reference, seeds, trained)
    masks = defense.masks(scores)
    for given in ({"masks": masks[:2]}, {"scores": [*scores, scores[0]]}, {"masks": [*masks, masks[0]]}):
        ((name, value),) = given.items()
        with pytest.raises(ValueError, match=f"one for each of 3 models; got .*'{name}': {len(value)}"):
            defense.fit_many(task, ids, task.dataset.reference, seeds, **{"trained": trained} | given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gap_of_half_precision_is_summed_in_float32(dtype):
    """Against the same gradients, taken batch by batch from the half-precision model, summed in float64."""
    model, initial, members, reference = trained_pair()
    model, initial = model.to(dtype), initial.to(dtype)
    members, reference = ([(x.to(dtype), y) for x, y in 5 * list(sets)] for sets in (members, reference))
    found = gap_shares(model, initial, members, reference, points=1)
    at = copy.deepcopy(model)
    with torch.no_grad():
        for (name, p), w0 in zip(at.named_parameters(), initial.parameters(), strict=True):
            p.copy_(torch.lerp(w0.float(), model.get_parameter(name).float(), 0.5))
    for name, p in at.named_parameters():
        total = torch.zeros(p.shape, dtype=torch.float64)
        for sets, sign in ((reference, 1), (members, -1)):
            count = sum(len(y) for _, y in sets)
            for x, y in sets:
                value = functional.cross_entropy(at(x), y) * (sign * len(y) / count)
                total += torch.autograd.grad(value, p)[0].double()
        delta = model.get_parameter(name).double() - initial.get_parameter(name).double()
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), (delta * total).detach(), rtol=1e-5, atol=1e-8)


def test_points_of_gap_reach_it():
    pair = trained_pair()
    one, five = (critical_scores(*pair, criterion="gap", points=n) for n in (1, 5))
    assert not torch.equal(one["0.weight"], five["0.weight"])
    result = cwrf_(*pair, rate=0.1, criterion="gap", points=5)
    assert torch.equal(result.scores["0.weight"], five["0.weight"])


def test_removal_zeroes_and_trains_the_others():
    model, initial, members, reference = trained_pair(dtype=torch.float32)
    before = copy.deepcopy(model)
    masks = cwrf_(model, initial, members, reference, rate=0.2, value="zero", epochs=2).masks
    for name, p in model.named_parameters():
        assert (p[masks[name]] == 0).all()
        assert not torch.equal(p[~masks[name]], before.get_parameter(name)[~masks[name]])


def test_the_vulnerable_trainable_variant_moves_nothing_else():
    model, initial, members, reference = trained_pair(dtype=torch.float32)
    before = copy.deepcopy(model)
    options = {"rate": 0.2, "criterion": "magnitude", "train": "critical"}
    masks = cwrf_(model, initial, members, reference, **options, epochs=2).masks
    moved = 0
    for name, p in model.named_parameters():
        mask = masks[name]
        assert torch.equal(p[~mask], before.get_parameter(name)[~mask])
        moved += int((p[mask] != initial.get_parameter(name)[mask]).sum())
    assert moved > 0.9 * masks.total


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("train", ["rest", "critical"])
def test_frozen_weights_of_a_fleet_stay_under_momentum_and_decay(train, optimizer):
    _, ids, seeds = small_task()
    task = Task(network, blobs(), Recipe(optimizer, lr=0.05, epochs=6, batch_size=8, weight_decay=0.1))
    trained = PlainTraining().fit_many(task, ids, task.dataset.reference, seeds)
    defense = CWRF(0.2, loss=RelaxLoss(0.3), train=train)
    for one, old in zip(
        defense.fit_many(task, ids, task.dataset.reference, seeds, trained=trained), trained, strict=True
    ):
        for name, p in one.model.named_parameters():
            mask, was = one.masks[name], old.model.get_parameter(name)
            if train == "rest":
                assert torch.equal(p[mask], one.initial[name][mask])
                assert mask.all() or not torch.equal(p[~mask], was[~mask])
            else:
                assert torch.equal(p[~mask], was[~mask])


@pytest.mark.parametrize("make", [small_task, batchnorm_task], ids=["plain", "batchnorm"])
@pytest.mark.parametrize("rate", [0.0, 1e-9])
def test_at_a_rate_of_nothing_the_base_defense_is_fine_tuned_from_the_trained_weights(make, rate):
    task, ids, seeds = make()
    loss = RelaxLoss(0.3)
    trained = PlainTraining().fit_many(task, ids, task.dataset.reference, seeds)
    base = fine_tune(task, [copy.deepcopy(one.model) for one in trained], trained, ids, seeds, loss=loss)
    options = {"loss": loss, "criterion": "magnitude"}
    for one, other, old in zip(
        CWRF(rate, **options).fit_many(task, ids, task.dataset.reference, seeds, trained=trained),
        base,
        trained,
        strict=True,
    ):
        expected = other.model.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in one.model.state_dict().items())
        assert not same(one.model, old.model)


@pytest.mark.parametrize("make", [small_task, batchnorm_task], ids=["plain", "batchnorm"])
def test_at_rate_1_parameters_are_the_initial_ones(make):
    task, ids, seeds = make()
    trained = PlainTraining().fit_many(task, ids, task.dataset.reference, seeds)
    rewound = CWRF(1.0, criterion="magnitude", epochs=0)
    for epochs in (0, 2):
        defense = CWRF(1.0, criterion="magnitude", epochs=epochs)
        for one in defense.fit_many(task, ids, task.dataset.reference, seeds, trained=trained):
            assert all(torch.equal(p, one.initial[name]) for name, p in one.model.named_parameters())
    for one, old in zip(
        rewound.fit_many(task, ids, task.dataset.reference, seeds, trained=trained), trained, strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(one.model.buffers(), old.model.buffers(), strict=True))


def test_recalibration_gives_the_mean_statistics_of_a_pass_and_leaves_the_rest():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=0.3), nn.Dropout(0.5), nn.Linear(8, 3))
    batches = [(torch.randn(10, 6) + 3, torch.zeros(10)) for _ in range(4)]
    model[3].train()
    modes = [module.training for module in model.modules()]
    before, state = copy.deepcopy(model), torch.get_rng_state()
    assert recalibrate_(model, batches) is model
    outputs = [model[0](x).detach() for x, _ in batches]
    mean = torch.stack([y.mean(dim=0) for y in outputs]).mean(dim=0)
    variance = torch.stack([y.var(dim=0) for y in outputs]).mean(dim=0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)
    assert model[1].momentum == 0.3
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert same(model, before)


def test_recalibration_comes_back_from_a_failure_and_skips_models_without_batchnorm():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    model = nn.Sequential(Fails(), nn.BatchNorm1d(8)).train()
    with pytest.raises(RuntimeError, match="no"):
        recalibrate_(model, [(torch.zeros(2, 8), None)])
    assert model[1].momentum == 0.1
    assert all(module.training for module in model.modules())
    recalibrate_(Fails(), [(torch.zeros(2, 8), None)])


@pytest.mark.filterwarnings("ignore:BatchNorm in training mode mixes")
def test_a_rewind_is_recalibrated_on_members_unless_told_otherwise():
    task, ids, seeds = batchnorm_task()
    trained = PlainTraining().fit_many(task, ids, task.dataset.reference, seeds)
    plain, recalibrated = (
        CWRF(0.3, epochs=0, recalibrate=flag).fit_many(task, ids, task.dataset.reference, seeds, trained=trained)
        for flag in (False, True)
    )
    for a, b, old in zip(plain, recalibrated, trained, strict=True):
        assert same(a.model, b.model)
        assert torch.equal(a.model[1].running_mean, old.model[1].running_mean)
        assert not torch.equal(b.model[1].running_mean, old.model[1].running_mean)
    inputs = task.dataset.inputs[ids[0]]
    hidden = recalibrated[0].model[0](inputs)
    torch.testing.assert_close(recalibrated[0].model[1].running_mean, hidden.mean(dim=0).detach(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"value": "one"}, r"value must be one of \('initial', 'zero'\); got 'one'"),
        ({"train": "all"}, r"train must be one of \('rest', 'critical'\); got 'all'"),
        ({"rounds": 0}, "rounds must be a whole number, at least 1; got 0"),
        ({"rounds": 1.5}, "rounds must be"),
        ({"rate": None}, "either rate or k must be given"),
        ({"scope": {"0.*": 0.1}}, "rate and k must not be given beside it"),
        ({"scope": {"nothing": 0.1}, "rate": None}, "'nothing' matches none"),
        ({"criterion": "gap", "points": 0}, "points must be a whole number, at least 1; got 0"),
    ],
)
def test_bad_variants_are_refused_before_anything_changes(given, message):
    model, initial, members, reference = trained_pair()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        cwrf_(model, initial, members, reference, **{"rate": 0.1} | given)
    assert same(model, before)


def test_a_mask_set_of_everything_freezes_nothing_under_the_critical_variant():
    everything = MaskSet.from_masks({name: torch.ones_like(p).bool() for name, p in network().named_parameters()})
    assert CWRF(1.0, train="critical").variant.frozen(network(), everything).total == 0


def test_masks_that_name_some_parameters_leave_the_others_where_the_variant_says():
    task, ids, seeds = batchnorm_task()
    trained = PlainTraining().fit_many(task, ids, task.dataset.reference, seeds)
    whole = [MaskSet.from_masks({"0.weight": torch.ones(8, 6, dtype=torch.bool)})] * 2
    sets = (task, ids, task.dataset.reference, seeds)
    for one, old in zip(
        CWRF(0.1, train="critical").fit_many(*sets, trained=trained, masks=whole), trained, strict=True
    ):
        moved = [name for name, p in one.model.named_parameters() if not torch.equal(p, old.model.get_parameter(name))]
        assert moved == ["0.weight"]
    for one, old in zip(CWRF(0.1, epochs=0).fit_many(*sets, trained=trained, masks=whole), trained, strict=True):
        assert not torch.equal(one.model[1].running_mean, old.model[1].running_mean)  # not all is rewound: recalibrated


@pytest.mark.parametrize("criterion", ["taylor", "gap"])
def test_batches_without_samples_are_nothing(criterion):
    model, initial, members, reference = trained_pair()
    empty = [(members[0][0][:0], members[0][1][:0])]
    options = {"rate": 0.1, "criterion": criterion, "epochs": 2, "optimizer": lambda p: torch.optim.SGD(p, 0.01)}
    expected = copy.deepcopy(model)
    wanted = cwrf_(expected, initial, members, reference, **options)
    found = cwrf_(model, initial, empty + members, empty + reference, **options)
    assert found.masks == wanted.masks
    assert all(math.isfinite(loss) for loss in found.history)
    assert found.history == pytest.approx(wanted.history, rel=0.02)  # the schedule counts batches
    with pytest.raises(ValueError, match="members must hold at least one sample"):
        cwrf_(model, initial, empty, reference, **options)
    with pytest.raises(ValueError, match="reference must hold at least one sample"):
        cwrf_(model, initial, members, empty, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CWRF(1.5), "rate must lie between 0 and 1; got 1.5"),
        (lambda: CWRF(float("nan")), "rate must lie between 0 and 1; got nan"),
        (lambda: CWRF(0.1, epochs=-1), "epochs must be a whole number, at least 0; got -1"),
        (lambda: PAST(epochs=-1), "epochs must be a whole number, at least 0; got -1"),
    ],
)
def test_settings_that_training_cannot_take_are_refused_before_it(make, message):
    with pytest.raises(ValueError, match=message):
        make()
