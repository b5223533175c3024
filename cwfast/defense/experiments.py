"""The paper's tables on networks of one's own: how learnability and vulnerability are entangled, which part of the
method does what, and what comes up below the weights that were rewound."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cwfast import networks
from cwfast._parameters import Initial
from cwfast.data import Dataset, check_reiterable
from cwfast.defense.analysis import by_layer, concentration, correlation, kinds, learnability, mass, overlap
from cwfast.defense.baselines import PlainTraining
from cwfast.defense.criteria import Batch, Estimate
from cwfast.defense.cwrf import CWRF
from cwfast.defense.tuning import Tuning, fine_tune
from cwfast.defense.variants import Variant, find_masks
from cwfast.masks import MaskSet
from cwfast.training import Fitted, Loss, Recipe, Task, fit_from_scratch

CRITERIA = ("taylor", "taylor_delta", "gap", "past", "delta", "magnitude", "random")


def architectures(dataset: Dataset, *, epochs: int = 30, width: int = 16) -> dict[str, Task]:
    """A task for each of the paper's kinds of network, small enough for a CPU: {"MLP", "ResNet18", "ViT"}.

    Args:
        dataset: images, flat or as ``[N, channels, size, size]``; flat ones are of one channel. ``size`` is a multiple
            of 4.
        epochs: of each recipe.
        width: of ResNet18's first stage, where the original has 64.

    Raises:
        ValueError: the inputs are no square images.
    """
    shape = tuple(dataset.inputs.shape[1:])
    size = round(shape[0] ** 0.5) if len(shape) == 1 else shape[-1]
    shape = (1, size, size) if len(shape) == 1 else shape
    if len(shape) != 3 or shape[1] != size or dataset.inputs[0].numel() != shape[0] * size * size or size % 4:
        raise ValueError(
            f"inputs must be square images whose size is a multiple of 4; got shape {tuple(dataset.inputs.shape)}"
        )
    images = replace(dataset, inputs=dataset.inputs.reshape(-1, *shape))
    channels, classes = shape[0], int(dataset.targets.max()) + 1
    patch = max(2, size // 8)
    sgd = Recipe(lr=0.1, epochs=epochs, batch_size=64)
    return {
        "MLP": Task(lambda: networks.mlp(channels * size * size, classes), images, sgd),
        "ResNet18": Task(lambda: networks.resnet18(channels, classes, width=width), images, replace(sgd, lr=0.05)),
        "ViT": Task(
            lambda: networks.vit(size, channels, classes, patch=patch, dim=64, depth=4, heads=4),
            images,
            replace(sgd, optimizer="adamw", lr=2e-3),
        ),
    }


def entanglement(
    task: Task,
    train_ids: Sequence[Tensor],
    reference_ids: Tensor,
    seeds: Sequence[int],
    *,
    rate: float = 0.01,
    granularity: str = "batch",
    criteria: Sequence[str] = CRITERIA,
    groups: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """How learnability and vulnerability go together, layer kind by layer kind, and where the critical weights lie.

    Every model is trained from scratch while its learnability is summed (``learnability``); its vulnerability is the
    criterion "taylor" with CWRF's defaults.

    Args:
        task: architecture, data, recipe.
        train_ids: for each model, the int64 indices of its members.
        reference_ids: non-members.
        seeds: for each model.
        rate: share of the weights called critical.
        granularity: of learnability and of the criteria that ``vulnerability`` computes; "batch" is the paper's.
        criteria: whose selections are compared, two by two; "taylor" among them.
        groups: ``{parameter: group}`` to correlate within; None: ``kinds(model)``.

    Returns:
        ``models``, ``weights``, ``rate``, ``granularity``; ``correlation``: ``{group: {"weights", "share", "pearson":
        [per model], "mean"}}``; ``concentration``: ``{"learnability" or criterion: [{"top", "share": [per model],
        "mean"}]}``, of "gap" as a share of the positive part; ``layers``: see ``by_layer``, of "taylor", means over
        models; ``overlap``: see ``overlap``, of the criteria, means over models; ``seeds``: the same of the models'
        "taylor" selections (initial weights differ too).

    Raises:
        ValueError: "taylor" is not among ``criteria``.

    Source:
        Fang & Kim, ICLR 2026, table 1 and section 4.
    """
    if "taylor" not in criteria:
        raise ValueError(f"criteria must hold 'taylor', the paper's vulnerability; got {tuple(criteria)}")
    pairs = [learnability(task, ids, seed, granularity=granularity) for ids, seed in zip(train_ids, seeds, strict=True)]
    trained, learned = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    scores: dict[str, list[dict[str, Tensor]]] = {"learnability": learned}
    masks: dict[str, list[MaskSet]] = {}
    for name in criteria:
        defense = CWRF(rate, criterion=name, granularity=granularity)
        scores[name] = defense.score(task, train_ids, reference_ids, seeds, trained)
        masks[name] = defense.masks(scores[name])
    groups = kinds(trained[0].model) if groups is None else groups
    found = [correlation(a, b, groups) for a, b in zip(scores["taylor"], learned, strict=True)]
    layers = [by_layer(one.model, one.initial, mask) for one, mask in zip(trained, masks["taylor"], strict=True)]
    alike = [overlap({name: masks[name][k] for name in criteria}) for k in range(len(trained))]
    return {
        "models": len(trained),
        "weights": masks["taylor"][0].numel,
        "rate": rate,
        "granularity": granularity,
        "correlation": {
            group: {"weights": first["weights"], "share": first["share"]}
            | _several([one[group]["pearson"] for one in found], "pearson")
            for group, first in found[0].items()
        },
        "concentration": {name: _held(each) for name, each in scores.items()},
        "layers": [{"layer": row[0]["layer"], **_means(row)} for row in zip(*layers, strict=True)],
        "overlap": alike[0] | {"jaccard": _mean_matrix([one["jaccard"] for one in alike])},
        "seeds": overlap({str(seed): mask for seed, mask in zip(seeds, masks["taylor"], strict=True)}),
    }


def _several(values: Sequence[float | None], name: str) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    return {name: list(values), "mean": fmean(known) if known else None}


def _held(scores: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    each = [concentration(one) for one in scores]
    return [
        {"top": row[0]["top"]} | _several([one["share"] for one in row], "share") for row in zip(*each, strict=True)
    ]


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    keys = [key for key in rows[0] if key != "layer"]
    return {key: _several([row[key] for row in rows], key)["mean"] for key in keys}


def _mean_matrix(matrices: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    return torch.tensor(matrices, dtype=torch.float64).mean(dim=0).tolist()


def ablation(
    task: Task,
    train_ids: Sequence[Tensor],
    reference_ids: Tensor,
    seeds: Sequence[int],
    *,
    loss: Loss,
    rate: float = 0.03,
    criterion: str = "taylor",
    granularity: str = "batch",
    epochs: int | None = None,
    trained: Sequence[Fitted] | None = None,
    measure: Callable[[Sequence[Fitted]], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Which part of the method does what: critical weights removed (A1), rewound and trained alone (A2), rewound and
    frozen (A3: CWRF); beside them no defense, the base defense alone, rewinding alone, and random weights.

    Args:
        task: architecture, data, recipe.
        train_ids: for each model, the int64 indices of its members.
        reference_ids: non-members.
        seeds: for each model.
        loss: the base defense.
        rate: share of the weights called critical; 3% in the paper.
        criterion: see ``cwrf_``.
        granularity: see ``cwrf_``; "batch" is the paper's.
        epochs: of fine-tuning; None: half of the recipe's, rounded up.
        trained: undefended models to start from, which skips their training.
        measure: the models of a row -> more columns, such as an attack's AUC.

    Returns:
        ``models``, ``rate``, ``criterion``, ``loss``; ``rows``: ``[{"id", "label", "train_loss", "test_loss",
        "train_accuracy", "test_accuracy", each with "_std" over models, ...}]``. Losses are mean cross-entropies of
        ``Fitted.predict``.

    Source:
        Fang & Kim, ICLR 2026, ablations A1, A2 and A3.
    """
    trained = trained or fit_from_scratch(task, train_ids, seeds)
    sets: Any = (task, train_ids, reference_ids, seeds)
    base = CWRF(rate, loss=loss, criterion=criterion, granularity=granularity, epochs=epochs)
    scores = base.score(task, train_ids, reference_ids, seeds, trained)
    masks = base.masks(scores)
    random = [mask.random_like(seed) for mask, seed in zip(masks, seeds, strict=True)]

    def rewound(masks: Sequence[MaskSet], **variant: Any) -> list[Fitted]:
        options: Any = {"loss": loss, "criterion": criterion, "epochs": epochs} | variant
        return CWRF(rate, **options).fit_many(*sets, trained=trained, masks=masks)

    def untouched() -> list[Fitted]:
        models = [copy.deepcopy(one.model) for one in trained]
        return fine_tune(task, models, trained, train_ids, seeds, loss=loss, epochs=epochs)

    rows: dict[str, tuple[str, Callable[[], Sequence[Fitted]]]] = {
        "undefended": ("no defense", lambda: trained),
        "scratch": ("base defense from scratch", lambda: PlainTraining(loss).fit_many(*sets)),
        "tuned": ("base defense from the trained weights, nothing rewound", untouched),
        "rewound": ("critical weights rewound, no fine-tuning", lambda: rewound(masks, epochs=0)),
        "A1": ("A1: critical weights removed, the others fine-tuned", lambda: rewound(masks, value="zero")),
        "A2": ("A2: critical weights rewound, only they fine-tuned", lambda: rewound(masks, train="critical")),
        "A3": ("A3: critical weights rewound, the others fine-tuned (CWRF)", lambda: rewound(masks)),
        "random": ("A3 with random weights, as many in each parameter", lambda: rewound(random)),
    }
    table = []
    for key, (label, make) in rows.items():
        fitted = make()
        more = {} if measure is None else dict(measure(fitted))
        table.append({"id": key, "label": label} | _fit(fitted, task.dataset, train_ids) | more)
    return {
        "models": len(trained),
        "weights": masks[0].numel,
        "rate": rate,
        "criterion": criterion,
        "granularity": granularity,
        "loss": repr(loss),
        "rows": table,
    }


