"""accumulate_saliency_: exact on small integers for every shape, and no less accurate than PyTorch on the rest."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cwfast import _backends, ops
from cwfast.ops import saliency
from cwfast.testing import assert_no_worse, guarded

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def sum_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def plain(inputs, grad_outputs, dtype, *, power=1, factor=None, cu_seqlens=None, scale=1.0):
    """What is added to out and to grad, with every sample's gradient in memory, computed in this dtype."""
    inputs, grad_outputs = inputs.to(dtype), grad_outputs.to(dtype)
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        each = [grad_outputs[a:b].T @ inputs[a:b] for a, b in itertools.pairwise(ends)]
        samples = torch.stack(each) if each else torch.zeros(0, grad_outputs.shape[1], inputs.shape[1], dtype=dtype)
    elif inputs.ndim == 2:
        samples = grad_outputs[:, :, None] * inputs[:, None, :]
    else:
        samples = grad_outputs.transpose(1, 2) @ inputs
    total = (scale * samples).abs().pow(power).sum(dim=0)
    return total if factor is None else total * factor.to(dtype).abs().pow(power), samples.sum(dim=0)


def integers(*shape, dtype=torch.float32):
    """Small integers: their products and sums are exact in every order, so that results must be equal by bits."""
    return torch.randint(-3, 4, shape).to(dtype)


def case(b, t, o, i, dtype=torch.float32, make=integers):
    """inputs and grad_outputs; t None: one row a sample, without the dimension."""
    lead = (b,) if t is None else (b, t)
    return make(*lead, i, dtype=dtype), make(*lead, o, dtype=dtype)


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "every second column": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "one sample, expanded": lambda x: x[:1].expand_as(x) if len(x) else x,
    "one column, expanded": lambda x: x[..., :1].expand_as(x),
    "between guards": lambda x: guarded(x)[0],
}


def run_exact(inputs, grad_outputs, backend, **options):
    """Run between guard bands on out and grad that hold something already, and compare with plain by bits."""
    dtype = sum_dtype(inputs.dtype)
    shape = grad_outputs.shape[-1], inputs.shape[-1]
    (out, check_out), (grad, check_grad) = (
        guarded(integers(*shape, dtype=dtype)),
        guarded(integers(*shape, dtype=dtype)),
    )
    want_out, want_grad = plain(inputs, grad_outputs, torch.float64, **options)
    want_out, want_grad = out + want_out, grad + want_grad
    assert ops.accumulate_saliency_(out, inputs, grad_outputs, grad=grad, backend=backend, **options) is out
    check_out()
    check_grad()
    assert torch.equal(out.double(), want_out.double())
    assert torch.equal(grad.double(), want_grad.double())


