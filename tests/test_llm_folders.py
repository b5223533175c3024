"""A model's folder rewound on disk: the bits of a rewind in memory, whatever interrupts it; bad input loses nothing."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import cwfast
from cwfast import MaskSet
from cwfast.checkpoint import Checkpoint, making, reader
from cwfast.checkpoint.identity import tensor_hashes
from cwfast.cli import main
from cwfast.errors import CheckpointError
from cwfast.llm import folders
from cwfast.llm.folders import MANIFEST, rewind_folder

SHAPES = {"embed.weight": (300, 256), "layers.0.w": (70_001,), "layers.0.b": (7,), "layers.1.w": (256, 300), "s": ()}


def weights(seed: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def write(folder: Path, tensors: dict[str, torch.Tensor], *, shards: int = 2) -> Path:
    """A folder as transformers writes it."""
    folder.mkdir(parents=True)
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n] for n in names[i::shards]}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / reader.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return folder


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Model, base and mask on disk, and what must come out; pieces are small, so that tensors have several."""
    monkeypatch.setattr(reader, "PIECE", 1 << 16)
    monkeypatch.setattr(Checkpoint.pieces, "__defaults__", (1 << 16,))
    trained, initial = weights(1), weights(2)
    masks = masks_of()
    masks.save(tmp_path / "mask.safetensors")
    expected = trained | {n: torch.where(masks[n], initial[n], trained[n]) for n in masks.names}
    return {
        "model": write(tmp_path / "model", trained),
        "base": write(tmp_path / "base", initial, shards=3),
        "mask": tmp_path / "mask.safetensors",
        "out": tmp_path / "fixed",
        "expected": expected,
        "masks": masks,
    }


def masks_of() -> MaskSet:
    """A list, packed bits, one entry, none, all."""
    generator = torch.Generator().manual_seed(3)
    shares = {"embed.weight": 0.01, "layers.0.w": 0.4, "layers.0.b": 1.0, "layers.1.w": 0.0}
    return MaskSet.from_masks({n: torch.rand(SHAPES[n], generator=generator) < share for n, share in shares.items()})


