"""A training step with per-sample saliency against the ordinary step it rides on, and against the other ways to it.

``over_step``: our forward and backward pass over the ordinary one; ``times_<peer>``: how many of our times the peer
takes. ``cwfast`` scores after an optimizer step, when each backward pass multiplies by its own weights; ``deferred``:
as long as the weights stay the same, the factor is multiplied in once, at the end; ``no_grads``: parameters get no
``.grad``, as with loop and vmap.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from cwfast.benchmarks import _harness
from cwfast.benchmarks._models import CASES, loss, problem
from cwfast.benchmarks._per_sample import (
    PEERS,
    Truth,
    backpack_fisher,
    forgetting,
    here,
    steps_of,
    vmap_all,
    vmap_some,
    zeros,
)
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from cwfast import SaliencyScorer

# BackPACK has no rule for RMSNorm.
PEERS_OF = {case: ("loop", "vmap", "opacus", *(("backpack",) if case != "llama" else ())) for case in CASES}
OURS = {
    "cwfast": (True, False),  # with gradients, deferred
    "cwfast_no_grads": (False, False),
    "cwfast_deferred": (True, True),  # last: a step of any optimizer ends the deferral of every scorer that is active
    "cwfast_deferred_no_grads": (False, True),
}
ROUNDS = {"seq": 5}
SECONDS = _harness.by_size(tiny=8.0, normal=1.0, full=8.0)  # a peer slower than this in all leaves after three rounds
NORMAL = ("seq", "mlp", "conv")  # without embeddings and the Llama layer
SAMPLES: dict[str, int | None] = _harness.by_size(tiny={}, normal={"seq": 4}, full={})  # else the case's own batch


def _rounds(case: str) -> int:
    return _harness.by_size(tiny=3, normal=5, full=ROUNDS.get(case, 9))


def _described(case: str, samples: int | None = None) -> dict[str, Any]:
    model, x, _ = problem(case, samples)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return {"model": case, "input": list(x.shape), "weights": weights}


def _title(what: str, facts: Mapping[str, Any]) -> str:
    return f"saliency {what} {facts['model']} {facts['input']} {facts['weights']:.1e} weights".replace("e+0", "e")


def _ours(stack: ExitStack, name: str, step: Callable[[], object], model: nn.Module, truth: Truth) -> None:
    """Scores with the model from now on, after a first step whose scores are checked."""
    grads, deferred = OURS[name]
    scorer = stack.enter_context(SaliencyScorer(model, grads=grads))
    step()
    if deferred:
        truth.check(scorer.scores())
        scorer.reset()
    else:
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        step()
        truth.check(scorer.scores(), calls=2)


@pytest.mark.parametrize("case", _harness.by_size(tiny=tuple(CASES), normal=NORMAL, full=tuple(CASES)))
def test_step(benchmark: BenchmarkFixture, case: str) -> None:
    """Forward and backward pass, and what a peer needs to get from its per-sample gradients to the scores."""
    peers, truth = here(PEERS_OF[case]), Truth(lambda: problem(case, SAMPLES.get(case)))
    _, x, y = problem(case, SAMPLES.get(case))
    models = {name: problem(case).model for name in ("ordinary", *OURS, *peers)}
    variants = steps_of(models, {name: PEERS[name] for name in peers}, x, y, truth)
    with ExitStack() as stack:
        for name in OURS:
            _ours(stack, name, variants[name], models[name], truth)
        times = _harness.interleaved(variants, _rounds(case), setup=forgetting(models), seconds=SECONDS)
        ratios = {f"over_step_{name}": _harness.ratio(times, name, "ordinary") for name in OURS}
        for ours, suffix in (("cwfast", ""), ("cwfast_deferred_no_grads", "_deferred_no_grads")):
            ratios |= {f"times_{peer}{suffix}": _harness.ratio(times, peer, ours) for peer in peers}
        facts = _described(case, SAMPLES.get(case))
        ours = {name: times[name] for name in ("cwfast", *times)}  # the first is the one that the table shows
        _harness.report(benchmark, _title("step", facts), ours, variants["cwfast"], ratios=ratios, **facts)


def _fisher_cases() -> tuple[str, ...]:
    """Without opt_einsum BackPACK asks for batch x steps x weights of memory where there are steps: 34 GB here."""
    steps = ("seq",) if torch.backends.opt_einsum.is_available() else ()
    return _harness.by_size(tiny=("mlp", "conv", *steps), normal=("mlp",), full=("mlp", "conv", *steps))


@pytest.mark.parametrize("case", _fisher_cases())
def test_fisher(benchmark: BenchmarkFixture, case: str) -> None:
    """The sum of squares, against BackPACK's SumGradSquared, which makes the gradients as well."""
    peers, truth = here(("backpack_fisher",)), Truth(lambda: problem(case), power=2)
    _, x, y = problem(case)
    ours = {"fisher": True, "fisher_no_grads": False}
    models = {name: problem(case).model for name in (*ours, "ordinary", *peers)}
    variants = steps_of(models, dict.fromkeys(peers, backpack_fisher), x, y, truth)
    with ExitStack() as stack:
        for name, grads in ours.items():
            scorer = stack.enter_context(SaliencyScorer(models[name], criterion="fisher", grads=grads))
            variants[name]()
            truth.check(scorer.scores())
        times = _harness.interleaved(variants, _rounds(case), setup=forgetting(models), seconds=SECONDS)
        ratios = {f"over_step_{name}": _harness.ratio(times, name, "ordinary") for name in ours}
        ratios |= {f"times_{name}": _harness.ratio(times, name, "fisher") for name in peers}
        facts = _described(case)
        _harness.report(benchmark, _title("fisher", facts), times, variants["fisher"], ratios=ratios, **facts)


