"""Measures of where scores and critical weights lie: plain numbers, ready for JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cwfast._mask_view import layer_of
from cwfast._parameters import Initial, initial_values, trainable
from cwfast._selecting import select
from cwfast.masks import MaskSet, matching
from cwfast.scoring import SaliencyScorer
from cwfast.training import Fitted, Loss, Task, cross_entropy, fit_from_scratch

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def kinds(model: nn.Module) -> dict[str, str]:
    """What each trainable parameter belongs to, by name: attention | conv | linear | norm | embedding | other.

    "attention" is every parameter inside a module whose class is named so, but its norms; "other" are bare parameters.
    The names are those that ``select`` takes as patterns: ``exclude=[n for n, kind in kinds(model).items() if ...]``.
    """
    found: dict[str, str] = {}
    for name in trainable(model):
        path = name.rpartition(".")[0]
        owner = model.get_submodule(path)
        above = [model.get_submodule(path[:i]) for i, letter in enumerate(path + ".") if letter == "."]
        if isinstance(owner, _NORMS) or type(owner).__name__.endswith("Norm"):
            found[name] = "norm"
        elif any("attention" in type(module).__name__.lower() for module in above):
            found[name] = "attention"
        elif isinstance(owner, nn.modules.conv._ConvNd):
            found[name] = "conv"
        elif isinstance(owner, nn.Linear):
            found[name] = "linear"
        else:
            found[name] = "embedding" if isinstance(owner, nn.Embedding) else "other"
    return found


def correlation(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], groups: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Pearson's correlation over the weights of each group, and of "all".

    Args:
        a: ``{name: scores}``.
        b: the same names and shapes.
        groups: ``{name: group}``, such as ``kinds(model)``.

    Returns:
        ``{group: {"pearson", "weights", "share"}}``: float64; None where one of the two is constant.

    Raises:
        ValueError: the three do not have the same names, or a shape differs.
    """
    if not set(a) == set(b) == set(groups):
        raise ValueError(f"a, b and groups must have the same names; got {len(a)}, {len(b)} and {len(groups)}")
    for name in a:
        if a[name].shape != b[name].shape:
            raise ValueError(f"scores must have the same shape; {name!r} has {a[name].shape} and {b[name].shape}")
    members: dict[str, list[str]] = {}
    for name in a:
        members.setdefault(groups[name], []).append(name)
    members["all"] = list(a)
    total = sum(score.numel() for score in a.values())
    found = {}
    for group, names in members.items():
        count = sum(a[name].numel() for name in names)
        pearson = _pearson([(a[name], b[name]) for name in names], count)
        found[group] = {"pearson": pearson, "weights": count, "share": count / total}
    return found


def _pearson(pairs: Sequence[tuple[Tensor, Tensor]], count: int) -> float | None:
    """Two passes, one tensor at a time: means, then products of the deviations."""
    means = [sum(float(pair[side].sum(dtype=torch.float64)) for pair in pairs) / max(1, count) for side in (0, 1)]
    xx = yy = xy = 0.0
    for pair in pairs:
        x, y = (value.double().flatten() - mean for value, mean in zip(pair, means, strict=True))
        xx, yy, xy = xx + float(x @ x), yy + float(y @ y), xy + float(x @ y)
    return xy / math.sqrt(xx * yy) if xx > 0 and yy > 0 else None


def concentration(scores: Mapping[str, Tensor], tops: Sequence[float] = (0.001, 0.01)) -> list[dict[str, float]]:
    """What share of the total the largest scores hold.

    Args:
        scores: ``{name: scores}``. Signed ones (``gap_shares``) as well: the share is of the net total, which the top
            may exceed.
        tops: shares of the weights.

    Returns:
        ``[{"top", "share"}]``; NaN-free: a share is 0 where the total is 0.
    """
    total = sum(float(score.sum(dtype=torch.float64)) for score in scores.values())
    positive = {name: score.clamp(min=0) for name, score in scores.items()}
    found = []
    for top in tops:
        held = mass(positive, select(positive, rate=top))
        found.append({"top": top, "share": held / total if total else 0.0})
    return found


