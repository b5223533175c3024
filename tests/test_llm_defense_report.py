"""What a report says of defended language models follows from its rows: made-up figures, known verdicts."""

import numpy as np
import pytest

from cwfast.report import llm_defense, llm_reading

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
SPREAD = np.linspace(-0.02, 0.02, 41)


def row(key, group, perplexity, auc, *, other=0.5, start="1 epoch", spread=SPREAD, **settings):
    """A row whose main attack has this AUC, with paired draws around it."""

    def attack(value):
        return {"auc": value, "auc_low": value - 0.02, "auc_high": value + 0.02,
                "tpr_at_fpr": [{"fpr": 0.05, "tpr": 0.2, "warning": "few"}]}  # fmt: skip

    return {
        "id": key, "group": group, "label": f"row {key}", "curve": group, **llm_defense.NO_SETTINGS, "start": start,
        "perplexity": perplexity, "perplexity_low": perplexity - 1, "perplexity_high": perplexity + 1,
        "loss": {"members": 2.5}, "attacks": {"reference": attack(auc), "loss": attack(other)},
        "draws": {"reference": list(auc + spread), "loss": list(other + spread)}, **settings,
    }  # fmt: skip


def report(rows, **more):
    return {
        "title": "A <title>", "command": "cwfast demo-llm", "rows": rows, "matched": [], "reading": ["One sentence."],
        "notes": ["A note."], "settings": {"lr": 1}, "texts": {"members": 4}, "versions": {"torch": "2"},
        "device": "cpu",
        "backends": {"select": "cpu"}, "machine": "2 threads", "seed": 0, **more,
    }  # fmt: skip


ROWS = [
    row("base", "base", 30.0, 0.5, start=None),
    row("undefended", "undefended", 22.0, 0.95),
    row("early", "baseline", 22.1, 0.80),
    row("tau", "control", 25.0, 0.70),
    row("worse", "control", 80.0, 0.55),
    row("ours", "cwrf", 22.15, 0.70, criterion="gap", rate=0.1, steps=5),
    row("close", "cwrf", 25.0, 0.69, criterion="gap", rate=0.3, steps=5, spread=-SPREAD),
    row("lost", "cwrf", 26.0, 0.90, criterion="taylor_delta", rate=0.3),
    row("better", "cwrf", 20.0, 0.80, criterion="taylor_delta", rate=0.1),
]


def test_rows_are_matched_by_perplexity_and_judged_by_the_interval_of_the_difference():
    found = {pair["row"]["id"]: pair for pair in llm_reading.matched(ROWS, "reference")}
    assert (found["ours"]["rival"]["id"], found["ours"]["verdict"]) == ("early", "ahead")  # 22.1 is at most 22.15 + 1%
    assert found["ours"]["auc"] == pytest.approx(-0.1)
    assert found["ours"]["auc_low"] == pytest.approx(found["ours"]["auc_high"]) == pytest.approx(-0.1)  # pairs
    assert (found["close"]["rival"]["id"], found["close"]["verdict"]) == ("tau", "not told apart")
    assert (found["close"]["auc_low"], found["close"]["auc_high"]) == pytest.approx((-0.048, 0.028))
    assert (found["lost"]["rival"]["id"], found["lost"]["verdict"]) == ("tau", "behind")
    assert (found["better"]["rival"], found["better"]["verdict"]) == (None, "alone")


def test_the_reading_says_so():
    told = llm_reading.reading(ROWS)
    assert told[0].startswith("row undefended: perplexity 22.00 [21.00, 23.00], AUC of the reference attack 0.950")
    assert "by CWRF at no more than the undefended perplexity (+1%): row ours, perplexity 22.15" in told[1]
    assert "by everything else at no more than the undefended perplexity (+1%): row early" in told[2]
    assert "1 of 4 CWRF rows are ahead of the best rival, 1 are behind it, 1 are not told apart from it" in told[3]
    assert "1 have no rival" in told[3]
    assert "row ours (perplexity 22.15) against row early (22.10), -0.100 [-0.100, -0.100]." in told[3]
    assert "by the strongest attack on each model: not judged" in told[4]
    assert {pair["verdict"] for pair in llm_reading.matched(ROWS, "strongest")} == {"not judged", "alone"}
    assert any("not corrected for the number of rows" in one for one in told)
    assert any("no control and no baseline did" in one for one in told)
    none = llm_reading.reading([one for one in ROWS if one["id"] not in ("ours", "better")])
    assert "No row of CWRF keeps the undefended perplexity (+1%)." in none


