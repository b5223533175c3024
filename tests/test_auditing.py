"""audit: every attack by name on the same signals, its report as table, JSON and page."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from cwfast.mia import Signals, attacks, audit, auditing, lira, metrics, rmia

MANIFEST = {"model": "mlp", "defense": "<none> & more", "seeds": list(range(8))}


@pytest.fixture(scope="module")
def signals():
    rng = np.random.default_rng(0)
    member = np.argsort(rng.random((8, 300)), axis=0) < 4
    labels = np.arange(300) % 3
    logits = rng.normal(size=(8, 300, 2, 3))
    for k, i in np.ndindex(8, 300):
        logits[k, i, :, labels[i]] += rng.normal(1, 0.5) + 3 * member[k, i]
    made = Signals.from_logits(
        torch.from_numpy(logits), torch.from_numpy(labels), member, ids=torch.arange(300) + 5000, manifest=MANIFEST
    )
    norms = {"gradient_norm": 1 - made["confidence"]}
    return Signals({**made.values, **norms}, made.membership, made.labels, made.ids, MANIFEST)


@pytest.fixture(scope="module")
def everything(signals):
    features = torch.zeros(300, 1)
    return audit(signals, attacks=tuple(attacks.ATTACKS), features=features, fprs=(0.05, 0.001), bootstrap=20)


def test_every_attack_finds_the_planted_members(everything):
    for name, row in everything.report["attacks"].items():
        if "carlini" not in name:  # which counts betray, and whose offline form is two-sided
            assert row["auc"] > 0.85 if name != "correctness" else row["auc"] > 0.65, name
        assert row["signal"] == attacks.ATTACKS[name].signal


def test_scores_are_the_attacks_own_and_metrics_are_summary(signals, everything):
    member = signals.membership.numpy()
    np.testing.assert_array_equal(everything.scores["lira"], lira(signals["phi"], member))
    np.testing.assert_array_equal(everything.scores["rmia_offline"], rmia(signals["logprob"], member, mode="offline"))
    row = everything.report["attacks"]["rmia_offline"]
    assert (row["function"], row["options"]) == ("rmia", {"mode": "offline"})
    expected = metrics.summary(everything.scores["rmia_offline"], member, fprs=(0.05, 0.001), bootstrap=20)
    assert {key: row[key] for key in expected} == expected
    at = metrics.shadow_calibrated(everything.scores["rmia_offline"], member, 0.05)
    assert row["shadow_calibrated"]["tpr_at_fpr"][0]["tpr"] == at.tpr.mean()


def test_most_exposed_samples_come_by_their_ids(everything):
    listed = everything.report["attacks"]["lira"]["most_exposed"]
    found = metrics.vulnerability(everything.scores["lira"], everything.membership, 0.05)
    assert [one["found_in"] for one in listed] == sorted(found.tolist(), reverse=True)[: len(listed)]
    for one in listed:
        assert found[one["id"] - 5000] == one["found_in"]
        assert one["models"] == 4


def test_options_plain_arrays_and_one_target(signals):
    member = signals.membership
    plain = {"phi": signals["phi"].numpy(), "loss": signals["loss"].numpy()}
    one = audit(plain, member, attacks=("rmia", "loss"), options={"rmia": {"gamma": 1.0}}, target=3, bootstrap=0)
    np.testing.assert_array_equal(one.scores["rmia"][0], rmia(signals["logprob"], member, 3, gamma=1.0))
    assert one.report["attacks"]["rmia"]["options"] == {"gamma": 1.0}
    assert one.report["attacks"]["rmia"]["shadow_calibrated"] is None
    assert (one.report["targets"], one.report["models"]) == (1, 8)
    assert "attack" in one.table()


def test_table_names_each_attack_and_warns_of_small_samples(everything):
    text = everything.table()
    lines = text.splitlines()
    assert lines[0].split()[:2] == ["attack", "AUC"]
    for name, line in zip(attacks.ATTACKS, lines[1:], strict=False):
        assert line.startswith(name)
        assert f"{everything.report['attacks'][name]['auc']:.3f} [" in line
    assert re.search(r"\* fpr 0.001 of \d+ non-members allows 0 false positives", text)


def test_json_and_page(everything, tmp_path):
    everything.to_json(tmp_path / "a.json")
    everything.to_html(tmp_path / "a.html")
    assert json.loads((tmp_path / "a.json").read_text()) == everything.report
    page = (tmp_path / "a.html").read_text()
    assert "&lt;none&gt; &amp; more" in page
    assert "<none>" not in page
    assert not re.search(r"<script|https?://|src=", page)
    assert page.count("<polyline") == len(attacks.ATTACKS)
    numbers = [float(x) for x in re.findall(r"[\d.]+,([\d.]+)", page)]
    assert all(0 <= x <= 420 for x in numbers)

    class Balanced(HTMLParser):
        open = ()

        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "p"):
                self.open += (tag,)

        def handle_startendtag(self, tag, attributes):
            pass

        def handle_endtag(self, tag):
            if tag != "p":
                assert self.open[-1] == tag
                self.open = self.open[:-1]

    parser = Balanced()
    parser.feed(page)
    assert parser.open == ()


def test_an_audit_of_other_signals_is_refused(signals):
    member = signals.membership
    audit(signals, member, attacks=("loss",), plan={"membership": member, "seeds": list(range(8))}, bootstrap=0)
    for plan, message in [
        ({"seeds": [1]}, r"seeds must be \[1\], the plan's"),
        ({"membership": ~member}, "2400 entries"),
    ]:
        with pytest.raises(ValueError, match=message):
            audit(signals, attacks=("loss",), plan=plan)
    with pytest.raises(ValueError, match="membership must be the plan's"):
        audit(signals, ~member, attacks=("loss",))
    with pytest.raises(ValueError, match="signals must be Signals where a plan is given"):
        audit({"phi": signals["phi"]}, member, plan={"seeds": []})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attacks": ()}, ValueError, "at least one attack; got none"),
        ({"attacks": ("magic",)}, ValueError, "must be among loss, lira, .*; got 'magic'"),
        ({"options": {"magic": {}}}, ValueError, "got 'magic'"),
        ({"attacks": ("rmia",)}, KeyError, "signals must hold 'logprob' for the attack rmia; they hold phi"),
        ({"attacks": ("lira",), "membership": None}, ValueError, "membership must be given with plain arrays"),
        ({"attacks": ("quantile_regression",)}, ValueError, "features must be given for the attack quantile"),
        ({"attacks": ("class_entropy",), "signals": {"entropy": np.zeros((2, 3))}}, ValueError, "labels must be given"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    given = {"signals": {"phi": np.zeros((2, 3))}, "membership": np.arange(6).reshape(2, 3) % 2 == 0} | arguments
    with pytest.raises(error, match=message):
        audit(given.pop("signals"), given.pop("membership"), **given)


def test_the_list_holds_every_attack():
    assert {attack.function.__name__ for attack in attacks.ATTACKS.values()} == set(attacks.__all__) - {
        "Attack",
        "ATTACKS",
    }


@pytest.mark.parametrize("others", [1, 2, 3, 6, 7, 49, 600, 601, 997, 1999])
def test_the_lowest_point_of_a_curve_is_one_false_positive(others):
    """Every member lies above all others but one."""
    scores = np.r_[2.0, np.zeros(others - 1), np.ones(3)]
    members = np.r_[np.zeros(others, bool), np.ones(3, bool)]
    points = auditing.mean_roc(scores[None], members[None], 25, bootstrap=0, confidence=0.95, seed=0)
    assert (points[0]["fpr"], points[0]["tpr"]) == (1 / others, 1)


def test_class_thresholds_report_the_accuracy_of_their_own_rule(everything):
    rows, members = everything.report["attacks"], everything.membership
    for name, row in rows.items():
        if not name.startswith("class"):
            assert row["balanced_accuracy_at_zero"] is None
            continue
        called = everything.scores[name] >= 0
        own = [(c[m].mean() + (~c)[~m].mean()) / 2 for c, m in zip(called, members, strict=True)]
        assert row["balanced_accuracy_at_zero"] == pytest.approx(np.mean(own))
        assert row["balanced_accuracy_at_zero"] > 0.8 or "confidence" not in name
