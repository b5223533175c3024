"""Layer rules inside real training code: autocast, a GradScaler, accumulation, packed samples, excluded parameters."""

import copy

import pytest
import torch
from layer_truth import assert_equal, check, truth
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cwfast import SaliencyScorer
from cwfast.layers import PerSample, places, register, scored

B, T, V, D = 6, 7, 11, 8


class Block(nn.Module):
    """One of every kind of layer, for tokens [B, T]."""

    def __init__(self):
        super().__init__()
        self.tokens, self.place = nn.Embedding(V, D), nn.Parameter(torch.randn(1, T, D))
        self.norm, self.attend = nn.LayerNorm(D), nn.MultiheadAttention(D, 2, batch_first=True)
        self.conv, self.scale = nn.Conv1d(D, D, 3, padding=1, groups=2), nn.Parameter(torch.randn(D))
        self.rms, self.head = nn.RMSNorm(D), nn.Linear(D, V)

    def forward(self, x):
        h = self.tokens(x) + self.place
        n = self.norm(h)
        h = h + self.attend(n, n, n, need_weights=False)[0]
        h = h + self.conv(h.transpose(1, 2)).transpose(1, 2) * self.scale
        return self.head(self.rms(h))


def losses(model):
    def run(x):
        return functional.cross_entropy(model(x).float().transpose(1, 2), x, reduction="none").sum(dim=1)

    return run


def double_losses(model):
    def run(x):
        return functional.cross_entropy(model(x).transpose(1, 2), x, reduction="none").sum(dim=1)

    return run


@pytest.fixture
def block():
    torch.manual_seed(1)
    model = Block()
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model


def test_everything_at_once(block):
    model = block.double()
    check(model, double_losses(model), [torch.randint(V, (B, T))])


def test_autocast_forward_is_the_ordinary_one_and_scores_are_near(block):
    x = torch.randint(V, (B, T))
    with torch.autocast("cpu", torch.bfloat16):
        expected = losses(block)(x)
    expected.sum().backward()
    plain = {name: p.grad.clone() for name, p in block.named_parameters()}
    block.zero_grad()
    scorer = SaliencyScorer(block, reduction="sum")
    with scorer:
        with torch.autocast("cpu", torch.bfloat16):
            found = losses(block)(x)
        found.sum().backward()
    assert torch.equal(found, expected)
    double = copy.deepcopy(block).double()
    scores, _, gradient = truth(double, double_losses(double), [x])
    assert all(score.dtype == torch.float32 for score in scorer.scores().values())
    for name, p in block.named_parameters():
        # Not further from the truth than three times what autocast itself does to the ordinary gradient.
        own = (plain[name] - gradient[name]).norm() / gradient[name].norm()
        assert (p.grad - gradient[name]).norm() / gradient[name].norm() <= 3 * own + 1e-3, name
        assert (scorer.scores()[name] - scores[name]).norm() / scores[name].norm() <= 3 * own + 2e-2, name


def test_a_grad_scaler_and_accumulated_gradients(block):
    model = block.double()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    batches = [torch.randint(V, (n, T)) for n in (4, 1, 3)]
    scores, norms, _ = truth(model, double_losses(model), [torch.cat(batches)])
    scorer = SaliencyScorer(model, grad_scaler=scaler, norms=True)
    with scorer:
        for x in batches:
            scaler.scale(double_losses(model)(x).mean()).backward()
    assert_equal(scorer.scores(), scores)
    assert_equal({"norms": scorer.norms()}, {"norms": norms})
    scorer.reset()
    assert scorer.norms().numel() == 0


def test_coefficients_reach_every_kind_of_layer(block):
    model = block.double()
    x, c = torch.randint(V, (B, T)), torch.linspace(-1, 2, B, dtype=torch.float64)
    c[2] = 0
    scores, norms, _ = truth(model, double_losses(model), [x[c != 0]])
    scorer = SaliencyScorer(model, reduction=c, norms=True)
    with scorer:
        (double_losses(model)(x) @ c).backward()
    assert_equal(scorer.scores(), scores, 1e-9)
    assert_equal({"norms": scorer.norms()[c != 0]}, {"norms": norms})
    assert scorer.norms()[2] == 0


class Packed(nn.Module):
    def __init__(self, vocabulary=V):
        super().__init__()
        self.tokens, self.norm, self.scale = nn.Embedding(vocabulary, D), nn.LayerNorm(D), nn.Parameter(torch.randn(D))

    def forward(self, x):
        return functional.linear(self.norm(self.tokens(x)) * self.scale, self.tokens.weight)


