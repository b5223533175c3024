"""Every program on the pages of docs/ runs and does what its page says; the API reference lacks no public name."""

import json
import re
import subprocess
import sys
import types
from importlib.metadata import EntryPoint

import pytest
import snippets
import torch

from cwfast import layers
from cwfast.data import loading
from cwfast.defense import criteria
from cwfast.defense.specs import DEFENSES, table


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_page_with_a_program_has_a_test():
    pages = {path.relative_to(snippets.DOCS).as_posix() for path in snippets.DOCS.rglob("*.md")}
    with_programs = {page for page in pages if page[0] != "_" and snippets.blocks(page)}
    assert with_programs == {"recipes.md", "getting-started.md", "scaling.md"} | {  # recipes.md: test_recipes.py
        f"how-to/{name}.md"
        for name in (
            "audit-a-classifier",
            "audit-a-language-model",
            "audit-from-logits",
            "choose-a-defense",
            "defend-a-language-model",
            "fine-tune-a-transformer",
            "load-data",
            "run-on-a-gpu",
            "run-on-several-ranks",
            "score-a-custom-layer",
            "train-with-dp-sgd",
            "train-with-transformers",
            "vary-cwrf",
            "token-statistics",
        )
    }


@pytest.mark.parametrize("first", ["false", "cwfast nonsense"])
def test_a_command_that_fails_fails_the_page(first):
    with pytest.raises(RuntimeError, match=f"failed:\n{first}"):
        snippets._shell(f"{first}\ntrue\n")


def test_getting_started(capsys):
    found = snippets.run("getting-started.md")
    assert found["masks"].total == sum(p.numel() for p in found["model"].parameters()) // 10
    masks, initial = found["result"].masks, found["initial"]
    for name, parameter in found["model"].named_parameters():
        moved = parameter != initial.get_parameter(name)
        assert not moved[masks[name]].any()
        assert moved[~masks[name]].any()
    assert len(found["result"].history) == 5
    assert found["masks"].summary() in capsys.readouterr().out


def test_the_figures_of_scaling_are_those_of_its_program():
    page = (snippets.DOCS / "scaling.md").read_text(encoding="utf-8")
    assert "\n".join(snippets.run("scaling.md")["table"]) + "\n" in page


def test_audit_a_language_model(capsys, without_torchvision):
    found = snippets.run("how-to/audit-a-language-model.md")
    assert len(found["records"]) == 40
    assert capsys.readouterr().out.count(" AUC 0.") == 4


def test_defend_a_language_model(capsys, without_torchvision):
    found = snippets.run("how-to/defend-a-language-model.md")
    assert found["done"].masks.total == found["done"].masks.numel // 10
    for name in ("loss", "reference"):
        assert found["after"]["attacks"][name]["auc"] <= found["before"]["attacks"][name]["auc"]
    assert capsys.readouterr().out.count(" before, ") == 6


def test_getting_started_has_the_set_up_commands_of_the_readme():
    readme = (snippets.DOCS.parent / "README.md").read_text(encoding="utf-8")
    part = readme.partition("## Two commands")[2].partition("## What the demo finds")[0]
    assert part.count("pip install -c constraints.txt") == 2  # what the page includes


def test_choose_a_defense():
    found = snippets.run("how-to/choose-a-defense.md")
    accuracies = [
        (found[name].predict(found["samples"].inputs).argmax(1) == found["samples"].targets).double().mean()
        for name in ("fitted", "distilled", "rewound")
    ]
    assert min(accuracies) > 0.6
    assert found["rewound"].masks.total == found["rewound"].masks.numel // 100
    page = (snippets.DOCS / "how-to/choose-a-defense.md").read_text(encoding="utf-8")
    names = dict(re.findall(r"^\| `([\w-]+)` \| (.*?) \|", page, re.MULTILINE))
    assert list(names) == list(DEFENSES)
    for name, options, _ in table():
        if name not in ("dpsgd", "cwrf"):
            assert names[name] == f"`{options}`"


