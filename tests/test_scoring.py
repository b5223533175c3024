"""SaliencyScorer equals one backward pass per sample, however the samples come, and leaves the model as it was."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cwfast import SaliencyScorer

N, F, C = 64, 5, 3
CRITERIA = ["taylor", "taylor_delta", "grad", "fisher"]


class Net(nn.Module):
    """A weight used by two layers, one layer applied twice, biases, and any number of middle dimensions."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.first, self.twice, self.tied, self.head = (
            nn.Linear(F, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, C),
        )
        self.tied.weight = self.twice.weight
        self.checkpointed = checkpointed

    def middle(self, x):
        return self.tied(self.twice(self.twice(x).tanh()).tanh()).tanh()

    def forward(self, x):
        x = self.first(x).tanh()
        x = checkpoint(self.middle, x, use_reentrant=False) if self.checkpointed else self.middle(x)
        return self.head(x)


def setup(*middle, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    net, start = Net().to(dtype), Net().to(dtype)
    return net, start, torch.randn(N, *middle, F, dtype=dtype), torch.randint(C, (N, *middle))


def losses(net, x, y):
    """[B]: each sample's own loss, summed over its tokens."""
    flat = functional.cross_entropy(net(x).reshape(-1, C), y.reshape(-1), reduction="none")
    return flat.reshape(len(x), -1).sum(dim=1)


def truth(net, start, x, y, criterion, weights=None):
    """One backward pass per sample, plain autograd."""
    parameters, initial = dict(net.named_parameters()), dict(start.named_parameters())
    scores = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i in range(len(x)):
        if weights is not None and weights[i] == 0:
            continue
        grads = torch.autograd.grad(losses(net, x[i : i + 1], y[i : i + 1]).sum(), list(parameters.values()))
        for (name, p), g in zip(parameters.items(), grads, strict=True):
            factor = {"taylor": p, "taylor_delta": p - initial[name]}.get(criterion, torch.ones_like(p))
            scores[name] += (g * factor).detach().abs() ** (2 if criterion == "fisher" else 1)
    return scores


def assert_equal(found, expected, rtol=1e-12):
    assert list(found) == list(expected)
    for name, value in expected.items():
        error = (found[name].double() - value.double()).abs().max()
        assert error <= rtol * value.abs().max() + 1e-300, f"{name}: {error}"


def scorer_for(net, start, criterion, **options):
    return SaliencyScorer(net, criterion=criterion, initial=start if criterion == "taylor_delta" else None, **options)


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("middle", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_equals_one_sample_at_a_time_in_any_batches(criterion, middle, size, backend):
    net, start, x, y = setup(*middle)
    scorer = scorer_for(net, start, criterion, reduction="sum", backend=backend)
    with scorer:
        for a, b in zip(x.split(size), y.split(size), strict=True):
            losses(net, a, b).sum().backward()
            scorer.step()
    assert scorer.samples == N
    assert_equal(scorer.scores(), truth(net, start, x, y, criterion))


@pytest.mark.parametrize("reduction", ["sum", "mean", "token_mean", "coefficients"])
@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_every_reduction_is_undone(criterion, reduction):
    net, start, x, y = setup(4)
    c = torch.linspace(-1, 2, N, dtype=torch.float64)
    c[::5] = 0
    scorer = scorer_for(net, start, criterion, reduction=c if reduction == "coefficients" else reduction)
    with scorer, scorer.batch(valid_targets=4 * N):
        each = losses(net, x, y)
        total = {"sum": each.sum(), "mean": each.mean(), "token_mean": each.sum() / (4 * N), "coefficients": each @ c}
        total[reduction].backward()
    weights = c if reduction == "coefficients" else None
    assert_equal(scorer.scores(), truth(net, start, x, y, criterion, weights), 1e-11)
    assert scorer.samples == N


@pytest.mark.parametrize("middle", [(), (4,)], ids=str)
def test_gradients_are_the_ordinary_ones_or_none(middle, backend):
    net, _, x, y = setup(*middle)
    losses(net, x, y).mean().backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters()}
    for grads in (True, False):
        net.zero_grad()
        with SaliencyScorer(net, grads=grads, backend=backend):
            losses(net, x, y).mean().backward()
        if grads:
            assert_equal({name: p.grad for name, p in net.named_parameters()}, expected)
        else:
            assert all(p.grad is None for p in net.parameters())


def test_input_gradients_are_the_ordinary_ones():
    net, _, x, y = setup(4)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    losses(net, a, y).sum().backward()
    with SaliencyScorer(net, grads=False):
        losses(net, b, y).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_factor_is_the_weight_of_that_backward(criterion):
    net, start, x, y = setup()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    expected = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    scorer = scorer_for(net, start, criterion)
    for a, b in zip(x.split(16), y.split(16), strict=True):
        for name, value in truth(net, start, a, b, criterion).items():
            expected[name] += value
        optimizer.zero_grad()
        with scorer:
            losses(net, a, b).mean().backward()
            optimizer.step()
    assert_equal(scorer.scores(), expected, 1e-11)


def test_changing_a_weight_behind_the_scorers_back_is_an_error():
    net, _, x, y = setup()
    scorer = SaliencyScorer(net)
    with scorer:
        losses(net, x, y).mean().backward()
        with torch.no_grad():
            net.first.weight.add_(1)
        with pytest.raises(RuntimeError, match=r"'first\.weight' was changed in place"):
            scorer.scores()
        scorer.reset()


def test_packed_sequences():
    net, start, _, _ = setup()
    lengths = torch.tensor([3, 0, 5, 1])
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    x, y = torch.randn(9, F, dtype=torch.float64), torch.randint(C, (9,))
    scorer = SaliencyScorer(net, reduction="sum")
    with scorer, scorer.batch(cu_seqlens=ends):
        functional.cross_entropy(net(x), y, reduction="sum").backward()
    expected = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for a, b in itertools.pairwise(ends):
        if b > a:
            for name, value in truth(net, start, x[None, a:b], y[None, a:b], "taylor").items():
                expected[name] += value
    assert_equal(scorer.scores(), expected)


def test_flattened_rows_are_regrouped_by_sample():
    net, start, x, y = setup(4)
    scorer = SaliencyScorer(net, reduction="sum")
    with scorer, scorer.batch(size=N):
        functional.cross_entropy(net(x.flatten(0, 1)), y.flatten(), reduction="sum").backward()
    assert_equal(scorer.scores(), truth(net, start, x, y, "taylor"))


def test_two_batches_in_one_backward_pass():
    net, start, x, y = setup()
    scorer = SaliencyScorer(net)
    with scorer:
        (losses(net, x[:20], y[:20]).mean() + losses(net, x[20:27], y[20:27]).mean()).backward()
    assert scorer.samples == 27
    assert_equal(scorer.scores(), truth(net, start, x[:27], y[:27], "taylor"))


def test_several_forward_passes_of_the_same_samples_sum_before_the_absolute_value():
    net, _, x, y = setup()
    scorer = SaliencyScorer(net, reduction="sum")
    with scorer, scorer.batch(size=N):
        (losses(net, x, y) + losses(net, -x, y)).sum().backward()
    expected = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for i in range(N):
        both = losses(net, x[i : i + 1], y[i : i + 1]) + losses(net, -x[i : i + 1], y[i : i + 1])
        grads = torch.autograd.grad(both.sum(), list(net.parameters()))
        for (name, p), g in zip(net.named_parameters(), grads, strict=True):
            expected[name] += (g * p).detach().abs()
    assert scorer.samples == N
    assert_equal(scorer.scores(), expected)


def test_activation_checkpointing_gives_the_same_scores():
    net, start, x, y = setup(4)
    scorer = SaliencyScorer(net, reduction="sum")
    expected = truth(net, start, x, y, "taylor")
    net.checkpointed = True
    with scorer:
        losses(net, x, y).sum().backward()
    assert_equal(scorer.scores(), expected)


def test_a_second_backward_pass_through_one_graph_counts_again():
    net, start, x, y = setup()
    scorer = SaliencyScorer(net, reduction="sum")
    with scorer:
        loss = losses(net, x, y).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_equal(scorer.scores(), {n: 2 * v for n, v in truth(net, start, x, y, "taylor").items()})


def test_a_dropped_graph_leaves_nothing_behind():
    net, start, x, y = setup()
    scorer = SaliencyScorer(net, reduction="sum")
    with scorer:
        losses(net, x, y)
        losses(net, x, y).sum().backward()
    assert_equal(scorer.scores(), truth(net, start, x, y, "taylor"))


def test_the_scale_of_a_grad_scaler_is_undone():
    net, start, x, y = setup()
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    scorer = SaliencyScorer(net, grad_scaler=scaler)
    with scorer:
        scaler.scale(losses(net, x, y).mean()).backward()
    assert_equal(scorer.scores(), truth(net, start, x, y, "taylor"), 1e-11)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_batch_granularity_takes_the_gradient_at_step(criterion):
    net, start, x, y = setup()
    scorer = scorer_for(net, start, criterion, granularity="batch")
    expected = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    initial = dict(start.named_parameters())
    for a, b in zip(x.split(16), y.split(16), strict=True):
        net.zero_grad()
        with scorer:
            losses(net, a, b).mean().backward()
            scorer.step()
        for name, p in net.named_parameters():
            factor = {"taylor": p, "taylor_delta": p - initial[name]}.get(criterion, torch.ones_like(p))
            expected[name] += (p.grad * factor).detach().abs() ** (2 if criterion == "fisher" else 1)
    assert scorer.samples == N
    assert_equal(scorer.scores(), expected)


def test_batch_granularity_scores_any_layer():
    net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 2))
    scorer = SaliencyScorer(net, granularity="batch", criterion="grad")
    with scorer:
        net(torch.randn(4, 1, 5)).square().sum().backward()
        scorer.step()
    assert_equal(scorer.scores(), {name: p.grad.abs() for name, p in net.named_parameters()})