def test_packed_samples_in_norms_and_embeddings():
    model = Packed().double()
    lengths = [3, 1, 5]
    x = torch.randint(V, (sum(lengths),))
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for part in x.split(lengths):
        for name, score in truth(model, double_losses_flat(model), [part[None]])[0].items():
            expected[name] += score
    scorer = SaliencyScorer(model, reduction="sum")
    with scorer, scorer.batch(cu_seqlens=torch.tensor([0, 3, 4, 9])):
        functional.cross_entropy(model(x), x, reduction="sum").backward()
    assert_equal(scorer.scores(), expected)


def double_losses_flat(model):
    return lambda x: functional.cross_entropy(model(x[0]), x[0], reduction="none").sum()[None]


@pytest.mark.parametrize("tile", [1, 3 * D, 4 * D + 1, 1 << 20])
def test_a_tied_weight_is_scored_by_tiles_of_any_size(tile, monkeypatch):
    monkeypatch.setattr(places, "TILE", tile)
    model = Packed()
    model.tokens.padding_idx = 4
    model = model.double()
    check(model, double_losses(model), [torch.randint(V, (B, T))])


@pytest.mark.parametrize("excluded", ["*.bias", "*.weight", "tokens*", "attend*"])
def test_excluded_parameters_get_their_ordinary_gradient(block, excluded):
    model = block.double()
    x = torch.randint(V, (B, T))
    scores, _, gradient = truth(model, double_losses(model), [x])
    scorer = SaliencyScorer(model, reduction="sum", exclude=[excluded])
    with scorer:
        double_losses(model)(x).sum().backward()
    assert_equal({name: p.grad for name, p in model.named_parameters()}, gradient)
    assert_equal(scorer.scores(), {name: scores[name] for name in scorer.scores()})
    assert 0 < len(scorer.scores()) < len(scores)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's, at graph breaks
@pytest.mark.parametrize("earlier", [False, True], ids=["compiled inside", "compiled before"])
def test_a_compiled_model_gives_the_same_scores(block, earlier):
    model = block.double()
    x = torch.randint(V, (B, T))
    scores, _, gradient = truth(model, double_losses(model), [x])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    if earlier:
        double_losses(compiled)(x).sum().backward()
        model.zero_grad()
    scorer = SaliencyScorer(model, reduction="sum")
    with scorer, scorer.batch(size=B):
        double_losses(compiled)(x).sum().backward()
    assert_equal(scorer.scores(), scores)
    assert_equal({name: p.grad for name, p in model.named_parameters()}, gradient)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.entries = max([self.entries, *(x.untyped_storage().nbytes() // x.element_size() for x in made)])
        return result


MANY = {
    "conv": (lambda: nn.Conv2d(128, 128, 3), lambda: torch.randn(16, 128, 3, 3)),  # smaller ones share a chunk
    "linear": (lambda: nn.Linear(160, 160), lambda: torch.randn(16, 4, 160)),
    "embedding": (lambda: nn.Embedding(2000, 16), lambda: torch.randint(2000, (16, 9))),
    "tied": (lambda: Packed(2000), lambda: torch.randint(2000, (16, 1))),
}


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("case", MANY, ids=str)
def test_no_tensor_is_as_large_as_batch_times_weights(case, norms):
    make, data = MANY[case]
    model, x = make(), data()
    weights = max(p.numel() for p in model.parameters())
    scorer = SaliencyScorer(model, norms=norms)
    with scorer:
        loss = model(x).square().mean()
        largest = Largest()
        with largest:
            loss.backward()
    assert scorer.scores()
    assert weights <= largest.entries <= 2 * weights


def gate(x, weight):
    if torch.overrides.has_torch_function((x, weight)):
        return torch.overrides.handle_torch_function(gate, (x, weight), x, weight)
    return x * weight.sigmoid()


@register(gate)
def gate_rule(tracker, x, weight):
    def gradient(layout, x, grad, weight):
        s = weight.sigmoid()
        return PerSample(layout.sums(grad * x * s * (1 - s)))

    return scored(tracker, gate, x, (weight,), (gradient,))


def test_a_rule_for_a_layer_of_ones_own():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(D, dtype=torch.float64))

        def forward(self, x):
            return gate(x, self.weight)

    model = Gate()
    x = torch.randn(B, T, D, dtype=torch.float64)

    def own(x):
        return model(x).sin().sum(dim=(1, 2))

    scores, _, gradient = truth(model, own, [x])
    scorer = SaliencyScorer(model, reduction="sum")
    with scorer:
        own(x).sum().backward()
    assert_equal(scorer.scores(), scores)
    assert_equal({"weight": model.weight.grad}, gradient)
