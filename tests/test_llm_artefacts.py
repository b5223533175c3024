"""Sparse artefacts: apply makes the model that was meant, revert the one before, bit for bit; nothing else is made."""

import errno
import json
import math
import os
import random
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cwfast
from cwfast import MaskSet, _artefact_files, _mask_files
from cwfast._artefact_files import ArtefactFile
from cwfast._mask_files import MaskFile
from cwfast.checkpoint import Checkpoint, reader
from cwfast.checkpoint.identity import SCORES, tensor_hashes
from cwfast.cli import main
from cwfast.errors import CheckpointError
from cwfast.llm import folders
from cwfast.llm.artefacts import apply_artefact, make_artefact
from cwfast.llm.folders import rewind_folder

SHAPES = {"embed.weight": (300, 256), "layers.0.w": (70_001,), "layers.0.b": (7,), "layers.1.w": (256, 300), "s": ()}
SHARES = {"embed.weight": 0.01, "layers.0.w": 0.4, "layers.0.b": 1.0, "layers.1.w": 0.0}  # list, bits, all, none
WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights(seed, dtype):
    """Any bits: NaN with payloads, infinities, negative zeros and denormal numbers among them."""
    generator = torch.Generator().manual_seed(seed)
    width = WIDTHS[dtype.itemsize]
    low, high = (0, 256) if width == torch.uint8 else (torch.iinfo(width).min, torch.iinfo(width).max)
    return {n: torch.randint(low, high, s, generator=generator, dtype=width).view(dtype) for n, s in SHAPES.items()}


