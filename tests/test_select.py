"""select_topk: exactly the first k of a stable sort, bit for bit, on every backend and instruction set."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cwfast import ops, reference
from cwfast.testing import HOSTILE, hostile_scores

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def sorted_masks(scores, k):
    """By numpy's stable sort in float64, which holds every dtype exactly: independent of cwfast.reference."""
    flat = torch.cat([s.reshape(-1) for s in scores]).double().numpy()
    order = np.argsort(-np.where(np.isnan(flat), -1, flat), kind="stable")[:k]
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[torch.from_numpy(order.copy())] = True
    return chosen.split([s.numel() for s in scores]), (flat[order[-1]] if k else np.inf)


def check(scores, k, backend, **options):
    selection = ops.select_topk(scores, k, backend=backend, **options)
    ranked = [s.abs() for s in scores] if options.get("transform") else scores
    masks, threshold = sorted_masks(ranked, k)
    for bits, mask, score in zip(selection.bits, masks, scores, strict=True):
        assert len(bits) % 8 == 0
        assert torch.equal(reference.unpack(bits, len(bits) * 8)[score.numel() :].any(), torch.tensor(False))
        assert torch.equal(reference.unpack(bits, score.numel()), mask)
    assert selection.counts == [int(mask.sum()) for mask in masks]
    assert selection.threshold == threshold
    assert selection.k == k == sum(selection.counts)


def ks(numel):
    return sorted({0, min(1, numel), numel // 100, numel // 2, max(0, numel - 1), numel})


@by_dtype
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("numel", [300, 30_000])  # below and above the candidate buffer: without and with the bracket
def test_equals_a_stable_sort(backend, kind, dtype, numel):
    scores = hostile_scores(kind, dtype, numel)
    for k in ks(sum(s.numel() for s in scores)):
        check(scores, k, backend)


@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 65_535, 65_536, 65_537, 131_073])
def test_word_and_chunk_borders(backend, numel):
    scores = [torch.rand(numel), (torch.rand(numel) * 8).floor()]
    for one in (scores[:1], scores[1:], scores):
        for k in ks(sum(s.numel() for s in one)):
            check(one, k, backend)


@by_dtype
@pytest.mark.parametrize("kind", ["all_equal", "two_values", "mostly_zero", "ascending", "scales"])
def test_ties_and_histograms_over_many_chunks(kernel, kind, dtype):
    """More equal scores than the candidate buffer holds: the bracket must fail and the histograms take over."""
    scores = hostile_scores(kind, dtype, 400_000)
    numel = sum(s.numel() for s in scores)
    for k in (1, numel // 1000, numel // 3, numel - 1):
        check(scores, k, kernel)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.95])
def test_several_heavy_ties(kernel, share):
    """More than one value overflows the candidates, above and below the k-th largest, next to its border."""
    scores = [(torch.rand(2_000_000) < share).float() + torch.rand(2_000_000).mul(1.01).floor() * 3]
    ones = int((scores[0] > 0).sum())
    for k in (1, ones - 1, ones, ones + 1):
        check(scores, k, kernel)


def test_many_small_tensors(backend):
    scores = [(torch.rand(i % 37) * 20).floor() for i in range(500)]
    for k in ks(sum(s.numel() for s in scores)):
        check(scores, k, backend)


@given(
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=6),
    values=st.integers(1, 300),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
)
def test_any_tensors(backend, sizes, values, share, dtype):
    generator = torch.Generator().manual_seed(values)
    scores = [torch.randint(0, values, (n,), generator=generator).to(dtype) for n in sizes]
    check(scores, int(share * sum(sizes)), backend)


@by_dtype
def test_nan_is_found_and_named(backend, dtype):
    scores = [torch.rand(10, dtype=dtype), torch.rand(3, 50_000).to(dtype)]
    scores[1][1, 7] = scores[1][2, 40_000] = torch.nan
    with pytest.raises(ValueError, match=r"2 NaN of 150000 in scores\[1\], shape \(3, 50000\)"):
        ops.select_topk(scores, 5, backend=backend)


