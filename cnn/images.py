"""Image files and arrays to 32×32 RGB pixels: the one way of decoding, for training and prediction.

Needs numpy and Pillow only, so that a prediction doesn't have to import torch to read its images;
and Pillow only where it decodes, so that training from memory does without.
"""

from __future__ import annotations

import io
import math
import os
import re
import resource
import stat
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
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
# of pixels. The first is where Pillow would warn; of longer sides, its tables for resizing would
# take gigabytes.
MAX_PIXELS = 89_478_485
MAX_SIDE = 1_000_000
MAX_BYTES = 2**29

# Images that may take long or much are decoded by a process with these limits, one at a time, so
# that threads don't add up. To start it takes a fraction of a second.
MAX_SECONDS = 60
MAX_MEMORY = 2 * 10**9  # bytes
_one_demanding_image = threading.Lock()

# All others take at most a second and half of a gigabyte, or some seconds if somebody made them so.
_LARGE = 2**25  # pixels
_LARGE_JPEG2000 = 2**21  # pixels: each can be a tenth of a kilobyte in memory
_LARGE_FILE = 2**25  # bytes: some parsers are written in Python
_LARGE_SCANS = 2**30  # pixels, each counted once for each scan of a JPEG
_LARGE_TEXT = 2**18  # bytes: of a PBM, PGM or PPM in digits, whose comments are cut out one by one
_LARGE_TAG = 2**16  # numbers in a TIFF's tag, of which Python makes objects: a strip or tile each

_BYTES = {1, 2, 7}
"""TIFF's numbers for the types whose values stay bytes."""

# Encoders make ten scans or so.
MAX_SCANS = 100

_NAMES_SHOWN = 3

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
    first frame. Raises ValueError, which names the file, for what is no readable image, has more
    than MAX_PIXELS, MAX_SIDE or MAX_BYTES, or takes more than MAX_SECONDS or MAX_MEMORY.
    """
    name = f"{len(source)} bytes" if isinstance(source, bytes) else repr(str(source))
    encoded = source if isinstance(source, bytes) else _read(source)
    if not encoded:
        raise ValueError(f"{name} is no image: it is empty")
    try:
        if _is_demanding_to_parse(encoded):
            return _decode_confined(encoded)
        with _opened(encoded) as image:
            return _decode_confined(encoded) if _is_demanding(image, encoded) else _pixels(image)
    except Exception as error:  # a parser that trips over a damaged file may raise anything
        raise ValueError(f"{name} {_complaint(error)}") from error


def _read(file: Path) -> bytes:
    nothing = f"{str(file)!r} is no image: it is not there, or not a regular file"
    try:
        # Asked first, because to open a device may do something, and again of what was opened. Not
        # blocking, because a named pipe may have come in between.
        if not file.is_file():
            raise ValueError(nothing)
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as stream:  # noqa: PTH123 -- a descriptor
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(nothing)
            if status.st_size > MAX_BYTES:
                raise ValueError(
                    f"{str(file)!r} is refused: it has {status.st_size:,} bytes, more than "
                    f"{MAX_BYTES:,}"
                )
            # No more than it says: files such as /proc/kmsg say 0, and to read them may take for
            # ever.
            return stream.read(status.st_size)
    except OSError as error:
        raise ValueError(f"{str(file)!r} can't be read: {error.strerror}") from error


def _opened(encoded: bytes) -> Image.Image:
    from PIL import Image

    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    if max(image.size) > MAX_SIDE:
        raise _RefusedError(f"is refused: it has a side of more than {MAX_SIDE:,} pixels")
    return image


class _RefusedError(Exception):
    """Says why an image is not decoded, as `_complaint` does."""


def _complaint(error: Exception) -> str:
    """Return what is wrong with an image, to be put behind its name."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"is refused: it has more than {MAX_PIXELS:,} pixels"
    if isinstance(error, _RefusedError):
        return str(error)
    if isinstance(error, MemoryError):
        return "is refused: it takes more memory than there is"
    if isinstance(error, UnidentifiedImageError):
        return f"is no image (known: {', '.join(FORMATS)})"
    return f"is no readable image: {_one_line(error)}"


def _is_demanding(image: Image.Image, encoded: bytes) -> bool:
    """Return whether an image may take long to decode, or much memory."""
    pixels = image.width * image.height
    if image.format in ("JPEG", "MPO"):
        return _num_scans(encoded) * pixels > _LARGE_SCANS or pixels > _LARGE
    if pixels > _LARGE:
        return True
    if image.format == "JPEG2000":
        return max(pixels, *_pixels_of_codestreams(encoded)) > _LARGE_JPEG2000
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        return bool(tags.get(322, 1) * tags.get(323, 1) > _LARGE)  # width and height of a tile
    return False


