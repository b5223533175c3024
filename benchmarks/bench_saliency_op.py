"""The saliency op alone against the weight gradient's own matrix product, over rows a sample, batch, width and dtype.

``over_gemm``: our time over ``torch.mm`` of the same inputs; ``of_fma_peak``: the share of the multiply-adds that the
processor can do at most, measured in the same rounds. Rows that a sample has: T.
"""

from collections.abc import Callable

import pytest
import torch
from cwfast.benchmarks import _harness
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from cwfast import _backends
from cwfast.ops import accumulate_saliency_
from cwfast.testing import assert_no_worse

ROWS = _harness.by_size(tiny=32, full=2048)  # B x T, so that every T has the same matrix product
FAN_IN, FAN_OUT = _harness.by_size(tiny=(48, 80), full=(1024, 4096))
STEPS = _harness.by_size(tiny=(1, 8), normal=(1, 16, 128), full=(1, 2, 4, 8, 16, 32, 64, 128, 512))
BATCHES = _harness.by_size(tiny=(2,), normal=(), full=(4, 16, 64))
WIDTHS = _harness.by_size(tiny=(16,), normal=(), full=(256, 512, 1024, 2048))
REPEATS = _harness.by_size(tiny=3, normal=5, full=7)
SECONDS = 4.0  # slower than this in all leaves after three rounds
READ_BYTES = _harness.by_size(tiny=10**6, full=2 * 10**8)
FMA_ROUNDS = _harness.by_size(tiny=10**4, full=5 * 10**6)  # a thread's, of 12 vectors: tens of milliseconds


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _inputs(samples: int, steps: int, fan_in: int, fan_out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (samples, steps) if steps > 1 else (samples,)
    x, d = (torch.randn(*shape, width, generator=generator).to(dtype) for width in (fan_in, fan_out))
    return x, d


def _check(x: Tensor, d: Tensor, factor: Tensor | None) -> None:
    """Refuses scores, or a gradient sum of the same pass, that are further from float64 than PyTorch's float32.

    Of at most 128 rows that are drawn among all: one sample at a time, the rest would take minutes.
    """
    out, grad = (torch.zeros(d.shape[-1], x.shape[-1]) for _ in range(2))
    accumulate_saliency_(out, x, d, grad=grad, factor=factor)
    drawn = torch.randperm(len(out), generator=torch.Generator().manual_seed(2))[:128]
    sums = []
    for dtype in (torch.float64, torch.float32):
        scores, total = (torch.zeros(len(drawn), x.shape[-1], dtype=dtype) for _ in range(2))
        for rows, columns in zip(d[..., drawn].to(dtype), x.to(dtype), strict=True):
            each = rows.reshape(-1, len(drawn)).T @ columns.reshape(-1, x.shape[-1])
            total += each
            scores += each.abs_()
        sums.append((scores.mul_(factor[drawn].to(dtype).abs() if factor is not None else 1), total))
    for ours, exact, peer in zip((out, grad), *sums, strict=True):
        assert_no_worse(ours[drawn], exact, peer)


def _measure(
    benchmark: BenchmarkFixture,
    what: str,
    samples: int,
    steps: int,
    widths: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    factor: bool = False,
) -> None:
    fan_in, fan_out = widths
    x, d = _inputs(samples, steps, fan_in, fan_out, dtype)
    multiplier = torch.randn(fan_out, fan_in) if factor else None
    _check(x, d, multiplier)
    out, total = (torch.zeros(fan_out, fan_in) for _ in range(2))
    product = torch.empty(fan_out, fan_in, dtype=dtype)
    rows, columns = d.flatten(0, -2).T, x.flatten(0, -2)
    variants: dict[str, Callable[[], object]] = {
        "cwfast": lambda: accumulate_saliency_(out, x, d, factor=multiplier),
        "cwfast_with_grad": lambda: accumulate_saliency_(out, x, d, grad=total, factor=multiplier),
        "gemm": lambda: torch.mm(rows, columns, out=product),
    }
    native = _backends.native()
    if dtype == torch.float32:  # matrix units multiply bfloat16 faster than that
        variants["fma_peak"] = lambda: native.fma_peak(FMA_ROUNDS)
    buffer = torch.ones(READ_BYTES // 4)
    variants["read"] = _harness.read(buffer)
    times = _harness.interleaved(variants, REPEATS, seconds=SECONDS)
    flops, peak = 2 * samples * steps * fan_in * fan_out, native.fma_peak(FMA_ROUNDS)
    ratios = {f"over_gemm_{name}": _harness.ratio(times, name, "gemm") for name in ("cwfast", "cwfast_with_grad")}
    for name in ("cwfast", "gemm") if "fma_peak" in times else ():
        ratios[f"of_fma_peak_{name}"] = flops / peak * _harness.ratio(times, "fma_peak", name)
    case = f"saliency {what} {_name(dtype)} B={samples} T={steps} {fan_in}-{fan_out}{' with factor' * factor}"
    moved = x.nbytes + d.nbytes + 2 * out.nbytes + (out.nbytes if factor else 0)  # read once; scores also written
    facts = {"samples": samples, "steps": steps, "widths": list(widths), "flops": flops, "peak_flops": peak}
    facts |= {"moved_bytes": moved, "read_bytes": buffer.nbytes}  # with the times: both limits, for roofline.py
    _harness.report(benchmark, case, times, variants["cwfast"], ratios=ratios, **facts)


@pytest.mark.parametrize("steps", STEPS)
def test_steps(benchmark: BenchmarkFixture, steps: int) -> None:
    """As many rows, over T: the same matrix product, folded into the scores every T rows."""
    _measure(benchmark, "op", ROWS // steps, steps, (FAN_IN, FAN_OUT))


@pytest.mark.parametrize("samples", BATCHES)
@pytest.mark.parametrize("steps", _harness.by_size(tiny=(1, 4), full=(1, 128)))
def test_batch(benchmark: BenchmarkFixture, samples: int, steps: int) -> None:
    """Over the batch, for one row a sample and for sequences."""
    _measure(benchmark, "op", samples, steps, (FAN_IN, FAN_OUT))


@pytest.mark.parametrize("width", WIDTHS)
def test_width(benchmark: BenchmarkFixture, width: int) -> None:
    """Square layers, 16 samples of 128 rows."""
    _measure(benchmark, "op", *_harness.by_size(tiny=(2, 4), full=(16, 128)), (width, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_name)
@pytest.mark.parametrize("steps", _harness.by_size(tiny=(1, 8), full=(1, 128)))
def test_factor(benchmark: BenchmarkFixture, dtype: torch.dtype, steps: int) -> None:
    """With the weight's factor in each call, as after an optimizer step: 64 samples of one row, or 16 of 128."""
    samples = _harness.by_size(tiny=4, full=64 if steps == 1 else 16)
    _measure(benchmark, "op", samples, steps, (FAN_IN, FAN_OUT), dtype, factor=True)
