"""The kernels on an accelerator: ``CWFAST_BENCH_DEVICE=cuda``. Not yet run on a GPU.

With the device "cpu" and size tiny the same code runs in the tests; at other sizes the other suites measure the CPU.
Limits are measured in the same rounds: a matrix product, a read, a copy (a read and a write of the same bytes).
``vmap`` holds the gradients of 2 samples at a time here. Every backend that runs on the device takes part.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch
from cwfast.benchmarks import _harness
from cwfast.benchmarks._models import Block, Problem, loss
from cwfast.benchmarks._per_sample import Truth, forgetting, here, opacus, steps_of, vmap_all, zeros
from cwfast.benchmarks.bench_rewind import list_form
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from cwfast import SaliencyScorer, _backends, ops, reference
from cwfast.ops import accumulate_embedding_saliency_, accumulate_saliency_, lm_token_stats, select_topk
from cwfast.testing import assert_no_worse

DEVICE = _harness.device()
BACKENDS = [b for b in ("cuda", "triton") if DEVICE.type == "cuda" and _backends.backends()[b].available] or ["auto"]
REPEATS = _harness.by_size(tiny=3, full=9)
SECONDS = 3.0  # slower than this in all leaves after three rounds
# Llama-3 8B: width 4096, 32 heads in 8 groups, 14336 inner features.
WIDTH, HEADS, GROUPS, INNER = _harness.by_size(tiny=(32, 4, 2, 48), full=(4096, 32, 8, 14336))
LAYERS = 2
STACKS = _harness.by_size(tiny=[(2, 8)], normal=[(8, 512)], full=[(8, 512), (2, 2048)])  # samples, steps
LINEARS = _harness.by_size(tiny=[4], normal=[512], full=[64, 128, 512, 2048])  # steps of 8192 rows
ROWS = _harness.by_size(tiny=16, full=8192)
WORDS = _harness.by_size(tiny=50, full=32_000)
LOOKUPS = _harness.by_size(tiny=(4, 20), full=(8, 2048))  # samples, steps
SELECT = _harness.by_size(tiny=[10**5], normal=[10**9], full=[10**9, 4 * 10**9])
REWIND = _harness.by_size(tiny=10**5, full=10**9)
TOKENS, VOCABULARY = _harness.by_size(tiny=(40, 300), full=(4096, 131_072))

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and _harness.size() != "tiny", reason="the other suites measure the CPU"
)


def _stack(samples: int, steps: int) -> Problem:
    torch.manual_seed(0)
    with DEVICE:
        model = nn.Sequential(*(Block(WIDTH, HEADS, GROUPS, INNER) for _ in range(LAYERS))).to(torch.bfloat16)
        x = torch.randn(samples, steps, WIDTH, dtype=torch.bfloat16)
        return Problem(model, x, torch.randint(WIDTH, (samples, steps)))


def _over_backward(times: dict[str, list[float]], name: str) -> float:
    rounds = zip(times[name], times["ordinary"], times["forward"], strict=False)
    return statistics.median((ours - forward) / (step - forward) for ours, step, forward in rounds)


def _step(method: str, samples: int, steps: int) -> Iterator[None]:
    """For peak_memory: one step."""
    model, x, y = _stack(samples, steps)
    yield
    if method == "ordinary":
        loss(model, x, y).backward()
    elif method == "vmap":
        vmap_all(model, 2)(x, y, zeros(model))
    else:
        with SaliencyScorer(model, grads=method == "cwfast"):
            loss(model, x, y).backward()


@pytest.mark.parametrize(("samples", "steps"), STACKS)
def test_saliency_stack(benchmark: BenchmarkFixture, samples: int, steps: int) -> None:
    """Forward and backward pass of Llama layers in bfloat16; ``over_backward``: without the forward pass's time."""
    truth = Truth(lambda: _stack(samples, steps))
    ours = {f"cwfast_{b}{'' if grads else '_no_grads'}": (b, grads) for b in BACKENDS for grads in (True, False)}
    peers = {name: make for name, make in (("vmap", lambda m: vmap_all(m, 2)), ("opacus", opacus)) if here((name,))}
    first, x, y = _stack(samples, steps)
    models = {name: _stack(samples, steps).model for name in (*ours, "forward", *peers)} | {"ordinary": first}
    variants = steps_of(models, peers, x, y, truth)
    variants["forward"] = lambda: loss(models["forward"], x, y)

    with ExitStack() as stack:
        for name, (backend, grads) in ours.items():
            scorer = stack.enter_context(SaliencyScorer(models[name], grads=grads, backend=backend))
            variants[name]()
            truth.check(scorer.scores(), factor=4)  # bfloat16 activations of a batch round otherwise than a sample's
        times = _harness.interleaved(variants, REPEATS, setup=forgetting(models), seconds=SECONDS)
        ratios = {f"over_step_{name}": _harness.ratio(times, name, "ordinary") for name in ours}
        ratios |= {f"over_backward_{name}": _over_backward(times, name) for name in ours}
        ratios |= {f"times_{name}": _harness.ratio(times, name, next(iter(ours))) for name in peers}
        methods = _harness.by_size(tiny=("cwfast",), full=("cwfast", "cwfast_no_grads", "ordinary", "vmap"))
        extra = {name: _harness.peak_memory(_step, name, samples, steps) for name in methods}
        case = f"device saliency stack bfloat16 B={samples} T={steps} width {WIDTH} x {LAYERS}"
        _harness.report(benchmark, case, times, variants[next(iter(ours))], ratios=ratios, bytes=extra)


