"""Attacks besides LiRA and RMIA's sorted form, each against a plain loop over samples in float64."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from test_attacks import balanced, halves, shadows, signals, uneven

from cwfast.mia import (
    _shadows,
    attack_p,
    attack_r,
    attacks,
    base,
    calibrated_loss,
    class_thresholds,
    correctness,
    gradient_norm,
    lira,
    lira_carlini,
    metrics,
    quantile_regression,
    rmia,
)

SPLITS = [balanced, halves, uneven]


def setting(split, queries=3, models=9, samples=30, seed=1):
    rng = np.random.default_rng(seed)
    member = split(rng, models, samples)
    phi, logprob = signals(rng, member, queries=queries)
    return member, phi, logprob


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_lira_carlini_is_the_published_code(split, fixed, mode):
    """Their loop, line for line: lists per sample cut to the shortest, scipy's logpdf, sign flipped."""
    norm = pytest.importorskip("scipy.stats").norm
    member, phi, _ = setting(split)
    every = lira_carlini(phi, member, mode=mode, fixed_variance=fixed)
    for target in range(len(member)):
        others = [k for k in range(len(member)) if k != target]
        dat_in, dat_out = (
            [np.array([phi[k, j] for k in others if member[k, j] == side]) for j in range(phi.shape[1])]
            for side in (True, False)
        )
        dat_in, dat_out = (np.array([x[: min(map(len, dat))] for x in dat]) for dat in (dat_in, dat_out))
        mean_in, mean_out = np.median(dat_in, 1), np.median(dat_out, 1)
        std_in, std_out = np.std(dat_in, 1), np.std(dat_out, 1)
        if fixed:
            std_in = std_out = np.std(dat_in) if mode == "online" else np.std(dat_out)
        pr_out = -norm.logpdf(phi[target], mean_out, std_out + 1e-30)
        pr_in = -norm.logpdf(phi[target], mean_in, std_in + 1e-30)
        expected = -(pr_in - pr_out) if mode == "online" else pr_out
        np.testing.assert_allclose(every[target], expected.mean(1), rtol=1e-9, atol=1e-9)


def plain_typical(logprob, member, target, i, q, mode):
    inside, outside = shadows(member, target, i)
    p = np.exp(logprob[outside if mode == "offline" else inside + outside, i, q])
    return math.log(p.mean())


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_base_is_the_plain_loop(split, mode):
    member, _, logprob = setting(split)
    every = base(logprob, member, mode=mode, kappa=0.4)
    factor = 1 if mode == "online" else 0.4
    for target, i in np.ndindex(member.shape):
        expected = np.mean(
            [logprob[target, i, q] - factor * plain_typical(logprob, member, target, i, q, mode) for q in range(3)]
        )
        assert every[target, i] == pytest.approx(expected, rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(base(logprob, member, 4, mode=mode, kappa=0.4), every[4], rtol=1e-13, atol=1e-13)


def test_base_ranks_as_rmia_but_for_its_ties():
    member, _, logprob = setting(balanced, queries=None, samples=60)
    ratio, rank = base(logprob, member, 2), rmia(logprob, member, 2, population=np.arange(60), gamma=1.0)
    outside = ~member[2]  # whose population is the same: all the others
    for group in (outside, ~outside):
        order = np.argsort(ratio[group])
        assert (np.diff(rank[group][order]) >= 0).all()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("queries", "gamma"), [(1, 2.0), (2, 1.0), (3, 0.8), (7, 1.5), (18, 1.2)])
