"""Broken and hostile files: an error that says what is wrong, or what the file says; nothing else is written to.

Seeded, so that every run tries the same files. tests/sanitize.py runs it under the address sanitizer, with
CWFAST_FUZZ times as many of them.
"""

import json
import os
import random
import struct
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cwfast import MaskSet, _mask_files, ops, reference, rewind_, select
from cwfast.checkpoint import Checkpoint, reader
from cwfast.errors import CheckpointError

SEEDS = range(8)
COUNT = 50 * int(os.environ.get("CWFAST_FUZZ", "1"))  # files of each seed
BLOCK = reference.BLOCK
SHAPES = {"a.weight": (3, BLOCK // 2 + 5), "b.weight": (70,), "c": (0, 3), "d": (1,), "e": (130,)}
EDGES = (
    -1,
    0,
    1,
    63,
    64,
    BLOCK - 1,
    BLOCK,
    BLOCK + 1,
    2**31 - 1,
    2**31,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
)
GUARD = 128  # entries on both sides of a weight that nothing may change
DTYPES = [*reader.DTYPES, "F4", "", 3, None]


class Model(nn.Module):
    """Parameters of zeros by the names of SHAPES."""

    def __init__(self):
        super().__init__()
        for name, shape in SHAPES.items():
            place, _, last = name.rpartition(".")
            inner = nn.Module() if place else self
            inner.register_parameter(last, nn.Parameter(torch.zeros(shape), requires_grad=False))
            if place:
                self.add_module(place, inner)


def masks_of(rng):
    torch.manual_seed(rng.randrange(2**31))
    share = rng.choice([0.0, 0.003, 0.05, 0.5])
    return MaskSet.from_masks({name: torch.rand(shape) < share for name, shape in SHAPES.items()})


def bump(rng, value):
    """Another integer."""
    return rng.choice([*EDGES, value + rng.choice([-8, -4, -1, 1, 4, 8]), value * 2, value // 2, -value])


def split(content):
    """(header, data) of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])


def joined(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def mutate_header(rng, header, data):
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return
    item = header[rng.choice(names)]
    what = rng.randrange(8)
    if what == 0:
        item["data_offsets"][rng.randrange(2)] = bump(rng, item["data_offsets"][rng.randrange(2)])
    elif what == 1:
        by = rng.choice([-8, -1, 1, 8])
        item["data_offsets"] = [end + by for end in item["data_offsets"]]
    elif what == 2 and item["shape"]:
        at = rng.randrange(len(item["shape"]))
        item["shape"][at] = bump(rng, item["shape"][at])
    elif what == 3:
        item["shape"] = rng.choice([[], [0], [1] * 70, [2**32, 2**32], [0, 2**62, 4], [*item["shape"], 1], "x", None])
    elif what == 4:
        item["dtype"] = rng.choice(DTYPES)
    elif what == 5:
        del header[rng.choice(names)]
    elif what == 6:
        header[rng.choice(["", "z/low", "b.weight/bits", "\u0000", "../x"])] = header.pop(rng.choice(names))
    else:
        del item[rng.choice(list(item))]


def mutate_bytes(rng, content):
    what = rng.randrange(5)
    if what == 0:
        return content[: rng.randrange(len(content) + 1)]
    if what == 1:
        return content + bytes(rng.randrange(1, 20))
    content = bytearray(content)
    if what == 2:
        content[:8] = struct.pack("<q", rng.choice([-1, 0, 1, len(content), len(content) - 8, 2**62, 10**8]))
    (length,) = struct.unpack("<Q", content[:8])
    limit = min(len(content), 8 + length) if what == 3 else len(content)  # in the header, or anywhere
    for _ in range(rng.randrange(1, 6)):
        content[rng.randrange(limit)] = rng.randrange(256)
    return bytes(content)


def mutate_data(rng, header, data):
    for _ in range(rng.randrange(1, 6)):
        data[rng.randrange(len(data))] = rng.randrange(256)


def mutate_file(rng, path, mutate):
    """By ``mutate(rng, header, data)``, or by bytes."""
    content = path.read_bytes()
    if mutate is None:
        path.write_bytes(mutate_bytes(rng, content))
        return
    header, data = split(content)
    mutate(rng, header, data)
    path.write_bytes(joined(header, data))


def mutate_metadata(rng, metadata):
    what = rng.randrange(4)
    if what == 0:
        metadata[rng.choice(list(metadata))] = rng.choice(["", "x", "-1", "9" * 30, "[]", "{}", "null", "\u0663"])
    elif what == 1:
        del metadata[rng.choice(list(metadata))]
    else:
        shapes = json.loads(metadata["shapes"])
        name = rng.choice(list(shapes))
        if what == 2 and shapes[name]:
            shapes[name][rng.randrange(len(shapes[name]))] = bump(rng, rng.choice(shapes[name]))
        else:
            shapes[name] = rng.choice([None, [], [1.5], [True], {}, "x", [2**61, 2], [0, 2**63], [[1]]])
        metadata["shapes"] = json.dumps(shapes)


def mutate_lists(rng, tensors):
    """Other positions, offsets or bits, behind a correct SHA-256."""
    name = rng.choice([name for name, tensor in tensors.items() if tensor.numel()])
    flat = tensors[name].reshape(-1)
    at = rng.randrange(len(flat))
    what = rng.randrange(4)
    if what == 0:
        tensors[name] = flat[: rng.randrange(len(flat))].clone()
    elif what == 1:
        tensors[name] = torch.cat([flat, flat[:1]])
    elif what == 2:
        tensors[name] = flat.to(rng.choice([torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32]))
    elif flat.dtype == torch.uint16:
        flat[at] = rng.choice([0, 1, 69, 70, BLOCK - 1, int(flat[rng.randrange(len(flat))])])
    elif flat.dtype == torch.int64:
        flat[at] = rng.choice([v for v in EDGES if -(2**63) <= v < 2**63] + [int(flat[at]) + d for d in (-1, 1)])
    else:
        flat[at] = rng.randrange(256)


def guarded(rng, shape):
    """A weight of zeros: between guards, or (for the sanitizer) with memory of its own."""
    numel = torch.Size(shape).numel()
    if rng.random() < 0.5:
        return torch.zeros(shape), None
    memory = torch.zeros(GUARD + numel + GUARD)
    memory[:GUARD] = memory[GUARD + numel :] = 5
    return memory[GUARD : GUARD + numel].reshape(shape), memory


def attempt(run):
    """(result, None); or (None, message) for an error of an allowed kind: the others pass through."""
    try:
        return run(), None
    except (ValueError, TypeError) as error:  # CheckpointError is a ValueError
        return None, str(error)


def use(rng, masks):
    """Whatever was loaded must be a set of entries, and rewind these and no others."""
    if masks.numel > 10 * BLOCK or not masks.names:
        return
    weights, memories = zip(*(guarded(rng, shape) for shape in masks.shapes.values()), strict=True)
    given = [masks.picks(name) if rng.random() < 0.5 else masks.bits[name] for name in masks.names]
    ops.rewind_(weights, [torch.ones_like(w) for w in weights], given)
    for name, weight, memory in zip(masks.names, weights, memories, strict=True):
        assert torch.equal(weight.bool(), masks[name])
        assert int(masks[name].sum()) == masks.counts[name]
        assert memory is None or bool((memory[:GUARD] == 5).all() and (memory[GUARD + weight.numel() :] == 5).all())
    values = ops.gather(weights, given)
    assert [len(v) for v in values] == list(masks.counts.values())
    ops.scatter_(weights, given, [torch.full_like(v, 3) for v in values])
    assert sum(int((w == 3).sum()) for w in weights) == masks.total


@pytest.mark.parametrize("seed", SEEDS)
def test_mask_files(tmp_path, seed):
    rng, path, loaded, messages = random.Random(seed), tmp_path / "m.safetensors", 0, []
    for turn in range(COUNT):
        masks_of(rng).save(path)
        if turn % 4 < 2:
            mutate_file(rng, path, mutate_header if turn % 4 else None)
        else:
            file = Checkpoint(path)
            tensors, metadata = {name: file.tensor(name) for name in file.entries}, file.metadata
            if turn % 4 == 2:
                mutate_lists(rng, tensors)
                metadata["sha256"] = _mask_files.digest({key: [tensor.reshape(-1)] for key, tensor in tensors.items()})
            else:
                mutate_metadata(rng, metadata)
            save_file(tensors, path, metadata=metadata)
        try:
            masks = MaskSet.load(path)
        except CheckpointError as error:
            messages.append(str(error))
            continue
        loaded += 1
        use(rng, masks)
    assert 0 < loaded < COUNT  # some mutations are harmless: the files are not all refused, for another reason
    assert all(str(path) in message and "must" in message for message in messages)


@pytest.mark.parametrize("seed", SEEDS)
def test_score_and_weight_files(tmp_path, seed):
    """A folder with an index: selected from, and rewound from."""
    rng, folder = random.Random(seed), tmp_path / "s"
    folder.mkdir()
    read = 0
    for turn in range(COUNT):
        scores = {name: torch.rand(shape) for name, shape in SHAPES.items()}
        files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(scores)}
        for file in set(files.values()):
            save_file({n: s for n, s in scores.items() if files[n] == file}, folder / file)
        index = folder / reader.INDEX
        index.write_text(json.dumps({"weight_map": files}))
        target = folder / rng.choice(list(files.values()))
        mutate_file(rng, *((target, None), (target, mutate_header), (target, mutate_data), (index, None))[turn % 4])
        model = Model()
        found, message = attempt(lambda: Checkpoint(folder))
        k = rng.randrange(1000)
        if found is not None:
            options = {"k": k, "nan": rng.choice(["raise", "skip"])}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of selected zeros
                masks, message = attempt(lambda options=options: select(folder, **options))
        if message is None:
            assert masks.total == k
            assert masks.shapes == found.shapes
            if any(found.shapes.get(name) != shape for name, shape in SHAPES.items()):
                continue  # another model's
            rewound = MaskSet({name: masks.picks(name) for name in SHAPES}, SHAPES)
            _, message = attempt(lambda model=model, rewound=rewound: rewind_(model, rewound, folder))
        if message is not None:
            assert "must" in message
            continue
        read += 1
        for name, weight in model.named_parameters():
            assert torch.equal(weight.bool(), masks[name] & (found.tensor(name) != 0))
    assert 0 < read < COUNT


@pytest.mark.parametrize("seed", SEEDS)
def test_lists_given_to_the_operators(seed):
    """What no file check has seen: the kernels' own check of positions and offsets."""
    rng, used = random.Random(seed), 0
    for _ in range(COUNT):
        masks = masks_of(rng)
        picks = {}
        for name in masks.names:
            given = masks.picks(name) if rng.random() < 0.7 else masks.bits[name]
            parts = given if isinstance(given, tuple) else (given,)
            picks |= {f"{name}/{i}": part.clone() for i, part in enumerate(parts)}
        mutate_lists(rng, picks)
        given = [
            tuple(picks[f"{n}/{i}"] for i in range(2)) if f"{n}/1" in picks else picks[f"{n}/0"] for n in masks.names
        ]
        pairs = [guarded(rng, shape) for shape in SHAPES.values()]
        weights = [weight for weight, _ in pairs]
        ones = [torch.ones_like(w) for w in weights]
        _, message = attempt(lambda w=weights, ones=ones, given=given: ops.rewind_(w, ones, given))
        if message is None:
            used += 1
            assert [int(w.sum()) for w in weights] == [len(v) for v in ops.gather(weights, given)]
        else:
            assert "must" in message
            assert not any(w.any() for w in weights)  # checked before anything is written
        for weight, memory in pairs:
            assert memory is None or memory.sum() == 10 * GUARD + weight.sum()
    assert 0 < used < COUNT
