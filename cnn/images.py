"""Image files and arrays to square RGB images: one way of decoding, for training and prediction.

Needs only numpy, and Pillow where it decodes. So a prediction reads images without torch, and
training from memory does without Pillow.
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
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SIZE = 32
"""Height and width of a data set's images, unless `--image-size` says otherwise."""

MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 8, 512
"""The smallest are the digits as they were scanned. Of the largest, a thousand take 0.8 GB."""

# Named, so that a stray file does not reach one of Pillow's forty parsers (EPS starts Ghostscript).
# Also, earlier imports of plugins make no difference.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "JPEG2000", "PPM", "TIFF", "WEBP")

# Checked before anything is decoded: a few bytes can stand for gigabytes of pixels. Pillow warns
# beyond MAX_PIXELS, and its tables for resizing take gigabytes beyond MAX_SIDE.
MAX_PIXELS = 89_478_485
MAX_SIDE = 1_000_000
MAX_BYTES = 2**29

# Demanding images are decoded by a process with these limits, one at a time, because threads would
# add up. It starts in a fraction of a second.
MAX_SECONDS = 60
MAX_MEMORY = 2 * 10**9  # bytes
_one_demanding_image = threading.Lock()

# Other images take at most a second and 0.5 GB, or some seconds if made to.
_LARGE = 2**25  # pixels
_LARGE_JPEG2000 = 2**21  # pixels: each may take 100 bytes of memory
_LARGE_FILE = 2**25  # bytes: some parsers are written in Python
_LARGE_SCANS = 2**30  # pixels times the scans of a JPEG
_LARGE_TEXT = 2**18  # bytes of a PBM, PGM or PPM in digits, whose comments are removed one by one
_LARGE_TAG = 2**16  # numbers in a TIFF's tag, which become Python objects: one per strip or tile

_BYTES = {1, 2, 7}  # TIFF's type numbers whose values stay bytes

# Encoders write about ten scans.
MAX_SCANS = 100


def decode(source: Path | bytes, image_size: int = IMAGE_SIZE) -> npt.NDArray[np.uint8]:
    """Return an image file, or the bytes of one, as uint8 pixels (S, S, 3), S the image size.

    Turned by its EXIF orientation, converted to RGB (transparency is dropped, as torchvision's
    ImageFolder does), and squashed to a square. Of an animation, the first frame is taken.
    Raises ValueError, which names the file, for an unreadable image, or one beyond MAX_PIXELS,
    MAX_SIDE, MAX_BYTES, MAX_SECONDS or MAX_MEMORY.
    """
    name = f"{len(source)} bytes" if isinstance(source, bytes) else repr(str(source))
    encoded = source if isinstance(source, bytes) else _read(source)
    if not encoded:
        raise ValueError(f"{name} is no image: it is empty")
    try:
        if _is_demanding_to_parse(encoded):
            return _decode_confined(encoded, image_size)
        with _opened(encoded) as image:
            if not _is_demanding(image, encoded):
                return pixels(image, image_size)
        return _decode_confined(encoded, image_size)
    except Exception as error:  # a parser may raise anything on a damaged file
        raise ValueError(f"{name} {_complaint(error)}") from error


def _read(file: Path) -> bytes:
    nothing = f"{str(file)!r} is no image: it is not there, or not a regular file"
    try:
        # Checked first, because opening a device may have effects, and again after opening.
        # Non-blocking, because a named pipe may replace the file in between.
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
            # At most its size: files such as /proc/kmsg say 0, and reading them may never end.
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
    """The reason why an image is not decoded, in the form of `_complaint`."""


def _complaint(error: Exception) -> str:
    """Return what is wrong with an image, to follow its name in a sentence."""
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
    """Return whether an image may take much time or memory to decode."""
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
    """Return whether recognising the format of a file may take much time or memory."""
    if encoded.startswith((b"P1", b"P2", b"P3")):
        return len(encoded) > _LARGE_TEXT
    if encoded.startswith((b"II", b"MM")):
        return len(encoded) > _LARGE_FILE or _largest_tag(encoded) > _LARGE_TAG
    return len(encoded) > _LARGE_FILE


def _largest_tag(encoded: bytes) -> int:
    """Return the largest count of numbers in a tag of a TIFF's first directory, text left out."""
    order = "<" if encoded.startswith(b"II") else ">"
    if 43 in encoded[2:4]:  # BigTIFF, which is never so small
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
    """Return how often the marker of a scan occurs in a JPEG."""
    count = encoded.count(b"\xff\xda")
    # Other data, such as a film after the image, has these two bytes once in 2¹⁶ by chance.
    if count > MAX_SCANS + len(encoded) // 2**13:
        raise _RefusedError(f"is refused: it has more than {MAX_SCANS} scans")
    return count


