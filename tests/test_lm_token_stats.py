"""lm_token_stats on every backend: against float64, at extreme logits, under any batching, and backward."""

import itertools

import numpy as np
import pytest
import torch

from cwfast import ops, reference
from cwfast.ops import _lm_token_tiles
from cwfast.ops._lm_token_parts import finish, merge
from cwfast.reference import LMHead, TokenStats
from cwfast.testing import assert_no_worse

EXACT = ("rank", "correct", "topk_indices")


def flat(stats: TokenStats) -> dict[str, torch.Tensor]:
    values = stats._asdict()
    topk = values.pop("topk")
    return values | {"topk_logprob": topk.logprob, "topk_indices": topk.indices}


def problem(tokens, vocabulary, width, dtype=torch.float32, spread=4.0):
    """Small integers, whose products and sums are exact in float32 in any order: all backends see the same logits."""
    hidden = torch.randint(-2, 3, (tokens, width)).to(dtype)
    weight = (torch.randint(-4, 5, (vocabulary, width)) * (spread / 8)).to(dtype)
    return hidden, weight, torch.randint(vocabulary, (tokens,))


def no_worse(stats, hidden, weight, targets, **options):
    """Each value is as near to float64 as the plain formulas in the same precision; what is exact is equal."""
    options = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    head = LMHead(weight.double(), *(options.get(k, d) for k, d in (("bias", None), ("softcap", None), ("scale", 1.0))))
    topk = options.get("topk", 0)
    truth = flat(reference.lm_token_stats(hidden.double(), head, targets, topk))
    single = head._replace(weight=weight.float(), bias=None if head.bias is None else head.bias.float())
    plain = flat(reference.lm_token_stats(hidden.float(), single, targets, topk))
    assert not stats.rank[stats.correct].any()
    z = reference.lm_logits(hidden.double(), head)
    distance = z - z.gather(1, targets[:, None])
    near = 1e-5 * z.abs().amax(dim=1, keepdim=True)
    assert ((distance > near).sum(dim=1) <= stats.rank).all()
    assert (stats.rank < (distance >= -near).sum(dim=1)).all()
    for name, value in flat(stats).items():
        if name in EXACT:  # two versions of tanh may round two logits to one number, or not
            assert options.get("softcap") or torch.equal(value, plain[name]), name
        elif value.numel():
            assert_no_worse(value, truth[name], plain[name])


def naive(z, y):
    """Textbook formulas in long double; only for moderate logits."""
    z = z.numpy().astype(np.longdouble)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    total = p.sum(axis=1, keepdims=True)
    log_p, p = z - z.max(axis=1, keepdims=True) - np.log(total), p / total
    rows, y = np.arange(len(z)), y.numpy()
    mean = (p * log_p).sum(axis=1)
    return {
        "logprob": log_p[rows, y],
        "logsumexp": (z - log_p)[:, 0],
        "mean": mean,
        "variance": (p * (log_p - mean[:, None]) ** 2).sum(axis=1),
        "entropy": -mean,
        "rank": (z > z[rows, y][:, None]).sum(axis=1),
        "correct": z.argmax(axis=1) == y,
        "topk_logprob": -np.sort(-log_p, axis=1)[:, :3],
        "topk_indices": np.argsort(-z, axis=1, kind="stable")[:, :3],
    }