def _is_demanding_to_parse(encoded: bytes) -> bool:
    """Return whether it may take long, or much memory, to find out what image a file is."""
    if encoded.startswith((b"P1", b"P2", b"P3")):
        return len(encoded) > _LARGE_TEXT
    if encoded.startswith((b"II", b"MM")):
        return len(encoded) > _LARGE_FILE or _largest_tag(encoded) > _LARGE_TAG
    return len(encoded) > _LARGE_FILE


def _largest_tag(encoded: bytes) -> int:
    """Return the most numbers in a tag of a TIFF's first directory, bytes and text left out."""
    order = "<" if encoded.startswith(b"II") else ">"
    if 43 in encoded[2:4]:  # BigTIFF, of which there is none so small
        return len(encoded)
    try:
        (start,) = struct.unpack_from(f"{order}I", encoded, 4)
        (num_tags,) = struct.unpack_from(f"{order}H", encoded, start)
    except struct.error:
        return 0
    tags = encoded[start + 2 : start + 2 + 12 * num_tags]
    entries = struct.iter_unpack(f"{order}HHI4x", tags[: len(tags) // 12 * 12])
    return max((count for _, kind, count in entries if kind not in _BYTES), default=0)


def _num_scans(encoded: bytes) -> int:
    """Return how often there is the marker of a scan in a JPEG, or what looks like one."""
    count = encoded.count(b"\xff\xda")
    # In metadata, or a film behind the image, one pair of bytes in 2¹⁶ looks like it by chance.
    if count > MAX_SCANS + len(encoded) // 2**13:
        raise _RefusedError(f"is refused: it has more than {MAX_SCANS} scans")
    return count


def _pixels_of_codestreams(encoded: bytes) -> Iterator[int]:
    # Pillow takes the size from the container, the decoder from the codestream in it.
    yield 0
    for start in re.finditer(rb"\xff\x4f\xff\x51", encoded):
        header = encoded[start.end() + 4 : start.end() + 20]
        if len(header) == 16:
            right, bottom, left, top = struct.unpack(">4I", header)
            yield (right - left) * (bottom - top)


def _decode_confined(encoded: bytes) -> npt.NDArray[np.uint8]:
    """Return the pixels of an image that a process with limits decodes: this file, as a script."""
    command = [sys.executable, "-P", __file__, str(math.ceil(MAX_SECONDS) + 1), str(MAX_MEMORY)]
    # Else the threads of numpy's library take some of the memory, on a machine of many cores all.
    variables = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    try:
        with _one_demanding_image:
            done = subprocess.run(
                command,
                input=encoded,
                capture_output=True,
                env=variables,
                check=False,
                timeout=MAX_SECONDS,
            )
    except subprocess.TimeoutExpired as error:
        raise _RefusedError(f"is refused: it takes more than {MAX_SECONDS} seconds") from error
    if done.returncode == 0:
        return np.frombuffer(bytearray(done.stdout), np.uint8).reshape(IMAGE_SIZE, IMAGE_SIZE, 3)
    if done.returncode == 1 and done.stdout:
        raise _RefusedError(done.stdout.decode())
    raise _RefusedError(f"is refused: its decoder ended with status {done.returncode}")


def _confined(seconds: int, memory: int) -> int:
    """Decode the image that comes in; put out its pixels, or the reason why there are none."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The process that waits for this one ends it before, unless it is gone.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try:
        with _opened(sys.stdin.buffer.read()) as image:
            sys.stdout.buffer.write(_pixels(image).tobytes())
    except MemoryError:
        complaint = f"is refused: it takes more than {memory / 1e9:g} GB of memory"
    except Exception as error:  # some parsers say that the data is broken where memory ends
        complaint = f"{_complaint(error)} (within {memory / 1e9:g} GB of memory)"
    else:
        return 0
    sys.stdout.buffer.write(complaint.encode())
    return 1


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
    values = np.array(image, np.int32)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"its pixels range from {values.min()} to {values.max()}, more than 16 bits hold"
        )
    values += 128
    values //= 257
    return Image.fromarray(values.astype(np.uint8))


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


if __name__ == "__main__":
    sys.exit(_confined(*map(int, sys.argv[1:])))
