"""The CUDA kernel of accumulate_saliency_, executed on the CPU, through the op: the checks of test_saliency.py.

Plain runs find wrong values; checked runs also find races, reads and writes out of bounds, misalignment, use of
uninitialised shared memory. Blocks run in a random order, one to three at a time. What this cannot find: a layout of
tensor-core fragments misread the same way in the kernel and in its host twin, and anything about speed.
"""

import ctypes

import pytest
import torch
from cuda_on_cpu import build
from cuda_on_cpu.emulate import emulate, sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from test_saliency import LAYOUTS, case, integers, plain, run_exact, sum_dtype

from cwfast import ops
from cwfast.testing import assert_no_worse

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=f"CUDA on the CPU {build.why_not()}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=["plain", "checked"])
def library(request, monkeypatch):
    return emulate(monkeypatch, "saliency", request.param == "checked")


# Tiles are 128 x 128; a stage holds 16 rows (float32) or 32; 3 stages are under way.
SHAPES = [
    *[(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, None, 4, 5)],
    *[(7, None, 5, 3), (40, None, 8, 8), (1, 1, 1, 1), (5, 1, 3, 2), (3, 5, 1, 31), (2, 2, 130, 8), (2, 3, 8, 136)],
    *[(2, 3, 128 + d, 128 - d) for d in (-1, 0, 1)],
    *[(2, t, 24, 16) for t in (15, 16, 17, 31, 32, 33, 64, 65, 129)],
    *[(9, 33, 8, 16), (3, 2, 264, 300)],
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("power", [1, 2])
@by_dtype
def test_exact_at_every_block_edge(library, shape, power, dtype):
    inputs, grad_outputs = case(*shape, dtype=dtype)
    run_exact(inputs, grad_outputs, "cuda", power=power, factor=integers(*shape[2:], dtype=dtype), scale=-2.0)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("steps", [None, 5])
@by_dtype
def test_exact_without_factor_or_gradient_sum(library, steps, power, dtype):
    inputs, grad_outputs = case(3, steps, 20, 136, dtype=dtype)
    out = ops.accumulate_saliency_(torch.ones(20, 136), inputs, grad_outputs, power=power, backend="cuda")
    assert torch.equal(out.double(), 1 + plain(inputs, grad_outputs, torch.float64, power=power)[0])


sizes = st.sampled_from([0, 1, 2, 3, 7, 8, 16, 17])


@settings(max_examples=25)
@given(
    shape=st.tuples(sizes, st.none() | sizes, sizes, sizes),
    dtype=st.sampled_from(DTYPES),
    factor_dtype=st.none() | st.sampled_from([*DTYPES, torch.float64]),
    power=st.sampled_from([1, 2]),
    scale=st.sampled_from([1.0, 0.0, -2.0, 0.5]),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    schedule=st.tuples(st.integers(0, 1000), st.integers(1, 3)),
)
def test_exact_on_any_shape_layout_and_schedule(library, shape, dtype, factor_dtype, power, scale, layouts, schedule):
    library.coc_configure(*schedule, None, 0)
    inputs, grad_outputs = (LAYOUTS[how](x) for how, x in zip(layouts, case(*shape, dtype=dtype), strict=False))
    factor = None if factor_dtype is None else LAYOUTS[layouts[2]](integers(*shape[2:], dtype=factor_dtype))
    run_exact(inputs, grad_outputs, "cuda", power=power, scale=scale, factor=factor)


LENGTHS = [[], [0, 0], [3, 0, 0, 1], [0, 70, 0, 1, 33, 32, 0], [1, 2], [1, 1, 1]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@by_dtype
def test_packed_samples_may_be_empty(library, lengths, dtype):
    inputs, grad_outputs = integers(sum(lengths), 24, dtype=dtype), integers(sum(lengths), 16, dtype=dtype)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    run_exact(inputs, grad_outputs, "cuda", cu_seqlens=ends, factor=integers(16, 24), scale=4.0)


@pytest.mark.parametrize("shape", [(64, None, 40, 72), (9, 33, 40, 70), (2, 300, 16, 24)], ids=str)
@pytest.mark.parametrize("power", [1, 2])
@by_dtype
def test_no_worse_than_torch(monkeypatch, shape, power, dtype):
    emulate(monkeypatch, "saliency")
    inputs, grad_outputs = case(*shape, dtype=dtype, make=torch.randn)
    options = {"power": power, "factor": torch.randn(*shape[2:], dtype=dtype), "scale": 0.3}
    own = sum_dtype(dtype)
    out, grad = torch.zeros(shape[2:], dtype=own), torch.zeros(shape[2:], dtype=own)
    ops.accumulate_saliency_(out, inputs, grad_outputs, grad=grad, backend="cuda", **options)
    truth, by_torch = (plain(inputs, grad_outputs, kind, **options) for kind in (torch.float64, own))
    assert_no_worse(out, truth[0], by_torch[0], factor=4)
    assert_no_worse(grad, truth[1], by_torch[1], factor=4)


@pytest.mark.parametrize("steps", [None, 3])
@by_dtype
def test_nan_and_infinity_propagate(monkeypatch, steps, dtype):
    emulate(monkeypatch, "saliency")
    inputs, grad_outputs = case(2, steps, 3, 24, dtype=dtype)
    inputs[inputs == 0], grad_outputs[grad_outputs == 0] = 1, 1
    inputs.flatten()[5], grad_outputs.flatten()[0] = torch.nan, torch.inf
    out = ops.accumulate_saliency_(torch.zeros(3, 24), inputs, grad_outputs, backend="cuda")
    want = plain(inputs, grad_outputs, torch.float32)[0]
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
    assert want.isnan().any()
    assert want.isinf().any()


@by_dtype
def test_same_bits_for_every_schedule(monkeypatch, dtype):
    library = emulate(monkeypatch, "saliency")
    inputs, grad_outputs = case(3, 37, 150, 136, dtype=dtype, make=torch.randn)

    def run(seed):
        library.coc_configure(seed, 1 + seed % 3, None, 0)
        out, grad = torch.zeros(150, 136), torch.zeros(150, 136)
        ops.accumulate_saliency_(out, inputs, grad_outputs, grad=grad, backend="cuda")
        return out, grad

    first = run(0)
    for seed in range(1, 20):
        assert all(map(torch.equal, run(seed), first))


@pytest.mark.parametrize("checked", [False, True])
@by_dtype
def test_offsets_above_2_to_the_31(monkeypatch, checked, dtype):
    library = emulate(monkeypatch, "saliency", checked)
    wide = (3 << 30) // 8
    rows = []
    for _ in range(2):  # 9 rows so far apart that the last begins at 3 * 2^30
        rows.append(sparse((8 * wide + 8,), dtype).as_strided((9, 8), (wide, 1)))
        rows[-1].copy_(integers(9, 8, dtype=dtype))
    out = torch.zeros(8, 8)
    ops.accumulate_saliency_(out, *rows, cu_seqlens=torch.tensor([0, 4, 9]), backend="cuda")
    want = plain(rows[0], rows[1], torch.float64, cu_seqlens=torch.tensor([0, 4, 9]))[0]
    assert torch.equal(out.double(), want)

    o, i = 49_160, 65_544  # 3.2e9 weights; only the first and the last block run
    outs = [sparse((o, i), torch.float32) for _ in range(2)]
    for tensor in outs:
        tensor[-8:, -8:] = tensor[:8, :8] = 1
    inputs, grad_outputs = case(2, 3, o, i, dtype=dtype)
    blocks = -(-o // 128) * -(-i // 128)
    only = (ctypes.c_uint * 2)(0, blocks - 1)
    library.coc_configure(1, 2, only, 2)
    ops.accumulate_saliency_(outs[0], inputs, grad_outputs, grad=outs[1], backend="cuda")
    library.coc_configure(1, 2, None, 0)
    for corner in (slice(0, 8), slice(-8, None)):
        want = plain(inputs[..., corner], grad_outputs[..., corner], torch.float64)
        assert torch.equal(outs[0][corner, corner].double(), 1 + want[0])
        assert torch.equal(outs[1][corner, corner].double(), 1 + want[1])


PLANTED = {  # text in csrc/cuda/saliency*, replacement; each must be caught by the runs of catch()
    "no barrier": ("__syncthreads();  // this", "// this"),
    "waits for too few copies": ("wait_for_copies<kStages - 2>();", "wait_for_copies<kStages - 1>();"),
    "fills the stage in use": ("load((slot + kStages - 1) % kStages, ahead)", "load(slot, ahead)"),
    "reads one row of the next sample": ("r < rows && there > 0", "r <= rows && there > 0"),
    "reads past the columns": ("there < kChunk<T> ? there : kChunk<T>", "there < 0 ? there : kChunk<T>"),
    "acc not cleared": ("acc[e] = 0.0f;", ""),
    "no absolute value": ("total[e] + fabsf(acc[e])", "total[e] + acc[e]"),
    "sign of the factor": ("fabsf(factor_at(args, index))", "factor_at(args, index)"),
    "factor squared at power 1": ("args.power == 1 ? factor : factor * factor", "factor * factor"),
    "takes unaligned rows for aligned": ("if (aligned) {", "if (true) {"),
    "32-bit index": ("const int64_t index = o *", "const int index = (int)o * (int)"),
    "32-bit row offset": ("(row + r) * stride", "(int)(row + r) * (int)stride"),
    "last column": ("o < args.out_features && i <", "o < args.out_features && i <="),
    "empty samples end the walk": ("row == end && left > 0; --left", "row == end && left > 0; left = 0"),
    "fragments swapped": ("b[n][1] = pair[1], b[n + 1][0] = pair[2]", "b[n][1] = pair[2], b[n + 1][0] = pair[1]"),
    "half of the depth": ("k < kDepth<T>; k += kStep", "k < kStep; k += kStep"),
    "sign bit of one entry": ("0x7fff7fffu", "0xffff7fffu"),
    "gradient sum of absolute values": ("grad[e] += acc[e]", "grad[e] += fabsf(acc[e])"),
    "tiles twice": ("inside / height", "inside % height"),
    "squares of rows": ("power == 1 ? fabsf(a[j]) : a[j] * a[j]", "fabsf(a[j])"),
}


def catch(name: str) -> None:
    """Plant one defect and run; called in a process of its own, which the defect may crash."""
    patch = pytest.MonkeyPatch()
    library = emulate(patch, "saliency", checked=True, changes=(PLANTED[name],) if name else ())
    for seed in range(3):
        library.coc_configure(seed, 1 + seed, None, 0)
        for dtype in DTYPES:
            for power in (1, 2):
                for shape in ((3, 40, 24, 16), (3, None, 9, 7), (2, 3, 130, 130), (5, 2, 8, 9)):
                    inputs, grad_outputs = case(*shape, dtype=dtype)
                    run_exact(inputs, grad_outputs, "cuda", power=power, factor=integers(*shape[2:]))
            ends = torch.tensor([0, 3, 3, 40, 40, 110])
            run_exact(integers(110, 8, dtype=dtype), integers(110, 8, dtype=dtype), "cuda", cu_seqlens=ends)
    with pytest.MonkeyPatch.context() as inner:
        inner.setattr(build, "library", lambda *args: library)
        test_offsets_above_2_to_the_31(inner, True, torch.bfloat16)


@pytest.mark.parametrize("name", build.some_slow(["", *PLANTED]))
def test_planted_defect_is_caught(name):
    build.check_planted("test_cuda_saliency", name)
