"""The descent of histograms that files and ranks share, against sorted keys."""

import math

import pytest
import torch

from cwfast import _radix

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def scores_of(dtype):
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(400, generator=generator, dtype=torch.float64)
    edges = torch.tensor([0.0, -0.0, math.inf, math.inf, 1.0, 1.0, 1.0], dtype=torch.float64)
    limits = torch.finfo(dtype)
    ends = torch.tensor([limits.max, limits.tiny, limits.smallest_normal / 2], dtype=torch.float64)
    close = 1 + torch.arange(50, dtype=torch.float64) * limits.eps  # equal in all but the last digits
    return torch.cat([some.abs(), edges, ends, close]).to(dtype)


@pytest.mark.parametrize("kept", [0, 7, 10**6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bracket_has_the_key_of_rank_k_and_says_how_many_are_selected_inside(dtype, kept):
    scores = scores_of(dtype)
    with_nan = torch.cat([scores, torch.full((5,), math.nan, dtype=dtype)])
    pieces = [_radix.keys(piece) for piece in (with_nan[:100], with_nan[:0], with_nan[100:])]
    ranked = torch.cat(pieces).long().sort(descending=True).values[: len(scores)]
    passes = []

    def histogram(low, shift, count):
        passes.append(count)
        return _radix.histogram(pieces, low, shift, count)

    for k in range(1, len(scores) + 1):
        passes.clear()
        low, high, needed = _radix.bracket(histogram, dtype, k, kept)
        assert low <= ranked[k - 1] < high
        assert needed == k - int((ranked >= high).sum())
        assert high - low == 1 or int(((ranked >= low) & (ranked < high)).sum()) <= kept
        assert max(passes) <= 1 << _radix.DIGIT
        assert len(passes) <= dtype.itemsize // 2
        if kept == 0:
            assert _radix.score_of(low, dtype) == scores.sort(descending=True).values[k - 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_nothing_can_be_selected_the_bracket_is_above_every_key(dtype):
    keys = _radix.keys(torch.tensor([1.0, math.inf, math.nan], dtype=dtype))
    for k in (0, 3):
        low, high, needed = _radix.bracket(lambda *bins: _radix.histogram([keys], *bins), dtype, k)
        assert low == high
        assert needed == 0
        assert _radix.score_of(low, dtype) == math.inf
        assert not (keys >= low).any()
