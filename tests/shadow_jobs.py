"""What the processes of test_shadow.py do: a module of its own, since they import it by name.

``CWFAST_TEST_LOG`` names a file to which jobs append what they begin and end, and ``{it}.hold-{model}`` one that keeps
the job of a model busy as long as it is there.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from cwfast import shadow
from cwfast.data import Dataset
from cwfast.defense.baselines import PlainTraining
from cwfast.training import Recipe, Task

TINY = shadow.Plan.halves(torch.arange(10, 50), torch.arange(50, 60), 6, seed=3)


def network():
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))


def tiny():
    """A task of 60 samples and its defense."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 5, generator=generator)
    targets = torch.randint(0, 3, (60,), generator=generator)
    roles = torch.arange(10, 50), torch.arange(50, 60), torch.arange(10)
    data = Dataset("tiny", inputs, targets, *roles, torch.zeros(60, dtype=torch.bool), "drawn from a seed")
    return Task(network, data, Recipe(lr=0.1, batch_size=8, epochs=2)), PlainTraining()


def tiny_mirrored():
    return *tiny(), mirrored


def mirrored(inputs):
    return [inputs, -inputs]


def changing():
    """A source that breaks its promise: other data in each process."""
    task, defense = tiny()
    task.dataset.inputs.fill_(os.getpid())
    return task, defense


def note(event, models):
    with open(os.environ["CWFAST_TEST_LOG"], "ab", buffering=0) as log:
        log.write(f"{event} {models[0]} {os.getpid()}\n".encode())


def train(plan, models):
    """A tiny fleet, and what happened to it."""
    note("began", models)
    while any(Path(f"{os.environ['CWFAST_TEST_LOG']}.hold-{model}").exists() for model in models):
        time.sleep(0.02)
    found = shadow.Training("shadow_jobs:tiny")(plan, models)
    note("ended", models)
    return found


def surroundings(plan, models):
    """What a job finds, as signals."""
    import random

    import numpy as np

    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    found = [int(os.environ[name]) for name in names]
    found += [torch.get_num_threads(), os.environ["CUDA_VISIBLE_DEVICES"] == "", len(sys.argv)]
    loss = torch.tensor(found, dtype=torch.float64).expand(len(models), len(plan.ids), -1)
    drawn = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)  # noqa: NPY002
    print("this must not reach the driver's stdout")
    return {"loss": loss, "phi": drawn.repeat(2).expand_as(loss)}


def with_state(plan, models):
    values = {"loss": torch.ones(len(models), len(plan.ids), 1)}
    return values, {f"weight-{model}": torch.full((3,), float(model)) for model in models}


def failing(plan, models):
    note("began", models)
    if 3 in models:
        raise ArithmeticError("three is one\ntoo many")
    return {"loss": torch.ones(len(models), len(plan.ids), 1)}


def exiting(plan, models):
    note("began", models)
    sys.exit("no more")


def dying(plan, models):
    note("began", models)
    if 3 in models:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"loss": torch.ones(len(models), len(plan.ids), 1)}


def wrong_shape(plan, models):
    return {"loss": torch.ones(1, 2)}


def main(out, engine, *options):
    """A driver of its own: python -m shadow_jobs OUT ENGINE."""
    more = {"options": {"cluster": "local", "timeout_min": 5}} if engine == "slurm" else {}
    shadow.run(TINY, "shadow_jobs:train", out, engine=engine, workers=2, **more)


if __name__ == "__main__":
    main(*sys.argv[1:])
