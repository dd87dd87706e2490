"""A named data set as uint8 tensors, split by a seed into training, validation and test images.

Images are decoded once and kept in `data_dir/cache/<digest>`, under the digest of their content.
After that they are mapped into memory, so that a start takes no decoding and all processes of a
machine share one copy. Each process checks the digest when it opens them. What a caller or the data
did wrong is a ValueError of one line.
"""

import hashlib
import http.client
import importlib.metadata
import json
import os
import re
import socket
import sys
import tempfile
import urllib.error
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnn.images import (
    IMAGE_SIZE,
    count_passed_over,
    decode,
    is_system_name,
    note_on_passed_over,
    resize,
    walk,
)

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]
Scalar = TypeVar("Scalar", np.uint8, np.int64)
# Rows of images with the pixels of an earlier one, each with the row of the first such image.
Copies = list[list[int]]

FileStates = tuple[tuple[int, ...], ...]
"""Device, number, size, and times of the last changes of some files."""

# One more whenever the same source would give other pixels than before.
_CACHE_VERSION = 2
# Below this many validation images, one image is more than a point of accuracy.
MIN_VALIDATION = 100
MAX_SHARE_OF_A_CLASS = 0.95
_FILES_PER_TASK = 32
# What folders of splits are called, but for fillers such as in `train_images`.
_SPLITS = {
    "train": {"train", "training", "trn", "trainval", "trainset", "trainingset"},
    "validation": {
        *("val", "valid", "validation", "validate", "valset", "validationset"),
        *("dev", "devset", "development", "eval", "evaluation", "evalset"),
    },
    "test": {"test", "testing", "tst", "testset", "testingset", "holdout", "heldout"},
}
_FILLERS = {
    *("data", "dataset", "set", "split", "images", "image", "imgs", "img", "photos", "pictures"),
    *("files", "folder", "samples", "examples", "jpg", "jpeg", "png", "masks", "labels"),
}
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
    notes: tuple[str, ...] = ()  # by `load`: what people should know of the data, a line each
    checked: FileStates | None = None  # by `load`: for `open_cached`


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """All images of a data set, not split yet; those of a given test split come last."""

    images: Bytes  # (M, 32, 32, 3)
    labels: Integers  # (M,)
    classes: tuple[str, ...]
    given_test: int  # how many of the last images are the test split; 0: the seed chooses it
    copies: Copies | None = None  # None: nobody has looked for them yet


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where images come from: what changes whenever they may have, and how to read them."""

    name: str
    address: str
    fingerprint: Callable[[], list[str]]
    read: Callable[[], Pool]
    notes: tuple[str, ...] = ()


def is_known(name: str) -> bool:
    """Return whether this is the name of a data set, rather than a folder's path."""
    return name in DATASETS


def load(name: str, *, data_dir: Path, seed: int) -> Dataset:
    """Return a data set by its name (see DATASETS) or by the path of a folder of images.

    A folder holds `train/<class>/*`, with `test/<class>/*` if there is a given test split, or
    just `<class>/*`. Folders with names like `Training` or `seg_test` are splits, too; those for
    validation are refused, and what systems leave behind is passed over. Decoded images are kept
    in `data_dir`, where CIFAR-10 is downloaded to.

    A given test split is used as it is, whatever the seed, and the validation split is 10 % of the
    rest; without one, 20 % each go into validation and test. Both are drawn class by class.
    Raises ValueError.
    """
    _check_seed(seed)
    source = _find_source(name, data_dir)
    cache = data_dir / "cache"
    notes = source.notes
    try:
        key = _key(source)
        digest = _look_up(cache, key)
        states = None if digest is None else _states(cache / digest)
        pool = None if digest is None else _open(cache / digest)
        if digest is None or pool is None:
            if digest is not None and os.path.lexists(cache / digest):
                notes += (
                    f"{str(cache / digest)!r} was damaged: its images were read again from "
                    f"{source.address}",
                )
            digest, pool = _fill(cache, key, source)
            states = _states(cache / digest)
        elif pool.copies is None:
            pool, states = _with_copies(pool, cache / digest), None
    except OSError as error:
        raise ValueError(f"can't use the data folder {str(data_dir)!r}: {error}") from error
    dataset = split_pool(pool, digest, seed, name=source.name, source=source.address)
    notes += tuple(_notes_of_copies(dataset, pool))
    return replace(dataset, notes=notes, checked=states)