def run(given, **options):
    return rewind_folder(given["model"], given["base"], given["mask"], given["out"], **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def refuse(given, error, message, **options):
    """The call is refused, inputs are untouched, and no folder is left that anything could load."""
    before = {key: contents(given[key]) for key in ("model", "base")}
    with pytest.raises(error, match=message):
        run(given, **options)
    assert {key: contents(given[key]) for key in before} == before
    assert not given["out"].exists()


# -- the result


def test_the_folder_holds_the_same_bits_as_a_rewind_in_memory(given):
    done = run(given)
    out = Checkpoint(given["out"])
    assert list(out.entries) == list(Checkpoint(given["model"]).entries)
    for name, expected in given["expected"].items():
        assert torch.equal(out.tensor(name).view(torch.int32), expected.view(torch.int32)), name
    assert done["rewound"] == given["masks"].total
    assert (given["out"] / "config.json").read_bytes() == (given["model"] / "config.json").read_bytes()
    assert not list(given["out"].parent.glob(".*")), "the folder in which it was made is gone"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_every_dtype_is_rewound_bit_by_bit(tmp_path, dtype):
    trained, initial = ({n: t.clamp(-9, 9).to(dtype) for n, t in weights(seed).items()} for seed in (1, 2))
    masks = masks_of()
    masks.save(tmp_path / "mask")
    write(tmp_path / "model", trained, shards=1), write(tmp_path / "base", initial, shards=1)
    rewind_folder(tmp_path / "model", tmp_path / "base", tmp_path / "mask", tmp_path / "out")
    out = Checkpoint(tmp_path / "out")
    for name in SHAPES:
        mask = masks[name] if name in masks.shapes else torch.zeros(SHAPES[name], dtype=torch.bool)
        width = {1: torch.uint8, 2: torch.int16, 8: torch.int64}[dtype.itemsize]
        expected = torch.where(mask, initial[name].view(width), trained[name].view(width))
        assert torch.equal(out.tensor(name).view(width), expected)


def test_single_files_and_links_and_their_headers(tmp_path):
    trained, initial, masks = weights(1), weights(2), masks_of()
    cache = tmp_path / "blobs"
    cache.mkdir()
    save_file(trained, cache / "a", metadata={"format": "pt", "note": "kept"})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to(cache / "a")
    save_file(initial, tmp_path / "base.safetensors")
    masks.save(tmp_path / "mask")
    before = (cache / "a").read_bytes()
    rewind_folder(tmp_path / "model", tmp_path / "base.safetensors", tmp_path / "mask", tmp_path / "out")
    made = tmp_path / "out" / "model.safetensors"
    assert not made.is_symlink()
    assert (cache / "a").read_bytes() == before, "a link is read, never written through"
    length = int.from_bytes(before[:8], "little")
    assert made.read_bytes()[: 8 + length] == before[: 8 + length]
    assert torch.equal(
        load_file(made)["layers.0.w"], torch.where(masks["layers.0.w"], initial["layers.0.w"], trained["layers.0.w"])
    )


def test_hashes_are_those_of_the_tensors(given):
    import hashlib

    done = run(given)
    stated = {name: digest for file in done["files"].values() for name, digest in file["sha256"].items()}
    assert stated == {
        name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in given["expected"].items()
    }
    assert json.loads((given["out"] / MANIFEST).read_text()) == done


def test_code_and_other_weights_are_not_copied(given):
    model = given["model"]
    code = {"auto_map": {"AutoModel": "evil.Model"}}
    (model / "config.json").write_text(json.dumps({"model_type": "x", "text_config": {"n": 1, **code}, **code}))
    hidden = {"x.pkl", "weights.npy", "model.safetensors.bak", "other.bin.index.json", ".secret.json"}
    hidden |= {"LICENSE.py", "NOTICE.bin", "train.jsonl", "members.txt"}  # code, weights, texts
    known = {"LICENSE", "NOTICE.txt", "LICENSE.md", "merges.txt"}
    for name in hidden | known:
        (model / name).write_bytes(b"{}")
    save_file({"old": torch.ones(3)}, model / "forgotten.safetensors")
    (model / "evil.py").write_text("raise SystemExit")
    (model / "pytorch_model.bin").write_bytes(b"old weights")
    (model / "tokenizer.json").write_text('{"a": 1}')
    done = run(given)
    assert set(done["left_out"]) == hidden | {"evil.py", "pytorch_model.bin", "forgotten.safetensors"}
    assert {file.name for file in given["out"].iterdir()} == {
        *(file.name for file in model.glob("model-*")), "config.json", "tokenizer.json", MANIFEST, reader.INDEX, *known
    }  # fmt: skip
    assert json.loads((given["out"] / "config.json").read_text()) == {"model_type": "x", "text_config": {"n": 1}}
    assert (given["out"] / "tokenizer.json").read_text() == '{"a": 1}'
    asked = given["out"].with_name("asked")
    rewind_folder(model, given["base"], given["mask"], asked, copy_code=True)
    assert (asked / "evil.py").exists()
    assert "auto_map" in json.loads((asked / "config.json").read_text())


@pytest.mark.usefixtures("without_torchvision")
def test_transformers_loads_the_folder_and_generates(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(config)
    base.save_pretrained(tmp_path / "base")
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    masks = cwfast.select({n: torch.rand(p.shape) for n, p in model.named_parameters()}, rate=0.1)
    masks.save(tmp_path / "mask")
    rewind_folder(tmp_path / "model", tmp_path / "base", tmp_path / "mask", tmp_path / "out")
    cwfast.rewind_(model, masks, base)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, ours), (_, theirs) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    prompt = torch.tensor([[1, 2, 3]])
    text = loaded.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert text.shape == (1, 7)


# -- interruptions


def in_a_process(given) -> int:
    """Begin a run in a fork of this process, slowed down so that it can be hit under way."""
    if pid := os.fork():
        return pid
    torch.set_num_threads(1)  # threads do not survive a fork
    try:
        run(given, resume=True, progress=lambda _: time.sleep(0.002))
    finally:
        os._exit(0)


def test_kill_9_at_any_moment_and_resume_give_the_same_files(given):
    whole, generator, killed = given["out"].with_name("whole"), random.Random(0), 0
    rewind_folder(given["model"], given["base"], given["mask"], whole)
    for attempt in range(10):
        given["out"] = given["out"].with_name(f"fixed{attempt}")
        pid = in_a_process(given)
        time.sleep(generator.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        if not given["out"].exists():  # where it was done before it was killed, what it made is whole as well
            run(given, resume=given["out"].with_name(f".{given['out'].name}.partial").exists())
        assert contents(given["out"]) == contents(whole)
    assert killed >= 5, "the run was too short for this test"


def test_resume_does_not_write_finished_files_again(given, monkeypatch):
    real, files = folders.rewrite, []

    def once(source, file, *rest):
        if files:
            raise KeyboardInterrupt
        files.append(file.name)
        return real(source, file, *rest)

    monkeypatch.setattr(folders, "rewrite", once)
    with pytest.raises(KeyboardInterrupt):
        run(given)
    assert not given["out"].exists()
    with pytest.raises(FileExistsError, match="resume it, or remove that folder"):
        run(given)
    seen = []
    monkeypatch.setattr(folders, "rewrite", lambda s, f, *rest: seen.append(f.name) or real(s, f, *rest))
    run(given, resume=True)
    assert seen == ["model-00002-of-00002.safetensors"]
    out = Checkpoint(given["out"])
    assert all(torch.equal(out.tensor(name), expected) for name, expected in given["expected"].items())


def test_resume_refuses_other_inputs(given, monkeypatch):
    monkeypatch.setattr(folders, "_verify", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(given)
    for name in ("copy_code", "card"):  # what they copied, or not, would stay
        with pytest.raises(CheckpointError, match=f"must be of a run with the same {name}"):
            run(given, resume=True, **{name: True})
    MaskSet.load(given["mask"]).random_like(0).save(given["mask"])
    with pytest.raises(CheckpointError, match="must be of a run with the same mask"):
        run(given, resume=True)


# -- bad input


def test_a_truncated_shard(given):
    file = given["model"] / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuse(given, CheckpointError, "must be a safetensors file")


def test_a_shard_that_is_cut_while_it_is_read(given, monkeypatch):
    real = folders._check_space

    def cut(*args):
        real(*args)
        with open(given["base"] / "model-00001-of-00003.safetensors", "rb+") as file:
            file.truncate(2000)

    monkeypatch.setattr(folders, "_check_space", cut)
    with pytest.raises(CheckpointError, match="it ends too early"):
        run(given)
    assert not given["out"].exists()
    assert not list(given["out"].parent.glob(".fixed.partial/*.safetensors"))


@pytest.mark.parametrize("name", ["layers.0.w", "s"])  # of the mask, and not
def test_a_missing_index_entry(given, name):
    index = json.loads((given["model"] / reader.INDEX).read_text())
    del index["weight_map"][name]
    (given["model"] / reader.INDEX).write_text(json.dumps(index))
    refuse(given, CheckpointError, f"must list all tensors of .*; '{name}' is not")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"layers.0.w": t["layers.0.w"][:-1].clone()}, "as .* does, .*70001.*it has .*70000"),
        (lambda t: t | {"layers.0.w": t["layers.0.w"].bfloat16()}, "torch.float32 of shape .*it has torch.bfloat16"),
        (lambda t: {n: v for n, v in t.items() if n != "layers.0.b"}, "initial values of 'layers.0.b'"),
    ],
    ids=["shape", "dtype", "name"],
)
def test_a_base_that_does_not_fit(given, change, message, tmp_path):
    given["base"] = write(tmp_path / "other", change(weights(2)))
    refuse(given, CheckpointError, message)


