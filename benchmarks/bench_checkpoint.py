"""Selection and rewinding of a checkpoint on disk against reading and writing the same bytes, and their memory.

``over_copy``: the time of ``rewind_folder`` over that of reading model and base and writing the model, fsynced;
``select_over_read``: of selecting, which reads the scores twice, over reading them once; ``both``: of both steps over
all of that. What the system keeps of files in memory is the same for all, since they take turns.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cwfast.benchmarks import _harness
from pytest_benchmark.fixture import BenchmarkFixture

import cwfast
from cwfast.checkpoint import Checkpoint
from cwfast.llm.folders import rewind_folder

NUMEL = _harness.by_size(tiny=10**6, normal=10**8, full=43 * 10**8)  # full: 8.6 GB in bfloat16
ROUNDS = _harness.by_size(tiny=2, normal=3, full=2)
BLOCK = 1 << 24  # entries written at a time; the last is cut
WIDTH = 4096
LIMIT = 2 << 30  # bytes of memory that both steps may take


def _write(folder: Path, numel: int, seed: int) -> None:
    """A folder as transformers writes it: bfloat16 in shards of up to a quarter; random numbers, block by block."""
    folder.mkdir()
    rows = numel // 4 // WIDTH
    generator = torch.Generator().manual_seed(seed)
    block = torch.rand(BLOCK, generator=generator).bfloat16()
    weight_map = {}
    for shard in range(4):
        file, name = f"model-{shard + 1:05}-of-00004.safetensors", f"layers.{shard}.weight"
        size = rows * WIDTH
        header = json.dumps({name: {"dtype": "BF16", "shape": [rows, WIDTH], "data_offsets": [0, 2 * size]}}).encode()
        header += b" " * (-len(header) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            for begin in range(0, size, BLOCK):
                part = block.roll(shard + begin // BLOCK)[: min(BLOCK, size - begin)]
                out.write(part.view(torch.int16).numpy().data)
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _copy(model: Path, base: Path, out: Path) -> None:
    """Every byte of both is read, those of the model are written."""
    out.mkdir()
    buffer = memoryview(bytearray(2 * BLOCK))
    for file in sorted(model.glob("*.safetensors")):
        with (
            open(base / file.name, "rb", buffering=0) as initial,
            open(file, "rb", buffering=0) as trained,
            open(out / file.name, "wb", buffering=0) as target,
        ):
            while count := trained.readinto(buffer):
                target.write(buffer[:count])
                initial.readinto(buffer)
            os.fsync(target.fileno())


def _read(folder: Path) -> None:
    """Every byte once."""
    buffer = memoryview(bytearray(2 * BLOCK))
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as given:
            while given.readinto(buffer):
                pass


def both_steps(folder: str) -> Iterator[None]:
    """For peak_memory: select, then rewind."""
    where = Path(folder)
    tiny = {"w": torch.rand(1000)}
    cwfast.select(tiny, k=10).save(where / "warm")
    yield
    cwfast.select(where / "scores", rate=0.01).save(where / "mask")
    rewind_folder(where / "model", where / "base", where / "mask", where / "peak")


@pytest.mark.parametrize("rate", [0.01])
def test_rewind(benchmark: BenchmarkFixture, rate: float) -> None:
    """A folder in bfloat16, 1% of its weights."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        for seed, name in enumerate(("model", "base", "scores")):
            _write(where / name, NUMEL, seed)
        peak = _harness.peak_memory(both_steps, folder)
        if peak is not None and peak > LIMIT:
            raise AssertionError(f"selecting and rewinding {NUMEL:.0e} weights must take at most {LIMIT}; got {peak}")
        _check(where)
        shutil.rmtree(where / "peak")
        made = where / "made"
        variants = {
            "cwfast": lambda: rewind_folder(where / "model", where / "base", where / "mask", made),
            "copy": lambda: _copy(where / "model", where / "base", made),
            "select": lambda: cwfast.select(where / "scores", rate=rate),
            "read": lambda: _read(where / "scores"),
        }
        times = _harness.interleaved(variants, ROUNDS, setup=lambda _: shutil.rmtree(made, ignore_errors=True))
        both = {
            "cwfast": [a + b for a, b in zip(times["cwfast"], times["select"], strict=True)],
            "copy": [a + b for a, b in zip(times["copy"], times["read"], strict=True)],
        }
        ratios = {
            "over_copy": _harness.ratio(times, "cwfast", "copy"),
            "select_over_read": _harness.ratio(times, "select", "read"),
            "both": _harness.ratio(both, "cwfast", "copy"),
        }
        case = f"checkpoint rewind bfloat16 N={NUMEL:.1e} k={rate:.0%}".replace("e+0", "e")
        tiny = where / "tiny"
        for seed, name in enumerate(("model", "base")):
            tiny.mkdir(exist_ok=True)
            _write(tiny / name, 1 << 16, seed)
        _harness.report(
            benchmark,
            case,
            times,
            lambda: cwfast.select(tiny / "model", rate=0.01),
            ratios=ratios,
            numel=NUMEL,
            bytes={"peak_memory": peak, "checkpoint": 2 * NUMEL},
        )


def _check(where: Path) -> None:
    """The first and the last piece of each tensor hold what they must."""
    masks = cwfast.MaskSet.load(where / "mask")
    model, base, made = (Checkpoint(where / name) for name in ("model", "base", "peak"))
    if masks.total != int(masks.numel * 0.01):
        raise AssertionError(f"{masks.total} of {masks.numel} weights are selected")
    name = masks.names[0]
    size = 1 << 16
    for trained, initial, found in zip(*(c.pieces(name, size) for c in (model, base, made)), strict=True):
        mask = cwfast.reference.unpack(cwfast._picks.part(masks.bits[name], 0, size), len(trained))
        expected = torch.where(mask, initial, trained)
        if not torch.equal(expected, found):
            raise AssertionError(f"{name} must be rewound where the mask is on, and nowhere else")
        break
