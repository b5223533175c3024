"""The checkpoint reader, and what is rewound, frozen and scored by files that it reads."""

import contextlib
import json
import os
import struct

import pytest
import torch
from folders import write_folder
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from cwfast import MaskSet, SaliencyScorer, freeze, rewind_, select
from cwfast.checkpoint import Checkpoint, reader
from cwfast.errors import CheckpointError

INDEX = reader.INDEX


TENSORS = {
    "a": torch.arange(200_003, dtype=torch.float32),
    "b": torch.randn(3, 5).bfloat16(),
    "c": torch.tensor(7, dtype=torch.int64),
    "d": torch.empty(0, 4),
    "e": torch.randn(130, 1000).half(),
}


@pytest.mark.parametrize("form", ["file", "index", "folder", "symlinks"])
def test_reads_what_was_written(tmp_path, form):
    if form == "file":
        path = tmp_path / "x.safetensors"
        save_file(TENSORS, path)
    else:
        path = write_folder(tmp_path / "folder", TENSORS)
        if form == "folder":
            (path / INDEX).unlink()
        elif form == "symlinks":
            (tmp_path / "blobs").mkdir()
            for i, file in enumerate(sorted(path.glob("*"))):
                file.rename(tmp_path / "blobs" / str(i))
                file.symlink_to(tmp_path / "blobs" / str(i))
    found = Checkpoint(path)
    assert set(found.entries) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert name in found
        assert found.shapes[name] == tuple(tensor.shape)
        assert found.tensor(name).dtype == tensor.dtype
        assert torch.equal(found.tensor(name), tensor)
        parts = list(found.pieces(name, 65_536))
        assert [len(p) for p in parts[:-1]] == [65_536] * (len(parts) - 1)
        assert torch.equal(torch.cat([torch.empty(0, dtype=tensor.dtype), *parts]), tensor.reshape(-1))


def test_tied_names_of_the_metadata_stand_for_their_tensor(tmp_path):
    save_file({"embed": torch.ones(3)}, tmp_path / "x.safetensors", metadata={"head": "embed", "format": "pt"})
    found = Checkpoint(tmp_path / "x.safetensors")
    assert set(found.entries) == set(found.shapes) == {"embed"}
    assert "head" in found
    assert "format" not in found
    assert found.entry("head") == found.entry("embed")
    assert torch.equal(found.tensor("head"), torch.ones(3))