def test_a_mask_of_another_model(given):
    MaskSet.from_masks({"layers.0.w": torch.ones(3, dtype=torch.bool)}).save(given["mask"])
    refuse(given, CheckpointError, "has shape .*70001.* there, .*3.* in the mask")
    MaskSet.from_masks({"w": torch.ones(3, dtype=torch.bool)}).save(given["mask"])
    refuse(given, CheckpointError, "has no tensor 'w'")


def test_another_base_than_the_masks(given):
    """Found while its tensor is read: the shard that it would have gone to is not kept."""
    masks = MaskSet.load(given["mask"])
    right = tensor_hashes(Checkpoint(given["base"]), masks.names)
    for name in ("embed.weight", "layers.0.b"):
        picks = {n: masks.picks(n) for n in masks.names}
        MaskSet(picks, masks.shapes, base=right | {name: "0" * 64}).save(given["mask"])
        given["out"] = given["out"].with_name(f"fixed-{name}")
        refuse(given, CheckpointError, f"must be the base that .*mask.* was made with; the SHA-256 of its '{name}'")
        shard = Checkpoint(given["model"]).entry(name).file.name
        assert not (given["out"].with_name(f".{given['out'].name}.partial") / shard).exists()
    MaskSet(picks, masks.shapes, base=right).save(given["mask"])
    given["out"] = given["out"].with_name("fixed")
    run(given)
    assert (given["out"] / reader.INDEX).exists()