def _pixels_of_codestreams(encoded: bytes) -> Iterator[int]:
    # Pillow reads the size from the container, the decoder from the codestream in it.
    yield 0
    for start in re.finditer(rb"\xff\x4f\xff\x51", encoded):
        header = encoded[start.end() + 4 : start.end() + 20]
        if len(header) == 16:
            right, bottom, left, top = struct.unpack(">4I", header)
            yield (right - left) * (bottom - top)


def _decode_confined(encoded: bytes, image_size: int) -> npt.NDArray[np.uint8]:
    """Return the pixels of an image, decoded by a process with limits: this file as a script."""
    arguments = map(str, (math.ceil(MAX_SECONDS) + 1, MAX_MEMORY, image_size))
    command = [sys.executable, "-P", __file__, *arguments]
    # The threads of numpy's library would take memory for each core.
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
        return np.frombuffer(bytearray(done.stdout), np.uint8).reshape(image_size, image_size, 3)
    if done.returncode == 1 and done.stdout:
        raise _RefusedError(done.stdout.decode())
    raise _RefusedError(f"is refused: its decoder ended with status {done.returncode}")


def _confined(seconds: int, memory: int, image_size: int) -> int:
    """Decode the image on standard input; write its pixels, or the reason why not."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The parent kills this process earlier, unless the parent is gone.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try:
        with _opened(sys.stdin.buffer.read()) as image:
            sys.stdout.buffer.write(pixels(image, image_size).tobytes())
    except MemoryError:
        complaint = f"is refused: it takes more than {memory / 1e9:g} GB of memory"
    except Exception as error:  # out of memory, some parsers say that the data is broken
        complaint = f"{_complaint(error)} (within {memory / 1e9:g} GB of memory)"
    else:
        return 0
    sys.stdout.buffer.write(complaint.encode())
    return 1


def pixels(image: Image.Image, image_size: int) -> npt.NDArray[np.uint8]:
    """Return an image of Pillow, which this may change, as `decode` returns a file."""
    from PIL import ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    elif image.mode == "F":
        raise ValueError("its pixels are floats, without a known range: save it with 8 or 16 bits")
    # RGB has no transparency, and Pillow warns of what it can't convert.
    image.info.pop("transparency", None)
    rgb = image.convert("RGB")
    if rgb.size != (image_size, image_size):
        rgb = _squash(rgb, image_size)
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


def _squash(image: Image.Image, image_size: int) -> Image.Image:
    from PIL import Image

    return image.resize((image_size, image_size), Image.Resampling.BILINEAR)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def resize(images: npt.NDArray[np.uint8], image_size: int = IMAGE_SIZE) -> npt.NDArray[np.uint8]:
    """Return images as (N, S, S, 3), S the image size, interpolated as in `decode`.

    Takes uint8 arrays (N, H, W), (N, H, W, 1) or (N, H, W, 3), and returns images of the right
    shape unchanged. Raises ValueError for others.
    """
    from PIL import Image

    allowed = "uint8 and (N, H, W), (N, H, W, 1) or (N, H, W, 3), H and W ≥ 1"
    grey = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 1)
    colour = images.ndim == 4 and images.shape[3] == 3
    if images.dtype != np.uint8 or not (grey or colour) or 0 in images.shape[1:3]:
        raise ValueError(f"images must be {allowed}: these are {images.dtype} {images.shape}")
    if images.shape[1:] == (image_size, image_size, 3):
        return images
    squared = empty_images(len(images), image_size)
    planes = images.reshape(images.shape[:3]) if grey else images
    for result, plane in zip(squared, planes, strict=True):
        pixels = np.asarray(_squash(Image.fromarray(plane), image_size))
        result[:] = pixels[:, :, None] if grey else pixels
    return squared


def empty_images(count: int, image_size: int) -> npt.NDArray[np.uint8]:
    """Return memory for images; raise ValueError if the machine has less than they take."""
    shape = (count, image_size, image_size, 3)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if math.prod(shape) > memory:
        raise ValueError(
            f"{count:,} images of {image_size}×{image_size} pixels take "
            f"{math.prod(shape) / 1e9:.1f} GB, and this machine has {memory / 1e9:.1f} GB of "
            "memory: give a smaller --image-size"
        )
    return np.empty(shape, np.uint8)


if __name__ == "__main__":
    sys.exit(_confined(*map(int, sys.argv[1:])))
