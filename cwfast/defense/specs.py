"""Defenses by name, as in a command line: ``relaxloss:alpha=0.5``, ``cwrf:rate=0.1,loss=relaxloss(alpha=0.5)``."""

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args

from cwfast.defense.hamp import HAMPOutputs
from cwfast.training import Defense, Loss, cross_entropy


class Entry(NamedTuple):
    """A name's meaning.

    Attributes:
        label: what reports call it.
        target: ``module:class``, imported when it is asked for; its keyword arguments are the options.
        meaning: one line.
        loss: it is a loss, used by training from scratch.
    """

    label: str
    target: str
    meaning: str
    loss: bool = False


NESTED = ("loss", "private")  # arguments that a text names, too
WORDS = Sequence[str]
_LOSSES = "cwfast.defense.losses:"
_BASE = "cwfast.defense.baselines:"
DEFENSES: dict[str, Entry] = {
    "none": Entry(
        "no defense", _BASE + "PlainTraining", "training by the recipe, with the cross-entropy or another loss"
    ),
    "relaxloss": Entry(
        "RelaxLoss", _LOSSES + "RelaxLoss", "holds the mean training loss at alpha (Chen et al. 2022)", True
    ),
    "hamp": Entry("HAMP", _LOSSES + "HAMP", "soft labels, entropy, random outputs (Chen & Pattabiraman 2024)", True),
    "ccl": Entry("CCL", _LOSSES + "ConvexConcave", "convex-concave loss (Liu et al. 2024)", True),
    "label-smoothing": Entry("label smoothing", _LOSSES + "LabelSmoothing", "soft labels (Szegedy et al. 2016)", True),
    "confidence-penalty": Entry(
        "confidence penalty", _LOSSES + "ConfidencePenalty", "reward for entropy (Pereyra et al. 2017)", True
    ),
    "early-stopping": Entry("early stopping", _BASE + "EarlyStopping", "training cut short after some epochs"),
    "weight-decay": Entry("weight decay", _BASE + "WeightDecay", "training with another weight decay"),
    "mixup": Entry("mixup", "cwfast.defense.mixup:Mixup", "mixtures of samples and labels (Zhang et al. 2018)"),
    "advreg": Entry(
        "AdvReg", "cwfast.defense.advreg:AdvReg", "fools an attack network trained along (Nasr et al. 2018)"
    ),
    "selena": Entry(
        "SELENA", "cwfast.defense.selena:SELENA", "learns from models that left the sample out (Tang et al. 2022)"
    ),
    "past": Entry("PAST", "cwfast.defense.past:PAST", "l1 penalty by sensitivity of the loss gap (Hu et al. 2024)"),
    "crl": Entry("CRL", "cwfast.defense.crl:CRL", "relaxed losses of logits and class centers (Fang & Kim 2024)"),
    "dpsgd": Entry("DP-SGD", "cwfast.defense.dp:DPSGD", "clipped and noised gradients (Abadi et al. 2016)"),
    "cwrf": Entry("CWRF", "cwfast.defense.cwrf:CWRF", "rewinds and freezes critical weights, fine-tunes the others"),
}


def parse(text: str) -> Defense:
    """The defense that a text names: ``name``, ``name:option=value,...`` or ``name(option=value,...)``.

    Names are the keys of ``DEFENSES``, options the arguments of what they stand for. Values are numbers, ``true``,
    ``false``, ``none`` or words, several of which have ``+`` between them. A value that is a loss or a defense has its
    own options in parentheses: ``loss=relaxloss(alpha=0.5)``, ``private=dpsgd(epsilon=8)``. ``hamp``, as a defense or
    as a loss, modifies outputs too, unless it has ``outputs=false``.

    Raises:
        ValueError: no such name or option, a missing option, or a value that is refused; the message says what there
            is.
        ImportError: a package that the defense needs is not installed.
    """
    name, options = _read(text, DEFENSES)
    if DEFENSES[name].loss:
        from cwfast.defense.baselines import PlainTraining

        loss, modify = _loss(text)
        defense: Defense = PlainTraining(loss)
    else:
        modify = False
        if isinstance(options.get("loss"), str):
            options["loss"], modify = _loss(options["loss"])
        if isinstance(options.get("private"), str):
            options["private"] = _make(*_read(options["private"], {"dpsgd": DEFENSES["dpsgd"]}))
        defense = _make(name, options)
    return HAMPOutputs(defense) if modify else defense


def parse_loss(text: str) -> Loss:
    """The training loss that a text names, as for ``parse``; ``ce`` is the cross-entropy.

    Raises:
        ValueError: as ``parse``; a name is not that of a loss.
    """
    return _loss(text)[0]


