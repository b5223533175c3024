"""Per-sample saliency against the ordinary training step it rides on, and against a matrix product of the same shape.

``over_step``: our forward and backward pass over the ordinary one; ``over_backward``: the same without the forward
pass, whose time is subtracted round by round; ``times_<peer>``: how many of our times the peer takes. Deferred: before
the first optimizer step the factor is multiplied in once, at the end; afterwards each backward pass carries its own.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch
from cwfast.benchmarks import _harness
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from cwfast import SaliencyScorer
from cwfast.ops import accumulate_saliency_
from cwfast.testing import assert_no_worse

WIDTHS = _harness.by_size(tiny=(64, 128, 64), full=(1024, 4096, 1024))
ONE_ROW = _harness.by_size(tiny=(8,), full=(64,))  # samples
SEQUENCES = _harness.by_size(tiny=(4, 8), full=(16, 128))  # samples, steps
REPEATS = _harness.by_size(tiny=3, full=15)
SECONDS = 8.0  # a peer slower than this in all leaves after three rounds
VMAP_SAMPLES = 16  # of whose gradients vmap holds all at once: no slower than 64, and a quarter of the memory

Scores = dict[str, Tensor]


def _model(widths: tuple[int, ...] = WIDTHS) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(widths[0], widths[1]), nn.ReLU(), nn.Linear(widths[1], widths[2]))


def _data(leading: tuple[int, ...], widths: tuple[int, ...] = WIDTHS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(*leading, widths[0], generator=generator)
    return inputs, torch.randint(widths[-1], leading, generator=generator)


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean over samples (and steps) of the cross entropy."""
    return functional.cross_entropy(model(x).flatten(0, -2), y.flatten())


def _zero_scores(model: nn.Module) -> Scores:
    return {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}


def _loop(model: nn.Module, x: Tensor, y: Tensor, scores: Scores) -> None:
    """One backward pass per sample."""
    parameters = dict(model.named_parameters())
    for i in range(len(x)):
        gradients = torch.autograd.grad(_loss(model, x[i : i + 1], y[i : i + 1]), list(parameters.values()))
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            scores[name].add_(gradient.mul_(parameter.detach()).abs_())


def _vmap(model: nn.Module, x: Tensor, y: Tensor, scores: Scores) -> None:
    """torch.func's per-sample gradients, some samples at a time."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(values: Scores, row: Tensor, target: Tensor) -> Tensor:
        logits = functional_call(model, values, (row[None],))
        return functional.cross_entropy(logits.flatten(0, -2), target.reshape(-1))

    gradients_of = vmap(grad(loss), in_dims=(None, 0, 0))
    for i in range(0, len(x), VMAP_SAMPLES):
        gradients = gradients_of(parameters, x[i : i + VMAP_SAMPLES], y[i : i + VMAP_SAMPLES])
        for name, gradient in gradients.items():
            scores[name].addcmul_(gradient.abs_().sum(0), parameters[name].abs())


def _check(scores: Scores, x: Tensor, y: Tensor) -> None:
    """Refuses scores that are further from a float64 loop than a float32 loop's."""
    sums = {}
    for dtype in (torch.float32, torch.float64):
        model = _model().to(dtype)
        sums[dtype] = _zero_scores(model)
        _loop(model, x.to(dtype), y, sums[dtype])
    for name, score in scores.items():
        assert_no_worse(score, sums[torch.float64][name], sums[torch.float32][name])


@pytest.mark.parametrize("leading", [ONE_ROW, SEQUENCES], ids=["one_row", "sequences"])
def test_step(benchmark: BenchmarkFixture, leading: tuple[int, ...]) -> None:
    """Forward and backward pass of a two-layer model: 1024-4096-1024, 64 samples of one row or 16 of 128."""
    x, y = _data(leading)
    ours = {"cwfast": True, "cwfast_deferred": True, "cwfast_no_grads": False}  # whether parameters get a .grad
    models = {name: _model() for name in ("ordinary", "forward", *ours, "loop", "vmap")}
    sums = {name: _zero_scores(models[name]) for name in ("loop", "vmap")}
    scorers = {name: SaliencyScorer(models[name], grads=grads) for name, grads in ours.items()}

    def step(name: str) -> Callable[[], object]:
        return lambda: _loss(models[name], x, y).backward()

    def forget(_: str) -> None:  # so that each variant makes its gradients anew
        for model in models.values():
            model.zero_grad(set_to_none=True)

    variants: dict[str, Callable[[], object]] = {
        **{name: step(name) for name in ("ordinary", *ours)},
        "forward": lambda: _loss(models["forward"], x, y),
        "loop": lambda: _loop(models["loop"], x, y, sums["loop"]),
        "vmap": lambda: _vmap(models["vmap"], x, y, sums["vmap"]),
    }
    variants["vmap"]()
    _check(sums["vmap"], x, y)
    with ExitStack() as stack:
        for name, scorer in scorers.items():
            stack.enter_context(scorer)
            variants[name]()
            if name != "cwfast_deferred":
                _check(scorer.scores(), x, y)  # scores() also ends the deferral
        times = _harness.interleaved(variants, REPEATS, setup=forget, seconds=SECONDS)
        ratios = {f"over_step_{name}": _harness.ratio(times, name, "ordinary") for name in scorers}
        ratios |= {f"over_backward_{name}": _over_backward(times, name) for name in scorers}
        ratios |= {f"times_{peer}": _harness.ratio(times, peer, "cwfast") for peer in ("loop", "vmap")}
        _harness.report(benchmark, f"saliency step {_shape(leading)}", times, variants["cwfast"], ratios=ratios)


