"""Defenses by name, as in a command line: ``relaxloss:alpha=0.5``, ``cwrf:rate=0.1,loss=relaxloss(alpha=0.5)``."""

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from cwfast.defense.hamp import HAMPOutputs
from cwfast.training import Defense, Loss, cross_entropy


class Entry(NamedTuple):
    """A name's meaning.

    Attributes:
        target: ``module:class``, imported when it is asked for; its keyword arguments are the options.
        meaning: one line.
        loss: it is a loss, used by training from scratch.
    """

    target: str
    meaning: str
    loss: bool = False


_LOSSES = "cwfast.defense.losses:"
_BASE = "cwfast.defense.baselines:"
DEFENSES: dict[str, Entry] = {
    "none": Entry(_BASE + "PlainTraining", "training by the recipe, with the cross-entropy or another loss"),
    "relaxloss": Entry(_LOSSES + "RelaxLoss", "holds the mean training loss at alpha (Chen et al. 2022)", True),
    "hamp": Entry(_LOSSES + "HAMP", "soft labels, entropy, random outputs (Chen & Pattabiraman 2024)", True),
    "ccl": Entry(_LOSSES + "ConvexConcave", "convex-concave loss (Liu et al. 2024)", True),
    "label-smoothing": Entry(_LOSSES + "LabelSmoothing", "soft labels (Szegedy et al. 2016)", True),
    "confidence-penalty": Entry(_LOSSES + "ConfidencePenalty", "reward for entropy (Pereyra et al. 2017)", True),
    "early-stopping": Entry(_BASE + "EarlyStopping", "training cut short after some epochs"),
    "weight-decay": Entry(_BASE + "WeightDecay", "training with another weight decay"),
    "mixup": Entry("cwfast.defense.mixup:Mixup", "mixtures of samples and labels (Zhang et al. 2018)"),
    "advreg": Entry("cwfast.defense.advreg:AdvReg", "fools an attack network trained along (Nasr et al. 2018)"),
    "selena": Entry("cwfast.defense.selena:SELENA", "learns from models that left the sample out (Tang et al. 2022)"),
    "past": Entry("cwfast.defense.past:PAST", "l1 penalty by sensitivity of the loss gap (Hu et al. 2024)"),
    "crl": Entry("cwfast.defense.crl:CRL", "relaxed losses of logits and class centers (Fang & Kim 2024)"),
    "dpsgd": Entry("cwfast.defense.dp:DPSGD", "clipped and noised gradients (Abadi et al. 2016)"),
    "cwrf": Entry("cwfast.defense.cwrf:CWRF", "rewinds and freezes critical weights, fine-tunes the others"),
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
            options["private"] = parse(options["private"])
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


def _signature(name: str) -> tuple[Callable[..., Any], dict[str, inspect.Parameter]]:
    module, _, attribute = DEFENSES[name].target.partition(":")
    build = getattr(importlib.import_module(module), attribute)
    return build, dict(inspect.signature(build).parameters)


def _make(name: str, options: dict[str, Any]) -> Any:
    build, parameters = _signature(name)
    for option in options:
        if option not in parameters:
            raise ValueError(f"{name} has the options {_listed(name) or 'none at all'}; got {option!r}")
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(f"{name} must be given {option}, as in {name}:{option}=...; its options: {_listed(name)}")
    for option, value in options.items():
        options[option] = _typed(f"{name}'s {option}", value, str(parameters[option].annotation))
    try:
        return build(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _typed(what: str, value: Any, wanted: str) -> Any:
    """``value``, if an argument with the annotation ``wanted`` may have it."""
    if "Sequence[str]" in wanted and isinstance(value, str):
        return value.split("+")
    number = ("int" in wanted or "float" in wanted) and "str" not in wanted
    if number and value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"{what} must be a number; got {_shown(value)!r}")
    if number and isinstance(value, float) and "float" not in wanted:
        raise ValueError(f"{what} must be a whole number; got {value}")
    if value is None and number and "None" not in wanted:
        raise ValueError(f"{what} must be a number; got 'none'")
    return value


def _listed(name: str) -> str:
    shown = []
    for option, parameter in _signature(name)[1].items():
        value = parameter.default
        plain = value is None or isinstance(value, bool | int | float | str)
        shown.append(option if value is parameter.empty or not plain else f"{option}={_shown(value)}")
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
