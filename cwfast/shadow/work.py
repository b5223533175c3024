"""What a worker does, on any engine: one job after another, each with one file as its result."""

import fcntl
import hashlib
import importlib
import json
import os
import platform
import random
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch

from cwfast.checkpoint.files import atomic_write, sha256
from cwfast.errors import CheckpointError
from cwfast.mia import Signals
from cwfast.shadow.describing import describe
from cwfast.shadow.plan import Plan

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # read when libraries load


def resolve(job: Callable[..., Any] | str) -> Callable[..., Any]:
    """A callable, or the one that ``"module:function"`` names.

    Raises:
        ValueError, TypeError: it is neither.
        ImportError, AttributeError: there is none of that name.
    """
    if isinstance(job, str):
        module, colon, name = job.partition(":")
        if not (module and colon and name):
            raise ValueError(f"a job must be a callable or named 'module:function'; got {job!r}")
        job = getattr(importlib.import_module(module), name)
    if not callable(job):
        raise TypeError(f"a job must be a callable or named 'module:function'; got {type(job).__name__}")
    return job


@dataclass(frozen=True)
class Work:
    """All that a worker must know. Called with a job's number, it does that job.

    Attributes:
        plan: who trains on what.
        job: see ``cwfast.shadow.run``.
        out: an absolute path.
        settings: the content of ``run.json``: all that the bits of the results depend on, but for the machine.
    """

    plan: Plan
    job: Callable[..., Any] | str
    out: Path
    settings: dict[str, Any]

    @property
    def jobs(self) -> int:
        """How many there are."""
        return -(-self.plan.models // self.settings["group"])

    def rows(self, index: int) -> list[int]:
        """The models of a job."""
        group = self.settings["group"]
        return list(range(index * group, min((index + 1) * group, self.plan.models)))

    def __call__(self, index: int) -> str | None:
        """Do a job, unless it is done. Returns None, or the exception that it raised, with its notes, in one line."""
        torch.set_num_threads(self.settings["threads"])
        try:
            with self._claimed(index):
                if self._path(index).exists():
                    return None
                for left in self.out.glob(f".*-{index:05d}.*.tmp"):  # of a worker that was killed while it wrote
                    left.unlink()
                start = time.monotonic()
                self._log(index, "started")
                self._do(index)
                self._log(index, "done", seconds=round(time.monotonic() - start, 3))
                return None
        except (Exception, SystemExit) as error:  # a job that calls sys.exit would do so again
            with suppress(OSError):  # the log may be what failed
                self._log(index, "failed", traceback=traceback.format_exc())
            return " ".join("".join(traceback.format_exception_only(error)).split())

    def load(self, index: int) -> Signals | None:
        """A job's result, None if it is not done.

        Raises:
            CheckpointError: a file is broken, or belongs to another run.
        """
        path, state = self._path(index), self._path(index, "state")
        if not path.exists():
            return None
        part = Signals.load(path)
        if part.manifest.get("run") != self._hash or part.manifest.get("models") != self.rows(index):
            raise CheckpointError(f"{path} must be of this run; it is of another: remove it, or use another folder")
        wanted = part.manifest.get("state")
        if wanted is not None and not (state.exists() and sha256(state) == wanted):
            raise CheckpointError(f"{state} must hold what it was written with; its SHA-256 differs, or it is gone")
        return part

    @property
    def _hash(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def _path(self, index: int, kind: str = "signals") -> Path:
        return self.out / f"{kind}-{index:05d}.safetensors"

    @contextmanager
    def _claimed(self, index: int) -> Iterator[None]:
        """Wait until no other process is at this job: one may have outlived its driver, as jobs of Slurm do."""
        with open(self.out / "jobs.lock", "ab") as file:
            fcntl.lockf(file, fcntl.LOCK_EX, 1, index)  # one byte per job; the kernel frees it when the process dies
            yield

    def _do(self, index: int) -> None:
        job, rows = resolve(self.job), self.rows(index)
        check_manifest(self.settings["manifest"], manifest_of(job))
        check_manifest({"versions": self.settings["versions"]}, {"versions": versions()})
        seed = self.plan.seeds[rows[0]]  # for jobs that draw from the global generators
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        found = job(self.plan, rows)
        values, state = found if isinstance(found, tuple) else (found, None)
        tensors = {name: value.detach().cpu() for name, value in values.items()}
        manifest: dict[str, Any] = {"run": self._hash, "models": rows}
        if state is not None:
            from safetensors.torch import save_file

            path = self._path(index, "state")
            with atomic_write(path) as temporary:
                save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, temporary)
            manifest["state"] = sha256(path)
        labels = tensors.pop("labels", None)
        part = Signals(tensors, self.plan.membership[rows], labels, self.plan.ids, manifest)
        if read_settings(self.out) != self.settings:
            raise CheckpointError(f"{self.out} must still be of the run that began this job; it is of another")
        part.save(self._path(index))

    def _log(self, index: int, event: str, **more: object) -> None:
        """One line of ``log.jsonl``: all that differs between two runs of the same plan."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        who = {"job": index, "models": self.rows(index), "host": socket.gethostname(), "pid": os.getpid()}
        line = json.dumps({"time": now, "event": event, **who, **more}) + "\n"
        handle = os.open(self.out / "log.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)


def read_settings(out: Path) -> dict[str, Any] | None:
    """The content of ``run.json``, None where there is none.

    Raises:
        CheckpointError: it is broken.
    """
    path = out / "run.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must hold JSON; {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold the settings of a run; got {_cut(found)}")
    return found


def manifest_of(job: Callable[..., Any]) -> dict[str, Any]:
    """What a job says of itself; of a function that says nothing, its code."""
    nothing = {"code": describe(job)} if isinstance(job, FunctionType) else {}
    return json.loads(json.dumps(getattr(job, "manifest", nothing)))


def versions() -> dict[str, str]:
    """Of what the results depend on, beside the job."""
    return {"cwfast": version("cwfast"), "torch": torch.__version__, "python": platform.python_version()}


def difference(first: dict[str, Any], second: dict[str, Any]) -> tuple[str, str, str] | None:
    """The first entry that differs, as ``a.b.c``, and both of its values, cut where they are long."""
    for name in [*first, *(name for name in second if name not in first)]:
        one, other = first.get(name), second.get(name)
        if one == other:
            continue
        deeper = difference(one, other) if isinstance(one, dict) and isinstance(other, dict) else None
        return (f"{name}.{deeper[0]}", *deeper[1:]) if deeper else (name, _cut(one), _cut(other))
    return None


def check_manifest(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """A job is what it was where the run began: the same data come out of its loader in each process.

    Raises:
        ValueError: it is not; the message names the first entry that differs.
    """
    differs = difference(expected, found)
    if differs:
        name, was, now = differs
        raise ValueError(
            f"a job must describe itself in each process as where the run began; its {name} was {was} and is {now}"
        )


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
