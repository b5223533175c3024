"""Runs a study: every cell that is not done, on any engine of ``cwfast.shadow``; then the report."""

import functools
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cwfast.mia import Signals
from cwfast.shadow.engines import ENGINES
from cwfast.study import measuring
from cwfast.study.folder import log
from cwfast.study.grid import Cell, cells
from cwfast.study.presets import DEFAULT_DATA, PRESETS, Preset
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


def run(
    out: Path,
    *,
    preset: str = "small",
    data: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    lams: Sequence[float] = (),
    path: Path | None = None,
    workers: int | None = None,
    threads: int = 1,
    engine: str = "local",
    models: int | None = None,
    report_only: bool = False,
    command: str = "cwfast study",
) -> dict[str, Any]:
    """Do all cells that are not done in ``out``, then write the report of all that are.

    Args:
        out: folder; a run that was interrupted goes on there, other data sets and seeds can be added to it.
        preset: of ``presets.PRESETS``.
        data: names of the preset's settings; None: its usual ones.
        seeds: None: the preset's.
        lams: further values of CWRF's lambda, for taylor and taylor_delta.
        path: folder of data that are not in packages.
        workers: jobs at a time; None: as many as cores allow.
        threads: of each.
        engine: "local" or "ray", see ``cwfast.shadow.run``.
        models: of each fleet, instead of the preset's; even.
        report_only: train nothing.
        command: as typed, for the report.

    Returns:
        The report that was written.

    Raises:
        ValueError: an unknown preset, data set or engine.
        RuntimeError: jobs failed; the others' results and the report are there.
    """
    from cwfast.report import prepare, studies
    from cwfast.study.reporting import report

    study = replace(_checked(out, preset, data, seeds, lams, path, threads, engine), models=models)
    if study.sizes.models < 6 or study.sizes.models % 2:
        raise ValueError(f"models must be an even number, at least 6; got {study.sizes.models}")
    prepare(study.out)
    failed = {} if report_only else dict(_done(study, engine, workers))
    document = report(study, command)
    studies.write(document, study.out)
    if failed:
        index = min(failed)
        raise RuntimeError(
            f"{len(failed)} of {len(study.jobs)} jobs failed, the first of them {study.jobs[index]}: {failed[index]}; "
            f"the results of the others are kept; tracebacks are in {study.out / 'log.jsonl'}"
        )
    return document


def _checked(
    out: Path,
    preset: str,
    data: Sequence[str] | None,
    seeds: Sequence[int] | None,
    lams: Sequence[float],
    path: Path | None,
    threads: int,
    engine: str,
) -> Study:
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    if engine not in ("local", "ray"):
        raise ValueError(f"engine must be local or ray; got {engine!r}")
    names = DEFAULT_DATA[preset] if data is None else tuple(data)
    for name in names:
        if name not in PRESETS[preset].settings:
            raise ValueError(f"data must be among {', '.join(PRESETS[preset].settings)}; got {name!r}")
    chosen = PRESETS[preset].seeds if seeds is None else tuple(seeds)
    wrong = [lam for lam in lams if not 0 <= lam <= 1]
    if wrong:
        raise ValueError(f"lam must lie between 0 and 1; got {wrong[0]}")
    return Study(preset, names, chosen, tuple(lams), Path(out).resolve(), path, threads)


def _done(study: Study, engine: str, workers: int | None) -> Iterator[tuple[int, str]]:
    """Does all jobs; the failed ones with what went wrong."""
    for name in study.data:
        for seed in study.seeds_of(name):
            study.subject(name, seed).folder.clear()  # and data that are missing are told now
    left = [index for index, job in enumerate(study.jobs) if not _is_done(study, job)]
    total = len(study.jobs)
    print(
        f"cwfast study: {total} fleets of {min(study.sizes.group, study.sizes.models)} models, "
        f"{total - len(left)} of them done before", file=sys.stderr,
    )  # fmt: skip
    if not left:
        return
    bar = tqdm(total=total, initial=total - len(left), desc="cwfast study", unit="fleet", file=sys.stderr, disable=None)
    gpus = int(study.sizes.gpu and torch.cuda.is_available())
    outcomes = ENGINES[engine](study, left, workers, gpus, 2, {})  # type: ignore[arg-type]
    with bar, closing(outcomes), redirect_stdout(sys.stderr):
        last = time.monotonic()
        for index, wrong in outcomes:
            now = time.monotonic()
            bar.update()
            bar.write(
                f"{study.jobs[index]}: {wrong or 'done'}, {now - last:.1f} s after the one before", file=sys.stderr
            )
            last = now
            if wrong is not None:
                yield index, wrong


def _is_done(study: Study, job: Job) -> bool:
    subject = study.subject(job.data, job.seed)
    return subject.folder.document(job.cell.key, subject.made_of(job.cell)) is not None
