"""Adapters of PEFT: their initial values are kept, and they are scored, rewound and frozen as any weights are."""

import copy
import os

import llm_models
import pytest
import torch
from layer_truth import assert_equal, truth
from torch.nn.functional import cross_entropy

import cwfast

pytestmark = [
    pytest.mark.usefixtures("without_torchvision"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

IDS = torch.tensor(llm_models.ids(5, shortest=10, longest=10))
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head trained whole": {"modules_to_save": ["lm_head"]},
    "some tokens": {"trainable_token_indices": [3, 5]},
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def initial_adapters(without_torchvision):
    pytest.importorskip("peft")
    from cwfast.integrations.peft import initial_adapters

    return initial_adapters


def adapted(kind="lora", dtype=torch.float32):
    import peft  # it imports transformers, which needs the fixture

    base = llm_models.small("llama", dtype)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"} | KINDS[kind]
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options), autocast_adapter_dtype=False).eval()
    return model, base


def losses(model):
    def of(ids):
        logits = model(input_ids=ids).logits[:, :-1]
        return cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(dim=1)

    return of


def train(model, optimizer=None, steps=3):
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(weights, 1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        losses(model)(IDS).mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    return optimizer


def assert_held(model, initial, masks):
    moved = 0
    for name in masks.names:
        same = model.get_parameter(name) == initial[name]
        assert same[masks[name]].all(), name
        moved += int((~same[~masks[name]]).sum())
    assert moved


@pytest.mark.parametrize("kind", KINDS)
def test_kept_rewound_and_frozen(initial_adapters, kind):
    model, _ = adapted(kind)
    initial = initial_adapters(model)
    assert list(initial) == [name for name, p in model.named_parameters() if p.requires_grad]
    model.save_pretrained("start")
    optimizer = train(model)
    read = initial_adapters(model, "start")
    assert all(torch.equal(read[name], value) for name, value in initial.items())
    assert list(read) == list(initial)
    scorer = cwfast.SaliencyScorer(model, criterion="taylor_delta", initial=initial, granularity="batch")
    with scorer:
        losses(model)(IDS).mean().backward()
        scorer.step()
    masks = cwfast.select(scorer.scores(), rate=0.3)
    cwfast.rewind_(model, masks, initial)
    with cwfast.freeze(model, optimizer, masks):
        train(model, optimizer)
    assert_held(model, initial, masks)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "embedding"])
def test_scores_of_samples(initial_adapters, kind):
    model, _ = adapted(kind, torch.float64)
    train(model)
    exclude = ["*magnitude*"] if kind == "dora" else None  # a layer rule is missing for those alone
    expected, _, _ = truth(model, losses(model), [IDS])
    scorer = cwfast.SaliencyScorer(model, reduction="sum", grads=False, exclude=exclude)
    with scorer:
        losses(model)(IDS).sum().backward()
    found = scorer.scores()
    assert_equal(found, {name: expected[name] for name in found}, 1e-5)  # the norms of Llama compute in float32
    assert len(found) == sum(p.requires_grad and "magnitude" not in n for n, p in model.named_parameters())


def test_initial_values_after_training_are_refused(initial_adapters):
    for kind in ("lora", "embedding"):
        model, base = adapted(kind)
        train(model)
        with pytest.raises(ValueError, match=r"before training, when '.*' is all zeros; it is not"):
            initial_adapters(model)
    with pytest.raises(TypeError, match="model must have adapters of PEFT; got LlamaForCausalLM"):
        initial_adapters(base)
    model.save_pretrained("another", selected_adapters=["default"])
    other, _ = adapted("lora")
    with pytest.raises(ValueError, match="another must hold every parameter; 8 missing"):
        initial_adapters(other, "another")
    with pytest.raises(FileNotFoundError):
        initial_adapters(other, "nowhere")
    for parameter in other.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="an adapter that requires a gradient"):
        initial_adapters(other)


