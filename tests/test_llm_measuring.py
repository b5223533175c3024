"""What a model gives away and is worth: as cwfast audit-llm finds it, and as plain log-probabilities say."""

import math

import numpy as np
import pytest
import torch

from cwfast.llm import auditing, measuring, recording
from cwfast.llm.training import fine_tune
from cwfast.mia import metrics

pytest.importorskip("transformers")
import llm_models

pytestmark = pytest.mark.usefixtures("without_torchvision")
HOW = {"bootstrap": 40, "fprs": (0.1,)}


def tuned(rows, seed=0):
    model = llm_models.small("llama", torch.float32)
    fine_tune(model, rows, epochs=4, lr=3e-3, seed=seed)
    return model


@pytest.fixture(scope="module")
def sides(without_torchvision):
    rows = llm_models.ids(40, 4, 12, seed=4)
    return rows[:16], rows[16:32], rows[32:]


@pytest.fixture(scope="module")
def models(sides):
    return llm_models.small("llama", torch.float32), tuned(sides[0])


def test_it_finds_what_an_audit_finds(sides, models):
    members, nonmembers, heldout = sides
    base, model = models
    rng = np.random.default_rng(0)
    halves = [rng.permutation(32) < 16 for _ in range(2)]
    texts = llm_models.words(members + nonmembers)
    shadows = [
        (tuned([row for row, one in zip(members + nonmembers, half, strict=True) if one]), half) for half in halves
    ]
    loaders = [(lambda one=one: one, half) for one, half in shadows]
    found = measuring.Meter(base, members, nonmembers, heldout, shadows=loaders, **HOW)(model)
    known = [(one, [text for text, member in zip(texts, half, strict=True) if member]) for one, half in shadows]
    inputs = auditing.Inputs(
        model, llm_models.tokenizer(), texts[:16], texts[16:], reference=base, shadows=known,
    )  # fmt: skip
    expected, _, _ = auditing.audit(inputs, [*measuring.DEFAULT, "rmia"], **HOW)
    assert list(found["attacks"]) == [*measuring.DEFAULT, "rmia"]
    for name, row in expected["attacks"].items():
        assert found["attacks"][name]["auc"] == pytest.approx(row["auc"], abs=1e-12), name
        assert found["attacks"][name]["tpr_at_fpr"] == row["tpr_at_fpr"], name
    assert found["attacks"]["reference"]["auc"] > 0.9


def test_perplexity_is_that_of_plain_log_probabilities(sides, models):
    members, nonmembers, heldout = sides
    base, model = models
    meter = measuring.Meter(base, members, nonmembers, heldout, **HOW)
    for found, one in ((meter(model), model), (meter.base(), base)):
        for name, rows in (("members", members), ("nonmembers", nonmembers), ("heldout", heldout)):
            logp = torch.cat(
                [llm_models.log_softmax(one, row).gather(1, torch.tensor(row[1:])[:, None])[:, 0] for row in rows]
            )
            assert found["loss"][name] == pytest.approx(-logp.mean().item(), rel=1e-5)
            assert measuring.token_loss(one, rows) == pytest.approx(found["loss"][name], rel=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]["heldout"]), rel=1e-12)
        assert found["perplexity_low"] < found["perplexity"] < found["perplexity_high"]
        assert len(found["draws"]["log_perplexity"]) == 40
    assert meter.base()["attacks"]["reference"]["auc"] == 0.5


def test_intervals_are_quantiles_of_draws_that_come_in_pairs(sides, models):
    members, nonmembers, _ = sides
    meter = measuring.Meter(models[0], members, nonmembers, nonmembers, **HOW)
    found = meter(models[1])
    draws = found["draws"]["loss"]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (found["attacks"]["loss"]["auc_low"], found["attacks"]["loss"]["auc_high"]) == pytest.approx((low, high))
    assert meter(models[1]) == found
    kept = measuring.read(models[1], members, nonmembers, nonmembers)
    before = measuring.read(models[0], members, nonmembers, nonmembers)
    assert measuring.Meter(before, members, nonmembers, nonmembers, **HOW)(kept) == found
    for other in (measuring.read(models[1], nonmembers, members, members), kept.select(list(range(31)))):
        with pytest.raises(ValueError, match="records must be of this Meter's texts"):
            meter(other)
    assert len(meter._texts) == 32  # the held-out texts are the non-members: read once
    separate = measuring.Meter(models[0], members, nonmembers, nonmembers[::-1], **HOW)(models[1])
    assert separate["perplexity"] == pytest.approx(found["perplexity"], rel=1e-6)
    assert separate["attacks"]["loss"]["auc"] == metrics.auc(
        np.array([-measuring.token_loss(models[1], [row]) for row in members + nonmembers]), np.arange(32) < 16
    )


def test_what_is_refused(sides, models):
    members, nonmembers, heldout = sides
    with pytest.raises(ValueError, match="attacks must need no more than a reference; dc_pdd needs counts"):
        measuring.Meter(models[0], members, nonmembers, heldout, attacks=("loss", "dc_pdd"))
    with pytest.raises(ValueError, match="bootstrap must be at least 1; got 0"):
        measuring.Meter(models[0], members, nonmembers, heldout, bootstrap=0)
    with pytest.raises(ValueError, match=r"texts must have a token to score each .*; text 1 has 1 in all"):
        measuring.tokenized(llm_models.tokenizer(), ["w3 w4", "w3"], None)
    assert measuring.tokenized(llm_models.tokenizer(), ["w3 w4 w5"], 2) == [[3, 4]]


def test_defenses_read_the_tokens_that_records_have(models):
    tokenizer, texts = llm_models.tokenizer(bos=True), ["w3 w4 w5 w6", "w7"]
    rows = measuring.tokenized(tokenizer, texts, 3)
    assert rows == [[1, 3, 4, 5], [1, 7]]
    expected = recording.records(models[0], tokenizer, texts, max_tokens=3)
    found = recording.records(models[0], None, rows)
    assert np.array_equal(found.tokens, expected.tokens)
    assert np.array_equal(found["logprob"], expected["logprob"])
