"""The checkpoint reader, and what is selected and rewound from files in pieces."""

import contextlib
import json
import os
import re
import struct
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from cwfast import MaskSet, SaliencyScorer, _picks, _radix, _streaming, freeze, rewind_, select
from cwfast.checkpoint import Checkpoint, reader
from cwfast.errors import CheckpointError
from cwfast.testing import HOSTILE, hostile_scores

INDEX = reader.INDEX


def write_folder(folder, tensors, shards=3):
    """Round-robin over ``shards`` files, with an index."""
    folder.mkdir(exist_ok=True)
    names = list(tensors)
    files = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n].contiguous() for n in names if files[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


TENSORS = {
    "a": torch.arange(200_003, dtype=torch.float32),
    "b": torch.randn(3, 5).bfloat16(),
    "c": torch.tensor(7, dtype=torch.int64),
    "d": torch.empty(0, 4),
    "e": torch.randn(130, 1000).half(),
}


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(reader.Checkpoint.pieces, "__defaults__", (65_536,))
    monkeypatch.setattr(_streaming, "PIECE", 65_536)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", HOSTILE)
def test_streamed_selection_equals_the_one_in_memory(tmp_path, small_pieces, kind, dtype):
    scores = {str(i): s.contiguous() for i, s in enumerate(hostile_scores(kind, dtype, 150_000))}
    folder = write_folder(tmp_path / "scores", scores)
    scores = {name: scores[name] for name in Checkpoint(folder).entries}  # ties go by the index's order
    numel = sum(s.numel() for s in scores.values())
    for k in (0, 1, 70, numel // 100, numel // 2, numel):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about selected zeros, which have their own test
            a, b = select(folder, k=k), select(scores, k=k)
        assert a == b
        assert a.total == k
        assert a.zero_score_selected == b.zero_score_selected


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_streamed_selection_where_the_bin_is_too_full_to_keep(tmp_path, small_pieces, monkeypatch, dtype, backend):
    """Then further reads count the next bits, down to a single value."""
    monkeypatch.setattr(_streaming, "_KEPT", 3)
    torch.manual_seed(1)
    values = 1 + torch.rand(150_000, dtype=torch.float64) / 4096  # one bin of float32 holds a sixteenth of them
    scores = {"a": values.to(dtype), "b": torch.full((70_000,), 1.0001, dtype=dtype), "c": values[:9].to(dtype)}
    folder = write_folder(tmp_path / "scores", scores)
    scores = {name: scores[name] for name in Checkpoint(folder).entries}
    for k in (1, 70, 100_000, 150_000, 220_000):
        assert select(folder, k=k, backend=backend) == select(scores, k=k)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_streamed_selection_takes_less_memory_than_the_scores(tmp_path, python):
    numel = 40_000_000
    with open(tmp_path / "x.safetensors", "wb") as file:
        header = json.dumps({"a": {"dtype": "F32", "shape": [numel], "data_offsets": [0, 4 * numel]}}).encode()
        file.write(struct.pack("<Q", len(header)) + header)
        for seed in range(4):
            file.write(torch.rand(numel // 4, generator=torch.Generator().manual_seed(seed)).numpy().tobytes())
    done = python(
        f"""
import cwfast, torch
def resident(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) * 1024
cwfast.select({{"a": torch.rand(1000)}}, rate=0.1)  # loads the code
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = resident("VmRSS:")
masks = cwfast.select({str(tmp_path / "x.safetensors")!r}, rate=0.01)
assert masks.total == {numel // 100}
print(resident("VmHWM:") - before)
"""
    )
    assert int(done.stdout) < 125_000_000  # of 160 MB of scores: pieces of 17 MB, 1 bit an entry, kept entries


def test_streamed_selection_by_scope_and_with_nan(tmp_path, small_pieces):
    torch.manual_seed(0)
    scores = {"a.w": torch.rand(100_000), "a.b": torch.rand(70), "c.w": torch.rand(50, 3) + 0.5}
    folder = write_folder(tmp_path / "scores", scores)
    for options in (
        {"scope": "layer", "rate": 0.1},
        {"scope": {"a.*": 0.01, "*": 0.5}},
        {"rate": 0.2, "exclude": ["c*"]},
    ):
        assert select(folder, **options) == select(scores, **options)
    scores["a.w"][[3, 70_000]] = torch.nan
    write_folder(folder, scores)
    with pytest.raises(ValueError, match=r"got 2 NaN of 100000 in scores\['a\.w'\], shape \(100000,\)") as streamed:
        select(folder, rate=0.1)
    with pytest.raises(ValueError, match=re.escape(str(streamed.value))):  # the same words
        select(scores, rate=0.1)
    assert select(folder, rate=0.1, nan="skip") == select(scores, rate=0.1, nan="skip")
    numel = 100_000 + 70 + 150
    assert select(folder, k=numel - 2, nan="skip") == select(scores, k=numel - 2, nan="skip")
    with pytest.raises(ValueError, match=f"k must be at most {numel - 2}"):
        select(folder, k=numel - 1, nan="skip")
    scores["a.w"][3] = -1
    write_folder(folder, scores)
    with pytest.raises(ValueError, match="got 1 negative of 100000"):
        select(folder, rate=0.1, nan="skip")
    write_folder(folder, {"a": torch.ones(3), "b": torch.ones(3).half()})
    with pytest.raises(TypeError, match="one dtype"):
        select(folder, rate=0.1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 2, "nan": "ignore"}, ValueError, "nan must be one of"),
        ({"k": True}, TypeError, "k must be an int; got True"),
        ({"k": 2.5}, TypeError, "k must be an int; got 2.5"),
        ({"k": -1}, ValueError, "k must lie between 0 and 9"),
        ({"k": 10}, ValueError, "k must lie between 0 and 9"),
    ],
)
def test_files_and_memory_refuse_the_same_arguments_by_the_same_words(tmp_path, options, error, message):
    scores = {"a": torch.rand(9)}
    save_file(scores, tmp_path / "x.safetensors")
    for source in (tmp_path / "x.safetensors", scores):
        with pytest.raises(error, match=message):
            select(source, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 300_007])
