"""freeze: selected weights are bit-identical under any optimizer, and only they."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from cwfast import MaskSet, _backends, freeze
from cwfast.ops import _entries
from cwfast.testing import guarded

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "sgd momentum decay": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, weight_decay=0.1),
}


def setup(share=0.3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    return model, MaskSet.from_masks({name: torch.rand(p.shape) < share for name, p in model.named_parameters()})


def train(model, optimizer, steps=5, clip=None):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().sum().backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_frozen(model, before, masks):
    for name, p in model.named_parameters():
        same = p.detach() == before[name]
        assert same[masks[name]].all(), name
        assert not same[~masks[name]].any(), name


@pytest.mark.parametrize("state", ["fresh", "from before"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_weights_do_not_move_and_all_others_do(optimizer, state, backend):
    model, masks = setup()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    if state == "from before":
        train(model, optimizer)  # momentum that would go on moving them
    before = values(model)
    with freeze(model, optimizer, masks, backend=backend):
        train(model, optimizer)
    assert_frozen(model, before, masks)
    train(model, optimizer)
    assert any(
        (p.detach() != before[name])[masks[name]].any() for name, p in model.named_parameters()
    )  # hooks are gone


def test_gradient_masking_alone_would_move_them():
    model, masks = setup()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    before = values(model)
    for name, p in model.named_parameters():
        p.register_hook(lambda g, name=name: g.masked_fill(masks[name], 0))
    train(model, optimizer)
    assert any((p.detach() != before[name])[masks[name]].any() for name, p in model.named_parameters())


def test_values_hold_after_every_step():
    model, masks = setup()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    before = values(model)
    with freeze(model, optimizer, masks):
        for _ in range(3):
            train(model, optimizer, steps=1)
            assert_frozen(model, before, masks)


def test_frozen_gradients_do_not_count_in_clipping():
    model, masks = setup()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with freeze(model, optimizer, masks):
        for _ in range(3):  # also while gradients accumulate
            model(torch.randn(8, 6)).square().sum().backward()
        for name, p in model.named_parameters():
            assert not p.grad[masks[name]].any()
            assert p.grad[~masks[name]].all()


def test_clipping_and_grad_scaler():
    model, masks = setup()
    optimizer, scaler = OPTIMIZERS["adamw"](model.parameters()), torch.amp.GradScaler("cpu", init_scale=128.0)
    before = values(model)
    with freeze(model, optimizer, masks):
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(torch.randn(8, 6)).square().sum()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
    assert_frozen(model, before, masks)


def test_initial_values_are_set_on_entry():
    model, masks = setup()
    initial = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with freeze(model, optimizer, masks, initial):
        for (name, p), w0 in zip(model.named_parameters(), initial.parameters(), strict=True):
            assert torch.equal(p[masks[name]], w0[masks[name]])
        train(model, optimizer)
    assert_frozen(model, values(initial), masks)


def test_copies_are_held_as_well():
    model, masks = setup()
    ema, master = copy.deepcopy(model), {name: p.detach().double() for name, p in model.named_parameters()}
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    before = values(model)
    with freeze(model, optimizer, masks, also=(ema, master)):
        for _ in range(3):
            train(model, optimizer, steps=1)
            with torch.no_grad():
                for a, b in zip(ema.parameters(), model.parameters(), strict=True):
                    a.lerp_(b + 0.01, 0.1)
                for value in master.values():
                    value.add_(0.5)
    assert_frozen(ema, before, masks)
    for name, value in master.items():
        assert torch.equal(value[masks[name]], before[name].double()[masks[name]])
        assert not torch.equal(value[~masks[name]], before[name].double()[~masks[name]])


def test_wrapped_optimizer():
    model, masks = setup()

    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    inner = OPTIMIZERS["adamw"](model.parameters())
    before = values(model)
    with freeze(model, Wrapper(inner), masks):
        train(model, inner)
    assert_frozen(model, before, masks)


def test_an_error_inside_removes_the_hooks():
    model, masks = setup()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with pytest.raises(ZeroDivisionError), freeze(model, optimizer, masks):
        raise ZeroDivisionError
    before = values(model)
    train(model, optimizer)
    assert any((p.detach() != before[name])[masks[name]].any() for name, p in model.named_parameters())


@pytest.mark.parametrize("what", ["masks", "initial", "also"])
def test_what_is_of_another_model_is_refused_before_anything_changes(what):
    model, masks = setup()
    other = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
    wrong = MaskSet.from_masks({name: torch.ones_like(p).bool() for name, p in other.named_parameters()})
    arguments = {"masks": masks} | {
        "masks": {"masks": wrong},
        "initial": {"initial": other},
        "also": {"also": [other]},
    }[what]
    optimizer, before = OPTIMIZERS["adamw"](model.parameters()), values(model)
    with pytest.raises(ValueError, match=r"2\.weight"), freeze(model, optimizer, **arguments):
        pass
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    train(model, optimizer, steps=1)


def test_an_optimizer_of_another_model_is_refused():
    model, masks = setup()
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    with pytest.raises(ValueError, match="optimizer must hold parameters of model"), freeze(model, other, masks):
        pass


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_masks_that_change_inside_lead_no_write_outside(share):
    """freeze has a copy: what the mask's own tensors become is nothing to it."""
    memory, guard = guarded(torch.zeros(1000))
    model = nn.ParameterList([nn.Parameter(memory)])
    masks = MaskSet.from_masks({"0": torch.rand(1000) < share})
    mask, optimizer = masks["0"], torch.optim.SGD(model.parameters(), 0.1)
    with freeze(model, optimizer, masks):
        picks = masks.picks("0")
        picks[0].fill_(1000 + 3) if isinstance(picks, tuple) else picks.fill_(255)  # 3 entries past the end
        gradient, guard_gradient = guarded(torch.ones(1000))
        model[0].grad = gradient
        model[0].sum().backward()
        assert torch.equal(model[0].grad == 0, mask)
        optimizer.step()
    guard()
    guard_gradient()
    assert torch.equal(model[0] == 0, mask)


