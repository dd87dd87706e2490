"""Images to predict, in chunks: the next ones are decoded while the model is busy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
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

# What a thread decodes at a time, and how many bytes of encoded images are read ahead at most.
_BLOCK = 32

BYTES_AHEAD = 2**26


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


Row = tuple[str, Item, str | None]
"""What an image is called, itself, and its label."""


def decoded(rows: Iterator[Row], size: int, *, has_labels: bool) -> Iterator[Chunk]:
    """Decode images in threads, ahead of what is asked for: up to two chunks, or some megabytes."""
    from cnn.devices import num_cores

    names: list[str] = []
    labels: list[str | None] = []
    results: list[npt.NDArray[np.uint8] | str] = []
    for block, decoded in prefetch(_decode, _blocks(rows, size), threads=num_cores()):
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
            weight += len(row[1]) / BYTES_AHEAD
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


def parts(size: int, step: int, start: int) -> Iterator[tuple[slice, float]]:
    """Yield the parts of `size` images from `start` on, each with a weight: two are read ahead."""
    for first in range(start, size, step):
        yield slice(first, min(first + step, size)), 0.4


def known_labels(
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
