"""What a study's comparisons say of made-up numbers, and whether its intervals hold what they should."""

import math
from itertools import pairwise

import numpy as np
import pytest

from cwfast.mia import metrics
from cwfast.study import comparing
from cwfast.study.intervals import Figure, Measured, shared

MODELS, REPLICATES = 4, 100


def figure(values, noise):
    """[seeds] values, models that agree, replicates around them."""
    rng = np.random.default_rng(0)
    means = np.array(values, dtype=float)[:, None]
    draws = means + noise * rng.normal(size=(len(means), REPLICATES))
    return Figure(np.repeat(means, MODELS, axis=1), draws, np.eye(len(means)))


def measured(curve, base, rate, accuracy, auc, *, criterion=None, like=None, strength=None, noise=0.001):
    """One cell; the noise of two cells is the same, so that it goes out of their difference."""
    row = {"curve": curve, "base": base, "rate": rate, "criterion": criterion, "label": f"{curve} {rate}"}
    row |= {"like": like, "strength": strength}
    return Measured(row, figure(accuracy, 0.0), figure(auc, noise))


# -- intervals


def test_a_figures_error_is_that_of_its_definition():
    rng = np.random.default_rng(1)
    models, draws = rng.normal(size=(3, 8)), rng.normal(size=(3, 50)) * 0.3
    overlap = np.array([[1, 0.5, 0.2], [0.5, 1, 0], [0.2, 0, 1]])
    std = [np.std(one, ddof=1) for one in draws]
    samples = sum(overlap[i, j] * std[i] * std[j] for i in range(3) for j in range(3)) / 9
    within = np.mean([np.var(one, ddof=1) for one in models]) / 24
    between = np.var(models.mean(axis=1), ddof=1) / 3
    one = Figure(models, draws, overlap)
    assert one.error == pytest.approx(math.sqrt(samples + max(within, between)), rel=1e-12)
    apart = Figure(models + np.array([[0], [9], [18]]), draws, overlap)
    between = np.var(apart.models.mean(axis=1), ddof=1) / 3
    assert apart.error == pytest.approx(math.sqrt(samples + between), rel=1e-12)
    low, high = one.interval
    assert (low + high) / 2 == pytest.approx(models.mean())
    assert high - low == pytest.approx(2 * 1.96 * one.error)
    low, high = apart.interval  # by the spread of three seeds: two degrees of freedom
    assert high - low == pytest.approx(2 * math.sqrt(1.96**2 * samples + 4.303**2 * between), rel=1e-12)


def test_a_difference_is_one_of_pairs():
    one = figure([0.5, 0.6], 0.1)
    other = Figure(one.models - 0.1, one.draws - 0.1, one.shared)
    assert one.less(other).mean == pytest.approx(0.1)
    assert one.less(other).error < 1e-12 < one.error
    short = Figure(other.models, other.draws[:, :10], one.shared)  # replicates that were skipped
    assert one.less(short).draws.shape == (2, 10)


def test_shared_samples():
    assert shared([[1, 2, 3, 4], [3, 4, 5, 6], [7, 8]]).tolist() == [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]]


def coverage(found, truth):
    return np.mean([low <= truth <= high for low, high in found])


def test_intervals_over_overlapping_seeds_hold_the_truth_as_often_as_they_say():
    """A sample's own effect, in the seeds that have it; a model's own; and noise of each model on each sample."""
    rng = np.random.default_rng(2)
    seeds, models, pool, whole, times, draws = 3, 8, 40, 60, 500, 60
    ours, samples_alone, apart = [], [], []
    for _ in range(times):
        effect = rng.normal(size=whole)
        ids = [rng.permutation(whole)[:pool] for _ in range(seeds)]
        own = rng.normal(size=(seeds, models, 1)) * 0.4
        values = np.array([effect[one] for one in ids])[:, None] + own + rng.normal(size=(seeds, models, pool)) * 0.5
        resampled = rng.integers(pool, size=(seeds, draws, pool))
        means = values.mean(axis=1)
        replicates = np.array([mean[at].mean(axis=1) for mean, at in zip(means, resampled, strict=True)])
        one = Figure(values.mean(axis=2), replicates, shared([list(one) for one in ids]))
        ours.append(one.interval)
        samples_alone.append(tuple(np.quantile(replicates.mean(axis=0), (0.025, 0.975))))
        apart.append(Figure(one.models, one.draws, np.eye(seeds)).interval)
    assert 0.93 <= coverage(ours, 0.0) <= 0.985
    assert coverage(samples_alone, 0.0) < 0.85  # the bootstrap over each seed's samples alone
    assert coverage(apart, 0.0) < coverage(ours, 0.0) - 0.03  # seeds taken for independent


