"""Convolutions: any number of samples at once, and 16-bit ones."""

import pytest
import torch
from layer_truth import truth
from test_layers_rules import CONVS, B, run, squares
from torch import nn

from cwfast import SaliencyScorer
from cwfast.layers import conv
from cwfast.testing import assert_no_worse


@pytest.mark.parametrize("at_once", [1, 2, B])
@pytest.mark.parametrize("case", ["1d depthwise", "2d groups", "3d", "2d transposed"])
def test_the_samples_of_a_call_do_not_matter(case, at_once, monkeypatch):
    kind, options, shape = CONVS[case]
    layer = kind(4, 8, **{"kernel_size": 3, **options})
    monkeypatch.setattr(conv, "CHUNK", at_once * layer.weight.numel())
    assert conv._samples_at_once(layer.weight, torch.float64) == at_once
    run(layer, torch.randn(B, *shape, dtype=torch.float64))


LAYERS = {
    "1d": lambda: (nn.Conv1d(16, 24, 5, padding=2), torch.randn(B, 16, 40)),
    "2d": lambda: (nn.Conv2d(32, 48, 3, stride=2, padding=1), torch.randn(B, 32, 16, 16)),
    "2d depthwise": lambda: (nn.Conv2d(32, 32, 3, groups=32), torch.randn(B, 32, 9, 9)),
    "2d large": lambda: (nn.Conv2d(192, 192, 3), torch.randn(B, 192, 6, 6)),
    "3d": lambda: (nn.Conv3d(8, 12, 3), torch.randn(B, 8, 5, 6, 7)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_no_worse_than_one_sample_at_a_time(case, dtype):
    model, x = LAYERS[case]()
    model, x = model.to(dtype), x.to(dtype)
    names, weights = zip(*model.named_parameters(), strict=True)
    plain = {name: torch.zeros(w.shape) for name, w in zip(names, weights, strict=True)}
    for one in x:
        grads = torch.autograd.grad(squares(model)(one[None]).sum(), weights)
        for name, w, g in zip(names, weights, grads, strict=True):
            plain[name] += (g.float() * w.detach().float()).abs()
    scorer = SaliencyScorer(model, reduction="sum")
    with scorer:
        squares(model)(x).sum().backward()
    found = scorer.scores()
    double = model.double()
    exact, _, _ = truth(double, squares(double), [x.double()])
    for name, score in found.items():
        assert_no_worse(score, exact[name], plain[name])
