"""What `python -m tracking.predict` labels: image files, arrays, Parquet, or a split of a data set.

The one place of `tracking` that uses `cnn`, and only when a command is run: `cnn.images` and
`cnn.data` are imported inside the functions below, so that training and prediction decode and split
images by the same code. `import tracking` and `Predictor.predict` never load `cnn`.

Everything is read in chunks, and decoded in threads while the model is busy with the chunk before:
of each image no more than its name stays in memory. Only an `.npz` has to be unpacked whole. What a
user did wrong is a ValueError of one line; an image that can't be read is a row of its chunk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracking.ahead import ahead
from tracking.arrays import is_one_image, read_arrays
from tracking.inputs import Item, Paths, Table, listed_paths, read_list
from tracking.models.labels import class_names
from tracking.text import listed

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ARRAYS = (".npy", ".npz")
TABLES = (".parquet", ".pq")
SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}

# What a thread decodes at a time, and how many bytes of encoded images are read ahead at most.
_BLOCK = 32
_BYTES_AHEAD = 2**26


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some of the images, what they are called, and their labels where they are known."""

    images: npt.NDArray[np.uint8]  # (M, 32, 32, 3), of those that could be read
    names: list[str]  # of all N
    labels: list[str | None] | None  # class names
    errors: dict[int, str] = field(default_factory=dict)
    """Why the images at these of the N positions could not be read: the N - M others were."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Images to be labelled."""

    size: int
    read: Callable[[int, int], Iterator[Chunk]]
    """Read all images, so many at a time, from a certain one on."""
    fingerprint: str
    """Changes when the images do, as far as that can be told without reading them."""
    has_labels: bool
    files: Callable[[], Iterable[str]]
    """The files that are read: none of them may be written to."""
    notes: tuple[str, ...] = ()
    """What a user should know about them, a line each."""
    split: str | None = None
    """Which of a data set's splits they are: `train`, `validation` or `test`."""


def is_list(text: str) -> bool:
    """Return whether this names a list of paths: `@FILE`, or `-` for standard input."""
    return text == "-" or text.startswith("@")


def check(text: str) -> None:
    """Raise ValueError unless there is what `text` names. Quick: nothing is read."""
    if text == "-":
        return
    if text.startswith("@"):
        if not os.path.lexists(text[1:]):
            raise ValueError(
                f"there is no list {text[1:]!r} (a file called {text!r} is './{text}')"
            )
    elif not os.path.lexists(text):
        _split_named(text)


@dataclass(frozen=True, kw_only=True)
class KnownData:
    """A data set that runs on this machine may have been trained on."""

    name: str
    """As their param `dataset` has it."""
    digests: tuple[str, ...]
    """As their param `dataset_digest` has it: the present one first, then earlier ones."""


def dataset_of(text: str, data_dir: Path) -> KnownData | None:
    """Return the data set that what a user named is of, as far as that can be told quickly.

    `NAME:SPLIT` is of NAME. A folder or a file is of the innermost folder around it that `cnn.data`
    has read before, as the cache in `data_dir` remembers it. Of others (lists, arrays, tables,
    folders that were never trained on), nothing is known.

    Raises:
        ValueError: there is no such data set, or it can't be read.
    """
    if is_list(text):
        return None
    if not os.path.lexists(text):
        from cnn import data

        dataset = data.load(_split_named(text)[0], data_dir=data_dir, seed=0)
        return KnownData(name=dataset.name, digests=(dataset.digest,))
    place = Path(text).resolve()
    if not place.is_dir() and place.suffix.lower() in (*ARRAYS, *TABLES):
        return None  # it may lie among the images, and be made of others
    digests = _digests_by_folder(data_dir)
    for folder in map(str, (place, *place.parents)):
        if folder in digests:
            return KnownData(name=Path(folder).name, digests=digests[folder])
    return None


def _digests_by_folder(data_dir: Path) -> dict[str, tuple[str, ...]]:
    """Return the folders that `cnn.data` has read, each with its digests, the latest first."""
    found: dict[str, dict[str, None]] = {}
    index = sorted((data_dir / "cache" / "index").glob("*.json"), key=_age)
    for file in index:
        try:
            entry = json.loads(file.read_text("utf-8"))
            found.setdefault(str(entry["source"]), {})[str(entry["digest"])] = None
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: `cnn.data` will mend it
    return {folder: tuple(digests) for folder, digests in found.items()}


def _age(file: Path) -> float:
    try:
        return -file.stat().st_mtime
    except OSError:
        return 0.0