@pytest.mark.parametrize("digits", [1, 12])
def test_rmia_majority_is_the_count_of_every_pair(split, queries, gamma, digits):
    """With many ties (probabilities of one digit) and without; populations of more than one word of 64."""
    member, _, logprob = setting(split, queries=queries, models=6, samples=220)
    logprob = np.minimum(np.round(logprob, digits), 0)
    every = rmia(logprob, member, gamma=gamma, vote="majority")
    ratio = np.empty((220, queries))
    for i in range(220):
        inside, outside = shadows(member, 0, i)
        ratio[i] = logprob[0, i] - np.log(np.exp(logprob[inside + outside, i]).mean(axis=0))
    ratio = np.round(ratio, 10)  # a rounding of the last digit must not part what is equal
    crowd = np.flatnonzero(~member[0])
    for i in range(220):
        others = ratio[crowd]
        votes, near = (2 * (ratio[i] - math.log(gamma) > others + off).sum(axis=1) > queries for off in (1e-9, -1e-9))
        assert np.mean(votes) <= every[0, i] + 1e-12
        assert every[0, i] <= np.mean(near) + 1e-12
        if digits == 12:
            assert every[0, i] == np.mean(votes) or np.mean(votes) != np.mean(near)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_calibrated_loss_is_the_plain_loop(split, mode):
    member, _, logprob = setting(split)
    every = calibrated_loss(logprob, member, mode=mode)
    for target, i in np.ndindex(member.shape):
        inside, outside = shadows(member, target, i)
        use = outside if mode == "offline" else inside + outside
        expected = np.mean(logprob[target, i]) - np.mean(logprob[use, i])
        assert every[target, i] == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("digits", [1, 12])
def test_attack_r_inverts_the_published_threshold(split, digits):
    """member at level alpha <=> loss <= numpy.quantile({0, losses, 1000}, alpha), as in Privacy Meter."""
    member, _, logprob = setting(split, queries=None)
    logprob = np.minimum(np.round(logprob, digits), -(10.0**-digits))
    every = attack_r(logprob, member)
    for target, i in np.ndindex(member.shape):
        loss, level = -logprob[target, i], 1 - every[target, i]
        known = np.append(-logprob[shadows(member, target, i)[1], i], [0.0, 1000.0])
        assert np.quantile(known, level) == pytest.approx(loss, rel=1e-9, abs=1e-9)
        if level > 1e-6:
            assert np.quantile(known, level - 1e-6) < loss  # the lowest level there is


def test_attack_r_by_hand():
    member = np.array([[True], [False], [False], [True]])
    logprob = np.array([[-1.5], [-1.0], [-3.0], [-9.0]])
    assert attack_r(logprob, member, 0) == pytest.approx(1 - (1 + 0.25) / 3)  # between 1 and 3, of 0, 1, 3, 1000
    assert attack_r(np.zeros((4, 1)), member, 0) == 1
    assert attack_r(np.array([[-2000.0], [-1.0], [-3.0], [-9.0]]), member, 0) == 0


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("digits", [1, 12])
def test_attack_p_is_the_plain_loop(split, digits):
    member, _, logprob = setting(split)
    losses = np.round(-logprob, digits)
    population = np.arange(0, 30, 2)
    every = attack_p(-losses, member, population=population)
    mean = losses.mean(axis=2)
    for target, i in np.ndindex(member.shape):
        crowd = [z for z in population if not member[target, z]]
        assert every[target, i] == pytest.approx(1 - np.mean([mean[target, z] <= mean[target, i] for z in crowd]))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("larger", [True, False])
@pytest.mark.parametrize("digits", [1, 12])
def test_class_thresholds_try_every_threshold(split, larger, digits):
    member, phi, _ = setting(split, queries=None, samples=40)
    values, labels = np.round(phi, digits) * (1 if larger else -1), np.arange(40) % 3
    every = class_thresholds(values, member, labels, larger=larger)
    for target in (0, 5):
        for one in range(3):
            columns = np.flatnonzero(labels == one)
            others = [k for k in range(len(member)) if k != target]
            v, m = values[np.ix_(others, columns)].ravel(), member[np.ix_(others, columns)].ravel()
            best = None
            for threshold in sorted(set(v.tolist()), reverse=larger):  # those that call fewer come first
                called = v >= threshold if larger else v <= threshold
                accuracy = (called[m].mean() + (~called)[~m].mean()) / 2
                if best is None or accuracy > best[0] + 1e-12:
                    best = accuracy, threshold
            expected = values[target, columns] - best[1]
            np.testing.assert_array_equal(every[target, columns], expected if larger else -expected)