def test_an_optimizer_that_also_holds_wrapped_tensors():
    model, masks = setup()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the prototype
        wrapped = nn.Parameter(TwoTensor(torch.zeros(3), torch.zeros(3)))
    optimizer = torch.optim.SGD([{"params": [wrapped]}, {"params": model.parameters()}], 0.1)
    before = values(model)
    with freeze(model, optimizer, masks):
        train(model, optimizer)
    assert_frozen(model, before, masks)


def test_what_is_in_place_is_restored_before_a_replaced_parameter_is_reported():
    model, masks = setup()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    before = values(model)
    frozen = freeze(model, optimizer, masks)
    frozen.__enter__()
    with torch.no_grad():
        model[0].weight.add_(1)
    model[2].weight = nn.Parameter(model[2].weight.detach() + 1)
    with pytest.raises(ValueError, match="another 'weight' is in its place"):
        frozen.__exit__(None, None, None)
    assert torch.equal(model[0].weight[masks["0.weight"]], before["0.weight"][masks["0.weight"]])


@pytest.mark.parametrize("share", [0.001, 0.3])
def test_a_restore_that_is_interrupted_is_seen_by_autograd(monkeypatch, share):
    def interrupted(*_):
        raise KeyboardInterrupt

    model = nn.ParameterList([torch.zeros(10_000)])
    masks = MaskSet.from_masks({"0": torch.rand(10_000) < share})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with freeze(model, optimizer, masks):
        version = model[0]._version
        with monkeypatch.context() as patch:
            patch.setattr(_backends.native(), "scatter", interrupted)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
        assert model[0]._version > version


def test_weights_of_several_devices_are_written_by_device(monkeypatch):
    class Entry:  # without kernels for a second device, what they would be called with
        def check(self, *_):
            pass

    calls = []
    monkeypatch.setattr(_entries, "_write_on_one", lambda *arguments: calls.append(arguments))
    tensors = [torch.zeros(i + 1, device=device) for i, device in enumerate(("cpu", "meta", "cpu"))]
    entries = [Entry() for _ in tensors]
    _entries.write(entries, tensors, tensors)
    assert [[len(t) for t in call[1]] for call in calls] == [[1, 3], [2]]
    assert [call[0] for call in calls] == [[entries[0], entries[2]], [entries[1]]]
