"""A named data set as uint8 tensors, split by a seed into training, validation and test images.

Images are decoded once and kept in `data_dir/cache/<digest>`, under the digest of their content.
After that they are mapped into memory, so that a start takes no decoding and all processes of a
machine share one copy. What a caller or the data did wrong is a ValueError of one line.
"""

import hashlib
import http.client
import importlib.metadata
import json
import os
import socket
import sys
import tempfile
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnn.images import IMAGE_SIZE, decode, find_images, resize

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]
Scalar = TypeVar("Scalar", np.uint8, np.int64)

# One more whenever the same source would give other pixels than before.
_CACHE_VERSION = 2
_FILES_PER_TASK = 32
_NETWORK_TIMEOUT_SECONDS = 20.0
_NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Some rows of a pool of images."""

    pool: Tensor  # (M, 32, 32, 3) uint8; on the CPU memory-mapped: shared between processes
    pool_labels: Tensor  # (M,) int64
    rows: Tensor  # (N,) int64, which of the pool belong to the split

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (B, 32, 32, 3) and labels (B,) of these positions (B,) of the split."""
        rows = self.rows[indices]
        return self.pool.index_select(0, rows), self.pool_labels.index_select(0, rows)

    @property
    def images(self) -> Tensor:
        """All images of the split (N, 32, 32, 3), copied."""
        return self.pool.index_select(0, self.rows)

    @property
    def labels(self) -> Tensor:
        """All labels of the split (N,), copied."""
        return self.pool_labels.index_select(0, self.rows)

    def to(self, device: torch.device | str) -> "Split":
        """Return the split with its own images alone on `device`; on the CPU, the split itself."""
        if torch.device(device).type == "cpu":
            return self
        return Split(
            pool=self.images.to(device),
            pool_labels=self.labels.to(device),
            rows=torch.arange(len(self), device=device),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A data set, split: train for learning, validation for choosing, test for the winners."""

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    digest: str  # 32 hex digits of the SHA-256 of pixels, labels, class names, given test split
    source: str  # a path or a function, for people
    given_test: bool = False  # the test split is the same for every seed


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """All images of a data set, not split yet; those of a given test split come last."""

    images: Bytes  # (M, 32, 32, 3)
    labels: Integers  # (M,)
    classes: tuple[str, ...]
    given_test: int  # how many of the last images are the test split; 0: the seed chooses it


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where images come from: what changes whenever they may have, and how to read them."""

    name: str
    address: str
    fingerprint: Callable[[], list[str]]
    read: Callable[[], Pool]


def is_known(name: str) -> bool:
    """Return whether this is the name of a data set, rather than a folder's path."""
    return name in DATASETS


def load(name: str, *, data_dir: Path, seed: int) -> Dataset:
    """Return a data set by its name (see DATASETS) or by the path of a folder of images.

    A folder holds `train/<class>/*`, with `test/<class>/*` if there is a given test split, or
    just `<class>/*`. Decoded images are kept in `data_dir`, where CIFAR-10 is downloaded to.

    A given test split is used as it is, whatever the seed, and the validation split is 10 % of the
    rest; without one, 20 % each go into validation and test. Both are drawn class by class.
    Raises ValueError.
    """
    _check_seed(seed)
    source = _find_source(name, data_dir)
    cache = data_dir / "cache"
    try:
        key = _key(source)
        digest = _look_up(cache, key)
        pool = None if digest is None else _open(cache / digest)
        if digest is None or pool is None:
            digest, pool = _fill(cache, key, source)
    except OSError as error:
        raise ValueError(f"can't use the data folder {str(data_dir)!r}: {error}") from error
    return split_pool(pool, digest, seed, name=source.name, source=source.address)


def open_cached(digest: str, data_dir: Path, seed: int) -> Dataset:
    """Return what `load` returned, without a look at where it came from: for worker processes.

    Name and source are those under which these very images were read first.
    """
    _check_seed(seed)
    folder = data_dir / "cache" / digest
    try:
        pool = _open(folder)
    except OSError as error:
        raise ValueError(f"can't use the data folder {str(data_dir)!r}: {error}") from error
    if pool is None:
        raise ValueError(f"no undamaged data set with the digest {digest!r} in {str(data_dir)!r}")
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    return split_pool(pool, digest, seed, name=meta["name"], source=meta["source"])


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"the seed must be 0 or more: {seed}")


