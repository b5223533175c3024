"""``cwfast demo``: real models attacked, defended by CWRF, and attacked again, beside baselines and controls.

One fleet of networks; each is a target in turn, with the others, trained by the same defense, as its shadows.
"""

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cwfast import ops
from cwfast.data import Dataset
from cwfast.data.bundled import digits
from cwfast.defense.baselines import PlainTraining, early_stopping_sweep, interpolate_many, tau_at_distance
from cwfast.defense.cwrf import CWRF, fine_tune
from cwfast.defense.losses import RelaxLoss
from cwfast.masks import MaskSet, rewind_
from cwfast.mia import attacks, metrics
from cwfast.mia.auditing import mean_roc
from cwfast.report import prepare, write_report
from cwfast.report.provenance import backends, machine, versions
from cwfast.report.reading import reading
from cwfast.shadow import Plan
from cwfast.training import Fitted, Loss, Recipe, Task, cross_entropy

SCHEMA = "cwfast-demo/1"
FPRS = (0.05, 0.02)  # 600 non-members a target: 30 and 12 false positives
ATTACKS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {  # (phi, log p, membership) -> scores
    "lira_shrinkage": lambda phi, logprob, membership: attacks.lira(phi, membership, variance="shrinkage"),
    "lira_per_example": lambda phi, logprob, membership: attacks.lira(phi, membership, variance="per_example"),
    "lira_fixed": lambda phi, logprob, membership: attacks.lira(phi, membership, variance="fixed"),
    "rmia": lambda phi, logprob, membership: attacks.rmia(logprob, membership),
    "loss": lambda phi, logprob, membership: attacks.loss(logprob, membership),
}
SUBSET_ATTACKS = ("lira_shrinkage", "rmia")
ALPHA = 0.5  # of RelaxLoss where it fine-tunes; from scratch also 1.0, its authors' value for CIFAR-10
LOSSES: dict[str, Loss] = {"CE": cross_entropy, "RelaxLoss": RelaxLoss(ALPHA)}


