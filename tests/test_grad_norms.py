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


def test_norms_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="grad_outputs must have shape"):
        ops.per_sample_grad_norms(torch.zeros(2, 3, 4), torch.zeros(2, 2, 4))
    with pytest.raises(TypeError, match="grad_outputs must have dtype"):
        ops.per_sample_grad_norms(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.float64))
