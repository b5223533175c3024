"""Fine-tuning on token ids: the plain computation in float64, frozen weights, order and dropout by seed."""

import copy

import pytest
import torch

import cwfast
from cwfast.llm.training import fine_tune, padded

pytest.importorskip("transformers")
import llm_models

pytestmark = pytest.mark.usefixtures("without_torchvision")
EXACT = {"autocast": False, "lr": 1e-3}


def plain_loss(model, rows):
    """Mean over all predicted tokens, from logits, one text at a time."""
    losses = []
    for row in rows:
        logp = model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        losses.append(-logp.gather(1, torch.tensor(row[1:])[:, None])[:, 0])
    return torch.cat(losses).mean()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("alpha", [None, 2.0, 9.0])
def test_a_step_is_adamw_on_the_mean_token(kind, alpha):
    model = llm_models.small(kind)
    if kind == "gpt2":
        model.eval()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    rows = llm_models.ids(5, 2, 9)
    other = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.0)
    expected = []
    for _ in range(2):  # one batch holds all texts, in whatever order
        loss = plain_loss(other, rows)
        expected.append(loss.item())
        optimizer.zero_grad()
        (loss if alpha is None else (loss - alpha).abs()).backward()
        optimizer.step()
    losses = fine_tune(model, rows, steps=2, batch=8, alpha=alpha, **EXACT)
    assert losses == pytest.approx(expected, rel=1e-12)
    for (name, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9, msg=name)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_level_is_reached_from_both_sides():
    rows = llm_models.ids(8, 6, 12)
    for alpha in (1.5, 6.0):
        model = llm_models.small("llama", torch.float32)
        losses = fine_tune(model, rows, epochs=40, batch=8, alpha=alpha, lr=3e-3)
        assert abs(losses[-1] - alpha) < 0.2 < abs(losses[0] - alpha)
        assert not model.training


def test_frozen_weights_stay_bit_for_bit():
    model = llm_models.small("llama", torch.float32)
    before = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    chosen = {name: torch.rand(p.shape, generator=generator) < 0.3 for name, p in model.named_parameters()}
    fine_tune(model, llm_models.ids(8, 6, 12), epochs=3, lr=1e-2, masks=cwfast.MaskSet.from_masks(chosen))
    for (name, after), first in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(after[chosen[name]], first[chosen[name]]), name
        assert (after != first).float().mean() > 0.3, name


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_seed_fixes_order_and_dropout_and_nothing_else_moves(kind):
    rows = llm_models.ids(10, 2, 12)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        model = llm_models.small(kind, torch.float32)
        torch.set_rng_state(state)
        runs.append((fine_tune(model, rows, batch=4, seed=seed, epochs=2), list(model.parameters())))
        assert torch.equal(torch.get_rng_state(), state)
    assert len(runs[0][0]) == 6  # 10 texts: 4, 4, 2, twice
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_steps_go_beyond_a_pass_and_stop_within_one():
    rows, model = llm_models.ids(6, 4, 8), llm_models.small("llama")
    assert len(fine_tune(copy.deepcopy(model), rows, steps=7, batch=4, **EXACT)) == 7
    losses = fine_tune(copy.deepcopy(model), rows, epochs=9, steps=1, batch=4, **EXACT)
    assert losses == fine_tune(copy.deepcopy(model), rows, epochs=1, batch=4, **EXACT)[:1]


def test_what_is_refused():
    model, rows = llm_models.small("llama"), llm_models.ids(3, 4, 8)
    for wrong, match in (
        ({"epochs": 0}, "epochs must be at least 1; got 0"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"batch": 0}, "batch must be at least 1; got 0"),
        ({"alpha": float("nan")}, "alpha must be at least 0; got nan"),
    ):
        with pytest.raises(ValueError, match=match):
            fine_tune(model, rows, **wrong)
    with pytest.raises(ValueError, match="texts must hold at least one text; got none"):
        fine_tune(model, [])
    with pytest.raises(ValueError, match=r"at least two token ids \[T\]; text 1 has shape \(1,\)"):
        fine_tune(model, [[3, 4], [3]])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="model must have parameters that require a gradient; none does"):
        fine_tune(model, rows)


def test_padding():
    ids, mask = padded([torch.tensor([5, 6]), torch.tensor([7, 8, 9])])
    assert ids.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]
