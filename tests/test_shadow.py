"""Shadow fleets: plans, jobs that survive kill -9 of workers and drivers, engines that agree to the bit."""

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import shadow_jobs
import torch
from safetensors.torch import load_file
from torch import nn

from cwfast import mia, shadow
from cwfast.defense.baselines import PlainTraining
from cwfast.defense.cwrf import CWRF
from cwfast.defense.losses import RelaxLoss
from cwfast.errors import CheckpointError
from cwfast.shadow import engines
from cwfast.shadow.describing import describe
from cwfast.shadow.work import Work, difference, manifest_of, versions
from cwfast.training import Recipe, Task

TINY = shadow_jobs.TINY
HERE = Path(__file__).parent


# -- plans


def test_halves_are_complementary_and_balanced():
    pool, reference = torch.arange(100, 40, -1), torch.arange(20)
    plan = shadow.Plan.halves(pool, reference, 8, seed=5)
    assert plan.models == 8
    assert torch.equal(plan.membership[0::2], ~plan.membership[1::2])
    assert plan.membership.sum(dim=0).tolist() == [4] * 60
    assert plan.membership.sum(dim=1).tolist() == [30] * 8
    assert len({tuple(row.tolist()) for row in plan.membership}) == 8
    assert plan.seeds == tuple(range(5000, 5008))
    assert torch.equal(plan.train_ids(3), pool[plan.membership[3]])
    assert plan.sha256 == shadow.Plan.halves(pool, reference, 8, seed=5).sha256
    assert plan.sha256 != shadow.Plan.halves(pool, reference, 8, seed=6).sha256
    assert plan.sha256 != shadow.Plan.halves(pool, reference[1:], 8, seed=5).sha256


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"models": 7}, ValueError, "models must be an even number.*7"),
        ({"models": 0}, ValueError, "models must be an even number.*0"),
        ({"pool": torch.arange(10, 15)}, ValueError, "pool must hold an even number"),
        ({"pool": torch.arange(10, 10)}, ValueError, "pool must hold an even number"),
        ({"pool": torch.tensor([10, 11, 11, 12])}, ValueError, "ids must be distinct"),
        ({"pool": torch.arange(-2, 2)}, ValueError, "ids must be distinct and at least 0"),
        ({"pool": torch.arange(10, 20).int()}, TypeError, "ids must be int64"),
        ({"reference": torch.arange(5, 11)}, ValueError, "reference must share no sample.*1 of both"),
        ({"seed": -1}, ValueError, "seeds must be integers from 0"),
    ],
)
def test_plans_that_are_refused(change, error, message):
    given = {"pool": torch.arange(10, 20), "reference": torch.arange(5), "models": 4, "seed": 0, **change}
    with pytest.raises(error, match=message):
        shadow.Plan.halves(**given)


def test_a_plan_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"membership must be bool \[K, N\] = \(2, 3\)"):
        shadow.Plan(torch.arange(3), torch.zeros(2, 4, dtype=torch.bool), torch.arange(3, 5), (1, 2))
    with pytest.raises(ValueError, match="must have a model"):
        shadow.Plan(torch.arange(0), torch.zeros(0, 0, dtype=torch.bool), torch.arange(3, 5), ())


def test_a_plan_comes_back_from_its_file(tmp_path):
    plan = shadow.Plan.halves(torch.arange(14), torch.arange(20, 23), 4, seed=1)  # 14: not whole bytes
    plan.save(tmp_path / "plan.json")
    back = shadow.Plan.load(tmp_path / "plan.json")
    assert back.sha256 == plan.sha256
    assert torch.equal(back.membership, plan.membership)
    assert torch.equal(back.ids, plan.ids)
    assert torch.equal(back.reference, plan.reference)
    assert back.seeds == plan.seeds


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.pop("ids"),
        lambda c: c.update(format="cwfast-plan/9"),
        lambda c: c.update(seeds=[0, 1, 2, 4]),
        lambda c: c.update(membership=c["membership"][:2]),
        lambda c: c["membership"].__setitem__(0, "zz"),
        lambda c: c["membership"].__setitem__(0, c["membership"][1]),
        lambda c: c["ids"].__setitem__(0, 2**70),
        lambda c: c["ids"].__setitem__(0, "1"),
    ],
)
def test_a_damaged_plan_is_refused(damage, tmp_path):
    path = tmp_path / "plan.json"
    shadow.Plan.halves(torch.arange(14), torch.arange(20, 23), 4, seed=1).save(path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="must hold a plan"):
        shadow.Plan.load(path)
    path.write_text(path.read_text()[:40])
    with pytest.raises(CheckpointError, match="must hold a plan"):
        shadow.Plan.load(path)