@pytest.mark.parametrize("vocabulary", [3, 101, 1025])
def test_equals_the_formulas(backend, vocabulary):
    if backend == "triton":
        pytest.skip("float64 is for the reference and the CPU")
    hidden, weight = torch.randn(60, 7, dtype=torch.float64), torch.randn(vocabulary, 7, dtype=torch.float64)
    bias, targets = torch.randn(vocabulary, dtype=torch.float64), torch.randint(vocabulary, (60,))
    stats = flat(
        ops.lm_token_stats(hidden, weight, targets, bias=bias, softcap=5.0, scale=0.7, topk=3, backend=backend)
    )
    z = 5.0 * torch.tanh(0.7 * (hidden @ weight.T + bias) / 5.0)
    for name, value in naive(z, targets).items():
        np.testing.assert_allclose(
            stats[name].numpy(), value.astype(stats[name].numpy().dtype), 1e-11, 1e-13, err_msg=name
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "width"),
    [
        (1, 1, 1),
        (7, 2, 3),
        (16, 15, 4),
        (17, 16, 1),
        (33, 17, 8),
        (5, 1023, 5),
        (40, 1024, 16),
        (3, 1025, 2),
        (65, 5000, 12),
    ],
)
def test_no_worse_than_the_plain_formulas(kernel, dtype, tokens, vocabulary, width):
    if kernel == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    hidden, weight, targets = problem(tokens, vocabulary, width, dtype)
    bias = torch.randint(-3, 4, (vocabulary,)).to(dtype)
    for options in ({}, {"bias": bias, "scale": 0.5, "topk": min(vocabulary, 5)}):
        stats = ops.lm_token_stats(hidden, weight, targets, backend=kernel, **options)
        assert {x.dtype for name, x in flat(stats).items() if name not in EXACT} == {torch.float32}
        no_worse(stats, hidden, weight, targets, **options)


@pytest.mark.parametrize("spread", [2**-10, 1.0, 128.0, 8192.0])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_no_worse_at_any_scale(kernel, spread, softcap):
    hidden, weight, targets = problem(64, 3000, 16, spread=spread)
    targets[:32] = (hidden[:32] @ weight.T).argmax(dim=1)  # members: the target dominates
    stats = ops.lm_token_stats(hidden, weight, targets, softcap=softcap, backend=kernel)
    no_worse(stats, hidden, weight, targets, softcap=softcap)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocabulary", "options"),
    [(32_000, {}), (128_256, {"softcap": 30.0}), (262_144, {"scale": 500.0}), (262_144, {})],
    ids=["plain", "softcap", "extreme", "largest"],
)
def test_no_worse_with_large_vocabularies(vocabulary, options):
    hidden, weight = torch.randn(48, 96), torch.randn(vocabulary, 96) / 4
    targets = torch.cat([torch.randint(vocabulary, (24,)), (hidden[24:] @ weight.T).argmax(dim=1)])
    stats = ops.lm_token_stats(hidden, weight, targets, topk=8, backend="cpu", **options)
    double = ops.lm_token_stats(hidden.double(), weight.double(), targets, topk=8, backend="reference", **options)
    plain = ops.lm_token_stats(hidden, weight, targets, topk=8, backend="reference", **options)
    for name, value in flat(stats).items():
        if name in EXACT:  # logits nearer to each other than their rounding may change places
            assert (value != flat(double)[name]).float().mean() < 0.05
        else:
            assert_no_worse(value, flat(double)[name], flat(plain)[name])


