"""Images in memory, or files by their paths, as the pixels that a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image
    from torch import Tensor

    Images: TypeAlias = npt.NDArray[Any] | Tensor | Image.Image | Path | str


def as_batch(
    images: Images | Sequence[Images], image_shape: tuple[int, int, int]
) -> npt.NDArray[np.uint8]:
    """Return images (N, H, W, C) uint8 of a model's shape; arrays that have it are not copied.

    Args:
        images: a path, an image of Pillow, an array of one or more images, or a list of such.
            Arrays are (H, W), (H, W, C) or (N, H, W, C) with C 1, 3 or 4, whose transparency is
            dropped. They are uint8, booleans, or floats in 0 .. 1.
        image_shape: height, width and channels that the model takes.

    Raises:
        ValueError: an image can't be read, or has another type, shape or range.
    """
    import numpy as np

    if isinstance(images, (list, tuple)):
        parts = [as_batch(image, image_shape) for image in images]
        return np.concatenate([np.empty((0, *image_shape), np.uint8), *parts])
    if isinstance(images, (str, Path)):
        return _resized(_read(Path(images), image_shape), image_shape)
    if hasattr(images, "getbands"):  # an image of Pillow
        return _resized(_of_pillow(images, image_shape), image_shape)
    array = np.asarray(images)
    if array.ndim == 4 and array.shape[1:] == image_shape and array.dtype == np.uint8:
        return array
    return _resized(_as_uint8(_with_channels(array), array), image_shape)


def _read(file: Path, image_shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    from cnn.images import decode

    return decode(file, image_shape[0])[None]


def _of_pillow(image: Any, image_shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    from cnn.images import pixels

    try:
        return pixels(image.copy(), image_shape[0])[None]  # a copy: turning it changes it
    except (OSError, ValueError) as error:
        raise ValueError(f"can't read the image {image!r}: {error}") from error


def _with_channels(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array as (N, H, W, C) with C 1 or 3."""
    batch = array
    if batch.ndim == 2:
        batch = batch[..., None]
    if batch.ndim == 3:
        batch = batch[None]
    if batch.ndim != 4 or batch.shape[3] not in (1, 3, 4) or 0 in batch.shape[1:]:
        raise _refusal(array)
    return batch[..., :3] if batch.shape[3] == 4 else batch


def _as_uint8(batch: npt.NDArray[Any], given: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    import numpy as np

    if batch.dtype == np.uint8:
        return batch
    if batch.dtype == bool:
        return batch.astype(np.uint8) * np.uint8(255)
    if not np.issubdtype(batch.dtype, np.floating):
        raise _refusal(given)
    low, high = (float(batch.min()), float(batch.max())) if batch.size else (0.0, 1.0)
    if not (low >= 0 and high <= 1):  # NaN as well
        raise ValueError(f"images of floats must be in 0 .. 1, not {low:.4g} .. {high:.4g}")
    scaled: npt.NDArray[np.uint8] = np.rint(batch * 255).astype(np.uint8)
    return scaled


def _resized(
    batch: npt.NDArray[np.uint8], image_shape: tuple[int, int, int]
) -> npt.NDArray[np.uint8]:
    if batch.shape[1:] == image_shape:
        return batch
    height, width, channels = image_shape
    if height != width or channels != 3:
        raise ValueError(f"this model takes images {image_shape}, to which none are resized")
    from cnn.images import resize

    return resize(batch, height)


def _refusal(array: npt.NDArray[Any]) -> ValueError:
    return ValueError(
        "an image must be a path, an image of Pillow, or an array (H, W), (H, W, C) or "
        "(N, H, W, C) with C 1, 3 or 4, of uint8 (0 to 255) or of floats (0 to 1): "
        f"this is {array.dtype} {array.shape}"
    )
