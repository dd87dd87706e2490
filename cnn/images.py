"""Image files and arrays to 32×32 RGB pixels: the one way of decoding, for training and prediction.

Needs numpy and Pillow only, so that a prediction doesn't have to import torch to read its images;
and Pillow only where it decodes, so that training from memory does without.
"""

from __future__ import annotations

import io
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SIZE = 32

# Named, so that a stray file is not handed to one of Pillow's forty parsers (EPS starts
# Ghostscript), and so that what is read doesn't depend on which plugins were imported before.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "JPEG2000", "PPM", "TIFF", "WEBP")

# What a file may ask for, looked at before anything is decoded: a few bytes can stand for gigabytes
# of pixels. The first is where Pillow would warn.
MAX_PIXELS = 89_478_485
MAX_BYTES = 2**29

_NAMES_SHOWN = 3

# Images of more pixels than this are decoded one at a time, so that threads don't add up.
_LARGE = 2**25
_one_large_image = threading.Lock()

# Files and folders that systems and file managers leave behind, in lower case, beside those whose
# name starts with a dot: of Windows, macOS, Linux, Synology, QNAP and NetApp. Some hold thumbnails
# or deleted images.
_SYSTEM_NAMES = {
    "thumbs.db",
    "thumbs.db:encryptable",
    "ehthumbs.db",
    "ehthumbs_vista.db",
    "desktop.ini",
    "$recycle.bin",
    "system volume information",
    "found.000",
    "icon\r",
    "icon\uf00d",  # the same on a network drive
    "__macosx",
    "network trash folder",
    "temporary items",
    "lost+found",
    "@eadir",
    "#recycle",
    "#snapshot",
    "@recycle",
    "@recently-snapshot",
    "~snapshot",
}


def is_system_name(name: str) -> bool:
    """Return whether a file or folder of this name is passed over: hidden, or a system's own."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def count_passed_over(name: str, passed_over: Counter[str]) -> None:
    """Count a system's file or folder; those that macOS writes beside each file, as one name."""
    passed_over["._*" if name.startswith("._") else name] += 1


def find_images(folder: Path) -> list[Path]:
    """Return all files below `folder`, sorted by their path relative to it.

    Leaves out hidden files and folders, and those of systems. Follows links, but enters each folder
    once, so that a link to a folder above ends. Whether a file is an image, `decode` finds out.
    Raises ValueError where a folder can't be listed.
    """
    return [folder / name for name in walk(folder)]


def walk(folder: Path, passed_over: Counter[str] | None = None) -> Iterator[str]:
    """Yield the relative paths of what `find_images` returns, without keeping them.

    What is left out is counted in `passed_over` by its name, a folder as one.
    """
    try:
        yield from _walk(folder, "", set(), Counter() if passed_over is None else passed_over)
    except OSError as error:
        raise ValueError(f"can't list the folder {str(folder)!r}: {error}") from error


def note_on_passed_over(passed_over: Counter[str]) -> tuple[str, ...]:
    """Return a line on the system files and folders that were passed over, if there were any."""
    if not passed_over:
        return ()
    names = [f"{name!r} ({count:,})" for name, count in passed_over.most_common(_NAMES_SHOWN)]
    more = len(passed_over) - len(names)
    others = f" and {more:,} other names" if more else ""
    total = f"{passed_over.total():,} hidden or system files or folders"
    return (f"passed over {total}: {', '.join(names)}{others}",)


def _walk(
    folder: Path, prefix: str, entered: set[tuple[int, int]], passed_over: Counter[str]
) -> Iterator[str]:
    status = folder.stat()
    if (status.st_dev, status.st_ino) in entered:
        return
    entered.add((status.st_dev, status.st_ino))
    names = []
    with os.scandir(folder) as scan:
        for entry in scan:
            if is_system_name(entry.name):
                count_passed_over(entry.name, passed_over)
            else:
                names.append(entry.name + "/" * _is_folder(entry))
    names.sort()
    # With the slash, so that what comes out is in the order of whole paths: `b-c.png` before `b/`.
    for name in names:
        if name.endswith("/"):
            yield from _walk(folder / name, prefix + name, entered, passed_over)
        else:
            yield prefix + name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, say: `decode` finds out
        return False


