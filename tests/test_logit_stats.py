"""logit_stats on every backend: against the formulas in float64 numpy, at ordinary and extreme logits."""

import numpy as np
import pytest
import torch

from cwfast import ops
from cwfast.testing import assert_no_worse


def naive(z, y):
    """Textbook formulas in long double; only for moderate logits, where nothing cancels."""
    z = z.double().numpy().astype(np.longdouble)
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


def no_worse(stats, z, y):
    """Each value is as near to the truth as the reference in the same precision; flags are equal."""
    truth, plain = (ops.logit_stats(x, y, backend="reference")._asdict() for x in (z.double(), z))
    if z.dtype == torch.float64:
        truth = {name: torch.from_numpy(value.astype(np.float64)) for name, value in naive(z, y).items()}
    for name, value in stats._asdict().items():
        if name == "correct":
            assert torch.equal(value, plain[name])
        else:
            assert_no_worse(value, truth[name], plain[name])


@pytest.mark.parametrize("classes", [2, 3, 10, 101])
def test_equals_the_formulas(backend, classes):
    z, y = 2 * torch.randn(200, classes, dtype=torch.float64), torch.randint(classes, (200,))
    stats, expected = ops.logit_stats(z, y, backend=backend), naive(z, y)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(stats, name).numpy(), value, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "classes"), [(1, 2), (7, 2), (8, 3), (15, 10), (16, 63), (17, 64), (33, 65), (5, 130), (40, 1025)]
)
def test_no_worse_than_the_reference(kernel, dtype, rows, classes):
    if kernel == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    z, y = (5 * torch.randn(rows, classes, dtype=torch.float64)).to(dtype), torch.randint(classes, (rows,))
    stats = ops.logit_stats(z, y, backend=kernel)
    assert {x.dtype for x in stats} == {torch.bool, torch.promote_types(dtype, torch.float32)}
    no_worse(stats, z, y)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e3])
def test_no_worse_at_any_scale(kernel, scale):
    z, y = scale * torch.randn(64, 20), torch.randint(20, (64,))
    z[torch.arange(32), y[:32]] += 3 * scale  # members: the label dominates
    no_worse(ops.logit_stats(z, y, backend=kernel), z, y)


@pytest.mark.parametrize("view", ["sliced", "transposed", "expanded", "offset"])
def test_any_strides(backend, view):
    z = {
        "sliced": torch.randn(38, 21)[::2, ::2],
        "transposed": torch.randn(11, 19).T,
        "expanded": torch.randn(19, 1).expand(19, 11),
        "offset": torch.randn(19 * 11 + 1)[1:].view(19, 11),
    }[view]
    y = torch.randint(11, (38,))[::2]
    for strided, dense in zip(
        ops.logit_stats(z, y, backend=backend),
        ops.logit_stats(z.contiguous(), y.contiguous(), backend=backend),
        strict=True,
    ):
        assert torch.equal(strided, dense)


def test_same_bits_on_every_instruction_set_thread_count_and_run(set_threads):
    native = pytest.importorskip("cwfast._C")
    z, y = 4 * torch.randn(4000, 37), torch.randint(37, (4000,))
    before, results = native.isa(), []
    for isa in native.isas() * 2:
        native.set_isa(isa)
        set_threads(1 + len(results) % 2)
        results.append(torch.stack([x.float() for x in ops.logit_stats(z, y, backend="cpu")]))
    native.set_isa(before)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(results[0][:, 7:8], torch.stack([x.float() for x in ops.logit_stats(z[7:8], y[7:8])]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_is_read_exactly(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    z = torch.stack([x, torch.zeros_like(x)], dim=1)
    margin = ops.logit_stats(z, torch.zeros(len(z), dtype=torch.int64)).margin
    finite = x.isfinite()
    assert torch.equal(margin[finite], x[finite].float())
    low = x == -torch.inf
    assert torch.equal(margin[low], x[low].float())
    assert margin[~finite & ~low].isnan().all()


def test_phi_keeps_what_one_minus_p_loses(backend):
    z = torch.tensor([[90.0, 0.0, 0.0], [-90.0, 0.0, 0.0]])
    stats = ops.logit_stats(z, torch.tensor([0, 0]), backend=backend)
    expected = torch.tensor([90.0, -90.0]) - torch.log(torch.tensor(2.0))
    torch.testing.assert_close(stats.phi, expected)
    assert stats.margin.tolist() == [90, -90]


def test_extreme_logits_stay_finite(backend):
    z = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4], [3e38, -3e38, 0.0]])
    stats = ops.logit_stats(z, torch.tensor([0, 0, 0]), backend=backend)
    for name in stats._fields:
        assert getattr(stats, name).float().isfinite().all() or name in ("phi", "margin"), name
    assert stats.loss.tolist()[:2] == [0, 2e4]


def test_classes_of_probability_zero(backend):
    inf = torch.inf
    z = torch.tensor([[0.0, -inf, 0.0], [-inf, 0.0, 0.0], [0.0, -inf, -inf]])
    stats = ops.logit_stats(z, torch.tensor([0, 0, 0]), backend=backend)
    assert stats.entropy.tolist() == pytest.approx([np.log(2), np.log(2), 0])
    assert stats.confidence.tolist() == pytest.approx([0.5, 0, 1])
    assert stats.loss.tolist() == pytest.approx([np.log(2), inf, 0])
    assert stats.phi.tolist() == [0, -inf, inf]
    assert stats.margin.tolist() == [0, -inf, inf]
    assert stats.modified_entropy.tolist() == pytest.approx([np.log(2), -np.log(1e-30) + np.log(2), 0])
    assert stats.correct.tolist() == [True, False, True]


def test_rows_without_probabilities_are_nan_and_not_correct(backend):
    nan, inf = torch.nan, torch.inf
    z = torch.tensor([[0.0, nan, 0.0], [nan, 0.0, 0.0], [inf, 0.0, 0.0], [0.0, 0.0, inf], [-inf] * 3, [1.0, 0.0, 0.0]])
    stats = ops.logit_stats(z, torch.zeros(6, dtype=torch.int64), backend=backend)
    for name in stats._fields:
        value = getattr(stats, name)
        assert (
            value.tolist() == [False] * 5 + [True]
            if name == "correct"
            else value.isnan().tolist() == [True] * 5 + [False]
        )


def test_ties_count_for_the_lowest_class(backend):
    z = torch.tensor([[0.0] * 3, [0.0] * 3, [-1.0, 2.0, 2.0], [-1.0, 2.0, 2.0], [-0.0, 0.0, -1.0]])
    stats = ops.logit_stats(z, torch.tensor([0, 1, 1, 2, 1]), backend=backend)
    assert stats.correct.tolist() == [True, False, True, False, False]


def test_no_rows_and_no_graph(backend):
    stats = ops.logit_stats(torch.zeros(0, 3, requires_grad=True), torch.zeros(0, dtype=torch.int64), backend=backend)
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


def test_operator_contract(backend):
    torch.library.opcheck(torch.ops.cwfast.logit_stats.default, (torch.randn(5, 3), torch.randint(3, (5,)), backend))
