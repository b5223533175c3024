"""The report: files whole or absent, a page that needs nothing else, one line per row."""

import base64
import json
import re
import shutil
import subprocess
import sys

import pytest

from cwfast.report import prepare, write_report
from cwfast.report.table import cells, count, markdown_table, number, percent, table

HOSTILE = "<b>&|*"
FILES = ["layers.png", "report.html", "report.json", "roc.png", "tradeoff.png"]
ATTACKS = ("loss", "lira_shrinkage", "lira_per_example", "lira_fixed", "rmia")


def score(auc, warning=None):
    points = [
        {"fpr": fpr, "tpr": fpr + 0.3 * (auc - 0.5), "low": fpr, "high": fpr + 0.2, "realised_fpr": fpr * 0.99,
         "false_positives_min": int(600 * fpr), "warning": warning}
        for fpr in (0.05, 0.02)
    ]  # fmt: skip
    return {"auc": auc, "auc_low": auc - 0.01, "auc_high": auc + 0.01, "auc_std_targets": None,
            "balanced_accuracy": auc - 0.05, "tpr_at_fpr": points}  # fmt: skip


def row(key, group, label, accuracy, auc, *, criterion=None, loss=None, rate=None, strength=None, warning=None):
    attacks = {name: score(auc, warning) for name in ATTACKS}
    subsets = {kind: {name: score(auc) for name in ATTACKS} for kind in ("clean", "random_label")}
    return {"id": key, "group": group, "label": label, "defense": label.split(",")[0], "criterion": criterion,
            "loss": loss, "rate": rate, "strength": strength, "train_accuracy": 0.9, "test_accuracy": accuracy,
            "test_accuracy_std": 0.01, "critical_weights": None, "attacks": attacks, "subsets": subsets}  # fmt: skip


@pytest.fixture
def report():
    rows = [row("undefended", "baseline", "undefended", 0.745, 0.8194, loss="CE")]
    rows += [row(f"early-{n}", "baseline", f"early stopping, {n} epochs", 0.7 + n / 100, 0.5 + n / 50, strength=n)
             for n in (3, 6)]  # fmt: skip
    for loss in ("CE", "RelaxLoss"):
        for rate in (0.003, 0.03):
            for criterion in ("taylor", "taylor (batch)", "gap", "unheard of"):
                label = f"CWRF {criterion}, {rate:.1%} + {loss}"
                rows.append(
                    row(label, "cwrf", label, 0.76 + rate, 0.79 - rate, criterion=criterion, loss=loss, rate=rate)
                )
        label = f"interpolation, {loss}"
        rows.append(row(label, "control", label, 0.7, 0.7, criterion="interpolation", loss=loss, strength=0.45))
    rows.append(row("hostile", "control", HOSTILE, 0.71, 0.72, loss="CE", rate=0.0, warning="only 3 false positives"))
    grid = [0.0, 0.001, 0.01, 0.1, 1.0]
    curve = {"attack": "lira_shrinkage", "fpr": grid, "tpr": [0.0, 0.01, 0.1, 0.4, 1.0],
             "low": [0.0, 0.0, 0.05, 0.3, 1.0], "high": [0.01, 0.02, 0.15, 0.5, 1.0]}  # fmt: skip
    numel = {"0.weight": 4096, "0.bias": 64}
    return {
        "schema": "cwfast-demo/1", "title": f"digits {HOSTILE}", "command": "cwfast demo --quick", "seed": 0,
        "quick": True, "versions": {"torch": "2.11"}, "device": "cpu", "backends": {"select": "cpu"}, "machine": "x86",
        "data": {"name": "digits", "pool": 1200, "reference": 300, "test": 297, "random_label_share": 0.2,
                 "sha256": "0" * 64, "note": f"note {HOSTILE}"},
        "settings": {"epochs": 30, HOSTILE: HOSTILE}, "stages": [{"name": "train", "seconds": 1.25}],
        "rows": rows, "roc": {"undefended": curve, "hostile": curve, "early-3": curve},
        "layers": {"taylor": {"rate": 0.03, "counts": {"0.weight": 120.0, "0.bias": 4.8}, "numel": numel},
                   "gap": {"rate": 0.03, "counts": {"0.weight": 124.8, "0.bias": 0}, "numel": numel}},
        "reading": [f"The attack on the undefended models: AUC 0.819. {HOSTILE}"],
    }  # fmt: skip


