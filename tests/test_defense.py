"""Losses, gap, vulnerability estimation and CWRF against hand-made and plain versions."""

import copy
import math
import re

import pytest
import torch
from test_training import blobs, ids_of, network
from torch import nn
from torch.nn import functional

from cwfast import select
from cwfast.data import Batches
from cwfast.defense import (
    CWRF,
    EarlyStopping,
    PlainTraining,
    RelaxLoss,
    critical_masks,
    cwrf_,
    gap_shares,
    vulnerability,
)
from cwfast.defense.baselines import interpolated, tau_at_distance
from cwfast.training import Recipe, Task

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 2])


def by_hand(alpha, upper, epoch):
    """RelaxLoss, one number after the other."""
    p = [[math.exp(z) / sum(math.exp(q) for q in row) for z in row] for row in LOGITS.tolist()]
    losses = [-math.log(row[y]) for row, y in zip(p, LABELS.tolist(), strict=True)]
    mean = sum(losses) / 3
    if epoch % 2 == 0:
        return abs(mean - alpha)
    if mean > alpha:
        return mean
    total = 0.0
    for row, y, loss in zip(p, LABELS.tolist(), losses, strict=True):
        q = min(max(row[y], 0), upper)
        soft = [q if c == y else (1 - q) / 2 for c in range(3)]
        wrong = row.index(max(row)) != y
        total += wrong * -sum(t * math.log(x) for t, x in zip(soft, row, strict=True)) - loss
    return total / 3


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
@pytest.mark.parametrize(("alpha", "upper"), [(0.1, 1.0), (5.0, 1.0), (5.0, 0.3)])
def test_relaxloss_equals_the_formula(alpha, upper, epoch):
    value = RelaxLoss(alpha, upper)(LOGITS, LABELS, epoch=epoch)
    assert float(value) == pytest.approx(by_hand(alpha, upper, epoch), rel=1e-12)


def test_relaxloss_branches_per_model_of_a_fleet():
    stack, labels = torch.stack([LOGITS, 10 * LOGITS]), torch.stack([LABELS, LABELS])
    loss = RelaxLoss(0.6)
    together = torch.func.vmap(lambda z, y: loss(z, y, epoch=1))(stack, labels)
    alone = torch.stack([loss(z, y, epoch=1) for z, y in zip(stack, labels, strict=True)])
    assert torch.equal(together, alone)
    means = [functional.cross_entropy(z, y) for z, y in zip(stack, labels, strict=True)]
    assert (means[0] > 0.6) != (means[1] > 0.6)  # the two models do take different branches


@pytest.mark.parametrize("bad", [{"alpha": -1}, {"alpha": 1, "upper": 0}, {"alpha": 1, "upper": 1.5}])
def test_relaxloss_refuses_bad_values(bad):
    with pytest.raises(ValueError, match="alpha must be"):
        RelaxLoss(**bad)


def trained_pair(seed=0, dtype=torch.float64):
    """A trained model, its initial one, and member and reference batches."""
    data = blobs()
    task = Task(network, data, Recipe(epochs=20, batch_size=8))
    fitted = PlainTraining().fit(task, ids_of(1)[0], data.reference, seed)
    initial = copy.deepcopy(fitted.model)
    initial.load_state_dict(fitted.initial)
    members = [(x.to(dtype), y) for x, y in Batches(data, ids_of(1)[0], 8, seed, wrap=True)]
    reference = [(x.to(dtype), y) for x, y in Batches(data, data.reference, 8, seed, wrap=True)]
    return fitted.model.to(dtype), initial.to(dtype), members, reference


def mean_loss(model, batches):
    losses = [functional.cross_entropy(model(x), y, reduction="none") for x, y in batches]
    return float(torch.cat(losses).mean().detach())


def test_gap_shares_sum_to_the_gap_up_to_the_quadrature():
    model, initial, members, reference = trained_pair()
    wanted = mean_loss(model, reference) - mean_loss(model, members)
    wanted -= mean_loss(initial, reference) - mean_loss(initial, members)
    errors = [
        abs(sum(float(s.sum()) for s in gap_shares(model, initial, members, reference, points=n).values()) - wanted)
        for n in (3, 30, 300)
    ]
    assert errors[1] < errors[0] / 20  # the midpoint rule is of second order
    assert errors[2] < errors[1] / 20
    assert errors[2] < 1e-4 * abs(wanted)