def test_a_mask_whose_data_were_changed(given):
    data = bytearray(given["mask"].read_bytes())
    data[-1] ^= 1
    given["mask"].write_bytes(data)
    refuse(given, CheckpointError, "SHA-256 differs")


def test_a_pickle_a_path_that_leaves_and_a_huge_header(given):
    index, file = given["model"] / reader.INDEX, given["model"] / "model-00001-of-00002.safetensors"
    kept, text = file.read_bytes(), index.read_text()
    file.write_bytes(b"PK\x03\x04 what torch.save writes")
    refuse(given, CheckpointError, "looks like a file of torch.save")
    file.write_bytes((1 << 62).to_bytes(8, "little") + kept[8:])
    refuse(given, CheckpointError, "must be a safetensors file")
    file.write_bytes(kept)
    index.write_text(text.replace(file.name, f"../base/{file.name}"))
    refuse(given, CheckpointError, "must name bare files")


def test_where_it_may_be_written(given):
    for place in (given["model"], given["base"] / "inside"):
        with pytest.raises((ValueError, FileExistsError), match=r"outside|must not exist"):
            rewind_folder(given["model"], given["base"], given["mask"], place)
    given["out"].mkdir()
    (given["out"] / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="nothing is written over"):
        run(given)
    assert (given["out"] / "mine").read_text() == "kept"
    (given["out"] / "mine").unlink()
    run(given)  # an empty one may be there


def test_a_disk_that_is_too_small(given, monkeypatch):
    monkeypatch.setattr(making.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    refuse(given, OSError, "must have .* bytes free; it has 1")


def test_a_disk_that_fills_up_under_way(given, monkeypatch):
    """On a file system of 0.5 MB, told to be larger; where none can be mounted, files may not grow beyond that."""
    small = given["out"].parent / "small"
    small.mkdir()
    monkeypatch.setattr(folders, "_check_space", lambda *_: None)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "none", small], capture_output=True, check=False
    )
    given["out"] = small / "fixed"
    try:
        if mounted.returncode == 0:
            refuse(given, OSError, "No space left")
        else:
            import resource

            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
            try:
                refuse(given, OSError, "File too large")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                signal.signal(signal.SIGXFSZ, handler)
        assert not list(small.glob(".fixed.partial/*.tmp")), "nothing half-written is left"
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", small], check=True)


def test_two_runs_exclude_each_other(given, monkeypatch):
    real = folders._verify

    def second(*args):
        with pytest.raises(RuntimeError, match="one run at a time; it is held by process"):
            run(given, resume=True)
        real(*args)

    monkeypatch.setattr(folders, "_verify", second)
    run(given)


# -- the commands


def test_select_and_rewind_by_the_commands(given, capsys):
    generator = torch.Generator().manual_seed(5)
    scores = {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
    folder = write(given["out"].with_name("scores"), scores)
    mask = given["out"].with_name("chosen.safetensors")
    assert main(["select", str(folder), "--rate", "0.01", "--out", str(mask), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    expected = cwfast.select({name: scores[name] for name in Checkpoint(folder).entries}, rate=0.01)
    assert MaskSet.load(mask) == expected
    assert (document["selected"], document["weights"]) == (expected.total, expected.numel)
    command = ["rewind", given["model"], "--base", given["base"], "--mask", mask, "--out", given["out"], "--json"]
    assert main(list(map(str, command))) == 0
    assert json.loads(capsys.readouterr().out)["rewound"] == expected.total
    out, trained, initial = Checkpoint(given["out"]), weights(1), weights(2)
    for name in SHAPES:
        assert torch.equal(out.tensor(name), torch.where(expected[name], initial[name], trained[name]))


def test_the_commands_say_what_is_wrong(given, capsys):
    assert main(["rewind", str(given["model"]), "--base", "nowhere", "--mask", str(given["mask"]), "--out", "x"]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert main(["select", str(given["model"]), "--rates", "layers.*", "--out", "x"]) == 1
    assert "--rates must be PATTERN=RATE; got 'layers.*'" in capsys.readouterr().err
    assert main(["select", str(given["model"]), "--rates", "a=1", "--scope", "layer", "--out", "x"]) == 1
    assert "one of --scope and --rates must be given; got both" in capsys.readouterr().err
    assert main(["select", str(given["model"]), "--rates", "a=1", "a=0.5", "--out", "x"]) == 1
    assert "--rates must name each pattern once; got a=1 a=0.5" in capsys.readouterr().err
