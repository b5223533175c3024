"""rewind_ and scatter_ against PyTorch's masked writes, and against one read of the weights; freeze around AdamW.

Ours by packed bits and the full initial weights, and by (low, offset) and compact values: 2 bytes a selected entry for
positions where index_copy_ needs 8. ``times_<peer>``: how many times the list form's time the peer takes.
Before each call of rewinding the caches are emptied, as training does: of 0.1% of the weights all lines fit into them,
and which variant finds them there would depend on which one ran before.
"""

from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from cwfast.benchmarks import _harness
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn import functional

from cwfast import MaskSet, freeze, ops, reference

RATES = (0.001, 0.01, 0.03, 0.5)
SIZES = _harness.by_size(tiny=(10**5,), normal=(10**7,), full=(10**7, 10**8))
REPEATS = _harness.by_size(tiny=3, normal=5, full=11)
CACHES = _harness.by_size(tiny=2**16, full=2**28)  # bytes: more than the caches have
SECONDS = 5.0  # a peer slower than this in all leaves after three rounds


def list_form(indices: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """Ascending flat indices as (low, offset)."""
    edges = torch.arange(-(-numel // reference.BLOCK) + 1, device=indices.device) * reference.BLOCK
    return (indices % reference.BLOCK).to(torch.uint16), torch.searchsorted(indices, edges)


def cold() -> Callable[[str], None]:
    """What leaves none of the weights in the caches."""
    other = torch.zeros(CACHES // 4)

    def read(_: str) -> None:
        other.sum()

    return read


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("numel", SIZES)
def test_rewind(benchmark: BenchmarkFixture, numel: int, rate: float) -> None:
    """One float32 tensor, entries selected at random."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(numel, generator=generator) < rate
    initial, trained = (torch.randn(numel, generator=generator) for _ in range(2))
    indices = mask.nonzero()[:, 0]
    values, bits, picks = initial[indices], reference.pack(mask), list_form(indices, numel)
    weight = trained.clone()
    variants: dict[str, Callable[[], object]] = {
        "cwfast_list": lambda: ops.scatter_([weight], [picks], [values]),
        "cwfast_bits": lambda: ops.rewind_([weight], [initial], [bits]),
        "cwfast_bits_values": lambda: ops.scatter_([weight], [bits], [values]),
        "index_copy": lambda: weight.index_copy_(0, indices, values),
        "where": lambda: torch.where(mask, initial, weight, out=weight),
        "masked_scatter": lambda: weight.masked_scatter_(mask, values),
    }
    expected = torch.where(mask, initial, trained)
    for name, run in variants.items():
        weight.copy_(trained)
        run()
        if not torch.equal(weight, expected):
            raise AssertionError(f"{name} must rewind exactly the selected entries")
    times = _harness.interleaved({**variants, "read": _harness.read(trained)}, REPEATS, setup=cold(), seconds=SECONDS)
    ratios = {f"reads_{name}": _harness.ratio(times, name, "read") for name in variants if name.startswith("cwfast")}
    ratios |= {
        f"times_{name}": _harness.ratio(times, name, "cwfast_list")
        for name in variants
        if not name.startswith("cwfast")
    }
    stored = {"list_indices": picks[0].nbytes + picks[1].nbytes, "bits": bits.nbytes, "int64_indices": indices.nbytes}
    case = f"rewind N={numel:.0e} k={rate:.1%}".replace("e+0", "e")
    _harness.report(
        benchmark, case, times, variants["cwfast_list"], ratios=ratios, numel=numel, k=len(indices), bytes=stored
    )


@pytest.mark.parametrize("rate", RATES[:3])
def test_rewind_large(benchmark: BenchmarkFixture, rate: float) -> None:
    """2 GB of weights: the list alone, against index_copy_ and one read."""
    numel = _harness.by_size(tiny=10**6, normal=10**7, full=5 * 10**8)
    mask = torch.rand(numel, generator=torch.Generator().manual_seed(0)) < rate
    indices = mask.nonzero()[:, 0]
    weight, values, picks = torch.zeros(numel), torch.ones(len(indices)), list_form(indices, numel)
    ops.scatter_([weight], [picks], [values])
    if not torch.equal(weight, mask.float()):
        raise AssertionError("scatter_ must write exactly the selected entries")
    del mask
    variants: dict[str, Callable[[], object]] = {
        "cwfast_list": lambda: ops.scatter_([weight], [picks], [values]),
        "index_copy": lambda: weight.index_copy_(0, indices, values),
        "read": _harness.read(weight),
    }
    rounds = _harness.by_size(tiny=3, normal=3, full=7)
    times = _harness.interleaved(variants, rounds, setup=cold(), seconds=SECONDS)
    ratios = {
        "reads_cwfast_list": _harness.ratio(times, "cwfast_list", "read"),
        "times_index_copy": _harness.ratio(times, "index_copy", "cwfast_list"),
    }
    case = f"rewind N={numel:.0e} k={rate:.1%} list".replace("e+0", "e")
    _harness.report(benchmark, case, times, variants["cwfast_list"], ratios=ratios, numel=numel, k=len(indices))


def _layers(width: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


@pytest.mark.parametrize("layers", [3, 48])  # the second: as many weights, in tensors a quarter as wide
@pytest.mark.parametrize("rate", RATES[:2])
def test_freeze(benchmark: BenchmarkFixture, rate: float, layers: int) -> None:
    """Fused AdamW alone and inside freeze; the same for a whole training step of 64 samples.

    ``over_adamw`` counts both halves of freeze: zeroing the gradients as they arrive and restoring after the step.
    """
    width = _harness.by_size(tiny=64, normal=1024, full=4096)
    width = width if layers == 3 else width // 4
    x = torch.randn(64, width)
    models = {name: _layers(width, layers) for name in ("adamw", "frozen")}
    optimizers = {name: torch.optim.AdamW(model.parameters(), fused=True) for name, model in models.items()}
    masks = MaskSet.from_masks({name: torch.rand(p.shape) < rate for name, p in models["frozen"].named_parameters()})
    bits = list(masks.bits.values())
    kept = ops.gather(list(_layers(width, layers).parameters()), bits)
    frozen = list(models["frozen"].parameters())

    def zero_gradients() -> None:
        for parameter in frozen:  # as backward calls them, one after the other
            for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                hook(parameter)

    def train(name: str) -> None:
        optimizers[name].zero_grad()
        functional.mse_loss(models[name](x), x).backward()
        optimizers[name].step()

    with ExitStack() as stack:
        stack.enter_context(freeze(models["frozen"], optimizers["frozen"], masks))
        for name in models:
            train(name)
        _check_frozen(models, masks, bits, kept)
        variants: dict[str, Callable[[], object]] = {
            "adamw": optimizers["adamw"].step,
            "frozen_step": optimizers["frozen"].step,
            "zero_gradients": zero_gradients,
        }
        times = _harness.interleaved(variants, REPEATS, seconds=SECONDS)
        both = [step + zero for step, zero in zip(times["frozen_step"], times["zero_gradients"], strict=True)]
        ratios = {
            "over_adamw": _harness.ratio({**times, "both": both}, "both", "adamw"),
            "over_adamw_restore_only": _harness.ratio(times, "frozen_step", "adamw"),
        }
        steps = _harness.interleaved({f"train_{n}": lambda n=n: train(n) for n in models}, REPEATS, seconds=SECONDS)
        ratios["over_training_step"] = _harness.ratio(steps, "train_frozen", "train_adamw")
        tensors = "" if layers == 3 else f" in {layers} tensors"
        case = f"freeze {masks.numel:.1e} weights{tensors} k={rate:.1%}".replace("e+0", "e")
        run = variants["frozen_step"]
        _harness.report(benchmark, case, {**times, **steps}, run, ratios=ratios, numel=masks.numel, k=masks.total)


def _check_frozen(models: dict[str, nn.Module], masks: MaskSet, bits: list[Tensor], kept: list[Tensor]) -> None:
    """After the first step the selected entries are as before, the others where AdamW alone takes them."""
    weights = [parameter.detach().clone() for parameter in models["adamw"].parameters()]
    ops.scatter_(weights, bits, kept)
    for (name, frozen), expected in zip(models["frozen"].named_parameters(), weights, strict=True):
        if not torch.equal(frozen, expected):
            raise AssertionError(f"freeze must hold the selected entries of {name} and no others ({masks})")
