"""MaskSet and select: exact counts, set algebra, files that are checked, models that must fit."""

import copy
import json
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from cwfast import MaskSet, _mask_files, _picks, ops, rewind_, select
from cwfast.errors import CheckpointError
from cwfast.ops import gather

SHAPES = {"a.weight": (7, 11), "a.bias": (7,), "scalar": (), "empty": (0, 3), "b": (70_001,)}


def random_masks(seed=0, share=0.2):
    generator = torch.Generator().manual_seed(seed)
    return MaskSet.from_masks({n: torch.rand(s, generator=generator) < share for n, s in SHAPES.items()})


def scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}


NUMEL = 7 * 11 + 7 + 1 + 70_001


def test_content_in_every_form():
    given = {name: torch.rand(shape) < 0.3 for name, shape in SHAPES.items()}
    found = MaskSet.from_masks(given)
    assert found.names == list(SHAPES)
    assert found.numel == NUMEL
    assert found.total == sum(int(m.sum()) for m in given.values())
    for name, mask in given.items():
        assert torch.equal(found[name], mask)
        assert found.counts[name] == int(mask.sum())
        assert torch.equal(found.indices(name), mask.reshape(-1).nonzero().reshape(-1))
    assert f"{found.total:,} of {NUMEL:,} weights" in repr(found)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.0624, 0.0626, 0.5, 1.0])
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 65_535, 65_536, 65_537, 200_003])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_both_forms_hold_the_same_set(numel, share, backend, monkeypatch):
    monkeypatch.setattr(_picks, "_backend", lambda _: backend)
    monkeypatch.setattr(_picks, "_STRIDE", _picks.reference.BLOCK)  # several pieces also at this size
    mask = torch.rand(numel, generator=torch.Generator().manual_seed(numel)) < share
    expected = mask.nonzero().reshape(-1)
    found = MaskSet.from_masks({"w": mask})
    low, offset = _picks.to_list(found.bits["w"], numel)
    assert low.dtype == torch.uint16
    assert len(offset) == -(-numel // 65_536) + 1
    again = MaskSet({"w": (low, offset)}, {"w": (numel,)})
    for masks in (found, again):
        assert masks.counts == {"w": len(expected)}
        assert torch.equal(masks.indices("w"), expected)
        assert torch.equal(masks["w"], mask)
        is_list = isinstance(masks.picks("w"), tuple)
        assert is_list == (len(expected) < numel / 16)
        assert torch.equal(gather([torch.arange(numel)], [masks.picks("w")])[0], expected)
    assert again == found
    assert (again & found) == found
    assert torch.equal(again.bits["w"], found.bits["w"])


@pytest.mark.parametrize("shares", [(), (0.01,), (0.0, 0.01, 0.06), (0.9, 0.0, 0.0), (0.0, 0.0, 0.9), (0.5, 0.7)])
@pytest.mark.parametrize("last", [1, 64, 65_537])
def test_pieces_join_into_the_smaller_form(shares, last):
    numels = [131_072] * (len(shares) - 1) + [last] * bool(shares)
    masks = [torch.rand(numel) < share for numel, share in zip(numels, shares, strict=True)]
    parts = [(_picks.compact(_picks.pack(mask), len(mask)), len(mask)) for mask in masks]
    whole = torch.cat([torch.empty(0, dtype=torch.bool), *masks])
    expected = _picks.compact(_picks.pack(whole), len(whole))
    found = _picks.join(parts)
    assert type(found) is type(expected)
    forms = [bits if isinstance(bits, tuple) else (bits,) for bits in (found, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*forms, strict=True))


@given(data=st.data())
def test_a_list_is_accepted_only_if_ascending_unique_and_in_range(data):
    numel = data.draw(st.integers(0, 3 * 65_536))
    blocks = -(-numel // 65_536)
    values = data.draw(st.lists(st.integers(0, 65_535), max_size=6))
    offset = data.draw(st.lists(st.integers(-1, 7), min_size=max(blocks, 0), max_size=blocks + 1))
    offset = [0, *sorted(offset)] if data.draw(st.booleans()) else [0, *offset]
    fits = len(offset) == blocks + 1 and offset[-1] == len(values) and all(np.diff(offset) >= 0)
    indices = []
    if fits:
        for block in range(blocks):
            indices += [block * 65_536 + v for v in values[offset[block] : offset[block + 1]]]
        fits = len(set(indices)) == len(indices) and sorted(indices) == indices and all(i < numel for i in indices)
    pair = (torch.tensor(values, dtype=torch.uint16), torch.tensor(offset, dtype=torch.int64))
    if fits:
        assert MaskSet({"w": pair}, {"w": (numel,)}).indices("w").tolist() == indices
    else:
        with pytest.raises(ValueError, match=r"bits\['w'\] must"):
            MaskSet({"w": pair}, {"w": (numel,)})


def test_counts_by_layer_and_kind():
    names = ["embed.weight", "h.0.mlp.weight", "h.0.mlp.bias", "h.1.mlp.weight", "h.11.mlp.weight", "scale"]
    masks = MaskSet.from_masks({name: torch.arange(10) < i for i, name in enumerate(names)})
    layer, kind = masks.counts_by("layer"), masks.counts_by("kind")
    assert layer == {"embed": (0, 10), "h.0": (3, 20), "h.1": (3, 10), "h.11": (4, 10), "scale": (5, 10)}
    assert kind == {"embed.weight": (0, 10), "h.*.mlp.weight": (8, 30), "h.*.mlp.bias": (2, 10), "scale": (5, 10)}
    lines = masks.summary().splitlines()
    assert lines[2].split() == ["h.0", "3", "20", "15.0000%", "0.60"]
    assert lines[-1].split() == ["all", "15", "60", "25.0000%", "1.00"]
    assert (masks - masks).summary("kind").splitlines()[-1].split() == ["all", "0", "60", "0.0000%", "-"]
    with pytest.raises(ValueError, match="'layer' or 'kind'"):
        masks.counts_by("colour")


def test_the_largest_useful_rate_is_that_of_the_poorest_layer():
    s = {"a": torch.rand(100) + 0.1, "b": torch.zeros(100)}
    s["b"][:10] = 1
    with pytest.warns(UserWarning, match=r"largest useful rate of 'b' is 0\.100000"):
        found = select(s, rate=0.2, scope="layer")
    assert found.zero_score_selected == 10


@pytest.mark.parametrize("operator", ["__and__", "__or__", "__sub__", "__xor__"])
def test_set_algebra(operator):
    a, b = random_masks(0), random_masks(1, 0.5)
    found = getattr(a, operator)(b)
    for name in SHAPES:
        expected = getattr(set(a.indices(name).tolist()), operator)(set(b.indices(name).tolist()))
        assert set(found.indices(name).tolist()) == expected
        assert found.counts[name] == len(expected)


def test_jaccard():
    a, b = random_masks(0), random_masks(1)
    assert a.jaccard(b) == (a & b).total / (a | b).total
    assert a.jaccard(a) == 1
    assert (a - a).jaccard(a - a) == 1
    assert a.jaccard(a - a) == 0


def test_sets_of_different_parameters_do_not_combine():
    with pytest.raises(ValueError, match="same parameters; they differ at 'b'"):
        random_masks() & MaskSet.from_masks({**{n: random_masks()[n] for n in SHAPES}, "b": torch.zeros(3).bool()})
    with pytest.raises(TypeError):
        random_masks() & 3


def test_random_like_keeps_counts_and_follows_its_seed():
    a = random_masks()
    assert a.random_like(1) == a.random_like(1)
    assert a.random_like(1) != a.random_like(2)
    hits = torch.zeros(7, 11)
    for seed in range(300):
        other = a.random_like(seed)
        assert other.counts == a.counts
        hits += other["a.weight"]
    share = a.counts["a.weight"] / 77
    assert (hits / 300 - share).abs().max() < 5 * (share * (1 - share) / 300) ** 0.5  # uniform: within five sigma


@given(numerator=st.integers(0, 1000))
def test_rate_is_the_decimal_that_was_written(numerator):
    rate = numerator / 1000
    assert select(scores(), rate=rate).total == int(Fraction(numerator, 1000) * NUMEL)


def test_a_rate_that_floats_cannot_hold():
    assert select({"w": torch.rand(100)}, rate=0.29).total == 29  # 0.29 * 100 is 28.999999999999996
    assert select({"w": torch.rand(10)}, rate=0.3).total == 3


def test_global_selection_takes_the_largest_of_all():
    s = scores()
    found = select(s, k=500)
    lowest = min(float(v[found[n]].min()) for n, v in s.items() if found.counts[n])
    highest = max(float(v[~found[n]].max()) for n, v in s.items() if (~found[n]).any())
    assert found.total == 500
    assert lowest > highest


def test_scopes_and_exclusions():
    s = scores()
    layer = select(s, rate=0.1, scope="layer")
    assert layer.counts == {"a.weight": 7, "a.bias": 0, "scalar": 0, "empty": 0, "b": 7000}
    quota = select(s, scope={"a.*": 0.5, "*": 0.001})
    assert quota.counts == {"a.weight": 38, "a.bias": 3, "scalar": 0, "empty": 0, "b": 70}
    assert select(s, scope={"b": 0.001}).counts["a.weight"] == 0
    without = select(s, rate=0.1, exclude=["b", "*.bias"])
    assert without.total == int(Fraction("0.1") * 78)
    assert without.counts["b"] == without.counts["a.bias"] == 0
    assert without.names == list(SHAPES)


def test_zero_scores_are_counted_and_warned_about():
    s = {"w": torch.zeros(1000)}
    s["w"][:50] = torch.rand(50) + 0.1
    assert select(s, k=50).zero_score_selected == 0
    with pytest.warns(UserWarning, match=r"50 of 100 selected weights have score 0.*largest useful rate is 0.050000"):
        found = select(s, k=100)
    assert found.zero_score_selected == 50
    assert found.indices("w").tolist() == list(range(100))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either rate or k"),
        ({"rate": 0.1, "k": 3}, "either rate or k"),
        ({"rate": 1.1}, "rate must lie between 0 and 1"),
        ({"rate": -0.1}, "rate must lie between 0 and 1"),
        ({"k": NUMEL + 1}, "k must lie between"),
        ({"k": 3, "scope": "layer"}, "takes a rate"),
        ({"rate": 0.1, "scope": "model"}, "scope must be"),
        ({"rate": 0.1, "scope": {"*": 0.1}}, "holds the rates"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        select(scores(), **options)


def test_nan_scores_raise_or_are_skipped():
    s = scores()
    s["b"][3] = torch.nan
    with pytest.raises(ValueError, match=r"1 NaN of .* in scores\['b'\]"):  # the parameter's name, not its place
        select(s, rate=0.1)
    assert not select(s, k=NUMEL - 1, nan="skip")["b"][3]


def test_file_round_trip(tmp_path):
    for share in (0.0, 0.2, 1.0):
        before = random_masks(share=share)
        before.save(tmp_path / "m.safetensors")
        after = MaskSet.load(tmp_path / "m.safetensors")
        assert after == before
        assert after.counts == before.counts
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_file_takes_two_bytes_a_weight(tmp_path):
    found = select({"w": torch.rand(1_000_000)}, rate=0.01)
    found.save(tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_size < 2 * 10_000 + 1000


def test_a_folder_that_is_not_there_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        random_masks().save(tmp_path / "nowhere" / "m.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        random_masks().save(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_set_says_which_base_it_belongs_to(tmp_path):
    plain = random_masks()
    base, other = {"b": "0" * 64}, {"b": "f" * 64}
    masks, same, different = (MaskSet(plain.bits, plain.shapes, base=hashes) for hashes in (base, base, other))
    masks.save(tmp_path / "m")
    assert MaskSet.load(tmp_path / "m").base == masks.base == base
    plain.save(tmp_path / "m")
    assert MaskSet.load(tmp_path / "m").base is None
    assert (masks & same).base == masks.to("cpu").base == masks.random_like(0).base == base
    assert (masks | different).base is None is (masks - plain).base


def write(path, tensors, **metadata):
    """A mask file with these contents and a right hash, so that only the change is wrong."""
    plain = {"format": _mask_files.FORMAT, "shapes": json.dumps({n: list(s) for n, s in SHAPES.items()})}
    plain |= {
        "sha256": _mask_files.digest({key: [tensor.reshape(-1)] for key, tensor in tensors.items()}),
        "zero_score_selected": "0",
    }
    save_file(tensors, path, metadata=plain | metadata)


def low(values):
    return torch.tensor(values, dtype=torch.uint16)


def sparse_masks():
    """Lists for "b", "a.bias" and two empty ones; bits for "a.weight"."""
    shares = {"a.weight": 0.3, "b": 0.03}
    generator = torch.Generator().manual_seed(0)
    return MaskSet.from_masks({n: torch.rand(s, generator=generator) < shares.get(n, 0) for n, s in SHAPES.items()})


BROKEN = {
    "format": lambda t: (t, {"format": "other/1"}),
    "hash": lambda t: (t, {"sha256": "0" * 64}),
    "shapes no JSON": lambda t: (t, {"shapes": "{"}),
    "shapes negative": lambda t: (t, {"shapes": json.dumps({**{n: list(s) for n, s in SHAPES.items()}, "b": [-1]})}),
    "shapes huge": lambda t: (
        t,
        {"shapes": json.dumps({**{n: list(s) for n, s in SHAPES.items()}, "b": [1 << 40] * 4})},
    ),
    "shapes of others": lambda t: (t, {"shapes": json.dumps({"c": [3]})}),
    "zero scores": lambda t: (t, {"zero_score_selected": "many"}),
    "base no JSON": lambda t: (t, {"base": "["}),
    "base no hash": lambda t: (t, {"base": json.dumps({"b": "f" * 63})}),
    "base a list": lambda t: (t, {"base": json.dumps(["f" * 64])}),
    "missing tensor": lambda t: ({k: v for k, v in t.items() if k != "b/offset"}, {}),
    "out of range": lambda t: ({**t, "a.bias/low": low([7]), "a.bias/offset": torch.tensor([0, 1])}, {}),
    "unsorted": lambda t: ({**t, "a.bias/low": low([3, 1]), "a.bias/offset": torch.tensor([0, 2])}, {}),
    "twice": lambda t: ({**t, "a.bias/low": low([3, 3]), "a.bias/offset": torch.tensor([0, 2])}, {}),
    "offset end": lambda t: ({**t, "a.bias/low": low([1, 3]), "a.bias/offset": torch.tensor([0, 9])}, {}),
    "offset falls": lambda t: ({**t, "b/offset": torch.tensor([0, -5, len(t["b/low"])])}, {}),
    "offset length": lambda t: ({**t, "b/offset": torch.tensor([0, len(t["b/low"])])}, {}),
    "both forms": lambda t: ({**t, "b/bits": torch.zeros(8752, dtype=torch.uint8)}, {}),
    "bits length": lambda t: ({**t, "a.weight/bits": torch.zeros(8, dtype=torch.uint8)}, {}),
    "bits padding": lambda t: ({**t, "a.weight/bits": torch.full((16,), 255, dtype=torch.uint8)}, {}),
    "bits dtype": lambda t: ({**t, "a.weight/bits": t["a.weight/bits"].to(torch.int8)}, {}),
    "across blocks": lambda t: (
        {**t, "b/low": low([5, 4_464, 4_465]), "b/offset": torch.tensor([0, 1, 3])},
        {},
    ),
    "dtype": lambda t: ({**t, "b/low": t["b/low"].to(torch.int32)}, {}),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_file_is_refused(tmp_path, broken):
    path = tmp_path / "m.safetensors"
    sparse_masks().save(path)
    tensors, metadata = BROKEN[broken](load_file(path))
    write(path, tensors, **metadata)
    with pytest.raises(CheckpointError, match=r"m\.safetensors must"):
        MaskSet.load(path)


def test_the_broken_files_differ_by_their_break_alone(tmp_path):
    sparse_masks().save(tmp_path / "m.safetensors")
    write(tmp_path / "same.safetensors", load_file(tmp_path / "m.safetensors"))
    assert MaskSet.load(tmp_path / "same.safetensors") == sparse_masks()


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 64])
def test_another_kind_of_file_is_refused(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="must be a safetensors file"):
        MaskSet.load(tmp_path / "m.safetensors")
    with pytest.raises(FileNotFoundError):
        MaskSet.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("bits", "shapes", "message"),
    [
        ({"a": torch.zeros(8, dtype=torch.uint8)}, {"b": (3,)}, "same names"),
        ({"a": torch.zeros(16, dtype=torch.uint8)}, {"a": (3,)}, "must be uint8 of 8 bytes"),
        ({"a": torch.full((8,), 8, dtype=torch.uint8)}, {"a": (3,)}, "zero past the last of 3"),
    ],
)
def test_bits_that_do_not_fit(bits, shapes, message):
    with pytest.raises(ValueError, match=message):
        MaskSet(bits, shapes)


def model_pair():
    torch.manual_seed(0)
    model, initial = (nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 2)) for _ in range(2))
    return model, initial


def test_rewind_sets_the_selected_weights_and_no_other(backend):
    model, initial = model_pair()
    before = copy.deepcopy(model)
    chosen = select({n: torch.rand_like(p) for n, p in model.named_parameters()}, rate=0.3)
    assert rewind_(model, chosen, initial, backend=backend) is model
    for (name, p), w, w0 in zip(model.named_parameters(), before.parameters(), initial.parameters(), strict=True):
        assert torch.equal(p, torch.where(chosen[name], w0, w))


@pytest.mark.parametrize("source", ["module", "state_dict", "file", "bfloat16"])
def test_initial_values_from_anywhere(source, tmp_path):
    model, initial = model_pair()
    state = {n: t.bfloat16() if source == "bfloat16" else t for n, t in initial.state_dict().items()}
    save_file(state, tmp_path / "w0.safetensors")
    given = {"module": initial, "file": tmp_path / "w0.safetensors"}.get(source, state)
    rewind_(model, select({n: torch.ones_like(p) for n, p in model.named_parameters()}, rate=1), given)
    assert all(torch.equal(p, state[n].float()) for n, p in model.named_parameters())


def test_what_is_of_another_model_changes_nothing():
    model, initial = model_pair()
    before = copy.deepcopy(model.state_dict())
    chosen = select({n: torch.rand_like(p) for n, p in model.named_parameters()}, rate=1)
    other = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"'1.weight' has shape \(3, 6\) there, \(2, 6\) here"):
        rewind_(other, chosen, initial)
    with pytest.raises(ValueError, match=r"no parameter '0\.weight'"):
        rewind_(nn.Linear(5, 6), chosen, initial)
    with pytest.raises(ValueError, match=r"initial\['1.weight'\] must have"):
        rewind_(model, chosen, other)
    with pytest.raises(ValueError, match=r"1 missing, the first is '0\.bias'"):
        rewind_(model, chosen, {n: p for n, p in initial.state_dict().items() if n != "0.bias"})
    with pytest.raises(TypeError, match="initial must be a module"):
        rewind_(model, chosen, 3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"exclude": "*.bias"}, TypeError, r"exclude must be a sequence of patterns, such as \['\*\.bias'\]"),
        ({"rate": None, "scope": {"wieght": 0.5}}, ValueError, "'wieght' matches none"),
        ({"rate": True}, TypeError, "rate must be a number; got True"),
        ({"rate": "a"}, TypeError, "rate must be a number; got 'a'"),
    ],
)
def test_slips_in_select_are_named(given, error, message):
    with pytest.raises(error, match=message):
        select({"weight": torch.rand(8), "0.bias": torch.rand(2)}, **({"rate": 0.5} | given))


