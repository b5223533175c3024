"""Selection and rewinding of a checkpoint on disk against reading and writing the same bytes, and their memory.

``over_copy``: the time of ``rewind_folder`` over that of reading model and base and writing the model, fsynced;
``select_over_read``: of selecting over reading the scores once; ``both``: of both steps over all of that. What the
system keeps of files in memory is the same for all: each begins when its inputs have just been read.
"""

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cwfast.benchmarks import _harness
from pytest_benchmark.fixture import BenchmarkFixture

import cwfast
from cwfast.checkpoint import Checkpoint
from cwfast.llm.folders import rewind_folder

BLOCK = 1 << 24  # entries written at a time; the last is cut
LIMIT = 2 << 30  # bytes of memory that both steps may take
Shapes = list[dict[str, tuple[int, ...]]]


def _quarters(numel: int) -> Shapes:
    """Four shards of one tensor each."""
    return [{f"layers.{shard}.weight": (numel // 4 // 4096, 4096)} for shard in range(4)]


def _llama(layers: int = 32, width: int = 4096, hidden: int = 14336, keys: int = 1024, words: int = 128256) -> Shapes:
    """The tensors of Llama 3 8B by default (8.03e9 weights), four layers a shard."""
    shards: Shapes = []
    for i in range(layers):
        shards += [] if i % 4 else [{}]
        linear = {"self_attn.q": (width, width), "self_attn.k": (keys, width), "self_attn.v": (keys, width),
                  "self_attn.o": (width, width), "mlp.gate": (hidden, width), "mlp.up": (hidden, width),
                  "mlp.down": (width, hidden)}  # fmt: skip
        shards[-1] |= {f"model.layers.{i}.{name}_proj.weight": shape for name, shape in linear.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        shards[-1] |= {f"model.layers.{i}.{name}.weight": (width,) for name in norms}
    last = {
        "model.embed_tokens.weight": (words, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (words, width),
    }
    return [*shards, last]


def _numel(shards: Shapes) -> int:
    return sum(math.prod(shape) for shapes in shards for shape in shapes.values())


NUMEL = _harness.by_size(tiny=10**6, normal=10**8, full=43 * 10**8)  # full: 8.6 GB in bfloat16
ROUNDS = _harness.by_size(tiny=2, normal=3, full=2)
LLAMA = _harness.by_size(tiny=_llama(4, 16, 40, 8, 100), normal=_llama(8, 1024, 2816, 512, 32000), full=_llama())


def _write(folder: Path, shards: Shapes, seed: int, sparse: bool = False) -> None:
    """A folder as transformers writes it, in bfloat16; random numbers, block by block, or zeros that are not stored."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    block = torch.rand(BLOCK, generator=generator).bfloat16()
    weight_map, drawn = {}, 0
    for i, shapes in enumerate(shards):
        file, end, entries = f"model-{i + 1:05}-of-{len(shards):05}.safetensors", 0, {}
        for name, shape in shapes.items():
            begin, end = end, end + 2 * math.prod(shape)
            entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            weight_map[name] = file
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            for begin in range(0, 0 if sparse else end // 2, BLOCK):
                drawn += 1
                out.write(block.roll(drawn)[: min(BLOCK, end // 2 - begin)].view(torch.int16).numpy().data)
            out.truncate(8 + len(header) + end)
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
        _make(where, _quarters(NUMEL), sparse=False)
        peak = _peak(folder, NUMEL)
        _check(where)
        shutil.rmtree(where / "peak")
        made = where / "made"
        variants = {
            "cwfast": lambda: rewind_folder(where / "model", where / "base", where / "mask", made),
            "copy": lambda: _copy(where / "model", where / "base", made),
            "select": lambda: cwfast.select(where / "scores", rate=rate),
            "read": lambda: _read(where / "scores"),
        }

        def prepare(name: str) -> None:
            shutil.rmtree(made, ignore_errors=True)
            for folder in ("scores",) if name in ("select", "read") else ("model", "base"):
                _read(where / folder)

        times = _harness.interleaved(variants, ROUNDS, setup=prepare)
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
            _write(tiny / name, _quarters(1 << 16), seed)
        _harness.report(
            benchmark,
            case,
            times,
            lambda: cwfast.select(tiny / "model", rate=0.01),
            ratios=ratios,
            numel=NUMEL,
            bytes={"peak_memory": peak, "checkpoint": 2 * NUMEL},
        )


def test_llama(benchmark: BenchmarkFixture) -> None:
    """The shapes of Llama 3 8B; both steps once, then the copy once. The base is all zeros, in sparse files."""
    numel = _numel(LLAMA)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        _make(where, LLAMA, sparse=True)
        begin = time.perf_counter()
        peak = _peak(folder, numel)
        times = {"cwfast": [time.perf_counter() - begin]}
        _check(where)
        shutil.rmtree(where / "peak")
        begin = time.perf_counter()
        _read(where / "scores")
        _copy(where / "model", where / "base", where / "made")
        times["copy"] = [time.perf_counter() - begin]
        case = f"checkpoint select and rewind bfloat16 Llama N={numel:.1e} k=1%, sparse base, one run".replace(
            "e+0", "e"
        )
        tiny = {"w": torch.rand(1000)}
        _harness.report(
            benchmark,
            case,
            times,
            lambda: cwfast.select(tiny, k=10),
            ratios={"both": _harness.ratio(times, "cwfast", "copy")},
            numel=numel,
            bytes={"peak_memory": peak, "checkpoint": 2 * numel},
        )


def _make(where: Path, shards: Shapes, sparse: bool) -> None:
    """Model, base and scores, where the disk has room for them and for a result."""
    needed = 2 * _numel(shards) * (4 - sparse)
    free = shutil.disk_usage(where).free
    if needed > 0.98 * free:
        pytest.skip(f"{where.parent} must have {needed:.1e} bytes free; it has {free:.1e}")
    for seed, name in enumerate(("model", "base", "scores")):
        _write(where / name, shards, seed, sparse=sparse and name == "base")


def _peak(folder: str, numel: int) -> int | None:
    peak = _harness.peak_memory(both_steps, folder)
    if peak is not None and peak > LIMIT:
        raise AssertionError(f"selecting and rewinding {numel:.1e} weights must take at most {LIMIT}; got {peak}")
    return peak


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
