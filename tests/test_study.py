"""cwfast study: the tiny preset from end to end, killed and resumed, and what its comparisons say."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from cwfast.cli import main
from cwfast.defense import CRITERIA
from cwfast.mia import Signals, attacks, metrics
from cwfast.report import studies
from cwfast.study import grid, presets

pytestmark = pytest.mark.filterwarnings("ignore:.*socket.*:ResourceWarning")


def command(out, *more):
    return [sys.executable, "-P", "-m", "cwfast.cli", "study", "--preset", "tiny", "--out", str(out), *more]


def environment():
    return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}


def files(out: Path) -> dict[str, str]:
    """Hashes of all that a run leaves but its log and the report, which says the command."""
    kept = (path for path in out.rglob("*") if path.is_file() and path.parent.name.startswith("seed-"))
    return {str(path.relative_to(out)): digest(path) for path in kept}


def digest(path):
    """Of a file's content: safetensors writes the entries of its header in any order."""
    if path.suffix != ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(path, "np") as file:
        content = [sorted(file.metadata().items()), [(key, file.get_tensor(key).tobytes()) for key in file.keys()]]  # noqa: SIM118
    return hashlib.sha256(repr(content).encode()).hexdigest()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run, and its report."""
    out = tmp_path_factory.mktemp("study")
    done = subprocess.run(command(out, "--json"), capture_output=True, text=True, env=environment(), check=True)
    return out, json.loads(done.stdout), done.stderr


def test_a_run_does_every_cell_once_and_reports_it(run):
    out, report, said = run
    cells = grid.cells(presets.PRESETS["tiny"].settings["digits"])
    part = report["data"]["digits"]
    assert [row["key"] for row in part["rows"]] == [cell.key for cell in cells]
    assert report["fleets"] == len(cells)
    assert part["samples"] == {"pool": 120, "reference": 60, "test": 1617}
    assert report["missing"] == {"digits": {"0": 0}}
    assert report == json.loads((out / "report.json").read_text())
    assert f"{len(cells)} fleets of 6 models, 0 of them done before" in said
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert sorted(entry["job"] for entry in log) == sorted(f"digits/seed-0/{cell.key}" for cell in cells)
    for name in ("report.html", "report.md", "digits-tradeoff.png", "digits-rates.png"):
        assert (out / name).stat().st_size > 1000


def test_figures_follow_from_the_signals_that_are_kept(run):
    out, report, _ = run
    row = next(row for row in report["data"]["digits"]["rows"] if row["key"] == "relaxloss-gap-0.1")
    signals = Signals.load(out / "digits/seed-0/signals-relaxloss-gap-0.1-000.safetensors")
    scores = attacks.lira(signals["phi"][:, :, 0].double().numpy(), signals.membership.numpy(), variance="shrinkage")
    found = [metrics.auc(*pair) for pair in zip(scores, signals.membership.numpy(), strict=True)]
    assert math.isclose(row["attacks"]["lira_shrinkage"]["auc"], np.mean(found), rel_tol=1e-12)
    weights = 64 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10
    assert row["rewound"] == math.floor(0.1 * weights)


def test_random_weights_are_as_many_and_rate_0_rewinds_none(run):
    rows = {row["key"]: row for row in run[1]["data"]["digits"]["rows"]}
    random = rows["none-random-as-gap-0.1"]
    assert random["rewound"] == rows["none-gap-0.1"]["rewound"] > 0
    assert rows["none-tuned"]["rewound"] == 0
    assert random["test_loss"] != rows["none-gap-0.1"]["test_loss"]


def test_a_second_run_does_nothing(run):
    out, report, _ = run
    before, log = files(out), (out / "log.jsonl").read_text()
    again = subprocess.run(command(out, "--json"), capture_output=True, text=True, env=environment(), check=True)
    assert json.loads(again.stdout)["data"] == report["data"]
    assert files(out) == before
    assert (out / "log.jsonl").read_text() == log


@pytest.mark.slow
def test_kill_9_and_resume_gives_the_same_files_and_repeats_no_cell(run, tmp_path):
    process = subprocess.Popen(command(tmp_path), stderr=subprocess.DEVNULL, env=environment())
    log = tmp_path / "log.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count("done") < 4):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # its workers die with it
    done = [json.loads(line)["job"] for line in log.read_text().splitlines()]
    assert 4 <= len(done) < len(grid.cells(presets.PRESETS["tiny"].settings["digits"]))
    subprocess.run(command(tmp_path), capture_output=True, env=environment(), check=True)
    assert files(tmp_path) == files(run[0])
    jobs = [json.loads(line)["job"] for line in log.read_text().splitlines()]
    assert len(jobs) == len(set(jobs))
    assert jobs[: len(done)] == done


def test_a_rate_beyond_the_positive_shares_is_told_and_not_a_failure(tmp_path):
    from cwfast.study.jobs import Job, Study, _do

    study = Study("tiny", ("digits",), (0,), (), tmp_path)
    subject = study.subject("digits", 0)
    cells = {cell.key: cell for cell in grid.cells(presets.PRESETS["tiny"].settings["digits"])}
    from dataclasses import replace

    cell = replace(cells["none-gap-0.1"], key="none-gap-1", spec="cwrf:rate=1,criterion=gap,loss=ce", rate=1.0)
    assert _do(subject, Job("digits", 0, cell, 0), study.sizes)
    found = subject.folder.document(cell.key, subject.made_of(cell))
    assert "rate must be at most" in found["impossible"]
    assert not _do(subject, Job("digits", 0, cell, 0), study.sizes)


@pytest.mark.parametrize("network", ["MLP", pytest.param("ResNet18", marks=pytest.mark.slow),
                                     pytest.param("ViT", marks=pytest.mark.slow)])  # fmt: skip
def test_the_papers_tables_are_made_and_shown(network, run, tmp_path, monkeypatch):
    from cwfast.report import study_tables
    from cwfast.study import tables
    from cwfast.study.jobs import Study

    monkeypatch.setattr(tables, "EPOCHS", 1)
    subject = Study("tiny", ("digits",), (0,), (), tmp_path).subject("digits", 0)
    made = [tables.table(subject, f"{kind}:{network}") for kind in ("ablation", "entanglement")]
    json.dumps(made, allow_nan=False)
    part = {**run[1]["data"]["digits"], "tables": made}
    shown = study_tables.tables(part)
    ablation, correlations = shown[0], shown[1]
    assert [row[0].partition(":")[0] for row in ablation.rows][-4:-1] == ["A1", "A2", "A3"]
    assert correlations.rows[-1][:2] == ["all", "100%"]
    assert all(len(row) == len(table.head) for table in shown for row in table.rows)
    assert len(study_tables.notes(part)) == 2
    whole = {**run[1], "data": {"digits": part}}
    assert all(table.title in studies.markdown(whole) for table in shown)


def test_every_grid_has_names_of_its_own_that_are_file_names():
    for preset in presets.PRESETS.values():
        for setting in preset.settings.values():
            keys = [cell.key for cell in grid.cells(setting, (0.1, 0.9))]
            assert all(set(key) <= set(f"{'abcdefghijklmnopqrstuvwxyz'}{'ABCDEFGHIJKLMNOPQRSTUVWXYZ'}0123456789.=-_")
                       for key in keys)  # fmt: skip


def test_no_defense_goes_by_the_name_of_a_criterion():
    """PAST is both; a curve is read by its name."""
    for setting in presets.PRESETS["small"].settings.values():
        for cell in grid.cells(setting):
            assert cell.curve not in CRITERIA or cell.criterion == cell.curve


def test_lambda_adds_cells_for_the_criteria_that_have_one():
    setting = presets.PRESETS["tiny"].settings["digits"]
    plain, more = grid.cells(setting), grid.cells(setting, (0.1,))
    added = {cell.key for cell in more} - {cell.key for cell in plain}
    assert added == {f"{base}-taylor-{rate}-lam-0.1" for base in ("none", "relaxloss") for rate in (0.01, 0.1)}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--data", "nonsense"], "data must be among digits; got 'nonsense'"),
        (["--lam", "2"], "lam must lie between 0 and 1; got 2.0"),
        (["--models", "5"], "models must be an even number, at least 6; got 5"),
    ],
)
def test_refusals(arguments, told, tmp_path, capsys):
    assert main(["study", "--preset", "tiny", "--out", str(tmp_path / "x"), *arguments]) == 1
    assert capsys.readouterr().err == f"cwfast: error: {told}\n"
    assert not (tmp_path / "x").exists()


def test_the_page_escapes_and_needs_nothing_else(run):
    report = json.loads(json.dumps(run[1]))
    report["data"]["digits"]["rows"][1]["label"] = "<b>&|"
    html = studies.page(report, {"digits-tradeoff": studies.tradeoff_figure(report["data"]["digits"]),
                                 "digits-rates": studies.rates_figure(report["data"]["digits"])})  # fmt: skip
    assert "<b>&|" not in html
    assert "&lt;b&gt;&amp;|" in html
    assert "http" not in html.replace("http://www.w3.org", "")
    assert "<script" not in html
    assert "<b>&/" in studies.markdown(report)
