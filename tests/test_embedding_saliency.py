"""accumulate_embedding_saliency_ and per_sample_grad_norms: equal to per-sample gradients in memory."""

import pytest
import torch
from conftest import why_not

from cwfast import ops
from cwfast.testing import assert_no_worse

V, D = 13, 5
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(why_not(name)), reason=f"{name}: {why_not(name)}"))
    for name in ("reference", "cpu", "triton")
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def integers(*shape, dtype=torch.float32):
    """Their sums are exact in every order, so that results must be equal by bits."""
    return torch.randint(-3, 4, shape).to(dtype)


def gradients(indices, grads, samples_of):
    """[B, V, D]"""
    found = torch.zeros(max(samples_of, default=-1) + 1, V, D, dtype=torch.float64)
    for sample, token, row in zip(samples_of, indices.reshape(-1).tolist(), grads.reshape(-1, D).double(), strict=True):
        found[sample, token] += row
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding_idx", [None, 0, 12])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("with_factor", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (6,), (0, 3), (4, 0), (1, 1), (4, 50)], ids=str)
def test_exact_on_integers(shape, dtype, with_factor, power, padding_idx, backend):
    indices, grads = torch.randint(V, shape), integers(*shape, D, dtype=dtype)
    factor = integers(V, D) if with_factor else None
    out = integers(V, D, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    samples = [b for b in range(shape[0]) for _ in range(shape[1] if len(shape) == 2 else 1)]
    each = gradients(indices, grads, samples)
    if padding_idx is not None:
        each[:, padding_idx] = 0
    scaled = 2 * each * (1 if factor is None else factor.double())
    expected = out.double() + scaled.abs().pow(power).sum(dim=0)
    done = ops.accumulate_embedding_saliency_(
        out, indices, grads, power=power, factor=factor, padding_idx=padding_idx, scale=2.0, backend=backend
    )
    assert done is out
    assert torch.equal(out.double(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_samples(backend):
    ends = torch.tensor([0, 3, 3, 10])
    indices, grads = torch.randint(V, (10,)), integers(10, D)
    out = torch.zeros(V, D)
    ops.accumulate_embedding_saliency_(out, indices, grads, cu_seqlens=ends, backend=backend)
    assert torch.equal(out.double(), gradients(indices, grads, [0] * 3 + [2] * 7).abs().sum(dim=0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_worse_than_torch_and_the_same_bits_every_time(backend):
    indices, grads, factor = torch.randint(V, (8, 100)), torch.randn(8, 100, D), torch.randn(V, D)
    samples = [b for b in range(8) for _ in range(100)]
    truth = (gradients(indices, grads, samples) * factor.double()).abs().sum(dim=0)
    plain = torch.zeros(8, V, D).index_put_((torch.tensor(samples), indices.reshape(-1)), grads.reshape(-1, D), True)
    outs = [torch.zeros(V, D) for _ in range(20)]
    for out in outs:
        ops.accumulate_embedding_saliency_(out, indices, grads, factor=factor, backend=backend)
    assert_no_worse(outs[0], truth, (plain * factor).abs().sum(dim=0))
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row_and_out_may_have_any_strides(backend):
    grads = torch.ones(2, 3, D)
    grads[1, 2] = torch.nan
    out = torch.zeros(D, V).t()
    ops.accumulate_embedding_saliency_(out, torch.tensor([[0, 1, 1], [2, 2, 4]]), grads, backend=backend)
    assert out[4].isnan().all()
    assert out[:4, 0].tolist() == [1, 2, 2, 0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": torch.tensor([[0, V]])}, ValueError, r"indices must be rows of out, 0 to 12; got 0 to 13"),
        ({"indices": torch.tensor([[-1, 0]])}, ValueError, "indices must be rows of out"),
        ({"indices": torch.tensor([[0.0, 1]])}, TypeError, "indices must have dtype"),
        ({"grad_outputs": torch.zeros(1, 3, D)}, ValueError, "grad_outputs must have shape"),
        ({"padding_idx": V}, ValueError, "padding_idx must be a row"),
        ({"power": 3}, ValueError, "power must be 1 or 2"),
        ({"factor": torch.zeros(V)}, ValueError, "factor must have shape"),
        ({"out": torch.zeros(V, D, dtype=torch.float16)}, TypeError, "out must have dtype"),
        ({"backend": "magic"}, ValueError, "backend must be one of"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = {"out": torch.zeros(V, D), "indices": torch.tensor([[0, 1]]), "grad_outputs": torch.zeros(1, 2, D)}
    with pytest.raises(error, match=message):
        ops.accumulate_embedding_saliency_(**{**arguments, **change})


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
