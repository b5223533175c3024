"""Attacks against a plain loop over samples, against the pairwise definition, and on data with a planted answer."""

import functools
import math

import numpy as np
import pytest
import torch

from cwfast.mia import attack_p, lira, loss, metrics, rmia

FITS = ("shrinkage median", "per_example median", "per_example mean", "fixed median", "fixed mean")
LIRA = [
    dict(zip(("mode", "variance", "center"), (mode, *fit.split()), strict=True))
    for mode in ("online", "offline")
    for fit in FITS
]


def name(options):
    return "-".join(str(value) for value in options.values())


def balanced(rng, models, samples):
    """Each sample in exactly half of the models."""
    return np.argsort(rng.random((models, samples)), axis=0) < models // 2


def halves(rng, models, samples):
    """Pairs of models trained on complementary halves; with an odd number, the last is a half without its other."""
    first = np.argsort(rng.random((-(-models // 2), samples)), axis=1) < samples // 2
    return np.stack([first, ~first], axis=1).reshape(-1, samples)[:models]


def uneven(rng, models, samples, least=2):
    """Each sample in another number of models, from ``least`` IN to ``least`` OUT besides any target."""
    counts = 1 + least + np.arange(samples) % (models - 2 * least - 1)
    return np.argsort(rng.random((models, samples)), axis=0) < counts


def signals(rng, member, queries=None, shift=1.0):
    """phi with a level, a spread and a gain per sample; log-probability of the same."""
    models, samples = member.shape
    noise = rng.normal(size=(models, samples, queries or 1)) * np.exp(rng.normal(0, 0.5, samples))[:, None]
    gain = shift * rng.gamma(1.0, 1.0, samples)
    phi = rng.normal(0, 2, samples)[:, None] + noise + (member * gain)[..., None]
    phi = phi if queries else phi[..., 0]
    return phi, -np.logaddexp(0, -phi)


def shadows(member, target, i):
    """IN and OUT models of sample i, by the rule in words: maybe without one more of the other side."""
    models = len(member)
    others = [k for k in range(models) if k != target]
    counts = {True: [], False: []}
    for column in member.T:
        if 0 < column.sum() < models:
            counts[bool(column[target])].append(column[others].sum())
    if (
        0 < member[:, i].sum() < models
        and all(counts.values())
        and np.mean(counts[True]) + 0.5 < np.mean(counts[False])
    ):
        mixed = (member.sum(axis=0) > 0) & (member.sum(axis=0) < models)
        after = [(target + step) % models for step in range(1, models)]
        after.sort(key=lambda k: not (member[k, mixed] != member[target, mixed]).all())  # a complement comes first
        others.remove(next(k for k in after if member[k, i] != member[target, i]))
    return [k for k in others if member[k, i]], [k for k in others if not member[k, i]]


def plain_lira(phi, member, target, mode, variance, center):
    """One sample and one query after the other."""
    phi = phi if phi.ndim == 3 else phi[..., None]
    _, samples, queries = phi.shape
    sides = [shadows(member, target, i) for i in range(samples)]
    scores = np.zeros(samples)
    for q in range(queries):
        fits = []
        for side in (0, 1):
            groups = [phi[sides[i][side], i, q] for i in range(samples)]
            if variance == "shrinkage":
                several = [group for group in groups if len(group) > 1]
                spread = np.array([group.var(ddof=1) for group in several])
                noise = np.mean([2 / (len(group) - 1) for group in several])
                expected = spread.mean()
                true = max((spread.var() - expected**2 * noise) / (1 + noise), 1e-3 * expected**2)
                alpha = 2 + expected**2 / true
                fits.append((groups, (alpha, expected * (alpha - 1), np.mean([group.mean() for group in groups]))))
            else:
                pooled = np.concatenate(
                    [phi[sides[i][0 if mode == "online" else 1], i].ravel() for i in range(samples)]
                )
                fits.append((groups, pooled.std()))
        for i in range(samples):
            x, log_density = phi[target, i, q], []
            for groups, fit in fits:
                group = groups[i]
                n = len(group)
                if variance == "shrinkage":
                    alpha, beta, m0 = fit
                    k = 0.1 + n
                    at = (0.1 * m0 + group.sum()) / k
                    a = alpha + n / 2
                    b = beta + ((group - group.mean()) ** 2).sum() / 2 + 0.1 * n * (group.mean() - m0) ** 2 / (2 * k)
                    z = (x - at) / math.sqrt(b * (k + 1) / (a * k))
                    norm = math.lgamma(a + 0.5) - math.lgamma(a) - 0.5 * math.log(2 * math.pi * b * (k + 1) / k)
                    log_density.append(norm - (a + 0.5) * math.log1p(z * z / (2 * a)))
                else:
                    at = np.median(group) if center == "median" else group.mean()
                    deviation = 1e-30 + (
                        fit if variance == "fixed" else (group - group[0]).std()
                    )  # exactly 0 of equals
                    z = (x - at) / deviation
                    log_density.append(-math.log(deviation) - z * z / 2)
            scores[i] += (log_density[0] - log_density[1] if mode == "online" else z) / queries
    return scores


@pytest.mark.parametrize("split", [balanced, halves, uneven])
@pytest.mark.parametrize("options", LIRA, ids=name)
def test_lira_is_the_plain_loop(options, split):
    rng = np.random.default_rng(1)
    one_is_enough = split is uneven and options["variance"] != "per_example"
    member = uneven(rng, 9, 24, least=1) if one_is_enough else split(rng, 9, 24)
    phi, _ = signals(rng, member, queries=2)
    every = lira(phi, member, **options)
    assert every.shape == member.shape
    assert every.dtype == np.float64
    for target in (0, 4, 8):
        expected = plain_lira(phi, member, target, **options)
        np.testing.assert_allclose(every[target], expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(lira(phi, member, target, **options), every[target])


def test_lira_with_models_that_agree():
    """No spread at all: finite scores, of the right sign."""
    member = np.tile(np.arange(6)[:, None] < 3, (1, 8)) ^ (np.arange(8) % 2 == 0)
    phi = np.where(member, 2.0, 1.0)
    for options in LIRA:
        if options["variance"] != "fixed" or options["mode"] == "offline":
            scores = lira(phi, member, **options)
            assert np.isfinite(scores).all()
            assert metrics.auc(scores.ravel(), member.ravel()) == 1


# --------------------------------------------------------------------------------------------------------- rmia


def plain_rmia(logprob, member, target, population, mode, gamma, a):
    """The matrix of all pairs (x, z)."""
    logprob = logprob if logprob.ndim == 3 else logprob[..., None]
    _, samples, queries = logprob.shape
    ratio = np.zeros(samples)
    for i in range(samples):
        inside, outside = shadows(member, target, i)
        for q in range(queries):
            p = np.exp(logprob[:, i, q])
            typical = p[inside + outside].mean() if mode == "online" else ((1 + a) * p[outside].mean() + 1 - a) / 2
            ratio[i] += (logprob[target, i, q] - math.log(typical)) / queries
    crowd = [z for z in (range(samples) if population is None else population) if not member[target, z]]
    beats = ratio[:, None] - math.log(gamma) > ratio[None, :]
    return np.array([np.mean([beats[i, z] for z in crowd]) for i in range(samples)])


@pytest.mark.parametrize("split", [balanced, halves, uneven])
@pytest.mark.parametrize("population", [None, np.arange(39, 0, -2)])
@pytest.mark.parametrize(
    ("mode", "gamma", "a"), [("online", 2.0, 0.3), ("online", 0.7, 0.3), ("offline", 1.0, 0.3), ("offline", 2.0, 1.0)]
)
def test_rmia_is_the_pairwise_matrix(split, population, mode, gamma, a):
    rng = np.random.default_rng(4)
    member = split(rng, 8, 40)
    _, logprob = signals(rng, member, queries=3)
    options = {"population": population, "mode": mode, "gamma": gamma, "a": a}
    every = rmia(logprob, member, **options)
    for target in range(8):
        np.testing.assert_array_equal(every[target], plain_rmia(logprob, member, target, **options))
        np.testing.assert_array_equal(rmia(logprob, member, target, **options), every[target])


def test_rmia_ties_and_self_comparison():
    """All ratios equal: nobody beats anybody at gamma 1, everybody beats everybody below 1."""
    member = balanced(np.random.default_rng(0), 6, 20)
    logprob = np.full((6, 20), -0.5)
    assert (rmia(logprob, member, gamma=1.0) == 0).all()
    assert (rmia(logprob, member, gamma=0.5) == 1).all()


@pytest.mark.parametrize(
    "attack",
    [
        rmia,
        functools.partial(rmia, gamma=0.9),
        functools.partial(rmia, mode="offline"),
        functools.partial(rmia, vote="majority"),
        attack_p,
    ],
)
@pytest.mark.parametrize("queries", [None, 3])
def test_equal_samples_get_equal_scores_whoever_is_a_member(attack, queries):
    """Four fifths are as sure as can be under every model: they say nothing, and no divisor may say it for them."""
    rng = np.random.default_rng(9)
    member = balanced(rng, 8, 200)
    logprob = -rng.exponential(2, (8, 200) if queries is None else (8, 200, queries))
    logprob[:, 40:] = 0
    for row, members in zip(attack(logprob, member), member, strict=True):
        assert 0 < members[40:].sum() < 160
        assert np.unique(row[40:]).size == 1


def test_rmia_in_log_space():
    """Probabilities of whole texts underflow; a common factor in all of them changes nothing."""
    rng = np.random.default_rng(5)
    member = balanced(rng, 8, 50)
    _, logprob = signals(rng, member)
    logprob = np.round(logprob * 2**20) / 2**20  # so that adding the shift is exact
    np.testing.assert_array_equal(rmia(logprob - 4096.0, member), rmia(logprob, member))


def test_rmia_population_without_models():
    """Samples that no model saw may serve as the population, and do not make the rest any less balanced."""
    rng = np.random.default_rng(6)
    member = np.concatenate([balanced(rng, 8, 30), np.zeros((8, 20), bool)], axis=1)
    _, logprob = signals(rng, member)
    for mode in ("online", "offline"):
        options = {"population": np.arange(30, 50), "mode": mode, "gamma": 2.0, "a": 0.3}
        np.testing.assert_array_equal(rmia(logprob, member, 2, **options), plain_rmia(logprob, member, 2, **options))


# ------------------------------------------------------------------------------------------- what all attacks share


def every_attack(phi, logprob, member):
    scores = {f"lira-{name(options)}": lira(phi, member, **options) for options in LIRA}
    scores |= {f"rmia-{mode}": rmia(logprob, member, mode=mode) for mode in ("online", "offline")}
    return scores | {"loss": loss(logprob, member)}


def test_planted_overfit_model():
    """Members are easy, non-members are not: every attack sees it, and with the right sign."""
    rng = np.random.default_rng(7)
    member = balanced(rng, 16, 400)
    phi = rng.normal(0, 0.3, 400) + rng.normal(size=(16, 400)) + 4.0 * member
    for attack, scores in every_attack(phi, -np.logaddexp(0, -phi), member).items():
        rows = [metrics.auc(*row) for row in zip(scores, member, strict=True)]
        assert min(rows) > 0.9, attack


@pytest.mark.parametrize("models", [8, 16])
def test_nothing_to_find(models):
    """Signals that do not depend on membership: AUC 0.5, although a balanced split betrays the target by counts."""
    rng = np.random.default_rng(8)
    member = balanced(rng, models, 3000)
    phi, logprob = signals(rng, member, shift=0.0)
    for attack, scores in every_attack(phi, logprob, member).items():
        rows = [metrics.auc(*row) for row in zip(scores, member, strict=True)]
        sigma = 1 / math.sqrt(3 * 3000)  # of one AUC, with half of the samples members
        assert max(abs(row - 0.5) for row in rows) < 4 * sigma, attack
        assert abs(np.mean(rows) - 0.5) < 4 * sigma / math.sqrt(models), attack
    member[:3, 0], member[3:, 0] = True, False  # one sample out of balance frees no other
    rows = [metrics.auc(*row) for row in zip(lira(phi, member), member, strict=True)]
    assert abs(np.mean(rows) - 0.5) < 4 * sigma / math.sqrt(models)


def test_nothing_to_find_where_models_differ_in_general():
    """Each model's signals are shifted as a whole: a target's complement in one side's statistics would betray it."""
    rng = np.random.default_rng(8)
    member = halves(rng, 8, 3000)
    phi, _ = signals(rng, member, shift=0.0)
    phi += rng.normal(size=(8, 1))
    for attack, scores in every_attack(phi, -np.logaddexp(0, -phi), member).items():
        rows = [metrics.auc(*row) for row in zip(scores, member, strict=True)]
        assert max(abs(row - 0.5) for row in rows) < 4 / math.sqrt(3 * 3000), attack


@pytest.mark.parametrize("split", ["coins", "balanced shadows"])
def test_nothing_to_find_in_a_target_drawn_apart(split):
    """The others' counts tell nothing of the target and are used as they are."""
    rng = np.random.default_rng(8)
    member = rng.random((9, 4000)) < 0.5
    if split == "balanced shadows":
        member[1:] = balanced(rng, 8, 4000)
    counts = member[1:].sum(axis=0)
    member = member[:, (counts > 1) & (counts < 7)]
    phi, logprob = signals(rng, member, shift=0.0)
    all_scores = [lira(phi, member, 0, **options) for options in LIRA] + [rmia(logprob, member, 0)]
    for scores in all_scores:
        assert abs(metrics.auc(scores, member[0]) - 0.5) < 4 / math.sqrt(3 * len(member[0]))


def test_counts_betray(monkeypatch):
    """The control of the tests above: with all other models, a balanced split gives AUC far from 0.5."""
    rng = np.random.default_rng(9)
    member = balanced(rng, 8, 3000)
    phi, _ = signals(rng, member, shift=0.0)
    alone = np.broadcast_to(np.arange(8)[:, None], member.shape)  # no next model: nothing more is left out
    monkeypatch.setattr("cwfast.mia._shadows._next_of_other_side", lambda member: alone)
    assert metrics.auc(lira(phi, member, 0), member[0]) < 0.47


@pytest.mark.parametrize("options", [*LIRA, {"mode": "online"}, {"mode": "offline"}], ids=name)
def test_own_row_is_in_no_statistic(options):
    rng = np.random.default_rng(10)
    member = balanced(rng, 8, 40)
    signal = signals(rng, member)[1]
    at = int(np.flatnonzero(member[3])[0])  # of a member, which is no part of RMIA's population either
    attack = lira if "variance" in options else rmia
    before = attack(signal, member, 3, **options)
    signal[3, at] -= 3.0
    changed = np.flatnonzero(before != attack(signal, member, 3, **options))
    assert changed.tolist() == [at]


def test_larger_means_member():
    """Raising the target's signal of one sample never lowers its score by one-sided attacks."""
    rng = np.random.default_rng(12)
    member = balanced(rng, 8, 60)
    phi, _ = signals(rng, member)
    high = phi.copy()
    high[0, 5] += 2.0
    logprob, high_logprob = -np.logaddexp(0, -phi), -np.logaddexp(0, -high)
    for variance in ("shrinkage", "per_example", "fixed"):
        options = {"mode": "offline", "variance": variance}
        assert lira(high, member, 0, **options)[5] > lira(phi, member, 0, **options)[5]
    assert loss(high_logprob, target=0)[5] > loss(logprob, target=0)[5]
    for mode in ("online", "offline"):
        assert rmia(high_logprob, member, 0, mode=mode)[5] >= rmia(logprob, member, 0, mode=mode)[5]


def test_shrinkage_tends_to_per_example():
    rng = np.random.default_rng(13)
    gaps = []
    for models in (16, 128, 1024):
        member = balanced(rng, models, 60)
        phi, _ = signals(rng, member)
        pair = [
            lira(phi, member, 0, variance=variance, center="mean", mode="offline")
            for variance in ("shrinkage", "per_example")
        ]
        gaps.append(np.abs(pair[0] - pair[1]).mean())
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]
    assert gaps[2] < 0.02


def test_shrinkage_helps_with_few_models():
    """8 models, per-sample spread: more members found at a low false-positive rate, and a larger AUC."""
    rng = np.random.default_rng(14)
    member = balanced(rng, 8, 8000)
    phi, _ = signals(rng, member, shift=1.5)
    found, area = {}, {}
    for variance in ("shrinkage", "per_example", "fixed"):
        rows = list(zip(lira(phi, member, variance=variance), member, strict=True))
        found[variance] = np.mean([metrics.tpr_at_fpr(*row, 1e-3).tpr for row in rows])
        area[variance] = np.mean([metrics.auc(*row) for row in rows])
    assert found["shrinkage"] > 1.3 * max(found["per_example"], found["fixed"])
    assert area["shrinkage"] > max(area["per_example"], area["fixed"])


def test_loss():
    rng = np.random.default_rng(15)
    member = balanced(rng, 4, 9)
    _, logprob = signals(rng, member, queries=3)
    np.testing.assert_allclose(loss(logprob), logprob.mean(axis=2), rtol=1e-15)
    np.testing.assert_array_equal(loss(logprob, member, 2), loss(logprob)[2])
    np.testing.assert_array_equal(loss(logprob[..., 0]), logprob[..., 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tensors(dtype):
    rng = np.random.default_rng(16)
    member = balanced(rng, 8, 30)
    phi = torch.from_numpy(signals(rng, member)[0]).to(dtype).requires_grad_()
    logprob = torch.nn.functional.logsigmoid(phi)
    flags = torch.from_numpy(member)
    same = [x.detach().double().numpy() for x in (phi, logprob)]
    np.testing.assert_array_equal(lira(phi, flags), lira(same[0], member))
    population = torch.arange(20)
    expected = rmia(same[1], member, population=np.arange(20))
    np.testing.assert_array_equal(rmia(logprob, flags, population=population), expected)
    np.testing.assert_array_equal(loss(logprob, flags, np.int64(1)), loss(same[1])[1])


# --------------------------------------------------------------------------------------------------- wrong inputs
