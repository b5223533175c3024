"""``cwfast audit``: attacks on logits or signals from files, or on models trained first; a table, JSON and one page."""

import argparse
import os
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cwfast import report
from cwfast.checkpoint.arrays import read_array, split_path
from cwfast.checkpoint.files import sha256
from cwfast.errors import CheckpointError
from cwfast.mia import Audit, Signals, audit
from cwfast.mia._shadows import TooFewModels
from cwfast.mia.attacks import ATTACKS
from cwfast.report import provenance

ALONE = ("loss", "attack_p", "correctness", "gradient_norm", "quantile_regression")  # attacks that need no shadow model
LOGITS = ("logits", "labels", "membership", "ids")
TRAINING = ("models", "group", "engine", "workers", "threads")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The report and what is printed; with ``--out``, report.json and report.html are written.

    Raises:
        ValueError, TypeError, CheckpointError, OSError: as the messages say.
    """
    _check_usage(options)
    if options.out is not None:
        report.folder(options.out)  # an unwritable one is found now, not at the end
    inputs = None
    features = None if options.features is None else read_array(options.features, "features")
    if options.signals is not None:
        signals = Signals.load(options.signals)
    elif options.train is not None:
        signals, inputs = _trained(options, features)
    else:
        signals = _from_logits(options)
    backends = {} if options.signals is not None else provenance.backends("logit_stats")
    if options.inputs is not None:
        inputs = _of_samples(read_array(options.inputs, "inputs"), signals)
    found = _attacked(options, signals, features, options.bootstrap)
    document = {
        **found.report,
        "command": options.command_line,
        "versions": provenance.versions(("cwfast", "torch", "numpy", "safetensors")),
        "device": "cpu",
        "machine": provenance.machine(),
        "backends": backends,
        "inputs": _inputs(options),
    }
    found = Audit(document, found.scores, found.membership)
    lines = [found.summary(), "", found.table().rstrip("\n")]
    if options.out is not None:
        found.to_json(options.out / "report.json")
        found.to_html(options.out / "report.html", inputs=inputs)
        lines += ["", f"Report: {(options.out / 'report.html').resolve()}"]
    return document, "\n".join(lines)


def _check_usage(options: argparse.Namespace) -> None:
    """Wrong combinations of arguments end the program, as argparse's own errors do."""
    given = [name for name in LOGITS if getattr(options, name) is not None]
    settings = [name for name in TRAINING if getattr(options, name) is not None]
    missing = [f"--{name}" for name in LOGITS[:3] if name not in given]
    whole = [name for name in ("signals", "train") if getattr(options, name) is not None]
    if whole and (given or len(whole) == 2):
        options.usage(f"--{whole[0]} says all of the models' side; got --{[*whole[1:], *given][0]} besides")
    if not whole and missing:
        wanted = "--logits, --labels and --membership must be given, or --signals, or --train"
        options.usage(f"{wanted}; got no {', no '.join(missing)}")
    if settings and options.train is None:
        options.usage(f"--{settings[0]} must come with --train, as it is about training; got it alone")
    if options.train is not None and options.out is None:
        options.usage("--train must come with --out, where an interrupted run goes on; got none")
    if options.train is not None and options.inputs is not None:
        options.usage("--inputs must not come with --train, whose data are shown; got both")
    if options.train is None and options.show_inputs != (options.inputs is not None):
        options.usage("--show-inputs and --inputs must be given together; got one of them")
    if options.show_inputs and options.out is None:
        options.usage("--show-inputs must come with --out: samples are shown in report.html; got none")
    unknown = [name for name in options.attacks or () if name not in ATTACKS]
    if unknown:
        options.usage(f"--attacks must be among {', '.join(ATTACKS)}; got {unknown[0]!r}")
    wrong = [fpr for fpr in options.fpr if not 0 <= fpr <= 1]
    if wrong:
        options.usage(f"--fpr must lie in [0, 1]; got {wrong[0]:g}")
    if options.bootstrap < 0:
        options.usage(f"--bootstrap must be at least 0; got {options.bootstrap}")


def _attacked(options: argparse.Namespace, signals: Signals, features: Tensor | None, bootstrap: int) -> Audit:
    attacks = options.attacks or (["loss", "lira", "rmia"] if len(signals.membership) > 1 else ["loss", "attack_p"])
    _check_membership(signals.membership, attacks)
    try:
        return audit(
            signals,
            attacks=list(dict.fromkeys(attacks)),
            features=features,
            target=options.target,
            fprs=options.fpr,
            bootstrap=bootstrap,
            seed=options.seed,
        )
    except TooFewModels as error:
        raise ValueError(f"{error}: use --attacks loss attack_p correctness, or more models") from error


