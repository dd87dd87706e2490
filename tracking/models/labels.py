"""The true classes of images, by name or by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tracking.text import listed, shortened

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Labels = Sequence[str | None] | Sequence[int] | npt.NDArray[Any]

_LONGEST_LABEL = 10_000
# Labels that become Python objects at once: each takes up to 40 kB.
_LABELS_AT_ONCE = 2**12


def class_names(labels: Labels, classes: Sequence[str], *, size: int) -> list[str | None]:
    """Return labels as class names, from class names, None, or positions in `classes`.

    Raises ValueError for other labels, and for another number than `size`.
    """
    import numpy as np

    array: npt.NDArray[Any] = np.asarray(labels)
    check_labels(array.shape, array.dtype, size=size)
    names: dict[Any, str | None] = {name: name for name in classes} | {None: None}
    if array.dtype.kind in "iu":
        wrong = array[(array < 0) | (array >= len(classes))]
        if len(wrong):
            raise ValueError(f"label {wrong[0]} is not in 0 to {len(classes) - 1}")
        names = dict(enumerate(classes))
    found: list[str | None] = []
    for start in range(0, size, _LABELS_AT_ONCE):
        for label in array[start : start + _LABELS_AT_ONCE].tolist():
            if label not in names:
                name = shortened(str(label), 100)
                raise ValueError(f"label {name!r} is no class of the model: {listed(classes)}")
            found.append(names[label])
    return found


def check_labels(shape: tuple[int, ...], dtype: np.dtype[Any], *, size: int) -> None:
    """Raise ValueError if an array can't be the labels of `size` images."""
    if shape != (size,):
        raise ValueError(f"{size} images need as many labels, not an array {shape}")
    if size and dtype.kind not in "iuUO":
        raise ValueError(f"labels must be class names or integers, not {dtype}")
    if dtype.kind == "U" and dtype.itemsize > 4 * _LONGEST_LABEL:
        raise ValueError(
            f"labels of {dtype.itemsize // 4:,} letters are refused: {_LONGEST_LABEL:,} at most"
        )
