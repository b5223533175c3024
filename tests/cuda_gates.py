"""Compiles csrc/cuda/*.cu for sm_80 and sm_90 and measures the machine code; ``python tests/cuda_gates.py`` rewrites
docs/gates-cuda.md. Needs nvcc, c++filt and cuobjdump (of the CUDA toolkit, or the one that Triton's wheel brings)."""

import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/gates-cuda.md"
ARCHS = (80, 90)


class Kernel(NamedTuple):
    """What the compiler made of a kernel. ``loop``: multiply instructions inside a loop, by their commonest kind."""

    arch: int
    name: str
    registers: int
    spills: int
    static_shared: int
    loop: str


def tools() -> dict[str, str]:
    """Path of each tool that the measurement needs; empty where it is missing."""
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else Path("none")
    cuobjdump = shutil.which("cuobjdump") or (str(bundled) if bundled.is_file() else "")
    return {"nvcc": shutil.which("nvcc") or "", "c++filt": shutil.which("c++filt") or "", "cuobjdump": cuobjdump}


def nvcc_version() -> str:
    printed = subprocess.run([tools()["nvcc"], "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", printed).group(1)


def short(mangled: str) -> str:
    """``saliency_kernel<MmaTile<__half>, false, true>``."""
    name = subprocess.run([tools()["c++filt"], mangled], check=True, capture_output=True, text=True).stdout
    name = re.sub(r"\(anonymous namespace\)::|cwfast::|^void ", "", name.strip())
    return re.sub(r"\((?!anonymous).*\)$", "", name)


def multiplies_in_loops(sass: str) -> str:
    """Multiply instructions between the target of a backward branch and the branch."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    inside = set()
    for at, text in lines:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and int(branch.group(1), 16) < at:
            inside |= {place for place, _ in lines if int(branch.group(1), 16) <= place <= at}
    found = [kind for at, text in lines if at in inside and (kind := re.search(r"\b(HMMA|HGMMA|FFMA)\b", text))]
    kinds = [kind.group(1) for kind in found]
    best = next((kind for kind in ("HGMMA", "HMMA", "FFMA") if kind in kinds), "")
    return f"{kinds.count(best)} {best}" if best else "none"


def measure(stem: str, arch: int) -> list[Kernel]:
    """Every kernel of ``csrc/cuda/<stem>.cu``."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [tools()["nvcc"], "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=sm_{arch}", "-cubin"]
        command += ["-Xptxas", "-v", str(ROOT / f"csrc/cuda/{stem}.cu"), "-o", str(cubin)]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        dump = [tools()["cuobjdump"], "-sass", str(cubin)]
        sass = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    code = {part.split("\n", 1)[0].strip(): part for part in sass.split("Function : ")[1:]}
    kernels = []
    for part in log.split("Compiling entry function '")[1:]:
        mangled = part.split("'", 1)[0]
        numbers = {
            what: int(match.group(1)) if (match := re.search(rf"(\d+) {what}", part)) else 0
            for what in ("registers", "bytes spill stores", "bytes spill loads", "bytes stack frame", "bytes smem")
        }
        spills = sum(numbers[f"bytes {what}"] for what in ("spill stores", "spill loads", "stack frame"))
        loop = multiplies_in_loops(code[mangled])
        kernels.append(Kernel(arch, short(mangled), numbers["registers"], spills, numbers["bytes smem"], loop))
    return sorted(kernels)


def sources() -> list[str]:
    return sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu") if "__global__" in path.read_text())


def page(kernels: list[Kernel], dynamic_shared: int) -> str:
    """docs/gates-cuda.md."""
    lines = [
        "# Machine code of the CUDA kernels",
        "",
        f"Written by `python tests/cuda_gates.py` with nvcc {nvcc_version()}; `tests/test_cuda_gates.py` compares it",
        "with what the sources compile to. **None of these kernels has run on a GPU yet.** A block of the saliency",
        f"kernels owns 128 x 128 weights, with 256 threads and {dynamic_shared} bytes of dynamic shared memory; their",
        "parameters: the way to multiply, whether every row is a sample (T = 1), whether the gradient sum is wanted.",
        "The kernels of lm_token_stats own 128 tokens x 128 words, with 256 threads and at most",
        f"{lm_shared_bytes()} bytes of dynamic shared memory; the number is the task (CwfastLmTask).",
        "Spills: bytes of spill stores, spill loads and stack. Loop: multiply instructions inside loops.",
        "",
        "| sm | kernel | registers | spills | static shared | loop |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {k.arch} | `{k.name}` | {k.registers} | {k.spills} | {k.static_shared} | {k.loop} |" for k in kernels]
    return "\n".join(lines) + "\n"


def saliency_shared_bytes() -> int:
    """kStages * 2 operands * kDepth * kPitch * sizeof(Element), the larger of 16-bit and float32."""
    return max(4 * 2 * (64 // size) * (128 + 16 // size) * size for size in (2, 4))


def lm_shared_bytes() -> int:
    """kStages * 2 operands * 128 rows of 80 bytes, and two strips of 128 x 65 floats (KL)."""
    return 4 * 2 * 128 * 80 + 2 * 128 * 65 * 4


def main() -> None:
    kernels = [kernel for stem in sources() for arch in ARCHS for kernel in measure(stem, arch)]
    PAGE.write_text(page(kernels, saliency_shared_bytes()))


if __name__ == "__main__":
    main()
