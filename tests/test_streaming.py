"""Selection from files in pieces: the same bits as in memory, by one read where a sample tells where."""

import json
import re
import struct
import sys
import warnings

import pytest
import torch
from folders import write_folder
from safetensors.torch import save_file

from cwfast import _picks, _radix, _streaming, select
from cwfast.checkpoint import Checkpoint, reader
from cwfast.testing import HOSTILE, hostile_scores


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