def write(folder, tensors, shards=2):
    folder.mkdir(parents=True)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n] for n in list(tensors)[i::shards]}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(list(tensors)[i::shards], file)
    (folder / reader.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return folder


def masks_of(**about):
    generator = torch.Generator().manual_seed(3)
    masks = MaskSet.from_masks({n: torch.rand(SHAPES[n], generator=generator) < share for n, share in SHARES.items()})
    return MaskSet({n: masks.picks(n) for n in masks.names}, masks.shapes, **about)


class Given:
    """Model, base and mask on disk."""

    def __init__(self, path, dtype=torch.bfloat16, **about):
        self.path, self.masks = path, masks_of(**about)
        self.model, self.base = write(path / "model", weights(1, dtype)), write(path / "base", weights(2, dtype), 3)
        self.mask = path / "mask.safetensors"
        self.masks.save(self.mask)

    def make(self, model=None, name="artefact.safetensors", **options):
        make_artefact(model or self.model, self.mask, self.path / name, **options)
        return self.path / name

    def rewound(self):
        if not (self.path / "rewound").exists():
            rewind_folder(self.model, self.base, self.mask, self.path / "rewound")
        return self.path / "rewound"


@pytest.fixture
def given(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "PIECE", 1 << 16)
    monkeypatch.setattr(Checkpoint.pieces, "__defaults__", (1 << 16,))
    return Given(tmp_path)


def contents(path):
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    return {f.name: f.read_bytes() for f in files}


def same_shards(a, b):
    files = sorted(f.name for f in a.glob("*.safetensors*"))
    assert files == sorted(f.name for f in b.glob("*.safetensors*"))
    assert all((a / f).read_bytes() == (b / f).read_bytes() for f in files)


# -- what it makes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn], ids=str)
def test_apply_and_revert_are_exact_for_all_bits(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(Checkpoint.pieces, "__defaults__", (1 << 16,))
    given = Given(tmp_path, dtype)
    there, back = given.make(base=given.base), given.make(name="undo.safetensors")
    done = apply_artefact(given.model, there, tmp_path / "fixed")
    assert done["rewound"] == given.masks.total
    same_shards(tmp_path / "fixed", given.rewound())
    apply_artefact(tmp_path / "fixed", back, tmp_path / "again")
    same_shards(tmp_path / "again", given.model)
    assert (tmp_path / "again" / "config.json").read_bytes() == (given.model / "config.json").read_bytes()


def test_the_values_can_come_from_the_rewound_model_and_apply_twice_is_apply_once(given):
    from_base, from_fixed = given.make(base=given.base), given.make(given.rewound(), "other.safetensors")
    a, b = load_file(from_base), load_file(from_fixed)
    assert {n: t.view(torch.uint8).tolist() for n, t in a.items()} == {
        n: t.view(torch.uint8).tolist() for n, t in b.items()
    }
    for source in (given.model, given.rewound()):
        out = given.path / f"from-{source.name}"
        apply_artefact(source, from_fixed, out)
        same_shards(out, given.rewound())


def test_the_file_is_a_mask_file_with_values_and_hashes(given):
    """Read by the safetensors library, which maps tensors into memory where they lie."""
    path = given.make(base=given.base, base_id="owner/name")
    file, found, initial = ArtefactFile(path), load_file(path), weights(2, torch.bfloat16)
    for name, mask in ((name, given.masks[name].flatten()) for name in given.masks.names):
        expected = initial[name].flatten().view(torch.int16)[mask]
        assert torch.equal(found[f"{name}/value"].view(torch.int16), expected)
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["format"], metadata["base_id"]) == ("cwfast-artefact/1", "owner/name")
    assert file.counts() == given.masks.counts
    base, fixed = Checkpoint(given.base), Checkpoint(given.rewound())
    assert file.base == tensor_hashes(base, [name for name in given.masks.names if name != "layers.1.w"])
    assert file.result == tensor_hashes(fixed, fixed.entries)
    assert list(given.path.glob(".*")) == [], "no temporary file is left"


def test_an_entry_takes_four_bytes_in_bfloat16(tmp_path):
    numel, k = 4_000_000, 40_000
    save_file({"w": torch.randn(numel).bfloat16()}, tmp_path / "model.safetensors")
    cwfast.select({"w": torch.rand(numel)}, k=k).save(tmp_path / "mask")
    done = make_artefact(tmp_path / "model.safetensors", tmp_path / "mask", tmp_path / "artefact")
    assert done["selected"] == k
    assert 4 * k < done["bytes"] < 4 * k + 8 * math.ceil(numel / 65_536) + 2000


def test_an_empty_mask_and_tensors_of_no_entries(tmp_path):
    tensors = {"a": torch.randn(9), "none": torch.empty(0, 3), "b": torch.randn(())}
    save_file(tensors, tmp_path / "model.safetensors")
    MaskSet.from_masks({n: torch.zeros_like(t, dtype=torch.bool) for n, t in tensors.items()}).save(tmp_path / "mask")
    make_artefact(tmp_path / "model.safetensors", tmp_path / "mask", tmp_path / "artefact")
    done = apply_artefact(tmp_path / "model.safetensors", tmp_path / "artefact", tmp_path / "out")
    assert done["rewound"] == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_memory_does_not_grow_with_the_model(tmp_path, python):
    """Model and base of 40 MB each, a mask of an eighth of it; the peak is what the process takes beyond its start."""
    numel = 5_000_000
    for name in ("model", "base"):
        save_file(
            {n: torch.full((numel,), float(len(name))).bfloat16() for n in "abcd"}, tmp_path / f"{name}.safetensors"
        )
    bits = {n: torch.full((numel // 8,), 1, dtype=torch.uint8) for n in "abcd"}
    MaskSet(bits, dict.fromkeys("abcd", (numel,))).save(tmp_path / "mask")
    save_file({"a": torch.ones(100)}, tmp_path / "small.safetensors")
    MaskSet.from_masks({"a": torch.ones(100, dtype=torch.bool)}).save(tmp_path / "small")
    done = python(
        f"""
from pathlib import Path
from cwfast import _picks
from cwfast.checkpoint import Checkpoint
from cwfast.llm.artefacts import apply_artefact, make_artefact
Checkpoint.pieces.__defaults__, _picks._STRIDE = (1 << 18,), 1 << 18  # everything that bounds memory, 16 times smaller
def resident(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) * 1024
here = Path({str(tmp_path)!r})
make_artefact(here / "small.safetensors", here / "small", here / "warm")
apply_artefact(here / "small.safetensors", here / "warm", here / "warmed")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = resident("VmRSS:")
make_artefact(here / "model.safetensors", here / "mask", here / "artefact", base=here / "base.safetensors")
apply_artefact(here / "model.safetensors", here / "artefact", here / "fixed")
print(resident("VmHWM:") - before)
"""
    )
    assert int(done.stdout) < 20_000_000  # pieces of 0.5 MB, some of them waiting to be written, of 40 MB


# -- interruptions


def test_a_stopped_run_goes_on(given, monkeypatch):
    path, real, seen = given.make(base=given.base), folders.rewrite, []

    def once(source, file, *rest):
        if seen:
            raise KeyboardInterrupt
        seen.append(file.name)
        return real(source, file, *rest)

    monkeypatch.setattr(folders, "rewrite", once)
    with pytest.raises(KeyboardInterrupt):
        apply_artefact(given.model, path, given.path / "out")
    monkeypatch.setattr(folders, "rewrite", lambda s, f, *rest: seen.append(f.name) or real(s, f, *rest))
    apply_artefact(given.model, path, given.path / "out", resume=True)
    assert seen == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    same_shards(given.path / "out", given.rewound())


def test_a_stopped_making_leaves_nothing(given):
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        given.make(progress=stop)
    assert sorted(path.name for path in given.path.iterdir()) == ["base", "mask.safetensors", "model"]


# -- what is refused


def refuse_apply(given, path, message, model=None, **options):
    model = model or given.model
    before = contents(model)
    with pytest.raises(CheckpointError, match=message):
        apply_artefact(model, path, given.path / "out", **options)
    assert contents(model) == before
    assert not (given.path / "out").exists()
    assert not list(given.path.glob(".out.partial/*.safetensors")), "no shard of a wrong result is left"
    assert not (given.path / ".out.partial" / reader.INDEX).exists()


@pytest.mark.parametrize("name", ["layers.0.w", "layers.1.w", "s"])  # with selected weights, without, not in the mask
def test_another_model_is_refused_where_it_would_come_out_otherwise(given, name):
    other = weights(1, torch.bfloat16)
    mask = given.masks[name].flatten() if name in SHARES else torch.zeros(1, dtype=torch.bool)
    place = int((~mask).nonzero()[-1])
    other[name].view(torch.int16).view(-1)[place] ^= 1  # one bit of one weight
    model = write(given.path / "other", dict(sorted(other.items(), key=lambda item: item[0] != name)), 1)
    refuse_apply(given, given.make(base=given.base), f"must be the model .* of '{name}' would be", model)


def test_other_names_shapes_and_dtypes_are_refused(given):
    path, tensors = given.make(base=given.base), weights(1, torch.bfloat16)
    changes = {
        "name": (lambda t: t | {"new": torch.ones(3)}, "'new' is in one of them alone"),
        "lacks": (lambda t: {n: v for n, v in t.items() if n != "s"}, "'s' is in one of them alone"),
        "shape": (lambda t: t | {"layers.0.w": torch.ones(70_000).bfloat16()}, "has shape .*70000.* there, .*70001"),
        "dtype": (lambda t: t | {"layers.0.w": torch.ones(70_001).half()}, "float16 there, torch.bfloat16 in the art"),
    }
    for kind, (change, message) in changes.items():
        refuse_apply(given, path, message, write(given.path / kind, change(tensors)))


def test_making_refuses_what_does_not_fit(given, tmp_path):
    cases = [
        ({"base": write(tmp_path / "half", weights(2, torch.float16))}, CheckpointError, "must hold .* as .* does"),
        ({"base_id": "/home/me/base"}, ValueError, "a name must be letters"),
        ({"base_id": "a/b/c"}, ValueError, "a name must be letters"),
        ({"name": "model/inside"}, ValueError, "must lie outside its inputs"),
        ({"name": "mask.safetensors"}, FileExistsError, "nothing is written over"),
        ({"base": tmp_path / "nowhere"}, FileNotFoundError, "nowhere"),
    ]
    before = {path: contents(path) for path in (given.model, given.base, given.mask)}
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            given.make(**options)
        assert {path: contents(path) for path in before} == before
        assert not (given.path / "artefact.safetensors").exists()


def test_a_base_that_is_not_the_masks_is_refused(tmp_path):
    given = Given(tmp_path, base={"embed.weight": "0" * 64})
    with pytest.raises(
        CheckpointError, match=r"must be the base that .*mask.* was made with; the SHA-256 of its 'embed"
    ):
        given.make(base=given.base)
    assert not (tmp_path / "artefact.safetensors").exists()
    given.make()  # of the model's own values the base is not asked for


def test_a_disk_that_fills_up_leaves_no_artefact(given, monkeypatch):
    real, written = os.pwrite, []

    def pwrite(handle, memory, at):
        written.append(real(handle, memory[: 1 + len(memory) // 2], at))  # a system may write less than it is given
        if sum(written) > 60_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written[-1]

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left"):
        given.make()
    assert sorted(path.name for path in given.path.iterdir()) == ["base", "mask.safetensors", "model"]
    assert len(written) > 2


def test_a_disk_that_is_too_small_leaves_no_artefact(given, monkeypatch):
    monkeypatch.setattr(
        "cwfast.checkpoint.making.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1}), raising=True
    )
    with pytest.raises(OSError, match=r"must have .* bytes free; it has 1"):
        given.make()
    assert not (given.path / "artefact.safetensors").exists()


def test_broken_files_are_refused(given):
    path = given.make(base=given.base)
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    cases = {
        "truncated": (whole[:-100], "must be a safetensors file"),
        "cut": (whole[:4], "must be a safetensors file"),
        "huge header": (struct.pack("<Q", 1 << 62) + whole[8:], "must be a safetensors file"),
        "longer": (whole + bytes(4), "must be a safetensors file"),
        "pickle": (b"PK\x03\x04" + whole[4:], "looks like a file of torch.save"),
        "a bit of a value": (whole[:-1] + bytes([whole[-1] ^ 1]), "SHA-256 differs"),
        "a bit after the header": (
            whole[: 8 + length] + bytes([whole[8 + length] ^ 1]) + whole[9 + length :],
            "SHA-256",
        ),
        "a mask": (given.mask.read_bytes(), "must be an artefact, as .*; got 'cwfast-mask/1'"),
    }
    for data, message in cases.values():
        path.write_bytes(data)
        refuse_apply(given, path, message)
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"must be a mask file, as .*; got 'cwfast-artefact/1'"):
        MaskSet.load(path)
    with pytest.raises(CheckpointError, match=r"must be an artefact, as .*; it is a folder"):
        ArtefactFile(given.model)


def rewritten(path, tensors=lambda t: t, metadata=lambda m: m):
    """Changed, with a right SHA-256 of the data: what only somebody who means harm would write."""
    with safe_open(path, "pt") as file:
        told = file.metadata()
    found = tensors(load_file(path))
    told["sha256"] = _mask_files.digest({name: [tensor.reshape(-1)] for name, tensor in found.items()})
    save_file(found, path, metadata=metadata(told))


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (lambda t: t | {"layers.0.w/value": t["layers.0.w/value"][:-1].clone()}, None, "a value for each of the"),
        (lambda t: t | {"embed.weight/value": torch.ones(10**6).bfloat16()}, None, "a value for each of the"),
        (lambda t: t | {"layers.0.b/value": t["layers.0.b/value"].float()}, None, "float32 in the artefact"),
        (lambda t: {n: v for n, v in t.items() if n != "layers.0.b/value"}, None, "value, of each parameter"),
        (
            lambda t: t | {"embed.weight/low": torch.from_numpy(t["embed.weight/low"].numpy()[::-1].copy())},
            None,
            "must hold the masks",
        ),
        (lambda t: t | {"embed.weight/offset": t["embed.weight/offset"] * 2**61}, None, "must hold the masks"),
        (None, lambda m: m | {"result": "{}"}, "must state the result of each"),
        (None, lambda m: m | {"result": '{"s": 3}'}, "must state result as a JSON object"),
        (None, lambda m: {k: v for k, v in m.items() if k != "result"}, "must state result as a JSON object"),
        (None, lambda m: m | {"base_id": "a\n---\nb"}, "must state base_id as a name"),
        (None, lambda m: m | {"criterion": "| x |"}, "must state criterion as a name"),
        (None, lambda m: m | {"base": "[" * 10**5}, "must state base as a JSON object"),
        (None, lambda m: m | {"shapes": m["shapes"].replace("70001", str(2**62))}, r"below 2\*\*62"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_mean_harm_are_refused(given, tensors, metadata, message):
    path = given.make(base=given.base)
    rewritten(path, tensors or (lambda t: t), metadata or (lambda m: m))
    refuse_apply(given, path, message)


def test_random_damage_is_refused_or_harmless(given):
    path, generator = given.make(base=given.base), random.Random(0)
    whole, expected = path.read_bytes(), contents(given.rewound())
    for i in range(40):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            data[generator.randrange(len(data) if i % 2 else 4000)] = generator.randrange(256)
        path.write_bytes(data[: generator.randint(0, len(data))] if i % 5 == 0 else data)
        out = given.path / f"out{i}"
        try:
            apply_artefact(given.model, path, out)
        except CheckpointError:
            assert not out.exists()
        else:
            made = contents(out)
            assert all(made[name] == data for name, data in expected.items() if name.endswith(".safetensors"))


# -- the card, and where its facts come from


def test_the_card_says_what_was_done_and_nothing_private(tmp_path):
    given = Given(tmp_path, criterion="gap", zero_score_selected=5)
    (given.model / "README.md").write_text("of the model")
    path = given.make(base=given.base, base_id="owner/name")
    done = apply_artefact(given.model, path, tmp_path / "a", card=True)
    assert "README.md" in done["left_out"]
    card = (tmp_path / "a" / "README.md").read_text()
    rewind_folder(given.model, given.base, given.mask, tmp_path / "b", card=True, base_id="owner/name")
    assert (tmp_path / "b" / "README.md").read_text() == card, "both ways say the same"
    total, numel = given.masks.total, given.masks.numel
    for fact in (
        'base_model: "owner/name"',
        f"{total:,} of {numel:,}, {total / numel:.4%}",
        "`gap`",
        "no privacy guarantee",
        f"| `layers.0` | {given.masks.counts['layers.0.w'] + 7:,} | 70,008 |",
        "5: such a score ranks nothing",
    ):
        assert fact in card, fact
    assert str(tmp_path) not in card
    assert all(str(tmp_path).encode() not in data for data in contents(tmp_path / "a").values())
    assert str(tmp_path).encode() not in path.read_bytes()
    apply_artefact(given.model, path, tmp_path / "plain")
    assert (tmp_path / "plain" / "README.md").read_text() == "of the model"


def test_a_card_says_what_is_not_known(given):
    rewind_folder(given.model, given.base, given.mask, given.path / "c", card=True)
    card = (given.path / "c" / "README.md").read_text()
    assert "base_model" not in card
    assert card.count("not recorded") == 2
    with pytest.raises(ValueError, match="needs an artefact made with a base"):
        apply_artefact(given.model, given.make(), given.path / "d", card=True)
    for call in (
        lambda: rewind_folder(given.model, given.base, given.mask, given.path / "d", base_id="../x"),
        lambda: apply_artefact(given.model, given.path / "artefact.safetensors", given.path / "d", base_id="a\nb"),
    ):
        with pytest.raises(ValueError, match="a name must be letters"):
            call()


def test_a_mask_keeps_the_criterion_of_its_scores(tmp_path):
    save_file({"w": torch.rand(100)}, tmp_path / "model.safetensors")
    told = {"base": {"tensors": {"w": "a" * 64}}, "inputs": {"settings": {"criterion": "gap"}}}
    (tmp_path / SCORES).write_text(json.dumps(told))
    masks = cwfast.select(tmp_path, rate=0.1)
    assert (masks.criterion, masks.base) == ("gap", {"w": "a" * 64})
    masks.save(tmp_path / "mask")
    other = cwfast.select({"w": torch.rand(100)}, rate=0.1)
    assert MaskSet.load(tmp_path / "mask").criterion == MaskFile(tmp_path / "mask").criterion == "gap"
    assert (masks | masks).criterion == masks.to("cpu").criterion == "gap"
    assert masks.random_like(0).criterion is None, "which of them is random is by no criterion"
    assert (masks | other).criterion is other.criterion is None
    (tmp_path / SCORES).write_text(json.dumps(told | {"inputs": {"settings": {"criterion": "<b>"}}}))
    with pytest.raises(CheckpointError, match="must be JSON of cwfast score"):
        cwfast.select(tmp_path, rate=0.1)


# -- the commands


def test_the_commands(given, capsys):
    path, out = given.path / "made.safetensors", given.path / "fixed"
    command = ["artefact", given.model, "--mask", given.mask, "--base", given.base, "--base-id", "o/n", "--out", path]
    assert main([*map(str, command), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["selected"] == given.masks.total
    assert document["bytes"] == path.stat().st_size
    assert main(["rewind", str(given.model), "--artefact", str(path), "--out", str(out), "--model-card", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rewound"] == given.masks.total
    same_shards(out, given.rewound())
    assert "base_model" in (out / "README.md").read_text()
    assert main(["rewind", str(given.model), "--artefact", str(path), "--out", str(out)]) == 1
    assert "must not exist" in capsys.readouterr().err
    for wrong in (["--artefact", "x", "--mask", "y"], ["--mask", "y"], ["--base", "y"], []):
        with pytest.raises(SystemExit) as stopped:
            main(["rewind", str(given.model), *wrong, "--out", "z"])
        assert stopped.value.code == 2
        assert "--base and --mask, or --artefact alone, must be given" in capsys.readouterr().err


def test_the_writer_wants_all_values_and_the_hashes_it_was_promised(given, tmp_path):
    masks = MaskFile(given.mask)
    dtypes = dict.fromkeys(SHAPES, torch.bfloat16)
    writer = _artefact_files.ArtefactWriter(tmp_path / "x", masks, dtypes, ["a"], None, None)
    writer.begin()
    for name, count in masks.counts().items():
        if name != "layers.0.b":
            writer.append(name, torch.ones(count).bfloat16())
    with pytest.raises(ValueError, match="must be complete; 14 bytes are missing"):
        writer.finish({"a": "0" * 64}, None)
    with pytest.raises(ValueError, match=r"got more, or torch\.float32"):
        writer.append("layers.0.b", torch.ones(7))
    with pytest.raises(ValueError, match="got more"):
        writer.append("layers.0.b", torch.ones(8).bfloat16())
    writer.append("layers.0.b", torch.ones(7).bfloat16())
    with pytest.raises(ValueError, match="as long as at the beginning"):
        writer.finish({"a": "0" * 64, "b": "0" * 64}, None)