def test_the_strongest_attack_is_looked_for_on_each_model():
    rows = [row("a", "undefended", 22.0, 0.6, other=0.9), row("b", "cwrf", 22.0, 0.7, other=0.6)]
    assert [llm_reading.attack_of(one, "strongest") for one in rows] == ["loss", "reference"]
    found = llm_reading.difference(rows[1], rows[0], "strongest")
    assert found == {"auc": pytest.approx(-0.2)}  # no interval: the attacks are chosen by what they found
    assert llm_reading.signed(found) == "-0.200"


def test_an_auc_below_a_half_leaks_as_much_as_one_above():
    """An attack with AUC 0.25 that is turned around has 0.75: worse than 0.52."""
    rows = [
        row("undefended", "undefended", 20.0, 0.9),
        row("coin", "control", 20.0, 0.52),
        row("turned", "cwrf", 20.0, 0.25, other=0.6),
    ]
    assert llm_reading.auc(rows[2]) == 0.75
    assert llm_reading.attack_of(rows[2], "strongest") == "reference"
    (pair,) = llm_reading.matched(rows, "reference")
    assert (pair["rival"]["id"], pair["verdict"], pair["auc"]) == ("coin", "behind", pytest.approx(0.23))
    told = llm_reading.reading(rows)
    assert "0 of 1 CWRF rows are ahead of the best rival, 1 are behind it" in told[3]
    assert any("as max(AUC, 1 - AUC)" in one for one in told)


def test_page_picture_and_markdown(tmp_path):
    rows = [llm_defense.without_draws(one) for one in ROWS]
    pairs = llm_defense.matched_table("At matched", llm_reading.matched(ROWS, "reference"), "reference")
    made = report(rows, matched=[pairs])
    written = {path.name for path in llm_defense.write(made, tmp_path)}
    assert written == {"report.json", "report.md", "report.html", "curve.png"}
    page, told = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "A &lt;title&gt;" in page
    assert "Beyond the frame: row worse (80.0)." in page
    assert [one["id"] for one in llm_defense.outside(rows)] == ["worse"]
    assert "| row ours | - | - | 2.50 | 22.15 [21.15, 23.15] | 0.700 [0.680, 0.720] | 0.500 | 0.200\\* |" in told
    assert "| row ours | 22.15 | 0.700 | row early | 22.10 | 0.800 | -0.100 [-0.100, -0.100] | ahead |" in told
    assert told.index("row base") < told.index("row undefended") < told.index("row ours")
    assert "row lost" in llm_defense.text(made)
    assert llm_defense.cells(row("aimed", "cwrf", 23.0, 0.8, alpha=2.3), ["reference"])[2:4] == ["2.30", "2.50 (+0.20)"]
    some = [row("with", "cwrf", 23.0, 0.8), row("without", "cwrf", 23.0, 0.8)]
    some[0]["attacks"]["rmia"] = some[0]["attacks"]["loss"]
    del some[1]["attacks"]["loss"]
    names = llm_defense.attacks_of(some[::-1])
    assert names == ["reference", "loss", "rmia"]
    for one, missing in zip(some, (None, "loss"), strict=True):
        texts = dict(zip(llm_defense.head(some[::-1]), llm_defense.cells(one, names), strict=True))
        assert texts["loss AUC"] == ("-" if missing else "0.500")
        assert texts["rmia AUC"] == ("-" if missing else "0.500")
        assert texts["reference TPR@5%"] == "0.200*"
    judged = llm_defense.matched_table("", llm_reading.matched(ROWS[2:6], "strongest"), "strongest")
    assert judged["rows"][0][-2:] == ["-0.100", "not judged"]


def test_before_and_after():
    rows = [ROWS[0], ROWS[1], row("after", "cwrf", 23.0, 0.8, alpha=2.3)]
    told = llm_reading.before_and_after(rows)
    assert told[0].startswith(
        "Held-out perplexity: 22.00 [21.00, 23.00] before the defense, 23.00 [22.00, 24.00] after"
    )
    assert "The steps aimed at a member loss of 2.30; it is 2.50 (+0.20)." in told
    assert "reference: AUC 0.950 [0.930, 0.970] before, 0.800 [0.780, 0.820] after, difference -0.150" in told[1]
