"""The jobs of a study: a group of models of a cell each, done once, by whichever process comes first."""

import functools
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from cwfast.mia import Signals
from cwfast.study import measuring
from cwfast.study.folder import log
from cwfast.study.grid import Cell, cells, unchanged
from cwfast.study.making import Impossible, fit
from cwfast.study.presets import PRESETS, Preset
from cwfast.study.subject import Subject
from cwfast.study.tables import table
from cwfast.training import Fitted


@dataclass(frozen=True)
class Job:
    """A group of models of one cell."""

    data: str
    seed: int
    cell: Cell
    group: int

    def __str__(self) -> str:
        return f"{self.data}/seed-{self.seed}/{self.cell.key}" + (f"/{self.group}" if self.group else "")


@dataclass(frozen=True)
class Study:
    """All that a worker must know; called with a job's number, it does that job. Can be pickled.

    Attributes:
        preset: its name.
        data: names of settings.
        seeds: of everything.
        lams: further values of CWRF's lambda.
        out: folder, absolute.
        path: where local data lie.
        threads: of each worker.
        models: instead of the preset's.
    """

    preset: str
    data: tuple[str, ...]
    seeds: tuple[int, ...]
    lams: tuple[float, ...]
    out: Path
    path: Path | None = None
    threads: int = 1
    models: int | None = None

    @property
    def settings(self) -> dict[str, int]:
        """What ``cwfast.shadow.engines`` asks of its work."""
        return {"threads": self.threads}

    @functools.cached_property
    def sizes(self) -> Preset:
        """The preset."""
        whole = PRESETS[self.preset]
        return whole if self.models is None else replace(whole, models=self.models)

    @functools.cached_property
    def jobs(self) -> list[Job]:
        """In the order in which they are done: all data sets of one seed before the next seed, tables last."""
        groups = range(-(-self.sizes.models // self.sizes.group))
        found = [
            Job(name, seed, cell, group)
            for seed in self.seeds
            for name in self.data
            if seed in self.seeds_of(name)
            for cell in self.cells(name, seed)
            if not cell.unchanged  # made with the cell whose models it has
            for group in (groups if cell.how != "table" else (0,))
        ]
        return sorted(found, key=lambda job: job.cell.how == "table")

    def seeds_of(self, name: str) -> tuple[int, ...]:
        """Those that a data set is run with."""
        return self.seeds[: self.sizes.settings[name].most_seeds]

    def cells(self, name: str, seed: int) -> list[Cell]:
        """Of a data set and seed: the tables are made for the first seed."""
        whole = cells(self.sizes.settings[name], self.lams)
        return [cell for cell in whole if cell.how != "table" or seed == self.seeds[0]]

    def __call__(self, index: int) -> str | None:
        """Do a job, unless it is done. Returns None, or the exception that it raised in one line."""
        torch.set_num_threads(self.threads)
        job = self.jobs[index]
        try:
            subject = self.subject(job.data, job.seed)
            start = time.monotonic()
            if _do(subject, job, self.sizes):
                log(self.out, job=str(job), event="done", seconds=round(time.monotonic() - start, 2))
            return None
        except Exception as error:
            log(self.out, job=str(job), event="failed", traceback=traceback.format_exc())
            return " ".join("".join(traceback.format_exception_only(error)).split())

    def is_done(self, job: Job) -> bool:
        """Whether its cell is: measured, not only trained."""
        subject = self.subject(job.data, job.seed)
        views = (one for one in (job.cell, unchanged(job.cell)) if one is not None)
        return all(subject.folder.document(one.key, subject.made_of(one)) is not None for one in views)

    def subject(self, name: str, seed: int) -> Subject:
        """The last few are kept: a worker does many jobs of each."""
        return _subject(self.preset, self.models, name, seed, self.out, self.path)


@functools.lru_cache(maxsize=3)
def _subject(preset: str, models: int | None, name: str, seed: int, out: Path, path: Path | None) -> Subject:
    sizes = Study(preset, (), (), (), out, models=models).sizes
    return Subject(name, sizes.settings[name], seed, sizes, out, path)


def _do(subject: Subject, job: Job, preset: Preset) -> bool:
    """Whether there was anything to do."""
    cell, folder = job.cell, subject.folder
    views = [one for one in (cell, unchanged(cell)) if one is not None]  # of the same models
    if all(folder.document(one.key, subject.made_of(one)) is not None for one in views):
        return False
    if cell.how == "table":
        folder.write(cell.key, {"cell": asdict(cell), "table": table(subject, cell.spec)}, subject.made_of(cell))
        return True
    with folder.lock(_part(subject, cell, job.group).name):
        if any(_load(subject, one, job.group) is None for one in views):
            try:
                fitted = fit(subject, cell, job.group)
            except Impossible as error:
                for one in views:
                    folder.write(one.key, {"cell": asdict(one), "impossible": str(error)}, subject.made_of(one))
                return True
            for one in views:
                _observe(subject, one, job.group, fitted)
    for one in views:
        _finish(subject, one, preset)
    return True


def _observe(subject: Subject, cell: Cell, group: int, fitted: Sequence[Fitted]) -> None:
    """Write what an attacker sees of a group's models."""
    if cell.unchanged:
        fitted = [Fitted(one.model, one.initial, one.masks) for one in fitted]
    values, told = measuring.observe(subject, group, fitted)
    made_of = subject.folder.made_of + subject.models_of(cell)
    manifest = {"made_of": made_of, "cell": asdict(cell), "told": told, **subject.about}
    data, rows = subject.task.dataset, list(subject.groups[group])
    signals = Signals(values, subject.plan.membership[rows], data.targets[data.pool], subject.plan.ids, manifest)
    signals.save(_part(subject, cell, group))


def _finish(subject: Subject, cell: Cell, preset: Preset) -> None:
    """Attack, once all groups are there."""
    folder, made_of = subject.folder, subject.made_of(cell)
    with folder.lock(f"{cell.key}.json"):
        if folder.document(cell.key, made_of) is not None:
            return
        parts = [_load(subject, cell, group) for group in range(len(subject.groups))]
        done = [part for part in parts if part is not None]
        if len(done) < len(parts):
            return
        values = {name: torch.cat([part[name] for part in done]) for name in ("loss", "phi")}
        signals = Signals(values, subject.plan.membership, done[0].labels, subject.plan.ids)
        told = [part.manifest["told"] for part in done]
        joined = {name: [value for one in told for value in one[name]] for name in told[0]}
        found = {"cell": asdict(cell), **joined, "attacks": measuring.attacked(signals, preset, subject.seed)}
        folder.write(cell.key, found, made_of)


def _part(subject: Subject, cell: Cell, group: int) -> Path:
    return subject.folder.root / f"signals-{cell.key}-{group:03d}.safetensors"


def _load(subject: Subject, cell: Cell, group: int) -> Signals | None:
    path = _part(subject, cell, group)
    if not path.exists():
        return None
    signals = Signals.load(path)
    return signals if signals.manifest.get("made_of") == subject.folder.made_of + subject.models_of(cell) else None
