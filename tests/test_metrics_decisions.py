"""Intervals, thresholds from other models and epsilon bounds, against scipy and against slow, obvious versions."""

import math

import numpy as np
import pytest

from cwfast.mia import metrics

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize(
    ("k", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (3, 50), (25, 50), (7, 25_000), (24_000, 25_000)]
)
def test_clopper_pearson_is_the_beta_quantile(k, n, confidence):
    low, high = metrics.clopper_pearson(k, n, confidence=confidence)
    tail = (1 - confidence) / 2
    assert low == pytest.approx(0 if k == 0 else stats.beta.ppf(tail, k, n - k + 1), rel=1e-9)
    assert high == pytest.approx(1 if k == n else stats.beta.ppf(1 - tail, k + 1, n - k), rel=1e-9)


def test_clopper_pearson_of_nothing_found():
    assert metrics.clopper_pearson(0, 1000, confidence=0.9)[1] == pytest.approx(3 / 1000, rel=5e-3)  # the rule of three


@pytest.mark.parametrize("ties", [True, False])
def test_delong_is_the_variance_over_all_pairs(ties):
    rng = np.random.default_rng(0)
    members = rng.random(80) < 0.4
    scores = rng.normal(size=80) + members
    scores = np.round(scores, 0 if ties else 12)
    wins = np.array([[(a > b) + 0.5 * (a == b) for b in scores[~members]] for a in scores[members]])
    variance = wins.mean(1).var(ddof=1) / len(wins) + wins.mean(0).var(ddof=1) / wins.shape[1]
    found = metrics.delong(scores, members, confidence=0.9)
    assert found.auc == metrics.auc(scores, members) == pytest.approx(wins.mean())
    assert found.std == pytest.approx(math.sqrt(variance), rel=1e-12)
    assert found.high - found.auc == pytest.approx(1.6448536 * found.std, rel=1e-6)
    assert found.auc - found.low == pytest.approx(found.high - found.auc)


def test_delong_covers_and_stays_within_bounds():
    rng = np.random.default_rng(1)
    true, hit = stats.norm.cdf(1 / math.sqrt(2)), 0
    for _ in range(300):
        members = np.arange(200) % 2 == 0
        low, high = metrics.delong(rng.normal(size=200) + members, members)[1:3]
        hit += low < true < high
    assert 0.91 < hit / 300 < 0.98
    assert metrics.delong([1.0, 2.0, 3.0, 4.0], np.array([False, False, True, True])) == (1, 1, 1, 0)


# --------------------------------------------------------------------------------------- thresholds from other models


def fleet(models=5, samples=60, seed=2, digits=1):
    rng = np.random.default_rng(seed)
    members = rng.random((models, samples)) < 0.5
    return np.round(rng.normal(size=(models, samples)) + members, digits), members


@pytest.mark.parametrize("digits", [1, 12])
@pytest.mark.parametrize("fpr", [0.0, 0.05, 0.3, 1.0])
def test_shadow_threshold_is_that_of_the_pooled_others(fpr, digits):
    scores, members = fleet(digits=digits)
    found = metrics.shadow_calibrated(scores, members, fpr)
    for target in range(5):
        others = [k for k in range(5) if k != target]
        point = metrics.tpr_at_fpr(scores[others].ravel(), members[others].ravel(), fpr)
        assert found.threshold[target] == point.threshold
        called = scores[target] >= point.threshold
        assert found.tpr[target] == called[members[target]].mean()
        assert found.fpr[target] == called[~members[target]].mean()
        assert found.false_positives[target] == (called & ~members[target]).sum()
        assert found.true_positives[target] == (called & members[target]).sum()


