"""Which backends this machine has, and which one an op uses. A named backend runs or raises; only "auto" chooses."""

import functools
import importlib
import importlib.util
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from cwfast.errors import BackendUnavailable

NAMES = ("reference", "cpu", "triton", "cuda")
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Backend(NamedTuple):
    """Whether a backend can run here, and why not."""

    available: bool
    reason: str


@functools.cache
def extension() -> ModuleType | str:
    """``cwfast._C``, or the reason why it cannot be used."""
    try:
        return importlib.import_module("cwfast._C")
    except ModuleNotFoundError:
        folder = Path(__file__).parent
        if (folder.parent / "setup.py").is_file():  # Python run in a clone finds this folder before the installed one
            return f"cwfast._C is not built in {folder}, a source tree: run Python elsewhere or with -P"
        return "cwfast._C is not built: install cwfast with a C++17 compiler and without CWFAST_NO_EXT=1"
    except ImportError as error:  # built, and broken: say how
        return f"cwfast._C cannot be loaded: {error}"


def native() -> ModuleType:
    """``cwfast._C``.

    Raises:
        BackendUnavailable: it is not built or cannot be loaded.
    """
    module = extension()
    if isinstance(module, str):
        raise BackendUnavailable(f"backend 'cpu' needs cwfast._C; {module}")
    return module


@functools.cache
def _cuda() -> Backend:
    module = extension()
    if isinstance(module, str):
        return Backend(False, module)
    if not hasattr(module, "cuda_unavailable"):
        return Backend(False, "cwfast._C has no CUDA kernels: no nvcc was found when it was built, or CWFAST_CUDA=0")
    reason = module.cuda_unavailable()
    return Backend(not reason, reason)


def backends() -> dict[str, Backend]:
    """What this machine has: ``{name: (available, reason)}``; ``reason`` is empty where the backend runs.

    Example: ``cwfast.backends()["cpu"].available``.
    """
    return {name: _probe(name) for name in NAMES}


def _probe(name: str) -> Backend:
    """One backend alone: looking for CUDA starts its driver, which CPU tensors must not."""
    if name == "reference":
        return Backend(True, "")
    if name == "cpu":
        module = extension()
        return Backend(False, module) if isinstance(module, str) else Backend(True, "")
    return _triton() if name == "triton" else _cuda()


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton() -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend(False, "triton is not installed")
    if torch.cuda.is_available() or interpreted():  # torch calls a HIP device cuda too
        return Backend(True, "")
    return Backend(False, "Triton needs a CUDA or HIP device and torch finds none")


def triton_kernels(primitive: str) -> ModuleType:
    """``cwfast.kernels.<primitive>``, imported at the first use of backend "triton": triton loads slowly."""
    return importlib.import_module(f"cwfast.kernels.{primitive}")


def resolve(backend: str, device: torch.device, supported: tuple[str, ...]) -> str:
    """The backend that an op with the backends ``supported`` uses for tensors on ``device``.

    "auto": CUDA tensors take cuda, else triton, else an error; CPU tensors take cpu, else reference with one
    warning; other devices take reference. Any other name is used as it is, or refused.

    Raises:
        ValueError: no backend has this name.
        BackendUnavailable: the backend cannot run here, on this device, or for this op.
    """
    if backend == "auto":
        return _auto(device.type, supported)
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {('auto', *NAMES)}; got {backend!r}")
    available, reason = _probe(backend)
    if not available:
        raise BackendUnavailable(f"backend {backend!r} is not available: {reason}")
    if backend not in supported:
        raise BackendUnavailable(f"backend {backend!r} does not have this op; it has {supported}")
    if backend in ("cpu", "cuda") and device.type != backend:
        raise BackendUnavailable(f"backend {backend!r} needs {backend.upper()} tensors; got tensors on {device}")
    if backend == "triton" and device.type != ("cpu" if interpreted() else "cuda"):
        raise BackendUnavailable(f"backend 'triton' needs CUDA or HIP tensors; got tensors on {device}")
    return backend


@functools.cache
def _auto(device_type: str, supported: tuple[str, ...]) -> str:
    if device_type == "cuda":
        have = {name: _probe(name) for name in ("cuda", "triton")}
        for name in have:
            if name in supported and have[name].available:
                return name
        why = "; ".join(f"{name}: {backend.reason}" for name, backend in have.items())
        raise BackendUnavailable(
            f"no kernel for CUDA tensors ({why}); name backend='reference' to run in plain PyTorch"
        )
    if device_type != "cpu" or "cpu" not in supported:
        return "reference"
    available, reason = _probe("cpu")
    if not available:
        _warn_slow(reason)
        return "reference"
    return "cpu"


@functools.cache
def _warn_slow(reason: str) -> None:  # once, also where ops have different backends
    warnings.warn(f"cwfast runs in plain PyTorch, which is slow: {reason}", stacklevel=5)


def cuda_stream(device: torch.device) -> int:
    """The stream that torch uses on this device now: kernels join it."""
    return torch.cuda.current_stream(device).cuda_stream


def cuda_dtype(op: str, dtype: torch.dtype) -> int:
    """``CwfastDtype`` of csrc/cuda/launchers.h.

    Raises:
        BackendUnavailable: the CUDA kernels do not take this dtype.
    """
    if dtype not in CUDA_DTYPES:
        raise BackendUnavailable(f"backend 'cuda' runs {op} in {CUDA_DTYPES}; got {dtype}: use 'reference'")
    return CUDA_DTYPES.index(dtype)
