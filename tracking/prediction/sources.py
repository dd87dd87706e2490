"""Open the sources of `python -m tracking.predict`: image files, arrays, Parquet files, splits.

Functions here import `cnn`, so that training and prediction decode and split images by the same
code. `import tracking` and `Predictor.predict` never load `cnn`.

A source is read in chunks and prefetched in threads: only the names of all images stay in memory,
and a whole `.npz`. A user's mistake is a ValueError of one line. An image that can't be read is a
row with an error.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracking.models.labels import class_names
from tracking.prediction.arrays import is_one_image, read_arrays
from tracking.prediction.chunks import (
    ARRAYS,
    BYTES_AHEAD,
    TABLES,
    Chunk,
    Row,
    Source,
    decoded,
    is_list,
    known_labels,
    parts,
)
from tracking.prediction.inputs import Paths, Table, listed_paths, read_list
from tracking.prediction.prefetch import prefetch
from tracking.prediction.splits import dataset_of, open_split, split_named
from tracking.text import listed

if TYPE_CHECKING:
    import numpy.typing as npt


def check(text: str) -> None:
    """Raise ValueError unless the source exists. It is quick: nothing is read."""
    if text == "-":
        return
    if text.startswith("@"):
        if not os.path.lexists(text[1:]):
            raise ValueError(
                f"there is no list {text[1:]!r} (a file called {text!r} is './{text}')"
            )
    elif not os.path.lexists(text):
        split_named(text)


def open_source(
    text: str,
    *,
    classes: Sequence[str],
    metadata: Mapping[str, Any],
    data_dir: Path,
    image_size: int,
    column: str | None = None,
) -> Source:
    """Open a source for a model to predict.

    Args:
        text: a folder, an image, a list of paths (`@FILE`, `-`), an `.npy`, `.npz` or `.parquet`
            file, or `NAME:SPLIT`.
        classes: the model's class names; images of other classes count as unlabelled.
        metadata: the model's; its `seed` draws a split.
        data_dir: the folder of data sets.
        image_size: height and width of the images that the model takes.
        column: the column of a Parquet file with the images.
    """
    path = Path(text)
    suffix = "" if is_list(text) or os.path.isdir(text) else path.suffix.lower()  # noqa: PTH112
    if column and suffix not in TABLES:
        raise ValueError(f"--column is for Parquet files, not for {text!r}")
    if is_list(text):
        return _open_files(read_list(text), classes, text, image_size, also=text[1:])
    if not os.path.lexists(path):
        name, split = split_named(text)
        return open_split(name, split, classes, metadata, data_dir, image_size)
    if os.path.isdir(text):  # noqa: PTH112 -- `Path` raises for a name that is too long
        return _noted(_open_folder(path, classes, image_size), text, metadata, data_dir)
    if suffix in ARRAYS:
        return _open_array(path, classes, image_size)
    if suffix in TABLES:
        return _open_table(path, classes, column, image_size)
    image = _open_files(listed_paths([text], prefix=""), classes, text, image_size)
    return _noted(image, text, metadata, data_dir)


def _noted(source: Source, text: str, metadata: Mapping[str, Any], data_dir: Path) -> Source:
    """Add a note if the model was trained on another data set than that of the files."""
    known, trained_on = dataset_of(text, data_dir), metadata.get("dataset_digest")
    if known is None or trained_on is None or trained_on in known.digests:
        return source
    note = (
        f"the model was trained on other data ({metadata.get('dataset')!r}, digest {trained_on}) "
        f"than this is of ({known.name!r}, digest {known.digests[0]})"
    )
    return replace(source, notes=(*source.notes, note))


# Image files


def _open_folder(folder: Path, classes: Sequence[str], image_size: int) -> Source:
    from cnn.folders import note_on_skipped, walk

    prefix = str(folder / "x")[:-1]  # '' for the working folder
    passed_over: Counter[str] = Counter()
    paths = listed_paths(walk(folder, passed_over), prefix=prefix)
    source = _open_files(paths, classes, str(folder), image_size)
    return replace(source, notes=(*note_on_skipped(passed_over), *source.notes))


def _open_files(
    paths: Paths, classes: Sequence[str], text: str, image_size: int, *, also: str = ""
) -> Source:
    """Open image files; the label of an image is the name of its folder, if this is a class."""
    if not len(paths):
        raise ValueError(f"no images in {text!r}")

    @cache
    def folder_name(folder: str) -> str:
        return Path(folder).name or Path(folder).absolute().name  # '.' has none

    folders = (path.rpartition("/")[0] if "/" in path else "." for path in paths)
    names = [folder_name(folder) for folder in folders]
    labels, notes = known_labels(names, classes)
    folder_names = sorted(set(names))
    if labels is None and len(folder_names) > 1:  # they look like classes
        notes = (
            f"the model may be of another data set: its classes are {listed(classes)}, and none of "
            f"the images' folders is called so, but {listed(folder_names)}",
        )

    def rows(start: int) -> Iterator[Row]:
        for index in range(start, len(paths)):
            path = paths[index]
            yield path, path, labels[index] if labels else None

    return Source(
        size=len(paths),
        read=lambda size, start: decoded(
            rows(start), size, has_labels=labels is not None, image_size=image_size
        ),
        fingerprint=hashlib.sha256(paths.prefix.encode(errors="replace") + paths.text).hexdigest(),
        has_labels=labels is not None,
        files=lambda: [*filter(None, [also]), *paths] if also else paths,
        notes=notes,
    )


# Parquet


def _open_table(file: Path, classes: Sequence[str], column: str | None, image_size: int) -> Source:
    """Open a Parquet file; its column `label` has class names or their positions."""
    table = Table(file, column)
    if not table.num_rows:
        raise ValueError(f"no images in {str(file)!r}")
    known = dict(zip(classes, classes, strict=True))

    def label(value: object) -> str | None:
        if isinstance(value, int):
            return classes[value] if 0 <= value < len(classes) else None
        return known.get(value) if isinstance(value, str) else None

    def rows(start: int) -> Iterator[Row]:
        for index, (item, value) in enumerate(table.rows(start), start):
            name = item if isinstance(item, str) else f"{file}[{index}]"
            yield name, item, label(value)

    return Source(
        size=table.num_rows,
        read=lambda size, start: decoded(
            rows(start), size, has_labels=table.has_labels, image_size=image_size
        ),
        fingerprint=f"{_state(file)} {table.column}",
        has_labels=table.has_labels,
        files=lambda: chain([str(file)], table.paths()),
    )


def _state(file: Path) -> str:
    status = file.stat()
    return f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"


# Arrays


def _open_array(file: Path, classes: Sequence[str], image_size: int) -> Source:
    import numpy as np

    from cnn.images import MAX_PIXELS, resize

    images, given = read_arrays(file, max_pixels=MAX_PIXELS)
    if is_one_image(images.shape):
        images = images[np.newaxis]
    try:
        labels = None if given is None else class_names(given, classes, size=len(images))
    except ValueError as error:
        raise ValueError(f"{str(file)!r}: {error}") from error

    step = max(1, BYTES_AHEAD // images[0].nbytes)  # images that are mapped at once

    def chunk(part: slice) -> Chunk:
        firsts = range(part.start, part.stop, step)
        pieces = [slice(first, min(first + step, part.stop)) for first in firsts]
        return Chunk(
            images=np.concatenate([resize(_part(images, piece), image_size) for piece in pieces]),
            names=[f"{file}[{index}]" for index in range(part.start, part.stop)],
            labels=labels and labels[part],
        )

    return Source(
        size=len(images),
        read=lambda size, start: prefetch(chunk, parts(len(images), size, start), threads=1),
        fingerprint=_state(file),
        has_labels=labels is not None,
        files=lambda: [str(file)],
    )


def _part(images: npt.NDArray[Any], part: slice) -> npt.NDArray[Any]:
    """Return some of the images. A file is mapped again, because a map keeps what was read."""
    import numpy as np

    if isinstance(images, np.memmap) and (file := images.filename):
        order: Any = "C" if images.flags.c_contiguous else "F"
        images = np.memmap(file, images.dtype, "r", images.offset, images.shape, order=order)
    return images[part]