def _prepared(method: str, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """One step from nothing: the score buffers are part of it."""
    if method == "ordinary":
        return lambda: loss(model, x, y).backward()
    if method in OURS:

        def scored() -> None:
            with SaliencyScorer(model, grads=OURS[method][0]):
                loss(model, x, y).backward()

        return scored
    peer = {**PEERS, "vmap": vmap_all, "vmap_some": vmap_some}[method]
    return lambda: peer(model)(x, y, zeros(model))


def memory(method: str, case: str, samples: int | None) -> Iterator[None]:
    """For peak_memory: one step, everything that a method keeps included, after a small one that loads the code."""
    _prepared(method, *problem(case, tiny=True))()
    run = _prepared(method, *problem(case, samples))
    yield
    run()


def _memory_cases() -> list[tuple[str, int | None, tuple[str, ...]]]:
    """Case, batch size (None: the case's own), and the methods beside ours."""
    if _harness.size() == "tiny":
        return [("seq", None, ())]
    if _harness.size() == "normal":
        return [("mlp", None, ("vmap", "opacus"))]
    peers = ("cwfast_no_grads", "vmap", "opacus", "backpack")
    batches: list[tuple[str, int | None, tuple[str, ...]]] = [("seq", 4, ()), ("seq", 64, ())]
    return [("seq", None, peers), *batches, ("mlp", None, (*peers, "vmap_some")), ("conv", None, peers)]


@pytest.mark.parametrize(("case", "samples", "others"), _memory_cases())
def test_memory(benchmark: BenchmarkFixture, case: str, samples: int | None, others: tuple[str, ...]) -> None:
    """Extra peak memory of one step, in fresh processes; ours may take the scores and 64 MB more than an ordinary one.

    ``vmap`` holds the gradients of all samples, as it is mostly used; ``vmap_some`` as in the times above.
    """
    methods = ("cwfast", "ordinary", *here(others))
    extra = {name: _harness.peak_memory(memory, name, case, samples) for name in methods}
    model, x, y = problem(case, samples)
    scores = sum(score.nbytes for score in zeros(model).values())
    ours, ordinary = extra["cwfast"], extra["ordinary"]
    ratios = {}
    if ours is not None and ordinary is not None:
        if ours > ordinary + scores + (64 << 20):
            raise AssertionError(
                f"scoring must add at most {scores} bytes of scores and 64 MB to {ordinary}; got {ours}"
            )
        over = ours - ordinary
        for name in here(others):
            if name not in OURS and over > 0:
                ratios[f"over_ordinary_times_{name}"] = (extra[name] - ordinary) / over
        ratios |= {f"memory_times_{name}": extra[name] / ours for name in here(others) if name not in OURS}
        extra["over_ordinary"], extra["scores"] = over, scores
    facts = _described(case, samples)
    run = _prepared("cwfast", model, x, y)
    _harness.report(benchmark, _title("memory", facts), {}, run, ratios=ratios, bytes=extra, **facts)