def test_metadata_that_names_a_tensor_adds_none_to_a_selection_or_a_mask_file(tmp_path):
    torch.manual_seed(0)
    scores = {"scores": torch.rand(100), "w": torch.rand(50)}
    save_file(scores, tmp_path / "x.safetensors", metadata={"kind": "scores", "best": "w"})
    found = select(tmp_path / "x.safetensors", rate=0.1)
    assert found.names == ["scores", "w"]
    assert found.total == 15
    masks = MaskSet.from_masks({"w": scores["w"] < 0.5})
    masks.save(tmp_path / "masks.safetensors")
    with safe_open(tmp_path / "masks.safetensors", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, tmp_path / "more.safetensors", metadata=metadata | {"x": next(iter(tensors))})
    assert MaskSet.load(tmp_path / "more.safetensors") == masks


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", ".x.safetensors", "x.bin",
    "C:x.safetensors",
     "sub\\x.safetensors", "x\0.safetensors", "missing.safetensors", 3, None, ["x.safetensors"]],
    ids=repr,
)  # fmt: skip
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, file):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub", folder):
        save_file({"a": torch.ones(1)}, place / "x.safetensors")
    save_file({"a": torch.ones(1)}, folder / ".x.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="must name"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"weight_map": []}', '{"weight_map": {}}', "{}", "[" * 10**5, "\xff"]
)
def test_a_broken_index_is_refused(tmp_path, text):
    write_folder(tmp_path / "folder", TENSORS)
    (tmp_path / "folder" / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match="must"):
        Checkpoint(tmp_path / "folder")


def test_index_and_shards_must_agree(tmp_path):
    folder = write_folder(tmp_path / "folder", TENSORS)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["z"] = "model-0.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-0\.safetensors must hold 'z'"):
        Checkpoint(folder)
    (folder / INDEX).unlink()
    save_file({"a": torch.ones(1)}, folder / "more.safetensors")
    with pytest.raises(CheckpointError, match="'a' is in several files"):
        Checkpoint(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds neither"):
        Checkpoint(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        Checkpoint(tmp_path / "nowhere.safetensors")


def test_what_is_no_safetensors_file_is_named(tmp_path):
    """The mistakes that are made most often."""
    torch.save({"weight": torch.ones(2)}, tmp_path / "x.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    (tmp_path / "folder.safetensors").mkdir()
    masks = MaskSet.from_masks({"weight": torch.ones(1, 2, dtype=torch.bool)})
    for path, what in (("x.pt", r"torch\.save"), ("old.bin", r"torch\.save"), ("x.gguf", "GGUF")):
        with pytest.raises(CheckpointError, match=f"{path} must be a safetensors file; .*{what}"):
            rewind_(nn.Linear(2, 1, bias=False), masks, tmp_path / path)
        with pytest.raises(CheckpointError, match=f"{path} must be a safetensors file; .*{what}"):
            MaskSet.load(tmp_path / path)
    with pytest.raises(CheckpointError, match=r"must be a mask file.*it is a folder"):
        MaskSet.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"folder\.safetensors must be a safetensors file; it is a folder"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="/dev/null must be a safetensors file; it is a device"):
        Checkpoint("/dev/null")


@pytest.mark.parametrize("shape", [[0, 2**63], [0, 2**62, 4]])
def test_sizes_that_a_size_0_hides(tmp_path, shape):
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="below 2\\*\\*62 entries"):
        Checkpoint(tmp_path / "x.safetensors")


def test_a_huge_index_is_refused_unread(tmp_path):
    folder = write_folder(tmp_path / "folder", TENSORS)
    with open(folder / INDEX, "wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(CheckpointError, match="must be at most"):
        Checkpoint(folder)


@given(data=st.data())
def test_mutated_files_give_errors_or_the_right_sizes(tmp_path, data):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(10.0), "b": torch.ones(3, 5).half()}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        found = Checkpoint(path)
    except CheckpointError:
        return
    for name in found.entries:
        assert found.tensor(name).shape == found.shapes[name]


def test_a_name_twice_in_the_header_cannot_claim_other_bytes(tmp_path):
    path = tmp_path / "x.safetensors"
    one = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    two = one.replace("[2]", "[1000000000000]")
    for first, second in ((one, two), (two, one)):
        header = f"{{{first},{second}}}".encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        with contextlib.suppress(CheckpointError):
            assert Checkpoint(path).shapes == {"a": (2,)}


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    found = Checkpoint(path)
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(CheckpointError, match="must hold all of 'a'"):
        found.tensor("a")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.middle, self.head = (
            nn.Embedding(700, 100),
            nn.Linear(100, 100),
            nn.Linear(100, 700, bias=False),
        )
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("stored", ["embed.weight", "head.weight"])
@pytest.mark.parametrize("share", [0.01, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rewinding_from_a_folder(tmp_path, small_pieces, stored, share, dtype, backend):
    torch.manual_seed(0)
    model, initial = Tied(), Tied().to(dtype)
    state = initial.state_dict()
    del state["head.weight" if stored == "embed.weight" else "embed.weight"]
    folder = write_folder(tmp_path / "w0", state)
    masks = MaskSet.from_masks({n: torch.rand(p.shape) < share for n, p in model.named_parameters()})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rewind_(model, masks, folder, backend=backend)
    for name, parameter in model.named_parameters():
        expected = dict(initial.named_parameters())[name].float()
        assert torch.equal(parameter, torch.where(masks[name], expected, before[name]))


def test_a_checkpoint_of_another_model_changes_nothing(tmp_path):
    model = Tied()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks = MaskSet.from_masks({n: torch.ones_like(p).bool() for n, p in model.named_parameters()})
    state = {"embed.weight": torch.ones(700, 100), "middle.weight": torch.ones(100, 100), "middle.bias": torch.ones(99)}
    with pytest.raises(ValueError, match=r"initial\['middle.bias'\] must have"):
        rewind_(model, masks, write_folder(tmp_path / "w0", state))
    del state["middle.bias"]
    with pytest.raises(ValueError, match=r"1 missing, the first is 'middle\.bias'"):
        rewind_(model, masks, write_folder(tmp_path / "w1", state))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_freezing_at_the_values_of_a_folder(tmp_path):
    model, initial = nn.Linear(9, 9), nn.Linear(9, 9)
    folder = write_folder(tmp_path / "w0", initial.state_dict())
    masks = select({n: torch.rand_like(p) for n, p in model.named_parameters()}, rate=0.3)
    with freeze(model, torch.optim.SGD(model.parameters(), 0.1), masks, initial=folder):
        pass
    for (name, parameter), value in zip(model.named_parameters(), initial.parameters(), strict=True):
        assert torch.equal(parameter[masks[name]], value[masks[name]])


def test_scoring_against_the_values_of_a_folder(tmp_path):
    torch.manual_seed(0)
    model, initial = nn.Linear(9, 4), nn.Linear(9, 4)
    folder, found = write_folder(tmp_path / "w0", initial.state_dict()), []
    for source in (folder, initial):
        scorer = SaliencyScorer(model, criterion="taylor_delta", initial=source, reduction="sum")
        with scorer:
            model(torch.ones(3, 9)).square().sum().backward()
        found.append(scorer.scores())
    for name, score in found[0].items():
        assert torch.equal(score, found[1][name])