def test_gap_shares_equal_the_plain_formula_and_leave_the_model():
    model, initial, members, reference = trained_pair()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    shares = gap_shares(model.train(), dict(initial.named_parameters()), members, reference, points=2)
    expected = {name: torch.zeros_like(p) for name, p in before.items()}
    start = dict(initial.named_parameters())
    for t in (0.25, 0.75):
        at = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in at.named_parameters():
                p.copy_(start[name] + t * (before[name] - start[name]))
        for batches, sign in ((reference, 1), (members, -1)):
            x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
            grads = torch.autograd.grad(functional.cross_entropy(at(x), y), list(at.parameters()))
            for name, g in zip(before, grads, strict=True):
                expected[name] += sign * (before[name] - start[name]).detach() * g / 2
    for name, share in shares.items():
        torch.testing.assert_close(share, expected[name], rtol=1e-9, atol=1e-12)
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("given", "message"), [({"points": 0}, "points"), ({"members": []}, "members"), ({"reference": []}, "reference")]
)
def test_gap_refuses_empty_sets(given, message):
    model, initial, members, reference = trained_pair()
    with pytest.raises(ValueError, match=message):
        gap_shares(**{"model": model, "initial": initial, "members": members, "reference": reference} | given)


def plain_vulnerability(model, initial, members, reference, granularity, lam, lr, update):
    """The estimate with one backward pass per sample."""
    work = copy.deepcopy(model).train()
    scores = {name: torch.zeros_like(p) for name, p in work.named_parameters()}
    optimizer = torch.optim.SGD(work.parameters(), lr)
    for (x, y), (r, _) in zip(members, [reference[i % len(reference)] for i in range(len(members))], strict=True):
        parameters = list(work.parameters())

        def loss_of(x, y, r):
            wanted = functional.log_softmax(initial(r), dim=1).detach()
            kl = (wanted.exp() * (wanted - functional.log_softmax(work(r), dim=1))).sum(dim=1).sum()
            return (1 - lam) * functional.cross_entropy(work(x), y, reduction="sum"), lam * kl

        if granularity == "sample":
            losses = [loss_of(x[i : i + 1], y[i : i + 1], r[:1])[0] for i in range(len(x))]
            losses += [loss_of(x[:1], y[:1], r[i : i + 1])[1] for i in range(len(r))]
        else:
            a, b = loss_of(x, y, r)
            losses = [a / len(x) + b / len(r)]
        for loss in losses:
            for (name, p), g in zip(
                work.named_parameters(), torch.autograd.grad(loss, parameters, retain_graph=True), strict=True
            ):
                scores[name] += (g * p.detach()).abs()
        if update:
            optimizer.zero_grad()
            a, b = loss_of(x, y, r)
            (a / len(x) + b / len(r)).backward()
            optimizer.step()
    return scores


@pytest.mark.parametrize("update", [True, False], ids=["update", "fixed"])
@pytest.mark.parametrize("granularity", ["sample", "batch"])
def test_vulnerability_equals_the_plain_estimate(granularity, update):
    model, initial, members, reference = trained_pair()
    options = {"granularity": granularity, "lam": 0.3, "lr": 0.05, "update": update}
    found = vulnerability(model, initial, members, reference, **options)
    expected = plain_vulnerability(model, initial, members, reference, **options)
    for name, score in found.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-9, atol=1e-12)


def test_vulnerability_leaves_model_mode_and_rng():
    model, initial, members, reference = trained_pair()
    before, state = copy.deepcopy(model.eval().state_dict()), torch.get_rng_state()
    vulnerability(model, initial, members, reference, steps=3)
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lam": 1.5}, "lam"),
        ({"steps": 0}, "steps"),
        ({"members": []}, "members"),
        ({"reference": []}, "reference"),
        ({"initial": {}}, "initial"),
    ],
)
def test_vulnerability_refuses(given, message):
    model, initial, members, reference = trained_pair()
    with pytest.raises(ValueError, match=message):
        vulnerability(**{"model": model, "initial": initial, "members": members, "reference": reference} | given)


