"""cwfast defend: weights, masks and report of one model; audits of fleets before and after."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from cwfast import MaskSet
from cwfast.cli import main


@pytest.fixture(autouse=True)
def path_of_before(monkeypatch):
    """The command adds the working directory, which later tests must not find there."""
    monkeypatch.setattr(sys, "path", [*sys.path])


def defend(capsys, tmp_path, *more):
    code = main(["defend", "--train", "shadow_jobs:tiny", "--out", str(tmp_path), "--json", *more])
    found = capsys.readouterr()
    return code, found


def test_weights_and_masks_are_written_and_the_rewound_ones_stay_initial(capsys, tmp_path):
    code, found = defend(capsys, tmp_path, "--defense", "cwrf:rate=0.2,criterion=taylor,loss=relaxloss(alpha=0.5)")
    assert code == 0, found.err
    report = json.loads(found.out)
    initial, defended, before = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("initial", "defended", "undefended")
    )
    masks = MaskSet.load(tmp_path / "masks.safetensors")
    assert masks.total == report["rewound"]["weights"] == int(0.2 * masks.numel)
    for name in masks.names:
        mask = masks[name]
        assert torch.equal(defended[name][mask], initial[name][mask])
        assert not torch.equal(defended[name], before[name])
    assert set(report["accuracy"]["after"]) == {"members", "reference", "test"}
    assert report == json.loads((tmp_path / "report.json").read_text())


@pytest.mark.parametrize(
    ("start", "covers"),
    [("reference", "covers the released model"), ("members", "no guarantee for the released model")],
)
def test_what_epsilon_covers_is_told(capsys, tmp_path, start, covers):
    pytest.importorskip("opacus", reason="pip install opacus")
    spec = f"cwrf:rate=0.1,start={start},private=dpsgd(noise_multiplier=1)"
    command = ["defend", "--train", "shadow_jobs:tiny", "--out", str(tmp_path), "--defense", spec]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert covers in told
    assert "not against whoever knows or can guess the seed" in told


def test_the_functions_own_defense_is_the_default(capsys, tmp_path):
    code, found = defend(capsys, tmp_path)
    assert code == 0, found.err
    assert json.loads(found.out)["rewound"] is None
    assert not (tmp_path / "masks.safetensors").exists()
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("undefended", "defended"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_audits_before_and_after(capsys, tmp_path):
    more = ["--defense", "relaxloss:alpha=3", "--audit", "--models", "6", "--bootstrap", "10"]
    code, found = defend(capsys, tmp_path, *more)
    assert code == 0, found.err
    audits = json.loads(found.out)["audit"]
    assert audits["before"]["models"] == audits["after"]["models"] == 6
    assert audits["before"]["attacks"]["lira"]["auc"] != audits["after"]["attacks"]["lira"]["auc"]
    assert (tmp_path / "before.html").exists()
    assert (tmp_path / "after.html").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--defense", "nothing"], "a defense must be one of"),
        (["--defense", "relaxloss:beta=1"], "relaxloss has the options"),
    ],
)
def test_wrong_defenses_are_told(capsys, tmp_path, arguments, told):
    code, found = defend(capsys, tmp_path, *arguments)
    assert code == 1
    assert told in found.err
    assert found.err.count("\n") == 1


def test_wrong_usage(capsys, tmp_path):
    for wrong in ([], ["--train", "a:b", "--data", "digits"], ["--data", "digits", "--audit", "--models", "3"]):
        with pytest.raises(SystemExit) as stopped:
            main(["defend", "--out", str(tmp_path), *wrong])
        assert stopped.value.code == 2
        assert "must be" in capsys.readouterr().err