@by_dtype
def test_skipped_nan_is_never_selected(backend, dtype):
    scores = [torch.rand(100_000).to(dtype)]
    scores[0][::3] = torch.nan
    scores[0][1::3] *= -1
    valid = int((~scores[0].isnan()).sum())
    for k in (0, 1, 1000, valid):
        check(scores, k, backend, nan="skip", transform="abs")
    with pytest.raises(ValueError, match=f"k must be at most {valid}"):
        ops.select_topk([s.abs() for s in scores], valid + 1, nan="skip", backend=backend)


@by_dtype
@pytest.mark.parametrize("nan", ["raise", "skip"])
def test_negative_scores_are_refused_but_negative_zero_is_zero(backend, dtype, nan):
    scores = [torch.tensor([0.0, -0.0, 1.0, -0.0], dtype=dtype)]
    check(scores, 2, backend, nan=nan)
    scores.append(torch.tensor([[-1e-3], [2.0]]).to(dtype))
    with pytest.raises(ValueError, match=r"1 negative of 2 in scores\[1\]"):
        ops.select_topk(scores, 0, nan=nan, backend=backend)


@by_dtype
def test_magnitudes_rank_by_absolute_value(backend, dtype):
    scores = [torch.randn(50_000).to(dtype), torch.tensor([-torch.inf, torch.inf, 0.0]).to(dtype)]
    for k in (1, 2, 3, 500, 25_000):
        check(scores, k, backend, transform="abs")


def test_equal_bits_for_any_number_of_threads(kernel, set_threads):
    scores = hostile_scores("few_values", torch.float32, 300_000)
    found = []
    for threads in (1, 2, 3):
        set_threads(threads)
        found.append(ops.select_topk(scores, 1234, backend=kernel))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0].bits, other.bits, strict=True))


def test_scores_are_read_only(kernel):
    scores = [torch.rand(70_000)]
    before, version = scores[0].clone(), scores[0]._version
    ops.select_topk(scores, 70, backend=kernel)
    assert torch.equal(scores[0], before)
    assert scores[0]._version == version


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.rand(3), 1), TypeError, "scores must be a sequence"),
        (([1.0], 1), TypeError, r"scores\[0\] must be a torch.Tensor"),
        (([torch.ones(3, dtype=torch.int64)], 1), TypeError, r"scores\[0\] must have dtype"),
        (([torch.rand(3), torch.rand(3).double()], 1), TypeError, "one dtype"),
        (([torch.rand(3)], 1.0), TypeError, "k must be an int"),
        (([torch.rand(3)], 4), ValueError, "between 0 and 3"),
        (([torch.rand(3)], -1), ValueError, "between 0 and 3"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.select_topk(*arguments)


@pytest.mark.parametrize("option", [{"nan": "ignore"}, {"transform": "square"}, {"backend": "gpu"}])
def test_wrong_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        ops.select_topk([torch.rand(3)], 1, **option)


def test_no_tensors_select_nothing():
    assert ops.select_topk([], 0) == ops.Selection([], [], float("inf"), 0)


def test_operator_contract(backend):
    torch.library.opcheck(
        torch.ops.cwfast.select_topk.default, ([torch.rand(9), torch.rand(70)], 4, False, False, backend)
    )


@pytest.mark.slow
def test_more_than_2_to_the_31_entries():
    """bfloat16 keeps it at 4.3 GB; the largest scores lie beyond what 32 bits can count."""
    numel = (1 << 31) + 1_000
    scores = torch.zeros(numel, dtype=torch.bfloat16)
    scores[-500:] = 2
    scores[5] = scores[1 << 20] = 1
    selection = ops.select_topk([scores], 503, backend="cpu")
    chosen = selection.bits[0].nonzero().reshape(-1)
    flat = torch.cat([8 * i + reference.unpack(selection.bits[0][i : i + 1], 8).nonzero().reshape(-1) for i in chosen])
    assert flat.tolist() == [0, 5, 1 << 20, *range(numel - 500, numel)]
    assert selection.threshold == 0
