"""What `python -m tracking.predict` labels: image files, arrays, or a split of a data set.

The one place of `tracking` that uses `cnn`, and only when a command is run: `cnn.images` and
`cnn.data` are imported inside the functions below, so that training and prediction decode and split
images by the same code. `import tracking` and `Predictor.predict` never load `cnn`.

Everything is read in chunks, so that memory does not grow with the number of images; only an `.npz`
has to be unpacked whole. What a user did wrong is a ValueError of one line.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Labels = Sequence[str | None] | Sequence[int] | npt.NDArray[Any]

ARRAYS = (".npy", ".npz")
CHANNELS = (1, 3)
SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some of the images, what they are called, and their labels where they are known."""

    images: npt.NDArray[np.uint8]  # (N, 32, 32, 3)
    names: list[str]
    labels: list[str | None] | None  # class names


@dataclass(frozen=True, kw_only=True)
class Source:
    """Images to be labelled."""

    size: int
    read: Callable[[int], Iterator[Chunk]]
    """Read all images, so many at a time."""
    notes: tuple[str, ...] = ()
    """What a user should know about them, a line each."""


def check(text: str) -> None:
    """Raise ValueError unless there is what `text` names. Quick: nothing is read."""
    if not os.path.lexists(text):
        _split_named(text)


def open_source(
    text: str, *, classes: Sequence[str], metadata: Mapping[str, Any], data_dir: Path
) -> Source:
    """Open what a user named, for a model to label.

    Args:
        text: a folder, an image, an `.npy` or `.npz` file, or `NAME:SPLIT`.
        classes: the model's class names; images of other classes count as unlabelled.
        metadata: the model's: a split is drawn with its `seed`.
        data_dir: where `cnn.data` keeps data sets.
    """
    path = Path(text)
    if not os.path.lexists(path):
        name, split = _split_named(text)
        return _open_split(name, split, classes, metadata, data_dir)
    if path.is_dir():
        return _open_folder(path, classes)
    if path.suffix.lower() in ARRAYS:
        return _open_array(path, classes)
    return _open_files([path], classes)


# Image files


def _open_folder(folder: Path, classes: Sequence[str]) -> Source:
    from cnn.images import find_images

    files = find_images(folder)
    if not files:
        raise ValueError(f"no images in {str(folder)!r}")
    return _open_files(files, classes)


def _open_files(files: Sequence[Path], classes: Sequence[str]) -> Source:
    """Open image files; the label of each is the name of its folder, if that is a class."""
    import numpy as np

    from cnn.images import decode

    @cache
    def folder_name(folder: Path) -> str:
        return folder.name or folder.absolute().name  # '.' has none

    labels, notes = _known([folder_name(file.parent) for file in files], classes)

    def read(size: int) -> Iterator[Chunk]:
        for part in _parts(len(files), size):
            chunk = files[part]
            yield Chunk(
                images=np.stack([decode(file) for file in chunk]),
                names=[str(file) for file in chunk],
                labels=labels and labels[part],
            )

    return Source(size=len(files), read=read, notes=notes)


# Arrays


def _open_array(file: Path, classes: Sequence[str]) -> Source:
    import numpy as np

    from cnn.images import resize

    images, given = _load(file)
    if not _holds_images(images):
        raise ValueError(
            f"{str(file)!r} holds {images.dtype} {images.shape}: images must be uint8 and "
            "(N, H, W, C), (N, H, W) or (H, W, C), with C 1 or 3, and none of them 0"
        )
    if images.ndim == 3 and images.shape[2] in CHANNELS:
        images = images[np.newaxis]  # one image (H, W, C)
    try:
        labels = None if given is None else class_names(given, classes, size=len(images))
    except ValueError as error:
        raise ValueError(f"{str(file)!r}: {error}") from error

    def read(size: int) -> Iterator[Chunk]:
        for part in _parts(len(images), size):
            yield Chunk(
                images=resize(_part(images, part)),
                names=[f"{file}[{index}]" for index in range(part.start, part.stop)],
                labels=labels and labels[part],
            )

    return Source(size=len(images), read=read)


def _holds_images(array: npt.NDArray[Any]) -> bool:
    known = array.ndim == 3 or (array.ndim == 4 and array.shape[3] in CHANNELS)
    return array.dtype == "uint8" and known and 0 not in array.shape


