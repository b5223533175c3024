"""The benchmarks' harness; nothing here looks at how long anything takes."""

import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cwfast.benchmarks import __main__ as command
from cwfast.benchmarks import _harness, _models, _per_sample

from cwfast import _backends


def allocate(count):
    """For peak_memory: a small baseline, then ``count`` more bytes."""
    before = bytearray(1000)
    yield
    after = b"x" * count
    assert before is not after


def fail():
    yield
    raise ValueError("no such luck")


def test_interleaved_takes_turns_after_one_warm_up():
    calls = []
    times = _harness.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, 4)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_interleaved_calls_setup_before_each():
    calls = []
    variants = {"a": lambda: calls.append("run a"), "b": lambda: calls.append("run b")}
    _harness.interleaved(variants, 1, setup=lambda name: calls.append(f"set {name}"))
    assert calls == ["set a", "run a", "set b", "run b"] * 2


def test_interleaved_lets_a_slow_variant_go_after_three_rounds():
    times = _harness.interleaved({"a": int}, 9, seconds=0)
    assert len(times["a"]) == 3


def test_interleaved_runs_without_collection_and_restores_it():
    states = []
    _harness.interleaved({"a": lambda: states.append(gc.isenabled())}, 2)
    assert states == [False] * 3
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        _harness.interleaved({"a": lambda: 1 // 0}, 2)
    assert gc.isenabled()


def test_ratio_pairs_times_of_the_same_round():
    times = {"a": [2.0, 40.0, 6.0], "b": [1.0, 10.0, 1.0, 9.0]}
    assert _harness.ratio(times, "a", "b") == 4.0  # of 2, 4, 6
    assert _harness.medians(times) == {"a": 6.0, "b": 5.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_read_touches_every_tensor(dtype):
    assert len(_harness.read(torch.ones(6, dtype=dtype), torch.ones(2, 3, dtype=dtype))()) == 2


def test_fma_peak_counts_its_operations():
    native = _backends.native()
    before = native.isa()
    for isa, width in zip(("scalar", "avx2", "avx512"), (4, 8, 16), strict=True):
        if isa in native.isas():
            native.set_isa(isa)
            assert native.fma_peak(1000) == 2 * width * 12 * 1000 * native.threads()
    native.set_isa(before)
    assert native.fma_peak(0) == 0


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="reads the code of g++ for x86")
def test_fma_peak_runs_all_its_chains():
    root = Path(__file__).resolve().parent.parent
    flags = ("-O3", "-std=c++17", "-fopenmp", "-ffp-contract=off", "-I", "csrc", "-S", "-o", "-")  # as setup.py builds
    made = subprocess.run(["g++", *flags, "csrc/cpu/peak.cpp"], cwd=root, capture_output=True, text=True, check=True)
    for multiply in (r"mulps\s.*xmm", r"vfmadd\w+ps\s.*ymm", r"vfmadd\w+ps\s.*zmm"):
        assert len(re.findall(multiply, made.stdout)) == 12


def test_device(monkeypatch):
    monkeypatch.delenv("CWFAST_BENCH_DEVICE", raising=False)
    assert _harness.device() == torch.device("cpu")
    for wrong in ("gpu", *(() if torch.cuda.is_available() else ("cuda",))):
        monkeypatch.setenv("CWFAST_BENCH_DEVICE", wrong)
        with pytest.raises(ValueError, match=f"must be cpu, or cuda where torch has one; got '{wrong}'"):
            _harness.device()


def test_sizes(monkeypatch):
    monkeypatch.delenv("CWFAST_BENCH_SIZE", raising=False)
    assert _harness.by_size(tiny=1, full=2) == 1
    monkeypatch.setenv("CWFAST_BENCH_SIZE", "full")
    assert _harness.by_size(tiny=1, full=2) == 2
    monkeypatch.setenv("CWFAST_BENCH_SIZE", "normal")
    assert _harness.by_size(tiny=1, full=3, normal=2) == 2
    assert _harness.by_size(tiny=1, full=3, normal=0) == 0
    assert _harness.by_size(tiny=1, full=3) == 3
    monkeypatch.setenv("CWFAST_BENCH_SIZE", "huge")
    with pytest.raises(ValueError, match="CWFAST_BENCH_SIZE must be one of"):
        _harness.size()


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(_harness, "SKIPPED", {})
    assert _harness.peer("json") is json
    assert _harness.peer("no_such_peer") is None
    assert list(_harness.SKIPPED) == ["no_such_peer"]


def test_record_appends_json_lines(monkeypatch, tmp_path):
    out = tmp_path / "results.jsonl"
    monkeypatch.setenv("CWFAST_BENCH_OUT", str(out))
    for case in ("first", "second"):
        _harness.record({"case": case, "ratios": {"reads": 1.5}})
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert (first["case"], second["case"]) == ("first", "second")
    assert first["ratios"] == {"reads": 1.5}
    assert set(_harness.environment()) <= set(first)
    with pytest.raises(ValueError, match="not JSON compliant"):
        _harness.record({"ratio": float("nan")})
    assert len(out.read_text().splitlines()) == 2


def test_record_writes_nothing_unasked(monkeypatch, tmp_path):
    monkeypatch.delenv("CWFAST_BENCH_OUT", raising=False)
    monkeypatch.chdir(tmp_path)
    _harness.record({"case": "first"})
    assert not list(tmp_path.iterdir())


def test_environment_names_machine_and_versions():
    found = _harness.environment()
    assert {"cpu", "threads", "isa", "torch", "cwfast", "python", "commit", "date", "load_average"} <= set(found)
    assert found["threads"] == torch.get_num_threads()


@pytest.mark.skipif(not _harness._STATUS.exists(), reason="peak memory is read from /proc/self/status")
def test_peak_memory_counts_what_follows_the_yield():
    extra = _harness.peak_memory(allocate, 64 << 20)
    assert 60 << 20 < extra < 80 << 20
    with pytest.raises(RuntimeError, match="no such luck"):
        _harness.peak_memory(fail)


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["--size", "huge"], ["--out", "no/such/folder/x.jsonl"]], ids=lambda a: a[0]
)
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        command.main(arguments)
    assert refused.value.code == 2
    assert "NAME" in capsys.readouterr().err