def test_variance_keeps_its_digits_where_its_squares_cancel(kernel):
    """One logit apart from many equal ones: the plain difference of moments loses all but log10(V) digits."""
    weight = torch.zeros(5000, 1)
    weight[77] = 1.0
    stats = ops.lm_token_stats(torch.tensor([[1e-3], [5.0], [20.0]]), weight, torch.tensor([77, 0, 77]), backend=kernel)
    truth = ops.lm_token_stats(
        torch.tensor([[1e-3], [5.0], [20.0]]).double(), weight.double(), torch.tensor([77, 0, 77]), backend="reference"
    )
    for name in ("logprob", "mean", "variance", "entropy"):
        torch.testing.assert_close(getattr(stats, name).double(), getattr(truth, name), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_batching(dtype):
    hidden, weight = torch.randn(130, 64).to(dtype), torch.randn(3001, 64).to(dtype) / 4
    targets = torch.randint(3001, (130,))
    whole = flat(ops.lm_token_stats(hidden, weight, targets, topk=4, backend="cpu"))
    again = flat(ops.lm_token_stats(hidden.clone(), weight, targets, topk=4, backend="cpu"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    for size in (1, 2, 7, 64, 129):
        pieces = [
            flat(ops.lm_token_stats(hidden[i : i + size], weight, targets[i : i + size], topk=4, backend="cpu"))
            for i in range(0, 130, size)
        ]
        for name, value in whole.items():
            other = torch.cat([piece[name] for piece in pieces])
            if name in EXACT:
                assert torch.equal(value, other)
            else:
                torch.testing.assert_close(other, value, rtol=1e-6 if dtype != torch.float64 else 1e-13, atol=1e-6)


def test_any_tile_gives_the_same_to_rounding(monkeypatch):
    hidden, weight, targets = problem(50, 700, 9)
    whole = flat(ops.lm_token_stats(hidden, weight, targets, topk=6, backend="cpu"))
    for rows, columns in ((16, 16), (48, 32), (7, 112), (2048, 2048)):
        monkeypatch.setattr(_lm_token_tiles, "ROWS", rows)
        monkeypatch.setattr(_lm_token_tiles, "COLUMNS", columns)
        for name, value in flat(ops.lm_token_stats(hidden, weight, targets, topk=6, backend="cpu")).items():
            torch.testing.assert_close(value, whole[name], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("view", ["transposed", "sliced", "offset"])
def test_any_strides(backend, view):
    hidden, weight, targets = {
        "transposed": lambda: (torch.randn(6, 20).T, torch.randn(6, 50).T, torch.randint(50, (20,))),
        "sliced": lambda: (
            torch.randn(40, 12)[::2, ::2],
            torch.randn(100, 12)[::2, ::2],
            torch.randint(50, (40,))[::2],
        ),
        "offset": lambda: (
            torch.randn(121)[1:].view(20, 6),
            torch.randn(301)[1:].view(50, 6),
            torch.randint(50, (21,))[1:],
        ),
    }[view]()
    strided = flat(ops.lm_token_stats(hidden, weight, targets, topk=2, backend=backend))
    dense = flat(
        ops.lm_token_stats(hidden.contiguous(), weight.contiguous(), targets.contiguous(), topk=2, backend=backend)
    )
    for name, value in strided.items():
        torch.testing.assert_close(value, dense[name], rtol=1e-6, atol=1e-6)


def test_same_bits_on_every_instruction_set_and_run():
    native = pytest.importorskip("cwfast._C")
    hidden, weight, targets = torch.randn(70, 20), torch.randn(2500, 20), torch.randint(2500, (70,))
    before, results = native.isa(), []
    for isa in native.isas() * 2:
        native.set_isa(isa)
        stats = ops.lm_token_stats(hidden, weight, targets, bias=weight[:, 0], softcap=4.0, scale=1.5, topk=5)
        results.append(flat(stats))
    native.set_isa(before)
    assert all(torch.equal(result[name], results[0][name]) for result in results for name in result)


def test_classes_without_probability_and_ties(backend):
    inf = torch.inf
    bias = torch.tensor([0.0, -inf, 0.0, -1.0])
    hidden, weight = torch.zeros(4, 2), torch.zeros(4, 2)
    stats = ops.lm_token_stats(hidden, weight, torch.tensor([0, 1, 2, 3]), bias=bias, topk=4, backend=backend)
    assert stats.rank.tolist() == [0, 3, 0, 2]
    assert stats.correct.tolist() == [True, False, False, False]
    assert stats.topk.indices.tolist() == [[0, 2, 3, -1]] * 4
    assert stats.topk.logprob[0, 3] == -inf
    assert stats.logprob[1] == -inf
    p = torch.softmax(torch.tensor([0.0, 0.0, -1.0]).double(), 0)
    torch.testing.assert_close(stats.entropy.double(), -(p * p.log()).sum().expand(4), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.variance.double(), (p * (p.log() - (p * p.log()).sum()) ** 2).sum().expand(4))


def test_rows_without_a_distribution(backend):
    nan, inf = torch.nan, torch.inf
    hidden = torch.tensor([[nan, 0.0], [inf, 1.0], [1.0, 0.0], [3e38, 3e38]])
    weight = torch.ones(40, 2)
    stats = ops.lm_token_stats(hidden, weight, torch.tensor([0, 3, 0, 39]), topk=1, backend=backend)
    bad = torch.tensor([True, True, False, True])
    for name, value in flat(stats).items():
        if name in EXACT:
            assert (value.reshape(-1)[bad] == (0 if name == "correct" else -1)).all()
        else:
            assert torch.equal(value.reshape(-1).isnan(), bad), name
    none = ops.lm_token_stats(
        hidden[2:3], weight, targets := torch.tensor([3]), bias=torch.full((40,), -inf), backend=backend
    )
    assert none.logprob.isnan().all()
    assert none.rank.tolist() == [-1]
    assert len(targets) == 1


def test_no_tokens_and_no_width(backend):
    none = ops.lm_token_stats(
        torch.zeros(0, 3), torch.zeros(5, 3), torch.zeros(0, dtype=torch.int64), topk=2, backend=backend
    )
    assert all(len(value) == 0 for value in flat(none).values())
    assert none.topk.logprob.shape == (0, 2)
    uniform = ops.lm_token_stats(torch.zeros(2, 0), torch.zeros(5, 0), torch.tensor([0, 4]), backend=backend)
    torch.testing.assert_close(uniform.entropy, torch.full((2,), 5.0).log())


def test_vocabulary_in_parts_equals_the_whole():
    hidden, weight, targets = problem(30, 1000, 6)
    bias = torch.randn(1000)
    whole = flat(ops.lm_token_stats(hidden, weight, targets, bias=bias, softcap=9.0, topk=7, backend="cpu"))
    edges = [0, 1, 333, 333, 980, 1000]
    heads = [LMHead(weight[a:b], bias[a:b], 9.0) for a, b in itertools.pairwise(edges)]
    target_logit = torch.stack(
        [_lm_token_tiles.target_logits(hidden, head, targets, a) for head, a in zip(heads, edges, strict=False)]
    ).amax(dim=0)
    parts = [
        _lm_token_tiles.parts_of(hidden, head, targets, target_logit, 7, a, 1000)
        for head, a in zip(heads, edges, strict=False)
    ]
    for order in ((0, 1, 2, 3, 4), (4, 2, 0, 3, 1)):
        total = parts[order[0]]
        for i in order[1:]:
            total = merge(total, parts[i])
        *found, sums = finish(total, target_logit, targets)
        for value, (name, expected) in zip(found, whole.items(), strict=True):
            torch.testing.assert_close(value, expected, rtol=2e-6, atol=2e-6, msg=name)
        torch.testing.assert_close(sums[:, 0], whole["logsumexp"])


def test_autocast_changes_nothing(backend):
    hidden, weight, targets = problem(9, 50, 8)
    plain = flat(ops.lm_token_stats(hidden + 1e-3, weight, targets, backend=backend))
    with torch.autocast("cpu", torch.bfloat16):
        cast = flat(ops.lm_token_stats(hidden + 1e-3, weight, targets, backend=backend))
    assert all(torch.equal(plain[name], cast[name]) for name in plain)


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(backend, softcap, monkeypatch):
    if backend == "triton":
        pytest.skip("float64 is for the reference and the CPU")
    monkeypatch.setattr(_lm_token_tiles, "ROWS", 4)
    monkeypatch.setattr(_lm_token_tiles, "COLUMNS", 16)
    targets = torch.randint(37, (6,))

    def logprob(hidden, weight, bias):
        options = {"bias": bias, "softcap": softcap, "scale": 0.5, "backend": backend}
        return ops.lm_token_stats(hidden, weight, targets, **options).logprob

    assert torch.autograd.gradcheck(logprob, (double(6, 5), double(37, 5), double(37)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [1.0, 1e3])
def test_gradients_are_no_worse_than_autograd(kernel, dtype, spread):
    if kernel == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    hidden, weight, targets = problem(50, 2100, 12, dtype, spread)
    upstream = torch.randn(50)

    def gradients(cast, run):
        inputs = [x.detach().to(cast).requires_grad_() for x in (hidden, weight)]
        return torch.autograd.grad(run(*inputs), inputs, upstream.to(torch.promote_types(cast, torch.float32)))

    def plain(h, w):
        return torch.log_softmax(h @ w.T, dim=1).gather(1, targets[:, None])[:, 0]

    ours = gradients(dtype, lambda h, w: ops.lm_token_stats(h, w, targets, backend=kernel).logprob)
    for found, truth, single in zip(
        ours, gradients(torch.float64, plain), gradients(torch.float32, plain), strict=True
    ):
        assert found.dtype == dtype
        assert_no_worse(found, truth, single.to(dtype))


def test_only_what_is_needed_has_a_gradient(backend):
    hidden, weight, targets = problem(4, 9, 3)
    stats = ops.lm_token_stats(hidden.requires_grad_(), weight, targets, backend=backend)
    assert not any(value.requires_grad for name, value in flat(stats).items() if name != "logprob")
    stats.logprob.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_no_second_gradient(backend):
    hidden, weight, targets = problem(4, 9, 3)
    logprob = ops.lm_token_stats(hidden.requires_grad_(), weight.requires_grad_(), targets, backend=backend).logprob
    (first,) = torch.autograd.grad(logprob.sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        first.sum().backward()


def test_compiles():
    hidden, weight, targets = problem(6, 40, 3)

    def loss(hidden, weight, targets):
        divergence = ops.lm_token_kl(hidden, weight, 2 * hidden.detach(), weight.detach())
        return (divergence - ops.lm_token_stats(hidden, weight, targets).logprob).sum()

    found = []
    for run in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        run(given := hidden.clone().requires_grad_(), weight, targets).backward()
        found.append(given.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(3)}, ValueError, "hidden must have 2 dimensions"),
        ({"weight": torch.zeros(5, 3)}, ValueError, "weight must have as many columns as hidden"),
        ({"weight": torch.zeros(5, 2).double()}, TypeError, "weight must have dtype torch.float32; got torch.float64"),
        ({"weight": torch.zeros(0, 2), "topk": 0}, ValueError, "weight must have at least 1 row"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, ValueError, "targets must have shape"),
        ({"targets": torch.tensor([0, 5, 1])}, ValueError, "targets must lie in 0 .. 4; got 0 to 5"),
        ({"targets": torch.tensor([0, -100, 1])}, ValueError, "targets must lie in 0 .. 4; got -100 to 1"),
        ({"targets": torch.zeros(3)}, TypeError, "targets must have dtype torch.int64"),
        ({"bias": torch.zeros(4)}, ValueError, "bias must have shape"),
        ({"softcap": 0.0}, ValueError, "softcap must be a positive number or None; got 0.0"),
        ({"softcap": torch.inf}, ValueError, "softcap must be a positive number or None; got inf"),
        ({"scale": torch.nan}, ValueError, "scale must be a finite number; got nan"),
        ({"topk": 6}, ValueError, "topk must lie in 0 .. 5; got 6"),
        ({"topk": True}, TypeError, "topk must be an int; got bool"),
    ],
)
def test_wrong_arguments(changes, error, message):
    given = {"hidden": torch.zeros(3, 2), "weight": torch.zeros(5, 2), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        ops.lm_token_stats(**(given | changes))


def test_operator_contract(backend):
    if backend == "triton":
        pytest.skip("float64 is for the reference and the CPU")
    hidden, weight, targets = double(5, 3), double(20, 3), torch.randint(20, (5,))
    for arguments in ((None, None, 1.0, 0), (double(20), 4.0, 0.5, 3)):
        call = (hidden, weight, targets, *arguments, backend)
        torch.library.opcheck(torch.ops.cwfast.lm_token_stats.default, call)
    sums = torch.randn(5, 2, dtype=torch.float64)
    call = (
        torch.randn(5).double(),
        sums,
        hidden.detach(),
        weight.detach(),
        targets,
        None,
        None,
        1.0,
        [True, True, False],
        backend,
    )
    torch.library.opcheck(torch.ops.cwfast.lm_logprob_backward.default, call)
