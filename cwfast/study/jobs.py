"""The jobs of a study: a group of models of a cell each, done once, by whichever process comes first."""

import functools
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from cwfast.mia import Signals
from cwfast.study import measuring
from cwfast.study.folder import log
from cwfast.study.grid import Cell, cells
from cwfast.study.presets import PRESETS, Preset
from cwfast.study.subject import Impossible, Subject
from cwfast.study.tables import table


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
        return subject.folder.document(job.cell.key, subject.made_of(job.cell)) is not None

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
    made_of = subject.made_of(cell)
    if folder.document(cell.key, made_of) is not None:
        return False
    if cell.how == "table":
        folder.write(cell.key, {"cell": asdict(cell), "table": table(subject, cell.spec)}, made_of)
        return True
    part = folder.root / f"signals-{cell.key}-{job.group:03d}.safetensors"
    with folder.lock(part.name):
        if _load(part, folder.made_of + made_of) is None:
            try:
                fitted = subject.fit(cell, job.group)
            except Impossible as error:
                folder.write(cell.key, {"cell": asdict(cell), "impossible": str(error)}, made_of)
                return True
            values, told = measuring.observe(subject, job.group, fitted)
            manifest = {"made_of": folder.made_of + made_of, "cell": asdict(cell), "told": told, **subject.about}
            rows = list(subject.groups[job.group])
            data = subject.task.dataset
            labels, ids = data.targets[data.pool], subject.plan.ids
            Signals(values, subject.plan.membership[rows], labels, ids, manifest).save(part)
    _finish(subject, cell, preset, made_of)
    return True


def _finish(subject: Subject, cell: Cell, preset: Preset, made_of: str) -> None:
    """Attack, once all groups are there."""
    folder = subject.folder
    with folder.lock(f"{cell.key}.json"):
        if folder.document(cell.key, made_of) is not None:
            return
        names = [f"signals-{cell.key}-{group:03d}.safetensors" for group in range(len(subject.groups))]
        parts = [_load(folder.root / name, folder.made_of + made_of) for name in names]
        done = [part for part in parts if part is not None]
        if len(done) < len(parts):
            return
        values = {name: torch.cat([part[name] for part in done]) for name in ("loss", "phi")}
        signals = Signals(values, subject.plan.membership, done[0].labels, subject.plan.ids)
        told = [part.manifest["told"] for part in done]
        joined = {name: [value for one in told for value in one[name]] for name in told[0]}
        found = {"cell": asdict(cell), **joined, "attacks": measuring.attacked(signals, preset, subject.seed)}
        folder.write(cell.key, found, made_of)


def _load(path: Path, made_of: str) -> Signals | None:
    if not path.exists():
        return None
    signals = Signals.load(path)
    return signals if signals.manifest.get("made_of") == made_of else None
