"""SelectedAdamW: the selected weights follow AdamW, the others keep every bit, the state is compact."""

import copy

import pytest
import torch
from torch import nn

from cwfast import MaskSet, _backends, select
from cwfast.optim import SelectedAdamW
from cwfast.testing import assert_no_worse, guarded

OPTIONS = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(300, 301)
        self.sparse = nn.Parameter(torch.randn(600_001))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.untouched = nn.Parameter(torch.randn(9))
        self.to(dtype)


def masks_of(model, share=0.01):
    generator = torch.Generator().manual_seed(1)
    share_of = {"dense.weight": 0.3, "scalar": 1.0, "untouched": 0.0}  # bits, a list, all, none
    return MaskSet.from_masks(
        {n: torch.rand(p.shape, generator=generator) < share_of.get(n, share) for n, p in model.named_parameters()}
    )


def set_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def trained(model, optimizer, steps=20, begin=0):
    for step in range(begin, begin + steps):
        set_gradients(model, step)
        optimizer.step()
    return model


@pytest.mark.parametrize("maximize", [False, True])
def test_selected_weights_follow_adamw_and_no_other_moves(backend, maximize):
    model, plain, truth = Net(), Net(), Net(torch.float64)
    before, masks = copy.deepcopy(model.state_dict()), masks_of(model)
    trained(model, SelectedAdamW(model, masks, **OPTIONS, maximize=maximize, backend=backend))
    trained(plain, torch.optim.AdamW(plain.parameters(), **OPTIONS, maximize=maximize))
    for step in range(20):  # the same gradients, in float64
        for given, parameter in zip(gradients_of(step), truth.parameters(), strict=True):
            parameter.grad = given
        if step == 0:
            exact = torch.optim.AdamW(truth.parameters(), **OPTIONS, maximize=maximize)
        exact.step()
    truths, plains = dict(truth.named_parameters()), dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        mask = masks[name]
        assert torch.equal(parameter[~mask], before[name][~mask])
        assert not mask.any() or not torch.equal(parameter[mask], before[name][mask])
        assert_no_worse(parameter[mask].detach(), truths[name][mask].detach(), plains[name][mask].detach())


def gradients_of(step):
    model = Net()
    set_gradients(model, step)
    return [parameter.grad.double() for parameter in model.parameters()]


@pytest.mark.parametrize("numel", [1, 65_535, 65_536, 65_537, 20 * 65_536 + 3])
def test_lists_with_empty_blocks_and_entries_at_their_edges(kernel, numel):
    places = torch.tensor([0, 65_535, 65_536, 8 * 65_536 - 1, 8 * 65_536, 17 * 65_536 + 5, numel - 1])
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[places[places < numel]] = True
    model, plain = (nn.ParameterList([torch.arange(numel) / numel]) for _ in range(2))
    for net in (model, plain):
        net[0].grad = torch.linspace(-1, 1, numel)
    memory, guard = guarded(model[0].grad)
    model[0].grad = memory
    SelectedAdamW(model, MaskSet.from_masks({"0": mask}), **OPTIONS, backend=kernel).step()
    torch.optim.AdamW(plain.parameters(), **OPTIONS).step()
    guard()
    assert torch.equal(model[0][~mask], (torch.arange(numel) / numel)[~mask])
    torch.testing.assert_close(model[0][mask], plain[0][mask], rtol=3e-7, atol=1e-7)


def test_moments_that_do_not_fit_never_reach_the_kernel():
    model = Net()
    optimizer = SelectedAdamW(model, masks_of(model))
    trained(model, optimizer, 1)
    before = model.sparse.detach().clone()
    state = optimizer.state[model.sparse]
    state["exp_avg"] = state["exp_avg"][:-1]
    with pytest.raises(ValueError, match=r"exp_avgs\[\d\] must be contiguous float32"):
        optimizer.step()
    assert torch.equal(model.sparse, before)


def test_float64_weights_equal_adamw(backend):
    model, plain = Net(torch.float64), Net(torch.float64)
    masks = masks_of(model)
    trained(model, SelectedAdamW(model, masks, **OPTIONS, backend=backend))
    trained(plain, torch.optim.AdamW(plain.parameters(), **OPTIONS))
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        mask = masks[name]
        torch.testing.assert_close(parameter[mask], other[mask], rtol=1e-12, atol=1e-14)