# Splitting


def split_pool(pool: Pool, digest: str, seed: int, *, name: str, source: str) -> Dataset:
    """Return a data set whose images are in memory already, split with a seed."""
    images, labels = torch.from_numpy(pool.images), torch.from_numpy(pool.labels)
    train, validation, test = (
        Split(pool=images, pool_labels=labels, rows=torch.from_numpy(rows))
        for rows in _split_rows(pool.labels, given_test=pool.given_test, seed=seed)
    )
    return Dataset(
        name=name,
        classes=pool.classes,
        train=train,
        validation=validation,
        test=test,
        digest=digest,
        source=source,
        given_test=pool.given_test > 0,
    )


def _split_rows(labels: Integers, *, given_test: int, seed: int) -> list[Integers]:
    """Return the rows of train, validation and test, each in random order but a given test."""
    generator = np.random.Generator(np.random.PCG64(seed))
    free = labels[: len(labels) - given_test]
    drawn: list[list[Integers]] = [[], [], []]
    for label in np.unique(free):
        rows = generator.permutation(np.flatnonzero(free == label))
        validation = _share(len(rows), percent=10 if given_test else 20)
        test = 0 if given_test else _share(len(rows), percent=20)
        train = len(rows) - validation - test
        for split, part in zip(drawn, np.split(rows, [train, train + validation]), strict=True):
            split.append(part)
    # Mixed, so that the first rows of a split are not all of one class.
    splits = [generator.permutation(np.concatenate(parts)) for parts in drawn]
    if given_test:
        splits[2] = np.arange(len(free), len(labels))
    return splits