def table() -> list[tuple[str, str, str]]:
    """For each name: its options with their defaults, and its meaning. A name whose module is missing is left out."""
    rows = []
    for name, entry in DEFENSES.items():
        try:
            rows.append((name, _listed(name), entry.meaning))
        except ImportError:
            continue
    return rows


def _loss(text: str) -> tuple[Loss, bool]:
    """And whether outputs are modified with it, as by HAMP."""
    if text.strip() == "ce":
        return cross_entropy, False
    name, options = _read(text, {name: entry for name, entry in DEFENSES.items() if entry.loss})
    modify = options.pop("outputs", True) if name == "hamp" else False
    if not isinstance(modify, bool):
        raise ValueError(f"hamp's outputs must be true or false; got {modify!r}")
    return _make(name, options), modify


def _read(text: str, names: dict[str, Entry]) -> tuple[str, dict[str, Any]]:
    found = re.fullmatch(r"\s*([\w-]*)\s*(?::(.*)|\((.*)\))?\s*", text, re.DOTALL)
    if found is None:
        raise ValueError(
            f"a defense must be written name, name:option=value,... or name(option=value,...); got {text!r}"
        )
    name = found[1].lower().replace("_", "-")
    if name not in names:
        raise ValueError(f"a defense must be one of {', '.join(names)}; got {found[1]!r}")
    return name, _options(found[2] or found[3] or "", text)


class _Option(NamedTuple):
    """An argument that a text can give.

    Attributes:
        kinds: the types that its annotation names.
        default: ``inspect.Parameter.empty`` where there is none.
    """

    kinds: frozenset[Any]
    default: object

    @classmethod
    def of(cls, parameter: inspect.Parameter) -> "_Option":
        """From the argument's annotation and default."""
        given = parameter.annotation
        return cls(frozenset(get_args(given) if isinstance(given, UnionType) else [given]), parameter.default)

    @property
    def needed(self) -> bool:
        """There is no default."""
        return self.default is inspect.Parameter.empty

    def typed(self, what: str, value: Any) -> Any:
        """``value``, as an argument of these kinds has it.

        Raises:
            ValueError: none of them has it.
        """
        if isinstance(value, str) and WORDS in self.kinds:
            return value.split("+")
        if value is None and NoneType in self.kinds:
            return None
        wanted = tuple(self.kinds & {bool, int, str}) + ((int, float) if float in self.kinds else ())
        if not wanted or (isinstance(value, wanted) and (bool in wanted or not isinstance(value, bool))):
            return value
        names = {bool: "true or false", float: "a number", int: "a whole number", str: "a word"}
        allowed = [names[kind] for kind in names if kind in self.kinds and (kind is not int or float not in self.kinds)]
        raise ValueError(f"{what} must be {' or '.join(allowed)}; got {_shown(value)}")


def _known(name: str) -> tuple[Callable[..., Any], dict[str, _Option]]:
    """What a name builds, and the options that a text can give."""
    module, _, attribute = DEFENSES[name].target.partition(":")
    build = getattr(importlib.import_module(module), attribute)
    every = {option: _Option.of(given) for option, given in inspect.signature(build).parameters.items()}
    spoken = {bool, int, float, str, WORDS}
    return build, {option: one for option, one in every.items() if one.kinds & spoken or option in NESTED}


def _make(name: str, options: dict[str, Any]) -> Any:
    build, known = _known(name)
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has the options {_listed(name)}; got {option!r}")
    for option, one in known.items():
        if one.needed and option not in options:
            raise ValueError(f"{name} must be given {option}, as in {name}:{option}=...; its options: {_listed(name)}")
    options = {option: known[option].typed(f"{name}'s {option}", value) for option, value in options.items()}
    try:
        return build(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _listed(name: str) -> str:
    shown = [
        option if one.needed or callable(one.default) else f"{option}={_shown(one.default)}"
        for option, one in _known(name)[1].items()
    ]
    return ", ".join([*shown, *(["outputs=true"] if name == "hamp" else [])])


def _shown(value: object) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _options(text: str, whole: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in _split(text):
        option, equals, value = part.partition("=")
        option = option.strip().replace("-", "_")
        if not (option and equals and value.strip()):
            raise ValueError(f"options must be written option=value, with commas between; got {part!r} in {whole!r}")
        if option in found:
            raise ValueError(f"an option must be given once; got {option} twice in {whole!r}")
        found[option] = _value(value.strip())
    return found


def _split(text: str) -> list[str]:
    """At the commas outside of parentheses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
        if depth < 0:
            break
    if depth:
        raise ValueError(f"parentheses must be closed, and opened before that; got {text!r}")
    return parts if text.strip() else []


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
