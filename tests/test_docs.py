"""Every program on the pages of docs/ runs and does what its page says; the API reference lacks no public name."""

import json
import subprocess
import sys

import pytest
import snippets
import torch

from cwfast import layers


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_page_with_a_program_has_a_test():
    pages = {path.relative_to(snippets.DOCS).as_posix() for path in snippets.DOCS.rglob("*.md")}
    with_programs = {page for page in pages if page[0] != "_" and snippets.blocks(page)}
    assert with_programs == {"recipes.md", "getting-started.md"} | {  # recipes.md: test_recipes.py
        f"how-to/{name}.md"
        for name in (
            "audit-a-classifier",
            "audit-from-logits",
            "fine-tune-a-transformer",
            "run-on-a-gpu",
            "score-a-custom-layer",
        )
    }


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


def test_getting_started_has_the_set_up_commands_of_the_readme():
    readme = (snippets.DOCS.parent / "README.md").read_text(encoding="utf-8")
    part = readme.partition("## Two commands")[2].partition("## What the demo finds")[0]
    assert part.count("pip install -c constraints.txt") == 2  # what the page includes


@pytest.mark.slow
def test_audit_a_classifier(tmp_path):
    found = snippets.run("how-to/audit-a-classifier.md")
    before, after = (found[name].report["attacks"]["lira"] for name in ("before", "after"))
    assert after["auc_high"] < before["auc_low"]
    assert found["membership"].sum(0).unique().tolist() == [8]
    assert {path.name for path in tmp_path.iterdir()} == {"signals.safetensors", "before.html", "after.html"}


def test_audit_from_logits(capsys):
    found = snippets.run("how-to/audit-from-logits.md")
    assert found["membership"].sum(0).unique().tolist() == [8]
    assert "must be 'defended', the plan's; got 'made up'" in capsys.readouterr().out


@pytest.mark.usefixtures("without_torchvision")
def test_fine_tune_a_transformer(capsys):
    found = snippets.run("how-to/fine-tune-a-transformer.md")
    masks = found["masks"]
    scored = sum(p.numel() for name, p in found["model"].named_parameters() if ".h." in name and "ln_" not in name)
    assert masks.total == scored // 100
    assert "48 sequences scored" in capsys.readouterr().out
    names = dict(found["model"].named_parameters())
    assert torch.equal(found["model"].lm_head.weight, names["transformer.wte.weight"])  # tied, and named once


def test_run_on_a_gpu(capsys):
    snippets.run("how-to/run-on-a-gpu.md")
    assert "reference runs here" in capsys.readouterr().out


def test_score_a_custom_layer(capsys, monkeypatch):
    monkeypatch.setattr(layers, "_RULES", dict(layers._RULES))  # the page registers a rule
    found = snippets.run("how-to/score-a-custom-layer.md")
    names = {"0.weight", "0.bias", "1.weight", "2.weight", "2.bias"}
    assert found["looped"].keys() == found["by_rule"].keys() == found["by_batch"].keys() == names
    assert found["gate"] in layers._RULES
    assert "'1.weight' is used by gate" in capsys.readouterr().out


def test_the_notebook_is_kept_without_outputs():
    notebook = json.loads((snippets.DOCS / "notebook.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)


@pytest.mark.slow
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