def test_files_whole_and_nothing_else(report, tmp_path):
    out = tmp_path / "new" / "folder"
    written = write_report(report, out)
    assert sorted(path.name for path in out.iterdir()) == FILES == sorted(path.name for path in written)
    assert json.loads((out / "report.json").read_text()) == report
    for path in out.glob("*.png"):
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(content) > 10_000
    before = {path.name: path.read_bytes() for path in written}
    write_report(report, str(out))
    assert {path.name: path.read_bytes() for path in written} == before  # replaced, and the same bytes again


def test_page_is_escaped_and_needs_nothing_else(report, tmp_path):
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "&lt;b&gt;&amp;" in page
    assert "<b>&" not in page
    assert "<script" not in page
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(pictures) == page.count("<img") == 3
    for text in [re.sub(r'"data:[^"]*"', "", page), *(base64.b64decode(picture).decode() for picture in pictures)]:
        rest = re.sub(r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>', "", text)  # names, which nobody fetches
        assert not re.findall(r"https?://|@import|<link", rest)
    for text in ("0.819 [0.809, 0.829]", "cwfast demo --quick", "only 3 false positives", "random label"):
        assert text in page


def test_report_without_curves_layers_or_rows(report, tmp_path):
    write_report(report | {"rows": [], "roc": {}, "layers": {}, "quick": False}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert table(report | {"rows": []}) == "no rows\n"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_folder_that_cannot_be(report, tmp_path, place):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match=r"must be a folder that can be made and written; got .*file"):
        write_report(report, tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_nan_is_refused_before_anything_is_written(report, tmp_path):
    report["rows"][0]["test_accuracy"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        write_report(report, tmp_path)
    assert not list(tmp_path.iterdir())


def test_failure_between_files_leaves_no_half(report, tmp_path):
    (tmp_path / "report.html").mkdir()  # cannot be replaced by a file
    with pytest.raises(OSError, match=r"report\.html"):
        write_report(report, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert json.loads((tmp_path / "report.json").read_text()) == report


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_missing_extra_names_the_remedy(report, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'needs {name}.*pip install "cwfast\[demo\]"'):
        prepare(tmp_path / "out")
    with pytest.raises(ImportError, match=name):
        write_report(report, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_import_is_light():
    code = "import sys, cwfast.report, cwfast.report.page; print({'matplotlib', 'jinja2', 'torch'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
        == "set()\n"
    )


def test_table_has_one_line_per_row(report):
    lines = table(report).splitlines()
    bodies = [line for line in lines if line.startswith("  ")]
    assert len(bodies) == len(report["rows"]) + 1
    for entry in report["rows"]:
        assert sum(line.startswith(f"  {entry['label']}  ") for line in bodies) == 1
    assert len({len(line) for line in bodies if not line.endswith("*")}) == 1  # columns line up
    assert lines[-1] == "* only 3 false positives"


def test_markdown_table(report):
    lines = markdown_table(report, ["hostile", "undefended"]).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| <b>&\\|\\* | 0% | 0.710 | 0.720 [0.710, 0.730] |")
    assert lines[3].startswith("| undefended | - |")
    assert len(markdown_table(report).splitlines()) == len(report["rows"]) + 2
    assert len({len(cells(entry)) for entry in report["rows"]}) == 1
    with pytest.raises(KeyError, match="nobody"):
        markdown_table(report, ["nobody"])


def test_numbers():
    assert [number(0.81949), number(None), number(float("nan")), number(2.0, 0)] == ["0.819", "-", "-", "2"]
    assert [percent(0.003), percent(0.1), percent(1.0), percent(0.0), percent(None)] == [
        "0.3%",
        "10%",
        "100%",
        "0%",
        "-",
    ]
    assert [count(12345), count(3.2), count(9.96), count(0), count(None)] == ["12,345", "3.2", "10", "0", "-"]


@pytest.mark.slow
def test_page_opens_in_a_browser(report, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed")
    write_report(report, tmp_path)
    picture = tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    flags += [f"--screenshot={picture}", "--window-size=1280,4000", (tmp_path / "report.html").as_uri()]
    subprocess.run([browser, *flags], check=True, capture_output=True, timeout=120)
    assert len(picture.read_bytes()) > 100_000  # an empty page of this size is some 20 kB