@pytest.mark.parametrize("steps", LINEARS)
def test_saliency_linear(benchmark: BenchmarkFixture, steps: int) -> None:
    """The op alone in bfloat16 over the matrix product of its inputs, and over the rate of a large square one."""
    with DEVICE:
        torch.manual_seed(0)
        x, d = (torch.randn(ROWS // steps, steps, width).bfloat16() for width in (WIDTH, INNER))
        sums = {t: torch.zeros(INNER, WIDTH, dtype=t) for t in (torch.float64, torch.float32)}
        total, product = torch.zeros(INNER, WIDTH), torch.empty(INNER, WIDTH, dtype=torch.bfloat16)
        side = _harness.by_size(tiny=32, full=8192)
        square = torch.randn(side, side).bfloat16()
    for dtype, scores in sums.items():
        for a, b in zip(d.to(dtype), x.to(dtype), strict=True):
            scores += (a.T @ b).abs_()
    variants: dict[str, Callable[[], object]] = {}
    for backend in BACKENDS:
        out = torch.zeros_like(total)
        accumulate_saliency_(out, x, d, backend=backend)
        assert_no_worse(out, sums[torch.float64], sums[torch.float32])
        variants[f"cwfast_{backend}"] = lambda b=backend, out=out: accumulate_saliency_(out, x, d, backend=b)
        variants[f"cwfast_{backend}_with_grad"] = lambda b=backend, out=out: accumulate_saliency_(
            out, x, d, grad=total, backend=b
        )
    names = list(variants)
    rows, columns = d.flatten(0, 1).T, x.flatten(0, 1)
    variants["gemm"] = lambda: torch.mm(rows, columns, out=product)
    variants["square_gemm"] = lambda: torch.mm(square, square)
    times = _harness.interleaved(variants, REPEATS, seconds=SECONDS)
    share = len(columns) * WIDTH * INNER / side**3
    ratios = {f"over_gemm_{name}": _harness.ratio(times, name, "gemm") for name in names}
    ratios |= {f"of_gemm_rate_{name}": share * _harness.ratio(times, "square_gemm", name) for name in names}
    rate = 2 * side**3 / _harness.medians(times)["square_gemm"]
    case = f"device saliency op bfloat16 B={ROWS // steps} T={steps} {WIDTH}-{INNER}"
    _harness.report(benchmark, case, times, variants[names[0]], ratios=ratios, gemm_flops=rate)


@pytest.mark.parametrize("tokens", ["zipf", "one"])
def test_embedding(benchmark: BenchmarkFixture, tokens: str) -> None:
    """The op alone in bfloat16. ``zipf``: as frequent as words of a text; ``one``: 19 of 20 are the same token.

    ``over_copy``: over a copy that reads and writes as many bytes as the scores need; ``times_sum``: the gradient
    alone, as torch's backward pass sums it, over ours with the gradient from the same pass.
    """
    samples, steps = LOOKUPS
    torch.manual_seed(0)
    chances = 1.0 / torch.arange(1, WORDS + 1)
    if tokens == "one":
        chances[0] = 19 * chances[1:].sum()
    indices = torch.multinomial(chances, samples * steps, replacement=True).view(samples, steps).to(DEVICE)
    with DEVICE:
        d, factor = torch.randn(samples, steps, WIDTH).bfloat16(), torch.randn(WORDS, WIDTH)
        sums = {t: torch.zeros(WORDS, WIDTH, dtype=t) for t in (torch.float64, torch.float32)}
        total = torch.zeros(WORDS, WIDTH)
    for dtype, scores in sums.items():
        for token, rows in zip(indices, d.to(dtype), strict=True):
            scores += torch.zeros_like(scores).index_add_(0, token, rows).mul_(factor).abs_()
    variants: dict[str, Callable[[], object]] = {}
    for backend in BACKENDS:
        out = torch.zeros_like(total)
        accumulate_embedding_saliency_(out, indices, d, factor=factor, backend=backend)
        assert_no_worse(out, sums[torch.float64], sums[torch.float32])
        for suffix, grad in (("", None), ("_with_grad", total)):
            variants[f"cwfast_{backend}{suffix}"] = lambda b=backend, out=out, grad=grad: (
                accumulate_embedding_saliency_(
                    out, indices, d, factor=factor, grad=grad, overwrite_grad=grad is not None, backend=b
                )
            )
    names = list(variants)
    moved = d.nbytes + len(indices.unique()) * WIDTH * 12  # out twice and the factor, of the tokens that occur
    source, target = (torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    variants["copy"] = lambda: target.copy_(source)
    variants["sum"] = lambda: torch.ops.aten.embedding_dense_backward(d, indices, WORDS, -1, False)
    times = _harness.interleaved(variants, REPEATS, seconds=SECONDS)
    ratios = {f"over_copy_{name}": _harness.ratio(times, name, "copy") for name in names}
    ratios |= {f"times_sum_{name}": _harness.ratio(times, "sum", name) for name in names if name.endswith("grad")}
    case = f"device embedding op bfloat16 {tokens} B={samples} T={steps} {WORDS}x{WIDTH}"
    _harness.report(benchmark, case, times, variants[names[0]], ratios=ratios, moved=moved)


@pytest.mark.parametrize("numel", SELECT)
def test_select(benchmark: BenchmarkFixture, numel: int) -> None:
    """The top 1% of float32 scores; ``over_copy``: over a read and a write of as many bytes, that is two reads."""
    torch.manual_seed(0)
    scores, k = torch.randn(numel, device=DEVICE).abs_(), numel // 100
    variants: dict[str, Callable[[], object]] = {}
    for backend in BACKENDS:
        _check_selection(scores, k, backend)
        variants[f"cwfast_{backend}"] = lambda b=backend: select_topk([scores], k, backend=b)
    names = list(variants)
    if numel <= 10**9:  # its workspace is several times the scores
        variants["torch_topk"] = lambda: torch.topk(scores, k, sorted=False)
    target = torch.empty_like(scores)
    variants |= {"read": _harness.read(scores), "copy": lambda: target.copy_(scores)}
    times = _harness.interleaved(variants, REPEATS, seconds=SECONDS)
    ratios = {f"over_copy_{name}": _harness.ratio(times, name, "copy") for name in names}
    ratios |= {f"reads_{name}": _harness.ratio(times, name, "read") for name in names}
    if "torch_topk" in times:
        ratios["times_torch_topk"] = _harness.ratio(times, "torch_topk", names[0])
    bandwidth = 2 * scores.nbytes / _harness.medians(times)["copy"]
    case = f"device select float32 N={numel:.0e} k=1.0%".replace("e+0", "e")
    _harness.report(benchmark, case, times, variants[names[0]], ratios=ratios, numel=numel, copy_bandwidth=bandwidth)


def _check_selection(scores: Tensor, k: int, backend: str) -> None:
    """Refuses anything but everything above the threshold and then the first that equal it, k in all."""
    selection = select_topk([scores], k, backend=backend)
    parts = scores.split(1 << 29)  # nonzero() takes fewer than 2**31 entries
    quota = k - sum(int((part > selection.threshold).sum()) for part in parts)
    right, first = quota > 0, 0
    for part in parts:
        chosen = part > selection.threshold
        equal = (part == selection.threshold).nonzero()[: max(quota, 0), 0]
        chosen[equal] = True
        quota -= len(equal)
        packed = reference.pack(chosen)
        right = right and torch.equal(packed, selection.bits[0][first : first + len(packed)])
        first += len(packed)
    if not right or quota != 0:
        raise AssertionError(f"the selection of {k} from {scores.numel()} scores is wrong ({backend})")


def test_rewind(benchmark: BenchmarkFixture) -> None:
    """1% of float32 weights, selected at random."""
    torch.manual_seed(0)
    with DEVICE:
        mask = torch.rand(REWIND) < 0.01
        initial, weight = torch.randn(REWIND), torch.randn(REWIND)
    indices = mask.nonzero()[:, 0]
    values, bits, picks = initial[indices], reference.pack(mask), list_form(indices, REWIND)
    variants: dict[str, Callable[[], object]] = {
        "cwfast_list": lambda: ops.scatter_([weight], [picks], [values]),
        "cwfast_bits": lambda: ops.rewind_([weight], [initial], [bits]),
        "index_copy": lambda: weight.index_copy_(0, indices, values),
        "where_out": lambda: torch.where(mask, initial, weight, out=weight),
        "where": lambda: torch.where(mask, initial, weight),
    }
    trained = weight.clone()
    expected = torch.where(mask, initial, trained)
    for name, run in variants.items():
        weight.copy_(trained)
        result = run()
        if not torch.equal(result if name == "where" else weight, expected):
            raise AssertionError(f"{name} must rewind exactly the selected entries")
    variants["read"] = _harness.read(initial)
    times = _harness.interleaved(variants, REPEATS, seconds=SECONDS)
    ours = ("cwfast_list", "cwfast_bits")
    ratios = {f"reads_{name}": _harness.ratio(times, name, "read") for name in ours}
    ratios |= {f"times_{n}": _harness.ratio(times, n, "cwfast_list") for n in ("where", "where_out", "index_copy")}
    case = f"device rewind float32 N={REWIND:.0e} k=1.0%".replace("e+0", "e")
    _harness.report(benchmark, case, times, variants["cwfast_list"], ratios=ratios, numel=REWIND, k=len(indices))


def test_token_statistics(benchmark: BenchmarkFixture) -> None:
    """All statistics of bfloat16 hidden states; ``of_gemm_rate``: of the bare product into [N, V] logits."""
    torch.manual_seed(0)
    with DEVICE:
        hidden, weight = torch.randn(TOKENS, WIDTH).bfloat16(), (torch.randn(VOCABULARY, WIDTH) / 32).bfloat16()
        targets = torch.randint(VOCABULARY, (TOKENS,))
    rows = slice(0, 32)  # the truth needs logits
    truth, single = (lm_token_stats(hidden[rows].to(t), weight.to(t), targets[rows], backend="reference")
                     for t in (torch.float64, torch.float32))  # fmt: skip
    variants: dict[str, Callable[[], object]] = {}
    for backend in BACKENDS:
        found = lm_token_stats(hidden, weight, targets, backend=backend)
        for name in ("logprob", "mean", "variance"):
            exact, plain = getattr(truth, name), getattr(single, name)
            assert_no_worse(getattr(found, name)[rows], exact, plain, factor=4)
        variants[f"cwfast_{backend}"] = lambda b=backend: lm_token_stats(hidden, weight, targets, backend=b)
    names = list(variants)
    product = torch.empty(TOKENS, VOCABULARY, dtype=torch.bfloat16, device=DEVICE)
    variants["gemm"] = lambda: torch.mm(hidden, weight.T, out=product)
    times = _harness.interleaved(variants, REPEATS, seconds=SECONDS)
    ratios = {f"of_gemm_rate_{name}": _harness.ratio(times, "gemm", name) for name in names}
    rate = 2 * TOKENS * VOCABULARY * WIDTH / _harness.medians(times)["gemm"]
    case = f"device lm_token_stats bfloat16 N={TOKENS} V={VOCABULARY} d={WIDTH}"
    _harness.report(benchmark, case, times, variants[names[0]], ratios=ratios, gemm_flops=rate)