def _over_backward(times: dict[str, list[float]], name: str) -> float:
    rounds = zip(times[name], times["ordinary"], times["forward"], strict=False)
    return statistics.median((ours - forward) / (step - forward) for ours, step, forward in rounds)


def _shape(leading: tuple[int, ...]) -> str:
    return f"B={leading[0]} T={leading[1] if len(leading) > 1 else 1} {'-'.join(map(str, WIDTHS))}"


@pytest.mark.parametrize("factor", [True, False], ids=["factor", "no_factor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leading", [ONE_ROW, SEQUENCES], ids=["one_row", "sequences"])
def test_op(benchmark: BenchmarkFixture, leading: tuple[int, ...], dtype: torch.dtype, factor: bool) -> None:
    """The op alone over the weight gradient's own matrix product, of the same inputs."""
    fan_in, fan_out = WIDTHS[:2]
    x, _ = _data(leading)
    d, _ = _data(leading, WIDTHS[::-1][1:])
    x, d, weight = x.to(dtype), d.to(dtype), torch.randn(fan_out, fan_in)
    multiplier = weight if factor else None
    out, product = torch.zeros(fan_out, fan_in), torch.empty(fan_out, fan_in, dtype=dtype)
    total = torch.zeros(fan_out, fan_in)
    exact, peer = (torch.zeros(fan_out, fan_in, dtype=kind) for kind in (torch.float64, torch.float32))
    for sums in (exact, peer):
        for a, b in zip(d.to(sums.dtype), x.to(sums.dtype), strict=True):
            sums.add_((a.reshape(-1, fan_out).T @ b.reshape(-1, fan_in)).abs_())
        sums.mul_(weight.to(sums.dtype).abs() if factor else 1)
    assert_no_worse(accumulate_saliency_(out, x, d, factor=multiplier), exact, peer)
    rows, columns = d.flatten(0, -2).T, x.flatten(0, -2)
    variants: dict[str, Callable[[], object]] = {
        "cwfast": lambda: accumulate_saliency_(out, x, d, factor=multiplier),
        "cwfast_with_grad": lambda: accumulate_saliency_(out, x, d, grad=total, factor=multiplier),
        "gemm": lambda: torch.mm(rows, columns, out=product),
    }
    times = _harness.interleaved(variants, REPEATS, seconds=SECONDS)
    ratios = {f"over_gemm_{name}": _harness.ratio(times, name, "gemm") for name in ("cwfast", "cwfast_with_grad")}
    flops = 2 * len(columns) * fan_in * fan_out / _harness.medians(times)["gemm"]
    case = f"saliency op {str(dtype).removeprefix('torch.')} {list(x.shape)} -> {list(out.shape)}"
    case += " with factor" if factor else ""
    _harness.report(benchmark, case, times, variants["cwfast"], ratios=ratios, gemm_flops=flops)


def memory(method: str, *leading: int) -> Iterator[None]:
    """For peak_memory: one step, everything that a method keeps included."""
    model, data = _model(), _data(tuple(leading))
    small = (8, 8, 8)
    _run(method, _model(small), *_data((4, *leading[1:]), small))
    yield
    _run(method, model, *data)


def _run(method: str, model: nn.Module, x: Tensor, y: Tensor) -> None:
    match method:
        case "ordinary":
            _loss(model, x, y).backward()
        case "loop":
            _loop(model, x, y, _zero_scores(model))
        case "vmap":
            _vmap(model, x, y, _zero_scores(model))
        case _:
            with SaliencyScorer(model, grads=method == "cwfast"):
                _loss(model, x, y).backward()


@pytest.mark.parametrize("leading", [ONE_ROW, SEQUENCES], ids=["one_row", "sequences"])
def test_memory(benchmark: BenchmarkFixture, leading: tuple[int, ...]) -> None:
    """Extra peak memory of one step in fresh processes: gradients, score buffers and whatever else the method needs."""
    methods = _harness.by_size(tiny=("cwfast",), full=("ordinary", "cwfast", "cwfast_no_grads", "vmap"))
    extra = {name: _harness.peak_memory(memory, name, *leading) for name in methods}
    model, data = _model(), _data(leading)
    scores = sum(4 * parameter.numel() for parameter in model.parameters())
    ours, ordinary = extra["cwfast"], extra.get("ordinary")
    if ours is not None and ordinary is not None and ours > ordinary + scores + (64 << 20):
        raise AssertionError(
            f"scoring must add {scores} bytes of scores and 64 MB; got {ours} where {ordinary} are due"
        )
    case = f"saliency memory, extra peak of a step {_shape(leading)}"
    _harness.report(benchmark, case, {}, lambda: _run("cwfast", model, *data), ratios={}, bytes=extra)