def test_each_adapter_has_its_own_file(initial_adapters):
    """PEFT puts all but "default" into folders of their names; the entries in the files have the same names."""
    import peft

    model, _ = adapted()
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model.add_adapter("b", peft.LoraConfig(**options))
    model.set_adapter("b")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(torch.randn_like(parameter))
    initial = initial_adapters(model)
    assert initial
    assert all(".b." in name for name in initial)
    model.save_pretrained("start")
    train(model)
    read = initial_adapters(model, "start")
    assert list(read) == list(initial)
    assert all(torch.equal(read[name], value) for name, value in initial.items())
    os.remove("start/b/adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match="b"):
        initial_adapters(model, "start")


def test_a_bias_of_two_adapters_is_refused(initial_adapters):
    import peft
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    base = Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=2))
    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base, peft.LoraConfig(**options, bias="all"))
    model.save_pretrained("one")
    assert any(name.endswith(".bias") for name in initial_adapters(model, "one"))
    model.add_adapter("b", peft.LoraConfig(**options))
    model.peft_config["b"].bias = "all"  # PEFT itself refuses to make such a pair
    model.save_pretrained("two")
    with pytest.raises(ValueError, match=r"of one adapter; '.*bias' is in the files of two, in two"):
        initial_adapters(model, "two")


def test_all_of_an_adapter_rewound_is_the_base_model(initial_adapters):
    for kind in ("lora", "dora", "pissa"):
        model, base = adapted(kind)
        initial = initial_adapters(model)
        train(model)
        everything = cwfast.select({name: torch.rand(value.shape) for name, value in initial.items()}, rate=1.0)
        assert (losses(model)(IDS) - losses(base)(IDS)).abs().min() > 1e-3
        cwfast.rewind_(model, everything, initial)
        torch.testing.assert_close(losses(model)(IDS), losses(base)(IDS), rtol=1e-4, atol=1e-4)


def test_merged_weights_are_rewound_to_the_base(initial_adapters):
    model, base = adapted()
    train(model)
    merged = model.merge_and_unload()
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in base.named_parameters()]
    scores = {name: (p - base.get_parameter(name)).abs() for name, p in merged.named_parameters()}
    masks = cwfast.select(scores, rate=0.01)
    cwfast.rewind_(merged, masks, base)
    for name, p in merged.named_parameters():
        assert torch.equal(p[masks[name]], base.get_parameter(name)[masks[name]])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_in_the_trainer(initial_adapters, kind):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    from cwfast.integrations.transformers import MASK_FILE, CWRFCallback
    from cwfast.llm.scoring import score

    model, _ = adapted(kind)
    initial = initial_adapters(model)
    train(model)
    start, by_hand = copy.deepcopy(model), copy.deepcopy(model)
    held_out = llm_models.ids(4, shortest=8, seed=7)
    masks = cwfast.select(score(by_hand, initial, list(IDS), held_out), rate=0.2)
    assert masks.total == sum(value.numel() for value in initial.values()) // 5

    def run(of, callback, steps=4, **how):
        options = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "weight_decay": 0.1, "use_cpu": True}
        arguments = TrainingArguments("out", **options, report_to=[], disable_tqdm=True)
        data = [{"input_ids": row, "labels": row} for row in IDS]
        Trainer(of, arguments, train_dataset=data, callbacks=[callback]).train(**how)

    callback = CWRFCallback(reference=held_out, rate=0.2, initial=initial)
    run(model, callback)
    assert callback.masks == masks
    assert_held(model, initial, masks)
    saved = initial_adapters(model, "out/checkpoint-2")
    assert all(torch.equal(saved[name][masks[name]], initial[name][masks[name]]) for name in masks.names)
    run(
        start, CWRFCallback(f"out/checkpoint-2/{MASK_FILE}", initial=initial), resume_from_checkpoint="out/checkpoint-2"
    )
    for (name, p), q in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(p, q), name
    with pytest.raises(ValueError, match=r"initial_adapters\(model, 'out/checkpoint-2'\)"):
        run(start, CWRFCallback(masks, initial="out/checkpoint-2"))


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_on_a_quantized_base(initial_adapters, bits):
    library = pytest.importorskip("bitsandbytes")
    import peft
    import transformers

    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained("base")
    how = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base = transformers.LlamaForCausalLM.from_pretrained("base", quantization_config=how, dtype=torch.float32)
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    initial = initial_adapters(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = train(model, library.optim.AdamW8bit(weights, 1e-2, weight_decay=0.1, min_8bit_size=1))
    scorer = cwfast.SaliencyScorer(model, reduction="mean", grads=False)
    with scorer:
        losses(model)(IDS).mean().backward()
    masks = cwfast.select(scorer.scores(), rate=0.2)
    with cwfast.freeze(model, optimizer, masks, initial):
        train(model, optimizer)
    assert_held(model, initial, masks)
