"""Fixtures of all tests: every backend and instruction set that runs here, fixed seeds, scripts in a fresh Python."""

import os
import subprocess
import sys

import llm_models
import pytest
import torch
from hypothesis import HealthCheck, settings

from cwfast import _backends, _streaming
from cwfast.checkpoint import reader

ISAS = ("scalar", "avx2", "avx512")  # all that csrc/cpu has kernels for
PATHS = ("reference", *(f"cpu-{isa}" for isa in ISAS), "triton")

if _backends.interpreted():  # a test process of its own: test_triton.py
    import numpy as np
    import triton_bf16
    from cwfast.kernels import lm_token_stats, select

    from cwfast.ops import _lm_token_stats_device

    triton_bf16.patch()
    select.BLOCK = select.CHUNK // 2  # an operation costs the interpreter about the same for any number of entries
    lm_token_stats.tiles = lambda *_: {"BN": 64, "BV": 512, "BK": 64}
    _lm_token_stats_device.TILE = 512
    np.seterr(all="ignore")  # the interpreter computes with numpy, which warns of NaN where a kernel does not

settings.register_profile(
    "cwfast",
    derandomize=True,
    deadline=None,
    max_examples=8 if _backends.interpreted() else 50,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("cwfast")


def pytest_configure(config):
    if _backends.interpreted():
        config.addinivalue_line("filterwarnings", "ignore:All-NaN slice encountered:RuntimeWarning")


def why_not(path: str) -> str:
    """Empty where this machine runs the path; else why not."""
    name, _, isa = path.partition("-")
    available, reason = _backends.backends()[name]
    if not available:
        return reason
    return "" if not isa or isa in _backends.native().isas() else f"this processor does not run {isa}"


def pytest_terminal_summary(terminalreporter):
    """What was not tested is said, also under -q."""
    terminalreporter.write_line("kernel paths: " + ", ".join(f"{p} ({why_not(p) or 'run'})" for p in PATHS))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def on_path(path: str):
    if reason := why_not(path):
        pytest.skip(f"{path}: {reason}")
    name, _, isa = path.partition("-")
    if not isa:
        yield name
        return
    native = _backends.native()
    before = native.isa()
    native.set_isa(isa)
    yield name
    native.set_isa(before)


@pytest.fixture(params=PATHS)
def backend(request):
    """A backend's name; "cpu" comes once for each instruction set, which is in use meanwhile."""
    yield from on_path(request.param)


@pytest.fixture(params=[path for path in PATHS if path != "reference"])
def kernel(request):
    """As ``backend``, without the reference."""
    yield from on_path(request.param)


@pytest.fixture
def small_pieces(monkeypatch):
    """Files are read 65,536 entries at a time."""
    monkeypatch.setattr(reader.Checkpoint.pieces, "__defaults__", (65_536,))
    monkeypatch.setattr(_streaming, "PIECE", 65_536)


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def python():
    """Runs code in a fresh Python, with additional environment variables; fails if it exits otherwise than by 0."""

    def run(code: str, **env: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **env}
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def without_torchvision():
    """No image is read here, and a torchvision that was built for another torch breaks the import of the models."""
    pytest.importorskip("transformers")
    with llm_models.without_torchvision():
        yield