# Micro-tiles (float32; float64 has half the columns): 14 x 32 (AVX-512), 6 x 16 (AVX2) and 4 x 8 (scalar). Tiles are at
# most 448 x 512 and 128 rows are packed at once.
SHAPES = [
    *[(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, None, 4, 5), (2, None, 0, 5), (2, None, 4, 0)],
    *[(1, None, 1, 1), (7, None, 5, 3), (1, 1, 1, 1), (1, 2, 1, 1), (3, 2, 5, 7), (5, 1, 3, 2), (3, 5, 1, 31)],
    *[(2, 3, 6 + d, 16 + d) for d in (-1, 0, 1)],
    *[(2, 3, 4 + d, 8 + d) for d in (-1, 0, 1)],
    *[(2, 3, 14 + d, 32 + d) for d in (-1, 0, 1)],
    *[(2, 2, 448 + d, 512 + d) for d in (-1, 0, 1)],
    *[(2, 128 + d, 7, 9) for d in (-1, 0, 1)],
    *[(64 + d, 2, 7, 9) for d in (-1, 0, 1)],
    *[(128 + d, None, 7, 9) for d in (-1, 0, 1)],
    *[(2, 257, 5, 3), (2, 2, 897, 31), (2, 2, 3, 1025), (5, 100, 15, 33)],
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("power", [1, 2])
@by_dtype
def test_exact_at_every_block_edge(backend, shape, power, dtype):
    inputs, grad_outputs = case(*shape, dtype=dtype)
    run_exact(inputs, grad_outputs, backend, power=power)
    run_exact(inputs, grad_outputs, backend, power=power, factor=integers(*shape[2:], dtype=dtype), scale=-2.0)


sizes = st.sampled_from([0, 1, 2, 3, 5, 7, 8, 13, 17])


@given(
    shape=st.tuples(sizes, st.none() | sizes, sizes, sizes),
    dtype=st.sampled_from(DTYPES),
    factor_dtype=st.none() | st.sampled_from(DTYPES),
    power=st.sampled_from([1, 2]),
    scale=st.sampled_from([1.0, 0.0, -2.0, 0.5, 3]),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
)
def test_exact_on_any_shape_and_layout(backend, shape, dtype, factor_dtype, power, scale, layouts):
    inputs, grad_outputs = (LAYOUTS[how](x) for how, x in zip(layouts, case(*shape, dtype=dtype), strict=False))
    factor = None if factor_dtype is None else LAYOUTS[layouts[2]](integers(*shape[2:], dtype=factor_dtype))
    run_exact(inputs, grad_outputs, backend, power=power, scale=scale, factor=factor)


@given(lengths=st.lists(st.sampled_from([0, 0, 1, 1, 2, 5]), max_size=6), power=st.sampled_from([1, 2]))
@pytest.mark.parametrize("offset_dtype", [torch.int32, torch.int64], ids=str)
def test_packed_samples_may_be_empty(backend, offset_dtype, lengths, power):
    inputs, grad_outputs = integers(sum(lengths), 7), integers(sum(lengths), 3)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(offset_dtype)
    run_exact(inputs, grad_outputs, backend, power=power, cu_seqlens=ends, factor=integers(3, 7), scale=4.0)


def test_packed_samples_across_packing_rounds(backend):
    lengths = [150, 0, 1, 128, 129, 60, 60, 9]  # 128 rows are packed at once
    inputs, grad_outputs = integers(sum(lengths), 20), integers(sum(lengths), 9)
    run_exact(inputs, grad_outputs, backend, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))


def test_packed_one_row_each_is_the_2d_case(backend):
    inputs, grad_outputs = case(6, None, 3, 4, make=torch.randn)
    packed, rows = torch.zeros(3, 4), torch.zeros(3, 4)
    ops.accumulate_saliency_(packed, inputs, grad_outputs, cu_seqlens=torch.arange(7), backend=backend)
    ops.accumulate_saliency_(rows, inputs, grad_outputs, backend=backend)
    assert torch.equal(packed, rows)


def test_factor_is_applied_tile_by_tile(monkeypatch, kernel):
    monkeypatch.setattr(saliency, "TILE_BYTES", 100)  # T = 1: one row of 17 float32 at a time, of 5
    inputs, grad_outputs = case(3, None, 5, 17)
    run_exact(inputs, grad_outputs, kernel, power=2, factor=integers(5, 17), scale=3.0)


@pytest.mark.parametrize("shape", [(64, None, 40, 70), (9, 33, 40, 70), (2, 600, 40, 70)], ids=str)
@pytest.mark.parametrize("power", [1, 2])
@by_dtype
def test_no_worse_than_torch(backend, shape, power, dtype):
    """The truth of float64 is computed with the 64-bit mantissa of numpy's longdouble."""
    inputs, grad_outputs = case(*shape, dtype=dtype, make=torch.randn)
    options = {"power": power, "factor": torch.randn(40, 70, dtype=dtype), "scale": 0.3}
    own = sum_dtype(dtype)
    out, grad = torch.zeros(40, 70, dtype=own), torch.zeros(40, 70, dtype=own)
    ops.accumulate_saliency_(out, inputs, grad_outputs, grad=grad, backend=backend, **options)
    by_torch = plain(inputs, grad_outputs, own, **options)
    if dtype == torch.float64:
        a, d = (x.reshape(shape[0], -1, x.shape[-1]).numpy().astype(np.longdouble) for x in (inputs, grad_outputs))
        each = np.stack([left.T @ right for left, right in zip(d, a, strict=True)])
        weight = np.abs(options["factor"].numpy().astype(np.longdouble) * np.longdouble(0.3)) ** power
        truth = [torch.tensor(x.astype(np.float64)) for x in (weight * (np.abs(each) ** power).sum(0), each.sum(0))]
    else:
        truth = plain(inputs, grad_outputs, torch.float64, **options)
    # The factor 4: torch's products of [B, O, I] sum in blocks, ours and a GEMM in order over samples.
    assert_no_worse(out, truth[0], by_torch[0], factor=4)
    assert_no_worse(grad, truth[1], by_torch[1], factor=4)


