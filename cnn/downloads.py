"""The data sets of torchvision that are downloaded on demand, with their checksums."""

import http.client
import socket
import sys
import tempfile
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnn.cache import Bytes, DatasetSource, ImagePool
from cnn.images import resize

_NETWORK_TIMEOUT_SECONDS = 20.0

_NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)

_DIGITS = tuple("0123456789")


@dataclass(frozen=True, kw_only=True)
class _Archive:
    """A file to download."""

    path: str  # in the data folder, where torchvision keeps it
    urls: Sequence[str]
    md5: str

    @property
    def name(self) -> str:
        return Path(self.path).name


def _packed(kind: Any) -> list[_Archive]:
    """Return the one archive of CIFAR-10, CIFAR-100 or STL-10."""
    return [_Archive(path=kind.filename, urls=[kind.url], md5=kind.tgz_md5)]


def _four(kind: Any) -> list[_Archive]:
    """Return images and labels of MNIST and what has its form."""
    return [
        _Archive(
            path=f"{kind.__name__}/raw/{name}",
            urls=[f"{mirror}{name}" for mirror in kind.mirrors],
            md5=md5,
        )
        for name, md5 in kind.resources
    ]


def _both(kind: Any) -> list[_Archive]:
    """Return the files of SVHN, which are not packed."""
    files = (kind.split_list[split] for split in ("train", "test"))
    return [_Archive(path=name, urls=[url], md5=md5) for url, name, md5 in files]


_TRAIN_OR_TEST = ({"train": True}, {"train": False})
_SPLIT = ({"split": "train"}, {"split": "test"})


@dataclass(frozen=True, kw_only=True)
class _Download:
    """How a data set is fetched and read."""

    title: str
    kind: str
    """The class in `torchvision.datasets`."""
    archives: Callable[[Any], list[_Archive]] = _packed
    splits: tuple[dict[str, Any], dict[str, Any]] = _TRAIN_OR_TEST
    classes: tuple[str, ...] | None = None
    """None: those of torchvision."""


_DOWNLOADS = {
    "cifar10": _Download(title="CIFAR-10", kind="CIFAR10"),
    "cifar100": _Download(title="CIFAR-100", kind="CIFAR100"),
    "mnist": _Download(title="MNIST", kind="MNIST", archives=_four, classes=_DIGITS),
    "fashion_mnist": _Download(title="Fashion-MNIST", kind="FashionMNIST", archives=_four),
    "kmnist": _Download(title="Kuzushiji-MNIST", kind="KMNIST", archives=_four),
    "svhn": _Download(title="SVHN", kind="SVHN", archives=_both, splits=_SPLIT, classes=_DIGITS),
    "stl10": _Download(title="STL-10", kind="STL10", splits=_SPLIT),
}

NAMES = tuple(_DOWNLOADS)


def source_of(name: str, data_dir: Path) -> DatasetSource:
    """Return the source of a data set that is downloaded when it is read."""
    return DatasetSource(
        name=name,
        address=f"torchvision.datasets.{_DOWNLOADS[name].kind}",
        fingerprint=list,  # it never changes, because its checksums are checked
        read=lambda image_size: _read(name, data_dir, image_size),
    )


def _read(name: str, data_dir: Path, image_size: int) -> ImagePool:
    import torchvision

    download = _DOWNLOADS[name]
    kind = getattr(torchvision.datasets, download.kind)
    with (
        redirect_stdout(sys.stderr),  # torchvision's progress
        tempfile.TemporaryDirectory(dir=data_dir, prefix=f".{name}-") as scratch,
    ):
        train, test = _splits(download, kind, data_dir, Path(scratch))
    pixels = np.concatenate([_pixels(part) for part in (train, test)])
    labels = [_labels(part) for part in (train, test)]
    return ImagePool(
        images=resize(np.ascontiguousarray(pixels), image_size),
        labels=np.concatenate(labels),
        classes=download.classes or tuple(train.classes),
        given_test=len(labels[1]),
    )


