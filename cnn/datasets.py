"""Where images come from: named data sets, folders of images, and what other files here read."""

import importlib.metadata
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from cnn import functions, parquet
from cnn.cache import Bytes, DatasetSource, ImagePool
from cnn.downloads import NAMES as DOWNLOADED
from cnn.downloads import source_of
from cnn.folders import (
    SPLITS,
    count_skipped,
    is_system_name,
    note_on_skipped,
    role_of,
    state_of,
    walk,
)
from cnn.images import decode, empty_images, resize
from cnn.references import is_reference

_FILES_PER_TASK = 32


def is_known(name: str) -> bool:
    """Return whether this is the name of a data set, not the path of a folder."""
    return name in DATASETS


def find_source(name: str, data_dir: Path) -> DatasetSource:
    """Return the source of a named data set, a folder or a function. Raises ValueError."""
    if is_known(name):
        return DATASETS[name](data_dir)
    try:
        if name and Path(name).is_dir():
            folder = Path(name).resolve()
            return parquet.source_in(folder) or _folder(folder)
        if is_reference(name):
            return functions.source_of(name)
    except OSError as error:
        raise ValueError(f"can't list the folder {name!r}: {error}") from error
    known = ", ".join(sorted(DATASETS))
    raise ValueError(
        f"unknown data set {name!r}: choose {known}, the path of a folder, or a function "
        "(package.module:function or file.py:function)"
    )


def _digits(data_dir: Path) -> DatasetSource:  # noqa: ARG001 -- scikit-learn contains it
    return DatasetSource(
        name="digits",
        address="sklearn.datasets.load_digits",
        fingerprint=lambda: [importlib.metadata.version("scikit-learn")],
        read=_read_digits,
    )


def _read_digits(image_size: int) -> ImagePool:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (M, 8, 8), was 0 to 16
    return ImagePool(
        images=resize(grey, image_size),
        labels=digits.target.astype(np.int64),
        classes=tuple(str(name) for name in digits.target_names),
        given_test=0,
    )


def _folder(folder: Path) -> DatasetSource:
    skipped: Counter[str] = Counter()
    train, test, notes = _layout(folder, skipped)
    classes = _folders(train, skipped if train != folder else None)
    # Training needs an image of each class, and so does each split drawn from the same images.
    least = 3 if test is None else 2
    files, labels = _labelled_files(train, classes, least=least, skipped=skipped)
    notes += _notes_of_inner_splits(train, files) + _notes_of_numbered(train, classes)
    test_labels: list[int] = []
    if test is not None:
        differing = sorted(set(classes) ^ set(_folders(test, skipped)))
        if differing:
            raise ValueError(f"train and test in {str(folder)!r} differ in classes: {differing}")
        test_files, test_labels = _labelled_files(test, classes, least=1, skipped=skipped)
        files += test_files
    return DatasetSource(
        name=folder.name,
        address=str(folder),
        fingerprint=lambda: [state_of(file) for file in files],
        read=lambda image_size: ImagePool(
            images=_decode_all(files, image_size),
            labels=np.array(labels + test_labels, np.int64),
            classes=tuple(classes),
            given_test=len(test_labels),
        ),
        notes=notes + note_on_skipped(skipped),
    )


def _layout(folder: Path, skipped: Counter[str]) -> tuple[Path, Path | None, tuple[str, ...]]:
    """Return the folder of the training images (or of all), that of a given test split, and notes.

    A folder named like a split (see `role_of`) is one, or the data set is refused. One exception: a
    folder named like `train` is a class, such as the vehicle, if it contains no folders and there
    are at least two other folders.
    """
    names = _folders(folder, skipped)
    roles = {name: role for name in names if (role := role_of(name))}
    if "invalid" in map(str.lower, names):  # valid and invalid are two classes
        roles = {name: role for name, role in roles.items() if name.lower() != "valid"}
    plain = {name: role for name, role in roles.items() if role_of(name, plain=True)}
    if "train" in plain.values():
        roles = plain  # next to `train`, `train_old` is another folder
    others = [name for name in names if name not in roles]
    is_vehicle = set(roles.values()) == {"train"} and len(others) >= 2
    if not roles or (is_vehicle and not any(_folders(folder / name) for name in roles)):
        return folder, None, ()
    of_role = {role: [name for name in roles if roles[name] == role] for role in SPLITS}
    objection = _objection(of_role)
    if objection:
        raise ValueError(
            f"{str(folder)!r} has {objection}. A data set is train/CLASS/*, with test/CLASS/* if "
            "there is a test split, or just CLASS/*: if one of these is a class, rename its folder"
        )
    notes = (f"not used, next to the splits: {', '.join(map(repr, others))}",) if others else ()
    train, *test = (_unwrapped(folder / name) for name in of_role["train"] + of_role["test"])
    return train, test[0] if test else None, notes


