"""global_unstructured against torch's."""

from collections.abc import Callable, Iterator

import pytest
import torch
from cwfast.benchmarks import _harness
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn
from torch.nn.utils import prune

from cwfast.integrations.prune import global_unstructured

TENSORS = 10
CALLS: dict[str, Callable[..., None]] = {"cwfast": global_unstructured, "torch": prune.global_unstructured}


def _pairs(numel: int) -> list[tuple[nn.Module, str]]:
    torch.manual_seed(0)
    modules = [nn.Module() for _ in range(TENSORS)]
    for module in modules:
        module.weight = nn.Parameter(torch.randn(numel // TENSORS, dtype=torch.float32))
    return [(module, "weight") for module in modules]


def _peak(numel: int, name: str) -> Iterator[None]:
    CALLS[name](_pairs(1000), pruning_method=prune.L1Unstructured, amount=0.9)
    pairs = _pairs(numel)
    yield
    CALLS[name](pairs, pruning_method=prune.L1Unstructured, amount=0.9)


@pytest.mark.parametrize("numel", _harness.by_size(tiny=[10**4], normal=[10**6], full=[10**7, 10**8]))
def test_prune(benchmark: BenchmarkFixture, numel: int) -> None:
    """90% of the weights pruned; as many kept as by torch, and the same where no scores tie at the threshold."""
    pairs: dict[str, list[tuple[nn.Module, str]]] = {}

    def fresh(name: str) -> None:
        pairs.pop(name, None)
        if name != "read":
            pairs[name] = _pairs(numel)

    weights = [getattr(module, name).detach() for module, name in _pairs(numel)]
    variants: dict[str, Callable[[], object]] = {
        name: lambda name=name, call=call: call(pairs[name], pruning_method=prune.L1Unstructured, amount=0.9)
        for name, call in CALLS.items()
    }
    times = _harness.interleaved({**variants, "read": _harness.read(*weights)}, 3, setup=fresh)
    differ = sum(
        int((ours.weight_mask != theirs.weight_mask).sum())
        for (ours, _), (theirs, _) in zip(pairs["cwfast"], pairs["torch"], strict=True)
    )
    kept = sum(int(module.weight_mask.sum(dtype=torch.float64)) for module, _ in pairs["cwfast"])
    threshold = min(float(module.weight[module.weight_mask == 1].detach().abs().min()) for module, _ in pairs["cwfast"])
    ties = sum(int((weight.abs() == threshold).sum()) for weight in weights)
    if kept != numel - round(0.9 * numel) or differ > 2 * (ties - 1):
        raise AssertionError(f"{kept} kept, {differ} other than torch's, though {ties} scores tie at the threshold")
    peaks = {f"{name}_peak": _harness.peak_memory(_peak, numel, name) for name in CALLS}
    ratios = {"times_torch": _harness.ratio(times, "torch", "cwfast"), "reads": _harness.ratio(times, "cwfast", "read")}
    fresh("cwfast")
    case = f"prune N={numel:.0e}".replace("e+0", "e")
    _harness.report(benchmark, case, times, variants["cwfast"], ratios=ratios, numel=numel, bytes=peaks)