def mass(scores: Mapping[str, Tensor], masks: MaskSet) -> float:
    """The sum of the selected scores, in float64."""
    return sum(float(scores[name][masks[name]].sum(dtype=torch.float64)) for name in masks.names)


def by_layer(model: nn.Module, initial: Initial, masks: MaskSet) -> list[dict[str, Any]]:
    """How many weights of each layer are critical, and how far training moved them and the others.

    Args:
        model: trained, not yet rewound.
        initial: its initial weights: module, mapping or safetensors file.
        masks: of this model.

    Returns:
        Per layer, in the model's order, and last for "all": ``{"layer", "weights", "critical", "moved_critical",
        "moved_rest"}``, the last two being means of ``|w - w0|``; None where there is no such weight.
    """
    parameters = matching(model, masks)
    start = initial_values(initial, parameters)
    sums: dict[str, list[float]] = {}
    for name, parameter in parameters.items():
        moved = (parameter.detach().double() - start[name].to(parameter).double()).abs()
        mask = masks[name]
        part = [masks.counts[name], float(moved[mask].sum()), moved.numel(), float(moved.sum())]
        for key in (layer_of(name), "all"):
            sums[key] = [before + more for before, more in zip(sums.get(key, [0, 0, 0, 0]), part, strict=True)]
    sums["all"] = sums.pop("all")  # last
    return [
        {
            "layer": key,
            "weights": weights,
            "critical": critical,
            "moved_critical": inside / critical if critical else None,
            "moved_rest": (whole - inside) / (weights - critical) if weights > critical else None,
        }
        for key, (critical, inside, weights, whole) in sums.items()
    ]


def overlap(masks: Mapping[str, MaskSet]) -> dict[str, Any]:
    """How alike several selections of the same weights are, two by two.

    Args:
        masks: ``{name: selection}``: of several criteria, or of models of several seeds.

    Returns:
        ``{"names", "jaccard", "by_chance"}``: matrices of |A and B| / |A or B|, and of what two independent uniform
        selections of these sizes would have on average (the ratio of the expected sizes).
    """
    names = list(masks)
    jaccard = [[1.0] * len(names) for _ in names]
    chance = [[1.0] * len(names) for _ in names]
    for i, j in combinations(range(len(names)), 2):
        a, b = masks[names[i]], masks[names[j]]
        both = a.total * b.total / max(1, a.numel)
        jaccard[i][j] = jaccard[j][i] = a.jaccard(b)
        chance[i][j] = chance[j][i] = both / (a.total + b.total - both) if a.total + b.total else 1.0
    return {"names": names, "jaccard": jaccard, "by_chance": chance}


def learnability(
    task: Task, train_ids: Tensor, seed: int, *, granularity: str = "batch", loss: Loss = cross_entropy
) -> tuple[Fitted, dict[str, Tensor]]:
    """Train a model from scratch; a weight's learnability is the sum over all steps of ``|g w|``.

    Args:
        task: architecture, data, recipe.
        train_ids: int64 indices of the members.
        seed: initial weights and order of the samples.
        granularity: "batch" (the paper): ``|g w|`` of each step's gradient; "sample": of each sample's.
        loss: the mean over a batch; plain cross-entropy is the paper's.

    Returns:
        The trained model, and ``{name: learnability}``.

    Source:
        Fang & Kim, ICLR 2026, section 4.
    """
    model = task.initial_model(seed)
    scorer = SaliencyScorer(model, granularity=granularity)
    alone = replace(task, make_model=lambda: model, recipe=replace(task.recipe, stack=False))
    step = register_optimizer_step_pre_hook(lambda *_: scorer.step())
    try:
        with scorer:
            fitted = fit_from_scratch(alone, [train_ids], [seed], loss=loss)[0]
    finally:
        step.remove()
    return fitted, scorer.scores()
