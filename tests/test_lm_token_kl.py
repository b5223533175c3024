"""lm_token_kl on every backend: against float64, near zero, at extreme logits, and backward."""

import pytest
import torch

from cwfast import ops, reference
from cwfast.ops import _lm_token_tiles
from cwfast.reference import LMHead
from cwfast.testing import assert_no_worse


def problem(tokens, vocabulary, width=7, ref_width=5, dtype=torch.float32, spread=1.0):
    hidden, ref_hidden = torch.randn(tokens, width).to(dtype), torch.randn(tokens, ref_width).to(dtype)
    weight = (spread * torch.randn(vocabulary, width)).to(dtype)
    return hidden, weight, ref_hidden, (spread * torch.randn(vocabulary, ref_width)).to(dtype)


def plain(hidden, weight, ref_hidden, ref_weight, softcap=None):
    return reference.lm_token_kl(hidden, LMHead(weight, None, softcap), ref_hidden, LMHead(ref_weight, None, softcap))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (7, 2), (17, 16), (33, 1025), (20, 5000)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_no_worse_than_the_plain_formula(kernel, dtype, tokens, vocabulary, softcap):
    if kernel == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    if kernel == "triton" and dtype == torch.float64:
        pytest.skip("float64 is for the reference and the CPU")
    given = problem(tokens, vocabulary, dtype=dtype)
    found = ops.lm_token_kl(*given, softcap=softcap, backend=kernel)
    truth = plain(*(x.double() for x in given), softcap)
    if dtype == torch.float64:
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-14)
    else:
        assert_no_worse(found, truth, plain(*given, softcap), factor=4.0)


@pytest.mark.parametrize("spread", [1e-2, 30.0, 1e3])
def test_no_worse_at_any_scale(kernel, spread):
    given = problem(40, 2000, spread=spread)
    found = ops.lm_token_kl(*given, backend=kernel)
    assert_no_worse(found, plain(*(x.double() for x in given)), plain(*given), factor=4.0)


def test_of_a_model_and_itself_is_nothing(backend):
    hidden, weight = torch.randn(30, 8), torch.randn(3000, 8)
    same = ops.lm_token_kl(hidden, weight, hidden, weight, backend=backend)
    assert same.abs().max() < 1e-6
    near = ops.lm_token_kl(hidden + 1e-2, weight, hidden, weight, backend=backend)
    truth = plain((hidden + 1e-2).double(), weight.double(), hidden.double(), weight.double())
    torch.testing.assert_close(near.double(), truth, rtol=2e-2, atol=1e-6)


def test_biases_scale_and_any_strides(backend):
    if backend == "triton":
        pytest.skip("float64 is for the reference and the CPU")
    hidden, weight, ref_hidden, ref_weight = (x.double() for x in problem(20, 60))
    bias, ref_bias = torch.randn(60).double(), torch.randn(60).double()
    found = ops.lm_token_kl(
        hidden.T.contiguous().T, weight[:, :], ref_hidden.repeat(2, 1)[::1][:20], ref_weight.T.contiguous().T,
        bias=bias, ref_bias=ref_bias, scale=0.3, backend=backend,
    )  # fmt: skip
    p = torch.log_softmax(0.3 * (hidden @ weight.T + bias), dim=1)
    q = torch.log_softmax(0.3 * (ref_hidden @ ref_weight.T + ref_bias), dim=1)
    torch.testing.assert_close(found, (q.exp() * (q - p)).sum(dim=1), rtol=1e-11, atol=1e-13)


def test_impossible_tokens(backend):
    inf = torch.inf
    zeros, heads = torch.zeros(1, 2), torch.zeros(3, 2)
    call = lambda p, q: ops.lm_token_kl(  # noqa: E731
        zeros, heads, zeros, heads, bias=torch.tensor(p), ref_bias=torch.tensor(q), backend=backend
    ).item()
    assert call([0.0, 0.0, 0.0], [0.0, 0.0, -inf]) == pytest.approx(0.405465, abs=1e-6)  # log 3 - log 2
    assert call([0.0, 0.0, -inf], [0.0, 0.0, -inf]) == 0
    assert call([0.0, 0.0, -inf], [0.0, 0.0, 0.0]) == inf
    for bad in ([0.0, torch.nan, 0.0], [-inf, -inf, -inf], [inf, 0.0, 0.0]):
        assert torch.tensor(call(bad, [0.0, 0.0, 0.0])).isnan()
        assert torch.tensor(call([0.0, 0.0, 0.0], bad)).isnan()


