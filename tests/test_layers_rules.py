"""Every layer rule equals one sample at a time in float64: scores, norms and gradients."""

import pytest
import torch
from layer_truth import assert_equal, check, truth
from torch import nn
from torch.nn import functional

from cwfast import SaliencyScorer
from cwfast.errors import UnsupportedLayer
from cwfast.layers import PerSample

B = 5


class Uses(nn.Module):
    """A module of bare parameters, ``use(x, **parameters)``."""

    def __init__(self, use, **shapes):
        super().__init__()
        self.use = use
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, *inputs):
        return self.use(*inputs, **dict(self.named_parameters()))


def squares(model):
    """Losses [B] that weigh every output differently."""

    def losses(*inputs):
        y = model(*inputs)
        y = y if isinstance(y, torch.Tensor) else y[0]
        y = y.reshape(len(inputs[0]), -1)
        return (y.sin() * torch.linspace(0.5, 1.5, y.shape[1], dtype=y.dtype)).sum(dim=1)

    return losses


def randomized(model):
    """Float64, with random parameters: ones and zeros would hide errors."""
    model = model.double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def run(model, *inputs, **options):
    model = randomized(model)
    check(model, squares(model), inputs, **options)


NORMS = {
    "layernorm": (lambda: nn.LayerNorm(6), (7, 6)),
    "layernorm 2d": (lambda: nn.LayerNorm((3, 6)), (2, 3, 6)),
    "layernorm one row": (lambda: nn.LayerNorm(6), (6,)),
    "layernorm no bias": (lambda: nn.LayerNorm(6, bias=False), (7, 6)),
    "rmsnorm": (lambda: nn.RMSNorm(6), (7, 6)),
    "groupnorm": (lambda: nn.GroupNorm(2, 6), (6, 3, 4)),
    "groupnorm rows": (lambda: nn.GroupNorm(2, 6), (6,)),
    "batchnorm1d rows": (lambda: nn.BatchNorm1d(6).eval(), (6,)),
    "batchnorm1d": (lambda: nn.BatchNorm1d(6).eval(), (6, 3)),
    "batchnorm2d": (lambda: nn.BatchNorm2d(6).eval(), (6, 3, 2)),
    "batchnorm3d": (lambda: nn.BatchNorm3d(6).eval(), (6, 3, 2, 2)),
}


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_norms(case):
    make, shape = NORMS[case]
    model = make()
    if isinstance(model, nn.modules.batchnorm._BatchNorm):
        model.running_mean.normal_()
        model.running_var.uniform_(0.5, 2)
    before = nn.Linear(shape[-1], shape[-1])  # so that the norm's input gradient is checked as well
    run(nn.Sequential(before, model), torch.randn(B, *shape, dtype=torch.float64))


