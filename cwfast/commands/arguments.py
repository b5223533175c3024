"""The arguments of the longer commands. Nothing heavy is imported: ``--help`` loads no torch."""

import argparse
from pathlib import Path


def score(parser: argparse.ArgumentParser) -> None:
    """Of ``cwfast score``."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of transformers, fine-tuned")
    parser.add_argument("--base", type=Path, required=True, help="the same before fine-tuning")
    parser.add_argument(
        "--members", type=Path, metavar="FILE", required=True, help="texts that it was trained on, as JSON lines"
    )
    parser.add_argument(
        "--reference", type=Path, metavar="FILE", required=True, help="texts that it was not, from the same source"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of scores to make")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--criterion", choices=("gap", "taylor", "taylor_delta"), default="gap", help="default: %(default)s"
    )
    how.add_argument("--points", type=int, default=1, help="of gap's path, one pass each (default: %(default)s)")
    how.add_argument(
        "--lam", type=float, default=0.5, help="weight of the KL term of the others (default: %(default)s)"
    )
    how.add_argument("--granularity", choices=("sample", "batch"), default="sample", help="of the others, where a "
                     "layer has no rule: batch (default: %(default)s)")  # fmt: skip
    how.add_argument("--max-tokens", type=int, metavar="N", help="read the first N tokens of each text; default: all")
    how.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts of a batch (default: %(default)s)")
    how.add_argument("--params-per-pass", type=int, metavar="N", help="score at most N weights at a time, with a pass "
                     "over the texts for each such part, where weights fit into memory but scores do not")  # fmt: skip
    how.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), help="of the weights in memory (default: "
                     "as they are saved)")  # fmt: skip
    how.add_argument("--autocast", choices=("bfloat16",), help="run the passes in this dtype")
    how.add_argument("--device", default="cpu", help="of the model (default: %(default)s)")
    how.add_argument("--resume", action="store_true", help="go on where a run with the same arguments was stopped")


def select(parser: argparse.ArgumentParser) -> None:
    """Of ``cwfast select``."""
    parser.add_argument("scores", type=Path, metavar="SCORES", help="safetensors file or folder, a score per weight")
    parser.add_argument("--rate", type=float, help="share of the weights to select, such as 0.001")
    parser.add_argument("--k", type=int, help="or how many")
    parser.add_argument("--rates", nargs="+", metavar="PATTERN=RATE", help="or a rate for each parameter by name")
    parser.add_argument(
        "--scope", choices=("global", "layer"), help="rank all weights (the default), or each parameter's alone"
    )
    parser.add_argument("--exclude", nargs="+", metavar="PATTERN", help="parameters of which nothing is selected")
    parser.add_argument("--nan", choices=("raise", "skip"), default="raise", help="NaN scores (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="mask file to write")


def artefact(parser: argparse.ArgumentParser) -> None:
    """Of ``cwfast artefact``."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="safetensors file or folder")
    parser.add_argument("--mask", type=Path, required=True, help="file of cwfast select or MaskSet.save")
    parser.add_argument("--base", type=Path, help="take the values of this checkpoint; default: those of MODEL")
    parser.add_argument("--base-id", metavar="OWNER/NAME", help="what the base is called on a hub, for model cards")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to make")