def test_kernels_of_a_piece_equal_plain_torch(numel, kernel, dtype):
    generator = torch.Generator().manual_seed(0)
    piece = torch.rand(numel, generator=generator, dtype=torch.float64).to(dtype)
    piece[3:9] = torch.tensor([0, torch.inf, torch.nan, -1, 0.5, -0.0]).to(dtype)[: len(piece[3:9])]
    save = {"a": piece}
    low, high = (_radix.keys(torch.tensor([x], dtype=dtype)).item() for x in (0.25, 0.75))
    shift, top = 8 * dtype.itemsize - 16, _radix.keys(torch.tensor([torch.inf], dtype=dtype)).item()
    found = []
    for name in ("reference", kernel):
        scores = _streaming._Scores(Held(save), ["a"], dtype, name)
        histograms = [
            scores.count([piece], *where) for where in ((0, shift, (top >> shift) + 1), (low, shift, 3), (high, 0, 1))
        ]
        found.append((histograms, scores.mark(low, high, True, _streaming._Job("a", 0, numel)) if numel else None))
    (plain, expected), (histograms, part) = found
    assert all(map(torch.equal, histograms, plain))
    assert plain[0].sum() == numel - int(piece.isnan().sum())
    if part is not None:
        assert part._replace(bits=0, inside=0, values=0) == expected._replace(bits=0, inside=0, values=0)
        assert torch.equal(part.values.double(), expected.values.double())
        for bits, same in ((part.bits, expected.bits), (part.inside, expected.inside)):
            assert torch.equal(_picks.to_indices(bits, numel), _picks.to_indices(same, numel))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("edges", [(0.25, 0.75), (0.25, 0.99), (0.97, 0.99), (0.98, 1.1)])
