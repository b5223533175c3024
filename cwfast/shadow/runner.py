"""Jobs that survive: each writes one file, whole or not at all, and a run begins where the last one ended."""

import json
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cwfast.checkpoint.files import atomic_write, exclusive
from cwfast.errors import CheckpointError
from cwfast.mia import Signals
from cwfast.shadow.engines import ENGINES
from cwfast.shadow.plan import Plan
from cwfast.shadow.work import Work, difference, manifest_of, read_settings, resolve, versions

FORMAT = "cwfast-shadow/1"


def run(
    plan: Plan,
    job: Callable[..., Any] | str,
    out: str | os.PathLike[str],
    *,
    engine: str = "local",
    workers: int | None = None,
    threads: int = 1,
    gpus: float = 0,
    group: int = 1,
    retries: int = 2,
    progress: bool = True,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Have the plan's models trained, ``group`` of them a job; what is done already in ``out`` stays as it is.

    A job's result is one file; killing a worker or the driver at any time loses the jobs that were running and no
    other. The results depend on the plan, the job, ``group``, ``threads`` and the machine's arithmetic, not on engine,
    ``workers``, order or interruptions; only ``log.jsonl`` (when, where, how long, tracebacks) does.

    Args:
        plan: who trains on what.
        job: called as ``job(plan, models)`` with a list of rows of the plan; returns signals by name
            (``cwfast.mia.signals.NAMES``, each [models, N, Q]) and, under "labels", int64 [N] if it likes; or a pair of
            that and a dict of tensors to keep beside them (weights, say), in ``state-*.safetensors``. A top-level
            function, an object that can be pickled, or "module:function". Its attribute ``manifest``, if it has one,
            is JSON-able and tells it from others; a function that has none is told by its code (not that of what it
            calls). A run is not resumed after a change of that, of cwfast, torch or Python. The global generators
            are seeded before each call.
        out: folder, made if it does not exist; every machine of the engine must see it under this path.
        engine: "local" (processes; a script needs ``if __name__ == "__main__":``), "ray" or "slurm".
        workers: jobs at a time. None: local, as many as cores or GPUs allow; ray and slurm, no limit of ours.
        threads: per job; set in the environment before torch is imported.
        gpus: per job; a share of one with local and ray. Not yet run on a GPU.
        group: models per job, for jobs that train several at once.
        retries: how often a job is begun again whose worker died. A job that raised is not: it would raise again.
        progress: a bar on stderr where that is a terminal.
        options: of the engine, see ``cwfast.shadow.engines``.

    Raises:
        TypeError, ValueError: an argument does not hold what is written above.
        ImportError: the job or the engine's library is not there.
        CheckpointError: the folder is another run's, or one of its files is broken.
        RuntimeError: another run uses the folder; or jobs failed, when all others are done: the message says which.

    Note:
        cwfast reads no pickle from files, but processes, Ray and submitit pickle jobs and outcomes between themselves;
        submitit keeps them in ``out/submitit``. Name a job as "module:function" to keep large data out of that.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1; got {workers}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1; got {threads}")
    if group < 1:
        raise ValueError(f"group must be at least 1; got {group}")
    if retries < 0:
        raise ValueError(f"retries must be at least 0; got {retries}")
    called = resolve(job)
    try:
        pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(f"a job must be one that can be pickled, or named 'module:function'; {error}") from error
    kind = called if hasattr(called, "__qualname__") else type(called)
    settings = {
        "format": FORMAT,
        "plan": plan.sha256,
        "job": job if isinstance(job, str) else f"{kind.__module__}:{kind.__qualname__}",
        "group": group,
        "threads": threads,
        "versions": versions(),
        "manifest": manifest_of(called),
    }
    work = Work(plan, job, Path(out).resolve(), settings)
    work.out.mkdir(parents=True, exist_ok=True)
    with exclusive(work.out):
        _claim(work)
        left = [index for index in range(work.jobs) if work.load(index) is None]
        failed = {}
        hidden = None if progress else True
        bar = tqdm(total=plan.models, desc="shadow models", unit="model", file=sys.stderr, disable=hidden)
        outcomes = ENGINES[engine](work, left, workers, gpus, retries, dict(options or {}))
        with bar, closing(outcomes), redirect_stdout(sys.stderr):  # Ray prints to what is the caller's
            bar.update(plan.models - sum(len(work.rows(index)) for index in left))
            for index, wrong in outcomes if left else ():
                if wrong is None:
                    bar.update(len(work.rows(index)))
                else:
                    failed[index] = wrong
    if failed:
        index = min(failed)
        raise RuntimeError(
            f"job {index} (models {', '.join(map(str, work.rows(index)))}) failed: {failed[index]}; {len(failed)} of "
            f"{work.jobs} jobs failed, the results of the others are kept; tracebacks are in {work.out / 'log.jsonl'}"
        )


def collect(plan: Plan, out: str | os.PathLike[str]) -> Signals:
    """The signals of all models, with a manifest that says what they are of: plan, seeds, job, and the job's own.

    Raises:
        CheckpointError: the folder is of another plan, a file is broken, or jobs are not done.
    """
    out = Path(out).resolve()
    settings = read_settings(out)
    if settings is None or settings.get("format") != FORMAT or settings.get("plan") != plan.sha256:
        raise CheckpointError(
            f"{out} must hold a run of this plan; it holds {'none' if settings is None else 'another'}"
        )
    for name, kind in (("job", str), ("group", int), ("threads", int), ("manifest", dict)):
        if not isinstance(settings.get(name), kind) or (kind is int and settings[name] < 1):
            raise CheckpointError(f"{out / 'run.json'} must say {name} as it was written; got {settings.get(name)!r}")
    work = Work(plan, settings["job"], out, settings)
    parts = [work.load(index) for index in range(work.jobs)]
    done = [part for part in parts if part is not None]
    if len(done) < len(parts):
        raise CheckpointError(
            f"all {len(parts)} jobs of {out} must be done; {len(parts) - len(done)} are not: run again"
        )
    first = done[0]
    for index, part in enumerate(done):
        same = part.values.keys() == first.values.keys() and (part.labels is None) == (first.labels is None)
        if not same or (part.labels is not None and not torch.equal(part.labels, first.labels)):  # type: ignore[arg-type]
            raise CheckpointError(f"job {index} of {out} must have the signals and labels of job 0; it has others")
    manifest = {**settings["manifest"], "seeds": list(plan.seeds)} | {
        name: settings[name] for name in ("plan", "job", "group", "threads")
    }
    values = {name: torch.cat([part[name] for part in done]) for name in first.values}
    return Signals(values, plan.membership, first.labels, plan.ids, manifest)


def _claim(work: Work) -> None:
    """Make the folder this run's, or see that it is."""
    there = read_settings(work.out)
    if there is None:
        work.plan.save(work.out / "plan.json")
        with atomic_write(work.out / "run.json") as temporary:
            temporary.write_text(json.dumps(work.settings, indent=1, sort_keys=True) + "\n")
        return
    differs = difference(work.settings, there)
    if differs:
        name, wanted, found = differs
        raise CheckpointError(
            f"{work.out} must be this run's; its {name} is {found}, this run's is {wanted}: use another folder"
        )
