"""Triton without a GPU: the property tests in the interpreter, and machine code with limits on what it uses."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
triton = pytest.importorskip("triton")
saliency = pytest.importorskip("cwfast.kernels.saliency")
triton_gates = pytest.importorskip("triton_gates")


def test_bfloat16_in_the_interpreter_is_as_in_torch(tmp_path):
    """Each operation that the saliency kernels use on bfloat16, before a kernel is tested with it."""
    script = tmp_path / "check.py"
    script.write_text("""
import torch, triton, triton.language as tl
import triton_bf16
triton_bf16.patch()
@triton.jit
def kernel(a, b, product, magnitude, up, down, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(product + at, tl.dot(tl.trans(x), y))
    tl.store(magnitude + at, tl.abs(x))
    tl.store(up + at, x.to(tl.float32))
    tl.store(down + at, x.to(tl.float32).to(tl.bfloat16))
torch.manual_seed(0)
a, b = (torch.randint(-9, 9, (32, 32)).bfloat16() / 8 for _ in range(2))
product, up = torch.empty(32, 32), torch.empty(32, 32)
magnitude, down = torch.empty_like(a), torch.empty_like(a)
kernel[(1,)](a, b, product, magnitude, up, down, 32)
assert torch.equal(product, a.float().T @ b.float())
assert torch.equal(magnitude, a.abs())
assert torch.equal(up, a.float())
assert torch.equal(down, a)
""")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr


def interpret(stem, which):
    """The tests of a stem in a process whose Triton interprets; what must have run on the path "triton"."""
    files = [f"tests/test_{name}.py" for name in (stem, *ALSO.get(stem, ()))]
    command = [sys.executable, "-P", "-m", "pytest", "-q", *files, "-k", f"triton and {which}"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, env=env)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "triton (run)" in done.stdout


ALSO = {"lm_token_stats": ["lm_token_kl"]}  # other tests of a kernel file

# By kernel file; what takes minutes in the interpreter, which spends milliseconds on every block of every program.
LONG = {
    "saliency": "block_edge or expanded or float64 and no_worse",
    "select": "stable_sort and float16 or many_chunks or heavy_ties or small_tensors or 30000 or word_and_chunk "
    "or skipped_nan or threads",
    "embedding_saliency": "one_column or many_chunks or two_digits",
    "lm_token_stats": "5000 or any_scale or impossible_tiles or digits",
    "logit_stats": None,
    "rewind": None,
}


def test_every_kernel_file_is_interpreted():
    assert {path.stem for path in (ROOT / "kernels" / "cw").glob("[a-z]*.py")} == LONG.keys()


@pytest.mark.parametrize(
    "stem", [stem if stem == "saliency" else pytest.param(stem, marks=pytest.mark.slow) for stem in LONG]
)
def test_property_tests_in_the_interpreter(stem):
    interpret(stem, f"not ({LONG[stem]})" if LONG[stem] else "triton")


@pytest.mark.exhaustive
@pytest.mark.parametrize("stem", [stem for stem, long in LONG.items() if long])
def test_long_property_tests_in_the_interpreter(stem):
    interpret(stem, f"({LONG[stem]})")


def test_loops_are_found():
    straight = "/*0010*/ HMMA.16816.F32 R0 ; /*0020*/ BRA 0x40 ; /*0030*/ LDGSTS.E R0 ; /*0040*/ EXIT ;"
    assert triton_gates.nvidia_loop(straight) == []
    assert len(triton_gates.nvidia_loop(straight + "/*0050*/ @P0 BRA P1, 0x10 ;")) == 5
    inner = straight + "/*0050*/ @P0 BRA 0x20 ; /*0060*/ @P0 BRA 0x10 ;"
    assert len(triton_gates.nvidia_loop(inner)) == 6  # the shorter one holds no matrix instruction
    amd = ".LBB0_1:\n v_mfma_f32_16x16x16_bf16 v0\n s_cbranch_scc1 .LBB0_1\n s_branch .LBB0_2\n.LBB0_2:\n s_endpgm"
    assert len(triton_gates.amd_loop(amd)) == 3


def test_committed_table_passes_the_gates():
    table = json.loads(triton_gates.TABLE.read_text())
    wanted = {
        f"{arch} {entry.name}": (arch, entry) for arch in triton_gates.TARGETS for entry in triton_gates.entries(arch)
    }
    assert table.keys() == wanted.keys()
    for name, have in table.items():
        triton_gates.check(*wanted[name], have)
    assert len([name for name in table if "bf16 T>1" in name]) == 14 * len(triton_gates.TARGETS)
    version = re.search(r"with Triton (\S+);", triton_gates.PAGE.read_text()).group(1)
    if version == triton.__version__:
        assert triton_gates.PAGE.read_text() == triton_gates.page(table), "run python tests/triton_gates.py"


SOME = ["saliency bf16 T>1 power 1 grad factor", "select 32 bits emit"]


def holds(arch, entry):
    have = triton_gates.measure(entry, arch)
    triton_gates.check(arch, entry, have)
    limit = json.loads(triton_gates.TABLE.read_text())[f"{arch} {entry.name}"]
    assert have["registers"] <= limit["registers"], (arch, entry.name, have)
    assert have["shared"] <= limit["shared"], (arch, entry.name, have)
    assert have["tile"] == limit["tile"]


@pytest.mark.parametrize("arch", triton_gates.TARGETS)
def test_machine_code_keeps_to_the_committed_table(arch):
    for entry in triton_gates.entries(arch):
        if entry.name in SOME:
            holds(arch, entry)


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", triton_gates.TARGETS)
def test_all_machine_code_keeps_to_the_committed_table(arch):
    for entry in triton_gates.entries(arch):
        holds(arch, entry)


@pytest.mark.parametrize("lengths", [[1], [0, 5, 0, 0, 4, 8, 1, 0], [9, 9, 9], [64, 1]])
@pytest.mark.parametrize("shares", [1, 2, 3])
def test_blocks_cover_every_row_once_and_shares_begin_at_samples(lengths, shares):
    shares = min(shares, len(lengths))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    blocks, first = saliency.blocks_of(offsets, 4, shares)
    want = [
        2 * row + (row == begin) for begin, end in itertools.pairwise(offsets.tolist()) for row in range(begin, end, 4)
    ]
    assert blocks.tolist() == [*want, 2 * sum(lengths) + 1]
    assert first[0] == 0
    assert first[-1] == len(want)
    assert (first.diff() >= 0).all()
    assert (blocks[first] % 2 == 1).all()


def test_samples_are_shared_out_only_where_tiles_are_few():
    tile = 128 * 128 * 4
    assert saliency.shares_of(64, 64, tile, 132) == 2  # 1024 x 1024
    assert saliency.shares_of(64, 133, tile, 132) == 1
    assert saliency.shares_of(3, 1, tile, 132) == 3  # samples
    assert saliency.shares_of(64, 1, tile, 132) == saliency.MOST_SHARES
    assert saliency.shares_of(64, 128, 8 * tile, 1024) == 1  # the workspace


def test_rows_are_copied_once_for_saliency_and_gradient(monkeypatch):
    launched = []
    monkeypatch.setattr(saliency, "_launch", lambda out, inputs, grads, *_: launched.append((inputs, grads)))
    rows, out = torch.randn(3, 5), torch.zeros(5, 5)  # 5 columns: not 16 bytes at a time
    saliency.accumulate_saliency_(out, rows, rows, torch.arange(4), 1, 1.0, None, out.clone(), True)
    (inputs, grads), (inputs_again, grads_again) = launched
    assert inputs is inputs_again
    assert grads is grads_again
    assert inputs.shape == grads.shape == (3, 16)
