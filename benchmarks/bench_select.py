"""select_topk against the ways to a threshold that PyTorch and NumPy offer, and against one read of the scores.

A peer only finds the threshold (or, topk and sort, also unordered indices); ours also writes the packed mask and
settles ties by index. ``times_<peer>``: how many of our times the peer takes.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cwfast.benchmarks import _harness
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn.utils import prune

from cwfast import reference
from cwfast.ops import Selection, select_topk

RATES = (0.001, 0.01, 0.03, 0.5)
CASES = _harness.by_size(
    tiny=[(10**5, rate) for rate in RATES],
    normal=[(10**7, 0.01)],
    full=[(numel, rate) for numel in (10**7, 10**8) for rate in RATES],
)
LARGE = _harness.by_size(tiny=10**6, normal=10**7, full=5 * 10**8)  # 2 GB
KINDS = ("squares", "equal", "ascending", "mostly_zero", "two_values", "denormal", "infinite")
DTYPES = (torch.float32, torch.bfloat16)
REPEATS = _harness.by_size(tiny=3, normal=5, full=9)
SECONDS = 4.0  # a peer slower than this in all leaves after three rounds


def _partition(scores: Tensor, k: int) -> float:
    keys = scores.view(torch.int16) if scores.dtype == torch.bfloat16 else scores  # non-negative: the same order
    key = np.partition(keys.numpy(), len(keys) - k)[len(keys) - k]
    return float(torch.tensor(key).view(scores.dtype)) if scores.dtype == torch.bfloat16 else float(key)


class Method(NamedTuple):
    """A way to the k largest, and how to see from its result that it found them."""

    run: Callable[[Tensor, int], Any]
    threshold: Callable[[Any, int], float]


METHODS = {
    "cwfast": Method(lambda scores, k: select_topk([scores], k), lambda result, k: result.threshold),
    "torch_topk": Method(
        lambda scores, k: torch.topk(scores, k, sorted=False), lambda result, k: float(result.values.amin())
    ),
    "torch_kthvalue": Method(
        lambda scores, k: torch.kthvalue(scores, len(scores) - k + 1), lambda result, k: float(result.values)
    ),
    "numpy_partition": Method(_partition, lambda result, k: result),
    "torch_sort": Method(
        lambda scores, k: torch.sort(scores, descending=True), lambda result, k: float(result.values[k - 1])
    ),
}


def _scores(numel: int, dtype: torch.dtype, kind: str = "normal") -> Tensor:
    """Half-normal scores, or what becomes of them."""
    generator = torch.Generator().manual_seed(0)
    if kind == "equal":
        return torch.full((numel,), 0.5, dtype=dtype)
    scores = torch.randn(numel, generator=generator).abs_()
    if kind == "squares":  # as the Fisher criterion gives them
        scores.square_()
    elif kind == "ascending":
        scores = torch.arange(numel, dtype=torch.float32)  # beyond 2^24 some are equal
    elif kind == "mostly_zero":  # fewer positive scores than are selected, as behind dead units
        scores[torch.rand(numel, generator=generator) > 0.005] = 0
    elif kind == "two_values":
        scores = (scores > 1).float()
    elif kind == "denormal":
        scores.mul_(1e-39)
    elif kind == "infinite":  # as many as are selected, nearly
        scores[torch.rand(numel, generator=generator) < 0.009] = torch.inf
    return scores.to(dtype)


def _check(scores: list[Tensor], selection: Selection, k: int) -> None:
    """Refuses a selection that is not exactly: everything above the k-th largest, then the first that equal it."""
    flat = torch.cat([score.reshape(-1) for score in scores])
    threshold = _partition(flat, k)
    expected = flat > threshold
    quota = k - int(expected.sum())
    expected[(flat == threshold).nonzero()[:quota, 0]] = True
    masks = [reference.unpack(bits, score.numel()) for bits, score in zip(selection.bits, scores, strict=True)]
    if selection.threshold != threshold or sum(selection.counts) != k or not torch.equal(torch.cat(masks), expected):
        raise AssertionError(f"the selection of {k} from {len(flat)} scores is wrong")


def _case(numel: int, rate: float, dtype: torch.dtype, kind: str = "") -> str:
    return f"select {str(dtype).removeprefix('torch.')} N={numel:.0e} k={rate:.1%} {kind}".rstrip().replace("e+0", "e")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("numel", "rate"), CASES)
def test_one_tensor(benchmark: BenchmarkFixture, numel: int, rate: float, dtype: torch.dtype) -> None:
    """Half-normal scores."""
    scores, k = _scores(numel, dtype), int(numel * rate)
    selection = select_topk([scores], k)
    _check([scores], selection, k)
    # these take seconds, and about the same at every rate: 1% stands for all
    slow = {"torch_sort"} if numel == 10**8 or rate != 0.01 else set()
    slow |= {"torch_topk", "torch_kthvalue"} if numel == 10**8 and rate != 0.01 else set()
    names = [name for name in METHODS if name not in slow]
    for name in names[1:]:
        threshold = METHODS[name].threshold(METHODS[name].run(scores, k), k)
        if threshold != selection.threshold:
            raise AssertionError(f"{name} must find the threshold {selection.threshold}; got {threshold}")
    variants = {name: lambda method=METHODS[name]: method.run(scores, k) for name in names}
    times = _harness.interleaved({**variants, "read": _harness.read(scores)}, REPEATS, seconds=SECONDS)
    ratios = {"reads": _harness.ratio(times, "cwfast", "read")}
    ratios |= {f"times_{name}": _harness.ratio(times, name, "cwfast") for name in names[1:]}
    case = _case(numel, rate, dtype)
    _harness.report(benchmark, case, times, variants["cwfast"], ratios=ratios, numel=numel, k=k, dtype=str(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_hard_scores(benchmark: BenchmarkFixture, kind: str) -> None:
    """Other distributions; of some the threshold's value is shared by (nearly) all, so that no bracket can hold."""
    numel, rate = _harness.by_size(tiny=10**5, normal=10**7, full=10**8), 0.01
    scores, k = _scores(numel, torch.float32, kind), int(numel * rate)
    _check([scores], select_topk([scores], k), k)
    variants = {name: lambda method=METHODS[name]: method.run(scores, k) for name in ("cwfast", "numpy_partition")}
    times = _harness.interleaved({**variants, "read": _harness.read(scores)}, REPEATS, seconds=SECONDS)
    ratios = {
        "reads": _harness.ratio(times, "cwfast", "read"),
        "times_numpy_partition": _harness.ratio(times, "numpy_partition", "cwfast"),
    }
    case = _case(numel, rate, torch.float32, kind)
    _harness.report(benchmark, case, times, variants["cwfast"], ratios=ratios, numel=numel, k=k, dtype="torch.float32")


