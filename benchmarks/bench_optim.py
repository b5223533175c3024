"""SelectedAdamW against torch's fused AdamW on all weights."""

import pytest
import torch
from cwfast.benchmarks import _harness
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from cwfast import select
from cwfast.optim import SelectedAdamW

TENSORS = 12


def _model(numel: int) -> nn.ParameterList:
    torch.manual_seed(0)
    return nn.ParameterList([nn.Parameter(torch.randn(numel // TENSORS)) for _ in range(TENSORS)])


@pytest.mark.parametrize("rate", [0.01, 0.001])
def test_optim(benchmark: BenchmarkFixture, rate: float) -> None:
    """One step with gradients at hand; checked against AdamW on the selected weights, bits on the others."""
    numel = _harness.by_size(tiny=120_000, normal=12_000_000, full=50_000_000)
    model, dense = _model(numel), _model(numel)
    masks = select({n: torch.rand(p.shape) for n, p in model.named_parameters()}, rate=rate)
    before = [p.detach().clone() for p in model]
    for ours, theirs in zip(model, dense, strict=True):
        ours.grad = theirs.grad = torch.randn_like(ours)
    selected, fused = SelectedAdamW(model, masks), torch.optim.AdamW(dense.parameters(), fused=True)
    selected.step()
    fused.step()
    for i, (ours, theirs) in enumerate(zip(model, dense, strict=True)):
        mask = masks[str(i)]
        if not torch.equal(ours[~mask], before[i][~mask]):
            raise AssertionError("weights that are not selected must keep their bits")
        torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-6, atol=1e-7)
    del before
    variants = {"cwfast": selected.step, "adamw_fused": fused.step, "read": _harness.read(*model)}
    times = _harness.interleaved(variants, 11)
    state = sum(v.nbytes for s in selected.state.values() for key, v in s.items() if key != "step")
    ratios = {
        "times_adamw_fused": _harness.ratio(times, "adamw_fused", "cwfast"),
        "reads": _harness.ratio(times, "cwfast", "read"),
    }
    case = f"optim N={numel:.0e} k={rate:.1%}".replace("e+0", "e")
    _harness.report(benchmark, case, times, selected.step, ratios=ratios, k=masks.total, bytes={"state": state})
