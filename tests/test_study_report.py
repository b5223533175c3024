"""What a study's report says of what lies in its folder: made-up documents, nothing is trained."""

import re
from dataclasses import asdict

import numpy as np
import pytest

from cwfast.defense.accounting import Privacy
from cwfast.report import studies
from cwfast.report.privacy import STATEMENT
from cwfast.report.table import interval
from cwfast.study import comparing, measuring, presets
from cwfast.study.grid import cells
from cwfast.study.jobs import Study
from cwfast.study.reading import UNRANKED, _lead, verdicts
from cwfast.study.reporting import report
from cwfast.study.running import run
from cwfast.training import Fitted

ATTACKS = ("lira_shrinkage", "rmia", "loss")


def document(cell, rng, models, *, privacy=None):
    """A cell that leaks less the more it rewinds, whatever the criterion."""
    rate = cell.rate or 0.0
    auc, accuracy = 0.8 - 0.4 * rate + 0.01 * rng.normal(), 0.8 - 0.2 * rate**2 + 0.005 * rng.normal()
    if cell.curve == "gap":
        auc -= 0.05
    near = auc + 0.01 * rng.normal(size=models)
    point = {"fpr": 0.05, "tpr": 0.2, "low": 0.1, "high": 0.3, "warning": None}
    attack = {"auc": float(near.mean()), "auc_models": near.tolist(), "tpr_at_fpr": [point]}
    attack["auc_draws"] = (near.mean() + 0.01 * rng.normal(size=50)).tolist()
    own = (accuracy + 0.005 * rng.normal(size=models)).tolist()
    return {
        "cell": asdict(cell), "rewound": [0] * models, "privacy": [privacy] * models, "train_accuracy": [1.0] * models,
        "train_loss": [0.1] * models, "test_loss": [1.0] * models, "test_accuracy": own,
        "test_accuracy_draws": [[value] * 10 for value in own], "attacks": dict.fromkeys(ATTACKS, attack),
    }  # fmt: skip


def fill(out, preset, name, seeds, *, leave=0):
    """The documents of a data set but the last few; DP-SGD's say what it spent."""
    study = Study(preset, (name,), tuple(seeds), (), out)
    whole = [cell for cell in cells(study.sizes.settings[name]) if cell.how != "table"]
    for seed in seeds:
        subject, rng = study.subject(name, seed), np.random.default_rng(seed)
        for cell in whole[: len(whole) - leave]:
            covers = "model" if cell.curve == "from scratch" else "fine-tuning"
            spent = None
            if "private" in cell.how or cell.spec.startswith("dpsgd"):
                spent = asdict(Privacy(20.0, 1e-5, 0.7, 1.0, 0.1, 500, "prv", covers))
            made = document(cell, rng, study.sizes.models, privacy=spent)
            subject.folder.write(cell.key, made, subject.made_of(cell))
    return study, whole


def test_what_a_model_is_told_of(tmp_path):
    subject = Study("tiny", ("digits",), (0,), (), tmp_path).subject("digits", 0)
    models = [subject.task.initial_model(seed) for seed in subject.of(0)[1]]
    spent = Privacy(float("inf"), 1e-5, 0.0, 1.0, 0.1, 5, "prv", "model")
    fitted = [Fitted(model, {}, notes={"privacy": spent} if k else {}) for k, model in enumerate(models)]
    _, told = measuring.observe(subject, 0, fitted)
    assert told["privacy"][0] is None
    assert told["privacy"][1] == asdict(spent) | {"epsilon": None}
    draws = np.array(told["test_accuracy_draws"])
    assert draws.shape == (len(models), measuring.REPLICATES)
    accuracy, tested = np.array(told["test_accuracy"]), len(subject.task.dataset.test)
    errors = np.sqrt(accuracy * (1 - accuracy) / tested)
    assert np.allclose(draws.mean(axis=1), accuracy, atol=4 * errors.max() / 10)
    assert np.allclose(draws.std(axis=1), errors, rtol=0.4)
    again = measuring.observe(subject, 0, [fitted[0]] * len(fitted))[1]["test_accuracy_draws"]
    assert again[1] == again[0] == told["test_accuracy_draws"][0]  # the same test sets for all models and cells


def test_any_call_reports_all_that_is_in_the_folder_and_what_it_lacks(tmp_path):
    _, whole = fill(tmp_path, "tiny", "digits", (0, 3))
    fill(tmp_path, "tiny", "digits", (7,), leave=4)
    document = run(tmp_path, preset="tiny", seeds=[1], report_only=True)
    part = document["data"]["digits"]
    assert part["seeds"] == [0, 3]  # those with every cell
    assert document["missing"] == {"digits": {"0": 0, "1": len(whole), "3": 0, "7": 4}}
    assert [row["key"] for row in part["rows"]] == [cell.key for cell in whole]
    told = studies.missing(document)
    assert told == [f"Incomplete: digits lacks {len(whole)} cells of seed 1, 4 cells of seed 7; shown: seed 0, 3."]
    for text in (studies.text(document), studies.markdown(document), (tmp_path / "summary.md").read_text()):
        assert told[0] in text
    assert not (tmp_path / "digits" / "seed-1").exists()  # a report makes nothing
    assert part["overlap"] == pytest.approx(overlap(tmp_path, 0, 3))


