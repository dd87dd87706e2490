"""Files made and opened without harm to others: no link is followed, nobody else's is written to.

Names of drafts and locks can be foreseen, and a folder may be one that others write to: under such
a name there may be a link to another file, a second name of one, or a named pipe.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_CREATE = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
# Opening a named pipe would wait for somebody at its other end.
_OPEN = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def create(file: Path, *, mode: int = 0o666) -> BinaryIO:
    """Make a new regular file, and open it for writing.

    Args:
        file: raises FileExistsError if anything has that name already, a link to nowhere included.
        mode: what `umask` leaves of it are the file's permissions.
    """
    return os.fdopen(os.open(file, os.O_WRONLY | os.O_EXCL | _CREATE, mode), "wb")


@contextmanager
def replacing(file: Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Write a file that takes its place as a whole when the `with` block is done, or not at all.

    It is drafted beside it, under a name that can't be foreseen. What had the file's name is
    replaced; if that was a link, what it led to stays as it was.
    """
    draft = file.with_name(f".draft-{secrets.token_hex(8)}")
    with create(draft, mode=mode) as stream:
        try:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())  # before it gets its name: a power cut may come in between
            draft.replace(file)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def open_own(file: Path, *, is_shared: bool = False, buffering: int = -1) -> BinaryIO:
    """Open a draft or a lock to read it and append to it; one that isn't there is made.

    What is there stays as it is: an earlier process may have left it, or another be at work on it.

    Args:
        file: see `check_own`.
        is_shared: whether it may be another user's.
        buffering: as `open` takes it.

    Raises:
        ValueError: what has that name is no such file.
        OSError: it can't be opened.
    """
    check_own(file, is_shared=is_shared)
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | _CREATE | _OPEN, 0o666)
    stream = os.fdopen(descriptor, "a+b", buffering)
    try:  # again: what was looked at may have been exchanged
        _check(file, os.fstat(descriptor), is_shared=is_shared)
    except BaseException:
        stream.close()
        raise
    return stream


def read_own(file: Path, *, most: int) -> bytes:
    """Return what is in a file of that kind, or raise: see `open_own`. ValueError if it's more."""
    check_own(file)
    with os.fdopen(os.open(file, os.O_RDONLY | _OPEN), "rb") as stream:
        _check(file, os.fstat(stream.fileno()), is_shared=False)
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{str(file)!r} has more than {most:,} bytes")
    return content


def check_own(file: Path, *, is_shared: bool = False) -> None:
    """Raise ValueError if a name that we give to drafts or locks is that of something else.

    Ours is a regular file that is no link, has no other name, and belongs to this user.
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