def rewind(parser: argparse.ArgumentParser) -> None:
    """Of ``cwfast rewind``."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="safetensors file or folder with the trained weights")
    parser.add_argument("--base", type=Path, help="the same with the initial weights, and")
    parser.add_argument("--mask", type=Path, help="file of cwfast select or MaskSet.save")
    parser.add_argument("--artefact", type=Path, metavar="FILE", help="or instead of both: file of cwfast artefact")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--model-card", action="store_true", help="write README.md: what was done, by what, what "
                        "that does not promise; the model's own is not copied then")  # fmt: skip
    parser.add_argument("--base-id", metavar="OWNER/NAME", help="what the base is called on a hub, for that card")
    parser.add_argument("--resume", action="store_true", help="go on where a run with the same arguments was stopped")
    parser.add_argument("--copy-code", action="store_true", help="also copy *.py, and keep auto_map, which runs them")


def defend(parser: argparse.ArgumentParser) -> None:
    """Of ``cwfast defend``."""
    parser.add_argument("--train", metavar="MODULE:FUNCTION", help="a function that returns (task, defense)")
    parser.add_argument("--data", metavar="NAME", help="or a task of cwfast.examples: digits, mnist_5k, adult")
    parser.add_argument("--defense", metavar="SPEC", help="such as relaxloss:alpha=0.5 or cwrf:rate=0.1,criterion=gap,"
                        "loss=relaxloss(alpha=0.5); default: what the function returns")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of weights, masks and report")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument("--audit", action="store_true", help="also attack fleets trained without and with the defense")
    parser.add_argument("--models", type=int, default=16, help="of each of these fleets (default: %(default)s)")
    parser.add_argument("--bootstrap", type=int, default=1000, help="replicates for intervals (default: %(default)s)")


def study(parser: argparse.ArgumentParser) -> None:
    """Of ``cwfast study``."""
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


def audit(parser: argparse.ArgumentParser) -> None:
    """Of ``cwfast audit``."""
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


def audit_llm(parser: argparse.ArgumentParser) -> None:
    """Of ``cwfast audit-llm``."""
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
        "--autocast",
        choices=("bfloat16", "float16"),
        help="run models, not their heads, in that precision: faster, scores move by rounding",
    )
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
        "--out", type=Path, help="folder for report.json, .html, .md and the token records, to go on with"
    )
    told.add_argument(
        "--show-text",
        action="store_true",
        help="show the most exposed texts in report.html, token by token; else no text is in it",
    )


def demo_llm(parser: argparse.ArgumentParser) -> None:
    """Of ``cwfast demo-llm``."""
    parser.add_argument("--out", type=Path, default=Path("cwfast-demo-llm"), help="folder of the run and its report, "
                        "about 2.2 GB, 5 GB with --full; a run that was stopped goes on there, and --rates and "
                        "--shadows add to one that has ended (default: %(default)s)")  # fmt: skip
    parser.add_argument("--full", action="store_true", help="more texts, starts, criteria, rates and controls: hours")
    parser.add_argument("--rates", type=float, nargs="+", default=(), metavar="RATE", help="more shares of the "
                        "weights to rewind than 0.1 and 0.3; --full has 0.01, 0.03 and 0.2 as well")  # fmt: skip
    parser.add_argument("--shadows", type=int, default=0, metavar="N", help="models trained on random halves of the "
                        "texts, for RMIA: 0 or at least 2 (default: 0; 8 with --full)")  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, help="of orders, random masks and bootstrap (default: %(default)s)"
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing: report the models that are done")


def defend_llm(parser: argparse.ArgumentParser) -> None:
    """Of ``cwfast defend-llm``."""
    parser.add_argument("model", metavar="MODEL", help="folder of transformers: the fine-tuned model")
    given = parser.add_argument_group("what it is defended with, and judged by")
    given.add_argument("--base", required=True, metavar="BASE", help="folder of the model before fine-tuning")
    given.add_argument("--members", type=Path, metavar="FILE", required=True, help="texts that it was fine-tuned on")
    given.add_argument("--reference", type=Path, metavar="FILE", required=True, help="other texts of the same source, "
                       "by which weights are scored")  # fmt: skip
    given.add_argument("--nonmembers", type=Path, metavar="FILE", required=True, help="further ones, for the attacks")
    given.add_argument("--heldout", type=Path, metavar="FILE", help="further ones, for perplexity (default: the "
                       "non-members)")  # fmt: skip
    given.add_argument("--shadow", nargs="+", default=[], metavar="FOLDER", help="models trained like MODEL on other "
                       "halves of members and non-members, each with members.jsonl in it; for rmia")  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument(
        "--criterion", choices=("gap", "taylor_delta", "taylor"), default="gap", help="default: %(default)s"
    )
    how.add_argument("--rate", type=float, default=0.1, help="share of the weights to rewind (default: %(default)s)")
    how.add_argument("--points", type=int, default=1, help="of the path, for gap (default: %(default)s)")
    how.add_argument(
        "--steps", type=int, default=15, help="of fine-tuning after rewinding; 0: none (default: %(default)s)"
    )
    how.add_argument("--lr", type=float, default=5e-5, help="its learning rate (default: %(default)s)")
    how.add_argument("--alpha", default="auto", metavar="NATS", help="level of the mean token loss that it holds the "
                     "members at (default: that of the rewound model)")  # fmt: skip
    how.add_argument("--batch", type=int, default=8, help="texts of a step (default: %(default)s)")
    how.add_argument("--max-tokens", type=int, default=512, metavar="N", help="read the first N tokens of each text "
                     "(default: %(default)s)")  # fmt: skip
    how.add_argument("--fpr", nargs="+", type=float, default=[0.01], help="false-positive rates (default: 0.01)")
    how.add_argument("--bootstrap", type=int, default=1000, help="replicates for intervals (default: %(default)s)")
    how.add_argument(
        "--seed", type=int, default=0, help="of the order of texts and of bootstrap (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make: model/, mask.safetensors, report.*")