def test_batchnorm_in_training_takes_a_samples_own_rows_and_says_so():
    model = randomized(nn.BatchNorm1d(4)).train()
    x = torch.randn(B, 4, 3, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    y = functional.batch_norm(leaf, None, None, None, None, True)
    out = y * model.weight[:, None] + model.bias[:, None]
    upstream = torch.autograd.grad(out.sin().sum(), out)[0]
    expected = {
        "weight": ((upstream * y.detach()).sum(dim=2) * model.weight).abs().sum(dim=0).detach(),
        "bias": (upstream.sum(dim=2) * model.bias).abs().sum(dim=0).detach(),
    }
    scorer = SaliencyScorer(model, reduction="sum")
    with scorer, pytest.warns(UserWarning, match="BatchNorm in training mode"):
        model(x).sin().sum().backward()
    assert_equal(scorer.scores(), expected)
    assert model.num_batches_tracked == 1
    torch.testing.assert_close(model.running_mean, 0.1 * x.mean(dim=(0, 2)))


CONVS = {
    "1d": (nn.Conv1d, {}, (4, 9)),
    "1d stride": (nn.Conv1d, {"stride": 2, "padding": 1}, (4, 9)),
    "1d same even": (nn.Conv1d, {"kernel_size": 4, "padding": "same"}, (4, 9)),
    "1d valid dilation": (nn.Conv1d, {"dilation": 3, "padding": "valid"}, (4, 9)),
    "1d circular": (nn.Conv1d, {"padding": 2, "padding_mode": "circular"}, (4, 9)),
    "1d depthwise": (nn.Conv1d, {"groups": 4}, (4, 9)),
    "2d": (nn.Conv2d, {"bias": False}, (4, 6, 5)),
    "2d groups": (nn.Conv2d, {"groups": 2, "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}, (4, 6, 7)),
    "2d same": (nn.Conv2d, {"kernel_size": (2, 3), "padding": "same", "dilation": (1, 2)}, (4, 6, 5)),
    "2d reflect": (nn.Conv2d, {"padding": 1, "padding_mode": "reflect"}, (4, 6, 5)),
    "3d": (nn.Conv3d, {"groups": 2, "padding": 1, "stride": 2}, (4, 4, 5, 3)),
    "1d transposed": (nn.ConvTranspose1d, {"stride": 2, "padding": 1, "output_padding": 1}, (4, 5)),
    "2d transposed": (nn.ConvTranspose2d, {"groups": 2, "stride": 2, "dilation": 2}, (4, 3, 4)),
    "3d transposed": (nn.ConvTranspose3d, {}, (4, 3, 3, 2)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_convolutions(case):
    kind, options, shape = CONVS[case]
    options = {"kernel_size": 3, **options}
    dims = len(shape) - 1
    first = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 4, 1)
    run(nn.Sequential(first, kind(4, 8, **options)), torch.randn(B, *shape, dtype=torch.float64))


def test_a_convolution_of_several_frames_per_sample():
    conv = nn.Conv2d(2, 3, 3)
    model = Uses(lambda x, **_: conv(x.flatten(0, 1)))
    model.conv = conv
    run(model, torch.randn(B, 4, 2, 5, 5, dtype=torch.float64))


def test_a_convolution_in_channels_last():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 2)).to(memory_format=torch.channels_last)
    run(model, torch.randn(B, 4, 5, 5, dtype=torch.float64).to(memory_format=torch.channels_last))


def tokens(*shape, high=11):
    return torch.randint(high, shape)


def test_an_embedding_with_repeated_tokens():
    run(nn.Embedding(11, 4), tokens(B, 30))


@pytest.mark.parametrize("padding", [0, 3, -1])
def test_an_embedding_with_a_padding_index(padding):
    run(nn.Embedding(11, 4, padding_idx=padding), tokens(B, 30))


@pytest.mark.parametrize("shape", [(), (2, 3)], ids=str)
def test_an_embedding_of_any_index_shape(shape):
    run(nn.Embedding(11, 4), tokens(B, *shape))


class Language(nn.Module):
    """Tokens, positions in every customary form, and a head that shares the embedding."""

    def __init__(self, positions):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 4), nn.Embedding(8, 4)
        self.mix, self.positions = nn.Linear(4, 4), positions

    def forward(self, x):
        places = torch.arange(x.shape[1])
        if self.positions == "[1, T]":
            places = places[None]
        elif self.positions == "[B, T]":
            places = places.expand(len(x), -1)
        h = self.tokens(x) + self.places(places)
        return functional.linear(self.mix(h).tanh(), self.tokens.weight)


@pytest.mark.parametrize("positions", ["[T]", "[1, T]", "[B, T]"])
def test_a_tied_head_and_positions(positions):
    run(Language(positions), tokens(B, 7))


def test_positions_as_many_as_samples_must_be_told_from_samples():
    model = Language("[T]")
    with SaliencyScorer(model), pytest.raises(ValueError, match=r"give positions as \[1, T\]"):
        model(tokens(7, 7))


def attention(x, cls, pos, scale):
    x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1) + pos
    return x * scale


BROADCAST = {
    "class token, positions, scale": (attention, {"cls": (1, 1, 4), "pos": (1, 4, 4), "scale": (4,)}),
    "repeat": (lambda x, cls: torch.cat([cls.repeat(len(x), 1, 1), x], 1).cos(), {"cls": (1, 2, 4)}),
    "repeat of several": (lambda x, cls: torch.cat([cls.expand_as(x), x], 1).cos(), {"cls": (3, 4)}),
    "weight first": (lambda x, w: w * x, {"w": (4,)}),
    "inner ones": (lambda x, w: x * w, {"w": (3, 1)}),
    "scalar": (lambda x, w: x * w, {"w": ()}),
    "one": (lambda x, w: torch.mul(x, w), {"w": (1,)}),
    "gemma": (lambda x, w: (1.0 + w.clone()) * x, {"w": (4,)}),
    "in place": (lambda x, w: (x * 2).add_(w), {"w": (3, 4)}),
    "flattened": (lambda x, w: x.flatten(0, 1) * w, {"w": (4,)}),
    "view": (lambda x, w: x * w[None, :, 0], {"w": (4, 2)}),
}


@pytest.mark.parametrize("case", BROADCAST, ids=str)
def test_bare_parameters_that_meet_a_batch(case):
    use, shapes = BROADCAST[case]
    run(Uses(use, **shapes), torch.randn(B, 3, 4, dtype=torch.float64))


