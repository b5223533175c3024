"""The ``cwfast`` command. Each subcommand imports what it needs when it runs: ``--help`` loads no torch."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SETTINGS = (  # every environment variable that the code reads, so that a misspelt one is seen
    "CWFAST_BENCH_DEVICE",
    "CWFAST_BENCH_OUT",
    "CWFAST_BENCH_SIZE",
    "CWFAST_CPU_ISA",
    "CWFAST_CUDA",
    "CWFAST_CUDA_ARCHS",
    "CWFAST_FUZZ",
    "CWFAST_NEED_DATA",
    "CWFAST_NO_EXT",
    "CWFAST_OPTIMIZE",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 failed, 2 wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    options.command_line = shlex.join(["cwfast", *arguments])
    try:
        document, text = options.run(options)
    except KeyboardInterrupt:
        print("cwfast: interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        if options.debug:
            raise
        print(f"cwfast: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    print(json.dumps(document, indent=2, allow_nan=False) if options.json else text)
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--json", action="store_true", help="print one JSON document on stdout, everything else on stderr"
    )
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="cwfast",
        description="Find the few weights that leak a model's training data, rewind them, retrain the rest.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        parents=[common],
        help="attack, defend and attack again: networks on handwritten digits, about two and a half minutes",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("cwfast-demo"), help="folder of the report (default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    demo.add_argument(
        "--quick", action="store_true", help="fewer, shorter-trained networks: a first look, no conclusions"
    )
    demo.set_defaults(run=_demo)

    bench = commands.add_parser(
        "bench", parents=[common], help="time the kernels against their peers and this machine's limits"
    )
    bench.add_argument("suites", nargs="*", metavar="SUITE", help="select, rewind, saliency...; default: all")
    bench.add_argument(
        "--size",
        choices=("tiny", "normal", "full"),
        default="tiny",
        help="tiny: do they run; normal: all of them in a few minutes; full: every case (default: %(default)s)",
    )
    bench.add_argument("--out", type=Path, help="append one JSON line per case to this file")
    bench.add_argument("--chart", type=Path, help="draw the ratios of all cases into this PNG file (needs matplotlib)")
    bench.set_defaults(run=_bench)

    env = commands.add_parser(
        "env", parents=[common], help="versions, backends with reasons for those missing, settings"
    )
    env.set_defaults(run=_env)
    return parser


class _Version(argparse.Action):
    """Looks the version up when it is asked for: it takes longer than everything else that ``--help`` does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"cwfast {version('cwfast')}")
        parser.exit()


def _demo(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    # Before torch loads OpenMP: threads that spin while they wait make many small steps ten times slower on a machine
    # that does something else as well, and a third faster on one that does not.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from cwfast import demo
    from cwfast.report.table import table

    report = demo.run(options.out, quick=options.quick, seed=options.seed, command=options.command_line)
    stages = "\n".join(f"  {stage['name']:<24}{stage['seconds']:7.1f} s" for stage in report["stages"])
    backends = ", ".join(f"{op}: {backend}" for op, backend in report["backends"].items())
    lines = [table(report), "", *report["reading"], "", f"Backends: {backends} ({report['machine']})", "Time:", stages]
    lines += ["", f"Report: {(options.out / 'report.html').resolve()}"]
    return report, "\n".join(lines)


def _bench(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs ``python -m cwfast.benchmarks`` in a process of its own, whose output goes to stderr."""
    import subprocess
    import tempfile

    if options.chart is not None and not options.chart.resolve().parent.is_dir():
        raise ValueError(f"--chart must name a file in a folder that exists; got {options.chart}")
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "results.jsonl"
        command = [sys.executable, "-P", "-m", "cwfast.benchmarks", *options.suites, "--size", options.size]
        if options.out is not None:  # an unwritable one is found now, not after minutes
            options.out.open("a").close()
        done = subprocess.run([*command, "--out", str(lines)], stdout=sys.stderr, check=False)
        written = lines.read_text(encoding="utf-8") if lines.exists() else ""
    if options.out is not None:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(written)
    results = [json.loads(line) for line in written.splitlines()]
    if done.returncode:
        raise RuntimeError(
            f"every benchmark must run; exit status {done.returncode} after {len(results)} cases, see above"
        )
    skipped = sorted({peer for result in results for peer in result.get("skipped_peers", ())})
    document = {"size": options.size, "results": results, "skipped_peers": skipped}
    text = _bench_table(results)
    if skipped:
        text += f"\n\nPeers not installed, skipped: {', '.join(skipped)}"
    if options.chart is not None:
        text += f"\n{_bench_chart(options.chart, results)}"
    return document, text


def _bench_chart(path: Path, results: list[dict[str, Any]]) -> str:
    """Draws the results, or says why not."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        return 'No chart: matplotlib must be installed (pip install "cwfast[demo]")'
    from cwfast.report import benchmarks, plots

    if not benchmarks.drawn(results):
        return "No chart: no case has a ratio to draw"
    path.write_bytes(plots.png(benchmarks.figure(results)))
    return f"Chart: {path.resolve()}"


def _bench_table(results: list[dict[str, Any]]) -> str:
    """A row per case: our time, what others take in units of it and what it takes in units of a limit, memory."""
    import itertools
    import textwrap

    def lines(parts: list[str], width: int) -> list[str]:  # broken between the parts, never inside one
        joined = ", ".join(part.replace(" ", "\0") for part in parts)
        return [line.replace("\0", " ") for line in textwrap.wrap(joined, width, break_on_hyphens=False)]

    rows = [("case", "time", "ratios", "memory")]
    for result in results:
        ratios = [f"{name} {value:.3g}" for name, value in result["ratios"].items()]
        memory = [
            f"{name} {count / 1e6:.1f} MB" for name, count in result.get("bytes", {}).items() if count is not None
        ]
        time = next((f"{seconds * 1e3:.4g} ms" for seconds in result["seconds"].values()), "")  # memory alone has none
        cells = [result["case"]], [time], lines(ratios, 76), lines(memory, 44)
        rows += list(itertools.zip_longest(*cells, fillvalue=""))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(f"{c:<{w}}" for c, w in zip(r, widths, strict=False)), r[3]]).rstrip() for r in rows)


def _env(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from cwfast import _backends

    def find(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    native = _backends.extension()
    settings = {key: value for key, value in sorted(os.environ.items()) if key.startswith("CWFAST_")}
    document = {
        "versions": {name: find(name) for name in ("cwfast", "torch", "triton", "numpy", "safetensors")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backends": {name: {"available": b.available, "reason": b.reason} for name, b in _backends.backends().items()},
        "instruction_sets": [] if isinstance(native, str) else native.isas(),
        "instruction_set": None if isinstance(native, str) else native.isa(),
        "threads": None if isinstance(native, str) else native.threads(),
        "environment": settings,
        "unknown_environment": [key for key in settings if key not in _SETTINGS],
    }
    lines = [f"{name:<14}{value or 'not installed'}" for name, value in document["versions"].items()]
    lines += [f"{'python':<14}{document['python']}, {document['platform']}", ""]
    lines += [
        f"backend {name:<12}{'available' if b['available'] else b['reason']}"
        for name, b in document["backends"].items()
    ]
    lines += [
        f"instruction set {document['instruction_set']} of {document['instruction_sets']}",
        f"threads {document['threads']}",
    ]
    lines += [f"{k}={v}" + ("" if k in _SETTINGS else "  (unknown: nothing reads it)") for k, v in settings.items()]
    return document, "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
