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

    _audit_arguments(
        commands.add_parser(
            "audit",
            parents=[common],
            help="attack models by their logits: who was in the training data, how surely can one tell",
            description="Attack models by what they say of samples: give --logits, --labels and --membership, or "
            "--signals, or --train. FILE is npy, npz, safetensors or a tensor of torch.save; FILE:ARRAY names one of "
            "several arrays. Nothing in them is unpickled.",
        )
    )

    _select_arguments(
        commands.add_parser(
            "select",
            parents=[common],
            help="the largest scores of a safetensors folder, which may be larger than memory, as a mask file",
        )
    )
    _rewind_arguments(
        commands.add_parser(
            "rewind",
            parents=[common],
            help="a copy of a model's folder with the weights of a mask put back to a base checkpoint's",
            description="Reads, rewinds, hashes and writes in pieces: memory does not grow with the model. MODEL and "
            "BASE are only read. A run that was stopped goes on with --resume.",
        )
    )
    _defend_arguments(
        commands.add_parser(
            "defend",
            parents=[common],
            help="train a model, defend it, save its weights and masks; with --audit, attack before and after",
            description="The model is trained on the whole pool of the data. With --audit, two fleets are trained on "
            "halves of the pool in the same way, without and with the defense, and attacked.",
        )
    )
    _study_arguments(
        commands.add_parser(
            "study",
            parents=[common],
            help="a grid of defenses, each with and without CWRF, attacked and compared: curves with intervals",
            description="Train, defend, attack and compare fleets of models. A run that was interrupted goes on in the "
            "same folder; seeds and data sets can be added to it.",
        )
    )
    _audit_llm_arguments(
        commands.add_parser(
            "audit-llm",
            parents=[common],
            help="attack a language model: which texts was it trained on, how surely can one tell",
            description="Attack a causal language model by the log-probabilities of texts: one forward pass for most "
            "attacks. MODEL is a local folder, or else a hub id; code that comes with a model is never run. FILE has "
            'one JSON object with "text" in each line.',
        )
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
    bench.set_defaults(run=_bench)

    env = commands.add_parser(
        "env", parents=[common], help="versions, backends with reasons for those missing, settings"
    )
    env.set_defaults(run=_env)
    return parser


def _select_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_select)
    parser.add_argument("scores", type=Path, metavar="SCORES", help="safetensors file or folder, a score per weight")
    parser.add_argument("--rate", type=float, help="share of the weights to select, such as 0.001")
    parser.add_argument("--k", type=int, help="or how many")
    parser.add_argument("--rates", nargs="+", metavar="PATTERN=RATE", help="or a rate for each parameter by name")
    parser.add_argument(
        "--scope", choices=("global", "layer"), default="global", help="rank all weights, or each parameter's alone"
    )
    parser.add_argument("--exclude", nargs="+", metavar="PATTERN", help="parameters of which nothing is selected")
    parser.add_argument("--nan", choices=("raise", "skip"), default="raise", help="NaN scores (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="mask file to write")


def _rewind_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_rewind)
    parser.add_argument("model", type=Path, metavar="MODEL", help="safetensors file or folder with the trained weights")
    parser.add_argument("--base", type=Path, required=True, help="the same with the initial weights")
    parser.add_argument("--mask", type=Path, required=True, help="file of cwfast select or MaskSet.save")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--resume", action="store_true", help="go on where a run with the same arguments was stopped")
    parser.add_argument("--copy-code", action="store_true", help="also copy *.py, and keep auto_map, which runs them")


def _defend_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_defend, usage=parser.error)
    parser.add_argument("--train", metavar="MODULE:FUNCTION", help="a function that returns (task, defense)")
    parser.add_argument("--data", metavar="NAME", help="or a task of cwfast.examples: digits, mnist_5k, adult")
    parser.add_argument("--defense", metavar="SPEC", help="such as relaxloss:alpha=0.5 or cwrf:rate=0.1,criterion=gap,"
                        "loss=relaxloss(alpha=0.5); default: what the function returns")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of weights, masks and report")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument("--audit", action="store_true", help="also attack fleets trained without and with the defense")
    parser.add_argument("--models", type=int, default=16, help="of each of these fleets (default: %(default)s)")
    parser.add_argument("--bootstrap", type=int, default=1000, help="replicates for intervals (default: %(default)s)")


def _study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_study, usage=parser.error)
    parser.add_argument("--preset", choices=("tiny", "small", "paper"), default="small", help="tiny: seconds, to see "
                        "that it runs; small: about an hour on 2 cores; paper: CIFAR files and GPUs "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--data", nargs="+", metavar="NAME", help="digits, mnist_5k, adult, heritage; paper: cifar10, "
                        "cifar100, cinic10, each also as NAME-vit (default: the preset's)")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, help="of everything random (default: the preset's)")
    parser.add_argument("--seed", type=int, help="the same as --seeds with one")
    parser.add_argument("--lam", nargs="+", type=float, default=[], help="further values of CWRF's lambda")
    parser.add_argument("--models", type=int, help="of each fleet, an even number (default: the preset's)")
    parser.add_argument("--path", type=Path, help="folder of data that are in no package")
    parser.add_argument("--out", type=Path, default=Path("cwfast-study"), help="folder of the run and its report "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="default: %(default)s")
    parser.add_argument("--workers", type=int, help="jobs at a time (default: one per core)")
    parser.add_argument("--threads", type=int, default=1, help="of each job (default: %(default)s)")
    parser.add_argument("--report-only", action="store_true", help="train nothing: report what is done")


