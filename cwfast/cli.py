"""The ``cwfast`` command. Each subcommand imports what it needs when it runs: ``--help`` loads no torch."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from cwfast.commands import arguments

Run = Callable[[argparse.Namespace], tuple[dict[str, Any], str]]  # what it found, as JSON and as text

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
    "CWFAST_TEST_LOG",
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
        message = error.args[0] if isinstance(error, KeyError) and error.args else error  # whose str is a repr
        print(f"cwfast: error: {' '.join(str(message).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    try:
        print(json.dumps(document, indent=2, allow_nan=False) if options.json else text, flush=True)
    except BrokenPipeError:  # whoever reads (head, say) has what it wants: no error, and none either when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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

    def add(
        name: str,
        run: Run,
        arguments_of: Callable[[argparse.ArgumentParser], None],
        **texts: Any,
    ) -> None:
        command = commands.add_parser(name, parents=[common], **texts)
        command.set_defaults(run=run, usage=command.error)
        arguments_of(command)

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

    add(
        "audit",
        _command("audit"),
        arguments.audit,
        help="attack models by their logits: who was in the training data, how surely can one tell",
        description="Attack models by what they say of samples: give --logits, --labels and --membership, or "
        "--signals, or --train. FILE is npy, npz, safetensors or a tensor of torch.save; FILE:ARRAY names one of "
        "several arrays. Nothing in them is unpickled.",
    )

    add(
        "score",
        _command("score"),
        arguments.score,
        help="how much each weight of a fine-tuned language model holds its training texts, as a safetensors folder",
        description="Scores for cwfast select. MODEL and BASE are local folders, which are only read; code that comes "
        'with a model is never run. FILE has one JSON object with "text" in each line. A run that was stopped goes on '
        "with --resume.",
    )
    add(
        "select",
        _command("files", "run_select"),
        arguments.select,
        help="the largest scores of a safetensors folder, which may be larger than memory, as a mask file",
    )
    add(
        "artefact",
        _command("files", "run_artefact"),
        arguments.artefact,
        help="a mask and the values at its entries as one small file, to be applied by cwfast rewind",
        description="With --base, the file makes MODEL rewound to BASE; without, MODEL itself, out of MODEL rewound. "
        "MODEL and BASE are only read.",
    )
    add(
        "rewind",
        _command("files", "run_rewind"),
        arguments.rewind,
        help="a copy of a model's folder with the weights of a mask put back to a base checkpoint's",
        description="Takes --base and --mask, or --artefact. Reads, rewinds, hashes and writes in pieces: memory does "
        "not grow with the model. Inputs are only read. A run that was stopped goes on with --resume.",
    )
    add(
        "defend",
        _command("defend", passive=True),
        arguments.defend,
        help="train a model, defend it, save its weights and masks; with --audit, attack before and after",
        description="The model is trained on the whole pool of the data. With --audit, two fleets are trained on "
        "halves of the pool in the same way, without and with the defense, and attacked.",
    )
    add(
        "study",
        _command("study", passive=True),
        arguments.study,
        help="a grid of defenses, each with and without CWRF, attacked and compared: curves with intervals",
        description="Train, defend, attack and compare fleets of models. A run that was interrupted goes on in the "
        "same folder; seeds and data sets can be added to it.",
    )
    add(
        "audit-llm",
        _command("audit_llm"),
        arguments.audit_llm,
        help="attack a language model: which texts was it trained on, how surely can one tell",
        description="Attack a causal language model by the log-probabilities of texts: one forward pass for most "
        "attacks. MODEL is a local folder, or else a hub id; code that comes with a model is never run. FILE has "
        'one JSON object with "text" in each line.',
    )
    add(
        "defend-llm",
        _command("defend_llm", passive=True),
        arguments.defend_llm,
        help="score, rewind and fine-tune a language model, save it, and attack it before and after",
        description="Weights of MODEL that hold its members are put back to BASE's and frozen; the rest is fine-tuned "
        "for a few steps. MODEL and BASE are only read. The sets of texts must share none. FILE has one JSON object "
        'with "text" in each line.',
    )
    add(
        "demo-llm",
        _command("demo_llm", passive=True),
        arguments.demo_llm,
        help="attack, defend and attack again: a pre-trained language model, beside controls",
        description="SmolLM2-135M, from installed packages, fine-tuned on docstrings. A run that was stopped goes on "
        "in the same folder.",
    )

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
    bench.set_defaults(run=_command("bench"))

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


def _command(module: str, name: str = "run", *, passive: bool = False) -> Run:
    """A function of a module of ``cwfast.commands``, imported when it runs.

    Args:
        module: its name.
        name: of the function.
        passive: threads that wait do not spin (see ``_demo``).
    """

    def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
        if passive:
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        found: tuple[dict[str, Any], str] = getattr(import_module(f"cwfast.commands.{module}"), name)(options)
        return found

    return run


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
