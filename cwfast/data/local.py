"""Datasets from a local path, in the formats they are published in. No pickle is read, nothing is downloaded."""

import gzip
import itertools
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch

from cwfast.checkpoint.arrays import read_npz
from cwfast.data.splitting import Samples
from cwfast.errors import CheckpointError

Finder = Callable[[str], IO[bytes] | None]
Table = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]
_PIXELS = 3 * 32 * 32
_LINES = 4096  # parsed at a time
_BATCH = 50_000  # records of CIFAR's largest file; what unpacks to more is none of these
_SAMPLES = 250_000  # more than Purchase-100 and Texas-100 have
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def read_cifar10(path: Path) -> Samples:
    """``[60000, 3, 32, 32]``, 10 classes, scaled to 0 .. 1; the published test set is the test set.

    Args:
        path: the published binary version: ``cifar-10-binary.tar.gz``, or the folder it unpacks to, or the one above.
    """
    training = [f"data_batch_{i}.bin" for i in range(1, 6)]
    return _cifar(path, "CIFAR-10", "cifar-10-batches-bin", training, "test_batch.bin", (10,))


def read_cifar100(path: Path) -> Samples:
    """``[60000, 3, 32, 32]``, 100 fine classes, scaled to 0 .. 1; the published test set is the test set.

    Args:
        path: the published binary version: ``cifar-100-binary.tar.gz``, or the folder it unpacks to, or the one above.
    """
    return _cifar(path, "CIFAR-100", "cifar-100-binary", ["train.bin"], "test.bin", (20, 100))


