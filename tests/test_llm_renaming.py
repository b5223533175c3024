"""Masks by a checkpoint's names are the same weights by the names of parameters, also of merged experts."""

import llm_models
import pytest
import torch

import cwfast
from cwfast.llm.renaming import as_parameters
from cwfast.llm.score_files import on_disk

pytestmark = pytest.mark.usefixtures("without_torchvision")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_the_same_weights(kind, rate):
    model = llm_models.small(kind, torch.float32)
    scores = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    stored = on_disk(model, scores)
    assert (stored.keys() == scores.keys()) == (kind in ("gpt2", "llama"))
    expected = cwfast.select(scores, rate=rate)
    backwards = dict(reversed(stored.items()))
    assert as_parameters(model, cwfast.select(backwards, rate=rate)) == expected
    assert as_parameters(model, expected) == expected


def test_masks_of_another_model_are_refused():
    model = llm_models.small("qwen3_moe", torch.float32)
    stored = {name: torch.rand(p.shape) for name, p in on_disk(model, dict(model.named_parameters())).items()}
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    with pytest.raises(ValueError, match=rf"stores '{name}' as \(8, 16\); got \(16, 8\)"):
        as_parameters(model, cwfast.select(stored | {name: stored[name].T}, rate=0.1))
    with pytest.raises(ValueError, match="has no parameter 'another'"):
        as_parameters(model, cwfast.select(stored | {"another": torch.rand(2)}, rate=0.1))