def test_large(benchmark: BenchmarkFixture) -> None:
    """2 GB of scores: the check (np.partition) and torch.topk run once each, and their times are of that run."""
    rates = (0.001, 0.01, 0.03, 0.5)
    scores = _scores(LARGE, torch.float32)
    k = LARGE // 100
    once = {}
    for name in ("numpy_partition", "torch_topk"):
        begin = time.perf_counter()
        threshold = METHODS[name].threshold(METHODS[name].run(scores, k), k)
        once[name] = time.perf_counter() - begin
        selection = select_topk([scores], k)
        if threshold != selection.threshold or sum(selection.counts) != k:
            raise AssertionError(f"{name} must find the threshold {selection.threshold}; got {threshold}")
    variants: dict[str, Callable[[], object]] = {
        f"cwfast_{rate:.1%}": lambda rate=rate: select_topk([scores], int(LARGE * rate)) for rate in rates
    }
    times = _harness.interleaved({**variants, "read": _harness.read(scores)}, _harness.by_size(tiny=3, full=5))
    ratios = {f"reads_{rate:.1%}": _harness.ratio(times, f"cwfast_{rate:.1%}", "read") for rate in rates}
    ours = _harness.medians(times)["cwfast_1.0%"]
    ratios |= {f"times_{name}": seconds / ours for name, seconds in once.items()}
    case = f"select float32 N={LARGE:.0e}".replace("e+0", "e")
    every = {**times, **{name: [seconds] for name, seconds in once.items()}}
    _harness.report(benchmark, case, every, variants["cwfast_1.0%"], ratios=ratios, numel=LARGE, k=k)


