"""Token records: each number against plain logits, whatever the padding, batch, window, shard or architecture."""

import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from cwfast import llm
from cwfast.errors import CheckpointError, UnsupportedLayer
from cwfast.llm import heads, recording, storage, windows

pytest.importorskip("transformers")
import llm_models

pytestmark = pytest.mark.usefixtures("without_torchvision")
KINDS = ["gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma2", "mixtral", "qwen3_moe", "granite", "cohere", "bloom"]
ROWS = llm_models.ids(9)


def truth(model, rows):
    """{name: [T]} of all rows, by the definitions, one text at a time."""
    found = {"logprob": [], "mean": [], "variance": [], "entropy": [], "rank": [], "correct": []}
    for row in rows:
        logp = llm_models.log_softmax(model, row)
        target = torch.tensor(row[1:])[:, None]
        own = logp.gather(1, target)
        p = logp.exp()
        mean = (p * logp).sum(1)
        found["logprob"].append(own[:, 0])
        found["mean"].append(mean)
        found["variance"].append((p * (logp - mean[:, None]) ** 2).sum(1))
        found["entropy"].append(-mean)
        found["rank"].append((logp > own).sum(1).double())
        found["correct"].append((logp.argmax(1) == target[:, 0]).double())
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def assert_close(records, expected, atol=1e-10):
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(records[name]), torch.tensor(value), atol=atol, rtol=atol)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_and_padding_side_against_plain_logits(kind, padding):
    rough = padding == "left" and kind in ("gemma2", "bloom")  # in float64 they have NaN at pads, which spread
    model = llm_models.small(kind, torch.float32 if rough else torch.float64)
    got = llm.records(model, None, ROWS, padding=padding, batch_tokens=70)
    assert got.lengths.tolist() == [len(row) - 1 for row in ROWS]
    assert got.tokens.tolist() == [token for row in ROWS for token in row[1:]]
    assert_close(got, truth(model, ROWS), 1e-5 if rough or kind == "gemma2" else 1e-10)  # its softmax is in float32


def test_a_model_without_an_answer_is_told():
    with pytest.raises(ValueError, match=r"logprob of text \d has NaN, which some models have"):
        llm.records(llm_models.small("gemma2"), None, ROWS, padding="left")
    broken = llm_models.small("llama")
    with torch.no_grad():
        broken.model.embed_tokens.weight[ROWS[4][0]] = torch.nan
    rows = [row for i, row in enumerate(ROWS) if i == 4 or ROWS[4][0] not in row]
    place = rows.index(ROWS[4])
    with pytest.raises(ValueError, match=rf"reference.logprob of text {place} has NaN"):
        llm.records(llm_models.small("llama"), None, rows, reference=broken)