def test_the_intervals_of_attacks_on_simulated_models_hold_the_true_auc():
    """A member's score is higher by the sum of the sample's and the model's own effects."""
    rng = np.random.default_rng(3)
    models, samples, times, spread = 8, 100, 160, 0.6
    truth = 0.5 * (1 + math.erf(1 / math.sqrt(2 + 2 * spread**2) / math.sqrt(2)))  # P(N(1, 2 + 2 spread^2) > 0)
    ours, samples_alone = [], []
    for time in range(times):
        members = np.array([rng.permutation(samples) < samples // 2 for _ in range(models)])
        shift = 1 + spread * (rng.normal(size=samples) + rng.normal(size=(models, 1)))
        scores = rng.normal(size=(models, samples)) + members * shift
        found = metrics.summary(scores, members, fprs=(), bootstrap=60, seed=time, draws=True)
        own = [metrics.auc(*one) for one in zip(scores, members, strict=True)]
        ours.append(Figure(np.array([own]), np.array([found["auc_draws"]]), np.eye(1)).interval)
        samples_alone.append((found["auc_low"], found["auc_high"]))
    assert coverage(ours, truth) >= 0.9
    assert coverage(samples_alone, truth) < coverage(ours, truth) - 0.1


@pytest.mark.parametrize(("effect", "least"), [(1.0, (0.79, 0.88, 0.94)), (3.0, (0.42, 0.75, 0.93))])
def test_intervals_where_seeds_have_an_effect_of_their_own(effect, least):
    """As of a split or a reference set, so many times as large as the error of one seed over samples and models."""
    rng, times, models, common = np.random.default_rng(4), 1000, 16, 0.67
    for seeds, at_least in zip((1, 2, 3), least, strict=True):
        overlap = np.full((seeds, seeds), common) + (1 - common) * np.eye(seeds)
        held = []
        for _ in range(times):
            of_samples = common**0.5 * rng.normal() + (1 - common) ** 0.5 * rng.normal(size=(seeds, 1))
            own = 4 * rng.normal(size=(seeds, models)) + 2**0.5 * effect * rng.normal(size=(seeds, 1))
            figures = of_samples + own
            draws = figures.mean(axis=1)[:, None] + rng.normal(size=(seeds, 50))
            held.append(Figure(figures, draws, overlap).interval)
        assert at_least <= coverage(held, 0.0) <= (at_least + 0.07 if seeds == 1 else 0.99)  # one seed cannot know


# -- verdicts


@pytest.mark.parametrize(
    ("accuracy", "auc", "verdict"),
    [
        ([0.81, 0.81], [0.6, 0.6], "better"),
        ([0.799, 0.799], [0.6, 0.6], "better"),  # lower by less than the margin
        ([0.79, 0.79], [0.6, 0.6], "trade"),
        ([0.7, 0.7], [0.8, 0.8], "worse"),
        ([0.801, 0.801], [0.8, 0.8], "worse"),  # higher by less than the margin
        ([0.9, 0.9], [0.8, 0.8], "trade"),
        ([0.804, 0.804], [0.7, 0.7], "even"),
        ([0.9, 0.9], [0.7, 0.7], "even AUC, higher accuracy"),
        ([0.7, 0.7], [0.7, 0.7], "even AUC, lower accuracy"),
    ],
)
def test_verdicts(accuracy, auc, verdict):
    base = measured("x", "none", 0.1, [0.8, 0.8], [0.7, 0.7])
    assert comparing.beside(measured("y", "none", 0.1, accuracy, auc), base)["verdict"] == verdict


def test_an_accuracy_that_may_be_lower_by_more_than_the_margin_is_no_win():
    base = measured("x", "none", 0.1, [0.8], [0.7])
    unsure = Measured(base.row, Figure(np.array([[0.7, 0.9, 0.75, 0.87]]), base.accuracy.draws, np.eye(1)),
                      measured("y", "none", 0.1, [0.8], [0.6]).auc)  # fmt: skip
    found = comparing.beside(unsure, base)
    assert found["accuracy"] == pytest.approx(0.005)
    assert found["accuracy_low"] < -comparing.MARGIN < found["accuracy_high"]
    assert found["verdict"] == "lower AUC, accuracy open"
    assert comparing.beside(base, unsure)["verdict"] == "higher AUC, accuracy open"
    tested = Measured(base.row, Figure(base.accuracy.models, figure([0.8], 0.02).draws, np.eye(1)), unsure.auc)
    assert (
        comparing.beside(tested, base)["verdict"] == "lower AUC, accuracy open"
    )  # a small test set, if the models agree


# -- pairs


def test_each_cell_stands_beside_its_own_controls():
    cells = [
        measured(comparing.PLAIN, "none", 0.0, [0.8], [0.7], criterion="taylor"),
        measured(comparing.PLAIN, "none", 0.0, [0.8], [0.1], criterion="taylor", strength=0.3),
        measured("gap", "none", 0.1, [0.8], [0.6], criterion="gap"),
        measured("gap", "relaxloss", 0.1, [0.8], [0.6], criterion="gap"),
        measured("gap, other strengths", "none", 0.1, [0.8], [0.2], criterion="gap", strength=0.3),
        measured(
            "random as gap, other strengths", "none", 0.1, [0.8], [0.3], criterion="gap", like="gap", strength=0.3
        ),
        measured("taylor", "none", 0.1, [0.8], [0.65], criterion="taylor"),
        *(
            measured(curve.format(like), "none", rate, [0.8], [auc], criterion=like, like=like)
            for like, auc in (("gap", 0.61), ("taylor", 0.62))
            for rate in (0.1, 0.3)
            for curve in ("random as {}", "interpolated as {}, then fine-tuned")
        ),
        measured("ablation: three rounds", "none", 0.1, [0.8], [0.5], criterion="gap"),
    ]
    whole = comparing.pairs(cells, "none")
    found = {(pair["criterion"], pair["against"]): pair for pair in whole if pair["strength"] is None}
    controls = ("fine-tuning without rewinding", "random weights", "interpolation, then fine-tuning")
    assert list(found) == [(criterion, against) for criterion in ("gap", "taylor") for against in controls]
    differences = [pair["auc"] for pair in found.values()]
    assert differences == pytest.approx([-0.1, -0.01, -0.01, -0.05, 0.03, 0.03])
    elsewhere = {pair["against"]: pair["auc"] for pair in whole if pair["strength"] == 0.3}
    assert elsewhere == {controls[0]: pytest.approx(0.1), controls[1]: pytest.approx(-0.1)}
    assert comparing.pairs(cells, "relaxloss") == []


# -- at no less than an accuracy


def test_the_setting_is_chosen_on_the_other_seeds():
    lucky = measured("gap", "none", 0.1, [0.8, 0.8], [0.4, 0.9], criterion="gap")
    steady = measured("gap", "none", 0.2, [0.8, 0.8], [0.6, 0.6], criterion="gap", strength=0.5)
    undefended = measured("undefended", "none", None, [0.8, 0.8], [0.9, 0.9])
    levels = comparing.at_levels([undefended, lucky, steady], "none")
    gap = next(curve for curve in levels[0]["curves"] if curve["curve"] == "gap")
    # seed 0 is measured by what is best on seed 1 (steady, 0.6), seed 1 by what is best on seed 0 (lucky, 0.9)
    assert gap["settings"] == ["gap 0.2", "gap 0.1"]
    assert gap["points"] == ["20%, 0.5", "10%"]
    assert gap["auc"] == pytest.approx(0.75)


def test_a_curve_that_falls_short_where_it_was_not_chosen_is_not_ranked():
    undefended = measured("undefended", "none", None, [0.8, 0.8], [0.9, 0.9])
    lucky = [
        measured("gap", "none", rate, [0.9 - 0.4 * (seed == k) for k in range(2)], [0.5, 0.5], criterion="gap")
        for seed, rate in enumerate((0.1, 0.2))
    ]  # each reaches the level on one seed alone
    level = comparing.at_levels([undefended, *lucky], "none")[0]
    assert [curve["curve"] for curve in level["curves"]] == ["undefended"]
    assert level["short"] == {"gap": pytest.approx(0.3)}


def test_a_curve_below_the_level_is_named_and_the_first_is_behind_by_nothing():
    undefended = measured("undefended", "none", None, [0.8], [0.9])
    poor = measured("gap", "none", 0.3, [0.5], [0.5], criterion="gap")
    good = measured("random as gap", "none", 0.3, [0.81], [0.7])
    [level] = comparing.at_levels([undefended, poor, good], "none")[:1]
    assert [curve["curve"] for curve in level["curves"]] == ["random as gap", "undefended"]
    assert level["short"] == {"gap": pytest.approx(0.3)}
    assert level["ours"] is None
    assert level["curves"][0]["behind"]["auc"] == 0
    assert level["curves"][1]["behind"]["auc"] == pytest.approx(0.2)
    aucs = [one["behind"]["auc_low"] for one in level["curves"]]
    assert all(a <= b for a, b in pairwise(aucs))


def test_a_level_is_reached_within_the_margin_where_settings_are_chosen_too():
    undefended = measured("undefended", "none", None, [0.8, 0.8], [0.9, 0.9])
    near = measured("gap", "none", 0.1, [0.796, 0.796], [0.5, 0.5], criterion="gap")
    far = measured("taylor", "none", 0.1, [0.794, 0.794], [0.5, 0.5], criterion="taylor")
    level = next(level for level in comparing.at_levels([undefended, near, far], "none") if "taylor" in level["short"])
    assert [curve["curve"] for curve in level["curves"]] == ["gap", "undefended"]
    assert level["curves"][0]["accuracy"] == pytest.approx(0.796)
    assert level["short"] == {"taylor": pytest.approx(0.006)}


def test_levels_at_which_the_same_was_chosen_are_one():
    cells = [
        measured("undefended", "none", None, [0.8], [0.9]),
        measured("gap", "none", 0.1, [0.815], [0.5], criterion="gap"),
        measured("mixup", "other", None, [0.818], [0.7]),
        measured("short training", "none", None, [0.3], [0.5]),
        measured("ablation: three rounds", "none", 0.1, [0.83], [0.6], criterion="gap"),
    ]
    first, best, own = comparing.at_levels(cells, "none")
    # all three curves reach both; the best of all may be an ablation, and CWRF's own accuracy is a level
    assert first["level"].startswith("1 point less than undefended (0.790) and the undefended accuracy (0.800)")
    assert "3 points less than the best of all cells, ablation: three rounds 0.1 at 0.830 (0.800)" in first["level"]
    assert first["accuracy"] == pytest.approx(0.8)
    assert first["short"] == {"short training": pytest.approx(0.5)}
    assert best["level"].startswith("1 point less than the best of all cells")
    assert own is best or "CWRF's lowest AUC above the undefended accuracy, gap 0.1 (0.815)" in own["level"]


def test_cwrf_stands_beside_the_best_rival_by_auc_and_accuracy():
    cells = [
        measured("undefended", "none", None, [0.8], [0.9]),
        measured("gap", "none", 0.1, [0.81], [0.5], criterion="gap"),
        measured("mixup", "other", None, [0.85], [0.6]),
    ]
    ours = comparing.at_levels(cells, "none")[0]["ours"]
    assert (ours["curve"], ours["against"], ours["verdict"]) == ("gap", "mixup", "trade")
    assert ours["accuracy"] == pytest.approx(-0.04)
    assert ours["auc"] == pytest.approx(-0.1)


def test_other_bases_stay_out_and_what_has_no_base_stands_beside_all():
    cells = [
        measured("undefended", "none", None, [0.8], [0.9]),
        measured("early stopping", "none", None, [0.8], [0.7]),
        measured("short training", "none", None, [0.8], [0.7]),
        measured("mixup", "other", None, [0.8], [0.7]),
        measured("from scratch", "hamp", None, [0.8], [0.1]),
        measured("ablation: three rounds", "relaxloss", 0.1, [0.8], [0.1], criterion="gap"),
        measured("gap", "relaxloss", 0.1, [0.8], [0.6], criterion="gap"),
    ]
    names = {curve["curve"] for curve in comparing.at_levels(cells, "relaxloss")[0]["curves"]}
    assert names == {"undefended", "early stopping", "short training", "mixup", "gap"}