@pytest.mark.parametrize("steps", [None, 3])
def test_nan_and_infinity_propagate(backend, steps):
    inputs, grad_outputs = case(2, steps, 3, 20)
    inputs.flatten()[5], grad_outputs.flatten()[0] = torch.nan, torch.inf
    inputs[inputs == 0], grad_outputs[grad_outputs == 0] = 1, 1  # 0 * inf depends on where a library skips zeros
    out = ops.accumulate_saliency_(torch.zeros(3, 20), inputs, grad_outputs, backend=backend)
    want = plain(inputs, grad_outputs, torch.float32)[0]
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
    assert want.isnan().any()
    assert want.isinf().any()


@pytest.mark.parametrize("shape", [(40, None, 37, 70), (3, 7, 37, 70)], ids=str)
def test_same_bits_on_every_run(backend, shape):
    inputs, grad_outputs = case(*shape, make=torch.randn)

    def run():
        out, grad = torch.zeros(37, 70), torch.zeros(37, 70)
        ops.accumulate_saliency_(out, inputs, grad_outputs, factor=torch.ones(37, 70), grad=grad, backend=backend)
        return out, grad

    first = run()
    for _ in range(20):
        assert all(map(torch.equal, run(), first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_bits_for_any_number_of_threads(kernel, set_threads, dtype):
    inputs, grad_outputs = case(3, 300, 130, 40, dtype=dtype, make=torch.randn)  # two threads also take smaller tiles
    results = []
    for threads in (1, 2):
        set_threads(threads)
        out, grad = torch.zeros(130, 40, dtype=dtype), torch.zeros(130, 40, dtype=dtype)
        results.append(ops.accumulate_saliency_(out, inputs, grad_outputs, grad=grad, backend=kernel))
        results.append(grad)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


@pytest.mark.parametrize("steps", [None, 3])
def test_autograd_is_told_of_writes_and_sees_nothing_else(backend, steps):
    inputs, grad_outputs = case(2, steps, 3, 4)
    out, grad = torch.zeros(3, 4), torch.zeros(3, 4)
    product = out * torch.ones(3, 4, requires_grad=True)  # whose backward needs out as it is now
    version = grad._version
    weight = torch.nn.Parameter(integers(3, 4))
    ops.accumulate_saliency_(
        out, inputs.requires_grad_(), grad_outputs.requires_grad_(), factor=weight, grad=grad, backend=backend
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    assert grad._version > version
    assert not out.requires_grad
    assert not grad.requires_grad


def arguments(**changes):
    inputs, grad_outputs = case(2, 3, 4, 5)
    return {"out": torch.zeros(4, 5), "inputs": inputs, "grad_outputs": grad_outputs} | changes


WRONG = {
    "out list": ({"out": [1.0]}, TypeError, "out must be a torch.Tensor; got list"),
    "out dtype": (
        {"out": torch.zeros(4, 5).double()},
        TypeError,
        "out must have dtype torch.float32; got torch.float64",
    ),
    "out 1-D": ({"out": torch.zeros(20)}, ValueError, r"out must have 2 dimensions; got shape \(20,\)"),
    "out transposed": ({"out": torch.zeros(5, 4).T}, ValueError, "out must be contiguous; got strides"),
    "out rows": (
        {"out": torch.zeros(3, 5)},
        ValueError,
        r"grad_outputs must have shape \(2, 3, 3\).*; got \(2, 3, 4\)",
    ),
    "out columns": ({"out": torch.zeros(4, 6)}, ValueError, r"inputs must have shape \(2, 3, 6\).*; got \(2, 3, 5\)"),
    "inputs int": ({"inputs": torch.zeros(2, 3, 5).long()}, TypeError, "inputs must have dtype .*; got torch.int64"),
    "inputs 1-D": ({"inputs": torch.zeros(5)}, ValueError, "inputs must have 2 or 3 dimensions"),
    "inputs sparse": ({"inputs": torch.zeros(2, 5).to_sparse()}, TypeError, "inputs must be a strided tensor"),
    "inputs device": ({"inputs": torch.zeros(2, 3, 5, device="meta")}, ValueError, "inputs must be on cpu.*; got meta"),
    "grad_outputs dtype": (
        {"grad_outputs": torch.zeros(2, 3, 4).half()},
        TypeError,
        "grad_outputs must have dtype torch.float32; got torch.float16",
    ),
    "grad_outputs batch": ({"grad_outputs": torch.zeros(3, 3, 4)}, ValueError, "grad_outputs must have shape"),
    "power": ({"power": 3}, ValueError, "power must be 1 or 2; got 3"),
    "factor shape": ({"factor": torch.zeros(5, 4)}, ValueError, r"factor must have shape \(4, 5\)"),
    "factor dtype": ({"factor": torch.zeros(4, 5).int()}, TypeError, "factor must have dtype"),
    "grad dtype": ({"grad": torch.zeros(4, 5).double()}, TypeError, "grad must have dtype torch.float32"),
    "grad expanded": ({"grad": torch.zeros(1, 5).expand(4, 5)}, ValueError, "grad must be contiguous"),
}
ROWS = {"inputs": torch.ones(6, 5), "grad_outputs": torch.ones(6, 4)}
for name, ends in {"empty": [], "start": [1, 6], "end": [0, 5], "past": [0, 7], "decreasing": [0, 4, 2, 6]}.items():
    change = ROWS | {"cu_seqlens": torch.tensor(ends, dtype=torch.int64)}
    WRONG[f"cu_seqlens {name}"] = (change, ValueError, r"cu_seqlens must run from 0 to 6 \(the rows of inputs\)")
WRONG["cu_seqlens float"] = (ROWS | {"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens must have dtype")
WRONG["cu_seqlens and T"] = ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "inputs must have 2 dimensions")


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_argument_is_named_and_nothing_written(change, error, message):
    call = arguments(**change)
    with pytest.raises(error, match=message):
        ops.accumulate_saliency_(**call)
    assert not isinstance(call["out"], torch.Tensor) or call["out"].eq(0).all()


@pytest.mark.parametrize("steps", [None, 3])
def test_opcheck(backend, steps):
    inputs, grad_outputs = case(2, steps, 4, 5)
    offsets = torch.arange(3) * (steps or 1)
    rows = (inputs.reshape(-1, 5), grad_outputs.reshape(-1, 4), offsets)
    for factor, grad in ((None, None), (integers(4, 5), torch.zeros(4, 5))):
        torch.library.opcheck(
            torch.ops.cwfast.accumulate_saliency_.default, (torch.zeros(4, 5), *rows, 1, 2.0, factor, grad, backend)
        )


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("steps", [None, 0, 3, 200])
@pytest.mark.parametrize("samples", [0, 2])
def test_grad_may_be_overwritten(backend, samples, steps, power):
    inputs, grad_outputs = case(samples, steps, 37, 21)
    options = {"power": power, "factor": integers(37, 21), "backend": backend}
    out, grad = torch.zeros(37, 21), torch.zeros(37, 21)
    ops.accumulate_saliency_(out, inputs, grad_outputs, grad=grad, **options)
    again, poisoned = torch.zeros(37, 21), torch.full((37, 21), torch.nan)
    ops.accumulate_saliency_(again, inputs, grad_outputs, grad=poisoned, overwrite_grad=True, **options)
    assert torch.equal(again, out)
    assert torch.equal(poisoned, grad)


@pytest.mark.parametrize("steps", [None, 3])
def test_compiles_without_a_graph_break(backend, steps):
    def f(out, inputs, grad_outputs, weight):
        ops.accumulate_saliency_(out, inputs * 2, grad_outputs, factor=weight, backend=backend)
        return out + 1

    inputs, grad_outputs = case(2, steps, 4, 5)
    out, weight = torch.zeros(4, 5), integers(4, 5)
    want = f(torch.zeros(4, 5), inputs, grad_outputs, weight)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(out, inputs, grad_outputs, weight), want)
    assert torch.equal(out, want - 1)


def test_a_kernel_that_is_interrupted_is_seen_by_autograd(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    out, grad = torch.zeros(3, 4), torch.zeros(3, 4)
    monkeypatch.setattr(_backends.native(), "accumulate_saliency_float32", interrupted)
    before = out._version, grad._version
    with pytest.raises(KeyboardInterrupt):
        ops.accumulate_saliency_(out, torch.rand(5, 4), torch.rand(5, 3), grad=grad, backend="cpu")
    assert out._version > before[0]
    assert grad._version > before[1]
