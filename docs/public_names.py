"""What the API reference must hold, and how docstrings become its pages; ``conf.py`` hands this to Sphinx."""

import inspect
import re
from collections.abc import Collection
from functools import cache
from importlib import import_module

import numpy.typing
from sphinx.util import logging
from sphinx.util.typing import stringify_annotation

import cwfast

ROOMS = (  # every module whose names users import
    "cwfast",
    *(f"cwfast.{room}" for room in cwfast._ROOMS),
    "cwfast.data.bundled",
    "cwfast.data.local",
    "cwfast.defense.analysis",
    "cwfast.defense.experiments",
    "cwfast.examples",
    "cwfast.integrations.prune",
    "cwfast.llm.attacks",
    "cwfast.llm.shadows",
    "cwfast.llm.smollm",
    "cwfast.mia.attacks",
    "cwfast.mia.metrics",
    "cwfast.networks",
)
_LITERAL = re.compile(r"(``.*?``|`[^`]*`)")
_ARRAY_LIKE = stringify_annotation(numpy.typing.ArrayLike, "smart")  # a union of half a dozen private names
_NDARRAY = re.compile(r"~numpy\.ndarray\[tuple\[~typing\.Any, \.\.\.\], ~numpy\.dtype\[(.*?)\]\]")
_SOURCE = re.compile(r"(\s*)Source: (.+)")


@cache
def public_names() -> dict[str, str]:
    """``{full public name: name of the definition}`` of all functions and classes of all rooms."""
    found = {}
    for room in ROOMS:
        module = import_module(room)
        for name in getattr(module, "__all__", None) or vars(module):
            value = getattr(module, name)
            here = hasattr(module, "__all__") or getattr(value, "__module__", None) == room
            if here and not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
                found[f"{room}.{name}"] = f"{value.__module__}.{value.__qualname__}"
    return found


def missing(documented: Collection[str]) -> list[str]:
    """The public names that the reference lacks: neither they nor another public name of the same thing are in it."""
    names = public_names()
    homes = {names[name] for name in documented if name in names}
    return [name for name, home in names.items() if name not in documented and home not in homes]


def complete(app, env) -> None:
    """Sphinx's env-check-consistency: a public name without an entry is a warning, and so an error of the build."""
    for name in missing(env.domains["py"].data["objects"]):
        logging.getLogger(__name__).warning("%s is public and on no page of docs/api", name)


def readable(app, what, name, obj, options, lines) -> None:
    """Sphinx's autodoc-process-docstring: plain ``|`` and ``*`` stay as they are, and ``Source: ...`` is a section."""
    text: list[str] = []
    code = None  # indentation of the line that began a literal block
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if code is not None and line and indent <= code:
            code = None
        if code is not None:
            text.append(line)
        elif found := _SOURCE.fullmatch(line):
            text += [f"{found[1]}Source:", f"{found[1]}    {_plain(found[2])}"]
        else:
            text.append(_plain(line))
            code = indent if line.endswith("::") else None
    lines[:] = text


def _plain(line: str) -> str:
    parts = _LITERAL.split(line)
    return "".join(part if part.startswith("`") else re.sub(r"([|*])", r"\\\1", part) for part in parts)


def signature(app, what, name, obj, options, text, result) -> tuple[str | None, str | None]:
    """Sphinx's autodoc-process-signature: NumPy's array types by the names that the code gives them."""

    def short(types: str | None) -> str | None:
        return types and _NDARRAY.sub(
            r"~numpy.typing.NDArray[\1]", types.replace(_ARRAY_LIKE, "~numpy.typing.ArrayLike")
        )

    # A default that is no expression would leave the whole signature unread.
    return short(text and text.replace("<factory>", "...")), short(result)


def skipped(app, what, name, obj, skip, options) -> bool | None:
    """Sphinx's autodoc-skip-member: fields of named tuples, which their signature shows."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def resolved(app, env, node, contnode):
    """Sphinx's missing-reference: a type by the name of its definition leads to its public name."""
    target = node.get("reftarget", "")
    public = next((name for name, home in public_names().items() if home == target), None)
    if public is None:
        return None
    domain = env.domains["py"]
    return domain.resolve_xref(env, node.get("refdoc"), app.builder, "obj", public, node, contnode)