def test_scores_and_masks_of_other_types_are_named():
    with pytest.raises(TypeError, match="scores must be"):
        select([torch.rand(3)], rate=0.5)
    model, initial = model_pair()
    with pytest.raises(TypeError, match="masks must be a MaskSet"):
        rewind_(model, {"0.weight": torch.ones(6, 5).bool()}, initial)


def test_initial_weights_in_the_models_own_memory_are_refused():
    model, _ = model_pair()
    chosen = select({n: torch.rand_like(p) for n, p in model.named_parameters()}, rate=0.5)
    with pytest.raises(ValueError, match="copy made before training"):
        rewind_(model, chosen, model.state_dict())
    with pytest.raises(ValueError, match="copy made before training"):
        rewind_(model, chosen, model)


def test_the_picture_shows_the_share_of_each_part(tmp_path):
    masks = MaskSet.from_masks(
        {f"layers.{i}.weight": torch.arange(100) < 10 * i for i in range(4)} | {"head.weight": torch.zeros(0).bool()}
    )
    pytest.importorskip("matplotlib")
    figure = masks.plot(tmp_path / "m.png")
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0, 10, 20, 30, 0])
    assert [label.get_text() for label in axes.get_yticklabels()] == [*(f"layers.{i}" for i in range(4)), "head"]
    assert "60 of 400 weights" in axes.get_title()
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    many = MaskSet.from_masks({f"layers.{i}.weight": torch.arange(100) < i for i in range(90)})
    assert [bar.get_width() for bar in many.plot().axes[0].patches] == pytest.approx(list(range(30, 90)))
    with pytest.raises(ValueError, match="group must be"):
        masks.plot(group="letter")


