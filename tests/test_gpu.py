"""Ops and scorer on a GPU against the reference and float64; on the CPU the same tests run with backend "cpu".

Not yet run on a GPU. ``benchmarks/gpu.sh`` runs this file there; elsewhere the GPU's cases are skipped.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional

from cwfast import SaliencyScorer, _backends, reference
from cwfast.ops import accumulate_embedding_saliency_, accumulate_saliency_, lm_token_kl, lm_token_stats, select_topk
from cwfast.testing import HOSTILE, assert_no_worse, hostile_scores

SHAPES = [(5, 1, 7, 9), (3, 4, 33, 65), (2, 128, 128, 128), (9, 17, 130, 257), (4, 600, 256, 192), (1, 1, 1, 1)]


@pytest.fixture(params=["cpu", "cuda", "triton"])
def place(request):
    """Backend and device."""
    backend = request.param
    if backend == "cpu":
        return backend, torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("torch has no GPU here")
    available, reason = _backends.backends()[backend]
    if not available or _backends.interpreted():
        pytest.skip(reason or "Triton is interpreted")
    return backend, torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_saliency_is_no_worse_than_a_loop(place, shape, power, dtype):
    backend, device = place
    samples, steps, fan_in, fan_out = shape
    x, d = (torch.randn(samples, steps, width).to(device, dtype) for width in (fan_in, fan_out))
    factor = torch.randn(fan_out, fan_in).to(device)
    sums = {}
    for exact in (torch.float64, torch.float32):
        each = [(b.T @ a) for a, b in zip(x.to(exact), d.to(exact), strict=True)]
        sums[exact] = (sum((g * factor.to(exact)).abs() ** power for g in each), sum(each))
    out, grad = (torch.zeros(fan_out, fan_in, device=device) for _ in range(2))
    accumulate_saliency_(out, x, d, power=power, factor=factor, grad=grad, backend=backend)
    for i, ours in enumerate((out, grad)):
        assert_no_worse(ours, sums[torch.float64][i], sums[torch.float32][i], factor=4)
    again, grad = (torch.zeros(fan_out, fan_in, device=device) for _ in range(2))
    accumulate_saliency_(again, x, d, power=power, factor=factor, grad=grad, backend=backend)
    assert torch.equal(out, again)  # same bits on every run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("shape", [(3, 40, 7, 5), (4, 600, 50, 130), (9, 17, 1000, 256), (2, 3000, 2, 64)], ids=str)
def test_embedding_is_no_worse_than_a_loop(place, shape, power, dtype):
    """The last shape has tokens of more rows than a piece holds."""
    backend, device = place
    samples, steps, words, width = shape
    indices = torch.randint(words, (samples, steps), device=device)
    d, factor = torch.randn(samples, steps, width).to(device, dtype), torch.randn(words, width).to(device, dtype)
    sums = {}
    for exact in (torch.float64, torch.float32):
        each = torch.zeros(samples, words, width, dtype=exact, device=device)
        for sample, (token, rows) in enumerate(zip(indices, d.to(exact), strict=True)):
            each[sample].index_add_(0, token, rows)
        each[:, 1] = 0
        sums[exact] = ((each * factor.to(exact)).abs() ** power).sum(dim=0), each.sum(dim=0)
    found = []
    for _ in range(2):
        out, grad = (torch.zeros(words, width, device=device) for _ in range(2))
        accumulate_embedding_saliency_(
            out, indices, d, power=power, factor=factor, padding_idx=1, grad=grad, backend=backend
        )
        found.append((out, grad))
    for i, ours in enumerate(found[0]):
        assert_no_worse(ours, sums[torch.float64][i], sums[torch.float32][i], factor=4)
        assert torch.equal(ours, found[1][i])  # same bits on every run


@pytest.mark.parametrize("steps", [(), (5,)], ids=["one_row", "sequences"])
def test_scorer_equals_one_backward_per_sample(place, steps):
    backend, device = place
    model = nn.Sequential(nn.Linear(40, 70), nn.GELU(), nn.LayerNorm(70), nn.Linear(70, 12)).to(device)
    x, y = torch.randn(6, *steps, 40, device=device), torch.randint(12, (6, *steps), device=device)

    def loss(x, y):
        return functional.cross_entropy(model(x).flatten(0, -2), y.flatten())

    sums = {}
    for exact in (torch.float64, torch.float32):
        model.to(exact)
        each = [torch.autograd.grad(loss(x[i : i + 1].to(exact), y[i : i + 1]), model.parameters()) for i in range(6)]
        sums[exact] = [
            sum(g.abs() for g in found) * p.abs() for p, *found in zip(model.parameters(), *each, strict=True)
        ]
    scorer = SaliencyScorer(model, backend=backend)
    with scorer:
        loss(x, y).backward()
    for ours, truth, looped in zip(scorer.scores().values(), *sums.values(), strict=True):
        assert_no_worse(ours, truth.detach(), looped.detach(), factor=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", HOSTILE)
def test_selection_equals_the_reference(place, kind, dtype):
    backend, device = place
    scores = hostile_scores(kind, dtype, 200_000)
    total = sum(score.numel() for score in scores)
    for k in (0, 1, total // 100, total // 2, total):
        expected = select_topk(scores, k, backend="reference")
        found = select_topk([score.to(device) for score in scores], k, backend=backend)
        assert found.threshold == expected.threshold
        assert list(found.counts) == list(expected.counts)
        for ours, theirs in zip(found.bits, expected.bits, strict=True):
            assert torch.equal(ours.cpu(), theirs)


def test_selection_of_a_large_tensor(place):
    backend, device = place
    numel = 10**6 if device.type == "cpu" else 2 * 10**8
    scores = torch.randn(numel, device=device).abs_()
    selection = select_topk([scores], numel // 100, backend=backend)
    mask = reference.unpack(selection.bits[0], numel)
    assert int(mask.sum()) == numel // 100
    assert float(scores[mask].min()) == selection.threshold
    assert float(scores[~mask].max()) <= selection.threshold


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "scale": 0.5}], ids=["plain", "softcap"])
@pytest.mark.parametrize("shape", [(3, 50, 8), (129, 300, 100), (200, 5000, 256), (33, 1025, 72)], ids=str)
def test_token_statistics_are_no_worse_than_logits(place, shape, options, dtype):
    """Also KL and both backwards. Small integers: float32 sums are exact, so that ranks are equal."""
    backend, device = place
    tokens, words, width = shape
    hidden, ref_hidden = (torch.randint(-2, 3, (tokens, width), device=device).to(dtype) for _ in range(2))
    weight, ref_weight = ((torch.randint(-4, 5, (words, width), device=device) / 16).to(dtype) for _ in range(2))
    targets, upstream = torch.randint(words, (tokens,), device=device), torch.randn(tokens, device=device)

    def logits(h, w):
        z = h @ w.T * options.get("scale", 1.0)
        return z if "softcap" not in options else options["softcap"] * torch.tanh(z / options["softcap"])

    def plain(exact, rounded):
        h, w, g, r = (x.to(exact).requires_grad_() for x in (hidden, weight, ref_hidden, ref_weight))
        p, q = torch.log_softmax(logits(h, w), dim=1), torch.log_softmax(logits(g, r), dim=1)
        mean = (p.exp() * p).sum(dim=1)
        logprob, kl = p.gather(1, targets[:, None])[:, 0], (q.exp() * (q - p)).sum(dim=1)
        found = [logprob, mean, (p.exp() * (p - mean[:, None]).square()).sum(dim=1), kl]
        for value in (logprob, kl):
            found += [x.to(rounded) for x in torch.autograd.grad(value, (h, w), upstream.to(exact), retain_graph=True)]
        return [x.detach() for x in found]

    def ours():
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        stats = lm_token_stats(h, w, targets, backend=backend, **options)
        kl = lm_token_kl(h, w, ref_hidden, ref_weight, backend=backend, **options)
        found = [stats.logprob, stats.mean, stats.variance, kl]
        for value in (stats.logprob, kl):
            found += torch.autograd.grad(value, (h, w), upstream)
        return [x.detach() for x in found], stats.rank

    found, rank = ours()
    again, _ = ours()
    truth, single = plain(torch.float64, torch.float64), plain(torch.float32, dtype)
    for i, (value, exact, by_torch) in enumerate(zip(found, truth, single, strict=True)):
        # A 16-bit gradient at the logits is rounded before it is multiplied: 2^-8 of what the sums hold.
        assert_no_worse(value, exact, by_torch, factor=4 if i < 4 or dtype == torch.float32 else 16)
    assert all(map(torch.equal, found, again))  # same bits on every run
    if not options:
        z = hidden.double() @ weight.double().T
        assert torch.equal(rank, (z > z.gather(1, targets[:, None])).sum(dim=1))
