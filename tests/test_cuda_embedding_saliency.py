"""The CUDA kernels of accumulate_embedding_saliency_, executed on the CPU through the op: the checks of its tests.

Tokens with more rows than a piece holds are the ones that two kernels share; here pieces may be a few rows long.
"""

import pytest
import test_embedding_saliency as tests
import torch
from cuda_on_cpu import build
from cuda_on_cpu.emulate import emulate, sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from test_embedding_saliency import DTYPES, LARGE, gradients, integers

from cwfast import ops
from cwfast.ops import _embedding_device

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=f"CUDA on the CPU {build.why_not()}")


@pytest.fixture(params=["plain", "checked"])
def library(request, monkeypatch):
    return emulate(monkeypatch, "embedding_saliency", request.param == "checked")


def cut_into(monkeypatch, rows):
    """Pieces of so many rows, whatever the number of rows in all."""
    monkeypatch.setattr(_embedding_device, "PIECE", rows)
    monkeypatch.setattr(_embedding_device.math, "isqrt", lambda count: 1)


def laid_out(x, how):
    """The same entries, elsewhere in memory; what lies between them is NaN."""
    *rows, columns = x.shape
    if how == "columns_apart":
        return x.mT.contiguous().mT
    if how == "shifted":  # by one entry, so that no vector is aligned
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    if how == "every_second":  # of rows that are aligned
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1).flatten(-2)[..., ::2]
    gap = {"dense": 0, "rows_apart": 3, "aligned_rows_apart": 8}[how]
    return torch.cat([x, x.new_full((*rows, gap), torch.nan)], dim=-1)[..., :columns]


LAYOUTS = ["dense", "rows_apart", "aligned_rows_apart", "columns_apart", "shifted", "every_second"]


def check(shape, words, columns, dtype, *, out_dtype=torch.float32, layout="dense", factor_dtype=None, **options):
    """Integers: equal by bits, gradient sum included; ``out`` and ``grad`` hold something before."""
    indices, grads = torch.randint(words, shape), integers(*shape, columns, dtype=dtype)
    samples = [b for b in range(shape[0]) for _ in range(shape[1])]
    each = gradients(indices, grads, samples, words, columns)
    if (padding := options.get("padding_idx")) is not None:
        each[:, padding] = 0
    factor = None if factor_dtype is None else integers(words, columns, dtype=factor_dtype)
    out, grad = (integers(words, columns, dtype=out_dtype) for _ in range(2))
    weight = 1 if factor is None else factor.double()
    want = out.double() + (options.get("scale", 1.0) * each * weight).abs().pow(options["power"]).sum(dim=0)
    want_grad = grad.double() + each.sum(dim=0)
    out, grad, grads = (laid_out(x, layout) for x in (out, grad, grads))
    factor = None if factor is None else laid_out(factor, layout)
    ops.accumulate_embedding_saliency_(out, indices, grads, factor=factor, grad=grad, backend="cuda", **options)
    assert torch.equal(out.double(), want)
    assert torch.equal(grad.double(), want_grad)


@pytest.mark.parametrize("padding_idx", [None, 12])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("with_factor", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (6,), (0, 3), (4, 0), (1, 1), (4, 50)], ids=str)
def test_exact_on_integers(library, shape, dtype, with_factor, power, padding_idx):
    tests.test_exact_on_integers(shape, dtype, with_factor, power, padding_idx, "cuda")


# A thread owns 4 columns, 32 threads a piece at most; a block has 256 threads.
@pytest.mark.parametrize("columns", [1, 3, 4, 5, 8, 31, 127, 128, 129, 132, 260])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_at_every_edge_of_the_columns(library, columns, dtype):
    library.coc_configure(columns, 1 + columns % 3, None, 0)
    check((3, 30), 7, columns, dtype, power=2, factor_dtype=dtype, padding_idx=2, scale=-2.0)


