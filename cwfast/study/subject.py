"""One data set and seed: what is trained and scored once, and the models of each cell made from that."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cwfast.defense.baselines import PlainTraining, interpolate_many
from cwfast.defense.cwrf import CWRF
from cwfast.defense.specs import parse
from cwfast.masks import MaskSet, rewind_
from cwfast.shadow import Plan, Training
from cwfast.shadow.describing import describe, digest
from cwfast.shadow.work import versions
from cwfast.study.folder import Folder
from cwfast.study.grid import Cell
from cwfast.study.halting import Best, halted
from cwfast.study.presets import Preset, Setting
from cwfast.training import Fitted, fit_from_scratch

BEST = "best"  # the epoch with the lowest loss on the reference set


class Impossible(Exception):
    """A cell that has no models, for a reason that belongs in the report."""


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
        made_of = digest([self.about, versions(), list(setting.stops)])
        self.folder = Folder(out / name / f"seed-{seed}", made_of)

    def made_of(self, cell: Cell) -> str:
        """What tells a cell's files from those of another that has its name."""
        parsed = cell.how in ("defense", "random", "private", "private random")
        defense: Any = describe(parse(cell.spec)) if parsed else cell.spec
        if cell.how == "halted":
            defense = describe(halted(cell.spec))
        return digest([cell.how, defense, cell.criterion, cell.rate, cell.strength])

    def fit(self, cell: Cell, group: int) -> list[Fitted]:
        """A cell's models, of one group.

        "trained": by cross-entropy, undefended. "stopped": those after ``strength`` epochs, or at the lowest loss on
        the reference set. "interpolated": ``w0 + strength (w - w0)``. "defense": by ``spec``. "random": the same with
        as many weights chosen at random in each tensor. "private", "private random": the same by DP-SGD. "halted":
        fine-tuned by the loss ``spec`` up to the lowest loss on the reference set, which may be before the first epoch.

        Raises:
            Impossible: a rate is larger than the share of weights that the criterion would rewind.
        """
        if cell.how == "trained":
            return self.trained(group)
        if cell.how == "stopped":
            return self._models(group, BEST if cell.strength is None else str(int(cell.strength)))
        if cell.how == "interpolated" and cell.strength is not None:
            trained = self.trained(group)
            models = interpolate_many(self.task, trained, *self._of(group), [cell.strength] * len(trained))
            return [Fitted(model, one.initial) for model, one in zip(models, trained, strict=True)]
        if cell.how == "halted":
            ids, seeds = self._of(group)
            return halted(cell.spec).fit_many(self.task, ids, self.plan.reference, seeds, trained=self.trained(group))
        if cell.how.startswith("private"):
            return self._private(cell, group)
        defense: Any = parse(cell.spec)
        more: dict[str, Any] = {}
        cwrf = defense if isinstance(defense, CWRF) else getattr(defense, "defense", None)
        if isinstance(cwrf, CWRF) and cell.criterion is not None:
            scores = None if cell.curve.startswith("ablation") else self.scores(cell.criterion, cell.lam, group)
            if scores is not None:
                masks = self._masks(cwrf, scores)
                more["masks"] = self._random_like(masks, group) if cell.how == "random" else masks
            more["trained"] = self.trained(group)
        ids, seeds = self._of(group)
        found: list[Fitted] = defense.fit_many(self.task, ids, self.plan.reference, seeds, **more)
        return found

    def _private(self, cell: Cell, group: int) -> list[Fitted]:
        """Rewound, then fine-tuned by DP-SGD around the rewound weights."""
        private: Any = parse(cell.spec)
        trained, criterion = self.trained(group), str(cell.criterion)
        masks = self._masks(CWRF(cell.rate, criterion=criterion), self.scores(criterion, cell.lam, group))
        masks = self._random_like(masks, group) if cell.how == "private random" else masks
        pairs = zip(trained, masks, strict=True)
        models = [rewind_(copy.deepcopy(one.model), mask, one.initial) for one, mask in pairs]
        found: list[Fitted] = private.fine_tune(self.task, models, trained, *self._of(group), masks=masks)
        return found

    def trained(self, group: int) -> list[Fitted]:
        """Undefended models."""
        return self._models(group, "trained")

    def scores(self, criterion: str, lam: float | None, group: int) -> list[dict[str, Tensor]]:
        """Each model's scores, computed once."""
        options: dict[str, Any] = {} if lam is None else {"lam": lam}
        cwrf = CWRF(0.0, criterion=criterion, **options)
        ids, seeds = self._of(group)

        def make() -> dict[str, Tensor]:
            return _stacked(cwrf.score(self.task, ids, self.plan.reference, seeds, self.trained(group)))

        name = f"scores-{criterion}{'' if lam is None else f'-{lam}'}-{group:03d}"
        return _unstacked(self._kept(name, make, digest(describe(cwrf))))

    def _random_like(self, masks: Sequence[MaskSet], group: int) -> list[MaskSet]:
        """As many weights in each tensor, chosen at random."""
        return [one.random_like(seed) for one, seed in zip(masks, self._of(group)[1], strict=True)]

    def _masks(self, cwrf: CWRF, scores: Sequence[Mapping[str, Tensor]]) -> list[MaskSet]:
        try:
            return cwrf.masks(scores)
        except ValueError as error:
            if "rate must be at most" not in str(error):
                raise
            raise Impossible(str(error)) from error

    def _of(self, group: int) -> tuple[list[Tensor], list[int]]:
        rows = self.groups[group]
        return [self.plan.train_ids(row) for row in rows], [self.plan.seeds[row] for row in rows]

    def _models(self, group: int, which: str) -> list[Fitted]:
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
            ids, seeds = self._of(group)
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

        return self._kept(f"weights-{group:03d}", make)

    def _kept(self, name: str, make: Callable[[], Mapping[str, Tensor]], more: str = "") -> dict[str, Tensor]:
        return {key: value.to(self.device) for key, value in self.folder.tensors(name, make, more).items()}


def _stacked(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def _unstacked(stack: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    models = len(next(iter(stack.values())))
    return [{name: value[k] for name, value in stack.items()} for k in range(models)]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