@pytest.mark.parametrize("digits", [1, 12])
def test_shadow_balanced_accuracy_tries_every_threshold_of_the_others(digits):
    scores, members = fleet(digits=digits)
    found = metrics.shadow_calibrated(scores, members)
    for target in range(5):
        others = [k for k in range(5) if k != target]
        s, m = scores[others].ravel(), members[others].ravel()
        accuracy = {t: ((s >= t)[m].mean() + (s < t)[~m].mean()) / 2 for t in set(s.tolist())}
        best = max(accuracy.values())
        threshold = max(t for t, value in accuracy.items() if value > best - 1e-12)
        assert found.threshold[target] == threshold
        called = scores[target] >= threshold
        own = (called[members[target]].mean() + (~called)[~members[target]].mean()) / 2
        assert found.balanced_accuracy[target] == pytest.approx(own)
        assert own <= metrics.balanced_accuracy(scores[target], members[target]) + 1e-12


def test_infinite_scores_and_nobody_called():
    members = np.array([[True, False, True], [False, True, False]])
    scores = np.array([[1.0, np.inf, 0.0], [np.inf, 2.0, 1.0]])
    found = metrics.shadow_calibrated(scores, members, 0.0)
    assert found.threshold.tolist() == [np.inf, np.inf]
    assert found.true_positives.tolist() == found.false_positives.tolist() == [0, 0]


def test_ppv():
    assert metrics.ppv(0.1, 0.001, 0.5) == pytest.approx(0.1 / 0.101)
    assert metrics.ppv(0.0399, 0.00002, 0.01) == pytest.approx(0.0399 / (0.0399 + 99 * 0.00002))
    assert math.isnan(metrics.ppv(0, 0, 0.5))
    with pytest.raises(ValueError, match=r"prior must lie in \[0, 1\]; got 2"):
        metrics.ppv(0.1, 0.1, 2)


def test_vulnerability_is_the_share_of_models_that_give_a_sample_away():
    scores, members = fleet(samples=40)
    members[:, 3] = False
    found = metrics.vulnerability(scores, members, 0.1)
    limits = [metrics.tpr_at_fpr(*row, 0.1).threshold for row in zip(scores, members, strict=True)]
    for i in range(40):
        hits = [scores[k, i] >= limits[k] for k in range(5) if members[k, i]]
        assert np.isnan(found[i]) if not hits else found[i] == np.mean(hits)
    np.testing.assert_array_equal(found, metrics.vulnerability(scores, members, 0.9, thresholds=np.array(limits)))
    with pytest.raises(ValueError, match=r"thresholds must have shape \[K\] = \(5,\); got \(2,\)"):
        metrics.vulnerability(scores, members, 0.1, thresholds=np.zeros(2))


def test_one_target_has_no_others():
    with pytest.raises(ValueError, match="at least 2 targets; got one target"):
        metrics.shadow_calibrated([0.0, 1.0], np.array([False, True]))


# ------------------------------------------------------------------------------------------------------------ epsilon


def published_p_value(m, r, v, eps, delta):
    """Appendix D of Steinke et al., with scipy."""
    q = 1 / (1 + math.exp(-eps))
    beta, alpha, total = stats.binom.sf(v - 1, r, q), 0, 0
    for i in range(1, v + 1):
        total += stats.binom.pmf(v - i, r, q)
        alpha = max(alpha, total / i)
    return min(beta + alpha * delta * 2 * m, 1)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize(
    ("m", "r", "v"), [(100, 100, 75), (1000, 100, 100), (1000, 50, 26), (5000, 500, 480), (10, 0, 0)]
)
def test_one_run_bound_is_the_published_one(m, r, v, delta):
    found = metrics.epsilon_from_guesses(v, r, m, delta=delta)
    if found == 0:
        assert published_p_value(m, r, v, 1e-9, delta) >= 0.05 - 1e-9
    else:
        assert published_p_value(m, r, v, found - 1e-6, delta) < 0.05
        assert published_p_value(m, r, v, found + 1e-6, delta) >= 0.05