@pytest.mark.slow
def test_audit_a_classifier(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)  # where a script of the reader's would lie, beside its modules
    found = snippets.run("how-to/audit-a-classifier.md", "shadows")
    before, after = (found[name].report["attacks"]["lira"] for name in ("before", "after"))
    assert after["auc_high"] < before["auc_low"]
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        "signals.safetensors", "before.html", "after.html", "mytask.py", "myloop.py",
    }  # fmt: skip
    for name in ("undefended", "defended"):
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert report["attacks"]["lira"]["targets"] == 8
        assert (tmp_path / name / "report.html").is_file()
        log = [json.loads(line) for line in (tmp_path / name / "shadows" / "log.jsonl").read_text().splitlines()]
        assert sorted(line["job"] for line in log if line["event"] == "started") == [0, 1]  # once, however often asked
    assert (
        found["audit"].report["attacks"]["lira"]["auc"]
        == json.loads((tmp_path / "undefended" / "report.json").read_text())["attacks"]["lira"]["auc"]
    )
    assert found["signals"].values["loss"].shape == (8, 400, 1)
    assert found["signals"].manifest["job"] == "myloop:job"


def test_audit_from_logits(capsys, tmp_path):
    found = snippets.run("how-to/audit-from-logits.md")
    assert found["membership"].sum(0).unique().tolist() == [8]
    assert "must be 'defended', the plan's; got 'made up'" in capsys.readouterr().out
    by_command = json.loads((tmp_path / "report/report.json").read_text())
    by_program = json.loads((tmp_path / "audit.json").read_text())
    for name in ("loss", "lira", "rmia"):
        assert by_command["attacks"][name]["auc"] == by_program["attacks"][name]["auc"]
    assert by_command["inputs"]["membership"]["file"] == "samples.npz:in_training"
    assert json.loads((tmp_path / "signals.json").read_text())["attacks"].keys() == {"lira", "attack_r"}
    assert "<img" in (tmp_path / "shown/report.html").read_text()
    assert "<img" not in (tmp_path / "report/report.html").read_text()


def test_load_data(monkeypatch):
    found = snippets.run("how-to/load-data.md")
    assert [len(found[name].pool) for name in ("digits", "purchase", "own", "given")] == [1200, 600, 300, 300]
    page = (snippets.DOCS / "how-to/load-data.md").read_text(encoding="utf-8")
    names = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert names == {*loading.BUNDLED, *loading.LOCAL}
    entry = EntryPoint(*re.search(r'(\w+) = "(mypackage:read)"', page).groups(), loading.GROUP)
    monkeypatch.setitem(sys.modules, "mypackage", types.SimpleNamespace(read=found["read"]))
    monkeypatch.setattr(loading, "entry_points", lambda group: [entry] if group == loading.GROUP else [])
    own = eval(re.search(r"`(data\.load\(\"mine\".*?\))`", page)[1], found)
    assert (len(own.pool), len(own.targets)) == (30, 50)


@pytest.mark.usefixtures("without_torchvision")
def test_fine_tune_a_transformer(capsys):
    found = snippets.run("how-to/fine-tune-a-transformer.md")
    masks = found["masks"]
    scored = sum(p.numel() for name, p in found["model"].named_parameters() if ".h." in name and "ln_" not in name)
    assert masks.total == scored // 100
    assert "48 sequences scored" in capsys.readouterr().out
    names = dict(found["model"].named_parameters())
    assert torch.equal(found["model"].lm_head.weight, names["transformer.wte.weight"])  # tied, and named once


@pytest.mark.usefixtures("without_torchvision")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_train_with_transformers():
    for library in ("accelerate", "peft"):
        pytest.importorskip(library)
    found = snippets.run("how-to/train-with-transformers.md")
    numel = sum(p.numel() for p in found["base"].parameters())
    assert found["by_file"].masks.total == numel // 50
    assert found["masks"].total == numel // 200
    assert found["callback"].masks.total == sum(p.numel() for p in found["initial"].values()) // 5


def test_run_on_a_gpu(capsys):
    snippets.run("how-to/run-on-a-gpu.md")
    assert "reference runs here" in capsys.readouterr().out


