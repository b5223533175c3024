"""fallback="loop": what no rule scores equals one sample at a time in float64, or is refused."""

import pytest
import torch
from layer_truth import assert_equal, check, truth
from test_layers_rules import B, Uses, randomized, squares
from torch import nn
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import checkpoint

from cwfast import SaliencyScorer
from cwfast.errors import UnsupportedLayer


def run(model, *inputs, **options):
    model = randomized(model)
    check(model, squares(model), inputs, fallback="loop", **options)


def data(*shape):
    return torch.randn(B, *shape, dtype=torch.float64)


class Recurrent(nn.Module):
    """A recurrent layer between linear ones, so that its input gradient is checked as well."""

    def __init__(self, kind, steps_first=False, state=False, **options):
        super().__init__()
        self.first, self.steps_first, self.state = nn.Linear(4, 4), steps_first, state
        self.inner = kind(4, 6, batch_first=not steps_first, **options)
        self.last = nn.Linear(6 * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, x):
        h = self.first(x)
        h0 = None
        if self.state:
            h0 = self.first(x[:, 0]).repeat(self.inner.num_layers, 1, 2)[..., :6].cos()
            h0 = (h0, h0.sin()) if isinstance(self.inner, nn.LSTM) else h0
        y, end = self.inner(h.transpose(0, 1) if self.steps_first else h, h0)
        end = end[0] if isinstance(end, tuple) else end
        y = y.transpose(0, 1) if self.steps_first else y
        return self.last(y).flatten(1) + end.mean(dim=(0, 2))[:, None]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps_first": True, "num_layers": 2},
        {"bidirectional": True},
        {"state": True, "num_layers": 2},
        {"state": True, "steps_first": True, "bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [7, B])
def test_recurrent_layers(kind, options, steps):
    run(Recurrent(kind, **options), data(steps, 4))


def test_a_projected_lstm():
    run(nn.LSTM(4, 6, proj_size=3, batch_first=True), data(3, 4))


def test_cells_sum_their_uses_over_time():
    cell = nn.GRUCell(4, 6)

    def use(x, **_):
        h = x.new_zeros(len(x), 6)
        for t in range(x.shape[1]):
            h = cell(x[:, t], h)
        return h

    model = Uses(use)
    model.cell = cell
    run(model, data(3, 4))


class Pair(nn.Module):
    def __init__(self, twice=False):
        super().__init__()
        self.first, self.pair, self.twice = nn.Linear(3, 3), nn.Bilinear(3, 4, 5), twice

    def forward(self, x, y):
        x = self.first(x)
        found = self.pair(x, y)
        return found + self.pair(x.sin(), y.cos()) if self.twice else found


@pytest.mark.parametrize("shape", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("twice", [False, True])
def test_bilinear_layers(twice, shape):
    run(Pair(twice), data(*shape, 3), data(*shape, 4))


def distance(x, w):
    """A user's function that is called through torch.overrides."""
    if has_torch_function((x, w)):
        return handle_torch_function(distance, (x, w), x, w)
    return torch.cdist(x, w) + (x @ w.T).exp().mean(dim=-1, keepdim=True)


CALLS = {
    "custom": (distance, {"w": (3, 4)}),
    "difference": (lambda x, w: (x - w) / (2 + w.expand_as(x).cos()), {"w": (4,)}),
    "power": (lambda x, w: torch.pow(2 + x.cos(), w), {"w": (4,)}),
    "prelu": (functional.prelu, {"weight": (1,)}),
    "view": (lambda x, w: functional.relu_(torch.sub(x, w[1])), {"w": (2, 4)}),
    "with a rule as well": (lambda x, w: functional.linear(x, w) + torch.cdist(x, w), {"w": (3, 4)}),
    "keywords": (lambda x, w: torch.sub(input=x, other=w, alpha=2).sin(), {"w": (4,)}),
    "untracked": (lambda x, w: torch.addcmul(torch.ones(4, dtype=x.dtype), x, w), {"w": (4,)}),
    "instance norm": (
        lambda x, w, b: functional.instance_norm(x.unflatten(-1, (2, 2)), None, None, w, b),
        {"w": (2,), "b": (2,)},
    ),
}


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_other_calls(case):
    use, shapes = CALLS[case]
    run(Uses(use, **shapes), data(4) if case != "instance norm" else data(2, 4))


def test_losses_with_coefficients_and_excluded_parameters():
    model, x = randomized(Recurrent(nn.LSTM)), data(3, 4)
    c = torch.tensor([0.5, 0, -1, 2, 1], dtype=torch.float64)
    scores, _, _ = truth(model, squares(model), [x[c != 0]])
    total = torch.autograd.grad((squares(model)(x) * c).sum(), list(model.parameters()))
    scorer = SaliencyScorer(model, reduction=c, fallback="loop", exclude=["inner.bias*", "first*"])
    with scorer:
        (squares(model)(x) * c).sum().backward()
    kept = {name: score for name, score in scores.items() if not name.startswith(("inner.bias", "first"))}
    assert_equal(scorer.scores(), kept)
    for p, expected in zip(model.parameters(), total, strict=True):
        torch.testing.assert_close(p.grad, expected)


def test_checkpointed_activations():
    pair = Pair()

    def forward(x, y):
        return checkpoint(pair, x, y, use_reentrant=False)

    model = Uses(lambda x, y, **_: forward(x, y))
    model.pair = pair
    run(model, data(3), data(4))


def test_autocast():
    model, x = Uses(lambda x, w: torch.tensordot(x, w, 1), w=(4, 3)), torch.randn(B, 2, 4)
    expected = torch.zeros(4, 3)
    for one in x:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(one[None])
        expected += (torch.autograd.grad(y.float().sin().sum(), model.w)[0] * model.w).abs().detach()
    scorer = SaliencyScorer(model, reduction="sum", fallback="loop")
    with scorer, torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16
        y.float().sin().sum().backward()
    assert_equal(scorer.scores(), {"w": expected}, rtol=0.02)


def test_only_one_sample_at_a_time_is_in_memory(monkeypatch):
    model = nn.Bilinear(20, 20, 30).double()
    x = torch.randn(50, 20, dtype=torch.float64)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.append(
                max((t.numel() for t in torch.utils._pytree.tree_leaves(out) if hasattr(t, "numel")), default=0)
            )
            return out

    scorer = SaliencyScorer(model, fallback="loop")
    with scorer:
        loss = model(x, x).sum()
        with Watch():
            loss.backward()
    assert max(largest) < 3 * model.weight.numel()


def centred(x, w):
    if has_torch_function((x, w)):
        return handle_torch_function(centred, (x, w), x, w)
    return (x - x.mean(dim=0)) * w


REFUSED = {
    "dropout": (lambda: nn.LSTM(4, 6, num_layers=2, dropout=0.5, batch_first=True), "no randomness"),
    "no samples": (lambda: Uses(lambda x, w: x @ w.softmax(0), w=(4, 4)), "no tensor in it has the 5 samples"),
    "in place": (lambda: Uses(lambda x, w: x.clone().mul_(2).sub_(w), w=(4,)), "changes a tensor in place"),
    "joined": (lambda: Uses(lambda x, w: torch.cat([x, w], 0), w=(1, 3, 4)), "a result must have"),
    "batch statistics": (lambda: Uses(lambda x, w: centred(x, w), w=(4,)), "no statistics of the batch"),
    "other order": (
        lambda: Uses(lambda x, v, w: (x[:, 0] * v)[torch.tensor([1, 0, 2, 3, 4])] - w, v=(4,), w=(4,)),
        "not in the order of the samples",
    ),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_cannot_be_looped_is_refused(case):
    make, message = REFUSED[case]
    model = make()

    def step():
        y = model(torch.randn(B, 3, 4))
        (y[0] if isinstance(y, tuple) else y).sum().backward()

    with SaliencyScorer(model, fallback="loop"), pytest.raises(UnsupportedLayer, match=message):
        step()


def lookalike(kind, use):
    """A model with a tensor of its own whose first dimension could be taken for the samples."""
    model = Uses(lambda x, w, **_: use(x, model.table, w), w=(4,))
    table = torch.randn(B, 4)
    if kind == "buffer":
        model.register_buffer("table", table)
    else:
        model.table = nn.Parameter(table)
    return model


SHARED = {
    "loop": lambda x, table, w: x @ torch.sub(table, w).sin().T,
    "add": lambda x, table, w: x @ (table + w).T,
    "add view": lambda x, table, w: x @ (w + table[:, :]).sin().T,
    "mul": lambda x, table, w: x @ (table * w).T,
}


@pytest.mark.parametrize("fallback", [None, "loop"])
@pytest.mark.parametrize("kind", ["buffer", "excluded parameter"])
@pytest.mark.parametrize("case", ["loop", "add", "add view", "mul"])
def test_the_models_own_tensors_are_not_samples(case, kind, fallback):
    model = lookalike(kind, SHARED[case])
    message = "'w'.*model's 'table'" if fallback else "'w'"
    scorer = SaliencyScorer(model, fallback=fallback, exclude=["table"])
    with scorer, pytest.raises(UnsupportedLayer, match=message):
        model(torch.randn(B, 4))


@pytest.mark.parametrize("kind", ["buffer", "excluded parameter"])
def test_a_layer_of_the_models_own_tensor_is_refused(kind):
    model = lookalike(kind, lambda x, table, w: x @ (table @ w.view(4, 1)))
    with SaliencyScorer(model, exclude=["table"]), pytest.raises(UnsupportedLayer, match="got 'table' of the model"):
        model(torch.randn(B, B))


@pytest.mark.parametrize("kind", ["buffer", "excluded parameter"])
def test_the_models_own_tensors_are_shared_where_others_carry_the_samples(kind):
    def use(x, table, w):
        return torch.einsum("btd,td->btd", x, table) * torch.addcmul(x, table, w, value=0.5).sin()

    model = randomized(lookalike(kind, use))
    check_kept(model, data(B, 4))


def check_kept(model, x):
    scores, _, _ = truth(model, squares(model), [x])
    scorer = SaliencyScorer(model, reduction="sum", fallback="loop", exclude=["table"])
    with scorer:
        squares(model)(x).sum().backward()
    assert_equal(scorer.scores(), {"w": scores["w"]})


def test_a_recurrent_state_of_the_model_is_refused():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.GRU(4, 6, batch_first=True)
            self.register_buffer("state", torch.zeros(1, B, 6))

        def forward(self, x):
            return self.inner(x, self.state)[0]

    model = Stateful()
    with SaliencyScorer(model, fallback="loop"), pytest.raises(UnsupportedLayer, match="state is 'state' of the model"):
        model(torch.randn(B, 3, 4))


def blind(x, w, other):
    if has_torch_function((x, w)):
        return handle_torch_function(blind, (x, w), x, w, other)
    return x + w * other(x)


@pytest.mark.parametrize("grads", [True, False])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("other", [lambda x: x - x.mean(0), lambda x: functional.dropout(x, 0.5)])
def test_gradients_are_checked_where_results_cannot_tell(other, twice, grads):
    def use(x, w):
        y = blind(x, w, other)
        return y + blind(x, w, torch.sin) if twice else y

    model = Uses(use, w=(4,))
    nn.init.zeros_(model.w)
    scorer = SaliencyScorer(model, criterion="grad", fallback="loop", grads=grads)
    with scorer, pytest.raises(UnsupportedLayer, match="gradients must sum to that of the batch"):
        model(torch.randn(B, 4)).square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_are_only_rounding_pass_the_check(dtype):
    model = Uses(lambda x, w: torch.sub(x, w).softmax(-1), w=(1,)).to(dtype)

    def call(x, w):
        if has_torch_function((x, w)):
            return handle_torch_function(call, (x, w), x, w)
        return (x - w).softmax(-1)

    model.use = call
    scorer = SaliencyScorer(model, fallback="loop")
    with scorer:
        (model(torch.randn(B, 400, dtype=dtype)) * torch.randn(400, dtype=dtype)).float().sum().backward()
    assert scorer.scores()["w"].abs().max() < 0.1


def test_a_result_that_is_another_when_run_again_is_refused():
    calls = []

    def drifting(x, w):
        if has_torch_function((x, w)):
            return handle_torch_function(drifting, (x, w), x, w)
        calls.append(x)
        return x * w + (len(calls) == 1)

    model = Uses(lambda x, w: drifting(x, w), w=(4,))
    with SaliencyScorer(model, fallback="loop"), pytest.raises(UnsupportedLayer, match="the same when it is run again"):
        model(torch.randn(B, 4)).sum().backward()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_results_that_are_not_finite_keep_the_check(value):
    def tainted(x, w):
        if has_torch_function((x, w)):
            return handle_torch_function(tainted, (x, w), x, w)
        return torch.cat([x + w.detach() * 0, (x - x.mean(dim=0)) * w], dim=1)

    model, x = Uses(lambda x, w: tainted(x, w), w=(4,)), torch.randn(B, 4)
    x = torch.cat([x[:, :3], torch.full((B, 1), value)], dim=1)
    with SaliencyScorer(model, fallback="loop"), pytest.raises(UnsupportedLayer, match="no statistics of the batch"):
        model(x).sum().backward()


def test_infinite_results_that_agree_are_accepted():
    model = Uses(lambda x, w: torch.sub(x, w), w=(4,))
    x = torch.randn(B, 4)
    x[1, 2] = torch.inf
    scorer = SaliencyScorer(model, criterion="grad", reduction="sum", fallback="loop")
    with scorer:
        model(x).sum().backward()
    assert_equal(scorer.scores(), {"w": torch.full((4,), float(B))})


def test_parameters_of_a_call_are_summed_in_their_own_precision():
    def mixed(x, w, v):
        if has_torch_function((x, w, v)):
            return handle_torch_function(mixed, (x, w, v), x, w, v)
        return x * v + (x * w).double()

    model = Uses(lambda x, w, v: mixed(x, w, v), w=(4,), v=(4,))
    model.v.data = model.v.data.double()
    x = torch.rand(B, 4)
    scorer = SaliencyScorer(model, criterion="grad", reduction="sum", fallback="loop")
    with scorer:
        model(x).sum().backward()
    found = scorer.scores()
    assert_equal({"v": found["v"]}, {"v": x.double().sum(0)}, rtol=1e-15)
    assert_equal({"w": found["w"]}, {"w": x.double().sum(0)}, rtol=1e-6)


def test_without_gradients_none_is_kept():
    kept = []
    model = nn.Bilinear(3, 4, 5)
    scorer = SaliencyScorer(model, fallback="loop", grads=False)
    record = scorer.record

    def spy(use, piece):
        kept.append(piece.gradient)
        return record(use, piece)

    scorer.record = spy
    with scorer:
        model(torch.randn(B, 3), torch.randn(B, 4)).sum().backward()
    assert kept == [None, None]


def test_packed_sequences_are_refused():
    model = nn.GRU(4, 6)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(3, B, 4), torch.tensor([3, 3, 2, 1, 1]))
    scorer = SaliencyScorer(model, fallback="loop")
    with scorer, scorer.batch(size=B), pytest.raises(UnsupportedLayer, match="give padded ones"):
        model(packed)


def test_without_the_fallback_the_message_names_it():
    with SaliencyScorer(nn.Bilinear(3, 4, 5)) as scorer, pytest.raises(UnsupportedLayer, match="fallback='loop'"):
        scorer._model(torch.randn(B, 3), torch.randn(B, 4))


def test_the_name_of_a_fallback_is_checked():
    with pytest.raises(ValueError, match="fallback must be None or 'loop'; got 'lop'"):
        SaliencyScorer(nn.Linear(2, 2), fallback="lop")


def test_tensors_of_inference_mode_are_refused():
    model = Uses(lambda x, w: torch.sub(x, w), w=(4,))
    with torch.inference_mode():
        x = torch.randn(B, 4)
    with SaliencyScorer(model, fallback="loop"), pytest.raises(UnsupportedLayer, match="made in inference mode"):
        model(x)


@pytest.mark.parametrize("grads", [True, False])
def test_coefficients_reach_the_total_of_a_looped_piece(grads):
    model, x = Uses(lambda x, w: torch.sub(x, w).square(), w=(4,)), data(4)
    model, pieces = model.double(), []
    scorer = SaliencyScorer(model, fallback="loop", grads=grads)
    record = scorer.record
    scorer.record = lambda use, piece: (pieces.append(piece), record(use, piece))[1]
    with scorer:
        model(x).sum().backward()
    gradients = -2 * (x - model.w.detach())
    c = torch.tensor([2.0, 0, -1, 3, 1], dtype=torch.float64)
    found = pieces[0].scaled(c).scaled(c).total((4,), torch.float64, x.device)
    torch.testing.assert_close(found, (gradients * (c * c)[:, None]).sum(0))
