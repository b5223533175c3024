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
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from cwfast.benchmarks._machine import environment
from torch import Tensor

T = TypeVar("T")
SIZES = ("tiny", "normal", "full")
SUMMARY: list[str] = []  # a readable line per case, printed when pytest ends
SKIPPED: dict[str, str] = {}  # peers that are not installed, and why they could not be imported
_STATUS = Path("/proc/self/status")


def size() -> str:
    """``CWFAST_BENCH_SIZE``: "tiny" (the default: does it run?), "normal" (minutes in all) or "full" (every case)."""
    value = os.environ.get("CWFAST_BENCH_SIZE", "tiny")
    if value not in SIZES:
        raise ValueError(f"CWFAST_BENCH_SIZE must be one of {SIZES}; got {value!r}")
    return value


def by_size(*, tiny: T, full: T, normal: T | None = None) -> T:
    """The value for this run's size; a case without a ``normal`` one runs as in full."""
    value = {"tiny": tiny, "normal": normal, "full": full}[size()]
    return full if value is None else value


def device() -> torch.device:
    """``CWFAST_BENCH_DEVICE``: "cpu" (the default) or "cuda"; only the suite ``device`` looks at it.

    Raises:
        ValueError: torch has no such device here.
    """
    value = os.environ.get("CWFAST_BENCH_DEVICE", "cpu")
    if value not in ("cpu", "cuda") or (value == "cuda" and not torch.cuda.is_available()):
        have = f"torch {torch.__version__}, CUDA {'available' if torch.cuda.is_available() else 'not available'}"
        raise ValueError(f"CWFAST_BENCH_DEVICE must be cpu, or cuda where torch has one; got {value!r} ({have})")
    return torch.device(value)


def synchronize() -> None:
    """Waits for the device: a clock that is read afterwards has seen all work."""
    if device().type == "cuda":
        torch.cuda.synchronize()


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
                synchronize()
                begin = time.perf_counter()
                result = variants[name]()
                synchronize()
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


def peak_memory(function: Callable[..., Iterator[None]], *args: Any) -> int | None:
    """Extra peak resident bytes of a generator function's second half, in a fresh process; None where not on Linux.

    On a GPU: extra peak bytes of torch's allocator, in this process.

    What the generator does before its ``yield`` (inputs, a small warm-up call that loads the code) is the baseline,
    what it does afterwards is measured.

    Args:
        function: at the top level of a file that can be run; its locals live until it ends.
        args: JSON values.

    Raises:
        RuntimeError: the process failed; the message ends with what it printed.
    """
    if device().type == "cuda":
        return _allocated_peak(function(*args))
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


def _allocated_peak(steps: Iterator[None]) -> int:
    next(steps)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    next(steps, None)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _status_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


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
