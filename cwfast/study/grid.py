"""The cells of a study: which models, named so that the same cell has the same name in every run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

from cwfast.defense import specs
from cwfast.study.presets import DEFENSES, Setting

USE = {"taylor": "inputs", "taylor_delta": "inputs", "gap": "inputs and labels"}  # of the reference set
USE_OF_DEFENSES = {"past": "inputs and labels", "hamp": "inputs"}


@dataclass(frozen=True)
class Cell:
    """One fleet of models, all made alike.

    Attributes:
        key: its name, and that of its files.
        label: its name in a report.
        base: the defense by which it is trained or fine-tuned, a key of ``presets.DEFENSES``, or "other".
        curve: what it is a point of: cells of one base and curve differ in their rate or strength alone.
        how: "trained", "stopped", "interpolated", "defense" (by ``spec``), "random", "private",
            "private random" or "halted" (see ``Subject.fit``); "table": no models but a table of ``tables``.
        spec: of a defense.
        criterion: of CWRF.
        rate: of CWRF.
        lam: of CWRF's estimate.
        strength: epochs, tau, or the defense's own parameter.
        reference: what it uses of the reference set.
    """

    key: str
    label: str
    base: str
    curve: str
    how: str
    spec: str = ""
    criterion: str | None = None
    rate: float | None = None
    lam: float | None = None
    strength: float | None = None
    reference: str = "nothing"


def bases(setting: Setting) -> list[str]:
    """The base defenses that can be run here: DP-SGD needs Opacus."""
    return [base for base in setting.losses if base != "dpsgd" or find_spec("opacus") is not None]


def cells(setting: Setting, lams: Sequence[float] = ()) -> list[Cell]:
    """All cells of a data set; the one that trains what the others start from comes first.

    Args:
        setting: the data set.
        lams: further values of CWRF's lambda, for the criteria that have one.

    Raises:
        ValueError: two cells have one name.
    """
    private = find_spec("opacus") is not None
    found = [Cell("undefended", "Undefended", "none", "undefended", "trained")]
    found += [
        Cell(f"stopped-{n}", f"Early stopping, {n} of {setting.recipe.epochs} epochs", "none", "early stopping",
             "stopped", strength=n)
        for n in setting.stops
    ]  # fmt: skip
    found += [
        Cell("stopped-reference", "Early stopping by the reference set", "none", "early stopping by the reference set",
             "stopped", reference="inputs and labels"),
        *(Cell(f"interpolated-{tau}", f"Interpolated to the initial weights, tau {tau}", "none", "interpolation",
               "interpolated", strength=tau) for tau in setting.taus),
    ]  # fmt: skip
    found += [_scratch(spec) for spec in setting.scratch if private or not spec.startswith("dpsgd")]
    for base in bases(setting):
        loss = setting.losses[base]
        found += _tuned(setting, base, loss, lams)
    if setting.ablation:
        found += _ablation(setting)
    found += [
        Cell(f"table-{kind}-{network}", f"{kind} table, {network}", "", "table", "table", f"{kind}:{network}")
        for network in setting.tables
        for kind in ("ablation", "entanglement")
    ]
    found.sort(key=lambda cell: cell.base == "dpsgd")  # the slowest last
    keys = [cell.key for cell in found]
    if len(set(keys)) != len(keys):
        raise ValueError(f"cells must have names of their own; got {len(keys) - len(set(keys))} repeats")
    return found


def _scratch(spec: str) -> Cell:
    name, _, options = spec.removesuffix(")").partition("(")
    first = options.partition(",")[0].partition("=")[2]
    shown = specs.DEFENSES[name].label
    label = f"{shown} from scratch{', ' + options if options else ''}"
    whole = f"{name}:{options}" if options else name
    strength = float(first) if first else None
    base, curve = (name, "from scratch") if name in DEFENSES else ("other", shown)
    return Cell(_safe(f"scratch-{spec}"), label, base, curve, "defense", whole, strength=strength,
                reference=USE_OF_DEFENSES.get(name, "nothing"))  # fmt: skip


def _tuned(setting: Setting, base: str, loss: str, lams: Sequence[float]) -> list[Cell]:
    """Fine-tuned with a base defense from the trained weights: as they are, and after each rewinding."""
    if base == "dpsgd":
        return _private(setting, loss)
    name = DEFENSES[base]
    plain = Cell(
        f"{base}-tuned", f"Fine-tuned without rewinding, {name}", base, "fine-tuning without rewinding", "defense",
        f"cwrf:rate=0,criterion={setting.criteria[0]},loss={loss}", setting.criteria[0], 0.0,
        reference=USE_OF_DEFENSES.get(base, "nothing"),
    )  # fmt: skip
    halted = replace(
        plain, key=f"{base}-halted", label=f"Fine-tuned, stopped by the reference set, {name}",
        curve="fine-tuning stopped by the reference set", how="halted", spec=loss, criterion=None, rate=None,
        reference="inputs and labels",
    )  # fmt: skip
    found = [plain, halted]
    for criterion in setting.criteria:
        for rate in setting.rates:
            random = criterion == "random"
            by = "gap" if random else criterion
            title = "Random weights, as many as gap in each tensor," if random else f"CWRF {criterion}"
            found.append(
                Cell(
                    f"{base}-{criterion}-{rate}", f"{title} {100 * rate:.3g}% + {name}",
                    base, criterion, "random" if random else "defense",
                    f"cwrf:rate={rate},criterion={by},loss={loss}", by, rate,
                    reference=USE.get(by, "nothing"),
                )
            )  # fmt: skip
            if USE.get(criterion) == "inputs":
                found += [_with_lam(found[-1], lam) for lam in lams]
    return found


def _private(setting: Setting, spec: str) -> list[Cell]:
    """Fine-tuned by DP-SGD around the rewound weights: the models one by one."""
    found = [Cell("dpsgd-tuned", "Fine-tuned without rewinding, DP-SGD", "dpsgd", "fine-tuning without rewinding",
                  "private", spec, setting.criteria[0], 0.0)]  # fmt: skip
    for criterion in setting.criteria:
        by, how = ("gap", "private random") if criterion == "random" else (criterion, "private")
        title = "Random weights, as many as gap in each tensor," if criterion == "random" else f"CWRF {criterion}"
        found += [
            Cell(f"dpsgd-{criterion}-{rate}", f"{title} {100 * rate:.3g}% + DP-SGD", "dpsgd", criterion, how, spec, by,
                 rate, reference=USE.get(by, "nothing"))
            for rate in setting.rates
        ]  # fmt: skip
    return found


def _with_lam(cell: Cell, lam: float) -> Cell:
    return replace(
        cell, key=f"{cell.key}-lam-{lam}", label=f"{cell.label}, lambda {lam}", curve=f"{cell.curve}, lambda {lam}",
        spec=f"{cell.spec},lam={lam}", lam=lam,
    )  # fmt: skip


def _ablation(setting: Setting) -> list[Cell]:
    """The paper's ablations and CWRF's variants at one rate, by RelaxLoss."""
    rate, loss = setting.ablation_rate, setting.losses["relaxloss"]
    variants = {
        "A1, critical weights removed": "value=zero",
        "A2, critical weights fine-tuned, the others kept": "train=critical",
        "A3, CWRF": "",
        "rewound only": "epochs=0",
        "three rounds": "rounds=3",
        "score of the trained weights alone": "update=false",
        "as the paper, by batch": "granularity=batch",
        "one rate in every layer": "scope=layer",
    }
    found = []
    for criterion in ("taylor", "gap"):
        for name, option in variants.items():
            if criterion == "gap" and option in ("update=false", "granularity=batch"):
                continue
            spec = f"cwrf:rate={rate},criterion={criterion},loss={loss}{',' + option if option else ''}"
            found.append(
                Cell(
                    _safe(f"ablation-{criterion}-{option or 'cwrf'}"), f"{name} ({criterion}, {100 * rate:.3g}%)",
                    "relaxloss", f"ablation: {name}", "defense", spec, criterion, rate, reference=USE[criterion],
                )
            )  # fmt: skip
    return found


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", text).strip("_")
