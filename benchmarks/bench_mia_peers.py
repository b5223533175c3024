"""LiRA and RMIA against PrivacyGuard's, a published package whose attacks take signals that are there.

``pip install --no-deps privacyguard-platform`` will do beside pandas, scipy and scikit-learn, though it asks for far
more. Where it is missing, the cases time cwfast alone and name it as skipped.

Looked at and not used: sacroml 2.0 and aisdc 1.2 (LiRA only with the training of its shadow models, in one call),
adversarial-robustness-toolbox 1.20, privacy-meter 1.0 and tensorflow-privacy 0.9 (no LiRA and no RMIA in these
releases; the last needs TensorFlow), leakpro 0.0.1 (an empty package).
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from cwfast.benchmarks import _harness
from cwfast.benchmarks.bench_mia import Bools, Floats, _rmia_signals, _signals
from pytest_benchmark.fixture import BenchmarkFixture

from cwfast.mia import lira, rmia


def _modules() -> dict[str, ModuleType] | None:
    """PrivacyGuard's attacks and the library of its tables."""
    names = {
        "pandas": "pandas",
        "lira": "privacy_guard.attacks.lira_attack",
        "rmia": "privacy_guard.attacks.rmia_attack",
    }
    found = {key: module for key, name in names.items() if (module := _harness.peer(name)) is not None}
    return found if len(found) == len(names) else None


def _tables(pandas: ModuleType, columns: dict[str, Floats | Bools], own: Bools) -> list[Any]:
    """Of the target's members and of the others, each with the numbers of "users": one sample each."""
    whole = pandas.DataFrame({"user_id": np.arange(len(own)), **columns})
    return [whole[side].copy() for side in (own, ~own)]


def _in_order(own: Bools, result: Any) -> Floats:
    """Scores of both tables as one array in the order of the samples."""
    scores = np.empty(len(own))
    scores[own], scores[~own] = result.df_train_user["score"], result.df_test_user["score"]
    return scores


def _lira(modules: dict[str, ModuleType], phi: Floats, member: Bools) -> Floats:
    """Target 0, online. Means and deviations of the other models are the caller's to bring: as its tutorial does."""
    columns = {"score_orig": phi[0]}
    for name, side in (("in", member[1:]), ("out", ~member[1:])):
        values = np.where(side, phi[1:], np.nan)
        columns |= {f"score_mean_{name}": np.nanmean(values, axis=0), f"score_std_{name}": np.nanstd(values, axis=0)}
    tables = _tables(modules["pandas"], columns, member[0])
    attack = modules["lira"].LiraAttack(*tables, modules["lira"].AggregationType.NONE, online_attack=True)
    return _in_order(member[0], attack.run_attack())


def _rmia(modules: dict[str, ModuleType], confidence: Floats, member: Bools) -> Floats:
    """Target 0, online, gamma 1, its non-members the population: a matrix of all ratios of ratios, by halves."""
    columns: dict[str, Floats | Bools] = {"score_orig": confidence[0]}
    for k in range(1, len(member)):
        columns |= {f"score_ref_{k}": confidence[k], f"member_ref_{k}": member[k]}
    given, others = _tables(modules["pandas"], columns, member[0])
    none, references = modules["rmia"].AggregationType.NONE, len(member) - 1
    attack = modules["rmia"].RmiaAttack(given, others, others, none, num_reference_models=references, online=True)
    return _in_order(member[0], attack.run_attack())


def test_mia_peers_lira(benchmark: BenchmarkFixture) -> None:
    """One target, where there is nothing to share; and every model in turn, for which the peer is called for each."""
    models, samples = _harness.by_size(tiny=(8, 200), full=(64, 50_000))
    phi = _signals(models, samples, 1)[0][..., 0]
    member = np.random.default_rng(1).random((models, samples)) < 0.5  # no balanced split: both use all other models
    member[1:4], member[4:7] = True, False

    def run() -> Floats:
        return lira(phi, member, 0, variance="per_example", center="mean")

    variants: dict[str, Callable[[], object]] = {
        "cwfast": run,
        "every_target": lambda: lira(phi, member, variance="per_example", center="mean"),
    }
    modules = _modules()
    if modules is not None:
        np.testing.assert_allclose(run(), _lira(modules, phi, member), rtol=1e-9, atol=1e-9)
        variants["privacyguard"] = lambda: _lira(modules, phi, member)
    times = _harness.interleaved(variants, 5)
    ratios = {}
    if modules is not None:
        ratios["times_privacyguard"] = _harness.ratio(times, "privacyguard", "cwfast")
        ratios["times_privacyguard_per_target"] = models * _harness.ratio(times, "privacyguard", "every_target")
    _harness.report(benchmark, f"mia peers lira K={models} N={samples}", times, run, ratios=ratios)


def test_mia_peers_rmia(benchmark: BenchmarkFixture) -> None:
    """One target with four references: fewer samples than in ``bench_mia``, as the peer's matrices fill the memory."""
    samples = _harness.by_size(tiny=400, full=20_000)
    logprob, member = _rmia_signals(5, samples)
    confidence, crowd = np.exp(logprob), ~member[0]

    def run() -> Floats:
        return rmia(logprob, member, 0, gamma=1.0)

    variants: dict[str, Callable[[], object]] = {"cwfast": run}
    modules = _modules()
    if modules is not None:
        # A rounding of the last digit may move a sample past one other, at most.
        if np.abs(run() - _rmia(modules, confidence, member)).max() > 1.5 / crowd.sum():
            raise AssertionError("rmia must be the share that PrivacyGuard counts")
        variants["privacyguard"] = lambda: _rmia(modules, confidence, member)
    times = _harness.interleaved(variants, 5)
    ratios = {}
    if modules is not None:
        ratios["times_privacyguard"] = _harness.ratio(times, "privacyguard", "cwfast")
    case = f"mia peers rmia one target N={samples} Z={int(crowd.sum())}"
    _harness.report(benchmark, case, times, run, ratios=ratios)