def test_a_picture_without_matplotlib_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"MaskSet\.plot needs matplotlib"):
        MaskSet.from_masks({"a": torch.ones(3).bool()}).plot()


def test_weights_of_several_devices_are_rewound_by_device(monkeypatch):
    model = nn.ParameterDict({n: torch.zeros(9, device=d) for n, d in (("a", "cpu"), ("b", "meta"), ("c", "cpu"))})
    masks = MaskSet.from_masks({name: torch.ones(9).bool() for name in model})
    calls = []  # without kernels for a second device, what they would be called with
    monkeypatch.setattr(ops, "rewind_", lambda w, v, p, backend: calls.append([*w, *v, *p]))
    rewind_(model, masks, {name: torch.ones(9) for name in model})
    assert [[t.device.type for t in call] for call in calls] == [["cpu"] * 6, ["meta"] * 3]


def test_a_parameter_that_is_not_dense_is_refused_by_name():
    model = nn.ParameterDict({"a": torch.zeros(3, 4), "b": torch.zeros(4).expand(3, 4)})
    masks = MaskSet.from_masks({name: torch.ones(3, 4).bool() for name in model})
    with pytest.raises(ValueError, match="b is written in place and must be dense"):
        rewind_(model, masks, {name: torch.ones(3, 4) for name in model})
    assert not model["a"].any()
