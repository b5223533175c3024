"""The CUDA kernels of rewind_, gather and scatter_, executed on the CPU through the ops."""

import pytest
import test_rewind
import torch
from cuda_on_cpu import build
from cuda_on_cpu.emulate import emulate, sparse
from test_rewind import by_form, check, masks_of

import cwfast
from cwfast import ops, reference
from cwfast.ops import _entries, _rewind_device
from cwfast.ops._entries import Entries

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=f"CUDA on the CPU {build.why_not()}")


@pytest.fixture(params=["plain", "checked"])
def library(request, monkeypatch):
    return emulate(monkeypatch, "rewind", request.param == "checked")


@by_form
@pytest.mark.parametrize("dtype", test_rewind.DTYPES, ids=str)
def test_every_dtype(library, form, dtype):
    test_rewind.test_every_dtype("cuda", form, dtype)


@by_form
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 1.0])
def test_word_slice_and_block_borders(library, form, share):
    sizes = [0, 1, 31, 32, 33, 63, 64, 65, 0, 1023, 1025, 8191, 8192, 8193, 65_535, 65_536, 65_537, 140_003, 0]
    weights, initial = ([torch.randn(size) for size in sizes] for _ in range(2))
    for seed in range(1 if share == 1 else 3):
        library.coc_configure(seed, 1 + seed, None, 0)
        check(weights, initial, masks_of(weights, share, seed), form, "cuda")


@by_form
def test_dtypes_and_memory_formats(library, form):
    test_rewind.test_mixed_dtypes_in_one_list("cuda", form)
    test_rewind.test_flat_index_is_logical_in_any_memory_format("cuda", form)


@by_form
@pytest.mark.parametrize("sizes", [[0], [0, 0], []], ids=str)
def test_nothing_to_select_from(library, form, sizes):
    weights, initial = ([torch.zeros(size) for size in sizes] for _ in range(2))
    check(weights, initial, masks_of(weights, 1.0), form, "cuda") if sizes else test_rewind.test_empty_lists("cuda")


def test_both_forms_in_one_list(library):
    weights, initial = ([torch.randn(size) for size in (70_000, 70_001, 130)] for _ in range(2))
    masks = masks_of(weights, 0.1)
    bits = [test_rewind.picks(mask, form) for mask, form in zip(masks, ("bits", "list", "bits"), strict=True)]
    kept = ops.gather(initial, bits, backend="cuda")
    assert all(torch.equal(k, w[m]) for k, w, m in zip(kept, initial, masks, strict=True))
    want = [torch.where(m, w0, w) for w, w0, m in zip(weights, initial, masks, strict=True)]
    ops.scatter_(weights, bits, kept, backend="cuda")
    assert all(map(torch.equal, weights, want))


@pytest.mark.parametrize("broken", test_rewind.BROKEN)
def test_broken_picks_are_refused_before_anything_is_written(library, broken):
    test_rewind.test_broken_picks_are_refused_before_anything_is_written("cuda", broken)


def test_picks_that_only_one_word_or_block_shows_to_be_broken(library):
    test_rewind.test_picks_that_only_one_word_or_block_shows_to_be_broken("cuda")


def test_a_list_for_an_empty_tensor_must_be_empty(library):
    low, offset = test_rewind.block_list([3], [0])
    with pytest.raises(ValueError, match=r"bits\[0\] must have offsets from 0 to 1"):
        ops.rewind_([torch.zeros(0)], [torch.zeros(0)], [(low, offset)], backend="cuda")


def test_packed_bits_at_any_byte(library):
    mask = torch.arange(200) % 3 == 0
    memory = torch.zeros(100, dtype=torch.uint8)
    bits = memory[3 : 3 + 32]
    bits.copy_(reference.pack(mask))
    (kept,) = ops.gather([torch.arange(200)], [bits], backend="cuda")
    assert torch.equal(kept, mask.nonzero().reshape(-1))