def _audit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_audit, usage=parser.error)
    given = parser.add_argument_group("what is attacked")
    given.add_argument(
        "--logits",
        metavar="FILE",
        help="[K, N, C] or [K, N, Q, C]: K models, N samples, Q queries of each, C classes; [N, C] for a single model",
    )
    given.add_argument("--labels", metavar="FILE", help="[N] whole numbers, the right class of each sample")
    given.add_argument("--membership", metavar="FILE", help="[K, N]: was model k trained on sample i")
    given.add_argument("--ids", metavar="FILE", help="[N] whole numbers by which samples are listed; default: 0 .. N-1")
    given.add_argument("--signals", metavar="FILE", help="instead: a safetensors file that cwfast.mia.Signals wrote")
    given.add_argument("--features", metavar="FILE", help="[N, F], for the attack quantile_regression")
    trained = parser.add_argument_group("or who is trained first")
    trained.add_argument(
        "--train",
        metavar="MODULE:FUNCTION",
        help="instead: a function that returns (task, defense), which are trained on halves of the task's pool; "
        "cwfast.examples:adult is one. Needs --out, where an interrupted run goes on",
    )
    trained.add_argument(
        "--models", type=int, help="how many, an even number; the default attacks need 6 (default: 16)"
    )
    trained.add_argument("--group", type=int, help="models trained at once as one fleet (default: 8)")
    trained.add_argument("--engine", help="local, ray or slurm (default: local)")
    trained.add_argument("--workers", type=int, help="jobs at a time (default, local: one per core)")
    trained.add_argument("--threads", type=int, help="of each job (default: 1)")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--attacks",
        nargs="+",
        metavar="NAME",
        help="default: loss lira rmia; for a single model, loss and attack_p; a wrong name lists all",
    )
    how.add_argument(
        "--fpr",
        nargs="+",
        type=float,
        default=[0.01, 0.001],
        help="false-positive rates at which true ones are told (default: 0.01 0.001)",
    )
    how.add_argument(
        "--target",
        type=int,
        metavar="K",
        help="attack this model only, with the others as its shadows; default: every model in turn",
    )
    how.add_argument("--bootstrap", type=int, default=1000, help="replicates for intervals (default: %(default)s)")
    how.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of bootstrap and, with --train, training: another seed trains other models (default: %(default)s)",
    )
    told = parser.add_argument_group("what is told")
    told.add_argument("--out", type=Path, help="folder for report.json and report.html")
    told.add_argument(
        "--show-inputs",
        action="store_true",
        help="show the most exposed samples themselves in report.html, not only their ids; needs --inputs",
    )
    told.add_argument(
        "--inputs", metavar="FILE", help="[N, ...]: the samples; images are [N, H, W], [N, C, H, W] or [N, H, W, C]"
    )


def _audit_llm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_audit_llm, usage=parser.error)
    parser.add_argument("model", metavar="MODEL", help="folder of transformers, or of a PEFT adapter, or a hub id")
    given = parser.add_argument_group("what is attacked")
    given.add_argument("--members", type=Path, metavar="FILE", required=True, help="texts that it was trained on")
    given.add_argument(
        "--nonmembers", type=Path, metavar="FILE", required=True, help="texts that it was not, from the same source"
    )
    given.add_argument(
        "--reference", metavar="BASE", help="model before fine-tuning (default: that of an adapter, else none)"
    )
    given.add_argument("--shots", type=Path, metavar="FILE", help="other non-members, for recall and con_recall")
    given.add_argument("--member-shots", type=Path, metavar="FILE", help="other members, for con_recall")
    given.add_argument("--corpus", type=Path, metavar="FILE", help="other texts, whose token frequencies dc_pdd takes")
    given.add_argument(
        "--shadow",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="models trained like MODEL on other halves, each with members.jsonl in it; for lira, rmia and base",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--attacks", nargs="+", default=["all"], metavar="NAME", help="default: all that the inputs allow")
    how.add_argument("--max-tokens", type=int, metavar="N", help="read the first N tokens of each text; default: all")
    how.add_argument("--batch-tokens", type=int, default=4096, metavar="N", help="of a batch (default: %(default)s)")
    how.add_argument(
        "--copies",
        type=int,
        default=5,
        help="changed copies of a text, for pac and neighbourhood (default: %(default)s)",
    )
    how.add_argument(
        "--fpr",
        nargs="+",
        type=float,
        default=[0.01],
        help="false-positive rates at which true ones are told (default: 0.01)",
    )
    how.add_argument("--bootstrap", type=int, default=1000, help="replicates for intervals (default: %(default)s)")
    how.add_argument(
        "--seed", type=int, default=0, help="of bootstrap, folds and changed copies (default: %(default)s)"
    )
    told = parser.add_argument_group("what is told")
    told.add_argument(
        "--out", type=Path, help="folder for report.json, report.html and the token records, to go on with"
    )
    told.add_argument(
        "--show-text",
        action="store_true",
        help="show the most exposed texts in report.html, token by token; else no text is in it",
    )


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
    from cwfast.commands import bench

    return bench.run(options)


def _audit(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from cwfast.commands import audit

    return audit.run(options)


def _select(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from cwfast.commands import files

    return files.run_select(options)


def _rewind(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from cwfast.commands import files

    return files.run_rewind(options)


def _defend(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from cwfast.commands import defend

    return defend.run(options)


def _study(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from cwfast.commands import study

    return study.run(options)


def _audit_llm(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from cwfast.commands import audit_llm

    return audit_llm.run(options)


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