def test_run_on_several_ranks(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = snippets.run("how-to/run-on-several-ranks.md")
    numel = sum(p.numel() for name, p in found["base"].items() if not name.startswith("embed"))
    assert found["masks"].total == numel * 5 // 100
    assert found["masks"].summary() in capsys.readouterr().out


def test_score_a_custom_layer(capsys, monkeypatch):
    monkeypatch.setattr(layers, "_RULES", dict(layers._RULES))  # the page registers a rule
    found = snippets.run("how-to/score-a-custom-layer.md")
    names = {"0.weight", "0.bias", "1.weight", "2.weight", "2.bias"}
    assert found["looped"].keys() == found["by_rule"].keys() == found["by_batch"].keys() == names
    assert found["gate"] in layers._RULES
    assert "'1.weight' is used by gate" in capsys.readouterr().out


def test_train_with_dp_sgd(capsys):
    pytest.importorskip("opacus", reason="pip install opacus")
    found = snippets.run("how-to/train-with-dp-sgd.md")
    data, covers = found["data"], [found[name].notes["privacy"] for name in ("fitted", "rewound", "released")]
    assert [privacy.covers for privacy in covers] == ["model", "fine-tuning", "model"]
    assert 7.9 < covers[0].epsilon <= 8
    assert covers[1].noise_multiplier == covers[2].noise_multiplier == 0.9
    for name in ("fitted", "rewound", "released"):
        right = found[name].predict(data.inputs[data.test]).argmax(dim=1) == data.targets[data.test]
        assert right.float().mean() > 0.7, name
    for name, p in found["model"].named_parameters():
        same = p == found["before"][name]
        assert same[found["masks"][name]].all()
        assert not same.all()
    assert "no guarantee for the released model" in capsys.readouterr().out


def test_vary_cwrf(capsys, monkeypatch):
    monkeypatch.setattr(criteria, "CRITERIA", dict(criteria.CRITERIA))  # the page registers one
    found = snippets.run("how-to/vary-cwrf.md")
    fleets = ("without_norms", "each_layer", "by_hand", "at_once", "in_rounds", "only_rewound", "retrained", "removed")
    numel = sum(p.numel() for p in found["trained"][0].model.parameters())
    totals = {name: found[name][0].masks.total for name in fleets}
    assert totals["at_once"] == totals["in_rounds"] == numel // 10
    assert totals["only_rewound"] == totals["retrained"] == totals["removed"] == 3 * numel // 100
    assert found["norms"] == ["1.weight", "1.bias", "5.weight", "5.bias"]
    assert not any(found["without_norms"][0].masks.counts[name] for name in found["norms"])
    assert found["by_hand"][0].masks.counts["0.weight"] == 288 // 5
    assert len(found["scored"]) == 2
    printed = capsys.readouterr().out
    assert "overlap with those before None" in printed
    assert "linear: 85,002 weights, Pearson " in printed
    assert "A1: critical weights removed" in printed


def test_token_statistics():
    found = snippets.run("how-to/token-statistics.md")
    p = torch.softmax(found["hidden"] @ found["weight"].T, dim=1)
    torch.testing.assert_close(found["loss"], -p.gather(1, found["targets"][:, None]).log().mean())
    assert found["min_k_pp"] < 0
    assert found["moved"].grad.abs().sum() > 0


def test_the_notebook_is_kept_without_outputs():
    notebook = json.loads((snippets.DOCS / "notebook.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)


@pytest.mark.slow
@pytest.mark.usefixtures("without_torchvision")
def test_the_reference_has_every_public_name(tmp_path):
    pytest.importorskip("furo")
    import public_names
    from sphinx.util.inventory import InventoryFile

    command = [sys.executable, "-P", "-m", "sphinx", "-q", "-W", "-t", "reference", "-b", "html", snippets.DOCS, "site"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    inventory = InventoryFile.loads((tmp_path / "site/objects.inv").read_bytes(), uri="")
    names = {name for kind in inventory.data if kind.startswith("py:") for name in inventory.data[kind]}
    assert public_names.missing(names) == []
    for name in ("cwfast.ops.select_topk", "cwfast.SaliencyScorer", "cwfast.mia.metrics.auc", "cwfast.freeze"):
        assert name in names
        assert public_names.missing(names - {name}) == [name]