# -- drivers of their own


@pytest.fixture
def log(tmp_path, monkeypatch):
    """What jobs began and ended: a list of (event, model, pid) each time it is called."""
    path = tmp_path / "jobs.log"
    monkeypatch.setenv("CWFAST_TEST_LOG", str(path))
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.chdir(tmp_path)  # Ray's and Slurm's workers import from where they begin: not the checkout
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")

    def read():
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [(event, int(model), int(pid)) for event, model, pid in map(str.split, lines)]

    read.path = path
    return read


class Driver:
    """``python -m shadow_jobs`` on a folder; killed at the end, whatever happens."""

    def __init__(self, out, engine="local"):
        self.files = [Path(f"{out}.{kind}") for kind in ("stdout", "stderr")]  # no pipes: its workers may outlive it
        command = [sys.executable, "-P", "-m", "shadow_jobs", str(out), engine]
        with open(self.files[0], "wb") as stdout, open(self.files[1], "wb") as stderr:
            self.process = subprocess.Popen(command, stdout=stdout, stderr=stderr)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def finish(self):
        self.process.wait(180)
        stdout, stderr = (file.read_text() for file in self.files)
        assert self.process.returncode == 0, stderr
        assert stdout == ""


def until(condition, what, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def alive(pid):
    """Neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def waits_for_a_lock(parent):
    """A child of the process ``parent`` does."""
    waiting = [line.split()[5] for line in Path("/proc/locks").read_text().splitlines() if "->" in line]
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return bool({*waiting} & {*children})


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """The signals' hash of ``shadow_jobs.train`` where nothing is interrupted, in this very process."""
    values = shadow.Training("shadow_jobs:tiny")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parts = [values(TINY, [model]) for model in range(TINY.models)]
    torch.set_num_threads(threads)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "labels"}


