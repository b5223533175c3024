"""The defenses that CWRF is compared with: their formulas, by plain loops; stacked as alone; what they promise."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from test_training import blobs, ids_of, network
from torch import nn
from torch.nn import functional

from cwfast import defense as room
from cwfast.data import Dataset, load
from cwfast.defense import CRL, CWRF, HAMP, PAST, SELENA, AdvReg, HAMPOutputs, Mixup, PlainTraining, WeightDecay, parse
from cwfast.defense import selena as selena_room
from cwfast.defense.advreg import Attack, AttackNetwork
from cwfast.defense.crl import WithFeatures, bounded
from cwfast.defense.hamp import random_inputs, ranked_values
from cwfast.defense.mixup import mixed_loss
from cwfast.defense.past import sensitivity
from cwfast.defense.selena import deal
from cwfast.training import Recipe, Task, fit_from_scratch

SEEDS = [5, 6]
ALL = [
    Mixup(),
    PAST(1e-2, epochs=2),
    AdvReg(attack_steps=2, attack_lr=1e-2, width=64, initial_std=None),
    CRL(lr_centers=0.05),
    SELENA(4, 2),
    WeightDecay(0.1),
    HAMPOutputs(PlainTraining(HAMP())),
]


def task(stack=True, make=network, data=None, **recipe):
    data = data or blobs()
    data = Dataset(**{**vars(data), "inputs": data.inputs.double()})
    return Task(
        lambda: make().double(), data, Recipe(**{"lr": 0.05, "epochs": 3, "batch_size": 8, "stack": stack} | recipe)
    )


def with_norms():
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("make", [network, with_norms], ids=["mlp", "batchnorm"])
@pytest.mark.parametrize("defense", ALL, ids=lambda one: type(one).__name__)
def test_a_stacked_fleet_is_what_its_models_are_one_by_one_and_alone(defense, make):
    ids, fitted = ids_of(2), []
    for job in (task(True, make), task(False, make)):
        fitted.append(defense.fit_many(job, ids, job.dataset.reference, SEEDS))
    alone = defense.fit(task(True, make), ids[1], task().dataset.reference, SEEDS[1])
    for a, b in zip(*fitted, strict=True):
        assert a.model.state_dict().keys() == b.model.state_dict().keys() == a.initial.keys()
        for name, value in a.model.state_dict().items():
            torch.testing.assert_close(value, b.model.state_dict()[name], rtol=1e-9, atol=1e-9)
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(value, fitted[0][1].model.state_dict()[name], rtol=1e-9, atol=1e-9)
        assert torch.equal(alone.initial[name], fitted[0][1].initial[name])
    x = blobs().inputs.double()
    again = defense.fit_many(task(True, make), ids, task().dataset.reference, SEEDS)
    assert torch.equal(again[0].predict(x), fitted[0][0].predict(x))


@pytest.mark.parametrize("defense", ALL, ids=lambda one: type(one).__name__)
def test_training_moves_the_weights_and_leaves_the_rng_and_what_was_given(defense):
    job, ids = task(), ids_of(2)
    trained = PlainTraining().fit_many(job, ids, job.dataset.reference, SEEDS)
    before = [copy.deepcopy(one.model.state_dict()) for one in trained]
    state = torch.get_rng_state()
    fitted = defense.fit_many(job, ids, job.dataset.reference, SEEDS, trained=trained)
    assert torch.equal(torch.get_rng_state(), state)
    for one, old, new in zip(trained, before, fitted, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in one.model.state_dict().items())
        assert not any(torch.equal(value, old[name]) for name, value in new.model.state_dict().items())
        assert not any(module.training for module in new.model.modules())


# -- HAMP's outputs


def test_ranked_values_are_as_the_authors_loop_has_them():
    generator = np.random.default_rng(0)
    logits, values = generator.integers(0, 4, (20, 6)).astype(float), generator.normal(size=(20, 6))  # many ties
    expected = np.zeros_like(logits)
    for i, row in enumerate(logits):
        for j, value in enumerate(np.sort(row)):
            expected[i][np.where(row == value)] = np.sort(values[i])[j]
    assert np.array_equal(ranked_values(torch.tensor(logits), torch.tensor(values)).numpy(), expected)


def test_answers_keep_the_class_and_hold_nothing_else_of_the_query():
    job, ids = task(), ids_of(2)
    plain = PlainTraining(HAMP()).fit_many(job, ids, job.dataset.reference, SEEDS)
    hidden = HAMPOutputs(PlainTraining(HAMP())).fit_many(job, ids, job.dataset.reference, SEEDS)
    x = job.dataset.inputs
    for one, other, seed in zip(plain, hidden, SEEDS, strict=True):
        logits, answers = one.predict(x), other.predict(x)
        assert torch.equal(logits.argsort(dim=1), answers.argsort(dim=1))
        generator = torch.Generator().manual_seed(seed)
        drawn = one.predict(random_inputs(x[job.dataset.reference], len(x), generator))
        assert torch.equal(answers.sort(dim=1).values, drawn.sort(dim=1).values)
        assert not torch.equal(other.predict(x), answers)  # fresh for each query
        assert not answers.requires_grad


def test_cwrf_under_hamp_takes_its_scores_and_masks():
    job, ids = task(), ids_of(2)
    trained = PlainTraining().fit_many(job, ids, job.dataset.reference, SEEDS)
    inner = CWRF(0.2, loss=HAMP(), epochs=1)
    scores = inner.score(job, ids, job.dataset.reference, SEEDS, trained)
    fitted = HAMPOutputs(inner).fit_many(job, ids, job.dataset.reference, SEEDS, trained=trained, scores=scores)
    assert [one.masks for one in fitted] == inner.masks(scores)


def test_random_inputs_lie_in_the_range_of_the_reference():
    generator = torch.Generator().manual_seed(0)
    table = torch.stack([torch.tensor([0.0, 1, 1, 0]), torch.tensor([-2.0, 3, 0, 1]), torch.full((4,), 7.0)], dim=1)
    drawn = random_inputs(table, 2000, generator)
    assert set(drawn[:, 0].tolist()) == {0.0, 1.0}
    assert 0.45 < float(drawn[:, 0].mean()) < 0.55
    assert -2 <= float(drawn[:, 1].min()) < -1.95
    assert 2.95 < float(drawn[:, 1].max()) <= 3
    assert drawn[:, 1].unique().numel() > 1900
    assert set(drawn[:, 2].tolist()) == {7.0}
    images = torch.zeros(2, 2, 3, 3)
    images[0, 0, 1, 1], images[1, 1, 0, 0] = 5, -1
    pixels = random_inputs(images, 500, generator)
    assert pixels.shape == (500, 2, 3, 3)
    for channel, (low, high) in enumerate([(0, 5), (-1, 0)]):
        assert (pixels[:, channel].flatten(1).amax(0) > high - 0.2).all()  # every pixel takes the channel's whole range
        assert (pixels[:, channel].flatten(1).amin(0) < low + 0.2).all()
        assert low <= float(pixels[:, channel].min()) < float(pixels[:, channel].max()) <= high


# -- mixup


def test_mixup_is_training_on_mixtures():
    """One model, by a plain loop with the same random numbers."""
    job, ids = task(), ids_of(1)[0]
    fitted = Mixup(0.4).fit(job, ids, job.dataset.reference, 5)
    model = job.initial_model(5)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * 4)
    order, random = torch.Generator().manual_seed(5), np.random.default_rng(5)
    for _ in range(3):
        for batch in ids[torch.randperm(30, generator=order)].split(8):
            share = random.beta(0.4, 0.4)
            other = batch[torch.tensor(random.permutation(len(batch)))]
            x, y = job.dataset.inputs, job.dataset.targets
            logits = model(share * x[batch] + (1 - share) * x[other])
            optimizer.zero_grad()
            loss = share * functional.cross_entropy(logits, y[batch])
            (loss + (1 - share) * functional.cross_entropy(logits, y[other])).backward()
            optimizer.step()
            schedule.step()
    for a, b in zip(fitted.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_mixed_loss_is_each_models_own():
    logits, first = torch.randn(3, 4, 5), torch.randint(5, (3, 4))
    second, share = torch.randint(5, (3, 4)), torch.tensor([0.0, 0.3, 1.0])
    for k, value in enumerate(mixed_loss(logits, first, second, share)):
        a, b = functional.cross_entropy(logits[k], first[k]), functional.cross_entropy(logits[k], second[k])
        torch.testing.assert_close(value, share[k] * a + (1 - share[k]) * b)


# -- PAST


def test_sensitivity_equals_the_formula_by_module():
    gap = {
        "a.weight": torch.tensor([[1.0, -2.0, 0.0], [0, 0, 0]]),
        "a.bias": torch.tensor([[-1.0], [0]]),
        "b.weight": torch.tensor([[3.0, 1.0], [0.5, -0.5]]),
    }
    found = sensitivity(gap)
    assert torch.equal(found["a.weight"], torch.tensor([[1.0, 2.0, 0.0], [0, 0, 0]]))  # 4 parameters, |g| sums to 4
    assert torch.equal(found["a.bias"], torch.tensor([[1.0], [0]]))
    assert torch.equal(found["b.weight"], torch.tensor([[1.5, 0.5], [1, 1]]))


def test_past_is_tuning_with_that_penalty():
    job, ids = task(), ids_of(1)[0]
    trained = PlainTraining().fit(job, ids, job.dataset.reference, 5)
    lam, alpha = 3e-3, 1.5
    fitted = PAST(lam, alpha, epochs=2).fit(job, ids, job.dataset.reference, 5, trained=trained)
    model, x, y = copy.deepcopy(trained.model).train(), job.dataset.inputs, job.dataset.targets
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * 4)
    order, reference = torch.Generator().manual_seed(5), job.dataset.reference
    for _ in range(2):
        gap = functional.cross_entropy(model(x[reference]), y[reference])
        gap = gap - functional.cross_entropy(model(x[ids]), y[ids])
        grads = dict(
            zip(dict(model.named_parameters()), torch.autograd.grad(gap, list(model.parameters())), strict=True)
        )
        gamma = {}
        for layer in ("0", "2"):
            names = [f"{layer}.weight", f"{layer}.bias"]
            size, total = sum(grads[n].numel() for n in names), sum(float(grads[n].abs().sum()) for n in names)
            gamma |= {n: size * grads[n].abs() / total for n in names}
        for batch in ids[torch.randperm(30, generator=order)].split(8):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x[batch]), y[batch])
            penalty = sum((gamma[n] ** alpha * p.abs()).sum() for n, p in model.named_parameters())
            (loss + lam * penalty).backward()
            optimizer.step()
            schedule.step()
    for a, b in zip(fitted.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert PAST(0.0, epochs=0).fit(job, ids, reference, 5, trained=trained).initial is trained.initial


# -- AdvReg


def test_the_attack_learns_to_tell_members_and_is_frozen_in_the_classifiers_loss():
    generator = torch.Generator().manual_seed(0)
    attack = Attack(3, [1, 2], AdvReg(attack_lr=1e-3, width=256, initial_std=None), like=torch.zeros(1))
    labels = torch.randint(3, (2, 64), generator=generator)
    sharp = 4 * functional.one_hot(labels, 3) + torch.randn(2, 64, 3, generator=generator)
    logits = torch.cat([sharp[:, :32], sharp[:, 32:] * 0.1], dim=1)  # members are predicted with confidence
    for _ in range(300):
        attack.step(logits, labels)
    guesses = attack.frozen(logits.requires_grad_(), labels)
    assert guesses.shape == (2, 64)
    assert (guesses[:, :32].mean(dim=1) > 0.9).all()
    assert (guesses[:, 32:].mean(dim=1) < 0.1).all()
    for parameter in attack.parameters.values():
        parameter.grad = None
    guesses.sum().backward()
    assert logits.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in attack.parameters.values())


def test_the_attack_network_is_the_authors():
    torch.manual_seed(0)
    network = AttackNetwork(100)
    shapes = [tuple(module.weight.shape) for module in network.modules() if isinstance(module, nn.Linear)]
    assert shapes[:3] == [(1024, 100), (512, 1024), (64, 512)]
    assert shapes[3:5] == [(128, 100), (64, 128)]
    assert shapes[5:] == [(512, 128), (256, 512), (128, 256), (64, 128), (1, 64)]
    assert float(network.outputs[2].weight.detach().std()) == pytest.approx(0.01, rel=0.01)
    assert not network.outputs[2].bias.any()
    logits, labels = torch.randn(7, 100), torch.randint(100, (7,))
    signs = torch.full((7, 100), -1.0).scatter(1, labels[:, None], 1.0)
    both = torch.cat([network.outputs(logits), network.labels(signs)], dim=1)
    assert torch.equal(network(logits, labels), network.both(both)[:, 0].sigmoid())


def test_advreg_by_a_plain_loop():
    """One model: warm-up, head start of the attack, then steps in turn; all random numbers as documented."""
    job, ids = task(), ids_of(1)[0]
    defense = AdvReg(2.0, attack_steps=3, attack_lr=1e-2, width=64, initial_std=None)
    fitted = defense.fit(job, ids, job.dataset.reference, 5)
    x, y, reference = job.dataset.inputs, job.dataset.targets, job.dataset.reference
    model = job.initial_model(5)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * 4)
    order, draws = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    attack = Attack(3, [5], defense, like=x)

    def train_attack(steps):
        members = ids[torch.randint(30, (steps * 8,), generator=draws)].split(8)
        others = reference[torch.randint(15, (steps * 8,), generator=draws)].split(8)
        for member, other in zip(members, others, strict=True):
            batch = torch.cat([member, other])
            attack.step(model(x[batch]).detach()[None], y[batch][None])

    for epoch in range(3):
        if epoch == 1:
            for _ in range(5 * 4):
                train_attack(1)
        for batch in ids[torch.randperm(30, generator=order)].split(8):
            if epoch:
                train_attack(3)
            logits = model(x[batch])
            loss = functional.cross_entropy(logits, y[batch])
            if epoch:
                loss = loss + 2.0 * (attack.frozen(logits[None], y[batch][None]).mean() - 0.5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    for a, b in zip(fitted.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    plain = PlainTraining().fit(job, ids, reference, 5)
    assert (plain.model[2].weight - fitted.model[2].weight).abs().max() > 1e-3  # the attack had a say


# -- CRL

Z = [[2.0, 0.0, -1.0], [0.5, 1.0, 0.0], [0.0, 0.0, 3.0]]
F = [[1.0, -1.0], [0.5, 2.0], [0.0, 0.0]]
C = [[0.0, 1.0], [2.0, 0.0], [-1.0, -1.0]]
Y = [0, 0, 2]


def softmax(row):
    return [math.exp(z) / sum(map(math.exp, row)) for z in row]


def bound(row, t):
    return [x / (1 + t * (math.hypot(*row) + 1e-7)) for x in row]


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("target", [0.01, 9.0], ids=["above", "below"])
def test_crl_equals_its_formulas(target, epoch):
    crl = CRL(target, upper=0.4, t=0.5, alpha_c=target, upper_c=0.6, t_c=2.0)
    z, f, c = (torch.tensor(value, dtype=torch.float64) for value in (Z, F, C))
    relaxed = float(crl.relaxed_loss(z, torch.tensor(Y), epoch=epoch))
    center = float(crl.center_loss(z, f, c, torch.tensor(Y), epoch=epoch))
    log_p = [[math.log(p) for p in softmax(bound(row, 0.5))] for row in Z]
    mean = -sum(row[y] for row, y in zip(log_p, Y, strict=True)) / 3
    features, centers = [bound(row, 2.0) for row in F], [bound(row, 2.0) for row in C]
    away = [sum((a - b) ** 2 for a, b in zip(f, centers[y], strict=True)) for f, y in zip(features, Y, strict=True)]
    distance = sum(away) / 6
    if epoch == 1:
        expected = abs(mean - target), abs(distance - target)
    elif target < 1:
        expected = mean, distance
    else:
        flat = pulled = 0.0
        for row, logs, far, f, y in zip(Z, log_p, away, features, Y, strict=True):
            q = min(softmax(row)[y], 0.4)
            flat -= sum((q if k == y else (1 - q) / 2) * log for k, log in enumerate(logs)) / 3
            q = min(softmax(row)[y], 0.6)
            pulled += (q * far + (1 - q) * sum(x * x for x in f)) / 6
        expected = flat, pulled
    assert (relaxed, center) == pytest.approx(expected, rel=1e-12)


def test_crl_trains_model_and_centers():
    """By a plain loop over a model and its centers, each with an optimizer of its own."""
    job, ids, crl = task(weight_decay=0.01), ids_of(1)[0], CRL(0.9, alpha_c=0.2, lam=0.5, lr_centers=0.3)
    fitted = crl.fit(job, ids, job.dataset.reference, 5)
    x, y, model = job.dataset.inputs, job.dataset.targets, job.initial_model(5)
    centers = torch.randn(3, 8, generator=torch.Generator().manual_seed(5)).double().requires_grad_()
    options = {"momentum": 0.9, "weight_decay": 0.01}
    optimizer, own = torch.optim.SGD(model.parameters(), 0.05, **options), torch.optim.SGD([centers], 0.3, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * 4)
    order = torch.Generator().manual_seed(5)
    for epoch in range(3):
        for batch in ids[torch.randperm(30, generator=order)].split(8):
            features = model[:2](x[batch])
            logits = model[2](features)
            loss = crl.relaxed_loss(logits, y[batch], epoch=epoch)
            optimizer.zero_grad()
            own.zero_grad()
            (loss + 0.5 * crl.center_loss(logits, features, centers, y[batch], epoch=epoch)).backward()
            optimizer.step()
            own.step()
            schedule.step()
    for a, b in zip(fitted.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_features_are_what_the_last_linear_layer_reads():
    model, x = network(), torch.randn(5, 6)
    found = WithFeatures(model)(x)
    assert torch.equal(found, torch.cat([model(x), model[:2](x)], dim=1))
    assert not model[2]._forward_pre_hooks
    with pytest.raises(ValueError, match="CRL needs a model with a linear layer"):
        WithFeatures(nn.Conv1d(1, 1, 1))


def test_the_bound_is_differentiable_at_zero():
    zero = torch.zeros(2, 3, requires_grad=True)
    torch.func.vmap(lambda x: bounded(x, 2.0))(zero[None])[0].sum().backward()
    torch.testing.assert_close(zero.grad, torch.ones(2, 3), rtol=1e-6, atol=0)


# -- SELENA


@pytest.mark.parametrize(
    ("samples", "models", "left_out"), [(30, 5, 2), (33, 25, 10), (7, 10, 3), (100, 25, 10), (4, 2, 1)]
)
def test_the_deal_is_balanced(samples, models, left_out):
    found = deal(samples, models, left_out, torch.Generator().manual_seed(0))
    assert found.shape == (samples, models)
    assert (found.sum(dim=1) == left_out).all()
    counts = found.sum(dim=0)
    assert counts.max() - counts.min() <= 1


def test_each_set_of_sub_models_is_as_likely_for_each_sample():
    generator = torch.Generator().manual_seed(1)
    sets = {pair: torch.zeros(7) for pair in itertools.combinations(range(4), 2)}
    for _ in range(1200):
        for i, row in enumerate(deal(7, 4, 2, generator)):
            sets[tuple(row.nonzero()[:, 0].tolist())][i] += 1
    counts = torch.stack(list(sets.values()))
    chi2 = ((counts - 200) ** 2 / 200).sum(dim=0)  # 5 degrees of freedom for each sample: 20.5 is the 0.1% point
    assert (chi2 < 20.5).all()


def test_too_few_members_for_the_sub_models_are_refused():
    job = task()
    with pytest.raises(ValueError, match="each of 25 sub-models must see a sample; got 1 samples"):
        SELENA().fit(job, ids_of(1)[0][:1], job.dataset.reference, 5)


def test_soft_labels_come_from_sub_models_that_have_not_seen_the_sample(monkeypatch):
    job, ids, seen = task(), ids_of(1)[0], {}

    def watched(task, train_ids, seeds, **more):
        fitted = fit_from_scratch(task, train_ids, seeds, **more)
        seen.update(zip([id(one) for one in fitted], train_ids, strict=True))
        seen["fitted"] = fitted
        return fitted

    monkeypatch.setattr(selena_room, "fit_from_scratch", watched)
    soft = SELENA(5, 2).soft_labels(job, ids, 3)
    assert soft.shape == (30, 3)
    assert len(seen["fitted"]) == 5
    for i, sample in enumerate(ids):
        outside = [one for one in seen["fitted"] if sample not in seen[id(one)]]
        probabilities = torch.stack([one.predict(job.dataset.inputs[sample][None])[0].softmax(0) for one in outside])
        assert len(outside) == 2
        torch.testing.assert_close(soft[i], probabilities.mean(dim=0), rtol=1e-9, atol=1e-12)


# -- all of them


@pytest.mark.parametrize("defense", [PAST(), AdvReg(), HAMPOutputs(PlainTraining())], ids=lambda x: type(x).__name__)
def test_defenses_that_need_reference_samples_say_so(defense):
    job = task()
    with pytest.raises(ValueError, match="reference_ids must hold at least one sample"):
        defense.fit_many(job, ids_of(1), torch.empty(0, dtype=torch.int64), [1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixup(0), "alpha must be above 0"),
        (lambda: PAST(-1), "lam and alpha must be at least 0"),
        (lambda: AdvReg(-1), "alpha and warmup must be at least 0"),
        (lambda: AdvReg(attack_steps=0), "attack_steps 1"),
        (lambda: AdvReg(width=40), "width must be a multiple of 16, at least 16; got 40"),
        (lambda: CRL(-1), "alpha, alpha_c and lam must be at least 0"),
        (lambda: CRL(upper=0), "upper and upper_c must be in"),
        (lambda: CRL(t=0), "t, t_c and lr_centers must be above 0"),
        (lambda: SELENA(5, 5), "left_out must lie between 1 and sub_models - 1; got 5 of 5"),
        (lambda: WeightDecay(-1), "strength must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def loss_gap(fitted, data, ids):
    """Mean loss on the pool's other half less that on the members, and the test accuracy, over the models."""
    gaps, hits = [], []
    for one, members in zip(fitted, ids, strict=True):
        others = data.pool[~torch.isin(data.pool, members)]
        losses = [functional.cross_entropy(one.predict(data.inputs[i]), data.targets[i]) for i in (members, others)]
        gaps.append(losses[1] - losses[0])
        hits.append((one.predict(data.inputs[data.test]).argmax(1) == data.targets[data.test]).double().mean())
    return float(torch.stack(gaps).mean()), float(torch.stack(hits).mean())


