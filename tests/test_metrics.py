"""Metrics against slow, obvious versions: pair counts, and all thresholds tried one by one."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cwfast.mia import metrics
from cwfast.mia.metrics import averages, roc

FPRS = (0.0, 0.1, 0.29, 0.5, 1.0)


@st.composite
def scored(draw):
    """Few distinct scores, so that ties are common; at least one member and one non-member."""
    size = draw(st.integers(2, 14))
    value = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 0.25, 2.0, math.inf])
    scores = draw(st.lists(value, min_size=size, max_size=size))
    members = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(lambda m: 0 < sum(m) < len(m)))
    return np.array(scores), np.array(members)


def pair_auc(scores, members):
    wins = sum((a > b) + 0.5 * (a == b) for a in scores[members] for b in scores[~members])
    return wins / (members.sum() * (~members).sum())


def all_vertices(scores, members):
    """(FP, TP) of every possible threshold, from calling nobody to calling everybody a member."""
    points = [(0, 0)]
    for threshold in sorted(set(scores.tolist()), reverse=True):
        called = scores >= threshold
        points.append((int((called & ~members).sum()), int((called & members).sum())))
    return points


@settings(max_examples=200, deadline=None)
@given(scored())
def test_against_brute_force(case):
    scores, members = case
    positives, negatives = int(members.sum()), int((~members).sum())
    points = all_vertices(scores, members)

    curve = metrics.roc_curve(scores, members)
    assert list(zip(curve.false_positives.tolist(), curve.true_positives.tolist(), strict=True)) == points
    assert curve.fpr.tolist() == [fp / negatives for fp, _ in points]
    assert curve.tpr.tolist() == [tp / positives for _, tp in points]
    for threshold, (fp, tp) in list(zip(curve.thresholds, points, strict=True))[1:]:
        called = scores >= threshold
        assert ((called & ~members).sum(), (called & members).sum()) == (fp, tp)

    assert metrics.auc(scores, members) == pytest.approx(pair_auc(scores, members), abs=1e-15)
    assert metrics.auc(-scores, members) == pytest.approx(1 - metrics.auc(scores, members), abs=1e-15)
    best = max((tp / positives + 1 - fp / negatives) / 2 for fp, tp in points)
    assert metrics.balanced_accuracy(scores, members) == pytest.approx(best, abs=1e-15)

    for fpr in FPRS:
        allowed = math.floor(round(fpr * negatives, 9))
        fp, tp = max((p for p in points if p[0] <= allowed), key=lambda p: (p[1], -p[0]))
        got = metrics.tpr_at_fpr(scores, members, fpr)
        assert got.tpr == tp / positives
        assert got.false_positives == fp <= allowed
        assert got.fpr == got.false_positives / negatives
        if got.tpr > 0:
            assert (scores[members] >= got.threshold).mean() == got.tpr
            assert (scores[~members] >= got.threshold).sum() == got.false_positives
        mirrored = metrics.tpr_at_fpr(-scores, ~members, fpr)
        back = metrics.tnr_at_fnr(scores, members, fpr)
        assert (back.tnr, back.fnr, back.false_negatives) == mirrored[:2] + mirrored[3:]


def test_order_of_samples_never_matters():
    rng = np.random.default_rng(0)
    scores, members = rng.integers(0, 5, 60), rng.random(60) < 0.4
    shuffle = rng.permutation(60)
    for function in (metrics.auc, metrics.balanced_accuracy, lambda s, m: metrics.tpr_at_fpr(s, m, 0.3)):
        assert function(scores, members) == function(scores[shuffle], members[shuffle])


def test_allowed_false_positives_are_exact():
    scores = -np.arange(200.0)
    members = np.arange(200) % 2 == 1  # falling scores: a non-member, a member, a non-member ...
    assert 0.29 * 100 < 29  # what a float product would floor to 28
    for rate in (0.29, np.float64(0.29), np.float32(0.29)):
        assert metrics.tpr_at_fpr(scores, members, rate) == (0.29, 0.29, -57.0, 29)
        assert metrics.tnr_at_fnr(-scores, ~members, rate)[:2] == (0.29, 0.29)


def test_start_of_curve():
    point = metrics.tpr_at_fpr([3.0, 2.0, 1.0], np.array([False, True, True]), 0.0)
    assert point == (0.0, 0.0, math.inf, 0)
    one_block = metrics.roc_curve(np.zeros(4), np.array([True, False, True, False]))
    assert one_block.false_positives.tolist() == [0, 2]
    assert metrics.auc(np.zeros(4), np.array([True, False, True, False])) == 0.5


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]
)
def test_tensors(dtype):
    scores = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    if dtype.is_floating_point:
        scores.requires_grad_()
    members = torch.tensor([False, True, False, True, True])
    assert metrics.auc(scores, members) == pair_auc(np.array([0, 1, 1, 0, 1]), members.numpy())


def test_member_scores_larger():
    members = np.arange(40) % 2 == 0
    assert metrics.auc(members * 1.0, members) == 1
    assert metrics.tpr_at_fpr(members * 1.0, members, 0).tpr == 1
    assert metrics.auc(members * -1.0, members) == 0


# ---------------------------------------------------------------------------------------------------- summary


def sample(targets=4, samples=120, seed=0, ties=True):
    rng = np.random.default_rng(seed)
    members = rng.random((targets, samples)) < 0.5
    scores = rng.normal(size=(targets, samples)) + members
    return (np.round(scores, 1) if ties else scores), members


def test_summary_is_the_mean_over_targets():
    scores, members = sample()
    got = metrics.summary(scores, members, fprs=(0.1, 0.01), bootstrap=20)
    rows = [metrics.summary(*row, fprs=(0.1, 0.01), bootstrap=0) for row in zip(scores, members, strict=True)]
    for name in ("auc", "balanced_accuracy"):
        assert got[name] == pytest.approx(np.mean([row[name] for row in rows]), abs=1e-15)
    aucs = [metrics.auc(*row) for row in zip(scores, members, strict=True)]
    assert got["auc_std_targets"] == pytest.approx(np.std(aucs, ddof=1))
    assert (got["targets"], got["samples"], got["bootstrap"]) == (4, 120, 20)
    for at, fpr in enumerate((0.1, 0.01)):
        points = [metrics.tpr_at_fpr(*row, fpr) for row in zip(scores, members, strict=True)]
        block = got["tpr_at_fpr"][at]
        assert block["fpr"] == fpr
        assert block["tpr"] == pytest.approx(np.mean([p.tpr for p in points]), abs=1e-15)
        assert block["realised_fpr"] == pytest.approx(np.mean([p.fpr for p in points]), abs=1e-15)
        counts = [p.false_positives for p in points]
        assert (block["false_positives_min"], block["false_positives_max"]) == (min(counts), max(counts))


def test_summary_of_one_target():
    scores, members = sample(targets=1)
    flat, row = (metrics.summary(s, m, bootstrap=5) for s, m in ((scores[0], members[0]), (scores, members)))
    assert flat == row
    assert flat["auc_std_targets"] is None
    assert json.loads(json.dumps(flat, allow_nan=False)) == flat


@pytest.mark.parametrize("digits", [0, 12])
def test_weights_are_repetitions(digits):
    """A replicate with integer weights is the metric of a sample in which each column occurs that often."""
    rng = np.random.default_rng(3)
    scores, members = (row[0] for row in sample(targets=1, samples=30))
    scores = np.round(scores + rng.normal(size=30) * (digits > 0), digits)  # with ties across members, and without any
    assert (len(np.unique(scores)) == 30) == (digits > 0)
    weights = np.concatenate([np.ones((1, 30), np.int64), rng.multinomial(30, np.full(30, 1 / 30), size=6)])
    allowed = averages._Allowed([roc.share_of("fprs", fpr) for fpr in FPRS])
    rank = roc.rank(scores, members)
    got = averages._weighted((rank, np.where(rank.member, 1 << 32, 1)), weights, allowed)
    for column, counts in enumerate(weights):
        s, m = (np.repeat(x, counts) for x in (scores, members))
        expected = [metrics.auc(s, m), *(metrics.tpr_at_fpr(s, m, fpr).tpr for fpr in FPRS)]
        assert got[:, column] == pytest.approx(expected, abs=1e-15)


def test_bootstrap_resamples_columns_together(monkeypatch):
    """Four copies of one target have the interval of one; and the size of a chunk changes no more than the draws."""
    scores, members = sample(targets=1, samples=200)
    one = metrics.summary(scores, members, bootstrap=100)
    four = metrics.summary(np.tile(scores, (4, 1)), np.tile(members, (4, 1)), bootstrap=100)
    assert [four[k] for k in ("auc", "auc_low", "auc_high")] == pytest.approx(
        [one[k] for k in ("auc", "auc_low", "auc_high")], abs=1e-14
    )
    assert one == metrics.summary(scores, members, bootstrap=100)
    assert one["auc_low"] != metrics.summary(scores, members, bootstrap=100, seed=1)["auc_low"]
    monkeypatch.setattr(averages, "_CHUNK", 1)
    tiny = metrics.summary(scores, members, bootstrap=100)
    assert tiny["bootstrap"] == 100
    assert tiny["auc_low"] == pytest.approx(one["auc_low"], abs=0.03)


def test_interval_covers_and_shrinks():
    scores, members = sample(targets=2, samples=2000, ties=False)
    wide, narrow = (metrics.summary(scores, members, bootstrap=200, confidence=c) for c in (0.95, 0.5))
    true = 0.5 * math.erfc(-0.5)  # P(N(1, 1) > N(0, 1))
    assert wide["auc_low"] < narrow["auc_low"] < wide["auc"] < narrow["auc_high"] < wide["auc_high"]
    assert wide["auc_low"] < true < wide["auc_high"]
    deviation = math.sqrt(true * (1 - true) / 500)  # rough scale of the standard error
    assert wide["auc_high"] - wide["auc_low"] < 4 * deviation


def test_degenerate_replicates_are_skipped():
    got = metrics.summary(np.array([1.0, 0.0]), np.array([True, False]), bootstrap=200)
    assert 50 < got["bootstrap"] < 150  # half of them draw one sample twice
    assert (got["auc"], got["auc_low"], got["auc_high"]) == (1, 1, 1)
    none = metrics.summary(np.array([1.0, 0.0]), np.array([True, False]), bootstrap=0)
    assert (none["bootstrap"], none["auc_low"], none["tpr_at_fpr"][0]["high"]) == (0, None, None)


def test_warning_counts_non_members():
    scores, members = sample(targets=2, samples=2500)
    members[0, :1500] = True  # few non-members in this target only
    coarse, fine = metrics.summary(scores, members, fprs=(0.01, 0.2), bootstrap=0)["tpr_at_fpr"]
    least = int((~members[0]).sum())
    assert f"of {least} non-members" in coarse["warning"]
    assert fine["warning"] is None
    exact = np.arange(2000) < 1000
    assert metrics.summary(exact * 1.0, exact, fprs=(0.01,), bootstrap=0)["tpr_at_fpr"][0]["warning"] is None


ALL = (metrics.roc_curve, metrics.auc, metrics.balanced_accuracy, metrics.summary)


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize(
    ("scores", "members", "error", "message"),
    [
        ([0.0, np.nan, np.nan], [True, False, True], ValueError, "scores must hold no NaN; got 2 of 3"),
        ([0.0, 1.0], [1, 0], TypeError, "members must have bool; got int64"),
        ([1j, 0j], [True, False], TypeError, "scores must have a real dtype; got complex128"),
        ([0.0, 1.0], [True, False, True], ValueError, "members must have the shape of scores"),
        ([0.0, 1.0], [True, True], ValueError, "members must hold .*got 2 members of 2 samples in target 0"),
        ([0.0, 1.0], [False, False], ValueError, "members must hold .*got 0 members"),
        (np.zeros(0), np.zeros(0, bool), ValueError, "members must hold"),
        (np.zeros((1, 1, 2)), np.zeros((1, 1, 2), bool), ValueError, "scores must have shape"),
        (0.5, True, ValueError, "scores must have shape"),
    ],
)
def test_bad_inputs(function, scores, members, error, message):
    with pytest.raises(error, match=message):
        function(scores, members)


def test_bad_options():
    scores, members = np.array([0.0, 1.0]), np.array([True, False])
    for fpr in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="fpr must lie in"):
            metrics.tpr_at_fpr(scores, members, fpr)
        with pytest.raises(ValueError, match="fnr must lie in"):
            metrics.tnr_at_fnr(scores, members, fpr)
        with pytest.raises(ValueError, match="fprs must lie in"):
            metrics.summary(scores, members, fprs=(fpr,))
    with pytest.raises(ValueError, match="bootstrap must be at least 0; got -1"):
        metrics.summary(scores, members, bootstrap=-1)
    with pytest.raises(ValueError, match="confidence must lie between"):
        metrics.summary(scores, members, confidence=1)
    with pytest.raises(ValueError, match="got 2 members of 2 samples in target 1"):
        metrics.summary(np.zeros((2, 2)), np.array([[True, False], [True, True]]))
    with pytest.raises(ValueError, match="got no target"):
        metrics.summary(np.zeros((0, 2)), np.zeros((0, 2), bool))
    with pytest.raises(ValueError, match="scores must have shape"):
        metrics.auc(np.zeros((2, 2)), np.ones((2, 2), bool))