def _fit(fitted: Sequence[Fitted], data: Dataset, train_ids: Sequence[Tensor]) -> dict[str, float]:
    """Losses and accuracies on members and on the test set, means and standard deviations over models."""
    each: dict[str, list[float]] = {}
    for one, members in zip(fitted, train_ids, strict=True):
        for part, ids in (("train", members), ("test", data.test)):
            logits, targets = one.predict(data.inputs[ids]), data.targets[ids]
            each.setdefault(f"{part}_loss", []).append(float(functional.cross_entropy(logits, targets)))
            hit = (logits.argmax(dim=1) == targets).double().mean()
            each.setdefault(f"{part}_accuracy", []).append(float(hit))
    spread = {f"{name}_std": stdev(values) if len(values) > 1 else 0.0 for name, values in each.items()}
    return {name: fmean(values) for name, values in each.items()} | spread


def onion(
    model: nn.Module,
    initial: Initial,
    members: Iterable[Batch],
    reference: Iterable[Batch],
    *,
    rate: float,
    layers: int = 3,
    criterion: str = "taylor",
    loss: Loss | None = None,
    lr: float = 0.1,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    epochs: int = 0,
    **options: object,
) -> dict[str, Any]:
    """CWRF again and again: do other weights become vulnerable once the critical ones are rewound?

    Each round scores all weights of the model that the rounds before have left, rewinds the top ``rate``, and
    fine-tunes with everything rewound so far frozen. Weights at their initial values score 0 by taylor_delta, gap and
    delta: there the overlap is 0 by construction.

    Args:
        model: trained; not changed.
        initial: see ``cwrf_``, as for criterion, loss, lr, optimizer and epochs.
        members: see ``cwrf_``.
        reference: see ``cwrf_``.
        rate: of each round.
        layers: rounds.
        criterion: one of ``CRITERIA``.
        loss: of fine-tuning.
        lr: of fine-tuning; estimation takes a tenth of it.
        optimizer: parameters -> a fresh optimizer for fine-tuning.
        epochs: of fine-tuning; 0: the rounds only rewind.
        options: fields of ``Estimate``.

    Returns:
        ``{"criterion", "rate", "layers": [...]}``, per round: ``total`` score; ``mass``, the share of it in this
        round's top; ``jaccard_previous`` with the round before and ``jaccard_all`` with all before it (None in the
        first); ``mass_rewound``, the share of the total that weights rewound before still have; ``frozen`` weights
        after the round; ``loss``, the mean training loss of the last epoch, or None.

    Raises:
        TypeError, ValueError: as ``cwrf_``.
    """
    check_reiterable(members=members, reference=reference)
    work = copy.deepcopy(model)
    variant, estimate = Variant(rate, criterion), Estimate(**{"lr": 0.1 * lr} | options)  # type: ignore[arg-type]
    found: list[dict[str, Any]] = []
    before: MaskSet | None = None
    frozen: MaskSet | None = None
    for _ in range(layers):
        masks, scores = find_masks(variant, estimate, work, initial, members, reference)
        total = sum(float(score.sum(dtype=torch.float64)) for score in scores.values())
        row = {
            "total": total,
            "mass": mass(scores, masks) / total if total else 0.0,
            "jaccard_previous": None if before is None else masks.jaccard(before),
            "jaccard_all": None if frozen is None else masks.jaccard(frozen),
            "mass_rewound": 0.0 if frozen is None or not total else mass(scores, frozen) / total,
        }
        before, frozen = masks, masks if frozen is None else frozen | masks
        tuning = Tuning(work, members, loss, lr, optimizer, epochs)
        variant.put_(work, masks, initial, members)
        history = tuning.run(frozen)
        found.append(row | {"frozen": frozen.total, "loss": history[-1] if history else None})
    return {"criterion": criterion, "rate": rate, "layers": found}
