"""What a result line says of where it was measured."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

import cwfast
from cwfast import _backends


@cache
def _machine() -> dict[str, Any]:
    native = _backends.extension()
    return {
        "cpu": _cpu_model(),
        "gpu": torch.cuda.get_device_name() if os.environ.get("CWFAST_BENCH_DEVICE") == "cuda" else None,
        "threads": torch.get_num_threads(),
        "isa": None if isinstance(native, str) else native.isa(),
        "cwfast": cwfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def environment() -> dict[str, Any]:
    """Processor, GPU where one is measured, threads, instruction set, versions, date and load average; the commit,
    None outside a git checkout."""
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
