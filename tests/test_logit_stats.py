"""logit_stats against the formulas in float64 numpy, at ordinary and extreme logits."""

import numpy as np
import pytest
import torch

from cwfast import ops


def naive(z, y):
    """Textbook formulas; only for moderate logits, where nothing cancels."""
    z = z.double().numpy()
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    rows, y = np.arange(len(z)), y.numpy()
    p_y, other = p[rows, y], p.copy()
    other[rows, y] = 0
    rest = z.copy()
    rest[rows, y] = -np.inf
    return {
        "loss": -np.log(p_y),
        "confidence": p_y,
        "phi": np.log(p_y) - np.log(other.sum(axis=1)),
        "entropy": -(p * np.log(p)).sum(axis=1),
        "modified_entropy": -(1 - p_y) * np.log(p_y) - (other * np.log1p(-other)).sum(axis=1),
        "correct": z.argmax(axis=1) == y,
        "margin": z[rows, y] - rest.max(axis=1),
    }


@pytest.mark.parametrize("classes", [2, 3, 10, 101])
def test_equals_the_formulas(classes):
    z, y = 2 * torch.randn(200, classes, dtype=torch.float64), torch.randint(classes, (200,))
    stats, expected = ops.logit_stats(z, y), naive(z, y)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(stats, name).numpy(), value, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precisions_compute_in_float32(dtype):
    z, y = (5 * torch.randn(200, 7)).to(dtype), torch.randint(7, (200,))
    stats, truth = ops.logit_stats(z, y), ops.logit_stats(z.double(), y)
    for name in stats._fields:
        value = getattr(stats, name)
        assert value.dtype == (torch.bool if name == "correct" else torch.float32)
        torch.testing.assert_close(value.double(), getattr(truth, name).double(), rtol=2e-5, atol=2e-6)


def test_phi_keeps_what_one_minus_p_loses():
    z = torch.tensor([[90.0, 0.0, 0.0], [-90.0, 0.0, 0.0]])
    stats = ops.logit_stats(z, torch.tensor([0, 0]))
    expected = torch.tensor([90.0, -90.0]) - torch.log(torch.tensor(2.0))
    torch.testing.assert_close(stats.phi, expected)
    assert stats.margin.tolist() == [90, -90]


def test_extreme_logits_stay_finite():
    z = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4], [3e38, -3e38, 0.0]])
    stats = ops.logit_stats(z, torch.tensor([0, 0, 0]))
    for name in stats._fields:
        assert getattr(stats, name).float().isfinite().all() or name in ("phi", "margin"), name
    assert stats.loss.tolist()[:2] == [0, 2e4]


def test_a_class_of_probability_zero():
    stats = ops.logit_stats(torch.tensor([[0.0, -torch.inf, 0.0]]), torch.tensor([0]))
    assert stats.entropy.item() == pytest.approx(np.log(2))
    assert stats.confidence.item() == pytest.approx(0.5)
    assert not stats.modified_entropy.isnan().any()


def test_ties_count_for_the_lowest_class():
    assert ops.logit_stats(torch.zeros(2, 3), torch.tensor([0, 1])).correct.tolist() == [True, False]


def test_no_rows_and_no_graph():
    stats = ops.logit_stats(torch.zeros(0, 3, requires_grad=True), torch.zeros(0, dtype=torch.int64))
    assert all(len(value) == 0 and not value.requires_grad for value in stats)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), ValueError, "logits must have 2 dimensions"),
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), ValueError, "at least 2 classes"),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), ValueError, "labels must have shape"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), ValueError, "labels must lie in 0 .. 1; got 0 to 2"),
        (torch.zeros(3, 2), torch.tensor([0, -1, 1]), ValueError, "labels must lie in 0 .. 1; got -1 to 1"),
        (torch.zeros(3, 2), torch.zeros(3), TypeError, "labels must have dtype"),
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), TypeError, "logits must have dtype"),
    ],
)
def test_wrong_arguments(logits, labels, error, message):
    with pytest.raises(error, match=message):
        ops.logit_stats(logits, labels)


def test_operator_contract():
    torch.library.opcheck(
        torch.ops.cwfast.logit_stats.default, (torch.randn(5, 3), torch.randint(3, (5,)), "reference")
    )
