"""Images to predict, in chunks; the next chunks are decoded while the model is busy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tracking.prediction.inputs import Item
from tracking.prediction.prefetch import prefetch
from tracking.text import listed

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


ARRAYS = (".npy", ".npz")

TABLES = (".parquet", ".pq")

# The images that a thread decodes at once, and the bytes of encoded images that are prefetched.
_BLOCK = 32

BYTES_AHEAD = 2**26


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some images, their names, and their labels if they are known."""

    images: npt.NDArray[np.uint8]  # (M, S, S, 3), of those that could be read
    names: list[str]  # of all N
    labels: list[str | None] | None  # class names
    errors: dict[int, str] = field(default_factory=dict)
    """Why N - M images could not be read, by their position among the N."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Images to predict."""

    size: int
    read: Callable[[int, int], Iterator[Chunk]]
    """Yields the images in chunks of a size, from a position on."""
    fingerprint: str
    """Changes with the images, as far as this is visible without reading them."""
    has_labels: bool
    files: Callable[[], Iterable[str]]
    """The files that are read: none may be written to."""
    notes: tuple[str, ...] = ()
    """What a user should know about them, in one line each."""
    split: str | None = None
    """The split of a data set, if they are one: `train`, `validation` or `test`."""


def image_at(source: Source, row: int) -> npt.NDArray[np.uint8] | None:
    """Return the image (S, S, 3) at a position; None if it can't be read (any more)."""
    chunk = next(source.read(1, row), None)
    return None if chunk is None or not len(chunk.images) else chunk.images[0]


def is_list(text: str) -> bool:
    """Return whether a source is a list of paths: `@FILE`, or `-` for standard input."""
    return text == "-" or text.startswith("@")


Row = tuple[str, Item, str | None]
"""The name of an image, the image, and its label."""


def decoded(
    rows: Iterator[Row], size: int, *, has_labels: bool, image_size: int
) -> Iterator[Chunk]:
    """Decode images in threads, and prefetch up to two chunks or 64 MiB of encoded images."""
    from cnn.devices import num_cores

    some: list[tuple[str, npt.NDArray[np.uint8] | str, str | None]] = []
    decode = partial(_decode, image_size=image_size)
    for block in prefetch(decode, _blocks(rows, size), threads=num_cores()):
        some += block
        if len(some) == size:
            yield _chunk(some, has_labels=has_labels, image_size=image_size)
            some = []
    if some:
        yield _chunk(some, has_labels=has_labels, image_size=image_size)


def _blocks(rows: Iterator[Row], size: int) -> Iterator[tuple[list[Row], float]]:
    """Yield blocks of rows and their weights. A chunk begins with a new block."""
    block: list[Row] = []
    count = weight = 0.0
    for row in rows:
        block.append(row)
        count += 1
        weight += 1 / (2 * size + _BLOCK)
        if isinstance(row[1], bytes):
            weight += len(row[1]) / BYTES_AHEAD
        if len(block) == _BLOCK or count == size:
            yield block, weight
            block, weight = [], 0.0
            count %= size
    if block:
        yield block, weight


def _decode(
    block: list[Row], *, image_size: int
) -> list[tuple[str, npt.NDArray[np.uint8] | str, str | None]]:
    """Return the name of each image, its pixels or its error, and its label."""
    from cnn.images import decode

    results: list[npt.NDArray[np.uint8] | str] = []
    for _, item, _ in block:
        try:
            if item is None:
                results.append("there is no image")
            elif isinstance(item, ValueError):
                results.append(str(item))
            else:
                source = item if isinstance(item, bytes) else Path(item)
                results.append(decode(source, image_size))
        except ValueError as error:
            name = f"{str(Path(item))!r} " if isinstance(item, str) else ""
            results.append(str(error).removeprefix(name))  # the row has the name
        except OSError as error:  # a name that is too long
            results.append(f"can't be read: {error.strerror}")
    return [(name, result, label) for (name, _, label), result in zip(block, results, strict=True)]


def _chunk(
    rows: list[tuple[str, npt.NDArray[np.uint8] | str, str | None]],
    *,
    has_labels: bool,
    image_size: int,
) -> Chunk:
    import numpy as np

    images = [result for _, result, _ in rows if not isinstance(result, str)]
    return Chunk(
        images=np.array(images, np.uint8).reshape(-1, image_size, image_size, 3),
        names=[name for name, _, _ in rows],
        labels=[label for _, _, label in rows] if has_labels else None,
        errors={index: text for index, (_, text, _) in enumerate(rows) if isinstance(text, str)},
    )


def parts(size: int, step: int, start: int) -> Iterator[tuple[slice, float]]:
    """Yield the parts of `size` images from `start` on, weighted so that two are prefetched."""
    for first in range(start, size, step):
        yield slice(first, min(first + step, size)), 0.4


def known_labels(
    names: Sequence[str], classes: Sequence[str]
) -> tuple[list[str | None] | None, tuple[str, ...]]:
    """Return as labels the names that are classes, and a note about the others.

    If no name is a class, there are no labels and no note.
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
