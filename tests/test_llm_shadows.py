"""Shadows on random halves: who trains on what, resuming, and lira, rmia and base over them through the command."""

import json

import numpy as np
import pytest
import torch

from cwfast import llm, mia
from cwfast.cli import main
from cwfast.errors import CheckpointError
from cwfast.llm import shadows, smollm

pytest.importorskip("transformers")
import llm_models

pytestmark = [
    pytest.mark.usefixtures("without_torchvision"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
TEXTS = llm_models.words(llm_models.ids(24, 8, 14, seed=4))
HOW = {"epochs": 8, "lr": 2e-2, "batch": 6}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request, tmp_path_factory, without_torchvision):
    folder = tmp_path_factory.mktemp(request.param)
    llm_models.small(request.param, torch.float32).save_pretrained(folder)
    llm_models.tokenizer().save_pretrained(folder)
    return folder


def lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("texts", "count"), [(10, 6), (11, 4), (2, 1), (7, 3)])
def test_each_text_is_in_half_of_the_models(texts, count):
    found = shadows.halves(texts, count, seed=3)
    assert found.shape == (count, texts)
    if count % 2 == 0:
        assert (found.sum(axis=0) == count // 2).all()
    assert {abs(2 * row.sum() - texts) for row in found} <= {0, 1}
    assert (found == shadows.halves(texts, count, seed=3)).all()
    assert texts < 7 or (found != shadows.halves(texts, count, seed=4)).any()
    with pytest.raises(ValueError, match="at least 2 texts and 1 shadow; got 1 and 4"):
        shadows.halves(1, 4)


def test_lira_rmia_and_base_over_adapters_find_the_members(base, tmp_path, capsys):
    pytest.importorskip("peft")
    folders = shadows.train(base, TEXTS, tmp_path / "shadows", count=8, rank=4, **HOW)
    target = tmp_path / "target"  # trained as the shadows were, on a half that none of them had
    member = shadows.halves(len(TEXTS), 1, seed=99)[0]
    shadows.train(base, TEXTS, target, count=1, rank=4, seed=99, **HOW)
    sides = [[text for text, flag in zip(TEXTS, member, strict=True) if flag == side] for side in (True, False)]
    assert (target / "shadow-0000" / "members.jsonl").read_text() == "".join(
        json.dumps({"text": text}) + "\n" for text in sides[0]
    )
    given = ["--members", lines(tmp_path / "m.jsonl", sides[0]), "--nonmembers", lines(tmp_path / "n.jsonl", sides[1])]
    given += ["--shadow", *map(str, folders), "--attacks", "reference", "lira", "rmia", "base", "--bootstrap", "20"]
    assert main(["audit-llm", str(target / "shadow-0000"), *given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["headline"] == "reference"  # the base of an adapter
    for name in ("reference", "lira", "rmia", "base"):
        assert found["attacks"][name]["auc"] > 0.9, name
    from peft import AutoPeftModelForCausalLM

    models = [AutoPeftModelForCausalLM.from_pretrained(path) for path in [target / "shadow-0000", *folders]]
    own, *others = (
        llm.attack("loss", llm.records(model, llm_models.tokenizer(), sides[0] + sides[1])) for model in models
    )
    membership = np.stack(
        [
            np.arange(len(TEXTS)) < len(sides[0]),
            *(
                [json.dumps({"text": text}) in (path / "members.jsonl").read_text() for text in sides[0] + sides[1]]
                for path in folders
            ),
        ]
    )
    expected = mia.metrics.auc(mia.base(np.stack([own, *others]), membership, 0), membership[0])
    assert found["attacks"]["base"]["auc"] == pytest.approx(expected, abs=1e-9)


def test_a_stopped_run_goes_on_and_equals_one_that_was_not(base, tmp_path, monkeypatch):
    trained = []
    fine_tune = shadows.fine_tune
    monkeypatch.setattr(shadows, "fine_tune", lambda *a, **k: trained.append(k["seed"]) or fine_tune(*a, **k))

    def stop(i, losses):
        if i == 1:
            raise KeyboardInterrupt

    how = {"rank": None, "count": 3, "epochs": 1, "lr": 1e-3}
    with pytest.raises(KeyboardInterrupt):
        shadows.train(base, TEXTS, tmp_path / "a", **how, progress=stop)
    assert trained == [0, 1]
    half = tmp_path / "a" / ".shadow-0002.partial"  # as after kill -9
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert [path.name for path in shadows.train(base, TEXTS, tmp_path / "a", **how)] == [
        "shadow-0000",
        "shadow-0001",
        "shadow-0002",
    ]
    assert trained == [0, 1, 2]
    assert not half.exists()
    whole = shadows.train(base, TEXTS, tmp_path / "b", **how)
    for folder in whole:
        other = tmp_path / "a" / folder.name
        assert sorted(x.name for x in folder.iterdir()) == sorted(x.name for x in other.iterdir())
        assert (folder / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    facts = json.loads((whole[2] / shadows.FACTS).read_text())
    assert len(facts["losses"]) == 2
    assert len({(path / "model.safetensors").read_bytes() for path in whole}) == 3


def test_another_run_in_the_folder_is_refused(base, tmp_path, monkeypatch):
    how = {"rank": None, "count": 1, "epochs": 1}
    shadows.train(base, TEXTS, tmp_path, **how)
    for other in ({"lr": 2e-3}, {"seed": 1}, {"max_tokens": 5}):
        with pytest.raises(CheckpointError, match="must be of this run"):
            shadows.train(base, TEXTS, tmp_path, **{**how, **other})
    with pytest.raises(CheckpointError, match="must be of this run"):
        shadows.train(base, TEXTS[1:], tmp_path, **how)
    (tmp_path / "shadow-0000" / shadows.FACTS).write_text("{")
    with pytest.raises(CheckpointError, match=f"must be a shadow's folder, with {shadows.FACTS}"):
        shadows.train(base, TEXTS, tmp_path, **how)
    with pytest.raises(FileNotFoundError, match=r"folder with \*.safetensors"):
        shadows.train(tmp_path / "nothing", TEXTS, tmp_path / "new", **how)


def test_the_command_and_the_examples_folder(base, tmp_path, capsys, monkeypatch):
    texts = [lines(tmp_path / f"{name}.jsonl", part) for name, part in (("m", TEXTS[:12]), ("n", TEXTS[12:]))]
    out = tmp_path / "shadows"
    given = [str(base), "--texts", *texts, "--out", str(out), "--count", "2", "--full", "--lr", "1e-3"]
    shadows.main(given)
    assert capsys.readouterr().out.startswith("shadow 0: loss ")
    assert len(list(out.glob("shadow-*/members.jsonl"))) == 2

    parts = {"members": TEXTS[:10], "nonmembers": TEXTS[10:20], "shots": TEXTS[20:22], "corpus": TEXTS[22:]}
    monkeypatch.setattr(smollm, "docstrings", lambda: TEXTS)
    monkeypatch.setattr(smollm, "split", lambda found: parts)
    monkeypatch.setattr(smollm, "base", lambda folder: folder.symlink_to(base))
    first = smollm.prepare(tmp_path / "smol")
    tuned = (tmp_path / "smol/tuned/model.safetensors").read_bytes()
    monkeypatch.setattr(smollm, "fine_tune", None)  # nothing may be trained again
    assert smollm.prepare(tmp_path / "smol") == first
    monkeypatch.undo()
    monkeypatch.setattr(smollm, "docstrings", lambda: TEXTS)
    monkeypatch.setattr(smollm, "split", lambda found: parts)
    second = smollm.prepare(tmp_path / "smol", lr=1e-3)
    assert second["training"]["lr"] == 1e-3
    assert (tmp_path / "smol/tuned/model.safetensors").read_bytes() != tuned
    count = {name: len((tmp_path / f"smol/{name}.jsonl").read_text().splitlines()) for name in ("audited", "members")}
    assert count == {"audited": 2, "members": 10}
