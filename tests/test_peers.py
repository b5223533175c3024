"""The same numbers as the libraries people come from: Opacus, BackPACK and torch.func, each called as it documents.

This file is also the recipe: what each peer call becomes with ``SaliencyScorer``.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from cwfast import SaliencyScorer
from cwfast.testing import assert_no_worse

B, F, C = 9, 12, 4
MLP = {"mlp": lambda: nn.Sequential(nn.Linear(F, 8), nn.ReLU(), nn.Linear(8, C))}
SEQUENCES = {"sequences": lambda: nn.Sequential(nn.Linear(F, 8), nn.Tanh(), nn.Linear(8, C), Mean())}


class Mean(nn.Module):
    """The mean over the steps of a sequence."""

    def forward(self, x):
        return x.mean(dim=1)


def case(make, steps=()):
    torch.manual_seed(0)
    return make().double(), torch.randn(B, *steps, F, dtype=torch.float64), torch.randint(C, (B,))


def scores(model, x, y, criterion, reduction="mean"):
    """Ours: the ordinary training step, with the scorer around it."""
    scorer = SaliencyScorer(model, criterion=criterion, reduction=reduction)
    with scorer:
        functional.cross_entropy(model(x), y, reduction=reduction).backward()
    return scorer.scores()


def agree(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-10, atol=1e-12)


def per_sample_by_vmap(model, x, y):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, y):
        return functional.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    return vmap(grad(loss), (None, 0, 0))(parameters, x, y)


CASES = [pytest.param(make, (), id=name) for name, make in MLP.items()]
CASES += [pytest.param(make, (5,), id=name) for name, make in SEQUENCES.items()]


@pytest.mark.parametrize(("make", "steps"), CASES)
def test_vmap_of_grad(make, steps):
    model, x, y = case(make, steps)
    each = per_sample_by_vmap(model, x, y)
    weights = dict(model.named_parameters())
    agree(scores(model, x, y, "taylor"), {n: (g * weights[n]).abs().sum(0).detach() for n, g in each.items()})
    agree(scores(model, x, y, "grad"), {n: g.abs().sum(0) for n, g in each.items()})


@pytest.mark.parametrize(("make", "steps"), CASES)
def test_empirical_fisher_diagonal(make, steps):
    """The empirical Fisher's diagonal is the mean over samples of the squared gradient of each sample's loss."""
    model, x, y = case(make, steps)
    fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(B):
        model.zero_grad()
        functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        for name, p in model.named_parameters():
            fisher[name] += p.grad**2 / B
    agree({name: value / B for name, value in scores(model, x, y, "fisher").items()}, fisher)


@pytest.mark.parametrize(("make", "steps"), CASES)
def test_opacus_per_sample_gradients(make, steps):
    opacus = pytest.importorskip("opacus", reason="pip install opacus")
    model, x, y = case(make, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus' own hooks warn
        wrapped = opacus.GradSampleModule(copy.deepcopy(model), loss_reduction="mean")
        functional.cross_entropy(wrapped(x), y).backward()
    theirs = {
        name.removeprefix("_module."): (p.grad_sample * p).abs().sum(0).detach()
        for name, p in wrapped.named_parameters()
    }
    agree(scores(model, x, y, "taylor"), theirs)


def test_backpack_sum_grad_squared():
    backpack = pytest.importorskip("backpack", reason="pip install backpack-for-pytorch")
    from backpack.extensions import SumGradSquared

    model, x, y = case(MLP["mlp"])
    ours = scores(model, x, y, "fisher", reduction="sum")
    extended = backpack.extend(copy.deepcopy(model))
    loss = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    with warnings.catch_warnings(), backpack.backpack(SumGradSquared()):
        warnings.simplefilter("ignore")  # its hooks on a model whose input needs no gradient
        loss(extended(x), y).backward()
    agree(ours, {name: p.sum_grad_squared for name, p in extended.named_parameters()})


def test_float32_is_no_worse_than_vmap():
    model, x, y = case(MLP["mlp"])
    truth = {n: g.abs().sum(0) for n, g in per_sample_by_vmap(model, x, y).items()}
    model, x = model.float(), x.float()
    theirs = {n: g.abs().sum(0) for n, g in per_sample_by_vmap(model, x, y).items()}
    for name, value in scores(model, x, y, "grad").items():
        assert_no_worse(value, truth[name], theirs[name])
