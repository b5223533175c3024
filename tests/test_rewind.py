"""rewind_, gather and scatter_: copies of selected entries, bit for bit, and not one entry else."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cwfast import ops, reference
from cwfast.testing import guarded

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
]
SIZES = [0, 1, 63, 64, 65, 65_535, 65_536, 65_537, 200_003]
by_form = pytest.mark.parametrize("form", ["bits", "list"])


def filled(shape, dtype, seed):
    """Random bytes: every pattern of the dtype, NaN payloads included."""
    numel = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.zeros(0)


def picks(mask, form):
    """A bool mask in one of the two forms that the ops take."""
    if form == "bits":
        return reference.pack(mask)
    flat = mask.reshape(-1).nonzero().reshape(-1)
    edges = torch.arange(-(-mask.numel() // reference.BLOCK) + 1) * reference.BLOCK
    return (flat % reference.BLOCK).to(torch.uint16), torch.searchsorted(flat, edges)


def masks_of(tensors, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(t.shape, generator=generator) < share for t in tensors]


def check(weights, initial, masks, form, backend):
    """All three ops on guarded copies against boolean indexing on bytes."""
    bits = [picks(mask, form) for mask in masks]
    expected = [torch.where(m, w0, w) for w, w0, m in zip(weights, initial, masks, strict=True)]
    compact = [w0[m] for w0, m in zip(initial, masks, strict=True)]  # row-major order of the logical index
    for name in ("rewind_", "scatter_"):
        copies, guards = zip(*(guarded(w) for w in weights), strict=True)
        values = initial if name == "rewind_" else bits
        third = bits if name == "rewind_" else compact
        assert getattr(ops, name)(list(copies), list(values), list(third), backend=backend) is not None
        for copy, want, guard in zip(copies, expected, guards, strict=True):
            assert torch.equal(raw(copy), raw(want))
            guard()
    for value, want in zip(ops.gather(initial, bits, backend=backend), compact, strict=True):
        assert value.shape == want.shape
        assert torch.equal(raw(value), raw(want))


@by_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(backend, form, dtype):
    weights, initial = (
        [filled(shape, dtype, s + 10 * i) for i, shape in enumerate([(7, 11), (70_001,), (), (0, 3)])] for s in (1, 2)
    )
    check(weights, initial, masks_of(weights, 0.1), form, backend)


@by_form
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_word_and_block_borders(backend, form, size, share):
    weights, initial = [torch.randn(size)], [torch.randn(size)]
    check(weights, initial, masks_of(weights, share), form, backend)


@by_form
def test_mixed_dtypes_in_one_list(backend, form):
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.uint8]
    weights, initial = ([filled((50 + i,), kind, s + i) for i, kind in enumerate(kinds)] for s in (1, 20))
    check(weights, initial, masks_of(weights, 0.3), form, backend)


@by_form
def test_flat_index_is_logical_in_any_memory_format(backend, form):
    weights = [
        torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last),
        torch.randn(300, 400).T,
        torch.randn(2, 3, 4).permute(2, 0, 1),
        torch.randn(1, 7).T,
    ]
    initial = [
        torch.randn(4, 3, 5, 6),
        torch.randn(800, 600)[::2, ::2].T.reshape(300, 400).T,
        torch.randn(4, 1, 1).expand(4, 2, 3),
        torch.randn(7, 9)[:, 3:4],
    ]
    check(weights, initial, masks_of(weights, 0.2), form, backend)


@given(size=st.integers(0, 400), share=st.floats(0, 1), seed=st.integers(0, 99), form=st.sampled_from(["bits", "list"]))
def test_any_mask(backend, size, share, seed, form):
    weights, initial = [torch.arange(size).float()], [-torch.arange(size).float()]
    check(weights, initial, masks_of(weights, share, seed), form, backend)


def test_a_parameter_of_a_module_bumps_its_version(backend):
    weight = torch.nn.Parameter(torch.zeros(5))
    version, bits = weight._version, [reference.pack(torch.tensor([True, False, False, True, False]))]
    ops.rewind_([weight], [torch.ones(5)], bits, backend=backend)
    assert weight.tolist() == [1, 0, 0, 1, 0]
    assert weight._version > version
    version = weight._version
    ops.scatter_([weight], bits, [torch.tensor([3.0, 4.0])], backend=backend)
    assert weight.tolist() == [3, 0, 0, 4, 0]
    assert weight._version > version


def block_list(low, offset):
    return torch.tensor(low, dtype=torch.uint16), torch.tensor(offset, dtype=torch.int64)


BROKEN = {  # for 70,000 entries: two blocks, the second of 4,464
    "padding": lambda: torch.full((8752,), 255, dtype=torch.uint8),
    "offset start": lambda: block_list([1, 2], [1, 2, 2]),
    "offset end": lambda: block_list([1, 2], [0, 1, 1]),
    "offset past the end": lambda: block_list([1, 2], [0, 3, 2]),
    "offset falls": lambda: block_list([1, 2], [0, -1, 2]),
    "out of range": lambda: block_list([1, 4464], [0, 1, 2]),
    "unsorted": lambda: block_list([2, 1], [0, 2, 2]),
    "twice": lambda: block_list([2, 2], [0, 2, 2]),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_picks_are_refused_before_anything_is_written(backend, broken):
    weights, initial = [torch.zeros(10), torch.zeros(70_000)], [torch.ones(10), torch.ones(70_000)]
    bits = [reference.pack(torch.ones(10, dtype=torch.bool)), BROKEN[broken]()]
    values = [torch.ones(10), torch.ones(2)]
    with pytest.raises(ValueError, match=r"bits\[1\]"):
        ops.rewind_(weights, initial, bits, backend=backend)
    with pytest.raises(ValueError, match=r"bits\[1\]"):
        ops.scatter_(weights, bits, values, backend=backend)
    with pytest.raises(ValueError, match=r"bits\[1\]"):
        ops.gather(weights, bits, backend=backend)
    assert not any(w.any() for w in weights)


def test_picks_that_only_one_word_or_block_shows_to_be_broken(backend):
    behind = torch.zeros(8, dtype=torch.uint8)
    behind[5] = 1  # bit 40 of 10 entries: in a 32-bit word of its own
    falls = block_list([1, 2], [0, 2, 1, 2])  # for three blocks; each offset is from 0 to 2
    for size, bits in ((10, behind), (140_000, falls)):
        weight = torch.zeros(size)
        with pytest.raises(ValueError, match=r"bits\[0\] must"):
            ops.rewind_([weight], [torch.ones(size)], [bits], backend=backend)
        assert not weight.any()


def is_right(numel, low, offset):
    """The contract, entry by entry."""
    low, offset = low.tolist(), offset.tolist()
    if offset[0] != 0 or offset[-1] != len(low) or any(a > b for a, b in itertools.pairwise(offset)):
        return False
    flat = [
        block * reference.BLOCK + x for block in range(len(offset) - 1) for x in low[offset[block] : offset[block + 1]]
    ]
    return flat == sorted(set(flat)) and all(x < numel for x in flat)


@pytest.mark.parametrize("share", [0.0005, 0.02])  # the second: checked by several threads
def test_one_wrong_entry_anywhere_is_found_before_anything_is_written(backend, share):
    generator = torch.Generator().manual_seed(0)
    numel = 18 * reference.BLOCK + 100  # three runs of blocks, the last block short
    weight = torch.zeros(numel)
    mask = torch.rand(numel, generator=generator) < share
    mask[2 * reference.BLOCK : 4 * reference.BLOCK] = False  # empty blocks between others
    mask[8 * reference.BLOCK :: reference.BLOCK] = mask[-1] = True
    right_low, right_offset = picks(mask, "list")
    assert (share > 0.01) == (len(right_low) > 1 << 14)
    refused = 0
    for place in [0, 1, len(right_low) - 2, len(right_low) - 1, *right_offset[1:-1].tolist()] * 2 + [-1] * 20:
        low, offset = right_low.to(torch.int32), right_offset.clone()
        at = place if place >= 0 else int(torch.randint(len(low), (), generator=generator))
        kind = int(torch.randint(4, (), generator=generator))
        if kind == 0:
            low[at] = low[at - 1]  # twice, or from one block to the next
        elif kind == 1:
            low[at] = int(torch.randint(65_536, (), generator=generator))
        elif kind == 2:
            low[[at, at - 1]] = low[[at - 1, at]]
        else:
            offset[1 + at % 18] += 1 - 2 * (at % 2)
        low = low.to(torch.uint16)
        if is_right(numel, low, offset):
            continue
        refused += 1
        item, values = (low, offset), torch.ones(len(low))
        calls = [
            lambda item=item: ops.rewind_([weight], [torch.ones(numel)], [item], backend=backend),
            lambda item=item, values=values: ops.scatter_([weight], [item], [values], backend=backend),
        ]
        for call in calls:
            version = weight._version
            with pytest.raises(ValueError, match=r"^bits\[0\] must "):
                call()
            assert not weight.any()
            assert weight._version == version
    assert refused > 20
    ops.rewind_([weight], [torch.ones(numel)], [(right_low, right_offset)], backend=backend)
    assert torch.equal(weight != 0, mask)


def test_the_message_says_which_position_of_which_block():
    numel = 2 * reference.BLOCK + 10
    sizes, bits = (5, numel), [block_list([0], [0, 1]), block_list([1, 5, 3, 9, 9], [0, 2, 3, 5])]
    weights, initial = ([torch.zeros(size) for size in sizes] for _ in range(2))
    with pytest.raises(ValueError, match=r"bits\[1\] .*inside block 2 and stay below 10; got 9 after 9"):
        ops.rewind_(weights, initial, bits, backend="cpu")


def test_whoever_traces_sees_the_op():
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    weight, item = torch.zeros(100), picks(torch.arange(100) < 3, "list")
    with Mode():
        ops.rewind_([weight], [torch.ones(100)], [item])
        ops.scatter_([weight], [item], [torch.full((3,), 2.0)])
    assert {torch.ops.cwfast.rewind_.default, torch.ops.cwfast.scatter_.default} <= set(seen)
    assert weight.sum() == 6


def test_lists_of_what_is_not_plain():
    """Lists take the short way only where every tensor is contiguous and of one dtype; all arrive."""
    mask = torch.rand(40, 50) < 0.1
    item = picks(mask, "list")
    for weight, initial in (
        (torch.zeros(50, 40).T, torch.ones(40, 50)),
        (torch.zeros(40, 50), torch.ones(50, 40).T),
        (torch.nn.Parameter(torch.zeros(40, 50)), torch.ones(40, 50)),
    ):
        ops.rewind_([weight], [initial], [item])
        assert torch.equal(weight.bool(), mask)
        ops.scatter_([weight], [item], [torch.full((2 * len(item[0]),), 3.0)[::2]])
        assert torch.equal(weight == 3, mask)
    for wrong in (torch.ones(len(item[0]) + 1), torch.ones(len(item[0]), 1), torch.ones(len(item[0])).double()):
        weight = torch.zeros(40, 50)
        with pytest.raises((ValueError, TypeError), match=r"values\[0\] must have"):
            ops.scatter_([weight], [item], [wrong])
        assert not weight.any()
    wide = torch.zeros(9, dtype=torch.complex128)
    with pytest.raises(TypeError, match="complex128"):
        ops.rewind_([wide], [wide], [block_list([1], [0, 1])])


GOOD = {"weights": [torch.zeros(9)], "initial": [torch.ones(9)], "bits": [torch.zeros(8, dtype=torch.uint8)]}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"weights": torch.zeros(9)}, TypeError, "weights must be a sequence"),
        ({"weights": [torch.zeros(9, dtype=torch.complex128)]}, TypeError, "1, 2, 4 or 8 bytes|dtype"),
        ({"weights": [torch.zeros(1).expand(9)]}, ValueError, "must be dense"),
        ({"weights": [torch.zeros(18)[::2]]}, ValueError, "must be dense"),
        ({"initial": [torch.ones(8)]}, ValueError, r"initial\[0\] must have shape \(9,\)"),
        ({"initial": [torch.ones(9).half()]}, TypeError, r"initial\[0\] must have dtype"),
        ({"initial": []}, ValueError, "initial must have 1 items"),
        ({"bits": []}, ValueError, "bits must have 1 items"),
        ({"bits": [torch.zeros(24, dtype=torch.uint8)]}, ValueError, r"bits\[0\] must have shape \(8,\)"),
        ({"bits": [torch.zeros(16)]}, TypeError, r"bits\[0\] must have dtype torch.uint8"),
        ({"bits": [(torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1]))]}, TypeError, "low"),
        ({"bits": [(torch.zeros(1, dtype=torch.uint16), torch.tensor([0]))]}, ValueError, "offset"),
    ],
)
def test_wrong_arguments(given, error, message):
    arguments = GOOD | given
    with pytest.raises(error, match=message):
        ops.rewind_(arguments["weights"], arguments["initial"], arguments["bits"])


def test_values_must_fit_the_selection():
    bits = [reference.pack(torch.arange(9) < 2)]
    with pytest.raises(ValueError, match=r"values\[0\] must have 2 entries.*got 3"):
        ops.scatter_([torch.zeros(9)], bits, [torch.ones(3)])
    with pytest.raises(TypeError, match=r"values\[0\] must have dtype torch.float32"):
        ops.scatter_([torch.zeros(9)], bits, [torch.ones(2).double()])


def test_empty_lists(backend):
    assert ops.rewind_([], [], [], backend=backend) == []
    assert ops.scatter_([], [], [], backend=backend) == []
    assert ops.gather([], [], backend=backend) == []


@by_form
def test_operator_contract(backend, form):
    weight, mask = torch.randn(70), torch.rand(70) < 0.3
    item = picks(mask, form)
    bits, offset = (item, None) if form == "bits" else item
    call = torch.library.opcheck
    call(torch.ops.cwfast.rewind_.default, ([weight.clone()], [torch.randn(70)], [bits], [offset], backend))
    call(torch.ops.cwfast.scatter_.default, ([weight.clone()], [bits], [offset], [weight[mask]], backend))
    call(torch.ops.cwfast.gather.default, ([weight], [bits], [offset], backend), test_utils="test_schema")
