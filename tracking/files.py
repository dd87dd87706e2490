"""Files created and opened safely in folders that other users can write to.

Others can predict the names of drafts and locks. Under such a name they may put a link, a hard link
or a named pipe. So no link is followed, and no file of another user is written to.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from tracking.errors import TransientError, one_line

_CREATE = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK, because opening a named pipe waits for a process at its other end.
_OPEN = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def create(file: Path, *, mode: int = 0o666) -> BinaryIO:
    """Create and open a new regular file: FileExistsError if the name exists, even as a link."""
    return os.fdopen(os.open(file, os.O_WRONLY | os.O_EXCL | _CREATE, mode), "wb")


@contextmanager
def replacing(file: Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Write a file that appears as a whole at the end of the `with` block, or not at all.

    The draft lies beside it under a random name. An existing file is replaced; a link is replaced
    itself, not its target.
    """
    draft = file.with_name(f".draft-{secrets.token_hex(8)}")
    with create(draft, mode=mode) as stream:
        try:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())  # else a power cut may leave the name with an empty file
            draft.replace(file)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def open_own(file: Path, *, is_shared: bool = False, buffering: int = -1) -> BinaryIO:
    """Open a draft or a lock to read and append; create it if it is missing.

    Existing content stays: an earlier process may have left it, or another may be writing it. If
    the file `is_shared`, it may be another user's. Raises ValueError as `check_own` does.
    """
    check_own(file, is_shared=is_shared)
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | _CREATE | _OPEN, 0o666)
    stream = os.fdopen(descriptor, "a+b", buffering)
    try:  # again: another process may have exchanged the file
        _check(file, os.fstat(descriptor), is_shared=is_shared)
    except BaseException:
        stream.close()
        raise
    return stream


def read_own(file: Path, *, most: int) -> bytes:
    """Return the content of a draft or a lock: ValueError if it has more than `most` bytes."""
    check_own(file)
    with os.fdopen(os.open(file, os.O_RDONLY | _OPEN), "rb") as stream:
        _check(file, os.fstat(stream.fileno()), is_shared=False)
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{str(file)!r} has more than {most:,} bytes")
    return content


def check_own(file: Path, *, is_shared: bool = False) -> None:
    """Raise ValueError if the name of a draft or a lock belongs to something else.

    Ours is a regular file of this user, no link, with one name. A missing file passes.
    """
    with suppress(FileNotFoundError):
        _check(file, file.lstat(), is_shared=is_shared)


def _check(file: Path, status: os.stat_result, *, is_shared: bool) -> None:
    what = None
    if stat.S_ISLNK(status.st_mode):
        what = "a link"
    elif stat.S_ISDIR(status.st_mode):
        what = "a folder"
    elif not stat.S_ISREG(status.st_mode):
        what = "a named pipe or a device"
    elif status.st_nlink > 1:
        what = "a second name of another file (a hard link)"
    elif not is_shared and status.st_uid != os.geteuid():
        what = "another user's"
    if what:
        raise ValueError(
            f"{str(file)!r} would be written to, and is {what}: remove it, or write elsewhere"
        )


@contextmanager
def writing(what: str = "the predictions") -> Iterator[None]:
    """Raise errors of the disk as a TransientError of one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise TransientError(f"can't write {what}: {reason}") from error


@contextmanager
def open_folder(folder: Path, files: Sequence[str]) -> Iterator[Path]:
    """Yield a scratch folder; at the end of the `with` block its files are moved to `folder`.

    A new folder appears with all files at once. In an existing one, each file is replaced as a
    whole, in the order of `files`; other files stay.

    Args:
        folder: its parent must exist.
        files: all names that may be written; an old file of a name not written now is removed.

    Raises:
        ValueError: a folder in `folder` is a link, so files elsewhere would be replaced.
    """
    folder = folder.resolve()
    for inner in {(folder / name).parent for name in files} - {folder}:
        if inner.is_symlink():
            raise ValueError(f"{str(inner)!r} would be written to, and is a link: remove it")
    # The scratch folder must be on the same disk, and another disk may be mounted at `folder`.
    place = folder if folder.exists() else folder.parent
    with TemporaryDirectory(prefix=".draft-", dir=place) as scratch:
        draft = Path(scratch, "folder")
        draft.mkdir()
        yield draft
        if not folder.exists():
            draft.rename(folder)
            return
        for name in files:
            if (draft / name).exists():
                (folder / name).parent.mkdir(exist_ok=True)
                (draft / name).replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)


def check_folder(folder: Path, *, option: str, source: str = "") -> None:
    """Raise ValueError if a report can't be written to a folder.

    Args:
        folder: it need not exist, but its parent must.
        option: the flag that named it, for the message.
        source: the images to predict: the folder must not be inside them.
    """
    try:
        target = resolved(folder)
        place = target if target.exists() else target.parent
        if not place.is_dir():
            raise ValueError(f"can't write {option}: there is no folder {str(place)!r}")
        if not is_writable(place):
            raise ValueError(f"can't write {option}: {str(place)!r} is read-only")
        for images in filter(None, (source, source.rpartition(":")[0])):
            if Path(images).is_dir() and target.is_relative_to(Path(images).resolve()):
                raise ValueError(
                    f"can't write {option}: {str(folder)!r} is in {images!r}, and the figures "
                    "would be among its images"
                )
    except (OSError, RuntimeError) as error:  # before 3.13, a RuntimeError for links in a circle
        raise ValueError(f"can't write {option} {str(folder)!r}: {one_line(error)}") from error


def resolved(path: Path) -> Path:
    """Return where a path leads. OSError: links in a circle, or a name that is too long.

    Newer Pythons' `Path.resolve` and `Path.exists` are silent on both.
    """
    target = path.resolve()
    with suppress(FileNotFoundError, NotADirectoryError):
        if stat.S_ISLNK(target.lstat().st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return target


def is_writable(path: Path) -> bool:
    """Return whether a file or folder is writable; root respects a read-only mode as well."""
    return os.access(path, os.W_OK) and bool(path.stat().st_mode & 0o222)
