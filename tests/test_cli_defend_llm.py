"""cwfast defend-llm: from folders and JSON lines to a model that loads, a mask and a report; what it refuses."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cwfast import MaskSet
from cwfast.checkpoint.files import exclusive, sha256
from cwfast.cli import main
from cwfast.commands import defend_llm
from cwfast.llm import shadows
from cwfast.llm.training import fine_tune

pytest.importorskip("transformers")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
import llm_models

pytestmark = pytest.mark.usefixtures("without_torchvision")
PARTS = {"m": slice(0, 16), "r": slice(16, 32), "n": slice(32, 48), "h": slice(48, 56)}


def lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, without_torchvision):
    """A tiny base model, the same fine-tuned on its members, and texts."""
    where = tmp_path_factory.mktemp("defend")
    rows = llm_models.ids(56, 6, 12, seed=4)
    texts = llm_models.words(rows)
    base = llm_models.small("llama", torch.float32, tie_word_embeddings=True)
    base.save_pretrained(where / "base")
    fine_tune(base, rows[PARTS["m"]], epochs=4, lr=3e-3)
    base.save_pretrained(where / "tuned")
    for name in ("base", "tuned"):
        llm_models.tokenizer().save_pretrained(where / name)
    for name, part in PARTS.items():
        lines(where / f"{name}.jsonl", texts[part])
    return where


def arguments(folder, out, *more, model="tuned", members="m", reference="r", nonmembers="n"):
    sides = {"members": members, "reference": reference, "nonmembers": nonmembers}
    files = [part for name, stem in sides.items() for part in (f"--{name}", folder / f"{stem}.jsonl")]
    given = [folder / model, "--base", folder / "base", *files, "--out", out, "--bootstrap", 50, "--fpr", 0.1, *more]
    return ["defend-llm", *map(str, given)]


def error(capsys, *given, **named):
    assert main(arguments(*given, **named)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


def test_the_model_loads_and_the_report_has_before_and_after(folder, tmp_path, capsys):
    kept = {path: sha256(path) for name in ("base", "tuned") for path in (folder / name).iterdir()}
    out = tmp_path / "out"
    more = ["--rate", 0.2, "--steps", 4, "--lr", 1e-3, "--heldout", folder / "h.jsonl", "--json"]
    assert main(arguments(folder, out, *more)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "report.json").read_text())
    assert {path: sha256(path) for name in ("base", "tuned") for path in (folder / name).iterdir()} == kept
    assert [row["id"] for row in found["rows"]] == ["base", "undefended", "defended"]
    base, before, after = found["rows"]
    assert set(before["attacks"]) == {"reference", "ez_mia", "wbc", "min_k_pp", "loss"}
    assert (base["attacks"]["reference"]["auc"], before["attacks"]["reference"]["auc"]) == (0.5, 1.0)
    assert after["loss"]["members"] > before["loss"]["members"]
    assert found["settings"]["max_tokens"] == 64  # what the model reads
    assert found["rewound"] == {"weights": after["rewound"], "of": MaskSet.load(out / "mask.safetensors").numel}
    assert len(found["losses"]) == 4
    model, start, trained = load(out / "model"), load(folder / "base"), load(folder / "tuned")
    masks = MaskSet.load(out / "mask.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter[masks[name]], start.get_parameter(name)[masks[name]]), name
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))
    written = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert written.shape[1] > 3
    for name, digest in found["files"].items():
        assert sha256(out / name) == digest
    page, told = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "CWRF gap 20%, 4 steps" in page
    assert "| CWRF gap 20%, 4 steps |" in told
    assert found["reading"][0] in told
    assert not any(text in page + told for text in (folder / "m.jsonl").read_text().split('"') if text.startswith("w"))


def test_a_run_that_was_stopped_goes_on(folder, tmp_path, capsys, monkeypatch):
    more = ["--rate", 0.2, "--steps", 2, "--lr", 1e-3, "--json"]
    assert main(arguments(folder, tmp_path / "whole", *more)) == 0
    expected = json.loads(capsys.readouterr().out)

    def stop(*_, **__):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(defend_llm.defending, "hold_", stop)
        assert "stopped" in error(capsys, folder, tmp_path / "out", *more[:-1])
        assert not (tmp_path / "out" / "model").exists()
        assert error(capsys, folder, tmp_path / "out", *more[:-1], model="base").endswith("a new folder, or remove it")
    with monkeypatch.context() as patch:
        patch.setattr(defend_llm, "score", None)  # nothing is scored again
        assert main(arguments(folder, tmp_path / "out", *more)) == 0
    found = json.loads(capsys.readouterr().out)
    for one in (found, expected):
        del one["files"]["mask.safetensors"]  # safetensors writes the words of its header in any order
    for name in ("rows", "files", "losses"):
        assert found[name] == expected[name]
    assert MaskSet.load(tmp_path / "out" / "mask.safetensors") == MaskSet.load(tmp_path / "whole" / "mask.safetensors")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    assert not (tmp_path / "out" / ".cwfast-defend-llm").exists()  # its records hold the texts' tokens


def test_a_stopped_run_at_another_rate_scores_again(folder, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(defend_llm.defending, "hold_", None)
        with pytest.raises(TypeError):
            main(arguments(folder, tmp_path / "out", "--rate", 0.3, "--debug"))
    more = ["--rate", 0.2, "--steps", 0, "--json"]
    assert main(arguments(folder, tmp_path / "out", *more)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rewound"]["weights"] == int(found["rewound"]["of"] * 0.2)
    work = tmp_path / "own" / ".cwfast-defend-llm"
    work.mkdir(parents=True)
    (work / "precious").touch()
    assert "must be of a stopped run by the same versions" in error(capsys, folder, tmp_path / "own")
    assert (work / "precious").exists()


def test_shadows_add_rmia(folder, tmp_path, capsys):
    texts = [text for stem in ("m", "n") for text in _texts(folder / f"{stem}.jsonl")]
    made = shadows.train(folder / "base", texts, tmp_path, count=4, rank=None, epochs=4, lr=3e-3)
    assert main(arguments(folder, tmp_path / "out", "--rate", 0.3, "--shadow", *made, "--json")) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["undefended"]["attacks"]["rmia"]["auc"] > 0.9
    assert rows["defended"]["attacks"]["rmia"]["auc"] < rows["undefended"]["attacks"]["rmia"]["auc"]


def test_a_bfloat16_model_stays_one(folder, tmp_path, capsys):
    for name in ("base", "tuned"):
        model = load(folder / name).to(torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        llm_models.tokenizer().save_pretrained(tmp_path / name)
    for stem in PARTS:
        (tmp_path / f"{stem}.jsonl").write_text((folder / f"{stem}.jsonl").read_text())
    assert main(arguments(tmp_path, tmp_path / "out", "--steps", 2, "--criterion", "taylor_delta")) == 0
    printed = capsys.readouterr().out
    assert "Fine-tuned, undefended" in printed
    assert "CWRF taylor_delta 10%, 2 steps" in printed
    model, start = load(tmp_path / "out" / "model"), load(tmp_path / "base")
    masks = MaskSet.load(tmp_path / "out" / "mask.safetensors")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter[masks[name]], start.get_parameter(name)[masks[name]]), name


def copied(folder, to):
    """Model and base once more, to be changed."""
    for name in ("base", "tuned"):
        shutil.copytree(folder / name, to / name)
    for stem in PARTS:
        shutil.copy(folder / f"{stem}.jsonl", to)
    return to


def test_no_code_is_named_and_bos_is_read_within_the_window(folder, tmp_path, capsys):
    given = copied(folder, tmp_path / "given")
    for name in ("config.json", "tokenizer_config.json"):
        file = given / "tuned" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoModel": "evil/repo--m.X"}}))
    out = tmp_path / "out"
    assert main(arguments(given, out, "--steps", 0)) == 0
    assert not [file for file in (out / "model").iterdir() if b"auto_map" in file.read_bytes()]
    llm_models.tokenizer(bos=True).save_pretrained(given / "tuned")
    long = [" ".join(f"w{3 + (i * j) % 50}" for j in range(90)) for i in range(1, 6)]
    lines(given / "r.jsonl", long)
    capsys.readouterr()
    assert main(arguments(given, tmp_path / "bos", "--steps", 0, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["max_tokens"] == 63  # and BOS: the model reads 64


def test_a_base_that_lacks_a_tensor_and_pickles_are_refused(folder, tmp_path, capsys):
    given = copied(folder, tmp_path / "given")
    file = given / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    assert "must hold every weight of LlamaForCausalLM" in error(capsys, given, tmp_path / "out")
    file.unlink()
    torch.save(tensors, given / "base" / "pytorch_model.bin")
    assert "safetensors" in error(capsys, given, tmp_path / "out")


def test_texts_are_compared_as_they_are_read(folder, tmp_path, capsys):
    given = copied(folder, tmp_path / "given")
    heads = [" ".join(text.split()[:5]) for text in _texts(folder / "m.jsonl")[:6]]
    lines(given / "n.jsonl", [f"{head} w60 w60 w60" for head in heads])
    told = error(capsys, given, tmp_path / "out", "--max-tokens", 5)
    assert "members and nonmembers must share no text; got 6 in both, as far as they are read" in told
    told = ["score", given / "tuned", "--base", given / "base", "--members", given / "m.jsonl", "--max-tokens", 5]
    told += ["--reference", given / "n.jsonl", "--out", tmp_path / "scores"]
    assert main(list(map(str, told))) == 1
    assert "must share no text as far as it is read (--max-tokens); got 6 in both" in capsys.readouterr().err


def test_two_runs_into_one_folder_exclude_each_other(folder, tmp_path, capsys):
    with exclusive(tmp_path):
        assert "must be used by one run at a time" in error(capsys, folder, tmp_path)


def test_what_is_refused_in_one_line(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert "members and nonmembers must share no text; got 16 in both" in error(capsys, folder, out, nonmembers="m")
    assert "reference and nonmembers must share no text; got 16 in both" in error(capsys, folder, out, nonmembers="r")
    heldout = error(capsys, folder, out, "--heldout", folder / "r.jsonl")
    assert "reference and heldout must share no text; got 16 in both" in heldout
    assert "MODEL must be a folder of transformers; there is none at" in error(capsys, folder, out, model="nothing")
    assert "--out must lie outside MODEL" in error(capsys, folder, folder / "tuned" / "out")
    assert not (folder / "tuned" / "out").exists()
    assert "rate must lie above 0, and at most 0." in error(capsys, folder, out, "--rate", 0.999)
    assert not (out / "model").exists()
    (out / "model").mkdir(parents=True)
    assert "must not exist: nothing is written over" in error(capsys, folder, out)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "must be a whole model" in error(capsys, folder, tmp_path / "o", model=tmp_path / "adapter")
    lines(folder / "spaced.jsonl", [f" {text.replace(' ', '  ')}" for text in _texts(folder / "r.jsonl")])
    assert "reference and nonmembers must share no text" in error(capsys, folder, tmp_path, nonmembers="spaced")


def _texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--alpha", "low"], "--alpha must be auto or a number of nats; got 'low'"),
        (["--alpha", "nan"], "--alpha must be at least 0 and finite; got nan"),
        (["--steps", "-1"], "--steps must be at least 0; got -1"),
        (["--rate", "2"], "--rate must lie above 0, and at most 1; got 2"),
        (["--rate", "0"], "--rate must lie above 0, and at most 1; got 0"),
        (["--fpr", "2"], "--fpr must lie in [0, 1]; got 2"),
    ],
)
def test_wrong_usage_exits_with_2(folder, tmp_path, capsys, more, match):
    with pytest.raises(SystemExit) as exit_:
        main(arguments(folder, tmp_path / "out", *more))
    assert exit_.value.code == 2
    assert match in capsys.readouterr().err
