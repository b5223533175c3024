"""per_sample_grad_norms: equal to the norms of per-sample gradients in memory."""

import pytest
import torch

from cwfast import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def integers(*shape, dtype):
    """Their sums are exact in every order, so that results must be equal by bits."""
    return torch.randint(-3, 4, shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("samples", "steps", "inputs", "outputs"),
    [(0, 3, 4, 5), (3, 0, 4, 5), (6, 1, 4, 5), (4, 3, 16, 16), (3, 50, 4, 5), (2, 7, 1, 9)],
)
def test_norms_of_linear_gradients(samples, steps, inputs, outputs, dtype):
    """Small steps take the Gram tables, many steps the gradients themselves."""
    a, d = integers(samples, steps, inputs, dtype=dtype), integers(samples, steps, outputs, dtype=dtype)
    squares = (d.double().mT @ a.double()).square().sum(dim=(1, 2))
    found = ops.per_sample_grad_norms(a, d)
    assert torch.equal(found.double(), squares.to(found.dtype).sqrt().double())
    ends = torch.arange(samples + 1) * steps
    assert torch.equal(ops.per_sample_grad_norms(a.flatten(0, 1), d.flatten(0, 1), cu_seqlens=ends), found)
    if steps == 1:
        assert torch.equal(ops.per_sample_grad_norms(a[:, 0], d[:, 0]), found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rate", [0, 0.02, 0.5, 1])
@pytest.mark.parametrize(
    ("samples", "steps", "inputs", "outputs"),
    [(0, 3, 4, 5), (3, 0, 4, 5), (6, 1, 9, 11), (4, 3, 16, 16), (3, 50, 4, 5), (2, 7, 1, 9), (2, 2, 300, 200)],
)
def test_excluded_entries_do_not_count(samples, steps, inputs, outputs, rate, dtype):
    a, d = integers(samples, steps, inputs, dtype=dtype), integers(samples, steps, outputs, dtype=dtype)
    exclude = (torch.rand(outputs * inputs) < rate).nonzero()[:, 0] if rate < 1 else torch.arange(outputs * inputs)
    gradients = (d.double().mT @ a.double()).flatten(1)
    gradients[:, exclude] = 0
    found = ops.per_sample_grad_norms(a, d, exclude=exclude)
    assert torch.equal(found, gradients.square().sum(dim=1).to(found.dtype).sqrt())
    ends = torch.arange(samples + 1) * steps
    packed = ops.per_sample_grad_norms(a.flatten(0, 1), d.flatten(0, 1), cu_seqlens=ends, exclude=exclude)
    assert torch.equal(packed, found)
    if steps == 1:
        assert torch.equal(ops.per_sample_grad_norms(a[:, 0], d[:, 0], exclude=exclude), found)


@pytest.mark.parametrize("steps", [1, 2, 40])
@pytest.mark.parametrize("left", [1.0, 1e-3])
def test_what_is_left_keeps_its_digits_where_the_excluded_entries_are_nearly_all(steps, left):
    """The excluded rows' gradients are 1e6 times and more as large as the others'."""
    d = torch.randn(5, steps, 30) * torch.where(torch.arange(30) < 10, 1e3, left)
    a = torch.randn(5, steps, 60)
    exclude = torch.arange(10 * 60)
    wanted = (d[..., 10:].double().mT @ a.double()).square().sum(dim=(1, 2)).sqrt()
    found = ops.per_sample_grad_norms(a, d, exclude=exclude)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_what_is_not_finite_stays_so_beside_excluded_entries(steps, value):
    a, d = torch.randn(2, steps, 30), torch.randn(2, steps, 20)
    a[0, 0, 3] = value
    found = ops.per_sample_grad_norms(a, d, exclude=torch.tensor([4, 70]))
    assert found.isfinite().tolist() == [False, True]


def test_norms_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="grad_outputs must have shape"):
        ops.per_sample_grad_norms(torch.zeros(2, 3, 4), torch.zeros(2, 2, 4))
    with pytest.raises(TypeError, match="grad_outputs must have dtype"):
        ops.per_sample_grad_norms(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.float64))
    wrong = [[3, 2], [2, 2], [-1, 0], [0, 20]]
    for exclude in wrong:
        with pytest.raises(ValueError, match="exclude must be ascending"):
            ops.per_sample_grad_norms(torch.zeros(2, 4), torch.zeros(2, 5), exclude=torch.tensor(exclude))
    with pytest.raises(TypeError, match="exclude must have dtype"):
        ops.per_sample_grad_norms(torch.zeros(2, 4), torch.zeros(2, 5), exclude=torch.zeros(2))
