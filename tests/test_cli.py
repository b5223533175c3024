"""The command line: exit codes, one-line errors, JSON on stdout, and the demo end to end at a small size."""

import json
import subprocess
import sys

import pytest
import torch

from cwfast import demo
from cwfast.cli import main


def test_env_lists_backends_with_reasons(capsys):
    assert main(["env", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["backends"]) == {"reference", "cpu", "triton", "cuda"}
    for backend in document["backends"].values():
        assert backend["available"] == (backend["reason"] == "")
    assert document["instruction_set"] in document["instruction_sets"]


def test_env_is_readable(capsys):
    assert main(["env"]) == 0
    assert "backend cpu" in capsys.readouterr().out


def run_benchmarks(monkeypatch, code):
    """Instead of the benchmarks' process: ``code`` with their command line in ``command``."""

    def run(command, **options):
        assert command[1:4] == ["-P", "-m", "cwfast.benchmarks"]
        assert options["stdout"] is sys.stderr
        return subprocess.CompletedProcess(command, code(command[4:]))

    monkeypatch.setattr(subprocess, "run", run)


def write_results(command):
    cases = [
        {"case": "select a", "seconds": {"ours": 0.002, "peer": 1.0}, "ratios": {"times_peer": 500.0, "reads": 1.5}},
        {"case": "rewind", "seconds": {"ours": 1.0}, "ratios": {}, "bytes": {"peak": 2 * 10**6, "no": None}},
    ]
    cases[1]["skipped_peers"] = ["opacus"]
    with open(command[command.index("--out") + 1], "a") as file:
        file.writelines(json.dumps(case) + "\n" for case in cases)
    return 0


def test_bench_prints_one_table_and_appends_lines(tmp_path, monkeypatch, capsys):
    run_benchmarks(monkeypatch, write_results)
    out = tmp_path / "results.jsonl"
    out.write_text("{}\n")
    assert main(["bench", "select", "rewind", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["case", "time", "ratios", "memory"]
    assert lines[1].split() == ["select", "a", "2", "ms", "times_peer", "500,", "reads", "1.5"]
    assert lines[2].split() == ["rewind", "1e+03", "ms", "peak", "2.0", "MB"]
    assert lines[-1] == "Peers not installed, skipped: opacus"
    assert len(out.read_text().splitlines()) == 3
    assert main(["bench", "--json", "--size", "full"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["size"] == "full"
    assert [result["case"] for result in document["results"]] == ["select a", "rewind"]


def test_bench_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    run_benchmarks(monkeypatch, lambda command: 2)
    assert main(["bench", "nothing"]) == 1
    assert capsys.readouterr().err.startswith("cwfast: error: every benchmark must run; exit status 2 after 0 cases")
    run_benchmarks(monkeypatch, lambda command: pytest.fail("ran"))
    assert main(["bench", "--out", str(tmp_path / "no" / "folder")]) == 1


@pytest.mark.slow
def test_bench_runs_the_benchmarks(capfd):
    assert main(["bench", "prune", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["results"]


def test_wrong_usage_exits_with_2():
    with pytest.raises(SystemExit) as error:
        main(["demo", "--epochs"])
    assert error.value.code == 2


def test_unwritable_output_is_one_line_and_nothing_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "_Demo", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "below")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cwfast: error: ")
    assert len(captured.err.splitlines()) == 1


def test_debug_shows_the_traceback(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        main(["demo", "--debug", "--out", str(tmp_path / "file" / "below")])


def test_interrupt_exits_with_1(tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "interrupted" in capsys.readouterr().err


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A demo small enough for the unit tests; the real ones are run by .ci/run."""
    out = tmp_path_factory.mktemp("demo")
    sizes = demo.Sizes(models=8, epochs=4, rates=(0.1,), stops=(2,), taus=(0.5,), bootstrap=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "QUICK", sizes)
        return demo.run(out, quick=True, seed=3, command="cwfast demo --quick"), out


def test_demo_writes_what_it_returns(report):
    document, out = report
    assert json.loads((out / "report.json").read_text()) == document
    assert {p.name for p in out.iterdir()} == {"report.json", "report.html", "tradeoff.png", "roc.png", "layers.png"}
    assert document["schema"] == demo.SCHEMA
    assert document["seed"] == 3
    assert document["backends"] == {"saliency": "cpu", "select": "cpu", "rewind": "cpu", "logit_stats": "cpu"}


def test_demo_has_every_row_and_its_pairs(report):
    rows = {row["id"]: row for row in report[0]["rows"]}
    assert len(rows) == len(report[0]["rows"])
    for wanted in (
        "undefended",
        "early-2",
        "relaxloss-0.5",
        "relaxloss-1.0",
        "rate0-CE",
        "rate0-RelaxLoss",
        "interpolation-0.5",
    ):
        assert wanted in rows
    for criterion in ("taylor", "gap"):
        for loss in ("CE", "RelaxLoss"):
            for kind in ("cwrf", "random", "distance"):
                assert f"{kind}-{criterion}-0.1-{loss}" in rows
    assert "cwrf-taylor-batch-0.1-RelaxLoss" in rows
    weights = 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10
    assert rows["cwrf-gap-0.1-CE"]["critical_weights"] == weights // 10


def test_demo_audits_pool_samples_only(report):
    document = report[0]
    row = document["rows"][0]
    whole, clean, noisy = (
        part["lira_shrinkage"]["samples"]
        for part in (row["attacks"], row["subsets"]["clean"], row["subsets"]["random_label"])
    )
    assert (whole, clean, noisy) == (1200, 960, 240)
    assert row["attacks"]["rmia"]["targets"] == 8


def test_halves_put_each_sample_in_half_the_models():
    pool = torch.arange(100, 140)
    halves = demo.complementary_halves(pool, 6, seed=0)
    counts = sum(torch.isin(pool, half).int() for half in halves)
    assert (counts == 3).all()
    assert all(len(half) == 20 for half in halves)


def test_reading_counts_what_the_rows_say(report):
    sentences = report[0]["reading"]
    assert sentences[0].startswith("A quick run")
    assert sentences[1].startswith("Undefended: test accuracy")
    assert sum("at equal rate, loss and steps" in s for s in sentences) == 4


def test_json_output_is_one_document(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run", lambda *args, **kwargs: {"schema": "x"})
    monkeypatch.setattr("cwfast.report.table.table", lambda report: "")
    assert main(["env", "--json"]) == 0
    json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_installed_command_runs_the_quick_demo(tmp_path):
    command = [sys.executable, "-P", "-m", "cwfast.cli", "demo", "--quick", "--json", "--out", str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["quick"] is True
    assert (tmp_path / "report.html").stat().st_size > 100_000
