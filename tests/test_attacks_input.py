"""What the attacks refuse: each error names what must hold and what was given."""

import math

import numpy as np
import pytest

from cwfast.mia import lira, loss, rmia

MEMBER = np.arange(8)[:, None] % 2 == np.arange(12)[None] % 2
LOGPROB = np.full((8, 12), -1.0)


def put(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(("attack", "signal"), [(lira, "phi"), (rmia, "logprob"), (loss, "logprob")])
def test_bad_arrays(attack, signal):
    holes = put(put(LOGPROB, (0, 1), np.nan), (2, 2), -np.inf)
    cases = [
        (holes, MEMBER, ValueError, f"{signal} must hold no NaN; got 1 of 96"),
        (LOGPROB[0], MEMBER, ValueError, rf"{signal} must have shape \[K, N\]"),
        (LOGPROB[:, :0], MEMBER[:, :0], ValueError, f"{signal} must have shape"),
        (LOGPROB.astype(int), MEMBER, TypeError, f"{signal} must have a floating-point dtype; got int64"),
        (LOGPROB, MEMBER.astype(int), TypeError, "membership must have bool; got int64"),
        (LOGPROB, MEMBER[:, :5], ValueError, r"membership must have shape \[K, N\] = \(8, 12\); got \(8, 5\)"),
    ]
    for values, member, error, message in cases:
        with pytest.raises(error, match=message):
            attack(values, member)
    for target, error in ((8, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="target must"):
            attack(LOGPROB, MEMBER, target)


def test_bad_lira_options_and_a_loss_for_a_logprob():
    for option in ("mode", "variance", "center"):
        with pytest.raises(ValueError, match=f"{option} must be one of .*; got 'other'"):
            lira(LOGPROB, MEMBER, **{option: "other"})
    for attack in (rmia, loss):
        with pytest.raises(ValueError, match=r"logprob must be at most 0 .*got a maximum of 1"):
            attack(-LOGPROB, MEMBER)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "both"}, ValueError, "mode must be one of online, offline; got 'both'"),
        ({"gamma": 0}, ValueError, "gamma must be above 0"),
        ({"gamma": math.inf}, ValueError, "gamma must be above 0 and finite"),
        ({"a": 1.5}, ValueError, r"a must lie in \[0, 1\]; got 1.5"),
        ({"population": np.ones(12, bool)}, TypeError, "population must have an integer dtype; got bool"),
        ({"population": [[1, 2]]}, ValueError, "population must be one-dimensional"),
        ({"population": [1, 12]}, ValueError, r"population must hold indices in \[0, 12\); got 1 to 12"),
        ({"population": [-1, 3]}, ValueError, "population must hold indices"),
        ({"population": [1, 3, 3]}, ValueError, "population must hold distinct indices; got 1 repeats"),
        ({"population": [1, 2, 4]}, ValueError, "population must hold at least 2 non-members of target 0; got 1"),
    ],
)
def test_bad_rmia_options(options, error, message):
    with pytest.raises(error, match=message):
        rmia(LOGPROB, MEMBER, **options)


def test_too_few_models():
    phi = np.random.default_rng(17).normal(size=(8, 12))
    everywhere = put(MEMBER, (slice(None), 5), True)
    nowhere = put(MEMBER, (slice(None), 5), False)
    with pytest.raises(ValueError, match=r"at least 1 OUT models besides target 0 .*; sample 5 has 0"):
        lira(phi, everywhere)
    with pytest.raises(ValueError, match=r"at least 1 OUT models besides target 0 .*; sample 5 has 0"):
        rmia(LOGPROB, everywhere, mode="offline")
    with pytest.raises(ValueError, match=r"at least 1 IN models besides target 0 .*; sample 5 has 0"):
        lira(phi, nowhere)
    assert np.isfinite(lira(phi, nowhere, mode="offline")).all()
    assert np.isfinite(rmia(LOGPROB, everywhere)).all()
    single = put(nowhere, (3, 5), True)
    with pytest.raises(ValueError, match=r"at least 2 IN models besides target 0 .*; sample 5 has 1"):
        lira(phi, single, 0, variance="per_example")
    assert np.isfinite(lira(phi, single, 0)).all()
    with pytest.raises(ValueError, match=r"some sample at least 2 OUT models besides target 0 .*; each has 1"):
        lira(phi[:4], MEMBER[:4])
    with pytest.raises(ValueError, match="at least 1 other models besides target 0"):
        rmia(LOGPROB[:1], MEMBER[:1])
