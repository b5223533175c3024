"""Builds cwfast._C: one torch-free pybind11 module, each source compiled for its own instruction set.

Environment: CWFAST_NO_EXT=1 installs without the module (backend `reference` only, any platform);
CXX names the compiler; MAX_JOBS bounds the parallel compilations.
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
ISA_FLAGS = {"_avx2": ["-mavx2", "-mfma", "-mf16c"], "_avx512": ["-mavx512f", "-mavx512dq", "-mfma"]}


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
        flags = [
            "-O3",
            "-std=c++17",
            "-fPIC",
            "-fvisibility=hidden",
            "-fopenmp",
            "-ffp-contract=off",
            "-Wall",
            "-Wextra",
        ]
        flags += [f"-I{path}" for path in includes]
        compiles: list[tuple[Path, Path, list[str]]] = []
        for source in sorted((ROOT / "csrc").rglob("*.cpp")):
            isa = next((extra for suffix, extra in ISA_FLAGS.items() if source.stem.endswith(suffix)), [])
            obj = build / source.relative_to(ROOT).with_suffix(".o")  # the path is kept: stems repeat
            obj.parent.mkdir(parents=True, exist_ok=True)
            command = [cxx, "-MMD", "-MF", f"{obj}.d", *flags, *isa, "-c", str(source), "-o", str(obj)]
            compiles.append((obj, source, command))
        objects = [str(obj) for obj, _, _ in compiles]
        link = [cxx, "-shared", *objects, "-o", str(target), "-fopenmp", "-Wl,--exclude-libs,ALL"]
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
    package_data={"cwfast": ["py.typed", "*.pyi"], "cwfast.report": ["*.html"]},
    ext_modules=[] if os.environ.get("CWFAST_NO_EXT") == "1" else [Extension("cwfast._C", [])],
    cmdclass={"build_ext": BuildExt},
)
