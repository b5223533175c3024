"""Builds cwfast._C: one torch-free pybind11 module, each source compiled for its own instruction set.

Environment: CWFAST_NO_EXT=1 installs without the module (backend `reference` only, any platform);
CXX names the compiler, CXXFLAGS and LDFLAGS add to its flags, CWFAST_OPTIMIZE stands in for -O3 (tests/sanitize.py
sets all three); MAX_JOBS bounds the parallel compilations. CUDA kernels are built where nvcc is found: CWFAST_CUDA=0
skips them, CWFAST_CUDA=1 insists; CUDA_HOME names the toolkit, CWFAST_CUDA_ARCHS the architectures.
"""

import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# A stem that ends so is compiled with these flags and reached only after a run-time check of the processor.
ISA_FLAGS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
}


def cuda_home() -> Path | None:
    """The CUDA toolkit, or None where it is not wanted or not there."""
    wanted = os.environ.get("CWFAST_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise RuntimeError(f"CWFAST_CUDA must be auto, 0 or 1; got {wanted!r}")
    if wanted == "0":
        return None
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if (home := os.environ.get(name)) and (Path(home) / "bin/nvcc").is_file():
            return Path(home).resolve()
    if nvcc := shutil.which("nvcc"):  # which may be a wrapper outside the toolkit: it is asked where that lies
        command = [nvcc, "--dryrun", "-x", "cu", "/dev/null", "-c"]
        for line in subprocess.run(command, capture_output=True, text=True).stderr.splitlines():
            if line.startswith("#$ TOP="):
                return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    if wanted == "1":
        raise RuntimeError("CWFAST_CUDA=1 needs nvcc; none is on PATH or in CUDA_HOME/bin")
    return None


def cuda_flags() -> list[str]:
    """Machine code for each architecture, and PTX of the last for those that come later."""
    archs = os.environ.get("CWFAST_CUDA_ARCHS", "80;90").split(";")
    flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "2", f"-I{ROOT / 'csrc'}"]
    for arch in archs:
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    return [*flags, "-gencode", f"arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


class BuildExt(build_ext):
    """Compiles csrc/ with ninja (or a thread pool where ninja is missing) and links it once."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        build = Path(self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "c++")
        includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
        # -ffp-contract=off: the scalar path must not fuse what the reference does in two roundings.
        # The environment's flags come first (a distribution's CXXFLAGS has -O2 and may have -ffast-math): ours decide.
        flags = [
            *shlex.split(os.environ.get("CXXFLAGS", "")),
            os.environ.get("CWFAST_OPTIMIZE", "-O3"),
            "-fno-fast-math",
            "-std=c++17",
            "-fPIC",
            "-fvisibility=hidden",
            "-fopenmp",
            "-ffp-contract=off",
            "-Wall",
            "-Wextra",
        ]
        flags += [f"-I{path}" for path in includes]
        cuda = cuda_home()
        if cuda:
            flags.append("-DCWFAST_WITH_CUDA")
        compiles: list[tuple[Path, Path, list[str]]] = []
        for source in sorted((ROOT / "csrc").rglob("*.cpp")):
            isa = next((extra for suffix, extra in ISA_FLAGS.items() if source.stem.endswith(suffix)), [])
            obj = build / source.relative_to(ROOT).with_suffix(".o")  # the path is kept: stems repeat
            obj.parent.mkdir(parents=True, exist_ok=True)
            command = [cxx, "-MMD", "-MF", f"{obj}.d", *flags, *isa, "-c", str(source), "-o", str(obj)]
            compiles.append((obj, source, command))
        if cuda:
            for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
                obj = build / source.relative_to(ROOT).with_suffix(".cu.o")
                obj.parent.mkdir(parents=True, exist_ok=True)
                command = [str(cuda / "bin/nvcc"), "-MD", "-MF", f"{obj}.d", *cuda_flags()]
                compiles.append((obj, source, [*command, "-c", str(source), "-o", str(obj)]))
        objects = [str(obj) for obj, _, _ in compiles]
        link = [cxx, "-shared", *objects, "-o", str(target), "-fopenmp", "-Wl,--exclude-libs,ALL"]
        link += shlex.split(os.environ.get("LDFLAGS", ""))
        if cuda:  # the runtime is linked statically: the module loads where there is no CUDA at all
            places = (cuda / "lib64", cuda / "lib", cuda / "targets/x86_64-linux/lib")
            lib = next((path for path in places if (path / "libcudart_static.a").is_file()), None)
            if lib is None:
                raise RuntimeError(f"libcudart_static.a must be in {cuda}/lib64; CWFAST_CUDA=0 builds without CUDA")
            link += [f"-L{lib}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        jobs = os.environ.get("MAX_JOBS")
        if ninja := shutil.which("ninja"):
            self._write_ninja(build / "build.ninja", compiles, target, link)
            subprocess.check_call([ninja, "-C", str(build), *(["-j", jobs] if jobs else [])])
        else:
            with ThreadPoolExecutor(int(jobs or os.cpu_count() or 1)) as pool:
                list(pool.map(subprocess.check_call, [command for _, _, command in compiles]))
            subprocess.check_call(link)

    @staticmethod
    def _write_ninja(path: Path, compiles: list[tuple[Path, Path, list[str]]], target: Path, link: list[str]) -> None:
        def escape(name: object) -> str:
            return str(name).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        def shell(command: list[str]) -> str:
            return shlex.join(command).replace("$", "$$")

        lines = [
            "rule compile",
            "  command = $cmd",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cmd",
        ]
        for obj, source, command in compiles:
            lines += [f"build {escape(obj)}: compile {escape(source)}", f"  cmd = {shell(command)}"]
        lines += [f"build {escape(target)}: link {' '.join(escape(obj) for obj, _, _ in compiles)}"]
        lines += [f"  cmd = {shell(link)}"]
        path.write_text("\n".join(lines) + "\n")


packages = {
    "cwfast": "cwfast",
    "cwfast.kernels": "kernels/cw",  # no kernels/__init__.py: that name belongs to a published package
    "cwfast.benchmarks": "benchmarks",
}
for room in sorted((ROOT / "cwfast").rglob("__init__.py")):
    name = ".".join(room.parent.relative_to(ROOT).parts)
    packages.setdefault(name, name.replace(".", "/"))

setup(
    packages=list(packages),
    package_dir=packages,
    include_package_data=False,  # or benchmarks/results/ is taken for a package
    package_data={"cwfast": ["py.typed", "*.pyi"], "cwfast.report": ["*.html"]},
    ext_modules=[] if os.environ.get("CWFAST_NO_EXT") == "1" else [Extension("cwfast._C", [])],
    cmdclass={"build_ext": BuildExt},
)
