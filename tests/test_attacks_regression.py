"""Quantile regression against the same networks in NumPy, their gradients and Adam written out by hand."""

import math

import numpy as np
import pytest
import torch
from test_attacks import balanced
from test_attacks_all import finite, signals

from cwfast.mia import quantile_regression


def first_weights(features, seed):
    """What the two linear layers of torch begin with: their random numbers are no part of the attack."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = torch.nn.Linear(features, 64), torch.nn.Linear(64, 2)
    return [p.detach().double().numpy().copy() for layer in layers for p in (layer.weight, layer.bias)]


def judge(x, phi, known, alpha, seed):
    """Scores of all samples by the network fitted to those ``known``: 400 full-batch steps of Adam."""
    center, scale = phi[known].mean(), max(phi[known].std(), 1e-12)
    given, wanted, count = x[known], (phi[known] - center) / scale, len(known)
    weights = first_weights(x.shape[1], seed)
    first, second = ([np.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(400):
        inner, inner_bias, outer, outer_bias = weights
        hidden = np.tanh(given @ inner.T + inner_bias)
        mean, spread = (hidden @ outer.T + outer_bias).T
        if alpha is None:  # spread + ((wanted - mean) / exp(spread))^2 / 2
            z = (wanted - mean) * np.exp(-spread)
            to_output = np.stack([-z * np.exp(-spread), 1 - z**2], axis=1) / count
        else:  # the pinball loss: 1 - alpha for each unit that lies above, alpha for each below
            slope = np.where(wanted > mean, alpha - 1, np.where(wanted < mean, alpha, alpha - 0.5))
            to_output = np.stack([slope, np.zeros(count)], axis=1) / count
        to_hidden = (to_output @ outer) * (1 - hidden**2)
        gradients = [to_hidden.T @ given, to_hidden.sum(axis=0), to_output.T @ hidden, to_output.sum(axis=0)]
        rate = 1e-2 * (1 + math.cos(math.pi * step / 400)) / 2
        for i, gradient in enumerate(gradients):
            gradient = gradient + 1e-3 * weights[i]
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            unbiased = first[i] / (1 - 0.9 ** (step + 1)), second[i] / (1 - 0.999 ** (step + 1))
            weights[i] = weights[i] - rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    inner, inner_bias, outer, outer_bias = weights
    mean, spread = (np.tanh(x @ inner.T + inner_bias) @ outer.T + outer_bias).T
    off = (phi - center) / scale - mean
    return off / np.exp(np.clip(spread, -math.log(1e3), math.log(1e3))) if alpha is None else off * scale


def plain(phi, member, features, target, alpha, seed, population):
    """Each non-member of the population by the network of the other half, everybody else by the mean of both."""
    own = np.array([math.fsum(row) / len(row) for row in finite(phi)[target]])
    x = np.stack([(column - column.mean()) / max(column.std(), 1e-12) for column in features.T], axis=1)
    crowd = [i for i in range(len(own)) if i in population and not member[target, i]]
    drawn = np.random.default_rng([seed, target]).permutation(crowd)
    middle = -(-len(drawn) // 2)
    halves = drawn[:middle], drawn[middle:]
    judged = [judge(x, own, half, alpha, seed) for half in halves]
    scores = (judged[0] + judged[1]) / 2
    for i in range(len(own)):
        for half, other in zip(halves, reversed(judged), strict=True):
            if i in half:
                scores[i] = other[i]
    return scores


@pytest.mark.parametrize("kind", ["plain", "ties", "infinities"])
@pytest.mark.parametrize("alpha", [None, 0.1])
def test_quantile_regression_is_the_plain_form(alpha, kind):
    """Of 1,600 samples: fitted to a few dozen, deviations shrink without end, and rounding grows with them."""
    data = signals(kind, balanced, samples=1600)
    given, population = (data["phi"], data["member"], data["features"]), set(range(1600)) - set(range(0, 1600, 4))
    found = quantile_regression(*given, 4, population=sorted(population), alpha=alpha, seed=3)
    np.testing.assert_allclose(found, plain(*given, 4, alpha, 3, population), rtol=1e-9, atol=1e-9)


def test_every_row_is_the_row_by_itself():
    data = signals("ties", balanced, models=3)
    given = data["phi"], data["member"], data["features"]
    every = quantile_regression(*given)
    for target, row in enumerate(every):
        np.testing.assert_array_equal(row, quantile_regression(*given, target))


@pytest.mark.parametrize("alpha", [None, 0.1])
def test_features_that_say_nothing_and_signals_that_are_all_the_same(alpha):
    """A constant feature is one of zeros; non-members alike leave a spread of 1e-12, and no score is infinite."""
    rng = np.random.default_rng(5)
    member = balanced(rng, 4, 30)
    phi = np.where(member, 5.0, 1.0)
    scores = quantile_regression(phi, member, np.full((30, 2), 7.0), 1, alpha=alpha)
    assert np.isfinite(scores).all()
    assert scores[member[1]].min() > scores[~member[1]].max()