LINEAR = {
    "transposed": (lambda x, w: x @ w.t(), {"w": (5, 4)}),
    "T": (lambda x, w: torch.matmul(x, w.T), {"w": (5, 4)}),
    "matmul": (lambda x, w: x @ w, {"w": (4, 5)}),
    "addmm": (lambda x, w, b: torch.addmm(b, x.reshape(-1, 4), w).reshape(*x.shape[:-1], 5), {"w": (4, 5), "b": (5,)}),
    "einsum": (lambda x, w: torch.einsum("...i,oi->...o", x, w), {"w": (5, 4)}),
    "einsum turned": (lambda x, w: torch.einsum("io, ...i -> ...o", w, x), {"w": (4, 5)}),
    "slices": (
        lambda x, w: functional.linear(x, w[:3]).sin() + functional.linear(x, w[3:6]).cos(),
        {"w": (6, 4)},
    ),
    "overlapping slices": (
        lambda x, w: functional.linear(x, w[:4]).sin() + functional.linear(x, w[2:6]).cos(),
        {"w": (6, 4)},
    ),
    "columns": (lambda x, w: functional.linear(x[..., :2], w[:, 1:3]), {"w": (6, 4)}),
    "forwards and turned": (lambda x, w: (x @ w).sin() @ w.t(), {"w": (4, 5)}),
    "vector and matrix": (lambda x, w: functional.linear(x, w) * w[0], {"w": (4, 4)}),
    "stack": (lambda x, w: functional.linear(functional.linear(x, w[0]), w[1]), {"w": (3, 4, 4)}),
}


@pytest.mark.parametrize("shape", [(3, 4), (4,)], ids=str)
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_layers_in_other_forms(case, shape):
    use, shapes = LINEAR[case]
    run(Uses(use, **shapes), torch.randn(B, *shape, dtype=torch.float64))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"kdim": 3, "vdim": 5}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_multi_head_attention(options, batch_first):
    model = randomized(nn.MultiheadAttention(4, 2, batch_first=batch_first, **options))

    def losses(q, k, v):
        if not batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        y = model(q, k, v, need_weights=False)[0]
        return (y if batch_first else y.transpose(0, 1)).sin().flatten(1).sum(dim=1)

    inputs = [
        torch.randn(B, t, d, dtype=torch.float64)
        for t, d in ((3, 4), (6, options.get("kdim", 4)), (6, options.get("vdim", 4)))
    ]
    check(model, losses, inputs, size=True)


def test_a_transformer_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    run(nn.Sequential(layer, nn.Linear(8, 3)), torch.randn(B, 5, 8, dtype=torch.float64))


class Routed(nn.Module):
    """Experts that get the rows an index picks, in an order that is not that of the samples; then a plain layer."""

    def __init__(self, pick):
        super().__init__()
        self.first, self.pick, self.last = nn.Linear(4, 4), pick, nn.Linear(4, 4)
        self.up = nn.Parameter(torch.randn(3, 6, 4))
        self.down = nn.ModuleList([nn.Linear(6, 4) for _ in range(3)])

    def forward(self, x):
        h = self.first(x).reshape(-1, 4)
        choice = h.detach().argmax(dim=1) % 3
        out = torch.zeros_like(h)
        for e in range(3):
            rows = torch.where(choice == e)[0]
            rows = rows if self.pick == "mask" else rows.flip(0)
            picked = h[choice == e] if self.pick == "mask" else h[rows]
            picked = h.index_select(0, rows) if self.pick == "select" else picked
            found = self.down[e](functional.linear(picked, self.up[e]).tanh())
            out = out.index_add(0, rows, found)
        return self.last(out.reshape(x.shape).flatten(0, 1)).reshape(x.shape)


@pytest.mark.parametrize("pick", ["index", "select", "mask"])
def test_rows_routed_to_experts(pick):
    run(Routed(pick), torch.randn(B, 6, 4, dtype=torch.float64))


def test_one_row_of_each_sample():
    last = torch.tensor([2, 0, 1, 2, 1])
    first, head = nn.Linear(4, 4), nn.Linear(4, 3)
    model = Uses(lambda x, **_: head(first(x)[torch.arange(len(x)), last[: len(x)]]))
    model.first, model.head = first, head
    model = randomized(model)
    x = torch.randn(B, 3, 4, dtype=torch.float64)
    scores = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(B):
        y = head(first(x[i])[last[i]]).sin().sum()
        for name, g in zip(scores, torch.autograd.grad(y, list(model.parameters())), strict=True):
            scores[name] += (g * model.get_parameter(name)).abs().detach()
    scorer = SaliencyScorer(model, reduction="sum")
    with scorer:
        model(x).sin().sum().backward()
    assert_equal(scorer.scores(), scores)


