"""The demo's networks audited with 8, 16 and 64 of them: what LiRA finds with each of its three variances.

``python -m cwfast.benchmarks variances --size full`` trains 64 networks and prints the table.
"""

import numpy as np
from cwfast.benchmarks import _harness
from pytest_benchmark.fixture import BenchmarkFixture

from cwfast import ops
from cwfast.data.bundled import digits
from cwfast.demo import Sizes, _network
from cwfast.mia import lira, metrics
from cwfast.shadow import Plan
from cwfast.training import Recipe, Task, fit_from_scratch

VARIANCES = ("shrinkage", "per_example", "fixed")
TARGETS = 8  # the same ones whatever the number of models, so that only their shadows differ
FPRS = (0.02, 0.01)


def test_variances(benchmark: BenchmarkFixture) -> None:
    """Mean over 8 targets, each attacked by all other models; intervals over samples (metrics.summary)."""
    counts = _harness.by_size(tiny=(8,), full=(8, 16, 64))
    epochs = _harness.by_size(tiny=2, full=Sizes.epochs)
    data = digits(seed=0)
    task = Task(_network, data, Recipe(lr=0.2, batch_size=64, epochs=epochs))
    plan = Plan.halves(data.pool, data.reference, counts[-1], seed=0)
    fitted = fit_from_scratch(task, [plan.train_ids(model) for model in range(plan.models)], plan.seeds)
    member = plan.membership.numpy()
    inputs, labels = data.inputs[plan.ids], data.targets[plan.ids]
    phi = np.stack([ops.logit_stats(one.predict(inputs), labels).phi.double().numpy() for one in fitted])
    found: dict[str, dict[str, object]] = {}
    table = [
        f"{'models':>6}  {'variance':<11}  {'AUC [low, high]':<22}"
        + "".join(f"  TPR@{f:.0%} [low, high]" for f in FPRS)
    ]
    for count in counts:
        for variance in VARIANCES:
            scores = lira(phi[:count], member[:count], variance=variance)[:TARGETS]
            one = metrics.summary(scores, member[:TARGETS], fprs=FPRS)
            found[f"{variance} K={count}"] = one
            cells = [f"{one['auc']:.3f} [{one['auc_low']:.3f}, {one['auc_high']:.3f}]".ljust(22)]
            cells += [f"{p['tpr']:.3f} [{p['low']:.3f}, {p['high']:.3f}]" for p in one["tpr_at_fpr"]]
            table.append("  ".join([f"{count:>6}", f"{variance:<11}", *cells]))
    variants = {variance: lambda variance=variance: lira(phi, member, variance=variance) for variance in VARIANCES}
    times = _harness.interleaved(variants, 5)
    case = f"variances lira K={counts[-1]} N={len(plan.ids)} epochs={epochs}"
    _harness.report(benchmark, case, times, variants["shrinkage"], ratios={}, found=found, targets=TARGETS)
    _harness.SUMMARY.extend(table)
