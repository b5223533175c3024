"""Attacks on stored signals against the plain ways: every target by itself, every pair in tiles.

``bench_mia_peers`` has published code on the same arrays.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from cwfast.benchmarks import _harness
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from cwfast.mia import lira, metrics, rmia

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def _signals(models: int, samples: int, queries: int) -> tuple[Floats, Bools]:
    rng = np.random.default_rng(0)
    member = np.argsort(rng.random((models, samples)), axis=0) < models // 2
    level = rng.normal(0, 2, samples)
    phi = level[:, None] + rng.normal(size=(models, samples, queries)) + member[..., None]
    return phi, member


def _lira_of_one(phi: Floats, member: Bools, target: int) -> Floats:
    """Vectorised NumPy for one target, all others its shadows: medians and deviations by NaN-aware functions."""
    others = np.arange(len(phi)) != target
    inside = np.where(member[others, :, None], phi[others], np.nan)
    outside = np.where(member[others, :, None], np.nan, phi[others])
    logs = []
    for side in (inside, outside):
        scale = np.nanstd(side, axis=0) + 1e-30
        logs.append(-np.log(scale) - ((phi[target] - np.nanmedian(side, axis=0)) / scale) ** 2 / 2)
    result: Floats = (logs[0] - logs[1]).mean(axis=1)
    return result


def test_mia_lira(benchmark: BenchmarkFixture) -> None:
    """Every model a target in turn; the peer does one target, and its time is multiplied by their number.

    Checked against the peer where the split is no balanced one, so that both use all other models.
    """
    models, samples = _harness.by_size(tiny=(8, 200), full=(64, 50_000))
    phi, member = _signals(models, samples, 2)
    small = np.random.default_rng(1).random((models, 200)) < 0.5
    small[:3], small[3:6] = True, False
    ours = lira(phi[:, :200], small, 7, variance="per_example")
    np.testing.assert_allclose(ours, _lira_of_one(phi[:, :200], small, 7), rtol=1e-9, atol=1e-9)
    variants = {
        "cwfast": lambda: lira(phi, member),
        "per_example": lambda: lira(phi, member, variance="per_example"),
        "one_target": lambda: _lira_of_one(phi, member, 0),
    }
    times = _harness.interleaved(variants, 3)
    ratios = {"times_per_target": models * _harness.ratio(times, "one_target", "per_example")}
    half, peak = (_harness.peak_memory(_lira_memory, models, n) for n in (samples // 2, samples))
    case = f"mia lira leave-one-out K={models} N={samples} Q=2"
    _harness.report(
        benchmark,
        case,
        times,
        variants["cwfast"],
        ratios=ratios,
        bytes={"peak": peak, "peak_half_the_samples": half, "signals": phi.nbytes},
    )


def _lira_memory(models: int, samples: int) -> Iterator[None]:
    phi, member = _signals(models, samples, 2)
    lira(phi[:, :50], member[:, :50])
    yield
    scores = lira(phi, member)
    assert len(scores) == models


def _counts(ratio: Floats, crowd: Bools, limit: float) -> Floats:
    """All pairs without RMIA's division, in tiles of 512 rows that stay in cache: one comparison of logs a pair.

    Faster than the attack as it is written; kept as the hardest peer.
    """
    others, found = ratio[crowd], np.empty(len(ratio))
    for begin in range(0, len(ratio), 512):
        rows = slice(begin, begin + 512)
        found[rows] = (ratio[rows, None] - limit > others[None]).sum(axis=1)
    result: Floats = found / crowd.sum()
    return result


def _ratios(ratio: Floats, crowd: Bools, gamma: float) -> Floats:
    """All pairs as RMIA is defined and published: a division and a comparison each, in tiles of 16 rows (the fastest).

    This is the pairwise form; PrivacyGuard makes the matrix whole.
    """
    r, found = np.exp(ratio), np.empty(len(ratio))
    others = r[crowd]
    for begin in range(0, len(r), 16):
        rows = slice(begin, begin + 16)
        found[rows] = (r[rows, None] / others[None] > gamma).sum(axis=1)
    result: Floats = found / crowd.sum()
    return result


def _bare(ratio: Floats, crowd: Bools) -> object:
    """The least that a ranking takes: one sort, and one search in it by sorted limits. No attack, no p(x)."""
    rising = np.sort(ratio)
    return np.searchsorted(np.sort(ratio[crowd]), rising)


@pytest.mark.parametrize("models", [5])
def test_mia_rmia(benchmark: BenchmarkFixture, models: int) -> None:
    """One target with four references; ``ratios`` and ``counts`` get r(x) for nothing and only go through the pairs."""
    samples = _harness.by_size(tiny=1000, full=50_000)
    logprob, member = _rmia_signals(models, samples)
    ratio = logprob[0] - np.log(np.exp(logprob[1:]).mean(axis=0))
    crowd = ~member[0]

    def run() -> Floats:
        return rmia(logprob, member, 0)

    for tiled in (_counts(ratio, crowd, np.log(2.0)), _ratios(ratio, crowd, 2.0)):
        if np.abs(run() - tiled).max() > 1.5 / crowd.sum():  # a rounding of the last digit may move one past one other
            raise AssertionError("rmia must be the share of pairs")
    variants: dict[str, Callable[[], object]] = {
        "cwfast": run,
        "counts": lambda: _counts(ratio, crowd, np.log(2.0)),
        "ratios": lambda: _ratios(ratio, crowd, 2.0),
        "sort_and_search": lambda: _bare(ratio, crowd),
    }
    times = _harness.interleaved(variants, 7, seconds=60)
    ratios = {
        "times_tiled_ratios": _harness.ratio(times, "ratios", "cwfast"),
        "times_tiled_counts": _harness.ratio(times, "counts", "cwfast"),
        "sorts_and_searches": _harness.ratio(times, "cwfast", "sort_and_search"),
    }
    peak, twice = (_harness.peak_memory(_rmia_memory, models, n) for n in (samples, 2 * samples))
    sizes = {"peak": peak, "peak_twice_the_samples": twice, "signals": logprob.nbytes}
    case = f"mia rmia one target N={samples} Z={int(crowd.sum())}"
    _harness.report(benchmark, case, times, run, ratios=ratios, bytes=sizes)


def _rmia_signals(models: int, samples: int) -> tuple[Floats, Bools]:
    phi, _ = _signals(models, samples, 1)
    return -np.logaddexp(0, -phi[..., 0]), np.random.default_rng(2).random((models, samples)) < 0.5


def _rmia_memory(models: int, samples: int) -> Iterator[None]:
    logprob, member = _rmia_signals(models, samples)
    rmia(logprob[:, :50], member[:, :50], 0)
    yield
    scores = rmia(logprob, member, 0)
    assert len(scores) == samples


def test_mia_bootstrap(benchmark: BenchmarkFixture) -> None:
    """1,000 replicates of TPR at 0.1% FPR and AUC; the peer draws samples and sorts them anew, ten times."""
    samples = _harness.by_size(tiny=500, full=50_000)
    rng = np.random.default_rng(0)
    members = rng.random(samples) < 0.5
    scores = rng.normal(size=samples) + members

    def run() -> dict[str, object]:
        return metrics.summary(scores, members, fprs=(1e-3,), bootstrap=1000)

    def resorted() -> list[float]:
        draws = rng.integers(samples, size=(10, samples))
        return [metrics.tpr_at_fpr(scores[one], members[one], 1e-3).tpr for one in draws]

    found = run()
    again = [metrics.auc(scores[one], members[one]) for one in rng.integers(samples, size=(50, samples))]
    if not found["auc_low"] - 0.05 < np.mean(again) < found["auc_high"] + 0.05:  # type: ignore[operator]
        raise AssertionError("replicates must be those of resampled scores")
    times = _harness.interleaved({"cwfast": run, "resorted": resorted}, 5)
    ratios = {"times_resorted": 100 * _harness.ratio(times, "resorted", "cwfast")}
    _harness.report(benchmark, f"mia bootstrap N={samples} R=1000", times, run, ratios=ratios)
