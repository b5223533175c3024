"""Compiles every Triton kernel for sm_80, sm_90 and gfx942 and measures the machine code; no GPU is needed.

``python tests/triton_gates.py`` rewrites benchmarks/results/triton-gates.json and docs/gates-triton.md. A new kernel is
an entry in ``entries``. NVIDIA's code is read with the cuobjdump that Triton's wheel brings.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from cwfast.kernels import embedding_saliency, lm_token_stats, logit_stats, rewind, saliency, select
from cwfast.kernels._tl import integer
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks/results/triton-gates.json"
PAGE = ROOT / "docs/gates-triton.md"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}  # bytes that a block may have
REGISTER_LIMIT = {"sm_80": 255, "sm_90": 255, "gfx942": 256}  # of a thread, with 8 warps
TENSOR_CORE = r"\bHMMA\b|\bHGMMA\b|v_mfma_f32"
COUNTED = {  # in the inner loop
    "tensor_core": TENSOR_CORE,
    "async_copies": r"\bLDGSTS\b|\bUTMALDG\b",
}


class Entry(NamedTuple):
    """One specialisation of a kernel.

    Attributes:
        name: unique.
        kernel: the function under ``triton.jit``.
        types: by argument, Triton's names; a type that ends in ``:16`` is a multiple of 16 (pointers always are).
        constants: the other arguments.
        options: num_warps and, where they matter, num_stages.
        tensor_cores: whether the inner loop must multiply on tensor cores.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    tensor_cores: bool = False


def saliency_entry(
    dtype: torch.dtype, power: int, hip: bool, *, grad=False, factor=True, short=False, one_row=False, odd=False
) -> Entry:
    """``odd``: O and I are not multiples of 16."""
    tile = saliency.tiles(dtype, one_row, power, short, hip)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    element = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}[dtype]
    sums = "fp64" if dtype == torch.float64 else "fp32"
    size = "i32" if odd else "i32:16"
    types = {"out": f"*{sums}", "grad": f"*{sums}", "inputs": f"*{element}", "grad_outputs": f"*{element}"}
    types |= {"factor": f"*{element}", "blocks": "*i64", "shares": "*i64", "scale": "fp64"}
    types |= dict.fromkeys(["n_out", "n_in", "factor_row"], size)
    types |= dict.fromkeys(["input_columns", "grad_output_columns", "input_row", "grad_output_row"], "i32:16")
    constants = {"POWER": power, "ONE_ROW": one_row, "HAS_FACTOR": factor, "HAS_GRAD": grad, "factor_col": 1}
    constants |= {**tile, "GROUP": saliency.GROUP, "OFFSET": tl.int32}
    words = [f"saliency {element}", "T=1" if one_row else "T>1", f"power {power}"]
    words += [word for word, given in {"grad": grad, "factor": factor, "short": short, "odd": odd}.items() if given]
    tensor_cores = dtype in (torch.bfloat16, torch.float16) and not (one_row and power == 2)
    return Entry(" ".join(words), saliency._saliency_kernel, types, constants, options, tensor_cores)


def select_entries(dtype: torch.dtype) -> list[Entry]:
    types = {"table": "*i64", "state": "*i64", "chunks": "i32"}
    size = dtype.itemsize
    common = {"TYPE": select.integer(size), "INF": select.INFINITY[dtype], "ALIGNED": True, "BLOCK": select.BLOCK}
    first = {"SHIFT": 8 * size - select.DIGIT, "FIRST": True, "ABS": False, "BINS": select.BINS}
    histogram = types | {"histograms": "*i32", "invalid": "*i32"}
    emit = types | {"ties_before": "*i64", "counts": "*i32"}
    name, warps = f"select {8 * size} bits", {"num_warps": 8}
    return [
        Entry(f"{name} histogram", select._histogram_kernel, histogram, common | first, warps),
        Entry(f"{name} emit", select._emit_kernel, emit, common, warps),
    ]