@pytest.mark.parametrize(
    "take", [lambda h: h[10:20], lambda h: h.split(10)[1], lambda h: h.flip(0)], ids=["slice", "split", "flip"]
)
def test_rows_that_cannot_be_traced_are_refused(take):
    first, head = nn.Linear(4, 4), nn.Linear(4, 3)
    model = Uses(lambda x, **_: head(take(first(x).flatten(0, 1)).tanh()))
    model.first, model.head = first, head
    with SaliencyScorer(model), pytest.raises(UnsupportedLayer, match="traced to their samples"):
        model(torch.randn(B, 6, 4))


def test_low_rank_adapters_of_a_frozen_layer():
    model = Uses(
        lambda x, a, b, w: functional.linear(x, w) + functional.linear(functional.linear(x, a), b),
        a=(2, 4),
        b=(5, 2),
        w=(5, 4),
    )
    model.w.requires_grad_(False)
    model = model.double()
    x = torch.randn(B, 3, 4, dtype=torch.float64)
    scores, _, _ = truth(model, squares(model), [x])
    scorer = SaliencyScorer(model, reduction="sum")
    with scorer:
        squares(model)(x).sum().backward()
    assert list(scores) == ["a", "b"]
    assert_equal(scorer.scores(), scores)


class Experts(nn.Module):
    """Two products with experts that are looked up for each of k routes of every row, in this order."""

    def __init__(self, turned, order):
        super().__init__()
        shape = (3, 4, 4)
        self.first, self.up, self.down = (
            nn.Linear(4, 4),
            nn.Parameter(torch.empty(shape)),
            nn.Parameter(torch.empty(shape)),
        )
        self.turned, self.order = turned, order

    def product(self, x, w):
        return torch.bmm(x.unsqueeze(1), w).squeeze(1) if self.turned else torch.bmm(w, x.unsqueeze(-1)).squeeze(-1)

    def forward(self, x):
        h = self.first(x).flatten(0, -2)
        rows = torch.arange(len(h)).repeat_interleave(2)
        experts = ((5 * h.detach()[rows].sum(-1)).long() + torch.arange(len(rows)) % 2) % 3
        if self.order == "by expert":
            turn = experts.argsort(stable=True)
            rows, experts = rows[turn], experts[turn]
        y = self.product(self.product(h[rows], self.up[experts]).tanh(), self.down[experts])
        return torch.zeros_like(h).index_add(0, rows, y).unflatten(0, x.shape[:-1])


@pytest.mark.parametrize("order", ["by row", "by expert"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=str)
def test_experts_looked_up_for_each_row(shape, turned, order):
    run(Experts(turned, order), torch.randn(B, *shape, dtype=torch.float64))


def test_consecutive_experts_of_the_samples_are_scored():
    model = Uses(lambda x, w: torch.bmm(w[torch.arange(B)], x.unsqueeze(-1)).squeeze(-1), w=(B, 3, 4))
    scorer = SaliencyScorer(model, criterion="grad", reduction="sum")
    x = torch.randn(B, 4)
    with scorer:
        model(x).sum().backward()
    torch.testing.assert_close(scorer.scores()["w"], x.abs()[:, None].expand(B, 3, 4))


@pytest.mark.parametrize("fallback", [None, "loop"])
@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: torch.einsum("bi,eoi->beo", x, w[torch.tensor([0, 2])]),
        lambda x, w: torch.bmm(w[torch.tensor([0, 2])], x.T.expand(2, -1, -1)),
        lambda x, w: x @ w[torch.tensor([0, 2])].sum(0).T,
        lambda x, w: torch.bmm(w[torch.arange(2)], x.T.reshape(2, 4, 1)),
    ],
)
def test_experts_that_all_samples_share_are_refused(use, fallback):
    model, x = Uses(use, w=(3, 3, 4)), torch.randn(2, 4, requires_grad=True)
    scorer = SaliencyScorer(model, fallback=fallback)
    with scorer, pytest.raises(UnsupportedLayer, match="'w' is used as W\\[experts\\]"):
        model(x).sum().backward()


def test_per_sample_gradients_of_another_shape_are_refused():
    out, grad = torch.zeros(4), torch.empty(4)
    with pytest.raises(ValueError, match=r"must have the shape \(4,\) of the weight; got \(1, 4\)"):
        PerSample(torch.ones(B, 1, 4)).accumulate_(out, 1, None, 1.0, grad, "auto")


def test_indices_that_the_model_holds_are_not_samples():
    def use(x, w):
        indices = model.indices[None] if x.shape[1] == 2 else model.indices
        return x[:, :1] * functional.embedding(indices, w).sum(-1)

    model = Uses(use, w=(4, 3))
    model.register_buffer("indices", torch.arange(B).flip(0) % 4)
    with SaliencyScorer(model), pytest.raises(UnsupportedLayer, match="got 'indices' of the model"):
        model(torch.randn(B, 1))
    run(model, torch.randn(B, 2, dtype=torch.float64))  # as [1, T] they are looked up for every sample