def test_reading_a_parameter_is_no_use_of_it():
    net, start, x, y = setup()
    scorer = SaliencyScorer(net, reduction="sum")
    with scorer:
        _ = net.first.weight.shape, net.first.weight.detach().norm(), net.first.weight.data, net.first.weight.device
        with torch.no_grad():
            net(x)
        losses(net, x, y).sum().backward()
    assert_equal(scorer.scores(), truth(net, start, x, y, "taylor"))


def test_include_and_exclude_choose_parameters_and_the_others_still_train():
    net, start, x, y = setup()
    expected = truth(net, start, x, y, "taylor")
    losses(net, x, y).sum().backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    scorer = SaliencyScorer(net, reduction="sum", include=["*.weight"], exclude=["head*"])
    with scorer:
        losses(net, x, y).sum().backward()
    assert_equal(scorer.scores(), {name: expected[name] for name in ("first.weight", "twice.weight")})
    assert_equal({name: p.grad for name, p in net.named_parameters()}, grads)


def test_frozen_parameters_are_not_scored():
    net, _, x, y = setup()
    net.first.requires_grad_(False)
    scorer = SaliencyScorer(net)
    with scorer:
        losses(net, x, y).mean().backward()
    assert not any(name.startswith("first") for name in scorer.scores())


def test_scores_are_live_and_reset_forgets():
    net, _, x, y = setup()
    scorer = SaliencyScorer(net)
    with scorer:
        losses(net, x, y).mean().backward()
    first = scorer.scores()["first.weight"]
    before = first.clone()
    with scorer:
        losses(net, x, y).mean().backward()
    torch.testing.assert_close(scorer.scores()["first.weight"], 2 * before)
    assert scorer.scores()["first.weight"].data_ptr() == first.data_ptr()
    scorer.reset()
    assert scorer.samples == 0
    assert not any(score.any() for score in scorer.scores().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precisions_accumulate_in_float32(dtype):
    net, start, x, y = setup(4, dtype=dtype)
    scorer = SaliencyScorer(net, reduction="sum")
    with scorer:
        functional.cross_entropy(net(x).flatten(0, 1).float(), y.flatten(), reduction="sum").backward()
    double = copy.deepcopy(net).double()
    expected = truth(double, start, x.double(), y, "taylor")
    assert all(score.dtype == torch.float32 for score in scorer.scores().values())
    assert_equal(scorer.scores(), expected, 1e-4 if dtype == torch.float32 else 0.05)


def test_plain_parameters_need_no_sums_beside_their_scores(monkeypatch):
    model = torch.nn.Linear(3, 2)
    scorer = SaliencyScorer(model)
    monkeypatch.setattr(scorer, "_sums", lambda *_: pytest.fail("made for sharded parameters alone"))
    with scorer:
        model(torch.randn(4, 3)).square().sum().backward()
    assert model.weight.grad.any()
    assert scorer.scores()["weight"].any()
