"""What this machine has, what a name may mean, and how kernels behave amid forks, threads and Ctrl-C."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import cwfast
from cwfast import _backends, ops
from cwfast.errors import BackendUnavailable
from cwfast.testing import HOSTILE, assert_no_worse, backends_here, guarded, hostile_scores

CALLS = {  # an op of each primitive, by backend
    "saliency": lambda backend: ops.accumulate_saliency_(
        torch.zeros(2, 2), torch.ones(1, 3, 2), torch.ones(1, 3, 2), backend=backend
    ),
    "select": lambda backend: ops.select_topk([torch.ones(3)], 1, backend=backend),
    "rewind": lambda backend: ops.rewind_(
        [torch.ones(3)], [torch.zeros(3)], [torch.tensor([1, 0, 0, 0, 0, 0, 0, 0], dtype=torch.uint8)], backend=backend
    ),
    "lm_token_stats": lambda backend: ops.lm_token_stats(
        torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), backend=backend
    ),
    "lm_token_kl": lambda backend: ops.lm_token_kl(*[torch.zeros(1, 2)] * 4, backend=backend),
    "logit_stats": lambda backend: ops.logit_stats(torch.zeros(1, 2), torch.tensor([0]), backend=backend),
}
every_op = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def test_no_backend_vanishes():
    have = cwfast.backends()
    assert list(have) == ["reference", "cpu", "triton", "cuda"]
    assert have["reference"].available
    assert have["cpu"].available, have["cpu"].reason
    assert all(backend.available == (backend.reason == "") for backend in have.values())


def test_isas_are_known_and_the_best_is_chosen():
    native = _backends.native()
    assert native.isas()[0] == "scalar"
    assert set(native.isas()) <= {"scalar", "avx2", "avx512"}
    assert native.isa() == os.environ.get("CWFAST_CPU_ISA", native.isas()[-1])
    with pytest.raises(ValueError, match=r"instruction set must be one .*scalar.*; got 'sse9'"):
        native.set_isa("sse9")


@every_op
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_named_backend_never_falls_back(call, name):
    with pytest.raises(BackendUnavailable, match=cwfast.backends()[name].reason):
        call(name)


@every_op
def test_unknown_backend_is_a_value_error(call):
    with pytest.raises(ValueError, match=r"backend must be one of \('auto', 'reference', .*; got 'gpu'"):
        call("gpu")


def test_backend_without_the_op_is_refused():
    with pytest.raises(BackendUnavailable, match="'cpu' does not have this op"):
        _backends.resolve("cpu", torch.device("cpu"), ("reference", "triton"))


def test_cuda_backend_refuses_cpu_tensors_and_float64(monkeypatch):
    monkeypatch.setattr(_backends, "_probe", lambda name: _backends.Backend(True, ""))
    with pytest.raises(BackendUnavailable, match="'cuda' needs CUDA tensors; got tensors on cpu"):
        ops.select_topk([torch.ones(3)], 1, backend="cuda")
    with pytest.raises(BackendUnavailable, match=r"select_topk in .*; got torch.float64: use 'reference'"):
        _backends.cuda_dtype("select_topk", torch.float64)


def test_cpu_backend_refuses_other_devices():
    with pytest.raises(BackendUnavailable, match="needs CPU tensors; got tensors on meta"):
        _backends.resolve("cpu", torch.device("meta"), ("reference", "cpu"))
    assert _backends.resolve("auto", torch.device("meta"), ("reference", "cpu")) == "reference"
    with pytest.raises(BackendUnavailable, match="no kernel for CUDA tensors"):
        _backends.resolve("auto", torch.device("cuda"), ("reference", "cpu"))


@pytest.mark.parametrize("isa", _backends.native().isas())
def test_environment_forces_an_instruction_set(python, isa):
    assert (
        python("from cwfast import _backends; print(_backends.native().isa())", CWFAST_CPU_ISA=isa).stdout == f"{isa}\n"
    )


def test_wrong_instruction_set_makes_the_backend_unavailable(python):
    code = "import cwfast; b = cwfast.backends(); print(b['cpu'].reason, b['reference'].available)"
    printed = python(code, CWFAST_CPU_ISA="sse9").stdout
    assert "cannot be loaded: the instruction set must be one that this processor runs (scalar" in printed
    assert printed.endswith("got 'sse9' True\n")


def test_without_the_extension_auto_warns_once_and_cpu_raises(python):
    printed = python("""
import sys, warnings
sys.modules["cwfast._C"] = None  # as where it was not built
import torch, cwfast
from cwfast import ops
assert not cwfast.backends()["cpu"].available
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        found = ops.select_topk([torch.tensor([1.0, 3.0, 2.0])], 2)
        ops.gather([torch.ones(3)], found.bits)
        ops.logit_stats(torch.zeros(1, 2), torch.tensor([0]))
print(found.bits[0][0].item(), len(caught), caught[0].message)
try:
    ops.select_topk([torch.ones(3)], 1, backend="cpu")
