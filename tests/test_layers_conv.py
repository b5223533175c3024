"""Convolutions: any number of samples at once, and 16-bit ones."""

import subprocess
import sys
import weakref

import pytest
import torch
from layer_truth import truth
from test_layers_rules import CONVS, B, run, squares
from torch import nn

from cwfast import SaliencyScorer, _backends
from cwfast.layers import Computed, conv, windows
from cwfast.layers.samples import Batch, Layout
from cwfast.testing import assert_no_worse


@pytest.mark.parametrize("at_once", [1, 2, B])
@pytest.mark.parametrize("case", ["1d depthwise", "2d groups", "3d", "2d transposed"])
def test_the_samples_of_a_call_do_not_matter(case, at_once, monkeypatch):
    kind, options, shape = CONVS[case]
    layer = kind(4, 8, **{"kernel_size": 3, **options})
    monkeypatch.setattr(conv, "CHUNK", at_once * layer.weight.numel())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert conv._samples_at_once(layer.weight, torch.float64, layer.groups) == at_once
    run(layer, torch.randn(B, *shape, dtype=torch.float64))


def piece_of(layer, x, y=None, samples=B):
    """What the rule makes of a layer's weight."""
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    arguments = (layer.stride, layer.padding, layer.dilation, transposed, layer.output_padding, layer.groups)
    grad = torch.ones_like(layer(x)) if y is None else y
    return conv._of_weight(arguments, (), Layout(Batch(samples, None, None), "w"), x, grad, layer.weight)


@pytest.fixture
def vectors(monkeypatch):
    """As on a processor whose vectors our kernel uses."""
    monkeypatch.setattr(conv, "_has_vectors", lambda _: True)


def test_windows_are_for_processors_whose_vectors_our_kernel_uses():
    native = _backends.native()
    before = native.isa()
    try:
        for isa in native.isas():
            native.set_isa(isa)
            piece = piece_of(nn.Conv2d(3, 12, 3), torch.randn(B, 3, 5, 5))
            assert type(piece) is (Computed if isa == "scalar" else windows.Windows)
    finally:
        native.set_isa(before)


@pytest.mark.usefixtures("vectors")
def test_windows_are_taken_where_a_sample_has_fewer_than_the_weight_has_rows():
    for size, found in ((5, windows.Windows), (6, Computed)):  # 9 and 16 positions of 12 rows
        assert type(piece_of(nn.Conv2d(3, 12, 3), torch.randn(B, 3, size, size))) is found
        x, layer = torch.randn(B, 3, size, size).bfloat16(), nn.Conv2d(3, 12, 3).bfloat16()
        assert type(piece_of(layer, x)) is Computed  # 16 bits: twice as many
    x = torch.randn(B, 3, 4, 4).bfloat16()
    assert type(piece_of(nn.Conv2d(3, 12, 3).bfloat16(), x)) is windows.Windows
    assert type(piece_of(nn.Conv2d(4, 12, 3, groups=2), torch.randn(B, 4, 3, 3))) is Computed
    assert type(piece_of(nn.Conv2d(3, 12, 3), torch.randn(2 * B, 3, 5, 5))) is Computed  # two items of each sample
    assert type(piece_of(nn.ConvTranspose2d(10, 2, 3), torch.randn(B, 10, 3, 3))) is windows.Windows


WINDOWS = {
    "1d": (nn.Conv1d, {"stride": 2, "padding": 3, "dilation": 2}, (3, 8)),
    "1d one position": (nn.Conv1d, {}, (3, 3)),
    "1d same": (nn.Conv1d, {"padding": "same", "kernel_size": 4}, (3, 6)),
    "2d": (nn.Conv2d, {"stride": (1, 2), "padding": (2, 1), "dilation": (1, 2), "kernel_size": (3, 2)}, (3, 2, 5)),
    "2d one by one": (nn.Conv2d, {"kernel_size": 1}, (3, 2, 3)),
    "2d steps wider than the kernel": (nn.Conv2d, {"kernel_size": 1, "stride": 3}, (3, 5, 6)),
    "2d circular": (nn.Conv2d, {"padding": 1, "padding_mode": "circular"}, (3, 2, 3)),
    "3d": (nn.Conv3d, {"padding": (0, 1, 2), "stride": (1, 2, 3)}, (3, 4, 2, 3)),
    "1d transposed": (nn.ConvTranspose1d, {"stride": 3, "padding": 1, "output_padding": 2}, (9, 5)),
    "2d transposed": (nn.ConvTranspose2d, {"stride": (2, 1), "dilation": (1, 2), "kernel_size": (2, 3)}, (9, 2, 3)),
}


