"""How everything here is measured: interleaved rounds, ratios within a round, peak memory in a fresh process.

Other work disturbs wall times on shared machines, so no absolute time is trusted: variants take turns, a ratio is the
median over rounds of two times that lie next to each other, and limits (a read, a matrix product) take turns too.
"""

import gc
import importlib
import inspect
import json
import math
import os
import platform
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

import cwfast
from cwfast import _backends

T = TypeVar("T")
SIZES = ("tiny", "full")
SUMMARY: list[str] = []  # a readable line per case, printed when pytest ends
SKIPPED: dict[str, str] = {}  # peers that are not installed, and why they could not be imported
_STATUS = Path("/proc/self/status")


def size() -> str:
    """``CWFAST_BENCH_SIZE``: "tiny" (the default: does it run?) or "full" (figures)."""
    value = os.environ.get("CWFAST_BENCH_SIZE", "tiny")
    if value not in SIZES:
        raise ValueError(f"CWFAST_BENCH_SIZE must be one of {SIZES}; got {value!r}")
    return value


def by_size(*, tiny: T, full: T) -> T:
    """The value for this run's size."""
    return full if size() == "full" else tiny


def peer(module: str) -> ModuleType | None:
    """A library to compare with, or None where it is not installed, which every result of the run then says."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        SKIPPED[module] = str(error)
        return None


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    setup: Callable[[str], None] | None = None,
    seconds: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each call, round by round: every variant once in each round, each round starting with the next one.

    One call of each comes before and does not count. Garbage collection is off; results are freed outside the clock.

    Args:
        variants: what to time, by name.
        repeats: rounds.
        setup: called with the variant's name before each call, outside the clock.
        seconds: a slow variant leaves after three rounds if it has taken longer than this in all.
    """
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(-1, repeats):
            start = max(turn, 0) % len(names) if names else 0
            for name in names[start:] + names[:start]:
                if len(times[name]) >= 3 and sum(times[name]) > seconds:
                    continue
                if setup is not None:
                    setup(name)
                begin = time.perf_counter()
                result = variants[name]()
                elapsed = time.perf_counter() - begin
                del result
                if turn >= 0:
                    times[name].append(elapsed)
    finally:
        if was_enabled:
            gc.enable()
    return times


def ratio(times: Mapping[str, list[float]], name: str, over: str) -> float:
    """Median over rounds of ``time(name) / time(over)``, both of the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[over], strict=False))


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median seconds of each variant."""
    return {name: statistics.median(values) for name, values in times.items()}


def read(*tensors: Tensor) -> Callable[[], object]:
    """One multi-threaded read of all bytes of dense tensors: the limit of whatever must look at each entry."""
    views = [tensor.detach().reshape(-1) for tensor in tensors]
    views = [view[: view.numel() // 2 * 2].view(torch.float32) if view.element_size() == 2 else view for view in views]
    return lambda: [view.sum() for view in views]


@cache
def read_bandwidth() -> float:
    """Bytes per second of a multi-threaded read of a float32 buffer (400 MB; tiny: 4 MB)."""
    buffer = torch.ones(by_size(tiny=10**6, full=10**8))
    return buffer.nbytes / medians(interleaved({"read": read(buffer)}, 7))["read"]


def gemm_flops(m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations per second of a matrix product ``[m, k] @ [k, n]``."""
    a, b, out = (torch.ones(shape, dtype=dtype) for shape in ((m, k), (k, n), (m, n)))
    return 2 * m * n * k / medians(interleaved({"mm": lambda: torch.mm(a, b, out=out)}, 7))["mm"]


def peak_memory(function: Callable[..., Iterator[None]], *args: Any) -> int | None:
    """Extra peak resident bytes of a generator function's second half, in a fresh process; None where not on Linux.

    What the generator does before its ``yield`` (inputs, a small warm-up call that loads the code) is the baseline,
    what it does afterwards is measured.

    Args:
        function: at the top level of a file that can be run; its locals live until it ends.
        args: JSON values.

    Raises:
        RuntimeError: the process failed; the message ends with what it printed.
    """
    if not _STATUS.exists():
        return None
    command = [sys.executable, "-P", "-m", __name__, inspect.getfile(function), function.__name__, json.dumps(args)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if child.returncode != 0:
        raise RuntimeError(f"{function.__name__}{args} must run in a fresh process; it printed {child.stderr[-2000:]}")
    return int(child.stdout.split()[-1])


def _peak_of(path: str, name: str, args: str) -> int:
    steps = runpy.run_path(path)[name](*json.loads(args))
    next(steps)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status_bytes("VmRSS")
    next(steps, None)
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


@cache
def _machine() -> dict[str, Any]:
    native = _backends.extension()
    return {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "isa": None if isinstance(native, str) else native.isa(),
        "cwfast": cwfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def environment() -> dict[str, Any]:
    """Processor, threads, instruction set, versions, commit (None outside a git checkout), date and load average."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {**_machine(), "date": date, "load_average": load}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed: whatever repository site-packages may lie in is not ours
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def record(result: Mapping[str, Any]) -> None:
    """Append the result and the environment as one JSON line to the file ``CWFAST_BENCH_OUT``, if that is set."""
    path = os.environ.get("CWFAST_BENCH_OUT")
    if path:
        line = json.dumps({**result, **environment()}, allow_nan=False)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def report(
    benchmark: Any,
    case: str,
    times: Mapping[str, list[float]],
    run: Callable[[], object],
    *,
    ratios: Mapping[str, float],
    **facts: Any,
) -> None:
    """Hand in one case: to pytest-benchmark's extra_info, to the JSON lines, and as a readable line.

    Args:
        benchmark: the fixture, or anything with ``pedantic`` and ``extra_info``.
        case: what was measured: the file's stem first.
        times: from ``interleaved``.
        run: the cwfast variant; pytest-benchmark calls it once.
        ratios: by name, such as ``times_torch_topk`` (how many of our times a peer takes) or ``reads``.
        facts: what else belongs to the result: sizes, bytes.
    """
    benchmark.pedantic(run, rounds=1)
    seconds = medians(times)
    result = {
        "case": case,
        "size": size(),
        "seconds": seconds,
        "fastest_seconds": {name: min(values) for name, values in times.items()},
        "rounds": {name: len(values) for name, values in times.items()},
        "ratios": dict(ratios),
        "skipped_peers": sorted(SKIPPED),
        **facts,
    }
    benchmark.extra_info.update(result)
    record(result)
    parts = [f"{name} {value * 1e3:.3g} ms" for name, value in list(seconds.items())[:1]]
    parts += [f"{name} {value:.3g}" if value < 100 else f"{name} {value:.0f}" for name, value in ratios.items()]
    parts += [f"{name} {_readable(value)}" for name, value in facts.get("bytes", {}).items() if value is not None]
    SUMMARY.append(f"{case}: {', '.join(parts)}")


def _readable(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e6:.1f} MB" if count >= 10**5 else f"{count / 1e3:.1f} kB"


if __name__ == "__main__":
    print(_peak_of(*sys.argv[1:]))
