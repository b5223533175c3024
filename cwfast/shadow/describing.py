"""What things are, in JSON without addresses: the same in every process, and another after they were changed."""

import functools
import hashlib
import json
import re
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def describe(thing: object, _above: tuple[int, ...] = ()) -> Any:
    """Names, parameters, and hashes of code and of tensors.

    Functions and classes are told by module, name and code, functions also by what they captured; objects by their
    attributes and their class. Of the code that a function calls, nothing is seen: a change there goes unnoticed.
    """
    if id(thing) in _above:
        return "itself"
    inner = functools.partial(describe, _above=(*_above, id(thing)))
    if isinstance(thing, dict):
        return {str(key): inner(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [inner(value) for value in thing]
    if isinstance(thing, set | frozenset):
        return sorted((inner(value) for value in thing), key=str)
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, np.ndarray) and not thing.dtype.hasobject:
        return f"array {thing.dtype} {thing.shape} {_short(thing.tobytes())}"
    if isinstance(thing, Tensor) and thing.layout == torch.strided:
        content = thing.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"tensor {str(thing.dtype).removeprefix('torch.')} {tuple(thing.shape)} {_short(content)}"
    if isinstance(thing, types.FunctionType):
        cells = [_content(cell) for cell in thing.__closure__ or ()]
        more = [thing.__defaults__, thing.__kwdefaults__, cells]
        return f"{_name(thing)} {digest([_code(thing.__code__), inner(more)])}"
    if isinstance(thing, types.MethodType):
        return {_name(thing.__func__): [inner(thing.__func__), inner(thing.__self__)]}
    if isinstance(thing, functools.partial):
        return {"partial": [inner(thing.func), inner(thing.args), inner(thing.keywords)]}
    if isinstance(thing, type):
        return f"{_name(thing)} {_class(thing)}"
    if isinstance(thing, nn.Module):
        settings = [[name, _class(type(one)), inner(_public(one))] for name, one in thing.named_modules()]
        return {"module": _text(thing), "sha256": digest([settings, inner(thing.state_dict())])}
    if hasattr(thing, "__dict__") and not isinstance(thing, types.ModuleType):
        return {type(thing).__qualname__: {**inner(vars(thing)), "code": _class(type(thing))}}
    return _text(thing)


def digest(described: Any) -> str:
    """16 digits that tell one description from another."""
    return _short(json.dumps(described, sort_keys=True).encode())


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _name(thing: Any) -> str:
    module = "__main__" if thing.__module__ == "__mp_main__" else thing.__module__  # a script in a spawned process
    return f"{module}:{thing.__qualname__}"


def _text(thing: object) -> str:
    return " ".join(re.sub(" at 0x[0-9a-f]+", "", repr(thing)).split())


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None


def _public(module: nn.Module) -> dict[str, object]:
    return {name: value for name, value in vars(module).items() if name[0] != "_" and name != "training"}


def _code(code: types.CodeType) -> list[Any]:
    """What it does: no file, no line numbers."""
    return [code.co_code.hex(), list(code.co_names), [_constant(value) for value in code.co_consts]]


def _constant(value: object) -> Any:
    if isinstance(value, types.CodeType):
        return _code(value)
    if isinstance(value, tuple):
        return [_constant(one) for one in value]
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)  # a set has no order


def _class(kind: type) -> str:
    """The code of its methods, its own and inherited ones but for those of Python and torch."""
    found = []
    for one in kind.__mro__:
        if one.__module__.partition(".")[0] in ("builtins", "torch", "typing", "abc", "enum"):
            continue
        for name, value in sorted(vars(one).items()):
            if isinstance(value, staticmethod | classmethod):
                value = value.__func__
            if isinstance(value, property):
                value = value.fget
            if isinstance(value, types.FunctionType):
                found.append([name, _code(value.__code__)])
    return digest(found)