def test_the_state_takes_eight_bytes_a_selected_weight():
    model = Net()
    masks = masks_of(model)
    optimizer = SelectedAdamW(model, masks)
    trained(model, optimizer, 1)
    vectors = [v for state in optimizer.state.values() for key, v in state.items() if key != "step"]
    assert sum(v.nbytes for v in vectors) == 8 * masks.total
    assert model.untouched not in optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_training_goes_on_from_a_state_dict_bit_for_bit(dtype, tmp_path):
    whole, first = Net(dtype), Net(dtype)
    masks = masks_of(whole)
    trained(whole, SelectedAdamW(whole, masks, **OPTIONS), 10)
    optimizer = SelectedAdamW(first, masks, **OPTIONS)
    trained(first, optimizer, 5)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = SelectedAdamW(first, masks)  # other options: the state's are taken
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    if dtype is torch.bfloat16:
        assert all(state["exp_avg"].dtype is torch.float32 for state in again.state.values())
    trained(first, again, 5, begin=5)
    for a, b in zip(whole.parameters(), first.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_other_masks_is_refused():
    model = Net()
    optimizer = SelectedAdamW(model, masks_of(model))
    trained(model, optimizer, 1)
    other = SelectedAdamW(model, masks_of(model, 0.02))
    with pytest.raises(ValueError, match="state must be of the same masks"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_a_parameter_without_gradient_and_a_schedule():
    model = Net()
    masks = masks_of(model)
    optimizer = SelectedAdamW(model, masks, lr=1.0, weight_decay=0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    set_gradients(model, 0)
    model.sparse.grad = None
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    schedule.step()
    assert torch.equal(model.sparse, before["sparse"])
    assert not torch.equal(model.scalar, before["scalar"])
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.step(lambda: 3) == 3


def test_the_model_knows_that_its_weights_changed():
    model = nn.Linear(3, 3)
    optimizer = SelectedAdamW(model, select({n: torch.ones_like(p) for n, p in model.named_parameters()}, rate=1))
    loss = model(torch.ones(1, 3, requires_grad=True)).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr must be at least 0"),
        ({"eps": float("nan")}, "eps must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        SelectedAdamW(Net(), masks_of(Net()), **options)


def test_wrong_masks():
    with pytest.raises(ValueError, match="must be of this model"):
        SelectedAdamW(nn.Linear(2, 2), masks_of(Net()))
    masks = masks_of(Net())
    with pytest.raises(ValueError, match="must select some weight"):
        SelectedAdamW(Net(), masks - masks)


@pytest.mark.parametrize("share", [0.02, 0.3])  # a list, packed bits
def test_the_op_is_registered(backend, share):
    weight, grad = torch.randn(70), torch.randn(70)
    masks = MaskSet.from_masks({"w": torch.rand(70) < share})
    picks = masks.picks("w")
    low, offset = picks if isinstance(picks, tuple) else (picks, None)
    moments = [torch.zeros(masks.total) for _ in range(2)]
    arguments = ([weight], [grad], [low], [offset], [None], *([m] for m in moments), [torch.tensor(0.0)])
    call = torch.ops.cwfast.selected_adamw_.default
    torch.library.opcheck(call, (*arguments, 0.1, 0.9, 0.99, 1e-8, 0.1, False, backend))


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_weights_that_were_exchanged_are_checked_before_the_kernel_sees_them(share):
    model = nn.ParameterList([torch.zeros(1000)])
    optimizer = SelectedAdamW(model, MaskSet.from_masks({"0": torch.rand(1000) < share}))
    model[0].data = torch.zeros(1000)  # of the same shape: as if it had always been there
    model[0].grad = torch.ones(1000)
    optimizer.step()
    assert (model[0] != 0).sum() == len(optimizer.state[model[0]]["exp_avg"])
    model[0].data = torch.zeros(10)
    model[0].grad = torch.ones(10)
    with pytest.raises(ValueError, match=r"^0 must stay a dense tensor of shape \(1000,\)"):
        optimizer.step()


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_masks_that_change_later_do_not_lead_the_kernel_outside(share):
    """The optimizer has a copy: what the mask's own tensors become is nothing to it."""
    memory, guard = guarded(torch.zeros(1000))
    model = nn.ParameterList([nn.Parameter(memory)])
    masks = MaskSet.from_masks({"0": torch.rand(1000) < share})
    mask = masks["0"]
    optimizer = SelectedAdamW(model, masks)
    picks = masks.picks("0")
    picks[0].fill_(1000 + 3) if isinstance(picks, tuple) else picks.fill_(255)  # 3 entries past the end
    model[0].grad = torch.ones(1000)
    optimizer.step()
    guard()
    assert torch.equal(model[0] != 0, mask)


def test_a_weight_that_is_not_dense_is_refused():
    masks = MaskSet.from_masks({"0": torch.rand(40, 30) < 0.3})
    with pytest.raises(ValueError, match="0 is written in place and must be dense"):
        SelectedAdamW(nn.ParameterList([nn.Parameter(torch.zeros(30).expand(40, 30))]), masks)
    model = nn.ParameterList([torch.zeros(40, 30)])
    optimizer = SelectedAdamW(model, masks)
    model[0].data = torch.zeros(30).expand(40, 30)
    model[0].grad = torch.ones(40, 30)
    with pytest.raises(ValueError, match="0 is written in place and must be dense"):
        optimizer.step()
    assert not model[0].any()


def test_a_step_that_is_interrupted_is_not_counted_but_seen(monkeypatch):
    model = Net()
    optimizer = SelectedAdamW(model, masks_of(model))
    trained(model, optimizer, 1)
    set_gradients(model, 1)
    before = model.sparse._version
    native = _backends.native()
    monkeypatch.setattr(native, "selected_adamw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert model.sparse._version > before
    assert {float(state["step"]) for state in optimizer.state.values()} == {1}


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_state_of_another_kind_is_refused():
    model = Net()
    optimizer = SelectedAdamW(model, masks_of(model))
    other = torch.optim.SGD([p for group in optimizer.param_groups for p in group["params"]], 0.1, momentum=0.9)
    trained(model, other, 1)
    with pytest.raises(ValueError, match="must have step and exp_avg; got"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="must have 'state' and 'param_groups'"):
        optimizer.load_state_dict({})


def test_a_sparse_gradient_is_refused():
    model = nn.Embedding(9, 3, sparse=True)
    optimizer = SelectedAdamW(model, MaskSet.from_masks({"weight": torch.ones(9, 3).bool()}))
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="must be a strided tensor"):
        optimizer.step()