def _objection(of_role: dict[str, list[str]]) -> str:
    """Return why the folders of the splits are refused; '' if they are not."""
    for role, names in of_role.items():
        if len(names) > 1:
            return f"{len(names)} folders for {role}, {names}, where one is expected"
    validation, test = of_role["validation"], of_role["test"]
    if not of_role["train"]:
        return f"a folder {(validation + test)[0]!r}, but none that is called train"
    # Refused, because the training would silently leave them out.
    if validation:
        return (
            f"a folder {validation[0]!r}, which would not be used (validation images are drawn "
            "from train): move its images into train, or the folder away"
        )
    return ""


def _unwrapped(split: Path) -> Path:
    # Archives often contain `seg_train/seg_train/CLASS`.
    return split / split.name if _folders(split) == [split.name] else split


def _folders(folder: Path, skipped: Counter[str] | None = None) -> list[str]:
    """Return the names of the folders in a folder; count hidden and system files."""
    names = []
    for entry in folder.iterdir():
        if not is_system_name(entry.name):
            names += [entry.name] if entry.is_dir() else []
        elif skipped is not None:
            count_skipped(entry.name, skipped)
    return sorted(names)


def _labelled_files(
    folder: Path, classes: list[str], *, least: int, skipped: Counter[str]
) -> tuple[list[str], list[int]]:
    """Return the files in the folders of all classes, class by class, and their labels."""
    # As text: `Path` objects take twice the time for 60,000 files.
    found = [
        [f"{folder}/{name}/{file}" for file in walk(folder / name, skipped)] for name in classes
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
    """Return a note on CLASS/train and CLASS/test, which are read as one class."""
    depth = str(folder).count("/") + 2
    inner = {parts[depth] for file in files if len(parts := file.split("/")) > depth + 1}
    names = sorted(name for name in inner if role_of(name, plain=True))
    if len({role_of(name) for name in names}) < 2:
        return ()
    return (
        f"below the classes are folders {', '.join(map(repr, names))}: they are read as one, and "
        "the splits are drawn again",
    )


def _notes_of_numbered(folder: Path, classes: list[str]) -> tuple[str, ...]:
    """Return a note on fold1/CLASS and fold2/CLASS, whose outer folders are read as classes."""
    if len({re.sub(r"\d+", "", name) for name in classes}) > 1:
        return ()
    first, *others = (_folders(folder / name) for name in classes)
    if len(first) < 2 or any(names != first for names in others):
        return ()
    return (
        f"the classes are {', '.join(map(repr, classes[:3]))}{' …' if len(classes) > 3 else ''}; "
        f"in each are folders {', '.join(map(repr, first[:3]))}{' …' if len(first) > 3 else ''}: "
        "if those are the classes, merge the outer folders into CLASS/*",
    )


def _decode_all(files: Sequence[str], image_size: int) -> Bytes:
    images = empty_images(len(files), image_size)

    def decode_from(start: int) -> None:
        for row, file in enumerate(files[start : start + _FILES_PER_TASK], start):
            images[row] = decode(Path(file), image_size)

    # Threads: Pillow releases the lock while it decodes, and nothing is copied between processes.
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        # In order, so that the first of several bad files is named. An error cancels the rest.
        for _ in executor.map(decode_from, range(0, len(files), _FILES_PER_TASK)):
            pass
    return images


# The source of each named data set, given `data_dir`.
DATASETS: dict[str, Callable[[Path], DatasetSource]] = {
    "digits": _digits,
    **{name: partial(source_of, name) for name in DOWNLOADED},
}
