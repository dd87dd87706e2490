"""Images and labels in memory, as a user's function or a table gives them: checked, as a pool."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cnn.cache import ImagePool, Integers
from cnn.images import empty_images, resize

_LABELS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """The labels of a data set as positions of its class names."""

    train: Integers  # (N,)
    test: Integers  # (T,); T = 0: there is no given test split
    classes: tuple[str, ...]


def labelled(
    train: npt.NDArray[Any],
    test: npt.NDArray[Any] | None,
    classes: Sequence[str] | None = None,
) -> Labelled:
    """Return labels as positions of class names, or raise ValueError in one line.

    Args:
        train: labels (N,), integers or texts.
        test: those of a given test split, None if there is none.
        classes: the class names, of which integers are the positions; None: the labels of `train`,
            sorted.
    """
    for name, values in (("labels", train), ("test labels", test)):
        if values is not None and values.dtype.kind not in "iuU":
            raise ValueError(f"{name} are {values.dtype}: they must be integers or texts")
    if classes is None or train.dtype.kind == "U":
        known = np.unique(train)
        names = tuple(map(str, known)) if classes is None else tuple(classes)
        known = known if classes is None else np.array(names, np.str_)
    else:
        names = tuple(classes)
        known = np.arange(len(names))
    if len(set(names)) < len(names):
        raise ValueError(f"classes has a name twice: {_shown(names)}")
    if len(names) < 2:
        raise ValueError(f"there is only one class, {_shown(names)}: there must be two or more")
    parts = [
        _positions(values, known, name)
        for name, values in (("labels", train), ("test labels", test))
        if values is not None
    ]
    least = 3 if test is None else 2  # each split gets one, and a given test split is apart
    for position, count in enumerate(np.bincount(parts[0], minlength=len(names))):
        if count < least:
            raise ValueError(
                f"class {names[position]!r} has {count} images: at least {least} are needed, one "
                "for each split"
            )
    none = np.empty(0, np.int64)
    return Labelled(train=parts[0], test=parts[1] if len(parts) > 1 else none, classes=names)


def _positions(labels: npt.NDArray[Any], known: npt.NDArray[Any], name: str) -> Integers:
    is_text = labels.dtype.kind == "U"
    if is_text != (known.dtype.kind == "U"):
        kinds = ("texts", "integers") if is_text else ("integers", "texts")
        raise ValueError(f"{name} are {kinds[0]}, and those for training are {kinds[1]}")
    order = np.argsort(known)
    found = order[np.searchsorted(known, labels, sorter=order).clip(max=len(known) - 1)]
    others = np.unique(labels[known[found] != labels])
    if len(others):
        raise ValueError(
            f"{name} has {_shown(others.tolist())}, which is no class: {_shown(known)}"
        )
    positions: Integers = found.astype(np.int64)
    return positions


def _shown(values: Sequence[Any] | npt.NDArray[Any]) -> str:
    more = ", …" if len(values) > _LABELS_SHOWN else ""
    plain = [value.item() if isinstance(value, np.generic) else value for value in values]
    return ", ".join(map(repr, plain[:_LABELS_SHOWN])) + more


def pool_of(
    images: npt.NDArray[np.uint8],
    test_images: npt.NDArray[np.uint8] | None,
    labels: Labelled,
    image_size: int,
) -> ImagePool:
    """Return images (N, H, W), (N, H, W, 1) or (N, H, W, 3), resized, with their labels."""
    parts = [images] if test_images is None else [images, test_images]
    resized = empty_images(sum(map(len, parts)), image_size)
    start = 0
    for part in parts:
        resized[start : start + len(part)] = resize(part, image_size)
        start += len(part)
    return ImagePool(
        images=resized,
        labels=np.concatenate([labels.train, labels.test]),
        classes=labels.classes,
        given_test=len(labels.test),
    )
