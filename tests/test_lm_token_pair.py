"""Statistics of two models and their divergence from one set of logits: the bits of the three ops."""

import pytest
import torch

from cwfast import ops
from cwfast.ops import _lm_token_tiles
from cwfast.ops.lm_token_pair import lm_token_pair
from cwfast.reference import LMHead


def flat(stats):
    return [*stats[:-1], *stats.topk]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(("tokens", "vocabulary", "widths"), [(0, 7, (4, 4)), (37, 1029, (8, 8)), (130, 2100, (16, 5))])
def test_equals_the_ops_one_after_the_other(backend, dtype, softcap, tokens, vocabulary, widths, monkeypatch):
    if backend == "triton" and dtype != torch.float32:
        pytest.skip("no float64 there, and the interpreter gets bfloat16 wrong")
    monkeypatch.setattr(_lm_token_tiles, "ROWS", 64)
    hidden = [torch.randn(tokens, width).to(dtype) for width in widths]
    heads = [
        LMHead(torch.randn(vocabulary, width).to(dtype), torch.randn(vocabulary).to(dtype), softcap, 0.7)
        for width in widths
    ]
    targets = torch.randint(vocabulary, (tokens,))
    given = (hidden[0], heads[0], hidden[1], heads[1])
    stats, ref_stats, divergence = lm_token_pair(*given, targets, topk=3, backend=backend)
    options = {"softcap": softcap, "scale": 0.7, "backend": backend}
    for found, h, head, topk in ((stats, hidden[0], heads[0], 3), (ref_stats, hidden[1], heads[1], 0)):
        expected = ops.lm_token_stats(h, head.weight, targets, bias=head.bias, topk=topk, **options)
        for one, other in zip(flat(found), flat(expected), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    expected = ops.lm_token_kl(
        hidden[0], heads[0].weight, hidden[1], heads[1].weight, bias=heads[0].bias, ref_bias=heads[1].bias, **options
    )
    assert torch.equal(divergence, expected)
    assert not divergence.requires_grad


def test_each_logit_is_made_once(monkeypatch):
    hidden, weight = torch.randn(20, 8), torch.randn(5000, 8)
    made = []
    product = _lm_token_tiles.Tiles.product
    monkeypatch.setattr(_lm_token_tiles.Tiles, "product", lambda *args: made.append(args[1:3]) or product(*args))
    lm_token_pair(hidden, LMHead(weight), hidden + 1, LMHead(weight), torch.zeros(20, dtype=torch.int64), backend="cpu")
    assert sum(len(h) * len(w) for h, w in made) == 2 * 20 * 5000


def test_impossible_tokens_are_nan_as_in_the_ops(backend):
    if backend == "triton":
        pytest.skip("the three ops themselves there")
    hidden, weight = torch.randn(9, 4), torch.randn(33, 4)
    hidden[3] = torch.inf
    targets = torch.arange(9)
    for h, r in ((hidden, hidden.nan_to_num(posinf=1.0)), (hidden.nan_to_num(posinf=1.0), hidden)):
        stats, ref_stats, divergence = lm_token_pair(h, LMHead(weight), r, LMHead(weight), targets, backend=backend)
        for found, of in ((stats, h), (ref_stats, r)):
            for one, other in zip(found[:-1], ops.lm_token_stats(of, weight, targets, backend=backend), strict=False):
                assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
        assert divergence.isnan().tolist() == [i == 3 for i in range(9)]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ref_head": LMHead(torch.zeros(6, 4))}, "only models of one vocabulary"),
        ({"ref_head": LMHead(torch.zeros(5, 4), scale=2.0)}, "same soft-cap and scale"),
        ({"ref_hidden": torch.zeros(2, 4)}, "ref_hidden must have the rows of hidden, 3; got 2"),
        ({"targets": torch.tensor([0, 5, 1])}, r"targets must lie in 0 .. 4; got 0 to 5"),
        ({"topk": 40}, "topk must lie in 0 .. 5"),
    ],
    ids=str,
)
def test_wrong_arguments(changes, match):
    given = {"hidden": torch.zeros(3, 4), "head": LMHead(torch.zeros(5, 4)), "ref_hidden": torch.zeros(3, 4)}
    given |= {"ref_head": LMHead(torch.zeros(5, 4)), "targets": torch.zeros(3, dtype=torch.int64), "backend": "cpu"}
    with pytest.raises(ValueError, match=match):
        lm_token_pair(**{**given, **changes})
