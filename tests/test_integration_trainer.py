"""CWRFCallback in transformers' Trainer: what it freezes has the same bits after training, saving and resuming."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import llm_models
import pytest
import torch

import cwfast

pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.usefixtures("without_torchvision"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),  # fp16: the scaler skips the first steps
]

KINDS = ["gpt2", "llama", "qwen3_moe"]
HELD_OUT = llm_models.ids(6, shortest=8, seed=2)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def hub(without_torchvision):
    """The Trainer and what goes with it."""
    import transformers

    from cwfast.integrations import transformers as integration

    return SimpleNamespace(
        Trainer=transformers.Trainer,
        Arguments=transformers.TrainingArguments,
        Callback=integration.CWRFCallback,
        mask_file=integration.MASK_FILE,
        module=integration,
    )


def pair(kind: str, dtype=torch.float32, **config):
    """A model that has moved away from its base."""
    base = llm_models.small(kind, dtype, **config)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model, base


def random_masks(model, rate=0.1):
    return cwfast.select({name: torch.rand(p.shape) for name, p in model.named_parameters()}, rate=rate)


def samples():
    rows = [torch.tensor(row) for row in llm_models.ids(12, shortest=12, longest=12, seed=1)]
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(hub, model, callback, out="out", optimizers=(None, None), **more):
    """Six steps of two batches of three texts, with a checkpoint after the third and the sixth."""
    options = {"max_steps": 6, "save_steps": 3, "logging_steps": 1, "gradient_accumulation_steps": 2}
    options |= {"per_device_train_batch_size": 3, "learning_rate": 5e-3, "weight_decay": 0.1, "use_cpu": True}
    arguments = hub.Arguments(out, **options | {"report_to": [], "disable_tqdm": True} | more)
    return hub.Trainer(
        model,
        arguments,
        train_dataset=samples(),
        eval_dataset=samples(),
        callbacks=callback and [callback],
        optimizers=optimizers,
    )


def assert_equal(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def read(model, checkpoint):
    return type(model).from_pretrained(checkpoint, dtype=model.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_through_training_saving_and_resuming(hub, kind):
    model, base = pair(kind)
    start, masks = copy.deepcopy(model), random_masks(model)
    run = trainer(hub, model, hub.Callback(masks, initial=base))
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    llm_models.assert_held(model, base, masks)
    for step in (3, 6):
        llm_models.assert_held(read(model, f"out/checkpoint-{step}"), base, masks)
        assert cwfast.MaskSet.load(f"out/checkpoint-{step}/{hub.mask_file}") == masks
    again = trainer(hub, start, hub.Callback(masks, initial=base))
    again.train(resume_from_checkpoint="out/checkpoint-3")
    assert again.state.global_step == 6
    llm_models.assert_held(start, base, masks)
    if kind != "qwen3_moe":  # of which transformers 5 resumes no experts: huggingface/transformers#48805
        assert_equal(start, model)


WAYS = {
    "bf16 autocast": {"bf16": True},
    "fp16 autocast": {"fp16": True},
    "checkpointed activations": {"gradient_checkpointing": True},
    "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd", "max_grad_norm": 0.1},
    "noise": {"neftune_noise_alpha": 5.0},
    "bitsandbytes": {"optim": "adamw_bnb_8bit"},
    "best model": {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_frozen_however_the_trainer_trains(hub, way):
    if way == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    model, base = pair("llama", tie_word_embeddings=True)
    masks = random_masks(model)
    trainer(hub, model, hub.Callback(masks, initial=base), **WAYS[way]).train()
    llm_models.assert_held(model, base, masks)
    llm_models.assert_held(read(model, "out/checkpoint-6"), base, masks)


@pytest.mark.parametrize("optimizer", ["adamw_torch_8bit", "adamw_torch_4bit"])
@pytest.mark.slow
def test_frozen_under_optimizers_of_torchao(hub, optimizer):
    pytest.importorskip("torchao")
    model, base = pair("llama")
    masks = random_masks(model)
    trainer(hub, model, hub.Callback(masks, initial=base), optim=optimizer).train()
    llm_models.assert_held(model, base, masks)


@pytest.mark.parametrize("who", ["the Trainer", "the user"])
@pytest.mark.slow
def test_frozen_in_a_compiled_model(hub, who):
    model, base = pair("llama")
    masks = random_masks(model)
    callback = hub.Callback(masks, initial=base)
    if who == "the user":
        compiled = torch.compile(model, backend="aot_eager")
        trainer(hub, compiled, callback, remove_unused_columns=False).train()
    else:
        trainer(hub, model, callback, torch_compile=True, torch_compile_backend="aot_eager").train()
    llm_models.assert_held(model, base, masks)


@pytest.mark.slow
def test_frozen_in_two_processes():
    script = Path(llm_models.__file__).with_name("trainer_ranks.py")
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    environment = os.environ | {"PYTHONPATH": str(script.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr


def test_bfloat16_weights_with_copies_that_are_held_too(hub):
    model, base = pair("llama", torch.bfloat16)
    masks = random_masks(model)
    master = {name: p.detach().float() for name, p in model.named_parameters()}
    average = copy.deepcopy(model)
    trainer(hub, model, hub.Callback(masks, initial=base, also=[master, average])).train()
    llm_models.assert_held(model, base, masks)
    for name, before in base.named_parameters():
        assert torch.equal(master[name][masks[name]], before[masks[name]].float())
        assert torch.equal(average.get_parameter(name)[masks[name]], before[masks[name]])


def test_only_selected_weights_train(hub):
    model, _ = pair("llama")
    base, start, masks = copy.deepcopy(model), copy.deepcopy(model), random_masks(model)

    def run(of, **how):
        optimizer = cwfast.optim.SelectedAdamW(of, masks, lr=5e-3)
        trainer(hub, of, None, optimizers=(optimizer, None)).train(**how)

    run(model)
    changed = {name: p != base.get_parameter(name) for name, p in model.named_parameters()}
    assert not any(changed[name][~masks[name]].any() for name in masks.names)
    assert sum(int(change.sum()) for change in changed.values()) > 0.9 * masks.total
    run(start, resume_from_checkpoint="out/checkpoint-3")
    assert_equal(start, model)


# -- the masks come from scores


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["reference", "scores"])
def test_scores_are_selected_and_rewound_as_by_hand(hub, kind, source):
    """In bfloat16 too: what accelerate puts around the forward pass takes no part in scoring."""
    from cwfast.llm.scoring import score

    model, base = pair(kind)
    base.save_pretrained("base")
    members = [sample["input_ids"] for sample in samples()]
    by_hand = copy.deepcopy(model)
    scores = score(by_hand, base, members, HELD_OUT, batch_size=4)
    masks = cwfast.select(scores, rate=0.02, exclude=["*norm*"])
    cwfast.rewind_(by_hand, masks, base)
    given = {"reference": {"reference": HELD_OUT, "batch_size": 4}, "scores": {"scores": scores}}[source]
    callback = hub.Callback(initial="base", rate=0.02, exclude=["*norm*"], **given)
    trainer(hub, model, callback, learning_rate=0.0, max_steps=1, bf16=source == "reference").train()
    assert callback.masks == masks
    assert_equal(model, by_hand)


def tiny_folders(kind):
    """Writes ``base`` and ``tuned``; the model, and members and held-out texts as ids and as texts."""
    model, base = pair(kind)
    for folder, of in (("base", base), ("tuned", model)):
        of.save_pretrained(folder)
        llm_models.tokenizer().save_pretrained(folder)
    ids = [[sample["input_ids"].tolist() for sample in samples()], HELD_OUT]
    return model, ids, [llm_models.words(rows) for rows in ids]


def smollm2_folders(_):
    """The same of SmolLM2-135M, fine-tuned on docstrings for two steps."""
    llm_models.need_smollm2()
    from transformers import AutoTokenizer

    from cwfast.llm import loading, measuring, smollm, training

    model = loading.local(smollm.base(Path("base")), torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("base")
    short = [text for text in smollm.docstrings() if len(text) < 160]
    texts = [short[:12], short[12:18]]
    ids = [measuring.tokenized(tokenizer, side, None) for side in texts]
    training.fine_tune(model, ids[0], steps=2, lr=2e-4)
    model.save_pretrained("tuned")
    tokenizer.save_pretrained("tuned")
    return model, ids, texts


@pytest.mark.parametrize(
    ("folders", "kind"),
    [
        *((tiny_folders, kind) for kind in KINDS),
        pytest.param(smollm2_folders, "SmolLM2-135M", marks=pytest.mark.slow),
    ],
)
def test_the_same_masks_and_weights_as_by_the_commands(hub, folders, kind, capsys):
    from cwfast.cli import main

    model, (members, held_out), texts = folders(kind)
    for file, some in zip(("members", "held_out"), texts, strict=True):
        Path(f"{file}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    for command in (
        "score tuned --base base --members members.jsonl --reference held_out.jsonl --out scores",
        "select scores --rate 0.02 --out mask.safetensors",
        "rewind tuned --base base --mask mask.safetensors --out fixed",
    ):
        assert main(command.split()) == 0, capsys.readouterr().err
    fixed = read(model, "fixed")
    selected = cwfast.MaskSet.load("mask.safetensors")
    assert selected.total == selected.numel // 50
    found = []
    for how in ({"masks": "mask.safetensors"}, {"reference": held_out, "members": members, "rate": 0.02}):
        callback, own = hub.Callback(initial="base", **how), read(model, "tuned")
        trainer(hub, own, callback, learning_rate=0.0, max_steps=1, save_strategy="no").train()
        assert_equal(own, fixed)
        found.append(callback.masks)
    assert found[0] == found[1]
    assert found[0].total == selected.total
    model.save_pretrained("another")
    with pytest.raises(ValueError, match="initial must be the base that the masks were made with"):
        trainer(hub, read(model, "tuned"), hub.Callback("mask.safetensors", initial="another")).train()


def test_resumed_training_does_not_score_again(hub, monkeypatch):
    model, base = pair("llama")
    start = copy.deepcopy(model)
    rest = {"initial": base, "reference": HELD_OUT, "members": samples(), "rate": 0.02}
    callback = hub.Callback(**rest)
    trainer(hub, model, callback).train()

    def never(*_, **__):
        raise AssertionError("scored again")

    monkeypatch.setattr(hub.module, "score", never)
    resumed = hub.Callback(**rest)
    trainer(hub, start, resumed).train(resume_from_checkpoint=True)  # from the sixth step: nothing left to do
    assert resumed.masks == callback.masks
    trainer(hub, start, hub.Callback(**rest), out="elsewhere", resume_from_checkpoint="out/checkpoint-3").train(
        resume_from_checkpoint="out/checkpoint-3"
    )
    assert_equal(start, model)
    Path(f"out/checkpoint-3/{hub.mask_file}").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-3 holds no cwfast/mask.safetensors; give masks"):
        trainer(hub, start, hub.Callback(**rest)).train(resume_from_checkpoint="out/checkpoint-3")


def test_the_mask_of_another_run_is_not_taken(hub):
    """In output_dir lies a checkpoint of the same step; resumed is one from elsewhere, which no callback is told."""
    model, base = pair("llama")
    start = copy.deepcopy(model)
    rest = {"initial": base, "rate": 0.02}
    scores = [{name: torch.rand(p.shape) for name, p in model.named_parameters()} for _ in range(2)]
    trainer(hub, model, hub.Callback(scores=scores[0], **rest), out="one").train()
    trainer(hub, copy.deepcopy(start), hub.Callback(scores=scores[1], **rest), out="two").train()
    with pytest.raises(ValueError, match=r"the mask in two/checkpoint-3 must be of the checkpoint"):
        trainer(hub, copy.deepcopy(start), hub.Callback(scores=scores[0], **rest), out="two").train(
            resume_from_checkpoint="one/checkpoint-3"
        )
    masks = f"one/checkpoint-3/{hub.mask_file}"
    trainer(hub, start, hub.Callback(masks, initial=base), out="three").train(resume_from_checkpoint="one/checkpoint-3")
    assert_equal(start, model)


def test_resumed_training_must_have_its_masks(hub):
    model, base = pair("llama")
    masks = random_masks(model)
    trainer(hub, model, hub.Callback(masks, initial=base)).train()
    path = f"out/checkpoint-3/{hub.mask_file}"
    trainer(hub, model, hub.Callback(path, initial=base)).train(resume_from_checkpoint="out/checkpoint-3")
    other = masks.random_like(1)
    with pytest.raises(ValueError, match="must have the masks that it began with"):
        trainer(hub, model, hub.Callback(other, initial=base)).train(resume_from_checkpoint="out/checkpoint-3")


def test_several_processes_are_not_scored(hub):
    model, base = pair("llama")
    callback = hub.Callback(initial=base, reference=HELD_OUT, members=HELD_OUT, rate=0.1)
    with pytest.raises(ValueError, match="2 processes would select different masks"):
        callback.on_train_begin(
            SimpleNamespace(world_size=2), SimpleNamespace(global_step=0), None, model=model, train_dataloader=None
        )


# -- what else happens to a run


def test_a_run_that_raises_and_training_again(hub):
    model, base = pair("llama")
    masks, callback = random_masks(model), None

    class Stop(type(hub.Callback(masks)).__mro__[1]):
        def on_step_end(self, *_, **__):
            raise KeyboardInterrupt

    callback = hub.Callback(masks, initial=base)
    run = trainer(hub, model, callback)
    run.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    llm_models.assert_held(model, base, masks)
    run.remove_callback(Stop)
    run.train()
    llm_models.assert_held(model, base, masks)
    run.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    callback.close()
    model.zero_grad()
    model(**{key: row[None] for key, row in samples()[0].items()}).loss.backward()
    assert any(p.grad[masks[name]].any() for name, p in model.named_parameters())  # no hook is left


def test_without_initial_the_weights_are_frozen_as_they_are(hub):
    model, _ = pair("llama")
    before, masks = copy.deepcopy(model), random_masks(model)
    trainer(hub, model, hub.Callback(masks)).train()
    llm_models.assert_held(model, before, masks)


def test_what_is_wrong_is_said(hub):
    model, base = pair("llama")
    masks = random_masks(model)
    scores = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    for match, options in {
        "one of masks, scores and reference must be given; got none": {},
        "got masks, scores": {"masks": masks, "scores": scores},
        "with scores, initial must be given": {"scores": scores, "rate": 0.1},
        "rate must be given with scores and reference": {"scores": scores, "initial": base},
        "only there; got masks": {"masks": masks, "rate": 0.1},
        "members and arguments of score go with reference": {"masks": masks, "members": []},
    }.items():
        with pytest.raises(ValueError, match=match):
            hub.Callback(**options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'crterion'"):
        hub.Callback(reference=HELD_OUT, initial=base, rate=0.1, crterion="gap")
    with pytest.raises(ValueError, match="the model's own memory"):
        trainer(hub, model, hub.Callback(masks, initial=model)).train()
    other = cwfast.select({"weight": torch.rand(3)}, rate=0.5)
    with pytest.raises(ValueError, match="which has no parameter 'weight'"):
        trainer(hub, model, hub.Callback(other)).train()


def test_texts_without_pads(hub):
    texts = hub.module.texts
    padded = {"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0], "labels": [5, 6, 7, -100]}
    found = texts("members", [padded, [3, 4], torch.tensor([8, 9])])
    assert [row.tolist() for row in found] == [[5, 6, 7], [3, 4], [8, 9]]
    with pytest.raises(ValueError, match=r"members\[1\] has labels that hide some"):
        texts("members", [padded, padded | {"labels": [-100, 6, 7, -100]}])
    with pytest.raises(TypeError, match=r"members must be a sequence .* got generator"):
        texts("members", (row for row in [[1, 2]]))
    with pytest.raises(TypeError, match=r"members\[0\] must have input_ids; it has \['text'\]"):
        texts("members", [{"text": "a"}])
    with pytest.raises(ValueError, match=r"members\[0\] must be token ids \[tokens\]; got shape \(1, 2\)"):
        texts("members", [[[1, 2]]])