def rewind_entries() -> list[Entry]:
    kernel, table, warps = rewind._move_kernel, {"table": "*i64", "tensors": "i32"}, {"num_warps": 8}
    survey = Entry("rewind survey", rewind._survey_kernel, table | {"counts": "*i64", "wrong": "*i32"}, {}, warps)
    return [survey, *(Entry(f"rewind {8 * n} bits", kernel, table, {"TYPE": integer(n)}, warps) for n in (1, 2, 4, 8))]


def embedding_entry(power: int, grad: bool) -> Entry:
    module = embedding_saliency
    types = {"out": "*fp32", "grad_outputs": "*bf16", "factor": "*bf16", "grad": "*fp32", "scale": "fp64"}
    types |= dict.fromkeys(["order", "segments", "firsts", "tokens"], "*i64")
    types |= dict.fromkeys(["columns", "out_row", "rows_row", "factor_row", "grad_row"], "i32:16")
    constants = dict.fromkeys(["out_col", "rows_col", "factor_col", "grad_col"], 1)
    constants |= {"POWER": power, "HAS_FACTOR": True, "HAS_GRAD": grad, "BD": module.BD, "BT": module.BT}
    kernel, options = module._embedding_saliency_kernel, {"num_warps": module.WARPS}
    return Entry(f"embedding bf16 power {power} factor{' gradient' if grad else ''}", kernel, types, constants, options)


def logit_stats_entry(classes: int) -> Entry:
    tile = logit_stats.tiles(classes)
    options = {"num_warps": tile.pop("num_warps")}
    types = {"logits": "*bf16", "labels": "*i64", "correct": "*i1"}
    types |= dict.fromkeys(["loss", "confidence", "phi", "entropy", "modified_entropy", "margin"], "*fp32")
    types |= dict.fromkeys(["rows", "classes", "row_stride"], "i32")
    constants = tile | {"class_stride": 1}
    return Entry(f"logit_stats bf16 {classes} classes", logit_stats._logit_stats_kernel, types, constants, options)


