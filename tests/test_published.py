"""Signals as other authors compute them, against loops over single rows in float64."""

import math

import numpy as np
import pytest
import torch

from cwfast import ops
from cwfast.mia import Signals, metrics, phi_carlini, rmia, taylor_logprob


def logits(queries=None, scale=2.0, seed=0):
    shape = (3, 20, 7) if queries is None else (3, 20, queries, 7)
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64), torch.arange(20) % 7


def rows(z, labels):
    """(row of logits, label) of each entry of a result."""
    for index in np.ndindex(z.shape[:-1]):
        yield index, z[index].tolist(), int(labels[index[1]])


@pytest.mark.parametrize("queries", [None, 2, 20])
@pytest.mark.parametrize(
    ("temperature", "margin", "degree"), [(2.0, 0.6, 2), (1.0, 0.0, 4), (9.0, 0.6, 1), (2.0, 0.6, 3)]
)
def test_taylor_softmax_is_the_series(queries, temperature, margin, degree):
    z, labels = logits(queries, scale=0.5)

    def series(u):
        return sum(u**i / math.factorial(i) for i in range(degree + 1))

    found = taylor_logprob(z, labels, temperature=temperature, margin=margin, degree=degree)
    assert found.shape == z.shape[:-1]
    for index, row, y in rows(z, labels):
        u = [value / temperature for value in row]
        own = series(u[y] - margin)
        p = own / (sum(series(value) for value in u) - series(u[y]) + own)
        assert float(found[index]) == pytest.approx(math.log(p), rel=1e-9, abs=1e-12)


def test_an_odd_degree_leaves_the_probabilities_and_says_so():
    z, labels = torch.tensor([[[-9.0, 1.0], [9.0, -9.0], [1.0, 0.0]]]), torch.tensor([0, 0, 0])
    with pytest.warns(UserWarning, match="2 of 3 probabilities of the Taylor softmax of degree 3 lie outside"):
        found = taylor_logprob(z, labels)
    assert found[0, :2].tolist() == [-math.inf, 0.0]  # t(-5.1) < 0; t(-4.5) < 0 makes the other larger than 1
    assert -1 < float(found[0, 2]) < 0
    even = taylor_logprob(z, labels, degree=4)
    assert torch.isfinite(even).all()
    assert (even < 0).all()


def test_rmia_takes_taylor_probabilities():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(200) % 7
    member = np.argsort(np.random.default_rng(0).random((6, 200)), axis=0) < 3
    z = torch.randn(6, 200, 7, generator=generator)
    z += 3 * torch.nn.functional.one_hot(labels, 7) * torch.from_numpy(member)[..., None]
    scores = rmia(taylor_logprob(z, labels, degree=4), member)
    assert min(metrics.auc(*row) for row in zip(scores, member, strict=True)) > 0.9


@pytest.mark.parametrize("queries", [None, 2])
def test_phi_of_the_released_code(queries):
    z, labels = logits(queries, scale=40.0)
    found = phi_carlini(z, labels)
    exact = ops.logit_stats(z.reshape(-1, 7), labels.repeat_interleave(queries or 1).repeat(3)).phi.reshape(found.shape)
    for index, row, y in rows(z, labels):
        p = np.exp(np.array(row) - max(row))
        p /= p.sum()
        rest = p.copy()
        rest[y] = 0
        assert float(found[index]) == pytest.approx(np.log(p[y] + 1e-45) - np.log(rest.sum() + 1e-45), rel=1e-12)
    near = exact.abs() < 20
    torch.testing.assert_close(found[near], exact[near].double(), rtol=1e-5, atol=1e-5)
    assert near.any()
    assert (exact.abs() > 110).any()
    assert found.abs().max() < 103.7


def test_signals_with_phi_of_the_released_code():
    z, labels = logits(2, scale=40.0)
    member = torch.arange(60).view(3, 20) % 2 == 0
    assert torch.equal(Signals.from_logits(z, labels, member, phi_mode="carlini")["phi"], phi_carlini(z, labels))
    plain = Signals.from_logits(z, labels, member)
    assert float(plain["phi"].abs().max()) > 110
    assert torch.equal(plain["loss"], Signals.from_logits(z, labels, member, phi_mode="carlini")["loss"])
    with pytest.raises(ValueError, match="phi_mode must be one of lse, carlini; got 'other'"):
        Signals.from_logits(z, labels, member, phi_mode="other")


@pytest.mark.parametrize("function", [phi_carlini, taylor_logprob])
def test_wrong_inputs(function):
    z, labels = logits()
    with pytest.raises(TypeError, match=r"got torch\.int64 and torch\.int64"):
        function(z.long(), labels)
    with pytest.raises(TypeError, match=r"got torch\.float64 and torch\.int32"):
        function(z, labels.int())
    for wrong, targets in ((z[0], labels), (z, labels[:5])):
        with pytest.raises(
            ValueError, match=r"logits must have shape \[K, N, C\] or \[K, N, Q, C\], labels \[N\]; got"
        ):
            function(wrong, targets)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 7\); got 1 to 7"):
        function(z, labels + 1)


def test_wrong_options_of_the_taylor_softmax():
    z, labels = logits()
    with pytest.raises(ValueError, match="temperature must be above 0; got 0"):
        taylor_logprob(z, labels, temperature=0)
    with pytest.raises(ValueError, match="degree must be at least 1; got 0"):
        taylor_logprob(z, labels, degree=0)