def test_impossible_tiles(kernel):
    """Whole tiles of the model, of the reference or of both have no probability."""
    zeros, heads = torch.zeros(1, 2), torch.zeros(3000, 2)
    for low, high in ((0, 1100), (1000, 2100), (1900, 3000)):
        part = torch.zeros(3000)
        part[low:high] = -torch.inf
        options = {"backend": kernel}
        assert ops.lm_token_kl(zeros, heads, zeros, heads, bias=part, **options).item() == torch.inf
        less = ops.lm_token_kl(zeros, heads, zeros, heads, ref_bias=part, **options)
        torch.testing.assert_close(less, torch.tensor([3000 / (3000 - high + low)]).log())
        assert ops.lm_token_kl(zeros, heads, zeros, heads, bias=part, ref_bias=part, **options).item() == 0


def test_no_tokens(backend):
    empty = ops.lm_token_kl(torch.zeros(0, 3), torch.zeros(5, 3), torch.zeros(0, 2), torch.zeros(5, 2), backend=backend)
    assert empty.shape == (0,)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(backend, softcap, monkeypatch):
    if backend == "triton":
        pytest.skip("float64 is for the reference and the CPU")
    monkeypatch.setattr(_lm_token_tiles, "ROWS", 4)
    monkeypatch.setattr(_lm_token_tiles, "COLUMNS", 16)
    hidden, weight, ref_hidden, ref_weight = (x.double() for x in problem(6, 37))

    def kl(hidden, weight, bias):
        options = {"bias": bias, "softcap": softcap, "scale": 0.5, "backend": backend}
        return ops.lm_token_kl(hidden, weight, ref_hidden, ref_weight, **options)

    inputs = [x.requires_grad_() for x in (hidden, weight, torch.randn(37).double())]
    assert torch.autograd.gradcheck(kl, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_gradients_are_no_worse_than_autograd(kernel, dtype, spread):
    if kernel == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    given, upstream = problem(50, 2100, dtype=dtype, spread=spread), torch.randn(50)

    def gradients(cast, run):
        hidden, weight, *rest = (x.detach().to(cast) for x in given)
        inputs = [hidden.requires_grad_(), weight.requires_grad_()]
        return torch.autograd.grad(run(*inputs, *rest), inputs, upstream.to(torch.promote_types(cast, torch.float32)))

    ours = gradients(dtype, lambda *x: ops.lm_token_kl(*x, backend=kernel))
    for found, truth, single in zip(
        ours, gradients(torch.float64, plain), gradients(torch.float32, plain), strict=True
    ):
        assert found.dtype == dtype
        assert_no_worse(found, truth, single.to(dtype))


def test_the_reference_is_a_constant(backend):
    given = [x.requires_grad_() for x in problem(4, 9)]
    ops.lm_token_kl(*given, backend=backend).sum().backward()
    assert [x.grad is not None for x in given] == [True, True, False, False]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ref_hidden": torch.zeros(4, 3)}, ValueError, "ref_hidden must have the rows of hidden, 3; got 4"),
        ({"ref_weight": torch.zeros(6, 3)}, ValueError, "ref_weight must have the vocabulary of weight, 5 rows; got 6"),
        ({"ref_weight": torch.zeros(5, 2)}, ValueError, "ref_weight must have as many columns as ref_hidden"),
        ({"ref_hidden": torch.zeros(3, 3).double(), "ref_weight": torch.zeros(5, 3).double()}, TypeError, "ref_hidden"),
        ({"ref_bias": torch.zeros(4)}, ValueError, "ref_bias must have shape"),
        ({"scale": torch.inf}, ValueError, "scale must be a finite number; got inf"),
    ],
)
def test_wrong_arguments(changes, error, message):
    given = {"hidden": torch.zeros(3, 2), "weight": torch.zeros(5, 2)}
    given |= {"ref_hidden": torch.zeros(3, 3), "ref_weight": torch.zeros(5, 3)}
    with pytest.raises(error, match=message):
        ops.lm_token_kl(**(given | changes))


def test_operator_contract(backend):
    if backend == "triton":
        pytest.skip("float64 is for the reference and the CPU")
    hidden, weight, ref_hidden, ref_weight = (x.double() for x in problem(5, 20))
    heads = (hidden.requires_grad_(), weight.requires_grad_(), ref_hidden, ref_weight, None, None, 4.0, 0.5)
    torch.library.opcheck(torch.ops.cwfast.lm_token_kl.default, (*heads, backend))