def _trained(options: argparse.Namespace, features: Tensor | None) -> tuple[Signals, Tensor | None]:
    """Signals of models trained now, or in the run that ``--out`` holds; and the samples, if they are to be shown."""
    from cwfast import shadow

    sys.path.append(os.getcwd())  # where a user's module lies; last, or a checkout there would hide what is installed
    how = {"models": 16} | {name: getattr(options, name) for name in TRAINING if getattr(options, name) is not None}
    job = shadow.Training(options.train)
    plan = job.plan(how["models"], options.seed)
    noise = torch.randn(*plan.membership.shape, 2, generator=torch.Generator().manual_seed(0))
    rehearsal = Signals.from_logits(noise, torch.zeros(len(plan.ids), dtype=torch.int64), plan.membership)
    labels = job.setup[0].dataset.targets[plan.ids].cpu()
    _attacked(options, replace(rehearsal, labels=labels), features, 0)  # refuses now what it would after the training
    saved = options.out / "signals.safetensors"
    try:
        signals = shadow.signals(job.source, options.out / "shadows", seed=options.seed, **how)
    except CheckpointError as error:
        if not saved.exists():
            raise
        raise CheckpointError(f"{error}; to attack again what was trained there, use --signals {saved}") from error
    signals.save(saved)
    return signals, job.setup[0].dataset.inputs[signals.ids].cpu() if options.show_inputs else None


def _from_logits(options: argparse.Namespace) -> Signals:
    logits = read_array(options.logits, "logits")
    if not logits.is_floating_point() or logits.ndim not in (2, 3, 4) or 0 in logits.shape:
        raise ValueError(
            "logits must be floating point, [K, N, C], [K, N, Q, C] or, for a single model, [N, C]; "
            f"got {_told(logits)}"
        )
    logits = logits[None] if logits.ndim == 2 else logits
    models, samples = logits.shape[:2]
    if logits.min() >= 0 and ((logits.double().sum(dim=-1) - 1).abs() < 1e-2).all():
        raise ValueError(
            "logits must be those before the softmax; got rows that sum to 1: give the logarithm of these probabilities"
        )
    labels = _whole("labels", read_array(options.labels, "labels"), samples)
    ids = None if options.ids is None else _whole("ids", read_array(options.ids, "ids"), samples)
    member = read_array(options.membership, "membership")
    if models == 1 and member.ndim == 1:
        member = member[None]
    if member.shape != (models, samples):
        raise ValueError(
            f"membership must have shape [K, N] = ({models}, {samples}), as the logits say; got {_told(member)}"
        )
    if not ((member == 0) | (member == 1)).all():
        raise ValueError(f"membership must be true or false, 1 or 0; got {_told(member)} with other values")
    return Signals.from_logits(logits, labels, member.bool(), ids=ids)


def _whole(name: str, value: Tensor, samples: int) -> Tensor:
    if value.is_floating_point() or value.dtype == torch.bool or value.shape != (samples,):
        raise ValueError(f"{name} must be whole numbers [N] = ({samples},), as the logits say; got {_told(value)}")
    return value.long()


def _check_membership(member: Tensor, attacks: list[str]) -> None:
    trained = member.sum(dim=1)
    for row, count in enumerate(trained.tolist()):
        if count in (0, member.shape[1]):
            raise ValueError(
                f"membership must give each model samples it was trained on and others; model {row} was trained on "
                f"{count} of {member.shape[1]}"
            )
    if len(member) == 1:
        wrong = [name for name in attacks if name not in ALONE]
        if wrong:
            raise ValueError(
                f"attacks on a single model must be among {', '.join(ALONE)}: the others need shadow models beside it; "
                f"got {wrong[0]!r}"
            )
    elif (member == member[0]).all():
        raise ValueError(
            "membership must differ between models, so that samples have models with and without them; "
            f"got {len(member)} equal rows"
        )


def _of_samples(inputs: Tensor, signals: Signals) -> Tensor:
    samples = signals.membership.shape[1]
    if inputs.ndim < 2 or len(inputs) != samples or inputs[0].numel() == 0:
        raise ValueError(f"inputs must be [N, ...] with N = {samples}, as the models' side says; got {_told(inputs)}")
    return inputs


def _told(value: Tensor) -> str:
    return f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")


def _inputs(options: argparse.Namespace) -> dict[str, Any]:
    """The files, as they were given, and the hashes of their bytes."""
    named = {name: getattr(options, name) for name in (*LOGITS, "signals", "features", "inputs")}
    return {
        name: {"file": str(where), "sha256": sha256(split_path(where)[0])}
        for name, where in named.items()
        if where is not None
    }