def test_correctness_and_gradient_norm():
    correct = np.array([[[True, False], [True, True]]])
    assert correctness(correct).tolist() == [[0.5, 1.0]]
    assert correctness(torch.from_numpy(correct[..., 0]), target=0).tolist() == [1.0, 1.0]
    assert gradient_norm(np.array([[[1.0, 3.0], [0.0, 0.0]]]), target=0).tolist() == [-2.0, 0.0]
    with pytest.raises(ValueError, match=r"norms must be at least 0; got a minimum of -1"):
        gradient_norm(np.array([[-1.0]]))


def hard_and_easy(samples, seed):
    """phi whose level and spread follow from one feature; members gain by a deviation or two."""
    rng = np.random.default_rng(seed)
    x, member = rng.uniform(-1, 1, samples), rng.random(samples) < 0.5
    deviation = np.exp(x)
    return x[:, None], 4 * x + deviation * (rng.normal(size=samples) + 1.5 * member), member, deviation


def test_quantile_regression_learns_what_non_members_look_like():
    x, phi, member, deviation = hard_and_easy(3000, seed=0)
    features = np.concatenate([x, np.random.default_rng(1).normal(size=(3000, 2))], axis=1)
    scores = quantile_regression(phi[None], member[None], features, 0)
    assert metrics.auc(scores, member) > metrics.auc(phi, member) + 0.05
    true = (phi - 4 * x[:, 0]) / deviation  # what the best attack without shadow models would use
    assert metrics.auc(scores, member) == pytest.approx(metrics.auc(true, member), abs=0.02)
    np.testing.assert_array_equal(scores, quantile_regression(phi[None], member[None], features, 0))
    at_level = quantile_regression(phi[None], member[None], features, 0, alpha=0.1)
    assert (at_level[~member] > 0).mean() == pytest.approx(0.1, abs=0.03)
    assert (at_level[member] > 0).mean() > 0.4


def test_quantile_regression_never_judges_by_what_it_has_learned():
    """Non-members that are all alike in features but random in phi: AUC 0.5 only if nobody is judged by its own fit."""
    rng = np.random.default_rng(3)
    member, phi, x = rng.random(400) < 0.5, rng.normal(size=400), rng.normal(size=(400, 20))
    assert abs(metrics.auc(quantile_regression(phi[None], member[None], x, 0), member) - 0.5) < 0.09


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"features": np.zeros((3, 2))}, ValueError, r"features must have shape \[N, F\] with N = 30; got \(3, 2\)"),
        ({"features": np.full((30, 1), np.nan)}, ValueError, "features must be finite; got 30"),
        ({"alpha": 1.0}, ValueError, "alpha must lie between 0 and 1; got 1.0"),
        ({"population": [1, 2]}, ValueError, "population must hold at least 2 non-members"),
    ],
)
def test_wrong_options_of_the_regression(options, error, message):
    member, phi, _ = setting(balanced)
    member[0, :5] = True
    with pytest.raises(error, match=message):
        quantile_regression(phi, member, options.pop("features", np.zeros((30, 1))), 0, **options)


def test_other_wrong_options():
    member, phi, logprob = setting(balanced, queries=None)
    with pytest.raises(ValueError, match=r"kappa must lie in \[0, 1\]; got 2"):
        base(logprob, member, kappa=2)
    with pytest.raises(ValueError, match="vote must be one of mean, majority; got 'all'"):
        rmia(logprob, member, vote="all")
    with pytest.raises(ValueError, match=r"labels must have shape \[N\] = \(30,\); got \(4,\)"):
        class_thresholds(phi, member, np.zeros(4, int))
    with pytest.raises(ValueError, match=r"member and a non-member of class 7; got 0 and 8"):
        class_thresholds(phi, put_class(member), np.where(np.arange(30) == 3, 7, 0))
    for attack in (attack_r, calibrated_loss):
        with pytest.raises(ValueError, match="at least 1 OUT models besides target 0"):
            attack(logprob, np.ones_like(member))
    with pytest.raises(ValueError, match="at least 1 IN models besides target 0"):
        lira_carlini(phi, put_class(member))


def put_class(member):
    member = member.copy()
    member[:, 3] = False
    return member


# ------------------------------------------------------------------------------------- statistics without one model