def _splits(download: _Download, kind: Any, data_dir: Path, scratch: Path) -> list[Any]:
    """Return torchvision's two splits, from what is in the data folder or downloaded."""
    archives = download.archives(kind)
    missing = [each for each in archives if not _is_intact(each, data_dir)]
    # torchvision has no checksums of MNIST's unpacked files: intact archives are preferred.
    if missing or download.archives is not _four:
        splits = _unpacked(download, kind, data_dir)
        if splits is not None:
            return splits
    while missing:
        try:
            _fetch(missing[0], data_dir, scratch)
        except (*_NETWORK_ERRORS, RuntimeError) as error:
            raise _refusal(download.title, missing, data_dir, error) from error
        del missing[0]
    for archive in archives:
        _unpack(data_dir / archive.path, scratch / archive.path)
    return [kind(scratch, **split) for split in download.splits]


def _unpacked(download: _Download, kind: Any, data_dir: Path) -> list[Any] | None:
    """Return the two splits from unpacked files, None if these are not there or damaged."""
    files = [data_dir / archive.path for archive in download.archives(kind)]
    is_unchecked = download.archives is _four
    if is_unchecked and not all(file.with_suffix("").is_file() for file in files):
        return None
    try:
        return [kind(data_dir, **split) for split in download.splits]
    except (RuntimeError, ValueError, AssertionError) as error:
        if not is_unchecked:
            return None
        raise ValueError(
            f"the unpacked files of {download.title} in {str(files[0].parent)!r} are damaged: "
            "remove them"
        ) from error


def _is_intact(archive: _Archive, data_dir: Path) -> bool:
    from torchvision.datasets.utils import check_integrity

    return bool(check_integrity(data_dir / archive.path, archive.md5))


def _fetch(archive: _Archive, data_dir: Path, scratch: Path) -> None:
    """Download an archive into the data folder, from the first address that has it."""
    from torchvision.datasets.utils import download_url

    for number, url in enumerate(archive.urls, 1):
        try:
            with _network_timeout(_NETWORK_TIMEOUT_SECONDS):
                download_url(url, scratch, archive.name, archive.md5)
            break
        except (*_NETWORK_ERRORS, RuntimeError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            if number == len(archive.urls):
                raise
    # Only a complete archive gets the final name.
    (data_dir / archive.path).parent.mkdir(parents=True, exist_ok=True)
    (scratch / archive.name).replace(data_dir / archive.path)


def _refusal(title: str, missing: list[_Archive], data_dir: Path, error: Exception) -> ValueError:
    first = missing[0]
    file = data_dir / first.path
    damage = f"{str(file)!r} is damaged, and " if file.exists() else ""
    url = first.urls[0] if len(missing) == 1 else first.urls[0].removesuffix(first.name)
    return ValueError(
        f"{damage}{title} can't be downloaded ({_reason(error)}): put an intact "
        f"{', '.join(each.name for each in missing)} from {url} into {str(file.parent)!r}, or use "
        "--dataset digits"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, RuntimeError):  # torchvision's checksum failed
        return "the server sent another file"
    # An HTTPError's reason lacks the code, a plain URLError's text is wrapped.
    return str(error.reason if type(error) is urllib.error.URLError else error)


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """Let connections fail after `seconds`: torchvision would wait for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _unpack(file: Path, target: Path) -> None:
    from torchvision.datasets.utils import extract_archive

    target.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".gz":
        extract_archive(file, target.parent)
    else:
        target.symlink_to(file.resolve())


def _pixels(part: Any) -> Bytes:
    """Return the images of a split as (N, H, W) or (N, H, W, 3)."""
    pixels = np.asarray(part.data)
    is_planar = pixels.ndim == 4 and pixels.shape[1] == 3
    return pixels.transpose(0, 2, 3, 1) if is_planar else pixels


def _labels(part: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(part.targets if hasattr(part, "targets") else part.labels, np.int64)
