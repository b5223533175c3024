"""Whole models, built from their configuration: scores, norms and gradients of every parameter, in float64."""

import pytest
import torch
import transformers
from layer_truth import assert_equal, check, truth
from torch import nn
from torch.nn import functional

from cwfast import SaliencyScorer
from cwfast.errors import UnsupportedLayer

B, T, V = 4, 9, 31


pytestmark = pytest.mark.usefixtures("without_torchvision")


def randomized(model):
    """Float64 in eval mode, with parameters that hide nothing: no zeros, no ones."""
    model = model.double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    for name, buffer in model.named_buffers():
        if "running_var" in name:
            buffer.uniform_(0.5, 2)
    return model


def language(kind, **config):
    return randomized(
        getattr(transformers, f"{kind}ForCausalLM")._from_config(getattr(transformers, f"{kind}Config")(**config))
    )


SMALL = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
LANGUAGE = {
    "gpt2": lambda: randomized(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=12)
        )
    ),
    "llama": lambda: language("Llama", num_key_value_heads=2, **SMALL),
    "llama tied": lambda: language("Llama", num_key_value_heads=2, tie_word_embeddings=True, **SMALL),
    "gemma": lambda: language("Gemma", num_key_value_heads=2, head_dim=4, pad_token_id=0, **SMALL),
    "qwen3 moe": lambda: qwen3_moe("eager"),
    "qwen3 moe batched": lambda: qwen3_moe("batched_mm"),
}


def next_token(model):
    def losses(x):
        logits = model(input_ids=x).logits[:, :-1]
        return functional.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none").sum(dim=1)

    return losses


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name):
    model = LANGUAGE[name]()
    rtol = 1e-6 if name == "gemma" else 1e-10  # its norms compute in float32, whatever the model's dtype
    check(model, next_token(model), [torch.randint(1, V, (B, T))], rtol=rtol)


def test_experts_in_one_grouped_product():
    """What transformers does by default; it knows no float64."""
    model = qwen3_moe("grouped_mm").float()
    double = qwen3_moe("eager")
    double.load_state_dict(model.state_dict())
    x = torch.randint(1, V, (B, T))
    scores, norms, _ = truth(double, next_token(double), [x])
    scorer = SaliencyScorer(model, reduction="sum", norms=True)
    with scorer:
        next_token(model)(x).sum().backward()
    assert_equal(scorer.scores(), scores, 1e-4)
    assert_equal({"norms": scorer.norms()}, {"norms": norms}, 1e-4)


def qwen3_moe(experts):
    return language(
        "Qwen3Moe",
        num_key_value_heads=2,
        head_dim=4,
        moe_intermediate_size=6,
        num_experts=4,
        num_experts_per_tok=2,
        experts_implementation=experts,
        **SMALL,
    )


def images(model):
    def losses(x, y):
        return functional.cross_entropy(model(x).logits, y, reduction="none")

    return losses


def test_resnet18():
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 6, 8, 10], depths=[2, 2, 2, 2], layer_type="basic", num_labels=3
    )
    model = randomized(transformers.ResNetForImageClassification(config))
    check(model, images(model), [torch.randn(B, 3, 32, 32, dtype=torch.float64), torch.randint(3, (B,))], rtol=1e-9)


def test_vit():
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    model = randomized(transformers.ViTForImageClassification(config))
    check(model, images(model), [torch.randn(B, 3, 8, 8, dtype=torch.float64), torch.randint(3, (B,))])


def checkpointed(model):
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3 moe batched"])
def test_activation_checkpointing(name):
    model = checkpointed(LANGUAGE[name]())
    check(model, next_token(model), [torch.randint(1, V, (B, T))])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_experts_under_activation_checkpointing_are_refused():
    model = checkpointed(LANGUAGE["qwen3 moe"]())
    with SaliencyScorer(model), pytest.raises(UnsupportedLayer, match="activation checkpointing"):
        model(input_ids=torch.randint(1, V, (B, T)))
