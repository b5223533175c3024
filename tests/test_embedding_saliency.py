"""accumulate_embedding_saliency_: equal to per-sample gradients in memory."""

import pytest
import torch
from conftest import why_not

from cwfast import ops
from cwfast.errors import BackendUnavailable
from cwfast.testing import assert_no_worse

V, D = 13, 5
# The CPU kernel is the same on each instruction set.
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(why_not(name)), reason=f"{name}: {why_not(name)}"))
    for name in ("reference", "cpu", "triton")
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def integers(*shape, dtype=torch.float32):
    """Their sums are exact in every order, so that results must be equal by bits."""
    return torch.randint(-3, 4, shape).to(dtype)


def gradients(indices, grads, samples_of, words=V, columns=D):
    """[B, V, D]"""
    found = torch.zeros(max(samples_of, default=-1) + 1, words, columns, dtype=torch.float64)
    rows = grads.reshape(-1, columns).double()
    for sample, token, row in zip(samples_of, indices.reshape(-1).tolist(), rows, strict=True):
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
    grad = torch.full_like(out, torch.nan)
    options = {"power": power, "factor": factor, "padding_idx": padding_idx, "scale": 2.0, "backend": backend}
    done = ops.accumulate_embedding_saliency_(out, indices, grads, grad=grad, overwrite_grad=True, **options)
    assert done is out
    assert torch.equal(out.double(), expected)
    assert torch.equal(grad.double(), each.sum(dim=0))


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


# Rows, vocabulary and columns beyond one chunk, one block and one digit of the CPU kernel, and around its edges. Nearly
# all tokens are equal in "frequent": there the columns are shared among the threads.
LARGE = {
    "many_chunks": (4, 500, 3000, 50),
    "two_digits": (2, 300, 70_000, 2),
    "one_column": (3, 70_000, 7, 1),
    "frequent": (3, 400, 40, 257),
    "wide": (2, 20, 11, 1031),
    "block": (2, 30, 5, 256),
}


def large(name, dtype=torch.float32):
    samples, steps, words, columns = LARGE[name]
    indices, grads = torch.randint(words, (samples, steps)), integers(samples, steps, columns, dtype=dtype)
    if name == "frequent":
        indices[torch.rand(indices.shape) < 0.95] = 17
    return indices, grads, integers(words, columns)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("strides", ["dense", "rows_apart", "columns_apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large_exactly(name, dtype, strides, backend):
    indices, grads, factor = large(name, dtype)

    def laid(x):
        if strides == "rows_apart":
            return torch.cat([x, torch.full_like(x, torch.nan)], dim=-1)[..., : x.shape[-1]]
        return x.mT.contiguous().mT if strides == "columns_apart" else x

    found = []
    for which in ("reference", backend):
        out, grad = laid(torch.zeros(factor.shape)), laid(torch.ones(factor.shape))
        ops.accumulate_embedding_saliency_(
            out, indices, laid(grads), factor=laid(factor), grad=grad, padding_idx=3, backend=which
        )
        ops.accumulate_embedding_saliency_(
            out, indices, laid(grads), power=2, factor=laid(factor).to(dtype), grad=grad, backend=which
        )
        found.append((out, grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("backend", BACKENDS[1:2])
@pytest.mark.parametrize("name", LARGE)
def test_the_same_bits_for_any_number_of_threads(name, backend, set_threads):
    indices, grads, factor = large(name)
    grads, factor = torch.randn_like(grads), torch.randn_like(factor)
    found = []
    for run in range(20):
        set_threads(1 + run % 4)
        out, grad = torch.zeros_like(factor), torch.full_like(factor, torch.nan)
        ops.accumulate_embedding_saliency_(
            out, indices, grads, factor=factor, grad=grad, overwrite_grad=True, backend=backend
        )
        found.append((out, grad))
    for out, grad in found:
        assert torch.equal(out, found[0][0])
        assert torch.equal(grad, found[0][1])


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("power", [1, 2])
def test_numbers_that_are_not_ordinary(power, backend):
    """Every float16 pattern, as a gradient and as a factor: subnormal numbers, infinities, NaN."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).reshape(1, 64, 1024)
    for grads, factor in ((every, torch.ones(64, 1024)), (torch.ones(1, 64, 1024), every[0])):
        out, grad = torch.zeros(64, 1024), torch.zeros(64, 1024)
        indices = torch.randperm(64)[None]
        ops.accumulate_embedding_saliency_(out, indices, grads, power=power, factor=factor, grad=grad, backend=backend)
        product = torch.zeros(64, 1024).index_copy_(0, indices[0], grads[0].float())
        torch.testing.assert_close(grad, product, rtol=0, atol=0, equal_nan=True)
        expected = product.abs().pow(power) * factor.float().abs().pow(power)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_no_columns_and_no_vocabulary():
    for shape in ((4, 0), (0, 3), (0, 0)):
        indices = torch.randint(4, (2, 3)) if shape[0] else torch.zeros((2, 0), dtype=torch.int64)
        out, grad = torch.zeros(shape), torch.full(shape, torch.nan)
        ops.accumulate_embedding_saliency_(
            out, indices, torch.zeros(*indices.shape, shape[1]), grad=grad, overwrite_grad=True
        )
        assert not grad.isnan().any()


def test_cuda_says_why_it_cannot_run_here():
    with pytest.raises(BackendUnavailable, match=r"backend 'cuda' (is not available: \w+|needs CUDA tensors)"):
        ops.accumulate_embedding_saliency_(torch.zeros(V, D), torch.tensor([0]), torch.ones(1, D), backend="cuda")


def test_opcheck_and_versions():
    out, grad = torch.zeros(V, D), torch.zeros(V, D)
    owner, tokens, grads = torch.tensor([0, 0, 1]), torch.tensor([1, 1, 4]), torch.ones(3, D)
    op = torch.ops.cwfast.accumulate_embedding_saliency_.default
    torch.library.opcheck(op, (out, owner, tokens, grads, 1, 2.0, torch.ones(V, D), -1, "auto", grad, True))
    before = out._version, grad._version
    ops.accumulate_embedding_saliency_(out, torch.tensor([[1]]), torch.ones(1, 1, D), grad=grad)
    assert out._version > before[0]
    assert grad._version > before[1]


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
        ({"out": torch.zeros(1, D).expand(V, D)}, ValueError, "out is written, and no two of its entries may share"),
        ({"grad": torch.zeros(V, 1).expand(V, D)}, ValueError, "grad is written, and no two of its entries may share"),
        ({"grad": torch.zeros(V)}, ValueError, "grad must have shape"),
        ({"grad": torch.zeros(V, D, dtype=torch.float64)}, TypeError, "grad must have dtype"),
        ({"backend": "magic"}, ValueError, "backend must be one of"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = {"out": torch.zeros(V, D), "indices": torch.tensor([[0, 1]]), "grad_outputs": torch.zeros(1, 2, D)}
    with pytest.raises(error, match=message):
        ops.accumulate_embedding_saliency_(**{**arguments, **change})