def open_cached(
    digest: str, data_dir: Path, seed: int, *, checked: FileStates | None = None
) -> Dataset:
    """Return what `load` returned, without a look at where it came from: for worker processes.

    Name and source are those under which these very images were read first.

    Args:
        digest: of the data set.
        data_dir: which has it in its cache.
        seed: of the split.
        checked: the files as they were when `load` checked their digest. Where they are the same
            ones still, on this machine, that is not done again.
    """
    _check_seed(seed)
    folder = data_dir / "cache" / digest
    try:
        is_checked = checked is not None and _states(folder) == checked
        pool = _open(folder, is_checked=is_checked)
    except OSError as error:
        raise ValueError(f"can't use the data folder {str(data_dir)!r}: {error}") from error
    if pool is None:
        raise ValueError(f"no undamaged data set with the digest {digest!r} in {str(data_dir)!r}")
    meta = _read_meta(folder)
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


# What people should know of a split


def _notes_of_copies(dataset: Dataset, pool: Pool) -> Iterator[str]:
    """Tell of images that are in two splits: what is measured on them is memory."""
    first = np.arange(len(pool.images))
    for row, other in pool.copies or ():
        first[row] = other
    train, validation, test = (
        first[split.rows.numpy()] for split in (dataset.train, dataset.validation, dataset.test)
    )
    for name, part, others, where in (
        ("validation", validation, train, "train"),
        ("test", test, np.concatenate([train, validation]), "train or validation"),
    ):
        count = int(np.isin(part, others).sum())
        if count:
            yield (
                f"{count:,} of {len(part):,} {name} images have the same pixels as an image in "
                f"{where}: accuracy on them says nothing about new images"
            )


def notes_on_choosing(dataset: Dataset) -> Iterator[str]:
    """Tell of a validation split whose accuracy can't tell configurations apart, a line each."""
    labels = dataset.validation.labels
    size = len(labels)
    if size < MIN_VALIDATION:
        yield (
            f"the validation split has {size} images, fewer than {MIN_VALIDATION}: one image is "
            f"{100 / size:.1f} points of accuracy, so smaller differences between configurations "
            "can't be seen"
        )
    largest = torch.bincount(labels).max().item()
    if largest > MAX_SHARE_OF_A_CLASS * size:
        name = dataset.classes[int(torch.bincount(labels).argmax())]
        yield (
            f"{largest:,} of {size:,} validation images are of class {name!r}: a network that "
            f"always answers so has {100 * largest / size:.1f} % accuracy"
        )


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


def _states(folder: Path) -> FileStates | None:
    """Return what changes whenever a file of an entry does; None if one isn't there."""
    try:
        found = [(folder / name).stat() for name in ("images.npy", "labels.npy", "meta.json")]
    except OSError:
        return None
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found)


def _open(folder: Path, *, is_checked: bool = False) -> Pool | None:
    """Map what is kept in a folder of the cache into memory; None if it is not what was written.

    The folder's name is the digest of what is in it. To check that takes 0.15 s for the 184 MB of
    CIFAR-10 (SHA-256 by the processor's own instructions, one thread).
    """
    try:
        pool = _map_pool(folder)
        return pool if is_checked or _digest(pool) == folder.name else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        raise
    except Exception:  # a parser that trips over a damaged file may raise anything
        return None


def _map_pool(folder: Path) -> Pool:
    meta = _read_meta(folder)
    shape = (meta["images"], IMAGE_SIZE, IMAGE_SIZE, 3)
    return Pool(
        images=_map(folder / "images.npy", np.uint8, shape),
        labels=_map(folder / "labels.npy", np.int64, shape[:1]),
        classes=tuple(meta["classes"]),
        given_test=meta["given_test"],
        copies=meta.get("copies"),
    )


def _read_meta(folder: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text("utf-8"))
    # Entries of earlier versions have no checksum, nor any copies.
    if "checksum" in meta and meta.pop("checksum") != _checksum(meta):
        raise ValueError(f"{str(folder / 'meta.json')!r} is not what was written")
    return meta


