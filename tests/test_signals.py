"""Signals: made from logits, written and read whole, refused where they are not what a plan says."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cwfast import ops
from cwfast.errors import CheckpointError
from cwfast.mia import Signals

MANIFEST = {"model": "mlp", "data": "0" * 64, "defense": "none", "seeds": [1, 2, 3, 4]}


def make(queries=2, **more):
    torch.manual_seed(0)
    logits = torch.randn(4, 10, queries, 3, dtype=torch.float64) if queries else torch.randn(4, 10, 3)
    labels = torch.randint(3, (10,))
    member = (torch.arange(4)[:, None] + torch.arange(10)) % 2 == 0
    return logits, labels, member, Signals.from_logits(logits, labels, member, manifest=MANIFEST, **more)


@pytest.mark.parametrize("queries", [None, 1, 3])
def test_from_logits_is_logit_stats_of_every_model_and_query(queries):
    logits, labels, member, signals = make(queries)
    for k, q in np.ndindex(4, queries or 1):
        stats = ops.logit_stats(logits[k] if queries is None else logits[k, :, q], labels)
        for name, value in stats._asdict().items():
            assert torch.equal(signals[name][k, :, q], value)
    assert torch.equal(signals["logprob"], -signals["loss"])
    assert torch.equal(signals.membership, member)
    assert torch.equal(signals.ids, torch.arange(10))
    assert torch.equal(Signals.from_logits(logits, labels, member.numpy()).membership, member)


def test_round_trip_and_hash(tmp_path):
    signals = make(ids=torch.arange(10) * 7)[3]
    signals.save(tmp_path / "s.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
    again = Signals.load(tmp_path / "s.safetensors")
    assert again.manifest == MANIFEST
    assert again.sha256 == signals.sha256
    for name, value in signals.values.items():
        assert torch.equal(again.values[name], value)
    assert torch.equal(again.ids, signals.ids)
    assert torch.equal(again.labels, signals.labels)
    changed = [
        Signals(signals.values, ~signals.membership, signals.labels, signals.ids, MANIFEST),
        Signals(signals.values, signals.membership, signals.labels, signals.ids, MANIFEST | {"seeds": [1, 2, 3, 5]}),
        Signals({k: v + 1 if k == "phi" else v for k, v in signals.values.items()}, signals.membership),
    ]
    assert len({signals.sha256, *(one.sha256 for one in changed)}) == 4


def test_files_that_are_not_signals_are_refused(tmp_path):
    signals, path = make()[3], tmp_path / "s.safetensors"
    with pytest.raises(FileNotFoundError, match="there is none at"):
        Signals.load(path)
    path.write_bytes(b"not a file")
    with pytest.raises(CheckpointError, match="must be a safetensors file"):
        Signals.load(path)
    save_file({"phi": torch.zeros(1, 1, 1)}, path)
    with pytest.raises(CheckpointError, match="must say format cwfast-signals/1; got None"):
        Signals.load(path)
    signals.save(path)
    header = {"format": "cwfast-signals/1", "manifest": json.dumps(MANIFEST), "sha256": signals.sha256}
    tensors = load_file(path)
    cases = [
        (tensors | {"phi": tensors["phi"] + 1}, header, "SHA-256 differs"),
        (tensors, header | {"manifest": "{}"}, "SHA-256 differs"),
        (tensors, header | {"manifest": "{"}, "must hold signals"),
        (tensors, header | {"manifest": "[" * 100_000}, "must hold signals"),
        ({k: v for k, v in tensors.items() if k != "membership"}, header, "it has no membership"),
        (tensors | {"extra": tensors["phi"].clone()}, header, "must be named"),
        (tensors | {"labels": tensors["labels"][:3].clone()}, header, "labels must be int64"),
    ]
    for content, metadata, message in cases:
        save_file(content, path, metadata)
        with pytest.raises(CheckpointError, match=message):
            Signals.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    signals, path = make()[3], tmp_path / "s.safetensors"
    signals.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        signals.save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_plan_that_is_kept_and_each_way_not_to():
    _, labels, member, signals = make()
    signals.require({"membership": member, "labels": labels.numpy(), "seeds": (1, 2, 3, 4), "model": "mlp"})
    other = member.clone()
    other[0, :2] = ~other[0, :2]
    for plan, message in [
        ({"membership": other}, "membership must be the plan's; got 2 entries that differ"),
        ({"membership": member[:3]}, r"membership must be the plan's, \(3, 10\); got \(4, 10\)"),
        ({"defense": "relaxloss"}, "defense must be 'relaxloss', the plan's; got 'none'"),
        ({"rate": 0.1}, "manifest must say 'rate'"),
        ({"ids": torch.arange(1, 11)}, "ids must be the plan's; got 10 entries that differ"),
    ]:
        with pytest.raises(ValueError, match=message):
            signals.require(plan)
    with pytest.raises(ValueError, match=r"labels must be the plan's, \(10,\); got None"):
        Signals(signals.values, member).require({"labels": labels})


VALUES = {"phi": torch.zeros(2, 3, 1)}
MEMBER = torch.zeros(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({}, MEMBER), ValueError, "at least one of loss, .*; got none"),
        (({"phi": torch.zeros(2, 3)}, MEMBER), ValueError, r"shape \[K, N, Q\], none of them 0; got \(2, 3\)"),
        (({"psi": torch.zeros(2, 3, 1)}, MEMBER), ValueError, "named loss, .*; got 'psi'"),
        (({"phi": torch.zeros(2, 3, 1, dtype=torch.int64)}, MEMBER), TypeError, "phi must have a floating-point dtype"),
        (({"correct": torch.zeros(2, 3, 1)}, MEMBER), TypeError, "correct must have dtype bool; got torch.float32"),
        (({**VALUES, "loss": torch.zeros(2, 3, 2)}, MEMBER), ValueError, "loss must have the shape of the others"),
        ((VALUES, MEMBER.T), ValueError, r"membership must be bool \[K, N\] = \(2, 3\); got torch.bool \(3, 2\)"),
        ((VALUES, MEMBER, torch.zeros(3)), ValueError, "labels must be int64"),
        ((VALUES, MEMBER, None, torch.tensor([1, 1, 2])), ValueError, "ids must be distinct; got 1 repeats"),
        ((VALUES, MEMBER, None, None, {"x": torch.zeros(1)}), TypeError, "not JSON serializable"),
    ],
)
def test_what_signals_must_hold(arguments, error, message):
    with pytest.raises(error, match=message):
        Signals(*arguments)


def test_wrong_logits():
    logits, labels, member, signals = make()
    with pytest.raises(ValueError, match=r"logits must have shape .*; got \(10, 3\)"):
        Signals.from_logits(logits[0, :, 0], labels, member)
    with pytest.raises(ValueError, match=r"labels must have shape \[N\] = \[10\]; got \(4,\)"):
        Signals.from_logits(logits, labels[:4], member)
    logits[1, 2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite largest logit in each row; got 1 rows without"):
        Signals.from_logits(logits, labels, member)
    with pytest.raises(KeyError, match="must hold 'gradient_norm' for that; they hold loss"):
        signals["gradient_norm"]
