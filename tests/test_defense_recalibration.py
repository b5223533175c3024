"""BatchNorm's statistics: whose they are when a model is scored, interpolated or measured again."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from test_defense_variants import batchnorm_task
from torch import nn
from torch.nn import functional

from cwfast.data import Batches
from cwfast.defense import PlainTraining, recalibrate_, vulnerability
from cwfast.defense.baselines import interpolate_many, interpolated

pytestmark = pytest.mark.filterwarnings("ignore:BatchNorm in training mode mixes")


def trained():
    """A trained model with BatchNorm, the initial one, and batches of equal size."""
    task, ids, seeds = batchnorm_task(epochs=8)
    fitted = PlainTraining().fit(task, ids[0], task.dataset.reference, seeds[0])
    initial = task.initial_model(seeds[0])
    members, reference = (Batches(task.dataset, x, 8, 0, wrap=True) for x in (ids[0], task.dataset.reference))
    return fitted, initial, members, reference


def scores_by_hand(model, teacher, members, reference, lam=0.5):
    """``|g w|`` of the first step's mean loss, with the outputs of ``teacher``."""
    work = copy.deepcopy(model).train()
    (x, y), (r, _) = next(iter(members)), next(iter(reference))
    kl = functional.kl_div(
        work(r).log_softmax(1), teacher(r).detach().log_softmax(1), log_target=True, reduction="batchmean"
    )
    loss = (1 - lam) * functional.cross_entropy(work(x), y) + lam * kl
    grads = torch.autograd.grad(loss, list(work.parameters()))
    return {name: (g * p).abs().detach() for (name, p), g in zip(work.named_parameters(), grads, strict=True)}


@pytest.mark.parametrize("kind", ["state", "module", "file", "parameters"])
def test_the_initial_model_is_not_asked_through_the_statistics_of_the_trained_one(kind, tmp_path):
    fitted, first, members, reference = trained()
    save_file(fitted.initial, tmp_path / "initial.safetensors")
    given = {
        "state": fitted.initial,
        "module": first,
        "file": tmp_path / "initial.safetensors",
        "parameters": dict(first.named_parameters()),
    }[kind]
    options = {"granularity": "batch", "steps": 1}
    state = torch.get_rng_state()
    found = vulnerability(fitted.model, given, members, reference, **options)
    assert torch.equal(torch.get_rng_state(), state)
    teacher = copy.deepcopy(first).eval()
    if kind == "parameters":
        recalibrate_(teacher, members)
    for name, expected in scores_by_hand(fitted.model, teacher, members, reference).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)
    mixed = copy.deepcopy(first).eval()  # what was wrong: w0 with the statistics of w
    for buffer, value in zip(mixed.buffers(), fitted.model.buffers(), strict=True):
        buffer.copy_(value)
    wrong = scores_by_hand(fitted.model, mixed, members, reference)
    assert any((found[name] - wrong[name]).abs().max() > 1e-3 for name in found)


def test_interpolation_measures_the_statistics_of_its_own_weights():
    fitted, _, members, _ = trained()
    model = interpolated(fitted, 0.4, members)
    expected = copy.deepcopy(fitted.model)
    with torch.no_grad():
        for name, p in expected.named_parameters():
            p.copy_(torch.lerp(fitted.initial[name], p, 0.4))
    recalibrate_(expected, members)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), expected.buffers(), strict=True))
    assert not torch.equal(model[1].running_mean, fitted.model[1].running_mean)
    hidden = torch.stack([model[0](x).mean(dim=0) for x, _ in members]).mean(dim=0)
    torch.testing.assert_close(model[1].running_mean, hidden)
    for tau in (0.0, 1.0):
        end = interpolated(fitted, tau, members)
        assert all(torch.equal(a, b) for a, b in zip(end.buffers(), fitted.model.buffers(), strict=True))


def test_a_fleet_is_interpolated_each_by_its_own_members():
    task, ids, seeds = batchnorm_task()
    fitted = PlainTraining().fit_many(task, ids, task.dataset.reference, seeds)
    found = interpolate_many(task, fitted, ids, seeds, [0.3, 0.8])
    for one, old, own, seed, tau in zip(found, fitted, ids, seeds, (0.3, 0.8), strict=True):
        alone = interpolated(old, tau, Batches(task.dataset, own, task.recipe.batch_size, seed, wrap=True))
        for name, value in one.state_dict().items():
            assert torch.equal(value, alone.state_dict()[name])


@pytest.mark.parametrize("fails", ["empty", "late"])
def test_a_failed_recalibration_leaves_the_statistics(fails):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
    model[1].running_mean.normal_()
    before = copy.deepcopy(model.state_dict())
    bad = [] if fails == "empty" else [(torch.randn(4, 6), None), (torch.randn(4, 7), None)]
    with pytest.raises((ValueError, RuntimeError), match="at least one" if fails == "empty" else "shapes"):
        recalibrate_(model, bad)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
