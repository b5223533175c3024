"""``cwfast defend``: one model trained and defended, its weights and masks as files; with ``--audit``, attacks on
fleets that were trained in the same way, before and after."""

import argparse
import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from cwfast import report, shadow
from cwfast.checkpoint.files import atomic_write, sha256
from cwfast.defense.baselines import PlainTraining
from cwfast.defense.cwrf import CWRF
from cwfast.defense.specs import parse
from cwfast.mia import audit
from cwfast.report import provenance
from cwfast.shadow.work import resolve
from cwfast.training import Defense, Fitted, Task

SCHEMA = "cwfast-defend/1"


@dataclass(frozen=True)
class Source:
    """What to train, for workers: a user's task with another defense.

    Attributes:
        train: "module:function".
        defense: a spec; None: the function's own.
    """

    train: str
    defense: str | None

    def __call__(self) -> tuple[Any, ...]:
        """(task, defense) or (task, defense, queries)."""
        made = resolve(self.train)()
        shadow.Training(made).setup  # noqa: B018  # says what is wrong with it
        task, defense, *more = made
        return task, defense if self.defense is None else parse(self.defense), *more


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The report and what is printed; everything is written into ``--out``.

    Raises:
        ValueError, TypeError, OSError, ImportError: as the messages say.
    """
    if (options.train is None) == (options.data is None):
        options.usage("one of --train and --data must be given; got " + ("none" if options.train is None else "both"))
    if options.audit and (options.models < 6 or options.models % 2):
        options.usage(f"--models must be even and at least 6, for the attacks; got {options.models}")
    out = report.folder(options.out)
    sys.path.append(os.getcwd())  # where a user's module lies; last, or a checkout there would hide what is installed
    train = options.train or f"cwfast.examples:{options.data.replace('-', '_')}"
    source = Source(train, options.defense)
    task, defense, *_ = source()
    members, reference = task.dataset.pool, task.dataset.reference
    before, after = _fitted(task, defense, members, reference, options.seed)
    files = _save(out, before, after)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "command": options.command_line,
        "seed": options.seed,
        "versions": provenance.versions(("cwfast", "torch", "numpy", "safetensors")),
        "device": str(next(after.model.parameters()).device),
        "machine": provenance.machine(),
        "backends": provenance.backends("saliency", "select", "rewind"),
        "data": {"name": task.dataset.name, "sha256": task.dataset.sha256, "note": task.dataset.note},
        "members": len(members),
        "reference": len(reference),
        "defense": repr(defense) if options.defense is None else options.defense,
        "notes": _plain(getattr(after, "notes", {})),
        "rewound": None if after.masks is None else {"weights": after.masks.total, "of": after.masks.numel},
        "accuracy": {"before": _accuracies(task, before), "after": _accuracies(task, after)},
        "files": files,
    }
    lines = _told(document)
    if "privacy" in after.notes:  # what epsilon covers must be read, not looked up
        lines += ["", str(after.notes["privacy"])]
    if options.audit:
        document["audit"] = {}
        for name, spec in (("before", "none"), ("after", options.defense)):
            found = _audited(Source(train, spec), out / f"audit-{name}", options)
            found.to_html(out / f"{name}.html")
            document["audit"][name] = found.report
            lines += ["", f"{name}, {options.models} models on halves of the pool:", found.table().rstrip("\n")]
    with atomic_write(out / "report.json") as temporary:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return document, "\n".join([*lines, "", f"Written: {out.resolve()}"])


def _fitted(task: Task, defense: Defense, members: Tensor, reference: Tensor, seed: int) -> tuple[Fitted, Fitted]:
    before = PlainTraining().fit(task, members, reference, seed)
    alone = isinstance(defense, CWRF) and defense.start == "reference"  # it must not begin from what saw the members
    return before, defense.fit(task, members, reference, seed, trained=None if alone else before)


def _save(out: Path, before: Fitted, after: Fitted) -> dict[str, str]:
    """Initial, undefended and defended weights, and masks where there are some; their hashes by name."""
    states = {"initial": before.initial, "undefended": before.model.state_dict(), "defended": after.model.state_dict()}
    names = []
    for name, state in states.items():
        names.append(f"{name}.safetensors")
        with atomic_write(out / names[-1]) as temporary:
            save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, temporary)
    if after.masks is not None:
        names.append("masks.safetensors")
        after.masks.save(out / names[-1])
    return {name: sha256(out / name) for name in names}


def _accuracies(task: Task, one: Fitted) -> dict[str, float]:
    data = task.dataset
    parts = {"members": data.pool, "reference": data.reference, "test": data.test}
    return {
        name: float((one.predict(data.inputs[ids]).argmax(dim=1) == data.targets[ids]).double().mean())
        for name, ids in parts.items()
        if len(ids)
    }


def _audited(source: Source, out: Path, options: argparse.Namespace) -> Any:
    """Attacks on a fleet, every model a target in turn; it is trained where it is not yet."""
    signals = shadow.signals(source, out, models=options.models, seed=options.seed, group=options.models)
    return audit(signals, attacks=("loss", "lira", "rmia"), bootstrap=options.bootstrap, seed=options.seed)


def _plain(value: Any) -> Any:
    """What a defense notes, as JSON has it."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {**_plain(dataclasses.asdict(value)), "text": str(value)}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _told(document: dict[str, Any]) -> list[str]:
    lines = [f"{document['defense']} on {document['data']['name']}, {document['members']} members"]
    if document["rewound"]:
        lines.append(f"rewound and frozen: {document['rewound']['weights']:,} of {document['rewound']['of']:,} weights")
    for name, value in document["notes"].items():
        lines.append(f"{name}: {value['text'] if isinstance(value, dict) and 'text' in value else value}")
    for when, parts in document["accuracy"].items():
        lines.append(f"accuracy {when}: " + ", ".join(f"{part} {value:.3f}" for part, value in parts.items()))
    return lines
