"""Data sets that a user's function returns as arrays."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cnn.arrays import labelled, pool_of
from cnn.cache import DatasetSource, ImagePool
from cnn.references import digest_of, resolve

_KEYS = ("images", "labels", "test_images", "test_labels", "classes")

ALLOWED = (
    "a mapping with 'images' uint8 (N, H, W, 3) or (N, H, W) and 'labels' (N,), integers or texts, "
    "and optionally 'test_images', 'test_labels' and 'classes'; or a tuple (images, labels) or "
    "(images, labels, test_images, test_labels)"
)


def source_of(reference: str) -> DatasetSource:
    """Return the source of the arrays that a function returns. It is called without arguments.

    The images are kept until the file that defines the function changes: see `digest_of`.
    """
    place, _, name = reference.rpartition(":")
    if place.endswith(".py"):
        place = str(Path(place).resolve())
    return DatasetSource(
        name=f"{Path(place).name}:{name}",
        address=f"{place}:{name}",
        fingerprint=lambda: [place, digest_of(reference)],
        read=lambda image_size: _read(reference, image_size),
        notes_if_cached=(
            f"the images are those that {reference!r} returned before: they are kept until its "
            "file changes, whatever else it reads",
        ),
    )


def _read(reference: str, image_size: int) -> ImagePool:
    function: Any = resolve(reference)
    try:
        returned = function()
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        message = " ".join(str(error).split())
        raise ValueError(f"{reference!r} raised {type(error).__name__}: {message}") from error
    try:
        return _pool(_parts(returned), image_size)
    except ValueError as error:
        raise ValueError(f"what {reference!r} returned can't be used: {error}") from error


def _parts(returned: object) -> dict[str, Any]:
    """Return what a function returned, by `_KEYS`."""
    if isinstance(returned, Mapping):
        unknown = [key for key in returned if key not in _KEYS]
        if unknown:
            raise ValueError(f"it has {unknown[0]!r}; allowed is {ALLOWED}")
        parts = dict(returned)
    elif isinstance(returned, tuple) and len(returned) in (2, 4):
        parts = dict(zip(_KEYS, returned, strict=False))
    else:
        size = f" of {len(returned)}" if isinstance(returned, tuple) else ""
        raise ValueError(f"it is a {type(returned).__name__}{size}; allowed is {ALLOWED}")
    parts = {key: value for key, value in parts.items() if value is not None}
    for key in ("images", "labels"):
        if key not in parts:
            raise ValueError(f"it has no {key!r}; allowed is {ALLOWED}")
    if ("test_images" in parts) != ("test_labels" in parts):
        raise ValueError("it has one of 'test_images' and 'test_labels' without the other")
    return parts


def _pool(parts: Mapping[str, Any], image_size: int) -> ImagePool:
    images = _images("images", parts["images"])
    labels = _labels("labels", parts["labels"], images)
    test_images = test_labels = None
    if "test_images" in parts:
        test_images = _images("test_images", parts["test_images"])
        test_labels = _labels("test_labels", parts["test_labels"], test_images)
    classes = parts.get("classes")
    if classes is not None:
        classes = _classes(classes)
    return pool_of(images, test_images, labelled(labels, test_labels, classes), image_size)


def _images(name: str, value: object) -> npt.NDArray[np.uint8]:
    array = _array(name, value)
    is_image = array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3))
    if array.dtype != np.uint8 or not is_image:
        hint = ""
        if array.ndim == 4 and array.shape[1] in (1, 3):
            hint = ", colours last"
        raise ValueError(
            f"{name} is {array.dtype} {array.shape}: it must be uint8 (0 to 255) and (N, H, W, 3) "
            f"or (N, H, W){hint}"
        )
    if 0 in array.shape:
        raise ValueError(f"{name} has no images or no pixels: its shape is {array.shape}")
    return array


def _labels(name: str, value: object, images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array = _array(name, value)
    if array.dtype == object and all(isinstance(each, str) for each in array.flat):
        array = array.astype(np.str_)  # a column of pandas, say
    if array.ndim != 1 or array.dtype.kind not in "iuU":
        odd = ""
        if array.dtype.kind == "f" and (missing := int(np.isnan(array).sum())):
            odd = f", {missing:,} of them NaN"
        if array.dtype == object:
            odd = f" with {next(each for each in array.flat if not isinstance(each, str))!r}"
        raise ValueError(
            f"{name} is {array.dtype} {array.shape}{odd}: it must be (N,), integers or texts"
        )
    if len(array) != len(images):
        raise ValueError(f"there are {len(images):,} images and {len(array):,} {name}")
    return array


def _classes(value: object) -> tuple[str, ...]:
    is_list = isinstance(value, (list, tuple, np.ndarray))
    names: list[object] = list(value) if is_list else []  # type: ignore[call-overload]
    others = [repr(name) for name in names if not isinstance(name, str)]
    if not is_list or others:
        found = f"has {others[0]}" if others else f"is a {type(value).__name__}"
        raise ValueError(f"classes {found}: it must be a list of texts")
    return tuple(map(str, names))


def _array(name: str, value: object) -> npt.NDArray[Any]:
    try:
        return np.asarray(value)
    except Exception as error:  # what is no array may raise anything
        message = " ".join(str(error).split())
        raise ValueError(f"{name} is no array: {message}") from error