def test_a_model_is_rewound_and_frozen(library):
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.LayerNorm(30), torch.nn.Linear(30, 5))
    initial, before = ({name: torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(2))
    shares = {"0.weight": 0.03, "1.weight": 0.5, "2.weight": 0.3}  # a list and two packed; nothing elsewhere
    masks = cwfast.MaskSet.from_masks({n: torch.rand(p.shape) < shares.get(n, 0) for n, p in initial.items()})
    model.load_state_dict(before)
    cwfast.rewind_(model, masks, initial, backend="cuda")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.where(masks[name], initial[name], before[name]))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    with cwfast.freeze(model, optimizer, masks, backend="cuda"):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 40)).square().sum().backward()
            assert not any(p.grad[masks[name]].any() for name, p in model.named_parameters())
            optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter[masks[name]], start[name][masks[name]])
        assert not (parameter == start[name])[~masks[name]].all()


@by_form
def test_picks_are_surveyed_once_a_call_and_never_while_frozen(library, monkeypatch, form):
    surveys = []
    survey = _rewind_device.survey
    monkeypatch.setattr(_rewind_device, "survey", lambda *a: surveys.append(a) or survey(*a))
    weights, initial = ([torch.randn(size) for size in (70_000, 130)] for _ in range(2))
    bits = [test_rewind.picks(mask, form) for mask in masks_of(weights, 0.1)]

    def cost(call):
        surveys.clear()
        result = call()
        return len(surveys), result

    assert cost(lambda: ops.rewind_(weights, initial, bits, backend="cuda"))[0] == 1
    count, kept = cost(lambda: ops.gather(initial, bits, backend="cuda"))
    assert count == 1
    assert cost(lambda: ops.scatter_(weights, bits, kept, backend="cuda"))[0] == 1
    entries = [Entries("w", w, b, backend="cuda") for w, b in zip(weights, bits, strict=True)]
    assert cost(lambda: _entries.write(entries, weights, [torch.zeros_like(k) for k in kept]))[0] == 0
    assert [int((w == 0).sum()) for w in weights] == [len(k) for k in kept]
    for i, entry in enumerate(entries):
        assert cost(lambda entry=entry, i=i: _entries.write_one(entry, weights[i], kept[i]))[0] == 0
    assert all(map(torch.equal, ops.gather(weights, bits, backend="cuda"), kept))


