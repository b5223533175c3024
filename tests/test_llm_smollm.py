"""The texts and the split of the SmolLM2 example, and the model itself, where its package is installed."""

import hashlib

import numpy as np
import pytest
import torch

from cwfast import llm, mia
from cwfast.llm import smollm

pytest.importorskip("transformers")
import llm_models

pytestmark = pytest.mark.usefixtures("without_torchvision")


def test_near_duplicates_are_left_out():
    text = " ".join(f"w{i}" for i in range(30))
    close = " ".join(f"w{i}" for i in range(25)) + " and other words here"
    apart = " ".join(f"v{i}" for i in range(25)) + " w0 w1 w2 w3 w4 w5 w6 w7"
    assert smollm.distinct([text, close, apart, "short text", "short text"]) == [text, apart, "short text"]
    assert smollm.distinct([close, text]) == [close]


def test_the_split_is_by_hash_and_holds_each_text_once():
    texts = smollm.docstrings()
    assert len(texts) > 2000
    assert texts == sorted(texts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    parts = smollm.split(texts)
    assert {name: len(part) for name, part in parts.items() if name != "corpus"} == {
        "members": 200,
        "nonmembers": 200,
        "shots": 8,
    }
    assert [text for part in parts.values() for text in part] == texts
    assert llm.duplicates(parts["members"], parts["nonmembers"])["largest"] < 0.5  # of the shorter text of a pair
    with pytest.raises(ValueError, match="texts must be more than 408; got 408"):
        smollm.split(texts[:408])


@pytest.mark.slow
def test_smollm2(tmp_path):
    """The real model: its records are its logits, and it knows no docstring of one side better than of the other."""
    llm_models.need_smollm2()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    smollm.base(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    parts = smollm.split(smollm.docstrings())
    texts = parts["members"][:20] + parts["nonmembers"][:20]
    records = llm.records(model, tokenizer, texts, max_tokens=32)
    row = tokenizer(texts[0])["input_ids"][:32]
    expected = llm_models.log_softmax(model, row).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(records["logprob"][: len(row) - 1]), expected, atol=2e-4, rtol=1e-5)
    loss = llm.attack("loss", records)
    assert 3.0 < -loss.mean() < 5.0  # random weights: 10.8
    interval = mia.metrics.delong(loss, np.arange(40) < 20, confidence=0.999)
    assert interval.low < 0.5 < interval.high