@pytest.mark.usefixtures("vectors")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("tile", [1, 60, 1 << 20])  # rows and samples one by one; a few of them; all together
@pytest.mark.parametrize("case", WINDOWS)
def test_windows(case, tile, monkeypatch):
    monkeypatch.setattr(windows, "TILE", tile)
    monkeypatch.setattr(Computed, "accumulate_", None)
    kind, options, shape = WINDOWS[case]
    features = 2 if "transposed" in case else 13  # the weight's rows are the input's channels in a transposed one
    layer = kind(shape[0], features, **{"kernel_size": 3, **options})
    run(layer, torch.randn(B, *shape, dtype=torch.float64))


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("size", [5, 9])
def test_the_same_bits_on_every_run(size):
    layer, x, y = nn.Conv2d(16, 32, 3), torch.randn(B, 16, size, size), torch.randn(B, 32, size - 2, size - 2)
    found = []
    for _ in range(20):
        out, grad = torch.zeros(layer.weight.shape), torch.empty(layer.weight.shape)
        piece_of(layer, x, y).accumulate_(out, 1, layer.weight.detach(), 2.0, grad, "auto")
        found.append((out, grad))
    assert all(torch.equal(a, b) for pair in found for a, b in zip(pair, found[0], strict=True))


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("size", [5, 9])
def test_no_samples(size):
    layer, x, y = nn.Conv2d(3, 32, 3), torch.empty(0, 3, size, size), torch.empty(0, 32, size - 2, size - 2)
    out, grad = torch.ones(layer.weight.shape), torch.full(layer.weight.shape, torch.nan)
    piece = piece_of(layer, x, y, samples=0)
    piece.accumulate_(out, 1, layer.weight.detach(), 1.0, grad, "auto")
    assert out.eq(1).all()
    assert grad.eq(0).all()
    assert piece.square_norms(out.shape, out.dtype, out.device).shape == (0,)


def test_samples_divide_among_the_threads(monkeypatch):
    weight = torch.empty(8, 8, 3)
    for threads, chunk, found in ((1, 7, 7), (2, 7, 6), (3, 7, 6), (4, 7, 4), (8, 7, 7), (7, 7, 7), (2, 1, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(conv, "CHUNK", chunk * weight.numel())
        assert conv._samples_at_once(weight, torch.float32, 1) == found


def test_channels_that_fill_no_vectors_go_one_sample_at_a_time(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def at_once(channels, features, groups=1, dtype=torch.float32):
        layer = nn.Conv2d(channels, features, 7, groups=groups)
        return conv._samples_at_once(layer.weight, dtype, groups)

    assert at_once(3, 64) == at_once(64, 12) == at_once(32, 36, 4) == 1
    assert at_once(64, 64) == conv.CHUNK // (64 * 64 * 49) > 1
    assert at_once(3, 64, dtype=torch.bfloat16) > 1
    assert at_once(32, 32, 32) > 1  # small


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
def test_one_chunk_is_in_memory_at_a_time(dtype):
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
import resource, sys
import torch
from cwfast.layers import conv
from cwfast.layers.samples import Batch, Layout

def score(channels, samples, size):
    weight = torch.randn(channels, channels, 3, 3, dtype=torch.bfloat16)
    x, d = torch.randn(2, samples, channels, size, size).bfloat16()
    out, grad = torch.ones(weight.shape), torch.ones(weight.shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layout, arguments = Layout(Batch(samples, None, None), "w"), ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    conv._of_weight(arguments, (), layout, x, d, weight).accumulate_(out, 1, weight, 1.0, grad, "auto")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

size = int(sys.argv[1])
score(16, 2, size)
print(score(512, 4, size))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("size", [7, 24])  # windows, and one sample's gradient at a time
def test_a_large_16_bit_weight_takes_little_memory(size):
    found = subprocess.run([sys.executable, "-c", MEMORY, str(size)], capture_output=True, text=True, check=True)
    assert float(found.stdout) < 64, "MB beside scores and gradient"


@pytest.mark.usefixtures("vectors")
def test_coefficients_reach_the_total():
    gradients = torch.randn(3, 2, 4, dtype=torch.float64)
    piece = Computed(3, lambda begin, end: gradients[begin:end].clone(), lambda: gradients.sum(0), chunk=2)
    c = torch.tensor([2.0, 0, -1], dtype=torch.float64)
    layer, x, y = nn.Conv1d(2, 4, 3).double(), *torch.randn(2, 3, 4, 5, dtype=torch.float64)
    plain = piece_of(layer, x[:, :2], y[..., :3], samples=3)
    assert isinstance(plain, windows.Windows)
    expected, out = plain.scaled(c), torch.zeros(4, 2, 3, dtype=torch.float64)
    each = [plain.compute(i, i + 1)[0].view(4, 2, 3) * c[i] for i in range(3)]
    expected.accumulate_(out, 1, None, 1.0, None, "auto")
    torch.testing.assert_close(out, sum(g.abs() for g in each))
    torch.testing.assert_close(expected.total(out.shape, out.dtype, out.device), sum(each))
    torch.testing.assert_close(
        expected.square_norms(out.shape, out.dtype, out.device), torch.stack([g.square().sum() for g in each])
    )
    for scaled, weights in ((piece.scaled(c), c), (piece.scaled(c).scaled(c), c * c)):
        found = scaled.total((2, 4), torch.float64, gradients.device)
        torch.testing.assert_close(found, (gradients * weights[:, None, None]).sum(0))