def far(monkeypatch, library, dtype, form):
    """Entries of three blocks of a tensor of 3 * 2^30: the launches leave out all other blocks."""
    numel = (3 << 30) + 33
    blocks = -(-numel // reference.BLOCK)
    wanted = [0, (1 << 31) // reference.BLOCK, blocks - 1]
    chosen = torch.tensor([5, (1 << 31) + 7, (1 << 31) + 70, numel - 1])
    weight, initial = sparse((numel,), dtype), sparse((numel,), dtype)
    initial[chosen] = torch.arange(1, 5).to(dtype)
    if form == "bits":
        bits = sparse((-(-numel // 64) * 8,), torch.uint8)
        bits[chosen // 8] |= (1 << (chosen % 8)).to(torch.uint8)
        bits[chosen[1] // 8] |= 1 << int(chosen[1] % 8)
    else:
        edges = torch.arange(blocks + 1) * reference.BLOCK
        bits = (chosen % reference.BLOCK).to(torch.uint16), torch.searchsorted(chosen, edges)
    ids = torch.tensor(wanted, dtype=torch.int32)
    library.coc_configure(1, 2, ids.data_ptr(), len(ids))
    empty = torch.empty
    with monkeypatch.context() as patch:  # blocks that do not run count nothing
        patch.setattr(
            torch, "empty", lambda *a, **k: empty(*a, **k).zero_() if k.get("dtype") == torch.int64 else empty(*a, **k)
        )
        (kept,) = ops.gather([initial], [bits], backend="cuda")
    assert kept.tolist() == [1, 2, 3, 4]
    ops.rewind_([weight], [initial], [bits], backend="cuda")
    assert weight[chosen].tolist() == [1, 2, 3, 4]
    assert weight[chosen - 1].tolist() == [0, 0, 0, 0]
    library.coc_configure(1, 2, None, 0)


@by_form
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_offsets_above_2_to_the_31(monkeypatch, dtype, form):
    far(monkeypatch, emulate(monkeypatch, "rewind"), dtype, form)


PLANTED = {  # text in csrc/cuda/rewind.cu, replacement
    "tensor of the block off by one": ("tensors[middle].first <= block", "tensors[middle].first < block"),
    "rank includes the entry": ("((1u << lane) - 1)", "((2u << lane) - 1)"),
    "twice the same position": ("low[i] <= low[i - 1]", "low[i] < low[i - 1]"),
    "wrong picks without atomic": (
        "atomicOr(wrong + (part.tensor - tensors), found)",
        "wrong[part.tensor - tensors] |= found",
    ),
    "32-bit start": ("start = own * kBlock,", "start = (int)(own * kBlock),"),
    "block past the tensor": ("left < kBlock ? left : kBlock", "kBlock"),
    "ends not checked": ("part.block == 0 && (", "false && ("),
    "falling offsets": ("begin < 0 || end < begin ||", "begin < 0 ||"),
    "offsets past the list": (" || end > tensor.k)", ")"),
    "position past the tensor": ("low[i] >= part.length", "low[i] > part.length"),
    "compared with the block before": ("(i > begin && low[i]", "(i > 0 && low[i]"),
    "padding of the last word": (
        "used < 32 && word >> (used < 0 ? 0 : used)",
        "used >= 0 && used < 32 && word >> used",
    ),
    "half a slice counted": (
        "w < (warp + 1) * kSliceWords && w < padded",
        "w < warp * kSliceWords + 128 && w < padded",
    ),
    "rank of the first slice": ("tensor.ranks[8 * part.block + warp]", "tensor.ranks[8 * part.block]"),
    "rank among all tensors": (" - tensor.ranks[0] : 0", " : 0"),
    "slice runs into the next": ("w < (warp + 1) * kSliceWords && w < word_count", "w < word_count"),
    "word past the tensor": ("w + lane < word_count ? words[w + lane] : 0", "words[w + lane]"),
    "entries that are not selected": ("if (word[u] >> lane & 1) target[", "target["),
    "divided too early": (
        "at += flat % dim[0] * dim[1];\n    flat /= dim[0];",
        "flat /= dim[0];\n    at += flat % dim[0];",
    ),
    "offset behind an empty tensor": ("if (part.length == 0) return 0;", ""),
}


def catch(name: str) -> None:
    """Plant one defect and run; called in a process of its own, which the defect may crash."""
    patch = pytest.MonkeyPatch()
    library = emulate(patch, "rewind", checked=True, changes=(PLANTED[name],) if name else ())
    sizes = [33, 0, 8193, 70_001, 0]
    for seed, form in enumerate(("bits", "list")):
        library.coc_configure(seed, 1 + seed, None, 0)
        weights, initial = ([torch.randn(size) for size in sizes] for _ in range(2))
        check(weights, initial, masks_of(weights, 0.3, seed), form, "cuda")
        test_rewind.test_flat_index_is_logical_in_any_memory_format("cuda", form)
    for broken in test_rewind.BROKEN:
        test_rewind.test_broken_picks_are_refused_before_anything_is_written("cuda", broken)
    test_rewind.test_picks_that_only_one_word_or_block_shows_to_be_broken("cuda")
    with pytest.raises(ValueError, match="ascend"):  # seen by many threads at once
        ops.rewind_([weights[0]], [initial[0]], [test_rewind.block_list([5] * 600, [0, 600])], backend="cuda")
    for form in ("bits", "list"):
        far(patch, library, torch.uint8, form)


@pytest.mark.parametrize("name", build.some_slow(["", *PLANTED]))
def test_planted_defect_is_caught(name):
    build.check_planted("test_cuda_rewind", name)
