"""Seven statistics of each row of logits against the torch operations they are composed of, and one read."""

import pytest
import torch
from cwfast.benchmarks import _harness
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from cwfast import ops
from cwfast.testing import assert_no_worse


def _composed(z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """What one would write with torch: log_softmax, then each statistic from it."""
    log_p = torch.log_softmax(z.float(), dim=1)
    p, row = log_p.exp(), y[:, None]
    loss = -log_p.gather(1, row)[:, 0]
    label = z.gather(1, row)[:, 0].float()
    others = z.float().scatter(1, row, -torch.inf)
    phi = label - others.logsumexp(dim=1)
    log_rest = torch.log1p(-p).clamp(min=-69.0).scatter(1, row, 0.0)
    modified = (1 - p.gather(1, row)[:, 0]) * loss - (p * log_rest).sum(dim=1)
    entropy = -(p * log_p).sum(dim=1)
    return loss, loss.neg().exp(), phi, entropy, modified, z.argmax(dim=1) == y, label - others.amax(dim=1)


def _problem(rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (3 * torch.randn(rows, classes)).to(dtype), torch.randint(classes, (rows,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_logit_stats(benchmark: BenchmarkFixture, classes: int, dtype: torch.dtype) -> None:
    """Checked against the reference in float64 before it is timed."""
    rows = _harness.by_size(tiny=20_000, full=20_000_000) // classes
    torch.manual_seed(0)
    z, y = _problem(rows, classes, dtype)
    some = _problem(2_000, classes, dtype)  # a largest error of fewer is chance
    stats, composed = ops.logit_stats(*some), _composed(*some)
    truth = ops.logit_stats(some[0].double(), some[1], backend="reference")
    for name, ours, exact, theirs in zip(stats._fields, stats, truth, composed, strict=True):
        if name == "correct":
            if not torch.equal(ours, exact):
                raise AssertionError("correct must equal the reference")
        else:
            assert_no_worse(ours, exact, theirs)
    variants = {
        "cwfast": lambda: ops.logit_stats(z, y),
        "composed": lambda: _composed(z, y),
        "log_softmax": lambda: torch.log_softmax(z, dim=1),
        "read": _harness.read(z),
    }
    times = _harness.interleaved(variants, 11)
    ratios = {
        "times_composed": _harness.ratio(times, "composed", "cwfast"),
        "times_log_softmax": _harness.ratio(times, "log_softmax", "cwfast"),
        "reads": _harness.ratio(times, "cwfast", "read"),
    }
    case = f"logit stats C={classes} {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
    _harness.report(benchmark, case, times, variants["cwfast"], ratios=ratios, rows=rows)