def test_every_primitive_has_benchmarks():
    assert {"rewind", "saliency", "select"} <= set(command.NAMES)


def test_a_suite_includes_those_that_begin_with_its_name(monkeypatch):
    ran = []
    monkeypatch.setattr(pytest, "main", lambda args: ran.append([Path(a).stem for a in args if "bench_" in a]) or 0)
    for name in ("CWFAST_BENCH_SIZE", "CWFAST_BENCH_OUT"):  # main sets them: undone after the test
        monkeypatch.setenv(name, "")
    command.main(["saliency", "--size", "normal"])
    command.main(["saliency_op"])
    command.main([])
    assert ran[:2] == [["bench_saliency", "bench_saliency_op"], ["bench_saliency_op"]]
    assert len(ran[2]) == len(command.NAMES)


@pytest.mark.parametrize("case", _models.CASES)
def test_a_problem_is_the_same_whenever_it_is_made(case):
    first, second = (_models.problem(case, 3, tiny=True) for _ in range(2))
    assert len(first.x) == len(first.y) == 3
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.y, second.y)
    for ours, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_truth_refuses_wrong_scores():
    truth = _per_sample.Truth(lambda: _models.problem("mlp", tiny=True))
    model, x, y = _models.problem("mlp", tiny=True)
    scores = _per_sample.zeros(model)
    _per_sample.loop(model)(x, y, scores)
    truth.check(scores)
    with pytest.raises(AssertionError, match="error"):
        truth.check(scores, calls=2)
    next(iter(scores.values()))[0] = float("nan")
    with pytest.raises(AssertionError, match="must be finite"):
        truth.check(scores)


@pytest.mark.slow
@pytest.mark.parametrize("name", command.NAMES)
def test_tiny_run_writes_a_line_per_case(name, tmp_path):
    out = tmp_path / "results.jsonl"
    arguments = [sys.executable, "-P", "-m", "cwfast.benchmarks", name, "--out", str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines
    for line in lines:
        assert line["case"].startswith(name.replace("_", " ")) or line["case"].startswith("freeze")
        assert line["size"] == "tiny"
        assert line["case"] in done.stdout


@pytest.mark.slow
def test_gpu_script_runs_dry(tmp_path):
    script = Path(__file__).resolve().parent.parent / "benchmarks/gpu.sh"
    environment = {**os.environ, "CWFAST_BENCH_DEVICE": "cpu", "CWFAST_BENCH_RESULTS": str(tmp_path)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((tmp_path / "dry-run.jsonl").read_text().splitlines()) == 7
    assert "FAILED" not in done.stdout