def _share(count: int, *, percent: int) -> int:
    return max(1, (count * percent + 50) // 100)


# The cache


def _key(source: Source) -> str:
    import PIL  # training from memory does without

    # Pillow's version, because prediction will decode with the one that is installed.
    parts = [f"{_CACHE_VERSION}", PIL.__version__, source.name, *source.fingerprint()]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _look_up(cache: Path, key: str) -> str | None:
    try:
        return str(json.loads(_index(cache, key).read_text("utf-8"))["digest"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None  # never read, or the entry is damaged: reading the images again mends it


def _index(cache: Path, key: str) -> Path:
    return cache / "index" / f"{key}.json"


def _open(folder: Path) -> Pool | None:
    """Map what is kept in a folder of the cache into memory; None if it is not whole."""
    try:
        return _map_pool(folder)
    except (FileNotFoundError, NotADirectoryError, ValueError, EOFError, KeyError, TypeError):
        return None


def _map_pool(folder: Path) -> Pool:
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    shape = (meta["images"], IMAGE_SIZE, IMAGE_SIZE, 3)
    return Pool(
        images=_map(folder / "images.npy", np.uint8, shape),
        labels=_map(folder / "labels.npy", np.int64, shape[:1]),
        classes=tuple(meta["classes"]),
        given_test=meta["given_test"],
    )


def _map(file: Path, dtype: type[Scalar], shape: tuple[int, ...]) -> npt.NDArray[Scalar]:
    # Copy on write: shared as long as nobody writes, and torch warns of read-only memory.
    array = np.lib.format.open_memmap(file, mode="c")
    size = array.offset + array.nbytes
    if array.dtype != dtype or array.shape != shape or file.stat().st_size != size:
        raise ValueError(f"{str(file)!r} is not what was written")
    return array


def _fill(cache: Path, key: str, source: Source) -> tuple[str, Pool]:
    """Read a source into the cache. Others may be doing the same: what is there is whole."""
    (cache / "index").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".writing-") as scratch:
        pool = source.read()
        digest = _digest(pool)
        new = Path(scratch) / digest
        _write_pool(new, pool, source)
        pool = _publish(new, cache / digest)
        entry = Path(scratch) / "index.json"
        _write_json(entry, {"digest": digest, "source": source.address})
        entry.replace(_index(cache, key))
    return digest, pool


def _digest(pool: Pool) -> str:
    header = json.dumps([pool.classes, pool.images.shape, pool.given_test])
    digest = hashlib.sha256(header.encode())
    digest.update(pool.images.data)
    digest.update(pool.labels.astype("<i8").data)
    return digest.hexdigest()[:32]


def _write_pool(folder: Path, pool: Pool, source: Source) -> None:
    folder.mkdir()
    _write(folder / "images.npy", lambda stream: np.save(stream, pool.images))
    _write(folder / "labels.npy", lambda stream: np.save(stream, pool.labels))
    meta = {
        "name": source.name,
        "source": source.address,
        "classes": pool.classes,
        "images": len(pool.images),
        "given_test": pool.given_test,
    }
    _write_json(folder / "meta.json", meta)


def _write_json(file: Path, content: dict[str, object]) -> None:
    text = json.dumps(content, indent=2)
    _write(file, lambda stream: stream.write(text.encode()))


def _write(file: Path, write: Callable[[BinaryIO], object]) -> None:
    with file.open("xb") as stream:
        write(stream)
        # On the disk before its folder gets its final name: a power cut may come in between.
        stream.flush()
        os.fsync(stream.fileno())


def _publish(new: Path, final: Path) -> Pool:
    """Move a folder to its final name, and map it into memory."""
    there = _open(final)
    if there is not None:  # the same images from elsewhere
        return there
    with suppress(FileNotFoundError):
        final.rename(new.with_name("damaged"))
    pool = _map_pool(new)
    try:
        new.rename(final)
    except OSError:
        there = _open(final)
        if there is None:
            raise
        return there  # another process was faster
    return pool


# Where images come from


def _find_source(name: str, data_dir: Path) -> Source:
    if is_known(name):
        return DATASETS[name](data_dir)
    try:
        if name and Path(name).is_dir():
            return _folder(Path(name).resolve())
    except OSError as error:
        raise ValueError(f"can't list the folder {name!r}: {error}") from error
    known = ", ".join(sorted(DATASETS))
    raise ValueError(f"unknown data set {name!r}: choose {known}, or the path of a folder")


def _digits(data_dir: Path) -> Source:  # noqa: ARG001 -- it comes with scikit-learn
    return Source(
        name="digits",
        address="sklearn.datasets.load_digits",
        fingerprint=lambda: [importlib.metadata.version("scikit-learn")],
        read=_read_digits,
    )


def _read_digits() -> Pool:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (M, 8, 8), was 0 to 16
    return Pool(
        images=resize(grey),
        labels=digits.target.astype(np.int64),
        classes=tuple(str(name) for name in digits.target_names),
        given_test=0,
    )


def _cifar10(data_dir: Path) -> Source:
    return Source(
        name="cifar10",
        address="torchvision.datasets.CIFAR10",
        fingerprint=list,  # it never changes, and torchvision verifies its checksums
        read=lambda: _read_cifar10(data_dir),
    )


def _read_cifar10(data_dir: Path) -> Pool:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import extract_archive

    with (
        redirect_stdout(sys.stderr),  # what torchvision says of its progress
        tempfile.TemporaryDirectory(dir=data_dir, prefix=".cifar10-") as scratch,
    ):
        try:
            train, test = (CIFAR10(data_dir, train=train) for train in (True, False))
        except RuntimeError:  # not there unpacked, or damaged
            extract_archive(_fetch_cifar10(data_dir, Path(scratch)), scratch)
            train, test = (CIFAR10(scratch, train=train) for train in (True, False))
    return Pool(
        images=np.ascontiguousarray(np.concatenate([train.data, test.data])),
        labels=np.array(train.targets + test.targets, np.int64),
        classes=tuple(train.classes),
        given_test=len(test.targets),
    )


def _fetch_cifar10(data_dir: Path, scratch: Path) -> Path:
    """Return CIFAR-10's archive in `data_dir`, downloaded if it isn't there or is damaged."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, download_url

    archive: Path = data_dir / CIFAR10.filename
    if check_integrity(archive, CIFAR10.tgz_md5):
        return archive
    try:
        with _network_timeout(_NETWORK_TIMEOUT_SECONDS):
            download_url(CIFAR10.url, scratch, CIFAR10.filename, CIFAR10.tgz_md5)
    except (*_NETWORK_ERRORS, RuntimeError) as error:
        damage = f"{str(archive)!r} is damaged, and " if archive.exists() else ""
        raise ValueError(
            f"{damage}CIFAR-10 can't be downloaded ({_reason(error)}): put an intact "
            f"{CIFAR10.filename} from {CIFAR10.url} into {str(data_dir)!r}, or use --dataset digits"
        ) from error
    # Only a whole archive gets the name under which it is looked for.
    (scratch / CIFAR10.filename).replace(archive)
    return archive


def _reason(error: Exception) -> str:
    if isinstance(error, RuntimeError):  # torchvision, of the checksum
        return "the server sent another file"
    # An HTTPError's reason lacks the code, a plain URLError's text is wrapped.
    return str(error.reason if type(error) is urllib.error.URLError else error)


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """Let connections fail that nobody answers: torchvision would wait for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _folder(folder: Path) -> Source:
    train, test = _layout(folder)
    classes = _class_names(train)
    # Training needs an image of each class, and so does each split that is drawn from the same.
    files, labels = _labelled_files(train, classes, least=3 if test is None else 2)
    test_labels: list[int] = []
    if test is not None:
        differing = sorted(set(classes) ^ set(_class_names(test)))
        if differing:
            raise ValueError(f"train and test in {str(folder)!r} differ in classes: {differing}")
        test_files, test_labels = _labelled_files(test, classes, least=1)
        files += test_files
    return Source(
        name=folder.name,
        address=str(folder),
        fingerprint=lambda: [_fingerprint(file) for file in files],
        read=lambda: Pool(
            images=_decode_all(files),
            labels=np.array(labels + test_labels, np.int64),
            classes=tuple(classes),
            given_test=len(test_labels),
        ),
    )


def _layout(folder: Path) -> tuple[Path, Path | None]:
    """Return the folder of the training images, or of all, and that of a given test split."""
    parts = {entry.name.lower(): entry for entry in folder.iterdir() if entry.is_dir()}
    if "train" not in parts and "test" not in parts:
        return folder, None
    if "train" not in parts:
        raise ValueError(f"{str(folder)!r} has a folder test, but none that is called train")
    # Rather than learn without them, unnoticed.
    unread = sorted(parts.keys() & {"val", "valid", "validation"})
    if unread:
        raise ValueError(
            f"{str(folder)!r} has a folder {unread[0]}, which would not be used (validation images "
            "are drawn from train): move its images into train, or the folder away"
        )
    return parts["train"], parts.get("test")


def _class_names(folder: Path) -> list[str]:
    entries = folder.iterdir()
    return sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")


def _labelled_files(
    folder: Path, classes: list[str], *, least: int
) -> tuple[list[Path], list[int]]:
    """Return the files in the folders of all classes, class by class, and their labels."""
    found = [find_images(folder / name) for name in classes]
    if not any(found):
        raise ValueError(
            f"no images in {str(folder)!r}: there must be a folder for each class, with its images"
        )
    if len(classes) < 2:
        raise ValueError(f"only one class in {str(folder)!r}: {classes}; there must be two or more")
    for name, files in zip(classes, found, strict=True):
        if len(files) < least:
            raise ValueError(
                f"class {name!r} in {str(folder)!r} has {len(files)} images: "
                f"at least {least} are needed, one for each split"
            )
    labels = [label for label, files in enumerate(found) for _ in files]
    return [file for files in found for file in files], labels


def _fingerprint(file: Path) -> str:
    # Archives and copying set the time of the content (mtime) back, but can't set that of the
    # last change of any kind (ctime). The price: images that were copied are decoded again.
    try:
        status = file.stat()
    except OSError as error:
        raise ValueError(f"can't read {str(file)!r}: {error.strerror}") from error
    return f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}"


def _decode_all(files: Sequence[Path]) -> Bytes:
    images = np.empty((len(files), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)

    def decode_from(start: int) -> None:
        for row, file in enumerate(files[start : start + _FILES_PER_TASK], start):
            images[row] = decode(file)

    # Threads: Pillow holds no lock while it decodes and resizes, and nothing is sent around.
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        # In order, so that of several bad files the first is named. An error cancels the rest.
        for _ in executor.map(decode_from, range(0, len(files), _FILES_PER_TASK)):
            pass
    return images


# Each name, and where in `data_dir` or elsewhere its images come from.
DATASETS: dict[str, Callable[[Path], Source]] = {"digits": _digits, "cifar10": _cifar10}
