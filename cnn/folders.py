"""Folders of images: the files in them, without what systems leave behind, and their splits.

Needs only the standard library, so that a prediction need not import torch.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_NAMES_SHOWN = 3

# Lower-case names of files and folders that systems and file managers leave behind: Windows, macOS,
# Linux, Synology, QNAP and NetApp. Some contain thumbnails or deleted images. Names that start with
# a dot count as well.
_SYSTEM_NAMES = {
    "thumbs.db",
    "thumbs.db:encryptable",
    "ehthumbs.db",
    "ehthumbs_vista.db",
    "desktop.ini",
    "$recycle.bin",
    "system volume information",
    "found.000",
    "icon\r",
    "icon\uf00d",  # the same on a network drive
    "__macosx",
    "network trash folder",
    "temporary items",
    "lost+found",
    "@eadir",
    "#recycle",
    "#snapshot",
    "@recycle",
    "@recently-snapshot",
    "~snapshot",
}

# Names of the folders of splits, without fillers such as in `train_images`.
SPLITS = {
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


def is_system_name(name: str) -> bool:
    """Return whether a file or folder of this name is skipped: hidden, or a system's own."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def count_skipped(name: str, skipped: Counter[str]) -> None:
    """Count a skipped file or folder; those that macOS writes next to each file, as one name."""
    skipped["._*" if name.startswith("._") else name] += 1


def find_images(folder: Path) -> list[Path]:
    """Return all files below `folder`, sorted by their path relative to it.

    Skips hidden and system files and folders. Follows links, but enters each folder only once, so
    that a link to a parent ends. `decode` checks whether a file is an image.
    Raises ValueError if a folder can't be listed.
    """
    return [folder / name for name in walk(folder)]


def walk(folder: Path, skipped: Counter[str] | None = None) -> Iterator[str]:
    """Yield the relative paths of the files that `find_images` returns, without storing them.

    Skipped names are counted in `skipped`, a folder as one.
    """
    try:
        yield from _walk(folder, "", set(), Counter() if skipped is None else skipped)
    except OSError as error:
        raise ValueError(f"can't list the folder {str(folder)!r}: {error}") from error


def note_on_skipped(skipped: Counter[str]) -> tuple[str, ...]:
    """Return a note on the skipped files and folders, if there are any."""
    if not skipped:
        return ()
    names = [f"{name!r} ({count:,})" for name, count in skipped.most_common(_NAMES_SHOWN)]
    more = len(skipped) - len(names)
    others = f" and {more:,} other names" if more else ""
    total = f"{skipped.total():,} hidden or system files or folders"
    return (f"skipped {total}: {', '.join(names)}{others}",)


def _walk(
    folder: Path, prefix: str, entered: set[tuple[int, int]], skipped: Counter[str]
) -> Iterator[str]:
    status = folder.stat()
    if (status.st_dev, status.st_ino) in entered:
        return
    entered.add((status.st_dev, status.st_ino))
    names = []
    with os.scandir(folder) as scan:
        for entry in scan:
            if is_system_name(entry.name):
                count_skipped(entry.name, skipped)
            else:
                names.append(entry.name + "/" * _is_folder(entry))
    names.sort()
    # With the slash, so that whole paths come out in order: `b-c.png` before `b/`.
    for name in names:
        if name.endswith("/"):
            yield from _walk(folder / name, prefix + name, entered, skipped)
        else:
            yield prefix + name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for example: `decode` reports it
        return False


def role_of(name: str, *, plain: bool = False) -> str | None:
    """Return the split that a folder's name means, a key of `SPLITS`, or None.

    Upper case, digits, punctuation and fillers don't count: `Training`, `val2017`, `test_images`.
    Without `plain`, the last of several words may mean it: `seg_train`.
    """
    words = re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1 \2", name).lower())
    telling = [word for word in words if word not in _FILLERS and len(word) > 1]
    candidates = ["".join(telling), *([] if plain else telling[-1:])]
    return next((role for role in SPLITS for word in candidates if word in SPLITS[role]), None)


def state_of(file: str) -> str:
    """Return a file's path, size and times, which change when it does. Raises ValueError."""
    # Archives and copying restore the content's time (mtime), but can't restore the time of the
    # last change of any kind (ctime). Therefore copied images are decoded again.
    try:
        status = os.stat(file)  # noqa: PTH116 -- `Path` takes longer, and there may be millions
    except OSError as error:
        raise ValueError(f"can't read {file!r}: {error.strerror}") from error
    return f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}"
