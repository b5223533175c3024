"""What SaliencyScorer refuses, by name of the parameter, and that the model is left as it was."""

import contextlib
import copy

import pytest
import torch
from test_scoring import F, N, Net, losses, setup
from torch import nn
from torch.nn import functional

from cwfast import SaliencyScorer
from cwfast.errors import UnsupportedLayer


def leaves_as_it_was(net, before):
    assert all(type(p) is nn.Parameter for p in net.parameters())
    assert list(net.state_dict()) == before


def test_the_model_is_left_as_it_was_also_after_an_error():
    net, _, x, y = setup()
    before = list(net.state_dict())
    with SaliencyScorer(net):
        assert isinstance(net.first.weight, nn.Parameter)
        assert list(net.state_dict()) == before
        copied = copy.deepcopy(net)
        losses(net, x, y).mean().backward()
    leaves_as_it_was(net, before)
    leaves_as_it_was(copied, before)
    with contextlib.suppress(ZeroDivisionError), SaliencyScorer(net):
        losses(net, x, y)
        raise ZeroDivisionError
    leaves_as_it_was(net, before)
    assert not net._forward_pre_hooks


def test_one_scorer_at_a_time():
    net, _, _, _ = setup()
    with SaliencyScorer(net), pytest.raises(RuntimeError, match="one scorer at a time"), SaliencyScorer(net):
        pass
    assert type(net.first.weight) is nn.Parameter


class Odd(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(F, F)), use

    def forward(self, x):
        return self.use(x, self.weight)


@pytest.mark.parametrize(
    "model",
    [
        Odd(lambda x, w: functional.linear(x, 2 * w)),
        Odd(lambda x, w: functional.linear(x, w * w)),
        Odd(lambda x, w: functional.linear(x, w * torch.ones(F, F))),
        Odd(lambda x, w: functional.linear(x, w.expand(2, F, F)[0])),
        Odd(lambda x, w: torch.einsum("bi,oi->b", x, w)),
        Odd(lambda x, w: functional.bilinear(x, x, w[None])),
        nn.LSTM(F, 3),
    ],
    ids=["scaled", "squared", "masked", "expanded", "einsum", "bilinear", "lstm"],
)
def test_a_use_without_a_rule_names_the_parameter(model):
    name = next(name for name, _ in model.named_parameters())
    with SaliencyScorer(model), pytest.raises(UnsupportedLayer, match=name):
        model(torch.randn(4, F))
    assert all(type(p) is nn.Parameter for p in model.parameters())


@pytest.mark.parametrize(
    ("shape", "size"), [((4, N, F), N), ((N + 1, F), N), ((F,), 1)], ids=["time first", "other number", "no samples"]
)
def test_rows_that_are_no_samples_are_refused(shape, size):
    net, _, _, _ = setup()
    scorer = SaliencyScorer(net)
    with pytest.raises(ValueError, match=r"leading dimension at the layer of 'head"), scorer, scorer.batch(size=size):
        net(torch.randn(*shape, dtype=torch.float64)).sum().backward()


def test_the_number_of_samples_must_be_known():
    net, _, x, _ = setup()
    with pytest.raises(ValueError, match="number of samples must be known"), SaliencyScorer(net):
        net.first(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "magic"}, "criterion must be one of"),
        ({"granularity": "token"}, "granularity must be one of"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"criterion": "taylor_delta"}, "initial must be given"),
        ({"granularity": "batch", "grads": False}, "grads=True"),
        ({"include": ["nothing*"]}, "must have a parameter to score"),
        ({"criterion": "taylor_delta", "initial": {}}, "'first.weight'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        SaliencyScorer(Net(), **options)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_string_is_no_sequence_of_patterns(argument):
    with pytest.raises(TypeError, match=rf"{argument} must be a sequence of patterns, such as \['0\.bias'\]"):
        SaliencyScorer(nn.Sequential(nn.Linear(2, 2)), **{argument: "0.bias"})


def test_batch_granularity_without_a_step_is_an_error_not_zeros():
    model = nn.Linear(3, 2)
    scorer = SaliencyScorer(model, granularity="batch")
    with scorer:
        model(torch.randn(4, 3)).sum().backward()
        with pytest.raises(RuntimeError, match=r"adds at scorer\.step"):
            scorer.scores()
        scorer.step()
    assert scorer.scores()["weight"].any()