def _checksum(meta: dict[str, Any]) -> str:
    # Of what the digest of the content leaves out, too: where it came from, and the copies.
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:32]


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


def _find_copies(images: Bytes) -> Copies:
    """Return the rows of images with the pixels of an earlier one, with the first such row."""
    first: dict[bytes, int] = {}
    firsts = [
        first.setdefault(hashlib.sha256(image.data).digest(), i) for i, image in enumerate(images)
    ]
    return [[row, other] for row, other in enumerate(firsts) if row != other]


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
        "copies": _find_copies(pool.images),
    }
    _write_json(folder / "meta.json", meta | {"checksum": _checksum(meta)})


def _with_copies(pool: Pool, folder: Path) -> Pool:
    """Note the copies of an entry of an earlier version, if it may be written to."""
    copies = _find_copies(pool.images)
    meta = _read_meta(folder) | {"copies": copies}
    with (
        suppress(OSError),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as scratch,
    ):
        file = Path(scratch) / "meta.json"
        _write_json(file, meta | {"checksum": _checksum(meta)})
        file.replace(folder / file.name)
    return replace(pool, copies=copies)


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
    passed_over: Counter[str] = Counter()
    train, test, notes = _layout(folder, passed_over)
    classes = _folders(train, passed_over if train != folder else None)
    # Training needs an image of each class, and so does each split that is drawn from the same.
    least = 3 if test is None else 2
    files, labels = _labelled_files(train, classes, least=least, passed_over=passed_over)
    notes += _notes_of_inner_splits(train, files) + _notes_of_numbered(train, classes)
    test_labels: list[int] = []
    if test is not None:
        differing = sorted(set(classes) ^ set(_folders(test, passed_over)))
        if differing:
            raise ValueError(f"train and test in {str(folder)!r} differ in classes: {differing}")
        test_files, test_labels = _labelled_files(test, classes, least=1, passed_over=passed_over)
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
        notes=notes + note_on_passed_over(passed_over),
    )


def _layout(folder: Path, passed_over: Counter[str]) -> tuple[Path, Path | None, tuple[str, ...]]:
    """Return the folder of the training images, or of all, that of a given test split, and notes.

    A folder whose name says train, validation or test (see `_role`) is a split, or the data set is
    refused. With one exception: it is a class where its name says train, as that of a vehicle does,
    it has no folders in it, and there are two other folders or more.
    """
    names = _folders(folder, passed_over)
    roles = {name: role for name in names if (role := _role(name))}
    if "invalid" in map(str.lower, names):  # two classes, as of tickets
        roles = {name: role for name, role in roles.items() if name.lower() != "valid"}
    plain = {name: role for name, role in roles.items() if _role(name, plain=True)}
    if "train" in plain.values():
        roles = plain  # beside `train`, `train_old` is another folder
    others = [name for name in names if name not in roles]
    is_vehicle = set(roles.values()) == {"train"} and len(others) >= 2
    if not roles or (is_vehicle and not any(_folders(folder / name) for name in roles)):
        return folder, None, ()
    of_role = {role: [name for name in roles if roles[name] == role] for role in _SPLITS}
    objection = _objection(of_role)
    if objection:
        raise ValueError(
            f"{str(folder)!r} has {objection}. A data set is train/CLASS/*, with test/CLASS/* if "
            "there is a test split, or just CLASS/*: if one of these is a class, rename its folder"
        )
    notes = (f"not used, beside the splits: {', '.join(map(repr, others))}",) if others else ()
    train, *test = (_unwrapped(folder / name) for name in of_role["train"] + of_role["test"])
    return train, test[0] if test else None, notes


def _objection(of_role: dict[str, list[str]]) -> str:
    """Return what is wrong with the folders of each split; '' if nothing is."""
    for role, names in of_role.items():
        if len(names) > 1:
            return f"{len(names)} folders for {role}, {names}, where one is expected"
    validation, test = of_role["validation"], of_role["test"]
    if not of_role["train"]:
        return f"a folder {(validation + test)[0]!r}, but none that is called train"
    # Rather than learn without them, unnoticed.
    if validation:
        return (
            f"a folder {validation[0]!r}, which would not be used (validation images are drawn "
            "from train): move its images into train, or the folder away"
        )
    return ""