@pytest.mark.parametrize("piece", [1, 2, 3, 8, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_however_tokens_are_cut(library, monkeypatch, piece, dtype):
    cut_into(monkeypatch, piece)
    for power in (1, 2):
        check((5, 40), 3, 6, dtype, power=power, factor_dtype=torch.float32)
        check((1, 130), 1, 6, dtype, power=power)  # one sample, one token
        check((130, 1), 2, 6, dtype, power=power, out_dtype=torch.float64, padding_idx=0)


sizes = st.sampled_from([1, 2, 3, 7, 8, 17])


@settings(max_examples=25)
@given(
    shape=st.tuples(sizes, sizes),
    words=sizes,
    columns=sizes,
    dtype=st.sampled_from(DTYPES),
    out_dtype=st.sampled_from([torch.float32, torch.float64]),
    factor_dtype=st.none() | st.sampled_from(DTYPES),
    power=st.sampled_from([1, 2]),
    scale=st.sampled_from([1.0, 0.0, -2.0, 0.5]),
    layout=st.sampled_from(LAYOUTS),
    piece=st.integers(1, 9),
    schedule=st.tuples(st.integers(0, 1000), st.integers(1, 3)),
)
def test_exact_on_any_shape_layout_and_schedule(library, shape, words, columns, dtype, piece, schedule, **options):
    library.coc_configure(*schedule, None, 0)
    with pytest.MonkeyPatch.context() as patch:
        cut_into(patch, piece)
        check(shape, words, columns, dtype, **options)


def test_packed_samples(library):
    tests.test_packed_samples("cuda")


@pytest.mark.parametrize("piece", [5, 128])
def test_no_worse_than_torch_and_the_same_bits_for_every_schedule(library, monkeypatch, piece):
    cut_into(monkeypatch, piece)
    tests.test_no_worse_than_torch_and_the_same_bits_every_time("cuda")
    indices, grads = torch.randint(20, (8, 60)), torch.randn(8, 60, 40)

    def run(seed):
        library.coc_configure(seed, 1 + seed % 3, None, 0)
        out, grad = torch.zeros(20, 40), torch.zeros(20, 40)
        ops.accumulate_embedding_saliency_(out, indices, grads, grad=grad, backend="cuda")
        return out, grad

    first = run(0)
    for seed in range(1, 10):
        assert all(map(torch.equal, run(seed), first))


@pytest.mark.parametrize("piece", [2, 128])
def test_nan_stays_in_its_row_and_out_may_have_any_strides(library, monkeypatch, piece):
    cut_into(monkeypatch, piece)
    tests.test_nan_stays_in_its_row_and_out_may_have_any_strides("cuda")


@pytest.mark.parametrize("power", [1, 2])
def test_numbers_that_are_not_ordinary(library, power):
    tests.test_numbers_that_are_not_ordinary(power, "cuda")


@pytest.mark.parametrize("strides", ["dense", "rows_apart", "columns_apart"])
@pytest.mark.parametrize("name", LARGE)
def test_large_exactly(library, name, strides):
    tests.test_large_exactly(name, torch.float16, strides, "cuda")


def test_what_a_token_with_most_of_the_rows_costs():
    """No piece, and no token's number of pieces, is a long walk; the workspace stays small."""
    for count, columns in ((10**6, 8), (2**14, 4096), (10**6, 4096)):
        order = torch.zeros(1, dtype=torch.int64).expand(count)
        rows = _embedding_device.Rows(order, order, torch.tensor([0]), torch.tensor([0, count]))
        pieces = _embedding_device.pieces_of(rows, torch.empty((1, columns), device="meta"))
        assert len(pieces.tokens) == -(-count // pieces.rows)
        assert max(pieces.rows, len(pieces.tokens)) <= 8192
        assert pieces.partial.nbytes <= 32 << 20


def far(library):
    """Rows or columns so far apart that the last lies beyond 2^31 entries; most of the memory is never touched."""
    apart = (3 << 30) // 8
    for columns, strides in ((9, (apart, 1)), (9, (1, apart)), (4, (1, 1 << 30))):

        def matrix(columns=columns, strides=strides):
            last = 8 * strides[0] + (columns - 1) * strides[1]
            return sparse((last + 1,), torch.float32).as_strided((9, columns), strides)

        out, grad, grads, factor = matrix(), matrix(), matrix(), matrix()
        grads[:], factor[:] = integers(9, columns), integers(9, columns)
        indices = torch.tensor([0, 8, 8, 8, 3, 8, 0, 8, 8])
        each = gradients(indices, grads, [0, 0, 0, 1, 1, 1, 2, 2, 2], 9, columns)
        ends = torch.tensor([0, 3, 6, 9])
        ops.accumulate_embedding_saliency_(
            out, indices, grads, factor=factor, cu_seqlens=ends, grad=grad, backend="cuda"
        )
        assert torch.equal(out.double(), (each * factor.double()).abs().sum(dim=0))
        assert torch.equal(grad.double(), each.sum(dim=0))


def wide(library):
    """3.2e9 columns; only the first and the last block run."""
    columns = (3 << 30) + 5
    out, grads = sparse((1, columns), torch.float32), sparse((1, columns), torch.float16)
    for row in (out, grads):
        row[:, :8] = row[:, -5:] = 1
    only = torch.tensor([0, -(-columns // 128) - 1], dtype=torch.int32)
    library.coc_configure(1, 2, only.data_ptr(), 2)
    ops.accumulate_embedding_saliency_(out, torch.tensor([0]), grads, scale=3.0, backend="cuda")
    library.coc_configure(1, 2, None, 0)
    assert [*out[0, :8].tolist(), *out[0, -5:].tolist()] == [4.0] * 13


@pytest.mark.parametrize("piece", [2, 128])
def test_offsets_above_2_to_the_31(library, monkeypatch, piece):
    cut_into(monkeypatch, piece)
    far(library)
    wide(library)


PLANTED = {  # text in csrc/cuda/embedding_saliency.cu, replacement; each must be caught by the runs of catch()
    "no absolute value": ("power == 1 ? fabsf(x) : x * x", "power == 1 ? x : x * x"),
    "absolute value in double": ("power == 1 ? fabs(x) : x * x", "power == 1 ? x : x * x"),
    "sample not cleared": ("        sample = {};\n        first = false;", "        first = false;"),
    "32-bit row offset": ("row * x.row_stride +", "(int)row * (int)x.row_stride +"),
    "32-bit column offset": ("from[c * x.column_stride]", "from[c * (int)x.column_stride]"),
    "32-bit column": (
        "((int64_t{tile} << args.lanes) + in_tile) * kColumns",
        "int(((tile << args.lanes) + in_tile) * kColumns)",
    ),
    "last columns": ("c < at.count ? from", "true ? from"),
    "writes past the columns": ("if (c < at.count) to[", "to["),
    "vectors past the columns": ("if (x.quads && at.count == kColumns) {\n    *", "if (x.quads) {\n    *"),
    "vectors where there are none": ("x.row_stride % kColumns == 0;", "true;"),
    "vectors across columns": ("x.column_stride == 1 && reinterpret", "reinterpret"),
    "first sample of a piece closed": ("        if (first)\n          sums.head = sample;\n        else\n", ""),
    "tail of a piece lost": ("    sums.tail = sample;", "    ;"),
    "every row a sample": ("(mine != owner) << u", "(true) << u"),
    "owner kept": ("      owner = mine;\n", ""),
    "piece runs into the next": ("return {begin, end < last ? end : last};", "return {begin, last};"),
    "piece past its token": ("return {begin, end < last ? end : last};", "return {begin, end};"),
    "rows past the piece": ("if (kFull || u < count) row[u]", "row[u]"),
    "a token's pieces all from the first": ("(piece - args.first_pieces[which]) * args.piece_rows", "0 * piece"),
    "cut token written by each piece": ("args.first_pieces[which + 1] - first == 1", "true"),
    "pieces share a slot": ("(args.slots[which] + at.item - first) * kKinds", "args.slots[which] * kKinds"),
    "sample over two pieces closed": (
        "piece > 0 && args.samples[rows.begin] != args.samples[rows.begin - 1]",
        "piece > 0",
    ),
    "sample never closed between pieces": (
        "piece > 0 && args.samples[rows.begin] != args.samples[rows.begin - 1]",
        "false",
    ),
    "row before the first piece": ("if (piece > 0 && args.samples", "if (args.samples"),
    "samples inside a piece": ("if (args.samples[rows.begin] != args.samples[rows.end - 1]) {", "if (false) {"),
    "last sample of a token": ("  add_powered(total, sample, args.power);\n  finish", "  finish"),
    "tail of a whole token": ("    add_powered(sums.total, sums.tail, args.power);\n", ""),
    "sign of the factor": ("*= powered(factor.element[c], args.power)", "*= factor.element[c]"),
    "gradient sum of samples": ("        add(sums.sum, sample);\n", ""),
    "tile of another item": ("blockIdx.x % args.tiles, block", "blockIdx.x % 1, block"),
    "items past the last": ("item >= items || left <= 0", "left <= 0"),
}


def catch(name: str) -> None:
    """Plant one defect and run; called in a process of its own, which the defect may crash."""
    patch = pytest.MonkeyPatch()
    library = emulate(patch, "embedding_saliency", checked=True, changes=(PLANTED[name],) if name else ())
    for seed, piece in enumerate((3, 128)):
        library.coc_configure(seed, 1 + seed, None, 0)
        cut_into(patch, piece)
        for out_dtype in (torch.float32, torch.float64):
            for power, layout in enumerate(LAYOUTS):
                options = {"power": 1 + power % 2, "layout": layout, "out_dtype": out_dtype, "padding_idx": 1}
                check((5, 40), 4, 7, torch.bfloat16, factor_dtype=torch.float16, **options)
                check((3, 9), 5, 132, torch.float32, factor_dtype=torch.float32, **options)
                check((2, 9), 3, 8, torch.float64, factor_dtype=torch.float64, **options)
        far(library)
    wide(library)


@pytest.mark.parametrize("name", build.some_slow(["", *PLANTED]))
def test_planted_defect_is_caught(name):
    build.check_planted("test_cuda_embedding_saliency", name)
