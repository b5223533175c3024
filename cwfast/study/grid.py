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
        how: one of ``making.HOW``; "table": no models but a table of ``tables``.
        spec: of a defense or a loss.
        criterion: of CWRF.
        rate: of CWRF.
        lam: of CWRF's estimate.
        strength: epochs, tau, or the defense's own parameter.
        like: of a control, the criterion whose counts in each tensor, or whose distance, it copies.
        reference: what it uses of the reference set.
        unchanged: attacked by the outputs that HAMP's models have before HAMP changes them, as whoever has the weights
            can do; the models are those of the cell that is not (see ``unchanged``).
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
    like: str | None = None
    reference: str = "nothing"
    unchanged: bool = False


def bases(setting: Setting) -> list[str]:
    """The base defenses that can be run here (DP-SGD needs Opacus), and "hamp_plain": HAMP, outputs unchanged."""
    found = [base for base in setting.losses if base != "dpsgd" or find_spec("opacus") is not None]
    return [name for base in found for name in ((base, "hamp_plain") if base == "hamp" else (base,))]


def unchanged(cell: Cell) -> Cell | None:
    """The same models, their outputs seen before HAMP changes them; None where it does not."""
    if cell.base != "hamp" or cell.unchanged:
        return None
    label = cell.label.replace("HAMP", DEFENSES["hamp_plain"]).replace("unchanged from", "unchanged, from")
    return replace(cell, key=f"{cell.key}-unchanged", label=label, base="hamp_plain", unchanged=True)


def cells(setting: Setting, lams: Sequence[float] = ()) -> list[Cell]:
    """All cells of a data set; the one that trains what the others start from comes first.

    Args:
        setting: the data set.
        lams: further values of CWRF's lambda, for the criteria that have one.

    Raises:
        ValueError: two cells have one name.
    """
    private = find_spec("opacus") is not None
    found = _untuned(setting)
    found += [_scratch(spec) for spec in setting.scratch if private or not spec.startswith("dpsgd")]
    for base in setting.losses:
        if base != "dpsgd" or private:
            found += _base(setting, base, lams)
    if setting.ablation:
        found += _ablation(setting)
    if setting.variants:
        found += _variants(setting)
    found += [
        Cell(f"table-{kind}-{network}", f"{kind} table, {network}", "", "table", "table", f"{kind}:{network}")
        for network in setting.tables
        for kind in ("ablation", "entanglement")
    ]
    found.sort(key=lambda cell: cell.base == "dpsgd")  # the slowest last
    found += _controls_at_other_strengths(setting)
    found = [one for cell in found for one in (cell, unchanged(cell)) if one is not None]
    keys = [cell.key for cell in found]
    if len(set(keys)) != len(keys):
        raise ValueError(f"cells must have names of their own; got {len(keys) - len(set(keys))} repeats")
    return found


def _untuned(setting: Setting) -> list[Cell]:
    """Trained by cross-entropy, in full or shorter, or moved back, and not fine-tuned."""
    epochs, stopped = setting.recipe.epochs, "Early stopping"
    return [
        Cell("undefended", "Undefended", "none", "undefended", "trained"),
        *(Cell(f"stopped-{n}", f"{stopped}, {n} of {epochs} epochs", "none", "early stopping", "stopped", strength=n)
          for n in setting.stops),
        Cell("stopped-reference", f"{stopped} by the reference set", "none", "early stopping by the reference set",
             "stopped", reference="inputs and labels"),
        *(Cell(f"short-{n}", f"Short training, its whole schedule in {n} epochs", "other", "short training", "short",
               strength=n) for n in setting.shorts),
        *(Cell(f"interpolated-{tau}", f"Interpolated to the initial weights, tau {tau}", "none", "interpolation",
               "interpolated", strength=tau) for tau in setting.taus),
    ]  # fmt: skip


def _scratch(spec: str) -> Cell:
    name, _, options = spec.removesuffix(")").partition("(")
    shown = specs.DEFENSES[name].label
    label = f"{shown} from scratch{', ' + options if options else ''}"
    whole = f"{name}:{options}" if options else name
    base, curve = (name, "from scratch") if name in DEFENSES else ("other", shown)
    return Cell(_safe(f"scratch-{spec}"), label, base, curve, "defense", whole, strength=_strength(spec),
                reference=USE_OF_DEFENSES.get(name, "nothing"))  # fmt: skip


def _base(setting: Setting, base: str, lams: Sequence[float]) -> list[Cell]:
    """Fine-tuned with a base defense from the trained weights: as they are, after each rewinding, after controls."""
    specs = setting.losses[base], *setting.strengths.get(base, ())
    found = []
    for k, spec in enumerate(specs):  # CWRF in full at the first strength alone
        found += _without_rewinding(base, spec, setting.criteria[0], first=k == 0)
    for criterion in setting.criteria:
        for rate in setting.rates:
            found.append(_cwrf(base, setting.losses[base], criterion, rate))
            if USE.get(criterion) == "inputs" and base != "dpsgd":
                found += [_with_lam(found[-1], lam) for lam in lams]
    for criterion in setting.copied:
        found += [_random(_cwrf(base, setting.losses[base], criterion, rate)) for rate in setting.rates]
        if base != "dpsgd" or criterion == "gap":
            found += [_distance(_cwrf(base, setting.losses[base], criterion, rate)) for rate in setting.rates]
        for spec in specs[1:]:
            found.append(_other_strength(_cwrf(base, spec, criterion, setting.middle_rate), spec))
    return found