def overlap(out, *seeds):
    study = Study("tiny", ("digits",), seeds, (), out)
    one, other = (set(study.subject("digits", seed).plan.ids.tolist()) for seed in seeds)
    return len(one & other) / len(one)


def test_without_a_whole_seed_the_fullest_is_shown(tmp_path):
    fill(tmp_path, "tiny", "digits", (0,), leave=9)
    study, whole = fill(tmp_path, "tiny", "digits", (2,), leave=2)
    document = report(study, "x")
    assert document["data"]["digits"]["seeds"] == [2]
    assert len(document["data"]["digits"]["rows"]) == len(whole) - 2
    assert document["missing"] == {"digits": {"0": 9, "2": 2}}


def test_nothing_done_is_said_to_be_so(tmp_path):
    document = run(tmp_path, preset="small", report_only=True)
    assert document["data"] == {}
    told = studies.missing(document)
    assert len(told) == len(presets.DEFAULT_DATA["small"])
    assert all("nothing is shown" in sentence for sentence in told)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Of digits, two seeds; and of DP-SGD, one."""
    pytest.importorskip("opacus")
    out = tmp_path_factory.mktemp("study")
    fill(out, "small", "digits", (0, 1))
    study, _ = fill(out, "small", "digits_private", (0,))
    return report(study, "cwfast study")


def test_dpsgd_says_what_it_covers(whole):
    part = whole["data"]["digits_private"]
    rows = {row["key"]: row for row in part["rows"]}
    assert rows["dpsgd-gap-0.1"]["label"].endswith("(epsilon 20 of the fine-tuning alone)")
    assert rows["scratch-dpsgd_epsilon=20"]["label"].endswith("(epsilon 20 of the released model)")
    assert rows["undefended"]["privacy"] is None
    text = studies.markdown(whole)
    assert text.count(STATEMENT) == 1
    table = text.partition("### DP-SGD: what it spent")[2]
    assert re.search(r"\| from scratch \| 20 \| 1e-05 \| 0.7 \| 1 \| 500 \| 0.1 \| the released model \|", table)
    assert re.search(r"gap, .* \| 20 \| .* \| the fine-tuning alone, not the released model \|", table)


def test_hamps_outputs_unchanged_are_a_base_of_their_own_and_no_more_models(whole):
    part = whole["data"]["digits"]
    assert list(part["levels"]) == ["none", "relaxloss", "hamp", "hamp_plain", "ccl"]
    unchanged = [row for row in part["rows"] if row["base"] == "hamp_plain"]
    fleets = part["fleets"] + whole["data"]["digits_private"]["fleets"]
    assert part["fleets"] == 2 * (len(part["rows"]) - len(unchanged))
    assert whole["fleets"] == fleets
    assert f"{fleets} fleets of 16 models attacked" in studies.counts(whole)
    assert {pair["against"] for pair in part["pairs"]["hamp_plain"]} == {
        "fine-tuning without rewinding", "random weights", "interpolation, then fine-tuning"
    }  # fmt: skip


def test_the_summary_shows_each_curves_best_and_a_verdict_for_each_base(whole):
    lines = studies.summary(whole)
    part = whole["data"]["digits"]
    digits = lines[lines.index("## digits") : lines.index("## digits_private")]
    assert sum(line.startswith("- ") for line in digits) == 5
    assert any(line.startswith("- RelaxLoss: lowest AUC at no less than an accuracy (") for line in digits)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in digits if line.startswith("|")]
    rows = [(base, level) for base, levels in part["levels"].items() for level in levels]
    best, others = table[2 : 2 + len(rows)], table[2 + len(rows) :]
    assert [row[:2] for row in best] == [[base, level["level"]] for base, level in rows]
    assert all(("**" in row[2]) != ("**" in row[3]) for row in best)  # one curve is the first
    level = part["levels"]["none"][0]
    first, ours = level["curves"][0], level["ours"]
    assert best[0][4:] == [interval(ours), interval(ours, "accuracy"), ours["verdict"]]
    shown = next(row for row in others if row[0] == first["curve"])
    assert shown[1].startswith(f"**{interval(first)}**, {interval(first, 'accuracy')}")


def test_dpsgd_from_scratch_is_not_ranked_beside_fine_tuning_and_no_sentence_has_cwrf_beat_it(whole):
    part = whole["data"]["digits_private"]
    assert "from scratch" in {row["curve"] for row in part["rows"]}
    ranked = {one["curve"] for level in part["levels"]["dpsgd"] for one in level["curves"]}
    assert "gap" in ranked
    assert "from scratch" not in ranked | {name for level in part["levels"]["dpsgd"] for name in level["short"]}
    assert UNRANKED in part["reading"]
    assert part["verdicts"]["dpsgd"].startswith("Fine-tuning by DP-SGD: ")
    assert "CWRF does better than DP-SGD" in STATEMENT
    assert STATEMENT in studies.summary(whole)


def curve(name, low):
    return {"curve": name, "cwrf": comparing.is_cwrf(name), "behind": {"auc_low": low}, "settings": [name]}


@pytest.mark.parametrize(
    ("curves", "ours", "said"),
    [
        ([("gap", 0.0), ("random as gap", 0.1)], ("better", 0.001), "better at 1"),
        ([("gap, other strengths", 0.0), ("interpolation", -0.1)], ("even", -0.02), "even at 1 (accuracy -0.020)"),
        ([("gap", 0.0), ("short training", 0.1)], ("trade", -0.03), "trade at 1 (accuracy -0.030)"),
        ([("short training", 0.0), ("gap", 0.1)], ("worse", 0.0), "worse at 1"),
        ([("gap", 0.0), ("taylor", 0.1)], None, "without a rival at 1"),
        ([("undefended", 0.0)], None, "not at the level at 1"),
    ],
)
def test_verdicts(curves, ours, said):
    against = ours and {"verdict": ours[0], "accuracy": ours[1]}
    level = {"curves": [curve(*one) for one in curves], "ours": against}
    found = verdicts({"none": [level, {"curves": [], "ours": None}]})["none"]
    assert found.startswith("no defense: lowest AUC at no less than an accuracy (one level): ")
    assert found.endswith(f"CWRF against the best without it: {said}.")


def test_the_reading_counts_choices_and_not_levels(whole):
    level = {"curves": [curve("gap", 0.0), curve("short training", -0.1), curve("taylor", 0.1)]}
    said = _lead({"none": [level, level], "hamp": [level]})[0]
    assert "CWRF by gap 1 (1); short training 0 (1)." in said
    assert "taylor" not in said
    text = studies.text(whole)
    assert "comparisons" not in text
    assert "equal utility" not in text
    assert f"{whole['data']['digits']['samples']['test']} test samples" in text


@pytest.mark.parametrize(
    ("name", "ours"),
    [("gap", True), ("taylor, lambda 0.1", True), ("random", False), ("random as gap", False), ("PAST", False),
     ("interpolated as gap, then fine-tuned", False), ("from scratch", False)],
)  # fmt: skip
def test_curves_by_chance_are_not_cwrf(name, ours):
    assert comparing.is_cwrf(name) is ours


def test_the_method_says_margin_overlap_and_what_is_not_corrected(whole):
    said = " ".join(studies.method(whole))
    share = re.search(r"in common, ([0-9.]+)% on digits", said)
    assert float(share[1]) == pytest.approx(67, abs=4)
    assert "% on digits_private" not in said  # one seed
    assert f"less than {comparing.MARGIN:g}" in said
    assert "none is corrected for the number of comparisons" in said
    assert "digits_private has one seed: the intervals there say nothing of how another split" in said


def test_the_whole_report_is_written(whole, tmp_path):
    written = {path.name for path in studies.write(whole, tmp_path)}
    pictures = {f"{name}-{kind}.png" for name in whole["data"] for kind in ("tradeoff", "rates")}
    assert written == {"report.json", "report.md", "report.html", "summary.md", *pictures}
    html = (tmp_path / "report.html").read_text()
    for sentence in (*studies.method(whole), *whole["data"]["digits"]["verdicts"].values(), STATEMENT):
        assert sentence.replace("'", "&#39;") in html


def test_every_curve_has_a_look_and_a_place_in_the_legend(whole):
    part = whole["data"]["digits"]
    for figure in (studies.tradeoff_figure(part), studies.rates_figure(part)):
        (legend,) = figure.legends
        texts = [text.get_text() for text in legend.get_texts()]
        assert {"gap", "taylor", "random as gap", "random as taylor", "interpolated as gap, then fine-tuned",
                "interpolated as taylor, then fine-tuned", comparing.PLAIN} <= set(texts)  # fmt: skip
    shown = {row["curve"] for row in part["rows"] if row["base"] != "other" and not row["curve"].startswith("ablation")}
    texts = {text.get_text() for text in studies.tradeoff_figure(part).legends[0].get_texts()}
    assert shown | {"short training", "other defenses"} <= texts
