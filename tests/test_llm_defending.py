"""CWRF on tiny language models: the masks of the scores, weights that stay rewound, the level that is held."""

import copy

import pytest
import torch

import cwfast
from cwfast.llm import defending, measuring
from cwfast.llm.scoring import score
from cwfast.llm.training import fine_tune

pytest.importorskip("transformers")
import llm_models

pytestmark = pytest.mark.usefixtures("without_torchvision")


def case(kind):
    rows = llm_models.ids(24, 6, 12, seed=4)
    base = llm_models.small(kind, torch.float32)
    model = copy.deepcopy(base)
    fine_tune(model, rows[:12], epochs=4, batch=4, lr=3e-3)
    sides = [[torch.tensor(row) for row in side] for side in (rows[:12], rows[12:])]
    return base, model, *sides


@pytest.mark.parametrize(
    ("kind", "criterion"),
    [(kind, name) for kind in ("gpt2", "llama") for name in ("gap", "taylor_delta")] + [("qwen3_moe", "gap")],
)
def test_rewound_weights_are_the_base_s_and_the_others_go_on(kind, criterion):
    base, model, members, reference = case(kind)
    trained = copy.deepcopy(model)
    scores = score(model, base, members, reference, criterion=criterion)
    expected = cwfast.select(scores, rate=0.2)
    done = defending.defend_(
        model, base, members, reference, criterion=criterion, rate=0.2, steps=3, lr=1e-3, autocast=False
    )
    assert done.masks == expected
    rewound = cwfast.rewind_(copy.deepcopy(trained), expected, base)
    assert done.alpha == pytest.approx(measuring.token_loss(rewound, [row.tolist() for row in members]), rel=1e-6)
    assert len(done.losses) == 3
    moved = 0
    for name, after in model.named_parameters():
        before, first = trained.get_parameter(name), base.get_parameter(name)
        mask = done.masks[name]
        assert torch.equal(after[mask], first[mask]), name
        moved += int((after[~mask] != before[~mask]).sum())
    assert moved > 0.7 * (done.masks.numel - done.masks.total)  # not places and tokens that no text has


def test_without_steps_it_only_rewinds():
    base, model, members, reference = case("llama")
    trained = copy.deepcopy(model)
    done = defending.defend_(model, base, members, reference, rate=0.1, steps=0)
    assert (done.alpha, done.losses) == (None, [])
    expected = cwfast.rewind_(trained, done.masks, base)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_the_level_may_be_given():
    base, model, members, reference = case("llama")
    done = defending.defend_(model, base, members, reference, rate=0.1, steps=40, lr=3e-3, batch=12, alpha=2.5)
    assert done.alpha == 2.5
    assert abs(done.losses[-1] - 2.5) < 0.1


def test_no_weight_without_a_score_is_rewound():
    scores = {"a": torch.tensor([0.0, 1.0, 2.0, 0.0]), "b": torch.zeros(4)}
    assert defending.masks_of(scores, 0.25).counts == {"a": 2, "b": 0}
    with pytest.raises(ValueError, match=r"at most 0.25, the share of weights with a score above 0; got 0.3"):
        defending.masks_of(scores, 0.3)
    with pytest.raises(ValueError, match="rate must lie above 0"):
        defending.masks_of(scores, 0.0)
    with pytest.raises(ValueError, match="steps must be at least 0; got -1"):
        defending.hold_(None, [], steps=-1)
