"""torchvision's data sets: fetched from a server of this machine, with small made archives."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torchvision
from file_server import FileServer

from cnn.cache import Bytes
from cnn.data import load
from cnn.images import resize

NUM_TRAIN, NUM_TEST = 20, 6
LABELS = np.arange(NUM_TRAIN + NUM_TEST) % 2


def noise(*shape: int) -> Bytes:
    shape = (NUM_TRAIN + NUM_TEST, *shape)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


Patch = Callable[[str, object], None]


def make_mnist(folder: Path, url: str, patch: Patch) -> Bytes:
    """Write the four files of MNIST, patch the class, and return the images."""
    images = noise(28, 28)
    resources = []
    for prefix, part in (("train", slice(NUM_TRAIN)), ("t10k", slice(NUM_TRAIN, None))):
        for what, values, magic in (
            ("images-idx3", images[part], 0x803),
            ("labels-idx1", LABELS[part].astype(np.uint8), 0x801),
        ):
            file = folder / f"{prefix}-{what}-ubyte.gz"
            header = struct.pack(f">{1 + values.ndim}I", magic, *values.shape)
            file.write_bytes(gzip.compress(header + values.tobytes()))
            resources.append((file.name, md5(file)))
    patch("resources", resources)
    patch("mirrors", [f"{url}no-such-folder/", url])
    return images


def make_svhn(folder: Path, url: str, patch: Patch) -> Bytes:
    images = noise(32, 32, 3)
    split_list = {}
    for name, part in (("train", slice(NUM_TRAIN)), ("test", slice(NUM_TRAIN, None))):
        file = folder / f"{name}_32x32.mat"
        labels = np.where(LABELS[part] == 0, 10, LABELS[part])[:, None]  # the digit 0 is a 10
        scipy.io.savemat(file, {"X": images[part].transpose(1, 2, 3, 0), "y": labels})
        split_list[name] = [f"{url}{file.name}", file.name, md5(file)]
    patch("split_list", split_list)
    return images


def pack(folder: Path, base: str, archive: str, url: str, patch: Patch) -> None:
    with tarfile.open(folder / archive, "w:gz") as tar:
        tar.add(folder / base, base)
    shutil.rmtree(folder / base)
    patch("url", f"{url}{archive}")
    patch("tgz_md5", md5(folder / archive))


def make_cifar100(folder: Path, url: str, patch: Patch) -> Bytes:
    base = folder / "cifar-100-python"
    base.mkdir()
    images = noise(32, 32, 3)
    flat = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
    for name, part in (("train", slice(NUM_TRAIN)), ("test", slice(NUM_TRAIN, None))):
        content = {"data": flat[part], "fine_labels": LABELS[part].tolist()}
        (base / name).write_bytes(pickle.dumps(content, protocol=2))
        patch(f"{name}_list", [[name, md5(base / name)]])
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "bear"]}, protocol=2))
    patch("meta", {"filename": "meta", "key": "fine_label_names", "md5": md5(base / "meta")})
    pack(folder, base.name, "cifar-100-python.tar.gz", url, patch)
    return images


def make_stl10(folder: Path, url: str, patch: Patch) -> Bytes:
    base = folder / "stl10_binary"
    base.mkdir()
    images = noise(96, 96, 3)
    for name, part in (("train", slice(NUM_TRAIN)), ("test", slice(NUM_TRAIN, None))):
        images[part].transpose(0, 3, 2, 1).tofile(base / f"{name}_X.bin")
        (LABELS[part] + 1).astype(np.uint8).tofile(base / f"{name}_y.bin")
        files = [f"{name}_X.bin", f"{name}_y.bin"]
        patch(f"{name}_list", [[file, md5(base / file)] for file in files])
    (base / "class_names.txt").write_text("airplane\nbird\n")
    pack(folder, base.name, "stl10_binary.tar.gz", url, patch)
    return images


SETS: dict[str, tuple[str, Callable[[Path, str, Patch], Bytes], tuple[str, ...]]] = {
    "mnist": ("MNIST", make_mnist, tuple("0123456789")),
    "fashion_mnist": ("FashionMNIST", make_mnist, ("T-shirt/top", "Trouser")),
    "kmnist": ("KMNIST", make_mnist, ("o", "ki")),
    "svhn": ("SVHN", make_svhn, tuple("0123456789")),
    "cifar100": ("CIFAR100", make_cifar100, ("apple", "bear")),
    "stl10": ("STL10", make_stl10, ("airplane", "bird")),
}


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that serves a data set with a given name, and returns its images."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    server = FileServer(folder)

    def make(name: str) -> Bytes:
        kind, make, _ = SETS[name]
        cls = getattr(torchvision.datasets, kind)
        return make(folder, server.url, lambda key, value: monkeypatch.setattr(cls, key, value))

    make.server, make.folder = server, folder  # type: ignore[attr-defined]
    yield make
    server.close()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


def refusal(name: str, data_dir: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the callers look at the message
        load(name, data_dir=data_dir, seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", SETS)
def test_a_data_set_is_downloaded_and_read_and_its_test_split_is_torchvisions(
    name: str, serve: Any, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = serve(name)
    dataset = load(name, data_dir=data_dir, seed=0)
    classes = SETS[name][2]
    assert (dataset.name, dataset.classes[: len(classes)]) == (name, classes)
    assert dataset.source == f"torchvision.datasets.{SETS[name][0]}"
    assert dataset.given_test
    assert dataset.test.labels.tolist() == LABELS[NUM_TRAIN:].tolist()
    np.testing.assert_array_equal(dataset.train.all_images, resize(images))
    np.testing.assert_array_equal(dataset.train.all_labels, LABELS)
    assert capsys.readouterr().out == ""
    assert not list(data_dir.rglob(f".{name}-*"))


@pytest.mark.parametrize("name", ["mnist", "svhn", "stl10"])
def test_a_data_set_is_downloaded_once_for_all_image_sizes(
    name: str, serve: Any, data_dir: Path
) -> None:
    images = serve(name)
    load(name, data_dir=data_dir, seed=0)
    before = len(serve.server.fetched)
    larger = load(name, data_dir=data_dir, seed=0, image_size=40)
    np.testing.assert_array_equal(larger.train.all_images, resize(images, 40))
    assert len(serve.server.fetched) == before > 0


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("fashion_mnist", "FashionMNIST/raw/t10k-labels-idx1-ubyte.gz"),
        ("svhn", "test_32x32.mat"),
        ("cifar100", "cifar-100-python.tar.gz"),
    ],
)
def test_only_a_damaged_archive_is_downloaded_again(
    name: str, file: str, serve: Any, data_dir: Path
) -> None:
    serve(name)
    digest = load(name, data_dir=data_dir, seed=0).digest
    serve.server.fetched.clear()
    shutil.rmtree(data_dir / "cache")
    (data_dir / file).write_bytes(b"damaged")
    assert load(name, data_dir=data_dir, seed=0).digest == digest
    assert {Path(path).name for path in serve.server.fetched} == {Path(file).name}


def unpack(archive: Path) -> Path:
    file = archive.with_suffix("")
    file.write_bytes(gzip.decompress(archive.read_bytes()))
    return file


def test_files_of_mnist_that_others_packed_again_can_be_used_unpacked(
    serve: Any, data_dir: Path
) -> None:
    serve("mnist")
    digest = load("mnist", data_dir=data_dir, seed=0).digest
    shutil.rmtree(data_dir / "cache")
    serve.server.fetched.clear()
    for archive in (data_dir / "MNIST/raw").iterdir():
        unpack(archive)
        archive.write_bytes(b"packed again")
    assert load("mnist", data_dir=data_dir, seed=0).digest == digest
    assert not serve.server.fetched


def test_intact_archives_go_before_unpacked_files(serve: Any, data_dir: Path) -> None:
    serve("mnist")
    digest = load("mnist", data_dir=data_dir, seed=0).digest
    shutil.rmtree(data_dir / "cache")
    for archive in (data_dir / "MNIST/raw").iterdir():
        archive.with_suffix("").write_bytes(b"damaged")
    assert load("mnist", data_dir=data_dir, seed=0).digest == digest


@pytest.mark.parametrize("part", ["images-idx3", "labels-idx1"])
def test_damaged_unpacked_files_are_refused(part: str, serve: Any, data_dir: Path) -> None:
    serve("mnist")
    load("mnist", data_dir=data_dir, seed=0)
    shutil.rmtree(data_dir / "cache")
    for archive in (data_dir / "MNIST/raw").iterdir():
        file = unpack(archive)
        archive.unlink()
        if part in file.name:
            file.write_bytes(file.read_bytes()[:-3])
    assert refusal("mnist", data_dir) == (
        f"the unpacked files of MNIST in {str(data_dir / 'MNIST/raw')!r} are damaged: remove them"
    )


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "mnist",
            "put an intact train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, "
            "t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz from {url}no-such-folder/ into "
            "'{data}/MNIST/raw', or use --dataset digits",
        ),
        ("svhn", "put an intact train_32x32.mat, test_32x32.mat from {url} into '{data}', or use"),
        ("stl10", "put an intact stl10_binary.tar.gz from {url}stl10_binary.tar.gz into '{data}'"),
    ],
)
def test_without_network_the_refusal_says_what_to_put_where(
    name: str, line: str, serve: Any, data_dir: Path
) -> None:
    serve(name)
    for file in serve.folder.iterdir():
        file.unlink()
    message = refusal(name, data_dir)
    assert "can't be downloaded (HTTP Error 404: File not found): put" in message
    assert line.format(url=serve.server.url, data=data_dir) in message
    assert not list(data_dir.rglob("*ubyte*"))


def test_a_damaged_archive_without_network_is_named(serve: Any, data_dir: Path) -> None:
    serve("kmnist")
    load("kmnist", data_dir=data_dir, seed=0)
    shutil.rmtree(data_dir / "cache")
    file = data_dir / "KMNIST/raw/t10k-images-idx3-ubyte.gz"
    file.write_bytes(b"damaged")
    for served in serve.folder.iterdir():
        served.write_bytes(b"another file")
    message = refusal("kmnist", data_dir)
    assert message.startswith(
        f"{str(file)!r} is damaged, and Kuzushiji-MNIST can't be downloaded (the server sent "
        f"another file): put an intact {file.name} from "
    )
    assert file.read_bytes() == b"damaged"