def _without_rewinding(base: str, spec: str, criterion: str, *, first: bool) -> list[Cell]:
    """Fine-tuned by all steps, and up to the lowest loss on the reference set."""
    plain = replace(
        _cwrf(base, spec, criterion, 0.0), key=f"{base}-tuned",
        label=f"Fine-tuned without rewinding, {DEFENSES[base]}", curve="fine-tuning without rewinding",
        reference=USE_OF_DEFENSES.get(base, "nothing"),
    )  # fmt: skip
    halted = replace(
        plain, key=f"{base}-halted", label=f"Fine-tuned, stopped by the reference set, {DEFENSES[base]}",
        curve="fine-tuning stopped by the reference set", how="halted", spec=spec, criterion=None, rate=None,
        reference="inputs and labels",
    )  # fmt: skip
    found = [plain] if base == "dpsgd" else [plain, halted]
    return found if first else [_at_strength(cell, spec) for cell in found]


def _cwrf(base: str, spec: str, criterion: str, rate: float) -> Cell:
    private = base == "dpsgd"  # the models one by one, around the rewound weights
    return Cell(
        f"{base}-{criterion}-{rate}", f"CWRF {criterion} {100 * rate:.3g}% + {DEFENSES[base]}", base, criterion,
        "private" if private else "defense", spec if private else f"cwrf:rate={rate},criterion={criterion},loss={spec}",
        criterion, rate, reference=USE.get(criterion, "nothing"),
    )  # fmt: skip


def _random(cell: Cell) -> Cell:
    """CWRF with as many weights in each tensor, chosen at random."""
    by = str(cell.criterion)
    return replace(
        cell, key=f"{cell.base}-random-as-{by}-{cell.rate}", curve=f"random as {by}", like=by,
        label=cell.label.replace(f"CWRF {by}", f"Random weights, as many as {by} in each tensor,"),
        how="private random" if cell.how == "private" else "random",
    )  # fmt: skip


def _distance(cell: Cell) -> Cell:
    """All weights moved towards the initial ones, as far as CWRF's rewinding moved; then the same fine-tuning."""
    by = str(cell.criterion)
    return replace(
        cell, key=f"{cell.base}-interpolated-as-{by}-{cell.rate}", like=by,
        curve=f"interpolated as {by}, then fine-tuned",
        label=cell.label.replace(f"CWRF {by}", f"Interpolated as far as {by}") + ", fine-tuned",
        how="private distance" if cell.how == "private" else "distance",
    )  # fmt: skip


def _controls_at_other_strengths(setting: Setting) -> list[Cell]:
    """What CWRF at the middle rate and other strengths of a base defense is to be compared with, at those strengths."""
    return [
        _other_strength(control(_cwrf(base, spec, criterion, setting.middle_rate)), spec)
        for base in setting.losses
        if base != "dpsgd"
        for spec in setting.strengths.get(base, ())
        for criterion in setting.copied
        for control in (_random, _distance)
    ]


def _other_strength(cell: Cell, spec: str) -> Cell:
    return replace(_at_strength(cell, spec), curve=f"{cell.curve}, other strengths")


def _at_strength(cell: Cell, spec: str) -> Cell:
    strength = _strength(spec)
    return replace(
        cell, key=f"{cell.key}-strength-{strength:g}", label=f"{cell.label}, strength {strength:g}", strength=strength
    )


def _strength(spec: str) -> float | None:
    """A spec's first number: ``relaxloss(alpha=0.5)`` has 0.5."""
    found = re.search(r"=([0-9.]+)", spec)
    return float(found[1]) if found else None


def _with_lam(cell: Cell, lam: float) -> Cell:
    return replace(
        cell, key=f"{cell.key}-lam-{lam}", label=f"{cell.label}, lambda {lam}", curve=f"{cell.curve}, lambda {lam}",
        spec=f"{cell.spec},lam={lam}", lam=lam,
    )  # fmt: skip


def _ablation(setting: Setting) -> list[Cell]:
    """The paper's ablations and CWRF's variants at one rate, by RelaxLoss."""
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
    of_estimate = ("update=false", "granularity=batch")  # gap has none
    return [
        _variant(setting, criterion, setting.ablation_rate, name, option)
        for criterion in ("taylor", "gap")
        for name, option in variants.items()
        if criterion == "taylor" or option not in of_estimate
    ]


def _variants(setting: Setting) -> list[Cell]:
    """Gap computed in other ways, at a larger rate, by RelaxLoss."""
    variants = {
        "three points of the path": "",
        "one point of the path": "points=1",
        "five points of the path": "points=5",
        "three rounds": "rounds=3",
        "the last layer kept, a share of the others": f"exclude={setting.last}",
        "weights between hidden layers alone, a share of them": f"exclude={setting.first}+{setting.last}",
    }
    found = [_variant(setting, "gap", setting.middle_rate, name, option) for name, option in variants.items()]
    return [*found, _variant(setting, "gap", setting.middle_rate, "half of the reference set", "", "half reference")]


def _variant(setting: Setting, criterion: str, rate: float, name: str, option: str, how: str = "variant") -> Cell:
    spec = f"cwrf:rate={rate},criterion={criterion},loss={setting.losses['relaxloss']}{',' + option if option else ''}"
    named = option or ("cwrf" if how == "variant" else how)
    return Cell(
        _safe(f"ablation-{criterion}-{rate}-{named}"), f"{name} ({criterion}, {100 * rate:.3g}%)",
        "relaxloss", f"ablation: {name}", how, spec, criterion, rate, reference=USE[criterion],
    )  # fmt: skip


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", text).strip("_")
