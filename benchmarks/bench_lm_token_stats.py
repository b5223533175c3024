"""Token statistics from hidden states and LM head, against the ways that make logits, and the product plus one exp."""

from collections.abc import Callable, Iterator

import pytest
import torch
from cwfast.benchmarks import _harness
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from cwfast import ops
from cwfast.testing import assert_no_worse

CHUNK = 256  # tokens whose logits the chunked peer makes at once


def _problem(tokens: int, vocabulary: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of standard deviation 3; half of the targets are likely ones."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, width), torch.randn(vocabulary, width) * 3 / width**0.5
    targets = torch.randint(vocabulary, (tokens,))
    weight[targets[: tokens // 2]] += 0.3 * hidden[: tokens // 2]
    return hidden.to(dtype), weight.to(dtype), targets


def _composed(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """What one would write with torch: logits, log_softmax, then each statistic from it."""
    z = (hidden @ weight.T).float()
    log_p, row = torch.log_softmax(z, dim=1), targets[:, None]
    p = log_p.exp()
    mean = (p * log_p).sum(dim=1)
    variance = (p * log_p.square()).sum(dim=1) - mean.square()
    rank = (z > z.gather(1, row)).sum(dim=1)
    return log_p.gather(1, row)[:, 0], z.logsumexp(dim=1), mean, variance, -mean, rank, z.argmax(dim=1) == targets


def _chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The same, a few hundred tokens at once: what bounds the memory without a kernel."""
    pieces = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return tuple(map(torch.cat, zip(*(_composed(h, weight, y) for h, y in pieces), strict=True)))


def _ways() -> dict[str, Callable[[Tensor, Tensor, Tensor], object]]:
    return {"cwfast": ops.lm_token_stats, "composed": _composed, "chunked": _chunked}


def memory(way: str, tokens: int, vocabulary: int, width: int, dtype: str) -> Iterator[None]:
    """For peak_memory."""
    small = _problem(32, 64, 16, getattr(torch, dtype))
    _ways()[way](*small)
    hidden, weight = (torch.ones(n, width, dtype=getattr(torch, dtype)) for n in (tokens, vocabulary))
    torch.mm(hidden.float()[:64], weight[:64].float().T)
    targets = torch.zeros(tokens, dtype=torch.int64)
    yield
    found = _ways()[way](hidden, weight, targets)
    assert found is not None


def _check(dtype: torch.dtype) -> None:
    """Against float64, on fewer tokens: a wrong result gets no time."""
    given = _problem(64, 5000, 64, dtype)
    found, plain = ops.lm_token_stats(*given), _composed(*(x.float() if x.is_floating_point() else x for x in given))
    truth = ops.lm_token_stats(*(x.double() if x.is_floating_point() else x for x in given), backend="reference")
    for name, value, exact, composed in zip(found._fields[:7], found, truth, plain, strict=False):
        if name in ("rank", "correct"):
            if not torch.equal(value, exact):
                raise AssertionError(f"{name} must equal the reference")
        else:
            assert_no_worse(value, exact, composed)


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(32_000, "float32"), (128_256, "float32"), (128_256, "bfloat16"), (262_144, "float32")],
)
def test_lm_token_stats(benchmark: BenchmarkFixture, vocabulary: int, dtype: str) -> None:
    """One batch of tokens; the limit is the float32 product alone, plus one exp of every logit."""
    size = _harness.by_size(
        tiny=(64, vocabulary // 16, 64), normal=(512, vocabulary, 576), full=(1024, vocabulary, 768)
    )
    kind = getattr(torch, dtype)
    _check(kind)
    hidden, weight, targets = _problem(*size, kind)
    tokens, vocabulary, width = size
    single = hidden.float(), weight.float().T
    logits = single[0] @ single[1]
    variants = {
        "cwfast": lambda: ops.lm_token_stats(hidden, weight, targets),
        "composed": lambda: _composed(hidden, weight, targets),
        "chunked": lambda: _chunked(hidden, weight, targets),
        "gemm": lambda: torch.mm(*single, out=logits),
        "exp": lambda: torch.exp(logits, out=logits),
    }

    def setup(name: str) -> None:
        if name == "exp":  # of numbers, which it replaces by larger ones each time
            torch.mm(*single, out=logits)

    times = _harness.interleaved(variants, _harness.by_size(tiny=3, normal=5, full=7), setup=setup)
    limits = [a + b for a, b in zip(times["gemm"], times["exp"], strict=True)]
    ratios = {
        "times_composed": _harness.ratio(times, "composed", "cwfast"),
        "times_chunked": _harness.ratio(times, "chunked", "cwfast"),
        "over_gemm_and_exp": _harness.ratio({**times, "limit": limits}, "cwfast", "limit"),
    }
    # Memory at the size of the promise, or smaller; the other ways only where they fit.
    peak_tokens = _harness.by_size(tiny=256, normal=1024, full=4096)
    ways = ["cwfast"] if _harness.size() == "tiny" else ["cwfast", "chunked"]
    ways += ["composed"] if _harness.size() != "tiny" and peak_tokens * vocabulary < 1 << 29 else []
    peaks = {way: _harness.peak_memory(memory, way, peak_tokens, vocabulary, width, dtype) for way in ways}
    case = f"lm token stats V={vocabulary} {dtype}"
    facts = {"tokens": tokens, "width": width, "memory_tokens": peak_tokens, "bytes": peaks}
    _harness.report(benchmark, case, times, variants["cwfast"], ratios=ratios, **facts)