def _part(images: npt.NDArray[Any], part: slice) -> npt.NDArray[Any]:
    """Return some of the images. A file is mapped anew: what was read of it stays with a map."""
    import numpy as np

    if isinstance(images, np.memmap) and images.filename is not None:
        order: Any = "C" if images.flags.c_contiguous else "F"
        images = np.memmap(
            images.filename, images.dtype, "r", images.offset, images.shape, order=order
        )
    return images[part]


def _load(file: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Return the images of a file, mapped into memory if it is an `.npy`, and their labels."""
    import zipfile
    import zlib

    import numpy as np

    try:
        if file.suffix.lower() == ".npy":
            return np.lib.format.open_memmap(file, mode="r"), None
        with file.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded, None  # an .npy by another name
            arrays = {name: loaded[name] for name in ("images", "labels") if name in loaded}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"can't read the array {str(file)!r}: {error}") from error
    if "images" not in arrays:
        raise ValueError(f"{str(file)!r} holds no array 'images', but {_listed(loaded.files)}")
    return arrays["images"], arrays.get("labels")


def class_names(labels: Labels, classes: Sequence[str], *, size: int) -> list[str | None]:
    """Return labels as class names: they are that already (or None), or positions in `classes`.

    Raises ValueError for others, and unless there are `size` of them.
    """
    import numpy as np

    array: npt.NDArray[Any] = np.asarray(labels)
    if array.shape != (size,):
        raise ValueError(f"{size} images need as many labels, not an array {array.shape}")
    if array.dtype.kind in "iu":
        wrong = array[(array < 0) | (array >= len(classes))]
        if len(wrong):
            raise ValueError(f"label {wrong[0]} is not in 0 to {len(classes) - 1}")
        return [classes[label] for label in array]
    if size and array.dtype.kind not in "UO":
        raise ValueError(f"labels must be class names or integers, not {array.dtype}")
    names: list[str | None] = array.tolist()
    known = {*classes, None}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"label {unknown[0]!r} is no class of the model: {_listed(classes)}")
    return names


# Splits of data sets


def _split_named(text: str) -> tuple[str, str]:
    name, colon, split = text.rpartition(":")
    if not colon or not name:
        raise ValueError(
            f"there is no {text!r}: give a folder, an image, an .npy or .npz file, or a split of "
            "a data set, say digits:test"
        )
    if split not in SPLITS:
        raise ValueError(
            f"there is no {text!r}; if {name!r} is a data set, its splits are {', '.join(SPLITS)}"
        )
    return name, SPLITS[split]


def _open_split(
    name: str, split: str, classes: Sequence[str], metadata: Mapping[str, Any], data_dir: Path
) -> Source:
    """Open a split as it was when the model was trained, by the same seed."""
    import torch

    from cnn import data

    if "seed" not in metadata:
        raise ValueError(f"can't tell {split} from the rest: the model has no seed in its metadata")
    dataset = data.load(name, data_dir=data_dir, seed=metadata["seed"])
    images: data.Split = getattr(dataset, split)
    names = [dataset.classes[label] for label in images.labels.tolist()]
    labels, notes = _known(names, classes)
    if dataset.digest != metadata.get("dataset_digest"):
        notes += (
            f"the model was trained on other data (digest {metadata.get('dataset_digest')}) than "
            f"{name} is now ({dataset.digest}): its splits may overlap with what it has seen",
        )

    def read(size: int) -> Iterator[Chunk]:
        for part in _parts(len(images), size):
            positions = torch.arange(part.start, part.stop)
            yield Chunk(
                images=images.batch(positions)[0].numpy(),
                names=[f"{name}:{split}[{index}]" for index in positions.tolist()],
                labels=labels and labels[part],
            )

    return Source(size=len(images), read=read, notes=notes)


# What they share


def _parts(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _known(
    names: Sequence[str], classes: Sequence[str]
) -> tuple[list[str | None] | None, tuple[str, ...]]:
    """Return the names that are classes of the model as labels, and a note if others are not.

    Where none is, there are no labels, and nothing to note.
    """
    known = set(classes)
    labels = [name if name in known else None for name in names]
    others = Counter(name for name in names if name not in known)
    if len(names) == others.total():
        return None, ()
    if not others:
        return labels, ()
    return labels, (
        f"{others.total()} of {len(names)} images count as unlabelled, because the model has no "
        f"class {_listed(others)}",
    )


def _listed(names: Sequence[str] | Counter[str], limit: int = 8) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:limit])
    more = len(names) - limit
    return (shown or "nothing") + (f" and {more} more" if more > 0 else "")
