"""Runs a study: every cell that is not done, on any engine of ``cwfast.shadow``; then the report."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cwfast.shadow.engines import ENGINES
from cwfast.study.jobs import Study
from cwfast.study.presets import DEFAULT_DATA, PRESETS


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
    left = [index for index, job in enumerate(study.jobs) if not study.is_done(job)]
    total = len(study.jobs)
    print(
        f"cwfast study: {total} fleets of {min(study.sizes.group, study.sizes.models)} models, "
        f"{total - len(left)} of them done before", file=sys.stderr,
    )  # fmt: skip
    if not left:
        return
    bar = tqdm(total=total, initial=total - len(left), desc="cwfast study", unit="fleet", file=sys.stderr, disable=None)
    gpus = int(study.sizes.gpu and torch.cuda.is_available())
    outcomes = ENGINES[engine](study, left, workers, gpus, 2, {})
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
