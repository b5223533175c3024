"""The committed table of the CUDA kernels' machine code holds what it must, and is what the sources compile to."""

import re

import cuda_gates
import pytest

ROW = re.compile(r"^\| (\d+) \| `(.*)` \| (\d+) \| (\d+) \| (\d+) \| (.*) \|$", re.MULTILINE)
MISSING = [name for name, path in cuda_gates.tools().items() if not path]


def committed() -> list[cuda_gates.Kernel]:
    rows = ROW.findall(cuda_gates.PAGE.read_text())
    return [cuda_gates.Kernel(int(a), name, int(r), int(s), int(m), loop) for a, name, r, s, m, loop in rows]


def check(kernels: list[cuda_gates.Kernel]) -> None:
    assert {kernel.arch for kernel in kernels} == set(cuda_gates.ARCHS)
    for kernel in kernels:
        assert kernel.spills == 0, kernel
        assert kernel.registers * 256 <= 65536, kernel  # a block of 256 threads fits a multiprocessor
        assert kernel.static_shared <= 48 << 10, kernel
        if kernel.name.startswith("saliency_kernel<MmaTile<"):
            assert int(kernel.loop.removesuffix(" HMMA")) >= 32, kernel  # a stage of 32 rows: 4 x 4 products, twice
        if re.match(r"(stats|kl|tile)_kernel<MmaTile<", kernel.name):  # of the target's, only the diagonal is needed
            assert int(kernel.loop.removesuffix(" HMMA")) >= 32, kernel  # a stage of 32 columns: 4 x 4 products, twice
        if kernel.name.startswith("piece_kernel<float"):
            assert kernel.registers * 512 <= 65536, kernel  # two blocks: 16 warps wait for memory at a time
    for arch in cuda_gates.ARCHS:  # T > 1, 16-bit: tensor cores, with and without the gradient sum
        names = {kernel.name for kernel in kernels if kernel.arch == arch}
        for element in ("__half", "__nv_bfloat16"):
            for grad in ("true", "false"):
                assert f"saliency_kernel<MmaTile<{element}>, false, {grad}>" in names
            for kernel in ("target", "stats", "kl"):
                assert f"{kernel}_kernel<MmaTile<{element}> >" in names
            for task in (4, 5):
                assert f"tile_kernel<MmaTile<{element}>, {element}, {task}>" in names


def test_committed_table_passes_the_gates():
    check(committed())
    assert max(cuda_gates.saliency_shared_bytes(), cuda_gates.lm_shared_bytes()) <= 163 << 10  # of a block on sm_80


def test_loops_are_found():
    straight = "/*0010*/ HMMA.16816.F32 R0 ; /*0020*/ BRA 0x40 ; /*0030*/ FFMA R0 ; /*0040*/ EXIT ;"
    assert cuda_gates.multiplies_in_loops(straight) == "none"
    assert cuda_gates.multiplies_in_loops(straight + "/*0050*/ @P0 BRA P1, 0x10 ;") == "1 HMMA"
    assert cuda_gates.multiplies_in_loops(straight + "/*0050*/ @P0 BRA 0x20 ;") == "1 FFMA"


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")
def test_sources_compile_to_the_committed_table():
    kernels = [
        kernel
        for stem in cuda_gates.sources()
        for arch in cuda_gates.ARCHS
        for kernel in cuda_gates.measure(stem, arch)
    ]
    check(kernels)
    table = cuda_gates.page(kernels, cuda_gates.saliency_shared_bytes())
    version = re.compile(r"with nvcc (\S+);")
    if version.search(cuda_gates.PAGE.read_text()).group(1) == cuda_gates.nvcc_version():
        assert cuda_gates.PAGE.read_text() == table, "run python tests/cuda_gates.py and commit docs/gates-cuda.md"
