"""One data set and seed: what is trained and scored once, and the models of each cell made from that."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cwfast.defense.baselines import PlainTraining
from cwfast.defense.cwrf import CWRF
from cwfast.shadow import Plan, Training
from cwfast.shadow.describing import describe, digest
from cwfast.shadow.work import versions
from cwfast.study import tables
from cwfast.study.folder import Folder
from cwfast.study.grid import Cell
from cwfast.study.halting import Best
from cwfast.study.presets import Preset, Setting
from cwfast.study.sources import code
from cwfast.training import Fitted, fit_from_scratch

MAKES = (
    "how",
    "spec",
    "criterion",
    "rate",
    "lam",
    "strength",
    "like",
    "unchanged",
)  # of a cell: what changes its models
BEST = "best"  # the epoch with the lowest loss on the reference set


class Subject:
    """The models of one data set and seed.

    Args:
        name: of the setting.
        setting: the data set.
        seed: of data split, plan, initial weights and batches.
        preset: sizes.
        out: the study's folder.
        path: where local data lie.
    """

    def __init__(
        self, name: str, setting: Setting, seed: int, preset: Preset, out: Path, path: Path | None = None
    ) -> None:
        self.setting, self.seed = setting, seed
        self.device = "cuda" if preset.gpu and torch.cuda.is_available() else "cpu"
        self.task = setting.task(seed, path, self.device)
        dataset = self.task.dataset
        self.plan = Plan.halves(dataset.pool.cpu(), dataset.reference.cpu(), preset.models, seed)
        group = min(preset.group, preset.models)
        self.groups = [range(k, min(k + group, preset.models)) for k in range(0, preset.models, group)]
        about = Training((self.task, PlainTraining())).manifest
        del about["defense"]  # each cell has its own
        self.about = {**about, "plan": self.plan.sha256, "group": group}
        made_of = digest([self.about, len(dataset.test), versions(), code(), self.device])
        self._attacks = digest([preset.bootstrap, preset.fprs])
        self.folder = Folder(out / name / f"seed-{seed}", made_of)

    def models_of(self, cell: Cell) -> str:
        """Tells a cell's models from those of another that has its name. (The folder's own digest tells the rest.)"""
        made = {name: getattr(cell, name) for name in MAKES}
        return digest([made, tables.settings(self.setting)] if cell.how == "table" else made)

    def made_of(self, cell: Cell) -> str:
        """Tells what attacks found on them."""
        return self.models_of(cell) + self._attacks

    def trained(self, group: int) -> list[Fitted]:
        """Undefended models."""
        return self.models(group, "trained")

    def scores(self, criterion: str, lam: float | None, group: int) -> list[dict[str, Tensor]]:
        """Each model's scores, computed once."""
        options: dict[str, Any] = {} if lam is None else {"lam": lam}
        cwrf = CWRF(0.0, criterion=criterion, **options)
        ids, seeds = self.of(group)

        def make() -> dict[str, Tensor]:
            return _stacked(cwrf.score(self.task, ids, self.plan.reference, seeds, self.trained(group)))

        name = f"scores-{criterion}{'' if lam is None else f'-{lam}'}-{group:03d}"
        return _unstacked(self._kept(name, make, digest(describe(cwrf))))

    def of(self, group: int) -> tuple[list[Tensor], list[int]]:
        rows = self.groups[group]
        return [self.plan.train_ids(row) for row in rows], [self.plan.seeds[row] for row in rows]

    def models(self, group: int, which: str) -> list[Fitted]:
        weights = self._weights(group)
        initial = _unstacked(_under("initial/", weights))
        states = _unstacked(_under(f"{which}/", weights))
        found = []
        for row, before, state in zip(self.groups[group], initial, states, strict=True):
            model = self.task.initial_model(self.plan.seeds[row])
            model.load_state_dict(state)
            found.append(Fitted(model, before))
        return found

    @functools.lru_cache(maxsize=2)  # noqa: B019  # subjects live as long as their process
    def _weights(self, group: int) -> dict[str, Tensor]:
        """Initial weights, those after some epochs, at the lowest reference loss, and at the end; from one training."""

        def make() -> dict[str, Tensor]:
            kept: dict[str, list[dict[str, Tensor]]] = {}
            ids, seeds = self.of(group)
            best = Best(self.task, self.plan.reference, seeds)

            def on_epoch(done: int, weights: Any) -> None:
                state = weights()
                best.see(state)
                if done in self.setting.stops:
                    kept[str(done)] = state

            final = fit_from_scratch(self.task, ids, seeds, on_epoch=on_epoch)
            kept |= {BEST: best.states, "initial": [one.initial for one in final]}
            kept["trained"] = [dict(one.model.state_dict()) for one in final]
            return {
                f"{which}/{name}": value for which, states in kept.items() for name, value in _stacked(states).items()
            }

        return self._kept(f"weights-{group:03d}", make, digest(self.setting.stops))

    def _kept(self, name: str, make: Callable[[], Mapping[str, Tensor]], more: str = "") -> dict[str, Tensor]:
        return {key: value.to(self.device) for key, value in self.folder.tensors(name, make, more).items()}


def _stacked(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def _unstacked(stack: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    models = len(next(iter(stack.values())))
    return [{name: value[k] for name, value in stack.items()} for k in range(models)]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