@pytest.mark.parametrize(
    "how",
    [
        {"batch_tokens": 1},
        {"batch_tokens": 23},
        {"batch_tokens": 10**6, "padding": "left"},
        {"max_length": 20, "stride": 1},
        {"max_length": 20, "stride": 19, "batch_tokens": 45},
        {"shard_tokens": 1},
        {"shard_tokens": 30, "padding": "left"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_whole_records_agree_however_they_are_batched(how, dtype, atol):
    model = llm_models.small("llama", dtype)
    one = llm.records(model, None, ROWS, batch_tokens=10**6)
    other = llm.records(model, None, ROWS, **how)
    assert torch.equal(one.offsets, other.offsets)
    assert torch.equal(one.tokens, other.tokens)
    assert list(one.values) == list(other.values)
    assert one["logprob"].dtype == "float64"
    assert one.values["logprob"].dtype == dtype
    for name in one.values:
        torch.testing.assert_close(torch.tensor(one[name]), torch.tensor(other[name]), atol=atol, rtol=atol)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_no_prediction_of_a_pad_and_none_shifted_by_one(padding):
    """A model that surely predicts token t + 1 after token t: each shift or pad that is scored shows as a miss."""
    model = llm_models.small("gpt2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        size = 16  # tokens 3 .. 18 are unit vectors, of which LayerNorm keeps the direction
        model.transformer.wte.weight[3 : 3 + size] = torch.eye(size, dtype=torch.float64)
    model.lm_head = nn.Linear(size, llm_models.VOCABULARY, bias=False).double()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        for token in range(3, 3 + size - 1):
            model.lm_head.weight[token + 1, token - 3] = 100.0
    rows = [list(range(3, 3 + n)) for n in (2, 9, 5, 16, 3)]
    got = llm.records(model, None, rows, padding=padding)
    assert got.lengths.tolist() == [1, 8, 4, 15, 2]
    assert got["correct"].all()
    assert got["logprob"].min() > -1e-6
    shifted = [[*row[:-1], row[0]] for row in rows]  # the last token is wrong, and only it
    assert llm.records(model, None, shifted, padding=padding)["correct"].sum() == got.lengths.sum() - len(rows)


@pytest.mark.parametrize(("length", "stride"), [(5, 1), (5, 4), (8, 3), (2, 1), (7, None)])
def test_long_documents_are_read_in_windows_and_each_token_scored_once(length, stride):
    model = llm_models.small("llama")
    rows = llm_models.ids(4, 2, 31, seed=2)
    got = llm.records(model, None, rows, max_length=length, stride=stride, batch_tokens=40)
    step = length // 2 if stride is None else stride
    expected = []
    for row in rows:
        for t in range(1, len(row)):
            start = 0
            while t >= start + length:  # the first window that holds it
                start += step
            expected.append(llm_models.log_softmax(model, row[start : t + 1])[-1, row[t]])
    torch.testing.assert_close(torch.tensor(got["logprob"]), torch.stack(expected), atol=1e-10, rtol=1e-10)


def test_windows_of_every_length_and_stride_score_each_token_once_after_its_predecessor():
    for size in range(2, 14):
        document = windows.Document(list(range(size)), 1)
        for length in range(2, 9):
            for stride in range(1, length):
                made = windows.windows([document], [0], length, stride)
                scored = [t for window in made for t in range(window.first, window.stop)]
                assert scored == list(range(1, size))
                assert all(w.start <= w.first - 1 and w.stop - w.start <= length for w in made)


def test_bos_is_context_and_then_the_first_token_is_scored():
    model = llm_models.small("llama")
    with_bos = llm.records(model, None, ROWS, bos=True)
    assert with_bos.lengths.tolist() == [len(row) for row in ROWS]
    assert_close(with_bos, truth(model, [[1, *row] for row in ROWS]))
    texts = llm_models.words(ROWS)
    plain, adding = llm_models.tokenizer(), llm_models.tokenizer(bos=True)
    assert llm.records(model, plain, texts).lengths.sum() == sum(len(row) - 1 for row in ROWS)
    for got in (llm.records(model, adding, texts), llm.records(model, plain, texts, bos=True)):
        assert_close(got, {"logprob": with_bos["logprob"]}, atol=0)
    off = llm.records(model, adding, texts, bos=False)
    assert_close(off, truth(model, ROWS))


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_is_context_alone_and_read_once(kind, padding):
    model = llm_models.small(kind, torch.float32 if kind in ("gemma2", "bloom") else torch.float64)
    prefix = llm_models.ids(1, 14, 14, seed=6)[0]  # longer than the sliding window of gemma2
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    got = llm.records(model, None, ROWS, prefix=prefix, padding=padding, batch_tokens=200)
    hook.remove()
    expected = [llm_models.log_softmax(model, prefix + row)[len(prefix) - 1 :] for row in ROWS]
    own = [logp.gather(1, torch.tensor(row)[:, None])[:, 0] for logp, row in zip(expected, ROWS, strict=True)]
    assert got.lengths.tolist() == [len(row) for row in ROWS]
    rough = kind in ("gemma2", "bloom")
    assert_close(got, {"logprob": torch.cat(own).numpy()}, 1e-5 if rough else 1e-10)
    again = len(prefix) - 1 if padding == "left" else 0
    assert max(length for rows, length in seen if rows > 1) == again + 1 + max(map(len, ROWS))


def test_a_cache_that_changes_what_follows_is_not_used(monkeypatch):
    model = llm_models.small("llama")
    prefix = [7, 8, 9, 10, 11]
    expected = llm.records(model, None, ROWS, prefix=prefix)
    call = heads.Body._call

    def scaled(self, ids, mask, past=None):
        if past is not None and past.get_seq_length():
            ids = ids.flip(1)
        return call(self, ids, mask, past)

    monkeypatch.setattr(heads.Body, "_call", scaled)
    assert_close(llm.records(model, None, ROWS, prefix=prefix), {"logprob": expected["logprob"]})


def test_a_prefix_leaves_room_for_the_text():
    match = r"prefix and text must fit into max_length = 10 tokens together; text \d needs"
    with pytest.raises(ValueError, match=match):
        llm.records(llm_models.small("gpt2"), None, ROWS, prefix=[7, 8, 9], max_length=10)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_is_near_and_recorded(dtype):
    model, other = llm_models.small("llama", torch.float32), llm_models.small("gpt2", torch.float32)
    plain = llm.records(model, None, ROWS, reference=other, kl=True)
    cast = llm.records(model, None, ROWS, reference=other, kl=True, autocast=dtype)
    for name in ("logprob", "reference.logprob", "kl"):
        difference = abs(plain[name] - cast[name])
        assert 0 < difference.max() < 0.3
        assert difference.mean() < 0.03
    assert (plain.manifest["autocast"], cast.manifest["autocast"]) == (None, "bfloat16")
    with pytest.raises(ValueError, match=r"autocast must be None, torch.bfloat16 or torch.float16; got torch.int8"):
        llm.records(model, None, ROWS, autocast=torch.int8)


def test_max_tokens_cuts_texts_and_what_zlib_sees():
    model, tokenizer = llm_models.small("llama"), llm_models.tokenizer()
    texts = llm_models.words(ROWS)
    got = llm.records(model, tokenizer, texts, max_tokens=4)
    assert got.lengths.tolist() == [min(len(row), 4) - 1 for row in ROWS]
    expected = [len(zlib.compress(" ".join(text.split()[:4]).encode())) for text in texts]
    assert got.zlib.tolist() == expected
    assert llm.records(model, tokenizer, texts).zlib.tolist() == [len(zlib.compress(text.encode())) for text in texts]


def test_a_reference_and_its_divergence():
    model, other = llm_models.small("llama"), llm_models.small("gpt2")
    got = llm.records(model, None, ROWS, reference=other, kl=True, topk=5)
    assert_close(got, truth(model, ROWS))
    assert_close(got, {f"reference.{name}": value for name, value in truth(other, ROWS).items()})
    kl, top = [], []
    for row in ROWS:
        p, q = llm_models.log_softmax(model, row), llm_models.log_softmax(other, row)
        kl.append((q.exp() * (q - p)).sum(1))
        top.append(p.topk(5))
    assert_close(got, {"kl": torch.cat(kl).numpy(), "topk_logprob": torch.cat([t.values for t in top]).numpy()})
    assert got.values["topk_index"].tolist() == torch.cat([t.indices for t in top]).tolist()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_adapters_and_the_base_as_reference():
    peft = pytest.importorskip("peft")
    base = llm_models.small("llama")
    expected = truth(base, ROWS)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    tuned = peft.get_peft_model(base, config)
    got = llm.records(tuned, None, ROWS, reference="base", kl=True)
    assert_close(got, {f"reference.{name}": value for name, value in expected.items()})
    assert_close(got, truth(tuned, ROWS))
    assert abs(got["logprob"] - got["reference.logprob"]).max() > 1e-3
    assert got.manifest["model"] != got.manifest["reference"]
    with pytest.raises(TypeError, match='reference="base" needs a PEFT model'):
        llm.records(llm_models.small("llama"), None, ROWS, reference="base")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_with_a_head_of_its_own():
    peft = pytest.importorskip("peft")
    base = llm_models.small("llama")
    expected = truth(base, ROWS)
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        tuned.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
    got = llm.records(tuned, None, ROWS, reference="base")
    assert_close(got, truth(tuned, ROWS))
    assert_close(got, {f"reference.{name}": value for name, value in expected.items()})


def test_a_device_map_spreads_the_model(tmp_path):
    pytest.importorskip("accelerate")
    import transformers

    llm_models.small("llama", torch.float32).save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    mapped = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map={"": "cpu"})
    one, other = llm.records(plain, None, ROWS), llm.records(mapped, None, ROWS)
    assert one.manifest["model"] == other.manifest["model"]
    assert_close(other, {"logprob": one["logprob"]}, atol=0)


def test_the_model_is_left_as_it_was():
    model = llm_models.small("mixtral").train()
    model.model.layers[0].eval()
    before = [(name, module.training) for name, module in model.named_modules()]
    llm.records(model, None, ROWS)
    assert [(name, module.training) for name, module in model.named_modules()] == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_logits_are_never_made_for_tokens(monkeypatch):
    model = llm_models.small("llama")
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    monkeypatch.setattr(heads.Body, "check", lambda self, ids: None)  # which makes those of 8 tokens
    llm.records(model, None, ROWS)
    assert seen
    assert all(shape[1] == 0 for shape in seen)


def test_saved_and_loaded_and_selected(tmp_path):
    got = llm.records(llm_models.small("llama"), llm_models.tokenizer(), llm_models.words(ROWS), topk=3)
    got.save(tmp_path / "r")
    back = llm.TokenRecords.load(tmp_path / "r")
    assert back.manifest == json.loads(json.dumps(got.manifest))
    assert torch.equal(back.zlib, got.zlib)
    for name, value in got.values.items():
        assert torch.equal(back.values[name], value)
    some = back.select([4, 1])
    assert some.lengths.tolist() == [back.lengths[4], back.lengths[1]]
    start, end = back.offsets[4:6].tolist()
    assert torch.equal(some.values["rank"][: end - start], back.values["rank"][start:end])
    with pytest.raises(FileNotFoundError):
        llm.TokenRecords.load(tmp_path)


@pytest.mark.parametrize("damage", ["flip", "cut", "index", "elsewhere"])
def test_damaged_files_are_told(tmp_path, damage):
    llm.records(llm_models.small("llama"), None, ROWS, out=tmp_path, shard_tokens=30)
    file = tmp_path / storage.shard_name(1)
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-40])
    else:
        index = tmp_path / storage.INDEX
        text = index.read_text()
        index.write_text(text[:-9] if damage == "index" else text.replace("shard-00001", "../shard-00001"))
    with pytest.raises(CheckpointError, match="must"):
        llm.TokenRecords.load(tmp_path)
    if damage in ("flip", "cut"):
        with pytest.raises(CheckpointError, match="shard-00001"):
            llm.records(llm_models.small("llama"), None, ROWS, out=tmp_path, shard_tokens=30)


KILLED = """
import os, signal, sys, torch
import transformers.utils.import_utils as utils
available = utils._is_package_available
utils._is_package_available = lambda name, **o: (False, "N/A") if name == "torchvision" else available(name, **o)
utils.is_torchvision_available.cache_clear()
sys.path.insert(0, {tests!r})
import llm_models
from cwfast import llm
from cwfast.llm import storage
write, count = storage.write_shard, []
def killing(*args):
    write(*args)
    count.append(1)
    if len(count) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
storage.write_shard = killing
llm.records(llm_models.small("llama"), None, llm_models.ids(9), out={out!r}, shard_tokens=20)
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    out = tmp_path / "out"
    code = KILLED.format(tests=str(Path(__file__).parent), out=str(out))
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(os.listdir(out)) == [storage.shard_name(0), storage.shard_name(1)]
    model = llm_models.small("llama")
    computed = []
    shard = recording._Run.shard
    monkeypatch.setattr(
        recording._Run,
        "shard",
        lambda self, found, chosen, sizes: computed.append(1) or shard(self, found, chosen, sizes),
    )
    resumed = llm.records(model, None, ROWS, out=out, shard_tokens=20)
    total = len(list(out.glob("shard-*")))
    assert total >= 4
    assert len(computed) == total - 2
    whole = llm.records(model, None, ROWS, out=tmp_path / "whole", shard_tokens=20)
    for name in whole.values:
        assert torch.equal(resumed.values[name], whole.values[name])
    assert torch.equal(llm.TokenRecords.load(out).values["logprob"], whole.values["logprob"])
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    with pytest.raises(CheckpointError, match="must be of this run"):
        llm.records(model, None, ROWS, out=out, shard_tokens=20)


def test_tokens_put_before_the_text_are_refused(monkeypatch):
    """As prompt tuning does: each hidden state would be taken for that of a later token."""
    model = llm_models.small("llama")
    real = model.model.forward

    def longer(*args, **kwargs):
        found = real(*args, **kwargs)
        found.last_hidden_state = torch.cat([found.last_hidden_state[:, :2], found.last_hidden_state], dim=1)
        return found

    monkeypatch.setattr(model.model, "forward", longer)
    with pytest.raises(UnsupportedLayer, match="must see a hidden state per token"):
        llm.records(model, None, llm_models.ids(3))


def test_the_fingerprint_sees_a_single_weight():
    model = llm_models.small("llama")
    before = heads.Body(model).fingerprint()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-9
    assert heads.Body(model).fingerprint() != before


def test_what_is_refused():
    model, tokenizer = llm_models.small("llama"), llm_models.tokenizer()
    for error, match, call in [
        (TypeError, "causal language model", lambda: llm.records(nn.Linear(2, 2), None, ROWS)),
        (TypeError, "tokenizer must be given for texts", lambda: llm.records(model, None, ["w3 w4"])),
        (TypeError, "a single str", lambda: llm.records(model, tokenizer, "w3 w4")),
        (ValueError, "texts must hold at least one", lambda: llm.records(model, tokenizer, [])),
        (ValueError, "text 1 has 1 in all", lambda: llm.records(model, tokenizer, ["w3 w4", "w5"])),
        (
            ValueError,
            "stride must lie in 1 .. max_length - 1 = 7; got 8",
            lambda: llm.records(model, None, ROWS, max_length=8, stride=8),
        ),
        (ValueError, "padding must be", lambda: llm.records(model, None, ROWS, padding="up")),
        (ValueError, "kl=True needs a reference", lambda: llm.records(model, None, ROWS, kl=True)),
        (ValueError, "reference must be a model", lambda: llm.records(model, None, ROWS, reference="gpt2")),
    ]:
        with pytest.raises(error, match=match):
            call()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UnsupportedLayer, match="weight"):
        llm.records(model, None, ROWS)


def test_logits_that_are_not_the_heads_are_refused():
    model = llm_models.small("llama")
    model.register_forward_hook(lambda module, args, out: setattr(out, "logits", out.logits * 1.1))
    with pytest.raises(UnsupportedLayer, match="must be its LM head's"):
        llm.records(model, None, ROWS)
