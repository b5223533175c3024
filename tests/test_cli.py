"""The command line: exit codes, one-line errors, JSON on stdout, and the demo end to end at a small size."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cwfast
from cwfast import cli, demo
from cwfast.cli import main
from cwfast.report import benchmarks


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
        {"case": "select memory", "seconds": {}, "ratios": {}, "bytes": {"peak": 10**6}},
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
    assert lines[2].split() == ["rewind", "1000", "ms", "peak", "2.0", "MB"]
    assert lines[3].split() == ["select", "memory", "peak", "1.0", "MB"]
    assert lines[-1] == "Peers not installed, skipped: opacus"
    assert len(out.read_text().splitlines()) == 4
    assert main(["bench", "--json", "--size", "normal"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["size"] == "normal"
    assert [result["case"] for result in document["results"]] == ["select a", "rewind", "select memory"]


def test_bench_draws_a_chart(tmp_path, monkeypatch, capsys):
    run_benchmarks(monkeypatch, write_results)
    chart = tmp_path / "chart.png"
    assert main(["bench", "--chart", str(chart)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Chart: {chart}"
    assert chart.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "--chart", str(tmp_path / "other.png")]) == 0
    assert "No chart: matplotlib must be installed" in capsys.readouterr().out
    assert not (tmp_path / "other.png").exists()
    run_benchmarks(monkeypatch, lambda command: pytest.fail("ran"))
    assert main(["bench", "--chart", str(tmp_path / "no" / "chart.png")]) == 1
    assert "--chart must name a file in a folder that exists" in capsys.readouterr().err


def test_chart_needs_a_ratio():
    with pytest.raises(ValueError, match="needs results with ratios; got 1 without"):
        benchmarks.figure([{"case": "memory", "ratios": {"bytes_per_score": 0.1}}])


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


def test_a_reader_that_stops_early_is_no_error():
    code = "import sys, cwfast.cli as c; c._env = lambda _: ({}, 'x' * 1_000_000); sys.exit(c.main(['env']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


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


def test_version_alone_needs_no_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"cwfast {cwfast.__version__}\n"


def test_env_names_settings_that_nothing_reads(monkeypatch, capsys):
    monkeypatch.setenv("CWFAST_CPU_ISO", "avx2")
    monkeypatch.setenv("CWFAST_BENCH_SIZE", "tiny")
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "CWFAST_CPU_ISO=avx2  (unknown: nothing reads it)" in lines
    assert "CWFAST_BENCH_SIZE=tiny" in lines
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unknown_environment"] == ["CWFAST_CPU_ISO"]


def test_every_setting_that_is_read_is_known():
    root = Path(__file__).parent.parent
    if not (root / "setup.py").exists():
        pytest.skip("needs the repository")
    sources = [
        root / "setup.py",
        *(p for d in ("cwfast", "csrc", "benchmarks", "tests") for p in (root / d).rglob("*")),
    ]
    read = re.compile(r"""(?:environ\.get\(|environ\[|getenv\()"(CWFAST_\w+)""")
    found = {name for p in sources if p.suffix in (".py", ".cpp") for name in read.findall(p.read_text("utf-8"))}
    assert found == set(cli._SETTINGS)


@pytest.mark.slow
def test_installed_command_runs_the_quick_demo(tmp_path):
    command = [sys.executable, "-P", "-m", "cwfast.cli", "demo", "--quick", "--json", "--out", str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["quick"] is True
    assert (tmp_path / "report.html").stat().st_size > 100_000