@pytest.fixture(scope="module")
def on_digits():
    """Two undefended models of digits with a tenth of wrong labels, and how far members stand out."""
    data = load("digits", pool=600, reference=200, random_label_share=0.1)
    job = Task(
        lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        data,
        Recipe(lr=0.1, epochs=20, batch_size=32),
    )
    ids = [data.pool[torch.randperm(600, generator=torch.Generator().manual_seed(k))[:300]] for k in range(2)]
    trained = PlainTraining().fit_many(job, ids, data.reference, SEEDS)
    return job, ids, trained, loss_gap(trained, data, ids)


@pytest.mark.parametrize(
    "text",
    [
        "relaxloss:alpha=1",
        "hamp:reduction=batchmean",
        "ccl:alpha=0.1",
        "label-smoothing:epsilon=0.3",
        "confidence-penalty:beta=1",
        "early-stopping:epochs=4",
        "weight-decay:strength=0.02",
        "mixup",
        "past:lam=1e-3",
        "crl",
        pytest.param("advreg:alpha=1,attack_lr=1e-3,width=64,initial_std=none", marks=pytest.mark.slow),
        "selena:sub_models=5,left_out=2",
    ],
)
def test_on_digits_members_stand_out_less_and_accuracy_survives(on_digits, text):
    job, ids, trained, (gap, accuracy) = on_digits
    fitted = parse(text).fit_many(job, ids, job.dataset.reference, SEEDS, trained=trained)
    defended, still = loss_gap(fitted, job.dataset, ids)
    assert defended < 0.95 * gap
    assert still > accuracy - 0.1


def test_every_defense_and_loss_is_public():
    for name in ("AdvReg", "CRL", "HAMP", "HAMPOutputs", "Mixup", "PAST", "SELENA", "WeightDecay", "parse"):
        assert name in room.__all__
        assert getattr(room, name)