def lm_entry(arch: str, task: int, element: str, *, cap=False, odd=False) -> Entry:
    """A task of CwfastLmTask; ``cap``: with a soft-cap and biases; ``odd``: the width is no multiple of a step's."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[element]
    narrow = lm_token_stats.narrow(
        task, not (cap or odd), int(arch.removeprefix("sm_")) if arch.startswith("sm_") else 0
    )
    constants = lm_token_stats.tiles(dtype, narrow, arch == "gfx942")
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants |= {"HAS_BIAS": cap, "HAS_REF_BIAS": cap, "HAS_CAP": cap, "EVEN": not odd, "KIND": task}
    types = dict.fromkeys(["hidden", "weight", "ref_hidden", "ref_weight"], f"*{element}")
    types |= dict.fromkeys(["bias", "ref_bias", "partial", "logit", "grad", "logsumexp", "ref_logsumexp"], "*fp32")
    types |= {"out": "*fp32" if task == 3 else f"*{element}", "counts": "*i32", "targets": "*i64"}
    types |= dict.fromkeys(["tokens", "chunks"], "i32") | dict.fromkeys(["scale", "softcap"], "fp32")
    types |= dict.fromkeys(["words", "chunk", "width", "ref_width"], "i32:16")
    types |= dict.fromkeys(["hidden_row", "weight_row", "ref_hidden_row", "ref_weight_row"], "i32:16")
    kernel = lm_token_stats.TASKS[task]
    types, constants = ({n: x for n, x in given.items() if n in kernel.arg_names} for given in (types, constants))
    words = ["lm", ("target", "stats", "kl", "logits", "logprob gradient", "kl gradient")[task], element]
    words += [word for word, given in {"cap": cap, "odd": odd, "narrow": narrow}.items() if given]
    return Entry(" ".join(words), kernel, types, constants, options, element != "fp32")


def lm_entries(arch: str) -> list[Entry]:
    found = [lm_entry(arch, task, "bf16", cap=cap) for task in range(6) for cap in (False, True)]
    found += [lm_entry(arch, 1, "fp16"), lm_entry(arch, 1, "bf16", odd=True)]
    return [*found, *(lm_entry(arch, task, "fp32", cap=True) for task in (0, 1, 2, 5))]


def entries(arch: str) -> list[Entry]:
    """Every kernel, as it is launched on this architecture."""
    hip = TARGETS[arch].backend == "hip"
    bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    found = [
        saliency_entry(bf16, power, hip, grad=grad, factor=factor)
        for power in (1, 2)
        for grad in (False, True)
        for factor in (False, True)
    ]
    found += [saliency_entry(bf16, power, hip, grad=grad, short=True) for power in (1, 2) for grad in (False, True)]
    found += [saliency_entry(bf16, 1, hip, grad=grad, odd=True) for grad in (False, True)]
    found += [saliency_entry(dtype, power, hip, grad=True) for dtype in (fp16, fp32, fp64) for power in (1, 2)]
    found += [saliency_entry(dtype, power, hip, one_row=True) for dtype in (bf16, fp16, fp32) for power in (1, 2)]
    found += [saliency_entry(dtype, 0, hip, one_row=True, factor=False) for dtype in (bf16, fp32)]
    for dtype in (bf16, fp32, fp64):
        found += select_entries(dtype)
    digit = {"histogram": "*i64", "state": "*i64"}
    found.append(Entry("select digit", select._digit_kernel, digit, {"BINS": select.BINS}, {"num_warps": 4}))
    found += [embedding_entry(power, grad) for power in (1, 2) for grad in (False, True)]
    return [*found, *rewind_entries(), *map(logit_stats_entry, (10, 1000)), *lm_entries(arch)]


def inner_loop(lines: list[tuple[int, str]], target: Callable[[str], int | None], wanted: str) -> list[str]:
    """The instructions of the shortest loop that holds a wanted one, else of the longest; lines as (place, text).

    A loop reaches from the target of a backward branch to the branch.
    """
    loops = []
    for place, text in lines:
        to = target(text)
        if to is not None and to < place:
            loops.append([line for at, line in lines if to <= at <= place])
    loops.sort(key=len)
    with_wanted = [loop for loop in loops if re.search(wanted, "\n".join(loop))]
    return (with_wanted or loops[-1:] or [[]])[0]


def nvidia_loop(sass: str) -> list[str]:
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]

    def target(text: str) -> int | None:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        return int(branch.group(1), 16) if branch else None

    return inner_loop(lines, target, TENSOR_CORE)


def amd_loop(assembly: str) -> list[str]:
    lines = list(enumerate(assembly.splitlines()))
    labels = {label.group(1): place for place, text in lines if (label := re.match(r"(\.LBB\w+):", text))}

    def target(text: str) -> int | None:
        branch = re.search(r"\bs_c?branch\w*\s+(\.LBB\w+)", text)
        return labels.get(branch.group(1)) if branch else None

    return inner_loop(lines, target, TENSOR_CORE)


def measure(entry: Entry, arch: str) -> dict[str, Any]:
    """Tile (where the kernel has one), registers, spill instructions, shared bytes, and counts in the inner loop."""
    names = entry.kernel.arg_names
    signature = {name: entry.types.get(name, "constexpr").removesuffix(":16") for name in names}
    multiples = [name for name, kind in entry.types.items() if kind[0] == "*" or kind.endswith(":16")]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(entry.kernel, signature, entry.constants, attrs)
    binary = triton.compile(source, target=TARGETS[arch], options=entry.options)
    if TARGETS[arch].backend == "hip":
        code = binary.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", code).group(1))
        # Scalar registers are spilled into vector registers: only what these spill, and scratch, is memory.
        spills = sum(map(int, re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", code)))
        loop = amd_loop(code)
    else:
        usage, code = dump(binary.asm["cubin"])
        registers = int(re.search(r"REG:(\d+)", usage).group(1))
        spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
        loop = nvidia_loop(code)
    sides = ("BN", "BV", "BK") if "BV" in entry.constants else ("BO", "BI", "BT")
    tile = [entry.constants[name] for name in sides if name in entry.constants]
    counts = {what: len(re.findall(pattern, "\n".join(loop))) for what, pattern in COUNTED.items()}
    kinds = sorted(set(re.findall(r"\bHMMA\b|\bHGMMA\b|\bv_mfma_f32_\w+?(?=_bf16|_f16|_\d|\b)", "\n".join(loop))))
    result = {"tile": tile, "registers": registers, "spills": spills, "shared": binary.metadata.shared}
    return result | counts | {"kind": kinds[0].split("_f32")[0] if kinds else ""}


def dump(cubin: bytes) -> tuple[str, str]:
    """Resource usage and SASS."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, code = (
            subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return usage, code