def test_many_tensors(benchmark: BenchmarkFixture) -> None:
    """The scores of a model of 300 small parameters, which the peers must first concatenate."""
    count, each = 300, _harness.by_size(tiny=333, full=33_333)
    scores = [part.clone() for part in _scores(count * each, torch.float32).split(each)]
    k = count * each // 100
    _check(scores, select_topk(scores, k), k)
    variants: dict[str, Callable[[], object]] = {
        "cwfast": lambda: select_topk(scores, k),
        "cat_and_topk": lambda: torch.topk(torch.cat(scores), k, sorted=False),
        "cat": lambda: torch.cat(scores),
        "read": _harness.read(*scores),
    }
    times = _harness.interleaved(variants, REPEATS, seconds=SECONDS)
    ratios = {"reads": _harness.ratio(times, "cwfast", "read")}
    ratios |= {f"times_{name}": _harness.ratio(times, name, "cwfast") for name in ("cat_and_topk", "cat")}
    case = _case(count * each, 0.01, torch.float32, f"in {count} tensors")
    _harness.report(benchmark, case, times, variants["cwfast"], ratios=ratios, numel=count * each, k=k, tensors=count)


def test_global_unstructured(benchmark: BenchmarkFixture) -> None:
    """prune.global_unstructured, whose whole work (scores of all layers, one threshold, a mask each) includes ours."""
    width = _harness.by_size(tiny=64, full=1024)
    layers = [nn.Linear(width, width, bias=False) for _ in range(4)]
    weights = [layer.weight.detach() for layer in layers]
    numel = sum(weight.numel() for weight in weights)
    k = numel // 100
    scores = [weight.abs() for weight in weights]
    _check(scores, select_topk(scores, k), k)

    def pruned() -> None:
        prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=numel - k)
        for layer in layers:
            prune.remove(layer, "weight")

    def fill(_: str) -> None:  # pruning has zeroed them
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight.data.copy_(weight)

    kept = [weight.clone() for weight in weights]
    variants: dict[str, Callable[[], object]] = {
        "cwfast": lambda: select_topk(weights, k, transform="abs"),
        "global_unstructured": pruned,
        "read": _harness.read(*weights),
    }
    times = _harness.interleaved(variants, REPEATS, setup=fill, seconds=SECONDS)
    ratios = {
        "reads": _harness.ratio(times, "cwfast", "read"),
        "times_global_unstructured": _harness.ratio(times, "global_unstructured", "cwfast"),
    }
    case = _case(numel, 0.01, torch.float32, "|w| of 4 layers")
    _harness.report(benchmark, case, times, variants["cwfast"], ratios=ratios, numel=numel, k=k)


def memory(method: str, numel: int) -> Iterator[None]:
    """For peak_memory: selection of 1% of float32 scores."""
    scores = _scores(numel, torch.float32)
    METHODS[method].run(scores[:100_000], 1000)
    yield
    METHODS[method].run(scores, numel // 100)


def test_memory(benchmark: BenchmarkFixture) -> None:
    """Extra bytes per score, in fresh processes; ours may take the mask and N / 8 bytes."""
    numel = _harness.by_size(tiny=10**6, normal=10**7, full=10**8)
    names = _harness.by_size(tiny=("cwfast",), full=("cwfast", "torch_topk", "numpy_partition"))
    extra = {name: _harness.peak_memory(memory, name, numel) for name in names}
    if extra["cwfast"] is not None and extra["cwfast"] > numel / 4 + (8 << 20):
        raise AssertionError(f"selecting from {numel} scores must take at most N / 4 bytes; got {extra['cwfast']}")
    scores = _scores(10**5, torch.float32)
    per_score = {f"bytes_per_score_{name}": value / numel for name, value in extra.items() if value is not None}
    case = f"select memory N={numel:.0e}".replace("e+0", "e")
    _harness.report(
        benchmark, case, {}, lambda: select_topk([scores], 1000), ratios=per_score, numel=numel, bytes=extra
    )
