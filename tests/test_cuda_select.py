"""The CUDA kernels of select_topk, executed on the CPU through the op: bits, counts and threshold of the reference."""

import pytest
import torch
from cuda_on_cpu import build
from cuda_on_cpu.emulate import emulate, sparse

from cwfast import ops
from cwfast.ops import select
from cwfast.testing import HOSTILE, hostile_scores

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=f"CUDA on the CPU {build.why_not()}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=["plain", "checked"])
def library(request, monkeypatch):
    monkeypatch.setattr(select, "CUDA_CHUNK", 256)
    return emulate(monkeypatch, "select", request.param == "checked")


def same(scores, k, **options):
    want = ops.select_topk(scores, k, backend="reference", **options)
    got = ops.select_topk(scores, k, backend="cuda", **options)
    assert all(map(torch.equal, got.bits, want.bits))
    assert got.counts == want.counts
    assert got.threshold == want.threshold


def shares(numel):
    return sorted({0, 1, numel // 100, numel // 3, numel - 1, numel} & set(range(numel + 1)))


@pytest.mark.parametrize("kind", HOSTILE)
@by_dtype
def test_hostile_scores(library, kind, dtype):
    scores = hostile_scores(kind, dtype, 700)
    for seed, k in enumerate(shares(sum(score.numel() for score in scores))):
        library.coc_configure(seed, 1 + seed % 3, None, 0)
        same(scores, k)


SIZES = [[0], [1], [0, 1, 0], [255, 256, 257], [63, 64, 65, 1, 1025], [31, 32, 33, 511, 0, 513]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@by_dtype
def test_ties_at_every_edge(library, sizes, dtype):
    scores = [torch.randint(0, 4, (size,)).to(dtype) for size in sizes]
    for k in shares(sum(sizes)):
        same(scores, k)


@by_dtype
def test_nan_skipped_and_signs_dropped(library, dtype):
    scores = [torch.randn(600).to(dtype), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan]).to(dtype)]
    scores[0][::7] = torch.nan
    valid = sum(int((~score.isnan()).sum()) for score in scores)
    for k in (0, 1, 50, valid):
        same(scores, k, nan="skip", transform="abs")
    with pytest.raises(ValueError, match=f"k must be at most {valid}"):
        ops.select_topk(scores, valid + 1, nan="skip", transform="abs", backend="cuda")


@by_dtype
@pytest.mark.parametrize("k", [0, 3])
def test_invalid_scores_are_named(library, dtype, k):
    scores = [torch.ones(300).to(dtype), torch.tensor([1.0, torch.nan, -1.0, -torch.inf, -0.0]).to(dtype)]
    with pytest.raises(ValueError, match=r"got 1 NaN and 2 negative of 5 in scores\[1\]"):
        ops.select_topk(scores, k, backend="cuda")
    with pytest.raises(ValueError, match=r"got 2 negative of 5 in scores\[1\]"):
        ops.select_topk(scores, k, nan="skip", backend="cuda")


def test_more_chunks_than_threads(monkeypatch):
    monkeypatch.setattr(select, "CUDA_CHUNK", 64)
    emulate(monkeypatch, "select")
    scores = [torch.randint(0, 3, (64 * 600 + 5,)).float()]
    same(scores, 20_000)


def far_chunks(monkeypatch, dtype):
    """Three chunks of a tensor of 3 * 2^30 entries: the others are left out of the table."""
    starts = torch.tensor([0, 1 << 31, 3 << 30])
    whole = select._chunks

    def few(scores, bits):
        rows = whole(scores, bits)
        return rows[(rows[:, 2:3] == starts).any(dim=1)]

    monkeypatch.setattr(select, "CUDA_CHUNK", 1 << 10)
    monkeypatch.setattr(select, "_chunks", few)
    scores = sparse(((3 << 30) + 33,), dtype)
    pieces = [torch.randint(1, 9, (size,)).to(dtype) for size in (1024, 1024, 33)]
    for start, piece in zip(starts.tolist(), pieces, strict=True):
        scores[start : start + len(piece)] = piece
    found = ops.select_topk([scores], 700, backend="cuda")
    want = ops.select_topk(pieces, 700, backend="reference")
    assert found.threshold == want.threshold
    for start, piece, bits in zip(starts.tolist(), pieces, want.bits, strict=True):
        assert torch.equal(found.bits[0][start // 8 : start // 8 + len(bits)], bits), (start, len(piece))


@pytest.mark.parametrize("checked", [False, True])
@by_dtype
def test_offsets_above_2_to_the_31(monkeypatch, checked, dtype):
    emulate(monkeypatch, "select", checked)
    far_chunks(monkeypatch, dtype)


PLANTED = {  # text in csrc/cuda/select.cu, replacement
    "bins not cleared": ("bins[bin] = 0;", ";"),
    "no barrier before counting": ("bins[bin] = 0;\n  __syncthreads();", "bins[bin] = 0;"),
    "no barrier after counting": ("negatives);\n  }\n  __syncthreads();", "negatives);\n  }"),
    "count without atomic": (
        "atomicAdd(&bins[entry.key >> shift & (kBins - 1)], 1u)",
        "++bins[entry.key >> shift & (kBins - 1)]",
    ),
    "flush without atomic": (
        "atomicAdd(&histogram[bin], static_cast<unsigned long long>(bins[bin]))",
        "histogram[bin] += bins[bin]",
    ),
    "no barrier in the scan": ("warp_sums[warp] = value;\n  __syncthreads();", "warp_sums[warp] = value;"),
    "scan memory reused too early": ("  __syncthreads();  // warp_sums may be written again\n", ""),
    "rank off by one": ("reached >= k && reached - count < k", "reached > k && reached - count <= k"),
    "one tie too many": ("rank <= allowed", "rank <= allowed + 1"),
    "ties in any order": ("rank <= allowed", "total - rank < allowed"),
    "reads past the end": ("i < chunk.length) {\n      const", "i <= chunk.length) {\n      const"),
    "padding not written": ("i < padded)", "i < chunk.length - 31)"),
    "32-bit start": ("[chunk.start + i];", "[(int)(chunk.start + i)];"),
    "32-bit word": ("chunk.bits[(chunk.start + i) / 32]", "chunk.bits[(int)(chunk.start + i) / 32]"),
    "NaN selected": ("above = !entry.nan && entry.key", "above = entry.key"),
    "minus zero is negative": ("!nan && key != 0 &&", "!nan &&"),
    "histogram not left zero": ("histogram[bin] = 0;", ""),
}


def catch(name: str) -> None:
    """Plant one defect and run; called in a process of its own, which the defect may crash."""
    patch = pytest.MonkeyPatch()
    patch.setattr(select, "CUDA_CHUNK", 256)
    library = emulate(patch, "select", checked=True, changes=(PLANTED[name],) if name else ())
    for seed in range(3):
        library.coc_configure(seed, 1 + seed, None, 0)
        torch.manual_seed(seed)
        for dtype in (torch.float32, torch.bfloat16):
            for sizes in ([255, 33, 0, 700], [1]):
                test_ties_at_every_edge(library, sizes, dtype)
            test_nan_skipped_and_signs_dropped(library, dtype)
            test_invalid_scores_are_named(library, dtype, 3)
            same([torch.rand(900).to(dtype)], 333)
    with patch.context() as inner:
        far_chunks(inner, torch.bfloat16)


@pytest.mark.parametrize("name", build.some_slow(["", *PLANTED]))
def test_planted_defect_is_caught(name):
    build.check_planted("test_cuda_select", name)