@dataclass(frozen=True)
class Sizes:
    """How much of everything; all of it fixed before any result was seen."""

    models: int = 16
    epochs: int = 50
    rates: tuple[float, ...] = (0.01, 0.1, 0.3)
    stops: tuple[int, ...] = (3, 6, 10, 20, 30)
    taus: tuple[float, ...] = (0.8, 0.6, 0.45, 0.3)
    bootstrap: int = 200

    @property
    def middle_rate(self) -> float:
        """The rate that stands for the others where only one is shown."""
        return self.rates[len(self.rates) // 2]


QUICK = Sizes(models=8, epochs=20, rates=(0.1,), stops=(3, 10), taus=(0.45,), bootstrap=50)


@dataclass
class Row:
    """One line of the result: what was done to the fleet."""

    id: str
    group: str  # baseline | cwrf | control
    label: str
    defense: str = "none"
    criterion: str | None = None
    loss: str | None = None
    rate: float | None = None
    strength: float | None = None  # epochs, alpha or tau


def run(out: Path, *, quick: bool = False, seed: int = 0, command: str = "cwfast demo") -> dict[str, Any]:
    """Run the demo and write ``report.json``, ``report.html`` and the plots into ``out``.

    Args:
        out: folder, made if it does not exist.
        quick: fewer and shorter-trained models: for a first look, not for conclusions.
        seed: of data splits, membership, initial weights, batches and bootstrap.
        command: as typed, for the report.

    Returns:
        The report that was written.

    Raises:
        OSError: ``out`` cannot be written; found out before anything is trained.
        ImportError: scikit-learn, matplotlib or jinja2 is missing.
    """
    prepare(out)
    demo = _Demo(QUICK if quick else Sizes(), seed)
    report = demo.report(command, quick)
    with demo.stage("report"):
        write_report(report, out)
    write_report(report, out)  # again, now that the time of writing it is known
    return report


class _Demo:
    def __init__(self, sizes: Sizes, seed: int) -> None:
        self.sizes, self.seed = sizes, seed
        self.stages: list[dict[str, Any]] = []
        self.dataset = digits(seed=seed)
        self.task = Task(_network, self.dataset, Recipe(lr=0.2, batch_size=64, epochs=sizes.epochs, seed=seed))
        plan = Plan.halves(self.dataset.pool, self.dataset.reference, sizes.models, seed)
        self.ids = [plan.train_ids(model) for model in range(plan.models)]
        self.membership, self.seeds = plan.membership.numpy(), plan.seeds
        self.rows: list[dict[str, Any]] = []
        self.roc: dict[str, dict[str, Any]] = {}
        self.layers: dict[str, dict[str, Any]] = {}
        self.bar = tqdm(total=self._planned(), desc="cwfast demo", unit="fleet", file=sys.stderr, disable=None)

    def report(self, command: str, quick: bool) -> dict[str, Any]:
        trained = self._baselines()
        for criterion in ("taylor", "gap"):
            self._criterion(criterion, trained)
        self._batch_variant(trained)
        self.bar.close()
        return {
            "schema": SCHEMA,
            "title": "Which weights leak? CWRF on handwritten digits",
            "command": command,
            "seed": self.seed,
            "quick": quick,
            "versions": versions(("cwfast", "torch", "numpy", "scikit-learn", "matplotlib")),
            "device": "cpu",
            "machine": machine(),
            "backends": backends("saliency", "select", "rewind", "logit_stats"),
            "data": _describe(self.dataset),
            "settings": self._settings(),
            "stages": self.stages,
            "rows": self.rows,
            "roc": self.roc,
            "layers": self.layers,
            "reading": reading(self.rows, quick=quick),
        }

    # -- the rows

    def _baselines(self) -> list[Fitted]:
        with self.stage("train undefended"):
            trained, stopped = early_stopping_sweep(self.task, self.ids, self.seeds, self.sizes.stops)
        self._row(Row("undefended", "baseline", "Undefended", loss="CE"), trained, roc=True)
        for epochs, fitted in stopped.items():
            label = f"Early stopping, {epochs} of {self.sizes.epochs} epochs"
            self._row(Row(f"early-{epochs}", "baseline", label, "early stopping", loss="CE", strength=epochs), fitted)
        for alpha in (ALPHA, 1.0):
            with self.stage("train RelaxLoss"):
                defense = PlainTraining(RelaxLoss(alpha))
                fitted = defense.fit_many(self.task, self.ids, self.dataset.reference, self.seeds)
            label = f"RelaxLoss from scratch, alpha {alpha}"
            row = Row(f"relaxloss-{alpha}", "baseline", label, "RelaxLoss", loss="RelaxLoss", strength=alpha)
            self._row(row, fitted, roc=alpha == 1.0)
        for name, loss in LOSSES.items():
            fitted = self._tuned(trained, [copy.deepcopy(one.model) for one in trained], loss)
            label = f"Fine-tuned without rewinding, {name}"
            self._row(Row(f"rate0-{name}", "control", label, "fine-tuning only", loss=name, rate=0.0), fitted)
        for tau in self.sizes.taus:
            models = interpolate_many(self.task, trained, self.ids, self.seeds, [tau] * len(trained))
            fitted = [Fitted(model, one.initial) for model, one in zip(models, trained, strict=True)]
            label = f"Interpolated to the initial weights, tau {tau}"
            self._row(Row(f"interpolation-{tau}", "control", label, "interpolation only", strength=tau), fitted)
        return trained

    def _criterion(self, criterion: str, trained: list[Fitted]) -> None:
        """CWRF over the rates; at equal steps, random masks of the same counts and interpolation as far away."""
        with self.stage(f"score ({criterion})"):
            defense = CWRF(0.0, criterion=criterion)
            scores = defense.score(self.task, self.ids, self.dataset.reference, self.seeds, trained)
        for rate in self.sizes.rates:
            with self.stage("select and rewind"):
                masks = CWRF(rate, criterion=criterion).masks(scores)
                random = [one.random_like(seed) for one, seed in zip(masks, self.seeds, strict=True)]
                rewound = _rewound(trained, masks)
                taus = [tau_at_distance(one, model) for one, model in zip(trained, rewound, strict=True)]
            if rate == self.sizes.middle_rate:
                self._layer_counts(criterion, rate, masks)
            for name, loss in LOSSES.items():
                key, share = f"{criterion}-{rate}-{name}", f"{rate:.0%}"
                roc = name == "RelaxLoss" and rate == max(self.sizes.rates)
                row = Row(f"cwrf-{key}", "cwrf", f"CWRF {criterion} {share} + {name}", "CWRF", criterion, name, rate)
                self._row(row, self._tuned(trained, _rewound(trained, masks), loss, masks), roc=roc)
                kind = f"random, counts of {criterion}"
                row = Row(f"random-{key}", "control", f"R{kind[1:]}, {share} + {name}", kind, "random", name, rate)
                self._row(row, self._tuned(trained, _rewound(trained, random), loss, random))
                kind = f"interpolated as far as {criterion}"
                row = Row(
                    f"distance-{key}", "control", f"I{kind[1:]} {share} + {name}", kind, "interpolation", name, rate
                )
                row.strength = float(np.mean(taus))
                models = interpolate_many(self.task, trained, self.ids, self.seeds, taus)
                self._row(row, self._tuned(trained, models, loss))

    def _batch_variant(self, trained: list[Fitted]) -> None:
        """The paper's own granularity: |g w| of the batch gradient."""
        rate, name = self.sizes.middle_rate, "RelaxLoss"
        with self.stage("score (taylor, batch)"):
            defense = CWRF(rate, granularity="batch")
            masks = defense.masks(defense.score(self.task, self.ids, self.dataset.reference, self.seeds, trained))
        label = f"CWRF taylor (batch) {rate:.0%} + {name}"
        row = Row(f"cwrf-taylor-batch-{rate}-{name}", "cwrf", label, "CWRF", "taylor (batch)", name, rate)
        self._row(row, self._tuned(trained, _rewound(trained, masks), LOSSES[name], masks))

    def _tuned(
        self, trained: list[Fitted], models: list[nn.Module], loss: Loss, masks: list[MaskSet] | None = None
    ) -> list[Fitted]:
        with self.stage("fine-tune"):
            return fine_tune(self.task, models, trained, self.ids, self.seeds, loss=loss, masks=masks)

    def _row(self, row: "Row", fitted: Sequence[Fitted], *, roc: bool = False) -> None:
        """Attack one fleet and keep what came out."""
        with self.stage("attack"):
            data, pool = self.dataset, self.dataset.pool
            stats = [ops.logit_stats(one.predict(data.inputs[pool]), data.targets[pool]) for one in fitted]
            phi = torch.stack([s.phi for s in stats]).double().numpy()
            logprob = -torch.stack([s.loss for s in stats]).double().numpy()
            scores = {name: attack(phi, logprob, self.membership) for name, attack in ATTACKS.items()}
            every, noisy = np.ones(len(pool), dtype=bool), data.randomised[pool].numpy()
            parts = {"clean": ~noisy, "random_label": noisy}
            if roc:
                self.roc[row.id] = self._curve(scores["lira_shrinkage"])
            train, test = _accuracies(fitted, data, self.ids)
            measured = {
                "train_accuracy": float(train.mean()),
                "test_accuracy": float(test.mean()),
                "test_accuracy_std": float(test.std(ddof=1)),
                "critical_weights": None if fitted[0].masks is None else fitted[0].masks.total,
                "attacks": {name: self._summary(score, every) for name, score in scores.items()},
                "subsets": {
                    part: {name: self._summary(scores[name], columns) for name in SUBSET_ATTACKS}
                    for part, columns in parts.items()
                },
            }
        self.rows.append(asdict(row) | measured)
        self.bar.set_postfix_str(row.label[:40])
        self.bar.update()

    def _summary(self, scores: np.ndarray, columns: np.ndarray) -> dict[str, Any]:
        options: dict[str, Any] = {"fprs": FPRS, "bootstrap": self.sizes.bootstrap, "seed": self.seed}
        return metrics.summary(scores[:, columns], self.membership[:, columns], **options)

    def _curve(self, scores: np.ndarray) -> dict[str, Any]:
        points = mean_roc(scores, self.membership, 30, bootstrap=self.sizes.bootstrap, seed=self.seed)
        return {"attack": "lira_shrinkage"} | {key: [point[key] for point in points] for key in points[0]}

    def _layer_counts(self, criterion: str, rate: float, masks: list[MaskSet]) -> None:
        numel = {name: math.prod(shape) for name, shape in masks[0].shapes.items()}
        counts = {name: float(np.mean([one.counts[name] for one in masks])) for name in masks[0].names}
        self.layers[criterion] = {"rate": rate, "counts": counts, "numel": numel}

    # -- bookkeeping

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time inside to the stage of this name."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        for entry in self.stages:
            if entry["name"] == name:
                entry["seconds"] += seconds
                return
        self.stages.append({"name": name, "seconds": seconds})

    def _planned(self) -> int:
        s = self.sizes
        return 1 + len(s.stops) + 2 + 2 + len(s.taus) + 2 * len(s.rates) * 2 * 3 + 1

    def _settings(self) -> dict[str, Any]:
        recipe, weights = self.task.recipe, sum(parameter.numel() for parameter in _network().parameters())
        return {
            "networks": f"{self.sizes.models}, each trained on half of the pool; halves come in complementary pairs",
            "architecture": f"64-256-256-10 perceptron with ReLU, {weights:,} weights",
            "training": f"{recipe.epochs} epochs, SGD, cosine schedule, lr {recipe.lr}, momentum {recipe.momentum}, "
            f"batch {recipe.batch_size}",
            "fine-tuning": f"{math.ceil(recipe.epochs / 2)} epochs from the initial lr with a fresh optimizer; rewound "
            "weights frozen",
            "RelaxLoss alpha in fine-tuning": ALPHA,
            "estimate (taylor)": "lam 0.5, one pass over the members, SGD at 0.1 x lr, per sample",
            "gap": "3 points on the path from the initial to the trained weights",
            "rates": list(self.sizes.rates),
            "bootstrap": f"{self.sizes.bootstrap} resamples of samples, all targets of one together; 95% intervals",
            "attacks": "every network a target, the others its shadows; RMIA's population: pool samples left out",
            "reference set": "used by taylor (inputs) and gap (inputs and labels); no other row sees it",
        }


def _rewound(trained: Sequence[Fitted], masks: Sequence[MaskSet]) -> list[nn.Module]:
    """Copies of the trained models with the masked weights back at their initial values."""
    pairs = zip(trained, masks, strict=True)
    return [rewind_(copy.deepcopy(one.model), mask, one.initial) for one, mask in pairs]


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def _accuracies(fitted: Sequence[Fitted], data: Dataset, ids: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Each model's accuracy on its members (labels as trained on) and on the test set."""
    train, test = [], []
    for one, members in zip(fitted, ids, strict=True):
        hit = one.predict(data.inputs).argmax(dim=1) == data.targets
        test.append(float(hit[data.test].double().mean()))
        train.append(float(hit[members].double().mean()))
    return np.array(train), np.array(test)


def _describe(data: Dataset) -> dict[str, Any]:
    return {
        "name": data.name,
        "pool": len(data.pool),
        "reference": len(data.reference),
        "test": len(data.test),
        "random_label_share": float(data.randomised[data.pool].double().mean()),
        "sha256": data.sha256,
        "note": data.note,
    }
