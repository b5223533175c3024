"""What a report says of where it was made."""

import platform
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch

from cwfast import _backends


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """Threads and instruction set, which results may depend on in the last bits."""
    native = _backends.extension()
    isa = "none (no compiled extension)" if isinstance(native, str) else native.isa()
    return f"{torch.get_num_threads()} threads, instruction set {isa}"


def backends(*ops: str) -> dict[str, str]:
    """What each op of ``cwfast.ops`` uses for tensors on the CPU."""
    cpu = torch.device("cpu")
    return {op: _backends.resolve("auto", cpu, import_module(f"cwfast.ops.{op}").BACKENDS) for op in ops}