def read_cinic10(path: Path) -> Samples:
    """``[270000, 3, 32, 32]``, 10 classes, scaled to 0 .. 1; the published test part is the test set.

    The whole takes 3.3 GB of memory as float32, and 0.8 GB more while it is made.

    Args:
        path: the folder that ``CINIC-10.tar.gz`` unpacks to: train, valid and test, a folder per class in each.

    Raises:
        ImportError: Pillow, which reads the images, is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError(
            "the images of CINIC-10 are read by Pillow, which must be installed: pip install pillow"
        ) from error
    parts: list[npt.NDArray[np.uint8]] = []
    labels: list[int] = []
    training = 0
    for part, (label, name) in itertools.product(("train", "valid", "test"), enumerate(CIFAR10)):
        files = sorted((path / part / name).glob("*.png"))
        if not files:
            raise FileNotFoundError(f"CINIC-10 must have PNG files in {part}/{name}; there are none in {path}")
        images = np.empty((len(files), 32, 32, 3), np.uint8)
        for slot, file in zip(images, files, strict=True):
            try:
                with Image.open(file) as image:
                    pixels = np.asarray(image.convert("RGB"))
            except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
                raise CheckpointError(f"{file} must be a PNG image; {error}") from error
            if pixels.shape != slot.shape:
                raise CheckpointError(f"{file} must have 32 x 32 pixels; got {pixels.shape[1]} x {pixels.shape[0]}")
            slot[:] = pixels
        parts.append(images)
        labels += [label] * len(files)
        training += len(files) if part != "test" else 0
    inputs = _scaled(np.concatenate(parts).transpose(0, 3, 1, 2))
    test = torch.arange(training, len(labels))
    return Samples(inputs, torch.tensor(labels), f"CINIC-10 from {path.name}, scaled to 0 .. 1", test)


def read_purchase100(path: Path) -> Samples:
    """``[197324, 600]`` of 0 and 1, 100 classes: what customers bought, clustered.

    Args:
        path: ``dataset_purchase.tgz`` as published with Shokri et al. 2017, or the file ``dataset_purchase`` in it
            (lines of a label 1 .. 100 and 600 features), or its folder; or an npz file of ``features`` and ``labels``
            (one-hot or numbers).
    """
    return _binary_table(path, "Purchase-100", 600, ("dataset_purchase", "purchase100.csv"))


def read_texas100(path: Path) -> Samples:
    """``[67330, 6169]`` of 0 and 1, 100 classes: hospital stays and their main procedure. 1.7 GB of memory as float32.

    Args:
        path: ``dataset_texas.tgz`` as published with Shokri et al. 2017, or the folder it unpacks to
            (``texas/100/feats`` and ``labels``) or ``100`` in it; or a file of lines of a label 1 .. 100 and 6,169
            features; or an npz file of ``features`` and ``labels`` (one-hot or numbers).
    """
    return _binary_table(path, "Texas-100", 6169, ("texas100", "texas100.csv"), apart=True)


def _cifar(path: Path, title: str, folder: str, training: Sequence[str], test: str, labels: tuple[int, ...]) -> Samples:
    """Records of one byte per label (the last is the class) and 3,072 pixels."""
    found, size = [], len(labels) + _PIXELS
    with _files(path, title) as find:
        for name in [*training, test]:
            file = find(name) or find(f"{folder}/{name}")
            if file is None:
                raise FileNotFoundError(
                    f"{title} must be in its binary version (the files of {folder}; the Python version is made of "
                    f"pickles, which can run code, and is not read); there is no {name} in {path}"
                )
            content = np.frombuffer(file.read(_BATCH * size + 1), np.uint8)
            if content.size > _BATCH * size:
                raise CheckpointError(f"{name} must hold at most {_BATCH} records of {size} bytes; it holds more")
            if not content.size or content.size % size:
                raise CheckpointError(f"{name} must hold records of {size} bytes; it has {content.size} bytes")
            rows = content.reshape(-1, size)
            for column, classes in enumerate(labels):
                if rows[:, column].max() >= classes:
                    raise CheckpointError(f"{name} must hold labels below {classes}; got {rows[:, column].max()}")
            found.append(rows)
    rows = np.concatenate(found)
    ids = torch.arange(len(rows) - len(found[-1]), len(rows))
    targets = torch.from_numpy(rows[:, len(labels) - 1].astype(np.int64))
    images = _scaled(rows[:, len(labels) :].reshape(-1, 3, 32, 32))
    return Samples(images, targets, f"{title} from {path.name}, scaled to 0 .. 1", ids)


def _scaled(pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).float().div_(255)


def _binary_table(path: Path, title: str, features: int, names: Sequence[str], *, apart: bool = False) -> Samples:
    """Features and labels from an npz file, from one text file, or (``apart``) from the text files feats and labels."""
    if path.suffix == ".npz" and path.is_file():
        values, labels = _npz(path, features)
    elif path.is_file() and not tarfile.is_tarfile(path):
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            values, labels = _text(path.name, file, features)
    else:
        with _files(path, title) as find:
            values, labels = _found(path, find, title, features, names, apart)
    if not len(labels) or len(labels) != len(values):
        raise CheckpointError(f"{title} must have a label for each sample; got {len(labels)} for {len(values)}")
    first = int(labels.min() > 0)  # published from 1 on; some number them from 0 on
    if labels.min() < 0 or labels.max() - first > 99:
        raise CheckpointError(f"{title} must have labels 1 .. 100 or 0 .. 99; got {labels.min()} .. {labels.max()}")
    note = f"{title} (Shokri et al. 2017) from {path.name}, as published"
    return Samples(torch.from_numpy(values).float(), torch.from_numpy(labels - first), note)


def _found(path: Path, find: Finder, title: str, features: int, names: Sequence[str], apart: bool) -> Table:
    for folder in ("", "100/", "texas/100/") if apart else ("",):
        for name in names:
            if file := find(folder + name):
                return _text(name, file, features)
        first, second = (find(folder + name) if apart else None for name in ("feats", "labels"))
        if first and second:
            return _text("feats", first, features, labelled=False)[0], _text("labels", second, 0)[1]
    wanted = ", ".join([*names, *(["feats and labels"] if apart else [])])
    raise FileNotFoundError(f"{title} must be one of the files {wanted}, or an npz file; there is none in {path}")


def _text(name: str, file: IO[bytes] | gzip.GzipFile, features: int, *, labelled: bool = True) -> Table:
    """Lines of a label (where ``labelled``) and this many features, each 0 or 1."""
    parts = ["a label"] * labelled + [f"{features} features, each 0 or 1"] * (features > 0)
    what, values, labels = f"{name} must hold lines of {' and '.join(parts)}", [], []
    try:
        while lines := _lines(file, 40 * (features + labelled)):
            rows = np.loadtxt(lines, dtype=np.uint8, delimiter=",", ndmin=2)  # ten times faster than floats
            if rows.shape[1] != features + labelled:
                raise CheckpointError(f"{what}; got {rows.shape[1]} columns")
            values.append(_flags(rows[:, labelled:], what))
            labels.append(rows[:, 0])
            if sum(map(len, labels)) > _SAMPLES:
                raise CheckpointError(f"{what}, {_SAMPLES} lines at most; it holds more")
    except (ValueError, EOFError, OSError, zlib.error) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{what}; {error}") from error
    if not labels:
        raise CheckpointError(f"{what}; it is empty")
    return np.concatenate(values), _whole(np.concatenate(labels), what)


def _lines(file: IO[bytes] | gzip.GzipFile, longest: int) -> list[bytes]:
    """The next lines, none of them longer than that."""
    found: list[bytes] = []
    while len(found) < _LINES and (line := file.readline(longest + 1)):
        if len(line) > longest:
            raise ValueError(f"it has a line of more than {longest} bytes")
        found.append(line)
    return found


def _npz(path: Path, features: int) -> Table:
    what = f"{path} must hold the arrays features [N, {features}] of 0 and 1, and labels [N] or one-hot [N, 100]"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            values = read_npz(arrays, "features", 8 * features * _SAMPLES)
            labels = read_npz(arrays, "labels", 8 * 100 * _SAMPLES)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{what}; {' '.join(str(error).split())}") from error
    hot = labels.ndim == 2 and labels.shape[1] == 100
    if values.ndim != 2 or values.shape[1] != features or not (hot or labels.ndim == 1):
        raise CheckpointError(f"{what}; got {values.shape} and {labels.shape}")
    if hot and not ((labels == 1).sum(axis=1) == 1).all():
        raise CheckpointError(f"{what}; got rows of labels without exactly one 1")
    # Of one-hot labels the numbers start from 0: told apart from numbers that start from 1 by adding it here.
    return _flags(values, what), labels.argmax(axis=1) + 1 if hot else _whole(labels, what)


def _flags(values: npt.NDArray[np.generic], what: str) -> npt.NDArray[np.uint8]:
    wrong = int(((values != 0) & (values != 1)).sum())
    if wrong:
        raise CheckpointError(f"{what}; got {wrong} other values")
    return values.astype(np.uint8)


def _whole(values: npt.NDArray[np.generic], what: str) -> npt.NDArray[np.int64]:
    if values.dtype.kind not in "iuf" or not (np.mod(values, 1) == 0).all():
        raise CheckpointError(f"{what}; got labels that are no whole numbers")
    return values.astype(np.int64)


@contextmanager
def _files(path: Path, title: str) -> Iterator[Finder]:
    """Files of a folder or of a tar archive, by their path in it."""
    if path.is_dir():
        with ExitStack() as opened:
            yield lambda name: opened.enter_context((path / name).open("rb")) if (path / name).is_file() else None
        return
    if not path.is_file():
        raise FileNotFoundError(f"{title} is not downloaded and must lie at path; there is nothing at {path}")
    try:
        with tarfile.open(path) as archive:
            members = {member.name.removeprefix("./"): member for member in archive if member.isfile()}
            yield lambda name: archive.extractfile(members[name]) if name in members else None
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CheckpointError(f"{path} must be a folder or a tar archive; {error}") from error