def decode(source: Path | bytes) -> npt.NDArray[np.uint8]:
    """Return an image file, or the bytes of one, as uint8 pixels (32, 32, 3).

    Turned as its EXIF orientation says, converted to RGB (transparency is dropped, as torchvision's
    ImageFolder does), and squashed to a square where it has another size. Of an animation, the
    first frame. Raises ValueError, which names the file, for what is no readable image, or has more
    than MAX_PIXELS or MAX_BYTES.
    """
    from PIL import Image, UnidentifiedImageError

    name = f"{len(source)} bytes" if isinstance(source, bytes) else repr(str(source))
    encoded = source if isinstance(source, bytes) else _read(source)
    if not encoded:
        raise ValueError(f"{name} is no image: it is empty")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image, _room_for(image):
            return _pixels(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} is refused: it has more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is no image (known: {', '.join(FORMATS)})") from error
    except MemoryError:
        raise
    except Exception as error:  # a parser that trips over a damaged file may raise anything
        raise ValueError(f"{name} is no readable image: {_one_line(error)}") from error


def _read(file: Path) -> bytes:
    # Asked first, because opening a named pipe would wait for ever.
    if not file.is_file():
        raise ValueError(f"{str(file)!r} is no image: it is not there, or not a regular file")
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(
                f"{str(file)!r} is refused: it has {size:,} bytes, more than {MAX_BYTES:,}"
            )
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{str(file)!r} can't be read: {error.strerror}") from error


def _room_for(image: Image.Image) -> AbstractContextManager[object]:
    """Refuse an image that is too large, before it is decoded; let large ones wait for another."""
    from PIL import Image

    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise Image.DecompressionBombError
    return _one_large_image if pixels > _LARGE else nullcontext()


def _pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    from PIL import ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    elif image.mode == "F":
        raise ValueError("its pixels are floats, without a known range: save it with 8 or 16 bits")
    # RGB has no place for it, and Pillow warns of what it can't convert.
    image.info.pop("transparency", None)
    rgb = image.convert("RGB")
    if rgb.size != (IMAGE_SIZE, IMAGE_SIZE):
        rgb = _squash(rgb)
    return np.array(rgb)


def _from_16_bits(image: Image.Image) -> Image.Image:
    from PIL import Image

    # Pillow's own conversion clips at 255 instead of scaling.
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"its pixels range from {values.min()} to {values.max()}, more than 16 bits hold"
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _squash(image: Image.Image) -> Image.Image:
    from PIL import Image

    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def resize(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return images as (N, 32, 32, 3), interpolated as `decode` does it.

    Takes uint8 arrays (N, H, W), (N, H, W, 1) or (N, H, W, 3); where nothing is to be changed,
    the array itself comes back. Raises ValueError for others.
    """
    from PIL import Image

    allowed = "uint8 and (N, H, W), (N, H, W, 1) or (N, H, W, 3), H and W ≥ 1"
    grey = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 1)
    colour = images.ndim == 4 and images.shape[3] == 3
    if images.dtype != np.uint8 or not (grey or colour) or 0 in images.shape[1:3]:
        raise ValueError(f"images must be {allowed}: these are {images.dtype} {images.shape}")
    if images.shape[1:] == (IMAGE_SIZE, IMAGE_SIZE, 3):
        return images
    squared = np.empty((len(images), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    planes = images.reshape(images.shape[:3]) if grey else images
    for result, plane in zip(squared, planes, strict=True):
        pixels = np.asarray(_squash(Image.fromarray(plane)))
        result[:] = pixels[:, :, None] if grey else pixels
    return squared
