"""cwfast demo-llm at a tiny size: every row, resumed to the same report; what the report says follows from its rows."""

import dataclasses
import json
import shutil
import warnings

import numpy as np
import pytest
import torch

import cwfast
from cwfast import demo_llm
from cwfast.cli import main
from cwfast.demo_llm import models as making
from cwfast.demo_llm import rows as judging
from cwfast.demo_llm import sizes as presets
from cwfast.errors import CheckpointError
from cwfast.llm.shadows import halves
from cwfast.report import llm_defense

pytest.importorskip("transformers")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
import llm_models

pytestmark = [
    pytest.mark.usefixtures("without_torchvision"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
SIZES = presets.Sizes(
    members=16, nonmembers=16, reference=16, heldout=8, lr=3e-3, batch=4, steps=2, steps_lr=1e-3, starts=(2,),
    criteria=tuple(presets.CRITERIA), random_rates=(0.1, 0.3), low_lr=True, taus=(0.5, 0.15), tuned_taus=(0.3,),
    rewound_only=True, lora=(1e-2,), shadows=4, bootstrap=50, fprs=(0.1,),
)  # fmt: skip


def material(out, sizes):
    ids = llm_models.ids(56, 6, 12, seed=4)
    ends = np.cumsum([0, sizes.members, sizes.nonmembers, sizes.reference, sizes.heldout])
    names = ("members", "nonmembers", "reference", "heldout")
    sides = {name: ids[i:j] for name, i, j in zip(names, ends[:-1], ends[1:], strict=True)}
    return presets.Material(llm_models.small("llama", torch.float32, tie_word_embeddings=True), sides, "random ids")


@pytest.fixture(scope="module")
def made(tmp_path_factory, without_torchvision):
    pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("demo")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # peft's, in set-up
        return out, demo_llm.run(out, sizes=SIZES, material=material, command="cwfast demo-llm <test>")


def test_every_row_is_there_and_follows_from_its_settings(made):
    out, report = made
    rows = {row["id"]: row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 24
    assert {row["group"] for row in rows.values()} == set(llm_defense.GROUPS)
    assert rows["base"]["attacks"]["reference"]["auc"] == 0.5
    assert rows["2-undefended"]["attacks"]["reference"]["auc"] > 0.9
    assert rows["2-undefended"]["attacks"]["rmia"]["auc"] > 0.9
    total = int(report["settings"]["weights"].replace(",", ""))
    for criterion in presets.CRITERIA:
        for rate in (0.1, 0.3):
            only, tuned = rows[f"2-{criterion}-{rate}-only"], rows[f"2-{criterion}-{rate}"]
            assert only["rewound"] == tuned["rewound"] == int(total * rate + 1e-9)
            assert only["alpha"] is None
            assert tuned["alpha"] == pytest.approx(only["loss"]["members"], rel=1e-5)  # where the steps begin
    for rate in (0.1, 0.3):
        assert rows[f"2-random-{rate}"]["alpha"] == rows[f"2-gap-{rate}"]["alpha"]
        assert rows[f"2-random-{rate}"]["rewound"] == rows[f"2-gap-{rate}"]["rewound"]
    for key, start in (("2-not-rewound", "2-undefended"), ("2-half-tuned", "2-half"), ("2-tau-0.3-tuned", None)):
        assert rows[key]["steps"] == SIZES.steps
        if start:  # each aims at the loss that its own start has
            assert rows[key]["alpha"] == pytest.approx(rows[start]["loss"]["members"], rel=1e-5)
    assert json.loads((out / "run.json").read_text())["versions"]["cwfast"] == cwfast.__version__
    losses = [rows[key]["loss"]["members"] for key in ("2-undefended", "2-tau-0.5", "2-tau-0.15", "base")]
    assert losses == sorted(losses)
    assert not any("draws" in row for row in rows.values())
    page, told = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "cwfast demo-llm &lt;test&gt;" in page
    for row in rows.values():
        assert row["label"] in page
        assert row["label"] in told
    assert all(sentence in told for sentence in report["reading"])
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((out / "report.json").read_text()) == report


def test_a_run_goes_on_and_ends_with_the_same_report(made, tmp_path, monkeypatch):
    out, report = made
    shutil.copytree(out, tmp_path / "demo")
    for key in ("base", "2-gap-0.3", "2-not-rewound"):
        (tmp_path / "demo" / "rows" / f"{key}.json").unlink()
    (tmp_path / "demo" / "work" / "target-2.safetensors").unlink()
    shutil.rmtree(tmp_path / "demo" / "records" / "2-shadow-1")
    again = demo_llm.run(tmp_path / "demo", sizes=SIZES, material=material, command="cwfast demo-llm <test>")

    def timeless(one):
        rows = [{k: v for k, v in row.items() if "seconds" not in k} for row in one["rows"]]
        return one | {"rows": rows, "settings": one["settings"] | {"time": None}}

    assert timeless(again) == timeless(report)
    monkeypatch.setattr(making, "fine_tune", None)
    monkeypatch.setattr(judging, "fine_tune", None)  # nothing is trained, scored or read again
    monkeypatch.setattr(making, "score", None)
    monkeypatch.setattr(judging.measuring, "read", None)
    assert demo_llm.run(out, sizes=SIZES, material=material, command="cwfast demo-llm <test>") == report


def test_rates_and_shadows_add_to_what_is_there(made, tmp_path, monkeypatch):
    out, report = made
    shutil.copytree(out, tmp_path / "demo")
    trained, held = [], []
    fine_tune, hold_ = judging.fine_tune, making.hold_
    monkeypatch.setattr(making, "fine_tune", None)
    monkeypatch.setattr(judging, "fine_tune", lambda *a, **k: trained.append((a[1], k)) or fine_tune(*a, **k))
    monkeypatch.setattr(making, "hold_", lambda *a, **k: held.append(k["steps"]) or hold_(*a, **k))
    monkeypatch.setattr(making, "score", None)
    found = demo_llm.run(tmp_path / "demo", sizes=SIZES, material=material, rates=(0.1, 0.2), shadows=5)
    ((texts, how),) = trained  # the fifth shadow
    sides = material(None, SIZES).ids
    audited = sides["members"] + sides["nonmembers"]
    assert texts == [audited[i] for i in np.flatnonzero(halves(32, 5, 0)[4])]
    assert (how["seed"], how["epochs"]) == (5, 2)
    assert held == [0, 2] * 3 + [2]  # each criterion at 20%, rewound only and tuned, and random weights
    rows, before = ({row["id"]: row for row in one["rows"]} for one in (found, report))
    assert {"2-gap-0.2", "2-taylor_delta-0.2", "2-random-0.2"} <= set(rows)
    assert {"2-gap-0.3", "2-random-0.3"} <= set(rows)
    assert "rmia" not in rows["base"]["attacks"]
    shared = rows["2-gap-0.1"]["attacks"]
    assert shared["reference"] == before["2-gap-0.1"]["attacks"]["reference"]
    assert any(
        key != "base" and row["attacks"]["rmia"] != before[key]["attacks"]["rmia"]
        for key, row in rows.items()
        if key in before
    )
    monkeypatch.setattr(judging, "fine_tune", None)
    monkeypatch.setattr(making, "hold_", None)
    assert (
        demo_llm.run(tmp_path / "demo", sizes=SIZES, material=material)["rows"] == found["rows"]
    )  # keeps what was added
    shutil.rmtree(tmp_path / "demo" / "records" / "2-shadow-4")
    fewer = demo_llm.run(tmp_path / "demo", sizes=SIZES, material=material, report_only=True)
    assert not any("rmia" in row["attacks"] for row in fewer["rows"])
    assert fewer["notes"][1] == "Not done: shadows for RMIA, 2 epochs."


def test_what_is_there_can_be_reported(made, tmp_path, monkeypatch):
    out, report = made
    shutil.copytree(out, tmp_path / "demo")
    for key in ("2-gap-0.3", "2-random-0.3"):
        (tmp_path / "demo" / "rows" / f"{key}.json").unlink()
    monkeypatch.setattr(making, "fine_tune", None)
    monkeypatch.setattr(judging, "fine_tune", None)
    found = demo_llm.run(tmp_path / "demo", sizes=SIZES, material=material, report_only=True)
    assert len(found["rows"]) == len(report["rows"]) - 2
    assert found["notes"][1] == "Not done: CWRF gap 30% + 2 steps; Random weights, 30% + 2 steps."
    with pytest.raises(ValueError, match="must hold an undefended model for a report; it holds none yet"):
        demo_llm.run(tmp_path / "empty", sizes=SIZES, material=None, report_only=True)
    for wrong, said in (({"rates": (0.1, 0.0)}, "at most 1; got 0"), ({"shadows": 1}, "0, or at least 2; got 1")):
        with pytest.raises(ValueError, match=said):
            demo_llm.run(tmp_path / "empty", sizes=SIZES, material=None, **wrong)
    assert not (tmp_path / "empty").exists()


def test_the_command(made, monkeypatch, capsys):
    out, report = made
    monkeypatch.setattr(demo_llm, "Sizes", lambda: SIZES)
    monkeypatch.setattr(presets, "smollm_material", material)
    assert main(["demo-llm", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert all(row["label"] in printed for row in report["rows"])
    assert main(["demo-llm", "--out", str(out), "--json", "--seed", "1"]) == 1
    assert "must hold a run with the same seed" in capsys.readouterr().err


def test_a_folder_of_another_run_is_refused(made, tmp_path):
    with pytest.raises(CheckpointError, match="must hold a run with the same seed; it holds another"):
        demo_llm.run(made[0], sizes=SIZES, material=material, seed=1)
    (tmp_path / "own" / "work").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="must hold a run, or no work"):
        demo_llm.run(tmp_path / "own", sizes=SIZES, material=material)
    with pytest.raises(CheckpointError, match="same sizes"):
        demo_llm.run(made[0], sizes=dataclasses.replace(SIZES, steps=3), material=material)


def test_the_sets_of_the_real_demo_share_no_text(monkeypatch, tmp_path):
    class Words:
        def __call__(self, texts, add_special_tokens):
            return {"input_ids": [2 * [int(text.removeprefix("text "))] for text in texts]}

    import transformers

    texts = [f"text {i}" for i in range(1000)]
    monkeypatch.setattr(presets.smollm, "docstrings", lambda: texts)
    monkeypatch.setattr(presets.smollm, "base", lambda folder: folder)
    monkeypatch.setattr(presets, "local", lambda *_: None)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: Words())
    for sizes in (presets.Sizes(), presets.FULL):
        sides = presets.smollm_material(tmp_path, sizes).ids
        flat = [row[0] for side in sides.values() for row in side]
        assert len(flat) == len(set(flat))
        assert {name: len(side) for name, side in sides.items()} == {name: getattr(sizes, name) for name in sides}
        assert set(sizes.random_rates) <= set(sizes.rates)
        assert "gap" in sizes.criteria


@pytest.mark.slow
def test_smollm2(tmp_path):
    """The real model, few texts: it is found out, and rewinding by gap hides some of it."""
    llm_models.need_smollm2()
    sizes = presets.Sizes(
        members=16, nonmembers=16, reference=16, heldout=8, max_tokens=32, steps=1, taus=(), tuned_taus=(),
        criteria=("gap",), rates=(0.3,), random_rates=(0.3,), bootstrap=20,
    )  # fmt: skip
    rows = {row["id"]: row for row in demo_llm.run(tmp_path, sizes=sizes)["rows"]}
    assert 3.0 < rows["base"]["loss"]["heldout"] < 5.0  # random weights: 10.8
    assert rows["1-undefended"]["attacks"]["reference"]["auc"] > 0.7
    assert rows["1-gap-0.3"]["loss"]["members"] > rows["1-undefended"]["loss"]["members"]
