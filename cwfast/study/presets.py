"""What a study runs: sizes, data sets, networks, defenses and rates, chosen after earlier trials on the same data."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from cwfast import data, networks
from cwfast.defense import specs
from cwfast.training import Recipe, Task

_LABELS = {name: entry.label for name, entry in specs.DEFENSES.items()}
_LABELS["hamp_plain"] = f"{_LABELS['hamp']}, outputs unchanged"  # the same models, asked by whoever has their weights
# The base defenses, as reports call them.
DEFENSES = {name: _LABELS[name] for name in ("none", "relaxloss", "hamp", "hamp_plain", "ccl", "dpsgd")}


@dataclass(frozen=True)
class Setting:
    """One data set of a study.

    Attributes:
        data: its name for ``cwfast.data.load``.
        network: what it is called in reports.
        make_model: draws its initial weights from torch's RNG.
        recipe: of all training; fine-tuning takes half of its epochs.
        pool: samples that are members of half of the models.
        reference: samples for defenses.
        test: samples at most that accuracies are measured on; None: all that are left.
        random_label_share: see ``cwfast.data.load``.
        losses: spec of the loss by which each base defense fine-tunes (``cwfast.defense.specs``), by the defense's
            name; "dpsgd" is a whole defense.
        strengths: more specs of a base defense: for fine-tuning without rewinding, and at ``middle_rate`` for CWRF by
            the criteria of ``copied``.
        scratch: specs of training from scratch, several strengths of each.
        criteria: by which CWRF chooses weights.
        copied: criteria that controls copy: as many weights at random in each tensor, and interpolation as far.
        rates: of CWRF.
        middle_rate: where only one rate is shown.
        stops: epochs of early stopping.
        shorts: epochs of training whose whole schedule is as short.
        taus: of interpolation to the initial weights.
        ablation: also run the paper's ablations and the variants of CWRF, at ``ablation_rate`` with RelaxLoss.
        variants: also compute gap in other ways, at ``middle_rate`` with RelaxLoss.
        first: pattern of the parameters of the network's first layer, for a variant; the next of its last layer.
        last: see ``first``.
        ablation_rate: the paper's 3%.
        tables: networks of ``cwfast.defense.experiments`` for the tables of the paper, by the first seed's split.
        most_seeds: it is run with the first few seeds alone.
        local: its files are not in a package: ``--path`` must say where they lie.
    """

    data: str
    network: str
    make_model: Callable[[], nn.Module]
    recipe: Recipe
    pool: int | None
    reference: int | None
    losses: dict[str, str]
    scratch: tuple[str, ...]
    strengths: dict[str, tuple[str, ...]] = field(default_factory=dict)
    criteria: tuple[str, ...] = ("taylor", "taylor_delta", "gap")
    copied: tuple[str, ...] = ("taylor", "gap")
    rates: tuple[float, ...] = (0.01, 0.1, 0.3)
    middle_rate: float = 0.1
    stops: tuple[int, ...] = ()
    shorts: tuple[int, ...] = ()
    taus: tuple[float, ...] = ()
    test: int | None = None
    random_label_share: float = 0.0
    ablation: bool = False
    variants: bool = False
    first: str = "1.*"  # of ``networks.mlp``
    last: str = "5.*"
    ablation_rate: float = 0.03
    tables: tuple[str, ...] = ()
    local: bool = False
    most_seeds: int | None = None

    def task(self, seed: int, path: Path | None = None, device: str = "cpu") -> Task:
        """The data, split by the seed, with the network and the recipe, on a device; the pool is even.

        Raises:
            Exception: as ``cwfast.data.load`` does.
        """
        options: dict[str, Any] = {"pool": self.pool, "reference": self.reference}
        where = path if self.local else None
        samples = data.load(self.data, where, seed=seed, random_label_share=self.random_label_share, **options)
        even = replace(
            samples,
            pool=samples.pool[: len(samples.pool) // 2 * 2],
            test=samples.test[: self.test],
            inputs=samples.inputs.to(device),
            targets=samples.targets.to(device),
        )
        return Task(lambda: self.make_model().to(device), even, replace(self.recipe, seed=seed))


@dataclass(frozen=True)
class Preset:
    """A study.

    Attributes:
        models: of each data set and seed; every one is a target in turn, the others are its shadows.
        group: models trained at once, as one stack where that can be done.
        seeds: by default.
        bootstrap: replicates for intervals.
        fprs: false-positive rates at which true ones are told.
        settings: by the name that ``--data`` takes.
        note: what the reader must know.
        gpu: trained on one where there is one. Not yet run.
    """

    models: int
    group: int
    seeds: tuple[int, ...]
    bootstrap: int
    fprs: tuple[float, ...]
    settings: dict[str, Setting]
    note: str
    gpu: bool = False


def _perceptron(features: int, classes: int, width: int = 256) -> dict[str, Any]:
    return {
        "make_model": functools.partial(networks.mlp, features, classes, width=width),
        "network": f"{features}-{width}-{width}-{classes} perceptron with ReLU",
    }


def _sweep(pattern: str, values: Sequence[float]) -> tuple[str, ...]:
    return tuple(pattern.format(value) for value in values)


_HAMP = "hamp(gamma={},alpha=0.01,reduction=batchmean)"  # a mean over classes as well would train a tenth as fast
_DIGITS = Setting(
    "digits",
    **_perceptron(64, 10),
    recipe=Recipe(lr=0.2, batch_size=64, epochs=50),
    pool=1200,
    reference=300,
    random_label_share=0.2,
    losses={
        "none": "ce",
        "relaxloss": "relaxloss(alpha=0.5)",
        "hamp": _HAMP.format(0.8),
        "ccl": "ccl(alpha=0.5)",
    },
    strengths={
        "relaxloss": _sweep("relaxloss(alpha={})", (0.8, 1.0)),
        "hamp": _sweep(_HAMP, (0.5, 0.95)),
        "ccl": _sweep("ccl(alpha={})", (0.3, 0.8)),
    },
    scratch=(
        *_sweep("relaxloss(alpha={})", (0.5, 0.8, 1.0, 1.3)),
        *_sweep(_HAMP, (0.5, 0.8, 0.95)),
        *_sweep("ccl(alpha={})", (0.3, 0.5, 0.8)),
        *_sweep("label-smoothing(epsilon={})", (0.2, 0.6)),
        *_sweep("confidence-penalty(beta={})", (0.1, 1.0)),
        *_sweep("weight-decay(strength={})", (0.005, 0.02)),
        *_sweep("mixup(alpha={})", (1.0,)),
        *_sweep("past(lam={})", (0.0001,)),
        *_sweep("crl(alpha={})", (1.0,)),
    ),
    rates=(0.01, 0.03, 0.1, 0.2, 0.3),
    stops=(3, 6, 10, 20, 30),
    shorts=(3, 6, 10, 20),
    taus=(0.8, 0.6, 0.45, 0.3),
    ablation=True,
    variants=True,
    tables=("MLP", "ResNet18", "ViT"),
)
_PRIVATE = replace(  # models one by one, with gradients of single samples: seven times slower
    _DIGITS,
    losses={"dpsgd": "dpsgd:epsilon=20"},
    strengths={},
    scratch=_sweep("dpsgd(epsilon={})", (5, 20, 100)),
    criteria=("taylor", "gap"),
    copied=("gap",),
    ablation=False,
    variants=False,
    tables=(),
    most_seeds=1,
)
_MNIST = Setting(
    "mnist-5k",
    **_perceptron(784, 10),
    recipe=Recipe(lr=0.1, batch_size=64, epochs=30),
    pool=1600,
    reference=500,
    losses={"none": "ce", "relaxloss": "relaxloss(alpha=0.3)"},
    strengths={"relaxloss": _sweep("relaxloss(alpha={})", (0.1, 0.5))},
    scratch=_sweep("relaxloss(alpha={})", (0.1, 0.3, 0.5)),
    stops=(2, 4, 8, 15),
    shorts=(2, 4, 8),
    taus=(0.6, 0.45, 0.3),
    variants=True,
    most_seeds=2,
)
_TABULAR: dict[str, Any] = {
    "recipe": Recipe(lr=0.1, batch_size=64, epochs=40),
    "pool": 1600,
    "reference": 500,
    "test": 10_000,
    "stops": (1, 2, 4, 8, 16),
    "shorts": (2, 4, 8),
    "taus": (0.6, 0.45, 0.3),
}
_ADULT = Setting(
    "adult",
    **_perceptron(104, 2),
    **_TABULAR,
    losses={"none": "ce", "relaxloss": "relaxloss(alpha=0.35)"},
    strengths={"relaxloss": _sweep("relaxloss(alpha={})", (0.2, 0.5))},
    scratch=_sweep("relaxloss(alpha={})", (0.2, 0.35, 0.5)),
)
_HERITAGE = Setting(
    "heritage-health",
    **_perceptron(134, 4),
    **_TABULAR,
    losses={"none": "ce", "relaxloss": "relaxloss(alpha=0.6)"},
    strengths={"relaxloss": _sweep("relaxloss(alpha={})", (0.4, 0.8))},
    scratch=_sweep("relaxloss(alpha={})", (0.4, 0.6, 0.8)),
    criteria=("taylor", "gap"),
    copied=("gap",),
    rates=(0.1, 0.3),
    most_seeds=1,
)
_TINY = replace(
    _DIGITS,
    **_perceptron(64, 10, width=16),
    recipe=Recipe(lr=0.2, batch_size=16, epochs=12),
    pool=120,
    reference=60,
    losses={"none": "ce", "relaxloss": "relaxloss(alpha=0.5)"},
    strengths={},
    scratch=("relaxloss(alpha=0.5)",),
    criteria=("taylor", "gap"),
    copied=("gap",),
    rates=(0.01, 0.1),
    stops=(2,),
    shorts=(2,),
    taus=(0.5,),
    ablation=False,
    variants=False,
    tables=(),
)


def _image(data_name: str, classes: int, alpha: float, vit: bool) -> Setting:
    """As the paper: CIFAR-sized images; not yet run."""
    make = functools.partial(networks.vit, 32, 3, classes) if vit else functools.partial(networks.resnet18, 3, classes)
    recipe = Recipe(lr=0.1, batch_size=128, epochs=100, weight_decay=5e-4)
    return Setting(
        data_name,
        network="small ViT" if vit else "ResNet18 in its CIFAR form",
        make_model=make,
        recipe=replace(recipe, optimizer="adamw", lr=1e-3, weight_decay=0.05) if vit else recipe,
        pool=None,
        reference=5000,
        losses={
            "none": "ce",
            "relaxloss": f"relaxloss(alpha={alpha})",
            "hamp": "hamp(gamma=0.95,alpha=0.001,reduction=batchmean)",
            "ccl": "ccl(alpha=0.5)",
        },
        scratch=(*_sweep("relaxloss(alpha={})", (alpha / 2, alpha, 2 * alpha)), "ccl(alpha=0.5)"),
        strengths={"relaxloss": _sweep("relaxloss(alpha={})", (alpha / 2, 2 * alpha))},
        rates=(0.001, 0.01, 0.03, 0.1, 0.3),
        stops=(10, 20, 40, 70),
        shorts=(10, 20, 40),
        taus=(0.8, 0.6, 0.45, 0.3),
        ablation=True,
        local=True,
    )


_PAPER = {
    name + ("-vit" if vit else ""): _image(name, classes, alpha, vit)
    for name, classes, alpha in (("cifar10", 10, 1.0), ("cifar100", 100, 0.5), ("cinic10", 10, 1.0))
    for vit in (False, True)
}
PRESETS = {
    "tiny": Preset(
        6, 6, (0,), 20, (0.1,), {"digits": _TINY}, "A tiny run, to see that it runs: no conclusions from it."
    ),
    "small": Preset(
        16,
        16,
        (0, 1),
        200,
        (0.05, 0.02),
        {
            "digits": _DIGITS,
            "mnist_5k": _MNIST,
            "adult": _ADULT,
            "heritage": _HERITAGE,
            "digits_private": _PRIVATE,
        },
        "Small networks on small data, on a CPU: what holds here need not hold for the networks of the paper.",
    ),
    "paper": Preset(16, 1, (0,), 1000, (0.01, 0.001), _PAPER, "The paper's data and kinds of networks.", gpu=True),
}
DEFAULT_DATA = {
    "tiny": ("digits",),
    "small": ("digits", "mnist_5k", "adult", "digits_private", "heritage"),
    "paper": ("cifar10",),
}