def test_rate_0_changes_nothing_and_rate_1_gives_the_initial_model():
    model, initial, members, reference = trained_pair(dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    cwrf_(model, initial, members, reference, rate=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    cwrf_(model, initial, members, reference, rate=1, epochs=2)  # all frozen: fine-tuning moves nothing
    assert all(torch.equal(value, initial.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("criterion", ["taylor", "taylor_delta", "grad", "fisher", "gap"])
def test_cwrf_rewinds_exactly_the_selected_weights_and_trains_the_others(criterion):
    model, initial, members, reference = trained_pair(dtype=torch.float32)
    trained = copy.deepcopy(model)
    result = cwrf_(copy.deepcopy(model), initial, members, reference, rate=0.1, criterion=criterion)
    assert result.masks.total == math.floor(0.1 * result.masks.numel)
    assert result.masks == select(result.scores, rate=0.1)
    model.train()
    tuned = cwrf_(model, initial, members, reference, rate=0.1, criterion=criterion, epochs=2, loss=RelaxLoss(0.2))
    assert tuned.masks == result.masks
    assert len(tuned.history) == 2
    start, end = dict(initial.named_parameters()), dict(trained.named_parameters())
    for name, p in model.named_parameters():
        mask = tuned.masks[name]
        assert torch.equal(p[mask], start[name][mask]), name
        assert not torch.equal(p[~mask], end[name][~mask]), name


class NoLength:
    """As a DataLoader of a stream."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("kind", [list, NoLength])
def test_fine_tuning_follows_the_cosine_of_a_recipe_over_all_batches(kind):
    model, initial, members, reference = trained_pair(dtype=torch.float32)
    members, rates = kind(list(members)), []

    def optimizer(parameters):
        found = torch.optim.SGD(parameters, 0.1)
        found.register_step_pre_hook(lambda *_: rates.append(found.param_groups[0]["lr"]))
        return found

    cwrf_(model, initial, members, reference, rate=0.1, epochs=3, optimizer=optimizer)
    total = 3 * len(list(members))
    assert total > 3
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * step / total)) for step in range(total)])


def test_gap_refuses_to_rewind_weights_that_narrow_the_gap():
    model, initial, members, reference = trained_pair()
    shares = gap_shares(model, initial, members, reference)
    positive = sum(int((s > 0).sum()) for s in shares.values())
    numel = sum(s.numel() for s in shares.values())
    with pytest.raises(ValueError, match=r"rate must be at most [0-9.]+ here") as refused:
        cwrf_(model, initial, members, reference, rate=1.0, criterion="gap")
    largest = float(re.search(r"at most ([0-9.]+) here", str(refused.value))[1])
    assert positive / numel - 1e-9 < largest <= positive / numel
    clamped = {name: s.clamp(min=0) for name, s in shares.items()}
    assert critical_masks(clamped, largest, criterion="gap").zero_score_selected == 0


def test_the_limit_of_gap_counts_as_select_does():
    score = torch.zeros(100)
    score[:28] = 1  # 0.29 * 100 is 28.999999999999996 in floating point
    with pytest.raises(ValueError, match=r"rate must be at most 0\.28 here"):
        critical_masks({"w": score}, 0.29, criterion="gap")
    assert critical_masks({"w": score}, 0.28, criterion="gap").total == 28


@pytest.mark.parametrize("criterion", ["taylor", "gap"])
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"epochs": 1.5}, ValueError, "epochs must be a whole number"),
        ({"epochs": -1}, ValueError, "epochs must be a whole number"),
        ({"lr": -1.0, "epochs": 1}, ValueError, "learning rate"),
        ({"optimizer": 3}, TypeError, "optimizer must be called"),
        ({"rate": 1.5}, ValueError, "rate must lie between 0 and 1"),
        ({"members": "generator"}, TypeError, "members must be iterable more than once"),
        ({"reference": "generator"}, TypeError, "reference must be iterable more than once"),
        ({"initial": "own"}, ValueError, "the model's own memory"),
    ],
)
def test_cwrf_refuses_before_it_changes_anything(criterion, given, error, message):
    model, initial, members, reference = trained_pair()
    before = copy.deepcopy(model.state_dict())
    sets = {"members": members, "reference": reference, "initial": initial}
    for name, value in given.items():
        if value == "generator":
            sets[name] = (batch for batch in sets[name])
        if value == "own":
            sets[name] = model.state_dict()
    options = {"rate": 0.1} | {name: value for name, value in given.items() if name not in sets}
    with pytest.raises(error, match=message):
        cwrf_(model, **sets, criterion=criterion, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_cwrf_fine_tunes_in_training_mode_and_gives_the_mode_back():
    model, initial, members, reference = trained_pair()
    model.eval()
    modes = []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training) if module is model else None)
    cwrf_(model, initial, members, reference, rate=0.1, epochs=1, steps=1)
    assert modes
    assert all(modes)
    assert not model.training


def test_unknown_criterion_names_the_known_ones():
    with pytest.raises(ValueError, match=r"taylor.*gap"):
        CWRF(0.1, criterion="magic")


def small_task():
    data = blobs()
    return Task(network, data, Recipe(epochs=6, batch_size=8)), ids_of(3), [1, 2, 3]


def test_the_fleet_defense_equals_the_single_one_before_fine_tuning():
    task, ids, seeds = small_task()
    trained = PlainTraining().fit_many(task, ids, task.dataset.reference, seeds)
    defense = CWRF(0.2, criterion="taylor", epochs=0)
    fleet = defense.fit_many(task, ids, task.dataset.reference, seeds, trained=trained)
    again = defense.fit_many(
        task,
        ids,
        task.dataset.reference,
        seeds,
        scores=defense.score(task, ids, task.dataset.reference, seeds, trained),
        trained=trained,
    )
    for k, one in enumerate(fleet):
        alone = defense.fit(task, ids[k], task.dataset.reference, seeds[k], trained=trained[k])
        assert one.masks == alone.masks == again[k].masks
        for a, b in zip(one.model.parameters(), alone.model.parameters(), strict=True):
            assert torch.equal(a, b)
        for name, p in one.model.named_parameters():
            assert torch.equal(p[one.masks[name]], one.initial[name][one.masks[name]])
            assert torch.equal(p[~one.masks[name]], dict(trained[k].model.named_parameters())[name][~one.masks[name]])


def test_fine_tuning_takes_half_the_epochs_and_keeps_rewound_weights():
    task, ids, seeds = small_task()
    fitted = CWRF(0.2, criterion="gap", loss=RelaxLoss(0.3)).fit_many(task, ids, task.dataset.reference, seeds)
    for one in fitted:
        for name, p in one.model.named_parameters():
            assert torch.equal(p[one.masks[name]], one.initial[name][one.masks[name]])


def test_early_stopping_is_the_same_run_cut_short():
    task, ids, seeds = small_task()
    whole = PlainTraining().fit_many(task, ids, task.dataset.reference, seeds)
    last = EarlyStopping(6).fit_many(task, ids, task.dataset.reference, seeds)
    early = EarlyStopping(2).fit_many(task, ids, task.dataset.reference, seeds)
    assert torch.equal(whole[0].model[0].weight, last[0].model[0].weight)
    assert not torch.equal(whole[0].model[0].weight, early[0].model[0].weight)
    with pytest.raises(ValueError, match="epochs"):
        EarlyStopping(7).fit_many(task, ids, task.dataset.reference, seeds)


NOTHING = []  # a model without BatchNorm needs no samples


def test_interpolation_ends_and_distance():
    task, ids, seeds = small_task()
    fitted = PlainTraining().fit(task, ids[0], task.dataset.reference, seeds[0])
    assert torch.equal(interpolated(fitted, 1.0, NOTHING)[0].weight, fitted.model[0].weight)
    assert torch.equal(interpolated(fitted, 0.0, NOTHING)[0].weight, fitted.initial["0.weight"])
    assert tau_at_distance(fitted, interpolated(fitted, 0.37, NOTHING)) == pytest.approx(0.37, abs=1e-5)
    assert tau_at_distance(fitted, fitted.model) == 1.0


class NoMembers(nn.Module):
    """Fails when it is called: nothing may be computed for a request that is refused."""

    def forward(self, x):
        raise AssertionError("called")


def test_bad_criterion_is_refused_before_any_work():
    with pytest.raises(ValueError, match="criterion"):
        cwrf_(NoMembers(), {}, [], [], rate=0.1, criterion="magic")
