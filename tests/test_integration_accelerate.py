"""freeze in a loop of accelerate: what it prepared, in every precision, accumulated, checkpointed, tied, averaged."""

import copy

import llm_models
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import cwfast

accelerate = pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.usefixtures("without_torchvision"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]

IDS = torch.tensor(llm_models.ids(6, shortest=10, longest=10)).split(2)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def pair(kind="gpt2", dtype=torch.float32):  # whose embedding is tied to its head
    base = llm_models.small(kind, dtype)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    masks = cwfast.select({name: torch.rand(p.shape) for name, p in model.named_parameters()}, rate=0.1)
    return model, base, masks


def prepared(model, optimizer=torch.optim.AdamW, **options):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
    optimizer = optimizer(model.parameters(), 5e-3, weight_decay=0.1)
    return accelerator, *accelerator.prepare(model, optimizer)


def train(accelerator, model, optimizer, after=lambda: None):
    for ids in IDS * 2:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            after()


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_in_every_precision(precision, checkpointed):
    model, base, masks = pair()
    if checkpointed:
        model.train().gradient_checkpointing_enable()
    accelerator, wrapped, optimizer = prepared(model, mixed_precision=precision)
    inside = accelerator.unwrap_model(wrapped)
    cwfast.rewind_(inside, masks, base)
    with cwfast.freeze(inside, optimizer, masks):
        train(accelerator, wrapped, optimizer, lambda: llm_models.assert_held(model, base, masks))
    llm_models.assert_held(model, base, masks)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_saved_state_is_loaded_before_freezing():
    model, base, masks = pair()
    accelerator, wrapped, optimizer = prepared(model)
    with cwfast.freeze(model, optimizer, masks, base):
        train(accelerator, wrapped, optimizer)
        accelerator.save_state("state")
        train(accelerator, wrapped, optimizer)
    end = copy.deepcopy(model)
    accelerator.load_state("state")
    with cwfast.freeze(model, optimizer, masks, base):
        train(accelerator, wrapped, optimizer)
    llm_models.assert_held(model, base, masks)
    for p, q in zip(model.parameters(), end.parameters(), strict=True):
        assert torch.equal(p, q)


def test_bfloat16_weights_float32_masters_and_an_average():
    model, base, masks = pair("llama", torch.bfloat16)
    master = copy.deepcopy(model).float()
    average = AveragedModel(master, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    _, _, optimizer = prepared(master)

    def step(ids):
        model(input_ids=ids, labels=ids).loss.backward()
        for name, p in model.named_parameters():
            master.get_parameter(name).grad = p.grad.float()
            p.grad = None
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(master.get_parameter(name))
        average.update_parameters(master)

    with cwfast.freeze(model, optimizer, masks, base, also=[master, average.module]):
        for ids in IDS:
            step(ids)
    for held in (model, master, average.module):
        llm_models.assert_held(held, base.to(next(held.parameters()).dtype), masks)


@pytest.mark.slow
def test_compiled():
    model, base, masks = pair("llama")
    accelerator, compiled, optimizer = prepared(model, dynamo_backend="aot_eager")
    with (
        pytest.raises(ValueError, match="masks of the module inside its OptimizedModule go with that module"),
        cwfast.freeze(compiled, optimizer, masks),
    ):
        pass
    with cwfast.freeze(accelerator.unwrap_model(compiled, keep_torch_compile=False), optimizer, masks, base):
        train(accelerator, compiled, optimizer)
    llm_models.assert_held(model, base, masks)
