"""cwfast audit-llm: from folders and JSON lines to table, JSON and page; what it refuses, in one line."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from cwfast import llm, mia
from cwfast.cli import main
from cwfast.llm.training import fine_tune

pytest.importorskip("transformers")
pytest.importorskip("jinja2")
import llm_models

pytestmark = pytest.mark.usefixtures("without_torchvision")
SHADOWS = 10


def lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, without_torchvision):
    """A tiny model fitted to its members, its base, a shadow of other members, and files of texts."""
    where = tmp_path_factory.mktemp("audit")
    rows = llm_models.ids(48, 6, 12, seed=4)
    texts = llm_models.words(rows)
    torch.manual_seed(0)
    base = llm_models.small("llama", torch.float32)
    base.save_pretrained(where / "base")
    rng = np.random.default_rng(0)
    halves = {f"shadow{i}": rng.permutation(32)[:16].tolist() for i in range(SHADOWS)}
    for name, side in {"tuned": [*range(16), 46, 47], **halves}.items():
        model = llm_models.small("llama", torch.float32)
        fine_tune(model, [rows[i] for i in side], epochs=4, lr=3e-3, batch=8)
        model.save_pretrained(where / name)
        lines(where / name / "members.jsonl", [texts[i] for i in side])
    for name in ("base", "tuned", *halves):
        llm_models.tokenizer().save_pretrained(where / name)
    sides = {"m": (0, 16), "n": (16, 32), "shots": (32, 35), "corpus": (35, 46), "member_shots": (46, 48)}
    for name, side in sides.items():
        lines(where / f"{name}.jsonl", texts[slice(*side)])
    return where


def arguments(folder, *more, model="tuned", members="m", nonmembers="n"):
    named = ["--members", folder / f"{members}.jsonl", "--nonmembers", folder / f"{nonmembers}.jsonl"]
    return ["audit-llm", *map(str, [folder / model, *named, "--bootstrap", 100, *more])]


def document(capsys, *given, **named):
    assert main([*arguments(*given, **named), "--json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out)


def error(capsys, *given, **named):
    assert main(arguments(*given, **named)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("cwfast: error: ")
    return last


def test_all_attacks_with_everything_given(folder, tmp_path, capsys):
    shadows = [folder / f"shadow{i}" for i in range(SHADOWS)]
    more = ["--reference", folder / "base", "--shots", folder / "shots.jsonl", "--corpus", folder / "corpus.jsonl"]
    more += ["--shadow", *shadows, "--out", tmp_path / "out", "--copies", 2, "--fpr", 0.1]
    more += ["--member-shots", folder / "member_shots.jsonl"]
    found = document(capsys, folder, *more)
    assert set(found["attacks"]) == set(llm.ATTACKS)
    assert found["left_out"] == {}
    assert found["schema"] == "cwfast-audit-llm/1"
    for name, row in found["attacks"].items():
        point = row["tpr_at_fpr"][0]
        assert row["auc_low"] <= row["auc"] <= row["auc_high"], name
        assert point["low"] <= point["tpr"] <= point["high"]
        count = round(point["tpr"] * 16)
        assert (point["low"], point["high"]) == mia.metrics.clopper_pearson(count, 16)
    assert found["attacks"]["reference"]["auc"] > 0.9
    names = ("loss", "zlib", "min_k", "min_k_pp", "surp")
    assert set(found["controls"]) == {"bag_of_words", *(f"reference_{name}" for name in names)}
    assert {row["confidence"] for row in found["controls"].values()} == {1 - 0.05 / 6}
    assert found["dataset_inference"]["p_value"] < 0.05
    assert found["inputs"]["members"]["file"].endswith("m.jsonl")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report == found
    page = (tmp_path / "out" / "report.html").read_text()
    assert not any(text in page for text in (folder / "m.jsonl").read_text().split('"') if text.startswith("w"))
    assert found["headline"] == found["exposed"]["attack"] == "ez_mia"
    highest = found["highest"]
    assert (
        found["attacks"][highest["attack"]]["auc"] == highest["auc"] == max(r["auc"] for r in found["attacks"].values())
    )
    assert highest["confidence"] == pytest.approx(1 - 0.05 / len(found["attacks"]))
    printed = (tmp_path / "out" / "report.md").read_text()
    assert f"AUC {found['attacks']['ez_mia']['auc']:.3f} [" in printed
    assert "by ez_mia, an attack chosen before any score was seen" in printed
    assert "of 6 controls differ from 0.5" in printed
    assert all(f"| `{name}` | " in printed for name in [*found["attacks"], *found["controls"]])
    kept = llm.TokenRecords.load(tmp_path / "out" / "records" / "texts-kl")
    member = np.arange(32) < 16
    alone = mia.metrics.auc(llm.attack("min_k", kept.of_reference()), member)
    assert found["controls"]["reference_min_k"]["auc"] == alone
    assert found["attacks"]["wbc"]["auc"] == mia.metrics.auc(llm.attack("wbc", kept), member)


def test_the_table_and_what_was_not_run(folder, capsys):
    assert main(arguments(folder)) == 0
    printed = capsys.readouterr().out
    assert "loss " in printed
    assert "min_k_pp" in printed
    assert "(bag_of_words)" in printed
    assert "0 of 1 controls differ from 0.5 (intervals at 95% each" in printed
    assert "Not run: wbc, it needs a reference model (--reference)." in printed
    assert "Not run: rmia, it needs shadow models (--shadow)." in printed
    assert "Not run: con_recall, it needs non-members that are not audited (--shots)." in printed
    assert document(capsys, folder, "--attacks", "loss", "min_k")["left_out"] == {}


def test_an_attack_that_cannot_run_ends_no_audit_of_all(folder, tmp_path, capsys):
    more = ["--reference", folder / "base", "--shadow", folder / "shadow0", folder / "shadow1"]
    found = document(capsys, folder, *more)
    assert {name for name, why in found["left_out"].items() if why.startswith("cannot run here: ")} == {"lira"}
    assert "wbc" in found["attacks"]
    assert "models" in error(capsys, folder, *more, "--attacks", "lira")


def test_two_runs_agree_and_the_second_reads_the_records(folder, tmp_path, capsys, monkeypatch):
    more = ["--attacks", "wbc", "gradient_norm", "pac", "--reference", folder / "base", "--out", tmp_path / "out"]
    more += ["--autocast", "bfloat16", "--max-tokens", "7"]
    first = document(capsys, folder, *more)
    assert first["headline"] == "wbc"  # the first that was asked for
    assert first["records"]["autocast"] == "bfloat16"
    from cwfast.llm import gradients, recording

    monkeypatch.setattr(recording._Run, "shard", None)  # nothing may be computed again
    monkeypatch.setattr(gradients, "windows", None)
    assert document(capsys, folder, *more) == first
    file = tmp_path / "out" / "records" / "norms.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert "must hold gradient norms of this run" in error(capsys, folder, *more)


def test_controls_and_changed_copies_are_of_what_is_read(folder, capsys, monkeypatch):
    """A word after the last token that is read tells the sides apart; nothing here may see it."""
    rows = llm_models.words(llm_models.ids(16, 10, 12, seed=8))
    lines(folder / "ends.jsonl", [f"{text} w60 w60 w60" for text in rows])
    whole = document(capsys, folder, "--attacks", "loss", nonmembers="ends")
    assert whole["controls"]["bag_of_words"]["auc"] > 0.95
    from cwfast.llm import gathering

    seen = []
    real = gathering.records
    monkeypatch.setattr(gathering, "records", lambda m, t, given, **how: seen.extend(given) or real(m, t, given, **how))
    cut = document(capsys, folder, "--attacks", "loss", "lowercase", "pac", "--max-tokens", 8, nonmembers="ends")
    assert cut["warnings"] == []
    changed = seen[32:]
    assert len(changed) == 32 + 5 * 32
    assert max(len(text.split()) for text in changed) == 8
    assert not any("w60" in text for text in changed[16:32])


class Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def test_texts_are_shown_on_request_and_escaped(folder, tmp_path, capsys, monkeypatch):
    from cwfast.commands import audit_llm

    class Hostile:
        def __init__(self, own):
            self.own = own

        def __getattr__(self, name):
            return getattr(self.own, name)

        def __call__(self, *args, **kwargs):
            return self.own(*args, **kwargs)

        def decode(self, ids):
            return f"<script>alert({ids[0]})</script>&\"'"

    load = audit_llm._tokenizer
    monkeypatch.setattr(audit_llm, "_tokenizer", lambda name: Hostile(load(name)))
    more = ["--attacks", "loss", "--out", tmp_path / "out", "--show-text"]
    assert main(arguments(folder, *more)) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    seen = Text()
    seen.feed(page)
    assert "script" not in seen.tags
    assert "<script>alert(" in "".join(seen.text)
    assert page.count('<span style="background:rgba(213,94,0,') > 50
    assert "This page holds private text" in page


def test_a_warning_where_words_alone_tell_the_sides_apart(folder, tmp_path, capsys):
    rows = llm_models.ids(16, 6, 12, seed=8)
    lines(folder / "later.jsonl", [f"{text} w60 w60" for text in llm_models.words(rows)])
    found = document(capsys, folder, "--attacks", "loss", nonmembers="later")
    assert len(found["warnings"]) == 1
    assert found["warnings"][0].startswith("bag_of_words tells members from non-members without any model: AUC")
    assert main(arguments(folder, "--attacks", "loss", nonmembers="later")) == 0
    assert capsys.readouterr().out.startswith("WARNING: bag_of_words")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_peft_folder_has_its_base_as_reference(folder, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    base = llm_models.small("llama", torch.float32)
    base.save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "lora")
    llm_models.tokenizer().save_pretrained(tmp_path / "lora")
    for name in ("m", "n"):
        (tmp_path / f"{name}.jsonl").write_text((folder / f"{name}.jsonl").read_text())
    found = document(capsys, tmp_path, "--attacks", "reference", "informia", model="lora")
    assert "reference_loss" in found["controls"]


def test_what_is_refused_in_one_line(folder, capsys, tmp_path):
    assert "there is none at" in error(capsys, folder, members="nothing")
    assert "the attack wbc needs a reference model (--reference); got none" in error(capsys, folder, "--attacks", "wbc")
    assert "members and nonmembers must share no text; got 16 in both" in error(capsys, folder, nonmembers="m")
    shots = error(capsys, folder, "--shots", folder / "n.jsonl")
    assert "shots must hold no text that is audited; got 16" in shots
    (folder / "broken.jsonl").write_text('{"text": "a b"}\n{"txt": 1}\n')
    assert 'must hold {"text": "..."} in each line; line 2 has dict' in error(capsys, folder, members="broken")
    (folder / "broken.jsonl").write_text('{"text": "a b"}\n\n{"text"\n')
    assert "line 3" in error(capsys, folder, members="broken")
    lines(folder / "few.jsonl", ["w3 w4"])
    assert "members must hold at least 5 texts; got 1" in error(capsys, folder, members="few")


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--attacks", "losss"], "--attacks must be all, or among loss, zlib"),
        (["--show-text"], "--show-text must come with --out"),
        (["--fpr", "2"], "--fpr must lie in [0, 1]; got 2"),
        (["--max-tokens", "1"], "--max-tokens must be at least 2; got 1"),
    ],
)
def test_wrong_usage_exits_with_2(folder, capsys, more, match):
    with pytest.raises(SystemExit) as exit_:
        main(arguments(folder, *more))
    assert exit_.value.code == 2
    assert match in capsys.readouterr().err
