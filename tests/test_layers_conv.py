"""Convolutions: any number of samples at once, and 16-bit ones."""

import subprocess
import sys
import weakref

import pytest
import torch
from layer_truth import truth
from test_layers_rules import CONVS, B, run, squares
from torch import nn

from cwfast import SaliencyScorer
from cwfast.layers import Computed, conv, pieces
from cwfast.testing import assert_no_worse


@pytest.mark.parametrize("at_once", [1, 2, B])
@pytest.mark.parametrize("case", ["1d depthwise", "2d groups", "3d", "2d transposed"])
def test_the_samples_of_a_call_do_not_matter(case, at_once, monkeypatch):
    kind, options, shape = CONVS[case]
    layer = kind(4, 8, **{"kernel_size": 3, **options})
    monkeypatch.setattr(conv, "CHUNK", at_once * layer.weight.numel())
    assert conv._samples_at_once(layer.weight, torch.float64, layer.groups) == at_once
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_large_chunk_is_in_memory_at_a_time(dtype, monkeypatch):
    monkeypatch.setattr(pieces, "KEPT", 0)
    made = []

    def compute(begin, end):
        assert all(old() is None for old in made)
        gradients = torch.ones((end - begin, 3, 4), dtype=dtype)
        made.append(weakref.ref(gradients))
        return gradients

    piece = Computed(5, compute, lambda: torch.ones(3, 4), chunk=2)
    out, grad, factor = torch.zeros(3, 4), torch.empty(3, 4), torch.full((3, 4), -2.0)
    for power, expected in ((1, 5 * 2 * 3), (2, 5 * (2 * 3) ** 2)):
        piece.accumulate_(out.zero_(), power, factor, 3.0, grad, "auto")
        assert out.eq(expected).all()
        assert grad.eq(5).all()
        made.clear()
    assert piece.square_norms(out.shape, out.dtype, out.device).tolist() == [12] * 5


MEMORY = """
import resource
import torch
from cwfast.layers import conv
from cwfast.layers.samples import Batch, Layout

def score(channels, samples):
    weight = torch.randn(channels, channels, 3, 3, dtype=torch.bfloat16)
    x, d = torch.randn(2, samples, channels, 7, 7).bfloat16()
    out, grad = torch.ones(weight.shape), torch.ones(weight.shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layout, arguments = Layout(Batch(samples, None, None), "w"), ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    conv._of_weight(arguments, (), layout, x, d, weight).accumulate_(out, 1, weight, 1.0, grad, "auto")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

score(16, 2)
print(score(512, 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_a_large_16_bit_weight_takes_little_memory():
    found = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(found.stdout) < 64, "MB beside scores and gradient"


def test_coefficients_reach_the_total():
    gradients = torch.randn(3, 2, 4, dtype=torch.float64)
    piece = Computed(3, lambda begin, end: gradients[begin:end].clone(), lambda: gradients.sum(0), chunk=2)
    c = torch.tensor([2.0, 0, -1], dtype=torch.float64)
    for scaled, weights in ((piece.scaled(c), c), (piece.scaled(c).scaled(c), c * c)):
        found = scaled.total((2, 4), torch.float64, gradients.device)
        torch.testing.assert_close(found, (gradients * weights[:, None, None]).sum(0))