def open_source(
    text: str,
    *,
    classes: Sequence[str],
    metadata: Mapping[str, Any],
    data_dir: Path,
    column: str | None = None,
) -> Source:
    """Open what a user named, for a model to label.

    Args:
        text: a folder, an image, a list of paths (`@FILE`, `-`), an `.npy`, `.npz` or `.parquet`
            file, or `NAME:SPLIT`.
        classes: the model's class names; images of other classes count as unlabelled.
        metadata: the model's: a split is drawn with its `seed`.
        data_dir: where `cnn.data` keeps data sets.
        column: where the images are in a Parquet file.
    """
    path = Path(text)
    suffix = "" if is_list(text) or os.path.isdir(text) else path.suffix.lower()  # noqa: PTH112
    if column and suffix not in TABLES:
        raise ValueError(f"--column is for Parquet files: {text!r} is none")
    if is_list(text):
        return _open_files(read_list(text), classes, text, also=text[1:])
    if not os.path.lexists(path):
        name, split = _split_named(text)
        return _open_split(name, split, classes, metadata, data_dir)
    if os.path.isdir(text):  # noqa: PTH112 -- where `Path` raises an error for a name too long
        return _noted(_open_folder(path, classes), text, metadata, data_dir)
    if suffix in ARRAYS:
        return _open_array(path, classes)
    if suffix in TABLES:
        return _open_table(path, classes, column)
    image = _open_files(listed_paths([text], prefix=""), classes, text)
    return _noted(image, text, metadata, data_dir)


def _noted(source: Source, text: str, metadata: Mapping[str, Any], data_dir: Path) -> Source:
    """Add a note if files are of a data set that the model was not trained on."""
    known, trained_on = dataset_of(text, data_dir), metadata.get("dataset_digest")
    if known is None or trained_on is None or trained_on in known.digests:
        return source
    note = (
        f"the model was trained on other data ({metadata.get('dataset')!r}, digest {trained_on}) "
        f"than this is of ({known.name!r}, digest {known.digests[0]})"
    )
    return replace(source, notes=(*source.notes, note))


# Image files


def _open_folder(folder: Path, classes: Sequence[str]) -> Source:
    from cnn.images import note_on_passed_over, walk

    prefix = str(folder / "x")[:-1]  # '' for the working folder
    passed_over: Counter[str] = Counter()
    paths = listed_paths(walk(folder, passed_over), prefix=prefix)
    source = _open_files(paths, classes, str(folder))
    return replace(source, notes=(*note_on_passed_over(passed_over), *source.notes))


def _open_files(paths: Paths, classes: Sequence[str], text: str, *, also: str = "") -> Source:
    """Open image files; the label of each is the name of its folder, if that is a class."""
    if not len(paths):
        raise ValueError(f"no images in {text!r}")

    @cache
    def folder_name(folder: str) -> str:
        return Path(folder).name or Path(folder).absolute().name  # '.' has none

    folders = (path.rpartition("/")[0] if "/" in path else "." for path in paths)
    names = [folder_name(folder) for folder in folders]
    labels, notes = _known(names, classes)
    folders_names = sorted(set(names))
    if labels is None and len(folders_names) > 1:  # they look like classes
        notes = (
            f"the model may be of another data set: its classes are {listed(classes)}, and none of "
            f"the images' folders is called so, but {listed(folders_names)}",
        )

    def rows(start: int) -> Iterator[Row]:
        for index in range(start, len(paths)):
            path = paths[index]
            yield path, path, labels[index] if labels else None

    return Source(
        size=len(paths),
        read=lambda size, start: _decoded(rows(start), size, has_labels=labels is not None),
        fingerprint=hashlib.sha256(paths.prefix.encode(errors="replace") + paths.text).hexdigest(),
        has_labels=labels is not None,
        files=lambda: [*filter(None, [also]), *paths] if also else paths,
        notes=notes,
    )


Row = tuple[str, Item, str | None]
"""What an image is called, itself, and its label."""


def _decoded(rows: Iterator[Row], size: int, *, has_labels: bool) -> Iterator[Chunk]:
    """Decode images in threads, ahead of what is asked for: up to two chunks, or some megabytes."""
    from cnn.devices import num_cores

    names: list[str] = []
    labels: list[str | None] = []
    results: list[npt.NDArray[np.uint8] | str] = []
    for block, decoded in ahead(_decode, _blocks(rows, size), threads=num_cores()):
        names += [name for name, _, _ in block]
        labels += [label for _, _, label in block]
        results += decoded
        if len(names) == size:
            yield _chunk(names, results, labels if has_labels else None)
            names, labels, results = [], [], []
    if names:
        yield _chunk(names, results, labels if has_labels else None)


def _blocks(rows: Iterator[Row], size: int) -> Iterator[tuple[list[Row], float]]:
    """Yield some rows at a time, which never reach beyond the end of a chunk, and their weight."""
    block: list[Row] = []
    count = weight = 0.0
    for row in rows:
        block.append(row)
        count += 1
        weight += 1 / (2 * size + _BLOCK)
        if isinstance(row[1], bytes):
            weight += len(row[1]) / _BYTES_AHEAD
        if len(block) == _BLOCK or count == size:
            yield block, weight
            block, weight = [], 0.0
            count %= size
    if block:
        yield block, weight


def _decode(block: list[Row]) -> tuple[list[Row], list[npt.NDArray[np.uint8] | str]]:
    """Return the rows, without encoded images, and of each its pixels, or why there are none."""
    from cnn.images import decode

    results: list[npt.NDArray[np.uint8] | str] = []
    for _, item, _ in block:
        try:
            if item is None:
                results.append("there is no image")
            elif isinstance(item, ValueError):
                results.append(str(item))
            else:
                results.append(decode(item if isinstance(item, bytes) else Path(item)))
        except ValueError as error:
            name = f"{str(Path(item))!r} " if isinstance(item, str) else ""
            results.append(str(error).removeprefix(name))  # the row names it already
        except OSError as error:  # a name that is too long, say
            results.append(f"can't be read: {error.strerror}")
    return [(name, None, label) for name, _, label in block], results


