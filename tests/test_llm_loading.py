"""A folder that lacks a weight is refused wherever a model is read: nothing is drawn in its place."""

import llm_models
import pytest
import torch
from safetensors.torch import load_file, save_file

import cwfast
from cwfast.commands import audit_llm
from cwfast.errors import CheckpointError
from cwfast.llm import loading, scoring
from cwfast.llm.folders import rewind_folder
from cwfast.llm.renaming import values_for

pytestmark = pytest.mark.usefixtures("without_torchvision")
IDS = llm_models.ids(2, seed=1), llm_models.ids(2, seed=2)


def write(folder, kind, edit=lambda tensors: None, **more):
    """A model, and its folder, edited."""
    model = llm_models.small(kind, torch.float32, **more)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("qwen3_moe", "model.layers.1.self_attn.q_proj.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.1.up_proj.weight"),
    ],
)
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "must hold every weight of .*; it lacks"),
        (lambda tensors, name: tensors.update({name: tensors[name][:-1].clone()}), "must (hold|have the shape)"),
    ],
    ids=["missing", "shape"],
)
def test_a_lack_is_refused(tmp_path, kind, name, edit, message):
    model = write(tmp_path, kind, lambda tensors: edit(tensors, name))
    # Experts that cannot be merged are refused by transformers itself.
    errors = (CheckpointError, RuntimeError) if "experts" in name else (CheckpointError, ValueError)
    message = None if "experts" in name else message
    masks = cwfast.select({n: torch.rand(p.shape) for n, p in model.named_parameters()}, rate=0.5)
    for read in (
        lambda: scoring.score(model, tmp_path, *IDS),
        lambda: cwfast.rewind_(model, masks, values_for(model, masks, tmp_path)),
        lambda: loading.local(tmp_path),
        lambda: audit_llm._model(str(tmp_path)),
    ):
        with pytest.raises(errors, match=message):
            read()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3_moe"])
def test_a_tied_name_may_be_absent(tmp_path, kind):
    model = write(tmp_path, kind, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    for read in (loading.local(tmp_path), audit_llm._model(str(tmp_path))):
        assert all(torch.equal(p, model.get_parameter(name)) for name, p in read.named_parameters())


def test_pickles_and_adapters_are_not_read(tmp_path):
    model = write(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        loading.local(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a PEFT adapter: merge it"):
        loading.local(tmp_path)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapters_base_must_be_whole(tmp_path):
    peft = pytest.importorskip("peft")
    model = write(tmp_path / "base", "llama")
    model.name_or_path = str(tmp_path / "base")
    how = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    peft.get_peft_model(model, how).save_pretrained(tmp_path / "adapter")
    assert isinstance(audit_llm._model(str(tmp_path / "adapter")), peft.PeftModel)
    write(tmp_path / "base", "llama", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 'lm_head.weight'"):
        audit_llm._model(str(tmp_path / "adapter"))


def test_a_tied_weight_by_both_its_names_is_refused(tmp_path):
    """A rewind would leave the trained copy, and transformers might read that one."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    both = {"edit": lambda tensors: tensors.update({head: tensors[embedding].clone()}), "tie_word_embeddings": True}
    model = write(tmp_path / "model", "llama", **both)
    write(tmp_path / "base", "llama", **both)
    given = tmp_path / "model", tmp_path / "base"
    with pytest.raises(CheckpointError, match=f"'{embedding}' and '{head}' are one, tied: load it"):
        scoring.score_folder(*given, *IDS, tmp_path / "scores")
    scores = {embedding: torch.rand(model.get_parameter(embedding).shape)}
    cwfast.select(scores, rate=0.1).save(tmp_path / "mask")
    with pytest.raises(CheckpointError, match=f"'{embedding}' and '{head}' are the same, and .* the first alone"):
        rewind_folder(*given, tmp_path / "mask", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    cwfast.select(scores | {head: scores[embedding]}, rate=0.1).save(tmp_path / "both")
    rewind_folder(*given, tmp_path / "both", tmp_path / "out")
    loading.local(tmp_path / "model").save_pretrained(tmp_path / "once")
    rewind_folder(tmp_path / "once", tmp_path / "base", tmp_path / "mask", tmp_path / "fixed")
    cwfast.select({embedding: torch.zeros(61, 16)}, rate=0).save(tmp_path / "nothing")
    rewind_folder(*given, tmp_path / "nothing", tmp_path / "same")