def _role(name: str, *, plain: bool = False) -> str | None:
    """Return of which split a folder's name says that it is: of `_SPLITS`, or None.

    Upper case, digits, punctuation and fillers don't count: `Training`, `val2017`, `test_images`.
    Without `plain`, it may be the last of several words: `seg_train`.
    """
    words = re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1 \2", name).lower())
    telling = [word for word in words if word not in _FILLERS and len(word) > 1]
    candidates = ["".join(telling), *([] if plain else telling[-1:])]
    return next((role for role in _SPLITS for word in candidates if word in _SPLITS[role]), None)


def _unwrapped(split: Path) -> Path:
    # Archives often hold `seg_train/seg_train/CLASS`.
    return split / split.name if _folders(split) == [split.name] else split


def _folders(folder: Path, passed_over: Counter[str] | None = None) -> list[str]:
    """Return the names of the folders in one; count what is hidden, or a system's own."""
    names = []
    for entry in folder.iterdir():
        if not is_system_name(entry.name):
            names += [entry.name] if entry.is_dir() else []
        elif passed_over is not None:
            count_passed_over(entry.name, passed_over)
    return sorted(names)


def _labelled_files(
    folder: Path, classes: list[str], *, least: int, passed_over: Counter[str]
) -> tuple[list[str], list[int]]:
    """Return the files in the folders of all classes, class by class, and their labels."""
    # As text: sixty thousand paths are made and asked for their state in half of the time.
    found = [
        [f"{folder}/{name}/{file}" for file in walk(folder / name, passed_over)] for name in classes
    ]
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


def _notes_of_inner_splits(folder: Path, files: list[str]) -> tuple[str, ...]:
    """Tell of CLASS/train and CLASS/test, which are not told apart."""
    depth = str(folder).count("/") + 2
    inner = {parts[depth] for file in files if len(parts := file.split("/")) > depth + 1}
    names = sorted(name for name in inner if _role(name, plain=True))
    if len({_role(name) for name in names}) < 2:
        return ()
    return (
        f"below the classes are folders {', '.join(map(repr, names))}: they are read as one, and "
        "the splits are drawn anew",
    )


def _notes_of_numbered(folder: Path, classes: list[str]) -> tuple[str, ...]:
    """Tell of fold1/CLASS and fold2/CLASS, whose outer folders are taken for the classes."""
    if len({re.sub(r"\d+", "", name) for name in classes}) > 1:
        return ()
    first, *others = (_folders(folder / name) for name in classes)
    if len(first) < 2 or any(names != first for names in others):
        return ()
    return (
        f"the classes are {', '.join(map(repr, classes[:3]))}{' …' if len(classes) > 3 else ''}; "
        f"in each are folders {', '.join(map(repr, first[:3]))}{' …' if len(first) > 3 else ''}: "
        "if those are the classes, put the images together, as CLASS/*",
    )


def _fingerprint(file: str) -> str:
    # Archives and copying set the time of the content (mtime) back, but can't set that of the
    # last change of any kind (ctime). The price: images that were copied are decoded again.
    try:
        status = os.stat(file)  # noqa: PTH116 -- see _labelled_files
    except OSError as error:
        raise ValueError(f"can't read {file!r}: {error.strerror}") from error
    return f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}"


def _decode_all(files: Sequence[str]) -> Bytes:
    images = np.empty((len(files), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)

    def decode_from(start: int) -> None:
        for row, file in enumerate(files[start : start + _FILES_PER_TASK], start):
            images[row] = decode(Path(file))

    # Threads: Pillow holds no lock while it decodes and resizes, and nothing is sent around.
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        # In order, so that of several bad files the first is named. An error cancels the rest.
        for _ in executor.map(decode_from, range(0, len(files), _FILES_PER_TASK)):
            pass
    return images


# Each name, and where in `data_dir` or elsewhere its images come from.
DATASETS: dict[str, Callable[[Path], Source]] = {"digits": _digits, "cifar10": _cifar10}