@pytest.mark.parametrize("numel", [1, 64, 65_537, 200_003])
def test_what_is_kept_is_settled_as_plain_torch_does(numel, edges, dtype, backend):
    """In both forms of picks, above the bracket and in it; with no ties, some and all."""
    torch.manual_seed(0)
    piece = (torch.randint(0, 1000, (numel,)) / 1000).to(dtype)
    low, high, key = _radix.keys(torch.tensor([*edges, sum(edges) / 2], dtype=dtype)).tolist()
    scores = _streaming._Scores(Held({"a": piece}), ["a"], dtype, backend)
    part = scores.mark(low, high, True, _streaming._Job("a", 0, numel))
    keys = _radix.keys(piece)
    equal = keys == key
    for ties in (0, int(equal.sum()) // 2, numel):
        expected = (keys > key) | (equal & (equal.cumsum(0) <= ties))
        assert torch.equal(_picks.to_bits(scores.settle(part, key, ties), numel), _picks.pack(expected))


class Held:
    """Tensors in place of a file."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.entries = {name: reader.Entry("none", 0, t.dtype, tuple(t.shape)) for name, t in tensors.items()}

    def pieces(self, name, size, *, begin, end, memory):
        assert size == end - begin
        yield self.tensors[name][begin:end]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("threads", [1, 2, 6])
def test_streamed_selection_by_several_threads(tmp_path, small_pieces, set_threads, kernel, threads, dtype):
    """With ties and with none, in more pieces than results may wait."""
    torch.manual_seed(0)
    scores = {"a": torch.rand(23 * 65_536 - 7).to(dtype), "b": torch.randint(0, 5, (300_000,)).to(dtype)}
    save_file(scores, tmp_path / "x.safetensors")
    set_threads(threads)
    for k in (70, 200_000, 1_000_000):
        assert select(tmp_path / "x.safetensors", k=k, backend=kernel) == select(scores, k=k, backend="reference")


def sampled(monkeypatch, found):
    """A sample is drawn of few scores too; ``found`` takes what is called."""
    monkeypatch.setattr(_streaming, "_SAMPLED", 1)
    monkeypatch.setattr(_streaming, "_WINDOWS", 200)
    monkeypatch.setattr(_streaming, "_WINDOW", 64)
    for name in ("_marked", "_finish"):
        monkeypatch.setattr(_streaming, name, counted(getattr(_streaming, name), name, found))
    monkeypatch.setattr(_streaming._Scores, "histogram", counted(_streaming._Scores.histogram, "histogram", found))


def counted(function, name, into):
    def call(*args, **kwargs):
        into.append(name)
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", HOSTILE)
def test_selection_by_a_sample_equals_the_one_in_memory(tmp_path, small_pieces, monkeypatch, kind, dtype):
    sampled(monkeypatch, [])
    scores = {str(i): s.contiguous() for i, s in enumerate(hostile_scores(kind, dtype, 150_000))}
    folder = write_folder(tmp_path / "scores", scores)
    scores = {name: scores[name] for name in Checkpoint(folder).entries}
    numel = sum(s.numel() for s in scores.values())
    for k in (0, 1, 70, numel // 100, numel // 2, numel - 1, numel):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert select(folder, k=k) == select(scores, k=k)


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.3, 0.999])
def test_selection_by_a_sample_reads_once(tmp_path, small_pieces, monkeypatch, rate):
    found = []
    sampled(monkeypatch, found)
    torch.manual_seed(0)
    scores = {"a": torch.rand(800, 1000), "b": 2 * torch.rand(200_000), "c": torch.rand(7)}
    save_file(scores, tmp_path / "x.safetensors")
    assert select(tmp_path / "x.safetensors", rate=rate) == select(scores, rate=rate)
    assert found == ["_marked", "_finish"]


def test_selection_by_a_sample_that_misleads(tmp_path, small_pieces, monkeypatch):
    """Where the k-th largest is not where it seems to be, or too many are: counts find it."""
    torch.manual_seed(0)
    scores = {"a": torch.rand(500_000), "b": torch.rand(200_000)}
    save_file(scores, tmp_path / "x.safetensors")
    for bracket in ((0, 1), (1 << 30, 0x7F800001), (0, 0x7F800001)):
        found = []
        sampled(monkeypatch, found)
        monkeypatch.setattr(_streaming, "_KEPT", 100_000)
        monkeypatch.setattr(_streaming, "_guess", lambda *_, bracket=bracket: bracket)
        assert select(tmp_path / "x.safetensors", k=9_000) == select(scores, k=9_000)
        assert found == ["_marked", "histogram", "_marked", "_finish"]
        monkeypatch.undo()


def test_selection_by_a_sample_names_invalid_scores(tmp_path, small_pieces, monkeypatch):
    sampled(monkeypatch, [])
    torch.manual_seed(0)
    scores = {"a": torch.rand(200_000), "b": torch.rand(300_000)}
    scores["b"][7] = torch.nan
    save_file(scores, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"got 1 NaN of 300000 in scores\['b'\]"):
        select(tmp_path / "x.safetensors", rate=0.1)
    numel = 500_000
    for k in (1, 50_000, numel - 1):
        assert select(tmp_path / "x.safetensors", k=k, nan="skip") == select(scores, k=k, nan="skip")
    with pytest.raises(ValueError, match=f"k must be at most {numel - 1}"):
        select(tmp_path / "x.safetensors", k=numel, nan="skip")


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
