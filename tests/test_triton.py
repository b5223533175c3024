"""Triton without a GPU: the property tests in the interpreter, and machine code with limits on what it uses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GATES = ROOT / "benchmarks" / "results" / "triton-gates.json"
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
triton = pytest.importorskip("triton")


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


@pytest.mark.exhaustive
@pytest.mark.parametrize("stem", ["saliency", "select", "rewind", "logit_stats"])
def test_property_tests_in_the_interpreter(stem):
    command = [sys.executable, "-P", "-m", "pytest", "-q", f"tests/test_{stem}.py", "-k", "triton"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, env=env)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "triton (run)" in done.stdout


def compiled_saliency(target, power, has_grad, path):
    """The bf16 kernel for T > 1: its registers, spills, shared memory and tensor-core instructions."""
    import triton.language as tl
    from cwfast.kernels import saliency
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = saliency._saliency_kernel
    tile = saliency.tiles(torch.bfloat16, False, power, has_grad)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    pointers = {"out": "*fp32", "inputs": "*bf16", "grad_outputs": "*bf16", "factor": "*fp32", "grad": "*fp32"}
    numbers = dict.fromkeys(["n_out", "n_in", "input_row", "grad_output_row", "factor_row"], "i32")
    given = pointers | numbers | {"row_offsets": "*i64", "scale": "fp64", "samples": "i32"}
    constants = tile | {"POWER": power, "ONE_ROW": False, "HAS_FACTOR": True, "HAS_GRAD": has_grad, "GROUP": 8}
    constants |= {"OFFSET": tl.int32, "input_col": 1, "grad_output_col": 1, "factor_col": 1}
    names = kernel.arg_names
    signature = {name: given.get(name, "constexpr") for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers | numbers}
    binary = triton.compile(ASTSource(kernel, signature, constants, attrs), target=GPUTarget(*target), options=options)
    result = {"tile": [tile["BO"], tile["BI"]], "shared": binary.metadata.shared}
    if target[0] == "hip":
        code = binary.asm["amdgcn"]
        spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", code))
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", code).group(1))
        return result | {"registers": registers, "spills": spills, "tensor_core": len(re.findall("v_mfma", code))}
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return result | machine_code(binary.asm["cubin"], tools, path)


def machine_code(cubin, tools, path):
    """Registers, spills and tensor-core instructions of an NVIDIA binary."""
    path.write_bytes(cubin)
    usage, code = (
        subprocess.run([tools / tool, *arguments, path], capture_output=True, text=True, check=True).stdout
        for tool, *arguments in (("cuobjdump", "-res-usage"), ("nvdisasm",))
    )
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    return {"registers": registers, "spills": spills, "tensor_core": len(re.findall(r"\bHG?MMA\b", code))}


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_logit_stats_compile_without_spills(name, tmp_path):
    from cwfast.kernels import logit_stats
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = logit_stats._logit_stats_kernel
    tile = logit_stats.tiles(1000)
    options = {"num_warps": tile.pop("num_warps")}
    given = dict.fromkeys(["rows", "classes", "row_stride"], "i32") | {"logits": "*bf16", "labels": "*i64"}
    given |= dict.fromkeys(["loss", "confidence", "phi", "entropy", "modified_entropy", "margin"], "*fp32")
    given |= {"correct": "*i1"}
    signature = {argument: given.get(argument, "constexpr") for argument in kernel.arg_names}
    source = ASTSource(kernel, signature, tile | {"class_stride": 1}, {})
    binary = triton.compile(source, target=GPUTarget(*TARGETS[name]), options=options)
    if name.startswith("gfx"):
        spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", binary.asm["amdgcn"]))
    else:
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        spills = machine_code(binary.asm["cubin"], tools, tmp_path / "kernel.cubin")["spills"]
    assert spills == 0


@pytest.mark.slow
def test_machine_code_keeps_to_the_committed_gates(tmp_path):
    """CWFAST_WRITE_GATES=1 writes the table anew."""
    found = {
        f"saliency bf16 T>1 power {power}{' grad' if has_grad else ''} {name}": compiled_saliency(
            target, power, has_grad, tmp_path / "kernel.cubin"
        )
        for power in (1, 2)
        for has_grad in (False, True)
        for name, target in TARGETS.items()
    }
    if os.environ.get("CWFAST_WRITE_GATES") == "1":
        GATES.write_text(json.dumps(found, indent=1) + "\n")
    for name, limit in json.loads(GATES.read_text()).items():
        have = found[name]
        assert have["spills"] == 0, (name, have)
        assert have["tensor_core"] > 0, (name, have)
        assert have["registers"] <= limit["registers"], (name, have)
        assert have["shared"] <= limit["shared"], (name, have)
        assert have["tile"] == limit["tile"]
    assert found.keys() == json.loads(GATES.read_text()).keys()