except cwfast.errors.BackendUnavailable as error:
    print(error)
""").stdout.splitlines()
    assert printed[0].startswith("6 1 cwfast runs in plain PyTorch, which is slow: cwfast._C is not built")
    assert printed[1].startswith("backend 'cpu' is not available: cwfast._C is not built")


def test_threads_follow_torch(set_threads):
    for threads in (1, 2):
        set_threads(threads)
        assert _backends.native().threads() == threads


def test_forked_child_runs_every_kernel(python):
    """libgomp's threads are gone in the child: a parallel region there, torch's too, would wait for ever."""
    python("""
import os, signal, sys, time, torch
from cwfast import _backends, ops
torch.set_num_threads(2)
x, out, scores, initial = torch.rand(8, 3, 200), torch.zeros(200, 200), torch.rand(200_000), torch.zeros(200_000)
def kernels():
    ops.accumulate_saliency_(out, x, x, backend="cpu")
    found = ops.select_topk([scores], 1000, backend="cpu")
    ops.rewind_([scores], [initial], found.bits, backend="cpu")
kernels()
assert _backends.native().threads() == 2
child = os.fork()
if child == 0:
    kernels()
    os._exit(0 if _backends.native().threads() == 1 else 3)
give_up = time.monotonic() + 20
while (status := os.waitpid(child, os.WNOHANG)) == (0, 0):
    if time.monotonic() > give_up:
        os.kill(child, signal.SIGKILL)
        sys.exit("the child hangs")
    time.sleep(0.01)
assert status == (child, 0), status
kernels()
""")


LONG = {  # a single call of many seconds; the rows are one row, seen many times
    "saliency": """
x = torch.ones(1, 1024).expand(400_000, 1024)
ends = torch.arange(0, 400_001, 4)
call = lambda: ops.accumulate_saliency_(torch.zeros(1024, 1024), x, x, cu_seqlens=ends, backend="cpu")
""",
    "one frequent token": """
x, tokens = torch.ones(1, 1, 4096).expand(1, 4_000_000, 4096), torch.zeros((1, 4_000_000), dtype=torch.int64)
call = lambda: ops.accumulate_embedding_saliency_(torch.zeros(2, 4096), tokens, x, backend="cpu")
""",
    "one long sample": """
x = torch.ones(1, 1024).expand(2_000_000, 1024)
ends = torch.tensor([0, 2_000_000])
call = lambda: ops.accumulate_saliency_(torch.zeros(1024, 1024), x, x, cu_seqlens=ends, backend="cpu")
""",
}


@pytest.mark.parametrize("setup", LONG.values(), ids=LONG)
def test_ctrl_c_ends_a_long_kernel(setup):
    code = f"import torch\nfrom cwfast import ops\n{setup}\nprint('started', flush=True)\ncall()\nprint('finished')"
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "started\n"
        time.sleep(0.3)  # well inside the kernel
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        out, err = process.communicate(timeout=60)
        elapsed = time.monotonic() - sent
    assert "finished" not in out, "the call was too short for this test"
    assert "KeyboardInterrupt" in err.splitlines()[-1]
    assert process.returncode == -signal.SIGINT
    assert elapsed < 1.5, f"{elapsed:.1f} s from Ctrl-C to the end of the process"


# -- cwfast.testing


def test_backends_here_are_the_available_ones():
    assert backends_here(("reference", "cpu", "triton", "cuda")) == ["reference", "cpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.float64, torch.bfloat16], ids=str)
def test_guard_bands_notice_one_write(dtype):
    tensor = torch.zeros(3, 5, dtype=dtype).T
    copy, check = guarded(tensor)
    assert torch.equal(copy, tensor)
    assert copy.stride() == tensor.stride()
    assert copy.data_ptr() % 32 != 0
    copy.fill_(1)
    check()
    copy.as_strided((1,), (1,), 13 + 15).fill_(1)
    with pytest.raises(AssertionError, match="bytes behind the tensor were written"):
        check()


def test_no_worse_compares_errors_and_not_values():
    truth = torch.tensor([1.0, 1e-3], dtype=torch.float64)
    exact, off = truth.float(), truth.float() * (1 + 4e-6)
    assert_no_worse(exact, truth, exact)
    assert_no_worse(off, truth, off)
    with pytest.raises(AssertionError, match="against float64"):
        assert_no_worse(off, truth, exact)
    with pytest.raises(AssertionError, match="infinite or NaN"):
        assert_no_worse(exact / 0, truth, exact)


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_hostile_scores_are_scores(kind, dtype):
    scores = hostile_scores(kind, dtype, 1000)
    assert {score.ndim for score in scores} == {0, 1, 2}
    assert sum(not score.is_contiguous() for score in scores) == 3
    assert all(score.dtype == dtype and bool((score >= 0).all()) for score in scores)
    assert sum(score.numel() for score in hostile_scores(kind, dtype, 0)) == 0
