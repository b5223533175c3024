"""Controls and tests of whole sets: what must be found is, and what is not there is not."""

import numpy as np
import pytest
import torch

from cwfast import llm, mia
from cwfast.llm.datasets import _above

WORDS = [f"word{i}" for i in range(60)]


def texts(count, seed, extra=()):
    rng = np.random.default_rng(seed)
    return [" ".join([*rng.choice(WORDS, 30), *extra]) for _ in range(count)]


def test_bag_of_words_finds_a_word_of_one_side_and_nothing_in_equal_sides():
    member = np.arange(120) < 60
    told = texts(60, 0, ("2023",)) + texts(60, 1)
    assert mia.metrics.auc(llm.bag_of_words(told, member), member) > 0.99
    areas = [mia.metrics.auc(llm.bag_of_words(texts(120, seed), member, seed=seed), member) for seed in range(10)]
    assert abs(np.mean(areas) - 0.5) < 3 * np.std(areas, ddof=1) / np.sqrt(len(areas))
    assert np.std(areas, ddof=1) < 0.11  # of 60 against 60 equal texts: 0.053, and folds that are no independent fits


def test_bag_of_words_is_logistic_regression():
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    from cwfast.llm.controls import Rows, _logistic

    x, y = np.log1p(rng.poisson(0.7, (80, 12))), rng.random(80) < 0.4
    expected = linear.LogisticRegression(C=1 / 1.5, tol=1e-10, max_iter=5000).fit(x, y).coef_[0]
    rows = Rows.of([[(j, value) for j, value in enumerate(row) if value] for row in x], x.shape[1])
    np.testing.assert_allclose(_logistic(rows, y, 1.5), expected, atol=1e-5)
    np.testing.assert_allclose(rows.times(torch.arange(12.0).double()), x @ np.arange(12), rtol=1e-12)


def test_texts_without_common_words_are_tied_and_not_told_apart():
    alone = [f"word{i}" for i in range(40)]
    scores = llm.bag_of_words(alone, np.arange(40) < 20, folds=5)
    assert mia.metrics.auc(scores, np.arange(40) < 20) == 0.5


def test_bag_of_words_refuses():
    with pytest.raises(ValueError, match=r"members must have shape \[N\] = \(3,\); got \(2,\)"):
        llm.bag_of_words(["a", "b", "c"], np.array([True, False]))
    with pytest.raises(ValueError, match="folds must be at least 2"):
        llm.bag_of_words(["a", "b", "c"], np.array([True, False, True]))


def test_duplicates():
    a, b = texts(5, 0), texts(5, 1)
    clean = llm.duplicates(a, b)
    assert clean == {"exact": 0, "members": 0, "nonmembers": 0, "largest": 0.0, "n": 8, "share": 0.2}
    half = " ".join(a[2].split()[:15]) + " " + " ".join(b[0].split()[:15])
    found = llm.duplicates(a, [*b, a[0].replace(" ", "  "), half, "too short"])
    assert (found["exact"], found["members"], found["nonmembers"]) == (1, 2, 2)
    assert found["largest"] == 1.0


def test_dataset_inference_finds_many_weak_scores_and_no_difference_where_there_is_none():
    rng = np.random.default_rng(0)
    found = llm.dataset_inference(rng.normal(0.4, 1, (200, 6)), rng.normal(0, 1, (200, 6)))
    assert found.p_value < 1e-4
    values = np.array([llm.dataset_inference(*rng.normal(size=(2, 60, 6)), seed=i).p_value for i in range(1000)])
    for share in (0.01, 0.05, 0.5, 0.95):  # p-values are uniform where there is nothing: three standard deviations
        assert abs(np.mean(values < share) - share) < 3 * np.sqrt(share * (1 - share) / len(values))
    with pytest.raises(ValueError, match=r"must be \[N >= 4, F\]"):
        llm.dataset_inference(np.zeros((3, 2)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match="must be finite"):
        llm.dataset_inference(np.full((9, 2), np.inf), np.zeros((9, 2)))


def test_the_t_test_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    from cwfast.llm.datasets import _welch

    rng = np.random.default_rng(0)
    for shift, n, m in [(0, 5, 9), (0.8, 40, 30), (-2, 12, 100)]:
        x, y = rng.normal(shift, 1, n), rng.normal(0, 3, m)
        t, degrees = _welch(x, y)
        expected = stats.ttest_ind(x, y, equal_var=False, alternative="greater")
        np.testing.assert_allclose([t, _above(t, degrees)], [expected.statistic, expected.pvalue], rtol=1e-9)
