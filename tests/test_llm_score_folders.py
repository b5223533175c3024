"""A folder of scores: what is refused, what a killed run leaves, and that inputs are only read."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import llm_models
import pytest
import torch
from safetensors.torch import load_file, save_file

import cwfast
from cwfast.checkpoint import filling, making
from cwfast.checkpoint.filling import Filling
from cwfast.checkpoint.identity import SCORES
from cwfast.checkpoint.reader import INDEX
from cwfast.cli import main
from cwfast.errors import CheckpointError
from cwfast.llm import score_files
from cwfast.llm.scoring import score_folder

pytestmark = pytest.mark.usefixtures("without_torchvision")
MEMBERS, REFERENCE = llm_models.ids(3, seed=1), llm_models.ids(3, seed=2)


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def given(tmp_path):
    """Model and base on disk, in shards."""
    for name in ("model", "base"):
        model = llm_models.small("gpt2", torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.save_pretrained(tmp_path / name, max_shard_size="8KB")
    return SimpleNamespace(model=tmp_path / "model", base=tmp_path / "base", out=tmp_path / "out")


def refuse(given, error, message, **options):
    """The call is refused, inputs are untouched, and nothing is there that loads."""
    before = [contents(folder) for folder in (given.model, given.base)]
    with pytest.raises(error, match=message):
        score_folder(given.model, given.base, MEMBERS, REFERENCE, given.out, **options)
    assert [contents(folder) for folder in (given.model, given.base)] == before
    assert not given.out.exists()
    partial = given.out.with_name(f".{given.out.name}.partial")
    assert not (partial / INDEX).exists()
    for file in partial.rglob("*"):
        file.unlink()
    if partial.exists():
        partial.rmdir()


def change(folder, edit):
    """Rewrite the shard that holds a tensor."""
    index = json.loads((folder / INDEX).read_text())
    file = folder / index["weight_map"]["transformer.h.0.ln_1.weight"]
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return file


NAME = "transformer.h.0.ln_1.weight"


def test_a_base_that_does_not_fit(given):
    original = contents(given.base)
    change(given.base, lambda t: t.update({NAME: t[NAME][:-1].clone()}))
    refuse(given, CheckpointError, rf"base must hold '{NAME}' as .* shape \(16,\); it has .* shape \(15,\)")
    change(given.base, lambda t: t.update({NAME: torch.ones(16, dtype=torch.bfloat16)}))
    refuse(given, CheckpointError, rf"{NAME}' as .* torch.float32 .* it has torch.bfloat16")
    change(given.base, lambda t: t.pop(NAME))
    refuse(given, CheckpointError, "must hold 'transformer.h.0.ln_1.weight', as model.safetensors.index.json says")
    index = json.loads((given.base / INDEX).read_text())
    del index["weight_map"][NAME]
    (given.base / INDEX).write_text(json.dumps(index))
    refuse(given, CheckpointError, f"must hold the initial values of '{NAME}'")
    assert original != contents(given.base)


def test_broken_files_and_other_formats(given):
    file = change(given.model, lambda t: None)
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    refuse(given, CheckpointError, "must be a safetensors file")
    file.write_bytes((1 << 62).to_bytes(8, "little") + whole[8:])
    refuse(given, CheckpointError, "must be a safetensors file")
    file.write_bytes(b"PK\x03\x04 what torch.save writes")
    refuse(given, CheckpointError, "looks like a file of torch.save")
    file.write_bytes(whole)
    given.model = file
    refuse(
        SimpleNamespace(model=file.parent, base=file.parent / "config.json", out=given.out), CheckpointError, "config"
    )


def test_weights_that_are_pickled_are_not_read(given):
    for file in given.model.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, given.model / "pytorch_model.bin")
    refuse(given, CheckpointError, r"must hold .* or \*.safetensors files; it holds neither")


def test_an_adapter_is_not_a_model(given):
    (given.model / "adapter_config.json").write_text("{}")
    refuse(given, ValueError, "holds a PEFT adapter: merge it")


def test_a_tensor_that_the_model_has_and_the_folder_has_not(given):
    change(given.model, lambda t: t.pop(NAME))
    index = json.loads((given.model / INDEX).read_text())
    del index["weight_map"][NAME]
    (given.model / INDEX).write_text(json.dumps(index))
    refuse(given, CheckpointError, f"model must hold every weight of GPT2LMHeadModel; it lacks '{NAME}'")


def test_where_it_may_be_written_and_by_whom(given, monkeypatch):
    out = given.out
    for place in (given.model / "inside", given.base / "inside"):
        given.out = place
        refuse(given, ValueError, "must lie outside")
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="nothing is written over"):
        score_folder(given.model, given.base, MEMBERS, REFERENCE, out)
    given.out = out.with_name("other")
    monkeypatch.setattr(making.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    refuse(given, OSError, "bytes free; it has 1")
    refuse(given, ValueError, "params_per_pass must be at least 1; got 0", params_per_pass=0)
    partial = given.out.with_name(".other.partial")
    partial.mkdir()
    with making.exclusive(partial), pytest.raises(RuntimeError, match="one run at a time"):
        score_folder(given.model, given.base, MEMBERS, REFERENCE, given.out, resume=True)


def test_the_command_says_what_is_wrong(given, capsys, tmp_path):
    llm_models.tokenizer().save_pretrained(given.model)
    for name, rows in (("m", ["w3 w4", "w5 w6"]), ("r", ["w5 w6"]), ("short", ["w3"]), ("none", [])):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))

    def said(members, reference, *more, model=given.model):
        texts = ["--members", tmp_path / members, "--reference", tmp_path / reference]
        command = ["score", model, "--base", given.base, *texts, "--out", given.out, *more]
        assert main([str(part) for part in command]) == 1
        assert not given.out.exists()
        return capsys.readouterr().err.splitlines()[-1]

    assert "members and reference must share no text; got 1 in both" in said("m", "r")
    assert "reference: texts must have a token to score" in said("m", "short")
    assert "reference must hold at least one text; got none" in said("m", "none")
    assert "there is none at" in said("m", "absent")
    assert "MODEL must be a folder of transformers" in said("m", "short", model=tmp_path / "absent")
    with pytest.raises(SystemExit, match="2"):
        said("m", "short", "--max-tokens", "1")
    assert "--max-tokens must be at least 2; got 1" in capsys.readouterr().err


def test_passes_are_as_large_as_asked_for(given):
    from cwfast.checkpoint import Checkpoint

    model = llm_models.small("gpt2", torch.float32)
    parameters = dict(model.named_parameters())
    for most in (1, 700, 10**6, None):
        plan = score_files.plan(Checkpoint(given.model), model, parameters, most)
        assert [name for group in plan.groups for name in group] == list(parameters)
        for group in plan.groups:
            one_module = len({name.rpartition(".")[0] for name in group}) == 1
            assert most is None or one_module or sum(parameters[name].numel() for name in group) <= most
        assert len(plan.groups) == 1 or most in (1, 700)
    assert len(score_files.plan(Checkpoint(given.model), model, parameters, 700).groups) > 5


def test_what_the_folder_says(given):
    change(given.model, lambda t: t.update({"step": torch.tensor([3.0])}))
    index = json.loads((given.model / INDEX).read_text())
    index["weight_map"]["step"] = index["weight_map"][NAME]
    (given.model / INDEX).write_text(json.dumps(index))
    done = score_folder(given.model, given.base, MEMBERS, REFERENCE, given.out, criterion="taylor", lam=0.25)
    said = json.loads((given.out / SCORES).read_text())
    assert said == done
    assert said["unscored"] == ["step"]
    assert said["inputs"]["settings"]["criterion"] == "taylor"
    assert said["inputs"]["settings"]["lam"] == 0.25
    assert said["inputs"]["members"]["tokens"] == sum(map(len, MEMBERS))
    assert not any(str(token) in json.dumps(said["inputs"]["members"]["texts"]) for token in [MEMBERS[0]])
    assert sorted(file.name for file in given.out.iterdir()) == sorted(
        {SCORES, INDEX, *(file.name for file in given.model.glob("*.safetensors"))}
    )


@pytest.mark.parametrize("text", ["[", "{}", '{"base": 3}', '{"base": {"tensors": {"x": "00"}}}', "[" * 100_000])
def test_scores_that_say_nonsense_of_their_base(tmp_path, text):
    save_file({"x": torch.rand(9)}, tmp_path / "x.safetensors")
    assert cwfast.select(tmp_path, rate=0.5).base is None
    (tmp_path / SCORES).write_text(text)
    with pytest.raises(CheckpointError, match=f"{SCORES} must be JSON of cwfast score"):
        cwfast.select(tmp_path, rate=0.5)


def test_a_folder_is_filled_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(filling, "PIECE", 4)  # several pieces, the last one smaller
    files = {"a.safetensors": {"x": (3, 2), "empty": (0, 4)}, "b.safetensors": {"y": ()}}
    made = Filling(tmp_path, files, torch.float64)
    written = {"y": torch.tensor(2.0), "x": torch.arange(6.0).reshape(2, 3).T, "empty": torch.empty(0, 4)}
    hashes = {name: made.write(name, tensor) for name, tensor in written.items()}
    made.flush()
    made.finish()
    again = Filling(tmp_path, files, torch.float64)  # laid out already: nothing is written over
    for name, tensor in written.items():
        assert again.holds(name, hashes[name])
        file = next(file for file, shapes in files.items() if name in shapes)
        assert torch.equal(load_file(tmp_path / file)[name], tensor.double())
    assert not again.holds("x", hashes["y"])
    with pytest.raises(CheckpointError, match=r"must get 'x' of shape \(3, 2\); got \(2, 3\)"):
        again.write("x", torch.ones(2, 3))
    with pytest.raises(CheckpointError, match="must get 'z' of shape None"):
        again.write("z", torch.ones(2, 3))


@pytest.mark.slow
def test_kill_9_at_random_moments(given):
    """Each run starts a Python of its own; the last one is left alone."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import conftest\n"
        "next(conftest.without_torchvision.__wrapped__())\n"
        "import time; from pathlib import Path; from cwfast.llm import estimating, scoring\n"
        "real = estimating.Estimator.scores\n"
        "def slowly(self, names):\n    print('pass', flush=True); time.sleep(0.05); return real(self, names)\n"
        "estimating.Estimator.scores = slowly\n"
        f"members, reference = {MEMBERS}, {REFERENCE}\n"
        "model, base, out = map(Path, sys.argv[2:5])\n"
        "scoring.score_folder(model, base, members, reference, out, params_per_pass=300, resume=True)\n"
    )
    score_folder(given.model, given.base, MEMBERS, REFERENCE, given.out.with_name("whole"))
    random.seed(3)
    command = [sys.executable, "-P", "-c", code, os.path.dirname(__file__), given.model, given.base, given.out]
    killed = 0
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            process.stdout.readline()  # the first pass begins
            time.sleep(random.uniform(0, 0.6))
            process.send_signal(signal.SIGKILL)
        killed += process.returncode == -signal.SIGKILL
    subprocess.run(command, check=True, capture_output=True)
    assert killed
    out, whole = contents(given.out), contents(given.out.with_name("whole"))
    assert json.loads(out.pop(SCORES)) == json.loads(whole.pop(SCORES))
    assert out == whole