def check(arch: str, entry: Entry, have: dict[str, Any]) -> None:
    """What must hold of every kernel, whatever the table says."""
    where = (arch, entry.name, have)
    assert have["spills"] == 0, where
    assert have["registers"] <= REGISTER_LIMIT[arch], where
    assert have["shared"] <= SHARED_LIMIT[arch], where
    if entry.tensor_cores:
        assert have["tensor_core"] > 0, where
        assert have["kind"] == {"sm_80": "HMMA", "sm_90": "HGMMA", "gfx942": "v_mfma"}[arch], where
        assert have["tile"][0] >= 128, where
        assert have["tile"][1] >= (64 if entry.name.endswith("narrow") else 128), where
        if arch != "gfx942":  # whose loads wait in registers
            assert have["async_copies"] >= 4, where  # both operands, not only the offsets


def page(table: dict[str, dict[str, Any]]) -> str:
    """docs/gates-triton.md."""
    lines = [
        "# Machine code of the Triton kernels",
        "",
        f"Written by `python tests/triton_gates.py` with Triton {triton.__version__}; `tests/test_triton.py` compiles",
        "the kernels again and holds them to it. **None of these kernels has run on a GPU yet.** Inner loop: matrix",
        "instructions of tensor cores and asynchronous copies to shared memory between a backward branch and its",
        "target; AMD's loads go through registers. Spills: to memory. T>1: samples of several rows, T=1: of one;",
        "grad: the gradient sum comes from the same pass; short: samples of at most 32 rows on average; odd: O and I",
        "are not multiples of 16. Tile: rows of the weight, columns, rows of the operands in one step. lm_token_stats",
        "(lm): tokens, words, columns in one step; cap: with soft-cap and biases; odd: the width is no multiple of a",
        "step's; narrow: half as many words, where the registers are short.",
        "",
        "| target | kernel | tile | registers | spills | shared bytes | inner loop |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in table.items():
        arch, kernel = name.split(" ", 1)
        tile = " x ".join(map(str, row["tile"])) or "-"
        loop = [f"{row['tensor_core']} {row['kind']}"] if row["tensor_core"] else []
        loop += [f"{row['async_copies']} copies"] if row["async_copies"] else []
        cells = [arch, kernel, tile, row["registers"], row["spills"], row["shared"], ", ".join(loop) or "-"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def measure_all(arch: str) -> dict[str, dict[str, Any]]:
    rows = {}
    for entry in entries(arch):
        rows[f"{arch} {entry.name}"] = have = measure(entry, arch)
        print(arch, entry.name, have, flush=True)
        check(arch, entry, have)
    return rows


def main() -> None:
    with ProcessPoolExecutor(len(TARGETS)) as pool:
        table = {name: row for rows in pool.map(measure_all, TARGETS) for name, row in rows.items()}
    rows = ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
    TABLE.write_text("{\n" + rows + "\n}\n")
    PAGE.write_text(page(table))


if __name__ == "__main__":
    main()
