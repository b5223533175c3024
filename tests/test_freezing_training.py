"""freeze inside real training: every optimizer, clipping, AMP, accumulation, averages, masters, files."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cwfast import MaskSet, checkpoint, freeze


class Quantized(torch.optim.Optimizer):
    """A stand-in for 8-bit optimizers: momentum kept as int8 with one scale a tensor, decoupled decay, ``p.data``."""

    def __init__(self, parameters, lr=0.05, decay=0.1):
        super().__init__(parameters, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                momentum = state["codes"].float() * state["scale"] if state else torch.zeros_like(p)
                momentum = 0.9 * momentum + p.grad
                state["scale"] = momentum.abs().max() / 127
                state["codes"] = (momentum / state["scale"]).round().to(torch.int8)
                p.data = p.data * (1 - group["lr"] * group["decay"]) - group["lr"] * momentum  # other memory each time


def bitsandbytes_adamw(parameters):
    library = pytest.importorskip("bitsandbytes")
    return library.optim.AdamW8bit(parameters, 0.01, weight_decay=0.1, min_8bit_size=1)


OPTIMIZERS = {
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, weight_decay=0.1),
    "quantized stand-in": Quantized,
    "8 bits": bitsandbytes_adamw,
    "nadam": lambda p: torch.optim.NAdam(p, 0.01, weight_decay=0.1, momentum_decay=0.1),
    "sgd nesterov": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.1, fused=True),
    "adam fused amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, weight_decay=0.1, fused=True),
    "adamw maximize": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, maximize=True),
    "adamw tensor lr": lambda p: torch.optim.AdamW(p, torch.tensor(0.01), weight_decay=0.1, fused=True),
}


def setup(share=0.3, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 10)).to(dtype)
    return model, MaskSet.from_masks({name: torch.rand(p.shape) < share for name, p in model.named_parameters()})


def loss_of(model):
    return model(torch.randn(8, 20, dtype=next(model.parameters()).dtype)).float().square().sum()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def bits_of(tensor):
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_held(model, before, masks, others_move=True):
    for name, p in model.named_parameters():
        same = bits_of(p) == bits_of(before[name].to(p))
        assert same[masks[name]].all(), name
        assert not others_move or not same[~masks[name]].all(), name


@pytest.mark.parametrize("share", [0.02, 0.3])  # lists, packed bits
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_after_every_step(optimizer, share):
    model, masks = setup(share)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    loss_of(model).backward()
    optimizer.step()  # momentum that would go on moving them
    before = values(model)
    with freeze(model, optimizer, masks):
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            assert_held(model, before, masks)
    loss_of(model).backward()
    optimizer.step()
    assert any((p != before[name])[masks[name]].any() for name, p in model.named_parameters())


def two_hundred_steps(model, optimizer, average, at_step=lambda: None):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=20)
    for _ in range(200):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(model)
        at_step()


@pytest.mark.parametrize("fused", [True, False])
def test_200_steps_of_adamw_with_decay_clipping_amp_and_ema(fused):
    model, masks = setup()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1, fused=fused)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    before = values(model)

    def check():
        assert_held(model, before, masks)
        assert_held(average.module, before, masks, others_move=False)

    with freeze(model, optimizer, masks, also=[average.module]):
        two_hundred_steps(model, optimizer, average, check)
    check()


def test_200_steps_with_masked_gradients_alone_move_them():
    model, masks = setup()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1, fused=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    before = values(model)

    for name, p in model.named_parameters():

        def mask_gradient(p, mask=masks[name]):
            p.grad.masked_fill_(mask, 0)

        p.register_post_accumulate_grad_hook(mask_gradient)
    two_hundred_steps(model, optimizer, average)
    for name, p in model.named_parameters():
        assert not (p == before[name])[masks[name]].any(), name


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averages_of_another_start_are_set_and_held(average):
    model, masks = setup()
    function = get_ema_multi_avg_fn(0.5) if average == "ema" else None
    averaged = AveragedModel(setup()[0], multi_avg_fn=function)
    with torch.no_grad():
        for p in averaged.parameters():
            p.add_(3)
    averaged.n_averaged += 1  # so that it does not begin with a copy
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
    before = values(model)
    with freeze(model, optimizer, masks, also=[averaged.module]):
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            averaged.update_parameters(model)
            assert_held(averaged.module, before, masks)


@pytest.mark.parametrize("given", ["values on entry", "module", "file"])
def test_float32_masters_of_bfloat16_parameters(given, tmp_path):
    model, masks = setup(dtype=torch.bfloat16)
    masters = {name: p.detach().float().requires_grad_() for name, p in model.named_parameters()}
    initial = {name: torch.randn(p.shape) for name, p in model.named_parameters()}  # float32: more digits
    save_file(initial, tmp_path / "initial.safetensors")
    expected = values(model) if given == "values on entry" else initial
    source = {"values on entry": None, "module": initial, "file": tmp_path / "initial.safetensors"}[given]
    optimizer = torch.optim.AdamW(masters.values(), 0.01, weight_decay=0.1, fused=True)
    with freeze(model, optimizer, masks, source, also=[masters]):
        for _ in range(4):
            model.zero_grad()
            loss_of(model).backward()
            for name, p in model.named_parameters():
                assert not p.grad[masks[name]].any()
                masters[name].grad = p.grad.float()
            optimizer.step()
            for name, p in model.named_parameters():
                mask = masks[name]
                assert torch.equal(masters[name][mask], expected[name].float()[mask])
                assert not torch.equal(masters[name][~mask], expected[name].float()[~mask])
                with torch.no_grad():
                    p.copy_(masters[name])
            assert_held(model, expected, masks)


def test_accumulated_gradients_are_clipped_by_the_norm_of_the_trained_weights_alone():
    model, masks = setup()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    batches = [torch.randn(8, 20) for _ in range(3)]
    with freeze(model, optimizer, masks):
        for net in (model, plain):
            for x in batches:
                net(x).square().sum().backward()
        for p, (name, q) in zip(model.parameters(), plain.named_parameters(), strict=True):
            q.grad[masks[name]] = 0
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)
        norms = [nn.utils.clip_grad_norm_(net.parameters(), 0.5) for net in (model, plain)]
        assert norms[0] == norms[1]


def test_infinite_gradients_of_frozen_weights_skip_no_step_of_the_scaler():
    model, masks = setup()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    hook = model[0].weight.register_hook(lambda g: g.masked_fill(masks["0.weight"], torch.inf))
    before = values(model)
    with freeze(model, optimizer, masks):
        scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()
    hook.remove()
    assert scaler.get_scale() == 8.0
    assert_held(model, before, masks)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_an_optimizer_that_calls_a_closure_several_times(line_search):
    model, masks = setup()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=5, line_search_fn=line_search)
    x, before, calls = torch.randn(8, 20), values(model), 0

    def closure():
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        assert_held(model, before, masks, others_move=False)  # their gradient was 0 in every call
        return loss

    with freeze(model, optimizer, masks):
        for _ in range(3):
            optimizer.step(closure)
            assert_held(model, before, masks)
    assert calls > 6


def test_a_parameter_that_is_replaced_or_changes_its_shape_is_an_error():
    model, masks = setup()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="another 'weight' is in its place"), freeze(model, optimizer, masks):
        model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    model, masks = setup()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with (
        pytest.raises(ValueError, match=r"0\.weight must stay a dense tensor of shape \(33, 20\), torch.float32"),
        freeze(model, optimizer, masks),
    ):
        model.to(torch.float64)


def test_a_schedule_free_optimizer_is_refused():
    """Its train() and eval() write weights too: between the averaged ones and those that it steps."""

    class ScheduleFree(torch.optim.SGD):
        def train(self): ...
        def eval(self): ...

    model, masks = setup()
    optimizer = ScheduleFree(model.parameters(), 0.1)
    with pytest.raises(TypeError, match="ScheduleFree exchanges them in train"), freeze(model, optimizer, masks):
        pass


def test_masks_of_the_module_inside_a_wrapper_are_told_apart():
    model, masks = setup()
    wrapper = nn.DataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hint = "has no parameter '0.weight'; masks of the module inside its DataParallel go with that module"
    with pytest.raises(ValueError, match=hint), freeze(wrapper, optimizer, masks):
        pass


def test_a_sparse_gradient_is_an_error():
    model = nn.Embedding(9, 3, sparse=True)
    masks = MaskSet.from_masks({"weight": torch.rand(9, 3) < 0.5})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match="gradients must be dense"), freeze(model, optimizer, masks):
        model(torch.tensor([1, 2])).sum().backward()


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has gradients of one dtype only")
def test_gradients_of_another_dtype():
    model, masks = setup(dtype=torch.bfloat16)
    for p in model.parameters():
        p.grad_dtype = torch.float32
    with freeze(model, torch.optim.SGD(model.parameters(), 0.1), masks):
        loss_of(model).backward()
        for name, p in model.named_parameters():
            assert p.grad.dtype is torch.float32
            assert not p.grad[masks[name]].any()
            assert p.grad[~masks[name]].any()


def test_channels_last_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    masks = MaskSet.from_masks({name: torch.rand(p.shape) < 0.3 for name, p in model.named_parameters()})
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    before = values(model)
    with freeze(model, optimizer, masks):
        for _ in range(3):
            model(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)).square().sum().backward()
            assert not any(p.grad[masks[name]].any() for name, p in model.named_parameters())
            optimizer.step()
            assert_held(model, before, masks)


def test_wrong_arguments_are_refused_by_name():
    model, masks = setup()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for also in (copy.deepcopy(model), dict(model.named_parameters()), [3]):
        with (
            pytest.raises(TypeError, match="also must be a sequence of modules"),
            freeze(model, optimizer, masks, also=also),
        ):
            pass
    with (
        pytest.raises(ValueError, match=r"also\[0\] must hold every parameter"),
        freeze(model, optimizer, masks, also=[AveragedModel(model)]),
    ):
        pass
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer"), freeze(model, object(), masks):
        pass


def test_a_checkpoint_is_streamed_and_no_dense_copy_is_made(tmp_path, monkeypatch):
    model, masks = setup()
    initial = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    save_file(initial, tmp_path / "initial.safetensors")
    monkeypatch.setattr(checkpoint.Checkpoint, "tensor", lambda *_: pytest.fail("a whole tensor was read"))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    with freeze(model, optimizer, masks, tmp_path / "initial.safetensors"):
        assert_held(model, initial, masks)
        loss_of(model).backward()
        optimizer.step()
    assert_held(model, initial, masks)
