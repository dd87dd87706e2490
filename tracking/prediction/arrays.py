"""Read arrays of images and labels from `.npy` and `.npz` files, which may be hostile.

The sizes in a file are compared with the limits and with its real size before any memory is
allocated. An `.npy` is mapped, so that it may be larger than the memory.
"""

from __future__ import annotations

import io
import math
import os
import sys
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tracking.errors import one_line
from tracking.models.labels import check_labels
from tracking.text import listed

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

CHANNELS = (1, 3)

MAX_UNPACKED = 2 * 10**9
"""The most bytes of the arrays of an `.npz`, which are unpacked into memory."""
MAX_SIDE = 65_535
"""The largest height and width of an image: the limit of JPEG."""

_MAGIC = b"\x93NUMPY"
# NumPy's headers have about 80 bytes. A directory of 1 MiB lists ten thousand arrays.
_LARGEST_HEADER = 4096
_LARGEST_DIRECTORY = _PIECE = 2**20


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of an array in a file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_fortran: bool
    offset: int
    """The position of its elements."""

    @property
    def num_bytes(self) -> int:
        """The bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_arrays(
    file: Path, *, max_pixels: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any] | None]:
    """Return the images of a file, mapped into memory if it is an `.npy`, and their labels.

    Args:
        file: an `.npy` or `.npz`.
        max_pixels: the most pixels of an image.

    Returns:
        Images (N, H, W, C), (N, H, W) or (H, W, C), none of these 0. Labels (N,), integers or
        texts, from the array `labels` of an `.npz`, else None.

    Raises:
        ValueError: it is damaged, holds something else, or exceeds a limit.
    """
    try:
        if not file.is_file():
            raise ValueError("it is no regular file")  # noqa: TRY301 -- gets the file's name below
        with file.open("rb") as stream:
            is_plain = stream.read(len(_MAGIC)) == _MAGIC
        if is_plain or file.suffix.lower() == ".npy":  # an .npy may have another name
            return _map(file, max_pixels), None
        with _Archive(file) as archive:
            return _unpack(file, archive, max_pixels)
    except _RefusedError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"can't read the array {str(file)!r}: {one_line(error)}") from error


class _RefusedError(ValueError):
    """The file is intact, but holds no images, or too much."""


def _check_images(file: Path, header: Header, max_pixels: int) -> None:
    shape = header.shape
    known = len(shape) == 3 or (len(shape) == 4 and shape[3] in CHANNELS)
    if header.dtype != "uint8" or not known or 0 in shape:
        raise _RefusedError(
            f"{str(file)!r} holds {header.dtype} {shape}: images must be uint8 and "
            "(N, H, W, C), (N, H, W) or (H, W, C), with C 1 or 3, and none of them 0"
        )
    height, width = shape[:2] if is_one_image(shape) else shape[1:3]
    if height * width > max_pixels or max(height, width) > MAX_SIDE:
        raise _RefusedError(
            f"{str(file)!r} is refused: its images are {height:,}×{width:,}, and may have "
            f"{max_pixels:,} pixels and sides of {MAX_SIDE:,} at most"
        )


def is_one_image(shape: tuple[int, ...]) -> bool:
    """Return whether an array of this shape is one image (H, W, C)."""
    return len(shape) == 3 and shape[2] in CHANNELS


# Headers


def _read_header(stream: IO[bytes]) -> Header:
    """Read the header of an array, and check it."""
    from numpy.lib import format as npy

    start = stream.read(len(_MAGIC) + 2)
    # Version 3 is for names of fields: images and labels have none.
    length_bytes, parse = {
        _MAGIC + b"\1\0": (2, npy.read_array_header_1_0),
        _MAGIC + b"\2\0": (4, npy.read_array_header_2_0),
    }.get(start, (0, None))
    if parse is None:
        raise ValueError("it is no NumPy array (format 1.0 or 2.0)")
    length = stream.read(length_bytes)
    if int.from_bytes(length, "little") > _LARGEST_HEADER:
        raise ValueError(f"its header is larger than {_LARGEST_HEADER:,} bytes")
    text = stream.read(int.from_bytes(length, "little"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy evaluates the text, and Python warns about it
            shape, is_fortran, dtype = parse(io.BytesIO(length + text))
    except Exception as error:  # a hostile header may raise anything
        raise ValueError("its header is damaged") from error
    if dtype.hasobject:
        raise ValueError("it holds Python objects, not numbers or texts")
    if any(size < 0 for size in shape):
        raise ValueError(f"its shape has a negative size: {shape}")
    offset = len(start) + len(length) + len(text)
    return Header(dtype=dtype, shape=shape, is_fortran=is_fortran, offset=offset)


# .npy


def _map(file: Path, max_pixels: int) -> npt.NDArray[np.uint8]:
    import numpy as np

    with file.open("rb") as stream:
        header = _read_header(stream)
    _check_images(file, header, max_pixels)
    _check_size(header, there=file.stat().st_size - header.offset)
    order: Any = "F" if header.is_fortran else "C"
    return np.memmap(file, np.uint8, "r", header.offset, header.shape, order=order)


def _check_size(header: Header, *, there: int) -> None:
    if there < header.num_bytes:
        raise ValueError(
            f"its header says {header.dtype} {header.shape}, {header.num_bytes:,} bytes, and there "
            f"are {there:,}"
        )


# .npz


class _Archive(zipfile.ZipFile):
    """A ZIP file that raises ValueError for a directory that is too large."""

    def __init__(self, file: Path) -> None:
        self._stream = _BoundedFile(file)
        try:
            super().__init__(self._stream)
        except BaseException:
            self._stream.close()
            raise

    def close(self) -> None:
        """Close the archive and its file."""
        super().close()
        self._stream.close()


class _BoundedFile(io.FileIO):
    """A file whose reads are limited to `_LARGEST_DIRECTORY` bytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read some bytes, or raise ValueError if they are too many."""
        if size is None or size < 0:
            size = max(0, os.fstat(self.fileno()).st_size - self.tell())
        if size > _LARGEST_DIRECTORY:
            raise ValueError(f"its directory is larger than {_LARGEST_DIRECTORY:,} bytes")
        return super().read(size) or b""


def _unpack(
    file: Path, archive: zipfile.ZipFile, max_pixels: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any] | None]:
    """Return images and labels. Both headers are checked before either array is read."""
    names = [entry.filename.removesuffix(".npy") for entry in archive.infolist()]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"it holds {twice[0]!r} twice")
    entries = dict(zip(names, archive.infolist(), strict=True))
    if "images" not in entries:
        raise _RefusedError(f"{str(file)!r} holds no array 'images', but {listed(names)}")
    headers = {
        name: _entry_header(archive, name, entries[name])
        for name in ("images", "labels")
        if name in entries
    }
    _check_images(file, headers["images"], max_pixels)
    labels = headers.get("labels")
    shape = headers["images"].shape
    total = sum(header.num_bytes for header in headers.values())
    if labels is not None:
        try:
            check_labels(labels.shape, labels.dtype, size=1 if is_one_image(shape) else shape[0])
        except ValueError as error:
            raise _RefusedError(f"{str(file)!r}: {error}") from error
        total += 8 * labels.shape[0]  # the references to names of classes
    if total > MAX_UNPACKED:
        raise _RefusedError(
            f"{str(file)!r} is refused: its arrays take {total:,} bytes unpacked, more than "
            f"{MAX_UNPACKED:,} (an .npy may be of any size)"
        )
    for name, header in headers.items():
        _check_size(header, there=entries[name].file_size - header.offset)
    arrays = {name: _unpacked(archive, entries[name], headers[name]) for name in headers}
    return arrays["images"], arrays.get("labels")


def _entry_header(archive: zipfile.ZipFile, name: str, entry: zipfile.ZipInfo) -> Header:
    if entry.flag_bits & 1:
        raise ValueError(f"{name!r} in it is encrypted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name!r} in it is not compressed as NumPy does it (deflate)")
    with _opened(archive, entry) as stream:
        return _read_header(stream)


def _opened(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> IO[bytes]:
    """Open an entry, or raise ValueError if `zipfile` does not support it."""
    try:
        return archive.open(entry)
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(str(error)) from error


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, header: Header) -> npt.NDArray[Any]:
    """Return an array, read in pieces: a truncated one takes no memory for its missing part."""
    import numpy as np

    content = np.empty(header.num_bytes, np.uint8)
    done = 0
    with _opened(archive, entry) as stream:
        stream.read(header.offset)
        while done < len(content):
            piece = stream.read(min(_PIECE, len(content) - done))
            if not piece:
                raise ValueError(f"it ends after {done:,} of {len(content):,} bytes")
            content[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
            done += len(piece)
    if header.dtype.kind == "U":  # NumPy can't decode what is no character
        letters = content.view(np.dtype("u4").newbyteorder(header.dtype.byteorder))
        if letters.size and letters.max() > sys.maxunicode:
            raise ValueError(f"it holds a text with a letter {letters.max():#x}")
    if header.is_fortran:
        return content.view(header.dtype).reshape(header.shape[::-1]).transpose()
    return content.view(header.dtype).reshape(header.shape)
