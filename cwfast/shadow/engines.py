"""Who runs the jobs: processes of this machine, Ray, or Slurm. Each engine yields (job, None or what went wrong)."""

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any

from cwfast.shadow.work import THREADS, Work

PR_SET_PDEATHSIG = 1
Outcomes = Generator[tuple[int, str | None], None, None]


def local(
    work: Work, left: Sequence[int], workers: int | None, gpus: float, retries: int, options: dict[str, Any]
) -> Outcomes:
    """Spawned processes. A pool of ``concurrent.futures`` is of no use: it breaks whole if one of its workers dies."""
    if options:
        raise ValueError(f"engine 'local' takes no options; got {sorted(options)}")
    context = multiprocessing.get_context("spawn")
    pending = deque((index, 1) for index in left)
    idle: list[Any] = [(slot, None, None) for slot in device_slots(workers, gpus, work.settings["threads"])]
    busy: dict[Any, Any] = {}
    started = []
    try:
        while pending or busy:
            while pending and idle:
                slot, process, connection = idle.pop()
                if process is None:
                    connection, theirs = context.Pipe()
                    process = context.Process(target=_serve, args=(theirs, work, os.getpid()))
                    with _environment({**_pinned(work, gpus), "CUDA_VISIBLE_DEVICES": slot}):
                        process.start()
                    theirs.close()  # so that reading from ours ends when the worker does
                    started.append(process)
                index, attempt = pending.popleft()
                with contextlib.suppress(OSError):  # if it is dead, it does not answer below
                    connection.send(index)
                busy[connection] = slot, process, index, attempt
            ready: list[Any] = wait(list(busy))
            for connection in ready:
                slot, process, index, attempt = busy.pop(connection)
                try:
                    outcome = connection.recv()
                except (EOFError, OSError):
                    process.join(10)  # it is dead, or at its exit handlers
                    process.kill()
                    process.join()
                    idle.append((slot, None, None))
                    if attempt <= retries:
                        pending.appendleft((index, attempt + 1))
                    else:
                        yield index, f"its worker ended with exit code {process.exitcode}, {attempt} times"
                else:
                    idle.append((slot, process, connection))
                    yield index, outcome
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.join()
            process.close()


def _serve(connection: Any, work: Work, driver: int) -> None:
    """A worker: does what jobs it is told, until the driver closes the connection or dies."""
    if sys.platform == "linux":  # elsewhere a worker whose driver is dead finishes its job first
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != driver:
            return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which ends its workers
    os.dup2(2, 1)  # stdout is the driver's too
    with contextlib.suppress(EOFError):
        while True:
            connection.send(work(connection.recv()))


def device_slots(workers: int | None, gpus: float, threads: int) -> list[str]:
    """For each worker its CUDA_VISIBLE_DEVICES. Not yet run on a GPU.

    Raises:
        ValueError: there are not enough devices, or ``gpus`` is neither whole nor a share of one.
    """
    if gpus == 0:
        return [""] * (workers or max(1, _cores() // threads))
    if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise ValueError(f"gpus must be 0, a share of one, or whole; got {gpus}")
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        import torch

        named = ",".join(str(k) for k in range(torch.cuda.device_count()))
    visible = [one for one in named.split(",") if one]
    if gpus < 1:
        slots = [one for one in visible for _ in range(int(1 / gpus))]
    else:
        each = int(gpus)
        slots = [",".join(visible[k : k + each]) for k in range(0, len(visible) - each + 1, each)]
    workers = workers or len(slots)
    if not 0 < workers <= len(slots):
        raise ValueError(f"{workers or 1} workers of {gpus} GPUs each must fit on the {len(visible)} GPUs there are")
    return slots[:workers]


def ray(
    work: Work, left: Sequence[int], workers: int | None, gpus: float, retries: int, options: dict[str, Any]
) -> Outcomes:
    """Ray Core: many machines that share the folder. ``options`` are those of ``ray.init``, such as ``address``."""
    ray = _imported("ray", "ray")
    mine = not ray.is_initialized()
    if mine:
        here = {} if "address" in options or "RAY_ADDRESS" in os.environ else {"num_cpus": _cores()}
        ray.init(**{"include_dashboard": False, "log_to_driver": False, **here, **options})
    do = ray.remote(
        num_cpus=work.settings["threads"],
        num_gpus=gpus,
        max_retries=retries,
        runtime_env={"env_vars": _pinned(work, gpus)},
    )(_do)
    pending = deque(left)
    running: dict[Any, int] = {}
    try:
        shared = ray.put(work)
        while pending or running:
            while pending and len(running) < (workers or len(left)):
                index = pending.popleft()
                running[do.remote(shared, index)] = index
            for reference in ray.wait(list(running))[0]:
                index = running.pop(reference)
                try:
                    outcome = ray.get(reference)
                except ray.exceptions.RayError as error:
                    outcome = _one_line(error)
                yield index, outcome
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if mine:
            ray.shutdown()


def _do(work: Work, index: int) -> str | None:
    return work(index)


def slurm(
    work: Work, left: Sequence[int], workers: int | None, gpus: float, retries: int, options: dict[str, Any]
) -> Outcomes:
    """Slurm through submitit: an array of jobs, ``workers`` of them at a time, on machines that share the folder.

    ``options`` are those of ``submitit.AutoExecutor.update_parameters``, such as ``timeout_min`` and
    ``slurm_partition``, and ``cluster``: "slurm", or "local" to try it out. Jobs outlive a driver that is killed; the
    next one's wait for them.
    """
    if gpus != int(gpus):
        raise ValueError(f"gpus must be whole with engine 'slurm'; got {gpus}")
    submitit = _imported("submitit", "slurm")
    options = {"cluster": "slurm", **options}
    executor = submitit.AutoExecutor(work.out / "submitit", cluster=options.pop("cluster"))
    exports = [f"export {name}={value}" for name, value in _pinned(work, gpus).items()]
    for name in ("slurm_setup", "local_setup"):
        options[name] = [*options.get(name, ()), *exports]
    executor.update_parameters(
        cpus_per_task=work.settings["threads"],
        gpus_per_node=int(gpus) or None,
        slurm_array_parallelism=workers or len(left),
        **options,
    )
    lost: dict[int, str] = dict.fromkeys(left, "")
    for attempt in range(retries + 1):
        submitted = dict(zip(lost, executor.map_array(work, list(lost)), strict=True))
        try:
            while submitted:
                for index, job in [(index, job) for index, job in submitted.items() if job.done()]:
                    del submitted[index]
                    try:
                        outcome = job.result()
                    except submitit.core.utils.UncompletedJobError as error:  # killed, or out of time
                        lost[index] = f"{_one_line(error)}, {attempt + 1} times"
                        continue
                    except submitit.core.utils.FailedJobError as error:
                        outcome = _one_line(error)
                    del lost[index]
                    yield index, outcome
                time.sleep(0.2)
        finally:
            for job in submitted.values():
                job.cancel()
        if not lost:
            return
    yield from lost.items()


ENGINES: dict[str, Callable[..., Outcomes]] = {"local": local, "ray": ray, "slurm": slurm}


def _pinned(work: Work, gpus: float) -> dict[str, str]:
    """What a worker's environment must say. With GPUs, the engine says which."""
    return {**dict.fromkeys(THREADS, str(work.settings["threads"])), **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})}


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _imported(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"engine {extra!r} needs {module}: pip install 'cwfast[{extra}]'") from error


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """This process's environment, which a spawned one inherits before it imports anything."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