def check(out, truth):
    found = shadow.collect(TINY, out)
    found.require(TINY.expected)
    assert found.values.keys() == truth.keys()
    for name, value in truth.items():
        assert torch.equal(found[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_kill_9_of_a_worker_costs_its_running_job_alone(engine, tmp_path, log, truth):
    hold = Path(f"{log.path}.hold-3")
    hold.touch()
    with Driver(tmp_path / "out", engine) as driver:
        until(lambda: any(e == "began" and m == 3 for e, m, _ in log()), "model 3 to begin")
        until(lambda: sum(e == "ended" for e, *_ in log()) == 5, "the others to end")
        before = [entry for entry in log() if entry[:2] == ("began", 3)]
        os.kill(before[0][2], signal.SIGKILL)
        hold.unlink()
        driver.finish()
    assert Counter((event, model) for event, model, _ in log()) == {
        **{(event, model): 1 for event in ("began", "ended") for model in range(6)},
        ("began", 3): 2,
    }
    check(tmp_path / "out", truth)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray", "slurm"])
def test_kill_9_of_the_driver_then_resume(engine, tmp_path, log, truth):
    """The workers of a dead driver die with it, but for Slurm's: the next run waits for those, and trains no twice."""
    hold = Path(f"{log.path}.hold-3")
    hold.touch()
    with Driver(tmp_path / "out", engine) as driver:
        until(lambda: any(e == "began" and m == 3 for e, m, _ in log()), "model 3 to begin")
        until(lambda: sum(e == "ended" for e, *_ in log()) == 5, "the others to end")
        until(lambda: len(list((tmp_path / "out").glob("signals-*"))) == 5, "their files")
        driver.kill()
    worker = next(pid for event, model, pid in log() if (event, model) == ("began", 3))
    if engine != "slurm":
        until(lambda: not alive(worker), "the worker to die with its driver", 20)
    with pytest.raises(CheckpointError, match=r"all 6 jobs of .* must be done; 1 are not"):
        shadow.collect(TINY, tmp_path / "out")
    with Driver(tmp_path / "out", "local" if engine == "slurm" else engine) as driver:  # any engine may go on
        if engine == "slurm":
            until(lambda: waits_for_a_lock(driver.process.pid), "the second run to wait for the first one's worker")
        hold.unlink()
        driver.finish()
    again = 1 if engine == "slurm" else 2
    assert Counter((event, model) for event, model, _ in log()) == {
        **{(event, model): 1 for event in ("began", "ended") for model in range(6)},
        ("began", 3): again,
    }
    check(tmp_path / "out", truth)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray", "slurm"])
def test_engines_agree_to_the_bit(engine, tmp_path, log, truth):
    with Driver(tmp_path / "out", engine) as driver:
        driver.finish()
    check(tmp_path / "out", truth)


@pytest.mark.slow
def test_two_runs_exclude_each_other_until_the_first_is_killed(tmp_path, log, truth):
    hold = Path(f"{log.path}.hold-0")
    hold.touch()
    out = tmp_path / "out"
    with Driver(out) as driver:
        until(lambda: any(e == "began" and m == 0 for e, m, _ in log()), "model 0 to begin")
        message = f"must be used by one run at a time; it is held by process {driver.process.pid} on "
        with pytest.raises(RuntimeError, match=message):
            shadow.run(TINY, "shadow_jobs:train", out)
        driver.kill()
        hold.unlink()
        shadow.run(TINY, "shadow_jobs:train", out, workers=1, progress=False)  # at once: the kernel freed the lock
    check(out, truth)


@pytest.mark.slow
def test_ctrl_c_stops_driver_and_workers(tmp_path, log):
    for model in range(6):
        Path(f"{log.path}.hold-{model}").touch()
    with Driver(tmp_path / "out") as driver:
        until(lambda: len(log()) == 2, "two workers to be busy")
        driver.process.send_signal(signal.SIGINT)
        driver.process.wait(20)
        assert driver.process.returncode == -signal.SIGINT
        for _, _, pid in log():
            assert not alive(pid)  # killed and waited for before the driver ended


# -- what a run finds and refuses


def test_what_a_job_finds(tmp_path, log, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    shadow.run(TINY, shadow_jobs.surroundings, tmp_path / "out", workers=2, threads=2, group=2)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ
    assert capfd.readouterr().out == ""
    found = shadow.collect(TINY, tmp_path / "out")
    assert found["loss"][:, :, :5].eq(torch.tensor([2.0, 2, 2, 2, 1])).all()
    assert found.manifest["job"] == "shadow_jobs:surroundings"
    assert found.manifest["threads"] == found.manifest["group"] == 2
    shadow.run(TINY, shadow_jobs.surroundings, tmp_path / "again", workers=1, threads=2, group=2)
    again = shadow.collect(TINY, tmp_path / "again")
    assert torch.equal(found["phi"], again["phi"])  # the global generators are seeded before each job
    assert len(found["phi"][::2, 0, 0].unique()) == 3


def test_a_job_that_fails_is_named_and_the_others_kept(tmp_path, log):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".signals-00000.safetensors.abc.tmp").touch()  # of a worker that was killed while it wrote
    with pytest.raises(
        RuntimeError,
        match=r"job 1 \(models 2, 3\) failed: ArithmeticError: three is one too many; 1 of 3 jobs failed.*log.jsonl",
    ):
        shadow.run(TINY, shadow_jobs.failing, out, workers=1, group=2)
    assert not list(out.glob("*.tmp"))
    assert sorted(path.name for path in out.glob("signals-*")) == [f"signals-0000{k}.safetensors" for k in (0, 2)]
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    (failed,) = [line for line in lines if line["event"] == "failed"]
    assert failed["models"] == [2, 3]
    assert "ArithmeticError: three is one" in failed["traceback"]
    assert [model for event, model, _ in log()] == [0, 2, 4]  # what raised is not tried again


def test_a_job_that_exits_is_told_as_one_that_raises(tmp_path, log):
    with pytest.raises(RuntimeError, match=r"job 0 \(models 0, .*\) failed: SystemExit: no more; 1 of 1 jobs failed"):
        shadow.run(TINY, shadow_jobs.exiting, tmp_path, workers=1, group=6)
    assert len(log()) == 1  # it is not tried again
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert "in exiting" in last["traceback"]


@pytest.mark.parametrize("name", ["jobs.lock", "log.jsonl"])
def test_files_that_a_worker_cannot_open_are_told(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(RuntimeError, match=rf"job 0 .* failed: IsADirectoryError: .*{name}.*; 1 of 1 jobs failed"):
        shadow.run(TINY, shadow_jobs.with_state, tmp_path, workers=1, group=6)


@pytest.mark.slow
def test_a_job_that_kills_its_worker_is_given_up_after_some_retries(tmp_path, log):
    with pytest.raises(RuntimeError, match=r"job 3 \(models 3\) failed: its worker ended with exit code -9, 2 times"):
        shadow.run(TINY, shadow_jobs.dying, tmp_path / "out", workers=1, retries=1)
    assert Counter(model for _, model, _ in log()) == {0: 1, 1: 1, 2: 1, 3: 2, 4: 1, 5: 1}
    assert len(list((tmp_path / "out").glob("signals-*"))) == 5


def test_state_is_kept_beside_the_signals(tmp_path):
    out = tmp_path / "out"
    shadow.run(TINY, shadow_jobs.with_state, out, workers=1, group=3)
    assert load_file(out / "state-00001.safetensors")["weight-4"].tolist() == [4.0] * 3
    (out / "state-00001.safetensors").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=r"state-00001.*SHA-256 differs"):
        shadow.collect(TINY, out)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run of ``with_state``, and the bytes of its files."""
    out = tmp_path_factory.mktemp("finished")
    shadow.run(TINY, shadow_jobs.with_state, out, workers=1, group=3)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture
def out(finished, tmp_path):
    """A copy of it."""
    for name, content in finished.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("cut", [0, 5, 200, -1])
def test_a_truncated_result_is_found(cut, out):
    path = out / "signals-00001.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    for use in (lambda: shadow.collect(TINY, out), lambda: shadow.run(TINY, shadow_jobs.with_state, out, group=3)):
        with pytest.raises(CheckpointError, match=r"signals-00001\.safetensors must be a safetensors file"):
            use()


def test_a_flipped_bit_in_a_result_is_found(out):
    path = out / "signals-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        shadow.run(TINY, shadow_jobs.with_state, out, group=3)


def test_a_result_of_another_job_is_found(out):
    (out / "signals-00001.safetensors").write_bytes((out / "signals-00000.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"signals-00001\.safetensors must be of this run"):
        shadow.collect(TINY, out)


def test_signals_of_no_run_in_the_place_of_a_result_are_refused(out):
    part = mia.Signals.load(out / "signals-00001.safetensors")
    dataclasses.replace(part, manifest={}).save(out / "signals-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"signals-00001\.safetensors must be of this run"):
        shadow.collect(TINY, out)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"run\.json must hold the settings of a run; got \[\]"),
        ("null", r"run\.json must hold the settings of a run; got None"),
        ("[" * 100_000, r"run\.json must hold JSON"),
        ("{}", "it holds another|its format is None"),
    ],
)
def test_a_run_json_that_is_none(content, message, out):
    (out / "run.json").write_text(content)
    for use in (lambda: shadow.collect(TINY, out), lambda: shadow.run(TINY, shadow_jobs.with_state, out, group=3)):
        with pytest.raises(CheckpointError, match=message):
            use()


@pytest.mark.parametrize(
    ("name", "value"), [("group", 0), ("threads", -1), ("group", None), ("manifest", []), ("job", 3)]
)
def test_a_damaged_run_json_is_not_collected(name, value, out):
    settings = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**settings, name: value}))
    with pytest.raises(
        CheckpointError, match=rf"run\.json must say {name} as it was written; got {re.escape(repr(value))}"
    ):
        shadow.collect(TINY, out)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"plan": shadow.Plan.halves(torch.arange(10, 50), torch.arange(50, 60), 6, seed=4)}, "plan"),
        ({"job": shadow_jobs.failing}, "job"),
        ({"job": shadow.Training("shadow_jobs:tiny")}, "job"),
        ({"group": 2}, "group"),
        ({"threads": 2}, "threads"),
    ],
)
def test_a_folder_of_another_run_is_refused(change, name, out):
    given = {"plan": TINY, "job": shadow_jobs.with_state, "group": 3, **change}
    with pytest.raises(CheckpointError, match=f"must be this run's; its {name} is"):
        shadow.run(out=out, **given)


def test_a_worker_left_from_another_run_writes_nothing(finished, out):
    settings = {**json.loads((out / "run.json").read_text()), "group": 2}
    left = Work(TINY, shadow_jobs.with_state, out, settings)
    (out / "signals-00001.safetensors").unlink()
    assert "must still be of the run that began this job" in left(1)
    assert not (out / "signals-00001.safetensors").exists()


def test_a_finished_run_starts_no_worker(out):
    before = (out / "log.jsonl").read_text()
    shadow.run(TINY, shadow_jobs.with_state, out, group=3, engine="slurm")  # there is no Slurm here, and no need
    assert (out / "log.jsonl").read_text() == before
    assert shadow.collect(TINY, out)["loss"].shape == (6, 40, 1)


def test_folders_without_a_run_of_the_plan(out, tmp_path):
    with pytest.raises(CheckpointError, match="must hold a run of this plan; it holds none"):
        shadow.collect(TINY, tmp_path / "nothing")
    other = shadow.Plan.halves(torch.arange(10, 50), torch.arange(50, 60), 6, seed=4)
    with pytest.raises(CheckpointError, match="must hold a run of this plan; it holds another"):
        shadow.collect(other, out)
    (out / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json must hold JSON"):
        shadow.collect(TINY, out)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"engine": "cloud"}, ValueError, "engine must be one of local, ray, slurm; got 'cloud'"),
        ({"job": "shadow_jobs"}, ValueError, "named 'module:function'; got 'shadow_jobs'"),
        ({"job": 3}, TypeError, "named 'module:function'; got int"),
        ({"job": "no_such_module:f"}, ImportError, "no_such_module"),
        ({"job": "shadow_jobs:no_such"}, AttributeError, "no_such"),
        ({"workers": 0}, ValueError, "workers must be at least 1; got 0"),
        ({"threads": 0}, ValueError, "threads must be at least 1; got 0"),
        ({"group": 0}, ValueError, "group must be at least 1; got 0"),
        ({"retries": -1}, ValueError, "retries must be at least 0; got -1"),
        ({"options": {"address": "auto"}}, ValueError, r"'local' takes no options; got \['address'\]"),
        ({"gpus": -1}, ValueError, "gpus must be 0, a share of one, or whole; got -1"),
        ({"gpus": 0.5, "engine": "slurm"}, ValueError, "gpus must be whole with engine 'slurm'"),
        ({"job": lambda plan, models: {}}, TypeError, "can be pickled"),
    ],
)
def test_runs_that_are_refused(change, error, message, tmp_path):
    with pytest.raises(error, match=message):
        shadow.run(**{"plan": TINY, "job": shadow_jobs.failing, "out": tmp_path / "out", **change})


@pytest.mark.parametrize(("engine", "module"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_library_is_named_with_its_extra(engine, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"engine '{engine}' needs {module}: pip install 'cwfast\[{engine}\]'"):
        shadow.run(TINY, shadow_jobs.failing, tmp_path, engine=engine)


def test_results_that_are_no_signals(tmp_path):
    with pytest.raises(RuntimeError, match=r"job 0 .* failed: ValueError: values must have shape \[K, N, Q\]"):
        shadow.run(TINY, shadow_jobs.wrong_shape, tmp_path, workers=1, group=6)


@pytest.mark.parametrize(
    ("visible", "workers", "gpus", "slots"),
    [
        ("", 2, 0, ["", ""]),
        ("4,7", None, 1, ["4", "7"]),
        ("4,7", 1, 1, ["4"]),
        ("4,7", None, 0.5, ["4", "4", "7", "7"]),
        ("0,1,2,3,4", None, 2, ["0,1", "2,3"]),
    ],
)
def test_each_worker_has_its_devices(visible, workers, gpus, slots, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert engines.device_slots(workers, gpus, 1) == slots


@pytest.mark.parametrize(("workers", "gpus"), [(3, 1), (None, 3), (2, 2)])
def test_more_devices_than_there_are(workers, gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with pytest.raises(ValueError, match="must fit on the 2 GPUs there are"):
        engines.device_slots(workers, gpus, 1)


# -- training and signals


def test_signals_are_those_of_the_models_by_their_own_predict(tmp_path, log):
    found = shadow.signals("shadow_jobs:tiny_mirrored", tmp_path / "out", models=4, seed=2, group=2, workers=1)
    task, defense = shadow_jobs.tiny()
    plan = shadow.Plan.load(tmp_path / "out" / "plan.json")
    assert plan.sha256 == shadow.Plan.halves(task.dataset.pool, task.dataset.reference, 4, 2).sha256
    assert found["phi"].shape == (4, 40, 2)
    assert torch.equal(found.membership, plan.membership)
    assert torch.equal(found.labels, task.dataset.targets[10:50])
    for model in range(4):  # one by one, in float64 from the logits: another way to the same numbers
        one = defense.fit(task, plan.train_ids(model), plan.reference, plan.seeds[model])
        for query, inputs in enumerate(shadow_jobs.mirrored(task.dataset.inputs[plan.ids])):
            expected = torch.nn.functional.cross_entropy(one.predict(inputs).double(), found.labels, reduction="none")
            torch.testing.assert_close(found["loss"][model, :, query].double(), expected, rtol=1e-3, atol=1e-4)
    manifest = found.manifest
    (name,) = manifest["defense"]
    assert name == "PlainTraining"
    assert re.fullmatch("cwfast.training:cross_entropy [0-9a-f]{16}", manifest["defense"][name]["loss"])
    assert re.fullmatch("shadow_jobs:mirrored [0-9a-f]{16}", manifest["queries"])
    assert manifest["seeds"] == [2000, 2001, 2002, 2003]
    assert manifest["dataset"] == "tiny"
    assert manifest["recipe"]["epochs"] == 2
    assert manifest["data"] == shadow.Training("shadow_jobs:tiny").manifest["data"]
    assert mia.audit(found, attacks=("loss",), plan={**plan.expected, "defense": manifest["defense"]})


def test_a_description_tells_defenses_apart_and_no_addresses():
    task, _ = shadow_jobs.tiny()
    first, same, other = (shadow.Training((task, CWRF(rate, loss=RelaxLoss(0.5)))) for rate in (0.1, 0.1, 0.2))
    assert first.manifest == same.manifest
    assert first.manifest != other.manifest
    assert "0x" not in json.dumps(first.manifest)
    loss = first.manifest["defense"]["CWRF"]["loss"]["RelaxLoss"]
    assert (loss["alpha"], loss["upper"]) == (0.5, 1.0)
    changed = Task(shadow_jobs.network, task.dataset, Recipe(lr=0.2, batch_size=8, epochs=2))
    assert shadow.Training((changed, CWRF(0.1, loss=RelaxLoss(0.5)))).manifest != first.manifest


def function(body, **scope):
    """A lambda, as if it were written in another state of the same file."""
    return eval(f"lambda x: {body}", {"__name__": "mine", **scope})


class Thing:
    """An object of this attribute."""

    def __init__(self, value):
        self.value = value


def of_changed(base, body):
    return type(base.__name__, (base,), {"forward": function(body), "__module__": "mine"})


BIG = torch.zeros(5000)


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (BIG, BIG.clone(), BIG.index_fill(0, torch.tensor([2500]), 1)),  # where a repr has an ellipsis
        (BIG, BIG.clone(), BIG.to(torch.bfloat16)),
        (BIG.numpy(), BIG.clone().numpy(), BIG.index_fill(0, torch.tensor([2500]), 1).numpy()),
        (function("x + 1"), function("x + 1"), function("x + 2")),
        (function("x.cos()"), function("x.cos()"), function("x.sin()")),
        (function("[y for y in x if y]"), function("[y for y in x if y]"), function("[y for y in x if not y]")),
        (function("x in {'a', 'b'}"), function("x in {'b', 'a'}"), function("x in {'a', 'c'}")),
        *[(make(1), make(1), make(2)) for make in (lambda v: lambda: v, lambda v: lambda x=v: x, Thing)],
        (functools.partial(min, 1), functools.partial(min, 1), functools.partial(min, 2)),
        (Thing(BIG), Thing(BIG.clone()), Thing(BIG + 1)),
        (Thing(1).__init__, Thing(1).__init__, Thing(2).__init__),
        ({1, 2}, {2, 1}, {1, 3}),
        (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)),  # not in its repr
        (nn.CrossEntropyLoss(BIG), nn.CrossEntropyLoss(BIG.clone()), nn.CrossEntropyLoss(BIG + 1)),
        (of_changed(nn.Module, "x")(), of_changed(nn.Module, "x")(), of_changed(nn.Module, "x * 2")()),
        (of_changed(Thing, "x"), of_changed(Thing, "x"), of_changed(Thing, "x * 2")),
        (nn.functional.relu, nn.functional.relu, nn.functional.gelu),
        (torch.float32, torch.float32, torch.float64),
    ],
)
def test_what_is_changed_is_described_otherwise(one, same, other):
    assert json.dumps(describe(one)) == json.dumps(describe(same))
    assert describe(one) != describe(other)
    assert "0x" not in json.dumps(describe(one))


def test_a_thing_that_holds_itself_is_described():
    thing = Thing([])
    thing.value.append(thing)
    assert describe(thing)["Thing"]["value"] == ["itself"]


def the_same():
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))


def zeroed():
    model = shadow_jobs.network()
    nn.init.zeros_(model[2].bias)
    return model


def wider():
    return nn.Sequential(nn.Linear(5, 17), nn.ReLU(), nn.Linear(17, 3))


@pytest.mark.parametrize(("make", "entry"), [(the_same, None), (zeroed, "model.sha256"), (wider, "model.module")])
def test_a_changed_model_is_seen(make, entry):
    task, defense = shadow_jobs.tiny()
    before = shadow.Training((task, defense)).manifest
    differs = difference(before, shadow.Training((dataclasses.replace(task, make_model=make), defense)).manifest)
    assert (differs and differs[0]) == entry


SCALE = 1


class Scaled(nn.Sequential):
    """By a number that neither its weights nor its code show."""

    def forward(self, x):
        return super().forward(x) * SCALE


def test_a_model_is_told_by_its_answers(monkeypatch):
    task, defense = shadow_jobs.tiny()
    job = shadow.Training((dataclasses.replace(task, make_model=lambda: Scaled(*shadow_jobs.network())), defense))
    before = job.manifest
    monkeypatch.setitem(globals(), "SCALE", 2)
    assert difference(before, job.manifest)[0] == "answers"


def test_the_manifest_is_the_same_whatever_the_number_of_threads():
    def orthogonal():
        model = nn.Sequential(nn.Linear(5, 300), nn.ReLU(), nn.Linear(300, 300))
        nn.init.orthogonal_(model[2].weight)
        return model

    task, defense = shadow_jobs.tiny()
    job = shadow.Training((dataclasses.replace(task, make_model=orthogonal), defense))
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(job.manifest)
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_a_model_without_float64_is_told_by_its_weights():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = shadow_jobs.network()

        def forward(self, x):
            return self.inner(x.float())

    task, defense = shadow_jobs.tiny()
    manifest = shadow.Training((dataclasses.replace(task, make_model=Single), defense)).manifest
    assert manifest["answers"] is None
    assert manifest["model"]["sha256"]


@pytest.mark.parametrize(
    ("change", "entry"),
    [
        (lambda s: s["versions"].update(torch="1.0"), "versions.torch"),
        (lambda s: s["manifest"].update(code="another"), "manifest.code"),
    ],
)
def test_a_resume_after_a_change_is_refused_by_the_first_entry_that_differs(change, entry, out):
    settings = json.loads((out / "run.json").read_text())
    change(settings)
    (out / "run.json").write_text(json.dumps(settings))
    with pytest.raises(
        CheckpointError, match=f"must be this run's; its {entry} is '[^']*', this run's is '[^']*': use"
    ):
        shadow.run(TINY, shadow_jobs.with_state, out, group=3)


def test_a_worker_of_other_versions_does_nothing(tmp_path, monkeypatch):
    settings = {"group": 6, "threads": 1, "manifest": manifest_of(shadow_jobs.with_state)}
    settings["versions"] = {**versions(), "torch": "1.0"}
    told = Work(TINY, shadow_jobs.with_state, tmp_path, settings)(0)
    assert "as where the run began; its versions.torch was '1.0' and is" in told


def test_long_entries_are_cut():
    assert difference({"a": {"b": "x" * 900}}, {"a": {"b": 1}}) == ("a.b", "'" + "x" * 199 + "...", "1")


def test_a_source_that_gives_other_data_in_each_process_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="must describe itself in each process as where the run began; its data was"):
        shadow.signals("shadow_jobs:changing", tmp_path, models=2, workers=1)


def test_an_odd_pool_loses_its_last_sample(tmp_path):
    task, defense = shadow_jobs.tiny()
    task.dataset.pool.resize_(39)
    found = shadow.signals((task, defense), tmp_path, models=2, workers=1)
    assert found.ids.tolist() == list(range(10, 48))


@pytest.mark.parametrize("setup", [(1,), (1, 2), (*shadow_jobs.tiny(), 3), (shadow_jobs.tiny()[0], PlainTraining)])
def test_sources_that_give_something_else(setup, tmp_path):
    with pytest.raises(TypeError, match="must give"):
        shadow.signals(setup, tmp_path)
