"""Compiles csrc/cuda/*.cu with g++ and loads it: the kernels that nvcc compiles for GPUs, run on the CPU.

A library is plain (fast) or checked: races, bounds, misalignment, uninitialised shared memory. ``changes`` plant a
defect: pairs (text, replacement) applied to the sources, where each text must occur exactly once.
"""

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
CHECKED = ["-fsanitize=thread", "--param", "tsan-distinguish-volatile=1"]


def cuda_headers() -> Path | None:
    """The include folder of a CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.insert(2, str(Path(nvcc).resolve().parent.parent))
    places = (Path(home) / "include" for home in homes if home)
    return next((path for path in places if (path / "cuda_bf16.h").is_file()), None)


def why_not() -> str:
    """Empty where kernels run on this machine's CPU; else why not."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"needs Linux on x86-64; this is {platform.system()} on {platform.machine()}"
    if not shutil.which("g++"):
        return "needs g++"
    return "" if cuda_headers() else "needs the headers of a CUDA toolkit (CUDA_HOME)"


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="cuda_on_cpu_")  # removed when the process ends


def _compile(source: Path, obj: Path, include: Path, *flags: str) -> Path:
    always = ["-std=c++17", "-O2", "-g", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
    includes = [f"-I{include}", f"-I{cuda_headers()}"]
    subprocess.run(["g++", *always, *includes, *flags, "-x", "c++", "-c", source, "-o", obj], check=True)
    return obj


@functools.cache
def _runtime() -> list[Path]:
    folder = Path(_folder().name)
    return [_compile(source, folder / f"{source.stem}.o", CSRC) for source in sorted(HERE.glob("*.cpp"))]


@functools.cache
def library(stem: str, checked: bool = False, changes: tuple[tuple[str, str], ...] = ()) -> ctypes.CDLL:
    """``csrc/cuda/<stem>.cu`` and the runtime, as one shared library."""
    work = Path(tempfile.mkdtemp(dir=_folder().name))
    include = CSRC
    if changes:
        include = work / "csrc"
        shutil.copytree(CSRC, include)
        files = sorted((include / "cuda").glob(f"{stem}*"))
        for text, replacement in changes:
            hits = [path for path in files for _ in range(path.read_text().count(text))]
            assert len(hits) == 1, f"{text!r} must occur once in {stem}*; it does {len(hits)} times"
            hits[0].write_text(hits[0].read_text().replace(text, replacement))
    kernels = _compile(include / f"cuda/{stem}.cu", work / "kernels.o", include, *(CHECKED if checked else []))
    target = work / f"{stem}.so"
    subprocess.run(["g++", "-shared", kernels, *_runtime(), "-o", target, "-ldl"], check=True)
    loaded = ctypes.CDLL(str(target))
    loaded.coc_errors.restype = ctypes.c_char_p
    loaded.coc_unregister.argtypes = [ctypes.c_void_p]
    loaded.coc_register.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    loaded.coc_configure.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint]
    loaded.coc_configure(1, 2, None, 0)
    return loaded


def check_planted(module: str, name: str) -> None:
    """In a process of its own, which the defect may crash: ``module.catch(name)`` fails for a defect, passes for ""."""
    code = f"import {module} as t; t.catch({name!r})"
    ran = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, capture_output=True, text=True)
    assert (ran.returncode == 0) == (name == ""), ran.stdout + ran.stderr
    assert "must occur once" not in ran.stderr, ran.stderr
    assert "error:" not in ran.stderr, ran.stderr  # of the compiler


def some_slow(defects: list[str]) -> list[object]:
    """Parameters: the first four run among the slow tests, all of them with ``-m "slow or exhaustive"``."""
    return [pytest.param(d, marks=pytest.mark.slow if i < 4 else pytest.mark.exhaustive) for i, d in enumerate(defects)]
