"""The kernels' tests under GCC's sanitizers: ``python tests/sanitize.py [address] [thread] [-- pytest arguments]``.

Each build is a copy of the package whose C++ module is compiled with the sanitizer; torch and Python are not, so what
is watched is every read and write that our code does. ``address`` (with ``undefined``) also tries CWFAST_FUZZ (10)
times as many broken files. ``thread``: OpenMP is replaced by sanitizers/gomp.cpp, because of the real libgomp every
fork and join would be reported. Faults planted in sanitizers/planted.cpp must be reported before the tests count.
Needs the compiler's libasan, libubsan and libtsan; exits 1 at the first report or failed test.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CXX = os.environ.get("CXX", "g++")
FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
PLANTED = {"address": ("overflow", "shift"), "thread": ("race",)}  # functions that must be reported
# What goes through csrc/cpu.
TESTS = [
    "test_select",
    "test_rewind",
    "test_saliency",
    "test_embedding_saliency",
    "test_optim",
    "test_checkpoint",
    "test_streaming",
    "test_logit_stats",
    "test_lm_token_stats",
    "test_lm_token_kl",
    "test_freezing",
    "test_masks",
]
MORE_TESTS = {"address": ["test_fuzz_files"], "thread": []}
# The reference is torch's code; the sanitizers keep freed memory for a while, so that no bound on it can hold.
CHOICE = [
    "-k",
    "not reference or no_worse_than_the_reference",
    "--deselect",
    "tests/test_streaming.py::test_streamed_selection_takes_less_memory_than_the_scores",
]


def run(command: list[str], **options) -> None:
    print("+", " ".join(map(str, command)), flush=True)
    subprocess.run(command, check=True, **options)


def build(kind: str, place: Path) -> Path:
    """A copy of the package with the module compiled for the sanitizer, and planted.so; the folder for PYTHONPATH."""
    common = ["-std=c++17", "-g", "-fPIC", "-fno-omit-frame-pointer", *FLAGS[kind]]
    link = list(FLAGS[kind])
    openmp = ["-fopenmp"]
    if kind == "thread":
        runtime = place / "gomp.o"
        run([CXX, "-O1", *common, "-fvisibility=hidden", "-c", str(HERE / "sanitizers/gomp.cpp"), "-o", str(runtime)])
        link.append(str(runtime))
        openmp.append(str(runtime))
    run(
        [CXX, "-O1", *common, "-shared", str(HERE / "sanitizers/planted.cpp"), *openmp, "-o", str(place / "planted.so")]
    )
    env = {"CXXFLAGS": " ".join(common), "CWFAST_OPTIMIZE": "-O1", "LDFLAGS": " ".join(link)}
    env |= {"CWFAST_CUDA": "0", "CWFAST_NO_EXT": "0"}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(place), "--build-lib", str(place / "lib")]
    run(command, cwd=HERE.parent, env={**os.environ, **env}, stdout=subprocess.DEVNULL)
    return place / "lib"


def environment(kind: str, lib: Path) -> dict[str, str]:
    def library(name: str) -> str:
        found = subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        return found.stdout.strip()

    names = {"address": ("libasan.so", "libstdc++.so.6"), "thread": ("libtsan.so", "libstdc++.so.6")}[kind]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(map(library, names)),
        "PYTHONPATH": str(lib),
        # Python keeps what it never frees; tests ask for more memory than there is; the first report ends the process.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Of torch, where a test gives it more threads, only memcpy and its kin would be seen, and none of its barriers.
        "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
        "OMP_WAIT_POLICY": "PASSIVE",
        # torch's own threads are not compiled for the thread sanitizer: it gets one, ours come from gomp.cpp
        **({"OMP_NUM_THREADS": "1"} if kind == "thread" else {"CWFAST_FUZZ": os.environ.get("CWFAST_FUZZ", "10")}),
    }


def python(kind: str) -> list[str]:
    """Under the thread sanitizer without address randomization, which its fixed memory layout may collide with."""
    return [*(["setarch", "-R"] if kind == "thread" else []), sys.executable, "-P"]


def check_that_faults_are_seen(kind: str, place: Path, env: dict[str, str]) -> None:
    for name in (*PLANTED[kind], "clean"):
        code = f"import ctypes; ctypes.CDLL({str(place / 'planted.so')!r}).{name}(10**7)"
        done = subprocess.run([*python(kind), "-c", code], env=env, capture_output=True, text=True)
        reported = done.returncode != 0 and name in done.stderr
        if (done.returncode != 0) if name == "clean" else not reported:
            wanted = "run to its end" if name == "clean" else "be reported"
            raise SystemExit(f"{kind}: planted {name!r} must {wanted}; it ended with {done.returncode}\n{done.stderr}")
        print(f"planted {name}: {'reported' if reported else 'not reported'}, as it must be", flush=True)
    where = "from cwfast import _backends; print(_backends.native().__file__)"
    done = subprocess.run([*python(kind), "-c", where], env=env, capture_output=True, text=True, check=True)
    if not done.stdout.startswith(str(place)):
        raise SystemExit(f"the tests must load the module in {place}; they would load {done.stdout}")


def main(arguments: list[str]) -> None:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    kinds, rest = arguments[:at] or list(FLAGS), arguments[at + 1 :]
    if not set(kinds) <= set(FLAGS):
        raise SystemExit(f"sanitizers must be of {list(FLAGS)}; got {kinds}")
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            env = environment(kind, build(kind, place))
            check_that_faults_are_seen(kind, place, env)
            files = [str(HERE / f"{name}.py") for name in TESTS + MORE_TESTS[kind]]
            # -s: a report goes to the terminal before the process ends
            options = ["-m", "pytest", "-s", "-x", "-p", "no:cacheprovider", "--rootdir", str(HERE.parent)]
            run([*python(kind), *options, *(rest or [*CHOICE, *files])], cwd=HERE.parent, env=env)
    print(f"no reports under: {', '.join(kinds)}")


if __name__ == "__main__":
    main(sys.argv[1:])