def test_one_run_by_hand():
    """All of r guesses right, delta 0: q^r = 0.05."""
    q = 0.05 ** (1 / 100)
    assert metrics.epsilon_from_guesses(100, 100, 100) == pytest.approx(math.log(q / (1 - q)), rel=1e-9)
    members = np.arange(200) < 100
    assert metrics.epsilon_one_run(members * 1.0, members, guess_members=50, guess_non_members=50) == pytest.approx(
        math.log(q / (1 - q)), rel=1e-9
    )
    assert metrics.epsilon_one_run(members * -1.0, members, guess_members=50, guess_non_members=50) == 0


def test_epsilon_from_counts_is_the_formula():
    beta = stats.beta
    tpr, fpr = beta.ppf(0.025, 40, 61), beta.ppf(0.975, 3, 98)  # 40 of 100 members, 2 of 100 non-members
    found = metrics.epsilon_from_counts(40, 100, 2, 100, delta=1e-3)
    assert found == pytest.approx(max(math.log((tpr - 1e-3) / fpr), math.log((1 - fpr - 1e-3) / (1 - tpr))), rel=1e-9)
    assert metrics.epsilon_from_counts(50, 100, 50, 100) == 0
    assert metrics.epsilon_from_counts(0, 100, 0, 100) == 0


def test_randomised_response_is_never_overrated():
    """A mechanism of known epsilon: the bound exceeds it in at most 5% of the runs, and is not far below with many."""
    rng, epsilon = np.random.default_rng(4), 1.0
    tell = math.exp(epsilon) / (1 + math.exp(epsilon))
    over, one_run = 0, []
    for seed in range(60):
        members = rng.random(2000) < 0.5
        answer = np.where(rng.random(2000) < tell, members, ~members) + 1e-3 * rng.random(2000)
        over += metrics.epsilon_lower_bound(answer, members, seed=seed) > epsilon
        one_run.append(metrics.epsilon_one_run(answer, members, guess_members=800, guess_non_members=800))
    assert over <= 6
    assert sum(bound > epsilon for bound in one_run) <= 6
    assert np.mean(one_run) > 0.85


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.clopper_pearson(3, 2), r"successes must lie in \[0, trials\] .*; got 3 of 2"),
        (lambda: metrics.clopper_pearson(1, 2, confidence=1), "confidence must lie between 0 and 1; got 1"),
        (lambda: metrics.epsilon_from_guesses(3, 2, 9), "must hold; got 3, 2, 9"),
        (lambda: metrics.epsilon_from_counts(1, 2, 1, 2, delta=1.0), r"delta must lie in \[0, 1\); got 1.0"),
        (
            lambda: metrics.epsilon_one_run([0.0, 1.0], np.array([False, True]), guess_members=2, guess_non_members=1),
            "at most the number of scores, 2; got 2 and 1",
        ),
        (lambda: metrics.delong([0.0, 1.0], np.array([False, True])), "two of each side; got 1 members, 1 non"),
        (lambda: metrics.epsilon_lower_bound([0.0, 1.0], np.array([False, True])), "at least one member"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_summary_tells_models_from_samples():
    rng = np.random.default_rng(5)
    members = np.tile(rng.random(400) < 0.5, (6, 1))
    scores = rng.normal(size=(6, 400)) + members * np.array([0, 0, 0, 2, 2, 2])[:, None]
    found = metrics.summary(scores, members, fprs=(0.1,), bootstrap=300)
    assert found["auc_models_high"] - found["auc_models_low"] > 3 * (found["auc_high"] - found["auc_low"])
    assert found["auc_models_low"] < found["auc"] < found["auc_models_high"]
    point = found["tpr_at_fpr"][0]
    assert point["models_low"] < point["tpr"] < point["models_high"]
    alone = metrics.summary(scores[0], members[0], fprs=(0.1,), bootstrap=10)
    assert alone["auc_models_low"] is None
    assert alone["tpr_at_fpr"][0]["models_high"] is None