def _chunk(
    names: list[str],
    results: list[npt.NDArray[np.uint8] | str],
    labels: list[str | None] | None,
) -> Chunk:
    import numpy as np

    from cnn.images import IMAGE_SIZE

    images = [result for result in results if not isinstance(result, str)]
    empty = np.empty((0, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    errors = {index: text for index, text in enumerate(results) if isinstance(text, str)}
    return Chunk(
        images=np.stack(images) if images else empty, names=names, labels=labels, errors=errors
    )


# Parquet


def _open_table(file: Path, classes: Sequence[str], column: str | None) -> Source:
    """Open a Parquet file; a column `label` of class names or their positions holds the labels."""
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
        read=lambda size, start: _decoded(rows(start), size, has_labels=table.has_labels),
        fingerprint=f"{_state(file)} {table.column}",
        has_labels=table.has_labels,
        files=lambda: chain([str(file)], table.paths()),
    )


def _state(file: Path) -> str:
    status = file.stat()
    return f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"


# Arrays


def _open_array(file: Path, classes: Sequence[str]) -> Source:
    import numpy as np

    from cnn.images import MAX_PIXELS, resize

    images, given = read_arrays(file, max_pixels=MAX_PIXELS)
    if is_one_image(images.shape):
        images = images[np.newaxis]
    try:
        labels = None if given is None else class_names(given, classes, size=len(images))
    except ValueError as error:
        raise ValueError(f"{str(file)!r}: {error}") from error

    def pieces(part: slice) -> Iterator[slice]:
        """Yield what is mapped at once: of large images few."""
        step = max(1, _BYTES_AHEAD // images[0].nbytes)
        for first in range(part.start, part.stop, step):
            yield slice(first, min(first + step, part.stop))

    def chunk(part: slice) -> Chunk:
        return Chunk(
            images=np.concatenate([resize(_part(images, some)) for some in pieces(part)]),
            names=[f"{file}[{index}]" for index in range(part.start, part.stop)],
            labels=labels and labels[part],
        )

    return Source(
        size=len(images),
        read=lambda size, start: ahead(chunk, _parts(len(images), size, start), threads=1),
        fingerprint=_state(file),
        has_labels=labels is not None,
        files=lambda: [str(file)],
    )


def _part(images: npt.NDArray[Any], part: slice) -> npt.NDArray[Any]:
    """Return some of the images. A file is mapped anew: what was read of it stays with a map."""
    import numpy as np

    if isinstance(images, np.memmap) and images.filename is not None:
        order: Any = "C" if images.flags.c_contiguous else "F"
        images = np.memmap(
            images.filename, images.dtype, "r", images.offset, images.shape, order=order
        )
    return images[part]


# Splits of data sets


def _split_named(text: str) -> tuple[str, str]:
    name, colon, split = text.rpartition(":")
    if not colon or not name:
        raise ValueError(
            f"there is no {text!r}: give a folder, an image, a list of paths (@FILE, or - for "
            "standard input), an .npy, .npz or .parquet file, or a split, say digits:test"
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
    notes = (*dataset.notes, *notes)
    if dataset.digest != metadata.get("dataset_digest"):
        notes += (
            f"the model was trained on other data (digest {metadata.get('dataset_digest')}) than "
            f"{name} is now ({dataset.digest}): its splits may overlap with what it has seen",
        )

    def chunk(part: slice) -> Chunk:
        positions = torch.arange(part.start, part.stop)
        return Chunk(
            images=images.batch(positions)[0].numpy(),
            names=[f"{name}:{split}[{index}]" for index in positions.tolist()],
            labels=labels and labels[part],
        )

    return Source(
        size=len(images),
        read=lambda size, start: ahead(chunk, _parts(len(images), size, start), threads=1),
        fingerprint=f"{dataset.digest} {split} {metadata['seed']}",
        has_labels=labels is not None,
        files=lambda: _files_below(name),
        notes=notes,
        split=split,
    )


def _files_below(name: str) -> list[str]:
    from cnn.images import find_images

    folder = Path(name)
    return [str(file) for file in find_images(folder)] if folder.is_dir() else []


# What they share


def _parts(size: int, step: int, start: int) -> Iterator[tuple[slice, float]]:
    """Yield the parts of `size` images from `start` on, each with a weight: two are read ahead."""
    for first in range(start, size, step):
        yield slice(first, min(first + step, size)), 0.4


def _known(
    names: Sequence[str], classes: Sequence[str]
) -> tuple[list[str | None] | None, tuple[str, ...]]:
    """Return the names that are classes of the model as labels, and a note if others are not.

    Where none is, there are no labels, and nothing to note: they need not be names of classes.
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
        f"class {listed(others)}",
    )
