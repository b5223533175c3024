"""Whole models, built from their configuration: scores, norms and gradients of every parameter, in float64."""

import pytest
import torch
from layer_truth import check
from torch import nn
from torch.nn import functional

transformers = pytest.importorskip("transformers")
import_utils = transformers.utils.import_utils
B, T, V = 4, 9, 31


@pytest.fixture(scope="module", autouse=True)
def without_torchvision():
    """No image is read here, and a torchvision that was built for another torch breaks the import of the models."""
    available = import_utils._is_package_available
    import_utils._is_package_available = lambda name, **options: (
        (False, "N/A") if name == "torchvision" else available(name, **options)
    )
    caches = (import_utils.is_torchvision_available, import_utils.is_torchvision_v2_available)
    for cache in caches:
        cache.cache_clear()
    yield
    import_utils._is_package_available = available
    for cache in caches:
        cache.cache_clear()


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
    "qwen3 moe": lambda: language(
        "Qwen3Moe",
        num_key_value_heads=2,
        head_dim=4,
        moe_intermediate_size=6,
        num_experts=4,
        num_experts_per_tok=2,
        **SMALL,
    ),
    "qwen3 moe eager": lambda: language(
        "Qwen3Moe",
        num_key_value_heads=2,
        head_dim=4,
        moe_intermediate_size=6,
        num_experts=4,
        num_experts_per_tok=2,
        experts_implementation="eager",
        **SMALL,
    ),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name):
    model = LANGUAGE[name]()

    def losses(x):
        logits = model(input_ids=x).logits[:, :-1]
        return functional.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none").sum(dim=1)

    check(model, losses, [torch.randint(1, V, (B, T))])


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


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradient_checkpointing(name):
    model = LANGUAGE[name]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    model.train()
    for p in (model.config,):
        for key in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
            if hasattr(p, key):
                setattr(p, key, 0.0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def losses(x):
        logits = model(input_ids=x).logits[:, :-1]
        return functional.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none").sum(dim=1)

    check(model, losses, [torch.randint(1, V, (B, T))])