@pytest.mark.parametrize("kind", ["normal", "outlier", "equal", "far from zero"])
def test_moments_without_one_are_those_of_the_others(kind):
    rng = np.random.default_rng(2)
    x, use = rng.normal(size=(9, 200)), rng.random((9, 200)) < 0.6
    use[:2] = True
    if kind == "outlier":
        x[0] = 1e9  # subtracting its square again would leave nothing of the others'
    elif kind == "equal":
        x[:] = 0.1
    elif kind == "far from zero":
        x += 1e9
    found = _shadows.moments(x, use, median=True)
    tops, sums = _shadows.sums_of_exp(x, use)
    for k, i in np.ndindex(x.shape):
        rest = x[[j for j in range(9) if use[j, i] and j != k], i]
        assert found.mean[k, i] == pytest.approx(rest.mean(), rel=1e-12, abs=1e-12)
        centred = rest - rest[0]  # exact, and so is its mean to the last digits
        assert found.squares[k, i] == pytest.approx(((centred - centred.mean()) ** 2).sum(), rel=1e-9, abs=1e-30)
        assert found.median[k, i] == np.median(rest)
        assert tops[k, i] == rest.max()
        assert sums[k, i] == pytest.approx(np.exp(rest - rest.max()).sum(), rel=1e-12)


def test_the_next_model_of_the_other_side():
    member = np.array([[1, 1, 0], [0, 1, 0], [0, 1, 0], [1, 1, 1]], bool)
    assert _shadows._next_of_other_side(member).tolist() == [[1, 0, 3], [3, 1, 3], [3, 2, 3], [1, 3, 0]]


# ------------------------------------------------------------------------------------------------- what they must find


def test_lira_with_the_true_moments_is_the_optimum():
    """Shadow models at mean +- deviation have exactly these moments, so the score is the true log-likelihood ratio.

    One distance d between the two normal populations of every sample: AUC = Phi(d / sqrt 2), and TPR at FPR f is
    Phi(d - Phi^-1(1 - f)).
    """
    rng, normal, d = np.random.default_rng(10), NormalDist(), 1.5
    own, level, deviation = rng.random(20_000) < 0.5, rng.normal(0, 3, 20_000), np.exp(rng.normal(0, 1, 20_000))
    phi = level + deviation * np.array([rng.normal(size=20_000) + d * own, *np.outer([d - 1, d + 1, -1, 1], own**0)])
    member = np.array([own, *(np.full(20_000, flag) for flag in (True, True, False, False))])
    for center in ("mean", "median"):
        scores = lira(phi, member, 0, variance="per_example", center=center)
        np.testing.assert_allclose(scores, d * (phi[0] - level) / deviation - d**2 / 2, rtol=1e-9, atol=1e-9)
    found = metrics.summary(scores, own, fprs=(0.1, 0.01), confidence=0.997)  # 3 sigma
    assert found["auc_low"] < normal.cdf(d / math.sqrt(2)) < found["auc_high"]
    for point in found["tpr_at_fpr"]:
        assert point["low"] < normal.cdf(d - normal.inv_cdf(1 - point["fpr"])) < point["high"]


def test_lira_reaches_the_optimum_of_gaussian_signals():
    """Two normal populations per sample: with many shadows, TPR and AUC of the true likelihood ratio are reached."""
    rng = np.random.default_rng(9)
    models, samples = 256, 4000
    member = balanced(rng, models, samples)
    level, deviation, gain = (
        rng.normal(0, 2, samples),
        np.exp(rng.normal(0, 0.3, samples)),
        rng.uniform(0.5, 2, samples),
    )
    phi = level + deviation * rng.normal(size=(models, samples)) + gain * member
    middle = level + gain / 2
    optimum = gain * (phi[0] - middle) / deviation**2
    best = metrics.summary(optimum, member[0], fprs=(0.01,), bootstrap=200)
    for variance in ("shrinkage", "per_example"):
        found = lira(phi, member, 0, variance=variance, center="mean")
        assert best["auc_low"] < metrics.auc(found, member[0]) < best["auc_high"]
        point = best["tpr_at_fpr"][0]
        assert point["low"] < metrics.tpr_at_fpr(found, member[0], 0.01).tpr < point["high"]


def test_attacks_lists_every_attack():
    assert all(callable(getattr(attacks, name)) for name in set(attacks.__all__) - {"ATTACKS"})
